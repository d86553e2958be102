//! What is in the folders: which files count, and what in them is new.
//!
//! Invariants: a file or folder that cannot be read keeps what it said last, with a diagnostic; a folder
//! that vanishes as a whole keeps it too, since deleting every policy at once is an accident more often
//! than a wish; nothing is read without a limit.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use compile::{Code, Diagnostic, Severity};

/// A Kubernetes object has at most 1.5 MiB in etcd, and one file rarely holds more than a few dozen.
pub const MAX_FILE: u64 = 1 << 20;
/// One object a file and 100,000 pods, doubled.
pub const MAX_FILES: usize = 200_000;
/// All files together: 100,000 pods of 2 KiB, doubled. What is parsed takes several times the memory.
pub const MAX_TOTAL: u64 = 512 << 20;
/// Diagnostics about one folder's subfolders; the rest of them says nothing new.
const MAX_SUBFOLDERS_NAMED: usize = 10;

/// A file: the index of its folder and its name.
pub type Key = (usize, String);

/// What changed for the parser.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum News {
    Set { key: Key, text: String },
    Removed { key: Key },
}

/// The folders as last seen.
#[derive(Debug)]
pub struct Tree {
    folders: Vec<Folder>,
    files: BTreeMap<Key, Seen>,
    /// What is wrong with a file, or (empty name) with a folder.
    problems: BTreeMap<Key, Diagnostic>,
    total: u64,
}

#[derive(Debug)]
struct Folder {
    path: PathBuf,
    /// It was there and readable at least once.
    was_read: bool,
    /// It can be read now.
    present: bool,
}

/// By what a change is noticed without reading.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Stamp {
    device: u64,
    inode: u64,
    size: u64,
    modified: (i64, i64),
    changed: (i64, i64),
}

#[derive(Clone, Copy, Debug)]
struct Seen {
    stamp: Stamp,
    /// Counted in the total.
    size: u64,
    symlink: bool,
}

impl Tree {
    pub fn new(folders: impl IntoIterator<Item = PathBuf>) -> Self {
        let folders = folders
            .into_iter()
            .map(|path| Folder { path, was_read: false, present: false })
            .collect();
        Self { folders, files: BTreeMap::new(), problems: BTreeMap::new(), total: 0 }
    }

    /// Every folder has been read at least once: what we know is a mesh and not a part of one.
    pub fn is_complete(&self) -> bool {
        self.folders.iter().all(|f| f.was_read)
    }

    /// Events alone would miss something: a folder is missing, or a link's target lies elsewhere.
    pub fn needs_polling(&self) -> bool {
        self.folders.iter().any(|f| !f.present) || self.files.values().any(|s| s.symlink)
    }

    /// The file was there when it was last looked at.
    pub fn has(&self, key: &Key) -> bool {
        self.files.contains_key(key)
    }

    /// The newest content of this file could not be read.
    pub fn has_problem(&self, key: &Key) -> bool {
        self.problems.contains_key(key)
    }

    /// The folders that have never been read.
    pub fn missing(&self) -> Vec<PathBuf> {
        self.folders.iter().filter(|f| !f.was_read).map(|f| f.path.clone()).collect()
    }

    pub fn diagnostics(&self) -> Vec<Diagnostic> {
        self.problems.values().cloned().collect()
    }

    /// Looks at every file; reads those that changed. A changed file younger than `settle` may still be
    /// written to: it is not read but returned, to be asked for again with [`Self::refresh`].
    pub fn rescan(&mut self, settle: Duration) -> (Vec<News>, Vec<Key>) {
        let (mut news, mut unsettled) = (Vec::new(), Vec::new());
        for index in 0..self.folders.len() {
            let path = self.folders[index].path.clone();
            match list(&path) {
                Ok(listing) => {
                    self.folders[index].was_read = true;
                    self.folders[index].present = true;
                    self.problems.remove(&(index, String::new()));
                    self.name_subfolders(index, &listing.subfolders);
                    self.rescan_folder(index, &listing.files, settle, &mut news, &mut unsettled);
                }
                Err(error) => self.folder_lost(index, &error),
            }
        }
        (news, unsettled)
    }

    /// Reads these files again, whatever their age.
    pub fn refresh(&mut self, keys: &[Key]) -> Vec<News> {
        let mut news = Vec::new();
        for key in keys {
            // A folder on its way out takes its files along one by one; see the invariant.
            if self.folders[key.0].path.is_dir() {
                self.read(key, &mut news);
            }
        }
        news
    }

