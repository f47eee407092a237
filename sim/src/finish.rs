//! The end of a run: contents for the oracles, the independent look at the closed images, what leaked.

use std::collections::BTreeSet;

use blkcheck_impl::jobs::JobStatus;
use serde_json::Value;

use crate::image::bitmaps;
use crate::image::check::{Problem, Severity, check};
use crate::image::read::{Files, Qcow2, Reader};
use crate::oracle::{FinalContent, Oracle, OracleName, View, Violation};
use crate::scenario::{Action, Format, Scenario, Step};
use crate::target::{ClosedFile, Leftovers, NodeContent};

/// QAPI names of job statuses.
pub(crate) const STATUSES: [(JobStatus, &str); 11] = [
    (JobStatus::Undefined, "undefined"),
    (JobStatus::Created, "created"),
    (JobStatus::Running, "running"),
    (JobStatus::Paused, "paused"),
    (JobStatus::Ready, "ready"),
    (JobStatus::Standby, "standby"),
    (JobStatus::Waiting, "waiting"),
    (JobStatus::Pending, "pending"),
    (JobStatus::Aborting, "aborting"),
    (JobStatus::Concluded, "concluded"),
    (JobStatus::Null, "null"),
];

/// The QAPI name.
pub(crate) fn status_name(status: JobStatus) -> &'static str {
    STATUSES
        .iter()
        .find(|(s, _)| *s == status)
        .map_or("?", |(_, name)| name)
}

pub(crate) fn quiescent(
    nodes: &[NodeContent],
    view: &View<'_>,
    oracles: &mut [Box<dyn Oracle>],
) -> Result<(), Violation> {
    let contents: Vec<FinalContent<'_>> = nodes
        .iter()
        .map(|n| FinalContent {
            name: &n.name,
            bytes: &n.bytes,
            allocated: &n.allocated,
            zeroes: &n.zeroes,
        })
        .collect();
    oracles
        .iter_mut()
        .try_for_each(|oracle| oracle.quiescent(view, &contents))
}

pub(crate) fn leftovers(left: &Leftovers) -> Result<(), Violation> {
    if *left == Leftovers::default() {
        return Ok(());
    }
    let tasks = left.tasks.iter().map(|t| format!("task: {t}"));
    let storage = left.storage.iter().map(|s| format!("storage: {s}"));
    let evidence: Vec<String> = tasks.chain(storage).chain(left.graph.iter().cloned()).collect();
    let message = format!("{} things are left after shutdown", evidence.len());
    Err(Violation {
        oracle: OracleName::Leaks,
        message,
        step: None,
        evidence,
    })
}

struct Closed<'a>(&'a [ClosedFile]);

impl Files for Closed<'_> {
    fn file(&self, name: &str) -> Option<(&[u8], Format)> {
        self.0
            .iter()
            .find(|f| f.name == bare(name))
            .map(|f| (&f.bytes[..], f.format))
    }
}

