//! `sometimes` marks: situations that a campaign must meet, or its silence means nothing.
//!
//! A [`Detector`] is fed with the records of each run and counts; counts add up across runs and threads
//! ([`Counts::merge`]); [`unmet`] lists what never happened. Beside the marks it counts every guest operation and
//! command against what the layer was doing then ([`Counts::pairs`]).
//! Detection goes by events, so a target that tells none has no marks.
//! Not here: judging. A mark never fails a run.

mod backup;
mod changes;
mod counts;
mod throttle;

pub use counts::{Counts, Mark, State, unmet};

use blkcheck_impl::error::Errno;
use blkcheck_impl::event::{Event, Parent, ReqKind};
use blkcheck_impl::jobs::JobStatus;
use blkcheck_impl::types::{JobId, NodeId, ReqFlags, RequestId};
use serde_json::{Map, Value};

use crate::history::{Fault, FaultKind, Outcome, Record, StepId};
use crate::oracle::Mirror;
use crate::scenario::{Action, Format, GuestOp, Scenario, Stored};

use counts::OPERATIONS;

#[derive(Clone, Copy, Debug)]
struct Request {
    id: RequestId,
    node: NodeId,
    kind: ReqKind,
    flags: ReqFlags,
    offset: u64,
    bytes: u64,
    by_job: bool,
}

#[derive(Clone, Copy, Debug)]
struct Job {
    id: JobId,
    status: JobStatus,
    streams: bool,
    copied: bool,
    user_paused: bool,
    /// An error stopped it, and nobody resumed it since.
    stopped: bool,
    /// Its run phase ended well.
    prepared: bool,
    chunks: u32,
    end: u64,
}

/// A guest request on an export.
#[derive(Clone, Copy, Debug)]
struct Asked {
    step: StepId,
    writes: bool,
}

/// Finds marks in the records of one run after another.
#[derive(Debug, Default)]
pub struct Detector {
    counts: Counts,
    mirror: Mirror,
    requests: Vec<Request>,
    jobs: Vec<Job>,
    asked: Vec<Asked>,
    sections: u32,
    main: u32,
    created: Vec<String>,
    /// Ids that streams were asked for with.
    streams: Vec<String>,
    discarded: Vec<(u64, u64)>,
    longest: u64,
    change: changes::Change,
    throttled: throttle::Throttled,
    backups: backup::Backups,
    run: Run,
}

/// Facts of the scenario that marks need.
#[derive(Debug, Default)]
struct Run {
    /// Ends of images that are shorter than another, bytes.
    short_ends: Vec<u64>,
    /// Ends that are no multiple of a sector.
    tails: Vec<u64>,
    /// Filled ranges of the topmost image: (start, end, stored).
    filled: Vec<(u64, u64, Stored)>,
}

impl Detector {
    /// What was counted so far.
    #[must_use]
    pub fn counts(&self) -> &Counts {
        &self.counts
    }

    /// Prepares for another run; the counts stay.
    pub fn reset(&mut self, scenario: &Scenario) {
        self.mirror.reset();
        self.requests.clear();
        self.jobs.clear();
        self.asked.clear();
        self.created.clear();
        self.streams.clear();
        self.discarded.clear();
        (self.sections, self.main) = (0, 0);
        self.change = changes::Change::default();
        self.throttled = throttle::Throttled::default();
        self.backups = backup::Backups::default();
        self.longest = scenario.images.iter().map(|i| i.size).max().unwrap_or(0);
        let longest = self.longest;
        self.run.short_ends.clear();
        self.run
            .short_ends
            .extend(scenario.images.iter().map(|i| i.size).filter(|s| *s < longest));
        self.run.tails.clear();
        self.run
            .tails
            .extend(scenario.images.iter().map(|i| i.size).filter(|s| s % 512 != 0));
        self.run.filled.clear();
        if let Some(top) = scenario.images.last().filter(|i| i.format == Format::Qcow2) {
            self.run
                .filled
                .extend(top.fill.iter().map(|f| (f.offset, f.offset + f.length, f.stored)));
        }
    }

    fn hit(&mut self, mark: Mark) {
        self.counts.mark(mark);
    }

