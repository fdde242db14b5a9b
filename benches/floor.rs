//! The floor under the webhook: the least code that does what no webhook of this kind can leave out. Over TLS it
//! reads the body, skims it, and allows; with a database's URL it runs the one SELECT too, through sqlx's pool with the
//! webhook's settings.
//!
//! `floor CERTIFICATE KEY [DATABASE_URL WORKSPACES]` listens on any port of loopback and prints its address.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a benchmark that cannot go on ends"
)]

use std::net::{Ipv4Addr, TcpListener};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use axum::Router;
use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderName, StatusCode, header};
use axum::routing::post;
use axum_server::accept::NoDelayAcceptor;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use serde::de::IgnoredAny;
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use uuid::Uuid;

const ALLOWED: &str = r#"{"apiVersion":"admission.k8s.io/v1","kind":"AdmissionReview","response":{"uid":"","allowed":true}}"#;
/// From one workspace that is looked up to the next: a prime, so that all have their turn.
const STRIDE: u64 = 7_919;

struct Workspaces {
    pool: PgPool,
    count: u64,
    next: AtomicU64,
}

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [certificate, key, database @ ..] = arguments.as_slice() else {
        panic!("floor CERTIFICATE KEY [DATABASE_URL WORKSPACES]");
    };
    let workspaces = match database {
        [url, count] => Some(Workspaces {
            pool: PgPoolOptions::new()
                .max_connections(16)
                .test_before_acquire(false)
                .connect_lazy(url)
                .expect("the URL is one of PostgreSQL"),
            count: count.parse().expect("a number of workspaces"),
            next: AtomicU64::new(0),
        }),
        _ => None,
    };
    let provider = rustls::crypto::ring::default_provider();
    provider.install_default().expect("there is none yet");
    let tls = RustlsConfig::from_pem_file(certificate, key).await;
    let tls = RustlsAcceptor::new(tls.expect("a certificate and its key"));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port of loopback");
    listener
        .set_nonblocking(true)
        .expect("a socket can be told not to block");
    println!("{}", listener.local_addr().expect("it is bound"));
    let app = Router::new()
        .route("/mutate", post(allow))
        .layer(DefaultBodyLimit::max(8 * 1024 * 1024))
        .with_state(Arc::new(workspaces));
    axum_server::from_tcp(listener)
        .expect("the socket can be served")
        .acceptor(tls.acceptor(NoDelayAcceptor::new()))
        .serve(app.into_make_service())
        .await
        .expect("the port can be served");
}

async fn allow(
    State(workspaces): State<Arc<Option<Workspaces>>>,
    body: Bytes,
) -> Result<([(HeaderName, &'static str); 1], &'static str), StatusCode> {
    serde_json::from_slice::<IgnoredAny>(&body).map_err(|_| StatusCode::BAD_REQUEST)?;
    if let Some(workspaces) = &*workspaces {
        let turn = workspaces.next.fetch_add(STRIDE, Ordering::Relaxed) % workspaces.count;
        sqlx::query_scalar("SELECT llm_billing_mode FROM workspaces WHERE id = $1")
            .bind(Uuid::from_u128(turn.into()))
            .fetch_one(&workspaces.pool)
            .await
            .map(|_mode: Option<String>| ())
            .map_err(|_| StatusCode::INTERNAL_SERVER_ERROR)?;
    }
    Ok(([(header::CONTENT_TYPE, "application/json")], ALLOWED))
}
