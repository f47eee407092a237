//! The end of a job: exit of its task, cancel, finalize, dismiss.
//!
//! Rules. Everything here runs under the main lock, except the first step of `exit`: the job stops being busy
//! before it queues for the lock, so a command that holds the lock and drains never waits for a job that is over.
//! Status order: waiting, pending, [prepare], concluded, null; or aborting, concluded, null. Exactly one of
//! BLOCK_JOB_COMPLETED and BLOCK_JOB_CANCELLED precedes `concluded`.
//! A transaction holds one job, so "all jobs of the transaction" is this one.

use std::rc::Rc;
use std::task::Poll;

use crate::error::{Errno, QmpError};
use crate::jobs::job::Job;
use crate::jobs::status::{JobStatus, Verb};

/// Lets every other task that can go on do so once.
async fn step_aside() {
    let mut stood = false;
    std::future::poll_fn(|cx| {
        if std::mem::replace(&mut stood, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}

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
        step_aside().await;
        let main = layer.main("job-exit").await;
        self.completed().await;
        layer.reap().await;
        drop(main);
    }

    /// The run phase is over: fail, or go on as far as the settings allow.
    async fn completed(self: &Rc<Job>) {
        self.update_result();
        if self.ret.get().is_err() {
            return self.conclude().await;
        }
        self.set_status(JobStatus::Waiting);
        self.set_status(JobStatus::Pending);
        if self.auto_finalize {
            self.do_finalize().await;
        } else {
            self.emit_pending();
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

    async fn do_finalize(self: &Rc<Job>) {
        let driver = Rc::clone(&self.driver);
        self.ret.set(driver.prepare(self).await);
        self.update_result();
        self.conclude().await;
    }

    /// The job is over, well or badly: clean up, tell, and dismiss if that is automatic.
    async fn conclude(self: &Rc<Job>) {
        let driver = Rc::clone(&self.driver);
        driver.clean(self).await;
        if self.started.get() {
            self.emit_over();
        }
        self.set_status(JobStatus::Concluded);
        self.layer().kick();
        if self.auto_dismiss || !self.started.get() {
            self.forget();
        }
    }

    /// Hard cancel. Returns before the job is over when its task has to notice first.
    pub(crate) async fn cancel(self: &Rc<Job>) {
        self.mark_cancelled();
        if !self.started.get() || self.status.get() == JobStatus::Pending {
            self.update_result();
            self.conclude().await;
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
