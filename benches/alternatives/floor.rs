//! The floor: the minimum work of a webhook of this kind. It reads the body, skims it, runs one SELECT and allows. It
//! does not plan, patch, log or count.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderName, header};
use axum::routing::post;
use serde::de::IgnoredAny;
use sqlx::PgPool;
use uuid::Uuid;

use crate::lookup;

const ALLOWED: &str = r#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","response":{"uid":"","allowed":true}}"#;
/// Step from one looked-up workspace to the next; a prime, so that every workspace is reached.
const STRIDE: u64 = 7_919;

struct Floor {
    pool: PgPool,
    workspaces: u64,
    next: AtomicU64,
}

pub(crate) fn routes(pool: PgPool, workspaces: u64) -> Router {
    let floor = Floor {
        pool,
        workspaces,
        next: AtomicU64::new(0),
    };
    let routes = Router::new().route("/mutate", post(allow));
    routes.with_state(Arc::new(floor))
}

async fn allow(
    State(floor): State<Arc<Floor>>,
    body: Bytes,
) -> ([(HeaderName, &'static str); 1], &'static str) {
    serde_json::from_slice::<IgnoredAny>(&body).expect("a review is JSON");
    let turn = floor.next.fetch_add(STRIDE, Ordering::Relaxed) % floor.workspaces;
    lookup(&floor.pool, Uuid::from_u128(turn.into())).await;
    ([(header::CONTENT_TYPE, "application/json")], ALLOWED)
}
