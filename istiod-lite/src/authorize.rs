//! Who may have which certificate, and who may read the configuration. Pure decisions.
//!
//! A caller is a node proxy or nobody. It proves that with a one-time token (once) or with the client
//! certificate it got for it, whose DNS name states the node. It may then ask for itself, and for service
//! accounts that have a pod on that node.
//!
//! Invariant: every path that is not named here is a refusal.

use compile::PodsOnNodes;
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
}

impl Caller {
    pub fn node(&self) -> &Str {
        match self {
            Self::Token { node } | Self::Certificate { node } => node,
        }
    }
}

/// Why a call is refused. `code` labels the metric.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    #[error(
        "no client certificate and no token: a node proxy calls with the token of its node once, and then \
         with the certificate it got"
    )]
    NoCredentials,
    #[error(
        "this node token is not known: it was used already, replaced by a newer one, or never issued; the \
         launcher of the proxy issues a new one"
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

/// Decides a certificate request. `requested` is what the caller wants to impersonate; `None` asks for
/// the caller's own certificate.
pub fn may_sign(
    caller: &Caller,
    requested: Option<&Identity>,
    trust_domain: &Str,
    pods: &PodsOnNodes,
) -> Result<Subject, Refused> {
    let itself = proxy_identity(trust_domain);
    let requested = requested.unwrap_or(&itself);
    if requested.trust_domain != *trust_domain {
        return Err(Refused::MalformedIdentity(format!(
            "{requested} is of another trust domain than this mesh ({trust_domain})"
        )));
    }
    if *requested == itself {
        return Ok(Subject::Proxy { node: caller.node().clone(), identity: itself });
    }
    match caller {
        Caller::Token { .. } => Err(Refused::TokenForOther { requested: requested.clone() }),
        Caller::Certificate { node } if has_pod(pods, node, requested) => {
            Ok(Subject::Workload { identity: requested.clone() })
        }
        Caller::Certificate { node } => {
            Err(Refused::NoPodOnNode { node: node.clone(), requested: requested.clone() })
        }
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
