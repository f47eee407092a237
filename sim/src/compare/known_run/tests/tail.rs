//! Short replies about the end of an image.

use super::*;

/// A raw image of so many bytes is read, or opened as something that it is not.
#[test]
fn who_waits_for_ever_has_an_image_that_ends_within_a_sector() {
    let add = |driver: &str, file: &str| {
        json!({"actor": "m", "execute": "blockdev-add", "arguments": {"driver": driver, "node-name": "n",
            "file": {"driver": "file", "filename": file}}})
    };
    let export = json!({"actor": "m", "execute": "block-export-add", "arguments": {"type": "nbd", "id": "x", "node-name": "n"}});
    let read = json!({"actor": "g", "export": "x", "do": {"read": {"offset": 512, "length": 512}}});
    let waits = Violation {
        oracle: OracleName::Liveness,
        message: "step 2: nothing can happen any more".to_owned(),
        step: None,
        evidence: Vec::new(),
    };
    let of = |size: u64, add: Value, answered: bool, violation: &Violation| {
        let image = |file: &str, size: u64| json!({"file": file, "format": "raw", "size": size});
        let scenario = json!({"version": 1, "grain": 512, "images": [image("i", size), image("even", 4096)],
            "steps": [add, export, read]});
        let scenario: Scenario = serde_json::from_value(scenario).expect("a scenario");
        let what = "blockdev-add";
        let mut records = vec![
            Record::Issued(StepId(0)),
            Record::Layer(Event::MainBegin { what }),
        ];
        if answered {
            records.extend([
                Record::Ended(StepId(0), Outcome::Command(Ok(json!({})))),
                Record::Issued(StepId(2)),
            ]);
        }
        explain(&scenario, violation, &records).map(|d| d.id)
    };
    let hangs = Some("nbd-short-tail-hangs");
    assert_eq!(of(1000, add("raw", "i"), true, &waits), hangs, "the guest's read");
    for size in [1, 2, 100, 104] {
        assert_eq!(
            of(size, add("qcow2", "i"), false, &waits),
            hangs,
            "a header of {size} bytes"
        );
    }
    assert_eq!(of(1024, add("raw", "i"), true, &waits), None, "whole sectors");
    assert_eq!(of(512, add("qcow2", "i"), false, &waits), None, "a whole sector");
    assert_eq!(
        of(1000, add("raw", "even"), true, &waits),
        None,
        "nobody has it open"
    );
    assert_eq!(
        of(1000, add("qcow2", "even"), false, &waits),
        None,
        "nor opens it"
    );
    let spins = Violation {
        oracle: OracleName::Daemon,
        ..waits
    };
    assert_eq!(of(1000, add("raw", "i"), true, &spins), None, "another oracle");
}
