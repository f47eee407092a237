//! `compare --interleavings`: the block layer here and the shipping daemon, under the same interleavings of guest I/O,
//! stream and copy-on-read, have to come to the same end.
//!
//! * `workload`: scenarios whose end does not depend on the interleaving, and what of their answers does not;
//! * `end`: what a run is known by at its end, and where two ends differ.
//!
//! Rules: each scenario runs on both, with the same seeded choices, each target completing its own storage requests; all
//! oracles watch over both. Compared is what the scenario alone determines: every command's answer, every guest's
//! (reads grain by grain), outcome and events of jobs, nodes, edges and masks, headers, and the content and allocation
//! of every node and image. What depends on the interleaving is left to the data oracle, which judges either side.
//! A finding is saved with the choices of the side that it was seen on. One thread.
//! Not compared: how often a job paused on the way, block status, who decides zeroes, discards, faults, rates, real time.

mod end;
mod workload;

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use crate::choice::{Chooser, Pct, Random, Recording};
use crate::cli::{CliError, save};
use crate::clock::Stopwatch;
use crate::oracle::{self, Oracle, OracleName};
use crate::rng::mix;
use crate::run::Runner;
use crate::scenario::Scenario;
use crate::target::{QemuTarget, SimTarget, Target};
use end::{End, Witness};

pub use end::Difference;
pub use workload::{determined, scenario};

/// Scenarios of a campaign that does not say which: interleavings of each.
const EACH: u64 = 10;
/// Findings that are saved.
const SAVED: usize = 20;

/// A finding.
#[derive(Clone, Debug)]
pub struct Found {
    /// Of the scenario.
    pub seed: u64,
    /// Which of its interleavings.
    pub interleaving: u64,
    /// What.
    pub difference: Difference,
    /// Where the scenario was saved.
    pub file: Option<PathBuf>,
}

/// What a campaign came to.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Of the daemon.
    pub version: String,
    /// Scenarios.
    pub scenarios: u64,
    /// Runs on both.
    pub interleavings: u64,
    /// Traces of the daemon that differ, and of the layer.
    pub distinct_qemu: u64,
    /// Traces of the layer that differ.
    pub distinct_impl: u64,
    /// Scheduler steps on the daemon.
    pub steps: u64,
    /// Answers to guests and monitor that were compared.
    pub answers: u64,
    /// Bytes of reads, nodes and images that were compared.
    pub bytes: u64,
    /// Real time.
    pub seconds: f64,
    /// What differs.
    pub divergences: Vec<Found>,
    /// How the daemon failed.
    pub failures: Vec<Found>,
    /// It was stopped.
    pub interrupted: bool,
    /// Why something could not be saved.
    pub unsaved: Option<String>,
}

impl Summary {
    /// Whether something was found.
    #[must_use]
    pub fn failed(&self) -> bool {
        !self.divergences.is_empty() || !self.failures.is_empty()
    }
}

/// One of the two.
#[derive(Debug)]
struct Side {
    target: Box<dyn Target>,
    runner: Runner,
    oracles: Vec<Box<dyn Oracle>>,
    witness: Witness,
    choices: Vec<u32>,
}

impl Side {
    fn new(target: Box<dyn Target>) -> Side {
        let mut oracles = if target.capabilities().events {
            oracle::all()
        } else {
            oracle::outside()
        };
        let witness = Witness::default();
        // First: it has to see what a verdict is about.
        oracles.insert(0, Box::new(witness.clone()));
        Side {
            target,
            runner: Runner::new(),
            oracles,
            witness,
            choices: Vec::new(),
        }
    }

    fn run(&mut self, scenario: &Scenario, chooser: &mut dyn Chooser) -> Result<End, CliError> {
        let mut recording = Recording::new(chooser, &mut self.choices);
        let result = self
            .runner
            .run(scenario, &mut recording, &mut *self.target, &mut self.oracles)
            .map_err(CliError::Environment)?;
        let mut end = self.witness.take();
        end.trace_hash = result.trace_hash;
        end.steps = result.steps;
        end.violation = result.violation;
        Ok(end)
    }
}

