//! Nodes and pods made of network namespaces on one bridge, and `ztunnel` in a node as Istio's DaemonSet starts it.
//!
//! A node's `ztunnel` sees what its container would: `/var/run/secrets` with root and token, `/var/run/ztunnel` with the
//! node agent's socket, a resolver and a name for `istiod`; and the environment of the chart, nothing else.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use net::NetNs;
use net::netlink::link::{self, VethEnd};
use xds::{security, workload};

use crate::access_log;
use crate::command::{self, Background, Ran};
use crate::programs;
use crate::stock::istiod::{self, Istiod, Resource};
use crate::stock::{NodeAgent, cni};
use crate::wait_for;

const SOON: Duration = Duration::from_secs(20);
/// The machine's end of the bridge, where `istiod` and the resolver of the nodes are.
pub const HERE: Ipv4Addr = Ipv4Addr::new(10, 9, 0, 1);
const CLUSTER: &str = "Kubernetes";
pub const TOKEN: &str = "eyJhbGciOiJSUzI1NiJ9.first.sig";

/// A cluster.
#[derive(Debug)]
pub struct World {
    pub istiod: Istiod,
    folder: tempfile::TempDir,
    _ns: NetNs,
    hosts: u8,
}

/// A node with its agent.
#[derive(Debug)]
pub struct Node {
    pub name: String,
    pub agent: NodeAgent,
    ns: NetNs,
    home: PathBuf,
    ip: IpAddr,
    ztunnel: Option<Background>,
}

/// A pod of a node.
#[derive(Debug)]
pub struct Pod {
    pub uid: String,
    pub name: String,
    pub namespace: String,
    pub account: String,
    pub ns: NetNs,
    pub v4: IpAddr,
    pub v6: IpAddr,
}

impl World {
    /// A new one, in a network of its own that the calling thread enters.
    pub fn new() -> Result<Self> {
        let ns = NetNs::create()?;
        ns.enter()?;
        ip(&["link", "set", "lo", "up"])?;
        // An address of its own: else the bridge takes that of its lowest port, another one whenever a port comes, and the
        // others keep talking to the old one for half a minute.
        ip(&["link", "add", "br0", "address", "02:00:00:00:00:01", "type", "bridge"])?;
        ip(&["addr", "add", &format!("{HERE}/16"), "dev", "br0"])?;
        ip(&["addr", "add", "fd00:9::1/64", "dev", "br0", "nodad"])?;
        ip(&["link", "set", "br0", "up"])?;
        let istiod = Istiod::start((HERE, 15012).into(), TOKEN, CLUSTER)?;
        let folder = tempfile::Builder::new().prefix("ambit-stock-").tempdir()?;
        Ok(Self { istiod, folder, _ns: ns, hosts: 10 })
    }

    /// A namespace on the bridge.
    fn host(&mut self) -> Result<(NetNs, IpAddr, IpAddr)> {
        self.hosts += 1;
        let number = self.hosts;
        let ns = NetNs::create()?;
        let here = format!("v{number}");
        link::add_veth(&VethEnd::here(&here), &VethEnd::inside("eth0", &ns))?;
        link::set_master(&here, "br0")?;
        link::up(&here)?;
        let v4 = Ipv4Addr::new(10, 9, 0, number);
        let v6 = Ipv6Addr::new(0xfd00, 9, 0, 0, 0, 0, 0, number.into());
        for args in [
            &["link", "set", "lo", "up"][..],
            &["link", "set", "eth0", "up"],
            &["addr", "add", &format!("{v4}/16"), "dev", "eth0"],
            &["addr", "add", &format!("{v6}/64"), "dev", "eth0", "nodad"],
            &["route", "add", "default", "via", &HERE.to_string()],
            &["-6", "route", "add", "default", "via", "fd00:9::1"],
        ] {
            ip_in(&ns, args)?;
        }
        Ok((ns, v4.into(), v6.into()))
    }

    /// A node whose files are as they should be; its ztunnel does not run yet.
    pub fn node(&mut self, name: &str) -> Result<Node> {
        let (ns, ip, _) = self.host()?;
        let home = self.folder.path().join(name);
        for folder in ["run/secrets/istio", "run/secrets/tokens", "run/ztunnel"] {
            fs::create_dir_all(home.join(folder))?;
        }
        fs::write(home.join("hosts"), format!("{HERE} {}\n", istiod::NAME))?;
        fs::write(home.join("resolv.conf"), format!("nameserver {HERE}\n"))?;
        let agent = NodeAgent::listen(&home.join("run/ztunnel/ztunnel.sock"))?;
        let node = Node { name: name.to_owned(), agent, ns, home, ip, ztunnel: None };
        node.write_root(self.istiod.root())?;
        node.write_token(TOKEN)?;
        Ok(node)
    }

