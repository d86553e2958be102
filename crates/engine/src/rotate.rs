//! When to renew a certificate, and how long to wait after a failure. Times are seconds since the epoch.
//!
//! Invariants: a certificate that has expired, or whose dates make no sense, is due now; no answer is
//! longer than [`LONGEST_SLEEP`], so that a jump of the wall clock is noticed within that time.

/// Timers run on the monotonic clock and certificates on the wall clock: look again after a minute, so
/// that a clock that was set, or a machine that slept, does not make us miss a renewal.
pub const LONGEST_SLEEP: u64 = 60;

/// Renewal at half of the lifetime, with jitter so that a fleet does not ask at once.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rotation {
    pub not_before: u64,
    pub not_after: u64,
}

impl Rotation {
    /// Seconds since the epoch at which to renew: between 45 % and 55 % of the lifetime, chosen by `rand`.
    pub fn renew_at(&self, rand: u64) -> u64 {
        let lifetime = self.not_after.saturating_sub(self.not_before);
        // In u128, since `lifetime` comes from a certificate and may be anything.
        let within = u128::from(lifetime) * (4_500 + u128::from(rand % 1_001)) / 10_000;
        self.not_before.saturating_add(u64::try_from(within).unwrap_or(lifetime))
    }

    /// Seconds to sleep before looking again; 0: renew now. Call it with the same `rand` for one
    /// certificate, or the jitter of the later call counts.
    pub fn wait(&self, now: u64, rand: u64) -> u64 {
        if self.not_after <= now {
            return 0;
        }
        self.renew_at(rand).saturating_sub(now).min(LONGEST_SLEEP)
    }

    /// Whether the certificate may be used at this time.
    pub fn valid_at(&self, now: u64) -> bool {
        self.not_before <= now && now < self.not_after
    }
}

/// Exponential back-off: 500 ms, doubled up to 150 s, ±20 % jitter.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Backoff {
    pub failures: u32,
}

impl Backoff {
    const FIRST_MS: u64 = 500;
    const LONGEST_MS: u64 = 150_000;

    /// Counts one more failure.
    pub fn fail(&mut self) {
        self.failures = self.failures.saturating_add(1);
    }

    /// Forgets the failures: something worked.
    pub fn reset(&mut self) {
        self.failures = 0;
    }

    /// Milliseconds to wait after this many failures; 0 after none.
    pub fn delay_ms(&self, rand: u64) -> u64 {
        let Some(doublings) = self.failures.checked_sub(1) else { return 0 };
        // Ten doublings already exceed the limit; more would shift out of the number.
        let base = (Self::FIRST_MS << doublings.min(10)).min(Self::LONGEST_MS);
        let spread = base * 2 / 5;
        base - spread / 2 + rand % (spread + 1)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn half_life() {
        let day = Rotation { not_before: 1_000_000, not_after: 1_086_400 };
        let check =
            |now: u64, rand: u64, want: u64| assert_eq!(day.wait(now, rand), want, "{now} {rand}");
        assert_eq!(day.renew_at(0), 1_038_880);
        assert_eq!(day.renew_at(500), 1_043_200);
        assert_eq!(day.renew_at(1_000), 1_047_520);
        assert_eq!(day.renew_at(1_001), day.renew_at(0));
        check(1_000_000, 500, 60);
        check(1_043_139, 500, 60);
        check(1_043_190, 500, 10);
        check(1_043_200, 500, 0);
        check(1_086_400, 500, 0);
        check(u64::MAX, 500, 0);
        // The clock stands before the certificate: look again soon, not in an age.
        check(0, 500, 60);
        let reversed = Rotation { not_before: 10, not_after: 5 };
        assert_eq!((reversed.renew_at(7), reversed.wait(5, 7), reversed.wait(11, 7)), (10, 0, 0));
        assert!(day.valid_at(1_000_000) && day.valid_at(1_086_399));
        assert!(!day.valid_at(999_999) && !day.valid_at(1_086_400));
    }

    #[test]
    fn back_off() {
        let check = |failures: u32, low: u64, high: u64| {
            let delays: Vec<u64> = (0..130_000).map(|r| Backoff { failures }.delay_ms(r)).collect();
            assert_eq!(delays.iter().min(), Some(&low), "{failures}");
            assert_eq!(delays.iter().max(), Some(&high), "{failures}");
        };
        check(0, 0, 0);
        check(1, 400, 600);
        check(2, 800, 1_200);
        check(9, 102_400, 153_600);
        check(10, 120_000, 180_000);
        check(u32::MAX, 120_000, 180_000);
        let mut b = Backoff::default();
        b.fail();
        b.fail();
        assert_eq!(b, Backoff { failures: 2 });
        b.reset();
        assert_eq!(b, Backoff::default());
    }

    proptest! {
        #[test]
        fn renewal_lies_in_the_middle(start in 0..u64::MAX, length in 1_000..u64::MAX, rand: u64, now: u64) {
            let r = Rotation { not_before: start, not_after: start.saturating_add(length) };
            let lifetime = r.not_after - r.not_before;
            let at = r.renew_at(rand);
            let part = |percent: u128| u64::try_from(u128::from(lifetime) * percent / 100).unwrap();
            prop_assert!(at >= start + part(45) && at <= start + part(55));
            prop_assert!(r.wait(now, rand) <= LONGEST_SLEEP);
            prop_assert_eq!(r.wait(now, rand) == 0, now >= at || now >= r.not_after);
        }
    }
}
