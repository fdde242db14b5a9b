//! The connection pool, based on deadpool: opens, expires and closes connections. The queries live in query.rs.
//!
//! sqlx's own pool pings the server whenever a connection is returned, which doubles a lookup's round trips. This pool
//! does not: a connection is returned only after the database has answered (docs/decisions.md).

use std::time::Duration;

use deadpool::managed::{
    Manager, Metrics, Object, PoolError, QueueMode, RecycleError, RecycleResult,
};
use sqlx::{ConnectOptions, Connection};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::error::is_transient;
use crate::metrics::Connections;

/// Limit on the connections of one pool; each carries one short SELECT at a time.
pub(super) const MAX_CONNECTIONS: usize = 16;
/// Time since its last use after which an idle connection is closed.
const IDLE_TIMEOUT: Duration = Duration::from_mins(10);
/// Age at which a connection is closed, to bound the server's memory for it.
const MAX_LIFETIME: Duration = Duration::from_mins(30);
/// Pause after the first failed attempt to connect. It doubles with each further one, up to the maximum.
const RETRY_INTERVAL: Duration = Duration::from_millis(10);
const MAX_RETRY_INTERVAL: Duration = Duration::from_millis(160);
/// Limit on the time to close connections gracefully.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// A pool of connections to one database. No `Debug`: the options hold a password.
pub(super) struct Pool<C: Connection> {
    pool: deadpool::managed::Pool<Connector<C>>,
    idle_timeout: Duration,
}

/// A connection acquired from the pool, returned on drop.
pub(super) type Acquired<C> = Object<Connector<C>>;

/// Opens connections, and decides which ones are too old to be reused.
pub(super) struct Connector<C: Connection> {
    options: C::Options,
    max_lifetime: Duration,
}

impl<C> Manager for Connector<C>
where
    C: Connection,
    C::Options: ConnectOptions<Connection = C>,
{
    type Type = C;
    type Error = sqlx::Error;

    async fn create(&self) -> Result<C, sqlx::Error> {
        // Boxed: the future is large and seldom needed, and would enlarge every lookup's future.
        Box::pin(self.options.connect()).await
    }

    async fn recycle(&self, _: &mut C, metrics: &Metrics) -> RecycleResult<sqlx::Error> {
        if metrics.age() >= self.max_lifetime {
            return Err(RecycleError::message("too old"));
        }
        Ok(())
    }
}

impl<C> Pool<C>
where
    C: Connection + 'static,
    C::Options: ConnectOptions<Connection = C>,
{
    /// Creates a pool without opening a connection.
    pub(super) fn new(options: C::Options) -> Self {
        Self::with_limits(options, IDLE_TIMEOUT, MAX_LIFETIME)
    }

    fn with_limits(options: C::Options, idle_timeout: Duration, max_lifetime: Duration) -> Self {
        let connector = Connector {
            options,
            max_lifetime,
        };
        let pool = deadpool::managed::Pool::builder(connector)
            .max_size(MAX_CONNECTIONS)
            .queue_mode(QueueMode::Lifo)
            .build();
        let pool = pool.unwrap_or_else(|_| unreachable!("only time-outs need a runtime"));
        Self { pool, idle_timeout }
    }

    /// Returns the most recently used connection, or a new one. Retries transient errors until the deadline.
    ///
    /// # Errors
    /// At the deadline, the error of the last attempt to connect; before it, any error that is not transient.
    pub(super) async fn acquire(&self, deadline: Instant) -> Result<Acquired<C>, sqlx::Error> {
        let mut failure = sqlx::Error::PoolTimedOut;
        let acquiring = async {
            let mut interval = RETRY_INTERVAL;
            loop {
                match self.pool.get().await {
                    Ok(connection) => return Ok(connection),
                    Err(PoolError::Backend(error)) if is_transient(&error) => failure = error,
                    Err(PoolError::Backend(error)) => return Err(error),
                    Err(_) => return Err(sqlx::Error::PoolClosed),
                }
                sleep(interval).await;
                interval = (interval * 2).min(MAX_RETRY_INTERVAL);
            }
        };
        let acquired = timeout_at(deadline, acquiring).await;
        acquired.unwrap_or(Err(failure))
    }

    pub(super) fn connections(&self) -> Connections {
        let status = self.pool.status();
        Connections {
            // Beyond the limit, callers wait for a connection that is in use.
            used: (status.size - status.available + status.waiting).min(MAX_CONNECTIONS),
            idle: status.available,
        }
    }

    /// Closes connections past their lifetime or idle time-out.
    pub(super) async fn close_old(&self) {
        let max_lifetime = self.pool.manager().max_lifetime;
        self.close(|metrics| {
            metrics.age() >= max_lifetime || metrics.last_used() >= self.idle_timeout
        })
        .await;
    }

    /// Closes all idle connections.
    pub(super) async fn close_idle(&self) {
        self.close(|_| true).await;
    }

    async fn close(&self, predicate: impl Fn(&Metrics) -> bool) {
        let removed = self.pool.retain(|_, metrics| !predicate(&metrics)).removed;
        let closing = async {
            for connection in removed {
                // If this fails, dropping the connection closes the socket.
                let _ = connection.close().await;
            }
        };
        let _ = timeout(CLOSE_TIMEOUT, closing).await;
    }
}

