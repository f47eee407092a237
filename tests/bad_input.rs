//! The command among wrong requests, wrong daemons and places that are of no use: it says so, ends, and leaves nothing
//! behind. Daemons are scripts of `/bin/sh` here; where the real one is needed and missing, a test skips loudly.

mod common;

use std::fs::{self, OpenOptions};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use common::{BLKCHECK, blkcheck, has_daemon, root, stderr, stdout, write_script};
use serde_json::{Value, json};

/// Waits for a command.
const HEARS: &str = "dd bs=65536 count=1 >/dev/null 2>&1";
const GREETING: &str = r#"{"QMP": {"version": {}, "capabilities": []}}"#;

fn dir() -> tempfile::TempDir {
    tempfile::tempdir().expect("a directory")
}

fn example() -> String {
    root().join("docs/examples/stream.json").display().to_string()
}

/// A program that tells the right version, and then does this.
fn daemon(directory: &Path, does: &str) -> PathBuf {
    let path = directory.join("daemon");
    let version = "[ \"$1\" = --version ] && { echo qemu-storage-daemon version 10.0.2; exit; }";
    write_script(&path, &format!("#!/bin/sh\n{version}\n{does}\n"));
    path
}

/// A scenario that the daemon can run, without and with a command more at its beginning.
fn scenario(directory: &Path, first: Option<Value>) -> String {
    let mut steps = vec![json!({"actor": "m", "execute": "blockdev-add", "arguments":
        {"driver": "null-co", "node-name": "n", "size": 4096, "read-zeroes": true}})];
    steps.splice(0..0, first);
    let text = json!({"version": 1, "grain": 512, "images": [], "steps": steps}).to_string();
    let path = directory.join("scenario.json");
    fs::write(&path, text).expect("written");
    path.display().to_string()
}

/// What is left in a directory for temporary files.
fn left(directory: &Path) -> Vec<std::ffi::OsString> {
    let entries = fs::read_dir(directory).expect("readable");
    entries.map(|e| e.expect("readable").file_name()).collect()
}

fn code(output: &Output) -> Option<i32> {
    output.status.code()
}

#[test]
fn numbers_of_seeds_end() {
    let seeds = "18446744073709551614..18446744073709551615";
    let output = blkcheck(dir().path(), &["run", "--seeds", seeds, "--json"]);
    assert_eq!(code(&output), Some(0), "{}", stderr(&output));
    let summary: Value = serde_json::from_str(&stdout(&output)).expect("JSON");
    assert_eq!(summary["seeds"], 1);
}

#[test]
fn what_nobody_can_be_told_is_no_result() {
    let full = || OpenOptions::new().write(true).open("/dev/full").expect("there");
    for arguments in [
        &["schema"][..],
        &["show", &example()],
        &["run", "--seeds", "0..3", "--json"],
    ] {
        let run = Command::new(BLKCHECK).args(arguments).stdout(full()).output();
        let output = run.expect("it starts");
        assert_eq!(code(&output), Some(2), "{arguments:?}");
        assert!(
            stderr(&output).contains("standard output: No space left"),
            "{arguments:?}"
        );
    }
    // Words for people are another matter.
    let dir = dir();
    let mut run = Command::new(BLKCHECK);
    run.current_dir(dir.path())
        .args(["run", "--seeds", "0..3", "--json"])
        .stderr(full());
    let output = run.output().expect("it starts");
    assert_eq!(code(&output), Some(0));
    serde_json::from_str::<Value>(&stdout(&output)).expect("JSON");
}

#[test]
fn a_file_without_end_is_no_scenario() {
    let output = blkcheck(dir().path(), &["show", "/dev/zero"]);
    assert_eq!(code(&output), Some(2));
    assert!(stderr(&output).contains("longer than"), "{}", stderr(&output));
}

