//! Waits for the folders to change, and reads what changed. One thread, which owns everything here.
//!
//! inotify says where to look, [`Debounce`] says when, [`Tree`] says what is new. inotify may lose events,
//! run out of watches or not exist (network file systems): then rescans find the changes, later.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, TrySendError, sync_channel};
use std::time::{Duration, Instant};

use compile::{Code, Diagnostic};
use notify::event::{AccessKind, AccessMode, CreateKind, ModifyKind, RemoveKind, RenameMode};
use notify::{EventKind, RecursiveMode, Watcher as _};

use crate::debounce::{Change, Debounce, QUIET};
use crate::scan::{Key, News, Tree, is_config};

/// Events that wait for this thread, which may be compiling for a second. When they are more, they are
/// dropped and everything is looked at.
const MAX_EVENTS: usize = 65_536;
/// Everything is looked at this often even when inotify works: it does not see what another machine
/// writes to a shared folder.
const RESCAN: Duration = Duration::from_secs(30);
/// And this often when events cannot tell: no inotify, a folder is missing, links to elsewhere.
const POLL: Duration = Duration::from_secs(1);

/// What happened in the folders.
#[derive(Debug)]
pub struct Update {
    pub news: Vec<News>,
    /// What is wrong with files and folders as such.
    pub diagnostics: Vec<Diagnostic>,
    /// Every folder has been read at least once.
    pub complete: bool,
    /// The folders that have not.
    pub missing: Vec<PathBuf>,
}

/// Ends the thread when dropped.
#[derive(Debug)]
pub struct Stop {
    messages: SyncSender<Message>,
    stopped: Arc<AtomicBool>,
}

impl Drop for Stop {
    fn drop(&mut self) {
        self.stopped.store(true, Ordering::Release);
        // Only wakes the thread: when the queue is full it is awake.
        let _ = self.messages.try_send(Message::Wake);
    }
}

#[derive(Debug)]
enum Message {
    Hint(Hint),
    Wake,
}

/// What an event of inotify means here.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Hint {
    File(Key, Change),
    /// Made, and perhaps about to be written.
    Created(Key),
    /// Mode, owner or times.
    Metadata(Key),
    /// A folder itself, or what inotify could not say.
    Rescan,
}

/// Starts the thread. `sink` gets the first state, and then every change; it may take its time.
pub fn start(
    folders: Vec<PathBuf>,
    sink: impl FnMut(Update) + Send + 'static,
) -> std::io::Result<Stop> {
    // inotify reports paths below what was watched: make both absolute, links untouched.
    let folders: Vec<PathBuf> =
        folders.iter().map(std::path::absolute).collect::<Result<_, _>>()?;
    let (messages, inbox) = sync_channel(MAX_EVENTS);
    let stopped = Arc::new(AtomicBool::new(false));
    let stop = Stop { messages: messages.clone(), stopped: stopped.clone() };
    let name = std::thread::Builder::new().name("watch".into());
    name.spawn(move || {
        let lost = Arc::new(AtomicBool::new(false));
        let watches = Watches::new(&folders, messages, lost.clone());
        let tree = Tree::new(folders.clone());
        Loop { folders, tree, watches, lost, stopped, debounce: Debounce::default() }
            .run(&inbox, sink);
    })?;
    Ok(stop)
}

struct Loop {
    folders: Vec<PathBuf>,
    tree: Tree,
    watches: Watches,
    /// Events were dropped.
    lost: Arc<AtomicBool>,
    stopped: Arc<AtomicBool>,
    debounce: Debounce<Key>,
}

