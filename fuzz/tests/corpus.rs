//! The committed corpora, replayed without a fuzzer. `AMBIT_WRITE_SEEDS=1 cargo test` in this folder writes the seeds.

use std::fs;
use std::path::{Path, PathBuf};

use ambit_fuzz::TARGETS;
use prost::Message;
use rcgen::{CertificateParams, DnType, KeyPair, PKCS_ECDSA_P256_SHA256, PKCS_ED25519, SanType};

fn folder(target: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus").join(target)
}

#[test]
fn nothing_in_the_corpora_fails() {
    if std::env::var_os("AMBIT_WRITE_SEEDS").is_some() {
        write_seeds();
    }
    for (name, target) in TARGETS {
        let files = fs::read_dir(folder(name)).unwrap_or_else(|e| panic!("corpus of {name}: {e}"));
        let mut count = 0;
        for file in files {
            target(&fs::read(file.unwrap().path()).unwrap());
            count += 1;
        }
        assert!(count > 0, "{name} has no corpus");
    }
}

fn write_seeds() {
    for (name, _) in TARGETS {
        let _ = fs::create_dir_all(folder(name));
    }
    peer();
    discovery();
    configuration();
    names();
    requests();
    rules();
    sniff();
}

/// Questions by hand, and answers.
fn names() {
    let question = |name: &str, kind: u8| {
        let mut packet = b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00".to_vec();
        for label in name.split('.') {
            packet.push(u8::try_from(label.len()).unwrap());
            packet.extend(label.as_bytes());
        }
        packet.extend([0, 0, kind, 0, 1]);
        packet
    };
    let both = |count: u8, packet: &[u8], reply: &[u8]| {
        let length = u16::try_from(packet.len()).unwrap().to_be_bytes();
        [&[count][..], &length, packet, reply].concat()
    };
    let a = question("web.shop.svc.cluster.local", 1);
    let mut answer = a.clone();
    answer[2] |= 0x80;
    seed("dns", "a", both(3, &a, &answer));
    seed("dns", "many", both(200, &question("web", 28), &[]));
    seed("dns", "txt", both(1, &question("_x.example", 16), &answer));
    // EDNS: 1232 bytes by UDP.
    let mut edns = question("web.shop", 28);
    edns[11] = 1;
    edns.extend(b"\x00\x00\x29\x04\xd0\x00\x00\x00\x00\x00\x00");
    seed("dns", "edns", both(60, &edns, &answer));
}

/// Requests of both versions that every route of the target's world takes.
fn requests() {
    for (name, lines) in [
        ("plain", "1 GET /a/b/../b/c?q=1\nhost: Web:80\nx-one: a\nx-one: b"),
        (
            "absolute",
            "1 POST http://web/x/y/%7Ez\ntransfer-encoding: chunked\nconnection: x-two, close\nx-two: 1",
        ),
        (
            "http2",
            "2 POST http://web/shop.Cart/Say\ncontent-type: application/grpc\nte: trailers\ncookie: a=1\ncookie: b=2",
        ),
        ("upgrade", "1 GET /test\nhost: [fd00::1]:8080\nconnection: upgrade\nupgrade: websocket"),
        ("length", "0 PUT /exact\nhost: web\ncontent-length: 5\nx-ambit-reason: x"),
        ("query", "1 OPTIONS /?q=a+b&q=%63\nhost: web\norigin: https://a.com"),
        ("asterisk", "1 OPTIONS *\nhost: web"),
    ] {
        seed("request", name, lines);
    }
}

