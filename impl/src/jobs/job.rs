//! A job's state and the control of its task: pause points, sleeping, entering, pausing, cancelling.
//!
//! Rules. `busy` is false exactly while the task has yielded at a point where it has no I/O in flight, and once
//! `run` has returned: then a drain need not wait for it. Three notions are kept apart: how many ask for a pause
//! (`pause_count`), whether the task is parked (`paused`), and the status that a user sees.
//! A job holds its layer weakly; it is owned by the layer's list and by its task.
//! Not here: what happens after `run` (`finish`), edges and drain hooks (`block_job`).

use std::cell::{Cell, RefCell};
use std::fmt;
use std::future::poll_fn;
use std::rc::{Rc, Weak};
use std::task::{Poll, Waker};

use crate::Layer;
use crate::env::{Fut, Nanos};
use crate::error::{Errno, QmpError};
use crate::event::Event;
use crate::jobs::error_policy::{IoStatus, OnError};
use crate::jobs::id_wellformed;
use crate::jobs::ratelimit::RateLimit;
use crate::jobs::status::{JobStatus, Verb};
use crate::jobs::txn::JobTxn;
use crate::layer::Inner;
use crate::types::{EdgeId, JobId};

/// What a kind of job does. Called by the job core, in this order: `run`, then `prepare` if it succeeded, then `commit` or
/// `abort`, then `clean`.
pub trait JobDriver: fmt::Debug {
    /// QAPI `JobType`.
    fn kind(&self) -> &'static str;
    /// The run phase, in the job's task. Nothing may be in flight when it returns.
    fn run<'a>(&'a self, job: &'a Rc<Job>) -> Fut<'a, Result<(), Errno>>;
    /// Makes the result effective. Main lock held.
    fn prepare<'a>(&'a self, job: &'a Rc<Job>) -> Fut<'a, Result<(), Errno>>;
    /// The job, and all that belong together with it, succeeded. Main lock held.
    fn commit(&self, _job: &Rc<Job>) {}
    /// The job failed, was cancelled, or belongs together with one that did. Main lock held.
    fn abort(&self, _job: &Rc<Job>) {}
    /// Gives back what the job held, whatever came of it. Main lock held.
    fn clean<'a>(&'a self, job: &'a Rc<Job>) -> Fut<'a, ()>;
}

/// What a job is created with.
#[derive(Clone, Debug)]
pub struct JobSpec {
    /// QAPI id.
    pub id: Option<String>,
    /// What to do with I/O errors.
    pub on_error: OnError,
    /// Finalize without being told.
    pub auto_finalize: bool,
    /// Dismiss without being told.
    pub auto_dismiss: bool,
}

/// When a yielded task goes on without being entered.
#[derive(Clone, Copy, Debug)]
enum Alarm {
    Never,
    NextTurn,
    At(Nanos),
}

/// A job (QEMU `Job` and `BlockJob`).
pub struct Job {
    layer: Weak<Inner>,
    /// Identity.
    pub(crate) id: JobId,
    /// QAPI id.
    pub(crate) name: Rc<str>,
    pub(crate) driver: Rc<dyn JobDriver>,
    pub(crate) status: Cell<JobStatus>,
    pub(crate) pause_count: Cell<u32>,
    /// Parked at a pause point, or never started.
    pub(crate) paused: Cell<bool>,
    /// One unit of `pause_count` is the user's.
    pub(crate) user_paused: Cell<bool>,
    pub(crate) busy: Cell<bool>,
    pub(crate) started: Cell<bool>,
    /// Hard cancel requested. No job here knows a soft one.
    pub(crate) cancelled: Cell<bool>,
    /// `run` has returned.
    pub(crate) deferred: Cell<bool>,
    pub(crate) ret: Cell<Result<(), Errno>>,
    pub(crate) auto_finalize: bool,
    pub(crate) auto_dismiss: bool,
    pub(crate) on_error: OnError,
    pub(crate) io_status: Cell<IoStatus>,
    pub(crate) progress: Cell<u64>,
    pub(crate) total: Cell<u64>,
    pub(crate) speed: Cell<u64>,
    limit: Cell<RateLimit>,
    /// The task's own waker while it is parked.
    waker: RefCell<Option<Waker>>,
    /// An alarm other than `Never` is set.
    alarm: Cell<bool>,
    /// Edges, newest first.
    pub(crate) edges: RefCell<Vec<EdgeId>>,
    /// The jobs that succeed or fail together with this one; none once it is over.
    pub(crate) txn: RefCell<Option<Rc<JobTxn>>>,
}

