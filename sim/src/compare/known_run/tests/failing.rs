//! Matchers of what needs storage to fail.

use super::*;
use crate::history::{Fault, FaultKind};
use crate::oracle::data::LEFT_OUT;
use blkcheck_impl::jobs::JobStatus::{Created, Pending, Running, Undefined, Waiting};
use blkcheck_impl::types::JobId;

/// Storage fails this of image `a` (or `b`).
fn fault(kind: FaultKind) -> Record {
    fault_of(0, kind)
}

fn fault_of(image: u32, kind: FaultKind) -> Record {
    Record::Fault(Fault {
        image,
        kind,
        offset: 0,
        bytes: 512,
        done: 0,
        errno: 5,
    })
}

fn issued(step: u32) -> Record {
    Record::Issued(StepId(step))
}

fn ended(step: u32, outcome: Outcome) -> Record {
    Record::Ended(StepId(step), outcome)
}

/// What a violation of a run of these steps is explained by.
fn ran(steps: &[Value], violation: &Violation, records: &[Record]) -> Option<&'static str> {
    let image = |name: &str| json!({"file": name, "format": "qcow2", "size": 4096, "cluster-size": 512});
    let scenario = json!({"version": 1, "grain": 512, "images": [image("a"), image("b")], "steps": steps});
    let scenario: Scenario = serde_json::from_value(scenario).expect("a scenario");
    explain(&scenario, violation, records).map(|d| d.id)
}

fn guest(export: &str, what: &str) -> Value {
    let mut op = json!({});
    op[what] = json!({"offset": 0, "length": 512});
    json!({"actor": export, "export": export, "do": op})
}

fn monitor(execute: &str, arguments: &Value) -> Value {
    json!({"actor": "m", "execute": execute, "arguments": arguments})
}

#[test]
fn a_connection_is_closed_only_by_a_read_in_flight_on_it() {
    let steps = [guest("x", "read"), guest("x", "write"), guest("y", "read")];
    let closed = |step: u32| Violation {
        step: Some(StepId(step)),
        ..found(
            OracleName::Errors,
            "write of 512 bytes at 0x0 ends because its connection is closed, and nobody asked for that",
        )
    };
    let lost = |step| ended(step, Outcome::Read(Err(ESHUTDOWN)));
    let write_lost = ended(1, Outcome::Done(Err(ESHUTDOWN)));
    let of = |step: u32, records: &[Record]| ran(&steps, &closed(step), records);
    let closes = Some("read-error-closes-connection");
    let read = fault(FaultKind::Read);
    let both = [issued(0), issued(1), read.clone(), lost(0), write_lost.clone()];
    assert_eq!(of(1, &both), closes);
    assert_eq!(of(0, &both), closes, "the read itself");
    let none = [issued(0), issued(1), lost(0), write_lost.clone()];
    assert_eq!(of(1, &none), None, "storage did not fail");
    let early = [read.clone(), issued(0), issued(1), lost(0), write_lost.clone()];
    assert_eq!(of(1, &early), None, "it failed before");
    let answered = ended(0, Outcome::Read(Ok([0; 512].into())));
    let well = [issued(0), issued(1), read.clone(), answered, write_lost.clone()];
    assert_eq!(of(1, &well), None, "the read was answered");
    let alone = [issued(1), read.clone(), write_lost.clone()];
    assert_eq!(of(1, &alone), None, "no read");
    let elsewhere = [issued(2), issued(1), read.clone(), lost(2), write_lost.clone()];
    assert_eq!(of(1, &elsewhere), None, "on another export");
    let later = [issued(1), issued(0), write_lost, read, lost(0)];
    assert_eq!(of(1, &later), None, "the connection had gone before");
    let another = Violation {
        oracle: OracleName::Daemon,
        ..closed(1)
    };
    assert_eq!(ran(&steps, &another, &both), None);
}

