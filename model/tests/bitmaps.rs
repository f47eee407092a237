//! Dirty bitmaps: refusals word for word, what marks them, transactions, and what images hold of them. Everything here was
//! seen in qemu-storage-daemon 10.0.

mod common;

use blkcheck_model::{Bitmap, Refusal, World};
use common::{MIB, flat, image, ok, refused, run};
use serde_json::{Value, json};

/// `n` and `m`, images of 1 MiB over `fn` and `fm`; `old`, of version 2; `c`, copy-on-read above `n`; `w`, 256 KiB of
/// `flat` from 1024 on.
fn world() -> World {
    let mut old = image("/old", MIB, 65536);
    old.1.qcow2.as_mut().expect("an image").version = 2;
    let mut world = World::new([
        image("/n", MIB, 65536),
        image("/m", MIB, 65536),
        old,
        flat("/flat", MIB),
    ]);
    for (name, options) in [
        ("n", json!({"driver": "qcow2", "discard": "unmap"})),
        ("m", json!({"driver": "qcow2"})),
        ("old", json!({"driver": "qcow2"})),
        ("flat", json!({"driver": "raw"})),
    ] {
        let mut add = options;
        ok(
            &mut world,
            "blockdev-add",
            json!({"driver": "file", "node-name": format!("f{name}"), "filename": format!("/{name}"), "discard": "unmap"}),
        );
        (add["node-name"], add["file"]) = (json!(name), json!(format!("f{name}")));
        ok(&mut world, "blockdev-add", add);
    }
    let cor = json!({"driver": "copy-on-read", "node-name": "c", "file": "n", "discard": "unmap"});
    ok(&mut world, "blockdev-add", cor);
    let window = json!({"driver": "raw", "node-name": "w", "file": "flat", "offset": 1024, "size": 262_144});
    ok(&mut world, "blockdev-add", window);
    world
}

fn add(world: &mut World, node: &str, name: &str, more: Value) {
    let mut arguments = more;
    (arguments["node"], arguments["name"]) = (json!(node), json!(name));
    ok(world, "block-dirty-bitmap-add", arguments);
}

fn verb(world: &mut World, verb: &str, node: &str, name: &str) -> Result<Value, Refusal> {
    let verb = format!("block-dirty-bitmap-{verb}");
    run(world, &verb, json!({"node": node, "name": name}))
}

#[track_caller]
fn bitmap<'a>(world: &'a World, node: &str, name: &str) -> &'a Bitmap {
    let node = world.graph.find(node).unwrap();
    let bitmaps = &world.graph.node(node).bitmaps;
    bitmaps.iter().find(|bitmap| &*bitmap.name == name).unwrap()
}

#[track_caller]
fn count(world: &World, node: &str, name: &str) -> u64 {
    bitmap(world, node, name).count().unwrap()
}

fn write(world: &mut World, node: &str, start: u64, length: u64) {
    let node = world.graph.find(node).unwrap();
    world.guest_wrote(node, start..start + length);
}

fn transaction(world: &mut World, actions: &[(&str, Value)]) -> Result<Value, Refusal> {
    let action = |(kind, data): &(&str, Value)| json!({"type": kind, "data": data});
    let actions: Vec<Value> = actions.iter().map(action).collect();
    run(world, "transaction", json!({ "actions": actions }))
}

fn reopen(world: &mut World, read_only: bool) -> Result<Value, Refusal> {
    let n = json!({"driver": "qcow2", "node-name": "n", "file": "fn", "read-only": read_only, "discard": "unmap"});
    run(world, "blockdev-reopen", json!({ "options": [n] }))
}

