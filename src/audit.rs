//! A sweep over the running pods: lists them in pages, looks up their modes and audits each pod. Output and eviction
//! are in cli, metrics in server.

use std::collections::{BTreeMap, BTreeSet};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use k8s_openapi::api::core::v1::{Namespace, Pod as PodResource};
use kube::api::{ListParams, Request};
use kube::{Api, Client, Resource};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use thiserror::Error;
use tokio::task::block_in_place;

use crate::cluster::ClusterError;
use crate::core::audit::{Finding, Report, Verdict, audit};
use crate::core::decision::{Decision, Outcome, PodTarget, Step, begin_pod};
use crate::core::identity::ParameterValue;
use crate::core::plan::Scope;
use crate::core::pod::{Pod, Text};
use crate::core::policy::Policy;
use crate::core::policy_file::Unlabelled;
use crate::core::resolution::{BillingMode, Reason, Resolution, Source};
use crate::database::{Database, LookupError};

/// Limit on the pods of a page, and therefore on the workspaces of a query. kubectl uses the same.
const PAGE_SIZE: u32 = 500;

/// The namespaces whose pods are audited.
#[derive(Clone, Debug, Default)]
pub enum Namespaces {
    /// All namespaces.
    #[default]
    All,
    /// One namespace, by name.
    One(String),
    /// The namespaces that match a label selector.
    Selected(String),
}

/// The pods to audit.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Their namespaces.
    pub namespaces: Namespaces,
    /// A label selector that they must also match.
    pub labels: Option<String>,
    /// The workspace id that they must have.
    pub workspace: Option<String>,
}

impl Selection {
    /// Checks that the selection names namespaces or a workspace if the policy covers pods without the workspace
    /// label. Only the namespaces tell which of these pods the webhook covers.
    ///
    /// # Errors
    /// [`SweepError::Scope`]
    pub fn check(&self, policy: &Policy) -> Result<(), SweepError> {
        match (policy.unlabelled, &self.namespaces) {
            (Unlabelled::PlatformManaged | Unlabelled::Deny, Namespaces::All)
                if self.workspace.is_none() =>
            {
                Err(SweepError::Scope)
            }
            _ => Ok(()),
        }
    }

    /// Returns the label selector for the list request. Pods without the workspace label are listed too: some have lost
    /// it, and a selector cannot name an annotation.
    fn label_selector(&self, policy: &Policy) -> String {
        let label = policy.workspace_label.as_str();
        let workspace = self.workspace.as_ref().map(|id| format!("{label}={id}"));
        let parts: Vec<String> = workspace.into_iter().chain(self.labels.clone()).collect();
        parts.join(",")
    }
}

/// One pod and its verdict.
#[derive(Clone, Debug, Serialize)]
pub struct AuditedPod {
    /// Its namespace.
    pub namespace: String,
    /// Its name.
    pub pod: String,
    /// Distinguishes it from a later pod of the same name.
    #[serde(skip)]
    pub uid: String,
    /// The controller that would recreate it, as `Kind/name`.
    pub owner: Option<String>,
    /// The workspace id in its label.
    pub workspace: String,
    /// The resolved mode.
    pub mode: BillingMode,
    /// The mode's source.
    pub source: Source,
    /// The rule that gave the mode.
    pub reason: Reason,
    /// The mode in its env; `-` if none.
    pub mode_in_env: String,
    /// Empty if its env matches the mode.
    pub findings: Vec<Finding>,
    /// Details of the findings: names, never values.
    pub details: Vec<String>,
    /// The Secrets of its namespace that its proxy variables refer to, each as `NAME (key KEY)`.
    pub secrets: BTreeSet<String>,
    /// Distinguishes the states of the workspace's row, as far as its pods' env depends on them.
    #[serde(skip)]
    pub fingerprint: u64,
}

/// Why a sweep ended early.
#[derive(Debug, Error)]
pub enum SweepError {
    /// The policy covers pods without the label, but the selection names no namespaces.
    #[error(
        "the policy's `unlabelled` also covers pods without the workspace label; \
         select the namespaces that the webhook covers"
    )]
    Scope,
    /// The namespaces cannot be listed.
    #[error("cannot list the namespaces")]
    Namespaces(#[source] ClusterError),
    /// The pods cannot be listed.
    #[error("cannot list the pods in {0}")]
    List(String, #[source] ClusterError),
    /// The list's continue token expired.
    #[error(
        "the list of pods in {0} expired before its end: too many pods, or a slow database; \
         audit one namespace at a time"
    )]
    Expired(String),
    /// The response is not a list of pods.
    #[error("cannot read the list of pods in {0}")]
    Page(String),
    /// The modes cannot be looked up.
    #[error("cannot look up the modes of the workspaces in {0}")]
    Lookup(String, #[source] LookupError),
}

