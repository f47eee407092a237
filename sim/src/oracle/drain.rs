//! Drained means drained (graph.md 5).
//!
//! Between `Drained(node)` and the `DrainEnd` that closes the section: no backend above the node accepts or resumes a
//! request, and outside main-context operations (which may flush and write headers inside their own sections) no
//! request at all begins on the node or on anything above it. At `Drained(node)` itself nothing may be in flight on
//! the node, on anything above it, or in a backend above it. Sections nest; begins and ends balance.
//! Throttle filters have rules of their own (`throttled`).
//! Unchecked: parent counters (the graph oracle recomputes them), requests of targets that tell no events, and a request
//! that a main-context operation wrongly starts inside somebody else's section.

use blkcheck_impl::event::{Event, Parent};
use blkcheck_impl::types::{BackendId, NodeId, RequestId};

use super::mirror::Mirror;
use super::throttled::Throttled;
use super::{FinalContent, Oracle, OracleName, View, Violation, violation};
use crate::history::Record;
use crate::scenario::Scenario;

/// What is known of one node.
#[derive(Clone, Copy, Debug, Default)]
struct Node {
    /// Sections begun and not ended.
    begun: u32,
    /// Of these, those that returned.
    drained: u32,
    /// Requests in flight.
    requests: u32,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Drain {
    mirror: Mirror,
    nodes: Vec<Node>,
    /// In flight per backend.
    backends: Vec<i32>,
    /// Live requests, for evidence.
    live: Vec<(RequestId, NodeId)>,
    /// Sum of `drained`: most events need no further look while it is 0.
    sections: u32,
    main: u32,
    throttled: Throttled,
}

impl Drain {
    fn node(&mut self, node: NodeId) -> &mut Node {
        let i = node.0 as usize;
        if self.nodes.len() <= i {
            self.nodes.resize(i + 1, Node::default());
        }
        &mut self.nodes[i]
    }

    fn backend(&mut self, backend: BackendId) -> &mut i32 {
        let i = backend.0 as usize;
        if self.backends.len() <= i {
            self.backends.resize(i + 1, 0);
        }
        &mut self.backends[i]
    }

    /// A drained node at or below `above`.
    fn section_below(&mut self, above: NodeId) -> Option<NodeId> {
        for i in 0..u32::try_from(self.nodes.len()).expect("dense ids") {
            if self.nodes[i as usize].drained > 0 && self.mirror.reaches(above, NodeId(i)) {
                return Some(NodeId(i));
            }
        }
        None
    }

    fn event(&mut self, event: &Event) -> Result<(), Violation> {
        match event {
            Event::MainBegin { .. } => self.main += 1,
            Event::MainEnd { .. } => self.main = self.main.saturating_sub(1),
            Event::DrainBegin { node } => self.node(*node).begun += 1,
            // Whoever drains a node that is closed meanwhile has nothing to hold any more.
            Event::Drained { node } | Event::DrainEnd { node }
                if self.mirror.node(*node).is_some_and(|n| !n.live) => {}
            Event::Drained { node } => return self.drained(*node),
            Event::DrainEnd { node } => return self.ended(*node),
            Event::BackendBegin { backend } => {
                *self.backend(*backend) += 1;
                return self.backend_starts(*backend, "accepts");
            }
            Event::BackendResumed { backend } => return self.backend_starts(*backend, "resumes"),
            Event::BackendEnd { backend } => *self.backend(*backend) -= 1,
            Event::RequestBegin {
                request,
                node,
                kind,
                offset,
                bytes,
                ..
            } => {
                self.node(*node).requests += 1;
                self.live.push((*request, *node));
                if self.sections > 0
                    && self.main == 0
                    && let Some(below) = self.section_below(*node)
                {
                    let (name, below) = (self.mirror.name(*node), self.mirror.name(below));
                    let message = format!(
                        "{kind:?} {offset:#x}+{bytes:#x} begins on node '{name}' while node '{below}' is drained"
                    );
                    return Err(self.wrong(message, Vec::new()));
                }
            }
            Event::RequestEnd { request, node, .. } => {
                let n = self.node(*node);
                n.requests = n.requests.saturating_sub(1);
                if let Some(i) = self.live.iter().rposition(|l| l.0 == *request) {
                    self.live.swap_remove(i);
                }
            }
            // The sections of a node that is closed die with it.
            Event::NodeRemoved { node } => {
                let gone = std::mem::take(self.node(*node));
                self.sections -= gone.drained;
            }
            _ => {}
        }
        let _ = self.mirror.apply(event);
        Ok(())
    }

