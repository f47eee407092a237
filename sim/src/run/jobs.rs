//! The runner's books of jobs: where each has been and how far it has come, for steps that wait, and how often the
//! runner has pushed it on.

use std::rc::Rc;

use blkcheck_impl::jobs::JobStatus;
use blkcheck_impl::types::JobId;
use serde_json::{Map, Value};

use crate::finish;
use crate::scenario::{Action, Scenario, WaitJob, actions};

/// How often a job is pushed on from the same status before that counts as hanging.
const PUSHES: u8 = 2;
/// How often a job is pushed on gently over its whole life.
const PATIENT_PUSHES: u8 = 16;

#[derive(Debug)]
struct Job {
    job: JobId,
    id: Rc<str>,
    status: JobStatus,
    visited: u16,
    /// How far it has come, bytes.
    offset: u64,
    pushes: u8,
    /// Over its whole life.
    all_pushes: u8,
}

/// Every job of a run, also those that are gone.
#[derive(Debug, Default)]
pub(super) struct Jobs {
    jobs: Vec<Job>,
}

impl Jobs {
    pub(super) fn clear(&mut self) {
        self.jobs.clear();
    }

    /// A job has dealt with its device up to `end`.
    pub(super) fn chunk(&mut self, job: JobId, end: u64) {
        if let Some(state) = self.jobs.iter_mut().find(|j| j.job == job) {
            state.offset = state.offset.max(end);
        }
    }

    /// A job has a new status; the first one makes it known.
    pub(super) fn status(&mut self, job: JobId, id: &Rc<str>, to: JobStatus) {
        let live = |j: &&mut Job| j.id == *id && j.status != JobStatus::Null;
        if let Some(known) = self.jobs.iter_mut().rfind(live) {
            known.status = to;
            known.visited |= 1 << (to as u16);
            known.pushes = 0;
            return;
        }
        self.jobs.push(Job {
            job,
            id: Rc::clone(id),
            status: to,
            visited: 1 << (to as u16),
            offset: 0,
            pushes: 0,
            all_pushes: 0,
        });
    }

    /// Whether a job has been where a step waits for it to be, or is gone.
    pub(super) fn reached(&self, wanted: &WaitJob) -> bool {
        let Some(job) = self.jobs.iter().rfind(|j| *j.id == *wanted.id) else {
            return true;
        };
        let visited = |(status, name): (JobStatus, &str)| {
            name == wanted.status && job.visited >> (status as u16) & 1 == 1
        };
        let underway = matches!(
            job.status,
            JobStatus::Created | JobStatus::Running | JobStatus::Paused
        );
        let far_enough = wanted.offset.is_none_or(|offset| job.offset >= offset) || !underway;
        job.status == JobStatus::Null || far_enough && finish::STATUSES.into_iter().any(visited)
    }

    /// Whether every job is gone.
    pub(super) fn all_gone(&self) -> bool {
        self.jobs.iter().all(|j| j.status == JobStatus::Null)
    }

    /// Those that are not gone, for people.
    pub(super) fn describe(&self) -> impl Iterator<Item = String> + '_ {
        let live = self.jobs.iter().filter(|j| j.status != JobStatus::Null);
        live.map(|j| format!("job '{}' is {}", j.id, finish::status_name(j.status)))
    }

    /// The next job that stands and can be moved on, and the command that does it; counted as done. `endless`: it runs until
    /// somebody cancels it.
    pub(super) fn push_on(&mut self, endless: impl Fn(&str) -> bool) -> Option<(Rc<str>, &'static str)> {
        for job in &mut self.jobs {
            // What stops at the same error again and again is not to be helped by going on.
            let parked = matches!(job.status, JobStatus::Paused | JobStatus::Standby);
            let pushes = if parked && job.all_pushes >= PATIENT_PUSHES {
                job.pushes.max(1)
            } else {
                job.pushes
            };
            let command = if job.status == JobStatus::Running && pushes < PUSHES && endless(&job.id) {
                Some("job-cancel")
            } else {
                push(job.status, pushes)
            };
            if let Some(command) = command {
                job.pushes += 1;
                job.all_pushes = job.all_pushes.saturating_add(1);
                return Some((Rc::clone(&job.id), command));
            }
        }
        None
    }
}

