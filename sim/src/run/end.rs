//! How a run ends: everything is done, something hangs, or the power is gone; what is left is then judged.

use super::{Runner, Stop};
use crate::choice::{ChoiceKind, Chooser, pick};
use crate::finish;
use crate::history::Record;
use crate::oracle::{Oracle, OracleName, View, Violation};
use crate::target::Target;
use crate::trace::Fold;

impl Runner {
    /// Nothing can happen and nothing is left to clear away: is everything done?
    pub(super) fn at_rest(
        &mut self,
        target: &mut dyn Target,
        oracles: &mut [Box<dyn Oracle>],
    ) -> Result<(), Stop> {
        if self.unfinished == 0 && self.jobs.all_gone() && self.issuable.is_empty() {
            return Ok(());
        }
        Err(self.hangs("nothing can happen any more", target, oracles))
    }

    pub(super) fn hangs(
        &mut self,
        why: &str,
        target: &mut dyn Target,
        oracles: &mut [Box<dyn Oracle>],
    ) -> Stop {
        let view = View {
            scenario: &self.scenario,
            now: self.now,
            layer: target.layer(),
        };
        for oracle in oracles {
            if let Err(violation) = oracle.stuck(&view) {
                return Stop::Violation(violation);
            }
        }
        let mut evidence: Vec<String> = self.jobs.describe().collect();
        let waiting = self.actors.iter().filter_map(|a| a.waiting);
        evidence.extend(waiting.map(|s| {
            format!(
                "step {} ({}) is not done",
                s.0, self.scenario.steps[s.0 as usize].actor
            )
        }));
        evidence.extend(target.describe());
        let step = self.actors.iter().find_map(|a| a.waiting);
        Stop::Violation(Violation {
            oracle: OracleName::Liveness,
            message: why.into(),
            step,
            evidence,
        })
    }

    pub(super) fn finish(
        &mut self,
        target: &mut dyn Target,
        oracles: &mut [Box<dyn Oracle>],
    ) -> Result<(), Stop> {
        let nodes = target.contents();
        self.digest(target, oracles)?;
        let nodes = nodes.map_err(|trouble| Runner::trouble(trouble, target, None))?;
        let view = View {
            scenario: &self.scenario,
            now: self.now,
            layer: target.layer(),
        };
        finish::quiescent(&nodes, &view, oracles)?;
        let left = target.close();
        self.digest(target, oracles)?;
        let left = left.map_err(|trouble| Runner::trouble(trouble, target, None))?;
        finish::leftovers(&left)?;
        let files = target.closed_files();
        let view = View {
            scenario: &self.scenario,
            now: self.now,
            layer: target.layer(),
        };
        let sound = finish::closed(&files, &self.faulted, &view, oracles)?;
        let sound: Vec<(&str, &[u8])> = sound
            .iter()
            .map(|(name, bytes)| (&name[..], &bytes[..]))
            .collect();
        let judged = target.judge(&sound);
        match judged.map_err(|trouble| Runner::trouble(trouble, target, None))? {
            Some(violation) => Err(violation.into()),
            None => Ok(()),
        }
    }

    /// Nothing runs any more: what is left of the images is judged.
    pub(super) fn after_power_cut(
        &mut self,
        chooser: &mut dyn Chooser,
        target: &mut dyn Target,
        oracles: &mut [Box<dyn Oracle>],
    ) -> Result<(), Violation> {
        let left = target.power_cut(&mut |n| pick(chooser, ChoiceKind::Fault, n));
        let mut files = Vec::with_capacity(left.len());
        for (image, (file, remains)) in (0..).zip(left) {
            self.incoming.push(Record::PowerCut {
                image,
                volatile: remains.volatile,
                kept: remains.kept,
                sectors: remains.sectors,
                hash: Fold::of(&file.bytes),
            });
            files.push(file);
        }
        self.digest(target, oracles)?;
        let view = View {
            scenario: &self.scenario,
            now: self.now,
            layer: None,
        };
        finish::after_power_cut(&files, &view, oracles)
    }
}
