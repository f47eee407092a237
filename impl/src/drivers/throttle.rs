//! Filter `throttle`: lets requests through as fast as the limits of its group allow.
//!
//! Rules: reads, writes, zero writes and discards wait in the group and are forwarded with their flags; flushes, block
//! status and lengths are forwarded at once. While the node is drained nothing waits. A reopen can move it to another group.
//! Deviation: copy-on-read asked for from above is done by the node below, where it is safe from writers that do not come
//! through the filter. QEMU copies above the filter. What is copied is therefore charged once, as a read.

use std::cell::RefCell;
use std::rc::Rc;

use serde_json::{Map, Value};

use crate::driver::{Cx, Driver, DriverFacts, DriverInfo, Limits, OpenArgs, WriteFlags};
use crate::drivers::{attach_file, required_str, take_str};
use crate::env::Fut;
use crate::error::{Errno, QmpError};
use crate::graph::perm::default_perms;
use crate::throttle::{Direction, Group};
use crate::types::{ReqFlags, Role};

/// Driver `throttle`.
pub static FACTS: DriverFacts = DriverFacts {
    name: "throttle",
    is_filter: true,
    is_format: false,
    supports_backing: false,
    is_protocol: false,
    has_block_status: false,
    has_write_zeroes: true,
    has_discard: true,
    supported_read_flags: ReqFlags::PREFETCH.union(ReqFlags::COPY_ON_READ),
    can_reopen: true,
    mutable_options: &[],
    child_perm: default_perms,
    open: |cx, mut args| Box::pin(std::future::ready(open(cx, &mut args))),
};

/// An open filter.
#[derive(Debug)]
struct Throttle {
    /// Fixed while requests are in flight: it changes in drained sections only.
    group: RefCell<Rc<Group>>,
}

fn open(cx: &Cx, args: &mut OpenArgs<'_>) -> Result<Rc<dyn Driver>, QmpError> {
    attach_file(cx, args.file, Role::FILTERED | Role::PRIMARY)?;
    let name = required_str(args.options, "throttle-group")?;
    let group = cx.layer.throttle_group(&name)?;
    // Whether it is drained it is told once it is open.
    group.join(cx.node.id, false);
    Ok(Rc::new(Throttle {
        group: RefCell::new(group),
    }))
}

impl Throttle {
    fn group(&self) -> Rc<Group> {
        Rc::clone(&self.group.borrow())
    }

    async fn admit(&self, cx: &Cx, direction: Direction, bytes: u64) {
        self.group().admit(&cx.layer, cx.node.id, direction, bytes).await;
    }
}

impl Driver for Throttle {
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
        WriteFlags {
            write: below.write | ReqFlags::WRITE_UNCHANGED,
            zero: below.zero | ReqFlags::WRITE_UNCHANGED,
            truncate: below.truncate,
        }
    }

    fn info(&self, cx: &Cx) -> Option<DriverInfo> {
        let child = cx.file_node().ok()?;
        child.driver_opt()?.info(&cx.layer.cx(&child))
    }

    fn read<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        buf: &'a mut [u8],
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.admit(cx, Direction::Read, buf.len() as u64).await;
            cx.layer.read(cx.file()?, offset, buf, flags).await
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
            self.admit(cx, Direction::Read, bytes).await;
            cx.layer.prefetch(cx.file()?, offset, bytes, flags).await
        })
    }

    fn write<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        buf: &'a [u8],
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.admit(cx, Direction::Write, buf.len() as u64).await;
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
            self.admit(cx, Direction::Write, bytes).await;
            cx.layer.write_zeroes(cx.file()?, offset, bytes, flags).await
        })
    }

    fn discard<'a>(&'a self, cx: &'a Cx, offset: u64, bytes: u64) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.admit(cx, Direction::Write, bytes).await;
            cx.layer.discard(cx.file()?, offset, bytes).await
        })
    }

    fn drain_begin(&self, cx: &Cx) {
        self.group().set_drained(cx.node.id, true);
    }

    fn drain_end(&self, cx: &Cx) {
        self.group().set_drained(cx.node.id, false);
    }

    fn reopen_options(&self, cx: &Cx, options: &mut Map<String, Value>) -> Result<(), QmpError> {
        if let Some(name) = take_str(options, "throttle-group")? {
            cx.layer.throttle_group(&name)?;
        }
        Ok(())
    }

    fn take_options(&self, cx: &Cx, options: &Map<String, Value>) {
        let Some(name) = options.get("throttle-group").and_then(Value::as_str) else {
            return;
        };
        let new = cx.layer.throttle_group(name).expect("judged before");
        let old = self.group();
        if !Rc::ptr_eq(&new, &old) {
            old.leave(cx.node.id);
            new.join(cx.node.id, cx.node.quiesce_counter.get() > 0);
            self.group.replace(new);
        }
    }

    fn close<'a>(&'a self, cx: &'a Cx) -> Fut<'a, Result<(), Errno>> {
        self.group().leave(cx.node.id);
        Box::pin(std::future::ready(Ok(())))
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