#[test]
fn a_status_request_is_answered_twice_only_when_a_read_fails_under_it() {
    let twice = found(
        OracleName::Daemon,
        "a status request that failed is answered once more",
    );
    let steps = [guest("x", "block-status"), guest("x", "read")];
    let of = |records: &[Record]| ran(&steps, &twice, records);
    let read = fault(FaultKind::Read);
    let failed = ended(0, Outcome::Status(Err(5)));
    assert_eq!(
        of(&[issued(0), read.clone(), failed.clone()]),
        Some("status-error-answered-twice")
    );
    assert_eq!(of(&[issued(0), failed.clone()]), None, "storage did not fail");
    assert_eq!(of(&[issued(0), fault(FaultKind::Write), failed.clone()]), None);
    assert_eq!(of(&[read.clone(), issued(0), failed]), None, "it failed before");
    assert_eq!(of(&[issued(1), read]), None, "nobody asks for status");
}

/// b, a over it, and a stream of all of a.
fn streaming() -> Vec<Value> {
    let qcow2 = |name: &str, backing: Value| {
        let file = json!({"driver": "file", "node-name": format!("f{name}"), "filename": name});
        json!({"driver": "qcow2", "node-name": name, "backing": backing, "file": file})
    };
    vec![
        monitor("blockdev-add", &qcow2("b", Value::Null)),
        monitor("blockdev-add", &qcow2("a", json!("b"))),
        monitor(
            "block-stream",
            &json!({"job-id": "j", "device": "a", "on-error": "ignore"}),
        ),
    ]
}

/// The commands are carried out.
fn carried_out(steps: &[Value]) -> Vec<Record> {
    let names = ["blockdev-add", "block-stream", "change-backing-file"];
    let of = |(step, action): (u32, &Value)| {
        let what = *names
            .iter()
            .find(|name| action["execute"] == **name)
            .expect("one of these");
        [
            issued(step),
            Record::Layer(Event::MainBegin { what }),
            Record::Layer(Event::MainEnd { what }),
            ended(step, Outcome::Command(Ok(json!({})))),
        ]
    };
    (0..).zip(steps).flat_map(of).collect()
}

#[test]
fn a_failed_stream_changes_the_header_of_its_own_image_only() {
    let steps = streaming();
    let names = |image: &str| {
        found(
            OracleName::Image,
            &format!("image {image} names another backing file than it should"),
        )
    };
    let ends = |more: Value| {
        let mut data = json!({"device": "j", "type": "stream"});
        if more.is_string() {
            data["error"] = more;
        }
        Record::Layer(Event::Qmp {
            name: "BLOCK_JOB_COMPLETED",
            data: data.into(),
        })
    };
    let of = |image: &str, more: &[Record]| {
        let records = [&carried_out(&steps)[..], more].concat();
        ran(&steps, &names(image), &records)
    };
    let error = ends(json!("Input/output error"));
    let write = fault(FaultKind::Write);
    let changes = Some("failed-stream-changes-graph");
    assert_eq!(of("a", &[write.clone(), error.clone()]), changes);
    assert_eq!(of("a", &[fault(FaultKind::Flush), error.clone()]), changes);
    assert_eq!(of("b", &[write.clone(), error.clone()]), None, "another image");
    assert_eq!(of("a", &[fault(FaultKind::Read), error.clone()]), None);
    assert_eq!(
        of("a", &[fault_of(1, FaultKind::Write), error.clone()]),
        None,
        "another image failed"
    );
    assert_eq!(
        of("a", std::slice::from_ref(&error)),
        None,
        "storage did not fail"
    );
    assert_eq!(
        of("a", &[write.clone(), ends(Value::Null)]),
        None,
        "it did not fail"
    );
    assert_eq!(of("a", &[error, write]), None, "it had failed before");
}

#[test]
fn change_backing_file_aborts_only_when_it_is_failed_twice() {
    let mut steps = streaming();
    steps.truncate(2);
    let change = |whose: &str| {
        let arguments = json!({"device": "a", "image-node-name": whose, "backing-file": "b"});
        monitor("change-backing-file", &arguments)
    };
    steps.extend([change("b"), guest("x", "read")]);
    let aborts = found(
        OracleName::Daemon,
        "util/error.c:68: error_setv: Assertion `*errp == NULL' failed.",
    );
    let open = |more: &[Record]| {
        let records = [&carried_out(&steps[..2])[..], &[issued(2)], more].concat();
        ran(&steps, &aborts, &records)
    };
    let (write, flush) = (fault(FaultKind::Write), fault(FaultKind::Flush));
    assert_eq!(
        open(&[write.clone(), flush.clone()]),
        Some("change-backing-file-aborts")
    );
    assert_eq!(open(std::slice::from_ref(&write)), None, "once");
    assert_eq!(open(&[fault(FaultKind::Read), fault(FaultKind::Read)]), None);
    let answer = ended(2, Outcome::Command(Ok(json!({}))));
    assert_eq!(open(&[write.clone(), flush.clone(), answer]), None, "answered");
    let before = [&carried_out(&steps[..2])[..], &[write, flush, issued(2)]].concat();
    assert_eq!(ran(&steps, &aborts, &before), None, "before the command");
}

