//! The known defects of streams, as they show in gated runs.
//!
//! Rules: as in [`super`].

use blkcheck_impl::event::Event;
use blkcheck_model::NodeId;
use serde_json::Value;

use super::{Found, Given, known, text};
use crate::compare::known::Strayed;
use crate::history::{Outcome, Record, StepId};
use crate::oracle::OracleName;

/// One parent more than expected on the device of a stream that was refused last, because of a writer below. Or the device is a filter,
/// and what is below it was looked at first: the filter may more there, and lets others less.
pub(super) fn keeps_root(found: &Found<'_>) -> bool {
    let node = found.violation.message.split('\'').nth(1).unwrap_or_default();
    let Some(((execute, arguments), Some(refusal))) = found.last_answer() else {
        return false;
    };
    let Some(device) = text(arguments, "device").and_then(|name| found.world.graph.find(name)) else {
        return false;
    };
    let graph = &found.world.graph;
    let name = |id: NodeId| &*graph.node(id).name;
    let at_the_device =
        found.says(&[OracleName::Graph], "has other parents than it should have") && one_backend_more(found);
    let mut filters = std::iter::successors(Some(device), |id| graph.filter_child(*id));
    let below_it = found.says(
        &[OracleName::Permissions],
        "has other permissions than it should have",
    ) && filters.any(|id| {
        let child = graph.filter_child(id);
        child.is_some_and(|child| name(child) == node) && stricter(found, name(id))
    });
    execute == "block-stream"
        && refusal.starts_with("Permission conflict on node")
        && ((at_the_device && name(device) == node) || below_it)
}

/// Nodes cannot be deleted at the end, where nobody looked at the graph before: devices of streams that were refused because of a
/// writer below, and what is below those.
pub(super) fn keeps_root_for_good(found: &Found<'_>) -> bool {
    let graph = &found.world.graph;
    let refused = found.records.iter().filter_map(|r| match r {
        Record::Ended(step, Outcome::Command(Err(refusal))) => {
            let (execute, arguments) = found.command(*step)?;
            let conflict =
                execute == "block-stream" && refusal.desc.starts_with("Permission conflict on node");
            text(arguments, "device").filter(|_| conflict)
        }
        _ => None,
    });
    let devices: Vec<_> = refused.filter_map(|device| graph.find(device)).collect();
    let below = graph.topological(devices.iter().copied());
    // Names that the daemon made up are not those of the model.
    let is_kept = |name: &str| name.starts_with('#') || below.iter().any(|node| graph.name(*node) == name);
    let left = &found.violation.evidence;
    let names = || left.iter().map(|line| line.strip_prefix("node "));
    found.says(&[OracleName::Leaks], "left after shutdown")
        && names().all(|name| name.is_some_and(is_kept))
        && names()
            .flatten()
            .any(|name| devices.iter().any(|device| graph.name(*device) == name))
}

/// The lines of evidence that begin so, without that.
fn evidence<'a>(found: &Found<'a>, with: &str) -> Vec<&'a str> {
    let lines = found.violation.evidence.iter();
    lines.filter_map(|line| line.strip_prefix(with)).collect()
}

fn one_backend_more(found: &Found<'_>) -> bool {
    let count = |with: &str| evidence(found, with).len();
    count("found: a backend") == count("expected: a backend") + 1
}

/// Of a node's parents this one alone is not as expected: it may more, or lets others less.
fn stricter<'a>(found: &Found<'a>, parent: &str) -> bool {
    let only = |these: &str, those: &str| -> Vec<&'a str> {
        let those = evidence(found, those);
        let mut lines = evidence(found, these);
        lines.retain(|line| !those.contains(line));
        lines
    };
    let ([was], [is]) = (
        &only("expected: ", "found: ")[..],
        &only("found: ", "expected: ")[..],
    ) else {
        return false;
    };
    let of_parent = |line: &str| line.starts_with(&format!("node '{parent}' "));
    // Between quotes: the name, what it may, what it lets others.
    let quoted = |line: &'a str| line.split('\'').skip(1).step_by(2).map(|list| list.split(", "));
    let mut lists = quoted(was).zip(quoted(is)).skip(1);
    let (Some((may_was, may)), Some((lets_was, lets))) = (lists.next(), lists.next()) else {
        return false;
    };
    let mut had = may_was.filter(|one| !one.is_empty());
    let mut has = lets.filter(|one| !one.is_empty());
    of_parent(was)
        && of_parent(is)
        && had.all(|one| may.clone().any(|other| other == one))
        && has.all(|one| lets_was.clone().any(|other| other == one))
}

