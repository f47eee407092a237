//! Backups: refusals word for word and in order, what a job holds, its end, bitmaps, groups. Everything here was seen in
//! qemu-storage-daemon 10.0, but for what its defects do otherwise (docs/findings): the end of a backup whose filter is part of a frozen
//! chain, the source of a backup that left the chain, and a transaction that is taken back after several backups.

mod common;

use blkcheck_model::job::Sync;
use blkcheck_model::{Bitmap, JobStatus, Masks, Outcome, Perm, World};
use common::{MIB, flat, image, ok, run, with};
use serde_json::{Value, json};

/// `s`, `t` and `m`, images of 1 MiB; `long` of 2 MiB; `r`, raw; `o` above `s`. `s` has a bitmap `b` with its first 4 KiB dirty.
fn world() -> World {
    let mut world = World::new([
        image("s", MIB, 65536),
        image("t", MIB, 65536),
        image("long", 2 * MIB, 65536),
        image("o", MIB, 65536),
        image("m", MIB, 65536),
        flat("r", MIB),
    ]);
    for name in ["s", "t", "long", "o", "m", "r"] {
        let file = json!({"driver": "file", "node-name": format!("f{name}"), "filename": name});
        let mut node =
            json!({"driver": if name == "r" { "raw" } else { "qcow2" }, "node-name": name, "file": file});
        if name == "o" {
            node["backing"] = json!("s");
        }
        ok(&mut world, "blockdev-add", node);
    }
    let bitmap = json!({"node": "s", "name": "b", "granularity": 4096});
    ok(&mut world, "block-dirty-bitmap-add", bitmap);
    let s = world.graph.find("s").unwrap();
    world.guest_wrote(s, 0..512);
    world
}

/// The arguments of a full backup of `s` to `t`, but for these; null: without.
fn backup(more: &Value) -> Value {
    let all = json!({"job-id": "j", "device": "s", "target": "t", "sync": "full", "filter-node-name": "flt"});
    with(all, more)
}

#[expect(
    clippy::needless_pass_by_value,
    reason = "callers write the arguments in place"
)]
#[track_caller]
fn refused(more: Value, desc: &str) {
    common::refused(&world(), "blockdev-backup", backup(&more), desc);
}

#[test]
fn what_no_schema_has_is_refused() {
    refused(json!({"sync": null}), "Parameter 'sync' is missing");
    refused(json!({"target": null}), "Parameter 'target' is missing");
    refused(json!({"sync": "x"}), "Parameter 'sync' does not accept value 'x'");
    refused(
        json!({"x-perf": {"max-workers": "a"}}),
        "Invalid parameter type for 'x-perf.max-workers', expected: integer",
    );
    refused(
        json!({"x-perf": {"foo": 1}}),
        "Parameter 'x-perf.foo' is unexpected",
    );
    refused(
        json!({"on-source-error": "x", "target": 1}),
        "Parameter 'on-source-error' does not accept value 'x'",
    );
}

#[test]
fn refusals_come_in_order() {
    refused(
        json!({"device": "nope", "target": "nope2"}),
        "Cannot find device='nope' nor node-name='nope'",
    );
    refused(
        json!({"sync": "bitmap", "target": "s"}),
        "must provide a valid bitmap name for 'bitmap' sync mode",
    );
    refused(
        json!({"sync": "incremental", "bitmap": "b", "bitmap-mode": "never"}),
        "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
    );
    refused(json!({"bitmap": "nope"}), "Bitmap 'nope' could not be found");
    refused(
        json!({"bitmap": "b"}),
        "Bitmap sync mode must be given when providing a bitmap",
    );
    refused(
        json!({"bitmap": "b", "bitmap-mode": "never", "sync": "none"}),
        "sync mode 'none' does not produce meaningful bitmap outputs",
    );
    refused(
        json!({"bitmap": "b", "bitmap-mode": "never"}),
        "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'full'",
    );
    refused(
        json!({"bitmap-mode": "never"}),
        "Cannot specify bitmap sync mode without a bitmap",
    );
    refused(
        json!({"target": "s", "compress": true}),
        "Source and target cannot be the same",
    );
    refused(
        json!({"target": "r", "compress": true}),
        "Compression is not supported for this drive ",
    );
    let perf = |perf: Value| json!({"target": "long", "x-perf": perf});
    refused(
        perf(json!({"max-workers": 0})),
        "max-workers must be between 1 and 2147483647",
    );
    refused(
        perf(json!({"max-chunk": -1})),
        "max-chunk must be zero (which means no limit) or positive",
    );
    refused(
        perf(json!({"max-chunk": 5})),
        "Source and target image have different sizes",
    );
}