impl Loop {
    fn run(mut self, inbox: &Receiver<Message>, mut sink: impl FnMut(Update)) {
        // Watches first, then the scan: nothing falls in between.
        self.watches.renew();
        let (news, _) = self.tree.rescan(Duration::ZERO);
        let mut diagnostics = self.diagnostics();
        sink(self.update(news));
        let mut next_scan = Instant::now() + self.interval();
        loop {
            let wake = self.debounce.due_at().map_or(next_scan, |due| due.min(next_scan));
            match inbox.recv_timeout(wake.saturating_duration_since(Instant::now())) {
                Ok(Message::Hint(hint)) => self.handle(hint),
                Ok(Message::Wake) | Err(RecvTimeoutError::Timeout) => {}
                Err(RecvTimeoutError::Disconnected) => return,
            }
            if self.stopped.load(Ordering::Acquire) {
                return;
            }
            let now = Instant::now();
            if self.lost.swap(false, Ordering::AcqRel) {
                tracing::warn!("file events were lost; looking at every file");
                self.debounce.handle_rescan(now);
            }
            let batch = self.debounce.take(now);
            let mut news = self.tree.refresh(&batch.paths);
            if batch.rescan || now >= next_scan {
                news.extend(self.rescan());
                // At most a fiftieth of the time goes into looking.
                next_scan = Instant::now() + self.interval().max(50 * now.elapsed());
            }
            let now_wrong = self.diagnostics();
            if !news.is_empty() || now_wrong != diagnostics {
                diagnostics = now_wrong;
                sink(self.update(news));
            }
        }
    }

    fn rescan(&mut self) -> Vec<News> {
        self.watches.renew();
        let (news, unsettled) = self.tree.rescan(QUIET);
        let now = Instant::now();
        unsettled.into_iter().for_each(|key| self.debounce.handle(now, key, Change::Settled));
        news
    }

    fn interval(&self) -> Duration {
        if self.watches.problem.is_some() || self.tree.needs_polling() { POLL } else { RESCAN }
    }

    fn diagnostics(&self) -> Vec<Diagnostic> {
        let mut all = self.tree.diagnostics();
        all.extend(self.watches.problem.clone());
        all
    }

    fn update(&self, news: Vec<News>) -> Update {
        Update {
            news,
            diagnostics: self.diagnostics(),
            complete: self.tree.is_complete(),
            missing: self.tree.missing(),
        }
    }

    fn handle(&mut self, hint: Hint) {
        let now = Instant::now();
        match hint {
            // Of a file that was not there, more may follow: an editor's two steps, or a whole folder.
            Hint::File(key, Change::Replaced) if !self.tree.has(&key) => {
                self.debounce.handle(now, key, Change::Settled);
            }
            Hint::File(key, change) => self.debounce.handle(now, key, change),
            Hint::Created(key) => {
                // A link is whole when it is there; a file is written first.
                let path = self.folders[key.0].join(&key.1);
                let change = if path.is_symlink() { Change::Settled } else { Change::Writing };
                self.debounce.handle(now, key, change);
            }
            // Matters only when the file could not be read; and must not end the wait for a writer.
            Hint::Metadata(key) if self.tree.has_problem(&key) => {
                self.debounce.handle(now, key, Change::Settled);
            }
            Hint::Metadata(_) => {}
            Hint::Rescan => self.debounce.handle_rescan(now),
        }
    }
}

/// What an event on `path` means, if anything. Runs for each event of the folders and their parents.
fn classify(folders: &[PathBuf], path: &Path, kind: EventKind) -> Option<Hint> {
    // Our own reading causes these.
    if matches!(kind, EventKind::Access(access) if access != AccessKind::Close(AccessMode::Write)) {
        return None;
    }
    if folders.iter().any(|folder| folder == path) {
        return Some(Hint::Rescan);
    }
    let index = folders.iter().position(|folder| path.parent() == Some(folder))?;
    let name = path.file_name()?;
    if !is_config(name) {
        // Kubernetes swaps whole volumes by renaming the link `..data`, to which the files link.
        return name.as_encoded_bytes().starts_with(b"..").then_some(Hint::Rescan);
    }
    let key = (index, name.to_str()?.to_owned());
    match kind {
        EventKind::Access(_) => Some(Hint::File(key, Change::Settled)),
        EventKind::Modify(ModifyKind::Name(RenameMode::To)) => {
            Some(Hint::File(key, Change::Replaced))
        }
        EventKind::Create(CreateKind::Folder) | EventKind::Remove(RemoveKind::Folder) => None,
        EventKind::Create(_) => Some(Hint::Created(key)),
        EventKind::Remove(_) | EventKind::Modify(ModifyKind::Name(RenameMode::From)) => {
            Some(Hint::File(key, Change::Gone))
        }
        // Both ends are told one by one as well.
        EventKind::Modify(ModifyKind::Name(RenameMode::Both)) => None,
        EventKind::Modify(ModifyKind::Metadata(_)) => Some(Hint::Metadata(key)),
        EventKind::Modify(_) => Some(Hint::File(key, Change::Writing)),
        EventKind::Any | EventKind::Other => Some(Hint::Rescan),
    }
}

