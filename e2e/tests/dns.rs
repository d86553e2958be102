//! DNS of captured pods: names of the mesh are answered by the proxy, everything else reaches the resolver the pod asked
//! and comes back as it was, and neither the pod nor the world can make the proxy do anything else.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::suite::{self, Test};
use e2e::{Lab, Plan, programs, yaml};
use serde_json::Value;

/// The cluster's own DNS.
const CLUSTER: &str = "10.96.0.10:53";
const CLUSTER6: &str = "[fd00:10:96::a]:53";
/// Seconds by which one sees who answered: the proxy for a Service, the proxy for pods, or the cluster's DNS.
const BY_PROXY: u64 = 30;
const BY_CLUSTER: u64 = 5;
/// Enough pods for an answer that does not fit 512 bytes.
const MANY: usize = 20;
/// For answers that come at once.
const FAST: f64 = 1_000.0;

const TESTS: &[(&str, Test)] = &[
    ("names_of_every_form_for_getaddrinfo", names_of_every_form),
    ("both_families_are_answered_from_the_mesh", both_families),
    ("headless_services_and_their_pods", headless),
    ("other_types_and_names_are_forwarded", forwarded),
    ("negative_answers_are_fast", negative_answers),
    ("questions_and_answers_are_left_as_they_are", untouched),
    ("only_the_resolver_answers", wrong_answers),
    ("large_answers_are_cut_by_udp_and_whole_by_tcp", large_answers),
    ("many_questions_on_one_connection", by_tcp),
    ("a_resolver_in_the_mesh_is_asked_through_the_mesh", resolver_in_the_mesh),
    ("a_dead_resolver_is_servfail", dead_resolver),
    ("too_many_questions_are_refused_and_others_go_on", flood),
    ("the_listener_is_for_captured_questions_only", around_the_proxy),
    ("a_pod_may_opt_out_and_names_resolve_all_the_same", opted_out),
    ("the_log_says_who_asked_what", log),
];

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    for program in ["getent", "dig", "curl"] {
        programs::find(program)?;
    }
    let pause = |pod: yaml::Pod| pod.image("meshprobe", &["pause"]);
    let resolver = |namespace: &str| {
        yaml::pod(namespace, "resolver", 2).image("meshprobe", &["dns-serve"]).ready_on(53)
    };
    let first = pause(yaml::pod("app", "db-0", 2).app("db"));
    let first = first.yaml().replace(
        "metadata: {name: db-0, namespace: app, labels",
        "metadata: {name: db-0, namespace: app, ownerReferences: [{apiVersion: apps/v1, kind: StatefulSet, \
         name: db, uid: u, controller: true}], labels",
    );
    let named = pause(yaml::pod("app", "other", 2).app("db")).yaml();
    let subdomain = |yaml: String, hostname: &str| {
        yaml.replace("spec:\n", &format!("spec:\n  hostname: {hostname}\n  subdomain: db\n"))
    };
    let objects = [
        yaml::namespace("app", true),
        pause(yaml::pod("app", "client", 1)).yaml(),
        pause(yaml::pod("app", "web", 2)).yaml(),
        yaml::service("app", "web", "web", &[("http", 80, "8080")]),
        four(),
        subdomain(first, "db-0"),
        subdomain(named, "named"),
        yaml::headless("app", "db", "db", &[("sql", 5432, "5432")]),
        yaml::headless("app", "many", "many", &[("http", 80, "80")]),
        many(),
        resolver("app").yaml(),
        yaml::namespace("plain", false),
        resolver("plain").yaml(),
        pause(yaml::pod("plain", "outsider", 1)).yaml(),
    ];
    Ok(Plan::new().file("app.yaml", yaml::join(&objects)).file("left.yaml", left("false")))
}

/// A Service with an IPv4 address only.
fn four() -> String {
    yaml::service("app", "four", "web", &[("http", 80, "8080")])
        .replace("ipFamilyPolicy: RequireDualStack", "ipFamilyPolicy: SingleStack")
}

