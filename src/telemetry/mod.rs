//! Logs and traces. Logs are JSON lines for machines or plain ones for people, both on stderr so that stdout is a
//! command's own. Levels come from `RUST_LOG`, as tracing-subscriber reads it. And how errors read in them.

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

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Pretty,
}

/// Limit on log lines that wait to be written; lines beyond it are dropped.
const MAX_WAITING_LINES: usize = 2048;

/// Logs and traces while they go on. Dropped, it writes and sends what still waits.
pub struct Telemetry {
    /// Counts the log lines that were dropped.
    pub dropped_lines: ErrorCounter,
    // Dropped in this order: the end of the traces is logged.
    _traces: Option<Traces>,
    _log_writer: WorkerGuard,
}

/// Starts logging, and tracing where the environment configures it. What `RUST_LOG` does not mention is logged at info.
///
/// # Errors
/// [`TracesError`]
pub fn start(format: LogFormat) -> Result<Telemetry, TracesError> {
    let levels = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // A thread of its own writes the log: its reader may be slow or stuck, and no admission waits for it.
    let (writer, log_writer) = NonBlockingBuilder::default()
        .lossy(true)
        .buffered_lines_limit(MAX_WAITING_LINES)
        .thread_name("log")
        .finish(BufWriter::new(io::stderr()));
    let dropped_lines = writer.error_counter();
    let traces = Traces::start()?;
    // Spans are for traces. The client of the Kubernetes API logs answers that it cannot read, and they may hold keys;
    // sqlx logs settings of a URL and lines of a password file that it does not know.
    let quotes_nothing = filter_fn(|metadata| {
        let quotes = ["kube_client", "sqlx_postgres::options"];
        let quotes = quotes
            .iter()
            .any(|target| metadata.target().starts_with(target));
        metadata.is_event() && (!quotes || *metadata.level() == Level::ERROR)
    });
    let log = tracing_subscriber::fmt::layer().with_writer(writer);
    let log = match format {
        LogFormat::Json => log.event_format(JsonLines).boxed(),
        LogFormat::Pretty => log.with_target(false).boxed(),
    };
    // In a list, for one layer that is absent would ask for every span.
    let mut layers = vec![log.with_filter(levels.and(quotes_nothing)).boxed()];
    layers.extend(traces.as_ref().map(|traces| traces.layer().boxed()));
    tracing_subscriber::registry().with(layers).init();
    Ok(Telemetry {
        dropped_lines,
        _traces: traces,
        _log_writer: log_writer,
    })
}
