//! `blockdev-backup`: refusals in QEMU's order, what the job holds while it runs, and what its end does.
//!
//! Rules: a copy-before-write filter goes above `device`, with everything that was above that; the job has an edge on the
//! filter and one on the target, none on the source. What is copied is the source as it was when the command was carried
//! out. A bitmap is used up by it: from then on its successor records, and the end decides what of the two is left. The
//! end, good or bad, takes edges and filter away; a concluded job holds nothing.
//! Differs from QEMU 10.0: a filter that is part of a frozen chain stays, as one that keeps nothing; there the daemon aborts. The
//! source cannot be deleted while its backup runs, wherever it is in the graph, and goes after the filter when nobody else holds it;
//! there the daemon aborts. A transaction that is taken back leaves bitmaps as they were, and answers whatever it had made.

use std::rc::Rc;

use crate::bitmap::Spans;
use crate::blockers::Op;
use crate::command::args::Args;
use crate::command::bitmap::{check_change, check_shown};
use crate::command::{filters, jobs, lookup};
use crate::copy_before_write::{Manner, OnError, rounded_out, too_large};
use crate::graph::{Graph, NodeId, Parent};
use crate::job::{Asked, Backup, BitmapMode, Job, JobKind, Outcome, Sync, Work};
use crate::perm::{Driver, Masks};
use crate::refusal::Refusal;
use crate::world::World;

/// `sync`, as given.
const SYNC: [&str; 5] = ["top", "full", "none", "incremental", "bitmap"];
const BITMAP_MODE: [&str; 3] = ["on-success", "never", "always"];
const MOST_WORKERS: i64 = i32::MAX as i64;

/// The arguments, as given.
#[derive(Debug)]
pub(crate) struct Request<'a> {
    asked: Asked<'a>,
    device: &'a str,
    target: &'a str,
    sync: &'a str,
    bitmap: Option<&'a str>,
    bitmap_mode: Option<&'a str>,
    compress: bool,
    filter_name: Option<&'a str>,
    discards_source: bool,
    tuning: Tuning,
}

/// `x-perf`.
#[derive(Clone, Copy, Debug)]
struct Tuning {
    max_workers: i64,
    max_chunk: i64,
    min_cluster: u64,
}

impl Tuning {
    fn parse(args: &Args<'_>) -> Result<Tuning, Refusal> {
        let mut tuning = Tuning {
            max_workers: 64,
            max_chunk: 0,
            min_cluster: 0,
        };
        if let Some(perf) = args.opt_object("x-perf")? {
            perf.opt_bool("use-copy-range")?;
            tuning.max_workers = perf.opt_int("max-workers")?.unwrap_or(tuning.max_workers);
            tuning.max_chunk = perf.opt_int("max-chunk")?.unwrap_or(0);
            tuning.min_cluster = perf.opt_size("min-cluster-size")?.unwrap_or(0);
            perf.finish()?;
        }
        Ok(tuning)
    }
}

