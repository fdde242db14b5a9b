//! The lookup of a workspace's mode, on PostgreSQL and on SQLite, and the embedded SQLite database that
//! `serve --dev` and `workspace` use. What is looked up, and what the answer means, is core's business.
//!
//! A production database is only ever read. Where its URL is in a file, the file is read again when it changes
//! and when the database refuses the login, so that a password can be rotated without a restart.

use std::path::PathBuf;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{PoisonError, RwLock};
use std::time::Duration;
use std::{fmt, io};

use futures_util::{StreamExt, TryStreamExt};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use sqlx::postgres::{PgConnectOptions, PgConnection, PgPoolOptions, PgRow, PgTypeKind};
use sqlx::sqlite::{SqliteConnectOptions, SqliteConnection, SqlitePoolOptions};
use sqlx::{
    AssertSqlSafe, ConnectOptions, Connection, Either, Executor, Pool, Postgres, Row, SqlSafeStr,
    Sqlite, Statement, TypeInfo, ValueRef,
};
use thiserror::Error;
use tokio::time::{Instant, sleep, timeout_at};
use uuid::Uuid;

use crate::core::mode::{BillingMode, Stored};
use crate::core::policy::{Lookup, Parameter, ParameterType};
use crate::core::workspace::ParameterValue;

/// Connections at most; each is used for one short SELECT at a time.
const MOST_CONNECTIONS: u32 = 16;
/// Lookups at most that run or wait for a connection. Over a thousand pods at once are more than the API servers
/// of a large cluster ask about, and their lookups are over in a fraction of a second.
const MOST_LOOKUPS: usize = 1024;
/// The same after a lookup that timed out, until one succeeds: enough to find out that the database is back,
/// and few enough that a database that hangs holds up few admissions.
const MOST_LOOKUPS_IN_DOUBT: usize = MOST_CONNECTIONS as usize;
/// Lookups that an audit runs at a time, where it cannot ask for many at once: pods that wait come first.
const MOST_LOOKUPS_OF_AN_AUDIT: usize = 4;
/// Between two tries to connect.
const RETRY_PAUSE: Duration = Duration::from_millis(10);
/// The id that `check` looks up. No workspace should have it; it is no mistake if one does.
const SAMPLE_ID: Uuid = Uuid::nil();

/// What a `PostgreSQL` URL says where connections are shared by a pooler that changes them between transactions.
const NO_PREPARED_STATEMENTS: &str = "statement-cache-capacity=0";

/// Where the database is. Neither `Debug` nor `Display` shows user, password or options.
#[derive(Clone)]
pub enum DatabaseUrl {
    /// `postgres://…`
    Postgres {
        /// Where, as whom and how to connect.
        options: Box<PgConnectOptions>,
        /// Whether a session is the webhook's own, so that what is set or prepared in it stays. It is not
        /// behind a pooler in transaction mode, which the URL tells by `statement-cache-capacity=0`.
        session: bool,
    },
    /// `sqlite://…`
    Sqlite(Box<SqliteConnectOptions>),
}

/// Why a database URL cannot be used. Says nothing of the URL: it may hold a password.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum UrlError {
    /// The scheme is neither of the two.
    #[error("it must start with postgres:// or sqlite://")]
    Scheme,
    /// The rest has the wrong shape.
    #[error(
        "it has the wrong shape; expected postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=… or sqlite://FILE"
    )]
    Shape,
}

impl FromStr for DatabaseUrl {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<Self, UrlError> {
        match url.split_once("://").map(|(scheme, _)| scheme) {
            Some("postgres" | "postgresql") => {
                let options = PgConnectOptions::from_str(url).map_err(|_| UrlError::Shape)?;
                let options = options
                    .application_name(env!("CARGO_PKG_NAME"))
                    // No number is ever read, and PgBouncer refuses parameters that it does not know.
                    .extra_float_digits(None)
                    .disable_statement_logging();
                let settings = url.split_once('?').map_or("", |(_, settings)| settings);
                Ok(Self::Postgres {
                    options: Box::new(options),
                    session: !settings
                        .split('&')
                        .any(|pair| pair == NO_PREPARED_STATEMENTS),
                })
            }
            Some("sqlite") => {
                let options = SqliteConnectOptions::from_str(url).map_err(|_| UrlError::Shape)?;
                Ok(Self::Sqlite(Box::new(options.disable_statement_logging())))
            }
            _ => Err(UrlError::Scheme),
        }
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Postgres { options, .. } => {
                let database = options.get_database().unwrap_or_default();
                write!(
                    f,
                    "postgres://{}:{}/{database}",
                    options.get_host(),
                    options.get_port()
                )
            }
            Self::Sqlite(options) => write!(f, "sqlite://{}", options.get_filename().display()),
        }
    }
}

