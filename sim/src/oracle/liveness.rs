//! Everything finishes: when nothing can run any more, every actor is done.
//!
//! The runner decides that nothing can run (no ready task, no storage request pending, no timer); this oracle says
//! which steps are unfinished and who waits for whom, from `RequestWaits`, `BackendQueued`, drained sections that
//! have not returned, and the main lock; a circle among waiting requests is named as such.
//! Unchecked: a livelock (the runner's step limit reports it, with the same evidence).

use blkcheck_impl::event::{Event, ReqKind};
use blkcheck_impl::types::{BackendId, NodeId, RequestId};

use super::mirror::Mirror;
use super::{Oracle, OracleName, View, Violation, violation};
use crate::history::{Record, StepId};
use crate::scenario::{Action, Scenario, Step, listing};

/// A request in flight.
#[derive(Clone, Copy, Debug)]
struct Request {
    id: RequestId,
    node: NodeId,
    kind: ReqKind,
    offset: u64,
    bytes: u64,
    waits_on: Option<RequestId>,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Liveness {
    mirror: Mirror,
    open: Vec<StepId>,
    requests: Vec<Request>,
    /// Parked requests per backend.
    parked: Vec<(BackendId, u32)>,
    /// Sections that wait.
    draining: Vec<NodeId>,
    /// Sections that hold.
    drained: Vec<NodeId>,
    main: Option<&'static str>,
}

impl Liveness {
    fn event(&mut self, event: &Event) {
        match event {
            Event::MainBegin { what } => self.main = Some(what),
            Event::MainEnd { .. } => self.main = None,
            Event::RequestBegin {
                request,
                node,
                kind,
                offset,
                bytes,
                ..
            } => self.requests.push(Request {
                id: *request,
                node: *node,
                kind: *kind,
                offset: *offset,
                bytes: *bytes,
                waits_on: None,
            }),
            Event::RequestWaits { request, on } => {
                if let Some(r) = self.requests.iter_mut().rfind(|r| r.id == *request) {
                    r.waits_on = Some(*on);
                }
            }
            Event::RequestEnd { request, .. } => {
                if let Some(i) = self.requests.iter().rposition(|r| r.id == *request) {
                    self.requests.swap_remove(i);
                }
            }
            Event::BackendQueued { backend } => match self.parked.iter_mut().find(|p| p.0 == *backend) {
                Some(p) => p.1 += 1,
                None => self.parked.push((*backend, 1)),
            },
            Event::BackendResumed { backend } => {
                if let Some(p) = self.parked.iter_mut().find(|p| p.0 == *backend) {
                    p.1 = p.1.saturating_sub(1);
                }
            }
            Event::DrainBegin { node } => self.draining.push(*node),
            Event::Drained { node } => {
                remove(&mut self.draining, *node);
                self.drained.push(*node);
            }
            Event::DrainEnd { node } => {
                // A section that was given up before it returned.
                let _ = remove(&mut self.drained, *node) || remove(&mut self.draining, *node);
            }
            _ => {}
        }
        let _ = self.mirror.apply(event);
    }

    fn request(&self, r: &Request) -> String {
        let (kind, name) = (r.kind, self.mirror.name(r.node));
        format!(
            "{:?} ({kind:?} {:#x}+{:#x} on node '{name}')",
            r.id, r.offset, r.bytes
        )
    }

    /// Who waits for whom.
    #[must_use]
    pub fn evidence(&self, scenario: &Scenario) -> Vec<String> {
        let mut lines: Vec<String> = self
            .open
            .iter()
            .map(|s| format!("unfinished: {}", step_text(scenario, *s)))
            .collect();
        if let Some(main) = self.main {
            lines.push(format!("main context: inside {main}"));
        }
        for node in &self.draining {
            lines.push(format!(
                "waiting: drained-begin of node '{}'",
                self.mirror.name(*node)
            ));
        }
        for node in &self.drained {
            lines.push(format!(
                "holding: drained section of node '{}'",
                self.mirror.name(*node)
            ));
        }
        for (backend, n) in self.parked.iter().filter(|p| p.1 > 0) {
            lines.push(format!(
                "waiting: {n} requests parked in {backend:?} until a drained section ends"
            ));
        }
        for r in &self.requests {
            let on = r
                .waits_on
                .and_then(|on| self.requests.iter().find(|o| o.id == on));
            lines.push(match on {
                Some(on) => format!("waiting: {} for {}", self.request(r), self.request(on)),
                None => format!("in flight: {}", self.request(r)),
            });
        }
        lines.extend(self.circle());
        lines
    }