fn many() -> String {
    format!(
        "apiVersion: apps/v1\nkind: Deployment\nmetadata: {{name: many, namespace: app}}\nspec:\n  replicas: {MANY}\n  \
         selector: {{matchLabels: {{app: many}}}}\n  template:\n    metadata: {{labels: {{app: many}}}}\n    spec:\n      \
         terminationGracePeriodSeconds: 1\n      containers: [{{name: main, image: meshprobe, args: [pause]}}]\n"
    )
}

/// A client that says whether its questions go to the proxy.
fn left(dns: &str) -> String {
    let pod = yaml::pod("app", "left", 1).image("meshprobe", &["pause"]).yaml();
    let annotated = format!("annotations: {{ambient.istio.io/dns-capture: '{dns}'}}, labels");
    pod.replace("labels", &annotated)
}

/// One answer as `meshprobe dns` shows it.
struct Answer(Value);

impl Answer {
    fn number(&self, field: &str) -> f64 {
        self.0[field].as_f64().unwrap_or(f64::NAN)
    }

    fn is(&self, field: &str) -> bool {
        self.0[field] == true
    }

    fn text(&self, field: &str) -> &str {
        self.0[field].as_str().unwrap_or_default()
    }

    /// The data of its records.
    fn data(&self) -> Vec<&str> {
        let all = self.0["answers"].as_array().map(Vec::as_slice).unwrap_or_default();
        all.iter().filter_map(|a| a["data"].as_str()).collect()
    }

    fn ttl(&self) -> Option<u64> {
        self.0["answers"][0]["ttl"].as_u64()
    }

    /// The code of the answer, if there is one.
    fn code(&self) -> Option<u64> {
        self.0["rcode"].as_u64()
    }
}

/// Asks from a pod; `args` are questions and flags of `meshprobe dns`.
fn ask_all(lab: &Lab, pod: &str, resolver: &str, args: &[&str]) -> Result<Vec<Answer>> {
    let argv = [&["/image/meshprobe", "dns", resolver], args].concat();
    let ran = lab.exec(pod, &argv)?;
    let lines = ran.ok()?.lines().map(|line| Ok(Answer(serde_json::from_str(line)?)));
    lines.collect()
}

fn ask_with(lab: &Lab, pod: &str, resolver: &str, args: &[&str]) -> Result<Answer> {
    ask_all(lab, pod, resolver, args)?.pop().context("no answer was shown")
}

/// The client asks the cluster's DNS by UDP.
fn ask(lab: &Lab, question: &str) -> Result<Answer> {
    ask_with(lab, "app/client", CLUSTER, &[question])
}

/// A metric of node-1's proxy; the sum of the lines that have all of `words`.
fn metric(lab: &Lab, words: &[&str]) -> Result<f64> {
    let url = "http://localhost:15020/metrics";
    let ran = lab.exec("node-1", &["curl", "-sS", "--max-time", "5", url])?;
    let lines = ran.ok()?.lines().filter(|l| words.iter().all(|w| l.contains(w)));
    Ok(lines.filter_map(|l| l.rsplit(' ').next()?.parse::<f64>().ok()).sum())
}

fn results(lab: &Lab, result: &str) -> Result<f64> {
    metric(lab, &["ambit_dns_questions_total{", &format!("\"{result}\"")])
}

