//! The start of a backup: successor of the bitmap, filter, job; and the way back when one of them is refused.
//!
//! Rules: the source is drained from before the first check until the command is over, so all of it happens in one instant.
//! Which clusters are to be copied is fixed there too. QEMU does that when the job first runs: a guest's write that came before
//! was copied whatever the bitmap said, or copied twice.
//! A refusal takes everything back in the opposite order.

use std::cell::Cell;
use std::rc::{Rc, Weak};

use serde_json::{Map, Value, json};

use super::{Backup, BackupArgs, Plan, SyncMode, refuse};
use crate::Layer;
use crate::block_copy::{Watcher, check_smallest_cluster};
use crate::dirty::Use;
use crate::drivers::copy_before_write::{DISCARD_SOURCE, block_copy, retire};
use crate::env::Nanos;
use crate::error::QmpError;
use crate::event::Event;
use crate::graph::DrainGuard;
use crate::jobs::backup::BitmapMode;
use crate::jobs::error_policy::OnError;
use crate::jobs::job::{Job, JobSpec};
use crate::jobs::txn::JobTxn;
use crate::types::{NodeId, Perm};

/// A job follows the copying of all, and limits its own.
struct Follow(Weak<Job>);

impl Watcher for Follow {
    fn copied(&self, bytes: u64) {
        if let Some(job) = self.0.upgrade() {
            job.progress.set(job.progress.get() + bytes);
        }
    }

    fn remaining(&self, bytes: u64) {
        if let Some(job) = self.0.upgrade() {
            job.total.set(job.progress.get() + bytes);
        }
    }

    fn charge(&self, bytes: u64) -> Nanos {
        self.0.upgrade().map_or(0, |job| job.charge(bytes))
    }
}

impl Layer {
    /// Makes a backup job that is not started yet. Main lock held. `sections`: gets the drained section of the source.
    pub(crate) async fn prepare_backup(
        &self,
        args: &BackupArgs,
        txn: &Rc<JobTxn>,
        sections: &mut Vec<DrainGuard>,
    ) -> Result<Rc<Job>, QmpError> {
        let source = self.lookup(&args.device, &args.device)?;
        let target = self.lookup(&args.target, &args.target)?;
        sections.push(self.drained(source).await);
        let plan = self.backup_plan(args, source, target)?;
        let Some((bitmap, mode)) = &plan.bitmap else {
            return self.backup_with_successor(args, &plan, txn).await;
        };
        if *mode != BitmapMode::Never {
            bitmap.check(Use::Change)?;
        }
        let node = self.node(source);
        bitmap.create_successor(&node)?;
        let made = self.backup_with_successor(args, &plan, txn).await;
        if made.is_err() {
            bitmap.reclaim(&node);
        }
        made
    }

    async fn backup_with_successor(
        &self,
        args: &BackupArgs,
        plan: &Plan,
        txn: &Rc<JobTxn>,
    ) -> Result<Rc<Job>, QmpError> {
        let length = |node| {
            self.node_length(&self.node(node)).map_err(|errno| {
                let name = &self.node(node).name;
                QmpError::errno(&format!("Unable to get length for '{name}'"), errno)
            })
        };
        if length(plan.source)? != length(plan.target)? {
            return refuse("Source and target image have different sizes");
        }
        let filter = self.insert_backup_filter(args, plan).await?;
        let made = self.backup_with_filter(args, plan, txn, filter);
        if made.is_err() {
            self.drop_backup_filter(filter).await;
        }
        made
    }

