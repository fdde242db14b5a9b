//! The errors of a lookup, and their classification for retries.

use std::borrow::Cow;
use std::io;

use sqlx::error::DatabaseError;
use sqlx::postgres::{PgDatabaseError, PgSeverity};
use thiserror::Error;

use super::url::NO_PREPARED_STATEMENTS;

/// The start of PgBouncer's error for a startup parameter that it does not support.
const UNSUPPORTED_PARAMETER: &str = "unsupported startup parameter";

/// Why a lookup failed.
#[derive(Debug, Error)]
pub enum LookupError {
    /// The deadline passed. Names the database's host and port.
    #[error("the database at {0} did not answer in time")]
    Timeout(String),
    /// Too many lookups are waiting for the database.
    #[error("too many lookups wait for the database")]
    Overloaded,
    /// The connection failed or was lost, or the database failed temporarily.
    #[error("cannot query the database at {place}: {cause}")]
    Unavailable {
        /// The database's host and port, or its file.
        place: String,
        /// The cause, as the system or the database reports it.
        cause: String,
    },
    /// The task that executed the lookup panicked. The panic message is on stderr.
    #[error("the lookup's task panicked")]
    Panicked,
    /// The database cannot use this pod's parameters, for example text that the query casts to a UUID.
    #[error("the database cannot use the pod's parameters: {0}")]
    Unusable(String),
    /// The database rejects the query itself, which a retry cannot fix. Quotes the database's message.
    #[error("the database refuses the policy's query: {0}")]
    Refused(String),
    /// The database executes the query, and its answer is not one row of text as the policy needs it.
    #[error("the policy's query {0}")]
    Answer(AnswerError),
}

/// What is wrong with the answer to the policy's query. Quotes no value.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
pub enum AnswerError {
    /// Which row comes first depends on the database's plan.
    #[error(
        "returns more than one row for one workspace; it must return one row, whose first column is the mode"
    )]
    SeveralRows,
    /// The first column is not text.
    #[error("returns a first column that is not text; cast it to text")]
    ModeNotText,
    /// The first column is `char(n)`.
    #[error(
        "returns a first column of type char(n), which pads modes with blanks; cast it to text"
    )]
    ModeIsPadded,
    /// A template refers to a column that is not there.
    #[error("returns no column {0:?}, which the policy's variables or proxy name")]
    MissingColumn(String),
    /// A template refers to a column that is not text.
    #[error("returns a column {0:?} that is not text; cast it to text")]
    NotText(String),
    /// A workspace's value cannot be a variable's.
    #[error(
        "returns a value of more than 4096 bytes, or one with a NUL character, in column {0:?}"
    )]
    UnusableValue(String),
}

impl AnswerError {
    /// Reports whether the answer about another workspace may be correct.
    pub(super) const fn is_of_one_workspace(&self) -> bool {
        matches!(self, Self::SeveralRows | Self::UnusableValue(_))
    }
}

impl From<AnswerError> for sqlx::Error {
    fn from(error: AnswerError) -> Self {
        Self::Decode(Box::new(error))
    }
}

impl LookupError {
    /// Returns the error's kind, as in the metrics' `result` label.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self {
            Self::Timeout(_) => "timeout",
            Self::Overloaded => "crowded",
            Self::Unavailable { .. } | Self::Panicked => "unavailable",
            Self::Unusable(_) => "unusable",
            Self::Refused(_) | Self::Answer(_) => "refused",
        }
    }

    /// Reports whether the lookup of another workspace may succeed.
    pub(super) const fn is_of_one_workspace(&self) -> bool {
        match self {
            Self::Unusable(_) => true,
            Self::Answer(error) => error.is_of_one_workspace(),
            _ => false,
        }
    }

    /// Reports whether only a correction of the query, the schema or the role's permissions helps.
    #[must_use]
    pub const fn is_refused(&self) -> bool {
        matches!(self, Self::Refused(_) | Self::Answer(_))
    }
}

