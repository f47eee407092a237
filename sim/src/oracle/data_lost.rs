//! What may be gone after a flush that failed or a power cut, and what may not.
//!
//! Rules: an image that lost something holds of each grain what it held at its last good flush, or something written since; a FUA write
//! that ended well is never lost. Of a large grain each sector is judged for itself: a write that may be lost may be lost in
//! part. Where it need not hold a grain itself, what is below shows, which may have lost something in turn. What it held by way
//! of layers that are not below any more may have been copied into it with a cluster that a guest wrote to.
//! What copies put into a target: `data_fill.rs`. A target that is above its source by a command only is judged where it holds the
//! grain itself.
//! A command that gives a qcow2 image another length makes it durable, with the zeroes that it promises.
//! Not covered: after a power cut raw images whose length changed, qcow2 images as long as one is changing, and images that a command
//! put on something else.

use blkcheck_model::register::Value;

use super::grains::{content_text, history, is_tail, parts};
use super::{
    Data, Disk, FinalContent, Logged, OracleName, SECTOR, Seen, View, Violation, index, value_text, violation,
};
use crate::oracle::bottom::Bottom;
use crate::scenario::{Format, Scenario};

/// How evidence begins that names the images which a stream had taken out of a header, when the power failed.
pub(crate) const LEFT_OUT: &str = "its header leaves out what a stream has copied:";

/// A grain of an image, with the images below it.
#[derive(Clone, Copy)]
struct Place<'a> {
    disk: usize,
    chain: &'a [usize],
    grain: usize,
    /// Of the grain, by its place on the disk.
    part: usize,
}

/// An image that was read.
#[derive(Clone, Copy)]
pub(super) struct Left<'a> {
    pub(super) disk: usize,
    /// What its header names, if that is not what it must be.
    pub(super) below: Option<&'a [usize]>,
}

impl Data {
    /// An image of which (or of a layer below) what was not flushed may be lost. It is as good as on what it stood on before streams, which
    /// have copied what they took out. What it need not hold itself is not judged where its header never named what is below.
    pub(super) fn at_least_flushed(
        &self,
        view: &View<'_>,
        bottom: &Bottom,
        Left { disk, below }: Left<'_>,
        content: &FinalContent<'_>,
    ) -> Result<(), Violation> {
        let Some(d) = self.disks[disk].as_ref().filter(|d| !d.unknown) else {
            return Ok(());
        };
        let chain = d.fullest();
        let named = view.scenario.images[disk].backing_file.is_some();
        let alone = below.is_some() && !named && !chain.is_empty();
        for (grain, bytes) in content.bytes.chunks(index(self.grain)).enumerate() {
            let at = grain as u64 * self.grain;
            if alone && !d.must_hold(grain) {
                continue;
            }
            let seen = parts(bytes, at, &d.cuts, self.grain);
            for (part, saw) in d.registers.of(grain).zip(seen) {
                let place = Place {
                    disk,
                    chain,
                    grain,
                    part,
                };
                let text = match saw {
                    Seen::Value(value) if self.may_be_left(bottom, place, value) => continue,
                    Seen::Value(value) => value_text(view.scenario, value),
                    Seen::Skip => continue,
                    Seen::Wrong(content) => content_text(view.scenario, content),
                };
                let mut lost = lost_text(view.scenario, d, place, &text);
                if let Some(below) = below.filter(|below| *below != chain) {
                    let left_out = chain.iter().filter(|image| !below.contains(image));
                    let names: Vec<&str> = left_out.map(|i| view.scenario.images[*i].file.as_str()).collect();
                    lost.evidence.push(format!("{LEFT_OUT} {}", names.join(", ")));
                }
                return Err(lost);
            }
        }
        Ok(())
    }

    /// Whether an image may show this after all that was not durable was lost in part, of it and of the images below.
    fn may_be_left(&self, bottom: &Bottom, place: Place<'_>, value: Value) -> bool {
        let Place {
            disk,
            chain,
            grain,
            part,
        } = place;
        let at = grain as u64 * self.grain;
        let Some(d) = self.disks[disk].as_ref() else {
            return true;
        };
        // What is not long enough shows zeroes, whatever is below.
        if part as u64 * self.grain.min(SECTOR) >= d.length {
            return value == 0;
        }
        let (surely, perhaps) = bottom.holds(disk, at, at + self.grain);
        let lost = self.lost.contains(&disk);
        // Nothing need be lost: it may hold what it held last.
        let last = d.unknown || d.registers.possible_in(part).contains(&value);
        if last || lost && d.may_hold(place, value, perhaps, self.grain) {
            return true;
        }
        // Where it holds the grain itself whatever was lost, nothing below shows.
        if if lost { d.must_hold(grain) } else { surely } {
            return false;
        }
        match chain.split_first() {
            _ if d.loose[grain] => true,
            Some((&disk, chain)) => self.may_be_left(bottom, Place { disk, chain, ..place }, value),
            None => value == 0,
        }
    }