impl fmt::Debug for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Why a lookup gave no answer.
#[derive(Debug, Error)]
pub enum LookupError {
    /// The deadline passed.
    #[error("the database did not answer in time")]
    Timeout,
    /// Too many lookups wait for the database already.
    #[error("too many lookups wait for the database")]
    Crowded,
    /// No connection, or the connection broke, or the database could not do it just now.
    #[error("the database could not be asked: {0}")]
    Unavailable(String),
    /// The database cannot use what this pod brings, such as text that is no UUID where the query casts it.
    #[error("the database cannot use the pod's parameters: {0}")]
    Unusable(String),
    /// The database refuses the query as such: no passing fault. The text is the database's own.
    #[error("the database refuses the policy's query: {0}")]
    Refused(String),
}

impl LookupError {
    /// The error's kind as a metric's label.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Timeout => "timeout",
            Self::Crowded => "crowded",
            Self::Unavailable(_) => "unavailable",
            Self::Unusable(_) => "unusable",
            Self::Refused(_) => "refused",
        }
    }
}

impl From<sqlx::Error> for LookupError {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::PoolTimedOut => Self::Timeout,
            sqlx::Error::Io(missing) if missing.kind() == io::ErrorKind::NotFound => {
                Self::Unavailable(format!(
                    "a file that the database URL names, such as sslrootcert or a socket, is missing: {missing}"
                ))
            }
            sqlx::Error::Database(refusal) => {
                let code = refusal.code().unwrap_or_default();
                // PostgreSQL's own statement_timeout.
                if code == "57014" {
                    return Self::Timeout;
                }
                let words = refusal.message();
                if words.starts_with("unsupported startup parameter") {
                    return Self::Refused(format!(
                        "{words}; behind PgBouncer, add {NO_PREPARED_STATEMENTS} to the database URL"
                    ));
                }
                // PostgreSQL: class 42 (undefined table or column, no permission, types that do not fit),
                // 3F (no such schema), 08P01 (wrong number of parameters). SQLite: 1 (undefined table or
                // column), 25 (wrong number of parameters).
                let of_the_schema = code.starts_with("42") || code.starts_with("3F");
                if of_the_schema || ["08P01", "1", "25"].contains(&code.as_ref()) {
                    Self::Refused(words.to_owned())
                } else if code.starts_with("22") {
                    Self::Unusable(words.to_owned())
                } else {
                    Self::Unavailable(words.to_owned())
                }
            }
            sqlx::Error::ColumnDecode { .. } | sqlx::Error::ColumnIndexOutOfBounds { .. } => {
                Self::Refused("the first column that it returns is not text".to_owned())
            }
            sqlx::Error::Encode(_) | sqlx::Error::Protocol(_) => Self::Refused(error.to_string()),
            _ => Self::Unavailable(error.to_string()),
        }
    }
}

/// Where the database's URL is.
pub enum UrlSource {
    /// It was given as it is.
    Given(UrlText),
    /// It is in this file, which may change.
    File(PathBuf),
}

/// A URL as it was given, not yet parsed. Its `Debug` says nothing: it may hold a password.
#[derive(Clone, PartialEq, Eq)]
pub struct UrlText(String);

impl From<&str> for UrlText {
    fn from(url: &str) -> Self {
        Self(url.trim().to_owned())
    }
}

