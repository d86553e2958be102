//! Texts that have a grammar: header names and values, paths, host names, durations. What does not keep to it would let
//! a route write what no proxy may send.

use std::time::Duration;

use model::http::is_for_mesh_alone;

/// Bytes of a path or a part of one, as in Gateway API's schema.
const MAX_PATH: usize = 1024;
/// Bytes of a header's value, as in Gateway API's schema.
const MAX_VALUE: usize = 4096;
/// Bytes of a header's name, as in Gateway API's schema.
const MAX_NAME: usize = 256;

/// Headers that say how a message is framed or to whom it goes. Changing them by rule would tear messages apart.
const FRAMING: [&str; 9] = [
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-connection",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
];

/// The name of a header in lower case.
pub(super) fn header_name(name: &str) -> Result<String, String> {
    let tchar = |b: u8| b.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&b);
    if !(1..=MAX_NAME).contains(&name.len()) || !name.bytes().all(tchar) {
        return Err(format!("{name:.80?} is not the name of a header"));
    }
    Ok(name.to_ascii_lowercase())
}

/// The name of a header that a rule may change, in lower case.
pub(super) fn editable_header(name: &str) -> Result<String, String> {
    let name = header_name(name)?;
    if FRAMING.contains(&name.as_str()) {
        let help = if name == "host" { "; use a URLRewrite's hostname" } else { "" };
        return Err(format!("{name:?} belongs to the connection and cannot be edited{help}"));
    }
    Ok(name)
}

/// The name of a header that a rule may write, in lower case: none in which only the mesh says who the client is, and none that
/// offers another protocol. To remove these is harmless.
pub(super) fn writable_header(name: &str) -> Result<String, String> {
    let name = editable_header(name)?;
    if is_for_mesh_alone(&name) {
        return Err(format!(
            "{name:?} is for the mesh alone to write: whoever reads it believes it"
        ));
    }
    if name == "http2-settings" {
        return Err(format!("{name:?} belongs to the connection and cannot be written"));
    }
    Ok(name)
}

pub(super) fn header_value(value: &str) -> Result<(), String> {
    let good = |b: u8| b == b'\t' || (b >= b' ' && b != 0x7f);
    if value.len() > MAX_VALUE {
        return Err(format!("has {} bytes, at most {MAX_VALUE} are allowed", value.len()));
    }
    if !value.bytes().all(good) {
        return Err("holds a control character".to_owned());
    }
    Ok(())
}

/// A path to compare a request's with: absolute, without query, in the form requests have once they are normalized.
pub(super) fn absolute_path(path: &str) -> Result<(), String> {
    path_characters(path)?;
    if !path.starts_with('/') {
        return Err(format!("{path:?} does not begin with a slash"));
    }
    let lower = path.to_ascii_lowercase();
    for bad in ["//", "/./", "/../", "%2f"] {
        if lower.contains(bad) {
            return Err(format!("{path:?} holds {bad:?}, which no path of a route may"));
        }
    }
    if path.ends_with("/.") || path.ends_with("/..") {
        return Err(format!("{path:?} ends in a dot segment, as no request's path does"));
    }
    Ok(())
}

/// A path, or the beginning of one, in the one spelling that requests' paths have when rules see them: no escape of what needs
/// none, the digits of others in upper case, and escapes of what is not ASCII or a space.
pub(super) fn spelled(path: &str) -> String {
    let mut ascii = String::with_capacity(path.len());
    for byte in path.bytes() {
        match byte {
            b'!'..=b'~' => ascii.push(char::from(byte)),
            _ => ascii.push_str(&format!("%{byte:02X}")),
        }
    }
    let mut out = String::with_capacity(ascii.len());
    let mut rest = &*ascii;
    while let Some((before, after)) = rest.split_once('%') {
        out.push_str(before);
        let (digits, after) = after.split_at_checked(2).unwrap_or((after, ""));
        match u8::from_str_radix(digits, 16) {
            Ok(b) if b.is_ascii_alphanumeric() || b"-._~".contains(&b) => out.push(char::from(b)),
            _ => {
                out.push('%');
                out.push_str(&digits.to_ascii_uppercase());
            }
        }
        rest = after;
    }
    out.push_str(rest);
    out
}

/// What a path or its beginning is replaced with: absolute, or nothing.
pub(super) fn replacement(path: &str) -> Result<(), String> {
    if path.is_empty() {
        return Ok(());
    }
    path_characters(path)?;
    if path.starts_with('/') {
        Ok(())
    } else {
        Err(format!("{path:?} does not begin with a slash"))
    }
}

fn path_characters(path: &str) -> Result<(), String> {
    if path.len() > MAX_PATH {
        return Err(format!("has {} bytes, at most {MAX_PATH} are allowed", path.len()));
    }
    let mut bytes = path.bytes();
    while let Some(b) = bytes.next() {
        let good = match b {
            b'%' => {
                let mut hex = || bytes.next().is_some_and(|b| b.is_ascii_hexdigit());
                hex() && hex()
            }
            b => b.is_ascii_alphanumeric() || b"/-._~!$&'()*+,;=:@".contains(&b),
        };
        if !good {
            return Err(format!(
                "{path:.80?} is not a path: encode what is not a letter, digit or one of /-._~!$&'()*+,;=:@"
            ));
        }
    }
    Ok(())
}

