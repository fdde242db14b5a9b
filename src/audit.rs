//! One sweep over the running pods: pages from the API server, modes from the database, verdicts from the core. What
//! is shown or done about a verdict is cli's and server's business.

use std::collections::BTreeMap;

use k8s_openapi::api::core::v1::Pod as PodResource;
use kube::api::{ListParams, Request};
use kube::{Client, Resource};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use thiserror::Error;

use crate::cluster::ClusterError;
use crate::core::audit::{Finding, Verdict, audit};
use crate::core::mode::{BillingMode, Reason, Resolution, Source, Stored};
use crate::core::pod::{Pod, Text};
use crate::core::policy::{Policy, Unlabelled};
use crate::core::workspace::{Identity, ParameterValue, identify, workspace_id};
use crate::database::{Database, LookupError};

/// Pods in one page, and workspaces in one query at most. kubectl asks for as many.
const PAGE: u32 = 500;

/// Which pods are swept.
#[derive(Clone, Debug, Default)]
pub struct Selection {
    /// All namespaces if absent.
    pub namespace: Option<String>,
    /// A label selector that they must fit besides.
    pub labels: Option<String>,
    /// The workspace that they must belong to.
    pub workspace: Option<String>,
}

impl Selection {
    /// The label selector as the API server takes it. Every workspace pod has the label, unless the webhook is
    /// asked about whole namespaces.
    fn label_selector(&self, policy: &Policy) -> String {
        let label = policy.workspace_label.as_str();
        let all_of_namespace = policy.unlabelled != Unlabelled::Ignore && self.namespace.is_some();
        let workspace = match &self.workspace {
            Some(id) => Some(format!("{label}={id}")),
            None if all_of_namespace => None,
            None => Some(label.to_owned()),
        };
        let parts: Vec<String> = workspace.into_iter().chain(self.labels.clone()).collect();
        parts.join(",")
    }
}

/// One pod and its verdict.
#[derive(Clone, Debug, Serialize)]
pub struct Audited {
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

/// What a sweep saw.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Swept {
    /// Pods that were audited.
    pub audited: usize,
    /// Those whose env is not true.
    pub drifted: usize,
    /// Pods by the database's mode and by finding; a pod counts once for each of its findings.
    #[serde(skip)]
    pub by_finding: BTreeMap<(&'static str, Finding), usize>,
}

/// Why a sweep ended before its end.
#[derive(Debug, Error)]
pub enum SweepError {
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
    /// A pod that the API server has stored is not readable.
    #[error("cannot read pod {0}")]
    Pod(String),
    /// The modes cannot be looked up.
    #[error("cannot look up the modes of the workspaces in {0}")]
    Lookup(String, #[source] LookupError),
}

#[derive(Deserialize)]
struct Page<'a> {
    metadata: PageMetadata,
    #[serde(borrow, default)]
    items: Vec<&'a RawValue>,
}

#[derive(Deserialize)]
struct PageMetadata {
    #[serde(default, rename = "continue")]
    next: String,
}

/// What an audit needs of a pod besides what the webhook does.
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

#[derive(Deserialize)]
struct Owner<'a> {
    #[serde(borrow, default)]
    kind: Text<'a>,
    #[serde(borrow, default)]
    name: Text<'a>,
    controller: Option<bool>,
}

/// Audits the pods that run, and tells each as it comes; only one page is kept at a time. `swept` counts, and is
/// right even if the sweep ends early.
///
/// # Errors
/// [`SweepError`]: what was not audited is not told to be true.
pub async fn sweep(
    client: &Client,
    database: &Database,
    policy: &Policy,
    selection: &Selection,
    swept: &mut Swept,
    mut each: impl FnMut(Audited),
) -> Result<(), SweepError> {
    let place = match &selection.namespace {
        Some(namespace) => format!("namespace {namespace}"),
        None => "all namespaces".to_owned(),
    };
    let request = Request::new(PodResource::url_path(&(), selection.namespace.as_deref()));
    let mut parameters = ListParams::default()
        .labels(&selection.label_selector(policy))
        // What has ended uses no key.
        .fields("status.phase!=Succeeded,status.phase!=Failed")
        .limit(PAGE);
    loop {
        let listed = |error: kube::Error| match error {
            kube::Error::Api(status) if status.code == 410 => SweepError::Expired(place.clone()),
            error => SweepError::List(place.clone(), error.into()),
        };
        let page = request.list(&parameters);
        let page = page.map_err(|error| {
            SweepError::List(place.clone(), ClusterError::Unreachable(error.to_string()))
        })?;
        let page = client.request_text(page).await.map_err(listed)?;
        let page: Page<'_> =
            serde_json::from_str(&page).map_err(|_| SweepError::Page(place.clone()))?;
        for audited in audit_page(&page, database, policy, &place).await? {
            swept.count(&audited);
            each(audited);
        }
        if page.metadata.next.is_empty() {
            return Ok(());
        }
        parameters = parameters.continue_token(&page.metadata.next);
    }
}