fn names_of_every_form(lab: &Lab) -> Result<()> {
    let vips = [lab.service_ip("app/web", false)?, lab.service_ip("app/web", true)?];
    let by_mesh = results(lab, "mesh")?;
    let names = ["web", "web.app", "web.app.svc", "web.app.svc.cluster.local", "WEB.App"];
    for name in names {
        let ran = lab.exec("app/client", &["getent", "ahosts", name])?;
        for vip in &vips {
            ensure!(ran.ok()?.contains(vip.as_str()), "{name}: {ran:?} lacks {vip}");
        }
        // dig appends nothing unless it is told to: the name itself is short.
        let ran = lab.exec("app/client", &["dig", "+short", name, "A", name, "AAAA"])?;
        let said: Vec<&str> = ran.ok()?.lines().collect();
        ensure!(said == vips, "{name}: {said:?}, wanted {vips:?}");
    }
    let answered = results(lab, "mesh")? - by_mesh;
    ensure!(answered >= (4 * names.len()) as f64, "only {answered} answers came from the mesh");
    let of_type = |kind: &str| {
        let labels = ["istio_dns_requests_total{", "source_canonical_service=\"client\"", kind];
        metric(lab, &labels)
    };
    ensure!(of_type("\"A\"")? >= 10.0 && of_type("\"AAAA\"")? >= 10.0);
    Ok(())
}

fn both_families(lab: &Lab) -> Result<()> {
    let four = lab.service_ip("app/four", false)?;
    for resolver in [CLUSTER, CLUSTER6] {
        let questions = ["four.app.svc.cluster.local/A", "four.app.svc.cluster.local/AAAA"];
        let [a, aaaa] = &*ask_all(lab, "app/client", resolver, &questions)? else {
            anyhow::bail!("two answers were expected")
        };
        ensure!(a.data() == [four.as_str()] && a.ttl() == Some(BY_PROXY), "{:?}", a.0);
        ensure!(aaaa.code() == Some(0) && aaaa.data().is_empty(), "not NXDOMAIN: {:?}", aaaa.0);
        ensure!(aaaa.number("authorities") == 1.0 && aaaa.is("authoritative"), "{:?}", aaaa.0);
    }
    let ran = lab.exec("app/client", &["getent", "ahosts", "four"])?;
    ensure!(ran.ok()?.lines().all(|l| l.starts_with(&four)), "{ran:?}");
    Ok(())
}

fn headless(lab: &Lab) -> Result<()> {
    let (first, other) = (lab.pod_ip("app/db-0", false)?, lab.pod_ip("app/other", false)?);
    for name in ["db", "db.app", "db.app.svc", "db.app.svc.cluster.local"] {
        let answer = ask(lab, &format!("{name}/A"))?;
        let mut data = answer.data();
        data.sort_unstable();
        let mut want = [first.as_str(), other.as_str()];
        want.sort_unstable();
        ensure!(data == want, "{name}: {:?}, wanted {want:?}", answer.0);
    }
    let before = results(lab, "mesh")?;
    for name in ["db-0.db", "db-0.db.app", "db-0.db.app.svc", "db-0.db.app.svc.cluster.local"] {
        let answer = ask(lab, &format!("{name}/A"))?;
        ensure!(answer.data() == [first.as_str()], "{name}: {:?}, wanted {first}", answer.0);
        let ran = lab.exec("app/client", &["getent", "ahosts", name])?;
        for ip in [&first, &lab.pod_ip("app/db-0", true)?] {
            ensure!(ran.ok()?.contains(ip.as_str()), "{name}: {ran:?} lacks {ip}");
        }
    }
    ensure!(results(lab, "mesh")? - before >= 8.0, "pods of a StatefulSet are answered here");
    // A host name that is not its pod's own is the cluster's to answer.
    let before = results(lab, "forwarded")?;
    let answer = ask(lab, "named.db.app.svc.cluster.local/A")?;
    ensure!(answer.data() == [other.as_str()], "{:?}, wanted {other}", answer.0);
    ensure!(results(lab, "forwarded")? > before);
    Ok(())
}

