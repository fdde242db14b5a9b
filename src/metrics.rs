//! All metric families and their labels. Label values come from enums or fixed texts, never from a pod.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric};
use prometheus_client::metrics::counter::{ConstCounter, Counter};
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::metrics::info::Info;
use prometheus_client::registry::{Registry, Unit};
use time::OffsetDateTime;
use tracing_appender::non_blocking::ErrorCounter;

use crate::core::admission::AdmissionTarget;
use crate::core::audit::{Finding, Report};
use crate::core::decision::{Decision, Labels, NONE, Webhook};
use crate::core::plan::Plan;
use crate::core::resolution::BillingMode;

/// Labels of an admission.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct AdmissionLabels {
    /// `mutate` or `validate`.
    webhook: &'static str,
    /// `create`, `ephemeralcontainers` or `other`.
    operation: &'static str,
    /// The resolved mode, or `none`.
    mode: &'static str,
    /// The source of the mode, or `none`.
    source: &'static str,
    /// The reason for the mode, or `none`.
    reason: &'static str,
    /// `patched`, `unchanged`, `untouched`, `refused` or `bad_request`.
    outcome: &'static str,
}

/// Labels of an admission's duration.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WebhookLabels {
    /// `mutate` or `validate`.
    webhook: &'static str,
}

/// Labels of an operation's result.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ResultLabels {
    /// For lookups `found`, `not_found` or [`crate::database::LookupError::kind`]; for reloads and audits `ok` or
    /// `failed`.
    result: &'static str,
}

/// Labels of database connections.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectionLabels {
    /// `used` or `idle`.
    state: &'static str,
}

/// Labels of a warning.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WarningLabels {
    /// The name of a [`crate::core::warning::WarningKind`].
    kind: &'static str,
}

/// Labels of a removed variable.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RemovedLabels {
    /// The name of a [`crate::core::restrictions::Class`].
    kind: &'static str,
}

/// Labels of pods whose env does not match the billing mode.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DriftLabels {
    /// The mode in the database.
    mode: &'static str,
    /// The name of a [`crate::core::audit::Finding`].
    finding: &'static str,
}

/// Metrics of audits, of `converge` or of one run of `audit`.
#[derive(Clone, Debug, Default)]
pub struct AuditMetrics {
    drift: Family<DriftLabels, Gauge>,
    audited: Gauge,
    audits: Family<ResultLabels, Counter>,
    last: Gauge,
}

impl AuditMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register(
            "drift_pods",
            "Running pods whose env does not match the billing mode, counted once per finding",
            self.drift.clone(),
        );
        registry.register(
            "audited_pods",
            "Running workspace pods seen by the last complete audit",
            self.audited.clone(),
        );
        registry.register("audits", "Audits, by result", self.audits.clone());
        registry.register_with_unit(
            "last_audit_timestamp",
            "Unix time of the end of the last complete audit",
            Unit::Seconds,
            self.last.clone(),
        );
    }

    /// Records a complete audit that has just ended.
    pub fn record(&self, report: &Report) {
        for mode in BillingMode::ALL {
            for finding in Finding::ALL {
                let count = report.by_finding.get(&(mode, finding));
                let drift = DriftLabels {
                    mode: mode.as_str(),
                    finding: finding.as_str(),
                };
                self.drift
                    .get_or_create(&drift)
                    .set(gauge(count.copied().unwrap_or_default()));
            }
        }
        self.audited.set(gauge(report.audited));
        self.last.set(OffsetDateTime::now_utc().unix_timestamp());
        self.count("ok");
    }

    /// Records an audit that ended early. The results of the last complete audit stay.
    pub fn fail(&self) {
        self.count("failed");
    }

    fn count(&self, result: &'static str) {
        self.audits.get_or_create(&ResultLabels { result }).inc();
    }

    /// Returns these metrics in the OpenMetrics text format.
    ///
    /// # Errors
    /// None in practice: writing to a string does not fail.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        let mut registry = Registry::with_prefix(PREFIX);
        self.register(&mut registry);
        encode(&registry)
    }
}

