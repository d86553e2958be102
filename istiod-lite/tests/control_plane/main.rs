//! The control plane inside this process, over real sockets, folders and TLS.

mod certificates;
// `cfg(test)` tells the linter that these are tests.
#[cfg(test)]
mod client;
mod discovery;
mod startup;
