//! The paired benchmark: the same load with and without the mesh, in turns, on one machine.
//!
//! A local mesh with two nodes holds two pairs of client and server: one in a namespace of the mesh,
//! one outside. Every line is measured in rounds, both arms in each round, the order changing; what is
//! reported are medians with the least and the greatest value, and ratios of the arms of one round.
//! CPU time is read from `/proc` between the marks that the client prints when its load begins and ends.
//!
//! Invariants: nothing is dropped as an outlier; errors and lost bytes are reported with the line in
//! which they happened; congestion control is the same in every pod, and named.

pub mod bars;
pub mod http;
pub mod machine;
pub mod memory;
pub mod procfs;
pub mod render;
pub mod results;
pub mod shapes;
pub mod sizes;
pub mod stats;
pub mod suite;
pub mod sysctl;
pub mod world;