#[test]
fn adding_is_refused() {
    let mut world = world();
    add(&mut world, "n", "b", json!({}));
    add(&mut world, "old", "b", json!({}));
    let long = "q".repeat(1024);
    let cases = [
        (
            json!({"node": "nope", "name": ""}),
            "Bitmap name cannot be empty".to_owned(),
        ),
        (
            json!({"node": "x", "name": "b"}),
            "Cannot find device='x' nor node-name='x'".to_owned(),
        ),
        (json!({"node": "n"}), "Parameter 'name' is missing".to_owned()),
        (
            json!({"node": "n", "name": "c", "foo": 1}),
            "Parameter 'foo' is unexpected".to_owned(),
        ),
        (
            json!({"node": "n", "name": "b"}),
            "Bitmap already exists: b".to_owned(),
        ),
        (
            json!({"node": "n", "name": "b", "persistent": true}),
            "Bitmap already exists: b".to_owned(),
        ),
        (
            json!({"node": "old", "name": "b", "persistent": true}),
            "Bitmap already exists: b".to_owned(),
        ),
        (
            json!({"node": "n", "name": long}),
            format!("Bitmap name too long: {long}"),
        ),
        (
            json!({"node": "n", "name": long, "persistent": true}),
            format!(
                "Can't make bitmap '{long}' persistent in 'n': Name length exceeds maximum (1023 characters)"
            ),
        ),
        (
            json!({"node": "old", "name": "c", "persistent": true}),
            "Can't make bitmap 'c' persistent in 'old': Cannot store dirty bitmaps in qcow2 v2 files"
                .to_owned(),
        ),
    ];
    for (arguments, desc) in cases {
        refused(&world, "block-dirty-bitmap-add", arguments, &desc);
    }
    for node in ["c", "w", "flat", "fn"] {
        let desc = format!("Can't store persistent bitmaps to {node}: Operation not supported");
        let arguments = json!({"node": node, "name": "p", "persistent": true});
        refused(&world, "block-dirty-bitmap-add", arguments, &desc);
    }
    for granularity in [0u64, 1, 256, 511, 513, 768, (1 << 31) - 1] {
        let arguments = json!({"node": "n", "name": "g", "granularity": granularity});
        let desc = "Granularity must be power of 2 and at least 512";
        refused(&world, "block-dirty-bitmap-add", arguments, desc);
    }
    for granularity in [json!(1u64 << 32), json!(1u64 << 62), json!(-1)] {
        let arguments = json!({"node": "n", "name": "g", "granularity": granularity});
        let desc = "Parameter 'granularity' expects uint32_t";
        refused(&world, "block-dirty-bitmap-add", arguments, desc);
    }
    let arguments = json!({"node": "n", "name": "g", "granularity": "x"});
    refused(
        &world,
        "block-dirty-bitmap-add",
        arguments,
        "Parameter 'granularity' expects uint64",
    );
    add(
        &mut world,
        "n",
        "g",
        json!({"granularity": 1u64 << 31, "persistent": true}),
    );
}

#[test]
fn a_bitmap_needs_a_name_that_is_there() {
    let mut world = world();
    for name in ["remove", "clear", "enable", "disable"] {
        let refusal = |world: &mut World, node, bitmap| verb(world, name, node, bitmap).unwrap_err().desc;
        assert_eq!(refusal(&mut world, "x", "b"), "Node 'x' not found");
        assert_eq!(refusal(&mut world, "", ""), "Node '' not found");
        assert_eq!(refusal(&mut world, "n", "b"), "Dirty bitmap 'b' not found");
    }
    let sha = "x-debug-block-dirty-bitmap-sha256";
    refused(
        &world,
        sha,
        json!({"node": "n", "name": "b"}),
        "Dirty bitmap 'b' not found",
    );
}

#[test]
fn granularity_follows_the_cluster_size_within_bounds() {
    let mut world = world();
    for node in ["n", "c", "fn"] {
        add(&mut world, node, "b", json!({}));
        assert_eq!(bitmap(&world, node, "b").granularity, 65536);
    }
    let clusters = |cluster_size| {
        let mut world = World::new([image("/i", MIB, cluster_size)]);
        let file = json!({"driver": "file", "filename": "/i"});
        ok(
            &mut world,
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "i", "file": file}),
        );
        ok(
            &mut world,
            "blockdev-add",
            json!({"driver": "raw", "node-name": "r", "file": "i"}),
        );
        ["i", "r"].map(|node| {
            add(&mut world, node, "b", json!({}));
            bitmap(&world, node, "b").granularity
        })
    };
    assert_eq!(clusters(512), [4096, 4096]);
    assert_eq!(clusters(8192), [8192, 8192]);
    assert_eq!(clusters(2 * MIB), [65536, 65536]);
}

