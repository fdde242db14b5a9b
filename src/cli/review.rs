//! `review`: shows what the webhook would change in a manifest or a cluster object, as a diff, a patch or the result.
//! core/workload.rs finds the pods in an object.

use std::fmt;
use std::fs::{self, DirEntry};
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::str::FromStr;
use std::sync::Arc;

use anyhow::{Context, anyhow, bail};
use clap::{Args, ColorChoice, ValueEnum};
use json_patch::Patch;
use serde_json::Value;
use similar::{ChangeTag, TextDiff};

use super::args::{DatabaseArgs, PolicyArgs};
use super::terminal::{is_coloured, note, print};
use super::workspace;
use crate::cluster;
use crate::core::decision::{Outcome, PodTarget};
use crate::core::patch::patch;
use crate::core::policy::Policy;
use crate::core::resolution::BillingMode;
use crate::core::workload::{Subject, TemplatePath, dotted, subjects};
use crate::database::Database;
use crate::telemetry;

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct ReviewArgs {
    /// A file of pods, workloads, Lists or AdmissionReviews in YAML or JSON, or a directory of such files; `-` for
    /// standard input. Can be given several times
    #[arg(
        short,
        long,
        env = "LLM_BILLING_FILENAME",
        value_name = "FILE",
        required_unless_present = "object",
        conflicts_with = "object"
    )]
    filename: Vec<PathBuf>,
    /// Reads the directories below a directory too
    #[arg(short = 'R', long, env = "LLM_BILLING_RECURSIVE")]
    recursive: bool,
    /// Where a kind that the program does not know has its pod template, such as `Workspace=spec.podTemplate`; `*` is
    /// each item of a list. Can be given several times
    #[arg(long, env = "LLM_BILLING_TEMPLATE_PATH", value_name = "KIND=PATH")]
    template_path: Vec<TemplatePath>,
    /// A cluster object instead of a file, such as `pod/NAME` or `deployment/NAME`
    #[arg(value_name = "KIND/NAME")]
    object: Option<ObjectName>,
    /// What to print
    #[arg(
        short,
        long,
        env = "LLM_BILLING_OUTPUT",
        value_enum,
        default_value = "diff"
    )]
    output: Output,
    /// Uses this mode instead of a database lookup
    #[arg(long, env = "LLM_BILLING_MODE", value_parser = workspace::mode)]
    mode: Option<BillingMode>,
    /// Namespace of the object, or of objects in a file without one [default: the kubeconfig's for an object,
    /// `default` in a file]
    #[arg(short, long, env = "LLM_BILLING_NAMESPACE")]
    namespace: Option<String>,
    /// When to colour a diff
    #[arg(long, env = "LLM_BILLING_COLOR", value_enum, default_value = "auto")]
    color: ColorChoice,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    database: DatabaseArgs,
}

const EXAMPLES: &str = "\
Examples:
  llm-billing-webhook review -f pod.yaml --mode byok                   without a database
  kubectl kustomize . | llm-billing-webhook review -f - --mode platform_managed --policy policy.yaml
  llm-billing-webhook review -R -f manifests --mode byok               a directory and below
  llm-billing-webhook review -n ws-acme deployment/agent -o patch      an object in the cluster";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    /// Unified diff of the objects in YAML
    Diff,
    /// One JSON patch per object
    Patch,
    /// The patched objects in YAML
    Yaml,
    /// The patched objects in JSON
    Json,
}

pub(super) async fn review(args: ReviewArgs) -> anyhow::Result<ExitCode> {
    let (inputs, documents) = documents(&args).await?;
    let policy = args.policy.load()?;
    let source = args.database.source()?;
    let database = source
        .map(|source| Database::connect_lazily(source, &policy))
        .transpose()?;
    let subjects: Vec<Subject> = documents
        .into_iter()
        .flat_map(|document| {
            let namespace = args.namespace.as_deref().unwrap_or("default");
            subjects(document, namespace, &args.template_path)
        })
        .collect();
    if !subjects.iter().any(Subject::makes_pods) {
        bail!(
            "{inputs} has no object that makes pods; expected a Pod, a workload, a List or an AdmissionReview of pods; \
             --template-path names the pod template of another kind"
        );
    }

    let colour = is_coloured(args.color);
    let (mut printed, mut changed, mut refused) = (String::new(), false, false);
    for subject in &subjects {
        let title = &subject.title;
        if !subject.is_planned() {
            let what = if subject.makes_pods() {
                "is not created"
            } else {
                "makes no pods"
            };
            note(&format!("{title}: {what}, and stays as it is"))?;
        }
        let patch = match patch_of(subject, &policy, database.as_ref(), args.mode).await {
            Ok(patch) => patch,
            Err(error) => {
                refused = true;
                note(&format!("error: {title}: {}", telemetry::chain(error.as_ref())))?;
                continue;
            }
        };
        changed |= !patch.0.is_empty();
        let mut after = subject.object.clone();
        json_patch::patch(&mut after, &patch)
            .with_context(|| format!("{title}: the patch does not apply"))?;
        printed += &match args.output {
            Output::Diff => diff(title, &yaml(&subject.object)?, &yaml(&after)?, colour),
            Output::Patch => format!("{}\n", serde_json::to_string_pretty(&patch)?),
            Output::Yaml => format!("---\n{}", yaml(&after)?),
            Output::Json => format!("{}\n", serde_json::to_string_pretty(&after)?),
        };
    }
    print(&printed)?;
    Ok(match (refused, changed) {
        (true, _) => ExitCode::from(2),
        (false, true) => ExitCode::from(1),
        (false, false) => ExitCode::SUCCESS,
    })
}

