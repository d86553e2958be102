//! The tree over real folders.

use super::*;
use std::os::unix::fs::{PermissionsExt, symlink};

const NOW: Duration = Duration::ZERO;

struct World {
    dir: tempfile::TempDir,
    tree: Tree,
}

impl World {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("a")).unwrap();
        let tree = Tree::new([dir.path().join("a")]);
        Self { dir, tree }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, name: &str, text: impl AsRef<[u8]>) {
        fs::write(self.path(name), text).unwrap();
    }

    /// The news of a rescan as short strings.
    fn rescan(&mut self) -> Vec<String> {
        let (news, unsettled) = self.tree.rescan(NOW);
        assert!(unsettled.is_empty());
        news.into_iter().map(show).collect()
    }

    fn problems(&self) -> Vec<String> {
        self.tree.diagnostics().iter().map(ToString::to_string).collect()
    }
}

fn show(news: News) -> String {
    match news {
        News::Set { key, text } => format!("{}:{}={text}", key.0, key.1),
        News::Removed { key } => format!("{}:{} gone", key.0, key.1),
    }
}

#[test]
fn which_names_count() {
    let check = |name: &str, want: bool| assert_eq!(is_config(OsStr::new(name)), want, "{name}");
    for good in ["a.yaml", "a.yml", "a.json", "a b.yaml", "a.b.yaml", "ä.yaml"] {
        check(good, true);
    }
    for bad in [
        "",
        "a",
        "yaml",
        ".yaml",
        ".a.yaml",
        ".a.yaml.swp",
        "a.yaml~",
        "#a.yaml#",
        ".#a.yaml",
        "4913",
        "a.yaml.bak",
        "a.txt",
        "a.YAML.orig",
        "..data",
    ] {
        check(bad, false);
    }
}

#[test]
fn only_what_changed_is_read() {
    let mut w = World::new();
    w.write("a/x.yaml", "1");
    w.write("a/y.json", "2");
    w.write("a/.x.yaml.swp", "no");
    w.write("a/README.md", "no");
    assert_eq!(w.rescan(), ["0:x.yaml=1", "0:y.json=2"]);
    assert_eq!(w.rescan(), [""; 0]);
    // The same size: only the times tell.
    w.write("a/x.yaml", "3");
    assert_eq!(w.rescan(), ["0:x.yaml=3"]);
    fs::rename(w.path("a/x.yaml"), w.path("a/z.yaml")).unwrap();
    assert_eq!(w.rescan(), ["0:x.yaml gone", "0:z.yaml=3"]);
    fs::remove_file(w.path("a/z.yaml")).unwrap();
    assert_eq!(w.rescan(), ["0:z.yaml gone"]);
    assert_eq!(w.problems(), [""; 0]);
}

#[test]
fn a_young_file_is_asked_for_again() {
    let mut w = World::new();
    w.write("a/x.yaml", "1");
    let (news, unsettled) = w.tree.rescan(Duration::from_secs(3600));
    assert_eq!((news, unsettled.clone()), (vec![], vec![(0, "x.yaml".to_owned())]));
    let news: Vec<_> = w.tree.refresh(&unsettled).into_iter().map(show).collect();
    assert_eq!(news, ["0:x.yaml=1"]);
}

#[test]
fn a_folder_that_vanishes_keeps_its_state_until_it_is_back() {
    let mut w = World::new();
    w.write("a/x.yaml", "1");
    assert_eq!(w.rescan(), ["0:x.yaml=1"]);
    fs::remove_dir_all(w.path("a")).unwrap();
    // Both ways to notice.
    assert_eq!(w.tree.refresh(&[(0, "x.yaml".into())]), []);
    assert_eq!(w.rescan(), [""; 0]);
    assert!(w.problems()[0].contains("stay in force"), "{:?}", w.problems());
    assert!(w.tree.needs_polling());
    fs::create_dir(w.path("a")).unwrap();
    assert_eq!(w.rescan(), ["0:x.yaml gone"]);
    assert_eq!(w.problems(), [""; 0]);
    assert!(!w.tree.needs_polling());
}

#[test]
fn a_folder_that_is_not_there_yet_is_waited_for() {
    let dir = tempfile::tempdir().unwrap();
    let mut tree = Tree::new([dir.path().join("a"), dir.path().join("b")]);
    fs::create_dir(dir.path().join("a")).unwrap();
    tree.rescan(NOW);
    assert!(!tree.is_complete() && tree.needs_polling());
    assert_eq!(tree.missing(), [dir.path().join("b")]);
    assert!(tree.diagnostics()[0].to_string().contains("does not exist"));
    fs::create_dir(dir.path().join("b")).unwrap();
    tree.rescan(NOW);
    assert!(tree.is_complete());
    assert_eq!(tree.diagnostics(), []);
}

