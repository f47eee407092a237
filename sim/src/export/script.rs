//! The script: what it says at its top, its steps, what is looked at afterwards, and the machinery that it needs.

use std::fmt::Write;

use serde_json::{Value, json};

use super::expect::{Expected, Header};
use super::prune::pruned;
use super::text::{WIDTH, json as json_text, quoted, wrapped};
use super::values::Values;
use super::{Claim, Storage, images};
use crate::history::{Outcome, StatusRun, StepId};
use crate::qemu::names::Names;
use crate::scenario::{Action, Format, GuestOp, Range, Scenario};

const DAEMON: &str = include_str!("daemon.py");
const GUEST: &str = include_str!("guest.py");
const RUN: &str = include_str!("run.py");
const MAIN: &str = include_str!("main.py");
const JUDGE: &str = include_str!("judge.py");
const BYTES: &str = include_str!("bytes.py");
const STAMPS: &str = include_str!("stamps.py");
const TOOLS: &str = include_str!("tools.py");
const EMBEDDED: &str = include_str!("embedded.py");
const WRITE: &str = include_str!("write.py");
const PLAIN: &str = include_str!("plain.py");
const SERVER: &str = include_str!("server.py");
const OPEN: &str = include_str!("open.py");
const GATE: &str = include_str!("gate.py");

/// Modules of the standard library, and what in a script needs them.
const MODULES: [(&str, &str); 17] = [
    ("argparse", "argparse."),
    ("base64", "base64."),
    ("ctypes", "ctypes."),
    ("errno", "errno."),
    ("glob", "glob."),
    ("json", "json."),
    ("os", "os."),
    ("select", "select."),
    ("shutil", "shutil."),
    ("signal", "signal."),
    ("socket", "socket."),
    ("struct", "struct."),
    ("subprocess", "subprocess."),
    ("sys", "sys."),
    ("tempfile", "tempfile."),
    ("time", "time."),
    ("zlib", "zlib."),
];

/// How images and their storage are had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Images {
    /// qemu-img and qemu-io make files.
    Tools,
    /// Bytes in the script become files.
    Files,
    /// Bytes in the script are served.
    Served,
}

/// What a script is made of.
pub(super) struct Parts<'a> {
    pub(super) claim: &'a Claim,
    /// How it was made, for its header.
    pub(super) command: &'a str,
    pub(super) scenario: &'a Scenario,
    pub(super) images: Images,
    pub(super) storage: Storage,
    pub(super) values: Values,
    /// File names as the daemon has them, where the images are served.
    pub(super) names: Option<Names>,
    pub(super) notes: Vec<String>,
    pub(super) steps: String,
    pub(super) afterwards: String,
    /// For the gate: what disks hold at the start.
    pub(super) initial: String,
}

