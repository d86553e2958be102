//! Settings: flags, then environment, then the file of `--config`, then defaults; the first one counts.
//!
//! [`Args`] and [`FileConfig`] are what the user wrote; [`Config`] is what holds, checked.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::RawFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use compile::MeshConfig;
use model::Identity;
use serde::Deserialize;

/// Where proxies find xDS and the CA, as in Istio.
const XDS_PORT: u16 = 15012;
/// Where metrics and readiness are, as in Istio.
const STATUS_PORT: u16 = 15014;
/// Shorter certificates would expire on their way; X.509 counts seconds.
const MIN_LEAF_TTL: Duration = Duration::from_secs(2);
/// A stolen key should not be good for longer than a week.
const MAX_LEAF_TTL: Duration = Duration::from_secs(7 * 24 * 3600);
const DEFAULT_LEAF_TTL: Duration = Duration::from_secs(24 * 3600);

/// The control plane of a mesh on one machine: reads folders of Kubernetes YAML, configures the node
/// proxies (xDS) and issues their certificates (CA).
#[derive(Clone, Debug, Default, clap::Parser)]
#[command(name = "istiod-lite", version)]
pub struct Args {
    /// Folder with YAML or JSON files; may be given several times. For an object that is in several
    /// folders the last folder counts. Subfolders are not read, as with `kubectl apply -f DIR`.
    #[arg(long = "dir", value_name = "DIR")]
    pub dirs: Vec<PathBuf>,
    /// Address for xDS and the CA (TLS); may be given several times [default: 127.0.0.1:15012]
    #[arg(long, value_name = "IP:PORT")]
    pub listen: Vec<SocketAddr>,
    /// Folder for the CA's keys and for diagnostics.json. Proxies find the root of trust in it:
    /// root-cert.pem.
    #[arg(long, value_name = "DIR", env = "ISTIOD_LITE_STATE_DIR")]
    pub state_dir: Option<PathBuf>,
    /// Trust domain of every identity [default: cluster.local]
    #[arg(long, value_name = "NAME", env = "ISTIOD_LITE_TRUST_DOMAIN")]
    pub trust_domain: Option<String>,
    /// Name of the cluster [default: Kubernetes]
    #[arg(long, value_name = "NAME", env = "ISTIOD_LITE_CLUSTER")]
    pub cluster: Option<String>,
    /// Name of the network [default: empty]
    #[arg(long, value_name = "NAME", env = "ISTIOD_LITE_NETWORK")]
    pub network: Option<String>,
    /// Namespace whose policies hold for the whole mesh [default: istio-system]
    #[arg(long, value_name = "NAMESPACE", env = "ISTIOD_LITE_ROOT_NAMESPACE")]
    pub root_namespace: Option<String>,
    /// DNS suffix of Services [default: cluster.local]
    #[arg(long, value_name = "NAME", env = "ISTIOD_LITE_CLUSTER_DOMAIN")]
    pub cluster_domain: Option<String>,
    /// Inherited unix stream socket over which the launcher tells which node tokens it handed out
    #[arg(long, value_name = "FD")]
    pub token_registry_fd: Option<RawFd>,
    /// Lifetime of workload certificates, for example 24h, 90m or 30s [default: 24h]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration, env = "ISTIOD_LITE_LEAF_TTL")]
    pub leaf_ttl: Option<Duration>,
    /// Address for metrics, readiness and debugging (plain HTTP) [default: 127.0.0.1:15014]
    #[arg(long, value_name = "IP:PORT", env = "ISTIOD_LITE_STATUS_LISTEN")]
    pub status_listen: Option<SocketAddr>,
    /// JSON file with these settings, named like the flags without the dashes in front
    #[arg(long, value_name = "FILE", env = "ISTIOD_LITE_CONFIG")]
    pub config: Option<PathBuf>,
}

/// The file of `--config`. A key that does not exist is an error: a misspelt setting must not be ignored.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, rename_all = "kebab-case", default)]
pub struct FileConfig {
    dir: Vec<PathBuf>,
    listen: Vec<SocketAddr>,
    state_dir: Option<PathBuf>,
    trust_domain: Option<String>,
    cluster: Option<String>,
    network: Option<String>,
    root_namespace: Option<String>,
    cluster_domain: Option<String>,
    leaf_ttl: Option<String>,
    status_listen: Option<SocketAddr>,
}

