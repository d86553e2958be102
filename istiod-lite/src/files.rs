//! Files of the state directory: whole or not at all, and secrets for nobody else.
//!
//! Invariants: a reader never sees half a file (write beside, sync, rename); a key that group or others
//! may read is refused and not silently repaired, because it may already have been read.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

/// Mode of files that anyone on the machine may read.
pub(crate) const PUBLIC: u32 = 0o644;
/// Mode of keys.
pub(crate) const SECRET: u32 = 0o600;

/// The largest file this module reads: certificates and keys are below 4 KiB.
const MAX_STATE_FILE: u64 = 64 * 1024;

/// What went wrong with which file, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    #[error("cannot {what} {}: {source}{}", path.display(), hint(source))]
    Io { what: &'static str, path: PathBuf, source: io::Error },
    #[error(
        "{} holds a private key and its mode is {mode:03o}: others may have read it; \
         run `chmod 600 {}` if you trust everybody on this machine, else remove the state directory for new keys",
        path.display(), path.display()
    )]
    Exposed { path: PathBuf, mode: u32 },
    #[error("{} is larger than {MAX_STATE_FILE} bytes: it was not written by istiod-lite", path.display())]
    TooLarge { path: PathBuf },
    #[error("{} is in use by another istiod-lite: stop that one, or give this one its own --state-dir", path.display())]
    InUse { path: PathBuf },
}

impl FileError {
    /// Whether the file simply is not there.
    pub fn is_not_found(&self) -> bool {
        matches!(self, Self::Io { source, .. } if source.kind() == io::ErrorKind::NotFound)
    }
}

fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            " (the disk is full: make room, nothing else is lost)"
        }
        io::ErrorKind::PermissionDenied => " (check owner and mode)",
        io::ErrorKind::ReadOnlyFilesystem => " (choose a writable --state-dir)",
        _ => "",
    }
}

fn failed<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> FileError + 'a {
    move |source| FileError::Io { what, path: path.to_owned(), source }
}

/// Creates the directory for this user alone unless it exists.
pub(crate) fn create_dir(path: &Path) -> Result<(), FileError> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(path)
        .map_err(failed("create directory", path))
}

/// Takes the directory for this process; released when the returned file is dropped, also by a crash.
pub(crate) fn lock_dir(dir: &Path) -> Result<File, FileError> {
    let path = dir.join("lock");
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .mode(SECRET)
        .open(&path)
        .map_err(failed("open", &path))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(fs::TryLockError::WouldBlock) => Err(FileError::InUse { path: dir.to_owned() }),
        Err(fs::TryLockError::Error(source)) => Err(failed("lock", &path)(source)),
    }
}

/// Replaces the file by rename, so that readers see the old or the new content and a full disk leaves
/// the old one in place.
pub(crate) fn write_atomic(path: &Path, content: &[u8], mode: u32) -> Result<(), FileError> {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    let temporary = path.with_file_name(format!(".{name}.{}.tmp", std::process::id()));
    let written = (|| {
        // A leftover of a crash may have another mode; `create_new` below then sets ours.
        let _ = fs::remove_file(&temporary);
        let mut file =
            OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
        file.write_all(content)?;
        file.sync_all()?;
        fs::rename(&temporary, path)?;
        // The rename itself must survive a power cut; not every file system can sync a directory.
        if let Some(dir) = path.parent().and_then(|dir| File::open(dir).ok()) {
            let _ = dir.sync_all();
        }
        Ok(())
    })();
    written.map_err(|source| {
        let _ = fs::remove_file(&temporary);
        failed("write", path)(source)
    })
}

/// Reads a small file of the state directory.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    read_checked(path, |_| Ok(()))
}

/// Reads a private key: refuses what group or others may access. The mode is that of the opened file,
/// so nothing can be swapped between check and read.
pub(crate) fn read_secret(path: &Path) -> Result<Vec<u8>, FileError> {
    read_checked(path, |metadata| {
        let mode = metadata.mode() & 0o777;
        if mode & 0o077 == 0 {
            Ok(())
        } else {
            Err(FileError::Exposed { path: path.to_owned(), mode })
        }
    })
}

fn read_checked(
    path: &Path,
    check: impl FnOnce(&fs::Metadata) -> Result<(), FileError>,
) -> Result<Vec<u8>, FileError> {
    let file = File::open(path).map_err(failed("read", path))?;
    check(&file.metadata().map_err(failed("read", path))?)?;
    let mut content = Vec::new();
    file.take(MAX_STATE_FILE + 1).read_to_end(&mut content).map_err(failed("read", path))?;
    if content.len() as u64 > MAX_STATE_FILE {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    Ok(content)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[test]
    fn secrets_are_private_and_stay_so() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("key.pem");
        write_atomic(&path, b"secret", SECRET).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(read_secret(&path).unwrap(), b"secret");
        let check = |mode: u32, readable: bool| {
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
            let got = read_secret(&path);
            assert_eq!(got.is_ok(), readable, "{mode:o}: {got:?}");
            if let Err(e) = got {
                assert!(e.to_string().contains("chmod 600"), "{e}");
            }
        };
        check(0o600, true);
        check(0o400, true);
        check(0o640, false);
        check(0o604, false);
        check(0o660, false);
    }

    #[test]
    fn a_failed_write_keeps_the_old_content_and_leaves_no_litter() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        write_atomic(&path, b"old", PUBLIC).unwrap();
        write_atomic(&path, b"new", PUBLIC).unwrap();
        assert_eq!(read(&path).unwrap(), b"new");
        // A directory in place of the file: rename fails.
        let blocked = dir.path().join("d");
        fs::create_dir_all(blocked.join("x")).unwrap();
        let error = write_atomic(&blocked, b"new", PUBLIC).unwrap_err().to_string();
        assert!(error.contains(blocked.to_str().unwrap()), "{error}");
        let names: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names.len(), 2, "{names:?}");
    }

    #[test]
    fn one_process_per_state_directory() {
        let dir = tempfile::tempdir().unwrap();
        let held = lock_dir(dir.path()).unwrap();
        let error = lock_dir(dir.path()).unwrap_err().to_string();
        assert!(error.contains("--state-dir"), "{error}");
        drop(held);
        lock_dir(dir.path()).unwrap();
    }

    #[test]
    fn large_files_are_not_read() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a");
        let at_limit = usize::try_from(MAX_STATE_FILE).unwrap();
        fs::write(&path, vec![0; at_limit]).unwrap();
        assert_eq!(read(&path).unwrap().len(), at_limit);
        fs::write(&path, vec![0; at_limit + 1]).unwrap();
        assert!(matches!(read(&path), Err(FileError::TooLarge { .. })));
    }
}
