//! No field is neither honoured nor diagnosed, and what the table says is what happens.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::json;

use super::*;
use crate::istio::destination_rule as dr;
use crate::istio::virtual_service as vs;
use crate::parse_file;

const UNIVERSE: &str = include_str!("universe.txt");
/// Where the tests of honoured fields stand.
const TESTS: [&str; 4] = [
    include_str!("../../http/virtual_service/tests.rs"),
    include_str!("../../http/virtual_service/tests/matches.rs"),
    include_str!("../../http/virtual_service/tests/actions.rs"),
    include_str!("../../http/destination_rule/tests.rs"),
];

fn universe() -> BTreeSet<&'static str> {
    UNIVERSE.lines().filter(|l| !l.starts_with('#') && !l.is_empty()).collect()
}

fn all() -> impl Iterator<Item = (&'static Message, &'static Field)> {
    MESSAGES.into_iter().flatten().flat_map(|m| m.fields.iter().map(move |f| (m, f)))
}

#[test]
fn every_field_of_istio_has_a_row() {
    let rows: Vec<String> = all().map(|(m, f)| format!("{}.{}", m.name, f.name)).collect();
    let mut seen = BTreeSet::new();
    for row in &rows {
        assert!(seen.insert(row.as_str()), "{row} has two rows");
    }
    let neither: Vec<_> = universe().into_iter().filter(|f| !seen.contains(f)).collect();
    assert!(neither.is_empty(), "neither honoured nor diagnosed: {neither:?}");
    let invented: Vec<_> = seen.difference(&universe()).copied().collect();
    assert!(invented.is_empty(), "Istio has no such fields: {invented:?}");
}

#[test]
fn every_honoured_field_has_its_test() {
    for (message, field) in all() {
        if let Does::Honoured { test } = field.does {
            let there = TESTS.iter().any(|t| t.contains(&format!("\nfn {test}() {{")));
            assert!(there, "{}.{}: there is no test {test}", message.name, field.name);
        }
    }
}

/// The types read exactly the fields of the table.
#[test]
fn the_types_are_the_table() {
    fn check<T: Default + serde::Serialize>(message: &str) {
        let Json::Object(value) = serde_json::to_value(T::default()).unwrap() else {
            panic!("{message} is no object");
        };
        let typed: BTreeSet<&str> = value.keys().map(String::as_str).collect();
        let table: BTreeSet<&str> = find(message).unwrap().fields.iter().map(|f| f.name).collect();
        assert_eq!(typed, table, "{message}");
    }
    check::<vs::VirtualServiceSpec>("VirtualService");
    check::<vs::HttpRule>("HTTPRoute");
    check::<vs::HttpMatch>("HTTPMatchRequest");
    check::<vs::StringMatch>("StringMatch");
    check::<vs::RouteDestination>("HTTPRouteDestination");
    check::<vs::Destination>("Destination");
    check::<vs::PortSelector>("PortSelector");
    check::<vs::HttpRedirect>("HTTPRedirect");
    check::<vs::DirectResponse>("HTTPDirectResponse");
    check::<vs::HttpBody>("HTTPBody");
    check::<vs::HttpRewrite>("HTTPRewrite");
    check::<vs::RegexRewrite>("RegexRewrite");
    check::<vs::HttpFaultInjection>("HTTPFaultInjection");
    check::<vs::Delay>("HTTPFaultInjection.Delay");
    check::<vs::Abort>("HTTPFaultInjection.Abort");
    check::<vs::Percent>("Percent");
    check::<vs::MirrorPolicy>("HTTPMirrorPolicy");
    check::<vs::CorsPolicy>("CorsPolicy");
    check::<vs::Headers>("Headers");
    check::<vs::HeaderOperations>("Headers.HeaderOperations");
    check::<dr::DestinationRuleSpec>("DestinationRule");
    check::<dr::Subset>("Subset");
}

/// A value that is not the default.
fn sample(field: &Field) -> Json {
    let one = match field.element {
        Element::Text => json!("x"),
        Element::Bool => json!(true),
        Element::Integer | Element::Number => json!(1),
        Element::OneOf(values) => {
            let Does::Diagnosed { unless, .. } = field.does else { return json!(values[0]) };
            json!(values.iter().find(|v| !unless.contains(v)).unwrap())
        }
        Element::Any => json!({"number": 1}),
        // Of those that are diagnosed as a whole, a port is the only one that is typed.
        Element::Message(_) if matches!(field.does, Does::Diagnosed { .. }) => json!({"number": 1}),
        Element::Message(_) => json!({}),
    };
    match field.arity {
        Arity::One => one,
        Arity::List => json!([one]),
        Arity::Map => json!({"x": one}),
    }
}

