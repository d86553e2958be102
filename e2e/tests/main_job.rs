//! The main job: unmodified programs talk through the mesh, by every kind of name and address, in both families, and the
//! server sees who called.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::suite::{self, Test};
use e2e::{Lab, Plan, programs, yaml};
use serde_json::Value;

/// nginx and PostgreSQL refuse to be root, and want a user that exists: www-data is on every Debian.
const USER: u32 = 33;
/// A database's start and benchmarks take longer than a call.
const LONG: Duration = Duration::from_secs(40);

const TESTS: &[(&str, Test)] = &[
    ("curl_to_nginx_by_every_name_and_address", curl_by_every_name),
    ("curl_on_the_same_node", curl_on_the_same_node),
    ("a_pod_calls_itself_through_its_service", call_to_itself),
    ("a_large_file_arrives_whole", large_file),
    ("redis", redis),
    ("postgresql", postgresql),
    ("iperf3_both_directions", iperf3),
    ("grpc", grpc),
    ("both_logs_name_both_identities", identities_in_logs),
    ("istio_metrics", metrics),
    ("readiness_and_admin", readiness_and_admin),
    ("names_resolve", names),
];

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    for program in ["curl", "redis-cli", "redis-benchmark", "psql", "pgbench"] {
        programs::find(program)?;
    }
    let web = yaml::pod("app", "web", 2)
        .script(&nginx()?)
        .user(USER)
        .port("http", 8080)
        .port("alt", 8081)
        .ready_on(8081);
    let redis_server = programs::path_of("redis-server")?;
    let redis =
        ["--bind", "0.0.0.0", "::", "--protected-mode", "no", "--save", "", "--dir", "/tmp"];
    let redis: Vec<&str> = std::iter::once(redis_server.as_str()).chain(redis).collect();
    let iperf = programs::path_of("iperf3")?;
    let objects = [
        yaml::namespace("app", true),
        yaml::pod("app", "client", 1).image("meshprobe", &["pause"]).yaml(),
        yaml::pod("app", "neighbour", 2).image("meshprobe", &["pause"]).yaml(),
        web.yaml(),
        yaml::service(
            "app",
            "web",
            "web",
            &[("http", 80, "http"), ("alt", 81, "alt"), ("number", 82, "8080")],
        ),
        yaml::headless("app", "web-headless", "web", &[("http", 8080, "http")]),
        yaml::pod("app", "redis", 2).command(&redis).ready_on(6379).yaml(),
        yaml::service("app", "redis", "redis", &[("redis", 6379, "6379")]),
        yaml::pod("app", "db", 2).script(&postgres()?).user(USER).ready_on(5432).yaml(),
        yaml::service("app", "db", "db", &[("postgres", 5432, "5432")]),
        // Without a probe: iperf3 serves one at a time, and resets whoever comes beside a probe.
        yaml::pod("app", "iperf", 2).command(&[&iperf, "-s", "-p", "5201"]).yaml(),
        yaml::service("app", "iperf", "iperf", &[("iperf", 5201, "5201")]),
        yaml::pod("app", "greeter", 2).image("meshprobe", &["grpc-serve"]).ready_on(9090).yaml(),
        yaml::service("app", "greeter", "greeter", &[("grpc", 9090, "9090")]),
    ];
    Ok(Plan::new().file("app.yaml", yaml::join(&objects)))
}

/// A script that runs nginx as anybody.
fn nginx() -> Result<String> {
    let nginx = programs::path_of("nginx")?;
    Ok(format!(
        r#"mkdir /tmp/www
head -c 50000000 /dev/urandom > /tmp/www/large
cat > /tmp/nginx.conf <<'CONF'
daemon off;
pid /tmp/nginx.pid;
error_log stderr;
events {{}}
http {{
  access_log off;
  client_body_temp_path /tmp/body; proxy_temp_path /tmp/proxy; fastcgi_temp_path /tmp/fastcgi;
  uwsgi_temp_path /tmp/uwsgi; scgi_temp_path /tmp/scgi;
  server {{
    listen 8080; listen [::]:8080;
    location / {{ return 200 "nginx $server_port $remote_addr\n"; }}
    location /large {{ root /tmp/www; }}
  }}
  server {{ listen 8081; listen [::]:8081; location / {{ return 200 "nginx $server_port $remote_addr\n"; }} }}
}}
CONF
exec {nginx} -c /tmp/nginx.conf"#
    ))
}

