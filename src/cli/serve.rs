//! `serve`: starts the server from the arguments and runs it until it has drained. The server itself is in server/.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;
use tracing::warn;

use super::args::{DatabaseArgs, PolicyArgs};
use super::dev;
use crate::cluster;
use crate::core::policy::Policy;
use crate::database::{Database, UrlSource};
use crate::metrics::Metrics;
use crate::server::certificate::rotation::CertificateSpec;
use crate::server::certificate::secret::{SharedSecret, SharedSecretConfig};
use crate::server::certificate::tls::{Certificate, CertificateFiles};
use crate::server::readiness::Readiness;
use crate::server::webhook::{App, BodyLimits};
use crate::server::{Bound, CertificateSource, Drain};
use crate::telemetry::{self, LogFormat};

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ServeArgs {
    /// Runs with nothing else installed: an SQLite file with sample workspaces, a generated certificate, a
    /// sample proxy. Listens on 127.0.0.1 by default
    #[arg(long, env = "LLM_BILLING_DEV")]
    dev: bool,
    /// Where the webhook listens [default: 0.0.0.0:8443]
    #[arg(long, env = "LLM_BILLING_LISTEN", value_name = "ADDRESS:PORT")]
    listen: Option<SocketAddr>,
    /// Where health and metrics listen [default: 0.0.0.0:8080]
    #[arg(long, env = "LLM_BILLING_HEALTH_LISTEN", value_name = "ADDRESS:PORT")]
    health_listen: Option<SocketAddr>,
    #[command(flatten)]
    database: DatabaseArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    shared: SharedArgs,
    /// Maximum size of a request body, in bytes
    #[arg(long, env = "LLM_BILLING_MAX_BODY_BYTES", value_name = "BYTES", default_value_t = 8 * 1024 * 1024)]
    max_body_bytes: usize,
    /// How long to keep accepting connections after SIGTERM, while the cluster removes the pod's address
    #[arg(long, env = "LLM_BILLING_DRAIN_DELAY", value_name = "DURATION", default_value = "5s", value_parser = humantime::parse_duration)]
    drain_delay: Duration,
    /// How long in-flight requests may take after the drain delay
    #[arg(long, env = "LLM_BILLING_DRAIN_TIMEOUT", value_name = "DURATION", default_value = "20s", value_parser = humantime::parse_duration)]
    drain_timeout: Duration,
    /// Log format [default: json; pretty with --dev]
    #[arg(long, env = "LLM_BILLING_LOG_FORMAT", value_enum)]
    log_format: Option<LogFormat>,
}

const EXAMPLES: &str = "\
Examples:
  llm-billing-webhook serve --dev      try it with nothing else installed
  llm-billing-webhook serve --policy policy.yaml --database-url-file url --tls-cert tls.crt --tls-key tls.key";

/// The certificate files.
#[derive(Debug, Args)]
pub(super) struct TlsArgs {
    /// Certificate chain in PEM; while serving, read again when it changes
    #[arg(long, env = "LLM_BILLING_TLS_CERT", value_name = "FILE")]
    tls_cert: Option<PathBuf>,
    /// The certificate's private key in PEM; while serving, read again when it changes
    #[arg(long, env = "LLM_BILLING_TLS_KEY", value_name = "FILE")]
    tls_key: Option<PathBuf>,
    /// CA certificates in PEM that client certificates must chain to (mutual TLS); while serving, read again
    /// when it changes
    #[arg(long, env = "LLM_BILLING_CLIENT_CA", value_name = "FILE")]
    client_ca: Option<PathBuf>,
}

impl TlsArgs {
    /// Returns the files, or `None` if no flag is set.
    pub(super) fn files(&self) -> anyhow::Result<Option<CertificateFiles>> {
        match (&self.tls_cert, &self.tls_key) {
            (Some(certificate), Some(key)) => Ok(Some(CertificateFiles {
                certificate: certificate.clone(),
                key: key.clone(),
                client_ca: self.client_ca.clone(),
            })),
            (None, None) if self.client_ca.is_none() => Ok(None),
            _ => bail!("--tls-cert and --tls-key belong together; set both"),
        }
    }
}

/// The certificate that the replicas share and renew themselves.
#[derive(Debug, Args)]
struct SharedArgs {
    /// Secret in which the replicas share a self-managed CA and certificate, instead of --tls-cert and
    /// --tls-key
    #[arg(long, env = "LLM_BILLING_TLS_SECRET", value_name = "NAME")]
    tls_secret: Option<String>,
    /// Namespace of the Secret [default: the service account's, or the kubeconfig's]
    #[arg(
        long,
        env = "LLM_BILLING_TLS_SECRET_NAMESPACE",
        requires = "tls_secret",
        value_name = "NAMESPACE"
    )]
    tls_secret_namespace: Option<String>,
    /// DNS names by which the API server calls the webhook, such as SERVICE.NAMESPACE.svc
    #[arg(
        long,
        env = "LLM_BILLING_TLS_DNS_NAME",
        requires = "tls_secret",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    tls_dns_name: Vec<String>,
    /// MutatingWebhookConfigurations to write the CA into, and the webhooks that their annotation
    /// molecule.ai/llm-billing-webhooks declares
    #[arg(
        long,
        env = "LLM_BILLING_TLS_MUTATING_WEBHOOK",
        requires = "tls_secret",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    tls_mutating_webhook: Vec<String>,
    /// The same for ValidatingWebhookConfigurations, which may be missing
    #[arg(
        long,
        env = "LLM_BILLING_TLS_VALIDATING_WEBHOOK",
        requires = "tls_secret",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    tls_validating_webhook: Vec<String>,
    /// Lifetime of a certificate; it is renewed when a third is left
    #[arg(long, env = "LLM_BILLING_TLS_LIFETIME", value_name = "DURATION", default_value = "90d", value_parser = humantime::parse_duration)]
    tls_lifetime: Duration,
    /// Lifetime of a CA; its successor is published when less than --tls-lifetime is left
    #[arg(long, env = "LLM_BILLING_TLS_CA_LIFETIME", value_name = "DURATION", default_value = "365d", value_parser = humantime::parse_duration)]
    tls_ca_lifetime: Duration,
}

