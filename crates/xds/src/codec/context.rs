//! The resource that is being decoded, and what every message has: names, enums, addresses, ports.

use std::net::IpAddr;

use bytes::Bytes;
use model::Str;

use super::{DecodeError, Interner};

/// The resource at hand, so that every error names it.
pub(super) struct Cx<'a> {
    pub(super) resource: &'a str,
    pub(super) interner: &'a mut Interner,
}

impl Cx<'_> {
    pub(super) fn error(&self, field: impl Into<String>, problem: impl ToString) -> DecodeError {
        DecodeError {
            resource: short(self.resource),
            field: field.into(),
            problem: problem.to_string(),
        }
    }

    pub(super) fn str(&mut self, s: &str) -> Str {
        self.interner.str(s)
    }

    pub(super) fn named(&self, field: &str, says: &str) -> Result<(), DecodeError> {
        if says == self.resource && !says.is_empty() {
            return Ok(());
        }
        let says = short(says);
        Err(self.error(field, format!("says {says:?}, the resource is named otherwise")))
    }

    /// As [`Self::named`], `NAMESPACE/NAME`. A slash in the namespace would make it another's name: whoever removes by name finds
    /// the namespace at the first one.
    pub(super) fn named_in(
        &self,
        field: &str,
        namespace: &str,
        name: &str,
    ) -> Result<(), DecodeError> {
        if namespace.contains('/') {
            let namespace = short(namespace);
            return Err(self.error("namespace", format!("{namespace:?} holds a slash")));
        }
        self.named(&format!("namespace/{field}"), &format!("{namespace}/{name}"))
    }

    pub(super) fn known<T: TryFrom<i32>>(&self, field: &str, value: i32) -> Result<T, DecodeError> {
        T::try_from(value)
            .map_err(|_| self.error(field, format!("the value {value} is not known to this proxy")))
    }

    pub(super) fn ip(&self, field: &str, bytes: &Bytes) -> Result<IpAddr, DecodeError> {
        if let Ok(v4) = <[u8; 4]>::try_from(&bytes[..]) {
            return Ok(v4.into());
        }
        if let Ok(v6) = <[u8; 16]>::try_from(&bytes[..]) {
            return Ok(v6.into());
        }
        Err(self.error(field, format!("{} bytes are not an IP address", bytes.len())))
    }

    pub(super) fn prefix_length(
        &self,
        field: &str,
        ip: IpAddr,
        length: u32,
    ) -> Result<u8, DecodeError> {
        let width = if ip.is_ipv4() { 32 } else { 128 };
        match u8::try_from(length) {
            Ok(length) if length <= width => Ok(length),
            _ => Err(self.error(field, format!("/{length} is no prefix length for {ip}"))),
        }
    }

    pub(super) fn port(&self, field: &str, port: u32) -> Result<u16, DecodeError> {
        u16::try_from(port).map_err(|_| self.error(field, format!("{port} is not a port")))
    }
}

/// What the control plane wrote, for a message: its names are short, and a broken one must not flood the log.
pub(super) fn short(words: &str) -> String {
    words.chars().take(256).collect()
}