    /// Looks at one record.
    pub fn record(&mut self, scenario: &Scenario, record: &Record) {
        match record {
            Record::Issued(step) => self.issued(scenario, *step),
            Record::Ended(step, outcome) => self.ended(scenario, *step, outcome),
            Record::Layer(event) => self.event(event),
            Record::Fault(fault) => self.fault(fault),
            Record::PowerCut { image: 0, .. } => self.power_failed_beside_backup(),
            Record::PowerCut { .. } => {}
        }
    }

    fn state(&self) -> State {
        let job = |statuses: &[JobStatus]| self.jobs.iter().any(|j| statuses.contains(&j.status));
        if self.main > 0 {
            State::Changing
        } else if self.sections > 0 {
            State::Drained
        } else if job(&[JobStatus::Running, JobStatus::Ready]) {
            State::JobRunning
        } else if job(&[JobStatus::Paused, JobStatus::Standby]) {
            State::JobPaused
        } else if job(&[JobStatus::Pending, JobStatus::Concluded]) {
            State::JobWaiting
        } else if !self.asked.is_empty() {
            State::Busy
        } else {
            State::Quiet
        }
    }

    fn issued(&mut self, scenario: &Scenario, step: StepId) {
        let Some(s) = scenario.steps.get(step.0 as usize) else {
            return;
        };
        if let Some(operation) = operation(&s.action) {
            let at = OPERATIONS.iter().position(|o| *o == operation).expect("listed");
            self.counts.pair(at, self.state());
        }
        match &s.action {
            Action::Guest { op, .. } => self.guest(step, op),
            Action::Command { execute, arguments } => self.command(execute, arguments),
            _ => {}
        }
    }

    fn guest(&mut self, step: StepId, op: &GuestOp) {
        let overlaps = |a: (u64, u64), b: (u64, u64)| a.0 < b.1 && b.0 < a.1;
        let (range, writes) = match op {
            GuestOp::Read(r) | GuestOp::BlockStatus(r) => (Some(*r), false),
            GuestOp::Flush => (None, false),
            GuestOp::Write(r)
            | GuestOp::WriteFua(r)
            | GuestOp::WriteZeroes(r)
            | GuestOp::WriteZeroesUnmap(r)
            | GuestOp::Discard(r) => (Some(*r), true),
        };
        if matches!(op, GuestOp::Flush) && self.asked.iter().any(|a| a.writes) {
            self.hit(Mark::FlushBesideWrite);
        }
        self.asked.push(Asked { step, writes });
        let Some(range) = range else { return };
        let span = (range.offset, range.offset.saturating_add(range.length));
        let stored = |d: &Detector, kinds: &[Stored]| {
            d.run
                .filled
                .iter()
                .any(|f| kinds.contains(&f.2) && overlaps((f.0, f.1), span))
        };
        match op {
            GuestOp::Read(_) => {
                if self.run.short_ends.iter().any(|e| span.0 < *e && *e < span.1) {
                    self.hit(Mark::ShortBackingRead);
                }
                if self.run.tails.iter().any(|e| span.0 < *e && *e < span.1) {
                    self.hit(Mark::UnalignedTailRead);
                }
                if self.discarded.iter().any(|d| overlaps(*d, span)) {
                    self.hit(Mark::DiscardThenRead);
                }
            }
            GuestOp::Discard(_) => self.discarded.push(span),
            GuestOp::WriteZeroes(_) | GuestOp::WriteZeroesUnmap(_) if stored(self, &[Stored::Data]) => {
                self.hit(Mark::ZeroOverData);
            }
            GuestOp::Write(_) | GuestOp::WriteFua(_) if stored(self, &[Stored::Compressed]) => {
                self.hit(Mark::CompressedOverwritten);
            }
            _ => {}
        }
    }

