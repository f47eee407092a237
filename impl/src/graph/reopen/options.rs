//! Options of nodes as reopening sees them: flat (`cache.direct`), without those of children.
//!
//! Rules: what a child is does not count among the options of its parent; a child that was opened inline takes over what its own
//! options leave open. What a node was opened with and inherited is its flags, so only given options are kept.

use serde_json::{Map, Value};

use crate::graph::node::{DetectZeroes, Node};
use crate::types::OpenFlags;

/// Options by flat name.
pub(super) type Flat = Map<String, Value>;

/// Options that may be left out of a reopen whatever the driver (QEMU `bdrv_reset_options_allowed`).
pub(super) const COMMON: [&str; 7] = [
    "node-name",
    "discard",
    "cache.direct",
    "cache.no-flush",
    "read-only",
    "auto-read-only",
    "detect-zeroes",
];

/// The place of an option among others, where several are wrong and one is told: QEMU keeps options in a hash table of 512
/// rows and looks at them row by row.
pub(super) fn place(name: &str) -> u32 {
    let length = u32::try_from(name.len()).unwrap_or(u32::MAX);
    let shifts = (0u32..).map(|i| i * 5 % 24);
    let sum = name
        .bytes()
        .zip(shifts)
        .fold(length.wrapping_mul(0x238f_13af), |sum, (byte, shift)| {
            sum.wrapping_add(u32::from(byte) << shift)
        });
    sum.wrapping_mul(1_103_515_243).wrapping_add(12345) % 512
}

/// Nested objects become dotted names; everything else stays.
pub(super) fn flatten(options: &Map<String, Value>) -> Flat {
    let mut flat = Flat::new();
    flatten_into("", options, &mut flat);
    flat
}

fn flatten_into(prefix: &str, options: &Map<String, Value>, flat: &mut Flat) {
    for (key, value) in options {
        match value {
            Value::Object(inner) => flatten_into(&format!("{prefix}{key}."), inner, flat),
            other => {
                flat.insert(format!("{prefix}{key}"), other.clone());
            }
        }
    }
}

/// Takes out the members of the child `name`, under their own names.
pub(super) fn take_child(options: &mut Flat, name: &str) -> Flat {
    let mut child = Flat::new();
    options.retain(|key, value| match strip(key, name) {
        Some(rest) => {
            child.insert(rest.to_owned(), value.take());
            false
        }
        None => true,
    });
    child
}

fn strip<'a>(key: &'a str, child: &str) -> Option<&'a str> {
    key.strip_prefix(child)?.strip_prefix('.')
}

/// The options that a node was given, without those of its children.
pub(super) fn given(node: &Node) -> Flat {
    let mut options = flatten(&node.options.borrow());
    options.retain(|key, _| is_own(key));
    options
}

/// The options that say what a node is, given or not; its flags only where they were given.
pub(super) fn held(node: &Node) -> Flat {
    let mut options = given(node);
    let mut others = flatten(&node.opened.borrow());
    others.retain(|key, _| is_own(key) && !COMMON[1..].contains(&key.as_str()));
    join(&mut options, &others);
    options
}

/// It says nothing of a child.
fn is_own(key: &str) -> bool {
    ["file", "backing"]
        .iter()
        .all(|child| key != *child && strip(key, child).is_none())
}

/// The options that a node has, given or inherited.
pub(super) fn in_force(node: &Node) -> Flat {
    let mut options = held(node);
    let flags = node.flags.get();
    let discard = if flags.contains(OpenFlags::UNMAP) {
        "unmap"
    } else {
        "ignore"
    };
    for (key, value) in [
        ("cache.direct", Value::from(flags.contains(OpenFlags::NOCACHE))),
        ("cache.no-flush", flags.contains(OpenFlags::NO_FLUSH).into()),
        ("read-only", (!flags.contains(OpenFlags::RDWR)).into()),
        ("auto-read-only", flags.contains(OpenFlags::AUTO_RDONLY).into()),
        ("discard", discard.into()),
    ] {
        options.entry(key).or_insert(value);
    }
    if node.force_share.get() {
        options.entry("force-share").or_insert(true.into());
    }
    options
}

