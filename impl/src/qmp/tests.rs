//! Argument errors and small commands; texts taken from qemu-storage-daemon 10.0.2.

use serde_json::{Value, json};

use crate::jobs::testing::{KIB, MIB, World};

#[test]
fn malformed_arguments() {
    let world = World::new(1);
    world.chain();
    for (command, arguments, text) in [
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "n", "foo": 1}),
            "Parameter 'foo' is unexpected",
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co"}),
            "'node-name' must be specified for the root node",
        ),
        (
            "blockdev-add",
            json!({"driver": "bogus", "node-name": "x"}),
            "Parameter 'driver' does not accept value 'bogus'",
        ),
        (
            "blockdev-add",
            json!({"node-name": "x"}),
            "Parameter 'driver' is missing",
        ),
        (
            "blockdev-add",
            json!({"driver": 5}),
            "Invalid parameter type for 'driver', expected: string",
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "x", "size": "7"}),
            "Invalid parameter type for 'size', expected: integer",
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "x", "read-only": "yes"}),
            "Invalid parameter type for 'read-only', expected: boolean",
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "x", "discard": "bad"}),
            "Parameter 'discard' does not accept value 'bad'",
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "x", "cache": {"directx": true}}),
            "Parameter 'cache.directx' is unexpected",
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "x", "cache": null}),
            "Invalid parameter type for 'cache', expected: object",
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "x"}),
            "Parameter 'file' is missing",
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "x", "file": null}),
            "Invalid parameter type for 'file', expected: BlockdevRef",
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "x", "file": "top", "backing": true}),
            "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "x", "file": {"driver": "file", "filename": "top", "bad": 1}}),
            "Parameter 'file.bad' is unexpected",
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "x", "file": {"driver": "file"}}),
            "Parameter 'file.filename' is missing",
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "x", "file": "top", "backing": "mid"}),
            "Parameter 'backing' is unexpected",
        ),
        ("block-stream", json!({}), "Parameter 'device' is missing"),
        (
            "block-stream",
            json!({"device": 5}),
            "Invalid parameter type for 'device', expected: string",
        ),
        (
            "block-stream",
            json!({"device": "top", "speed": 1.5}),
            "Invalid parameter type for 'speed', expected: integer",
        ),
        (
            "block-stream",
            json!({"device": "top", "on-error": "x"}),
            "Parameter 'on-error' does not accept value 'x'",
        ),
        (
            "block-stream",
            json!({"device": "top", "auto-finalize": 1}),
            "Invalid parameter type for 'auto-finalize', expected: boolean",
        ),
        (
            "block-stream",
            json!({"device": "top", "unk": 1}),
            "Parameter 'unk' is unexpected",
        ),
        ("block-stream", json!({"device": "top"}), "Invalid job ID ''"),
        // What is wrong with an item comes before what the next one is, and that before members that nobody knows.
        (
            "blockdev-reopen",
            json!({"options": [{"driver": "qcow2"}, 1], "x": 1}),
            "Parameter 'options[0].file' is missing",
        ),
        (
            "transaction",
            json!({"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "a"}}, 1]}),
            "Parameter 'actions[0].data.name' is missing",
        ),
        (
            "block-dirty-bitmap-merge",
            json!({"node": "a", "target": "b", "bitmaps": [{"node": "a"}, 1]}),
            "Parameter 'bitmaps[0].name' is missing",
        ),
        ("query-jobs", json!({"x": 1}), "Parameter 'x' is unexpected"),
        ("job-pause", json!({}), "Parameter 'id' is missing"),
        ("job-pause", json!({"id": "zz"}), "Job not found"),
        (
            "block-job-pause",
            json!({"device": "zz"}),
            "Block job 'zz' not found",
        ),
        ("nocmd", json!({}), "The command nocmd has not been found"),
        (
            "block-export-add",
            json!({"type": "nbdx"}),
            "Parameter 'type' does not accept value 'nbdx'",
        ),
        (
            "block-export-del",
            json!({"id": "e", "mode": "x"}),
            "Parameter 'mode' does not accept value 'x'",
        ),
    ] {
        world.refused(command, arguments, text);
    }
    let class = |command: &str, arguments: Value| world.try_qmp(command, arguments).unwrap_err().class.name();
    assert_eq!(class("nocmd", json!({})), "CommandNotFound");
    assert_eq!(
        class("block-job-pause", json!({"device": "zz"})),
        "DeviceNotActive"
    );
    assert_eq!(class("job-pause", json!({"id": "zz"})), "GenericError");
}

