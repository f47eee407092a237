//! `blkcheck run`: a campaign with a live progress line and a summary.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use serde_json::json;

use super::args::{Faults, On, RunArgs, Scheduler, Tier};
use super::{CliError, Found, print_out, tell};
use crate::campaign::{self, Options, Progress, Span, Summary};
use crate::compare::known_run;
use crate::generate::Profile;
use crate::harness::Setup;

/// How long a campaign without arguments runs.
const DEFAULT_TIME: Duration = Duration::from_secs(30);

pub(super) fn default_campaign() -> Result<Found, CliError> {
    run(&RunArgs {
        seeds: None,
        time: None,
        threads: 0,
        on: On::Memory,
        qemu: None,
        tier: Tier::Gated,
        scheduler: Scheduler::Random,
        profile: Profile::Mixed,
        faults: Faults::None,
        out: "blkcheck-findings".into(),
        json: false,
    })
}

pub(super) fn run(args: &RunArgs) -> Result<Found, CliError> {
    super::check_tier(args.on, args.tier)?;
    match args.faults {
        Faults::None => {}
        _ if args.on == On::Memory || (args.on == On::Qemu && args.tier == Tier::Gated) => {}
        _ => {
            let text = "--faults: only storage of ours fails on demand, or loses power; use --on memory, or --on qemu --tier gated";
            return Err(CliError::Request(text.to_owned()));
        }
    }
    let span = match (&args.seeds, args.time) {
        (Some(seeds), _) => Span::Seeds(seeds.clone()),
        (None, time) => Span::For(time.unwrap_or(DEFAULT_TIME)),
    };
    let threads = match args.threads {
        0 => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        n => n.min(1024),
    };
    let setup = Setup {
        on: args.on,
        scheduler: args.scheduler,
        profile: args.profile,
        faults: args.faults,
        qemu: args.qemu.as_deref().map(super::lasting),
        tier: args.tier,
    };
    let options = Options {
        span,
        threads,
        setup,
        out: args.out.clone(),
    };
    announce(&options);
    let stop = super::stop_on_interrupt();
    let progress = Arc::new(Progress::default());
    let line = ProgressLine::start(&options, &progress);
    let summary = campaign::run(&options, &stop, &progress);
    line.finish();
    let summary = summary?;
    super::tell_unsaved(summary.unsaved.as_deref());
    if args.json {
        print_out(&as_json(&options, &summary).to_string());
    } else {
        print_out(&as_text(&options, &summary));
    }
    Ok(if summary.failed() {
        Found::Something
    } else {
        Found::Nothing
    })
}

/// What is about to run, before it does: a run that hangs or is killed has told its seeds.
fn announce(options: &Options) {
    let span = match &options.span {
        Span::Seeds(seeds) => format!("seeds {}..{}", seeds.start, seeds.end),
        Span::For(time) => format!("seeds from 0 on for {time:?}"),
    };
    let setup = &options.setup;
    tell(&format!(
        "blkcheck {}: {span}, {} threads, on {}, profile {}, scheduler {}, faults {}",
        env!("CARGO_PKG_VERSION"),
        options.threads,
        setup.on_name(),
        setup.profile.name(),
        setup.scheduler_name(),
        setup.faults_name(),
    ));
    if setup.is_stress() {
        tell(crate::report::NOT_DETERMINISTIC);
    }
}

struct ProgressLine {
    bar: ProgressBar,
    done: Arc<AtomicBool>,
    ticker: Option<std::thread::JoinHandle<()>>,
}

impl ProgressLine {
    /// A line on stderr when that is a terminal; nothing otherwise.
    fn start(options: &Options, progress: &Arc<Progress>) -> ProgressLine {
        let total = match &options.span {
            Span::Seeds(seeds) => Some(seeds.end - seeds.start),
            Span::For(_) => None,
        };
        let bar = ProgressBar::with_draw_target(total, ProgressDrawTarget::stderr());
        let template = "{elapsed_precise} {pos} seeds ({per_sec}) {msg}";
        bar.set_style(ProgressStyle::with_template(template).expect("the template is well formed"));
        let done = Arc::new(AtomicBool::new(false));
        let tick = || {
            let (bar, done, progress) = (bar.clone(), Arc::clone(&done), Arc::clone(progress));
            let ticker = std::thread::Builder::new().spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    bar.set_position(progress.seeds.load(Ordering::Relaxed));
                    let operations = progress.operations.load(Ordering::Relaxed);
                    let findings = progress.findings.load(Ordering::Relaxed);
                    bar.set_message(format!("{operations} operations, {findings} findings"));
                    std::thread::park_timeout(Duration::from_millis(200));
                }
            });
            // Without a thread for it, there is no line.
            ticker.ok()
        };
        let ticker = if bar.is_hidden() { None } else { tick() };
        ProgressLine { bar, done, ticker }
    }

    fn finish(self) {
        self.done.store(true, Ordering::Relaxed);
        if let Some(ticker) = self.ticker {
            ticker.thread().unpark();
            let _ = ticker.join();
        }
        self.bar.finish_and_clear();
    }
}

