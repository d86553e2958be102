//! A DNS client that shows every byte, and a resolver with manners: what the tests need to see whether a proxy between
//! them leaves questions and answers alone.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hickory_proto::op::{Edns, Message, MessageType, OpCode, Query};
use hickory_proto::rr::rdata::TXT;
use hickory_proto::rr::{Name, RData, Record, RecordType};
use serde_json::{Value, json};

use crate::{say, seconds};

/// What the resolver sends for a question by TCP with a large answer: TXT records of this many bytes.
const LARGE: usize = 60_000;
const TTL: u32 = 7;

#[derive(Debug, clap::Args)]
pub(crate) struct Ask {
    /// Address and port of the resolver
    server: SocketAddr,
    /// Questions, one after the other on one socket
    #[arg(required = true, value_name = "NAME/TYPE")]
    questions: Vec<String>,
    #[arg(long)]
    tcp: bool,
    /// Say by EDNS how large an answer may be
    #[arg(long)]
    edns: Option<u16>,
    #[arg(long, default_value_t = 4711)]
    id: u16,
    /// What kind of message; 0 is a question
    #[arg(long, default_value_t = 0)]
    opcode: u8,
    /// Send these bytes, in hexadecimal, and no question
    #[arg(long)]
    raw: Option<String>,
    /// Send the first question so many times at once by UDP, and count what comes back in time
    #[arg(long)]
    flood: Option<u16>,
    #[arg(long, default_value_t = 10.0)]
    timeout: f64,
}

/// Asks, and prints one object for each answer.
pub(crate) fn ask(args: &Ask) -> Result<()> {
    let limit = seconds(args.timeout);
    let any = if args.server.is_ipv6() { "[::]:0" } else { "0.0.0.0:0" };
    let mut line = if args.tcp {
        let stream = TcpStream::connect(args.server)?;
        stream.set_read_timeout(Some(limit))?;
        Line::Tcp(stream)
    } else {
        let socket = UdpSocket::bind(any)?;
        socket.connect(args.server)?;
        socket.set_read_timeout(Some(limit))?;
        Line::Udp(socket)
    };
    if let (Some(count), Line::Udp(socket)) = (args.flood, &line) {
        return flood(args, socket, count);
    }
    for question in &args.questions {
        let packet = match &args.raw {
            Some(hex) => bytes(hex)?,
            None => packet(args, question)?,
        };
        let began = Instant::now();
        line.send(&packet)?;
        let reply = match line.receive() {
            Ok(reply) => reply,
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                say(&json!({"question": question, "error": "timeout"}))?;
                continue;
            }
            Err(e) => {
                say(&json!({"question": question, "error": e.to_string()}))?;
                continue;
            }
        };
        let took = began.elapsed();
        say(&shown(question, &packet, &reply, took)?)?;
    }
    Ok(())
}

/// Answers by their code.
fn flood(args: &Ask, socket: &UdpSocket, count: u16) -> Result<()> {
    let question = args.questions.first().context("no question")?;
    let mut packet = packet(args, question)?;
    for id in 0..count {
        packet[..2].copy_from_slice(&id.to_be_bytes());
        socket.send(&packet)?;
    }
    let (mut codes, mut buffer) = (BTreeMap::new(), [0; 4096]);
    while let Ok(length) = socket.recv(&mut buffer) {
        let code = buffer.get(3..length.max(3)).and_then(|b| b.first()).map_or(0, |b| b & 15);
        *codes.entry(code.to_string()).or_insert(0_u32) += 1;
    }
    say(&codes)
}

fn shown(question: &str, packet: &[u8], reply: &[u8], took: Duration) -> Result<Value> {
    let message = Message::from_vec(reply).context("the answer is no DNS message")?;
    let answers: Vec<Value> = message
        .answers
        .iter()
        .map(|r| json!({"name": r.name.to_string(), "ttl": r.ttl, "data": r.data.to_string()}))
        .collect();
    Ok(json!({
        "question": question,
        "id": message.metadata.id,
        "code": message.metadata.response_code.to_string(),
        "rcode": message.metadata.response_code.low(),
        "cut": message.metadata.truncation,
        "authoritative": message.metadata.authoritative,
        "edns": message.edns.as_ref().map(Edns::max_payload),
        "answers": answers,
        "authorities": message.authorities.len(),
        "size": reply.len(),
        "sent": hex(packet),
        "heard": hex(reply),
        "ms": took.as_secs_f64() * 1000.0,
    }))
}

fn packet(args: &Ask, question: &str) -> Result<Vec<u8>> {
    let (name, kind) = question.rsplit_once('/').context("a question is NAME/TYPE")?;
    let name = Name::from_ascii(format!("{}.", name.trim_end_matches('.')))?;
    let kind = match kind.strip_prefix("TYPE") {
        Some(number) => RecordType::from(number.parse::<u16>()?),
        None => kind.parse()?,
    };
    let mut message = Message::new(args.id, MessageType::Query, OpCode::from_u8(args.opcode));
    message.metadata.recursion_desired = true;
    message.add_query(Query::query(name, kind));
    if let Some(size) = args.edns {
        let mut edns = Edns::new();
        edns.set_max_payload(size);
        message.set_edns(edns);
    }
    Ok(message.to_vec()?)
}

enum Line {
    Udp(UdpSocket),
    Tcp(TcpStream),
}

