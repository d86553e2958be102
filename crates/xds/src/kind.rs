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
    /// Named parts of services (Ambit's own, for waypoints).
    Subset,
    /// HTTP routes of services (Ambit's own, for waypoints).
    Routes,
    /// Closes a push (Ambit's own).
    Marker,
}

/// Resource name of the one [`Kind::Marker`].
pub const MARKER_NAME: &str = "push";
/// Type URL of the list of refused names in the details of a refusal.
pub const REFUSED_TYPE: &str = "type.googleapis.com/ambit.v1.Refused";

impl Kind {
    pub const ALL: [Self; 6] = [
        Self::Origin,
        Self::Authorization,
        Self::Address,
        Self::Subset,
        Self::Routes,
        Self::Marker,
    ];

    /// What configuration is made of: all but the marker.
    pub const CONFIGURATION: [Self; 5] =
        [Self::Origin, Self::Authorization, Self::Address, Self::Subset, Self::Routes];

    /// What a node's proxy asks for, in this order.
    pub const OF_NODE: [Self; 4] = [Self::Origin, Self::Authorization, Self::Address, Self::Marker];

    /// What a waypoint asks for, in this order. What refers to addresses is named before them: when the control plane
    /// learns which addresses the proxy still has, it knows already what the proxy needs them for, and takes none away
    /// too early.
    pub const OF_WAYPOINT: [Self; 6] = [
        Self::Origin,
        Self::Authorization,
        Self::Routes,
        Self::Subset,
        Self::Address,
        Self::Marker,
    ];

    /// What a proxy asks of Istio's control plane, which knows its own types only.
    pub const OF_ISTIO: [Self; 2] = [Self::Authorization, Self::Address];

    pub const fn type_url(self) -> &'static str {
        match self {
            Self::Origin => "type.googleapis.com/ambit.v1.Origin",
            Self::Authorization => "type.googleapis.com/istio.security.Authorization",
            Self::Address => "type.googleapis.com/istio.workload.Address",
            Self::Subset => "type.googleapis.com/ambit.v1.Subset",
            Self::Routes => "type.googleapis.com/ambit.v1.Routes",
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
            Self::Subset => "Subset",
            Self::Routes => "Routes",
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
        assert_eq!(Kind::CONFIGURATION[..], Kind::ALL[..Kind::Marker.index()]);
        let mut waypoint = Kind::OF_WAYPOINT;
        waypoint.sort();
        assert_eq!(waypoint, Kind::ALL);
    }

    /// What is no affair of theirs must not travel to them: stock proxies refuse it, and ours would keep it in memory.
    #[test]
    fn node_proxies_do_not_ask_for_routes() {
        for kinds in [&Kind::OF_NODE[..], &Kind::OF_ISTIO] {
            assert!(!kinds.contains(&Kind::Routes) && !kinds.contains(&Kind::Subset));
        }
    }
}