    /// The power failed: what a good flush had found is there, and nothing that was never written. Judged are images, as long as
    /// they were, that stand on what they always stood on: with or without what streams take out, for a header may be behind the model, or
    /// ahead of it.
    pub(crate) fn after_power_cut(
        &mut self,
        view: &View<'_>,
        bottom: &Bottom,
        contents: &[(FinalContent<'_>, Vec<usize>)],
    ) -> Result<(), Violation> {
        self.lost = (0..self.disks.len()).collect();
        for (content, below) in contents {
            let image = view.scenario.images.iter().position(|i| i.file == content.name);
            let Some((disk, d)) = image.and_then(|at| Some((at, self.disks[at].as_ref()?))) else {
                continue;
            };
            let length = (content.bytes.len() as u64).next_multiple_of(SECTOR);
            let is_sure = self.resizing.is_empty() && !d.unknown;
            if is_sure && d.length != length && view.scenario.images[disk].format == Format::Qcow2 {
                let message = format!(
                    "after a power cut, {} is {length:#x} bytes long; a command had made it {:#x}",
                    content.name, d.length
                );
                return Err(violation(OracleName::Transparency, None, message, Vec::new()));
            }
            let mut stood = d.fullest().iter();
            let stood = below.iter().all(|image| stood.any(|other| other == image));
            if stood && !d.moved && d.length == length {
                let below = Some(&below[..]);
                self.at_least_flushed(view, bottom, Left { disk, below }, content)?;
            }
        }
        Ok(())
    }
}

impl Disk {
    /// Images below as long as no stream had taken any out.
    fn fullest(&self) -> &[usize] {
        self.chains.first().unwrap_or(&self.chain)
    }

    /// Writes to a grain that no failure takes away: with FUA, or ended before the last good flush began.
    fn durable(&self, grain: usize) -> impl Iterator<Item = &Logged> {
        self.log.iter().filter(move |l| {
            let ended = l.end < self.flushed || l.fua && l.end != u64::MAX;
            l.covers(grain) && l.what != "discard" && ended
        })
    }

    /// Whether this image itself decides a grain, whatever was lost since the last good flush. Discards and changes of its length may
    /// have undone that.
    fn must_hold(&self, grain: usize) -> bool {
        let kept_since = |start: u64| {
            let undoes = |l: &Logged| l.covers(grain) && l.what == "discard" && l.end >= start;
            !self.log.iter().any(undoes) && !self.is_discarded(grain)
        };
        let (cut_off, when) = self.cut_off;
        let is_there = |since: u64| (grain < cut_off || since > when) && kept_since(since);
        let grown = self.grown.is_some_and(|(first, when)| {
            grain >= first && kept_since(when) && self.loose.get(grain) == Some(&false)
        });
        grown
            || self.own.get(grain) == Some(&true) && is_there(0)
            || self.durable(grain).any(|l| !l.crossed && is_there(l.start))
            || self.durable_copies(grain).any(is_there)
    }

    /// Whether a grain may hold this after everything since the last good flush was lost in part. `copied`: the image itself may hold
    /// the grain.
    fn may_hold(&self, Place { grain, part, .. }: Place<'_>, value: Value, copied: bool, size: u64) -> bool {
        if value == 0 && self.is_discarded(grain) {
            return true;
        }
        let durable = || {
            let writes = self.durable(grain).map(|l| l.start);
            writes.chain(self.durable_copies(grain))
        };
        // A write that is durable hides everything that ended before the write began.
        let hidden = |end: u64| durable().any(|start| start > end);
        // Where the content below ends within the grain, the rest was zeroes, if it was not cut off only later.
        let tail = is_tail(&self.cuts, part, size);
        let own = self.own.get(grain) == Some(&true);
        let full = !tail || own || grain + 1 >= self.cut_off.0;
        let first = full && self.initial.get(grain) == Some(&value) || tail && value == 0;
        // A copy in a cluster that a guest had begun to write may be from what was below then.
        let before = first || copied && self.former.contains(&(grain, value));
        let initially = before && durable().next().is_none();
        let mut copies = self.copies_of(grain);
        initially
            || copies.any(|(copy, _, end)| copy == value && (end == u64::MAX || !hidden(end)))
            || self
                .log
                .iter()
                .any(|l| l.covers(grain) && l.value == value && (l.end == u64::MAX || !hidden(l.end)))
    }
}

fn lost_text(scenario: &Scenario, d: &Disk, place: Place<'_>, saw: &str) -> Violation {
    let message = format!(
        "after a failed flush or a power cut, {} at {:#x} holds {saw}, which a flush before had made impossible",
        scenario.images[place.disk].file,
        place.part as u64 * u64::from(scenario.grain).min(SECTOR),
    );
    let oracle = if d.target {
        OracleName::PointInTime
    } else {
        OracleName::Transparency
    };
    violation(oracle, None, message, history(scenario, d, place.grain))
}
