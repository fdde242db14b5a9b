//! `policy default` and `policy schema`.

use std::process::ExitCode;

use clap::Subcommand;

use super::terminal::print;
use crate::core::policy_file::{DEFAULT_POLICY, PolicyFile};

#[derive(Debug, Subcommand)]
pub(super) enum PolicyCommand {
    /// Prints the default policy with a comment on every field, as a starting point
    Default,
    /// Prints the JSON schema of the policy file, for an editor
    Schema,
}

pub(super) fn policy(command: &PolicyCommand) -> anyhow::Result<ExitCode> {
    match command {
        PolicyCommand::Default => print(DEFAULT_POLICY),
        PolicyCommand::Schema => {
            print(&format!("{}\n", serde_json::to_string_pretty(&PolicyFile::schema())?))
        }
    }
}
