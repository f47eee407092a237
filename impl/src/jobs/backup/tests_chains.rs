//! A backup's place in the graph: the filter above the source, several of them, chains that change meanwhile.

use serde_json::json;

use super::tests::{CLUSTER, backup, world};
use crate::jobs::JobStatus;
use crate::jobs::testing::MIB;
use crate::types::{Perm, ReqFlags};

#[test]
fn several_backups_of_one_source() {
    let world = world();
    let before = world.read_all("src");
    world.qmp(
        "blockdev-backup",
        backup(json!({"speed": 1, "filter-node-name": "f"})),
    );
    world.fill("f", 0, 512, 0x21);
    let between = world.read_all("src");
    let second = json!({"job-id": "k", "target": "other", "speed": 1, "filter-node-name": "g"});
    world.qmp("blockdev-backup", backup(second));
    world.fill("f", 5 * CLUSTER, 512, 0x22);
    for job in ["j", "k"] {
        world.qmp("block-job-set-speed", json!({"device": job, "speed": 0}));
    }
    world.until("j", JobStatus::Null);
    world.until("k", JobStatus::Null);
    assert!(world.read_all("tgt") == before && world.read_all("other") == between);
    world.assert_clean();
}

#[test]
fn fleecing_shows_the_point_in_time_while_it_runs() {
    let world = world();
    world.qcow2("fleece", MIB, Some(("src", "qcow2")));
    world.open("fleece", "fleece", json!({"backing": "src"}));
    let before = world.read_all("src");
    world.qmp(
        "blockdev-backup",
        backup(json!({"sync": "none", "target": "fleece", "filter-node-name": "f"})),
    );
    for at in [0, 3, 15] {
        world.with_export("f", async |guest| {
            let write = guest.write(at * CLUSTER + 7, &[0x33; 700], ReqFlags::empty());
            write.await.expect("writes");
        });
        assert!(world.read_all("fleece") == before);
    }
    assert!(world.read_all("f") != before);
    world.qmp("job-cancel", json!({"id": "j"}));
    world.until("j", JobStatus::Null);
    world.assert_clean();
}

#[test]
fn a_filter_that_cannot_go_keeps_nothing_any_more() {
    let world = world();
    world.qcow2("over", MIB, Some(("src", "qcow2")));
    world.open("over", "over", json!({"backing": "src"}));
    world.qmp("blockdev-backup", backup(json!({"sync": "none"})));
    let frozen = json!({"driver": "copy-on-read", "node-name": "cor", "file": "over", "bottom": "src"});
    world.qmp("blockdev-add", frozen);
    world.qmp("job-cancel", json!({"id": "j"}));
    world.until("j", JobStatus::Null);
    assert_eq!(
        world.backing_of("over").as_deref(),
        Some("f"),
        "the link is frozen"
    );
    let target = world.layer.node(world.layer.find_node("tgt").expect("a node"));
    assert!(target.parents.borrow().is_empty() && target.blockers.borrow().is_empty());
    let before = world.read_all("tgt");
    world.fill("f", 0, 512, 0x71);
    assert!(world.read_all("tgt") == before);
    for name in ["cor", "over"] {
        world.qmp("blockdev-del", json!({"node-name": name}));
    }
    assert!(world.layer.find_node("f").is_none(), "it went with its parents");
    world.assert_clean();
}

