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
