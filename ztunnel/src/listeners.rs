//! A pod's listening sockets: opened here, or handed over by the process that served the pod before.
//!
//! The node agent keeps a copy of each and gives it to the next process. As long as it does, no connection is lost between
//! two processes: it waits in the queue of the same socket.
//!
//! Invariants: what is handed over is known by where it listens, and only in the pod's own namespace; every socket that
//! was taken is accepted from by somebody, for one that nobody looks at would swallow its share of the connections.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;

use model::{DNS_PORT, HBONE_PORT, INBOUND_PLAINTEXT_PORT, OUTBOUND_PORT};
use net::NetNs;
use net::handed::Handed;

/// Sockets of one pod that travel to the agent and back: what one message of a unix socket carries (SCM_MAX_FD), less the
/// namespace. Seven for each data thread; with more threads than that nothing is handed over.
pub const MAX_HANDED: usize = 252;

/// What a socket is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// Connections that the pod opens.
    Outbound,
    /// Plaintext connections to the pod.
    Plaintext,
    /// HBONE.
    Tunnels,
    /// The pod's DNS questions.
    Questions { udp: bool, ipv6: bool },
}

impl Role {
    fn of(udp: bool, at: SocketAddr) -> Option<Self> {
        match (at.port(), udp) {
            (OUTBOUND_PORT, false) => Some(Self::Outbound),
            (INBOUND_PLAINTEXT_PORT, false) => Some(Self::Plaintext),
            (HBONE_PORT, false) => Some(Self::Tunnels),
            (DNS_PORT, udp) => Some(Self::Questions { udp, ipv6: at.is_ipv6() }),
            _ => None,
        }
    }
}

/// Sockets for one worker.
pub type Share = Vec<(Role, OwnedFd)>;

/// Spreads what was handed over for a pod over the workers. What is not the pod's is closed.
pub fn share(handed: Vec<OwnedFd>, netns: &NetNs, workers: usize) -> Vec<Share> {
    let known = handed.into_iter().filter_map(|fd| match Handed::check(fd, netns) {
        Ok(handed) => Role::of(handed.udp, handed.at).map(|role| (role, handed.fd)),
        Err(error) => {
            tracing::warn!(%error, "a socket of the process before is not taken over");
            None
        }
    });
    spread(known, workers)
}

/// Each worker gets of each role as many as the next, so that none is left without when there are enough.
fn spread<T>(all: impl IntoIterator<Item = (Role, T)>, workers: usize) -> Vec<Vec<(Role, T)>> {
    let mut shares: Vec<Vec<(Role, T)>> = (0..workers).map(|_| Vec::new()).collect();
    for (role, socket) in all {
        let of_role = |share: &Vec<(Role, T)>| share.iter().filter(|(r, _)| *r == role).count();
        if let Some(share) = shares.iter_mut().min_by_key(|share| of_role(share)) {
            share.push((role, socket));
        }
    }
    shares
}

/// The sockets of one role in a worker's share; with none, one that is opened now.
pub fn take_or_open<S: Into<OwnedFd>>(
    share: &mut Share,
    role: Role,
    open: impl FnOnce() -> io::Result<S>,
) -> io::Result<Vec<OwnedFd>> {
    let taken: Vec<_> = share.extract_if(.., |(r, _)| *r == role).map(|(_, fd)| fd).collect();
    if taken.is_empty() { Ok(vec![open()?.into()]) } else { Ok(taken) }
}

/// The sockets that one worker accepts from for one pod. Shared with the tasks that do.
#[derive(Default)]
pub struct Listeners(Vec<Arc<dyn AsFd + Send + Sync>>);

impl std::fmt::Debug for Listeners {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Listeners").field(&self.0.len()).finish()
    }
}

impl Listeners {
    pub fn add(&mut self, socket: Arc<dyn AsFd + Send + Sync>) {
        self.0.push(socket);
    }

    /// Copies for the agent.
    pub fn copies(&self) -> io::Result<Vec<OwnedFd>> {
        self.0.iter().map(|socket| socket.as_fd().try_clone_to_owned()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_known_by_where_they_listen() {
        let check = |udp, at: &str, want| assert_eq!(Role::of(udp, at.parse().unwrap()), want);
        check(false, "[::]:15001", Some(Role::Outbound));
        check(false, "0.0.0.0:15006", Some(Role::Plaintext));
        check(false, "[::]:15008", Some(Role::Tunnels));
        check(true, "127.0.0.1:15053", Some(Role::Questions { udp: true, ipv6: false }));
        check(false, "[::1]:15053", Some(Role::Questions { udp: false, ipv6: true }));
        check(true, "[::]:15008", None);
        check(false, "[::]:15020", None);
    }

    #[test]
    fn every_socket_has_a_worker_and_every_worker_a_socket_if_there_are_enough() {
        let roles = [Role::Outbound, Role::Tunnels];
        let check = |each: usize, workers: usize| {
            let all = roles.iter().flat_map(|r| (0..each).map(|n| (*r, n)));
            let shares = spread(all, workers);
            assert_eq!(shares.len(), workers);
            for role in roles {
                let counts = shares.iter().map(|s| s.iter().filter(|(r, _)| *r == role).count());
                let counts: Vec<usize> = counts.collect();
                assert_eq!(counts.iter().sum::<usize>(), each, "{each} over {workers}");
                assert!(counts.iter().max().unwrap() - counts.iter().min().unwrap() <= 1);
            }
        };
        for (each, workers) in [(0, 1), (1, 1), (2, 1), (1, 2), (3, 2), (8, 3)] {
            check(each, workers);
        }
        assert!(spread([(Role::Outbound, 1)], 0).is_empty());
    }
}
