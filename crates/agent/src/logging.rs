//! Diagnostic log lines on standard error: text as Istio's ztunnel writes it or JSON, with a level that
//! can be changed while the program runs.
//!
//! Invariant: a wrong filter is an error that names it; the filter in force then stays.

use std::fmt;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::SystemTime;

use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Registry, fmt as tracing_fmt, reload};

use crate::access_log::{Format, Utc};

/// Changes the log level of the running program. Cheap to clone.
#[derive(Clone)]
pub struct LogControl {
    handle: reload::Handle<EnvFilter, Registry>,
    /// The filter in force, and the one the program started with.
    directives: Arc<Mutex<(String, String)>>,
}

impl fmt::Debug for LogControl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogControl").field("directives", &self.current()).finish()
    }
}

/// What is wrong with a log filter, or with setting it.
#[derive(Debug, thiserror::Error)]
#[error("log filter {directives:?}: {why}; write it as `info` or `info,hbone=debug`")]
pub struct FilterError {
    directives: String,
    why: String,
}

/// Starts logging for the whole process. Call it once.
///
/// # Errors
/// When the filter cannot be read, or logging is started already.
pub fn start(format: Format, directives: &str) -> Result<LogControl, FilterError> {
    let (subscriber, control) = subscriber(format, directives, io::stderr)?;
    let error = |e: tracing_subscriber::util::TryInitError| wrong(directives, &e);
    subscriber.try_init().map_err(error)?;
    Ok(control)
}

fn subscriber<W>(
    format: Format,
    directives: &str,
    output: W,
) -> Result<(impl Subscriber + Send + Sync + use<W>, LogControl), FilterError>
where
    W: for<'a> tracing_fmt::MakeWriter<'a> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(parse(directives)?);
    let layer = tracing_fmt::layer().with_writer(output).with_ansi(false);
    let layer = match format {
        Format::Text => layer.event_format(IstioText).boxed(),
        Format::Json => layer.json().flatten_event(true).with_current_span(false).boxed(),
    };
    let directives = Arc::new(Mutex::new((directives.to_owned(), directives.to_owned())));
    Ok((tracing_subscriber::registry().with(filter).with(layer), LogControl { handle, directives }))
}

impl LogControl {
    /// The filter in force.
    pub fn current(&self) -> String {
        self.directives.lock().unwrap_or_else(PoisonError::into_inner).0.clone()
    }

    /// Puts another filter into force.
    ///
    /// # Errors
    /// When it cannot be read; the filter in force stays.
    pub fn set(&self, directives: &str) -> Result<(), FilterError> {
        let filter = parse(directives)?;
        self.handle.reload(filter).map_err(|e| wrong(directives, &e))?;
        directives
            .clone_into(&mut self.directives.lock().unwrap_or_else(PoisonError::into_inner).0);
        Ok(())
    }

    /// Back to the filter that the program started with.
    ///
    /// # Errors
    /// When logging has ended.
    pub fn reset(&self) -> Result<(), FilterError> {
        let first = self.directives.lock().unwrap_or_else(PoisonError::into_inner).1.clone();
        self.set(&first)
    }
}

fn parse(directives: &str) -> Result<EnvFilter, FilterError> {
    if directives.trim().is_empty() {
        return Err(wrong(directives, &"it is empty"));
    }
    // The parser takes any single word for a target, and would log nothing else: surely a typing error.
    for part in directives.split(',') {
        let level = part.rsplit_once('=').map_or(part, |(_, level)| level).trim();
        if level.parse::<tracing::level_filters::LevelFilter>().is_err() {
            return Err(wrong(directives, &format_args!("{level:?} is not a level")));
        }
    }
    EnvFilter::try_new(directives).map_err(|e| wrong(directives, &e))
}

fn wrong(directives: &str, why: &dyn fmt::Display) -> FilterError {
    // It may come from a request: keep the echo short.
    FilterError { directives: directives.chars().take(200).collect(), why: why.to_string() }
}

/// `TIME<tab>LEVEL<tab>SCOPE<tab>MESSAGE<tab>KEY=VALUE ...`
struct IstioText;

