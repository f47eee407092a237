//! `blockdev-reopen`, snapshots, transactions, `block_resize`: all or nothing, what stays, what goes back to its default, and the exact refusals. Texts are those
//! of qemu-storage-daemon 10.0.

use std::rc::Rc;

use blkcheck_model::graph::BackingHeader;
use blkcheck_model::{Command, FileFacts, FileKind, Qcow2Facts, Refusal, World};
use serde_json::{Value, json};

fn run(world: &mut World, name: &str, arguments: &Value) -> Result<Value, Refusal> {
    world.execute(&Command::new(name, arguments))
}

/// a, b and c: writable qcow2 nodes over files of their own (fa is opened inline, fb and fc are not); c has no backing
/// file, b ← a.
fn world() -> World {
    let file = |name: &str, backing: Option<&str>| {
        let backing = backing.map(|file| BackingHeader {
            file: Rc::from(file),
            format: Some(Rc::from("qcow2")),
        });
        let facts = FileFacts {
            kind: FileKind::Regular,
            length: 65536,
            request_alignment: 1,
            qcow2: Some(Qcow2Facts {
                virtual_size: 1 << 20,
                cluster_size: 65536,
                version: 3,
                backing,
                bitmaps: Vec::new(),
            }),
        };
        (Rc::from(name), facts)
    };
    let mut world = World::new([
        file("/a", Some("/b")),
        file("/b", None),
        file("/c", None),
        file("/l1", Some("/l2")),
        file("/l2", Some("/l1")),
    ]);
    for node in [
        json!({"driver": "file", "node-name": "fb", "filename": "/b"}),
        json!({"driver": "file", "node-name": "fc", "filename": "/c"}),
        json!({"driver": "qcow2", "node-name": "b", "file": "fb"}),
        json!({"driver": "qcow2", "node-name": "c", "file": "fc"}),
        json!({"driver": "qcow2", "node-name": "a", "backing": "b",
            "file": {"driver": "file", "node-name": "fa", "filename": "/a"}}),
    ] {
        run(&mut world, "blockdev-add", &node).unwrap();
    }
    world
}

fn reopen(world: &mut World, options: &[Value]) -> Result<(), String> {
    let arguments = json!({ "options": options });
    run(world, "blockdev-reopen", &arguments)
        .map(drop)
        .map_err(|refusal| refusal.desc)
}

/// An item of a list is looked at when everything is right with those before it.
#[test]
fn what_is_wrong_with_an_item_is_told_before_what_the_next_one_is() {
    let refused = |name: &str, arguments: Value| {
        let refusal = run(&mut world(), name, &arguments).expect_err("refused");
        refusal.desc
    };
    let reopen = |second: Value| json!({"options": [{"driver": "qcow2"}, second], "x": 1});
    for second in [json!(1), json!({"driver": "nothing"})] {
        assert_eq!(
            refused("blockdev-reopen", reopen(second)),
            "Parameter 'options[0].file' is missing"
        );
    }
    let actions = json!({"actions": [{"type": "block-dirty-bitmap-add", "data": {"node": "a"}}, 1]});
    assert_eq!(
        refused("transaction", actions),
        "Parameter 'actions[0].data.name' is missing"
    );
    assert_eq!(
        refused("transaction", json!({"actions": [1]})),
        "Invalid parameter type for 'actions[0]', expected: object"
    );
}

#[track_caller]
fn refused(options: &[Value], text: &str) {
    let mut world = world();
    let before = world.clone();
    assert_eq!(reopen(&mut world, options), Err(text.to_owned()));
    assert_eq!(world, before, "a refused command changes nothing");
}

fn backing_of(world: &World, node: &str) -> Option<String> {
    let id = world.graph.find(node).expect("open");
    world
        .graph
        .cow_child(id)
        .map(|id| world.graph.name(id).to_owned())
}

fn a(with: &Value) -> Value {
    let mut options = json!({"driver": "qcow2", "node-name": "a", "file": "fa", "backing": "b"});
    for (name, value) in with.as_object().expect("an object") {
        options[name] = value.clone();
    }
    options
}

