//! Backups in transactions: together or each for itself, taken back, and with other actions.

use serde_json::{Value, json};

use crate::error::Errno;
use crate::jobs::JobStatus;
use crate::jobs::testing::{KIB, MIB, World};

const CLUSTER: u64 = 64 * KIB;

/// Three sources `s1`… full of their number, with bitmaps, and targets.
fn world() -> World {
    let world = World::new(1);
    for n in 1..4u8 {
        let (source, target) = (format!("s{n}"), format!("t{n}"));
        for name in [&source, &target] {
            world.qcow2(name, MIB, None);
            world.open(name, name, json!({}));
        }
        world.fill(&source, 0, 8 * CLUSTER, n);
        world.qmp("block-dirty-bitmap-add", json!({"node": source, "name": "b"}));
        world.fill(&source, 0, 512, n);
    }
    world.log.script.take();
    world
}

fn backup(n: u8, more: Value) -> Value {
    let mut data = json!({"job-id": format!("j{n}"), "device": format!("s{n}"), "target": format!("t{n}"),
        "sync": "full", "bitmap": "b", "bitmap-mode": "on-success"});
    if let (Some(data), Value::Object(more)) = (data.as_object_mut(), more) {
        data.extend(more);
    }
    json!({"type": "blockdev-backup", "data": data})
}

fn grouped(actions: &[Value]) -> Value {
    json!({"actions": actions, "properties": {"completion-mode": "grouped"}})
}

impl World {
    fn is_dirty(&self, node: &str) -> bool {
        let node = self.layer.node(self.layer.find_node(node).expect("a node"));
        let bitmap = node.bitmap("b").expect("a bitmap");
        assert!(!bitmap.busy.get() && bitmap.enabled.get());
        let count = bitmap.bits.borrow().count();
        count > 0
    }
}

const TWO: &str = ".created .created .running .paused .running .paused";

#[test]
fn all_wait_for_the_last_and_end_together() {
    let world = world();
    let slow = backup(1, json!({"speed": 1}));
    world.qmp("transaction", grouped(&[slow, backup(2, json!({}))]));
    world.until("j2", JobStatus::Waiting);
    world.settle();
    assert_eq!(
        world.layer.job("j1").expect("it runs").status(),
        JobStatus::Running
    );
    world.qmp("block-job-set-speed", json!({"device": "j1", "speed": 0}));
    world.until("j1", JobStatus::Null);
    let script = world.take_script();
    assert!(script.starts_with(TWO), "{script}");
    assert!(
        script.ends_with(
            ".waiting .waiting .pending .pending COMPLETED .concluded .null COMPLETED .concluded .null"
        ),
        "{script}"
    );
    assert!(!world.is_dirty("s1") && !world.is_dirty("s2"));
    world.assert_clean();
}

#[test]
fn one_that_fails_ends_all() {
    let world = world();
    world.fail("t1", "write", (0, 64 * MIB), Errno::EIO, 1);
    let waiting = backup(2, json!({"auto-dismiss": false}));
    world.qmp(
        "transaction",
        grouped(&[backup(1, json!({"auto-dismiss": false})), waiting]),
    );
    world.until("j1", JobStatus::Concluded);
    world.until("j2", JobStatus::Concluded);
    let script = world.take_script();
    assert!(script.contains("ERROR(report) .aborting"), "{script}");
    assert!(
        script.contains("COMPLETED(error)") && script.contains("CANCELLED"),
        "{script}"
    );
    assert!(
        world.is_dirty("s1") && world.is_dirty("s2"),
        "no bitmap went ahead"
    );
    let error = |job: &str| world.layer.job(job).expect("concluded").info()["error"].clone();
    assert_eq!(
        (error("j1"), error("j2")),
        (json!("Input/output error"), json!("Operation canceled"))
    );
    world.mend();
    for job in ["j1", "j2"] {
        world.qmp("job-dismiss", json!({"id": job}));
    }
    world.assert_clean();
}

#[test]
fn one_that_is_cancelled_ends_all_also_those_that_wait() {
    for cancelled in ["j1", "j2"] {
        let world = world();
        let none = json!({"sync": "none", "bitmap": null});
        let mut running = backup(1, none);
        running["data"]
            .as_object_mut()
            .expect("an object")
            .remove("bitmap");
        running["data"]
            .as_object_mut()
            .expect("an object")
            .remove("bitmap-mode");
        world.qmp("transaction", grouped(&[running, backup(2, json!({}))]));
        world.until("j2", JobStatus::Waiting);
        world.log.script.take();
        world.qmp("job-cancel", json!({"id": cancelled}));
        world.until("j1", JobStatus::Null);
        world.until("j2", JobStatus::Null);
        assert_eq!(
            world.take_script(),
            if cancelled == "j1" {
                ".aborting .aborting CANCELLED .concluded .null CANCELLED .concluded .null"
            } else {
                ".aborting CANCELLED .concluded .null .aborting CANCELLED .concluded .null"
            },
            "the newest first"
        );
        assert!(world.is_dirty("s2"));
        world.assert_clean();
    }
}

#[test]
fn one_that_is_to_be_told_keeps_all_waiting() {
    let world = world();
    let manual = json!({"auto-finalize": false});
    world.qmp("transaction", grouped(&[backup(1, manual), backup(2, json!({}))]));
    world.until("j2", JobStatus::Pending);
    world.settle();
    assert!(world.take_script().ends_with(".pending .pending PENDING"));
    world.qmp("job-finalize", json!({"id": "j2"}));
    assert_eq!(
        world.take_script(),
        "COMPLETED .concluded .null COMPLETED .concluded .null",
        "finalize is for all"
    );
    world.assert_clean();
}

