//! Judges what passes on an interface: TLS 1.3 in the tunnels, and a canary that must not be seen.

use std::collections::BTreeMap;
use std::io::Read;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use e2e::wire::Seen;
use net::NetNs;
use net::packet::{Flow, Flows, Gap, Segment, Tap, tcp_segment, tls_records};
use serde_json::json;

const TUNNEL: u16 = 15008;
/// Between two looks whether the input has ended.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// TLS record types.
const CHANGE_CIPHER: u8 = 20;
const HANDSHAKE: u8 = 22;
const DATA: u8 = 23;

pub(crate) fn run(interface: &str, canary: &str, most: Duration) -> Result<()> {
    let mut tap = Tap::open(&NetNs::current()?, interface)?;
    crate::say(&json!({ "ready": true }))?;
    let over = input_ended();
    let until = Instant::now() + most;
    let (mut seen, mut flows) = (Seen::default(), Flows::default());
    let mut plain = BTreeMap::new();
    while !over.load(Ordering::Relaxed) && Instant::now() < until {
        // The flag is read again after each pause in the traffic.
        while let Some(frame) = tap.next(Instant::now() + LOOK_EVERY)? {
            if let Some(segment) = tcp_segment(frame) {
                count(&segment, canary.as_bytes(), &mut seen, &mut plain);
                flows.add(&segment);
            }
        }
    }
    seen.plain = plain.into_iter().collect();
    seen.canary |= flows.contain(canary.as_bytes());
    seen.overflowed = flows.overflowed();
    for (from, to, flow) in flows.with_port(TUNNEL) {
        if let Err(why) = judge(flow, from.port() == TUNNEL, &mut seen) {
            seen.not_tls.push(format!("{from} -> {to}: {why}"));
        }
    }
    crate::say(&seen)
}

fn input_ended() -> Arc<AtomicBool> {
    let over = Arc::new(AtomicBool::new(false));
    let flag = over.clone();
    std::thread::spawn(move || {
        // Whatever is written there means nothing; its end does.
        let _ = std::io::copy(&mut std::io::stdin(), &mut std::io::sink());
        flag.store(true, Ordering::Relaxed);
    });
    over
}

fn count(segment: &Segment<'_>, canary: &[u8], seen: &mut Seen, plain: &mut BTreeMap<u16, u64>) {
    let ports = [segment.from.port(), segment.to.port()];
    let of_a_pod = is_pod(segment.from.ip()) || is_pod(segment.to.ip());
    if segment.payload.is_empty() || !of_a_pod {
        return;
    }
    seen.segments += 1;
    seen.canary |= segment.payload.windows(canary.len().max(1)).any(|w| w == canary);
    if ports.contains(&TUNNEL) {
        seen.tunnel_segments += 1;
        seen.tunnel_bytes += segment.payload.len() as u64;
    } else {
        // The lower one is the service's.
        *plain.entry(ports[0].min(ports[1])).or_default() += 1;
    }
}

/// Whether a lab gives such addresses to pods. What nodes say to each other and to the control plane on their own account is
/// not looked at: configuration, over TLS, and readiness checks.
fn is_pod(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets()[..2] == [10, 244],
        IpAddr::V6(ip) => ip.segments()[..3] == [0xfd00, 0x10, 0x244],
    }
}

/// Checks one direction of a tunnel.
fn judge(flow: &Flow, is_server: bool, seen: &mut Seen) -> Result<(), String> {
    match flow.check_whole() {
        Err(Gap::Front) => {
            seen.older += 1;
            return Ok(());
        }
        // A hole is usually at the end, behind what had not arrived when the tap closed.
        Err(Gap::Hole(_) | Gap::TooLong) | Ok(()) => {}
    }
    let bytes = flow.bytes();
    let records = tls_records(bytes).map_err(|e| e.to_string())?;
    let Some(first) = records.first() else { return Ok(()) };
    if first.kind != HANDSHAKE {
        return Err(format!("it begins with a record of type {}", first.kind));
    }
    if is_server && !chose_tls13(bytes) {
        return Err("the server chose another version than TLS 1.3".to_owned());
    }
    // In TLS 1.3 everything behind the hellos looks like application data.
    let odd = records[1..].iter().find(|r| r.kind != DATA && r.kind != CHANGE_CIPHER);
    if let Some(odd) = odd {
        return Err(format!("behind the hello there is a record of type {}", odd.kind));
    }
    seen.records += records.len() as u64;
    seen.data_records += records.iter().filter(|r| r.kind == DATA).count() as u64;
    Ok(())
}

/// Whether a flow begins with a ServerHello whose extension `supported_versions` says 1.3.
fn chose_tls13(flow: &[u8]) -> bool {
    let read = || -> std::io::Result<bool> {
        let mut rest = flow.get(5..).unwrap_or_default();
        let mut take = |n: usize| -> std::io::Result<Vec<u8>> {
            let mut bytes = vec![0; n];
            rest.read_exact(&mut bytes)?;
            Ok(bytes)
        };
        let number = |b: &[u8]| b.iter().fold(0_usize, |n, b| n << 8 | usize::from(*b));
        // Type, length, version, random.
        if take(1 + 3 + 2 + 32)?[0] != 2 {
            return Ok(false);
        }
        let session = number(&take(1)?);
        // Session, cipher, compression.
        take(session + 2 + 1)?;
        let mut left = number(&take(2)?);
        while left >= 4 {
            let (kind, length) = (number(&take(2)?), number(&take(2)?));
            let value = take(length)?;
            if kind == 43 {
                return Ok(value == [3, 4]);
            }
            left = left.saturating_sub(4 + length);
        }
        Ok(false)
    };
    read().unwrap_or(false)
}