async fn audit_page(
    page: &Page<'_>,
    database: &Database,
    policy: &Policy,
    place: &str,
) -> Result<Vec<Audited>, SweepError> {
    let mut pods = Vec::new();
    // Each workspace is looked up once, however many pods it has.
    let mut asked: BTreeMap<Vec<ParameterValue>, usize> = BTreeMap::new();
    for item in &page.items {
        let unreadable = |_| SweepError::Pod(place.to_owned());
        let running: Running<'_> = serde_json::from_str(item.get()).map_err(unreadable)?;
        let running = running.metadata;
        if running.deletion_timestamp.is_some() {
            continue;
        }
        let name = || format!("{}/{}", running.namespace.as_str(), running.name.as_str());
        let pod: Pod<'_> = serde_json::from_str(item.get()).map_err(|_| SweepError::Pod(name()))?;
        let identity = match identify(policy, &pod, running.namespace.as_str()) {
            Ok(Identity::LookUp(parameters)) => {
                let next = asked.len();
                Known::LookedUp(*asked.entry(parameters).or_insert(next))
            }
            Ok(Identity::Resolved(resolution)) => Known::Resolved(resolution),
            Ok(Identity::NotAWorkspace) => continue,
            Err(refusal) => Known::Refused(refusal.to_string()),
        };
        pods.push((running, pod, identity));
    }
    let mut many: Vec<(Vec<ParameterValue>, usize)> = asked.into_iter().collect();
    many.sort_by_key(|(_, place)| *place);
    let many: Vec<Vec<ParameterValue>> = many.into_iter().map(|(asked, _)| asked).collect();
    let stored = database
        .lookup_many(&many)
        .await
        .map_err(|error| SweepError::Lookup(place.to_owned(), error))?;
    let one = |(running, pod, known): &(RunningMetadata<'_>, Pod<'_>, Known)| match known {
        Known::Resolved(resolution) => audited(policy, running, pod, *resolution),
        Known::LookedUp(place) => {
            let stored = stored.get(*place).unwrap_or(&Stored::Failed);
            audited(policy, running, pod, Resolution::from_stored(stored))
        }
        Known::Refused(refusal) => {
            let resolution = Resolution::fallback(Reason::MissingWorkspaceId);
            let mut audited = audited(policy, running, pod, resolution);
            audited.findings = vec![Finding::Refused];
            audited.details = vec![refusal.clone()];
            audited
        }
    };
    Ok(pods.iter().map(one).collect())
}

/// How a pod's mode is known.
enum Known {
    Resolved(Resolution),
    /// By its place among the workspaces that were looked up.
    LookedUp(usize),
    Refused(String),
}

fn audited(
    policy: &Policy,
    running: &RunningMetadata<'_>,
    pod: &Pod<'_>,
    resolution: Resolution,
) -> Audited {
    let Verdict {
        mode_in_env,
        findings,
        details,
    } = audit(policy, resolution, pod);
    let controller = running
        .owner_references
        .iter()
        .find(|owner| owner.controller == Some(true));
    Audited {
        namespace: running.namespace.as_str().to_owned(),
        pod: running.name.as_str().to_owned(),
        uid: running.uid.as_str().to_owned(),
        owner: controller.map(|owner| format!("{}/{}", owner.kind.as_str(), owner.name.as_str())),
        workspace: workspace_id(policy, pod).to_owned(),
        mode: resolution.mode,
        source: resolution.source,
        reason: resolution.reason,
        mode_in_env,
        findings: findings.into_iter().collect(),
        details,
    }
}

impl Swept {
    fn count(&mut self, audited: &Audited) {
        self.audited += 1;
        self.drifted += usize::from(!audited.findings.is_empty());
        for finding in &audited.findings {
            let key = (audited.mode.as_str(), *finding);
            *self.by_finding.entry(key).or_default() += 1;
        }
    }
}
