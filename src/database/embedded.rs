//! The embedded SQLite database of `serve --dev` and `workspace`, the only database that is written.

use std::path::PathBuf;

use sqlx::sqlite::SqliteConnection;
use sqlx::{ConnectOptions, Connection};
use thiserror::Error;
use uuid::Uuid;

use super::url::DatabaseUrl;
use crate::core::resolution::BillingMode;

/// The embedded SQLite database with the standard schema.
#[derive(Debug)]
pub struct Embedded {
    connection: SqliteConnection,
}

/// Why the embedded database cannot be used.
#[derive(Debug, Error)]
pub enum EmbeddedError {
    /// The URL is not that of a SQLite database.
    #[error(
        "the database is not SQLite; the platform's own database is never written, so change modes through the platform"
    )]
    NotEmbedded,
    /// SQLite returned an error.
    #[error("cannot use the SQLite database {path}")]
    Sqlite {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: sqlx::Error,
    },
}

impl Embedded {
    /// Opens the file. Creates it and its table if missing.
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
            let mut connection = options.connect().await?;
            sqlx::query(
                "CREATE TABLE IF NOT EXISTS workspaces (
                    id TEXT PRIMARY KEY,
                    llm_billing_mode TEXT CHECK (llm_billing_mode IN ('platform_managed', 'byok', 'disabled'))
                )",
            )
            .execute(&mut connection)
            .await?;
            Ok(Self { connection })
        };
        open.await
            .map_err(|source| EmbeddedError::Sqlite { path, source })
    }

    /// Returns all workspaces' ids and modes, ordered by id. A mode is `None` if unset.
    ///
    /// # Errors
    /// An error of SQLite.
    pub async fn list(&mut self) -> Result<Vec<(String, Option<String>)>, sqlx::Error> {
        sqlx::query_as("SELECT id, llm_billing_mode FROM workspaces ORDER BY id")
            .fetch_all(&mut self.connection)
            .await
    }

    /// Sets a workspace's mode, or unsets it with `None`. Adds the workspace if it is new.
    ///
    /// # Errors
    /// An error of SQLite.
    pub async fn set(&mut self, id: Uuid, mode: Option<BillingMode>) -> Result<(), sqlx::Error> {
        sqlx::query(
            "INSERT INTO workspaces (id, llm_billing_mode) VALUES ($1, $2)
             ON CONFLICT (id) DO UPDATE SET llm_billing_mode = excluded.llm_billing_mode",
        )
        .bind(id.to_string())
        .bind(mode.map(BillingMode::as_str))
        .execute(&mut self.connection)
        .await?;
        Ok(())
    }

    /// Closes the file.
    ///
    /// # Errors
    /// An error of SQLite.
    pub async fn close(self) -> Result<(), sqlx::Error> {
        self.connection.close().await
    }
}
