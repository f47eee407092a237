//! Matchers of what commands do to the graph.

use super::*;

fn last(more: &[Value], case: impl FnOnce(&mut Case<'_>)) -> Option<&'static str> {
    at_last(&chain(4096, more), case)
}

fn filter(file: &str, bottom: &str) -> Value {
    let add = json!({"driver": "copy-on-read", "node-name": "c", "file": file, "bottom": bottom});
    command("blockdev-add", add)
}

fn reopen(options: Value) -> Value {
    let mut arguments = json!({});
    arguments["options"] = options;
    command("blockdev-reopen", arguments)
}

#[test]
fn null_co_needs_a_negative_size() {
    let add = |size: i64| {
        [command(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "n", "size": size}),
        )]
    };
    let dies = fails(Kind::Assert, "");
    assert_eq!(last(&add(-1), &dies), Some("null-co-size"));
    assert_eq!(last(&add(1), &dies), None);
}

#[test]
fn a_bottom_has_to_be_outside_or_on_top() {
    let hangs = fails(Kind::Hang, "");
    let outside = Some("cor-bottom-outside-chain");
    assert_eq!(last(&[filter("t", "o")], &hangs), outside);
    assert_eq!(last(&[filter("t", "b")], &hangs), None);
    let crashes = fails(Kind::Crash, "SIGSEGV");
    assert_eq!(last(&[filter("b", "b")], &crashes), Some("cor-bottom-crash"));
    assert_eq!(last(&[filter("t", "b")], &crashes), None);
    assert_eq!(last(&[filter("b", "b")], fails(Kind::Crash, "SIGBUS")), None);
}

#[test]
fn a_filter_outlives_its_job_only_if_it_is_there() {
    let query = [command("query-named-block-nodes", json!({}))];
    let left = ["filter".to_owned()];
    let with = |case: &mut Case<'_>| {
        fails(Kind::Crash, "SIGSEGV")(case);
        // Lives as long as the test.
        case.leftovers = Box::leak(Box::new(left.clone()));
    };
    assert_eq!(last(&query, with), Some("filter-outlives-job"));
    assert_eq!(last(&query, fails(Kind::Crash, "SIGSEGV")), None);
}

#[test]
fn a_refused_stream_keeps_a_root_and_nothing_else() {
    let stream = [command("block-stream", json!({"job-id": "j", "device": "t"}))];
    let keeps = Some("refused-stream-keeps-root");
    let root = differs(What::Edges, "nothing more", "backend -root-> t");
    assert_eq!(last(&stream, &root), keeps);
    assert_eq!(
        last(&stream, differs(What::Edges, "backend -root-> t", "nothing more")),
        None
    );
    assert_eq!(last(&[filter("t", "b")], &root), None);
    let later = differs(What::Nodes, "nothing is left", "[(\"backend\", \"root\", \"t\")]");
    assert_eq!(last(&[stream[0].clone(), filter("t", "b")], &later), keeps);
    assert_eq!(last(&[filter("t", "b")], &later), None);
}

#[test]
fn a_header_and_its_backing_file() {
    let change = json!({"device": "t", "image-node-name": "t", "backing-file": "b"});
    let change = [command("change-backing-file", change)];
    let backing = differs(What::Backing, "t: b raw", "t: b qcow2");
    assert_eq!(last(&change, &backing), Some("backing-format-of-overlay"));
    assert_eq!(last(&[filter("t", "b")], &backing), None);
    let refused = differs(
        What::Result,
        "accepted",
        "GenericError: … cannot be used with a file name",
    );
    assert_eq!(
        last(&[filter("t", "b")], &refused),
        Some("inline-backing-over-header")
    );
    assert_eq!(last(&change, &refused), None);
}

#[test]
fn masks_below_a_detached_node_need_a_stream_and_a_refusal() {
    let stream = command("block-stream", json!({"job-id": "j", "device": "t"}));
    let gone = command("blockdev-del", json!({"node-name": "nowhere"}));
    let masks = differs(What::Masks, "t: perm 'consistent read'", "t: perm ''");
    let of = |more: &[Value]| last(more, &masks);
    assert_eq!(
        of(&[stream.clone(), gone.clone()]),
        Some("detached-backing-masks")
    );
    assert_eq!(of(&[gone]), None);
    assert_eq!(of(&[stream, filter("o", "o")]), None, "accepted");
}

