//! The shipping daemon under the gate: deterministic, judged like any other layer, and gone afterwards.
//!
//! Needs qemu-storage-daemon 10.0.x; without it each test says loudly that it was skipped. With BLKCHECK_REQUIRE_ALL=1 a
//! daemon of that version must not be skipped.

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use common::{BLKCHECK, has_daemon, stderr, stdout, write_script};
use serde_json::Value;

fn blkcheck(tmp: &Path, arguments: &[&str]) -> Output {
    Command::new(BLKCHECK)
        .args(arguments)
        .env("TMPDIR", tmp)
        .current_dir(tmp)
        .output()
        .expect("the command starts")
}

fn json(output: &Output) -> Value {
    serde_json::from_slice(&output.stdout)
        .unwrap_or_else(|e| panic!("{e}: {}{}", stdout(output), stderr(output)))
}

/// Directories of daemons.
fn left_in(dir: &Path) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(dir).expect("readable");
    let entries = entries.map(|e| e.expect("readable").path());
    let ours = |p: &PathBuf| p.to_string_lossy().contains("blkcheck-qemu-");
    entries.filter(ours).collect()
}

#[test]
fn the_same_seeds_give_the_same_trace_and_the_same_findings() {
    if !has_daemon("the_same_seeds_give_the_same_trace_and_the_same_findings") {
        return;
    }
    let tmp = tempfile::tempdir().expect("a directory");
    let run = |threads| {
        let arguments = [
            "run",
            "--on",
            "qemu",
            "--profile",
            "guests",
            "--seeds",
            "0..16",
            "--json",
        ];
        json(&blkcheck(
            tmp.path(),
            &[&arguments[..], &["--threads", threads]].concat(),
        ))
    };
    let (one, two) = (run("1"), run("2"));
    assert_eq!(one["trace_hash"], two["trace_hash"]);
    assert_eq!(one["seeds"], 16);
    assert!(one["steps"].as_u64().expect("a number") > 500, "{one}");
    let sites = |run: &Value| -> Vec<(Value, Value)> {
        let findings = run["findings"].as_array().expect("a list");
        findings
            .iter()
            .map(|f| (f["seed"].clone(), f["oracle"].clone()))
            .collect()
    };
    assert_eq!(sites(&one), sites(&two));
    assert_eq!(left_in(tmp.path()), Vec::<PathBuf>::new());
}

/// Storage fails under backups, some of which stop and are resumed, and the power under others.
#[test]
fn backups_meet_failing_storage_and_power_cuts_the_same_way_each_time() {
    if !has_daemon("backups_meet_failing_storage_and_power_cuts_the_same_way_each_time") {
        return;
    }
    let tmp = tempfile::tempdir().expect("a directory");
    let run = |faults: &str, threads: &str| {
        let words = format!(
            "run --on qemu --profile backup --seeds 0..24 --json --faults {faults} --threads {threads}"
        );
        let words: Vec<&str> = words.split(' ').collect();
        json(&blkcheck(tmp.path(), &words))
    };
    for (faults, situations) in [
        ("errors", &["backup succeeds", "backup ends early"][..]),
        ("crash", &["backup succeeds"]),
        ("all", &["backup ends early"]),
    ] {
        let (one, two) = (run(faults, "1"), run(faults, "2"));
        assert_eq!(one["trace_hash"], two["trace_hash"], "{faults}");
        assert_eq!(one["findings"], serde_json::json!([]), "{faults}");
        for situation in situations {
            let met = one["coverage"][*situation].as_u64();
            assert!(met.is_some_and(|met| met > 0), "{faults}: {situation}: {one}");
        }
    }
    assert_eq!(left_in(tmp.path()), Vec::<PathBuf>::new());
}

