//! The connections that are kept from one lookup to the next: made when needed, lent, closed. What is asked over them
//! is ask.rs's business.
//!
//! sqlx's own pool asks the server once more whenever a connection comes back, in a task made for it, which doubles a
//! lookup's round trips. Here a connection comes back only from a lookup that ended well, and that is asked already.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sqlx::{ConnectOptions, Connection};
use tokio::sync::{Semaphore, SemaphorePermit};
use tokio::time::{Instant, sleep, timeout};

use super::error::is_passing;

/// Connections at most; each is used for one short SELECT at a time.
pub(super) const MOST_CONNECTIONS: usize = 16;
/// From the first try to connect to the second; twice as long each time, until it is as long as may be.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_RETRY_PAUSE: Duration = Duration::from_millis(160);
/// Longest wait for the server to hear that connections are closed.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(1);

/// How many connections there are.
#[derive(Clone, Copy, Debug)]
pub struct Connections {
    /// Those on which a lookup runs, or which are being made.
    pub used: usize,
    /// Those that wait for one.
    pub idle: usize,
}

/// The connections to one database. No `Debug`: a password is in the options.
pub(super) struct Pool<C: Connection> {
    options: C::Options,
    places: Semaphore,
    idle: Mutex<Vec<Idle<C>>>,
}

struct Idle<C> {
    connection: C,
    made: Instant,
    since: Instant,
}

/// A connection that is used. Dropped rather than given back, it is closed: whoever gave a lookup up left its answer
/// in it.
pub(super) struct Lent<'p, C> {
    pub(super) connection: C,
    made: Instant,
    _place: SemaphorePermit<'p>,
}

impl<C: Connection> Pool<C>
where
    C::Options: ConnectOptions<Connection = C>,
{
    pub(super) const fn new(options: C::Options) -> Self {
        Self {
            options,
            places: Semaphore::const_new(MOST_CONNECTIONS),
            idle: Mutex::new(Vec::new()),
        }
    }

    /// The connection that was used last, or a new one; waits for a place, and for a server that is not there yet.
    pub(super) async fn lend(&self) -> Result<Lent<'_, C>, sqlx::Error> {
        let place = self.places.acquire().await;
        let place = place.map_err(|_| sqlx::Error::PoolClosed)?;
        let idle = self.idle().pop();
        let (connection, made) = match idle {
            Some(Idle {
                connection, made, ..
            }) => (connection, made),
            // The future that connects is large and seldom needed: apart, it is not copied with all that hold it.
            None => (Box::pin(self.connect()).await?, Instant::now()),
        };
        Ok(Lent {
            connection,
            made,
            _place: place,
        })
    }

    async fn connect(&self) -> Result<C, sqlx::Error> {
        let mut pause = RETRY_PAUSE;
        loop {
            match self.options.connect().await {
                Err(error) if is_passing(&error) => sleep(pause).await,
                connected => return connected,
            }
            pause = (pause * 2).min(LONGEST_RETRY_PAUSE);
        }
    }

    /// Takes a connection back on which nothing is left to read.
    pub(super) fn give_back(&self, lent: Lent<'_, C>) {
        let Lent {
            connection, made, ..
        } = lent;
        let since = Instant::now();
        self.idle().push(Idle {
            connection,
            made,
            since,
        });
    }

    pub(super) fn connections(&self) -> Connections {
        Connections {
            used: MOST_CONNECTIONS.saturating_sub(self.places.available_permits()),
            idle: self.idle().len(),
        }
    }

    /// Closes the connections that nobody has used for `unused`, and those that were made more than `age` ago, so that
    /// what a server keeps for one does not grow for ever.
    pub(super) async fn close_old(&self, unused: Duration, age: Duration) {
        let is_old =
            |idle: &mut Idle<C>| idle.since.elapsed() >= unused || idle.made.elapsed() >= age;
        let old: Vec<_> = self.idle().extract_if(.., is_old).collect();
        let closing = async {
            for Idle { connection, .. } in old {
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

    const AN_HOUR: Duration = Duration::from_secs(3600);

    fn pool() -> Pool<SqliteConnection> {
        Pool::new(SqliteConnectOptions::new())
    }

    fn counts(pool: &Pool<SqliteConnection>) -> (usize, usize) {
        let Connections { used, idle } = pool.connections();
        (used, idle)
    }

    #[tokio::test]
    async fn the_connection_that_was_used_last_is_lent_first() {
        let pool = pool();
        let [mut one, other] = [pool.lend().await.unwrap(), pool.lend().await.unwrap()];
        let mark = "CREATE TABLE mark (id INTEGER)";
        one.connection.execute(mark).await.unwrap();
        assert_eq!(counts(&pool), (2, 0));
        pool.give_back(other);
        pool.give_back(one);
        assert_eq!(counts(&pool), (0, 2));
        let mut lent = pool.lend().await.unwrap();
        assert_eq!(counts(&pool), (1, 1));
        // Each connection has a database of its own, so that the table is there already.
        lent.connection.execute(mark).await.unwrap_err();
    }

    #[tokio::test]
    async fn a_lookup_that_is_given_up_closes_its_connection_and_frees_its_place() {
        let pool = pool();
        let mut all = Vec::new();
        for _ in 0..MOST_CONNECTIONS {
            all.push(pool.lend().await.unwrap());
        }
        let moment = Duration::from_millis(50);
        assert!(timeout(moment, pool.lend()).await.is_err());
        all.pop();
        assert_eq!(counts(&pool), (MOST_CONNECTIONS - 1, 0));
        drop(timeout(moment, pool.lend()).await.unwrap().unwrap());
        assert_eq!(counts(&pool), (MOST_CONNECTIONS - 1, 0));
    }

    #[tokio::test]
    async fn a_connection_is_closed_that_is_old_or_has_not_been_used_for_long() {
        for (unused, age, idle) in [
            (AN_HOUR, AN_HOUR, 1),
            (Duration::ZERO, AN_HOUR, 0),
            (AN_HOUR, Duration::ZERO, 0),
        ] {
            let pool = pool();
            pool.give_back(pool.lend().await.unwrap());
            pool.close_old(unused, age).await;
            assert_eq!(counts(&pool), (0, idle), "{unused:?} {age:?}");
        }
    }
}
