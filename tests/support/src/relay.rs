//! A TCP port of loopback that leads to a database: it counts what is asked, and can be made to swallow everything.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

/// The port, and what is known of those who use it.
pub struct Relay {
    pub port: u16,
    state: Arc<State>,
}

#[derive(Default)]
struct State {
    silent: AtomicBool,
    asked: AtomicUsize,
}

impl Relay {
    /// Starts it before a database's port.
    pub fn to(database: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let state = Arc::<State>::default();
        let shared = Arc::clone(&state);
        // Threads end with their connections, the first one with the process.
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                let server = TcpStream::connect(("127.0.0.1", database)).unwrap();
                let (from_client, to_client) = (client.try_clone().unwrap(), client);
                let (from_server, to_server) = (server.try_clone().unwrap(), server);
                let state = Arc::clone(&shared);
                std::thread::spawn(move || {
                    let count = || {
                        state.asked.fetch_add(1, Ordering::Relaxed);
                    };
                    pass(from_client, &to_server, &state.silent, count);
                    let _ = to_server.shutdown(Shutdown::Both);
                });
                let state = Arc::clone(&shared);
                std::thread::spawn(move || {
                    pass(from_server, &to_client, &state.silent, || ());
                    let _ = to_client.shutdown(Shutdown::Both);
                });
            }
        });
        Self { port, state }
    }

    /// From now on nothing is passed on, or all is.
    pub fn swallow(&self, silent: bool) {
        self.state.silent.store(silent, Ordering::Relaxed);
    }

    /// How often clients have sent something: once for each answer that they wait for.
    pub fn asked(&self) -> usize {
        self.state.asked.load(Ordering::Relaxed)
    }
}

/// Passes on what comes, until either side closes. What comes in silence is lost, and so is its connection.
fn pass(mut from: impl Read, mut to: impl Write, silent: &AtomicBool, count: impl Fn()) {
    let mut buffer = [0; 4096];
    let mut broken = false;
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        count();
        broken |= silent.load(Ordering::Relaxed);
        if !broken && to.write_all(&buffer[..length]).is_err() {
            return;
        }
    }
}
