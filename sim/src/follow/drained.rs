//! Commands that drain before they look at the graph: a job may end in that drain, and then the command meets the graph
//! after it.
//!
//! Rules: the model executes a command when the layer begins it. Where a job's end is told while one of these is under way,
//! the command is taken back, the job completes and concludes, and the command is executed again. Not so once a job has been
//! resumed after the last drain: the command is over then; nor where the command itself made the job. A snapshot and a backup drain
//! everything, and then once more what they are about; a node that is added drains once more before it stands on others, after which
//! little happens any more. A layer whose main operations are totally ordered never tells such an end.
//! Not covered: a list of nodes to reopen of which some were queued before the job ended and some after it.

use blkcheck_impl::event::Event;
use blkcheck_impl::jobs::JobStatus;

use super::{Entry, Followed, Follower, Record, Refusal, Scenario, command_name, execute};

/// Commands that begin with drains, and how many.
const DRAIN_FIRST: [(&str, u32); 6] = [
    ("block_resize", 1),
    ("blockdev-add", 2),
    ("blockdev-backup", 2),
    ("blockdev-reopen", 1),
    ("blockdev-snapshot", 2),
    ("transaction", 2),
];

impl Follower {
    /// A job ends: takes the command under way back if it was to wait for that.
    pub(super) fn postpone(&mut self, scenario: &Scenario, job: &str) {
        let Some((operation, step)) = self.operation.as_ref().and_then(|o| Some((o, o.step?))) else {
            return;
        };
        let over = operation.resumed.values().max().copied().unwrap_or(0);
        if operation.made.iter().any(|made| **made == *job) {
            return;
        }
        // Who finds a node busy does not get as far as a drain.
        let is_busy = |refusal: &Refusal| refusal.desc.contains("' is busy: ");
        let prediction = operation.prediction.as_ref();
        let busy = prediction.is_some_and(|prediction| prediction.as_ref().is_err_and(is_busy));
        let name = command_name(scenario, step);
        if busy && name == Some("block_resize") {
            return;
        }
        if !DRAIN_FIRST
            .iter()
            .any(|(first, drains)| Some(*first) == name && over < *drains)
        {
            return;
        }
        let is_it = |entry: &Entry| matches!(entry, Entry::Command(s) if *s == step);
        let Some(at) = self.journal.iter().rposition(is_it) else {
            return;
        };
        self.journal.remove(at);
        for doubt in &mut self.doubts {
            doubt.at -= usize::from(doubt.at > at);
        }
        self.replay(scenario);
        self.postponed = Some(step);
    }

