//! The real program as a child process, and a TLS client for it. The process is killed when the test ends.

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Output, Stdio};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use super::load::LoadClient;
use super::process::memory_of;
use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, DnType, IsCa, KeyPair};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned};
use serde_json::Value;
use tempfile::TempDir;
use ureq::config::ConfigBuilder;
use ureq::tls::{Certificate, ClientCert, PrivateKey, RootCerts, TlsConfig};
use ureq::typestate::AgentScope;
use ureq::{Agent, Body, http};

/// The limit for everything that a test waits for.
pub const TIMEOUT: Duration = Duration::from_secs(30);

/// Returns the path of the program under test: the one built with the tests, unless `PROGRAM_UNDER_TEST` names another,
/// such as an optimised one.
pub fn program_path() -> PathBuf {
    let set = |name| std::env::var_os(name).map(PathBuf::from);
    set("PROGRAM_UNDER_TEST")
        .or_else(|| set("CARGO_BIN_EXE_llm-billing-webhook"))
        .expect("cargo sets CARGO_BIN_EXE_llm-billing-webhook")
}

/// Returns a command that runs the program with these arguments and no settings from the environment.
pub fn program(arguments: &[&str]) -> Command {
    let mut command = Command::new(program_path());
    for (name, _) in std::env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("LLM_BILLING_") || name_text.starts_with("OTEL_") {
            command.env_remove(name);
        }
    }
    command.env_remove("RUST_LOG").args(arguments);
    command
}

/// Runs the program to its end and returns exit code, stdout and stderr.
pub fn run(arguments: &[&str]) -> (i32, String, String) {
    decode_output(&program(arguments).stdin(Stdio::null()).output().unwrap())
}

/// Returns exit code, stdout and stderr.
pub fn decode_output(output: &Output) -> (i32, String, String) {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    (output.status.code().unwrap(), text(&output.stdout), text(&output.stderr))
}

/// A certificate authority for one test.
#[derive(Clone)]
pub struct Authority(Arc<CertifiedIssuer<'static, KeyPair>>);

impl Authority {
    pub fn generate() -> Self {
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        // OpenSSL takes a certificate whose subject is its issuer for a self-signed one.
        params
            .distinguished_name
            .push(DnType::CommonName, "test authority");
        let issuer = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap());
        Self(Arc::new(issuer.unwrap()))
    }

    pub fn pem(&self) -> String {
        self.0.pem()
    }

    /// Returns a certificate and key for `name`, in PEM.
    pub fn issue(&self, name: &str) -> (String, String) {
        self.issue_for(name, 24 * 60 * 60 * 365)
    }

    /// Returns a certificate and key that expire this many seconds from now.
    pub fn issue_for(&self, name: &str, seconds: i64) -> (String, String) {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new([name.to_owned()]).unwrap();
        let now = std::time::SystemTime::now()
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap();
        let now = i64::try_from(now.as_secs()).unwrap();
        params.not_after = time::OffsetDateTime::from_unix_timestamp(now + seconds).unwrap();
        (params.signed_by(&key, &*self.0).unwrap().pem(), key.serialize_pem())
    }

    /// Returns a client that trusts this authority alone.
    pub fn client(&self) -> Agent {
        self.client_with(None)
    }

    /// Returns such a client with a client certificate and key.
    pub fn client_with(&self, own: Option<&(String, String)>) -> Agent {
        self.config(own).build().into()
    }

    /// Returns such a client that opens a new connection for each request.
    pub fn client_without_keep_alive(&self) -> Agent {
        self.config(None).max_idle_connections(0).build().into()
    }

    fn config(&self, own: Option<&(String, String)>) -> ConfigBuilder<AgentScope> {
        let root = Certificate::from_pem(self.pem().as_bytes()).unwrap();
        let own = own.map(|(certificate, key)| {
            let certificate = Certificate::from_pem(certificate.as_bytes()).unwrap();
            ClientCert::new_with_certs(
                &[certificate],
                PrivateKey::from_pem(key.as_bytes()).unwrap(),
            )
        });
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let tls = TlsConfig::builder()
            .root_certs(RootCerts::from(vec![root]))
            .client_cert(own)
            .unversioned_rustls_crypto_provider(provider)
            .build();
        Agent::config_builder()
            .tls_config(tls)
            .http_status_as_error(false)
            .timeout_global(Some(TIMEOUT))
    }
}

/// A running program, killed on drop.
pub struct Running {
    child: Child,
    log: Arc<Mutex<String>>,
    /// Reads stderr into `log` until stderr closes.
    log_reader: Option<JoinHandle<()>>,
}

