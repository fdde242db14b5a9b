//! The alternatives that the webhook is compared with, as one program with three handlers: the floor (floor.rs), a
//! careful webhook (careful.rs) and an idiomatic one (idiomatic.rs). The last two do the webhook's job under the policy
//! in rules.rs.
//!
//! `alternatives floor|careful|idiomatic CERTIFICATE KEY DATABASE_URL WORKSPACES` listens on a free port of loopback
//! and prints its address. The database has WORKSPACES workspaces, whose ids count up from zero.

#![expect(
    clippy::expect_used,
    clippy::print_stdout,
    reason = "a benchmark panics if it cannot continue"
)]

mod careful;
mod floor;
mod idiomatic;
mod rules;

use std::net::{Ipv4Addr, TcpListener};

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum_server::accept::NoDelayAcceptor;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use sqlx::PgPool;
use sqlx::postgres::PgPoolOptions;
use uuid::Uuid;

#[tokio::main]
async fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [name, certificate, key, database_url, workspaces] = arguments.as_slice() else {
        panic!("alternatives floor|careful|idiomatic CERTIFICATE KEY DATABASE_URL WORKSPACES");
    };
    // The webhook's settings.
    let pool = PgPoolOptions::new()
        .max_connections(16)
        .test_before_acquire(false)
        .connect_lazy(database_url)
        .expect("a PostgreSQL URL");
    let routes = match name.as_str() {
        "floor" => floor::routes(pool, workspaces.parse().expect("a number of workspaces")),
        "careful" => careful::routes(pool),
        "idiomatic" => idiomatic::routes(pool),
        name => panic!("unknown alternative {name}"),
    };
    let logs = tracing_subscriber::fmt().json().flatten_event(true);
    logs.with_writer(std::io::stderr).init();
    serve(routes, certificate, key).await;
}

async fn serve(routes: Router, certificate: &str, key: &str) {
    let provider = rustls::crypto::ring::default_provider();
    provider
        .install_default()
        .expect("no provider is installed yet");
    let tls = RustlsConfig::from_pem_file(certificate, key).await;
    let tls = RustlsAcceptor::new(tls.expect("a certificate and its key"));
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a port of loopback");
    listener
        .set_nonblocking(true)
        .expect("the socket can be made non-blocking");
    println!("{}", listener.local_addr().expect("it is bound"));
    let routes = routes.layer(DefaultBodyLimit::max(8 * 1024 * 1024));
    axum_server::from_tcp(listener)
        .expect("the socket can be served")
        .acceptor(tls.acceptor(NoDelayAcceptor::new()))
        .serve(routes.into_make_service())
        .await
        .expect("the port can be served");
}

/// Returns the workspace's mode.
async fn lookup(pool: &PgPool, workspace: Uuid) -> Option<String> {
    sqlx::query_scalar("SELECT llm_billing_mode FROM workspaces WHERE id = $1")
        .bind(workspace)
        .fetch_one(pool)
        .await
        .expect("the table has all workspaces")
}
