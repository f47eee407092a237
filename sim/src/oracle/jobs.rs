//! Jobs obey their state machine and say so in order (jobs.md 1.3, 1.11).
//!
//! From the events: each status change is in the table and starts where the last one ended; `JOB_STATUS_CHANGE` follows
//! each change at once and names it; `BLOCK_JOB_READY` and `_PENDING` come only in their states; a started job tells
//! exactly one of `_COMPLETED` and `_CANCELLED`, between leaving the run phase and `concluded`; a job that was never
//! started tells neither. Offsets in its events never decrease and never pass the length. The pause count moves by
//! one edge at a time, a job parks only while it is above zero, and a parked job handles no chunk.
//! Errors: the action that `BLOCK_JOB_ERROR` tells is one that the job's `on-error` takes (`stop` on lack of space only
//! after storage ran out of it); after `report` or `ignore` a job that is not cancelled fails, and none fails in its run
//! phase without having told such an error (a backup of `sync=top` may while it asks what its source holds, until its first
//! copy); after `stop` it handles no chunk until it is resumed. A stream does not ignore more errors than its device can have
//! sectors.
//! Jobs of a grouped transaction all end well, or none does.
//! Unchecked: which verbs are admitted when (`refusals`, by the model), the wall-clock rate; when a backup of `sync=top` has done asking,
//! where nobody tells of copies (the daemon).

use std::rc::Rc;

use blkcheck_impl::error::Errno;
use blkcheck_impl::event::Event;
use blkcheck_impl::jobs::JobStatus::{
    self, Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby,
};
use blkcheck_impl::jobs::JobStatus::{Undefined, Waiting};
use blkcheck_impl::types::{JobId, NodeId};
use serde_json::Value;

use super::{FinalContent, Oracle, OracleName, View, Violation, violation};
use crate::history::{Outcome, Record};
use crate::scenario::{Action, Scenario};

use policy::{Policy, group_of, policies_of};

/// QAPI name of a status.
pub(crate) fn status_name(status: JobStatus) -> &'static str {
    match status {
        Undefined => "undefined",
        Created => "created",
        Running => "running",
        Paused => "paused",
        Ready => "ready",
        Standby => "standby",
        Waiting => "waiting",
        Pending => "pending",
        Aborting => "aborting",
        Concluded => "concluded",
        Null => "null",
    }
}

/// The table of jobs.md 1.3.
fn allowed(from: JobStatus, to: JobStatus) -> bool {
    match from {
        Undefined => to == Created,
        Created => matches!(to, Running | Aborting | Null),
        Running => matches!(to, Paused | Ready | Waiting | Aborting),
        Paused => to == Running,
        Ready => matches!(to, Standby | Waiting | Aborting),
        Standby => to == Ready,
        Waiting => matches!(to, Pending | Aborting),
        Pending => matches!(to, Aborting | Concluded),
        Aborting => matches!(to, Aborting | Concluded),
        Concluded => to == Null,
        Null => false,
    }
}

