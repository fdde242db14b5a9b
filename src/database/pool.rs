//! The connections that are kept from one lookup to the next: made when needed, lent, closed. What is asked over them
//! is query.rs's business.
//!
//! sqlx's own pool asks the server once more whenever a connection comes back, in a task made for it, which doubles a
//! lookup's round trips. Here nothing is asked where the lookup was answered, which says as much.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::{ConnectOptions, Connection};
use tokio::runtime::Handle;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::error::is_passing;
use crate::metrics::Connections;

/// Connections at most; each is used for one short SELECT at a time.
pub(super) const MOST_CONNECTIONS: usize = 16;
/// A connection that is not used for so long is closed.
const LONGEST_UNUSED: Duration = Duration::from_secs(10 * 60);
/// A connection that is so old is closed, so that what the server keeps for it does not grow for ever.
const LONGEST_LIFE: Duration = Duration::from_secs(30 * 60);
/// From the first try to connect to the second; twice as long each time, until it is as long as may be.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_RETRY_PAUSE: Duration = Duration::from_millis(160);
/// Longest wait for the server to hear that connections are closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// The connections to one database. No `Debug`: a password is in the options.
pub(super) struct Pool<C: Connection> {
    options: C::Options,
    places: Arc<Semaphore>,
    idle: Mutex<Vec<Idle<C>>>,
}

struct Idle<C> {
    connection: C,
    made: Instant,
    since: Instant,
}

/// A connection that is used. Dropped, it is closed.
pub(super) struct Lent<C> {
    pub(super) connection: C,
    made: Instant,
    _place: OwnedSemaphorePermit,
}