impl Running {
    /// Starts a program whose log is kept.
    pub fn start(command: &mut Command) -> Self {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Mutex::new(String::new()));
        let mut lines = BufReader::new(child.stderr.take().unwrap());
        let shared = Arc::clone(&log);
        let log_reader = std::thread::spawn(move || {
            let mut line = Vec::new();
            while lines.read_until(b'\n', &mut line).unwrap_or(0) > 0 {
                shared
                    .lock()
                    .unwrap()
                    .push_str(&String::from_utf8_lossy(&line));
                line.clear();
            }
        });
        Self {
            child,
            log,
            log_reader: Some(log_reader),
        }
    }

    /// Waits for the line with the addresses that the program listens on.
    pub fn wait_until_listening(&mut self) -> Value {
        wait_for("the program listens", || {
            let log = self.log.lock().unwrap();
            assert!(self.child.try_wait().unwrap().is_none(), "ended during start:\n{log}");
            let line = log.lines().find(|line| line.contains("\"listening\""))?;
            serde_json::from_str::<Value>(line).ok()
        })
    }

    /// Returns everything logged so far.
    pub fn log(&self) -> String {
        self.log.lock().unwrap().clone()
    }

    /// Waits for a log line with this text, and returns the line.
    pub fn wait_for_log(&self, text: &str) -> String {
        wait_for(text, || {
            self.log()
                .lines()
                .find(|line| line.contains(text))
                .map(str::to_owned)
        })
    }

    /// Returns the process id.
    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Sends a signal, such as `TERM`.
    pub fn signal(&self, signal: &str) {
        let pid = self.id().to_string();
        assert!(
            Command::new("kill")
                .args(["-s", signal, &pid])
                .status()
                .unwrap()
                .success()
        );
    }

    /// Waits for the program's exit and for the rest of its log.
    pub fn wait(&mut self) -> ExitStatus {
        let status = wait_for("the program ends", || self.child.try_wait().unwrap());
        if let Some(log_reader) = self.log_reader.take() {
            log_reader.join().unwrap();
        }
        status
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail only if the process has ended already.
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("log of the program:\n{}", self.log());
        }
    }
}

/// Returns the answer of a health endpoint: its status and text.
pub fn health(address: SocketAddr, path: &str) -> (u16, String) {
    let mut response = super::api_server::agent(None)
        .get(format!("http://{address}{path}"))
        .call()
        .unwrap();
    (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
}

/// A running `serve`.
pub struct Webhook {
    running: Running,
    /// The webhook's address.
    pub address: SocketAddr,
    /// The address of health and metrics.
    pub health: SocketAddr,
    /// The authority that issued its certificate.
    pub authority: Authority,
    /// A client that trusts that authority.
    pub client: Agent,
    /// The folder of policy, certificate and key.
    pub folder: TempDir,
}

/// The settings that a webhook is started with.
#[derive(Default)]
pub struct Start<'a> {
    pub policy: &'a str,
    /// Empty if `arguments` has it.
    pub database_url: &'a str,
    pub arguments: &'a [&'a str],
    /// The value of `RUST_LOG`; empty for `info`.
    pub log: &'a str,
    /// Issues the certificate; if absent, a new authority does.
    pub authority: Option<&'a Authority>,
    /// The program manages its own certificate, as `arguments` says.
    pub manages_certificate: bool,
    pub environment: &'a [(&'a str, &'a str)],
}

impl Start<'_> {
    /// Starts the program and waits until it listens.
    pub fn start(&self) -> Webhook {
        let authority = self.authority.cloned().unwrap_or_else(Authority::generate);
        let folder = tempfile::tempdir().unwrap();
        let (certificate, key) = authority.issue("localhost");
        fs::write(folder.path().join("tls.crt"), certificate).unwrap();
        fs::write(folder.path().join("tls.key"), key).unwrap();
        let mut running = Running::start(&mut self.command(folder.path()));
        let listening = running.wait_until_listening();
        let address = |field: &str| listening[field].as_str().unwrap().parse().unwrap();
        let (address, health) = (address("webhook"), address("health"));
        let client = authority.client();
        Webhook {
            running,
            address,
            health,
            authority,
            client,
            folder,
        }
    }

    /// Returns the command that starts the program with the files in `folder`.
    pub fn command(&self, folder: &Path) -> Command {
        fs::write(folder.join("policy.yaml"), self.policy).unwrap();
        let path = |name: &str| folder.join(name).to_str().unwrap().to_owned();
        let any_port: &[&str] = if self.arguments.contains(&"--listen") {
            &[]
        } else {
            &["--listen", "127.0.0.1:0", "--health-listen", "127.0.0.1:0"]
        };
        let mut command = program(&["serve"]);
        command
            .args(any_port)
            .args(["--policy", &path("policy.yaml")])
            .args(if self.manages_certificate {
                vec![]
            } else {
                let (certificate, key) = (path("tls.crt"), path("tls.key"));
                ["--tls-cert", &certificate, "--tls-key", &key]
                    .map(str::to_owned)
                    .to_vec()
            })
            .args(if self.database_url.is_empty() {
                vec![]
            } else {
                vec!["--database-url", self.database_url]
            })
            .args(self.arguments)
            .envs(self.environment.iter().copied())
            .env("LLM_BILLING_DRAIN_DELAY", "0s")
            .env(
                "RUST_LOG",
                if self.log.is_empty() {
                    "info"
                } else {
                    self.log
                },
            )
            .stdin(Stdio::null())
            .stdout(Stdio::null());
        command
    }
}