    fn backend_starts(&mut self, backend: BackendId, what: &str) -> Result<(), Violation> {
        if self.sections == 0 {
            return Ok(());
        }
        let Some(root) = self.mirror.root_of(backend) else {
            return Ok(());
        };
        let Some(below) = self.section_below(root) else {
            return Ok(());
        };
        let (root, below) = (self.mirror.name(root), self.mirror.name(below));
        let message = format!(
            "the backend {backend:?} on node '{root}' {what} a request while node '{below}' is drained"
        );
        Err(self.wrong(message, Vec::new()))
    }

    fn drained(&mut self, node: NodeId) -> Result<(), Violation> {
        let n = self.node(node);
        if n.drained >= n.begun {
            let message = format!(
                "a drained section of node '{}' returns that nobody began",
                self.mirror.name(node)
            );
            return Err(self.wrong(message, Vec::new()));
        }
        n.drained += 1;
        self.sections += 1;
        let (nodes, backends) = (
            std::mem::take(&mut self.nodes),
            std::mem::take(&mut self.backends),
        );
        let mut busy = None;
        self.mirror.up(node, |mirror, above| {
            let requests = nodes.get(above.0 as usize).map_or(0, |n| n.requests);
            if requests > 0 {
                busy = Some(format!(
                    "{requests} requests are in flight on node '{}'",
                    mirror.name(above)
                ));
                return false;
            }
            for &edge in mirror.node(above).map_or(&[][..], |n| &n.parents) {
                if let Some(Parent::Backend(b)) = mirror.edge(edge).and_then(|e| e.parent)
                    && backends.get(b.0 as usize).is_some_and(|&n| n > 0)
                {
                    busy = Some(format!(
                        "{b:?} on node '{}' has requests in flight",
                        mirror.name(above)
                    ));
                    return false;
                }
            }
            true
        });
        (self.nodes, self.backends) = (nodes, backends);
        let Some(busy) = busy else { return Ok(()) };
        let live = self
            .live
            .iter()
            .map(|(r, n)| format!("in flight: {r:?} on node '{}'", self.mirror.name(*n)))
            .collect();
        let message = format!(
            "drained-begin of node '{}' returns while {busy}",
            self.mirror.name(node)
        );
        Err(self.wrong(message, live))
    }

    fn ended(&mut self, node: NodeId) -> Result<(), Violation> {
        let n = self.node(node);
        if n.begun == 0 {
            let message = format!(
                "a drained section of node '{}' ends that nobody began",
                self.mirror.name(node)
            );
            return Err(self.wrong(message, Vec::new()));
        }
        n.begun -= 1;
        if n.drained > 0 {
            n.drained -= 1;
            self.sections -= 1;
        }
        Ok(())
    }

    fn wrong(&self, message: String, evidence: Vec<String>) -> Violation {
        violation(OracleName::Drain, None, message, evidence)
    }
}

impl Oracle for Drain {
    fn name(&self) -> OracleName {
        OracleName::Drain
    }

    fn reset(&mut self, _scenario: &Scenario) {
        self.mirror.reset();
        self.nodes.clear();
        self.backends.clear();
        self.live.clear();
        self.sections = 0;
        self.main = 0;
        self.throttled.reset();
    }

    fn record(&mut self, _view: &View<'_>, record: &Record) -> Result<(), Violation> {
        match record {
            Record::Layer(event) => {
                self.throttled.event(event)?;
                self.event(event)
            }
            Record::Issued(_) | Record::Ended(..) | Record::Fault(_) | Record::PowerCut { .. } => Ok(()),
        }
    }

