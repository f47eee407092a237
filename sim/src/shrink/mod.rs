//! The shrinker: the smallest scenario found in which the *same oracle* still fails.
//!
//! Workload, sizes and schedule shrink together: a candidate is tried along the path of the best run so far (see
//! `guide`: dropping a step moves every later choice, but not what they were about), with the recorded choices, with
//! none, and with a few fresh random ones. A candidate is kept only if the same
//! oracle fires, and only if it is smaller (`Size`), so the search ends. It is bounded by a number of executions.
//! Not promised: a global minimum.

mod choices;
mod faults;
mod images;
mod steps;

use std::ops::Range;

use crate::choice::{Chooser, Random, Recorded};
use crate::guide::{Guided, Path};
use crate::history::StepId;
use crate::oracle::{OracleName, Violation};
use crate::scenario::Scenario;
use crate::scenario::validate::validate;

/// What one execution of a candidate showed.
#[derive(Debug)]
pub struct Trial {
    /// What failed, if anything.
    pub violation: Option<Violation>,
    /// The choices it made, trailing zeros dropped.
    pub choices: Vec<u32>,
    /// What happened.
    pub path: Path,
}

/// Runs one scenario under one chooser.
pub trait Execute {
    /// One execution from scratch.
    fn execute(&mut self, scenario: &Scenario, chooser: &mut dyn Chooser) -> Trial;
}

/// How much work a shrink may do.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Executions in all.
    pub executions: u32,
    /// Fresh random schedules per candidate.
    pub schedules: u32,
}

impl Default for Limits {
    fn default() -> Limits {
        Limits {
            executions: 20_000,
            schedules: 12,
        }
    }
}

/// A shrunk finding.
#[derive(Clone, Debug)]
pub struct Shrunk {
    /// The scenario, with its choices and `expect`.
    pub scenario: Scenario,
    /// What fails in it.
    pub violation: Violation,
    /// Executions it took.
    pub executions: u32,
}

/// What "smaller" means, most important first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Size {
    steps: usize,
    images: usize,
    fills: usize,
    switches: usize,
    bytes: u64,
    words: usize,
}

fn size(scenario: &Scenario) -> Size {
    let ranges: u64 = scenario.steps.iter().map(steps::weight).sum();
    let images: u64 = scenario
        .images
        .iter()
        .map(|i| i.size + u64::from(i.cluster_size) + u64::from(i.free))
        .sum();
    let fills: u64 = scenario
        .images
        .iter()
        .flat_map(|i| &i.fill)
        .map(|f| f.length + f.offset / 16)
        .sum();
    let properties = u64::from(scenario.disk.alignment) + u64::from(scenario.disk.job_parallelism);
    Size {
        steps: scenario.steps.len(),
        images: scenario.images.len(),
        fills: scenario.images.iter().map(|i| i.fill.len()).sum(),
        switches: scenario.choices.iter().filter(|&&c| c != 0).count(),
        bytes: ranges + images + fills + properties + faults::weight(scenario),
        words: scenario.steps.iter().map(steps::words).sum::<usize>() + scenario.choices.len(),
    }
}

/// Shrinks `scenario`, which fails `oracle` under its recorded choices.
///
/// Returns `None` when it does not fail that way.
pub fn shrink(
    scenario: &Scenario,
    oracle: OracleName,
    limits: Limits,
    run: &mut dyn Execute,
) -> Option<Shrunk> {
    let mut search = Search {
        oracle,
        limits,
        run,
        executions: 0,
        best: scenario.clone(),
        path: Path::default(),
        violation: None,
    };
    if !search.accept_first(scenario) {
        return None;
    }
    loop {
        let before = size(&search.best);
        search.truncate();
        steps::pass(&mut search);
        images::pass(&mut search);
        faults::pass(&mut search);
        choices::pass(&mut search);
        if size(&search.best) == before || search.spent() {
            break;
        }
    }
    let violation = search.violation?;
    let mut scenario = search.best;
    scenario.expect = Some(oracle.as_str().to_owned());
    Some(Shrunk {
        scenario,
        violation,
        executions: search.executions,
    })
}

/// The state of one shrink.
struct Search<'a> {
    oracle: OracleName,
    limits: Limits,
    run: &'a mut dyn Execute,
    executions: u32,
    best: Scenario,
    /// What happened in the run of `best`.
    path: Path,
    violation: Option<Violation>,
}

/// A run that failed as it should.
struct Failure {
    violation: Violation,
    choices: Vec<u32>,
    path: Path,
}