/// What is missing in `options` is taken from `others`.
pub(super) fn join(options: &mut Flat, others: &Flat) {
    for (key, value) in others {
        options.entry(key).or_insert_with(|| value.clone());
    }
}

/// A child that was opened inline takes over what it was not told (QEMU `bdrv_inherited_options`).
pub(super) fn inherit(options: &mut Flat, parent: &Flat, backing: bool) {
    for key in ["cache.direct", "cache.no-flush", "force-share"] {
        if let Some(value) = parent.get(key) {
            options.entry(key).or_insert_with(|| value.clone());
        }
    }
    for (key, of_backing) in [("read-only", true), ("auto-read-only", false)] {
        let value = if backing {
            Some(of_backing.into())
        } else {
            parent.get(key).cloned()
        };
        if let Some(value) = value {
            options.entry(key).or_insert(value);
        }
    }
    options.entry("discard").or_insert("unmap".into());
}

fn is_on(options: &Flat, key: &str) -> bool {
    options.get(key).and_then(Value::as_bool).unwrap_or(false)
}

/// The flags that options make of `flags`. Discards stay as they were where nothing is said of them.
pub(super) fn flags_of(options: &Flat, mut flags: OpenFlags) -> OpenFlags {
    flags.set(OpenFlags::RDWR, !is_on(options, "read-only"));
    flags.set(OpenFlags::AUTO_RDONLY, is_on(options, "auto-read-only"));
    flags.set(OpenFlags::NOCACHE, is_on(options, "cache.direct"));
    flags.set(OpenFlags::NO_FLUSH, is_on(options, "cache.no-flush"));
    if let Some(discard) = options.get("discard").and_then(Value::as_str) {
        flags.set(OpenFlags::UNMAP, discard == "unmap");
    }
    flags
}

/// detect-zeroes; the schema knows no other words.
pub(super) fn detect_zeroes_of(options: &Flat) -> DetectZeroes {
    match options.get("detect-zeroes").and_then(Value::as_str) {
        Some("on") => DetectZeroes::On,
        Some("unmap") => DetectZeroes::Unmap,
        _ => DetectZeroes::Off,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn map(value: Value) -> Map<String, Value> {
        let Value::Object(map) = value else {
            panic!("an object")
        };
        map
    }

    #[test]
    fn flat_names_and_children() {
        let mut flat = flatten(&map(json!({
            "driver": "qcow2", "cache": {"direct": true},
            "file": {"driver": "file", "cache": {"direct": false}}, "filename": "x"
        })));
        assert_eq!(flat["cache.direct"], true);
        let child = take_child(&mut flat, "file");
        assert_eq!(child, map(json!({"driver": "file", "cache.direct": false})));
        assert_eq!(
            flat,
            map(json!({"driver": "qcow2", "cache.direct": true, "filename": "x"}))
        );
    }

    #[test]
    fn what_a_child_takes_over() {
        let parent = map(json!({"read-only": true, "auto-read-only": true, "cache.direct": true, "x": 1}));
        let mut storage = map(json!({"auto-read-only": false}));
        inherit(&mut storage, &parent, false);
        assert_eq!(
            storage,
            map(
                json!({"auto-read-only": false, "cache.direct": true, "read-only": true, "discard": "unmap"})
            )
        );
        let mut backing = Flat::new();
        inherit(&mut backing, &Flat::new(), true);
        let flags = flags_of(&backing, OpenFlags::RDWR | OpenFlags::AUTO_RDONLY);
        assert_eq!(flags, OpenFlags::UNMAP);
    }

    #[test]
    fn options_have_places() {
        let mut names = ["force-share", "driver", "node-name", "size", "read-zeroes"];
        names.sort_by_key(|name| place(name));
        assert_eq!(
            names,
            ["read-zeroes", "node-name", "driver", "size", "force-share"]
        );
    }

    #[test]
    fn discards_stay_as_they_are_unless_told() {
        let old = OpenFlags::UNMAP;
        assert!(flags_of(&Flat::new(), old).contains(OpenFlags::UNMAP));
        let told = flags_of(&map(json!({"discard": "ignore"})), old);
        assert_eq!(told, OpenFlags::RDWR);
    }
}
