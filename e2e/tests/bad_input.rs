//! Bad input of every kind: what is wrong is named with file, line and field, and everything else goes on.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use e2e::suite::{self, Test};
use e2e::{Lab, Plan, programs, wait_until, yaml};
use serde_json::Value;

const SOON: Duration = Duration::from_secs(20);

const TESTS: &[(&str, Test)] = &[
    ("broken_yaml_keeps_the_last_good_state", broken_yaml),
    ("half_written_and_renamed_files", half_written),
    ("an_unknown_kind_is_named", unknown_kind),
    ("an_unknown_field_is_named", unknown_field),
    ("a_wrong_type_is_named", wrong_type),
    ("a_service_that_selects_nothing", dangling_selector),
    ("a_node_that_does_not_exist", no_such_node),
    ("two_services_with_one_address", duplicate_address),
    ("one_object_in_two_files", duplicate_object),
    ("a_pod_that_ends_at_once", crash_loop),
    ("an_image_that_nobody_knows", unknown_image),
    ("garbage_on_the_tunnel_port", garbage),
    ("endless_headers", endless_headers),
    ("a_peer_that_says_nothing", silent_peer),
];

fn main() -> ExitCode {
    suite::run(plan, TESTS)
}

fn plan() -> Result<Plan> {
    programs::find("curl")?;
    let objects = [
        yaml::namespace("app", true),
        yaml::pod("app", "client", 1).image("meshprobe", &["pause"]).yaml(),
        yaml::pod("app", "server", 2)
            .image("meshload", &["all", "--listen", "[::]:8080"])
            .ready_on(8080)
            .yaml(),
        yaml::service("app", "server", "server", &[("http", 80, "8080"), ("echo", 7, "8082")]),
        yaml::namespace("plain", false),
        yaml::pod("plain", "outsider", 1).image("meshprobe", &["pause"]).yaml(),
    ];
    Ok(Plan::new().file("app.yaml", yaml::join(&objects)))
}

/// The mesh still does its job.
fn works(lab: &Lab) -> Result<bool> {
    Ok(lab
        .exec("app/client", &["curl", "-sS", "--fail", "--max-time", "5", "http://server/"])?
        .is_ok())
}

/// Waits for a complaint that has all these words, with the mesh at work before and after, and for its end once the file
/// is gone.
fn complains(lab: &Lab, file: &str, text: &str, words: &[&str]) -> Result<()> {
    lab.write(file, text)?;
    lab.until("the complaint", || {
        let all = lab.status()?.diagnostics;
        ensure!(
            all.iter().any(|d| words.iter().all(|w| d.contains(w))),
            "no complaint has {words:?}: {all:#?}"
        );
        Ok(true)
    })?;
    ensure!(works(lab)?, "nothing else may suffer");
    // The terminal of `up` tells it as well.
    lab.until("the complaint on the terminal", || {
        Ok(words.iter().all(|w| lab.said().contains(w)))
    })?;
    lab.remove(file)?;
    lab.until("the complaint to go", || {
        let all = lab.status()?.diagnostics;
        ensure!(!all.iter().any(|d| words.iter().all(|w| d.contains(w))), "{all:#?}");
        Ok(true)
    })?;
    ensure!(works(lab)?, "nothing else may suffer");
    Ok(())
}

fn broken_yaml(lab: &Lab) -> Result<()> {
    let deny =
        yaml::policy("app", "deny", "server", "DENY", "[{from: [{source: {namespaces: [app]}}]}]");
    lab.write("policy.yaml", &deny)?;
    lab.until("the policy to be in force", || Ok(!works(lab)?))?;
    // A slip of the keyboard on line 5 must not open what the policy closes.
    lab.write(
        "policy.yaml",
        &deny.replace("spec:\n", "spec:\n  selector: {matchLabels: {app: server\n"),
    )?;
    lab.until("the complaint", || {
        let all = lab.status()?.diagnostics;
        ensure!(all.iter().any(|d| d.contains("policy.yaml:")), "{all:#?}");
        Ok(true)
    })?;
    ensure!(!works(lab)?, "the last good state of the file is not in force");
    // Other files take effect all the same.
    lab.write("more.yaml", &yaml::service("app", "second", "server", &[("http", 80, "8080")]))?;
    lab.until("the new service", || Ok(lab.status()?.service("app/second").is_some()))?;
    // No answer is given on files that do not parse: what runs is not what they say.
    let ran = lab.can("app/client", "app/server:80")?;
    ensure!(ran.code == 2 && ran.err.contains("policy.yaml"), "{ran:?}");
    lab.write("policy.yaml", &deny.replace("DENY", "ALLOW"))?;
    lab.until("the repaired file to be in force", || works(lab))?;
    lab.until("the complaint to go", || {
        Ok(!lab.status()?.diagnostics.iter().any(|d| d.contains("policy.yaml")))
    })?;
    lab.remove("policy.yaml")?;
    lab.remove("more.yaml")
}

