//! Making a connection to an endpoint: a CONNECT stream that names the client, or plain TCP.

use std::net::SocketAddr;

use engine::{Candidate, Transport};
use hbone::{ConnectHeaders, PoolKey, TunnelError, TunnelIo};
use model::{Reason, Refusal};
use tokio::net::TcpStream;

use super::Open;
use crate::call::{Admission, Call};
use crate::config::Waits;
use crate::io::PeerIo;

/// Connects to one candidate; for less long where there is `another`. The flag beside a refusal says that no other candidate
/// should be tried: policy said no, and trying around a denial would make the policy of one endpoint look like noise.
pub(crate) async fn connect(
    call: &Call,
    admission: &Admission,
    candidate: &Candidate,
    another: bool,
) -> Result<(PeerIo, Open), (Refusal, bool)> {
    let open = call.worker.upstreams.place().map_err(|refusal| (refusal, true))?;
    let limit = if another { Waits::BEFORE_ANOTHER } else { Waits::CONNECT };
    // Boxed: few requests need a new connection, and the others should not carry its size.
    let attempt = Box::pin(try_one(call, admission, candidate));
    match tokio::time::timeout(limit, attempt).await {
        Ok(connected) => connected.map(|io| (io, open)),
        Err(_) => {
            let (name, seconds) = (&candidate.workload.name, limit.as_secs());
            let words = format!("{name} did not answer within {seconds} s");
            Err((Refusal::new(Reason::ConnectTimeout, words), false))
        }
    }
}

/// Connects to the first candidate that can be reached. Going on is safe: no byte of the client has left.
pub(crate) async fn connect_first(
    call: &Call,
    admission: &Admission,
    candidates: &[Candidate],
    mut chosen: impl FnMut(&Candidate),
) -> Result<(PeerIo, Open), Refusal> {
    let mut last = None;
    for (number, candidate) in (1..).zip(candidates) {
        if number > 1 && !candidate.is_current(&call.worker.shared.store.load()) {
            continue;
        }
        chosen(candidate);
        match connect(call, admission, candidate, number < candidates.len()).await {
            Ok(connected) => return Ok(connected),
            Err((refusal, true)) => return Err(refusal),
            Err((refusal, false)) => last = Some(refusal),
        }
    }
    Err(last.unwrap_or_else(|| Refusal::new(Reason::NoHealthyEndpoint, "no endpoint to try")))
}

async fn try_one(
    call: &Call,
    admission: &Admission,
    candidate: &Candidate,
) -> Result<PeerIo, (Refusal, bool)> {
    let Transport::Hbone { gateway, expected } = &candidate.transport else {
        return plain(candidate.target).await.map(PeerIo::Tcp).map_err(|r| (r, false));
    };
    let worker = &call.worker;
    let credentials = worker.credentials().await.map_err(|refusal| (refusal, true))?;
    let key = PoolKey {
        source: admission.own.uid.0.clone(),
        source_identity: worker.shared.identity.clone(),
        destination: candidate.workload.uid.clone(),
        gateway: *gateway,
        expected: expected.clone(),
    };
    let host = admission.service().map(|service| service.key.hostname.as_ref());
    let headers = ConnectHeaders {
        baggage: ConnectHeaders::baggage_of(&admission.own),
        forwarded: host.and_then(|host| format!("host={host}").parse().ok()),
        traceparent: None,
        client: Some((*call.client).clone()),
    };
    let opened =
        worker.tunnels.open(&key, &credentials, candidate.target, &headers, || tcp(*gateway));
    match opened.await {
        Ok(stream) => Ok(PeerIo::Tunnel(TunnelIo::opened(stream))),
        Err(e) => {
            let name = &candidate.workload.name;
            let denied = matches!(e, TunnelError::Refused { status: 401 | 403, .. });
            let refusal = Refusal::new(e.reason(), format!("tunnel to {name} ({gateway}): {e}"));
            Err((refusal, denied))
        }
    }
}

async fn plain(to: SocketAddr) -> Result<TcpStream, Refusal> {
    tcp(to).await.map_err(|e| Refusal::new(Reason::ConnectFailed, format!("connect to {to}: {e}")))
}

async fn tcp(to: SocketAddr) -> std::io::Result<TcpStream> {
    let tcp = TcpStream::connect(to).await?;
    tcp.set_nodelay(true)?;
    let keepalive = socket2::TcpKeepalive::new().with_time(std::time::Duration::from_secs(180));
    // Detects hosts that vanished under long idle connections (Istio: 180 s). Best effort.
    let _ = socket2::SockRef::from(&tcp).set_tcp_keepalive(&keepalive);
    Ok(tcp)
}
