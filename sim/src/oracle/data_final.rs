//! When nothing is under way any more: what nodes and closed images hold, all of it.

use blkcheck_model::Driver;
use blkcheck_model::World;
use blkcheck_model::layer::Format as LayerFormat;
use blkcheck_model::register::{Effect, Value};

use super::grains::{collect, content_text, explain, history, seen, torn_between_writes};
use super::{
    Data, Disk, FinalContent, Logged, Open, OracleName, SECTOR, Seen, View, Violation, index, status,
    violation,
};
use crate::follow::Follower;
use crate::scenario::{Format, Scenario};
use crate::stamp::{self, Content};

impl Data {
    /// All of a node or a closed image was read, with nothing under way.
    fn whole(&mut self, view: &View<'_>, disk: usize, content: &FinalContent<'_>) -> Result<(), Violation> {
        let grain = self.grain;
        let Some(d) = self.disks[disk].as_mut().filter(|d| !d.unknown) else {
            return Ok(());
        };
        let (first, last) = (0, d.initial.len());
        // A raw image's file may not be a whole number of sectors long.
        let image = view.scenario.images[disk].size;
        let shortest = if image.next_multiple_of(SECTOR) == d.length {
            image
        } else {
            d.length
        };
        let length = content.bytes.len() as u64;
        if length < shortest || length > d.length {
            let message = format!("{} is {length} bytes long, expected {}", content.name, d.length);
            return Err(violation(OracleName::Transparency, None, message, Vec::new()));
        }
        let op = d.registers.begin(Effect::Read, first..last);
        let open = Open {
            disk,
            op,
            logged: None,
            first,
            last,
            start: view.now,
            effect: Effect::Read,
            other: None,
            blind: false,
            status: None,
        };
        self.values.clear();
        let wrong = collect(content.bytes, 0, d, grain, &mut self.values, &open, view);
        self.values.resize(last, None);
        let verdict = self.judge(open, view.now);
        let d = self.disks[disk].as_ref().expect("judged");
        let (g, what) = match (wrong, verdict) {
            (Some((g, content)), _) => (g, format!("holds {}", content_text(view.scenario, content))),
            (None, Err(v)) => (v.grain, explain(view.scenario, d, &v, view.now)),
            (None, Ok(())) => return Ok(()),
        };
        let message = format!("at the end, {} at {:#x} {what}", content.name, g as u64 * grain);
        Err(violation(
            if d.target {
                OracleName::PointInTime
            } else {
                OracleName::Transparency
            },
            None,
            message,
            history(view.scenario, d, g),
        ))
    }

    /// An image above `chain`, of which (or of a layer below) what was not flushed may be lost.
    fn at_least_flushed(
        &self,
        view: &View<'_>,
        disk: usize,
        chain: &[usize],
        content: &FinalContent<'_>,
    ) -> Result<(), Violation> {
        let Some(d) = self.disks[disk].as_ref().filter(|d| !d.unknown) else {
            return Ok(());
        };
        let lost_below: Vec<&Disk> = chain
            .iter()
            .filter(|below| self.lost.contains(below))
            .filter_map(|below| self.disks[*below].as_ref())
            .collect();
        for (g, bytes) in content.bytes.chunks(index(self.grain)).enumerate() {
            let at = g as u64 * self.grain;
            let saw = match seen(bytes, at, &d.cuts, self.grain) {
                Seen::Value(value) => value,
                Seen::Skip => continue,
                Seen::Wrong(Content::Torn) if torn_between_writes(d, bytes, at, g, view.now) => continue,
                Seen::Wrong(content) => return Err(lost_text(view.scenario, d, g, disk, content)),
            };
            // Where it was flushed to hold the grain itself, nothing below shows.
            let below = !d.must_hold(g)
                && (d.loose.get(g) == Some(&true)
                    || lost_below.iter().any(|l| {
                        l.initial.get(g) == Some(&saw) || l.log.iter().any(|l| l.covers(g) && l.value == saw)
                    }));
            // Nothing need be lost: it may hold what it held last.
            let last = || d.registers.possible(g).contains(&saw);
            if !(below || d.may_be_left(g, saw) || last()) {
                return Err(lost_text(view.scenario, d, g, disk, stamp::read(bytes, at)));
            }
        }
        Ok(())
    }

