//! The `blkcheck` command as other programs see it: exit codes, stderr, JSON keys and types, stable hashes.

mod common;

use std::fs;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use blkcheck_sim::harness::{Harness, Setup};
use common::{BLKCHECK, blkcheck, root, scenario_files, stderr, stdout};
use serde_json::{Value, json};

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

fn example() -> String {
    root().join("docs/examples/stream.json").display().to_string()
}

/// Exactly one JSON object and a line end, nothing else.
fn object(output: &Output) -> Value {
    let text = stdout(output);
    assert!(text.ends_with('\n'), "{text:?}");
    let value: Value = serde_json::from_str(&text).unwrap_or_else(|e| panic!("{e}: {text}"));
    assert!(value.is_object(), "{text}");
    value
}

/// Exit code 2, nothing on stdout, and this on stderr.
fn unusable(arguments: &[&str], says: &[&str]) {
    let output = blkcheck(dir().path(), arguments);
    assert_eq!(
        output.status.code(),
        Some(2),
        "{arguments:?}: {}",
        stderr(&output)
    );
    assert_eq!(stdout(&output), "", "{arguments:?}");
    for part in says {
        assert!(
            stderr(&output).contains(part),
            "{arguments:?}: no {part:?} in {}",
            stderr(&output)
        );
    }
}

#[test]
fn requests_that_make_no_sense() {
    for faults in ["errors", "crash", "all"] {
        unusable(
            &["run", "--seeds", "0..1", "--faults", faults, "--on", "file"],
            &["only storage of ours fails on demand", "--on memory", "--on qemu"],
        );
    }
    unusable(
        &[
            "run", "--seeds", "0..1", "--faults", "errors", "--on", "qemu", "--tier", "stress",
        ],
        &["only storage of ours fails on demand"],
    );
    unusable(&["run", "--seeds", "5..5"], &["expected A..B with A < B", "5..5"]);
    unusable(&["run", "--seeds", "9..3"], &["expected A..B with A < B"]);
    unusable(&["run", "--seeds", "many"], &["expected A..B with A < B", "many"]);
    unusable(
        &["run", "--for", "5 parsecs"],
        &["expected a time such as 30s, 5m or 1h"],
    );
    unusable(
        &["run", "--seeds", "0..1", "--for", "1s"],
        &["cannot be used with"],
    );
    unusable(&["run", "--on", "tape"], &["tape", "memory", "file", "loop"]);
    unusable(&["run", "--scheduler", "fair"], &["fair"]);
    unusable(&["run", "--profile", "none-such"], &["none-such"]);
    unusable(&["run", "--such-a-flag"], &["--such-a-flag"]);
    unusable(&["no-such-command"], &["no-such-command"]);
    unusable(&["replay"], &["FILE"]);
    for command in ["replay", "show"] {
        unusable(
            &[command, "no-such.json"],
            &["no-such.json", "No such file or directory"],
        );
    }
    unusable(
        &["shrink", "no-such.json", "-o", "x.json"],
        &["no-such.json", "No such file or directory"],
    );
}

#[test]
fn wrong_files_are_told_with_line_and_column() {
    let dir = dir();
    let good = fs::read_to_string(example()).expect("the example");
    let broken: [(&str, String, &[&str]); 6] = [
        (
            "syntax",
            "{\n  \"version\": 1,,\n}".to_owned(),
            &["syntax.json:2:", "not JSON"],
        ),
        (
            "version",
            good.replace("\"version\": 1", "\"version\": 7"),
            &[
                "version.json:2:",
                "version",
                "this build reads version 1, the file has 7",
            ],
        ),
        (
            "step",
            "{\"version\": 1, \"grain\": 512, \"images\": [],\n \"steps\": [\n  {\"actor\": \"m\"}]}"
                .to_owned(),
            &[
                "step.json:3:3: steps[0]: ",
                "expected exactly one of",
                "\"execute\"",
            ],
        ),
        (
            "request",
            good.replace("\"read\": {\"offset\": 1024", "\"reed\": {\"offset\": 1024"),
            &[
                "request.json:",
                "steps[6].do",
                "unknown variant `reed`",
                "expected",
            ],
        ),
        (
            "grain",
            good.replace("\"grain\": 512", "\"grain\": 500"),
            &["grain.json:", "grain", "power of two"],
        ),
        (
            "array",
            "[1, 2]".to_owned(),
            &["array.json:1:1", "expected an object"],
        ),
    ];
    for (name, text, says) in broken {
        let path = dir.path().join(format!("{name}.json"));
        fs::write(&path, text).expect("writable");
        for command in ["replay", "show"] {
            unusable(&[command, path.to_str().expect("UTF-8")], says);
        }
    }
}