fn forwarded(lab: &Lab) -> Result<()> {
    let web = lab.service_ip("app/web", false)?;
    let before = results(lab, "forwarded")?;
    let answer = ask(lab, "_http._tcp.web.app.svc.cluster.local/SRV")?;
    ensure!(answer.data() == ["0 100 80 web.app.svc.cluster.local."], "{:?}", answer.0);
    let mut reverse: Vec<&str> = web.split('.').collect();
    reverse.reverse();
    let answer = ask(lab, &format!("{}.in-addr.arpa/PTR", reverse.join(".")))?;
    ensure!(answer.data() == ["web.app.svc.cluster.local."], "{:?}", answer.0);
    // Names of the cluster that are no Services of the mesh.
    let answer = ask(lab, "kube-dns.kube-system.svc.cluster.local/A")?;
    ensure!(answer.data() == ["10.96.0.10"] && answer.ttl() == Some(BY_CLUSTER), "{:?}", answer.0);
    let sum = results(lab, "forwarded")? - before;
    ensure!(sum == 3.0, "{sum} questions were forwarded");
    let upstream = |name: &str| metric(lab, &[name, "\"SRV\"", "\"client\""]);
    ensure!(upstream("istio_dns_upstream_requests_total{")? >= 1.0);
    ensure!(upstream("istio_dns_upstream_request_duration_seconds_count{")? >= 1.0);
    Ok(())
}

fn negative_answers(lab: &Lab) -> Result<()> {
    for name in [
        "nothing.app.svc.cluster.local",
        "web.nothing.svc.cluster.local",
        "web.app.app.svc.cluster.local",
        "web.app.svc.cluster.local.app.svc.cluster.local",
    ] {
        for kind in ["A", "AAAA"] {
            let answer = ask(lab, &format!("{name}/{kind}"))?;
            ensure!(answer.code() == Some(3) && answer.number("ms") < FAST, "{:?}", answer.0);
        }
    }
    let began = std::time::Instant::now();
    lab.exec("app/client", &["getent", "ahosts", "nothing.app"])?.failed()?;
    ensure!(began.elapsed() < Duration::from_secs(3), "{:?}", began.elapsed());
    Ok(())
}

/// What a resolver hears and says is the same with the proxy and without.
fn untouched(lab: &Lab) -> Result<()> {
    for ipv6 in [false, true] {
        let resolver = at_53(lab, "plain/resolver", ipv6)?;
        let questions: &[&[&str]] = &[
            &["echo.test/A"],
            &["echo.test/AAAA", "--id", "65535"],
            &["ECHO.Test/TXT", "--id", "0"],
            &["echo.test/A", "--edns", "4096"],
            &["echo.test/TYPE4711", "--edns", "512"],
            &["echo.test/A", "--opcode", "2"],
            &["echo.test/SOA", "--opcode", "4"],
            // Two questions, and one of another class.
            &["x/A", "--raw", &format!("002a01000002000000000000{0}{0}", ECHO)],
            &[
                "x/A",
                "--raw",
                &format!("002b01000001000000000000{}", ECHO.replace("010001", "010003")),
            ],
        ];
        for tcp in [false, true] {
            for question in questions {
                let args = [*question, if tcp { &["--tcp"][..] } else { &[] }].concat();
                let through = ask_with(lab, "app/client", &resolver, &args)?;
                let direct = ask_with(lab, "plain/outsider", &resolver, &args)?;
                ensure!(
                    through.text("heard") == direct.text("heard"),
                    "{:?}\n{:?}",
                    through.0,
                    direct.0
                );
                let heard = through.data().join("");
                ensure!(
                    !heard.is_empty() && through.text("sent").starts_with(&heard),
                    "the resolver heard something else: {:?}",
                    through.0
                );
            }
        }
    }
    Ok(())
}

/// `echo.test`, type A, class IN, as it stands in a message.
const ECHO: &str = "046563686f04746573740000010001";

fn at_53(lab: &Lab, pod: &str, ipv6: bool) -> Result<String> {
    let ip = lab.pod_ip(pod, ipv6)?;
    Ok(if ipv6 { format!("[{ip}]:53") } else { format!("{ip}:53") })
}

