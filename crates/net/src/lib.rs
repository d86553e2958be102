//! Network namespaces, sockets, netlink and nftables.
