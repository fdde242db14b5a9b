//! Looks up workspaces' billing modes in PostgreSQL or SQLite: deadlines, retries and the limit on concurrent lookups.
//! One lookup can be retried at three places, all before its deadline: connecting (pool.rs), the query on another
//! connection if the first is lost, and both with a new URL if the login is refused (here). query.rs repeats a statement
//! that sqlx itself has displaced.
//!
//! The queries live in query.rs, the connection pool in pool.rs, the errors in error.rs and the URL in url.rs.
//!
//! No lookup writes. A file with its URL is reloaded when it changes and when the database
//! rejects the login, so that a password can be rotated without a restart.

mod embedded;
mod error;
mod notifications;
mod pool;
mod query;
mod url;

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use futures_util::{StreamExt, TryStreamExt};
use sqlx::postgres::PgConnection;
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, ConnectOptions, Connection, Executor, SqlSafeStr, Statement};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep, timeout_at};
use tracing::warn;
use uuid::Uuid;

pub use self::embedded::{Embedded, EmbeddedError};
pub use self::error::{AnswerError, LookupError};
use self::error::{is_connection_lost, is_login_refused, leaves_connection_usable};
pub use self::notifications::{Change, Notifications};
use self::pool::{Acquired, MAX_CONNECTIONS, Pool};
use self::query::{BatchLookup, Query, SingleLookup, batch_query, probe_query};
pub use self::url::{DatabaseUrl, SourceError, UrlError, UrlSource, UrlText};
use crate::core::identity::ParameterValue;
use crate::core::policy::Policy;
use crate::core::policy_file::{Parameter, ParameterType};
use crate::core::resolution::LookupOutcome;
use crate::metrics::{ConnectionMetrics, Connections};

/// Limit on concurrent lookups, above the load that a large cluster's API servers send.
const MAX_LOOKUPS: usize = 1024;
/// The limit while the database is degraded: enough to notice its recovery, and few enough that a hanging database
/// delays few admissions.
const MAX_DEGRADED_LOOKUPS: usize = MAX_CONNECTIONS;
/// Limit on an audit's concurrent single lookups, so that admissions come first.
const MAX_AUDIT_LOOKUPS: usize = 4;
/// Limit on notifications that wait to be received. PostgreSQL keeps further ones.
const MAX_WAITING_CHANGES: usize = 1024;
/// Pause before a connection that listened is opened again.
const RELISTEN_INTERVAL: Duration = Duration::from_secs(5);
/// The id that `check` looks up. It need not exist.
const SAMPLE_ID: Uuid = Uuid::nil();

/// The database that holds the workspaces' modes. No `Debug`: its URL may hold a password.
pub struct Database {
    source: UrlSource,
    current: RwLock<Arc<Current>>,
    query: Arc<str>,
    /// A query that shows the query's columns.
    probe: Arc<str>,
    parameters: Vec<Parameter>,
    /// The columns that the policy names.
    columns: Vec<String>,
    timeout: Duration,
    limiter: Limiter,
    /// Metrics of the connections.
    pub metrics: ConnectionMetrics,
}

/// Bounds the number of concurrent lookups.
#[derive(Default)]
struct Limiter {
    lookups: AtomicUsize,
    /// Whether the most recently completed lookup failed at its deadline.
    is_degraded: AtomicBool,
}

impl Limiter {
    /// Returns a permit for one lookup; `None` at the limit.
    fn acquire(&self) -> Option<Permit<'_>> {
        let limit = if self.is_degraded.load(Ordering::Relaxed) {
            MAX_DEGRADED_LOOKUPS
        } else {
            MAX_LOOKUPS
        };
        let others = self.lookups.fetch_add(1, Ordering::Relaxed);
        // Dropped above the limit, the permit undoes the count.
        let permit = Permit(self);
        (others < limit).then_some(permit)
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
    /// The host and port, for errors.
    place: String,
    pool: AnyPool,
}

impl Current {
    fn new(url: UrlText, timeout: Duration) -> Result<Self, UrlError> {
        let parsed: DatabaseUrl = url.0.parse()?;
        Ok(Self {
            url,
            place: parsed.place(),
            pool: AnyPool::connect_lazily(parsed, timeout),
        })
    }
}

