//! What clocks that disagree do to certificates, in words: whose clock, and by how much.
//!
//! A certificate is valid from two minutes before its making for a day, and renewed at half of that. So two minutes either
//! way harm nobody, and whoever finds a certificate outside of its time mostly has a clock to put right.

use std::time::{SystemTime, UNIX_EPOCH};

use rustls::{AlertDescription, CertificateError};
use rustls_pki_types::UnixTime;

/// A peer's certificate that is outside of its time by this machine's clock. `None`: it is refused for something else.
pub fn explain_certificate(error: &CertificateError) -> Option<String> {
    let since = |a: &UnixTime, b: &UnixTime| span(a.as_secs().saturating_sub(b.as_secs()));
    match error {
        CertificateError::NotValidYetContext { time, not_before } => Some(format!(
            "the certificate is not valid yet for another {by}: this machine's clock is at least {by} behind, or the \
             issuer's is ahead",
            by = since(not_before, time)
        )),
        CertificateError::ExpiredContext { time, not_after } => Some(format!(
            "the certificate expired {by} ago: it was not renewed, or this machine's clock is at least {by} ahead",
            by = since(time, not_after)
        )),
        _ => None,
    }
}

/// The peer's alert about our certificate, which is valid in these seconds since the epoch.
pub fn explain_alert(alert: AlertDescription, (from, until): (u64, u64), now: u64) -> String {
    if alert != AlertDescription::CertificateExpired {
        let look = "compare whom that side accepts, the roots of both, and their clocks";
        return format!("{alert:?}: {look}");
    }
    if now >= until {
        let ago = span(now - until);
        return format!("it expired {ago} ago, by this machine's clock too, and was not renewed");
    }
    if now < from {
        let by = span(from - now);
        return format!(
            "it is not valid yet for another {by}, by this machine's clock too: that clock is at least {by} behind the \
             issuer's"
        );
    }
    let (old, left) = (now - from, until - now);
    format!(
        "by this machine's clock it is valid since {} and for another {}, by the peer's it is not: their clocks differ by \
         at least {}",
        span(old),
        span(left),
        span(old.min(left))
    )
}

/// Seconds in words.
pub fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3600 => format!("{} min", seconds / 60),
        3600..172_800 => format!("{} h {} min", seconds / 3600, seconds % 3600 / 60),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// Seconds since the epoch by this machine's clock.
pub fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_secs())
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn spans() {
        let check = |seconds, want: &str| assert_eq!(span(seconds), want);
        check(0, "0 s");
        check(61, "1 min");
        check(3660, "1 h 1 min");
        check(200_000, "2 days");
    }

    #[test]
    fn a_certificate_outside_of_its_time_names_the_clock_and_by_how_much() {
        let time = |s| UnixTime::since_unix_epoch(Duration::from_secs(s));
        let check = |error: CertificateError, want: Option<&str>| {
            let words = explain_certificate(&error);
            assert_eq!(words.is_some(), want.is_some(), "{error:?}");
            assert!(words.unwrap_or_default().contains(want.unwrap_or_default()), "{error:?}");
        };
        let early = |by: u64| CertificateError::NotValidYetContext {
            time: time(1_000),
            not_before: time(1_000 + by),
        };
        let late = |by: u64| CertificateError::ExpiredContext {
            time: time(1_000 + by),
            not_after: time(1_000),
        };
        check(early(12_000), Some("clock is at least 3 h 20 min behind"));
        check(early(59), Some("clock is at least 59 s behind"));
        check(late(600), Some("clock is at least 10 min ahead"));
        check(CertificateError::UnknownIssuer, None);
    }

    #[test]
    fn the_peers_alert_names_the_clocks_and_by_how_much() {
        let hour = 3_600;
        let check = |now, want: &str| {
            let alert = AlertDescription::CertificateExpired;
            let words = explain_alert(alert, (10 * hour, 34 * hour), now);
            assert!(words.contains(want) && words.contains("clock"), "{words}");
        };
        check(11 * hour, "differ by at least 1 h 0 min");
        check(30 * hour, "differ by at least 4 h 0 min");
        check(9 * hour, "at least 1 h 0 min behind");
        check(36 * hour, "expired 2 h 0 min ago");
        let other = explain_alert(AlertDescription::UnknownCA, (0, 10), 5);
        assert!(other.contains("UnknownCA") && other.contains("roots"), "{other}");
    }
}
