//! `audit`: prints how running pods differ from the database, and evicts them on request. The sweep is in src/audit.rs.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, bail};
use clap::{Args, ColorChoice, ValueEnum};
use kube::Client;
use serde_json::json;

use super::args::{DatabaseArgs, PolicyArgs};
use super::terminal::{aligned, is_coloured, note, print};
use crate::audit::{AuditedPod, Namespaces, Selection, SweepError, sweep};
use crate::cluster::{self, EventType, Evicted, PodName};
use crate::core::audit::{Finding, Report};
use crate::database::Database;
use crate::metrics::AuditMetrics;
use crate::telemetry;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct AuditArgs {
    /// The namespace whose pods are audited [default: the kubeconfig's, or the service account's]
    #[arg(
        short,
        long,
        env = "LLM_BILLING_NAMESPACE",
        conflicts_with = "all_namespaces"
    )]
    namespace: Option<String>,
    /// Audits the pods of all namespaces
    #[arg(short = 'A', long, env = "LLM_BILLING_ALL_NAMESPACES")]
    all_namespaces: bool,
    /// Audits the pods of the namespaces that match this label selector
    #[arg(
        long,
        env = "LLM_BILLING_NAMESPACE_SELECTOR",
        value_name = "SELECTOR",
        conflicts_with_all = ["namespace", "all_namespaces"]
    )]
    namespace_selector: Option<String>,
    /// Audits only pods that match this label selector
    #[arg(short = 'l', long, env = "LLM_BILLING_SELECTOR")]
    selector: Option<String>,
    /// Audits only the pods of this workspace
    #[arg(long, env = "LLM_BILLING_WORKSPACE", value_name = "ID")]
    workspace: Option<String>,
    /// How to print the pods
    #[arg(
        short,
        long,
        env = "LLM_BILLING_OUTPUT",
        value_enum,
        default_value = "table"
    )]
    output: Output,
    /// Adds source, reason, details and the Secrets of the proxy variables to the table
    #[arg(long, env = "LLM_BILLING_WIDE")]
    wide: bool,
    /// Shows only pods whose env does not match
    #[arg(long, env = "LLM_BILLING_ONLY_DRIFT")]
    only_drift: bool,
    /// When to colour the table
    #[arg(long, env = "LLM_BILLING_COLOR", value_enum, default_value = "auto")]
    color: ColorChoice,
    /// Writes the results as metrics to this file, for the textfile collector of Prometheus' node exporter
    #[arg(long, env = "LLM_BILLING_METRICS_FILE", value_name = "FILE")]
    metrics_file: Option<PathBuf>,
    /// Writes a warning event on each pod whose env does not match
    #[arg(long, env = "LLM_BILLING_EVENTS")]
    events: bool,
    #[command(flatten)]
    eviction: EvictionArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    database: DatabaseArgs,
}

/// Eviction of drifted pods. Their controllers recreate them, and the webhook mutates the new pods.
#[derive(Debug, Args)]
struct EvictionArgs {
    /// Evicts pods whose env does not match, within disruption budgets; asks for confirmation
    #[arg(long, env = "LLM_BILLING_EVICT")]
    evict: bool,
    /// Evicts without confirmation
    #[arg(long, env = "LLM_BILLING_YES", requires = "evict")]
    yes: bool,
    /// Sends the evictions as server-side dry runs, which evict no pod
    #[arg(long, env = "LLM_BILLING_DRY_RUN", requires = "evict")]
    dry_run: bool,
    /// Also evicts pods without a controller, which are not recreated
    #[arg(long, env = "LLM_BILLING_EVICT_BARE", requires = "evict")]
    evict_bare: bool,
    /// Maximum evictions per minute
    #[arg(
        long,
        env = "LLM_BILLING_EVICTIONS_PER_MINUTE",
        value_name = "COUNT",
        default_value = "60",
        value_parser = clap::value_parser!(u32).range(1..)
    )]
    evictions_per_minute: u32,
}

