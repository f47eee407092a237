//! A real copy-on-write block layer, usable by itself.
//!
//! Node graph with roles and permissions, chain freezing, drain, graph lock; drivers `file`, `host_device`,
//! `null-co`, `raw`, `qcow2`; the filters `copy-on-read`, with `bottom`, `throttle` and
//! `copy-before-write`, whose point in time `snapshot-access` shows; the jobs block-stream and blockdev-backup. The behaviour
//! is that of QEMU 10.0's block layer, except where QEMU has a known defect (docs/deviations.md).
//!
//! Everything the layer needs from the world comes through [`env::Env`].

mod block_copy;
mod dirty;
pub mod driver;
pub mod drivers;
pub mod env;
pub mod error;
pub mod event;
pub mod graph;
pub mod io;
pub mod jobs;
mod layer;
pub mod memory;
pub mod qmp;
#[cfg(all(feature = "real", target_os = "linux", not(loom)))]
pub mod real;
pub mod sync;
pub mod throttle;
pub mod types;

pub use layer::Layer;
