//! What commands write to the terminal, and its colours. Error messages are written once, in mod.rs.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::ColorChoice;

/// Whether to colour what goes to stdout.
pub(super) fn is_coloured(choice: ColorChoice) -> bool {
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    }
}

/// Writes a command's whole output.
pub(super) fn print(text: &str) -> anyhow::Result<ExitCode> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes());
    unless_closed(written.and_then(|()| stdout.flush()))?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a remark that is no part of a command's output.
pub(super) fn note(text: &str) -> io::Result<()> {
    unless_closed(writeln!(io::stderr(), "{text}"))
}

/// A reader that has seen enough is no error, and changes no exit code.
fn unless_closed(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}
