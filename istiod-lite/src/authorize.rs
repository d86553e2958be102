//! Who may have which certificate, and who may read the configuration. Pure decisions.
//!
//! A caller is a node proxy, a pod, or nobody. A node proxy proves itself with a one-time token (once) or with
//! the client certificate it got for it, whose DNS name states the node. It may then ask for itself, and for
//! service accounts that have a pod on that node. A pod proves itself with its token in every call. It may ask
//! for its own identity and nothing else; the pod of a waypoint may read the configuration too.
//!
//! Invariant: every path that is not named here is a refusal.

use std::fmt;

use compile::{PodsOnNodes, WaypointAccounts};
use model::{Identity, Str};

/// Namespace and service account of the node proxies.
pub const PROXY_NAMESPACE: &str = "istio-system";
pub const PROXY_ACCOUNT: &str = "ztunnel";
/// What follows the node's name in the DNS name of a node certificate.
const NODE_SUFFIX: &str = ".node.ambit.io";

/// A DNS name has at most 253 bytes.
const MAX_NODE_NAME: usize = 253 - NODE_SUFFIX.len();

/// How a caller proved who it is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Caller {
    /// A one-time token, issued to this node. Good for the node's own certificate only.
    Token { node: Str },
    /// The certificate of the node's proxy.
    Certificate { node: Str },
    /// The token of a pod that lives.
    Pod(Pod),
}

/// A pod, as its token states it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    pub namespace: Str,
    pub name: Str,
    pub service_account: Str,
    pub node: Str,
}

impl fmt::Display for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "pod {}/{}", self.namespace, self.name)
    }
}

impl Caller {
    pub fn node(&self) -> &Str {
        match self {
            Self::Token { node } | Self::Certificate { node } => node,
            Self::Pod(pod) => &pod.node,
        }
    }

    pub fn pod(&self) -> Option<&Pod> {
        match self {
            Self::Pod(pod) => Some(pod),
            Self::Token { .. } | Self::Certificate { .. } => None,
        }
    }
}

/// Why a call is refused. `code` labels the metric.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error(
        "no client certificate and no pod's token: a node proxy calls with the token of its node once, and then \
         with the certificate it got; a pod calls with its token"
    )]
    NoCredentials,
    #[error(
        "this token is not known: a node's that was used already or replaced by a newer one, a pod's that is \
         gone, or one that was never issued; who starts the proxy or the pod issues a new one"
    )]
    UnknownToken,
    #[error("the authorization header is not of the form `Bearer TOKEN`")]
    MalformedToken,
    #[error("the client certificate is not readable: {0}")]
    UnreadableCertificate(String),
    #[error("the client certificate expired; connect again with a renewed one")]
    CertificateExpired,
    #[error(
        "{caller} is not a node proxy: only {PROXY_NAMESPACE}/{PROXY_ACCOUNT} with a node name may call"
    )]
    NotANodeProxy { caller: Identity },
    #[error("the caller is of trust domain {theirs}, this mesh is {ours}")]
    ForeignTrustDomain { theirs: Str, ours: Str },
    #[error("the requested identity is not acceptable: {0}")]
    MalformedIdentity(String),
    #[error("a node token is good for the node's own certificate only, not for {requested}")]
    TokenForOther { requested: Identity },
    #[error(
        "no pod on {node} runs as {requested}: a node gets certificates only for service accounts of its \
         own pods"
    )]
    NoPodOnNode { node: Str, requested: Identity },
    #[error("{pod} runs as {own}: its token is good for that identity only, not for {requested}")]
    PodForOther { pod: Box<Pod>, own: Identity, requested: Identity },
    #[error(
        "{pod} runs as service account {}, and no waypoint does: only node proxies and waypoints read the \
         configuration",
        pod.service_account
    )]
    NotAWaypoint { pod: Pod },
}

impl Refused {
    /// A short stable word for the metric.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::NoCredentials => "no_credentials",
            Self::UnknownToken => "unknown_token",
            Self::MalformedToken => "malformed_token",
            Self::UnreadableCertificate(_) => "unreadable_certificate",
            Self::CertificateExpired => "certificate_expired",
            Self::NotANodeProxy { .. } => "not_a_node_proxy",
            Self::ForeignTrustDomain { .. } => "foreign_trust_domain",
            Self::MalformedIdentity(_) => "malformed_identity",
            Self::TokenForOther { .. } => "token_for_other",
            Self::NoPodOnNode { .. } => "no_pod_on_node",
            Self::PodForOther { .. } => "pod_for_other",
            Self::NotAWaypoint { .. } => "not_a_waypoint",
        }
    }

    /// Whether the caller is unknown, rather than known and not allowed.
    pub const fn is_unauthenticated(&self) -> bool {
        matches!(
            self,
            Self::NoCredentials
                | Self::UnknownToken
                | Self::MalformedToken
                | Self::UnreadableCertificate(_)
                | Self::CertificateExpired
        )
    }
}

