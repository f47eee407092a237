//! The world of a simulated layer: the disk of [`crate::disk`], virtual time, tasks of [`crate::exec`].

use std::cell::Cell;
use std::rc::Rc;

use blkcheck_impl::env::{Env, Extent, Fut, Nanos, OpenStorage, Storage, StorageKind, StorageLimits};
use blkcheck_impl::error::{Errno, QmpError};

use crate::disk::{Disk, FileId, Op};
use crate::exec::{Clock, Spawner};

/// One simulated world.
#[derive(Debug)]
pub struct SimEnv {
    /// The storage.
    pub disk: Disk,
    /// The time.
    pub clock: Clock,
    /// The tasks.
    pub spawner: Spawner,
    /// Chunks of one job in flight together.
    pub job_parallelism: usize,
}

impl Env for SimEnv {
    fn open(&self, open: &OpenStorage<'_>) -> Result<Rc<dyn Storage>, QmpError> {
        let name = open.filename;
        let Some(file) = self.disk.find(name) else {
            return Err(QmpError::errno(
                &format!("Could not open '{name}'"),
                Errno::ENOENT,
            ));
        };
        if open.kind == StorageKind::HostDevice && !name.starts_with("/dev/") {
            return Err(QmpError::generic(format!(
                "host_device driver requires '{name}' to be either a character or block device"
            )));
        }
        self.disk.opened(file, open.writable);
        Ok(Rc::new(SimFile {
            disk: self.disk.clone(),
            file,
            writable: Cell::new(open.writable),
        }))
    }

    fn now(&self) -> Nanos {
        self.clock.now()
    }

    fn sleep_until(&self, deadline: Nanos) -> Fut<'static, ()> {
        Box::pin(self.clock.sleep_until(deadline))
    }

    fn spawn(&self, name: &'static str, task: Fut<'static, ()>) {
        self.spawner.spawn(name, task);
    }

    fn job_parallelism(&self) -> usize {
        self.job_parallelism
    }
}

/// An open file.
#[derive(Debug)]
struct SimFile {
    disk: Disk,
    file: FileId,
    writable: Cell<bool>,
}

impl SimFile {
    fn done(&self, op: Op) -> Fut<'_, Result<(), Errno>> {
        if !self.writable.get() && op != Op::Flush {
            return Box::pin(std::future::ready(Err(Errno::EBADF)));
        }
        let io = self.disk.request(self.file, op);
        Box::pin(async move { io.await.map(drop) })
    }
}

impl Drop for SimFile {
    fn drop(&mut self) {
        self.disk.closed(self.file, self.writable.get());
    }
}

impl Storage for SimFile {
    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> Fut<'a, Result<usize, Errno>> {
        let io = self.disk.read(self.file, offset, buf);
        Box::pin(async move {
            io.await
                .map(|n| usize::try_from(n).expect("at most the buffer's length"))
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: &'a [u8]) -> Fut<'a, Result<(), Errno>> {
        if !self.writable.get() {
            return Box::pin(std::future::ready(Err(Errno::EBADF)));
        }
        let io = self.disk.write(self.file, offset, buf);
        Box::pin(async move { io.await.map(drop) })
    }

    fn flush(&self) -> Fut<'_, Result<(), Errno>> {
        self.done(Op::Flush)
    }

    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> Fut<'_, Result<(), Errno>> {
        self.done(Op::WriteZeroes {
            offset,
            bytes,
            may_unmap,
        })
    }

    fn discard(&self, offset: u64, bytes: u64) -> Fut<'_, Result<(), Errno>> {
        self.done(Op::Discard { offset, bytes })
    }

    fn truncate(&self, length: u64) -> Fut<'_, Result<(), Errno>> {
        self.done(Op::Truncate { length })
    }

    fn length(&self) -> Result<u64, Errno> {
        Ok(self.disk.length(self.file))
    }

    fn extent(&self, offset: u64) -> Result<Extent, Errno> {
        self.disk.extent(self.file, offset)
    }

    fn limits(&self) -> StorageLimits {
        StorageLimits {
            request_alignment: self.disk.options().alignment,
            discard_alignment: 0,
            max_transfer: 0,
        }
    }

    fn set_writable(&self, writable: bool) -> Result<(), Errno> {
        if self.writable.replace(writable) != writable {
            self.disk.writer(self.file, writable);
        }
        Ok(())
    }

    /// Two requests, one after the other, as a kernel does it: neither is the copy atomic, nor is what fails left as it was.
    fn copy_from<'a>(
        &'a self,
        source: &'a dyn Storage,
        source_offset: u64,
        offset: u64,
        bytes: u64,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let source = source.as_any().downcast_ref::<SimFile>().ok_or(Errno::ENOTSUP)?;
            let mut data = vec![0; usize::try_from(bytes).expect("files are small")];
            if source.read(source_offset, &mut data).await? < data.len() {
                return Err(Errno::EINVAL);
            }
            self.write(offset, &data).await
        })
    }

    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}
