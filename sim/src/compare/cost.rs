//! What comparing costs, beside what the daemon's own commands cost.
//!
//! Rules: a scenario is compared; then another daemon is told exactly the same again, and its answers are only awaited, so that
//! what is left is the daemon itself and the switches between two processes. Not counted there: laying out images, and waiting for
//! rest. A scenario in which a daemon breaks, or that differs, counts for neither.

use std::ops::Range;
use std::path::Path;
use std::time::Duration;

use super::generate::generate;
use super::lockstep::{Lockstep, Manner, makes_up_names};
use super::peer::{Peer, Said};
use crate::clock::Stopwatch;
use crate::qemu::process::Unavailable;
use crate::scenario::Scenario;

/// What some scenarios took, in real time.
#[derive(Clone, Copy, Debug, Default)]
pub struct Cost {
    /// Scenarios that count.
    pub scenarios: u32,
    /// Their steps.
    pub steps: u64,
    /// Compared.
    pub compared: Duration,
    /// The daemon alone.
    pub daemon: Duration,
}

/// Measures the scenarios of these seeds.
///
/// # Errors
/// No daemon of version 10.
pub fn measure(seeds: Range<u64>, program: Option<&Path>) -> Result<Cost, Unavailable> {
    let manner = Manner {
        steer: true,
        flags_always: false,
        read_all: true,
    };
    let mut lockstep = Lockstep::new(Peer::new(program)?, manner);
    let mut alone = Peer::new(program)?;
    let mut cost = Cost::default();
    for seed in seeds {
        let scenario = generate(seed);
        lockstep.peer.keep_journal();
        let watch = Stopwatch::start();
        let shown = lockstep.run(&scenario);
        let compared = watch.elapsed();
        let journal = lockstep.peer.take_journal();
        if shown.finding.is_some() {
            continue;
        }
        if let Some(daemon) = repeat(&mut alone, &scenario, &journal) {
            cost.scenarios += 1;
            cost.steps += shown.steps;
            cost.compared += compared;
            cost.daemon += daemon;
        }
    }
    Ok(cost)
}

/// How long the daemon took; none when it broke.
fn repeat(peer: &mut Peer, scenario: &Scenario, journal: &[Said]) -> Option<Duration> {
    peer.prepare(scenario, makes_up_names(scenario)).ok()?;
    peer.skim(true);
    let mut taken = Duration::ZERO;
    for said in journal {
        let watch = Stopwatch::start();
        peer.repeat(said).ok()?;
        if !matches!(said, Said::Rest) {
            taken += watch.elapsed();
        }
    }
    peer.skim(false);
    peer.is_clean();
    Some(taken)
}
