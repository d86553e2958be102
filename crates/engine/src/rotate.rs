//! When to renew a certificate, and how long to wait after a failure. Times are seconds since the epoch.

/// Renewal at half of the lifetime, with jitter so that a fleet does not ask at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    pub not_before: u64,
    pub not_after: u64,
}

impl Rotation {
    /// Seconds since the epoch at which to renew; never later than 9/10 of the lifetime.
    pub fn renew_at(&self, _rand: u64) -> u64 {
        todo!()
    }
}

/// Exponential back-off: 500 ms, doubled up to 150 s, ±20 % jitter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    pub failures: u32,
}

impl Backoff {
    /// Milliseconds to wait after this many failures.
    pub fn delay_ms(&self, _rand: u64) -> u64 {
        todo!()
    }
}