/// A script that makes a database and serves it.
fn postgres() -> Result<String> {
    let (initdb, postgres) = (programs::path_of("initdb")?, programs::path_of("postgres")?);
    Ok(format!(
        r#"{initdb} -D /tmp/db -U postgres -A trust --no-sync >/tmp/initdb.log
echo "host all all all trust" >> /tmp/db/pg_hba.conf
exec {postgres} -D /tmp/db -c listen_addresses='*' -c unix_socket_directories=/tmp -c fsync=off"#
    ))
}

/// What nginx answers to a URL.
fn curl(lab: &Lab, pod: &str, family: &str, url: &str) -> Result<String> {
    let ran = lab.exec(pod, &["curl", "-sS", "--fail", "--max-time", "5", family, url])?;
    Ok(ran.ok()?.to_owned())
}

fn curl_by_every_name(lab: &Lab) -> Result<()> {
    let (vip4, vip6) = (lab.service_ip("app/web", false)?, lab.service_ip("app/web", true)?);
    let (ip4, ip6) = (lab.pod_ip("app/web", false)?, lab.pod_ip("app/web", true)?);
    let (own4, own6) = (lab.pod_ip("app/client", false)?, lab.pod_ip("app/client", true)?);
    let check = |url: &str, port: u16| -> Result<()> {
        let families: &[(&str, &str)] = if url.contains('[') {
            &[("-6", &own6)]
        } else if url.starts_with("10.") {
            &[("-4", &own4)]
        } else {
            &[("-4", &own4), ("-6", &own6)]
        };
        for (family, own) in families {
            let got = curl(lab, "app/client", family, &format!("http://{url}"))?;
            ensure!(
                got == format!("nginx {port} {own}"),
                "{family} {url} gave {got:?}, wanted port {port} for {own}"
            );
        }
        Ok(())
    };
    for name in ["web", "web.app", "web.app.svc", "web.app.svc.cluster.local"] {
        check(&format!("{name}/"), 8080)?;
    }
    check("web:81/", 8081)?;
    check("web:82/", 8080)?;
    check(&format!("{vip4}/"), 8080)?;
    check(&format!("{vip4}:81/"), 8081)?;
    check(&format!("[{vip6}]/"), 8080)?;
    check(&format!("[{vip6}]:81/"), 8081)?;
    check(&format!("{ip4}:8080/"), 8080)?;
    check(&format!("[{ip6}]:8081/"), 8081)?;
    check("web-headless:8080/", 8080)?;
    // A port that the Service does not have is no way in.
    lab.exec("app/client", &["curl", "-sS", "--max-time", "5", &format!("http://{vip4}:8080/")])?
        .failed()?;
    Ok(())
}

fn curl_on_the_same_node(lab: &Lab) -> Result<()> {
    for (family, ipv6) in [("-4", false), ("-6", true)] {
        let own = lab.pod_ip("app/neighbour", ipv6)?;
        let got = curl(lab, "app/neighbour", family, "http://web/")?;
        ensure!(got == format!("nginx 8080 {own}"), "{family} gave {got:?} for {own}");
    }
    Ok(())
}

fn call_to_itself(lab: &Lab) -> Result<()> {
    for family in ["-4", "-6"] {
        // Not by the short name: that is the pod's own host name, which stands in its /etc/hosts.
        let got = curl(lab, "app/web", family, "http://web.app/")?;
        ensure!(got.starts_with("nginx 8080 "), "{got}");
        // By its own address and by localhost there is no mesh in between.
        let got = curl(lab, "app/web", family, "http://localhost:8081/")?;
        ensure!(got.starts_with("nginx 8081 "), "{got}");
    }
    let own = lab.pod_ip("app/web", false)?;
    let got = curl(lab, "app/web", "-4", &format!("http://{own}:8081/"))?;
    ensure!(got == format!("nginx 8081 {own}"), "{got}");
    Ok(())
}

