//! `converge`: runs the process that keeps running pods in sync with the database. Its loop is in converge/.

use std::collections::BTreeSet;
use std::net::{Ipv4Addr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use clap::Args;
use tracing::info;
use uuid::Uuid;

use super::args::{DatabaseArgs, PolicyArgs, positive_duration};
use super::serve::reject_refused_query;
use crate::audit::{Namespaces, Selection};
use crate::cluster;
use crate::converge::{Options, Status, run};
use crate::core::converge::{Budget, Window};
use crate::core::policy::Policy;
use crate::database::Database;
use crate::metrics::ConvergeMetrics;
use crate::server::{StopSignals, serve_health};
use crate::telemetry::{self, LogFormat};

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ConvergeArgs {
    /// Recreates workloads whose pods are out of sync. Otherwise logs, events and metrics show what it would do
    #[arg(long, env = "LLM_BILLING_APPLY")]
    apply: bool,
    /// Pause between comparisons of all pods; changed pods, and rows of which PostgreSQL notifies, are compared at once
    #[arg(long, env = "LLM_BILLING_INTERVAL", value_name = "DURATION", default_value = "30s", value_parser = positive_duration)]
    interval: Duration,
    /// Maximum number of workspaces that are recreated at once
    #[arg(long, env = "LLM_BILLING_MAX_UNAVAILABLE", value_name = "COUNT", default_value = "5", value_parser = clap::value_parser!(u32).range(1..))]
    max_unavailable: u32,
    /// Maximum number of workloads whose recreation begins within a minute
    #[arg(long, env = "LLM_BILLING_RATE", value_name = "COUNT", default_value = "30", value_parser = clap::value_parser!(u32).range(1..))]
    rate: u32,
    /// How long a recreation may take before it counts as failed
    #[arg(long, env = "LLM_BILLING_RECREATION_TIMEOUT", value_name = "DURATION", default_value = "15m", value_parser = positive_duration)]
    recreation_timeout: Duration,
    /// Time after the start in which nothing is recreated, since webhooks may still have an earlier policy
    #[arg(long, env = "LLM_BILLING_START_DELAY", value_name = "DURATION", default_value = "2m", value_parser = humantime::parse_duration)]
    start_delay: Duration,
    /// Recreates only at this time of the day in UTC, such as 22:00-06:00
    #[arg(long, env = "LLM_BILLING_WINDOW", value_name = "HH:MM-HH:MM")]
    window: Option<Window>,
    /// Also evicts pods without a controller, which are not recreated
    #[arg(long, env = "LLM_BILLING_EVICT_BARE")]
    evict_bare: bool,
    /// Only pods of the namespaces that match this label selector [default: all namespaces]
    #[arg(long, env = "LLM_BILLING_NAMESPACE_SELECTOR", value_name = "SELECTOR")]
    namespace_selector: Option<String>,
    /// Namespaces that the webhook does not cover
    #[arg(
        long,
        env = "LLM_BILLING_EXEMPT_NAMESPACE",
        value_name = "NAME",
        value_delimiter = ',',
        default_value = "kube-system"
    )]
    exempt_namespace: Vec<String>,
    /// Lease by which one of several replicas is active
    #[arg(long, env = "LLM_BILLING_LEASE", value_name = "NAME")]
    lease: Option<String>,
    /// Namespace of the Lease [default: the service account's, or the kubeconfig's]
    #[arg(
        long,
        env = "LLM_BILLING_LEASE_NAMESPACE",
        requires = "lease",
        value_name = "NAMESPACE"
    )]
    lease_namespace: Option<String>,
    /// Where health and metrics listen [default: 0.0.0.0:8080]
    #[arg(long, env = "LLM_BILLING_HEALTH_LISTEN", value_name = "ADDRESS:PORT")]
    health_listen: Option<SocketAddr>,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    database: DatabaseArgs,
    /// Log format
    #[arg(
        long,
        env = "LLM_BILLING_LOG_FORMAT",
        value_enum,
        default_value = "json"
    )]
    log_format: LogFormat,
}

const EXAMPLES: &str = "\
Examples:
  llm-billing-webhook converge --policy policy.yaml --database-url-file url            report what is out of sync
  llm-billing-webhook converge --apply --window 22:00-06:00 --lease llm-billing-converge   recreate it at night";

pub(super) async fn converge(args: ConvergeArgs) -> anyhow::Result<ExitCode> {
    let telemetry = telemetry::start(args.log_format)?;
    let policy_text = args.policy.read()?.unwrap_or_default();
    let policy_file = args.policy.parse(&policy_text)?;
    // A checksum over a literal token would confirm a correct guess of it.
    let public_policy = (!policy_file.has_literal_token()).then_some(policy_text.as_str());
    let policy = Policy::from(policy_file);
    let database = Database::connect_lazily(args.database.required()?, &policy)?;
    let selector = args.namespace_selector.clone();
    let selection = Selection {
        namespaces: selector.map_or(Namespaces::All, Namespaces::Selected),
        ..Selection::default()
    };
    selection
        .check(&policy)
        .context("see --namespace-selector")?;
    reject_refused_query(&database).await?;
    // What fails is tried again here, within the budget. A disruption budget refuses with the status of a busy server.
    let (client, _) = cluster::connect_without_retries().await?;
    let identity = format!(
        "{}-{}",
        std::env::var("HOSTNAME").unwrap_or_else(|_| "converge".to_owned()),
        Uuid::new_v4()
    );
    let namespace = args
        .lease_namespace
        .unwrap_or_else(|| client.default_namespace().to_owned());
    let options = Options {
        namespaces: selection.namespaces,
        exempt: args.exempt_namespace.into_iter().collect::<BTreeSet<_>>(),
        interval: args.interval,
        start_delay: args.start_delay,
        applies: args.apply,
        budget: Budget {
            max_unavailable: usize::try_from(args.max_unavailable)?,
            per_minute: usize::try_from(args.rate)?,
            timeout: args.recreation_timeout,
        },
        window: args.window,
        includes_bare: args.evict_bare,
        lease: args.lease.map(|name| (namespace, name)),
        identity,
    };
    let metrics = ConvergeMetrics::new(public_policy, telemetry.dropped_lines.clone());
    let status = Arc::new(Status::new(metrics));
    let default = (Ipv4Addr::UNSPECIFIED, 8080).into();
    let health = serve_health(args.health_listen.unwrap_or(default), Arc::clone(&status))?;
    let mut stop = StopSignals::new()?;
    tokio::select! {
        served = health => served.context("cannot serve health")?,
        () = run(client, database, policy, options, status, stop.received()) => {}
    }
    info!("stopped");
    Ok(ExitCode::SUCCESS)
}
