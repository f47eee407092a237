//! The `blkcheck` command. Each subcommand has its file; this one dispatches and maps failures to exit codes.
//!
//! Rules: 0 nothing found, 1 a finding, 2 unusable request or environment (and stderr says why). With `--json`, stdout
//! holds one JSON object and nothing else.

#[cfg(target_os = "linux")]
mod agree;
mod args;
#[cfg(target_os = "linux")]
mod compare;
#[cfg(target_os = "linux")]
mod export;
mod replay;
mod run;
mod shrink;

use std::io::{ErrorKind, Read, Write};
use std::path::Path;
use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use clap::Parser;

pub use args::{Faults, On, Scheduler, Tier};

use crate::scenario::Scenario;

/// Longest scenario file, bytes: whoever names a device gets an answer.
const LONGEST_FILE: u64 = 256 << 20;

/// Why a command could not be carried out: exit code 2.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// Which.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// A scenario file is wrong; the text has file, line and column.
    #[error("{0}")]
    Scenario(String),
    /// The environment lacks something.
    #[error("{0}")]
    Environment(String),
    /// The request makes no sense.
    #[error("{0}")]
    Request(String),
}

/// What a command found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Found {
    Nothing,
    Something,
}

/// Runs the command line.
#[must_use]
pub fn main() -> ExitCode {
    let cli = args::Cli::parse();
    let done = match cli.command {
        None => run::default_campaign(),
        Some(args::Command::Run(a)) => run::run(&a),
        Some(args::Command::Replay(a)) => replay::replay(&a),
        Some(args::Command::Shrink(a)) => shrink::shrink(&a),
        Some(args::Command::Show(a)) => show(&a.file),
        #[cfg(target_os = "linux")]
        Some(args::Command::Compare(a)) => compare::compare(&a),
        #[cfg(target_os = "linux")]
        Some(args::Command::Export(a)) => export::run(&a),
        Some(args::Command::Schema) => {
            print_out(
                &serde_json::to_string_pretty(&crate::scenario::schema::schema()).expect("a schema is JSON"),
            );
            Ok(Found::Nothing)
        }
    };
    let done = done.and_then(|found| match UNTOLD.get() {
        None => Ok(found),
        Some(why) => Err(CliError::Environment(format!("standard output: {why}"))),
    });
    match done {
        Ok(Found::Nothing) => ExitCode::SUCCESS,
        Ok(Found::Something) => ExitCode::from(1),
        Err(error) => {
            tell(&format!("blkcheck: {error}"));
            ExitCode::from(2)
        }
    }
}

/// `--tier stress` is about the daemon.
fn check_tier(on: On, tier: Tier) -> Result<(), CliError> {
    if tier == Tier::Stress && on != On::Qemu {
        let text = "--tier stress is a way to run the daemon; it needs --on qemu";
        return Err(CliError::Request(text.to_owned()));
    }
    Ok(())
}

/// A path of the command line, which lasts as long as the command.
pub(crate) fn lasting(path: &Path) -> &'static Path {
    Box::leak(path.to_owned().into_boxed_path())
}

/// Becomes true with the first Ctrl-C, SIGTERM or SIGHUP, which ask nicely; whoever asks again wants out now.
fn stop_on_interrupt() -> Arc<AtomicBool> {
    let stop = Arc::new(AtomicBool::new(false));
    let handler = Arc::clone(&stop);
    let _ = ctrlc::set_handler(move || {
        if handler.swap(true, Ordering::Relaxed) {
            std::process::exit(130);
        }
    });
    stop
}

/// Why something could not be printed; then nobody may take the exit code for a result.
static UNTOLD: OnceLock<String> = OnceLock::new();

/// Prints to stdout; a closed pipe is not an error of ours.
pub(crate) fn print_out(text: &str) {
    let mut out = std::io::stdout().lock();
    match writeln!(out, "{text}").and_then(|()| out.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => {
            UNTOLD.get_or_init(|| e.to_string());
        }
        _ => {}
    }
}

/// Prints to stderr, if anybody reads it.
pub(crate) fn tell(text: &str) {
    let _ = writeln!(std::io::stderr(), "{text}");
}

/// Findings without a file are findings.
fn tell_unsaved(why: Option<&str>) {
    if let Some(why) = why {
        tell(&format!("blkcheck: findings could not be saved: {why}"));
    }
}

pub(crate) fn load(path: &Path) -> Result<Scenario, CliError> {
    let name = path.display().to_string();
    let unreadable = |source| CliError::File {
        path: name.clone(),
        source,
    };
    let mut text = Vec::new();
    let file = std::fs::File::open(path).map_err(unreadable)?;
    file.take(LONGEST_FILE + 1)
        .read_to_end(&mut text)
        .map_err(unreadable)?;
    if text.len() as u64 > LONGEST_FILE {
        let size = LONGEST_FILE >> 20;
        return Err(CliError::Scenario(format!(
            "{name}: longer than {size} MiB; no scenario is"
        )));
    }
    crate::scenario::parse::parse(&name, &text).map_err(|e| CliError::Scenario(e.to_string()))
}

pub(crate) fn save(path: &Path, scenario: &Scenario) -> Result<(), CliError> {
    let mut text = serde_json::to_string_pretty(scenario).expect("a scenario is JSON");
    text.push('\n');
    std::fs::write(path, text).map_err(|source| CliError::File {
        path: path.display().to_string(),
        source,
    })
}

fn show(path: &Path) -> Result<Found, CliError> {
    let scenario = load(path)?;
    print_out(crate::scenario::listing::listing(&scenario).trim_end());
    Ok(Found::Nothing)
}
