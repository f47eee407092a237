//! Copy before write: once a guest's write has reached the source through a copy-before-write filter, the filter copies nothing
//! of that cluster any more, for it would be new data; each cluster is in one hand at a time; what is copied before a write is
//! what a write changes; nobody changes a source between the instant and the moment at which its job's filter is above it; and the
//! backups of one transaction keep one instant.
//!
//! The last of these: a write that comes to the filter of one backup is not in its copy. If the filter of another backup of the
//! transaction comes only after that, a write to its source may have begun when the first one had ended, and is in the copy of that.
//! So nothing may be written through a filter before the last one is there.
//! Watches events: requests that change the source and come through the filter, and the copies that it begins. This tells the
//! cause; what it leads to, content of the target that is not the source's of the instant, is the data oracle's to report, under
//! the same name. Writes that change nothing visible (copy-on-read) do not count.
//! Unchecked: a filter that copies nothing at all (its target's content tells), filters whose snapshot is broken.

use std::collections::{BTreeMap, BTreeSet};

use blkcheck_impl::event::{Event, Parent, ReqKind};
use blkcheck_impl::types::{EdgeId, NodeId, ReqFlags};

use super::mirror::Mirror;
use super::{Oracle, OracleName, View, Violation, violation};
use crate::history::Record;
use crate::scenario::Scenario;

/// One filter.
#[derive(Debug)]
struct Filter {
    source: NodeId,
    cluster: u64,
    /// Clusters that requests above asked to change.
    asked: BTreeSet<u64>,
    /// Clusters that guests wrote to, on the source.
    overwritten: BTreeSet<u64>,
    /// Copies under way: task, clusters.
    copies: BTreeMap<u64, (u64, u64)>,
    broken: bool,
    /// It is a job's, and not above its source yet.
    comes: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct PointInTime {
    mirror: Mirror,
    filters: BTreeMap<NodeId, Filter>,
    /// A command is under way that starts backups.
    starts: bool,
    /// The filters that it has put above their sources.
    came: Vec<NodeId>,
    /// The first of them through which something has been written since.
    passed: Option<NodeId>,
}

impl PointInTime {
    fn event(&mut self, event: &Event) -> Result<(), Violation> {
        match *event {
            Event::CopyBeforeWrite {
                filter,
                source,
                cluster,
                ..
            } => {
                let new = Filter {
                    source,
                    cluster,
                    asked: BTreeSet::new(),
                    overwritten: BTreeSet::new(),
                    copies: BTreeMap::new(),
                    broken: false,
                    comes: self.starts,
                };
                self.filters.insert(filter, new);
            }
            Event::MainBegin { what } => {
                self.starts = matches!(what, "blockdev-backup" | "transaction");
                self.came.clear();
                self.passed = None;
            }
            Event::MainEnd { .. } => {
                self.starts = false;
                self.came.clear();
            }
            Event::FilterInserted { filter, .. } => self.comes(filter)?,
            Event::NodeRemoved { node } => {
                self.filters.remove(&node);
            }
            Event::SnapshotBroken { filter, .. } => {
                if let Some(filter) = self.filters.get_mut(&filter) {
                    filter.broken = true;
                }
            }
            Event::RequestBegin {
                node,
                edge,
                kind: ReqKind::Write | ReqKind::WriteZeroes | ReqKind::Discard,
                offset,
                bytes,
                flags,
                ..
            } if !flags.contains(ReqFlags::WRITE_UNCHANGED) => {
                self.stands_still(node)?;
                if self.came.contains(&node) {
                    self.passed.get_or_insert(node);
                }
                self.changed(node, edge, offset, bytes);
            }
            Event::CopyBegin {
                filter,
                task,
                offset,
                bytes,
                background,
                ..
            } => self.begins(filter, task, (offset, bytes), background)?,
            Event::CopyEnd { filter, task, .. } => {
                if let Some(filter) = self.filters.get_mut(&filter) {
                    filter.copies.remove(&task);
                }
            }
            _ => {}
        }
        // A contradiction in the events is the graph oracle's to report.
        let _ = self.mirror.apply(event);
        Ok(())
    }

    /// A filter is above its source now, as the ones before it in its transaction are: through none of those anything may have been
    /// written.
    fn comes(&mut self, id: NodeId) -> Result<(), Violation> {
        let Some(filter) = self.filters.get_mut(&id) else {
            return Ok(());
        };
        let of_job = std::mem::take(&mut filter.comes);
        if let Some(other) = self.passed.filter(|_| of_job) {
            let (other, name) = (self.mirror.name(other), self.mirror.name(id));
            let message = format!(
                "filter '{name}' comes after a write through filter '{other}' of the same transaction: \
                 their instants differ"
            );
            return Err(violation(OracleName::PointInTime, None, message, Vec::new()));
        }
        if of_job {
            self.came.push(id);
        }
        Ok(())
    }

