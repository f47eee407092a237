//! A frozen link never changes; every freeze is thawed once; what is frozen belongs to somebody.
//!
//! Watches the events only: an `EdgeSet` that moves or cuts a frozen link, a second freeze, a thaw of a free link, a
//! node that dies with a frozen link; and at the end of each main-context operation every frozen link must lie on an
//! unbroken frozen stretch that starts at a copy-on-read node (graph.md S7: the only holder that outlives an
//! operation here).
//! Unchecked: whether a freeze that a job should hold for the moment of a read-only switch is there at all.

use blkcheck_impl::event::Event;

use super::mirror::Mirror;
use super::{Oracle, OracleName, View, Violation, violation};
use crate::history::Record;
use crate::scenario::Scenario;

/// See the module.
#[derive(Debug, Default)]
pub struct Frozen {
    mirror: Mirror,
    held: Vec<bool>,
    frozen: u32,
}

impl Frozen {
    fn event(&mut self, event: &Event) -> Result<(), Violation> {
        match event {
            Event::Frozen { edge } => {
                if self.mirror.edge(*edge).is_some_and(|e| e.frozen) {
                    return Err(self.wrong(
                        event,
                        format!("the {} is frozen twice", self.mirror.describe(*edge)),
                    ));
                }
                if self.mirror.edge(*edge).is_none_or(|e| e.child.is_none()) {
                    return Err(self.wrong(event, format!("{edge:?} is frozen but leads nowhere")));
                }
                self.frozen += 1;
            }
            Event::Unfrozen { edge } => {
                if !self.mirror.edge(*edge).is_some_and(|e| e.frozen) {
                    return Err(self.wrong(
                        event,
                        format!("the {} is thawed but was not frozen", self.mirror.describe(*edge)),
                    ));
                }
                self.frozen -= 1;
            }
            Event::EdgeSet { edge, to, .. } => {
                if let Some(e) = self.mirror.edge(*edge)
                    && e.frozen
                    && e.child != *to
                {
                    let now = to.map_or_else(
                        || "cut".to_owned(),
                        |n| format!("set to node '{}'", self.mirror.name(n)),
                    );
                    return Err(self.wrong(
                        event,
                        format!("the frozen {} is {now}", self.mirror.describe(*edge)),
                    ));
                }
            }
            Event::MainEnd { what } if self.frozen > 0 => {
                if let Some(orphan) = self.orphan() {
                    return Err(self.wrong(
                        event,
                        format!("after {what}, {orphan} is frozen but no copy-on-read node holds it"),
                    ));
                }
            }
            _ => {}
        }
        // A contradiction in the events is the graph oracle's to report.
        let _ = self.mirror.apply(event);
        Ok(())
    }

    /// A frozen link that no copy-on-read node's stretch covers.
    fn orphan(&mut self) -> Option<String> {
        self.held.clear();
        for (id, node) in self.mirror.nodes() {
            if node.driver != "copy-on-read" {
                continue;
            }
            let mut at = id;
            while let Some(edge) = self.mirror.chain_edge(at) {
                let Some(e) = self.mirror.edge(edge) else { break };
                if !e.frozen {
                    break;
                }
                let i = edge.0 as usize;
                if self.held.len() <= i {
                    self.held.resize(i + 1, false);
                }
                self.held[i] = true;
                let Some(next) = e.child else { break };
                at = next;
            }
        }
        let held = |i: u32| self.held.get(i as usize).copied().unwrap_or(false);
        self.mirror
            .edges()
            .find(|(id, e)| e.frozen && !held(id.0))
            .map(|(id, _)| self.mirror.describe(id))
    }

    fn wrong(&self, event: &Event, message: String) -> Violation {
        violation(OracleName::Frozen, None, message, vec![format!("at {event:?}")])
    }
}

impl Oracle for Frozen {
    fn name(&self) -> OracleName {
        OracleName::Frozen
    }

    fn reset(&mut self, _scenario: &Scenario) {
        self.mirror.reset();
        self.frozen = 0;
    }

    fn record(&mut self, _view: &View<'_>, record: &Record) -> Result<(), Violation> {
        match record {
            Record::Layer(event) => self.event(event),
            Record::Issued(_) | Record::Ended(..) | Record::Fault(_) | Record::PowerCut { .. } => Ok(()),
        }
    }

    fn closed(&mut self, _view: &View<'_>, _contents: &[super::FinalContent<'_>]) -> Result<(), Violation> {
        if self.frozen == 0 {
            return Ok(());
        }
        let left: Vec<String> = self
            .mirror
            .edges()
            .filter(|(_, e)| e.frozen)
            .map(|(id, _)| format!("frozen: {}", self.mirror.describe(id)))
            .collect();
        let message = format!(
            "{} links are still frozen after the layer was shut down",
            self.frozen
        );
        Err(violation(OracleName::Frozen, None, message, left))
    }
}

#[cfg(test)]
mod tests {
    use blkcheck_impl::event::Parent;
    use blkcheck_impl::types::{EdgeId, NodeId, Role};

    use super::super::mirror::tests::{added, chain, linked};
    use super::super::tests::{feed, scenario};
    use super::*;

    fn frozen(edge: u32) -> Event {
        Event::Frozen { edge: EdgeId(edge) }
    }
    fn thawed(edge: u32) -> Event {
        Event::Unfrozen { edge: EdgeId(edge) }
    }
    /// chain() under a copy-on-read node (2) through edge 1, both links frozen.
    fn held() -> Vec<Event> {
        let mut events = chain();
        events.push(added(2, "cor", "copy-on-read"));
        events.push(linked(1, Parent::Node(NodeId(2)), Role::FILTERED, 1));
        events.extend([frozen(1), frozen(0)]);
        events
    }

    fn run(events: Vec<Event>) -> Result<(), Violation> {
        let mut oracle = Frozen::default();
        oracle.reset(&scenario());
        feed(&mut oracle, events.into_iter().map(Record::Layer))
    }

    #[test]
    fn a_stretch_under_a_filter_is_fine_until_thawed() {
        let mut events = held();
        events.push(Event::MainEnd { what: "block-stream" });
        events.extend([thawed(1), thawed(0)]);
        events.push(Event::EdgeSet {
            edge: EdgeId(0),
            parent: Parent::Node(NodeId(1)),
            role: Role::COW,
            from: Some(NodeId(0)),
            to: None,
        });
        events.push(Event::MainEnd { what: "job-exit" });
        assert_eq!(run(events), Ok(()));
    }

    #[test]
    fn moving_a_frozen_link_is_reported() {
        let mut events = held();
        let parent = Parent::Node(NodeId(1));
        events.push(Event::EdgeSet {
            edge: EdgeId(0),
            parent,
            role: Role::COW,
            from: Some(NodeId(0)),
            to: None,
        });
        let v = run(events).expect_err("cut while frozen");
        assert_eq!(v.message, "the frozen link from node 'top' to node 'base' is cut");
    }

    #[test]
    fn unbalanced_and_orphaned_freezes_are_reported() {
        let mut events = held();
        events.push(frozen(0));
        assert!(run(events).expect_err("twice").message.contains("frozen twice"));
        let mut events = held();
        events.extend([thawed(0), thawed(0)]);
        assert!(
            run(events)
                .expect_err("thawed twice")
                .message
                .contains("was not frozen")
        );
        let mut events = held();
        events.extend([thawed(1), Event::MainEnd { what: "job-exit" }]);
        assert!(
            run(events)
                .expect_err("orphan")
                .message
                .contains("no copy-on-read node holds it")
        );
    }
}