    /// Opens the filter and moves the parents of the source above it.
    async fn insert_backup_filter(&self, args: &BackupArgs, plan: &Plan) -> Result<NodeId, QmpError> {
        let smallest = args.perf.min_cluster_size;
        check_smallest_cluster(smallest)?;
        let mut options = Map::new();
        options.insert("driver".into(), json!("copy-before-write"));
        options.insert("file".into(), json!(*self.node(plan.source).name));
        options.insert("target".into(), json!(*self.node(plan.target).name));
        if smallest > 0 {
            options.insert("min-cluster-size".into(), json!(smallest));
        }
        if args.discard_source {
            options.insert(DISCARD_SOURCE.into(), json!(true));
        }
        if let Some(name) = &args.filter_node_name {
            options.insert("node-name".into(), Value::from(&**name));
        }
        let filter = self
            .open_node(options)
            .await
            .map_err(|refusal| refusal.prefixed("Could not create node: "))?;
        if let Err(refusal) = self.insert_node(filter, plan.source).await {
            self.unhold(filter);
            return Err(refusal);
        }
        self.emit(|| Event::FilterInserted {
            filter,
            below: plan.source,
        });
        Ok(filter)
    }

    fn backup_with_filter(
        &self,
        args: &BackupArgs,
        plan: &Plan,
        txn: &Rc<JobTxn>,
        filter: NodeId,
    ) -> Result<Rc<Job>, QmpError> {
        let copy = block_copy(&self.node(filter)).expect("the filter was just opened");
        let (max_chunk, cluster) = (args.perf.max_chunk, copy.cluster());
        if max_chunk > 0 && max_chunk.unsigned_abs() < cluster {
            return refuse(format!(
                "Required max-chunk ({max_chunk}) is less than backup cluster size ({cluster})"
            ));
        }
        match &plan.bitmap {
            Some((bitmap, _)) if args.sync.goes_by_bitmap() => copy.restrict_to(bitmap),
            _ => copy.set_skip_unallocated(args.sync == SyncMode::Top),
        }
        if args.compress {
            copy.compress();
        }
        if args.perf.use_copy_range {
            copy.offload();
        }
        let backup = Rc::new(Backup {
            source: plan.source,
            filter: Cell::new(Some(filter)),
            copy: Rc::clone(&copy),
            sync: args.sync,
            bitmap: plan.bitmap.clone(),
            on_source_error: args.on_source_error,
            on_target_error: args.on_target_error,
            workers: usize::try_from(args.perf.max_workers)
                .expect("it was checked")
                .min(self.env().copies_in_flight()),
            max_chunk: max_chunk.unsigned_abs(),
        });
        let spec = JobSpec {
            id: args.job_id.clone(),
            on_error: OnError::default(),
            auto_finalize: args.auto_finalize,
            auto_dismiss: args.auto_dismiss,
        };
        let job = Job::create(self, spec, backup, txn)?;
        if let Err(refusal) = attach(&job, plan, filter, args.speed) {
            job.early_fail();
            return Err(refusal);
        }
        copy.watch(Some(Rc::new(Follow(Rc::downgrade(&job)))));
        // Its bitmap and what it holds are asked for until the end, also if it leaves the filter's chain.
        self.hold(plan.source);
        Ok(job)
    }

    /// Takes the filter out of the graph. Where somebody has frozen the link to it (QEMU aborts then) it stays as one that
    /// keeps nothing, lets go of its target, and goes with its parents.
    pub(super) async fn drop_backup_filter(&self, filter: NodeId) {
        let node = self.node(filter);
        let copy = block_copy(&node).expect("a filter is open until it is dropped");
        copy.watch(None);
        if self.drop_filter(filter).await.is_err() {
            let drained = self.drained(filter).await;
            let write = self.graph_write().await;
            retire(&self.cx(&node));
            self.detach(copy.target());
            drop(write);
            drop(drained);
        }
        self.unhold(filter);
    }
}

/// The job's edges and speed.
fn attach(job: &Rc<Job>, plan: &Plan, filter: NodeId, speed: i64) -> Result<(), QmpError> {
    job.add_edge("main node", filter, Perm::empty(), Perm::all())?;
    job.set_speed(speed)?;
    job.add_edge("target", plan.target, Perm::empty(), Perm::all())?;
    Ok(())
}
