//! Running pods that follow the database: watches them, compares them with it, and recreates those that are out of sync.
//! What to recreate next is decided in core/converge.rs, how a pod is compared in audit.rs.

mod lease;
mod pods;

use std::collections::{BTreeMap, BTreeSet};
use std::future::pending;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use futures_util::StreamExt;
use kube::runtime::WatchStreamExt;
use kube::runtime::watcher::{self, Event, watcher};
use kube::{Api, Client};
use serde_json::Value;
use time::OffsetDateTime;
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, MissedTickBehavior, interval};
use tracing::{error, info, warn};

use self::lease::{Election, Standing};
use self::pods::{CONVERGE_ANNOTATION, Owner, WatchedPod};
use crate::audit::{AuditedPod, Namespaces, SweepError, audit_pods, selected_namespaces};
use crate::cluster::{self, ClusterError, EventType, Evicted, PodName, RESTARTED_ANNOTATION};
use crate::core::audit::{Finding, Report};
use crate::core::converge::{Budget, Converger, Obstacle, PodState, Window, Workload};
use crate::core::policy::Policy;
use crate::core::policy_file::Unlabelled;
use crate::database::{Change, Database};
use crate::metrics::ConvergeMetrics;
use crate::server::health::Health;
use crate::server::maintenance::maintain_connections;
use crate::telemetry;

/// Pause between steps. Pods and switches that arrive within it are compared together.
const STEP_INTERVAL: Duration = Duration::from_millis(500);
/// Pause before a comparison or an eviction that failed is tried again.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Time after which a watch is renewed, in seconds. A response without data for longer is an error of the client.
const WATCH_SECONDS: u32 = 50;
const _: () = assert!((WATCH_SECONDS as u64) < cluster::READ_TIMEOUT.as_secs());
/// Time after which a paused workload's annotation is read again.
const PAUSE_INTERVAL: Duration = Duration::from_secs(20);
/// Limit on the pods of a batch lookup, as in an audit's page.
const MAX_BATCH: usize = 500;
/// Limit on the events written in one step.
const MAX_EVENTS: usize = 20;

/// What to keep in sync, and how.
pub struct Options {
    /// The namespaces of the pods.
    pub namespaces: Namespaces,
    /// Namespaces that the webhook does not cover.
    pub exempt: BTreeSet<String>,
    /// Pause between comparisons of all pods.
    pub interval: Duration,
    /// Time after the start in which nothing is recreated: after a change of the policy, webhooks may still have the old
    /// one, and would make pods that are out of sync again.
    pub start_delay: Duration,
    /// Whether workloads are recreated, and not only reported.
    pub applies: bool,
    /// The limits on recreation.
    pub budget: Budget,
    /// When workloads may be recreated; `None` is always.
    pub window: Option<Window>,
    /// Whether pods without a controller are evicted too.
    pub includes_bare: bool,
    /// The Lease of the active replica: its namespace and name. Without one, this process is active.
    pub lease: Option<(String, String)>,
    /// Distinguishes this replica from others.
    pub identity: String,
}

/// What the process shares with its health endpoint.
pub struct Status {
    /// The metrics.
    pub metrics: ConvergeMetrics,
    has_compared: AtomicBool,
}

impl Status {
    /// Returns the status before the first comparison.
    #[must_use]
    pub const fn new(metrics: ConvergeMetrics) -> Self {
        Self {
            metrics,
            has_compared: AtomicBool::new(false),
        }
    }
}

impl Health for Status {
    fn not_ready_reason(&self) -> Option<&'static str> {
        let has_compared = self.has_compared.load(Ordering::Relaxed);
        (!has_compared).then_some("the pods have not been compared with the database yet")
    }

    fn metrics(&self) -> Result<String, std::fmt::Error> {
        self.metrics.encode()
    }
}

