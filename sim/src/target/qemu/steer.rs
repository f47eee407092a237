//! Around the known defects: which step would meet one.
//!
//! Rules: the model follows the run and says what a command would do; guests' requests in flight are on a list. A command
//! that would meet a defect is passed over, a request waits until nothing is in flight that it would meet one with. A
//! transaction that is going to be taken back and guests' requests wait for each other.
//! A command is judged when it is started; one that is carried out later, behind others, may meet a defect all the same.

use crate::compare::known_run::{collide, largest_cluster, meets, takes_back};
use crate::follow::Follower;
use crate::history::{ESHUTDOWN, Record, StepId};
use crate::scenario::{Action, GuestOp, Scenario};
use crate::target::Steering;

/// Looks ahead in one run.
#[derive(Debug)]
pub(super) struct Steerer {
    follower: Follower,
    /// With the runner's own steps, as far as they were issued.
    scenario: Scenario,
    cluster: u64,
    flying: Vec<(StepId, GuestOp)>,
    /// Requests whose connection was closed: the daemon may be at them as long as it waits for storage.
    lost: Vec<GuestOp>,
    /// Transactions under way that are going to be taken back.
    taken_back: Vec<StepId>,
}

impl Steerer {
    pub(super) fn new(scenario: &Scenario) -> Steerer {
        let mut follower = Follower::default();
        follower.reset(scenario);
        Steerer {
            follower,
            scenario: scenario.clone(),
            cluster: largest_cluster(scenario),
            flying: Vec::new(),
            lost: Vec::new(),
            taken_back: Vec::new(),
        }
    }

    /// `idle`: no storage request of the daemon is held.
    pub(super) fn steering(&self, scenario: &Scenario, step: StepId, idle: bool) -> Steering {
        match &scenario.steps[step.0 as usize].action {
            Action::Guest { op, .. } => {
                let lost = self.lost.iter().filter(|_| !idle);
                let flying = self.flying.iter().map(|(_, op)| op).chain(lost);
                let collides = { flying }.any(|o| collide(*op, *o, self.cluster));
                match collides || !self.taken_back.is_empty() {
                    true => Steering::Wait,
                    false => Steering::Go,
                }
            }
            Action::Command { execute, arguments } => {
                let world = &self.follower.world;
                match meets(world, execute, arguments) {
                    Some(defect) => Steering::PassOver(defect),
                    None if !self.flying.is_empty() && takes_back(world, execute, arguments) => {
                        Steering::Wait
                    }
                    None => Steering::Go,
                }
            }
            _ => Steering::Go,
        }
    }

    pub(super) fn issued(&mut self, scenario: &Scenario, step: StepId, idle: bool) {
        if idle {
            self.lost.clear();
        }
        let known = self.scenario.steps.len();
        self.scenario.steps.extend_from_slice(&scenario.steps[known..]);
        match &scenario.steps[step.0 as usize].action {
            Action::Guest { op, .. } => self.flying.push((step, *op)),
            Action::Command { execute, arguments }
                if takes_back(&self.follower.world, execute, arguments) =>
            {
                self.taken_back.push(step);
            }
            _ => {}
        }
        self.follower.record(&self.scenario, &Record::Issued(step));
    }

    pub(super) fn follow(&mut self, records: &[Record]) {
        for record in records {
            self.follower.record(&self.scenario, record);
            if let Record::Ended(step, outcome) = record {
                if outcome.errno() == Some(ESHUTDOWN) {
                    let gone = self.flying.iter().filter(|(s, _)| s == step);
                    self.lost.extend(gone.map(|(_, op)| *op));
                }
                self.flying.retain(|(s, _)| s != step);
                self.taken_back.retain(|s| s != step);
            }
        }
    }
}