/// Checks every image, reads it through its chain and shows it to the oracles. Images that the scenario itself gave
/// away for writing as plain bytes, or opened twice for writing, are nobody's responsibility. Where storage failed
/// (`faulted`: places in the scenario) space may have leaked. Returns the others' names and content, for judges outside.
pub(crate) fn closed(
    files: &[ClosedFile],
    faulted: &[u32],
    view: &View<'_>,
    oracles: &mut [Box<dyn Oracle>],
) -> Result<Vec<(String, Vec<u8>)>, Violation> {
    let exposed = exposed(view.scenario);
    let sound = |f: &&ClosedFile| !f.contested && !exposed.contains(f.name.as_str());
    for file in files.iter().filter(sound).filter(|f| f.format == Format::Qcow2) {
        let problems = check(&file.bytes);
        let image = view.scenario.images.iter().position(|i| i.file == file.name);
        let leaks_pass = faulted.iter().any(|f| Some(*f as usize) == image);
        let counts = |p: &&Problem| !leaks_pass || p.severity != Severity::Leak;
        if let Some(worst) = problems.iter().filter(counts).max_by_key(|p| p.severity) {
            let kind = if worst.severity == Severity::Corruption {
                "corrupt"
            } else {
                "leaky"
            };
            let message = format!(
                "image '{}' is {kind} after a clean close: {}",
                file.name, worst.text
            );
            let evidence = problems
                .iter()
                .map(|p| format!("{:?}: {}", p.severity, p.text))
                .collect();
            return Err(Violation {
                oracle: OracleName::Image,
                message,
                step: None,
                evidence,
            });
        }
    }
    for file in files.iter().filter(sound).filter(|f| f.format == Format::Qcow2) {
        let image = Qcow2::parse(&file.bytes).expect("just checked");
        let backing = image
            .backing_file
            .as_deref()
            .map(|name| (name, image.backing_format.as_deref()));
        oracles
            .iter_mut()
            .try_for_each(|oracle| oracle.header(view, &file.name, backing))?;
        let stored = bitmaps::stored(&image).expect("just checked");
        let stored = stored.map_or_else(Vec::new, |directory| directory.bitmaps);
        oracles
            .iter_mut()
            .try_for_each(|oracle| oracle.bitmaps(view, &file.name, &stored))?;
    }
    let all = Closed(files);
    // An image whose backing name leads nowhere has no content of its own to compare.
    let mut reader = Reader::new(&all);
    let contents: Vec<_> = files
        .iter()
        .filter(sound)
        .filter_map(|file| Some((file.name.as_str(), reader.content(&file.name).ok()?.clone())))
        .collect();
    let shown: Vec<FinalContent<'_>> = contents
        .iter()
        .map(|(name, c)| FinalContent {
            name,
            bytes: &c.bytes,
            allocated: &c.allocated,
            zeroes: &[],
        })
        .collect();
    oracles
        .iter_mut()
        .try_for_each(|oracle| oracle.closed(view, &shown))?;
    Ok(contents
        .into_iter()
        .map(|(name, c)| (name.to_owned(), c.bytes))
        .collect())
}

