//! Marks, transactions, and storage that fails.

use serde_json::{Value, json};

use crate::error::Errno;
use crate::jobs::testing::{KIB, MIB, World};

fn of(node: &str, name: &str) -> Value {
    json!({"node": node, "name": name})
}

fn add(world: &World, node: &str, name: &str, granularity: u64) {
    let add = json!({"node": node, "name": name, "granularity": granularity});
    world.qmp("block-dirty-bitmap-add", add);
}

fn info(world: &World, node: &str, name: &str) -> Value {
    let nodes = world.qmp("query-named-block-nodes", json!({}));
    let found = nodes
        .as_array()
        .unwrap()
        .iter()
        .find(|n| n["node-name"] == *node)
        .unwrap();
    let bitmaps = found["dirty-bitmaps"].as_array().cloned().unwrap_or_default();
    bitmaps
        .into_iter()
        .find(|b| b["name"] == *name)
        .unwrap_or_default()
}

fn count(world: &World, node: &str, name: &str) -> u64 {
    info(world, node, name)["count"].as_u64().expect("a bitmap")
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "callers write the arguments in place"
)]
fn action(kind: &str, data: Value) -> Value {
    json!({"type": format!("block-dirty-bitmap-{kind}"), "data": data})
}

/// `n` over `f`, both open for good.
fn image() -> World {
    let world = World::new(1);
    world.qcow2("i", MIB, None);
    world.qmp(
        "blockdev-add",
        json!({"driver": "file", "node-name": "f", "filename": "i"}),
    );
    open(&world, false);
    world
}

fn open(world: &World, read_only: bool) {
    let n =
        json!({"driver": "qcow2", "node-name": "n", "file": "f", "read-only": read_only, "discard": "unmap"});
    world.qmp("blockdev-add", n);
}

#[test]
fn writes_zeroes_and_discards_mark_in_whole_granules() {
    let world = image();
    world.qmp(
        "blockdev-add",
        json!({"driver": "copy-on-read", "node-name": "c", "file": "n"}),
    );
    for node in ["c", "n", "f"] {
        add(&world, node, "b", 4096);
    }
    world.with_export("c", async |guest| {
        guest.write(5000, &[1; 10], Default::default()).await.unwrap();
        guest.write_zeroes(64 * KIB, 1, Default::default()).await.unwrap();
        guest.discard(128 * KIB, 64 * KIB).await.unwrap();
    });
    assert_eq!(
        (count(&world, "c", "b"), count(&world, "n", "b")),
        (8192, 8192),
        "`c` passes no discards on"
    );
    world.with_export("n", async |guest| {
        guest.discard(128 * KIB, 64 * KIB).await.unwrap();
        guest.discard(MIB - KIB, 2 * MIB).await.unwrap_err();
    });
    assert_eq!(count(&world, "n", "b"), 8192 + 64 * KIB);
    assert!(count(&world, "f", "b") > 0, "what the image is made of");
    let sha = world.qmp("x-debug-block-dirty-bitmap-sha256", of("c", "b"));
    assert_eq!(sha["sha256"].as_str().unwrap().len(), 64);
    add(&world, "n", "empty", 64 * KIB);
    let sha = world.qmp("x-debug-block-dirty-bitmap-sha256", of("n", "empty"));
    assert_eq!(
        sha["sha256"],
        "af5570f5a1810b7af78caf4bc70a660f0df51e42baf91d4de5b2328de0e83dfc"
    );
}

#[test]
fn a_failed_write_marks_too() {
    let world = image();
    add(&world, "n", "b", 4096);
    world.fail("i", "write", (0, u64::MAX), Errno::EIO, u32::MAX);
    world.with_export("n", async |guest| {
        guest.write(0, &[1; 512], Default::default()).await.unwrap_err();
    });
    world.mend();
    assert_eq!(count(&world, "n", "b"), 4096, "part of it may be there");
}

