//! istio-cni's node agent: ZDS towards `ztunnel`, redirection in the pods.
//!
//! The rules are those of Istio's `cni/pkg/iptables` with DNS capture, chain by chain, in nftables' words.

use std::io::{self, IoSlice};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use net::NetNs;
use nix::sys::socket::{
    AddressFamily, Backlog, ControlMessage, MsgFlags, SockFlag, SockType, UnixAddr, accept4, bind,
    listen, recv, sendmsg, setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;
use prost::Message as _;
use xds::zds::workload_request::Payload;
use xds::zds::{
    AddWorkload, DelWorkload, KeepWorkload, SnapshotSent, WorkloadInfo, WorkloadRequest,
    WorkloadResponse, workload_response,
};

use crate::command;
use crate::programs;
use crate::stock::world::Pod;

/// No answer takes longer, on a machine under load.
const PATIENCE: i64 = 20;
const SOON: Duration = Duration::from_secs(20);
/// What a ztunnel of version 1 says first: field 1, a number, 1.
const HELLO: [u8; 2] = [0x08, 0x01];

/// One node's agent.
#[derive(Debug)]
pub struct NodeAgent {
    listener: OwnedFd,
    line: Option<OwnedFd>,
}

impl NodeAgent {
    pub fn listen(path: &Path) -> Result<Self> {
        let listener =
            socket(AddressFamily::Unix, SockType::SeqPacket, SockFlag::SOCK_CLOEXEC, None)?;
        bind(listener.as_raw_fd(), &UnixAddr::new(path)?).context("bind the ZDS socket")?;
        listen(&listener, Backlog::new(4)?)?;
        setsockopt(&listener, sockopt::ReceiveTimeout, &TimeVal::new(PATIENCE, 0))?;
        Ok(Self { listener, line: None })
    }

    /// Takes the next ztunnel and reads its hello.
    pub fn accept(&mut self) -> Result<()> {
        self.line = None;
        let fd = accept4(self.listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)
            .context("ztunnel does not connect to the ZDS socket")?;
        #[expect(unsafe_code, reason = "accept returns a number")]
        // SAFETY: the kernel has just made this number for us.
        let line = unsafe { OwnedFd::from_raw_fd(fd) };
        setsockopt(&line, sockopt::ReceiveTimeout, &TimeVal::new(PATIENCE, 0))?;
        let hello = receive(&line)?;
        ensure!(hello == HELLO, "ztunnel's hello is {hello:02x?}");
        self.line = Some(line);
        Ok(())
    }

    /// Hangs up, as an agent does that speaks another version or ends.
    pub fn hang_up(&mut self) {
        self.line = None;
    }

    /// Hands over a pod; the error is ztunnel's.
    pub fn add(&self, pod: &Pod) -> Result<()> {
        let info = WorkloadInfo {
            name: pod.name.clone(),
            namespace: pod.namespace.clone(),
            service_account: pod.account.clone(),
        };
        let add = AddWorkload { uid: pod.uid.clone(), workload_info: Some(info) };
        self.ask(Payload::Add(add), Some(&pod.ns))
    }

    /// The same without the namespace: a mistake.
    pub fn add_without_namespace(&self, pod: &Pod) -> Result<()> {
        let add =
            AddWorkload { uid: pod.uid.clone(), workload_info: Some(WorkloadInfo::default()) };
        self.ask(Payload::Add(add), None)
    }

    pub fn keep(&self, pod: &Pod) -> Result<()> {
        self.ask(Payload::Keep(KeepWorkload { uid: pod.uid.clone() }), None)
    }

    pub fn remove(&self, pod: &Pod) -> Result<()> {
        self.ask(Payload::Del(DelWorkload { uid: pod.uid.clone() }), None)
    }

    pub fn all_sent(&self) -> Result<()> {
        self.ask(Payload::SnapshotSent(SnapshotSent {}), None)
    }

    fn ask(&self, payload: Payload, ns: Option<&NetNs>) -> Result<()> {
        let line = self.line.as_ref().context("there is no ztunnel")?;
        let packet = WorkloadRequest { payload: Some(payload) }.encode_to_vec();
        let files: Vec<_> = ns.iter().map(|ns| ns.as_fd().as_raw_fd()).collect();
        let rights = [ControlMessage::ScmRights(&files)];
        let rights = if files.is_empty() { &[][..] } else { &rights[..] };
        sendmsg::<()>(
            line.as_raw_fd(),
            &[IoSlice::new(&packet)],
            rights,
            MsgFlags::MSG_NOSIGNAL,
            None,
        )?;
        let answer = WorkloadResponse::decode(&*receive(line)?)?;
        let Some(workload_response::Payload::Ack(ack)) = answer.payload else {
            bail!("ztunnel's answer is no acknowledgement")
        };
        ensure!(ack.error.is_empty(), "ztunnel: {}", ack.error);
        Ok(())
    }
}

fn receive(line: &OwnedFd) -> Result<Vec<u8>> {
    let mut buffer = vec![0; 64 * 1024];
    let n = recv(line.as_raw_fd(), &mut buffer, MsgFlags::empty())
        .map_err(io::Error::from)
        .context("ztunnel says nothing on the ZDS line")?;
    ensure!(n > 0, "ztunnel closed the ZDS line");
    buffer.truncate(n);
    Ok(buffer)
}

/// Puts redirection into a pod, as istio-cni does before it tells ztunnel.
pub fn redirect(pod: &Pod) -> Result<()> {
    for (family, loopback, probes) in [
        ("ip", "127.0.0.1", "169.254.7.127"),
        ("ip6", "::1", "fd16:9254:7127:1337:ffff:ffff:ffff:ffff"),
    ] {
        let mut command = Command::new(programs::find("nft")?);
        command.args(["-f", "-"]);
        let rules = rules(family, loopback, probes);
        pod.ns.run(|| command::run(command, &rules, SOON))??.ok()?;
        let (flag, all) = if family == "ip" { ("-4", "0.0.0.0/0") } else { ("-6", "::/0") };
        pod.ip(&[flag, "route", "add", "local", all, "dev", "lo", "table", "100"])?;
        let rule = ["rule", "add", "fwmark", "0x111/0xfff", "pref", "32764", "lookup", "100"];
        pod.ip(&[&[flag][..], &rule].concat())?;
    }
    Ok(())
}

fn rules(family: &str, loopback: &str, probes: &str) -> String {
    let from_us = "meta mark and 0xfff == 0x539";
    let not_from_us = "meta mark and 0xfff != 0x539";
    let elsewhere = format!("{family} daddr != {loopback}");
    format!(
        "table {family} istio {{
  chain mangle_prerouting {{ type filter hook prerouting priority mangle;
    {from_us} ct mark set ct mark and 0xfffff000 or 0x111
  }}
  chain mangle_output {{ type route hook output priority mangle;
    ct mark and 0xfff == 0x111 meta mark set ct mark
  }}
  chain nat_prerouting {{ type nat hook prerouting priority dstnat;
    {family} saddr {probes} meta l4proto tcp accept
    {elsewhere} tcp dport != 15008 {not_from_us} redirect to :15006
  }}
  chain nat_output {{ type nat hook output priority -100;
    {family} daddr {probes} meta l4proto tcp accept
    oifname != \"lo\" udp dport 53 {not_from_us} redirect to :15053
    {elsewhere} tcp dport 53 {not_from_us} redirect to :15053
    meta l4proto tcp meta mark and 0xfff == 0x111 accept
    {elsewhere} oifname \"lo\" accept
    {elsewhere} meta l4proto tcp {not_from_us} redirect to :15001
  }}
  chain raw_prerouting {{ type filter hook prerouting priority raw;
    udp sport 53 {not_from_us} ct zone set 1
  }}
  chain raw_output {{ type filter hook output priority raw;
    udp dport 53 {from_us} ct zone set 1
  }}
}}\n"
    )
}
