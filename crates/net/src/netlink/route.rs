//! Routes: via a gateway, straight to an interface, or into this machine ("local").

use std::net::IpAddr;

use nix::errno::Errno;

use super::addr::{family, ip, octets};
use super::{
    Message, NLM_F_CREATE, NLM_F_REPLACE, Netlink, Result, attrs, link, route_request, u32_at,
};

const RTM_NEWROUTE: u16 = 24;
const RTM_DELROUTE: u16 = 25;
const RTM_GETROUTE: u16 = 26;
const RTA_DST: u16 = 1;
const RTA_OIF: u16 = 4;
const RTA_GATEWAY: u16 = 5;
const RTA_PREFSRC: u16 = 7;
const RTA_TABLE: u16 = 15;
const RTPROT_STATIC: u8 = 4;
const SCOPE_UNIVERSE: u8 = 0;
const SCOPE_LINK: u8 = 253;
const SCOPE_HOST: u8 = 254;
const RTNH_F_ONLINK: u32 = 4;
/// The table used when none is named.
pub const MAIN_TABLE: u32 = 254;
/// Length of `struct rtmsg`.
const RTMSG: usize = 12;

/// What a route does with a packet.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kind {
    /// Sends it on.
    #[default]
    Unicast,
    /// Takes it as addressed to this machine.
    Local,
    /// Drops it silently.
    Blackhole,
    /// Drops it and tells the sender.
    Unreachable,
}

/// A route.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Route {
    /// Destination network; the address also says the family. `0.0.0.0/0` and `::/0` are the default routes.
    pub to: (IpAddr, u8),
    /// What it does.
    pub kind: Kind,
    /// Next hop.
    pub via: Option<IpAddr>,
    /// Interface.
    pub dev: Option<String>,
    /// The gateway is on `dev` though no address says so.
    pub onlink: bool,
    /// Source address to prefer.
    pub source: Option<IpAddr>,
    /// Routing table.
    pub table: u32,
}

impl Route {
    /// A plain route to a network in the main table; the rest is set by hand.
    pub fn to(ip: IpAddr, prefix: u8) -> Self {
        Self {
            to: (ip, prefix),
            kind: Kind::Unicast,
            via: None,
            dev: None,
            onlink: false,
            source: None,
            table: MAIN_TABLE,
        }
    }

    /// `default` of a family.
    pub fn default_of(ipv6: bool) -> Self {
        let any = if ipv6 {
            IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED)
        } else {
            IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED)
        };
        Self::to(any, 0)
    }

    /// The same route via a gateway.
    #[must_use]
    pub fn via(self, gateway: IpAddr) -> Self {
        Self { via: Some(gateway), ..self }
    }

    /// The same route through an interface.
    #[must_use]
    pub fn dev(self, name: &str) -> Self {
        Self { dev: Some(name.to_owned()), ..self }
    }
}

/// Adds a route, or replaces the one to the same network in the same table.
pub fn add(route: &Route) -> Result<()> {
    let message = about(RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, route)?;
    route_request(&format!("add {}", describe(route)), message)
}

/// Deletes a route. One that is not there is fine.
pub fn delete(route: &Route) -> Result<()> {
    let message = about(RTM_DELROUTE, 0, route)?;
    match route_request(&format!("delete {}", describe(route)), message) {
        Err(e) if e.errno == Errno::ESRCH => Ok(()),
        done => done,
    }
}

/// The routes of one table, both families. Kinds other than those of [`Kind`] are left out.
pub fn list(table: u32) -> Result<Vec<Route>> {
    let message = Message::new(RTM_GETROUTE, 0, &[0; RTMSG]);
    let mut netlink = Netlink::open(libc::NETLINK_ROUTE)?;
    let all = netlink.dump("list routes", &message, |m| {
        (m.kind == RTM_NEWROUTE).then(|| read(m.payload)).flatten()
    })?;
    Ok(all.into_iter().filter(|route| route.table == table).collect())
}

fn about(kind: u16, flags: u16, route: &Route) -> Result<Message> {
    let scope = match (route.kind, route.via) {
        (Kind::Local, _) => SCOPE_HOST,
        (Kind::Unicast, None) => SCOPE_LINK,
        _ => SCOPE_UNIVERSE,
    };
    let (to, prefix) = route.to;
    // The table goes in an attribute of its own, since this field holds only 8 bits.
    let mut header = [0; RTMSG];
    header[..8].copy_from_slice(&[
        family(to),
        prefix,
        0,
        0,
        0,
        RTPROT_STATIC,
        scope,
        number(route.kind),
    ]);
    if route.onlink {
        header[8..12].copy_from_slice(&RTNH_F_ONLINK.to_ne_bytes());
    }
    let mut message = Message::new(kind, flags, &header);
    message.u32(RTA_TABLE, route.table);
    if prefix > 0 {
        message.attr(RTA_DST, &octets(to));
    }
    if let Some(dev) = &route.dev {
        message.u32(RTA_OIF, link::index(dev)?);
    }
    if let Some(via) = route.via {
        message.attr(RTA_GATEWAY, &octets(via));
    }
    if let Some(source) = route.source {
        message.attr(RTA_PREFSRC, &octets(source));
    }
    Ok(message)
}

fn read(payload: &[u8]) -> Option<Route> {
    let mut route = Route::default_of(*payload.first()? == 10);
    route.to.1 = *payload.get(1)?;
    route.table = u32::from(*payload.get(4)?);
    let number_read = *payload.get(7)?;
    route.kind = [Kind::Unicast, Kind::Local, Kind::Blackhole, Kind::Unreachable]
        .into_iter()
        .find(|kind| number(*kind) == number_read)?;
    for (kind, value) in attrs(payload.get(RTMSG..)?) {
        match kind {
            RTA_DST => route.to.0 = ip(value)?,
            RTA_GATEWAY => route.via = ip(value),
            RTA_PREFSRC => route.source = ip(value),
            RTA_TABLE => route.table = u32_at(value, 0)?,
            RTA_OIF => route.dev = u32_at(value, 0).and_then(name_of),
            _ => {}
        }
    }
    Some(route)
}

fn name_of(index: u32) -> Option<String> {
    Some(nix::net::if_::if_indextoname(index).ok()?.to_string_lossy().into_owned())
}

fn number(kind: Kind) -> u8 {
    match kind {
        Kind::Unicast => 1,
        Kind::Local => 2,
        Kind::Blackhole => 6,
        Kind::Unreachable => 7,
    }
}

fn describe(route: &Route) -> String {
    let mut text = format!("{:?} route to {}/{}", route.kind, route.to.0, route.to.1);
    if let Some(via) = route.via {
        text.push_str(&format!(" via {via}"));
    }
    if let Some(dev) = &route.dev {
        text.push_str(&format!(" dev {dev}"));
    }
    if route.table != MAIN_TABLE {
        text.push_str(&format!(" table {}", route.table));
    }
    text
}