/// A host name without a port.
pub(super) fn host(name: &str) -> Result<(), String> {
    let inner = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    let label = |l: &str| (1..=63).contains(&l.len()) && l.bytes().all(inner);
    if name.len() <= 253 && name.split('.').all(label) {
        Ok(())
    } else {
        Err(format!("{name:.80?} is not a host name"))
    }
}

/// Gateway API's form of a duration (GEP-2257). `None`: zero, which stands for "no limit".
pub(super) fn duration(text: &str) -> Result<Option<Duration>, String> {
    let parsed: ::gateway_api::Duration = text.parse().map_err(|_| {
        format!("{text:.80?} is not a duration: up to four numbers with h, m, s or ms, as in 1m30s")
    })?;
    let duration = Duration::new(parsed.as_secs(), parsed.subsec_nanos());
    Ok((!duration.is_zero()).then_some(duration))
}

/// Words of a gRPC service (`package.Service`) or method.
pub(super) fn grpc_name(name: &str, dots: bool) -> Result<(), String> {
    let word = |w: &str| {
        w.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
            && w.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_')
    };
    let body = if dots { name.strip_prefix('.').unwrap_or(name) } else { name };
    let good = name.len() <= MAX_PATH && if dots { body.split('.').all(word) } else { word(body) };
    if good {
        return Ok(());
    }
    let what = if dots { "a gRPC service, as in package.Service" } else { "a gRPC method" };
    Err(format!("{name:.80?} is not the name of {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers() {
        for (name, want) in [
            ("X-Canary", Some("x-canary")),
            ("", None),
            (":path", None),
            ("a b", None),
            ("é", None),
            ("Host", None),
            ("Content-Length", None),
        ] {
            assert_eq!(editable_header(name).ok().as_deref(), want, "{name}");
        }
        for name in ["X-Forwarded-Client-Cert", "x-ambit-client-identity", "HTTP2-Settings"] {
            assert!(writable_header(name).is_err() && editable_header(name).is_ok(), "{name}");
        }
        assert_eq!(writable_header("X-Canary").as_deref(), Ok("x-canary"));
        assert_eq!(header_name("Host").as_deref(), Ok("host"), "to match, not to edit");
        assert!(header_name(&"a".repeat(257)).is_err());
        for (value, good) in [("", true), ("a\tb é", true), ("a\r\nb", false), ("\0", false)] {
            assert_eq!(header_value(value).is_ok(), good, "{value:?}");
        }
        assert!(header_value(&"a".repeat(4097)).is_err());
    }

    #[test]
    fn paths() {
        // Row P8.
        for bad in [
            "", "a", "/a//b", "/./a", "/a/../b", "/a%2fb", "/a%2Fb", "/a#b", "/a?b", "/a b", "/é",
            "/a/.", "/a/..", "/%4", "/%zz", "/a%",
        ] {
            assert!(absolute_path(bad).is_err(), "{bad}");
        }
        assert!(absolute_path(&format!("/{}", "a".repeat(1024))).is_err());
        for good in ["/", "/a/b", "/a.b/..c", "/%41", "/a;b=c,d"] {
            assert_eq!(absolute_path(good), Ok(()), "{good}");
        }
        for (text, good) in [("", true), ("/", true), ("/a", true), ("a", false), ("/a?b", false)] {
            assert_eq!(replacement(text).is_ok(), good, "{text}");
        }
    }

    /// Row P6: a route means the same path however it spells it.
    #[test]
    fn paths_are_spelled_as_requests_are() {
        for (path, want) in [
            ("/a", "/a"),
            ("/%41%7e", "/A~"),
            ("/caf%c3%a9/x%20y", "/caf%C3%A9/x%20y"),
            ("/%25%41", "/%25A"),
            ("/café/a%2fb", "/caf%C3%A9/a%2Fb"),
        ] {
            assert_eq!(spelled(path), want, "{path}");
            assert_eq!(engine::http::normal_path(path).as_deref(), Some(want), "{path}");
        }
    }

    #[test]
    fn names() {
        for (name, good) in [
            ("a.example", true),
            ("a", true),
            ("", false),
            ("a:80", false),
            ("a..b", false),
            ("*.a", false),
        ] {
            assert_eq!(host(name).is_ok(), good, "{name}");
        }
        for (name, service, method) in [
            ("a.B", true, false),
            ("Get", true, true),
            (".a.B", true, false),
            ("", false, false),
            ("a/b", false, false),
            ("1a", false, false),
        ] {
            assert_eq!(
                (grpc_name(name, true).is_ok(), grpc_name(name, false).is_ok()),
                (service, method),
                "{name}"
            );
        }
    }

    #[test]
    fn durations() {
        let ms = |n| Ok(Some(Duration::from_millis(n)));
        for (text, want) in [
            ("100ms", ms(100)),
            ("1m30s", ms(90_000)),
            ("1h", ms(3_600_000)),
            ("0s", Ok(None)),
            ("0h0m0s0ms", Ok(None)),
        ] {
            assert_eq!(duration(text), want, "{text}");
        }
        for bad in ["", "1", "-1s", "1.5s", "1us", "100000s", "1h1h1h1h1h", "1 s", "s"] {
            assert!(duration(bad).is_err(), "{bad}");
        }
    }
}
