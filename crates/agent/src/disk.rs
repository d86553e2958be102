//! The last good configuration on disk, so that a proxy that starts without a control plane serves what it
//! served before.
//!
//! Invariants: the file is replaced as a whole or not at all; a file that is damaged, or of another mesh, is
//! ignored with a reason and never half read; a disk that is full or broken costs the copy, not the service.

use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use model::{ConfigVersion, Snapshot};
use prost::Message;
use xds::ambit::{SavedConfig, SavedResource};
use xds::client::{Held, Saved};
use xds::{Kind, digest};

const FILE: &str = "last-good-config";
/// First bytes of the file. The number changes when the format does.
const MAGIC: &[u8] = b"AMBIT CONFIG 1\n";
/// Changes within this time are written once: a rollout changes endpoints many times a second.
const DEBOUNCE: Duration = Duration::from_secs(1);
/// After a write that took T, the next one waits this many T: at most a tenth of the time goes into it,
/// however large the mesh.
const REST: u32 = 10;

/// What the disk remembers.
#[derive(Debug)]
pub struct LastGood {
    pub version: ConfigVersion,
    pub resources: Vec<Saved>,
}

/// Why the last good configuration cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    #[error("{path}: {source}")]
    Io { path: PathBuf, source: io::Error },
    #[error("{path} is damaged ({problem}): it is ignored, and replaced by the next configuration")]
    Damaged { path: PathBuf, problem: String },
    #[error("{path} belongs to trust domain {theirs}, this proxy to {ours}: it is ignored")]
    OtherMesh { path: PathBuf, theirs: String, ours: String },
}

/// Reads the last good configuration. `None`: there is none yet.
pub fn load(dir: &Path, trust_domain: &str) -> Result<Option<LastGood>, DiskError> {
    let path = dir.join(FILE);
    let bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(DiskError::Io { path, source }),
    };
    let saved =
        parse(&bytes).map_err(|problem| DiskError::Damaged { path: path.clone(), problem })?;
    if saved.trust_domain != trust_domain {
        let (theirs, ours) = (saved.trust_domain, trust_domain.to_owned());
        return Err(DiskError::OtherMesh { path, theirs, ours });
    }
    let resource = |r: SavedResource| {
        // A type that a newer version of this proxy wrote is fetched again, not taken.
        Some(Saved {
            kind: Kind::from_type_url(&r.type_url)?,
            name: r.name,
            version: r.version,
            hash: r.hash,
            value: r.value.to_vec(),
        })
    };
    Ok(Some(LastGood {
        version: ConfigVersion { epoch: saved.epoch, number: saved.number },
        resources: saved.resources.into_iter().filter_map(resource).collect(),
    }))
}

/// Writes the configuration in force.
pub fn save(
    dir: &Path,
    trust_domain: &str,
    held: &Held,
    snapshot: &Snapshot,
) -> Result<(), DiskError> {
    let version = snapshot.version();
    let resource = |saved: Saved| SavedResource {
        type_url: saved.kind.type_url().to_owned(),
        name: saved.name,
        version: saved.version,
        hash: saved.hash,
        value: saved.value.into(),
    };
    let config = SavedConfig {
        trust_domain: trust_domain.to_owned(),
        epoch: version.epoch,
        number: version.number,
        resources: held.save(snapshot).map(resource).collect(),
    };
    let payload = config.encode_to_vec();
    let mut bytes = Vec::with_capacity(MAGIC.len() + 8 + payload.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&digest::resource("", &payload).to_le_bytes());
    bytes.extend_from_slice(&payload);
    let path = dir.join(FILE);
    make_private_dir(dir)
        .and_then(|()| replace(&path, &bytes))
        .map_err(|source| DiskError::Io { path, source })
}

fn parse(bytes: &[u8]) -> Result<SavedConfig, String> {
    let rest =
        bytes.strip_prefix(MAGIC).ok_or("it does not begin as a configuration of this version")?;
    let (sum, payload) = rest.split_first_chunk::<8>().ok_or("it is cut short")?;
    if digest::resource("", payload) != u64::from_le_bytes(*sum) {
        return Err("its checksum is wrong".to_owned());
    }
    SavedConfig::decode(payload).map_err(|e| e.to_string())
}

