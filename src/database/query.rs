//! The queries that a connection executes: the policy's query for one workspace, or a query derived from it for many.
//! mod.rs has the deadline and the retries on other connections.

use std::sync::Arc;

use futures_util::{Stream, TryStreamExt};
use sqlx::postgres::{PgConnection, PgRow, PgTypeInfo, PgTypeKind, Postgres};
use sqlx::sqlite::{SqliteConnection, SqliteRow};
use sqlx::{AssertSqlSafe, Column, Connection, Row as _, Type, TypeInfo, ValueRef};

use super::error::{AnswerError, LookupError, is_statement_missing};
use crate::core::identity::ParameterValue;
use crate::core::policy_file::{Parameter, ParameterType};
use crate::core::resolution::{LookupOutcome, Row};

/// Limit on the length of a column's value. The kernel's limit on a variable is 128 KiB.
const MAX_COLUMN_BYTES: usize = 4096;

/// A query that can be executed over this type of connection.
pub(super) trait Query<C: Send>: Sync {
    /// The query's result.
    type Output: Send;

    fn execute_once(
        &self,
        connection: &mut C,
    ) -> impl Future<Output = Result<Self::Output, sqlx::Error>> + Send;

    /// Executes the query, twice if its statement is missing. For a type that is new to the connection, such as an
    /// enum, sqlx queries the type, which replaces an unnamed statement. The second attempt finds the type cached.
    fn execute(
        &self,
        connection: &mut C,
    ) -> impl Future<Output = Result<Self::Output, sqlx::Error>> + Send {
        async {
            match self.execute_once(connection).await {
                Err(error) if is_statement_missing(&error) => {
                    Box::pin(self.execute_once(connection)).await
                }
                result => result,
            }
        }
    }
}

/// The policy's query for one workspace. Executed in a transaction if `begin` is given.
pub(super) struct SingleLookup<'a> {
    pub(super) query: &'a Arc<str>,
    pub(super) parameters: &'a [ParameterValue],
    /// The columns to read besides the mode.
    pub(super) columns: &'a [String],
    pub(super) begin: Option<&'a Arc<str>>,
}

impl Query<PgConnection> for SingleLookup<'_> {
    type Output = LookupOutcome;

    async fn execute_once(
        &self,
        connection: &mut PgConnection,
    ) -> Result<LookupOutcome, sqlx::Error> {
        let Some(begin) = self.begin else {
            return select(connection, self, true).await;
        };
        let mut transaction = connection
            .begin_with(AssertSqlSafe(Arc::clone(begin)))
            .await?;
        let selected = select(&mut transaction, self, false).await;
        transaction.rollback().await?;
        selected
    }
}

async fn select(
    connection: &mut PgConnection,
    lookup: &SingleLookup<'_>,
    prepared: bool,
) -> Result<LookupOutcome, sqlx::Error> {
    // The query is the operator's, from the policy file. Values from pods are bound, never interpolated.
    let mut statement = sqlx::query(AssertSqlSafe(Arc::clone(lookup.query))).persistent(prepared);
    for parameter in lookup.parameters {
        statement = match parameter {
            ParameterValue::Uuid(uuid) => statement.bind(uuid),
            ParameterValue::Text(text) => statement.bind(text),
        };
    }
    let Some(row) = only_row(statement.fetch(connection)).await? else {
        return Ok(LookupOutcome::NoRow);
    };
    Ok(LookupOutcome::Row(read_row(&row, 0, lookup.columns, pg_text)?))
}

/// Returns the row of a result that has at most one. Reads the others too, so that the connection stays usable.
async fn only_row<R>(
    mut rows: impl Stream<Item = Result<R, sqlx::Error>> + Unpin,
) -> Result<Option<R>, sqlx::Error> {
    let Some(first) = rows.try_next().await? else {
        return Ok(None);
    };
    let mut has_several = false;
    while rows.try_next().await?.is_some() {
        has_several = true;
    }
    if has_several {
        return Err(AnswerError::SeveralRows.into());
    }
    Ok(Some(first))
}