pub(super) fn uncovers_base(found: &Found<'_>) -> bool {
    let oracles = [OracleName::Data, OracleName::Transparency];
    found.says(&oracles, "holds fill")
        && found.says(&oracles, "expected zeroes")
        && known::is_uneven(found.scenario)
        && found.issued("block-stream")
}

/// Zeroes where data were, after such a stream; or such a node is there, and block status calls data zeroes.
pub(super) fn loses_over_raw(found: &Found<'_>) -> bool {
    let oracles = [OracleName::Data, OracleName::Transparency];
    let lost = found.says(&oracles, "holds zeroes")
        && !found.says(&oracles, "expected zeroes")
        && found.causes.over_raw;
    let called_zero = found.says(&[OracleName::Status], "block status says ZERO at")
        && known::has_raw_on_overlay(&found.world);
    lost || called_zero
}

/// A stream fails at its end, to a base whose name is a description; or one finds its base by a file's name, or does not, where
/// nodes have descriptions for names.
pub(super) fn records_description(found: &Found<'_>) -> bool {
    let is_stream = |((execute, _), _): (Given<'_>, Option<&str>)| execute == "block-stream";
    let no_room = found.says(
        &[OracleName::Jobs],
        "ends with 'No space left on device', expected no error",
    ) && found.causes.described;
    let other_base = found.says(&[OracleName::Refusals], "block-stream is ")
        && found.causes.looked
        && found.last_answer().is_some_and(is_stream);
    no_room || other_base
}

/// Graph, header or content of a stream's device, of what it stands on or of who reads it, after the stream succeeded although its last
/// layer had got another backing node.
pub(super) fn undoes_reopen(found: &Found<'_>) -> bool {
    let oracles = [
        OracleName::Graph,
        OracleName::Permissions,
        OracleName::Image,
        OracleName::Data,
        OracleName::Transparency,
    ];
    let told = |strayed: &Strayed| {
        let shown = found.violation.step.and_then(|step| found.asked(step));
        strayed.is_told(&found.world, &found.violation.message)
            || shown.is_some_and(|node| strayed.is_below(&found.world, node))
    };
    oracles.contains(&found.violation.oracle) && found.causes.strayed.iter().any(told)
}

/// A reopen that is not answered gives another node the place of a stream's filter, and the stream goes on meanwhile.
pub(super) fn ends_under_reopen(found: &Found<'_>) -> bool {
    let goes_on = |step: StepId, job: &str| {
        let span = found
            .span(step)
            .and_then(|(from, to)| found.records.get(from..to));
        let mut meanwhile = span.unwrap_or_default().iter();
        meanwhile.any(|r| matches!(r, Record::Layer(Event::JobStatus { id, .. }) if **id == *job))
    };
    let changes = |step: StepId| {
        let Some(("blockdev-reopen", arguments)) =
            found.command(step).filter(|_| found.outcome(step).is_none())
        else {
            return false;
        };
        let entries = arguments.get("options").and_then(Value::as_array);
        let mut entries = entries.into_iter().flatten().filter_map(Value::as_object);
        entries.any(|entry| {
            found.causes.filters.iter().any(|(above, filter, job)| {
                let mut below = ["backing", "file"].iter().filter_map(|key| text(entry, key));
                text(entry, "node-name") == Some(&**above)
                    && below.any(|node| *node != **filter)
                    && goes_on(step, job)
            })
        })
    };
    found.says(
        &[OracleName::Daemon],
        "bdrv_set_file_or_backing_noperm: Assertion `child->bs->quiesce_counter'",
    ) && found.issued_steps().any(changes)
}
