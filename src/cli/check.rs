//! `check`: validates policy, certificate and database before a rollout, and the webhook in its cluster after it. A
//! failed check does not stop the others.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Args;
use k8s_openapi::api::core::v1::Pod;
use kube::Api;
use kube::api::{ApiResource, DynamicObject, PostParams};
use serde_json::{Value, json};
use time::OffsetDateTime;
use tokio::time::sleep;
use uuid::Uuid;

use super::args::{DatabaseArgs, PolicyArgs};
use super::terminal::print;
use crate::cli::serve::TlsArgs;
use crate::cluster::{self, ClusterError};
use crate::core::policy::Policy;
use crate::core::proxy::Proxy;
use crate::core::refusal::Refusal;
use crate::core::resolution::MODE_VARIABLE;
use crate::database::{Database, Notifications};
use crate::server::certificate::tls::Certificate;
use crate::telemetry;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CheckArgs {
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    tls: TlsArgs,
    #[command(flatten)]
    database: DatabaseArgs,
    /// Creates a pod in this namespace by a server-side dry-run, and checks that the webhook acts on it
    #[arg(long, env = "LLM_BILLING_DRY_RUN_IN", value_name = "NAMESPACE")]
    dry_run_in: Option<String>,
}

const EXAMPLES: &str = "\
Examples:
  llm-billing-webhook check --policy policy.yaml --database-url-file url
  llm-billing-webhook check --policy policy.yaml --dry-run-in default  verify the webhook";

/// The report's lines, and whether a check failed.
#[derive(Default)]
struct Report {
    text: String,
    failed: bool,
}

impl Report {
    fn line(&mut self, verdict: &str, what: &str, remark: &str) {
        self.text
            .push_str(&format!("{verdict:<5} {what:<12} {remark}\n"));
    }

    fn fail(&mut self, what: &str, error: &dyn std::error::Error) {
        self.failed = true;
        self.line("error", what, &telemetry::chain(error));
    }
}

pub(super) async fn check(args: CheckArgs) -> anyhow::Result<ExitCode> {
    let mut report = Report::default();
    let policy = check_policy(&args.policy, &mut report);
    check_certificate(&args.tls, &mut report);
    check_database(&args.database, policy.as_ref(), &mut report).await;
    if let (Some(namespace), Some(policy)) = (&args.dry_run_in, &policy) {
        check_cluster(namespace, policy, &mut report).await;
    }
    print(&report.text)?;
    Ok(if report.failed {
        ExitCode::from(2)
    } else {
        ExitCode::SUCCESS
    })
}

fn check_policy(args: &PolicyArgs, report: &mut Report) -> Option<Policy> {
    let policy = match args.file() {
        Ok(policy) => policy,
        Err(error) => {
            report.fail("policy", error.as_ref());
            return None;
        }
    };
    match &args.policy {
        Some(path) => report.line("ok", "policy", &path.display().to_string()),
        None => report.line("ok", "policy", "the default one; --policy is not set"),
    }
    for warning in policy.warnings() {
        report.line("warn", "policy", &warning);
    }
    Some(policy.into())
}

fn check_certificate(args: &TlsArgs, report: &mut Report) {
    const DAY: i64 = 24 * 60 * 60;
    let files = match args.files() {
        Ok(Some(files)) => files,
        Ok(None) => {
            return report.line("skip", "certificate", "--tls-cert and --tls-key are not set");
        }
        Err(error) => return report.fail("certificate", error.as_ref()),
    };
    match files.read().and_then(|pem| Certificate::from_pem(&pem)) {
        Err(error) => report.fail("certificate", &error),
        Ok(certificate) => match certificate.not_after - OffsetDateTime::now_utc().unix_timestamp()
        {
            ..=0 => {
                report.failed = true;
                report.line("error", "certificate", "it has expired; renew it");
            }
            left if left < 7 * DAY => {
                report.line("warn", "certificate", "it expires within 7 days")
            }
            left => {
                report.line("ok", "certificate", &format!("valid for {} more days", left / DAY))
            }
        },
    }
}

async fn check_database(args: &DatabaseArgs, policy: Option<&Policy>, report: &mut Report) {
    let source = match args.source() {
        Ok(Some(source)) => source,
        Ok(None) => return report.line("skip", "database", "--database-url is not set"),
        Err(error) => return report.fail("database", error.as_ref()),
    };
    let Some(policy) = policy else {
        return report.line("skip", "database", "not queried, because the policy is invalid");
    };
    let (url, database) = match (source.url(), Database::connect_lazily(source, policy)) {
        (Ok(url), Ok(database)) => (url.to_string(), database),
        (Err(error), _) | (_, Err(error)) => return report.fail("database", &error),
    };
    match database.check().await {
        Ok(()) => report.line("ok", "database", &format!("{url} answers the policy's query")),
        Err(error) => return report.fail("database", &error),
    }
    if let Some(channel) = &policy.lookup.channel {
        check_channel(&database, channel.as_str(), report).await;
    }
}