    fn command(&mut self, execute: &str, arguments: &Map<String, Value>) {
        if execute == "block-stream" {
            let named = ["job-id", "device"]
                .into_iter()
                .find_map(|key| arguments.get(key)?.as_str());
            self.streams.extend(named.map(str::to_owned));
        }
        let id = arguments
            .get("id")
            .or_else(|| arguments.get("device"))
            .and_then(Value::as_str);
        let job = id
            .and_then(|id| self.created.iter().position(|c| c == id))
            .and_then(|i| self.jobs.get(i).copied());
        match (verb(execute), job) {
            (Some("cancel"), Some(job)) if job.stopped => self.hit(Mark::CancelledAfterError),
            (Some("resume"), Some(job)) if job.stopped => self.hit(Mark::ResumedAfterError),
            (Some("cancel"), Some(job)) => match job.status {
                JobStatus::Paused | JobStatus::Standby => self.hit(Mark::CancelPaused),
                JobStatus::Pending => self.hit(Mark::CancelPending),
                JobStatus::Running if job.chunks > 0 && job.end >= self.longest => {
                    self.hit(Mark::CancelAfterLastChunk);
                }
                _ => {}
            },
            (Some("set-speed"), Some(job)) if job.status == JobStatus::Running => {
                self.hit(Mark::SpeedChanges);
            }
            (Some("dismiss"), Some(job)) if job.status == JobStatus::Concluded => {
                self.hit(Mark::DismissConcluded);
            }
            _ => {}
        }
    }

    fn ended(&mut self, scenario: &Scenario, step: StepId, outcome: &Outcome) {
        self.asked.retain(|a| a.step != step);
        match outcome {
            Outcome::Command(result) => {
                let Some(Action::Command { execute, arguments }) =
                    scenario.steps.get(step.0 as usize).map(|s| &s.action)
                else {
                    return;
                };
                match result {
                    Ok(_) => {
                        self.changed(execute);
                        self.accepted(execute, arguments);
                    }
                    Err(refusal) => {
                        self.change_refused(execute);
                        self.refused(&refusal.desc);
                    }
                }
            }
            Outcome::Read(Err(_)) | Outcome::Done(Err(_)) | Outcome::Status(Err(_)) => {
                self.hit(Mark::GuestError);
            }
            _ => {}
        }
    }

    fn refused(&mut self, desc: &str) {
        for (text, mark) in [
            ("Cannot change", Mark::RefusedFrozen),
            ("Cannot freeze", Mark::RefusedFrozen),
            ("Permission conflict", Mark::RefusedPermission),
            (" is busy: ", Mark::RefusedBlocker),
            (Errno::EIO.text(), Mark::CommandFails),
            (Errno::ENOSPC.text(), Mark::CommandFails),
            ("cannot accept command verb", Mark::RefusedVerb),
        ] {
            if desc.contains(text) {
                self.hit(mark);
            }
        }
    }

    fn accepted(&mut self, execute: &str, arguments: &Map<String, Value>) {
        self.accepted_beside_backup(execute, arguments);
        if execute == "blockdev-reopen" {
            self.regrouped(arguments);
        }
        if execute == "block-stream" {
            let given = |key: &str| arguments.contains_key(key);
            self.hit(match (given("base"), given("base-node"), given("bottom")) {
                (true, _, _) => Mark::StreamBase,
                (_, true, _) => Mark::StreamBaseNode,
                (_, _, true) => Mark::StreamBottom,
                _ => Mark::StreamAll,
            });
            if arguments
                .get("speed")
                .and_then(Value::as_i64)
                .is_some_and(|s| s > 0)
            {
                self.hit(Mark::SpeedLimited);
            }
            let device = arguments.get("device").and_then(Value::as_str);
            if let Some(device) = device.and_then(|d| self.mirror.by_name(d))
                && self.mirror.node(device).is_some_and(|n| {
                    n.parents.iter().any(|e| {
                        self.mirror.edge(*e).is_some_and(|e| {
                            matches!(e.parent, Some(Parent::Node(p)) if self.mirror.node(p).is_some_and(|p| {
                                p.driver == "qcow2" || p.driver == "copy-on-read" && p.parents.iter().any(|e| {
                                    self.mirror.edge(*e).is_some_and(|e| e.role.contains(blkcheck_impl::types::Role::COW))
                                })
                            }))
                        })
                    })
                })
            {
                self.hit(Mark::StreamIntermediate);
            }
        }
    }

    fn fault(&mut self, fault: &Fault) {
        match fault.kind {
            FaultKind::Read => self.hit(Mark::FaultyRead),
            FaultKind::Flush => self.hit(Mark::FaultyFlush),
            FaultKind::Write if fault.done == 0 => self.hit(Mark::FaultyWrite),
            FaultKind::Write if fault.done < fault.bytes => self.hit(Mark::PartialWrite),
            FaultKind::Write => self.hit(Mark::LateFaultyWrite),
            FaultKind::WriteZeroes | FaultKind::Discard | FaultKind::Truncate => {}
        }
        if fault.errno == Errno::ENOSPC.0 {
            self.hit(Mark::NoSpace);
        }
    }