impl fmt::Debug for UrlText {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// Why there is no database URL to use.
#[derive(Debug, Error)]
pub enum SourceError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// What was given is no URL of a database.
    #[error("cannot use the database URL")]
    Url(#[from] UrlError),
}

impl UrlSource {
    fn read(&self) -> Result<UrlText, SourceError> {
        match self {
            Self::Given(text) => Ok(text.clone()),
            Self::File(path) => match std::fs::read_to_string(path) {
                Ok(text) => Ok(text.as_str().into()),
                Err(source) => Err(SourceError::Read {
                    path: path.clone(),
                    source,
                }),
            },
        }
    }

    /// The URL as it is now.
    ///
    /// # Errors
    /// [`SourceError`]
    pub fn url(&self) -> Result<DatabaseUrl, SourceError> {
        Ok(self.read()?.0.parse()?)
    }
}

/// What is counted of the connections.
#[derive(Clone, Debug)]
pub struct ConnectionMetrics {
    /// Connections that turned out to be of no use, and lookups tried again on another.
    pub retries: Counter,
    /// How long lookups waited for a connection, one that had to be made included.
    pub wait: Histogram,
}

impl Default for ConnectionMetrics {
    fn default() -> Self {
        Self {
            retries: Counter::default(),
            // From 0.1 ms to 3.3 s: it is a part of the lookup's time-out.
            wait: Histogram::new(exponential_buckets(0.000_1, 2.0, 16)),
        }
    }
}

/// How many connections there are.
#[derive(Clone, Copy, Debug)]
pub struct Connections {
    /// Those on which a lookup runs, or which are being made.
    pub used: usize,
    /// Those that wait for one.
    pub idle: usize,
}

/// The database that knows the workspaces' modes. No `Debug`: its URL may hold a password.
pub struct Database {
    source: UrlSource,
    current: RwLock<Current>,
    query: String,
    parameters: Vec<Parameter>,
    timeout: Duration,
    crowd: Crowd,
    /// What is counted of the connections.
    pub metrics: ConnectionMetrics,
}

/// How many lookups there are, and whether the last one to end timed out.
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

/// The URL in use, and the connections to it.
#[derive(Clone)]
struct Current {
    url: UrlText,
    pool: AnyPool,
}

impl Current {
    async fn fetch(
        &self,
        query: &str,
        parameters: &[ParameterValue],
        deadline: Instant,
        metrics: &ConnectionMetrics,
    ) -> Result<Stored, sqlx::Error> {
        let one = |begin| One {
            query,
            parameters,
            begin,
        };
        match &self.pool {
            AnyPool::Postgres { pool, begin } => {
                fetch(pool, &one(begin.as_deref()), deadline, metrics).await
            }
            AnyPool::Sqlite(pool) => fetch(pool, &one(None), deadline, metrics).await,
        }
    }
}

#[derive(Clone)]
enum AnyPool {
    Postgres {
        pool: Pool<Postgres>,
        /// Begins a transaction around the lookup, where a session is not the webhook's own.
        begin: Option<String>,
    },
    Sqlite(Pool<Sqlite>),
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
                    (*options, Some(begin))
                };
                // A connection that went stale costs one retry; a ping before each query would cost every
                // lookup a round trip.
                let pool = PgPoolOptions::new()
                    .max_connections(MOST_CONNECTIONS)
                    .test_before_acquire(false)
                    .connect_lazy_with(options);
                Self::Postgres { pool, begin }
            }
            DatabaseUrl::Sqlite(options) => Self::Sqlite(
                SqlitePoolOptions::new()
                    .max_connections(MOST_CONNECTIONS)
                    .connect_lazy_with(options.read_only(true)),
            ),
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
            current: RwLock::new(Current { url, pool }),
            query: lookup.query.clone(),
            parameters: lookup.parameters.clone(),
            timeout: lookup.timeout,
            crowd: Crowd::default(),
            metrics: ConnectionMetrics::default(),
        })
    }

    fn current(&self) -> Current {
        let current = self.current.read();
        current.unwrap_or_else(PoisonError::into_inner).clone()
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
        *current = Current { url, pool };
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
    ) -> Result<Stored, LookupError> {
        let _place = self.crowd.enter().ok_or(LookupError::Crowded)?;
        let time = limit.map_or(self.timeout, |limit| limit.min(self.timeout));
        let result = self.lookup_uncrowded(parameters, time).await;
        let timed_out = matches!(result, Err(LookupError::Timeout));
        self.crowd.in_doubt.store(timed_out, Ordering::Relaxed);
        result
    }

    /// A lookup that takes nobody's place, and says nothing of whether the database hangs.
    async fn lookup_uncrowded(
        &self,
        parameters: &[ParameterValue],
        time: Duration,
    ) -> Result<Stored, LookupError> {
        let deadline = Instant::now() + time;
        let used = self.current();
        let mut result = used
            .fetch(&self.query, parameters, deadline, &self.metrics)
            .await;
        if result.as_ref().is_err_and(is_login_refused) {
            // Whoever reads the file first: what counts is whether there is another URL by now. A file that
            // cannot be used is reported by those who follow it.
            let _ = self.reread();
            let now = self.current();
            if now.url != used.url {
                result = now
                    .fetch(&self.query, parameters, deadline, &self.metrics)
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
    ) -> Result<Vec<Result<Stored, LookupError>>, LookupError> {
        if let AnyPool::Postgres { pool, begin } = self.current().pool
            && let Some(query) = query_of_many(&self.query, &self.parameters)
        {
            let asked = Many {
                query: &query,
                parameters: &self.parameters,
                many,
                begin: begin.as_deref(),
            };
            let deadline = Instant::now() + self.timeout;
            let answered = fetch(&pool, &asked, deadline, &self.metrics).await;
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
            .lookup_uncrowded(parameters, self.timeout)
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
            _ => self.lookup(&parameters, None).await.map(|_| ()),
        }
    }

    /// How many parameters the query takes; `None` if the database cannot say without their types.
    async fn parameters_of_query(&self) -> Option<usize> {
        let query = AssertSqlSafe(self.query.as_str()).into_sql_str();
        let deadline = Instant::now() + self.timeout;
        // Prepared without types, the statement must not stay where lookups would find it.
        let count = async {
            match self.current().pool {
                // What is prepared under a name would stay with the pooler.
                AnyPool::Postgres { begin: Some(_), .. } => Ok(None),
                AnyPool::Postgres { pool, .. } => {
                    let mut connection = pool.acquire().await?.detach();
                    count((&mut connection).prepare(query).await?.parameters())
                }
                AnyPool::Sqlite(pool) => {
                    let mut connection = pool.acquire().await?.detach();
                    count((&mut connection).prepare(query).await?.parameters())
                }
            }
        };
        timeout_at(deadline, count).await.ok()?.ok()?
    }

    /// How many connections there are now.
    #[must_use]
    pub fn connections(&self) -> Connections {
        let (size, idle) = match self.current().pool {
            AnyPool::Postgres { pool, .. } => (pool.size(), pool.num_idle()),
            AnyPool::Sqlite(pool) => (pool.size(), pool.num_idle()),
        };
        let used = usize::try_from(size)
            .unwrap_or(usize::MAX)
            .saturating_sub(idle);
        Connections { used, idle }
    }

    /// Closes all connections.
    pub async fn close(&self) {
        match self.current().pool {
            AnyPool::Postgres { pool, .. } => pool.close().await,
            AnyPool::Sqlite(pool) => pool.close().await,
        }
    }
}

fn count<T>(parameters: Option<Either<&[T], usize>>) -> Result<Option<usize>, sqlx::Error> {
    Ok(parameters.map(|parameters| parameters.either(<[T]>::len, |count| count)))
}

/// Fetches over one of the pool's connections. One that is of no use to the next lookup is closed: its query
/// has not ended, or it is stale. A server that restarted leaves stale connections, at most as many as
/// there are, and each shows itself only when it is used; then the next one is tried. While it restarts, it
/// refuses new connections, for which sqlx tries again, or cuts them off.
async fn fetch<DB, A>(
    pool: &Pool<DB>,
    asked: &A,
    deadline: Instant,
    metrics: &ConnectionMetrics,
) -> Result<A::Answer, sqlx::Error>
where
    DB: sqlx::Database,
    A: Ask<DB::Connection>,
{
    let mut tries_left = MOST_CONNECTIONS;
    loop {
        let waits_since = Instant::now();
        let acquired = timeout_at(deadline, pool.acquire()).await;
        metrics.wait.observe(waits_since.elapsed().as_secs_f64());
        let mut connection = match acquired.unwrap_or(Err(sqlx::Error::PoolTimedOut)) {
            Err(error) if is_cut_off(&error) => {
                sleep(RETRY_PAUSE).await;
                continue;
            }
            acquired => acquired?,
        };
        let fetched = timeout_at(deadline, asked.ask(&mut connection)).await;
        match fetched.unwrap_or(Err(sqlx::Error::PoolTimedOut)) {
            Err(error) if is_stale(&error) && tries_left > 0 => {
                drop(connection.detach());
                tries_left -= 1;
                metrics.retries.inc();
            }
            Err(error @ sqlx::Error::PoolTimedOut) => {
                drop(connection.detach());
                return Err(error);
            }
            fetched => return fetched,
        }
    }
}

/// Whether the database refuses user or password (class 28).
fn is_login_refused(error: &sqlx::Error) -> bool {
    error
        .as_database_error()
        .and_then(|refusal| refusal.code())
        .is_some_and(|code| code.starts_with("28"))
}

/// Whether the connection, and not the query, is what failed: it broke, or the server ends it.
fn is_stale(error: &sqlx::Error) -> bool {
    matches!(error, sqlx::Error::Io(_)) || is_ended_by_server(error)
}

/// Whether a new connection was ended by the other side before it could be used.
fn is_cut_off(error: &sqlx::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    match error {
        sqlx::Error::Io(error) => matches!(
            error.kind(),
            BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof
        ),
        error => is_ended_by_server(error),
    }
}

/// Whether the server says that it ends the connection (class 08, and 57P01 to 57P02 for a shutdown).
fn is_ended_by_server(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|refusal| refusal.code());
    code.is_some_and(|code| ["57P01", "57P02", "08000", "08003", "08006"].contains(&code.as_ref()))
}