enum AnyPool {
    Postgres {
        pool: Pool<PgConnection>,
        /// The SQL that begins a transaction around each lookup, behind a pooler in transaction mode.
        begin: Option<Arc<str>>,
    },
    Sqlite(Pool<SqliteConnection>),
}

impl AnyPool {
    /// Prepares the pool. Also sets `timeout` as the server's `statement_timeout`: a backend that waits for a lock does
    /// not notice that its client has disconnected.
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
    /// Prepares the database without connecting, so that it may start later.
    ///
    /// # Errors
    /// [`SourceError`]
    pub fn connect_lazily(source: UrlSource, policy: &Policy) -> Result<Arc<Self>, SourceError> {
        let lookup = &policy.lookup;
        let current = Current::new(source.read()?, lookup.timeout)?;
        Ok(Arc::new(Self {
            source,
            current: RwLock::new(Arc::new(current)),
            query: lookup.query.as_str().into(),
            probe: probe_query(&lookup.query).into(),
            columns: policy.columns.clone(),
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

    /// Reloads the URL from its source. Returns whether it has changed.
    ///
    /// # Errors
    /// [`SourceError`]; the URL in use then stays.
    pub fn reload(&self) -> Result<bool, SourceError> {
        let url = self.source.read()?;
        let mut current = self.current.write().unwrap_or_else(PoisonError::into_inner);
        if current.url == url {
            return Ok(false);
        }
        // Old connections close when their lookups end.
        *current = Arc::new(Current::new(url, self.timeout)?);
        Ok(true)
    }

    /// Executes the policy's query. Fails after the policy's time-out, or after `limit` if that is shorter.
    ///
    /// Runs in its own task: a cancelled caller does not interrupt the query, so the connection stays usable.
    ///
    /// # Errors
    /// [`LookupError`]; its text may quote the database's message, but never credentials.
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
            let query = &database.query;
            let result = database.execute_single(query, &parameters, deadline).await;
            let is_degraded = match &result {
                // The server's own time-out may be shorter.
                Err(LookupError::Timeout(_)) => true,
                Err(_) => Instant::now() >= deadline,
                Ok(_) => false,
            };
            database
                .limiter
                .is_degraded
                .store(is_degraded, Ordering::Relaxed);
            result
        })
        .await
    }

    /// Executes a query without a limit on concurrent lookups. Reloads the URL if the login is rejected.
    async fn execute_single(
        &self,
        query: &Arc<str>,
        parameters: &[ParameterValue],
        deadline: Instant,
    ) -> Result<LookupOutcome, LookupError> {
        let mut used = self.current();
        let mut result = self.execute_on(&used, query, parameters, deadline).await;
        if let Some(current) = self.reload_after(result.as_ref().err(), &used) {
            used = current;
            result = self.execute_on(&used, query, parameters, deadline).await;
        }
        result.map_err(|error| LookupError::new(&error, &used.place))
    }

    /// Reloads the URL if the login is rejected. Returns the connections to the changed URL, for another attempt.
    fn reload_after(&self, error: Option<&sqlx::Error>, used: &Current) -> Option<Arc<Current>> {
        error.filter(|error| is_login_refused(error))?;
        // Another task may have reloaded the URL first, so compare it instead of using the result. The task that maintains
        // connections reports an unusable URL.
        let _ = self.reload();
        let current = self.current();
        (current.url != used.url).then_some(current)
    }

    async fn execute_on(
        &self,
        current: &Current,
        query: &Arc<str>,
        parameters: &[ParameterValue],
        deadline: Instant,
    ) -> Result<LookupOutcome, sqlx::Error> {
        let lookup = |begin| SingleLookup {
            query,
            parameters,
            columns: &self.columns,
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
    /// one query if the policy's query allows it, otherwise one per workspace, a few at a time. Unusable values and
    /// several rows fail only their workspace's lookup.
    ///
    /// Runs in its own task, like [`Self::lookup`].
    ///
    /// # Errors
    /// [`LookupError`] if the database fails or rejects the query.
    pub async fn lookup_batch(
        self: &Arc<Self>,
        values: Vec<Vec<ParameterValue>>,
    ) -> Result<Vec<Result<LookupOutcome, LookupError>>, LookupError> {
        let database = Arc::clone(self);
        in_own_task(async move {
            if let Some(outcomes) = database.execute_batch(&values).await? {
                return Ok(outcomes);
            }
            let single = async |values: &Vec<ParameterValue>| {
                let deadline = Instant::now() + database.timeout;
                let query = &database.query;
                match database.execute_single(query, values, deadline).await {
                    Err(error) if error.is_of_one_workspace() => Ok(Err(error)),
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

    /// Executes one query for many workspaces. Returns `None` if single lookups are needed: the policy's query cannot
    /// be embedded in another one, or the batch was rejected.
    async fn execute_batch(
        &self,
        values: &[Vec<ParameterValue>],
    ) -> Result<Option<Vec<Result<LookupOutcome, LookupError>>>, LookupError> {
        let Some(query) = batch_query(&self.query, &self.parameters) else {
            return Ok(None);
        };
        let deadline = Instant::now() + self.timeout;
        let mut used = self.current();
        let mut result = self.execute_batch_on(&used, &query, values, deadline).await;
        if let Some(current) = self.reload_after(result.as_ref().err(), &used) {
            used = current;
            result = self.execute_batch_on(&used, &query, values, deadline).await;
        }
        match result.map_err(|error| LookupError::new(&error, &used.place)) {
            // The joined list has one row for each workspace, unless the policy's query is of an unexpected kind.
            Ok(outcomes) => Ok(outcomes.filter(|outcomes| outcomes.len() == values.len())),
            Err(LookupError::Unusable(_) | LookupError::Refused(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Executes a batch query. Returns `None` on SQLite, which has none.
    async fn execute_batch_on(
        &self,
        current: &Current,
        query: &str,
        values: &[Vec<ParameterValue>],
        deadline: Instant,
    ) -> Result<Option<Vec<Result<LookupOutcome, LookupError>>>, sqlx::Error> {
        let AnyPool::Postgres { pool, begin } = &current.pool else {
            return Ok(None);
        };
        let lookup = BatchLookup {
            query,
            parameters: &self.parameters,
            values,
            columns: &self.columns,
            begin: begin.as_ref(),
        };
        execute(pool, &lookup, deadline, &self.metrics)
            .await
            .map(Some)
    }

    /// Validates the policy's query by executing it with sample parameters. Takes no admission's permit.
    ///
    /// # Errors
    /// See [`Self::lookup`].
    pub async fn check(self: &Arc<Self>) -> Result<(), LookupError> {
        let sample = |parameter: &Parameter| match parameter {
            Parameter::Label {
                kind: ParameterType::Uuid,
                ..
            } => ParameterValue::Uuid(SAMPLE_ID),
            // A UUID, for queries that cast the text to one.
            Parameter::Label {
                kind: ParameterType::Text,
                ..
            } => ParameterValue::Text(SAMPLE_ID.to_string()),
            Parameter::Namespace => ParameterValue::Text("default".to_owned()),
        };
        let parameters: Vec<ParameterValue> = self.parameters.iter().map(sample).collect();
        let count = parameters.len();
        // PostgreSQL ignores surplus parameters, so their number is compared.
        if let Some(expected) = self.count_parameters().await
            && expected != count
        {
            return Err(LookupError::Refused(format!(
                "it takes {expected} parameters, and lookup.parameters has {count}"
            )));
        }
        let database = Arc::clone(self);
        in_own_task(async move {
            let execute = async |query: &Arc<str>| {
                let deadline = Instant::now() + database.timeout;
                database.execute_single(query, &parameters, deadline).await
            };
            // The probe returns a row even for an unknown workspace, and so shows a missing column.
            let result = match execute(&database.probe).await {
                // Some queries cannot be part of another query.
                Err(LookupError::Refused(_)) => execute(&database.query).await,
                result => result,
            };
            match result {
                // The query is valid; only the sample is unusable, for example for a cast to a number.
                Ok(_) | Err(LookupError::Unusable(_)) => Ok(()),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Returns the query's number of parameters; `None` if the database cannot tell without their types.
    async fn count_parameters(&self) -> Option<usize> {
        let query = AssertSqlSafe(Arc::clone(&self.query)).into_sql_str();
        let deadline = Instant::now() + self.timeout;
        let current = self.current();
        // Lookups must not reuse a statement that was prepared without types, so the connection is taken out of the
        // pool and closed.
        let count = async {
            match &current.pool {
                // The pooler would keep a named statement.
                AnyPool::Postgres { begin: Some(_), .. } => Ok(None),
                AnyPool::Postgres { pool, .. } => {
                    let mut connection = Acquired::take(pool.acquire(deadline).await?);
                    Ok(count_parameters(&(&mut connection).prepare(query).await?))
                }
                AnyPool::Sqlite(pool) => {
                    let mut connection = Acquired::take(pool.acquire(deadline).await?);
                    Ok(count_parameters(&(&mut connection).prepare(query).await?))
                }
            }
        };
        let count: Result<_, sqlx::Error> = timeout_at(deadline, count).await.ok()?;
        count.ok()?
    }

    /// Checks whether notifications on a channel arrive.
    ///
    /// # Errors
    /// [`LookupError`] if the database cannot be reached.
    pub async fn check_channel(&self, channel: &str) -> Result<Notifications, LookupError> {
        let current = self.current();
        match current.url.0.parse() {
            Ok(DatabaseUrl::Postgres { session: false, .. }) => Ok(Notifications::Lost),
            Ok(DatabaseUrl::Postgres { options, .. }) => {
                let checked = notifications::check(*options, channel, self.timeout).await;
                checked.map_err(|error| LookupError::new(&error, &current.place))
            }
            Ok(DatabaseUrl::Sqlite(_)) | Err(_) => Ok(Notifications::Unsupported),
        }
    }

    /// Listens on a channel in a task of its own, until the receiver is dropped. A pooler in transaction mode is not asked
    /// to listen: it would pass notifications to other clients, whose queries they would break.
    pub fn listen(self: Arc<Self>, channel: &str) -> mpsc::Receiver<Change> {
        let (sender, receiver) = mpsc::channel(MAX_WAITING_CHANGES);
        let channel = channel.to_owned();
        tokio::spawn(async move {
            let mut is_failing = false;
            while !sender.is_closed() {
                let current = self.current();
                let Ok(DatabaseUrl::Postgres {
                    options,
                    session: true,
                }) = current.url.0.parse()
                else {
                    warn!(channel, "the database URL allows no notifications; see check");
                    return;
                };
                let forwarded =
                    notifications::forward(*options, &channel, &sender, &mut is_failing).await;
                if let Err(error) = forwarded
                    && !std::mem::replace(&mut is_failing, true)
                {
                    let error = LookupError::new(&error, &current.place);
                    warn!(%error, channel, "no notifications; changes are found by comparison alone");
                }
                sleep(RELISTEN_INTERVAL).await;
            }
        });
        receiver
    }

    /// Returns the current numbers of connections.
    #[must_use]
    pub fn connections(&self) -> Connections {
        self.current().pool.connections()
    }

    /// Closes connections past their lifetime or idle time-out. Call this periodically.
    pub async fn close_old(&self) {
        self.current().pool.close_old().await;
    }

    /// Closes all idle connections.
    pub async fn close_idle(&self) {
        self.current().pool.close_idle().await;
    }
}

fn count_parameters<S: Statement>(statement: &S) -> Option<usize> {
    let parameters = statement.parameters()?;
    Some(parameters.either(<[_]>::len, |count| count))
}

/// Awaits work in its own task, which continues if the caller is cancelled.
async fn in_own_task<T: Send + 'static>(
    work: impl Future<Output = Result<T, LookupError>> + Send + 'static,
) -> Result<T, LookupError> {
    let result = tokio::spawn(work).await;
    result.unwrap_or(Err(LookupError::Panicked))
}

/// Executes a query over a pooled connection. After a restart of the database, the pool holds lost connections, which
/// only their use reveals, so the query is retried on the next one. Pinging first would cost every lookup a round trip.
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
        // Taken out of the pool and closed: it is lost, or its query may still run.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn check_takes_no_permit_of_a_lookup() {
        let policy = Policy::parse("").unwrap();
        let source = UrlSource::Given("sqlite://nowhere.sqlite".into());
        let database = Database::connect_lazily(source, &policy).unwrap();
        let permits: Vec<_> = (0..MAX_LOOKUPS)
            .map(|_| database.limiter.acquire().unwrap())
            .collect();
        let parameters = vec![ParameterValue::Uuid(SAMPLE_ID)];
        let is_overloaded = |result| matches!(result, Err(LookupError::Overloaded));
        assert!(is_overloaded(database.lookup(parameters.clone(), None).await.map(drop)));
        assert!(!is_overloaded(database.check().await));
        drop(permits);
        assert!(!is_overloaded(database.lookup(parameters, None).await.map(drop)));
    }
}
