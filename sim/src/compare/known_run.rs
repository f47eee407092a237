//! The known defects as they show in gated runs, and those that only show there: who is first decides.
//!
//! Rules: as in [`super::known`]. A run ends at its first finding, so that a finding is one defect's. What explains it is
//! looked for in what happened before: a matcher wants the oracle, what it says, and the cause in the run.
//! An entry of [`gated`] is reproduced by `blkcheck replay --on qemu`.

mod backups;
mod causes;
mod failing;
mod kept;
mod streams;
mod stress;
mod tail;

pub use stress::explain_stress;

use std::rc::Rc;

use blkcheck_model::job::Job;
use blkcheck_model::{Command, Driver, JobStatus, NodeId, Outcome as JobOutcome, World};
use serde_json::{Map, Value};

use self::causes::Causes;
use super::known::{self, DEFECTS, Defect, Sure};
use crate::follow::Follower;
use crate::history::{ESHUTDOWN, FaultKind, Outcome, Record, Refusal, StepId};
use crate::oracle::{OracleName, Violation};
use crate::scenario::{Action, Format, GuestOp, Range, Scenario, actions};

/// Defects that need an order of storage requests to show, or storage over NBD.
static GATED: &[Defect] = &[
    Defect {
        id: "copy-above-filter-undoes-write",
        title: "copy-on-read above another filter copies there, and undoes what somebody writes to the node below meanwhile",
        qemu: "the node that a copy-on-read filter asks for copies makes them, also if it is a filter itself: what it keeps others \
           from touching is its own cluster, not that of the image",
        right: "a copy and writes to the image wait for each other, wherever they come from: what was acknowledged stays",
        sure: Sure::Certain,
        scenario: include_str!("../../../docs/findings/copy-above-filter-undoes-write.json"),
        page: include_str!("../../../docs/findings/copy-above-filter-undoes-write.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "zeroes-under-write",
        title: "zeroing or discarding a cluster does not wait for a write that is allocating it: zeroes are lost, and a \
            cluster that was freed is used",
        qemu: "writes that allocate wait for each other, but zero writes and discards look at the table alone, which the \
           write changes only when its data is there",
        right: "a request that changes a cluster's entry waits for the write that is going to change it: bytes that only \
            the zero write covers are zero, and what is in use has a reference",
        sure: Sure::Certain,
        scenario: include_str!("../../../docs/findings/zeroes-under-write.json"),
        page: include_str!("../../../docs/findings/zeroes-under-write.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "discard-under-read",
        title: "discarding a cluster does not wait for a read of it: the read returns what was written somewhere else",
        qemu: "the cluster is given back and used for another write while a read of it is still under way",
        right: "a cluster is used again when nobody reads it any more: a read returns the old data or zeroes",
        sure: Sure::Certain,
        scenario: include_str!("../../../docs/findings/discard-under-read.json"),
        page: include_str!("../../../docs/findings/discard-under-read.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "aborted-snapshot-loses-writes",
        title: "a transaction that is aborted after a snapshot loses what guests write meanwhile, and shows them zeroes",
        qemu: "the roll-back takes the overlay's backing link away first; guests, who are still above the overlay, go on at that \
           moment: they read the empty overlay and write to it, and are moved back after that",
        right: "guests wait until everything is as it was: an aborted transaction changes nothing, and what was acknowledged stays",
        sure: Sure::Certain,
        scenario: include_str!("../../../docs/findings/aborted-snapshot-loses-writes.json"),
        page: include_str!("../../../docs/findings/aborted-snapshot-loses-writes.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "stream-records-description",
        title: "a stream to a base that was opened otherwise than its header says records a description of it, or fails for want \
            of room",
        qemu: "the name of such a node is a description of the whole chain below, in JSON; it goes into the header of the \
           stream's device where it fits",
        right: "the name of the base's file: what is below the base is for its own header to say",
        sure: Sure::Likely,
        scenario: include_str!("../../../docs/findings/stream-records-description.json"),
        page: include_str!("../../../docs/findings/stream-records-description.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "reopen-meets-end-of-stream",
        title: "blockdev-reopen of the link to a stream's filter aborts the daemon when the stream ends meanwhile",
        qemu: "it drains the node below, which waits for the stream, whose end puts another node there: an assertion wants that one \
           drained",
        right: "the command is carried out on what is there: a command that is allowed before and after does not end the process",
        sure: Sure::Certain,
        scenario: include_str!("../../../docs/findings/reopen-meets-end-of-stream.json"),
        page: include_str!("../../../docs/findings/reopen-meets-end-of-stream.md"),
        matches: |_| false,
        steer: None,
    },
];

/// Those that show in gated runs only.
pub fn gated() -> impl Iterator<Item = &'static Defect> {
    GATED.iter().chain(failing::FAILING)
}

/// The whole reviewed list.
pub fn all() -> impl Iterator<Item = &'static Defect> {
    DEFECTS.iter().chain(gated())
}

/// The entry of this name.
#[must_use]
pub fn find(id: &str) -> Option<&'static Defect> {
    all().chain(stress::all()).find(|d| d.id == id)
}

/// Its title.
#[must_use]
pub fn title(id: &str) -> &'static str {
    find(id).map_or("", |d| d.title)
}

/// A finding of a gated run.
struct Found<'a> {
    scenario: &'a Scenario,
    records: &'a [Record],
    violation: &'a Violation,
    /// The model at the end.
    world: World,
    causes: Causes,
}

