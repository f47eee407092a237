//! blockdev-backup: run phase and end.
//!
//! Rules: `sync=top` first asks for every cluster whether the source's first layer holds it; while it asks, whatever is copied
//! leaves out what that layer does not hold. `sync=none` copies nothing by itself and can only be cancelled. Everything else
//! is one block-copy call over the whole source, begun again after a pause, a wait for the rate limit, or an error that does
//! not end the job; guests copy beside it. The pause points have nothing of the job in flight.
//! The filter stays until the job is over, so also while it is pending: guests go on copying, which by then is nothing.

use std::rc::Rc;

use super::{Backup, BitmapMode, SyncMode};
use crate::Layer;
use crate::block_copy::{Call, Failure, Outcome};
use crate::env::Fut;
use crate::error::Errno;
use crate::jobs::error_policy::ErrorAction;
use crate::jobs::job::{Job, JobDriver};
use crate::sync::turn;

impl JobDriver for Backup {
    fn kind(&self) -> &'static str {
        "backup"
    }

    fn run<'a>(&'a self, job: &'a Rc<Job>) -> Fut<'a, Result<(), Errno>> {
        Box::pin(self.run_backup(job))
    }

    fn prepare<'a>(&'a self, _job: &'a Rc<Job>) -> Fut<'a, Result<(), Errno>> {
        // Something else came below the filter, and ended too early (QEMU reads past its end, which fails as well).
        let lost = self.copy.lost_some();
        Box::pin(std::future::ready(if lost { Err(Errno::EIO) } else { Ok(()) }))
    }

    fn commit(&self, job: &Rc<Job>) {
        self.settle_bitmap(job, true);
    }

    fn abort(&self, job: &Rc<Job>) {
        self.settle_bitmap(job, false);
    }

    fn clean<'a>(&'a self, job: &'a Rc<Job>) -> Fut<'a, ()> {
        Box::pin(async move {
            job.remove_edges();
            let filter = self.filter.take().expect("a job is cleaned once");
            let layer = job.layer();
            layer.drop_backup_filter(filter).await;
            layer.unhold(self.source);
        })
    }
}

impl Backup {
    async fn run_backup(&self, job: &Rc<Job>) -> Result<(), Errno> {
        let layer = job.layer();
        job.total.set(job.progress.get() + self.copy.remaining());
        match self.sync {
            SyncMode::None => {
                while !job.is_cancelled() {
                    job.idle().await;
                }
                return Ok(());
            }
            SyncMode::Top => self.ask_for_all(&layer, job).await?,
            SyncMode::Full | SyncMode::Incremental | SyncMode::Bitmap => {}
        }
        self.copy_all(&layer, job).await
    }

    /// Forgets what the source's first layer does not hold.
    async fn ask_for_all(&self, layer: &Layer, job: &Job) -> Result<(), Errno> {
        let mut offset = 0;
        while offset < self.copy.reach() {
            job.pause_point().await;
            if job.is_cancelled() {
                return Err(Errno::ECANCELED);
            }
            let read = layer.graph_read().await;
            offset = self.copy.look_at(layer, offset).await?;
            drop(read);
            // A long stretch of nothing must not keep the guests waiting.
            turn().await;
        }
        self.copy.set_skip_unallocated(false);
        Ok(())
    }

    async fn copy_all(&self, layer: &Layer, job: &Job) -> Result<(), Errno> {
        loop {
            let call = Call {
                range: 0..self.copy.reach(),
                workers: self.workers,
                max_chunk: self.max_chunk,
                background: true,
                go_on: &|| job.may_go_on(),
            };
            let outcome = self.copy.run(layer, &call).await;
            if job.is_cancelled() {
                return Ok(());
            }
            match outcome {
                Outcome::Done => return Ok(()),
                Outcome::Stopped => job.pause_point().await,
                // Asked anew: the speed may be another one by now.
                Outcome::Throttled => job.sleep(job.charge(0)).await,
                Outcome::Failed(failure) => {
                    if self.decide(job, failure) == ErrorAction::Report {
                        return Err(failure.errno);
                    }
                    job.pause_point().await;
                }
            }
        }
    }

    fn decide(&self, job: &Job, failure: Failure) -> ErrorAction {
        let (policy, operation) = if failure.read {
            (self.on_source_error, "read")
        } else {
            (self.on_target_error, "write")
        };
        job.error_action_by(policy, operation, failure.errno)
    }

    /// What becomes of the bitmap. What a guest is copying right now, and may fail at, counts as not copied. A job that was
    /// never started belongs to a command that is refused: the bitmap is as it was.
    fn settle_bitmap(&self, job: &Job, success: bool) {
        let Some((bitmap, mode)) = &self.bitmap else {
            return;
        };
        let node = job.layer().node(self.source);
        let anew = match mode {
            BitmapMode::OnSuccess => success,
            BitmapMode::Always => job.started.get(),
            BitmapMode::Never => false,
        };
        if !anew {
            return bitmap.reclaim(&node);
        }
        bitmap.abdicate(&node);
        if !success {
            self.copy.merge_uncopied_into(bitmap);
        }
    }
}