#[derive(Deserialize)]
struct Page<'a> {
    metadata: PageMetadata,
    #[serde(borrow)]
    items: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
struct PageMetadata {
    #[serde(default, rename = "continue")]
    next: String,
}

/// The pod fields that only the audit reads.
#[derive(Deserialize)]
struct Running<'a> {
    #[serde(borrow)]
    metadata: RunningMetadata<'a>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RunningMetadata<'a> {
    #[serde(borrow, default)]
    name: Text<'a>,
    #[serde(borrow, default)]
    namespace: Text<'a>,
    #[serde(borrow, default)]
    uid: Text<'a>,
    #[serde(borrow)]
    deletion_timestamp: Option<Text<'a>>,
    #[serde(borrow, default)]
    owner_references: Vec<Owner<'a>>,
}

impl RunningMetadata<'_> {
    fn title(&self) -> String {
        format!("{}/{}", self.namespace.as_str(), self.name.as_str())
    }
}

#[derive(Deserialize)]
struct Owner<'a> {
    #[serde(borrow, default)]
    kind: Text<'a>,
    #[serde(borrow, default)]
    name: Text<'a>,
    controller: Option<bool>,
}

/// Audits the selected running pods, one page at a time, and passes each to `each`. `report` counts the pods audited
/// so far, even if the sweep ends early.
///
/// # Errors
/// [`SweepError`]. Pods that were not audited are not counted in `report.audited`.
///
/// # Panics
/// On Tokio's current-thread runtime: parsing a page uses [`block_in_place`].
pub async fn sweep(
    client: &Client,
    database: &Arc<Database>,
    policy: &Policy,
    selection: &Selection,
    report: &mut Report,
    mut each: impl FnMut(AuditedPod),
) -> Result<(), SweepError> {
    selection.check(policy)?;
    let namespaces = match &selection.namespaces {
        Namespaces::All => vec![None],
        Namespaces::One(name) => vec![Some(name.clone())],
        Namespaces::Selected(selector) => {
            let selected = selected_namespaces(client, selector).await?;
            selected.into_iter().map(Some).collect()
        }
    };
    let labels = selection.label_selector(policy);
    for namespace in namespaces {
        let location = match &namespace {
            Some(namespace) => format!("namespace {namespace}"),
            None => "all namespaces".to_owned(),
        };
        let request = Request::new(PodResource::url_path(&(), namespace.as_deref()));
        let mut parameters = ListParams::default()
            .labels(&labels)
            // A pod that has ended uses no key.
            .fields("status.phase!=Succeeded,status.phase!=Failed")
            .limit(PAGE_SIZE);
        loop {
            let list_error = |error: kube::Error| match error {
                kube::Error::Api(status) if status.code == 410 => {
                    SweepError::Expired(location.clone())
                }
                error => SweepError::List(location.clone(), error.into()),
            };
            let page = request.list(&parameters).map_err(|error| {
                let error = ClusterError::Unreachable(error.to_string());
                SweepError::List(location.clone(), error)
            })?;
            let page = client.request_text(page).await.map_err(list_error)?;
            // Parsing and planning 500 large pods takes long; meanwhile another thread serves admissions and probes.
            let page: Page<'_> = block_in_place(|| serde_json::from_str(&page))
                .map_err(|_| SweepError::Page(location.clone()))?;
            let items: Vec<&str> = page.items.iter().map(|item| item.get()).collect();
            for verdict in audit_pods(&items, database, policy, &location).await? {
                match verdict {
                    Ok(audited) => {
                        report.count(audited.mode, &audited.findings);
                        each(audited);
                    }
                    Err(reason) => report.not_audited.push(reason),
                }
            }
            if page.metadata.next.is_empty() {
                break;
            }
            parameters = parameters.continue_token(&page.metadata.next);
        }
    }
    Ok(())
}

/// Returns the names of the namespaces that match a label selector.
///
/// # Errors
/// [`SweepError::Namespaces`]
pub(crate) async fn selected_namespaces(
    client: &Client,
    selector: &str,
) -> Result<BTreeSet<String>, SweepError> {
    let all: Api<Namespace> = Api::all(client.clone());
    let selected = ListParams::default().labels(selector);
    let list = all.list_metadata(&selected).await;
    let list = list.map_err(|error| SweepError::Namespaces(error.into()))?;
    let names = list.items.into_iter();
    Ok(names
        .filter_map(|namespace| namespace.metadata.name)
        .collect())
}

/// An audited pod, or why it was not audited.
type PodAudit = Result<AuditedPod, String>;