/// A command and its arguments.
type Given<'a> = (&'a str, &'a Map<String, Value>);
/// A request in flight.
type Flying = (StepId, GuestOp);
type Matcher = fn(&Found<'_>) -> bool;

const MATCHERS: &[(&str, Matcher)] = &[
    ("null-co-size", null_co_size),
    ("enable-of-missing-bitmap", enables_missing),
    ("cor-bottom-outside-chain", bottom_outside_chain),
    ("cor-bottom-crash", bottom_crash),
    ("cor-copies-below-bottom", copies_below_bottom),
    ("refused-stream-keeps-root", streams::keeps_root),
    ("refused-stream-keeps-root", streams::keeps_root_for_good),
    ("backing-format-of-overlay", backing_format),
    ("stream-uncovers-base", streams::uncovers_base),
    ("aborted-snapshot-loses-writes", loses_writes),
    ("discard-under-read", discard_under_read),
    ("zeroes-under-write", zeroes_under_write),
    ("copy-above-filter-undoes-write", undoes_write),
    ("stream-records-description", streams::records_description),
    ("snapshot-over-shorter-overlay", snapshot_shortens),
    ("reopen-shortens-export", reopen_shortens),
    ("filter-keeps-length", keeps_length),
    ("reopen-drains-for-ever", drains_for_ever),
    ("stream-over-raw-loses-data", streams::loses_over_raw),
    ("stream-undoes-reopen", streams::undoes_reopen),
    ("reopen-meets-end-of-stream", streams::ends_under_reopen),
    ("cor-bottom-garbage", kept::unfilled),
    ("frozen-bitmap-loses-writes", kept::stored_by_half),
    ("refused-reopen-stops-writes", kept::stays_frozen),
    ("nbd-short-tail-hangs", tail::hangs),
    ("aborted-snapshot-takes-parents", takes_parents),
    ("refused-group-hangs", backups::group_hangs),
    ("aborted-backup-frees-bitmap", backups::frees_bitmap),
];

/// The reviewed defect that explains a finding.
#[must_use]
pub fn explain(scenario: &Scenario, violation: &Violation, records: &[Record]) -> Option<&'static Defect> {
    let mut follower = Follower::default();
    follower.reset(scenario);
    let mut causes = Causes::default();
    for record in records {
        causes.look(&follower);
        let before = follower.world.clone();
        causes.told(scenario, &before, record);
        let followed = follower.record(scenario, record);
        if let Some(step) = followed.executed
            && let Action::Command { execute, arguments } = &scenario.steps[step.0 as usize].action
        {
            causes.executed(&before, &follower.world, execute, arguments);
        }
        if followed.completed == Some(JobOutcome::Success) {
            causes.succeeded(&before, &follower.world);
        }
    }
    causes.look(&follower);
    let found = Found {
        scenario,
        records,
        violation,
        world: follower.world,
        causes,
    };
    // Who knows nothing of lost power says nothing about what it left.
    let without = if found.is_of_a_power_cut() { &[] } else { MATCHERS };
    let mut matchers = without.iter().chain(failing::MATCHERS);
    let (id, _) = matchers.find(|(_, matches)| matches(&found))?;
    find(id)
}

