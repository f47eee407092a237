//! blockdev-backup: arguments, and the refusals that depend on them and the graph alone.
//!
//! Rules: refusals come in QEMU's order with QEMU's texts. The point in time is when the filter is put above the source, which
//! is drained from before the first check on (`start`); everything that says which clusters to copy is fixed there. What is
//! copied and in which order: `run`.

mod run;
mod start;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod tests_chains;
#[cfg(test)]
mod tests_failures;
#[cfg(test)]
mod tests_groups;
#[cfg(test)]
mod tests_interleaved;
#[cfg(test)]
mod tests_lengths;

use std::cell::Cell;
use std::rc::Rc;

use crate::Layer;
use crate::block_copy::BlockCopy;
use crate::dirty::{DirtyBitmap, Use};
use crate::error::QmpError;
use crate::graph::blockers::OpType;
use crate::jobs::error_policy::OnError;
use crate::types::{NodeId, ReqFlags};

/// Arguments of blockdev-backup.
#[derive(Clone, Debug)]
pub(crate) struct BackupArgs {
    /// Job id.
    pub(crate) job_id: Option<String>,
    /// Node whose point in time is copied.
    pub(crate) device: String,
    /// Node that receives it.
    pub(crate) target: String,
    /// Which clusters.
    pub(crate) sync: SyncMode,
    /// Bytes per second; 0: unlimited.
    pub(crate) speed: i64,
    /// A bitmap of the device.
    pub(crate) bitmap: Option<String>,
    /// What becomes of the bitmap.
    pub(crate) bitmap_mode: Option<BitmapMode>,
    /// Write compressed.
    pub(crate) compress: bool,
    /// What to do when the source fails.
    pub(crate) on_source_error: OnError,
    /// What to do when the target fails.
    pub(crate) on_target_error: OnError,
    /// Default true.
    pub(crate) auto_finalize: bool,
    /// Default true.
    pub(crate) auto_dismiss: bool,
    /// Name of the inserted filter.
    pub(crate) filter_node_name: Option<String>,
    /// Discard in the source what was copied.
    pub(crate) discard_source: bool,
    /// Tuning.
    pub(crate) perf: Perf,
}

/// `x-perf`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Perf {
    /// Copy offload is tried.
    pub(crate) use_copy_range: bool,
    /// Most tasks at a time.
    pub(crate) max_workers: i64,
    /// Longest task, bytes; 0: no limit.
    pub(crate) max_chunk: i64,
    /// Smallest unit of copying, bytes.
    pub(crate) min_cluster_size: u64,
}

impl Default for Perf {
    fn default() -> Perf {
        Perf {
            use_copy_range: false,
            max_workers: 64,
            max_chunk: 0,
            min_cluster_size: 0,
        }
    }
}

/// QAPI `MirrorSyncMode`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum SyncMode {
    /// What the device's first layer holds.
    Top,
    /// Everything.
    Full,
    /// Only what guests overwrite.
    None,
    /// What a bitmap marks, which starts anew on success.
    Incremental,
    /// What a bitmap marks.
    Bitmap,
}

impl SyncMode {
    /// Names in QAPI, with the values.
    pub(crate) const NAMES: [(&'static str, SyncMode); 5] = [
        ("top", SyncMode::Top),
        ("full", SyncMode::Full),
        ("none", SyncMode::None),
        ("incremental", SyncMode::Incremental),
        ("bitmap", SyncMode::Bitmap),
    ];

    fn name(self) -> &'static str {
        let known = Self::NAMES.iter().find(|(_, mode)| *mode == self);
        known.expect("every mode has a name").0
    }

    fn goes_by_bitmap(self) -> bool {
        matches!(self, SyncMode::Incremental | SyncMode::Bitmap)
    }
}

/// QAPI `BitmapSyncMode`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum BitmapMode {
    /// It starts anew if the job succeeds.
    OnSuccess,
    /// It keeps what it marks.
    Never,
    /// It starts anew, with what could not be copied.
    Always,
}

