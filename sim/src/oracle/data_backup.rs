//! What backups put into their targets, and what snapshots behind copy-before-write filters show: the source as it was at one
//! instant, and nothing that was written to it later.
//!
//! The instant is when the filter comes above the drained source. From then on a grain of the target that is to be copied may
//! show what it did or what the source held at the instant; once the job has ended well it shows the latter. A target above its
//! source (fleecing) shows the latter from the first moment on, as long as the job is there: what is not copied yet is below.
//! What is to be copied: everything, what the source's own layer holds, or what a bitmap marks, by `sync`.
//! A snapshot node never shows anything else, and says that it cannot rather than that.
//! Unchecked: how much of a failed backup is in the target; sources of which nothing can be said.

use blkcheck_model::register::{Effect, OpId, Value};
use blkcheck_model::{Driver, NodeId, World};

use super::grains::{content_text, history, seen, texts, torn_between_writes};
use super::{Data, Disk, FinalContent, OracleName, Seen, View, Violation, index, value_text, violation};
use crate::history::{Outcome, StepId};
use crate::oracle::bottom::Bottom;
use crate::scenario::{GuestOp, Range, Scenario};

/// Whether a backup copies a grain.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Copied {
    /// Before the job ends well, or a guest writes there.
    Surely,
    /// Before a guest writes there, else not.
    WhenWritten,
    /// One cannot tell.
    Perhaps,
    /// Never.
    Not,
}

/// A backup under way.
#[derive(Debug)]
pub(super) struct Backup {
    /// The job; none where somebody opened the filter.
    id: Option<std::rc::Rc<str>>,
    filter: NodeId,
    source: usize,
    target: usize,
    /// Per grain: what the source may have held at the instant, and whether it is copied.
    grains: Vec<(Vec<Value>, Copied)>,
    /// Per grain: the copy, as a write.
    copies: Vec<Option<OpId>>,
}

/// What a snapshot node shows.
#[derive(Debug)]
pub(super) struct Snapshot {
    filter: NodeId,
    source: usize,
    /// Per grain: what the source may have held at the instant.
    grains: Vec<Vec<Value>>,
}

/// A read of a snapshot under way.
#[derive(Clone, Copy, Debug)]
pub(super) struct Look {
    step: StepId,
    filter: NodeId,
    range: Range,
}

/// What copies are under way or kept.
#[derive(Debug, Default)]
pub(super) struct Copies {
    backups: Vec<Backup>,
    snapshots: Vec<Snapshot>,
    looks: Vec<Look>,
}

impl Data {
    /// What every grain of a disk may hold now; nothing where nothing can be said.
    fn instant(&self, disk: usize) -> Option<Vec<Vec<Value>>> {
        let d = self.disks[disk].as_ref().filter(|d| !d.unknown)?;
        let now = |g: usize| {
            let at = g as u64 * self.grain;
            let vague = d.loose[g] || d.cuts.iter().any(|c| (at..at + self.grain).contains(c));
            // An empty list passes everything.
            if vague {
                Vec::new()
            } else {
                d.registers.possible(g)
            }
        };
        Some((0..d.initial.len()).map(now).collect())
    }

    /// A backup's filter has come above its source, which is drained. `copied`: whether a range of the source is copied.
    pub(crate) fn backup_begins(
        &mut self,
        (id, filter): (Option<&std::rc::Rc<str>>, NodeId),
        (source, target): (Option<usize>, Option<usize>),
        bottom: &Bottom,
        copied: impl Fn(u64, u64) -> Copied,
    ) {
        let Some(target) = target else { return };
        // What is above a target changes with it, nobody knows when.
        for d in self.disks.iter_mut().flatten() {
            d.unknown |= d.chain.contains(&target);
        }
        let instant = source.and_then(|source| self.instant(source));
        let Some(instant) = instant.filter(|_| source != Some(target)) else {
            if let Some(d) = &mut self.disks[target] {
                d.unknown = true;
            }
            return;
        };
        let source = source.expect("its instant is known");
        let grains: Vec<(Vec<Value>, Copied)> = (0u64..)
            .zip(instant)
            .map(|(g, values)| (values, copied(g * self.grain, (g + 1) * self.grain)))
            .collect();
        let written: Vec<(usize, Value)> = self.written(source);
        let mut copies = Vec::new();
        if let Some(d) = self.disks[target].as_mut() {
            d.former.extend(written);
            d.target = true;
            let fleecing = d.chain.first() == Some(&source);
            // What is in between hides it, or not: nobody follows that.
            d.unknown |= d.chain.contains(&source) && !fleecing;
            let grain = self.grain;
            copies = d.hold(&grains, |g| {
                let (start, end) = (g as u64 * grain, (g as u64 + 1) * grain);
                fleecing && !bottom.holds(target, start, end).1
            });
        }
        self.copies.backups.push(Backup {
            id: id.map(std::rc::Rc::clone),
            filter,
            source,
            target,
            grains,
            copies,
        });
    }