#[test]
fn refusals() {
    refused(
        &[json!({"driver": "qcow2", "file": "fa"})],
        "node-name not specified",
    );
    refused(
        &[json!({"driver": "qcow2", "file": "fa", "node-name": "x"})],
        "Failed to find node with node-name='x'",
    );
    refused(
        &[json!({"driver": "qcow2", "node-name": "a"})],
        "Parameter 'options[0].file' is missing",
    );
    refused(
        &[json!({"driver": "qcow2", "node-name": "a", "file": "fa"})],
        "backing is missing for 'a'",
    );
    refused(
        &[a(&json!({"backing": "x"}))],
        "Cannot find device='' nor node-name='x'",
    );
    refused(
        &[a(&json!({"backing": "a"}))],
        "Making 'a' a backing child of 'a' would create a cycle",
    );
    refused(
        &[a(&json!({"file": "a"}))],
        "Making 'a' a file child of 'a' would create a cycle",
    );
    refused(
        &[a(&json!({"driver": "raw", "backing": null}))],
        "Parameter 'options[0].backing' is unexpected",
    );
    refused(
        &[json!({"driver": "raw", "node-name": "a", "file": "fa"})],
        "backing is missing for 'a'",
    );
    refused(
        &[json!({"driver": "raw", "node-name": "c", "file": "fc"})],
        "Cannot change the option 'driver'",
    );
    refused(
        &[a(&json!({"force-share": false}))],
        "Cannot change the option 'force-share'",
    );
    refused(
        &[a(&json!({"detect-zeroes": "unmap"}))],
        "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
    );
    refused(
        &[a(&json!({"file": {"driver": "file", "filename": "/c"}}))],
        "Cannot change the option 'filename'",
    );
    refused(
        &[a(&json!({"backing": {"driver": "qcow2", "file": "fb"}}))],
        "Cannot change the option 'backing.driver'",
    );
    refused(
        &[a(&json!({"file": {"driver": "null-co"}}))],
        "Option 'filename' cannot be reset to its default value",
    );
    refused(
        &[a(&json!({})), json!({})],
        "Parameter 'options[1].driver' is missing",
    );
}

#[test]
fn what_is_not_said_goes_back_to_its_default() {
    let mut world = world();
    // Not discard, which a child has by default: it stays as it is.
    let file = json!({"driver": "file", "node-name": "fa", "filename": "/a", "detect-zeroes": "unmap"});
    reopen(&mut world, &[file]).unwrap();
    reopen(&mut world, &[a(&json!({"read-only": true}))]).unwrap();
    let writable = |world: &World, name| world.graph.node(world.graph.find(name).expect("open")).writable;
    assert!(!writable(&world, "a"));
    assert!(!writable(&world, "fa"), "opened with it, so it follows");
    reopen(
        &mut world,
        &[a(&json!({"file": {"driver": "file", "filename": "/a"}}))],
    )
    .unwrap();
    assert!(writable(&world, "a") && writable(&world, "fa"));
    // By its name alone a child keeps what it has, so that the one above cannot write to it.
    reopen(&mut world, &[a(&json!({"read-only": true}))]).unwrap();
    assert_eq!(
        reopen(&mut world, &[a(&json!({}))]),
        Err("Block node is read-only".to_owned())
    );
}

#[test]
fn a_writer_keeps_its_node_writable() {
    let mut world = world();
    let export = json!({"type": "nbd", "id": "x", "node-name": "a", "writable": true});
    run(&mut world, "block-export-add", &export).unwrap();
    assert_eq!(
        reopen(&mut world, &[a(&json!({"read-only": true}))]),
        Err("Read-only block node 'a' cannot support read-write users".to_owned())
    );
}

#[test]
fn chains_are_changed_together_or_not_at_all() {
    let mut world = world();
    let b = |backing: Value| json!({"driver": "qcow2", "node-name": "b", "file": "fb", "backing": backing});
    // In this order there is a circle in between.
    let before = world.clone();
    assert_eq!(
        reopen(&mut world, &[b(json!("a")), a(&json!({"backing": null}))]),
        Err("Making 'a' a backing child of 'b' would create a cycle".to_owned())
    );
    assert_eq!(world, before);
    reopen(&mut world, &[a(&json!({"backing": null})), b(json!("a"))]).unwrap();
    assert_eq!(backing_of(&world, "b").as_deref(), Some("a"));
    assert_eq!(backing_of(&world, "a"), None);
    world.graph.check().unwrap();
    assert_eq!(world.graph.looser_than_from_scratch(), []);
}

#[test]
fn files_of_writers_are_exchanged_only_together() {
    let mut world = world();
    let on =
        |name: &str, file: &str| json!({"driver": "qcow2", "node-name": name, "file": file, "backing": null});
    let refusal = reopen(&mut world, &[on("b", "fc")]).unwrap_err();
    assert!(
        refusal.starts_with(
            "Permission conflict on node 'fc': permissions 'write, resize' are both required by"
        ),
        "{refusal}"
    );
    reopen(&mut world, &[on("b", "fc"), on("c", "fb")]).unwrap();
    world.graph.check().unwrap();
}