#[test]
fn each_for_itself_without_grouping() {
    let world = world();
    world.fail("t1", "write", (0, 64 * MIB), Errno::EIO, 1);
    let actions = json!([backup(1, json!({})), backup(2, json!({}))]);
    world.qmp("transaction", json!({"actions": actions}));
    world.until("j1", JobStatus::Null);
    world.until("j2", JobStatus::Null);
    assert!(world.is_dirty("s1") && !world.is_dirty("s2"));
    world.assert_clean();
}

#[test]
fn a_refusal_takes_made_jobs_back() {
    let world = world();
    let bad = backup(3, json!({"device": "x"}));
    for (actions, text, made) in [
        (
            json!({"actions": [backup(1, json!({})), {"type": "abort", "data": {}}]}),
            "Transaction aborted using Abort action",
            1,
        ),
        (
            json!({"actions": [backup(1, json!({})), backup(2, json!({"target": "t1"}))]}),
            "Node 't1' is busy: block device is in use by block job: backup",
            1,
        ),
        // The daemon hangs here for ever.
        (
            grouped(&[backup(1, json!({})), backup(2, json!({})), bad]),
            "Cannot find device='x' nor node-name='x'",
            2,
        ),
    ] {
        world.log.script.take();
        world.refused("transaction", actions, text);
        let script = world.take_script();
        let ends = script.matches(".aborting").count();
        assert_eq!((ends, script.matches(".null").count()), (made, made), "{script}");
        assert!(!script.contains("CANCELLED"), "none of them ever ran: {script}");
        assert!((1..4).all(|n| world.is_dirty(&format!("s{n}"))));
    }
    world.assert_clean();
}

#[test]
fn a_filter_that_goes_may_be_a_source_in_the_same_transaction() {
    let world = world();
    let mut second = backup(2, json!({"device": "f"}));
    for key in ["bitmap", "bitmap-mode"] {
        second["data"].as_object_mut().expect("an object").remove(key);
    }
    let actions = json!([backup(1, json!({"filter-node-name": "f"})), second]);
    let text = "Node 'f' is busy: block device is in use by block job: backup";
    world.refused("transaction", json!({"actions": actions}), text);
    world.assert_clean();
}

#[test]
fn only_backups_can_be_grouped() {
    let world = world();
    world.refused(
        "transaction",
        grouped(&[backup(1, json!({})), json!({"type": "abort", "data": {}})]),
        "Action 'abort' does not support transaction property completion-mode = grouped",
    );
}

#[test]
fn with_snapshots_and_bitmaps_in_one_instant() {
    for fails in [false, true] {
        let world = world();
        world.qcow2("o1", MIB, None);
        world.open("o1", "o1", json!({"backing": null}));
        let before = world.read_all("s1");
        let mut actions = vec![
            json!({"type": "block-dirty-bitmap-add", "data": {"node": "s1", "name": "new"}}),
            backup(1, json!({"speed": 1, "filter-node-name": "f"})),
            json!({"type": "blockdev-snapshot", "data": {"node": "s1", "overlay": "o1"}}),
        ];
        if fails {
            actions.push(json!({"type": "abort", "data": {}}));
            let text = "Transaction aborted using Abort action";
            world.refused("transaction", json!({"actions": actions}), text);
            assert!(world.backing_of("o1").is_none());
            assert!(world.is_dirty("s1"));
        } else {
            world.qmp("transaction", json!({"actions": actions}));
            assert_eq!(
                world.backing_of("o1").as_deref(),
                Some("s1"),
                "above the node, below the filter"
            );
            world.fill("f", 0, 512, 0x44);
        }
        if !fails {
            world.qmp("block-job-set-speed", json!({"device": "j1", "speed": 0}));
            world.until("j1", JobStatus::Null);
            assert!(world.read_all("t1") == before);
        }
        world.assert_clean();
    }
}

#[test]
fn shutdown_ends_a_group_of_which_some_wait() {
    let world = world();
    let slow = backup(1, json!({"speed": 1}));
    world.qmp("transaction", grouped(&[slow, backup(2, json!({}))]));
    world.until("j2", JobStatus::Waiting);
    world.memory.block_on(world.layer.shutdown());
    assert!(world.layer.jobs().is_empty());
}

#[test]
fn an_overlay_put_above_in_the_same_transaction_is_not_the_layer_that_is_copied() {
    let world = World::new(1);
    world.qcow2("base", MIB, None);
    world.qcow2("s1", MIB, Some(("base", "qcow2")));
    world.open("base", "base", json!({}));
    world.open("s1", "s1", json!({"backing": "base"}));
    world.fill("s1", 0, 8 * CLUSTER, 7);
    for name in ["t1", "o1"] {
        world.qcow2(name, MIB, None);
        world.open(name, name, json!({"backing": null}));
    }
    let before = world.read_all("s1");
    let data = json!({"job-id": "j1", "device": "s1", "target": "t1", "sync": "top"});
    world.qmp(
        "transaction",
        json!({"actions": [
            {"type": "blockdev-backup", "data": data},
            {"type": "blockdev-snapshot", "data": {"node": "s1", "overlay": "o1"}},
        ]}),
    );
    world.until("j1", JobStatus::Null);
    assert!(world.read_all("t1") == before);
    world.assert_clean();
}
