//! The drivers, and helpers for their options.
//!
//! Rules: an option has the type that QAPI gives it; a driver takes the options it knows out of the map, what
//! remains is refused by whoever opens the node. Error texts are those of QEMU's input visitor.

pub mod copy_before_write;
pub mod copy_on_read;
pub mod file;
pub mod null_co;
pub mod qcow2;
pub mod raw;
pub mod snapshot_access;
pub mod throttle;

use serde_json::{Map, Value};

use crate::driver::{Cx, DriverFacts};
use crate::error::QmpError;
use crate::types::{EdgeId, Perm, Role};

/// All drivers.
pub static ALL: [&DriverFacts; 9] = [
    &file::FILE,
    &file::HOST_DEVICE,
    &null_co::FACTS,
    &raw::FACTS,
    &qcow2::FACTS,
    &copy_on_read::FACTS,
    &copy_before_write::FACTS,
    &snapshot_access::FACTS,
    &throttle::FACTS,
];

/// The driver with this QAPI name.
#[must_use]
pub fn by_name(name: &str) -> Option<&'static DriverFacts> {
    ALL.into_iter().find(|d| d.name == name)
}

/// `child_perm` of drivers without children.
pub(crate) fn no_children(cx: &Cx, _role: Role, _perm: Perm, _shared: Perm) -> (Perm, Perm) {
    unreachable!("{:?} ({}) has no children", cx.node, cx.node.facts.name)
}

/// Attaches the `file` child that an `open` was given.
pub(crate) fn attach_file(
    cx: &Cx,
    file: Option<crate::types::NodeId>,
    role: Role,
) -> Result<EdgeId, QmpError> {
    let file = file.ok_or_else(|| missing("file"))?;
    cx.layer.attach_child(&cx.node, file, "file", role)
}

fn missing(key: &str) -> QmpError {
    QmpError::generic(format!("Parameter '{key}' is missing"))
}

fn wrong_type(key: &str, expected: &str) -> QmpError {
    QmpError::generic(format!(
        "Invalid parameter type for '{key}', expected: {expected}"
    ))
}

/// Takes an optional string.
///
/// # Errors
/// `Invalid parameter type for '…', expected: string`.
pub fn take_str(options: &mut Map<String, Value>, key: &str) -> Result<Option<String>, QmpError> {
    match options.remove(key) {
        None => Ok(None),
        Some(Value::String(s)) => Ok(Some(s)),
        Some(_) => Err(wrong_type(key, "string")),
    }
}

/// Takes a string that has to be there.
///
/// # Errors
/// `Parameter '…' is missing`, or as [`take_str`].
pub fn required_str(options: &mut Map<String, Value>, key: &str) -> Result<String, QmpError> {
    take_str(options, key)?.ok_or_else(|| missing(key))
}

/// Takes an optional bool.
///
/// # Errors
/// `Invalid parameter type for '…', expected: boolean`.
pub fn take_bool(options: &mut Map<String, Value>, key: &str) -> Result<Option<bool>, QmpError> {
    match options.remove(key) {
        None => Ok(None),
        Some(Value::Bool(b)) => Ok(Some(b)),
        Some(_) => Err(wrong_type(key, "boolean")),
    }
}

/// Takes an optional QAPI `int`.
///
/// # Errors
/// `Invalid parameter type for '…', expected: integer`.
pub fn take_int(options: &mut Map<String, Value>, key: &str) -> Result<Option<i64>, QmpError> {
    match options.remove(key) {
        None => Ok(None),
        Some(value) => value.as_i64().map(Some).ok_or_else(|| wrong_type(key, "integer")),
    }
}

/// Takes an optional QAPI `int` that a driver reads as a size in bytes.
///
/// # Errors
/// As [`take_int`]; `Parameter '…' expects a non-negative number below 2^64` below zero.
pub fn take_size(options: &mut Map<String, Value>, key: &str) -> Result<Option<u64>, QmpError> {
    let Some(value) = take_int(options, key)? else {
        return Ok(None);
    };
    let text = || {
        QmpError::generic(format!(
            "Parameter '{key}' expects a non-negative number below 2^64"
        ))
    };
    u64::try_from(value).map(Some).map_err(|_| text())
}