fn gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

fn encode(registry: &Registry) -> Result<String, std::fmt::Error> {
    let mut text = String::new();
    prometheus_client::encoding::text::encode(&mut text, registry)?;
    Ok(text)
}

/// Metrics of the database's connections.
#[derive(Clone, Debug)]
pub struct ConnectionMetrics {
    /// Lookups retried because their connection was lost.
    pub retries: Counter,
    /// Time that lookups waited for a connection, including the time to open a new one.
    pub wait: Histogram,
}

impl Default for ConnectionMetrics {
    fn default() -> Self {
        Self {
            retries: Counter::default(),
            // From 0.1 ms to 3.3 s: the wait is part of the lookup's time-out.
            wait: Histogram::new(exponential_buckets(0.000_1, 2.0, 16)),
        }
    }
}

/// Current numbers of database connections.
#[derive(Clone, Copy, Debug)]
pub struct Connections {
    /// Connections that execute a lookup or are being opened.
    pub used: usize,
    /// Idle connections.
    pub idle: usize,
}

/// Prefix of all metric names.
const PREFIX: &str = "llm_billing";

/// All metrics of one server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    admissions: Family<AdmissionLabels, Counter>,
    admission_duration: Family<WebhookLabels, Histogram, fn() -> Histogram>,
    lookup_duration: Family<ResultLabels, Histogram, fn() -> Histogram>,
    certificate_reloads: Family<ResultLabels, Counter>,
    certificate_expiry: Gauge<f64, AtomicU64>,
    in_flight: Gauge,
    warnings: Family<WarningLabels, Counter>,
    removed: Family<RemovedLabels, Counter>,
    connections: Family<ConnectionLabels, Gauge>,
}

/// Returns a histogram from 0.5 ms to 8 s. The API server waits 10 s by default and 30 s at most.
fn duration_histogram() -> Histogram {
    Histogram::new(exponential_buckets(0.000_5, 2.0, 15))
}

