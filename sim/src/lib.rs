//! The simulator: scenarios, the choice stream, the deterministic executor, targets, oracles, shrinker, reports and
//! the `blkcheck` command.
//!
//! One seed decides everything: a run is a pure function of (scenario, choices).

#[cfg(target_os = "linux")]
pub mod agree;
pub mod campaign;
pub mod choice;
pub mod cli;
pub mod clock;
#[cfg(target_os = "linux")]
pub mod compare;
pub mod disk;
pub mod env;
pub mod exec;
#[cfg(target_os = "linux")]
pub mod export;
mod finish;
pub mod follow;
pub mod fuzzing;
pub mod generate;
pub mod guide;
pub mod harness;
pub mod history;
pub mod image;
#[cfg(target_os = "linux")]
pub mod lack;
pub mod marks;
pub mod oracle;
pub mod owner;
pub mod panics;
#[cfg(target_os = "linux")]
pub mod qemu;
pub mod report;
pub mod rng;
pub mod run;
pub mod scenario;
pub mod shrink;
pub mod stamp;
pub mod target;
pub mod trace;