/// Returns the inputs' names for messages, and their documents.
async fn documents(args: &ReviewArgs) -> anyhow::Result<(String, Vec<Value>)> {
    if let Some(object) = &args.object {
        let input = object.to_string();
        let client = cluster::connect().await?;
        let namespace = args.namespace.as_deref();
        let path = object.path(namespace.unwrap_or_else(|| client.default_namespace()));
        let document = cluster::get(&client, &path)
            .await
            .with_context(|| format!("cannot read {input}"))?;
        return Ok((input, vec![document]));
    }
    let is_standard_input = |path: &&PathBuf| path.as_path() == Path::new("-");
    if args.filename.iter().filter(is_standard_input).count() > 1 {
        bail!("standard input is given more than once, and can be read only once");
    }
    let mut inputs = Vec::new();
    for path in &args.filename {
        add_files(path, args.recursive, &mut inputs)?;
    }
    let mut all = Vec::new();
    for path in inputs {
        let failed = || format!("cannot read {}", input_name(&path));
        let text = read(&path).with_context(failed)?;
        all.append(&mut parse(&text).with_context(failed)?);
    }
    let names: Vec<String> = args.filename.iter().map(|path| input_name(path)).collect();
    Ok((names.join(", "), all))
}

fn input_name(path: &Path) -> String {
    if path == Path::new("-") {
        return "standard input".to_owned();
    }
    path.display().to_string()
}

/// Adds a file, or a directory's manifests by name, as kubectl does: files that end in .json, .yaml or .yml.
fn add_files(path: &Path, recursive: bool, files: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    if path == Path::new("-") || !path.is_dir() {
        files.push(path.to_owned());
        return Ok(());
    }
    let failed = || format!("cannot read {}", path.display());
    let entries: Result<Vec<_>, _> = fs::read_dir(path).with_context(failed)?.collect();
    let mut entries = entries.with_context(failed)?;
    entries.sort_by_key(DirEntry::path);
    let before = files.len();
    for entry in entries {
        let path = entry.path();
        let extension = path.extension().unwrap_or_default();
        // A link to a directory is not followed: it can lead back to this one.
        if entry.file_type().with_context(failed)?.is_dir() {
            if recursive {
                add_files(&path, recursive, files)?;
            }
        } else if ["json", "yaml", "yml"]
            .iter()
            .any(|known| extension == *known)
        {
            files.push(path);
        }
    }
    if files.len() == before && !recursive {
        bail!(
            "{} has no .json, .yaml or .yml file; -R reads the directories below it too",
            path.display()
        );
    }
    Ok(())
}

/// A cluster object, by kind and name as in kubectl.
#[derive(Clone, Debug)]
struct ObjectName {
    kind: Kind,
    name: String,
}

/// Singular name, short name, API path and plural name.
type Kind = &'static (&'static str, &'static str, &'static str, &'static str);

const KINDS: [(&str, &str, &str, &str); 7] = [
    ("pod", "po", "api/v1", "pods"),
    ("deployment", "deploy", "apis/apps/v1", "deployments"),
    ("statefulset", "sts", "apis/apps/v1", "statefulsets"),
    ("daemonset", "ds", "apis/apps/v1", "daemonsets"),
    ("replicaset", "rs", "apis/apps/v1", "replicasets"),
    ("job", "job", "apis/batch/v1", "jobs"),
    ("cronjob", "cj", "apis/batch/v1", "cronjobs"),
];

impl FromStr for ObjectName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || {
            let kinds: Vec<&str> = KINDS.iter().map(|kind| kind.0).collect();
            format!("expected KIND/NAME, with a kind of {}", kinds.join(", "))
        };
        let (kind, name) = text.split_once('/').ok_or_else(expected)?;
        let is_kind =
            |known: &&(&str, &str, &str, &str)| [known.0, known.1, known.3].contains(&kind);
        let is_name = |c: char| c.is_ascii_alphanumeric() || "-.".contains(c);
        match KINDS.iter().find(is_kind) {
            Some(kind) if !name.is_empty() && name.chars().all(is_name) => Ok(Self {
                kind,
                name: name.to_owned(),
            }),
            _ => Err(expected()),
        }
    }
}

impl ObjectName {
    fn path(&self, namespace: &str) -> String {
        let (_, _, api, plural) = self.kind;
        format!("/{api}/namespaces/{namespace}/{plural}/{}", self.name)
    }
}