#[test]
fn sizes_and_names_that_nothing_can_hold_are_refused() {
    let dir = dir();
    let resize = json!({"actor": "m", "execute": "block_resize", "arguments":
        {"node-name": "n", "size": 1u64 << 62}});
    let output = blkcheck(dir.path(), &["replay", &scenario(dir.path(), Some(resize))]);
    assert_eq!(code(&output), Some(2));
    let said = stderr(&output);
    assert!(
        said.contains("steps[0].arguments.size: 4611686018427387904 bytes"),
        "{said}"
    );
    let name = r#"{"version": 1, "grain": 512, "images": [{"file": "a\u0000b", "format": "raw", "size": 0}], "steps": []}"#;
    let path = dir.path().join("name.json");
    fs::write(&path, name).expect("written");
    let output = blkcheck(dir.path(), &["show", path.to_str().expect("UTF-8")]);
    assert_eq!(code(&output), Some(2));
    assert!(stderr(&output).contains("images[0].file"), "{}", stderr(&output));
    // The layer, the model and the daemon know the same end of numbers.
    let huge = json!({"actor": "m", "execute": "blockdev-add", "arguments":
        {"driver": "null-co", "node-name": "huge", "size": i64::MAX}});
    let output = blkcheck(dir.path(), &["replay", &scenario(dir.path(), Some(huge))]);
    assert_eq!(code(&output), Some(0), "{}", stdout(&output));
}

#[test]
fn a_daemon_is_named_from_where_the_command_was_given() {
    let dir = dir();
    // It is found there, started elsewhere, and says why it does not run.
    daemon(dir.path(), "echo of no use >&2; exit 3");
    let scenario = scenario(dir.path(), None);
    for command in [&["replay", "--on", "qemu"][..], &["compare"]] {
        let output = blkcheck(
            dir.path(),
            &[command, &["--qemu", "./daemon", &scenario]].concat(),
        );
        assert_eq!(code(&output), Some(2), "{command:?}: {}", stdout(&output));
        let said = stderr(&output);
        assert!(
            said.contains("exited with code 3; it said: of no use"),
            "{command:?}: {said}"
        );
    }
}

/// Each of these says what no daemon says: exit code 2 before it has run anything, a finding later, never a panic, and
/// soon.
#[test]
#[expect(clippy::disallowed_methods, reason = "how long a person waits is real time")]
fn daemons_that_talk_nonsense() {
    let dir = dir();
    let place = dir.path().join("tmp");
    fs::create_dir(&place).expect("a directory");
    let scenario = scenario(dir.path(), None);
    let yes = "while :; do echo '{\"return\": {}}' >&0; sleep 0.05; done";
    let cases = [
        ("echo hello >&0; sleep 100", 2),
        ("printf '{\"QMP\": {\"vers' >&0; exit 0", 2),
        ("exec yes >&0", 2),
        ("exec yes '{\"event\": \"E\"}' >&0", 2),
        ("yes | tr -d '\\n' >&0", 2),
        (&*format!("echo '{GREETING}' >&0; {HEARS}; {yes}"), 1),
        (
            &*format!(
                "echo '{GREETING}' >&0; {HEARS}; echo '{{\"return\": {{}}}}' >&0; {HEARS}; printf '{{\"ret' >&0"
            ),
            1,
        ),
    ];
    for (does, expected) in cases {
        let daemon = daemon(dir.path(), does);
        let stress = &["run", "--on", "qemu", "--tier", "stress", "--seeds", "0..1"][..];
        // A finding of the other tier is tried again and again.
        let stress = (expected == 2).then_some(stress);
        for arguments in [&["compare", "--no-shrink"][..]].into_iter().chain(stress) {
            let began = Instant::now();
            let mut run = Command::new(BLKCHECK);
            run.current_dir(dir.path())
                .env("TMPDIR", &place)
                .args(arguments)
                .arg("--qemu")
                .arg(&daemon);
            if arguments[0] == "compare" {
                run.arg(&scenario);
            }
            let output = run.output().expect("it starts");
            let (took, said) = (began.elapsed(), stderr(&output));
            assert!(took < Duration::from_secs(90), "{does}: {took:?}");
            assert!(!said.contains("panicked"), "{does}: {said}");
            assert_eq!(code(&output), Some(expected), "{does}: {arguments:?}: {output:?}");
            assert_eq!(left(&place), [""; 0], "{does}");
        }
    }
}