/// The choices of one interleaving: uniform ones and priorities in turn.
fn chooser(seed: u64, interleaving: u64) -> Box<dyn Chooser> {
    let stream = mix(seed ^ mix(interleaving));
    if interleaving.is_multiple_of(2) {
        Box::new(Random::new(stream))
    } else {
        Box::new(Pct::new(3, stream))
    }
}

/// Carries it out: `interleavings` runs, spread over the scenarios of `seeds`.
///
/// # Errors
/// No daemon of the right version that starts.
pub fn run(
    interleavings: u64,
    seeds: Option<&Range<u64>>,
    program: Option<&Path>,
    out: &Path,
    stop: &AtomicBool,
    progress: &dyn Fn(u64),
) -> Result<Summary, CliError> {
    let qemu = QemuTarget::new(program)
        .map_err(|e| CliError::Environment(e.to_string().replace("--on qemu", "compare")))?;
    let (major, minor, micro) = qemu.version();
    let seeds = seeds.cloned().unwrap_or(0..interleavings.div_ceil(EACH));
    let mut summary = Summary {
        version: format!("{major}.{minor}.{micro}"),
        ..Summary::default()
    };
    let (mut ours, mut theirs) = (Side::new(Box::new(SimTarget::new())), Side::new(Box::new(qemu)));
    let (mut seen_ours, mut seen_theirs) = (BTreeSet::new(), BTreeSet::new());
    let watch = Stopwatch::start();
    let count = seeds.end - seeds.start;
    'all: for (at, seed) in (0u64..).zip(seeds) {
        // Spread evenly, the first ones get one more.
        let here = interleavings / count + u64::from(at < interleavings % count);
        if here == 0 {
            break;
        }
        let scenario = scenario(seed);
        summary.scenarios += 1;
        for interleaving in 0..here {
            if stop.load(Ordering::Relaxed) {
                summary.interrupted = true;
                break 'all;
            }
            let one = ours.run(&scenario, &mut *chooser(seed, interleaving))?;
            let two = theirs.run(&scenario, &mut *chooser(seed, interleaving))?;
            summary.interleavings += 1;
            summary.steps += two.steps;
            seen_ours.insert((seed, one.trace_hash));
            seen_theirs.insert((seed, two.trace_hash));
            let compared = end::compare(&scenario, &one, &two);
            summary.answers += compared.answers;
            summary.bytes += compared.bytes;
            if let Some(difference) = compared.difference {
                let failed = two
                    .violation
                    .as_ref()
                    .is_some_and(|v| v.oracle == OracleName::Daemon);
                let side = if one.violation.is_some() { &ours } else { &theirs };
                let mut found = Found {
                    seed,
                    interleaving,
                    difference,
                    file: None,
                };
                if summary.divergences.len() + summary.failures.len() < SAVED {
                    match saved(&scenario, &side.choices, &found, out) {
                        Ok(path) => found.file = Some(path),
                        Err(e) => summary.unsaved = Some(e.to_string()),
                    }
                }
                if failed {
                    summary.failures.push(found);
                } else {
                    summary.divergences.push(found);
                }
            }
            progress(summary.interleavings);
        }
    }
    summary.seconds = watch.elapsed().as_secs_f64();
    summary.distinct_impl = seen_ours.len() as u64;
    summary.distinct_qemu = seen_theirs.len() as u64;
    Ok(summary)
}

fn saved(scenario: &Scenario, choices: &[u32], found: &Found, out: &Path) -> Result<PathBuf, CliError> {
    let path = out.join(format!("agree-seed-{}-{}.json", found.seed, found.interleaving));
    std::fs::create_dir_all(out).map_err(|source| CliError::File {
        path: out.display().to_string(),
        source,
    })?;
    let mut scenario = scenario.clone();
    scenario.choices = choices.to_vec();
    save(&path, &scenario)?;
    Ok(path)
}