#[test]
fn requests_mark_their_node_and_what_is_plainly_below() {
    let mut world = world();
    for node in ["n", "c", "w", "flat", "fflat", "fn"] {
        add(&mut world, node, "b", json!({"granularity": 512}));
    }
    write(&mut world, "c", 512, 512);
    assert_eq!((count(&world, "c", "b"), count(&world, "n", "b")), (512, 512));
    assert_eq!(
        bitmap(&world, "fn", "b").dirty,
        None,
        "where qcow2 writes is its own affair"
    );
    write(&mut world, "w", 0, 1);
    assert_eq!(bitmap(&world, "w", "b").image().unwrap()[0], 1);
    for node in ["flat", "fflat"] {
        assert_eq!(
            bitmap(&world, node, "b").image().unwrap()[0],
            4,
            "{node}: 1024 bytes further on"
        );
    }
    let id = world.graph.find("w").unwrap();
    world.guest_discarded(id, 0..65536);
    assert_eq!(count(&world, "w", "b"), 512, "the window passes no discards on");
    let id = world.graph.find("c").unwrap();
    world.guest_discarded(id, 65536..131_072);
    assert_eq!((count(&world, "c", "b"), count(&world, "n", "b")), (66048, 66048));
    verb(&mut world, "disable", "n", "b").unwrap();
    write(&mut world, "c", 0, MIB);
    assert_eq!((count(&world, "c", "b"), count(&world, "n", "b")), (MIB, 66048));
    verb(&mut world, "clear", "n", "b").unwrap();
    verb(&mut world, "enable", "n", "b").unwrap();
    write(&mut world, "n", 0, 0);
    assert_eq!(count(&world, "n", "b"), 0);
}

#[test]
fn merging() {
    let mut world = world();
    for (node, name, granularity) in [
        ("n", "a", 512),
        ("n", "t", 4096),
        ("m", "a", 65536),
        ("w", "a", 512),
    ] {
        add(&mut world, node, name, json!({ "granularity": granularity }));
    }
    write(&mut world, "n", 8192, 1);
    write(&mut world, "m", MIB - 1, 1);
    verb(&mut world, "clear", "n", "t").unwrap();
    let merge = |bitmaps| json!({"node": "n", "target": "t", "bitmaps": bitmaps});
    let name = "block-dirty-bitmap-merge";
    let cases = [
        (json!(["a", "y"]), "Dirty bitmap 'y' not found"),
        (json!(["a", {"node": "x", "name": "y"}]), "Node 'x' not found"),
        (
            json!(["a", {"node": "m", "name": "y"}]),
            "Dirty bitmap 'y' not found",
        ),
        (json!([{}]), "Parameter 'bitmaps[0].node' is missing"),
        (json!([{"node": "n"}]), "Parameter 'bitmaps[0].name' is missing"),
        (
            json!([{"node": "n"}, 1]),
            "Parameter 'bitmaps[0].name' is missing",
        ),
        (
            json!([{"node": "n", "name": "a", "x": 1}]),
            "Parameter 'bitmaps[0].x' is unexpected",
        ),
        (
            json!([1]),
            "Invalid parameter type for 'null', expected: BlockDirtyBitmapOrStr",
        ),
        (
            json!("a"),
            "Invalid parameter type for 'bitmaps', expected: array",
        ),
        (
            json!(["a", {"node": "w", "name": "a"}]),
            "Bitmaps are of different sizes (destination size is 1048576, source size is 262144) and can't be merged",
        ),
    ];
    for (bitmaps, desc) in cases {
        refused(&world, name, merge(bitmaps), desc);
    }
    refused(
        &world,
        name,
        json!({"node": "n", "target": "t"}),
        "Parameter 'bitmaps' is missing",
    );
    let nobody = json!({"node": "n", "target": "y", "bitmaps": ["z"]});
    refused(&world, name, nobody, "Dirty bitmap 'y' not found");
    ok(&mut world, name, merge(json!([])));
    assert_eq!(count(&world, "n", "t"), 0);
    ok(
        &mut world,
        name,
        merge(json!(["a", "t", {"node": "m", "name": "a"}])),
    );
    assert_eq!(count(&world, "n", "t"), 4096 + 65536);
    ok(
        &mut world,
        name,
        json!({"node": "n", "target": "a", "bitmaps": ["t"]}),
    );
    assert_eq!(count(&world, "n", "a"), 4096 + 65536);
}

