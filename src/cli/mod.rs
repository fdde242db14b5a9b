//! The command line: its tree, its exit codes, and the one place where an error is printed. Each command
//! has a file of its own.

mod audit;
mod check;
mod dev;
mod policy;
mod review;
mod serve;
mod workspace;

use std::fs;
use std::io::{self, IsTerminal, Write};
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, ColorChoice, CommandFactory, Parser, Subcommand};
use clap_complete::Shell;

use crate::core::policy::Policy;
use crate::database::{UrlSource, UrlText};
use crate::telemetry;

/// Makes every workspace pod's LLM billing env true.
///
/// A mutating admission webhook for Kubernetes: it looks up each workspace's billing mode when a pod is
/// created, and patches the containers' env to say and do what that mode means.
#[derive(Debug, Parser)]
#[command(version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  llm-billing-webhook serve --dev                            try it, with nothing else installed
  llm-billing-webhook review -f pod.yaml --mode byok         what would it do with this manifest?
  llm-billing-webhook audit -A --only-drift                  which pods run with an env that is not true?
  llm-billing-webhook check --policy policy.yaml             is everything right for a rollout?";

#[derive(Debug, Subcommand)]
enum Command {
    /// Serves the webhook over HTTPS, and health and metrics over HTTP
    Serve(Box<serve::ServeArgs>),
    /// Shows what the webhook would do with a manifest. Exit code: 0 nothing, 1 it would change, 2 refused or error
    Review(review::ReviewArgs),
    /// Audits running pods against the database. Exit code: 0 all true, 1 drift, 2 error
    Audit(Box<audit::AuditArgs>),
    /// Shows a workspace's billing mode, its source and the reason
    Resolve(workspace::ResolveArgs),
    /// Edits the embedded SQLite database; the platform's own is never written
    #[command(subcommand)]
    Workspace(workspace::WorkspaceCommand),
    /// Checks policy, certificate and database before a rollout. Exit code: 0 all right, 2 not
    Check(check::CheckArgs),
    /// Prints the default policy, or the policy file's JSON schema
    #[command(subcommand)]
    Policy(policy::PolicyCommand),
    /// Prints shell completions
    Completions {
        /// The shell to complete for
        shell: Shell,
    },
    /// Prints a man page: the program's, or that of one of its commands
    Man {
        /// The command, such as `audit`
        command: Option<String>,
    },
}

/// Runs a command, prints its error if it has one, and says with which code to exit.
pub async fn run(cli: Cli) -> ExitCode {
    let done = match cli.command {
        Command::Serve(args) => serve::serve(*args).await,
        Command::Review(args) => review::review(args).await,
        Command::Audit(args) => audit::audit(*args).await,
        Command::Resolve(args) => workspace::resolve(args).await,
        Command::Workspace(command) => workspace::workspace(command).await,
        Command::Check(args) => check::check(args).await,
        Command::Policy(command) => policy::policy(&command),
        Command::Completions { shell } => completions(shell),
        Command::Man { command } => man(command.as_deref()),
    };
    match done {
        Ok(code) => code,
        Err(error) => {
            // Nothing is left to do if stderr is gone.
            let _ = writeln!(io::stderr(), "error: {}", telemetry::chain(error.as_ref()));
            ExitCode::from(2)
        }
    }
}

fn completions(shell: Shell) -> anyhow::Result<ExitCode> {
    let mut script = Vec::new();
    clap_complete::generate(
        shell,
        &mut Cli::command(),
        env!("CARGO_PKG_NAME"),
        &mut script,
    );
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

/// Whether to colour what goes to stdout.
fn is_coloured(choice: ColorChoice) -> bool {
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    }
}

/// Writes a command's whole output.
fn print(text: &str) -> anyhow::Result<ExitCode> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes());
    unless_closed(written.and_then(|()| stdout.flush()))?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a remark that is no part of a command's output.
fn note(text: &str) -> io::Result<()> {
    unless_closed(writeln!(io::stderr(), "{text}"))
}

/// A reader that has seen enough is no error, and changes no exit code.
fn unless_closed(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// The policy file, for every command that needs one.
#[derive(Debug, Args)]
struct PolicyArgs {
    /// Policy file; see `policy default`. Absent, the default policy applies, which has no proxy
    #[arg(long, env = "LLM_BILLING_POLICY", value_name = "FILE")]
    policy: Option<PathBuf>,
}

impl PolicyArgs {
    /// The policy; without a file, the default one, which an empty text is.
    fn load(&self) -> anyhow::Result<Policy> {
        self.parse(&self.read()?.unwrap_or_default())
    }

    fn read(&self) -> anyhow::Result<Option<String>> {
        let read = |path: &PathBuf| {
            fs::read_to_string(path)
                .with_context(|| format!("cannot read policy {}", path.display()))
        };
        self.policy.as_ref().map(read).transpose()
    }

    fn parse(&self, text: &str) -> anyhow::Result<Policy> {
        let path = self.policy.as_deref().unwrap_or(Path::new(""));
        Policy::parse(text).with_context(|| {
            format!(
                "cannot use policy {} (see: llm-billing-webhook policy schema)",
                path.display()
            )
        })
    }
}

/// The database, for every command that needs one.
#[derive(Debug, Args)]
struct DatabaseArgs {
    /// `postgres://USER:PASSWORD@HOST:PORT/DATABASE` or `sqlite://FILE`
    // Parsed only later: clap repeats a value that it cannot parse, and this one may hold a password.
    #[arg(
        long,
        env = "LLM_BILLING_DATABASE_URL",
        value_name = "URL",
        hide_env_values = true
    )]
    database_url: Option<UrlText>,
    /// File that holds the URL. While serving, it is read again when it changes, and when the database refuses the login
    #[arg(long, env = "LLM_BILLING_DATABASE_URL_FILE", value_name = "FILE")]
    database_url_file: Option<PathBuf>,
}

impl DatabaseArgs {
    fn source(&self) -> anyhow::Result<Option<UrlSource>> {
        match (&self.database_url, &self.database_url_file) {
            (Some(_), Some(_)) => {
                bail!("--database-url and --database-url-file are both given; leave one out")
            }
            (Some(url), None) => Ok(Some(UrlSource::Given(url.clone()))),
            (None, Some(path)) => Ok(Some(UrlSource::File(path.clone()))),
            (None, None) => Ok(None),
        }
    }

    fn required(&self) -> anyhow::Result<UrlSource> {
        self.source()?
            .context("no database is given; set --database-url or --database-url-file")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_command_that_does_something_teaches_by_example() {
        for command in Cli::command().get_subcommands() {
            let name = command.get_name();
            let help = command.get_after_help().map(ToString::to_string);
            let teaches = help.is_some_and(|help| help.contains(&format!("{name} ")));
            assert!(
                teaches || ["completions", "man", "policy"].contains(&name),
                "{name}"
            );
        }
    }

    #[test]
    fn every_flag_is_also_an_environment_variable_of_its_name() {
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
