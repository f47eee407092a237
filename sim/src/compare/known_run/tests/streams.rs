//! Streams that lose their way.

use super::*;

/// The scenario of the page without commands of one kind, and before its guest reads, this event.
fn strayed(
    without: Option<&str>,
    event: Option<&(&'static str, Value)>,
    violation: &Violation,
) -> Option<&'static str> {
    let entry = DEFECTS
        .iter()
        .find(|d| d.id == "stream-undoes-reopen")
        .expect("an entry");
    let mut scenario = parse::parse("test", entry.scenario.as_bytes()).expect("a scenario");
    let is_left_out =
        |action: &Action| matches!(action, Action::Command { execute, .. } if Some(&**execute) == without);
    scenario.steps.retain(|step| !is_left_out(&step.action));
    let known = [
        "object-add",
        "blockdev-add",
        "block-export-add",
        "block-stream",
        "blockdev-reopen",
        "job-finalize",
    ];
    let mut records = Vec::new();
    for (step, at) in (0..).zip(&scenario.steps) {
        let step = StepId(step);
        records.push(Record::Issued(step));
        if let Action::Command { execute, .. } = &at.action {
            let what = *known.iter().find(|name| *name == execute).expect("one of these");
            records.extend([
                Record::Layer(Event::MainBegin { what }),
                Record::Layer(Event::MainEnd { what }),
                Record::Ended(step, Outcome::Command(Ok(json!({})))),
            ]);
        } else if let Some((name, data)) = event {
            // Before the guest's read.
            let data = data.clone().into();
            records.insert(records.len() - 1, Record::Layer(Event::Qmp { name, data }));
        }
    }
    explain(&scenario, violation, &records).map(|d| d.id)
}

#[test]
fn a_stream_undoes_a_reopen_only_below_its_own_device_and_when_it_succeeds() {
    let undoes = Some("stream-undoes-reopen");
    let edges = |node: &str| {
        found(
            OracleName::Graph,
            &format!("node '{node}' has other children than it should have"),
        )
    };
    let ends = |error: Option<&str>| {
        let mut data = json!({"device": "j0", "type": "stream"});
        if let Some(error) = error {
            data["error"] = json!(error);
        }
        Some(("BLOCK_JOB_COMPLETED", data))
    };
    assert_eq!(strayed(None, ends(None).as_ref(), &edges("n2")), undoes);
    assert_eq!(
        strayed(None, ends(None).as_ref(), &edges("other")),
        None,
        "a node that it has nothing to do with"
    );
    assert_eq!(strayed(None, None, &edges("n2")), None, "it is still under way");
    assert_eq!(
        strayed(Some("blockdev-reopen"), ends(None).as_ref(), &edges("n2")),
        None,
        "nobody reopens"
    );
    let failed = ends(Some("Input/output error"));
    assert_eq!(strayed(None, failed.as_ref(), &edges("n2")), None, "it failed");
    let read = Violation {
        step: Some(StepId(9)),
        ..found(
            OracleName::Data,
            "read at 0x0: fill 0 of image 1, expected zeroes",
        )
    };
    assert_eq!(
        strayed(None, ends(None).as_ref(), &read),
        undoes,
        "through the export above"
    );
    let other = Violation {
        step: Some(StepId(8)),
        ..read
    };
    assert_eq!(
        strayed(None, ends(None).as_ref(), &other),
        None,
        "no guest's read"
    );
    let jobs = found(OracleName::Jobs, "node 'n2'");
    assert_eq!(strayed(None, ends(None).as_ref(), &jobs), None);
}

