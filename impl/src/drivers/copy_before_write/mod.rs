//! Filter `copy-before-write`: before a guest overwrites anything, what was there goes to a target, so that the point in time
//! at which the filter got its first user can still be read.
//!
//! Rules (io.md 4): reads and flushes pass; writes, zero writes and discards copy the clusters they touch first (`guest`). What
//! the point in time held, `snapshot` reads, for the driver `snapshot-access`. The clusters that are to be kept can be
//! restricted by a bitmap, which is looked at once, at open. The target is never flushed by a flush of the node.
//! Without a parent the filter asks nothing of its source and lets everybody write there: that is how it can be put above a
//! node in use. From the first parent on nobody else may write there, or resize it.
//!
//! Deviations from QEMU: a shorter target (D-16) and a cluster of more than 128 MiB (D-6) are refused, both end in an
//! assertion there; once the point in time is lost a read of it that is under way fails (D-5), there it may return new data.

mod guest;
pub(in crate::drivers) mod snapshot;
#[cfg(test)]
mod tests;

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use serde_json::{Map, Value};

use crate::block_copy::BlockCopy;
use crate::dirty::DirtyBitmap;
use crate::driver::{Cx, Driver, DriverFacts, Limits, OpenArgs, WriteFlags};
use crate::drivers::{attach_file, missing, required_str, take_bool, take_enum, take_uint32, take_uint64};
use crate::env::{Fut, Nanos};
use crate::error::{Errno, QmpError};
use crate::event::Event;
use crate::graph::node::Node;
use crate::graph::perm::default_perms;
use crate::sync::WaitQueue;
use crate::types::{EdgeId, OpenFlags, Perm, ReqFlags, Role};

/// Driver `copy-before-write`.
pub static FACTS: DriverFacts = DriverFacts {
    name: "copy-before-write",
    is_filter: true,
    is_format: false,
    supports_backing: false,
    is_protocol: false,
    has_block_status: false,
    has_write_zeroes: true,
    has_discard: true,
    supported_read_flags: ReqFlags::empty(),
    can_reopen: false,
    mutable_options: &[],
    child_perm,
    open: |cx, args| Box::pin(open(cx, args)),
};

/// What a backup passes in the options of its filter, and nobody else can.
pub(crate) const DISCARD_SOURCE: &str = "discard-source";

fn child_perm(cx: &Cx, role: Role, perm: Perm, shared: Perm) -> (Perm, Perm) {
    if !role.contains(Role::FILTERED) {
        // Guests may write to the target's own chain.
        return (Perm::WRITE, Perm::all() - Perm::RESIZE);
    }
    let (mut perm, mut shared) = default_perms(cx, role, perm, shared);
    if !cx.node.parents.borrow().is_empty() {
        perm |= Perm::CONSISTENT_READ;
        if cx.node.flags.get().contains(OpenFlags::DISCARD_SOURCE) {
            perm |= Perm::WRITE;
        }
        shared -= Perm::WRITE | Perm::RESIZE;
    }
    (perm, shared)
}

/// Values of `on-cbw-error`.
const ON_ERROR: [&str; 2] = ["break-guest-write", "break-snapshot"];

/// What a failed copy costs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum OnError {
    /// The guest's write fails.
    BreakGuestWrite,
    /// The point in time is lost.
    BreakSnapshot,
}

/// An open filter.
#[derive(Debug)]
struct CopyBeforeWrite {
    copy: Rc<BlockCopy>,
    on_error: OnError,
    timeout: Option<Nanos>,
    /// Marked: a guest may have overwritten it, so the target has it.
    done: Rc<DirtyBitmap>,
    /// Ranges that snapshot reads are reading from the source.
    frozen: RefCell<Vec<(u64, u64, u64)>>,
    next_read: Cell<u64>,
    thawed: WaitQueue,
    /// Why the point in time is lost.
    broken: Cell<Option<Errno>>,
    /// Nothing is kept any more, and there is no target.
    retired: Cell<bool>,
}

/// The filter's own state, for an open node of this driver.
fn state(node: &Node) -> Option<Rc<dyn Driver>> {
    let driver = node.driver_opt()?;
    driver.as_any().is::<CopyBeforeWrite>().then_some(driver)
}

/// The copying of an open filter; `None` for another driver.
pub(crate) fn block_copy(node: &Node) -> Option<Rc<BlockCopy>> {
    let driver = node.driver_opt()?;
    let filter = driver.as_any().downcast_ref::<CopyBeforeWrite>()?;
    Some(Rc::clone(&filter.copy))
}

/// Makes an open filter one that keeps nothing, for a job that is over and cannot take it out. Its target can be detached.
pub(crate) fn retire(cx: &Cx) {
    if let Some(driver) = state(&cx.node) {
        let filter: &CopyBeforeWrite = driver.as_any().downcast_ref().expect("it is one");
        filter.retired.set(true);
        filter.break_snapshot(cx, Errno::ECANCELED);
    }
}

