//! Every entry is complete, and a finding is explained only with its cause in the run.

mod backups;
mod failed_reads;
mod failing;
mod kept;
mod streams;
mod tail;

use blkcheck_impl::event::Event;
use serde_json::json;

use super::*;
use crate::scenario::parse;

#[test]
fn every_entry_has_a_scenario_and_a_page() {
    for defect in gated() {
        let scenario = parse::parse(defect.id, defect.scenario.as_bytes());
        assert!(scenario.is_ok(), "{}: {scenario:?}", defect.id);
        assert!(defect.page.starts_with("# "), "{}", defect.id);
        assert!(
            defect.page.contains(&format!("{}.json", defect.id)),
            "{}",
            defect.id
        );
    }
    for (id, _) in MATCHERS.iter().chain(super::failing::MATCHERS) {
        assert!(find(id).is_some(), "{id} is not in a list");
    }
}

#[test]
fn only_what_zeroes_a_cluster_or_gives_it_back_collides() {
    let range = |offset, length| Range { offset, length };
    let write = GuestOp::Write(range(0, 512));
    let zeroes = |offset| GuestOp::WriteZeroes(range(offset, 512));
    assert!(collide(write, zeroes(0), 512));
    assert!(!collide(write, zeroes(512), 512), "another cluster");
    assert!(collide(write, zeroes(512), 1024), "the same one");
    assert!(!collide(write, write, 512), "writes wait for each other");
    assert!(!collide(GuestOp::Read(range(0, 512)), zeroes(0), 512));
    assert!(collide(GuestOp::Discard(range(0, 64)), zeroes(256), 512));
    let read = GuestOp::Read(range(0, 512));
    assert!(
        collide(read, GuestOp::Discard(range(256, 512)), 512),
        "it is given back"
    );
    assert!(!collide(read, GuestOp::Discard(range(512, 512)), 512));
}

fn explained(oracle: OracleName, message: &str, steps: &str, records: &[Record]) -> Option<&'static str> {
    let text = format!(
        r#"{{"version":1,"grain":512,"images":[{{"file":"a","format":"qcow2","size":4096,"cluster-size":512}}],
            "steps":[{steps}]}}"#
    );
    let scenario: Scenario = serde_json::from_str(&text).expect("a scenario");
    let violation = Violation {
        oracle,
        message: message.to_owned(),
        step: None,
        evidence: Vec::new(),
    };
    explain(&scenario, &violation, records).map(|d| d.id)
}

#[test]
fn a_finding_needs_its_cause_in_the_run() {
    let steps = r#"{"actor":"a","export":"x","do":{"write":{"offset":0,"length":512}}},
            {"actor":"b","export":"x","do":{"discard":{"offset":0,"length":512}}}"#;
    let lost = "at the end, n at 0x0 holds fill 0 of image a, expected zeroes";
    let (first, second) = (Record::Issued(StepId(0)), Record::Issued(StepId(1)));
    let ended = Record::Ended(StepId(0), Outcome::Done(Ok(())));
    let together = [first.clone(), second.clone(), ended.clone()];
    let apart = [first, ended, second];
    let of = |oracle, records| explained(oracle, lost, steps, records);
    assert_eq!(of(OracleName::Data, &together), Some("zeroes-under-write"));
    assert_eq!(of(OracleName::Data, &apart), None);
    assert_eq!(of(OracleName::Graph, &together), None);
}

/// Images b, t over it, and o that is shorter, one node each (and l without); and then these steps. All the commands are carried out, the last
/// one without an answer if `open`.
fn after(more: &[(&'static str, Value)], open: bool, violation: &Violation) -> Option<&'static str> {
    let qcow2 = |name: &str, backing: Value| {
        let file = json!({"driver": "file", "node-name": format!("f{name}"), "filename": name});
        json!({"driver": "qcow2", "node-name": name, "backing": backing, "file": file})
    };
    let image =
        |name: &str, size: u64| json!({"file": name, "format": "qcow2", "size": size, "cluster-size": 512});
    let mut commands = vec![
        ("blockdev-add", qcow2("b", Value::Null)),
        ("blockdev-add", qcow2("t", json!("b"))),
        ("blockdev-add", qcow2("o", Value::Null)),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "e", "node-name": "t", "writable": true}),
        ),
    ];
    commands.extend_from_slice(more);
    let step = |(execute, arguments): &(&str, Value)| json!({"actor": "m", "execute": execute, "arguments": arguments});
    let steps: Vec<Value> = commands.iter().map(step).collect();
    let images = [
        image("b", 4096),
        image("t", 4096),
        image("o", 2048),
        image("l", 4096),
    ];
    let scenario = json!({"version": 1, "grain": 512, "images": images, "steps": steps});
    let scenario: Scenario = serde_json::from_value(scenario).expect("a scenario");
    let mut world = crate::follow::world_of(&scenario);
    let mut records = Vec::new();
    for (step, (what, arguments)) in (0..).zip(&commands) {
        let result = world
            .execute(&Command::new(what, arguments))
            .map_err(|refusal| Refusal {
                class: refusal.class.name().to_owned(),
                desc: refusal.desc,
            });
        let (what, step) = (*what, StepId(step));
        records.push(Record::Issued(step));
        if open && step.0 as usize + 1 == commands.len() {
            break;
        }
        records.extend([
            Record::Layer(Event::MainBegin { what }),
            Record::Layer(Event::MainEnd { what }),
            Record::Ended(step, Outcome::Command(result)),
        ]);
    }
    explain(&scenario, violation, &records).map(|d| d.id)
}

