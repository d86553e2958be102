//! Chance, from one number that the caller drew.
//!
//! Invariants: the same number gives the same draws; two purposes that share a number share no draw, or the choice of a
//! backend would decide which of its endpoints is chosen.

/// Numbers that follow from one random number alone (SplitMix64).
pub(crate) struct Dice {
    state: u64,
}

impl Dice {
    /// The dice that choose among endpoints.
    pub(crate) fn new(rand: u64) -> Self {
        // Callers may count up instead of drawing: neighbours must not share a sequence.
        Self { state: mix(rand) }
    }

    /// The dice of a route: backends, faults, mirrors.
    pub(crate) fn of_route(rand: u64) -> Self {
        // Any constant will do that is no small number, so that no other caller counts to it.
        Self::new(rand ^ 0xd1b5_4a32_d192_ed03)
    }

    /// Uniform.
    pub(crate) fn draw(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// Uniform in (0, 1].
    pub(crate) fn unit(&mut self) -> f64 {
        // The upper 32 bits: exact in a float, and fine enough for any number of endpoints.
        (f64::from((self.draw() >> 32) as u32) + 1.0) / 4_294_967_296.0
    }

    /// Uniform below `end`; 0 when `end` is.
    pub(crate) fn below(&mut self, end: u64) -> u64 {
        let scaled = (u128::from(self.draw()) * u128::from(end)) >> 64;
        u64::try_from(scaled).unwrap_or(end)
    }
}

const fn mix(mut x: u64) -> u64 {
    x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    x ^ (x >> 31)
}
