//! One open host file or device.
//!
//! Rules: short reads and short writes are continued until the end of the file or an error, so a full disk is ENOSPC and
//! never a half-done success. What the kernel does not know (`EOPNOTSUPP`, `ENOSYS`, `ENODEV`, `ENOTTY`) is ENOTSUP.
//! A descriptor stays open until the last request on it is done, also across a switch between read-only and writable.

use std::cell::RefCell;
use std::fs::File;
use std::io::IoSliceMut;
use std::rc::Rc;
use std::sync::Arc;

use compio::BufResult;
use compio::buf::{IntoInner, IoBuf};
use compio::driver::op::{ReadAt, Sync, WriteAt};
use rustix::fs::{FallocateFlags, SeekFrom, copy_file_range, fallocate, fstat, ftruncate, seek};
use rustix::io::{Errno as Os, ReadWriteFlags, pread, preadv2, pwrite, retry_on_intr};

use super::Shared;
use super::lent::{Share, Worker};
use super::open::{self, MEMORY_ALIGN, Medium, errno};
use crate::env::{Extent, Fut, OpenStorage, Storage, StorageKind, StorageLimits};
use crate::error::{Errno, QmpError};

/// Largest single transfer of the slow path, bytes; larger requests go in pieces.
pub(super) const BOUNCE: usize = 1 << 20;
/// On a memory file system, longer range operations still go to a thread: they take milliseconds.
const INLINE_RANGE: u64 = 16 << 20;
/// Largest step of an inline copy, bytes: others must get to run in between.
const COPY_STEP: u64 = 4 << 20;
/// Page size assumed for residency probes; a larger real one only makes probes more frequent.
const PAGE: u64 = 4096;

#[derive(Debug)]
pub(super) struct RealStorage {
    shared: Rc<Shared>,
    medium: Medium,
    file: RefCell<Arc<File>>,
    worker: Worker,
}

impl std::fmt::Debug for Shared {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Shared")
    }
}

/// How far an inline attempt came.
enum Inline {
    /// All of it, or up to the end of the file.
    Done(usize),
    /// The rest needs a device.
    Rest(usize),
}

impl RealStorage {
    pub(super) fn open(shared: Rc<Shared>, args: &OpenStorage<'_>) -> Result<RealStorage, QmpError> {
        let (file, medium) = open::open(shared.options.root.as_deref(), args)?;
        Ok(RealStorage {
            shared,
            medium,
            file: RefCell::new(file),
            worker: Worker::default(),
        })
    }

    fn file(&self) -> Arc<File> {
        Arc::clone(&self.file.borrow())
    }

    /// Whether the page cache may be used without asking the engine.
    fn inline(&self) -> bool {
        self.shared.options.inline && !self.medium.direct
    }

    /// Reads what is there without waiting for a device.
    fn read_inline(&self, offset: u64, buf: &mut [u8]) -> Result<Inline, Errno> {
        if !self.inline() || !(self.medium.memory || self.medium.nowait) {
            return Ok(Inline::Rest(0));
        }
        let file = self.file.borrow();
        let mut done = 0;
        while done < buf.len() {
            let (at, rest) = (offset + done as u64, &mut buf[done..]);
            let got = if self.medium.memory {
                pread(&**file, rest, at)
            } else {
                preadv2(&**file, &mut [IoSliceMut::new(rest)], at, ReadWriteFlags::NOWAIT)
            };
            match got {
                Ok(0) => break,
                Ok(n) => done += n,
                Err(Os::INTR) => {}
                Err(Os::AGAIN | Os::OPNOTSUPP) => return Ok(Inline::Rest(done)),
                Err(e) => return Err(errno(e)),
            }
        }
        Ok(Inline::Done(done))
    }

    /// Writes what only has to be copied into the page cache. The kernel may still hold a heavy writer back until the
    /// device has caught up; that pressure is wanted.
    fn write_inline(&self, offset: u64, buf: &[u8]) -> Result<Inline, Errno> {
        if !self.inline() || !(self.medium.memory || self.edges_resident(offset, buf.len() as u64)) {
            return Ok(Inline::Rest(0));
        }
        write_all(&self.file.borrow(), offset, buf).map_err(errno)?;
        Ok(Inline::Done(buf.len()))
    }

