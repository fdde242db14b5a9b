//! How modes are asked for over one connection: one by the policy's query, or many by one query made of it.

use std::sync::Arc;

use sqlx::postgres::{PgConnection, PgRow, PgTypeKind};
use sqlx::sqlite::SqliteConnection;
use sqlx::{AssertSqlSafe, Connection, Row, TypeInfo, ValueRef};

use super::error::is_statement_gone;
use crate::core::identity::ParameterValue;
use crate::core::policy_file::{Parameter, ParameterType};
use crate::core::resolution::LookupOutcome;

/// What is asked over one connection of a kind.
pub(super) trait Ask<Connection: Send>: Sync {
    /// What it answers.
    type Answer: Send;

    fn once(
        &self,
        connection: &mut Connection,
    ) -> impl Future<Output = Result<Self::Answer, sqlx::Error>> + Send;

    /// Whether it is asked in a transaction of its own.
    fn begins(&self) -> bool;

    /// A column of a type that is new to the connection, such as an enum, makes sqlx ask what it is, and that takes an
    /// unnamed statement's place. By the second time it is known.
    fn ask(
        &self,
        connection: &mut Connection,
    ) -> impl Future<Output = Result<Self::Answer, sqlx::Error>> + Send {
        async {
            match self.once(connection).await {
                Err(error) if is_statement_gone(&error) => Box::pin(self.once(connection)).await,
                answered => answered,
            }
        }
    }
}

/// One workspace's mode, by the policy's query, in a transaction if `begin` is there to begin one.
pub(super) struct One<'a> {
    pub(super) query: &'a Arc<str>,
    pub(super) parameters: &'a [ParameterValue],
    pub(super) begin: Option<&'a Arc<str>>,
}

impl Ask<PgConnection> for One<'_> {
    type Answer = LookupOutcome;

    fn begins(&self) -> bool {
        self.begin.is_some()
    }

    async fn once(&self, connection: &mut PgConnection) -> Result<LookupOutcome, sqlx::Error> {
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

/// Many workspaces' modes, by one query.
pub(super) struct Many<'a> {
    pub(super) query: &'a str,
    pub(super) parameters: &'a [Parameter],
    pub(super) many: &'a [Vec<ParameterValue>],
    pub(super) begin: Option<&'a Arc<str>>,
}

impl Ask<PgConnection> for Many<'_> {
    type Answer = Vec<LookupOutcome>;

    fn begins(&self) -> bool {
        self.begin.is_some()
    }

    async fn once(&self, connection: &mut PgConnection) -> Result<Vec<LookupOutcome>, sqlx::Error> {
        let mut statement = sqlx::query(AssertSqlSafe(self.query)).persistent(self.begin.is_none());
        for (place, parameter) in self.parameters.iter().enumerate() {
            let values = self.many.iter().map(|one| one.get(place));
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

/// The policy's query, made to answer for many workspaces at once: its parameters become columns of what is
/// asked. `None` if it has anything in which a `$1` could be something else than a parameter.
pub(super) fn query_of_many(query: &str, parameters: &[Parameter]) -> Option<String> {
    if ["'", "\"", ";", "--", "/*", "$$"]
        .iter()
        .any(|quote| query.contains(quote))
    {
        return None;
    }
    let mut pieces = query.split('$');
    let mut one = pieces.next()?.to_owned();
    for piece in pieces {
        let digits = piece.len() - piece.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let (number, rest) = piece.split_at(digits);
        let is_parameter = number
            .parse()
            .is_ok_and(|number| (1..=parameters.len()).contains(&number));
        if !is_parameter {
            return None;
        }
        one += &format!("llm_billing_asked.llm_billing_p{number}{rest}");
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
             SELECT llm_billing_one.mode, true FROM ({one}) AS llm_billing_one(mode) LIMIT 1
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

impl Ask<SqliteConnection> for One<'_> {
    type Answer = LookupOutcome;

    fn begins(&self) -> bool {
        false
    }

    async fn once(&self, connection: &mut SqliteConnection) -> Result<LookupOutcome, sqlx::Error> {
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