/// Whether a prepared statement is not there any more (26000).
fn is_statement_gone(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|refusal| refusal.code());
    code.is_some_and(|code| code == "26000")
}

/// What is asked over one connection of a kind.
trait Ask<Connection> {
    /// What it answers.
    type Answer;

    fn ask(
        &self,
        connection: &mut Connection,
    ) -> impl Future<Output = Result<Self::Answer, sqlx::Error>> + Send;
}

/// One workspace's mode, by the policy's query, in a transaction if `begin` is there to begin one.
struct One<'a> {
    query: &'a str,
    parameters: &'a [ParameterValue],
    begin: Option<&'a str>,
}

impl Ask<PgConnection> for One<'_> {
    type Answer = Stored;

    async fn ask(&self, connection: &mut PgConnection) -> Result<Stored, sqlx::Error> {
        let Self {
            query, parameters, ..
        } = self;
        let Some(begin) = self.begin else {
            return select(connection, query, parameters, true).await;
        };
        let mut types_are_known = false;
        loop {
            let mut transaction = connection.begin_with(AssertSqlSafe(begin)).await?;
            let selected = select(&mut transaction, query, parameters, false).await;
            transaction.rollback().await?;
            match selected {
                // A column of a type that is new to it, such as an enum, makes sqlx ask what it is, and that
                // takes the unnamed statement's place.
                Err(error) if !types_are_known && is_statement_gone(&error) => {
                    types_are_known = true;
                }
                selected => return selected,
            }
        }
    }
}

