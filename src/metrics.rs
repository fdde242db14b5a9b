//! Every metric family and its labels. Labels come from enums or fixed texts: nothing that a pod brings is
//! ever one.

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
use crate::core::resolution::BillingMode;

/// Labels of one admission.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Admission {
    /// `mutate` or `validate`.
    webhook: &'static str,
    /// `create`, `ephemeralcontainers` or `other`.
    operation: &'static str,
    /// The resolved mode, or `none`.
    mode: &'static str,
    /// Where it comes from, or `none`.
    source: &'static str,
    /// Which rule gave it, or `none`.
    reason: &'static str,
    /// `patched`, `unchanged`, `untouched`, `refused` or `bad_request`.
    outcome: &'static str,
}

/// Labels of a duration of the whole admission.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WebhookLabels {
    /// `mutate` or `validate`.
    webhook: &'static str,
}

/// Labels by how something ended.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Ending {
    /// For lookups `found`, `not_found` or [`crate::database::LookupError::kind`]; for reloads and audits `ok` or
    /// `failed`.
    result: &'static str,
}

/// A connection to the database by what it does.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ConnectionState {
    /// `used` or `idle`.
    state: &'static str,
}

/// Labels of a warning.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct WarningLabels {
    /// What it is about, as [`crate::core::warning::WarningKind`] spells it.
    kind: &'static str,
}

/// Labels of pods whose env is not true.
#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Drift {
    /// The mode that the database says.
    mode: &'static str,
    /// What was found, as [`crate::core::audit::Finding`] spells it.
    finding: &'static str,
}

/// What audits found: of one server, or of one run of `audit`.
#[derive(Clone, Debug, Default)]
pub struct AuditMetrics {
    drift: Family<Drift, Gauge>,
    audited: Gauge,
    audits: Family<Ending, Counter>,
    last: Gauge,
}

impl AuditMetrics {
    fn register(&self, registry: &mut Registry) {
        registry.register(
            "drift_pods",
            "Running pods whose env is not true; one counts once for each finding",
            self.drift.clone(),
        );
        registry.register(
            "audited_pods",
            "Running workspace pods that the last whole audit saw",
            self.audited.clone(),
        );
        registry.register("audits", "Audits by how they ended", self.audits.clone());
        registry.register_with_unit(
            "last_audit_timestamp",
            "When the last whole audit ended, since the epoch",
            Unit::Seconds,
            self.last.clone(),
        );
    }

