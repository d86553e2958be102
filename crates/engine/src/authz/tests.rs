//! Authorization: answers written down from Istio's documentation, then generated cases against an
//! evaluator that was written separately and plainly.

use model::{Change, IpPrefix, Match, Scope, StringMatch};
use proptest::prelude::*;

use super::*;

mod clients;
mod naive;

const WEB: &str = "10.1.0.1";

fn policy(key: &str, scope: Scope, action: Action, rules: Vec<Rule>) -> Policy {
    let (namespace, name) = key.split_once('/').unwrap();
    Policy {
        key: PolicyKey { namespace: namespace.into(), name: name.into() },
        scope,
        action,
        rules: rules.into(),
        dry_run: false,
        provenance: Provenance {
            object: format!("AuthorizationPolicy/{key}").into(),
            field: "".into(),
            origin: format!("{name}.yaml:1").into(),
        },
    }
}

/// A rule with one clause per element of `clauses`, each with one match.
fn rule(clauses: impl IntoIterator<Item = Match>) -> Rule {
    Rule {
        clauses: clauses.into_iter().map(|m| vec![m]).collect(),
        provenance: Provenance::default(),
    }
}

fn exact(s: &str) -> Vec<StringMatch> {
    vec![StringMatch::Exact(s.into())]
}

fn ips(s: &str) -> Vec<IpPrefix> {
    let (ip, length) = s.split_once('/').unwrap();
    vec![IpPrefix { ip: ip.parse().unwrap(), length: length.parse().unwrap() }]
}

fn principal(s: &str) -> Match {
    Match { principals: exact(s), ..Match::default() }
}

fn port(p: u16) -> Match {
    Match { destination_ports: vec![p], ..Match::default() }
}

/// The workload `shop/web`, which lists every selector policy among `policies` and those in `missing`.
fn world(policies: &[Policy], missing: &[PolicyKey]) -> (Snapshot, Workload) {
    let mut web = Workload::named("Kubernetes//Pod/shop/web", "shop", "web");
    web.addresses = Arc::new([WEB.parse().unwrap(), "fd00::1".parse().unwrap()]);
    let listed =
        policies.iter().filter(|p| p.scope == Scope::WorkloadSelector).map(|p| p.key.clone());
    web.policies = listed.chain(missing.iter().cloned()).collect();
    let snapshot =
        Snapshot::default().with(policies.iter().map(|p| Change::SetPolicy(Arc::new(p.clone()))));
    (snapshot, web)
}

/// A caller as tables write it: `principal@ip`, or `plain@ip`.
fn ask(snapshot: &Snapshot, web: &Workload, caller: &str, to: &str) -> Verdict {
    let (who, ip) = caller.split_once('@').unwrap();
    let peer: Option<Identity> =
        (who != "plain").then(|| format!("spiffe://{who}").parse().unwrap());
    let facts = InboundFacts {
        workload: web,
        destination: to.parse().unwrap(),
        source_ip: ip.parse().unwrap(),
        peer: peer.as_ref(),
        client: None,
    };
    authorize(snapshot, &facts)
}

/// The answer in short: `allow`, `allow KEY`, `REASON`, `REASON KEY`, `pending KEY`.
fn short(verdict: &Verdict) -> String {
    let by = |r: &Refusal| r.policy.as_ref().map(|p| format!(" {p}")).unwrap_or_default();
    match verdict {
        Verdict::Allow(Allowed::NoAllowPolicies) => "allow".into(),
        Verdict::Allow(Allowed::By { policy, .. }) => format!("allow {policy}"),
        Verdict::Deny(r) => format!("{}{}", r.reason, by(r)),
        Verdict::Pending(r) => format!("pending{}", by(r)),
    }
}

const SLEEP: &str = "cluster.local/ns/default/sa/sleep@10.2.0.1";
const TEST: &str = "cluster.local/ns/test/sa/any@10.2.0.2";
const OTHER: &str = "other.example/ns/other/sa/sleep@10.2.0.3";
const PLAIN: &str = "plain@10.2.0.4";

