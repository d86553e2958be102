//! Cluster DNS: names of Services and pods from a table, everything else from the machine's resolvers.
//!
//! [`table`] decides every answer as a pure function; [`server`] moves bytes.

pub(crate) mod server;
pub(crate) mod table;
