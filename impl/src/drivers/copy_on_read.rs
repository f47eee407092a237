//! Filter `copy-on-read`: what is read through it is copied into the node below, optionally only what the chain
//! holds down to `bottom`.
//!
//! Rules: with `bottom` the links from the filter down to it are frozen while the filter exists (or until
//! [`thaw`]), and the filter holds a reference on it; nothing that only lies below `bottom`, or nowhere, is copied.
//! Without it every unallocated range is copied. Writes, zero writes and discards are forwarded.
//! Copies are made by the node below, where they and every writer wait for each other; if that is a filter, by the one below it.
//!
//! Deviations from QEMU, which are all defects there:
//! * D-2: a read past the end of the first backing layer ended early and left the buffer unfilled; the rest counts
//!   as "not allocated below" and is read.
//! * D-3: with `bottom` directly below the filter the search began beneath `bottom`; nothing is copied then.
//! * D-4: a `bottom` outside the chain hung the open; it is refused.
//! * An error of the first status query ended the read as a success with an unfilled buffer; it fails the request.

use std::cell::Cell;
use std::rc::Rc;

use crate::driver::{Cx, Driver, DriverFacts, DriverInfo, Limits, OpenArgs, WriteFlags};
use crate::drivers::{attach_file, take_str};
use crate::env::Fut;
use crate::error::{Errno, QmpError};
use crate::graph::node::Node;
use crate::io::size;
use crate::types::{EdgeId, NodeId, Perm, ReqFlags, Role};

/// Driver `copy-on-read`.
pub static FACTS: DriverFacts = DriverFacts {
    name: "copy-on-read",
    is_filter: true,
    is_format: false,
    supports_backing: false,
    is_protocol: false,
    has_block_status: false,
    has_write_zeroes: true,
    has_discard: true,
    supported_read_flags: ReqFlags::PREFETCH.union(ReqFlags::COPY_ON_READ),
    can_reopen: false,
    mutable_options: &[],
    child_perm,
    open: |cx, mut args| Box::pin(std::future::ready(open(cx, &mut args))),
};

fn child_perm(_cx: &Cx, role: Role, perm: Perm, shared: Perm) -> (Perm, Perm) {
    debug_assert!(
        role.contains(Role::FILTERED),
        "the only child is the filtered one"
    );
    let passed = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    // It writes what it reads, and lets others do the same: nobody can see that.
    (
        (perm & passed) | Perm::WRITE_UNCHANGED,
        (shared & passed) | Perm::WRITE_UNCHANGED,
    )
}

/// An open filter.
#[derive(Debug)]
struct CopyOnRead {
    file: EdgeId,
    bottom: Cell<Option<NodeId>>,
    frozen: Cell<bool>,
}

/// The `bottom` of an open copy-on-read node; `None` without one, or for another driver.
#[must_use]
pub fn bottom(node: &Node) -> Option<NodeId> {
    let driver = node.driver_opt()?;
    driver.as_any().downcast_ref::<CopyOnRead>()?.bottom.get()
}

/// Thaws the links that a copy-on-read node keeps frozen; the first step of dropping it. Does nothing the second
/// time. Copying still respects `bottom`.
///
/// # Panics
/// When the node is not an open copy-on-read filter.
pub fn thaw(cx: &Cx) {
    let driver = cx.node.driver();
    driver
        .as_any()
        .downcast_ref::<CopyOnRead>()
        .expect("a copy-on-read node")
        .thaw(cx);
}

/// Whether the node keeps links frozen now.
#[must_use]
pub fn is_frozen(node: &Node) -> bool {
    node.driver_opt().is_some_and(|d| {
        d.as_any()
            .downcast_ref::<CopyOnRead>()
            .is_some_and(|c| c.frozen.get())
    })
}

fn open(cx: &Cx, args: &mut OpenArgs<'_>) -> Result<Rc<dyn Driver>, QmpError> {
    let bottom = take_str(args.options, "bottom")?;
    let file = attach_file(cx, args.file, Role::FILTERED | Role::PRIMARY)?;
    let filter = CopyOnRead {
        file,
        bottom: Cell::new(None),
        frozen: Cell::new(false),
    };
    if let Some(name) = bottom {
        let bottom = find_bottom(cx, file, &name)?;
        cx.layer.freeze_chain(cx.node.id, Some(bottom))?;
        cx.layer.hold(bottom);
        filter.frozen.set(true);
        filter.bottom.set(Some(bottom));
    }
    Ok(Rc::new(filter))
}