/// Checks what each of the four callers gets on port 80 of the workload.
fn check_callers(name: &str, policies: &[Policy], want: [&str; 4]) {
    let (snapshot, web) = world(policies, &[]);
    for (caller, want) in [SLEEP, TEST, OTHER, PLAIN].into_iter().zip(want) {
        assert_eq!(short(&ask(&snapshot, &web, caller, "10.1.0.1:80")), want, "{name}: {caller}");
    }
}

/// <https://istio.io/latest/docs/concepts/security/#implicit-enablement> and the reference of
/// AuthorizationPolicy: the four steps, "allow nothing", "deny all", "allow all".
#[test]
fn documented_order_of_evaluation() {
    use Action::{Allow, Deny};
    use Scope::{Global, Namespace, WorkloadSelector};
    let sleep = || rule([principal("cluster.local/ns/default/sa/sleep")]);
    let check = check_callers;
    check("no policy allows", &[], ["allow"; 4]);
    let nothing = policy("shop/allow-nothing", Namespace, Allow, vec![]);
    check(
        "an empty spec allows nothing",
        std::slice::from_ref(&nothing),
        ["policy_no_allow shop/allow-nothing"; 4],
    );
    let everything = policy("shop/all", Namespace, Allow, vec![Rule::default()]);
    check("rules: [{}] allows all", std::slice::from_ref(&everything), ["allow shop/all"; 4]);
    let deny_nothing = policy("shop/none", Namespace, Deny, vec![]);
    check("a DENY without rules never matches", &[deny_nothing], ["allow"; 4]);
    let deny_all = policy("shop/deny-all", Namespace, Deny, vec![Rule::default()]);
    check(
        "a DENY with an empty rule denies all",
        std::slice::from_ref(&deny_all),
        ["policy_deny shop/deny-all"; 4],
    );
    check(
        "DENY goes before ALLOW",
        &[everything.clone(), deny_all],
        ["policy_deny shop/deny-all"; 4],
    );
    let allow_sleep = policy("shop/sleep", WorkloadSelector, Allow, vec![sleep()]);
    let no = "policy_no_allow shop/sleep";
    check(
        "the first ALLOW turns the default",
        std::slice::from_ref(&allow_sleep),
        ["allow shop/sleep", no, no, no],
    );
    let no = "policy_no_allow shop/allow-nothing";
    check("any ALLOW suffices", &[nothing, allow_sleep.clone()], ["allow shop/sleep", no, no, no]);
    let deny_sleep = policy("istio-system/no-sleep", Global, Deny, vec![sleep()]);
    let yes = "allow shop/all";
    check(
        "mesh-wide DENY",
        &[everything, allow_sleep, deny_sleep],
        ["policy_deny istio-system/no-sleep", yes, yes, yes],
    );
    let elsewhere = policy("bank/deny", Namespace, Deny, vec![Rule::default()]);
    check("another namespace's policy does not count", &[elsewhere], ["allow"; 4]);
}

