//! The authority and the certificate that all replicas share: kept in one Secret, published as `caBundle` in the
//! webhook configurations, served. What must be made or renewed is rotation.rs's business.
//!
//! No replica leads. Each looks at regular intervals and does what must be done; of two that do it at the same
//! time, the API server refuses one, which then takes what the other has made.

use std::path::PathBuf;
use std::time::Duration;

use base64_simd::STANDARD;
use k8s_openapi::ByteString;
use k8s_openapi::api::admissionregistration::v1::{
    MutatingWebhookConfiguration, ValidatingWebhookConfiguration,
};
use k8s_openapi::api::core::v1::Secret;
use kube::api::{Patch, PatchParams, PostParams};
use kube::core::{ApiResource, DynamicObject, ObjectMeta};
use kube::{Api, Client, Resource};
use serde_json::Value;
use thiserror::Error;
use time::OffsetDateTime;
use tokio::time::{Instant, sleep, timeout};
use tracing::{error, info, warn};
use uuid::Uuid;

use super::rotation::{CertificateBundle, CertificateSpec};
use super::tls::{self, Certificate, CertificatePem, LiveCertificate, TlsError};
use crate::cluster::ClusterError;
use crate::telemetry;

/// Longest wait for the first certificate, after which the process ends and says why.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Between two tries until then.
const START_PAUSE: Duration = Duration::from_secs(1);
/// Looks in whose time all that is asked of the API server at one look must be answered: less than the time in which
/// an authority settles, so that no slow replica writes an older list over a newer one.
const MAX_RECONCILE_INTERVALS: u32 = 2;
/// Looks after which an authority that was there each time is known to all API servers: they follow webhook
/// configurations within a second or so, and looks are ten seconds apart.
const SETTLING_INTERVALS: u32 = 3;
/// Replicas that start together meet again and again, but each time one of them is done.
const MAX_CONFLICTS: usize = 16;

/// Where the certificate is kept and published.
#[derive(Clone, Debug)]
pub struct SharedSecretConfig {
    /// The namespace of the Secret.
    pub namespace: String,
    /// The Secret; made if it is not there.
    pub secret: String,
    /// MutatingWebhookConfigurations whose `caBundle` is kept right.
    pub mutating: Vec<String>,
    /// The same for ValidatingWebhookConfigurations.
    pub validating: Vec<String>,
    /// A file with authorities: only their clients may connect; read again when it changes.
    pub client_ca: Option<PathBuf>,
}

/// The shared certificate, as one replica sees it. No `Debug`: keys are in it.
pub struct SharedSecret {
    secrets: Api<Secret>,
    config: SharedSecretConfig,
    configurations: Vec<Configuration>,
    spec: CertificateSpec,
    /// Tells this replica's creation of the Secret from another's.
    manager: String,
    bundle: CertificateBundle,
    served: Option<CertificatePem>,
    /// Since when each look has found these authorities in all configurations.
    published: Option<(String, Instant)>,
}