    /// A pod, told to istiod; captured if it is to be in the mesh.
    pub fn pod(&mut self, node: &Node, name: &str, in_mesh: bool) -> Result<Pod> {
        let (ns, v4, v6) = self.host()?;
        let pod = Pod {
            uid: format!("uid-of-{name}"),
            name: name.to_owned(),
            namespace: "app".to_owned(),
            account: name.to_owned(),
            ns,
            v4,
            v6,
        };
        if in_mesh {
            cni::redirect(&pod)?;
        }
        self.istiod.set(Resource::workload(pod.workload(&node.name, in_mesh)));
        Ok(pod)
    }
}

impl Pod {
    /// What istiod says about it.
    pub fn workload(&self, node: &str, in_mesh: bool) -> workload::Workload {
        let bytes = |ip: IpAddr| match ip {
            IpAddr::V4(ip) => ip.octets().to_vec().into(),
            IpAddr::V6(ip) => ip.octets().to_vec().into(),
        };
        let protocol =
            if in_mesh { workload::TunnelProtocol::Hbone } else { workload::TunnelProtocol::None };
        workload::Workload {
            uid: format!("{CLUSTER}//Pod/{}/{}", self.namespace, self.name),
            name: self.name.clone(),
            namespace: self.namespace.clone(),
            addresses: vec![bytes(self.v4), bytes(self.v6)],
            tunnel_protocol: protocol.into(),
            service_account: self.account.clone(),
            node: node.to_owned(),
            canonical_name: self.name.clone(),
            canonical_revision: "latest".to_owned(),
            workload_type: workload::WorkloadType::Pod.into(),
            workload_name: self.name.clone(),
            cluster_id: CLUSTER.to_owned(),
            ..workload::Workload::default()
        }
    }

    /// Runs a command in the pod's network.
    pub fn exec(&self, program: &str, args: &[&str]) -> Result<Ran> {
        let mut command = Command::new(programs::find(program)?);
        command.args(args);
        self.ns.run(|| command::run(command, "", SOON))?
    }

    /// `curl`, at most for five seconds.
    pub fn curl(&self, url: &str) -> Result<Ran> {
        self.exec("curl", &["-gsS", "--fail", "--noproxy", "*", "--max-time", "5", url])
    }

    /// One of our own programs in the pod's network, until the handle is dropped.
    pub fn start(&self, program: &str, args: &[&str]) -> Result<Background> {
        let mut command = Command::new(programs::ours(program)?);
        command.args(args);
        self.ns.run(|| Background::start(command))?
    }

    pub(crate) fn ip(&self, args: &[&str]) -> Result<()> {
        ip_in(&self.ns, args)
    }
}

impl Node {
    pub fn write_root(&self, pem: &str) -> Result<()> {
        Ok(replace(&self.root_file(), pem)?)
    }

    pub fn write_token(&self, token: &str) -> Result<()> {
        Ok(replace(&self.token_file(), token)?)
    }

    pub fn root_file(&self) -> PathBuf {
        self.home.join("run/secrets/istio/root-cert.pem")
    }

    pub fn token_file(&self) -> PathBuf {
        self.home.join("run/secrets/tokens/istio-token")
    }