const EXAMPLES: &str = "\
Examples:
  llm-billing-webhook audit -A --only-drift --wide           find pods whose env does not match
  llm-billing-webhook audit -n ws-acme --evict --dry-run     show what an eviction would do";

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// Aligned columns
    Table,
    /// One JSON object with the pods and a summary
    Json,
    /// The same in YAML
    Yaml,
    /// One line per pod
    Csv,
}

pub(super) async fn audit(args: AuditArgs) -> anyhow::Result<ExitCode> {
    let policy = args.policy.load()?;
    let database = Database::connect_lazily(args.database.required()?, &policy)?;
    if args.eviction.evict
        && !args.eviction.dry_run
        && !args.eviction.yes
        && !io::stdin().is_terminal()
    {
        bail!("--evict asks for confirmation, but stdin is not a terminal; add --yes or --dry-run");
    }
    let client = cluster::connect().await?;
    let namespaces = match (&args.namespace, &args.namespace_selector) {
        _ if args.all_namespaces => Namespaces::All,
        (_, Some(selector)) => Namespaces::Selected(selector.clone()),
        (Some(name), None) => Namespaces::One(name.clone()),
        (None, None) => Namespaces::One(client.default_namespace().to_owned()),
    };
    let selection = Selection {
        namespaces,
        labels: args.selector.clone(),
        workspace: args.workspace.clone(),
    };
    selection
        .check(&policy)
        .context("see -n and --namespace-selector")?;
    // Fails before the sweep if the policy's query does not work.
    database.check().await.context("cannot audit")?;

    let mut report = Report::default();
    let mut pods = Vec::new();
    let shows_progress = io::stderr().is_terminal();
    let mut count = 0;
    let each = |audited: AuditedPod| {
        count += 1;
        if shows_progress && count % 100 == 0 {
            // Progress is only for display: an error does not matter.
            let _ = write!(io::stderr(), "\r{count} pods audited");
        }
        if !args.only_drift || !audited.findings.is_empty() {
            pods.push(audited);
        }
    };
    let result = sweep(&client, &database, &policy, &selection, &mut report, each).await;
    if shows_progress && count >= 100 {
        note("\r\x1b[K")?;
    }
    print(&render(&pods, &report, &result, &args)?)?;
    for reason in &report.not_audited {
        note(&format!("error: not audited: {reason}"))?;
    }
    note(&summary(&report, result.is_ok()))?;
    write_metrics(args.metrics_file.as_deref(), &report, &result)?;
    if let Err(error) = result {
        return Err(error).with_context(|| {
            format!(
                "the audit ended early, after {} pods; the others were not audited",
                report.audited
            )
        });
    }
    let drifted: Vec<&AuditedPod> = pods.iter().filter(|pod| !pod.findings.is_empty()).collect();
    let mut failed = !report.not_audited.is_empty();
    if args.events {
        failed |= !warn_on_pods(&client, &drifted).await?;
    }
    if args.eviction.evict && !drifted.is_empty() {
        let (client, server) = cluster::connect_without_retries().await?;
        failed |= !evict(&client, &server, &drifted, &args.eviction).await?;
    }
    Ok(match (failed, drifted.is_empty()) {
        (true, _) => ExitCode::from(2),
        (false, false) => ExitCode::from(1),
        (false, true) => ExitCode::SUCCESS,
    })
}

fn pod_name(pod: &AuditedPod) -> PodName<'_> {
    PodName {
        namespace: &pod.namespace,
        name: &pod.pod,
        uid: &pod.uid,
    }
}

fn join_findings(findings: &[Finding]) -> String {
    let names: Vec<&str> = findings.iter().map(|finding| finding.as_str()).collect();
    names.join(",")
}

