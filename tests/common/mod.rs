//! What the whole-run tests share: skipping loudly, running programs, loading and replaying scenario files.
#![allow(dead_code)] // each test program uses a part

use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use blkcheck_sim::harness::{Harness, Replayed, Setup};
use blkcheck_sim::scenario::{Scenario, parse};

/// The command under test.
pub(crate) const BLKCHECK: &str = env!("CARGO_BIN_EXE_blkcheck");

/// The root of the repository.
pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Says that a test did not run and why; fails when everything is required.
pub(crate) fn skip(test: &str, reason: &str) {
    assert_ne!(
        std::env::var("BLKCHECK_REQUIRE_ALL").as_deref(),
        Ok("1"),
        "{test} is required: {reason}"
    );
    eprintln!("SKIPPED {test}: {reason}");
}

/// Whether the daemon that the model is judged by is here. Without any a test is skipped as by [`skip`]; with another
/// version it is skipped loudly, even where nothing else may be.
pub(crate) fn has_daemon(test: &str) -> bool {
    match version("qemu-storage-daemon") {
        Some(found) if found.starts_with("qemu-storage-daemon version 10.0.") => true,
        Some(other) => {
            eprintln!(
                "SKIPPED {test}: needs qemu-storage-daemon 10.0.x, which alone is the judge here; found: {other}"
            );
            false
        }
        None => {
            skip(test, "needs qemu-storage-daemon 10.0.x; there is none");
            false
        }
    }
}

/// The first line of `PROGRAM --version`; `None` where it is not installed.
pub(crate) fn version(program: &str) -> Option<String> {
    let output = Command::new(program).arg("--version").output().ok()?;
    String::from_utf8_lossy(&output.stdout)
        .lines()
        .next()
        .map(str::to_owned)
}

/// Writes a program for `/bin/sh`. Another process does: what is open for writing here would be so in whatever other tests
/// are just starting, and not to be executed.
pub(crate) fn write_script(path: &Path, text: &str) {
    let written = Command::new("/bin/sh")
        .args(["-c", "printf %s \"$2\" >\"$1\" && chmod 700 \"$1\"", "write"])
        .args([path.as_os_str(), text.as_ref()])
        .status();
    assert!(written.expect("a shell").success());
}

/// Runs `blkcheck` in `dir`.
pub(crate) fn blkcheck(dir: &Path, arguments: &[&str]) -> Output {
    Command::new(BLKCHECK)
        .current_dir(dir)
        .args(arguments)
        .output()
        .expect("the command starts")
}

pub(crate) fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).expect("UTF-8")
}

pub(crate) fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).expect("UTF-8")
}

/// Reads a scenario file of the repository.
pub(crate) fn load(path: &Path) -> Scenario {
    let text = std::fs::read(path).expect("the file is there");
    let name = path.strip_prefix(root()).unwrap_or(path).display().to_string();
    parse::parse(&name, &text).unwrap_or_else(|e| panic!("{e}"))
}

/// Replays a scenario on the simulated disk, every oracle watching.
pub(crate) fn replay(scenario: &Scenario) -> Replayed {
    let mut harness = Harness::new(&Setup::default()).expect("memory is always there");
    harness.replay(scenario).expect("memory is always there")
}

/// The `.json` files of a directory of the repository, by name.
pub(crate) fn scenario_files(dir: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(root().join(dir)).expect("the directory is there");
    let mut files: Vec<PathBuf> = entries
        .map(|e| e.expect("readable").path())
        .filter(|p| p.extension().is_some_and(|e| e == "json"))
        .collect();
    files.sort();
    files
}

/// Compares a whole run with its reviewed snapshot in `tests/snapshots`.
pub(crate) fn assert_snapshot(prefix: &str, path: &Path, run: &Replayed) {
    let stem = path.file_stem().expect("a file").to_string_lossy();
    insta::with_settings!({
        snapshot_path => root().join("tests/snapshots"),
        prepend_module_to_snapshot => false,
        omit_expression => true,
    }, {
        insta::assert_snapshot!(format!("{prefix}-{stem}"), blkcheck_sim::report::snapshot(run));
    });
}
