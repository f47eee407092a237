//! Copy-before-write filters and snapshots of them: refusals word for word, masks, lengths. Everything here was seen in
//! qemu-storage-daemon 10.0, but for clusters that no copy has memory for, and for targets that are too short.

mod common;

use blkcheck_model::{Masks, Perm, World};
use common::{MIB, image, ok, run, with};
use serde_json::{Value, json};

/// `s` with clusters of 4 KiB, `t` with clusters of 128 KiB, `long` of twice the length.
fn world() -> World {
    let mut world = World::new([
        image("s", MIB, 4096),
        image("t", MIB, 131_072),
        image("long", 2 * MIB, 65536),
    ]);
    for name in ["s", "t", "long"] {
        let file = json!({"driver": "file", "node-name": format!("f{name}"), "filename": name});
        ok(
            &mut world,
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": name, "file": file}),
        );
    }
    ok(
        &mut world,
        "block-dirty-bitmap-add",
        json!({"node": "s", "name": "b"}),
    );
    ok(
        &mut world,
        "block-dirty-bitmap-add",
        json!({"node": "long", "name": "b"}),
    );
    world
}

fn filter(more: &Value) -> Value {
    let add = json!({"driver": "copy-before-write", "node-name": "c", "file": "s", "target": "t"});
    with(add, more)
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "callers write the arguments in place"
)]
#[track_caller]
fn refused(more: Value, desc: &str) {
    common::refused(&world(), "blockdev-add", filter(&more), desc);
}

#[test]
fn what_is_no_filter_is_refused() {
    let bcs = |rest: &str| format!("Cannot create block-copy-state: {rest}");
    refused(
        json!({"target": 1}),
        "Invalid parameter type for 'target', expected: BlockdevRef",
    );
    refused(
        json!({"bitmap": 1}),
        "Invalid parameter type for 'bitmap', expected: object",
    );
    refused(
        json!({"bitmap": {"node": "s"}}),
        "Parameter 'bitmap.name' is missing",
    );
    refused(
        json!({"bitmap": {"node": "s", "name": "b", "x": 1}}),
        "Parameter 'bitmap.x' is unexpected",
    );
    refused(
        json!({"on-cbw-error": "x"}),
        "Parameter 'on-cbw-error' does not accept value 'x'",
    );
    refused(
        json!({"cbw-timeout": -1}),
        "Parameter 'cbw-timeout' expects uint32_t",
    );
    refused(
        json!({"min-cluster-size": "x"}),
        "Parameter 'min-cluster-size' expects uint64",
    );
    refused(
        json!({"target": "nope"}),
        "Cannot find device='nope' nor node-name='nope'",
    );
    refused(
        json!({"bitmap": {"node": "nope", "name": "b"}}),
        "Node 'nope' not found",
    );
    refused(
        json!({"bitmap": {"node": "t", "name": "b"}}),
        "Dirty bitmap 'b' not found",
    );
    refused(
        json!({"min-cluster-size": 3, "bitmap": {"node": "long", "name": "b"}}),
        &bcs("min-cluster-size needs to be a power of 2"),
    );
    refused(
        json!({"min-cluster-size": -1}),
        &bcs("min-cluster-size too large: 18446744073709551615 > 9223372036854775807"),
    );
    refused(
        json!({"min-cluster-size": 1u64 << 32}),
        &bcs("min-cluster-size too large: 4294967296 > 134217728"),
    );
    refused(
        json!({"file": "long"}),
        &bcs("Source and target image have different sizes"),
    );
    refused(
        json!({"bitmap": {"node": "long", "name": "b"}}),
        &bcs(
            "Failed to merge bitmap 'b' to internal copy-bitmap: Bitmaps are of different sizes (destination size is \
             1048576, source size is 2097152) and can't be merged",
        ),
    );
    let mut world = world();
    let add = json!({"driver": "copy-before-write", "node-name": "c", "file": "s"});
    assert_eq!(
        run(&mut world, "blockdev-add", add).unwrap_err().desc,
        "Parameter 'target' is missing"
    );
}