#[test]
fn refusals_with_a_filter_come_in_order() {
    refused(
        json!({"x-perf": {"min-cluster-size": -1}}),
        "min-cluster-size too large: 18446744073709551615 > 9223372036854775807",
    );
    refused(
        json!({"x-perf": {"min-cluster-size": 3}}),
        "Could not create node: Cannot create block-copy-state: min-cluster-size needs to be a power of 2",
    );
    refused(
        json!({"filter-node-name": "#x"}),
        "Could not create node: Invalid node-name: '#x'",
    );
    refused(
        json!({"job-id": "1x", "x-perf": {"max-chunk": 4096}}),
        "Required max-chunk (4096) is less than backup cluster size (65536)",
    );
    refused(json!({"job-id": null}), "Invalid job ID ''");
    let mut world = world();
    let refusal = run(&mut world, "blockdev-backup", backup(&json!({"speed": -1}))).unwrap_err();
    assert_eq!(refusal.desc, "Parameter 'speed' expects a non-negative value");
    for status in [JobStatus::Created, JobStatus::Null] {
        world.job_status("j", status).unwrap();
    }
}

fn masks(world: &World, above: &str, name: &str) -> Masks {
    let edges = world.edge_facts();
    let found = edges
        .iter()
        .find(|edge| edge.parent == above && edge.name == name);
    found
        .unwrap_or_else(|| panic!("no edge '{name}' of {above}"))
        .masks
}

fn started(more: &Value) -> World {
    let mut world = world();
    ok(&mut world, "blockdev-backup", backup(more));
    begins(&mut world, "j");
    world
}

fn begins(world: &mut World, id: &str) {
    use JobStatus::{Created, Paused, Running};
    for status in [Created, Running, Paused, Running] {
        world.job_status(id, status).unwrap();
    }
}

fn bitmap(world: &World) -> &Bitmap {
    let s = world.graph.find("s").unwrap();
    let bitmaps = &world.graph.node(s).bitmaps;
    bitmaps.iter().find(|bitmap| &*bitmap.name == "b").unwrap()
}

#[test]
fn a_backup_holds_filter_and_target_and_lets_go_of_both() {
    let mut world = started(&json!({"auto-finalize": false, "auto-dismiss": false}));
    let (s, flt) = (world.graph.find("s").unwrap(), world.graph.find("flt").unwrap());
    let o = world.graph.find("o").unwrap();
    assert_eq!(
        world.graph.cow_child(o),
        Some(flt),
        "what was above is above the filter"
    );
    let guarded = Perm::CONSISTENT_READ | Perm::WRITE_UNCHANGED;
    assert_eq!(
        masks(&world, "node 'flt'", "file"),
        Masks::new(Perm::CONSISTENT_READ, guarded)
    );
    assert_eq!(
        masks(&world, "node 'flt'", "target"),
        Masks::new(Perm::WRITE, Perm::all() - Perm::RESIZE)
    );
    assert_eq!(masks(&world, "job 'j'", "main node"), Masks::NONE);
    assert_eq!(masks(&world, "job 'j'", "target"), Masks::NONE);
    let backup = world.job("j").unwrap().backup().unwrap().clone();
    assert_eq!((backup.source, backup.filter), (s, Some(flt)));
    assert_eq!((backup.cluster, backup.sync), (65536, Sync::Full));
    assert!(backup.initial.unwrap().iter().eq(std::iter::once(0..16)));

    let busy = "Node 't' is busy: block device is in use by block job: backup";
    let del = run(&mut world, "blockdev-del", json!({"node-name": "t"})).unwrap_err();
    assert_eq!(del.desc, busy);
    let again = self::backup(&json!({"job-id": "k", "filter-node-name": "f2"}));
    assert_eq!(run(&mut world, "blockdev-backup", again).unwrap_err().desc, busy);
    let more = self::backup(&json!({"job-id": "k", "filter-node-name": "f2", "target": "r"}));
    ok(&mut world, "blockdev-backup", more);
    assert_eq!(world.graph.filter_child(flt), world.graph.find("f2"));

    for status in [JobStatus::Waiting, JobStatus::Pending] {
        world.job_status("j", status).unwrap();
    }
    ok(&mut world, "job-finalize", json!({"id": "j"}));
    world.job_completed("j", Outcome::Success).unwrap();
    world.job_status("j", JobStatus::Concluded).unwrap();
    assert_eq!(world.graph.find("flt"), None);
    assert_eq!(world.graph.cow_child(o), world.graph.find("f2"));
    ok(&mut world, "blockdev-del", json!({"node-name": "t"}));
}

