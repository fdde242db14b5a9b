//! The life of the server: bind both ports, serve, drain; and what goes on beside it again and again: audits, the
//! database's URL and its connections. What is served is webhook.rs's and health.rs's business.

pub mod certificate;
pub mod health;
pub mod readiness;
mod tasks;
pub mod webhook;

use std::future::{Ready, pending, ready};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum_server::accept::Accept;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use axum_server::{Handle, Server};
use tokio::net::{TcpSocket, TcpStream};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::sleep;
use tower_service::Service;
use tracing::{error, info, warn};

use crate::audit::{Selection, sweep};
use crate::core::audit::Report;
use crate::database::LookupError;
use crate::server::certificate::secret::SharedSecret;
use crate::server::certificate::tls::{
    self, Certificate, CertificateFiles, CertificatePem, LiveCertificate, RELOAD_INTERVAL,
};
use crate::server::readiness::Readiness;
use crate::server::tasks::{TaskError, Tasks};
use crate::server::webhook::App;
use crate::telemetry;

/// Longest wait for a TLS handshake, and then for the head of a connection's first request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest wait for the head of a further request. The API server closes what it has not used for 90 s; were
/// the webhook first, it could be just as a request comes, and that admission would fail.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);
/// A connection's bytes that are read ahead, at most. Bodies are gathered elsewhere, and heads are short; hyper's own
/// limit is six times this, and most of the memory under a load of large reviews.
const READ_BUFFER: usize = 16 * 1024;
/// Limit on open connections, on each port. An API server keeps one for each admission that it waits for.
const MAX_CONNECTIONS: usize = 4096;
/// Connections that wait to be accepted, at most. One that finds no room tries again after a whole second.
const BACKLOG: u32 = 1024;
/// How often a database that has not answered yet is asked again.
const DATABASE_INTERVAL: Duration = Duration::from_secs(1);

/// How the server drains.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    /// How long new connections are still accepted after SIGTERM, while the cluster removes the pod's address.
    pub delay: Duration,
    /// How long requests under way may take after that.
    pub timeout: Duration,
}

/// Where the serving certificate comes from. The server already has one.
pub enum CertificateSource {
    /// Generated for this process; never replaced.
    Generated,
    /// Files, and what they held when they were read.
    Files(CertificateFiles, CertificatePem),
    /// The Secret that the replicas share.
    Secret(Box<SharedSecret>),
}

/// Audits of the running pods while the webhook serves.
pub struct Audits {
    /// Lists the pods.
    pub client: kube::Client,
    /// Which pods are audited.
    pub selection: Selection,
    /// From the end of one audit to the start of the next.
    pub interval: Duration,
}

/// Two bound ports; nothing is served yet.
#[derive(Debug)]
pub struct Bound {
    webhook: TcpListener,
    health: TcpListener,
    /// Where the webhook will be; tells the port if 0 was asked for.
    pub webhook_address: SocketAddr,
    /// Where health and metrics will be.
    health_address: SocketAddr,
}

impl Bound {
    /// Binds both ports.
    ///
    /// # Errors
    /// The system's, with the address that it is about.
    pub fn bind(webhook: SocketAddr, health: SocketAddr) -> io::Result<Self> {
        let bind = |address: SocketAddr| {
            let listener = listen(address).map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!(
                        "cannot listen on {address}: {error} (see --listen and --health-listen)"
                    ),
                )
            })?;
            Ok::<_, io::Error>((listener.local_addr()?, listener))
        };
        let (webhook_address, webhook) = bind(webhook)?;
        let (health_address, health) = bind(health)?;
        Ok(Self {
            webhook,
            health,
            webhook_address,
            health_address,
        })
    }

    /// Serves until SIGTERM or SIGINT, then drains. A second signal ends the drain at once.
    ///
    /// # Errors
    /// The system's, if a port or signals cannot be had; or one that names the task that ended, failed or panicked. In
    /// that case too the server drains, unless the task is the webhook's listener.
    pub async fn serve(
        self,
        app: Arc<App>,
        certificate: Certificate,
        source: CertificateSource,
        audits: Option<Audits>,
        drain: Drain,
    ) -> io::Result<()> {
        // Each connection is an open file, and containers often start with a limit of 1,024.
        rlimit::increase_nofile_limit(u64::MAX)?;
        let stop = Stop::new()?;
        let config = certificate.server_config();
        let live = LiveCertificate {
            config: &config,
            readiness: &app.readiness,
            metrics: &app.metrics,
        };
        live.record(&certificate);

        let handle = Handle::new();
        let acceptor = RustlsAcceptor::new(config.clone())
            .handshake_timeout(HEAD_TIMEOUT)
            .acceptor(ConnectionLimit::new());
        let webhook = with_timeouts(axum_server::from_tcp(self.webhook)?)
            .acceptor(acceptor)
            .handle(handle.clone());
        let health =
            with_timeouts(axum_server::from_tcp(self.health)?).acceptor(ConnectionLimit::new());
        info!(webhook = %self.webhook_address, health = %self.health_address, "listening");

        let mut tasks = Tasks::default();
        let routes = webhook::routes(Arc::clone(&app)).into_make_service();
        tasks.spawn(WEBHOOK_LISTENER, webhook.serve(routes));
        let routes = health::routes(Arc::clone(&app)).into_make_service();
        tasks.spawn("health listener", health.serve(routes));
        tasks.spawn_endless("database readiness", wait_for_database(Arc::clone(&app)));
        tasks.spawn_endless(
            "database connections",
            maintain_connections(Arc::clone(&app)),
        );
        tasks.spawn_endless("certificate", source.run(config, Arc::clone(&app)));
        if let Some(audits) = audits {
            tasks.spawn_endless("audits", audit(Arc::clone(&app), audits));
        }

        let failure = run(&mut tasks, stop, &handle, &app.readiness, drain).await;
        tasks.shutdown().await;
        app.database.close_idle().await;
        info!("stopped");
        failure.map_or(Ok(()), |failure| Err(io::Error::other(failure)))
    }
}