    fn rescan_folder(
        &mut self,
        index: usize,
        names: &BTreeSet<String>,
        settle: Duration,
        news: &mut Vec<News>,
        unsettled: &mut Vec<Key>,
    ) {
        let known = self.files.range((index, String::new())..(index + 1, String::new()));
        let problems = self.problems.range((index, "\0".to_owned())..(index + 1, String::new()));
        let gone: BTreeSet<Key> = known
            .map(|(key, _)| key)
            .chain(problems.map(|(key, _)| key))
            .filter(|key| !names.contains(&key.1) && !key.1.ends_with('/'))
            .cloned()
            .collect();
        gone.iter().for_each(|key| self.forget(key, news));
        for name in names {
            let key = (index, name.clone());
            let Ok(metadata) = fs::metadata(self.path(&key)) else {
                self.read(&key, news);
                continue;
            };
            let stamp = Stamp::of(&metadata);
            if self.files.get(&key).is_some_and(|seen| seen.stamp == stamp) {
                continue;
            }
            let age =
                metadata.modified().ok().and_then(|m| SystemTime::now().duration_since(m).ok());
            if age.is_some_and(|age| age < settle) {
                unsettled.push(key);
            } else {
                self.read(&key, news);
            }
        }
    }

    fn read(&mut self, key: &Key, news: &mut Vec<News>) {
        let path = self.path(key);
        let known = self.files.get(key).copied();
        let room = MAX_TOTAL.saturating_sub(self.total - known.map_or(0, |s| s.size));
        if known.is_none() && self.files.len() >= MAX_FILES {
            let what = format!("not read: there are {MAX_FILES} files already");
            return self.problem(
                key,
                Code::LimitExceeded,
                what,
                "remove files that are not needed",
            );
        }
        match read_file(&path, room) {
            Ok((text, metadata)) => {
                let size = metadata.len();
                let symlink = path.is_symlink();
                self.total = self.total - known.map_or(0, |s| s.size) + size;
                self.files.insert(key.clone(), Seen { stamp: Stamp::of(&metadata), size, symlink });
                self.problems.remove(key);
                news.push(News::Set { key: key.clone(), text });
            }
            Err(ReadError::Io(e)) if e.kind() == io::ErrorKind::NotFound && !path.is_symlink() => {
                self.forget(key, news);
            }
            Err(ReadError::NotAFile) => self.forget(key, news),
            Err(error) => {
                let stays =
                    if known.is_some() { "; its last good objects stay in force" } else { "" };
                self.problem(key, error.code(), format!("{error}{stays}"), error.help());
            }
        }
    }

    fn forget(&mut self, key: &Key, news: &mut Vec<News>) {
        self.problems.remove(key);
        if let Some(seen) = self.files.remove(key) {
            self.total -= seen.size;
            news.push(News::Removed { key: key.clone() });
        }
    }

    fn folder_lost(&mut self, index: usize, error: &io::Error) {
        let folder = &mut self.folders[index];
        folder.present = false;
        let path = folder.path.display();
        let (severity, message) = match (folder.was_read, error.kind()) {
            (false, io::ErrorKind::NotFound) => (
                Severity::Warning,
                format!(
                    "the folder {path} does not exist; nothing is sent to proxies before it does"
                ),
            ),
            (false, _) => (Severity::Error, format!("the folder {path} cannot be read: {error}")),
            (true, io::ErrorKind::NotFound) => (
                Severity::Error,
                format!("the folder {path} is gone; its last good objects stay in force"),
            ),
            (true, _) => (
                Severity::Error,
                format!(
                    "the folder {path} cannot be read: {error}; its last good objects stay in force"
                ),
            ),
        };
        let diagnostic = Diagnostic::new(severity, Code::Unreadable, message)
            .help("create it; an empty folder is an empty mesh");
        self.problems.insert((index, String::new()), diagnostic);
    }

    /// `kubectl apply -f DIR` reads no subfolders, and neither do we. A policy in there would be missed.
    fn name_subfolders(&mut self, index: usize, subfolders: &BTreeSet<String>) {
        let slash = |name: &String| format!("{name}/");
        let now: BTreeSet<String> =
            subfolders.iter().take(MAX_SUBFOLDERS_NAMED).map(slash).collect();
        self.problems
            .retain(|(i, name), _| *i != index || !name.ends_with('/') || now.contains(name));
        for name in now {
            let what = "this subfolder has YAML files, which are not read".to_owned();
            let help = "move them up, or give the subfolder as a folder of its own";
            self.problem(&(index, name), Code::Unreadable, what, help);
        }
    }