/// Checks what a power cut left of every image, reads it through its chain and shows it to the oracles. Space may have leaked.
pub(crate) fn after_power_cut(
    files: &[ClosedFile],
    view: &View<'_>,
    oracles: &mut [Box<dyn Oracle>],
) -> Result<(), Violation> {
    let exposed = exposed(view.scenario);
    let sound = |f: &&ClosedFile| !f.contested && !exposed.contains(f.name.as_str());
    for file in files.iter().filter(sound).filter(|f| f.format == Format::Qcow2) {
        let problems = check(&file.bytes);
        let mut corruptions = problems.iter().filter(|p| p.severity == Severity::Corruption);
        if let Some(worst) = corruptions.next() {
            return Err(Violation {
                oracle: OracleName::Image,
                message: format!(
                    "image '{}' is corrupt after a power cut: {}",
                    file.name, worst.text
                ),
                step: None,
                evidence: corruptions.map(|p| p.text.clone()).collect(),
            });
        }
    }
    for file in files.iter().filter(sound).filter(|f| f.format == Format::Qcow2) {
        let image = Qcow2::parse(&file.bytes).expect("just checked");
        names_what_it_may(view.scenario, &file.name, image.backing_file.as_deref())?;
        let left = bitmaps::stored(&image).expect("just checked");
        let left = left.map_or_else(Vec::new, |directory| directory.bitmaps);
        oracles
            .iter_mut()
            .try_for_each(|oracle| oracle.bitmaps_left(view, &file.name, &left))?;
    }
    let all = Closed(files);
    let mut reader = Reader::new(&all);
    let contents: Vec<_> = files
        .iter()
        .filter(sound)
        .filter_map(|file| {
            let below = chain_below(view.scenario, files, file)?;
            Some((
                file.name.as_str(),
                reader.content(&file.name).ok()?.clone(),
                below,
            ))
        })
        .collect();
    let shown: Vec<(FinalContent<'_>, Vec<usize>)> = contents
        .iter()
        .map(|(name, c, below)| {
            let content = FinalContent {
                name,
                bytes: &c.bytes,
                allocated: &c.allocated,
                zeroes: &[],
            };
            (content, below.clone())
        })
        .collect();
    oracles
        .iter_mut()
        .try_for_each(|oracle| oracle.after_power_cut(view, &shown))
}

/// A header names a backing file that it was given at some time: neither half a name nor nothing but a place for one.
fn names_what_it_may(scenario: &Scenario, file: &str, backing: Option<&str>) -> Result<(), Violation> {
    let Some(name) = backing else { return Ok(()) };
    let given = |step: &Step| match &step.action {
        Action::Command { arguments, .. } => {
            arguments.get("backing-file").and_then(Value::as_str) == Some(name)
        }
        _ => false,
    };
    // Where nobody says a name it is that of an image, or describes a node.
    if scenario.images.iter().any(|image| image.file == name)
        || name.starts_with("json:")
        || scenario.steps.iter().any(given)
    {
        return Ok(());
    }
    Err(Violation {
        oracle: OracleName::Image,
        message: format!(
            "after a power cut, image '{file}' names a backing file that nobody gave it: {name:?}"
        ),
        step: None,
        evidence: Vec::new(),
    })
}

/// The file that a name leads to.
fn bare(name: &str) -> &str {
    name.trim_start_matches("./")
}

/// The images below a file by the headers, by their places in the scenario; none when one leads nowhere.
fn chain_below(scenario: &Scenario, files: &[ClosedFile], file: &ClosedFile) -> Option<Vec<usize>> {
    let mut below = Vec::new();
    let mut at = file;
    while at.format == Format::Qcow2 {
        let Some(name) = Qcow2::parse(&at.bytes).ok()?.backing_file else {
            break;
        };
        at = files.iter().find(|f| f.name == bare(&name))?;
        below.push(scenario.images.iter().position(|image| image.file == at.name)?);
        if below.len() > files.len() {
            return None;
        }
    }
    Some(below)
}

/// Files of qcow2 images whose protocol node something else than a qcow2 node uses: its bytes are then open to guests.
pub(crate) fn exposed(scenario: &Scenario) -> BTreeSet<&str> {
    let mut exposed = BTreeSet::new();
    // (node-name of a protocol node, its file)
    let mut protocols: Vec<(&str, &str)> = Vec::new();
    for step in &scenario.steps {
        let Action::Command { execute, arguments } = &step.action else {
            continue;
        };
        if execute == "blockdev-add" {
            protocol_nodes(arguments, None, &mut protocols, &mut exposed);
            stands_for(arguments, &mut protocols);
        }
    }
    for step in &scenario.steps {
        let Action::Command { execute, arguments } = &step.action else {
            continue;
        };
        for (name, file) in &protocols {
            let used = match execute.as_str() {
                "blockdev-add" => references(arguments, name),
                "block-export-add" => arguments.get("node-name").and_then(Value::as_str) == Some(name),
                _ => false,
            };
            if used {
                exposed.insert(*file);
            }
        }
    }
    exposed
}

fn protocol_nodes<'a>(
    options: &'a serde_json::Map<String, Value>,
    parent: Option<&str>,
    protocols: &mut Vec<(&'a str, &'a str)>,
    exposed: &mut BTreeSet<&'a str>,
) {
    let text = |key: &str| options.get(key).and_then(Value::as_str);
    if let Some(file) = text("filename") {
        if let Some(name) = text("node-name") {
            protocols.push((name, file));
        }
        if parent.is_some_and(|driver| driver != "qcow2") {
            exposed.insert(file);
        }
    }
    // A throttle filter has no use for its file but that of whoever is above it.
    let driver = text("driver").filter(|driver| *driver != "throttle").or(parent);
    for value in options.values() {
        if let Value::Object(inner) = value {
            protocol_nodes(inner, driver, protocols, exposed);
        }
    }
}

