//! Closes a listener and its TLS connections without cutting a request. When to close is decided in mod.rs.

use std::future::Future;
use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use axum_server::Handle;
use axum_server::accept::Accept;
use socket2::SockRef;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::sync::watch;
use tokio::time::{sleep, timeout};
use tokio_rustls::server::TlsStream;

/// Time until a listener closes, and then between checks whether all of its connections have ended.
const DRAIN_POLL_INTERVAL: Duration = Duration::from_millis(10);

/// Closes a listener and its connections without cutting a request.
///
/// The library's own graceful shutdown drops connections in their TLS handshake, and closes an idle connection without
/// reading it once more: a request that has just arrived there would get no response.
pub(super) struct Closer {
    handle: Handle<SocketAddr>,
    is_closing: watch::Sender<bool>,
}

impl Closer {
    /// Returns a closer for the server with this handle.
    pub(super) fn new(handle: Handle<SocketAddr>) -> Self {
        Self {
            handle,
            is_closing: watch::Sender::new(false),
        }
    }

    /// Returns an acceptor whose connections end between two requests after [`Closer::close`].
    pub(super) fn acceptor<A>(&self, tls: A) -> ClosingAcceptor<A> {
        ClosingAcceptor {
            tls,
            is_closing: self.is_closing.subscribe(),
        }
    }

    /// Serves until the listener has closed and its connections have ended. Those that are left after the time-out are
    /// cut.
    pub(super) fn serve<F: Future<Output = io::Result<()>>>(
        &self,
        serve: F,
        drain_timeout: Duration,
    ) -> impl Future<Output = io::Result<()>> + use<F> {
        let (handle, mut is_closing) = (self.handle.clone(), self.is_closing.subscribe());
        async move {
            let closing = async {
                // An error says that the closer is gone, and the server with it.
                let _ = is_closing.wait_for(|is_closing| *is_closing).await;
                // A timer fires after the runtime has looked for new connections, so `serve` accepts those that wait.
                sleep(DRAIN_POLL_INTERVAL).await;
            };
            // Drops `serve`, and with it the listener. Its connections are tasks of their own.
            tokio::select! {
                biased;
                served = serve => return served,
                () = closing => {}
            }
            let ended = async {
                while handle.connection_count() > 0 {
                    sleep(DRAIN_POLL_INTERVAL).await;
                }
            };
            if timeout(drain_timeout, ended).await.is_err() {
                handle.shutdown();
            }
            Ok(())
        }
    }

    /// Closes the listener, and each connection as soon as it is idle.
    pub(super) fn close(&self) {
        self.is_closing.send_replace(true);
    }

    /// Closes the listener and cuts its connections.
    pub(super) fn abort(&self) {
        self.handle.shutdown();
        self.close();
    }
}

/// Accepts TLS connections that end as their [`Closer`] says.
#[derive(Clone)]
pub(super) struct ClosingAcceptor<A> {
    tls: A,
    is_closing: watch::Receiver<bool>,
}

impl<S, A> Accept<TcpStream, S> for ClosingAcceptor<A>
where
    A: Accept<TcpStream, S, Stream = TlsStream<TcpStream>>,
    A::Future: Send + 'static,
{
    type Stream = Connection;
    type Service = A::Service;
    type Future = Pin<Box<dyn Future<Output = io::Result<(Connection, A::Service)>> + Send>>;

    fn accept(&self, stream: TcpStream, service: S) -> Self::Future {
        let accepted = self.tls.accept(stream, service);
        let mut is_closing = self.is_closing.clone();
        Box::pin(async move {
            let (stream, service) = accepted.await?;
            let closing = Box::pin(async move {
                // An error says that the closer is gone, and the server with it.
                let _ = is_closing.wait_for(|is_closing| *is_closing).await;
            });
            let connection = Connection {
                stream,
                state: ConnectionState::Receiving,
                closing: Some(closing),
            };
            Ok((connection, service))
        })
    }
}

/// A TLS connection. Once its listener closes, its reader gets the end of the stream between two requests, if the client
/// has sent nothing more.
pub(super) struct Connection {
    stream: TlsStream<TcpStream>,
    state: ConnectionState,
    /// `None` after the listener has closed.
    closing: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum ConnectionState {
    /// Its first request is awaited, or a request is being received or handled.
    Receiving,
    /// A response is being written.
    Responding,
    /// A response has been written, and no byte of a further request has been read.
    Idle,
}

impl Connection {
    /// Reports whether the listener has closed. Otherwise wakes the task when it does.
    fn poll_closing(&mut self, context: &mut Context<'_>) -> bool {
        let is_open = self
            .closing
            .as_mut()
            .is_some_and(|closing| closing.as_mut().poll(context).is_pending());
        if !is_open {
            self.closing = None;
        }
        !is_open
    }

