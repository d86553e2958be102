//! What stands in the way of a start is named, with what to do.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::*;
use istiod_lite::tokens::registry_line;
use istiod_lite::{Inputs, start};

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let taken = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let taken = taken.local_addr().map(|a| (a, taken)).unwrap();
    let check = async |flag: &str| {
        let mut config = config(dir.path());
        match flag {
            "--listen" => config.listen.push(taken.0),
            _ => config.status_listen = taken.0,
        }
        let error = start(config, Inputs::default()).await.unwrap_err().to_string();
        assert!(error.contains(&taken.0.to_string()) && error.contains(flag), "{error}");
    };
    check("--listen").await;
    check("--status-listen").await;
}

#[tokio::test]
async fn a_foreign_address_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.listen = vec!["192.0.2.1:15012".parse().unwrap()];
    let error = start(config, Inputs::default()).await.unwrap_err().to_string();
    assert!(error.contains("192.0.2.1:15012") && error.contains("no interface"), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_state_directory_serves_one() {
    let w = World::start(&[]).await;
    let error = start(config(w.dir.path()), Inputs::default()).await.unwrap_err().to_string();
    assert!(error.contains("--state-dir"), "{error}");
    let World { running, dir } = w;
    running.stop().await;
    start(config(dir.path()), Inputs::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_others_may_read_is_refused() {
    use std::os::unix::fs::PermissionsExt;
    let w = World::start(&[]).await;
    let key = state_file(&w, "root-key.pem");
    let World { running, dir } = w;
    running.stop().await;
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    let error = start(config(dir.path()), Inputs::default()).await.unwrap_err().to_string();
    assert!(error.contains("chmod 600") && error.contains("root-key.pem"), "{error}");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o600)).unwrap();
    start(config(dir.path()), Inputs::default()).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn the_launcher_registers_tokens_over_its_socket() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("yaml")).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    let inputs = Inputs { token_registry: Some(theirs), epoch: None };
    let running = start(config(dir.path()), inputs).await.unwrap();
    within("ready", running.ready()).await;
    let w = World { dir, running };
    let answers = tokio::task::spawn_blocking(move || {
        let mut lines = BufReader::new(ours.try_clone().unwrap()).lines();
        let mut ask = |line: &str| {
            writeln!(&ours, "{line}").unwrap();
            lines.next().unwrap().unwrap()
        };
        let answers = [
            ask("nonsense"),
            ask(&registry_line("NODE", "x")),
            ask(&registry_line("node-1", "secret")),
        ];
        (answers, ours)
    });
    let (answers, _ours) = within("answers", answers).await.unwrap();
    assert!(answers[0].contains("error") && answers[1].contains("error"), "{answers:?}");
    assert_eq!(answers[2], r#"{"node":"node-1","ok":true}"#);
    let stranger = w.stranger().await;
    stranger.certificate(Call::default().bearer("secret")).await.unwrap();
    assert!(stranger.certificate(Call::default().bearer("secret")).await.is_err());
    w.running.stop().await;
}

/// The real program, with the folders of `dir`.
fn program(dir: &std::path::Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_istiod-lite"));
    command.arg("--dir").arg(dir.join("yaml")).arg("--state-dir").arg(dir.join("state"));
    command.args(["--listen", "127.0.0.1:0", "--status-listen", "127.0.0.1:0"]);
    command.env("RUST_LOG", "info").stderr(Stdio::piped());
    command
}

/// Reads the log until a line contains `what`.
fn log_line(child: &mut Child, what: &str) -> String {
    let lines = BufReader::new(child.stderr.as_mut().unwrap()).lines();
    lines.map(Result::unwrap).find(|line| line.contains(what)).expect("the log ended")
}

#[tokio::test(flavor = "multi_thread")]
async fn the_program_takes_tokens_serves_and_ends_gently() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("yaml")).unwrap();
    let (ours, theirs) = UnixStream::pair().unwrap();
    fcntl(&theirs, FcntlArg::F_SETFD(FdFlag::empty())).unwrap();
    let mut command = program(dir.path());
    command.args(["--token-registry-fd", &theirs.as_raw_fd().to_string()]);
    let mut child = command.spawn().unwrap();
    drop(theirs);
    let line = log_line(&mut child, "listening");
    let (_, rest) = line.split_once("proxies=[").unwrap();
    let address = rest.split_once(']').unwrap().0.parse().unwrap();
    writeln!(&ours, "{}", registry_line("node-1", "secret")).unwrap();
    let mut answer = String::new();
    BufReader::new(&ours).read_line(&mut answer).unwrap();
    assert!(answer.contains("true"), "{answer}");
    let root = std::fs::read(dir.path().join("state/root-cert.pem")).unwrap();
    use rustls_pki_types::pem::PemObject;
    let roots = vec![rustls_pki_types::CertificateDer::from_pem_slice(&root).unwrap()];
    let stranger = Channel::open(address, roots, None).await.unwrap();
    stranger.certificate(Call::default().bearer("secret")).await.unwrap();
    kill(Pid::from_raw(child.id().try_into().unwrap()), Signal::SIGTERM).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn the_program_says_why_it_does_not_start() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("yaml")).unwrap();
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let taken = taken.local_addr().map(|a| (a.to_string(), taken)).unwrap();
    std::fs::write(dir.path().join("c.json"), r#"{"leaf_ttl": "1h"}"#).unwrap();
    let settings = dir.path().join("c.json");
    let check = |args: &[&str], want: &[&str]| {
        let output = program(dir.path()).args(args).output().unwrap();
        assert!(!output.status.success());
        let log = String::from_utf8(output.stderr).unwrap();
        want.iter().for_each(|part| assert!(log.contains(part), "{log} should say {part}"));
    };
    check(&["--listen", &taken.0], &["cannot listen on", &taken.0, "--listen"]);
    check(&["--token-registry-fd", "999"], &["--token-registry-fd 999", "not open"]);
    check(&["--token-registry-fd", "1"], &["standard stream"]);
    check(&["--leaf-ttl", "1s"], &["--leaf-ttl"]);
    check(&["--config", settings.to_str().unwrap()], &["c.json", "unknown field `leaf_ttl`"]);
}
