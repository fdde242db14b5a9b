//! A webhook configuration whose webhooks the replicas write, with their CA. secret.rs decides when.
//!
//! The chart declares the webhooks in an annotation, not as webhooks: a webhook without the right CA, or without a ready
//! replica, would refuse every pod. So a configuration has no webhooks until a replica is ready, and whichever replica
//! sees it first writes them, one of an older revision too.

use base64_simd::STANDARD;
use kube::api::PostParams;
use kube::core::{ApiResource, DynamicObject};
use kube::{Api, Client, Resource, ResourceExt};
use ring::digest::{SHA256, digest};
use serde_json::Value;
use thiserror::Error;
use tracing::{info, warn};

use crate::cluster::ClusterError;

/// Limit on retries after write conflicts. Replicas that start together conflict repeatedly; each time, one succeeds.
pub(super) const MAX_CONFLICTS: usize = 16;
/// The annotation in which the chart declares the webhooks, as a JSON list without `caBundle`.
const DECLARED: &str = "molecule.ai/llm-billing-webhooks";
/// The annotation with the digest of the declaration that was written last. Other changes of webhooks are left alone.
const WRITTEN: &str = "molecule.ai/llm-billing-webhooks-written";

/// A webhook configuration. All its webhooks must be this program's.
pub(super) struct Configuration {
    api: Api<DynamicObject>,
    kind: String,
    name: String,
    state: State,
}

/// What the last reconciliation has found or done.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// Nothing yet.
    Unknown,
    /// The configuration does not exist.
    Missing,
    /// Its webhooks are declared and not written, because no replica is known to be ready.
    Waiting,
    /// Its webhooks are written.
    Written,
}

/// Why a configuration cannot be read or written.
#[derive(Debug, Error)]
pub enum ConfigurationError {
    /// The API server's error.
    #[error(transparent)]
    Cluster(#[from] ClusterError),
    /// The declaration is not a JSON list.
    #[error(
        "its annotation {DECLARED} is not a JSON list of webhooks; correct it, or upgrade the release again"
    )]
    Unreadable,
}