    fn problem(&mut self, key: &Key, code: Code, message: String, help: &str) {
        let severity = if key.1.ends_with('/') { Severity::Warning } else { Severity::Error };
        let diagnostic = Diagnostic::new(severity, code, message).origin(key.1.clone()).help(help);
        self.problems.insert(key.clone(), diagnostic);
    }

    fn path(&self, key: &Key) -> PathBuf {
        self.folders[key.0].path.join(&key.1)
    }
}

/// Whether a file name is configuration: `.yaml`, `.yml` or `.json`, and not an editor's own file.
pub fn is_config(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else { return false };
    // `.a.yaml.swp` fails by its end, `.#a.yaml` (emacs) and `.goutputstream` by its dot.
    !name.starts_with('.')
        && !name.starts_with('#')
        && [".yaml", ".yml", ".json"]
            .iter()
            .any(|end| name.len() > end.len() && name.ends_with(end))
}

struct Listing {
    files: BTreeSet<String>,
    /// Those with configuration in them.
    subfolders: BTreeSet<String>,
}

fn list(path: &Path) -> io::Result<Listing> {
    let mut listing = Listing { files: BTreeSet::new(), subfolders: BTreeSet::new() };
    for entry in fs::read_dir(path)? {
        let entry = entry?;
        let name = entry.file_name();
        let is_dir = entry.file_type().is_ok_and(|t| t.is_dir());
        if is_dir && !name.as_encoded_bytes().starts_with(b".") {
            let has =
                |dir: fs::ReadDir| dir.flatten().take(1000).any(|e| is_config(&e.file_name()));
            if fs::read_dir(entry.path()).is_ok_and(has) {
                listing.subfolders.insert(name.to_string_lossy().into_owned());
            }
        } else if !is_dir && is_config(&name) {
            listing.files.insert(name.to_string_lossy().into_owned());
        }
    }
    Ok(listing)
}

#[derive(Debug, thiserror::Error)]
enum ReadError {
    #[error("cannot be read: {0}")]
    Io(io::Error),
    #[error("not a regular file")]
    NotAFile,
    #[error("has {0} bytes, more than {MAX_FILE}")]
    TooLarge(u64),
    #[error("not read: all files together would exceed {MAX_TOTAL} bytes")]
    NoRoom,
    #[error("is not UTF-8 text (byte {0})")]
    NotText(usize),
}

impl ReadError {
    fn code(&self) -> Code {
        match self {
            Self::Io(_) | Self::NotAFile => Code::Unreadable,
            Self::TooLarge(_) | Self::NoRoom => Code::LimitExceeded,
            Self::NotText(_) => Code::InvalidSyntax,
        }
    }

    fn help(&self) -> &'static str {
        match self {
            Self::Io(_) | Self::NotAFile => "check owner, mode and what a link points to",
            Self::TooLarge(_) => "split it into several files",
            Self::NoRoom => "remove files that are not needed",
            Self::NotText(_) => "save it as UTF-8",
        }
    }
}

fn read_file(path: &Path, room: u64) -> Result<(String, Metadata), ReadError> {
    // Not blocking: opening a named pipe would wait for a writer for ever.
    let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
    let mut file: File = file.map_err(ReadError::Io)?;
    let metadata = file.metadata().map_err(ReadError::Io)?;
    if !metadata.is_file() {
        return Err(ReadError::NotAFile);
    }
    if metadata.len() > MAX_FILE {
        return Err(ReadError::TooLarge(metadata.len()));
    }
    if metadata.len() > room {
        return Err(ReadError::NoRoom);
    }
    let mut bytes = Vec::with_capacity(usize::try_from(metadata.len()).unwrap_or(0));
    (&mut file).take(MAX_FILE + 1).read_to_end(&mut bytes).map_err(ReadError::Io)?;
    if bytes.len() as u64 > MAX_FILE {
        return Err(ReadError::TooLarge(bytes.len() as u64));
    }
    let text =
        String::from_utf8(bytes).map_err(|e| ReadError::NotText(e.utf8_error().valid_up_to()))?;
    // The stamp from before the read: a write in between makes the file look changed, and it is read again.
    Ok((text, metadata))
}

impl Stamp {
    fn of(metadata: &Metadata) -> Self {
        Self {
            device: metadata.dev(),
            inode: metadata.ino(),
            size: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
            changed: (metadata.ctime(), metadata.ctime_nsec()),
        }
    }
}

#[cfg(test)]
mod tests;
