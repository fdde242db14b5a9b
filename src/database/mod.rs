//! The lookup of a workspace's mode, on PostgreSQL and on SQLite: connections, deadlines, retries and the limit on
//! concurrent lookups. The query is query.rs's business, what an error means error.rs's, and what the outcome means
//! core's.
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
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Either, Executor, SqlSafeStr, Statement};
use tokio::time::{Instant, timeout_at};
use uuid::Uuid;

pub use self::embedded::{Embedded, EmbeddedError};
pub use self::error::LookupError;
use self::error::{is_connection_lost, is_login_refused, leaves_connection_usable};
use self::pool::{Acquired, MAX_CONNECTIONS, Pool};
use self::query::{BatchLookup, Query, SingleLookup, batch_query};
pub use self::url::{DatabaseUrl, SourceError, UrlError, UrlSource, UrlText};
use crate::core::identity::ParameterValue;
use crate::core::policy_file::{Lookup, Parameter, ParameterType};
use crate::core::resolution::LookupOutcome;
use crate::metrics::{ConnectionMetrics, Connections};

/// Limit on concurrent lookups. A thousand pods at once are more than the API servers of a large cluster send.
const MAX_LOOKUPS: usize = 1024;
/// The limit while the database is in doubt: enough to notice that it is back, and few enough that a database that
/// hangs delays few admissions.
const MAX_LOOKUPS_IN_DOUBT: usize = MAX_CONNECTIONS;
/// Limit on an audit's concurrent lookups, where one query cannot look up many: admissions come first.
const MAX_AUDIT_LOOKUPS: usize = 4;
/// The id that `check` looks up. No workspace should have it; it does no harm if one does.
const SAMPLE_ID: Uuid = Uuid::nil();

/// The database that holds the workspaces' modes. No `Debug`: its URL may hold a password.
pub struct Database {
    source: UrlSource,
    current: RwLock<Arc<Current>>,
    query: Arc<str>,
    parameters: Vec<Parameter>,
    timeout: Duration,
    limiter: Limiter,
    /// Counts retries, and measures the wait for a connection.
    pub metrics: ConnectionMetrics,
}

/// Bounds the number of concurrent lookups.
#[derive(Default)]
struct Limiter {
    lookups: AtomicUsize,
    /// Whether the lookup that ended last failed at its deadline.
    in_doubt: AtomicBool,
}

impl Limiter {
    /// Counts one more lookup until the permit is dropped; `None` above the limit.
    fn acquire(&self) -> Option<Permit<'_>> {
        let limit = if self.in_doubt.load(Ordering::Relaxed) {
            MAX_LOOKUPS_IN_DOUBT
        } else {
            MAX_LOOKUPS
        };
        let permit = Permit(self);
        (self.lookups.fetch_add(1, Ordering::Relaxed) < limit).then_some(permit)
    }
}

struct Permit<'a>(&'a Limiter);

impl Drop for Permit<'_> {
    fn drop(&mut self) {
        self.0.lookups.fetch_sub(1, Ordering::Relaxed);
    }
}

/// The URL in use, and the connections to it.
struct Current {
    url: UrlText,
    pool: AnyPool,
}

enum AnyPool {
    Postgres {
        pool: Pool<PgConnection>,
        /// Begins a transaction around the lookup, where a session is not the webhook's own.
        begin: Option<Arc<str>>,
    },
    Sqlite(Pool<SqliteConnection>),
}

