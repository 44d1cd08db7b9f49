//! The agent's log as scenarios read it: JSON lines of `tracing`.

use serde_json::{Map, Value};

/// A line of the agent's log.
#[derive(Clone, Debug, PartialEq)]
pub struct LogLine {
    /// ERROR, WARN, INFO, DEBUG; empty where the line is no JSON (a panic, say).
    pub level: String,
    /// The message; the whole line where it is no JSON.
    pub message: String,
    /// All other fields.
    pub fields: Map<String, Value>,
}

impl LogLine {
    /// A field as text, whatever its type.
    pub fn field(&self, name: &str) -> Option<String> {
        let value = self.fields.get(name)?;
        Some(match value {
            Value::String(text) => text.clone(),
            other => other.to_string(),
        })
    }

    /// Whether the message or any field contains the text.
    pub fn mentions(&self, text: &str) -> bool {
        self.message.contains(text)
            || self.fields.keys().any(|name| self.field(name).is_some_and(|value| value.contains(text)))
    }
}

/// Reads what `tracing`'s JSON formatter writes, flattened or not. The last line counts once it is
/// finished.
pub(crate) fn parse_log(text: &str) -> Vec<LogLine> {
    let finished = text.rfind('\n').map_or("", |end| &text[..end]);
    finished.lines().filter(|line| !line.trim().is_empty()).map(parse_line).collect()
}

fn parse_line(line: &str) -> LogLine {
    let Ok(Value::Object(mut object)) = serde_json::from_str(line) else {
        return LogLine { level: String::new(), message: line.to_owned(), fields: Map::new() };
    };
    if let Some(Value::Object(fields)) = object.remove("fields") {
        object.extend(fields);
    }
    let mut take = |name: &str| match object.remove(name) {
        Some(Value::String(text)) => text,
        Some(other) => other.to_string(),
        None => String::new(),
    };
    LogLine { level: take("level"), message: take("message"), fields: object }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn log_lines_are_read_flattened_or_not() {
        let text = concat!(
            r#"{"timestamp":"t","level":"INFO","fields":{"message":"synced","services":3},"target":"k"}"#,
            "\n",
            r#"{"level":"WARN","message":"skipped","service":"default/web"}"#,
            "\nthread panicked\n",
            r#"{"level":"INFO","message":"half a li"#,
        );
        let lines = parse_log(text);
        assert_eq!(lines.len(), 3);
        assert_eq!(lines[0].message, "synced");
        assert_eq!(lines[0].field("services").as_deref(), Some("3"));
        assert!(lines[1].mentions("default/web"));
        assert_eq!(lines[1].level, "WARN");
        assert_eq!(lines[2].message, "thread panicked");
    }
}
