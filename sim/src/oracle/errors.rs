//! A guest's request fails for a reason: storage failed meanwhile, and then with an error that storage gave, or what it asks
//! cannot be; and nobody loses a connection to an export that stays.
//!
//! Rules: EIO and ENOSPC need a fault of that kind while the request was in flight, on any image: what another request
//! waits for may be its own. Once a flush failed, whoever may flush may fail with EIO without storage being asked: all but block
//! status and reads that copy nothing. ESHUTDOWN is how a request ends whose connection was closed: somebody asked for the end
//! of its export. (Scenarios that are steered around known defects put up with `read-error-closes-connection`.)
//! Unchecked: errors about the request itself (EPERM, EINVAL, …); EIO and ENOSPC of requests past the end, and of all requests
//! once a command was given that may shorten a node; which of several faults was this request's.

use std::rc::Rc;

use blkcheck_impl::error::Errno;
use blkcheck_model::{Driver, NodeId, World};
use serde_json::{Map, Value};

use super::{OracleName, Violation, violation};
use crate::follow::Follower;
use crate::history::{ESHUTDOWN, FaultKind, Record, StepId};
use crate::scenario::{Action, GuestOp, Scenario, actions};

/// A guest's request in flight, and with which errors storage failed since it began.
#[derive(Debug)]
struct Flying {
    step: StepId,
    /// The id of its export; `None`: there was none.
    export: Option<Rc<str>>,
    /// The end of its export was asked for while it was in flight.
    export_goes: bool,
    /// It lies inside what its export shows.
    inside: bool,
    /// What it asks may take a flush.
    flushes: bool,
    met: Vec<i32>,
    /// Storage failed under one that was in flight when it began: their connection may be about to close.
    late: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Errors {
    flying: Vec<Flying>,
    flush_lost: bool,
    /// Exports whose end is asked for by commands that are not answered: (command, id).
    going: Vec<(StepId, Rc<str>)>,
    /// A command was given after which a node may be shorter.
    lengths_change: bool,
}

impl Errors {
    pub(super) fn reset(&mut self) {
        *self = Errors::default();
    }

    /// Follows a record; the follower has not yet.
    pub(super) fn record(
        &mut self,
        scenario: &Scenario,
        follower: &Follower,
        record: &Record,
    ) -> Result<(), Violation> {
        match record {
            Record::Issued(step) => self.issued(scenario, follower, *step),
            Record::PowerCut { .. } => {}
            Record::Fault(fault) => {
                self.flush_lost |= fault.kind == FaultKind::Flush;
                for flying in &mut self.flying {
                    flying.met.push(fault.errno);
                }
            }
            Record::Ended(step, outcome) => {
                self.going.retain(|(command, _)| command != step);
                return self.ended(scenario, follower, *step, outcome.errno());
            }
            Record::Layer(_) => {}
        }
        Ok(())
    }

    fn issued(&mut self, scenario: &Scenario, follower: &Follower, step: StepId) {
        match &scenario.steps[step.0 as usize].action {
            Action::Guest { export, op } => {
                let world = &follower.world;
                let node = follower.export_node(export);
                let length = node.map(|node| world.graph.node(node).length);
                let end = op.range().map_or(Some(0), |r| r.offset.checked_add(r.length));
                let inside = matches!((end, length), (Some(end), Some(length)) if end <= length);
                let late = self.flying.iter().any(|f| f.late || !f.met.is_empty());
                let export = follower.export_id(export);
                let goes = |id: &Rc<str>| self.going.iter().any(|(_, going)| going == id);
                self.flying.push(Flying {
                    step,
                    export_goes: export.as_ref().is_none_or(goes),
                    export,
                    inside,
                    flushes: may_flush(world, node, *op),
                    met: Vec::new(),
                    late,
                });
            }
            Action::Command { execute, arguments } => {
                self.lengths_change |= changes_lengths(execute, arguments);
                if execute == "block-export-del"
                    && let Some(id) = arguments.get("id").and_then(Value::as_str)
                {
                    self.going.push((step, id.into()));
                    for flying in &mut self.flying {
                        flying.export_goes |= flying.export.as_deref() == Some(id);
                    }
                }
            }
            _ => {}
        }
    }

    fn ended(
        &mut self,
        scenario: &Scenario,
        follower: &Follower,
        step: StepId,
        errno: Option<i32>,
    ) -> Result<(), Violation> {
        let Some(at) = self.flying.iter().position(|f| f.step == step) else {
            return Ok(());
        };
        let mut flying = self.flying.swap_remove(at);
        let Some(errno) = errno else { return Ok(()) };
        if let Action::Guest { export, op } = &scenario.steps[step.0 as usize].action {
            // A filter that copies may have come under it meanwhile.
            flying.flushes |= may_flush(&follower.world, follower.export_node(export), *op);
        }
        if self.excuses(scenario, &flying, errno) {
            return Ok(());
        }
        let what = super::liveness::step_text(scenario, step);
        let message = match errno {
            ESHUTDOWN => format!("{what} ends because its connection is closed, and nobody asked for that"),
            _ => format!("{what} fails with '{}', and storage did not", Errno(errno).text()),
        };
        let met = flying.met.iter();
        let met = met.map(|e| format!("storage failed meanwhile: {}", Errno(*e).text()));
        Err(violation(OracleName::Errors, Some(step), message, met.collect()))
    }