#[test]
fn only_a_stream_that_ignores_errors_asks_for_ever() {
    let again = |job: &str| {
        found(
            OracleName::Jobs,
            &format!(
                "job '{job}' ignores more errors than there are sectors (8): it asks for the same again and again"
            ),
        )
    };
    let of = |stream: Value, job: &str, more: &[Record]| {
        let mut steps = streaming();
        steps[2] = monitor("block-stream", &stream);
        let records = [&carried_out(&steps)[..], more].concat();
        ran(&steps, &again(job), &records)
    };
    let ignores = json!({"job-id": "j", "device": "a", "on-error": "ignore"});
    let read = [fault(FaultKind::Read)];
    assert_eq!(of(ignores.clone(), "j", &read), Some("stream-ignores-for-ever"));
    assert_eq!(of(ignores.clone(), "k", &read), None, "another job");
    assert_eq!(of(ignores.clone(), "j", &[]), None, "storage did not fail");
    assert_eq!(of(ignores, "j", &[fault(FaultKind::Write)]), None);
    let reports = json!({"job-id": "j", "device": "a"});
    assert_eq!(of(reports, "j", &read), None, "it does not ignore them");
}

#[test]
fn a_header_that_storage_failed_may_have_the_new_name_with_the_wrong_format() {
    let mut steps = streaming();
    steps.truncate(2);
    let arguments = json!({"device": "a", "image-node-name": "a", "backing-file": "new"});
    steps.push(monitor("change-backing-file", &arguments));
    let names = |found_name: &str| Violation {
        evidence: vec![
            "expected: Some((\"b\", Some(\"raw\")))".to_owned(),
            format!("found:    Some((\"{found_name}\", Some(\"qcow2\")))"),
        ],
        ..found(
            OracleName::Image,
            "the closed image 'a' names another backing file than it should",
        )
    };
    let refused = || {
        let refusal = Refusal {
            class: "GenericError".to_owned(),
            desc: "Error flushing drive: Input/output error".to_owned(),
        };
        ended(2, Outcome::Command(Err(refusal)))
    };
    let of = |name: &str, more: &[Record]| {
        let records = [&carried_out(&steps[..2])[..], more].concat();
        ran(&steps, &names(name), &records)
    };
    let flush = fault(FaultKind::Flush);
    let format = Some("backing-format-of-overlay");
    assert_eq!(of("new", &[issued(2), flush.clone(), refused()]), format);
    assert_eq!(
        of("old", &[issued(2), flush.clone(), refused()]),
        None,
        "another name"
    );
    assert_eq!(of("new", &[issued(2), refused()]), None, "storage did not fail");
    assert_eq!(
        of("new", &[flush, issued(2), refused()]),
        None,
        "it failed before"
    );
    let read = fault(FaultKind::Read);
    assert_eq!(of("new", &[issued(2), read, refused()]), None);
    let accepted = ended(2, Outcome::Command(Ok(json!({}))));
    assert_eq!(
        of("new", &[issued(2), accepted.clone()]),
        None,
        "the model has it then"
    );
    assert_eq!(of("b", &[issued(2), accepted]), format);
}

