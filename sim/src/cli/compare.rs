//! `blkcheck compare`: the model against the shipping qemu-storage-daemon, one step at a time.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};
use std::path::PathBuf;

use super::args::CompareArgs;
use super::{CliError, Found, load, print_out};
use crate::compare::campaign::{self, Reported, Summary, Work};
use crate::compare::known::DEFECTS;
use crate::compare::{Kind, What};
use crate::scenario::Disk;

/// Seeds of a campaign without arguments.
const DEFAULT_SEEDS: std::ops::Range<u64> = 0..1000;

pub(super) fn compare(args: &CompareArgs) -> Result<Found, CliError> {
    if let Some(count) = args.interleavings {
        return super::agree::agree(args, count);
    }
    let work = if !args.files.is_empty() {
        let file = |path: &PathBuf| {
            let (name, scenario) = (path.display().to_string(), load(path)?);
            if let Some(what) = left_out(&scenario.disk) {
                eprintln!("{name}: {what}: compare does without, `replay --on qemu` does not");
            }
            Ok((name, scenario))
        };
        Work::Files(args.files.iter().map(file).collect::<Result<_, CliError>>()?)
    } else if let Some(depth) = args.exhaustive {
        Work::Exhaustive(depth)
    } else {
        Work::Seeds(args.seeds.clone().unwrap_or(DEFAULT_SEEDS), args.profile)
    };
    let stop = super::stop_on_interrupt();
    let total = match &work {
        Work::Seeds(seeds, _) => Some(seeds.end - seeds.start),
        _ => None,
    };
    let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr_with_hz(5));
    let template = "{elapsed_precise} {pos} compared ({per_sec})";
    bar.set_style(ProgressStyle::with_template(template).expect("the template is well formed"));
    let summary = campaign::run(
        &work,
        args.qemu.as_deref(),
        &args.out,
        !args.no_shrink,
        &stop,
        &|done| {
            bar.set_position(done);
        },
    );
    bar.finish_and_clear();
    let summary = summary?;
    super::tell_unsaved(summary.unsaved.as_deref());
    for note in &summary.notes {
        eprintln!("{note}");
    }
    print_out(&if args.json {
        as_json(&summary).to_string()
    } else {
        as_text(&summary)
    });
    Ok(if summary.failed() {
        Found::Something
    } else {
        Found::Nothing
    })
}

/// What storage was to do to a scenario, and will not.
fn left_out(disk: &Disk) -> Option<&'static str> {
    match (disk.faults.is_some(), disk.power_cut.is_some()) {
        (false, false) => None,
        (true, false) => Some("storage fails (`faults`)"),
        (false, true) => Some("the power fails (`power-cut`)"),
        (true, true) => Some("storage and the power fail (`faults`, `power-cut`)"),
    }
}

fn divergence(reported: &Reported) -> Value {
    let finding = &reported.finding;
    json!({
        "scenario": reported.scenario,
        "step": finding.step,
        "what": finding.what.map(What::as_str),
        "model": finding.model,
        "qemu": finding.qemu,
        "file": reported.file,
    })
}

fn failure(reported: &Reported) -> Value {
    let finding = &reported.finding;
    json!({
        "scenario": reported.scenario,
        "step": finding.step,
        "kind": finding.failed.map(Kind::as_str),
        "detail": finding.qemu,
        "file": reported.file,
    })
}

