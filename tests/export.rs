//! Exported scripts: those of the known defects are current and reproduce them on the real daemon, harmless scenarios
//! show nothing, and a script cleans up after itself whatever happens to it.
//!
//! Needs python3 and qemu-storage-daemon 10.0.x with qemu-img and qemu-io; without them each test says loudly that it was
//! skipped. Not so under `BLKCHECK_REQUIRE_ALL=1`.
#![cfg(target_os = "linux")]

mod common;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::{Duration, Instant};

use blkcheck_sim::compare::known_run;
use common::{blkcheck, has_daemon, root, scenario_files, skip, stderr, stdout, version};

fn usable(test: &str) -> bool {
    if version("python3").is_none() {
        skip(test, "needs python3; there is none");
        return false;
    }
    has_daemon(test)
}

/// Runs a script with a temporary directory of its own; nothing may be left in it.
fn python(script: &Path, arguments: &[&str]) -> Output {
    let tmp = tempfile::tempdir().expect("a directory");
    let output = Command::new("python3")
        .arg(script)
        .args(arguments)
        .env("TMPDIR", tmp.path())
        .output()
        .expect("python3 starts");
    let left: Vec<_> = std::fs::read_dir(tmp.path()).expect("readable").collect();
    assert!(left.is_empty(), "{} leaves {left:?}", script.display());
    output
}

fn told(output: &Output) -> String {
    format!("{:?}\n{}{}", output.status.code(), stdout(output), stderr(output))
}

/// Exports `file`, named from the root of the repository, with these flags.
fn export(file: &str, flags: &[&str], to: &Path) -> Output {
    let to = to.to_str().expect("UTF-8");
    blkcheck(root(), &[&["export", file], flags, &["-o", to]].concat())
}

/// What a script says that it was made by, without the program's name.
fn made_by(script: &str) -> Vec<&str> {
    let line = script
        .lines()
        .find_map(|l| l.strip_prefix("Made by: blkcheck export "));
    line.expect("a script says how it was made").split(' ').collect()
}

#[test]
fn every_known_defect_has_its_script() {
    if !usable("every_known_defect_has_its_script") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    for defect in known_run::all() {
        let path = root().join("docs/findings").join(format!("{}.py", defect.id));
        let how = format!(
            "run: blkcheck export docs/findings/{0}.json -o docs/findings/{0}.py",
            defect.id
        );
        let script =
            std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("{}: {e}; {how}", path.display()));
        let name = format!("{}.py", defect.id);
        assert!(
            defect.page.contains(&name),
            "the page of {} does not name {name}",
            defect.id
        );
        // Written by hand, where the block layer cannot say what is right: it has the scenario as it stands.
        if !script.contains("Made by: ") {
            assert!(
                script.contains("written by hand") && defect.page.contains("written by hand"),
                "{name}"
            );
            assert!(script.contains(defect.scenario.trim()), "{name} is not current");
            continue;
        }
        let made_by = made_by(&script);
        assert_eq!(made_by[0], format!("docs/findings/{}.json", defect.id));
        let again = dir.path().join("again.py");
        let output = export(made_by[0], &made_by[1..], &again);
        assert!(output.status.success(), "{}: {}", defect.id, told(&output));
        let again = std::fs::read_to_string(&again).expect("written");
        assert!(script == again, "{} is not current; {how}", path.display());
    }
}

#[test]
fn every_page_is_in_the_index() {
    let findings = root().join("docs/findings");
    let index = std::fs::read_to_string(findings.join("README.md")).expect("readable");
    let files = std::fs::read_dir(&findings).expect("readable");
    let mut pages: Vec<String> = files
        .filter_map(|f| f.expect("readable").file_name().into_string().ok())
        .filter(|name| name.ends_with(".md") && name != "README.md")
        .collect();
    pages.sort_unstable();
    assert!(pages.len() > 20, "{pages:?}");
    for page in &pages {
        let id = page.trim_end_matches(".md");
        assert!(
            index.contains(&format!("[{id}]({page})")),
            "{id} is not in the index"
        );
    }
    let rows = index.lines().filter(|l| l.starts_with("| [")).count();
    assert_eq!(rows, pages.len(), "the index names pages that are not there");
    let readme = std::fs::read_to_string(root().join("README.md")).expect("readable");
    let said = format!("[{} defects](docs/findings/README.md)", pages.len());
    assert!(readme.contains(&said), "README.md does not say {said}");
    for defect in known_run::all() {
        assert!(pages.contains(&format!("{}.md", defect.id)), "{}", defect.id);
    }
}

