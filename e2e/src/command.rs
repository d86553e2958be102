//! Running commands with a time limit, and in the background.
//!
//! Invariants: no command outlives its limit or its handle; output is read while the command runs, so that a full pipe
//! never stops it.

use std::fmt;
use std::io::{Read, Write};
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// Between two looks whether a command has ended.
const LOOK_EVERY: Duration = Duration::from_millis(5);
/// How long a command that was told to end may take before it is killed.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What a command left behind.
#[derive(Clone)]
pub struct Ran {
    /// The command, for messages.
    pub what: String,
    /// The exit status; 128 and more for signals.
    pub code: i32,
    pub out: String,
    pub err: String,
    pub took: Duration,
}

impl fmt::Debug for Ran {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "`{}` gave status {} after {:?}", self.what, self.code, self.took)?;
        write!(f, "\n--- stdout:\n{}\n--- stderr:\n{}", self.out.trim(), self.err.trim())
    }
}

impl Ran {
    pub fn is_ok(&self) -> bool {
        self.code == 0
    }

    /// The output without blanks around it, if the command succeeded.
    pub fn ok(&self) -> Result<&str> {
        ensure!(self.is_ok(), "{self:?}");
        Ok(self.out.trim())
    }

    /// An error unless the command failed.
    pub fn failed(&self) -> Result<&Self> {
        ensure!(!self.is_ok(), "this should have failed: {self:?}");
        Ok(self)
    }

    /// An error unless the command failed and said all of these words.
    pub fn failed_with(&self, words: &[&str]) -> Result<()> {
        self.failed()?;
        let text = format!("{}\n{}", self.out, self.err);
        for word in words {
            ensure!(text.contains(word), "{word:?} is missing: {self:?}");
        }
        Ok(())
    }
}

/// Runs a command to its end, at most for `limit`.
pub fn run(command: Command, input: &str, limit: Duration) -> Result<Ran> {
    let mut running = Background::start(command)?;
    running.write(input.as_bytes())?;
    running.close_input();
    running.wait(limit)
}

/// A command that runs. Ended when dropped.
pub struct Background {
    what: String,
    child: Child,
    input: Option<ChildStdin>,
    out: Text,
    err: Text,
    readers: Vec<JoinHandle<()>>,
    began: Instant,
}

impl fmt::Debug for Background {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Background").field("what", &self.what).finish_non_exhaustive()
    }
}

type Text = Arc<Mutex<Vec<u8>>>;

impl Background {
    pub fn start(mut command: Command) -> Result<Self> {
        let what = shown(&command);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("start {what}"))?;
        let input = child.stdin.take();
        let (out, err) = (Text::default(), Text::default());
        let mut readers = Vec::new();
        if let Some(pipe) = child.stdout.take() {
            readers.push(collect(pipe, out.clone()));
        }
        if let Some(pipe) = child.stderr.take() {
            readers.push(collect(pipe, err.clone()));
        }
        Ok(Self { what, child, input, out, err, readers, began: Instant::now() })
    }

    /// What it has printed so far.
    pub fn out(&self) -> String {
        text(&self.out)
    }

    pub fn err(&self) -> String {
        text(&self.err)
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Gives it something to read. A command that has closed its input is not an error here: its end will tell.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let Some(input) = &mut self.input else { bail!("the input of {} is closed", self.what) };
        match input.write_all(bytes).and_then(|()| input.flush()) {
            Err(e) if e.kind() != std::io::ErrorKind::BrokenPipe => Err(e.into()),
            _ => Ok(()),
        }
    }

    pub fn close_input(&mut self) {
        self.input = None;
    }

    /// Once it says no, all that was written can be read.
    pub fn is_running(&mut self) -> Result<bool> {
        let running = self.child.try_wait()?.is_none();
        if !running {
            self.read_to_the_end();
        }
        Ok(running)
    }

    fn read_to_the_end(&mut self) {
        for reader in self.readers.drain(..) {
            // A reader does not panic; and what was read counts.
            let _ = reader.join();
        }
    }

    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    /// Waits for its end; kills it and fails when that does not come in time.
    pub fn wait(mut self, limit: Duration) -> Result<Ran> {
        let Some(status) = self.ended_within(limit)? else {
            let ran = self.finish(None);
            bail!("not done after {limit:?}, so it was ended: {ran:?}");
        };
        Ok(self.finish(Some(status)))
    }

    /// Asks it to end and waits.
    pub fn end(mut self) -> Result<Ran> {
        self.close_input();
        if self.is_running()? {
            self.signal(Signal::SIGTERM)?;
        }
        let status = self.ended_within(LAST_WORDS)?;
        Ok(self.finish(status))
    }

    fn ended_within(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        let until = Instant::now() + limit;
        loop {
            if let Some(status) = self.child.try_wait()? {
                return Ok(Some(status));
            }
            if Instant::now() >= until {
                return Ok(None);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    fn finish(&mut self, status: Option<ExitStatus>) -> Ran {
        let took = self.began.elapsed();
        let status = status.or_else(|| {
            // Fails only if it has ended meanwhile.
            let _ = self.child.kill();
            self.child.wait().ok()
        });
        self.read_to_the_end();
        Ran {
            what: self.what.clone(),
            code: status.map_or(-1, code),
            out: self.out(),
            err: self.err(),
            took,
        }
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            // `meshctl local exec` passes this on to what it started.
            let _ = self.signal(Signal::SIGTERM);
            if !matches!(self.ended_within(LAST_WORDS), Ok(Some(_))) {
                let _ = self.child.kill();
                let _ = self.child.wait();
            }
        }
    }
}

fn collect(mut pipe: impl Read + Send + 'static, to: Text) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let mut buffer = [0; 16 * 1024];
        while let Ok(n @ 1..) = pipe.read(&mut buffer) {
            to.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(&buffer[..n]);
        }
    })
}

fn text(of: &Text) -> String {
    String::from_utf8_lossy(&of.lock().unwrap_or_else(PoisonError::into_inner)).into_owned()
}

fn code(status: ExitStatus) -> i32 {
    use std::os::unix::process::ExitStatusExt;
    status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))
}

fn shown(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(|w| w.to_string_lossy()).collect::<Vec<_>>().join(" ")
}
