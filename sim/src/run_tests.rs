//! Whole runs: a chain of three qcow2 images, a guest, a stream.

use super::*;
use crate::choice::{Pct, Random, Recorded, Recording};
use crate::history::Refusal;
use crate::scenario::parse::parse;
use crate::target::SimTarget;
use crate::trace::first_difference;

const STREAM: &str = include_str!("testdata/stream.json");

fn scenario() -> Scenario {
    parse("stream.json", STREAM.as_bytes()).expect("a valid scenario")
}

fn run(runner: &mut Runner, target: &mut SimTarget, chooser: &mut dyn Chooser) -> RunResult {
    runner.run(&scenario(), chooser, target, &mut []).expect("usable")
}

#[test]
fn a_stream_under_guest_io_ends_well_in_every_order() {
    let (mut runner, mut target) = (Runner::new(), SimTarget::new());
    runner.keep_records(true);
    let sequential = run(&mut runner, &mut target, &mut Recorded::new(&[]));
    assert_eq!(sequential.violation, None);
    let refused: Vec<&Record> = runner
        .records()
        .iter()
        .filter(|r| matches!(r, Record::Ended(_, Outcome::Command(Err(_)))))
        .collect();
    assert!(refused.is_empty(), "{refused:?}");
    let copied = |r: &&Record| matches!(r, Record::Layer(Event::JobChunk { copied: true, .. }));
    assert!(
        runner.records().iter().filter(copied).count() > 0,
        "the stream copied something"
    );
    runner.keep_records(false);
    let mut hashes = std::collections::BTreeSet::new();
    for seed in 0..200 {
        let random = run(&mut runner, &mut target, &mut Random::new(seed));
        assert_eq!(random.violation, None, "seed {seed}");
        hashes.insert(random.trace_hash);
        let pct = run(&mut runner, &mut target, &mut Pct::new(3, seed));
        assert_eq!(pct.violation, None, "pct seed {seed}");
    }
    assert!(
        hashes.len() > 190,
        "seeds give different interleavings: {}",
        hashes.len()
    );
}

#[test]
fn every_oracle_agrees_with_every_order() {
    let (mut runner, mut target) = (Runner::new(), SimTarget::new());
    let mut oracles = crate::oracle::all();
    for seed in 0..400 {
        let result = runner
            .run(&scenario(), &mut Random::new(seed), &mut target, &mut oracles)
            .expect("usable");
        assert_eq!(result.violation, None, "seed {seed}");
    }
}

#[test]
fn the_same_seed_gives_the_same_trace_on_a_used_and_on_a_new_runner() {
    let (mut used, mut used_target) = (Runner::new(), SimTarget::new());
    for seed in 0..5 {
        run(&mut used, &mut used_target, &mut Random::new(seed));
    }
    for seed in 0..5 {
        let again = run(&mut used, &mut used_target, &mut Random::new(seed));
        let fresh = run(&mut Runner::new(), &mut SimTarget::new(), &mut Random::new(seed));
        assert_eq!(again, fresh, "seed {seed}");
    }
}

#[test]
fn recorded_choices_replay_exactly() {
    let (mut runner, mut target) = (Runner::new(), SimTarget::new());
    let mut log = Vec::new();
    for seed in 0..10 {
        let first = run(
            &mut runner,
            &mut target,
            &mut Recording::new(Random::new(seed), &mut log),
        );
        let second = run(&mut runner, &mut target, &mut Recorded::new(&log));
        assert_eq!(first, second);
    }
}

#[test]
fn an_injected_difference_is_named() {
    let (mut runner, mut target) = (Runner::new(), SimTarget::new());
    runner.keep_trace(100_000);
    run(&mut runner, &mut target, &mut Random::new(1));
    let first = runner.trace().clone();
    run(&mut runner, &mut target, &mut Random::new(1));
    assert_eq!(first_difference(&first, runner.trace()), None);
    let mut other = scenario();
    // The last guest step, and nothing before it, asks for something else.
    let at = other
        .steps
        .iter()
        .rposition(|s| matches!(s.action, Action::Guest { .. }))
        .expect("a guest step");
    let Action::Guest { op, .. } = &mut other.steps[at].action else {
        unreachable!("found as one")
    };
    *op = crate::scenario::GuestOp::Flush;
    runner
        .run(&other, &mut Random::new(1), &mut target, &mut [])
        .expect("usable");
    let difference = first_difference(&first, runner.trace()).expect("differs");
    assert!(difference.exact && difference.at > 0);
    let before = |t: &Trace| {
        t.points()
            .nth(usize::try_from(difference.at - 1).expect("small"))
            .cloned()
    };
    assert_eq!(before(&first), before(runner.trace()));
}

