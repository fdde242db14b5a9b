//! The server's periodic work: waiting for the database, its connections and URL. The certificate's is in certificate/.

use std::future::pending;
use std::sync::Arc;
use std::time::Duration;

use tokio::time::sleep;
use tracing::{error, info, warn};

use crate::database::Database;
use crate::server::certificate::tls::RELOAD_INTERVAL;
use crate::server::webhook::App;
use crate::telemetry;

/// Pause between checks of a database that has not answered yet.
const DATABASE_CHECK_INTERVAL: Duration = Duration::from_secs(1);

/// Checks the database until a check or an admission's lookup succeeds. Never returns.
pub(super) async fn wait_for_database(app: Arc<App>) {
    while !app.readiness.database_answered() {
        match app.database.check().await {
            Ok(()) => app.readiness.set_database_answered(),
            Err(failed) if failed.is_refused() => error!(error = %failed, "not ready"),
            Err(failed) => warn!(error = %failed, "not ready"),
        }
        sleep(DATABASE_CHECK_INTERVAL).await;
    }
    pending().await
}

/// Periodically closes old database connections and reloads the database URL. An unusable URL is logged once, and the
/// one in use stays. Never returns.
pub(crate) async fn maintain_connections(database: Arc<Database>) {
    let mut is_failing = false;
    loop {
        sleep(RELOAD_INTERVAL).await;
        database.close_old().await;
        let reloaded = database.reload();
        match &reloaded {
            Ok(true) => info!("database URL reloaded"),
            Ok(false) => {}
            Err(_) if is_failing => {}
            Err(error) => error!(
                error = telemetry::chain(error),
                "the changed database URL cannot be used; the old one stays"
            ),
        }
        is_failing = reloaded.is_err();
    }
}
