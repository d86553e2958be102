//! The lines, and that a stalled reader costs lines and not traffic.

use std::sync::mpsc;

use super::*;

/// An output that hands over what is written, and waits while the gate is closed.
struct Gate {
    lines: mpsc::Sender<Vec<u8>>,
    open: Arc<(Mutex<bool>, Condvar)>,
    broken: bool,
}

impl Write for Gate {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if self.broken {
            return Err(std::io::ErrorKind::BrokenPipe.into());
        }
        let (open, changed) = &*self.open;
        let guard = open.lock().unwrap_or_else(PoisonError::into_inner);
        drop(changed.wait_while(guard, |open| !*open));
        // The test may have seen enough already.
        let _ = self.lines.send(bytes.to_vec());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

struct Output {
    lines: mpsc::Receiver<Vec<u8>>,
    open: Arc<(Mutex<bool>, Condvar)>,
}

impl Output {
    fn set_open(&self, open: bool) {
        *self.open.0.lock().unwrap() = open;
        self.open.1.notify_all();
    }

    fn text(&self) -> String {
        let bytes: Vec<u8> = self.lines.try_iter().flatten().collect();
        String::from_utf8(bytes).unwrap()
    }
}

fn start(format: Format, open: bool, broken: bool) -> (AccessLog, Output, Arc<AtomicU64>) {
    let (sender, lines) = mpsc::channel();
    let open = Arc::new((Mutex::new(open), Condvar::new()));
    let dropped = Arc::new(AtomicU64::new(0));
    let gate = Gate { lines: sender, open: open.clone(), broken };
    let log = AccessLog::start(format, gate, dropped.clone()).unwrap();
    (log, Output { lines, open }, dropped)
}

const PATIENCE: Duration = Duration::from_secs(30);

fn workload(name: &str) -> Workload {
    Workload::named(format!("Kubernetes//Pod/shop/{name}"), "shop", name)
}

fn record<'a>(source: Party<'a>, destination: Party<'a>) -> ConnectionRecord<'a> {
    ConnectionRecord {
        start: SystemTime::UNIX_EPOCH + Duration::from_secs(1_787_389_503),
        duration: Duration::from_micros(12_345),
        direction: Direction::Outbound,
        source,
        destination,
        hbone_address: None,
        same_node: false,
        client: None,
        waypoint: false,
        service: None,
        from_client: 84,
        from_server: 1_735,
        outcome: Outcome::Complete,
        policy: None,
        rule: None,
        config: ConfigVersion { epoch: 0xab, number: 3 },
    }
}

fn lines(format: Format, records: &[ConnectionRecord<'_>]) -> String {
    let (log, output, _) = start(format, true, false);
    for r in records {
        log.log(r);
    }
    assert!(log.flush(PATIENCE));
    output.text()
}

#[test]
fn both_forms() {
    let (client, web) = (workload("client"), workload("web"));
    let (a, b) = (client.identity(), web.identity());
    let service =
        ServiceKey { namespace: "shop".into(), hostname: "web.shop.svc.cluster.local".into() };
    let policy = PolicyKey { namespace: "shop".into(), name: "allow".into() };
    let rule = Provenance {
        object: "AuthorizationPolicy/shop/allow".into(),
        field: "spec.rules[0]".into(),
        origin: "shop.yaml:12".into(),
    };
    let source = Party {
        address: Some("10.1.0.1:4000".parse().unwrap()),
        workload: Some(&client),
        identity: Some(&a),
    };
    let to = Party {
        address: Some("10.1.0.2:15008".parse().unwrap()),
        workload: Some(&web),
        identity: Some(&b),
    };
    let complete = ConnectionRecord {
        hbone_address: Some("10.1.0.2:8080".parse().unwrap()),
        service: Some(&service),
        policy: Some(&policy),
        rule: Some(&rule),
        ..record(source, to)
    };
    let refused = ConnectionRecord {
        direction: Direction::Inbound,
        outcome: Outcome::Failed { reason: Reason::PolicyDeny, message: "no \"way\"\nin" },
        ..record(Party { address: source.address, ..Party::default() }, Party::default())
    };
    assert_eq!(
        lines(Format::Text, &[complete, refused]),
        "2026-08-22T09:05:03.012345Z\tinfo\taccess\tconnection complete\tsrc.addr=10.1.0.1:4000 \
         src.workload=\"client\" src.namespace=\"shop\" src.identity=\"spiffe://cluster.local/ns/shop/sa/default\" \
         src.cluster=\"Kubernetes\" dst.addr=10.1.0.2:15008 dst.hbone_addr=10.1.0.2:8080 \
         dst.service=\"web.shop.svc.cluster.local\" dst.workload=\"web\" dst.namespace=\"shop\" \
         dst.identity=\"spiffe://cluster.local/ns/shop/sa/default\" dst.cluster=\"Kubernetes\" \
         direction=\"outbound\" bytes_sent=84 bytes_recv=1735 duration=\"12ms\" policy=\"shop/allow\" \
         rule=\"AuthorizationPolicy/shop/allow spec.rules[0] (shop.yaml:12)\" config=\"ab.3\"\n\
         2026-08-22T09:05:03.012345Z\terror\taccess\tconnection failed\tsrc.addr=10.1.0.1:4000 \
         direction=\"inbound\" bytes_sent=1735 bytes_recv=84 duration=\"12ms\" reason=\"policy_deny\" \
         error=\"no \\\"way\\\"\\u000ain\" config=\"ab.3\"\n"
    );
    let json = lines(Format::Json, &[complete, refused]);
    let parsed: Vec<serde_json::Value> =
        json.lines().map(|l| serde_json::from_str(l).unwrap()).collect();
    assert_eq!(
        parsed[0],
        serde_json::json!({
            "level": "info", "time": "2026-08-22T09:05:03.012345Z", "scope": "access",
            "message": "connection complete", "src.addr": "10.1.0.1:4000", "src.workload": "client",
            "src.namespace": "shop", "src.identity": "spiffe://cluster.local/ns/shop/sa/default",
            "src.cluster": "Kubernetes", "dst.addr": "10.1.0.2:15008", "dst.hbone_addr": "10.1.0.2:8080",
            "dst.service": "web.shop.svc.cluster.local", "dst.workload": "web", "dst.namespace": "shop",
            "dst.identity": "spiffe://cluster.local/ns/shop/sa/default", "dst.cluster": "Kubernetes",
            "direction": "outbound", "bytes_sent": 84, "bytes_recv": 1735, "duration": "12ms",
            "policy": "shop/allow", "rule": "AuthorizationPolicy/shop/allow spec.rules[0] (shop.yaml:12)",
            "config": "ab.3",
        })
    );
    assert_eq!(parsed[1]["reason"], "policy_deny");
    assert_eq!(parsed[1]["error"], "no \"way\"\nin");
    assert_eq!(parsed.len(), 2);
}

/// Both nodes' lines of a connection with a waypoint between: where it went, and for whom.
#[test]
fn a_waypoint_has_its_words() {
    let (client, waypoint) = (workload("client"), workload("waypoint"));
    let (a, b) = (client.identity(), waypoint.identity());
    let party = |workload, identity| Party { address: None, workload, identity };
    let to = ConnectionRecord {
        waypoint: true,
        ..record(Party::default(), party(Some(&waypoint), None))
    };
    let from = ConnectionRecord {
        direction: Direction::Inbound,
        client: Some(&a),
        ..record(party(None, Some(&b)), Party::default())
    };
    let text = lines(Format::Text, &[to, from]);
    let [to, from] = text.lines().collect::<Vec<_>>()[..] else { panic!("{text}") };
    assert!(to.contains(" direction=\"outbound\" waypoint=\"shop/waypoint\" bytes_sent="), "{to}");
    let both = "src.identity=\"spiffe://cluster.local/ns/shop/sa/default\" \
                client.identity=\"spiffe://cluster.local/ns/shop/sa/default\" direction=";
    assert!(from.contains(both) && !from.contains("waypoint="), "{from}");
}

#[test]
fn nothing_from_outside_breaks_a_line() {
    let nasty: String = ('\0'..='\u{100}').chain("\u{2028}🦀\\\"".chars()).collect();
    let long = "x".repeat(10_000);
    for message in [&*nasty, &*long] {
        let failed = ConnectionRecord {
            outcome: Outcome::Failed { reason: Reason::BadRequest, message },
            ..record(Party::default(), Party::default())
        };
        assert_eq!(lines(Format::Text, &[failed]).lines().count(), 1);
        let json = lines(Format::Json, &[failed]);
        let parsed: serde_json::Value = serde_json::from_str(&json).unwrap();
        let got = parsed["error"].as_str().unwrap();
        assert_eq!(got, message.chars().take(1_024).collect::<String>());
    }
}

#[test]
fn a_stalled_output_costs_lines_and_nothing_else() {
    let (log, output, dropped) = start(Format::Text, false, false);
    let one = record(Party::default(), Party::default());
    let total = 100_000_u64;
    // With the gate closed this returns only because nothing waits for the output.
    for _ in 0..total {
        log.log(&one);
    }
    assert!(!log.flush(Duration::from_millis(1)));
    assert!(dropped.load(Ordering::Relaxed) > 0);
    output.set_open(true);
    assert!(log.flush(PATIENCE));
    let written = output.text();
    let lost = dropped.load(Ordering::Relaxed);
    assert_eq!(written.lines().count() as u64 + lost, total, "every line is written or counted");
    assert!(written.lines().all(|l| l.ends_with("config=\"ab.3\"")), "whole lines");
    // The control: with the gate open nothing is lost.
    log.log(&one);
    assert!(log.flush(PATIENCE));
    assert_eq!((output.text().lines().count(), dropped.load(Ordering::Relaxed)), (1, lost));
}

#[test]
fn a_broken_output_is_counted() {
    let (log, _output, dropped) = start(Format::Json, true, true);
    for _ in 0..3 {
        log.log(&record(Party::default(), Party::default()));
    }
    assert!(log.flush(PATIENCE));
    assert_eq!(dropped.load(Ordering::Relaxed), 3);
}

#[test]
fn off_writes_nothing() {
    let log = AccessLog::off();
    assert!(!log.is_on());
    log.log(&record(Party::default(), Party::default()));
    assert!(log.flush(Duration::ZERO));
}
