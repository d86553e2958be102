//! What the proxy says about its connection to the control plane: for the admin page, readiness and metrics.

use model::ConfigVersion;
use tokio::sync::watch;

use crate::metrics::{Metrics, Termination};

/// Refused resources that are shown. More of them have one cause.
pub(super) const MAX_REFUSED: usize = 100;

/// Shared between the client that writes and the pages that read.
#[derive(Debug, Default)]
pub struct XdsStatus {
    view: watch::Sender<XdsView>,
    metrics: Option<Metrics>,
}

/// Where the configuration in force comes from.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum XdsPhase {
    /// There is none yet.
    #[default]
    Empty,
    /// From the last good configuration on disk; the control plane has not confirmed it.
    FromDisk,
    /// From an earlier stream; nothing newer can be received at the moment.
    Disconnected,
    /// From the control plane, and up to date.
    Synced,
}

/// A moment of the connection.
#[derive(Clone, Debug, Default, serde::Serialize)]
pub struct XdsView {
    pub phase: XdsPhase,
    /// A stream is open.
    pub connected: bool,
    pub address: String,
    /// Why there is no stream.
    pub error: Option<String>,
    /// The push that is in force.
    pub version: String,
    /// The control plane was in agreement with us at least once since the start.
    pub was_synced: bool,
    pub responses: u64,
    pub reconnects: u64,
    /// Pushes after which we held something else than the control plane believed.
    pub mismatches: u64,
    /// What is refused at present.
    pub refused: Vec<Refused>,
    /// Why the last good configuration is not on disk.
    pub disk_error: Option<String>,
    /// Seconds since the epoch of the last response.
    pub updated_at: u64,
}

impl XdsView {
    /// There is a configuration to serve with: from the control plane or from disk.
    pub fn is_configured(&self) -> bool {
        self.was_synced || self.phase == XdsPhase::FromDisk
    }
}

/// A resource that could not be read.
#[derive(Clone, Debug, PartialEq, Eq, serde::Serialize)]
pub struct Refused {
    pub kind: String,
    pub name: String,
    pub why: String,
}

impl XdsStatus {
    /// Counts in these metrics, too.
    pub fn new(metrics: Metrics) -> Self {
        Self { view: watch::Sender::default(), metrics: Some(metrics) }
    }

    pub fn view(&self) -> XdsView {
        self.view.borrow().clone()
    }

    /// Whether there is a configuration to serve with: from the control plane or from disk.
    pub fn is_ready(&self) -> bool {
        self.view.borrow().is_configured()
    }

    /// Wakes when something changed.
    pub fn subscribe(&self) -> watch::Receiver<XdsView> {
        self.view.subscribe()
    }

    pub(super) fn update(&self, change: impl FnOnce(&mut XdsView)) {
        self.view.send_modify(change);
    }

    pub(super) fn connected(&self, address: &str) {
        if let Some(metrics) = &self.metrics {
            metrics.xds().connected();
        }
        tracing::info!(address, "configuration stream open");
        self.update(|view| {
            view.connected = true;
            view.address = address.to_owned();
            view.error = None;
        });
    }

    pub(super) fn ended(&self, why: String, how: Termination) {
        if let Some(metrics) = &self.metrics {
            metrics.xds().terminated(how);
        }
        self.update(|view| {
            if view.phase == XdsPhase::Synced {
                view.phase = XdsPhase::Disconnected;
            }
            view.reconnects += u64::from(view.connected);
            view.connected = false;
            view.error = Some(why);
        });
    }

    /// Counts a response of this size, and what of it was refused.
    pub(super) fn received(&self, type_url: &str, size: usize, refused: usize) {
        let Some(metrics) = &self.metrics else { return };
        metrics.xds().message(type_url, size);
        (0..refused).for_each(|_| metrics.xds().nack(type_url));
    }

    /// A configuration is in force.
    pub(super) fn applied(&self, version: ConfigVersion, now: u64) {
        if let Some(metrics) = &self.metrics {
            metrics.xds().applied(version, now);
        }
    }
}
