//! The lookup of a workspace's mode, on PostgreSQL and on SQLite. What is looked up, and what the answer means, is
//! core's business; how it is asked over one connection is query.rs's, and what its errors mean is error.rs's.
//!
//! A production database is only ever read. Where its URL is in a file, the file is read again when it changes
//! and when the database refuses the login, so that a password can be rotated without a restart.

mod embedded;
mod error;
mod pool;
mod query;
mod url;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use scopeguard::ScopeGuard;
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Either, Executor, SqlSafeStr, Statement};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

pub use self::embedded::{Embedded, EmbeddedError};
pub use self::error::LookupError;
use self::error::{is_answer, is_login_refused, is_stale};
use self::pool::{MOST_CONNECTIONS, Pool};
use self::query::{Ask, Many, One, query_of_many};
pub use self::url::{DatabaseUrl, SourceError, UrlError, UrlSource, UrlText};
use crate::core::identity::ParameterValue;
use crate::core::policy_file::{Lookup, Parameter, ParameterType};
use crate::core::resolution::LookupOutcome;
use crate::metrics::{ConnectionMetrics, Connections};

/// Lookups at most that run or wait for a connection. Over a thousand pods at once are more than the API servers
/// of a large cluster ask about, and their lookups are over in a fraction of a second.
const MOST_LOOKUPS: usize = 1024;
/// The same after a lookup that failed at its deadline, until one ends in time: enough to find out that the database is
/// back, and few enough that a database that hangs or is not there holds up few admissions.
const MOST_LOOKUPS_IN_DOUBT: usize = MOST_CONNECTIONS;
/// A lookup whose caller waits no longer than this says nothing of the database if it fails. API servers wait for
/// seconds; were it otherwise, a client in haste could make others' lookups too many.
const HASTE: Duration = Duration::from_millis(100);
/// Lookups that an audit runs at a time, where it cannot ask for many at once: pods that wait come first.
const MOST_LOOKUPS_OF_AN_AUDIT: usize = 4;
/// The id that `check` looks up. No workspace should have it; it is no mistake if one does.
const SAMPLE_ID: Uuid = Uuid::nil();

/// The database that knows the workspaces' modes. No `Debug`: its URL may hold a password.
pub struct Database {
    source: UrlSource,
    current: RwLock<Arc<Current>>,
    query: Arc<str>,
    parameters: Vec<Parameter>,
    timeout: Duration,
    crowd: Crowd,
    /// What is counted of the connections.
    pub metrics: ConnectionMetrics,
}

/// How many lookups there are, and whether the last one to end failed at its deadline.
#[derive(Default)]
struct Crowd {
    lookups: AtomicUsize,
    in_doubt: AtomicBool,
}

impl Crowd {
    /// A place for one more lookup, until it is dropped.
    fn enter(&self) -> Option<Place<'_>> {
        let most = if self.in_doubt.load(Ordering::Relaxed) {
            MOST_LOOKUPS_IN_DOUBT
        } else {
            MOST_LOOKUPS
        };
        let place = Place(self);
        (self.lookups.fetch_add(1, Ordering::Relaxed) < most).then_some(place)
    }
}

/// One lookup's place. A request that its client gave up gives it back too.
struct Place<'a>(&'a Crowd);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.lookups.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How long a lookup may take.
#[derive(Clone, Copy)]
struct Deadlines {
    /// Nobody waits any longer.
    caller: Instant,
    /// The database should have answered, whether somebody waits or not.
    database: Instant,
}

impl Deadlines {
    fn of(time: Duration, limit: Option<Duration>) -> Self {
        let now = Instant::now();
        Self {
            caller: now + limit.map_or(time, |limit| limit.min(time)),
            database: now + time,
        }
    }
}

/// The URL in use, and the connections to it.
struct Current {
    url: UrlText,
    pool: AnyPool,
}