impl AnyPool {
    /// Prepares the pool. The server gets `timeout` too: a backend that waits for a lock does not notice that its client
    /// is gone, and would stay until the lock is released.
    fn connect_lazily(url: DatabaseUrl, timeout: Duration) -> Self {
        let milliseconds = timeout.as_millis().max(1);
        match url {
            DatabaseUrl::Postgres { options, session } => {
                let (options, begin) = if session {
                    let setting = [("statement_timeout", milliseconds)];
                    (options.options(setting), None)
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

    async fn close_idle(&self) {
        match self {
            Self::Postgres { pool, .. } => pool.close_idle().await,
            Self::Sqlite(pool) => pool.close_idle().await,
        }
    }
}

impl Database {
    /// Prepares the database. The first lookup connects, so the database may come up later.
    ///
    /// # Errors
    /// [`SourceError`]
    pub fn connect_lazily(source: UrlSource, lookup: &Lookup) -> Result<Arc<Self>, SourceError> {
        let url = source.read()?;
        let pool = AnyPool::connect_lazily(url.0.parse()?, lookup.timeout);
        Ok(Arc::new(Self {
            source,
            current: RwLock::new(Arc::new(Current { url, pool })),
            query: lookup.query.as_str().into(),
            parameters: lookup.parameters.clone(),
            timeout: lookup.timeout,
            limiter: Limiter::default(),
            metrics: ConnectionMetrics::default(),
        }))
    }

    fn current(&self) -> Arc<Current> {
        let current = self.current.read();
        Arc::clone(&current.unwrap_or_else(PoisonError::into_inner))
    }

    /// Reads the URL from its source again. Returns whether it has changed.
    ///
    /// # Errors
    /// [`SourceError`]; the URL in use then stays.
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

    /// Executes the policy's query. Fails at the policy's time-out, or after `limit` if that is shorter.
    ///
    /// Runs in a task of its own: a caller that goes away does not cancel it in the middle of a query, so the
    /// connection stays usable.
    ///
    /// # Errors
    /// [`LookupError`], whose text quotes the database and no credentials.
    pub async fn lookup(
        self: &Arc<Self>,
        parameters: Vec<ParameterValue>,
        limit: Option<Duration>,
    ) -> Result<LookupOutcome, LookupError> {
        let database = Arc::clone(self);
        in_own_task(async move {
            let _permit = database.limiter.acquire().ok_or(LookupError::Overloaded)?;
            let deadline = Instant::now()
                + limit.map_or(database.timeout, |limit| limit.min(database.timeout));
            let result = database.execute_single(&parameters, deadline).await;
            let in_doubt = match &result {
                // The server's own time-out may be shorter.
                Err(LookupError::Timeout) => true,
                Err(_) => Instant::now() >= deadline,
                Ok(_) => false,
            };
            database.limiter.in_doubt.store(in_doubt, Ordering::Relaxed);
            result
        })
        .await
    }

    /// Executes the policy's query, whatever the limit on concurrent lookups.
    async fn execute_single(
        &self,
        parameters: &[ParameterValue],
        deadline: Instant,
    ) -> Result<LookupOutcome, LookupError> {
        let used = self.current();
        let mut result = self.execute_on(&used, parameters, deadline).await;
        if result.as_ref().is_err_and(is_login_refused) {
            // Another task may have read the file first: only whether the URL is another one by now counts. The task
            // that follows the file reports one that cannot be used.
            let _ = self.reread();
            let now = self.current();
            if now.url != used.url {
                result = self.execute_on(&now, parameters, deadline).await;
            }
        }
        result.map_err(LookupError::from)
    }

    async fn execute_on(
        &self,
        current: &Current,
        parameters: &[ParameterValue],
        deadline: Instant,
    ) -> Result<LookupOutcome, sqlx::Error> {
        let lookup = |begin| SingleLookup {
            query: &self.query,
            parameters,
            begin,
        };
        match &current.pool {
            AnyPool::Postgres { pool, begin } => {
                execute(pool, &lookup(begin.as_ref()), deadline, &self.metrics).await
            }
            AnyPool::Sqlite(pool) => execute(pool, &lookup(None), deadline, &self.metrics).await,
        }
    }

    /// Looks up many workspaces, each by its parameters' values, and returns the outcomes in the same order. Executes
    /// one query where the policy's query allows it, and else one for each workspace, a few at a time. Values that the
    /// database cannot use fail that workspace's lookup alone.
    ///
    /// Runs in a task of its own, as [`Self::lookup`].
    ///
    /// # Errors
    /// [`LookupError`], if the database fails or refuses the query.
    pub async fn lookup_batch(
        self: &Arc<Self>,
        values: Vec<Vec<ParameterValue>>,
    ) -> Result<Vec<Result<LookupOutcome, LookupError>>, LookupError> {
        let database = Arc::clone(self);
        in_own_task(async move {
            if let Some(outcomes) = database.execute_batch(&values).await? {
                return Ok(outcomes.into_iter().map(Ok).collect());
            }
            let single = async |values: &Vec<ParameterValue>| {
                let deadline = Instant::now() + database.timeout;
                match database.execute_single(values, deadline).await {
                    Err(unusable @ LookupError::Unusable(_)) => Ok(Err(unusable)),
                    result => result.map(Ok),
                }
            };
            futures_util::stream::iter(values.iter().map(single))
                .buffered(MAX_AUDIT_LOOKUPS)
                .try_collect()
                .await
        })
        .await
    }

    /// Executes one query for many workspaces. Returns `None` where only a query for each can tell: the policy's query
    /// cannot be part of another one, or one of the values cannot be used.
    async fn execute_batch(
        &self,
        values: &[Vec<ParameterValue>],
    ) -> Result<Option<Vec<LookupOutcome>>, LookupError> {
        let current = self.current();
        let AnyPool::Postgres { pool, begin } = &current.pool else {
            return Ok(None);
        };
        let Some(query) = batch_query(&self.query, &self.parameters) else {
            return Ok(None);
        };
        let lookup = BatchLookup {
            query: &query,
            parameters: &self.parameters,
            values,
            begin: begin.as_ref(),
        };
        let deadline = Instant::now() + self.timeout;
        match execute(pool, &lookup, deadline, &self.metrics)
            .await
            .map_err(LookupError::from)
        {
            Ok(outcomes) => Ok((outcomes.len() == values.len()).then_some(outcomes)),
            Err(LookupError::Unusable(_) | LookupError::Refused(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Executes the policy's query for an id that no workspace has.
    ///
    /// # Errors
    /// As [`Self::lookup`].
    pub async fn check(self: &Arc<Self>) -> Result<(), LookupError> {
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
        // PostgreSQL ignores surplus parameters, so their number is compared.
        match self.parameters_of_query().await {
            Some(expected) if expected != parameters.len() => Err(LookupError::Refused(format!(
                "it takes {expected} parameters, and lookup.parameters has {}",
                parameters.len()
            ))),
            _ => match self.lookup(parameters, None).await {
                // The query is valid; only the sample cannot be used, for example where text is cast to a number.
                Ok(_) | Err(LookupError::Unusable(_)) => Ok(()),
                Err(error) => Err(error),
            },
        }
    }

    /// Returns how many parameters the query takes; `None` if the database cannot tell without their types.
    async fn parameters_of_query(&self) -> Option<usize> {
        let query = AssertSqlSafe(Arc::clone(&self.query)).into_sql_str();
        let deadline = Instant::now() + self.timeout;
        let current = self.current();
        // Prepared without types, the statement must not stay where lookups would find it: the connection is taken out
        // of the pool and closed.
        let count = async {
            match &current.pool {
                // A named statement would stay with the pooler.
                AnyPool::Postgres { begin: Some(_), .. } => Ok(None),
                AnyPool::Postgres { pool, .. } => {
                    let mut connection = Acquired::take(pool.acquire(deadline).await?);
                    count((&mut connection).prepare(query).await?.parameters())
                }
                AnyPool::Sqlite(pool) => {
                    let mut connection = Acquired::take(pool.acquire(deadline).await?);
                    count((&mut connection).prepare(query).await?.parameters())
                }
            }
        };
        timeout_at(deadline, count).await.ok()?.ok()?
    }

    /// Returns how many connections there are now.
    #[must_use]
    pub fn connections(&self) -> Connections {
        self.current().pool.connections()
    }

    /// Closes connections that are old or have been idle for long. To be called periodically.
    pub async fn close_old(&self) {
        self.current().pool.close_old().await;
    }

    /// Closes all connections that no lookup uses.
    pub async fn close_idle(&self) {
        self.current().pool.close_idle().await;
    }
}

fn count<T>(parameters: Option<Either<&[T], usize>>) -> Result<Option<usize>, sqlx::Error> {
    Ok(parameters.map(|parameters| parameters.either(<[T]>::len, |count| count)))
}

/// Awaits work in a task of its own, which goes on if the caller goes away.
async fn in_own_task<T: Send + 'static>(
    work: impl Future<Output = Result<T, LookupError>> + Send + 'static,
) -> Result<T, LookupError> {
    let result = tokio::spawn(work).await;
    result.unwrap_or_else(|_| {
        Err(LookupError::Unavailable(
            "the lookup's task panicked".to_owned(),
        ))
    })
}

/// Executes a query over a pooled connection. After a restart the pool holds lost connections, which only their use
/// reveals, so the query is retried on the next one. Pinging each connection first would cost every lookup a round trip.
async fn execute<C, Q>(
    pool: &Pool<C>,
    query: &Q,
    deadline: Instant,
    metrics: &ConnectionMetrics,
) -> Result<Q::Output, sqlx::Error>
where
    C: Connection + 'static,
    C::Options: ConnectOptions<Connection = C>,
    Q: Query<C>,
{
    let mut retries_left = MAX_CONNECTIONS;
    loop {
        let started = Instant::now();
        let acquired = pool.acquire(deadline).await;
        metrics.wait.observe(started.elapsed().as_secs_f64());
        let mut connection = acquired?;
        let executed = timeout_at(deadline, query.execute(&mut connection)).await;
        let result = executed.unwrap_or(Err(sqlx::Error::PoolTimedOut));
        if result.as_ref().err().is_none_or(leaves_connection_usable) {
            return result;
        }
        // Out of the pool and closed: it is lost, or its query may still run.
        drop(Acquired::take(connection));
        match result {
            Err(error) if is_connection_lost(&error) && retries_left > 0 => {
                retries_left -= 1;
                metrics.retries.inc();
            }
            result => return result,
        }
    }
}
