//! `catalogue`: prints the variables by which agent programs find credentials, endpoints and backends.

use std::process::ExitCode;

use clap::builder::PossibleValuesParser;
use clap::{Args, ValueEnum};

use super::terminal::{aligned, print};
use crate::core::catalogue::{Kind, ROWS, Row};

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(super) struct CatalogueArgs {
    /// Prints only the variables that this program or SDK reads
    #[arg(long, env = "LLM_BILLING_PROGRAM", value_parser = programs(), ignore_case = true, hide_possible_values = true)]
    program: Option<String>,
    /// Prints only the variables of this kind
    #[arg(long, env = "LLM_BILLING_KIND", value_parser = Kind::ALL.map(Kind::as_str))]
    kind: Option<String>,
    /// How to print the variables
    #[arg(
        short,
        long,
        env = "LLM_BILLING_OUTPUT",
        value_enum,
        default_value = "table"
    )]
    output: Output,
}

const EXAMPLES: &str = "\
Examples:
  llm-billing-webhook catalogue --program codex              what Codex reads
  llm-billing-webhook catalogue --kind route -o json         switches that choose another backend";

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Output {
    /// Aligned columns
    Table,
    /// A JSON list with one object per variable and program
    Json,
}

fn programs() -> PossibleValuesParser {
    let mut programs: Vec<&str> = ROWS.iter().map(|row| row.program).collect();
    programs.sort_unstable();
    programs.dedup();
    PossibleValuesParser::new(programs)
}

pub(super) fn catalogue(args: &CatalogueArgs) -> anyhow::Result<ExitCode> {
    let is_selected = |row: &&Row| {
        let (program, kind) = (args.program.as_deref(), args.kind.as_deref());
        program.is_none_or(|program| program.eq_ignore_ascii_case(row.program))
            && kind.is_none_or(|kind| kind == row.kind.as_str())
    };
    let rows = ROWS.iter().filter(is_selected);
    match args.output {
        Output::Json => {
            let rows: Vec<&Row> = rows.collect();
            print(&format!("{}\n", serde_json::to_string_pretty(&rows)?))
        }
        Output::Table => {
            let head = [
                "VARIABLE", "KIND", "PROGRAM", "VERSION", "CHECKED", "SOURCE",
            ];
            let mut table = vec![head.map(str::to_owned).to_vec()];
            table.extend(rows.map(|row| {
                let cells = [
                    row.variable,
                    row.kind.as_str(),
                    row.program,
                    row.version,
                    row.checked,
                    row.source,
                ];
                cells.map(str::to_owned).to_vec()
            }));
            print(&format!("{}\n", aligned(&table).join("\n")))
        }
    }
}