#[test]
fn what_an_export_shows_is_busy() {
    let mut world = world();
    add(&mut world, "n", "b", json!({}));
    add(&mut world, "n", "d", json!({"disabled": true}));
    add(&mut world, "m", "b", json!({}));
    let export = |id: &str, node: &str, writable: bool, bitmaps: Value| json!({"type": "nbd", "id": id, "node-name": node, "name": id, "writable": writable, "bitmaps": bitmaps});
    let name = "block-export-add";
    refused(
        &world,
        name,
        export("e", "n", false, json!(["b"])),
        "Enabled bitmap 'b' incompatible with readonly export",
    );
    refused(
        &world,
        name,
        export("e", "n", false, json!(["x"])),
        "Bitmap 'x' is not found",
    );
    refused(
        &world,
        name,
        export("e", "n", false, json!([{"node": "x", "name": "b"}])),
        "Node 'x' not found",
    );
    ok(
        &mut world,
        name,
        export("e", "c", true, json!(["b", {"node": "m", "name": "b"}, "d"])),
    );
    let busy = "Bitmap 'b' is currently in use by another operation and cannot be used";
    for wanted in ["remove", "clear", "enable", "disable"] {
        assert_eq!(verb(&mut world, wanted, "n", "b").unwrap_err().desc, busy);
    }
    refused(&world, name, export("f", "m", true, json!(["b"])), busy);
    let merge = json!({"node": "n", "target": "b", "bitmaps": []});
    refused(&world, "block-dirty-bitmap-merge", merge, busy);
    refused(
        &world,
        "blockdev-del",
        json!({"node-name": "m"}),
        "Block device m is in use",
    );
    write(&mut world, "n", 0, 1);
    assert_eq!(count(&world, "n", "b"), 65536, "it goes on recording");
    ok(
        &mut world,
        "block_resize",
        json!({"node-name": "m", "size": 2 * MIB}),
    );
    ok(&mut world, "block-export-del", json!({"id": "e", "mode": "hard"}));
    verb(&mut world, "clear", "n", "b").unwrap();
    ok(&mut world, "blockdev-del", json!({"node-name": "m"}));
}

#[test]
fn a_transaction_takes_everything_back() {
    let mut world = world();
    add(
        &mut world,
        "n",
        "a",
        json!({"granularity": 4096, "persistent": true}),
    );
    add(&mut world, "n", "b", json!({"granularity": 4096}));
    write(&mut world, "n", 0, 8192);
    verb(&mut world, "clear", "n", "a").unwrap();
    let of = |name: &str| json!({"node": "n", "name": name});
    let merge = json!({"node": "n", "target": "a", "bitmaps": ["b"]});
    let before = world.clone();
    let actions = [
        ("block-dirty-bitmap-add", of("c")),
        ("block-dirty-bitmap-merge", merge.clone()),
        ("block-dirty-bitmap-clear", of("b")),
        ("block-dirty-bitmap-disable", of("a")),
        ("block-dirty-bitmap-remove", of("b")),
        ("abort", json!({})),
    ];
    let refusal = transaction(&mut world, &actions).unwrap_err();
    assert_eq!(refusal.desc, "Transaction aborted using Abort action");
    assert_eq!(world, before);
    transaction(&mut world, &actions[..5]).unwrap();
    assert_eq!(count(&world, "n", "a"), 8192);
    assert!(!bitmap(&world, "n", "a").enabled);
    assert_eq!(world.graph.node(world.graph.find("n").unwrap()).bitmaps.len(), 2);

    let busy = "Bitmap 'a' is currently in use by another operation and cannot be used";
    for next in ["block-dirty-bitmap-remove", "block-dirty-bitmap-clear"] {
        let refusal = transaction(
            &mut world,
            &[("block-dirty-bitmap-remove", of("a")), (next, of("a"))],
        );
        assert_eq!(refusal.unwrap_err().desc, busy);
    }
    let again = [
        ("block-dirty-bitmap-remove", of("a")),
        ("block-dirty-bitmap-add", of("a")),
    ];
    assert_eq!(
        transaction(&mut world, &again).unwrap_err().desc,
        "Bitmap already exists: a"
    );
    let grouped = json!({"actions": [{"type": "block-dirty-bitmap-add", "data": of("z")}], "properties": {"completion-mode": "grouped"}});
    let desc =
        "Action 'block-dirty-bitmap-add' does not support transaction property completion-mode = grouped";
    refused(&world, "transaction", grouped, desc);
    let missing =
        json!({"actions": [{"type": "block-dirty-bitmap-merge", "data": {"node": "n", "target": "a"}}]});
    refused(
        &world,
        "transaction",
        missing,
        "Parameter 'actions[0].data.bitmaps' is missing",
    );
}