impl<S, N> FormatEvent<S, N> for IstioText
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _context: &FmtContext<'_, S, N>,
        mut out: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let meta = event.metadata();
        let level = match *meta.level() {
            tracing::Level::ERROR => "error",
            tracing::Level::WARN => "warn",
            tracing::Level::INFO => "info",
            tracing::Level::DEBUG => "debug",
            tracing::Level::TRACE => "trace",
        };
        write!(out, "{}\t{level}\t{}\t", Utc(SystemTime::now()), meta.target())?;
        let mut fields = Fields { message: String::new(), rest: String::new() };
        event.record(&mut fields);
        let tab = if fields.rest.is_empty() { "" } else { "\t" };
        writeln!(out, "{}{tab}{}", fields.message, fields.rest)
    }
}

struct Fields {
    message: String,
    rest: String,
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        use fmt::Write;
        // A String takes whatever is written to it.
        let _: fmt::Result = if field.name() == "message" {
            write!(OneLine(&mut self.message), "{value:?}")
        } else {
            let space = if self.rest.is_empty() { "" } else { " " };
            write!(OneLine(&mut self.rest), "{space}{}={value:?}", field.name())
        };
    }
}

/// Messages of peers and of the kernel may hold line breaks: they must not forge a line.
struct OneLine<'a>(&'a mut String);

impl fmt::Write for OneLine<'_> {
    fn write_str(&mut self, s: &str) -> fmt::Result {
        self.0.extend(s.chars().map(|c| if c.is_control() { ' ' } else { c }));
        Ok(())
    }
}

/// A control of a subscriber that is not installed, for tests of what uses one.
#[cfg(test)]
pub(crate) fn detached(format: Format, directives: &str) -> LogControl {
    let (subscriber, control) = subscriber(format, directives, io::sink).unwrap();
    // The control holds it weakly; tests are short.
    std::mem::forget(subscriber);
    control
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap_or_else(PoisonError::into_inner).extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Buffer {
        fn take(&self) -> String {
            String::from_utf8(std::mem::take(&mut *self.0.lock().unwrap())).unwrap()
        }
    }

    fn logging(
        format: Format,
        directives: &str,
    ) -> (Buffer, LogControl, tracing::subscriber::DefaultGuard) {
        let buffer = Buffer::default();
        let writer = buffer.clone();
        let (subscriber, control) = subscriber(format, directives, move || writer.clone()).unwrap();
        (buffer, control, tracing::subscriber::set_default(subscriber))
    }

    #[test]
    fn text_lines() {
        let (buffer, _control, _guard) = logging(Format::Text, "info");
        tracing::info!(target: "xds", peer = "a b", count = 3, "connected to {}", "x\ny");
        tracing::warn!("plain");
        let lines = buffer.take();
        let lines: Vec<_> = lines.lines().map(|l| l.split_once('\t').unwrap()).collect();
        assert!(lines[0].0.ends_with('Z') && lines[0].0.contains('T'), "{}", lines[0].0);
        assert_eq!(lines[0].1, "info\txds\tconnected to x y\tpeer=\"a b\" count=3");
        assert_eq!(lines[1].1, "warn\tagent::logging::tests\tplain");
        assert_eq!(lines.len(), 2);
    }

    #[test]
    fn json_lines() {
        let (buffer, _control, _guard) = logging(Format::Json, "info");
        tracing::info!(count = 3, "a\nb");
        let line: serde_json::Value = serde_json::from_str(&buffer.take()).unwrap();
        assert_eq!(
            (&line["message"], &line["count"], &line["level"]),
            (&"a\nb".into(), &3.into(), &"INFO".into())
        );
    }

    #[test]
    fn the_level_changes_while_running() {
        let (buffer, control, _guard) = logging(Format::Text, "info");
        let seen = || {
            tracing::debug!("hello");
            buffer.take().lines().count()
        };
        assert_eq!(seen(), 0);
        control.set("info,agent=debug").unwrap();
        assert_eq!((seen(), control.current().as_str()), (1, "info,agent=debug"));
        for wrong in ["", "agent=loud", "loud", "agent=debug,loud", "[{"] {
            let error = control.set(wrong).unwrap_err().to_string();
            assert!(error.starts_with("log filter ") && error.contains(wrong), "{error}");
        }
        assert_eq!((seen(), control.current().as_str()), (1, "info,agent=debug"));
        control.reset().unwrap();
        assert_eq!((seen(), control.current().as_str()), (0, "info"));
    }
}
