//! Jobs: state machine, verbs, completion, groups, rate limit, error policy; block-stream, blockdev-backup.
//!
//! A job is a task of its own that does I/O beside the guests. Its `run` phase reaches pause points with nothing
//! in flight; whatever changes the graph happens at its end, under the main lock (`finish`).
//! Not here: QMP argument parsing (`qmp`).

mod backup;
mod block_job;
mod error_policy;
mod finish;
mod job;
mod ratelimit;
mod status;
mod stream;
mod stream_run;
#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_failures;
mod txn;
mod window;

use std::rc::Rc;

pub(crate) use backup::{BackupArgs, BitmapMode, Perf, SyncMode};
pub use error_policy::{ErrorAction, IoStatus, OnError};
pub use job::{Job, JobDriver, JobSpec};
pub use ratelimit::{RateLimit, SLICE};
pub use status::{JobStatus, Verb};
pub use stream::StreamArgs;
pub use txn::JobTxn;

use crate::Layer;
use crate::types::JobId;

/// All jobs of a layer.
#[derive(Debug, Default)]
pub struct Jobs {
    /// Newest first.
    list: Vec<Rc<Job>>,
    next: u32,
}

impl Jobs {
    fn next_id(&mut self) -> JobId {
        let id = JobId(self.next);
        self.next += 1;
        id
    }
}

impl Layer {
    /// All jobs, newest first.
    #[must_use]
    pub fn jobs(&self) -> Vec<Rc<Job>> {
        self.inner.jobs.borrow().list.clone()
    }

    /// The job with this QAPI id.
    #[must_use]
    pub fn job(&self, name: &str) -> Option<Rc<Job>> {
        self.inner
            .jobs
            .borrow()
            .list
            .iter()
            .find(|job| *job.name == *name)
            .cloned()
    }
}

/// Well-formed as a job id, export id or node name: a letter, then letters, digits, `-`, `.`, `_`.
pub(crate) fn id_wellformed(id: &str) -> bool {
    let mut bytes = id.bytes();
    bytes.next().is_some_and(|b| b.is_ascii_alphabetic())
        && bytes.all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'))
}
