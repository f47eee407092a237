//! Events: the model follows them, and says what must not happen.

use blkcheck_model::{JobStatus, Outcome};
use serde_json::Value;

use super::{Run, Stop};
use crate::compare::What;

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
                let expected = self
                    .world
                    .job_completed(id, outcome)
                    .map_err(|why| (why, said()))?;
                if outcome == Outcome::Success && expected.as_deref() != error {
                    return Err((format!("ends with {expected:?}"), said()));
                }
                if outcome == Outcome::Failed {
                    return Err(("no storage failed".to_owned(), said()));
                }
                Ok(())
            }
            "BLOCK_JOB_ERROR" => Err(("no storage failed".to_owned(), said())),
            _ => Ok(()),
        }
    }

    /// Every job has come as far as it can come by itself.
    pub(super) fn jobs_rest(&self) -> Result<(), Stop> {
        for job in &self.world.jobs {
            let rests = match job.status {
                JobStatus::Paused => job.user_paused,
                // A slow job sleeps in the middle.
                JobStatus::Running => job.speed > 0 && !job.user_paused && !job.cancelled,
                JobStatus::Pending => !job.auto_finalize && !job.cancelled,
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
