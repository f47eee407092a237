//! Commands of which the model does not know what they do, because of something that it does not follow. They are left out, and counted.
//!
//! * Bitmaps of which the daemon has another length than the model (`filter-keeps-length`).
//! * A qcow2 node over a qcow2 node that shows the bytes of an image through its backing file: whether that is an image, and of
//!   what, depends on which clusters the upper one holds. The model has no content.
//! * A qcow2 node over a snapshot, for the same reason.
//! * A reopen that gives a qcow2 node with stored bitmaps the file of another image: it goes on with the tables of the old one, and
//!   what it takes for bitmaps in the new one depends on which bytes are there.

use blkcheck_model::{Command, Driver, Node, NodeId, World};
use serde_json::{Map, Value};

use super::lockstep::Run;

impl Run<'_> {
    /// The command is left out.
    pub(super) fn is_unsettled(&self, execute: &str, arguments: &Map<String, Value>) -> bool {
        is_about_another_length(&self.world, execute, arguments)
            || (execute == "blockdev-add" && opens_an_image_in_an_image(&self.world, arguments))
            || takes_bitmaps_elsewhere(&self.world, execute, arguments)
    }
}

/// An accepted reopen of a qcow2 node with stored bitmaps stands on another image afterwards.
fn takes_bitmaps_elsewhere(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    let stores =
        |node: &Node| node.driver == Driver::Qcow2 && node.bitmaps.iter().any(|bitmap| bitmap.persistent);
    let mut nodes = world.graph.nodes().filter(|(_, node)| stores(node)).peekable();
    if execute != "blockdev-reopen" || nodes.peek().is_none() {
        return false;
    }
    let mut after = world.clone();
    let command = Value::Object(arguments.clone());
    if after.execute(&Command::new(execute, &command)).is_err() {
        return false;
    }
    nodes.any(|(id, node)| {
        let now = after.graph.find(&node.name).and_then(|now| after.image_file(now));
        now.is_some_and(|now| world.image_file(id).is_some_and(|image| image != now))
    })
}

fn is_about_another_length(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    if execute != "transaction" && !execute.starts_with("block-dirty-bitmap-") {
        return false;
    }
    let followed = |node: &Node| node.bitmaps.iter().any(|bitmap| bitmap.followed);
    let nodes = world.graph.nodes().filter(|(_, node)| followed(node));
    let mut names = nodes.map(|(_, node)| &node.name).peekable();
    if names.peek().is_none() {
        return false;
    }
    let text = Value::Object(arguments.clone()).to_string();
    names.any(|name| text.contains(&format!("\"{name}\"")))
}

/// Some qcow2 node that is described stands on an overlay of plain bytes.
fn opens_an_image_in_an_image(world: &World, options: &Map<String, Value>) -> bool {
    let is_format = driver(options) == Some("qcow2");
    let here = || {
        options
            .get("file")
            .is_some_and(|file| shows_bytes(world, file, true))
    };
    let mut inner = options.values().filter_map(Value::as_object);
    (is_format && here()) || inner.any(|inner| opens_an_image_in_an_image(world, inner))
}

/// A node that is named or described shows the bytes of an image; `below`: only through a backing file.
fn shows_bytes(world: &World, node: &Value, below: bool) -> bool {
    let options = match node {
        Value::String(name) => {
            return world
                .graph
                .find(name)
                .is_some_and(|id| node_shows_bytes(world, id, below));
        }
        Value::Object(options) => options,
        _ => return false,
    };
    let child = |key: &str, below| {
        let child = options.get(key);
        child.is_some_and(|child| shows_bytes(world, child, below))
    };
    let file = || options.get("filename").and_then(Value::as_str);
    match driver(options) {
        Some("file" | "host_device") => !below && file().is_some_and(|name| is_image(world, name)),
        Some("snapshot-access") => true,
        Some("raw" | "copy-on-read" | "throttle" | "copy-before-write") => child("file", below),
        // Left out, the header says what is below.
        Some("qcow2") if options.get("backing").is_none() => names_backing(world, options),
        Some("qcow2") => child("backing", false),
        _ => false,
    }
}

fn node_shows_bytes(world: &World, id: NodeId, below: bool) -> bool {
    let graph = &world.graph;
    match graph.node(id).driver {
        Driver::File | Driver::HostDevice => {
            let name = graph.node(id).filename.as_ref();
            !below && name.is_some_and(|name| is_image(world, name))
        }
        Driver::NullCo => false,
        Driver::SnapshotAccess => true,
        Driver::Raw | Driver::CopyOnRead | Driver::Throttle | Driver::CopyBeforeWrite => graph
            .primary_child(id)
            .is_some_and(|child| node_shows_bytes(world, child, below)),
        Driver::Qcow2 => graph
            .cow_child(id)
            .is_some_and(|child| node_shows_bytes(world, child, false)),
    }
}

