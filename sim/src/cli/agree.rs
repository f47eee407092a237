//! `blkcheck compare --interleavings`: the block layer here and the gated daemon come to the same end.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::{Value, json};

use super::args::CompareArgs;
use super::{CliError, Found, print_out};
use crate::agree::{self, Summary};

pub(super) fn agree(args: &CompareArgs, count: u64) -> Result<Found, CliError> {
    let stop = super::stop_on_interrupt();
    let bar = ProgressBar::with_draw_target(Some(count), ProgressDrawTarget::stderr_with_hz(5));
    let template = "{elapsed_precise} {pos} of {len} interleavings ({per_sec})";
    bar.set_style(ProgressStyle::with_template(template).expect("the template is well formed"));
    let progress = |done| bar.set_position(done);
    let seeds = args.seeds.as_ref();
    let summary = agree::run(count, seeds, args.qemu.as_deref(), &args.out, &stop, &progress);
    bar.finish_and_clear();
    let summary = summary?;
    super::tell_unsaved(summary.unsaved.as_deref());
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

fn found(found: &agree::Found) -> Value {
    json!({
        "scenario": format!("seed {}, interleaving {}", found.seed, found.interleaving),
        "step": found.difference.step,
        "what": found.difference.what,
        "impl": found.difference.ours,
        "qemu": found.difference.qemu,
        "file": found.file,
    })
}

fn as_json(summary: &Summary) -> Value {
    let failure = |f: &agree::Found| {
        let mut failure = found(f);
        failure["kind"] = json!("crash");
        failure["detail"] = json!(f.difference.qemu);
        failure
    };
    json!({
        "qemu_version": summary.version,
        "scenarios": summary.scenarios,
        "interleavings": summary.interleavings,
        "distinct_interleavings": summary.distinct_qemu,
        "distinct_interleavings_impl": summary.distinct_impl,
        "steps": summary.steps,
        "answers_compared": summary.answers,
        "bytes_compared": summary.bytes,
        "seconds": summary.seconds,
        "divergences": summary.divergences.iter().map(found).collect::<Vec<_>>(),
        "qemu_failures": summary.failures.iter().map(failure).collect::<Vec<_>>(),
        "known": [],
        "interrupted": summary.interrupted,
    })
}

fn as_text(summary: &Summary) -> String {
    let mut lines = vec![
        format!("qemu-storage-daemon {} and the block layer here", summary.version),
        format!("scenarios      {:>12}", summary.scenarios),
        format!(
            "interleavings  {:>12}   distinct: {} on the daemon, {} on the layer",
            summary.interleavings, summary.distinct_qemu, summary.distinct_impl
        ),
        format!("gated steps    {:>12}", summary.steps),
        format!("answers        {:>12}   compared", summary.answers),
        format!("bytes          {:>12}   compared", summary.bytes),
        format!("time           {:>11.1}s", summary.seconds),
        format!("divergences    {:>12}", summary.divergences.len()),
        format!("failures       {:>12}", summary.failures.len()),
    ];
    if summary.interrupted {
        lines.push("interrupted".to_owned());
    }
    for f in summary.divergences.iter().chain(&summary.failures).take(20) {
        let step = f
            .difference
            .step
            .map_or_else(String::new, |s| format!(", step {s}"));
        lines.push(format!(
            "\nseed {}, interleaving {}{step}: {}\n  here    {}\n  daemon  {}",
            f.seed, f.interleaving, f.difference.what, f.difference.ours, f.difference.qemu
        ));
        lines.extend(f.file.iter().map(|file| format!("  file    {}", file.display())));
    }
    lines.join("\n")
}