impl Configuration {
    /// Prepares a configuration of a kind, without a request to the API server.
    pub(super) fn of<K: Resource<DynamicType = ()>>(client: &Client, name: &str) -> Self {
        let resource = ApiResource::erase::<K>(&());
        Self {
            api: Api::all_with(client.clone(), &resource),
            kind: resource.kind,
            name: name.to_owned(),
            state: State::Unknown,
        }
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Reports whether there was nothing left to write at the last reconciliation.
    pub(super) fn is_written(&self) -> bool {
        matches!(self.state, State::Written | State::Missing)
    }

    /// Returns the CA certificates that are published.
    pub(super) async fn ca_certificates(&self) -> Result<Vec<String>, ClusterError> {
        let found = self.api.get_opt(&self.name).await?;
        Ok(found.iter().flat_map(ca_bundles).collect())
    }

    /// Writes the CA certificates into the configuration, and the declared webhooks if they are not written: where there
    /// are webhooks already, or if `may_arm`. Returns whether the configuration had to be changed.
    pub(super) async fn publish(
        &mut self,
        ca_certificates: &str,
        may_arm: bool,
    ) -> Result<bool, ConfigurationError> {
        let mut conflicts = 0;
        loop {
            let Some(mut found) = self
                .api
                .get_opt(&self.name)
                .await
                .map_err(ClusterError::from)?
            else {
                // No API server calls a webhook without its configuration. That of the guard is optional.
                let (kind, name) = (self.kind.as_str(), self.name.as_str());
                if self.state != State::Missing && kind.starts_with("Mutating") {
                    warn!(
                        kind,
                        name, "webhook configuration not found; it is written once it exists"
                    );
                }
                self.state = State::Missing;
                return Ok(false);
            };
            let declared = set_webhooks(&mut found, may_arm)?;
            let is_ca_changed = set_ca_bundle(&mut found, ca_certificates);
            let state = match declared {
                Declared::Waiting => State::Waiting,
                Declared::Unchanged | Declared::Set => State::Written,
            };
            if declared != Declared::Set && !is_ca_changed {
                self.state = state;
                return Ok(false);
            }
            let params = PostParams::default();
            let replaced = self.api.replace(&self.name, &params, &found).await;
            match replaced.map_err(ClusterError::from) {
                Ok(_) => {
                    self.state = state;
                    info!(kind = self.kind, name = self.name, "webhook configuration written");
                    return Ok(true);
                }
                Err(ClusterError::Conflict(_)) if conflicts < MAX_CONFLICTS => conflicts += 1,
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Returns the decoded `caBundle` of each webhook in a configuration. Ignores invalid ones.
fn ca_bundles(found: &DynamicObject) -> Vec<String> {
    let webhooks = found.data.get("webhooks").and_then(Value::as_array);
    let bundles = webhooks.into_iter().flatten().filter_map(|webhook| {
        let bundle = webhook.pointer("/clientConfig/caBundle")?.as_str()?;
        String::from_utf8(STANDARD.decode_to_vec(bundle).ok()?).ok()
    });
    bundles.collect()
}

/// What became of the declared webhooks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Declared {
    /// There is no declaration, or it was written before.
    Unchanged,
    /// The declaration is not written yet.
    Waiting,
    /// The declared webhooks are set.
    Set,
}

/// Sets the declared webhooks if that declaration was not written before.
fn set_webhooks(found: &mut DynamicObject, may_arm: bool) -> Result<Declared, ConfigurationError> {
    let Some(declared) = found.annotations().get(DECLARED).cloned() else {
        return Ok(Declared::Unchanged);
    };
    let digest = STANDARD.encode_to_string(digest(&SHA256, declared.as_bytes()));
    let webhooks = found.data.get("webhooks").and_then(Value::as_array);
    let has_webhooks = webhooks.is_some_and(|webhooks| !webhooks.is_empty());
    if has_webhooks && found.annotations().get(WRITTEN) == Some(&digest) {
        return Ok(Declared::Unchanged);
    }
    if !has_webhooks && !may_arm {
        return Ok(Declared::Waiting);
    }
    let declared: Vec<Value> =
        serde_json::from_str(&declared).map_err(|_| ConfigurationError::Unreadable)?;
    let object = found
        .data
        .as_object_mut()
        .ok_or(ConfigurationError::Unreadable)?;
    object.insert("webhooks".to_owned(), declared.into());
    found.annotations_mut().insert(WRITTEN.to_owned(), digest);
    Ok(Declared::Set)
}

/// Sets the `caBundle` of each webhook in a configuration. Reports whether one has changed.
fn set_ca_bundle(found: &mut DynamicObject, ca_certificates: &str) -> bool {
    let ca_bundle = Value::String(STANDARD.encode_to_string(ca_certificates));
    let webhooks = found.data.get_mut("webhooks").and_then(Value::as_array_mut);
    let mut is_changed = false;
    for webhook in webhooks.into_iter().flatten() {
        let Some(client) = webhook
            .get_mut("clientConfig")
            .and_then(Value::as_object_mut)
        else {
            continue;
        };
        is_changed |= client.get("caBundle") != Some(&ca_bundle);
        client.insert("caBundle".to_owned(), ca_bundle.clone());
    }
    is_changed
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn declared_webhooks_are_written_once() {
        let webhooks = json!([{"name": "w", "clientConfig": {"url": "u"}}]);
        let configuration = |annotations: Value, webhooks: &Value| -> DynamicObject {
            let object = json!({"metadata": {"annotations": annotations}, "webhooks": webhooks});
            serde_json::from_value(object).unwrap()
        };
        let declared = json!({DECLARED: webhooks.to_string()});
        let mut empty = configuration(declared.clone(), &json!([]));
        assert_eq!(set_webhooks(&mut empty, false).unwrap(), Declared::Waiting);
        assert_eq!(empty.data["webhooks"], json!([]));
        assert_eq!(set_webhooks(&mut empty, true).unwrap(), Declared::Set);
        assert_eq!(empty.data["webhooks"], webhooks);
        assert_eq!(set_webhooks(&mut empty, true).unwrap(), Declared::Unchanged);
        // What a person changes stays, until the declaration changes.
        empty.data["webhooks"][0]["failurePolicy"] = "Ignore".into();
        assert_eq!(set_webhooks(&mut empty, false).unwrap(), Declared::Unchanged);
        empty
            .annotations_mut()
            .insert(DECLARED.to_owned(), "[{}]".to_owned());
        assert_eq!(set_webhooks(&mut empty, false).unwrap(), Declared::Set);
        assert_eq!(empty.data["webhooks"], json!([{}]));
        // Webhooks that are called already do not wait.
        let mut called = configuration(declared, &json!([{"name": "old"}]));
        assert_eq!(set_webhooks(&mut called, false).unwrap(), Declared::Set);
        assert_eq!(called.data["webhooks"], webhooks);
        let mut without = configuration(json!({}), &webhooks);
        assert_eq!(set_webhooks(&mut without, true).unwrap(), Declared::Unchanged);
        let mut invalid = configuration(json!({DECLARED: "{"}), &json!([]));
        assert!(set_webhooks(&mut invalid, true).is_err());
    }
}
