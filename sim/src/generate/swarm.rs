//! What one seed draws before anything else: which features take part and how often.

use super::Reach;
use crate::rng::Rng;

/// A named narrowing of the swarm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Default)]
pub enum Profile {
    /// Everything the target can do.
    #[default]
    Mixed,
    /// Guest requests only: no jobs, no drained sections.
    Guests,
    /// Every scenario has streams; small chains, much overlap with guests.
    Stream,
    /// Copy-on-read filters with and without `bottom` in every scenario.
    CopyOnRead,
    /// Many drained sections.
    Drain,
    /// Many graph commands, few guest requests.
    Graph,
    /// Backups of images of a few clusters of 64 KiB, with guests that write to them.
    Backup,
    /// The fixed shape of the speed target: 50 guest requests, one stream, three qcow2 layers, 512-byte clusters.
    Bench,
}

impl Profile {
    /// All of them, for help texts.
    pub const ALL: [Profile; 8] = [
        Profile::Mixed,
        Profile::Guests,
        Profile::Stream,
        Profile::CopyOnRead,
        Profile::Drain,
        Profile::Graph,
        Profile::Backup,
        Profile::Bench,
    ];

    /// Its name on the command line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Profile::Mixed => "mixed",
            Profile::Guests => "guests",
            Profile::Stream => "stream",
            Profile::CopyOnRead => "copy-on-read",
            Profile::Drain => "drain",
            Profile::Graph => "graph",
            Profile::Backup => "backup",
            Profile::Bench => "bench",
        }
    }

    /// The profile of this name.
    #[must_use]
    pub fn by_name(name: &str) -> Option<Profile> {
        Profile::ALL.into_iter().find(|p| p.name() == name)
    }
}

/// Everything that one seed decided beforehand. Sizes in bytes; weights are relative.
#[derive(Clone, Debug)]
pub struct Swarm {
    /// Images in the chain, 1 ..= 5.
    pub layers: u32,
    /// Unit of guest requests.
    pub grain: u32,
    /// Cluster size of most images.
    pub cluster: u32,
    /// Clusters in the largest image.
    pub clusters: u32,
    /// Storage alignment.
    pub alignment: u32,
    /// Chunks of a job in flight.
    pub job_parallelism: u32,
    /// Storage can unmap.
    pub unmap: bool,
    /// Images of different lengths.
    pub uneven: bool,
    /// Lengths that are not a multiple of the cluster, or even of the sector (raw).
    pub odd_tails: bool,
    /// The base is raw.
    pub raw_base: bool,
    /// Some images are version 2.
    pub compat2: bool,
    /// Some images have another refcount width or cluster size than the rest.
    pub odd_formats: bool,
    /// Compressed clusters in the images.
    pub compressed: bool,
    /// Zero clusters in the images.
    pub zero_clusters: bool,
    /// A copy-on-read node above the top from the start, guests above it.
    pub cor_node: bool,
    /// With `bottom`.
    pub cor_bottom: bool,
    /// Lower nodes are writable, and some guests write there.
    pub writable_backing: bool,
    /// Exports on lower nodes.
    pub lower_exports: bool,
    /// The top is opened read-only (a stream must reopen it).
    pub read_only_top: bool,
    /// Children are opened inline or from the header instead of by reference.
    pub inline_children: bool,
    /// discard=unmap on the nodes.
    pub discard_unmap: bool,
    /// Guests.
    pub guests: u32,
    /// Guest requests in all.
    pub guest_ops: u32,
    /// Chance in 8 that a guest request is left in flight.
    pub in_flight_eighths: u32,
    /// Chance in 8 that a request goes to the hot cluster.
    pub hot_eighths: u32,
    /// Weights of read, write, write-fua, write-zeroes, write-zeroes-unmap, discard, flush, block-status.
    pub guest_weights: [u32; 8],
    /// Longest request, clusters.
    pub reach_clusters: u32,
    /// Monitor turns.
    pub monitor_ops: u32,
    /// Weights of stream, job verb, wait, add/del node, add/del export, change-backing-file, query, reopen, snapshot,
    /// resize, throttle groups.
    pub monitor_weights: [u32; 11],
    /// Images that are open beside the chain, to become its top.
    pub overlays: u32,
    /// Explicit drained sections.
    pub drains: u32,
    /// Throttle groups from the start.
    pub throttle_groups: u32,
}

