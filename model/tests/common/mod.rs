//! What tests of commands share: images, commands that are carried out or refused, arguments with something else in them.
#![allow(dead_code)] // each test program uses a part

use std::rc::Rc;

use blkcheck_model::{Command, FileFacts, FileKind, Qcow2Facts, Refusal, World};
use serde_json::Value;

/// Bytes.
pub(crate) const MIB: u64 = 1 << 20;

/// A file of plain bytes.
pub(crate) fn flat(name: &str, length: u64) -> (Rc<str>, FileFacts) {
    let facts = FileFacts {
        kind: FileKind::Regular,
        length,
        request_alignment: 1,
        qcow2: None,
    };
    (Rc::from(name), facts)
}

/// An image of version 3 without backing file, in a file of 1 MiB.
pub(crate) fn image(name: &str, virtual_size: u64, cluster_size: u64) -> (Rc<str>, FileFacts) {
    let (name, mut facts) = flat(name, MIB);
    facts.qcow2 = Some(Qcow2Facts {
        virtual_size,
        cluster_size,
        version: 3,
        backing: None,
        bitmaps: Vec::new(),
    });
    (name, facts)
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "callers write the arguments in place"
)]
pub(crate) fn run(world: &mut World, name: &str, arguments: Value) -> Result<Value, Refusal> {
    world.execute(&Command::new(name, &arguments))
}

/// The command is carried out.
#[track_caller]
pub(crate) fn ok(world: &mut World, name: &str, arguments: Value) {
    run(world, name, arguments).unwrap();
}

/// The command is refused in these words, and changes nothing but what clients have seen: names that were made up, jobs that began.
#[track_caller]
pub(crate) fn refused(world: &World, name: &str, arguments: Value, desc: &str) {
    let mut copy = world.clone();
    assert_eq!(run(&mut copy, name, arguments).unwrap_err().desc, desc);
    assert_eq!(copy.graph, world.graph);
    assert_eq!(
        (copy.jobs, copy.exports),
        (world.jobs.clone(), world.exports.clone())
    );
    assert_eq!(copy.files, world.files);
}

/// The arguments with these in their place; null: without.
pub(crate) fn with(mut all: Value, more: &Value) -> Value {
    let object = all.as_object_mut().expect("an object");
    for (key, value) in more.as_object().expect("an object") {
        if value.is_null() {
            object.remove(key);
        } else {
            object.insert(key.clone(), value.clone());
        }
    }
    all
}
