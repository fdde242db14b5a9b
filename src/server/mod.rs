//! The server's life cycle: binds both ports, starts the tasks, serves and drains. The sockets are listener.rs's and closer.rs's, the
//! periodic work maintenance.rs's and certificate/'s, and the routes webhook.rs's and health.rs's.

pub mod certificate;
mod closer;
pub mod health;
mod listener;
pub mod maintenance;
pub mod readiness;
mod tasks;
pub mod webhook;

use std::future::{Future, pending};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum_server::Handle;
use axum_server::tls_rustls::{RustlsAcceptor, RustlsConfig};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::time::sleep;
use tracing::{error, info};

use crate::server::certificate::secret::SharedSecret;
use crate::server::certificate::tls::{
    self, Certificate, CertificateFiles, CertificatePem, LiveCertificate,
};
use crate::server::closer::Closer;
use crate::server::health::Health;
use crate::server::listener::{ConnectionLimit, HEAD_TIMEOUT, listen, with_timeouts};
use crate::server::maintenance::{maintain_connections, wait_for_database};
use crate::server::readiness::Readiness;
use crate::server::tasks::{TaskError, Tasks, WEBHOOK_LISTENER};
use crate::server::webhook::App;
use crate::telemetry;

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
        let closer = Closer::new(handle.clone());
        let webhook = with_timeouts(axum_server::from_tcp(self.webhook)?)
            .acceptor(closer.acceptor(acceptor))
            .handle(handle);
        let health = health_server(self.health, Arc::clone(&app))?;
        info!(webhook = %self.webhook_address, health = %self.health_address, "listening");

        let mut tasks = Tasks::default();
        let routes = webhook::routes(Arc::clone(&app)).into_make_service();
        tasks.spawn(WEBHOOK_LISTENER, closer.serve(webhook.serve(routes), drain.timeout));
        tasks.spawn("health listener", health);
        tasks.spawn_endless("database readiness", wait_for_database(Arc::clone(&app)));
        tasks
            .spawn_endless("database connections", maintain_connections(Arc::clone(&app.database)));
        tasks.spawn_endless("certificate", source.run(config, Arc::clone(&app)));

        let failure =
            run_until_drained(&mut tasks, stop, &closer, &app.readiness, drain.delay).await;
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
    closer: &Closer,
    readiness: &Readiness,
    delay: Duration,
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
    info!(?delay, "draining");
    drain_requests(tasks, stop, closer, delay, failure).await
}

/// Closes the listener after the delay, and waits until it has drained. A signal cuts that short, except the first one after a task's failure, which asks for no more than the drain.
async fn drain_requests(
    tasks: &mut Tasks,
    mut stop: StopSignals,
    closer: &Closer,
    delay: Duration,
    mut failure: Option<TaskError>,
) -> Option<TaskError> {
    let mut is_signalled = failure.is_none();
    let mut is_closing = false;
    let mut delay = pin!(sleep(delay));
    loop {
        tokio::select! {
            () = &mut delay, if !is_closing => {
                is_closing = true;
                closer.close();
            }
            () = stop.received() => {
                if is_signalled {
                    closer.abort();
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

/// Binds an address, and serves health and metrics on it.
///
/// # Errors
/// An IO error that names the address.
pub fn serve_health<H: Health>(
    address: SocketAddr,
    health: Arc<H>,
) -> io::Result<impl Future<Output = io::Result<()>>> {
    let (address, listener) = bind(address)?;
    let server = health_server(listener, health)?;
    info!(health = %address, "listening");
    Ok(server)
}

fn health_server<H: Health>(
    listener: TcpListener,
    health: Arc<H>,
) -> io::Result<impl Future<Output = io::Result<()>>> {
    let server = with_timeouts(axum_server::from_tcp(listener)?).acceptor(ConnectionLimit::new());
    Ok(server.serve(health::routes(health).into_make_service()))
}

fn bind(address: SocketAddr) -> io::Result<(SocketAddr, TcpListener)> {
    let listener = listen(address).map_err(|error| {
        io::Error::new(
            error.kind(),
            format!("cannot listen on {address}: {error} (see --listen and --health-listen)"),
        )
    })?;
    Ok((listener.local_addr()?, listener))
}

/// The signals that stop the process.
pub(crate) struct StopSignals {
    terminate: Signal,
    interrupt: Signal,
}

impl StopSignals {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    pub(crate) async fn received(&mut self) {
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
        let closer = Closer::new(handle);
        let mut tasks = Tasks::default();
        let routes = Router::new().route("/", get(answer)).into_make_service();
        let serve = closer.serve(server.serve(routes), Duration::from_secs(30));
        tasks.spawn(WEBHOOK_LISTENER, serve);
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
        let (failure, ()) = tokio::join!(
            run_until_drained(
                &mut tasks,
                StopSignals::new().unwrap(),
                &closer,
                &readiness,
                Duration::ZERO
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
