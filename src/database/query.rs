//! The queries that a connection executes: the policy's query for one workspace, or a query derived from it for many.
//! mod.rs has the deadline and the retries on other connections.

use std::sync::Arc;

use futures_util::{Stream, TryStreamExt};
use sqlx::postgres::{PgConnection, PgRow, PgTypeKind};
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Connection, Row, TypeInfo, ValueRef};

use super::error::{LookupError, SeveralRows, is_statement_missing};
use crate::core::identity::ParameterValue;
use crate::core::policy_file::{Parameter, ParameterType};
use crate::core::resolution::LookupOutcome;

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
    pub(super) begin: Option<&'a Arc<str>>,
}

impl Query<PgConnection> for SingleLookup<'_> {
    type Output = LookupOutcome;

    async fn execute_once(
        &self,
        connection: &mut PgConnection,
    ) -> Result<LookupOutcome, sqlx::Error> {
        let Self {
            query, parameters, ..
        } = self;
        let Some(begin) = self.begin else {
            return select(connection, query, parameters, true).await;
        };
        let mut transaction = connection
            .begin_with(AssertSqlSafe(Arc::clone(begin)))
            .await?;
        let selected = select(&mut transaction, query, parameters, false).await;
        transaction.rollback().await?;
        selected
    }
}

async fn select(
    connection: &mut PgConnection,
    query: &Arc<str>,
    parameters: &[ParameterValue],
    prepared: bool,
) -> Result<LookupOutcome, sqlx::Error> {
    // The query is the operator's, from the policy file. Values from pods are bound, never interpolated.
    let mut statement = sqlx::query(AssertSqlSafe(Arc::clone(query))).persistent(prepared);
    for parameter in parameters {
        statement = match parameter {
            ParameterValue::Uuid(uuid) => statement.bind(uuid),
            ParameterValue::Text(text) => statement.bind(text),
        };
    }
    let Some(row) = only_row(statement.fetch(connection)).await? else {
        return Ok(LookupOutcome::NoRow);
    };
    Ok(LookupOutcome::Row(mode(&row)?))
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
        return Err(sqlx::Error::Decode(Box::new(SeveralRows)));
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
        let value = row.try_get_raw(0)?;
        if !value.is_null() && value.type_info().name() != "TEXT" {
            return Err(sqlx::Error::ColumnDecode {
                index: "0".to_owned(),
                source: "not text".into(),
            });
        }
        Ok(LookupOutcome::Row(row.try_get(0)?))
    }
}

/// One query for many workspaces. Executed in a transaction if `begin` is given.
pub(super) struct BatchLookup<'a> {
    /// The result of [`batch_query`].
    pub(super) query: &'a str,
    pub(super) parameters: &'a [Parameter],
    /// Each workspace's parameter values.
    pub(super) values: &'a [Vec<ParameterValue>],
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
            Ok(match row.try_get::<Option<i64>, _>(1)? {
                None => Ok(LookupOutcome::NoRow),
                Some(1) => Ok(LookupOutcome::Row(mode(row)?)),
                Some(_) => Err(LookupError::SeveralRows),
            })
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
/// joined list. Returns `None` if the query has quotes, comments or several statements, where `$1` might not be
/// a parameter, or refers to a parameter that the policy does not list.
pub(super) fn batch_query(query: &str, parameters: &[Parameter]) -> Option<String> {
    if ["'", "\"", ";", "--", "/*", "$$"]
        .iter()
        .any(|token| query.contains(token))
    {
        return None;
    }
    let mut pieces = query.split('$');
    let mut single = pieces.next()?.to_owned();
    for piece in pieces {
        let digits = piece.len() - piece.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, rest) = piece.split_at(digits);
        let is_parameter = number
            .parse()
            .is_ok_and(|number| (1..=parameters.len()).contains(&number));
        if !is_parameter {
            return None;
        }
        single += &format!("llm_billing_input.llm_billing_p{number}{rest}");
    }
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
        "SELECT llm_billing_found.mode, llm_billing_found.count
         FROM unnest({arrays}) WITH ORDINALITY AS llm_billing_input({columns}, llm_billing_index)
         LEFT JOIN LATERAL (
             SELECT llm_billing_two.mode, count(*) OVER () FROM (
                 SELECT llm_billing_one.mode FROM ({single}) AS llm_billing_one(mode) LIMIT 2
             ) AS llm_billing_two LIMIT 1
         ) AS llm_billing_found(mode, count) ON true
         ORDER BY llm_billing_input.llm_billing_index"
    ))
}

/// Returns the mode in a row's first column.
fn mode(row: &PgRow) -> Result<Option<String>, sqlx::Error> {
    let is_enum = matches!(row.try_get_raw(0)?.type_info().kind(), PgTypeKind::Enum(_));
    // PostgreSQL sends an enum as its label, which sqlx decodes as text only without a type check.
    if is_enum {
        row.try_get_unchecked(0)
    } else {
        row.try_get(0)
    }
}
