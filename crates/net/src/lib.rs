//! The machine under the mesh: network namespaces, sockets, netlink, nftables and packet capture.
//!
//! Purpose: everything that needs a privilege or a Linux interface lives here behind safe functions, so that the
//! crates above stay free of `unsafe` and of kernel numbers.
//!
//! Invariants:
//! - Everything works without root: the caller owns the namespaces it works on (a user namespace is enough).
//! - No external program is run: neither `ip` nor `nft` nor `sysctl` exists on a bare machine.
//! - An operation on a namespace leaves the calling thread in the namespace it came from, or aborts the process.
//! - Every error names the object it was about; where the kernel gives a reason in words, the error carries it.

pub mod capture;
pub mod datagram;
pub mod flows;
pub mod handed;
pub mod netlink;
pub mod netns;
pub mod nft;
pub mod packet;
pub mod service_nat;
pub mod socket;
pub mod sysctl;
#[cfg(any(test, feature = "testing"))]
pub mod testing;

pub use netns::{NetNs, NsId};
