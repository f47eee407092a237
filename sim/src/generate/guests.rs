//! Guest requests: where they go and what they ask.

use super::Swarm;
use super::chain::{Chain, NamedExport};
use crate::rng::Rng;
use crate::scenario::{Action, GuestOp, Range, Step};

/// Longest request, grains: what the data oracle pays for.
const MOST_GRAINS: u64 = 256;

pub(super) struct Guests {
    /// A place that many requests aim at, in sixteenths of an export.
    hot_sixteenth: u32,
    in_flight: u32,
}

impl Guests {
    pub(super) fn new(rng: &mut Rng, _swarm: &Swarm, _chain: &Chain) -> Guests {
        Guests {
            hot_sixteenth: rng.below(16),
            in_flight: 0,
        }
    }

    pub(super) fn next(&mut self, rng: &mut Rng, swarm: &Swarm, chain: &Chain) -> Step {
        let actor = format!("guest{}", rng.below(swarm.guests));
        if self.in_flight > 6 {
            self.in_flight = 0;
            return Step {
                actor,
                action: Action::Settle {
                    settle: serde_json::Map::new(),
                },
                wait: true,
            };
        }
        let export = self.export(rng, chain);
        let op = self.op(rng, swarm, export);
        let wait = rng.below(8) >= swarm.in_flight_eighths;
        self.in_flight += u32::from(!wait);
        Step {
            actor,
            action: Action::Guest {
                export: export.name.clone(),
                op,
            },
            wait,
        }
    }

    /// Mostly the topmost one.
    fn export<'a>(&self, rng: &mut Rng, chain: &'a Chain) -> &'a NamedExport {
        let last = chain.exports.len() - 1;
        let at = if rng.chance(3, 4) {
            last
        } else {
            rng.below(u32::try_from(last + 1).expect("few")) as usize
        };
        &chain.exports[at]
    }

    fn op(&self, rng: &mut Rng, swarm: &Swarm, export: &NamedExport) -> GuestOp {
        let mut weights = swarm.guest_weights;
        if !export.writable && !rng.chance(1, 32) {
            weights[1..6].fill(0);
        }
        let range = self.range(rng, swarm, export);
        match rng.weighted(&weights) {
            1 => GuestOp::Write(range),
            2 => GuestOp::WriteFua(range),
            3 => GuestOp::WriteZeroes(range),
            4 => GuestOp::WriteZeroesUnmap(range),
            5 => GuestOp::Discard(range),
            6 => GuestOp::Flush,
            7 => GuestOp::BlockStatus(range),
            _ => GuestOp::Read(range),
        }
    }

    /// A range of whole grains within the export; now and then one that ends beyond it.
    fn range(&self, rng: &mut Rng, swarm: &Swarm, export: &NamedExport) -> Range {
        let grain = u64::from(swarm.grain);
        let grains = (export.size / grain).max(1);
        let reach = (export.cluster * u64::from(swarm.reach_clusters) / grain).min(MOST_GRAINS);
        let start = if rng.below(8) < swarm.hot_eighths {
            grains * u64::from(self.hot_sixteenth) / 16 + u64::from(rng.below(4))
        } else {
            u64::from(rng.below(u32::try_from(grains).expect("small images")))
        };
        let start = start.min(grains - 1);
        let mut length = 1 + u64::from(rng.below(u32::try_from(reach.max(1)).expect("short")));
        if rng.chance(1, 4) {
            // Whole clusters, where the drivers' fast paths are.
            length = length
                .next_multiple_of((export.cluster / grain).max(1))
                .min(reach.max(1));
        }
        if !rng.chance(1, 128) {
            length = length.min(grains - start);
        }
        Range {
            offset: start * grain,
            length: length * grain,
        }
    }
}