/// Only of what a stream has filled, and only with the power.
#[test]
fn what_a_stream_has_copied_is_lost_with_the_power_only() {
    let node = |name: &str, backing: &Value| {
        let file = json!({"driver": "file", "node-name": format!("f{name}"), "filename": name});
        monitor(
            "blockdev-add",
            &json!({"driver": "qcow2", "node-name": name, "file": file, "backing": backing}),
        )
    };
    let stream = monitor("block-stream", &json!({"job-id": "j", "device": "b"}));
    let flush = json!({"actor": "g", "export": "b", "do": "flush"});
    let zeroes = [guest("b", "write-zeroes"), guest("b", "write")];
    let steps = [node("a", &Value::Null), node("b", &json!("a")), stream, flush];
    let other = monitor(
        "block-export-add",
        &json!({"type": "nbd", "id": "y", "node-name": "a"}),
    );
    let other = [other, json!({"actor": "g", "export": "y", "do": "flush"})];
    let steps: Vec<Value> = steps.into_iter().chain(zeroes).chain(other).collect();
    let done = |step| ended(step, Outcome::Command(Ok(json!({}))));
    let accepted = |step: u32, what: &'static str| {
        let begin = Record::Layer(Event::MainBegin { what });
        [
            issued(step),
            begin,
            Record::Layer(Event::MainEnd { what }),
            done(step),
        ]
    };
    let status = |from, to| {
        Record::Layer(Event::JobStatus {
            job: JobId(0),
            id: "j".into(),
            from,
            to,
        })
    };
    let completed = Record::Layer(Event::Qmp {
        name: "BLOCK_JOB_COMPLETED",
        data: json!({"device": "j", "type": "stream", "len": 4096, "offset": 4096, "speed": 0}).into(),
    });
    let cut = Record::PowerCut {
        image: 1,
        volatile: 0,
        kept: 0,
        sectors: [0, 1],
        hash: 0,
    };
    let lost_with = |file: &str, evidence: &[String]| {
        let text = format!(
            "after a failed flush or a power cut, {file} at 0x0 holds zeroes, which a flush before had made impossible"
        );
        Violation {
            oracle: OracleName::Transparency,
            message: text,
            step: None,
            evidence: evidence.to_vec(),
        }
    };
    let of_evidence = |file: &str, over: bool, power: bool, guests: &[Record], evidence: &[String]| {
        let mut records = Vec::new();
        records.extend(accepted(0, "blockdev-add"));
        records.extend(accepted(1, "blockdev-add"));
        records.extend(accepted(2, "block-stream"));
        records.extend([status(Undefined, Created), status(Created, Running)]);
        if over {
            records.extend([
                status(Running, Waiting),
                status(Waiting, Pending),
                completed.clone(),
            ]);
        }
        records.extend_from_slice(guests);
        records.extend(power.then(|| cut.clone()));
        ran(&steps, &lost_with(file, evidence), &records)
    };
    let of_run =
        |file: &str, over: bool, power: bool, guests: &[Record]| of_evidence(file, over, power, guests, &[]);
    let of = |file: &str, over: bool, power: bool| of_run(file, over, power, &[]);
    assert_eq!(of("b", true, true), Some("stream-completes-in-cache"));
    assert_eq!(of("b", false, true), None, "it is not over");
    let header = [format!("{LEFT_OUT} a")];
    let rewritten = |power: bool| of_evidence("b", false, power, &[], &header);
    assert_eq!(rewritten(true), Some("stream-completes-in-cache"), "all but over");
    assert_eq!(rewritten(false), None, "no power cut");
    assert_eq!(of("b", true, false), None, "no power cut");
    assert_eq!(of("a", true, true), None, "below it");
    let well = |step| ended(step, Outcome::Done(Ok(())));
    let flushed = [issued(3), well(3)];
    assert_eq!(of_run("b", true, true, &flushed), None, "it was flushed since");
    let failed = [issued(3), ended(3, Outcome::Done(Err(5)))];
    let known = Some("stream-completes-in-cache");
    let elsewhere = [&accepted(6, "block-export-add")[..], &[issued(7), well(7)]].concat();
    assert_eq!(of_run("b", true, true, &elsewhere), known, "another image was");
    assert_eq!(of_run("b", true, true, &failed), known, "not well");
    let together = [issued(4), issued(5), well(4), well(5)];
    assert_eq!(of_run("b", true, true, &together), known);
    let other = of_run("b", false, true, &together);
    assert_eq!(
        other, None,
        "what two requests do to a cluster is not what a power cut does"
    );
}

