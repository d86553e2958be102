//! Latencies in logarithmic buckets: any value of a `u64` within 0.8 %, in fixed memory.

use serde::Serialize;

/// Buckets per power of two. 128 keeps the error of a bucket's middle under 0.4 %.
const SUB: u64 = 128;
const SUB_BITS: u32 = SUB.trailing_zeros();
/// Powers of two above the exact range, for values up to `u64::MAX`.
const POWERS: usize = 64 - SUB_BITS as usize;
const BUCKETS: usize = (1 << SUB_BITS) * (POWERS + 1);

/// Counts of nanoseconds.
#[derive(Clone, Debug)]
pub struct Histogram {
    counts: Vec<u64>,
    total: u64,
    max: u64,
}

impl Default for Histogram {
    fn default() -> Self {
        Self { counts: vec![0; BUCKETS], total: 0, max: 0 }
    }
}

/// What people read of a histogram, in microseconds.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Quantiles {
    pub count: u64,
    pub p50_us: f64,
    pub p99_us: f64,
    pub p999_us: f64,
    pub max_us: f64,
}

impl Histogram {
    pub fn record(&mut self, nanos: u64) {
        self.counts[bucket(nanos)] += 1;
        self.total += 1;
        self.max = self.max.max(nanos);
    }

    /// The value that the share `q` of all values does not exceed; 0 without values.
    pub fn quantile(&self, q: f64) -> u64 {
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_precision_loss,
            clippy::cast_sign_loss,
            reason = "a rank: counts stay far below 2^52"
        )]
        let rank = ((self.total as f64 * q).ceil() as u64).clamp(1, self.total.max(1));
        let mut seen = 0;
        for (index, count) in self.counts.iter().enumerate() {
            seen += count;
            if seen >= rank {
                return middle(index).min(self.max);
            }
        }
        0
    }

    pub fn quantiles(&self) -> Quantiles {
        Quantiles {
            count: self.total,
            p50_us: micros(self.quantile(0.5)),
            p99_us: micros(self.quantile(0.99)),
            p999_us: micros(self.quantile(0.999)),
            max_us: micros(self.max),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "durations of a benchmark are far below 2^52 ns")]
fn micros(nanos: u64) -> f64 {
    nanos as f64 / 1000.0
}

fn bucket(value: u64) -> usize {
    // Below SUB every value has its own bucket; above, the top bits after the first one choose.
    let power = (63 - value.max(SUB).leading_zeros()) - SUB_BITS;
    let sub = if value < SUB { value } else { (value >> power) - SUB };
    let row = if value < SUB { 0 } else { u64::from(power) + 1 };
    usize::try_from(row * SUB + sub).unwrap_or(BUCKETS - 1)
}

fn middle(index: usize) -> u64 {
    let index = index as u64;
    let (row, sub) = (index / SUB, index % SUB);
    if row == 0 {
        return sub;
    }
    let power = row - 1;
    let low = (SUB + sub) << power;
    low + (1_u64 << power) / 2
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn buckets_are_close_to_their_values() {
        let check = |value: u64| {
            let got = middle(bucket(value));
            let error = got.abs_diff(value);
            assert!(error <= value / 128, "{value} became {got}");
        };
        for power in 0..63 {
            for offset in [0, 1, 7, 100] {
                check((1_u64 << power) + offset);
                check((1_u64 << power).saturating_sub(offset));
            }
        }
        assert!(bucket(u64::MAX) < BUCKETS);
    }

    #[test]
    fn quantiles_of_a_known_row() {
        let mut hist = Histogram::default();
        for value in 1..=100_000 {
            hist.record(value);
        }
        let check = |q: f64, want: u64| {
            let got = hist.quantile(q);
            assert!(got.abs_diff(want) <= want / 100, "quantile {q} is {got}, not {want}");
        };
        check(0.5, 50_000);
        check(0.99, 99_000);
        check(0.999, 99_900);
        check(1.0, 100_000);
        assert_eq!(Histogram::default().quantile(0.5), 0);
    }
}
