//! A campaign: many seeds over several threads, one summary.
//!
//! Rules: a seed runs on one thread and its result depends on the seed alone, so the sum over seeds (`trace_hash`,
//! counts, findings) is the same for any number of threads. Every [`RECHECK`]th seed runs twice and both traces must
//! agree. A campaign over everything also fails when a situation that must occur never did (`marks`).

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use crate::cli::{CliError, Faults};
use crate::clock::Stopwatch;
use crate::generate::Profile;
use crate::harness::{Harness, SeedRun, Setup};
use crate::marks::{Counts, Mark};
use crate::oracle::{OracleName, Violation};
use crate::shrink::{Limits, shrink};

/// One seed in this many is run twice.
pub const RECHECK: u64 = 32;
/// A campaign of at least this many seeds must have met every mark that it owes.
pub const MARKS_DUE: u64 = 20_000;
/// Seeds a worker takes at a time.
const BLOCK: u64 = 8;
/// Findings kept with their evidence; the rest is counted.
const KEPT: usize = 1000;
/// Findings that are shrunk and saved, first of each oracle first.
const SHRUNK: usize = 8;

/// Which seeds.
#[derive(Clone, Debug)]
pub enum Span {
    /// These.
    Seeds(Range<u64>),
    /// From 0 on, until the time is up.
    For(Duration),
}

/// What to run.
#[derive(Clone, Debug)]
pub struct Options {
    /// Which seeds.
    pub span: Span,
    /// Worker threads, at least 1.
    pub threads: usize,
    /// Target, scheduler, profile, faults.
    pub setup: Setup,
    /// Where findings go.
    pub out: PathBuf,
}

/// One finding of a campaign.
#[derive(Clone, Debug)]
pub struct Finding {
    /// The seed that shows it.
    pub seed: u64,
    /// What failed.
    pub violation: Violation,
    /// Saved scenario, where one was saved.
    pub file: Option<PathBuf>,
    /// Steps left after shrinking.
    pub shrunk_steps: Option<usize>,
}

/// What a campaign found and did.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Seeds run.
    pub seeds: u64,
    /// Guest and monitor operations carried out.
    pub operations: u64,
    /// Scheduling steps taken.
    pub steps: u64,
    /// Folded from every record of every seed.
    pub trace_hash: u64,
    /// Wall-clock time of the runs, without shrinking.
    pub seconds: f64,
    /// CPU time of the runs, without shrinking.
    pub cpu_seconds: f64,
    /// How often each situation and each operation occurred.
    pub coverage: BTreeMap<String, u64>,
    /// Situations that should have occurred and did not.
    pub unmet: Vec<Mark>,
    /// Whether `unmet` fails the campaign.
    pub unmet_is_failure: bool,
    /// Findings, by seed.
    pub findings: Vec<Finding>,
    /// Findings beyond those kept.
    pub more_findings: u64,
    /// What reviewed defects of the subject explain: how often, and the first seed's.
    pub known: BTreeMap<&'static str, (u64, Finding)>,
    /// Stopped before its end.
    pub interrupted: bool,
    /// Why findings could not be saved.
    pub unsaved: Option<String>,
}

impl Summary {
    /// Whether the campaign found something.
    #[must_use]
    pub fn failed(&self) -> bool {
        !self.findings.is_empty() || (self.unmet_is_failure && !self.unmet.is_empty())
    }
}

/// Live numbers for a progress line.
#[derive(Debug, Default)]
pub struct Progress {
    /// Seeds done.
    pub seeds: AtomicU64,
    /// Operations done.
    pub operations: AtomicU64,
    /// Findings so far.
    pub findings: AtomicU64,
}

