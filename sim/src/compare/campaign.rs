//! Many scenarios: differences are shrunk and saved, daemons that broke are replaced, known defects are counted.
//!
//! Rules: one daemon, one thread; a campaign is a function of its request (only its times are not). Only differences
//! that no known defect explains are findings.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::beyond;
use super::exhaustive::{self, Walked, Witness};
use super::generate::generate;
use super::lockstep::{Finding, Lockstep, Manner};
use super::peer::Peer;
use super::{Kind, What};
use crate::choice::Chooser;
use crate::cli::{CliError, save};
use crate::clock::Stopwatch;
use crate::guide;
use crate::history::StepId;
use crate::oracle::{OracleName, Violation};
use crate::qemu::steps::about_itself;
use crate::scenario::Scenario;
use crate::shrink::{Execute, Limits, Trial, shrink};

/// Findings that are shrunk and saved.
const SAVED: usize = 24;
/// How long a daemon may take while a hang is shrunk; what is left is tried once more with full patience.
const HANGS_SOON: Duration = Duration::from_secs(2);
/// Longest part of a file's name that says which scenario it came from: the end of a path.
const LONGEST_NAME: usize = 120;
/// Entries that tell of one known defect.
const TOLD: u64 = 3;

/// What the scenarios of seeds are made of.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum Profile {
    /// What the model knows; everything that can be seen is compared.
    #[default]
    Model,
    /// Whatever the daemon has; judged by what guests see.
    Beyond,
}

impl Profile {
    /// By name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Profile> {
        match name {
            "model" => Some(Profile::Model),
            "beyond" => Some(Profile::Beyond),
            _ => None,
        }
    }

    fn generate(self, seed: u64) -> Scenario {
        match self {
            Profile::Model => generate(seed),
            Profile::Beyond => beyond::generate::generate(seed),
        }
    }
}

/// What to compare.
#[derive(Clone, Debug)]
pub enum Work {
    /// These, by name.
    Files(Vec<(String, Scenario)>),
    /// The scenarios of these seeds.
    Seeds(Range<u64>, Profile),
    /// Every sequence of commands up to this length.
    Exhaustive(u32),
}

/// A difference or a failure, as reported.
#[derive(Clone, Debug)]
pub struct Reported {
    /// Which scenario: a file, `seed N`, or `sequence`.
    pub scenario: String,
    /// What it showed, after shrinking where that was done.
    pub finding: Finding,
    /// Where it was saved.
    pub file: Option<PathBuf>,
}

