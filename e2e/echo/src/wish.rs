//! What a request may wish for in its query: a delay, and a status other than 200.
//!
//! `?delay=100ms` and `?codes=503:20,200:80`: the status is drawn by weight. A weight of its own may be left out.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use http::StatusCode;

/// Longest delay: more than any client here waits, and short enough that a pod still drains.
const DELAY_MAX: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Wish {
    pub delay: Duration,
    /// Statuses and their weights; empty is 200.
    pub codes: Vec<(u16, u32)>,
}

/// Reads the query. Parameters that are not ours are the application's, and nobody's business.
pub fn read(query: &str) -> Result<Wish> {
    let mut wish = Wish::default();
    for (name, value) in query.split('&').filter_map(|pair| pair.split_once('=')) {
        match name {
            "delay" => wish.delay = delay(value)?,
            "codes" => wish.codes = value.split(',').map(code).collect::<Result<_>>()?,
            _ => {}
        }
    }
    Ok(wish)
}

impl Wish {
    /// The status, given a number below the sum of all weights.
    #[must_use]
    pub fn status(&self, mut drawn: u64) -> u16 {
        for &(status, weight) in &self.codes {
            let weight = u64::from(weight);
            if drawn < weight {
                return status;
            }
            drawn -= weight;
        }
        200
    }

    #[must_use]
    pub fn total(&self) -> u64 {
        self.codes.iter().map(|&(_, weight)| u64::from(weight)).sum()
    }
}

/// A number and a unit: `ms` or `s`.
pub fn delay(text: &str) -> Result<Duration> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: u64 =
        digits.parse().with_context(|| format!("{text:?} is no time: 100ms and 2s are"))?;
    let time = match &text[digits.len()..] {
        "ms" => Duration::from_millis(number),
        "s" => Duration::from_secs(number),
        unit => bail!("{text:?} has the unit {unit:?}: ms and s are known"),
    };
    ensure!(time <= DELAY_MAX, "{text:?} is longer than {DELAY_MAX:?}");
    Ok(time)
}

fn code(text: &str) -> Result<(u16, u32)> {
    let (status, weight) = text.split_once(':').unwrap_or((text, "1"));
    let status: StatusCode =
        status.parse().with_context(|| format!("{status:?} is no HTTP status"))?;
    // 1xx announces another answer, which would never come.
    ensure!(!status.is_informational(), "{status} is no answer");
    Ok((status.as_u16(), weight.parse().with_context(|| format!("{weight:?} is no weight"))?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wishes() {
        let ms = Duration::from_millis;
        for (query, want) in [
            ("", Wish::default()),
            ("animal=whale&x", Wish::default()),
            ("delay=100ms", Wish { delay: ms(100), codes: vec![] }),
            ("a=b&delay=2s&codes=503", Wish { delay: ms(2000), codes: vec![(503, 1)] }),
            ("codes=500:20,200:80", Wish { delay: ms(0), codes: vec![(500, 20), (200, 80)] }),
        ] {
            assert_eq!(read(query).expect(query), want, "{query}");
        }
    }

    #[test]
    fn bad_wishes_are_refused() {
        for (query, says) in [
            ("delay=1", "unit"),
            ("delay=s", "no time"),
            ("delay=61s", "longer"),
            ("delay=99999999999999999999s", "no time"),
            ("codes=99", "no HTTP status"),
            ("codes=100", "no answer"),
            ("codes=500:-1", "no weight"),
        ] {
            let error = format!("{:#}", read(query).expect_err(query));
            assert!(error.contains(says), "{query}: {error}");
        }
    }

    #[test]
    fn statuses_are_drawn_by_weight() {
        let wish = read("codes=500:2,503:0,200:1").expect("it is well-formed");
        let drawn: Vec<u16> = (0..wish.total()).map(|n| wish.status(n)).collect();
        assert_eq!(drawn, [500, 500, 200]);
        assert_eq!(Wish::default().status(0), 200);
    }
}
