//! Defaults of `serve --dev`: an SQLite file with sample workspaces, a certificate, a sample proxy, and a curl command
//! to try it.

use std::net::SocketAddr;

use anyhow::Context;
use rcgen::{CertifiedKey, generate_simple_self_signed};
use serde_json::json;
use uuid::Uuid;

use super::terminal::print;
use crate::core::policy::Policy;
use crate::core::resolution::BillingMode;
use crate::database::{DatabaseUrl, Embedded, UrlSource};
use crate::server::certificate::tls::CertificatePem;

/// The default database of `serve --dev` and `workspace`: a file in the working directory.
pub(super) const DEV_DATABASE: &str = "sqlite://llm-billing-dev.sqlite";

/// A policy with a sample proxy.
pub(super) const DEV_POLICY: &str = "
proxy:
  baseUrl: https://llm-proxy.example.test/openai/v1
  anthropicBaseUrl: https://llm-proxy.example.test/anthropic
  usageToken: {secretKeyRef: {name: molecule-llm-proxy, key: usage-token}}
";

/// The workspace in the curl command.
const SAMPLE: Uuid = Uuid::from_u128(0x11111111_1111_4111_8111_111111111111);

/// One sample workspace per mode, and one without a mode.
const SAMPLES: [(Uuid, Option<BillingMode>); 4] = [
    (SAMPLE, Some(BillingMode::PlatformManaged)),
    (Uuid::from_u128(0x22222222_2222_4222_8222_222222222222), Some(BillingMode::Byok)),
    (Uuid::from_u128(0x33333333_3333_4333_8333_333333333333), Some(BillingMode::Disabled)),
    (Uuid::from_u128(0x44444444_4444_4444_8444_444444444444), None),
];

/// Opens the database file, and adds the sample workspaces if it is empty. Returns its URL.
pub(super) async fn database() -> anyhow::Result<UrlSource> {
    let url: DatabaseUrl = DEV_DATABASE.parse()?;
    let mut embedded = Embedded::open(&url).await?;
    if embedded.list().await?.is_empty() {
        for (id, mode) in SAMPLES {
            embedded.set(id, mode).await?;
        }
    }
    embedded.close().await?;
    Ok(UrlSource::Given(DEV_DATABASE.into()))
}

/// Returns a new self-signed certificate for localhost.
pub(super) fn certificate() -> anyhow::Result<CertificatePem> {
    let names = ["localhost", "127.0.0.1", "::1"].map(str::to_owned);
    let CertifiedKey { cert, signing_key } =
        generate_simple_self_signed(names).context("cannot make a certificate")?;
    Ok(CertificatePem {
        certificate: cert.pem().into_bytes(),
        key: signing_key.serialize_pem().into_bytes(),
        client_ca: None,
    })
}

/// Prints commands to try.
pub(super) fn greet(webhook: SocketAddr, policy: &Policy) -> anyhow::Result<()> {
    let review = json!({
        "apiVersion": "admission.k8s.io/v1",
        "kind": "AdmissionReview",
        "request": {
            "uid": "try-it",
            "resource": {"group": "", "version": "v1", "resource": "pods"},
            "operation": "CREATE",
            "namespace": "default",
            "object": {
                "metadata": {"name": "try-it", "labels": {
                    policy.workspace_label.as_str(): SAMPLE.to_string(),
                    policy.runtime_label.as_str(): "claude-code",
                }},
                "spec": {"containers": [{"name": "agent", "env": [
                    {"name": "MODEL", "value": "opus"},
                    {"name": "CLAUDE_CODE_OAUTH_TOKEN", "value": "my-own-login"},
                ]}]},
            },
        },
    });
    let program = std::env::args()
        .next()
        .unwrap_or_else(|| env!("CARGO_PKG_NAME").to_owned());
    print(&format!(
        "The webhook is running. Send it a pod:\n\n\
         curl -sk https://{webhook}/mutate -H 'Content-Type: application/json' -d '{review}'\n\n\
         The response's `patch` is a base64-encoded JSON patch. List the sample workspaces, or change a mode:\n\n\
         {program} workspace list\n\
         {program} workspace set {SAMPLE} byok\n"
    ))?;
    Ok(())
}