/// The identity of every node proxy.
pub fn proxy_identity(trust_domain: &Str) -> Identity {
    Identity::new(trust_domain.clone(), PROXY_NAMESPACE, PROXY_ACCOUNT)
}

/// The DNS name by which a certificate says which node its proxy serves.
pub fn node_dns_name(node: &str) -> String {
    format!("{node}{NODE_SUFFIX}")
}

/// Whether a node may be called so: it becomes part of a DNS name.
pub fn is_node_name(node: &str) -> bool {
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !l.starts_with('-')
            && !l.ends_with('-')
    };
    node.len() <= MAX_NODE_NAME && node.split('.').all(label)
}

/// The node that a verified client certificate speaks for.
pub fn node_of_certificate(
    identity: &Identity,
    dns_names: &[String],
    trust_domain: &Str,
) -> Result<Caller, Refused> {
    if identity.trust_domain != *trust_domain {
        return Err(Refused::ForeignTrustDomain {
            theirs: identity.trust_domain.clone(),
            ours: trust_domain.clone(),
        });
    }
    let not_a_proxy = || Refused::NotANodeProxy { caller: identity.clone() };
    if *identity != proxy_identity(trust_domain) {
        return Err(not_a_proxy());
    }
    // We issue exactly one; a second would leave open which node is meant.
    let [name] = dns_names else { return Err(not_a_proxy()) };
    match name.strip_suffix(NODE_SUFFIX) {
        Some(node) if is_node_name(node) => Ok(Caller::Certificate { node: node.into() }),
        _ => Err(not_a_proxy()),
    }
}

/// What the certificate that was asked for is for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Subject {
    /// The node proxy itself; the certificate carries the node's name.
    Proxy { node: Str, identity: Identity },
    /// A workload.
    Workload { identity: Identity },
}

impl Subject {
    pub fn identity(&self) -> &Identity {
        match self {
            Self::Proxy { identity, .. } | Self::Workload { identity } => identity,
        }
    }

    /// A word for the metric.
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Proxy { .. } => "proxy",
            Self::Workload { .. } => "workload",
        }
    }
}

/// Decides whether a caller may read the configuration. `waypoints`: as whom waypoints run.
pub fn may_read(caller: &Caller, waypoints: &WaypointAccounts) -> Result<(), Refused> {
    match caller {
        Caller::Certificate { .. } => Ok(()),
        // Good for one certificate, with which the proxy then comes.
        Caller::Token { .. } => Err(Refused::NoCredentials),
        Caller::Pod(pod) => {
            let account = (pod.namespace.clone(), pod.service_account.clone());
            let refused = || Refused::NotAWaypoint { pod: pod.clone() };
            waypoints.contains(&account).then_some(()).ok_or_else(refused)
        }
    }
}

/// Decides a certificate request. `requested` is what the caller wants to impersonate; `None` asks for
/// the caller's own certificate.
pub fn may_sign(
    caller: &Caller,
    requested: Option<&Identity>,
    trust_domain: &Str,
    pods: &PodsOnNodes,
) -> Result<Subject, Refused> {
    let itself = proxy_identity(trust_domain);
    let node = match caller {
        Caller::Pod(pod) => return own_of_pod(pod, requested, &itself),
        Caller::Token { node } | Caller::Certificate { node } => node,
    };
    let requested = requested.unwrap_or(&itself);
    if requested.trust_domain != *trust_domain {
        return Err(Refused::MalformedIdentity(format!(
            "{requested} is of another trust domain than this mesh ({trust_domain})"
        )));
    }
    if *requested == itself {
        return Ok(Subject::Proxy { node: node.clone(), identity: itself });
    }
    if matches!(caller, Caller::Token { .. }) {
        return Err(Refused::TokenForOther { requested: requested.clone() });
    }
    if !has_pod(pods, node, requested) {
        return Err(Refused::NoPodOnNode { node: node.clone(), requested: requested.clone() });
    }
    Ok(Subject::Workload { identity: requested.clone() })
}

/// A pod's token is good for the pod's own identity.
fn own_of_pod(
    pod: &Pod,
    requested: Option<&Identity>,
    proxy: &Identity,
) -> Result<Subject, Refused> {
    let own = Identity::new(
        proxy.trust_domain.clone(),
        pod.namespace.clone(),
        pod.service_account.clone(),
    );
    // The node proxies' identity says who stands behind every pod of a node: it comes with a node's name or not at all.
    if own == *proxy {
        return Err(Refused::NotANodeProxy { caller: own });
    }
    match requested {
        Some(requested) if *requested != own => {
            let (pod, requested) = (Box::new(pod.clone()), requested.clone());
            Err(Refused::PodForOther { pod, own, requested })
        }
        _ => Ok(Subject::Workload { identity: own }),
    }
}

