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

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use clap::Parser;

pub use args::{Faults, On, Scheduler, Tier};

use crate::scenario::Scenario;

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
    match done {
        Ok(Found::Nothing) => ExitCode::SUCCESS,
        Ok(Found::Something) => ExitCode::from(1),
        Err(error) => {
            eprintln!("blkcheck: {error}");
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

/// Becomes true with the first Ctrl-C, which asks nicely; whoever presses it again wants out now.
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

/// Prints to stdout; a closed pipe is not an error of ours.
pub(crate) fn print_out(text: &str) {
    use std::io::Write;
    let _ = writeln!(std::io::stdout(), "{text}");
}

pub(crate) fn load(path: &Path) -> Result<Scenario, CliError> {
    let name = path.display().to_string();
    let text = std::fs::read(path).map_err(|source| CliError::File {
        path: name.clone(),
        source,
    })?;
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