impl fmt::Debug for Job {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Job({:?} {} {})", self.id, self.name, self.status.get().name())
    }
}

impl Job {
    /// Registers a new job; it does not run yet.
    pub(crate) fn create(
        layer: &Layer,
        spec: JobSpec,
        driver: Rc<dyn JobDriver>,
        txn: &Rc<JobTxn>,
    ) -> Result<Rc<Job>, QmpError> {
        // Without named backends there is no default id.
        let id = spec.id.unwrap_or_default();
        if !id_wellformed(&id) {
            return Err(QmpError::generic(format!("Invalid job ID '{id}'")));
        }
        if layer.job(&id).is_some() {
            return Err(QmpError::generic(format!("Job ID '{id}' already in use")));
        }
        let job = Rc::new(Job {
            layer: Rc::downgrade(&layer.inner),
            id: layer.inner.jobs.borrow_mut().next_id(),
            name: Rc::from(id),
            driver,
            status: Cell::new(JobStatus::Undefined),
            pause_count: Cell::new(1),
            paused: Cell::new(true),
            user_paused: Cell::new(false),
            busy: Cell::new(false),
            started: Cell::new(false),
            cancelled: Cell::new(false),
            deferred: Cell::new(false),
            ret: Cell::new(Ok(())),
            auto_finalize: spec.auto_finalize,
            auto_dismiss: spec.auto_dismiss,
            on_error: spec.on_error,
            io_status: Cell::new(IoStatus::Ok),
            progress: Cell::new(0),
            total: Cell::new(0),
            speed: Cell::new(0),
            limit: Cell::new(RateLimit::default()),
            waker: RefCell::new(None),
            alarm: Cell::new(false),
            edges: RefCell::new(Vec::new()),
            txn: RefCell::default(),
        });
        txn.join(&job);
        layer.inner.jobs.borrow_mut().list.insert(0, Rc::clone(&job));
        job.set_status(JobStatus::Created);
        Ok(job)
    }

    /// The layer this job belongs to.
    ///
    /// # Panics
    /// When the layer is gone: whoever reaches a job holds its layer.
    pub(crate) fn layer(&self) -> Layer {
        Layer {
            inner: self.layer.upgrade().expect("a job does not outlive its layer"),
        }
    }

    /// QAPI id.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Status as a user sees it.
    #[must_use]
    pub fn status(&self) -> JobStatus {
        self.status.get()
    }

    /// How many ask the job to pause: the user, each of its edges whose node is drained, not being started.
    #[must_use]
    pub fn pause_count(&self) -> u32 {
        self.pause_count.get()
    }

    /// Bytes handled, and bytes in all.
    #[must_use]
    pub fn progress(&self) -> (u64, u64) {
        (self.progress.get(), self.total.get())
    }

    /// Hard-cancelled.
    #[must_use]
    pub fn is_cancelled(&self) -> bool {
        self.cancelled.get()
    }

    /// Forgets the job for good: it leaves the list with status null.
    pub(crate) fn forget(self: &Rc<Job>) {
        self.leave_txn();
        self.remove_edges();
        self.set_status(JobStatus::Null);
        let layer = self.layer();
        let mut jobs = layer.inner.jobs.borrow_mut();
        let at = jobs
            .list
            .iter()
            .position(|job| Rc::ptr_eq(job, self))
            .expect("a job is listed until it is forgotten");
        jobs.list.remove(at);
        drop(jobs);
        layer.kick();
    }

