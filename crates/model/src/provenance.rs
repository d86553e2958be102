//! Where a piece of configuration comes from, so that every refusal can name it.

use std::fmt;

use crate::Str;

/// The object, the field inside it and the place it was read from.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub struct Provenance {
    /// `Kind/namespace/name`, for example `AuthorizationPolicy/shop/deny-all`. Empty: not known.
    pub object: Str,
    /// The path of the field, for example `spec.rules[0]`. Empty: the object as a whole.
    pub field: Str,
    /// `file:line` locally, `resourceVersion=N` from Kubernetes. Empty: not known.
    pub origin: Str,
}

impl fmt::Display for Provenance {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.object.is_empty() { "unknown object" } else { &self.object })?;
        if !self.field.is_empty() {
            write!(f, " {}", self.field)?;
        }
        if !self.origin.is_empty() {
            write!(f, " ({})", self.origin)?;
        }
        Ok(())
    }
}
