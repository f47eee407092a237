//! The known defects that need storage to fail.
//!
//! Rules: as in [`super`]; a matcher wants a fault in the run as well.

use super::{Defect, Found, Matcher, Sure, text};
use crate::history::{FaultKind, Record};
use crate::oracle::OracleName;
use blkcheck_impl::event::Event;

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
];

pub(super) const MATCHERS: &[(&str, Matcher)] = &[
    ("read-error-closes-connection", closes_connection),
    ("status-error-answered-twice", answered_twice),
    ("failed-stream-changes-graph", changes_graph),
    ("change-backing-file-aborts", aborts),
    ("stream-ignores-for-ever", ignores_for_ever),
];

impl Found<'_> {
    /// Storage failed a request of one of these kinds.
    fn failed(&self, kinds: &[FaultKind]) -> bool {
        let is_one = |r: &Record| matches!(r, Record::Fault(fault) if kinds.contains(&fault.kind));
        self.records.iter().any(is_one)
    }
}

/// Any fault may be under a read, through copy-on-read or what a table is evicted for.
fn closes_connection(found: &Found<'_>) -> bool {
    let any = |r: &Record| matches!(r, Record::Fault(_));
    found.says(&[OracleName::Errors], "ends because its connection is closed")
        && found.records.iter().any(any)
}

fn answered_twice(found: &Found<'_>) -> bool {
    found.says(
        &[OracleName::Daemon],
        "a status request that failed is answered once more",
    ) && found.failed(&[FaultKind::Read])
}

/// The header is the old one, and a job failed after a write did.
fn changes_graph(found: &Found<'_>) -> bool {
    let failed = |r: &Record| {
        matches!(r, Record::Layer(Event::Qmp { name, data })
            if *name == "BLOCK_JOB_COMPLETED" && data.get("error").is_some())
    };
    found.says(&[OracleName::Image], "names another backing file")
        && found.failed(&[FaultKind::Write, FaultKind::Flush])
        && found.records.iter().any(failed)
}

fn aborts(found: &Found<'_>) -> bool {
    let changes = |(execute, arguments): super::Given<'_>| {
        execute == "change-backing-file" && text(arguments, "image-node-name").is_some()
    };
    found.says(&[OracleName::Daemon], "error_setv")
        && found.failed(&[FaultKind::Write, FaultKind::Flush])
        && found.unanswered().any(changes)
}

fn ignores_for_ever(found: &Found<'_>) -> bool {
    found.says(&[OracleName::Jobs], "it asks for the same again and again")
        && found.failed(&[FaultKind::Read])
}
