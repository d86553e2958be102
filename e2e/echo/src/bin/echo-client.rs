//! `echo-client`: asks a URL and prints the answer, field by field. It fails if any question gets no answer; an answer
//! with an error status is an answer.

use std::io::Write as _;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::Parser;
use echo::ask::{self, Question};
use echo::wish;
use http::{HeaderName, HeaderValue, Method, Uri};

#[derive(Parser)]
#[command(version, about = "Asks a URL (http, https, grpc, tcp) and prints the answer as lines")]
struct Cli {
    url: Uri,
    #[arg(long, default_value = "GET")]
    method: Method,
    /// A header, as NAME:VALUE; may be given more than once. Host is who is asked for
    #[arg(short = 'H', long = "header", value_parser = header)]
    headers: Vec<(HeaderName, HeaderValue)>,
    /// How many times to ask, over one connection
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    count: u32,
    /// The body, the gRPC message, or the line
    #[arg(long, default_value = "")]
    msg: String,
    /// HTTP/2 from the first byte on
    #[arg(long)]
    http2: bool,
    /// Who must have signed the server's certificate; without it any is taken
    #[arg(long)]
    ca: Option<PathBuf>,
    /// Longest wait for one answer, such as 500ms or 5s
    #[arg(long, default_value = "5s", value_parser = wish::delay)]
    timeout: std::time::Duration,
}

fn main() -> ExitCode {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let done = runtime.map_err(Into::into).and_then(|runtime| runtime.block_on(run(Cli::parse())));
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            echo::say(format_args!("echo-client: {error:#}"));
            ExitCode::FAILURE
        }
    }
}

async fn run(cli: Cli) -> Result<()> {
    let question = Question {
        url: cli.url,
        method: cli.method,
        headers: cli.headers,
        message: cli.msg,
        http2: cli.http2,
        authority: cli.ca,
        timeout: cli.timeout,
    };
    let mut out = std::io::stdout().lock();
    ask::ask(&question, cli.count, |lines| writeln!(out, "{lines}").context("writing the answer"))
        .await
}

fn header(text: &str) -> Result<(HeaderName, HeaderValue)> {
    let (name, value) = text.split_once(':').context("a header is NAME:VALUE")?;
    Ok((
        name.trim().parse().context("the header's name")?,
        value.trim().parse().context("the header's value")?,
    ))
}
