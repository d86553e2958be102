//! Kernel settings of the network namespace that the calling thread is in: use inside [`NetNs::run`](crate::NetNs::run).
//!
//! `/proc/sys/net` shows each reader its own thread's namespace, so no namespace has to be named.

use std::fs;
use std::io;
use std::path::PathBuf;

/// Where the settings are, unless a file system of the caller's own is mounted elsewhere.
const ROOT: &str = "/proc/sys";

/// Sets `net/ipv4/ip_forward` and the like. A value that is there already is not written, so that a read-only `/proc`
/// is no hindrance when there is nothing to do.
pub fn write(name: &str, value: &str) -> io::Result<()> {
    if read(name)? == value {
        return Ok(());
    }
    fs::write(path(name), value).map_err(|e| named("set", name, &e))
}

/// The value without its line end.
pub fn read(name: &str) -> io::Result<String> {
    let value = fs::read_to_string(path(name)).map_err(|e| named("read", name, &e))?;
    Ok(value.trim_end().to_owned())
}

/// Whether the kernel has this setting.
pub fn exists(name: &str) -> bool {
    path(name).exists()
}

fn path(name: &str) -> PathBuf {
    PathBuf::from(ROOT).join(name)
}

fn named(verb: &str, name: &str, e: &io::Error) -> io::Error {
    io::Error::new(e.kind(), format!("{verb} sysctl {name}: {e}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::netns::NetNs;
    use crate::testing::in_user_ns;

    #[test]
    fn settings_belong_to_the_thread_s_namespace() {
        in_user_ns(|| {
            let name = "net/ipv4/tcp_fwmark_accept";
            let other = NetNs::create().unwrap();
            other.run(|| write(name, "1").unwrap()).unwrap();
            assert_eq!(read(name).unwrap(), "0");
            assert_eq!(other.run(|| read(name).unwrap()).unwrap(), "1");
            let e = write("net/ipv4/no_such_thing", "1").unwrap_err().to_string();
            assert!(e.contains("net/ipv4/no_such_thing"), "{e}");
        });
    }
}
