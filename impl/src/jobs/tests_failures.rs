//! Stream when something goes wrong: error policies, short layers, the order of flush and header.

use serde_json::json;

use crate::error::Errno;
use crate::jobs::JobStatus;
use crate::jobs::testing::{KIB, MIB, World};

const HALF: usize = 512 * 1024;

/// A raw base of 2 MiB, read in chunks; one read fails.
fn errors(on_error: &str, errno: Errno, times: u32) -> World {
    let world = World::new(1);
    world.memory.create_with("raw", &vec![3; 4 * HALF]);
    world.qcow2("top", 2 * MIB, Some(("raw", "raw")));
    world.open("top", "top", json!({}));
    world.fail("raw", "read", (512 * KIB, 513 * KIB), errno, times);
    world.log.script.take();
    world.qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "on-error": on_error, "auto-dismiss": false}),
    );
    world
}

#[test]
fn error_policies() {
    let info = |world: &World| world.qmp("query-block-jobs", json!({}))[0].clone();
    for (policy, errno) in [
        ("report", Errno::EIO),
        ("enospc", Errno::EIO),
        ("auto", Errno::EIO),
    ] {
        let world = errors(policy, errno, 1);
        world.until("j", JobStatus::Concluded);
        assert_eq!(
            world.take_script(),
            ".created .running ERROR(report) .aborting COMPLETED(error) .concluded"
        );
        assert_eq!(info(&world)["offset"], json!(524_288), "{policy}");
        assert_eq!(info(&world)["error"], json!("Input/output error"));
        assert!(world.backing_of("top").is_some());
    }
    // Ignored: it goes on to the end, fails there, and the chain stays.
    let world = errors("ignore", Errno::EIO, 1);
    world.until("j", JobStatus::Concluded);
    assert_eq!(
        world.take_script(),
        ".created .running ERROR(ignore) .aborting COMPLETED(error) .concluded"
    );
    assert_eq!(info(&world)["offset"], json!(2 * MIB));
    assert!(world.backing_of("top").is_some());
    assert_eq!(world.read_all("top"), vec![3; 4 * HALF]);
    // Stopped: it stands at the failed chunk and retries it.
    for (policy, errno, status) in [
        ("stop", Errno::EIO, "failed"),
        ("enospc", Errno::ENOSPC, "nospace"),
    ] {
        let world = errors(policy, errno, 1);
        world.until("j", JobStatus::Paused);
        assert_eq!(info(&world)["offset"], json!(524_288));
        assert_eq!(info(&world)["io-status"], json!(status));
        world.qmp("block-job-resume", json!({"device": "j"}));
        assert_eq!(info(&world)["io-status"], json!("ok"));
        world.until("j", JobStatus::Concluded);
        let script = ".created .running ERROR(stop) .paused .running .waiting .pending COMPLETED .concluded";
        assert_eq!(world.take_script(), script);
        assert_eq!(info(&world)["offset"], json!(2 * MIB));
        assert_eq!(world.read_all("top"), vec![3; 4 * HALF]);
    }
}

#[test]
fn with_several_in_flight_the_first_error_by_offset_counts() {
    let world = World::new(4);
    world.memory.create_with("raw", &vec![3; 32 * HALF]);
    world.qcow2("top", 16 * MIB, Some(("raw", "raw")));
    world.open("top", "top", json!({}));
    world.memory.set_latency(1000);
    world.fail("raw", "read", (4 * MIB, 4 * MIB + 1), Errno::ENOSPC, 1);
    world.fail("raw", "read", (6 * MIB, 6 * MIB + 1), Errno::EIO, 1);
    world.qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "auto-dismiss": false}),
    );
    world.until("j", JobStatus::Concluded);
    let info = world.qmp("query-jobs", json!({}))[0].clone();
    assert_eq!(info["error"], json!("No space left on device"));
    assert_eq!(info["current-progress"], json!(4 * MIB));
}

#[test]
fn zeroes_past_a_short_layer_stay_zeroes() {
    for parallelism in [1, 2] {
        let world = World::new(parallelism);
        world.memory.create_with("base", &vec![9; 4 * HALF]);
        world.qcow2("mid", MIB, Some(("base", "raw")));
        world.qcow2("top", 2 * MIB, Some(("mid", "qcow2")));
        world.open("top", "top", json!({}));
        let before = world.read_all("top");
        assert_eq!(before[2 * HALF..], vec![0; 2 * HALF]);
        world.qmp(
            "block-stream",
            json!({"device": "top", "job-id": "j", "base": "base"}),
        );
        world.until("j", JobStatus::Null);
        assert_eq!(
            world.header_of("top"),
            Some(("base".to_owned(), Some("raw".to_owned())))
        );
        assert_eq!(world.read_all("top"), before);
        world.assert_clean();
    }
}

#[test]
fn the_device_is_flushed_before_and_after_its_header_changes() {
    let world = World::new(1);
    world.chain();
    world.log.order.take();
    world.faults.log.take();
    world.qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "base-node": "base"}),
    );
    world.until("j", JobStatus::Null);
    // The whole node, before the link that makes layers go away, and after.
    let top = world.layer.find_node("top").expect("top").0;
    let order = world.log.order.take();
    let link = order
        .iter()
        .rposition(|step| *step == ("link", top))
        .expect("the link changes");
    assert!(
        order[..link].contains(&("flush", top)) && order[link..].contains(&("flush", top)),
        "{order:?}"
    );
    let log = world.faults.log.take();
    let of_top = |op: &'static str| {
        let hits = log
            .iter()
            .enumerate()
            .filter(move |(_, (file, what, _))| file == "top" && *what == op);
        hits.map(|(at, _)| at)
    };
    let header = log
        .iter()
        .rposition(|(file, op, offset)| file == "top" && *op == "write" && *offset == 0)
        .expect("the header is written");
    let last_data = of_top("write")
        .filter(|at| *at < header)
        .max()
        .expect("data was copied");
    assert!(
        of_top("flush").any(|at| at > last_data && at < header),
        "flushed before the header: {log:?}"
    );
    assert!(
        of_top("flush").any(|at| at > header),
        "flushed after the header: {log:?}"
    );
}

#[test]
fn a_failed_completion_leaves_the_chain_as_it_was() {
    for (op, range) in [("write", (0, 1)), ("flush", (0, 1))] {
        let world = World::new(1);
        world.chain();
        let before = world.read_all("top");
        let arguments = json!({"device": "top", "job-id": "j", "base-node": "base", "auto-finalize": false});
        world.qmp("block-stream", arguments);
        world.until("j", JobStatus::Pending);
        world.fail("top", op, range, Errno::EIO, u32::MAX);
        world.log.script.take();
        world.qmp("job-finalize", json!({"id": "j"}));
        assert_eq!(
            world.take_script(),
            ".aborting COMPLETED(error) .concluded .null",
            "{op}"
        );
        assert_eq!(world.backing_of("top").as_deref(), Some("mid"), "{op}");
        assert_eq!(
            world.header_of("top").map(|(file, _)| file).as_deref(),
            Some("mid"),
            "{op}"
        );
        world.mend();
        assert_eq!(world.read_all("top"), before, "{op}");
        world.assert_clean();
    }
}
