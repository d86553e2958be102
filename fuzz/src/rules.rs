//! What users write about routes: HTTPRoute, GRPCRoute, VirtualService, DestinationRule and HTTPFault, in a world that has what
//! they may name.

use std::fmt::Write as _;

use compile::{Compiled, Folder, MeshConfig, compile};
use engine::http::{Caller, RequestFacts, normalize, route};
use http::request::Parts;
use http::{Method, Request};
use model::http::Audience;
use model::{Change, Snapshot};
use prost::Message;
use xds::codec::{self, Interner};

use crate::{planted, request};

/// Objects that are more than this many would only be slower.
const MOST: usize = 8;

/// What routes may name: two Services with pods, a waypoint, and a namespace of consumers.
const WORLD: &str = include_str!("world.yaml");

/// A line for each object: a letter for the kind, and the spec as YAML in one line.
pub fn rules(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let mut yaml = String::new();
    for (number, line) in text.lines().take(MOST).enumerate() {
        let Some((kind, spec)) = line.split_at_checked(1) else { continue };
        let (api, kind) = match kind {
            "h" => ("gateway.networking.k8s.io/v1", "HTTPRoute"),
            "g" => ("gateway.networking.k8s.io/v1", "GRPCRoute"),
            "v" => ("networking.istio.io/v1", "VirtualService"),
            "d" => ("networking.istio.io/v1", "DestinationRule"),
            "f" => ("ambit.io/v1alpha1", "HTTPFault"),
            _ => continue,
        };
        let name = format!("{{name: o{number}, namespace: shop}}");
        let _ =
            write!(yaml, "---\napiVersion: {api}\nkind: {kind}\nmetadata: {name}\nspec: {spec}\n");
    }
    let mut folder = Folder::new();
    folder.set_file(0, "world.yaml", WORLD);
    folder.set_file(1, "fuzz.yaml", &yaml);
    let compiled = compile(&folder.objects(), &MeshConfig::default());
    for diagnostic in folder.diagnostics().iter().chain(&compiled.diagnostics) {
        assert!(!diagnostic.origin.is_empty(), "where? {diagnostic}");
        assert!(diagnostic.to_string().len() < 64 << 10, "a file must not fill the log");
    }
    can_be_read(&compiled);
    planted::rules(&compiled.routes);
    answer_requests(&compiled);
}

/// Our own proxies can.
fn can_be_read(compiled: &Compiled) {
    let interner = &mut Interner::default();
    for r in &compiled.routes {
        let wire = codec::encode_routes(r).encode_to_vec();
        let got = codec::decode_routes(&codec::routes_name(r), &wire, interner);
        assert_eq!(got.as_ref(), Ok(&**r));
    }
    for s in &compiled.subsets {
        let wire = codec::encode_subset(s).encode_to_vec();
        let got = codec::decode_subset(&codec::subset_name(s), &wire, interner);
        assert_eq!(got.as_ref(), Ok(&**s));
    }
}

/// Every rule answers, or sends on what has one form.
fn answer_requests(compiled: &Compiled) {
    let services = compiled.services.iter().cloned().map(Change::SetService);
    let routes = compiled.routes.iter().cloned().map(Change::SetRoutes);
    let subsets = compiled.subsets.iter().cloned().map(Change::SetSubset);
    let snapshot = Snapshot::default().with(services.chain(routes).chain(subsets));
    let requests: Vec<Parts> = REQUESTS.iter().map(|lines| plain(lines)).collect();
    for routes in &compiled.routes {
        let Some(service) = snapshot.service(&routes.service) else { continue };
        let consumer = routes.sets.iter().any(|set| set.audience != Audience::Everybody);
        for (port, parts) in service.ports.iter().flat_map(|p| requests.iter().map(move |r| (p, r)))
        {
            let identity = model::Identity::new("cluster.local", "team", "client");
            let caller = Caller { identity: consumer.then_some(&identity) };
            let facts =
                RequestFacts { service, port: port.service_port, caller, request: parts, now: 0 };
            request::planned(&route(&snapshot, &facts, 7), parts, request::Routes::AnyUsers);
        }
    }
}

const REQUESTS: [(&str, &str); 5] = [
    ("GET", "/a/b/c?q=1&r=a+b"),
    ("POST", "/shop.Cart/Say"),
    ("OPTIONS", "/"),
    ("OPTIONS", "*"),
    ("DELETE", "/v1/%20x/1234567890"),
];

fn plain((method, target): &(&str, &str)) -> Parts {
    let request = Request::builder()
        .method(Method::from_bytes(method.as_bytes()).expect("a method"))
        .uri(*target)
        .header("host", "web.shop")
        .header("origin", "https://a.example")
        .header("x-canary", "true")
        .header("cookie", "a=1; user=me");
    let mut parts = request.body(()).expect("a request").into_parts().0;
    normalize(&mut parts).expect("a request that can be sent");
    parts
}