impl Search<'_> {
    fn spent(&self) -> bool {
        self.executions >= self.limits.executions
    }

    fn accept_first(&mut self, scenario: &Scenario) -> bool {
        let choices = scenario.choices.clone();
        match self.execute(scenario, &mut Recorded::new(&choices)) {
            Some(failure) => {
                self.best.choices = failure.choices;
                self.path = failure.path;
                self.violation = Some(failure.violation);
                true
            }
            None => false,
        }
    }

    fn execute(&mut self, scenario: &Scenario, chooser: &mut dyn Chooser) -> Option<Failure> {
        self.executions += 1;
        let Trial {
            violation,
            choices,
            path,
        } = self.run.execute(scenario, chooser);
        let violation = violation.filter(|v| v.oracle == self.oracle)?;
        Some(Failure {
            violation,
            choices,
            path,
        })
    }

    /// What could be loaded from its file cannot any more.
    fn spoils(&self, candidate: &Scenario) -> bool {
        validate(&self.best).is_ok() && validate(candidate).is_err()
    }

    /// Tries a candidate that differs in more than its choices; true when it became the best.
    fn offer(&mut self, candidate: Scenario) -> bool {
        if candidate == self.best || self.spent() || self.spoils(&candidate) {
            return false;
        }
        let recorded = candidate.choices.clone();
        let scheduled = recorded.iter().any(|&c| c != 0);
        let mut found = None;
        if scheduled {
            let removed = removed(&self.best, &candidate);
            let mut guided = Guided::new(&self.path.without(removed));
            found = self.execute(&candidate, &mut guided);
        }
        if found.is_none() {
            found = self.execute(&candidate, &mut Recorded::new(&recorded));
        }
        if found.is_none() && scheduled {
            found = self.execute(&candidate, &mut Recorded::new(&[]));
            let mut attempts = 0;
            while found.is_none() && attempts < self.limits.schedules && !self.spent() {
                attempts += 1;
                let seed = u64::from(self.executions);
                found = self.execute(&candidate, &mut Random::new(seed));
            }
        }
        self.keep_if_smaller(candidate, found)
    }

    /// Tries a candidate with exactly its own choices.
    fn offer_exact(&mut self, candidate: Scenario) -> bool {
        if candidate == self.best || self.spent() || self.spoils(&candidate) {
            return false;
        }
        let recorded = candidate.choices.clone();
        let found = self.execute(&candidate, &mut Recorded::new(&recorded));
        self.keep_if_smaller(candidate, found)
    }

    /// Tries another course of the best scenario.
    fn offer_path(&mut self, path: &Path) -> bool {
        if self.spent() {
            return false;
        }
        let candidate = self.best.clone();
        let found = self.execute(&candidate, &mut Guided::new(path));
        self.keep_if_smaller(candidate, found)
    }

    fn keep_if_smaller(&mut self, mut candidate: Scenario, found: Option<Failure>) -> bool {
        let Some(failure) = found else {
            return false;
        };
        candidate.choices = failure.choices;
        if size(&candidate) >= size(&self.best) {
            return false;
        }
        self.best = candidate;
        self.path = failure.path;
        self.violation = Some(failure.violation);
        true
    }

    /// Nothing after the step that the verdict names is needed.
    fn truncate(&mut self) {
        let Some(StepId(step)) = self.violation.as_ref().and_then(|v| v.step) else {
            return;
        };
        let keep = step as usize + 1;
        if keep < self.best.steps.len() {
            let mut candidate = self.best.clone();
            candidate.steps.truncate(keep);
            self.offer(candidate);
        }
    }
}

/// The steps of `old` that `new` lacks, if one stretch of them was removed; an empty stretch if none was.
fn removed(old: &Scenario, new: &Scenario) -> Range<usize> {
    let gone = old.steps.len().saturating_sub(new.steps.len());
    let same = old.steps.iter().zip(&new.steps).take_while(|(a, b)| a == b);
    let start = if gone == 0 { 0 } else { same.count() };
    start..start + gone
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::{Profile, Reach, generate};
    use crate::scenario::{Action, GuestOp};

    /// Fails when a write to the topmost export is followed by a discard anywhere: two steps suffice.
    struct Pretend;

    impl Execute for Pretend {
        fn execute(&mut self, scenario: &Scenario, chooser: &mut dyn Chooser) -> Trial {
            let _ = chooser.choose(crate::choice::ChoiceKind::Next, 2);
            let op = |wanted: fn(&GuestOp) -> bool| {
                scenario
                    .steps
                    .iter()
                    .position(|s| matches!(&s.action, Action::Guest { op, .. } if wanted(op)))
            };
            let write = op(|o| matches!(o, GuestOp::Write(_)));
            let discard = op(|o| matches!(o, GuestOp::Discard(_)));
            let violation = match (write, discard) {
                (Some(w), Some(d)) if w < d => Some(Violation {
                    oracle: OracleName::Data,
                    message: String::new(),
                    step: u32::try_from(d).ok().map(StepId),
                    evidence: Vec::new(),
                }),
                _ => None,
            };
            Trial {
                violation,
                choices: Vec::new(),
                path: Path::default(),
            }
        }
    }

    #[test]
    fn a_big_failure_shrinks_to_its_two_steps() {
        let mut tried = 0;
        for seed in 0..200 {
            let scenario = generate(seed, Profile::Mixed, Reach::all());
            let Some(shrunk) = shrink(&scenario, OracleName::Data, Limits::default(), &mut Pretend) else {
                continue;
            };
            tried += 1;
            assert_eq!(
                shrunk.scenario.steps.len(),
                2,
                "seed {seed}: {:#?}",
                shrunk.scenario.steps
            );
            assert_eq!(shrunk.scenario.expect.as_deref(), Some("data"));
        }
        assert!(tried > 10, "only {tried} seeds had the shape");
    }

    #[test]
    fn what_does_not_fail_does_not_shrink() {
        let mut scenario = generate(1, Profile::Bench, Reach::all());
        scenario.steps.clear();
        assert!(shrink(&scenario, OracleName::Data, Limits::default(), &mut Pretend).is_none());
    }
}
