//! Targets and snapshots that show anything but the source at the instant are reported, others are not.

use blkcheck_impl::event::Event;
use blkcheck_impl::jobs::JobStatus::{
    self, Aborting, Concluded, Created, Pending, Running, Undefined, Waiting,
};
use blkcheck_impl::types::{JobId, NodeId};
use serde_json::{Map, Value, json};

use crate::history::{Outcome, Record, StepId};
use crate::oracle::data::tests::Run;
use crate::oracle::modelled::Modelled;
use crate::oracle::tests::scenario_of;
use crate::oracle::{Oracle as _, OracleName, Violation};
use crate::scenario::Action;
use crate::stamp::{self, Source};

/// What the source holds at the instant.
pub(crate) const OLD: Source = Source::Fill { image: 0, fill: 0 };

/// A filled source, an empty target of the same length, both raw; then these commands, then guests: `w` writes the first
/// grain above the filter, `s` and `t` read it from the snapshot and the target.
fn unopened(commands: &[Value]) -> Run {
    let mut steps: Vec<Value> = vec![
        json!({"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "fs", "filename": "src"}}),
        json!({"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "src", "file": "fs"}}),
        json!({"execute": "blockdev-add", "arguments": {"driver": "file", "node-name": "ft", "filename": "dst"}}),
        json!({"execute": "blockdev-add", "arguments": {"driver": "raw", "node-name": "dst", "file": "ft"}}),
        json!({"execute": "block-export-add", "arguments": {"type": "nbd", "id": "t", "node-name": "dst"}}),
    ];
    steps.extend(commands.iter().cloned());
    let range = json!({"offset": 0, "length": 64});
    for (op, export) in [("write", "w"), ("read", "s"), ("read", "t"), ("read", "t")] {
        steps.push(json!({"export": export, "do": {op: range}}));
    }
    for step in &mut steps {
        step["actor"] = json!("a");
    }
    let scenario = json!({"version": 1, "grain": 64, "images": [
        {"file": "src", "format": "raw", "size": 1024, "fill": [{"offset": 0, "length": 1024, "stored": "data"}]},
        {"file": "dst", "format": "raw", "size": 1024}], "steps": steps});
    Run::unopened(scenario_of(&scenario.to_string()))
}

/// All commands of [`unopened`] have run.
fn opened(commands: &[Value], filter: &'static str) -> Run {
    let mut run = unopened(commands);
    for step in 0..run.scenario.steps.len() - 4 {
        open(&mut run, step, filter);
    }
    run
}

/// Takes one command to its effect.
fn command(run: &mut Run, step: usize) -> (&'static str, Map<String, Value>) {
    let Action::Command { execute, arguments } = run.scenario.steps[step].action.clone() else {
        unreachable!("these are commands")
    };
    let what = [
        "blockdev-add",
        "block-export-add",
        "block-export-del",
        "blockdev-backup",
    ]
    .into_iter()
    .find(|what| *what == execute)
    .expect("one of these");
    let step = StepId(u32::try_from(step).expect("few"));
    tell(run, &Record::Issued(step));
    tell(run, &Record::Layer(Event::MainBegin { what }));
    assert!(run.oracle.accepts(), "step {step:?}");
    (what, arguments)
}

/// Takes one command to its effect, and tells of the filter that it makes.
fn open(run: &mut Run, step: usize, filter: &'static str) {
    let (what, arguments) = command(run, step);
    if what == "blockdev-backup" || arguments.get("driver") == Some(&json!("copy-before-write")) {
        let node = NodeId(9);
        tell(
            run,
            &Record::Layer(Event::NodeAdded {
                node,
                name: filter.into(),
                driver: "copy-before-write",
            }),
        );
        let (source, target) = (NodeId(1), NodeId(3));
        let made = Event::CopyBeforeWrite {
            filter: node,
            source,
            target,
            cluster: 65536,
        };
        tell(run, &Record::Layer(made));
    }
}

pub(crate) fn tell(run: &mut Run, record: &Record) {
    run.record(record).expect("nothing is wrong with it");
}

/// A filter that was opened by hand, a snapshot of it, and a guest above.
fn by_hand() -> Run {
    opened(
        &[
            json!({"execute": "blockdev-add", "arguments":
                {"driver": "copy-before-write", "node-name": "cbw", "file": "src", "target": "dst"}}),
            json!({"execute": "blockdev-add", "arguments":
                {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"}}),
            json!({"execute": "block-export-add", "arguments":
                {"type": "nbd", "id": "w", "node-name": "cbw", "writable": true}}),
            json!({"execute": "block-export-add", "arguments": {"type": "nbd", "id": "s", "node-name": "snap"}}),
        ],
        "cbw",
    )
}

/// A backup of everything, with a guest above.
fn by_job() -> Run {
    by_job_with(
        &json!({"execute": "block-export-add", "arguments": {"type": "nbd", "id": "u", "name": "u", "node-name": "dst"}}),
    )
}

/// The same, with one more command before it.
pub(crate) fn by_job_with(before: &Value) -> Run {
    opened(&job_after(before), "cbw")
}

fn job_after(before: &Value) -> [Value; 3] {
    [
        before.clone(),
        json!({"execute": "block-export-add", "arguments":
            {"type": "nbd", "id": "w", "node-name": "src", "writable": true}}),
        json!({"execute": "blockdev-backup", "arguments":
            {"job-id": "j", "device": "src", "target": "dst", "sync": "full", "filter-node-name": "cbw"}}),
    ]
}

/// The guest step of this kind: 0 writes above, 1 reads the snapshot, 2 and 3 read the target.
fn guest(run: &Run, kind: usize) -> StepId {
    StepId(u32::try_from(run.scenario.steps.len() - 4 + kind).expect("few"))
}

fn stamped(source: Source) -> Box<[u8]> {
    let mut bytes = vec![0; 64];
    stamp::fill(&mut bytes, 0, 64, source);
    bytes.into()
}

/// A guest overwrites the source.
pub(crate) fn overwrite(run: &mut Run) -> Source {
    let step = guest(run, 0);
    tell(run, &Record::Issued(step));
    tell(run, &Record::Ended(step, Outcome::Done(Ok(()))));
    Source::Step(step)
}

fn read(run: &mut Run, kind: usize, bytes: Box<[u8]>) -> Result<(), Violation> {
    let step = guest(run, kind);
    tell(run, &Record::Issued(step));
    run.record(&Record::Ended(step, Outcome::Read(Ok(bytes.into_vec().into()))))
}

fn is_wrong(verdict: Result<(), Violation>) {
    assert_eq!(
        verdict.expect_err("wrong content").oracle,
        OracleName::PointInTime
    );
}

fn status(run: &mut Run, from: JobStatus, to: JobStatus) {
    let id = "j".into();
    tell(
        run,
        &Record::Layer(Event::JobStatus {
            job: JobId(0),
            id,
            from,
            to,
        }),
    );
}

/// The job runs to its end, this way.
pub(crate) fn finish(run: &mut Run, walk: &[JobStatus], told: &'static str) {
    for pair in walk.windows(2) {
        status(run, pair[0], pair[1]);
    }
    let data = json!({"device": "j", "type": "backup", "len": 1024, "offset": 1024, "speed": 0}).into();
    tell(run, &Record::Layer(Event::Qmp { name: told, data }));
}

#[test]
fn a_snapshot_shows_what_was_there_and_nothing_written_since() {
    for (shown_new, wrong) in [(false, false), (true, true)] {
        let mut run = by_hand();
        let new = overwrite(&mut run);
        let verdict = read(&mut run, 1, stamped(if shown_new { new } else { OLD }));
        if wrong {
            is_wrong(verdict);
        } else {
            verdict.unwrap();
        }
    }
    is_wrong(read(&mut by_hand(), 1, vec![0; 64].into()));
}

/// Nobody uses the filter yet, and so others may write to its source.
#[test]
fn a_snapshot_of_a_source_that_was_written_past_its_filter_may_show_anything() {
    let mut run = unopened(&[
        json!({"execute": "blockdev-add", "arguments":
            {"driver": "copy-before-write", "node-name": "cbw", "file": "src", "target": "dst"}}),
        json!({"execute": "block-export-add", "arguments":
            {"type": "nbd", "id": "w", "node-name": "src", "writable": true}}),
        json!({"execute": "block-export-del", "arguments": {"id": "w"}}),
        json!({"execute": "blockdev-add", "arguments":
            {"driver": "snapshot-access", "node-name": "snap", "file": "cbw"}}),
        json!({"execute": "block-export-add", "arguments": {"type": "nbd", "id": "s", "node-name": "snap"}}),
    ]);
    let commands = run.scenario.steps.len() - 4;
    for step in 0..commands - 3 {
        open(&mut run, step, "cbw");
    }
    let new = overwrite(&mut run);
    for step in commands - 3..commands {
        open(&mut run, step, "cbw");
    }
    read(&mut run, 1, stamped(new)).unwrap();
}

#[test]
fn a_target_shows_what_it_did_or_the_instant_and_never_goes_back() {
    let mut run = by_job();
    read(&mut run, 2, vec![0; 64].into()).unwrap();
    read(&mut run, 3, stamped(OLD)).unwrap();

    let mut run = by_job();
    read(&mut run, 2, stamped(OLD)).unwrap();
    is_wrong(read(&mut run, 3, vec![0; 64].into()));

    let mut run = by_job();
    let new = overwrite(&mut run);
    is_wrong(read(&mut run, 2, stamped(new)));
}

#[test]
fn a_backup_that_ended_well_has_copied_everything() {
    let well = [Undefined, Created, Running, Waiting, Pending];
    let mut run = by_job();
    finish(&mut run, &well, "BLOCK_JOB_COMPLETED");
    status(&mut run, Pending, Concluded);
    read(&mut run, 2, stamped(OLD)).unwrap();

    let mut run = by_job();
    finish(&mut run, &well, "BLOCK_JOB_COMPLETED");
    is_wrong(read(&mut run, 2, vec![0; 64].into()));
}

/// Nobody tells of filters and copies there, and the command need not have been answered.
#[test]
fn a_backup_under_the_gate_that_ended_under_its_own_command_has_copied_everything() {
    let of = |content: Box<[u8]>| {
        let before = json!({"execute": "block-export-add", "arguments": {"type": "nbd", "id": "u", "name": "u", "node-name": "dst"}});
        let mut run = unopened(&job_after(&before));
        run.oracle = Modelled::outside();
        run.oracle.reset(&run.scenario);
        for step in 0..run.scenario.steps.len() - 4 {
            command(&mut run, step);
        }
        finish(
            &mut run,
            &[Undefined, Created, Running, Waiting, Pending],
            "BLOCK_JOB_COMPLETED",
        );
        status(&mut run, Pending, Concluded);
        read(&mut run, 2, content)
    };
    of(stamped(OLD)).unwrap();
    is_wrong(of(vec![0; 64].into()));
}

/// The filter is above the source at some moment of the command: a write in its course comes before or after that.
#[test]
fn the_instant_of_a_backup_under_the_gate_is_while_its_command_is_under_way() {
    let of = |writes_under_way: bool, content: Option<Box<[u8]>>| {
        let before = json!({"execute": "block-export-add", "arguments": {"type": "nbd", "id": "u", "name": "u", "node-name": "dst"}});
        let mut run = unopened(&job_after(&before));
        run.oracle = Modelled::outside();
        run.oracle.reset(&run.scenario);
        let commands = run.scenario.steps.len() - 4;
        for step in 0..commands - 1 {
            command(&mut run, step);
        }
        let before = (!writes_under_way).then(|| overwrite(&mut run));
        command(&mut run, commands - 1);
        let new = before.unwrap_or_else(|| overwrite(&mut run));
        finish(
            &mut run,
            &[Undefined, Created, Running, Waiting, Pending],
            "BLOCK_JOB_COMPLETED",
        );
        status(&mut run, Pending, Concluded);
        read(&mut run, 2, content.unwrap_or_else(|| stamped(new)))
    };
    of(true, Some(stamped(OLD))).unwrap();
    of(true, None).unwrap();
    of(false, None).unwrap();
    is_wrong(of(false, Some(stamped(OLD))));
}

#[test]
fn a_backup_that_did_not_may_have_copied_nothing() {
    let mut run = by_job();
    let verb = json!({"actor": "a", "execute": "block-job-cancel", "arguments": {"device": "j"}});
    run.scenario
        .steps
        .push(serde_json::from_value(verb).expect("a step"));
    let step = StepId(u32::try_from(run.scenario.steps.len() - 1).expect("few"));
    status(&mut run, Undefined, Created);
    status(&mut run, Created, Running);
    tell(&mut run, &Record::Issued(step));
    tell(
        &mut run,
        &Record::Layer(Event::MainBegin {
            what: "block-job-cancel",
        }),
    );
    finish(&mut run, &[Running, Aborting], "BLOCK_JOB_CANCELLED");
    // The guests' steps are one further from the end now.
    let reads = StepId(step.0 - 2);
    tell(&mut run, &Record::Issued(reads));
    run.record(&Record::Ended(reads, Outcome::Read(Ok(vec![0; 64].into()))))
        .unwrap();
}