impl<'a> Found<'a> {
    /// The power failed, and what is wrong is what is left of an image.
    fn is_of_a_power_cut(&self) -> bool {
        self.records
            .iter()
            .any(|record| matches!(record, Record::PowerCut { .. }))
            && self.says(&[OracleName::Transparency], "or a power cut")
    }

    fn command(&self, step: StepId) -> Option<Given<'a>> {
        match &self.scenario.steps[step.0 as usize].action {
            Action::Command { execute, arguments } => Some((execute, arguments)),
            _ => None,
        }
    }

    /// Steps that were issued, in order.
    fn issued_steps(&self) -> impl Iterator<Item = StepId> {
        self.records.iter().filter_map(|r| match r {
            Record::Issued(step) => Some(*step),
            _ => None,
        })
    }

    /// Commands that were issued and not answered.
    fn unanswered(&self) -> impl Iterator<Item = Given<'a>> {
        let open = self.issued_steps().filter(|step| self.outcome(*step).is_none());
        open.filter_map(|step| self.command(step))
    }

    /// The command that was answered last, and its answer.
    fn last_answer(&self) -> Option<(Given<'a>, Option<&'a str>)> {
        self.records.iter().rev().find_map(|r| match r {
            Record::Ended(step, Outcome::Command(result)) => {
                let refusal = result.as_ref().err().map(|refusal| &*refusal.desc);
                Some((self.command(*step)?, refusal))
            }
            _ => None,
        })
    }

    /// What this step gave, if it did.
    fn outcome(&self, step: StepId) -> Option<&'a Outcome> {
        self.records.iter().find_map(|r| match r {
            Record::Ended(ended, outcome) if *ended == step => Some(outcome),
            _ => None,
        })
    }

    /// Where in the records a step begins, and where it ends.
    fn span(&self, step: StepId) -> Option<(usize, usize)> {
        let at =
            |wanted: fn(&Record) -> Option<StepId>| self.records.iter().position(|r| wanted(r) == Some(step));
        let issued = at(|r| match r {
            Record::Issued(step) => Some(*step),
            _ => None,
        })?;
        let ended = at(|r| match r {
            Record::Ended(step, _) => Some(*step),
            _ => None,
        });
        Some((issued, ended.unwrap_or(self.records.len())))
    }

    /// The node that the guest's request of this step is for.
    fn asked(&self, step: StepId) -> Option<NodeId> {
        let Action::Guest { export, .. } = &self.scenario.steps.get(step.0 as usize)?.action else {
            return None;
        };
        let mut exports = self.world.exports.iter();
        let export = exports.find(|e| &*e.name == export || &*e.id == export)?;
        Some(self.world.graph.edge(export.root).child)
    }

    /// Some command of this name was given.
    fn issued(&self, name: &str) -> bool {
        self.records.iter().any(|r| match r {
            Record::Issued(step) => self.command(*step).is_some_and(|(execute, _)| execute == name),
            _ => false,
        })
    }

    /// Guests' requests that were in flight together, the later one second.
    fn pairs_in_flight(&self) -> Vec<(Flying, Flying)> {
        let mut flying: Vec<Flying> = Vec::new();
        let mut pairs = Vec::new();
        for record in self.records {
            match record {
                Record::Issued(step) => {
                    if let Action::Guest { op, .. } = &self.scenario.steps[step.0 as usize].action {
                        pairs.extend(flying.iter().map(|other| (*other, (*step, *op))));
                        flying.push((*step, *op));
                    }
                }
                // One whose connection was closed may still be under way.
                Record::Ended(_, outcome) if outcome.errno() == Some(ESHUTDOWN) => {}
                Record::Ended(step, _) => flying.retain(|(s, _)| s != step),
                _ => {}
            }
        }
        pairs
    }

    fn says(&self, oracles: &[OracleName], text: &str) -> bool {
        oracles.contains(&self.violation.oracle) && self.violation.message.contains(text)
    }
}

fn text<'a>(arguments: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    arguments.get(key).and_then(Value::as_str)
}

fn null_co_size(found: &Found<'_>) -> bool {
    let negative = |(_, arguments): Given<'_>| known::has_negative_null_co(arguments);
    found.says(&[OracleName::Daemon], "SIGABRT") && found.unanswered().any(negative)
}

fn enables_missing(found: &Found<'_>) -> bool {
    let missing = |(execute, arguments): Given<'_>| known::enables_missing(&found.world, execute, arguments);
    found.says(&[OracleName::Daemon], "SIGSEGV") && found.unanswered().any(missing)
}