#[test]
fn identity_matches() {
    let check = |name: &str, m: Match, want: [bool; 4]| {
        let allow = policy("shop/p", Scope::Namespace, Action::Allow, vec![rule([m.clone()])]);
        let yes_no = |b: bool| if b { "allow shop/p" } else { "policy_no_allow shop/p" };
        check_callers(name, &[allow], want.map(yes_no));
        let deny = policy("shop/p", Scope::Namespace, Action::Deny, vec![rule([m])]);
        let yes_no = |b: bool| if b { "policy_deny shop/p" } else { "allow" };
        check_callers(name, &[deny], want.map(yes_no));
    };
    let m = Match::default;
    let s = |s: &str| -> Str { s.into() };
    //                                                                     sleep  test   other  plain
    check("principal", principal("cluster.local/ns/default/sa/sleep"), [true, false, false, false]);
    check(
        "no scheme in principals",
        principal("spiffe://cluster.local/ns/default/sa/sleep"),
        [false; 4],
    );
    let prefix = |p: &str| vec![StringMatch::Prefix(s(p))];
    let suffix = |p: &str| vec![StringMatch::Suffix(s(p))];
    let any = || vec![StringMatch::Presence];
    check(
        "prefix",
        Match { principals: prefix("cluster.local/"), ..m() },
        [true, true, false, false],
    );
    check("suffix", Match { principals: suffix("/sa/sleep"), ..m() }, [true, false, true, false]);
    check("any principal", Match { principals: any(), ..m() }, [true, true, true, false]);
    check(
        "any string is not no identity",
        Match { principals: prefix(""), ..m() },
        [true, true, true, false],
    );
    check("no principal", Match { not_principals: any(), ..m() }, [false, false, false, true]);
    check(
        "notPrincipals holds for plaintext",
        Match { not_principals: exact("cluster.local/ns/default/sa/sleep"), ..m() },
        [false, true, true, true],
    );
    check("namespace", Match { namespaces: exact("test"), ..m() }, [false, true, false, false]);
    check(
        "namespace prefix",
        Match { namespaces: prefix("te"), ..m() },
        [false, true, false, false],
    );
    check("any namespace", Match { namespaces: any(), ..m() }, [true, true, true, false]);
    check(
        "notNamespaces",
        Match { not_namespaces: exact("test"), ..m() },
        [true, false, true, true],
    );
    let account = |ns: &str, sa: &str| vec![(s(ns), s(sa))];
    let accounts = |a| Match { service_accounts: a, ..m() };
    check("service account", accounts(account("default", "sleep")), [true, false, false, false]);
    check("its name alone is not enough", accounts(account("test", "sleep")), [false; 4]);
    check("its namespace alone neither", accounts(account("test", "sleep2")), [false; 4]);
    check(
        "not service account",
        Match { not_service_accounts: account("default", "sleep"), ..m() },
        [false, true, true, true],
    );
    let two = Match { namespaces: exact("default"), not_principals: exact("x"), ..m() };
    check("kinds are all needed", two, [true, false, false, false]);
    let both = Match { namespaces: any(), not_namespaces: exact("test"), ..m() };
    check("wanted and unwanted of one kind", both, [true, false, true, false]);
    let values = Match { namespaces: [exact("test"), exact("other")].concat(), ..m() };
    check("values are alternatives", values, [false, true, true, false]);
    check("a match that sets nothing never matches", m(), [false; 4]);
}

#[test]
fn address_and_port_matches() {
    let check = |m: Match, caller: &str, to: &str, want: bool| {
        let deny = policy("shop/p", Scope::Namespace, Action::Deny, vec![rule([m.clone()])]);
        let (snapshot, web) = world(&[deny], &[]);
        let denied = short(&ask(&snapshot, &web, caller, to)) == "policy_deny shop/p";
        assert_eq!(denied, want, "{m:?} {caller} {to}");
    };
    let m = Match::default;
    let from = |p| Match { source_ips: ips(p), ..m() };
    let not_from = |p| Match { not_source_ips: ips(p), ..m() };
    let to = |p| Match { destination_ips: ips(p), ..m() };
    let not_to = |p| Match { not_destination_ips: ips(p), ..m() };
    check(from("10.2.0.0/24"), SLEEP, "10.1.0.1:80", true);
    check(from("10.2.0.0/24"), PLAIN, "10.1.0.1:80", true);
    check(from("10.2.0.2/32"), SLEEP, "10.1.0.1:80", false);
    check(not_from("10.2.0.0/24"), SLEEP, "10.1.0.1:80", false);
    check(not_from("10.2.0.2/32"), SLEEP, "10.1.0.1:80", true);
    check(from("10.2.0.0/24"), "plain@::ffff:10.2.0.9", "10.1.0.1:80", true);
    check(from("0.0.0.0/0"), "plain@fd00::9", "[fd00::1]:80", false);
    check(from("fd00::/16"), "plain@fd00::9", "[fd00::1]:80", true);
    check(to("10.1.0.1/32"), SLEEP, "10.1.0.1:80", true);
    check(to("10.1.0.1/32"), SLEEP, "[::ffff:10.1.0.1]:80", true);
    check(to("10.1.0.1/32"), "plain@fd00::9", "[fd00::1]:80", false);
    check(not_to("10.1.0.1/32"), SLEEP, "10.1.0.1:80", false);
    check(not_to("10.1.0.1/32"), "plain@fd00::9", "[fd00::1]:80", true);
    check(port(80), SLEEP, "10.1.0.1:80", true);
    check(port(80), SLEEP, "10.1.0.1:81", false);
    check(Match { not_destination_ports: vec![80], ..m() }, SLEEP, "10.1.0.1:80", false);
    check(Match { not_destination_ports: vec![80], ..m() }, SLEEP, "10.1.0.1:81", true);
}

