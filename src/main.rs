//! The program: parses its arguments, runs the command, prints one error, returns the exit code.

use std::process::ExitCode;

use clap::Parser;
use llm_billing_webhook::cli::Cli;

#[tokio::main]
async fn main() -> ExitCode {
    llm_billing_webhook::cli::run(Cli::parse()).await
}