#[test]
fn a_backup_that_only_keeps_ends_cancelled() {
    let mut world = started(&json!({"sync": "none"}));
    let complete = run(&mut world, "job-complete", json!({"id": "j"})).unwrap_err();
    assert_eq!(
        complete.desc,
        "Job 'j' in state 'running' cannot accept command verb 'complete'"
    );
    ok(&mut world, "job-cancel", json!({"id": "j"}));
    assert!(world.clone().job_completed("j", Outcome::Success).is_err());
    world.job_status("j", JobStatus::Aborting).unwrap();
    world.job_completed("j", Outcome::Cancelled).unwrap();
    assert_eq!(world.graph.find("flt"), None);
}

#[test]
fn a_bitmap_is_used_up_by_success_and_given_back_by_failure() {
    // What is dirty afterwards, in bits of 4 KiB: the first was before, the third is written meanwhile.
    let ends: [(&str, bool, Option<&[u64]>); 6] = [
        ("on-success", true, Some(&[2])),
        ("on-success", false, Some(&[0, 2])),
        ("never", true, Some(&[0, 2])),
        ("never", false, Some(&[0, 2])),
        ("always", true, Some(&[2])),
        ("always", false, None),
    ];
    for (mode, well, dirty) in ends {
        let mut world = started(&json!({"sync": "bitmap", "bitmap": "b", "bitmap-mode": mode}));
        let job = world.job("j").unwrap().backup().unwrap();
        assert!(job.initial.as_ref().unwrap().iter().eq(std::iter::once(0..1)));
        let s = world.graph.find("s").unwrap();
        world.guest_wrote(world.graph.find("flt").unwrap(), 8192..8193);
        assert!(bitmap(&world).is_busy() && bitmap(&world).records());
        assert_eq!(
            bitmap(&world).count(),
            Some(4096),
            "what is copied stays what it was"
        );
        let clear = run(
            &mut world,
            "block-dirty-bitmap-clear",
            json!({"node": "s", "name": "b"}),
        );
        assert_eq!(
            clear.unwrap_err().desc,
            "Bitmap 'b' is currently in use by another operation and cannot be used"
        );
        let outcome = if well { Outcome::Success } else { Outcome::Failed };
        world.job_completed("j", outcome).unwrap();
        let bitmap = bitmap(&world);
        assert!(!bitmap.is_busy() && bitmap.enabled, "{mode} {well}");
        let bits = bitmap
            .dirty
            .as_ref()
            .map(|dirty| dirty.iter().flatten().collect::<Vec<_>>());
        assert_eq!(bits.as_deref(), dirty, "{mode} {well}");
        assert_eq!(world.graph.node(s).bitmaps.len(), 1);
    }
}

#[test]
fn one_that_is_given_up_when_all_is_copied_leaves_what_was_written_since() {
    let mut world = started(&json!({"bitmap": "b", "bitmap-mode": "always", "auto-finalize": false}));
    for status in [JobStatus::Waiting, JobStatus::Pending] {
        world.job_status("j", status).unwrap();
    }
    ok(&mut world, "job-cancel", json!({"id": "j"}));
    world.job_completed("j", Outcome::Cancelled).unwrap();
    assert_eq!(bitmap(&world).count(), Some(0));
}

fn two(more: &Value) -> Value {
    let action = |id: &str, target: &str| {
        let data = backup(&json!({"job-id": id, "target": target, "filter-node-name": format!("f{id}")}));
        json!({"type": "blockdev-backup", "data": data})
    };
    let mut actions = vec![action("a", "t"), action("b", "r")];
    actions.extend(more.as_array().expect("actions").iter().cloned());
    json!({"actions": actions, "properties": {"completion-mode": "grouped"}})
}

#[test]
fn jobs_of_one_group_end_together() {
    let mut world = world();
    ok(&mut world, "transaction", two(&json!([])));
    for id in ["a", "b"] {
        world.job_status(id, JobStatus::Created).unwrap();
    }
    let early = world.clone().job_status("a", JobStatus::Running);
    assert!(early.is_err(), "the last one starts first");
    for id in ["b", "a"] {
        world.job_status(id, JobStatus::Running).unwrap();
    }
    assert!(world.clone().job_completed("b", Outcome::Cancelled).is_err());
    ok(&mut world, "job-cancel", json!({"id": "a"}));
    world.job_status("b", JobStatus::Aborting).unwrap();
    world.job_completed("b", Outcome::Cancelled).unwrap();
    assert!(world.clone().job_completed("a", Outcome::Success).is_err());
    world.job_completed("a", Outcome::Cancelled).unwrap();
    let names = ["fa", "fb"].map(|name| world.graph.find(name));
    assert_eq!(names, [None, None]);
}