#[track_caller]
fn masks(world: &World, above: &str, name: &str) -> Masks {
    let node = world.graph.find(above).unwrap();
    let mut children = world.graph.children(node);
    children.find(|(_, edge)| edge.name == name).unwrap().1.masks
}

#[test]
fn a_filter_guards_its_source_while_somebody_uses_it() {
    let mut world = world();
    ok(&mut world, "blockdev-add", filter(&json!({})));
    assert_eq!(masks(&world, "c", "file"), Masks::NONE);
    let target = Masks::new(Perm::WRITE, Perm::all() - Perm::RESIZE);
    assert_eq!(masks(&world, "c", "target"), target);
    let kept = world
        .graph
        .node(world.graph.find("c").unwrap())
        .kept
        .clone()
        .unwrap();
    assert_eq!((kept.cluster, kept.initial.unwrap().count()), (131_072, 8));

    ok(
        &mut world,
        "blockdev-add",
        json!({"driver": "snapshot-access", "node-name": "a", "file": "c"}),
    );
    assert_eq!(masks(&world, "a", "file"), Masks::NONE);
    let guarded = Masks::new(
        Perm::CONSISTENT_READ,
        Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED,
    );
    assert_eq!(masks(&world, "c", "file"), guarded);
    let resized = run(
        &mut world,
        "block_resize",
        json!({"node-name": "s", "size": 4096}),
    )
    .unwrap_err();
    assert_eq!(
        resized.desc,
        "Permission conflict on node 's': permissions 'resize' are both required by an unnamed block device (uses node 's' \
         as 'root' child) and unshared by node 'c' (uses node 's' as 'file' child)."
    );
    ok(&mut world, "blockdev-del", json!({"node-name": "a"}));
    assert_eq!(masks(&world, "c", "file"), Masks::NONE);
}

#[test]
fn neither_is_reopened_nor_made_longer_nor_an_overlay() {
    let mut world = world();
    ok(&mut world, "blockdev-add", filter(&json!({"target": "long"})));
    ok(
        &mut world,
        "blockdev-add",
        json!({"driver": "snapshot-access", "node-name": "a", "file": "c"}),
    );
    let cases = [
        (
            "blockdev-reopen",
            json!({"options": [{"driver": "snapshot-access", "node-name": "a", "file": "c"}]}),
            "Block format 'snapshot-access' used by node 'a' does not support reopening files",
        ),
        (
            "blockdev-reopen",
            json!({"options": [filter(&json!({}))]}),
            "Block format 'copy-before-write' used by node 'c' does not support reopening files",
        ),
        (
            "block_resize",
            json!({"node-name": "a", "size": 4096}),
            "Image format driver does not support resize",
        ),
        (
            "blockdev-snapshot",
            json!({"node": "s", "overlay": "a"}),
            "The overlay does not support backing images",
        ),
        (
            "blockdev-snapshot",
            json!({"node": "s", "overlay": "c"}),
            "Filters cannot be used as overlays",
        ),
        (
            "block-dirty-bitmap-add",
            json!({"node": "a", "name": "p", "persistent": true}),
            "Can't store persistent bitmaps to a: Operation not supported",
        ),
    ];
    for (name, arguments, desc) in cases {
        assert_eq!(run(&mut world, name, arguments).unwrap_err().desc, desc);
    }
    let same = filter(&json!({"node-name": "same", "target": "s"}));
    assert_eq!(
        run(&mut world, "blockdev-add", same).unwrap_err().desc,
        "Permission conflict on node 's': permissions 'write' are both required by node 'same' (uses node 's' as 'target' \
         child) and unshared by node 'c' (uses node 's' as 'file' child)."
    );
    ok(
        &mut world,
        "block_resize",
        json!({"node-name": "c", "size": 4096}),
    );
    let length = |name: &str| world.graph.node(world.graph.find(name).unwrap()).length;
    assert_eq!((length("s"), length("c"), length("a")), (4096, 4096, MIB));
}