    /// Whether there is a reason for this request to fail like this.
    fn excuses(&self, scenario: &Scenario, flying: &Flying, errno: i32) -> bool {
        match Errno(errno) {
            Errno(ESHUTDOWN) => {
                flying.export_goes || (scenario.steer && (flying.late || !flying.met.is_empty()))
            }
            Errno::EIO | Errno::ENOSPC if !flying.inside || self.lengths_change => true,
            Errno::EIO if self.flush_lost && flying.flushes => true,
            Errno::EIO | Errno::ENOSPC => flying.met.contains(&errno),
            _ => true,
        }
    }
}

/// Whether a request on this node may make somebody flush: a format flushes between what it writes.
fn may_flush(world: &World, node: Option<NodeId>, op: GuestOp) -> bool {
    match op {
        GuestOp::BlockStatus(_) => false,
        GuestOp::Read(_) => node.is_some_and(|node| copies_on_read(world, node)),
        _ => true,
    }
}

/// Whether a read of this node may be written somewhere.
fn copies_on_read(world: &World, node: NodeId) -> bool {
    let mut below = vec![node];
    while let Some(node) = below.pop() {
        if world.graph.node(node).driver == Driver::CopyOnRead {
            return true;
        }
        below.extend(world.graph.children(node).map(|(_, edge)| edge.child));
    }
    false
}

/// A command after which a node may be shorter than it was.
fn changes_lengths(execute: &str, arguments: &Map<String, Value>) -> bool {
    match execute {
        "block_resize" | "blockdev-reopen" | "blockdev-snapshot" => true,
        _ => actions(execute, arguments).any(|(kind, _)| kind.starts_with("blockdev-snapshot")),
    }
}

#[cfg(test)]
mod tests {
    use blkcheck_impl::event::Event;

    use super::super::tests::scenario_of;
    use super::*;
    use crate::history::{Fault, Outcome, Refusal};

    const READ: &str = r#"{"read":{"offset":0,"length":512}}"#;
    const WRITE: &str = r#"{"write":{"offset":0,"length":512}}"#;
    const FLUSHES: &[(FaultKind, Errno)] = &[(FaultKind::Flush, Errno::EIO)];