#[test]
fn clauses_and_rules() {
    let sleep = || principal("cluster.local/ns/default/sa/sleep");
    let check = |name: &str, rules: Vec<Rule>, want: [bool; 4]| {
        let deny = policy("shop/p", Scope::WorkloadSelector, Action::Deny, rules);
        check_callers(name, &[deny], want.map(|b| if b { "policy_deny shop/p" } else { "allow" }));
    };
    check("from and to", vec![rule([sleep(), port(80)])], [true, false, false, false]);
    check("all clauses are needed", vec![rule([sleep(), port(81)])], [false; 4]);
    let clauses = |clauses| Rule { clauses, provenance: Provenance::default() };
    let alternatives = vec![sleep(), Match { namespaces: exact("test"), ..Match::default() }];
    check(
        "matches are alternatives",
        vec![clauses(vec![alternatives])],
        [true, true, false, false],
    );
    check("a clause without matches is satisfied", vec![clauses(vec![vec![]])], [true; 4]);
    check(
        "even beside another",
        vec![clauses(vec![vec![], vec![sleep()]])],
        [true, false, false, false],
    );
    let emptied = vec![Match::default()];
    check(
        "an emptied match is not",
        vec![clauses(vec![emptied.clone(), vec![sleep()]])],
        [false; 4],
    );
    let with_empty = vec![clauses(vec![[emptied, vec![sleep()]].concat()])];
    check("but its neighbours count", with_empty, [true, false, false, false]);
    let two = vec![rule([port(81)]), rule([sleep()])];
    check("rules are alternatives", two, [true, false, false, false]);
}

#[test]
fn dry_run_never_decides() {
    let mut deny = policy("shop/deny", Scope::Namespace, Action::Deny, vec![Rule::default()]);
    let mut allow = policy("shop/allow", Scope::Global, Action::Allow, vec![]);
    let mut never = policy("shop/a-never", Scope::Namespace, Action::Deny, vec![rule([port(1)])]);
    (deny.dry_run, allow.dry_run, never.dry_run) = (true, true, true);
    check_callers("dry-run DENY and ALLOW", &[deny.clone(), allow.clone()], ["allow"; 4]);
    let real = policy("shop/real", Scope::Namespace, Action::Allow, vec![]);
    let no = "policy_no_allow shop/real";
    allow.rules = Arc::new([Rule::default()]);
    check_callers("a dry-run ALLOW lets nobody in", &[real.clone(), allow.clone()], [no; 4]);
    let (snapshot, web) = world(&[deny, allow, never, real], &[]);
    let facts = InboundFacts {
        workload: &web,
        destination: "10.1.0.1:80".parse().unwrap(),
        source_ip: "10.2.0.1".parse().unwrap(),
        peer: None,
        client: None,
    };
    let hits: Vec<_> =
        dry_run_matches(&snapshot, &facts).iter().map(|p| p.key.to_string()).collect();
    assert_eq!(hits, ["shop/allow", "shop/deny"]);
}

#[test]
fn missing_policies_are_pending() {
    let key = |n: &str| PolicyKey { namespace: "shop".into(), name: n.into() };
    let check = |policies: &[Policy], missing: &[&str], want: &str| {
        let missing: Vec<_> = missing.iter().map(|n| key(n)).collect();
        let (snapshot, web) = world(policies, &missing);
        let verdict = ask(&snapshot, &web, SLEEP, "10.1.0.1:80");
        assert_eq!(short(&verdict), want);
        verdict
    };
    let allow = policy("shop/allow", Scope::Namespace, Action::Allow, vec![Rule::default()]);
    let nothing = policy("shop/nothing", Scope::Namespace, Action::Allow, vec![]);
    let deny = policy("shop/deny", Scope::Namespace, Action::Deny, vec![Rule::default()]);
    let Verdict::Pending(refusal) = check(&[], &["gone"], "pending shop/gone") else {
        unreachable!()
    };
    assert_eq!(refusal.message, "shop/web names policy shop/gone, which this proxy does not have");
    check(std::slice::from_ref(&allow), &["gone"], "pending shop/gone");
    check(&[nothing], &["gone"], "pending shop/gone");
    check(&[allow.clone(), deny], &["gone"], "policy_deny shop/deny");
    let verdict = check(&[allow], &["z", "a"], "pending shop/a");
    let Verdict::Pending(refusal) = verdict else { unreachable!() };
    assert_eq!(refusal.reason, Reason::PolicyMissing);
    assert_eq!(
        refusal.message,
        "shop/web names policy shop/a and 1 more, which this proxy does not have"
    );
}

