//! Commands that change what disks show: another backing file, another layer on top, another length.
//!
//! A change takes effect somewhere between the start of its command and the moment when everything is settled. In
//! between (the *window*) a grain may show the old content or the new; afterwards only the new. What a layer surely holds
//! itself does not change, what it surely does not hold becomes what is below it now; where one cannot tell (a copy, a
//! discard, a write under way) both pass until somebody looks. Who holds what is known by [`Bottom`].
//! A request that was under way while its export came to show another disk (a snapshot) reached one of the two. On the
//! new one it must be visible if that one shows the old one there; on the old one it may be.
//! A job's end is no such change: it takes layers out of a chain, and nobody may notice.

use blkcheck_model::World;
use blkcheck_model::register::{Effect, Value};

use super::sectors::{Sectors, per_grain};
use super::{Data, Disk, Logged, Open, SECTOR, Scenario, Unexplained, View, Violation, index};
use crate::follow::{Followed, Follower};
use crate::history::{Outcome, StepId};
use crate::oracle::bottom::Bottom;
use crate::scenario::{Action, Format};

/// The other disk that a request may have reached.
#[derive(Clone, Copy, Debug)]
pub(super) struct Other {
    pub(super) disk: usize,
    pub(super) op: blkcheck_model::register::OpId,
    pub(super) logged: Option<usize>,
    /// The request must be visible there: that disk shows the first one.
    pub(super) shows: bool,
}

/// A change under way.
#[derive(Debug, Default)]
pub(super) struct Window {
    /// Disks that show something else from now on, lower ones first.
    disks: Vec<usize>,
    /// Exports by name, with the disk that they showed before.
    before: Vec<(String, usize)>,
    /// Disks that exports have moved from, and to.
    moved: Vec<usize>,
    /// Raw files that are cut off within their last sector.
    cut: Vec<Cut>,
}

/// Grains in the last sector of a file that lie behind its new end: zeroes, until somebody writes there.
#[derive(Clone, Copy, Debug)]
struct Cut {
    disk: usize,
    first: usize,
    last: usize,
    since: u64,
}

/// So much of a stamp tells whose it is.
const TELLING: u64 = 16;

/// What a grain of a disk would show if nothing were on top.
struct Below<'a> {
    values: Vec<Value>,
    loose: bool,
    /// The image below and its length, where it reaches that far.
    disk: Option<(&'a Sectors, u64)>,
}

impl Data {
    /// What one record meant to the model: commands begin to change what disks show, jobs' ends change nothing.
    pub(crate) fn follow(
        &mut self,
        scenario: &Scenario,
        follower: &Follower,
        followed: &Followed,
        bottom: &mut Bottom,
        now: u64,
    ) {
        if !followed.changed {
            return;
        }
        if let Some(step) = followed.executed {
            self.begin_change(scenario, follower, bottom, now);
            self.tell_crossed(scenario, bottom);
            for (disk, length) in self.resized(scenario, &follower.world, bottom, Some((step, now))) {
                bottom.resized(disk, length);
            }
        } else if followed.completed.is_some() || followed.settled {
            self.sync(scenario, &follower.world, false);
        }
    }

    /// Writes that may have reached two images hold in neither for sure.
    pub(crate) fn tell_crossed(&mut self, scenario: &Scenario, bottom: &mut Bottom) {
        for (step, disk) in self.crossed.drain(..) {
            let range = super::guest(scenario, step).and_then(|(_, op)| op.range());
            if let Some(range) = range {
                bottom.crossed(step, disk, range);
            }
        }
    }