/// The task whose end ends the drain.
const WEBHOOK_LISTENER: &str = "webhook listener";

/// Waits for a signal or the end of a task, then drains: `/readyz` fails at once, the listener closes after the delay, and
/// requests under way have the time-out. A second signal cuts the drain short. Returns the first failure of a task.
async fn run(
    tasks: &mut Tasks,
    mut stop: Stop,
    handle: &Handle<SocketAddr>,
    readiness: &Readiness,
    drain: Drain,
) -> Option<TaskError> {
    let mut failure = None;
    tokio::select! {
        () = stop.received() => {}
        ended = tasks.ended() => {
            error!(error = telemetry::chain(&ended), "stopping");
            if ended.task() == WEBHOOK_LISTENER {
                return Some(ended);
            }
            failure = Some(ended);
        }
    }
    let mut is_signalled = failure.is_none();
    readiness.set_draining();
    info!(delay = ?drain.delay, timeout = ?drain.timeout, "draining");
    let mut delay = pin!(sleep(drain.delay));
    let mut is_closing = false;
    loop {
        tokio::select! {
            () = &mut delay, if !is_closing => {
                is_closing = true;
                handle.graceful_shutdown(Some(drain.timeout));
            }
            () = stop.received() => {
                if is_signalled {
                    handle.shutdown();
                }
                is_signalled = true;
            }
            ended = tasks.ended() => match ended {
                TaskError::Ended(WEBHOOK_LISTENER) => return failure,
                ended => {
                    error!(error = telemetry::chain(&ended), "stopping");
                    let is_last = ended.task() == WEBHOOK_LISTENER;
                    failure.get_or_insert(ended);
                    if is_last {
                        return failure;
                    }
                }
            },
        }
    }
}

impl CertificateSource {
    /// Serves each changed certificate. Never returns.
    async fn run(self, config: RustlsConfig, app: Arc<App>) {
        let live = LiveCertificate {
            config: &config,
            readiness: &app.readiness,
            metrics: &app.metrics,
        };
        match self {
            Self::Generated => pending().await,
            Self::Files(files, pem) => tls::reload(&files, pem, live).await,
            Self::Secret(secret) => secret.run(live).await,
        }
    }
}

fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = match address {
        SocketAddr::V4(_) => TcpSocket::new_v4(),
        SocketAddr::V6(_) => TcpSocket::new_v6(),
    }?;
    // The port of a process that has just ended can be had at once.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)?.into_std()
}

/// Configures HTTP/1.1, which API servers speak to webhooks, with a time-out for every request's head.
fn with_timeouts(server: Server<SocketAddr>) -> Server<SocketAddr> {
    let mut server = server.http1_only().first_request_timeout(HEAD_TIMEOUT);
    server
        .http_builder()
        .http1()
        .header_read_timeout(IDLE_TIMEOUT)
        .max_buf_size(READ_BUFFER);
    server
}

/// Accepts connections up to a limit, and closes further ones at once.
#[derive(Clone)]
struct ConnectionLimit(Arc<Semaphore>);

impl ConnectionLimit {
    fn new() -> Self {
        Self(Arc::new(Semaphore::new(MAX_CONNECTIONS)))
    }
}

impl<S> Accept<TcpStream, S> for ConnectionLimit {
    type Stream = TcpStream;
    type Service = Permitted<S>;
    type Future = Ready<io::Result<(TcpStream, Permitted<S>)>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let permit = Arc::clone(&self.0).try_acquire_owned();
        let permit = permit.map_err(|_| io::Error::other("too many connections"));
        ready(permit.and_then(|permit| {
            stream.set_nodelay(true)?;
            let _permit = Arc::new(permit);
            Ok((stream, Permitted { service, _permit }))
        }))
    }
}