#[test]
fn an_image_holds_bitmaps_while_it_is_closed_or_read_only() {
    let mut world = world();
    ok(&mut world, "blockdev-del", json!({"node-name": "c"}));
    add(&mut world, "n", "p", json!({"persistent": true}));
    add(
        &mut world,
        "n",
        "d",
        json!({"persistent": true, "disabled": true, "granularity": 512}),
    );
    add(&mut world, "n", "t", json!({}));
    write(&mut world, "n", 0, 1);
    let stored = |world: &World| -> Vec<(String, bool, bool)> {
        let header = world.files["/n"].qcow2.as_ref().unwrap();
        let bitmap = |b: &blkcheck_model::StoredBitmap| (b.name.to_string(), b.auto, b.in_use);
        header.bitmaps.iter().map(bitmap).collect()
    };
    assert_eq!(stored(&world), []);
    reopen(&mut world, true).unwrap();
    assert_eq!(
        stored(&world),
        [("d".into(), false, false), ("p".into(), true, false)]
    );
    let read_only = "Bitmap 'p' is readonly and cannot be modified";
    for name in ["clear", "remove"] {
        assert_eq!(verb(&mut world, name, "n", "p").unwrap_err().desc, read_only);
    }
    verb(&mut world, "disable", "n", "p").unwrap();
    verb(&mut world, "clear", "n", "t").unwrap();
    let from = json!({"node": "n", "target": "t", "bitmaps": ["p"]});
    ok(&mut world, "block-dirty-bitmap-merge", from);
    assert_eq!(count(&world, "n", "t"), 65536);
    add(&mut world, "n", "late", json!({"persistent": true}));
    assert_eq!(
        reopen(&mut world.clone(), true).unwrap_err().desc,
        "No write access"
    );
    reopen(&mut world, false).unwrap();
    assert_eq!(
        stored(&world),
        [("d".into(), false, true), ("p".into(), true, true)]
    );
    verb(&mut world, "remove", "n", "d").unwrap();
    assert_eq!(stored(&world), [("p".into(), true, true)]);
    ok(&mut world, "blockdev-del", json!({"node-name": "n"}));
    assert_eq!(
        stored(&world),
        [("p".into(), false, false), ("late".into(), true, false)]
    );

    let open = json!({"driver": "qcow2", "node-name": "n", "file": "fn", "discard": "unmap"});
    ok(&mut world, "blockdev-add", open.clone());
    assert_eq!(count(&world, "n", "p"), 65536);
    assert!(!bitmap(&world, "n", "p").enabled && bitmap(&world, "n", "late").enabled);
    ok(
        &mut world,
        "block_resize",
        json!({"node-name": "n", "size": 2 * MIB}),
    );
    // The layer is gone; another one opens what it left.
    let files: Vec<_> = world
        .files
        .iter()
        .map(|(name, facts)| (name.clone(), (**facts).clone()))
        .collect();
    let mut world = World::new(files);
    ok(
        &mut world,
        "blockdev-add",
        json!({"driver": "file", "node-name": "fn", "filename": "/n"}),
    );
    ok(&mut world, "blockdev-add", open);
    let inconsistent = "Bitmap 'p' is inconsistent and cannot be used";
    assert!(bitmap(&world, "n", "p").inconsistent && !bitmap(&world, "n", "late").enabled);
    for name in ["clear", "enable", "disable"] {
        assert_eq!(verb(&mut world, name, "n", "p").unwrap_err().desc, inconsistent);
    }
    refused(
        &world,
        "block_resize",
        json!({"node-name": "n", "size": MIB}),
        inconsistent,
    );
    verb(&mut world, "remove", "n", "p").unwrap();
    assert_eq!(stored(&world), [("late".into(), true, true)]);
}

#[test]
fn a_snapshot_leaves_bitmaps_with_their_nodes() {
    let mut world = world();
    ok(&mut world, "blockdev-del", json!({"node-name": "c"}));
    add(&mut world, "n", "p", json!({"persistent": true}));
    add(&mut world, "n", "t", json!({}));
    let export = json!({"type": "nbd", "id": "e", "node-name": "n", "writable": true});
    ok(&mut world, "block-export-add", export);
    write(&mut world, "n", 0, 1);
    let actions = [
        ("blockdev-snapshot", json!({"node": "n", "overlay": "m"})),
        ("block-dirty-bitmap-add", json!({"node": "m", "name": "since"})),
    ];
    transaction(&mut world, &actions).unwrap();
    let top = world.export_node("e").unwrap();
    world.guest_wrote(top, 65536..65537);
    assert_eq!(
        (count(&world, "n", "t"), count(&world, "m", "since")),
        (65536, 65536)
    );
    assert!(bitmap(&world, "n", "p").read_only && !bitmap(&world, "n", "t").read_only);
    assert!(!world.files["/n"].qcow2.as_ref().unwrap().bitmaps[0].in_use);
}
