//! What may be gone after a failed flush or a power cut, and what may not: in an overlay, of FUA writes, and after a stream.

use blkcheck_impl::jobs::JobStatus::{self, Created, Pending, Running, Undefined, Waiting};
use blkcheck_impl::types::JobId;

use super::*;
use crate::oracle::data::LEFT_OUT;

/// How a run ended, with the images below the overlay by its header.
#[derive(Clone, Copy, Debug)]
enum End<'a> {
    /// Everything was closed, and a flush of this image had failed.
    FlushFailed(u32),
    PowerCut(&'a [usize]),
}

const CUT: End<'_> = End::PowerCut(&[0]);
const ENDS: [End<'_>; 3] = [CUT, End::FlushFailed(0), End::FlushFailed(1)];

fn flush() -> String {
    r#"{"actor":"g","export":"x","do":"flush"}"#.to_owned()
}
fn on(op: &str, offset: u64, export: &str) -> String {
    guest_step(op, offset, 64, export)
}

/// Guests' steps ended well, one after the other, but for the last one if `open`; then this: the verdict on the overlay if it holds
/// `source` at `at`, and elsewhere what it held at first.
fn left(steps: &[String], open: bool, end: End<'_>, at: usize, source: Source) -> Result<(), Violation> {
    let mut run = Run::of(scenario(&steps.iter().map(String::as_str).collect::<Vec<_>>()));
    let count = u32::try_from(steps.len()).expect("few");
    for n in 0..count {
        run.begin(n);
        if !(open && n + 1 == count) {
            run.done(n);
        }
    }
    judged(&mut run, end, at, Some(source))
}

/// `None`: zeroes.
fn judged(run: &mut Run, end: End<'_>, at: usize, source: Option<Source>) -> Result<(), Violation> {
    if let End::FlushFailed(image) = end {
        flush_fails(run, image);
    }
    let mut bytes = initial();
    bytes[at..at + 64].fill(0);
    if let Some(source) = source {
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
    match end {
        End::FlushFailed(_) => run.oracle.closed(&view, &[content]),
        End::PowerCut(below) => run.oracle.after_power_cut(&view, &[(content, below.to_vec())]),
    }
}

fn is_lost(verdict: Result<(), Violation>) {
    let v = verdict.expect_err("lost");
    assert_eq!(v.oracle, OracleName::Transparency);
    assert!(v.message.contains("after a failed flush or a power cut"), "{v:?}");
}

/// Where an overlay held nothing at first, a flushed write makes it hold something for good.
#[test]
fn what_is_below_does_not_show_where_an_overlay_was_flushed() {
    let flushed = [on("write", 0, "x"), flush()];
    for end in ENDS {
        assert_eq!(left(&flushed, false, end, 0, step(0)), Ok(()), "{end:?}");
        is_lost(left(&flushed, false, end, 0, BASE));
    }
    for end in [CUT, End::FlushFailed(1)] {
        assert_eq!(left(&flushed[..1], false, end, 0, BASE), Ok(()), "{end:?}");
        // The flush is under way yet.
        assert_eq!(left(&flushed, true, end, 0, BASE), Ok(()), "{end:?}");
    }
    // Nothing was lost of the overlay.
    is_lost(left(&flushed[..1], false, End::FlushFailed(0), 0, BASE));
    // What it held from the start hides the layers below as well.
    is_lost(left(&[], false, CUT, 512, BASE));
}

#[test]
fn a_guest_below_is_seen_only_where_the_overlay_need_not_hold_anything() {
    let steps = [on("write", 0, "b"), on("write", 0, "x"), flush()];
    is_lost(left(&steps, false, CUT, 0, step(0)));
    assert_eq!(left(&steps[..2], false, CUT, 0, step(0)), Ok(()), "not flushed");
    let beside = [steps[0].clone(), flush()];
    for source in [BASE, step(0)] {
        assert_eq!(left(&beside, false, CUT, 0, source), Ok(()), "not written there");
    }
}

#[test]
fn a_discard_may_let_through_what_is_below() {
    let steps = [
        on("write", 0, "x"),
        flush(),
        on("discard", 0, "x"),
        on("write", 0, "x"),
    ];
    assert_eq!(left(&steps[..3], false, CUT, 0, BASE), Ok(()));
    assert_eq!(
        left(&steps, false, CUT, 0, BASE),
        Ok(()),
        "written again, not flushed"
    );
    let again = [&steps[2..], &[flush()]].concat();
    is_lost(left(&again, false, CUT, 0, BASE));
}

#[test]
fn a_fua_write_that_ended_well_is_not_lost() {
    let fua = || on("write-fua", 0, "x");
    for end in ENDS {
        is_lost(left(&[fua()], false, end, 0, BASE));
        assert_eq!(left(&[fua()], false, end, 0, step(0)), Ok(()), "{end:?}");
    }
    assert_eq!(left(&[fua()], true, CUT, 0, BASE), Ok(()), "under way");
    assert_eq!(
        left(&[on("write", 0, "x")], false, CUT, 0, BASE),
        Ok(()),
        "without FUA"
    );
    // It hides what ended before it began, in what the overlay held at first, too.
    let two = |first: &str, second: &str| [on(first, 512, "x"), on(second, 512, "x")];
    for lost in [TOP, step(0)] {
        is_lost(left(&two("write", "write-fua"), false, CUT, 512, lost));
        assert_eq!(left(&two("write", "write"), false, CUT, 512, lost), Ok(()));
    }
    is_lost(left(&two("write-fua", "write"), false, CUT, 512, TOP));
    assert_eq!(left(&two("write-fua", "write"), false, CUT, 512, step(0)), Ok(()));
}

/// The overlay is streamed: it stands on nothing any more when that is `over`, whatever its header says yet. A guest has
/// `written`, and flushed.
fn streamed(over: bool, written: bool) -> Run {
    let opening = r#"[
        {"actor":"m","execute":"blockdev-add","arguments":{"driver":"file","node-name":"fb","filename":"base"}},
        {"actor":"m","execute":"blockdev-add","arguments":{"driver":"raw","node-name":"b","file":"fb"}},
        {"actor":"m","execute":"blockdev-add","arguments":{"driver":"file","node-name":"ft","filename":"top"}},
        {"actor":"m","execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"t","file":"ft","backing":"b"}},
        {"actor":"m","execute":"block-export-add","arguments":{"type":"nbd","id":"x","name":"x","node-name":"t","writable":true}},
        {"actor":"m","execute":"block-stream","arguments":{"job-id":"j","device":"t"}},
        {"actor":"g","export":"x","do":{"write":{"offset":0,"length":64}}},
        {"actor":"g","export":"x","do":"flush"}]"#;
    let mut described = scenario(&[]);
    described.steps = serde_json::from_str(opening).expect("steps");
    let mut run = Run::unopened(described);
    for step in 0..6 {
        drop(run.record(&Record::Issued(StepId(step))));
        let what = match step {
            0..4 => "blockdev-add",
            4 => "block-export-add",
            _ => "block-stream",
        };
        drop(run.record(&Record::Layer(Event::MainBegin { what })));
        assert!(run.oracle.accepts(), "step {step}");
        if step == 5 {
            walk(&mut run, &[Undefined, Created]);
        }
        command(&mut run, step, what, Ok(json!({})));
    }
    walk(&mut run, &[Created, Running]);
    if over {
        walk(&mut run, &[Running, Waiting, Pending]);
        let name = "BLOCK_JOB_COMPLETED";
        let data = json!({"device": "j", "type": "stream", "len": 2048, "offset": 2048, "speed": 0}).into();
        drop(run.record(&Record::Layer(Event::Qmp { name, data })));
    }
    for n in if written { 0..2 } else { 0..0 } {
        run.begin(n);
        run.done(n);
    }
    run
}

fn walk(run: &mut Run, states: &[JobStatus]) {
    for pair in states.windows(2) {
        drop(run.record(&Record::Layer(Event::JobStatus {
            job: JobId(0),
            id: "j".into(),
            from: pair[0],
            to: pair[1],
        })));
    }
}

#[test]
fn an_image_is_judged_after_a_stream_whether_its_header_knows_or_not() {
    for (over, below) in [(true, &[][..]), (true, &[0]), (false, &[]), (false, &[0])] {
        let end = End::PowerCut(below);
        let left = |at, source| judged(&mut streamed(over, at == 0), end, at, source);
        assert_eq!(left(0, Some(step(0))), Ok(()), "{over} {below:?}");
        is_lost(left(0, Some(BASE)));
        // What was not written there is the base's, copied or not.
        assert_eq!(left(64, Some(BASE)), Ok(()));
        let v = left(64, None).expect_err("the copy is lost");
        let told = v
            .evidence
            .iter()
            .any(|line| line.starts_with(LEFT_OUT) && line.ends_with(" base"));
        assert_eq!(told, below.is_empty(), "{v:?}");
        is_lost(Err(v));
    }
    // It never stood on that: nothing can be said.
    assert_eq!(
        judged(&mut streamed(true, true), End::PowerCut(&[1]), 0, Some(BASE)),
        Ok(())
    );
}
