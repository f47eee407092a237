//! What a backup with `bitmap-mode=always` that does not end well owes its bitmap: a mark for every cluster that it was to copy
//! and that nobody has copied.
//!
//! Watches the copies themselves, which the model does not; so this holds also where storage fails.
//! Unchecked: marks too many (what is being copied when the job ends counts as not copied); backups of which it is not known what
//! they were to copy.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::rc::Rc;

use blkcheck_impl::event::Event;
use blkcheck_impl::graph::inspect::BitmapView;
use blkcheck_impl::types::NodeId;
use blkcheck_model::job::{Backup, BitmapMode};

/// A backup under way.
#[derive(Debug)]
struct Copying {
    filter: NodeId,
    job: Rc<str>,
    node: Rc<str>,
    bitmap: Rc<str>,
    cluster: u64,
    length: u64,
    /// Clusters that are still to be copied.
    left: BTreeSet<u64>,
    /// Clusters under way, by task.
    tasks: BTreeMap<u64, Range<u64>>,
}

/// Marks that a bitmap must have the next time that anybody looks.
#[derive(Debug)]
struct Due {
    node: Rc<str>,
    bitmap: Rc<str>,
    cluster: u64,
    length: u64,
    clusters: BTreeSet<u64>,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Owed {
    copying: Vec<Copying>,
    due: Vec<Due>,
}

impl Owed {
    /// A backup of `node` begins.
    pub(super) fn begins(&mut self, filter: NodeId, job: &Rc<str>, node: &Rc<str>, backup: &Backup) {
        if let (Some((bitmap, BitmapMode::Always)), Some(initial)) = (&backup.bitmap, &backup.initial) {
            self.copying.push(Copying {
                filter,
                job: Rc::clone(job),
                node: Rc::clone(node),
                bitmap: Rc::clone(bitmap),
                cluster: backup.cluster,
                length: backup.length,
                left: initial.iter().flatten().collect(),
                tasks: BTreeMap::new(),
            });
        }
    }

    /// Follows the copies.
    pub(super) fn event(&mut self, event: &Event) {
        match *event {
            Event::CopyBegin {
                filter,
                task,
                offset,
                bytes,
                ..
            } => {
                if let Some(copying) = self.of(filter) {
                    copying.tasks.insert(task, copying.clusters(offset, bytes));
                }
            }
            Event::CopyEnd { filter, task, result } => {
                if let Some(copying) = self.of(filter)
                    && let Some(clusters) = copying.tasks.remove(&task)
                    && result.is_ok()
                {
                    copying.left.retain(|cluster| !clusters.contains(cluster));
                }
            }
            Event::CopySkipped {
                filter,
                offset,
                bytes,
            } => {
                if let Some(copying) = self.of(filter) {
                    let clusters = copying.clusters(offset, bytes);
                    copying.left.retain(|cluster| !clusters.contains(cluster));
                }
            }
            Event::NodeRemoved { node } => self.copying.retain(|c| c.filter != node),
            _ => {}
        }
    }

    fn of(&mut self, filter: NodeId) -> Option<&mut Copying> {
        self.copying.iter_mut().find(|c| c.filter == filter)
    }

    /// A job is over.
    pub(super) fn ends(&mut self, job: &str, well: bool) {
        for ended in self.copying.extract_if(.., |c| *c.job == *job) {
            if !well {
                self.due.push(Due {
                    node: ended.node,
                    bitmap: ended.bitmap,
                    cluster: ended.cluster,
                    length: ended.length,
                    clusters: ended.left,
                });
            }
        }
    }

    /// Nothing is due.
    pub(super) fn is_even(&self) -> bool {
        self.due.is_empty()
    }

