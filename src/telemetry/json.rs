//! Formats log lines as JSON objects: time, level, the event's fields and its target. The output equals that of
//! tracing-subscriber's JSON formatter, which would take most of a log line's time.

use std::fmt::{self, Debug, Display, Write};
use std::time::SystemTime;

use humantime::format_rfc3339_micros;
use tracing::Event;
use tracing::field::{Field, Visit};
use tracing_subscriber::Registry;
use tracing_subscriber::fmt::format::{DefaultFields, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent};

use crate::core::json::{Object, object};

/// Initial capacity of a line, enough for most.
const LINE_CAPACITY_BYTES: usize = 1024;

/// Formats each event as one line with a JSON object, without its spans.
pub(super) struct JsonLines;

impl FormatEvent<Registry, DefaultFields> for JsonLines {
    fn format_event(
        &self,
        _: &FmtContext<'_, Registry, DefaultFields>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut line = String::with_capacity(LINE_CAPACITY_BYTES);
        object(&mut line, |members| {
            let out = members.member("timestamp");
            out.push('"');
            // Writing to a string does not fail.
            let _ = write!(out, "{}", format_rfc3339_micros(SystemTime::now()));
            out.push('"');
            members.text("level", event.metadata().level().as_str());
            event.record(&mut Fields(members));
            members.text("target", event.metadata().target());
        });
        line.push('\n');
        writer.write_str(&line)
    }
}

/// Adds an event's fields to the object.
struct Fields<'f, 'o>(&'f mut Object<'o>);

impl Fields<'_, '_> {
    fn plain(&mut self, field: &Field, value: impl Display) {
        self.0.plain(field.name(), value);
    }
}

impl Visit for Fields<'_, '_> {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.0.text(field.name(), value);
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.plain(field, value);
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.plain(field, value);
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.plain(field, value);
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        // JSON has no NaN or infinity.
        if value.is_finite() {
            self.plain(field, format_args!("{value:?}"));
        } else {
            self.plain(field, "null");
        }
    }

    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        self.record_str(field, &format!("{value:?}"));
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use serde_json::{Value, json};
    use tracing::{error, info, subscriber};

    use super::*;

    #[derive(Clone, Default)]
    struct Buffer(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Buffer {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn line_equals_tracing_subscribers_json() {
        let (own, expected) = (Buffer::default(), Buffer::default());
        let log = || {
            info!(
                text = "a \"quoted\" one\n",
                empty = "",
                number = -7,
                large = u64::MAX,
                share = 0.25,
                whole = 5.0,
                tiny = 1e-9,
                none = f64::NAN,
                yes = true,
                display = %"shown",
                debug = ?Some("x"),
                absent = None::<&str>,
                "message with {}",
                "arguments"
            );
            error!("alone");
        };
        let writer = own.clone();
        let subscriber = tracing_subscriber::fmt()
            .event_format(JsonLines)
            .with_writer(move || writer.clone());
        subscriber::with_default(subscriber.finish(), log);
        let writer = expected.clone();
        let subscriber = tracing_subscriber::fmt()
            .json()
            .flatten_event(true)
            .with_current_span(false)
            .with_span_list(false)
            .with_writer(move || writer.clone());
        subscriber::with_default(subscriber.finish(), log);
        let lines = |buffer: &Buffer| -> Vec<Vec<(String, Value)>> {
            let text = String::from_utf8(buffer.0.lock().unwrap().clone()).unwrap();
            let line = |line: &str| {
                let mut object: serde_json::Map<String, Value> =
                    serde_json::from_str(line).unwrap();
                let timestamp = object["timestamp"].as_str().unwrap();
                assert_eq!(timestamp.len(), "2026-01-01T00:00:00.000000Z".len());
                object["timestamp"] = json!("now");
                object.into_iter().collect()
            };
            text.lines().map(line).collect()
        };
        assert_eq!(lines(&own), lines(&expected));
        assert_eq!(lines(&own).len(), 2);
    }
}