    pub(crate) fn quiescent(
        &mut self,
        view: &View<'_>,
        follower: &Follower,
        contents: &[FinalContent<'_>],
    ) -> Result<(), Violation> {
        for content in contents {
            status::layer(content)?;
            let Some(node) = follower.world.graph.find(content.name) else {
                continue;
            };
            if follower.world.graph.node(node).driver == Driver::SnapshotAccess {
                self.whole_snapshot(view, &follower.world, node, content)?;
            }
            if let Some(disk) = Self::disk_of(view.scenario, &follower.world, node) {
                self.whole(view, disk, content)?;
            }
        }
        Ok(())
    }

    pub(crate) fn closed(
        &mut self,
        view: &View<'_>,
        follower: &Follower,
        contents: &[FinalContent<'_>],
    ) -> Result<(), Violation> {
        for content in contents {
            let Some(disk) = view.scenario.images.iter().position(|i| i.file == content.name) else {
                continue;
            };
            // The independent reader goes by the headers; a chain that was put together otherwise reads otherwise.
            let recorded = recorded_chain(view.scenario, &follower.world, disk);
            let Some(d) = self.disks[disk].as_ref() else {
                continue;
            };
            if Some(&d.chain) != recorded.as_ref() {
                continue;
            }
            if self.lost.contains(&disk) || d.chain.iter().any(|below| self.lost.contains(below)) {
                self.at_least_flushed(view, disk, &d.chain, content)?;
            } else {
                self.whole(view, disk, content)?;
            }
        }
        Ok(())
    }
}

impl Data {
    /// The power failed: what a good flush had found is there, and nothing that was never written. Judged are images, as long as
    /// they were, that stand on what they always stood on: with or without what streams took out, for a header may be behind.
    pub(crate) fn after_power_cut(
        &mut self,
        view: &View<'_>,
        contents: &[(FinalContent<'_>, Vec<usize>)],
    ) -> Result<(), Violation> {
        self.lost = (0..self.disks.len()).collect();
        for (content, below) in contents {
            let image = view.scenario.images.iter().position(|i| i.file == content.name);
            let Some((disk, d)) = image.and_then(|at| Some((at, self.disks[at].as_ref()?))) else {
                continue;
            };
            let length = (content.bytes.len() as u64).next_multiple_of(SECTOR);
            let stood = d.chain == *below || d.chains.contains(below);
            if stood && !d.moved && d.length == length {
                self.at_least_flushed(view, disk, below, content)?;
            }
        }
        Ok(())
    }
}

impl Disk {
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
        grain < self.cut_off
            && (self.own.get(grain) == Some(&true) && kept_since(0)
                || self.durable(grain).any(|l| !l.crossed && kept_since(l.start)))
    }

    /// Whether a grain may hold this after everything since the last good flush was lost in part.
    fn may_be_left(&self, grain: usize, value: Value) -> bool {
        // Copies are in no log.
        if value == 0 && self.is_discarded(grain) || self.target && self.former.contains(&(grain, value)) {
            return true;
        }
        // A write that is durable hides everything that ended before the write began.
        let hidden = |end: u64| self.durable(grain).any(|l| l.start > end);
        let initially = self.initial.get(grain) == Some(&value) && self.durable(grain).next().is_none();
        initially
            || self
                .log
                .iter()
                .any(|l| l.covers(grain) && l.value == value && (l.end == u64::MAX || !hidden(l.end)))
    }
}

fn lost_text(scenario: &Scenario, d: &Disk, grain: usize, disk: usize, content: Content) -> Violation {
    let message = format!(
        "after a failed flush or a power cut, {} at {:#x} holds {}, which a flush before had made impossible",
        scenario.images[disk].file,
        grain as u64 * u64::from(scenario.grain),
        content_text(scenario, content)
    );
    violation(
        OracleName::Transparency,
        None,
        message,
        history(scenario, d, grain),
    )
}

/// Images below by their headers; `None` when a name leads out of the scenario or the chain is a circle.
fn recorded_chain(scenario: &Scenario, world: &World, disk: usize) -> Option<Vec<usize>> {
    let mut chain = Vec::new();
    let mut at = disk;
    while scenario.images[at].format == Format::Qcow2 {
        let facts = world
            .files
            .get(scenario.images[at].file.as_str())?
            .qcow2
            .as_ref()?;
        let Some(backing) = &facts.backing else { break };
        let below = scenario.images.iter().position(|i| *i.file == *backing.file)?;
        let format = if scenario.images[below].format == Format::Raw {
            LayerFormat::Raw
        } else {
            LayerFormat::Qcow2(3)
        };
        let recorded_raw = !matches!(backing.format.as_deref(), Some("qcow2"));
        if recorded_raw != (format == LayerFormat::Raw) || chain.len() > scenario.images.len() {
            return None;
        }
        chain.push(below);
        at = below;
    }
    Some(chain)
}