    /// A command that the model accepts begins to change the graph.
    fn begin_change(&mut self, scenario: &Scenario, follower: &Follower, bottom: &Bottom, now: u64) {
        let mut before = Vec::new();
        for (name, disk) in self.exports.iter().rev() {
            if !before.iter().any(|(n, _): &(String, usize)| n == name) {
                before.push((name.clone(), *disk));
            }
        }
        let disks = self.sync(scenario, &follower.world, true);
        self.filters_moved(scenario, &follower.world);
        let moves = before.iter().filter_map(|(name, disk)| {
            let to = self.shown_by(scenario, follower, name)?;
            (to != *disk).then_some([*disk, to])
        });
        let moved: Vec<usize> = moves.flatten().collect();
        if disks.is_empty() && moved.is_empty() {
            return;
        }
        for disk in &disks {
            self.shift(*disk, bottom, false);
            self.instant_is_gone(*disk);
        }
        if !moved.is_empty() {
            self.move_requests(scenario, follower, bottom, now);
        }
        match &mut self.window {
            None => {
                self.window = Some(Window {
                    disks,
                    before,
                    moved,
                    cut: Vec::new(),
                });
            }
            Some(window) => {
                // Another command before the last was settled.
                window.disks.retain(|d| !disks.contains(d));
                window.disks.extend(disks);
                window.moved.extend(moved);
            }
        }
    }

    /// Everything is settled: what was changing has changed. True when disks may have moved under requests.
    pub(crate) fn end_change(&mut self, bottom: &Bottom) {
        let Some(window) = self.window.take() else { return };
        for cut in window.cut {
            self.cut_off(cut, true);
        }
        for disk in window.disks {
            self.shift(disk, bottom, true);
        }
    }

    /// The model was wrong about the last commands, since storage failed: what is settled now holds, whatever it is.
    pub(crate) fn settle_doubt(&mut self, scenario: &Scenario, world: &World, bottom: &Bottom) {
        // Requests beside a change that came to nothing, or to half: nobody knows which disk they reached. What is above shows it.
        let doubtful = self
            .window
            .take()
            .map_or(Vec::new(), |w| [w.disks, w.moved].concat());
        for (at, d) in (0..).zip(&mut self.disks) {
            if let Some(d) = d {
                d.unknown |= doubtful.iter().any(|disk| *disk == at || d.chain.contains(disk));
            }
        }
        for disk in self.sync(scenario, world, true) {
            self.shift(disk, bottom, false);
        }
        self.doubt_lengths(scenario, world, bottom);
    }

    pub(super) fn shown_by(&self, scenario: &Scenario, follower: &Follower, export: &str) -> Option<usize> {
        Data::disk_of(scenario, &follower.world, follower.export_node(export)?)
    }

    /// The disk that an export showed before the change under way, if it is another one.
    pub(super) fn shown_before(&self, export: &str, now: usize) -> Option<usize> {
        let window = self.window.as_ref()?;
        let (_, before) = window.before.iter().find(|(name, _)| name == export)?;
        (*before != now).then_some(*before)
    }

