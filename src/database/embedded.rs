//! The embedded SQLite database that `serve --dev` and `workspace` use: the only one that is ever written.

use std::path::PathBuf;

use sqlx::sqlite::SqliteConnection;
use sqlx::{ConnectOptions, Connection};
use thiserror::Error;
use uuid::Uuid;

use super::url::DatabaseUrl;
use crate::core::resolution::BillingMode;

/// The embedded SQLite database: the standard schema, made if absent.
#[derive(Debug)]
pub struct Embedded {
    connection: SqliteConnection,
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

    /// All workspaces by id, with their modes; `None` where nobody chose.
    ///
    /// # Errors
    /// SQLite's.
    pub async fn list(&mut self) -> Result<Vec<(String, Option<String>)>, sqlx::Error> {
        sqlx::query_as("SELECT id, llm_billing_mode FROM workspaces ORDER BY id")
            .fetch_all(&mut self.connection)
            .await
    }

    /// Sets a workspace's mode, or leaves it to the platform's default; adds the workspace if it is new.
    ///
    /// # Errors
    /// SQLite's.
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
    /// SQLite's.
    pub async fn close(self) -> Result<(), sqlx::Error> {
        self.connection.close().await
    }
}
