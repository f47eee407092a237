//! Nothing is left behind: at quiescence no request, at the end no node, edge, section, job or backend request.
//!
//! From the events alone; so a leak shows even where the layer's own books were tidied up.
//! Unchecked here: memory; tasks and storage handles, which the runner counts itself and reports under this name.

use blkcheck_impl::event::Event;
use blkcheck_impl::jobs::JobStatus;
use blkcheck_impl::types::{JobId, NodeId, RequestId};

use super::mirror::Mirror;
use super::{FinalContent, Oracle, OracleName, View, Violation, violation};
use crate::history::Record;
use crate::scenario::Scenario;

/// See the module.
#[derive(Debug, Default)]
pub struct Leaks {
    mirror: Mirror,
    requests: Vec<(RequestId, NodeId)>,
    jobs: Vec<JobId>,
    main: Vec<&'static str>,
}

impl Leaks {
    fn event(&mut self, event: &Event) -> Result<(), Violation> {
        match event {
            Event::RequestBegin { request, node, .. } => self.requests.push((*request, *node)),
            Event::RequestEnd { request, .. } => match self.requests.iter().rposition(|r| r.0 == *request) {
                Some(i) => {
                    self.requests.swap_remove(i);
                }
                None => {
                    return Err(wrong(
                        format!("request {request:?} ends but is not in flight"),
                        Vec::new(),
                    ));
                }
            },
            Event::NodeRemoved { node } => {
                if let Some((request, _)) = self.requests.iter().find(|r| r.1 == *node) {
                    let message = format!(
                        "node '{}' is closed while {request:?} is in flight on it",
                        self.mirror.name(*node)
                    );
                    return Err(wrong(message, Vec::new()));
                }
            }
            Event::JobStatus {
                job,
                from: JobStatus::Undefined,
                ..
            } => self.jobs.push(*job),
            Event::JobStatus {
                job,
                to: JobStatus::Null,
                ..
            } => self.jobs.retain(|j| j != job),
            Event::MainBegin { what } => self.main.push(what),
            Event::MainEnd { .. } => {
                self.main.pop();
            }
            _ => {}
        }
        let _ = self.mirror.apply(event);
        Ok(())
    }

    fn in_flight(&self) -> Vec<String> {
        let requests = self
            .requests
            .iter()
            .map(|(r, n)| format!("request {r:?} on node '{}'", self.mirror.name(*n)));
        requests
            .chain(self.main.iter().map(|m| format!("main-context operation {m}")))
            .collect()
    }
}

fn wrong(message: String, evidence: Vec<String>) -> Violation {
    violation(OracleName::Leaks, None, message, evidence)
}

impl Oracle for Leaks {
    fn name(&self) -> OracleName {
        OracleName::Leaks
    }

    fn reset(&mut self, _scenario: &Scenario) {
        self.mirror.reset();
        self.requests.clear();
        self.jobs.clear();
        self.main.clear();
    }

    fn record(&mut self, _view: &View<'_>, record: &Record) -> Result<(), Violation> {
        match record {
            Record::Layer(event) => self.event(event),
            Record::Issued(_) | Record::Ended(..) | Record::Fault(_) | Record::PowerCut { .. } => Ok(()),
        }
    }

    fn quiescent(&mut self, _view: &View<'_>, _contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        let left = self.in_flight();
        if left.is_empty() {
            return Ok(());
        }
        Err(wrong(
            format!(
                "{} operations are still in flight when every actor is done",
                left.len()
            ),
            left,
        ))
    }

    fn closed(&mut self, _view: &View<'_>, _contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        let mut left = self.in_flight();
        left.extend(
            self.mirror
                .nodes()
                .map(|(_, n)| format!("node '{}' ({})", n.name, n.driver)),
        );
        left.extend(self.mirror.edges().map(|(id, _)| self.mirror.describe(id)));
        left.extend(self.jobs.iter().map(|j| format!("job {j:?}")));
        if left.is_empty() {
            return Ok(());
        }
        Err(wrong(
            format!("{} things are left after the layer was shut down", left.len()),
            left,
        ))
    }
}

#[cfg(test)]
mod tests {
    use blkcheck_impl::event::{Parent, ReqKind};
    use blkcheck_impl::types::{EdgeId, ReqFlags, Role};

    use super::super::mirror::tests::chain;
    use super::super::tests::{feed, scenario};
    use super::*;

    fn begin(request: u64, node: u32) -> Event {
        Event::RequestBegin {
            request: RequestId(request),
            node: NodeId(node),
            edge: EdgeId(0),
            kind: ReqKind::Write,
            offset: 0,
            bytes: 64,
            flags: ReqFlags::empty(),
        }
    }

    #[test]
    fn a_tidy_run_passes_and_each_kind_of_leak_is_named() {
        let scenario = scenario();
        let view = View {
            scenario: &scenario,
            now: 0,
            layer: None,
        };
        let mut oracle = Leaks::default();
        oracle.reset(&scenario);
        let mut events = chain();
        events.push(begin(0, 1));
        feed(&mut oracle, events.into_iter().map(Record::Layer)).expect("nothing wrong yet");
        let v = oracle.quiescent(&view, &[]).expect_err("in flight");
        assert_eq!(v.evidence, ["request r0 on node 'top'"]);
        let end = Event::RequestEnd {
            request: RequestId(0),
            node: NodeId(1),
            result: Ok(()),
        };
        feed(&mut oracle, [Record::Layer(end.clone())]).expect("ends");
        assert_eq!(oracle.quiescent(&view, &[]), Ok(()));
        assert_eq!(oracle.closed(&view, &[]).expect_err("open").evidence.len(), 3);
        let cut = Event::EdgeSet {
            edge: EdgeId(0),
            parent: Parent::Node(NodeId(1)),
            role: Role::COW,
            from: Some(NodeId(0)),
            to: None,
        };
        let tidy = [
            cut,
            Event::NodeRemoved { node: NodeId(1) },
            Event::NodeRemoved { node: NodeId(0) },
        ];
        feed(&mut oracle, tidy.into_iter().map(Record::Layer)).expect("closes");
        assert_eq!(oracle.closed(&view, &[]), Ok(()));
        let v = feed(&mut oracle, [Record::Layer(end)]).expect_err("ends twice");
        assert!(v.message.contains("not in flight"));
    }

    #[test]
    fn closing_a_busy_node_is_reported() {
        let mut oracle = Leaks::default();
        oracle.reset(&scenario());
        let mut events = chain();
        events.extend([begin(0, 0), Event::NodeRemoved { node: NodeId(0) }]);
        let v = feed(&mut oracle, events.into_iter().map(Record::Layer)).expect_err("busy");
        assert!(v.message.contains("closed while r0 is in flight"));
    }
}
