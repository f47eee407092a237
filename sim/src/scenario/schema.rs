//! The JSON Schema of scenario files (draft 2020-12), as `blkcheck schema` prints it.
//!
//! Rules: a file that [`super::parse`] takes is valid here; what a schema cannot say (multiples of the grain, sizes that
//! depend on each other) only `parse` checks.

use serde_json::{Value, json};

use super::VERSION;
use super::validate::{MAX_FREE, MAX_IMAGES, MAX_REQUEST, MAX_SIZE, MAX_STEPS};
use crate::finish::STATUSES;

/// The schema.
#[must_use]
pub fn schema() -> Value {
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "blkcheck scenario",
        "description": "Images to create, then steps by named actors, then the recorded choices.",
        "type": "object",
        "additionalProperties": false,
        "required": ["version", "grain", "images", "steps"],
        "properties": {
            "version": {"const": VERSION},
            "title": {"type": "string", "description": "For people."},
            "seed": {"type": "integer", "minimum": 0, "description": "The seed that generated it."},
            "grain": {
                "enum": [16, 32, 64, 128, 256, 512, 1024, 2048, 4096],
                "description": "Unit of guest requests, bytes: every guest offset and length is a multiple of it."
            },
            "disk": {"$ref": "#/$defs/disk"},
            "images": {"type": "array", "maxItems": MAX_IMAGES, "items": {"$ref": "#/$defs/image"}},
            "steps": {"type": "array", "maxItems": MAX_STEPS, "items": {"$ref": "#/$defs/step"}},
            "beyond-model": {
                "type": "boolean", "default": false,
                "description": "Steps may be commands that the model does not know: compare judges what guests see."
            },
            "choices": {
                "type": "array",
                "items": {"type": "integer", "minimum": 0, "maximum": u32::MAX},
                "description": "Recorded choices; missing ones are 0."
            },
            "steer": {
                "type": "boolean",
                "description": "Pass over, or put off, steps that would meet a known defect of the subject."
            },
            "expect": {"type": "string", "description": "The oracle that replay finds failing; absent for a pass."}
        },
        "$defs": defs()
    })
}

fn defs() -> Value {
    let statuses: Vec<&str> = STATUSES.iter().map(|(_, name)| *name).collect();
    json!({
        "disk": {
            "description": "The storage under the images.",
            "type": "object",
            "additionalProperties": false,
            "properties": {
                "alignment": {"enum": [1, 512, 4096]},
                "job-parallelism": {"type": "integer", "minimum": 1, "maximum": 64},
                "unmap": {"type": "boolean"},
                "faults": {"$ref": "#/$defs/faults"},
                "power-cut": {
                    "description": "The power fails when so many storage requests have ended after the setup; what of the changes survives that no flush had made durable is a choice. Absent: it does not.",
                    "type": "integer", "minimum": 0, "maximum": u32::MAX
                },
                "cut-at-flush": {
                    "type": "boolean", "default": false,
                    "description": "`power-cut` counts flushes only: the power fails instead of the end of one."
                }
            }
        },
        "faults": {
            "description": "Which storage requests may fail; whether one does is a choice. Absent: none.",
            "type": "object",
            "additionalProperties": false,
            "properties": {
                "one-in": {
                    "type": "integer", "minimum": 1, "maximum": u32::MAX, "default": 1,
                    "description": "About one in so many of them does, where choices are drawn."
                },
                "from": {
                    "type": "integer", "minimum": 0, "maximum": u32::MAX, "default": 0,
                    "description": "So many of the requests that match are spared first."
                },
                "until": {
                    "type": "integer", "minimum": 0, "maximum": u32::MAX,
                    "description": "From the one with this number on they are spared again; absent: never."
                },
                "image": {
                    "type": "integer", "minimum": 0, "maximum": MAX_IMAGES - 1,
                    "description": "Only on this image, by its place in `images`."
                },
                "reads": {"type": "boolean", "default": true},
                "writes": {"type": "boolean", "default": true, "description": "Whatever changes a file."},
                "flushes": {"type": "boolean", "default": true},
                "setup": {"type": "boolean", "default": false, "description": "Also during steps of `setup`."}
            }
        },
        "image": {
            "type": "object",
            "additionalProperties": false,
            "required": ["file", "format", "size"],
            "properties": {
                "file": {"type": "string", "minLength": 1, "description": "As `filename` in blockdev-add."},
                "format": {"enum": ["raw", "qcow2"]},
                "size": {"type": "integer", "minimum": 0, "maximum": MAX_SIZE, "description": "Virtual, bytes."},
                "cluster-size": {"type": "integer", "minimum": 512, "maximum": 2 << 20, "default": 65536},
                "compat": {"enum": [2, 3], "default": 3},
                "refcount-bits": {"enum": [1, 2, 4, 8, 16, 32, 64], "default": 16},
                "backing-file": {"type": "string", "minLength": 1},
                "backing-format": {"type": "string", "maxLength": 15},
                "fill": {"type": "array", "items": {"$ref": "#/$defs/fill"}, "description": "Later over earlier."},
                "free": {
                    "type": "integer", "minimum": 0, "maximum": MAX_FREE, "default": 0,
                    "description": "qcow2: host clusters that nothing refers to, which hold garbage."
                }
            }
        },
        "fill": {
            "type": "object",
            "additionalProperties": false,
            "required": ["offset", "length", "stored"],
            "properties": {
                "offset": {"type": "integer", "minimum": 0},
                "length": {"type": "integer", "minimum": 1},
                "stored": {"enum": ["data", "zero", "zero-allocated", "compressed"]}
            }
        },
        "range": {
            "type": "object",
            "additionalProperties": false,
            "required": ["offset", "length"],
            "properties": {
                "offset": {"type": "integer", "minimum": 0},
                "length": {"type": "integer", "minimum": 0, "maximum": MAX_REQUEST}
            }
        },
        "request": {"oneOf": requests()},
        "step": {"oneOf": [
            step(json!({"execute": {"type": "string"}, "arguments": {"type": "object"}}), &["execute"]),
            step(json!({"export": {"type": "string"}, "do": {"$ref": "#/$defs/request"}}), &["export", "do"]),
            step(json!({"drained-begin": {"type": "string"}}), &["drained-begin"]),
            step(json!({"drained-end": {"type": "string"}}), &["drained-end"]),
            step(json!({"wait-job": {
                "type": "object",
                "additionalProperties": false,
                "required": ["id", "status"],
                "properties": {
                    "id": {"type": "string"},
                    "status": {"enum": statuses},
                    "offset": {"type": "integer", "minimum": 0}
                }
            }}), &["wait-job"]),
            step(json!({"settle": {"type": "object", "maxProperties": 0}}), &["settle"])
        ]}
    })
}