impl<'a> Request<'a> {
    /// The arguments of the command, or of the action.
    pub(crate) fn parse(args: Args<'a>) -> Result<Request<'a>, Refusal> {
        let id = args.opt_str("job-id")?;
        let device = args.str("device")?;
        let sync = args.one_of("sync", &SYNC)?;
        let speed = args.opt_int("speed")?.unwrap_or(0);
        let bitmap = args.opt_str("bitmap")?;
        let bitmap_mode = args.opt_enum("bitmap-mode", &BITMAP_MODE)?;
        let compress = args.opt_bool("compress")?.unwrap_or(false);
        args.opt_enum("on-source-error", &jobs::ON_ERROR)?;
        args.opt_enum("on-target-error", &jobs::ON_ERROR)?;
        let asked = Asked {
            id,
            speed,
            auto_finalize: args.opt_bool("auto-finalize")?.unwrap_or(true),
            auto_dismiss: args.opt_bool("auto-dismiss")?.unwrap_or(true),
        };
        let request = Request {
            asked,
            device,
            sync,
            bitmap,
            bitmap_mode,
            compress,
            filter_name: args.opt_str("filter-node-name")?,
            discards_source: args.opt_bool("discard-source")?.unwrap_or(false),
            tuning: Tuning::parse(&args)?,
            target: args.str("target")?,
        };
        args.finish()?;
        Ok(request)
    }

    /// Makes the job, in this group or in one of its own; its id.
    pub(crate) fn carry_out(&self, world: &mut World, group: Option<u32>) -> Result<Rc<str>, Refusal> {
        let source = lookup(world, self.device, self.device)?;
        let target = lookup(world, self.target, self.target)?;
        let (sync, bitmap) = self.what(world, source)?;
        self.check_nodes(world, source, target)?;
        if let Some((at, mode)) = bitmap {
            world.give_successor(source, at, mode)?;
        }
        let length = world.graph.node(source).length;
        if length != world.graph.node(target).length {
            return Err(Refusal::new("Source and target image have different sizes"));
        }
        let filter = self.insert_filter(world, source, target)?;
        let kept = world
            .graph
            .node(filter)
            .kept
            .clone()
            .expect("a filter that keeps");
        let chunk = self.tuning.max_chunk.unsigned_abs();
        if chunk > 0 && chunk < kept.cluster {
            return Err(Refusal::new(format!(
                "Required max-chunk ({chunk}) is less than backup cluster size ({})",
                kept.cluster
            )));
        }
        let of_bitmap = |at: usize| &world.graph.node(source).bitmaps[at];
        let backup = Backup {
            source,
            target,
            filter: Some(filter),
            cluster: kept.cluster,
            length,
            reach: length,
            sync,
            initial: match bitmap.filter(|_| sync == Sync::Bitmap) {
                Some((at, _)) => rounded_out(of_bitmap(at), kept.cluster),
                None => kept.initial,
            },
            bitmap: bitmap.map(|(at, mode)| (of_bitmap(at).name.clone(), mode)),
        };
        self.create_job(world, filter, group, backup)
    }

    /// What is copied, and the place of the bitmap that is used.
    fn what(&self, world: &World, source: NodeId) -> Result<(Sync, Option<(usize, BitmapMode)>), Refusal> {
        let mut mode = self.bitmap_mode;
        if matches!(self.sync, "bitmap" | "incremental") && self.bitmap.is_none() {
            return Err(Refusal::new(format!(
                "must provide a valid bitmap name for '{}' sync mode",
                self.sync
            )));
        }
        if self.sync == "incremental" {
            if mode.is_some_and(|mode| mode != "on-success") {
                return Err(Refusal::new(
                    "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
                ));
            }
            mode = Some("on-success");
        }
        let sync = match self.sync {
            "full" => Sync::Full,
            "top" => Sync::Top,
            "none" => Sync::None,
            _ => Sync::Bitmap,
        };
        let Some(name) = self.bitmap else {
            return match mode {
                Some(_) => Err(Refusal::new("Cannot specify bitmap sync mode without a bitmap")),
                None => Ok((sync, None)),
            };
        };
        let bitmaps = &world.graph.node(source).bitmaps;
        let at = bitmaps
            .iter()
            .position(|bitmap| &*bitmap.name == name)
            .ok_or_else(|| Refusal::new(format!("Bitmap '{name}' could not be found")))?;
        let mode = match mode {
            Some("on-success") => BitmapMode::OnSuccess,
            Some("never") => BitmapMode::Never,
            Some(_) => BitmapMode::Always,
            None => {
                return Err(Refusal::new(
                    "Bitmap sync mode must be given when providing a bitmap",
                ));
            }
        };
        check_shown(&bitmaps[at])?;
        if sync == Sync::None {
            return Err(Refusal::new(
                "sync mode 'none' does not produce meaningful bitmap outputs",
            ));
        }
        if mode == BitmapMode::Never && sync != Sync::Bitmap {
            return Err(Refusal::new(format!(
                "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{}'",
                sync.name()
            )));
        }
        Ok((sync, Some((at, mode))))
    }

    fn check_nodes(&self, world: &World, source: NodeId, target: NodeId) -> Result<(), Refusal> {
        let graph = &world.graph;
        if source == target {
            return Err(Refusal::new("Source and target cannot be the same"));
        }
        if self.compress && !graph.takes_compressed(target) {
            // The name of a device, which there is none of here.
            return Err(Refusal::new("Compression is not supported for this drive "));
        }
        graph.check_op(source, Op::BackupSource)?;
        graph.check_op(target, Op::BackupTarget)?;
        if !(1..=MOST_WORKERS).contains(&self.tuning.max_workers) {
            return Err(Refusal::new(format!(
                "max-workers must be between 1 and {MOST_WORKERS}"
            )));
        }
        if self.tuning.max_chunk < 0 {
            return Err(Refusal::new(
                "max-chunk must be zero (which means no limit) or positive",
            ));
        }
        Ok(())
    }

    fn insert_filter(&self, world: &mut World, source: NodeId, target: NodeId) -> Result<NodeId, Refusal> {
        let min_cluster = self.tuning.min_cluster;
        if i64::try_from(min_cluster).is_err() {
            return Err(too_large(min_cluster, i64::MAX.unsigned_abs()));
        }
        let manner = Manner {
            min_cluster,
            on_error: OnError::BreakGuestWrite,
            discards_source: self.discards_source,
        };
        let filter = filters::open_backup_filter(world, self.filter_name, (source, target), manner)
            .map_err(|refusal| refusal.prefixed("Could not create node: "))?;
        world
            .graph
            .replace_node(source, filter)
            .map_err(|refusal| refusal.prefixed("Could not replace node: "))?;
        Ok(filter)
    }

    fn create_job(
        &self,
        world: &mut World,
        filter: NodeId,
        group: Option<u32>,
        backup: Backup,
    ) -> Result<Rc<str>, Refusal> {
        let id = jobs::check_id(world, self.asked.id)?;
        let group = group.unwrap_or_else(|| world.new_group());
        let (source, target) = (backup.source, backup.target);
        let mut job = Job::new(id.clone(), &self.asked, group, Work::Backup(backup));
        // From here on a refusal is that of a job which exists.
        attach_job(&mut world.graph, &mut job, filter, target).map_err(|refusal| Refusal {
            early_failed_job: Some(id.clone()),
            ..refusal
        })?;
        world.graph.node_mut(source).held_by_jobs += 1;
        world.jobs.insert(0, job);
        Ok(id)
    }
}

fn attach_job(graph: &mut Graph, job: &mut Job, filter: NodeId, target: NodeId) -> Result<(), Refusal> {
    let on = Parent::Job(job.id.clone(), JobKind::Backup);
    let main = graph.attach_root(on.clone(), filter, "main node", Masks::NONE)?;
    jobs::check_speed(job.speed)?;
    let target = graph.attach_root(on, target, "target", Masks::NONE)?;
    job.edges = vec![target, main];
    Ok(())
}

impl Graph {
    /// What is written to the node may be compressed.
    fn takes_compressed(&self, id: NodeId) -> bool {
        match self.node(id).driver {
            Driver::Qcow2 => true,
            Driver::CopyOnRead | Driver::Throttle => self
                .filter_child(id)
                .is_some_and(|below| self.takes_compressed(below)),
            _ => false,
        }
    }
}

/// The job at this place of the list went through its completion.
pub(crate) fn complete(world: &mut World, at: usize, outcome: Outcome) {
    let job = &mut world.jobs[at];
    job.outcome = Some(outcome);
    let waited = job.waited;
    let edges = std::mem::take(&mut job.edges);
    let Work::Backup(backup) = &mut job.work else {
        unreachable!("a backup is completed")
    };
    let filter = backup.filter.take().expect("a backup ends once");
    let copied_all = waited && backup.reach == backup.length;
    let (source, bitmap) = (backup.source, backup.bitmap.clone());
    if let Some((name, mode)) = bitmap {
        world.end_successor(source, &name, mode, outcome == Outcome::Success, copied_all);
    }
    for edge in edges {
        world.graph.remove_edge_and_refresh(edge);
    }
    let graph = &mut world.graph;
    if graph.attempt(|graph| graph.drop_filter(filter)).is_err() {
        retire(graph, filter);
    }
    graph.node_mut(filter).held_by_jobs -= 1;
    graph.node_mut(source).held_by_jobs -= 1;
}

/// The chain through the filter is frozen: it stays where it is and keeps nothing any more.
fn retire(graph: &mut Graph, filter: NodeId) {
    let target = graph.children(filter).find(|(_, edge)| edge.name == "target");
    if let Some((link, _)) = target {
        graph.remove_edge_and_refresh(link);
    }
    if let Some(kept) = &mut graph.node_mut(filter).kept {
        kept.initial = Some(Spans::default());
    }
}

impl World {
    /// A bitmap is used by a backup: what is written from now on is recorded by its successor.
    fn give_successor(&mut self, node: NodeId, at: usize, mode: BitmapMode) -> Result<(), Refusal> {
        let number = self.graph.next_bitmap();
        let bitmap = &mut self.graph.node_mut(node).bitmaps[at];
        if mode != BitmapMode::Never {
            check_change(bitmap)?;
        }
        bitmap.give_successor(number);
        Ok(())
    }

    /// The backup that used a bitmap is over.
    fn end_successor(&mut self, node: NodeId, name: &str, mode: BitmapMode, well: bool, copied_all: bool) {
        let bitmaps = &mut self.graph.node_mut(node).bitmaps;
        let at = bitmaps
            .iter()
            .position(|bitmap| &*bitmap.name == name)
            .expect("a bitmap in use is not removed");
        if mode == BitmapMode::Never || (mode == BitmapMode::OnSuccess && !well) {
            bitmaps[at].take_successor_in();
            return;
        }
        let mut heir = bitmaps.remove(at).into_successor();
        if !well && !copied_all {
            // What had not been copied is dirty as well; how far the copying had come is not known here.
            heir.dirty = None;
        }
        let place = bitmaps.partition_point(|other| other.number > heir.number);
        bitmaps.insert(place, heir);
    }
}