/// Only of what was given back and not flushed, and only with the power.
#[test]
fn what_belongs_elsewhere_is_shown_by_a_cluster_that_was_given_back_only() {
    let at = |offset: u64, what: &str| {
        let mut step = guest("x", what);
        step["do"][what]["offset"] = json!(offset);
        step
    };
    let flush = json!({"actor": "x", "export": "x", "do": "flush"});
    let steps = |frees: &str| [at(512, frees), at(1024, "write"), flush.clone()];
    let message = |at: &str, what: &str| {
        found(
            OracleName::Transparency,
            &format!(
                "after a failed flush or a power cut, a at {at} holds the stamp of step 1, {what}, which a flush before had made impossible"
            ),
        )
    };
    let foreign = message("0x200", "which belongs to 0x400");
    let cut = Record::PowerCut {
        image: 0,
        volatile: 1,
        kept: 1,
        sectors: [1, 0],
        hash: 0,
    };
    let well = |step| ended(step, Outcome::Done(Ok(())));
    let reused = [issued(0), well(0), issued(1), cut.clone()];
    let known = Some("freed-cluster-shows-write");
    for frees in ["discard", "write-zeroes-unmap"] {
        assert_eq!(ran(&steps(frees), &foreign, &reused), known, "{frees}");
    }
    assert_eq!(
        ran(&steps("write-zeroes"), &foreign, &reused),
        None,
        "it keeps its space"
    );
    let steps = steps("discard");
    assert_eq!(ran(&steps, &foreign, &reused[..3]), None, "no power cut");
    let elsewhere = message("0x400", "which belongs to 0x200");
    assert_eq!(ran(&steps, &elsewhere, &reused), None, "another cluster");
    let own = message("0x200", "overwritten by step 3");
    assert_eq!(ran(&steps, &own, &reused), None, "it belongs there");
    let flushed = [issued(0), well(0), issued(2), well(2), issued(1), cut.clone()];
    assert_eq!(ran(&steps, &foreign, &flushed), None, "the table is durable");
    let before = [issued(2), issued(0), well(0), well(2), issued(1), cut];
    assert_eq!(ran(&steps, &foreign, &before), known, "the flush was sent before");
}

/// Only where storage failed what makes the entry durable, and only the table that it leads to.
#[test]
fn an_image_is_corrupt_by_a_flush_that_failed_under_a_request_that_succeeded_only() {
    let used = |cluster: &str| format!("host cluster at {cluster} is used 1 times, its refcount is 0");
    let free = |cluster: &str, what: &str| format!("{what} at {cluster}: COPIED is true, the refcount 0");
    let left = |first: &str, lines: &[String]| Violation {
        evidence: lines.to_vec(),
        ..found(
            OracleName::Image,
            &format!("image 'a' is corrupt after a power cut: {first}"),
        )
    };
    let of =
        |kind: &str, violation: &Violation, records: &[Record]| ran(&[guest("x", kind)], violation, records);
    let data = left(&used("0x800"), &[free("0x800", "data cluster")]);
    let done = || ended(0, Outcome::Done(Ok(())));
    let under = [issued(0), fault(FaultKind::Flush), done()];
    let known = Some("failed-flush-loses-order");
    for kind in ["write", "write-zeroes", "write-zeroes-unmap", "discard"] {
        assert_eq!(of(kind, &data, &under), known);
    }
    assert_eq!(of("write-fua", &data, &under), None, "whoever asks for a flush");
    let failed = ended(0, Outcome::Done(Err(5)));
    assert_eq!(
        of("write", &data, &[issued(0), fault(FaultKind::Flush), failed]),
        None,
        "it is told"
    );
    assert_eq!(
        of("write", &data, &[issued(0), done(), fault(FaultKind::Flush)]),
        None,
        "not under it"
    );
    let other = [issued(0), fault_of(1, FaultKind::Flush), done()];
    assert_eq!(of("write", &data, &other), None, "another image");
    assert_eq!(
        of("write", &data, &[issued(0), fault(FaultKind::Write), done()]),
        None
    );
    let both = [
        used("0xa00"),
        free("0x800", "data cluster"),
        free("0xa00", "L2 table"),
    ];
    assert_eq!(
        of("write", &left(&used("0x800"), &both), &under),
        known,
        "tables too"
    );
    let more = [
        free("0x800", "data cluster"),
        "the L2 table at 0xa00 ends with the file".to_owned(),
    ];
    assert_eq!(
        of("write", &left(&used("0x800"), &more), &under),
        None,
        "something else is wrong as well"
    );
}