fn bottom_outside_chain(found: &Found<'_>) -> bool {
    // A job that was about to end may have taken the bottom out of the chain just before.
    let finalizes = |id: &str| {
        let mut open = found.unanswered();
        open.any(|(execute, arguments)| {
            execute.ends_with("job-finalize") && text(arguments, "id") == Some(id)
        })
    };
    let ends = |job: &&Job| match job.status {
        _ if job.outcome.is_some() => false,
        JobStatus::Waiting | JobStatus::Aborting => true,
        JobStatus::Pending => job.auto_finalize || finalizes(&job.id),
        _ => false,
    };
    let mut later = found.world.clone();
    let ids: Vec<_> = found
        .world
        .jobs
        .iter()
        .filter(ends)
        .map(|job| Rc::clone(&job.id))
        .collect();
    for id in ids {
        drop(later.job_completed(&id, blkcheck_model::Outcome::Success));
    }
    let outside = |(execute, arguments): Given<'_>| {
        [&found.world, &later]
            .iter()
            .any(|world| known::has_bottom_outside(world, execute, arguments))
    };
    found.says(&[OracleName::Daemon], "without coming to rest") && found.unanswered().any(outside)
}

fn bottom_crash(found: &Found<'_>) -> bool {
    let adds = |(_, arguments): Given<'_>| known::bottoms_out(&found.world, arguments);
    found.says(&[OracleName::Daemon], "SIGSEGV")
        && (known::has_bottom_on_top(&found.world) || found.unanswered().any(adds))
}

/// A filter was put right on top of its bottom, by a user or for a stream, and the damage is in that bottom.
fn copies_below_bottom(found: &Found<'_>) -> bool {
    let node = found.violation.message.split('\'').nth(1).unwrap_or_default();
    let filters = |action: &Action| match action {
        Action::Command { execute, arguments } if execute == "blockdev-add" => {
            text(arguments, "driver") == Some("copy-on-read") && text(arguments, "bottom") == Some(node)
        }
        Action::Command { execute, arguments } if execute == "block-stream" => {
            let down_to = ["base", "base-node", "bottom"]
                .iter()
                .any(|key| arguments.contains_key(*key));
            text(arguments, "device") == Some(node) && down_to
        }
        _ => false,
    };
    found.violation.oracle == OracleName::Bottom
        && found.scenario.steps.iter().any(|step| filters(&step.action))
}

/// The name on record is right and the format is not, by a command that was accepted. Or the name is that of a command which storage
/// failed: the header may have been written before, and would be right if the format were.
fn backing_format(found: &Found<'_>) -> bool {
    let line = |with: &str| found.violation.evidence.iter().find_map(|l| l.strip_prefix(with));
    let name = |line: Option<&str>| line.and_then(|l| l.split('"').nth(1)).map(str::to_owned);
    let (expected, got) = (name(line("expected:")), name(line("found:")));
    let wrote = |step: StepId, answer: &Result<Value, Refusal>| {
        let command = found
            .command(step)
            .filter(|(execute, _)| *execute == "change-backing-file");
        command.is_some_and(|(_, arguments)| match answer {
            Ok(_) => expected.is_some() && expected == got,
            Err(_) => failed_by_storage(found, step) && text(arguments, "backing-file") == got.as_deref(),
        })
    };
    found.says(&[OracleName::Image], "names another backing file")
        && got.is_some()
        && found.records.iter().any(|r| match r {
            Record::Ended(step, Outcome::Command(answer)) => wrote(*step, answer),
            _ => false,
        })
}

/// Storage failed to write or to flush while this step was under way.
fn failed_by_storage(found: &Found<'_>, step: StepId) -> bool {
    let fails = |r: &Record| matches!(r, Record::Fault(fault) if matches!(fault.kind, FaultKind::Write | FaultKind::Flush));
    let span = found.span(step);
    span.is_some_and(|(from, to)| found.records[from..to].iter().any(fails))
}

