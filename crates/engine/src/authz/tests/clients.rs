//! Two identities: that of a waypoint, and that of the client for whom it calls.

use super::*;

fn id(namespace: &str, account: &str) -> Identity {
    Identity::new("td", namespace, account)
}

fn facts<'a>(
    web: &'a Workload,
    peer: &'a Identity,
    client: Option<&'a Identity>,
) -> InboundFacts<'a> {
    let destination = "10.1.0.1:80".parse().unwrap();
    let source_ip = "10.2.0.9".parse().unwrap();
    InboundFacts { workload: web, destination, source_ip, peer: Some(peer), client }
}

/// What a waypoint's client may, and what it may not because of the waypoint, or in spite of it: the client through the
/// waypoint, the waypoint for itself, the client without a waypoint.
#[test]
fn two_identities() {
    use Action::{Allow, Deny};
    let check = |name: &str, action, m: Match, want: [&str; 3]| {
        let all = [policy("shop/p", Scope::Namespace, action, vec![rule([m])])];
        let (snapshot, web) = world(&all, &[]);
        let (waypoint, client) = (id("edge", "waypoint"), id("app", "client"));
        let asked = [(&waypoint, Some(&client)), (&waypoint, None), (&client, None)];
        for ((peer, client), want) in asked.into_iter().zip(want) {
            let got = short(&authorize(&snapshot, &facts(&web, peer, client)));
            assert_eq!(got, want, "{name}: {peer} for {client:?}");
        }
    };
    let (waypoint, client) = ("td/ns/edge/sa/waypoint", "td/ns/app/sa/client");
    let not = |who: &str| Match { not_principals: exact(who), ..Match::default() };
    let (yes, no) = ("allow shop/p", "policy_no_allow shop/p");
    let (denied, free) = ("policy_deny shop/p", "allow");
    check("ALLOW the client", Allow, principal(client), [yes, no, yes]);
    check("ALLOW the waypoint", Allow, principal(waypoint), [yes, yes, no]);
    check("ALLOW another", Allow, principal("td/ns/a/sa/b"), [no, no, no]);
    check("ALLOW all but the client", Allow, not(client), [no, yes, no]);
    check("ALLOW all but the waypoint", Allow, not(waypoint), [no, no, yes]);
    check("ALLOW all but another", Allow, not("td/ns/a/sa/b"), [yes, yes, yes]);
    check("DENY the client", Deny, principal(client), [denied, free, denied]);
    check("DENY the waypoint", Deny, principal(waypoint), [denied, denied, free]);
    check("DENY all but the client", Deny, not(client), [denied, denied, free]);
    check("DENY all but the waypoint", Deny, not(waypoint), [denied, free, denied]);
    // Neither of them is both: the conditions of a match are about one caller.
    let of_both = Match { namespaces: exact("edge"), ..principal(client) };
    check("ALLOW a mixture", Allow, of_both.clone(), [no, no, no]);
    check("DENY a mixture", Deny, of_both, [free, free, free]);
    let account = vec![("app".into(), "client".into())];
    let no_account = Match { not_service_accounts: account, ..principal(waypoint) };
    check("ALLOW but an account", Allow, no_account, [no, yes, no]);
    let no_namespace = Match { not_namespaces: exact("app"), ..principal(waypoint) };
    check("ALLOW but a namespace", Allow, no_namespace, [no, yes, no]);
}

#[test]
fn a_refusal_names_both() {
    let nobody = policy("shop/p", Scope::Namespace, Action::Allow, vec![]);
    let (snapshot, web) = world(&[nobody], &[]);
    let (waypoint, client) = (id("edge", "waypoint"), id("app", "client"));
    let verdict = authorize(&snapshot, &facts(&web, &waypoint, Some(&client)));
    let Verdict::Deny(refusal) = verdict else { panic!("nobody is allowed") };
    let words = "spiffe://td/ns/app/sa/client through the waypoint spiffe://td/ns/edge/sa/waypoint at \
                 10.2.0.9 may not call shop/web port 80: no ALLOW policy matches (there is shop/p)";
    assert_eq!(refusal.message, words);
}

#[test]
fn a_dry_run_sees_the_client() {
    let of_client = rule([principal("td/ns/app/sa/client")]);
    let mut dry = policy("shop/p", Scope::Namespace, Action::Deny, vec![of_client]);
    dry.dry_run = true;
    let (snapshot, web) = world(&[dry], &[]);
    let (waypoint, client) = (id("edge", "waypoint"), id("app", "client"));
    let hits = |client| dry_run_matches(&snapshot, &facts(&web, &waypoint, client)).len();
    assert_eq!([hits(Some(&client)), hits(None)], [1, 0]);
}

/// What lives is judged again under both names.
#[test]
fn what_lives_keeps_its_client() {
    let of_client = rule([principal("td/ns/app/sa/client")]);
    let deny = policy("shop/p", Scope::Namespace, Action::Deny, vec![of_client]);
    let (snapshot, web) = world(&[deny], &[]);
    let (waypoint, client) = (id("edge", "waypoint"), id("app", "client"));
    let ended = |client| {
        let ended = crate::ended_by(&snapshot, &facts(&web, &waypoint, client), false);
        ended.map(|refusal| refusal.reason)
    };
    assert_eq!(ended(Some(&client)), Some(Reason::PolicyChanged));
    assert_eq!(ended(None), None);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(4_000))]

    /// Whom policy shuts out under either name stays out, and nobody comes in whom it would let in under neither.
    #[test]
    fn a_client_behind_a_waypoint(case in a_case(), waypoint in an_identity(), client in an_identity()) {
        let asked = |peer: Option<&Identity>, client: Option<&Identity>| {
            Case { peer: peer.cloned(), client: client.cloned(), ..case.clone() }.ask()
        };
        let peer = Some(&waypoint);
        let verdict = asked(peer, Some(&client));
        let alone = [asked(peer, None), asked(Some(&client), None)];
        let denied = |v: &Verdict| short(v).starts_with("policy_deny");
        prop_assert_eq!(denied(&verdict), alone.iter().any(denied));
        if allows(&verdict) {
            prop_assert!(alone.iter().any(allows));
        }
        // A waypoint that calls for itself is like anybody.
        prop_assert_eq!(short(&asked(peer, peer)), short(&alone[0]));
    }
}
