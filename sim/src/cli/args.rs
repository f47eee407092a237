//! The command line: names, flags and value syntax that other programs rely on.

use std::ops::Range;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};

use crate::generate::Profile;

/// Finds the bugs that lose guest data when guest I/O, drain, graph changes and block jobs interleave.
#[derive(Debug, Parser)]
#[command(name = "blkcheck", version, about, after_help = AFTER_HELP)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub(super) command: Option<Command>,
}

const AFTER_HELP: &str =
    "Without arguments: a campaign over all features that ends by itself after about 30 s.
Exit codes: 0 nothing found, 1 at least one finding, 2 the request or the environment is unusable.";

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Runs seeds: generates a scenario from each, interleaves it, checks it with every oracle.
    Run(RunArgs),
    /// Runs one scenario file exactly as recorded.
    Replay(ReplayArgs),
    /// Writes the smallest scenario found in which the same oracle still fails.
    Shrink(ShrinkArgs),
    /// Prints a scenario as a short listing for people.
    Show(ShowArgs),
    /// Compares the model with the real qemu-storage-daemon 10.x, one step at a time.
    #[cfg(target_os = "linux")]
    Compare(CompareArgs),
    /// Writes a stand-alone script that replays a scenario on a real QEMU.
    #[cfg(target_os = "linux")]
    Export(ExportArgs),
    /// Prints the JSON Schema of scenario files.
    Schema,
}

#[derive(Debug, Args)]
pub(super) struct RunArgs {
    /// Seeds to run, first included, last excluded.
    #[arg(long, value_name = "A..B", value_parser = parse_seeds, conflicts_with = "time")]
    pub(super) seeds: Option<Range<u64>>,
    /// How long to run (30s, 5m, 1h); seeds from 0 on.
    #[arg(long = "for", value_name = "TIME", value_parser = parse_time)]
    pub(super) time: Option<Duration>,
    /// Worker threads; 0: one per processor. Each seed runs on one.
    #[arg(long, default_value_t = 0)]
    pub(super) threads: usize,
    /// What runs the scenarios.
    #[arg(long, value_enum, default_value_t = On::Memory)]
    pub(super) on: On,
    /// The daemon for `--on qemu` instead of the one in PATH.
    #[arg(long, value_name = "PATH")]
    pub(super) qemu: Option<PathBuf>,
    /// How the daemon of `--on qemu` is run.
    #[arg(long, value_enum, default_value_t = Tier::Gated)]
    pub(super) tier: Tier,
    /// How choices are made: `random`, or `pct:D` (priorities with D change points).
    #[arg(long, default_value = "random", value_parser = parse_scheduler)]
    pub(super) scheduler: Scheduler,
    /// Which scenarios are generated.
    #[arg(long, default_value = "mixed", value_parser = parse_profile)]
    pub(super) profile: Profile,
    /// Storage faults to inject; with `--on memory`, and `--on qemu` under the gate.
    #[arg(long, value_enum, default_value_t = Faults::None)]
    pub(super) faults: Faults,
    /// Directory for the scenario files of findings.
    #[arg(long, value_name = "DIR", default_value = "blkcheck-findings")]
    pub(super) out: PathBuf,
    /// One JSON object on stdout, nothing else.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ReplayArgs {
    /// Scenario file.
    pub(super) file: PathBuf,
    /// Print every record of the run.
    #[arg(long)]
    pub(super) trace: bool,
    /// Write a self-contained page of the run.
    #[arg(long, value_name = "OUT")]
    pub(super) html: Option<PathBuf>,
    /// What runs it.
    #[arg(long, value_enum, default_value_t = On::Memory)]
    pub(super) on: On,
    /// The daemon for `--on qemu` instead of the one in PATH.
    #[arg(long, value_name = "PATH")]
    pub(super) qemu: Option<PathBuf>,
    /// How the daemon of `--on qemu` is run.
    #[arg(long, value_enum, default_value_t = Tier::Gated)]
    pub(super) tier: Tier,
    /// One JSON object on stdout, nothing else.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ShrinkArgs {
    /// Scenario file that fails.
    pub(super) file: PathBuf,
    /// Where to write the smaller one.
    #[arg(short, long, value_name = "OUT")]
    pub(super) output: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct ShowArgs {
    /// Scenario file.
    pub(super) file: PathBuf,
}

#[derive(Debug, Args)]
pub(super) struct CompareArgs {
    /// Scenario files.
    #[arg(value_name = "FILE", conflicts_with_all = ["seeds", "exhaustive", "interleavings"])]
    pub(super) files: Vec<PathBuf>,
    /// Seeds whose scenarios to compare, first included, last excluded; without any request 0..1000.
    #[arg(long, value_name = "A..B", value_parser = parse_seeds, conflicts_with = "exhaustive")]
    pub(super) seeds: Option<Range<u64>>,
    /// What the scenarios of seeds are made of: `model` (everything is compared with the model) or `beyond` (every
    /// command of the daemon; judged by what guests see and by what refusals change).
    #[arg(long, default_value = "model", value_parser = parse_compare_profile)]
    pub(super) profile: crate::compare::campaign::Profile,
    /// Every sequence of up to so many commands over a chain of three layers and a filter.
    #[arg(long, value_name = "DEPTH", value_parser = clap::value_parser!(u32).range(1..=4))]
    pub(super) exhaustive: Option<u32>,
    /// So many interleavings of guest I/O, stream and copy-on-read, on the block layer here and on the gated daemon.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..), conflicts_with = "exhaustive")]
    pub(super) interleavings: Option<u64>,
    /// The daemon instead of the one in PATH.
    #[arg(long, value_name = "PATH")]
    pub(super) qemu: Option<PathBuf>,
    /// Saves what is found as it was met.
    #[arg(long)]
    pub(super) no_shrink: bool,
    /// Directory for the scenario files of what is found.
    #[arg(long, value_name = "DIR", default_value = "blkcheck-findings")]
    pub(super) out: PathBuf,
    /// One JSON object on stdout, nothing else.
    #[arg(long)]
    pub(super) json: bool,
}

#[derive(Debug, Args)]
pub(super) struct ExportArgs {
    /// Scenario file.
    pub(super) file: PathBuf,
    /// Where to write the script (python3 standard library and qemu-utils only).
    #[arg(short, long, value_name = "OUT")]
    pub(super) output: PathBuf,
    /// What is under the images.
    #[arg(long, value_enum, default_value_t = ExportStorage::Auto)]
    pub(super) storage: ExportStorage,
    /// The daemon that gives the course of a scenario with choices, instead of the one in PATH.
    #[arg(long, value_name = "PATH")]
    pub(super) qemu: Option<PathBuf>,
}

/// Storage under the images of an exported script.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum ExportStorage {
    /// Plain files where no choice is made, else the gate.
    Auto,
    /// Plain files.
    File,
    /// A server in the script, which carries out requests as they come.
    Nbd,
    /// A server in the script, which releases requests in the recorded order.
    Gate,
}