    /// Memory that a worker may write from, where [`RealStorage::write_inline`] would write at once.
    fn share(&self, offset: u64, buf: &[u8]) -> Option<Share> {
        let shelf = self.shared.lent.as_ref().filter(|_| self.inline())?;
        let share = shelf.share(buf)?;
        (self.medium.memory || self.edges_resident(offset, buf.len() as u64)).then_some(share)
    }

    /// Whether a buffered write finds its partly written pages in the cache (or beyond the end), so that it need not
    /// read them from the device first. Most file systems refuse `RWF_NOWAIT` for writes; asking first does the same.
    fn edges_resident(&self, offset: u64, bytes: u64) -> bool {
        let end = offset + bytes;
        let first = !offset.is_multiple_of(PAGE) && !self.resident(offset);
        let last = !first && !end.is_multiple_of(PAGE) && !self.resident(end - 1);
        self.medium.nowait && !first && !last
    }

    fn resident(&self, offset: u64) -> bool {
        let mut byte = [0];
        let iov = &mut [IoSliceMut::new(&mut byte)];
        preadv2(&**self.file.borrow(), iov, offset, ReadWriteFlags::NOWAIT).is_ok()
    }

    /// Reads through the engine.
    async fn read_engine(&self, offset: u64, buf: &mut [u8]) -> Result<usize, Errno> {
        let mut done = 0;
        while done < buf.len() {
            let bytes = (buf.len() - done).min(BOUNCE);
            let memory = self.shared.take_bounce();
            let start = memory.as_ptr().align_offset(MEMORY_ALIGN);
            let op = ReadAt::new(
                self.file(),
                offset + done as u64,
                memory.slice(start..start + bytes),
            );
            let BufResult(got, op) = self.shared.runtime.submit(op).await;
            let memory = op.into_inner().into_inner();
            let got = match got {
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {
                    self.shared.give_bounce(memory);
                    continue;
                }
                got => got.map_err(Errno::from),
            };
            if let Ok(got) = got {
                buf[done..done + got].copy_from_slice(&memory[start..start + got]);
                done += got;
            }
            self.shared.give_bounce(memory);
            // With O_DIRECT an unaligned count is the end of the file, and could not be continued anyway.
            let got = got?;
            if got == 0 || self.medium.direct && !(got as u64).is_multiple_of(self.medium.alignment) {
                break;
            }
        }
        Ok(done)
    }