/// Routes of each kind, in lines.
fn rules() {
    let parent = "parentRefs: [{group: '', kind: Service, name: web}]";
    let to = "backendRefs: [{name: web, port: 80, weight: 90}, {name: b, port: 80, weight: 10}]";
    let http = format!("h {{{parent}, rules: [{{{to}}}]}}");
    let matches = "matches: [{path: {type: RegularExpression, value: '/a/[^/]+/.*'}, method: GET, headers: [{name: x-canary, value: 'true'}], queryParams: [{name: q, value: '1'}]}, {path: {type: Exact, value: /v1}}]";
    let filters = "filters: [{type: RequestHeaderModifier, requestHeaderModifier: {set: [{name: a, value: b}], add: [{name: c, value: d}], remove: [e]}}, {type: URLRewrite, urlRewrite: {hostname: new.example, path: {type: ReplacePrefixMatch, replacePrefixMatch: /x}}}, {type: RequestMirror, requestMirror: {backendRef: {name: b, port: 80}, percent: 50}}]";
    let redirect = "filters: [{type: RequestRedirect, requestRedirect: {scheme: https, hostname: a.example, port: 8443, statusCode: 301, path: {type: ReplaceFullPath, replaceFullPath: /y}}}]";
    let cors = "filters: [{type: CORS, cors: {allowOrigins: ['https://a.example'], allowMethods: [GET], allowHeaders: [x], maxAge: 9}}]";
    let grpc = format!(
        "g {{{parent}, rules: [{{matches: [{{method: {{service: shop.Cart, method: Say}}}}], {to}}}]}}"
    );
    let fault = "f {delay: {percent: 50, duration: 2s}, abort: {percentage: {value: 0.5}, httpStatus: 503}, match: {headers: [{name: x-canary, value: a.*, type: RegularExpression}], source: {namespaces: [team]}}, until: '2030-01-01T00:00:00Z'}";
    let extension = format!(
        "h {{{parent}, rules: [{{filters: [{{type: ExtensionRef, extensionRef: {{group: ambit.io, kind: HTTPFault, name: o1}}}}], {to}, timeouts: {{request: 10s, backendRequest: 2s}}}}]}}\n{fault}"
    );
    let istio = "v {hosts: [web], http: [{name: canary, match: [{uri: {prefix: /a}, headers: {x-canary: {exact: 'true'}}, queryParams: {q: {regex: '[0-9]+'}}}], rewrite: {uriRegexRewrite: {match: '^/a/(.*)$', rewrite: '/\\1'}}, route: [{destination: {host: web, subset: v2}, headers: {response: {set: {x: y}}}}], timeout: 5s, fault: {abort: {grpcStatus: UNAVAILABLE, percentage: {value: 1}}}, mirror: {host: b}, corsPolicy: {allowOrigins: [{regex: 'https://.*'}]}}, {route: [{destination: {host: web, subset: v1}, weight: 90}, {destination: {host: web, subset: v2}, weight: 10}]}, {redirect: {uri: /z, authority: b.example, redirectCode: 302}}]}";
    let subsets = "d {host: web, subsets: [{name: v1, labels: {version: v1}}, {name: v2, labels: {version: v2}}]}";
    seed("rules", "http", &http);
    seed(
        "rules",
        "matches",
        http.replace("rules: [{", &format!("rules: [{{{matches}, {filters}, ")),
    );
    seed("rules", "redirect", format!("h {{{parent}, rules: [{{{redirect}}}, {{{cors}, {to}}}]}}"));
    seed("rules", "grpc", &grpc);
    seed("rules", "fault", extension);
    seed("rules", "istio", format!("{istio}\n{subsets}"));
    seed("rules", "all", format!("{http}\n{grpc}\n{istio}\n{subsets}\n{fault}"));
    let foreign = "h {parentRefs: [{group: '', kind: Service, name: other, namespace: team, port: 80}], rules: [{backendRefs: [{name: other, namespace: team, port: 80}]}]}";
    seed("rules", "consumer", foreign);
}

/// What clients and servers say first.
fn sniff() {
    for (name, bytes) in [
        ("http1", &b"GET /a HTTP/1.1\r\nhost: a\r\n\r\n"[..]),
        ("old", b"\r\nGET /a\r\n"),
        ("http2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x12\x04\0\0\0\0\0"),
        ("settings", b"\0\0\x12\x04\0\0\0\0\0\0\x03\0\0\0d"),
        ("status", b"HTTP/1.1 408 Request Timeout\r\n"),
        ("tls", b"\x16\x03\x01\x02\0\x01"),
        ("smtp", b"220 mail.example ESMTP\r\nEHLO a\r\n"),
        ("redis", b"*1\r\n$4\r\nPING\r\n"),
    ] {
        seed("sniff", name, bytes);
    }
}

fn seed(target: &str, name: &str, bytes: impl AsRef<[u8]>) {
    fs::write(folder(target).join(format!("seed-{name}")), bytes).unwrap();
}

