//! `HTTPFault`, by itself and as a filter of a route.

use std::time::Duration;

use model::http::{Abort, Fault, Filter, Share, TextMatch};
use model::{Identity, Reason};
use proptest::prelude::*;

use super::*;
use crate::http::testing::{SHOP, http, rule};
use crate::{Compiled, Folder, MeshConfig, Severity, compile};

fn object(spec: &str) -> String {
    format!(
        "\n---\n{{apiVersion: ambit.io/v1alpha1, kind: HTTPFault, metadata: {{name: f, namespace: shop}}, spec: {{{spec}}}}}\n"
    )
}

/// A route that names the fault `f`, the fault, and everything that is said.
fn run(spec: &str) -> (Compiled, Vec<Diagnostic>) {
    let route = http(
        "[{filters: [{type: ExtensionRef, extensionRef: {group: ambit.io, kind: HTTPFault, name: f}}], backendRefs: [{name: v1, port: 80}]}]",
    );
    let mut folder = Folder::new();
    folder.set_file(0, "test.yaml", &format!("{SHOP}{route}"));
    folder.set_file(0, "fault.yaml", &object(spec));
    let config = MeshConfig { trust_domain: "td".into(), ..MeshConfig::default() };
    let compiled = compile(&folder.objects(), &config);
    let all = folder.diagnostics().into_iter().chain(compiled.diagnostics.iter().cloned());
    let found =
        all.filter(|d| d.object.contains("HTTPFault") || d.object.contains("Route")).collect();
    (compiled, found)
}

fn read(spec: &str) -> Fault {
    let (compiled, found) = run(spec);
    assert_eq!(found, [], "{spec}");
    match &rule(&compiled).filters[..] {
        [Filter::Fault(fault)] => fault.clone(),
        other => panic!("{spec}: {other:?}"),
    }
}

fn percent(n: u32) -> Share {
    Share { numerator: n * 10_000, denominator: 1_000_000 }
}

#[test]
fn delays_and_aborts() {
    let delay = Some((percent(10), Duration::from_millis(250)));
    assert_eq!(read("delay: {percent: 10, duration: 250ms}"), Fault { delay, ..Fault::default() });
    assert_eq!(read("delay: {percentage: {value: 10}, duration: 0.25s}").delay, delay);
    let abort = |spec: &str| read(&format!("abort: {{percent: 100, {spec}}}")).abort.unwrap();
    assert_eq!(abort("httpStatus: 503"), (percent(100), Abort::Http(503)));
    assert_eq!(abort("grpcStatus: UNAVAILABLE").1, Abort::Grpc(14));
    assert_eq!(abort("grpcStatus: 14").1, Abort::Grpc(14));
    assert_eq!(abort("reset: true").1, Abort::Reset);
    let both = read("delay: {percent: 1, duration: 1s}, abort: {percent: 1, reset: true}");
    assert!(both.delay.is_some() && both.abort.is_some());
    assert_eq!(read("abort: {percent: 0.01, reset: true}").abort.unwrap().0.numerator, 100);
}

#[test]
fn matches() {
    let fault =
        |spec: &str| read(&format!("abort: {{percent: 100, reset: true}}, match: {{{spec}}}"));
    let headers =
        fault("headers: [{name: X-A, value: b}, {name: c, value: 'd+', type: RegularExpression}]")
            .headers;
    assert_eq!((&*headers[0].name, &headers[0].value), ("x-a", &TextMatch::Exact("b".into())));
    assert!(headers[1].value.matches(Some("ddd")) && !headers[1].value.matches(Some("ddx")));
    let source = fault("source: {namespaces: [shop], principals: [spiffe://other/ns/a/sa/b, cluster.local/ns/shop/sa/web]}").source;
    assert_eq!(source.namespaces, ["shop".into()]);
    // `cluster.local` is the mesh's own trust domain, as in policies.
    let who = [("other", "a", "b"), ("td", "shop", "web"), ("cluster.local", "shop", "web")];
    assert_eq!(source.identities, who.map(|(td, ns, sa)| Identity::new(td, ns, sa)));
}

#[test]
fn ends() {
    let until =
        |text: &str| read(&format!("abort: {{percent: 1, reset: true}}, until: '{text}'")).until;
    assert_eq!(until("2030-01-01T00:00:00Z"), Some(1_893_456_000));
    assert_eq!(until("2030-01-01T01:00:00+01:00"), Some(1_893_456_000));
    assert_eq!(read("abort: {percent: 1, reset: true}").until, None);
}

