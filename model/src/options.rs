//! Options of one node, flat: `read-only`, `cache.direct`, `file.filename`.
//!
//! Rules: values are kept as they were given; a default that a node takes over from the one above is a word (`on`,
//! `off`, `unmap`). Options of children are not among them once the children are open. Several options that are wrong
//! are looked at in one fixed order ([`NodeOptions::in_order`]), that of QEMU's hash of their names.
//! Not here: what an option means to a driver.

use std::collections::BTreeMap;
use std::rc::Rc;

use serde_json::{Map, Value};

use crate::perm::Role;

/// Taken over from the node above, whatever the child is to it.
const FOR_EVERY_CHILD: [&str; 3] = ["cache.direct", "cache.no-flush", "force-share"];
/// Taken over as well, but not by backing files.
const FOR_STORAGE: [&str; 2] = ["read-only", "auto-read-only"];

/// Options of one node. Cheap to clone.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct NodeOptions(Rc<BTreeMap<Rc<str>, Value>>);

impl NodeOptions {
    /// Everything in the object, nested ones too, with their path before the name.
    #[must_use]
    pub fn flatten(object: &Map<String, Value>) -> NodeOptions {
        let mut flat = BTreeMap::new();
        flatten_into("", object, &mut flat);
        NodeOptions(Rc::new(flat))
    }

    /// The option's value.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&Value> {
        self.0.get(name)
    }

    /// It is there.
    #[must_use]
    pub fn has(&self, name: &str) -> bool {
        self.0.contains_key(name)
    }

    /// A switch; off when it is not there.
    #[must_use]
    pub fn is_on(&self, name: &str) -> bool {
        self.get(name)
            .is_some_and(|v| *v == Value::Bool(true) || v == "on")
    }

    /// Discards are passed on to what is below.
    #[must_use]
    pub fn unmaps(&self) -> bool {
        self.get("discard").is_some_and(|v| v == "unmap")
    }

    /// Sets an option.
    pub fn set(&mut self, name: &str, value: Value) {
        Rc::make_mut(&mut self.0).insert(Rc::from(name), value);
    }

    /// Sets an option that is not there.
    pub fn set_default(&mut self, name: &str, value: Value) {
        if !self.has(name) {
            self.set(name, value);
        }
    }

    /// Forgets an option.
    pub fn remove(&mut self, name: &str) {
        if self.has(name) {
            Rc::make_mut(&mut self.0).remove(name);
        }
    }

    /// Takes over what is in `other` and not here.
    pub fn join(&mut self, other: &NodeOptions) {
        for (name, value) in &*other.0 {
            self.set_default(name, value.clone());
        }
    }

    /// Takes out what belongs to this child, without the child's name.
    pub fn take_child(&mut self, child: &str) -> NodeOptions {
        let mut taken = BTreeMap::new();
        let below = |name: &str| name.strip_prefix(child)?.strip_prefix('.').map(Rc::from);
        if self.0.keys().any(|name| below(name).is_some()) {
            Rc::make_mut(&mut self.0).retain(|name, value| match below(name) {
                Some(name) => {
                    taken.insert(name, value.clone());
                    false
                }
                None => true,
            });
        }
        NodeOptions(Rc::new(taken))
    }

    /// Takes over what a child takes over from the node above.
    pub fn inherit(&mut self, role: Role, parent: &NodeOptions) {
        let copy = |own: &mut NodeOptions, names: &[&str]| {
            for name in names {
                if let Some(value) = parent.get(name) {
                    own.set_default(name, value.clone());
                }
            }
        };
        copy(self, &FOR_EVERY_CHILD);
        if role.contains(Role::COW) {
            self.set_default("read-only", Value::from("on"));
            self.set_default("auto-read-only", Value::from("off"));
        } else {
            copy(self, &FOR_STORAGE);
        }
        self.set_default("discard", Value::from("unmap"));
    }

    /// The options in the order in which they are looked at.
    #[must_use]
    pub fn in_order(&self) -> Vec<(&str, &Value)> {
        let mut all: Vec<(&str, &Value)> = self.0.iter().map(|(name, value)| (&**name, value)).collect();
        // Of two in one row that of the node itself is the shorter one.
        all.sort_by_key(|(name, _)| (row(name), name.len()));
        all
    }
}

fn flatten_into(path: &str, object: &Map<String, Value>, flat: &mut BTreeMap<Rc<str>, Value>) {
    for (name, value) in object {
        match value {
            Value::Object(inner) => flatten_into(&format!("{path}{name}."), inner, flat),
            value => {
                flat.insert(Rc::from(format!("{path}{name}")), value.clone());
            }
        }
    }
}

/// The row of a name in QEMU's hash table of options.
fn row(name: &str) -> u32 {
    let bytes = name.bytes().zip((0u32..).map(|at| 5 * at % 24));
    let length = u32::try_from(name.len()).expect("a short name");
    let sum = bytes.fold(length.wrapping_mul(0x238f_13af), |sum, (byte, shift)| {
        sum.wrapping_add(u32::from(byte) << shift)
    });
    sum.wrapping_mul(1_103_515_243).wrapping_add(12345) % ROWS
}

/// Rows of that table.
const ROWS: u32 = 512;

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn options(value: Value) -> NodeOptions {
        let Value::Object(object) = value else {
            panic!("an object")
        };
        NodeOptions::flatten(&object)
    }

    #[test]
    fn a_childs_options_come_out_under_their_own_names() {
        let mut parent =
            options(json!({"driver": "qcow2", "file": {"driver": "file", "cache": {"direct": true}}}));
        assert!(parent.has("file.cache.direct"));
        let child = parent.take_child("file");
        assert_eq!(
            child,
            options(json!({"driver": "file", "cache": {"direct": true}}))
        );
        assert_eq!(parent, options(json!({"driver": "qcow2"})));
        assert_eq!(parent.take_child("backing"), NodeOptions::default());
    }

    #[test]
    fn a_backing_file_is_read_only_whatever_the_overlay_is() {
        let parent = options(json!({"read-only": false, "force-share": true}));
        let mut storage = NodeOptions::default();
        storage.inherit(Role::IMAGE, &parent);
        assert_eq!(
            storage,
            options(json!({"read-only": false, "force-share": true, "discard": "unmap"}))
        );
        let mut backing = options(json!({"discard": "ignore"}));
        backing.inherit(Role::COW, &parent);
        assert!(backing.is_on("read-only") && backing.is_on("force-share") && !backing.unmaps());
    }

    #[test]
    fn several_wrong_options_are_told_in_one_order() {
        let all = options(json!({"zz": 1, "node-name": "n", "force-share": true, "driver": "raw"}));
        let names: Vec<&str> = all.in_order().into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["node-name", "driver", "zz", "force-share"]);
        // As the daemon looks at them.
        let seen = [
            "cache.no-flush",
            "locking",
            "backing.driver",
            "backing.discard",
            "throttle-group",
        ];
        let rows = seen.map(row);
        assert!(rows.is_sorted() && rows[0] < rows[1], "{rows:?}");
    }
}
