//! xDS, CA and ZDS messages and the delta protocol as state machines.