impl Current {
    async fn fetch(
        &self,
        query: &Arc<str>,
        parameters: &[ParameterValue],
        deadlines: Deadlines,
        metrics: &ConnectionMetrics,
    ) -> Result<LookupOutcome, sqlx::Error> {
        let one = |begin| One {
            query,
            parameters,
            begin,
        };
        match &self.pool {
            AnyPool::Postgres { pool, begin } => {
                fetch(pool, &one(begin.as_ref()), deadlines, metrics).await
            }
            AnyPool::Sqlite(pool) => fetch(pool, &one(None), deadlines, metrics).await,
        }
    }
}

enum AnyPool {
    Postgres {
        pool: Arc<Pool<PgConnection>>,
        /// Begins a transaction around the lookup, where a session is not the webhook's own.
        begin: Option<Arc<str>>,
    },
    Sqlite(Arc<Pool<SqliteConnection>>),
}

impl AnyPool {
    /// `timeout` is told to the server: one that waits for a lock does not notice that nobody waits any more,
    /// and each such connection would stay until the lock is gone.
    fn connect_lazily(url: DatabaseUrl, timeout: Duration) -> Self {
        let milliseconds = timeout.as_millis().max(1);
        match url {
            DatabaseUrl::Postgres { options, session } => {
                let (options, begin) = if session {
                    let of_session = [("statement_timeout", milliseconds)];
                    (options.options(of_session), None)
                } else {
                    let begin =
                        format!("BEGIN READ ONLY; SET LOCAL statement_timeout = {milliseconds}");
                    (*options, Some(begin.into()))
                };
                Self::Postgres {
                    pool: Pool::new(options),
                    begin,
                }
            }
            DatabaseUrl::Sqlite(options) => Self::Sqlite(Pool::new(options.read_only(true))),
        }
    }

    fn connections(&self) -> Connections {
        match self {
            Self::Postgres { pool, .. } => pool.connections(),
            Self::Sqlite(pool) => pool.connections(),
        }
    }

    async fn close_old(&self) {
        match self {
            Self::Postgres { pool, .. } => pool.close_old().await,
            Self::Sqlite(pool) => pool.close_old().await,
        }
    }

    async fn close_all(&self) {
        match self {
            Self::Postgres { pool, .. } => pool.close_all().await,
            Self::Sqlite(pool) => pool.close_all().await,
        }
    }
}

impl Database {
    /// Prepares connections; none is made before the first lookup, so the database may come up later.
    ///
    /// # Errors
    /// [`SourceError`]
    pub fn connect_lazily(source: UrlSource, lookup: &Lookup) -> Result<Self, SourceError> {
        let url = source.read()?;
        let pool = AnyPool::connect_lazily(url.0.parse()?, lookup.timeout);
        Ok(Self {
            source,
            current: RwLock::new(Arc::new(Current { url, pool })),
            query: lookup.query.as_str().into(),
            parameters: lookup.parameters.clone(),
            timeout: lookup.timeout,
            crowd: Crowd::default(),
            metrics: ConnectionMetrics::default(),
        })
    }

    fn current(&self) -> Arc<Current> {
        let current = self.current.read();
        Arc::clone(&current.unwrap_or_else(PoisonError::into_inner))
    }

    /// Takes the URL from its source again; whether it was another one.
    ///
    /// # Errors
    /// [`SourceError`], and the URL in use stays.
    pub fn reread(&self) -> Result<bool, SourceError> {
        let url = self.source.read()?;
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if current.url == url {
            return Ok(false);
        }
        // The old connections close as the lookups that use them end.
        let pool = AnyPool::connect_lazily(url.0.parse()?, self.timeout);
        *current = Arc::new(Current { url, pool });
        Ok(true)
    }

