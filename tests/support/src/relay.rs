//! A TCP relay on loopback in front of a database: it counts requests, and can drop all traffic.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// A running relay.
pub struct Relay {
    pub port: u16,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    is_dropping: AtomicBool,
    requests: AtomicUsize,
}

impl Relay {
    /// Starts a relay to a database's port.
    pub fn to(database: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::<State>::default();
        let shared = Arc::clone(&state);
        // Each thread ends with its connection; the first ends with the process.
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let server = TcpStream::connect(("127.0.0.1", database)).unwrap();
                let (from_client, to_client) = (client.try_clone().unwrap(), client);
                let (from_server, to_server) = (server.try_clone().unwrap(), server);
                let state = Arc::clone(&shared);
                std::thread::spawn(move || {
                    let count = || {
                        state.requests.fetch_add(1, Ordering::Relaxed);
                    };
                    forward(from_client, &to_server, &state.is_dropping, count);
                    let _ = to_server.shutdown(Shutdown::Both);
                });
                let state = Arc::clone(&shared);
                std::thread::spawn(move || {
                    forward(from_server, &to_client, &state.is_dropping, || ());
                    let _ = to_client.shutdown(Shutdown::Both);
                });
            }
        });
        Self { port, state }
    }

    /// Starts or stops dropping all traffic.
    pub fn drop_traffic(&self, is_dropping: bool) {
        self.state.is_dropping.store(is_dropping, Ordering::Relaxed);
    }

    /// Returns how often clients have sent data: once for each answer that they wait for.
    pub fn request_count(&self) -> usize {
        self.state.requests.load(Ordering::Relaxed)
    }
}

/// Forwards data until either side closes. A connection whose data was dropped stays broken.
fn forward(mut from: impl Read, mut to: impl Write, is_dropping: &AtomicBool, count: impl Fn()) {
    let mut buffer = [0; 4096];
    let mut broken = false;
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        count();
        broken |= is_dropping.load(Ordering::Relaxed);
        if !broken && to.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}
