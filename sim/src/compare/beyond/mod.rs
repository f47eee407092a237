//! Beyond the model: scenarios of commands that the model has no word for (commit, mirror, backup, snapshots, resize,
//! reopen, filters of all kinds), judged by what holds whatever a command means.
//!
//! * [`generate`]: scenarios from seeds;
//! * `watch`: one scenario on the daemon;
//! * `follow`: which disk each node shows, command by command;
//! * `cells`: what a disk holds;
//! * `last`: the end, when everything is read, taken down and read again.
//!
//! What must hold:
//! 1. The daemon lives and answers.
//! 2. A guest reads what was written to its disk, whatever jobs, snapshots and filters come and go; a copy (of a backup, of
//!    a mirror that was let go) holds what the disk held at its moment.
//! 3. A refused command changes nothing: nodes, edges, masks, jobs, and everything that `query-named-block-nodes` tells.
//! 4. Everything can be taken down, and then nothing is left.
//! 5. Every closed image is sound, and the chain as its headers tell it holds what the guest saw.
//!
//! Not here: whether a command should have been refused. A disk that two guests reach in ways that are not followed (a
//! writer below an overlay, a target under copy) is not judged.

mod cells;
mod follow;
pub mod generate;
mod last;
mod setup;
mod watch;

use super::lockstep::Shown;
use super::peer::Peer;
use crate::scenario::Scenario;

/// Runs one scenario.
pub(super) fn run(peer: &mut Peer, scenario: &Scenario) -> Shown {
    watch::run(peer, scenario)
}