    /// Steps the state machine.
    pub(crate) fn set_status(&self, to: JobStatus) {
        let from = self.status.get();
        assert!(
            from.successors().contains(&to),
            "job {}: {} -> {}",
            self.name,
            from.name(),
            to.name()
        );
        self.status.set(to);
        if from == to {
            return;
        }
        let layer = self.layer();
        layer.emit(|| Event::JobStatus {
            job: self.id,
            id: Rc::clone(&self.name),
            from,
            to,
        });
        self.emit_status_change(to);
    }

    /// Starts the task, whose first step is its pause point. Where its nodes are drained now the job parks at once.
    pub(crate) fn start(self: &Rc<Job>) {
        assert!(!self.started.get() && self.paused.get() && !self.busy.get());
        self.started.set(true);
        self.paused.set(false);
        self.busy.set(true);
        self.count_pause(-1);
        self.set_status(JobStatus::Running);
        let parked = self.should_pause().then(|| self.park());
        self.busy.set(parked.is_none());
        let job = Rc::clone(self);
        // The task keeps the layer alive, not the other way round.
        let layer = self.layer();
        self.layer().env().spawn(
            "job",
            Box::pin(async move {
                match parked {
                    Some(back) => {
                        job.asleep(Alarm::Never).await;
                        job.unpark(back);
                        job.pause_point().await;
                    }
                    None => job.pause_point().await,
                }
                let driver = Rc::clone(&job.driver);
                let ret = driver.run(&job).await;
                job.exit(ret).await;
                drop(layer);
            }),
        );
    }

    /// Somebody asks for a pause.
    fn should_pause(&self) -> bool {
        self.pause_count.get() > 0
    }

    /// Nobody waits for the job to pause or to end.
    pub(crate) fn may_go_on(&self) -> bool {
        !self.should_pause() && !self.is_cancelled()
    }

    /// Another request may start while some are in flight: nobody waits for a pause point, no limit to obey.
    pub(crate) fn may_run_ahead(&self) -> bool {
        self.may_go_on() && self.speed.get() == 0
    }

    fn count_pause(&self, by: i32) {
        let count = self
            .pause_count
            .get()
            .checked_add_signed(by)
            .expect("pauses balance");
        self.pause_count.set(count);
        self.layer().emit(|| Event::JobPauseCount { job: self.id, count });
    }

    /// One more asks for a pause; a sleeping job goes to its pause point at once.
    pub(crate) fn pause(&self) {
        self.count_pause(1);
        if !self.paused.get() {
            self.enter();
        }
    }

    /// One less asks for a pause; the last one lets the job go on, unless it sleeps anyway.
    pub(crate) fn resume(&self) {
        self.count_pause(-1);
        if self.pause_count.get() == 0 && !self.alarm.get() {
            self.enter();
        }
    }

    /// Wakes the task if it has yielded.
    pub(crate) fn enter(&self) {
        if !self.started.get() || self.deferred.get() || self.busy.get() {
            return;
        }
        self.busy.set(true);
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }

    /// Parks here while a pause is asked for. Nothing may be in flight.
    pub(crate) async fn pause_point(&self) {
        if !self.should_pause() || self.is_cancelled() {
            return;
        }
        let back = self.park();
        self.yield_until(Alarm::Never).await;
        self.unpark(back);
    }

    /// Shows the job as parked; returns the status to go back to.
    fn park(&self) -> JobStatus {
        let back = self.status.get();
        self.set_status(if back == JobStatus::Ready {
            JobStatus::Standby
        } else {
            JobStatus::Paused
        });
        self.paused.set(true);
        back
    }

    fn unpark(&self, back: JobStatus) {
        self.paused.set(false);
        self.set_status(back);
    }

    /// Yields until entered; then a pause point.
    pub(crate) async fn idle(&self) {
        if !self.may_go_on() {
            return self.pause_point().await;
        }
        self.yield_until(Alarm::Never).await;
        self.pause_point().await;
    }

    /// Yields for `delay` nanoseconds (0: one turn of the scheduler) or until entered; then a pause point.
    pub(crate) async fn sleep(&self, delay: Nanos) {
        assert!(self.busy.get(), "only the job's own task sleeps");
        if self.is_cancelled() {
            return;
        }
        if !self.should_pause() {
            let alarm = match delay {
                0 => Alarm::NextTurn,
                _ => Alarm::At(self.layer().env().now().saturating_add(delay)),
            };
            self.yield_until(alarm).await;
        }
        self.pause_point().await;
    }

