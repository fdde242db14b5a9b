//! Why a lookup gave no answer, and what an error of the database means for the next try.

use std::io;

use sqlx::postgres::PgDatabaseError;
use thiserror::Error;

use super::url::NO_PREPARED_STATEMENTS;

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
                if refuses_query(&code) {
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
    error
        .as_database_error()
        .and_then(|refusal| refusal.code())
        .is_some_and(|code| code.starts_with("28"))
}

/// Whether an error's code says that the query cannot be used. `PostgreSQL`: class 42 (undefined table or column, no
/// permission, types that do not fit), 3F (no such schema), 08P01 (wrong number of parameters). `SQLite`: 1 (undefined
/// table or column), 25 (wrong number of parameters).
fn refuses_query(code: &str) -> bool {
    let of_the_schema = code.starts_with("42") || code.starts_with("3F");
    of_the_schema || ["08P01", "1", "25"].contains(&code)
}

/// Whether an error's code says that the parameters cannot be used (class 22).
fn refuses_parameters(code: &str) -> bool {
    code.starts_with("22")
}

/// Whether the connection, and not the query, is what failed: it broke, the server ends it, or what was prepared on it is
/// out of date, as after a column's type was changed.
pub(super) fn is_stale(error: &sqlx::Error) -> bool {
    let is_out_of_date =
        |refusal: &PgDatabaseError| refusal.routine() == Some("RevalidateCachedQuery");
    let refusal = error.as_database_error();
    matches!(error, sqlx::Error::Io(_))
        || is_ended_by_server(error)
        || refusal.is_some_and(|refusal| refusal.try_downcast_ref().is_some_and(is_out_of_date))
}

/// Whether the question was answered, if not as hoped, so that the connection is fit for the next one.
pub(super) fn is_answer(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::ColumnDecode { .. } | sqlx::Error::ColumnIndexOutOfBounds { .. } => true,
        sqlx::Error::Database(refusal) => {
            let code = refusal.code().unwrap_or_default();
            refuses_query(&code) || refuses_parameters(&code)
        }
        _ => false,
    }
}

/// Whether there may be a connection a little later: nobody listens yet, the server starts up or is full, or it ended
/// the new connection before it could be used.
pub(super) fn is_passing(error: &sqlx::Error) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, UnexpectedEof,
    };
    match error {
        sqlx::Error::Io(error) => matches!(
            error.kind(),
            BrokenPipe | ConnectionAborted | ConnectionRefused | ConnectionReset | UnexpectedEof
        ),
        sqlx::Error::Database(refusal) => {
            refusal.is_transient_in_connect_phase() || is_ended_by_server(error)
        }
        _ => false,
    }
}

/// Whether the server says that it ends the connection (of class 08, and 57P01 to 57P02 for a shutdown).
fn is_ended_by_server(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|refusal| refusal.code());
    code.is_some_and(|code| ["57P01", "57P02", "08000", "08003", "08006"].contains(&code.as_ref()))
}

/// Whether a prepared statement is not there any more (26000).
pub(super) fn is_statement_gone(error: &sqlx::Error) -> bool {
    let code = error.as_database_error().and_then(|refusal| refusal.code());
    code.is_some_and(|code| code == "26000")
}
