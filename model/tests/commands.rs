//! Commands on one chain: the exact refusals, and the life of a stream. Texts are those of qemu-storage-daemon 10.0.

mod common;

use blkcheck_model::{JobStatus, Outcome, Perm, World};
use common::{MIB, flat, image, refused, run};
use serde_json::{Value, json};

/// n0 ← n1 ← n2 ← n3, each a writable qcow2 over its own file; `c` is free-standing.
fn chain() -> World {
    let mut world = World::new((0..4).map(|n| image(&format!("/f{n}"), MIB, 65536)));
    for n in 0..4_usize {
        let backing = n.checked_sub(1).map(|n| format!("n{n}"));
        let file = json!({"driver": "file", "filename": format!("/f{n}")});
        let node = json!({"driver": "qcow2", "node-name": format!("n{n}"), "file": file, "backing": backing});
        run(&mut world, "blockdev-add", node).unwrap();
    }
    run(
        &mut world,
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "c"}),
    )
    .unwrap();
    world
}

/// A stream of `n3` onto `n0` that runs.
fn streaming(mut world: World) -> World {
    let arguments = json!({"job-id": "j", "device": "n3", "base-node": "n0", "filter-node-name": "flt", "auto-dismiss": false});
    run(&mut world, "block-stream", arguments).unwrap();
    world.job_status("j", JobStatus::Created).unwrap();
    world.job_status("j", JobStatus::Running).unwrap();
    world
}

#[test]
fn stream_refusals_before_it_starts() {
    let world = chain();
    let cases = [
        (
            json!({"job-id": "j", "device": "x"}),
            "Cannot find device='x' nor node-name='x'",
        ),
        (json!({"job-id": "j"}), "Parameter 'device' is missing"),
        (
            json!({"job-id": "j", "device": 1}),
            "Invalid parameter type for 'device', expected: string",
        ),
        (
            json!({"job-id": "j", "device": "n3", "foo": 1}),
            "Parameter 'foo' is unexpected",
        ),
        (json!({"device": "n3"}), "Invalid job ID ''"),
        (json!({"job-id": "1j", "device": "n3"}), "Invalid job ID '1j'"),
        (
            json!({"job-id": "j", "device": "n3", "base-node": "n3"}),
            "Node 'n3' is not a backing image of 'n3'",
        ),
        (
            json!({"job-id": "j", "device": "n3", "base": "/x"}),
            "Can't find '/x' in the backing chain",
        ),
        (
            json!({"job-id": "j", "device": "n1", "bottom": "n3"}),
            "Node 'n3' is not in a chain starting from 'n1'",
        ),
        (
            json!({"job-id": "j", "device": "n3", "bottom": "n1", "base-node": "n0"}),
            "'bottom' and 'base-node' cannot be specified at the same time",
        ),
        (
            json!({"job-id": "j", "device": "n3", "bottom": "n1", "backing-file": "x"}),
            "backing file specified, but streaming the entire chain",
        ),
        (
            json!({"job-id": "j", "device": "n3", "filter-node-name": "n0"}),
            "Could not create node: Duplicate nodes with node-name='n0'",
        ),
        (
            json!({"job-id": "j", "device": "n3", "speed": -1}),
            "Parameter 'speed' expects a non-negative value",
        ),
    ];
    for (arguments, desc) in cases {
        refused(&world, "block-stream", arguments, desc);
    }
}

#[test]
fn a_running_stream_keeps_others_away() {
    let world = streaming(chain());
    let busy = |node: &str| format!("Node '{node}' is busy: block device is in use by block job: stream");
    refused(
        &world,
        "block-stream",
        json!({"job-id": "k", "device": "n2"}),
        &busy("n2"),
    );
    refused(&world, "blockdev-del", json!({"node-name": "n2"}), &busy("n2"));
    refused(
        &world,
        "blockdev-del",
        json!({"node-name": "flt"}),
        "Node flt is in use",
    );
    let base = "Node 'n0' is busy: node is used as backing hd of 'n1'";
    refused(&world, "blockdev-del", json!({"node-name": "n0"}), base);
    refused(
        &world,
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "n2", "writable": true}),
        "Permission conflict on node 'n2': permissions 'write' are both required by an unnamed block device (uses \
         node 'n2' as 'root' child) and unshared by stream job 'j' (uses node 'n2' as 'intermediate node' child).",
    );
    let frozen = json!({"driver": "copy-on-read", "node-name": "x", "file": "n3", "bottom": "n1"});
    refused(
        &world,
        "blockdev-add",
        frozen,
        "Cannot change 'backing' link from 'n3' to 'n2'",
    );
}

