//! Lives of jobs that the oracle passes, and such that it does not.

use serde_json::json;

use super::*;
use crate::history::StepId;
use crate::oracle::tests::{feed, feed_on, scenario, scenario_of};

fn qmp(name: &'static str, data: Value) -> Event {
    Event::Qmp {
        name,
        data: Rc::new(data),
    }
}

/// A status walk with its events; `+name` sends that QMP event.
fn walk(script: &str) -> Result<(), Violation> {
    let all = [
        Undefined, Created, Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded, Null,
    ];
    let mut oracle = Jobs::default();
    oracle.reset(&scenario());
    let mut at = Undefined;
    let mut records = Vec::new();
    for word in script.split(' ') {
        let data = json!({"device": "j", "id": "j", "type": "stream", "len": 100, "offset": 10});
        match word {
            "+error" => {
                let mut data = data;
                data["action"] = json!("report");
                records.push(qmp("BLOCK_JOB_ERROR", data));
            }
            "+completed" => records.push(qmp("BLOCK_JOB_COMPLETED", data)),
            "+failed" => {
                let mut data = data;
                data["error"] = json!("Input/output error");
                records.push(qmp("BLOCK_JOB_COMPLETED", data));
            }
            "+cancelled" => records.push(qmp("BLOCK_JOB_CANCELLED", data)),
            "+pending" => records.push(qmp("BLOCK_JOB_PENDING", data)),
            "chunk" => records.push(Event::JobChunk {
                job: JobId(0),
                offset: 0,
                bytes: 64,
                copied: true,
            }),
            "pause" => records.push(Event::JobPauseCount {
                job: JobId(0),
                count: 1,
            }),
            "resume" => records.push(Event::JobPauseCount {
                job: JobId(0),
                count: 0,
            }),
            name => {
                let (name, told) = name.strip_suffix('!').map_or((name, true), |n| (n, false));
                let to = *all.iter().find(|s| status_name(**s) == name).expect("status");
                records.push(Event::JobStatus {
                    job: JobId(0),
                    id: "j".into(),
                    from: at,
                    to,
                });
                at = to;
                if told {
                    records.push(qmp("JOB_STATUS_CHANGE", json!({"id": "j", "status": name})));
                }
            }
        }
    }
    feed(&mut oracle, records.into_iter().map(Record::Layer))
}

#[test]
fn the_scripts_of_the_specification_pass() {
    for script in [
        "created resume running chunk waiting pending +completed concluded null",
        "created running paused running waiting pending +completed concluded null",
        "created resume running pause paused resume running aborting +cancelled concluded null",
        "created resume running waiting pending +pending +completed concluded null",
        "created resume running waiting pending +pending aborting +cancelled concluded null",
        "created resume running waiting pending aborting +failed concluded null",
        "created resume running +error aborting +failed concluded null",
        "created null",
        "created aborting concluded null",
    ] {
        assert_eq!(walk(script), Ok(()), "{script}");
    }
}

#[test]
fn each_deviation_is_reported() {
    for (script, text) in [
        ("created resume running pending", "not in the state machine"),
        (
            "created resume running pause paused aborting",
            "not in the state machine",
        ),
        ("created resume running paused", "nobody asked it to pause"),
        (
            "created resume running pause paused chunk",
            "handles 0x0+0x40 while it is paused",
        ),
        (
            "created resume running waiting pending concluded",
            "without BLOCK_JOB_COMPLETED",
        ),
        (
            "created resume running waiting pending +completed +completed",
            "already told",
        ),
        (
            "created resume running waiting pending +cancelled",
            "without aborting first",
        ),
        (
            "created resume running aborting +completed",
            "has no error while it is aborting",
        ),
        ("created resume running +completed", "comes while it is running"),
        ("created aborting +cancelled", "never ran"),
        (
            "created resume running! waiting",
            "before JOB_STATUS_CHANGE told running",
        ),
        ("created resume running +pending", "comes while it is running"),
    ] {
        let v = walk(script).expect_err(script);
        assert!(v.message.contains(text), "{script}: {}", v.message);
    }
}