impl fmt::Display for ObjectName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.kind.0, self.name)
    }
}

fn read(path: &Path) -> io::Result<String> {
    if path != Path::new("-") {
        return fs::read_to_string(path);
    }
    let mut text = String::new();
    io::stdin().read_to_string(&mut text)?;
    Ok(text)
}

/// Parses the documents of a JSON or YAML text. Errors name the position and never quote the text.
fn parse(text: &str) -> anyhow::Result<Vec<Value>> {
    // A leading brace also starts a YAML flow mapping.
    let json = text
        .trim_start()
        .starts_with('{')
        .then(|| serde_json::from_str(text));
    if let Some(Ok(document)) = json {
        return Ok(vec![document]);
    }
    // Like kubectl: 0440 is an octal number.
    let options = serde_saphyr::options! { legacy_octal_numbers: true };
    let documents: Result<Vec<Value>, _> = serde_saphyr::from_multiple_with_options(text, options);
    let documents =
        documents.map_err(|error| match (json, error.without_snippet().location()) {
            (Some(Err(json)), _) => {
                anyhow!("line {}, column {}: this is not valid JSON", json.line(), json.column())
            }
            (_, Some(at)) => {
                anyhow!("line {}, column {}: this is not valid YAML", at.line(), at.column())
            }
            (_, None) => anyhow!("this is not valid YAML"),
        })?;
    Ok(documents
        .into_iter()
        .filter(|document| !document.is_null())
        .collect())
}

/// Returns the webhook's patch for a subject; empty if it changes nothing.
async fn patch_of(
    subject: &Subject,
    policy: &Policy,
    database: Option<&Arc<Database>>,
    mode: Option<BillingMode>,
) -> anyhow::Result<Patch> {
    let mut operations = Patch::default();
    let roots = subject.roots();
    for root in &roots {
        // Messages name the template if there are several.
        let title = match roots.len() {
            1 => subject.title.clone(),
            _ => format!("{} {}", subject.title, dotted(root)),
        };
        let patch = patch_at(subject, root, &title, policy, database, mode).await?;
        operations.0.extend(patch.0);
    }
    Ok(operations)
}

async fn patch_at(
    subject: &Subject,
    root: &str,
    title: &str,
    policy: &Policy,
    database: Option<&Arc<Database>>,
    mode: Option<BillingMode>,
) -> anyhow::Result<Patch> {
    let (pod, old) = (subject.pod(root)?, subject.old_pod()?);
    let target = PodTarget {
        pod: &pod,
        namespace: &subject.namespace,
        scope: subject.scope(old.as_ref()),
    };
    let decision = workspace::decide(policy, database, mode, target).await?;
    match decision.outcome {
        Outcome::NotApplicable => return Ok(Patch::default()),
        Outcome::NotAWorkspace => {
            let label = policy.workspace_label.as_str();
            note(&format!("{title}: has no label {label}, and stays as it is"))?;
            return Ok(Patch::default());
        }
        Outcome::Refused(refusal) => return Err(refusal.into()),
        Outcome::Unchanged | Outcome::Patched => {}
    }
    let (Some(resolution), Some(plan)) = (decision.resolution, &decision.plan) else {
        bail!("the decision has no resolution or no plan");
    };
    for warning in decision.warnings() {
        note(&format!("warning: {title}: {}", warning.text))?;
    }
    let (source, reason) = (resolution.source.as_str(), resolution.reason.as_str());
    let mode = resolution.mode;
    note(&format!("{title}: {mode} ({source}, {reason})"))?;
    for secret in plan.secrets() {
        note(&format!("{title}: needs Secret {secret} in namespace {}", subject.namespace))?;
    }
    Ok(serde_json::from_str(&patch(plan, root).json)?)
}

fn yaml(object: &Value) -> anyhow::Result<String> {
    let mut text = serde_saphyr::to_string(object)?;
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// Returns a unified diff with three lines of context, coloured like git's.
fn diff(title: &str, before: &str, after: &str, colour: bool) -> String {
    let diff = TextDiff::from_lines(before, after);
    let mut unified = diff.unified_diff();
    unified
        .context_radius(3)
        .header(title, &format!("{title} (reviewed)"));
    if !colour {
        return unified.to_string();
    }
    let mut text = String::new();
    for hunk in unified.iter_hunks() {
        text.push_str(&format!("\x1b[36m{}\x1b[0m\n", hunk.header()));
        for change in hunk.iter_changes() {
            let (sign, colour) = match change.tag() {
                ChangeTag::Delete => ('-', "\x1b[31m"),
                ChangeTag::Insert => ('+', "\x1b[32m"),
                ChangeTag::Equal => (' ', ""),
            };
            let reset = if colour.is_empty() { "" } else { "\x1b[0m" };
            text.push_str(&format!(
                "{colour}{sign}{}{reset}\n",
                change.value().trim_end_matches('\n')
            ));
        }
    }
    if text.is_empty() {
        text
    } else {
        format!("\x1b[1m--- {title}\n+++ {title} (reviewed)\x1b[0m\n{text}")
    }
}