/// One image under a chain of two, a stream, and guest requests beside it.
const STREAM: &str = r#"{"version": 1, "grain": 512, "images": [
    {"file": "base.img", "format": "qcow2", "size": 4096, "cluster-size": 512,
     "fill": [{"offset": 0, "length": 4096, "stored": "data"}]},
    {"file": "top.img", "format": "qcow2", "size": 4096, "cluster-size": 512,
     "backing-file": "base.img", "backing-format": "qcow2"}], "steps": [
    {"actor": "setup", "execute": "blockdev-add", "arguments": {"driver": "qcow2", "node-name": "top",
        "file": {"driver": "file", "filename": "top.img"}}},
    {"actor": "setup", "execute": "block-export-add", "arguments": {"type": "nbd", "id": "x", "node-name": "top",
        "name": "x", "writable": true}},
    {"actor": "monitor", "execute": "block-stream", "arguments": {"job-id": "j", "device": "top"}},
    {"actor": "guest", "export": "x", "do": {"write": {"offset": 512, "length": 1024}}, "wait": false},
    {"actor": "guest", "export": "x", "do": {"read": {"offset": 0, "length": 4096}}},
    {"actor": "guest", "export": "x", "do": {"block-status": {"offset": 0, "length": 4096}}},
    {"actor": "monitor", "wait-job": {"id": "j", "status": "null"}}],
    "choices": [CHOICES]}"#;

#[test]
fn a_chain_from_its_header_is_streamed_under_guests_in_any_order() {
    if !has_daemon("a_chain_from_its_header_is_streamed_under_guests_in_any_order") {
        return;
    }
    let tmp = tempfile::tempdir().expect("a directory");
    let mut traces = Vec::new();
    for choices in [
        "",
        "0,0,0,0,0,0,0,0,1,1,2,1,2,0,1,2",
        "1,2,1,2,1,2,1,2,1,2,1,2,1,2,1,2,1,2",
    ] {
        let file = tmp.path().join("stream.json");
        std::fs::write(&file, STREAM.replace("CHOICES", choices)).expect("written");
        let output = blkcheck(tmp.path(), &["replay", "--on", "qemu", "stream.json", "--json"]);
        let replayed = json(&output);
        assert_eq!(replayed["verdict"], "pass", "{replayed} with choices {choices}");
        traces.push(replayed["trace_hash"].to_string());
    }
    traces.dedup();
    assert_eq!(traces.len(), 3, "the choices decide the course: {traces:?}");
}

#[test]
fn what_the_daemon_cannot_do_and_a_missing_daemon_are_refused_with_2() {
    let tmp = tempfile::tempdir().expect("a directory");
    let output = blkcheck(
        tmp.path(),
        &[
            "run",
            "--on",
            "qemu",
            "--qemu",
            "/nowhere/daemon",
            "--seeds",
            "0..1",
        ],
    );
    assert_eq!(output.status.code(), Some(2));
    let said = stderr(&output);
    assert!(
        said.contains("needs qemu-storage-daemon 10.x") && said.contains("/nowhere/daemon"),
        "{said}"
    );
    let output = blkcheck(
        tmp.path(),
        &["run", "--on", "qemu", "--qemu", "/bin/echo", "--seeds", "0..1"],
    );
    assert_eq!(output.status.code(), Some(2));
    if !has_daemon("what_the_daemon_cannot_do_and_a_missing_daemon_are_refused_with_2") {
        return;
    }
    let drained = r#"{"version": 1, "grain": 512, "images": [],
        "steps": [{"actor": "d", "drained-begin": "n"}, {"actor": "d", "drained-end": "n"}]}"#;
    std::fs::write(tmp.path().join("drained.json"), drained).expect("written");
    let output = blkcheck(tmp.path(), &["replay", "--on", "qemu", "drained.json"]);
    assert_eq!(output.status.code(), Some(2), "{}", stdout(&output));
    assert!(
        stderr(&output).contains("no command for drained sections"),
        "{}",
        stderr(&output)
    );
    let quit = r#"{"version": 1, "grain": 512, "images": [], "steps": [{"actor": "m", "execute": "quit"}]}"#;
    std::fs::write(tmp.path().join("quit.json"), quit).expect("written");
    for arguments in [
        &["replay", "--on", "qemu"][..],
        &["replay", "--on", "qemu", "--tier", "stress"],
        &["compare"],
    ] {
        let output = blkcheck(tmp.path(), &[arguments, &["quit.json"]].concat());
        assert_eq!(output.status.code(), Some(2), "{}", stdout(&output));
        let said = stderr(&output);
        assert!(
            said.contains("quit is about qemu-storage-daemon itself"),
            "{said}"
        );
    }
}