    fn event(&mut self, event: &Event) {
        self.change(event);
        self.throttle(event);
        self.backup(event);
        match event {
            Event::MainBegin { .. } => self.main += 1,
            Event::MainEnd { .. } => self.main = self.main.saturating_sub(1),
            Event::NodeAdded { name, .. } if self.mirror.was_used(name) => self.hit(Mark::NameReused),
            Event::DrainBegin { .. } => self.drain(),
            Event::DrainEnd { .. } => self.sections = self.sections.saturating_sub(1),
            Event::BackendResumed { .. } => self.hit(Mark::RequestParked),
            Event::RequestBegin {
                request,
                node,
                edge,
                kind,
                offset,
                bytes,
                flags,
            } => {
                let parent = self.mirror.edge(*edge).and_then(|e| e.parent);
                let by_job = flags.contains(ReqFlags::PREFETCH);
                let r = Request {
                    id: *request,
                    node: *node,
                    kind: *kind,
                    flags: *flags,
                    offset: *offset,
                    bytes: *bytes,
                    by_job,
                };
                self.looks_at_copy(&r, parent);
                self.request(r, parent);
            }
            Event::RequestWaits { request, on } => self.waits(*request, *on),
            Event::RequestEnd { request, result, .. } => {
                if let Some(i) = self.requests.iter().rposition(|r| r.id == *request) {
                    let over = self.requests.swap_remove(i);
                    if over.kind == ReqKind::Flush && result.is_ok() {
                        self.flushed(over.node);
                    }
                }
            }
            Event::CopyOnRead {
                node, zero, offset, ..
            } => {
                if *zero {
                    self.hit(Mark::CopyZeroes);
                }
                let by_guest = |r: &Request| {
                    r.node == *node && r.kind == ReqKind::Read && !r.by_job && r.offset <= *offset + r.bytes
                };
                if self.requests.iter().any(by_guest) {
                    self.hit(Mark::ReadPopulates);
                }
            }
            Event::JobStatus { job, id, from, to } => self.job_status(*job, id, *from, *to),
            Event::JobChunk {
                job,
                offset,
                bytes,
                copied,
            } => {
                self.hit(if *copied {
                    Mark::ChunkCopied
                } else {
                    Mark::ChunkSkipped
                });
                if let Some(j) = self.jobs.iter_mut().find(|j| j.id == *job) {
                    j.copied |= *copied;
                    j.chunks += 1;
                    j.end = j.end.max(offset + bytes);
                }
            }
            Event::Qmp { name, data } => self.qmp(name, data),
            _ => {}
        }
        // Contradictions are the graph oracle's to report.
        let _ = self.mirror.apply(event);
    }

    fn drain(&mut self) {
        if !self.requests.is_empty() {
            self.hit(Mark::DrainBusy);
        }
        if self.sections > 0 {
            self.hit(Mark::NestedDrain);
        }
        if self.jobs.iter().any(|j| j.status == JobStatus::Running) {
            self.hit(Mark::DrainDuringJob);
        }
        self.sections += 1;
    }

    fn request(&mut self, r: Request, parent: Option<Parent>) {
        let writes = matches!(r.kind, ReqKind::Write | ReqKind::WriteZeroes | ReqKind::Discard);
        let overlaps = |o: &Request| o.offset < r.offset + r.bytes && r.offset < o.offset + o.bytes;
        if writes
            && !r.flags.contains(ReqFlags::WRITE_UNCHANGED)
            && self
                .requests
                .iter()
                .any(|o| o.node == r.node && o.by_job && overlaps(o))
        {
            self.hit(Mark::WriteMeetsChunk);
        }
        if r.kind == ReqKind::Write && r.flags.contains(ReqFlags::SERIALISING) {
            self.hit(Mark::PaddedWrite);
        }
        if writes && matches!(parent, Some(Parent::Backend(_))) {
            let overlaid = self.mirror.node(r.node).is_some_and(|n| {
                n.parents.iter().any(|e| {
                    self.mirror
                        .edge(*e)
                        .is_some_and(|e| e.role.contains(blkcheck_impl::types::Role::COW))
                })
            });
            if overlaid {
                self.hit(Mark::WriteBelow);
            }
        }
        self.requests.push(r);
    }

