//! Logs and traces. Logs are JSON lines for machines or plain ones for people, both on stderr so that stdout is a
//! command's own. Levels come from `RUST_LOG`, as tracing-subscriber reads it. And how errors read in them.

mod chain;
mod json;
pub mod log_writer;
pub mod traces;

use std::io;

use clap::ValueEnum;
use thiserror::Error;
use tracing::Level;
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

pub(crate) use self::chain::chain;
use self::json::JsonLines;
use self::log_writer::{LogQueue, WriterThread};
use self::traces::{Traces, TracesError};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Pretty,
}

/// Why there can be no logs or traces.
#[derive(Debug, Error)]
pub enum TelemetryError {
    /// The system gives no thread to write the log.
    #[error("the log cannot be written")]
    Log(#[source] io::Error),
    /// Traces are asked for and cannot be had.
    #[error(transparent)]
    Traces(#[from] TracesError),
}

/// Logs and traces while they go on; dropped, it writes and sends what still waits.
pub struct Telemetry {
    /// The queue of log lines, which counts those that were dropped.
    pub lines: LogQueue,
    // Dropped in this order: what the traces say at their end is logged.
    _traces: Option<Traces>,
    _writing: WriterThread,
}

/// Starts logging, and tracing where the environment asks for it. What `RUST_LOG` does not say is logged at info.
///
/// # Errors
/// [`TelemetryError`]
pub fn start(format: LogFormat) -> Result<Telemetry, TelemetryError> {
    let levels = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let lines = LogQueue::default();
    let writing = lines.write_to(io::stderr()).map_err(TelemetryError::Log)?;
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
    let writer = lines.clone();
    let log = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
    let log = match format {
        LogFormat::Json => log.event_format(JsonLines).boxed(),
        LogFormat::Pretty => log.with_target(false).boxed(),
    };
    // In a list, for one layer that is absent would ask for every span.
    let mut layers = vec![log.with_filter(levels.and(quotes_nothing)).boxed()];
    layers.extend(traces.as_ref().map(|traces| traces.layer().boxed()));
    tracing_subscriber::registry().with(layers).init();
    Ok(Telemetry {
        lines,
        _traces: traces,
        _writing: writing,
    })
}