fn steps(text: &str) -> Scenario {
    let mut scenario = scenario();
    let setup = scenario
        .steps
        .iter()
        .take_while(|s| matches!(s.action, Action::Command { .. }))
        .count();
    scenario.steps.truncate(setup - 1);
    let more = format!(r#"{{"version":1,"grain":64,"images":[],"steps":[{text}]}}"#);
    scenario
        .steps
        .extend(parse("more", more.as_bytes()).expect("valid").steps);
    scenario
}

#[test]
fn what_does_not_exist_is_an_outcome() {
    let scenario = steps(
        r#"{"actor":"g","export":"nowhere","do":"flush"},
           {"actor":"d","drained-begin":"nowhere"},
           {"actor":"d","drained-end":"top"},
           {"actor":"m","wait-job":{"id":"nowhere","status":"ready"}},
           {"actor":"m","execute":"no-such-command"}"#,
    );
    let (mut runner, mut target) = (Runner::new(), SimTarget::new());
    runner.keep_records(true);
    let result = runner
        .run(&scenario, &mut Recorded::new(&[]), &mut target, &mut [])
        .expect("usable");
    assert_eq!(result.violation, None);
    let ended = |r: &Record| match r {
        Record::Ended(step, outcome) if step.0 as usize + 5 >= scenario.steps.len() => Some(outcome.clone()),
        _ => None,
    };
    let outcomes: Vec<Outcome> = runner.records().iter().filter_map(ended).collect();
    let missing = Refusal {
        class: "CommandNotFound".into(),
        desc: "The command no-such-command has not been found".into(),
    };
    assert_eq!(outcomes.len(), 5);
    for expected in [
        Outcome::NoExport,
        Outcome::NoNode,
        Outcome::Passed,
        Outcome::Command(Err(missing)),
    ] {
        assert!(outcomes.contains(&expected), "{expected:?} in {outcomes:?}");
    }
}

#[test]
fn standing_jobs_and_open_sections_are_cleared_away() {
    let scenario = steps(
        r#"{"actor":"m","execute":"block-stream","arguments":{"job-id":"s","device":"top","auto-finalize":false,"auto-dismiss":false}},
           {"actor":"m","execute":"job-pause","arguments":{"id":"s"}},
           {"actor":"m","wait-job":{"id":"s","status":"null"}},
           {"actor":"d","drained-begin":"top"},
           {"actor":"d","export":"top","do":{"write":{"offset":0,"length":64}}},
           {"actor":"d","drained-end":"top"}"#,
    );
    let (mut runner, mut target) = (Runner::new(), SimTarget::new());
    for seed in 0..50 {
        let result = runner
            .run(&scenario, &mut Random::new(seed), &mut target, &mut [])
            .expect("usable");
        assert_eq!(result.violation, None, "seed {seed}");
        let extra: Vec<String> = runner.scenario().steps[scenario.steps.len()..]
            .iter()
            .map(crate::scenario::listing::action)
            .collect();
        assert!(extra.iter().any(|s| s.contains("drained-end")), "{extra:?}");
        assert!(
            extra
                .iter()
                .any(|s| s.starts_with("job-resume") || s.starts_with("job-cancel")),
            "{extra:?}"
        );
    }
}

/// A `wait-job` in flight ends when its job does, and the actor's later steps do not wait for it.
#[test]
fn a_wait_that_holds_up_nobody_ends_too() {
    let scenario = steps(
        r#"{"actor":"m","execute":"block-stream","arguments":{"job-id":"s","device":"top"}},
           {"actor":"m","wait-job":{"id":"s","status":"null"},"wait":false},
           {"actor":"m","wait-job":{"id":"s","status":"concluded"},"wait":false},
           {"actor":"m","execute":"query-jobs"},
           {"actor":"m","settle":{}}"#,
    );
    let (mut runner, mut target) = (Runner::new(), SimTarget::new());
    runner.keep_records(true);
    let ended = |r: &Record| match r {
        Record::Ended(step, _) => (step.0 as usize + 5).checked_sub(scenario.steps.len()),
        _ => None,
    };
    let mut overtaken = 0;
    for seed in 0..50 {
        let result = runner
            .run(&scenario, &mut Random::new(seed), &mut target, &mut [])
            .expect("usable");
        assert_eq!(result.violation, None, "seed {seed}");
        let order: Vec<usize> = runner.records().iter().filter_map(ended).collect();
        let place = |step| order.iter().position(|&s| s == step).expect("every step ends");
        assert_eq!(order.len(), 5, "each step ends once: {order:?}");
        assert!(place(2) <= place(1) + 1 && place(4) == 4, "{order:?}");
        overtaken += u32::from(place(3) < place(1));
    }
    assert!(overtaken > 0, "the query never came before the job's end");
}