/// Audits pods, given as JSON, with one batch lookup. Pods of no workspace are left out, and so are those that terminate.
/// `location` is for errors.
///
/// # Errors
/// [`SweepError::Lookup`]
///
/// # Panics
/// See [`sweep`].
pub(crate) async fn audit_pods(
    pods: &[&str],
    database: &Arc<Database>,
    policy: &Policy,
    location: &str,
) -> Result<Vec<PodAudit>, SweepError> {
    let pods: Vec<_> = block_in_place(|| {
        let items = pods.iter();
        items.map(|item| running_pod(item, location)).collect()
    });
    let (started, lookups) = block_in_place(|| begin_page(policy, &pods));
    let lookups: Vec<Vec<ParameterValue>> = lookups.into_iter().collect();
    let outcomes = database
        .lookup_batch(lookups.clone())
        .await
        .map_err(|error| SweepError::Lookup(location.to_owned(), error))?;
    let outcomes: BTreeMap<_, _> = lookups.iter().zip(outcomes).collect();
    let finish = |started: Started<'_>| -> PodAudit {
        let (metadata, pod, step) = started?;
        let mut hasher = DefaultHasher::new();
        let decision = match step {
            Step::Done(decision) => decision,
            Step::Lookup(parameters, pending) => match outcomes.get(&parameters) {
                Some(Ok(outcome)) => {
                    outcome.columns().hash(&mut hasher);
                    pending.finish(outcome)
                }
                Some(Err(error)) => return Err(format!("{}: {error}", metadata.title())),
                None => return Err(format!("{}: it was not looked up", metadata.title())),
            },
        };
        Ok(audited(policy, metadata, pod, &decision, hasher))
    };
    Ok(block_in_place(|| started.into_iter().map(finish).collect()))
}

/// A pod of a page, or why it cannot be read.
type PageItem<'a> = Result<(RunningMetadata<'a>, Pod<'a>), String>;

/// A pod and the first step of its decision, or why it is not audited.
type Started<'a> = Result<(&'a RunningMetadata<'a>, &'a Pod<'a>, Step<'a>), String>;

/// Begins the decisions about a page's pods. Also returns the parameters of the lookups that they need, without
/// duplicates.
fn begin_page<'a>(
    policy: &'a Policy,
    pods: &'a [PageItem<'a>],
) -> (Vec<Started<'a>>, BTreeSet<Vec<ParameterValue>>) {
    let mut started = Vec::new();
    let mut lookups = BTreeSet::new();
    for item in pods {
        let (metadata, pod) = match item {
            Ok((metadata, pod)) => (metadata, pod),
            Err(reason) => {
                started.push(Err(reason.clone()));
                continue;
            }
        };
        if metadata.deletion_timestamp.is_some() {
            continue;
        }
        let target = PodTarget {
            pod,
            namespace: metadata.namespace.as_str(),
            scope: Scope::Running,
        };
        let step = begin_pod(policy, target);
        match &step {
            Step::Done(Decision {
                outcome: Outcome::NotAWorkspace,
                ..
            }) if !pod.is_annotated() => continue,
            Step::Done(_) => {}
            Step::Lookup(parameters, _) => {
                lookups.insert(parameters.clone());
            }
        }
        started.push(Ok((metadata, pod, step)));
    }
    (started, lookups)
}

/// Reads one item of a page.
fn running_pod<'a>(item: &'a str, location: &str) -> PageItem<'a> {
    let Ok(Running { metadata }) = serde_json::from_str(item) else {
        return Err(format!("a pod in {location} cannot be read"));
    };
    match serde_json::from_str(item) {
        Ok(pod) => Ok((metadata, pod)),
        Err(_) => Err(format!("{}: it cannot be read", metadata.title())),
    }
}

fn audited(
    policy: &Policy,
    running: &RunningMetadata<'_>,
    pod: &Pod<'_>,
    decision: &Decision<'_>,
    mut hasher: DefaultHasher,
) -> AuditedPod {
    let Verdict {
        mode_in_env,
        findings,
        details,
        secrets,
    } = audit(policy, decision, pod);
    // A pod without its label has no resolution, nor has one that is refused for it.
    let missing = Resolution::fallback(Reason::MissingWorkspaceId);
    let resolution = decision.resolution.unwrap_or(missing);
    resolution.hash(&mut hasher);
    let controller = running
        .owner_references
        .iter()
        .find(|owner| owner.controller == Some(true));
    AuditedPod {
        namespace: running.namespace.as_str().to_owned(),
        pod: running.name.as_str().to_owned(),
        uid: running.uid.as_str().to_owned(),
        owner: controller.map(|owner| format!("{}/{}", owner.kind.as_str(), owner.name.as_str())),
        workspace: decision.workspace.to_owned(),
        mode: resolution.mode,
        source: resolution.source,
        reason: resolution.reason,
        mode_in_env,
        findings: findings.into_iter().collect(),
        details,
        secrets,
        fingerprint: hasher.finish(),
    }
}
