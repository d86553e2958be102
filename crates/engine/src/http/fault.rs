//! Faults that somebody asked for: whose requests they hit, and how.
//!
//! Invariants: a fault that has expired does nothing, whoever forgot it; every share is drawn on its own, so that 10 %
//! delayed and 10 % aborted leave 81 % untouched.

use std::time::Duration;

use http::StatusCode;
use model::http::{Abort, Fault};
use model::{Reason, Refusal};

use super::matching::Asked;
use super::{Answer, HttpAction, answer};
use crate::dice::Dice;

/// What a fault does to a request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Hit {
    pub(super) delay: Option<Duration>,
    pub(super) abort: Option<Abort>,
}

pub(super) fn hit(fault: &Fault, asked: &Asked<'_>, now: u64, dice: &mut Dice) -> Hit {
    let expired = fault.until.is_some_and(|until| now >= until);
    if expired || !asked.comes_from(&fault.source) || !asked.has(&fault.headers) {
        return Hit::default();
    }
    Hit {
        delay: fault.delay.filter(|(share, _)| share.takes(dice.draw())).map(|(_, delay)| delay),
        abort: fault.abort.filter(|(share, _)| share.takes(dice.draw())).map(|(_, abort)| abort),
    }
}

/// What the client gets. A status for gRPC is told in HTTP's words to who does not speak gRPC; a status for HTTP is
/// what it is: gRPC clients know how to read it.
pub(super) fn abort(abort: Abort, refusal: Refusal, grpc: bool) -> HttpAction {
    HttpAction::Answer(match abort {
        Abort::Reset => return HttpAction::Reset(refusal),
        Abort::Http(code) => match StatusCode::from_u16(code) {
            Ok(status) => answer::answer_with(refusal, status),
            Err(_) => no_status(refusal, code, grpc),
        },
        Abort::Grpc(code) if grpc => answer::in_grpc(refusal, code),
        Abort::Grpc(code) => answer::answer_with(refusal, answer::http_of_grpc(code)),
    })
}

fn no_status(refusal: Refusal, code: u16, grpc: bool) -> Answer {
    let message = format!("{}; {code} is no HTTP status", refusal.message);
    answer(Refusal { reason: Reason::BadFilter, message, ..refusal }, grpc)
}