fn large_file(lab: &Lab) -> Result<()> {
    let sum = |text: &str| text.split_whitespace().next().unwrap_or_default().to_owned();
    let want = lab.exec("app/web", &["sha256sum", "/tmp/www/large"])?;
    let fetch = "curl -sS --fail http://web/large | sha256sum";
    let got = lab.exec_with("app/client", &["sh", "-c", fetch], "", LONG)?;
    let (want, got) = (sum(want.ok()?), sum(got.ok()?));
    ensure!(want.len() == 64 && want == got, "{want:?} was sent, {got:?} arrived");
    Ok(())
}

fn redis(lab: &Lab) -> Result<()> {
    lab.exec("app/client", &["redis-cli", "-h", "redis", "set", "k", "v17"])?.ok()?;
    let got = lab.exec("app/client", &["redis-cli", "-h", "redis", "get", "k"])?;
    ensure!(got.ok()? == "v17", "{got:?}");
    let bench =
        ["redis-benchmark", "-h", "redis", "-n", "5000", "-c", "50", "-t", "set,get", "--csv"];
    let ran = lab.exec_with("app/client", &bench, "", LONG)?;
    ensure!(ran.ok()?.contains("\"GET\""), "{ran:?}");
    let piped = [
        "redis-benchmark",
        "-h",
        "redis",
        "-n",
        "20000",
        "-c",
        "10",
        "-P",
        "50",
        "-t",
        "get",
        "--csv",
    ];
    lab.exec_with("app/client", &piped, "", LONG)?.ok()?;
    Ok(())
}

fn postgresql(lab: &Lab) -> Result<()> {
    let own = lab.pod("app/client")?.ips;
    let ask = "select host(inet_client_addr())";
    let ran = lab.exec("app/client", &["psql", "-h", "db", "-U", "postgres", "-Atc", ask])?;
    let seen = ran.ok()?.to_owned();
    ensure!(own.contains(&seen), "the database saw {seen:?}, not one of {own:?}");
    lab.exec_with(
        "app/client",
        &["pgbench", "-h", "db", "-U", "postgres", "-i", "-q", "postgres"],
        "",
        LONG,
    )?
    .ok()?;
    let bench = ["pgbench", "-h", "db", "-U", "postgres", "-c", "4", "-t", "200", "postgres"];
    let ran = lab.exec_with("app/client", &bench, "", LONG)?;
    let all = "number of transactions actually processed: 800/800";
    ensure!(ran.ok()?.contains(all), "{ran:?}");
    Ok(())
}

fn iperf3(lab: &Lab) -> Result<()> {
    let short = ["iperf3", "-c", "iperf", "-p", "5201", "-n", "1M"];
    lab.until("iperf3 to listen", || Ok(lab.exec("app/client", &short)?.is_ok()))?;
    for direction in [&[][..], &["-R"]] {
        let mut argv = vec!["iperf3", "-c", "iperf", "-p", "5201", "-n", "200M", "-P", "2", "-J"];
        argv.extend(direction);
        let ran = lab.exec_with("app/client", &argv, "", LONG)?;
        let report: Value = serde_json::from_str(ran.ok()?)?;
        let bytes = |side: &str| report["end"][side]["bytes"].as_u64().unwrap_or_default();
        let (sent, received) = (bytes("sum_sent"), bytes("sum_received"));
        // The receiver stops counting, and resets, when the sender says on another connection that it is done. What is on its way
        // then fills the sockets and the tunnel's window, some 50 MiB at most; that no byte is lost is for other programs to say.
        ensure!(sent >= 200 << 20 && received >= 100 << 20, "{sent} sent, {received} received");
    }
    Ok(())
}

fn grpc(lab: &Lab) -> Result<()> {
    let own = lab.pod("app/client")?.ips;
    let ran =
        lab.exec("app/client", &["/image/meshprobe", "grpc-unary", "greeter:9090", "hello"])?;
    let answer: Value = serde_json::from_str(ran.ok()?)?;
    let peer = answer["peer"].as_str().unwrap_or_default();
    let known = own.iter().any(|ip| ip == peer);
    ensure!(answer["text"] == "hello" && known, "{answer}, wanted one of {own:?} as the peer");
    let ran =
        lab.exec("app/client", &["/image/meshprobe", "grpc-stream", "greeter:9090", "5000"])?;
    let answer: Value = serde_json::from_str(ran.ok()?)?;
    ensure!(answer["answers"] == 5000, "{answer}");
    Ok(())
}

