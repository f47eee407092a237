//! Defects of `qemu-storage-daemon` 10.0 that were reviewed and are held to be its own.
//!
//! Here: what an entry and a case are, and the questions that others ask. `list` has the entries, `cases` says which
//! cases are which entry's, `ahead` which commands would meet one; `causes`, `strayed`, `graph`, `kept`, `backup` and `bitmaps` look for
//! what they need.
//!
//! Rules: an entry has a scenario under `docs/findings/` that reproduces it, a page beside it that explains it, and a
//! matcher as narrow as the defect. What an entry explains is reported as known, never as agreement. Random and
//! exhaustive campaigns steer around what ends a daemon, so that it does not hide the rest; a scenario file is always
//! carried out as it stands.

mod ahead;
mod backup;
mod bitmaps;
mod cases;
mod causes;
mod graph;
mod kept;
mod list;
mod strayed;

pub(super) use backup::{frees_bitmap, gives_up_group};
pub(super) use bitmaps::{enables_missing, fails_to_freeze};
pub(super) use cases::odd_raw_files;
pub(super) use causes::{
    bottoms_out, has_bottom_on_top, has_bottom_outside, has_negative_null_co, has_raw_on_overlay, is_uneven,
    takes_back_a_snapshot,
};
pub(super) use graph::{aborts_a_used_overlay, visits_twice};
pub use list::DEFECTS;
pub(super) use strayed::{Strayed, words};

use blkcheck_model::{Command, World};
use serde_json::{Map, Value};

use super::{Kind, What};
use crate::follow::world_of;
use crate::scenario::{Action, Scenario};

/// How sure we are that the daemon is wrong and not the model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sure {
    /// No reading of the interface allows it: it dies, never answers, or loses data.
    Certain,
    /// It contradicts the rest of the interface or its documentation.
    Likely,
}

impl Sure {
    /// In reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Sure::Certain => "certain",
            Sure::Likely => "likely",
        }
    }
}

/// A difference or failure, and where it occurred.
#[derive(Debug)]
pub(super) struct Case<'a> {
    pub(super) scenario: &'a Scenario,
    pub(super) step: usize,
    /// The command of this step; empty for another step.
    pub(super) execute: &'a str,
    pub(super) arguments: &'a Map<String, Value>,
    /// The model, before a command that was answered differently, else after the step.
    pub(super) world: &'a World,
    /// What came before, and this step's command if it was answered.
    pub(super) past: &'a [Past],
    /// Streams that succeeded although their last layer had got another backing node.
    pub(super) strayed: &'a [Strayed],
    /// Filters of finished streams that the daemon still has.
    pub(super) leftovers: &'a [String],
    pub(super) what: Option<What>,
    pub(super) failed: Option<Kind>,
    pub(super) model: &'a str,
    pub(super) qemu: &'a str,
}

impl<'a> Case<'a> {
    /// The node whose export the guest of this step asks.
    fn asked(&self) -> Option<&'a str> {
        let Action::Guest { export, .. } = &self.scenario.steps.get(self.step)?.action else {
            return None;
        };
        let mut exports = self.world.exports.iter();
        let export = exports.find(|e| *e.name == **export || *e.id == **export)?;
        Some(self.world.graph.name(self.world.graph.edge(export.root).child))
    }
}

/// A command that both carried out or refused.
#[derive(Debug)]
pub(super) struct Past {
    pub(super) step: usize,
    /// The model before it.
    pub(super) world: World,
}

/// What the model makes of the commands up to and with this step, where nobody kept it.
pub(super) fn replayed(scenario: &Scenario, step: usize) -> Vec<Past> {
    let mut world = world_of(scenario);
    let mut past = Vec::new();
    for (step, at) in (0..).zip(&scenario.steps).take(step.saturating_add(1)) {
        if let Action::Command { execute, arguments } = &at.action {
            let before = world.clone();
            // What it refuses, or does not know, changes nothing.
            let _ = world.execute(&Command::new(execute, &Value::Object(arguments.clone())));
            past.push(Past { step, world: before });
        }
    }
    past
}

/// A reviewed defect.
#[derive(Debug)]
pub struct Defect {
    /// Short name; also of the files under `docs/findings/`.
    pub id: &'static str,
    /// One line.
    pub title: &'static str,
    /// What the daemon does.
    pub qemu: &'static str,
    /// What we hold right, and why.
    pub right: &'static str,
    /// How sure we are.
    pub sure: Sure,
    /// The scenario that shows it.
    pub scenario: &'static str,
    /// The page that explains it.
    pub page: &'static str,
    pub(super) matches: fn(&Case<'_>) -> bool,
    /// The command would run into it.
    pub(super) steer: Option<fn(&Around<'_>) -> bool>,
}

/// A command about to be sent.
pub(super) struct Around<'a> {
    world: &'a World,
    leftovers: &'a [String],
    execute: &'a str,
    arguments: &'a Map<String, Value>,
}

/// The entry for the filter that a finished stream leaves behind.
pub(super) fn filter_outlives_job() -> &'static Defect {
    DEFECTS
        .iter()
        .find(|d| d.id == "filter-outlives-job")
        .expect("it is in the list")
}

/// The entry for a filter that copies too much.
pub(super) fn copies_below_bottom() -> &'static Defect {
    DEFECTS
        .iter()
        .find(|d| d.id == "cor-copies-below-bottom")
        .expect("it is in the list")
}

/// The entry that explains a case.
pub(super) fn explain(case: &Case<'_>) -> Option<&'static Defect> {
    DEFECTS.iter().find(|defect| (defect.matches)(case))
}

/// The entry that a command would run into.
pub(crate) fn steers_around(
    world: &World,
    leftovers: &[String],
    execute: &str,
    arguments: &Map<String, Value>,
) -> Option<&'static Defect> {
    let around = Around {
        world,
        leftovers,
        execute,
        arguments,
    };
    DEFECTS
        .iter()
        .find(|defect| defect.steer.is_some_and(|steer| steer(&around)))
}

#[cfg(test)]
mod tests;
