//! Situations around commands that change the graph: what guests and jobs were doing then, and what was taken back.

use blkcheck_impl::event::{Event, ReqKind};
use blkcheck_impl::jobs::JobStatus;
use blkcheck_impl::types::Role;

use super::{Detector, Mark};

/// The change under way, or the last one.
#[derive(Debug, Default)]
pub(super) struct Change {
    what: Option<&'static str>,
    /// Requests of guests were in flight in the layer when it began; writes were among them.
    requests: bool,
    writes: bool,
    /// A job was not over.
    job: bool,
    /// Backing links were made, and taken away.
    made: u32,
    cut: u32,
}

impl Detector {
    /// Follows an event for the change under way.
    pub(super) fn change(&mut self, event: &Event) {
        match event {
            Event::MainBegin { what } => {
                let changes = matches!(
                    *what,
                    "blockdev-reopen" | "blockdev-snapshot" | "transaction" | "block_resize"
                ) || what.starts_with("block-dirty-bitmap-");
                let writes = |kind| matches!(kind, ReqKind::Write | ReqKind::WriteZeroes | ReqKind::Discard);
                self.change = Change {
                    what: changes.then_some(*what),
                    requests: self.requests.iter().any(|r| !r.by_job),
                    writes: self.requests.iter().any(|r| !r.by_job && writes(r.kind)),
                    job: self
                        .jobs
                        .iter()
                        .any(|j| matches!(j.status, JobStatus::Running | JobStatus::Paused)),
                    made: 0,
                    cut: 0,
                };
            }
            Event::EdgeSet { role, from, to, .. }
                if self.change.what.is_some() && role.contains(Role::COW) =>
            {
                self.change.made += u32::from(from.is_none());
                self.change.cut += u32::from(to.is_none());
            }
            Event::MainEnd { what } if *what == "transaction" && self.change.cut > 0 => {
                self.hit(Mark::TransactionRolledBack);
            }
            _ => {}
        }
    }

    /// The command succeeded.
    pub(super) fn changed(&mut self, execute: &str) {
        let Change {
            what: Some(what),
            requests,
            writes,
            made,
            cut,
            ..
        } = self.change
        else {
            return;
        };
        if what != execute {
            return;
        }
        match what {
            "blockdev-reopen" if writes && made + cut > 0 => self.hit(Mark::ReopenMeetsWrite),
            "blockdev-snapshot" | "transaction" if writes => self.hit(Mark::SnapshotMeetsWrite),
            "block_resize" if requests => self.hit(Mark::ResizeMeetsRequest),
            _ if what.starts_with("block-dirty-bitmap-") && writes => self.hit(Mark::BitmapMeetsWrite),
            _ => {}
        }
    }

    /// The command was refused.
    pub(super) fn change_refused(&mut self, execute: &str) {
        if execute == "blockdev-reopen" && self.change.what == Some("blockdev-reopen") && self.change.job {
            self.hit(Mark::ReopenRefusedBesideJob);
        }
    }
}