/// Keeps pods in sync until `stop` completes, then gives the Lease up.
pub async fn run(
    client: Client,
    database: Arc<Database>,
    policy: Policy,
    options: Options,
    status: Arc<Status>,
    stop: impl Future<Output = ()>,
) {
    let standing = watch::Sender::new(match options.lease {
        None => Standing::Active(None),
        Some(_) => Standing::Passive,
    });
    let mut election = options
        .lease
        .as_ref()
        .map(|(namespace, name)| Election::new(&client, namespace, name, options.identity.clone()));
    let changes = match policy.lookup.channel.as_ref() {
        Some(channel) => Arc::clone(&database).listen(channel.as_str()),
        None => mpsc::channel(1).1,
    };
    let maintained = Arc::clone(&database);
    let mut converge = Converge {
        converger: Converger::new(options.budget),
        client,
        database,
        policy,
        options,
        status,
        standing: standing.subscribe(),
        started: Instant::now(),
        pods: BTreeMap::new(),
        listed: Some(BTreeMap::new()),
        scope: None,
        verdicts: BTreeMap::new(),
        changed: BTreeSet::new(),
        is_due: false,
        retry_at: None,
        paused: BTreeMap::new(),
        kept: BTreeMap::new(),
        reported: BTreeMap::new(),
    };
    let elect = async {
        match &mut election {
            Some(election) => election.run(&standing).await,
            None => pending().await,
        }
    };
    tokio::select! {
        () = stop => {}
        () = converge.run(changes) => {}
        () = maintain_connections(maintained) => {}
        () = elect => {}
    }
    if let Some(election) = election {
        election.release().await;
    }
}

struct Converge {
    client: Client,
    database: Arc<Database>,
    policy: Policy,
    options: Options,
    status: Arc<Status>,
    standing: watch::Receiver<Standing>,
    started: Instant,
    /// The pods that the webhook has to do with, by uid.
    pods: BTreeMap<String, WatchedPod>,
    /// The pods of a list that has not ended.
    listed: Option<BTreeMap<String, WatchedPod>>,
    /// The selected namespaces; `None` for all.
    scope: Option<BTreeSet<String>>,
    /// The last comparison of each pod of a workspace, by uid.
    verdicts: BTreeMap<String, AuditedPod>,
    /// The uids of pods that are to be compared.
    changed: BTreeSet<String>,
    /// Whether all pods are to be compared.
    is_due: bool,
    /// After a comparison that failed.
    retry_at: Option<Instant>,
    converger: Converger,
    /// The workloads that are paused by an annotation of their own, and when it was read.
    paused: BTreeMap<String, Instant>,
    /// The pods that could not be evicted yet, by workload, and when that was tried.
    kept: BTreeMap<String, (Instant, Vec<WatchedPod>)>,
    /// The state of the row for which a workload's drift has been reported.
    reported: BTreeMap<String, u64>,
}

/// The result of a comparison.
struct Compared {
    /// The number of workspaces whose rows have changed.
    switched: usize,
    /// The pods to compare again: a new pod of their workspace is the first to show a changed row.
    outdated: BTreeSet<String>,
}

impl Converge {
    /// Never returns.
    async fn run(&mut self, mut changes: mpsc::Receiver<Change>) {
        let pods: Api<WatchedPod> = Api::all(self.client.clone());
        // A pod that has ended uses no key.
        let config = watcher::Config::default()
            .fields("status.phase!=Succeeded,status.phase!=Failed")
            .timeout(WATCH_SECONDS)
            .page_size(500);
        let mut events = pin!(watcher(pods, config).default_backoff());
        let mut sweep = interval(self.options.interval);
        let mut step = interval(STEP_INTERVAL);
        step.set_missed_tick_behavior(MissedTickBehavior::Delay);
        sweep.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let mut is_failing = false;
        loop {
            tokio::select! {
                event = events.next() => match event {
                    Some(Ok(event)) => {
                        if std::mem::take(&mut is_failing) {
                            info!("pods are watched again");
                        }
                        self.observe(event);
                    }
                    Some(Err(failed)) => {
                        if !std::mem::replace(&mut is_failing, true) {
                            error!(error = telemetry::chain(&failed), "cannot watch the pods");
                        }
                    }
                    None => return,
                },
                Some(change) = changes.recv() => self.mark(&change),
                _ = sweep.tick() => self.is_due = true,
                _ = step.tick() => {
                    self.compare().await;
                    self.act().await;
                }
            }
        }
    }

