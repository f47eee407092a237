//! What is right: the scenario on the block layer in simulation, sequentially, every answer and the state at the end.
//!
//! Rules: the choices are all zero, so that each step is over, and every job as far as it comes, before the next begins;
//! that is the run that a script without a gate repeats. It is watched by the oracles first: a scenario that the layer
//! itself fails has no expectation. Only the words of a refusal may be others, which no script insists on.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::rc::Rc;

use super::ExportError;
use crate::choice::Recorded;
use crate::history::{Outcome, Record, StepId};
use crate::oracle::{self, FinalContent, Oracle, OracleName, View, Violation};
use crate::run::Runner;
use crate::scenario::Scenario;
use crate::target::SimTarget;

/// Bytes of a node or an image.
#[derive(Clone, Debug, Default)]
pub(super) struct Holds {
    pub(super) name: String,
    pub(super) bytes: Vec<u8>,
    /// Runs of (bytes, the layer itself decides).
    pub(super) allocated: Vec<(u64, bool)>,
}

/// A backing file on record, and its format.
pub(super) type Header = Option<(String, Option<String>)>;

/// Everything that is right.
#[derive(Clone, Debug, Default)]
pub(super) struct Expected {
    /// The scenario with the runner's own steps at its end.
    pub(super) scenario: Scenario,
    /// Steps in the order in which they were taken.
    pub(super) order: Vec<StepId>,
    /// How each step ended.
    pub(super) outcomes: BTreeMap<StepId, Outcome>,
    /// Every node before the shutdown.
    pub(super) nodes: Vec<Holds>,
    /// Every image after it.
    pub(super) images: Vec<Holds>,
    /// Of every qcow2 image.
    pub(super) headers: BTreeMap<String, Header>,
}

/// Runs it.
pub(super) fn expected(scenario: &Scenario) -> Result<Expected, ExportError> {
    let mut runner = Runner::new();
    let mut run = |oracles: &mut [Box<dyn Oracle>]| {
        runner.keep_records(true);
        let result = runner.run(scenario, &mut Recorded::new(&[]), &mut SimTarget::new(), oracles);
        let violation = result.map_err(ExportError::Unusable)?.violation;
        Ok::<_, ExportError>((violation, runner.scenario().clone(), runner.records().to_vec()))
    };
    let mut all = oracle::all();
    if let (Some(violation), ..) = run(&mut all)?
        && violation.oracle != OracleName::Refusals
    {
        return Err(ExportError::LayerFails(violation));
    }
    let end = Rc::<RefCell<Expected>>::default();
    let (violation, scenario, records) = run(&mut [Box::new(Watcher(Rc::clone(&end)))])?;
    if let Some(violation) = violation {
        return Err(ExportError::LayerFails(violation));
    }
    let mut expected = end.take();
    expected.scenario = scenario;
    for record in records {
        match record {
            Record::Issued(step) => expected.order.push(step),
            Record::Ended(step, outcome) => {
                expected.outcomes.insert(step, outcome);
            }
            Record::Layer(_) | Record::Fault(_) | Record::PowerCut { .. } => {}
        }
    }
    Ok(expected)
}

/// Keeps the state at the end; never has a verdict.
#[derive(Debug)]
struct Watcher(Rc<RefCell<Expected>>);

fn kept(contents: &[FinalContent<'_>]) -> Vec<Holds> {
    let hold = |c: &FinalContent<'_>| Holds {
        name: c.name.to_owned(),
        bytes: c.bytes.to_vec(),
        allocated: c.allocated.to_vec(),
    };
    contents.iter().map(hold).collect()
}

impl Oracle for Watcher {
    fn name(&self) -> OracleName {
        OracleName::Liveness
    }
    fn reset(&mut self, _scenario: &Scenario) {}
    fn record(&mut self, _view: &View<'_>, _record: &Record) -> Result<(), Violation> {
        Ok(())
    }
    fn quiescent(&mut self, _view: &View<'_>, contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        self.0.borrow_mut().nodes = kept(contents);
        Ok(())
    }
    fn header(
        &mut self,
        _view: &View<'_>,
        file: &str,
        backing: Option<(&str, Option<&str>)>,
    ) -> Result<(), Violation> {
        let backing = backing.map(|(name, format)| (name.to_owned(), format.map(str::to_owned)));
        self.0.borrow_mut().headers.insert(file.to_owned(), backing);
        Ok(())
    }
    fn closed(&mut self, _view: &View<'_>, contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        self.0.borrow_mut().images = kept(contents);
        Ok(())
    }
}