    /// Runs the policy's query, within the policy's time-out and `limit`, whichever is shorter.
    ///
    /// # Errors
    /// [`LookupError`], whose text holds what the database says and no credentials.
    pub async fn lookup(
        &self,
        parameters: &[ParameterValue],
        limit: Option<Duration>,
    ) -> Result<LookupOutcome, LookupError> {
        let _place = self.crowd.enter().ok_or(LookupError::Crowded)?;
        let deadlines = Deadlines::of(self.timeout, limit);
        let result = self.lookup_uncrowded(parameters, deadlines).await;
        let in_doubt = match &result {
            // The server's own time-out may be shorter.
            Err(LookupError::Timeout) => true,
            Err(_) => Instant::now() >= deadlines.caller,
            Ok(_) => false,
        };
        if !in_doubt || limit.is_none_or(|limit| limit > HASTE) {
            self.crowd.in_doubt.store(in_doubt, Ordering::Relaxed);
        }
        result
    }

    /// A lookup that takes nobody's place, and says nothing of whether the database hangs.
    async fn lookup_uncrowded(
        &self,
        parameters: &[ParameterValue],
        deadlines: Deadlines,
    ) -> Result<LookupOutcome, LookupError> {
        let used = self.current();
        let mut result = used
            .fetch(&self.query, parameters, deadlines, &self.metrics)
            .await;
        if result.as_ref().is_err_and(is_login_refused) {
            // Whoever reads the file first: what counts is whether there is another URL by now. A file that
            // cannot be used is reported by those who follow it.
            let _ = self.reread();
            let now = self.current();
            if now.url != used.url {
                result = now
                    .fetch(&self.query, parameters, deadlines, &self.metrics)
                    .await;
            }
        }
        result.map_err(LookupError::from)
    }