fn read_only_t() -> Value {
    reopen(json!([{"driver": "qcow2", "node-name": "t", "file": "ft", "backing": "b", "read-only": true}]))
}

#[test]
fn a_stream_pins_only_what_it_reopened_in_vain() {
    let stream = |arguments: Value| {
        let mut all = json!({"job-id": "j", "device": "t"});
        for (key, value) in arguments.as_object().expect("an object") {
            all[key] = value.clone();
        }
        command("block-stream", all)
    };
    let late = stream(json!({"filter-node-name": "#bad"}));
    let early = stream(json!({"base-node": "nowhere"}));
    let add = command(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "r", "file": "t"}),
    );
    let refused = differs(What::Result, "accepted", "GenericError: Block node is read-only");
    let pins = Some("refused-stream-pins-read-only");
    let of = |before: &[&Value]| {
        let all: Vec<Value> = before.iter().map(|step| (*step).clone()).collect();
        last(&all, &refused)
    };
    let ro = &read_only_t();
    assert_eq!(of(&[ro, &late, &add]), pins);
    assert_eq!(of(&[ro, &early, &add]), None, "refused before");
    assert_eq!(of(&[ro, &stream(json!({})), &add]), None, "accepted");
    assert_eq!(of(&[&late, &add]), None, "it was writable");
    let flags = differs(What::ReadOnly, "", "");
    assert_eq!(last(&[ro.clone(), late.clone()], &flags), pins);
    assert_eq!(last(&[late], &flags), None);
    assert_eq!(last(&[ro.clone(), early], &flags), None);
}

#[test]
fn reopens_that_end_the_daemon() {
    let of = |options: Value, case: &dyn Fn(&mut Case<'_>)| last(&[reopen(options)], case);
    let crashes = fails(Kind::Crash, "SIGSEGV");
    let t = |more: Value| {
        let mut all = json!({"driver": "qcow2", "node-name": "t", "file": "ft", "backing": "b"});
        for (key, value) in more.as_object().expect("an object") {
            all[key] = value.clone();
        }
        all
    };
    assert_eq!(of(json!([]), &crashes), Some("reopen-of-nothing"));
    assert_eq!(of(json!([t(json!({}))]), &crashes), None);
    let lost = Some("refused-reopen-loses-file");
    let file = json!({"driver": "file", "node-name": "fx", "filename": "o"});
    let to = |file_of_t: &str, more: Value| {
        let mut all = t(more);
        all["file"] = json!(file_of_t);
        let steps = [command("blockdev-add", file.clone()), reopen(json!([all]))];
        last(&steps, &crashes)
    };
    assert_eq!(to("fx", json!({"force-share": false})), lost);
    let fb = json!({"driver": "file", "node-name": "fx", "filename": "b"});
    let other = json!([{"driver": "raw", "node-name": "o", "file": "fx"}]);
    assert_eq!(
        last(&[command("blockdev-add", fb), reopen(other)], &crashes),
        lost,
        "another driver"
    );
    assert_eq!(to("ft", json!({"force-share": false})), None, "the file it has");
    assert_eq!(to("fx", json!({})), None, "nothing that cannot change");
    let b = json!({"driver": "qcow2", "node-name": "b", "file": "fb", "backing": null});
    assert_eq!(
        of(json!([t(json!({"backing": null})), b]), &crashes),
        None,
        "nobody lets go"
    );
}

#[test]
fn a_listed_node_has_to_be_let_go_of() {
    // Only t holds this node.
    let inline = json!({"driver": "qcow2", "node-name": "u", "file": {"driver": "file", "filename": "o"},
        "backing": {"driver": "null-co", "node-name": "z", "size": 4096}});
    let of = |backing: Value| {
        let without_o = command("blockdev-del", json!({"node-name": "o"}));
        let add = command("blockdev-add", inline.clone());
        let u = json!({"driver": "qcow2", "node-name": "u", "file": {"driver": "file", "filename": "o"}, "backing": backing});
        let listed = reopen(json!([u, {"driver": "null-co", "node-name": "z", "size": 4096}]));
        last(&[without_o, add, listed], fails(Kind::Crash, "SIGSEGV"))
    };
    assert_eq!(of(Value::Null), Some("reopen-frees-listed-node"));
    assert_eq!(of(json!("z")), None);
}

#[test]
fn an_aborted_snapshot_takes_parents_if_the_overlay_has_some() {
    let snapshot =
        |overlay: &str| json!({"type": "blockdev-snapshot", "data": {"node": "t", "overlay": overlay}});
    let transaction = |actions: Value| command("transaction", json!({ "actions": actions }));
    let abort = json!({"type": "abort", "data": {}});
    let edges = differs(What::Edges, "r -file-> o", "r -file-> t");
    let used = command(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "r", "file": "o", "read-only": true}),
    );
    let of = |before: &[Value], actions: Value| {
        let mut all = before.to_vec();
        all.push(transaction(actions));
        last(&all, &edges)
    };
    let takes = Some("aborted-snapshot-takes-parents");
    let aborted = json!([snapshot("o"), abort]);
    assert_eq!(of(std::slice::from_ref(&used), aborted.clone()), takes);
    assert_eq!(of(&[], aborted), None, "nobody is above it");
    assert_eq!(of(&[used], json!([abort])), None, "no snapshot");
}