#[test]
fn opening_refusals_leave_nothing() {
    let world = World::new(1);
    world.chain();
    world.qcow2("lost", MIB, Some(("nowhere", "qcow2")));
    world.qcow2("ring", MIB, Some(("ring", "qcow2")));
    world.memory.create("plain", MIB);
    let qcow2 = |file: &str| json!({"driver": "qcow2", "node-name": "x", "file": {"driver": "file", "filename": file}});
    let with = |mut options: Value, name: &str, value: Value| {
        options[name] = value;
        options
    };
    for (options, text) in [
        (
            with(qcow2("top"), "file", json!("no")),
            "Cannot find device='no' nor node-name='no'",
        ),
        (
            qcow2("nofile"),
            "Could not open 'nofile': No such file or directory",
        ),
        (qcow2("plain"), "Image is not in qcow2 format"),
        (
            with(qcow2("top"), "backing", json!("no")),
            "Could not open backing file: Cannot find device='no' nor node-name='no'",
        ),
        (
            qcow2("lost"),
            "Could not open backing file: Could not open 'nowhere': No such file or directory",
        ),
        (
            qcow2("ring"),
            "Could not open backing file: Image 'ring' is in its own backing chain",
        ),
        (
            json!({"driver": "null-co", "node-name": "1x"}),
            "Invalid node-name: '1x'",
        ),
        (
            json!({"driver": "null-co", "node-name": "top"}),
            "Duplicate nodes with node-name='top'",
        ),
        (
            json!({"driver": "null-co", "node-name": "a234567890123456789012345678901x"}),
            "Node name too long",
        ),
        (
            json!({"driver": "null-co", "node-name": "x", "force-share": true}),
            "force-share=on can only be used with read-only images",
        ),
        (
            json!({"driver": "null-co", "node-name": "x", "detect-zeroes": "unmap"}),
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
        (
            json!({"driver": "raw", "node-name": "x", "file": {"driver": "null-co", "node-name": "x"}}),
            "Duplicate nodes with node-name='x'",
        ),
        (
            json!({"driver": "copy-on-read", "node-name": "x", "file": "top", "bottom": "no"}),
            "Bottom node 'no' not found",
        ),
    ] {
        world.refused("blockdev-add", options, text);
    }
    for (name, text) in [
        ("no", "Failed to find node with node-name='no'"),
        ("mid", "Node 'mid' is busy: node is used as backing hd of 'top'"),
    ] {
        world.refused("blockdev-del", json!({"node-name": name}), text);
    }
}

#[test]
fn a_chain_opens_by_its_headers_read_only_below() {
    let world = World::new(1);
    world.qcow2("dir/base", MIB, None);
    world.qcow2("dir/mid", MIB, Some(("base", "qcow2")));
    world.qcow2("dir/top", MIB, Some(("mid", "qcow2")));
    world.open("top", "dir/top", json!({}));
    let nodes = world.qmp("query-named-block-nodes", json!({}));
    let nodes = nodes.as_array().expect("a list");
    let row = |node: &Value| {
        (
            node["file"].clone(),
            node["drv"].clone(),
            node["ro"].clone(),
            node["backing_file_depth"].clone(),
        )
    };
    let rows: Vec<_> = nodes.iter().map(row).collect();
    // Newest first; each file before the image that uses it.
    assert_eq!(
        rows,
        [
            (json!("dir/base"), json!("qcow2"), json!(true), json!(0)),
            (json!("dir/base"), json!("file"), json!(true), json!(0)),
            (json!("dir/mid"), json!("qcow2"), json!(true), json!(1)),
            (json!("dir/mid"), json!("file"), json!(true), json!(0)),
            (json!("dir/top"), json!("qcow2"), json!(false), json!(2)),
            (json!("dir/top"), json!("file"), json!(false), json!(0)),
        ]
    );
    world.qmp("blockdev-del", json!({"node-name": "top"}));
    assert_eq!(world.qmp("query-named-block-nodes", json!({})), json!([]));
}

#[test]
fn exports() {
    let world = World::new(1);
    world.chain();
    world.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "top", "name": "disk"}),
    );
    world.qmp(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "ro", "read-only": true}),
    );
    for (arguments, text) in [
        (
            json!({"type": "nbd", "id": "9e", "node-name": "top"}),
            "Invalid block export id",
        ),
        (
            json!({"type": "nbd", "id": "e", "node-name": "no"}),
            "Block export id 'e' is already in use",
        ),
        (
            json!({"type": "nbd", "id": "f", "node-name": "no"}),
            "Cannot find device='' nor node-name='no'",
        ),
        (
            json!({"type": "nbd", "id": "f", "node-name": "ro", "writable": true}),
            "Cannot export read-only node as writable",
        ),
    ] {
        world.refused("block-export-add", arguments, text);
    }
    let twice = world.try_qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "f", "node-name": "top", "name": "disk"}),
    );
    assert_eq!(
        twice.unwrap_err().desc,
        "NBD server already has export named 'disk'"
    );
    world.refused("blockdev-del", json!({"node-name": "top"}), "Node top is in use");
    assert!(world.layer.export("disk").is_some() && world.layer.export("e").is_some());
    let expected = json!([{"id": "e", "type": "nbd", "node-name": "top", "shutting-down": false}]);
    assert_eq!(world.qmp("query-block-exports", json!({})), expected);
    world.qmp("block-export-del", json!({"id": "e", "mode": "hard"}));
    world.refused("block-export-del", json!({"id": "e"}), "Export 'e' is not found");
    assert_eq!(world.qmp("query-block-exports", json!({})), json!([]));
}