fn as_json(options: &Options, summary: &Summary) -> serde_json::Value {
    let stress = options.setup.is_stress();
    let findings: Vec<_> = summary
        .findings
        .iter()
        .map(|f| {
            json!({
                "seed": f.seed,
                "oracle": f.violation.oracle.as_str(),
                "message": f.violation.message,
                "step": f.violation.step.map(|s| s.0),
                "file": f.file,
                "shrunk_steps": f.shrunk_steps,
            })
        })
        .collect();
    let known: Vec<_> = summary
        .known
        .iter()
        .map(|(id, (_, f))| {
            json!({
                "id": id,
                "title": known_run::title(id),
                "seed": f.seed,
                "oracle": f.violation.oracle.as_str(),
                "message": f.violation.message,
                "step": f.violation.step.map(|s| s.0),
            })
        })
        .collect();
    let counts: serde_json::Map<String, serde_json::Value> = summary
        .known
        .iter()
        .map(|(id, (count, _))| ((*id).to_owned(), json!(count)))
        .collect();
    json!({
        "seeds": summary.seeds,
        "operations": summary.operations,
        "steps": summary.steps,
        "seconds": summary.seconds,
        "cpu_seconds": summary.cpu_seconds,
        "trace_hash": (!stress).then(|| format!("{:016x}", summary.trace_hash)),
        "deterministic": !stress,
        "coverage": summary.coverage,
        "unmet": summary.unmet.iter().map(|m| m.as_str()).collect::<Vec<_>>(),
        "findings": findings,
        "more_findings": summary.more_findings,
        "known": known,
        "known_counts": counts,
        "interrupted": summary.interrupted,
    })
}

fn as_text(options: &Options, summary: &Summary) -> String {
    use std::fmt::Write;
    let mut out = String::new();
    let rate = if summary.seconds > 0.0 {
        summary.seeds as f64 / summary.seconds
    } else {
        0.0
    };
    let _ = writeln!(out, "seeds        {:>12}   {rate:.0}/s", summary.seeds);
    let _ = writeln!(out, "operations   {:>12}", summary.operations);
    let _ = writeln!(out, "steps        {:>12}", summary.steps);
    let _ = writeln!(
        out,
        "time         {:>11.1}s   {:.1} CPU-seconds",
        summary.seconds, summary.cpu_seconds
    );
    if options.setup.is_stress() {
        let _ = writeln!(out, "trace hash   none: {}", crate::report::NOT_DETERMINISTIC);
    } else {
        let _ = writeln!(out, "trace hash   {:016x}", summary.trace_hash);
    }
    let _ = writeln!(
        out,
        "coverage     {:>12}   situations and operation x state pairs met",
        summary.coverage.len()
    );
    if !summary.unmet.is_empty() {
        let names: Vec<&str> = summary.unmet.iter().map(|m| m.as_str()).collect();
        let verdict = if summary.unmet_is_failure {
            "FAILED: never occurred"
        } else {
            "not seen in so few seeds"
        };
        let _ = writeln!(out, "situations   {verdict}: {}", names.join(", "));
    }
    let found = summary.findings.len() as u64 + summary.more_findings;
    let _ = writeln!(out, "findings     {found:>12}");
    for (id, (count, first)) in &summary.known {
        let title = known_run::title(id);
        let _ = writeln!(
            out,
            "known        {count:>12}   {id}: {title} (seed {} first)",
            first.seed
        );
    }
    if summary.interrupted {
        let _ = writeln!(out, "interrupted");
    }
    let told = |f: &&campaign::Finding| f.file.is_some() || summary.unsaved.is_some();
    for finding in summary.findings.iter().filter(told).take(20) {
        out.push('\n');
        out.push_str(&crate::report::finding(finding, options.setup.on_name()));
    }
    out.trim_end().to_owned()
}