impl Swarm {
    /// Draws the swarm of a seed.
    pub fn draw(rng: &mut Rng, profile: Profile, reach: Reach) -> Swarm {
        if profile == Profile::Bench {
            return Swarm::bench();
        }
        let cluster = *rng.pick(&[512, 512, 512, 512, 1024, 1024, 4096, 65536]);
        let alignment = if reach.alignment {
            *rng.pick(&[1, 1, 1, 512, 512, 4096])
        } else {
            1
        };
        let grain = if reach.fine_grain {
            *rng.pick(&[512, 512, 512, 512, 128, 64, 16])
        } else {
            512
        };
        // The oracles' work grows with the number of grains; a fine grain belongs to small clusters.
        let grain = grain.max(cluster / 128);
        let mut weights = [6, 6, 1, 2, 2, 2, 1, 1];
        for weight in &mut weights[2..] {
            *weight *= rng.below(3);
        }
        let mut swarm = Swarm {
            layers: *rng.pick(&[1, 2, 2, 3, 3, 3, 4, 5]),
            grain,
            cluster,
            clusters: if cluster == 65536 {
                2 + rng.below(4)
            } else {
                4 + rng.below(28)
            },
            alignment,
            job_parallelism: *rng.pick(&[1, 1, 1, 2, 4]),
            unmap: rng.chance(3, 4),
            uneven: rng.chance(1, 2),
            odd_tails: rng.chance(1, 3),
            raw_base: rng.chance(1, 4),
            compat2: rng.chance(1, 8),
            odd_formats: rng.chance(1, 8),
            compressed: rng.chance(1, 4),
            zero_clusters: rng.chance(1, 2),
            cor_node: rng.chance(1, 4),
            cor_bottom: rng.chance(2, 3),
            writable_backing: rng.chance(1, 8),
            lower_exports: rng.chance(1, 3),
            read_only_top: rng.chance(1, 8),
            inline_children: rng.chance(1, 4),
            discard_unmap: rng.chance(3, 4),
            guests: 1 + rng.below(4),
            guest_ops: 4 + rng.below(48),
            in_flight_eighths: rng.below(8),
            hot_eighths: rng.below(8),
            guest_weights: weights,
            reach_clusters: 1 + rng.below(6),
            monitor_ops: rng.below(10),
            monitor_weights: [
                6,
                5,
                3,
                1 + rng.below(2),
                rng.below(2),
                rng.below(2),
                rng.below(2),
                3 * rng.below(3),
                2 * rng.below(2),
                rng.below(2),
                1 + rng.below(3),
            ],
            overlays: 0,
            drains: if reach.drain && rng.chance(1, 2) {
                1 + rng.below(3)
            } else {
                0
            },
            throttle_groups: if rng.chance(1, 5) { 1 + rng.below(2) } else { 0 },
        };
        swarm.narrow(rng, profile, reach);
        if !reach.throttle {
            swarm.throttle_groups = 0;
        }
        if swarm.throttle_groups == 0 {
            swarm.monitor_weights[10] = 0;
        }
        let can = [reach.reopen, reach.snapshots, reach.resize];
        for (weight, can) in swarm.monitor_weights[7..].iter_mut().zip(can) {
            *weight *= u32::from(can);
        }
        if swarm.monitor_ops > 0 && swarm.monitor_weights[8] > 0 {
            swarm.overlays = 1 + rng.below(2);
        }
        if !reach.raw_tails {
            swarm.odd_tails = false;
        }
        swarm
    }

    fn narrow(&mut self, rng: &mut Rng, profile: Profile, reach: Reach) {
        match profile {
            Profile::Mixed | Profile::Bench => {}
            Profile::Guests => (self.monitor_ops, self.drains) = (0, 0),
            Profile::Stream => {
                self.layers = self.layers.max(2);
                self.monitor_ops = 2 + rng.below(8);
                self.monitor_weights = [8, 5, 3, 0, 0, 0, 0, 0, 0, 0, 1];
            }
            Profile::CopyOnRead => {
                self.cor_node = true;
                self.layers = self.layers.max(2);
            }
            Profile::Drain => self.drains = if reach.drain { 2 + rng.below(4) } else { 0 },
            Profile::Graph => {
                self.guest_ops = rng.below(8);
                self.monitor_ops = 6 + rng.below(20);
                self.monitor_weights = [4, 2, 1, 6, 3, 2, 1, 8, 4, 2, 4];
                self.throttle_groups = rng.below(3);
            }
            Profile::Backup => {
                // A backup copies 64 KiB at least; what guests and jobs do to each other needs a few of these.
                self.cluster = *rng.pick(&[4096, 16384, 65536]);
                self.clusters = (2 + rng.below(5)) * 65536 / self.cluster;
                self.grain = 4096;
                self.odd_formats = false;
                self.layers = *rng.pick(&[1, 1, 2, 3]);
                self.guest_ops = 6 + rng.below(30);
                self.monitor_ops = rng.below(4);
                self.reach_clusters = 1 + rng.below(131_072 / self.cluster);
                self.read_only_top &= rng.chance(1, 4);
            }
        }
    }

    /// The shape of the published speed figure; nothing is drawn.
    fn bench() -> Swarm {
        Swarm {
            layers: 3,
            grain: 512,
            cluster: 512,
            clusters: 32,
            alignment: 1,
            job_parallelism: 1,
            unmap: true,
            uneven: false,
            odd_tails: false,
            raw_base: false,
            compat2: false,
            odd_formats: false,
            compressed: false,
            zero_clusters: false,
            cor_node: false,
            cor_bottom: false,
            writable_backing: false,
            lower_exports: false,
            read_only_top: false,
            inline_children: false,
            discard_unmap: true,
            guests: 2,
            guest_ops: 50,
            in_flight_eighths: 4,
            hot_eighths: 2,
            guest_weights: [6, 6, 0, 1, 0, 1, 1, 0],
            reach_clusters: 2,
            monitor_ops: 1,
            monitor_weights: [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
            overlays: 0,
            drains: 0,
            throttle_groups: 0,
        }
    }
}