#[test]
fn show_lists_images_and_steps() {
    let output = blkcheck(root(), &["show", "docs/examples/stream.json"]);
    assert_eq!(output.status.code(), Some(0));
    let text = stdout(&output);
    for part in [
        "base.img",
        "mid.img",
        "top.img",
        "block-stream job-id=stream0",
        "write",
        "guest1",
        "drain",
    ] {
        assert!(text.contains(part), "no {part:?} in {text}");
    }
}

#[test]
fn the_schema_accepts_every_scenario_here_and_refuses_others() {
    let output = blkcheck(root(), &["schema"]);
    assert_eq!(output.status.code(), Some(0));
    let schema = object(&output);
    let validator = jsonschema::validator_for(&schema).expect("a JSON Schema");
    let mut files = scenario_files("docs/examples");
    files.extend(scenario_files("tests/scenarios"));
    files.extend(scenario_files("tests/regressions"));
    for path in files {
        let value: Value = serde_json::from_slice(&fs::read(&path).expect("readable")).expect("JSON");
        let errors: Vec<String> = validator
            .iter_errors(&value)
            .map(|e| format!("{}: {e}", e.instance_path()))
            .collect();
        assert!(errors.is_empty(), "{}: {errors:?}", path.display());
        let mut wrong = value.clone();
        wrong["version"] = json!(2);
        assert!(!validator.is_valid(&wrong), "another version");
        let mut wrong = value;
        wrong["steps"][0]["actor"] = json!(5);
        assert!(!validator.is_valid(&wrong), "an actor is a string");
    }
}

#[test]
fn replay_passes_and_has_its_keys() {
    let replay = || blkcheck(root(), &["replay", &example(), "--json"]);
    let output = replay();
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let first = object(&output);
    let keys: Vec<&String> = first.as_object().expect("an object").keys().collect();
    for key in ["verdict", "oracle", "message", "step", "trace_hash"] {
        assert!(keys.iter().any(|k| *k == key), "no {key} in {keys:?}");
    }
    assert_eq!(first["verdict"], "pass");
    assert_eq!(first["oracle"], Value::Null);
    assert!(first["trace_hash"].is_string());
    assert_eq!(first, object(&replay()));
    let plain = blkcheck(root(), &["replay", &example(), "--trace"]);
    let hash = first["trace_hash"].as_str().expect("text");
    assert!(stdout(&plain).contains(hash), "the same run");
    assert!(stdout(&plain).lines().count() > 50, "every record");
}

#[test]
fn a_page_of_a_run() {
    let dir = dir();
    let out = dir.path().join("run.html");
    let output = blkcheck(
        root(),
        &["replay", &example(), "--html", out.to_str().expect("UTF-8")],
    );
    assert_eq!(output.status.code(), Some(0), "{}", stderr(&output));
    let page = fs::read_to_string(&out).expect("written");
    assert!(
        page.contains("<html") && page.contains("stream0"),
        "a page about the run"
    );
    assert!(
        !page.contains("http://") && !page.contains("https://"),
        "self-contained"
    );
}

fn run(arguments: &[&str]) -> (Output, Value) {
    let dir = dir();
    let mut all = vec!["run", "--json"];
    all.extend(arguments);
    let output = blkcheck(dir.path(), &all);
    let value = object(&output);
    let expected = if value["findings"] == json!([]) { 0 } else { 1 };
    assert_eq!(output.status.code(), Some(expected), "{}", stderr(&output));
    (output, value)
}

#[test]
fn a_campaign_has_its_keys_and_types() {
    let (output, summary) = run(&["--seeds", "0..50"]);
    assert_eq!(summary["seeds"], 50);
    for key in ["seeds", "operations", "steps"] {
        assert!(summary[key].as_u64().is_some_and(|n| n > 0), "{key}: {summary}");
    }
    for key in ["seconds", "cpu_seconds"] {
        assert!(
            summary[key].as_f64().is_some_and(|n| n >= 0.0),
            "{key}: {summary}"
        );
    }
    assert!(
        summary["trace_hash"].as_str().is_some_and(|h| h.len() == 16),
        "{summary}"
    );
    let coverage = summary["coverage"].as_object().expect("an object");
    assert!(
        !coverage.is_empty() && coverage.values().all(Value::is_u64),
        "{summary}"
    );
    assert_eq!(summary["findings"], json!([]), "these seeds find nothing");
    assert!(
        stderr(&output).contains("seeds 0..50"),
        "what runs is told before it runs"
    );
}