/// A step with these further members.
fn step(mut properties: Value, required: &[&str]) -> Value {
    let members = properties.as_object_mut().expect("an object");
    members.insert(
        "actor".into(),
        json!({"type": "string", "minLength": 1, "maxLength": 64}),
    );
    members.insert("wait".into(), json!({"type": "boolean", "default": true}));
    let required: Vec<&str> = ["actor"].iter().chain(required).copied().collect();
    json!({"type": "object", "additionalProperties": false, "required": required, "properties": properties})
}

fn requests() -> Vec<Value> {
    let names = [
        "read",
        "write",
        "write-fua",
        "write-zeroes",
        "write-zeroes-unmap",
        "discard",
        "block-status",
    ];
    let with_range = names.iter().map(|name| {
        let properties = json!({*name: {"$ref": "#/$defs/range"}});
        json!({"type": "object", "additionalProperties": false, "required": [name], "properties": properties})
    });
    with_range.chain([json!({"const": "flush"})]).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn valid(text: &str) -> bool {
        let value: Value = serde_json::from_str(text).expect("JSON");
        jsonschema::validator_for(&schema())
            .expect("a schema")
            .is_valid(&value)
    }

    fn with_step(step: &str) -> String {
        format!(r#"{{"version":1,"grain":64,"images":[],"steps":[{step}]}}"#)
    }

    #[test]
    fn the_schema_is_one_and_agrees_with_the_parser() {
        assert!(jsonschema::meta::is_valid(&schema()));
        let steps = [
            (r#"{"actor":"m","execute":"query-jobs"}"#, true),
            (
                r#"{"actor":"m","execute":"x","arguments":{"a":[1]},"wait":false}"#,
                true,
            ),
            (r#"{"actor":"g","export":"e","do":"flush"}"#, true),
            (
                r#"{"actor":"g","export":"e","do":{"write-fua":{"offset":0,"length":64}}}"#,
                true,
            ),
            (
                r#"{"actor":"g","export":"e","do":{"block-status":{"offset":0,"length":64}}}"#,
                true,
            ),
            (r#"{"actor":"d","drained-begin":"n"}"#, true),
            (r#"{"actor":"d","drained-end":"n"}"#, true),
            (r#"{"actor":"m","wait-job":{"id":"j","status":"ready"}}"#, true),
            (
                r#"{"actor":"m","wait-job":{"id":"j","status":"running","offset":512}}"#,
                true,
            ),
            (
                r#"{"actor":"m","wait-job":{"id":"j","status":"running","offset":-1}}"#,
                false,
            ),
            (r#"{"actor":"g","settle":{}}"#, true),
            (r#"{"actor":"g","settle":{"a":1}}"#, false),
            (r#"{"actor":"m","wait-job":{"id":"j","status":"done"}}"#, false),
            (r#"{"actor":"g","export":"e"}"#, false),
            (r#"{"actor":"g","export":"e","do":"read"}"#, false),
            (r#"{"actor":"g","export":"e","do":{"read":{"offset":0}}}"#, false),
            (r#"{"actor":"m","execute":"x","drained-end":"n"}"#, false),
            (r#"{"execute":"x"}"#, false),
            (r#"{"actor":"m","execute":"x","arguments":[]}"#, false),
            (r#"{"actor":"m","execute":"x","wait":1}"#, false),
        ];
        for (step, expected) in steps {
            let text = with_step(step);
            assert_eq!(valid(&text), expected, "schema: {step}");
            assert_eq!(
                super::super::parse::parse("x", text.as_bytes()).is_ok(),
                expected,
                "parser: {step}"
            );
        }
    }

    /// What the generator makes is a valid file, for the schema and for the parser, and comes back as it was.
    #[test]
    fn generated_scenarios_are_valid_files() {
        use crate::generate::{Profile, Reach, generate};
        let validator = jsonschema::validator_for(&schema()).expect("a schema");
        for seed in 0..200 {
            let scenario = generate(seed, Profile::Mixed, Reach::all());
            let text = serde_json::to_string(&scenario).expect("JSON");
            let value: Value = serde_json::from_str(&text).expect("JSON");
            if let Err(error) = validator.validate(&value) {
                panic!("seed {seed}: {} at {}", error, error.instance_path());
            }
            assert_eq!(
                super::super::parse::parse("x", text.as_bytes()).as_ref(),
                Ok(&scenario),
                "seed {seed}"
            );
        }
    }
}
