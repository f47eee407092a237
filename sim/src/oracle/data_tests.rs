//! The data oracle fires on wrong content and is silent on right content.

use blkcheck_impl::event::Event;
use serde_json::json;

use super::*;
use crate::history::{Outcome, Record, StatusRun};
use crate::oracle::modelled::Modelled;
use crate::oracle::tests::scenario_of;
use crate::oracle::{FinalContent, Oracle, OracleName, View, Violation};
use crate::stamp;

/// base (raw, filled in its first half, 1000 bytes) under top (qcow2 with its second cluster of 512 filled); exports
/// `x` on top and `b` on base; then the given guest steps.
fn scenario(guests: &[&str]) -> Scenario {
    let guests: String = guests.iter().map(|g| format!(",{g}")).collect();
    scenario_of(&format!(
        r#"{{"version":1,"grain":64,"images":[
        {{"file":"base","format":"raw","size":1000,"fill":[{{"offset":0,"length":1000,"stored":"data"}}]}},
        {{"file":"top","format":"qcow2","size":2048,"cluster-size":512,"backing-file":"base","backing-format":"raw",
          "fill":[{{"offset":512,"length":64,"stored":"data"}}]}}],"steps":[
        {{"actor":"m","execute":"blockdev-add","arguments":{{"driver":"file","node-name":"fb","filename":"base"}}}},
        {{"actor":"m","execute":"blockdev-add","arguments":{{"driver":"raw","node-name":"b","file":"fb"}}}},
        {{"actor":"m","execute":"blockdev-add","arguments":{{"driver":"file","node-name":"ft","filename":"top"}}}},
        {{"actor":"m","execute":"blockdev-add","arguments":{{"driver":"qcow2","node-name":"t","file":"ft","backing":"b"}}}},
        {{"actor":"m","execute":"block-export-add","arguments":{{"type":"nbd","id":"b","node-name":"b","writable":true}}}},
        {{"actor":"m","execute":"block-export-add","arguments":{{"type":"nbd","id":"x","name":"x","node-name":"t","writable":true}}}}
        {guests}]}}"#
    ))
}

