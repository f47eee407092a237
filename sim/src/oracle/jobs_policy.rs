//! What commands ask of jobs: what to do about errors, and with whom to stand or fall.

use serde_json::{Map, Value};

use crate::scenario::actions;

/// What a job was asked to do about errors.
#[derive(Clone, Debug)]
pub(super) struct Policy {
    pub(super) id: String,
    /// Of which operation; `None`: of any.
    pub(super) operation: Option<&'static str>,
    pub(super) what: String,
    /// What is ignored is tried again, so that the job may still end well.
    pub(super) retries: bool,
    /// The job first asks what its source holds; when that fails it ends without asking anybody what to do.
    pub(super) asks_first: bool,
}

/// The id of the job that a command starts.
fn id_of(arguments: &Map<String, Value>) -> &str {
    let text = |key: &str| arguments.get(key).and_then(Value::as_str);
    text("job-id").or(text("device")).unwrap_or_default()
}

/// The policies that a command asks for; a transaction has several.
pub(super) fn policies_of(execute: &str, arguments: &Map<String, Value>, out: &mut Vec<Policy>) {
    let text = |key: &str| arguments.get(key).and_then(Value::as_str);
    let mut push = |operation, key: &str, retries| {
        out.push(Policy {
            id: id_of(arguments).to_owned(),
            operation,
            what: text(key).unwrap_or("report").to_owned(),
            retries,
            asks_first: execute == "blockdev-backup" && text("sync") == Some("top"),
        });
    };
    match execute {
        "block-stream" => push(None, "on-error", false),
        "blockdev-backup" => {
            push(Some("read"), "on-source-error", true);
            push(Some("write"), "on-target-error", true);
        }
        _ => {
            for (kind, data) in actions(execute, arguments) {
                policies_of(kind, data, out);
            }
        }
    }
}

/// Jobs that stand or fall together: those of a transaction that is grouped.
pub(super) fn group_of(execute: &str, arguments: &Map<String, Value>) -> Option<Vec<String>> {
    let mode = arguments.get("properties")?.get("completion-mode")?;
    let grouped = execute == "transaction" && mode == "grouped";
    let backups = actions(execute, arguments).filter(|(kind, _)| *kind == "blockdev-backup");
    grouped.then(|| backups.map(|(_, data)| id_of(data).to_owned()).collect())
}