fn is_image(world: &World, file: &str) -> bool {
    world.files.get(file).is_some_and(|facts| facts.qcow2.is_some())
}

/// Some header in what is described names a backing file, or may.
fn names_backing(world: &World, options: &Map<String, Value>) -> bool {
    match options.get("file") {
        Some(Value::Object(file)) => names_backing(world, file),
        Some(_) => true,
        None => {
            let name = options.get("filename").and_then(Value::as_str);
            let header = name.and_then(|name| world.files.get(name)?.qcow2.as_ref());
            header.is_some_and(|header| header.backing.is_some())
        }
    }
}

fn driver(options: &Map<String, Value>) -> Option<&str> {
    options.get("driver").and_then(Value::as_str)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::oracle::tests::scenario_of;

    #[test]
    fn only_an_overlay_of_the_bytes_of_an_image_is_unsettled() {
        let scenario = scenario_of(
            r#"{"version":1,"grain":512,"images":[
            {"file":"i","format":"qcow2","size":4096},
            {"file":"r","format":"raw","size":4096},
            {"file":"o","format":"qcow2","size":4096,"backing-file":"i","backing-format":"raw"}],"steps":[]}"#,
        );
        let mut world = crate::follow::world_of(&scenario);
        let add = json!({"driver": "file", "node-name": "bytes", "filename": "i", "read-only": true});
        let added = world.execute(&blkcheck_model::Command::new("blockdev-add", &add));
        assert!(added.is_ok(), "{added:?}");
        let file = |name: &str| json!({"driver": "file", "filename": name});
        let unsettled = |lower: Value| {
            let options = json!({"driver": "raw", "file": {"driver": "qcow2", "file": lower}});
            opens_an_image_in_an_image(&world, options.as_object().expect("written as one"))
        };
        let over = |backing: Value| json!({"driver": "qcow2", "file": file("i"), "backing": backing});
        assert!(unsettled(over(file("i"))));
        assert!(unsettled(over(json!("bytes"))));
        assert!(unsettled(
            json!({"driver": "throttle", "file": over(json!("bytes"))})
        ));
        assert!(unsettled(json!({"driver": "qcow2", "file": file("o")})));
        assert!(!unsettled(over(Value::Null)));
        assert!(!unsettled(over(file("r"))), "no image");
        assert!(!unsettled(over(over(Value::Null))));
        assert!(!unsettled(json!({"driver": "qcow2", "file": file("i")})));
        assert!(!unsettled(file("i")), "an image in its file");
        assert!(!unsettled(json!("bytes")));
    }

    #[test]
    fn only_stored_bitmaps_on_another_image_are_unsettled() {
        let scenario = scenario_of(
            r#"{"version":1,"grain":512,"images":[
            {"file":"i","format":"qcow2","size":4096},{"file":"o","format":"qcow2","size":4096}],"steps":[]}"#,
        );
        let world = |persistent: bool| {
            let mut world = crate::follow::world_of(&scenario);
            let file =
                |node: &str, name: &str| json!({"driver": "file", "node-name": node, "filename": name});
            let mut run = |execute: &str, arguments: &Value| {
                let done = world.execute(&Command::new(execute, arguments));
                assert!(done.is_ok(), "{done:?}");
            };
            run(
                "blockdev-add",
                &json!({"driver": "qcow2", "node-name": "n", "file": file("fi", "i")}),
            );
            run("blockdev-add", &file("fo", "o"));
            run(
                "block-dirty-bitmap-add",
                &json!({"node": "n", "name": "b", "persistent": persistent}),
            );
            world
        };
        let reopen = |world: &World, execute: &str, file: &str| {
            let options = json!({"options": [{"driver": "qcow2", "node-name": "n", "file": file}]});
            takes_bitmaps_elsewhere(world, execute, options.as_object().expect("written as one"))
        };
        assert!(reopen(&world(true), "blockdev-reopen", "fo"));
        assert!(!reopen(&world(true), "blockdev-reopen", "fi"), "its own file");
        assert!(!reopen(&world(true), "blockdev-reopen", "nowhere"), "refused");
        assert!(!reopen(&world(false), "blockdev-reopen", "fo"), "not stored");
        assert!(!reopen(&world(true), "blockdev-add", "fo"), "another command");
    }
}
