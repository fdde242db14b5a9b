//! The Lease that makes one replica active: acquired, renewed, and taken over when its holder is gone.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::api::{ObjectMeta, PostParams};
use kube::{Api, Client};
use tokio::sync::watch;
use tokio::time::{Instant, sleep, timeout};
use tracing::{info, warn};

use crate::cluster::ClusterError;
use crate::telemetry;

/// Time without a renewal after which another replica takes the Lease over.
const LEASE_DURATION: Duration = Duration::from_secs(15);
/// Time without a renewal after which the holder stops acting: before another one may begin.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// Pause between attempts to acquire or renew the Lease.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// What a replica knows about the Lease.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Standing {
    /// It holds the Lease, and may act until then; without a Lease, always.
    Active(Option<Instant>),
    /// It could not renew the Lease in time, and has seen no other holder.
    Lapsed,
    /// Another replica holds the Lease.
    Passive,
}

impl Standing {
    pub(super) fn is_active(self) -> bool {
        match self {
            Self::Active(until) => until.is_none_or(|until| Instant::now() < until),
            Self::Lapsed | Self::Passive => false,
        }
    }
}

/// One replica's view of the Lease.
pub(super) struct Election {
    leases: Api<Lease>,
    name: String,
    identity: String,
    /// The last seen renewal by another holder, and when this replica saw it first. The clocks of two machines are not
    /// compared.
    seen: Option<(Option<MicroTime>, Instant)>,
}

impl Election {
    pub(super) fn new(client: &Client, namespace: &str, name: &str, identity: String) -> Self {
        Self {
            leases: Api::namespaced(client.clone(), namespace),
            name: name.to_owned(),
            identity,
            seen: None,
        }
    }

    /// Keeps the standing up to date. Never returns.
    pub(super) async fn run(&mut self, standing: &watch::Sender<Standing>) {
        let (mut is_failing, mut was_active) = (false, false);
        loop {
            // The Lease counts from no earlier than this.
            let sent = Instant::now();
            let held = timeout(RENEW_DEADLINE / 2, self.acquire()).await;
            let held = held.unwrap_or_else(|_| {
                Err(ClusterError::Unreachable("it did not answer in time".to_owned()))
            });
            let before = *standing.borrow();
            let now = match &held {
                Ok(true) => Standing::Active(Some(sent + RENEW_DEADLINE)),
                Ok(false) => Standing::Passive,
                Err(_) if before == Standing::Passive || before.is_active() => before,
                Err(_) => Standing::Lapsed,
            };
            if let Err(error) = &held
                && !is_failing
            {
                let error = telemetry::chain(error);
                warn!(error, lease = self.name, "cannot acquire or renew the Lease");
            }
            is_failing = held.is_err();
            standing.send_replace(now);
            if std::mem::replace(&mut was_active, now.is_active()) != now.is_active() {
                let is_active = now.is_active();
                info!(is_active, lease = self.name, identity = self.identity, "Lease");
            }
            sleep(RETRY_INTERVAL).await;
        }
    }

    /// Gives the Lease up if this replica holds it, so that another one need not wait.
    pub(super) async fn release(&self) {
        let released = async {
            let mut lease = self.leases.get(&self.name).await?;
            let spec = lease.spec.get_or_insert_default();
            if spec.holder_identity.as_deref() == Some(&self.identity) {
                spec.holder_identity = None;
                self.leases
                    .replace(&self.name, &PostParams::default(), &lease)
                    .await?;
            }
            Ok::<_, kube::Error>(())
        };
        // Otherwise it expires.
        let _ = timeout(RENEW_DEADLINE / 2, released).await;
    }

    /// Acquires or renews the Lease. Returns whether this replica holds it.
    async fn acquire(&mut self) -> Result<bool, ClusterError> {
        let now = MicroTime(Timestamp::now());
        let Some(mut lease) = self.leases.get_opt(&self.name).await? else {
            let lease = Lease {
                metadata: ObjectMeta {
                    name: Some(self.name.clone()),
                    ..ObjectMeta::default()
                },
                spec: Some(self.spec(now.clone(), now, 0)),
            };
            return is_ours(self.leases.create(&PostParams::default(), &lease).await);
        };
        let spec = lease.spec.unwrap_or_default();
        let holder = spec.holder_identity.as_deref().unwrap_or_default();
        let transitions = spec.lease_transitions.unwrap_or_default();
        let spec = if holder == self.identity {
            let acquired = spec.acquire_time.unwrap_or_else(|| now.clone());
            self.spec(acquired, now, transitions)
        } else {
            if !holder.is_empty() && !self.is_expired(spec.renew_time) {
                return Ok(false);
            }
            self.spec(now.clone(), now, transitions.saturating_add(1))
        };
        lease.spec = Some(spec);
        // The resource version makes the API server refuse the second of two replicas.
        is_ours(
            self.leases
                .replace(&self.name, &PostParams::default(), &lease)
                .await,
        )
    }

    fn spec(&self, acquired: MicroTime, renewed: MicroTime, transitions: i32) -> LeaseSpec {
        LeaseSpec {
            holder_identity: Some(self.identity.clone()),
            lease_duration_seconds: i32::try_from(LEASE_DURATION.as_secs()).ok(),
            acquire_time: Some(acquired),
            renew_time: Some(renewed),
            lease_transitions: Some(transitions),
            ..LeaseSpec::default()
        }
    }

    /// Reports whether the other holder has not renewed for the Lease's duration.
    fn is_expired(&mut self, renewed: Option<MicroTime>) -> bool {
        match &self.seen {
            Some((seen, at)) if *seen == renewed => at.elapsed() >= LEASE_DURATION,
            _ => {
                self.seen = Some((renewed, Instant::now()));
                false
            }
        }
    }
}

/// Reports whether a write succeeded; another replica may have been faster.
fn is_ours(written: Result<Lease, kube::Error>) -> Result<bool, ClusterError> {
    match written.map_err(ClusterError::from) {
        Ok(_) => Ok(true),
        Err(ClusterError::Conflict(_)) => Ok(false),
        Err(error) => Err(error),
    }
}