/// Runs a campaign. `stop` ends it early (Ctrl-C, SIGTERM); `progress` is updated as it goes.
///
/// # Errors
/// When the environment cannot run the target.
pub fn run(options: &Options, stop: &AtomicBool, progress: &Progress) -> Result<Summary, CliError> {
    assert!(options.threads > 0, "a campaign needs a worker");
    let watch = Stopwatch::start();
    let next = AtomicU64::new(match &options.span {
        Span::Seeds(seeds) => seeds.start,
        Span::For(_) => 0,
    });
    let merged = Mutex::new(Tally::default());
    let failure = Mutex::new(None);
    let failed = |error| {
        stop.store(true, Ordering::Relaxed);
        failure
            .lock()
            .expect("no worker panics holding it")
            .get_or_insert(error);
    };
    let worker = || match work(options, &watch, &next, stop, progress) {
        Ok(tally) => merged.lock().expect("no worker panics holding it").merge(tally),
        Err(error) => failed(error),
    };
    std::thread::scope(|scope| {
        for n in 0..options.threads {
            if let Err(e) = std::thread::Builder::new().spawn_scoped(scope, worker) {
                let wanted = options.threads;
                let text =
                    format!("{n} of {wanted} threads can be started ({e}); ask for fewer with --threads");
                failed(CliError::Environment(text));
                break;
            }
        }
    });
    if let Some(error) = failure.into_inner().expect("workers are gone") {
        return Err(error);
    }
    let (seconds, cpu) = (watch.elapsed(), watch.cpu());
    let mut summary = merged.into_inner().expect("workers are gone").summary(options);
    summary.seconds = seconds.as_secs_f64();
    summary.cpu_seconds = cpu.as_secs_f64();
    summary.interrupted = stop.load(Ordering::Relaxed);
    // What was found is told whether it can be saved or not.
    summary.unsaved = save_findings(options, &mut summary, stop)
        .err()
        .map(|e| e.to_string());
    Ok(summary)
}

fn work(
    options: &Options,
    watch: &Stopwatch,
    next: &AtomicU64,
    stop: &AtomicBool,
    progress: &Progress,
) -> Result<Tally, CliError> {
    let mut harness = Harness::new(&options.setup)?;
    let mut tally = Tally::default();
    'blocks: loop {
        if let Span::For(time) = options.span
            && watch.elapsed() >= time
        {
            break;
        }
        // Numbers end; the one where they do is nobody's.
        let start = next
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |n| {
                Some(n.saturating_add(BLOCK))
            })
            .expect("it always says some");
        let end = match &options.span {
            Span::Seeds(seeds) => seeds.end.min(start.saturating_add(BLOCK)),
            Span::For(_) => start.saturating_add(BLOCK),
        };
        if start >= end {
            break;
        }
        for seed in start..end {
            if stop.load(Ordering::Relaxed) {
                break 'blocks;
            }
            let run = harness.seed(seed, seed.is_multiple_of(RECHECK))?;
            progress.seeds.fetch_add(1, Ordering::Relaxed);
            progress.operations.fetch_add(run.operations, Ordering::Relaxed);
            progress.findings.fetch_add(
                u64::from(run.violation.is_some() && run.known.is_none()),
                Ordering::Relaxed,
            );
            tally.add(seed, run);
        }
    }
    tally.counts = harness.counts();
    Ok(tally)
}

/// What one worker, or all together, saw.
#[derive(Default)]
struct Tally {
    seeds: u64,
    operations: u64,
    steps: u64,
    trace_hash: u64,
    counts: Counts,
    findings: BTreeMap<u64, Violation>,
    more_findings: u64,
    known: BTreeMap<&'static str, (u64, Finding)>,
}

impl Tally {
    fn add(&mut self, seed: u64, run: SeedRun) {
        self.seeds += 1;
        self.operations += run.operations;
        self.steps += run.steps;
        self.trace_hash = self
            .trace_hash
            .wrapping_add(crate::rng::mix(seed ^ crate::rng::mix(run.trace_hash)));
        if let Some(violation) = run.violation {
            if let Some(defect) = run.known {
                let finding = Finding {
                    seed,
                    violation,
                    file: None,
                    shrunk_steps: None,
                };
                return self.note_known(defect.id, 1, finding);
            }
            if self.findings.len() < KEPT {
                self.findings.insert(seed, violation);
            } else {
                self.more_findings += 1;
            }
        }
    }

    fn note_known(&mut self, id: &'static str, count: u64, finding: Finding) {
        match self.known.entry(id) {
            Entry::Vacant(entry) => {
                entry.insert((count, finding));
            }
            Entry::Occupied(mut entry) => {
                let (sum, first) = entry.get_mut();
                *sum += count;
                if finding.seed < first.seed {
                    *first = finding;
                }
            }
        }
    }

    fn merge(&mut self, other: Tally) {
        self.seeds += other.seeds;
        self.operations += other.operations;
        self.steps += other.steps;
        self.trace_hash = self.trace_hash.wrapping_add(other.trace_hash);
        self.counts.merge(&other.counts);
        self.findings.extend(other.findings);
        self.more_findings += other.more_findings;
        for (id, (count, finding)) in other.known {
            self.note_known(id, count, finding);
        }
    }

