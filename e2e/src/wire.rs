//! The verdict of a look at the wire between two nodes, as `meshprobe tap` prints it.

use std::fmt;

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

/// What passed while the tap was open.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Seen {
    /// TCP segments with payload from or to a pod, all ports.
    pub segments: u64,
    /// Of these, from or to port 15008.
    pub tunnel_segments: u64,
    /// Payload bytes from or to port 15008.
    pub tunnel_bytes: u64,
    /// TLS records in the flows from or to port 15008.
    pub records: u64,
    /// Of these, application data.
    pub data_records: u64,
    /// What in those flows is not TLS 1.3, in words.
    pub not_tls: Vec<String>,
    /// Flows whose beginning was not seen: they are older than the tap and could not be judged from the start.
    pub older: u64,
    /// Ports of payload outside the tunnels, with the number of segments.
    pub plain: Vec<(u16, u64)>,
    /// Whether the canary was seen in any payload.
    pub canary: bool,
    /// Frames the reader missed.
    pub overflowed: bool,
}

impl Seen {
    /// An error unless everything between the pods was encrypted.
    pub fn check_encrypted(&self) -> Result<()> {
        ensure!(self.tunnel_segments > 0, "nothing passed through a tunnel: {self:?}");
        ensure!(self.data_records > 0, "no application data passed through a tunnel: {self:?}");
        ensure!(self.not_tls.is_empty(), "not TLS 1.3 on port 15008: {:?}", self.not_tls);
        ensure!(self.plain.is_empty(), "payload outside the tunnels: {self:?}");
        ensure!(!self.canary, "the canary passed in the clear");
        ensure!(!self.overflowed, "the tap missed something");
        Ok(())
    }
}

impl fmt::Display for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} packets with payload, {} of them on port 15008: {} TLS records ({} of application data), {}; ",
            self.segments,
            self.tunnel_segments,
            self.records,
            self.data_records,
            if self.not_tls.is_empty() { "all TLS 1.3" } else { "NOT ALL TLS 1.3" },
        )?;
        for (port, count) in &self.plain {
            write!(f, "{count} packets in the clear, port {port}; ")?;
        }
        write!(f, "canary {}", if self.canary { "PRESENT" } else { "absent" })
    }
}