#[test]
#[expect(clippy::disallowed_methods, reason = "how long the kernel takes is real time")]
fn a_killed_run_leaves_no_daemon_and_no_directory() {
    if !has_daemon("a_killed_run_leaves_no_daemon_and_no_directory") {
        return;
    }
    let tmp = tempfile::tempdir().expect("a directory");
    let mut child = Command::new(BLKCHECK)
        .args(["run", "--on", "qemu", "--for", "60s", "--threads", "1"])
        .env("TMPDIR", tmp.path())
        .current_dir(tmp.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("the command starts");
    let wait = |what: &str, done: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(30);
        while !done() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    wait("no daemon was started", &|| {
        left_in(tmp.path()).iter().any(|d| d.join("g").exists())
    });
    child.kill().expect("it runs");
    child.wait().expect("it ends");
    wait("a directory is left", &|| left_in(tmp.path()).is_empty());
    wait("a daemon is left", &|| !processes_name(tmp.path()));
}

/// Whether some process has this path in its command line.
fn processes_name(path: &Path) -> bool {
    let path = path.to_string_lossy();
    let processes = std::fs::read_dir("/proc").expect("readable").flatten();
    let mut lines = processes.filter_map(|p| std::fs::read(p.path().join("cmdline")).ok());
    lines.any(|line| String::from_utf8_lossy(&line).contains(&*path))
}

#[test]
fn known_defects_that_need_an_order_are_reproduced_and_recognised() {
    if !has_daemon("known_defects_that_need_an_order_are_reproduced_and_recognised") {
        return;
    }
    let tmp = tempfile::tempdir().expect("a directory");
    let findings = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/findings");
    let replay = |name: &str| {
        let file = findings.join(name);
        let file = file.to_str().expect("a name");
        json(&blkcheck(tmp.path(), &["replay", "--on", "qemu", file, "--json"]))
    };
    for defect in blkcheck_sim::compare::known_run::gated() {
        let replayed = replay(&format!("{}.json", defect.id));
        assert_eq!(replayed["verdict"], "fail", "{}: {replayed}", defect.id);
        assert_eq!(replayed["known"], defect.id, "{replayed}");
    }
    // Of those that need no order, the ones that a changed graph is the cause of.
    for id in [
        "snapshot-over-shorter-overlay",
        "reopen-shortens-export",
        "filter-keeps-length",
        "stream-over-raw-loses-data",
        "cor-bottom-crash",
    ] {
        let replayed = replay(&format!("{id}.json"));
        assert_eq!(replayed["known"], id, "{replayed}");
    }
    let freed = replay("zeroes-under-write-frees.json");
    assert_eq!(freed["oracle"], "image", "{freed}");
    assert_eq!(freed["known"], "zeroes-under-write", "{freed}");
}

/// The profile that has everything in it: graph changes, jobs, filters, guests.
#[test]
fn mixed_seeds_repeat_bit_by_bit_with_any_number_of_threads() {
    if !has_daemon("mixed_seeds_repeat_bit_by_bit_with_any_number_of_threads") {
        return;
    }
    let tmp = tempfile::tempdir().expect("a directory");
    let run = |threads| {
        let span = [
            "run",
            "--on",
            "qemu",
            "--seeds",
            "0..96",
            "--json",
            "--threads",
            threads,
        ];
        json(&blkcheck(tmp.path(), &span))
    };
    let first = run("1");
    assert!(first["steps"].as_u64().expect("a number") > 2000, "{first}");
    for threads in ["2", "5", "1"] {
        let again = run(threads);
        assert_eq!(first["trace_hash"], again["trace_hash"], "{threads} threads");
        assert_eq!(first["known"], again["known"], "{threads} threads");
        assert_eq!(first["known_counts"], again["known_counts"], "{threads} threads");
        let found = |run: &Value| run["findings"].as_array().expect("a list").len();
        assert_eq!(found(&first), found(&again), "{threads} threads");
    }
}

/// Requests fail as on the simulated disk: by choices, so that runs repeat, and what the daemon makes of it is judged.
#[test]
fn failing_storage_is_a_choice_too_and_everything_it_shows_is_explained() {
    if !has_daemon("failing_storage_is_a_choice_too_and_everything_it_shows_is_explained") {
        return;
    }
    let tmp = tempfile::tempdir().expect("a directory");
    let run = |threads| {
        let flags = [
            "run",
            "--on",
            "qemu",
            "--faults",
            "errors",
            "--seeds",
            "0..64",
            "--json",
            "--threads",
            threads,
        ];
        json(&blkcheck(tmp.path(), &flags))
    };
    let first = run("1");
    assert_eq!(first["findings"], serde_json::json!([]), "{first}");
    for situation in [
        "guest request fails",
        "storage fails a read",
        "storage fails a write",
    ] {
        assert!(
            first["coverage"][situation].as_u64() > Some(0),
            "{situation}: {first}"
        );
    }
    for threads in ["2", "1"] {
        let again = run(threads);
        assert_eq!(first["trace_hash"], again["trace_hash"], "{threads} threads");
        assert_eq!(first["known_counts"], again["known_counts"], "{threads} threads");
    }
    let known = first["known_counts"].as_object().expect("an object");
    assert!(known.contains_key("read-error-closes-connection"), "{known:?}");
}

/// A daemon that is none: it says the right version and greets, and then does what `BLKCHECK_FAKE` says.
const FAKE: &str = r#"#!/usr/bin/env python3
import os, select, socket, sys
if "--version" in sys.argv:
    print("qemu-storage-daemon version 10.0.2 (a fake)")
    sys.exit(0)
mode = os.environ["BLKCHECK_FAKE"]
if mode == "exits":
    sys.exit(3)
monitor = socket.socket(fileno=os.dup(0))
poll = select.poll()
poll.register(monitor, select.POLLIN)
say = lambda text: monitor.sendall(text.encode())
if mode != "never-greets":
    say('{"QMP": {"version": {}, "capabilities": []}}\n')
asked = 0
while True:
    poll.poll()
    if not monitor.recv(65536):
        sys.exit(0)
    asked += 1
    if asked == 1:
        say('{"return": {}}\n')
    elif mode == "nonsense":
        say('Segmentation fault, or so\n')
    elif mode == "unasked":
        say('{"return": {}}\n{"return": {}}\n')
    elif mode == "mid-message":
        say('{"retu')
        os._exit(4)
    elif mode == "not-a-graph":
        say('{"return": 7}\n')
    elif mode == "aborts":
        print("fake: Assertion `mode' failed.", file=sys.stderr, flush=True)
        os.abort()
"#;

#[test]
fn a_daemon_that_talks_nonsense_dies_or_hangs_is_a_finding_and_one_that_never_starts_is_refused() {
    if !has_daemon(
        "a_daemon_that_talks_nonsense_dies_or_hangs_is_a_finding_and_one_that_never_starts_is_refused",
    ) {
        return;
    }
    let tmp = tempfile::tempdir().expect("a directory");
    let fake = tmp.path().join("fake");
    write_script(&fake, FAKE);
    let run = |mode: &str| {
        let fake = fake.to_str().expect("a name");
        Command::new(BLKCHECK)
            .args([
                "run",
                "--on",
                "qemu",
                "--qemu",
                fake,
                "--seeds",
                "1..3",
                "--threads",
                "1",
                "--json",
            ])
            .env("TMPDIR", tmp.path())
            .env("BLKCHECK_FAKE", mode)
            .current_dir(tmp.path())
            .output()
            .expect("the command starts")
    };
    for (mode, says) in [
        ("nonsense", "not QMP: Segmentation fault, or so"),
        ("unasked", "an answer to no command"),
        ("mid-message", "the daemon exited with code 4"),
        ("not-a-graph", "makes up no name"),
        (
            "aborts",
            "the daemon died of SIGABRT: fake: Assertion `mode' failed.",
        ),
        ("silent", "blockdev-add is not answered, and nothing is held"),
    ] {
        let output = run(mode);
        assert_eq!(output.status.code(), Some(1), "{mode}: {}", stderr(&output));
        let found = json(&output);
        let findings = found["findings"].as_array().expect("a list");
        assert_eq!(findings.len(), 2, "{mode}: the campaign goes on: {found}");
        for finding in findings {
            assert_eq!(finding["oracle"], "daemon", "{mode}");
            let message = finding["message"].as_str().expect("a text");
            assert!(message.contains(says), "{mode}: {message}");
        }
    }
    for (mode, says) in [
        ("exits", "the daemon exited with code 3"),
        ("never-greets", "no greeting"),
    ] {
        let output = run(mode);
        assert_eq!(output.status.code(), Some(2), "{mode}: {}", stdout(&output));
        assert!(stderr(&output).contains(says), "{mode}: {}", stderr(&output));
    }
    assert_eq!(left_in(tmp.path()), Vec::<PathBuf>::new());
}