/// What is not what was meant harms nobody, and does not break the route that names it.
#[test]
fn unsure_is_harmless() {
    let check = |spec: &str, field: &str| {
        let (compiled, found) = run(spec);
        assert_eq!(rule(&compiled).filters, [Filter::Fault(Fault::default())], "{spec}");
        assert_eq!(rule(&compiled).backends.len(), 1);
        let [d] = &found[..] else { panic!("{spec}: {found:?}") };
        assert_eq!(
            (d.severity, d.code, d.field.as_str()),
            (Severity::Error, Code::InvalidField, field),
            "{spec}"
        );
        assert!(d.message.contains("nobody is harmed"), "{}", d.message);
        assert_eq!(d.origin, "fault.yaml:3");
    };
    check("", "spec");
    let abort = |more: &str| format!("abort: {{percent: 100, reset: true}}, {more}");
    for bad in [
        "soon",
        "2030-01-01",
        "2030-01-01T00:00:00",
        "1969-12-31T23:59:59Z",
        "99999-01-01T00:00:00Z",
        "",
    ] {
        check(&abort(&format!("until: '{bad}'")), "spec.until");
    }
    check("abort: {reset: true}", "spec.abort");
    check("abort: {percent: 100}", "spec.abort");
    check("abort: {percent: 100, reset: true, httpStatus: 500}", "spec.abort");
    check("abort: {percent: 101, reset: true}", "spec.abort.percent");
    check("abort: {percent: -1, reset: true}", "spec.abort.percent");
    check("abort: {percent: 1, percentage: {value: 1}, reset: true}", "spec.abort");
    check("abort: {percentage: {value: 200}, reset: true}", "spec.abort.percentage.value");
    check("abort: {percent: 1, httpStatus: 99}", "spec.abort.httpStatus");
    check("abort: {percent: 1, grpcStatus: NOPE}", "spec.abort.grpcStatus");
    check("abort: {percent: 1, grpcStatus: 17}", "spec.abort.grpcStatus");
    check("delay: {percent: 1}", "spec.delay.duration");
    check("delay: {percent: 1, duration: 61m}", "spec.delay.duration");
    check("delay: {percent: 1, duration: 1us}", "spec.delay.duration");
    check(&abort("match: {headers: [{name: 'a b'}]}"), "spec.match.headers[0].name");
    check(&abort("match: {headers: [{name: a}, {name: A}]}"), "spec.match.headers[1].name");
    check(
        &abort("match: {headers: [{name: a, value: '(', type: RegularExpression}]}"),
        "spec.match.headers[0].value",
    );
    check(&abort("match: {source: {}}"), "spec.match.source");
    check(&abort("match: {source: {principals: ['*']}}"), "spec.match.source.principals[0]");
    check(&abort("match: {source: {namespaces: ['*']}}"), "spec.match.source.namespaces[0]");
}

/// A fault that is not there is a filter that is not there: Gateway API wants an error.
#[test]
fn a_fault_that_is_not_there() {
    for spec in [
        "abort: {percent: all}",
        "abort: {percent: 1, reset: true}, untill: '2030-01-01T00:00:00Z'",
    ] {
        let (compiled, found) = run(spec);
        let [Filter::Fail { reason, message }] = &rule(&compiled).filters[..] else {
            panic!("{spec}")
        };
        assert_eq!((*reason, &**message), (Reason::BadFilter, "there is no HTTPFault shop/f"));
        assert!(found.iter().any(|d| d.object.contains("HTTPFault")), "{found:?}");
    }
}

proptest! {
    #[test]
    fn shares_are_near_what_is_written(value in 0.0_f64..=100.0) {
        let Share { numerator, denominator } = share(value).unwrap();
        prop_assert!(numerator <= denominator);
        let back = f64::from(numerator) / f64::from(denominator) * 100.0;
        prop_assert!((back - value).abs() < 0.000_1, "{value} {back}");
    }

    #[test]
    fn any_time_is_survived(text in "[-0-9TZ:+. ]{0,40}") {
        let _ = until(&text);
    }
}

#[test]
fn no_share() {
    for bad in [f64::NAN, f64::INFINITY, -0.1, 100.1] {
        assert!(share(bad).is_err(), "{bad}");
    }
}
