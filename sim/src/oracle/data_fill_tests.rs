//! What a power cut may leave of a backup's target, and what not.

use blkcheck_impl::event::Event;
use blkcheck_impl::jobs::JobStatus::{Created, Pending, Running, Undefined, Waiting};
use blkcheck_impl::types::NodeId;
use serde_json::json;

use super::super::backup::tests::{OLD, by_job_with, finish, overwrite, tell};
use super::super::tests::{Run, flush_fails};
use crate::history::{Outcome, Record, StepId};
use crate::oracle::{FinalContent, Oracle, OracleName, View};
use crate::stamp::{self, Source};

/// A backup of everything under way, whose target guests may have flushed through a writable export.
fn backup(writable: bool) -> Run {
    by_job_with(&json!({"execute": "block-export-add", "arguments":
        {"type": "nbd", "id": "f", "name": "f", "node-name": "dst", "writable": writable}}))
}

fn guest(run: &mut Run, export: &str, op: &serde_json::Value) {
    let step = json!({"actor": "f", "export": export, "do": op});
    run.scenario
        .steps
        .push(serde_json::from_value(step).expect("a step"));
    let step = StepId(u32::try_from(run.scenario.steps.len() - 1).expect("few"));
    tell(run, &Record::Issued(step));
    tell(run, &Record::Ended(step, Outcome::Done(Ok(()))));
}

fn flush(run: &mut Run) {
    guest(run, "f", &json!("flush"));
}

fn ends_well(run: &mut Run) {
    finish(
        run,
        &[Undefined, Created, Running, Waiting, Pending],
        "BLOCK_JOB_COMPLETED",
    );
}

/// The only copy of the first cluster.
fn copy(run: &mut Run) {
    let (filter, task) = (NodeId(9), 0);
    let begins = Event::CopyBegin {
        filter,
        task,
        offset: 0,
        bytes: 65536,
        zero: false,
        background: true,
    };
    tell(run, &Record::Layer(begins));
    let result = Ok(());
    tell(run, &Record::Layer(Event::CopyEnd { filter, task, result }));
}

/// Whether the target may hold this in its first grain, and what the source held in all others.
fn may_hold(run: &mut Run, first: Option<Source>) -> bool {
    let mut bytes = vec![0; 1024];
    for (at, grain) in (0..).step_by(64).zip(bytes.chunks_mut(64)) {
        if let Some(source) = if at == 0 { first } else { Some(OLD) } {
            stamp::fill(grain, at, 64, source);
        }
    }
    let view = View {
        scenario: &run.scenario,
        now: 1000,
        layer: None,
    };
    let content = FinalContent {
        name: "dst",
        bytes: &bytes,
        allocated: &[],
        zeroes: &[],
    };
    let verdict = run.oracle.after_power_cut(&view, &[(content, Vec::new())]);
    if let Err(v) = &verdict {
        assert_eq!(v.oracle, OracleName::PointInTime, "{v:?}");
    }
    verdict.is_ok()
}

#[test]
fn a_backup_that_completed_is_durable_after_a_flush_only() {
    for (writable, flushed) in [(true, false), (false, true), (true, true)] {
        let mut run = backup(writable);
        ends_well(&mut run);
        if flushed {
            flush(&mut run);
        }
        // A read-only export of a raw node does not pass its flushes on.
        assert_eq!(may_hold(&mut run, None), !(writable && flushed));
        assert!(may_hold(&mut run, Some(OLD)));
    }
}

#[test]
fn a_flush_on_the_way_keeps_what_was_copied_before_it() {
    let mut run = backup(true);
    copy(&mut run);
    assert!(may_hold(&mut run, None));
    flush(&mut run);
    assert!(!may_hold(&mut run, None));
    let mut run = backup(true);
    flush(&mut run);
    copy(&mut run);
    assert!(may_hold(&mut run, None), "copied after the flush");
}

#[test]
fn nothing_of_it_is_newer_than_the_instant() {
    let mut run = backup(true);
    let new = overwrite(&mut run);
    assert!(!may_hold(&mut run, Some(new)));
    ends_well(&mut run);
    assert!(!may_hold(&mut run, Some(new)));
}

#[test]
fn a_guest_that_writes_to_the_target_later_may_be_lost_and_the_copy_not() {
    let mut run = backup(true);
    ends_well(&mut run);
    flush(&mut run);
    guest(&mut run, "f", &json!({"write": {"offset": 0, "length": 64}}));
    let written = Source::Step(StepId(u32::try_from(run.scenario.steps.len() - 1).expect("few")));
    assert!(may_hold(&mut run, Some(written)) && may_hold(&mut run, Some(OLD)));
    assert!(!may_hold(&mut run, None));
}

/// A command comes, and is answered well if `answered`; storage may fail before that.
fn command(run: &mut Run, step: &serde_json::Value, what: &'static str, answered: bool, fails: bool) {
    run.scenario
        .steps
        .push(serde_json::from_value(step.clone()).expect("a step"));
    let step = StepId(u32::try_from(run.scenario.steps.len() - 1).expect("few"));
    tell(run, &Record::Issued(step));
    tell(run, &Record::Layer(Event::MainBegin { what }));
    assert!(run.oracle.accepts(), "{what}");
    if fails {
        flush_fails(run, 1);
    }
    if answered {
        tell(run, &Record::Layer(Event::MainEnd { what }));
        // Events of the graph are left out, since only content is looked at here.
        if let Err(v) = run.record(&Record::Ended(step, Outcome::Command(Ok(json!({}))))) {
            assert_eq!(v.oracle, OracleName::Graph, "{v:?}");
        }
    }
}

/// A backup that completed, and nobody uses its target any more but the monitor.
fn left_alone() -> Run {
    let mut run = backup(true);
    ends_well(&mut run);
    for id in ["t", "f"] {
        let step = json!({"actor": "a", "execute": "block-export-del", "arguments": {"id": id}});
        command(&mut run, &step, "block-export-del", true, false);
    }
    run
}

fn del(run: &mut Run, node: &str, answered: bool, fails: bool) {
    let step = json!({"actor": "a", "execute": "blockdev-del", "arguments": {"node-name": node}});
    command(run, &step, "blockdev-del", answered, fails);
}

#[test]
fn what_was_copied_is_owed_once_the_target_was_closed() {
    let mut run = left_alone();
    assert!(may_hold(&mut run, None), "neither flushed nor closed");
    del(&mut run, "dst", true, false);
    assert!(may_hold(&mut run, None), "its file is open yet");
    del(&mut run, "ft", true, false);
    assert!(!may_hold(&mut run, None), "closed");
    assert!(may_hold(&mut run, Some(OLD)));
    for (answered, fails) in [(false, false), (true, true)] {
        let mut run = left_alone();
        del(&mut run, "dst", true, false);
        del(&mut run, "ft", answered, fails);
        assert!(may_hold(&mut run, None), "answered: {answered}, failed: {fails}");
        assert!(may_hold(&mut run, Some(OLD)));
    }
}
