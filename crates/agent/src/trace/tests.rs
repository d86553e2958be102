//! The header, the sampler, the settings; and that nobody waits. The messages are read by an official receiver in `e2e`.

use super::*;

const HEADER: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

#[test]
fn trace_contexts() {
    let context = SpanContext::parse(HEADER.as_bytes()).unwrap();
    assert_eq!(context.to_string(), HEADER);
    assert!(context.sampled && context.trace_id[0] == 0x4b && context.span_id[7] == 0xb7);
    let unsampled = SpanContext::parse(HEADER.replace("-01", "-00").as_bytes()).unwrap();
    assert!(!unsampled.sampled);
    let check = |header: &str, want: bool| {
        assert_eq!(SpanContext::parse(header.as_bytes()).is_some(), want, "{header}");
    };
    check(&HEADER.replace("-01", "-ff"), true);
    check(&HEADER.replacen("00-", "01-", 1), true);
    check(&format!("{}-more", HEADER.replacen("00-", "cc-", 1)), true);
    check(&format!("{HEADER}-more"), false);
    check(&HEADER.replacen("00-", "ff-", 1), false);
    check(&HEADER.replacen("00-", "01-", 1).replace("-01", "-01x"), false);
    check(&HEADER.to_uppercase(), false);
    check(&HEADER.replace('-', "_"), false);
    check(&HEADER.replace("4bf92f3577b34da6a3ce929d0e0e4736", &"0".repeat(32)), false);
    check(&HEADER.replace("00f067aa0ba902b7", &"0".repeat(16)), false);
    for length in 0..HEADER.len() {
        check(&HEADER[..length], false);
    }
    check(&"0".repeat(55), false);
    check(&format!("{}\u{e9}", &HEADER[..53]), false);
}

#[test]
fn settings_are_opentelemetrys() {
    let on = TraceText { endpoint: "http://127.0.0.1:4317/".to_owned(), ..TraceText::default() };
    assert!(TraceText::default().settings().unwrap().is_none());
    let settings = on.settings().unwrap().unwrap();
    assert_eq!(settings.endpoint, "http://127.0.0.1:4317");
    let text = TraceText {
        headers: "x-key=a%20b, other=1".to_owned(),
        resource: "service.name=x,team=mesh".to_owned(),
        service_name: "ztunnel".to_owned(),
        ..on.clone()
    };
    let settings = text.settings().unwrap().unwrap();
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(settings.resource, [pair("team", "mesh"), pair("service.name", "ztunnel")]);
    assert_eq!(settings.headers[0].1.to_str().unwrap(), "a b");
    assert!(!format!("{settings:?}").contains("a b"), "headers may be credentials");
    let check = |change: fn(&mut TraceText), name: &str| {
        let mut text = on.clone();
        change(&mut text);
        let error = text.settings().unwrap_err();
        assert!(error.starts_with(name), "{error}");
    };
    check(|t| t.endpoint = "collector:4317".to_owned(), "OTEL_EXPORTER_OTLP_ENDPOINT");
    check(|t| t.endpoint = "http://collector".to_owned(), "OTEL_EXPORTER_OTLP_ENDPOINT");
    check(|t| t.endpoint = "https://collector:4317".to_owned(), "OTEL_EXPORTER_OTLP_CERTIFICATE");
    check(|t| t.protocol = "http/protobuf".to_owned(), "OTEL_EXPORTER_OTLP_PROTOCOL");
    check(|t| t.headers = "x".to_owned(), "OTEL_EXPORTER_OTLP_HEADERS");
    check(|t| t.headers = "a b=x".to_owned(), "OTEL_EXPORTER_OTLP_HEADERS");
    check(|t| t.resource = "=x".to_owned(), "OTEL_RESOURCE_ATTRIBUTES");
    check(|t| t.sampler = "sometimes".to_owned(), "OTEL_TRACES_SAMPLER");
    check(
        |t| (t.sampler, t.sampler_arg) = ("traceidratio".to_owned(), "2".to_owned()),
        "OTEL_TRACES_SAMPLER_ARG",
    );
}

fn sampler(name: &str, arg: &str) -> Sampler {
    let text = TraceText {
        endpoint: "http://[::1]:4317".to_owned(),
        sampler: name.to_owned(),
        sampler_arg: arg.to_owned(),
        ..TraceText::default()
    };
    text.settings().unwrap().unwrap().sampler
}

#[test]
fn samplers() {
    let (low, high) = ([0; 16], [0xff; 16]);
    let check = |name, arg, parent, want: [bool; 2]| {
        let sampler = sampler(name, arg);
        let got = [&low, &high].map(|id| sampler.decide(parent, id));
        assert_eq!(got, want, "{name} {arg} {parent:?}");
    };
    check("", "", None, [true, true]);
    check("", "", Some(false), [false, false]);
    check("always_on", "", Some(false), [true, true]);
    check("always_off", "", Some(true), [false, false]);
    check("parentbased_always_off", "", None, [false, false]);
    check("parentbased_always_off", "", Some(true), [true, true]);
    check("traceidratio", "0.5", Some(true), [true, false]);
    check("parentbased_traceidratio", "0.5", None, [true, false]);
    check("traceidratio", "0", None, [false, false]);
    check("traceidratio", "1", None, [true, true]);
}

#[tokio::test(start_paused = true)]
async fn a_collector_that_is_away_costs_spans_and_nothing_else() {
    assert!(Tracer::off().begin(None).is_none());
    let counts = Arc::new(SpanCounts::default());
    let text = TraceText { endpoint: "http://127.0.0.1:1".to_owned(), ..TraceText::default() };
    let settings = text.settings().unwrap();
    let (stop, stopped) = watch::channel(false);
    let tracer = Tracer::start(settings, counts.clone(), stopped);
    let parent = SpanContext::parse(HEADER.as_bytes());
    let position = tracer.begin(parent).unwrap();
    assert_eq!(position.context.trace_id, parent.unwrap().trace_id);
    assert_ne!(position.context.span_id, parent.unwrap().span_id);
    assert_eq!(position.parent, Some(parent.unwrap().span_id));
    let now = SystemTime::now();
    let span = Span {
        name: "x",
        kind: SpanKind::Client,
        context: position.context,
        parent: position.parent,
        link: None,
        start: now,
        end: now,
        attributes: vec![("a", Value::Number(1))],
        error: None,
    };
    for _ in 0..QUEUE + 10 {
        tracer.end(span.clone());
    }
    assert_eq!(counts.dropped()[0], ("queue", 10));
    let given_up = async {
        while counts.dropped()[1].1 == 0 {
            tokio::time::sleep(std::time::Duration::from_secs(1)).await;
        }
    };
    // Of the paused clock: a test that fails must end.
    tokio::time::timeout(std::time::Duration::from_secs(600), given_up).await.unwrap();
    stop.send_replace(true);
    tracer.ended().await;
    assert_eq!(counts.exported(), 0);
}