/// Targets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum On {
    /// The block layer over a simulated disk; deterministic.
    Memory,
    /// The block layer over real files in a private temporary directory.
    File,
    /// The block layer over real loop devices (needs root).
    Loop,
    /// The shipping qemu-storage-daemon 10.x, its storage requests released by the choice stream; deterministic.
    Qemu,
}

/// How the daemon is run.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Tier {
    /// Its storage is held and released by the choice stream; deterministic.
    Gated,
    /// Real files, I/O threads, timers: not deterministic, nothing can be replayed.
    Stress,
}

/// Fault injection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Faults {
    /// None; nothing is drawn.
    None,
    /// Storage requests may fail, with part of their work done or not.
    Errors,
    /// The power fails at some point: what no flush had made durable may be lost, in part or as a whole.
    Crash,
    /// Both.
    All,
}

/// How choices are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheduler {
    /// Every alternative equally likely.
    Random,
    /// Probabilistic concurrency testing with this depth.
    Pct(u32),
}

fn parse_seeds(text: &str) -> Result<Range<u64>, String> {
    let shape = || format!("expected A..B with A < B, as in 0..2000, not `{text}`");
    let (from, to) = text.split_once("..").ok_or_else(shape)?;
    let from = if from.is_empty() {
        0
    } else {
        from.parse().map_err(|_| shape())?
    };
    let to = to.parse().map_err(|_| shape())?;
    if from < to { Ok(from..to) } else { Err(shape()) }
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let shape = || format!("expected a time such as 30s, 5m or 1h, not `{text}`");
    let split = text.find(|c: char| c.is_ascii_alphabetic()).ok_or_else(shape)?;
    let (number, unit) = text.split_at(split);
    let number: f64 = number.parse().map_err(|_| shape())?;
    let seconds = match unit {
        "ms" => number / 1000.0,
        "s" => number,
        "m" => number * 60.0,
        "h" => number * 3600.0,
        _ => return Err(shape()),
    };
    let usable = seconds.is_finite() && seconds > 0.0 && seconds <= 30.0 * 86400.0;
    if usable {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err(shape())
    }
}

fn parse_scheduler(text: &str) -> Result<Scheduler, String> {
    if text == "random" {
        return Ok(Scheduler::Random);
    }
    let depth = text
        .strip_prefix("pct:")
        .and_then(|d| d.parse().ok())
        .filter(|d| (1..=64).contains(d));
    depth
        .map(Scheduler::Pct)
        .ok_or_else(|| format!("expected `random` or `pct:D` with D in 1..=64, not `{text}`"))
}

fn parse_profile(text: &str) -> Result<Profile, String> {
    let names: Vec<&str> = Profile::ALL.iter().map(|p| p.name()).collect();
    Profile::by_name(text).ok_or_else(|| format!("expected one of {}, not `{text}`", names.join(", ")))
}

#[cfg(target_os = "linux")]
fn parse_compare_profile(text: &str) -> Result<crate::compare::campaign::Profile, String> {
    crate::compare::campaign::Profile::by_name(text)
        .ok_or_else(|| format!("expected model or beyond, not `{text}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn seeds_times_and_schedulers_parse_or_say_what_they_expect() {
        assert_eq!(parse_seeds("3..9"), Ok(3..9));
        assert_eq!(parse_seeds("..9"), Ok(0..9));
        for bad in ["9..3", "3..3", "x..3", "3", "3..-1", "3..99999999999999999999"] {
            assert!(parse_seeds(bad).unwrap_err().contains("expected A..B"), "{bad}");
        }
        assert_eq!(parse_time("1.5m"), Ok(Duration::from_secs(90)));
        for bad in ["30", "s", "-1s", "0s", "1d", "NaNs", "infs"] {
            assert!(parse_time(bad).is_err(), "{bad}");
        }
        assert_eq!(parse_scheduler("pct:3"), Ok(Scheduler::Pct(3)));
        for bad in ["pct", "pct:0", "pct:x", "fair"] {
            assert!(parse_scheduler(bad).is_err(), "{bad}");
        }
    }
}