impl Query<SqliteConnection> for SingleLookup<'_> {
    type Output = LookupOutcome;

    async fn execute_once(
        &self,
        connection: &mut SqliteConnection,
    ) -> Result<LookupOutcome, sqlx::Error> {
        let mut statement = sqlx::query(AssertSqlSafe(Arc::clone(self.query)));
        for parameter in self.parameters {
            statement = match parameter {
                // SQLite has no UUID type; UUIDs are stored as hyphenated text.
                ParameterValue::Uuid(uuid) => statement.bind(uuid.to_string()),
                ParameterValue::Text(text) => statement.bind(text),
            };
        }
        let Some(row) = only_row(statement.fetch(connection)).await? else {
            return Ok(LookupOutcome::NoRow);
        };
        Ok(LookupOutcome::Row(read_row(&row, 0, self.columns, sqlite_text)?))
    }
}

/// One query for many workspaces. Executed in a transaction if `begin` is given.
pub(super) struct BatchLookup<'a> {
    /// The result of [`batch_query`].
    pub(super) query: &'a str,
    pub(super) parameters: &'a [Parameter],
    /// Each workspace's parameter values.
    pub(super) values: &'a [Vec<ParameterValue>],
    /// The columns to read besides the mode.
    pub(super) columns: &'a [String],
    pub(super) begin: Option<&'a Arc<str>>,
}

impl Query<PgConnection> for BatchLookup<'_> {
    type Output = Vec<Result<LookupOutcome, LookupError>>;

    async fn execute_once(
        &self,
        connection: &mut PgConnection,
    ) -> Result<Self::Output, sqlx::Error> {
        let mut statement = sqlx::query(AssertSqlSafe(self.query)).persistent(self.begin.is_none());
        for (index, parameter) in self.parameters.iter().enumerate() {
            let values = self.values.iter().map(|values| values.get(index));
            statement = if is_uuid(parameter) {
                let uuid = |value| match value {
                    Some(&ParameterValue::Uuid(uuid)) => Some(uuid),
                    _ => None,
                };
                statement.bind(values.map(uuid).collect::<Vec<_>>())
            } else {
                let text = |value: Option<&ParameterValue>| match value {
                    Some(ParameterValue::Text(text)) => Some(text.clone()),
                    _ => None,
                };
                statement.bind(values.map(text).collect::<Vec<_>>())
            };
        }
        let rows = match self.begin {
            None => statement.fetch_all(connection).await?,
            Some(begin) => {
                let mut transaction = connection
                    .begin_with(AssertSqlSafe(Arc::clone(begin)))
                    .await?;
                let rows = statement.fetch_all(&mut *transaction).await;
                transaction.rollback().await?;
                rows?
            }
        };
        let outcome = |row: &PgRow| {
            let read = || read_row(row, 1, self.columns, pg_text);
            match row.try_get::<Option<i64>, _>(0)? {
                None => Ok(Ok(LookupOutcome::NoRow)),
                Some(1) => match read() {
                    Ok(row) => Ok(Ok(LookupOutcome::Row(row))),
                    Err(error) if error.is_of_one_workspace() => {
                        Ok(Err(LookupError::Answer(error)))
                    }
                    Err(error) => Err(error.into()),
                },
                Some(_) => Ok(Err(LookupError::Answer(AnswerError::SeveralRows))),
            }
        };
        rows.iter().map(outcome).collect()
    }
}

const fn is_uuid(parameter: &Parameter) -> bool {
    matches!(
        parameter,
        Parameter::Label {
            kind: ParameterType::Uuid,
            ..
        }
    )
}

