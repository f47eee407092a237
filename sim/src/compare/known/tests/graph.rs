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
    assert_eq!(of(json!([t(json!({"force-share": true}))]), &crashes), lost);
    assert_eq!(of(json!([t(json!({"driver": "raw"}))]), &crashes), lost);
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
