//! Addresses, ranges and ports as people write them.

use std::net::IpAddr;

use model::IpPrefix;

/// An address or a CIDR range. Host bits may be set, as Istio allows.
pub(crate) fn prefix(text: &str) -> Result<IpPrefix, String> {
    let error = || format!("{text:?} is not an IP address or range such as 10.0.0.0/8");
    let (address, length) = match text.split_once('/') {
        Some((address, length)) => (address, Some(length)),
        None => (text, None),
    };
    let ip: IpAddr = address.parse().map_err(|_| error())?;
    let full = if ip.is_ipv4() { 32 } else { 128 };
    let length = match length {
        None => full,
        // Digits only: `parse` would take a sign.
        Some(digits) if digits.bytes().all(|b| b.is_ascii_digit()) => {
            digits.parse().ok().filter(|l| *l <= full).ok_or_else(error)?
        }
        Some(_) => return Err(error()),
    };
    Ok(IpPrefix { ip, length })
}

/// A port from 1 to 65535.
pub(crate) fn port(text: &str) -> Result<u16, String> {
    let digits = text.bytes().all(|b| b.is_ascii_digit());
    let port = digits.then(|| text.parse().ok()).flatten().filter(|p| *p > 0);
    port.ok_or_else(|| format!("{text:?} is not a port (1-65535)"))
}