/// A filter `c` over `b`, a writer on `b`, and a stream that is refused for it; what is said of `b`.
#[test]
fn a_root_that_stays_on_a_filter_is_seen_below_it() {
    let filter = |bottom: &str| json!({"driver": "copy-on-read", "node-name": "c", "file": bottom});
    let writer = json!({"type": "nbd", "id": "w", "node-name": "b", "writable": true});
    let steps = |stream: &str| {
        [
            ("blockdev-add", filter("b")),
            ("block-export-add", writer.clone()),
            ("block-stream", json!({"job-id": "j", "device": stream})),
        ]
    };
    let line = |what: &str, parent: &str, may: &str, lets: &str| {
        format!("{what}: node '{parent}' (Role(0x0)) may '{may}', shares '{lets}'")
    };
    let of = |node: &str, (parent, may, lets): (&str, &str, &str), stream: &str| {
        let mut wrong = found(
            OracleName::Permissions,
            &format!("node '{node}' has other permissions than it should have"),
        );
        let writer = "a backend (Role(0x0)) may 'write', shares 'write'";
        wrong.evidence = vec![
            line("expected", parent, "write unchanged", "write, resize"),
            format!("expected: {writer}"),
            line("found", parent, may, lets),
            format!("found: {writer}"),
        ];
        after(&steps(stream), false, &wrong)
    };
    let more = ("c", "consistent read, write unchanged", "write");
    let keeps = Some("refused-stream-keeps-root");
    assert_eq!(of("b", more, "c"), keeps);
    assert_eq!(of("b", ("c", "write unchanged", "write"), "c"), keeps);
    assert_eq!(of("o", more, "c"), None, "it is not below the filter");
    assert_eq!(of("b", ("t", more.1, more.2), "c"), None, "another parent");
    assert_eq!(
        of("b", ("c", "consistent read", "write"), "c"),
        None,
        "it may less"
    );
    assert_eq!(
        of("b", ("c", "write unchanged", "write, graph"), "c"),
        None,
        "it lets more"
    );
    assert_eq!(of("b", more, "o"), None, "nobody refuses that stream");
}

/// The scenario of the page, with these records after its reopen was issued.
#[test]
fn a_reopen_dies_only_of_a_stream_that_goes_on_under_it() {
    use blkcheck_impl::jobs::JobStatus::{Running, Waiting};
    use blkcheck_impl::types::JobId;

    let entry = find("reopen-meets-end-of-stream").expect("an entry");
    let page = parse::parse("test", entry.scenario.as_bytes()).expect("a scenario");
    let goes_on = |job: &str| {
        Record::Layer(Event::JobStatus {
            job: JobId(1),
            id: job.into(),
            from: Running,
            to: Waiting,
        })
    };
    let dies = found(
        OracleName::Daemon,
        "the daemon died of SIGABRT: bdrv_set_file_or_backing_noperm: Assertion `child->bs->quiesce_counter' failed.",
    );
    let of = |change: &dyn Fn(&mut Value), more: &[Record], violation: &Violation| {
        let mut scenario = page.clone();
        let mut records = Vec::new();
        for (at, step) in (0..).zip(&mut scenario.steps) {
            let Action::Command { execute, arguments } = &mut step.action else {
                continue;
            };
            records.push(Record::Issued(StepId(at)));
            let Some(what) = ["blockdev-add", "block-stream"]
                .into_iter()
                .find(|name| name == execute)
            else {
                let mut value = Value::Object(std::mem::take(arguments));
                change(&mut value["options"][0]);
                *arguments = value.as_object().cloned().expect("still one");
                continue;
            };
            records.extend([
                Record::Layer(Event::MainBegin { what }),
                Record::Layer(Event::MainEnd { what }),
                Record::Ended(StepId(at), Outcome::Command(Ok(json!({})))),
            ]);
        }
        records.extend_from_slice(more);
        explain(&scenario, violation, &records).map(|d| d.id)
    };
    let as_it_is = |_: &mut Value| {};
    let meets = Some("reopen-meets-end-of-stream");
    assert_eq!(of(&as_it_is, &[goes_on("j0")], &dies), meets);
    assert_eq!(of(&as_it_is, &[], &dies), None, "the stream does not move");
    assert_eq!(of(&as_it_is, &[goes_on("j1")], &dies), None, "another job does");
    let answered = Record::Ended(StepId(4), Outcome::Command(Ok(json!({}))));
    assert_eq!(
        of(&as_it_is, &[answered, goes_on("j0")], &dies),
        None,
        "after the reopen"
    );
    let stays = |options: &mut Value| options["backing"] = json!("filter");
    assert_eq!(of(&stays, &[goes_on("j0")], &dies), None, "the link stays");
    let elsewhere = |options: &mut Value| options["node-name"] = json!("base");
    assert_eq!(
        of(&elsewhere, &[goes_on("j0")], &dies),
        None,
        "no filter is below that"
    );
    let other = found(OracleName::Daemon, "the daemon died of SIGSEGV");
    assert_eq!(of(&as_it_is, &[goes_on("j0")], &other), None);
}
