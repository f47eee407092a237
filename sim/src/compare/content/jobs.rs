//! What a stream leaves behind.

use blkcheck_model::job::Work;
use blkcheck_model::layer::Cell;
use blkcheck_model::{Driver, NodeId, Outcome, World};

use super::{Books, UNKNOWN};

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
            if outcome == Outcome::Success && world.graph.chain_child(bottom).is_none() {
                return self.holds_what_it_showed(world, device);
            }
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

    /// Everything below a device goes, and it shows by itself what it showed. How much of what is zero was copied is not known, nor
    /// how.
    fn holds_what_it_showed(&mut self, world: &World, device: NodeId) {
        let view = self.view(world, device);
        let (Some(view), Some(name)) = (view, world.image_file(device)) else {
            return self.lose(world, device);
        };
        let Some(file) = self.files.get_mut(&*name) else {
            return;
        };
        let shows = |grain: usize| view.get(grain).copied().unwrap_or(0);
        for grain in 0..file.layer.len() {
            if file.layer.cells[grain] != Cell::Unallocated {
                continue;
            }
            let mut cluster = file.layer.cluster_of(grain);
            if cluster.any(|other| !matches!(shows(other), 0 | UNKNOWN)) {
                file.layer.cells[grain] = Cell::Stamp(shows(grain));
                file.murky[grain] = shows(grain) == 0;
            } else {
                file.copied[grain] = Some(shows(grain));
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

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;
    use crate::compare::content::{code, said};
    use crate::follow::world_of;
    use crate::oracle::tests::scenario_of;
    use crate::scenario::Scenario;
    use crate::stamp::Source;

    /// Images b, s over it and t, b with data in its first half; the snapshot p of s, and o over that.
    fn over_a_snapshot(base: Option<&str>) -> (Scenario, World, Books) {
        let image = |name: &str, fill: Value| json!({"file": name, "format": "qcow2", "size": 8192, "cluster-size": 2048, "fill": fill});
        let data = json!([{"offset": 0, "length": 4096, "stored": "data"}]);
        let images = [
            image("b", data),
            image("s", json!([])),
            image("t", json!([])),
            image("o", json!([])),
        ];
        let scenario = json!({"version": 1, "grain": 512, "images": images, "steps": []});
        let scenario = scenario_of(&scenario.to_string());
        let mut world = world_of(&scenario);
        let mut books = Books::of(&scenario);
        let node = |name: &str, backing: Value| {
            let file = json!({"driver": "file", "filename": name});
            json!({"driver": "qcow2", "node-name": name, "backing": backing, "file": file})
        };
        let mut stream = json!({"job-id": "j", "device": "o"});
        if let Some(base) = base {
            stream["base-node"] = json!(base);
        }
        let commands = [
            ("blockdev-add", node("b", Value::Null)),
            ("blockdev-add", node("s", json!("b"))),
            ("blockdev-add", node("t", Value::Null)),
            (
                "blockdev-add",
                json!({"driver": "copy-before-write", "node-name": "c", "file": "s", "target": "t"}),
            ),
            (
                "blockdev-add",
                json!({"driver": "snapshot-access", "node-name": "p", "file": "c"}),
            ),
            ("blockdev-add", node("o", json!("p"))),
            ("block-stream", stream),
        ];
        for (execute, arguments) in &commands {
            let done = world.execute(&blkcheck_model::Command::new(execute, arguments));
            assert!(done.is_ok(), "{execute}: {done:?}");
            books.kept(&world);
        }
        (scenario, world, books)
    }

    #[test]
    fn a_stream_over_a_snapshot_leaves_what_was_shown() {
        let (_, world, mut books) = over_a_snapshot(None);
        let o = world.graph.find("o").expect("open");
        let fill = code(Source::Fill { image: 0, fill: 0 });
        let shown = books.view(&world, o).expect("known");
        assert_eq!((shown[0], shown[7], shown[8]), (fill, fill, 0));
        books.completed(&world, "j", Outcome::Success);
        let cells = &books.files["o"].layer.cells;
        assert_eq!(cells[7], Cell::Stamp(fill), "{}", said(fill));
        assert_eq!(cells[8], Cell::Unallocated, "copied or not, it reads the same");
        assert_eq!(books.files["o"].copied[8], Some(0));
        assert!(!books.files["o"].lost);
    }

    #[test]
    fn what_a_stream_leaves_that_fails_or_does_not_go_to_the_end_is_not_known() {
        let (_, world, mut books) = over_a_snapshot(None);
        books.completed(&world, "j", Outcome::Failed);
        assert!(books.files["o"].lost);
        let (_, world, mut books) = over_a_snapshot(Some("p"));
        books.completed(&world, "j", Outcome::Success);
        assert!(books.files["o"].lost, "p is still below");
    }
}