impl Metrics {
    /// Creates a server's metrics. Without `policy_text`, the checksum of the policy is left out.
    #[must_use]
    pub fn new(
        policy_text: Option<&str>,
        database: &ConnectionMetrics,
        dropped_lines: ErrorCounter,
    ) -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let admissions = Family::default();
        let admission_duration =
            Family::new_with_constructor(duration_histogram as fn() -> Histogram);
        let lookup_duration = Family::new_with_constructor(duration_histogram as fn() -> Histogram);
        let certificate_reloads = Family::<ResultLabels, Counter>::default();
        // Initialized, so that the first reload is an increase.
        for result in ["ok", "failed"] {
            drop(certificate_reloads.get_or_create(&ResultLabels { result }));
        }
        let certificate_expiry = Gauge::default();
        let in_flight = Gauge::default();
        let warnings = Family::default();
        let removed = Family::default();
        let connections = Family::default();
        registry.register("admissions", "Admission requests answered", admissions.clone());
        registry.register_with_unit(
            "admission_duration",
            "Time from the arrival of an admission request's head to its response",
            Unit::Seconds,
            admission_duration.clone(),
        );
        registry.register_with_unit(
            "lookup_duration",
            "Time to look up a workspace's billing mode, including retries",
            Unit::Seconds,
            lookup_duration.clone(),
        );
        registry.register(
            "certificate_reloads",
            "Changed certificates loaded, and failed attempts to load or reconcile one",
            certificate_reloads.clone(),
        );
        registry.register_with_unit(
            "certificate_expiry_timestamp",
            "Unix time of the serving certificate's expiry",
            Unit::Seconds,
            certificate_expiry.clone(),
        );
        registry.register(
            "admissions_in_flight",
            "Admission requests in flight",
            in_flight.clone(),
        );
        registry.register("warnings", "Warnings returned, by kind", warnings.clone());
        registry.register(
            "removed_variables",
            "Env entries removed or replaced in patches of platform_managed pods, by kind",
            removed.clone(),
        );
        registry.register(
            "database_connections",
            "Connections to the database, by state",
            connections.clone(),
        );
        registry.register_collector(Box::new(DroppedLines(dropped_lines)));
        register_build(&mut registry, policy_text);
        registry.register(
            "lookup_retries",
            "Lookups retried because their connection was lost",
            database.retries.clone(),
        );
        registry.register_with_unit(
            "connection_wait",
            "Time that lookups waited for a connection",
            Unit::Seconds,
            database.wait.clone(),
        );
        Self {
            registry,
            admissions,
            admission_duration,
            lookup_duration,
            certificate_reloads,
            certificate_expiry,
            in_flight,
            warnings,
            removed,
            connections,
        }
    }

    /// Counts an admission as in flight until the returned guard is dropped.
    pub fn in_flight(&self) -> InFlight<'_> {
        self.in_flight.inc();
        InFlight(&self.in_flight)
    }

    /// Counts a decision and its warnings, and observes the admission's duration.
    pub fn admission(
        &self,
        webhook: Webhook,
        target: AdmissionTarget,
        decision: &Decision<'_>,
        took: Duration,
    ) {
        for warning in decision.warnings() {
            let kind = warning.kind.as_str();
            self.warnings.get_or_create(&WarningLabels { kind }).inc();
        }
        for class in decision.plan.iter().flat_map(Plan::removed) {
            let kind = class.as_str();
            self.removed.get_or_create(&RemovedLabels { kind }).inc();
        }
        let Labels {
            mode,
            source,
            reason,
            outcome,
        } = decision.labels();
        let admission = AdmissionLabels {
            webhook: webhook.as_str(),
            operation: target.as_str(),
            mode,
            source,
            reason,
            outcome,
        };
        self.count(admission, took);
    }

    /// Counts a request that gets no decision, and observes its duration.
    pub fn bad_request(&self, webhook: Webhook, took: Duration) {
        let admission = AdmissionLabels {
            webhook: webhook.as_str(),
            operation: AdmissionTarget::NotApplicable.as_str(),
            mode: NONE,
            source: NONE,
            reason: NONE,
            outcome: "bad_request",
        };
        self.count(admission, took);
    }

    fn count(&self, admission: AdmissionLabels, took: Duration) {
        let webhook = WebhookLabels {
            webhook: admission.webhook,
        };
        self.admission_duration
            .get_or_create(&webhook)
            .observe(took.as_secs_f64());
        self.admissions.get_or_create(&admission).inc();
    }

    /// Counts a lookup by its result, and observes its duration.
    pub fn lookup(&self, result: &'static str, took: Duration) {
        self.lookup_duration
            .get_or_create(&ResultLabels { result })
            .observe(took.as_secs_f64());
    }

    /// Counts an attempt to load or reconcile a changed certificate.
    pub fn certificate_reload(&self, result: &'static str) {
        self.certificate_reloads
            .get_or_create(&ResultLabels { result })
            .inc();
    }

    /// Records when the serving certificate expires, in seconds since the epoch.
    pub fn certificate_expiry(&self, timestamp: i64) {
        #[expect(
            clippy::cast_precision_loss,
            reason = "exact up to the year 285 million"
        )]
        self.certificate_expiry.set(timestamp as f64);
    }

    /// Returns all metrics in the OpenMetrics text format, with these numbers of connections.
    ///
    /// # Errors
    /// None in practice: writing to a string does not fail.
    pub fn encode(&self, current: Connections) -> Result<String, std::fmt::Error> {
        for (state, count) in [("used", current.used), ("idle", current.idle)] {
            let connections = self.connections.get_or_create(&ConnectionLabels { state });
            connections.set(gauge(count));
        }
        encode(&self.registry)
    }
}

/// Labels of a recreation.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct RecreationLabels {
    kind: &'static str,
    result: &'static str,
}

/// Labels of drifted workloads.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