    /// Records a whole audit that has just ended.
    pub fn record(&self, report: &Report) {
        for mode in BillingMode::ALL {
            for finding in Finding::ALL {
                let count = report.by_finding.get(&(mode, finding));
                let drift = Drift {
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
        self.ended("ok");
    }

    /// Records one that ended early: what the last whole one found stays.
    pub fn fail(&self) {
        self.ended("failed");
    }

    fn ended(&self, result: &'static str) {
        self.audits.get_or_create(&Ending { result }).inc();
    }

    /// These metrics alone, in the text format.
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

/// What is counted of the connections.
#[derive(Clone, Debug)]
pub struct ConnectionMetrics {
    /// Connections that turned out to be of no use, and lookups tried again on another.
    pub retries: Counter,
    /// How long lookups waited for a connection, one that had to be made included.
    pub wait: Histogram,
}

impl Default for ConnectionMetrics {
    fn default() -> Self {
        Self {
            retries: Counter::default(),
            // From 0.1 ms to 3.3 s: it is a part of the lookup's time-out.
            wait: Histogram::new(exponential_buckets(0.000_1, 2.0, 16)),
        }
    }
}

/// How many connections there are.
#[derive(Clone, Copy, Debug)]
pub struct Connections {
    /// Those on which a lookup runs, or which are being made.
    pub used: usize,
    /// Those that wait for one.
    pub idle: usize,
}

/// What the name of each metric begins with.
const PREFIX: &str = "llm_billing";

/// All metrics of one server.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    admissions: Family<Admission, Counter>,
    admission_duration: Family<WebhookLabels, Histogram, fn() -> Histogram>,
    lookup_duration: Family<Ending, Histogram, fn() -> Histogram>,
    certificate_reloads: Family<Ending, Counter>,
    certificate_expiry: Gauge<f64, AtomicU64>,
    in_flight: Gauge,
    warnings: Family<WarningLabels, Counter>,
    connections: Family<ConnectionState, Gauge>,
    /// What its audits found, if it audits.
    pub audits: AuditMetrics,
}

/// From 0.5 ms to 8 s: the API server waits 30 s at most, and 10 s by default.
fn buckets() -> Histogram {
    Histogram::new(exponential_buckets(0.000_5, 2.0, 15))
}

impl Metrics {
    /// Metrics of a server over this database: which program runs, which policy if its text is given, and how many of the
    /// log's lines were lost. Audits are told of only `with_audits`: without them, zeros would be a lie.
    #[must_use]
    pub fn new(
        policy_text: Option<&str>,
        database: &ConnectionMetrics,
        dropped_lines: ErrorCounter,
        with_audits: bool,
    ) -> Self {
        let mut registry = Registry::with_prefix(PREFIX);
        let admissions = Family::default();
        let admission_duration = Family::new_with_constructor(buckets as fn() -> Histogram);
        let lookup_duration = Family::new_with_constructor(buckets as fn() -> Histogram);
        let certificate_reloads = Family::<Ending, Counter>::default();
        // There from the start, so that the first one is an increase.
        for result in ["ok", "failed"] {
            drop(certificate_reloads.get_or_create(&Ending { result }));
        }
        let certificate_expiry = Gauge::default();
        let in_flight = Gauge::default();
        let warnings = Family::default();
        let connections = Family::default();
        registry.register("admissions", "Admissions answered", admissions.clone());
        registry.register_with_unit(
            "admission_duration",
            "From the arrival of a request's head to its answer",
            Unit::Seconds,
            admission_duration.clone(),
        );
        registry.register_with_unit(
            "lookup_duration",
            "One lookup of a workspace's mode, retry included",
            Unit::Seconds,
            lookup_duration.clone(),
        );
        registry.register(
            "certificate_reloads",
            "Changed certificates, and looks for one that failed",
            certificate_reloads.clone(),
        );
        registry.register_with_unit(
            "certificate_expiry_timestamp",
            "When the serving certificate expires, since the epoch",
            Unit::Seconds,
            certificate_expiry.clone(),
        );
        registry.register(
            "admissions_in_flight",
            "Admissions that are being answered",
            in_flight.clone(),
        );
        registry.register(
            "warnings",
            "Warnings answered, by what they are about",
            warnings.clone(),
        );
        registry.register(
            "database_connections",
            "Connections to the database",
            connections.clone(),
        );
        registry.register_collector(Box::new(DroppedLines(dropped_lines)));
        let audits = AuditMetrics::default();
        if with_audits {
            audits.register(&mut registry);
        }
        register_build(&mut registry, policy_text);
        registry.register(
            "lookup_retries",
            "Lookups tried again because their connection was of no use",
            database.retries.clone(),
        );
        registry.register_with_unit(
            "connection_wait",
            "How long lookups waited for a connection",
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
            connections,
            audits,
        }
    }

    /// Counts an admission as one that is being answered, until what it returns is dropped.
    pub fn in_flight(&self) -> InFlight<'_> {
        self.in_flight.inc();
        InFlight(&self.in_flight)
    }

    /// Counts a decision, its warnings, and how long the admission took.
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
        let Labels {
            mode,
            source,
            reason,
            outcome,
        } = decision.labels();
        let admission = Admission {
            webhook: webhook.as_str(),
            operation: target.as_str(),
            mode,
            source,
            reason,
            outcome,
        };
        self.count(admission, took);
    }

    /// Counts a request that gets no decision, and how long its answer took.
    pub fn bad_request(&self, webhook: Webhook, took: Duration) {
        let admission = Admission {
            webhook: webhook.as_str(),
            operation: AdmissionTarget::NotApplicable.as_str(),
            mode: NONE,
            source: NONE,
            reason: NONE,
            outcome: "bad_request",
        };
        self.count(admission, took);
    }

    fn count(&self, admission: Admission, took: Duration) {
        let webhook = WebhookLabels {
            webhook: admission.webhook,
        };
        self.admission_duration
            .get_or_create(&webhook)
            .observe(took.as_secs_f64());
        self.admissions.get_or_create(&admission).inc();
    }

    /// Counts a lookup by its result.
    pub fn lookup(&self, result: &'static str, took: Duration) {
        self.lookup_duration
            .get_or_create(&Ending { result })
            .observe(took.as_secs_f64());
    }

    /// Counts an attempt to load changed certificate files.
    pub fn certificate_reload(&self, result: &'static str) {
        self.certificate_reloads
            .get_or_create(&Ending { result })
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

    /// All of it in the OpenMetrics text format, with as many connections as there are now.
    ///
    /// # Errors
    /// None in practice: writing to a string does not fail.
    pub fn encode(&self, now: Connections) -> Result<String, std::fmt::Error> {
        for (state, count) in [("used", now.used), ("idle", now.idle)] {
            let connections = self.connections.get_or_create(&ConnectionState { state });
            connections.set(gauge(count));
        }
        encode(&self.registry)
    }
}

/// Reads the log writer's own count.
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

/// Which program runs and, if it may be shown, which policy.
fn register_build(registry: &mut Registry, policy_text: Option<&str>) {
    let version = [("version", env!("CARGO_PKG_VERSION"))];
    registry.register(
        "build",
        "The program that runs",
        Info::new(version.to_vec()),
    );
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

/// One admission that is being answered.
pub struct InFlight<'m>(&'m Gauge);

impl Drop for InFlight<'_> {
    fn drop(&mut self) {
        self.0.dec();
    }
}