#[test]
fn what_cannot_be_read_keeps_its_state_and_says_so() {
    let mut w = World::new();
    let check = |w: &mut World, spoil: &dyn Fn(&Path), want: &str| {
        w.write("a/x.yaml", "good");
        w.rescan();
        assert_eq!(w.problems(), [""; 0]);
        spoil(&w.path("a/x.yaml"));
        let news = w.rescan();
        assert_eq!(news, [""; 0], "{want}");
        let problems = w.problems();
        assert!(
            problems[0].contains(want) && problems[0].contains("x.yaml"),
            "{problems:?} / {want}"
        );
        assert!(problems[0].contains("stay in force"), "{problems:?}");
        fs::remove_file(w.path("a/x.yaml")).unwrap();
        assert_eq!(w.rescan(), ["0:x.yaml gone"]);
    };
    let limit = usize::try_from(MAX_FILE).unwrap();
    check(&mut w, &|p| fs::write(p, vec![b'a'; limit + 1]).unwrap(), "more than 1048576");
    check(&mut w, &|p| fs::write(p, b"ab\xff").unwrap(), "not UTF-8 text (byte 2)");
    let dangle = |p: &Path| {
        fs::remove_file(p).unwrap();
        symlink("/nowhere/at/all", p).unwrap();
    };
    check(&mut w, &dangle, "cannot be read");
    // Exactly at the limit is fine.
    w.write("a/x.yaml", vec![b'a'; limit]);
    assert_eq!(w.rescan().len(), 1);
}

#[test]
fn pipes_and_folders_with_a_file_name_are_no_files() {
    let mut w = World::new();
    let pipe = w.path("a/p.yaml");
    let made = std::process::Command::new("mkfifo").arg(&pipe).status();
    fs::create_dir(w.path("a/d.yaml")).unwrap();
    w.write("a/x.yaml", "1");
    assert_eq!(w.rescan(), ["0:x.yaml=1"], "{made:?}");
    // Turned into a folder: the file is gone.
    fs::remove_file(w.path("a/x.yaml")).unwrap();
    fs::create_dir(w.path("a/x.yaml")).unwrap();
    assert_eq!(w.rescan(), ["0:x.yaml gone"]);
}

#[test]
fn links_are_followed_and_polled() {
    let mut w = World::new();
    w.write("target", "1");
    symlink(w.path("target"), w.path("a/x.yaml")).unwrap();
    assert_eq!(w.rescan(), ["0:x.yaml=1"]);
    assert!(w.tree.needs_polling());
    w.write("target", "22");
    assert_eq!(w.rescan(), ["0:x.yaml=22"]);
}

#[test]
fn subfolders_with_yaml_are_named() {
    let mut w = World::new();
    fs::create_dir_all(w.path("a/sub")).unwrap();
    fs::create_dir_all(w.path("a/.git")).unwrap();
    fs::create_dir_all(w.path("a/images")).unwrap();
    w.write("a/sub/p.yaml", "1");
    w.write("a/.git/p.yaml", "1");
    assert_eq!(w.rescan(), [""; 0]);
    let problems = w.problems();
    assert!(problems.len() == 1 && problems[0].contains("sub/"), "{problems:?}");
    fs::remove_file(w.path("a/sub/p.yaml")).unwrap();
    w.rescan();
    assert_eq!(w.problems(), [""; 0]);
}

#[test]
fn an_unreadable_folder_keeps_its_state() {
    let mut w = World::new();
    w.write("a/x.yaml", "1");
    assert_eq!(w.rescan(), ["0:x.yaml=1"]);
    fs::set_permissions(w.path("a"), fs::Permissions::from_mode(0o000)).unwrap();
    // Root reads it all the same: then there is nothing to see.
    let denied = fs::read_dir(w.path("a")).is_err();
    let news = w.rescan();
    fs::set_permissions(w.path("a"), fs::Permissions::from_mode(0o755)).unwrap();
    assert_eq!(news, [""; 0]);
    if denied {
        assert!(w.problems()[0].contains("stay in force"), "{:?}", w.problems());
    }
    assert_eq!(w.rescan(), [""; 0]);
    assert_eq!(w.problems(), [""; 0]);
}