#[test]
fn findings_are_told_even_where_they_cannot_be_saved() {
    let dir = dir();
    let greets = format!("echo '{GREETING}' >&0; {HEARS}; echo '{{\"return\": {{}}}}' >&0; {HEARS}; exit 1");
    let daemon = daemon(dir.path(), &greets);
    let scenario = scenario(dir.path(), None);
    let arguments = [
        "compare",
        "--json",
        "--out",
        "/dev/null/out",
        "--qemu",
        daemon.to_str().expect("UTF-8"),
        &scenario,
    ];
    let output = blkcheck(dir.path(), &arguments);
    assert_eq!(code(&output), Some(1), "{}", stderr(&output));
    assert!(
        stderr(&output).contains("could not be saved: /dev/null/out"),
        "{}",
        stderr(&output)
    );
    let summary: Value = serde_json::from_str(&stdout(&output)).expect("JSON");
    assert_eq!(summary["qemu_failures"][0]["file"], Value::Null);
}

/// Directories for temporary files with names that mean something to somebody.
#[test]
fn temporary_directories_of_any_name() {
    if !has_daemon("temporary directories of any name") {
        return;
    }
    let dir = dir();
    let long = "l".repeat(120);
    for name in [
        &b"a b"[..],
        b"a,b=c,,d",
        b"'\"$(id)\\",
        long.as_bytes(),
        b"not UTF-8 \xff\xfe",
    ] {
        let place = dir.path().join(std::ffi::OsStr::from_bytes(name));
        fs::create_dir(&place).expect("a directory");
        for (arguments, on) in [
            (&["compare", "--seeds", "0..2"][..], "compare"),
            (&["run", "--seeds", "0..2", "--on", "qemu"], "qemu"),
            (
                &["run", "--seeds", "0..2", "--on", "qemu", "--tier", "stress"],
                "stress",
            ),
            (&["run", "--seeds", "0..2", "--on", "file"], "file"),
        ] {
            let mut run = Command::new(BLKCHECK);
            run.current_dir(dir.path()).env("TMPDIR", &place).args(arguments);
            let output = run.output().expect("it starts");
            let utf8 = std::str::from_utf8(name).is_ok();
            let said = stderr(&output);
            if utf8 || on != "file" {
                // What the other tier finds is not ours to say.
                assert!(
                    code(&output) == Some(0) || on == "stress" && code(&output) == Some(1),
                    "{name:?} {on}: {said}"
                );
            } else {
                assert_eq!(code(&output), Some(2), "{on}: {said}");
                assert!(said.contains("is not UTF-8"), "{said}");
            }
            assert_eq!(left(&place), [""; 0], "{name:?} {on}");
        }
    }
}