/// The service of one connection, which holds the connection's permit.
#[derive(Clone)]
struct Permitted<S> {
    service: S,
    _permit: Arc<OwnedSemaphorePermit>,
}

impl<S: Service<Request>, Request> Service<Request> for Permitted<S> {
    type Response = S::Response;
    type Error = S::Error;
    type Future = S::Future;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: Request) -> S::Future {
        self.service.call(request)
    }
}

/// Asks until the database has answered once, then never ends. An answer to a request counts too.
async fn wait_for_database(app: Arc<App>) {
    while !app.readiness.database_answered() {
        match app.database.check().await {
            Ok(()) => app.readiness.set_database_answered(),
            Err(refused @ LookupError::Refused(_)) => error!(error = %refused, "not ready"),
            Err(failed) => warn!(error = %failed, "not ready"),
        }
        sleep(DATABASE_INTERVAL).await;
    }
    pending().await
}

/// Closes old connections to the database, and takes its URL from its source again, again and again for ever. A URL that
/// cannot be used is said once, and the one in use stays.
async fn maintain_connections(app: Arc<App>) {
    let mut failing = false;
    loop {
        sleep(RELOAD_INTERVAL).await;
        app.database.close_old().await;
        let reread = app.database.reread();
        match &reread {
            Ok(true) => info!("database URL reloaded"),
            Ok(false) => {}
            Err(_) if failing => {}
            Err(error) => error!(
                error = telemetry::chain(error),
                "the changed database URL cannot be used; the old one stays"
            ),
        }
        failing = reread.is_err();
    }
}

/// Audits all running workspace pods again and again, for ever.
async fn audit(app: Arc<App>, audits: Audits) {
    let Audits {
        client,
        selection,
        interval,
    } = audits;
    loop {
        let mut report = Report::default();
        let (database, policy) = (&app.database, &app.policy);
        match sweep(&client, database, policy, &selection, &mut report, drop).await {
            Ok(()) if report.not_audited.is_empty() => {
                app.metrics.audits.record(&report);
                info!(audited = report.audited, drifted = report.drifted, "audit");
            }
            Ok(()) => {
                app.metrics.audits.fail();
                error!(
                    error = report.not_audited.first(),
                    audited = report.audited,
                    not_audited = report.not_audited.len(),
                    "some pods were not audited; what the last whole audit found stays"
                );
            }
            Err(error) => {
                app.metrics.audits.fail();
                error!(
                    error = telemetry::chain(&error),
                    audited = report.audited,
                    "the audit ended early; what the last whole one found stays"
                );
            }
        }
        sleep(interval).await;
    }
}

/// The signals that end the process.
struct Stop {
    terminate: Signal,
    interrupt: Signal,
}

impl Stop {
    fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    async fn received(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{Ipv4Addr, TcpStream as StdTcpStream};

    use axum::Router;
    use axum::routing::get;
    use tokio::sync::Notify;
    use tokio::task::spawn_blocking;

    use super::*;

    #[tokio::test]
    async fn failed_task_drains_and_requests_under_way_are_answered() {
        let listener = listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let (arrived, drained) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (signal, wait) = (Arc::clone(&arrived), Arc::clone(&drained));
        let answer = async move || {
            signal.notify_one();
            wait.notified().await;
            "answered"
        };
        let handle = Handle::new();
        let server = axum_server::from_tcp(listener)
            .unwrap()
            .handle(handle.clone());
        let mut tasks = Tasks::default();
        let routes = Router::new().route("/", get(answer)).into_make_service();
        tasks.spawn(WEBHOOK_LISTENER, server.serve(routes));
        tasks.spawn("broken", async move {
            arrived.notified().await;
            Err(io::Error::other("on purpose"))
        });
        let client = spawn_blocking(move || {
            let mut stream = StdTcpStream::connect(address).unwrap();
            let request = b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
            stream.write_all(request).unwrap();
            let mut response = String::new();
            stream.read_to_string(&mut response).unwrap();
            response
        });
        let readiness = Readiness::default();
        let drain = Drain {
            delay: Duration::ZERO,
            timeout: Duration::from_secs(30),
        };
        let (failure, ()) = tokio::join!(
            run(&mut tasks, Stop::new().unwrap(), &handle, &readiness, drain),
            async {
                while !readiness.is_draining() {
                    tokio::task::yield_now().await;
                }
                drained.notify_one();
            }
        );
        let failure = failure.map(|failure| telemetry::chain(&failure).to_string());
        assert_eq!(failure.unwrap(), "the task \"broken\" failed: on purpose");
        assert!(client.await.unwrap().ends_with("answered"));
    }
}