/// Why there is no certificate to serve, or why it is not kept.
#[derive(Debug, Error)]
pub enum SecretError {
    /// The Secret cannot be read or written.
    #[error("cannot keep the certificate in Secret {0}")]
    Secret(String, #[source] ClusterError),
    /// A webhook configuration cannot be read or patched.
    #[error("cannot publish the certificate's authority in webhook configuration {0}")]
    Publish(String, #[source] ClusterError),
    /// No key or certificate can be made.
    #[error("cannot make a certificate")]
    Make(#[from] rcgen::Error),
    /// What was made cannot be served.
    #[error("cannot serve the certificate")]
    Serve(#[from] TlsError),
    /// The API server takes too long.
    #[error("the API server did not answer in time")]
    Timeout,
}

impl SecretError {
    /// Whether it will not pass by itself: a role lacks a permission, say.
    const fn is_final(&self) -> bool {
        match self {
            Self::Secret(_, error) | Self::Publish(_, error) => {
                matches!(error, ClusterError::Refused(_))
            }
            Self::Make(_) | Self::Serve(_) => true,
            Self::Timeout => false,
        }
    }
}

impl SharedSecret {
    /// Nothing is asked of the API server yet.
    #[must_use]
    pub fn new(client: &Client, config: SharedSecretConfig, spec: CertificateSpec) -> Self {
        let configurations = |kind: ApiResource, names: &[String]| -> Vec<Configuration> {
            let one = |name: &String| Configuration {
                api: Api::all_with(client.clone(), &kind),
                name: name.clone(),
                is_missing: false,
            };
            names.iter().map(one).collect()
        };
        let mutating = kind_of::<MutatingWebhookConfiguration>();
        let validating = kind_of::<ValidatingWebhookConfiguration>();
        Self {
            secrets: Api::namespaced(client.clone(), &config.namespace),
            configurations: [
                configurations(mutating, &config.mutating),
                configurations(validating, &config.validating),
            ]
            .concat(),
            config,
            spec,
            manager: format!("{}-{}", env!("CARGO_PKG_NAME"), Uuid::new_v4()),
            bundle: CertificateBundle::default(),
            served: None,
            published: None,
        }
    }

    /// The first certificate, made if no replica has made one.
    ///
    /// # Errors
    /// [`SecretError`], the last of many tries'.
    pub async fn obtain(&mut self) -> Result<Certificate, SecretError> {
        let started = Instant::now();
        loop {
            let reconciled = match self.reconcile().await {
                Ok((pem, Ok(()))) => Ok(pem),
                Ok((_, Err(error))) | Err(error) => Err(error),
            };
            match reconciled {
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
            sleep(START_PAUSE).await;
        }
    }

    /// Looks after it, for ever.
    pub(in crate::server) async fn run(mut self, live: LiveCertificate<'_>) {
        let mut failing = false;
        loop {
            sleep(self.spec.interval()).await;
            let failed = match self.reconcile().await {
                Ok((pem, published)) => {
                    if self.served.as_ref() != Some(&pem) {
                        live.replace(Certificate::from_pem(&pem));
                        self.served = Some(pem);
                    }
                    published.err()
                }
                Err(error) => Some(error),
            };
            if let Some(error) = &failed {
                live.metrics.certificate_reload("failed");
                // Said once, not every ten seconds.
                if !failing {
                    error!(
                        error = telemetry::chain(error),
                        "the certificate cannot be kept; what is served stays"
                    );
                }
            }
            failing = failed.is_some();
        }
    }

    /// Does what must be done, and tells what is to be served: also if it cannot be published just now, for nothing
    /// is signed by an authority that was not published before.
    async fn reconcile(
        &mut self,
    ) -> Result<(CertificatePem, Result<(), SecretError>), SecretError> {
        let longest = self.spec.interval() * MAX_RECONCILE_INTERVALS;
        let done = async {
            self.sync_secret().await?;
            Ok(self.publish().await)
        };
        let published = timeout(longest.max(Duration::from_secs(1)), done)
            .await
            .unwrap_or(Err(SecretError::Timeout))?;
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
        Ok((pem, published))
    }

    /// Brings what is bundle and what is in the Secret to the same.
    async fn sync_secret(&mut self) -> Result<(), SecretError> {
        let failed = |error| {
            let SharedSecretConfig {
                namespace, secret, ..
            } = &self.config;
            SecretError::Secret(format!("{namespace}/{secret}"), error)
        };
        let mut conflicts = 0;
        loop {
            let kept = self.secrets.get_opt(&self.config.secret).await;
            let kept = kept.map_err(|error| failed(error.into()))?;
            let kept_held = kept.as_ref().map(bundle);
            let now = OffsetDateTime::now_utc().unix_timestamp();
            let mut restored = CertificateBundle::restored(kept_held.clone(), &self.bundle, now);
            if !restored.is_accepted(now) {
                // There may be replicas, or a certificate of somebody else's, that are trusted by what is published.
                restored.authorities += &self.published_authorities().await?;
            }
            let is_settled = self.is_settled(&restored.authorities);
            let next = self.spec.next(&restored, now, is_settled)?;
            let next = next.unwrap_or(restored);
            if kept_held.as_ref() == Some(&next) {
                self.bundle = next;
                return Ok(());
            }
            match self.write(kept, &next).await {
                Ok(()) => {
                    info!(secret = self.config.secret, "certificate kept");
                    self.bundle = next;
                    return Ok(());
                }
                Err(ClusterError::Conflict(_)) if conflicts < MAX_CONFLICTS => conflicts += 1,
                Err(error) => return Err(failed(error)),
            }
        }
    }

    async fn write(
        &self,
        kept: Option<Secret>,
        bundle: &CertificateBundle,
    ) -> Result<(), ClusterError> {
        let name = &self.config.secret;
        let data = fields(bundle)
            .map(|(field, text)| (field.to_owned(), ByteString(text.clone().into_bytes())));
        match kept {
            // Replaces what was read, and nothing newer: the API server compares its version.
            Some(mut secret) => {
                secret.data.get_or_insert_default().extend(data);
                let params = PostParams::default();
                self.secrets.replace(name, &params, &secret).await?;
            }
            // Applied rather than posted: a role can be limited to this one name. Unforced, and by a manager of
            // its own, it conflicts with what another replica has applied meanwhile.
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

    /// The authorities that clients trust now.
    async fn published_authorities(&self) -> Result<String, SecretError> {
        let mut all = String::new();
        for Configuration { api, name, .. } in &self.configurations {
            let found = api.get_opt(name).await;
            let found = found.map_err(|error| SecretError::Publish(name.clone(), error.into()))?;
            all.extend(found.iter().flat_map(ca_bundles));
        }
        Ok(all)
    }

    /// Puts the authorities into every configuration that lacks them.
    async fn publish(&mut self) -> Result<(), SecretError> {
        let authorities = &self.bundle.authorities;
        for configuration in &mut self.configurations {
            match configuration.publish(authorities).await {
                Ok(false) => {}
                // Whatever was there, from now on it is known.
                Ok(true) => self.published = None,
                Err(error) => {
                    self.published = None;
                    return Err(SecretError::Publish(configuration.name.clone(), error));
                }
            }
        }
        let is_known = matches!(&self.published, Some((known, _)) if known == authorities);
        if !is_known {
            self.published = Some((authorities.clone(), Instant::now()));
        }
        Ok(())
    }

    fn is_settled(&self, authorities: &str) -> bool {
        let time = self.spec.interval() * SETTLING_INTERVALS;
        matches!(&self.published, Some((known, since)) if known == authorities && since.elapsed() >= time)
    }
}

fn kind_of<K: Resource<DynamicType = ()>>() -> ApiResource {
    ApiResource::erase::<K>(&())
}

/// The Secret's fields, by the names that certificates have in Secrets.
fn fields(bundle: &CertificateBundle) -> [(&'static str, &String); 4] {
    [
        ("ca.crt", &bundle.authorities),
        ("ca.key", &bundle.authority_key),
        ("tls.crt", &bundle.certificate),
        ("tls.key", &bundle.key),
    ]
}

fn bundle(secret: &Secret) -> CertificateBundle {
    let text = |field: &str| {
        let bytes = secret.data.as_ref().and_then(|data| data.get(field));
        bytes.map_or(String::new(), |bytes| {
            String::from_utf8_lossy(&bytes.0).into_owned()
        })
    };
    CertificateBundle {
        authorities: text("ca.crt"),
        authority_key: text("ca.key"),
        certificate: text("tls.crt"),
        key: text("tls.key"),
    }
}

/// A webhook configuration, all of whose webhooks are this program's.
#[derive(Clone)]
struct Configuration {
    api: Api<DynamicObject>,
    name: String,
    is_missing: bool,
}

impl Configuration {
    /// Whether the configuration lacked them.
    async fn publish(&mut self, authorities: &str) -> Result<bool, ClusterError> {
        let mut conflicts = 0;
        loop {
            let Some(mut found) = self.api.get_opt(&self.name).await? else {
                // Nobody calls a webhook that is not configured.
                if !self.is_missing {
                    warn!(
                        name = self.name,
                        "the webhook configuration is not there; it gets its caBundle once it is"
                    );
                }
                self.is_missing = true;
                return Ok(false);
            };
            self.is_missing = false;
            if !set_ca_bundle(&mut found, authorities) {
                return Ok(false);
            }
            let params = PostParams::default();
            let replaced = self.api.replace(&self.name, &params, &found).await;
            match replaced.map_err(ClusterError::from) {
                Ok(_) => {
                    info!(name = self.name, "caBundle written");
                    return Ok(true);
                }
                Err(ClusterError::Conflict(_)) if conflicts < MAX_CONFLICTS => conflicts += 1,
                Err(error) => return Err(error),
            }
        }
    }
}

/// What the webhooks of a configuration are trusted by; what is no text is passed over.
fn ca_bundles(found: &DynamicObject) -> Vec<String> {
    let webhooks = found.data.get("webhooks").and_then(Value::as_array);
    let bundles = webhooks.into_iter().flatten().filter_map(|webhook| {
        let bundle = webhook.pointer("/clientConfig/caBundle")?.as_str()?;
        String::from_utf8(STANDARD.decode_to_vec(bundle).ok()?).ok()
    });
    bundles.collect()
}

/// Gives each webhook of a configuration the authorities; whether one lacked them.
fn set_ca_bundle(found: &mut DynamicObject, authorities: &str) -> bool {
    let ca_bundle = Value::String(STANDARD.encode_to_string(authorities));
    let webhooks = found.data.get_mut("webhooks").and_then(Value::as_array_mut);
    let mut was_lacking = false;
    for webhook in webhooks.into_iter().flatten() {
        let Some(client) = webhook
            .get_mut("clientConfig")
            .and_then(Value::as_object_mut)
        else {
            continue;
        };
        was_lacking |= client.get("caBundle") != Some(&ca_bundle);
        client.insert("caBundle".to_owned(), ca_bundle.clone());
    }
    was_lacking
}
