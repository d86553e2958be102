//! The smallest world with a way through two proxies: a client on one node, a server on the other.

use std::net::{IpAddr, Ipv4Addr};
use std::time::Duration;

use anyhow::{Context as _, Result, ensure};
use xds::workload;

use crate::command::Background;
use crate::stock::Resource;
use crate::stock::world::{self, Node, Pod, World};
use crate::wait_until;

/// The server's Service.
pub const VIP: Ipv4Addr = Ipv4Addr::new(10, 96, 0, 20);
const SOON: Duration = Duration::from_secs(20);

#[derive(Debug)]
pub struct Two {
    pub world: World,
    pub one: Node,
    pub two: Node,
    pub client: Pod,
    pub server: Pod,
    _app: Background,
}

impl Two {
    pub fn start() -> Result<Self> {
        Self::start_with(&[])
    }

    /// With more variables for both proxies.
    pub fn start_with(more: &[(&str, &str)]) -> Result<Self> {
        let mut world = World::new()?;
        let (mut one, mut two) = (world.node("node-1")?, world.node("node-2")?);
        let client = world.pod(&one, "client", true)?;
        let server = world.pod(&two, "server", true)?;
        let mut workload = server.workload(&two.name, true);
        let port = workload::Port { service_port: 80, target_port: 8080, app_protocol: 0 };
        let ports = workload::PortList { ports: vec![port] };
        workload.services.insert(format!("app/{}", world::hostname("server")), ports);
        world.istiod.set(Resource::workload(workload));
        world.istiod.set(Resource::service(world::service("server", VIP, 80, 8080)));
        let app = server.start("meshload", &["all", "--listen", "[::]:8080", "--body", "100"])?;
        for (node, pod) in [(&mut one, &client), (&mut two, &server)] {
            node.start_with(more)?;
            node.agent.accept().with_context(|| node.log())?;
            ensure!(!node.is_ready()?, "ready before it knows its pods");
            node.agent.add(pod)?;
            node.agent.all_sent()?;
        }
        let two = Self { world, one, two, client, server, _app: app };
        for node in [&two.one, &two.two] {
            wait_until("ztunnel to be ready", SOON, || node.is_ready())?;
        }
        Ok(two)
    }

    /// `curl` from the client; what the server says about who called must be the client's address.
    pub fn call(&self, host: &str, from: IpAddr) -> Result<()> {
        let ran = self.client.curl(&format!("http://{host}/who"))?;
        let said = ran.ok().with_context(|| format!("{}\n{}", self.one.log(), self.two.log()))?;
        ensure!(said.contains(&format!("{from}")), "{said} should name {from}");
        Ok(())
    }
}

/// The identity of an account of the pods' namespace.
pub fn identity(account: &str) -> String {
    format!("spiffe://cluster.local/ns/app/sa/{account}")
}