    /// A command made a source show something else below its filters, which they know nothing of.
    pub(super) fn instant_is_gone(&mut self, source: usize) {
        let shows = |d: &usize, disks: &[Option<Disk>]| {
            *d == source || disks[*d].as_ref().is_some_and(|d| d.chain.contains(&source))
        };
        let Data { copies, disks, .. } = self;
        let gone: Vec<usize> = (copies.backups.iter())
            .filter(|b| shows(&b.source, disks))
            .map(|b| b.target)
            .collect();
        copies.backups.retain(|b| !gone.contains(&b.target));
        copies.snapshots.retain(|s| !shows(&s.source, disks));
        for target in gone {
            if let Some(d) = &mut disks[target] {
                d.unknown = true;
            }
        }
    }

    /// A guest writes to a source, or below it, by a way that does not lead through the filter: nobody uses that one.
    pub(super) fn written_beside(&mut self, world: &World, node: NodeId, disk: Option<usize>) {
        let Some(disk) = disk else { return };
        let of_backups = self.copies.backups.iter().map(|b| (b.filter, b.source));
        let of_snapshots = self.copies.snapshots.iter().map(|s| (s.filter, s.source));
        let shows = |source: usize| {
            let chain = self.disks[source].as_ref().map(|d| &d.chain);
            source == disk || chain.is_some_and(|chain| chain.contains(&disk))
        };
        let beside = |(filter, source): &(NodeId, usize)| {
            let there = world.graph.get(*filter).is_some();
            there && shows(*source) && !leads_through(world, node, *filter)
        };
        let gone: Vec<usize> = of_backups
            .chain(of_snapshots)
            .filter(beside)
            .map(|(_, source)| source)
            .collect();
        for source in gone {
            self.instant_is_gone(source);
        }
    }

    /// The same for filters that a command has put above another image.
    pub(super) fn filters_moved(&mut self, scenario: &Scenario, world: &World) {
        let of_backups = self.copies.backups.iter().map(|b| (b.filter, b.source));
        let of_snapshots = self.copies.snapshots.iter().map(|s| (s.filter, s.source));
        let moved = |(filter, source): &(NodeId, usize)| {
            world.graph.get(*filter).is_some() && Data::disk_of(scenario, world, *filter) != Some(*source)
        };
        let gone: Vec<usize> = of_backups
            .chain(of_snapshots)
            .filter(moved)
            .map(|(_, source)| source)
            .collect();
        for source in gone {
            self.instant_is_gone(source);
        }
    }

    /// Whatever was written to a grain, for grains that are torn between writes.
    fn written(&self, disk: usize) -> Vec<(usize, Value)> {
        let Some(d) = &self.disks[disk] else {
            return Vec::new();
        };
        let initially = d.initial.iter().copied().enumerate();
        let later = d.log.iter().flat_map(|l| (l.first..l.last).map(|g| (g, l.value)));
        initially.chain(later).collect()
    }

    /// A backup is over. `well`: everything that was to be copied is.
    pub(crate) fn backup_ended(&mut self, id: &str, well: bool) {
        let Some(at) = self
            .copies
            .backups
            .iter()
            .position(|b| b.id.as_deref() == Some(id))
        else {
            return;
        };
        let backup = self.copies.backups.remove(at);
        if let Some(d) = self.disks[backup.target].as_mut() {
            d.release(&backup.grains, &backup.copies, well);
        }
    }

    /// A filter, of a job or opened by somebody, keeps what its source holds now.
    pub(crate) fn snapshot_begins(
        &mut self,
        filter: NodeId,
        (source, target): (Option<usize>, Option<usize>),
        bottom: &Bottom,
        (job, copied): (Option<&std::rc::Rc<str>>, impl Fn(u64, u64) -> Copied),
    ) {
        self.backup_begins((job, filter), (source, target), bottom, copied);
        if let Some((source, grains)) = source.and_then(|s| Some((s, self.instant(s)?))) {
            self.copies.snapshots.push(Snapshot {
                filter,
                source,
                grains,
            });
        }
    }

    /// A guest request on a snapshot node is issued; true if it is one.
    pub(super) fn looks(&mut self, world: &World, node: NodeId, step: StepId, request: &GuestOp) -> bool {
        if world.graph.node(node).driver != Driver::SnapshotAccess {
            return false;
        }
        if let (GuestOp::Read(range), Some(filter)) = (*request, world.graph.primary_child(node)) {
            self.copies.looks.push(Look { step, filter, range });
        }
        true
    }