fn found(oracle: OracleName, message: &str) -> Violation {
    Violation {
        oracle,
        message: message.to_owned(),
        step: None,
        evidence: Vec::new(),
    }
}

fn reopen(options: Value) -> (&'static str, Value) {
    let mut arguments = json!({});
    arguments["options"] = options;
    ("blockdev-reopen", arguments)
}

fn raw(file: &str) -> (&'static str, Value) {
    (
        "blockdev-add",
        json!({"driver": "raw", "node-name": "r", "file": file}),
    )
}

fn stream(device: &str) -> (&'static str, Value) {
    ("block-stream", json!({"job-id": "j", "device": device}))
}

#[test]
fn a_wait_without_end_needs_a_reopen_that_came_upon_a_node_twice() {
    let t = json!({"driver": "qcow2", "node-name": "t", "file": "ft", "backing": "b"});
    let file = json!({"driver": "file", "node-name": "ft", "filename": "t"});
    let twice = [reopen(json!([t, file]))];
    let for_ever = Some("reopen-drains-for-ever");
    let waits = found(
        OracleName::Liveness,
        "nothing can happen any more, and guest0 waits",
    );
    let drains = found(
        OracleName::Daemon,
        "the daemon went on for 10 s without coming to rest",
    );
    assert_eq!(after(&twice, false, &waits), for_ever);
    assert_eq!(after(&twice, false, &drains), for_ever);
    assert_eq!(after(&[reopen(json!([t]))], false, &waits), None, "once");
    assert_eq!(after(&[], false, &drains), None);
    let dies = found(OracleName::Daemon, "the daemon died of SIGSEGV");
    assert_eq!(after(&twice, false, &dies), None);
    let data = found(OracleName::Data, "nothing can happen any more");
    assert_eq!(after(&twice, false, &data), None, "another oracle");
}

#[test]
fn status_calls_data_zeroes_only_above_a_raw_node_on_an_overlay() {
    let zero = found(OracleName::Status, "block status says ZERO at 0x0 of node 'r'");
    let loses = Some("stream-over-raw-loses-data");
    assert_eq!(after(&[raw("t")], false, &zero), loses);
    assert_eq!(after(&[raw("o")], false, &zero), None, "nothing is below it");
    assert_eq!(after(&[], false, &zero), None);
    let other = found(
        OracleName::Status,
        "block status makes no progress at 0x0 of node 'r'",
    );
    assert_eq!(after(&[raw("t")], false, &other), None);
}

#[test]
fn a_stream_loses_data_only_over_a_raw_node_on_an_overlay() {
    let lost = found(
        OracleName::Data,
        "at the end, r at 0x0 holds zeroes, expected fill 0 of image b",
    );
    let unexpected = found(
        OracleName::Data,
        "at the end, r at 0x0 holds zeroes, expected zeroes",
    );
    let over = |file: &str| [raw(file), stream("r")];
    assert_eq!(
        after(&over("t"), false, &lost),
        Some("stream-over-raw-loses-data")
    );
    assert_eq!(after(&over("o"), false, &lost), None);
    assert_eq!(after(&over("t"), false, &unexpected), None);
    assert_eq!(after(&[raw("t"), stream("b")], false, &lost), None, "not over it");
}