    /// Executes what was postponed, when jobs have no more to say, or the command makes one.
    pub(super) fn catch_up(&mut self, scenario: &Scenario, record: &Record, followed: &mut Followed) {
        match record {
            Record::Layer(Event::JobStatus {
                to: JobStatus::Created,
                ..
            }) => {}
            Record::Layer(Event::Qmp { .. } | Event::JobStatus { .. }) => return,
            _ => {}
        }
        let Some(step) = self.postponed.take() else {
            return;
        };
        let operation = self.operation.as_mut().expect("it is under way");
        operation.prediction = execute(&mut self.world, scenario, step);
        self.journal.push(Entry::Command(step));
        (followed.executed, followed.changed) = (Some(step), true);
    }
}

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use serde_json::json;

    use super::*;
    use crate::history::{Outcome, StepId};
    use crate::oracle::tests::scenario_of;

    /// A reopen that takes the backing link of a stream's device away.
    const REOPEN: &str = r#""blockdev-reopen","arguments":{"options":[{"driver":"qcow2","node-name":"a",
        "file":{"driver":"file","filename":"a"},"backing":null}]}"#;
    /// A snapshot of that device, to an overlay that is not there.
    const SNAPSHOT: &str = r#""blockdev-snapshot","arguments":{"node":"a","overlay":"o"}"#;

    /// What the model says of a command while the stream ends.
    fn predicted(command: &str, steps: &[(JobStatus, JobStatus)]) -> Result<(), String> {
        let scenario = scenario_of(
            &r#"{"version":1,"grain":512,"images":[
            {"file":"b","format":"qcow2","size":4096},
            {"file":"a","format":"qcow2","size":4096,"backing-file":"b","backing-format":"qcow2"}],"steps":[
            {"actor":"m","execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"a",
                "file":{"driver":"file","filename":"a"}}},
            {"actor":"m","execute":"block-stream","arguments":{"job-id":"j","device":"a"}},
            {"actor":"m","execute":COMMAND}]}"#
                .replace("COMMAND", command),
        );
        let name = if command == REOPEN {
            "blockdev-reopen"
        } else {
            "blockdev-snapshot"
        };
        let mut follower = Follower::default();
        follower.reset(&scenario);
        let mut tell = |record: Record| {
            let followed = follower.record(&scenario, &record);
            assert_eq!(followed.wrong, None, "{record:?}");
        };
        let begin = |what| Record::Layer(Event::MainBegin { what });
        let end = |what| Record::Layer(Event::MainEnd { what });
        let status = |(from, to)| {
            Record::Layer(Event::JobStatus {
                job: blkcheck_impl::types::JobId(0),
                id: "j".into(),
                from,
                to,
            })
        };
        let done = |step| Record::Ended(StepId(step), Outcome::Command(Ok(json!({}))));
        use JobStatus::{Concluded, Created, Null, Pending, Running, Undefined, Waiting};
        tell(Record::Issued(StepId(0)));
        tell(begin("blockdev-add"));
        tell(end("blockdev-add"));
        tell(done(0));
        tell(Record::Issued(StepId(1)));
        tell(begin("block-stream"));
        tell(status((Undefined, Created)));
        tell(status((Created, Running)));
        tell(end("block-stream"));
        tell(done(1));
        tell(Record::Issued(StepId(2)));
        tell(begin(name));
        steps.iter().for_each(|step| tell(status(*step)));
        tell(status((Running, Waiting)));
        tell(status((Waiting, Pending)));
        tell(Record::Layer(Event::Qmp {
            name: "BLOCK_JOB_COMPLETED",
            data: Rc::new(json!({"device": "j"})),
        }));
        tell(status((Pending, Concluded)));
        tell(status((Concluded, Null)));
        tell(end(name));
        tell(done(2));
        let prediction = follower.prediction().expect("it was executed");
        prediction.clone().map(drop).map_err(|refusal| refusal.desc)
    }

    #[test]
    fn a_job_that_ends_in_the_drain_of_a_command_is_gone_when_it_looks() {
        assert_eq!(predicted(REOPEN, &[]), Ok(()));
        // Nobody blocks the node any more.
        let gone = predicted(SNAPSHOT, &[]).expect_err("there is no such overlay");
        assert!(gone.starts_with("Cannot find device='o'"), "{gone}");
    }

    #[test]
    fn a_job_that_was_resumed_meanwhile_was_there_when_it_looked() {
        use JobStatus::{Paused, Running};
        let frozen =
            predicted(REOPEN, &[(Running, Paused), (Paused, Running)]).expect_err("the link is frozen");
        assert!(
            frozen.starts_with("Cannot change frozen 'backing' link"),
            "{frozen}"
        );
    }

    /// Who came last is named first where a permission is refused.
    #[test]
    fn a_node_that_is_added_while_a_job_ends_stands_above_what_it_leaves() {
        let scenario = scenario_of(
            r#"{"version":1,"grain":512,"images":[
            {"file":"b","format":"qcow2","size":4096},
            {"file":"a","format":"qcow2","size":4096,"backing-file":"b","backing-format":"qcow2"}],"steps":[
            {"actor":"m","execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"a",
                "file":{"driver":"file","filename":"a"}}},
            {"actor":"m","execute":"block-export-add","arguments":{"type":"nbd","id":"x","node-name":"a"}},
            {"actor":"m","execute":"block-stream","arguments":{"job-id":"j","device":"a"}},
            {"actor":"m","execute":"blockdev-add","arguments":{"driver":"raw","node-name":"r","file":"a","size":2048}}]}"#,
        );
        let mut follower = Follower::default();
        follower.reset(&scenario);
        let mut tell = |record: Record| {
            let followed = follower.record(&scenario, &record);
            assert_eq!(followed.wrong, None, "{record:?}");
        };
        use JobStatus::{Concluded, Created, Null, Paused, Pending, Running, Undefined, Waiting};
        let walks: [(&str, &[JobStatus]); 4] = [
            ("blockdev-add", &[]),
            ("block-export-add", &[]),
            ("block-stream", &[Undefined, Created, Running]),
            (
                "blockdev-add",
                &[Running, Paused, Running, Waiting, Pending, Concluded, Null],
            ),
        ];
        for (step, (what, walk)) in (0..).zip(walks) {
            tell(Record::Issued(StepId(step)));
            tell(Record::Layer(Event::MainBegin { what }));
            for pair in walk.windows(2) {
                if pair[1] == Concluded {
                    tell(Record::Layer(Event::Qmp {
                        name: "BLOCK_JOB_COMPLETED",
                        data: Rc::new(json!({"device": "j"})),
                    }));
                }
                tell(Record::Layer(Event::JobStatus {
                    job: blkcheck_impl::types::JobId(0),
                    id: "j".into(),
                    from: pair[0],
                    to: pair[1],
                }));
            }
            tell(Record::Layer(Event::MainEnd { what }));
            tell(Record::Ended(StepId(step), Outcome::Command(Ok(json!({})))));
        }
        let resize = json!({"node-name": "a", "size": 8192});
        let command = blkcheck_model::Command::new("block_resize", &resize);
        let refusal = follower.world.check(&command).expect_err("neither lets it");
        assert!(refusal.desc.contains("unshared by node 'r'"), "{}", refusal.desc);
    }

    #[test]
    fn a_job_that_the_command_itself_made_ends_after_it() {
        let scenario = scenario_of(
            r#"{"version":1,"grain":512,"images":[{"file":"a","format":"qcow2","size":4096},
            {"file":"t","format":"qcow2","size":4096}],"steps":[
            {"actor":"m","execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"a",
                "file":{"driver":"file","filename":"a"}}},
            {"actor":"m","execute":"blockdev-add","arguments":{"driver":"qcow2","node-name":"t",
                "file":{"driver":"file","filename":"t"}}},
            {"actor":"m","execute":"blockdev-backup","arguments":{"job-id":"j","device":"a","target":"t","sync":"full",
                "auto-dismiss":false}}]}"#,
        );
        let mut follower = Follower::default();
        follower.reset(&scenario);
        let mut tell = |record: Record| {
            let followed = follower.record(&scenario, &record);
            assert_eq!(followed.wrong, None, "{record:?}");
        };
        for (step, what) in [(0, "blockdev-add"), (1, "blockdev-add"), (2, "blockdev-backup")] {
            use JobStatus::{Concluded, Created, Pending, Running, Undefined, Waiting};
            tell(Record::Issued(StepId(step)));
            tell(Record::Layer(Event::MainBegin { what }));
            let statuses: &[JobStatus] = match step {
                2 => &[Undefined, Created, Running, Waiting, Pending, Concluded],
                _ => &[],
            };
            for pair in statuses.windows(2) {
                if pair[1] == Concluded {
                    let data = Rc::new(json!({"device": "j"}));
                    tell(Record::Layer(Event::Qmp {
                        name: "BLOCK_JOB_COMPLETED",
                        data,
                    }));
                }
                tell(Record::Layer(Event::JobStatus {
                    job: blkcheck_impl::types::JobId(0),
                    id: "j".into(),
                    from: pair[0],
                    to: pair[1],
                }));
            }
            tell(Record::Layer(Event::MainEnd { what }));
            tell(Record::Ended(StepId(step), Outcome::Command(Ok(json!({})))));
        }
        assert!(follower.world.job("j").is_some(), "it waits to be dismissed");
    }
}