    fn observe(&mut self, event: Event<WatchedPod>) {
        match event {
            Event::Init => self.listed = Some(BTreeMap::new()),
            Event::InitApply(pod) => {
                let is_relevant = self.is_relevant(&pod);
                let listed = self.listed.get_or_insert_default();
                if is_relevant {
                    listed.insert(pod.uid().to_owned(), pod);
                }
            }
            Event::InitDone => {
                self.pods = self.listed.take().unwrap_or_default();
                let pods = &self.pods;
                self.verdicts.retain(|uid, _| pods.contains_key(uid));
                self.is_due = true;
            }
            Event::Apply(pod) if self.is_relevant(&pod) => {
                self.changed.insert(pod.uid().to_owned());
                self.pods.insert(pod.uid().to_owned(), pod);
            }
            Event::Apply(pod) | Event::Delete(pod) => {
                self.pods.remove(pod.uid());
                self.verdicts.remove(pod.uid());
                self.changed.remove(pod.uid());
            }
        }
    }

    /// Reports whether a pod may belong to a workspace, and is not terminating.
    fn is_relevant(&self, pod: &WatchedPod) -> bool {
        let is_workspace = pod.is_annotated
            || self.policy.unlabelled != Unlabelled::Ignore
            || pod
                .labels
                .contains_key(self.policy.workspace_label.as_str());
        is_workspace && !pod.is_terminating && !self.options.exempt.contains(pod.namespace())
    }

    /// Marks the pods of a workspace whose row has changed.
    fn mark(&mut self, change: &Change) {
        let Change::Workspace(id) = change else {
            self.converger.disturb(None);
            self.is_due = true;
            return;
        };
        self.converger.disturb(Some(id));
        let label = self.policy.workspace_label.as_str();
        let pods = self.pods.iter();
        // The label may have a UUID in upper case.
        let of_workspace = pods.filter(|(_, pod)| {
            pod.labels
                .get(label)
                .is_some_and(|own| own.eq_ignore_ascii_case(id))
        });
        self.changed
            .extend(of_workspace.map(|(uid, _)| uid.clone()));
    }

    /// Compares the pods that are due with the database. If that fails, all verdicts stay, and it is tried again.
    async fn compare(&mut self) {
        let is_listed = self.listed.is_none() && (self.is_due || !self.changed.is_empty());
        if !is_listed || self.retry_at.is_some_and(|at| Instant::now() < at) {
            return;
        }
        match self.compare_due().await {
            Ok(Compared { switched, outdated }) => {
                if self.retry_at.take().is_some() {
                    info!("pods are compared again");
                }
                self.is_due = false;
                self.changed = outdated;
                self.status.metrics.switched(switched);
                let mut report = Report::default();
                for verdict in self.verdicts.values() {
                    report.count(verdict.mode, &verdict.findings);
                }
                self.status.metrics.audits.record(&report);
                self.status.has_compared.store(true, Ordering::Relaxed);
            }
            Err(failed) => {
                if self.retry_at.is_none() {
                    error!(
                        error = telemetry::chain(&failed),
                        "cannot compare the pods with the database; nothing is recreated meanwhile"
                    );
                }
                self.status.metrics.audits.fail();
                self.retry_at = Some(Instant::now() + RETRY_INTERVAL);
            }
        }
    }

    async fn compare_due(&mut self) -> Result<Compared, SweepError> {
        if let (Namespaces::Selected(selector), true) = (&self.options.namespaces, self.is_due) {
            self.scope = Some(selected_namespaces(&self.client, selector).await?);
        }
        let scope = self.scope.as_ref();
        let is_in_scope =
            |pod: &WatchedPod| scope.is_none_or(|namespaces| namespaces.contains(pod.namespace()));
        if self.is_due {
            let pods = &self.pods;
            self.verdicts
                .retain(|uid, _| pods.get(uid).is_some_and(is_in_scope));
        }
        let pods = self.pods.iter();
        let due: Vec<_> = pods
            .filter(|(uid, pod)| (self.is_due || self.changed.contains(*uid)) && is_in_scope(pod))
            .collect();
        let mut verdicts = Vec::new();
        for batch in due.chunks(MAX_BATCH) {
            let texts: Vec<&str> = batch.iter().map(|(_, pod)| &*pod.json).collect();
            let audited =
                audit_pods(&texts, &self.database, &self.policy, "all namespaces").await?;
            for one in audited {
                match one {
                    Ok(verdict) => verdicts.push(verdict),
                    // It keeps its verdict.
                    Err(reason) => warn!(reason, "a pod was not compared"),
                }
            }
        }
        let (mut switched, mut fresh) = (BTreeSet::new(), BTreeMap::new());
        for verdict in verdicts {
            let (workspace, fingerprint) = (verdict.workspace.clone(), verdict.fingerprint);
            match self.verdicts.insert(verdict.uid.clone(), verdict) {
                None => drop(fresh.insert(workspace, fingerprint)),
                Some(before) if before.fingerprint != fingerprint => {
                    switched.insert(workspace);
                }
                Some(_) => {}
            }
        }
        let is_outdated = |(_, verdict): &(&String, &AuditedPod)| {
            let row = fresh.get(&verdict.workspace);
            row.is_some_and(|row| *row != verdict.fingerprint)
        };
        let verdicts = self.verdicts.iter();
        let outdated = verdicts.filter(is_outdated).map(|(uid, _)| uid.clone());
        Ok(Compared {
            switched: switched.len(),
            outdated: outdated.collect(),
        })
    }

