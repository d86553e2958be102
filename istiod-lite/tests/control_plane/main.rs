//! The control plane inside this process, over real sockets, folders and TLS.

// `cfg(test)` tells the linter that helpers are tests, too.
#[cfg(test)]
mod certificates;
#[cfg(test)]
mod client;
#[cfg(test)]
mod discovery;
mod pods;
#[cfg(test)]
mod startup;
