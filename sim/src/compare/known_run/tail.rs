//! Reads of the last, partial sector of what the gate serves, which replies simply.
//!
//! Rules: as in [`super`].

use serde_json::Value;

use super::Found;
use crate::compare::known::odd_raw_files;
use crate::oracle::OracleName;

/// Nothing can happen any more, and a raw image that ends within a sector is open, or is being opened: also the header of something
/// that is none is read in whole sectors.
pub(super) fn hangs(found: &Found<'_>) -> bool {
    let open = |file: &str| {
        let mut nodes = found.world.graph.nodes();
        nodes.any(|(_, node)| node.filename.as_deref() == Some(file))
            || found
                .unanswered()
                .any(|(_, arguments)| arguments.values().any(|value| names(value, file)))
    };
    found.says(&[OracleName::Liveness], "nothing can happen any more")
        && odd_raw_files(found.scenario).any(open)
}

/// Whether options name a file, for themselves or for a child.
fn names(options: &Value, file: &str) -> bool {
    match options {
        Value::Object(options) => options.iter().any(|(key, value)| match value {
            Value::String(text) => key == "filename" && text == file,
            _ => names(value, file),
        }),
        _ => false,
    }
}