    fn waits(&mut self, request: RequestId, on: RequestId) {
        let find = |id| self.requests.iter().rev().find(|r| r.id == id).copied();
        let (Some(a), Some(b)) = (find(request), find(on)) else {
            return;
        };
        let reads = |r: Request| r.kind == ReqKind::Read;
        if reads(a) != reads(b) {
            self.hit(Mark::WriteMeetsCopyOnRead);
        } else if reads(a) && reads(b) {
            self.hit(Mark::SerialisingMeet);
        } else {
            // A plain write waits only for a serialising one, which padding made it.
            self.hit(Mark::PaddedWrite);
        }
    }

    fn job_status(&mut self, job: JobId, id: &str, from: JobStatus, to: JobStatus) {
        if from == JobStatus::Undefined {
            // Positions in `created` and `jobs` agree.
            self.created.push(id.to_owned());
            self.jobs.push(Job {
                id: job,
                status: to,
                streams: self.streams.iter().any(|stream| stream == id),
                copied: false,
                user_paused: false,
                stopped: false,
                prepared: false,
                chunks: 0,
                end: 0,
            });
            return;
        }
        let Some(i) = self.jobs.iter().position(|j| j.id == job) else {
            return;
        };
        self.jobs[i].status = to;
        self.jobs[i].prepared |= to == JobStatus::Pending;
        let j = self.jobs[i];
        match (from, to) {
            (JobStatus::Created, JobStatus::Null) => self.hit(Mark::JobEarlyFail),
            (JobStatus::Created, JobStatus::Running)
                if self
                    .jobs
                    .iter()
                    .filter(|j| j.status == JobStatus::Running && j.streams)
                    .count()
                    > 1 =>
            {
                self.hit(Mark::TwoStreams);
            }
            (JobStatus::Running, JobStatus::Paused) => {
                self.jobs[i].user_paused = self.sections == 0;
                if self.sections > 0 {
                    self.hit(Mark::JobParkedByDrain);
                }
            }
            (JobStatus::Paused, JobStatus::Running) if j.stopped => self.jobs[i].stopped = false,
            (JobStatus::Paused, JobStatus::Running) if j.user_paused => self.hit(Mark::PauseResume),
            (_, JobStatus::Aborting) if j.copied => self.hit(Mark::StreamAborts),
            (_, JobStatus::Pending) if self.sections > 0 => self.hit(Mark::CompletionDuringDrain),
            (JobStatus::Pending, JobStatus::Concluded) if j.streams => self.hit(Mark::StreamSucceeds),
            (JobStatus::Concluded, JobStatus::Null) => {
                self.jobs.remove(i);
                self.created.remove(i);
            }
            _ => {}
        }
        if to == JobStatus::Null && from == JobStatus::Created {
            self.jobs.remove(i);
            self.created.remove(i);
        }
    }

    /// The job that a QMP event is about.
    fn told(&mut self, data: &Value) -> Option<&mut Job> {
        let id = data.get("device").and_then(Value::as_str)?;
        let at = self.created.iter().position(|c| c == id)?;
        self.jobs.get_mut(at)
    }

    fn qmp(&mut self, name: &str, data: &Value) {
        match name {
            "BLOCK_JOB_PENDING" => self.hit(Mark::FinalizePending),
            "BLOCK_JOB_ERROR" => {
                self.hit(Mark::JobError);
                if data.get("action").and_then(Value::as_str) == Some("stop") {
                    self.hit(Mark::JobStopsOnError);
                    if let Some(job) = self.told(data) {
                        job.stopped = true;
                    }
                }
            }
            "BLOCK_JOB_CANCELLED" if is_backup(data) => self.hit(Mark::BackupAborts),
            "BLOCK_JOB_COMPLETED" => {
                let error = data.get("error").and_then(Value::as_str);
                if is_backup(data) {
                    self.hit(if error.is_none() {
                        Mark::BackupSucceeds
                    } else {
                        Mark::BackupAborts
                    });
                }
                let by_storage = error == Some(Errno::EIO.text()) || error == Some(Errno::ENOSPC.text());
                if by_storage && self.told(data).is_some_and(|job| job.prepared) {
                    self.hit(Mark::CompletionFails);
                }
            }
            _ => {}
        }
    }
}