/// A guest's request was in flight beside a transaction with a snapshot that was refused or is still to be, and then data are
/// not as they should be.
fn loses_writes(found: &Found<'_>) -> bool {
    let oracles = [OracleName::Data, OracleName::Transparency, OracleName::Status];
    if !oracles.contains(&found.violation.oracle) {
        return false;
    }
    let (mut guests, mut transactions) = (Vec::new(), Vec::new());
    let mut beside: Vec<StepId> = Vec::new();
    for record in found.records {
        match record {
            Record::Issued(step) => match &found.scenario.steps[step.0 as usize].action {
                Action::Guest { .. } => {
                    guests.push(*step);
                    beside.extend(&transactions);
                }
                Action::Command { execute, arguments } if snapshots(execute, arguments) => {
                    transactions.push(*step);
                    if !guests.is_empty() {
                        beside.push(*step);
                    }
                }
                _ => {}
            },
            Record::Ended(step, outcome) => {
                guests.retain(|s| s != step);
                transactions.retain(|s| s != step);
                if matches!(outcome, Outcome::Command(Ok(_))) {
                    beside.retain(|s| s != step);
                }
            }
            _ => {}
        }
    }
    !beside.is_empty()
}

/// The transaction that was refused last has a snapshot to an overlay with parents, and the overlay, or the node that was to be below it, has
/// others now.
fn takes_parents(found: &Found<'_>) -> bool {
    let oracles = [OracleName::Graph, OracleName::Permissions];
    let node = found.violation.message.split('\'').nth(1).unwrap_or_default();
    let is_one = |overlay: &str, below: &str| node == overlay || node == below;
    found.says(&oracles, " than it should have")
        && found
            .last_answer()
            .is_some_and(|((execute, arguments), refusal)| {
                refusal.is_some() && known::aborts_a_used_overlay(&found.world, execute, arguments, is_one)
            })
}

/// Old data where something was written, and a copy-on-read filter stands on another filter or on a raw node.
fn undoes_write(found: &Found<'_>) -> bool {
    let oracles = [OracleName::Data, OracleName::Transparency, OracleName::Status];
    let graph = &found.world.graph;
    let copies_there = |(id, node): (blkcheck_model::NodeId, &blkcheck_model::Node)| {
        let below = graph.filter_child(id).map(|below| graph.node(below).driver);
        node.driver == Driver::CopyOnRead
            && matches!(below, Some(Driver::CopyOnRead | Driver::Throttle | Driver::Raw))
    };
    oracles.contains(&found.violation.oracle)
        && found.violation.message.contains("overwritten by step")
        && graph.nodes().any(copies_there)
}

/// A guest met an assertion, and a snapshot had made what is under an export shorter.
fn snapshot_shortens(found: &Found<'_>) -> bool {
    past_the_end(found) && found.causes.snapshot_shortens
}

/// The same of a reopen.
fn reopen_shortens(found: &Found<'_>) -> bool {
    past_the_end(found) && found.causes.reopen_shortens
}

/// A node that should have followed has another length than it should have; or what lies behind the end of the node below is
/// looked for without end.
fn keeps_length(found: &Found<'_>) -> bool {
    let node = found.violation.message.split(' ').next().unwrap_or_default();
    let stale = found.says(&[OracleName::Transparency], " bytes long, expected ")
        && found.causes.relengthed.iter().any(|n| **n == *node);
    let endless = found.says(&[OracleName::Daemon], "without coming to rest")
        && !found.causes.relengthed.is_empty()
        && found.unanswered().next().is_none();
    stale || endless
}

/// Somebody waits for ever, or the daemon itself for a drain, and a reopen before came upon a node twice.
fn drains_for_ever(found: &Found<'_>) -> bool {
    found.causes.drained_twice
        && (found.says(&[OracleName::Liveness], "nothing can happen any more")
            || found.says(&[OracleName::Daemon], "without coming to rest"))
}

/// One of the assertions that a request past the end of a node meets.
fn past_the_end(found: &Found<'_>) -> bool {
    [
        "nbd_co_send_sparse_read",
        "bdrv_co_write_req_prepare",
        "blk_check_byte_request",
    ]
    .iter()
    .any(|function| found.says(&[OracleName::Daemon], function))
}

/// A list of actions that goes on after a snapshot, and so can be refused after it.
fn snapshots(execute: &str, arguments: &Map<String, Value>) -> bool {
    let mut but_last = actions(execute, arguments).rev().skip(1);
    but_last.any(|(kind, _)| kind == "blockdev-snapshot")
}

