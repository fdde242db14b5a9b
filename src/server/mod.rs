//! The server's life cycle: binds both ports, serves and drains. Also runs the periodic work: audits, reloads of the
//! database URL and maintenance of its connections. The routes live in webhook.rs and health.rs.

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
use crate::server::tasks::{TaskError, Tasks, WEBHOOK_LISTENER};
use crate::server::webhook::App;
use crate::telemetry;

/// Limit on the time for a TLS handshake, and then for the head of a connection's first request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Limit on the time until the head of a further request. It exceeds the 90 s after which the API server closes an
/// idle connection: if the webhook closed it first, a request could arrive at that moment and fail.
const IDLE_TIMEOUT: Duration = Duration::from_secs(120);
/// Limit on a connection's read buffer. Heads are short, and bodies are collected elsewhere. Hyper's default is six
/// times as large and would dominate memory use under a load of large reviews.
const MAX_READ_BUFFER_BYTES: usize = 16 * 1024;
/// Limit on open connections per port. An API server uses one for each concurrent admission.
const MAX_CONNECTIONS: usize = 4096;
/// Limit on connections that wait to be accepted. A client beyond it retries its SYN after a whole second.
const MAX_BACKLOG: u32 = 1024;
/// Pause between checks of a database that has not answered yet.
const DATABASE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// The durations of a drain.
#[derive(Clone, Copy, Debug)]
pub struct Drain {
    /// Time after SIGTERM to keep accepting connections, while the cluster removes the pod's address.
    pub delay: Duration,
    /// Time after that for requests in flight to end.
    pub timeout: Duration,
}

/// The source of the serving certificate. The first certificate is already loaded.
pub enum CertificateSource {
    /// Generated for this process and never replaced.
    Generated,
    /// Files, and their contents when they were last read.
    Files(CertificateFiles, CertificatePem),
    /// The Secret shared by the replicas.
    Secret(Box<SharedSecret>),
}

/// Configuration of the periodic audits of running pods.
pub struct Audits {
    /// The client that lists the pods.
    pub client: kube::Client,
    /// The pods to audit.
    pub selection: Selection,
    /// Pause between the end of one audit and the start of the next.
    pub interval: Duration,
}

/// The two bound ports, not yet served.
#[derive(Debug)]
pub struct Bound {
    webhook: TcpListener,
    health: TcpListener,
    /// The webhook's address, with the actual port if 0 was requested.
    pub webhook_address: SocketAddr,
    /// The address of health and metrics.
    health_address: SocketAddr,
}

impl Bound {
    /// Binds both ports.
    ///
    /// # Errors
    /// An IO error that names the address.
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
    /// An IO error if the limit on open files, a listener or a signal handler cannot be set up. Otherwise an error that names the task that
    /// ended, failed or panicked; the server still drains, unless that task is the webhook's listener.
    pub async fn serve(
        self,
        app: Arc<App>,
        certificate: Certificate,
        source: CertificateSource,
        audits: Option<Audits>,
        drain: Drain,
    ) -> io::Result<()> {
        // Each connection needs a file descriptor, and containers often start with a limit of 1,024.
        rlimit::increase_nofile_limit(u64::MAX)?;
        let stop = StopSignals::new()?;
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

        let failure = run_until_drained(&mut tasks, stop, &handle, &app.readiness, drain).await;
        tasks.shutdown().await;
        app.database.close_idle().await;
        info!("stopped");
        failure.map_or(Ok(()), |failure| Err(io::Error::other(failure)))
    }
}

/// Waits for a signal or the end of a task, then drains. Returns the first failure of a task.
async fn run_until_drained(
    tasks: &mut Tasks,
    mut stop: StopSignals,
    handle: &Handle<SocketAddr>,
    readiness: &Readiness,
    drain: Drain,
) -> Option<TaskError> {
    let failure = tokio::select! {
        () = stop.received() => None,
        ended = tasks.ended() => Some(ended),
    };
    if let Some(failure) = &failure {
        error!(error = telemetry::chain(failure), "stopping");
    }
    if failure.as_ref().is_some_and(TaskError::is_of_listener) {
        return failure;
    }
    readiness.set_draining();
    info!(delay = ?drain.delay, timeout = ?drain.timeout, "draining");
    drain_requests(tasks, stop, handle, drain, failure).await
}