#[test]
fn strict_mutual_tls() {
    let no_identity = || Match { not_principals: vec![StringMatch::Presence], ..Match::default() };
    let from_peer_authentication = |rules: Vec<Rule>| {
        let mut p = policy("shop/strict", Scope::Namespace, Action::Deny, rules);
        p.provenance.object = "PeerAuthentication/shop/default".into();
        p
    };
    let strict = from_peer_authentication(vec![rule([no_identity()])]);
    check_callers("STRICT", &[strict], ["allow", "allow", "allow", "mtls_required shop/strict"]);
    let permissive_80 = Match { not_destination_ports: vec![80], ..Match::default() };
    let by_port = from_peer_authentication(vec![rule([no_identity(), permissive_80])]);
    check_callers("PERMISSIVE on port 80", std::slice::from_ref(&by_port), ["allow"; 4]);
    let (snapshot, web) = world(&[by_port], &[]);
    let verdict = ask(&snapshot, &web, PLAIN, "10.1.0.1:81");
    assert_eq!(short(&verdict), "mtls_required shop/strict");
    let Verdict::Deny(refusal) = verdict else { unreachable!() };
    assert_eq!(
        refusal.message,
        "the plaintext peer 10.2.0.4 called shop/web port 81, and PeerAuthentication/shop/default (strict.yaml:1) demands mutual TLS"
    );
    let mut stock =
        policy("shop/istio_converted_static_strict", Scope::Namespace, Action::Deny, vec![]);
    stock.rules = Arc::new([rule([no_identity()])]);
    stock.provenance = Provenance::default();
    let want = "mtls_required shop/istio_converted_static_strict";
    check_callers("as Istio's control plane sends it", &[stock], ["allow", "allow", "allow", want]);
}

#[test]
fn who_demands_mutual_tls() {
    let check = |name: &str, policies: &[Policy], missing: &[PolicyKey], want: [bool; 2]| {
        let (snapshot, web) = world(policies, missing);
        // Whoever asks: it is about those who show nothing.
        let peer: Identity = "spiffe://cluster.local/ns/shop/sa/api".parse().unwrap();
        let got = [8080, 9090].map(|port| {
            demands_mutual_tls(
                &snapshot,
                &InboundFacts {
                    workload: &web,
                    destination: SocketAddr::new(WEB.parse().unwrap(), port),
                    source_ip: "10.1.0.9".parse().unwrap(),
                    peer: Some(&peer),
                    client: Some(&peer),
                },
            )
        });
        assert_eq!(got, want, "{name}");
    };
    let nobody = Match { not_principals: vec![StringMatch::Presence], ..Match::default() };
    let named = |name: &str, clauses: Vec<Match>| {
        policy(name, Scope::WorkloadSelector, Action::Deny, vec![rule(clauses)])
    };
    let strict = named("istio-system/istio_converted_static_strict", vec![nobody.clone()]);
    check("no policy", &[], &[], [false; 2]);
    check("strict", std::slice::from_ref(&strict), &[], [true; 2]);
    let one = named("shop/istio_converted_peer_authentication_x", vec![nobody.clone(), port(9090)]);
    check("a port", &[one], &[], [false, true]);
    // The user's own words against plaintext are a policy: they decide on the identity, which is known.
    check("an AuthorizationPolicy", &[named("shop/own", vec![nobody])], &[], [false; 2]);
    check("a dry run", &[Policy { dry_run: true, ..strict }], &[], [false; 2]);
    let key = PolicyKey { namespace: "shop".into(), name: "late".into() };
    check("one that has not arrived", &[], &[key], [true; 2]);
}