#[test]
fn a_node_is_drained_for_ever_by_a_command_that_comes_upon_it_twice() {
    let t = json!({"driver": "qcow2", "node-name": "t", "file": "ft", "backing": "b"});
    let file = json!({"driver": "file", "node-name": "ft", "filename": "t"});
    let hangs = fails(Kind::Hang, "a guest's request is not answered");
    let of = |options: Value| last(&[reopen(options)], &hangs);
    assert_eq!(
        of(json!([t, file])),
        Some("reopen-drains-for-ever"),
        "listed, and a child"
    );
    assert_eq!(of(json!([t])), None);
}

/// The scenario of the page, and the model before its step `at`.
fn strays(at: usize) -> (Scenario, World) {
    let entry = DEFECTS
        .iter()
        .find(|d| d.id == "stream-undoes-reopen")
        .expect("an entry");
    let scenario = parse::parse("test", entry.scenario.as_bytes()).expect("a scenario");
    let world = replayed(&scenario, at).pop().expect("some").world;
    (scenario, world)
}

#[test]
fn a_stream_strays_only_after_the_reopen() {
    assert_eq!(Strayed::of(&strays(7).1, "j0"), None, "before the reopen");
    let (scenario, world) = strays(8);
    let strayed = Strayed::of(&world, "j0").expect("it strayed");
    assert_eq!(Strayed::of(&world, "j1"), None, "another job");
    let none = Map::new();
    let of = |strayed: &[Strayed], step: usize, what: What, model: &str, qemu: &str| {
        let case = Case {
            scenario: &scenario,
            step,
            execute: "",
            arguments: &none,
            world: &world,
            past: &[],
            strayed,
            leftovers: &[],
            what: Some(what),
            failed: None,
            model,
            qemu,
        };
        explain(&case).map(|d| d.id)
    };
    let one = [strayed];
    let undoes = Some("stream-undoes-reopen");
    let (right, wrong) = ("n2 -backing-> n1", "n2 -backing-> t0");
    assert_eq!(of(&one, 8, What::Edges, right, wrong), undoes);
    assert_eq!(of(&[], 8, What::Edges, right, wrong), None, "it did not succeed");
    assert_eq!(
        of(&one, 8, What::Edges, "x -file-> y", "x -file-> z"),
        None,
        "other nodes"
    );
    assert_eq!(of(&one, 8, What::Jobs, right, wrong), None);
    assert_eq!(of(&one, 8, What::Backing, "i2.img: None", "i2.img: Some"), undoes);
    assert_eq!(
        of(&one, 8, What::Backing, "i9.img: None", "i9.img: Some"),
        None,
        "another image"
    );
    let (data, holds) = (
        "the write of step 3 within 0x200 bytes at 0x0",
        "block status says zeroes",
    );
    assert_eq!(
        of(&one, 9, What::Content, data, holds),
        undoes,
        "through the export above"
    );
    assert_eq!(
        of(&one, 8, What::Content, data, holds),
        None,
        "of nobody knows what"
    );
}
