//! Envoy and our waypoint as plain HTTP proxies on loopback: HTTP/1.1 on both sides, no TLS, no tunnel.

use std::fs;
use std::io::{BufReader, Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::envoy::{self, Routes};
use super::process::{Process, free_port};
use super::routes::{self, CHOOSE, SHARES, TO_CLIENT, TO_SERVER};
use super::{Doing, HttpResults, MemoryRow, Role, in_turns};
use crate::bench::procfs::Memory;
use crate::bench::world::{Outcome, Programs, watch};

const V1: [u8; 4] = [127, 0, 0, 2];
const V2: [u8; 4] = [127, 0, 0, 3];
const HERE: [u8; 4] = [127, 0, 0, 1];
/// From the start of a proxy to the reading of its memory, as in the figures we compare with.
const SETTLE: Duration = Duration::from_secs(2);
/// Requests whose shares are counted before anything is measured.
const COUNTED: u32 = 400;
/// Of those at most so many more or less than the share says: six standard deviations.
const MARGIN: u32 = 36;
/// How many routes "many" are, and what they are compared with.
pub const MANY: usize = 5_000;
pub const FEW: usize = 5;

/// The loads, by id: title and arguments of `meshload`.
const LOADS: &[(&str, &str, &[&str])] = &[
    ("plain-1", "1 connection", &["closed", "-n", "1"]),
    ("plain-16", "16 connections", &["closed", "-n", "16"]),
    ("plain-64", "64 connections", &["closed", "-n", "64"]),
    ("plain-rate", "1000 requests/s on 16 connections", &["rate", "-n", "16", "--rate", "1000"]),
];

/// A proxy that serves.
struct Proxy {
    process: Process,
    /// What it is called on the page.
    title: String,
    at: SocketAddr,
    idle: Memory,
}

/// Where everything of this part is.
struct Place<'a> {
    programs: &'a Programs,
    envoy: PathBuf,
    folder: PathBuf,
    v1: SocketAddr,
    v2: SocketAddr,
}

/// Measures the loads and the many routes.
pub fn measure(programs: &Programs, folder: &Path, results: &mut HttpResults) -> Result<()> {
    let folder = folder.join("http");
    fs::create_dir_all(&folder).with_context(|| folder.display().to_string())?;
    let place = Place {
        programs,
        envoy: envoy::program()?,
        folder,
        v1: free_port(V1)?,
        v2: free_port(V2)?,
    };
    loads(&place, results)?;
    many_routes(&place, results)
}

fn loads(place: &Place<'_>, results: &mut HttpResults) -> Result<()> {
    let proxies = {
        let _servers = [Named::start(place.v1, "v1")?, Named::start(place.v2, "v2")?];
        let proxies = [
            place.envoy("Envoy, log off", 0, false)?,
            place.envoy("Envoy, log on", 0, true)?,
            place.waypoint("waypoint, log off", 0, "off")?,
            place.waypoint("waypoint, log on", 0, "text")?,
        ];
        for proxy in &proxies {
            check(proxy.at).with_context(|| proxy.title.clone())?;
        }
        proxies
    };
    let _servers = place.servers()?;
    for (id, title, arguments) in LOADS {
        let mut ways = vec![Doing {
            title: "direct",
            roles: vec![],
            once: place.load(place.v1, arguments, &[], results.seconds),
        }];
        ways.extend(proxies.iter().map(|p| place.through(p, arguments, results.seconds)));
        results.lines.push(in_turns(id, title, results.rounds, &ways)?);
    }
    memory("header match and shares", &proxies, results)
}