/// Throttle filters over protocol nodes are as good as these.
fn stands_for<'a>(options: &'a serde_json::Map<String, Value>, protocols: &mut Vec<(&'a str, &'a str)>) {
    let text = |key: &str| options.get(key).and_then(Value::as_str);
    if text("driver") == Some("throttle")
        && let Some(name) = text("node-name")
    {
        let below = match options.get("file") {
            Some(Value::String(below)) => protocols
                .iter()
                .find(|(name, _)| name == below)
                .map(|(_, file)| *file),
            Some(Value::Object(below)) => below.get("filename").and_then(Value::as_str),
            _ => None,
        };
        protocols.extend(below.map(|file| (name, file)));
    }
    for inner in options.values().filter_map(Value::as_object) {
        stands_for(inner, protocols);
    }
}

/// Whether a node other than qcow2 is put on `name`, at any depth.
fn references(options: &serde_json::Map<String, Value>, name: &str) -> bool {
    let driver = options.get("driver").and_then(Value::as_str);
    let qcow2 = matches!(driver, Some("qcow2" | "throttle"));
    options.iter().any(|(key, value)| match value {
        Value::String(s) => s == name && key != "node-name" && !(qcow2 && key == "file"),
        Value::Object(inner) => references(inner, name),
        _ => false,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn exposed_in(steps: &str) -> Vec<String> {
        let text = format!(r#"{{"version":1,"grain":64,"images":[],"steps":[{steps}]}}"#);
        let scenario: Scenario = serde_json::from_str(&text).expect("a scenario");
        exposed(&scenario).into_iter().map(str::to_owned).collect()
    }

    #[test]
    fn only_images_that_are_used_as_bytes_are_exempt() {
        let add =
            |arguments: &str| format!(r#"{{"actor":"m","execute":"blockdev-add","arguments":{arguments}}}"#);
        let file = r#"{"driver":"file","node-name":"p","filename":"a"}"#;
        let format = r#"{"driver":"qcow2","node-name":"q","file":"p"}"#;
        assert_eq!(exposed_in(&format!("{},{}", add(file), add(format))), [""; 0]);
        let raw = r#"{"driver":"raw","node-name":"r","file":"p"}"#;
        assert_eq!(exposed_in(&format!("{},{}", add(file), add(raw))), ["a"]);
        let filter = r#"{"driver":"throttle","node-name":"t","throttle-group":"g","file":"p"}"#;
        let format = r#"{"driver":"qcow2","node-name":"q","file":"t"}"#;
        assert_eq!(exposed_in(&[file, filter, format].map(add).join(",")), [""; 0]);
        let raw_above = r#"{"driver":"raw","node-name":"r","file":"t"}"#;
        assert_eq!(exposed_in(&[file, filter, raw_above].map(add).join(",")), ["a"]);
        let inside = r#"{"driver":"qcow2","node-name":"q","file":{"driver":"throttle","throttle-group":"g","file":{"driver":"file","filename":"b"}}}"#;
        assert_eq!(exposed_in(&add(inside)), [""; 0]);
        let inline = r#"{"driver":"raw","node-name":"r","file":{"driver":"file","filename":"b"}}"#;
        assert_eq!(exposed_in(&add(inline)), ["b"]);
        let inline = r#"{"driver":"qcow2","node-name":"r","file":{"driver":"file","filename":"b"}}"#;
        assert_eq!(exposed_in(&add(inline)), [""; 0]);
        let export = r#"{"actor":"m","execute":"block-export-add","arguments":{"type":"nbd","id":"e","node-name":"p"}}"#;
        assert_eq!(exposed_in(&format!("{},{export}", add(file))), ["a"]);
    }

    #[test]
    fn a_header_names_what_it_was_given() {
        let text = r#"{"version":1,"grain":512,"images":[{"file":"base","format":"raw","size":512}],"steps":[
            {"actor":"m","execute":"change-backing-file","arguments":{"backing-file":"././other"}}]}"#;
        let scenario: Scenario = serde_json::from_str(text).expect("a scenario");
        for name in [None, Some("base"), Some("././other"), Some("json:{}")] {
            names_what_it_may(&scenario, "top", name).unwrap();
        }
        for name in ["", "\0\0\0\0", "././oth", "other"] {
            let half = names_what_it_may(&scenario, "top", Some(name)).unwrap_err();
            assert!(half.message.contains("nobody gave it"), "{half:?}");
        }
    }
}