#[test]
fn a_frozen_link_stays_and_filters_come_and_go_above_it() {
    let mut world = world();
    let filter = json!({"driver": "copy-on-read", "node-name": "cor", "file": "a", "bottom": "b"});
    run(&mut world, "blockdev-add", &filter).unwrap();
    assert_eq!(
        reopen(&mut world, &[a(&json!({"backing": null}))]),
        Err("Cannot change frozen 'backing' link from 'a' to 'b'".to_owned())
    );
    let options = json!({"driver": "copy-on-read", "node-name": "cor", "file": "a", "bottom": "b"});
    assert_eq!(
        reopen(&mut world, &[options]),
        Err("Block format 'copy-on-read' used by node 'cor' does not support reopening files".to_owned())
    );
    let c = |backing: Value| json!({"driver": "qcow2", "node-name": "c", "file": "fc", "backing": backing});
    reopen(&mut world, &[c(json!("cor"))]).unwrap();
    reopen(&mut world, &[c(json!("a"))]).unwrap();
    reopen(&mut world, &[c(json!(null))]).unwrap();
    assert_eq!(backing_of(&world, "c"), None);
}

/// QEMU 10.0 follows the circle until something runs out.
#[test]
fn headers_that_name_each_other_are_refused() {
    let mut world = world();
    let options = json!({"driver": "qcow2", "node-name": "l", "file": {"driver": "file", "filename": "/l1"}});
    let refusal = run(&mut world, "blockdev-add", &options).unwrap_err();
    assert_eq!(
        refusal.desc,
        "Could not open backing file: Could not open backing file: Image '/l1' is in its own backing chain"
    );
}

#[track_caller]
fn command_refused(world: &World, name: &str, arguments: &Value, text: &str) {
    let mut copy = world.clone();
    assert_eq!(
        run(&mut copy, name, arguments).map_err(|refusal| refusal.desc),
        Err(text.to_owned())
    );
    assert_eq!(copy, *world, "a refused command changes nothing");
}

#[test]
fn overlays_that_cannot_be() {
    let mut world = world();
    let snapshot = |node: &str, overlay: &str| json!({"node": node, "overlay": overlay});
    for node in [
        json!({"driver": "null-co", "node-name": "z"}),
        json!({"driver": "copy-on-read", "node-name": "cor", "file": "c"}),
    ] {
        run(&mut world, "blockdev-add", &node).unwrap();
    }
    for (node, overlay, text) in [
        ("x", "c", "Cannot find device='x' nor node-name='x'"),
        ("a", "x", "Cannot find device='x' nor node-name='x'"),
        ("b", "c", "Node 'b' is busy: node is used as backing hd of 'a'"),
        ("c", "a", "The overlay already has a backing image"),
        ("c", "z", "The overlay does not support backing images"),
        ("c", "cor", "Filters cannot be used as overlays"),
        ("c", "c", "Making 'c' a backing child of 'c' would create a cycle"),
        (
            "cor",
            "c",
            "Making 'cor' a backing child of 'c' would create a cycle",
        ),
    ] {
        command_refused(&world, "blockdev-snapshot", &snapshot(node, overlay), text);
    }
    let export = json!({"type": "nbd", "id": "x", "node-name": "c"});
    run(&mut world, "block-export-add", &export).unwrap();
    command_refused(
        &world,
        "blockdev-snapshot",
        &snapshot("a", "c"),
        "The overlay is already in use",
    );
}

#[test]
fn a_snapshot_moves_users_to_the_overlay_and_the_node_becomes_read_only() {
    let mut world = world();
    let export = json!({"type": "nbd", "id": "x", "node-name": "a", "writable": true});
    run(&mut world, "block-export-add", &export).unwrap();
    run(
        &mut world,
        "blockdev-snapshot",
        &json!({"node": "a", "overlay": "c"}),
    )
    .unwrap();
    assert_eq!(backing_of(&world, "c").as_deref(), Some("a"));
    assert_eq!(world.export_node("x"), world.graph.find("c"));
    assert!(!world.graph.node(world.graph.find("a").unwrap()).writable);
    world.graph.check().unwrap();
}