impl SharedArgs {
    async fn shared(
        &self,
        secret: &str,
        client_ca: Option<PathBuf>,
    ) -> anyhow::Result<SharedSecret> {
        let spec = CertificateSpec::new(
            self.tls_dns_name.clone(),
            self.tls_lifetime,
            self.tls_ca_lifetime,
        )?;
        let client = cluster::connect().await?;
        let config = SharedSecretConfig {
            namespace: self
                .tls_secret_namespace
                .clone()
                .unwrap_or_else(|| client.default_namespace().to_owned()),
            secret: secret.to_owned(),
            mutating: self.tls_mutating_webhook.clone(),
            validating: self.tls_validating_webhook.clone(),
            client_ca,
        };
        Ok(SharedSecret::new(&client, config, spec))
    }
}

pub(super) async fn serve(args: ServeArgs) -> anyhow::Result<ExitCode> {
    let format = args.log_format.unwrap_or(if args.dev {
        LogFormat::Pretty
    } else {
        LogFormat::Json
    });
    let telemetry = telemetry::start(format)?;
    let policy_text = match args.policy.read()? {
        None if args.dev => dev::DEV_POLICY.to_owned(),
        text => text.unwrap_or_default(),
    };
    let policy_file = args.policy.parse(&policy_text)?;
    let policy_warnings = policy_file.warnings();
    let has_literal_token = policy_file.has_literal_token();
    let policy = Policy::from(policy_file);
    let database = Database::connect_lazily(database(&args).await?, &policy)?;
    let (certificate, certificate_source) = certificate(&args).await?;
    reject_refused_query(&database).await?;
    // A checksum over a literal token would confirm a correct guess of it.
    let public_policy = (!has_literal_token).then_some(policy_text.as_str());
    let metrics = Metrics::new(public_policy, &database.metrics, telemetry.dropped_lines.clone());
    let host = if args.dev {
        Ipv4Addr::LOCALHOST
    } else {
        Ipv4Addr::UNSPECIFIED
    };
    let bound = Bound::bind(
        args.listen.unwrap_or((host, 8443).into()),
        args.health_listen.unwrap_or((host, 8080).into()),
    )?;
    for warning in policy_warnings {
        warn!(warning, "policy");
    }
    if args.dev {
        dev::greet(bound.webhook_address, &policy)?;
    }
    let app = App {
        policy,
        database,
        metrics,
        readiness: Readiness::default(),
        body_limits: BodyLimits::new(args.max_body_bytes),
    };
    let drain = Drain {
        delay: args.drain_delay,
        timeout: args.drain_timeout,
    };
    bound
        .serve(Arc::new(app), certificate, certificate_source, drain)
        .await
        .context("cannot serve")?;
    Ok(ExitCode::SUCCESS)
}

async fn certificate(args: &ServeArgs) -> anyhow::Result<(Certificate, CertificateSource)> {
    const FAILED: &str = "cannot load the certificate";
    let TlsArgs {
        tls_cert,
        tls_key,
        client_ca,
    } = &args.tls;
    if let Some(secret) = &args.shared.tls_secret {
        if tls_cert.is_some() || tls_key.is_some() {
            bail!("--tls-secret replaces --tls-cert and --tls-key; set one or the other");
        }
        let mut shared = args.shared.shared(secret, client_ca.clone()).await?;
        let certificate = shared.obtain().await?;
        return Ok((certificate, CertificateSource::Secret(Box::new(shared))));
    }
    match args.tls.files()? {
        Some(files) => {
            let pem = files.read().context(FAILED)?;
            let certificate = Certificate::from_pem(&pem).context(FAILED)?;
            Ok((certificate, CertificateSource::Files(files, pem)))
        }
        None if args.dev => {
            let certificate = Certificate::from_pem(&dev::certificate()?).context(FAILED)?;
            Ok((certificate, CertificateSource::Generated))
        }
        None => {
            bail!("no certificate is given; set --tls-cert and --tls-key, or --tls-secret")
        }
    }
}

async fn database(args: &ServeArgs) -> anyhow::Result<UrlSource> {
    match args.database.source()? {
        None if args.dev => dev::database().await,
        _ => args.database.required(),
    }
}

/// Fails if the database refuses the query. If it cannot be reached, it may come up later, and readiness waits for it.
pub(super) async fn reject_refused_query(database: &Arc<Database>) -> anyhow::Result<()> {
    match database.check().await {
        Err(error) if error.is_refused() => Err(error).context("cannot start"),
        _ => Ok(()),
    }
}
