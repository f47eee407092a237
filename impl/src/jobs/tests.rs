//! Whole jobs with real drivers: contents, event scripts, refusals, drains, shutdown.

use std::rc::Rc;

use serde_json::{Value, json};

use crate::env::Env;
use crate::jobs::JobStatus;
use crate::jobs::testing::{KIB, MIB, World};
use crate::types::ReqFlags;

#[test]
fn streaming_to_each_base_keeps_the_content() {
    for parallelism in [1, 3] {
        for (arguments, backing) in [
            (json!({}), None),
            (json!({"base-node": "base"}), Some("base")),
            (json!({"base": "base"}), Some("base")),
            (json!({"bottom": "mid"}), Some("base")),
            (json!({"base-node": "mid"}), Some("mid")),
            (json!({"bottom": "top"}), Some("mid")),
        ] {
            let world = World::new(parallelism);
            world.chain();
            let before = ["top", "mid", "base"].map(|n| world.read_all(n));
            let mut arguments = arguments;
            arguments["device"] = json!("top");
            arguments["job-id"] = json!("j");
            world.qmp("block-stream", arguments.clone());
            world.until("j", JobStatus::Null);
            assert_eq!(world.backing_of("top").as_deref(), backing, "{arguments}");
            let header = backing.map(|name| (name.to_owned(), Some("qcow2".to_owned())));
            assert_eq!(world.header_of("top"), header, "{arguments}");
            assert_eq!(
                ["top", "mid", "base"].map(|n| world.read_all(n)),
                before,
                "{arguments}"
            );
            world.assert_clean();
            // A second run with the same base copies nothing.
            world.log.chunks.take();
            if arguments.get("bottom").is_none() {
                world.qmp("block-stream", arguments.clone());
                world.until("j", JobStatus::Null);
                assert!(
                    world.log.chunks.take().iter().all(|(_, _, copied)| !copied),
                    "{arguments}"
                );
            }
            // What the header says is what is there.
            world.memory.block_on(world.layer.shutdown());
            world.open("again", "top", json!({}));
            assert_eq!(world.read_all("again"), before[0], "{arguments}");
        }
    }
}

#[test]
fn progress_is_a_prefix_and_ends_at_the_length() {
    for parallelism in [1, 4] {
        let world = World::new(parallelism);
        world.chain();
        world.log.chunks.take();
        world.qmp("block-stream", json!({"device": "top", "job-id": "j"}));
        world.until("j", JobStatus::Null);
        let chunks = world.log.chunks.take();
        let mut at = 0;
        for (offset, bytes, _) in &chunks {
            assert_eq!(*offset, at);
            at += bytes;
        }
        assert_eq!(at, MIB);
        assert!(chunks.iter().any(|(_, _, copied)| *copied));
    }
}

