//! `meshload`: servers and clients of a benchmark, for use inside pods. One JSON object a line.

use std::io::Write as _;
use std::net::{IpAddr, SocketAddr, TcpListener};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, Parser, Subcommand};
use meshload::bulk::{self, Direction};
use meshload::clients;
use meshload::connections::{self, Closing, Plan};
use meshload::dns;
use meshload::lines;
use meshload::relay;
use meshload::request;
use meshload::server::{self, Greeting};
use meshload::talk;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::json;

#[derive(Parser)]
#[command(version, about = "Load for the mesh: servers and clients that count what they see")]
struct Cli {
    /// Only shows in the process list, so that a benchmark finds the process of a pod
    #[arg(long)]
    label: Option<String>,
    #[command(subcommand)]
    mode: Mode,
}

#[derive(Subcommand)]
enum Mode {
    /// HTTP/1.1 with keep-alive: a body of fixed size; for /who the client's address and this pod's name
    Serve(Listen),
    /// Bulk data both ways; counts every byte
    Sink(Listen),
    /// Repeats what it hears
    Echo(Listen),
    /// Speaks first: a line with the addresses of both ends; then repeats what it hears
    Netecho(Listen),
    /// HTTP on PORT, bulk on PORT+1, echo on PORT+2, netecho on PORT+3, in one process
    All(Listen),
    /// Copies between LISTEN and HOST:PORT and does nothing else: the floor for a proxy in user space
    Relay {
        /// LISTEN=HOST:PORT
        #[arg(required = true)]
        hops: Vec<String>,
    },
    /// Does nothing until it is ended, for a pod that only runs clients
    Pause,
    /// Closed loop: each connection sends again when it has its answer
    Closed {
        #[command(flatten)]
        load: Load,
        #[command(flatten)]
        ask: Ask,
    },
    /// Fixed rate; latency from when a request was due
    Rate {
        #[command(flatten)]
        load: Load,
        /// Requests a second
        #[arg(long, default_value_t = 1000)]
        rate: u32,
        #[command(flatten)]
        ask: Ask,
    },
    /// A new connection for every request
    Connect {
        #[command(flatten)]
        load: Load,
        /// Who closes first and so keeps TIME_WAIT
        #[arg(long, value_enum, default_value_t = Closing::Server)]
        closing: Closing,
        /// End after this many connections; 0: no limit
        #[arg(long, default_value_t = 0)]
        most: u64,
        /// Seconds of the windows that are counted one by one
        #[arg(long, default_value_t = 2.0)]
        window: f64,
    },
    /// Opens the connections, has one answer on each, holds them, closes them
    Idle(Load),
    /// DNS questions by UDP; each socket asks again when it has its answer
    Dns {
        #[command(flatten)]
        load: Load,
        name: String,
        /// AAAA, not A
        #[arg(long)]
        ipv6: bool,
        /// A new socket for each question, as C libraries have it
        #[arg(long)]
        fresh: bool,
    },
    /// Bulk to the sink
    Send(Load),
    /// Bulk from the sink
    Receive(Load),
    /// Prints the body of one answer: http://HOST[:PORT]/PATH
    Get {
        url: String,
        #[command(flatten)]
        patience: Patience,
    },
    /// Asks again and again on one connection; fails when that is lost
    Ping {
        url: String,
        /// Answers to wait for; 0: until the connection is lost
        #[arg(long, default_value_t = 0)]
        count: u64,
        /// Seconds between two requests
        #[arg(long, default_value_t = 1.0)]
        every: f64,
        #[command(flatten)]
        patience: Patience,
    },
    /// Asks on one connection as long as it lives; a line with the time whenever a header of the answer changes
    Watch {
        url: String,
        /// The header
        #[arg(long)]
        header: String,
        /// Seconds until it ends
        #[arg(short, long, default_value_t = 60.0)]
        duration: f64,
        #[command(flatten)]
        patience: Patience,
    },
    /// Sends standard input to HOST:PORT over one connection and prints what comes back
    Cat {
        to: String,
        #[command(flatten)]
        patience: Patience,
    },
    /// Prints this namespace's addresses, loopback and link-local left out
    Addresses,
    /// Counts established TCP connections on a local port, from /proc/net
    Established { port: u16 },
}

