//! Whole runs on storage that fails: nothing found, the same each time, faults recorded as choices, and the situations
//! that only failing storage makes do occur.

use std::sync::atomic::AtomicBool;

use blkcheck_impl::event::Event;
use blkcheck_sim::campaign::{self, Options, Progress, Span};
use blkcheck_sim::cli::Faults;
use blkcheck_sim::generate::Profile;
use blkcheck_sim::harness::{Harness, Setup};
use blkcheck_sim::history::Record;

fn failing() -> Setup {
    Setup {
        faults: Faults::Errors,
        ..Setup::default()
    }
}

fn faults(records: &[Record]) -> usize {
    records.iter().filter(|r| matches!(r, Record::Fault(_))).count()
}

#[test]
fn failing_storage_loses_nothing_and_every_error_path_is_taken() {
    let setup = Setup {
        profile: Profile::Stream,
        ..failing()
    };
    let out = tempfile::tempdir().expect("a directory");
    let options = Options {
        span: Span::Seeds(0..1500),
        threads: 2,
        setup,
        out: out.path().to_owned(),
    };
    let summary =
        campaign::run(&options, &AtomicBool::new(false), &Progress::default()).expect("memory is there");
    assert!(summary.findings.is_empty(), "{:?}", summary.findings);
    for situation in [
        "job meets an I/O error",
        "job stops on an error",
        "job resumed after an error",
        "stream fails to take effect for want of storage",
        "command refused by failing storage",
        "guest request fails",
        "storage fails a read",
        "storage fails a write",
        "storage fails a write in the middle",
        "storage fails a write that it carried out",
        "storage fails a flush",
        "storage is full",
    ] {
        assert!(summary.coverage.contains_key(situation), "{situation}");
    }
}

/// The faults of a run are choices of its file: they replay, and without the choices nothing fails.
#[test]
fn faults_are_recorded_choices() {
    let mut harness = Harness::new(&failing()).expect("memory is always there");
    let (mut failed, mut few) = (0, 0);
    for seed in 0..150 {
        let run = harness.seed(seed, true).expect("memory is always there");
        assert_eq!(run.violation, None, "seed {seed}");
        let mut scenario = harness.recorded(seed).expect("memory is always there");
        let replayed = harness.replay(&scenario).expect("memory is always there");
        assert_eq!(replayed.trace_hash, run.trace_hash, "seed {seed}");
        let n = faults(&replayed.records);
        failed += usize::from(n > 0);
        few += usize::from((1..=2).contains(&n));
        scenario.choices.clear();
        let calm = harness.replay(&scenario).expect("memory is always there");
        assert_eq!(faults(&calm.records), 0, "seed {seed}");
        assert_eq!(calm.violation, None, "seed {seed}");
    }
    assert!(
        failed > 50 && few > 25,
        "{failed} runs failed, {few} of them once or twice"
    );
}

/// Without faults nothing is drawn: the same runs as ever, and no job meets an error.
#[test]
fn without_faults_nothing_fails() {
    let mut harness = Harness::new(&Setup::default()).expect("memory is always there");
    for seed in 0..50 {
        let scenario = harness.recorded(seed).expect("memory is always there");
        assert_eq!(scenario.disk.faults, None);
        let replayed = harness.replay(&scenario).expect("memory is always there");
        assert_eq!(faults(&replayed.records), 0);
        let told = |r: &Record| {
            matches!(
                r,
                Record::Layer(Event::Qmp {
                    name: "BLOCK_JOB_ERROR",
                    ..
                })
            )
        };
        assert!(!replayed.records.iter().any(told), "seed {seed}");
    }
}