/// What holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    pub dirs: Vec<PathBuf>,
    pub listen: Vec<SocketAddr>,
    pub state_dir: PathBuf,
    pub mesh: MeshConfig,
    pub token_registry_fd: Option<RawFd>,
    pub leaf_ttl: Duration,
    pub status_listen: SocketAddr,
}

/// Which setting is wrong. The user must change it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

impl Config {
    /// A mesh with every default, for a program that starts the control plane itself.
    pub fn new(dirs: Vec<PathBuf>, state_dir: PathBuf) -> Self {
        Self {
            dirs,
            listen: vec![(Ipv4Addr::LOCALHOST, XDS_PORT).into()],
            state_dir,
            mesh: MeshConfig::default(),
            token_registry_fd: None,
            leaf_ttl: DEFAULT_LEAF_TTL,
            status_listen: (Ipv4Addr::LOCALHOST, STATUS_PORT).into(),
        }
    }

    /// Puts flags and file together and checks the result.
    pub fn resolve(args: Args, file: FileConfig) -> Result<Self, ConfigError> {
        let state_dir = args.state_dir.or(file.state_dir).ok_or_else(|| {
            ConfigError("--state-dir is missing: the CA needs a folder for its keys".into())
        })?;
        let mut config = Self::new(one_of(args.dirs, file.dir), state_dir);
        config.listen = one_of(one_of(args.listen, file.listen), config.listen);
        let set = |target: &mut model::Str, flag: Option<String>, file: Option<String>| {
            if let Some(value) = flag.or(file) {
                *target = value.into();
            }
        };
        let mesh = &mut config.mesh;
        set(&mut mesh.trust_domain, args.trust_domain, file.trust_domain);
        set(&mut mesh.cluster, args.cluster, file.cluster);
        set(&mut mesh.network, args.network, file.network);
        set(&mut mesh.root_namespace, args.root_namespace, file.root_namespace);
        set(&mut mesh.cluster_domain, args.cluster_domain, file.cluster_domain);
        config.token_registry_fd = args.token_registry_fd;
        let file_ttl = file.leaf_ttl.map(|text| parse_duration(&text)).transpose();
        let file_ttl = file_ttl.map_err(|e| ConfigError(format!("leaf-ttl: {e}")))?;
        config.leaf_ttl = args.leaf_ttl.or(file_ttl).unwrap_or(config.leaf_ttl);
        config.status_listen =
            args.status_listen.or(file.status_listen).unwrap_or(config.status_listen);
        config.check()?;
        Ok(config)
    }

    fn check(&self) -> Result<(), ConfigError> {
        let wrong = |text: String| Err(ConfigError(text));
        if self.dirs.is_empty() {
            return wrong("--dir is missing: which folder holds the YAML?".into());
        }
        let mut seen = BTreeSet::new();
        for dir in &self.dirs {
            if !seen.insert(dir) {
                return wrong(format!("--dir {} is given twice", dir.display()));
            }
        }
        // The trust domain becomes part of every identity: it must survive the round trip.
        let td = &self.mesh.trust_domain;
        let probe = Identity::new(td.clone(), "ns", "sa");
        if probe.to_string().parse::<Identity>().as_ref() != Ok(&probe) {
            return wrong(format!("--trust-domain {td:?} cannot be part of a SPIFFE name"));
        }
        for (flag, value) in [
            ("--cluster", &self.mesh.cluster),
            ("--root-namespace", &self.mesh.root_namespace),
            ("--cluster-domain", &self.mesh.cluster_domain),
        ] {
            if value.is_empty() || value.contains(|c: char| c.is_whitespace() || c == '/') {
                return wrong(format!(
                    "{flag} {value:?} must be a name without spaces and slashes"
                ));
            }
        }
        if self.leaf_ttl < MIN_LEAF_TTL || self.leaf_ttl > MAX_LEAF_TTL {
            return wrong(format!(
                "--leaf-ttl {:?} is not between {MIN_LEAF_TTL:?} and 7 days",
                self.leaf_ttl
            ));
        }
        Ok(())
    }
}

impl FileConfig {
    /// Parses the text of a settings file; `path` is for the message.
    pub fn parse(path: &Path, text: &str) -> Result<Self, ConfigError> {
        serde_json::from_str(text).map_err(|e| ConfigError(format!("{}: {e}", path.display())))
    }
}

