//! Every decision the mesh takes, as functions over a [`Snapshot`].
//!
//! The proxies call these on live traffic, `meshctl can` on a question, the tests on generated cases:
//! what the tools say is what the proxies do.
//!
//! Invariants: no IO, no clock, no random source, no `async`; `now` and `rand` are arguments. A decision
//! that lacks information is `Pending` or a refusal, never a permission.

mod authz;
mod outbound;
mod rotate;

pub use authz::{authorize, Allowed, InboundFacts, Verdict};
pub use outbound::{plan_outbound, Candidate, OutboundFacts, OutboundPlan, Transport};
pub use rotate::{Backoff, Rotation};
