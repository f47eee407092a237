//! Driver `snapshot-access`: shows the point in time behind the copy-before-write filter that is its file.
//!
//! Rules: it can be read, asked for block status, and discarded, which gives up what was discarded. It asks no permission of
//! its file; that it is there at all is what makes the filter protect its source. Over anything else reads fail with `ENOTSUP`.
//! Deviation: what it shows of its file's chain is its own, whichever node holds it (QEMU asks the first node alone, and a
//! stream or a backup of the top layer then leaves out what lies deeper).

use std::rc::Rc;

use super::copy_before_write::snapshot;
use crate::driver::{Cx, Driver, DriverFacts, DriverStatus, Limits, OpenArgs};
use crate::drivers::attach_file;
use crate::env::Fut;
use crate::error::{Errno, QmpError};
use crate::types::{Perm, ReqFlags, Role};

/// Driver `snapshot-access`.
pub static FACTS: DriverFacts = DriverFacts {
    name: "snapshot-access",
    is_filter: false,
    is_format: false,
    supports_backing: false,
    is_protocol: false,
    has_block_status: true,
    has_write_zeroes: true,
    has_discard: true,
    supported_read_flags: ReqFlags::empty(),
    can_reopen: false,
    mutable_options: &[],
    child_perm: |_cx, _role, _perm, _shared| (Perm::empty(), Perm::all()),
    open: |cx, mut args| Box::pin(std::future::ready(open(cx, &mut args))),
};

/// An open node.
#[derive(Debug)]
struct SnapshotAccess;

fn open(cx: &Cx, args: &mut OpenArgs<'_>) -> Result<Rc<dyn Driver>, QmpError> {
    attach_file(cx, args.file, Role::DATA | Role::PRIMARY)?;
    Ok(Rc::new(SnapshotAccess))
}

impl Driver for SnapshotAccess {
    fn length(&self, cx: &Cx) -> Result<u64, Errno> {
        cx.layer.node_length(&cx.file_node()?)
    }

    fn limits(&self, _cx: &Cx) -> Limits {
        Limits {
            request_alignment: 1,
            ..Limits::default()
        }
    }

    fn read<'a>(
        &'a self,
        cx: &'a Cx,
        offset: u64,
        buf: &'a mut [u8],
        flags: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            if !flags.is_empty() {
                return Err(Errno::ENOTSUP);
            }
            snapshot::read(&cx.layer, &cx.file_node()?, offset, buf).await
        })
    }

    fn write<'a>(&'a self, _: &'a Cx, _: u64, _: &'a [u8], _: ReqFlags) -> Fut<'a, Result<(), Errno>> {
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    fn discard<'a>(&'a self, cx: &'a Cx, offset: u64, bytes: u64) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move { snapshot::discard(&cx.layer, &cx.file_node()?, offset, bytes).await })
    }

    fn block_status<'a>(
        &'a self,
        cx: &'a Cx,
        _want_zero: bool,
        offset: u64,
        bytes: u64,
    ) -> Fut<'a, Result<DriverStatus, Errno>> {
        Box::pin(async move { snapshot::status(&cx.layer, &cx.file_node()?, offset, bytes).await })
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
