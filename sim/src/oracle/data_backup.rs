//! What backups put into their targets, and what snapshots behind copy-before-write filters show: the source as it was at one
//! instant, and nothing that was written to it later.
//!
//! The instant is when the filter comes above the drained source; where that is not told (the gated daemon) it is while the command is
//! under way, and what the source held when that began counts as well as what it holds when it is answered. From then on a grain
//! of the target that is to be copied may show what it did or what the source held at the instant; once its copy, or the job, has
//! ended well it shows the latter. A target above its source (fleecing) shows the latter from the first moment on, as long as the
//! job is there: what is not copied yet is below.
//! What is to be copied: everything, what the source's own layer holds, or what a bitmap marks, by `sync`.
//! With `discard-source` each cluster may be discarded in the source until its copy is over, and not after that.
//! A snapshot node never shows anything else, and says that it cannot rather than that.
//! Unchecked: how much of a failed backup is in the target; whether a grain is copied of which the source may have held several things
//! at the instant; sources of which nothing can be said, or that are written past their filter; block status of snapshots.

use std::ops::Range as Span;
use std::rc::Rc;

use blkcheck_model::bitmap::Spans;
use blkcheck_model::job::{Backup as Job, Sync};
use blkcheck_model::register::{Effect, OpId, Value};
use blkcheck_model::{Driver, NodeId, World};

use super::fill::Fill;
use super::grains::{content_text, history, parts, texts};
use super::{Data, Disk, FinalContent, OracleName, Seen, View, Violation, index, value_text, violation};
use crate::history::{Outcome, StepId};
use crate::oracle::bottom::Bottom;
use crate::scenario::{GuestOp, Range, Scenario};

/// Whether a grain is copied.
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

impl Copied {
    /// Of a grain, by the clusters that are copied.
    pub(crate) fn among(clusters: Option<&Spans>, cluster: u64, at: u64, there: Copied) -> Copied {
        match clusters {
            None => Copied::Perhaps,
            Some(spans) if spans.contains(at / cluster) => there,
            Some(_) => Copied::Not,
        }
    }

    /// Of a grain, by a job whose source is this image.
    pub(crate) fn by(job: &Job, source: Option<usize>, bottom: &Bottom, start: u64, end: u64) -> Copied {
        let among = |there| Copied::among(job.initial.as_ref(), job.cluster, start, there);
        match job.sync {
            Sync::Full | Sync::Bitmap => among(Copied::Surely),
            Sync::None => among(Copied::WhenWritten),
            Sync::Top => {
                // A cluster that the layer holds in part is held; what it does not hold now, guests may write to.
                let held = source.is_some_and(|source| {
                    let from = start / job.cluster * job.cluster;
                    let to = (from + job.cluster).min(job.length).max(end);
                    bottom.holds_any(source, from, to)
                });
                among(if held { Copied::Surely } else { Copied::Perhaps })
            }
        }
    }
}

/// What the source may have held at the instant (nothing where nobody knows), and whether it is copied.
pub(super) type Grain = (Vec<Value>, Copied);

/// A filter at work.
#[derive(Debug)]
struct Copying {
    /// None where somebody opened the filter.
    job: Option<Rc<str>>,
    filter: NodeId,
    source: usize,
    target: Option<usize>,
    grains: Vec<Grain>,
    /// Per grain: the copy, as a write to the target.
    copies: Vec<Option<OpId>>,
    /// Which of the target's fills this is.
    fill: usize,
    /// Copies under way: task, begin, grains.
    tasks: Vec<(u64, u64, Span<usize>)>,
    discards: Option<Discards>,
}

/// What a backup takes away from its source: each cluster at most once, before its copy is over.
#[derive(Debug)]
struct Discards {
    /// Per grain: the discard, until it is over.
    grains: Vec<Option<OpId>>,
}

/// A read of a snapshot under way.
#[derive(Clone, Copy, Debug)]
struct Look {
    step: StepId,
    filter: NodeId,
    range: Range,
}

/// What is copied, and who looks at what is kept.
#[derive(Debug, Default)]
pub(super) struct Copies {
    filters: Vec<Copying>,
    looks: Vec<Look>,
    /// What every disk may have held when the command under way began, where the instant is not told.
    earlier: Vec<Option<Vec<Vec<Value>>>>,
}