    /// The records of a node with exports x and y and of `steps` after that, each command done at once.
    fn records(top: &str, steps: &str) -> (Scenario, Vec<Record>) {
        let scenario = scenario_of(&format!(
            r#"{{"version":1,"grain":512,"images":[{{"file":"a","format":"raw","size":512}}],"steps":[
            {{"actor":"m","execute":"blockdev-add","arguments":{{"driver":"{top}","node-name":"n",
                "file":{{"driver":"file","filename":"a"}}}}}},
            {{"actor":"m","execute":"block-export-add","arguments":{{"type":"nbd","id":"x","node-name":"n"}}}},
            {{"actor":"m","execute":"block-export-add","arguments":{{"type":"nbd","id":"y","node-name":"n",
                "name":"y"}}}},
            {steps}]}}"#
        ));
        let mut records = Vec::new();
        for (step, what) in [
            (0, "blockdev-add"),
            (1, "block-export-add"),
            (2, "block-export-add"),
        ] {
            records.extend([
                Record::Issued(StepId(step)),
                Record::Layer(Event::MainBegin { what }),
                Record::Layer(Event::MainEnd { what }),
                Record::Ended(StepId(step), Outcome::Command(Ok(serde_json::json!({})))),
            ]);
        }
        (scenario, records)
    }

    fn judge(scenario: &Scenario, records: &[Record]) -> Result<(), Violation> {
        let mut follower = Follower::default();
        follower.reset(scenario);
        let mut errors = Errors::default();
        errors.reset();
        records.iter().try_for_each(|record| {
            errors.record(scenario, &follower, record)?;
            follower.record(scenario, record);
            Ok(())
        })
    }

    fn fault(kind: FaultKind, errno: Errno) -> Record {
        Record::Fault(Fault {
            image: 0,
            kind,
            offset: 0,
            bytes: 512,
            done: 0,
            errno: errno.0,
        })
    }

    /// A request on this node, which fails like this after these faults; `beside`: a step given before it is over.
    fn on(
        top: &str,
        request: &str,
        beside: &str,
        end: i32,
        faults: &[(FaultKind, Errno)],
    ) -> Result<(), Violation> {
        let (scenario, mut records) = records(
            top,
            &format!(r#"{{"actor":"g","export":"x","do":{request}}}{beside}"#),
        );
        let rest = 3..u32::try_from(scenario.steps.len()).expect("few");
        records.extend(rest.map(|step| Record::Issued(StepId(step))));
        records.extend(faults.iter().map(|(kind, errno)| fault(*kind, *errno)));
        records.push(Record::Ended(StepId(3), Outcome::Done(Err(end))));
        judge(&scenario, &records)
    }

    fn run(request: &str, beside: &str, end: i32, faults: &[(FaultKind, Errno)]) -> Result<(), Violation> {
        on("raw", request, beside, end, faults)
    }

    #[test]
    fn an_error_that_storage_did_not_give_is_told() {
        let (eio, enospc) = (Errno::EIO, Errno::ENOSPC);
        assert!(run(READ, "", eio.0, &[(FaultKind::Read, eio)]).is_ok());
        assert!(run(READ, "", eio.0, &[]).is_err());
        assert!(
            run(READ, "", eio.0, &[(FaultKind::Write, enospc)]).is_err(),
            "of another kind"
        );
        assert!(
            run(READ, "", Errno::EPERM.0, &[]).is_ok(),
            "about the request itself"
        );
        let outside = r#"{"read":{"offset":512,"length":512}}"#;
        assert!(run(outside, "", eio.0, &[]).is_ok(), "past the end");
    }

    #[test]
    fn a_flush_that_failed_for_good_fails_who_may_flush() {
        let (eio, enospc) = (Errno::EIO.0, Errno::ENOSPC.0);
        // The fault is over before the request begins.
        let later = |top: &str, request: &str, end: i32| {
            let (scenario, mut records) =
                records(top, &format!(r#"{{"actor":"g","export":"x","do":{request}}}"#));
            records.extend(FLUSHES.iter().map(|(kind, errno)| fault(*kind, *errno)));
            records.push(Record::Issued(StepId(3)));
            records.push(Record::Ended(StepId(3), Outcome::Done(Err(end))));
            judge(&scenario, &records)
        };
        let status = r#"{"block-status":{"offset":0,"length":512}}"#;
        assert!(later("raw", r#""flush""#, eio).is_ok());
        assert!(later("raw", WRITE, eio).is_ok());
        assert!(later("raw", WRITE, enospc).is_err(), "that is no flush");
        assert!(later("raw", READ, eio).is_err());
        assert!(later("copy-on-read", READ, eio).is_ok(), "it writes");
        assert!(later("copy-on-read", status, eio).is_err());
    }

    #[test]
    fn lengths_change_from_a_command_on_that_may_change_them() {
        let eio = Errno::EIO.0;
        let transaction = |kind: &str| {
            format!(
                r#",{{"actor":"m","execute":"transaction","arguments":{{"actions":[{{"type":"{kind}","data":{{}}}}]}}}}"#
            )
        };
        let resize = r#",{"actor":"m","execute":"block_resize","arguments":{}}"#;
        assert!(
            run(READ, resize, eio, &[]).is_ok(),
            "it may lie past the end by now"
        );
        assert!(run(READ, &transaction("blockdev-snapshot"), eio, &[]).is_ok());
        assert!(run(READ, &transaction("block-dirty-bitmap-add"), eio, &[]).is_err());
        // It is over before the command is given.
        let (scenario, mut records) = records(
            "raw",
            &format!(r#"{{"actor":"g","export":"x","do":{READ}}}{resize}"#),
        );
        records.push(Record::Issued(StepId(3)));
        records.push(Record::Ended(StepId(3), Outcome::Read(Err(eio))));
        assert!(judge(&scenario, &records).is_err());
    }

    #[test]
    fn a_connection_is_closed_only_when_its_export_goes() {
        let closed = run(READ, "", ESHUTDOWN, &[(FaultKind::Read, Errno::EIO)]);
        assert!(closed.is_err_and(|v| v.message.contains("connection is closed")));
        let delete = |id: &str| {
            format!(r#",{{"actor":"m","execute":"block-export-del","arguments":{{"id":"{id}"}}}}"#)
        };
        assert!(run(READ, &delete("x"), ESHUTDOWN, &[]).is_ok());
        assert!(
            run(READ, &delete("y"), ESHUTDOWN, &[]).is_err(),
            "another export goes"
        );
        // The end of its export was refused before it began.
        let (scenario, mut records) = records(
            "raw",
            &format!(
                r#"{{"actor":"m","execute":"block-export-del","arguments":{{"id":"x","mode":"none"}}}},
                {{"actor":"g","export":"x","do":{READ}}}"#
            ),
        );
        let refusal = Refusal {
            class: "GenericError".to_owned(),
            desc: "no".to_owned(),
        };
        let mut during = records.clone();
        during.extend([3, 4].map(|step| Record::Issued(StepId(step))));
        during.push(Record::Ended(StepId(4), Outcome::Read(Err(ESHUTDOWN))));
        assert!(judge(&scenario, &during).is_ok());
        records.extend([
            Record::Issued(StepId(3)),
            Record::Ended(StepId(3), Outcome::Command(Err(refusal))),
            Record::Issued(StepId(4)),
            Record::Ended(StepId(4), Outcome::Read(Err(ESHUTDOWN))),
        ]);
        assert!(judge(&scenario, &records).is_err());
    }
}
