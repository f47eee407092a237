//! Matchers of what is about filters that keep, and backups.

use super::*;

/// Images s and p that hold data, the others empty; `short` is shorter. A node each, and then these steps.
fn nodes(more: &[Value]) -> String {
    let image = |name: &str, size: u64, holds: bool| {
        let mut image = json!({"file": name, "format": "qcow2", "size": size});
        if holds {
            image["fill"] = json!([{"offset": 0, "length": size, "stored": "data"}]);
        }
        image
    };
    let images = [
        image("s", 131_072, true),
        image("p", 131_072, true),
        image("o", 131_072, false),
        image("t", 131_072, false),
        image("r", 131_072, false),
        image("short", 65536, false),
    ];
    let mut steps: Vec<Value> = ["s", "p", "o", "t", "r", "short"]
        .iter()
        .map(|name| qcow2(name, Value::Null))
        .collect();
    steps.extend_from_slice(more);
    json!({"version": 1, "grain": 512, "images": images, "steps": steps}).to_string()
}

fn last(more: &[Value], case: impl FnOnce(&mut Case<'_>)) -> Option<&'static str> {
    at_last(&nodes(more), case)
}

/// The arguments of a backup; the filter is called like the job with an `f` before it.
fn backup(job: &str, device: &str, target: &str, more: &Value) -> Value {
    let mut data = json!({"job-id": job, "device": device, "target": target, "sync": "full",
        "filter-node-name": format!("f{job}")});
    for (key, value) in more.as_object().expect("an object") {
        data[key] = value.clone();
    }
    data
}

fn full(job: &str, device: &str, target: &str) -> Value {
    backup(job, device, target, &json!({}))
}

/// A transaction of backups and other actions, by their arguments.
fn transaction(actions: &[Value]) -> Value {
    let kind = |data: &Value| {
        let known = [
            ("filter-node-name", "blockdev-backup"),
            ("overlay", "blockdev-snapshot"),
            ("name", "block-dirty-bitmap-clear"),
        ];
        let known = known.iter().find(|(key, _)| data.get(key).is_some());
        known.map_or("abort", |(_, kind)| kind)
    };
    let actions: Vec<Value> = actions
        .iter()
        .map(|data| json!({"type": kind(data), "data": data}))
        .collect();
    command("transaction", json!({ "actions": actions }))
}

fn grouped(mut transaction: Value) -> Value {
    transaction["arguments"]["properties"] = json!({"completion-mode": "grouped"});
    transaction
}

fn keeps(target: &str, cluster: u64) -> Value {
    let node = json!({"driver": "copy-before-write", "node-name": "c", "file": "s", "target": target,
        "min-cluster-size": cluster});
    command("blockdev-add", node)
}

/// Something that changes nothing that matters here.
fn harmless() -> Value {
    command("query-jobs", json!({}))
}

#[test]
fn clusters_have_to_be_larger_than_any_copy() {
    let accepted = differs(
        What::Result,
        "GenericError: min-cluster-size too large: …",
        "accepted",
    );
    let huge = Some("cbw-huge-clusters");
    assert_eq!(last(&[keeps("t", 1 << 28)], &accepted), huge);
    assert_eq!(
        last(&[keeps("t", 1 << 27)], &accepted),
        None,
        "as large as memory"
    );
    assert_eq!(
        last(&[keeps("t", (1 << 28) + 1)], &accepted),
        None,
        "no power of two"
    );
    let other = differs(What::Result, "GenericError: Node 't' is busy", "accepted");
    assert_eq!(last(&[keeps("t", 1 << 28)], &other), None);
    let aborts = fails(Kind::Assert, "bdrv_create_dirty_bitmap: Assertion `…' failed");
    assert_eq!(last(&[keeps("t", 1 << 32)], &aborts), huge);
    assert_eq!(last(&[keeps("t", 65536)], &aborts), None);
    let elsewhere = fails(Kind::Assert, "block_copy_state_new: Assertion `…' failed");
    assert_eq!(last(&[keeps("t", 1 << 32)], &elsewhere), None);
}

#[test]
fn a_shorter_target_has_to_be_accepted() {
    const SHORTER: &str =
        "GenericError: Cannot create block-copy-state: Source and target image have different sizes";
    let accepted = differs(What::Result, SHORTER, "accepted");
    assert_eq!(last(&[keeps("short", 0)], &accepted), Some("cbw-shorter-target"));
    let worded = differs(What::Result, SHORTER, "GenericError: Target is too short");
    assert_eq!(last(&[keeps("short", 0)], &worded), None, "refused as well");
    let reversed = differs(What::Result, "accepted", SHORTER);
    assert_eq!(last(&[keeps("t", 0)], &reversed), None);
    let backups = differs(
        What::Result,
        "GenericError: Source and target image have different sizes",
        "accepted",
    );
    let to_short = command("blockdev-backup", full("j", "s", "short"));
    assert_eq!(last(&[to_short], &backups), None, "backups look");
}

#[test]
fn steering_around_shorter_targets_and_huge_clusters_looks_at_filters_only() {
    let scenario = parse::parse("test", nodes(&[harmless()]).as_bytes()).expect("a scenario");
    let world = replayed(&scenario, usize::MAX).pop().expect("some").world;
    let steered = |step: Value| {
        let arguments = step["arguments"].as_object().expect("an object");
        steers_around(&world, &[], step["execute"].as_str().expect("a name"), arguments).map(|d| d.id)
    };
    assert_eq!(steered(keeps("short", 0)), Some("cbw-shorter-target"));
    assert_eq!(steered(keeps("t", 0)), None);
    assert_eq!(steered(keeps("t", 1 << 28)), Some("cbw-huge-clusters"));
    assert_eq!(steered(command("blockdev-backup", full("j", "s", "short"))), None);
}

#[test]
fn the_backup_of_a_filter_aborts_only_when_that_is_what_is_refused() {
    const ENDS: &str = "bdrv_do_drained_end: Assertion `bs->quiesce_counter > 0' failed.";
    let aborts = fails(Kind::Assert, ENDS);
    let of = |actions: &[Value], case: &dyn Fn(&mut Case<'_>)| last(&[transaction(actions)], case);
    let both = [full("a", "s", "t"), full("b", "fa", "r")];
    assert_eq!(of(&both, &aborts), Some("refused-backup-of-filter"));
    assert_eq!(of(&both, &fails(Kind::Hang, ENDS)), None);
    assert_eq!(of(&both, &fails(Kind::Assert, "another assertion")), None);
    let beside = [full("a", "s", "t"), full("b", "p", "r")];
    assert_eq!(of(&beside, &aborts), None, "of another node");
    let later = [
        full("a", "s", "t"),
        full("b", "p", "nowhere"),
        full("c", "fa", "r"),
    ];
    assert_eq!(of(&later, &aborts), None, "refused before it came to that");
    let apart = [
        command("blockdev-backup", full("a", "s", "t")),
        transaction(&[full("b", "fa", "r")]),
    ];
    assert_eq!(last(&apart, &aborts), None, "the filter was there before");
}

#[test]
fn a_backup_ends_in_a_frozen_chain_only_with_its_filter_in_it() {
    let aborts = fails(
        Kind::Assert,
        "Unexpected error in bdrv_replace_node_noperm() at ../block.c:5512: Cannot change 'backing' link …",
    );
    let over = command(
        "blockdev-reopen",
        json!({"options": [{"driver": "qcow2", "node-name": "o", "file": "fo", "backing": "s"}]}),
    );
    let job = |device: &str| {
        command(
            "blockdev-backup",
            backup("j", device, "t", &json!({"sync": "none"})),
        )
    };
    let filter = |bottom: bool| {
        let mut node = json!({"driver": "copy-on-read", "node-name": "c", "file": "o"});
        if bottom {
            node["bottom"] = json!("s");
        }
        command("blockdev-add", node)
    };
    let cancel = command("job-cancel", json!({"id": "j"}));
    let of = |device: &str, bottom: bool, case: &dyn Fn(&mut Case<'_>)| {
        last(&[over.clone(), job(device), filter(bottom), cancel.clone()], case)
    };
    assert_eq!(of("s", true, &aborts), Some("backup-ends-in-frozen-chain"));
    assert_eq!(of("s", false, &aborts), None, "nothing is frozen");
    assert_eq!(of("p", true, &aborts), None, "the filter is elsewhere");
    assert_eq!(of("s", true, &fails(Kind::Assert, "another assertion")), None);
    assert_eq!(of("s", true, &fails(Kind::Hang, "Cannot change")), None);
    let alone = [over.clone(), filter(true), cancel.clone()];
    assert_eq!(last(&alone, &aborts), None, "no backup");
}

#[test]
fn a_slow_copy_misses_a_pause_only_below_a_stream_that_reopens() {
    let hangs = fails(Kind::Hang, "block-stream is not answered in 10 s");
    let read_only = |on: bool| {
        let node =
            json!({"driver": "qcow2", "node-name": "s", "file": "fs", "backing": null, "read-only": on});
        command("blockdev-reopen", json!({ "options": [node] }))
    };
    let slow = |device: &str, speed: u64| {
        command(
            "blockdev-backup",
            backup("b", device, "t", &json!({"sync": "full", "speed": speed})),
        )
    };
    let stream = || command("block-stream", json!({"job-id": "j", "device": "s"}));
    let of = |on: bool, device: &str, speed: u64, case: &dyn Fn(&mut Case<'_>)| {
        last(&[read_only(on), slow(device, speed), stream()], case)
    };
    assert_eq!(of(true, "s", 1, &hangs), Some("slow-copy-misses-pause"));
    assert_eq!(of(false, "s", 1, &hangs), None, "it was writable");
    assert_eq!(of(true, "s", 0, &hangs), None, "no limit");
    assert_eq!(of(true, "p", 1, &hangs), None, "of another node");
    assert_eq!(of(true, "s", 1, &fails(Kind::Crash, "…")), None);
    let other = [read_only(true), slow("s", 1), harmless()];
    assert_eq!(last(&other, &hangs), None, "another command");
}

#[test]
fn a_group_hangs_only_when_it_is_given_up_after_two_backups() {
    let hangs = fails(Kind::Hang, "transaction is not answered in 10 s");
    let two = [full("a", "s", "t"), full("b", "p", "r")];
    let third = full("c", "o", "nowhere");
    let three = [&two[..], std::slice::from_ref(&third)].concat();
    let refused = [grouped(transaction(&three))];
    assert_eq!(last(&refused, &hangs), Some("refused-group-hangs"));
    assert_eq!(last(&refused, fails(Kind::Assert, "…")), None);
    assert_eq!(last(&[transaction(&three)], &hangs), None, "not grouped");
    assert_eq!(last(&[grouped(transaction(&two))], &hangs), None, "accepted");
    let early = [two[0].clone(), third, two[1].clone()];
    assert_eq!(
        last(&[grouped(transaction(&early))], &hangs),
        None,
        "refused after one"
    );
}

#[test]
fn a_source_is_lost_only_while_its_backup_runs_and_out_of_the_chain() {
    let gone = differs(What::Result, "GenericError: Node 's' is busy: …", "accepted");
    let job = command("blockdev-backup", full("j", "s", "t"));
    let snapshot = command("blockdev-snapshot", json!({"node": "s", "overlay": "o"}));
    let apart = command(
        "blockdev-reopen",
        json!({"options": [{"driver": "qcow2", "node-name": "o", "file": "fo", "backing": null}]}),
    );
    let del = |name: &str| command("blockdev-del", json!({"node-name": name}));
    let loses = Some("backup-loses-source");
    let all = [job.clone(), snapshot.clone(), apart.clone(), del("s")];
    assert_eq!(last(&all, &gone), loses);
    assert_eq!(last(&all, fails(Kind::Assert, "…")), loses);
    let other = differs(What::Result, "accepted", "GenericError: Node 's' is busy");
    assert_eq!(last(&all, &other), None, "refused");
    let below = [job.clone(), snapshot.clone(), del("s")];
    assert_eq!(last(&below, &gone), None, "still in the chain");
    let nobody = [snapshot, apart, del("s")];
    assert_eq!(last(&nobody, &gone), None, "no backup");
    assert_eq!(last(&[job, del("p")], &gone), None, "another node");
}

/// What a backup of the upper layer beside a snapshot leaves out.
#[test]
fn a_layer_is_not_copied_only_where_a_snapshot_of_it_follows() {
    let top = |device: &str| backup("j", device, "t", &json!({"sync": "top"}));
    let over = |node: &str, overlay: &str| json!({"node": node, "overlay": overlay});
    let lost = differs(
        What::Content,
        "node 't': at 0x0 of node 't': fill 0 of image 0",
        "Zero",
    );
    let of =
        |actions: &[Value], case: &dyn Fn(&mut Case<'_>)| last(&[transaction(actions), harmless()], case);
    let misses = Some("top-of-overlay");
    let both = [top("s"), over("s", "o")];
    assert_eq!(of(&both, &lost), misses);
    assert_eq!(
        of(&[full("j", "s", "t"), over("s", "o")], &lost),
        None,
        "all of it"
    );
    assert_eq!(of(&[top("s"), over("p", "o")], &lost), None, "of another node");
    assert_eq!(of(&[top("s")], &lost), None, "no snapshot");
    let reversed = [over("s", "o"), top("o")];
    assert_eq!(of(&reversed, &lost), None, "the overlay is what is asked for");
    let aborted = [top("s"), over("s", "o"), json!({})];
    assert_eq!(of(&aborted, &lost), None, "taken back");
    let apart = [
        command("blockdev-backup", top("s")),
        command("blockdev-snapshot", over("s", "o")),
        harmless(),
    ];
    assert_eq!(last(&apart, &lost), None, "two commands");

    let stored = differs(What::Allocation, "cluster 0 of t is allocated", "not allocated");
    assert_eq!(of(&both, &stored), misses);
    let elsewhere = differs(What::Allocation, "cluster 0 of r is allocated", "not allocated");
    assert_eq!(of(&both, &elsewhere), None, "another image");
    let node = differs(
        What::Content,
        "node 'r': at 0x0 of node 'r': fill 0 of image 0",
        "Zero",
    );
    assert_eq!(of(&both, &node), None, "another node");
    let newer = differs(
        What::Content,
        "node 't': at 0x0 of node 't': fill 0 of image 0",
        "Stamp(Step(StepId(9)))",
    );
    assert_eq!(of(&both, &newer), None, "written since");
    let foreign = differs(
        What::Content,
        "node 't': at 0x0 of node 't': fill 0 of image 0",
        "Stamp(Fill { image: 1, fill: 0 })",
    );
    assert_eq!(of(&both, &foreign), None, "of an image that is not below it");
    let written = differs(
        What::Content,
        "node 't': at 0x0 of node 't': the write of step 9",
        "Zero",
    );
    assert_eq!(of(&both, &written), None, "a write that is lost later");
    let torn = differs(
        What::Content,
        "node 't': at 0x0 of node 't': fill 0 of image 0",
        "Torn",
    );
    assert_eq!(of(&both, &torn), None);
}

#[test]
fn only_the_bitmap_of_a_backup_that_is_taken_back_is_filled() {
    let add = |name: &str| command("block-dirty-bitmap-add", json!({"node": "s", "name": name}));
    let job = |bitmap: &str, mode: &str| {
        backup(
            "j",
            "s",
            "t",
            &json!({"sync": "bitmap", "bitmap": bitmap, "bitmap-mode": mode}),
        )
    };
    const CLEAN: &str = "bitmap 'b' of node 's': Facts { granularity: 65536, count: Some(0) }";
    const WHOLE: &str = "bitmap 'b' of node 's': Facts { granularity: 65536, count: Some(131072) }";
    let filled = differs(What::Bitmaps, CLEAN, WHOLE);
    let of = |actions: &[Value], case: &dyn Fn(&mut Case<'_>)| {
        last(&[add("b"), add("x"), transaction(actions)], case)
    };
    let abort = json!({});
    let always = job("b", "always");
    assert_eq!(
        of(&[always.clone(), abort.clone()], &filled),
        Some("aborted-backup-fills-bitmap")
    );
    assert_eq!(of(std::slice::from_ref(&always), &filled), None, "accepted");
    assert_eq!(of(&[abort.clone(), always.clone()], &filled), None, "never made");
    assert_eq!(of(&[job("b", "on-success"), abort.clone()], &filled), None);
    assert_eq!(
        of(&[job("x", "always"), abort.clone()], &filled),
        None,
        "another bitmap"
    );
    let both = [always.clone(), abort];
    let half = differs(
        What::Bitmaps,
        CLEAN,
        "bitmap 'b' of node 's': Facts { granularity: 65536, count: Some(65536) }",
    );
    assert_eq!(of(&both, &half), None, "not all of it");
    assert_eq!(
        of(&both, &differs(What::Bitmaps, WHOLE, CLEAN)),
        None,
        "the other way round"
    );
    assert_eq!(of(&both, &differs(What::Refusal, CLEAN, WHOLE)), None);
    let gone = differs(What::Bitmaps, CLEAN, "bitmap 'b' of node 's': none");
    assert_eq!(of(&both, &gone), None);
}

/// v stands on u, which nobody else holds, w on v, and u is backed up to t or to w.
fn inline(target: &str) -> Vec<Value> {
    let file = json!({"driver": "file", "node-name": "fu", "filename": "r"});
    let u = json!({"driver": "qcow2", "node-name": "u", "file": file, "backing": null});
    let w = json!({"driver": "qcow2", "node-name": "w", "file": {"driver": "file", "node-name": "fw", "filename": "p"},
        "backing": "v"});
    let v = json!({"driver": "qcow2", "node-name": "v", "file": {"driver": "file", "node-name": "fv", "filename": "o"},
        "backing": u});
    let without = |name: &str| command("blockdev-del", json!({"node-name": name}));
    let pending = json!({"auto-finalize": false});
    vec![
        without("r"),
        without("o"),
        without("p"),
        command("blockdev-add", v),
        command("blockdev-add", w),
        command("blockdev-backup", backup("j", "u", target, &pending)),
    ]
}

fn backing(node: &str, file: &str, backing: Value) -> Value {
    let mut options = json!({"driver": "qcow2", "node-name": node, "file": file});
    options["backing"] = backing;
    command("blockdev-reopen", json!({"options": [options]}))
}

#[test]
fn a_source_is_freed_only_when_the_filter_is_all_that_holds_it() {
    let dies = fails(
        Kind::Assert,
        "bdrv_do_drained_end: Assertion `bs->quiesce_counter > 0' failed.",
    );
    let cancel = command("job-cancel", json!({"id": "j"}));
    let of = |more: &[Value], case: &dyn Fn(&mut Case<'_>)| {
        let mut all = inline("t");
        all.extend_from_slice(more);
        all.push(cancel.clone());
        last(&all, case)
    };
    let alone = backing("v", "fv", Value::Null);
    let frees = Some("backup-frees-source");
    assert_eq!(of(std::slice::from_ref(&alone), &dies), frees);
    assert_eq!(of(&[], &dies), None, "it goes back below the overlay");
    assert_eq!(of(std::slice::from_ref(&alone), &fails(Kind::Hang, "…")), None);
    let other = fails(Kind::Assert, "another assertion");
    assert_eq!(of(std::slice::from_ref(&alone), &other), None);
    let shown = command(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "fj"}),
    );
    assert_eq!(of(&[alone, shown], &dies), None, "something is above the filter");
    let named = [
        command(
            "blockdev-backup",
            backup("j", "s", "t", &json!({"auto-finalize": false})),
        ),
        cancel,
    ];
    assert_eq!(last(&named, &dies), None, "somebody added it by name");
}

#[test]
fn steering_keeps_somebody_above_the_source_of_a_backup() {
    let of = |target: &str, step: &Value| {
        let scenario = parse::parse("test", nodes(&inline(target)).as_bytes()).expect("a scenario");
        let last = scenario.steps.last().expect("some").action.clone();
        let mut world = replayed(&scenario, usize::MAX).pop().expect("some").world;
        let Action::Command { execute, arguments } = last else {
            panic!("a command")
        };
        let made = world.execute(&Command::new(&execute, &Value::Object(arguments)));
        assert!(made.is_ok(), "{made:?}");
        let arguments = step["arguments"].as_object().expect("an object");
        steers_around(&world, &[], step["execute"].as_str().expect("a name"), arguments).map(|d| d.id)
    };
    let frees = Some("backup-frees-source");
    let stream = |device: &str| command("block-stream", json!({"job-id": "k", "device": device}));
    assert_eq!(of("t", &backing("v", "fv", Value::Null)), frees);
    assert_eq!(of("w", &backing("v", "fv", Value::Null)), frees);
    assert_eq!(of("w", &stream("v")), frees, "when the stream ends");
    assert_eq!(of("t", &backing("v", "fv", json!("fj"))), None, "as it was");
    assert_eq!(of("w", &stream("s")), None, "a stream of something else");
    assert_eq!(of("w", &command("blockdev-del", json!({"node-name": "s"}))), None);
}

#[test]
fn a_snapshot_has_to_show_what_its_target_may_lack() {
    let dies = fails(
        Kind::Assert,
        "cbw_co_snapshot_block_status: Assertion `ret & BDRV_BLOCK_ALLOCATED' failed.",
    );
    let add = command("block-dirty-bitmap-add", json!({"node": "s", "name": "b"}));
    let job = |more: Value| command("blockdev-backup", backup("j", "s", "t", &more));
    let shows = |filter: &str| {
        let snapshot = json!({"driver": "snapshot-access", "node-name": "q", "file": filter});
        command("blockdev-add", snapshot)
    };
    let part = job(json!({"sync": "incremental", "bitmap": "b"}));
    let of = |more: &[Value], case: &dyn Fn(&mut Case<'_>)| {
        let all = [std::slice::from_ref(&add), more, &[harmless()]].concat();
        last(&all, case)
    };
    let aborts = Some("snapshot-status-aborts");
    assert_eq!(of(&[part.clone(), shows("fj")], &dies), aborts);
    assert_eq!(of(&[job(json!({"sync": "top"})), shows("fj")], &dies), aborts);
    assert_eq!(
        of(&[job(json!({})), shows("fj")], &dies),
        None,
        "all of it is copied"
    );
    assert_eq!(of(std::slice::from_ref(&part), &dies), None, "nobody looks");
    assert_eq!(
        of(&[keeps("t", 0), shows("c")], &dies),
        None,
        "a filter that keeps everything"
    );
    assert_eq!(
        of(&[part.clone(), shows("fj")], &fails(Kind::Assert, "another")),
        None
    );
    assert_eq!(of(&[part, shows("fj")], &fails(Kind::Hang, "…")), None);
    let old = |compat: u32, case: &dyn Fn(&mut Case<'_>)| {
        let mut scenario: Value =
            serde_json::from_str(&nodes(&[keeps("t", 0), shows("c"), harmless()])).expect("JSON");
        scenario["images"][3]["compat"] = json!(compat);
        at_last(&scenario.to_string(), case)
    };
    assert_eq!(old(2, &dies), aborts, "zeroes leave nothing there");
    assert_eq!(old(3, &dies), None);
}

#[test]
fn a_bitmap_is_freed_only_under_an_earlier_action_on_it() {
    let add = |name: &str| command("block-dirty-bitmap-add", json!({"node": "s", "name": name}));
    let job = |bitmap: &str, mode: &str| {
        backup(
            "j",
            "s",
            "t",
            &json!({"sync": "bitmap", "bitmap": bitmap, "bitmap-mode": mode}),
        )
    };
    let of = |actions: &[Value], kind: Kind| {
        last(
            &[add("b"), add("x"), transaction(actions)],
            fails(kind, "the daemon died"),
        )
    };
    let (clear, abort) = (json!({"node": "s", "name": "b"}), json!({}));
    let always = job("b", "always");
    let freed = Some("aborted-backup-frees-bitmap");
    let all = [clear.clone(), always.clone(), abort.clone()];
    assert_eq!(of(&all, Kind::Assert), freed);
    assert_eq!(of(&all, Kind::Crash), freed);
    assert_eq!(of(&all, Kind::Hang), None);
    assert_eq!(of(&all[..2], Kind::Assert), None, "accepted");
    assert_eq!(of(&all[1..], Kind::Assert), None, "no earlier action");
    let other = [clear.clone(), job("x", "always"), abort.clone()];
    assert_eq!(of(&other, Kind::Assert), None, "another bitmap");
    let kept = [clear.clone(), job("b", "on-success"), abort.clone()];
    assert_eq!(of(&kept, Kind::Assert), None, "it stays the same one");
    let early = [clear, abort, always];
    assert_eq!(of(&early, Kind::Assert), None, "the backup was never made");
}