fn render(
    pods: &[AuditedPod],
    report: &Report,
    result: &Result<(), SweepError>,
    args: &AuditArgs,
) -> anyhow::Result<String> {
    let document = || {
        let error = result.as_ref().err().map(|error| telemetry::chain(error));
        let summary = json!({
            "audited": report.audited,
            "drifted": report.drifted,
            "not_audited": report.not_audited,
            "complete": result.is_ok() && report.not_audited.is_empty(),
            "error": error,
        });
        json!({"pods": pods, "summary": summary})
    };
    Ok(match args.output {
        Output::Json => format!("{}\n", serde_json::to_string_pretty(&document())?),
        Output::Yaml => serde_saphyr::to_string(&document())?,
        Output::Csv => csv(pods)?,
        Output::Table => table(pods, args.wide, is_coloured(args.color)),
    })
}

const COLUMNS: [&str; 7] = [
    "NAMESPACE",
    "POD",
    "OWNER",
    "WORKSPACE",
    "DATABASE",
    "ENV",
    "FINDINGS",
];
const WIDE_COLUMNS: [&str; 4] = ["SOURCE", "REASON", "DETAILS", "SECRETS"];

fn cells(pod: &AuditedPod) -> [String; 11] {
    let or_dash = |text: &str| {
        if text.is_empty() {
            "-".to_owned()
        } else {
            text.to_owned()
        }
    };
    [
        pod.namespace.clone(),
        pod.pod.clone(),
        or_dash(pod.owner.as_deref().unwrap_or_default()),
        or_dash(&pod.workspace),
        pod.mode.to_string(),
        pod.mode_in_env.clone(),
        or_dash(&join_findings(&pod.findings)),
        pod.source.as_str().to_owned(),
        pod.reason.as_str().to_owned(),
        or_dash(&pod.details.join("; ")),
        or_dash(&pod.secrets.iter().cloned().collect::<Vec<_>>().join("; ")),
    ]
}

/// Returns the pods as a table with aligned columns.
fn table(pods: &[AuditedPod], wide: bool, colour: bool) -> String {
    if pods.is_empty() {
        return String::new();
    }
    let columns = if wide {
        COLUMNS.len() + WIDE_COLUMNS.len()
    } else {
        COLUMNS.len()
    };
    let head = COLUMNS
        .iter()
        .chain(&WIDE_COLUMNS)
        .map(|&name| name.to_owned());
    let mut rows: Vec<Vec<String>> = vec![head.take(columns).collect()];
    rows.extend(
        pods.iter()
            .map(|pod| cells(pod).into_iter().take(columns).collect()),
    );
    let mut text = String::new();
    for (index, line) in aligned(&rows).iter().enumerate() {
        let is_drifted = index > 0
            && pods
                .get(index - 1)
                .is_some_and(|pod| !pod.findings.is_empty());
        text += &match (colour, index, is_drifted) {
            (true, 0, _) => format!("\x1b[1m{line}\x1b[0m\n"),
            (true, _, true) => format!("\x1b[31m{line}\x1b[0m\n"),
            _ => format!("{line}\n"),
        };
    }
    text
}

fn csv(pods: &[AuditedPod]) -> anyhow::Result<String> {
    let mut writer = csv::Writer::from_writer(Vec::new());
    let head = COLUMNS
        .iter()
        .chain(&WIDE_COLUMNS)
        .map(|name| name.to_lowercase());
    writer.write_record(head)?;
    for pod in pods {
        writer.write_record(cells(pod))?;
    }
    Ok(String::from_utf8(writer.into_inner()?)?)
}

fn summary(report: &Report, is_complete: bool) -> String {
    let Report {
        audited,
        drifted,
        not_audited,
        by_finding,
    } = report;
    let mut counts: BTreeMap<Finding, usize> = BTreeMap::new();
    for ((_, finding), count) in by_finding {
        *counts.entry(*finding).or_default() += count;
    }
    let counts: Vec<String> = counts
        .iter()
        .map(|(finding, count)| format!("{} {count}", finding.as_str()))
        .collect();
    match (audited, drifted) {
        _ if !is_complete || !not_audited.is_empty() => {
            format!("{audited} pods audited, {drifted} drifted; the audit is incomplete")
        }
        (0, _) => "no pods found".to_owned(),
        (_, 0) => format!("{audited} pods audited, all in sync"),
        (_, _) => format!("{audited} pods audited, {drifted} drifted: {}", counts.join(", ")),
    }
}