/// One job's life so far.
#[derive(Clone, Debug)]
struct Job {
    job: JobId,
    id: Rc<str>,
    status: JobStatus,
    /// A status change that `JOB_STATUS_CHANGE` has not told yet.
    untold: bool,
    started: bool,
    /// Told `BLOCK_JOB_COMPLETED` or `_CANCELLED`.
    ended: bool,
    pause_count: u32,
    offset: u64,
    /// Its run phase ended well.
    prepared: bool,
    /// Told an error that makes it fail in the end.
    doomed: bool,
    /// Told an error that stops it, and was not resumed since.
    stopped: bool,
    /// Errors that it told and went on.
    ignored: u64,
    /// The filter of a backup.
    filter: Option<NodeId>,
    /// It has begun to copy behind its filter.
    copies: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub struct Jobs {
    jobs: Vec<Job>,
    /// What to do about errors, of every job asked for so far; one that was refused cannot be told apart here.
    policies: Vec<Policy>,
    /// Jobs that stand or fall together, with how those that are over ended: well or not.
    groups: Vec<Vec<(String, Option<bool>)>>,
    /// Storage ran out of space.
    no_space: bool,
    /// The filter that came last, for the job that is created next.
    filter: Option<NodeId>,
    /// In the longest that any node may be.
    sectors: u64,
}

impl Jobs {
    fn event(&mut self, event: &Event) -> Result<(), Violation> {
        match event {
            Event::JobStatus { job, id, from, to } => self.status(*job, id, *from, *to),
            Event::JobPauseCount { job, count } => self.pause_count(*job, *count),
            Event::JobChunk {
                job, offset, bytes, ..
            } => match self.jobs.iter().find(|j| j.job == *job) {
                Some(j) if j.stopped => Err(wrong(format!(
                    "job '{}' handles {offset:#x}+{bytes:#x} after an error stopped it",
                    j.id
                ))),
                Some(j) if j.status == Running => Ok(()),
                Some(j) => Err(wrong(format!(
                    "job '{}' handles {offset:#x}+{bytes:#x} while it is {}",
                    j.id,
                    status_name(j.status)
                ))),
                None => Err(wrong(format!("the unknown job {job:?} handles a chunk"))),
            },
            Event::Qmp { name, data } => self.qmp(name, data),
            Event::MainBegin { .. } => {
                self.filter = None;
                Ok(())
            }
            Event::FilterInserted { filter, .. } => {
                self.filter = Some(*filter);
                Ok(())
            }
            Event::CopyBegin {
                filter,
                background: true,
                ..
            } => {
                let own = self.jobs.iter_mut().filter(|j| j.filter == Some(*filter));
                own.for_each(|j| j.copies = true);
                Ok(())
            }
            // Whatever else happens: a status change is told before anything of the main context ends.
            Event::MainEnd { .. } => match self.jobs.iter().find(|j| j.untold) {
                Some(j) => Err(wrong(format!(
                    "job '{}' is {} but no JOB_STATUS_CHANGE says so",
                    j.id,
                    status_name(j.status)
                ))),
                None => Ok(()),
            },
            _ => Ok(()),
        }
    }

    fn status(&mut self, job: JobId, id: &Rc<str>, from: JobStatus, to: JobStatus) -> Result<(), Violation> {
        let i = match self.jobs.iter().position(|j| j.job == job) {
            Some(i) => i,
            None => {
                if let Some(other) = self.jobs.iter().find(|j| j.id == *id && j.status != Null) {
                    return Err(wrong(format!(
                        "a second job '{id}' is created while {:?} has that id",
                        other.job
                    )));
                }
                let id = Rc::clone(id);
                let (untold, started, ended) = (false, false, false);
                self.jobs.push(Job {
                    job,
                    id,
                    status: Undefined,
                    untold,
                    started,
                    ended,
                    pause_count: 1,
                    offset: 0,
                    prepared: false,
                    doomed: false,
                    stopped: false,
                    ignored: 0,
                    filter: self.filter.take(),
                    copies: false,
                });
                self.jobs.len() - 1
            }
        };
        let j = &mut self.jobs[i];
        let arrow = |to| {
            format!(
                "job '{id}' goes from {} to {}",
                status_name(from),
                status_name(to)
            )
        };
        if j.status != from {
            return Err(wrong(format!(
                "{}, but it was {}",
                arrow(to),
                status_name(j.status)
            )));
        }
        if !allowed(from, to) {
            return Err(wrong(format!("{}, which is not in the state machine", arrow(to))));
        }
        if j.untold {
            return Err(wrong(format!(
                "{} before JOB_STATUS_CHANGE told {}",
                arrow(to),
                status_name(from)
            )));
        }
        if matches!(to, Paused | Standby) && j.pause_count == 0 {
            return Err(wrong(format!("{} although nobody asked it to pause", arrow(to))));
        }
        if to == Concluded && j.started && !j.ended {
            return Err(wrong(format!(
                "{} without BLOCK_JOB_COMPLETED or BLOCK_JOB_CANCELLED",
                arrow(to)
            )));
        }
        j.untold = from != to;
        j.started |= to == Running;
        j.prepared |= to == Pending;
        j.stopped &= from != Paused;
        j.status = to;
        Ok(())
    }

    fn pause_count(&mut self, job: JobId, count: u32) -> Result<(), Violation> {
        let Some(j) = self.jobs.iter_mut().find(|j| j.job == job) else {
            return Ok(());
        };
        let before = std::mem::replace(&mut j.pause_count, count);
        j.stopped &= count > 0;
        if before.abs_diff(count) <= 1 {
            return Ok(());
        }
        Err(wrong(format!(
            "the pause count of job '{}' jumps from {before} to {count}",
            j.id
        )))
    }

