//! A history as lines that people can read: when, who, what.
//!
//! Rules: one line per record that tells something; names instead of numbers; hex offsets, `+` lengths. Completed
//! requests are joined to the step that started them only where the history says so.

use blkcheck_impl::event::{Event, ReqKind};
use blkcheck_impl::types::RequestId;

use super::fold::Fold;
use crate::history::{Fault, FaultKind, Outcome, Record, StepId};
use crate::scenario::Scenario;

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Position in the history.
    pub at: usize,
    /// Lane: an actor, `job ID`, or `layer`.
    pub lane: String,
    /// What happened.
    pub text: String,
    /// The step it belongs to, where the history says so.
    pub step: Option<StepId>,
    /// A scheduling detail that short timelines leave out.
    pub detail: bool,
}

/// All lines of a history.
#[must_use]
pub fn lines(scenario: &Scenario, records: &[Record]) -> Vec<Line> {
    let mut fold = Fold::default();
    let mut out = Vec::new();
    for (at, record) in records.iter().enumerate() {
        match record {
            Record::Issued(step) => {
                let text = describe_step(scenario, *step);
                out.push(Line {
                    at,
                    lane: actor(scenario, *step),
                    text,
                    step: Some(*step),
                    detail: false,
                });
            }
            Record::Ended(step, outcome) => {
                let text = format!("step {} {}", step.0, describe_outcome(outcome));
                out.push(Line {
                    at,
                    lane: actor(scenario, *step),
                    text,
                    step: Some(*step),
                    detail: false,
                });
            }
            Record::Layer(event) => {
                fold.event(event);
                if let Some((lane, text, detail)) = describe_event(&fold, event) {
                    out.push(Line {
                        at,
                        lane,
                        text,
                        step: None,
                        detail,
                    });
                }
            }
            Record::PowerCut {
                image,
                volatile,
                kept,
                sectors: [there, gone],
                hash,
            } => out.push(Line {
                at,
                lane: "storage".to_owned(),
                text: format!(
                    "POWER FAILS {}: of {volatile} changes that are not durable {kept} survive as a whole, of their {} sectors {there}; \
                     what is left has the hash {hash:016x}",
                    file_name(scenario, *image),
                    there + gone
                ),
                step: None,
                detail: false,
            }),
            Record::Fault(fault) => out.push(Line {
                at,
                lane: "storage".to_owned(),
                text: describe_fault(scenario, fault),
                step: None,
                detail: false,
            }),
        }
    }
    out
}

fn file_name(scenario: &Scenario, image: u32) -> &str {
    let image = scenario.images.get(image as usize);
    image.map_or("?", |image| &image.file)
}

fn describe_fault(scenario: &Scenario, fault: &Fault) -> String {
    let file = file_name(scenario, fault.image);
    let Fault {
        offset, bytes, done, ..
    } = fault;
    let range = format!("{offset:#x}+{bytes:#x} of {file}");
    let what = match fault.kind {
        FaultKind::Read => format!("read {range}"),
        FaultKind::Write => format!("write {range}"),
        FaultKind::WriteZeroes => format!("write-zeroes {range}"),
        FaultKind::Discard => format!("discard {range}"),
        FaultKind::Flush => format!("flush of {file}"),
        FaultKind::Truncate => format!("truncate of {file} to {offset:#x}"),
    };
    let partly = match *done {
        0 => String::new(),
        done if done == *bytes => " (carried out all the same)".to_owned(),
        done => format!(" (the first {done:#x} bytes carried out)"),
    };
    let errno = blkcheck_impl::error::Errno(fault.errno).text();
    format!("FAULT {what}: {errno}{partly}")
}

/// The lines as text: everything, or (`short`) without details and only the last `keep` before the end.
#[must_use]
pub fn render(lines: &[Line], short: bool, keep: usize) -> String {
    use std::fmt::Write;
    let shown: Vec<&Line> = lines.iter().filter(|l| !(short && l.detail)).collect();
    let skipped = if short {
        shown.len().saturating_sub(keep)
    } else {
        0
    };
    let mut out = String::new();
    if skipped > 0 {
        let _ = writeln!(out, "   …     {skipped} earlier lines; replay --trace shows them");
    }
    for line in &shown[skipped..] {
        let _ = writeln!(out, "{:>6}  {:<10} {}", line.at, line.lane, line.text);
    }
    out
}

fn actor(scenario: &Scenario, step: StepId) -> String {
    scenario
        .steps
        .get(step.0 as usize)
        .map_or_else(|| "teardown".to_owned(), |s| s.actor.clone())
}

fn describe_step(scenario: &Scenario, step: StepId) -> String {
    let Some(s) = scenario.steps.get(step.0 as usize) else {
        return format!("step {} (teardown)", step.0);
    };
    let left = if s.wait { "" } else { "  (left in flight)" };
    let what = crate::scenario::listing::action(s);
    format!("step {} {what}{left}", step.0)
}