fn find_bottom(cx: &Cx, file: EdgeId, name: &str) -> Result<NodeId, QmpError> {
    let refuse = |text: String| Err(QmpError::generic(text));
    let Some(bottom) = cx.layer.find_node(name) else {
        return refuse(format!("Bottom node '{name}' not found"));
    };
    let node = cx.layer.node(bottom);
    // The filter itself has its name already, but no driver yet; it is a filter all the same.
    if node.driver_opt().is_none() && bottom != cx.node.id {
        return refuse(format!("Bottom node '{name}' not opened"));
    }
    if node.facts.is_filter {
        return refuse(format!("Bottom node '{name}' is a filter"));
    }
    if !cx
        .layer
        .child(file)
        .is_some_and(|f| cx.layer.chain_contains(f.id, bottom))
    {
        return refuse(format!(
            "Bottom node '{name}' is not in the backing chain of '{}'",
            cx.node.name
        ));
    }
    Ok(bottom)
}

/// What to do with one piece of a request.
#[derive(Clone, Copy, Debug)]
struct Piece {
    bytes: u64,
    copy: bool,
}

impl CopyOnRead {
    fn thaw(&self, cx: &Cx) {
        if self.frozen.replace(false) {
            cx.layer.unfreeze_chain(cx.node.id, self.bottom.get());
        }
    }

    /// The next piece of `[offset, offset + bytes)`: whether it comes from between the filtered node and `bottom`.
    async fn piece(&self, cx: &Cx, bottom: NodeId, offset: u64, bytes: u64) -> Result<Piece, Errno> {
        let layer = &cx.layer;
        let file = cx.file_node()?.id;
        let (in_file, n) = layer.is_allocated(file, offset, bytes).await?;
        if n == 0 {
            // Past the end of the filtered node: zeroes, nothing to copy.
            return Ok(Piece { bytes, copy: false });
        }
        let plain = Piece {
            bytes: n,
            copy: false,
        };
        if in_file || layer.skip_filters(file) == bottom {
            return Ok(plain);
        }
        let Some(next) = layer.backing_chain_next(file) else {
            return Ok(plain);
        };
        // Without an answer nothing is copied: what lies below `bottom` must not be, and a stream must not skip.
        let (depth, below) = layer
            .is_allocated_above(next, Some(bottom), true, offset, n)
            .await?;
        if below == 0 {
            return Ok(plain);
        }
        Ok(Piece {
            bytes: below,
            copy: depth > 0,
        })
    }
}