#[test]
fn a_workload_that_cannot_be_read_takes_nothing() {
    let (snapshot, mut web) = world(&[], &[]);
    let answer = |web: &Workload, caller| short(&ask(&snapshot, web, caller, "10.1.0.1:80"));
    for caller in [SLEEP, PLAIN] {
        assert_eq!(answer(&web, caller), "allow");
    }
    // Its policies are part of what cannot be read.
    web.protocol = TunnelProtocol::Unreadable;
    for caller in [SLEEP, PLAIN] {
        assert_eq!(answer(&web, caller), "unsupported");
    }
}

#[test]
fn what_is_not_for_the_workload_is_refused() {
    let everything = policy("shop/all", Scope::Namespace, Action::Allow, vec![Rule::default()]);
    let (snapshot, web) = world(&[everything], &[]);
    let check =
        |to: &str, want: &str| assert_eq!(short(&ask(&snapshot, &web, SLEEP, to)), want, "{to}");
    check("10.1.0.1:80", "allow shop/all");
    check("[fd00::1]:80", "allow shop/all");
    check("[::ffff:10.1.0.1]:80", "allow shop/all");
    for own in MESH_PORTS {
        check(&format!("10.1.0.1:{own}"), "mesh_port");
        check(&format!("[fd00::1]:{own}"), "mesh_port");
        check(&format!("10.9.9.9:{own}"), "destination_mismatch");
    }
    check("10.1.0.2:80", "destination_mismatch");
    check("127.0.0.1:80", "destination_mismatch");
}

#[test]
fn answers_name_the_rule_and_say_it_in_words() {
    let at = |field: &str, line: u32| Provenance {
        object: "AuthorizationPolicy/shop/b".into(),
        field: field.into(),
        origin: format!("b.yaml:{line}").into(),
    };
    let with = |m: Match, provenance| Rule { clauses: vec![vec![m]], provenance };
    let rules = vec![
        with(port(81), at("spec.rules[0]", 7)),
        with(port(80), at("spec.rules[1]", 9)),
        with(Match { not_destination_ports: vec![1], ..Match::default() }, at("spec.rules[2]", 11)),
    ];
    let b = policy("shop/b", Scope::Namespace, Action::Deny, rules);
    let c = policy("shop/c", Scope::WorkloadSelector, Action::Deny, vec![Rule::default()]);
    let (snapshot, web) = world(&[c.clone(), b.clone()], &[]);
    let Verdict::Deny(refusal) = ask(&snapshot, &web, SLEEP, "10.1.0.1:80") else {
        panic!("not denied")
    };
    assert_eq!(
        refusal.to_string(),
        "policy_deny: spiffe://cluster.local/ns/default/sa/sleep at 10.2.0.1 may not call shop/web port 80: \
         DENY policy shop/b matches [policy shop/b] [AuthorizationPolicy/shop/b spec.rules[1] (b.yaml:9)]"
    );
    let allow = Policy { action: Action::Allow, ..b };
    let (snapshot, web) = world(&[allow], &[]);
    let Verdict::Allow(Allowed::By { provenance, .. }) = ask(&snapshot, &web, SLEEP, "10.1.0.1:81")
    else {
        panic!("not allowed")
    };
    assert_eq!(provenance, at("spec.rules[0]", 7));
    // A rule that does not know its place is named by its policy; the smallest key is named first.
    let (snapshot, web) = world(
        &[c.clone(), Policy { key: PolicyKey { namespace: "shop".into(), name: "d".into() }, ..c }],
        &[],
    );
    let Verdict::Deny(refusal) = ask(&snapshot, &web, SLEEP, "10.1.0.1:80") else {
        panic!("not denied")
    };
    assert_eq!(refusal.policy.unwrap().to_string(), "shop/c");
    assert_eq!(refusal.provenance.unwrap().origin.to_string(), "c.yaml:1");
}

