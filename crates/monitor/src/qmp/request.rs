//! What a message to the monitor asks for. Knows no command: whether the name means anything is found out later.

use serde_json::{Map, Value};

use super::reply::QmpError;

/// A request that has the form of one.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// The command's name.
    pub command: String,
    /// Its arguments; empty if there are none.
    pub arguments: Map<String, Value>,
    /// What the answer is to be marked with.
    pub id: Option<Value>,
    /// Whether it is to overtake others (`exec-oob`).
    pub oob: bool,
}

/// A message that is no request: what is wrong, and the id that the error is to be marked with.
#[derive(Debug, Clone, PartialEq)]
pub struct Refused {
    /// The id, if the message had one.
    pub id: Option<Value>,
    /// What is wrong.
    pub error: QmpError,
}

impl Request {
    /// Takes a message apart. `oob` is whether the client may use `exec-oob`.
    ///
    /// # Errors
    /// What is wrong with its form, in QEMU's words.
    pub fn read(message: Value, oob: bool) -> Result<Self, Refused> {
        let Value::Object(mut members) = message else {
            let error = QmpError::generic("QMP input must be a JSON object");
            return Err(Refused { id: None, error });
        };
        let id = members.shift_remove("id");
        match Self::take_apart(members, oob) {
            Ok((command, arguments, oob)) => Ok(Self {
                command,
                arguments,
                id,
                oob,
            }),
            Err(error) => Err(Refused { id, error }),
        }
    }

    fn take_apart(
        members: Map<String, Value>,
        oob_allowed: bool,
    ) -> Result<(String, Map<String, Value>, bool), QmpError> {
        let wrong = |name: &str, problem: &str| {
            // Names are as long as the client likes.
            let name: String = name.chars().take(200).collect();
            QmpError::generic(format!("QMP input member '{name}' {problem}"))
        };
        let mut command = None;
        let mut arguments = None;
        for (name, value) in members {
            match (name.as_str(), value) {
                ("execute" | "exec-oob", _) if name == "exec-oob" && !oob_allowed => {
                    return Err(wrong(&name, "is unexpected"));
                }
                ("execute" | "exec-oob", _) if command.is_some() => {
                    let other = "QMP input member 'execute' clashes with 'exec-oob'";
                    return Err(QmpError::generic(other));
                }
                ("execute", Value::String(word)) => command = Some((word, false)),
                ("exec-oob", Value::String(word)) => command = Some((word, true)),
                ("execute" | "exec-oob", _) => return Err(wrong(&name, "must be a string")),
                ("arguments", Value::Object(members)) => arguments = Some(members),
                ("arguments", _) => return Err(wrong(&name, "must be an object")),
                _ => return Err(wrong(&name, "is unexpected")),
            }
        }
        let missing = || QmpError::generic("QMP input lacks member 'execute'");
        let (command, oob) = command.ok_or_else(missing)?;
        Ok((command, arguments.unwrap_or_default(), oob))
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn requests_are_taken_apart() {
        let message = json!({"id": [1, null], "execute": "x", "arguments": {"a": 1}});
        let request = Request::read(message, false).unwrap();
        assert_eq!(request.command, "x");
        assert_eq!(request.arguments.len(), 1);
        assert_eq!(request.id, Some(json!([1, null])));
        assert!(!request.oob);
        let request = Request::read(json!({"exec-oob": "x"}), true).unwrap();
        assert!(request.oob && request.id.is_none());
    }

    /// As told by `qemu-storage-daemon` 10.0.2.
    #[test]
    fn mistakes_are_told_in_known_words_with_the_id() {
        let cases = [
            (json!([]), "QMP input must be a JSON object"),
            (json!({}), "QMP input lacks member 'execute'"),
            (
                json!({"execute": 1}),
                "QMP input member 'execute' must be a string",
            ),
            (
                json!({"exec-oob": 1}),
                "QMP input member 'exec-oob' must be a string",
            ),
            (
                json!({"execute": "a", "x": 1}),
                "QMP input member 'x' is unexpected",
            ),
            (
                json!({"execute": "a", "exec-oob": "a"}),
                "QMP input member 'execute' clashes with 'exec-oob'",
            ),
            (
                json!({"execute": "a", "arguments": []}),
                "QMP input member 'arguments' must be an object",
            ),
        ];
        for (message, words) in cases {
            let refused = Request::read(message.clone(), true).unwrap_err();
            assert_eq!(
                (refused.error.desc.as_str(), refused.id),
                (words, None),
                "{message}"
            );
        }
        let refused = Request::read(json!({"exec-oob": "a", "id": 7}), false).unwrap_err();
        assert_eq!(
            refused.error.desc,
            "QMP input member 'exec-oob' is unexpected"
        );
        assert_eq!(refused.id, Some(json!(7)));
    }
}