    /// A read of a snapshot is over.
    pub(super) fn looked(
        &mut self,
        view: &View<'_>,
        step: StepId,
        outcome: &Outcome,
    ) -> Result<(), Violation> {
        let Some(at) = self.copies.looks.iter().position(|look| look.step == step) else {
            return Ok(());
        };
        let look = self.copies.looks.swap_remove(at);
        match outcome {
            Outcome::Read(Ok(bytes)) => {
                let who = crate::oracle::liveness::act_text(view.scenario, step).unwrap_or_default();
                self.judge_snapshot(view, look.filter, &who, look.range.offset, bytes)
            }
            _ => Ok(()),
        }
    }

    /// All of a snapshot node was read.
    pub(super) fn whole_snapshot(
        &self,
        view: &View<'_>,
        world: &World,
        node: NodeId,
        content: &FinalContent<'_>,
    ) -> Result<(), Violation> {
        match world.graph.primary_child(node) {
            Some(filter) => self.judge_snapshot(view, filter, content.name, 0, content.bytes),
            None => Ok(()),
        }
    }

    fn judge_snapshot(
        &self,
        view: &View<'_>,
        filter: NodeId,
        who: &str,
        offset: u64,
        bytes: &[u8],
    ) -> Result<(), Violation> {
        let Some(snapshot) = self.copies.snapshots.iter().find(|s| s.filter == filter) else {
            return Ok(());
        };
        let Some(source) = self.disks[snapshot.source].as_ref() else {
            return Ok(());
        };
        for (i, piece) in bytes.chunks(index(self.grain)).enumerate() {
            let at = offset + i as u64 * self.grain;
            let g = index(at / self.grain);
            let allowed = snapshot.grains.get(g).map_or(&[][..], Vec::as_slice);
            let wrong = match seen(piece, at, &source.cuts, self.grain) {
                _ if allowed.is_empty() => None,
                Seen::Skip => None,
                Seen::Value(value) if allowed.contains(&value) => None,
                Seen::Value(value) => Some(value_text(view.scenario, value)),
                Seen::Wrong(_) if torn_between_writes(source, piece, at, g, view.now) => None,
                Seen::Wrong(content) => Some(content_text(view.scenario, content)),
            };
            if let Some(saw) = wrong {
                let expected = texts(view.scenario, allowed);
                let message = format!(
                    "{who}: grain {at:#x} of the snapshot holds {saw}, expected {expected}, as when the filter came"
                );
                let evidence = history(view.scenario, source, g);
                return Err(violation(OracleName::PointInTime, None, message, evidence));
            }
        }
        Ok(())
    }
}

/// Whether requests on a node come to a filter below it.
fn leads_through(world: &World, node: NodeId, filter: NodeId) -> bool {
    let graph = &world.graph;
    let below = |id: &NodeId| graph.filter_child(*id).or_else(|| graph.primary_child(*id));
    std::iter::successors(Some(node), below).any(|id| id == filter)
}

impl Disk {
    /// A backup begins to fill the disk: each copy is a write that takes effect sometime before the end. `shows`: the grain
    /// shows the source, which is below, so that the copy changes nothing.
    fn hold(&mut self, grains: &[(Vec<Value>, Copied)], shows: impl Fn(usize) -> bool) -> Vec<Option<OpId>> {
        let mut copies = Vec::with_capacity(grains.len());
        for (g, (values, copied)) in grains.iter().enumerate().take(self.initial.len()) {
            copies.push(None);
            let [value] = values[..] else {
                // What the source held is not one thing: nobody follows that.
                self.unknown |= *copied != Copied::Not;
                continue;
            };
            match copied {
                Copied::Not => {}
                Copied::Surely | Copied::WhenWritten if shows(g) => {
                    self.registers.shift(g, &[value], true);
                    self.initial[g] = value;
                    self.loose[g] = false;
                    self.kept[g] = true;
                }
                Copied::Surely | Copied::WhenWritten | Copied::Perhaps => {
                    copies[g] = Some(self.registers.begin(Effect::Write(value), g..g + 1));
                }
            }
        }
        copies
    }

    /// It is over: what was to be copied is there, or, if it was not `well`, may be.
    fn release(&mut self, grains: &[(Vec<Value>, Copied)], copies: &[Option<OpId>], well: bool) {
        for (g, (grain, copy)) in grains.iter().zip(copies).enumerate().take(self.initial.len()) {
            if let Some(copy) = copy {
                self.registers.end(*copy, well && grain.1 == Copied::Surely);
            }
            if well && grain.1 == Copied::Surely {
                self.own[g] = true;
            } else if self.kept[g] {
                // What was not copied is below again, and changes with it.
                self.loose[g] |= !self.own[g];
            }
            self.kept[g] = false;
        }
    }
}