impl Driver for CopyOnRead {
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
        let below = cx
            .layer
            .child(self.file)
            .map(|c| c.io.write_flags.get())
            .unwrap_or_default();
        let zero = ReqFlags::FUA | ReqFlags::MAY_UNMAP | ReqFlags::NO_FALLBACK;
        WriteFlags {
            write: ReqFlags::WRITE_UNCHANGED | ((ReqFlags::FUA | ReqFlags::WRITE_COMPRESSED) & below.write),
            zero: ReqFlags::WRITE_UNCHANGED | (zero & below.zero),
            truncate: below.truncate,
        }
    }

    fn info(&self, _cx: &Cx) -> Option<DriverInfo> {
        None
    }

    fn read<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        buf: &'a mut [u8],
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let Some(bottom) = self.bottom.get() else {
                return cx
                    .layer
                    .read(self.file, offset, buf, flags | ReqFlags::COPY_ON_READ)
                    .await;
            };
            let mut at = 0;
            while at < buf.len() {
                let (from, left) = (offset + at as u64, (buf.len() - at) as u64);
                let piece = self.piece(cx, bottom, from, left).await?;
                let part = &mut buf[at..at + size(piece.bytes)];
                let copy = if piece.copy {
                    ReqFlags::COPY_ON_READ
                } else {
                    ReqFlags::empty()
                };
                cx.layer.read(self.file, from, part, flags | copy).await?;
                at += size(piece.bytes);
            }
            Ok(())
        })
    }

    fn prefetch<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        bytes: u64,
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            // Whoever asks from above for copies wants them whatever this filter's own range is.
            let wanted = flags.contains(ReqFlags::COPY_ON_READ);
            let flags = flags | ReqFlags::COPY_ON_READ;
            let Some(bottom) = self.bottom.get().filter(|_| !wanted) else {
                return cx.layer.prefetch(self.file, offset, bytes, flags).await;
            };
            let (mut at, end) = (offset, offset + bytes);
            while at < end {
                let piece = self.piece(cx, bottom, at, end - at).await?;
                if piece.copy {
                    cx.layer.prefetch(self.file, at, piece.bytes, flags).await?;
                }
                at += piece.bytes;
            }
            Ok(())
        })
    }

    fn write<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        buf: &'a [u8],
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(cx.layer.write(self.file, offset, buf, flags))
    }

    fn write_zeroes<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        bytes: u64,
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(cx.layer.write_zeroes(self.file, offset, bytes, flags))
    }

    fn discard<'a>(&'a self, cx: &'a Cx, offset: u64, bytes: u64) -> Fut<'a, Result<(), Errno>> {
        Box::pin(cx.layer.discard(self.file, offset, bytes))
    }

    fn unfreeze(&self, cx: &Cx) {
        self.thaw(cx);
    }

    fn close<'a>(&'a self, cx: &'a Cx) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.thaw(cx);
            if let Some(bottom) = self.bottom.take() {
                cx.layer.unhold(bottom);
            }
            Ok(())
        })
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::io::fixture::{Bench, Fixture, Op};

    const CLUSTER: usize = 4096;

    /// base (4 clusters, all data) <- mid (`mid` clusters, data in cluster 1) <- top (4, data in cluster 3).
    fn chain(bench: &Bench, mid: u64) -> [Rc<Fixture>; 3] {
        let unit = CLUSTER as u64;
        let (base, base_driver) = bench.node("base", 4 * unit, unit);
        let (middle, mid_driver) = bench.node("mid", mid * unit, unit);
        let (top, top_driver) = bench.node("top", 4 * unit, unit);
        base_driver.put(0, &[0xb0; 4 * CLUSTER]);
        mid_driver.put(unit, &[0xd1; CLUSTER]);
        top_driver.put(3 * unit, &[0xa3; CLUSTER]);
        bench.back(&middle, &base);
        bench.back(&top, &middle);
        [base_driver, mid_driver, top_driver]
    }

    fn expect(parts: &[(u8, usize)]) -> Vec<u8> {
        parts
            .iter()
            .flat_map(|(byte, clusters)| vec![*byte; clusters * CLUSTER])
            .collect()
    }

    fn allocated(driver: &Fixture) -> Vec<bool> {
        (0..4).map(|c| driver.is_allocated(c * CLUSTER as u64)).collect()
    }

    #[test]
    fn without_bottom_everything_is_copied() {
        let bench = Bench::new();
        let [_, _, top] = chain(&bench, 4);
        let cor = bench.open(&FACTS, "cor", json!({"file": "top"})).expect("opens");
        assert!(bottom(&cor).is_none() && !is_frozen(&cor));
        let guest = bench.guest(&cor);
        let all = bench.read(&guest, 0, 4 * CLUSTER);
        assert_eq!(all, Ok(expect(&[(0xb0, 1), (0xd1, 1), (0xb0, 1), (0xa3, 1)])));
        assert_eq!(allocated(&top), [true; 4]);
        assert_eq!(bench.read(&guest, 0, 4 * CLUSTER), all, "and nothing changed");
    }

    #[test]
    fn with_bottom_only_what_lies_above_it() {
        let bench = Bench::new();
        let [_, _, top] = chain(&bench, 4);
        let cor = bench
            .open(&FACTS, "cor", json!({"file": "top", "bottom": "mid"}))
            .expect("opens");
        let guest = bench.guest(&cor);
        let all = bench.read(&guest, 0, 4 * CLUSTER);
        assert_eq!(all, Ok(expect(&[(0xb0, 1), (0xd1, 1), (0xb0, 1), (0xa3, 1)])));
        assert_eq!(allocated(&top), [false, true, false, true]);
    }

    #[test]
    fn prefetch_skips_without_reading() {
        let bench = Bench::new();
        let [_, _, top] = chain(&bench, 4);
        let cor = bench
            .open(&FACTS, "cor", json!({"file": "top", "bottom": "mid"}))
            .expect("opens");
        let guest = bench.guest(&cor);
        bench
            .run(guest.prefetch(2 * CLUSTER as u64, 2 * CLUSTER as u64))
            .expect("prefetches");
        assert_eq!(top.take_ops(), [], "nothing there to copy");
        bench
            .run(guest.prefetch(0, 4 * CLUSTER as u64))
            .expect("prefetches");
        let unit = CLUSTER as u64;
        assert_eq!(top.take_ops(), [(Op::Read, unit, unit), (Op::Write, unit, unit)]);
        assert_eq!(allocated(&top), [false, true, false, true]);
    }

    #[test]
    fn d2_past_the_end_of_the_first_backing_layer() {
        let bench = Bench::new();
        let [_, _, top] = chain(&bench, 2);
        let cor = bench
            .open(&FACTS, "cor", json!({"file": "top", "bottom": "mid"}))
            .expect("opens");
        let guest = bench.guest(&cor);
        let all = bench.read(&guest, 0, 4 * CLUSTER);
        assert_eq!(
            all,
            Ok(expect(&[(0xb0, 1), (0xd1, 1), (0, 1), (0xa3, 1)])),
            "filled to its end"
        );
        assert_eq!(
            bench.read(&guest, 2 * CLUSTER as u64, 2 * CLUSTER),
            Ok(expect(&[(0, 1), (0xa3, 1)]))
        );
        assert_eq!(allocated(&top), [false, true, false, true]);
    }

    #[test]
    fn d3_bottom_directly_below_copies_nothing() {
        for (file, bottom) in [("top", "top"), ("base", "base")] {
            let bench = Bench::new();
            let drivers = chain(&bench, 4);
            let before: Vec<_> = drivers.iter().map(|d| d.take_ops()).collect();
            assert!(before.iter().all(Vec::is_empty));
            let cor = bench
                .open(&FACTS, "cor", json!({"file": file, "bottom": bottom}))
                .expect("opens");
            let guest = bench.guest(&cor);
            bench.read(&guest, 0, 4 * CLUSTER).expect("reads");
            bench
                .run(guest.prefetch(0, 4 * CLUSTER as u64))
                .expect("prefetches");
            for driver in &drivers {
                assert!(driver.take_ops().iter().all(|(op, ..)| *op == Op::Read), "{file}");
            }
        }
    }

    #[test]
    fn bottom_refusals() {
        let bench = Bench::new();
        chain(&bench, 4);
        bench.node("other", 4096, 4096);
        bench
            .open(&FACTS, "filter", json!({"file": "other"}))
            .expect("opens");
        let refusals = [
            ("gone", "Bottom node 'gone' not found"),
            ("filter", "Bottom node 'filter' is a filter"),
            ("other", "Bottom node 'other' is not in the backing chain of 'c2'"),
            ("c3", "Bottom node 'c3' is a filter"),
        ];
        for (n, (bottom, text)) in refusals.into_iter().enumerate() {
            let refused = bench.open(&FACTS, &format!("c{n}"), json!({"file": "top", "bottom": bottom}));
            assert_eq!(refused.expect_err("refused").desc, text);
        }
        let frozen = bench
            .layer
            .freeze_chain(bench.named("top"), Some(bench.named("base")));
        assert_eq!(frozen, Ok(()), "a refused open freezes nothing");
    }

    #[test]
    fn freezes_down_to_bottom_until_thawed() {
        let bench = Bench::new();
        chain(&bench, 4);
        let cor = bench
            .open(&FACTS, "cor", json!({"file": "top", "bottom": "mid"}))
            .expect("opens");
        let mid = bench.layer.node(bench.named("mid"));
        assert_eq!((bottom(&cor), is_frozen(&cor)), (Some(mid.id), true));
        let freeze = |top: &str, base: &str| {
            bench
                .layer
                .freeze_chain(bench.named(top), Some(bench.named(base)))
        };
        let text = "Cannot change 'backing' link from 'top' to 'mid'";
        assert_eq!(freeze("top", "mid").expect_err("frozen").desc, text);
        assert_eq!(freeze("mid", "base"), Ok(()), "the link out of bottom is free");
        let holders = mid.refcnt.get();
        let cx = bench.layer.cx(&cor);
        thaw(&cx);
        thaw(&cx);
        assert!(!is_frozen(&cor));
        assert_eq!(freeze("top", "mid"), Ok(()));
        bench.run(cor.driver().close(&cx)).expect("closes");
        assert_eq!(
            (mid.refcnt.get(), bottom(&cor)),
            (holders - 1, None),
            "the reference on bottom is gone"
        );
    }

    #[test]
    fn status_errors() {
        let bench = Bench::new();
        let [_, mid, top] = chain(&bench, 4);
        let cor = bench
            .open(&FACTS, "cor", json!({"file": "top", "bottom": "mid"}))
            .expect("opens");
        let guest = bench.guest(&cor);
        mid.status_error.set(Some(Errno::EIO));
        assert_eq!(
            bench.read(&guest, 0, CLUSTER),
            Err(Errno::EIO),
            "neither copied from below bottom nor missed"
        );
        assert!(!top.is_allocated(0));
        top.status_error.set(Some(Errno::EIO));
        assert_eq!(
            bench.read(&guest, 0, CLUSTER),
            Err(Errno::EIO),
            "never an unfilled buffer"
        );
    }

    #[test]
    fn changes_are_forwarded() {
        let bench = Bench::new();
        let [_, _, top] = chain(&bench, 4);
        let cor = bench
            .open(&FACTS, "cor", json!({"file": "top", "bottom": "mid"}))
            .expect("opens");
        let guest = bench.guest(&cor);
        bench
            .run(guest.write(0, &[1; 512], ReqFlags::empty()))
            .expect("writes");
        bench
            .run(guest.write_zeroes(512, 512, ReqFlags::empty()))
            .expect("zeroes");
        bench.run(guest.discard(0, 4096)).expect("discards");
        let kinds: Vec<Op> = top.take_ops().into_iter().map(|(op, ..)| op).collect();
        assert_eq!(kinds, [Op::Write, Op::Zero, Op::Discard]);
    }
}
