//! DNS questions by UDP in a closed loop: each socket asks again when it has its answer.

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::hist::Histogram;
use crate::lines::{self, Errors};
use crate::poller::Poller;

/// A question without an answer for so long is lost, and asked again: UDP loses some.
const LOST: Duration = Duration::from_secs(1);
const BUFFER: usize = 4096;

/// What to ask, and how.
#[derive(Clone, Debug)]
pub struct Plan {
    pub to: SocketAddr,
    pub name: String,
    pub ipv6: bool,
    pub sockets: usize,
    pub time: Duration,
    /// A socket for each question, as C libraries have it.
    pub fresh: bool,
}

/// Asks until time is over, and reports questions a second and latencies.
pub fn run(plan: &Plan) -> io::Result<()> {
    let question = question(&plan.name, plan.ipv6)?;
    let mut load = Load {
        plan,
        question,
        poller: Poller::new()?,
        hist: Histogram::default(),
        errors: Errors::default(),
        next: 0,
    };
    let mut slots: Vec<Slot> = (0..plan.sockets).map(|_| load.open()).collect::<Result<_, _>>()?;
    lines::begin()?;
    let began = Instant::now();
    for (token, slot) in slots.iter_mut().enumerate() {
        load.watch(slot, token)?;
        load.ask(slot)?;
    }
    let mut ready = Vec::new();
    let mut looked = began;
    while began.elapsed() < plan.time {
        load.poller.wait(Some(LOST), &mut ready)?;
        for token in ready.drain(..).filter_map(|t| usize::try_from(t).ok()) {
            if let Some(slot) = slots.get_mut(token)
                && load.take(slot)?
            {
                load.again(slot, token)?;
            }
        }
        if looked.elapsed() >= LOST {
            looked = Instant::now();
            for (token, slot) in slots.iter_mut().enumerate() {
                if slot.asked.elapsed() >= LOST {
                    load.errors.add("lost");
                    load.again(slot, token)?;
                }
            }
        }
    }
    let took = began.elapsed().as_secs_f64();
    lines::end()?;
    let quantiles = load.hist.quantiles();
    #[expect(clippy::cast_precision_loss, reason = "counts stay far below 2^52")]
    let rate = quantiles.count as f64 / took;
    lines::result(json!({
        "mode": "dns", "name": plan.name, "sockets": plan.sockets, "fresh": plan.fresh, "seconds": took,
        "questions": quantiles.count, "questions_per_second": rate, "latency": quantiles, "errors": load.errors,
    }))
}

struct Slot {
    socket: UdpSocket,
    id: u16,
    asked: Instant,
}

struct Load<'p> {
    plan: &'p Plan,
    question: Vec<u8>,
    poller: Poller,
    hist: Histogram,
    errors: Errors,
    next: u16,
}

impl Load<'_> {
    fn open(&self) -> io::Result<Slot> {
        let any = if self.plan.to.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
        let socket = UdpSocket::bind(any)?;
        socket.connect(self.plan.to)?;
        socket.set_nonblocking(true)?;
        Ok(Slot { socket, id: 0, asked: Instant::now() })
    }

    fn watch(&self, slot: &Slot, token: usize) -> io::Result<()> {
        self.poller.reads(&slot.socket, token as u64)
    }

    fn ask(&mut self, slot: &mut Slot) -> io::Result<()> {
        self.next = self.next.wrapping_add(1);
        slot.id = self.next;
        self.question[..2].copy_from_slice(&slot.id.to_be_bytes());
        slot.asked = Instant::now();
        match slot.socket.send(&self.question) {
            Ok(_) => Ok(()),
            Err(e) => {
                self.errors.add_io(&e);
                Ok(())
            }
        }
    }

    fn again(&mut self, slot: &mut Slot, token: usize) -> io::Result<()> {
        if self.plan.fresh {
            // Closing takes the old one out of the poller.
            *slot = self.open()?;
            self.watch(slot, token)?;
        }
        self.ask(slot)
    }

    /// Whether the answer is there.
    fn take(&mut self, slot: &Slot) -> io::Result<bool> {
        let mut buffer = [0; BUFFER];
        match slot.socket.recv(&mut buffer) {
            Ok(length) if length >= 4 && buffer[..2] == slot.id.to_be_bytes() => {
                let nanos = slot.asked.elapsed().as_nanos();
                self.hist.record(u64::try_from(nanos).unwrap_or(u64::MAX));
                let code = buffer[3] & 15;
                if code != 0 {
                    self.errors.add(format!("rcode {code}"));
                }
                Ok(true)
            }
            // An answer to a question that was given up.
            Ok(_) => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) => {
                self.errors.add_io(&e);
                Ok(true)
            }
        }
    }
}

/// A question with recursion desired and room for 1232 bytes of answer.
fn question(name: &str, ipv6: bool) -> io::Result<Vec<u8>> {
    let mut packet = vec![0, 0, 1, 0, 0, 1, 0, 0, 0, 0, 0, 1];
    for label in name.split('.').filter(|l| !l.is_empty()) {
        let length = u8::try_from(label.len()).ok().filter(|n| *n < 64);
        let length = length.ok_or_else(|| io::Error::other(format!("{label} is too long")))?;
        packet.push(length);
        packet.extend(label.bytes());
    }
    packet.extend([0, 0, if ipv6 { 28 } else { 1 }, 0, 1]);
    packet.extend([0, 0, 41, 0x04, 0xd0, 0, 0, 0, 0, 0, 0]);
    Ok(packet)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn questions_are_answered_and_counted() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let to = server.local_addr().unwrap();
        std::thread::spawn(move || {
            let mut buffer = [0; 512];
            while let Ok((length, from)) = server.recv_from(&mut buffer) {
                buffer[2] |= 0x80;
                server.send_to(&buffer[..length], from).unwrap();
            }
        });
        for fresh in [false, true] {
            let time = Duration::from_millis(100);
            let name = "web.app.svc".to_owned();
            run(&Plan { to, name, ipv6: true, sockets: 3, time, fresh }).unwrap();
        }
        assert!(question(&"a".repeat(64), false).is_err());
    }
}