#[test]
fn every_known_defect_is_reproduced_by_its_script() {
    if !usable("every_known_defect_is_reproduced_by_its_script") {
        return;
    }
    // The last one needs an I/O thread, which no scenario has.
    let ids = known_run::all()
        .map(|d| d.id)
        .chain(["stream-in-iothread-aborts"]);
    for id in ids {
        let path = root().join("docs/findings").join(format!("{id}.py"));
        let output = python(&path, &["--limit", "4"]);
        assert_eq!(output.status.code(), Some(1), "{id}: {}", told(&output));
        assert!(stdout(&output).contains("\nREPRODUCED: "), "{}", told(&output));
    }
}

/// Scenarios of the repository in which the daemon shows a known defect, and what the script then says: over plain files,
/// and with the gate. Empty: nothing.
const DEFECTIVE: &[(&str, &str, &str)] = &[
    // refused-stream-keeps-root
    (
        "tests/scenarios/permission-conflict.json",
        "block-backend '' -root-> top",
        "block-backend '' -root-> top",
    ),
    (
        "tests/regressions/refused-stream-stores-a-bitmap.json",
        "block-backend '' -root-> n3",
        "block-backend '' -root-> n3",
    ),
    // snapshot-over-shorter-overlay
    (
        "tests/regressions/write-past-a-shorter-overlay.json",
        "the daemon died of SIGABRT",
        "the daemon died of SIGABRT",
    ),
    // aborted-snapshot-moves-tables
    (
        "tests/regressions/aborted-snapshot-moves-tables.json",
        "holds the wrong data",
        "holds bytes that nobody wrote",
    ),
    // stream-over-raw-loses-data
    (
        "tests/regressions/stream-over-raw-on-an-overlay.json",
        "holds the wrong data",
        "holds zeroes",
    ),
    // stream-undoes-reopen: the course with the gate ends at the graph, which scripts do not check
    (
        "tests/regressions/another-base-under-a-pending-stream.json",
        "holds the wrong data",
        "",
    ),
    // refused-stream-pins-read-only
    (
        "tests/regressions/refused-change-closes-a-node-below.json",
        "takes ['consistent-read'], shares",
        "",
    ),
    // failed-stream-changes-graph: the reopen after it meets another graph
    (
        "tests/regressions/failed-stream-keeps-inheritance.json",
        "blockdev-reopen has to be accepted",
        "blockdev-reopen has to be accepted",
    ),
    // filter-keeps-length; and what the gate serves cannot grow
    (
        "tests/regressions/resize-keeps-permission-below.json",
        "c0 cannot be read",
        "Cannot grow NBD nodes",
    ),
    // nbd-short-tail-hangs
    ("tests/scenarios/short-backing.json", "", "it hangs"),
    // stream-records-description, which over NBD decides what a base is found by
    (
        "tests/regressions/base-by-a-renamed-file.json",
        "",
        "Cannot change 'file' link",
    ),
];

