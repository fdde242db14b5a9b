//! The serving certificate: loads and validates it, and reloads it when the files' contents change. The contents are
//! compared, not watched: a kubelet updates a mounted Secret by replacing a symbolic link, which file events miss.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use axum_server::tls_rustls::RustlsConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use thiserror::Error;
use tracing::{error, info};

use crate::metrics::Metrics;
use crate::server::readiness::Readiness;
use crate::telemetry;

/// Pause between reads of the files of certificate and database URL: well below the minute that a kubelet takes to
/// update a mounted Secret.
pub(in crate::server) const RELOAD_INTERVAL: Duration = Duration::from_secs(2);

/// Paths of the certificate's files.
#[derive(Clone, Debug)]
pub struct CertificateFiles {
    /// PEM file with the server's own certificate first.
    pub certificate: PathBuf,
    /// PEM file with the private key.
    pub key: PathBuf,
    /// PEM file with the CA certificates for client authentication; without it, any client may connect.
    pub client_ca: Option<PathBuf>,
}

/// A certificate's PEM texts, not yet validated. No `Debug`: it holds the private key.
#[derive(Clone, PartialEq, Eq)]
pub struct CertificatePem {
    /// The server's own certificate first.
    pub certificate: Vec<u8>,
    /// The private key.
    pub key: Vec<u8>,
    /// The CA certificates for client authentication.
    pub client_ca: Option<Vec<u8>>,
}

/// A valid certificate with its TLS configuration.
#[derive(Clone, Debug)]
pub struct Certificate {
    config: Arc<ServerConfig>,
    /// When it expires, in seconds since the epoch.
    pub not_after: i64,
}

/// Why a certificate cannot be loaded.
#[derive(Debug, Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The certificate file has no certificate, or an invalid one.
    #[error("the certificate file holds no readable PEM certificate")]
    Certificate,
    /// The key file has no key.
    #[error("the key file holds no readable PEM private key")]
    Key,
    /// The client CA certificates cannot be used.
    #[error("the client CA file holds no readable PEM certificate")]
    ClientCa,
    /// Certificate and key do not match, or TLS does not support them.
    #[error("certificate and key cannot be used together")]
    Pair(#[source] rustls::Error),
}

impl CertificateFiles {
    /// Reads the files.
    ///
    /// # Errors
    /// [`TlsError::Read`]
    pub fn read(&self) -> Result<CertificatePem, TlsError> {
        Ok(CertificatePem {
            certificate: read(&self.certificate)?,
            key: read(&self.key)?,
            client_ca: self.client_ca.as_deref().map(read).transpose()?,
        })
    }
}

impl Certificate {
    /// Validates a certificate and its key. An expired certificate is accepted.
    ///
    /// # Errors
    /// [`TlsError`]
    pub fn from_pem(pem: &CertificatePem) -> Result<Self, TlsError> {
        let certificates = |pem| CertificateDer::pem_slice_iter(pem).collect::<Result<Vec<_>, _>>();
        let chain = certificates(&pem.certificate).map_err(|_| TlsError::Certificate)?;
        let leaf = chain.first().ok_or(TlsError::Certificate)?;
        let (_, parsed) =
            x509_parser::parse_x509_certificate(leaf).map_err(|_| TlsError::Certificate)?;
        let not_after = parsed.validity().not_after.timestamp();
        let key = PrivateKeyDer::from_pem_slice(&pem.key).map_err(|_| TlsError::Key)?;

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .map_err(TlsError::Pair)?;
        let builder = match &pem.client_ca {
            None => builder.with_no_client_auth(),
            Some(client_ca) => {
                let mut roots = RootCertStore::empty();
                let (added, _) = roots.add_parsable_certificates(
                    certificates(client_ca).map_err(|_| TlsError::ClientCa)?,
                );
                if added == 0 {
                    return Err(TlsError::ClientCa);
                }
                let verifier =
                    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build();
                builder.with_client_cert_verifier(verifier.map_err(|_| TlsError::ClientCa)?)
            }
        };
        let mut config = builder
            .with_single_cert(chain, key)
            .map_err(TlsError::Pair)?;
        // The API server calls webhooks over HTTP/1.1.
        config.alpn_protocols = vec![b"http/1.1".to_vec()];
        Ok(Self {
            config: Arc::new(config),
            not_after,
        })
    }

    /// Returns the server's TLS configuration, in which the certificate can be replaced.
    #[must_use]
    pub fn server_config(&self) -> RustlsConfig {
        RustlsConfig::from_config(Arc::clone(&self.config))
    }
}

pub(in crate::server) fn read(path: &Path) -> Result<Vec<u8>, TlsError> {
    fs::read(path).map_err(|source| TlsError::Read {
        path: path.to_owned(),
        source,
    })
}

/// The certificate being served, and where its expiry is recorded.
#[derive(Clone, Copy)]
pub(in crate::server) struct LiveCertificate<'a> {
    pub(in crate::server) config: &'a RustlsConfig,
    pub(in crate::server) readiness: &'a Readiness,
    pub(in crate::server) metrics: &'a Metrics,
}

impl LiveCertificate<'_> {
    /// Serves a changed certificate. If it failed to load, the old one stays.
    pub(in crate::server) fn replace(self, loaded: Result<Certificate, TlsError>) {
        match loaded {
            Ok(certificate) => {
                self.config
                    .reload_from_config(Arc::clone(&certificate.config));
                self.record(&certificate);
                self.metrics.certificate_reload("ok");
                info!(not_after = certificate.not_after, "certificate reloaded");
            }
            Err(error) => {
                self.metrics.certificate_reload("failed");
                error!(
                    error = telemetry::chain(&error),
                    "the changed certificate cannot be served; the old one stays"
                );
            }
        }
    }

    /// Records the certificate's expiry for readiness and metrics.
    pub(in crate::server) fn record(self, certificate: &Certificate) {
        self.readiness.set_certificate_expiry(certificate.not_after);
        self.metrics.certificate_expiry(certificate.not_after);
    }
}

/// Periodically reads the files and serves a changed certificate. An invalid one is tried again only after the next
/// change. Never returns.
pub(in crate::server) async fn reload(
    files: &CertificateFiles,
    mut loaded_pem: CertificatePem,
    live: LiveCertificate<'_>,
) {
    let mut is_unreadable = false;
    loop {
        tokio::time::sleep(RELOAD_INTERVAL).await;
        let loaded = match files.read() {
            Ok(pem) if pem == loaded_pem => continue,
            Ok(pem) => {
                loaded_pem = pem;
                Certificate::from_pem(&loaded_pem)
            }
            // Logged once, not every two seconds.
            Err(_) if is_unreadable => continue,
            Err(error) => Err(error),
        };
        is_unreadable = matches!(loaded, Err(TlsError::Read { .. }));
        live.replace(loaded);
    }
}
