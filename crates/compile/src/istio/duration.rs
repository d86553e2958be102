//! Durations as Istio's schema takes them: Go's form, `1h30m`, `1.5s`, `250ms`.
//!
//! Invariant: total; negative ones and such beyond what a proxy could wait for are errors.

use std::time::Duration;

/// Digits of one number: a nanosecond in 300 years has fewer.
const MAX_DIGITS: usize = 18;
/// Longest duration: beyond it nobody waits, and sums of several stay far from overflow.
const MAX: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

pub(crate) fn parse(text: &str) -> Result<Duration, String> {
    let error = || {
        let text: String = text.chars().take(40).collect();
        format!("{text:?} is not a duration: write 1h, 1m30s, 1.5s or 250ms")
    };
    let mut rest = text.strip_prefix('+').unwrap_or(text);
    if rest == "0" {
        return Ok(Duration::ZERO);
    }
    if rest.is_empty() {
        return Err(error());
    }
    let mut nanos: u128 = 0;
    while !rest.is_empty() {
        let (part, after) = one(rest).ok_or_else(error)?;
        nanos += part;
        rest = after;
        if nanos > MAX.as_nanos() {
            return Err(format!("longer than {} days", MAX.as_secs() / (24 * 3600)));
        }
    }
    u64::try_from(nanos).map(Duration::from_nanos).map_err(|_| error())
}

/// One number with its unit, in nanoseconds, and what follows.
fn one(text: &str) -> Option<(u128, &str)> {
    let (whole, rest) = digits(text);
    let (fraction, rest) = match rest.strip_prefix('.') {
        Some(rest) => digits(rest),
        None => ("", rest),
    };
    if (whole.is_empty() && fraction.is_empty()) || whole.len().max(fraction.len()) > MAX_DIGITS {
        return None;
    }
    let end = rest.find(|c: char| c.is_ascii_digit() || c == '.').unwrap_or(rest.len());
    let (unit, rest) = rest.split_at(end);
    let unit: u128 = match unit {
        "h" => 3_600_000_000_000,
        "m" => 60_000_000_000,
        "s" => 1_000_000_000,
        "ms" => 1_000_000,
        "us" | "µs" | "μs" => 1_000,
        "ns" => 1,
        _ => return None,
    };
    let number = |digits: &str| if digits.is_empty() { Some(0) } else { digits.parse().ok() };
    let scale = 10_u128.pow(u32::try_from(fraction.len()).ok()?);
    let (whole, fraction): (u128, u128) = (number(whole)?, number(fraction)?);
    Some((whole * unit + fraction * unit / scale, rest))
}

fn digits(text: &str) -> (&str, &str) {
    text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn durations() {
        let check = |text: &str, millis: Option<u64>| {
            assert_eq!(parse(text).ok(), millis.map(Duration::from_millis), "{text:?}");
        };
        check("5s", Some(5_000));
        check("1h1m1s1ms", Some(3_661_001));
        check("1.5s", Some(1_500));
        check(".5s", Some(500));
        check("1.s", Some(1_000));
        check("0", Some(0));
        check("+0s", Some(0));
        check("2000us", Some(2));
        check("2000µs", Some(2));
        for bad in [
            "",
            "5",
            "s",
            ".s",
            "-1s",
            "1 s",
            "1d",
            "1s ",
            "1ss",
            "1e3s",
            "1234567890123456789s",
            "99999999h",
        ] {
            check(bad, None);
        }
    }

    proptest! {
        #[test]
        fn any_text_is_survived(text in "[-+0-9.hmsuµn ]{0,40}") {
            let _ = parse(&text);
        }

        #[test]
        fn what_is_written_is_read(seconds in 0_u64..1_000_000, millis in 0_u64..1000) {
            let want = Duration::from_millis(seconds * 1000 + millis);
            prop_assert_eq!(parse(&format!("{seconds}.{millis:03}s")), Ok(want));
            prop_assert_eq!(parse(&format!("{seconds}s{millis}ms")), Ok(want));
        }
    }
}