/// Replaces the file atomically. An incomplete audit leaves it unchanged: its counts would be too low.
fn write_metrics(
    file: Option<&Path>,
    report: &Report,
    result: &Result<(), SweepError>,
) -> anyhow::Result<()> {
    let (Some(file), Ok(())) = (file, result) else {
        return Ok(());
    };
    if !report.not_audited.is_empty() {
        return Ok(());
    }
    let metrics = AuditMetrics::default();
    metrics.record(report);
    let mut new = file.as_os_str().to_owned();
    new.push(".new");
    let written = fs::write(&new, metrics.encode()?).and_then(|()| fs::rename(&new, file));
    written.with_context(|| format!("cannot write {}", file.display()))
}

/// Writes a warning event on each pod. Returns whether all events were written.
async fn warn_on_pods(client: &Client, pods: &[&AuditedPod]) -> anyhow::Result<bool> {
    let mut succeeded = true;
    for pod in pods {
        let message = format!(
            "the env of this pod does not match the billing mode ({}): {}",
            join_findings(&pod.findings),
            pod.details.join("; ")
        );
        let kind = EventType::Warning;
        let written =
            cluster::event_on_pod(client, pod_name(pod), kind, "LlmBillingDrift", &message).await;
        if let Err(error) = written {
            succeeded = false;
            note(&format!(
                "error: cannot write an event on {}/{}: {}",
                pod.namespace,
                pod.pod,
                telemetry::chain(&error)
            ))?;
        }
    }
    Ok(succeeded)
}

/// Evicts the pods. Returns whether no eviction failed; skipping a pod is no failure.
async fn evict(
    client: &Client,
    server: &str,
    pods: &[&AuditedPod],
    args: &EvictionArgs,
) -> anyhow::Result<bool> {
    let skip_reason = |pod: &AuditedPod| match &pod.owner {
        _ if pod.namespace == "kube-system" => Some("the webhook does not cover kube-system"),
        _ if pod.findings.contains(&Finding::Refused) => {
            Some("the webhook would refuse its replacement")
        }
        None if !args.evict_bare => Some("no controller would recreate it; see --evict-bare"),
        Some(owner) if owner.starts_with("Node/") => {
            Some("the kubelet would restart this static pod unchanged")
        }
        None | Some(_) => None,
    };
    let candidates = pods.iter().filter(|pod| skip_reason(pod).is_none()).count();
    if !args.yes && !args.dry_run && candidates > 0 && !is_confirmed(candidates, server)? {
        note("no pod evicted")?;
        return Ok(true);
    }
    let pause = Duration::from_secs(60) / args.evictions_per_minute;
    let (mut succeeded, mut first) = (true, true);
    for pod in pods {
        let name = format!("{}/{}", pod.namespace, pod.pod);
        if let Some(reason) = skip_reason(pod) {
            note(&format!("skipped {name}: {reason}"))?;
            continue;
        }
        if !first && !args.dry_run {
            tokio::time::sleep(pause).await;
        }
        first = false;
        match cluster::evict(client, pod_name(pod), args.dry_run).await {
            Ok(Evicted::Done) if args.dry_run => note(&format!("would evict {name}"))?,
            Ok(Evicted::Done) => note(&format!("evicted {name}"))?,
            Ok(Evicted::Kept(message)) => note(&format!("skipped {name}: {message}"))?,
            Ok(Evicted::Gone) => note(&format!("skipped {name}: already deleted or replaced"))?,
            Err(error) => {
                succeeded = false;
                note(&format!("error: cannot evict {name}: {}", telemetry::chain(&error)))?;
            }
        }
    }
    Ok(succeeded)
}

fn is_confirmed(pods: usize, server: &str) -> io::Result<bool> {
    write!(
        io::stderr(),
        "Evict {pods} pods at {server}? Their controllers will recreate them. [y/N] "
    )?;
    let mut answer = String::new();
    io::stdin().lock().read_line(&mut answer)?;
    Ok(["y", "yes"].contains(&answer.trim().to_lowercase().as_str()))
}