#[test]
fn a_refusal_lists_the_allow_policies() {
    let allow = |n: u32| policy(&format!("shop/p{n}"), Scope::Namespace, Action::Allow, vec![]);
    let check = |count: u32, want: &str| {
        let policies: Vec<_> = (0..count).rev().map(allow).collect();
        let (snapshot, web) = world(&policies, &[]);
        let Verdict::Deny(r) = ask(&snapshot, &web, PLAIN, "10.1.0.1:80") else {
            panic!("not denied")
        };
        let start =
            "the plaintext peer 10.2.0.4 may not call shop/web port 80: no ALLOW policy matches ";
        assert_eq!(r.message, format!("{start}{want}"));
        assert_eq!(r.policy.unwrap().to_string(), "shop/p0");
        assert_eq!(r.provenance.unwrap().origin.to_string(), "p0.yaml:1");
    };
    check(1, "(there is shop/p0)");
    check(3, "(there are shop/p0, shop/p1, shop/p2)");
    check(5, "(there are shop/p0, shop/p1, shop/p2 and 2 more)");
}

fn a_match() -> impl Strategy<Value = Match> {
    fn list<S: Strategy + 'static>(of: S) -> impl Strategy<Value = Vec<S::Value>>
    where
        S::Value: Clone + 'static,
    {
        // Mostly unset, as in real policies; else single matches would almost never hold.
        prop_oneof![4 => Just(Vec::new()).boxed(), 1 => proptest::collection::vec(of, 1..3).boxed()]
    }
    let text = |pool: &'static [&'static str]| {
        (0..4u8, proptest::sample::select(pool)).prop_map(|(kind, s)| match kind {
            0 => StringMatch::Prefix(s.into()),
            1 => StringMatch::Suffix(s.into()),
            2 => StringMatch::Presence,
            _ => StringMatch::Exact(s.into()),
        })
    };
    let ns = text(&["a", "b", "ab", ""]);
    let id = text(&["td/ns/a/sa/a", "td/ns/b/sa/a", "td/", "/sa/b", "/sa/a"]);
    let account = proptest::sample::select(&[("a", "a"), ("a", "b"), ("b", "a")][..])
        .prop_map(|(n, s)| (Str::from(n), Str::from(s)));
    let prefix = proptest::sample::select(
        &[
            "10.0.0.0/8",
            "10.2.0.1/32",
            "10.2.0.0/30",
            "10.1.0.1/32",
            "fd00::/16",
            "0.0.0.0/0",
            "::/0",
        ][..],
    )
    .prop_map(|s| ips(s)[0]);
    let ports = 79..82u16;
    let names = (
        list(ns.clone()),
        list(ns),
        list(account.clone()),
        list(account),
        list(id.clone()),
        list(id),
    );
    let places = (
        list(prefix.clone()),
        list(prefix.clone()),
        list(prefix.clone()),
        list(prefix),
        list(ports.clone()),
        list(ports),
    );
    (names, places).prop_map(|(n, p)| Match {
        namespaces: n.0,
        not_namespaces: n.1,
        service_accounts: n.2,
        not_service_accounts: n.3,
        principals: n.4,
        not_principals: n.5,
        source_ips: p.0,
        not_source_ips: p.1,
        destination_ips: p.2,
        not_destination_ips: p.3,
        destination_ports: p.4,
        not_destination_ports: p.5,
    })
}

fn a_policy() -> impl Strategy<Value = Policy> {
    let rules = proptest::collection::vec(
        proptest::collection::vec(proptest::collection::vec(a_match(), 0..3), 0..3),
        0..3,
    );
    let scope =
        proptest::sample::select(&[Scope::Global, Scope::Namespace, Scope::WorkloadSelector][..]);
    let name =
        proptest::sample::select(&["shop/a", "shop/b", "shop/c", "root/a", "bank/a", "bank/b"][..]);
    (name, scope, any::<bool>(), proptest::bool::weighted(0.1), rules).prop_map(
        |(key, scope, deny, dry_run, rules)| {
            let action = if deny { Action::Deny } else { Action::Allow };
            let rules = rules
                .into_iter()
                .map(|clauses| Rule { clauses, provenance: Provenance::default() });
            Policy { dry_run, ..policy(key, scope, action, rules.collect()) }
        },
    )
}

#[derive(Clone, Debug)]
struct Case {
    policies: Vec<Policy>,
    missing: Vec<PolicyKey>,
    peer: Option<Identity>,
    /// Only where there is a peer.
    client: Option<Identity>,
    source: IpAddr,
    destination: SocketAddr,
}

