//! One sweep over the running pods: pages from the API server, modes from the database, verdicts from the core. What
//! is shown or done about a verdict is cli's and server's business.

use std::collections::{BTreeMap, BTreeSet};
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
use crate::core::decision::{Decision, Outcome, PodTarget, Step, Webhook, begin_pod};
use crate::core::identity::ParameterValue;
use crate::core::plan::Scope;
use crate::core::pod::{Pod, Text};
use crate::core::policy::Policy;
use crate::core::policy_file::Unlabelled;
use crate::core::resolution::{BillingMode, Reason, Resolution, Source};
use crate::database::{Database, LookupError};

/// Pods in one page, and workspaces in one query at most. kubectl asks for as many.
const PAGE: u32 = 500;

/// The namespaces whose pods are report.
#[derive(Clone, Debug, Default)]
pub enum Namespaces {
    /// All of them.
    #[default]
    All,
    /// This one.
    One(String),
    /// Those that this label selector selects.
    Selected(String),
}

/// Which pods are report.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// Where.
    pub namespaces: Namespaces,
    /// A label selector that they must fit besides.
    pub labels: Option<String>,
    /// The workspace that they must belong to.
    pub workspace: Option<String>,
}

impl Selection {
    /// Whether the policy lets this be report: where pods without the label count, somebody has to say where the
    /// webhook is asked about them.
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

    /// The label selector as the API server takes it.
    fn label_selector(&self, policy: &Policy) -> String {
        let label = policy.workspace_label.as_str();
        let workspace = match (&self.workspace, policy.unlabelled) {
            (Some(id), _) => Some(format!("{label}={id}")),
            (None, Unlabelled::Ignore) => Some(label.to_owned()),
            (None, Unlabelled::PlatformManaged | Unlabelled::Deny) => None,
        };
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
    /// Tells it from a later pod of the same name.
    #[serde(skip)]
    pub uid: String,
    /// The controller that would make it anew, as `Kind/name`.
    pub owner: Option<String>,
    /// The workspace that it claims.
    pub workspace: String,
    /// The mode that the database says.
    pub mode: BillingMode,
    /// Where that comes from.
    pub source: Source,
    /// Which rule gave it.
    pub reason: Reason,
    /// The mode that its env says.
    pub mode_in_env: String,
    /// Empty if its env is true.
    pub findings: Vec<Finding>,
    /// What there is to them, by names.
    pub details: Vec<String>,
}

/// Why a sweep ended before its end.
#[derive(Debug, Error)]
pub enum SweepError {
    /// Pods without the label count, but nobody says which.
    #[error(
        "by the policy's `unlabelled`, pods without the label count too, where the webhook is asked about them; \
         say where that is, by one namespace or by a selector of namespaces"
    )]
    Scope,
    /// The namespaces cannot be listed.
    #[error("cannot list the namespaces")]
    Namespaces(#[source] ClusterError),
    /// The pods cannot be listed.
    #[error("cannot list the pods in {0}")]
    List(String, #[source] ClusterError),
    /// The list is older than the API server remembers.
    #[error(
        "the list of pods in {0} expired before its end, for there are many or the database is slow; \
         audit one namespace at a time"
    )]
    Expired(String),
    /// What came is no list of pods.
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

/// What an audit needs of a pod besides what the webhook reads.
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