#[derive(Args)]
struct Listen {
    /// Address and port; [::]:PORT serves both families
    #[arg(long, default_value = "[::]:8080")]
    listen: SocketAddr,
    /// Bytes of the HTTP body
    #[arg(long, default_value_t = 128)]
    body: usize,
}

#[derive(Args)]
struct Patience {
    /// Seconds for the connect and for each answer
    #[arg(long, default_value_t = 10.0)]
    timeout: f64,
}

#[derive(Args)]
struct Load {
    /// HOST:PORT
    #[arg(long)]
    to: String,
    /// Connections, streams, or new connections at a time
    #[arg(short = 'n', long, default_value_t = 1)]
    connections: usize,
    /// Seconds
    #[arg(short, long, default_value_t = 3.0)]
    duration: f64,
}

/// What is asked for.
#[derive(Args)]
struct Ask {
    #[arg(long, default_value = "/")]
    path: String,
}

impl Load {
    fn address(&self) -> anyhow::Result<SocketAddr> {
        talk::resolve(&self.to)
    }

    fn time(&self) -> anyhow::Result<Duration> {
        seconds(self.duration)
    }
}

fn main() -> ExitCode {
    let Err(error) = run(Cli::parse()) else { return ExitCode::SUCCESS };
    // Nobody is left to tell when standard error is closed.
    let _ = writeln!(std::io::stderr(), "meshload: {error:#}");
    ExitCode::FAILURE
}

fn run(cli: Cli) -> anyhow::Result<()> {
    raise_file_limit()?;
    match cli.mode {
        Mode::Serve(on) => server::serve_http(&bind(on.listen)?, on.body)?,
        Mode::Sink(on) => bulk::serve(&bind(on.listen)?)?,
        Mode::Echo(on) => server::serve_echo(&bind(on.listen)?, Greeting::None)?,
        Mode::Netecho(on) => server::serve_echo(&bind(on.listen)?, Greeting::Addresses)?,
        Mode::All(on) => serve_all(&on)?,
        Mode::Relay { hops } => {
            relay::serve(hops.iter().map(|hop| parse_hop(hop)).collect::<Result<_, _>>()?)?
        }
        Mode::Pause => loop {
            std::thread::park();
        },
        Mode::Closed { load, ask } => {
            let request = request::get(&ask.path)?;
            clients::closed_loop(load.address()?, load.connections, load.time()?, request)?;
        }
        Mode::Rate { load, rate, ask } => {
            let (to, request) = (load.address()?, request::get(&ask.path)?);
            clients::open_schedule(to, load.connections, rate, load.time()?, request)?;
        }
        Mode::Connect { load, closing, most, window } => connections::run(&Plan {
            to: load.address()?,
            concurrency: load.connections,
            time: load.time()?,
            most,
            closing,
            window: seconds(window)?,
        })?,
        Mode::Idle(load) => clients::hold_idle(load.address()?, load.connections, load.time()?)?,
        Mode::Dns { load, name, ipv6, fresh } => dns::run(&dns::Plan {
            to: load.address()?,
            name,
            ipv6,
            sockets: load.connections,
            time: load.time()?,
            fresh,
        })?,
        Mode::Send(load) => {
            bulk::run(load.address()?, Direction::Send, load.connections, load.time()?)?
        }
        Mode::Receive(load) => {
            bulk::run(load.address()?, Direction::Receive, load.connections, load.time()?)?
        }
        Mode::Get { url, patience } => talk::get(&url, seconds(patience.timeout)?)?,
        Mode::Ping { url, count, every, patience } => {
            talk::ping(&url, count, seconds(every)?, seconds(patience.timeout)?)?;
        }
        Mode::Watch { url, header, duration, patience } => {
            talk::watch(&url, &header, seconds(duration)?, seconds(patience.timeout)?)?;
        }
        Mode::Cat { to, patience } => talk::cat(&to, seconds(patience.timeout)?)?,
        Mode::Addresses => {
            lines::line(&json!({ "event": "addresses", "addresses": addresses()? }))?
        }
        Mode::Established { port } => {
            lines::line(
                &json!({ "event": "established", "port": port, "count": established(port)? }),
            )?;
        }
    }
    Ok(())
}