fn an_identity() -> impl Strategy<Value = Identity> {
    proptest::sample::select(
        &[("td", "a", "a"), ("td", "a", "b"), ("td", "b", "a"), ("x", "ab", "a")][..],
    )
    .prop_map(|(td, ns, sa)| Identity::new(td, ns, sa))
}

fn a_case() -> impl Strategy<Value = Case> {
    let missing = proptest::collection::vec(
        Just(PolicyKey { namespace: "shop".into(), name: "gone".into() }),
        0..2,
    );
    let peer = proptest::option::weighted(0.8, an_identity());
    let client = proptest::option::weighted(0.4, an_identity());
    let source =
        proptest::sample::select(&["10.2.0.1", "10.2.0.3", "fd00::7", "::ffff:10.2.0.1"][..]);
    let to = proptest::sample::select(
        &["10.1.0.1:80", "10.1.0.1:81", "[fd00::1]:80", "10.1.0.9:80", "10.1.0.1:15008"][..],
    );
    (proptest::collection::vec(a_policy(), 0..5), missing, peer, client, source, to).prop_map(
        |(mut policies, missing, peer, client, source, to)| {
            policies.sort_by(|a, b| a.key.cmp(&b.key));
            policies.dedup_by(|a, b| a.key == b.key);
            Case {
                policies,
                missing,
                client: client.filter(|_| peer.is_some()),
                peer,
                source: source.parse().unwrap(),
                destination: to.parse().unwrap(),
            }
        },
    )
}

impl Case {
    fn ask(&self) -> Verdict {
        let (snapshot, web) = world(&self.policies, &self.missing);
        let facts = InboundFacts {
            workload: &web,
            destination: self.destination,
            source_ip: self.source,
            peer: self.peer.as_ref(),
            client: self.client.as_ref(),
        };
        authorize(&snapshot, &facts)
    }

    fn with(&self, policy: Policy) -> Self {
        let mut more = self.clone();
        more.policies.retain(|p| p.key != policy.key);
        more.policies.push(policy);
        more
    }

    /// Without the policy whose key the new one has, so that adding it replaces nothing.
    fn without(&self, key: &PolicyKey) -> Self {
        let mut less = self.clone();
        less.policies.retain(|p| p.key != *key);
        less
    }
}

fn allows(v: &Verdict) -> bool {
    matches!(v, Verdict::Allow(_))
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    #[test]
    fn agrees_with_the_naive_evaluator(case in a_case()) {
        let got = case.ask();
        prop_assert_eq!(naive::answer(&case), short(&got), "{:?}", got);
    }

    #[test]
    fn order_of_arrival_does_not_matter(case in a_case()) {
        let mut reversed = case.clone();
        reversed.policies.reverse();
        prop_assert_eq!(case.ask(), reversed.ask());
    }

    #[test]
    fn another_deny_never_allows_more(case in a_case(), mut extra in a_policy()) {
        extra.action = Action::Deny;
        let before = case.without(&extra.key);
        if allows(&before.with(extra).ask()) {
            prop_assert!(allows(&before.ask()));
        }
    }

    #[test]
    fn another_allow_never_denies_more(case in a_case(), mut extra in a_policy()) {
        extra.action = Action::Allow;
        let before = case.without(&extra.key);
        // It must join a set that is not empty: the first ALLOW turns the default around.
        let mut first = policy("shop/first", Scope::Namespace, Action::Allow, vec![]);
        first.dry_run = false;
        let before = before.with(first);
        if allows(&before.ask()) {
            prop_assert!(allows(&before.with(extra).ask()));
        }
    }

    #[test]
    fn the_first_allow_turns_the_default(case in a_case()) {
        let mut open = case;
        open.policies.retain(|p| p.action == Action::Deny);
        let closed = open.with(policy("shop/first", Scope::Namespace, Action::Allow, vec![]));
        if allows(&open.ask()) {
            prop_assert_eq!(short(&closed.ask()), "policy_no_allow shop/first");
        } else {
            prop_assert_eq!(open.ask(), closed.ask());
        }
    }

    #[test]
    fn nothing_missing_is_ever_allowed(case in a_case()) {
        let mut case = case;
        case.missing = vec![PolicyKey { namespace: "shop".into(), name: "gone".into() }];
        prop_assert!(!allows(&case.ask()));
    }
}