/// Creates a directory that only its owner may enter; one that exists is left as it is.
pub(crate) fn make_private_dir(dir: &Path) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir)
}

/// Replaces a file so that a reader, or a crash, finds the old content or the new. Mode 0600. A process that drains and
/// its successor write to the same folder: one at a time.
pub(crate) fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let folder = path.parent().map(fs::File::open).transpose()?;
    if let Some(folder) = &folder {
        // Let go when the file is closed, also by a crash.
        folder.lock()?;
    }
    let temporary = path.with_added_extension("new");
    let write = || {
        // A leftover may have been created with another mode.
        match fs::remove_file(&temporary) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut file =
            fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        // The name, too, must survive a power cut.
        folder.as_ref().map_or(Ok(()), fs::File::sync_all)
    };
    write().inspect_err(|_| {
        // Room on a full disk matters more than what was written of the file.
        let _ = fs::remove_file(&temporary);
    })
}

/// Writes in the background what is submitted. Dropping it writes the rest.
#[derive(Debug)]
pub struct Saver {
    jobs: Option<mpsc::Sender<Job>>,
    thread: Option<JoinHandle<()>>,
    error: Arc<Mutex<Option<String>>>,
}

type Job = (Held, Arc<Snapshot>);

impl Saver {
    pub fn start(dir: PathBuf, trust_domain: String) -> Self {
        let (jobs, received) = mpsc::channel();
        let error = Arc::new(Mutex::new(None));
        let reported = error.clone();
        let thread = std::thread::Builder::new().name("config-save".into()).spawn(move || {
            run(&received, |(held, snapshot)| {
                report(&reported, save(&dir, &trust_domain, &held, &snapshot));
            });
        });
        let thread = thread
            .map_err(|e| {
                let problem = format!("no thread to save the configuration: {e}");
                tracing::warn!("{problem}");
                *error.lock().unwrap_or_else(PoisonError::into_inner) = Some(problem);
            })
            .ok();
        Self { jobs: thread.is_some().then_some(jobs), thread, error }
    }

    /// This is in force now; of several only the last is written.
    pub fn submit(&self, held: Held, snapshot: Arc<Snapshot>) {
        if let Some(jobs) = &self.jobs {
            let _ = jobs.send((held, snapshot));
        }
    }