/// Many workspaces' modes, by one query.
struct Many<'a> {
    query: &'a str,
    parameters: &'a [Parameter],
    many: &'a [Vec<ParameterValue>],
    begin: Option<&'a str>,
}

impl Ask<PgConnection> for Many<'_> {
    type Answer = Vec<Stored>;

    async fn ask(&self, connection: &mut PgConnection) -> Result<Vec<Stored>, sqlx::Error> {
        let mut statement = sqlx::query(AssertSqlSafe(self.query)).persistent(self.begin.is_none());
        for (place, parameter) in self.parameters.iter().enumerate() {
            let values = self.many.iter().map(|one| one.get(place));
            statement = if is_uuid(parameter) {
                let uuid = |value| match value {
                    Some(&ParameterValue::Uuid(uuid)) => Some(uuid),
                    _ => None,
                };
                statement.bind(values.map(uuid).collect::<Vec<_>>())
            } else {
                let text = |value: Option<&ParameterValue>| match value {
                    Some(ParameterValue::Text(text)) => Some(text.clone()),
                    _ => None,
                };
                statement.bind(values.map(text).collect::<Vec<_>>())
            };
        }
        let rows = match self.begin {
            None => statement.fetch_all(connection).await?,
            Some(begin) => {
                let mut transaction = connection.begin_with(AssertSqlSafe(begin)).await?;
                let rows = statement.fetch_all(&mut *transaction).await?;
                transaction.rollback().await?;
                rows
            }
        };
        let stored = |row: &PgRow| match row.try_get(1)? {
            Some(true) => Ok(Stored::Row(mode(row)?)),
            _ => Ok(Stored::NoRow),
        };
        rows.iter().map(stored).collect()
    }
}