impl BitmapMode {
    /// Names in QAPI, with the values.
    pub(crate) const NAMES: [(&'static str, BitmapMode); 3] = [
        ("on-success", BitmapMode::OnSuccess),
        ("never", BitmapMode::Never),
        ("always", BitmapMode::Always),
    ];
}

/// What the arguments mean on the graph as it is.
struct Plan {
    source: NodeId,
    target: NodeId,
    bitmap: Option<(Rc<DirtyBitmap>, BitmapMode)>,
}

/// A backup job's own state.
#[derive(Debug)]
struct Backup {
    source: NodeId,
    /// The filter above the source, with the creation reference, until it is dropped.
    filter: Cell<Option<NodeId>>,
    copy: Rc<BlockCopy>,
    sync: SyncMode,
    bitmap: Option<(Rc<DirtyBitmap>, BitmapMode)>,
    on_source_error: OnError,
    on_target_error: OnError,
    workers: usize,
    max_chunk: u64,
}

fn refuse<T>(text: impl Into<String>) -> Result<T, QmpError> {
    Err(QmpError::generic(text))
}

impl Layer {
    /// Refusals that depend on the arguments and the graph only, in QEMU's order. The source is drained.
    fn backup_plan(&self, args: &BackupArgs, source: NodeId, target: NodeId) -> Result<Plan, QmpError> {
        let bitmap = self.backup_bitmap(args, source)?;
        if source == target {
            return refuse("Source and target cannot be the same");
        }
        let flags = self.node(target).io.write_flags.get().write;
        if args.compress && !flags.contains(ReqFlags::WRITE_COMPRESSED) {
            // QEMU names the device that the target does not have.
            return refuse("Compression is not supported for this drive ");
        }
        self.op_blocked(source, OpType::BackupSource)?;
        self.op_blocked(target, OpType::BackupTarget)?;
        if !(1..=i64::from(i32::MAX)).contains(&args.perf.max_workers) {
            return refuse(format!("max-workers must be between 1 and {}", i32::MAX));
        }
        if args.perf.max_chunk < 0 {
            return refuse("max-chunk must be zero (which means no limit) or positive");
        }
        Ok(Plan {
            source,
            target,
            bitmap,
        })
    }

    /// The bitmap, and what is to become of it.
    fn backup_bitmap(
        &self,
        args: &BackupArgs,
        source: NodeId,
    ) -> Result<Option<(Rc<DirtyBitmap>, BitmapMode)>, QmpError> {
        let (sync, mut mode) = (args.sync, args.bitmap_mode);
        if sync.goes_by_bitmap() && args.bitmap.is_none() {
            return refuse(format!(
                "must provide a valid bitmap name for '{}' sync mode",
                sync.name()
            ));
        }
        if sync == SyncMode::Incremental && mode.replace(BitmapMode::OnSuccess).is_some_and(not_on_success) {
            return refuse("Bitmap sync mode must be 'on-success' when using sync mode 'incremental'");
        }
        let Some(name) = &args.bitmap else {
            return match mode {
                Some(_) => refuse("Cannot specify bitmap sync mode without a bitmap"),
                None => Ok(None),
            };
        };
        let Some(bitmap) = self.node(source).bitmap(name) else {
            return refuse(format!("Bitmap '{name}' could not be found"));
        };
        let Some(mode) = mode else {
            return refuse("Bitmap sync mode must be given when providing a bitmap");
        };
        bitmap.check(Use::Look)?;
        if sync == SyncMode::None {
            return refuse("sync mode 'none' does not produce meaningful bitmap outputs");
        }
        if mode == BitmapMode::Never && !sync.goes_by_bitmap() {
            return refuse(format!(
                "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode '{}'",
                sync.name()
            ));
        }
        Ok(Some((bitmap, mode)))
    }
}

fn not_on_success(mode: BitmapMode) -> bool {
    mode != BitmapMode::OnSuccess
}