    /// A node is to change: it is no source whose filter is on its way.
    fn stands_still(&self, node: NodeId) -> Result<(), Violation> {
        let Some((filter, _)) = self.filters.iter().find(|(_, f)| f.source == node && f.comes) else {
            return Ok(());
        };
        let (source, filter) = (self.mirror.name(node), self.mirror.name(*filter));
        let message = format!(
            "node '{source}' changes after the instant that filter '{filter}' keeps, and before it comes"
        );
        Err(violation(OracleName::PointInTime, None, message, Vec::new()))
    }

    /// The bytes of a source change, through its filter; or they are to, above it.
    fn changed(&mut self, node: NodeId, edge: EdgeId, offset: u64, bytes: u64) {
        if let Some(filter) = self.filters.get_mut(&node) {
            let clusters = offset / filter.cluster..(offset + bytes).div_ceil(filter.cluster);
            filter.asked.extend(clusters);
        }
        let Some(Parent::Node(above)) = self.mirror.edge(edge).and_then(|e| e.parent) else {
            return;
        };
        if let Some(filter) = self.filters.get_mut(&above).filter(|f| f.source == node) {
            let clusters = offset / filter.cluster..(offset + bytes).div_ceil(filter.cluster);
            filter.overwritten.extend(clusters);
        }
    }

    fn begins(
        &mut self,
        id: NodeId,
        task: u64,
        (offset, bytes): (u64, u64),
        background: bool,
    ) -> Result<(), Violation> {
        let Some(filter) = self.filters.get_mut(&id) else {
            return Ok(());
        };
        let (first, last) = (offset / filter.cluster, (offset + bytes).div_ceil(filter.cluster));
        let wrong = |what: String| {
            let name = self.mirror.name(id);
            let message = format!("filter '{name}' copies the cluster at {what}");
            Err(violation(OracleName::PointInTime, None, message, Vec::new()))
        };
        if let Some(cluster) = filter
            .overwritten
            .range(first..last)
            .next()
            .filter(|_| !filter.broken)
        {
            return wrong(format!(
                "{:#x}, which a guest has overwritten since",
                cluster * filter.cluster
            ));
        }
        let twice = filter.copies.values().find(|(a, b)| *a < last && first < *b);
        if let Some((other, _)) = twice {
            return wrong(format!(
                "{:#x}, which another copy has in hand",
                other.max(&first) * filter.cluster
            ));
        }
        let unasked = (first..last).find(|cluster| !background && !filter.asked.contains(cluster));
        if let Some(cluster) = unasked {
            return wrong(format!(
                "{:#x} before a write, and nobody has asked to change it",
                cluster * filter.cluster
            ));
        }
        filter.copies.insert(task, (first, last));
        Ok(())
    }
}

impl Oracle for PointInTime {
    fn name(&self) -> OracleName {
        OracleName::PointInTime
    }

    fn reset(&mut self, _scenario: &Scenario) {
        self.mirror.reset();
        self.filters.clear();
        self.starts = false;
        self.came.clear();
        self.passed = None;
    }

