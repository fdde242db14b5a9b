//! The database URL and its source. No output shows its password.

use std::path::PathBuf;
use std::str::FromStr;
use std::{fmt, io};

use sqlx::ConnectOptions;
use sqlx::postgres::PgConnectOptions;
use sqlx::sqlite::SqliteConnectOptions;
use thiserror::Error;

/// The setting in a PostgreSQL URL for a pooler in transaction mode.
pub(super) const NO_PREPARED_STATEMENTS: &str = "statement-cache-capacity=0";
/// The TLS settings that sqlx supports in a PostgreSQL URL. It ignores all others.
const TLS_SETTINGS: [&str; 9] = [
    "sslmode",
    "ssl-mode",
    "sslrootcert",
    "ssl-root-cert",
    "ssl-ca",
    "sslcert",
    "ssl-cert",
    "sslkey",
    "ssl-key",
];

/// A parsed database URL. Neither `Debug` nor `Display` shows user, password or options.
#[derive(Clone)]
pub enum DatabaseUrl {
    /// `postgres://…`
    Postgres {
        /// The connection options.
        options: Box<PgConnectOptions>,
        /// Whether a session keeps its settings and prepared statements. It does not behind a pooler in transaction
        /// mode, for which the URL has `statement-cache-capacity=0`.
        session: bool,
    },
    /// `sqlite://…`
    Sqlite(Box<SqliteConnectOptions>),
}

/// Why a database URL is invalid. Does not quote the URL: it may hold a password.
#[derive(Debug, PartialEq, Eq, Error)]
pub enum UrlError {
    /// The scheme is not supported.
    #[error("it must start with postgres:// or sqlite://")]
    Scheme,
    /// The URL cannot be parsed.
    #[error(
        "it is malformed; expected postgres://USER:PASSWORD@HOST:PORT/DATABASE?sslmode=… or sqlite://FILE"
    )]
    Shape,
    /// A TLS setting is not supported and would be ignored.
    #[error("it has an unsupported TLS setting; use only sslmode, sslrootcert, sslcert and sslkey")]
    Tls,
}

impl FromStr for DatabaseUrl {
    type Err = UrlError;

    fn from_str(url: &str) -> Result<Self, UrlError> {
        match url.split_once("://").map(|(scheme, _)| scheme) {
            Some("postgres" | "postgresql") => {
                let settings = url.split_once('?').map_or("", |(_, settings)| settings);
                let mut settings = settings.split('&');
                let is_ignored = |setting: &str| {
                    let key = setting.split('=').next().unwrap_or_default();
                    key.to_ascii_lowercase().contains("ssl") && !TLS_SETTINGS.contains(&key)
                };
                if settings.clone().any(is_ignored) {
                    return Err(UrlError::Tls);
                }
                let options = PgConnectOptions::from_str(url).map_err(|_| UrlError::Shape)?;
                let options = options
                    .application_name(env!("CARGO_PKG_NAME"))
                    // Lookups read no floats, and PgBouncer rejects startup parameters that it does not know.
                    .extra_float_digits(None)
                    .disable_statement_logging();
                Ok(Self::Postgres {
                    options: Box::new(options),
                    session: settings.all(|setting| setting != NO_PREPARED_STATEMENTS),
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

impl DatabaseUrl {
    /// Returns the database's host and port, its socket, or its file.
    pub(super) fn place(&self) -> String {
        match self {
            Self::Postgres { options, .. } => match options.get_socket() {
                Some(socket) => socket.display().to_string(),
                None => format!("{}:{}", options.get_host(), options.get_port()),
            },
            Self::Sqlite(options) => options.get_filename().display().to_string(),
        }
    }
}

impl fmt::Display for DatabaseUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Postgres { options, .. } => {
                let database = options.get_database().unwrap_or_default();
                write!(f, "postgres://{}:{}/{database}", options.get_host(), options.get_port())
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

/// The source of the database URL.
pub enum UrlSource {
    /// The URL itself.
    Given(UrlText),
    /// A file with the URL, which may change.
    File(PathBuf),
}

/// An unparsed URL. Its `Debug` hides the text, which may hold a password.
#[derive(Clone, PartialEq, Eq)]
pub struct UrlText(pub(super) String);

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

/// Why the source has no usable database URL.
#[derive(Debug, Error)]
pub enum SourceError {
    /// The file cannot be read.
    #[error("cannot read {}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The text is not a valid database URL.
    #[error("cannot use the database URL")]
    Url(#[from] UrlError),
}

impl UrlSource {
    pub(super) fn read(&self) -> Result<UrlText, SourceError> {
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

    /// Reads and parses the current URL.
    ///
    /// # Errors
    /// [`SourceError`]
    pub fn url(&self) -> Result<DatabaseUrl, SourceError> {
        Ok(self.read()?.0.parse()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn url_with_unsupported_tls_settings_is_rejected() {
        for (url, error) in [
            ("postgres://h/d", None),
            (
                "postgresql://u:p@h:1/d?sslmode=verify-full&sslrootcert=/a&sslcert=/c&sslkey=/k",
                None,
            ),
            ("postgres://h/d?connect_timeout=10", None),
            ("postgres://h/d?sslmod=verify-full", Some(UrlError::Tls)),
            ("postgres://h/d?a=b&ssl-mode=require&ssl-ca=/a", None),
            ("postgres://h/d?a=b&SSLMODE=require", Some(UrlError::Tls)),
            ("postgres://h/d?requiressl=1", Some(UrlError::Tls)),
            ("postgres://h/d?sslmode=always", Some(UrlError::Shape)),
            ("postgres://h:port/d", Some(UrlError::Shape)),
            ("sqlite://f", None),
            ("sqlite://f?mode=none", Some(UrlError::Shape)),
            ("mysql://h/d", Some(UrlError::Scheme)),
            ("h/d", Some(UrlError::Scheme)),
        ] {
            assert_eq!(url.parse::<DatabaseUrl>().err(), error, "{url}");
        }
        let url = "postgres://u:p@h:1/d?options=x".parse::<DatabaseUrl>();
        assert_eq!(format!("{:?}", url.unwrap()), "postgres://h:1/d");
    }
}