    /// The policies that a job of this id may have for an operation.
    fn policies<'a>(&'a self, id: &'a str, operation: &'a str) -> impl Iterator<Item = &'a Policy> {
        let fits = move |p: &&Policy| p.id == id && p.operation.is_none_or(|o| o == operation);
        self.policies.iter().filter(fits)
    }

    /// `BLOCK_JOB_ERROR`.
    fn error(&mut self, at: usize, operation: &str, action: &str) -> Result<(), Violation> {
        let id = Rc::clone(&self.jobs[at].id);
        let fits = |policy: &&Policy| match policy.what.as_str() {
            "stop" => action == "stop",
            "ignore" => action == "ignore",
            "report" => action == "report",
            // Lack of space stops, everything else is reported.
            _ => action == "report" || action == "stop" && self.no_space,
        };
        let mut matching = self.policies(&id, operation).filter(fits).peekable();
        if matching.peek().is_none() && self.policies(&id, operation).next().is_some() {
            let policies: Vec<&str> = self.policies(&id, operation).map(|p| p.what.as_str()).collect();
            let message = format!(
                "job '{id}' with on-error {} has the error action {action}",
                policies.join(" or ")
            );
            return Err(wrong(message));
        }
        let retries = matching.any(|p| p.retries);
        drop(matching);
        let most = self.sectors;
        let j = &mut self.jobs[at];
        j.stopped |= action == "stop";
        j.doomed |= !(action == "stop" || action == "ignore" && retries);
        // A job that tries again may meet the same error as often as storage fails.
        j.ignored += u64::from(action == "ignore" && !retries);
        if j.ignored > most {
            return Err(wrong(format!(
                "job '{id}' ignores more errors than there are sectors ({most}): it asks for the same again and again"
            )));
        }
        Ok(())
    }

    /// A job is over: those of its group that are, too, ended as it did.
    fn together(&mut self, at: usize, well: bool) -> Result<(), Violation> {
        let id = Rc::clone(&self.jobs[at].id);
        for group in &mut self.groups {
            let Some(own) = group
                .iter_mut()
                .rfind(|(member, fate)| **member == *id && fate.is_none())
            else {
                continue;
            };
            own.1 = Some(well);
            if let Some((other, _)) = group.iter().find(|(_, fate)| *fate == Some(!well)) {
                let (one, two) = if well { (&*id, &**other) } else { (&**other, &*id) };
                return Err(wrong(format!(
                    "job '{one}' ends well although '{two}' of the same transaction does not"
                )));
            }
        }
        Ok(())
    }

    fn qmp(&mut self, name: &str, data: &Value) -> Result<(), Violation> {
        let text = |key: &str| data.get(key).and_then(Value::as_str);
        let id = match name {
            "JOB_STATUS_CHANGE" | "BLOCK_JOB_PENDING" => text("id"),
            "BLOCK_JOB_READY" | "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" | "BLOCK_JOB_ERROR" => {
                text("device")
            }
            _ => return Ok(()),
        };
        let at = id.and_then(|id| self.jobs.iter().rposition(|j| &*j.id == id));
        let Some(at) = at else {
            return Err(wrong(format!("{name} names no job: {data}")));
        };
        let asks_first = |p: &Policy| p.asks_first && *p.id == *self.jobs[at].id;
        let asks = !self.jobs[at].copies && self.policies.iter().any(asks_first);
        let j = &mut self.jobs[at];
        let is = status_name(j.status);
        let said = |what: &str| Err(wrong(format!("{name} of job '{}' {what}", j.id)));
        if name == "JOB_STATUS_CHANGE" {
            let status = text("status").unwrap_or("nothing");
            if !j.untold {
                return said(&format!("says {status} although nothing changed"));
            }
            j.untold = false;
            return if status == is {
                Ok(())
            } else {
                said(&format!("says {status}, but it is {is}"))
            };
        }
        if j.untold {
            return said(&format!("comes before JOB_STATUS_CHANGE {is}"));
        }
        match name {
            "BLOCK_JOB_READY" if j.status != Ready => return said(&format!("comes while it is {is}")),
            "BLOCK_JOB_PENDING" if j.status != Pending => return said(&format!("comes while it is {is}")),
            "BLOCK_JOB_ERROR" if !matches!(j.status, Running | Ready) => {
                return said(&format!("comes while it is {is}"));
            }
            "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED" => {
                if !j.started {
                    return said("comes although it never ran");
                }
                if std::mem::replace(&mut j.ended, true) {
                    return said("comes after its end was already told");
                }
                if !matches!(j.status, Pending | Aborting) {
                    return said(&format!("comes while it is {is}"));
                }
                let failed = data.get("error").is_some();
                if name == "BLOCK_JOB_COMPLETED" && failed != (j.status == Aborting) {
                    return said(&format!(
                        "has {} error while it is {is}",
                        if failed { "an" } else { "no" }
                    ));
                }
                if name == "BLOCK_JOB_COMPLETED" && j.doomed && !failed {
                    return said("has no error, although it told one that it does not survive");
                }
                if name == "BLOCK_JOB_COMPLETED" && failed && !j.doomed && !j.prepared && !asks {
                    return said("has an error that it never told");
                }
                if name == "BLOCK_JOB_CANCELLED" && j.status == Pending {
                    return said("comes without aborting first");
                }
            }
            _ => {}
        }
        if matches!(name, "BLOCK_JOB_COMPLETED" | "BLOCK_JOB_CANCELLED") {
            let well = name == "BLOCK_JOB_COMPLETED" && data.get("error").is_none();
            self.together(at, well)?;
        }
        let j = &mut self.jobs[at];
        let said = |what: &str| Err(wrong(format!("{name} of job '{}' {what}", j.id)));
        if let (Some(offset), Some(len)) = (
            data.get("offset").and_then(Value::as_u64),
            data.get("len").and_then(Value::as_u64),
        ) {
            if offset < j.offset {
                return said(&format!("has offset {offset} after {}", j.offset));
            }
            if offset > len {
                return said(&format!("has offset {offset} beyond its length {len}"));
            }
            j.offset = offset;
        }
        if name == "BLOCK_JOB_ERROR" {
            return self.error(at, text("operation").unwrap_or(""), text("action").unwrap_or(""));
        }
        Ok(())
    }
}

