//! Terminal output of the commands, and its colours. Errors are printed in mod.rs.

use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;

use clap::ColorChoice;

/// Reports whether to colour stdout.
pub(super) fn is_coloured(choice: ColorChoice) -> bool {
    match choice {
        ColorChoice::Always => true,
        ColorChoice::Never => false,
        ColorChoice::Auto => io::stdout().is_terminal() && std::env::var_os("NO_COLOR").is_none(),
    }
}

/// Writes a command's output to stdout.
pub(super) fn print(text: &str) -> anyhow::Result<ExitCode> {
    let mut stdout = io::stdout().lock();
    let written = stdout.write_all(text.as_bytes());
    ignore_broken_pipe(written.and_then(|()| stdout.flush()))?;
    Ok(ExitCode::SUCCESS)
}

/// Writes a line to stderr.
pub(super) fn note(text: &str) -> io::Result<()> {
    ignore_broken_pipe(writeln!(io::stderr(), "{text}"))
}

/// Ignores a closed pipe, so that `| head` does not change the exit code.
fn ignore_broken_pipe(written: io::Result<()>) -> io::Result<()> {
    match written {
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        written => written,
    }
}

/// Returns one line per row, with aligned columns.
pub(super) fn aligned(rows: &[Vec<String>]) -> Vec<String> {
    let mut widths = Vec::new();
    for row in rows {
        widths.resize(row.len().max(widths.len()), 0);
        for (width, cell) in widths.iter_mut().zip(row) {
            *width = cell.chars().count().max(*width);
        }
    }
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths);
        let padded = cells.map(|(cell, &width)| format!("{cell:<width$}"));
        let line = padded.collect::<Vec<_>>().join("  ");
        line.trim_end().to_owned()
    };
    rows.iter().map(line).collect()
}