const fn is_uuid(parameter: &Parameter) -> bool {
    matches!(
        parameter,
        Parameter::Label {
            kind: ParameterType::Uuid,
            ..
        }
    )
}

/// The policy's query, made to answer for many workspaces at once: its parameters become columns of what is
/// asked. `None` if it has anything in which a `$1` could be something else than a parameter.
fn query_of_many(query: &str, parameters: &[Parameter]) -> Option<String> {
    if ["'", "\"", ";", "--", "/*", "$$"]
        .iter()
        .any(|quote| query.contains(quote))
    {
        return None;
    }
    let mut pieces = query.split('$');
    let mut one = pieces.next()?.to_owned();
    for piece in pieces {
        let digits = piece.len() - piece.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, rest) = piece.split_at(digits);
        let is_parameter = number
            .parse()
            .is_ok_and(|number| (1..=parameters.len()).contains(&number));
        if !is_parameter {
            return None;
        }
        one += &format!("llm_billing_asked.llm_billing_p{number}{rest}");
    }
    let list = |each: &dyn Fn((usize, &Parameter)) -> String| -> String {
        let all: Vec<String> = parameters.iter().enumerate().map(each).collect();
        all.join(", ")
    };
    let arrays = list(&|(place, parameter)| {
        let kind = if is_uuid(parameter) { "uuid" } else { "text" };
        format!("${}::{kind}[]", place + 1)
    });
    let columns = list(&|(place, _)| format!("llm_billing_p{}", place + 1));
    Some(format!(
        "SELECT llm_billing_found.mode, llm_billing_found.is_there
         FROM unnest({arrays}) WITH ORDINALITY AS llm_billing_asked({columns}, llm_billing_place)
         LEFT JOIN LATERAL (
             SELECT llm_billing_one.mode, true FROM ({one}) AS llm_billing_one(mode) LIMIT 1
         ) AS llm_billing_found(mode, is_there) ON true
         ORDER BY llm_billing_asked.llm_billing_place"
    ))
}

async fn select(
    connection: &mut PgConnection,
    query: &str,
    parameters: &[ParameterValue],
    prepared: bool,
) -> Result<Stored, sqlx::Error> {
    // The operator's query from the policy file; what pods bring is bound, never spliced.
    let mut statement = sqlx::query(AssertSqlSafe(query)).persistent(prepared);
    for parameter in parameters {
        statement = match parameter {
            ParameterValue::Uuid(uuid) => statement.bind(uuid),
            ParameterValue::Text(text) => statement.bind(text),
        };
    }
    let Some(row) = statement.fetch_optional(connection).await? else {
        return Ok(Stored::NoRow);
    };
    Ok(Stored::Row(mode(&row)?))
}

