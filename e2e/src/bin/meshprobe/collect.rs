//! A trace collector for inside a lab, made of the official protobufs: one JSON object for each span it takes.

use std::net::SocketAddr;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use e2e::collector::{Collector, Received};
use serde_json::{Map, Value, json};

/// Between two looks for new spans; proxies send them once a second.
const LOOK: Duration = Duration::from_millis(50);

pub(crate) fn run(listen: SocketAddr) -> Result<()> {
    let collector = Collector::start(listen)?;
    crate::say(&json!({ "event": "ready" }))?;
    let mut shown = 0;
    loop {
        let spans = collector.spans();
        for span in &spans[shown..] {
            crate::say(&shape(span))?;
        }
        shown = spans.len();
        thread::sleep(LOOK);
    }
}

fn shape(received: &Received) -> Value {
    let span = &received.span;
    let attributes: Map<String, Value> =
        span.attributes.iter().map(|a| (a.key.clone(), received.get(&a.key).into())).collect();
    let links: Vec<String> = span.links.iter().map(|l| hex(&l.span_id)).collect();
    json!({
        "event": "span",
        "service": received.of("service.name"),
        "name": span.name,
        "trace": hex(&span.trace_id),
        "span": hex(&span.span_id),
        "parent": hex(&span.parent_span_id),
        "links": links,
        "attributes": attributes,
    })
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}