fn bind(on: SocketAddr) -> anyhow::Result<TcpListener> {
    // std binds IPv6 sockets to both families, and sets SO_REUSEADDR.
    TcpListener::bind(on).with_context(|| format!("cannot listen on {on}"))
}

fn parse_hop(text: &str) -> anyhow::Result<relay::Hop> {
    let (listen, to) =
        text.split_once('=').with_context(|| format!("{text} is not LISTEN=HOST:PORT"))?;
    let on = listen.parse().with_context(|| format!("{listen} is not ADDRESS:PORT"))?;
    Ok(relay::Hop { listener: bind(on)?, to: to.to_owned() })
}

fn serve_all(on: &Listen) -> anyhow::Result<()> {
    let listener = |offset: u16| {
        let port = on
            .listen
            .port()
            .checked_add(offset)
            .context("the last of the four ports is above 65535")?;
        bind(SocketAddr::new(on.listen.ip(), port))
    };
    let (http, sink, echo, netecho) = (listener(0)?, listener(1)?, listener(2)?, listener(3)?);
    std::thread::scope(|scope| {
        scope.spawn(|| bulk::serve(&sink));
        scope.spawn(|| server::serve_echo(&echo, Greeting::None));
        scope.spawn(|| server::serve_echo(&netecho, Greeting::Addresses));
        server::serve_http(&http, on.body)
    })?;
    Ok(())
}

fn seconds(seconds: f64) -> anyhow::Result<Duration> {
    match Duration::try_from_secs_f64(seconds) {
        // An hour: nobody measures longer, and a forgotten client must end.
        Ok(time) if !time.is_zero() && time <= Duration::from_secs(3600) => Ok(time),
        Ok(_) | Err(_) => bail!("{seconds} is not a time between 0 and 3600 seconds"),
    }
}

/// Ten thousand connections need as many descriptors; the soft limit is usually 1024.
fn raise_file_limit() -> anyhow::Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("cannot raise the limit of open files")
}

fn addresses() -> anyhow::Result<Vec<IpAddr>> {
    let ips = nix::ifaddrs::getifaddrs()?.filter_map(|i| {
        let address = i.address?;
        let v4 = address.as_sockaddr_in().map(|a| IpAddr::V4(a.ip()));
        v4.or_else(|| address.as_sockaddr_in6().map(|a| IpAddr::V6(a.ip())))
    });
    Ok(ips.filter(|ip| !ip.is_loopback() && !is_link_local(ip)).collect())
}

fn is_link_local(ip: &IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.is_link_local(),
        IpAddr::V6(ip) => ip.is_unicast_link_local(),
    }
}

fn established(port: u16) -> anyhow::Result<usize> {
    let wanted = format!(":{port:04X}");
    let mut count = 0;
    for table in ["/proc/net/tcp", "/proc/net/tcp6"] {
        let text =
            std::fs::read_to_string(table).with_context(|| format!("cannot read {table}"))?;
        count += text
            .lines()
            .skip(1)
            .map(|l| l.split_whitespace().collect::<Vec<_>>())
            .filter(|w| {
                w.get(1).is_some_and(|local| local.ends_with(&wanted)) && w.get(3) == Some(&"01")
            })
            .count();
    }
    Ok(count)
}
