//! Arguments that several commands share: the policy and the database.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use clap::Args;

use crate::core::policy::Policy;
use crate::core::policy_file::PolicyFile;
use crate::database::{UrlSource, UrlText};

/// The policy file, for every command that needs one.
#[derive(Debug, Args)]
pub(super) struct PolicyArgs {
    /// Policy file; see `policy default`. Absent, the default policy applies, which has no proxy
    #[arg(long, env = "LLM_BILLING_POLICY", value_name = "FILE")]
    pub(super) policy: Option<PathBuf>,
}

impl PolicyArgs {
    /// Returns the compiled policy; without a file, the default one.
    pub(super) fn load(&self) -> anyhow::Result<Policy> {
        self.file().map(Policy::from)
    }

    /// Returns the policy file; without a file, the default one (an empty text).
    pub(super) fn file(&self) -> anyhow::Result<PolicyFile> {
        self.parse(&self.read()?.unwrap_or_default())
    }

    pub(super) fn read(&self) -> anyhow::Result<Option<String>> {
        let read = |path: &PathBuf| {
            fs::read_to_string(path)
                .with_context(|| format!("cannot read policy {}", path.display()))
        };
        self.policy.as_ref().map(read).transpose()
    }

    pub(super) fn parse(&self, text: &str) -> anyhow::Result<PolicyFile> {
        let path = self.policy.as_deref().unwrap_or(Path::new(""));
        PolicyFile::parse(text).with_context(|| {
            format!("cannot use policy {} (see: llm-billing-webhook policy schema)", path.display())
        })
    }
}

/// Parses a duration above zero.
pub(super) fn positive_duration(text: &str) -> Result<Duration, String> {
    match humantime::parse_duration(text) {
        Ok(duration) if duration.is_zero() => Err("expected a duration above zero".to_owned()),
        Ok(duration) => Ok(duration),
        Err(error) => Err(error.to_string()),
    }
}

/// The database, for every command that needs one.
#[derive(Debug, Args)]
pub(super) struct DatabaseArgs {
    /// `postgres://USER:PASSWORD@HOST:PORT/DATABASE` or `sqlite://FILE`
    // Parsed later: clap's error quotes a value that it cannot parse, and this one may hold a password.
    #[arg(
        long,
        env = "LLM_BILLING_DATABASE_URL",
        value_name = "URL",
        hide_env_values = true
    )]
    pub(super) database_url: Option<UrlText>,
    /// File that holds the URL. While serving, it is read again when it changes, and when the database refuses
    /// the login
    #[arg(long, env = "LLM_BILLING_DATABASE_URL_FILE", value_name = "FILE")]
    pub(super) database_url_file: Option<PathBuf>,
}

impl DatabaseArgs {
    pub(super) fn source(&self) -> anyhow::Result<Option<UrlSource>> {
        match (&self.database_url, &self.database_url_file) {
            (Some(_), Some(_)) => {
                bail!("--database-url and --database-url-file are both given; leave one out")
            }
            (Some(url), None) => Ok(Some(UrlSource::Given(url.clone()))),
            (None, Some(path)) => Ok(Some(UrlSource::File(path.clone()))),
            (None, None) => Ok(None),
        }
    }

    pub(super) fn required(&self) -> anyhow::Result<UrlSource> {
        self.source()?
            .context("no database is given; set --database-url or --database-url-file")
    }
}