fn half_written(lab: &Lab) -> Result<()> {
    let deny =
        yaml::policy("app", "deny", "server", "DENY", "[{from: [{source: {namespaces: [app]}}]}]");
    let path = lab.folder().join("policy.yaml");
    // In pieces, as a slow editor or copy does it: never more than the whole is in force, and then it is.
    for end in [10, 60, deny.len() - 20] {
        std::fs::write(&path, &deny[..end])?;
        ensure!(works(lab)?, "a part of the file is in force");
    }
    std::fs::write(&path, &deny)?;
    lab.until("the whole file to be in force", || Ok(!works(lab)?))?;
    // Other names, swap files and folders mean nothing.
    std::fs::rename(&path, lab.folder().join("policy.yaml~"))?;
    lab.until("the renamed file to be out of force", || works(lab))?;
    lab.remove("policy.yaml~")
}

fn unknown_kind(lab: &Lab) -> Result<()> {
    let text = "apiVersion: example.com/v1\nkind: Flux\nmetadata: {name: x, namespace: app}\n";
    complains(lab, "kind.yaml", text, &["kind.yaml:", "Flux"])
}

fn unknown_field(lab: &Lab) -> Result<()> {
    let text = yaml::service("app", "extra", "server", &[("http", 80, "8080")])
        .replace("  selector", "  selectr: {a: b}\n  selector");
    complains(lab, "field.yaml", &text, &["field.yaml:6", "selectr"])
}

fn wrong_type(lab: &Lab) -> Result<()> {
    let text = yaml::service("app", "extra", "server", &[("http", 80, "8080")])
        .replace("port: 80,", "port: eighty,");
    complains(lab, "type.yaml", &text, &["type.yaml:8", "port"])
}

fn dangling_selector(lab: &Lab) -> Result<()> {
    let text = yaml::service("app", "lonely", "nobody", &[("http", 80, "8080")]);
    lab.write("lonely.yaml", &text)?;
    lab.until("the service", || Ok(lab.status()?.service("app/lonely").is_some()))?;
    let before = lab.access_log("node-1")?.len();
    lab.until("a refusal with its reason", || {
        let ran = lab.exec("app/client", &["curl", "-sS", "--max-time", "3", "http://lonely/"])?;
        ran.failed()?;
        let seen = lab.access_log("node-1")?;
        Ok(seen
            .iter()
            .skip(before)
            .any(|l| l.has(&[("reason", "no_healthy_endpoint"), ("src.workload", "client")])))
    })?;
    let ran = lab.can("pod:app/client", "app/lonely:80")?;
    ensure!(ran.code == 1 && ran.out.contains("no_healthy_endpoint"), "{ran:?}");
    lab.remove("lonely.yaml")
}

fn no_such_node(lab: &Lab) -> Result<()> {
    let text = yaml::pod("app", "lost", 9).image("meshprobe", &["pause"]).yaml();
    complains(lab, "lost.yaml", &text, &["lost.yaml:", "node-9"])
}

fn duplicate_address(lab: &Lab) -> Result<()> {
    let vip = lab.service_ip("app/server", false)?;
    let text = yaml::service("app", "thief", "nobody", &[("http", 80, "8080")])
        .replace("ipFamilyPolicy: RequireDualStack", &format!("clusterIP: {vip}"));
    complains(lab, "thief.yaml", &text, &["thief.yaml:", &vip])?;
    ensure!(lab.service_ip("app/server", false)? == vip, "the first one keeps it");
    Ok(())
}

fn duplicate_object(lab: &Lab) -> Result<()> {
    let text = yaml::service("app", "server", "nobody", &[("http", 80, "8080")]);
    complains(lab, "zz-again.yaml", &text, &["zz-again.yaml:", "server"])
}