#[test]
fn a_refused_transaction_leaves_every_bitmap() {
    let world = image();
    for name in ["a", "b", "off"] {
        add(&world, "n", name, 4096);
    }
    world.qmp("block-dirty-bitmap-disable", of("n", "off"));
    world.fill("n", 0, 8192, 1);
    world.qmp("block-dirty-bitmap-clear", of("n", "a"));
    let look = || ["a", "b", "c", "off"].map(|name| info(&world, "n", name));
    let before = look();
    let merge = json!({"node": "n", "target": "a", "bitmaps": ["b"]});
    let good = vec![
        action("add", of("n", "c")),
        action("merge", merge),
        action("clear", of("n", "b")),
        action("enable", of("n", "off")),
        action("disable", of("n", "a")),
        action("remove", of("n", "b")),
    ];
    let last = [
        (
            json!({"type": "abort", "data": {}}),
            "Transaction aborted using Abort action",
        ),
        (
            action("clear", of("n", "b")),
            "Bitmap 'b' is currently in use by another operation and cannot be used",
        ),
        (
            action("enable", of("n", "nothing")),
            "Dirty bitmap 'nothing' not found",
        ),
    ];
    for (last, text) in last {
        let actions = [good.clone(), vec![last]].concat();
        world.refused("transaction", json!({ "actions": actions }), text);
        assert_eq!(look(), before, "{text}");
    }
    world.qmp("transaction", json!({ "actions": good }));
    assert_eq!(count(&world, "n", "a"), 8192);
    assert_eq!(info(&world, "n", "b"), Value::Null);
    let flags = ["a", "c", "off"].map(|name| info(&world, "n", name)["recording"].clone());
    assert_eq!(flags, [json!(false), json!(true), json!(true)]);
}

#[test]
fn an_export_holds_what_it_shows() {
    let world = image();
    world.qcow2("j", MIB, None);
    world.open("m", "j", json!({}));
    add(&world, "m", "b", 4096);
    let export = json!({"type": "nbd", "id": "e", "node-name": "n", "writable": true,
        "bitmaps": [{"node": "m", "name": "b"}, {"node": "m", "name": "b"}]});
    world.qmp("block-export-add", export);
    world.refused(
        "block-dirty-bitmap-remove",
        of("m", "b"),
        "Bitmap 'b' is currently in use by another operation and cannot be used",
    );
    world.refused(
        "blockdev-del",
        json!({"node-name": "m"}),
        "Block device m is in use",
    );
    world.qmp("block_resize", json!({"node-name": "m", "size": 2 * MIB}));
    world.qmp("block-export-del", json!({"id": "e"}));
    world.qmp("block-dirty-bitmap-clear", of("m", "b"));
    world.qmp("blockdev-del", json!({"node-name": "m"}));
}

#[test]
fn what_could_not_be_stored_is_inconsistent() {
    let world = image();
    let persistent = json!({"node": "n", "name": "b", "persistent": true});
    world.qmp("block-dirty-bitmap-add", persistent);
    let close = || world.qmp("blockdev-del", json!({"node-name": "n"}));
    close();
    open(&world, false);
    world.fill("n", 0, 512, 1);
    world.fail("i", "write", (0, u64::MAX), Errno::EIO, u32::MAX);
    close();
    world.mend();
    open(&world, true);
    assert_eq!(info(&world, "n", "b")["inconsistent"], true);
    world.refused(
        "block-dirty-bitmap-clear",
        of("n", "b"),
        "Bitmap 'b' is readonly and cannot be modified",
    );
    close();
    open(&world, false);
    world.refused(
        "block-dirty-bitmap-clear",
        of("n", "b"),
        "Bitmap 'b' is inconsistent and cannot be used",
    );
    world.qmp("block-dirty-bitmap-remove", of("n", "b"));
    close();
    open(&world, false);
    assert_eq!(info(&world, "n", "b"), Value::Null);
}
