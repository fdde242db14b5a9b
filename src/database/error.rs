//! Why a lookup gave no answer, and what an error of the database means for the next try.

use std::borrow::Cow;
use std::io;

use sqlx::error::DatabaseError;
use sqlx::postgres::{PgDatabaseError, PgSeverity};
use thiserror::Error;

use super::url::NO_PREPARED_STATEMENTS;

/// With these words PgBouncer refuses a setting that prepared statements need.
const UNSUPPORTED: &str = "unsupported startup parameter";

/// Why a lookup gave no answer.
#[derive(Debug, Error)]
pub enum LookupError {
    /// The deadline passed.
    #[error("the database did not answer in time")]
    Timeout,
    /// Too many lookups wait for the database already.
    #[error("too many lookups wait for the database")]
    Overloaded,
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
            Self::Overloaded => "crowded",
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
                if words.starts_with(UNSUPPORTED) {
                    return Self::Refused(format!(
                        "{words}; behind PgBouncer, add {NO_PREPARED_STATEMENTS} to the database URL"
                    ));
                }
                if refuses_query(refusal.as_ref()) {
                    Self::Refused(words.to_owned())
                } else if refuses_parameters(&code) {
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

/// Whether the database refuses user or password (class 28).
pub(super) fn is_login_refused(error: &sqlx::Error) -> bool {
    code(error).is_some_and(|code| code.starts_with("28"))
}

fn code(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error()?.code()
}

/// Whether the server ends the session with these words, for whatever reason: it shuts down, it has waited too long, it
/// is full.
fn ends_session(refusal: &dyn DatabaseError) -> bool {
    let refusal = refusal.try_downcast_ref::<PgDatabaseError>();
    refusal
        .is_some_and(|refusal| matches!(refusal.severity(), PgSeverity::Fatal | PgSeverity::Panic))
}

/// Whether an error's code says that the query cannot be used. `PostgreSQL`: class 42 (undefined table or column, no
/// permission, types that do not fit), 3F (no such schema), 08P01 (wrong number of parameters; where it ends the session,
/// it is PgBouncer's code for all that is its own). `SQLite`: 1 (undefined table or column), 25 (wrong number of
/// parameters).
fn refuses_query(refusal: &dyn DatabaseError) -> bool {
    let code = refusal.code().unwrap_or_default();
    match code.as_ref() {
        "08P01" => !ends_session(refusal),
        "1" | "25" => true,
        code => code.starts_with("42") || code.starts_with("3F"),
    }
}

/// Whether an error's code says that the parameters cannot be used (class 22).
fn refuses_parameters(code: &str) -> bool {
    code.starts_with("22")
}

/// Whether the connection, and not the query, is what failed: it broke, the server ends it, or what was prepared on it is
/// out of date, as after a column's type was changed.
pub(super) fn is_connection_lost(error: &sqlx::Error) -> bool {
    let is_out_of_date =
        |refusal: &PgDatabaseError| refusal.routine() == Some("RevalidateCachedQuery");
    match error {
        sqlx::Error::Io(_) => true,
        sqlx::Error::Database(refusal) => {
            ends_session(refusal.as_ref()) || refusal.try_downcast_ref().is_some_and(is_out_of_date)
        }
        _ => false,
    }
}

/// Whether the question was answered, if not as hoped, so that the connection is fit for the next one.
pub(super) fn leaves_connection_usable(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::ColumnIndexOutOfBounds { .. } => true,
        sqlx::Error::Database(refusal) => {
            refuses_query(refusal.as_ref())
                || refuses_parameters(&refusal.code().unwrap_or_default())
        }
        _ => false,
    }
}

/// Whether there may be a connection a little later: nobody listens yet, the server or PgBouncer starts up, shuts down or
/// is full. (PgBouncer's code is the same for a login or a database that it does not know.)
pub(super) fn is_transient(error: &sqlx::Error) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, UnexpectedEof,
    };
    match error {
        sqlx::Error::Io(error) => matches!(
            error.kind(),
            BrokenPipe | ConnectionAborted | ConnectionRefused | ConnectionReset | UnexpectedEof
        ),
        sqlx::Error::Database(refusal) => {
            let code = refusal.code().unwrap_or_default();
            let transient = ["57P01", "57P02", "08000", "08003", "08006", "08P01"];
            refusal.is_transient_in_connect_phase()
                || transient.contains(&code.as_ref()) && !refusal.message().starts_with(UNSUPPORTED)
        }
        _ => false,
    }
}

/// Whether a prepared statement is not there any more (26000).
pub(super) fn is_statement_gone(error: &sqlx::Error) -> bool {
    code(error).is_some_and(|code| code == "26000")
}