impl Copies {
    /// A guest writes to a target, maybe between the instant and the copy: where the target shows the source the copy then does
    /// change something.
    pub(super) fn meet_write(&mut self, disk: usize, d: &mut Disk, grains: Span<usize>) {
        for copying in self.filters.iter_mut().filter(|c| c.target == Some(disk)) {
            for g in grains.clone().filter(|g| d.kept[*g]) {
                if let (Some((values, copied)), Some(copy @ None)) =
                    (copying.grains.get(g), copying.copies.get_mut(g))
                    && let ([value], false) = (&values[..], *copied == Copied::Not)
                {
                    *copy = Some(d.registers.begin(Effect::Write(*value), g..g + 1));
                }
            }
        }
    }
}

impl Data {
    /// A filter, of a job or opened by somebody, keeps what its source holds now. `copied`: what of it, by range.
    pub(crate) fn copying_begins(
        &mut self,
        filter: NodeId,
        (source, target): (Option<usize>, Option<usize>),
        bottom: &Bottom,
        (job, copied): (Option<&Rc<str>>, impl Fn(u64, u64) -> Copied),
        now: u64,
    ) {
        if let Some(target) = target {
            // What is above a target changes with it, nobody knows when.
            for d in self.disks.iter_mut().flatten() {
                d.unknown |= d.chain.contains(&target);
            }
        }
        let instant = source.and_then(|source| Some((source, self.instant_of_command(source)?)));
        let Some((source, instant)) = instant.filter(|_| source != target) else {
            return self.lose(target);
        };
        let range = |g: u64| copied(g * self.grain, (g + 1) * self.grain);
        let grains: Vec<Grain> = (0..).zip(instant).map(|(g, values)| (values, range(g))).collect();
        let copies = target.map_or_else(Vec::new, |target| self.fill(source, target, bottom, &grains));
        let fills = target.and_then(|target| Some(&mut self.disks[target].as_mut()?.fills));
        let fill = fills.map_or(0, |fills| {
            fills.push(Fill::new(&grains, now));
            fills.len() - 1
        });
        self.copies.filters.push(Copying {
            job: job.map(Rc::clone),
            filter,
            source,
            target,
            grains,
            copies,
            fill,
            tasks: Vec::new(),
            discards: None,
        });
    }

    /// The backup of this filter, which has just begun, discards in its source what it has copied. Whoever else relies on the
    /// source loses it.
    pub(crate) fn discards_source(&mut self, filter: NodeId, source: usize) {
        let own = self.copies.filters.iter().position(|c| c.filter == filter);
        let own = own.map(|at| self.copies.filters.remove(at));
        self.instant_is_gone(source);
        let target = own.as_ref().and_then(|c| c.target);
        for (disk, d) in self.disks.iter_mut().enumerate() {
            if let Some(d) = d.as_mut().filter(|d| d.chain.contains(&source)) {
                d.unknown |= Some(disk) != target;
            }
        }
        let Some(mut own) = own else {
            // Nobody knows what it copies.
            return self.lose(Some(source));
        };
        if let Some(d) = self.disks[source].as_mut() {
            let grains = own.grains.iter().enumerate().take(d.initial.len());
            let discard = |(g, (_, copied)): (usize, &Grain)| {
                (*copied != Copied::Not).then(|| d.registers.begin(Effect::Discard, g..g + 1))
            };
            let grains: Vec<Option<OpId>> = grains.map(discard).collect();
            d.discarded.resize(d.initial.len().max(grains.len()), false);
            for (discarded, now) in d.discarded.iter_mut().zip(&grains) {
                *discarded |= now.is_some();
            }
            own.discards = Some(Discards { grains });
        }
        self.copies.filters.push(own);
    }

    /// A task of a filter begins to copy.
    pub(crate) fn copy_begins(&mut self, filter: NodeId, task: u64, (offset, bytes): (u64, u64), now: u64) {
        let grain = self.grain;
        if let Some(copying) = self.copies.filters.iter_mut().find(|c| c.filter == filter) {
            let grains = index(offset / grain)..index((offset + bytes).div_ceil(grain));
            copying.tasks.push((task, now, grains));
        }
    }