impl Webhook {
    /// Posts a review to `/mutate` and returns the answer.
    pub fn mutate(&self, review: &Value) -> Value {
        self.review("/mutate?timeout=10s", review)
    }

    /// Posts a review to `/validate` and returns the answer.
    pub fn validate(&self, review: &Value) -> Value {
        self.review("/validate?timeout=10s", review)
    }

    fn review(&self, path: &str, review: &Value) -> Value {
        let mut response = self.post(path, "application/json", review.to_string().as_bytes());
        let text = response.body_mut().read_to_string().unwrap();
        assert_eq!(response.status(), 200, "{text}");
        assert_eq!(response.headers()["content-type"], "application/json");
        serde_json::from_str(&text).unwrap()
    }

    /// Returns a client that sends admissions of a byok workspace's pod.
    pub fn load_client(&self, on_error: &'static str) -> LoadClient {
        LoadClient {
            client: self.client.clone(),
            port: self.address.port(),
            on_error,
        }
    }

    /// Posts a body and returns the response.
    pub fn post(&self, path: &str, content_type: &str, body: &[u8]) -> http::Response<Body> {
        let url = format!("https://localhost:{}{path}", self.address.port());
        self.client
            .post(&url)
            .header("content-type", content_type)
            .send(body)
            .unwrap()
    }

    /// Opens a TLS connection without an HTTP client, for sending arbitrary bytes.
    pub fn connect(&self) -> StreamOwned<ClientConnection, TcpStream> {
        self.connect_trusting(&self.authority.pem())
    }

    /// Opens a TLS connection that trusts these authorities alone.
    fn connect_trusting(&self, authorities: &str) -> StreamOwned<ClientConnection, TcpStream> {
        let mut roots = RootCertStore::empty();
        for authority in CertificateDer::pem_slice_iter(authorities.as_bytes()) {
            roots.add(authority.unwrap()).unwrap();
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(roots)
            .with_no_client_auth();
        let name = ServerName::try_from("localhost").unwrap();
        let tls = ClientConnection::new(Arc::new(config), name).unwrap();
        let tcp = TcpStream::connect(self.address).unwrap();
        tcp.set_read_timeout(Some(TIMEOUT)).unwrap();
        StreamOwned::new(tls, tcp)
    }

    /// Reports whether a client that trusts these authorities alone accepts the served certificate.
    pub fn is_trusted_by(&self, authorities: &str) -> bool {
        let mut connection = self.connect_trusting(authorities);
        connection.conn.complete_io(&mut connection.sock).is_ok()
    }

    /// Returns the program's resident memory in KiB.
    pub fn memory(&self) -> u64 {
        memory_of(self.running.child.id(), "VmRSS")
    }

    /// Returns the most memory that the program has had, in KiB.
    pub fn peak_memory(&self) -> u64 {
        memory_of(self.running.child.id(), "VmHWM")
    }

    /// Returns status and text of a page of the health port.
    pub fn health(&self, path: &str) -> (u16, String) {
        let mut response = self
            .client
            .get(format!("http://{}{path}", self.health))
            .call()
            .unwrap();
        (response.status().as_u16(), response.body_mut().read_to_string().unwrap())
    }

    /// Returns everything logged so far.
    pub fn log(&self) -> String {
        self.running.log()
    }

    /// See [`Running::wait_for_log`].
    pub fn wait_for_log(&self, text: &str) -> String {
        self.running.wait_for_log(text)
    }

    /// Stops reading the log until the guard is dropped.
    pub fn stop_reading_log(&self) -> MutexGuard<'_, String> {
        self.running.log.lock().unwrap()
    }

    /// Waits until `/readyz` returns 200.
    pub fn wait_until_ready(&self) {
        wait_for("the webhook is ready", || (self.health("/readyz").0 == 200).then_some(()));
    }

    /// Sends a signal, such as `TERM`.
    pub fn signal(&self, signal: &str) {
        self.running.signal(signal);
    }

    /// See [`Running::wait`].
    pub fn wait(&mut self) -> ExitStatus {
        self.running.wait()
    }

    /// Stops the program and returns its whole log.
    pub fn stop_and_read_log(mut self) -> String {
        self.signal("TERM");
        self.wait();
        self.log()
    }
}

/// Calls `poll` until it returns a value, and returns that.
pub fn wait_for<T>(what: &str, mut poll: impl FnMut() -> Option<T>) -> T {
    let started = Instant::now();
    loop {
        if let Some(value) = poll() {
            return value;
        }
        assert!(started.elapsed() < TIMEOUT, "timed out waiting until {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Reads until the peer closes or resets the connection.
pub fn read_to_end(mut reader: impl Read) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = reader.read_to_end(&mut bytes);
    bytes
}
