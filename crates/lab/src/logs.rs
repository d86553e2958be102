//! Log files of containers and mesh processes: everything a process writes, in two files of limited size.
//!
//! `NAME.log` grows to [`HALF`], then becomes `NAME.log.1` and starts anew, so that a chatty pod cannot fill the disk.
//! A disk that is full all the same costs lines, never the process: its pipe is always read.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;

/// As much as a person scrolls through; two of these a container, some dozens of containers.
const HALF: u64 = 4 * 1024 * 1024;
/// What one read takes: a pipe holds 64 KiB.
const CHUNK: usize = 64 * 1024;
/// How soon `logs -f` shows a new line.
const FOLLOW_EVERY: Duration = Duration::from_millis(100);

/// A pipe whose other end a process gets as its output, copied to `path` by a task until the last writer is gone.
pub(crate) fn pipe_to(path: PathBuf) -> io::Result<OwnedFd> {
    let (reader, write) = crate::fds::pipe()?;
    let output = Output::to(path);
    tokio::spawn(copy(reader, move |bytes| output.append(bytes)));
    Ok(write)
}

/// A log that several processes write at once, such as one that drains and its successor.
#[derive(Clone)]
pub(crate) struct Output(Arc<Mutex<Log>>);

impl Output {
    pub(crate) fn to(path: PathBuf) -> Self {
        Self(Arc::new(Mutex::new(Log::open(path))))
    }

    /// A pipe for one of the processes. Its lines stay whole.
    pub(crate) fn pipe(&self) -> io::Result<OwnedFd> {
        let (reader, write) = crate::fds::pipe()?;
        let (output, mut begun) = (self.clone(), Vec::new());
        tokio::spawn(copy(reader, move |bytes| {
            begun.extend_from_slice(bytes);
            let whole = begun.iter().rposition(|b| *b == b'\n').map_or(0, |last| last + 1);
            // What has no end is no line, and not kept back for ever; neither is the last.
            let all = bytes.is_empty() || begun.len() - whole > CHUNK;
            let whole = if all { begun.len() } else { whole };
            output.append(&begun[..whole]);
            begun.drain(..whole);
        }));
        Ok(write)
    }

    fn append(&self, bytes: &[u8]) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).append(bytes);
    }
}

/// Passes on what is written; an empty piece at the end.
async fn copy(mut from: pipe::Receiver, mut append: impl FnMut(&[u8])) {
    let mut buffer = vec![0; CHUNK];
    loop {
        match from.read(&mut buffer).await {
            Ok(0) => return append(&[]),
            Ok(n) => append(&buffer[..n]),
            Err(e) => return tracing::warn!("read the output of a process: {e}"),
        }
    }
}

struct Log {
    path: PathBuf,
    file: Option<(File, u64)>,
    complained: bool,
}

impl Log {
    fn open(path: PathBuf) -> Self {
        Self { path, file: None, complained: false }
    }

    fn append(&mut self, bytes: &[u8]) {
        if let Err(e) = self.try_append(bytes) {
            self.file = None;
            if !self.complained {
                self.complained = true;
                tracing::warn!("{}: {e}; lines are lost", self.path.display());
            }
        }
    }

    fn try_append(&mut self, bytes: &[u8]) -> io::Result<()> {
        if self.file.is_none() {
            let file = OpenOptions::new().create(true).append(true).mode(0o600).open(&self.path)?;
            let size = file.metadata()?.len();
            self.file = Some((file, size));
        }
        let Some((file, size)) = &mut self.file else { return Ok(()) };
        file.write_all(bytes)?;
        *size += bytes.len() as u64;
        if *size >= HALF {
            fs::rename(&self.path, second(&self.path))?;
            self.file = None;
        }
        Ok(())
    }
}

fn second(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(".1");
    name.into()
}

/// Prints a log to `out`; with `follow`, goes on until `out` is closed or `is_over` says the lab is gone.
pub fn print(
    path: &Path,
    follow: bool,
    out: &mut dyn Write,
    is_over: &dyn Fn() -> bool,
) -> io::Result<()> {
    if let Ok(mut earlier) = File::open(second(path)) {
        io::copy(&mut earlier, out)?;
    }
    let mut file = File::open(path).ok();
    loop {
        if let Some(f) = &mut file {
            io::copy(f, out)?;
            out.flush()?;
        }
        if !follow || is_over() {
            return Ok(());
        }
        pause(FOLLOW_EVERY);
        // The file was rolled over when another one has its name; what was written before that is read first.
        let inode = |m: io::Result<fs::Metadata>| m.map(|m| m.ino()).ok();
        let current = inode(fs::metadata(path));
        let ours = file.as_ref().and_then(|f| inode(f.metadata()));
        if current.is_some() && current != ours {
            if let Some(f) = &mut file {
                io::copy(f, out)?;
            }
            file = File::open(path).ok();
        }
    }
}

/// The last bytes of a log, for error messages.
pub(crate) fn tail(path: &Path, bytes: u64) -> String {
    let read = || -> io::Result<String> {
        let mut file = File::open(path)?;
        let from = file.metadata()?.len().saturating_sub(bytes);
        file.seek(SeekFrom::Start(from))?;
        let mut text = vec![];
        file.read_to_end(&mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    };
    read().unwrap_or_default()
}

fn pause(time: Duration) {
    std::thread::sleep(time);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn two_processes_write_one_log() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        let output = Output::to(path.clone());
        let [mut a, mut b] = [(); 2].map(|()| File::from(output.pipe().unwrap()));
        let written = |want: &str| {
            let (path, want) = (path.clone(), want.to_owned());
            async move {
                while fs::read_to_string(&path).unwrap_or_default() != want {
                    tokio::task::yield_now().await;
                }
            }
        };
        a.write_all(b"beg").unwrap();
        b.write_all(b"whole\nno end").unwrap();
        written("whole\n").await;
        a.write_all(b"un\n").unwrap();
        written("whole\nbegun\n").await;
        drop(b);
        written("whole\nbegun\nno end").await;
    }

    #[test]
    fn logs_roll_over_and_are_printed_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.log");
        let mut log = Log::open(path.clone());
        let line = vec![b'x'; usize::try_from(HALF).unwrap() - 1];
        log.append(&line);
        assert!(!second(&path).exists());
        log.append(b"\n");
        assert!(second(&path).exists());
        log.append(b"new\n");
        let mut out = vec![];
        print(&path, false, &mut out, &|| false).unwrap();
        assert_eq!(out.len(), line.len() + 1 + 4);
        assert!(out.ends_with(b"x\nnew\n"));
        assert_eq!(tail(&path, 3), "ew\n");
    }
}
