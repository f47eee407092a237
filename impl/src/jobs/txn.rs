//! Jobs that succeed or fail together (QEMU `JobTxn`).
//!
//! Rules (jobs.md 1.10): every job belongs to exactly one group until it is over, mostly one of its own. Lists are newest
//! first, as everything that shows in the order of events. What happens at the end is in `finish`.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::jobs::job::Job;

/// A group of jobs.
#[derive(Debug, Default)]
pub struct JobTxn {
    /// Newest first.
    jobs: RefCell<Vec<Rc<Job>>>,
    /// Somebody drives the group to its end already.
    pub(super) aborting: Cell<bool>,
}

impl JobTxn {
    /// A group without jobs.
    pub(crate) fn new() -> Rc<JobTxn> {
        Rc::default()
    }

    pub(super) fn join(self: &Rc<Self>, job: &Rc<Job>) {
        self.jobs.borrow_mut().insert(0, Rc::clone(job));
        job.txn.replace(Some(Rc::clone(self)));
    }

    /// The jobs that are not over, newest first.
    pub(super) fn jobs(&self) -> Vec<Rc<Job>> {
        self.jobs.borrow().clone()
    }

    pub(super) fn newest(&self) -> Option<Rc<Job>> {
        self.jobs.borrow().first().cloned()
    }
}

impl Job {
    pub(super) fn group(&self) -> Rc<JobTxn> {
        let txn = self.txn.borrow();
        Rc::clone(txn.as_ref().expect("a job is in a group until it is over"))
    }

    /// The job is over.
    pub(super) fn leave_txn(self: &Rc<Job>) {
        if let Some(txn) = self.txn.take() {
            txn.jobs.borrow_mut().retain(|job| !Rc::ptr_eq(job, self));
        }
    }
}
