//! What a person sees of a run: findings, timelines, snapshots for review, a page.

pub mod fold;
pub mod html;
pub mod timeline;

use std::fmt::Write;

use crate::campaign::Finding;
use crate::harness::{NodeAllocation, Replayed};
use crate::history::Record;
use crate::oracle::Violation;
use crate::scenario::Scenario;
use fold::Fold;

/// What every report of the stress tier says.
pub const NOT_DETERMINISTIC: &str = "stress tier, NOT deterministic: real files, I/O threads and timers; the same seed gives another course each time";

/// Lines of timeline shown with a finding.
const TIMELINE: usize = 40;

/// A finding as a campaign prints it: the sentence, the evidence, the listing, the timeline, the command.
#[must_use]
pub fn finding(finding: &Finding, on: &str) -> String {
    let mut out = String::new();
    let _ = writeln!(
        out,
        "FINDING  seed {}  oracle {}",
        finding.seed,
        finding.violation.oracle.as_str()
    );
    out.push_str(&verdict(&finding.violation));
    let Some(path) = &finding.file else { return out };
    if let Ok(scenario) = crate::cli::load(path) {
        let _ = writeln!(
            out,
            "\n{}",
            crate::scenario::listing::listing(&scenario).trim_end()
        );
        if let Some((ran, records)) = crate::harness::records_of(&scenario) {
            let lines = timeline::lines(&ran, &records);
            let _ = writeln!(out, "\n{}", timeline::render(&lines, true, TIMELINE).trim_end());
        }
    }
    let on = if on == "memory" {
        String::new()
    } else {
        format!(" --on {on}")
    };
    let _ = writeln!(out, "\nreplay: blkcheck replay {}{on} --trace", path.display());
    out
}

/// The sentence and its evidence.
#[must_use]
pub fn verdict(violation: &Violation) -> String {
    let mut out = String::new();
    let step = violation
        .step
        .map_or_else(String::new, |s| format!("step {}: ", s.0));
    let _ = writeln!(out, "{step}{}", violation.message);
    for line in &violation.evidence {
        let _ = writeln!(out, "    {line}");
    }
    out
}

/// The graph when the setup was done and at the end of the records (before the shutdown takes it apart).
#[must_use]
pub fn graphs(scenario: &Scenario, records: &[Record]) -> (Fold, Fold) {
    let setup = scenario
        .steps
        .iter()
        .take_while(|s| s.actor == crate::generate::SETUP)
        .count();
    let mut fold = Fold::default();
    let mut before = None;
    let mut after = None;
    for record in records {
        match record {
            Record::Issued(step) if step.0 as usize >= setup && before.is_none() => {
                before = Some(fold.clone());
            }
            Record::Ended(step, _) if (step.0 as usize) < scenario.steps.len() => {}
            Record::Layer(event) => {
                if matches!(event, blkcheck_impl::event::Event::MainBegin { what: "shutdown" })
                    && after.is_none()
                {
                    after = Some(fold.clone());
                }
                fold.event(event);
            }
            _ => {}
        }
    }
    let after = after.unwrap_or(fold);
    (before.unwrap_or_else(|| after.clone()), after)
}

/// A whole run as a reviewer wants to see it: the story, the graph before and after with permissions, what each node
/// itself decides in the end, the verdict.
#[must_use]
pub fn snapshot(run: &Replayed) -> String {
    let (scenario, records) = (&run.scenario, &run.records);
    let (before, after) = graphs(scenario, records);
    let mut out = String::new();
    let _ = writeln!(out, "{}", crate::scenario::listing::listing(scenario).trim_end());
    let _ = writeln!(out, "\n== graph after setup ==\n{}", before.draw().trim_end());
    let lines = timeline::lines(scenario, records);
    let _ = writeln!(
        out,
        "\n== story ==\n{}",
        timeline::render(&lines, true, usize::MAX).trim_end()
    );
    let _ = writeln!(out, "\n== graph at the end ==\n{}", after.draw().trim_end());
    let _ = writeln!(
        out,
        "\n== allocation at the end ==\n{}",
        allocation(&run.allocation).trim_end()
    );
    let violation = run.violation.as_ref();
    let verdict_text = violation.map_or_else(
        || "pass".to_owned(),
        |v| format!("{}\n{}", v.oracle.as_str(), verdict(v)),
    );
    let _ = writeln!(out, "\n== verdict ==\n{}", verdict_text.trim_end());
    out
}

/// One line per node: its length, then the ranges that it decides itself.
fn allocation(nodes: &[NodeAllocation]) -> String {
    let mut out = String::new();
    for node in nodes {
        let length: u64 = node.runs.iter().map(|(bytes, _)| bytes).sum();
        let _ = write!(out, "{:<10} {length:#x} bytes:", node.node);
        let mut at = 0;
        for &(bytes, allocated) in &node.runs {
            if allocated {
                let _ = write!(out, " [{at:#x}, +{bytes:#x})");
            }
            at += bytes;
        }
        let nothing = if node.runs.iter().any(|r| r.1) {
            ""
        } else {
            " nothing"
        };
        let _ = writeln!(out, "{nothing}");
    }
    out
}