/// Without notifications, `converge` finds changed rows by comparison alone, so that this is no error.
async fn check_channel(database: &Database, channel: &str, report: &mut Report) {
    let remark = match database.check_channel(channel).await {
        Err(error) => return report.fail("channel", &error),
        Ok(Notifications::Ready) => {
            let remark =
                format!("a notification on {channel} arrives, and a trigger's function names it");
            return report.line("ok", "channel", &remark);
        }
        Ok(Notifications::NoTrigger) => {
            format!(
                "no trigger's function names {channel}, so no changed row is notified of; see docs/audit.md"
            )
        }
        Ok(Notifications::Lost) => format!(
            "no notification on {channel} arrives: a pooler in transaction mode passes none on; give converge a URL of \
             the database itself"
        ),
        Ok(Notifications::Unsupported) => {
            "SQLite has no notifications; converge compares all pods at its interval".to_owned()
        }
    };
    report.line("warn", "channel", &remark);
}

/// Limit on the time until the webhook is called: after an installation, replicas write its configuration only when they
/// have been ready for some seconds.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

async fn check_cluster(namespace: &str, policy: &Policy, report: &mut Report) {
    let started = Instant::now();
    let mut mode = dry_run_mode(namespace, policy).await;
    while matches!(mode, Ok(None)) && started.elapsed() < CALL_TIMEOUT {
        sleep(Duration::from_secs(1)).await;
        mode = dry_run_mode(namespace, policy).await;
    }
    match mode {
        Ok(Some(mode)) => report.line(
            "ok",
            "cluster",
            &format!("a new pod in {namespace} has {MODE_VARIABLE}={mode}"),
        ),
        Ok(None) => {
            report.failed = true;
            report.line(
                "error",
                "cluster",
                &format!(
                    "a new pod in {namespace} has no {MODE_VARIABLE}; see the webhook configuration: its selectors, \
                     failurePolicy and caBundle"
                ),
            );
        }
        // The answer shows that the webhook is called; the refusal is what this policy says.
        Err(ClusterError::Refused(message))
            if !policy.proxy.as_ref().is_some_and(Proxy::is_complete)
                && message.contains(Refusal::MissingPlatformProxy.code()) =>
        {
            report.line(
                "warn",
                "cluster",
                &format!(
                    "the webhook refuses a new platform_managed pod in {namespace}, because the policy has no complete proxy"
                ),
            );
        }
        Err(error) => report.fail("cluster", &error),
    }
}

/// Returns the mode that the webhook sets on a dry-run pod of an unknown workspace.
async fn dry_run_mode(namespace: &str, policy: &Policy) -> Result<Option<String>, ClusterError> {
    let pod = json!({
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "generateName": "llm-billing-check-",
            "labels": {policy.workspace_label.as_str(): Uuid::nil().to_string()},
        },
        "spec": {
            "containers": [{
                "name": "check",
                "image": "none",
                // Satisfies the `restricted` Pod Security Standard.
                "securityContext": {
                    "allowPrivilegeEscalation": false,
                    "capabilities": {"drop": ["ALL"]},
                    "runAsNonRoot": true,
                    "seccompProfile": {"type": "RuntimeDefault"},
                },
            }],
        },
    });
    let pod: DynamicObject = serde_json::from_value(pod)
        .map_err(|error| ClusterError::Unreachable(error.to_string()))?;
    let resource = ApiResource::erase::<Pod>(&());
    let pods: Api<DynamicObject> =
        Api::namespaced_with(cluster::connect().await?, namespace, &resource);
    let params = PostParams {
        dry_run: true,
        ..PostParams::default()
    };
    let created = pods.create(&params, &pod).await?;
    let containers = created
        .data
        .pointer("/spec/containers")
        .and_then(Value::as_array);
    let mut env = containers
        .into_iter()
        .flatten()
        .filter_map(|container| container.get("env")?.as_array())
        .flatten();
    let mode = env.find(|variable| variable.get("name") == Some(&MODE_VARIABLE.into()));
    let mode = mode.and_then(|variable| variable.get("value")?.as_str());
    Ok(mode.map(str::to_owned))
}