    /// The environment of Istio's chart with default values.
    fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("CA_ADDRESS", format!("{}:15012", istiod::NAME)),
            ("XDS_ADDRESS", format!("{}:15012", istiod::NAME)),
            ("RUST_LOG", "info,dns=debug".to_owned()),
            ("RUST_BACKTRACE", "1".to_owned()),
            ("ISTIO_META_CLUSTER_ID", CLUSTER.to_owned()),
            ("INPOD_ENABLED", "true".to_owned()),
            ("TERMINATION_GRACE_PERIOD_SECONDS", "30".to_owned()),
            ("POD_NAME", format!("ztunnel-{}", self.name)),
            ("POD_NAMESPACE", "istio-system".to_owned()),
            ("NODE_NAME", self.name.clone()),
            ("INSTANCE_IP", self.ip.to_string()),
            ("SERVICE_ACCOUNT", "ztunnel".to_owned()),
            ("ISTIO_META_ENABLE_HBONE", "true".to_owned()),
            ("ZTUNNEL_CPU_LIMIT", "2".to_owned()),
            ("KUBERNETES_SERVICE_HOST", "10.96.0.1".to_owned()),
        ]
    }

    /// The command of the DaemonSet's container.
    fn container(&self, more: &[(&str, &str)]) -> Result<Command> {
        let script = "mount --bind \"$0/hosts\" /etc/hosts && mount --bind \"$0/resolv.conf\" /etc/resolv.conf && \
                      mount --bind \"$0/run\" \"$(readlink -f /var/run)\" && cd / && \
                      exec env -i \"$@\"";
        let mut command = Command::new(programs::find("unshare")?);
        command.args(["--mount", "sh", "-ec", script]).arg(&self.home);
        let own = self.environment().into_iter().map(|(name, value)| format!("{name}={value}"));
        command.args(own).args(more.iter().map(|(name, value)| format!("{name}={value}")));
        command.arg(programs::ours("ztunnel")?).args(["proxy", "ztunnel"]);
        Ok(command)
    }

    pub fn start(&mut self) -> Result<()> {
        self.start_with(&[])
    }

    /// With more variables than the chart's.
    pub fn start_with(&mut self, more: &[(&str, &str)]) -> Result<()> {
        let command = self.container(more)?;
        self.ztunnel = Some(self.ns.run(|| Background::start(command))??);
        Ok(())
    }

    /// Ends ztunnel, as Kubernetes does.
    pub fn stop(&mut self) -> Result<Ran> {
        self.ztunnel.take().context("ztunnel does not run")?.end()
    }

    /// Runs ztunnel with more variables until it ends by itself.
    pub fn run_with(&self, more: &[(&str, &str)]) -> Result<Ran> {
        let command = self.container(more)?;
        self.ns.run(|| command::run(command, "", SOON))?
    }

    /// All that ztunnel has said.
    pub fn log(&self) -> String {
        self.ztunnel.as_ref().map(|z| format!("{}{}", z.out(), z.err())).unwrap_or_default()
    }

    /// Waits until ztunnel has said a line with all these words, behind the first `after` bytes.
    pub fn says(&self, words: &[&str]) -> Result<String> {
        let found = wait_for("ztunnel to say so", SOON, || {
            let log = self.log();
            Ok(log.lines().find(|l| words.iter().all(|w| l.contains(w))).map(str::to_owned))
        });
        found.with_context(|| format!("{words:?} in the log of {}:\n{}", self.name, self.log()))
    }

    pub fn access_log(&self) -> Vec<access_log::Line> {
        access_log::parse(&self.log())
    }

    pub fn wait_for_access(&self, fields: &[(&str, &str)]) -> Result<access_log::Line> {
        let found = wait_for("an access-log line", SOON, || {
            Ok(self.access_log().into_iter().rev().find(|l| l.has(fields)))
        });
        found.with_context(|| format!("{fields:?} in the log of {}:\n{}", self.name, self.log()))
    }

    /// Whether `/healthz/ready` says 200.
    pub fn is_ready(&self) -> Result<bool> {
        Ok(self.page(15021, "healthz/ready")?.is_ok())
    }

    /// The metrics page.
    pub fn metrics(&self) -> Result<String> {
        Ok(self.page(15020, "metrics")?.ok()?.to_owned())
    }

    fn page(&self, port: u16, path: &str) -> Result<Ran> {
        let url = format!("http://{}:{port}/{path}", self.ip);
        let mut command = Command::new(programs::find("curl")?);
        command.args(["-sS", "--fail", "--noproxy", "*", "--max-time", "5", &url]);
        command::run(command, "", SOON)
    }
}

/// A Service of Istio's kind.
pub fn service(name: &str, vip: Ipv4Addr, port: u32, target_port: u32) -> workload::Service {
    workload::Service {
        name: name.to_owned(),
        namespace: "app".to_owned(),
        hostname: hostname(name),
        addresses: vec![workload::NetworkAddress {
            address: vip.octets().to_vec().into(),
            ..workload::NetworkAddress::default()
        }],
        ports: vec![workload::Port { service_port: port, target_port, app_protocol: 0 }],
        ..workload::Service::default()
    }
}

pub fn hostname(service: &str) -> String {
    format!("{service}.app.svc.cluster.local")
}

/// ALLOW this account of the namespace, nobody else, at whatever names the policy.
pub fn allow(name: &str, account: &str) -> security::Authorization {
    let exact =
        security::string_match::MatchType::Exact(format!("cluster.local/ns/app/sa/{account}"));
    let matches = security::Match {
        principals: vec![security::StringMatch { match_type: Some(exact) }],
        ..security::Match::default()
    };
    let clause = security::Clause { matches: vec![matches] };
    security::Authorization {
        name: name.to_owned(),
        namespace: "app".to_owned(),
        scope: security::Scope::WorkloadSelector.into(),
        action: security::Action::Allow.into(),
        rules: vec![security::Rule { clauses: vec![clause] }],
        ..security::Authorization::default()
    }
}

/// Over it, as Kubernetes replaces mounted files.
fn replace(path: &Path, text: &str) -> std::io::Result<()> {
    let beside = path.with_extension("new");
    fs::write(&beside, text)?;
    fs::rename(beside, path)
}

fn ip(args: &[&str]) -> Result<()> {
    let mut command = Command::new(programs::find("ip")?);
    command.args(args);
    command::run(command, "", SOON)?.ok().map(|_| ())
}

fn ip_in(ns: &NetNs, args: &[&str]) -> Result<()> {
    ns.run(|| ip(args))?
}