#[test]
fn what_ends_the_daemon_is_the_command_that_it_does_not_answer() {
    let add = |more: Value| ("blockdev-add", more);
    let null_co = |size: i64| [add(json!({"driver": "null-co", "node-name": "z", "size": size}))];
    let aborts = found(OracleName::Daemon, "the daemon died of SIGABRT");
    assert_eq!(after(&null_co(-1), true, &aborts), Some("null-co-size"));
    assert_eq!(after(&null_co(1), true, &aborts), None);
    let filter = |file: &str, bottom: &str| {
        [add(
            json!({"driver": "copy-on-read", "node-name": "c", "file": file, "bottom": bottom}),
        )]
    };
    let spins = found(
        OracleName::Daemon,
        "the daemon went on for 10 s without coming to rest",
    );
    assert_eq!(
        after(&filter("t", "o"), true, &spins),
        Some("cor-bottom-outside-chain")
    );
    assert_eq!(after(&filter("t", "b"), true, &spins), None);
    let crashes = found(OracleName::Daemon, "the daemon died of SIGSEGV");
    assert_eq!(after(&filter("b", "b"), true, &crashes), Some("cor-bottom-crash"));
    assert_eq!(after(&filter("t", "b"), true, &crashes), None);
}

#[test]
fn a_copy_below_bottom_is_told_of_that_node() {
    let filter = [(
        "blockdev-add",
        json!({"driver": "copy-on-read", "node-name": "c", "file": "t", "bottom": "t"}),
    )];
    let of = |node: &str| {
        found(
            OracleName::Bottom,
            &format!("node '{node}' holds what only layers below have"),
        )
    };
    assert_eq!(after(&filter, false, &of("t")), Some("cor-copies-below-bottom"));
    assert_eq!(after(&filter, false, &of("b")), None);
    assert_eq!(
        after(&[stream("t")], false, &of("t")),
        None,
        "a stream of everything has no bottom"
    );
}

#[test]
fn lengths_have_to_have_changed() {
    let snapshot = |node: &str| [("blockdev-snapshot", json!({"node": node, "overlay": "o"}))];
    let assertion = found(
        OracleName::Daemon,
        "nbd_co_send_sparse_read: Assertion `pnum' failed",
    );
    assert_eq!(
        after(&snapshot("t"), false, &assertion),
        Some("snapshot-over-shorter-overlay")
    );
    assert_eq!(after(&snapshot("b"), false, &assertion), None, "under no export");
    let above = |size: u64| {
        [
            raw("o"),
            ("block_resize", json!({"node-name": "o", "size": size})),
        ]
    };
    let stale = found(OracleName::Transparency, "r is 2048 bytes long, expected 1024");
    assert_eq!(after(&above(1024), false, &stale), Some("filter-keeps-length"));
    assert_eq!(after(&above(2048), false, &stale), None);
    let other = found(OracleName::Transparency, "t is 2048 bytes long, expected 1024");
    assert_eq!(after(&above(1024), false, &other), None, "another node");
    let window = (
        "blockdev-add",
        json!({"driver": "raw", "node-name": "w", "file": "o", "size": 2048}),
    );
    let export = (
        "block-export-add",
        json!({"type": "nbd", "id": "w", "node-name": "w"}),
    );
    let shorter = |size: u64| {
        let options = json!([{"driver": "raw", "node-name": "w", "file": "o", "size": size}]);
        [window.clone(), export.clone(), reopen(options)]
    };
    assert_eq!(
        after(&shorter(512), false, &assertion),
        Some("reopen-shortens-export")
    );
    assert_eq!(after(&shorter(2048), false, &assertion), None);
}

#[test]
fn what_streams_leave_behind() {
    let uncovers = found(
        OracleName::Transparency,
        "at the end, t at 0x80 holds fill 0 of image b, expected zeroes",
    );
    assert_eq!(
        after(&[stream("t")], false, &uncovers),
        Some("stream-uncovers-base")
    );
    assert_eq!(after(&[], false, &uncovers), None);
    let full = found(
        OracleName::Jobs,
        "job 'j' ends with 'No space left on device', expected no error",
    );
    let to_b = |below: Value| {
        let b = json!({"driver": "qcow2", "node-name": "b", "file": "fb", "backing": below});
        let stream = json!({"job-id": "j", "device": "t", "base-node": "b"});
        [reopen(json!([b])), ("block-stream", stream)]
    };
    assert_eq!(
        after(&to_b(json!("o")), false, &full),
        Some("stream-records-description")
    );
    assert_eq!(
        after(&to_b(Value::Null), false, &full),
        None,
        "as its header says"
    );
    let refused = ("block-stream", json!({"job-id": "j", "device": "t"}));
    let mut root = found(
        OracleName::Graph,
        "node 't' has other parents than it should have",
    );
    root.evidence = ["expected: a backend", "found: a backend", "found: a backend"]
        .map(str::to_owned)
        .to_vec();
    let writer = (
        "block-export-add",
        json!({"type": "nbd", "id": "w", "node-name": "b", "writable": true}),
    );
    assert_eq!(
        after(&[writer.clone(), refused.clone()], false, &root),
        Some("refused-stream-keeps-root")
    );
    assert_eq!(
        after(std::slice::from_ref(&refused), false, &root),
        None,
        "accepted"
    );
    root.evidence.pop();
    assert_eq!(
        after(&[writer, refused], false, &root),
        None,
        "no more backends than there should be"
    );
}

