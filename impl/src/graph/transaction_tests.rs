//! Snapshots, transactions and resizing with real drivers.

use serde_json::{Value, json};

use crate::jobs::testing::{KIB, MIB, World};

fn snapshot(node: &str, overlay: &str) -> Value {
    json!({"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}})
}

fn world() -> World {
    let world = World::new(1);
    world.chain();
    for name in ["o1", "o2"] {
        world.qcow2(name, MIB, None);
        world.open(name, name, json!({"backing": null}));
    }
    world
}

#[test]
fn a_snapshot_keeps_what_guests_see_and_freezes_what_was() {
    let world = world();
    let before = world.read_all("top");
    world.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "top", "writable": true}),
    );
    world.qmp("blockdev-snapshot", json!({"node": "top", "overlay": "o1"}));
    let guest = world.layer.export("e").expect("an export");
    world
        .memory
        .block_on(guest.write(0, &[3; 4096], crate::types::ReqFlags::empty()))
        .expect("written");
    world.qmp("block-export-del", json!({"id": "e"}));
    assert_eq!(world.backing_of("o1").as_deref(), Some("top"));
    assert_eq!(world.read_all("top"), before);
    assert!(
        !world
            .layer
            .node(world.layer.find_node("top").expect("a node"))
            .is_writable()
    );
    let content = world.read_all("o1");
    assert_eq!((content[0], content[4096..] == before[4096..]), (3, true));
}

#[test]
fn refusals_of_snapshots() {
    let world = world();
    world.qmp(
        "blockdev-add",
        json!({"driver": "copy-on-read", "node-name": "c", "file": "o2"}),
    );
    world.qmp(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "z", "size": 4096}),
    );
    world.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "o1"}),
    );
    for (node, overlay, text) in [
        ("no", "o1", "Cannot find device='no' nor node-name='no'"),
        ("top", "no", "Cannot find device='no' nor node-name='no'"),
        (
            "mid",
            "o2",
            "Node 'mid' is busy: node is used as backing hd of 'top'",
        ),
        ("top", "o1", "The overlay is already in use"),
        ("top", "c", "Filters cannot be used as overlays"),
        ("top", "top", "The overlay already has a backing image"),
        ("top", "z", "The overlay does not support backing images"),
        (
            "o2",
            "o2",
            "Making 'o2' a backing child of 'o2' would create a cycle",
        ),
    ] {
        world.refused(
            "blockdev-snapshot",
            json!({"node": node, "overlay": overlay}),
            text,
        );
    }
}

#[test]
fn transactions_are_all_or_nothing() {
    let world = world();
    // The second overlay has a user of its own, which must stay there.
    world.qcow2("user", MIB, None);
    world.open("user", "user", json!({"backing": "o2"}));
    world.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "top", "writable": true}),
    );
    let abort = json!({"type": "abort", "data": {}});
    for (actions, text) in [
        (
            json!([snapshot("top", "o1"), abort]),
            "Transaction aborted using Abort action",
        ),
        (
            json!([snapshot("top", "o1"), snapshot("top", "o2")]),
            "Node 'top' is busy: node is used as backing hd of 'o1'",
        ),
        (
            json!([snapshot("top", "o1"), snapshot("o1", "o2"), abort]),
            "Transaction aborted using Abort action",
        ),
        (
            json!([{"type": "nope", "data": {}}]),
            "Parameter 'type' does not accept value 'nope'",
        ),
        (
            json!([{"type": "abort"}]),
            "Parameter 'actions[0].data' is missing",
        ),
    ] {
        world.refused("transaction", json!({"actions": actions}), text);
    }
    world.refused(
        "transaction",
        json!({"actions": [snapshot("top", "o1")], "properties": {"completion-mode": "grouped"}}),
        "Action 'blockdev-snapshot' does not support transaction property completion-mode = grouped",
    );
    assert_eq!(world.backing_of("user").as_deref(), Some("o2"));
    world.qmp(
        "transaction",
        json!({"actions": [snapshot("top", "o1"), snapshot("o1", "o2")]}),
    );
    assert_eq!(world.backing_of("o2").as_deref(), Some("o1"));
    assert_eq!(world.backing_of("o1").as_deref(), Some("top"));
    assert_eq!(world.backing_of("user").as_deref(), Some("o2"));
    assert_eq!(world.qmp("transaction", json!({"actions": []})), json!({}));
}

#[test]
fn resizing_grows_with_zeroes_and_cuts_off() {
    let world = world();
    let resize = |node: &str, size: u64| json!({"node-name": node, "size": size});
    world.refused(
        "block_resize",
        json!({"node-name": "no", "size": -1}),
        "Cannot find device='' nor node-name='no'",
    );
    world.refused(
        "block_resize",
        json!({"node-name": "top", "size": -1}),
        "Parameter 'size' expects a >0 size",
    );
    world.refused(
        "block_resize",
        resize("mid", 2 * MIB),
        "Node 'mid' is busy: node is used as backing hd of 'top'",
    );
    world.refused(
        "block_resize",
        resize("top", MIB + 1),
        "The new size must be a multiple of 512",
    );
    world.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "top"}),
    );
    world.refused(
        "block_resize",
        resize("top", 2 * MIB),
        "Permission conflict on node 'top': permissions 'resize' are both required by an unnamed block device (uses \
         node 'top' as 'root' child) and unshared by an unnamed block device (uses node 'top' as 'root' child).",
    );
    world.qmp("block-export-del", json!({"id": "e"}));
    let before = world.read_all("top");
    world.qmp("block_resize", resize("top", 100 * KIB));
    assert_eq!(world.read_all("top"), before[..100 * 1024]);
    world.qmp("block_resize", resize("top", MIB));
    let grown = world.read_all("top");
    assert_eq!(grown[..100 * 1024], before[..100 * 1024]);
    assert!(
        grown[100 * 1024..].iter().all(|b| *b == 0),
        "the backing file does not show in what grew"
    );
}
