//! The programs that the tests call, and our own.
//!
//! Invariant: a missing program is an error that says how to get it.

use std::path::PathBuf;

use anyhow::{Context, Result, anyhow};

/// Debian's servers live in sbin, which an ordinary user's PATH leaves out.
const ALSO: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];
/// Where Debian keeps the servers of each PostgreSQL version.
const POSTGRES: &str = "/usr/lib/postgresql";
/// Where our own programs are; by default beside the running one.
const OURS: &str = "AMBIT_BIN_DIR";

/// The Debian package of each program the tests call.
const PACKAGES: [(&str, &str); 17] = [
    ("curl", "curl"),
    ("dig", "bind9-dnsutils"),
    ("iperf3", "iperf3"),
    ("initdb", "postgresql"),
    ("ip", "iproute2"),
    ("nft", "nftables"),
    ("nginx", "nginx-light"),
    ("nsenter", "util-linux"),
    ("pgbench", "postgresql"),
    ("postgres", "postgresql"),
    ("psql", "postgresql-client"),
    ("redis-benchmark", "redis-tools"),
    ("redis-cli", "redis-tools"),
    ("redis-server", "redis-server"),
    ("setpriv", "util-linux"),
    ("sysctl", "procps"),
    ("unshare", "util-linux"),
];

/// The path of a program of the machine.
pub fn find(name: &str) -> Result<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut folders: Vec<PathBuf> = postgres_folders();
    folders.extend(std::env::split_paths(&path));
    folders.extend(ALSO.map(PathBuf::from));
    folders.iter().map(|f| f.join(name)).find(|p| p.is_file()).ok_or_else(|| {
        let package = PACKAGES.iter().find(|(n, _)| *n == name).map_or(name, |(_, p)| p);
        anyhow!("the tests need {name}, which this machine lacks: apt-get install {package}")
    })
}

/// The same as text, for YAML and command lines.
pub fn path_of(name: &str) -> Result<String> {
    Ok(find(name)?.to_string_lossy().into_owned())
}

/// The real Envoy, which `.ci/programs` puts into the cache: Debian has no package of it.
pub fn envoy() -> Result<PathBuf> {
    let folder = |name: &str| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = folder("AMBIT_CACHE").or_else(|| {
        let shared =
            folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")));
        shared.map(|shared| shared.join("ambit"))
    });
    let path = cache.context("neither AMBIT_CACHE nor HOME is set")?.join("tools/envoy/envoy");
    if path.is_file() {
        return Ok(path);
    }
    Err(anyhow!("{} is missing: run .ci/programs, which fetches it", path.display()))
}

/// One of our own programs.
pub fn ours(name: &str) -> Result<PathBuf> {
    let path = folder()?.join(name);
    if path.is_file() {
        return Ok(path);
    }
    Err(anyhow!(
        "{} is missing: build it first (cargo build --workspace --bins), or say with {OURS} where our programs are",
        path.display()
    ))
}

/// The same as text.
pub fn path_of_ours(name: &str) -> Result<String> {
    Ok(ours(name)?.to_string_lossy().into_owned())
}

/// Where our own programs are.
pub fn folder() -> Result<PathBuf> {
    if let Some(folder) = std::env::var_os(OURS) {
        return Ok(folder.into());
    }
    let running = std::env::current_exe().context("where am I?")?;
    // A test lies in target/debug/deps, the programs one above.
    let folder = running.parent().context("where am I?")?;
    let above = folder.parent().filter(|_| folder.ends_with("deps"));
    Ok(above.unwrap_or(folder).to_owned())
}

/// Newest first.
fn postgres_folders() -> Vec<PathBuf> {
    let version =
        |p: &PathBuf| p.file_name().and_then(|n| n.to_str()).and_then(|n| n.parse::<u32>().ok());
    let entries = std::fs::read_dir(POSTGRES).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries.map(|e| e.path()).collect();
    found.sort_by_key(|p| std::cmp::Reverse(version(p)));
    found.into_iter().map(|p| p.join("bin")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_names_its_package() {
        let missing = find("no-such-program").unwrap_err().to_string();
        assert!(missing.contains("apt-get install no-such-program"), "{missing}");
        assert!(find("sh").is_ok());
    }
}