    fn only_time(&mut self) -> Result<(), Violation> {
        self.throttled.only_time()
    }

    fn closed(&mut self, _view: &View<'_>, _contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        match self.nodes.iter().zip(0..).find(|(n, _)| n.begun > 0) {
            None => Ok(()),
            Some((n, i)) => {
                let message = format!(
                    "{} drained sections of node '{}' never ended",
                    n.begun,
                    self.mirror.name(NodeId(i))
                );
                Err(self.wrong(message, Vec::new()))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use blkcheck_impl::event::ReqKind;
    use blkcheck_impl::types::{EdgeId, ReqFlags, Role};

    use super::super::mirror::tests::{chain, linked};
    use super::super::tests::{feed, scenario};
    use super::*;

    const BASE: NodeId = NodeId(0);
    const TOP: NodeId = NodeId(1);
    const GUEST: BackendId = BackendId(0);

    fn begin(request: u64, node: NodeId) -> Event {
        Event::RequestBegin {
            request: RequestId(request),
            node,
            edge: EdgeId(1),
            kind: ReqKind::Read,
            offset: 0,
            bytes: 64,
            flags: ReqFlags::empty(),
        }
    }
    fn end(request: u64, node: NodeId) -> Event {
        Event::RequestEnd {
            request: RequestId(request),
            node,
            result: Ok(()),
        }
    }

    /// chain() with a guest on top.
    fn run(events: &[Event]) -> Result<(), Violation> {
        let mut oracle = Drain::default();
        oracle.reset(&scenario());
        let mut all = chain();
        all.push(linked(1, Parent::Backend(GUEST), Role::FILTERED, 1));
        all.extend_from_slice(events);
        feed(&mut oracle, all.into_iter().map(Record::Layer))
    }

    #[test]
    fn an_honest_nested_section_passes() {
        let events = [
            Event::BackendBegin { backend: GUEST },
            begin(0, TOP),
            Event::DrainBegin { node: BASE },
            Event::DrainBegin { node: TOP },
            end(0, TOP),
            Event::BackendEnd { backend: GUEST },
            Event::Drained { node: TOP },
            Event::Drained { node: BASE },
            Event::BackendQueued { backend: GUEST },
            Event::DrainEnd { node: TOP },
            Event::DrainEnd { node: BASE },
            Event::BackendResumed { backend: GUEST },
            Event::BackendBegin { backend: GUEST },
            begin(1, TOP),
        ];
        assert_eq!(run(&events), Ok(()));
    }

    #[test]
    fn returning_with_a_request_in_flight_above_is_reported() {
        let events = [
            begin(0, TOP),
            Event::DrainBegin { node: BASE },
            Event::Drained { node: BASE },
        ];
        let v = run(&events).expect_err("busy");
        assert_eq!(
            v.message,
            "drained-begin of node 'base' returns while 1 requests are in flight on node 'top'"
        );
        assert_eq!(v.evidence, ["in flight: r0 on node 'top'"]);
    }

    #[test]
    fn starting_inside_a_section_is_reported_also_after_an_inner_one_ended() {
        let mut events = vec![
            Event::DrainBegin { node: BASE },
            Event::Drained { node: BASE },
            Event::DrainBegin { node: TOP },
            Event::Drained { node: TOP },
            Event::DrainEnd { node: TOP },
        ];
        assert_eq!(run(&events), Ok(()));
        events.push(Event::BackendBegin { backend: GUEST });
        assert!(
            run(&events)
                .expect_err("accepted")
                .message
                .contains("accepts a request while node 'base' is drained")
        );
        events.pop();
        events.push(begin(0, TOP));
        assert!(
            run(&events)
                .expect_err("request")
                .message
                .contains("begins on node 'top'")
        );
    }

    #[test]
    fn an_end_without_a_begin_is_reported() {
        let v = run(&[Event::DrainEnd { node: TOP }]).expect_err("unbalanced");
        assert!(v.message.contains("that nobody began"));
    }
}