    /// Recreates, or reports, what is out of sync.
    async fn act(&mut self) {
        let standing = *self.standing.borrow();
        self.status.metrics.set_active(standing.is_active());
        if !self.status.has_compared.load(Ordering::Relaxed) {
            return;
        }
        self.paused
            .retain(|_, read| read.elapsed() < PAUSE_INTERVAL);
        let workloads = self.workloads();
        let drifted = workloads.values();
        let drifted = drifted.filter(|workload| workload.is_drifted());
        for obstacle in Obstacle::ALL {
            let blocked = drifted
                .clone()
                .filter(|workload| workload.obstacle == Some(obstacle));
            self.status
                .metrics
                .workloads(obstacle.as_str(), blocked.count());
        }
        if standing == Standing::Passive {
            // What another replica has begun is not known here, and is in its metrics alone.
            self.converger = Converger::new(self.options.budget);
            for state in ["waiting", "running", "failed"] {
                self.status.metrics.workloads(state, 0);
            }
        }
        if !standing.is_active() {
            return;
        }
        self.report(&workloads).await;
        // Nothing is recreated on verdicts that may be outdated.
        let is_outdated = self.retry_at.is_some() || self.listed.is_some();
        let is_starting = self.started.elapsed() < self.options.start_delay;
        if !self.options.applies || is_outdated || is_starting {
            let waiting = drifted
                .filter(|workload| workload.obstacle.is_none())
                .count();
            self.status.metrics.workloads("waiting", waiting);
            return;
        }
        let is_open = self.options.window.is_none_or(|window| {
            let (hour, minute, second) = OffsetDateTime::now_utc().to_hms();
            window.contains(u32::from(hour) * 3600 + u32::from(minute) * 60 + u32::from(second))
        });
        let now = self.started.elapsed();
        let step = self.converger.step(now, is_open, &workloads);
        for key in &step.succeeded {
            info!(workload = key, "recreated");
            self.status.metrics.recreation(kind_of(key), "succeeded");
        }
        for (key, failure) in &step.failed {
            let reason = failure.as_str();
            error!(workload = key, reason, "recreation failed; it is not repeated for this mode");
            self.status.metrics.recreation(kind_of(key), "failed");
            let message = format!("the recreation of {key} failed: {reason}; see the runbook");
            self.write_event(key, EventType::Warning, "LlmBillingConvergeFailed", &message)
                .await;
        }
        for key in &step.begin {
            // Each request takes time, in which another replica may have taken over.
            if self.standing.borrow().is_active() {
                self.begin(key).await;
            } else {
                self.converger.withdraw(key);
            }
        }
        self.evict_kept().await;
        let metrics = &self.status.metrics;
        metrics.workloads("waiting", step.waiting);
        metrics.workloads("running", step.running);
        metrics.workloads("failed", step.stuck);
    }