fn crash_loop(lab: &Lab) -> Result<()> {
    let pod = yaml::pod("app", "crash", 1).script("echo last words; exit 7").yaml();
    lab.write("crash.yaml", &pod)?;
    lab.until("CrashLoopBackOff", || {
        let status = lab.status()?;
        let pod = status.pod("app/crash").context("the pod is not there")?;
        ensure!(
            pod.state == "CrashLoopBackOff" && pod.restarts >= 2 && pod.message.contains('7'),
            "{pod:?}"
        );
        Ok(true)
    })?;
    ensure!(lab.pod_log("app/crash")?.contains("last words"));
    ensure!(works(lab)?, "nothing else may suffer");
    lab.remove("crash.yaml")?;
    lab.until("the pod to be gone", || Ok(lab.status()?.pod("app/crash").is_none()))?;
    Ok(())
}

fn unknown_image(lab: &Lab) -> Result<()> {
    let pod = yaml::pod("app", "strange", 1).image("registry.example/strange:1", &[]).yaml();
    lab.write("strange.yaml", &pod)?;
    lab.until("a word about the image", || {
        let status = lab.status()?;
        let pod = status.pod("app/strange").context("the pod is not there")?;
        ensure!(
            !pod.ready && pod.message.contains("--image registry.example/strange:1="),
            "{pod:?}"
        );
        Ok(true)
    })?;
    ensure!(works(lab)?, "nothing else may suffer");
    lab.remove("strange.yaml")?;
    lab.until("the pod to be gone", || Ok(lab.status()?.pod("app/strange").is_none()))?;
    Ok(())
}

fn garbage(lab: &Lab) -> Result<()> {
    let gate = format!("{}:15008", lab.pod_ip("app/server", false)?);
    let before = lab.access_log("node-2")?.len();
    for _ in 0..20 {
        let ran =
            lab.exec_with("plain/outsider", &["/image/meshprobe", "garbage", &gate], "", SOON)?;
        let end: Value = serde_json::from_str(ran.ok()?.trim())?;
        ensure!(end["end"] == "reset" || end["end"] == "eof", "{end}");
    }
    lab.wait_for_access(
        "node-2",
        before,
        &[("direction", "inbound"), ("reason", "tunnel_handshake")],
    )
    .or_else(|_| {
        lab.wait_for_access(
            "node-2",
            before,
            &[("direction", "inbound"), ("reason", "peer_certificate")],
        )
    })?;
    ensure!(works(lab)?, "nothing else may suffer");
    Ok(())
}

/// A peer with a good certificate and bad manners.
fn endless_headers(lab: &Lab) -> Result<()> {
    let probe = programs::path_of_ours("meshprobe")?;
    let gate = format!("{}:15008", lab.pod_ip("app/server", false)?);
    let target = format!("{}:8080", lab.pod_ip("app/server", false)?);
    let status = lab.status()?;
    let log = status.processes.first().context("no processes")?.log.clone();
    let state = log.rsplit_once("/logs/").context("the log lies in STATE/logs")?.0.to_owned();
    let find = format!("cat $(find {state} -name '*.pem' -path '*node-1*' | head -1)");
    let pem = lab.exec("node-1", &["sh", "-c", &find])?.out;
    let call = |header: &str| -> Result<Value> {
        let argv = [
            &probe,
            "tunnel",
            &gate,
            &target,
            "--expect",
            "spiffe://cluster.local/ns/app/sa/server",
            "--header",
            header,
            "--send",
            "GET / HTTP/1.0\r\n\r\n",
        ];
        let ran = lab.exec_with("node-1", &argv, &pem, SOON)?;
        serde_json::from_str(ran.ok()?.trim()).with_context(|| format!("{ran:?}"))
    };
    // The control: a header of ordinary size is taken.
    let got = call("200")?;
    ensure!(got["connected"] == true, "{got}");
    let got = call("1000000")?;
    ensure!(got["connected"] == false, "{got}");
    ensure!(works(lab)?, "nothing else may suffer");
    Ok(())
}

fn silent_peer(lab: &Lab) -> Result<()> {
    let gate = format!("{}:15008", lab.pod_ip("app/server", false)?);
    let mut silent = lab.exec_in_background(
        "plain/outsider",
        &["/image/meshprobe", "end", &gate, "--timeout", "60"],
    )?;
    wait_until("the mesh to work beside it", SOON, || works(lab))?;
    // It is not waited for without end.
    wait_until("the silent peer to be given up", Duration::from_secs(30), || {
        Ok(!silent.is_running()?)
    })?;
    let ran = silent.wait(SOON)?;
    ensure!(!ran.out.contains("timeout"), "{ran:?}");
    Ok(())
}
