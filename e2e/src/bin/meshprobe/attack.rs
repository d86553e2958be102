//! What a hostile program in a pod would try. Each attempt prints what happened and fails the way the kernel or the mesh
//! made it fail; success is success of the attack.

use std::fs::{self, File};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use clap::Subcommand;
use nix::sched::{CloneFlags, setns};
use nix::sys::ptrace;
use nix::sys::wait::waitpid;
use nix::unistd::Pid;
use serde_json::json;
use socket2::{Domain, Protocol, Socket, Type};

use crate::say;

#[derive(Debug, Subcommand)]
pub(crate) enum Attack {
    /// Connects with a mark of the proxy, past the capture
    Mark { mark: String, to: SocketAddr },
    /// Enters a namespace
    Setns { path: PathBuf },
    /// Reads the memory of a process
    Ptrace { pid: i32 },
    /// Sends a TCP SYN with somebody else's source address from a raw socket
    Spoof { from: IpAddr, to: SocketAddr },
    /// Writes to a file, for settings below /proc/sys
    Write { path: PathBuf, text: String },
    /// Binds a listener that takes connections for foreign addresses
    Transparent { listen: SocketAddr },
    /// Opens a packet socket, which sees what others send
    Packet,
}

pub(crate) fn run(attack: Attack) -> Result<()> {
    match attack {
        Attack::Mark { mark, to } => with_mark(&mark, to),
        Attack::Setns { path } => enter(&path),
        Attack::Ptrace { pid } => trace(pid),
        Attack::Spoof { from, to } => spoof(from, to),
        Attack::Write { path, text } => {
            fs::write(&path, text).with_context(|| format!("write {}", path.display()))
        }
        Attack::Transparent { listen } => transparent(listen),
        Attack::Packet => {
            Socket::new(Domain::PACKET, Type::RAW, None).context("packet socket")?;
            Ok(())
        }
    }
}

fn with_mark(mark: &str, to: SocketAddr) -> Result<()> {
    let digits = mark.strip_prefix("0x").context("the mark is hexadecimal: 0x539")?;
    let mark = u32::from_str_radix(digits, 16)?;
    let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_mark(mark).with_context(|| format!("SO_MARK {mark:#x}"))?;
    socket.connect_timeout(&to.into(), Duration::from_secs(3)).context("connect")?;
    say(&json!({ "connected": true }))
}

fn enter(path: &PathBuf) -> Result<()> {
    let file = File::open(path).with_context(|| format!("open {}", path.display()))?;
    setns(file.as_fd(), CloneFlags::empty())
        .with_context(|| format!("setns {}", path.display()))?;
    say(&json!({ "entered": path }))
}

fn trace(pid: i32) -> Result<()> {
    let pid = Pid::from_raw(pid);
    ptrace::attach(pid).with_context(|| format!("ptrace {pid}"))?;
    waitpid(pid, None)?;
    ptrace::detach(pid, None)?;
    say(&json!({ "traced": pid.as_raw() }))
}

fn spoof(from: IpAddr, to: SocketAddr) -> Result<()> {
    let (IpAddr::V4(source), SocketAddr::V4(target)) = (from, to) else { bail!("IPv4 only") };
    let socket =
        Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(255))).context("raw socket")?;
    socket.set_header_included_v4(true).context("IP_HDRINCL")?;
    let mut packet = vec![0x45, 0, 0, 40, 0, 1, 0, 0, 64, 6, 0, 0];
    packet.extend(source.octets());
    packet.extend(target.ip().octets());
    let mut tcp = vec![];
    tcp.extend(40_000_u16.to_be_bytes());
    tcp.extend(target.port().to_be_bytes());
    // Sequence, acknowledgement, length of the header, SYN, window.
    tcp.extend([0, 0, 0, 1, 0, 0, 0, 0, 0x50, 0x02, 0xff, 0xff, 0, 0, 0, 0]);
    let sum = checksum(&pseudo_header(&packet, &tcp));
    tcp[16..18].copy_from_slice(&sum.to_be_bytes());
    packet.extend(tcp);
    socket.send_to(&packet, &to.into()).context("send")?;
    say(&json!({ "sent": packet.len() }))
}

fn pseudo_header(ip: &[u8], tcp: &[u8]) -> Vec<u8> {
    let mut text = ip[12..20].to_vec();
    text.extend([0, 6, 0, 20]);
    text.extend(tcp);
    text
}

fn checksum(bytes: &[u8]) -> u16 {
    let mut sum: u32 =
        bytes.chunks(2).map(|c| u32::from(c[0]) << 8 | c.get(1).map_or(0, |b| u32::from(*b))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).unwrap_or_default()
}

fn transparent(listen: SocketAddr) -> Result<()> {
    let socket = Socket::new(Domain::for_address(listen), Type::STREAM, Some(Protocol::TCP))?;
    socket.set_ip_transparent_v4(true).context("IP_TRANSPARENT")?;
    socket.bind(&listen.into()).context("bind")?;
    socket.listen(1).context("listen")?;
    say(&json!({ "listening": listen.to_string() }))
}