/// Derives a query for many workspaces from the policy's query: each parameter such as `$1` becomes a column of a
/// joined list. Returns `None` if the query has comments, several statements, or strings in which `$1` might not be a
/// parameter, or refers to a parameter that the policy does not list.
pub(super) fn batch_query(query: &str, parameters: &[Parameter]) -> Option<String> {
    let mut single = String::with_capacity(query.len() * 2);
    let mut rest = query;
    while let Some(at) = rest.find(['\'', '"', ';', '-', '/', '$']) {
        let (before, from) = rest.split_at(at);
        single.push_str(before);
        let (piece, after) = match from.as_bytes() {
            // A doubled quote ends one string and begins another.
            [quote @ (b'\'' | b'"'), ..] => {
                let is_escape_string = before.ends_with(['e', 'E', '&']);
                let end = from.get(1..)?.find(char::from(*quote))? + 2;
                if is_escape_string {
                    return None;
                }
                let (string, after) = from.split_at(end);
                (string.to_owned(), after)
            }
            [b'$', ..] => {
                let name = from.get(1..)?;
                let digits =
                    name.len() - name.trim_start_matches(|c: char| c.is_ascii_digit()).len();
                let (number, after) = name.split_at(digits);
                number
                    .parse()
                    .ok()
                    .filter(|number| (1..=parameters.len()).contains(number))?;
                (format!("llm_billing_input.llm_billing_p{number}"), after)
            }
            [b';', ..] | [b'-', b'-', ..] | [b'/', b'*', ..] => return None,
            _ => {
                let (operator, after) = from.split_at(1);
                (operator.to_owned(), after)
            }
        };
        single.push_str(&piece);
        rest = after;
    }
    single.push_str(rest);
    let list = |format: &dyn Fn((usize, &Parameter)) -> String| -> String {
        let items: Vec<String> = parameters.iter().enumerate().map(format).collect();
        items.join(", ")
    };
    let arrays = list(&|(index, parameter)| {
        let kind = if is_uuid(parameter) { "uuid" } else { "text" };
        format!("${}::{kind}[]", index + 1)
    });
    let columns = list(&|(index, _)| format!("llm_billing_p{}", index + 1));
    Some(format!(
        "SELECT llm_billing_found.*
         FROM unnest({arrays}) WITH ORDINALITY AS llm_billing_input({columns}, llm_billing_index)
         LEFT JOIN LATERAL (
             SELECT count(*) OVER (), llm_billing_two.* FROM (
                 SELECT * FROM ({single}) AS llm_billing_one LIMIT 2
             ) AS llm_billing_two LIMIT 1
         ) AS llm_billing_found ON true
         ORDER BY llm_billing_input.llm_billing_index"
    ))
}

/// Derives a query that returns a row even if the policy's query returns none, to see its columns.
pub(super) fn probe_query(query: &str) -> String {
    let query = query.trim_end().trim_end_matches(';');
    format!(
        "SELECT llm_billing_two.* FROM (SELECT 1 AS llm_billing_one) AS llm_billing_one
         LEFT JOIN ({query}
         ) AS llm_billing_two ON true"
    )
}

/// Reads a row of the policy's query, whose first column is at `first`: the mode, and the named columns.
fn read_row<R: sqlx::Row>(
    row: &R,
    first: usize,
    columns: &[String],
    text: impl Fn(&R, usize) -> Option<Option<String>>,
) -> Result<Row, AnswerError> {
    let column = |name: &String| {
        let own = row.columns().iter().skip(first);
        let index = own.map(Column::name).position(|own| own == name);
        let index = index.ok_or_else(|| AnswerError::MissingColumn(name.clone()))? + first;
        let value = text(row, index).ok_or_else(|| AnswerError::NotText(name.clone()))?;
        match &value {
            Some(value) if value.len() > MAX_COLUMN_BYTES || value.contains('\0') => {
                Err(AnswerError::UnusableValue(name.clone()))
            }
            _ => Ok(value),
        }
    };
    let mode = row.columns().get(first).ok_or(AnswerError::ModeNotText)?;
    // PostgreSQL pads values of char(n) with blanks, so none would be a mode.
    if mode.type_info().name() == "CHAR" {
        return Err(AnswerError::ModeIsPadded);
    }
    Ok(Row {
        mode: text(row, first).ok_or(AnswerError::ModeNotText)?,
        columns: columns.iter().map(column).collect::<Result<_, _>>()?,
    })
}

/// Returns a column's text; `None` if it is not text.
fn pg_text(row: &PgRow, index: usize) -> Option<Option<String>> {
    // PostgreSQL sends an enum as its label. sqlx decodes that, and a domain, only without a check of the type, which it
    // skips for NULL.
    fn is_text(kind: &PgTypeInfo) -> bool {
        match kind.kind() {
            PgTypeKind::Enum(_) => true,
            PgTypeKind::Domain(of) => is_text(of),
            _ => <String as Type<Postgres>>::compatible(kind),
        }
    }
    let value = row.try_get_raw(index).ok()?;
    is_text(&value.type_info()).then(|| row.try_get_unchecked(index).ok())?
}

/// Returns a column's text; `None` if it is not text.
fn sqlite_text(row: &SqliteRow, index: usize) -> Option<Option<String>> {
    let value = row.try_get_raw(index).ok()?;
    let is_text = value.is_null() || value.type_info().name() == "TEXT";
    is_text.then(|| row.try_get(index).ok())?
}