#[test]
fn other_refusals() {
    let world = chain();
    let add = |options: Value, desc: &str| refused(&world, "blockdev-add", options, desc);
    add(
        json!({"driver": "null-co"}),
        "'node-name' must be specified for the root node",
    );
    add(
        json!({"driver": "null-co", "node-name": "0n"}),
        "Invalid node-name: '0n'",
    );
    add(
        json!({"driver": "qcow2", "node-name": "x"}),
        "Parameter 'file' is missing",
    );
    add(
        json!({"driver": "qcow2", "node-name": "x", "file": "n3", "backing": 5}),
        "Invalid parameter type for 'backing', expected: BlockdevRefOrNull",
    );
    add(
        json!({"driver": "raw", "node-name": "x", "file": 5}),
        "Invalid parameter type for 'file', expected: BlockdevRef",
    );
    add(
        json!({"driver": "null-co", "node-name": "x", "size": -1}),
        "Parameter 'size' expects a non-negative number below 2^64",
    );
    add(
        json!({"driver": "copy-on-read", "node-name": "x", "file": "n3", "bottom": "c"}),
        "Bottom node 'c' is not in the backing chain of 'x'",
    );
    refused(
        &world,
        "blockdev-del",
        json!({"node-name": "x"}),
        "Failed to find node with node-name='x'",
    );
    refused(
        &world,
        "block-export-del",
        json!({"id": "e"}),
        "Export 'e' is not found",
    );
    refused(&world, "job-pause", json!({"id": "j"}), "Job not found");
    let unknown = run(&mut world.clone(), "block-job-pause", json!({"device": "j"})).unwrap_err();
    assert_eq!(unknown.to_string(), "DeviceNotActive: Block job 'j' not found");
}

#[test]
fn a_stream_lives_and_takes_effect() {
    let mut world = streaming(chain());
    let layers = |world: &World| -> Vec<String> {
        let top = world.graph.find("n3").unwrap();
        world
            .graph
            .chain(top)
            .map(|id| world.graph.name(id).to_owned())
            .collect()
    };
    assert_eq!(layers(&world), ["n3", "n2", "n1", "n0"]);
    assert!(
        world.job_status("j", JobStatus::Concluded).is_err(),
        "it has not completed"
    );
    assert!(
        world.job_completed("j", Outcome::Cancelled).is_err(),
        "nobody cancelled it"
    );
    world.job_status("j", JobStatus::Waiting).unwrap();
    world.job_status("j", JobStatus::Pending).unwrap();
    assert_eq!(world.job_completed("j", Outcome::Success), Ok(None));
    world.job_status("j", JobStatus::Concluded).unwrap();

    assert_eq!(layers(&world), ["n3", "n0"]);
    let recorded = world
        .header(world.graph.find("n3").unwrap())
        .unwrap()
        .backing
        .clone()
        .unwrap();
    assert_eq!(
        (&*recorded.file, recorded.format.as_deref()),
        ("/f0", Some("qcow2"))
    );
    assert!(world.graph.edges().all(|(_, edge)| edge.frozen_by.is_none()));
    // Its edges stay until it is dismissed.
    let busy = "Node 'n2' is busy: block device is in use by block job: stream";
    refused(&world, "blockdev-del", json!({"node-name": "n2"}), busy);
    run(&mut world, "job-dismiss", json!({"id": "j"})).unwrap();
    world.job_status("j", JobStatus::Null).unwrap();
    assert!(world.graph.find("flt").is_none());
    run(&mut world, "blockdev-del", json!({"node-name": "n2"})).unwrap();
}