    /// It is over; if it ended `well`, its grains are there, and discarded in the source if its backup does so.
    pub(crate) fn copy_ends(&mut self, filter: NodeId, task: u64, well: bool, now: u64) {
        let Some(copying) = self.copies.filters.iter_mut().find(|c| c.filter == filter) else {
            return;
        };
        let Some(at) = copying.tasks.iter().position(|(other, ..)| *other == task) else {
            return;
        };
        let (_, since, grains) = copying.tasks.swap_remove(at);
        if !well {
            return;
        }
        if let Some(d) = copying.target.and_then(|target| self.disks[target].as_mut()) {
            d.fills[copying.fill].copied(grains.clone(), since, now);
            for copy in grains.clone().filter_map(|g| copying.copies.get_mut(g)?.take()) {
                d.registers.end(copy, true);
            }
        }
        let Some(d) = self.disks[copying.source].as_mut() else {
            return;
        };
        let Some(discards) = &mut copying.discards else {
            return;
        };
        for g in grains {
            if let Some(op) = discards.grains.get_mut(g).and_then(Option::take) {
                d.registers.end(op, true);
            }
        }
    }

    /// A filter failed to keep something, and lets writes through from now on: what its target shows is anybody's guess. What its
    /// snapshot still shows has to be right.
    pub(crate) fn snapshot_breaks(&mut self, filter: NodeId) {
        if let Some(copying) = self.copies.filters.iter_mut().find(|c| c.filter == filter) {
            let target = copying.target.take();
            self.lose(target);
        }
    }

    /// What every grain of a disk may hold now; none where nothing can be said.
    fn instant(&self, disk: usize) -> Option<Vec<Vec<Value>>> {
        let d = self.disks[disk].as_ref().filter(|d| !d.unknown)?;
        let now = |g: usize| {
            let at = g as u64 * self.grain;
            let vague = d.loose[g] || d.cuts.iter().any(|c| (at..at + self.grain).contains(c));
            if vague {
                Vec::new()
            } else {
                d.registers.possible(g)
            }
        };
        Some((0..d.initial.len()).map(now).collect())
    }

    /// A command begins, and nobody will tell when in its course an instant is.
    pub(crate) fn instants_begin(&mut self) {
        self.copies.earlier = (0..self.disks.len()).map(|disk| self.instant(disk)).collect();
    }

    /// What every grain may have held at an instant that is over now.
    fn instant_of_command(&self, disk: usize) -> Option<Vec<Vec<Value>>> {
        let mut now = self.instant(disk)?;
        let Some(earlier) = self.copies.earlier.get(disk) else {
            return Some(now);
        };
        for (values, earlier) in now.iter_mut().zip(earlier.as_ref()?) {
            if values.is_empty() || earlier.is_empty() {
                values.clear();
                continue;
            }
            let more = earlier.iter().filter(|value| !values.contains(value));
            let more: Vec<Value> = more.copied().collect();
            values.extend(more);
        }
        Some(now)
    }

    fn fill(&mut self, source: usize, target: usize, bottom: &Bottom, grains: &[Grain]) -> Vec<Option<OpId>> {
        let grain = self.grain;
        let Some(d) = self.disks[target].as_mut() else {
            return Vec::new();
        };
        d.target = true;
        let fleecing = d.chain.first() == Some(&source);
        // What is in between hides it, or not: nobody follows that.
        d.unknown |= d.chain.contains(&source) && !fleecing;
        d.hold(grains, |g| {
            let (start, end) = (g as u64 * grain, (g as u64 + 1) * grain);
            fleecing && !bottom.holds(target, start, end).1
        })
    }

    fn lose(&mut self, target: Option<usize>) {
        if let Some(d) = target.and_then(|target| self.disks[target].as_mut()) {
            d.unknown = true;
        }
    }

    /// The instant of these filters is gone: somebody changed their sources where they know nothing of it.
    fn spoil(&mut self, spoilt: impl Fn(&Data, &Copying) -> bool) {
        let all = std::mem::take(&mut self.copies.filters);
        let (gone, left): (Vec<_>, Vec<_>) = all.into_iter().partition(|copying| spoilt(self, copying));
        self.copies.filters = left;
        for copying in gone {
            self.lose(copying.target);
            if copying.discards.is_some() {
                // It goes on being discarded, which nobody follows from now on.
                self.lose(Some(copying.source));
            }
        }
    }

