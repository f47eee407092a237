//! What backups leave behind.
//!
//! Rules: what a backup copies is known when it starts; where it has got to while it runs is not, so that what it may have copied is
//! unknown in the target until it has ended well. A guest's write makes sure of its clusters, like above any filter that keeps.
//! Unknown after an end that was not well: everything that was to be copied and that no guest has asked for. Unknown altogether: what is
//! discarded behind a copy (`discard-source`), and copies of which block status cannot be known.

use blkcheck_model::job::{Backup, Job, Sync};
use blkcheck_model::layer::Cell;
use blkcheck_model::perm::Driver;
use blkcheck_model::{NodeId, World};

use super::kept::{Can, Cluster};
use super::{Books, UNKNOWN};

impl Books {
    /// Backups that are new: what they are going to copy.
    pub(in crate::compare) fn backups_started(&mut self, before: &World, now: &World) {
        let new = now.jobs.iter().filter(|job| before.job(&job.id).is_none());
        for backup in new.filter_map(Job::backup) {
            self.backup_started(now, backup);
        }
    }

    fn backup_started(&mut self, world: &World, backup: &Backup) {
        let Some(filter) = backup.filter else { return };
        let kept = world.graph.node(filter).kept.as_ref();
        if kept.is_some_and(|kept| kept.discards_source) && Books::discards(world, backup.source) {
            self.lose(world, backup.source);
            self.lose(world, backup.target);
        }
        let name = world.graph.name(filter).to_owned();
        let Some(keeping) = self.kept.get(&name) else {
            return;
        };
        let size = keeping.grains_each();
        let states: Vec<Cluster> = (0..keeping.count())
            .map(|cluster| {
                let number = u64::try_from(cluster).expect("small");
                match (&backup.initial, backup.sync) {
                    (None, _) => Cluster::Unknown,
                    (Some(initial), _) if !initial.contains(number) => Cluster::Through,
                    (_, Sync::Top) => {
                        let grains = cluster * size..(cluster + 1) * size;
                        match self.holds_any(world, backup.source, grains) {
                            Can::Yes => Cluster::Waiting,
                            Can::No => Cluster::Through,
                            Can::Maybe => Cluster::Unknown,
                        }
                    }
                    _ => Cluster::Waiting,
                }
            })
            .collect();
        let copied: Vec<usize> = (0..states.len())
            .filter(|at| {
                backup.sync != Sync::None && matches!(states[*at], Cluster::Waiting | Cluster::Unknown)
            })
            .collect();
        for cluster in copied {
            let grains = cluster * size..(cluster + 1) * size;
            self.may_be_read(world, backup.source, grains.clone());
            self.may_be_written(world, backup.target, grains);
        }
        if let Some(keeping) = self.kept.get_mut(&name) {
            keeping.become_states(states);
        }
    }

    /// The layer of this node holds something in these grains.
    fn holds_any(&self, world: &World, node: NodeId, grains: std::ops::Range<usize>) -> Can {
        let facts = world.graph.node(node);
        match facts.driver {
            Driver::File | Driver::HostDevice | Driver::NullCo => Can::Yes,
            Driver::SnapshotAccess => Can::Maybe,
            Driver::Raw if facts.windowed => Can::Maybe,
            Driver::Qcow2 => {
                let file = world.image_file(node).and_then(|name| self.files.get(&*name));
                let Some(file) = file.filter(|file| !file.lost) else {
                    return Can::Maybe;
                };
                let end = grains.end.min(file.layer.len());
                let mut all = grains.start.min(end)..end;
                if all.clone().any(|grain| file.layer.is_allocated(grain)) {
                    Can::Yes
                } else if all.any(|grain| file.copied[grain].is_some()) {
                    Can::Maybe
                } else {
                    Can::No
                }
            }
            _ => world
                .graph
                .primary_child(node)
                .map_or(Can::Maybe, |below| self.holds_any(world, below, grains)),
        }
    }

    /// Something may be written here, nobody knows what or whether.
    fn may_be_written(&mut self, world: &World, node: NodeId, grains: std::ops::Range<usize>) {
        self.keep_first(world, node, grains.clone(), false);
        let Some(top) = Books::top(world, node) else {
            self.write(world, node, grains, Cell::Stamp(UNKNOWN));
            return;
        };
        let Some(file) = world.image_file(top).and_then(|name| self.files.get_mut(&*name)) else {
            return;
        };
        let end = grains.end.min(file.layer.len());
        for at in grains.start.min(end)..end {
            for grain in file.layer.cluster_of(at) {
                if file.layer.cells[grain] == Cell::Unallocated {
                    file.copied[grain] = Some(UNKNOWN);
                } else if at == grain {
                    file.layer.cells[grain] = Cell::Stamp(UNKNOWN);
                }
            }
        }
    }

    /// The run phase of a job went well: a backup has copied everything, from what there is now.
    pub(in crate::compare) fn ran(&mut self, world: &World, id: &str) {
        let Some(backup) = world.job(id).and_then(Job::backup) else {
            return;
        };
        let name = backup.filter.map(|filter| world.graph.name(filter).to_owned());
        let Some((name, keeping)) = name.and_then(|name| Some((name.clone(), self.kept.get(&name)?.clone())))
        else {
            return;
        };
        if backup.sync == Sync::None {
            return;
        }
        let waiting = |at: &usize| keeping.state(*at) == Cluster::Waiting;
        let due: Vec<usize> = (0..keeping.count()).filter(waiting).collect();
        self.copy_clusters(world, &name, (backup.source, backup.target), &due);
    }

    /// Something that this backup is still to copy can perhaps not be read, or not be written to its target.
    pub(in crate::compare) fn may_fail(&self, world: &World, backup: &Backup) -> bool {
        let filter = backup.filter.map(|filter| world.graph.name(filter));
        let Some(keeping) = filter.and_then(|name| self.kept.get(name)) else {
            return true;
        };
        let mut below = std::iter::successors(Some(backup.target), |node| world.graph.primary_child(*node));
        if below.any(|node| world.graph.node(node).driver == Driver::SnapshotAccess) {
            return true;
        }
        let end = usize::try_from(backup.length.div_ceil(self.grain)).unwrap_or(usize::MAX);
        let size = keeping.grains_each();
        let mut due = (0..keeping.count())
            .filter(|at| matches!(keeping.state(*at), Cluster::Waiting | Cluster::Unknown));
        due.any(|cluster| {
            let grains = cluster * size..((cluster + 1) * size).min(end);
            // What is written may need the rest of its cluster.
            [backup.source, backup.target]
                .iter()
                .any(|node| self.can_read(world, *node, grains.clone()) != Can::Yes)
        })
    }
}