/// A zero write or discard and another write of the same cluster were in flight together, and then data or tables are not
/// as they should be.
fn zeroes_under_write(found: &Found<'_>) -> bool {
    let seen = match found.violation.oracle {
        OracleName::Data | OracleName::Transparency | OracleName::Status => true,
        OracleName::Image => found.violation.message.contains("is corrupt"),
        _ => false,
    };
    if !seen {
        return false;
    }
    let cluster = largest_cluster(found.scenario);
    found
        .pairs_in_flight()
        .iter()
        .any(|((_, a), (_, b))| changes_under_change(*a, *b, cluster))
}

/// A read shows what was written elsewhere, and a request that gives clusters back was in flight with it.
fn discard_under_read(found: &Found<'_>) -> bool {
    let cluster = largest_cluster(found.scenario);
    let is_it = |step: StepId| Some(step) == found.violation.step;
    found.says(&[OracleName::Data], "which belongs to")
        && found
            .pairs_in_flight()
            .iter()
            .any(|((s, a), (t, b))| (is_it(*s) || is_it(*t)) && frees_under_read(*a, *b, cluster))
}

/// The largest cluster of any image, in bytes.
pub(crate) fn largest_cluster(scenario: &Scenario) -> u64 {
    let formatted = scenario.images.iter().filter(|i| i.format == Format::Qcow2);
    formatted.map(|i| u64::from(i.cluster_size)).max().unwrap_or(512)
}

/// Whether two requests in flight meet a defect: `zeroes-under-write` or `discard-under-read`.
pub(crate) fn collide(a: GuestOp, b: GuestOp, cluster: u64) -> bool {
    changes_under_change(a, b, cluster) || frees_under_read(a, b, cluster)
}

/// Both change a cluster, one of them by zeroing it or giving it back.
fn changes_under_change(a: GuestOp, b: GuestOp, cluster: u64) -> bool {
    let (Some((a, zeroing)), Some((b, other))) = (changes(a), changes(b)) else {
        return false;
    };
    (zeroing || other) && share_a_cluster(a, b, cluster)
}

/// One reads a cluster that the other gives back.
fn frees_under_read(a: GuestOp, b: GuestOp, cluster: u64) -> bool {
    match (a, b) {
        (GuestOp::Read(read), GuestOp::Discard(freed) | GuestOp::WriteZeroesUnmap(freed))
        | (GuestOp::Discard(freed) | GuestOp::WriteZeroesUnmap(freed), GuestOp::Read(read)) => {
            share_a_cluster(read, freed, cluster)
        }
        _ => false,
    }
}

fn share_a_cluster(a: Range, b: Range, cluster: u64) -> bool {
    let first = |range: Range| range.offset / cluster;
    let last = |range: Range| (range.offset + range.length).div_ceil(cluster);
    first(a) < last(b) && first(b) < last(a)
}

/// What a request changes, and whether by zeroing it or giving it back.
fn changes(op: GuestOp) -> Option<(Range, bool)> {
    match op {
        GuestOp::Write(range) | GuestOp::WriteFua(range) => Some((range, false)),
        GuestOp::WriteZeroes(range) | GuestOp::WriteZeroesUnmap(range) | GuestOp::Discard(range) => {
            Some((range, true))
        }
        GuestOp::Read(_) | GuestOp::Flush | GuestOp::BlockStatus(_) => None,
    }
}

/// The known defect that a command would meet.
pub(crate) fn meets(world: &World, execute: &str, arguments: &Map<String, Value>) -> Option<&'static str> {
    if let Some(defect) = known::steers_around(world, &[], execute, arguments) {
        return Some(defect.id);
    }
    let given = Value::Object(arguments.clone());
    let command = Command::new(execute, &given);
    match execute {
        "block-stream" if causes::looks_among_descriptions(world, &command) => {
            Some("stream-records-description")
        }
        "block-stream" if let Err(refusal) = world.check(&command) => refusal
            .desc
            .starts_with("Permission conflict on node")
            .then_some("refused-stream-keeps-root"),
        "block-stream"
        | "blockdev-reopen"
        | "blockdev-snapshot"
        | "transaction"
        | "block_resize"
        | "change-backing-file" => causes::met_by_change(world, &command),
        _ => None,
    }
}

/// Whether a command takes a snapshot back, as long as which no guest may have a request in flight: the defect
/// `aborted-snapshot-loses-writes`.
pub(crate) fn takes_back(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    known::takes_back_a_snapshot((world, execute, arguments), |_| true)
}

#[cfg(test)]
mod tests;