/// All metrics of `converge`.
#[derive(Debug)]
pub struct ConvergeMetrics {
    registry: Registry,
    /// Metrics of its comparisons.
    pub audits: AuditMetrics,
    active: Gauge,
    switches: Counter,
    recreations: Family<RecreationLabels, Counter>,
    workloads: Family<StateLabels, Gauge>,
}

impl ConvergeMetrics {
    /// Registers all metrics. Without `policy_text`, the checksum of the policy is left out.
    #[must_use]
    pub fn new(policy_text: Option<&str>, dropped_lines: ErrorCounter) -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let audits = AuditMetrics::default();
        audits.register(&mut registry);
        let active = Gauge::default();
        registry.register(
            "converge_active",
            "Whether this replica holds the Lease, and acts",
            active.clone(),
        );
        let switches = Counter::default();
        registry.register(
            "switches",
            "Changes of a workspace's row that its running pods' env depends on",
            switches.clone(),
        );
        let recreations = Family::default();
        registry.register("recreations", "Workloads recreated, by result", recreations.clone());
        let workloads = Family::default();
        registry.register(
            "drifted_workloads",
            "Workloads with a pod whose env does not match the billing mode, by what becomes of them",
            workloads.clone(),
        );
        registry.register_collector(Box::new(DroppedLines(dropped_lines)));
        register_build(&mut registry, policy_text);
        Self {
            registry,
            audits,
            active,
            switches,
            recreations,
            workloads,
        }
    }

    /// Records whether this replica acts.
    pub fn set_active(&self, is_active: bool) {
        self.active.set(i64::from(is_active));
    }

    /// Counts changed workspaces.
    pub fn switched(&self, workspaces: usize) {
        self.switches
            .inc_by(u64::try_from(workspaces).unwrap_or(u64::MAX));
    }

    /// Counts a recreation of a workload by its kind and result. Kinds outside Kubernetes' own are `other`.
    pub fn recreation(&self, kind: &str, result: &'static str) {
        let known = [
            "Deployment",
            "StatefulSet",
            "DaemonSet",
            "ReplicaSet",
            "Job",
            "Pod",
        ];
        let kind = known
            .into_iter()
            .find(|known| *known == kind)
            .unwrap_or("other");
        self.recreations
            .get_or_create(&RecreationLabels { kind, result })
            .inc();
    }

    /// Records the number of workloads in a state.
    pub fn workloads(&self, state: &'static str, count: usize) {
        self.workloads
            .get_or_create(&StateLabels { state })
            .set(gauge(count));
    }

    /// Returns all metrics in the OpenMetrics text format.
    ///
    /// # Errors
    /// None in practice: writing to a string does not fail.
    pub fn encode(&self) -> Result<String, std::fmt::Error> {
        encode(&self.registry)
    }
}

/// Collects the log writer's count of dropped lines.
#[derive(Debug)]
struct DroppedLines(ErrorCounter);

impl Collector for DroppedLines {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> Result<(), std::fmt::Error> {
        let count = self.0.dropped_lines();
        let counter = ConstCounter::new(u64::try_from(count).unwrap_or(u64::MAX));
        counter.encode(encoder.encode_descriptor(
            "log_lines_lost",
            "Log lines dropped because too many waited to be written.",
            None,
            counter.metric_type(),
        )?)
    }
}

/// Registers the program's version and, if given, the policy's checksum.
fn register_build(registry: &mut Registry, policy_text: Option<&str>) {
    let version = [("version", env!("CARGO_PKG_VERSION"))];
    registry.register("build", "Version of the running program", Info::new(version.to_vec()));
    if let Some(text) = policy_text {
        let digest = ring::digest::digest(&ring::digest::SHA256, text.as_bytes());
        let bytes = digest.as_ref().iter();
        let sha256: String = bytes.map(|byte| format!("{byte:02x}")).collect();
        registry.register(
            "policy",
            "The policy file's SHA-256 checksum",
            Info::new(vec![("sha256", sha256)]),
        );
    }
}

/// Counts one admission as in flight until it is dropped.
pub struct InFlight<'m>(&'m Gauge);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}
