//! The same scenarios over real files and loop devices; and that a killed run leaves nothing for long.

mod common;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use blkcheck_sim::target::loopdev::{available, devices_over};
use common::{BLKCHECK, skip, stderr, stdout};
use serde_json::Value;

/// Runs seeds with a temporary directory of its own, which must be empty afterwards.
fn run(tmp: &Path, on: &str, seeds: &str) -> Value {
    let output = Command::new(BLKCHECK)
        .args(["run", "--seeds", seeds, "--on", on, "--json", "--out"])
        .arg(tmp.join("findings"))
        .env("TMPDIR", tmp)
        .output()
        .expect("the command starts");
    let said = stderr(&output);
    assert_eq!(output.status.code(), Some(0), "{}{said}", stdout(&output));
    serde_json::from_slice(&output.stdout).expect("one JSON object")
}

fn left_in(dir: &Path) -> Vec<PathBuf> {
    fs::read_dir(dir)
        .expect("readable")
        .map(|e| e.expect("readable").path())
        .collect()
}

#[test]
fn real_files() {
    let tmp = tempfile::tempdir().expect("a directory");
    let summary = run(tmp.path(), "file", "0..20");
    assert_eq!(summary["seeds"], 20);
    assert_eq!(summary["findings"], Value::Array(Vec::new()));
    assert!(
        summary["operations"].as_u64().expect("a number") > 100,
        "{summary}"
    );
    assert_eq!(left_in(tmp.path()), Vec::<PathBuf>::new());
}

#[test]
fn loop_devices() {
    if let Err(reason) = available() {
        return skip("loop_devices", &reason.to_string());
    }
    let tmp = tempfile::tempdir().expect("a directory");
    let summary = run(tmp.path(), "loop", "0..10");
    assert_eq!(summary["seeds"], 10);
    assert_eq!(summary["findings"], Value::Array(Vec::new()));
    assert_eq!(left_in(tmp.path()), Vec::<PathBuf>::new());
}

/// Waits for what takes the kernel a moment.
#[expect(clippy::disallowed_methods, reason = "how long the kernel takes is real time")]
fn wait(what: &str, limit: Duration, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + limit;
    while !done() {
        assert!(Instant::now() < deadline, "{what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn after_a_kill_the_next_run_cleans_up() {
    if let Err(reason) = available() {
        return skip("after_a_kill_the_next_run_cleans_up", &reason.to_string());
    }
    let tmp = tempfile::tempdir().expect("a directory");
    let mut child = Command::new(BLKCHECK)
        .args([
            "run",
            "--for",
            "60s",
            "--threads",
            "1",
            "--on",
            "loop",
            "--json",
            "--out",
        ])
        .arg(tmp.path().join("findings"))
        .env("TMPDIR", tmp.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the command starts");
    let attached = || {
        left_in(tmp.path())
            .iter()
            .any(|dir| !devices_over(dir).is_empty())
    };
    wait(
        "no loop device was attached in 20 s",
        Duration::from_secs(20),
        attached,
    );
    child.kill().expect("it runs");
    child.wait().expect("it was started here");
    assert_ne!(
        left_in(tmp.path()),
        Vec::<PathBuf>::new(),
        "a killed process cannot remove its directory"
    );
    run(tmp.path(), "loop", "0..1");
    wait("a loop device is still attached", Duration::from_secs(10), || {
        !attached()
    });
    assert_eq!(left_in(tmp.path()), Vec::<PathBuf>::new());
}