    /// Reports whether the kernel holds bytes of the client. The runtime may not know yet.
    fn has_unread_bytes(&self) -> bool {
        let peeked = SockRef::from(self.stream.get_ref().0).peek(&mut [MaybeUninit::uninit()]);
        !matches!(peeked, Err(error) if error.kind() == io::ErrorKind::WouldBlock)
    }
}

impl AsyncRead for Connection {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let filled = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        if buffer.filled().len() > filled {
            self.state = ConnectionState::Receiving;
        }
        let is_waiting = read.is_pending() && self.state == ConnectionState::Idle;
        if is_waiting && self.poll_closing(context) && !self.has_unread_bytes() {
            return Poll::Ready(Ok(()));
        }
        read
    }
}

impl AsyncWrite for Connection {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.state = ConnectionState::Responding;
        Pin::new(&mut self.stream).poll_write(context, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.state = ConnectionState::Responding;
        Pin::new(&mut self.stream).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        if flushed.is_ready() && self.state == ConnectionState::Responding {
            self.state = ConnectionState::Idle;
        }
        flushed
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;
    use std::io::Write as _;
    use std::sync::Arc;

    use rustls::pki_types::{PrivateKeyDer, ServerName};
    use rustls::{ClientConfig, RootCertStore, ServerConfig};
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
    use tokio::net::TcpListener;
    use tokio_rustls::{TlsAcceptor, TlsConnector, client};

    use super::*;

    /// Connects a client over TLS.
    async fn connect(
        closing: impl Future<Output = ()> + Send + 'static,
    ) -> (Connection, client::TlsStream<TcpStream>) {
        let key = rcgen::generate_simple_self_signed(["localhost".to_owned()]).unwrap();
        let certificate = key.cert.der().clone();
        let private_key = PrivateKeyDer::try_from(key.signing_key.serialize_der()).unwrap();
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.clone()], private_key)
            .unwrap();
        let mut roots = RootCertStore::empty();
        roots.add(certificate).unwrap();
        let client = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let tcp = TcpStream::connect(listener.local_addr().unwrap()).await;
        let name = ServerName::try_from("localhost").unwrap();
        let connector = TlsConnector::from(Arc::new(client));
        let acceptor = TlsAcceptor::from(Arc::new(server));
        let (accepted, _) = listener.accept().await.unwrap();
        let (stream, client) =
            tokio::join!(acceptor.accept(accepted), connector.connect(name, tcp.unwrap()));
        let connection = Connection {
            stream: stream.unwrap(),
            state: ConnectionState::Receiving,
            closing: Some(Box::pin(closing)),
        };
        (connection, client.unwrap())
    }

    /// Polls a read once, without giving the runtime time to look for new bytes.
    async fn poll_read(connection: &mut Connection) -> Poll<String> {
        poll_fn(|context| {
            let mut bytes = [0; 16];
            let mut buffer = ReadBuf::new(&mut bytes);
            let read = Pin::new(&mut *connection).poll_read(context, &mut buffer);
            let text = String::from_utf8_lossy(buffer.filled()).into_owned();
            Poll::Ready(read.map(|read| read.map(|()| text).unwrap()))
        })
        .await
    }

    #[tokio::test]
    async fn connection_ends_only_between_requests() {
        let (mut connection, mut client) = connect(std::future::ready(())).await;
        // The first request is awaited.
        assert_eq!(poll_read(&mut connection).await, Poll::Pending);
        client.write_all(b"request").await.unwrap();
        let mut bytes = [0; 7];
        connection.read_exact(&mut bytes).await.unwrap();
        // The request is handled, and its response written.
        assert_eq!(poll_read(&mut connection).await, Poll::Pending);
        connection.write_all(b"response").await.unwrap();
        assert_eq!(poll_read(&mut connection).await, Poll::Pending);
        connection.flush().await.unwrap();
        assert_eq!(poll_read(&mut connection).await, Poll::Ready(String::new()));
    }

    #[tokio::test]
    async fn request_that_the_runtime_has_not_seen_is_read() {
        let (mut connection, client) = connect(std::future::ready(())).await;
        connection.write_all(b"response").await.unwrap();
        connection.flush().await.unwrap();
        // The runtime learns of the request only when this task waits.
        let (tcp, mut tls) = client.into_inner();
        let mut tcp = tcp.into_std().unwrap();
        tls.writer().write_all(b"request").unwrap();
        while tls.wants_write() {
            tls.write_tls(&mut tcp).unwrap();
        }
        assert_eq!(poll_read(&mut connection).await, Poll::Pending);
        let mut bytes = [0; 7];
        connection.read_exact(&mut bytes).await.unwrap();
        assert_eq!(&bytes, b"request");
    }
}