#[test]
fn the_graph_as_qemu_numbers_it() {
    let world = World::new(1);
    world.qmp(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "n", "size": 64 * KIB}),
    );
    world.qmp(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "r", "file": "n"}),
    );
    world.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "r"}),
    );
    let graph = world.qmp("x-debug-query-block-graph", json!({}));
    assert_eq!(
        graph["nodes"],
        json!([
            {"id": 3, "type": "block-driver", "name": "n"},
            {"id": 2, "type": "block-driver", "name": "r"},
            {"id": 1, "type": "block-backend", "name": ""},
        ])
    );
    assert_eq!(
        graph["edges"][1],
        json!({
            "parent": 1, "child": 2, "name": "root",
            "perm": ["consistent-read"],
            "shared-perm": ["write-unchanged", "write", "consistent-read"],
        })
    );
}

#[test]
fn change_backing_file_rewrites_the_header_only() {
    let world = World::new(1);
    world.chain();
    let change = |device: &str, image: &str| json!({"device": device, "image-node-name": image, "backing-file": "new"});
    for (arguments, text) in [
        (change("no", "top"), "Cannot find device='no' nor node-name='no'"),
        (change("top", "no"), "Cannot find device='' nor node-name='no'"),
        (
            change("top", "base"),
            "not allowing backing file change on an image without a backing file",
        ),
        (change("mid", "top"), "Need a root block node"),
    ] {
        world.refused("change-backing-file", arguments, text);
    }
    world.qmp("change-backing-file", change("top", "top"));
    let top = world.layer.node(world.layer.find_node("top").expect("top"));
    assert_eq!(
        top.driver().backing_header(),
        Some(("new".to_owned(), Some("qcow2".to_owned())))
    );
    assert_eq!(world.layer.cow(top.id), world.layer.find_node("mid"));
}