    /// Looks once, before any command can have changed the bitmap: what is missing of (node, bitmap).
    pub(super) fn missing<'a>(
        &mut self,
        find: impl Fn(&str, &str) -> Option<&'a BitmapView>,
    ) -> Option<(Rc<str>, Rc<str>, u64)> {
        self.due.drain(..).find_map(|due| {
            let found = find(&due.node, &due.bitmap)?;
            let marked = |at: u64| {
                let bit = at / found.granularity;
                let byte = usize::try_from(bit / 8)
                    .ok()
                    .and_then(|byte| found.bits.get(byte));
                byte.is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
            };
            let bytes = |cluster: &u64| {
                let start = cluster * due.cluster;
                start..(start + due.cluster).min(due.length)
            };
            let step = usize::try_from(found.granularity).ok()?;
            let lacks = due
                .clusters
                .iter()
                .flat_map(|c| bytes(c).step_by(step))
                .find(|at| !marked(*at));
            lacks.map(|at| (due.node, due.bitmap, at))
        })
    }
}

impl Copying {
    fn clusters(&self, offset: u64, bytes: u64) -> Range<u64> {
        offset / self.cluster..(offset + bytes).div_ceil(self.cluster)
    }
}

#[cfg(test)]
mod tests {
    use blkcheck_impl::error::Errno;
    use blkcheck_model::bitmap::Spans;
    use blkcheck_model::job::Sync;

    use super::*;

    const FILTER: NodeId = NodeId(7);

    fn backup(mode: BitmapMode) -> Backup {
        let mut initial = Spans::default();
        initial.insert(0..3);
        Backup {
            source: blkcheck_model::NodeId(1),
            target: blkcheck_model::NodeId(2),
            filter: None,
            cluster: 65536,
            length: 2 * 65536 + 512,
            reach: 2 * 65536 + 512,
            sync: Sync::Bitmap,
            initial: Some(initial),
            bitmap: Some((Rc::from("b"), mode)),
        }
    }

    fn begin(task: u64, offset: u64) -> Event {
        Event::CopyBegin {
            filter: FILTER,
            task,
            offset,
            bytes: 65536,
            zero: false,
            background: true,
        }
    }

    fn end(task: u64, result: Result<(), Errno>) -> Event {
        Event::CopyEnd {
            filter: FILTER,
            task,
            result,
        }
    }

    fn view(bits: u8) -> BitmapView {
        BitmapView {
            name: Rc::from("b"),
            granularity: 65536,
            enabled: true,
            busy: false,
            persistent: false,
            inconsistent: false,
            bits: vec![bits, 0, 0, 0, 0, 0, 0, 0],
        }
    }

    /// The first cluster is copied, the second one fails, the third one is never begun.
    fn missing(mode: BitmapMode, well: bool, bits: u8) -> Option<u64> {
        let mut owed = Owed::default();
        owed.begins(FILTER, &Rc::from("j"), &Rc::from("n"), &backup(mode));
        let copies = [
            begin(0, 0),
            begin(1, 65536),
            end(1, Err(Errno::EIO)),
            end(0, Ok(())),
        ];
        copies.iter().for_each(|event| owed.event(event));
        owed.ends("j", well);
        let seen = view(bits);
        let missing = owed.missing(|node, bitmap| (node == "n" && bitmap == "b").then_some(&seen));
        assert!(owed.missing(|_, _| Some(&seen)).is_none(), "asked for once");
        missing.map(|(_, _, at)| at)
    }

    #[test]
    fn what_was_not_copied_is_marked_in_the_end() {
        assert_eq!(missing(BitmapMode::Always, false, 0b110), None);
        assert_eq!(
            missing(BitmapMode::Always, false, 0b111),
            None,
            "more is not judged"
        );
        assert_eq!(missing(BitmapMode::Always, false, 0b100), Some(65536));
        assert_eq!(missing(BitmapMode::Always, false, 0b010), Some(2 * 65536));
        assert_eq!(missing(BitmapMode::Always, true, 0), None, "all is copied");
        assert_eq!(missing(BitmapMode::OnSuccess, false, 0), None, "the model knows");
    }
}