fn guest_step(op: &str, offset: u64, length: u64, export: &str) -> String {
    format!(r#"{{"actor":"g","export":"{export}","do":{{"{op}":{{"offset":{offset},"length":{length}}}}}}}"#)
}

pub(super) struct Run {
    pub(super) scenario: Scenario,
    pub(super) oracle: Modelled,
    now: u64,
}

impl Run {
    /// Everything opened; the graph's events are left out, since only content is looked at here.
    fn new(guests: &[(&str, u64, u64, &str)]) -> Run {
        let steps: Vec<String> = guests.iter().map(|g| guest_step(g.0, g.1, g.2, g.3)).collect();
        Run::of(scenario(&steps.iter().map(String::as_str).collect::<Vec<_>>()))
    }

    pub(super) fn of(scenario: Scenario) -> Run {
        let mut run = Run::unopened(scenario);
        for step in 0..6 {
            run.record(&Record::Issued(StepId(step))).expect("opens");
            let what = if step < 4 {
                "blockdev-add"
            } else {
                "block-export-add"
            };
            run.record(&Record::Layer(Event::MainBegin { what }))
                .expect("opens");
            assert!(run.oracle.accepts(), "step {step}");
        }
        run
    }

    /// Nothing happened yet.
    pub(super) fn unopened(scenario: Scenario) -> Run {
        let mut run = Run {
            oracle: Modelled::layer(),
            scenario,
            now: 0,
        };
        run.oracle.reset(&run.scenario);
        run
    }

    pub(super) fn record(&mut self, record: &Record) -> Result<(), Violation> {
        let view = View {
            scenario: &self.scenario,
            now: self.now,
            layer: None,
        };
        self.now += 1;
        self.oracle.record(&view, record)
    }

    /// Guest step `n` (from 0) begins, or ends.
    fn begin(&mut self, n: u32) {
        self.record(&Record::Issued(StepId(6 + n))).expect("begins");
    }
    fn done(&mut self, n: u32) {
        self.record(&Record::Ended(StepId(6 + n), Outcome::Done(Ok(()))))
            .expect("ends");
    }
    fn read(&mut self, n: u32, bytes: &[u8]) -> Result<(), Violation> {
        self.record(&Record::Ended(StepId(6 + n), Outcome::Read(Ok(bytes.into()))))
    }
}

fn stamped(offset: u64, length: usize, source: Source) -> Vec<u8> {
    let mut bytes = vec![0; length];
    stamp::fill(&mut bytes, offset, 64, source);
    bytes
}
const BASE: Source = Source::Fill { image: 0, fill: 0 };
const TOP: Source = Source::Fill { image: 1, fill: 0 };
fn step(n: u32) -> Source {
    Source::Step(StepId(6 + n))
}

/// What top shows at first.
fn initial() -> Vec<u8> {
    let mut bytes = stamped(0, 512, BASE);
    bytes.extend(stamped(512, 64, TOP));
    bytes.resize(2048, 0);
    bytes
}

#[test]
fn the_initial_view_goes_through_the_chain() {
    let mut run = Run::new(&[
        ("read", 0, 2048, "x"),
        ("read", 512, 64, "x"),
        ("read", 960, 64, "b"),
    ]);
    run.begin(0);
    assert_eq!(run.read(0, &initial()), Ok(()));
    run.begin(1);
    let v = run
        .read(1, &stamped(512, 64, BASE))
        .expect_err("the overlay decides");
    assert_eq!(v.oracle, OracleName::Data);
    assert!(
        v.message
            .ends_with("holds fill 0 of image base, expected fill 0 of image top"),
        "{}",
        v.message
    );
    // The base's last grain ends after 40 bytes.
    run.begin(2);
    let mut tail = stamped(960, 40, BASE);
    tail.resize(64, 0);
    assert_eq!(run.read(2, &tail), Ok(()));
}

#[test]
fn a_stale_read_names_who_overwrote_it() {
    let mut run = Run::new(&[("write", 0, 64, "x"), ("write", 0, 64, "x"), ("read", 0, 64, "x")]);
    for n in 0..2 {
        run.begin(n);
        run.done(n);
    }
    run.begin(2);
    let v = run.read(2, &stamped(0, 64, step(0))).expect_err("stale");
    assert_eq!(v.step, Some(StepId(8)));
    let text = "holds the stamp of step 6 (overwritten by step 7, which ended before this read began)";
    assert!(v.message.contains(text), "{}", v.message);
    assert_eq!(v.evidence.len(), 3);
}

#[test]
fn concurrent_and_failed_writes_allow_both_but_no_way_back() {
    let mut run = Run::new(&[
        ("write", 0, 64, "x"),
        ("read", 0, 64, "x"),
        ("read", 0, 64, "x"),
        ("read", 0, 64, "x"),
    ]);
    run.begin(0);
    run.begin(1);
    assert_eq!(run.read(1, &stamped(0, 64, BASE)), Ok(()));
    run.begin(2);
    assert_eq!(run.read(2, &stamped(0, 64, step(0))), Ok(()));
    run.begin(3);
    assert!(run.read(3, &stamped(0, 64, BASE)).is_err(), "new, then old again");
}

#[test]
fn torn_misplaced_and_foreign_content_is_reported() {
    let reads = [
        ("write", 0, 64, "x"),
        ("read", 0, 64, "x"),
        ("read", 0, 64, "x"),
        ("read", 0, 64, "x"),
    ];
    let mut run = Run::new(&reads);
    run.begin(0);
    run.begin(1);
    let mut torn = stamped(0, 64, step(0));
    torn[32..].copy_from_slice(&stamped(0, 64, BASE)[32..]);
    assert!(
        run.read(1, &torn)
            .expect_err("torn")
            .message
            .contains("neither zeroes nor one whole stamp")
    );
    run.begin(2);
    let v = run.read(2, &stamped(128, 64, BASE)).expect_err("misplaced");
    assert!(v.message.contains("which belongs to 0x80"), "{}", v.message);
    run.begin(3);
    let v = run.read(3, &stamped(0, 64, step(40))).expect_err("foreign");
    assert!(v.message.contains("(never written here)"), "{}", v.message);
}

#[test]
fn a_lower_write_may_show_until_the_overlay_is_written() {
    let mut run = Run::new(&[
        ("write", 0, 64, "b"),
        ("read", 0, 64, "x"),
        ("read", 0, 64, "x"),
        ("write", 0, 64, "x"),
        ("read", 0, 64, "x"),
        ("read", 512, 64, "x"),
    ]);
    run.begin(0);
    run.done(0);
    run.begin(1);
    assert_eq!(run.read(1, &stamped(0, 64, step(0))), Ok(()));
    run.begin(2);
    assert_eq!(run.read(2, &stamped(0, 64, BASE)), Ok(()), "copied up before");
    run.begin(3);
    run.done(3);
    run.begin(4);
    assert!(
        run.read(4, &stamped(0, 64, step(0))).is_err(),
        "the overlay decides now"
    );
    run.begin(5);
    assert!(
        run.read(5, &stamped(512, 64, step(0))).is_err(),
        "never below this grain"
    );
}

#[test]
fn zero_status_must_be_true() {
    let mut run = Run::new(&[("block-status", 0, 2048, "x"), ("block-status", 0, 2048, "x")]);
    let end = |run: &mut Run, n, runs: Vec<StatusRun>| {
        run.begin(n);
        run.record(&Record::Ended(StepId(6 + n), Outcome::Status(Ok(runs))))
    };
    let zero = |flags, bytes| StatusRun {
        flags,
        bytes,
        depth: 1,
    };
    assert_eq!(end(&mut run, 0, vec![zero(17, 1024), zero(2, 1024)]), Ok(()));
    let v = end(&mut run, 1, vec![zero(17, 512), zero(2, 1536)]).expect_err("data called zero");
    assert_eq!(v.oracle, OracleName::Status);
    assert!(v.message.contains("says ZERO at 0x200"), "{}", v.message);
}

#[test]
fn whole_contents_are_judged_at_the_end() {
    let mut run = Run::new(&[("write", 64, 64, "x")]);
    run.begin(0);
    run.done(0);
    let mut right = initial();
    right[64..128].copy_from_slice(&stamped(64, 64, step(0)));
    let closed = |run: &mut Run, bytes: &[u8]| {
        let view = View {
            scenario: &run.scenario,
            now: run.now,
            layer: None,
        };
        run.oracle.closed(
            &view,
            &[FinalContent {
                name: "top",
                bytes,
                allocated: &[],
                zeroes: &[],
            }],
        )
    };
    assert_eq!(closed(&mut run, &right), Ok(()));
    let v = closed(&mut run, &initial()).expect_err("a lost write");
    assert_eq!(v.oracle, OracleName::Transparency);
    assert_eq!(
        v.message,
        "at the end, top at 0x40 holds fill 0 of image base (overwritten by step 6, which ended before this read began), expected the stamp of step 6"
    );
}

#[test]
fn a_refusal_that_should_not_be_is_reported() {
    let mut run = Run::new(&[]);
    let refusal = crate::history::Refusal {
        class: "GenericError".into(),
        desc: "no".into(),
    };
    run.record(&Record::Layer(Event::MainEnd {
        what: "block-export-add",
    }))
    .expect("ends");
    let v = run
        .record(&Record::Ended(StepId(5), Outcome::Command(Err(refusal))))
        .expect_err("refused");
    assert_eq!(v.oracle, OracleName::Refusals);
    let mut run = Run::new(&[]);
    run.record(&Record::Layer(Event::MainEnd {
        what: "block-export-add",
    }))
    .expect("ends");
    let v = run
        .record(&Record::Ended(StepId(5), Outcome::Command(Ok(json!({})))))
        .expect_err("no events came");
    assert_eq!(
        (v.oracle, v.message.as_str()),
        (OracleName::Graph, "node 'fb' should exist")
    );
}

/// After a failed flush a closed image, or what a power cut left of one, may be as old as the last flush that succeeded, and no older.
#[test]
fn a_failed_flush_or_a_power_cut_may_lose_what_was_not_flushed_before() {
    let flush = r#"{"actor":"g","export":"x","do":"flush"}"#.to_owned();
    let write = |offset| guest_step("write", offset, 64, "x");
    let left = |lost: bool, cut: bool, holds: [Source; 2]| {
        // 0x200 is written, flushed, written again; 0x240 only before the flush.
        let steps = [write(512), write(576), flush.clone(), write(512)];
        let mut run = Run::of(scenario(&steps.each_ref().map(String::as_str)));
        for n in 0..4 {
            run.begin(n);
            run.done(n);
        }
        if lost {
            run.record(&Record::Fault(Fault {
                image: 1,
                kind: FaultKind::Flush,
                offset: 0,
                bytes: 0,
                done: 0,
                errno: 5,
            }))
            .expect("no verdict yet");
        }
        let mut bytes = initial();
        for (i, source) in holds.into_iter().enumerate() {
            let at = 512 + 64 * i;
            bytes[at..at + 64].copy_from_slice(&stamped(at as u64, 64, source));
        }
        let view = View {
            scenario: &run.scenario,
            now: 1000,
            layer: None,
        };
        let content = FinalContent {
            name: "top",
            bytes: &bytes,
            allocated: &[],
            zeroes: &[],
        };
        if cut {
            return run.oracle.after_power_cut(&view, &[(content, vec![0])]);
        }
        run.oracle.closed(&view, &[content])
    };
    let closed = |lost, holds| left(lost, false, holds);
    assert_eq!(closed(false, [step(3), step(1)]), Ok(()));
    assert!(
        closed(false, [step(0), step(1)]).is_err(),
        "nothing failed, nothing is lost"
    );
    assert_eq!(closed(true, [step(3), step(1)]), Ok(()));
    assert_eq!(
        closed(true, [step(0), step(1)]),
        Ok(()),
        "written after the flush, lost"
    );
    for (holds, why) in [
        ([TOP, step(1)], "flushed, then lost"),
        ([step(3), TOP], "flushed, then lost"),
        ([step(1), step(1)], "never written there"),
    ] {
        let v = closed(true, holds).expect_err(why);
        assert!(v.message.contains("after a failed flush"), "{}", v.message);
        let v = left(false, true, holds).expect_err(why);
        assert!(v.message.contains("or a power cut"), "{}", v.message);
    }
    for holds in [[step(3), step(1)], [step(0), step(1)]] {
        assert_eq!(left(false, true, holds), Ok(()), "a power cut loses as much");
    }
}

/// A command, as the model follows it; graph events are left out, so that there is a verdict on the graph, which is not looked at.
fn command(run: &mut Run, step: u32, what: &'static str, answer: Result<serde_json::Value, &str>) {
    let answer = answer.map_err(|desc| crate::history::Refusal {
        class: "GenericError".to_owned(),
        desc: desc.to_owned(),
    });
    drop(run.record(&Record::Layer(Event::MainEnd { what })));
    drop(run.record(&Record::Ended(StepId(step), Outcome::Command(answer))));
}

pub(super) fn flush_fails(run: &mut Run, image: u32) {
    run.record(&Record::Fault(Fault {
        image,
        kind: FaultKind::Flush,
        offset: 0,
        bytes: 0,
        done: 0,
        errno: 5,
    }))
    .expect("no verdict yet");
}

/// A write was under way while its image lost its backing file: the rest of its cluster is from there, or zeroes, whatever the model
/// thought first. Both may be what was stored before a flush failed.
#[test]
fn a_closed_image_may_hold_what_it_held_last() {
    let reopen = |backing: &str| {
        format!(
            r#"{{"actor":"m","execute":"blockdev-reopen","arguments":{{"options":[
            {{"driver":"qcow2","node-name":"t","file":"ft","backing":{backing}}}]}}}}"#
        )
    };
    let closed = |rest: Source| {
        let steps = [guest_step("write", 64, 64, "x"), reopen("null"), reopen(r#""b""#)];
        let mut run = Run::of(scenario(&steps.each_ref().map(String::as_str)));
        run.begin(0);
        for (n, beside) in [(1, true), (2, false)] {
            drop(run.record(&Record::Issued(StepId(6 + n))));
            let what = "blockdev-reopen";
            drop(run.record(&Record::Layer(Event::MainBegin { what })));
            assert!(run.oracle.accepts(), "reopen {n}");
            if beside {
                run.done(0);
            }
            command(&mut run, 6 + n, what, Ok(json!({})));
        }
        flush_fails(&mut run, 1);
        let mut bytes = initial();
        bytes[..64].copy_from_slice(&stamped(0, 64, rest));
        bytes[64..128].copy_from_slice(&stamped(64, 64, step(0)));
        let view = View {
            scenario: &run.scenario,
            now: 1000,
            layer: None,
        };
        let content = FinalContent {
            name: "top",
            bytes: &bytes,
            allocated: &[],
            zeroes: &[],
        };
        run.oracle.closed(&view, &[content])
    };
    assert_eq!(closed(BASE), Ok(()), "copied from below");
    let v = closed(TOP).expect_err("nobody wrote that");
    assert!(v.message.contains("after a failed flush"), "{}", v.message);
}

/// As above, and a flush fails that may lose the write: its cluster may have been filled when there was nothing below.
#[test]
fn a_lost_write_may_leave_what_was_copied_from_another_chain() {
    let reopen = |backing: &str| {
        format!(
            r#"{{"actor":"m","execute":"blockdev-reopen","arguments":{{"options":[
            {{"driver":"qcow2","node-name":"t","file":"ft","backing":{backing}}}]}}}}"#
        )
    };
    let closed = |written: u64, left: Option<Source>, flushed: bool| {
        let steps = [
            guest_step("write", written, 64, "x"),
            reopen("null"),
            reopen(r#""b""#),
            r#"{"actor":"g","export":"x","do":"flush"}"#.to_owned(),
        ];
        let mut run = Run::of(scenario(&steps.each_ref().map(String::as_str)));
        run.begin(0);
        for n in [1, 2] {
            drop(run.record(&Record::Issued(StepId(6 + n))));
            let what = "blockdev-reopen";
            drop(run.record(&Record::Layer(Event::MainBegin { what })));
            assert!(run.oracle.accepts(), "reopen {n}");
            if n == 1 {
                run.done(0);
            }
            command(&mut run, 6 + n, what, Ok(json!({})));
        }
        if flushed {
            run.begin(3);
            run.done(3);
        }
        flush_fails(&mut run, 1);
        let mut bytes = initial();
        match left {
            Some(source) => bytes[64..128].copy_from_slice(&stamped(64, 64, source)),
            None => bytes[64..128].fill(0),
        }
        let view = View {
            scenario: &run.scenario,
            now: 1000,
            layer: None,
        };
        let content = FinalContent {
            name: "top",
            bytes: &bytes,
            allocated: &[],
            zeroes: &[],
        };
        run.oracle.closed(&view, &[content])
    };
    for left in [Some(step(0)), Some(BASE), None] {
        assert_eq!(closed(64, left, false), Ok(()), "{left:?}");
    }
    assert_eq!(closed(64, Some(step(0)), true), Ok(()));
    assert!(closed(64, None, true).is_err(), "a flush made sure of the write");
    assert!(closed(64, Some(TOP), false).is_err(), "nobody wrote that");
    // Written was another cluster: nothing was copied into this one.
    assert_eq!(closed(576, Some(BASE), false), Ok(()));
    assert!(closed(576, None, false).is_err(), "only the layer below decides");
}