/// Whether the process of this number is there and no corpse.
fn lives(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// Whoever kills the command leaves no daemon and no directory behind, be it that the daemon has only just begun: this one kills it.
#[test]
#[expect(clippy::disallowed_methods, reason = "processes take real time")]
fn a_killed_command_leaves_no_daemon() {
    let dir = dir();
    let place = dir.path().join("tmp");
    fs::create_dir(&place).expect("a directory");
    let pids = dir.path().join("pids");
    let kills = format!("echo $$ >> '{}'; kill -9 $PPID; exec sleep 1000", pids.display());
    let daemon = daemon(dir.path(), &kills);
    let scenario = scenario(dir.path(), None);
    for _ in 0..8 {
        let status = Command::new(BLKCHECK)
            .current_dir(dir.path())
            .env("TMPDIR", &place)
            .args(["compare", "--qemu", daemon.to_str().expect("UTF-8"), &scenario])
            .status();
        assert_eq!(status.expect("it starts").code(), None, "it is killed");
    }
    let text = fs::read_to_string(&pids).expect("they told their numbers");
    let daemons: Vec<u32> = text.lines().map(|l| l.parse().expect("a number")).collect();
    assert_eq!(daemons.len(), 8);
    let alive = || daemons.iter().filter(|pid| lives(**pid)).count();
    let began = Instant::now();
    while (alive() > 0 || !left(&place).is_empty()) && began.elapsed() < Duration::from_secs(20) {
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(alive(), 0, "daemons live on");
    assert_eq!(left(&place), [""; 0]);
}

/// What is run where something is too little: everything that opens files for long.
const HUNGRY: [&str; 4] = [
    "run --seeds 0..2 --threads 2 --on file",
    "run --seeds 0..2 --threads 2 --on qemu",
    "run --seeds 0..2 --threads 2 --on qemu --tier stress",
    "compare --seeds 0..2",
];

/// Runs one of them below a shell that gets this ready for it. It ends soon, without a finding, and leaves nothing behind.
fn is_content(ready: &str, arguments: &str) -> Output {
    let dir = dir();
    let place = dir.path().join("tmp");
    fs::create_dir(&place).expect("a directory");
    // By far more than it takes, for a machine that has other things to do.
    let script = format!("{ready}; exec timeout -k 1 300 \"$0\" {arguments} --json");
    let output = Command::new("/bin/sh")
        .current_dir(dir.path())
        .env("TMPDIR", &place)
        .args(["-c", &script, BLKCHECK])
        .output();
    let output = output.expect("a shell");
    let said = stderr(&output);
    match code(&output) {
        Some(0) => {}
        Some(2) => assert!(said.contains("ulimit -n"), "{ready}, {arguments}: {said}"),
        code => panic!("{ready}, {arguments}: {code:?}: {said}{}", stdout(&output)),
    }
    await_end(&place);
    assert_eq!(left(&place), [""; 0], "{ready}, {arguments}");
    output
}

/// Waits until no process is left that was told to use this place.
#[expect(clippy::disallowed_methods, reason = "processes take real time")]
fn await_end(place: &Path) {
    let place = place.as_os_str().as_bytes();
    let uses = |environment: Vec<u8>| environment.windows(place.len()).any(|w| w == place);
    let count = || {
        let processes = fs::read_dir("/proc").expect("readable").flatten();
        let environments = processes.filter_map(|p| fs::read(p.path().join("environ")).ok());
        environments.filter(|e| uses(e.clone())).count()
    };
    let began = Instant::now();
    while count() > 0 {
        assert!(began.elapsed() < Duration::from_secs(20), "processes live on");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Too few files may be open: it says so and ends. Where it may help itself, it does.
#[test]
fn few_files_may_be_open() {
    if !has_daemon("few files may be open") {
        return;
    }
    for arguments in HUNGRY {
        for files in [4, 8, 11, 14, 20, 40] {
            is_content(&format!("ulimit -n {files}"), arguments);
        }
        let others =
            "exec 3</dev/null 4</dev/null 5</dev/null 6</dev/null 7</dev/null 8</dev/null 9</dev/null";
        is_content(&format!("{others}; ulimit -n 16"), arguments);
        let output = is_content("ulimit -S -n 16", arguments);
        assert_eq!(code(&output), Some(0), "{arguments}: {}", stderr(&output));
    }
}

/// The daemon may open fewer files than we may: no finding, however it takes that.
#[test]
fn a_daemon_may_open_few_files() {
    if !has_daemon("a daemon may open few files") {
        return;
    }
    let dir = dir();
    for files in [11, 16, 20] {
        let daemon = daemon(
            dir.path(),
            &format!("ulimit -n {files}; exec qemu-storage-daemon \"$@\""),
        );
        let qemu = format!("--qemu '{}'", daemon.display());
        for arguments in &HUNGRY[1..] {
            is_content("true", &format!("{arguments} {qemu}"));
        }
    }
}
