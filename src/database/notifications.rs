//! PostgreSQL's notifications of changed rows, over connections of their own. mod.rs has the connections' URL.

use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgListener, PgPool, PgPoolOptions};
use tokio::sync::mpsc;
use tokio::time::timeout;
use tracing::info;

/// The payload of the notification that a check sends. It is no workspace's id.
const CHECK_PAYLOAD: &str = "check";

/// What has changed in the database.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Change {
    /// The row of the workspace with this id.
    Workspace(String),
    /// Any row: the payload is empty, or notifications may have been lost.
    Any,
}

/// Whether changed rows are notified of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notifications {
    /// A notification on the channel arrives, and a trigger's function names the channel.
    Ready,
    /// A notification on the channel arrives, but no trigger's function names the channel.
    NoTrigger,
    /// A notification on the channel does not arrive, or the URL is that of a pooler in transaction mode.
    Lost,
    /// The database has no notifications.
    Unsupported,
}

/// Returns a pool for a connection that listens, and one that notifies.
fn pool(options: PgConnectOptions) -> PgPool {
    PgPoolOptions::new()
        .max_connections(2)
        .connect_lazy_with(options)
}

/// Checks a channel by sending a notification on it.
pub(super) async fn check(
    options: PgConnectOptions,
    channel: &str,
    limit: Duration,
) -> Result<Notifications, sqlx::Error> {
    const HAS_TRIGGER: &str = "SELECT EXISTS (
        SELECT FROM pg_trigger JOIN pg_proc ON pg_proc.oid = tgfoid
        WHERE NOT tgisinternal AND tgenabled <> 'D' AND position($1 in prosrc) > 0)";
    let pool = pool(options);
    let mut listener = PgListener::connect_with(&pool).await?;
    listener.listen(channel).await?;
    let notify = sqlx::query("SELECT pg_notify($1, $2)");
    let notify = notify.bind(channel).bind(CHECK_PAYLOAD);
    notify.execute(&pool).await?;
    match timeout(limit, listener.recv()).await {
        Ok(received) => drop(received?),
        Err(_) => return Ok(Notifications::Lost),
    }
    let has_trigger = sqlx::query_scalar(HAS_TRIGGER).bind(channel);
    Ok(match has_trigger.fetch_one(&pool).await? {
        true => Notifications::Ready,
        false => Notifications::NoTrigger,
    })
}

/// Forwards notifications until the connection fails or the receiver is dropped. Sets `is_failing` to false once it
/// listens.
pub(super) async fn forward(
    options: PgConnectOptions,
    channel: &str,
    sender: &mpsc::Sender<Change>,
    is_failing: &mut bool,
) -> Result<(), sqlx::Error> {
    let mut listener = PgListener::connect_with(&pool(options)).await?;
    listener.listen(channel).await?;
    info!(channel, "listening for changed rows");
    *is_failing = false;
    // Earlier notifications were lost.
    let mut change = Change::Any;
    while sender.send(change).await.is_ok() {
        change = match listener.try_recv().await? {
            Some(notification) if !notification.payload().is_empty() => {
                Change::Workspace(notification.payload().to_owned())
            }
            // Without a notification, the connection was lost and is open again.
            Some(_) | None => Change::Any,
        };
    }
    Ok(())
}
