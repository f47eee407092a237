//! A guest's request fails for a reason: storage failed meanwhile, and then with an error that storage gave, or what it asks
//! cannot be; and nobody loses a connection to an export that stays.
//!
//! Rules: EIO and ENOSPC need a fault of that kind while the request was in flight, on any image: what another request
//! waits for may be its own. Once a flush failed, a later one may fail without storage being asked. ESHUTDOWN is how a
//! request ends whose connection was closed: somebody asked for the end of an export. (Scenarios that are steered around known
//! defects put up with `read-error-closes-connection`.)
//! Unchecked: errors about the request itself (EPERM, EINVAL, …); EIO and ENOSPC of requests past the end, and of all requests in
//! scenarios whose commands change lengths; which of several faults was this request's.

use blkcheck_impl::error::Errno;

use super::{OracleName, Violation, violation};
use crate::follow::Follower;
use crate::history::{FaultKind, Outcome, Record, StepId};
use crate::scenario::{Action, Scenario};

/// What an NBD client says of requests whose connection is gone.
const ESHUTDOWN: i32 = 108;

/// A guest's request in flight, and with which errors storage failed since it began.
#[derive(Debug)]
struct Flying {
    step: StepId,
    /// It lies inside what its export shows.
    inside: bool,
    met: Vec<i32>,
    /// Storage failed under one that was in flight when it began: their connection may be about to close.
    late: bool,
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Errors {
    flying: Vec<Flying>,
    flush_lost: bool,
    /// An export was asked to go.
    export_goes: bool,
    lengths_change: bool,
}

impl Errors {
    pub(super) fn reset(&mut self, scenario: &Scenario) {
        *self = Errors {
            lengths_change: changes_lengths(scenario),
            ..Errors::default()
        };
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
                let errno = match outcome {
                    Outcome::Read(result) => result.as_ref().err().copied(),
                    Outcome::Done(result) => result.err(),
                    Outcome::Status(result) => result.as_ref().err().copied(),
                    _ => None,
                };
                return self.ended(scenario, *step, errno);
            }
            Record::Layer(_) => {}
        }
        Ok(())
    }

    fn issued(&mut self, scenario: &Scenario, follower: &Follower, step: StepId) {
        match &scenario.steps[step.0 as usize].action {
            Action::Guest { export, op } => {
                let node = follower.export_node(export);
                let length = node.map(|node| follower.world.graph.node(node).length);
                let end = op.range().map_or(Some(0), |r| r.offset.checked_add(r.length));
                let inside = matches!((end, length), (Some(end), Some(length)) if end <= length);
                let late = self.flying.iter().any(|f| f.late || !f.met.is_empty());
                self.flying.push(Flying {
                    step,
                    inside,
                    met: Vec::new(),
                    late,
                });
            }
            Action::Command { execute, .. } => self.export_goes |= execute == "block-export-del",
            _ => {}
        }
    }

    fn ended(&mut self, scenario: &Scenario, step: StepId, errno: Option<i32>) -> Result<(), Violation> {
        let Some(at) = self.flying.iter().position(|f| f.step == step) else {
            return Ok(());
        };
        let flying = self.flying.swap_remove(at);
        let Some(errno) = errno else { return Ok(()) };
        let by_storage = [Errno::EIO.0, Errno::ENOSPC.0].contains(&errno);
        let excused = match errno {
            ESHUTDOWN => self.export_goes || (scenario.steer && (flying.late || !flying.met.is_empty())),
            _ if by_storage => {
                !flying.inside || self.lengths_change || self.flush_lost || flying.met.contains(&errno)
            }
            _ => true,
        };
        if excused {
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
}

/// Commands after which a node may be shorter than it was.
fn changes_lengths(scenario: &Scenario) -> bool {
    scenario.steps.iter().any(|step| match &step.action {
        Action::Command { execute, .. } => matches!(
            &**execute,
            "block_resize" | "blockdev-reopen" | "blockdev-snapshot" | "transaction"
        ),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use blkcheck_impl::event::Event;

    use super::super::tests::scenario_of;
    use super::*;
    use crate::history::Fault;

    const READ: &str = r#"{"read":{"offset":0,"length":512}}"#;

    /// A request on the export of a file of 512 bytes, beside another step.
    fn run(request: &str, beside: &str, end: i32, faults: &[(FaultKind, Errno)]) -> Result<(), Violation> {
        let scenario = scenario_of(&format!(
            r#"{{"version":1,"grain":512,"images":[{{"file":"a","format":"raw","size":512}}],"steps":[
            {{"actor":"m","execute":"blockdev-add","arguments":{{"driver":"file","node-name":"f","filename":"a"}}}},
            {{"actor":"m","execute":"block-export-add","arguments":{{"type":"nbd","id":"x","node-name":"f"}}}},
            {{"actor":"g","export":"x","do":{request}}}{beside}]}}"#
        ));
        let mut follower = Follower::default();
        follower.reset(&scenario);
        let main = |what, end| {
            Record::Layer(match end {
                false => Event::MainBegin { what },
                true => Event::MainEnd { what },
            })
        };
        let mut records = Vec::new();
        for (step, what) in [(0, "blockdev-add"), (1, "block-export-add")] {
            let answer = Outcome::Command(Ok(serde_json::json!({})));
            records.extend([
                Record::Issued(StepId(step)),
                main(what, false),
                main(what, true),
                Record::Ended(StepId(step), answer),
            ]);
        }
        let rest = 2..u32::try_from(scenario.steps.len()).expect("few");
        records.extend(rest.map(|step| Record::Issued(StepId(step))));
        records.extend(faults.iter().map(|(kind, errno)| {
            Record::Fault(Fault {
                image: 0,
                kind: *kind,
                offset: 0,
                bytes: 512,
                done: 0,
                errno: errno.0,
            })
        }));
        records.push(Record::Ended(StepId(2), Outcome::Read(Err(end))));
        let mut errors = Errors::default();
        errors.reset(&scenario);
        records.iter().try_for_each(|record| {
            errors.record(&scenario, &follower, record)?;
            follower.record(&scenario, record);
            Ok(())
        })
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
            run(READ, "", enospc.0, &[(FaultKind::Flush, eio)]).is_ok(),
            "a flush failed for good"
        );
        assert!(
            run(READ, "", Errno::EPERM.0, &[]).is_ok(),
            "about the request itself"
        );
        let outside = r#"{"read":{"offset":512,"length":512}}"#;
        assert!(run(outside, "", eio.0, &[]).is_ok(), "past the end");
        let resize = r#",{"actor":"m","execute":"block_resize","arguments":{}}"#;
        assert!(
            run(READ, resize, eio.0, &[]).is_ok(),
            "it may lie past the end by now"
        );
    }

    #[test]
    fn a_connection_is_closed_only_when_its_export_goes() {
        let closed = run(READ, "", ESHUTDOWN, &[(FaultKind::Read, Errno::EIO)]);
        assert!(closed.is_err_and(|v| v.message.contains("connection is closed")));
        let delete = r#",{"actor":"m","execute":"block-export-del","arguments":{"id":"x"}}"#;
        assert!(run(READ, delete, ESHUTDOWN, &[]).is_ok());
    }
}
