//! The known defects that need storage to fail, or the power.
//!
//! Rules: as in [`super`]; a matcher wants a fault in the run as well, or the power cut.

use blkcheck_impl::event::Event;
use blkcheck_model::Driver;

use super::{Defect, Found, Matcher, Sure, causes, largest_cluster, text};
use crate::compare::known;
use crate::history::{ESHUTDOWN, FaultKind, Outcome, Record, StepId};
use crate::oracle::OracleName;
use crate::oracle::data::LEFT_OUT;

use crate::scenario::{Action, GuestOp};

/// See the module.
pub(super) static FAILING: &[Defect] = &[
    Defect {
        id: "read-error-closes-connection",
        title: "an export closes the connection when a guest's read fails",
        qemu: "the NBD server takes the error of the read for one of its own socket: it hangs up, and every other request in \
           flight on that connection is lost with it",
        right: "the read is answered with its error, as it is where block status cannot be had; other requests are none of its concern",
        sure: Sure::Certain,
        scenario: include_str!("../../../../docs/findings/read-error-closes-connection.json"),
        page: include_str!("../../../../docs/findings/read-error-closes-connection.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "status-error-answered-twice",
        title: "a block status request that fails is answered once for each metadata context",
        qemu: "the NBD server ends its reply with the error of the first context, and goes on to the next one: more chunks \
           follow under a cookie that is free again",
        right: "one reply to one request: nothing follows the chunk that says that it is the last",
        sure: Sure::Certain,
        scenario: include_str!("../../../../docs/findings/status-error-answered-twice.json"),
        page: include_str!("../../../../docs/findings/status-error-answered-twice.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "failed-stream-changes-graph",
        title: "a stream that cannot write the header fails, and the graph is changed all the same",
        qemu: "the new backing link is made first and stays when the header cannot be written: the job fails, and the image \
           names a backing file that its node no longer has",
        right: "a failed job leaves graph and header as they were",
        sure: Sure::Likely,
        scenario: include_str!("../../../../docs/findings/failed-stream-changes-graph.json"),
        page: include_str!("../../../../docs/findings/failed-stream-changes-graph.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "change-backing-file-aborts",
        title: "change-backing-file aborts the daemon when the header cannot be written and the node not become read-only again",
        qemu: "the second error is set over the first one: assertion `*errp == NULL`",
        right: "the command is refused with the first error",
        sure: Sure::Certain,
        scenario: include_str!("../../../../docs/findings/change-backing-file-aborts.json"),
        page: include_str!("../../../../docs/findings/change-backing-file-aborts.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "stream-ignores-for-ever",
        title: "a stream with on-error=ignore asks for ever where it cannot learn what is allocated",
        qemu: "the error of the query leaves the length of the chunk at 0: the job ignores it, goes on by 0 bytes, and asks again",
        right: "what cannot be had is passed over, as where the copy fails; every job ends",
        sure: Sure::Certain,
        scenario: include_str!("../../../../docs/findings/stream-ignores-for-ever.json"),
        page: include_str!("../../../../docs/findings/stream-ignores-for-ever.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "stream-completes-in-cache",
        title: "a stream reports success while the tables of what it has copied are in memory only: if the daemon is killed then, \
            all of it is lost",
        qemu: "the header that drops the layers below is written at once; the tables that say where the copied data are stay in \
           the cache until somebody flushes",
        right: "everything that was copied is durable before the header names nothing below any more",
        sure: Sure::Certain,
        scenario: include_str!("../../../../docs/findings/stream-completes-in-cache.json"),
        page: include_str!("../../../../docs/findings/stream-completes-in-cache.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "freed-cluster-shows-write",
        title: "when the daemon is killed or the power fails, a cluster that was zeroed or discarded shows what was written somewhere else",
        qemu: "the cluster's space is used again at once, and new data are written there, while the table that no longer names it is in \
           memory only: the one in the file still does",
        right: "what was there, or zeroes: space is used again when the table that gave it up is durable",
        sure: Sure::Certain,
        scenario: include_str!("../../../../docs/findings/freed-cluster-shows-write.json"),
        page: include_str!("../../../../docs/findings/freed-cluster-shows-write.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "failed-table-entry-stays",
        title: "a write that fails because the entry of its new table cannot be made durable leaves an image that is corrupt",
        qemu: "the entry was written, the flush behind it failed: in memory it is taken back and the table's cluster is free again, in the \
           file the entry stays",
        right: "what may be in the file keeps its cluster: at worst space is lost",
        sure: Sure::Certain,
        scenario: include_str!("../../../../docs/findings/failed-table-entry-stays.json"),
        page: include_str!("../../../../docs/findings/failed-table-entry-stays.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "failed-flush-loses-order",
        title: "a flush that storage fails under a guest's write or discard is told to nobody, and tables are written in the wrong order from then on",
        qemu: "which table has to be durable before which is noted after what was noted before has been written and flushed; when that fails \
           nothing is noted, and the request succeeds",
        right: "the request fails, or the order holds: no entry in the file ever names a cluster that the file says is free",
        sure: Sure::Likely,
        scenario: include_str!("../../../../docs/findings/failed-flush-loses-order.json"),
        page: include_str!("../../../../docs/findings/failed-flush-loses-order.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "failed-query-reads-garbage",
        title: "a read through copy-on-read with bottom succeeds with memory nobody wrote where storage fails the question which layer holds it",
        qemu: "the error of the question counts as the end of the layer below: the read ends there, with success, and leaves its buffer as it is",
        right: "the read fails, or the data: a successful read is filled",
        sure: Sure::Certain,
        scenario: include_str!("../../../../docs/findings/failed-query-reads-garbage.json"),
        page: include_str!("../../../../docs/findings/failed-query-reads-garbage.md"),
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "read-error-under-drain-crashes",
        title: "a guest's read that fails while its node is drained uses freed memory, and crashes the daemon",
        qemu: "the drain has the reader of each connection woken later, by somebody who holds no reference; the failed read closes the connection \
           before",
        right: "the read fails, alone: that a disk fails does not end the process that serves other guests",
        sure: Sure::Certain,
        scenario: include_str!("../../../../docs/findings/read-error-under-drain-crashes.json"),
        page: include_str!("../../../../docs/findings/read-error-under-drain-crashes.md"),
        matches: |_| false,
        steer: None,
    },
];

pub(super) const MATCHERS: &[(&str, Matcher)] = &[
    ("read-error-closes-connection", closes_connection),
    ("status-error-answered-twice", answered_twice),
    ("failed-stream-changes-graph", changes_graph),
    ("change-backing-file-aborts", aborts),
    ("stream-ignores-for-ever", ignores_for_ever),
    ("stream-completes-in-cache", stays_in_cache),
    ("freed-cluster-shows-write", shows_write),
    ("failed-table-entry-stays", entry_stays),
    ("failed-flush-loses-order", loses_order),
    ("failed-query-reads-garbage", reads_garbage),
    ("read-error-under-drain-crashes", dies_under_drain),
];

/// The daemon died when it had closed a connection because of a failed read, and what storage failed last was under a guest's read; somebody
/// waits for an answer meanwhile.
fn dies_under_drain(found: &Found<'_>) -> bool {
    const CLOSED: &str = "Disconnect client, due to: Failed to send reply: reading from file failed";
    let is_fault = |record: &Record| matches!(record, Record::Fault(_));
    let last = found.records.iter().rposition(is_fault);
    let is_read =
        |at: usize| matches!(&found.records[at], Record::Fault(fault) if fault.kind == FaultKind::Read);
    let under_read = |at: usize| {
        found.issued_steps().any(|step| {
            let reads = matches!(found.guest(step), Some((_, GuestOp::Read(_))));
            let span = found.span(step).filter(|_| reads);
            span.is_some_and(|(begin, over)| (begin..over).contains(&at))
        })
    };
    found.says(&[OracleName::Daemon], "the daemon died of SIG")
        && found.violation.evidence.iter().any(|line| line.contains(CLOSED))
        && last.is_some_and(|at| is_read(at) && under_read(at))
        && found.unanswered().next().is_some()
}

/// What was read, or what was filled with it, is nobody's or another place's, or zeroes that nobody wrote, as fresh memory holds; and storage failed a read below a copy-on-read filter with
/// `bottom`.
fn reads_garbage(found: &Found<'_>) -> bool {
    let oracles = [
        OracleName::Data,
        OracleName::Transparency,
        OracleName::PointInTime,
    ];
    let fresh = found.says(&oracles, " holds zeroes, expected ");
    let is_garbage = fresh
        || found.says(&oracles, " holds neither zeroes nor one whole stamp")
        || found.says(&oracles, ", which belongs to ");
    is_garbage && found.causes.failed_query
}

/// The tables of an image are in clusters without a reference, and nothing else is wrong with it; and storage failed a flush of that very
/// image, or a write as small as an entry that it carried out all the same.
fn entry_stays(found: &Found<'_>) -> bool {
    let image = found.image();
    let may_stay = |record: &Record| match record {
        Record::Fault(fault) if image == usize::try_from(fault.image).ok() => match fault.kind {
            FaultKind::Flush => true,
            FaultKind::Write => fault.bytes <= 512 && fault.done == fault.bytes,
            _ => false,
        },
        _ => false,
    };
    let wrong = found.corruption();
    let of_tables = are_free(&wrong, &["L2 table"]);
    (of_tables || is_used_again(&wrong)) && found.records.iter().any(may_stay)
}

/// Data of an image are in clusters without a reference, and nothing else is wrong with it but the same of tables; and storage failed a flush of
/// that very image under a guest's write, zero write or discard that succeeded.
fn loses_order(found: &Found<'_>) -> bool {
    let wrong = found.corruption();
    let image = found.image();
    let of_image = |record: &Record| match record {
        Record::Fault(fault) => fault.kind == FaultKind::Flush && image == usize::try_from(fault.image).ok(),
        _ => false,
    };
    let is_told_to_nobody = |step: StepId| {
        let changes = found.guest(step).is_some_and(|(_, op)| {
            matches!(
                op,
                GuestOp::Write(_)
                    | GuestOp::WriteZeroes(_)
                    | GuestOp::WriteZeroesUnmap(_)
                    | GuestOp::Discard(_)
            )
        });
        let succeeds = matches!(found.outcome(step), Some(Outcome::Done(Ok(()))));
        let span = found.span(step).filter(|_| changes && succeeds);
        span.is_some_and(|(begin, over)| found.records[begin..over].iter().any(of_image))
    };
    wrong.iter().any(|line| line.starts_with("data cluster at "))
        && are_free(&wrong, &["data cluster", "L2 table"])
        && found.issued_steps().any(is_told_to_nobody)
}

/// Clusters without a reference are all that is wrong. Each is told of twice: as a cluster, and as what it is.
fn are_free(wrong: &[&str], kinds: &[&str]) -> bool {
    let clusters: Option<Vec<_>> = wrong.iter().map(|line| free_cluster(line, kinds)).collect();
    let clusters = clusters.unwrap_or_default();
    let twice = |one: &&str| clusters.iter().filter(|other| *other == one).count() == 2;
    !clusters.is_empty() && clusters.iter().all(twice)
}

/// A table is two entries' by now, and what it leads to is told of twice; nothing else is wrong.
fn is_used_again(wrong: &[&str]) -> bool {
    const TWICE: [&str; 2] = [
        " is used 2 times, its refcount is 1",
        " overlaps something else: used 2 times",
    ];
    let is_table = |line: &&str| line.starts_with("L2 table at ") && line.ends_with(TWICE[1]);
    let is_used = |line: &&str| {
        TWICE.iter().any(|what| line.ends_with(what)) || line.starts_with("the active tables have ")
    };
    wrong.iter().any(is_table) && wrong.iter().all(is_used)
}

/// The cluster that has no reference, if a line of a check says so of something of these kinds.
fn free_cluster<'a>(line: &'a str, kinds: &[&str]) -> Option<&'a str> {
    line.strip_prefix("host cluster at ")
        .and_then(|rest| rest.strip_suffix(" is used 1 times, its refcount is 0"))
        .or_else(|| {
            let named = kinds.iter().find_map(|kind| line.strip_prefix(kind))?;
            named
                .strip_prefix(" at ")?
                .strip_suffix(": COPIED is true, the refcount 0")
        })
}

/// The power failed, and what is wrong belongs to another place: it is shown by a cluster that a guest had zeroed or given back, and no guest
/// had that flushed.
fn shows_write(found: &Found<'_>) -> bool {
    let message = &found.violation.message;
    let place = message
        .find(" holds ")
        .and_then(|end| message[..end].rsplit(" at 0x").next())
        .and_then(|digits| u64::from_str_radix(digits, 16).ok());
    let cluster = largest_cluster(found.scenario);
    let frees = |step: &StepId| {
        let Some((_, GuestOp::Discard(range) | GuestOp::WriteZeroesUnmap(range))) = found.guest(*step) else {
            return false;
        };
        let (from, to) = (
            range.offset / cluster,
            (range.offset + range.length).div_ceil(cluster),
        );
        place.is_some_and(|at| (from..to).contains(&(at / cluster))) && !found.flushed_since(*step)
    };
    found.is_of_a_power_cut()
        && message.contains(", which belongs to ")
        && found.issued_steps().any(|step| frees(&step))
}

/// The power failed, and what is wrong is in an image that a stream had filled, or in one above it; and no guest had anything flushed
/// since the last stream ended: what such a flush found is there. A stream that is not over yet counts where it had rewritten the header.
fn stays_in_cache(found: &Found<'_>) -> bool {
    if !found.is_of_a_power_cut() || flushed_since_a_stream(found) {
        return false;
    }
    let world = &found.world;
    let mut evidence = found.violation.evidence.iter();
    if evidence.any(|line| line.starts_with(LEFT_OUT)) && world.jobs.iter().any(|job| job.stream().is_some())
    {
        return true;
    }
    let file = |node| world.image_file(node);
    let named = |file: &str| found.violation.message.contains(&format!(" {file} at "));
    let mut wrong = world.graph.nodes().map(|(id, _)| id);
    wrong.any(|node| {
        file(node).is_some_and(|file| named(&file))
            && causes::chain(&world.graph, node)
                .filter_map(file)
                .any(|file| found.causes.streamed.contains(&file))
    })
}

/// A guest's flush was answered well that was sent after the last stream had ended.
fn flushed_since_a_stream(found: &Found<'_>) -> bool {
    let ends = |record: &Record| match record {
        Record::Layer(Event::Qmp { name, data }) => {
            *name == "BLOCK_JOB_COMPLETED" && data["type"] == "stream" && data.get("error").is_none()
        }
        _ => false,
    };
    let Some(end) = found.records.iter().rposition(ends) else {
        return false;
    };
    found.flushed_in(&found.records[end..])
}

impl<'a> Found<'a> {
    /// The image that the violation is about, by its place.
    fn image(&self) -> Option<usize> {
        let quoted = self.violation.message.split('\'').nth(1);
        let mut images = self.scenario.images.iter();
        images.position(|image| Some(&*image.file) == quoted)
    }

    /// What is wrong with an image that was closed, or that a power cut left; nothing if this is about something else.
    fn corruption(&self) -> Vec<&'a str> {
        if self.violation.oracle != OracleName::Image {
            return Vec::new();
        }
        let message = self.violation.message.as_str();
        let evidence = self.violation.evidence.iter().map(String::as_str);
        if let Some((_, first)) = message.split_once(" is corrupt after a power cut: ") {
            return [first].into_iter().chain(evidence).collect();
        }
        let closed = message.contains(" is corrupt after a clean close: ");
        let corruption = evidence.filter_map(|line| line.strip_prefix("Corruption: "));
        corruption.filter(|_| closed).collect()
    }

    /// A guest's flush was answered well that was sent after this step had ended.
    fn flushed_since(&self, step: StepId) -> bool {
        let is_end = |record: &Record| matches!(record, Record::Ended(ended, _) if *ended == step);
        let end = self.records.iter().position(is_end);
        end.is_some_and(|end| self.flushed_in(&self.records[end..]))
    }

    /// A guest's flush of the image that is wrong was sent and answered well in these records.
    fn flushed_in(&self, records: &[Record]) -> bool {
        let file = self.violation.message.split(" at 0x").next();
        let file = file.and_then(|before| before.rsplit(' ').next());
        let graph = &self.world.graph;
        let is_of_it = |node| self.world.image_file(graph.skip_filters(node)).as_deref() == file;
        let flushes = |step: StepId| {
            let flush = matches!(self.guest(step), Some((_, GuestOp::Flush)));
            flush && self.asked(step).is_none_or(is_of_it)
        };
        let sent = |step: StepId| {
            let mut records = records.iter();
            records.any(|record| matches!(record, Record::Issued(issued) if *issued == step))
        };
        records.iter().any(|record| match record {
            Record::Ended(step, Outcome::Done(Ok(()))) => flushes(*step) && sent(*step),
            _ => false,
        })
    }

    /// Storage failed a request of one of these kinds.
    fn failed(&self, kinds: &[FaultKind]) -> bool {
        self.faults((0, self.records.len()), kinds) > 0
    }

    /// How often storage failed a request of one of these kinds, in a span of records.
    fn faults(&self, (from, to): (usize, usize), kinds: &[FaultKind]) -> usize {
        let is_one = |r: &&Record| matches!(r, Record::Fault(fault) if kinds.contains(&fault.kind));
        let span = self.records.get(from..to).unwrap_or_default();
        span.iter().filter(is_one).count()
    }

    /// A guest's request.
    fn guest(&self, step: StepId) -> Option<(&'a str, &'a GuestOp)> {
        match &self.scenario.steps.get(step.0 as usize)?.action {
            Action::Guest { export, op } => Some((export, op)),
            _ => None,
        }
    }
}

/// Storage failed something while a read was in flight on the export whose connection is closed, and that read was not answered.
/// Any fault may be under a read, through copy-on-read or what a table is evicted for.
fn closes_connection(found: &Found<'_>) -> bool {
    let closed = found
        .violation
        .step
        .and_then(|step| Some((found.guest(step)?.0, found.span(step)?.1)));
    let Some((export, end)) =
        closed.filter(|_| found.says(&[OracleName::Errors], "ends because its connection is closed"))
    else {
        return false;
    };
    found.issued_steps().any(|read| {
        let on_it = matches!(found.guest(read), Some((on, GuestOp::Read(_))) if on == export);
        let lost = matches!(found.outcome(read), None | Some(Outcome::Read(Err(ESHUTDOWN))));
        let span = found.span(read).filter(|_| on_it && lost);
        span.is_some_and(|(begin, over)| found.faults((begin, over.min(end)), &FaultKind::ALL) > 0)
    })
}

/// While somebody asked for block status, a table could not be read; or the snapshot that somebody asks was given up before.
fn answered_twice(found: &Found<'_>) -> bool {
    let mut nodes = found.world.graph.nodes();
    let gone = found.causes.broken && nodes.any(|(_, node)| node.driver == Driver::SnapshotAccess);
    let failed = |step: StepId| {
        let asks = matches!(found.guest(step), Some((_, GuestOp::BlockStatus(_))));
        let span = found.span(step).filter(|_| asks);
        span.is_some_and(|span| found.faults(span, &[FaultKind::Read]) > 0)
    };
    found.says(
        &[OracleName::Daemon],
        "a status request that failed is answered once more",
    ) && (gone || found.issued_steps().any(failed))
}

/// The header is the old one, and it is that of the device of a stream which failed after a write did.
fn changes_graph(found: &Found<'_>) -> bool {
    let mut images = found.causes.unwritten.iter();
    found.says(&[OracleName::Image], "names another backing file")
        && images.any(|image| known::words(&found.violation.message).any(|word| *word == **image))
}

/// The command that is not answered was failed twice: the header, and what is flushed after it.
fn aborts(found: &Found<'_>) -> bool {
    let changes = |step: &StepId| {
        let command = found.command(*step);
        let changes = command.is_some_and(|(execute, arguments)| {
            execute == "change-backing-file" && text(arguments, "image-node-name").is_some()
        });
        changes && found.outcome(*step).is_none()
    };
    let twice = |step: StepId| {
        let span = found.span(step);
        span.is_some_and(|span| found.faults(span, &[FaultKind::Write, FaultKind::Flush]) > 1)
    };
    found.says(&[OracleName::Daemon], "error_setv") && found.issued_steps().filter(changes).any(twice)
}

/// The job is a stream that was told to ignore errors.
fn ignores_for_ever(found: &Found<'_>) -> bool {
    let id = found.violation.message.split('\'').nth(1).unwrap_or_default();
    let of_job = |r: &Record| match r {
        Record::Issued(step) => found
            .command(*step)
            .filter(|(_, given)| text(given, "job-id") == Some(id)),
        _ => None,
    };
    let made_by = found.records.iter().rev().find_map(of_job);
    found.says(&[OracleName::Jobs], "it asks for the same again and again")
        && found.failed(&[FaultKind::Read])
        && made_by.is_some_and(|(execute, given)| {
            execute == "block-stream" && text(given, "on-error") == Some("ignore")
        })
}
