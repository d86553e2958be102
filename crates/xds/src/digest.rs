//! Hashes by which a control plane and a proxy compare what each believes the proxy holds.
//!
//! Not a defence against a forger (the stream is authenticated), but against our own mistakes and lost
//! updates: fast, the same on every build and platform, and well mixed so that sums of it mean something.

/// Hash of one resource: its name and its encoded value.
pub fn resource(name: &str, value: &[u8]) -> u64 {
    let mut hash = Fnv::new();
    hash.write(name.as_bytes());
    // Not a byte of UTF-8: keeps "a"+"bc" and "ab"+"c" apart.
    hash.write(&[0xff]);
    hash.write(value);
    hash.finish()
}

/// The version string under which a resource of this hash is served.
pub fn version(hash: u64) -> String {
    format!("{hash:016x}")
}

/// A count and an order-free sum over resources; resources can be added and taken away again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sum {
    pub count: u64,
    pub sum: u64,
}

impl Sum {
    pub fn add(&mut self, hash: u64) {
        self.count = self.count.wrapping_add(1);
        self.sum = self.sum.wrapping_add(hash);
    }

    pub fn remove(&mut self, hash: u64) {
        self.count = self.count.wrapping_sub(1);
        self.sum = self.sum.wrapping_sub(hash);
    }
}

impl std::fmt::Display for Sum {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} resources, sum {:016x}", self.count, self.sum)
    }
}

/// FNV-1a, 64 bits, with a final mix: its plain low bits would cancel out in sums.
struct Fnv(u64);

impl Fnv {
    fn new() -> Self {
        Self(0xcbf2_9ce4_8422_2325)
    }

    fn write(&mut self, bytes: &[u8]) {
        for byte in bytes {
            self.0 = (self.0 ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3);
        }
    }

    fn finish(self) -> u64 {
        // The finaliser of splitmix64.
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_never_change() {
        // Two builds of this crate must agree: these values are part of the protocol.
        assert_eq!(resource("", b""), 0x4f2d_b50f_1240_40cd);
        assert_eq!(resource("ns/p", b"\x0a\x01p"), 0x2cc8_7276_f6a9_ac09);
        assert_eq!(version(0xab), "00000000000000ab");
        assert_ne!(resource("a", b"bc"), resource("ab", b"c"));
    }

    #[test]
    fn sums_forget_order() {
        let mut a = Sum::default();
        let mut b = Sum::default();
        [1, 2, u64::MAX].into_iter().for_each(|h| a.add(h));
        [u64::MAX, 7, 1, 2].into_iter().for_each(|h| b.add(h));
        b.remove(7);
        assert_eq!(a, b);
    }
}
