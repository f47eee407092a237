//! Lengths that change under a backup: what was there is copied, or the job says that it was not; nothing aborts.

use serde_json::{Value, json};

use super::tests::{CLUSTER, backup, world};
use crate::jobs::JobStatus;
use crate::jobs::testing::{MIB, World};

/// A slow backup of everything beside an empty overlay of four clusters, which is open.
fn slow(more: Value) -> World {
    let world = world();
    world.qcow2("short", 4 * CLUSTER, None);
    world.open("short", "short", json!({}));
    world.add_bitmap("b");
    let mut all = backup(json!({"speed": 1, "auto-dismiss": false}));
    if let (Some(all), Value::Object(more)) = (all.as_object_mut(), more) {
        all.extend(more);
    }
    world.qmp("blockdev-backup", all);
    world
}

fn go_on(world: &World) -> String {
    world.qmp("block-job-set-speed", json!({"device": "j", "speed": 0}));
    world.until("j", JobStatus::Concluded);
    world.take_script()
}

fn snapshot(node: &str) -> Value {
    json!({"type": "blockdev-snapshot", "data": {"node": node, "overlay": "short"}})
}

#[test]
fn a_refused_snapshot_with_a_shorter_overlay_cuts_nothing() {
    let world = slow(json!({}));
    let before = world.read_all("src");
    world.qmp("block-dirty-bitmap-add", json!({"node": "f", "name": "above"}));
    world.fill("f", 12 * CLUSTER, 512, 0x77);
    let filter = world.layer.find_node("f").expect("a node");
    let marks = || {
        let bitmap = world.layer.node(filter).bitmap("above").expect("a bitmap");
        let bits: Vec<u64> = bitmap.bits.borrow().runs().flatten().collect();
        bits
    };
    let marked = marks();
    assert!(!marked.is_empty());
    let abort = json!({"type": "abort", "data": {}});
    let refused = world.try_qmp("transaction", json!({"actions": [snapshot("src"), abort]}));
    assert!(refused.is_err());
    assert_eq!(marks(), marked, "bitmaps of nodes above are as before");
    assert!(!go_on(&world).contains("error"));
    assert!(world.read_all("tgt") == before);
}

#[test]
fn a_source_that_is_cut_makes_the_backup_fail_and_forgets_no_change() {
    let more = json!({"sync": "bitmap", "bitmap": "b", "bitmap-mode": "always"});
    for more in [json!({}), more] {
        let with_bitmap = more.get("bitmap").is_some();
        let world = world_marked(with_bitmap, more);
        world.qmp("transaction", json!({"actions": [snapshot("src")]}));
        let script = go_on(&world);
        assert!(script.contains("COMPLETED(error)"), "{script}");
        if with_bitmap {
            let (bits, ..) = world.marks("b");
            assert!(bits.contains(&(12 * CLUSTER / 65536)), "{bits:?}");
        }
    }
}

#[test]
fn a_backup_that_has_copied_everything_survives_a_cut() {
    let world = slow(json!({"speed": 0, "auto-finalize": false}));
    world.until("j", JobStatus::Pending);
    world.qmp("transaction", json!({"actions": [snapshot("src")]}));
    world.qmp("job-finalize", json!({"id": "j"}));
    world.until("j", JobStatus::Concluded);
    assert!(!world.take_script().contains("error"));
}

/// As `slow`, with two changes past the end of the overlay before: the first one is copied at once.
fn world_marked(marked: bool, more: Value) -> World {
    if !marked {
        return slow(more);
    }
    let world = world();
    world.qcow2("short", 4 * CLUSTER, None);
    world.open("short", "short", json!({}));
    world.qmp(
        "block-dirty-bitmap-add",
        json!({"node": "src", "name": "b", "granularity": 65536}),
    );
    world.fill("src", 8 * CLUSTER, 512, 4);
    world.fill("src", 12 * CLUSTER, 512, 4);
    let mut all = backup(json!({"speed": 1, "auto-dismiss": false}));
    if let (Some(all), Value::Object(more)) = (all.as_object_mut(), more) {
        all.extend(more);
    }
    world.qmp("blockdev-backup", all);
    world
}

#[test]
fn the_scan_for_the_top_layer_survives_a_cut() {
    let world = slow(json!({"sync": "top"}));
    world.qmp("transaction", json!({"actions": [snapshot("src")]}));
    let script = go_on(&world);
    assert!(script.contains("COMPLETED(error)"), "{script}");
}

#[test]
fn a_target_that_became_shorter_fails_as_a_target() {
    let world = world();
    world.qcow2("short", 4 * CLUSTER, None);
    world.open("short", "short", json!({}));
    // Nobody blocks what is below the target.
    world.qmp(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "window", "file": "tgt"}),
    );
    let all = backup(json!({"target": "window", "speed": 1, "auto-dismiss": false}));
    world.qmp("blockdev-backup", all);
    world.qmp("transaction", json!({"actions": [snapshot("tgt")]}));
    assert_eq!(
        world
            .layer
            .node(world.layer.find_node("window").expect("a node"))
            .length(),
        4 * CLUSTER
    );
    let script = go_on(&world);
    assert!(script.contains("ERROR(report)"), "{script}");
    assert!(world.read_all("src").len() as u64 == MIB);
}
