//! Every decision the mesh takes, as functions over a [`model::Snapshot`].
//!
//! The proxies call these on live traffic, `meshctl can` on a question, the tests on generated cases:
//! what the tools say is what the proxies do.
//!
//! Invariants: no IO, no clock, no random source, no `async`; `now` and `rand` are arguments. A decision
//! that lacks information is `Pending` or a refusal, never a permission.

mod authz;
mod dice;
mod dns;
mod endpoint;
pub mod http;
mod live;
mod outbound;
mod pool;
mod renewals;
mod rotate;
mod waypoint;

pub use authz::{Allowed, InboundFacts, Verdict, authorize, demands_mutual_tls, dry_run_matches};
pub use dns::{DnsAnswer, DnsFacts, MAX_ADDRESSES, resolve};
pub use live::{Drain, ended_by};
pub use outbound::{
    Candidate, MAX_CANDIDATES, OutboundFacts, OutboundPlan, Transport, plan_every_endpoint,
    plan_outbound,
};
pub use pool::{BookLimits, Carrier, Next, PoolBook, Turn};
pub use renewals::{Begin, MAX_REQUESTS, Renewals, State, TICK};
pub use rotate::{Backoff, LONGEST_SLEEP, Rotation};
pub use waypoint::{AdmitFacts, Admitted, Authority, Claim, admit, claim_is_early, delegated};