impl LookupError {
    /// Converts an error of the database at this place.
    pub(super) fn new(error: &sqlx::Error, place: &str) -> Self {
        let timeout = || Self::Timeout(place.to_owned());
        let unavailable = |cause| Self::Unavailable {
            place: place.to_owned(),
            cause,
        };
        match error {
            sqlx::Error::PoolTimedOut => timeout(),
            sqlx::Error::Io(error) if error.kind() == io::ErrorKind::NotFound => {
                unavailable(format!(
                    "a file that the database URL names, such as sslrootcert or a socket, is missing: {error}"
                ))
            }
            sqlx::Error::Io(error) => unavailable(error.to_string()),
            sqlx::Error::Database(error) => {
                let code = error.code().unwrap_or_default();
                // PostgreSQL's statement_timeout.
                if code == "57014" {
                    return timeout();
                }
                let message = error.message();
                if message.starts_with(UNSUPPORTED_PARAMETER) {
                    return Self::Refused(format!(
                        "{message}; behind PgBouncer, add {NO_PREPARED_STATEMENTS} to the database URL"
                    ));
                }
                if is_query_refused(error.as_ref()) {
                    Self::Refused(message.to_owned())
                } else if is_parameter_unusable(&code) {
                    Self::Unusable(message.to_owned())
                } else {
                    unavailable(message.to_owned())
                }
            }
            sqlx::Error::Decode(source) if let Some(error) = source.downcast_ref() => {
                Self::Answer(AnswerError::clone(error))
            }
            sqlx::Error::Encode(_) | sqlx::Error::Protocol(_) => Self::Refused(error.to_string()),
            _ => unavailable(error.to_string()),
        }
    }
}

/// Reports whether the database rejects the user or password (class 28).
pub(super) fn is_login_refused(error: &sqlx::Error) -> bool {
    code(error).is_some_and(|code| code.starts_with("28"))
}

fn code(error: &sqlx::Error) -> Option<Cow<'_, str>> {
    error.as_database_error()?.code()
}

/// Reports whether the server ends the session with this error, for example because it shuts down.
fn ends_session(error: &dyn DatabaseError) -> bool {
    let error = error.try_downcast_ref::<PgDatabaseError>();
    error.is_some_and(|error| matches!(error.severity(), PgSeverity::Fatal | PgSeverity::Panic))
}

/// Reports whether an error's code means that the query is invalid.
///
/// PostgreSQL: class 42 (undefined table or column, no permission, type mismatch), 3F (undefined schema) and 08P01
/// (wrong number of parameters). PgBouncer also uses 08P01 for its own errors, but those end the session.
/// SQLite: 1 (undefined table or column) and 25 (wrong number of parameters).
fn is_query_refused(error: &dyn DatabaseError) -> bool {
    let code = error.code().unwrap_or_default();
    match code.as_ref() {
        "08P01" => !ends_session(error),
        "1" | "25" => true,
        code => code.starts_with("42") || code.starts_with("3F"),
    }
}

/// Reports whether an error's code means that the parameters cannot be used (class 22).
fn is_parameter_unusable(code: &str) -> bool {
    code.starts_with("22")
}

/// Reports whether the connection failed, not the query: it broke, the server ended it, or its prepared statements are
/// outdated, for example because a column's type has changed.
pub(super) fn is_connection_lost(error: &sqlx::Error) -> bool {
    let is_outdated = |error: &PgDatabaseError| error.routine() == Some("RevalidateCachedQuery");
    match error {
        sqlx::Error::Io(_) => true,
        sqlx::Error::Database(error) => {
            ends_session(error.as_ref()) || error.try_downcast_ref().is_some_and(is_outdated)
        }
        _ => false,
    }
}

/// Reports whether the database processed the query despite the error, so that the connection can be reused.
pub(super) fn leaves_connection_usable(error: &sqlx::Error) -> bool {
    match error {
        sqlx::Error::Decode(source) => source.is::<AnswerError>(),
        sqlx::Error::Database(error) => {
            is_query_refused(error.as_ref())
                || is_parameter_unusable(&error.code().unwrap_or_default())
        }
        _ => false,
    }
}

/// Reports whether connecting may soon succeed: the port is closed, or the server or PgBouncer starts up, shuts down or
/// is full. Unknown users and databases count too: PgBouncer uses the same code for them.
pub(super) fn is_transient(error: &sqlx::Error) -> bool {
    use io::ErrorKind::{
        BrokenPipe, ConnectionAborted, ConnectionRefused, ConnectionReset, UnexpectedEof,
    };
    match error {
        sqlx::Error::Io(error) => matches!(
            error.kind(),
            BrokenPipe | ConnectionAborted | ConnectionRefused | ConnectionReset | UnexpectedEof
        ),
        sqlx::Error::Database(error) => {
            let code = error.code().unwrap_or_default();
            let transient = ["57P01", "57P02", "08000", "08003", "08006", "08P01"];
            error.is_transient_in_connect_phase()
                || transient.contains(&code.as_ref())
                    && !error.message().starts_with(UNSUPPORTED_PARAMETER)
        }
        _ => false,
    }
}

/// Reports whether a prepared statement no longer exists (26000).
pub(super) fn is_statement_missing(error: &sqlx::Error) -> bool {
    code(error).is_some_and(|code| code == "26000")
}