#[test]
fn harmless_scenarios_show_nothing() {
    if !usable("harmless_scenarios_show_nothing") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let script = dir.path().join("script.py");
    let mut wrong = Vec::new();
    for place in ["docs/examples", "tests/scenarios", "tests/regressions"] {
        for file in scenario_files(place) {
            let name = file
                .strip_prefix(root())
                .expect("inside")
                .to_str()
                .expect("UTF-8");
            let loses_power = std::fs::read_to_string(&file)
                .expect("readable")
                .contains("\"power-cut\"");
            for flags in [&[][..], &["--storage", "gate"]] {
                let output = export(name, flags, &script);
                if loses_power {
                    // Nobody but the simulator and the gate can do that.
                    assert_eq!(output.status.code(), Some(2), "{name}");
                    assert!(told(&output).contains("a script cannot cut the power"), "{name}");
                    continue;
                }
                assert!(output.status.success(), "{name}: {}", told(&output));
                let output = python(&script, &[]);
                let known = DEFECTIVE.iter().find(|(n, ..)| *n == name);
                let says = known.map_or(
                    "",
                    |(_, plain, gated)| if flags.is_empty() { plain } else { gated },
                );
                let code = i32::from(!says.is_empty());
                let right = output.status.code() == Some(code) && stdout(&output).contains(says);
                if !right {
                    wrong.push(format!("{name} {flags:?}: {}", told(&output)));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn a_script_sees_what_is_wrong() {
    if !usable("a_script_sees_what_is_wrong") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("script.py");
    // (scenario, what is put for what, what is then said)
    let cases = [
        (
            "docs/examples/copy-on-read.json",
            "(0x200, 0x13)",
            "(0x200, 0x12)",
            "holds the wrong data",
        ),
        (
            "docs/examples/copy-on-read.json",
            "sound(",
            "unallocated('top.img', (0, 512)); sound(",
            "of its own",
        ),
        (
            "docs/examples/stream.json",
            "0x800, fill(1, 0)",
            "0x800, fill(0, 0)",
            "possible: ",
        ),
        (
            "tests/scenarios/frozen-link.json",
            "run.refused(",
            "run.accepted('{}' and ",
            "has to be accepted",
        ),
    ];
    for (scenario, from, to, says) in cases {
        let output = export(scenario, &[], &path);
        assert!(output.status.success(), "{}", told(&output));
        let script = std::fs::read_to_string(&path).expect("written");
        let mut changed = script.replacen(from, to, 1);
        assert!(script != changed, "{scenario} has no {from}: {script}");
        if to.contains("accepted") {
            // The reason why goes with the refusal.
            changed = changed.replace("def accepted(self, text)", "def accepted(self, text, why=None)");
        }
        std::fs::write(&path, changed).expect("written");
        let output = python(&path, &[]);
        assert_eq!(
            output.status.code(),
            Some(1),
            "{scenario} {from}: {}",
            told(&output)
        );
        assert!(stdout(&output).contains(says), "{scenario}: {}", told(&output));
    }
}

#[test]
fn what_cannot_be_is_said() {
    let dir = tempfile::tempdir().expect("a directory");
    let script = dir.path().join("script.py");
    let gated = "docs/examples/stream.json";
    let output = export(gated, &["--qemu", "/nowhere/daemon"], &script);
    assert_eq!(output.status.code(), Some(2), "{}", told(&output));
    assert!(
        stderr(&output).contains("decided by its choices"),
        "{}",
        stderr(&output)
    );
    let output = export(
        "docs/examples/copy-on-read.json",
        &["--qemu", "/nowhere/daemon"],
        &script,
    );
    assert_eq!(
        output.status.code(),
        Some(0),
        "no choice, no daemon: {}",
        told(&output)
    );
    if version("python3").is_none() {
        return skip("what_cannot_be_is_said", "needs python3; there is none");
    }
    let python3 = Command::new("python3")
        .args(["-c", "import sys; print(sys.executable)"])
        .output()
        .expect("python3 starts");
    let output = Command::new(stdout(&python3).trim())
        .arg(&script)
        .env("PATH", "/nowhere")
        .output()
        .expect("python3 starts");
    assert_eq!(output.status.code(), Some(2), "{}", told(&output));
    assert!(
        stderr(&output).contains("needs qemu-storage-daemon"),
        "{}",
        stderr(&output)
    );
}

#[test]
#[expect(clippy::disallowed_methods, reason = "how long a process takes is real time")]
fn a_script_that_is_stopped_leaves_nothing() {
    if !usable("a_script_that_is_stopped_leaves_nothing") {
        return;
    }
    let tmp = tempfile::tempdir().expect("a directory");
    // This one hangs, so that there is something to stop.
    let mut child = Command::new("python3")
        .arg(root().join("docs/findings/cor-bottom-outside-chain.py"))
        .args(["--limit", "300"])
        .env("TMPDIR", tmp.path())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("python3 starts");
    let wait = |what: &str, done: &dyn Fn() -> bool| {
        let deadline = Instant::now() + Duration::from_secs(60);
        while !done() {
            assert!(Instant::now() < deadline, "{what}");
            std::thread::sleep(Duration::from_millis(20));
        }
    };
    wait("no daemon was started", &|| !processes_in(tmp.path()).is_empty());
    let term = Command::new("kill").arg(child.id().to_string()).status();
    assert!(term.expect("kill starts").success());
    child.wait().expect("it ends");
    wait("a daemon is left", &|| processes_in(tmp.path()).is_empty());
    assert_eq!(std::fs::read_dir(tmp.path()).expect("readable").count(), 0);
}

/// Processes that work in a directory below this one.
fn processes_in(path: &Path) -> Vec<PathBuf> {
    let path = path.canonicalize().expect("there");
    let processes = std::fs::read_dir("/proc").expect("readable").flatten();
    let places = processes.filter_map(|p| std::fs::read_link(p.path().join("cwd")).ok());
    places.filter(|p| p.starts_with(&path)).collect()
}

#[test]
fn a_script_with_its_gate_reads_like_this() {
    if !usable("a_script_with_its_gate_reads_like_this") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let path = dir.path().join("script.py");
    let output = export(
        "tests/regressions/zero-cluster-taken-under-a-reader.json",
        &[],
        &path,
    );
    assert!(output.status.success(), "{}", told(&output));
    let script = std::fs::read_to_string(&path).expect("written");
    // What is below is the same for all, and is reviewed where it is kept.
    let (head, machinery) = script.split_once("\n\n# ---- ").expect("the machinery follows");
    assert!(machinery.contains("class GatedRun") && !machinery.contains("class OpenDaemon"));
    insta::with_settings!({
        snapshot_path => root().join("tests/snapshots"),
        prepend_module_to_snapshot => false,
        omit_expression => true,
    }, {
        insta::assert_snapshot!("export-gated", head);
    });
}
