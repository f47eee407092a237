//! One seed, one run: the same hashes twice and on two threads; and a layer that is not deterministic is found, with
//! the first record that differs.

mod common;

use std::sync::atomic::AtomicBool;

use blkcheck_impl::Layer;
use blkcheck_sim::campaign::{self, Options, Progress, Span};
use blkcheck_sim::choice::{Key, Random};
use blkcheck_sim::generate::{Profile, Reach, generate};
use blkcheck_sim::harness::{Harness, Setup};
use blkcheck_sim::history::{Record, StepId};
use blkcheck_sim::run::Runner;
use blkcheck_sim::scenario::Scenario;
use blkcheck_sim::target::{
    Alternatives, Capabilities, ClosedFile, Leftovers, Move, NodeContent, SimTarget, Target, Trouble,
};
use blkcheck_sim::trace::{Trace, first_difference};

const SEEDS: u64 = 300;

fn hashes(seeds: impl Iterator<Item = u64>) -> Vec<(u64, u64)> {
    let mut harness = Harness::new(&Setup::default()).expect("memory is always there");
    seeds
        .map(|seed| {
            let run = harness.seed(seed, false).expect("memory is always there");
            assert!(run.violation.is_none(), "seed {seed}: {:?}", run.violation);
            (seed, run.trace_hash)
        })
        .collect()
}

/// The order of seeds, what ran before on the same equipment, and the thread do not matter.
#[test]
fn a_seed_has_one_hash() {
    let first = hashes(0..SEEDS);
    let second = std::thread::scope(|scope| {
        let even = scope.spawn(|| hashes((0..SEEDS).rev().filter(|s| s % 2 == 0)));
        let odd = scope.spawn(|| hashes((0..SEEDS).rev().filter(|s| s % 2 == 1)));
        let mut all = even.join().expect("no panic");
        all.extend(odd.join().expect("no panic"));
        all.sort_unstable();
        all
    });
    assert_eq!(first, second);
    let mut distinct: Vec<u64> = first.iter().map(|(_, hash)| *hash).collect();
    distinct.sort_unstable();
    distinct.dedup();
    assert!(
        distinct.len() as u64 > SEEDS * 9 / 10,
        "only {} different runs",
        distinct.len()
    );
}

#[test]
fn a_campaign_has_one_hash_for_any_number_of_threads() {
    let run = |threads| {
        let out = tempfile::tempdir().expect("a directory");
        let options = Options {
            span: Span::Seeds(0..SEEDS),
            threads,
            setup: Setup::default(),
            out: out.path().to_owned(),
        };
        let summary = campaign::run(&options, &AtomicBool::new(false), &Progress::default());
        let summary = summary.expect("memory is always there");
        assert!(summary.findings.is_empty(), "{:?}", summary.findings);
        (
            summary.seeds,
            summary.operations,
            summary.steps,
            summary.trace_hash,
            summary.coverage,
        )
    };
    assert_eq!(run(1), run(2));
}

/// The layer, but from its second run on it swallows one of its events.
#[derive(Debug)]
struct Forgetful {
    inner: SimTarget,
    runs: u32,
    /// Events of this run so far.
    events: usize,
    /// Which one is swallowed, and what it was in the first run.
    forget: usize,
    forgotten: Option<Record>,
}

impl Target for Forgetful {
    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }
    fn prepare(&mut self, scenario: &Scenario) -> Result<(), Trouble> {
        self.runs += 1;
        self.events = 0;
        self.inner.prepare(scenario)
    }
    fn issue(&mut self, scenario: &Scenario, step: StepId) {
        self.inner.issue(scenario, step);
    }
    fn alternatives(&mut self) -> Alternatives {
        self.inner.alternatives()
    }
    fn keys(&self, into: &mut Vec<Key>) {
        self.inner.keys(into);
    }
    fn advance(&mut self, next: Move) -> Result<(), Trouble> {
        self.inner.advance(next)
    }
    fn take_records(&mut self, into: &mut Vec<Record>) {
        let mut at = into.len();
        self.inner.take_records(into);
        while at < into.len() {
            if matches!(into[at], Record::Layer(_)) {
                self.events += 1;
                if self.events - 1 == self.forget {
                    if self.runs > 1 {
                        into.remove(at);
                        continue;
                    }
                    self.forgotten = Some(into[at].clone());
                }
            }
            at += 1;
        }
    }
    fn layer(&self) -> Option<&Layer> {
        self.inner.layer()
    }
    fn contents(&mut self) -> Result<Vec<NodeContent>, Trouble> {
        self.inner.contents()
    }
    fn close(&mut self) -> Result<Leftovers, Trouble> {
        self.inner.close()
    }
    fn closed_files(&mut self) -> Vec<ClosedFile> {
        self.inner.closed_files()
    }
    fn describe(&self) -> Vec<String> {
        self.inner.describe()
    }
}

/// Without oracles: what is compared is the traces alone.
fn trace(target: &mut dyn Target, scenario: &Scenario, seed: u64) -> Trace {
    let mut runner = Runner::new();
    runner.keep_trace(1 << 16);
    runner
        .run(scenario, &mut Random::new(seed), target, &mut [])
        .expect("memory is always there");
    runner.trace().clone()
}

#[test]
fn planted_nondeterminism_is_found_where_it_begins() {
    let seed = 5;
    let scenario = generate(seed, Profile::Stream, Reach::all());
    for forget in [0, 7, 20] {
        let mut target = Forgetful {
            inner: SimTarget::new(),
            runs: 0,
            events: 0,
            forget,
            forgotten: None,
        };
        let honest = trace(&mut target, &scenario, seed);
        let forgotten = target.forgotten.clone().expect("the run has more events");
        let forgetful = trace(&mut target, &scenario, seed);
        let difference = first_difference(&honest, &forgetful).expect("one event is missing");
        assert!(difference.exact, "{difference}");
        let first = difference.first.as_ref().expect("the honest run goes on there");
        assert_eq!(first.record, forgotten, "{difference}");
        assert!(
            difference
                .to_string()
                .starts_with(&format!("record {}: first step ", first.at)),
            "{difference}"
        );
    }
    let same = || trace(&mut SimTarget::new(), &scenario, seed);
    assert_eq!(first_difference(&same(), &same()), None);
}
