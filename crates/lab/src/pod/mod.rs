//! Pods as processes: what to run ([`resolve`], [`volumes`]), when ([`lifecycle`]), how ([`helper`], [`rootfs`], [`exec`]), and the
//! task that brings it together ([`worker`]).

pub(crate) mod exec;
pub(crate) mod helper;
pub(crate) mod lifecycle;
mod mounts;
mod one_id;
mod probe;
mod program;
pub(crate) mod resolve;
pub(crate) mod rootfs;
pub(crate) mod run;
pub(crate) mod spaces;
mod terminal;
mod tmpfiles;
mod users;
pub(crate) mod volumes;
pub(crate) mod worker;
