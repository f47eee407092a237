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

/// A power cut ends a run; what survives is choices of its file, and without them nothing is lost that was carried out.
#[test]
fn a_power_cut_loses_what_was_not_flushed_and_nothing_else() {
    let mut harness = Harness::new(&Setup {
        faults: Faults::Crash,
        ..Setup::default()
    })
    .expect("memory is always there");
    let cuts = |records: &[Record]| {
        let (mut files, mut volatile, mut kept) = (0, 0, 0);
        for record in records {
            if let Record::PowerCut {
                volatile: v, kept: k, ..
            } = record
            {
                (files, volatile, kept) = (files + 1, volatile + v, kept + k);
            }
        }
        (files, volatile, kept)
    };
    let (mut cut, mut lossy) = (0, 0);
    for seed in 0..300 {
        let run = harness.seed(seed, true).expect("memory is always there");
        assert_eq!(run.violation, None, "seed {seed}");
        let scenario = harness.recorded(seed).expect("memory is always there");
        let replayed = harness.replay(&scenario).expect("memory is always there");
        assert_eq!(replayed.trace_hash, run.trace_hash, "seed {seed}");
        let (files, volatile, kept) = cuts(&replayed.records);
        cut += usize::from(files > 0);
        lossy += usize::from(kept < volatile);
        assert!(files == 0 || files == scenario.images.len(), "seed {seed}");
    }
    assert!(
        cut > 150 && lossy > 75,
        "the power failed in {cut} runs and something was lost in {lossy}"
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
