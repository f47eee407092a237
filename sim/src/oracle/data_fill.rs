//! What copies have put into a target, for when not everything of it is left: after a power cut, or where a flush failed.
//!
//! Rules: QEMU flushes no target, neither at a copy nor when a backup completes. So a copy is durable when it had ended before a
//! flush of the target began that ended well, or before a `blockdev-del` came that closed the image, since what is closed is
//! flushed. Until then the target may hold it or not. It never holds what the source held after the instant.
//! A flush counts that is asked for on a writable export, or of a qcow2 node itself: a read-only export of a raw node, or of a
//! filter, need not pass it on (QEMU flushes children through links that may write).
//! Unchecked: when copies end that nobody tells of (the gated daemon): theirs is the end of the job.

use blkcheck_model::register::Value;
use blkcheck_model::{Driver, World};

use super::backup::Copied;
use super::backup::Grain;
use super::{Data, Disk};
use crate::follow::Follower;
use crate::history::StepId;
use crate::scenario::{Action, Scenario};

/// A filter fills a target.
#[derive(Debug)]
pub(super) struct Fill {
    begin: u64,
    /// Per grain: what is put there, if anything.
    values: Vec<Option<Value>>,
    /// Per grain: begin and end of its copy; `u64::MAX` where it is not known to be there.
    times: Vec<(u64, u64)>,
}

/// Images are closed by a command under way.
#[derive(Clone, Debug)]
pub(super) struct Closing {
    step: StepId,
    since: u64,
    /// Faults before that.
    faults: u64,
    /// Images that were open then.
    open: Vec<usize>,
}

impl Fill {
    /// Begins at `now`.
    pub(super) fn new(grains: &[Grain], now: u64) -> Fill {
        let value = |(values, copied): &Grain| match values[..] {
            [value] if *copied != Copied::Not => Some(value),
            _ => None,
        };
        Fill {
            begin: now,
            values: grains.iter().map(value).collect(),
            times: vec![(now, u64::MAX); grains.len()],
        }
    }

    /// When the filter came.
    pub(super) fn begin(&self) -> u64 {
        self.begin
    }

    /// These grains are there, by a copy that began `since`.
    pub(super) fn copied(&mut self, grains: std::ops::Range<usize>, since: u64, now: u64) {
        let end = grains.end.min(self.times.len());
        for time in &mut self.times[grains.start.min(end)..end] {
            if time.1 == u64::MAX {
                *time = (since, now);
            }
        }
    }

    /// The copy of a grain: its value, begin and end.
    fn of(&self, grain: usize) -> Option<(Value, u64, u64)> {
        let (since, end) = *self.times.get(grain)?;
        Some(((*self.values.get(grain)?)?, since, end))
    }
}

impl Disk {
    /// Copies of a grain.
    pub(super) fn copies_of(&self, grain: usize) -> impl Iterator<Item = (Value, u64, u64)> {
        self.fills.iter().filter_map(move |fill| fill.of(grain))
    }

    /// Begins of the copies of a grain that no failure takes away.
    pub(super) fn durable_copies(&self, grain: usize) -> impl Iterator<Item = u64> {
        let durable = |(_, since, end)| (end < self.flushed).then_some(since);
        self.copies_of(grain).filter_map(durable)
    }
}

impl Data {
    /// Whether a flush of what this export shows comes to the file.
    pub(super) fn flush_arrives(follower: &Follower, export: &str) -> bool {
        let image = |node| follower.world.graph.node(node).driver == Driver::Qcow2;
        follower.export_writable(export) || follower.export_node(export).is_some_and(image)
    }

    /// A command is issued.
    pub(crate) fn asked(&mut self, scenario: &Scenario, world: &World, step: StepId, now: u64) {
        let Some(Action::Command { execute, .. }) = scenario.steps.get(step.0 as usize).map(|s| &s.action)
        else {
            return;
        };
        match execute.as_str() {
            "blockdev-del" => self.closing.push(Closing {
                step,
                since: now,
                faults: self.faults,
                open: (0..self.disks.len())
                    .filter(|disk| is_open(scenario, world, *disk))
                    .collect(),
            }),
            "block_resize" => self.resizing.push(step),
            _ => {}
        }
    }

    /// A command is answered: the images that it closed are flushed.
    pub(crate) fn answered(&mut self, scenario: &Scenario, world: &World, step: StepId, well: bool) {
        self.resizing.retain(|other| *other != step);
        let Some(at) = self.closing.iter().position(|c| c.step == step) else {
            return;
        };
        let closing = self.closing.swap_remove(at);
        if !well || closing.faults != self.faults {
            return;
        }
        for disk in closing.open {
            let d = self.disks[disk].as_mut();
            if let Some(d) = d.filter(|_| !is_open(scenario, world, disk)) {
                d.flushed = d.flushed.max(closing.since);
            }
        }
    }
}

/// Whether a node has the file of an image open.
fn is_open(scenario: &Scenario, world: &World, disk: usize) -> bool {
    let file = &*scenario.images[disk].file;
    let mut nodes = world.graph.nodes();
    nodes.any(|(id, _)| super::file_of(world, id).as_deref() == Some(file))
}

#[cfg(test)]
#[path = "data_fill_tests.rs"]
mod tests;
