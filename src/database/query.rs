//! The queries that a connection executes: the policy's query for one workspace, or one made of it for many. Which
//! connection executes them, and how often they are retried, is mod.rs's business.

use std::sync::Arc;

use sqlx::postgres::{PgConnection, PgRow, PgTypeKind};
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Connection, Row, TypeInfo, ValueRef};

use super::error::is_statement_gone;
use crate::core::identity::ParameterValue;
use crate::core::policy_file::{Parameter, ParameterType};
use crate::core::resolution::LookupOutcome;

/// A query that can be executed over a connection of this kind.
pub(super) trait Query<Connection: Send>: Sync {
    /// What it returns.
    type Output: Send;

    fn execute_once(
        &self,
        connection: &mut Connection,
    ) -> impl Future<Output = Result<Self::Output, sqlx::Error>> + Send;

    /// Executes the query. For a column of a type that is new to the connection, such as an enum, sqlx queries the
    /// type, which takes the place of an unnamed statement. The second attempt finds the type known.
    fn execute(
        &self,
        connection: &mut Connection,
    ) -> impl Future<Output = Result<Self::Output, sqlx::Error>> + Send {
        async {
            match self.execute_once(connection).await {
                Err(error) if is_statement_gone(&error) => {
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

/// One query for many workspaces. Executed in a transaction if `begin` is given.
pub(super) struct BatchLookup<'a> {
    /// What [`batch_query`] made of the policy's query.
    pub(super) query: &'a str,
    pub(super) parameters: &'a [Parameter],
    /// The parameters' values of each workspace.
    pub(super) values: &'a [Vec<ParameterValue>],
    pub(super) begin: Option<&'a Arc<str>>,
}

impl Query<PgConnection> for BatchLookup<'_> {
    type Output = Vec<LookupOutcome>;

    async fn execute_once(
        &self,
        connection: &mut PgConnection,
    ) -> Result<Vec<LookupOutcome>, sqlx::Error> {
        let mut statement = sqlx::query(AssertSqlSafe(self.query)).persistent(self.begin.is_none());
        for (place, parameter) in self.parameters.iter().enumerate() {
            let values = self.values.iter().map(|values| values.get(place));
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
        let stored = |row: &PgRow| match row.try_get(1)? {
            Some(true) => Ok(LookupOutcome::Row(mode(row)?)),
            _ => Ok(LookupOutcome::NoRow),
        };
        rows.iter().map(stored).collect()
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

/// Makes a query for many workspaces of the policy's query: each parameter `$1` becomes a column of a joined list.
/// Returns `None` if the text has quotes or comments, in which a `$1` could be something other than a parameter.
pub(super) fn batch_query(query: &str, parameters: &[Parameter]) -> Option<String> {
    if ["'", "\"", ";", "--", "/*", "$$"]
        .iter()
        .any(|quote| query.contains(quote))
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
        single += &format!("llm_billing_asked.llm_billing_p{number}{rest}");
    }
    let list = |each: &dyn Fn((usize, &Parameter)) -> String| -> String {
        let all: Vec<String> = parameters.iter().enumerate().map(each).collect();
        all.join(", ")
    };
    let arrays = list(&|(place, parameter)| {
        let kind = if is_uuid(parameter) { "uuid" } else { "text" };
        format!("${}::{kind}[]", place + 1)
    });
    let columns = list(&|(place, _)| format!("llm_billing_p{}", place + 1));
    Some(format!(
        "SELECT llm_billing_found.mode, llm_billing_found.is_there
         FROM unnest({arrays}) WITH ORDINALITY AS llm_billing_asked({columns}, llm_billing_place)
         LEFT JOIN LATERAL (
             SELECT llm_billing_one.mode, true FROM ({single}) AS llm_billing_one(mode) LIMIT 1
         ) AS llm_billing_found(mode, is_there) ON true
         ORDER BY llm_billing_asked.llm_billing_place"
    ))
}

async fn select(
    connection: &mut PgConnection,
    query: &Arc<str>,
    parameters: &[ParameterValue],
    prepared: bool,
) -> Result<LookupOutcome, sqlx::Error> {
    // The operator's query from the policy file; what pods bring is bound, never spliced.
    let mut statement = sqlx::query(AssertSqlSafe(Arc::clone(query))).persistent(prepared);
    for parameter in parameters {
        statement = match parameter {
            ParameterValue::Uuid(uuid) => statement.bind(uuid),
            ParameterValue::Text(text) => statement.bind(text),
        };
    }
    let Some(row) = statement.fetch_optional(connection).await? else {
        return Ok(LookupOutcome::NoRow);
    };
    Ok(LookupOutcome::Row(mode(&row)?))
}

/// The first column of a row.
fn mode(row: &PgRow) -> Result<Option<String>, sqlx::Error> {
    let is_enum = matches!(row.try_get_raw(0)?.type_info().kind(), PgTypeKind::Enum(_));
    // An enum is sent as its label, which sqlx decodes as text only when it is told not to look at the type.
    if is_enum {
        row.try_get_unchecked(0)
    } else {
        row.try_get(0)
    }
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
                // SQLite has no type for UUIDs; they are stored as their usual text.
                ParameterValue::Uuid(uuid) => statement.bind(uuid.to_string()),
                ParameterValue::Text(text) => statement.bind(text),
            };
        }
        let Some(row) = statement.fetch_optional(connection).await? else {
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
