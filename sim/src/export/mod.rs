//! `export`: a stand-alone script that replays a scenario on a real QEMU, without us.
//!
//! * `expect`: what is right, by the block layer in simulation;
//! * `schedule`: for a scenario whose course is decided by choices, that course on the gated daemon;
//! * `images`, `values`, `text`: parts of the script; `prune`: only the machinery that it uses;
//! * `script`: the script as a whole, over machinery in Python (`*.py` beside this file).
//!
//! Rules: a scenario in which every step is waited for and no choice is made needs no gate: its script uses plain
//! files made by qemu-img, and checks every answer, every read, every node, and every image at the end. Any other script
//! serves the images itself, holds every storage request of the daemon and releases them in the recorded order.
//! Commands are the scenario's, verbatim, but for file names where the script serves the images.
//! Left out, and said so in the script: drained sections (a monitor has no command for them), alignments
//! of storage. Not checked without a gate: events and their order, masks after a command that is accepted.

mod expect;
mod images;
mod prune;
mod schedule;
mod script;
mod text;
mod values;

use std::path::Path;

use crate::compare::known_run;
use crate::compare::lockstep::{Lockstep, Manner};
use crate::compare::peer::Peer;
use crate::finish::exposed;
use crate::oracle::Violation;
use crate::qemu::names::Names;
use crate::scenario::{Action, Disk, Format, Scenario, parse};
use script::{Images, Parts};
use values::Values;

/// Where the script's own server listens, seen from the daemon's directory.
const SOCKET: &str = "s";

/// How the storage under the images is had.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Storage {
    /// Plain files.
    File,
    /// The script serves the images over NBD; requests are carried out as they come.
    Nbd,
    /// The script serves the images and releases each request when its turn has come.
    Gate,
}

/// Why there is no script.
#[derive(Debug, thiserror::Error)]
pub enum ExportError {
    /// The environment lacks something.
    #[error("{0}")]
    Unusable(String),
    /// The block layer itself fails here, so that nobody can say what is right.
    #[error("the block layer itself fails this scenario ({}: {}); what is right cannot be told", .0.oracle.as_str(), .0.message)]
    LayerFails(Violation),
    /// A storage that cannot repeat the scenario.
    #[error("{0}")]
    Request(String),
}

/// What a scenario claims.
#[derive(Clone, Debug, Default)]
struct Claim {
    title: String,
    /// What the daemon does.
    qemu: Option<String>,
    /// What is right.
    right: Option<String>,
}

/// How to export.
#[derive(Clone, Debug, Default)]
pub struct Options<'a> {
    /// None: as the scenario needs it.
    pub storage: Option<Storage>,
    /// The daemon that gives the course of a scenario with choices, and says what it does; none: the one in PATH.
    pub qemu: Option<&'a Path>,
    /// How the script is made, for its header.
    pub command: &'a str,
    /// What to call a scenario without a title.
    pub name: &'a str,
}

/// Whether the course is decided by the scenario alone: whatever the storage does, each step is over before the next.
#[must_use]
pub fn is_sequential(scenario: &Scenario) -> bool {
    scenario.choices.iter().all(|c| *c == 0) && scenario.steps.iter().all(|s| s.wait)
}

/// The script.
///
/// # Errors
/// When there can be none.
pub fn export(scenario: &Scenario, options: &Options<'_>) -> Result<String, ExportError> {
    if scenario.disk.power_cut.is_some() {
        return Err(ExportError::Request(
            "a script cannot cut the power: replay this scenario with --on qemu".to_owned(),
        ));
    }
    let (adapted, notes) = adapted(scenario);
    let storage = options.storage.unwrap_or(if is_sequential(&adapted) {
        Storage::File
    } else {
        Storage::Gate
    });
    if storage == Storage::Gate {
        return gated(scenario, &adapted, notes, options);
    }
    if !is_sequential(&adapted) {
        return Err(ExportError::Request(
            "steps of this scenario overlap, or its choices decide its course: it needs the gate".to_owned(),
        ));
    }
    let expected = expect::expected(&adapted)?;
    let claim = claim(scenario, options);
    let bytes = Values::bytes(&adapted).filter(|_| storage == Storage::File);
    let tools = adapted.images.iter().all(images::by_tools);
    let (images, values) = match (storage, bytes) {
        (Storage::File, Some(values)) if tools => (Images::Tools, values),
        (Storage::File, _) => (Images::Files, Values::stamps(&adapted)),
        _ => (Images::Served, Values::stamps(&adapted)),
    };
    let names = (images == Images::Served).then(names);
    let given_away = exposed(&adapted);
    let (sound, judged) = judged(&adapted, &given_away);
    let steps = script::sequential_steps(&expected, adapted.steps.len(), &values, names.as_ref(), judged);
    let afterwards = script::afterwards(&expected, &adapted, &sound, names.as_ref());
    let parts = Parts {
        claim: &claim,
        command: options.command,
        scenario: &adapted,
        images,
        storage,
        values,
        names,
        notes,
        steps,
        afterwards,
        initial: String::new(),
    };
    Ok(parts.assembled())
}

fn names() -> Names {
    let mut names = Names::default();
    names.reset(SOCKET, 0);
    names
}