fn describe_outcome(outcome: &Outcome) -> String {
    let errno = |e: &i32| format!("failed: {}", blkcheck_impl::error::Errno(*e).text());
    match outcome {
        Outcome::Command(Ok(value)) if value.as_object().is_some_and(serde_json::Map::is_empty) => {
            "returned".to_owned()
        }
        Outcome::Command(Ok(value)) => format!("returned {value}"),
        Outcome::Command(Err(refusal)) => format!("refused: {}", refusal.desc),
        Outcome::Read(Ok(bytes)) => format!("read {} bytes", bytes.len()),
        Outcome::Read(Err(e)) | Outcome::Done(Err(e)) | Outcome::Status(Err(e)) => errno(e),
        Outcome::Done(Ok(())) => "done".to_owned(),
        Outcome::Status(Ok(runs)) => format!("status in {} runs", runs.len()),
        Outcome::NoExport => "skipped: no such export".to_owned(),
        Outcome::NoNode => "skipped: no such node".to_owned(),
        Outcome::Passed => "over".to_owned(),
    }
}

type Described = (String, String, bool);

fn describe_event(fold: &Fold, event: &Event) -> Option<Described> {
    let layer = |text: String, detail| Some(("layer".to_owned(), text, detail));
    match event {
        Event::NodeAdded { name, driver, .. } => layer(format!("node {name} ({driver}) added"), true),
        Event::NodeRemoved { node } => layer(format!("node {} removed", fold.node_name(*node)), false),
        Event::EdgeSet {
            parent,
            from: Some(from),
            to: Some(to),
            ..
        } => layer(
            format!(
                "link of {} moved from {} to {}",
                fold.parent_name(*parent),
                fold.node_name(*from),
                fold.node_name(*to)
            ),
            false,
        ),
        Event::EdgeSet {
            parent,
            from: Some(from),
            to: None,
            ..
        } => layer(
            format!(
                "link {} -> {} removed",
                fold.parent_name(*parent),
                fold.node_name(*from)
            ),
            true,
        ),
        Event::EdgeSet { edge, .. } => layer(format!("link {} made", fold.edge_name(*edge)), true),
        Event::EdgePerms { edge, perm, shared } => layer(
            format!(
                "{}: may {}, lets {}",
                fold.edge_name(*edge),
                super::fold::short(*perm),
                super::fold::short(*shared)
            ),
            true,
        ),
        Event::Frozen { edge } => layer(format!("{} frozen", fold.edge_name(*edge)), false),
        Event::Unfrozen { edge } => layer(format!("{} thawed", fold.edge_name(*edge)), false),
        Event::DrainBegin { node } => layer(format!("drain of {} begins", fold.node_name(*node)), true),
        Event::Drained { node } => layer(format!("{} is drained", fold.node_name(*node)), true),
        Event::DrainEnd { node } => layer(format!("drain of {} ends", fold.node_name(*node)), true),
        Event::BackendQueued { backend } => layer(format!("backend {} parks a request", backend.0), false),
        Event::BackendResumed { backend } => layer(format!("backend {} goes on with it", backend.0), true),
        Event::BackendBegin { .. } | Event::BackendEnd { .. } => None,
        Event::JobStatus { id, to, from, .. } => Some((
            format!("job {id}"),
            format!("{from:?} -> {to:?}").to_lowercase(),
            false,
        )),
        Event::JobPauseCount { job, count } => Some((
            format!("job {}", fold.job_name(*job)),
            format!("pause count {count}"),
            true,
        )),
        Event::JobChunk {
            job,
            offset,
            bytes,
            copied,
        } => {
            let how = if *copied { "copied" } else { "skipped" };
            Some((
                format!("job {}", fold.job_name(*job)),
                format!("{how} [{offset:#x}, +{bytes:#x})"),
                false,
            ))
        }
        Event::MainBegin { what } => layer(format!("{what}: has the main lock"), true),
        Event::MainEnd { what } => layer(format!("{what}: done"), true),
        Event::Qmp { name, .. } => layer(format!("event {name}"), true),
        request => describe_request(fold, request),
    }
}

fn describe_request(fold: &Fold, event: &Event) -> Option<Described> {
    let id = |r: &RequestId| format!("r{}", r.0);
    let (text, detail) = match event {
        Event::RequestBegin {
            request,
            node,
            kind,
            offset,
            bytes,
            flags,
            ..
        } => {
            let flags = if flags.is_empty() {
                String::new()
            } else {
                format!("  {flags:?}")
            };
            let place = if *kind == ReqKind::Flush {
                String::new()
            } else {
                format!(" [{offset:#x}, +{bytes:#x})")
            };
            (
                format!(
                    "{} {kind:?} on {}{place}{flags}",
                    id(request),
                    fold.node_name(*node)
                ),
                true,
            )
        }
        Event::RequestWaits { request, on } => (format!("{} waits for {}", id(request), id(on)), false),
        Event::RequestEnd {
            request,
            result: Ok(()),
            ..
        } => (format!("{} done", id(request)), true),
        Event::RequestEnd {
            request,
            result: Err(e),
            ..
        } => (format!("{} failed: {e}", id(request)), false),
        Event::ThrottleQueued { node, group } => (
            format!("{} makes a request wait, group {group}", fold.node_name(*node)),
            false,
        ),
        Event::ThrottleResumed { node, drained } => {
            let why = if *drained { ": drained" } else { "" };
            (
                format!("{} lets a request go on{why}", fold.node_name(*node)),
                false,
            )
        }
        Event::CopyOnRead {
            node,
            offset,
            bytes,
            zero,
        } => {
            let zero = if *zero { " as zeroes" } else { "" };
            (
                format!(
                    "copy-on-read into {} [{offset:#x}, +{bytes:#x}){zero}",
                    fold.node_name(*node)
                ),
                false,
            )
        }
        _ => return None,
    };
    Some(("layer".to_owned(), text, detail))
}