    fn record(&mut self, _view: &View<'_>, record: &Record) -> Result<(), Violation> {
        match record {
            Record::Layer(event) => self.event(event),
            Record::Issued(_) | Record::Ended(..) | Record::Fault(_) | Record::PowerCut { .. } => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use blkcheck_impl::types::{RequestId, Role};

    use super::*;
    use crate::oracle::mirror::tests::{added, linked};
    use crate::oracle::tests::feed;

    fn filter() -> Vec<Event> {
        vec![
            added(1, "src", "qcow2"),
            added(2, "cbw", "copy-before-write"),
            added(3, "dst", "qcow2"),
            linked(7, Parent::Node(NodeId(2)), Role::FILTERED, 1),
            Event::CopyBeforeWrite {
                filter: NodeId(2),
                source: NodeId(1),
                target: NodeId(3),
                cluster: 65536,
            },
        ]
    }

    fn write(offset: u64, flags: ReqFlags) -> Event {
        Event::RequestBegin {
            request: RequestId(1),
            node: NodeId(1),
            edge: EdgeId(7),
            kind: ReqKind::Write,
            offset,
            bytes: 512,
            flags,
        }
    }

    fn copy(task: u64, offset: u64) -> Event {
        Event::CopyBegin {
            filter: NodeId(2),
            task,
            offset,
            bytes: 65536,
            zero: false,
            background: true,
        }
    }

    fn verdict(more: Vec<Event>) -> Result<(), Violation> {
        feed(
            &mut PointInTime::default(),
            filter().into_iter().chain(more).map(Record::Layer),
        )
    }

    #[test]
    fn what_was_overwritten_is_not_copied_any_more() {
        verdict(vec![copy(0, 0), write(70_000, ReqFlags::empty())]).unwrap();
        let late = verdict(vec![write(70_000, ReqFlags::empty()), copy(0, 65536)]).unwrap_err();
        assert!(
            late.message.contains("0x10000, which a guest has overwritten"),
            "{late:?}"
        );
        verdict(vec![write(70_000, ReqFlags::WRITE_UNCHANGED), copy(0, 65536)]).unwrap();
        verdict(vec![write(70_000, ReqFlags::empty()), copy(0, 0)]).unwrap();
    }

    #[test]
    fn a_source_stands_still_until_its_filter_is_above_it() {
        let all = |what, inserted: bool| {
            let mut events = filter();
            events.insert(0, Event::MainBegin { what });
            if inserted {
                let (filter, below) = (NodeId(2), NodeId(1));
                events.push(Event::FilterInserted { filter, below });
            }
            events.push(write(0, ReqFlags::empty()));
            feed(&mut PointInTime::default(), events.into_iter().map(Record::Layer))
        };
        let early = all("blockdev-backup", false).unwrap_err();
        assert!(early.message.contains("and before it comes"), "{early:?}");
        all("blockdev-backup", true).unwrap();
        all("blockdev-add", false).unwrap();
    }

    #[test]
    fn backups_of_one_transaction_keep_one_instant() {
        let other = || {
            vec![
                added(4, "src2", "qcow2"),
                added(5, "cbw2", "copy-before-write"),
                Event::CopyBeforeWrite {
                    filter: NodeId(5),
                    source: NodeId(4),
                    target: NodeId(3),
                    cluster: 65536,
                },
            ]
        };
        let inserted = |filter, below| Event::FilterInserted {
            filter: NodeId(filter),
            below: NodeId(below),
        };
        let asked = |flags| Event::RequestBegin {
            request: RequestId(1),
            node: NodeId(2),
            edge: EdgeId(9),
            kind: ReqKind::Write,
            offset: 0,
            bytes: 512,
            flags,
        };
        let begin = |what| Event::MainBegin { what };
        let all = |between: Vec<Event>| {
            let mut events = vec![begin("transaction")];
            events.extend(filter());
            events.push(inserted(2, 1));
            events.extend(between);
            events.extend(other());
            events.push(inserted(5, 4));
            feed(&mut PointInTime::default(), events.into_iter().map(Record::Layer))
        };
        all(Vec::new()).unwrap();
        all(vec![asked(ReqFlags::WRITE_UNCHANGED)]).unwrap();
        let late = all(vec![asked(ReqFlags::empty())]).unwrap_err();
        assert!(late.message.contains("their instants differ"), "{late:?}");
        let two = [asked(ReqFlags::empty()), begin("blockdev-backup")];
        all(two.into()).unwrap();
    }

    #[test]
    fn a_guest_has_copied_only_what_it_changes() {
        let ask = |offset: u64, flags: ReqFlags| Event::RequestBegin {
            request: RequestId(2),
            node: NodeId(2),
            edge: EdgeId(9),
            kind: ReqKind::Write,
            offset,
            bytes: 512,
            flags,
        };
        let copies = || Event::CopyBegin {
            filter: NodeId(2),
            task: 0,
            offset: 65536,
            bytes: 65536,
            zero: false,
            background: false,
        };
        verdict(vec![ask(70_000, ReqFlags::empty()), copies()]).unwrap();
        for asked in [ask(70_000, ReqFlags::WRITE_UNCHANGED), ask(0, ReqFlags::empty())] {
            let unasked = verdict(vec![asked, copies()]).unwrap_err();
            assert!(unasked.message.contains("nobody has asked"), "{unasked:?}");
        }
    }

    #[test]
    fn a_cluster_is_in_one_hand() {
        let twice = verdict(vec![copy(0, 0), copy(1, 0)]).unwrap_err();
        assert!(twice.message.contains("another copy"), "{twice:?}");
        let end = Event::CopyEnd {
            filter: NodeId(2),
            task: 0,
            result: Ok(()),
        };
        verdict(vec![copy(0, 0), end, copy(1, 0)]).unwrap();
    }

    #[test]
    fn a_broken_snapshot_need_not_hold() {
        let broken = Event::SnapshotBroken {
            filter: NodeId(2),
            errno: blkcheck_impl::error::Errno::EIO,
        };
        verdict(vec![broken, write(0, ReqFlags::empty()), copy(0, 0)]).unwrap();
    }
}