    fn summary(self, options: &Options) -> Summary {
        let owes = options.setup.is_simulated();
        Summary {
            seeds: self.seeds,
            operations: self.operations,
            steps: self.steps,
            trace_hash: self.trace_hash,
            coverage: coverage(&self.counts),
            unmet: if owes {
                unmet(&self.counts, options)
            } else {
                Vec::new()
            },
            unmet_is_failure: owes && self.seeds >= MARKS_DUE,
            findings: self
                .findings
                .into_iter()
                .map(|(seed, violation)| Finding {
                    seed,
                    violation,
                    file: None,
                    shrunk_steps: None,
                })
                .collect(),
            more_findings: self.more_findings,
            known: self.known,
            ..Summary::default()
        }
    }
}

/// Marks that this campaign owed and did not meet.
fn unmet(counts: &Counts, options: &Options) -> Vec<Mark> {
    let owed = |m: &Mark| match (options.setup.profile, options.setup.faults) {
        (Profile::Mixed, Faults::None) => !m.needs_faults() && !m.needs_power_cuts(),
        (Profile::Mixed, _) => !m.needs_sound_storage() && !m.is_of_backups(),
        (Profile::Backup, Faults::None) => false,
        (Profile::Backup, Faults::Errors) => m.is_of_backups() && !m.needs_power_cuts(),
        (Profile::Backup, Faults::Crash) => m.is_of_backups() && !m.needs_faults(),
        (Profile::Backup, Faults::All) => m.is_of_backups(),
        _ => false,
    };
    crate::marks::unmet(counts).into_iter().filter(owed).collect()
}

/// Situations by name, and `operation/state` pairs.
fn coverage(counts: &Counts) -> BTreeMap<String, u64> {
    let marks = Mark::ALL
        .iter()
        .map(|&m| (m.as_str().to_owned(), counts.of(m)))
        .filter(|(_, n)| *n > 0);
    let pairs = counts
        .pairs()
        .map(|(operation, state, n)| (format!("{operation}/{state}"), n));
    marks.chain(pairs).collect()
}

/// Shrinks and saves the first finding of each oracle, then further ones up to a limit.
fn save_findings(options: &Options, summary: &mut Summary, stop: &AtomicBool) -> Result<(), CliError> {
    if summary.findings.is_empty() {
        return Ok(());
    }
    std::fs::create_dir_all(&options.out).map_err(|source| CliError::File {
        path: options.out.display().to_string(),
        source,
    })?;
    let mut seen: BTreeMap<OracleName, u32> = BTreeMap::new();
    let mut order: Vec<(u32, usize)> = Vec::new();
    for (at, finding) in summary.findings.iter().enumerate() {
        let nth = seen.entry(finding.violation.oracle).or_default();
        order.push((*nth, at));
        *nth += 1;
    }
    order.sort_unstable();
    let mut harness = Harness::new(&options.setup)?;
    for (_, at) in order.into_iter().take(SHRUNK) {
        let finding = &mut summary.findings[at];
        let limits = if stop.load(Ordering::Relaxed) {
            Limits {
                executions: 1,
                schedules: 0,
            }
        } else {
            options.setup.limits(finding.violation.oracle)
        };
        save_finding(&options.out, &mut harness, finding, limits)?;
    }
    Ok(())
}

fn save_finding(
    out: &Path,
    harness: &mut Harness,
    finding: &mut Finding,
    limits: Limits,
) -> Result<(), CliError> {
    let recorded = harness.recorded(finding.seed)?;
    let oracle = finding.violation.oracle;
    let mut scenario = recorded.clone();
    scenario.expect = Some(oracle.as_str().to_owned());
    let shrunk = (limits.executions > 0).then(|| shrink(&recorded, oracle, limits, harness));
    if let Some(shrunk) = shrunk.flatten() {
        scenario = shrunk.scenario;
        finding.violation = shrunk.violation;
        finding.shrunk_steps = Some(scenario.steps.len());
    }
    harness.look_closely(&scenario, &mut finding.violation)?;
    let path = out.join(format!("seed-{}-{}.json", finding.seed, oracle.as_str()));
    crate::cli::save(&path, &scenario)?;
    finding.file = Some(path);
    Ok(())
}