/// Five thousand prefixes against five, asked for the last one.
fn many_routes(place: &Place<'_>, results: &mut HttpResults) -> Result<()> {
    let _servers = place.servers()?;
    let start = |routes: usize| -> Result<[Proxy; 2]> {
        Ok([
            place.envoy(&format!("Envoy, {routes} routes"), routes, false)?,
            place.waypoint(&format!("waypoint, {routes} routes"), routes, "off")?,
        ])
    };
    let (few, many) = (start(FEW)?, start(MANY)?);
    let path = |routes: usize| format!("{}/x", routes::prefix(routes - 1));
    let (last_few, last_many) = (path(FEW), path(MANY));
    let asks = |path| ["closed", "-n", "16", "--path", path];
    let (few_load, many_load) = (asks(&last_few), asks(&last_many));
    let mut ways = Vec::new();
    for (proxies, load) in [(&few, &few_load), (&many, &many_load)] {
        ways.extend(proxies.iter().map(|p| place.through(p, load, results.seconds)));
    }
    let title = "the last of so many path prefixes on one host, 16 connections";
    results.lines.push(in_turns("routes", title, results.rounds, &ways)?);
    for proxies in [&few, &many] {
        memory("path prefixes", proxies, results)?;
    }
    Ok(())
}

fn memory(title: &str, proxies: &[Proxy], results: &mut HttpResults) -> Result<()> {
    for proxy in proxies {
        let after = Memory::of(proxy.process.pid())?;
        results.memory.push(MemoryRow {
            title: title.to_owned(),
            process: proxy.title.clone(),
            idle_mb: proxy.idle.rss_mb,
            after_load_mb: after.rss_mb,
            peak_mb: after.peak_mb,
        });
    }
    Ok(())
}

impl Place<'_> {
    fn log(&self, title: &str) -> PathBuf {
        self.folder.join(format!("{}.log", title.replace([' ', ','], "-")))
    }

    fn envoy(&self, title: &str, routes: usize, log: bool) -> Result<Proxy> {
        let (at, admin) = (free_port(HERE)?, free_port(HERE)?);
        let config =
            envoy::plain(at, admin, self.v1, self.v2, Routes::Inline(routes), log).to_string();
        let file = self.log(title).with_extension("json");
        fs::write(&file, config).with_context(|| file.display().to_string())?;
        self.started(title, at, envoy::command(&self.envoy, &file))
    }

    fn waypoint(&self, title: &str, routes: usize, log: &str) -> Result<Proxy> {
        let at = free_port(HERE)?;
        let objects = self.log(title).with_extension("yaml");
        let yaml = routes::world(self.v1, self.v2) + &routes::http_routes("bench", routes);
        fs::write(&objects, yaml).with_context(|| objects.display().to_string())?;
        let mut command = Command::new(self.programs.meshload.with_file_name("plainpoint"));
        command.args([
            "--namespace",
            "bench",
            "--pod",
            "waypoint",
            "--service-account",
            "waypoint",
        ]);
        command.args(["--workers", envoy::WORKERS, "--access-log", log]);
        command.arg("--objects").arg(objects).arg("--work").arg(self.folder.join("waypoint"));
        command.args(["--listen", &at.to_string(), "--to", &format!("{}:80", routes::WEB)]);
        self.started(title, at, command)
    }

    fn started(&self, title: &str, at: SocketAddr, command: Command) -> Result<Proxy> {
        let log = self.log(title);
        let mut process = Process::start(command, &log)?;
        process.listens(at, &log).with_context(|| title.to_owned())?;
        thread::sleep(SETTLE);
        let idle = Memory::of(process.pid())?;
        Ok(Proxy { process, title: title.to_owned(), at, idle })
    }

    /// Both versions, as servers that cost next to nothing.
    fn servers(&self) -> Result<[Process; 2]> {
        let one = |at: SocketAddr| -> Result<Process> {
            let mut command = Command::new(&self.programs.meshload);
            command.args(["serve", "--listen", &at.to_string()]);
            let log = self.folder.join(format!("server-{}.log", at.ip()));
            let mut process = Process::start(command, &log)?;
            process.listens(at, &log)?;
            Ok(process)
        };
        Ok([one(self.v1)?, one(self.v2)?])
    }

    fn load<'a>(
        &'a self,
        to: SocketAddr,
        arguments: &'a [&'a str],
        pids: &[i32],
        seconds: f64,
    ) -> Box<dyn Fn() -> Result<Outcome> + 'a> {
        let pids = pids.to_vec();
        Box::new(move || {
            let mut command = Command::new(&self.programs.meshload);
            command.args(arguments).args(["--to", &to.to_string(), "-d", &seconds.to_string()]);
            watch(command, &pids, |_| Ok(()))
        })
    }

    fn through<'a>(
        &'a self,
        proxy: &'a Proxy,
        arguments: &'a [&'a str],
        seconds: f64,
    ) -> Doing<'a> {
        let pid = proxy.process.pid();
        Doing {
            title: &proxy.title,
            roles: vec![Role::new("proxy", pid)],
            once: self.load(proxy.at, arguments, &[pid], seconds),
        }
    }
}

