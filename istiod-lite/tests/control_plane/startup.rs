//! What stands in the way of a start is named, with what to do.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;

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