fn wrong_answers(lab: &Lab) -> Result<()> {
    let resolver = at_53(lab, "plain/resolver", false)?;
    // A client that believes everything: what it hears is what the proxy let through.
    let direct = ask_with(lab, "plain/outsider", &resolver, &["wrong.test/A"])?;
    ensure!(direct.number("id") == 4712.0, "the control should hear a wrong id: {:?}", direct.0);
    let through = ask_with(lab, "app/client", &resolver, &["wrong.test/A"])?;
    ensure!(through.number("id") == 4711.0 && through.data() == ["wrong"], "{:?}", through.0);
    Ok(())
}

fn large_answers(lab: &Lab) -> Result<()> {
    let question = "many.app.svc.cluster.local/AAAA";
    let check = |args: &[&str], cut: bool, most: f64| -> Result<()> {
        let answer = ask_with(lab, "app/client", CLUSTER, &[&[question], args].concat())?;
        let count = answer.data().len();
        ensure!(
            answer.is("cut") == cut && answer.number("size") <= most,
            "{args:?}: {:?}",
            answer.0
        );
        ensure!(if cut { (10..MANY).contains(&count) } else { count == MANY }, "{args:?}: {count}");
        Ok(())
    };
    lab.until("all pods to be known", || Ok(check(&["--tcp"], false, 65_535.0).is_ok()))?;
    check(&[], true, 512.0)?;
    check(&["--edns", "100"], true, 512.0)?;
    check(&["--edns", "600"], true, 600.0)?;
    check(&["--edns", "1232"], false, 1232.0)?;
    check(&["--edns", "4096", "--tcp"], false, 65_535.0)?;
    // A real client asks again by TCP.
    let ran = lab
        .exec("app/client", &["dig", "+noedns", "+short", "many.app.svc.cluster.local", "AAAA"])?;
    let heard = ran.ok()?.lines().filter(|l| l.contains(':') && !l.starts_with(';')).count();
    ensure!(heard == MANY, "{ran:?}");
    let resolver = at_53(lab, "plain/resolver", false)?;
    let cut = ask_with(lab, "app/client", &resolver, &["large.test/TXT"])?;
    ensure!(cut.is("cut") && cut.data().is_empty(), "{:?}", cut.0);
    let whole = ask_with(lab, "app/client", &resolver, &["large.test/TXT", "--tcp"])?;
    ensure!(!whole.is("cut") && whole.number("size") > 50_000.0, "{} bytes", whole.number("size"));
    Ok(())
}

fn by_tcp(lab: &Lab) -> Result<()> {
    let web = lab.service_ip("app/web", false)?;
    let resolver = at_53(lab, "plain/resolver", false)?;
    let questions =
        ["web/A", "echo.test/A", "web.app/AAAA", "once.test/A", "echo.test/A", "web/A", "--tcp"];
    let answers = ask_all(lab, "app/client", &resolver, &questions)?;
    ensure!(answers.len() == 6, "{} answers", answers.len());
    for mine in [&answers[0], &answers[5]] {
        ensure!(mine.data() == [web.as_str()] && mine.ttl() == Some(BY_PROXY), "{:?}", mine.0);
    }
    for theirs in [&answers[1], &answers[4]] {
        ensure!(theirs.text("sent") == theirs.data().join(""), "{:?}", theirs.0);
    }
    ensure!(answers[3].data() == ["once"], "{:?}", answers[3].0);
    // A zone transfer is relayed: the last answer is the second message of the first question's.
    let before = lab.access_log("node-1")?.len();
    let answers = ask_all(
        lab,
        "app/client",
        &resolver,
        &["transfer.test/AXFR", "transfer.test/AXFR", "--tcp"],
    )?;
    ensure!(answers.iter().all(|a| a.data() == ["transfer"]), "{:?}", answers.last().map(|a| &a.0));
    let line = [("direction", "outbound"), ("src.workload", "client"), ("dst.addr", &*resolver)];
    lab.wait_for_access("node-1", before, &line)?;
    Ok(())
}