async fn open(cx: &Cx, mut args: OpenArgs<'_>) -> Result<Rc<dyn Driver>, QmpError> {
    let on_error = match take_enum(args.options, "on-cbw-error", &ON_ERROR)? {
        Some("break-snapshot") => OnError::BreakSnapshot,
        _ => OnError::BreakGuestWrite,
    };
    let timeout = take_uint32(args.options, "cbw-timeout")?.filter(|seconds| *seconds > 0);
    let smallest = take_uint64(args.options, "min-cluster-size")?.unwrap_or(0);
    let discard_source = take_bool(args.options, DISCARD_SOURCE)?.unwrap_or(false);
    if discard_source {
        cx.node.flags.set(cx.node.flags.get() | OpenFlags::DISCARD_SOURCE);
    }
    let bitmap = args.options.remove("bitmap");
    let file = attach_file(cx, args.file, Role::FILTERED | Role::PRIMARY)?;
    let target = attach_target(cx, &mut args).await?;
    let bitmap = bitmap.map(|named| find_bitmap(cx, named)).transpose()?;
    let copy = prepare_copy(cx, (file, target), smallest, discard_source, bitmap.as_deref())
        .map_err(|refusal| refusal.prefixed("Cannot create block-copy-state: "))?;
    let done = Rc::new(DirtyBitmap::of_instant(copy.cluster(), copy.dirty().length.get()));
    let all = [copy.access(), &done, copy.dirty()].map(Rc::clone);
    cx.node.bitmaps.borrow_mut().splice(0..0, all);
    tell(cx, &copy);
    Ok(Rc::new(CopyBeforeWrite {
        copy: Rc::new(copy),
        on_error,
        timeout: timeout.map(|seconds| u64::from(seconds) * 1_000_000_000),
        done,
        frozen: RefCell::default(),
        next_read: Cell::new(0),
        thawed: WaitQueue::default(),
        broken: Cell::new(None),
        retired: Cell::new(false),
    }))
}

async fn attach_target(cx: &Cx, args: &mut OpenArgs<'_>) -> Result<EdgeId, QmpError> {
    let target = args.options.remove("target").ok_or_else(|| missing("target"))?;
    let target = cx.layer.open_driver_child(&cx.node, target).await?;
    let attached = cx.layer.attach_child(&cx.node, target, "target", Role::DATA);
    cx.layer.unhold(target);
    attached
}

fn find_bitmap(cx: &Cx, named: Value) -> Result<Rc<DirtyBitmap>, QmpError> {
    let Value::Object(mut named) = named else {
        return Err(QmpError::generic(
            "Invalid parameter type for 'bitmap', expected: object",
        ));
    };
    let named: &mut Map<String, Value> = &mut named;
    let (node, name) = (required_str(named, "node")?, required_str(named, "name")?);
    Ok(cx.layer.find_bitmap(&node, &name)?.1)
}

fn prepare_copy(
    cx: &Cx,
    edges: (EdgeId, EdgeId),
    smallest: u64,
    discard_source: bool,
    bitmap: Option<&DirtyBitmap>,
) -> Result<BlockCopy, QmpError> {
    let copy = BlockCopy::new(cx, edges, smallest, discard_source)?;
    if let Some(bitmap) = bitmap {
        copy.dirty().can_take(bitmap).map_err(|refusal| {
            refusal.prefixed(&format!(
                "Failed to merge bitmap '{}' to internal copy-bitmap: ",
                bitmap.name
            ))
        })?;
        copy.restrict_to(bitmap);
    }
    let length = |edge: EdgeId| cx.layer.child(edge).map(|node| node.length());
    // A longer one has room for everything; whoever wants them equal looks before.
    if length(edges.0) > length(edges.1) {
        return Err(QmpError::generic("Source and target image have different sizes"));
    }
    Ok(copy)
}

fn tell(cx: &Cx, copy: &BlockCopy) {
    let below = |edge: EdgeId| cx.layer.child(edge).expect("just attached").id;
    cx.layer.emit(|| Event::CopyBeforeWrite {
        filter: cx.node.id,
        source: below(copy.source()),
        target: below(copy.target()),
        cluster: copy.cluster(),
    });
}

impl Driver for CopyBeforeWrite {
    fn length(&self, cx: &Cx) -> Result<u64, Errno> {
        cx.layer.node_length(&cx.file_node()?)
    }

    fn limits(&self, _cx: &Cx) -> Limits {
        Limits {
            request_alignment: 1,
            ..Limits::default()
        }
    }

    fn write_flags(&self, cx: &Cx) -> WriteFlags {
        let below = cx.file_node().map(|c| c.io.write_flags.get()).unwrap_or_default();
        let zero = ReqFlags::FUA | ReqFlags::MAY_UNMAP | ReqFlags::NO_FALLBACK;
        WriteFlags {
            write: ReqFlags::WRITE_UNCHANGED | (ReqFlags::FUA & below.write),
            zero: ReqFlags::WRITE_UNCHANGED | (zero & below.zero),
            truncate: below.truncate,
        }
    }

    fn read<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        buf: &'a mut [u8],
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move { cx.layer.read(cx.file()?, offset, buf, flags).await })
    }

    fn write<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        buf: &'a [u8],
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.before_write(cx, offset, buf.len() as u64, flags).await?;
            cx.layer.write(cx.file()?, offset, buf, flags).await
        })
    }

    fn write_zeroes<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        bytes: u64,
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.before_write(cx, offset, bytes, flags).await?;
            cx.layer.write_zeroes(cx.file()?, offset, bytes, flags).await
        })
    }

    fn discard<'a>(&'a self, cx: &'a Cx, offset: u64, bytes: u64) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.before_write(cx, offset, bytes, ReqFlags::empty()).await?;
            cx.layer.discard(cx.file()?, offset, bytes).await
        })
    }

    fn flushes(&self, _cx: &Cx, child: EdgeId) -> bool {
        child != self.copy.target()
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