/// What a campaign found.
#[derive(Clone, Debug, Default)]
pub struct Summary {
    /// Of the daemon.
    pub version: String,
    /// Scenarios compared; for a walk, sequences carried out.
    pub scenarios: u64,
    /// Steps carried out on both.
    pub steps: u64,
    /// Steps left out because of known defects.
    pub steered: u64,
    /// Commands left out because the model does not know what they do.
    pub left_out: u64,
    /// Those of scenario files, in words: who wrote one should know.
    pub notes: Vec<String>,
    /// Real time.
    pub seconds: f64,
    /// Daemons started.
    pub daemons: u32,
    /// What differs, unexplained.
    pub divergences: Vec<Reported>,
    /// How daemons failed, unexplained.
    pub failures: Vec<Reported>,
    /// Explained by a known defect: some of each.
    pub known: Vec<(&'static str, Reported)>,
    /// How often each known defect was met.
    pub known_counts: BTreeMap<&'static str, u64>,
    /// Distinct refusals that agreed.
    pub refusals: BTreeSet<(String, String)>,
    /// Of an exhaustive walk.
    pub walked: Option<Walked>,
    /// It was stopped.
    pub interrupted: bool,
    /// Why something could not be saved.
    pub unsaved: Option<String>,
}

impl Summary {
    /// Something is unexplained.
    #[must_use]
    pub fn failed(&self) -> bool {
        !self.divergences.is_empty() || !self.failures.is_empty()
    }
}

/// Carries it out.
///
/// # Errors
/// A scenario that is not about the block layer, no daemon of the right version that starts, or too little of something of ours.
pub fn run(
    work: &Work,
    program: Option<&Path>,
    out: &Path,
    shrinks: bool,
    stop: &AtomicBool,
    progress: &dyn Fn(u64),
) -> Result<Summary, CliError> {
    if let Work::Files(files) = work {
        let refused =
            |(name, scenario): &(String, Scenario)| Some(format!("{name}: {}", about_itself(scenario)?));
        if let Some(why) = files.iter().find_map(refused) {
            return Err(CliError::Request(why));
        }
    }
    let mut peer = Peer::new(program)
        .map_err(|e| CliError::Environment(e.to_string().replace("--on qemu", "compare")))?;
    // One that does not even start says nothing about the scenarios.
    peer.start()
        .map_err(|e| CliError::Environment(format!("compare: {e}")))?;
    let watch = Stopwatch::start();
    let mut found = Found {
        summary: Summary {
            version: peer.version(),
            ..Summary::default()
        },
        fresh: Vec::new(),
        unusable: None,
        shrinks,
        stop,
        progress,
    };
    let mut lockstep = Lockstep::new(peer, manner(work));
    match work {
        Work::Files(files) => {
            for (name, scenario) in files {
                if stop.load(Ordering::Relaxed) {
                    found.summary.interrupted = true;
                    break;
                }
                if found.unusable.is_some() {
                    break;
                }
                let left_out = found.one(&mut lockstep, name, scenario);
                let note = |step| note(name, scenario, step);
                found.summary.notes.extend(left_out.into_iter().map(note));
            }
        }
        Work::Seeds(seeds, profile) => {
            for seed in seeds.clone() {
                if stop.load(Ordering::Relaxed) {
                    found.summary.interrupted = true;
                    break;
                }
                if found.unusable.is_some() {
                    break;
                }
                found.one(&mut lockstep, &format!("seed {seed}"), &profile.generate(seed));
                progress(found.summary.scenarios);
            }
        }
        Work::Exhaustive(depth) => {
            let walked = exhaustive::walk(&mut lockstep.peer, *depth, &mut found)
                .map_err(|e| CliError::Environment(e.to_string()))?;
            found.summary.scenarios = walked.carried_out;
            found.summary.steps = walked.steps;
            found.summary.left_out = walked.left_out;
            found.summary.walked = Some(walked);
        }
    }
    if let Some(why) = found.unusable {
        return Err(CliError::Environment(format!("compare: {why}")));
    }
    // Told before the shrinker adds its own.
    found.summary.seconds = watch.elapsed().as_secs_f64();
    found.save_all(&mut lockstep, out);
    let mut summary = found.summary;
    summary.daemons = lockstep.peer().starts();
    Ok(summary)
}

fn manner(work: &Work) -> Manner {
    let files = matches!(work, Work::Files(_));
    Manner {
        // A file says what it wants.
        steer: !files,
        flags_always: files,
        read_all: true,
    }
}

struct Found<'a> {
    summary: Summary,
    /// To be shrunk and saved.
    fresh: Vec<(String, Scenario, Finding)>,
    /// What we were short of: no more can be found.
    unusable: Option<String>,
    shrinks: bool,
    stop: &'a AtomicBool,
    progress: &'a dyn Fn(u64),
}

impl Found<'_> {
    /// Compares one; the commands of it that were left out.
    fn one(&mut self, lockstep: &mut Lockstep, name: &str, scenario: &Scenario) -> Vec<usize> {
        let shown = lockstep.run(scenario);
        self.summary.scenarios += 1;
        self.summary.steps += shown.steps;
        self.summary.steered += shown.steered;
        self.summary.left_out += shown.left_out.len() as u64;
        self.summary.refusals.extend(shown.refusals);
        for (id, step) in shown.aside {
            self.met(id, name, &aside(step), None);
        }
        if let Some(finding) = shown.finding {
            self.add(name, scenario, finding);
        }
        shown.left_out
    }

    fn met(&mut self, id: &'static str, name: &str, finding: &Finding, file: Option<PathBuf>) {
        let count = self.summary.known_counts.entry(id).or_default();
        *count += 1;
        if *count <= TOLD {
            let reported = Reported {
                scenario: name.to_owned(),
                finding: finding.clone(),
                file,
            };
            self.summary.known.push((id, reported));
        }
    }

    fn add(&mut self, name: &str, scenario: &Scenario, finding: Finding) {
        if finding.failed == Some(Kind::Unusable) {
            self.unusable.get_or_insert(finding.qemu);
            return;
        }
        match finding.known {
            Some(id) => self.met(id, name, &finding, None),
            None => self.fresh.push((name.to_owned(), scenario.clone(), finding)),
        }
    }

    fn save_all(&mut self, lockstep: &mut Lockstep, out: &Path) {
        let fresh = std::mem::take(&mut self.fresh);
        if !fresh.is_empty() {
            let made = std::fs::create_dir_all(out);
            self.summary.unsaved = made.err().map(|e| format!("{}: {e}", out.display()));
        }
        // One of each kind first: the tenth of a kind is seldom new.
        let mut seen: BTreeMap<(Option<What>, Option<Kind>, String), u32> = BTreeMap::new();
        for (number, (name, scenario, finding)) in fresh.into_iter().enumerate() {
            let kind = (finding.what, finding.failed, command_at(&scenario, finding.step));
            let nth = seen.entry(kind).or_default();
            *nth += 1;
            let mut reported = Reported {
                scenario: name,
                finding,
                file: None,
            };
            let wanted = *nth <= 2 && number < 8 * SAVED && !self.stop.load(Ordering::Relaxed);
            if wanted && self.summary.unsaved.is_none() {
                let saved = shrink_and_save(lockstep, scenario, &mut reported, out, self.shrinks);
                self.summary.unsaved = saved.err().map(|e| e.to_string());
            }
            if reported.finding.failed.is_some() {
                self.summary.failures.push(reported);
            } else {
                self.summary.divergences.push(reported);
            }
        }
    }
}

