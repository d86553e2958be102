//! An endpoint's answer that has to end in time, whether its client reads it or not.
//!
//! hyper asks for more of a body when the client has taken what was there, and so would not ask, nor look at the clock, for a
//! client that reads nothing. A task looks instead: it takes the answer away from the connection, which tells the endpoint
//! and writes the record.

use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};
use std::time::Instant;

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use tokio::task::AbortHandle;

use super::body::{BodyError, EndpointBody};
use crate::record::lock;

const LATE: &str = "the route's time was over in the middle of the answer";

/// See the module.
pub(crate) struct TimedBody {
    flow: Arc<Mutex<Flow>>,
    clock: AbortHandle,
}

struct Flow {
    /// `None`: its time was over.
    body: Option<EndpointBody>,
    /// Of the connection that waits for more of it.
    waiting: Option<Waker>,
}

impl TimedBody {
    pub(super) fn new(body: EndpointBody, end: Instant) -> Self {
        let flow = Arc::new(Mutex::new(Flow { body: Some(body), waiting: None }));
        // An answer that has ended is not kept for the clock's sake.
        let watched = Arc::downgrade(&flow);
        let clock = tokio::spawn(async move {
            tokio::time::sleep_until(end.into()).await;
            if let Some(flow) = watched.upgrade() {
                late(&flow);
            }
        });
        Self { flow, clock: clock.abort_handle() }
    }

    pub(super) fn poll(
        &self,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let mut flow = lock(&self.flow);
        let Some(body) = &mut flow.body else { return Poll::Ready(Some(Err(LATE.into()))) };
        let next = body.poll(cx);
        if next.is_pending() {
            flow.waiting = Some(cx.waker().clone());
        }
        next
    }

    pub(super) fn is_end_stream(&self) -> bool {
        lock(&self.flow).body.as_ref().is_some_and(|body| body.incoming.is_end_stream())
    }

    pub(super) fn size_hint(&self) -> SizeHint {
        lock(&self.flow).body.as_ref().map_or_else(SizeHint::new, |body| body.incoming.size_hint())
    }
}

impl Drop for TimedBody {
    fn drop(&mut self) {
        self.clock.abort();
    }
}

fn late(flow: &Mutex<Flow>) {
    let (body, waiting) = {
        let mut flow = lock(flow);
        // One that was passed on to its end is in time.
        (flow.body.take_if(|body| !body.exchange.is_complete()), flow.waiting.take())
    };
    if let Some(mut body) = body {
        body.exchange.late(LATE);
    }
    if let Some(waiting) = waiting {
        waiting.wake();
    }
}