#[test]
fn a_transaction_takes_effect_as_a_whole() {
    let world = world();
    let snapshot = json!({"type": "blockdev-snapshot", "data": {"node": "a", "overlay": "c"}});
    let abort = json!({"type": "abort", "data": {}});
    let twice = json!({"actions": [snapshot, snapshot]});
    command_refused(
        &world,
        "transaction",
        &twice,
        "Node 'a' is busy: node is used as backing hd of 'c'",
    );
    let aborted = json!({"actions": [snapshot, abort]});
    command_refused(
        &world,
        "transaction",
        &aborted,
        "Transaction aborted using Abort action",
    );
    let grouped = json!({"actions": [snapshot], "properties": {"completion-mode": "grouped"}});
    command_refused(
        &world,
        "transaction",
        &grouped,
        "Action 'blockdev-snapshot' does not support transaction property completion-mode = grouped",
    );
    let missing = json!({"actions": [{"type": "abort"}]});
    command_refused(
        &world,
        "transaction",
        &missing,
        "Parameter 'actions[0].data' is missing",
    );
    let mut done = world;
    run(&mut done, "transaction", &json!({"actions": [snapshot]})).unwrap();
    run(&mut done, "transaction", &json!({"actions": []})).unwrap();
    assert_eq!(backing_of(&done, "c").as_deref(), Some("a"));
}

#[test]
fn lengths() {
    let mut world = world();
    let resize = |node: &str, size: i64| json!({"node-name": node, "size": size});
    let filter = json!({"driver": "copy-on-read", "node-name": "cor", "file": "c"});
    run(&mut world, "blockdev-add", &filter).unwrap();
    run(
        &mut world,
        "blockdev-add",
        &json!({"driver": "null-co", "node-name": "z"}),
    )
    .unwrap();
    run(
        &mut world,
        "blockdev-add",
        &json!({"driver": "null-co", "node-name": "y"}),
    )
    .unwrap();
    let window = json!({"driver": "raw", "node-name": "w", "file": "z", "size": 512});
    run(&mut world, "blockdev-add", &window).unwrap();
    for (node, size, text) in [
        ("x", 512, "Cannot find device='' nor node-name='x'"),
        ("c", -1, "Parameter 'size' expects a >0 size"),
        ("c", 1000, "The new size must be a multiple of 512"),
        ("b", 512, "Node 'b' is busy: node is used as backing hd of 'a'"),
        ("y", 512, "Image format driver does not support resize"),
        ("w", 1024, "Cannot resize fixed-size raw disks"),
        (
            "fc",
            512,
            "Permission conflict on node 'fc': permissions 'resize' are both required by an unnamed block device (uses \
             node 'fc' as 'root' child) and unshared by node 'c' (uses node 'fc' as 'file' child).",
        ),
    ] {
        command_refused(&world, "block_resize", &resize(node, size), text);
    }
    let length = |world: &World, node: &str| world.graph.node(world.graph.find(node).unwrap()).length;
    run(&mut world, "block_resize", &resize("c", 4096)).unwrap();
    assert_eq!(
        (length(&world, "c"), length(&world, "cor")),
        (4096, 4096),
        "the filter's as well"
    );
    run(&mut world, "block_resize", &resize("cor", 8192)).unwrap();
    assert_eq!((length(&world, "c"), length(&world, "cor")), (8192, 8192));
    let export = json!({"type": "nbd", "id": "x", "node-name": "cor"});
    run(&mut world, "block-export-add", &export).unwrap();
    let refusal = run(&mut world, "block_resize", &resize("c", 512))
        .unwrap_err()
        .desc;
    assert!(
        refusal.contains("'resize' are both required by an unnamed block device"),
        "{refusal}"
    );
}

/// Nobody should do it, but a node can be given a file that is no image; nothing may panic then.
#[test]
fn a_format_node_over_another_file() {
    let mut world = world();
    run(
        &mut world,
        "blockdev-add",
        &json!({"driver": "null-co", "node-name": "z"}),
    )
    .unwrap();
    reopen(&mut world, &[a(&json!({"file": "z"}))]).unwrap();
    let change = json!({"device": "a", "image-node-name": "a", "backing-file": "x"});
    run(&mut world, "change-backing-file", &change).unwrap();
    run(
        &mut world,
        "block_resize",
        &json!({"node-name": "a", "size": 512}),
    )
    .unwrap();
    run(&mut world, "block-stream", &json!({"job-id": "j", "device": "a"})).unwrap();
}

/// An entry for a node replaces an earlier one, but not its children.
#[test]
fn a_node_without_children_gets_no_file() {
    let mut world = world();
    let null = json!({"driver": "null-co", "node-name": "z", "size": 512});
    run(&mut world, "blockdev-add", &null).unwrap();
    let before = world.clone();
    let raw = json!({"driver": "raw", "node-name": "z", "file": "fc"});
    let refused = reopen(&mut world, &[raw, null]).unwrap_err();
    assert_eq!(refused, "Cannot set file child to format node without file child");
    assert_eq!(world.edge_facts(), before.edge_facts());
}