#[test]
fn progress_never_goes_back() {
    let mut oracle = Jobs::default();
    oracle.reset(&scenario());
    let status = |from, to| {
        Record::Layer(Event::JobStatus {
            job: JobId(0),
            id: "j".into(),
            from,
            to,
        })
    };
    let told = |s: &str| Record::Layer(qmp("JOB_STATUS_CHANGE", json!({"id": "j", "status": s})));
    let ready = |offset| {
        Record::Layer(qmp(
            "BLOCK_JOB_ERROR",
            json!({"device": "j", "offset": offset, "len": 50}),
        ))
    };
    let run = [
        status(Undefined, Created),
        told("created"),
        status(Created, Running),
        told("running"),
        ready(20),
    ];
    feed(&mut oracle, run).expect("fine");
    assert!(
        feed(&mut oracle, [ready(10)])
            .expect_err("back")
            .message
            .contains("offset 10 after 20")
    );
    assert!(
        feed(&mut oracle, [ready(60)])
            .expect_err("beyond")
            .message
            .contains("beyond its length")
    );
}

/// A job started with this policy; then the words of `script`: error actions, `full`, `chunk`, `resumed`, and the
/// ends `ok`, `fails`.
fn errors(policy: &str, script: &str) -> Result<(), Violation> {
    let scenario = scenario_of(&format!(
        r#"{{"version":1,"grain":64,"images":[],"steps":[{{"actor":"m","execute":"block-stream",
        "arguments":{{"job-id":"j","device":"d","on-error":"{policy}"}}}}]}}"#
    ));
    let mut oracle = Jobs::default();
    oracle.reset(&scenario);
    let mut records = vec![Record::Issued(StepId(0))];
    let status = |records: &mut Vec<Record>, from, to| {
        records.push(Record::Layer(Event::JobStatus {
            job: JobId(0),
            id: "j".into(),
            from,
            to,
        }));
        let told = json!({"id": "j", "status": status_name(to)});
        records.push(Record::Layer(qmp("JOB_STATUS_CHANGE", told)));
    };
    let count = |count| Record::Layer(Event::JobPauseCount { job: JobId(0), count });
    status(&mut records, Undefined, Created);
    status(&mut records, Created, Running);
    records.push(count(0));
    for word in script.split(' ') {
        match word {
            "full" => records.push(Record::Fault(crate::history::Fault {
                image: 0,
                kind: crate::history::FaultKind::Write,
                offset: 0,
                bytes: 512,
                done: 0,
                errno: Errno::ENOSPC.0,
            })),
            "chunk" => records.push(Record::Layer(Event::JobChunk {
                job: JobId(0),
                offset: 0,
                bytes: 64,
                copied: true,
            })),
            "parked" => {
                records.push(count(1));
                status(&mut records, Running, Paused);
            }
            "resumed" => {
                records.push(count(0));
                status(&mut records, Paused, Running);
            }
            "ok" => {
                status(&mut records, Running, Waiting);
                status(&mut records, Waiting, Pending);
                records.push(Record::Layer(qmp("BLOCK_JOB_COMPLETED", json!({"device": "j"}))));
            }
            "fails" => {
                status(&mut records, Running, Aborting);
                let data = json!({"device": "j", "error": "Input/output error"});
                records.push(Record::Layer(qmp("BLOCK_JOB_COMPLETED", data)));
            }
            action => {
                let data = json!({"device": "j", "operation": "read", "action": action});
                records.push(Record::Layer(qmp("BLOCK_JOB_ERROR", data)));
            }
        }
    }
    feed_on(&mut oracle, &scenario, records)
}

#[test]
fn errors_are_handled_as_the_policy_says() {
    for (policy, script) in [
        ("report", "chunk report fails"),
        ("ignore", "ignore chunk ignore fails"),
        ("stop", "stop parked resumed chunk stop parked resumed ok"),
        ("enospc", "full stop parked resumed ok"),
        ("auto", "report fails"),
    ] {
        assert_eq!(errors(policy, script), Ok(()), "{policy}: {script}");
    }
    for (policy, script, text) in [
        (
            "report",
            "ignore fails",
            "on-error report has the error action ignore",
        ),
        (
            "stop",
            "report fails",
            "on-error stop has the error action report",
        ),
        (
            "enospc",
            "stop parked",
            "on-error enospc has the error action stop",
        ),
        ("report", "report ok", "has no error, although it told one"),
        ("ignore", "ignore ok", "has no error, although it told one"),
        ("stop", "stop chunk", "handles 0x0+0x40 after an error stopped it"),
        ("report", "chunk fails", "has an error that it never told"),
    ] {
        let v = errors(policy, script).expect_err(script);
        assert!(v.message.contains(text), "{policy}, {script}: {}", v.message);
    }
}