#[test]
fn an_image_is_corrupt_by_a_table_whose_entry_storage_failed_only() {
    let steps = [guest("x", "write")];
    let at = |cluster: &str, what: &str| {
        let used = format!("Corruption: host cluster at {cluster} is used 1 times, its refcount is 0");
        [
            used,
            format!("Corruption: {what} at {cluster}: COPIED is true, the refcount 0"),
        ]
    };
    let corrupt = |lines: &[String]| Violation {
        evidence: lines.to_vec(),
        ..found(
            OracleName::Image,
            "image 'a' is corrupt after a clean close: L2 table at 0x800: …",
        )
    };
    let of = |lines: &[String], fault: Record| ran(&steps, &corrupt(lines), &[issued(0), fault]);
    let table = at("0x800", "L2 table");
    let known = Some("failed-table-entry-stays");
    assert_eq!(of(&table, fault(FaultKind::Flush)), known);
    assert_eq!(
        of(
            &[table.clone(), at("0xa00", "L2 table")].concat(),
            fault(FaultKind::Flush)
        ),
        known
    );
    assert_eq!(of(&table, fault_of(1, FaultKind::Flush)), None, "another image");
    assert_eq!(of(&table, fault(FaultKind::Read)), None);
    let write = |bytes: u64, done: u64| {
        Record::Fault(Fault {
            image: 0,
            kind: FaultKind::Write,
            offset: 0x600,
            bytes,
            done,
            errno: 5,
        })
    };
    assert_eq!(of(&table, write(8, 8)), known, "carried out all the same");
    assert_eq!(of(&table, write(8, 0)), None, "not carried out");
    assert_eq!(of(&table, write(4096, 4096)), None, "no entry");
    let data = at("0x800", "data cluster");
    assert_eq!(of(&data, fault(FaultKind::Flush)), None, "no table");
    let more = [
        &table[..],
        &["Corruption: host cluster at 0xa00 is used 2 times, its refcount is 1".to_owned()],
    ]
    .concat();
    assert_eq!(
        of(&more, fault(FaultKind::Flush)),
        None,
        "something else is wrong as well"
    );
    assert_eq!(of(&[], fault(FaultKind::Flush)), None);
    let twice = |what: &str, cluster: &str| {
        format!("Corruption: {what} at {cluster} overlaps something else: used 2 times")
    };
    let used =
        |cluster: &str| format!("Corruption: host cluster at {cluster} is used 2 times, its refcount is 1");
    let again = [
        used("0x800"),
        used("0xa00"),
        twice("L2 table", "0x800"),
        twice("data cluster", "0xa00"),
        "Corruption: the active tables have L2 table and L2 table at 0x800".to_owned(),
    ];
    assert_eq!(
        of(&again, fault(FaultKind::Flush)),
        known,
        "it was taken for another table"
    );
    let message =
        "image 'a' is corrupt after a power cut: host cluster at 0x800 is used 2 times, its refcount is 1";
    let cut = Violation {
        evidence: vec![twice("L2 table", "0x800").replace("Corruption: ", ""); 2],
        ..found(OracleName::Image, message)
    };
    assert_eq!(ran(&steps, &cut, &[issued(0), fault(FaultKind::Flush)]), known);
    let data = [used("0xa00"), twice("data cluster", "0xa00")];
    assert_eq!(of(&data, fault(FaultKind::Flush)), None, "no table is in it");
    let leak = "Leak: host cluster at 0xc00 is used 0 times, its refcount is 1".to_owned();
    let leaky = [&table[..], &[leak]].concat();
    assert_eq!(
        of(&leaky, fault(FaultKind::Flush)),
        known,
        "lost space is not the point"
    );
    assert_eq!(
        ran(&steps, &corrupt(&table), &[issued(0)]),
        None,
        "storage did not fail"
    );
}