#[test]
fn a_source_with_a_bitmap_in_use_stays_although_it_left_the_chain() {
    let world = world();
    world.add_bitmap("b");
    world.qcow2("over", MIB, None);
    world.open("over", "over", json!({"backing": null}));
    let before = world.read_all("src");
    world.qmp(
        "blockdev-backup",
        backup(json!({"bitmap": "b", "bitmap-mode": "on-success", "speed": 1})),
    );
    world.qmp("blockdev-snapshot", json!({"node": "src", "overlay": "over"}));
    world.qmp("block-stream", json!({"job-id": "s", "device": "over"}));
    world.until("s", JobStatus::Null);
    assert!(world.backing_of("over").is_none());
    let refused = world.try_qmp("blockdev-del", json!({"node-name": "src"}));
    assert_eq!(refused.expect_err("in use").desc, "Block device src is in use");
    world.qmp("block-job-set-speed", json!({"device": "j", "speed": 0}));
    world.until("j", JobStatus::Null);
    assert!(world.read_all("tgt") == before);
    assert_eq!(world.marks("b"), (vec![], true, false));
    world.qmp("blockdev-del", json!({"node-name": "src"}));
    world.assert_clean();
}

#[test]
fn masks_while_it_runs() {
    let world = world();
    world.qmp(
        "blockdev-backup",
        backup(json!({"sync": "none", "filter-node-name": "f"})),
    );
    let view = world.layer.inspect();
    let named = |name: &str| view.node_named(name).expect("a node").id;
    let edge = |name: &str, child: &str| {
        let found = |e: &&crate::graph::inspect::EdgeView| &*e.name == name && e.child == Some(named(child));
        let edge = view.edges.iter().find(found).expect("an edge");
        (edge.perm, edge.shared)
    };
    let (none, all) = (Perm::empty(), Perm::all());
    assert_eq!(edge("main node", "f"), (none, all));
    assert_eq!(
        edge("target", "tgt"),
        (Perm::WRITE, all - Perm::RESIZE),
        "the filter's"
    );
    assert_eq!(
        edge("file", "src"),
        (Perm::CONSISTENT_READ, all - Perm::WRITE - Perm::RESIZE),
        "although nobody but the job uses it"
    );
    // Somebody who writes beside the filter is refused.
    world.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "g", "node-name": "f", "writable": true}),
    );
    let text = "Node 'tgt' is busy: block device is in use by block job: backup";
    world.refused("blockdev-backup", backup(json!({"job-id": "k"})), text);
    let refused = world.try_qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "w", "node-name": "src", "writable": true}),
    );
    assert!(
        refused
            .expect_err("two writers")
            .desc
            .starts_with("Permission conflict on node 'src'")
    );
    world.qmp("block-export-del", json!({"id": "g"}));
    world.qmp("job-cancel", json!({"id": "j"}));
    world.until("j", JobStatus::Null);
    world.assert_clean();
}

#[test]
fn guests_go_through_the_filter_from_the_first_moment_to_the_last() {
    let world = world();
    let (exported, length) = (
        json!({"type": "nbd", "id": "g", "node-name": "src", "writable": true}),
        MIB,
    );
    world.qmp("block-export-add", exported);
    let guest = world.layer.export("g").expect("just added");
    let before = world.read_all("src");
    world.qmp(
        "blockdev-backup",
        backup(json!({"sync": "none", "filter-node-name": "f"})),
    );
    let filter = world.layer.find_node("f").expect("the filter");
    assert_eq!(guest.root(), Some(filter), "the export's edge moved");
    let write = |offset: u64| {
        world
            .memory
            .block_on(guest.write(offset, &[0x55; 4096], ReqFlags::empty()))
            .expect("writes");
    };
    write(4 * CLUSTER);
    world.settle();
    assert_eq!(
        world.layer.job("j").expect("it runs").progress(),
        (CLUSTER, length)
    );
    let range = crate::io::size(4 * CLUSTER)..crate::io::size(5 * CLUSTER);
    assert_eq!(world.read_all("tgt")[range.clone()], before[range]);
    world.qmp("job-cancel", json!({"id": "j"}));
    world.until("j", JobStatus::Null);
    assert_eq!(guest.root(), world.layer.find_node("src"), "and back");
    write(8 * CLUSTER);
    assert!(
        world.read_all("tgt")[crate::io::size(8 * CLUSTER)..]
            .iter()
            .all(|b| *b == 0)
    );
    world.qmp("block-export-del", json!({"id": "g"}));
    world.assert_clean();
}