fn one_of<T>(first: Vec<T>, second: Vec<T>) -> Vec<T> {
    if first.is_empty() { second } else { first }
}

/// `24h`, `90m`, `30s`.
fn parse_duration(text: &str) -> Result<Duration, String> {
    let error = || format!("{text:?} is not a duration like 24h, 90m or 30s");
    let unit = text.char_indices().next_back().map(|(i, c)| (&text[..i], c));
    let (number, seconds) = match unit {
        Some((number, 's')) => (number, 1),
        Some((number, 'm')) => (number, 60),
        Some((number, 'h')) => (number, 3600),
        _ => return Err(error()),
    };
    let number: u64 = number.parse().map_err(|_| error())?;
    number.checked_mul(seconds).map(Duration::from_secs).ok_or_else(error)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    fn resolve(flags: &str, file: &str) -> Result<Config, String> {
        let args =
            Args::try_parse_from(["istiod-lite"].into_iter().chain(flags.split_whitespace()))
                .map_err(|e| e.to_string())?;
        let file = if file.is_empty() {
            FileConfig::default()
        } else {
            FileConfig::parse(Path::new("c.json"), file).map_err(|e| e.to_string())?
        };
        Config::resolve(args, file).map_err(|e| e.to_string())
    }

    #[test]
    fn flags_win_over_the_file_and_the_file_over_defaults() {
        let base = Config::new(vec!["a".into()], "s".into());
        let check = |flags: &str, file: &str, want: Config| {
            assert_eq!(resolve(flags, file), Ok(want), "{flags} {file}");
        };
        check("--dir a --state-dir s", "", base.clone());
        check("", r#"{"dir": ["a"], "state-dir": "s"}"#, base.clone());
        let two = Config { dirs: vec!["b".into(), "c".into()], ..base.clone() };
        check("--dir b --dir c --state-dir s", r#"{"dir": ["a"]}"#, two);
        let mut td = base.clone();
        td.mesh.trust_domain = "flag".into();
        check(
            "--dir a --state-dir s --trust-domain flag",
            r#"{"trust-domain": "file"}"#,
            td.clone(),
        );
        td.mesh.trust_domain = "file".into();
        check("--dir a --state-dir s", r#"{"trust-domain": "file"}"#, td);
        let ttl = Config { leaf_ttl: Duration::from_secs(5400), ..base.clone() };
        check("--dir a --state-dir s --leaf-ttl 90m", r#"{"leaf-ttl": "1h"}"#, ttl);
        let listen = Config {
            listen: vec!["10.89.0.1:15012".parse().unwrap(), "[fd89::1]:15012".parse().unwrap()],
            token_registry_fd: Some(7),
            ..base
        };
        check(
            "--dir a --state-dir s --listen 10.89.0.1:15012 --listen [fd89::1]:15012 --token-registry-fd 7",
            "",
            listen,
        );
    }

    #[test]
    fn mistakes_are_named() {
        let check = |flags: &str, file: &str, want: &str| {
            let error = resolve(flags, file).unwrap_err();
            assert!(error.contains(want), "{error} should say {want}");
        };
        check("--state-dir s", "", "--dir is missing");
        check("--dir a", "", "--state-dir is missing");
        check("--dir a --dir a --state-dir s", "", "given twice");
        check("--dir a --state-dir s --trust-domain a/b", "", "--trust-domain");
        check("--dir a --state-dir s --leaf-ttl 1s", "", "--leaf-ttl");
        check("--dir a --state-dir s --leaf-ttl 200h", "", "--leaf-ttl");
        check("--dir a --state-dir s --leaf-ttl 1", "", "24h, 90m or 30s");
        check("--dir a --state-dir s --leaf-ttl 1ä", "", "24h, 90m or 30s");
        check("--dir a --state-dir s --listen nowhere", "", "--listen");
        check("--dir a --state-dir s", r#"{"trustDomain": "x"}"#, "unknown field `trustDomain`");
        check("--dir a --state-dir s", r#"{"listen": ["x"]}"#, "c.json: ");
        check("--dir a --state-dir s", r#"{"leaf-ttl": "x"}"#, "leaf-ttl");
        check("--nonsense", "", "--nonsense");
    }
}
