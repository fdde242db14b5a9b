//! The command line: command tree, exit codes and error output. Each command has its own file.

mod args;
mod audit;
mod catalogue;
mod check;
mod converge;
mod dev;
mod policy;
mod review;
mod serve;
mod terminal;
mod workspace;

use std::io::{self, Write};
use std::process::ExitCode;

use anyhow::Context;
use clap::{CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use self::terminal::print;
use crate::telemetry;

/// Sets the environment variables of workspace pods to match their LLM billing mode.
///
/// A mutating admission webhook for Kubernetes: it looks up the workspace's billing mode when a pod is created, and
/// patches the containers' env to match that mode.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  llm-billing-webhook serve --dev                            try it with nothing else installed
  llm-billing-webhook review -f pod.yaml --mode byok         show what the webhook would change
  llm-billing-webhook audit -A --only-drift                  find pods whose env does not match
  llm-billing-webhook check --policy policy.yaml             validate a policy before a rollout";

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves the webhook over HTTPS, and health and metrics over HTTP
    Serve(Box<serve::ServeArgs>),
    /// Shows what the webhook would do with a manifest. Exit codes: 0 no change, 1 would change, 2 refused or error
    Review(review::ReviewArgs),
    /// Compares running pods with the database. Exit codes: 0 in sync, 1 drift, 2 error
    Audit(Box<audit::AuditArgs>),
    /// Keeps running pods in sync with the database: reports, and with --apply recreates, those that are not
    Converge(Box<converge::ConvergeArgs>),
    /// Shows a workspace's billing mode, its source and the reason
    Resolve(workspace::ResolveArgs),
    /// Edits the embedded SQLite database; never writes to the platform's database
    #[command(subcommand)]
    Workspace(workspace::WorkspaceCommand),
    /// Validates policy, certificate and database before a rollout. Exit codes: 0 valid, 2 error
    Check(check::CheckArgs),
    /// Prints the variables by which agent programs find credentials, endpoints and other backends
    Catalogue(catalogue::CatalogueArgs),
    /// Prints the default policy, or the policy file's JSON schema
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Prints shell completions
    Completions {
        /// The shell to complete for
        shell: Shell,
    },
    /// Prints the man page of the program or of a command
    Man {
        /// The command, such as `audit`
        command: Option<String>,
    },
}

/// Runs a command, prints its error if any, and returns the exit code.
pub async fn run(cli: Cli) -> ExitCode {
    let result = match cli.command {
        Command::Serve(args) => serve::serve(*args).await,
        Command::Review(args) => review::review(args).await,
        Command::Audit(args) => audit::audit(*args).await,
        Command::Converge(args) => converge::converge(*args).await,
        Command::Resolve(args) => workspace::resolve(args).await,
        Command::Workspace(command) => workspace::workspace(command).await,
        Command::Check(args) => check::check(args).await,
        Command::Catalogue(args) => catalogue::catalogue(&args),
        Command::Policy(command) => policy::policy(&command),
        Command::Completions { shell } => completions(shell),
        Command::Man { command } => man(command.as_deref()),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            // A closed stderr leaves no way to report the error.
            let _ = writeln!(io::stderr(), "error: {}", telemetry::chain(error.as_ref()));
            ExitCode::from(2)
        }
    }
}

fn completions(shell: Shell) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), env!("CARGO_PKG_NAME"), &mut script);
    print(&String::from_utf8_lossy(&script))
}

fn man(name: Option<&str>) -> anyhow::Result<ExitCode> {
    let program = env!("CARGO_PKG_NAME");
    let mut all = Cli::command();
    all.build();
    let command = match name {
        None => all,
        Some(name) => {
            let command = all
                .find_subcommand(name)
                .with_context(|| format!("there is no command {name:?}; see: {program} help"))?;
            command.clone().name(
                command
                    .get_bin_name()
                    .map_or_else(|| name.to_owned(), |name| name.replace(' ', "-")),
            )
        }
    };
    let mut page = Vec::new();
    clap_mangen::Man::new(command).render(&mut page)?;
    print(&String::from_utf8_lossy(&page))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_show_examples_in_their_help() {
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            let help = command.get_after_help().map(ToString::to_string);
            let has_example = help.is_some_and(|help| help.contains(&format!("{name} ")));
            assert!(has_example || ["completions", "man", "policy"].contains(&name), "{name}");
        }
    }

    #[test]
    fn flags_have_environment_variables_of_their_name() {
        let mut commands = vec![Cli::command()];
        while let Some(command) = commands.pop() {
            for flag in command.get_arguments() {
                if let Some(name) = flag
                    .get_long()
                    .filter(|name| !["help", "version"].contains(name))
                {
                    let expected = format!("LLM_BILLING_{}", name.replace('-', "_").to_uppercase());
                    let env = flag.get_env().and_then(|env| env.to_str());
                    assert_eq!(env, Some(expected.as_str()), "{}", command.get_name());
                }
            }
            commands.extend(command.get_subcommands().cloned());
        }
    }
}
