//! Permissions: every pair of parents agrees whenever no main-context operation is under way, the masks are the
//! model's, and every write had its permission on the edge through which it came.
//!
//! Reads need no permission (graph.md 2.12). A write or discard needs WRITE, or WRITE_UNCHANGED if the request says that
//! it changes nothing. That masks equal the model's is part of the settled comparison in `graph`.
//! Unchecked: RESIZE for requests beyond the end (events carry no length); copy-on-read's own write, which goes
//! to the driver without passing an edge.

use blkcheck_impl::event::{Event, ReqKind};
use blkcheck_impl::types::{Perm, ReqFlags};

use super::mirror::Mirror;
use super::{FinalContent, Oracle, OracleName, View, Violation, violation};
use crate::history::Record;
use crate::scenario::Scenario;

/// See the module.
#[derive(Debug, Default)]
pub struct Permissions {
    mirror: Mirror,
    main: u32,
    changed: bool,
}

impl Permissions {
    fn event(&mut self, event: &Event) -> Result<(), Violation> {
        let _ = self.mirror.apply(event);
        match event {
            Event::MainBegin { .. } => self.main += 1,
            Event::MainEnd { what } => {
                self.main = self.main.saturating_sub(1);
                if self.main == 0 && std::mem::take(&mut self.changed) {
                    return self.agree(what);
                }
            }
            Event::EdgeSet { .. } | Event::EdgePerms { .. } => {
                self.changed = true;
                // A job's edges may go outside; then, too, the graph is consistent after each of its steps, but
                // not between them.
            }
            Event::RequestBegin {
                edge,
                node,
                kind,
                offset,
                bytes,
                flags,
                ..
            } => {
                let Some(e) = self.mirror.edge(*edge) else {
                    return Ok(());
                };
                let needs = match kind {
                    ReqKind::Read | ReqKind::Flush => return Ok(()),
                    ReqKind::Truncate => Perm::RESIZE,
                    ReqKind::Write | ReqKind::WriteZeroes | ReqKind::Discard
                        if flags.contains(ReqFlags::WRITE_UNCHANGED) =>
                    {
                        Perm::WRITE | Perm::WRITE_UNCHANGED
                    }
                    ReqKind::Write | ReqKind::WriteZeroes | ReqKind::Discard => Perm::WRITE,
                };
                if e.child != Some(*node) {
                    let message = format!(
                        "{kind:?} {offset:#x}+{bytes:#x} begins on node '{}' through the {}",
                        self.mirror.name(*node),
                        self.mirror.describe(*edge)
                    );
                    return Err(violation(OracleName::Permissions, None, message, Vec::new()));
                }
                if !e.perm.intersects(needs) {
                    let message = format!(
                        "{kind:?} {offset:#x}+{bytes:#x} through the {} without permission '{}'",
                        self.mirror.describe(*edge),
                        needs.names()
                    );
                    let has = format!("the edge has: '{}'", e.perm.names());
                    return Err(violation(OracleName::Permissions, None, message, vec![has]));
                }
            }
            _ => {}
        }
        Ok(())
    }

    fn agree(&self, what: &str) -> Result<(), Violation> {
        for (id, node) in self.mirror.nodes() {
            for (i, &a) in node.parents.iter().enumerate() {
                for &b in &node.parents[i + 1..] {
                    self.pair(what, id, a, b)?;
                    self.pair(what, id, b, a)?;
                }
            }
        }
        Ok(())
    }

    fn pair(
        &self,
        what: &str,
        node: blkcheck_impl::types::NodeId,
        a: blkcheck_impl::types::EdgeId,
        b: blkcheck_impl::types::EdgeId,
    ) -> Result<(), Violation> {
        let (Some(x), Some(y)) = (self.mirror.edge(a), self.mirror.edge(b)) else {
            return Ok(());
        };
        let denied = y.perm - x.shared;
        if denied.is_empty() {
            return Ok(());
        }
        let message = format!(
            "after {what}, two parents of node '{}' disagree about '{}'",
            self.mirror.name(node),
            denied.names()
        );
        let evidence = vec![
            format!(
                "required by the {}: '{}'",
                self.mirror.describe(b),
                y.perm.names()
            ),
            format!(
                "shared by the {}: '{}'",
                self.mirror.describe(a),
                x.shared.names()
            ),
        ];
        Err(violation(OracleName::Permissions, None, message, evidence))
    }
}

impl Oracle for Permissions {
    fn name(&self) -> OracleName {
        OracleName::Permissions
    }

    fn reset(&mut self, _scenario: &Scenario) {
        self.mirror.reset();
        self.main = 0;
        self.changed = false;
    }

    fn record(&mut self, _view: &View<'_>, record: &Record) -> Result<(), Violation> {
        match record {
            Record::Layer(event) => self.event(event),
            Record::Issued(_) | Record::Ended(..) | Record::Fault(_) | Record::PowerCut { .. } => Ok(()),
        }
    }

    fn quiescent(&mut self, _view: &View<'_>, _contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        self.agree("the last step")
    }
}

#[cfg(test)]
mod tests {
    use blkcheck_impl::event::Parent;
    use blkcheck_impl::types::{BackendId, EdgeId, NodeId, RequestId, Role};

    use super::super::mirror::tests::{chain, linked};
    use super::super::tests::{feed, scenario};
    use super::*;

    fn run(perms: &[(u32, Perm, Perm)], more: Vec<Event>) -> Result<(), Violation> {
        let mut oracle = Permissions::default();
        oracle.reset(&scenario());
        let mut events = chain();
        events.insert(0, Event::MainBegin { what: "blockdev-add" });
        events.push(linked(1, Parent::Backend(BackendId(0)), Role::FILTERED, 0));
        for &(edge, perm, shared) in perms {
            events.push(Event::EdgePerms {
                edge: EdgeId(edge),
                perm,
                shared,
            });
        }
        events.push(Event::MainEnd { what: "blockdev-add" });
        events.extend(more);
        feed(&mut oracle, events.into_iter().map(Record::Layer))
    }

    fn write(flags: ReqFlags) -> Event {
        Event::RequestBegin {
            request: RequestId(0),
            node: NodeId(0),
            edge: EdgeId(1),
            kind: ReqKind::Write,
            offset: 0,
            bytes: 64,
            flags,
        }
    }

    #[test]
    fn parents_must_agree_in_both_directions() {
        let rw = Perm::CONSISTENT_READ | Perm::WRITE;
        assert_eq!(
            run(
                &[(0, Perm::CONSISTENT_READ, Perm::all()), (1, rw, Perm::all())],
                Vec::new()
            ),
            Ok(())
        );
        let v = run(
            &[(0, rw, Perm::CONSISTENT_READ), (1, rw, Perm::all())],
            Vec::new(),
        )
        .expect_err("conflict");
        assert_eq!(
            v.message,
            "after blockdev-add, two parents of node 'base' disagree about 'write'"
        );
    }

    #[test]
    fn a_write_needs_its_permission() {
        let wu = [(1, Perm::WRITE_UNCHANGED, Perm::all())];
        assert_eq!(run(&wu, vec![write(ReqFlags::WRITE_UNCHANGED)]), Ok(()));
        assert!(
            run(&wu, vec![write(ReqFlags::empty())])
                .expect_err("no W")
                .message
                .contains("without permission 'write'")
        );
        let none = [(1, Perm::CONSISTENT_READ, Perm::all())];
        assert!(run(&none, vec![write(ReqFlags::WRITE_UNCHANGED)]).is_err());
    }
}
