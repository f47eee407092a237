//! What a stream leaves behind.

use blkcheck_model::job::Work;
use blkcheck_model::layer::Cell;
use blkcheck_model::{Driver, NodeId, Outcome, World};

use super::Books;

impl Books {
    /// A job is about to complete in the world.
    pub(in crate::compare) fn completed(&mut self, world: &World, id: &str, outcome: Outcome) {
        let Some(job) = world.job(id) else { return };
        let stream = match &job.work {
            Work::Stream(stream) => stream,
            // What it copied was noted when it had.
            Work::Backup(_) => return,
        };
        let device = world.graph.skip_filters(stream.device);
        let bottom = stream.base_overlay;
        let Some(grains) = world
            .image_file(device)
            .and_then(|f| Some(self.files.get(&*f)?.layer.len()))
        else {
            return;
        };
        let snapshots = |id: NodeId| world.graph.node(id).driver == Driver::SnapshotAccess;
        if world.graph.chain(device).any(snapshots) {
            self.lose(world, device);
        }
        let wanted = self.in_range(world, device, bottom, 0..grains);
        for grain in wanted {
            if outcome == Outcome::Success {
                self.populate_copied(world, device, grain..grain + 1);
            } else {
                self.may_be_copied(world, device, grain..grain + 1);
            }
        }
        if outcome == Outcome::Success {
            self.fill_cut_off(world, device, bottom, grains);
            return;
        }
        // Zeroes behind the end of a short layer may have been copied as well.
        for grain in 0..grains {
            if self.is_cut_off(world, device, bottom, grain) {
                self.may_be_copied(world, device, grain..grain + 1);
            }
        }
    }

    /// Where a dropped layer was too short, zeroes must stay zeroes; with no base there is nothing to show through.
    pub(super) fn fill_cut_off(&mut self, world: &World, device: NodeId, bottom: NodeId, grains: usize) {
        let Some(view) = self.view(world, device) else {
            return;
        };
        let base = world
            .graph
            .chain_child(bottom)
            .and_then(|base| self.view(world, base));
        let Some(name) = world.image_file(device) else {
            return;
        };
        let Some(file) = self.files.get(&*name) else {
            return;
        };
        let open: Vec<usize> = (0..grains)
            .filter(|g| file.layer.cells[*g] == Cell::Unallocated)
            .collect();
        for grain in open {
            let shows = base.as_ref().and_then(|b| b.get(grain)).copied().unwrap_or(0);
            if view.get(grain).copied().unwrap_or(0) != shows {
                self.populate_copied(world, device, grain..grain + 1);
            } else if self.is_cut_off(world, device, bottom, grain) {
                // Copied or not, it reads the same.
                self.may_be_copied(world, device, grain..grain + 1);
            }
        }
    }

    /// Some layer below the top, down to `bottom`, is too short for the grain.
    pub(super) fn is_cut_off(&self, world: &World, top: NodeId, bottom: NodeId, grain: usize) -> bool {
        let below = world.graph.chain(top).skip(1);
        let mut past = top == bottom;
        for node in below {
            if past {
                return false;
            }
            if grain as u64 * self.grain >= world.graph.node(node).length {
                return true;
            }
            past = node == bottom;
        }
        false
    }

    /// Every job that did not end may have copied something.
    pub(in crate::compare) fn jobs_given_up(&mut self, world: &World) {
        for job in world.jobs.iter().filter(|j| j.outcome.is_none()) {
            self.completed(world, &job.id, Outcome::Cancelled);
        }
    }
}