    /// Looks many workspaces up, each by its parameters, and answers in their order: by one query where the
    /// policy's allows it, else by one each, a few at a time. What one pod brings can be of no use, and the others
    /// are looked up all the same.
    ///
    /// # Errors
    /// [`LookupError`], if the database fails or refuses the query.
    pub async fn lookup_many(
        &self,
        many: &[Vec<ParameterValue>],
    ) -> Result<Vec<Result<LookupOutcome, LookupError>>, LookupError> {
        if let AnyPool::Postgres { pool, begin } = &self.current().pool
            && let Some(query) = query_of_many(&self.query, &self.parameters)
        {
            let asked = Many {
                query: &query,
                parameters: &self.parameters,
                many,
                begin: begin.as_ref(),
            };
            let deadlines = Deadlines::of(self.timeout, None);
            let answered = fetch(pool, &asked, deadlines, &self.metrics).await;
            match answered.map_err(LookupError::from) {
                Ok(stored) if stored.len() == many.len() => {
                    return Ok(stored.into_iter().map(Ok).collect());
                }
                // Which of them it is, or whether the policy's query cannot stand in another, shows one by one.
                Ok(_) | Err(LookupError::Unusable(_) | LookupError::Refused(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let one = async |parameters: &Vec<ParameterValue>| match self
            .lookup_uncrowded(parameters, Deadlines::of(self.timeout, None))
            .await
        {
            Err(unusable @ LookupError::Unusable(_)) => Ok(Err(unusable)),
            answered => answered.map(Ok),
        };
        futures_util::stream::iter(many.iter().map(one))
            .buffered(MOST_LOOKUPS_OF_AN_AUDIT)
            .try_collect()
            .await
    }

    /// Runs the policy's query as a lookup does, for an id that no workspace has.
    ///
    /// # Errors
    /// As [`Self::lookup`].
    pub async fn check(&self) -> Result<(), LookupError> {
        let sample = |parameter: &Parameter| match parameter {
            Parameter::Label {
                kind: ParameterType::Uuid,
                ..
            } => ParameterValue::Uuid(SAMPLE_ID),
            // Text that is a UUID too, for queries that cast it.
            Parameter::Label {
                kind: ParameterType::Text,
                ..
            } => ParameterValue::Text(SAMPLE_ID.to_string()),
            Parameter::Namespace => ParameterValue::Text("default".to_owned()),
        };
        let parameters: Vec<ParameterValue> = self.parameters.iter().map(sample).collect();
        // PostgreSQL takes surplus parameters without a word, so it is asked how many there are.
        match self.parameters_of_query().await {
            Some(expected) if expected != parameters.len() => Err(LookupError::Refused(format!(
                "it takes {expected} parameters, and lookup.parameters has {}",
                parameters.len()
            ))),
            _ => match self.lookup(&parameters, None).await {
                // The query was answered; it is the sample that it cannot use, such as one that casts text to a number.
                Ok(_) | Err(LookupError::Unusable(_)) => Ok(()),
                Err(error) => Err(error),
            },
        }
    }

    /// How many parameters the query takes; `None` if the database cannot say without their types.
    async fn parameters_of_query(&self) -> Option<usize> {
        let query = AssertSqlSafe(Arc::clone(&self.query)).into_sql_str();
        let deadline = Instant::now() + self.timeout;
        let current = self.current();
        // Prepared without types, the statement must not stay where lookups would find it: the connection is not given
        // back.
        let count = async {
            match &current.pool {
                // What is prepared under a name would stay with the pooler.
                AnyPool::Postgres { begin: Some(_), .. } => Ok(None),
                AnyPool::Postgres { pool, .. } => {
                    let mut lent = pool.lend(deadline).await?;
                    count((&mut lent.connection).prepare(query).await?.parameters())
                }
                AnyPool::Sqlite(pool) => {
                    let mut lent = pool.lend(deadline).await?;
                    count((&mut lent.connection).prepare(query).await?.parameters())
                }
            }
        };
        timeout_at(deadline, count).await.ok()?.ok()?
    }

    /// How many connections there are now.
    #[must_use]
    pub fn connections(&self) -> Connections {
        self.current().pool.connections()
    }

    /// Closes connections that are old or have not been used for long; to be called now and then.
    pub async fn close_old(&self) {
        self.current().pool.close_old().await;
    }

    /// Closes all connections that no lookup uses.
    pub async fn close(&self) {
        self.current().pool.close_all().await;
    }
}

fn count<T>(parameters: Option<Either<&[T], usize>>) -> Result<Option<usize>, sqlx::Error> {
    Ok(parameters.map(|parameters| parameters.either(<[T]>::len, |count| count)))
}

/// Fetches over one of the pool's connections. One that has not answered by the database's deadline is closed, for its
/// query may not have ended. A server that restarted leaves stale connections, at most as many as there are, and each shows itself only when it is
/// used; then the next one is tried. To ask each before would cost every lookup a round trip.
async fn fetch<C, A>(
    pool: &Arc<Pool<C>>,
    asked: &A,
    deadlines: Deadlines,
    metrics: &ConnectionMetrics,
) -> Result<A::Answer, sqlx::Error>
where
    C: Connection + 'static,
    C::Options: ConnectOptions<Connection = C>,
    A: Ask<C>,
{
    let mut tries_left = MOST_CONNECTIONS;
    loop {
        let waits_since = Instant::now();
        let lent = pool.lend(deadlines.caller).await;
        metrics.wait.observe(waits_since.elapsed().as_secs_f64());
        let lent = lent?;
        // A client that goes away drops this future wherever it waits, and one in haste waits no longer.
        let settle = |lent| {
            // A transaction that was only just begun would stay open.
            if !asked.begins() {
                Arc::clone(pool).settle(lent, deadlines.database);
            }
        };
        let mut lent = scopeguard::guard(lent, settle);
        let fetched = timeout_at(deadlines.caller, asked.ask(&mut lent.connection)).await;
        let fetched = fetched.map_err(|_| sqlx::Error::PoolTimedOut)?;
        let lent = ScopeGuard::into_inner(lent);
        match fetched {
            Err(error) if is_stale(&error) && tries_left > 0 => {
                tries_left -= 1;
                metrics.retries.inc();
            }
            fetched => {
                if fetched.as_ref().err().is_none_or(is_answer) {
                    pool.give_back(lent);
                }
                return fetched;
            }
        }
    }
}