fn as_json(summary: &Summary) -> Value {
    let known = summary.known.iter().map(|(id, reported)| {
        let failed = reported.finding.failed.is_some();
        let mut entry = if failed {
            failure(reported)
        } else {
            divergence(reported)
        };
        entry["id"] = json!(id);
        entry
    });
    let mut all = json!({
        "qemu_version": summary.version,
        "scenarios": summary.scenarios,
        "steps": summary.steps,
        "steered_around": summary.steered,
        "left_out": summary.left_out,
        "seconds": summary.seconds,
        "daemons": summary.daemons,
        "divergences": summary.divergences.iter().map(divergence).collect::<Vec<_>>(),
        "qemu_failures": summary.failures.iter().map(failure).collect::<Vec<_>>(),
        "known": known.collect::<Vec<_>>(),
        "known_counts": summary.known_counts,
        "distinct_refusals": summary.refusals.len(),
        "refusals": summary.refusals,
        "interrupted": summary.interrupted,
    });
    if let Some(walked) = &summary.walked {
        all["sequences"] = json!(walked.sequences());
        all["sequences_carried_out"] = json!(walked.carried_out);
        all["sequences_equal_to_a_shorter_one"] = json!(walked.equal);
        all["sequences_cut_off"] = json!(walked.cut_off);
        all["rebuilt"] = json!(walked.rebuilt);
    }
    all
}

fn as_text(summary: &Summary) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let rate = |n: u64| {
        if summary.seconds > 0.0 {
            n as f64 / summary.seconds
        } else {
            0.0
        }
    };
    let _ = writeln!(out, "qemu-storage-daemon {}", summary.version);
    if let Some(walked) = &summary.walked {
        let _ = writeln!(
            out,
            "sequences    {:>12}   {} carried out, {} equal to a shorter one, {} cut off",
            walked.sequences(),
            walked.carried_out,
            walked.equal,
            walked.cut_off
        );
    }
    let _ = writeln!(
        out,
        "scenarios    {:>12}   {:.0}/s",
        summary.scenarios,
        rate(summary.scenarios)
    );
    let _ = writeln!(
        out,
        "steps        {:>12}   {:.0}/s",
        summary.steps,
        rate(summary.steps)
    );
    let _ = writeln!(
        out,
        "steered      {:>12}   steps that would meet a known defect",
        summary.steered
    );
    let _ = writeln!(
        out,
        "left out     {:>12}   commands of which the model does not know what they do",
        summary.left_out
    );
    let _ = writeln!(
        out,
        "time         {:>11.1}s   {} daemons",
        summary.seconds, summary.daemons
    );
    let _ = writeln!(
        out,
        "refusals     {:>12}   distinct, and the same on both",
        summary.refusals.len()
    );
    let _ = writeln!(out, "divergences  {:>12}", summary.divergences.len());
    let _ = writeln!(out, "failures     {:>12}", summary.failures.len());
    if summary.interrupted {
        let _ = writeln!(out, "interrupted");
    }
    for (id, count) in &summary.known_counts {
        let title = DEFECTS.iter().find(|d| d.id == *id).map_or("", |d| d.title);
        let _ = writeln!(out, "known        {count:>12}   {id}: {title}");
    }
    for reported in summary.divergences.iter().chain(&summary.failures).take(20) {
        let finding = &reported.finding;
        let what = finding
            .what
            .map(What::as_str)
            .or(finding.failed.map(Kind::as_str))
            .unwrap_or_default();
        let _ = writeln!(out, "\n{}, step {}: {what}", reported.scenario, finding.step);
        let _ = writeln!(out, "  model   {}", finding.model);
        let _ = writeln!(out, "  daemon  {}", finding.qemu);
        if let Some(file) = &reported.file {
            let _ = writeln!(out, "  file    {}", file.display());
        }
    }
    out.trim_end().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::Faults;

    #[test]
    fn what_storage_was_to_do_is_told() {
        let with = |faults, power_cut| {
            left_out(&Disk {
                faults,
                power_cut,
                ..Disk::default()
            })
        };
        assert_eq!(with(None, None), None);
        let told = |faults, power_cut, words: &[&str]| {
            let text = with(faults, power_cut).expect("something is left out");
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        };
        told(Some(Faults::default()), None, &["`faults`"]);
        told(None, Some(3), &["`power-cut`"]);
        told(Some(Faults::default()), Some(3), &["`faults`", "`power-cut`"]);
    }
}
