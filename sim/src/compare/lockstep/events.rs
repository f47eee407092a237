//! Events: the model follows them, and says what must not happen.

use blkcheck_model::job::{Job, Sync};
use blkcheck_model::{Driver, JobStatus, Outcome};
use serde_json::Value;

use super::{Run, Stop};
use crate::compare::What;
use crate::compare::known::Strayed;

impl Run<'_> {
    /// Follows the events that came.
    pub(super) fn events(&mut self) -> Result<(), Stop> {
        for (name, data) in self.peer.take_events() {
            if let Err((model, qemu)) = self.event(&name, &data) {
                return Err(Stop::Differs(What::Events, model, qemu));
            }
        }
        Ok(())
    }

    fn event(&mut self, name: &str, data: &Value) -> Result<(), (String, String)> {
        let text = |key: &str| data.get(key).and_then(Value::as_str);
        let said = || format!("{name} {data}");
        match name {
            "JOB_STATUS_CHANGE" => {
                let (Some(id), Some(to)) = (text("id"), text("status").and_then(JobStatus::from_name)) else {
                    return Err(("an id and a status".to_owned(), said()));
                };
                if to == JobStatus::Waiting {
                    self.books.ran(&self.world, id);
                }
                if to == JobStatus::Pending {
                    self.prepared.push(id.to_owned());
                }
                self.world.job_status(id, to).map_err(|why| (why, said()))
            }
            "BLOCK_JOB_CANCELLED" | "BLOCK_JOB_COMPLETED" => {
                let id = text("device").unwrap_or_default();
                let prepared = self.prepared.iter().any(|p| p == id);
                self.prepared.retain(|p| p != id);
                let error = text("error");
                let outcome = match (name, error) {
                    ("BLOCK_JOB_CANCELLED", _) => Outcome::Cancelled,
                    (_, Some(_)) if !prepared => Outcome::Failed,
                    _ => Outcome::Success,
                };
                self.books.completed(&self.world, id, outcome);
                if outcome == Outcome::Success {
                    self.strayed.extend(Strayed::of(&self.world, id));
                }
                let may_fail = self.may_fail(id);
                let expected = self
                    .world
                    .job_completed(id, outcome)
                    .map_err(|why| (why, said()))?;
                if outcome == Outcome::Success && expected.as_deref() != error {
                    return Err((format!("ends with {expected:?}"), said()));
                }
                if outcome == Outcome::Failed && !may_fail {
                    return Err(("no storage failed".to_owned(), said()));
                }
                Ok(())
            }
            "BLOCK_JOB_ERROR" => {
                let id = text("device").unwrap_or_default();
                if !self.may_fail(id) {
                    return Err(("no storage failed".to_owned(), said()));
                }
                if text("action") == Some("stop") {
                    return self.world.job_stopped_on_error(id).map_err(|why| (why, said()));
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A backup from or to something that shows a snapshot fails where there is none, without any storage failing: where something
    /// that it is still to copy cannot be read, or written, for all that the books know.
    fn may_fail(&self, id: &str) -> bool {
        let graph = &self.world.graph;
        let shows = |node| {
            let mut all = graph.topological([node]).into_iter();
            all.any(|below| graph.node(below).driver == Driver::SnapshotAccess)
        };
        let backup = self.world.job(id).and_then(Job::backup);
        backup.is_some_and(|backup| {
            (shows(backup.source) || shows(backup.target)) && self.books.may_fail(&self.world, backup)
        })
    }

    /// Every job has come as far as it can come by itself.
    pub(super) fn jobs_rest(&self) -> Result<(), Stop> {
        for job in &self.world.jobs {
            let rests = match job.status {
                JobStatus::Paused => job.user_paused,
                // A slow job sleeps in the middle, and one that only keeps waits for ever.
                JobStatus::Running => {
                    let waits = job.backup().is_some_and(|backup| backup.sync == Sync::None);
                    (job.speed > 0 || waits) && !job.user_paused && !job.cancelled
                }
                // For another one of its group.
                JobStatus::Waiting => {
                    let runs = |other: &Job| !other.status.is_completed();
                    !job.cancelled && self.world.group(job).any(runs)
                }
                JobStatus::Pending => {
                    let manual = |job: &Job| !job.auto_finalize;
                    (manual(job) || self.world.group(job).any(manual)) && !job.cancelled
                }
                JobStatus::Concluded => !job.auto_dismiss,
                _ => false,
            };
            if !rests {
                let model = format!("job '{}' does not stay {}: {job:?}", job.id, job.status.name());
                return Err(Stop::Differs(What::Jobs, model, "it does".to_owned()));
            }
        }
        Ok(())
    }
}