    /// Writes through the engine.
    async fn write_engine(&self, offset: u64, buf: &[u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < buf.len() {
            let bytes = (buf.len() - done).min(BOUNCE);
            let mut memory = self.shared.take_bounce();
            let start = memory.as_ptr().align_offset(MEMORY_ALIGN);
            memory[start..start + bytes].copy_from_slice(&buf[done..done + bytes]);
            let op = WriteAt::new(
                self.file(),
                offset + done as u64,
                memory.slice(start..start + bytes),
            );
            let BufResult(put, op) = self.shared.runtime.submit(op).await;
            self.shared.give_bounce(op.into_inner().into_inner());
            match put {
                Ok(0) => return Err(Errno::EINVAL),
                // A partial direct write ends inside a block only on a full disk or an error: do that block again.
                Ok(n) if self.medium.direct && n < bytes => {
                    let whole = n - n % usize::try_from(self.medium.alignment).expect("at most a page");
                    if whole == 0 {
                        return Err(Errno::EINVAL);
                    }
                    done += whole;
                }
                Ok(n) => done += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(())
    }

    /// A system call that may wait for a device: in a worker, unless the medium is memory and the range is short.
    async fn blocking<T, F>(&self, bytes: u64, call: F) -> Result<T, Errno>
    where
        T: Send + 'static,
        F: FnOnce(&File) -> Result<T, Os> + Send + 'static,
    {
        let file = self.file();
        if self.medium.memory && self.shared.options.inline && bytes <= INLINE_RANGE {
            self.shared.breathe().await;
            return call(&file).map_err(unsupported);
        }
        let result = self.shared.runtime.spawn_blocking(move || call(&file)).await;
        result
            .unwrap_or_else(|_| panic!("a worker panicked inside a system call"))
            .map_err(unsupported)
    }

    fn copy_bounds(&self, source: &RealStorage, bytes: u64) -> Result<(), Errno> {
        let both_files = self.medium.kind == StorageKind::File && source.medium.kind == StorageKind::File;
        let cached = !self.medium.direct && !source.medium.direct;
        if both_files && cached && bytes > 0 {
            Ok(())
        } else {
            Err(Errno::ENOTSUP)
        }
    }
}

/// The errno of a range operation, with everything that means "not here" as ENOTSUP.
fn unsupported(e: Os) -> Errno {
    match e {
        Os::OPNOTSUPP | Os::NOSYS | Os::NODEV | Os::NOTTY => Errno::ENOTSUP,
        e => errno(e),
    }
}

/// Writes all of `buf`, or says why not.
pub(super) fn write_all(file: &File, offset: u64, buf: &[u8]) -> Result<(), Os> {
    let mut done = 0;
    while done < buf.len() {
        match pwrite(file, &buf[done..], offset + done as u64) {
            Ok(0) => return Err(Os::INVAL),
            Ok(n) => done += n,
            Err(Os::INTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// `fallocate` that survives signals.
fn allocate(file: &File, flags: FallocateFlags, offset: u64, bytes: u64) -> Result<(), Os> {
    retry_on_intr(|| fallocate(file, flags, offset, bytes))
}

const PUNCH: FallocateFlags = FallocateFlags::PUNCH_HOLE.union(FallocateFlags::KEEP_SIZE);

/// Zeroes a range of a file by the cheapest means it has; QEMU's order.
fn zero_file(file: &File, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), Os> {
    const NEXT: [Os; 3] = [Os::OPNOTSUPP, Os::INVAL, Os::BUSY];
    if may_unmap {
        match allocate(file, PUNCH, offset, bytes) {
            Err(e) if NEXT.contains(&e) => {}
            done => return done,
        }
    }
    match allocate(file, FallocateFlags::ZERO_RANGE, offset, bytes) {
        Err(e) if NEXT.contains(&e) => {}
        done => return done,
    }
    let length = fstat(file)?.st_size.cast_unsigned();
    if offset < length {
        match allocate(file, PUNCH, offset, bytes) {
            Err(Os::INVAL | Os::BUSY) => return Err(Os::OPNOTSUPP),
            done => done?,
        }
    }
    // Gives the range its blocks back, and the file its length.
    allocate(file, FallocateFlags::empty(), offset, bytes)
}

/// Zeroes a range of a block device. `fallocate` does what BLKZEROOUT does, and drops the stale cache pages as well.
fn zero_device(file: &File, offset: u64, bytes: u64, may_unmap: bool) -> Result<(), Os> {
    let flags = if may_unmap {
        PUNCH
    } else {
        FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
    };
    // EINVAL: smaller than a sector.
    allocate(file, flags, offset, bytes).map_err(|e| if e == Os::INVAL { Os::OPNOTSUPP } else { e })
}

fn copy_range(source: &File, mut from: u64, target: &File, mut to: u64, bytes: u64) -> Result<(), Os> {
    let mut left = bytes;
    while left > 0 {
        let step = usize::try_from(left).unwrap_or(usize::MAX);
        match copy_file_range(source, Some(&mut from), target, Some(&mut to), step) {
            // The source ends here: what is missing is not ours to invent.
            Ok(0) => return Err(Os::INVAL),
            Ok(n) => left -= n as u64,
            Err(Os::INTR) => {}
            Err(Os::XDEV | Os::INVAL) => return Err(Os::OPNOTSUPP),
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

impl Storage for RealStorage {
    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> Fut<'a, Result<usize, Errno>> {
        Box::pin(async move {
            match self.read_inline(offset, buf)? {
                Inline::Done(n) => {
                    self.shared.breathe().await;
                    Ok(n)
                }
                Inline::Rest(n) => Ok(n + self.read_engine(offset + n as u64, &mut buf[n..]).await?),
            }
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: &'a [u8]) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            if let Some(share) = self.share(offset, buf) {
                let written = self.worker.write(self.file(), offset, share);
                return written.await.map_err(errno);
            }
            match self.write_inline(offset, buf)? {
                Inline::Done(_) => {
                    self.shared.breathe().await;
                    Ok(())
                }
                Inline::Rest(n) => self.write_engine(offset + n as u64, &buf[n..]).await,
            }
        })
    }

    fn flush(&self) -> Fut<'_, Result<(), Errno>> {
        Box::pin(async move {
            if self.medium.memory {
                // fdatasync on tmpfs has nothing to do; what a crash of the host takes, it takes.
                return Ok(());
            }
            let BufResult(result, _) = self.shared.runtime.submit(Sync::new(self.file(), true)).await;
            result.map(|_| ()).map_err(Errno::from)
        })
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> Fut<'_, Result<(), Errno>> {
        let zero = if self.medium.kind == StorageKind::File {
            zero_file
        } else {
            zero_device
        };
        Box::pin(self.blocking(bytes, move |file| zero(file, offset, bytes, may_unmap)))
    }

    fn discard(&self, offset: u64, bytes: u64) -> Fut<'_, Result<(), Errno>> {
        Box::pin(self.blocking(bytes, move |file| allocate(file, PUNCH, offset, bytes)))
    }

    fn truncate(&self, length: u64) -> Fut<'_, Result<(), Errno>> {
        let shrinks_by = self.length().unwrap_or(0).saturating_sub(length);
        Box::pin(self.blocking(shrinks_by, move |file| retry_on_intr(|| ftruncate(file, length))))
    }

    fn length(&self) -> Result<u64, Errno> {
        let file = self.file.borrow();
        match self.medium.kind {
            StorageKind::File => fstat(&**file).map(|stat| stat.st_size.cast_unsigned()),
            StorageKind::HostDevice => seek(&**file, SeekFrom::End(0)),
        }
        .map_err(errno)
    }

    fn extent(&self, offset: u64) -> Result<Extent, Errno> {
        let length = self.length()?;
        assert!(offset < length, "the caller asks below the length only");
        let to_end = |data| Extent {
            data,
            bytes: length - offset,
        };
        let file = self.file.borrow();
        match seek(&**file, SeekFrom::Data(offset)) {
            Err(Os::NXIO) => return Ok(to_end(false)),
            Ok(data) if data > offset => {
                return Ok(Extent {
                    data: false,
                    bytes: data - offset,
                });
            }
            Ok(data) if data == offset => {}
            // Cannot tell, or the file shrank under us.
            Ok(_) | Err(_) => return Ok(to_end(true)),
        }
        match seek(&**file, SeekFrom::Hole(offset)) {
            Err(Os::NXIO) => Ok(to_end(false)),
            Ok(hole) if hole > offset => Ok(Extent {
                data: true,
                bytes: hole - offset,
            }),
            Ok(_) | Err(_) => Ok(to_end(true)),
        }
    }

    fn limits(&self) -> StorageLimits {
        StorageLimits {
            request_alignment: self.medium.alignment,
            discard_alignment: 0,
            max_transfer: 0,
        }
    }

    fn set_writable(&self, writable: bool) -> Result<(), Errno> {
        let new = open::reopen(&self.file.borrow(), writable, &self.medium)?;
        self.file.replace(new);
        Ok(())
    }

    fn copy_from<'a>(
        &'a self,
        source: &'a dyn Storage,
        source_offset: u64,
        offset: u64,
        bytes: u64,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let source = source
                .as_any()
                .downcast_ref::<RealStorage>()
                .ok_or(Errno::ENOTSUP)?;
            self.copy_bounds(source, bytes)?;
            // A half-done copy is no success: the caller falls back to writing the whole range.
            let mut done = 0;
            while done < bytes {
                let step = (bytes - done).min(COPY_STEP);
                let (from, to, input) = (source_offset + done, offset + done, source.file());
                self.blocking(step, move |target| copy_range(&input, from, target, to, step))
                    .await?;
                done += step;
            }
            Ok(())
        })
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