/// The stress tier looks at the graph at the end only.
#[test]
fn a_root_that_was_kept_is_seen_at_the_end_on_devices_of_refused_streams_and_below() {
    let writer = (
        "block-export-add",
        json!({"type": "nbd", "id": "w", "node-name": "b", "writable": true}),
    );
    let stream = ("block-stream", json!({"job-id": "j", "device": "t"}));
    let left = |names: &[&str]| {
        let mut left = found(OracleName::Leaks, "3 things are left after shutdown");
        left.evidence = names.iter().map(|name| format!("node {name}")).collect();
        left
    };
    let both = [writer.clone(), stream.clone()];
    let keeps = Some("refused-stream-keeps-root");
    assert_eq!(after(&both, false, &left(&["t", "b", "#block007"])), keeps);
    assert_eq!(after(&both, false, &left(&["b"])), None, "the device went");
    assert_eq!(after(&both, false, &left(&["t", "x"])), None, "not below it");
    let accepted = std::slice::from_ref(&stream);
    assert_eq!(after(accepted, false, &left(&["t", "b"])), None, "accepted");
    let mut job = left(&["t"]);
    job.evidence.push("a job".to_owned());
    assert_eq!(after(&both, false, &job), None, "a job is left as well");
}

#[test]
fn a_header_and_its_backing_format() {
    let change = (
        "change-backing-file",
        json!({"device": "t", "image-node-name": "t", "backing-file": "b"}),
    );
    let mut names = found(
        OracleName::Image,
        "image t names another backing file than it should",
    );
    names.evidence = vec!["expected: \"b\" raw".to_owned(), "found: \"b\" qcow2".to_owned()];
    assert_eq!(
        after(std::slice::from_ref(&change), false, &names),
        Some("backing-format-of-overlay")
    );
    assert_eq!(after(&[], false, &names), None);
    names.evidence[1] = "found: \"o\" qcow2".to_owned();
    assert_eq!(after(&[change], false, &names), None, "another name");
}

#[test]
fn a_copy_above_a_filter_needs_one() {
    let undone = found(
        OracleName::Data,
        "t at 0x0 holds fill 0 of image t (overwritten by step 4)",
    );
    let filter = |file: &str| {
        (
            "blockdev-add",
            json!({"driver": "copy-on-read", "node-name": "c", "file": file}),
        )
    };
    let undoes = Some("copy-above-filter-undoes-write");
    assert_eq!(after(&[raw("o"), filter("r")], false, &undone), undoes);
    assert_eq!(
        after(&[raw("o"), filter("o")], false, &undone),
        None,
        "over an image"
    );
}

#[test]
fn writes_are_lost_beside_an_aborted_snapshot_only() {
    let steps = |actions: &str| {
        format!(
            r#"{{"actor":"a","export":"x","do":{{"write":{{"offset":0,"length":512}}}}}},
            {{"actor":"m","execute":"transaction","arguments":{{"actions":[{actions}]}}}}"#
        )
    };
    let snapshot = r#"{"type":"blockdev-snapshot","data":{"node":"n","overlay":"o"}}"#;
    let abort = r#"{"type":"abort","data":{}}"#;
    let (write, transaction) = (StepId(0), StepId(1));
    let refused = Refusal {
        class: "GenericError".to_owned(),
        desc: "Transaction aborted using Abort action".to_owned(),
    };
    let answers = Record::Ended(transaction, Outcome::Command(Err(refused)));
    let accepts = Record::Ended(transaction, Outcome::Command(Ok(json!({}))));
    let done = Record::Ended(write, Outcome::Done(Ok(())));
    let begin = [Record::Issued(write), Record::Issued(transaction)];
    let run = |end: &[Record]| [&begin[..], end].concat();
    let of = |actions: &[&str], records: &[Record]| {
        explained(
            OracleName::Data,
            "n at 0x0 holds zeroes",
            &steps(&actions.join(",")),
            records,
        )
    };
    let loses = Some("aborted-snapshot-loses-writes");
    let aborted = run(&[answers.clone(), done.clone()]);
    assert_eq!(of(&[snapshot, abort], &aborted), loses);
    assert_eq!(of(&[snapshot], &aborted), None, "nothing follows the snapshot");
    assert_eq!(of(&[abort, snapshot], &aborted), None);
    assert_eq!(
        of(&[snapshot, abort], &run(&[accepts, done.clone()])),
        None,
        "accepted"
    );
    let apart = [Record::Issued(write), done, Record::Issued(transaction), answers];
    assert_eq!(of(&[snapshot, abort], &apart), None, "the write was over");
}