#[test]
fn event_scripts() {
    let world = World::new(1);
    world.chain();
    let stream = |extra: Value| {
        let mut arguments = json!({"device": "top", "job-id": "j", "base-node": "base"});
        if let (Some(arguments), Value::Object(extra)) = (arguments.as_object_mut(), extra) {
            arguments.extend(extra);
        }
        world.log.script.take();
        world.qmp("block-stream", arguments);
    };
    let slow = || json!({"speed": 1, "auto-finalize": false, "auto-dismiss": false});

    // Hard cancel while it sleeps: the first chunk has passed.
    stream(slow());
    world.until("j", JobStatus::Running);
    world
        .memory
        .block_on(world.memory.sleep_until(world.memory.now() + 1_000_000));
    // Nothing in [0, 128 KiB) belongs to a streamed layer, which costs nothing; the next stretch is copied.
    assert_eq!(
        world.layer.job("j").expect("running").progress(),
        (256 * KIB, MIB)
    );
    world.qmp("job-cancel", json!({"id": "j"}));
    world.until("j", JobStatus::Concluded);
    assert_eq!(
        world.take_script(),
        ".created .running .aborting CANCELLED .concluded"
    );
    assert_eq!(
        world.qmp("query-jobs", json!({}))[0]["error"],
        json!("Operation canceled")
    );
    world.qmp("job-dismiss", json!({"id": "j"}));
    assert_eq!(world.take_script(), ".null");
    world.assert_clean();
    assert_eq!(world.backing_of("top").as_deref(), Some("mid"));

    // Cancel while paused by the user.
    stream(slow());
    world.qmp("job-pause", json!({"id": "j"}));
    world.until("j", JobStatus::Paused);
    world.refused("job-pause", json!({"id": "j"}), "Job is already paused");
    let text = "The block job for device 'j' is currently paused";
    world.refused("block-job-cancel", json!({"device": "j"}), text);
    world.qmp("block-job-cancel", json!({"device": "j", "force": true}));
    world.until("j", JobStatus::Concluded);
    assert_eq!(
        world.take_script(),
        ".created .running .paused .running .aborting CANCELLED .concluded"
    );
    world.qmp("block-job-dismiss", json!({"id": "j"}));

    // Pause and resume, then pending, then cancel there.
    stream(json!({"auto-finalize": false, "auto-dismiss": false}));
    world.qmp("block-job-pause", json!({"device": "j"}));
    world.until("j", JobStatus::Paused);
    world.qmp("block-job-resume", json!({"device": "j"}));
    world.until("j", JobStatus::Pending);
    world.refused(
        "job-resume",
        json!({"id": "j"}),
        "Can't resume a job that was not paused",
    );
    world.qmp("job-cancel", json!({"id": "j"}));
    assert_eq!(
        world.take_script(),
        ".created .running .paused .running .waiting .pending PENDING .aborting CANCELLED .concluded"
    );
    world.qmp("job-dismiss", json!({"id": "j"}));
    world.assert_clean();

    // Manual finalize and dismiss.
    stream(json!({"auto-finalize": false, "auto-dismiss": false}));
    world.until("j", JobStatus::Pending);
    assert_eq!(world.take_script(), ".created .running .waiting .pending PENDING");
    world.qmp("job-finalize", json!({"id": "j"}));
    assert_eq!(world.take_script(), "COMPLETED .concluded");
    // The nodes stay busy until the job is dismissed, the filter is gone.
    world.refused(
        "blockdev-del",
        json!({"node-name": "mid"}),
        "Node 'mid' is busy: block device is in use by block job: stream",
    );
    assert!(
        world
            .layer
            .nodes()
            .iter()
            .all(|node| node.facts.name != "copy-on-read")
    );
    world.qmp("job-dismiss", json!({"id": "j"}));
    world.assert_clean();

    // All automatic.
    stream(json!({}));
    world.until("j", JobStatus::Null);
    assert_eq!(
        world.take_script(),
        ".created .running .waiting .pending COMPLETED .concluded .null"
    );

    // Refused after the job came to be.
    let refusal = world.try_qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "speed": -1}),
    );
    assert_eq!(
        refusal.unwrap_err().desc,
        "Parameter 'speed' expects a non-negative value"
    );
    assert_eq!(world.take_script(), ".created .null");
    world.assert_clean();
}

