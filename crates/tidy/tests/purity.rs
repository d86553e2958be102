//! The purity wall: model, engine, compile and xds name no socket, clock, random source, environment
//! or `async`, neither in their dependencies nor in their source.

use std::process::Command;

use tidy::{PURE_CRATES, Source, is_test_file, packages, read, report, root, rust_files, shown};

/// Crates that do IO, read a clock, or draw random numbers. A dependency on one of these, however
/// deep, puts a crate on the wrong side of the wall. The facade `kube` is not here: without a feature it is types
/// and derives; what does IO behind it is `kube-client` and `kube-runtime`.
const IMPURE: [&str; 38] = [
    "async-std",
    "aws-lc-rs",
    "aws-lc-sys",
    "chrono",
    "curl",
    "fastrand",
    "futures-executor",
    "getrandom",
    "h2",
    "hickory-resolver",
    "hyper",
    "hyper-util",
    "inotify",
    "kube-client",
    "kube-runtime",
    "libc",
    "log4rs",
    "mio",
    "native-tls",
    "nix",
    "notify",
    "openssl",
    "rand",
    "rand_core",
    "reqwest",
    "ring",
    "rustix",
    "rustls",
    "signal-hook",
    "smol",
    "socket2",
    "tempfile",
    "tokio",
    "tokio-rustls",
    "tonic",
    "tracing-subscriber",
    "uuid",
    "ureq",
];

/// Words that a pure crate's source must not hold.
const IMPURE_WORDS: [&[&str]; 18] = [
    &["async"],
    &["await"],
    &["Instant", ":", ":", "now"],
    &["SystemTime", ":", ":", "now"],
    &["std", ":", ":", "env"],
    &["std", ":", ":", "fs"],
    &["std", ":", ":", "process"],
    &["std", ":", ":", "thread"],
    &["std", ":", ":", "os"],
    &["TcpStream"],
    &["TcpListener"],
    &["UdpSocket"],
    &["UnixStream"],
    &["UnixDatagram"],
    &["RandomState"],
    &["thread_rng"],
    &["println", "!"],
    &["eprintln", "!"],
];

#[test]
fn pure_crates_depend_on_nothing_impure() {
    let findings: Vec<String> =
        PURE_CRATES.iter().flat_map(|krate| impure_in(krate, &dependencies(krate))).collect();
    report(
        "a pure crate depends on what does IO (cargo tree -e normal -i DEPENDENCY -p CRATE shows the way)",
        &findings,
    );
}

/// The control: where tokio is, the rule sees it.
#[test]
fn the_dependency_rule_sees_tokio_in_agent() {
    let seen = impure_in("agent", &dependencies("agent"));
    assert!(seen.iter().any(|f| f.contains("tokio")), "the rule is blind: {seen:?}");
}

#[test]
fn pure_crates_name_nothing_impure() {
    let mut findings = Vec::new();
    for package in packages().iter().filter(|p| PURE_CRATES.contains(&p.name.as_str())) {
        for path in rust_files(&root().join(&package.dir).join("src")) {
            if is_test_file(&path) {
                continue;
            }
            let source = Source::parse(&read(&path))
                .unwrap_or_else(|| panic!("{} is not Rust", shown(&path)));
            findings.extend(
                impure_words(&source)
                    .map(|(line, word)| format!("{}:{line} names {word}", shown(&path))),
            );
        }
    }
    report("a pure crate names a socket, clock, random source, environment or async", &findings);
}

/// The control: what the rule forbids, it finds.
#[test]
fn the_source_rule_finds_each_word() {
    for words in IMPURE_WORDS {
        let source = Source::parse(&format!("fn f() {{ let _ = {}; }}", words.concat())).unwrap();
        assert_eq!(impure_words(&source).count(), 1, "{words:?}");
    }
}

fn impure_words(source: &Source) -> impl Iterator<Item = (usize, String)> {
    IMPURE_WORDS.iter().flat_map(|words| {
        source.lines_of(words).into_iter().map(move |line| (line, words.concat()))
    })
}

fn impure_in(krate: &str, dependencies: &[String]) -> Vec<String> {
    IMPURE
        .iter()
        .filter(|bad| dependencies.iter().any(|d| d == *bad))
        .map(|bad| format!("{krate} depends on {bad}"))
        .collect()
}

/// Names of everything `krate` links. `cargo tree`, not `cargo metadata`: features unify over the
/// workspace there, and a dependency that only another crate switches on would show.
fn dependencies(krate: &str) -> Vec<String> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args([
            "tree",
            "--edges",
            "normal",
            "--prefix",
            "none",
            "--format",
            "{p}",
            "--package",
            krate,
        ])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "cargo tree --package {krate}: {errors}");
    let text = String::from_utf8(output.stdout).expect("cargo prints UTF-8");
    let names: Vec<String> = text
        .lines()
        // Procedural macros run in the compiler, not in the crate.
        .filter(|line| !line.contains("(proc-macro)"))
        .filter_map(|line| line.split(' ').next())
        .map(str::to_owned)
        .collect();
    assert!(
        names.iter().any(|n| n == krate),
        "cargo tree --package {krate} does not list the crate itself"
    );
    names
}