fn resolver_in_the_mesh(lab: &Lab) -> Result<()> {
    let resolver = at_53(lab, "app/resolver", false)?;
    let by_udp = ask_with(lab, "app/client", &resolver, &["echo.test/A"])?;
    ensure!(by_udp.text("sent") == by_udp.data().join(""), "{:?}", by_udp.0);
    let before = lab.access_log("node-1")?.len();
    let questions = ["echo.test/A", "large.test/TXT", "web/A", "echo.test/A", "--tcp"];
    let answers = ask_all(lab, "app/client", &resolver, &questions)?;
    ensure!(answers.len() == 4 && answers[1].number("size") > 50_000.0);
    ensure!(answers[3].text("sent") == answers[3].data().join(""), "{:?}", answers[3].0);
    let tunnel = [
        ("direction", "outbound"),
        ("src.workload", "client"),
        ("dst.workload", "resolver"),
        ("dst.identity", "spiffe://cluster.local/ns/app/sa/resolver"),
    ];
    let line = lab.wait_for_access("node-1", before, &tunnel)?;
    ensure!(line.number("bytes_recv") > 50_000, "{line:?}");
    let transfer = ask_with(lab, "app/client", &resolver, &["transfer.test/AXFR", "--tcp"])?;
    ensure!(transfer.data() == ["transfer"], "{:?}", transfer.0);
    Ok(())
}

fn dead_resolver(lab: &Lab) -> Result<()> {
    // A pod without a server, in the mesh and outside of it.
    for dead in ["plain/outsider", "app/web"] {
        let dead = at_53(lab, dead, false)?;
        for tcp in [&[][..], &["--tcp"]] {
            let answer = ask_with(lab, "app/client", &dead, &[&["example.com/A"], tcp].concat())?;
            ensure!(
                answer.code() == Some(2) && answer.number("ms") < FAST,
                "{tcp:?} {:?}",
                answer.0
            );
            // The mesh's own names need no resolver.
            let answer = ask_with(lab, "app/client", &dead, &[&["web/A"], tcp].concat())?;
            ensure!(answer.ttl() == Some(BY_PROXY), "{:?}", answer.0);
        }
    }
    let silent = at_53(lab, "plain/resolver", false)?;
    let answer = ask_with(lab, "app/client", &silent, &["silent.test/A", "--edns", "1232"])?;
    ensure!(answer.code() == Some(2) && !answer.0["edns"].is_null(), "{:?}", answer.0);
    // That it is before a client gives up, ztunnel's constant says; a busy machine may be late.
    ensure!(answer.number("ms") >= 4_000.0, "{:?}", answer.0);
    ensure!(metric(lab, &["istio_dns_upstream_failures_total{", "\"client\""])? >= 5.0);
    Ok(())
}

fn flood(lab: &Lab) -> Result<()> {
    let silent = at_53(lab, "plain/resolver", false)?;
    let before = results(lab, "limit")?;
    let argv =
        ["/image/meshprobe", "dns", &silent, "silent.test/A", "--flood", "400", "--timeout", "1"];
    let ran = lab.exec("app/client", &argv)?;
    let codes: Value = serde_json::from_str(ran.ok()?)?;
    let refused = codes["2"].as_u64().unwrap_or_default();
    ensure!((100..=144).contains(&refused), "400 questions, room for 256: {codes}");
    ensure!(results(lab, "limit")? - before >= refused as f64);
    // The same pod's names of the mesh, and another pod's forwarded questions.
    ensure!(ask(lab, "web/A")?.ttl() == Some(BY_PROXY));
    lab.write("left.yaml", &left("true"))?;
    lab.until("the other client to be served", || {
        let resolver = at_53(lab, "plain/resolver", false)?;
        let served = ask_with(lab, "app/left", CLUSTER, &["web.app.svc.cluster.local/A"])?;
        let echo = ask_with(lab, "app/left", &resolver, &["echo.test/A"])?;
        Ok(served.ttl() == Some(BY_PROXY) && !echo.data().is_empty())
    })?;
    // And then the first one's again.
    lab.until("the questions to be forgotten", || {
        Ok(ask(lab, "example.test/A")?.code() != Some(2))
    })?;
    Ok(())
}

