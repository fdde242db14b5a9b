//! `resolve`, and `workspace list|set|clear` on the embedded database.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::{Context, bail};
use clap::{Args, Subcommand, ValueEnum};
use serde::Deserialize;
use serde_json::json;
use uuid::Uuid;

use super::args::{DatabaseArgs, PolicyArgs};
use super::dev::DEV_DATABASE;
use super::terminal::{note, print};
use crate::core::decision::{Decision, PodTarget, Step, begin_pod};
use crate::core::plan::Scope;
use crate::core::pod::Pod;
use crate::core::policy::Policy;
use crate::core::resolution::{BillingMode, LookupOutcome};
use crate::database::{Database, DatabaseUrl, Embedded};

#[derive(Debug, Args)]
#[command(after_help = RESOLVE_EXAMPLES)]
pub(super) struct ResolveArgs {
    /// The workspace's id: the value of its pods' workspace label
    workspace: String,
    /// The namespace of its pods, for policies whose query uses it
    #[arg(short, long, env = "LLM_BILLING_NAMESPACE", default_value = "default")]
    namespace: String,
    /// Further labels of its pods, for policies whose query uses them
    #[arg(
        short,
        long,
        env = "LLM_BILLING_LABEL",
        value_delimiter = ',',
        value_name = "KEY=VALUE"
    )]
    label: Vec<String>,
    /// How to print the answer
    #[arg(
        short,
        long,
        env = "LLM_BILLING_OUTPUT",
        value_enum,
        default_value = "text"
    )]
    output: Output,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    database: DatabaseArgs,
}

const RESOLVE_EXAMPLES: &str = "\
Examples:
  llm-billing-webhook resolve 22222222-2222-4222-8222-222222222222 --database-url-file url
  llm-billing-webhook resolve 22222222-2222-4222-8222-222222222222 -n ws-acme -o json";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    /// One line per field
    Text,
    /// One JSON object
    Json,
}

pub(super) async fn resolve(args: ResolveArgs) -> anyhow::Result<ExitCode> {
    let policy = args.policy.load()?;
    let mut labels = BTreeMap::from([(policy.workspace_label.as_str(), args.workspace.as_str())]);
    for label in &args.label {
        let (key, value) = label.split_once('=').context("--label takes KEY=VALUE")?;
        labels.insert(key, value);
    }
    let pod = json!({"metadata": {"labels": labels}});
    let pod = Pod::deserialize(&pod)?;
    let database = Database::connect_lazily(args.database.required()?, &policy)?;
    let target = PodTarget {
        pod: &pod,
        namespace: &args.namespace,
        scope: Scope::Pod,
    };
    let decision = decide(&policy, Some(&database), None, target).await?;
    // The pod has a workspace label, so it has a resolution even if it is refused.
    let resolution = decision.resolution.context("the pod has no workspace id")?;
    match args.output {
        Output::Json => print(&format!("{}\n", serde_json::to_string(&resolution)?)),
        Output::Text => print(&format!(
            "mode:   {}\nsource: {}\nreason: {}\n",
            resolution.mode,
            resolution.source.as_str(),
            resolution.reason.as_str()
        )),
    }
}

/// Returns the decision about a pod, with the given mode or the database's. A failed lookup is an error, regardless of
/// the policy's `lookup.onError`.
pub(super) async fn decide<'a>(
    policy: &'a Policy,
    database: Option<&Arc<Database>>,
    given: Option<BillingMode>,
    target: PodTarget<'a>,
) -> anyhow::Result<Decision<'a>> {
    let (parameters, pending) = match begin_pod(policy, target) {
        Step::Done(decision) => return Ok(decision),
        Step::Lookup(parameters, pending) => (parameters, pending),
    };
    let outcome = match (given, database) {
        (Some(mode), _) => LookupOutcome::of_mode(Some(mode.as_str())),
        (None, Some(database)) => database.lookup(parameters, None).await?,
        (None, None) => {
            bail!("no database is given; set --database-url, or --mode to skip the lookup")
        }
    };
    Ok(pending.finish(&outcome))
}

#[derive(Debug, Subcommand)]
#[command(after_help = WORKSPACE_EXAMPLES)]
pub(super) enum WorkspaceCommand {
    /// Prints all workspaces with their modes; `-` if none is set
    List(EmbeddedArgs),
    /// Sets a workspace's mode, and adds the workspace if it is new
    Set {
        /// The workspace's id
        id: Uuid,
        /// `platform_managed`, `byok` or `disabled`
        #[arg(value_parser = mode)]
        mode: BillingMode,
        #[command(flatten)]
        embedded: EmbeddedArgs,
    },
    /// Resets a workspace's mode to the platform's default, which is `platform_managed`
    Clear {
        /// The workspace's id
        id: Uuid,
        #[command(flatten)]
        embedded: EmbeddedArgs,
    },
}

const WORKSPACE_EXAMPLES: &str = "\
Examples:
  llm-billing-webhook workspace list
  llm-billing-webhook workspace set 22222222-2222-4222-8222-222222222222 byok";

#[derive(Debug, Args)]
pub(super) struct EmbeddedArgs {
    #[command(flatten)]
    database: DatabaseArgs,
}

impl EmbeddedArgs {
    async fn open(&self) -> anyhow::Result<Embedded> {
        let url = match self.database.source()? {
            Some(source) => source.url()?,
            None => DEV_DATABASE.parse::<DatabaseUrl>()?,
        };
        Ok(Embedded::open(&url).await?)
    }
}

/// Parses the exact spelling of a mode.
pub(super) fn mode(text: &str) -> Result<BillingMode, String> {
    BillingMode::from_column(text).ok_or_else(|| {
        let modes = BillingMode::ALL.map(BillingMode::as_str).join(", ");
        format!("expected one of {modes}")
    })
}

pub(super) async fn workspace(command: WorkspaceCommand) -> anyhow::Result<ExitCode> {
    let report = |id: Uuid, mode: Option<BillingMode>| {
        let mode = mode.map_or("the platform's default", BillingMode::as_str);
        note(&format!("workspace {id} is set to {mode}; it applies to pods created from now on"))
    };
    match command {
        WorkspaceCommand::List(embedded) => {
            let mut embedded = embedded.open().await?;
            let workspaces = embedded.list().await?;
            embedded.close().await?;
            let line = |(id, mode): (String, Option<String>)| {
                format!("{id}  {}\n", mode.as_deref().unwrap_or("-"))
            };
            print(&workspaces.into_iter().map(line).collect::<String>())
        }
        WorkspaceCommand::Set { id, mode, embedded } => {
            let mut embedded = embedded.open().await?;
            embedded.set(id, Some(mode)).await?;
            embedded.close().await?;
            report(id, Some(mode))?;
            Ok(ExitCode::SUCCESS)
        }
        WorkspaceCommand::Clear { id, embedded } => {
            let mut embedded = embedded.open().await?;
            embedded.set(id, None).await?;
            embedded.close().await?;
            report(id, None)?;
            Ok(ExitCode::SUCCESS)
        }
    }
}