/// The first column of a row.
fn mode(row: &PgRow) -> Result<Option<String>, sqlx::Error> {
    let is_enum = matches!(row.try_get_raw(0)?.type_info().kind(), PgTypeKind::Enum(_));
    // An enum is sent as its label, which sqlx decodes as text only when it is told not to look at the type.
    if is_enum {
        row.try_get_unchecked(0)
    } else {
        row.try_get(0)
    }
}

impl Ask<SqliteConnection> for One<'_> {
    type Answer = Stored;

    async fn ask(&self, connection: &mut SqliteConnection) -> Result<Stored, sqlx::Error> {
        let mut statement = sqlx::query(AssertSqlSafe(self.query));
        for parameter in self.parameters {
            statement = match parameter {
                // SQLite has no type for UUIDs; they are stored as their usual text.
                ParameterValue::Uuid(uuid) => statement.bind(uuid.to_string()),
                ParameterValue::Text(text) => statement.bind(text),
            };
        }
        let Some(row) = statement.fetch_optional(connection).await? else {
            return Ok(Stored::NoRow);
        };
        let value = row.try_get_raw(0)?;
        if !value.is_null() && value.type_info().name() != "TEXT" {
            return Err(sqlx::Error::ColumnDecode {
                index: "0".to_owned(),
                source: "not text".into(),
            });
        }
        Ok(Stored::Row(row.try_get(0)?))
    }
}

/// The embedded SQLite database: the standard schema, made if absent.
#[derive(Debug)]
pub struct Embedded {
    pool: Pool<Sqlite>,
}

/// Why the embedded database cannot be used.
#[derive(Debug, Error)]
pub enum EmbeddedError {
    /// Only the embedded database is ever written.
    #[error(
        "the database is not SQLite; the platform's own database is never written, change modes there by its own means"
    )]
    NotEmbedded,
    /// SQLite's own words.
    #[error("cannot use the SQLite database {path}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// What SQLite says.
        source: sqlx::Error,
    },
}

impl Embedded {
    /// Opens the file, and makes it and its table if they are not there.
    ///
    /// # Errors
    /// [`EmbeddedError`]
    pub async fn open(url: &DatabaseUrl) -> Result<Self, EmbeddedError> {
        let DatabaseUrl::Sqlite(options) = url else {
            return Err(EmbeddedError::NotEmbedded);
        };
        let path = options.get_filename().to_path_buf();
        let open = async {
            let options = options.as_ref().clone().create_if_missing(true);
            let pool = SqlitePoolOptions::new()
                .max_connections(1)
                .connect_with(options)
                .await?;
            sqlx::query(
                "CREATE TABLE IF NOT EXISTS workspaces (
                    id TEXT PRIMARY KEY,
                    llm_billing_mode TEXT CHECK (llm_billing_mode IN ('platform_managed', 'byok', 'disabled'))
                )",
            )
            .execute(&pool)
            .await?;
            Ok(Self { pool })
        };
        open.await
            .map_err(|source| EmbeddedError::Sqlite { path, source })
    }

    /// All workspaces by id, with their modes; `None` where nobody chose.
    ///
    /// # Errors
    /// SQLite's.
    pub async fn list(&self) -> Result<Vec<(String, Option<String>)>, sqlx::Error> {
        sqlx::query_as("SELECT id, llm_billing_mode FROM workspaces ORDER BY id")
            .fetch_all(&self.pool)
            .await
    }

    /// Sets a workspace's mode, or leaves it to the platform's default; adds the workspace if it is new.
    ///
    /// # Errors
    /// SQLite's.
    pub async fn set(&self, id: Uuid, mode: Option<BillingMode>) -> Result<(), sqlx::Error> {
        sqlx::query(
            "INSERT INTO workspaces (id, llm_billing_mode) VALUES ($1, $2)
             ON CONFLICT (id) DO UPDATE SET llm_billing_mode = excluded.llm_billing_mode",
        )
        .bind(id.to_string())
        .bind(mode.map(BillingMode::as_str))
        .execute(&self.pool)
        .await?;
        Ok(())
    }

    /// Closes the file.
    pub async fn close(self) {
        self.pool.close().await;
    }
}
