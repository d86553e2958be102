//! Single values of Istio's environment: text in, a value or an error that names the variable.

use std::fmt::{self, Display};
use std::time::Duration;

/// A variable that cannot be obeyed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EnvError {
    name: String,
    value: Option<String>,
    why: String,
}

/// Longest part of a value in a message; a certificate by mistake must not fill the log.
const MAX_SHOWN: usize = 80;

impl EnvError {
    pub(super) fn new(name: &str, value: &str, why: impl Into<String>) -> Self {
        let value = Some(value.chars().take(MAX_SHOWN).collect());
        Self { name: name.to_owned(), value, why: why.into() }
    }

    pub(super) fn missing(name: &str, what: &str) -> Self {
        Self { name: name.to_owned(), value: None, why: format!("it must hold {what}") }
    }
}

impl Display for EnvError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { name, value, why } = self;
        match value {
            Some(value) => write!(f, "environment variable {name}={value:?}: {why}"),
            None => write!(f, "environment variable {name} is not set: {why}"),
        }
    }
}

impl std::error::Error for EnvError {}

pub(super) fn truth(name: &str, value: &str) -> Result<bool, EnvError> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "1" => Ok(true),
        "false" | "0" => Ok(false),
        _ => Err(EnvError::new(name, value, "true or false is expected")),
    }
}

/// `https://HOST:PORT` and the host, of an address with or without its scheme.
pub(super) fn endpoint(name: &str, value: &str) -> Result<(String, String), EnvError> {
    let bad = |why| EnvError::new(name, value, why);
    let rest = match value.split_once("://") {
        None => value,
        Some(("https", rest)) => rest,
        Some(_) => return Err(bad("the control plane is reached by https only")),
    };
    let rest = rest.trim_end_matches('/');
    let (host, port) = rest.rsplit_once(':').ok_or_else(|| bad("HOST:PORT is expected"))?;
    let plain = host.trim_matches(['[', ']']);
    let is_host =
        !plain.is_empty() && plain.chars().all(|c| c.is_ascii_alphanumeric() || "-._:".contains(c));
    if !is_host || (plain.contains(':') && plain == host) || port.parse::<u16>().is_err() {
        return Err(bad("HOST:PORT is expected"));
    }
    Ok((format!("https://{rest}"), plain.to_owned()))
}

/// A time as Go and Istio write it: `24h`, `1h30m`, `500ms`, or a number of seconds.
pub(super) fn duration(name: &str, value: &str) -> Result<Duration, EnvError> {
    let bad = || EnvError::new(name, value, "a time such as 24h, 90m or 30s is expected");
    if let Ok(seconds) = value.parse() {
        return Ok(Duration::from_secs(seconds));
    }
    let (mut rest, mut total) = (value, Duration::ZERO);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit()).ok_or_else(bad)?;
        let (number, after) = rest.split_at(digits);
        let number: u32 = number.parse().map_err(|_| bad())?;
        let end = after.find(|c: char| c.is_ascii_digit()).unwrap_or(after.len());
        let (unit, after) = after.split_at(end);
        let unit = match unit {
            "ms" => Duration::from_millis(1),
            "s" => Duration::from_secs(1),
            "m" => Duration::from_secs(60),
            "h" => Duration::from_secs(3600),
            "d" => Duration::from_secs(86_400),
            _ => return Err(bad()),
        };
        let part = unit.checked_mul(number).ok_or_else(bad)?;
        total = total.checked_add(part).ok_or_else(bad)?;
        rest = after;
    }
    Ok(total)
}

/// A number of threads, or a part of the cores: `25%`.
pub(super) fn workers(value: &str, cores: usize) -> Result<usize, EnvError> {
    let bad =
        || EnvError::new("ZTUNNEL_WORKER_THREADS", value, "a number, or 1% to 100%, is expected");
    let Some(percent) = value.strip_suffix('%') else {
        return value.parse().ok().filter(|threads| *threads > 0).ok_or_else(bad);
    };
    let percent: usize = percent.parse().map_err(|_| bad())?;
    if !(1..=100).contains(&percent) {
        return Err(bad());
    }
    Ok((cores * percent).div_ceil(100).max(1))
}