    /// Returns the workloads that have a pod which is out of sync or are being recreated.
    fn workloads(&self) -> BTreeMap<String, Workload> {
        let mut workloads: BTreeMap<String, Workload> = BTreeMap::new();
        let verdicts = self.verdicts.iter();
        let pods = verdicts.filter_map(|(uid, verdict)| Some((self.pods.get(uid)?, verdict)));
        let drifted = pods
            .clone()
            .filter(|(_, verdict)| !verdict.findings.is_empty());
        let mut keys: BTreeSet<String> = drifted.map(|(pod, _)| pod.workload()).collect();
        keys.extend(self.converger.attempted().map(str::to_owned));
        if keys.is_empty() {
            return workloads;
        }
        for (pod, verdict) in pods {
            let key = pod.workload();
            if !keys.contains(&key) {
                continue;
            }
            let is_drifted = !verdict.findings.is_empty();
            let is_paused = pod.is_paused || self.paused.contains_key(&key);
            let obstacle = match &pod.owner {
                _ if !is_drifted => None,
                _ if is_paused => Some(Obstacle::Paused),
                _ if verdict.findings.contains(&Finding::Refused) => Some(Obstacle::Refused),
                Owner::None if !self.options.includes_bare => Some(Obstacle::Bare),
                Owner::Node => Some(Obstacle::Static),
                Owner::None | Owner::Rollout { .. } | Owner::Other { .. } => None,
            };
            let workload = workloads.entry(key.clone()).or_default();
            // A pod without an id counts by itself.
            let id = Some(&verdict.workspace).filter(|id| !id.is_empty());
            workload.workspace.clone_from(id.unwrap_or(&key));
            workload.obstacle = workload.obstacle.or(obstacle);
            let state = PodState {
                is_drifted,
                is_ready: pod.is_ready,
                restarted_at: pod.restarted_at.clone(),
                fingerprint: verdict.fingerprint,
            };
            workload.pods.insert(pod.uid().to_owned(), state);
        }
        workloads
    }

    /// Logs each drifted workload once for each state of its row, and writes an event on one of its pods.
    async fn report(&mut self, workloads: &BTreeMap<String, Workload>) {
        self.reported.retain(|key, _| workloads.contains_key(key));
        let is_new = |key: &String, workload: &Workload| {
            self.reported.get(key) != Some(&workload.fingerprint()) && workload.is_drifted()
        };
        let new: Vec<(String, u64)> = workloads
            .iter()
            .filter(|(key, workload)| is_new(key, workload))
            .map(|(key, workload)| (key.clone(), workload.fingerprint()))
            .take(MAX_EVENTS)
            .collect();
        for (key, fingerprint) in new {
            let Some(verdict) = self.drifted_pods(&key).next().map(|(_, verdict)| verdict) else {
                continue;
            };
            let findings: Vec<&str> = verdict.findings.iter().map(|one| one.as_str()).collect();
            let findings = findings.join(",");
            let obstacle = workloads.get(&key).and_then(|workload| workload.obstacle);
            let verb = match (obstacle, self.options.applies) {
                (Some(obstacle), _) => format!("is not recreated ({})", obstacle.as_str()),
                (None, true) => "is to be recreated".to_owned(),
                (None, false) => "would be recreated (--apply is not set)".to_owned(),
            };
            info!(workload = key, findings, "drift: the workload {verb}");
            let message = format!(
                "the env of this pod does not match the billing mode ({findings}): {}; {key} {verb}",
                verdict.details.join("; ")
            );
            self.write_event(&key, EventType::Warning, "LlmBillingDrift", &message)
                .await;
            self.reported.insert(key, fingerprint);
        }
    }

    fn drifted_pods(&self, key: &str) -> impl Iterator<Item = (&WatchedPod, &AuditedPod)> {
        let verdicts = self.verdicts.iter();
        let drifted = verdicts.filter(|(_, verdict)| !verdict.findings.is_empty());
        let pods = drifted.filter_map(|(uid, verdict)| Some((self.pods.get(uid)?, verdict)));
        pods.filter(move |(pod, _)| pod.workload() == key)
    }

    /// Writes an event on one of a workload's drifted pods. A failure is logged: the log has the message too.
    async fn write_event(&self, key: &str, kind: EventType, reason: &str, message: &str) {
        let Some((pod, _)) = self.drifted_pods(key).next() else {
            return;
        };
        let written = cluster::event_on_pod(&self.client, name(pod), kind, reason, message).await;
        if let Err(failed) = written {
            warn!(error = telemetry::chain(&failed), workload = key, "cannot write an event");
        }
    }

