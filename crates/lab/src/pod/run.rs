//! What one container is run with: plain data, made by the lab, carried out by the helper process.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::ids::IdRange;

/// A container, completely resolved: no name in it needs looking up any more.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ContainerRun {
    pub(crate) process: ProcessRun,
    pub(crate) uid_map: Vec<IdRange>,
    pub(crate) gid_map: Vec<IdRange>,
    pub(crate) root: RootFs,
}

/// The program of a container, or one that `exec` adds to it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ProcessRun {
    /// Never empty.
    pub(crate) argv: Vec<String>,
    pub(crate) env: Vec<(String, String)>,
    /// Empty: `/`.
    pub(crate) cwd: String,
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    pub(crate) groups: Vec<u32>,
}

/// The files a container sees.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RootFs {
    pub(crate) source: RootSource,
    /// Small files of the container's own: path inside, content.
    pub(crate) files: Vec<(PathBuf, String)>,
    pub(crate) mounts: Vec<Volume>,
    /// Paths of the machine that must not be seen, wherever they are.
    pub(crate) hide: Vec<PathBuf>,
    /// Empty folders of the lab that the filesystem and its layers are mounted on.
    pub(crate) root: PathBuf,
    pub(crate) layers: PathBuf,
}

/// Where the files come from.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum RootSource {
    /// The machine's own, under a private layer.
    Machine,
    /// The machine's own, and this program copied in at [`PROGRAM_DIR`].
    Program(PathBuf),
    /// A folder with a root filesystem, under a private layer.
    Folder(PathBuf),
}

/// A folder of the lab that the container sees at a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Volume {
    pub(crate) source: PathBuf,
    pub(crate) target: PathBuf,
    pub(crate) read_only: bool,
}

/// What the helper says on its status pipe, one JSON line each.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(crate) enum HelperSays {
    /// The program runs; the number is the container's first process, as the lab sees it.
    Started(i32),
    /// It could not be started.
    Failed(String),
}

/// Where the program of `--image NAME=PROGRAM` is found inside.
pub(crate) const PROGRAM_DIR: &str = "/image";

/// The exit status that says the program could not be started, as container runtimes have it.
pub(crate) const START_FAILED: u8 = 128;
