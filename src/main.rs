//! The entry point: parses the arguments, runs the command and returns its exit code.

use std::process::ExitCode;

use clap::Parser;
use llm_billing_webhook::cli::Cli;

#[tokio::main]
async fn main() -> ExitCode {
    llm_billing_webhook::cli::run(Cli::parse()).await
}