impl Parts<'_> {
    /// The whole text.
    pub(super) fn assembled(&self) -> String {
        let own = self.own();
        let machinery: &[&str] = match (self.images, self.storage) {
            (Images::Tools, _) => &[BYTES, TOOLS, PLAIN],
            (Images::Files, _) => &[STAMPS, EMBEDDED, PLAIN],
            (Images::Served, Storage::Gate) => &[STAMPS, EMBEDDED, SERVER, GATE],
            (Images::Served, _) => &[STAMPS, EMBEDDED, SERVER, OPEN],
        };
        let parts = [DAEMON, GUEST, RUN, JUDGE].iter().chain(machinery).chain(&[MAIN]);
        let machinery: String = parts.copied().collect::<Vec<_>>().join("\n\n");
        let machinery = pruned(&own, &machinery);
        let body = format!("{}\n\n{own}\n\n{machinery}", self.constants());
        let imports: Vec<String> = MODULES
            .iter()
            .filter(|(_, used)| body.contains(used))
            .map(|(name, _)| format!("import {name}\n"))
            .collect();
        format!("{}{}{body}", self.head(), imports.concat())
    }

    /// Shebang and docstring.
    fn head(&self) -> String {
        let mut text = String::from("#!/usr/bin/env python3\n\"\"\"");
        let mut say = |paragraph: &str| {
            for line in wrapped(&paragraph.replace('\\', "\\\\").replace("\"\"\"", "'''"), WIDTH) {
                text.push_str(&line);
                text.push('\n');
            }
            text.push('\n');
        };
        let Claim { title, qemu, right } = self.claim;
        say(title);
        if let Some(qemu) = qemu {
            say(qemu);
        }
        if let Some(right) = right {
            say(&format!("Right: {right}"));
        }
        for note in &self.notes {
            say(note);
        }
        say(
            "Needs Python 3.8 or later and qemu-utils (qemu-storage-daemon, qemu-img, qemu-io); Linux; no root. Works in \
             a private temporary directory, which is removed at the end together with the daemon.\nExit code: 0 the \
             daemon does everything right, 1 it does not (reproduced), 2 this machine cannot tell, and stderr says why.",
        );
        let _ = write!(text, "Made by: {}\n\"\"\"\n\n", self.command);
        text
    }

    fn constants(&self) -> String {
        let mut out = String::from(
            "\n# A daemon that gives no answer for so many seconds, working or sleeping, hangs.\nLIMIT = 10\n",
        );
        out.push_str(&self.values.definitions(self.scenario));
        let slow = slow_jobs(self.scenario);
        let jobs: Vec<String> = slow.iter().map(|j| quoted(j)).collect();
        let _ = writeln!(
            out,
            "# Jobs that are limited in speed, so that nobody waits for them.\nSLOW_JOBS = [{}]",
            jobs.join(", ")
        );
        out
    }

    /// Images, steps, what comes afterwards.
    fn own(&self) -> String {
        let mut out = String::new();
        if self.images == Images::Tools {
            let _ = write!(
                out,
                "def make_images():\n    \"\"\"The images, before the daemon has them.\"\"\"\n{}\n\n",
                images::commands(self.scenario, &self.values)
            );
        }
        let _ = write!(
            out,
            "def steps(run):\n    \"\"\"What is done, and what is right.\"\"\"\n{}",
            self.steps
        );
        let _ = write!(
            out,
            "\n\ndef afterwards():\n    \"\"\"What is right for the images, once the daemon is gone.\"\"\"\n{}",
            self.afterwards
        );
        out.push_str(&self.initial);
        if self.images != Images::Tools {
            let _ = write!(
                out,
                "\n\n{}",
                images::embedded(self.scenario, self.names.as_ref())
            );
        }
        if self.images == Images::Files {
            out.push_str(WRITE);
        }
        out
    }
}

/// Jobs that some command limits in speed.
pub(super) fn slow_jobs(scenario: &Scenario) -> Vec<String> {
    let mut jobs = Vec::new();
    for step in &scenario.steps {
        let Action::Command { arguments, .. } = &step.action else {
            continue;
        };
        let is_slow = arguments
            .get("speed")
            .and_then(Value::as_i64)
            .is_some_and(|s| s > 0);
        let job = ["job-id", "device", "id"]
            .iter()
            .find_map(|key| arguments.get(*key).and_then(Value::as_str));
        if let (true, Some(job)) = (is_slow, job)
            && !jobs.iter().any(|j| j == job)
        {
            jobs.push(job.to_owned());
        }
    }
    jobs
}

/// A command as the daemon gets it.
pub(super) fn command(execute: &str, given: &serde_json::Map<String, Value>, names: Option<&Names>) -> Value {
    let mut arguments = given.clone();
    if let Some(names) = names {
        arguments = names.to_daemon(execute, &arguments);
        // Our own guests are shown depths always; the script's where the scenario says so.
        if !given.contains_key("allocation-depth") {
            arguments.shift_remove("allocation-depth");
        }
    }
    if arguments.is_empty() {
        json!({ "execute": execute })
    } else {
        json!({ "execute": execute, "arguments": arguments })
    }
}