/// Images that nobody but the daemon answers for, and whether what guests read can be judged at all: the bytes of a
/// qcow2 file are whatever the daemon makes of them, and `null-co` may give anything.
fn judged<'a>(scenario: &'a Scenario, exposed: &std::collections::BTreeSet<&str>) -> (Vec<&'a str>, bool) {
    let files = scenario.images.iter();
    let sound = files.map(|i| i.file.as_str()).filter(|f| !exposed.contains(f));
    let bare = |i: &crate::scenario::Image| i.format == Format::Qcow2 && exposed.contains(i.file.as_str());
    let anything = scenario.steps.iter().any(|s| match &s.action {
        Action::Command { arguments, .. } => gives_anything(arguments),
        _ => false,
    });
    (sound.collect(), !scenario.images.iter().any(bare) && !anything)
}

/// A `null-co` node that need not read as zeroes is described here.
fn gives_anything(options: &serde_json::Map<String, serde_json::Value>) -> bool {
    let null = options.get("driver").is_some_and(|d| d == "null-co")
        && options.get("read-zeroes").is_none_or(|z| *z != true);
    null || options
        .values()
        .filter_map(serde_json::Value::as_object)
        .any(gives_anything)
}

/// The scenario as a daemon can be put through it, and what is left out.
fn adapted(scenario: &Scenario) -> (Scenario, Vec<String>) {
    let mut scenario = scenario.clone();
    let mut notes = Vec::new();
    scenario.disk = Disk {
        job_parallelism: scenario.disk.job_parallelism,
        // Without a choice none fails.
        faults: scenario.disk.faults,
        ..Disk::default()
    };
    let drained = |a: &Action| matches!(a, Action::DrainBegin { .. } | Action::DrainEnd { .. });
    let before = scenario.steps.len();
    scenario.steps.retain(|s| !drained(&s.action));
    if scenario.steps.len() < before {
        notes.push(format!(
            "Left out: {} steps that begin or end drained sections, for which a monitor has no command; step numbers \
             are those of what is left.",
            before - scenario.steps.len()
        ));
        // They are about a course that had those steps in it.
        if scenario.choices.iter().any(|c| *c != 0) {
            notes.push(
                "The recorded choices are about the scenario with those steps: the course is another."
                    .to_owned(),
            );
        }
    }
    (scenario, notes)
}

/// What the reviewed list, or else the daemon itself, says of this scenario.
fn claim(scenario: &Scenario, options: &Options<'_>) -> Claim {
    let known = known_run::all().find(|defect| {
        let own = parse::parse(defect.id, defect.scenario.as_bytes());
        own.is_ok_and(|own| own == *scenario)
    });
    if let Some(defect) = known {
        return Claim {
            title: capital(defect.title),
            qemu: Some(format!("What qemu-storage-daemon 10.0.2 does: {}.", defect.qemu)),
            right: Some(format!("{}.", defect.right)),
        };
    }
    let title = scenario
        .title
        .as_deref()
        .map_or_else(|| options.name.to_owned(), capital);
    let (qemu, right) = observed(scenario, options.qemu);
    Claim { title, qemu, right }
}

/// What the daemon does where it differs from the model.
fn observed(scenario: &Scenario, program: Option<&Path>) -> (Option<String>, Option<String>) {
    let Ok(peer) = Peer::new(program) else {
        return (None, None);
    };
    let version = peer.version();
    let manner = Manner {
        steer: false,
        flags_always: true,
        read_all: true,
    };
    match Lockstep::new(peer, manner).run(scenario).finding {
        None => (
            Some(format!(
                "qemu-storage-daemon {version} did nothing wrong here when this script was made."
            )),
            None,
        ),
        Some(finding) => (
            Some(format!(
                "What qemu-storage-daemon {version} did at step {} when this script was made: {}",
                finding.step, finding.qemu
            )),
            Some(finding.model),
        ),
    }
}

fn capital(text: &str) -> String {
    let mut chars = text.chars();
    chars.next().map_or_else(String::new, |first| {
        // The name of a command stays as it is.
        if text.split(' ').next().is_some_and(|word| word.contains('-')) {
            text.to_owned()
        } else {
            first.to_uppercase().chain(chars).collect()
        }
    })
}

fn gated(
    scenario: &Scenario,
    adapted: &Scenario,
    notes: Vec<String>,
    options: &Options<'_>,
) -> Result<String, ExportError> {
    let recorded = schedule::record(adapted, options.qemu)?;
    let values = Values::stamps(adapted);
    let names = names();
    let given_away = exposed(adapted);
    let (sound, judged) = judged(adapted, &given_away);
    let claim = Claim {
        title: scenario
            .title
            .as_deref()
            .map_or_else(|| options.name.to_owned(), capital),
        qemu: Some(recorded.verdict()),
        right: None,
    };
    let parts = Parts {
        claim: &claim,
        command: options.command,
        scenario: adapted,
        images: Images::Served,
        storage: Storage::Gate,
        steps: recorded.steps(&values, &names, judged),
        afterwards: recorded.afterwards(&sound),
        initial: recorded.initial(&values, judged),
        values,
        names: Some(names),
        notes,
    };
    Ok(parts.assembled())
}
