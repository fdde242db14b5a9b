//! A real HAProxy in front of several webhooks: like a Service, it forwards connections to those that are ready.

use std::fs;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};

use tempfile::TempDir;

use super::postgres::free_port;
use super::program::{Authority, Start, Webhook, wait_for};

/// A running HAProxy.
pub struct Haproxy {
    child: Child,
    /// The port on loopback.
    pub port: u16,
    _folder: TempDir,
}

/// The webhook port and the health port of one server behind HAProxy.
#[derive(Clone, Copy)]
pub struct Slot(u16, u16);

impl Slot {
    /// Returns two free ports.
    pub fn free() -> Self {
        Self(free_port(), free_port())
    }

    /// Starts a webhook on these ports.
    pub fn start(self, authority: &Authority, policy: &str, database_url: &str) -> Webhook {
        let Self(webhook, health) = self;
        let (webhook, health) = (format!("127.0.0.1:{webhook}"), format!("127.0.0.1:{health}"));
        let start = Start {
            policy,
            database_url,
            // Longer than HAProxy takes to detect that readiness is off.
            arguments: &[
                "--listen",
                &webhook,
                "--health-listen",
                &health,
                "--drain-delay",
                "1s",
            ],
            authority: Some(authority),
            ..Start::default()
        };
        start.start()
    }
}

impl Haproxy {
    /// Starts HAProxy in front of these slots.
    pub fn start(slots: &[Slot]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port();
        let mut settings = format!(
            "defaults
    mode tcp
    timeout connect 2s
    timeout client 60s
    timeout server 60s
    option redispatch
listen webhook
    bind 127.0.0.1:{port}
    option httpchk GET /readyz
    default-server check inter 100ms fall 1 rise 1
"
        );
        for (index, Slot(webhook, health)) in slots.iter().enumerate() {
            settings += &format!("    server s{index} 127.0.0.1:{webhook} port {health}\n");
        }
        let file = folder.path().join("haproxy.cfg");
        fs::write(&file, settings).unwrap();
        let child = Command::new("haproxy")
            .args(["-db", "-q", "-f"])
            .arg(file)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("HAProxy listens", || TcpStream::connect(("127.0.0.1", port)).ok());
        Self {
            child,
            port,
            _folder: folder,
        }
    }
}

impl Drop for Haproxy {
    fn drop(&mut self) {
        // Both fail only if the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