/// Closes the listener after the delay, and gives requests under way until the time-out. A signal cuts that short, except
/// the first one after a task's failure, which asks for no more than the drain.
async fn drain_requests(
    tasks: &mut Tasks,
    mut stop: StopSignals,
    handle: &Handle<SocketAddr>,
    drain: Drain,
    mut failure: Option<TaskError>,
) -> Option<TaskError> {
    let mut is_signalled = failure.is_none();
    let mut is_closing = false;
    let mut delay = pin!(sleep(drain.delay));
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
            ended = tasks.ended() => {
                let is_drained = ended.is_of_listener();
                if !matches!(ended, TaskError::Ended(_) if is_drained) {
                    error!(error = telemetry::chain(&ended), "failed during the drain");
                    failure.get_or_insert(ended);
                }
                if is_drained {
                    return failure;
                }
            }
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
    // Allows binding the port of a process that has just ended.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(MAX_BACKLOG)?.into_std()
}

/// Configures HTTP/1.1, which API servers use for webhooks, with a time-out for every request's head.
fn with_timeouts(server: Server<SocketAddr>) -> Server<SocketAddr> {
    let mut server = server.http1_only().first_request_timeout(HEAD_TIMEOUT);
    server
        .http_builder()
        .http1()
        .header_read_timeout(IDLE_TIMEOUT)
        .max_buf_size(MAX_READ_BUFFER_BYTES);
    server
}

/// Accepts connections up to a limit and closes further ones at once.
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

/// One connection's service, which holds the connection's permit.
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

/// Checks the database until a check or an admission's lookup succeeds. Never returns.
async fn wait_for_database(app: Arc<App>) {
    while !app.readiness.database_answered() {
        match app.database.check().await {
            Ok(()) => app.readiness.set_database_answered(),
            Err(refused @ LookupError::Refused(_)) => error!(error = %refused, "not ready"),
            Err(failed) => warn!(error = %failed, "not ready"),
        }
        sleep(DATABASE_CHECK_INTERVAL).await;
    }
    pending().await
}

/// Periodically closes old database connections and reloads the database URL. An unusable URL is logged once, and the
/// one in use stays. Never returns.
async fn maintain_connections(app: Arc<App>) {
    let mut is_failing = false;
    loop {
        sleep(RELOAD_INTERVAL).await;
        app.database.close_old().await;
        let reloaded = app.database.reload();
        match &reloaded {
            Ok(true) => info!("database URL reloaded"),
            Ok(false) => {}
            Err(_) if is_failing => {}
            Err(error) => error!(
                error = telemetry::chain(error),
                "the changed database URL cannot be used; the old one stays"
            ),
        }
        is_failing = reloaded.is_err();
    }
}

/// Periodically audits all running workspace pods. Never returns.
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
                    "some pods were not audited; the metrics keep the last complete audit's results"
                );
            }
            Err(error) => {
                app.metrics.audits.fail();
                error!(
                    error = telemetry::chain(&error),
                    audited = report.audited,
                    "the audit ended early; the metrics keep the last complete audit's results"
                );
            }
        }
        sleep(interval).await;
    }
}

/// The signals that stop the process.
struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
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
    async fn failed_task_drains_and_requests_in_flight_are_answered() {
        let listener = listen((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let (arrived, drained) = (Arc::new(Notify::new()), Arc::new(Notify::new()));
        let (on_arrival, until_drained) = (Arc::clone(&arrived), Arc::clone(&drained));
        let answer = async move || {
            on_arrival.notify_one();
            until_drained.notified().await;
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
            run_until_drained(
                &mut tasks,
                StopSignals::new().unwrap(),
                &handle,
                &readiness,
                drain
            ),
            async {
                while !readiness.is_draining() {
                    tokio::task::yield_now().await;
                }
                drained.notify_one();
            }
        );
        let failure = failure.map(|failure| telemetry::chain(&failure));
        assert_eq!(failure.unwrap(), "the task \"broken\" failed: on purpose");
        assert!(client.await.unwrap().ends_with("answered"));
    }
}
