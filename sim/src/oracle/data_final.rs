//! When nothing is under way any more: what nodes and closed images hold, all of it.

use blkcheck_model::Driver;
use blkcheck_model::World;
use blkcheck_model::layer::Format as LayerFormat;
use blkcheck_model::register::Effect;

use super::grains::{collect, content_text, explain, history};
use super::lost::Left;
use super::sectors::per_grain;
use super::{Data, FinalContent, Open, OracleName, SECTOR, View, Violation, status, violation};
use crate::follow::Follower;
use crate::oracle::bottom::Bottom;
use crate::scenario::{Format, Scenario};

impl Data {
    /// All of a node or a closed image was read, with nothing under way.
    fn whole(&mut self, view: &View<'_>, disk: usize, content: &FinalContent<'_>) -> Result<(), Violation> {
        let grain = self.grain;
        let Some(d) = self.disks[disk].as_mut().filter(|d| !d.unknown) else {
            return Ok(());
        };
        let (first, last) = (0, d.initial.len());
        // A raw image's file may not be a whole number of sectors long.
        let length = content.bytes.len() as u64;
        if length < d.bytes.min(d.length) || length > d.length {
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
        let wrong = collect(content.bytes, 0, d, grain, &mut self.values);
        self.values.resize(last * per_grain(grain), None);
        let verdict = self.judge(open, view.now);
        let d = self.disks[disk].as_ref().expect("judged");
        let (part, what) = match (wrong, verdict) {
            (Some((part, content)), _) => (part, format!("holds {}", content_text(view.scenario, content))),
            (None, Some((part, v))) => (part, explain(view.scenario, d, &v, view.now)),
            (None, None) => return Ok(()),
        };
        let at = part as u64 * grain.min(SECTOR);
        let message = format!("at the end, {} at {at:#x} {what}", content.name);
        Err(violation(
            if d.target {
                OracleName::PointInTime
            } else {
                OracleName::Transparency
            },
            None,
            message,
            history(view.scenario, d, part / per_grain(grain)),
        ))
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
        (follower, bottom): (&Follower, &Bottom),
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
                self.at_least_flushed(view, bottom, Left { disk, below: None }, content)?;
            } else {
                self.whole(view, disk, content)?;
            }
        }
        Ok(())
    }
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
