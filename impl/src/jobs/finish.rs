//! The end of a job: exit of its task, cancel, finalize, dismiss.
//!
//! Rules. Everything here runs under the main lock, except the first step of `exit`: the job stops being busy
//! before it queues for the lock, so a command that holds the lock and drains never waits for a job that is over.
//! Status order: waiting, pending, [prepare], concluded, null; or aborting, concluded, null. Exactly one of
//! BLOCK_JOB_COMPLETED and BLOCK_JOB_CANCELLED precedes `concluded`.
//! The jobs of a group wait for each other and become pending together; if one must be told to finalize, none does before.
//! One failure or cancel ends all of them as cancelled.
//!
//! Deviations: jobs of a group that were never started are ended with it (QEMU waits for them for ever); when `prepare` of one
//! job fails, it is that one which failed, whichever job finalize was asked of.

use std::rc::Rc;

use crate::error::{Errno, QmpError};
use crate::jobs::job::Job;
use crate::jobs::status::{JobStatus, Verb};
use crate::sync::turn;

impl Job {
    /// Last act of the job's task: `run` has returned `ret`.
    pub(crate) async fn exit(self: &Rc<Job>, ret: Result<(), Errno>) {
        assert!(self.busy.get());
        self.ret.set(ret);
        self.deferred.set(true);
        let layer = self.layer();
        self.busy.set(false);
        layer.kick();
        // The end of a job is an event of the main context of its own (QEMU: a bottom half), not the tail of its last
        // chunk: commands may come first.
        turn().await;
        let main = layer.main("job-exit").await;
        // Its group may have ended it already.
        if !self.status.get().is_completed() {
            self.completed().await;
        }
        layer.reap().await;
        drop(main);
    }

    /// The run phase is over: fail, or go on as far as the settings and the group allow.
    async fn completed(self: &Rc<Job>) {
        self.update_result();
        if self.ret.get().is_err() {
            return self.abort_group().await;
        }
        self.set_status(JobStatus::Waiting);
        let jobs = self.group().jobs();
        if jobs.iter().any(|job| !job.status.get().is_completed()) {
            return;
        }
        for job in &jobs {
            job.set_status(JobStatus::Pending);
            if !job.auto_finalize {
                job.emit_pending();
            }
        }
        if jobs.iter().all(|job| job.auto_finalize) {
            self.do_finalize().await;
        }
    }

    /// Turns a late cancel into the result, and any failure into the state aborting.
    fn update_result(&self) {
        if self.ret.get().is_ok() && self.is_cancelled() {
            self.ret.set(Err(Errno::ECANCELED));
        }
        if self.ret.get().is_err() {
            self.set_status(JobStatus::Aborting);
        }
    }

    /// Finalizes the whole group.
    async fn do_finalize(self: &Rc<Job>) {
        let jobs = self.group().jobs();
        for job in &jobs {
            let driver = Rc::clone(&job.driver);
            job.ret.set(driver.prepare(job).await);
            job.update_result();
            if job.ret.get().is_err() {
                return job.abort_group().await;
            }
        }
        for job in &jobs {
            job.conclude().await;
        }
    }

    /// This job failed or was cancelled: all others of its group are cancelled, then all are over.
    async fn abort_group(self: &Rc<Job>) {
        let txn = self.group();
        assert!(
            !txn.aborting.replace(true),
            "whoever drives a group to its end holds the main lock until it is empty"
        );
        for other in txn.jobs().iter().filter(|job| !Rc::ptr_eq(job, self)) {
            other.mark_cancelled();
        }
        while let Some(job) = txn.newest() {
            job.run_to_its_end().await;
            job.conclude().await;
        }
    }

    /// Waits until a cancelled job has nothing under way any more.
    async fn run_to_its_end(self: &Rc<Job>) {
        if self.status.get().is_completed() {
            return;
        }
        let layer = self.layer();
        while self.started.get() && !self.deferred.get() {
            self.enter();
            let progress = layer.inner.idle.listen();
            if !self.deferred.get() {
                progress.await;
            }
        }
        self.update_result();
    }

    /// The job is over, well or badly: make it so, clean up, tell, and dismiss if that is automatic.
    async fn conclude(self: &Rc<Job>) {
        self.update_result();
        let driver = Rc::clone(&self.driver);
        if self.ret.get().is_ok() {
            driver.commit(self);
        } else {
            driver.abort(self);
        }
        driver.clean(self).await;
        if self.started.get() {
            self.emit_over();
        }
        self.leave_txn();
        self.set_status(JobStatus::Concluded);
        self.layer().kick();
        if self.auto_dismiss || !self.started.get() {
            self.forget();
        }
    }

    /// Hard cancel. Returns before the job is over when its task has to notice first.
    pub(crate) async fn cancel(self: &Rc<Job>) {
        self.mark_cancelled();
        let waits = matches!(self.status.get(), JobStatus::Waiting | JobStatus::Pending);
        if !self.started.get() || waits {
            self.update_result();
            self.abort_group().await;
        } else {
            // A task whose run has returned queues for the main lock and sees the mark then.
            self.enter();
        }
    }

    /// `job-cancel`: always hard.
    pub(crate) async fn cancel_by_verb(self: &Rc<Job>) -> Result<(), QmpError> {
        Verb::Cancel.check(&self.name, self.status.get())?;
        self.cancel().await;
        Ok(())
    }

    /// `block-job-cancel`: refuses a job that the user paused, unless forced.
    pub(crate) async fn block_job_cancel(self: &Rc<Job>, force: bool) -> Result<(), QmpError> {
        if self.user_paused.get() && !force {
            let text = format!("The block job for device '{}' is currently paused", self.name);
            return Err(QmpError::generic(text));
        }
        self.cancel_by_verb().await
    }

    /// `job-finalize`.
    pub(crate) async fn finalize(self: &Rc<Job>) -> Result<(), QmpError> {
        Verb::Finalize.check(&self.name, self.status.get())?;
        self.do_finalize().await;
        Ok(())
    }

    /// `job-dismiss`.
    pub(crate) fn dismiss(self: &Rc<Job>) -> Result<(), QmpError> {
        Verb::Dismiss.check(&self.name, self.status.get())?;
        self.forget();
        Ok(())
    }

    /// A job that could not be started disappears without a trace but its events.
    pub(crate) fn early_fail(self: &Rc<Job>) {
        assert_eq!(self.status.get(), JobStatus::Created);
        self.forget();
    }
}
