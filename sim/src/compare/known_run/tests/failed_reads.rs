//! Matchers of what reads that storage fails make of filters.

use super::*;
use crate::history::{Fault, FaultKind};

/// What a violation is explained by, after these nodes came and then storage failed this of image `t`.
fn failed(nodes: &[Value], kind: FaultKind, violation: &Violation) -> Option<&'static str> {
    let qcow2 = |name: &str, backing: Value| {
        let file = json!({"driver": "file", "node-name": format!("f{name}"), "filename": name});
        json!({"driver": "qcow2", "node-name": name, "backing": backing, "file": file})
    };
    let mut all = vec![
        qcow2("b", Value::Null),
        qcow2("t", json!("b")),
        qcow2("o", Value::Null),
    ];
    all.extend_from_slice(nodes);
    let step = |node: &Value| json!({"actor": "m", "execute": "blockdev-add", "arguments": node});
    let image = |name: &str| json!({"file": name, "format": "qcow2", "size": 4096, "cluster-size": 512});
    let scenario = json!({"version": 1, "grain": 512, "images": [image("b"), image("t"), image("o")],
        "steps": all.iter().map(step).collect::<Vec<_>>()});
    let scenario: Scenario = serde_json::from_value(scenario).expect("a scenario");
    let mut records = Vec::new();
    for step in (0..).map(StepId).take(all.len()) {
        let what = "blockdev-add";
        records.extend([
            Record::Issued(step),
            Record::Layer(Event::MainBegin { what }),
            Record::Layer(Event::MainEnd { what }),
            Record::Ended(step, Outcome::Command(Ok(json!({})))),
        ]);
    }
    records.push(Record::Fault(Fault {
        image: 1,
        kind,
        offset: 0,
        bytes: 512,
        done: 0,
        errno: 5,
    }));
    explain(&scenario, violation, &records).map(|d| d.id)
}

#[test]
fn garbage_is_read_where_storage_fails_below_a_filter_with_bottom() {
    let garbage = found(
        OracleName::Data,
        "guest: read [0x0, +0x200) on x: grain 0x0 holds neither zeroes nor one whole stamp",
    );
    let filter = |file: &str, bottom: Option<&str>| {
        let mut node = json!({"driver": "copy-on-read", "node-name": "c", "file": file});
        if let Some(bottom) = bottom {
            node["bottom"] = json!(bottom);
        }
        node
    };
    let with = [filter("t", Some("b"))];
    let known = Some("failed-query-reads-garbage");
    assert_eq!(failed(&with, FaultKind::Read, &garbage), known);
    let old = found(
        OracleName::Data,
        "grain 0x0 holds the stamp of step 1, which belongs to 0x400",
    );
    assert_eq!(failed(&with, FaultKind::Read, &old), known);
    assert_eq!(failed(&with, FaultKind::Write, &garbage), None);
    assert_eq!(
        failed(&[filter("t", None)], FaultKind::Read, &garbage),
        None,
        "no bottom"
    );
    assert_eq!(
        failed(&[filter("o", Some("o"))], FaultKind::Read, &garbage),
        None,
        "storage failed something else"
    );
    let fresh = found(
        OracleName::Data,
        "grain 0x0 holds zeroes, expected fill 0 of image t",
    );
    assert_eq!(
        failed(&with, FaultKind::Read, &fresh),
        known,
        "memory nobody used yet"
    );
    let wrong = found(
        OracleName::Data,
        "grain 0x0 holds fill 0 of image t, expected zeroes",
    );
    assert_eq!(failed(&with, FaultKind::Read, &wrong), None);
}

#[test]
fn the_status_of_a_snapshot_is_answered_twice_once_it_was_given_up() {
    let twice = found(
        OracleName::Daemon,
        "a status request that failed is answered once more",
    );
    let filter = |on_error: &str| json!({"driver": "copy-before-write", "node-name": "k", "file": "t", "target": "o", "on-cbw-error": on_error});
    let snapshot = json!({"driver": "snapshot-access", "node-name": "s", "file": "k"});
    let of = |nodes: &[Value]| failed(nodes, FaultKind::Read, &twice);
    let known = Some("status-error-answered-twice");
    assert_eq!(of(&[filter("break-snapshot"), snapshot.clone()]), known);
    assert_eq!(of(&[filter("break-guest-write"), snapshot]), None, "it is kept");
    assert_eq!(of(&[filter("break-snapshot")]), None, "nobody can ask it");
}

#[test]
fn a_drain_dies_only_of_a_read_that_fails_under_it() {
    let steps = r#"{"actor":"a","export":"x","do":{"read":{"offset":0,"length":512}}},
        {"actor":"m","execute":"blockdev-add","arguments":{"driver":"raw","node-name":"r","file":"n"}}"#;
    let died = |words: &str| Violation {
        evidence: vec![format!("the daemon said: qemu-storage-daemon: {words}")],
        ..found(OracleName::Daemon, "the daemon died of SIGSEGV")
    };
    let closed =
        died("Disconnect client, due to: Failed to send reply: reading from file failed: Input/output error");
    let of = |violation: &Violation, records: &[Record]| {
        let text = format!(
            r#"{{"version":1,"grain":512,"images":[{{"file":"a","format":"qcow2","size":4096}}],"steps":[{steps}]}}"#
        );
        let scenario: Scenario = serde_json::from_str(&text).expect("a scenario");
        explain(&scenario, violation, records).map(|d| d.id)
    };
    let fault = |kind| {
        Record::Fault(Fault {
            image: 0,
            kind,
            offset: 0,
            bytes: 512,
            done: 0,
            errno: 5,
        })
    };
    let (read, command) = (Record::Issued(StepId(0)), Record::Issued(StepId(1)));
    let under = [read.clone(), command.clone(), fault(FaultKind::Read)];
    let known = Some("read-error-under-drain-crashes");
    assert_eq!(of(&closed, &under), known);
    assert_eq!(
        of(&died("something else"), &under),
        None,
        "no connection was closed"
    );
    let idle = [read.clone(), fault(FaultKind::Read)];
    assert_eq!(of(&closed, &idle), None, "nobody drains");
    let write = [read.clone(), command.clone(), fault(FaultKind::Write)];
    assert_eq!(of(&closed, &write), None, "another request failed");
    let over = Record::Ended(StepId(0), Outcome::Read(Ok([0; 512].into())));
    let late = [read, over, command, fault(FaultKind::Read)];
    assert_eq!(of(&closed, &late), None, "the read was over");
}
