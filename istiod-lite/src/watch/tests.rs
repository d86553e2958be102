//! The watcher over real folders and real inotify.

use super::*;
use std::sync::mpsc::{Receiver, channel};

/// What a test waits for at most; passing takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(10);

struct Watching {
    dir: tempfile::TempDir,
    updates: Receiver<Update>,
    files: BTreeMap<Key, String>,
    update: Update,
    _stop: Stop,
}

impl Watching {
    fn start(folders: &[&str]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        if !folders.contains(&"later") {
            folders.iter().for_each(|f| fs::create_dir_all(dir.path().join(f)).unwrap());
        }
        let (tx, updates) = channel();
        let paths = folders.iter().map(|f| dir.path().join(f)).collect();
        let stop = start(paths, move |update| _ = tx.send(update)).unwrap();
        let update = Update { news: vec![], diagnostics: vec![], complete: false, missing: vec![] };
        let mut watching = Self { dir, updates, files: BTreeMap::new(), update, _stop: stop };
        watching.take();
        watching
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn take(&mut self) {
        self.update = self.updates.recv_timeout(PATIENCE).expect("no update in time");
        for news in std::mem::take(&mut self.update.news) {
            match news {
                News::Set { key, text } => _ = self.files.insert(key, text),
                News::Removed { key } => _ = self.files.remove(&key),
            }
        }
    }

    fn until(&mut self, what: &str, holds: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !holds(self) {
            assert!(start.elapsed() < PATIENCE, "{what}: {:?} {:?}", self.files, self.update);
            self.take();
        }
    }

    fn until_text(&mut self, name: &str, want: Option<&str>) {
        let key = (0, name.to_owned());
        self.until(name, |w| w.files.get(&key).map(String::as_str) == want);
    }
}

#[test]
fn files_come_change_and_go() {
    let mut w = Watching::start(&["a"]);
    assert!(w.update.complete);
    fs::write(w.path("a/x.yaml"), "1").unwrap();
    w.until_text("x.yaml", Some("1"));
    fs::write(w.path("a/x.yaml"), "2").unwrap();
    w.until_text("x.yaml", Some("2"));
    // As editors and launchers save.
    fs::write(w.path("a/.x.tmp"), "3").unwrap();
    fs::rename(w.path("a/.x.tmp"), w.path("a/x.yaml")).unwrap();
    w.until_text("x.yaml", Some("3"));
    fs::remove_file(w.path("a/x.yaml")).unwrap();
    w.until_text("x.yaml", None);
}

#[test]
fn a_save_in_steps_is_never_seen_half() {
    use std::io::Write;
    let mut w = Watching::start(&["a"]);
    fs::write(w.path("a/x.yaml"), "old").unwrap();
    w.until_text("x.yaml", Some("old"));
    let mut file = fs::File::create(w.path("a/x.yaml")).unwrap();
    file.write_all(b"ne").unwrap();
    // Another file gets through meanwhile; this one is still open and waits.
    fs::write(w.path("a/y.yaml"), "1").unwrap();
    w.until_text("y.yaml", Some("1"));
    assert_eq!(w.files[&(0, "x.yaml".into())], "old");
    file.write_all(b"w").unwrap();
    drop(file);
    w.until("x.yaml", |w| w.files[&(0, "x.yaml".into())] != "old");
    assert_eq!(w.files[&(0, "x.yaml".into())], "new");
    // vim: the old one is renamed away, a new one is written.
    fs::rename(w.path("a/x.yaml"), w.path("a/x.yaml~")).unwrap();
    fs::write(w.path("a/x.yaml"), "vim").unwrap();
    fs::remove_file(w.path("a/x.yaml~")).unwrap();
    // That there is no moment without it, `debounce` decides, on times of a table; a disk may be slower than it waits.
    w.until_text("x.yaml", Some("vim"));
}

#[test]
fn folders_come_late_vanish_and_return() {
    let mut w = Watching::start(&["later"]);
    assert!(!w.update.complete);
    assert_eq!(w.update.missing, [w.path("later")]);
    fs::create_dir(w.path("later")).unwrap();
    fs::write(w.path("later/x.yaml"), "1").unwrap();
    w.until_text("x.yaml", Some("1"));
    assert!(w.update.complete);

    fs::remove_dir_all(w.path("later")).unwrap();
    w.until("vanished", |w| !w.update.diagnostics.is_empty());
    assert_eq!(w.files.len(), 1, "its last state stays in force");
    fs::create_dir(w.path("later")).unwrap();
    fs::write(w.path("later/x.yaml"), "2").unwrap();
    w.until_text("x.yaml", Some("2"));
    w.until("well again", |w| w.update.diagnostics.is_empty());
    // The new folder is watched, too.
    fs::write(w.path("later/x.yaml"), "3").unwrap();
    w.until_text("x.yaml", Some("3"));
    // Swapped for another at once.
    fs::create_dir(w.path("next")).unwrap();
    fs::write(w.path("next/x.yaml"), "4").unwrap();
    fs::rename(w.path("later"), w.path("before")).unwrap();
    fs::rename(w.path("next"), w.path("later")).unwrap();
    w.until_text("x.yaml", Some("4"));
    fs::write(w.path("later/x.yaml"), "5").unwrap();
    w.until_text("x.yaml", Some("5"));
}

#[test]
fn two_folders_are_kept_apart() {
    let mut w = Watching::start(&["a", "a/objects"]);
    fs::write(w.path("a/objects/x.json"), "1").unwrap();
    fs::write(w.path("a/x.json"), "0").unwrap();
    w.until("both", |w| w.files.len() == 2);
    assert_eq!(w.files[&(0, "x.json".into())], "0");
    assert_eq!(w.files[&(1, "x.json".into())], "1");
}

#[test]
fn volumes_swapped_by_link_are_seen() {
    use std::os::unix::fs::symlink;
    let mut w = Watching::start(&["a"]);
    for (version, text) in [("..v1", "1"), ("..v2", "2")] {
        fs::create_dir(w.path("a").join(version)).unwrap();
        fs::write(w.path("a").join(version).join("x.yaml"), text).unwrap();
    }
    symlink("..v1", w.path("a/..data")).unwrap();
    symlink("..data/x.yaml", w.path("a/x.yaml")).unwrap();
    w.until_text("x.yaml", Some("1"));
    symlink("..v2", w.path("a/..tmp")).unwrap();
    fs::rename(w.path("a/..tmp"), w.path("a/..data")).unwrap();
    w.until_text("x.yaml", Some("2"));
}

#[test]
fn a_file_that_becomes_readable_is_read() {
    use std::os::unix::fs::PermissionsExt;
    let mut w = Watching::start(&["a"]);
    let mode = |w: &Watching, mode| {
        fs::set_permissions(w.path("a/x.yaml"), fs::Permissions::from_mode(mode)).unwrap();
    };
    fs::write(w.path("a/x.tmp"), "1").unwrap();
    fs::set_permissions(w.path("a/x.tmp"), fs::Permissions::from_mode(0o000)).unwrap();
    fs::rename(w.path("a/x.tmp"), w.path("a/x.yaml")).unwrap();
    // Root reads it at once: then the wait is over here already.
    w.until("noticed", |w| !w.update.diagnostics.is_empty() || !w.files.is_empty());
    mode(&w, 0o644);
    w.until_text("x.yaml", Some("1"));
}

#[test]
fn events() {
    use notify::event::DataChange;
    let folders = [PathBuf::from("/m"), PathBuf::from("/s/objects")];
    let check = |path: &str, kind: EventKind, want: Option<Hint>| {
        assert_eq!(classify(&folders, Path::new(path), kind), want, "{path} {kind:?}");
    };
    let closed = EventKind::Access(AccessKind::Close(AccessMode::Write));
    let data = EventKind::Modify(ModifyKind::Data(DataChange::Any));
    let to = EventKind::Modify(ModifyKind::Name(RenameMode::To));
    let from = EventKind::Modify(ModifyKind::Name(RenameMode::From));
    let file = |i: usize, name: &str, change| Some(Hint::File((i, name.into()), change));
    check("/m/a.yaml", closed, file(0, "a.yaml", Change::Settled));
    check("/m/a.yaml", data, file(0, "a.yaml", Change::Writing));
    check("/s/objects/a.json", to, file(1, "a.json", Change::Replaced));
    check("/s/objects/a.json", from, file(1, "a.json", Change::Gone));
    check("/m/a.yaml", EventKind::Remove(RemoveKind::File), file(0, "a.yaml", Change::Gone));
    check("/m/a.yaml", EventKind::Access(AccessKind::Open(AccessMode::Any)), None);
    check("/m/a.yaml", EventKind::Access(AccessKind::Close(AccessMode::Read)), None);
    check("/m/.a.yaml.swp", data, None);
    check("/m/a.yaml~", to, None);
    check("/m/..data", to, Some(Hint::Rescan));
    check("/m", EventKind::Remove(RemoveKind::Folder), Some(Hint::Rescan));
    check("/m", EventKind::Create(CreateKind::Folder), Some(Hint::Rescan));
    check("/elsewhere", EventKind::Create(CreateKind::Folder), None);
    check("/m/sub/a.yaml", closed, None);
}

#[test]
fn dropping_the_handle_ends_the_thread() {
    let w = Watching::start(&["a"]);
    let Watching { updates, _stop, dir: _dir, .. } = w;
    drop(_stop);
    // The sink, and with it the sender, goes with the thread.
    assert!(updates.recv_timeout(PATIENCE).is_err_and(|e| e == RecvTimeoutError::Disconnected));
}
