//! The replicas' shared CA and certificate: stores them in one Secret, publishes the CA in the webhook configurations and
//! serves the certificate. The decision what to generate or renew lives in rotation.rs, what to write into a
//! configuration in configuration.rs.
//!
//! There is no leader: each replica reconciles periodically. If two write at once, the API server rejects one with a
//! conflict, and that replica reads the other's result.

use std::path::PathBuf;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::ObjectMeta;
use kube::{Api, Client};
use thiserror::Error;
use time::OffsetDateTime;
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};
use uuid::Uuid;

use super::configuration::{Configuration, ConfigurationError, MAX_CONFLICTS};
use super::rotation::{CertificateBundle, CertificateSpec};
use super::tls::{self, Certificate, CertificatePem, LiveCertificate, TlsError};
use crate::cluster::ClusterError;
use crate::telemetry;

/// Limit on the time to obtain the first certificate. After it the process exits with the last error.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Pause between attempts to obtain the first certificate.
const START_RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Time-out of one reconciliation, in intervals. It is shorter than the propagation time, so that a slow replica never
/// overwrites a newer list of CAs with an older one.
const MAX_RECONCILE_INTERVALS: u32 = 2;
/// Intervals after which all API servers trust a CA that was published all the time. They apply changes of webhook
/// configurations within about a second; an interval is ten seconds.
const PROPAGATION_INTERVALS: u32 = 3;
/// Pause between attempts to write webhooks that no configuration has yet.
const ARMING_INTERVAL: Duration = Duration::from_secs(1);
/// A replica is ready for this part of an interval, five seconds, before it writes webhooks that no configuration has
/// yet: the kubelet probes it every three seconds, and the Service's endpoints follow.
const READY_BEFORE_ARMING: u32 = 2;

/// Configuration of the shared Secret and of the publication of its CA.
#[derive(Clone, Debug)]
pub struct SharedSecretConfig {
    /// The namespace of the Secret.
    pub namespace: String,
    /// The name of the Secret, which is created if missing.
    pub secret: String,
    /// Names of the MutatingWebhookConfigurations to write.
    pub mutating: Vec<String>,
    /// Names of the ValidatingWebhookConfigurations to write, which may be missing.
    pub validating: Vec<String>,
    /// PEM file with the CA certificates for client authentication, reloaded when it changes.
    pub client_ca: Option<PathBuf>,
}

/// One replica's view of the shared certificate. No `Debug`: it holds the private keys.
pub struct SharedSecret {
    secrets: Api<Secret>,
    config: SharedSecretConfig,
    configurations: Vec<Configuration>,
    spec: CertificateSpec,
    /// The field manager, unique to this replica, so that concurrent creations of the Secret conflict.
    manager: String,
    bundle: CertificateBundle,
    served: Option<CertificatePem>,
    /// The CA certificates found in all configurations by each reconciliation since this instant.
    published: Option<(String, Instant)>,
    /// Since when this replica has been ready.
    ready_since: Option<Instant>,
}

/// What a reconciliation has done.
struct Reconciled {
    /// The certificate to serve.
    pem: CertificatePem,
    /// Whether the CA is in all webhook configurations.
    published: Result<(), SecretError>,
}

