//! WebSocket and other upgrades: after the answer 101 the two connections are no longer HTTP, and their bytes are passed on.

use std::sync::Arc;

use hbone::Transfer;
use hyper::upgrade::{OnUpgrade, Parts, Upgraded};
use hyper_util::rt::TokioIo;
use model::{Reason, Refusal};
use tokio::io::AsyncWriteExt as _;

use super::exchange::Exchange;
use super::progress::ClientIo;
use crate::call::Call;
use crate::io::PeerIo;
use crate::record::ended;
use crate::tcp::carry_upgraded;
use crate::worker::Busy;

/// Carries the connections on, in a task of its own; the record is written at their end.
pub(super) fn carry(mut exchange: Exchange, client: OnUpgrade, server: OnUpgrade) {
    let busy = Busy::new(&exchange.client.call.worker.shared);
    tokio::spawn(async move {
        let moved = Arc::<Transfer>::default();
        exchange.upgraded = Some(moved.clone());
        let of = exchange.client.clone();
        exchange.refusal = join(&of.call, moved, client, server).await.err();
        if exchange.refusal.is_none() {
            exchange.complete();
        }
        drop((exchange, busy));
    });
}

/// Ends a connection whose client asked for another protocol, or for a tunnel, and did not get it. hyper hands such a
/// connection over when it is not used again, as if it had been switched, and would otherwise drop it with the answer in it.
pub(super) async fn close(unused: OnUpgrade) {
    if let Ok(connection) = unused.await {
        // It may be gone.
        let _ = TokioIo::new(connection).shutdown().await;
    }
}

async fn join(
    call: &Call,
    moved: Arc<Transfer>,
    client: OnUpgrade,
    server: OnUpgrade,
) -> Result<(), Refusal> {
    let broken = |who: &str, e: hyper::Error| {
        let words = format!("{who} went away while protocols were switched: {e}");
        Refusal::new(Reason::ConnectionBroken, words)
    };
    let server = server.await.map_err(|e| broken("the endpoint", e))?;
    let client = client.await.map_err(|e| broken("the client", e))?;
    let unknown = |_: Upgraded| {
        Refusal::new(Reason::ConnectionBroken, "a switched connection is not one of ours")
    };
    let Parts { io: client, read_buf: from_client, .. } =
        client.downcast::<TokioIo<ClientIo>>().map_err(unknown)?;
    let Parts { io: server, read_buf: from_server, .. } =
        server.downcast::<TokioIo<PeerIo>>().map_err(unknown)?;
    let PeerIo::Tunnel(client) = client.into_inner().into_inner() else {
        let words = "protocols are switched for clients that came in a tunnel only";
        return Err(Refusal::new(Reason::ConnectionBroken, words));
    };
    let server = server.into_inner();
    let how = carry_upgraded(call, client, server, (from_client, from_server), moved).await;
    ended(how).map_or(Ok(()), Err)
}
