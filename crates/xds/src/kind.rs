//! The types of resources on a discovery stream.

/// A type of resource. The order is the order in which additions travel: what refers comes after what it
/// refers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Where policies were written (Ambit's own).
    Origin,
    /// Layer-4 policies.
    Authorization,
    /// Workloads and services.
    Address,
    /// Closes a push (Ambit's own).
    Marker,
}

/// Resource name of the one [`Kind::Marker`].
pub const MARKER_NAME: &str = "push";
/// Type URL of the list of refused names in the details of a refusal.
pub const REFUSED_TYPE: &str = "type.googleapis.com/ambit.v1.Refused";

impl Kind {
    pub const ALL: [Self; 4] = [Self::Origin, Self::Authorization, Self::Address, Self::Marker];

    pub const fn type_url(self) -> &'static str {
        match self {
            Self::Origin => "type.googleapis.com/ambit.v1.Origin",
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Marker => "type.googleapis.com/ambit.v1.PushMarker",
        }
    }

    pub fn from_type_url(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }

    pub(crate) const fn index(self) -> usize {
        self as usize
    }
}

impl std::fmt::Display for Kind {
    /// The last word of the type URL.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Origin => "Origin",
            Self::Authorization => "Authorization",
            Self::Address => "Address",
            Self::Marker => "PushMarker",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_and_indices() {
        for (index, kind) in Kind::ALL.into_iter().enumerate() {
            assert_eq!(kind.index(), index);
            assert_eq!(Kind::from_type_url(kind.type_url()), Some(kind));
            assert!(kind.type_url().ends_with(&format!(".{kind}")));
        }
        assert_eq!(Kind::from_type_url("type.googleapis.com/envoy.config.Cluster"), None);
    }
}