    async fn yield_until(&self, alarm: Alarm) {
        assert!(self.busy.replace(false), "only the job's own task yields");
        self.asleep(alarm).await;
    }

    /// The rest of yielding: until somebody enters the job, or the alarm rings.
    async fn asleep(&self, alarm: Alarm) {
        self.alarm.set(!matches!(alarm, Alarm::Never));
        let mut timer = {
            let layer = self.layer();
            layer.kick();
            if let Alarm::At(deadline) = alarm {
                Some(layer.env().sleep_until(deadline))
            } else {
                None
            }
        };
        let mut turned = false;
        poll_fn(|cx| {
            if self.busy.get() {
                return Poll::Ready(());
            }
            let rings = match &mut timer {
                Some(timer) => timer.as_mut().poll(cx).is_ready(),
                None => matches!(alarm, Alarm::NextTurn) && turned,
            };
            if rings {
                self.busy.set(true);
                return Poll::Ready(());
            }
            *self.waker.borrow_mut() = Some(cx.waker().clone());
            if matches!(alarm, Alarm::NextTurn) {
                turned = true;
                cx.waker().wake_by_ref();
            }
            Poll::Pending
        })
        .await;
        self.alarm.set(false);
        self.waker.take();
    }

    /// Sleeps as the rate limit demands; at least one turn. The pause point of a run loop.
    pub(crate) async fn ratelimit_sleep(&self) {
        loop {
            let delay = self.charge(0);
            self.sleep(delay).await;
            if delay == 0 || self.is_cancelled() {
                return;
            }
        }
    }

    /// Charges a handled request to the rate limit; returns the delay before the next one.
    pub(crate) fn charge(&self, bytes: u64) -> Nanos {
        let mut limit = self.limit.get();
        let delay = limit.delay(bytes, self.layer().env().now());
        self.limit.set(limit);
        delay
    }

    /// Sets the speed, bytes per second; a job that sleeps for a lower speed wakes up.
    ///
    /// # Errors
    /// A negative speed, or a state that does not admit the command.
    pub(crate) fn set_speed(&self, speed: i64) -> Result<(), QmpError> {
        Verb::SetSpeed.check(&self.name, self.status.get())?;
        let speed = u64::try_from(speed)
            .map_err(|_| QmpError::generic("Parameter 'speed' expects a non-negative value"))?;
        let mut limit = self.limit.get();
        limit.set_speed(speed);
        self.limit.set(limit);
        let old = self.speed.replace(speed);
        if (speed == 0 || speed > old) && self.alarm.get() {
            self.enter();
        }
        Ok(())
    }

    /// The user's pause.
    pub(crate) fn user_pause(&self) -> Result<(), QmpError> {
        Verb::Pause.check(&self.name, self.status.get())?;
        if self.user_paused.replace(true) {
            return Err(QmpError::generic("Job is already paused"));
        }
        self.pause();
        Ok(())
    }

    /// The user's resume; forgives the I/O error that stopped the job.
    pub(crate) fn user_resume(&self) -> Result<(), QmpError> {
        if !self.user_paused.get() || self.pause_count.get() == 0 {
            return Err(QmpError::generic("Can't resume a job that was not paused"));
        }
        Verb::Resume.check(&self.name, self.status.get())?;
        self.io_status.set(IoStatus::Ok);
        self.user_paused.set(false);
        self.resume();
        Ok(())
    }

    /// No job here can be completed by command.
    pub(crate) fn complete(&self) -> Result<(), QmpError> {
        Verb::Complete.check(&self.name, self.status.get())?;
        Err(QmpError::generic(format!(
            "The active block job '{}' cannot be completed",
            self.name
        )))
    }

    /// Marks the job as hard-cancelled; nothing moves yet.
    pub(crate) fn mark_cancelled(&self) {
        if self.user_paused.replace(false) {
            self.io_status.set(IoStatus::Ok);
            // No enter: the canceller does that.
            self.count_pause(-1);
        }
        self.cancelled.set(true);
    }
}