impl Line {
    fn send(&mut self, packet: &[u8]) -> io::Result<()> {
        match self {
            Self::Udp(socket) => socket.send(packet).map(drop),
            Self::Tcp(stream) => write(stream, packet),
        }
    }

    fn receive(&mut self) -> io::Result<Vec<u8>> {
        match self {
            Self::Udp(socket) => {
                let mut buffer = vec![0; 65_536];
                let length = socket.recv(&mut buffer)?;
                buffer.truncate(length);
                Ok(buffer)
            }
            Self::Tcp(stream) => read(stream),
        }
    }
}

fn write(stream: &mut TcpStream, message: &[u8]) -> io::Result<()> {
    let length = u16::try_from(message.len()).map_err(io::Error::other)?;
    stream.write_all(&[&length.to_be_bytes(), message].concat())
}

fn read(stream: &mut TcpStream) -> io::Result<Vec<u8>> {
    let mut length = [0; 2];
    stream.read_exact(&mut length)?;
    let mut message = vec![0; usize::from(u16::from_be_bytes(length))];
    stream.read_exact(&mut message)?;
    Ok(message)
}

/// A resolver. What it does is in the first label of the question's name:
/// `echo` says in hexadecimal what it heard; `silent` says nothing; `wrong` says wrong things first; `large` cuts its
/// answer by UDP; `once` closes the connection after its answer; `transfer` answers by TCP with three messages.
pub(crate) fn serve(listen: SocketAddr) -> Result<()> {
    let udp = UdpSocket::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
    let tcp = TcpListener::bind(listen).with_context(|| format!("cannot listen on {listen}"))?;
    std::thread::spawn(move || {
        for mut stream in tcp.incoming().flatten() {
            std::thread::spawn(move || while by_tcp(&mut stream).is_ok() {});
        }
    });
    let mut buffer = vec![0; 65_536];
    loop {
        let (length, from) = udp.recv_from(&mut buffer)?;
        let packet = buffer.get(..length).unwrap_or_default();
        // A message that nobody could read gets no answer.
        let _ = by_udp(&udp, packet, from);
    }
}

fn by_udp(udp: &UdpSocket, packet: &[u8], from: SocketAddr) -> Result<()> {
    let asked = Message::from_vec(packet)?;
    let manner = manner(&asked);
    if manner == "silent" {
        return Ok(());
    }
    if manner == "wrong" {
        let mut wrong = reply(&asked, packet, "wrong");
        wrong.metadata.id = wrong.metadata.id.wrapping_add(1);
        udp.send_to(&wrong.to_vec()?, from)?;
        wrong.metadata.id = asked.metadata.id;
        let name = Name::from_ascii("other.test.")?;
        wrong.queries = vec![Query::query(name, RecordType::TXT)];
        udp.send_to(&wrong.to_vec()?, from)?;
        // From a port that was not asked.
        let other = UdpSocket::bind(SocketAddr::new(udp.local_addr()?.ip(), 0))?;
        other.send_to(&reply(&asked, packet, "stranger").to_vec()?, from)?;
    }
    let mut answer = reply(&asked, packet, &manner);
    if manner == "large" {
        answer.answers.clear();
        answer.metadata.truncation = true;
    }
    udp.send_to(&answer.to_vec()?, from)?;
    Ok(())
}

fn by_tcp(stream: &mut TcpStream) -> Result<()> {
    let packet = read(stream)?;
    let asked = Message::from_vec(&packet)?;
    let manner = manner(&asked);
    if manner == "silent" {
        std::thread::park_timeout(Duration::from_secs(60));
        bail!("said nothing");
    }
    let mut answer = reply(&asked, &packet, &manner);
    if manner == "large" {
        answer.answers = (0..LARGE / 250).map(|_| text(&asked, &"x".repeat(240))).collect();
    }
    let times = if manner == "transfer" { 3 } else { 1 };
    for _ in 0..times {
        write(stream, &answer.to_vec()?)?;
    }
    ensure!(manner != "once", "closes");
    Ok(())
}

fn manner(asked: &Message) -> String {
    let name = asked.queries.first().map(|q| q.name().to_string()).unwrap_or_default();
    name.split('.').next().unwrap_or_default().to_lowercase()
}

/// An answer with things in it that a proxy might be tempted to tidy up.
fn reply(asked: &Message, packet: &[u8], manner: &str) -> Message {
    let mut answer = Message::response(asked.metadata.id, asked.metadata.op_code);
    answer.metadata.recursion_desired = asked.metadata.recursion_desired;
    answer.metadata.authentic_data = true;
    answer.queries.clone_from(&asked.queries);
    let words = if manner == "echo" { hex(packet) } else { manner.to_owned() };
    answer.add_answer(text(asked, &words));
    answer
}

fn text(asked: &Message, words: &str) -> Record {
    let name = asked.queries.first().map_or_else(Name::root, |q| q.name().clone());
    Record::from_rdata(name, TTL, RData::TXT(TXT::new(vec![words.chars().take(255).collect()])))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn bytes(hex: &str) -> Result<Vec<u8>> {
    let digits = hex.as_bytes();
    ensure!(digits.len().is_multiple_of(2), "half a byte");
    let pair = |pair: &[u8]| Ok(u8::from_str_radix(std::str::from_utf8(pair)?, 16)?);
    digits.chunks(2).map(pair).collect()
}