/// The steps of a script without a gate. `judged`: what guests read can be held against the expectation.
pub(super) fn sequential_steps(
    expected: &Expected,
    own_steps: usize,
    values: &Values,
    names: Option<&Names>,
    judged: bool,
) -> String {
    let mut out = String::new();
    let scenario = &expected.scenario;
    for &step in &expected.order {
        let at = step.0 as usize;
        if at == own_steps {
            out.push_str("\n    # What the scenario leaves standing comes to its end.\n");
        }
        let outcome = expected.outcomes.get(&step);
        let Some(line) = sequential_step(scenario, step, outcome, values, names, judged) else {
            continue;
        };
        let _ = writeln!(out, "    run.step({at})\n    {line}");
    }
    for job in slow_jobs(scenario) {
        let _ = writeln!(out, "    run.hurry({})", quoted(&job));
    }
    if judged && may_change_content(scenario) && !expected.nodes.is_empty() {
        out.push_str("\n    # Every node reads as it should.\n");
        for node in &expected.nodes {
            let _ = writeln!(
                out,
                "    run.node_holds({}, {:#x}, {})",
                quoted(&node.name),
                node.bytes.len(),
                values.runs(&node.bytes, 0)
            );
        }
    }
    if out.is_empty() {
        out.push_str("    pass\n");
    }
    out
}

/// Whether anything in the scenario could change what a node reads as.
fn may_change_content(scenario: &Scenario) -> bool {
    const HARMLESS: [&str; 7] = [
        "blockdev-add",
        "blockdev-del",
        "block-export-add",
        "block-export-del",
        "object-add",
        "object-del",
        "change-backing-file",
    ];
    scenario.steps.iter().any(|step| match &step.action {
        Action::Command { execute, .. } => {
            !HARMLESS.contains(&execute.as_str()) && !execute.starts_with("query-")
        }
        _ => true,
    })
}

fn sequential_step(
    scenario: &Scenario,
    step: StepId,
    outcome: Option<&Outcome>,
    values: &Values,
    names: Option<&Names>,
    judged: bool,
) -> Option<String> {
    match &scenario.steps[step.0 as usize].action {
        Action::Command { execute, arguments } => {
            let text = json_text(&command(execute, arguments, names), 8);
            Some(match outcome {
                Some(Outcome::Command(Err(refusal))) => {
                    format!("run.refused({text},\n                {})", quoted(&refusal.desc))
                }
                _ => format!("run.accepted({text})"),
            })
        }
        Action::Guest { export, op } => Some(guest(export, *op, step, outcome, values, judged)),
        Action::WaitJob { job } => Some(format!(
            "run.wait_job({}, {})",
            quoted(&job.id),
            quoted(&job.status)
        )),
        Action::Settle { .. } => Some("run.settled()".to_owned()),
        Action::DrainBegin { .. } | Action::DrainEnd { .. } => None,
    }
}

fn guest(
    export: &str,
    op: GuestOp,
    step: StepId,
    outcome: Option<&Outcome>,
    values: &Values,
    judged: bool,
) -> String {
    let export = quoted(export);
    let fails = match outcome {
        Some(Outcome::Done(Err(_)) | Outcome::NoExport | Outcome::Read(Err(_)) | Outcome::Status(Err(_))) => {
            ", fails=True"
        }
        _ => "",
    };
    let place = |r: Range| format!("{export}, {:#x}, {:#x}", r.offset, r.length);
    match op {
        GuestOp::Read(r) => {
            let holds = match outcome {
                Some(Outcome::Read(Ok(bytes))) if judged => values.runs(bytes, r.offset),
                Some(Outcome::Read(Ok(bytes))) => format!("[({:#x}, None)]", bytes.len()),
                _ => "None".to_owned(),
            };
            format!("run.read({}, {holds})", place(r))
        }
        GuestOp::Write(r) => format!("run.write({}, {}{fails})", place(r), values.of_step(step)),
        GuestOp::WriteFua(r) => format!(
            "run.write({}, {}, fua=True{fails})",
            place(r),
            values.of_step(step)
        ),
        GuestOp::WriteZeroes(r) => format!("run.write_zeroes({}{fails})", place(r)),
        GuestOp::WriteZeroesUnmap(r) => format!("run.write_zeroes({}, unmap=True{fails})", place(r)),
        GuestOp::Discard(r) => format!("run.discard({}{fails})", place(r)),
        GuestOp::Flush => format!("run.flush({export}{fails})"),
        GuestOp::BlockStatus(r) => {
            let data = match outcome {
                Some(Outcome::Status(Ok(runs))) => data_ranges(runs, r.offset),
                _ => String::new(),
            };
            format!("run.status({}, [{data}]{fails})", place(r))
        }
    }
}