/// Audits the pods that run, and tells each as it comes; only one page is kept at a time. `report` counts, and is
/// right even if the sweep ends early.
///
/// # Errors
/// [`SweepError`]: what was not audited is not told to be true.
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
            let all: Api<Namespace> = Api::all(client.clone());
            let selected = ListParams::default().labels(selector);
            let found = all.list_metadata(&selected).await;
            let found = found.map_err(|error| SweepError::Namespaces(error.into()))?;
            found
                .items
                .into_iter()
                .map(|one| one.metadata.name)
                .collect()
        }
    };
    let labels = selection.label_selector(policy);
    for namespace in namespaces {
        let place = match &namespace {
            Some(namespace) => format!("namespace {namespace}"),
            None => "all namespaces".to_owned(),
        };
        let request = Request::new(PodResource::url_path(&(), namespace.as_deref()));
        let mut parameters = ListParams::default()
            .labels(&labels)
            // What has ended uses no key.
            .fields("status.phase!=Succeeded,status.phase!=Failed")
            .limit(PAGE);
        loop {
            let listed = |error: kube::Error| match error {
                kube::Error::Api(status) if status.code == 410 => {
                    SweepError::Expired(place.clone())
                }
                error => SweepError::List(place.clone(), error.into()),
            };
            let page = request.list(&parameters).map_err(|error| {
                let error = ClusterError::Unreachable(error.to_string());
                SweepError::List(place.clone(), error)
            })?;
            let page = client.request_text(page).await.map_err(listed)?;
            let page: Page<'_> = block_in_place(|| serde_json::from_str(&page))
                .map_err(|_| SweepError::Page(place.clone()))?;
            for verdict in audit_page(&page, database, policy, &place).await? {
                match verdict {
                    Ok(audited) => {
                        report.count(audited.mode, &audited.findings);
                        each(audited);
                    }
                    Err(why) => report.not_audited.push(why),
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

/// A pod's audit, or why there is none.
type PodAudit = Result<AuditedPod, String>;

async fn audit_page(
    page: &Page<'_>,
    database: &Arc<Database>,
    policy: &Policy,
    place: &str,
) -> Result<Vec<PodAudit>, SweepError> {
    // Reading and planning 500 large pods takes long: meanwhile another thread takes over this one's admissions and probes.
    let pods: Vec<_> = block_in_place(|| {
        let items = page.items.iter();
        items.map(|item| running_pod(item, place)).collect()
    });
    let (begun, lookups) = block_in_place(|| begin_page(policy, &pods));
    let lookups: Vec<Vec<ParameterValue>> = lookups.into_iter().collect();
    let outcomes = database
        .lookup_batch(lookups.clone())
        .await
        .map_err(|error| SweepError::Lookup(place.to_owned(), error))?;
    let outcomes: BTreeMap<_, _> = lookups.iter().zip(outcomes).collect();
    let finish = |one: Begun<'_>| -> PodAudit {
        let (metadata, pod, step) = one?;
        let decision = match step {
            Step::Done(decision) => decision,
            Step::Lookup(parameters, pending) => match outcomes.get(&parameters) {
                Some(Ok(outcome)) => pending.finish(outcome),
                Some(Err(error)) => return Err(format!("{}: {error}", metadata.title())),
                None => return Err(format!("{}: it was not looked up", metadata.title())),
            },
        };
        Ok(audited(policy, metadata, pod, &decision))
    };
    Ok(block_in_place(|| begun.into_iter().map(finish).collect()))
}

/// A pod of a page, or why it cannot be read.
type PageItem<'a> = Result<(RunningMetadata<'a>, Pod<'a>), String>;

/// A pod whose decision has begun, or why there is none.
type Begun<'a> = Result<(&'a RunningMetadata<'a>, &'a Pod<'a>, Step<'a>), String>;

/// Begins the decisions about a page's pods. Returns the lookups that they wait for too: each workspace's once, however
/// many pods it has.
fn begin_page<'a>(
    policy: &'a Policy,
    pods: &'a [PageItem<'a>],
) -> (Vec<Begun<'a>>, BTreeSet<Vec<ParameterValue>>) {
    let mut begun = Vec::new();
    let mut lookups = BTreeSet::new();
    for item in pods {
        let (metadata, pod) = match item {
            Ok((metadata, pod)) => (metadata, pod),
            Err(why) => {
                begun.push(Err(why.clone()));
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
        let step = begin_pod(policy, Webhook::Mutate, target);
        match &step {
            Step::Done(decision) if decision.outcome == Outcome::NotAWorkspace => continue,
            Step::Done(_) => {}
            Step::Lookup(parameters, _) => {
                lookups.insert(parameters.clone());
            }
        }
        begun.push(Ok((metadata, pod, step)));
    }
    (begun, lookups)
}

/// Reads one item of a page.
fn running_pod<'a>(item: &'a RawValue, place: &str) -> PageItem<'a> {
    let Ok(Running { metadata }) = serde_json::from_str(item.get()) else {
        return Err(format!("a pod in {place} cannot be read"));
    };
    match serde_json::from_str(item.get()) {
        Ok(pod) => Ok((metadata, pod)),
        Err(_) => Err(format!("{}: it cannot be read", metadata.title())),
    }
}

fn audited(
    policy: &Policy,
    running: &RunningMetadata<'_>,
    pod: &Pod<'_>,
    decision: &Decision<'_>,
) -> AuditedPod {
    let Verdict {
        mode_in_env,
        findings,
        details,
    } = audit(policy, decision, pod);
    // A pod that is refused for its missing label has no resolution.
    let missing = Resolution::fallback(Reason::MissingWorkspaceId);
    let resolution = decision.resolution.unwrap_or(missing);
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
    }
}
