//! A listener: its socket, its time-outs and its limit on connections. How it closes is in closer.rs; the routes are in
//! webhook.rs and health.rs.

use std::future::{Ready, ready};
use std::io;
use std::net::{SocketAddr, TcpListener};
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use axum_server::Server;
use axum_server::accept::Accept;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tower_service::Service;

/// Limit on the time for a TLS handshake, and then for the head of a connection's first request.
pub(super) const HEAD_TIMEOUT: Duration = Duration::from_secs(10);
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

pub(super) fn listen(address: SocketAddr) -> io::Result<TcpListener> {
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
pub(super) fn with_timeouts(server: Server<SocketAddr>) -> Server<SocketAddr> {
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
pub(super) struct ConnectionLimit(Arc<Semaphore>);

impl ConnectionLimit {
    pub(super) fn new() -> Self {
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
pub(super) struct Permitted<S> {
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
