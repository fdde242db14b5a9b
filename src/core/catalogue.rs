//! The catalogue: the variables by which agent programs and SDKs find a credential, an endpoint or another backend. Its
//! rows are in catalogue.csv, which build.rs checks and compiles. restrictions.rs decides what happens to them.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What a variable does in the programs that read it.
#[derive(
    Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, JsonSchema,
)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// A key or token of an LLM vendor.
    Credential,
    /// The base URL, host or endpoint of an LLM vendor.
    Endpoint,
    /// A switch that chooses another backend, or a setting of one.
    Route,
    /// Headers that are added to each call.
    Header,
    /// Configuration with keys or endpoints in it, or the path of such a file.
    Config,
    /// A variable that programs also use for other purposes.
    Shared,
}

impl Kind {
    /// Every kind, in the order of the policy's fields.
    pub const ALL: [Self; 6] = [
        Self::Credential,
        Self::Endpoint,
        Self::Route,
        Self::Header,
        Self::Config,
        Self::Shared,
    ];

    /// Returns the name in the catalogue, the policy and metrics.
    #[must_use]
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Credential => "credential",
            Self::Endpoint => "endpoint",
            Self::Route => "route",
            Self::Header => "header",
            Self::Config => "config",
            Self::Shared => "shared",
        }
    }
}

/// The value that hides a variable of an envFrom source and breaks no program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mask {
    /// This value; empty unless a program rejects an empty one.
    Literal(&'static str),
    /// The proxy's base URL for clients of OpenAI's API.
    OpenAiBaseUrl,
    /// The proxy's base URL for clients of Anthropic's API.
    AnthropicBaseUrl,
    /// The usage token, if the container's Anthropic clients call the proxy.
    AnthropicToken,
}

/// One variable that one program reads.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Row {
    /// The program or SDK.
    pub program: &'static str,
    /// The variable's name.
    pub variable: &'static str,
    /// What the variable does; the same in all its rows.
    pub kind: Kind,
    /// How the variable is hidden; the same in all its rows.
    #[serde(skip)]
    pub mask: Mask,
    /// The program's own page or code that names the variable.
    pub source: &'static str,
    /// The program's version that was read.
    pub version: &'static str,
    /// The date on which it was read, as YYYY-MM-DD.
    pub checked: &'static str,
}

/// All rows, sorted by variable and program.
pub static ROWS: &[Row] = &include!(concat!(env!("OUT_DIR"), "/catalogue.rs"));

/// Returns a row of the variable, if it has any.
#[must_use]
pub fn find(variable: &str) -> Option<&'static Row> {
    let index = ROWS
        .binary_search_by(|row| row.variable.cmp(variable))
        .ok()?;
    ROWS.get(index)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn find_returns_the_row_of_exactly_this_name() {
        for row in ROWS {
            let found = find(row.variable).map(|found| (found.variable, found.kind, found.mask));
            assert_eq!(found, Some((row.variable, row.kind, row.mask)));
        }
        assert!(find("").is_none() && find("anthropic_api_key").is_none());
    }

    #[test]
    fn kinds_have_the_same_name_in_text_and_json() {
        for kind in Kind::ALL {
            assert_eq!(serde_json::to_value(kind).unwrap(), kind.as_str());
        }
    }
}