/// Why the certificate cannot be obtained, stored or published.
#[derive(Debug, Error)]
pub enum SecretError {
    /// The Secret cannot be read or written.
    #[error("cannot sync the certificate with Secret {0}")]
    Secret(String, #[source] ClusterError),
    /// A webhook configuration cannot be read or written.
    #[error("cannot publish the CA certificate in webhook configuration {0}")]
    Publish(String, #[source] ConfigurationError),
    /// A key or certificate cannot be generated.
    #[error("cannot generate a certificate")]
    Make(#[from] rcgen::Error),
    /// The certificate cannot be served.
    #[error("cannot serve the certificate")]
    Serve(#[from] TlsError),
    /// The API server did not answer in time.
    #[error("the API server did not answer in time")]
    Timeout,
}

impl SecretError {
    /// Reports whether retrying is useless, for example because a role lacks a permission.
    const fn is_final(&self) -> bool {
        match self {
            Self::Secret(_, error) | Self::Publish(_, ConfigurationError::Cluster(error)) => {
                matches!(error, ClusterError::Refused(_))
            }
            Self::Publish(_, ConfigurationError::Unreadable) | Self::Make(_) | Self::Serve(_) => {
                true
            }
            Self::Timeout => false,
        }
    }
}

impl SharedSecret {
    /// Prepares the shared certificate, without a request to the API server.
    #[must_use]
    pub fn new(client: &Client, config: SharedSecretConfig, spec: CertificateSpec) -> Self {
        let mutating = config.mutating.iter();
        let mutating =
            mutating.map(|name| Configuration::of::<MutatingWebhookConfiguration>(client, name));
        let validating = config.validating.iter();
        let validating = validating
            .map(|name| Configuration::of::<ValidatingWebhookConfiguration>(client, name));
        Self {
            secrets: Api::namespaced(client.clone(), &config.namespace),
            configurations: mutating.chain(validating).collect(),
            config,
            spec,
            manager: format!("{}-{}", env!("CARGO_PKG_NAME"), Uuid::new_v4()),
            bundle: CertificateBundle::default(),
            served: None,
            published: None,
            ready_since: None,
        }
    }

    /// Returns the first certificate, and generates it if no replica has.
    ///
    /// # Errors
    /// [`SecretError`] of the last attempt.
    pub async fn obtain(&mut self) -> Result<Certificate, SecretError> {
        let started = Instant::now();
        loop {
            let reconciled = self.reconcile().await;
            match reconciled.and_then(|done| done.published.map(|()| done.pem)) {
                Ok(pem) => {
                    let certificate = Certificate::from_pem(&pem)?;
                    self.served = Some(pem);
                    return Ok(certificate);
                }
                Err(error) if error.is_final() || started.elapsed() >= START_TIMEOUT => {
                    return Err(error);
                }
                Err(error) => warn!(error = telemetry::chain(&error), "no certificate yet"),
            }
            sleep(START_RETRY_INTERVAL).await;
        }
    }

    /// Reconciles periodically and serves each changed certificate. Never returns.
    pub(in crate::server) async fn run(mut self, live: LiveCertificate<'_>) {
        let mut is_failing = false;
        loop {
            sleep(self.pause()).await;
            let is_ready = live.readiness.not_ready_reason().is_none();
            self.ready_since = is_ready.then(|| self.ready_since.unwrap_or_else(Instant::now));
            let failure = match self.reconcile().await {
                Ok(Reconciled { pem, published }) => {
                    if self.served.as_ref() != Some(&pem) {
                        live.replace(Certificate::from_pem(&pem));
                        self.served = Some(pem);
                    }
                    published.err()
                }
                Err(error) => Some(error),
            };
            if let Some(error) = &failure {
                live.metrics.certificate_reload("failed");
                // Logged once, not every ten seconds.
                if !is_failing {
                    error!(
                        error = telemetry::chain(error),
                        "cannot reconcile the certificate; the current one stays in use"
                    );
                }
            }
            if is_failing && failure.is_none() {
                info!("the certificate is reconciled again");
            }
            is_failing = failure.is_some();
        }
    }

    fn pause(&self) -> Duration {
        let interval = self.spec.interval();
        if self.configurations.iter().all(Configuration::is_written) {
            interval
        } else {
            interval.min(ARMING_INTERVAL)
        }
    }

    /// Syncs the Secret, publishes the CA, and returns the certificate to serve. A failure to publish does not prevent
    /// serving: a CA signs nothing before it was published.
    async fn reconcile(&mut self) -> Result<Reconciled, SecretError> {
        let time_limit = self.spec.interval() * MAX_RECONCILE_INTERVALS;
        let work = async {
            self.sync_secret().await?;
            Ok(self.publish().await)
        };
        let done = timeout(time_limit.max(Duration::from_secs(1)), work).await;
        let done = done.unwrap_or(Err(SecretError::Timeout));
        if done.is_err() {
            // What is published was not checked.
            self.published = None;
        }
        let published = done?;
        let client_ca = self
            .config
            .client_ca
            .as_deref()
            .map(tls::read)
            .transpose()?;
        let pem = CertificatePem {
            certificate: self.bundle.certificate.clone().into_bytes(),
            key: self.bundle.key.clone().into_bytes(),
            client_ca,
        };
        Ok(Reconciled { pem, published })
    }

    /// Brings this replica's bundle and the Secret in sync.
    async fn sync_secret(&mut self) -> Result<(), SecretError> {
        let secret_error = |error| {
            let SharedSecretConfig {
                namespace, secret, ..
            } = &self.config;
            SecretError::Secret(format!("{namespace}/{secret}"), error)
        };
        let mut conflicts = 0;
        loop {
            let stored = self.secrets.get_opt(&self.config.secret).await;
            let stored = stored.map_err(|error| secret_error(error.into()))?;
            let stored_bundle = stored.as_ref().map(parse_bundle);
            let now = OffsetDateTime::now_utc().unix_timestamp();
            let mut restored =
                CertificateBundle::restored(stored_bundle.clone(), &self.bundle, now);
            if !restored.is_accepted(now) {
                // Certificates in use elsewhere may be signed by a published CA: keep it trusted.
                restored.ca_certificates += &self.published_ca_certificates().await?;
            }
            let is_propagated = self.is_propagated(&restored.ca_certificates);
            let next = self.spec.next(&restored, now, is_propagated)?;
            let next = next.unwrap_or(restored);
            if stored_bundle.as_ref() == Some(&next) {
                self.bundle = next;
                return Ok(());
            }
            match self.write(stored, &next).await {
                Ok(()) => {
                    info!(secret = self.config.secret, "certificate stored");
                    self.bundle = next;
                    return Ok(());
                }
                Err(ClusterError::Conflict(_)) if conflicts < MAX_CONFLICTS => conflicts += 1,
                Err(error) => return Err(secret_error(error)),
            }
        }
    }

    async fn write(
        &self,
        stored: Option<Secret>,
        bundle: &CertificateBundle,
    ) -> Result<(), ClusterError> {
        let name = &self.config.secret;
        let data = fields(bundle)
            .map(|(field, text)| (field.to_owned(), ByteString(text.clone().into_bytes())));
        match stored {
            // The API server rejects this if the Secret has changed since it was read.
            Some(mut secret) => {
                secret.data.get_or_insert_default().extend(data);
                let params = PostParams::default();
                self.secrets.replace(name, &params, &secret).await?;
            }
            // Applied, not created: RBAC can limit a patch to one name, but not a create. Unforced and with a field
            // manager per replica, it conflicts if another replica applied first.
            None => {
                let secret = Secret {
                    metadata: ObjectMeta {
                        name: Some(name.clone()),
                        ..ObjectMeta::default()
                    },
                    data: Some(data.into()),
                    ..Secret::default()
                };
                let params = PatchParams::apply(&self.manager);
                let patch = Patch::Apply(&secret);
                self.secrets.patch(name, &params, &patch).await?;
            }
        }
        Ok(())
    }

    /// Returns the CA certificates published in the webhook configurations.
    async fn published_ca_certificates(&self) -> Result<String, SecretError> {
        let mut published = String::new();
        for configuration in &self.configurations {
            let found = configuration.ca_certificates().await;
            let found = found.map_err(|error| {
                SecretError::Publish(configuration.name().to_owned(), error.into())
            })?;
            published.extend(found);
        }
        Ok(published)
    }

    /// Writes webhooks and CA certificates into every configuration that lacks them.
    async fn publish(&mut self) -> Result<(), SecretError> {
        let ca_certificates = &self.bundle.ca_certificates;
        let needed = self.spec.interval() / READY_BEFORE_ARMING;
        let may_arm = self
            .ready_since
            .is_some_and(|since| since.elapsed() >= needed);
        for configuration in &mut self.configurations {
            match configuration.publish(ca_certificates, may_arm).await {
                Ok(false) => {}
                // The propagation time starts again.
                Ok(true) => self.published = None,
                Err(error) => {
                    self.published = None;
                    return Err(SecretError::Publish(configuration.name().to_owned(), error));
                }
            }
        }
        let is_recorded =
            matches!(&self.published, Some((published, _)) if published == ca_certificates);
        if !is_recorded {
            self.published = Some((ca_certificates.clone(), Instant::now()));
        }
        Ok(())
    }

    fn is_propagated(&self, ca_certificates: &str) -> bool {
        let time = self.spec.interval() * PROPAGATION_INTERVALS;
        matches!(
            &self.published,
            Some((published, since)) if published == ca_certificates && since.elapsed() >= time
        )
    }
}

/// Returns the Secret's fields. All but `ca.key` have the standard names of TLS Secrets.
fn fields(bundle: &CertificateBundle) -> [(&'static str, &String); 4] {
    [
        ("ca.crt", &bundle.ca_certificates),
        ("ca.key", &bundle.ca_key),
        ("tls.crt", &bundle.certificate),
        ("tls.key", &bundle.key),
    ]
}

fn parse_bundle(secret: &Secret) -> CertificateBundle {
    let text = |field: &str| {
        let bytes = secret.data.as_ref().and_then(|data| data.get(field));
        bytes.map_or(String::new(), |bytes| String::from_utf8_lossy(&bytes.0).into_owned())
    };
    CertificateBundle {
        ca_certificates: text("ca.crt"),
        ca_key: text("ca.key"),
        certificate: text("tls.crt"),
        key: text("tls.key"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn failed_reconciliation_forgets_what_was_published() {
        let address = "http://127.0.0.1:1".parse().unwrap();
        let client = Client::try_from(kube::Config::new(address)).unwrap();
        let config = SharedSecretConfig {
            namespace: "ns".to_owned(),
            secret: "s".to_owned(),
            mutating: Vec::new(),
            validating: Vec::new(),
            client_ca: None,
        };
        let day = Duration::from_hours(24);
        let spec = CertificateSpec::new(vec!["w.ns.svc".to_owned()], day, 2 * day).unwrap();
        let mut secret = SharedSecret::new(&client, config, spec);
        secret.published = Some(("ca".to_owned(), Instant::now()));
        assert!(secret.reconcile().await.is_err());
        assert!(secret.published.is_none());
    }
}
