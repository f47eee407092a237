//! `blkcheck compare` against the real daemon: known defects are reproduced and recognised, seeds and short sequences
//! agree, at least a hundred kinds of refusals are reached, and a missing daemon is said so.
//!
//! Without qemu-storage-daemon 10.0.x the comparisons are skipped, loudly; not so under `BLKCHECK_REQUIRE_ALL=1`.
#![cfg(target_os = "linux")]

mod common;

use std::collections::BTreeSet;
use std::path::Path;

use common::{blkcheck, has_daemon, root, scenario_files, stderr, stdout};
use serde_json::Value;

fn compare(dir: &Path, arguments: &[&str]) -> (i32, Value) {
    let output = blkcheck(dir, &[&["compare", "--json"], arguments].concat());
    let text = stdout(&output);
    let value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text} {}", stderr(&output)));
    (output.status.code().expect("not killed"), value)
}

#[test]
fn a_missing_daemon_and_another_program_are_said_so() {
    let dir = tempfile::tempdir().expect("a directory");
    for program in ["/nonexistent", "/bin/true"] {
        let output = blkcheck(dir.path(), &["compare", "--seeds", "0..1", "--qemu", program]);
        assert_eq!(output.status.code(), Some(2), "{program}");
        let said = stderr(&output);
        assert!(
            said.contains("needs qemu-storage-daemon 10.x") && said.contains(program),
            "{said}"
        );
        assert_eq!(stdout(&output), "");
    }
}

#[test]
fn every_known_defect_is_reproduced_and_recognised() {
    if !has_daemon("every_known_defect_is_reproduced_and_recognised") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let files = scenario_files("docs/findings");
    for defect in blkcheck_sim::compare::known::DEFECTS {
        let file = root().join("docs/findings").join(format!("{}.json", defect.id));
        assert!(files.contains(&file), "{} has no scenario", defect.id);
        let (code, report) = compare(dir.path(), &[file.to_str().expect("UTF-8")]);
        assert_eq!(code, 0, "{}: {report}", defect.id);
        assert_eq!(report["divergences"], serde_json::json!([]), "{}", defect.id);
        assert_eq!(report["qemu_failures"], serde_json::json!([]), "{}", defect.id);
        let met = report["known_counts"][defect.id].as_u64();
        assert!(
            met.is_some_and(|n| n > 0),
            "{} is not reproduced: {report}",
            defect.id
        );
    }
}

#[test]
fn seeds_and_short_sequences_agree() {
    if !has_daemon("seeds_and_short_sequences_agree") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    for arguments in [["--seeds", "0..60"], ["--exhaustive", "1"]] {
        let (code, report) = compare(dir.path(), &arguments);
        assert_eq!(
            (code, &report["divergences"]),
            (0, &serde_json::json!([])),
            "{report}"
        );
        assert!(report["steps"].as_u64() > Some(40), "{report}");
        if arguments[0] == "--exhaustive" {
            let commands = blkcheck_sim::compare::exhaustive::commands().len() as u64;
            assert_eq!(report["sequences"].as_u64(), Some(commands), "every command once");
        }
    }
}

/// A text without what names a thing of the scenario: two nodes that are not found are one kind of refusal. Parameters, verbs,
/// states and permissions stay: they make kinds of their own.
fn kind_of(text: &str) -> String {
    const NAMES: [&str; 8] = ["cor", "x", "nope", "/nope", "nobody", "nowhere", "odd", "thr"];
    let belongs = |c: char| c.is_ascii_alphanumeric() || "#-_./".contains(c);
    let names = |word: &str| {
        word.contains(|c: char| c.is_ascii_digit() || c == '#')
            || word.ends_with(".img")
            || word.len() > 31
            || NAMES.contains(&word)
    };
    let mut kind = String::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let length = rest.find(|c| belongs(c) != belongs(first)).unwrap_or(rest.len());
        let (word, after) = rest.split_at(length);
        kind.push_str(if belongs(first) && names(word) {
            "…"
        } else {
            word
        });
        rest = after;
    }
    kind
}

#[test]
fn at_least_a_hundred_kinds_of_refusals_agree() {
    if !has_daemon("at_least_a_hundred_kinds_of_refusals_agree") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let (code, report) = compare(dir.path(), &["--seeds", "0..250"]);
    assert_eq!(code, 0, "{report}");
    let text = |value: &Value| value.as_str().expect("a string").to_owned();
    let kinds: BTreeSet<String> = report["refusals"]
        .as_array()
        .expect("a list")
        .iter()
        .map(|r| format!("{}: {}", text(&r[0]), kind_of(&text(&r[1]))))
        .collect();
    assert!(kinds.len() >= 100, "only {}: {kinds:#?}", kinds.len());
    insta::with_settings!({
        snapshot_path => root().join("tests/snapshots"),
        prepend_module_to_snapshot => false,
        omit_expression => true,
    }, {
        insta::assert_snapshot!("compare-refusals", kinds.into_iter().collect::<Vec<_>>().join("\n"));
    });
}

#[test]
fn what_the_daemon_is_told_can_be_told_again() {
    if !has_daemon("what_the_daemon_is_told_can_be_told_again") {
        return;
    }
    let cost = blkcheck_sim::compare::cost::measure(0..20, None).expect("a daemon");
    assert!(cost.scenarios >= 15, "{cost:?}");
    assert!(cost.steps > 10 * u64::from(cost.scenarios), "{cost:?}");
    assert!(
        cost.daemon > std::time::Duration::ZERO && cost.compared > std::time::Duration::ZERO,
        "{cost:?}"
    );
}