#[test]
fn a_cancelled_stream_leaves_the_chain() {
    let before = chain();
    let mut world = streaming(before.clone());
    run(&mut world, "job-cancel", json!({"id": "j"})).unwrap();
    world.job_status("j", JobStatus::Aborting).unwrap();
    assert!(
        world.job_completed("j", Outcome::Success).is_err(),
        "it was cancelled"
    );
    world.job_completed("j", Outcome::Cancelled).unwrap();
    world.job_status("j", JobStatus::Concluded).unwrap();
    run(&mut world, "job-dismiss", json!({"id": "j"})).unwrap();
    assert_eq!(world.edge_facts(), before.edge_facts());
    assert_eq!(world.files, before.files);
}

/// What failing storage may leave of a stream: nothing done, or everything done but not flushed.
#[test]
fn a_stream_that_storage_fails_is_undone_or_done() {
    let before = chain();
    let pending = || {
        let mut world = streaming(before.clone());
        world.job_status("j", JobStatus::Waiting).unwrap();
        world.job_status("j", JobStatus::Pending).unwrap();
        world
    };
    let below = |world: &World| {
        let top = world.graph.skip_filters(world.graph.find("n3").unwrap());
        let next = world.graph.backing_chain_next(top).unwrap();
        world.graph.name(next).to_owned()
    };
    let mut undone = pending();
    undone.job_completed("j", Outcome::Failed).unwrap();
    assert_eq!((below(&undone).as_str(), &undone.files), ("n2", &before.files));
    let mut done = pending();
    assert_eq!(done.job_completed("j", Outcome::NotFlushed), Ok(None));
    assert_eq!(below(&done), "n0");
    assert_ne!(done.files, before.files);
    assert!(done.graph.find("flt").is_none(), "the filter goes either way");
    done.job_status("j", JobStatus::Aborting).unwrap();
    done.job_status("j", JobStatus::Concluded).unwrap();
}

#[test]
fn a_window_at_the_start_of_a_file_shows_its_header() {
    let mut world = chain();
    for node in ["n3", "n2"] {
        run(&mut world, "blockdev-del", json!({"node-name": node})).unwrap();
    }
    let image = |offset: u32| {
        let file = json!({"driver": "file", "filename": "/f3"});
        let window = json!({"driver": "raw", "node-name": "w", "offset": offset, "size": 1024, "file": file});
        json!({"driver": "qcow2", "node-name": "x", "file": window, "backing": null})
    };
    refused(&world, "blockdev-add", image(512), "Image is not in qcow2 format");
    run(&mut world, "blockdev-add", image(0)).unwrap();
    let node = |name: &str| world.graph.find(name).unwrap();
    assert_eq!(world.graph.node(node("x")).length, 1 << 20);
    // Opening the file by its name gives something else than the window, yet that name is what a header can record.
    assert_eq!(world.graph.full_name(node("w")), None);
    assert_eq!(world.graph.name_on_record(node("w")).as_deref(), Some("/f3"));
}

/// A writer that may not resize needs a length that is a multiple of the alignment. Where `block_resize` leaves another one, it cannot
/// let go of its permission below the node, until the length is even again.
#[test]
fn a_length_that_does_not_suit_the_writers_keeps_the_permission_below() {
    let (name, mut file) = flat("/r", 28672);
    file.request_alignment = 4096;
    let mut world = World::new([(name, file)]);
    let raw = json!({"driver": "raw", "node-name": "n", "file": {"driver": "file", "node-name": "f", "filename": "/r"}});
    let options = json!({"driver": "copy-on-read", "node-name": "c", "file": raw});
    run(&mut world, "blockdev-add", options).unwrap();
    let above = |world: &World, name: &str| {
        let node = world.graph.find(name).unwrap();
        world.graph.edge(world.graph.node(node).parents[0]).masks.perm
    };
    let plain = Perm::WRITE_UNCHANGED;
    for (size, below) in [
        (54272, plain | Perm::RESIZE),
        (57344, plain),
        (54272, plain | Perm::RESIZE),
    ] {
        run(
            &mut world,
            "block_resize",
            json!({"node-name": "n", "size": size}),
        )
        .unwrap();
        assert_eq!((above(&world, "n"), above(&world, "f")), (plain, below), "{size}");
        assert_eq!(world.graph.node(world.graph.find("n").unwrap()).parents.len(), 1);
    }
}
