//! The network that the programs see: a network namespace in which every name resolves to one recorder, which answers
//! for the rest of the world and forwards the proxy's host to LiteLLM.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::unix::fs::MetadataExt;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::{env, fs};

use axum::Router;
use axum::body::{Body, Bytes};
use axum::extract::State;
use axum::http::{HeaderMap, Method, Response, Uri};
use axum_server::tls_rustls::RustlsConfig;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use serde_json::json;
use tempfile::TempDir;
use tokio::runtime::Runtime;

use test_support::program::{Authority, program_path, wait_for};
use test_support::repository;

use crate::programs::installed;

/// The metered proxy's host.
pub(crate) const METER: &str = "llm.example.com";
/// The token that the proxy accepts.
pub(crate) const USAGE_TOKEN: &str = "sk-usage-token";
/// Starts each credential of a pod's author.
pub(crate) const OWN: &str = "own-";
/// OpenCode's credential for the free models of its own vendor.
const PUBLIC: &str = "Bearer public";
const LITELLM: u16 = 4000;

/// Runs a test again in a network namespace of its own, with its own resolver, and the body there.
pub(crate) fn in_namespace(test: &str, body: impl FnOnce()) {
    const INSIDE: &str = "AGENTS_INSIDE";
    const ENTER: &str = r#"mount --bind "$0" /etc/resolv.conf && ip link set lo up && exec "$@""#;
    if env::var_os(INSIDE).is_some() {
        return body();
    }
    let folder = tempfile::tempdir().unwrap();
    let resolver = folder.path().join("resolv.conf");
    fs::write(&resolver, "nameserver 127.0.0.1\n").unwrap();
    let is_root = fs::metadata("/proc/self").unwrap().uid() == 0;
    let user: &[&str] = if is_root {
        &[]
    } else {
        &["--user", "--map-root-user"]
    };
    let status = Command::new("unshare")
        .args(user)
        .args([
            "--net",
            "--mount",
            "--fork",
            "--kill-child",
            "--",
            "sh",
            "-c",
            ENTER,
        ])
        .arg(&resolver)
        .arg(env::current_exe().unwrap())
        .args(["--exact", test, "--nocapture"])
        .env(INSIDE, "yes")
        // A shell drops the variable by which cargo names the program.
        .env("PROGRAM_UNDER_TEST", program_path())
        .status()
        .unwrap();
    assert!(status.success(), "{test} failed, or this user may not make a namespace");
}

/// A request that left a program.
#[derive(Clone, Debug)]
pub(crate) struct Call {
    pub(crate) host: String,
    /// The header values and the part of the URI that hold a credential.
    pub(crate) credentials: Vec<String>,
    pub(crate) status: u16,
}

/// The recorder and the proxy behind it.
pub(crate) struct World {
    calls: Arc<Mutex<Vec<Call>>>,
    litellm: Child,
    folder: TempDir,
    _runtime: Runtime,
}

impl World {
    pub(crate) fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = Authority::generate();
        fs::write(folder.path().join("ca.pem"), authority.pem()).unwrap();
        let calls = Arc::<Mutex<Vec<Call>>>::default();
        let resolver = UdpSocket::bind((Ipv4Addr::LOCALHOST, 53)).unwrap();
        std::thread::spawn(move || resolve(&resolver));
        let runtime = Runtime::new().unwrap();
        let app = Router::new()
            .fallback(record)
            .with_state(Arc::clone(&calls));
        for (port, is_tls) in [(443, true), (80, false)] {
            let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
            let service = app.clone().into_make_service();
            if is_tls {
                let config = RustlsConfig::from_config(Arc::new(tls(authority.clone())));
                runtime.spawn(axum_server::bind_rustls(address, config).serve(service));
            } else {
                runtime.spawn(axum_server::bind(address).serve(service));
            }
        }
        let litellm = start_litellm();
        let ready = format!("http://127.0.0.1:{LITELLM}/health/liveliness");
        wait_for("LiteLLM answers", || ureq::get(&ready).call().ok());
        Self {
            calls,
            litellm,
            folder,
            _runtime: runtime,
        }
    }

    /// Returns the file of the authority that signs every host's certificate.
    pub(crate) fn authority(&self) -> String {
        self.folder
            .path()
            .join("ca.pem")
            .to_str()
            .unwrap()
            .to_owned()
    }

    /// Returns the calls since the last time.
    pub(crate) fn take_calls(&self) -> Vec<Call> {
        std::mem::take(&mut self.calls.lock().unwrap())
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Only a child that has ended already cannot be killed.
        let _ = self.litellm.kill();
        let _ = self.litellm.wait();
    }
}

fn start_litellm() -> Child {
    let (folder, config) = (installed("litellm"), repository().join("tests/agents/litellm"));
    Command::new("python3")
        .arg(folder.join("bin/litellm"))
        .args([
            "--host",
            "127.0.0.1",
            "--port",
            &LITELLM.to_string(),
            "--telemetry",
            "False",
        ])
        .arg("--config")
        .arg(config.join("config.yaml"))
        .env("PYTHONPATH", env::join_paths([&folder, &config]).unwrap())
        .env("PYTHONDONTWRITEBYTECODE", "1")
        .envs([
            ("LITELLM_LOCAL_MODEL_COST_MAP", "True"),
            ("LITELLM_TELEMETRY", "False"),
        ])
        .envs([
            ("DISABLE_ADMIN_UI", "True"),
            ("NO_DOCS", "True"),
            ("LITELLM_LOG", "ERROR"),
        ])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("python3 is not installed; scripts/check installs it")
}