    /// Begins the recreation of a workload. What could not be requested is tried again.
    async fn begin(&mut self, key: &str) {
        let pods: Vec<WatchedPod> = self.drifted_pods(key).map(|(pod, _)| pod.clone()).collect();
        let Some(first) = pods.first() else {
            self.converger.withdraw(key);
            return;
        };
        let kind = first.owner.kind().to_owned();
        if let Owner::Rollout { plural, name, .. } = &first.owner {
            match self.restart(key, &pods, plural, name).await {
                Ok(true) => {}
                Ok(false) => return,
                Err(failed) => {
                    warn!(error = telemetry::chain(&failed), workload = key, "cannot recreate");
                    self.converger.postpone(self.started.elapsed(), key);
                    return;
                }
            }
        } else if let Some(reason) = self.evict(key, pods).await {
            warn!(reason, workload = key, "a pod cannot be evicted yet");
        }
        info!(workload = key, "recreating");
        self.status.metrics.recreation(&kind, "begun");
    }

    /// Restarts a workload for these pods, unless it is paused. Returns whether they are being replaced.
    async fn restart(
        &mut self,
        key: &str,
        pods: &[WatchedPod],
        plural: &str,
        name: &str,
    ) -> Result<bool, ClusterError> {
        let namespace = pods.first().map_or("", WatchedPod::namespace);
        let path = format!("/apis/apps/v1/namespaces/{namespace}/{plural}/{name}");
        let workload = cluster::get(&self.client, &path).await?;
        let paused = workload.pointer("/metadata/annotations").and_then(|all| {
            let value = all.get(CONVERGE_ANNOTATION)?;
            (value == "paused").then_some(())
        });
        if paused.is_some() {
            self.paused.insert(key.to_owned(), Instant::now());
            self.converger.withdraw(key);
            return Ok(false);
        }
        let template = workload.pointer("/spec/template/metadata/annotations");
        let restarted_at =
            template.and_then(|annotations| annotations.get(RESTARTED_ANNOTATION)?.as_str());
        // Another replica may have begun before this one took over: the rollout replaces pods of an earlier template.
        if pods
            .iter()
            .all(|pod| pod.restarted_at.as_deref() != restarted_at)
        {
            info!(workload = key, "a rollout is in progress");
            self.converger.resume(key);
            self.converger
                .restarted(key, restarted_at.map(str::to_owned));
            return Ok(true);
        }
        let version = workload.pointer("/metadata/resourceVersion");
        let version = version.and_then(Value::as_str).unwrap_or_default();
        let restarted_at = cluster::restart(&self.client, namespace, plural, name, version).await?;
        self.converger.restarted(key, Some(restarted_at));
        Ok(true)
    }

    /// Evicts pods. Those that a disruption budget or an error keeps are tried again. Returns why the last of them is kept.
    async fn evict(&mut self, key: &str, pods: Vec<WatchedPod>) -> Option<String> {
        let mut kept = Vec::new();
        let mut last = None;
        for pod in pods {
            let reason = match cluster::evict(&self.client, name(&pod), false).await {
                Ok(Evicted::Done | Evicted::Gone) => continue,
                Ok(Evicted::Kept(reason)) => reason,
                Err(failed) => telemetry::chain(&failed),
            };
            last = Some(reason);
            kept.push(pod);
        }
        if !kept.is_empty() {
            self.kept.insert(key.to_owned(), (Instant::now(), kept));
        }
        last
    }

    /// Evicts pods that were kept, as long as their workloads are being recreated.
    async fn evict_kept(&mut self) {
        let converger = &self.converger;
        self.kept.retain(|key, _| converger.is_running(key));
        let kept = self.kept.iter();
        let due = kept.filter(|(_, (tried, _))| tried.elapsed() >= RETRY_INTERVAL);
        let due: Vec<String> = due.map(|(key, _)| key.clone()).collect();
        for key in due {
            if !self.standing.borrow().is_active() {
                return;
            }
            if let Some((_, pods)) = self.kept.remove(&key) {
                self.evict(&key, pods).await;
            }
        }
    }
}

fn name(pod: &WatchedPod) -> PodName<'_> {
    PodName {
        namespace: pod.namespace(),
        name: pod.name(),
        uid: pod.uid(),
    }
}

/// Returns the kind in a workload's key.
fn kind_of(key: &str) -> &str {
    key.split('/').nth(1).unwrap_or_default()
}