#[test]
fn refusals() {
    let world = World::new(1);
    world.chain();
    world.qmp(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "other", "size": 512}),
    );
    let refused = |extra: Value, text: &str| {
        let mut arguments = json!({"device": "top", "job-id": "j"});
        if let (Some(arguments), Value::Object(extra)) = (arguments.as_object_mut(), extra) {
            arguments.extend(extra);
        }
        world.refused("block-stream", arguments, text);
    };
    refused(
        json!({"base": "a", "base-node": "b"}),
        "'base' and 'base-node' cannot be specified at the same time",
    );
    refused(
        json!({"base": "a", "bottom": "b"}),
        "'base' and 'bottom' cannot be specified at the same time",
    );
    refused(
        json!({"bottom": "a", "base-node": "b"}),
        "'bottom' and 'base-node' cannot be specified at the same time",
    );
    refused(
        json!({"device": "no"}),
        "Cannot find device='no' nor node-name='no'",
    );
    refused(json!({"base": "no"}), "Can't find 'no' in the backing chain");
    refused(
        json!({"base-node": "no"}),
        "Cannot find device='' nor node-name='no'",
    );
    refused(
        json!({"base-node": "top"}),
        "Node 'top' is not a backing image of 'top'",
    );
    refused(
        json!({"base-node": "other"}),
        "Node 'other' is not a backing image of 'top'",
    );
    refused(
        json!({"bottom": "no"}),
        "Cannot find device='' nor node-name='no'",
    );
    refused(
        json!({"bottom": "other"}),
        "Node 'other' is not in a chain starting from 'top'",
    );
    refused(
        json!({"backing-file": "x"}),
        "backing file specified, but streaming the entire chain",
    );
    refused(
        json!({"backing-file": "x", "bottom": "mid"}),
        "backing file specified, but streaming the entire chain",
    );
    refused(
        json!({"filter-node-name": "mid"}),
        "Could not create node: Duplicate nodes with node-name='mid'",
    );
    refused(
        json!({"filter-node-name": "9"}),
        "Could not create node: Invalid node-name: '9'",
    );
    refused(json!({"job-id": "9"}), "Invalid job ID '9'");

    world.qmp(
        "blockdev-add",
        json!({"driver": "copy-on-read", "node-name": "cor", "file": "top"}),
    );
    refused(
        json!({"device": "cor", "bottom": "cor"}),
        "Node 'cor' is a filter, use a non-filter node as 'bottom'",
    );
    refused(
        json!({"device": "cor", "base-node": "top"}),
        "'top' is not in the backing chain of 'cor'",
    );
    world.qmp("blockdev-del", json!({"node-name": "cor"}));
    world.assert_clean();

    // A running job: its id is taken, its nodes are busy.
    world.qmp(
        "block-stream",
        json!({"device": "mid", "job-id": "k", "speed": 1, "filter-node-name": "f"}),
    );
    world
        .memory
        .block_on(world.memory.sleep_until(world.memory.now() + 1_000_000));
    refused(
        json!({}),
        "Node 'f' is busy: block device is in use by block job: stream",
    );
    refused(
        json!({"device": "mid"}),
        "Node 'mid' is busy: block device is in use by block job: stream",
    );
    refused(
        json!({"job-id": "k", "base-node": "f"}),
        "Job ID 'k' already in use",
    );
    world.qmp("job-cancel", json!({"id": "k"}));
    world.until("k", JobStatus::Null);
    world.assert_clean();
}

#[test]
fn refusals_by_permissions_undo_everything() {
    let world = World::new(1);
    world.chain();
    // A writer on a node that would be streamed.
    let writer = json!({"type": "nbd", "id": "w", "node-name": "base", "writable": true});
    world.qmp("block-export-add", writer);
    let refusal = world
        .try_qmp("block-stream", json!({"device": "top", "job-id": "j"}))
        .unwrap_err();
    assert!(
        refusal
            .desc
            .starts_with("Permission conflict on node 'base': permissions 'write' are both required by"),
        "{refusal}"
    );
    world.qmp("block-export-del", json!({"id": "w"}));
    world.assert_clean();
}

#[test]
fn a_read_only_device_is_writable_for_the_time_of_the_job() {
    let world = World::new(1);
    world.qcow2("base", MIB, None);
    world.qcow2("mid", MIB, Some(("base", "qcow2")));
    world.qcow2("top", MIB, Some(("mid", "qcow2")));
    world.open("b", "base", json!({}));
    world.fill("b", 0, 64 * KIB, 9);
    world.qmp("blockdev-del", json!({"node-name": "b"}));
    let mid = json!({"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": "mid"}});
    world.open("top", "top", json!({"backing": mid}));
    let node = world.layer.node(world.layer.find_node("mid").expect("mid"));
    assert!(!node.is_writable());
    let before = world.read_all("top");
    world.qmp(
        "block-stream",
        json!({"device": "mid", "job-id": "j", "auto-finalize": false}),
    );
    world.until("j", JobStatus::Pending);
    assert!(node.is_writable());
    world.qmp("job-finalize", json!({"id": "j"}));
    assert!(!node.is_writable());
    assert_eq!(world.backing_of("mid"), None);
    assert_eq!(world.read_all("top"), before);
    world.assert_clean();

    // One whose file is another node cannot become writable when that is not.
    world.memory.block_on(world.layer.shutdown());
    let file = json!({"driver": "file", "node-name": "file", "filename": "top", "read-only": true});
    world.qmp("blockdev-add", file);
    world.qmp(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "ro", "file": "file", "read-only": true}),
    );
    world.refused(
        "block-stream",
        json!({"device": "ro", "job-id": "j"}),
        "Block node is read-only",
    );
    world.assert_clean();
}

