//! The block layer here and the gated daemon come to the same end under many interleavings; and the stress tier says
//! what it is.
//!
//! Needs qemu-storage-daemon 10.0.x; without it each test says loudly that it was skipped. Not so under
//! `BLKCHECK_REQUIRE_ALL=1`.
#![cfg(target_os = "linux")]

mod common;

use common::{blkcheck, has_daemon, stderr, stdout};
use serde_json::{Value, json};

fn run(dir: &std::path::Path, arguments: &[&str]) -> (i32, Value) {
    let output = blkcheck(dir, arguments);
    let text = stdout(&output);
    let value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text} {}", stderr(&output)));
    (output.status.code().expect("not killed"), value)
}

#[test]
fn layer_and_daemon_agree_whatever_the_interleaving() {
    if !has_daemon("layer_and_daemon_agree_whatever_the_interleaving") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let (code, report) = run(dir.path(), &["compare", "--interleavings", "200", "--json"]);
    assert_eq!(
        (code, &report["divergences"], &report["qemu_failures"]),
        (0, &json!([]), &json!([])),
        "{report}"
    );
    assert_eq!(
        (&report["interleavings"], &report["scenarios"]),
        (&json!(200), &json!(20))
    );
    let number = |key: &str| report[key].as_u64().unwrap_or_else(|| panic!("{key}: {report}"));
    // Two of one scenario may take the same course by chance.
    assert!(number("distinct_interleavings") >= 190, "{report}");
    assert!(number("distinct_interleavings_impl") >= 190, "{report}");
    assert!(
        number("answers_compared") > 4000 && number("bytes_compared") > 1_000_000,
        "{report}"
    );
    let (_, again) = run(
        dir.path(),
        &["compare", "--interleavings", "30", "--seeds", "7..10", "--json"],
    );
    assert_eq!(
        (&again["interleavings"], &again["scenarios"]),
        (&json!(30), &json!(3))
    );
}

#[test]
fn the_stress_tier_says_that_it_is_not_deterministic() {
    if !has_daemon("the_stress_tier_says_that_it_is_not_deterministic") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let stress = [
        "run",
        "--on",
        "qemu",
        "--tier",
        "stress",
        "--threads",
        "1",
        "--seeds",
        "0..12",
    ];
    let (_, report) = run(dir.path(), &[&stress[..], &["--json"]].concat());
    assert_eq!(
        (&report["trace_hash"], &report["deterministic"]),
        (&Value::Null, &json!(false))
    );
    assert_eq!(report["seeds"], 12);
    assert!(report["operations"].as_u64() > Some(100), "{report}");
    for finding in report["findings"].as_array().expect("a list") {
        assert_ne!(finding["oracle"], "determinism", "{finding}");
    }
    let output = blkcheck(dir.path(), &stress);
    assert!(
        stdout(&output).contains("NOT deterministic"),
        "{}",
        stdout(&output)
    );
    let refused = blkcheck(dir.path(), &["run", "--tier", "stress", "--seeds", "0..1"]);
    assert_eq!(refused.status.code(), Some(2));
    assert!(
        stderr(&refused).contains("needs --on qemu"),
        "{}",
        stderr(&refused)
    );
}

#[test]
fn a_replay_on_the_stress_tier_says_so_on_its_page() {
    if !has_daemon("a_replay_on_the_stress_tier_says_so_on_its_page") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let file = common::root().join("docs/examples/copy-on-read.json");
    let file = file.to_str().expect("UTF-8");
    let stress = [
        "replay",
        file,
        "--on",
        "qemu",
        "--tier",
        "stress",
        "--html",
        "page.html",
        "--json",
    ];
    let (code, report) = run(dir.path(), &stress);
    // With I/O threads the daemon may die of races of its own; nothing else may be found here.
    if code == 0 {
        assert_eq!(report["verdict"], "pass", "{report}");
    } else {
        assert_eq!(
            (code, &report["verdict"], &report["oracle"]),
            (1, &json!("fail"), &json!("daemon")),
            "{report}"
        );
    }
    assert_eq!(
        (&report["trace_hash"], &report["deterministic"]),
        (&Value::Null, &json!(false))
    );
    let page = std::fs::read_to_string(dir.path().join("page.html")).expect("written");
    assert!(page.contains("NOT deterministic"));
}
