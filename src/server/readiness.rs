//! The readiness state of the process. health.rs serves it at `/readyz`.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use time::OffsetDateTime;

/// The state that decides whether the pod is ready for traffic.
#[derive(Debug, Default)]
pub struct Readiness {
    draining: AtomicBool,
    database_answered: AtomicBool,
    certificate_expiry: AtomicI64,
}

impl Readiness {
    /// Marks the process as draining; `/readyz` fails from now on.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Reports whether the process is draining.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// Records that the database has answered once. A later outage keeps the pod ready: the fallback still serves.
    pub fn set_database_answered(&self) {
        self.database_answered.store(true, Ordering::Relaxed);
    }

    /// Reports whether the database has answered at least once.
    pub fn database_answered(&self) -> bool {
        self.database_answered.load(Ordering::Relaxed)
    }

    /// Records when the serving certificate expires, in seconds since the epoch.
    pub fn set_certificate_expiry(&self, timestamp: i64) {
        self.certificate_expiry.store(timestamp, Ordering::Relaxed);
    }

    /// Returns why the pod is not ready; `None` if it is.
    pub(super) fn not_ready_reason(&self) -> Option<&'static str> {
        if self.is_draining() {
            Some("draining")
        } else if self.certificate_expiry.load(Ordering::Relaxed)
            <= OffsetDateTime::now_utc().unix_timestamp()
        {
            Some("the certificate has expired")
        } else if !self.database_answered() {
            Some("the database has not answered the policy's query yet")
        } else {
            None
        }
    }
}