    /// Why the last attempt to write failed.
    pub fn error(&self) -> Option<String> {
        self.error.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Drop for Saver {
    fn drop(&mut self) {
        self.jobs = None;
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

fn run(jobs: &mpsc::Receiver<Job>, mut write: impl FnMut(Job)) {
    let mut rest = Duration::ZERO;
    while let Ok(mut job) = jobs.recv() {
        let due = Instant::now() + DEBOUNCE.max(rest);
        let mut last = false;
        loop {
            match jobs.recv_timeout(due.saturating_duration_since(Instant::now())) {
                Ok(newer) => job = newer,
                Err(mpsc::RecvTimeoutError::Timeout) => break,
                Err(mpsc::RecvTimeoutError::Disconnected) => {
                    last = true;
                    break;
                }
            }
        }
        let begun = Instant::now();
        write(job);
        if last {
            return;
        }
        rest = begun.elapsed() * REST;
    }
}

/// Says it once when writing begins to fail and once when it works again.
fn report(error: &Mutex<Option<String>>, result: Result<(), DiskError>) {
    let mut known = error.lock().unwrap_or_else(PoisonError::into_inner);
    match (result, known.is_some()) {
        (Ok(()), false) => {}
        (Ok(()), true) => {
            tracing::info!("the last good configuration is on disk again");
            *known = None;
        }
        (Err(e), before) => {
            if !before {
                tracing::warn!(
                    "cannot keep the last good configuration, a restart without control plane would \
                     begin with older or no configuration: {e}"
                );
            }
            *known = Some(e.to_string());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use model::Workload;
    use xds::client::Client;
    use xds::codec::Defaults;
    use xds::discovery::Node;
    use xds::server::{Connection, Mesh, Resources};

    /// A client that holds one workload, and its snapshot.
    fn held(number: u64) -> Job {
        let push = ConfigVersion { epoch: 1, number };
        let workload = Workload::named(format!("w{number}"), "ns", "w");
        let mesh = Mesh { workloads: &[Arc::new(workload)], ..Mesh::default() };
        let desired = Arc::new(Resources::new(push, mesh));
        let mut server = Connection::new(desired);
        let mut client = Client::new(Node::default(), Defaults { trust_domain: "td".into() });
        let mut snapshot = Snapshot::default();
        for request in client.connect() {
            server.request(request).unwrap();
            while let Some(response) = server.next_response() {
                let batch = client.handle(response);
                snapshot = snapshot.with(batch.changes);
            }
        }
        (client.held(), Arc::new(snapshot))
    }

    fn names(dir: &Path) -> Vec<String> {
        let loaded = load(dir, "td").unwrap().unwrap();
        loaded.resources.into_iter().map(|r| r.name).collect()
    }

    #[test]
    fn what_is_saved_is_loaded() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().join("state");
        assert!(load(&dir, "td").unwrap().is_none());
        let (held, snapshot) = held(3);
        save(&dir, "td", &held, &snapshot).unwrap();
        save(&dir, "td", &held, &snapshot).unwrap();
        let loaded = load(&dir, "td").unwrap().unwrap();
        assert_eq!(loaded.version, ConfigVersion { epoch: 1, number: 3 });
        assert_eq!(names(&dir), ["w3"]);
        let error = load(&dir, "other").unwrap_err().to_string();
        assert!(error.contains("trust domain td"), "{error}");
        use std::os::unix::fs::PermissionsExt;
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&dir), mode(&dir.join(FILE))), (0o700, 0o600));
    }

    #[test]
    fn two_processes_may_write_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        let writers: Vec<_> = (0..4_u8)
            .map(|n| {
                let path = path.clone();
                std::thread::spawn(move || {
                    (0..20).for_each(|_| replace(&path, &vec![n; 10_000]).unwrap());
                })
            })
            .collect();
        writers.into_iter().for_each(|w| w.join().unwrap());
        let found = fs::read(&path).unwrap();
        assert!(found.len() == 10_000 && found.iter().all(|b| *b == found[0]));
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    }

    #[test]
    fn damage_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join(FILE);
        let (held, snapshot) = held(1);
        save(dir.path(), "td", &held, &snapshot).unwrap();
        let good = fs::read(&path).unwrap();
        let check = |bytes: &[u8], want: &str| {
            fs::write(&path, bytes).unwrap();
            let error = load(dir.path(), "td").unwrap_err().to_string();
            assert!(error.contains(want), "{error}");
        };
        check(b"", "does not begin");
        check(&good[..MAGIC.len() + 3], "cut short");
        check(&good[..good.len() - 1], "checksum");
        let mut flipped = good;
        *flipped.last_mut().unwrap() ^= 1;
        check(&flipped, "checksum");
        // And the next configuration replaces it.
        save(dir.path(), "td", &held, &snapshot).unwrap();
        assert_eq!(names(dir.path()), ["w1"]);
    }

    #[test]
    fn the_last_one_is_written_when_the_saver_ends() {
        let dir = tempfile::tempdir().unwrap();
        let saver = Saver::start(dir.path().to_owned(), "td".to_owned());
        for number in 1..=3 {
            let (held, snapshot) = held(number);
            saver.submit(held, snapshot);
        }
        drop(saver);
        assert_eq!(names(dir.path()), ["w3"]);
    }

    #[test]
    fn a_disk_that_fails_is_reported_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        // A file where the directory should be.
        let blocked = dir.path().join("state");
        fs::write(&blocked, "").unwrap();
        let saver = Saver::start(blocked, "td".to_owned());
        let error = saver.error.clone();
        let (held, snapshot) = held(1);
        saver.submit(held, snapshot);
        drop(saver);
        assert!(error.lock().unwrap().is_some());
    }
}