/// Whether a proxy does what both are asked for.
fn check(proxy: SocketAddr) -> Result<()> {
    let mut stream = BufReader::new(TcpStream::connect(proxy)?);
    let (mut first, chosen) = (0, format!("{}: {}\r\n", CHOOSE.0, CHOOSE.1));
    let all = SHARES.0 + SHARES.1;
    for n in 0..COUNTED {
        let header = if n % 10 == 9 { chosen.as_str() } else { "" };
        let (head, body) = ask(&mut stream, header)?;
        ensure!(head.starts_with("HTTP/1.1 200"), "{head}");
        let via = format!("{}: {}\r\n", TO_CLIENT.0, TO_CLIENT.1);
        ensure!(head.contains(&via), "the answer has no {via:?}: {head}");
        let mesh = format!("{}: {}\r\n", TO_SERVER.0, TO_SERVER.1);
        ensure!(body.contains(&mesh), "the server saw no {mesh:?}: {body}");
        if header.is_empty() {
            first += u32::from(body.starts_with("v1"));
        } else {
            ensure!(body.starts_with("v2"), "the header chose {body}");
        }
    }
    let want = (COUNTED - COUNTED / 10) * SHARES.0 / all;
    ensure!(first.abs_diff(want) <= MARGIN, "{first} of {COUNTED} to v1, not some {want}");
    Ok(())
}

fn ask(stream: &mut BufReader<TcpStream>, header: &str) -> Result<(String, String)> {
    let request = format!("GET /x HTTP/1.1\r\nHost: web.bench\r\n{header}\r\n");
    stream.get_mut().write_all(request.as_bytes())?;
    let head = head(stream)?;
    let length = head.to_ascii_lowercase();
    let length = length.lines().find_map(|l| l.strip_prefix("content-length: "));
    let length: usize = length.context("no content-length")?.parse()?;
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((head, String::from_utf8(body)?))
}

fn head(stream: &mut impl std::io::BufRead) -> Result<String> {
    let mut head = String::new();
    while !head.ends_with("\r\n\r\n") {
        ensure!(stream.read_line(&mut head)? > 0, "the connection ended: {head:?}");
    }
    Ok(head)
}

/// A server that answers with its name and the head of the request, until dropped.
struct Named {
    ended: Arc<AtomicBool>,
    open: Arc<Mutex<Vec<TcpStream>>>,
    at: SocketAddr,
    thread: Option<thread::JoinHandle<()>>,
}

impl Named {
    fn start(at: SocketAddr, name: &'static str) -> Result<Self> {
        let (listener, ended) = (TcpListener::bind(at)?, Arc::<AtomicBool>::default());
        let (told, open) = (ended.clone(), Arc::<Mutex<Vec<TcpStream>>>::default());
        let all = open.clone();
        let thread = thread::spawn(move || {
            while let Ok((stream, _)) = listener.accept() {
                if told.load(Ordering::Relaxed) {
                    return;
                }
                let ours = stream.try_clone();
                all.lock().unwrap_or_else(PoisonError::into_inner).extend(ours);
                thread::spawn(move || answer(stream, name));
            }
        });
        Ok(Self { ended, open, at, thread: Some(thread) })
    }
}

/// Ends with its connection.
fn answer(stream: TcpStream, name: &str) -> Result<()> {
    let mut stream = BufReader::new(stream);
    loop {
        let body = format!("{name} {}", head(&mut stream)?);
        let length = body.len();
        let answer = format!("HTTP/1.1 200 OK\r\nContent-Length: {length}\r\n\r\n{body}");
        stream.get_mut().write_all(answer.as_bytes())?;
    }
}

impl Drop for Named {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Wakes it for the last time.
        let _ = TcpStream::connect(self.at);
        // The proxies must not take these connections for the next server's.
        for stream in self.open.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            let _ = stream.shutdown(Shutdown::Both);
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
