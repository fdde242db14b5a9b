//! `/livez`, `/readyz` and `/metrics`, over plain HTTP on a port of their own.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use time::OffsetDateTime;

use crate::server::webhook::App;

/// Whether the process should get traffic.
#[derive(Debug, Default)]
pub struct Readiness {
    draining: AtomicBool,
    database_answered: AtomicBool,
    certificate_expiry: AtomicI64,
}

impl Readiness {
    /// No more: the process is about to end.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether it is.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// The database answered once. A later loss does not take the pod out: the fallback still serves.
    pub fn set_database_answered(&self) {
        self.database_answered.store(true, Ordering::Relaxed);
    }

    /// Whether it did.
    pub fn database_answered(&self) -> bool {
        self.database_answered.load(Ordering::Relaxed)
    }

    /// When the serving certificate expires, in seconds since the epoch.
    pub fn set_certificate_expiry(&self, timestamp: i64) {
        self.certificate_expiry.store(timestamp, Ordering::Relaxed);
    }

    fn obstacle(&self) -> Option<&'static str> {
        if self.is_draining() {
            Some("draining")
        } else if self.certificate_expiry.load(Ordering::Relaxed)
            <= OffsetDateTime::now_utc().unix_timestamp()
        {
            Some("the certificate has expired")
        } else if !self.database_answered() {
            Some("the database has not answered the policy's query yet")
        } else {
            None
        }
    }
}

/// The routes.
pub fn routes(app: Arc<App>) -> Router {
    Router::new()
        .route("/livez", get(async || "ok\n"))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .with_state(app)
}

async fn readyz(State(app): State<Arc<App>>) -> Response {
    match app.readiness.obstacle() {
        None => "ok\n".into_response(),
        Some(obstacle) => (
            StatusCode::SERVICE_UNAVAILABLE,
            format!("not ready: {obstacle}\n"),
        )
            .into_response(),
    }
}

async fn metrics(State(app): State<Arc<App>>) -> Response {
    const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    match app.metrics.encode(app.database.connections()) {
        Ok(text) => ([(header::CONTENT_TYPE, OPEN_METRICS)], text).into_response(),
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}
