//! The end of a proxy's process: how it is told.

use std::io;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

/// Waits for SIGTERM, SIGINT or the admin page's word.
pub async fn told_to_end(quit: &Notify) -> io::Result<()> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    tokio::select! {
        _ = terminate.recv() => {}
        _ = interrupt.recv() => {}
        () = quit.notified() => {}
    }
    Ok(())
}
