//! The last good text of files with policy, for the next start.
//!
//! While it runs, [`compile::Folder`] keeps the last good state of a file in memory. A control plane that
//! starts while a policy file is half edited would know nothing of the policy: what it denied would be
//! allowed. So the texts of such files are kept on disk, and read before the files themselves.
//!
//! Invariants: only what was wholly in force is kept; a file that is gone when we start, or is removed
//! later, is forgotten; trouble with the disk is said once per file and changes nothing else.

use std::fs;
use std::path::{Path, PathBuf};

use aws_lc_rs::digest::{SHA256, digest};

use crate::files::{create_dir, read, write_atomic};

/// The kinds whose absence allows more.
const KINDS: [&str; 3] = ["AuthorizationPolicy", "PeerAuthentication", "RequestAuthentication"];
/// Readable by the owner only: policies say who may do what.
const MODE: u32 = 0o600;

/// See the module.
#[derive(Debug)]
pub(crate) struct Kept {
    dir: PathBuf,
}

impl Kept {
    /// Keeps texts below this directory.
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self { dir: state_dir.join("last-good") }
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
        if !KINDS.iter().any(|kind| text.contains(kind)) {
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