fn identities_in_logs(lab: &Lab) -> Result<()> {
    let (before1, before2) = (lab.access_log("node-1")?.len(), lab.access_log("node-2")?.len());
    curl(lab, "app/client", "-4", "http://web/")?;
    let parties = [
        ("src.workload", "client"),
        ("src.namespace", "app"),
        ("src.identity", "spiffe://cluster.local/ns/app/sa/client"),
        ("dst.workload", "web"),
        ("dst.namespace", "app"),
        ("dst.identity", "spiffe://cluster.local/ns/app/sa/web"),
    ];
    let with = |more: &[(&'static str, &'static str)]| [&parties, more].concat();
    let out = with(&[("direction", "outbound"), ("dst.service", "web.app.svc.cluster.local")]);
    let out = lab.wait_for_access("node-1", before1, &out)?;
    let inbound = lab.wait_for_access("node-2", before2, &with(&[("direction", "inbound")]))?;
    let own = lab.pod_ip("app/client", false)?;
    for line in [&out, &inbound] {
        ensure!(line.get("src.addr").starts_with(&format!("{own}:")), "{line:?}");
        ensure!(line.message == "connection complete" && line.get("reason").is_empty(), "{line:?}");
        ensure!(!line.get("config").is_empty(), "no config version: {line:?}");
    }
    // What one side sent the other received.
    ensure!(out.number("bytes_sent") > 50 && out.number("bytes_recv") > 50, "{out:?}");
    ensure!(out.number("bytes_sent") == inbound.number("bytes_recv"), "{out:?} {inbound:?}");
    ensure!(out.number("bytes_recv") == inbound.number("bytes_sent"), "{out:?} {inbound:?}");
    Ok(())
}

fn metrics(lab: &Lab) -> Result<()> {
    let principal = |sa: &str| format!("spiffe://cluster.local/ns/app/sa/{sa}");
    for (node, reporter) in [("node-1", "source"), ("node-2", "destination")] {
        let want = [
            "istio_tcp_connections_opened_total{".to_owned(),
            format!("reporter=\"{reporter}\""),
            format!("source_principal=\"{}\"", principal("client")),
            format!("destination_principal=\"{}\"", principal("redis")),
            "connection_security_policy=\"mutual_tls\"".to_owned(),
            "destination_service=\"redis.app.svc.cluster.local\"".to_owned(),
            "request_protocol=\"tcp\"".to_owned(),
            "response_flags=\"-\"".to_owned(),
        ];
        lab.until("the metric", || {
            let ran = lab.exec(
                node,
                &["curl", "-sS", "--max-time", "5", "http://localhost:15020/metrics"],
            )?;
            let found = ran.ok()?.lines().any(|l| want.iter().all(|w| l.contains(w.as_str())));
            ensure!(found, "no line on {node} has all of {want:#?}");
            Ok(true)
        })?;
    }
    Ok(())
}

fn readiness_and_admin(lab: &Lab) -> Result<()> {
    for node in ["node-1", "node-2"] {
        let ready =
            lab.exec(node, &["curl", "-sS", "--fail", "http://localhost:15021/healthz/ready"])?;
        ready.ok()?;
        let dump =
            lab.exec(node, &["curl", "-sS", "--fail", "http://localhost:15000/config_dump"])?;
        let dump: Value = serde_json::from_str(dump.ok()?).context("config_dump is JSON")?;
        ensure!(dump["workloads"].is_array() || dump["workloads"].is_object(), "{dump}");
    }
    Ok(())
}

fn names(lab: &Lab) -> Result<()> {
    let vip = lab.service_ip("app/web", false)?;
    let hosts = |name: &str| lab.exec("app/client", &["getent", "ahostsv4", name]);
    for name in ["web", "web.app.svc.cluster.local"] {
        let ran = hosts(name)?;
        ensure!(ran.ok()?.starts_with(&vip), "{ran:?}, wanted {vip}");
    }
    let ip = lab.pod_ip("app/web", false)?;
    let ran = hosts("web-headless")?;
    ensure!(ran.ok()?.starts_with(&ip), "{ran:?}, wanted {ip}");
    hosts("nobody")?.failed()?;
    let ran = lab.exec("app/client", &["cat", "/proc/sys/kernel/hostname"])?;
    ensure!(ran.ok()? == "client", "{ran:?}");
    Ok(())
}