/// The inotify watches: on each folder, and on its parent to see the folder come and go.
struct Watches {
    watcher: Option<notify::RecommendedWatcher>,
    /// What is watched, and which directory it was then.
    watched: BTreeMap<PathBuf, Option<(u64, u64)>>,
    folders: Vec<PathBuf>,
    /// Why changes are not told, or not all.
    problem: Option<Diagnostic>,
}

impl Watches {
    fn new(folders: &[PathBuf], messages: SyncSender<Message>, lost: Arc<AtomicBool>) -> Self {
        let all = folders.to_vec();
        let mut watches = Self {
            watcher: None,
            watched: folders.iter().map(|f| (f.clone(), None)).collect(),
            folders: all.clone(),
            problem: None,
        };
        let parents = folders.iter().filter_map(|f| f.parent()).map(|p| (p.to_owned(), None));
        watches.watched.extend(parents.filter(|(p, _)| !all.contains(p)).collect::<Vec<_>>());
        let handler = move |event: notify::Result<notify::Event>| {
            let hints: Vec<Hint> = match event {
                Ok(event) if !event.need_rescan() => {
                    event.paths.iter().filter_map(|p| classify(&all, p, event.kind)).collect()
                }
                _ => vec![Hint::Rescan],
            };
            for hint in hints {
                if let Err(TrySendError::Full(_)) = messages.try_send(Message::Hint(hint)) {
                    lost.store(true, Ordering::Release);
                }
            }
        };
        match notify::recommended_watcher(handler) {
            Ok(watcher) => watches.watcher = Some(watcher),
            Err(e) => watches.problem = Some(not_told("the folders", &e)),
        }
        watches
    }

    /// Watches what is there now. Must be followed by a rescan: changes in between are not told.
    fn renew(&mut self) {
        let Some(watcher) = &mut self.watcher else { return };
        self.problem = None;
        for (path, identity) in &mut self.watched {
            let now = fs::metadata(path).ok().map(|m| (m.dev(), m.ino()));
            if *identity != now && identity.is_some() {
                // Fails when the directory is gone, and its watch with it.
                let _ = watcher.unwatch(path);
            }
            *identity = now;
            if now.is_none() {
                continue;
            }
            // Again even when nothing changed: the inode may be a new directory under an old number.
            if let Err(e) = watcher.watch(path, RecursiveMode::NonRecursive)
                && self.folders.contains(path)
            {
                self.problem = Some(not_told(&path.display().to_string(), &e));
            }
        }
    }
}

fn not_told(what: &str, error: &notify::Error) -> Diagnostic {
    let help = match error.kind {
        notify::ErrorKind::MaxFilesWatch => "raise the sysctl fs.inotify.max_user_watches",
        _ => "raise the sysctl fs.inotify.max_user_instances, or the limit of open files",
    };
    let message = format!(
        "changes in {what} are noticed after up to {POLL:?}, not at once: inotify: {error}"
    );
    Diagnostic::warning(Code::Unreadable, message).help(help)
}

#[cfg(test)]
mod tests;