    /// What a grain shows through a disk that does not hold it.
    fn below(&self, disk: &Disk, grain: usize) -> Below<'_> {
        let at = grain as u64 * self.grain;
        let below = disk.chain.first().and_then(|b| self.disks[*b].as_ref());
        let Some(below) = below.filter(|b| at < b.length) else {
            return Below {
                values: vec![0],
                loose: false,
                disk: None,
            };
        };
        Below {
            values: below.registers.possible(grain),
            loose: below.loose[grain] || below.log.iter().any(|l| l.covers(grain) && l.end == u64::MAX),
            disk: Some((&below.registers, below.length)),
        }
    }

    /// Gives a disk the content of its new chain. `over`: the old one is gone.
    pub(super) fn shift(&mut self, disk: usize, bottom: &Bottom, over: bool) {
        let Some(mut d) = self.disks[disk].take() else {
            return;
        };
        let below = d.chain.first().and_then(|b| self.disks[*b].as_ref());
        d.unknown |= below.is_some_and(|b| b.unknown);
        for grain in 0..d.initial.len() {
            if d.unknown {
                break;
            }
            let at = grain as u64 * self.grain;
            let (surely, perhaps) = bottom.holds(disk, at, at + self.grain);
            if surely {
                continue;
            }
            let Below {
                values,
                loose,
                disk: below,
            } = self.below(&d, grain);
            if values.is_empty() {
                d.unknown = true;
                break;
            }
            let only = over && !perhaps;
            match below {
                Some(below) => d.registers.shift_to(grain, below, only),
                None => d.registers.shift(grain, &values, only),
            }
            d.loose[grain] |= loose;
            let was = std::mem::replace(&mut d.initial[grain], values[0]);
            if was != values[0] && !d.former.contains(&(grain, was)) {
                d.former.push((grain, was));
            }
        }
        self.disks[disk] = Some(d);
    }

    /// Requests under way whose export shows another disk now may reach either.
    fn move_requests(&mut self, scenario: &Scenario, follower: &Follower, bottom: &Bottom, now: u64) {
        for at in 0..self.open.len() {
            let Some(open) = self.open[at] else { continue };
            let step = StepId(u32::try_from(at).expect("few steps"));
            let Some((export, _)) = super::guest(scenario, step) else {
                continue;
            };
            let to = self
                .shown_by(scenario, follower, export)
                .filter(|to| *to != open.disk);
            match (to, open.other) {
                (Some(to), None) => self.reach_another(step, open, to, bottom, now),
                (Some(to), Some(other)) if to != other.disk => self.reach_a_third(step, open, to),
                _ => {}
            }
        }
        // What would have failed may fit by now.
        for step in std::mem::take(&mut self.outside) {
            let guest = super::guest(scenario, step);
            let to = guest.and_then(|(export, _)| self.shown_by(scenario, follower, export));
            if let Some(d) = to.and_then(|to| self.disks[to].as_mut()) {
                d.unknown = true;
            }
        }
    }

    /// The request may also have reached `to`, the newer disk.
    fn reach_another(&mut self, step: StepId, mut open: Open, to: usize, bottom: &Bottom, now: u64) {
        let effect = open.effect;
        let (start, end) = (open.first as u64 * self.grain, open.last as u64 * self.grain);
        let Some(d) = self.disks[to].as_mut().filter(|d| !d.unknown && end <= d.length) else {
            if let Some(open) = &mut self.open[step.0 as usize] {
                open.blind = true;
            }
            return self.give_up(open.disk, to, effect);
        };
        let shows = d.chain.contains(&open.disk) && !bottom.holds(to, start, end).1;
        let op = d.registers.begin(effect, open.first..open.last);
        let logged = (effect != Effect::Read).then(|| {
            let old = open
                .logged
                .and_then(|l| Some(self.disks[open.disk].as_ref()?.log[l]));
            let value = match effect {
                Effect::Write(value) => value,
                Effect::Read | Effect::Discard => 0,
            };
            let d = self.disks[to].as_mut().expect("just there");
            d.log.push(Logged {
                step,
                start: now,
                end: u64::MAX,
                first: open.first,
                last: open.last,
                value,
                what: old.map_or("write", |l| l.what),
                fua: old.is_some_and(|l| l.fua),
                crossed: true,
            });
            d.log.len() - 1
        });
        open.other = Some(Other {
            disk: to,
            op,
            logged,
            shows,
        });
        self.open[step.0 as usize] = Some(open);
        if logged.is_some() {
            self.loosen(to, open.first, open.last);
            self.crossed.extend([(step, open.disk), (step, to)]);
        }
    }

    /// The request may have reached one of three disks by now: nobody follows that.
    fn reach_a_third(&mut self, step: StepId, open: Open, to: usize) {
        if let Some(open) = &mut self.open[step.0 as usize] {
            open.blind = true;
        }
        self.give_up(open.disk, to, open.effect);
        if let Some(other) = open.other {
            self.give_up(other.disk, to, open.effect);
        }
    }

    /// A request whose place on the other disk cannot be followed: what it may have changed is not known any more.
    fn give_up(&mut self, one: usize, other: usize, effect: Effect) {
        if effect == Effect::Read {
            return;
        }
        for disk in [one, other] {
            if let Some(d) = &mut self.disks[disk] {
                d.unknown = true;
            }
        }
    }

    /// A request that was just issued on `open.disk` while its export is moving there from `from`.
    pub(super) fn issued_in_window(&mut self, step: StepId, from: usize, bottom: &Bottom, now: u64) {
        let Some(open) = self.open[step.0 as usize] else {
            return;
        };
        // As if it had been issued on the older disk and had moved.
        let Some(older) = self.disks[from].as_mut().filter(|d| !d.unknown) else {
            return;
        };
        let grains = older.initial.len();
        if open.last > grains {
            if let Some(open) = &mut self.open[step.0 as usize] {
                open.blind = true;
            }
            return self.give_up(open.disk, from, open.effect);
        }
        let op = older.registers.begin(open.effect, open.first..open.last);
        let newer = self.disks[open.disk].as_ref();
        let (start, end) = (open.first as u64 * self.grain, open.last as u64 * self.grain);
        let shows = newer.is_some_and(|d| d.chain.contains(&from)) && !bottom.holds(open.disk, start, end).1;
        let other = Other {
            disk: open.disk,
            op: open.op,
            logged: open.logged,
            shows,
        };
        let logged = open.logged.map(|at| {
            let newer = self.disks[open.disk].as_mut().expect("open");
            newer.log[at].crossed = true;
            let entry = newer.log[at];
            let older = self.disks[from].as_mut().expect("just there");
            older.log.push(Logged { start: now, ..entry });
            older.log.len() - 1
        });
        let moved = Open {
            disk: from,
            op,
            logged,
            other: Some(other),
            ..open
        };
        self.open[step.0 as usize] = Some(moved);
        if logged.is_some() {
            self.loosen(from, open.first, open.last);
            self.crossed.extend([(step, from), (step, open.disk)]);
        }
    }

    /// A read that reached one of two disks is over: the grains that neither explains. It says nothing of the other disk, and
    /// one cannot tell which that is: neither learns from it.
    pub(super) fn end_read_of_two(
        &mut self,
        view: &View<'_>,
        step: StepId,
        open: Open,
        outcome: &Outcome,
    ) -> Result<Vec<Unexplained>, Violation> {
        let other = open.other.expect("two disks");
        let there = Open {
            disk: other.disk,
            op: other.op,
            ..open
        };
        let (one, two) = (
            self.try_read(view, step, open, outcome)?,
            self.try_read(view, step, there, outcome)?,
        );
        let neither = |(g, _): &(usize, _)| two.iter().any(|(other, _)| other == g);
        Ok(one.into_iter().filter(neither).collect())
    }

    /// As `end_read`, and what was seen is forgotten again.
    fn try_read(
        &mut self,
        view: &View<'_>,
        step: StepId,
        open: Open,
        outcome: &Outcome,
    ) -> Result<Vec<Unexplained>, Violation> {
        let before = self.disks[open.disk].as_ref().map(|d| d.registers.clone());
        let unexplained = self.end_read(view, step, open, outcome);
        if let (Some(d), Some(before)) = (&mut self.disks[open.disk], before) {
            d.registers = before;
            let unseen = vec![None; (open.last - open.first) * per_grain(self.grain)];
            d.registers.observe(open.op, &unseen, |_| ());
        }
        unexplained
    }

    /// Images were given other lengths, by this step at this time: those, with their length.
    fn resized(
        &mut self,
        scenario: &Scenario,
        world: &World,
        bottom: &Bottom,
        by: Option<(StepId, u64)>,
    ) -> Vec<(usize, u64)> {
        let mut resized = Vec::new();
        let meant = by.and_then(|(step, _)| resizes(scenario, world, step));
        for (i, image) in scenario.images.iter().enumerate() {
            let Some(facts) = world.files.get(image.file.as_str()) else {
                continue;
            };
            let bytes = match (image.format, &facts.qcow2) {
                (Format::Qcow2, Some(qcow2)) => qcow2.virtual_size,
                _ => facts.length,
            };
            let length = bytes.next_multiple_of(SECTOR);
            let Some(d) = &self.disks[i] else { continue };
            // A write to its last sector makes a raw file longer, and the model does not say so: it may be cut off at the same place again.
            let raw = image.format == Format::Raw && (d.bytes != bytes || meant == Some(i) && bytes < length);
            if d.length != length || raw {
                self.resize(i, bytes, by.map_or(0, |(_, now)| now));
                resized.push((i, length));
            }
        }
        for (below, _) in &resized {
            self.instant_is_gone(*below);
            self.shift_above(*below, bottom);
        }
        resized
    }

    /// Overlays of a disk that was cut off show that; only a filter in between makes this possible.
    fn shift_above(&mut self, below: usize, bottom: &Bottom) {
        let shows = |d: &Option<Disk>| d.as_ref().is_some_and(|d| d.chain.contains(&below));
        let mut above: Vec<usize> = (0..self.disks.len()).filter(|d| shows(&self.disks[*d])).collect();
        above.sort_by_key(|d| self.disks[*d].as_ref().map_or(0, |d| d.chain.len()));
        let ends = self.disks[below].as_ref().map_or([0; 2], |d| [d.length, d.bytes]);
        for disk in &above {
            let d = self.disks[*disk].as_mut().expect("found");
            for end in ends {
                if !end.is_multiple_of(self.grain) && !d.cuts.contains(&end) {
                    d.cuts.push(end);
                }
            }
            self.shift(*disk, bottom, false);
        }
        let window = self.window.get_or_insert_default();
        window.disks.retain(|d| !above.contains(d));
        window.disks.extend(above);
    }

    fn resize(&mut self, disk: usize, bytes: u64, now: u64) {
        let grain = self.grain;
        let length = bytes.next_multiple_of(SECTOR);
        let d = self.disks[disk].as_mut().expect("open");
        let old = std::mem::replace(&mut d.length, length);
        d.bytes = bytes;
        for cut in [old, length, bytes] {
            if cut % grain != 0 && !d.cuts.contains(&cut) {
                d.cuts.push(cut);
            }
        }
        let (kept, grains) = (
            index(old.min(length).div_ceil(grain)),
            index(length.div_ceil(grain)),
        );
        // What is cut off is gone: what grows back shows zeroes, and the layer decides it.
        d.cut_off = (d.cut_off.0.min(kept), now);
        d.grown = if length > old {
            d.grown.or(Some((index(old.div_ceil(grain)), now)))
        } else {
            d.grown.filter(|(first, _)| *first < kept)
        };
        d.registers.resize(old.min(length), grains);
        d.initial.resize(kept, 0);
        d.initial.resize(grains, 0);
        for (flags, new) in [
            (&mut d.loose, false),
            (&mut d.own, true),
            (&mut d.kept, false),
            (&mut d.filled, false),
        ] {
            flags.resize(kept, new);
            flags.resize(grains, new);
        }
        // The rest of the last sector is there as before, only empty. Of the grain at the end so little may be left that it shows zeroes.
        let end = index(bytes.div_ceil(grain)).min(kept);
        if (1..TELLING).contains(&(bytes % grain)) && bytes < old && end > 0 {
            d.registers.shift(end - 1, &[0], false);
            d.loose[end - 1] = true;
        }
        if end < kept && bytes < old {
            let cut = Cut {
                disk,
                first: end,
                last: kept,
                since: now,
            };
            self.cut_off(cut, false);
            self.window.get_or_insert_default().cut.push(cut);
        }
    }

    /// Empties the end of a sector. `over`: it is empty by now, but for what was written meanwhile.
    fn cut_off(&mut self, cut: Cut, over: bool) {
        let Some(d) = &mut self.disks[cut.disk] else {
            return;
        };
        for grain in cut.first..cut.last.min(d.initial.len()) {
            let written = d.log.iter().any(|l| l.covers(grain) && l.end >= cut.since);
            d.registers.shift(grain, &[0], over && !written);
            let was = std::mem::replace(&mut d.initial[grain], 0);
            if was != 0 && !d.former.contains(&(grain, was)) {
                d.former.push((grain, was));
            }
        }
    }

    /// A resize that storage failed left something, and nobody knows what.
    fn doubt_lengths(&mut self, scenario: &Scenario, world: &World, bottom: &Bottom) {
        for (disk, _) in self.resized(scenario, world, bottom, None) {
            self.disks[disk].as_mut().expect("open").unknown = true;
        }
    }
}

/// The image that this step gives a length.
fn resizes(scenario: &Scenario, world: &World, step: StepId) -> Option<usize> {
    match &scenario.steps.get(step.0 as usize)?.action {
        Action::Command { execute, arguments } if execute == "block_resize" => {
            let name = arguments.get("node-name")?;
            Data::disk_of(scenario, world, world.graph.find(name.as_str()?)?)
        }
        _ => None,
    }
}

#[cfg(test)]
#[path = "data_cut_tests.rs"]
mod tests;