#[test]
fn each_transaction_has_an_order_of_its_own() {
    use JobStatus::{Created, Running};
    let mut world = world();
    ok(&mut world, "transaction", two(&json!([])));
    let third = backup(&json!({"job-id": "c", "device": "o", "target": "m", "filter-node-name": "fc"}));
    ok(&mut world, "blockdev-backup", third);
    for id in ["a", "b", "c"] {
        world.job_status(id, Created).unwrap();
    }
    assert!(world.clone().job_status("a", Running).is_err(), "b starts first");
    for id in ["c", "b", "a"] {
        world.job_status(id, Running).unwrap();
    }
}

#[test]
fn nobody_waits_for_a_job_that_never_starts() {
    use JobStatus::{Aborting, Created, Running};
    let mut world = world();
    let mut apart = two(&json!([]));
    apart.as_object_mut().expect("an object").remove("properties");
    ok(&mut world, "transaction", apart);
    for id in ["a", "b"] {
        world.job_status(id, Created).unwrap();
    }
    ok(&mut world, "job-cancel", json!({"id": "b"}));
    world.job_status("b", Aborting).unwrap();
    world.job_status("a", Running).unwrap();
}

#[test]
fn a_transaction_that_is_refused_takes_its_jobs_back() {
    let mut world = world();
    let before = world.graph.clone();
    let add = json!([{"type": "block-dirty-bitmap-add", "data": {"node": "s", "name": "c"}}]);
    assert_eq!(
        run(&mut world, "transaction", two(&add)).unwrap_err().desc,
        "Action 'block-dirty-bitmap-add' does not support transaction property completion-mode = grouped"
    );
    let missing = backup(&json!({"job-id": "c", "target": "nope"}));
    let actions = two(&json!([{"type": "blockdev-backup", "data": missing}]));
    assert_eq!(
        run(&mut world, "transaction", actions).unwrap_err().desc,
        "Cannot find device='nope' nor node-name='nope'"
    );
    assert_eq!(world.graph, before);
    use JobStatus::{Aborting, Concluded, Created, Null, Running};
    for id in ["a", "b"] {
        world.job_status(id, Created).unwrap();
        assert!(world.clone().job_status(id, Running).is_err());
        for status in [Aborting, Concluded, Null] {
            world.job_status(id, status).unwrap();
        }
    }
    assert!(world.job_status("a", Created).is_err(), "it is gone");
}

#[test]
fn a_filter_in_a_frozen_chain_stays_and_keeps_nothing() {
    let mut world = started(&json!({"sync": "none"}));
    let cor = json!({"driver": "copy-on-read", "node-name": "cor", "file": "o", "bottom": "s"});
    ok(&mut world, "blockdev-add", cor);
    ok(&mut world, "job-cancel", json!({"id": "j"}));
    world.job_completed("j", Outcome::Cancelled).unwrap();
    world.graph.check().unwrap();
    let o = world.graph.find("o").unwrap();
    assert_eq!(world.graph.cow_child(o), world.graph.find("flt"));
    ok(&mut world, "blockdev-del", json!({"node-name": "t"}));
    ok(&mut world, "blockdev-del", json!({"node-name": "cor"}));
    ok(&mut world, "blockdev-del", json!({"node-name": "o"}));
    assert_eq!(world.graph.find("flt"), None, "it went with its parents");
}

#[test]
fn a_source_that_left_the_chain_stays_until_its_backup_ends() {
    let mut world = started(&json!({"sync": "none", "device": "r", "target": "t"}));
    ok(&mut world, "blockdev-del", json!({"node-name": "o"}));
    let file = json!({"driver": "file", "node-name": "fo2", "filename": "o"});
    let over = json!({"driver": "qcow2", "node-name": "o2", "file": file, "backing": null});
    ok(&mut world, "blockdev-add", over);
    ok(
        &mut world,
        "blockdev-snapshot",
        json!({"node": "r", "overlay": "o2"}),
    );
    let stream = json!({"job-id": "k", "device": "o2", "filter-node-name": "f2"});
    ok(&mut world, "block-stream", stream);
    use JobStatus::{Concluded, Created, Null, Pending, Running, Waiting};
    for status in [Created, Running, Waiting, Pending] {
        world.job_status("k", status).unwrap();
    }
    world.job_completed("k", Outcome::Success).unwrap();
    for status in [Concluded, Null] {
        world.job_status("k", status).unwrap();
    }
    assert_eq!(world.graph.cow_child(world.graph.find("o2").unwrap()), None);
    let del = json!({"node-name": "r"});
    assert_eq!(
        run(&mut world, "blockdev-del", del.clone()).unwrap_err().desc,
        "Block device r is in use"
    );
    ok(&mut world, "job-cancel", json!({"id": "j"}));
    world.job_completed("j", Outcome::Cancelled).unwrap();
    ok(&mut world, "blockdev-del", del);
}