#[test]
fn a_drain_parks_the_job_and_counts_its_edges() {
    let world = World::new(1);
    world.chain();
    let mid = world.layer.find_node("mid").expect("mid");
    world.memory.set_latency(10_000);
    world.qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "auto-dismiss": false}),
    );
    let job = world.layer.job("j").expect("the job");
    let drained = world.memory.block_on(world.layer.drained(mid));
    let parked = job.progress();
    world
        .memory
        .block_on(world.memory.sleep_until(world.memory.now() + 1_000_000));
    assert_eq!(job.status(), JobStatus::Paused);
    // Draining the middle drains what is above it too: its own edge, and those of the device and the filter.
    assert_eq!(job.pause_count(), 3);
    assert_eq!(job.progress(), parked);
    drop(drained);
    assert_eq!(job.pause_count(), 0);
    world.until("j", JobStatus::Concluded);
    world.qmp("job-dismiss", json!({"id": "j"}));
    world.assert_clean();
}

#[test]
fn nodes_without_backing_stream_to_nothing() {
    let world = World::new(1);
    world.qmp(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "n", "size": MIB, "read-zeroes": true}),
    );
    world.log.script.take();
    world.qmp("block-stream", json!({"device": "n", "job-id": "j"}));
    world.until("j", JobStatus::Null);
    assert_eq!(
        world.take_script(),
        ".created .running .waiting .pending COMPLETED .concluded .null"
    );
    world.assert_clean();
}

#[test]
fn guests_write_while_the_job_runs() {
    for parallelism in [1, 4] {
        let world = World::new(parallelism);
        world.chain();
        world.memory.set_latency(5000);
        let mut expected = world.read_all("top");
        world.qmp(
            "block-export-add",
            json!({"type": "nbd", "id": "g", "node-name": "top", "writable": true}),
        );
        world.qmp(
            "block-stream",
            json!({"device": "top", "job-id": "j", "base-node": "base"}),
        );
        let guest = world.layer.export("g").expect("an export");
        world.memory.block_on(async {
            for (at, byte) in [(0, 1), (130, 2), (300, 3), (510, 4), (700, 5), (1000, 6)] {
                let (offset, data) = (at * 1000 / 512 * 512, [byte; 1024]);
                guest
                    .write(offset, &data, ReqFlags::empty())
                    .await
                    .expect("written");
                let offset = usize::try_from(offset).expect("small");
                expected[offset..offset + 1024].copy_from_slice(&data);
            }
        });
        world.until("j", JobStatus::Null);
        assert_eq!(world.backing_of("top").as_deref(), Some("base"));
        assert_eq!(world.read_all("top"), expected);
        world.assert_clean();
    }
}

#[test]
fn shutdown_in_the_middle_leaves_nothing() {
    let world = World::new(1);
    world.chain();
    world.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "g", "node-name": "top", "writable": true}),
    );
    world.qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "speed": 1, "auto-dismiss": false}),
    );
    world.memory.block_on(world.layer.shutdown());
    let view = world.layer.inspect();
    assert!(
        view.nodes.is_empty() && view.edges.is_empty() && view.backends.is_empty(),
        "{view:?}"
    );
    world.assert_clean();
    assert!(world.layer.export("g").is_none());
}

#[test]
fn a_layer_dropped_in_the_middle_of_a_job_is_freed() {
    let world = World::new(1);
    world.chain();
    world.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "g", "node-name": "top", "writable": true}),
    );
    world.qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "auto-finalize": false, "auto-dismiss": false}),
    );
    world.until("j", JobStatus::Pending);
    let weak = Rc::downgrade(&world.layer.inner);
    drop(world);
    assert!(weak.upgrade().is_none(), "the layer owns itself");
}