/// Where block status says data and not zeroes.
fn data_ranges(runs: &[StatusRun], mut at: u64) -> String {
    let mut out = Vec::new();
    for run in runs {
        if run.flags & 3 == 1 {
            out.push(format!("({at:#x}, {:#x})", run.bytes));
        }
        at += run.bytes;
    }
    out.join(", ")
}

/// What is looked at when the daemon is gone. `sound`: images that nobody but the daemon answers for.
pub(super) fn afterwards(
    expected: &Expected,
    scenario: &Scenario,
    sound: &[&str],
    names: Option<&Names>,
) -> String {
    let mut out = String::new();
    let own = |file: &str| sound.contains(&file);
    for image in scenario
        .images
        .iter()
        .filter(|i| i.format == Format::Qcow2 && own(&i.file))
    {
        let file = quoted(&image.file);
        let _ = writeln!(out, "    sound({file})");
        let Some(header) = expected.headers.get(&image.file) else {
            continue;
        };
        let named = image.backing_file.is_some() || header.is_some();
        if let Some((name, format)) = in_words(header, names).filter(|_| named) {
            let _ = writeln!(out, "    header({file}, {name}, {format})");
        }
    }
    for held in expected.images.iter().filter(|h| own(&h.name)) {
        let ranges = untouched(scenario, held);
        if !ranges.is_empty()
            && scenario
                .images
                .iter()
                .any(|i| i.file == held.name && i.format == Format::Qcow2)
        {
            let _ = writeln!(
                out,
                "    unallocated({}, {})",
                quoted(&held.name),
                ranges.join(", ")
            );
        }
    }
    if out.is_empty() {
        out.push_str("    pass\n");
    }
    out
}

/// A header as Python; none where names that somebody made up are in it.
fn in_words(header: &Header, names: Option<&Names>) -> Option<(String, String)> {
    let Some((name, format)) = header else {
        return Some(("None".to_owned(), "None".to_owned()));
    };
    if name.starts_with("json:") {
        return None;
    }
    let name = names.map_or_else(|| name.clone(), |names| names.on_record(name));
    let format = format.as_ref().map_or_else(|| "None".to_owned(), |f| quoted(f));
    Some((quoted(&name), format))
}

/// What an image does not decide and no guest wrote to.
fn untouched(scenario: &Scenario, held: &super::expect::Holds) -> Vec<String> {
    let cluster = scenario
        .images
        .iter()
        .find(|i| i.file == held.name)
        .map_or(512, |i| u64::from(i.cluster_size));
    let mut written: Vec<(u64, u64)> = Vec::new();
    for step in &scenario.steps {
        if let Action::Guest { op, .. } = &step.action
            && let GuestOp::Write(r)
            | GuestOp::WriteFua(r)
            | GuestOp::WriteZeroes(r)
            | GuestOp::WriteZeroesUnmap(r)
            | GuestOp::Discard(r) = op
        {
            let end = r
                .offset
                .saturating_add(r.length)
                .div_ceil(cluster)
                .saturating_mul(cluster);
            written.push((r.offset / cluster * cluster, end));
        }
    }
    written.sort_unstable();
    let mut out = Vec::new();
    let mut at = 0;
    for &(bytes, own) in &held.allocated {
        let (mut from, end) = (at, at + bytes);
        at = end;
        if own {
            continue;
        }
        for &(first, last) in &written {
            if first > from && first < end {
                out.push((from, first - from));
            }
            from = from.max(last.min(end));
        }
        if from < end {
            out.push((from, end - from));
        }
    }
    out.into_iter()
        .filter(|(_, n)| *n > 0)
        .map(|(from, n)| format!("({from:#x}, {n:#x})"))
        .collect()
}