/// Answers each question for an IPv4 address with loopback, and each other question with nothing.
fn resolve(socket: &UdpSocket) {
    const HEADER: usize = 12;
    const TYPE_A: [u8; 2] = [0, 1];
    let mut buffer = [0; 512];
    while let Ok((length, client)) = socket.recv_from(&mut buffer) {
        let query = &buffer[..length];
        let name = query[HEADER..].iter().position(|byte| *byte == 0).unwrap();
        let question_end = HEADER + name + 5;
        let is_address = query[question_end - 4..question_end - 2] == TYPE_A;
        let mut answer = query[..question_end].to_vec();
        // A response without error; one question, perhaps one answer, and nothing else.
        answer[2..HEADER].copy_from_slice(&[0x81, 0x80, 0, 1, 0, u8::from(is_address), 0, 0, 0, 0]);
        if is_address {
            // The question's name, type A, class IN, one minute, four bytes.
            answer.extend([0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4, 127, 0, 0, 1]);
        }
        socket.send_to(&answer, client).unwrap();
    }
}

/// Issues a certificate for each host that a program asks for.
#[derive(Debug)]
struct Issuer(IssuingAuthority, Mutex<BTreeMap<String, Arc<CertifiedKey>>>);

struct IssuingAuthority(Authority);

impl std::fmt::Debug for IssuingAuthority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authority")
    }
}

impl ResolvesServerCert for Issuer {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let host = hello.server_name()?.to_owned();
        let mut issued = self.1.lock().unwrap();
        let certified = issued.entry(host.clone()).or_insert_with(|| {
            let (certificate, key) = (self.0).0.issue(&host);
            let certificate = CertificateDer::from_pem_slice(certificate.as_bytes()).unwrap();
            let key = PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap();
            let key = rustls::crypto::ring::sign::any_supported_type(&key).unwrap();
            Arc::new(CertifiedKey::new(vec![certificate], key))
        });
        Some(Arc::clone(certified))
    }
}

fn tls(authority: Authority) -> ServerConfig {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_cert_resolver(Arc::new(Issuer(IssuingAuthority(authority), Mutex::default())))
}

async fn record(
    State(calls): State<Arc<Mutex<Vec<Call>>>>,
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    body: Bytes,
) -> Response<Body> {
    let host = headers
        .get("host")
        .and_then(|host| host.to_str().ok())
        .or(uri.host());
    let host = host
        .unwrap_or_default()
        .split(':')
        .next()
        .unwrap_or_default()
        .to_owned();
    let path = uri
        .path_and_query()
        .map_or("/", |path| path.as_str())
        .to_owned();
    let values = headers.values().filter_map(|value| value.to_str().ok());
    let is_credential = |text: &&str| {
        [USAGE_TOKEN, OWN, PUBLIC]
            .iter()
            .any(|credential| text.contains(credential))
    };
    let credentials = values.chain([path.as_str()]).filter(is_credential);
    let credentials = credentials.map(str::to_owned).collect();
    let response = if host == METER {
        tokio::task::spawn_blocking(move || forward(&method, &path, &headers, &body))
            .await
            .unwrap()
    } else {
        let error = json!({"error": {"type": "authentication_error", "message": "invalid key", "code": 401}});
        Response::builder()
            .status(401)
            .header("content-type", "application/json")
            .body(error.to_string().into())
            .unwrap()
    };
    let status = response.status().as_u16();
    calls.lock().unwrap().push(Call {
        host,
        credentials,
        status,
    });
    response
}

/// Forwards a call to LiteLLM, which has Anthropic's API at another path than the platform's proxy.
fn forward(method: &Method, path: &str, headers: &HeaderMap, body: &[u8]) -> Response<Body> {
    let path = path.strip_prefix("/anthropic").unwrap_or(path);
    let client = ureq::Agent::new_with_config(
        ureq::Agent::config_builder()
            .http_status_as_error(false)
            .build(),
    );
    let url = format!("http://127.0.0.1:{LITELLM}{path}");
    let mut request = ureq::http::Request::builder()
        .method(method.as_str())
        .uri(url);
    for (name, value) in headers {
        if ![
            "host",
            "content-length",
            "connection",
            "accept-encoding",
            "transfer-encoding",
        ]
        .contains(&name.as_str())
        {
            request = request.header(name.as_str(), value.as_bytes());
        }
    }
    let mut answer = client.run(request.body(body).unwrap()).unwrap();
    let content_type = answer.headers().get("content-type").cloned();
    let text = answer.body_mut().read_to_vec().unwrap();
    let mut response = Response::builder().status(answer.status().as_u16());
    if let Some(content_type) = content_type {
        response = response.header("content-type", content_type.as_bytes());
    }
    response.body(text.into()).unwrap()
}