/// The command that moves a standing job on, a gentle one first.
fn push(status: JobStatus, pushes: u8) -> Option<&'static str> {
    match (status, pushes) {
        (JobStatus::Pending, 0) => Some("job-finalize"),
        (JobStatus::Concluded, 0) => Some("job-dismiss"),
        (JobStatus::Ready, 0) => Some("job-complete"),
        (JobStatus::Paused | JobStatus::Standby, 0) => Some("job-resume"),
        (
            JobStatus::Created
            | JobStatus::Paused
            | JobStatus::Standby
            | JobStatus::Ready
            | JobStatus::Pending,
            ..PUSHES,
        ) => Some("job-cancel"),
        _ => None,
    }
}

/// Whether a step starts a job of this id that runs until it is cancelled.
pub(super) fn is_endless(scenario: &Scenario, id: &str) -> bool {
    let starts = |(execute, arguments): (&str, &Map<String, Value>)| {
        let has = |key: &str, text: &str| arguments.get(key).and_then(Value::as_str) == Some(text);
        execute == "blockdev-backup" && has("job-id", id) && has("sync", "none")
    };
    scenario.steps.iter().any(|step| match &step.action {
        Action::Command { execute, arguments } => {
            starts((execute, arguments)) || actions(execute, arguments).any(starts)
        }
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wait(status: &str, offset: Option<u64>) -> WaitJob {
        WaitJob {
            id: "j".to_owned(),
            status: status.to_owned(),
            offset,
        }
    }

    #[test]
    fn a_wait_is_over_when_status_and_offset_are_reached_or_the_job_is_past_them() {
        let (mut jobs, id): (Jobs, Rc<str>) = (Jobs::default(), "j".into());
        assert!(jobs.reached(&wait("running", Some(9))), "no such job");
        jobs.status(JobId(0), &id, JobStatus::Running);
        assert!(jobs.reached(&wait("running", None)));
        assert!(!jobs.reached(&wait("running", Some(9))) && !jobs.reached(&wait("pending", None)));
        jobs.chunk(JobId(0), 9);
        assert!(jobs.reached(&wait("running", Some(9))));
        assert!(!jobs.reached(&wait("running", Some(10))));
        jobs.status(JobId(0), &id, JobStatus::Waiting);
        assert!(
            jobs.reached(&wait("running", Some(10))),
            "it will come no further"
        );
        jobs.status(JobId(0), &id, JobStatus::Null);
        assert!(jobs.all_gone() && jobs.reached(&wait("ready", None)));
    }

    #[test]
    fn a_standing_job_is_pushed_gently_then_cancelled_then_left() {
        let (mut jobs, id): (Jobs, Rc<str>) = (Jobs::default(), "j".into());
        jobs.status(JobId(0), &id, JobStatus::Paused);
        let mut next = || jobs.push_on(|_| false).map(|(_, command)| command);
        assert_eq!(
            (next(), next(), next()),
            (Some("job-resume"), Some("job-cancel"), None)
        );
    }

    #[test]
    fn a_job_that_never_ends_is_cancelled() {
        let backup = |id: &str, sync: &str| format!(r#"{{"job-id":"{id}","sync":"{sync}"}}"#);
        let step = |execute: &str, arguments: &str| {
            format!(r#"{{"actor":"m","execute":"{execute}","arguments":{arguments}}}"#)
        };
        let grouped = format!(
            r#"{{"actions":[{{"type":"blockdev-backup","data":{}}}]}}"#,
            backup("c", "none")
        );
        let steps = [
            step("blockdev-backup", &backup("a", "none")),
            step("blockdev-backup", &backup("b", "full")),
            step("transaction", &grouped),
        ]
        .join(",");
        let text = format!(r#"{{"version":1,"grain":64,"images":[],"steps":[{steps}]}}"#);
        let scenario: Scenario = serde_json::from_str(&text).expect("a scenario");
        let endless = ["a", "b", "c", "d"].map(|id| is_endless(&scenario, id));
        assert_eq!(endless, [true, false, true, false]);
        let (mut jobs, id): (Jobs, Rc<str>) = (Jobs::default(), "j".into());
        jobs.status(JobId(0), &id, JobStatus::Running);
        assert_eq!(jobs.push_on(|_| false), None);
        assert_eq!(jobs.push_on(|id| id == "j"), Some((id, "job-cancel")));
    }
}
