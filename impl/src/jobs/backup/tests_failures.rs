//! Backups when source or target fail: policies by side, what guests notice, what a failure leaves.

use serde_json::{Value, json};

use crate::error::Errno;
use crate::jobs::JobStatus;
use crate::jobs::testing::{KIB, MIB, World};
use crate::types::ReqFlags;

const CLUSTER: u64 = 64 * KIB;

/// A raw source of 1 MiB full of 3, a raw target; `file` fails once at cluster 4.
fn world(file: &str, errno: Errno) -> World {
    let world = World::new(1);
    world.memory.create_with("src", &vec![3; crate::io::size(MIB)]);
    world.memory.create_with("tgt", &vec![0; crate::io::size(MIB)]);
    for name in ["src", "tgt"] {
        world.qmp(
            "blockdev-add",
            json!({"driver": "raw", "node-name": name, "file": {"driver": "file", "filename": name}}),
        );
    }
    let op = if file == "src" { "read" } else { "write" };
    let at = 4 * CLUSTER;
    world.fail(file, op, (at, at + 512), errno, 1);
    world
}

fn start(world: &World, more: Value) {
    let mut all = json!({"job-id": "j", "device": "src", "target": "tgt", "sync": "full", "auto-dismiss": false,
        "x-perf": {"max-chunk": CLUSTER, "max-workers": 1}});
    if let (Some(all), Value::Object(more)) = (all.as_object_mut(), more) {
        all.extend(more);
    }
    world.qmp("blockdev-backup", all);
}

const START: &str = ".created .running .paused .running";

#[test]
fn each_side_has_its_policy() {
    for (file, policy, other) in [
        ("src", "on-source-error", "on-target-error"),
        ("tgt", "on-target-error", "on-source-error"),
    ] {
        for (errno, action) in [(Errno::EIO, "report"), (Errno::EIO, "enospc")] {
            let world = world(file, errno);
            start(&world, json!({policy: action, other: "ignore"}));
            world.until("j", JobStatus::Concluded);
            assert_eq!(
                world.take_script(),
                format!("{START} ERROR(report) .aborting COMPLETED(error) .concluded")
            );
            let info = world.qmp("query-block-jobs", json!({}))[0].clone();
            assert_eq!(info["offset"], json!(4 * CLUSTER), "what was copied before");
            assert_eq!(info["len"], json!(MIB));
            assert_eq!(info["error"], json!("Input/output error"));
        }
        let world = world(file, Errno::EIO);
        start(&world, json!({policy: "ignore", other: "report"}));
        world.until("j", JobStatus::Concluded);
        assert_eq!(
            world.take_script(),
            format!("{START} ERROR(ignore) .waiting .pending COMPLETED .concluded"),
            "it is tried again"
        );
        assert!(world.read_all("tgt") == world.read_all("src"));
    }
}

#[test]
fn stopped_it_waits_and_tries_again() {
    for (file, policy, action, errno, status) in [
        ("src", "on-source-error", "stop", Errno::EIO, "failed"),
        ("tgt", "on-target-error", "enospc", Errno::ENOSPC, "nospace"),
    ] {
        let world = world(file, errno);
        start(&world, json!({policy: action}));
        world.settle();
        world.until("j", JobStatus::Paused);
        let info = world.qmp("query-block-jobs", json!({}))[0].clone();
        assert_eq!(info["io-status"], json!(status));
        world.qmp("block-job-resume", json!({"device": "j"}));
        world.until("j", JobStatus::Concluded);
        assert_eq!(
            world.take_script(),
            format!("{START} ERROR(stop) .paused .running .waiting .pending COMPLETED .concluded")
        );
        assert!(world.read_all("tgt") == world.read_all("src"));
    }
}

#[test]
fn a_guest_pays_for_its_own_copy_and_the_job_goes_on() {
    let world = world("tgt", Errno::ENOSPC);
    start(&world, json!({"sync": "none", "filter-node-name": "f"}));
    let write = |offset: u64| {
        world.with_export("f", async |guest| {
            guest.write(offset, &[9; 512], ReqFlags::empty()).await
        })
    };
    assert_eq!(write(4 * CLUSTER), Err(Errno::ENOSPC));
    assert!(
        world.read_all("f").iter().all(|b| *b == 3),
        "nothing was overwritten"
    );
    assert_eq!(write(4 * CLUSTER), Ok(()));
    world.settle();
    assert_eq!(
        world.layer.job("j").expect("it runs").status(),
        JobStatus::Running
    );
    world.qmp("job-cancel", json!({"id": "j"}));
    world.until("j", JobStatus::Concluded);
    assert!(!world.take_script().contains("ERROR"));
    let cluster = crate::io::size(4 * CLUSTER)..crate::io::size(5 * CLUSTER);
    assert!(world.read_all("tgt")[cluster].iter().all(|b| *b == 3));
}

#[test]
fn what_failed_is_marked_with_always_and_all_is_kept_with_on_success() {
    for (mode, marks) in [("always", (4..16).collect::<Vec<u64>>()), ("on-success", vec![0])] {
        let world = world("src", Errno::EIO);
        world.qmp("block-dirty-bitmap-add", json!({"node": "src", "name": "b"}));
        world.fill("src", 0, 512, 3);
        start(&world, json!({"bitmap": "b", "bitmap-mode": mode}));
        world.until("j", JobStatus::Concluded);
        let node = world.layer.node(world.layer.find_node("src").expect("a node"));
        let bitmap = node.bitmap("b").expect("a bitmap");
        let bits: Vec<u64> = bitmap.bits.borrow().runs().flatten().collect();
        assert_eq!(bits, marks, "{mode}");
        assert!(bitmap.enabled.get() && !bitmap.busy.get());
    }
}

#[test]
fn a_failing_question_fails_a_top_backup() {
    let world = World::new(1);
    world.qcow2("src", 64 * MIB, None);
    world.qcow2("tgt", 64 * MIB, None);
    world.open("src", "src", json!({}));
    world.fill("src", 0, 512, 3);
    world.qmp("blockdev-del", json!({"node-name": "src"}));
    for name in ["src", "tgt"] {
        world.open(name, name, json!({}));
    }
    // The tables are read for the first time.
    world.fail("src", "read", (0, 64 * MIB), Errno::EIO, 1);
    world.log.script.take();
    start(&world, json!({"sync": "top", "on-source-error": "ignore"}));
    world.until("j", JobStatus::Concluded);
    assert_eq!(
        world.take_script(),
        format!("{START} .aborting COMPLETED(error) .concluded"),
        "no policy is asked"
    );
}
