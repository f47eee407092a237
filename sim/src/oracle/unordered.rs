//! What can be said of a subject of which nobody knows in which order things happened inside: `data`, `status` and
//! `transparency`.
//!
//! The model follows the commands and the jobs' ends as far as it can. A register history needs no more order than
//! "this was over before that began", and what nodes and images hold at the end needs none.
//! Rules: where an answer is not what the model predicts (a job was over a moment sooner), the model has lost sight of the
//! subject, and nothing more is said of that run; the same where two nodes write one image.
//! Not here: refusals, graph and masks on the way, `bottom`, frozen links, drain: all need to know what came first.

use super::bottom::Bottom;
use super::data::{Data, guest};
use super::{FinalContent, Oracle, OracleName, View, Violation};
use crate::follow::Follower;
use crate::history::{Outcome, Record};
use crate::scenario::Scenario;

/// See the module.
#[derive(Debug, Default)]
pub struct Unordered {
    follower: Follower,
    data: Data,
    bottom: Bottom,
    /// The model is not where the subject is.
    lost: bool,
}

impl Oracle for Unordered {
    fn name(&self) -> OracleName {
        OracleName::Data
    }

    fn reset(&mut self, scenario: &Scenario) {
        self.follower.reset(scenario);
        self.data.reset(scenario);
        self.bottom = Bottom::outside();
        self.bottom.reset(scenario);
        self.lost = false;
    }

    fn record(&mut self, view: &View<'_>, record: &Record) -> Result<(), Violation> {
        if self.lost {
            return Ok(());
        }
        let followed = self.follower.record(view.scenario, record);
        if followed.wrong.is_some() {
            self.lost = true;
            return Ok(());
        }
        let (follower, bottom) = (&self.follower, &mut self.bottom);
        if followed.executed.is_some() && followed.changed {
            bottom.executed(view.scenario, &follower.world);
        }
        self.data
            .follow(view.scenario, follower, &followed, bottom, view.now);
        if followed.settled {
            self.data.end_change(bottom);
        }
        match record {
            Record::Issued(step) => {
                if let Some((export, op)) = guest(view.scenario, *step) {
                    let beside = (&self.follower, &self.bottom);
                    self.data.issued(view, beside, *step, export, op);
                    if let Some(disk) = self.data.disk_under(*step) {
                        self.bottom.issued(*step, disk, op);
                    }
                    self.data.tell_crossed(view.scenario, &mut self.bottom);
                }
                Ok(())
            }
            Record::Ended(_, Outcome::Command(got)) if followed.answered.is_some() => {
                let predicted = self.follower.prediction().is_some_and(Result::is_ok);
                self.lost = predicted != got.is_ok();
                Ok(())
            }
            Record::Ended(step, outcome) => {
                self.bottom.ended(*step, outcome);
                self.data.ended(view, *step, outcome)
            }
            Record::Fault(fault) => {
                self.data.fault(fault);
                Ok(())
            }
            Record::Layer(_) | Record::PowerCut { .. } => Ok(()),
        }
    }

    fn quiescent(&mut self, view: &View<'_>, contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        if self.lost {
            return Ok(());
        }
        self.data.quiescent(view, &self.follower, contents)
    }

    fn closed(&mut self, view: &View<'_>, contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        if self.lost {
            return Ok(());
        }
        self.data.closed(view, (&self.follower, &self.bottom), contents)
    }
}
