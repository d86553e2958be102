//! What the next start must know: the last good text of files with policy, and which waypoints were ready once.
//!
//! While it runs, [`compile::Folder`] keeps the last good state of a file in memory. A control plane that
//! starts while a policy file is half edited would know nothing of the policy: what it denied would be
//! allowed. So the texts of such files are kept on disk, and read before the files themselves.
//!
//! That a waypoint was ready once stands in no file at all. It is kept as the name of an empty file, one per waypoint.
//!
//! Invariants: only what was wholly in force is kept; a file that is gone when we start, or is removed
//! later, is forgotten; trouble with the disk is said once per file and changes nothing else.

use std::fs;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};
use compile::Programmed;
use compile::waypoints::USE_WAYPOINT;
use model::Str;

use crate::files::{create_dir, read, write_atomic};

/// Words of files whose absence allows more: policies, waypoints and what sends traffic to them.
const WORDS: [&str; 5] =
    ["AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication", "Gateway", USE_WAYPOINT];
/// Readable by the owner only: policies say who may do what.
const MODE: u32 = 0o600;

/// See the module.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Texts of files.
    dir: PathBuf,
    /// Names of waypoints, `NAMESPACE_NAME`: neither holds an underscore.
    waypoints: PathBuf,
}

impl Kept {
    /// Keeps texts below this directory.
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self { dir: state_dir.join("last-good"), waypoints: state_dir.join("programmed") }
    }

    /// The kept text of a file, if there is one.
    pub(crate) fn recall(&self, folder: usize, path: &str) -> Option<String> {
        let kept = self.place(folder, path);
        match read(&kept) {
            Ok(text) => String::from_utf8(text).ok(),
            Err(e) => {
                if !e.is_not_found() {
                    tracing::warn!(file = path, error = %e, "the last good state cannot be read");
                }
                None
            }
        }
    }

    /// This text is in force.
    pub(crate) fn keep(&self, folder: usize, path: &str, text: &str) {
        if !WORDS.iter().any(|word| text.contains(word)) {
            return self.forget(folder, path);
        }
        let kept = self.place(folder, path);
        let written =
            create_dir(&self.dir).and_then(|()| write_atomic(&kept, text.as_bytes(), MODE));
        if let Err(e) = written {
            tracing::warn!(file = path, error = %e, "the last good state is not kept for a restart");
        }
    }

    /// The file is gone.
    pub(crate) fn forget(&self, folder: usize, path: &str) {
        // Mostly there is nothing to forget.
        let _ = fs::remove_file(self.place(folder, path));
    }

    /// The waypoints that were ready once.
    pub(crate) fn programmed(&self) -> Programmed {
        let entries = match fs::read_dir(&self.waypoints) {
            Ok(entries) => entries,
            Err(e) => {
                if e.kind() != std::io::ErrorKind::NotFound {
                    let dir = self.waypoints.display();
                    tracing::warn!(%dir, error = %e, "which waypoints were ready once cannot be read");
                }
                return Programmed::new();
            }
        };
        let names = entries.flatten().filter_map(|entry| entry.file_name().into_string().ok());
        // A name with a dot in front is what a crash left of one that was being written.
        let whole = names.filter(|name| !name.starts_with('.'));
        whole.filter_map(|n| n.split_once('_').map(|(ns, name)| (ns.into(), name.into()))).collect()
    }

    /// Keeps which waypoints were ready once: `now`, where it was `before`.
    pub(crate) fn keep_programmed(&self, before: &Programmed, now: &Programmed) {
        let place =
            |(namespace, name): &(Str, Str)| self.waypoints.join(format!("{namespace}_{name}"));
        for gone in before.difference(now) {
            // What stays is a name without a Gateway, which binds nobody.
            let _ = fs::remove_file(place(gone));
        }
        for new in now.difference(before) {
            let written =
                create_dir(&self.waypoints).and_then(|()| write_atomic(&place(new), b"", MODE));
            if let Err(e) = written {
                let (namespace, name) = new;
                tracing::warn!(%namespace, %name, error = %e, "that this waypoint was ready is not kept for a restart");
            }
        }
    }

    fn place(&self, folder: usize, path: &str) -> PathBuf {
        use std::fmt::Write as _;
        let hash = digest(&SHA256, format!("{folder} {path}").as_bytes());
        let mut name = String::with_capacity(64);
        for byte in hash.as_ref() {
            // A String takes whatever is written to it.
            let _ = write!(name, "{byte:02x}");
        }
        self.dir.join(name)
    }
}