/// A backup of this `sync` fails and never told an error. `copies`: a copy had begun, for the job or for a guest, behind the filter of
/// this number; that of the job has number 0.
fn fails_untold(sync: &str, copies: Option<(u32, bool)>) -> Result<(), Violation> {
    let scenario = scenario_of(&format!(
        r#"{{"version":1,"grain":64,"images":[],"steps":[{{"actor":"m","execute":"blockdev-backup",
        "arguments":{{"job-id":"j","device":"d","target":"t","sync":"{sync}"}}}}]}}"#
    ));
    let mut oracle = Jobs::default();
    oracle.reset(&scenario);
    let mut records = vec![
        Record::Issued(StepId(0)),
        Record::Layer(Event::FilterInserted {
            filter: NodeId(0),
            below: NodeId(7),
        }),
    ];
    let mut walk = |from, to, copy: Option<(u32, bool)>| {
        records.extend(copy.map(|(filter, background)| {
            Record::Layer(Event::CopyBegin {
                filter: NodeId(filter),
                task: 0,
                offset: 0,
                bytes: 64,
                zero: false,
                background,
            })
        }));
        records.push(Record::Layer(Event::JobStatus {
            job: JobId(0),
            id: "j".into(),
            from,
            to,
        }));
        let told = json!({"id": "j", "status": status_name(to)});
        records.push(Record::Layer(qmp("JOB_STATUS_CHANGE", told)));
    };
    walk(Undefined, Created, None);
    walk(Created, Running, None);
    walk(Running, Aborting, copies);
    let data = json!({"device": "j", "error": "Input/output error"});
    records.push(Record::Layer(qmp("BLOCK_JOB_COMPLETED", data)));
    feed_on(&mut oracle, &scenario, records)
}

#[test]
fn who_asks_what_is_there_may_fail_untold_until_it_copies() {
    for copies in [None, Some((0, false)), Some((1, true))] {
        assert_eq!(fails_untold("top", copies), Ok(()), "{copies:?}");
        assert!(fails_untold("full", copies).is_err(), "{copies:?}");
    }
    let v = fails_untold("top", Some((0, true))).expect_err("it was copying");
    assert!(
        v.message.contains("has an error that it never told"),
        "{}",
        v.message
    );
}

/// Two backups of one transaction, and how each ends: `ok` or not.
fn group(mode: &str, ends: [bool; 2]) -> Result<(), Violation> {
    let scenario = scenario_of(&format!(
        r#"{{"version":1,"grain":64,"images":[],"steps":[{{"actor":"m","execute":"transaction","arguments":{{
        "actions":[{{"type":"blockdev-backup","data":{{"job-id":"a"}}}},{{"type":"blockdev-backup","data":{{"job-id":"b"}}}}],
        "properties":{{"completion-mode":"{mode}"}}}}}}]}}"#
    ));
    let mut oracle = Jobs::default();
    oracle.reset(&scenario);
    let done = crate::history::Outcome::Command(Ok(json!({})));
    let mut records = vec![Record::Ended(StepId(0), done)];
    for (number, (id, ok)) in (0..).zip([("a", ends[0]), ("b", ends[1])]) {
        let walk: &[JobStatus] = if ok {
            &[Undefined, Created, Running, Waiting, Pending]
        } else {
            &[Undefined, Created, Running, Aborting]
        };
        for pair in walk.windows(2) {
            records.push(Record::Layer(Event::JobStatus {
                job: JobId(number),
                id: id.into(),
                from: pair[0],
                to: pair[1],
            }));
            let told = json!({"id": id, "status": status_name(pair[1])});
            records.push(Record::Layer(qmp("JOB_STATUS_CHANGE", told)));
        }
        let name = if ok {
            "BLOCK_JOB_COMPLETED"
        } else {
            "BLOCK_JOB_CANCELLED"
        };
        records.push(Record::Layer(qmp(name, json!({"device": id}))));
    }
    feed_on(&mut oracle, &scenario, records)
}

#[test]
fn grouped_jobs_stand_or_fall_together() {
    for ends in [[true, true], [false, false]] {
        assert_eq!(group("grouped", ends), Ok(()));
    }
    for ends in [[true, false], [false, true]] {
        assert_eq!(group("individual", ends), Ok(()));
        let v = group("grouped", ends).unwrap_err();
        assert!(v.message.contains("of the same transaction"), "{}", v.message);
    }
}