#[cfg(test)]
mod tests {
    use sqlx::Executor;
    use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};

    use super::*;

    fn pool() -> Pool<SqliteConnection> {
        Pool::new(SqliteConnectOptions::new())
    }

    async fn acquire(
        pool: &Pool<SqliteConnection>,
    ) -> Result<Acquired<SqliteConnection>, sqlx::Error> {
        let deadline = Instant::now() + Duration::from_millis(200);
        pool.acquire(deadline).await
    }

    fn counts(pool: &Pool<SqliteConnection>) -> (usize, usize) {
        let Connections { used, idle } = pool.connections();
        (used, idle)
    }

    #[tokio::test]
    async fn acquire_returns_the_connection_used_last() {
        let pool = pool();
        let mut one = acquire(&pool).await.unwrap();
        let other = acquire(&pool).await.unwrap();
        let mark = "CREATE TABLE mark (id INTEGER)";
        one.execute(mark).await.unwrap();
        assert_eq!(counts(&pool), (2, 0));
        drop(other);
        drop(one);
        assert_eq!(counts(&pool), (0, 2));
        let mut again = acquire(&pool).await.unwrap();
        assert_eq!(counts(&pool), (1, 1));
        // Each connection has its own in-memory database, so the table exists only on the marked one.
        again.execute(mark).await.unwrap_err();
        pool.close_old().await;
        assert_eq!(counts(&pool), (1, 1));
        pool.close_idle().await;
        assert_eq!(counts(&pool), (1, 0));
    }

    #[tokio::test]
    async fn acquire_waits_for_returned_connection_at_limit() {
        let pool = pool();
        let mut all = Vec::new();
        for _ in 0..MAX_CONNECTIONS {
            all.push(acquire(&pool).await.unwrap());
        }
        let error = acquire(&pool).await.map(drop).unwrap_err();
        assert!(matches!(error, sqlx::Error::PoolTimedOut), "{error}");
        let (next, ()) = tokio::join!(acquire(&pool), async { drop(all.pop()) });
        all.push(next.unwrap());
        // Taken out of the pool, a connection leaves room for another.
        drop(all.pop().map(Acquired::take));
        assert_eq!(counts(&pool), (MAX_CONNECTIONS - 1, 0));
        all.push(acquire(&pool).await.unwrap());
        assert_eq!(counts(&pool), (MAX_CONNECTIONS, 0));
    }

    #[tokio::test]
    async fn connection_is_closed_when_old_or_long_idle() {
        let never = Duration::MAX;
        // limits; whether an idle connection survives close_old, and is reused
        for (idle_timeout, max_lifetime, kept, reused) in [
            (never, never, true, true),
            (Duration::ZERO, never, false, true),
            (never, Duration::ZERO, false, false),
        ] {
            let options = SqliteConnectOptions::new();
            let pool = Pool::with_limits(options, idle_timeout, max_lifetime);
            let mark = "CREATE TABLE mark (id INTEGER)";
            acquire(&pool).await.unwrap().execute(mark).await.unwrap();
            // A new connection has its own in-memory database, without the table.
            let again = acquire(&pool).await.unwrap().execute(mark).await;
            assert_eq!(again.is_err(), reused, "{idle_timeout:?} {max_lifetime:?}");
            pool.close_old().await;
            assert_eq!(counts(&pool), (0, usize::from(kept)), "{idle_timeout:?} {max_lifetime:?}");
        }
    }
}