/// How to get from a root to each message: the value around a hole, and the path to it.
fn ways() -> BTreeMap<&'static str, (&'static str, Vec<&'static Field>)> {
    let mut ways = BTreeMap::new();
    for messages in MESSAGES {
        let root = messages[0].name;
        ways.insert(root, (root, Vec::new()));
        let mut queue = vec![root];
        while let Some(name) = queue.pop() {
            let (_, way) = ways[name].clone();
            for field in find(name).unwrap().fields {
                let Element::Message(inner) = field.element else { continue };
                if !ways.contains_key(inner) && !matches!(field.does, Does::Diagnosed { .. }) {
                    let way = way.iter().copied().chain([field]).collect();
                    ways.insert(inner, (root, way));
                    queue.push(inner);
                }
            }
        }
    }
    ways
}

/// Every row is reached from an object's text, and what is to be said is said, by its code and at its place.
#[test]
fn every_row_is_what_happens() {
    let ways = ways();
    for (message, field) in all() {
        let (root, way) =
            ways.get(message.name).unwrap_or_else(|| panic!("no way to {}", message.name));
        let mut spec = json!({field.name: sample(field)});
        let mut at = field.name.to_owned();
        for outer in way.iter().rev() {
            let (value, key) = match outer.arity {
                Arity::One => (spec, ""),
                Arity::List => (json!([spec]), "[0]"),
                Arity::Map => (json!({"x": spec}), ".x"),
            };
            spec = json!({outer.name: value});
            at = format!("{}{key}.{at}", outer.name);
        }
        let at = format!("spec.{at}");
        let mut found = Vec::new();
        walk(root, &spec, &mut |field, finding| match finding {
            Finding::Diagnosed { code, .. } => found.push((field, Some(code))),
            Finding::Unknown | Finding::WrongType(_) => found.push((field, None)),
        });
        let want = match field.does {
            Does::Diagnosed { code, .. } => vec![(at.clone(), Some(code))],
            Does::Honoured { .. } | Does::Inside => Vec::new(),
        };
        // What stands inside a message is not the row at hand.
        found.retain(|(field, _)| {
            !field.starts_with(&format!("{at}.")) && !field.starts_with(&format!("{at}["))
        });
        assert_eq!(found, want, "{at}");
        // The reader says the same.
        let text = json!({"apiVersion": "networking.istio.io/v1", "kind": root, "metadata": {"name": "x"}, "spec": spec});
        let parsed = parse_file("f.yaml", &text.to_string());
        if let [(field, Some(code))] = &want[..] {
            let said = parsed.diagnostics.iter().any(|d| d.field == *field && d.code == *code);
            assert!(said, "{at}: {:?}", parsed.diagnostics);
        }
        let unknown = parsed.diagnostics.iter().find(|d| d.code == Code::UnknownField);
        assert_eq!(unknown, None, "{at}");
    }
}

#[test]
fn what_is_no_field_and_what_is_no_value() {
    let check = |spec: Json, want: &[&str]| {
        let mut found = Vec::new();
        walk("DestinationRule", &spec, &mut |field, finding| {
            let what = match finding {
                Finding::Unknown => "unknown",
                Finding::WrongType(_) => "type",
                Finding::Diagnosed { code, .. } => code.as_str(),
            };
            found.push(format!("{what} {field}"));
        });
        assert_eq!(found, want, "{spec}");
    };
    check(json!({"trafficPolicy": {"tls": {"mood": 1}}}), &["unknown spec.trafficPolicy.tls.mood"]);
    check(json!({"trafficPolicy": 1}), &["type spec.trafficPolicy"]);
    check(json!({"trafficPolicy": {"portLevelSettings": {}}}), &[]);
    check(
        json!({"trafficPolicy": {"portLevelSettings": "x"}}),
        &["type spec.trafficPolicy.portLevelSettings"],
    );
    check(json!({"trafficPolicy": {"tls": {"mode": "ISTIO_MUTUAL"}}}), &[]);
    check(
        json!({"trafficPolicy": {"tls": {"mode": "NONE"}}}),
        &["unsupported spec.trafficPolicy.tls.mode", "type spec.trafficPolicy.tls.mode"],
    );
    check(json!({"exportTo": ["*"]}), &[]);
    check(json!({"exportTo": ["."]}), &["no_effect spec.exportTo"]);
    check(json!([]), &["type spec"]);
}
