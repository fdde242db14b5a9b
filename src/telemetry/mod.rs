//! Logs and traces, and the format of errors in them. Logs are JSON or plain lines on stderr, so that stdout is left to
//! the command. Log levels come from `RUST_LOG`, in tracing-subscriber's syntax.

mod chain;
mod json;
pub mod traces;

use std::io::{self, BufWriter};

use clap::ValueEnum;
use tracing::Level;
use tracing_appender::non_blocking::{ErrorCounter, NonBlockingBuilder, WorkerGuard};
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

pub(crate) use self::chain::chain;
use self::json::JsonLines;
use self::traces::{Traces, TracesError};

/// The format of log lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object per line.
    Json,
    /// Plain lines for people.
    Pretty,
}

/// Limit on log lines that wait to be written; lines beyond it are dropped.
const MAX_WAITING_LINES: usize = 2048;

/// Running logs and traces. On drop, writes the pending log lines and sends the pending spans.
pub struct Telemetry {
    /// Counts the log lines that were dropped.
    pub dropped_lines: ErrorCounter,
    // Dropped in this order, so that errors while sending the last spans are logged.
    _traces: Option<Traces>,
    _log_writer: WorkerGuard,
}

/// Starts logging, at level info without `RUST_LOG`. Starts tracing if the environment configures it.
///
/// # Errors
/// [`TracesError`]
pub fn start(format: LogFormat) -> Result<Telemetry, TracesError> {
    let levels = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A separate thread writes the log: stderr may block, and admissions must not wait for it.
    let (writer, log_writer) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(MAX_WAITING_LINES)
        .thread_name("log")
        .finish(BufWriter::new(io::stderr()));
    let dropped_lines = writer.error_counter();
    let traces = Traces::start()?;
    // Spans are only for traces. kube logs responses that it cannot parse, which may hold keys, and each failed request,
    // which its caller reports too. sqlx logs unknown settings of a URL and invalid lines of a password file.
    let without_secrets = filter_fn(|metadata| {
        let is_of = |target| metadata.target().starts_with(target);
        let may_quote_secrets =
            is_of("sqlx_postgres::options") && *metadata.level() != Level::ERROR;
        metadata.is_event() && !may_quote_secrets && !is_of("kube_client")
    });
    let log = tracing_subscriber::fmt::layer().with_writer(writer);
    let log = match format {
        LogFormat::Json => log.event_format(JsonLines).boxed(),
        LogFormat::Pretty => log.with_target(false).boxed(),
    };
    // A list, because an absent layer (`None`) would enable every span.
    let mut layers = vec![log.with_filter(levels.and(without_secrets)).boxed()];
    layers.extend(traces.as_ref().map(|traces| traces.layer().boxed()));
    tracing_subscriber::registry().with(layers).init();
    Ok(Telemetry {
        dropped_lines,
        _traces: traces,
        _log_writer: log_writer,
    })
}