fn note(name: &str, scenario: &Scenario, step: usize) -> String {
    let command = command_at(scenario, step);
    format!("{name}, step {step}: {command} is left out: the model does not know what it does here")
}

fn aside(step: usize) -> Finding {
    Finding {
        step,
        what: Some(What::Nodes),
        failed: None,
        model: "the filter is gone".to_owned(),
        qemu: "it stays, without a child, until the job is dismissed".to_owned(),
        known: None,
    }
}

fn command_at(scenario: &Scenario, step: usize) -> String {
    match scenario.steps.get(step).map(|s| &s.action) {
        Some(crate::scenario::Action::Command { execute, .. }) => execute.clone(),
        _ => String::new(),
    }
}

fn shrink_and_save(
    lockstep: &mut Lockstep,
    scenario: Scenario,
    reported: &mut Reported,
    out: &Path,
    shrinks: bool,
) -> Result<(), CliError> {
    let oracle = oracle(&reported.finding);
    let limits = Limits {
        // A hang takes its time.
        executions: if reported.finding.failed == Some(Kind::Hang) {
            60
        } else {
            500
        },
        schedules: 0,
    };
    if reported.finding.failed == Some(Kind::Hang) {
        lockstep.peer.be_patient(Some(HANGS_SOON));
    }
    let mut trials = Trials {
        lockstep,
        same: (reported.finding.what, reported.finding.failed),
    };
    let mut smallest = scenario;
    if shrinks && let Some(shrunk) = shrink(&smallest, oracle, limits, &mut trials) {
        smallest = shrunk.scenario;
        lockstep.peer.be_patient(None);
        // What the smallest one shows.
        if let Some(finding) = lockstep.run(&smallest).finding {
            reported.finding = finding;
        }
    }
    lockstep.peer.be_patient(None);
    smallest.expect = None;
    let what = reported
        .finding
        .what
        .map_or("daemon", What::as_str)
        .replace(' ', "-");
    let name = file_name(&reported.scenario);
    let path = (0..)
        .map(|n| {
            out.join(format!(
                "compare-{name}-{what}{}.json",
                if n == 0 { String::new() } else { format!("-{n}") }
            ))
        })
        .find(|path| !path.exists())
        .expect("numbers do not end");
    save(&path, &smallest)?;
    reported.file = Some(path);
    Ok(())
}

/// What of a scenario's name, which may be any path, is part of the name of a file.
fn file_name(scenario: &str) -> String {
    let plain = |c: char| {
        if c.is_ascii_alphanumeric() || "._-".contains(c) {
            c
        } else {
            '-'
        }
    };
    let name: Vec<char> = scenario.chars().map(plain).collect();
    name[name.len().saturating_sub(LONGEST_NAME)..].iter().collect()
}

fn oracle(finding: &Finding) -> OracleName {
    finding.what.map_or(OracleName::Daemon, What::oracle)
}

/// Runs the shrinker's candidates.
struct Trials<'a> {
    lockstep: &'a mut Lockstep,
    same: (Option<What>, Option<Kind>),
}

impl Execute for Trials<'_> {
    fn execute(&mut self, scenario: &Scenario, _chooser: &mut dyn Chooser) -> Trial {
        let finding = self.lockstep.run(scenario).finding;
        let same = self.same;
        let finding = finding.filter(|f| f.known.is_none() && (f.what, f.failed) == same);
        Trial {
            violation: finding.map(|f| Violation {
                oracle: oracle(&f),
                message: format!("model: {}; daemon: {}", f.model, f.qemu),
                step: u32::try_from(f.step).ok().map(StepId),
                evidence: Vec::new(),
            }),
            choices: Vec::new(),
            path: guide::Path::default(),
        }
    }
}

impl Witness for Found<'_> {
    fn found(&mut self, scenario: &Scenario, finding: &Finding) {
        self.add("sequence", scenario, finding.clone());
    }

    fn aside(&mut self, _scenario: &Scenario, id: &'static str, step: usize) {
        self.met(id, "sequence", &aside(step), None);
    }

    fn refusals(&mut self, refusals: &[(String, String)]) {
        self.summary.refusals.extend(refusals.iter().cloned());
    }

    fn tick(&mut self, walked: &Walked) -> bool {
        (self.progress)(walked.sequences());
        self.summary.interrupted = self.stop.load(Ordering::Relaxed);
        self.summary.interrupted || self.unusable.is_some()
    }
}