#[test]
fn a_read_of_what_is_written_elsewhere_needs_a_discard_beside_it() {
    let steps = |second: &str| {
        format!(
            r#"{{"actor":"a","export":"x","do":{{"read":{{"offset":0,"length":512}}}}}},
            {{"actor":"b","export":"x","do":{{"{second}":{{"offset":0,"length":512}}}}}}"#
        )
    };
    let both = [Record::Issued(StepId(0)), Record::Issued(StepId(1))];
    let of = |second: &str, step: u32| {
        let text = format!(
            r#"{{"version":1,"grain":512,"images":[{{"file":"a","format":"qcow2","size":4096,"cluster-size":512}}],
            "steps":[{}]}}"#,
            steps(second)
        );
        let scenario: Scenario = serde_json::from_str(&text).expect("a scenario");
        let mut misplaced = found(
            OracleName::Data,
            "read at 0x0: write of step 3, which belongs to 0x200",
        );
        misplaced.step = Some(StepId(step));
        explain(&scenario, &misplaced, &both).map(|d| d.id)
    };
    assert_eq!(of("discard", 0), Some("discard-under-read"));
    assert_eq!(of("write-zeroes", 0), None, "it frees nothing");
    assert_eq!(of("discard", 7), None, "another request");
}

#[test]
fn an_overlay_loses_its_parents_only_to_a_transaction_that_is_taken_back() {
    let others = |node: &str| {
        let text = format!("node '{node}' has other parents than it should have");
        found(OracleName::Graph, &text)
    };
    let snapshot = |node: &str, overlay: &str| json!({"type": "blockdev-snapshot", "data": {"node": node, "overlay": overlay}});
    let transaction = |actions: &[Value]| ("transaction", json!({ "actions": actions }));
    let uses = (
        "blockdev-add",
        json!({"driver": "raw", "node-name": "q", "file": "o"}),
    );
    let abort = json!({"type": "abort", "data": {}});
    let refused = transaction(&[snapshot("b", "o"), abort.clone()]);
    let known = Some("aborted-snapshot-takes-parents");
    assert_eq!(
        after(&[uses.clone(), refused.clone()], false, &others("b")),
        known
    );
    assert_eq!(
        after(&[uses.clone(), refused.clone()], false, &others("o")),
        known
    );
    assert_eq!(
        after(&[uses.clone(), refused.clone()], false, &others("t")),
        None,
        "another node"
    );
    assert_eq!(
        after(std::slice::from_ref(&refused), false, &others("b")),
        None,
        "nobody was above it"
    );
    let early = transaction(&[abort]);
    assert_eq!(after(&[uses, early], false, &others("b")), None, "no snapshot");
}

#[test]
fn a_bitmap_stays_read_only_only_after_its_node_was_to_become_so() {
    let refused = |found_words: &str| Violation {
        evidence: vec![
            "expected: GenericError: Dirty bitmap 'c' not found".to_owned(),
            format!("found:    GenericError: {found_words}"),
        ],
        ..found(
            OracleName::Refusals,
            "step 6, m: block-dirty-bitmap-merge is refused in other words than it should be",
        )
    };
    let add = |persistent: bool| {
        let given = json!({"node": "t", "name": "k", "persistent": persistent});
        ("block-dirty-bitmap-add", given)
    };
    let entry = json!({"driver": "qcow2", "node-name": "t", "file": "ft", "backing": "b", "read-only": true});
    let reopen = ("blockdev-reopen", json!({"options": [entry]}));
    let read_only = refused("Bitmap 'k' is readonly and cannot be modified");
    let of = |more: &[(&'static str, Value)], violation: &Violation| after(more, false, violation);
    let both = [add(true), reopen.clone()];
    assert_eq!(of(&both, &read_only), Some("refused-reopen-stops-writes"));
    assert_eq!(of(&both, &refused("Dirty bitmap 'd' not found")), None);
    assert_eq!(
        of(&both[..1], &read_only),
        None,
        "nothing was to become read-only"
    );
    assert_eq!(of(&[add(false), reopen], &read_only), None, "it is not stored");
}