    /// Whether a disk shows another one, or is it.
    fn shows(&self, disk: usize, other: usize) -> bool {
        let chain = self.disks[disk].as_ref().map(|d| &d.chain);
        disk == other || chain.is_some_and(|chain| chain.contains(&other))
    }

    /// A command made a disk show something else.
    pub(super) fn instant_is_gone(&mut self, disk: usize) {
        self.spoil(|data, copying| data.shows(copying.source, disk));
    }

    /// A guest writes to a disk through this node: past the filters that it does not come to.
    pub(super) fn written_beside(&mut self, world: &World, node: NodeId, disk: Option<usize>) {
        let Some(disk) = disk else { return };
        self.spoil(|data, copying| {
            let there = world.graph.get(copying.filter).is_some();
            there && data.shows(copying.source, disk) && !leads_through(world, node, copying.filter)
        });
    }

    /// Commands have put filters above other images.
    pub(super) fn filters_moved(&mut self, scenario: &Scenario, world: &World) {
        self.spoil(|_, copying| {
            let there = world.graph.get(copying.filter).is_some();
            there && Data::disk_of(scenario, world, copying.filter) != Some(copying.source)
        });
    }

    /// A job is over. `well`: everything that was to be copied is.
    pub(crate) fn backup_ended(&mut self, id: &str, well: bool, now: u64) {
        let all = &mut self.copies.filters;
        let Some(at) = all.iter().position(|c| c.job.as_deref() == Some(id)) else {
            return;
        };
        let over = all.remove(at);
        if let Some(d) = over.target.and_then(|target| self.disks[target].as_mut()) {
            d.release(&over.grains, &over.copies, (over.fill, well), now);
        }
        let discards = over.discards.iter().flat_map(|d| d.grains.iter().flatten());
        if let Some(d) = self.disks[over.source].as_mut() {
            discards.for_each(|op| d.registers.end(*op, true));
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
        // What is discarded cannot be read in the source any more.
        let kept = |c: &&Copying| c.filter == filter && c.discards.is_none();
        let Some(kept) = self.copies.filters.iter().find(kept) else {
            return Ok(());
        };
        let Some(source) = self.disks[kept.source].as_ref() else {
            return Ok(());
        };
        for (i, piece) in bytes.chunks(index(self.grain)).enumerate() {
            let at = offset + i as u64 * self.grain;
            let g = index(at / self.grain);
            let allowed = kept
                .grains
                .get(g)
                .map_or(&[][..], |(values, _)| values.as_slice());
            let seen = parts(piece, at, &source.cuts, self.grain);
            let wrong = seen.into_iter().find_map(|part| match part {
                // Nobody knows what it held.
                _ if allowed.is_empty() => None,
                Seen::Skip => None,
                Seen::Value(value) if allowed.contains(&value) => None,
                Seen::Value(value) => Some(value_text(view.scenario, value)),
                Seen::Wrong(content) => Some(content_text(view.scenario, content)),
            });
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
    /// A backup discards this grain behind its copy, or did.
    pub(super) fn is_discarded(&self, grain: usize) -> bool {
        self.discarded.get(grain).is_some_and(|discarded| *discarded)
    }

    /// A backup begins to fill the disk: each copy is a write that takes effect sometime before the end. `shows`: the grain
    /// shows the source, which is below, so that the copy changes nothing.
    fn hold(&mut self, grains: &[Grain], shows: impl Fn(usize) -> bool) -> Vec<Option<OpId>> {
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
    fn release(&mut self, grains: &[Grain], copies: &[Option<OpId>], (fill, well): (usize, bool), now: u64) {
        for (g, (grain, copy)) in grains.iter().zip(copies).enumerate().take(self.initial.len()) {
            if let Some(copy) = copy {
                self.registers.end(*copy, well && grain.1 == Copied::Surely);
            }
            if well && grain.1 == Copied::Surely {
                self.filled[g] = true;
                let since = self.fills[fill].begin();
                self.fills[fill].copied(g..g + 1, since, now);
            } else if self.kept[g] {
                // What was not copied is below again, and changes with it.
                self.loose[g] |= !self.own[g] && !self.filled[g];
            }
            self.kept[g] = false;
        }
    }
}

#[cfg(test)]
#[path = "data_backup_tests.rs"]
pub(crate) mod tests;
