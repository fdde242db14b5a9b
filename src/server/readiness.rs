//! Whether the process should get traffic. Who asks is health.rs's business.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};

use time::OffsetDateTime;

/// Whether the process should get traffic.
#[derive(Debug, Default)]
pub struct Readiness {
    draining: AtomicBool,
    database_answered: AtomicBool,
    certificate_expiry: AtomicI64,
}

impl Readiness {
    /// No more: the process is about to end.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether it is.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// The database answered once. A later loss does not take the pod out: the fallback still serves.
    pub fn set_database_answered(&self) {
        self.database_answered.store(true, Ordering::Relaxed);
    }

    /// Whether it did.
    pub fn database_answered(&self) -> bool {
        self.database_answered.load(Ordering::Relaxed)
    }

    /// When the serving certificate expires, in seconds since the epoch.
    pub fn set_certificate_expiry(&self, timestamp: i64) {
        self.certificate_expiry.store(timestamp, Ordering::Relaxed);
    }

    pub(super) fn obstacle(&self) -> Option<&'static str> {
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
