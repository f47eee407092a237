//! Driver `null-co`: no storage at all. Reads zeroes or a fixed pattern, forgets writes, takes its time.
//!
//! QEMU leaves the buffer of a read untouched without `read-zeroes`. To be deterministic, "untouched" is
//! [`POISON`] here. Zero writes and discards are not implemented by the driver, as in QEMU.

use std::rc::Rc;

use crate::driver::{Cx, Driver, DriverFacts, DriverStatus, Limits, OpenArgs, WriteFlags};
use crate::drivers::{no_children, take_bool, take_size, take_uint64};
use crate::env::{Fut, Nanos};
use crate::error::{Errno, QmpError};
use crate::types::{ReqFlags, StatusFlags};

/// What every byte reads as without `read-zeroes`.
pub const POISON: u8 = 0xdb;

/// Length without option `size`, bytes.
const DEFAULT_SIZE: u64 = 1 << 30;

/// Driver `null-co`.
pub static FACTS: DriverFacts = DriverFacts {
    name: "null-co",
    is_filter: false,
    is_format: false,
    supports_backing: false,
    is_protocol: true,
    has_block_status: true,
    has_write_zeroes: false,
    has_discard: false,
    supported_read_flags: ReqFlags::empty(),
    can_reopen: true,
    mutable_options: &[],
    child_perm: no_children,
    open: |_, mut args| Box::pin(std::future::ready(open(&mut args))),
};

/// An open null device.
#[derive(Debug)]
struct Null {
    size: u64,
    latency: Nanos,
    read_zeroes: bool,
}

fn open(args: &mut OpenArgs<'_>) -> Result<Rc<dyn Driver>, QmpError> {
    let size = take_size(args.options, "size")?.unwrap_or(DEFAULT_SIZE);
    let latency = take_uint64(args.options, "latency-ns")?.unwrap_or(0);
    let read_zeroes = take_bool(args.options, "read-zeroes")?.unwrap_or(false);
    if latency > i64::MAX.unsigned_abs() {
        return Err(QmpError::generic("latency-ns is invalid"));
    }
    Ok(Rc::new(Null {
        size,
        latency,
        read_zeroes,
    }))
}

impl Null {
    async fn wait(&self, cx: &Cx) {
        if self.latency > 0 {
            let env = cx.layer.env();
            env.sleep_until(env.now().saturating_add(self.latency)).await;
        }
    }
}

impl Driver for Null {
    fn length(&self, _cx: &Cx) -> Result<u64, Errno> {
        Ok(self.size)
    }

    fn limits(&self, _cx: &Cx) -> Limits {
        Limits {
            request_alignment: 1,
            ..Limits::default()
        }
    }

    fn write_flags(&self, _cx: &Cx) -> WriteFlags {
        WriteFlags {
            write: ReqFlags::FUA,
            ..WriteFlags::default()
        }
    }

    fn read<'a>(
        &'a self,
        cx: &'a Cx,
        _offset: u64,
        buf: &'a mut [u8],
        _: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.wait(cx).await;
            buf.fill(if self.read_zeroes { 0 } else { POISON });
            Ok(())
        })
    }

    fn write<'a>(
        &'a self,
        cx: &'a Cx,
        _offset: u64,
        _buf: &'a [u8],
        _: ReqFlags,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.wait(cx).await;
            Ok(())
        })
    }

    fn flush_to_disk<'a>(&'a self, cx: &'a Cx) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.wait(cx).await;
            Ok(())
        })
    }

    fn block_status<'a>(
        &'a self,
        cx: &'a Cx,
        _want_zero: bool,
        offset: u64,
        bytes: u64,
    ) -> Fut<'a, Result<DriverStatus, Errno>> {
        let zero = if self.read_zeroes {
            StatusFlags::ZERO
        } else {
            StatusFlags::empty()
        };
        let flags = StatusFlags::OFFSET_VALID | zero;
        let status = DriverStatus {
            flags,
            pnum: bytes,
            map: offset,
            file: Some(cx.node.id),
        };
        Box::pin(std::future::ready(Ok(status)))
    }

    fn filename(&self, _cx: &Cx) -> String {
        "null-co://".to_owned()
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::env::Env;
    use crate::io::fixture::Bench;

    #[test]
    fn zeroes_poison_and_latency() {
        let bench = Bench::new();
        let options = json!({"size": 4096, "latency-ns": 500});
        let node = bench.open(&FACTS, "null", options).expect("opens");
        let guest = bench.guest(&node);
        bench
            .run(guest.write(0, &[1; 512], ReqFlags::empty()))
            .expect("forgets");
        assert_eq!(bench.read(&guest, 0, 512), Ok(vec![POISON; 512]));
        bench.run(guest.flush()).expect("flushes");
        assert_eq!(bench.env.now(), 1500, "write, read and flush took their time");
        let zero = bench
            .open(&FACTS, "zero", json!({"read-zeroes": true}))
            .expect("opens");
        assert_eq!(zero.length(), 1 << 30);
        assert_eq!(bench.read(&bench.guest(&zero), 4096, 16), Ok(vec![0; 16]));
        let refused = bench
            .open(&FACTS, "bad", json!({"latency-ns": -1}))
            .expect_err("refused");
        assert_eq!(refused.desc, "latency-ns is invalid");
    }
}