#[test]
fn the_hash_depends_on_the_seeds_alone() {
    let hash = |arguments: &[&str]| run(arguments).1["trace_hash"].clone();
    let one = hash(&["--seeds", "0..200", "--threads", "1"]);
    assert_eq!(one, hash(&["--seeds", "0..200", "--threads", "1"]));
    assert_eq!(one, hash(&["--seeds", "0..200", "--threads", "2"]));
    assert_ne!(one, hash(&["--seeds", "1..201"]));
    let pct = hash(&["--seeds", "0..200", "--scheduler", "pct:3"]);
    assert_eq!(
        pct,
        hash(&["--seeds", "0..200", "--scheduler", "pct:3", "--threads", "2"])
    );
    assert_ne!(one, pct, "another scheduler, another order");
}

#[test]
fn a_recorded_seed_replays_with_the_same_hash() {
    let dir = dir();
    let mut harness = Harness::new(&Setup::default()).expect("memory is always there");
    for seed in [3, 17, 40, 123] {
        let ran = harness.seed(seed, false).expect("memory is always there");
        let recorded = harness.recorded(seed).expect("memory is always there");
        let path = dir.path().join(format!("{seed}.json"));
        fs::write(&path, serde_json::to_string(&recorded).expect("JSON")).expect("writable");
        let output = blkcheck(dir.path(), &["replay", path.to_str().expect("UTF-8"), "--json"]);
        assert_eq!(output.status.code(), Some(0), "seed {seed}: {}", stdout(&output));
        assert_eq!(
            object(&output)["trace_hash"],
            format!("{:016x}", ran.trace_hash),
            "seed {seed}"
        );
    }
}

#[test]
fn what_passes_cannot_be_shrunk() {
    let dir = dir();
    let out = dir.path().join("small.json");
    unusable(
        &["shrink", &example(), "-o", out.to_str().expect("UTF-8")],
        &["passes", "nothing to shrink"],
    );
    assert!(!out.exists());
}

/// What is expected of regressions that are fixed is in `regressions.rs`; one that fails must say so the whole way.
#[test]
fn the_verdict_and_the_exit_code_agree() {
    for path in scenario_files("tests/regressions") {
        let output = blkcheck(root(), &["replay", path.to_str().expect("UTF-8"), "--json"]);
        let verdict = object(&output);
        let code = if verdict["verdict"] == "pass" { 0 } else { 1 };
        assert_eq!(output.status.code(), Some(code), "{}: {verdict}", path.display());
        assert_eq!(
            verdict["oracle"].is_string(),
            code == 1,
            "{}: {verdict}",
            path.display()
        );
    }
}

/// Starts a campaign, waits until it is under way, sends one signal.
#[expect(clippy::disallowed_methods, reason = "how long a person waits is real time")]
fn interrupted(dir: &Path, signal: &str) -> (Value, Duration, Option<i32>) {
    let mut child = Command::new(BLKCHECK)
        .current_dir(dir)
        .args(["run", "--for", "60s", "--threads", "2", "--json"])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the command starts");
    let mut first = String::new();
    BufReader::new(child.stderr.take().expect("piped"))
        .read_line(&mut first)
        .expect("it says what it runs");
    std::thread::sleep(Duration::from_millis(700));
    let sent = Instant::now();
    let kill = Command::new("kill")
        .args([signal, &child.id().to_string()])
        .status()
        .expect("kill is there");
    assert!(kill.success());
    let mut text = String::new();
    child
        .stdout
        .take()
        .expect("piped")
        .read_to_string(&mut text)
        .expect("UTF-8");
    let status = child.wait().expect("it was started here");
    (
        serde_json::from_str(&text).expect("one JSON object"),
        sent.elapsed(),
        status.code(),
    )
}

#[test]
fn an_interrupt_ends_a_campaign_with_its_summary() {
    // Whoever presses Ctrl-C, and whoever ends a job.
    for signal in ["-INT", "-TERM"] {
        let dir: PathBuf = dir().keep();
        let (summary, took, code) = interrupted(&dir, signal);
        fs::remove_dir_all(&dir).expect("nobody uses it");
        assert!(took < Duration::from_secs(10), "{signal}: it took {took:?}");
        assert_eq!(summary["interrupted"], true);
        assert!(summary["seeds"].as_u64().is_some_and(|n| n > 0), "{summary}");
        assert!(summary["seconds"].as_f64().is_some_and(|s| s < 30.0), "{summary}");
        assert_eq!(
            code,
            Some(if summary["findings"] == json!([]) { 0 } else { 1 }),
            "{summary}"
        );
    }
}