fn is_backup(data: &Value) -> bool {
    data.get("type").and_then(Value::as_str) == Some("backup")
}

/// `pause`, `cancel`, … of either family.
fn verb(execute: &str) -> Option<&str> {
    execute
        .strip_prefix("block-job-")
        .or_else(|| execute.strip_prefix("job-"))
}

fn operation(action: &Action) -> Option<&'static str> {
    let name = match action {
        Action::Guest { op, .. } => match op {
            GuestOp::Read(_) => "read",
            GuestOp::Write(_) => "write",
            GuestOp::WriteFua(_) => "write-fua",
            GuestOp::WriteZeroes(_) => "write-zeroes",
            GuestOp::WriteZeroesUnmap(_) => "write-zeroes-unmap",
            GuestOp::Discard(_) => "discard",
            GuestOp::Flush => "flush",
            GuestOp::BlockStatus(_) => "block-status",
        },
        Action::DrainBegin { .. } => "drained-begin",
        Action::DrainEnd { .. } => "drained-end",
        Action::Command { execute, .. } => {
            if execute.starts_with("query-") {
                return Some("query");
            }
            let name = verb(execute).unwrap_or(execute);
            OPERATIONS.iter().copied().find(|o| *o == name).unwrap_or("other")
        }
        Action::WaitJob { .. } | Action::Settle { .. } => return None,
    };
    Some(name)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::Refusal;
    use crate::oracle::tests::scenario_of;

    fn detector(json: &str, records: impl IntoIterator<Item = Record>) -> Detector {
        let scenario = scenario_of(json);
        let mut detector = Detector::default();
        detector.reset(&scenario);
        for record in records {
            detector.record(&scenario, &record);
        }
        detector
    }

    #[test]
    fn nothing_is_met_at_first_and_counts_add_up() {
        let mut counts = Counts::default();
        assert_eq!(unmet(&counts).len(), Mark::ALL.len());
        assert!(Mark::ALL.len() >= 25);
        let json = r#"{"version":1,"grain":64,"images":[],"steps":[{"actor":"m","execute":"block-stream"}]}"#;
        let refusal = Refusal {
            class: "GenericError".into(),
            desc: "Cannot change 'backing' link from 'a' to 'b'".into(),
        };
        let d = detector(
            json,
            [
                Record::Issued(StepId(0)),
                Record::Ended(StepId(0), Outcome::Command(Err(refusal))),
            ],
        );
        counts.merge(d.counts());
        counts.merge(d.counts());
        assert_eq!(counts.of(Mark::RefusedFrozen), 2);
        assert_eq!(counts.pairs().collect::<Vec<_>>(), [("block-stream", "quiet", 2)]);
        assert!(!unmet(&counts).contains(&Mark::RefusedFrozen));
    }

    #[test]
    fn jobs_and_drains_are_seen_together() {
        let json = r#"{"version":1,"grain":64,"images":[],"steps":[
            {"actor":"m","execute":"job-cancel","arguments":{"id":"j"}}]}"#;
        let job = |from, to| {
            Record::Layer(Event::JobStatus {
                job: JobId(0),
                id: "j".into(),
                from,
                to,
            })
        };
        let d = detector(
            json,
            [
                job(JobStatus::Undefined, JobStatus::Created),
                job(JobStatus::Created, JobStatus::Running),
                Record::Layer(Event::DrainBegin { node: NodeId(0) }),
                job(JobStatus::Running, JobStatus::Paused),
                Record::Issued(StepId(0)),
            ],
        );
        for mark in [Mark::DrainDuringJob, Mark::JobParkedByDrain, Mark::CancelPaused] {
            assert_eq!(d.counts().of(mark), 1, "{}", mark.as_str());
        }
        assert_eq!(d.counts().of(Mark::NestedDrain), 0);
        assert_eq!(d.counts().pairs().next(), Some(("cancel", "drained", 1)));
    }
}
