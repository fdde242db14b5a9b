//! `/livez`, `/readyz` and `/metrics`, served over plain HTTP on a separate port.

use std::fmt;
use std::sync::Arc;

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;

/// A process whose health is served.
pub trait Health: Send + Sync + 'static {
    /// Returns why it is not ready; `None` if it is.
    fn not_ready_reason(&self) -> Option<&'static str>;

    /// Encodes its metrics as OpenMetrics text.
    ///
    /// # Errors
    /// Fails only if a metric cannot be formatted.
    fn metrics(&self) -> Result<String, fmt::Error>;
}

/// Returns the routes.
pub fn routes<H: Health>(health: Arc<H>) -> Router {
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz::<H>))
        .route("/metrics", get(metrics::<H>))
        .with_state(health)
}

async fn readyz<H: Health>(State(health): State<Arc<H>>) -> Response {
    match health.not_ready_reason() {
        None => "ok\n".into_response(),
        Some(reason) => {
            (StatusCode::SERVICE_UNAVAILABLE, format!("not ready: {reason}\n")).into_response()
        }
    }
}

async fn metrics<H: Health>(State(health): State<Arc<H>>) -> Response {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match health.metrics() {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