/// Takes an optional QAPI `uint64`; as QEMU's visitor does, negative numbers wrap around.
///
/// # Errors
/// `Parameter '…' expects uint64`.
pub fn take_uint64(options: &mut Map<String, Value>, key: &str) -> Result<Option<u64>, QmpError> {
    let Some(value) = options.remove(key) else {
        return Ok(None);
    };
    let number = value.as_u64().or_else(|| value.as_i64().map(i64::cast_unsigned));
    number
        .map(Some)
        .ok_or_else(|| QmpError::generic(format!("Parameter '{key}' expects uint64")))
}

/// Takes an optional QAPI `uint32`.
///
/// # Errors
/// As [`take_uint64`]; `Parameter '…' expects uint32_t`.
pub fn take_uint32(options: &mut Map<String, Value>, key: &str) -> Result<Option<u32>, QmpError> {
    let number = take_uint64(options, key)?;
    let refusal = |_| QmpError::generic(format!("Parameter '{key}' expects uint32_t"));
    number.map(u32::try_from).transpose().map_err(refusal)
}

/// Takes an optional QAPI enum.
///
/// # Errors
/// As [`take_str`]; `Parameter '…' does not accept value '…'`.
pub fn take_enum(
    options: &mut Map<String, Value>,
    key: &str,
    values: &'static [&'static str],
) -> Result<Option<&'static str>, QmpError> {
    let Some(given) = take_str(options, key)? else {
        return Ok(None);
    };
    let known = values.iter().copied().find(|v| *v == given);
    let text = || QmpError::generic(format!("Parameter '{key}' does not accept value '{given}'"));
    known.map(Some).ok_or_else(text)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn map(value: Value) -> Map<String, Value> {
        match value {
            Value::Object(map) => map,
            other => panic!("{other} is no object"),
        }
    }

    #[test]
    fn names_are_unique_and_found() {
        for facts in ALL {
            assert!(
                std::ptr::eq(by_name(facts.name).expect("listed"), facts),
                "{}",
                facts.name
            );
        }
        assert!(by_name("vmdk").is_none());
    }

    #[test]
    fn option_types_and_texts() {
        let mut o = map(json!({
            "s": 1, "b": "on", "i": "5", "neg": -1, "u": 1.5, "e": "x", "good": 4096, "wrap": -1,
        }));
        let text = |e: QmpError| e.desc;
        let string = take_str(&mut o, "s").map_err(text);
        assert_eq!(
            string,
            Err("Invalid parameter type for 's', expected: string".into())
        );
        let boolean = take_bool(&mut o, "b").map_err(text);
        assert_eq!(
            boolean,
            Err("Invalid parameter type for 'b', expected: boolean".into())
        );
        let integer = take_int(&mut o, "i").map_err(text);
        assert_eq!(
            integer,
            Err("Invalid parameter type for 'i', expected: integer".into())
        );
        let negative = take_size(&mut o, "neg").map_err(text);
        assert_eq!(
            negative,
            Err("Parameter 'neg' expects a non-negative number below 2^64".into())
        );
        let unsigned = take_uint64(&mut o, "u").map_err(text);
        assert_eq!(unsigned, Err("Parameter 'u' expects uint64".into()));
        let choice = take_enum(&mut o, "e", &["a", "b"]).map_err(text);
        assert_eq!(choice, Err("Parameter 'e' does not accept value 'x'".into()));
        assert_eq!(take_size(&mut o, "good"), Ok(Some(4096)));
        assert_eq!(take_uint64(&mut o, "wrap"), Ok(Some(u64::MAX)));
        assert_eq!(
            required_str(&mut o, "gone").map_err(text),
            Err("Parameter 'gone' is missing".into())
        );
        assert!(o.is_empty(), "all were taken: {o:?}");
    }
}
