//! A drained throttle filter holds nothing back; a part of the `drain` oracle.
//!
//! From `DrainBegin` of a filter, or of a node below it, to the end of the section: no request begins to wait in the
//! filter's group, and when nothing but time can go on, none waits there. (Requests that were let go may still have to be
//! scheduled, so that they are waiting is no fault as long as something else can run.)
//! Unchecked: whether limits are kept, which the events do not tell (unit tests of the buckets do); a section that a change of
//! the graph makes by itself, which is not announced.

use blkcheck_impl::event::Event;
use blkcheck_impl::types::NodeId;

use super::mirror::Mirror;
use super::{OracleName, Violation, violation};

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Throttled {
    mirror: Mirror,
    /// Open sections.
    sections: Vec<NodeId>,
    /// The filter of each request that waits.
    waiting: Vec<NodeId>,
}

impl Throttled {
    /// The node of a section that the filter belongs to.
    fn drained(&mut self, filter: NodeId) -> Option<NodeId> {
        let sections = &self.sections;
        let mirror = &mut self.mirror;
        sections
            .iter()
            .copied()
            .find(|below| mirror.reaches(filter, *below))
    }

    fn held_back(&mut self, filter: NodeId, what: &str) -> Result<(), Violation> {
        let Some(below) = self.drained(filter) else {
            return Ok(());
        };
        let (filter, below) = (self.mirror.name(filter), self.mirror.name(below));
        let message = format!("the throttle filter '{filter}' {what} although node '{below}' is drained");
        Err(violation(OracleName::Drain, None, message, Vec::new()))
    }

    pub(super) fn event(&mut self, event: &Event) -> Result<(), Violation> {
        match event {
            Event::DrainBegin { node } => self.sections.push(*node),
            Event::DrainEnd { node } => {
                if let Some(at) = self.sections.iter().rposition(|section| section == node) {
                    self.sections.swap_remove(at);
                }
            }
            Event::NodeRemoved { node } => self.sections.retain(|section| section != node),
            Event::ThrottleQueued { node, .. } => {
                self.waiting.push(*node);
                return self.held_back(*node, "makes a request wait");
            }
            Event::ThrottleResumed { node, .. } => {
                if let Some(at) = self.waiting.iter().position(|filter| filter == node) {
                    self.waiting.swap_remove(at);
                }
            }
            _ => {}
        }
        // Contradictions are the graph oracle's to report.
        let _ = self.mirror.apply(event);
        Ok(())
    }

    pub(super) fn reset(&mut self) {
        self.mirror.reset();
        self.sections.clear();
        self.waiting.clear();
    }

    /// Nothing can go on before time passes.
    pub(super) fn only_time(&mut self) -> Result<(), Violation> {
        if self.sections.is_empty() {
            return Ok(());
        }
        for at in 0..self.waiting.len() {
            self.held_back(self.waiting[at], "keeps requests waiting for the clock")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::mirror::tests::chain;
    use super::*;

    const BASE: NodeId = NodeId(0);
    const TOP: NodeId = NodeId(1);

    fn run(events: &[Event]) -> Throttled {
        let mut oracle = Throttled::default();
        for event in chain().iter().chain(events) {
            assert_eq!(oracle.event(event), Ok(()));
        }
        oracle
    }

    fn queued(node: NodeId) -> Event {
        Event::ThrottleQueued {
            node,
            group: "g".into(),
        }
    }

    #[test]
    fn what_was_let_go_in_time_passes() {
        let go = Event::ThrottleResumed {
            node: TOP,
            drained: true,
        };
        let mut oracle = run(&[queued(TOP), Event::DrainBegin { node: BASE }, go]);
        assert_eq!(oracle.only_time(), Ok(()));
        let mut above = run(&[queued(BASE), Event::DrainBegin { node: TOP }]);
        assert_eq!(
            above.only_time(),
            Ok(()),
            "a section of a node above is none of its own"
        );
        let mut over = run(&[
            Event::DrainBegin { node: BASE },
            Event::DrainEnd { node: BASE },
            queued(TOP),
        ]);
        assert_eq!(over.only_time(), Ok(()));
    }

    #[test]
    fn waiting_for_the_clock_in_a_section_is_reported() {
        let mut oracle = run(&[queued(TOP), Event::DrainBegin { node: BASE }]);
        let verdict = oracle.only_time().expect_err("held back");
        assert_eq!(
            verdict.message,
            "the throttle filter 'top' keeps requests waiting for the clock although node 'base' is drained"
        );
    }

    #[test]
    fn a_new_wait_in_a_section_is_reported() {
        let mut oracle = run(&[Event::DrainBegin { node: BASE }]);
        let verdict = oracle.event(&queued(TOP)).expect_err("waits");
        assert!(verdict.message.contains("makes a request wait"), "{verdict:?}");
    }
}