/// An export moves from a to b by a reopen that storage fails. Nobody knows which of them requests beside it reached, and c shows a; d has
/// nothing to do with it.
#[test]
fn a_change_that_came_to_nothing_puts_in_doubt_what_it_was_about() {
    let add =
        |options: serde_json::Value| json!({"actor": "m", "execute": "blockdev-add", "arguments": options});
    let image = |name: &str, backing: serde_json::Value| {
        add(json!({"driver": "qcow2", "node-name": name, "backing": backing,
            "file": {"driver": "file", "filename": name}}))
    };
    let export = |id: &str, node: &str| {
        json!({"actor": "m", "execute": "block-export-add",
            "arguments": {"type": "nbd", "id": id, "node-name": node, "name": id}})
    };
    let over = |file: &str| json!({"driver": "raw", "node-name": "f", "file": file});
    let none = serde_json::Value::Null;
    let read = |id: &str| json!({"actor": "g", "export": id, "do": {"read": {"offset": 0, "length": 64}}});
    let steps = json!([
        image("a", none.clone()),
        image("b", none.clone()),
        image("c", json!("a")),
        image("d", none),
        add(over("a")),
        export("x", "f"),
        export("y", "c"),
        export("z", "d"),
        {"actor": "m", "execute": "blockdev-reopen", "arguments": {"options": [over("b")]}},
        read("x"),
        read("y"),
        read("z"),
    ]);
    let images = ["a", "b", "c", "d"].map(|file| json!({"file": file, "format": "qcow2", "size": 2048}));
    let scenario = json!({"version": 1, "grain": 64, "images": images, "steps": steps});
    let after = |failed: bool, read: u32| {
        let mut run = Run::unopened(scenario_of(&scenario.to_string()));
        for step in 0..9 {
            drop(run.record(&Record::Issued(StepId(step))));
            let what = match step {
                0..5 => "blockdev-add",
                5..8 => "block-export-add",
                _ => "blockdev-reopen",
            };
            drop(run.record(&Record::Layer(Event::MainBegin { what })));
            assert!(run.oracle.accepts(), "step {step}");
            if step < 8 {
                command(&mut run, step, what, Ok(json!({})));
            } else if failed {
                flush_fails(&mut run, 0);
                command(
                    &mut run,
                    step,
                    what,
                    Err("Error flushing drive: Input/output error"),
                );
            } else {
                command(&mut run, step, what, Ok(json!({})));
            }
        }
        run.record(&Record::Issued(StepId(read))).expect("begins");
        let foreign = stamped(0, 64, step(40));
        run.record(&Record::Ended(StepId(read), Outcome::Read(Ok(foreign.into()))))
    };
    for read in [9, 10] {
        assert_eq!(after(true, read), Ok(()), "step {read} is not judged");
        assert!(after(false, read).is_err(), "nothing failed");
    }
    assert!(after(true, 11).is_err(), "d is judged as ever");
}

#[path = "data_lost_tests.rs"]
mod lost;