fn has_pod(pods: &PodsOnNodes, node: &Str, identity: &Identity) -> bool {
    let account = (identity.namespace.clone(), identity.service_account.clone());
    pods.get(node).is_some_and(|accounts| accounts.contains(&account))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const TD: &str = "cluster.local";

    fn pods(at: &[(&str, &str, &str)]) -> PodsOnNodes {
        let mut pods = PodsOnNodes::new();
        for (node, namespace, account) in at {
            let account = (Str::from(*namespace), Str::from(*account));
            pods.entry((*node).into()).or_default().insert(account);
        }
        pods
    }

    #[test]
    fn certificates() {
        let check = |caller: &Caller, requested: Option<&str>, want: Result<&str, &str>| {
            let requested: Option<Identity> = requested.map(|uri| uri.parse().unwrap());
            let pods = pods(&[("node-1", "shop", "web"), ("node-2", "shop", "db")]);
            let got = may_sign(caller, requested.as_ref(), &TD.into(), &pods);
            let got = got.as_ref().map(|s| match s {
                Subject::Proxy { node, identity } => format!("{identity} on {node}"),
                Subject::Workload { identity } => identity.to_string(),
            });
            assert_eq!(got.as_deref().map_err(|e| e.code()), want, "{caller:?} {requested:?}");
        };
        let token = Caller::Token { node: "node-1".into() };
        let one = Caller::Certificate { node: "node-1".into() };
        let two = Caller::Certificate { node: "node-2".into() };
        let proxy = "spiffe://cluster.local/ns/istio-system/sa/ztunnel";
        let web = "spiffe://cluster.local/ns/shop/sa/web";
        let db = "spiffe://cluster.local/ns/shop/sa/db";

        check(&token, None, Ok("spiffe://cluster.local/ns/istio-system/sa/ztunnel on node-1"));
        check(
            &token,
            Some(proxy),
            Ok("spiffe://cluster.local/ns/istio-system/sa/ztunnel on node-1"),
        );
        check(&token, Some(web), Err("token_for_other"));
        check(&one, None, Ok("spiffe://cluster.local/ns/istio-system/sa/ztunnel on node-1"));
        check(&two, Some(proxy), Ok("spiffe://cluster.local/ns/istio-system/sa/ztunnel on node-2"));
        // Each node for its own pods.
        check(&one, Some(web), Ok(web));
        check(&two, Some(web), Err("no_pod_on_node"));
        check(&two, Some(db), Ok(db));
        check(&one, Some(db), Err("no_pod_on_node"));
        // Same account in another namespace, other account in the same namespace.
        check(&one, Some("spiffe://cluster.local/ns/bank/sa/web"), Err("no_pod_on_node"));
        check(&one, Some("spiffe://cluster.local/ns/shop/sa/default"), Err("no_pod_on_node"));
        check(&one, Some("spiffe://other/ns/shop/sa/web"), Err("malformed_identity"));
        check(&one, Some("spiffe://other/ns/istio-system/sa/ztunnel"), Err("malformed_identity"));
    }

    fn pod_caller(namespace: &str, account: &str) -> Caller {
        Caller::Pod(Pod {
            namespace: namespace.into(),
            name: "p-1".into(),
            service_account: account.into(),
            node: "node-1".into(),
        })
    }

    #[test]
    fn pods_get_their_own_identity_only() {
        let check = |caller: Caller, requested: Option<&str>, want: Result<&str, &str>| {
            let requested: Option<Identity> = requested.map(|uri| uri.parse().unwrap());
            // Others run on the node as well.
            let pods = pods(&[("node-1", "shop", "web"), ("node-1", "shop", "waypoint")]);
            let got = may_sign(&caller, requested.as_ref(), &TD.into(), &pods);
            let got = got.as_ref().map(|s| (s.kind(), s.identity().to_string()));
            let want = want.map(|uri| ("workload", uri.to_owned()));
            assert_eq!(got.map_err(Refused::code), want, "{caller:?} {requested:?}");
        };
        let waypoint = "spiffe://cluster.local/ns/shop/sa/waypoint";
        let pod = || pod_caller("shop", "waypoint");
        check(pod(), None, Ok(waypoint));
        check(pod(), Some(waypoint), Ok(waypoint));
        for other in [
            "spiffe://cluster.local/ns/shop/sa/web",
            "spiffe://cluster.local/ns/bank/sa/waypoint",
            "spiffe://other/ns/shop/sa/waypoint",
            "spiffe://cluster.local/ns/istio-system/sa/ztunnel",
        ] {
            check(pod(), Some(other), Err("pod_for_other"));
        }
        // The proxies' own name is not for pods, though a pod may run under that account.
        let forged = || pod_caller("istio-system", "ztunnel");
        check(forged(), None, Err("not_a_node_proxy"));
        check(
            forged(),
            Some("spiffe://cluster.local/ns/istio-system/sa/ztunnel"),
            Err("not_a_node_proxy"),
        );
    }

    #[test]
    fn readers_of_the_configuration() {
        let check = |caller: Caller, want: Result<(), &str>| {
            let waypoints = [("shop".into(), "waypoint".into())].into();
            assert_eq!(may_read(&caller, &waypoints).map_err(|e| e.code()), want, "{caller:?}");
        };
        check(Caller::Certificate { node: "node-1".into() }, Ok(()));
        check(Caller::Token { node: "node-1".into() }, Err("no_credentials"));
        check(pod_caller("shop", "waypoint"), Ok(()));
        check(pod_caller("shop", "web"), Err("not_a_waypoint"));
        check(pod_caller("bank", "waypoint"), Err("not_a_waypoint"));
    }

    #[test]
    fn callers() {
        let check = |identity: Identity, names: &[&str], want: Result<&str, &str>| {
            let names: Vec<String> = names.iter().map(|n| (*n).to_owned()).collect();
            let got = node_of_certificate(&identity, &names, &TD.into());
            let got = got.as_ref().map(|c| &**c.node()).map_err(Refused::code);
            assert_eq!(got, want, "{identity} {names:?}");
        };
        let proxy = || Identity::new(TD, "istio-system", "ztunnel");
        check(proxy(), &["node-1.node.ambit.io"], Ok("node-1"));
        check(proxy(), &["a.b.c.node.ambit.io"], Ok("a.b.c"));
        check(proxy(), &[], Err("not_a_node_proxy"));
        check(proxy(), &["node-1"], Err("not_a_node_proxy"));
        check(proxy(), &[".node.ambit.io"], Err("not_a_node_proxy"));
        check(proxy(), &["*.node.ambit.io"], Err("not_a_node_proxy"));
        check(proxy(), &["node-1.node.ambit.io", "node-2.node.ambit.io"], Err("not_a_node_proxy"));
        check(
            Identity::new(TD, "shop", "ztunnel"),
            &["node-1.node.ambit.io"],
            Err("not_a_node_proxy"),
        );
        check(
            Identity::new(TD, "istio-system", "web"),
            &["node-1.node.ambit.io"],
            Err("not_a_node_proxy"),
        );
        check(
            Identity::new("other", "istio-system", "ztunnel"),
            &["node-1.node.ambit.io"],
            Err("foreign_trust_domain"),
        );
    }

    #[test]
    fn node_names() {
        let check = |name: &str, ok: bool| assert_eq!(is_node_name(name), ok, "{name}");
        check("node-1", true);
        check("ip-10-0-0-1.eu-west-1.compute.internal", true);
        check(&"a".repeat(63), true);
        for bad in
            ["", "-a", "a-", "A", "a_b", "a..b", ".a", "a.", "a b", "ä", "*", &"a".repeat(64)]
        {
            check(bad, false);
        }
        check(&["a".repeat(63), "b".repeat(63), "c".repeat(63), "d".repeat(50)].join("."), false);
    }

    proptest! {
        /// What is signed is always the node itself or one of its own pods.
        #[test]
        fn nothing_else_is_ever_signed(
            at in proptest::collection::vec((0_u8..3, 0_u8..3, 0_u8..3), 0..6),
            node in 0_u8..3, namespace in 0_u8..3, account in 0_u8..3, token: bool,
        ) {
            let name = |p: &str, i: u8| format!("{p}{i}");
            let named: Vec<_> = at.iter()
                .map(|(n, ns, sa)| (name("node-", *n), name("ns", *ns), name("sa", *sa)))
                .collect();
            let listed: Vec<_> =
                named.iter().map(|(n, ns, sa)| (n.as_str(), ns.as_str(), sa.as_str())).collect();
            let index = pods(&listed);
            let here: Str = name("node-", node).into();
            let caller = if token {
                Caller::Token { node: here }
            } else {
                Caller::Certificate { node: here }
            };
            let requested = Identity::new(TD, name("ns", namespace), name("sa", account));
            let got = may_sign(&caller, Some(&requested), &TD.into(), &index);
            let has_pod = at.contains(&(node, namespace, account));
            prop_assert_eq!(got.is_ok(), has_pod && !token);
        }
    }
}