    fn circle(&self) -> Option<String> {
        let next = |r: RequestId| self.requests.iter().find(|o| o.id == r)?.waits_on;
        for r in &self.requests {
            let mut at = next(r.id);
            for _ in 0..self.requests.len() {
                match at {
                    Some(n) if n == r.id => {
                        return Some(format!("circle: {:?} waits, in the end, for itself", r.id));
                    }
                    Some(n) => at = next(n),
                    None => break,
                }
            }
        }
        None
    }
}

fn remove(list: &mut Vec<NodeId>, node: NodeId) -> bool {
    match list.iter().rposition(|n| *n == node) {
        Some(i) => {
            list.remove(i);
            true
        }
        None => false,
    }
}

/// One step in a few words.
pub(crate) fn step_text(scenario: &Scenario, step: StepId) -> String {
    match act_text(scenario, step) {
        Some(act) => format!("step {}, {act}", step.0),
        None => format!("step {}", step.0),
    }
}

/// The same without its number: who does what.
pub(crate) fn act_text(scenario: &Scenario, step: StepId) -> Option<String> {
    let Step { actor, action, .. } = scenario.steps.get(step.0 as usize)?;
    let what = match action {
        Action::Command { execute, .. } => execute.clone(),
        Action::Guest { export, op } => format!("{} on {export}", listing::request(*op)),
        Action::DrainBegin { node } => format!("drained-begin {node}"),
        Action::DrainEnd { node } => format!("drained-end {node}"),
        Action::WaitJob { job } => format!("wait for job {} to be {}", job.id, job.status),
        Action::Settle { .. } => "settle".to_owned(),
    };
    Some(format!("{actor}: {what}"))
}

impl Oracle for Liveness {
    fn name(&self) -> OracleName {
        OracleName::Liveness
    }

    fn reset(&mut self, _scenario: &Scenario) {
        self.mirror.reset();
        self.open.clear();
        self.requests.clear();
        self.parked.clear();
        self.draining.clear();
        self.drained.clear();
        self.main = None;
    }

    fn record(&mut self, _view: &View<'_>, record: &Record) -> Result<(), Violation> {
        match record {
            Record::Issued(step) => self.open.push(*step),
            Record::Ended(step, _) => self.open.retain(|s| s != step),
            Record::Layer(event) => self.event(event),
            Record::Fault(_) | Record::PowerCut { .. } => {}
        }
        Ok(())
    }

    fn stuck(&mut self, view: &View<'_>) -> Result<(), Violation> {
        let message = match self.open.first() {
            Some(step) => format!(
                "nothing can run any more, but {} steps are unfinished, first {}",
                self.open.len(),
                step_text(view.scenario, *step)
            ),
            None => "nothing can run any more, but the layer is not done".to_owned(),
        };
        Err(violation(
            OracleName::Liveness,
            self.open.first().copied(),
            message,
            self.evidence(view.scenario),
        ))
    }
}

#[cfg(test)]
mod tests {
    use blkcheck_impl::types::{EdgeId, ReqFlags};

    use super::super::mirror::tests::chain;
    use super::super::tests::{feed_on, scenario_of};
    use super::*;

    #[test]
    fn a_deadlock_says_who_waits_for_whom() {
        let scenario = scenario_of(
            r#"{"version":1,"grain":64,"images":[],"steps":[
                {"actor":"guest0","export":"top","do":{"read":{"offset":0,"length":64}}},
                {"actor":"drain0","drained-begin":"top"}]}"#,
        );
        let mut oracle = Liveness::default();
        oracle.reset(&scenario);
        let begin = |id, offset| {
            Record::Layer(Event::RequestBegin {
                request: RequestId(id),
                node: NodeId(1),
                edge: EdgeId(0),
                kind: ReqKind::Read,
                offset,
                bytes: 64,
                flags: ReqFlags::empty(),
            })
        };
        let waits = |id, on| {
            Record::Layer(Event::RequestWaits {
                request: RequestId(id),
                on: RequestId(on),
            })
        };
        let mut records: Vec<Record> = chain().into_iter().map(Record::Layer).collect();
        records.extend([
            Record::Issued(StepId(0)),
            begin(0, 0),
            begin(1, 32),
            waits(0, 1),
            waits(1, 0),
            Record::Issued(StepId(1)),
            Record::Layer(Event::DrainBegin { node: NodeId(1) }),
        ]);
        feed_on(&mut oracle, &scenario, records).expect("records alone are no verdict");
        let view = View {
            scenario: &scenario,
            now: 9,
            layer: None,
        };
        let v = oracle.stuck(&view).expect_err("deadlock");
        assert_eq!(v.step, Some(StepId(0)));
        assert!(v.message.contains("2 steps are unfinished"), "{}", v.message);
        let expected = [
            "waiting: drained-begin of node 'top'",
            "waiting: r0 (Read 0x0+0x40 on node 'top') for r1 (Read 0x20+0x40 on node 'top')",
            "circle: r0 waits, in the end, for itself",
        ];
        for line in expected {
            assert!(
                v.evidence.iter().any(|l| l == line),
                "{line} missing in {:?}",
                v.evidence
            );
        }
    }
}