/// Sectors of the longest image, as it is laid out or made by a command.
fn sectors(scenario: &Scenario) -> u64 {
    let resized = scenario.steps.iter().filter_map(|step| match &step.action {
        Action::Command { execute, arguments } if execute == "block_resize" => {
            arguments.get("size")?.as_u64()
        }
        _ => None,
    });
    let longest = scenario.images.iter().map(|i| i.size).chain(resized).max();
    longest.map_or(u64::MAX, |bytes| bytes.div_ceil(512))
}

fn wrong(message: String) -> Violation {
    violation(OracleName::Jobs, None, message, Vec::new())
}

impl Oracle for Jobs {
    fn name(&self) -> OracleName {
        OracleName::Jobs
    }

    fn reset(&mut self, scenario: &Scenario) {
        self.sectors = sectors(scenario);
        self.jobs.clear();
        self.policies.clear();
        self.groups.clear();
        self.no_space = false;
        self.filter = None;
    }

    fn record(&mut self, view: &View<'_>, record: &Record) -> Result<(), Violation> {
        match record {
            Record::Layer(event) => return self.event(event),
            Record::Issued(step) => {
                if let Some(Action::Command { execute, arguments }) =
                    view.scenario.steps.get(step.0 as usize).map(|s| &s.action)
                {
                    policies_of(execute, arguments, &mut self.policies);
                }
            }
            Record::Fault(fault) => self.no_space |= fault.errno == Errno::ENOSPC.0,
            Record::Ended(step, Outcome::Command(Ok(_))) => {
                if let Some(Action::Command { execute, arguments }) =
                    view.scenario.steps.get(step.0 as usize).map(|s| &s.action)
                    && let Some(group) = group_of(execute, arguments)
                {
                    self.groups.push(group.into_iter().map(|id| (id, None)).collect());
                }
            }
            Record::Ended(..) | Record::PowerCut { .. } => {}
        }
        Ok(())
    }

    fn closed(&mut self, _view: &View<'_>, _contents: &[FinalContent<'_>]) -> Result<(), Violation> {
        match self.jobs.iter().find(|j| j.status != Null) {
            None => Ok(()),
            Some(j) => Err(wrong(format!(
                "job '{}' is {} after the layer was shut down",
                j.id,
                status_name(j.status)
            ))),
        }
    }
}

#[path = "jobs_policy.rs"]
mod policy;
#[cfg(test)]
#[path = "jobs_tests.rs"]
mod tests;