impl<C> Pool<C>
where
    C: Connection + 'static,
    C::Options: ConnectOptions<Connection = C>,
{
    pub(super) fn new(options: C::Options) -> Arc<Self> {
        Arc::new(Self {
            options,
            places: Arc::new(Semaphore::new(MOST_CONNECTIONS)),
            idle: Mutex::new(Vec::new()),
        })
    }

    /// The connection that was used last, or a new one. Waits until the deadline for a place, and for a server that is
    /// not there yet; what it was that kept it waiting is the error.
    pub(super) async fn lend(&self, deadline: Instant) -> Result<Lent<C>, sqlx::Error> {
        let place = Arc::clone(&self.places).acquire_owned();
        let place = timeout_at(deadline, place).await;
        let place = place.map_err(|_| sqlx::Error::PoolTimedOut)?;
        let place = place.map_err(|_| sqlx::Error::PoolClosed)?;
        let idle = self.idle().pop();
        let (connection, made) = match idle {
            Some(Idle {
                connection, made, ..
            }) => (connection, made),
            // The future that connects is large and seldom needed: apart, it is not copied with all that hold it.
            None => (Box::pin(self.connect(deadline)).await?, Instant::now()),
        };
        Ok(Lent {
            connection,
            made,
            _place: place,
        })
    }

    async fn connect(&self, deadline: Instant) -> Result<C, sqlx::Error> {
        let mut failure = sqlx::Error::PoolTimedOut;
        let connecting = async {
            let mut pause = RETRY_PAUSE;
            loop {
                match self.options.connect().await {
                    Err(error) if is_passing(&error) => failure = error,
                    connected => return connected,
                }
                sleep(pause).await;
                pause = (pause * 2).min(LONGEST_RETRY_PAUSE);
            }
        };
        let connected = timeout_at(deadline, connecting).await;
        connected.unwrap_or(Err(failure))
    }

    /// Takes a connection back whose question was answered.
    pub(super) fn give_back(&self, lent: Lent<C>) {
        let Lent {
            connection, made, ..
        } = lent;
        let since = Instant::now();
        if since - made < LONGEST_LIFE {
            self.idle().push(Idle {
                connection,
                made,
                since,
            });
        }
    }

    /// Takes a connection back from whoever went away before the answer, once that has come, unless `deadline` comes
    /// first. Were it closed, clients that go away could keep the server busy with new connections.
    pub(super) fn settle(self: Arc<Self>, mut lent: Lent<C>, deadline: Instant) {
        let settling = async move {
            if let Ok(Ok(())) = timeout_at(deadline, lent.connection.ping()).await {
                self.give_back(lent);
            }
        };
        // There is none where the program ends.
        if let Ok(runtime) = Handle::try_current() {
            runtime.spawn(settling);
        }
    }

    pub(super) fn connections(&self) -> Connections {
        Connections {
            used: MOST_CONNECTIONS.saturating_sub(self.places.available_permits()),
            idle: self.idle().len(),
        }
    }

    /// Closes the connections that are old or have not been used for long.
    pub(super) async fn close_old(&self) {
        self.close(|idle| {
            idle.since.elapsed() >= LONGEST_UNUSED || idle.made.elapsed() >= LONGEST_LIFE
        })
        .await;
    }

    /// Closes all connections that nobody uses.
    pub(super) async fn close_all(&self) {
        self.close(|_| true).await;
    }

    async fn close(&self, which: impl Fn(&mut Idle<C>) -> bool) {
        let closed: Vec<_> = self.idle().extract_if(.., which).collect();
        let closing = async {
            for Idle { connection, .. } in closed {
                // Whether the server hears of it or not, it is closed.
                let _ = connection.close().await;
            }
        };
        let _ = timeout(CLOSE_TIMEOUT, closing).await;
    }

    fn idle(&self) -> MutexGuard<'_, Vec<Idle<C>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use sqlx::Executor;
    use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection};

    use super::*;

    fn pool() -> Arc<Pool<SqliteConnection>> {
        Pool::new(SqliteConnectOptions::new())
    }

    async fn lend(pool: &Pool<SqliteConnection>) -> Result<Lent<SqliteConnection>, sqlx::Error> {
        pool.lend(Instant::now() + Duration::from_millis(200)).await
    }

    fn counts(pool: &Pool<SqliteConnection>) -> (usize, usize) {
        let Connections { used, idle } = pool.connections();
        (used, idle)
    }

    #[tokio::test]
    async fn the_connection_that_was_used_last_is_lent_first() {
        let pool = pool();
        let [mut one, other] = [lend(&pool).await.unwrap(), lend(&pool).await.unwrap()];
        let mark = "CREATE TABLE mark (id INTEGER)";
        one.connection.execute(mark).await.unwrap();
        assert_eq!(counts(&pool), (2, 0));
        pool.give_back(other);
        pool.give_back(one);
        assert_eq!(counts(&pool), (0, 2));
        let mut lent = lend(&pool).await.unwrap();
        assert_eq!(counts(&pool), (1, 1));
        // Each connection has a database of its own, so that the table is there already.
        lent.connection.execute(mark).await.unwrap_err();
        pool.close_all().await;
        assert_eq!(counts(&pool), (1, 0));
    }

    #[tokio::test]
    async fn no_more_connections_are_lent_than_there_are_places() {
        let pool = pool();
        let mut all = Vec::new();
        for _ in 0..MOST_CONNECTIONS {
            all.push(lend(&pool).await.unwrap());
        }
        let none = lend(&pool).await.map(drop).unwrap_err();
        assert!(matches!(none, sqlx::Error::PoolTimedOut), "{none}");
        // Dropped, it is closed, and another can be made in its place.
        all.pop();
        assert_eq!(counts(&pool), (MOST_CONNECTIONS - 1, 0));
        let lent = lend(&pool).await.unwrap();
        Arc::clone(&pool).settle(lent, Instant::now() + LONGEST_LIFE);
        let lent = lend(&pool).await.unwrap();
        assert_eq!(counts(&pool), (MOST_CONNECTIONS, 0));
        drop(lent);
    }

    #[tokio::test]
    async fn a_connection_is_closed_that_is_old_or_has_not_been_used_for_long() {
        let minute = Duration::from_secs(60);
        let ago = |time| Instant::now() - time;
        for (unused, age, kept) in [
            (LONGEST_UNUSED - minute, LONGEST_LIFE - minute, 1),
            (LONGEST_UNUSED, LONGEST_UNUSED, 0),
            (minute, LONGEST_LIFE, 0),
        ] {
            let pool = pool();
            pool.give_back(lend(&pool).await.unwrap());
            for idle in pool.idle().iter_mut() {
                (idle.since, idle.made) = (ago(unused), ago(age));
            }
            pool.close_old().await;
            assert_eq!(counts(&pool), (0, kept), "{unused:?} {age:?}");
        }
        // One that is used all the time is old when it comes back.
        for (age, kept) in [(LONGEST_LIFE - minute, 1), (LONGEST_LIFE, 0)] {
            let pool = pool();
            let mut lent = lend(&pool).await.unwrap();
            lent.made = ago(age);
            pool.give_back(lent);
            assert_eq!(counts(&pool), (0, kept), "{age:?}");
        }
    }
}
