//! Processes on this machine's loopback, ended with their values.

use std::fs::File;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// How long a process may take until it serves.
const UP_LIMIT: Duration = Duration::from_secs(30);
const POLL: Duration = Duration::from_millis(10);

/// A process. Ends with this value.
#[derive(Debug)]
pub(crate) struct Process {
    child: Child,
}

impl Process {
    /// Starts it with its output in a file.
    pub(crate) fn start(mut command: Command, log: &Path) -> Result<Self> {
        let file = File::create(log).with_context(|| log.display().to_string())?;
        let name = command.get_program().to_string_lossy().into_owned();
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        Ok(Self { child: command.spawn().with_context(|| name)? })
    }

    pub(crate) fn pid(&self) -> i32 {
        i32::try_from(self.child.id()).unwrap_or(i32::MAX)
    }

    /// Until somebody takes connections there.
    pub(crate) fn listens(&mut self, at: SocketAddr, log: &Path) -> Result<()> {
        let until = Instant::now() + UP_LIMIT;
        loop {
            if let Some(status) = self.child.try_wait()? {
                bail!("it ended with {status}: see {}", log.display());
            }
            if TcpStream::connect_timeout(&at, POLL * 10).is_ok() {
                return Ok(());
            }
            if Instant::now() > until {
                bail!("nobody listens at {at}: see {}", log.display());
            }
            thread::sleep(POLL);
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A port of this loopback address that was free a moment ago.
pub(crate) fn free_port(ip: [u8; 4]) -> Result<SocketAddr> {
    Ok(TcpListener::bind(SocketAddr::from((ip, 0)))?.local_addr()?)
}