fn unanswered(lab: &Lab, pod: &str, by: &str) -> Result<()> {
    for tcp in [&[][..], &["--tcp"]] {
        let answer = ask_with(lab, pod, by, &[&["web/A", "--timeout", "1"], tcp].concat());
        ensure!(!answer.is_ok_and(|a| a.code().is_some()), "{pod} was answered by {by} {tcp:?}");
    }
    Ok(())
}

fn around_the_proxy(lab: &Lab) -> Result<()> {
    for ipv6 in [false, true] {
        let ip = lab.pod_ip("app/client", ipv6)?;
        let listener = if ipv6 { format!("[{ip}]:15053") } else { format!("{ip}:15053") };
        for pod in ["plain/outsider", "app/web", "app/client"] {
            unanswered(lab, pod, &listener)?;
        }
        // The pod itself, on the address where the listener is: nobody was asked.
        unanswered(lab, "app/client", if ipv6 { "[::1]:15053" } else { "127.0.0.1:15053" })?;
    }
    // Garbage of every length does no harm.
    for length in [0, 1, 11, 12, 13, 100] {
        let raw = "ff".repeat(length);
        let args = ["x/A", "--timeout", "0.1", "--raw", &raw];
        let argv = [&["/image/meshprobe", "dns", CLUSTER], &args[..]].concat();
        lab.exec("app/client", &argv)?;
    }
    ensure!(ask(lab, "web/A")?.ttl() == Some(BY_PROXY));
    Ok(())
}

fn opted_out(lab: &Lab) -> Result<()> {
    let web = lab.service_ip("app/web", false)?;
    let name = "web.app.svc.cluster.local/A";
    let by = |who: u64| {
        lab.until("the pod's questions to go another way", || {
            let answer = ask_with(lab, "app/left", CLUSTER, &[name])?;
            ensure!(answer.data() == [web.as_str()], "{:?}", answer.0);
            Ok(answer.ttl() == Some(who))
        })
    };
    by(BY_CLUSTER)?;
    let asked = || metric(lab, &["istio_dns_requests_total{", "source_canonical_service=\"left\""]);
    let before = asked()?;
    for name in ["web", "web.app", "web.app.svc", "web.app.svc.cluster.local", "db-0.db"] {
        lab.exec("app/left", &["getent", "ahosts", name])?.ok()?;
    }
    ensure!(asked()? == before, "the proxy has seen questions of a pod that opted out");
    // Its connections are captured all the same.
    ensure!(lab.pod("app/left")?.captured);
    lab.write("left.yaml", &left("true"))?;
    by(BY_PROXY)?;
    ensure!(asked()? > before);
    lab.write("left.yaml", &left("false"))?;
    by(BY_CLUSTER)?;
    Ok(())
}

fn log(lab: &Lab) -> Result<()> {
    let post = |path: &str| {
        let url = format!("http://localhost:15000/logging?{path}");
        let argv = ["curl", "-sS", "--fail", "--max-time", "5", "-X", "POST", &url];
        lab.exec("node-1", &argv)?.ok().map(drop)
    };
    post("level=info,dns=debug")?;
    ask(lab, "web.app/A")?;
    ask(lab, "nothing.app.svc.cluster.local/AAAA")?;
    let has = |words: &[&str]| {
        lab.until("the line", || {
            let log = lab.process_log("ztunnel", Some("node-1"))?;
            Ok(log.lines().any(|l| words.iter().all(|w| l.contains(w))))
        })
    };
    has(&[
        "src.workload=",
        "client",
        "query=",
        "domain=",
        "web.app",
        "result=",
        "mesh",
        "endpoints=1",
    ])?;
    has(&[
        "query=",
        "AAAA",
        "nothing.app.svc.cluster.local",
        "forwarded",
        "resolver=10.96.0.10:53",
    ])?;
    post("reset")?;
    Ok(())
}