fn peer() {
    let rest = "for=10.0.0.1;host=web.shop.svc.cluster.local\nk8s.namespace.name=shop,service.name=web\n\
                00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00";
    seed("headers", "v4", format!("10.0.0.1:8080\n{rest}"));
    seed(
        "headers",
        "v6",
        format!("[fd00:10::1]:8080\nhost=\"web.shop\"; for=x\n\n{}", "0".repeat(55)),
    );
    seed("headers", "host", format!("web.shop.svc.cluster.local:80\n{rest}"));
    let name = "spiffe://cluster.local/ns/shop/sa/web";
    seed("headers", "claim", format!("10.0.0.1:8080\n{rest}\n{name}"));
    seed("headers", "claims", format!("10.0.0.1:8080\n{rest}\n{name}\n{name}"));
    seed("identity", "uri", name);
    for (kind, algorithm) in [("p256", &PKCS_ECDSA_P256_SHA256), ("ed25519", &PKCS_ED25519)] {
        let key = KeyPair::generate_for(algorithm).unwrap();
        let mut params = CertificateParams::new(vec!["web.shop".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, "web");
        params.subject_alt_names.push(SanType::URI(name.try_into().unwrap()));
        seed("identity", kind, params.self_signed(&key).unwrap().der());
        let request = params.serialize_request(&key).unwrap();
        seed("csr", kind, request.der());
        seed("csr", &format!("{kind}-pem"), request.pem().unwrap());
    }
}

fn discovery() {
    for (fixture, target) in [
        ("workload", "address"),
        ("service", "address"),
        ("authorization", "authorization"),
        ("routes", "routes"),
        ("subset", "routes"),
        ("zds_add", "zds"),
    ] {
        seed(target, fixture, wire(fixture));
    }
    seed("authorization", "small", b"\x0a\x01p\x12\x01n\x18\x01\x20\x01");
    seed("routes", "small", small_routes().encode_to_vec());
    seed("zds", "del", b"\x12\x04\x12\x02u1");
    seed("zds", "keep", b"\x2a\x04\x0a\x02u1");
    seed("zds", "ack", b"\x0a\x04\x0a\x02no");
    // A line: two pods named, one kept, the end of the snapshot, one gone.
    let line: [&[u8]; 4] =
        [&wire("zds_add"), b"\x2a\x04\x0a\x02u2", b"\x1a\x00", b"\x12\x04\x12\x02u1"];
    let line = line.iter().flat_map(|m| [&[u8::try_from(m.len()).unwrap()][..], m].concat());
    seed("zds", "line", line.collect::<Vec<u8>>());
    let mut stream = Vec::new();
    for (which, fixture) in [(0, "delta_response"), (2, "delta_request"), (3, "")] {
        let message = if fixture.is_empty() { Vec::new() } else { wire(fixture) };
        stream.push(which);
        stream.extend(u16::try_from(message.len()).unwrap().to_be_bytes());
        stream.extend(message);
    }
    seed("delta", "stream", stream);
    seed(
        "delta",
        "workload",
        message(&response(b"east//Pod/shop/web-7d9f", &wire("workload"), None)),
    );
    // Something small that comes, and goes; but that it goes is told to the server.
    let small = response(b"u", b"\x0a\x04\xa2\x01\x01u", None);
    let mut gone = message(&response(b"", b"", Some(b"u")));
    gone[0] = 2;
    seed("delta", "removal", [message(&small), gone].concat());
}

/// One rule that sends everything to one backend: a change of a byte is another valid route.
fn small_routes() -> xds::ambit::Routes {
    use xds::ambit::*;
    let service = |hostname: &str| {
        Some(ServiceName { namespace: "n".to_owned(), hostname: hostname.to_owned() })
    };
    let to = ServiceTarget { service: service("b"), port: 80, subset: Some("v".to_owned()) };
    let target = Some(Target { target: Some(target::Target::Service(to)) });
    let backends = vec![Backend { weight: 9, target, filters: Vec::new() }];
    let rule = RouteRule { route: "r".to_owned(), backends, ..RouteRule::default() };
    Routes {
        service: service("h"),
        ports: Vec::new(),
        sets: vec![RouteSet {
            audience: Some(route_set::Audience::Everybody(())),
            rules: vec![rule.encode_to_vec().into()],
            matches: vec![RouteMatch::default()],
            ..RouteSet::default()
        }],
    }
}

/// A response to the proxy, as the target reads it.
fn message(response: &[u8]) -> Vec<u8> {
    let length = u16::try_from(response.len()).unwrap();
    [&[0][..], &length.to_be_bytes(), response].concat()
}

/// A `DeltaDiscoveryResponse` with an Address resource, or with one that is gone.
fn response(name: &[u8], value: &[u8], removed: Option<&[u8]>) -> Vec<u8> {
    let (mut any, mut resource, mut out) = (Vec::new(), Vec::new(), Vec::new());
    let url = xds::Kind::Address.type_url().as_bytes();
    field(&mut any, 0x0a, url);
    field(&mut any, 0x12, value);
    field(&mut resource, 0x0a, b"1");
    field(&mut resource, 0x12, &any);
    field(&mut resource, 0x1a, name);
    if removed.is_none() {
        field(&mut out, 0x12, &resource);
    }
    field(&mut out, 0x22, url);
    field(&mut out, 0x2a, b"n");
    if let Some(removed) = removed {
        field(&mut out, 0x32, removed);
    }
    out
}

/// A length-delimited field.
fn field(out: &mut Vec<u8>, tag: u8, value: &[u8]) {
    out.push(tag);
    prost::encode_length_delimiter(value.len(), out).unwrap();
    out.extend_from_slice(value);
}

/// A fixture of `crates/xds/tests/wire`: hex, text in quotes, comments.
fn wire(name: &str) -> Vec<u8> {
    let path =
        Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../crates/xds/tests/wire/{name}.txt"));
    let mut out = Vec::new();
    for line in fs::read_to_string(path).unwrap().lines() {
        let mut rest = line.trim_start();
        while !rest.is_empty() && !rest.starts_with('#') {
            if let Some(text) = rest.strip_prefix('"') {
                let (text, after) = text.split_once('"').unwrap();
                out.extend_from_slice(text.as_bytes());
                rest = after.trim_start();
            } else {
                let (byte, after) = rest.split_once(' ').unwrap_or((rest, ""));
                out.push(u8::from_str_radix(byte, 16).unwrap());
                rest = after.trim_start();
            }
        }
    }
    out
}

fn configuration() {
    let hash = "a".repeat(64);
    seed(
        "registry",
        "two",
        format!("{{\"node\": \"node-1\", \"token_sha256\": \"{hash}\"}}\n{{\"node\":\"n\"}}\n"),
    );
    let pod = "apiVersion: v1\nkind: Pod\nmetadata: {name: web, namespace: shop, labels: {app: web}, annotations: {ambient.istio.io/redirection: enabled}}\n\
               spec: {nodeName: node-1, serviceAccountName: web, containers: [{name: main, ports: [{name: http, containerPort: 8080}]}]}\n\
               status: {phase: Running, podIP: 10.0.0.1, conditions: [{type: Ready, status: 'True'}]}\n";
    let service = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: shop}\n\
                   spec: {clusterIP: 10.96.0.1, selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]}\n";
    let policy = "apiVersion: security.istio.io/v1\nkind: AuthorizationPolicy\nmetadata: {name: p, namespace: shop}\n\
                  spec: {selector: {matchLabels: {app: web}}, action: ALLOW, rules: [{from: [{source: {principals: [\"cluster.local/ns/shop/sa/*\"], notIpBlocks: [10.0.0.0/8]}}], to: [{operation: {ports: [\"80\"], paths: [/x]}}], when: [{key: source.namespace, values: [shop]}]}]}\n";
    let mtls = "apiVersion: security.istio.io/v1\nkind: PeerAuthentication\nmetadata: {name: default, namespace: shop}\n\
                spec: {selector: {matchLabels: {app: web}}, mtls: {mode: STRICT}, portLevelMtls: {8080: {mode: PERMISSIVE}}}\n";
    let namespace = "apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, labels: {istio.io/dataplane-mode: ambient}}\n";
    seed("objects", "all", [namespace, pod, service, policy, mtls].join("---\n"));
    seed("objects", "policy", policy.replace(", paths: [/x]", ""));
    seed("objects", "http", policy);
    seed("objects", "mtls", mtls);
    seed("objects", "pod", pod);
    seed(
        "objects",
        "json",
        "{\"apiVersion\": \"v1\", \"kind\": \"Namespace\", \"metadata\": {\"name\": \"a\"}}",
    );
    seed("objects", "anchors", "a: &x [1, 2]\nb: *x\nc: |\n  text\n<<: {d: 1}\n");
}
