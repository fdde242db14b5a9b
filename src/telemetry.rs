//! Logging: JSON lines for machines, plain ones for people, both on stderr so that stdout is a command's
//! own. Levels come from `RUST_LOG`, as tracing-subscriber reads it. And how errors read in them.

use clap::ValueEnum;
use tracing::Level;
use tracing_subscriber::filter::{FilterExt, filter_fn};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{EnvFilter, Layer};

/// How log lines look.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum LogFormat {
    /// One JSON object a line.
    Json,
    /// For people.
    Pretty,
}

/// Starts logging. What `RUST_LOG` does not say is logged at info.
pub fn start(format: LogFormat) {
    let levels = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    // The client of the Kubernetes API logs answers that it cannot read, and they may hold keys.
    let quotes_nothing = filter_fn(|event| {
        !event.target().starts_with("kube_client") || *event.level() == Level::ERROR
    });
    let lines = tracing_subscriber::fmt::layer().with_writer(std::io::stderr);
    let lines = match format {
        LogFormat::Json => lines
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .boxed(),
        LogFormat::Pretty => lines.with_target(false).boxed(),
    };
    let filter = levels.and(quotes_nothing);
    tracing_subscriber::registry()
        .with(lines.with_filter(filter))
        .init();
}

/// An error with its causes, on one line. Each error of this crate says its own step only.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}
