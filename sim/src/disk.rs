//! The simulated disk: files in memory, requests that wait until somebody completes them, in any order.
//!
//! Rules: the data of a write is captured when it is submitted and reaches the file when it completes; a read sees the
//! file as it is when it completes. Two requests in flight are in no order, whatever they touch: who needs an order
//! waits. Requests must respect [`DiskOptions::alignment`], or it is a bug of the layer and panics.
//! Buffers and request slots are reused from run to run.
//! A pending request may also be made to fail ([`Disk::fail`]), with a prefix of its sectors carried out or not.
//! With [`DiskOptions::power`] it keeps what is durable apart ([`Disk::power_cut`]); otherwise every write is as good as durable.
//! Not here: which requests fail, and when the power does.

mod file;
mod op;
pub(crate) mod volatile;

use std::cell::RefCell;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::task::{Context, Poll, Waker};

use blkcheck_impl::env::Extent;
use blkcheck_impl::error::Errno;

use crate::choice::Key;
use crate::owner::Owners;

use file::{File, to_usize};
pub use op::{BadEnd, Op};
pub use volatile::Remains;
use volatile::Volatile;

/// Unit in which holes are tracked, bytes.
const SECTOR: u64 = 512;
/// Largest file: a runaway offset must not eat the machine's memory.
pub const MAX_FILE: u64 = 4 << 30;
/// What the buffer of a failed read holds: nobody may take it for data.
const GARBAGE: u8 = 0xa5;
/// Buffers above this are given back, bytes.
const KEEP_BUFFER: usize = 1 << 20;

/// A file's index.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub struct FileId(pub u32);

/// What all files of a disk have in common.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct DiskOptions {
    /// Offsets and lengths of requests are multiples of this, bytes.
    pub alignment: u64,
    /// Zero writes and discards work; otherwise they end with ENOTSUP at once.
    pub unmap: bool,
    /// The power may fail.
    pub power: bool,
}

impl Default for DiskOptions {
    fn default() -> DiskOptions {
        DiskOptions {
            alignment: 1,
            unmap: true,
            power: false,
        }
    }
}

#[derive(Debug)]
enum Progress {
    Free,
    Pending(Waker),
    Over(Result<u64, Errno>),
}

#[derive(Debug)]
struct Request {
    file: FileId,
    op: Op,
    buffer: Vec<u8>,
    progress: Progress,
    number: u64,
    key: Key,
    /// Changes of the file that a flush found.
    found: u64,
}

#[derive(Debug, Default)]
struct Inner {
    options: DiskOptions,
    files: Vec<File>,
    requests: Vec<Request>,
    free: Vec<u32>,
    /// Oldest first.
    pending: Vec<u32>,
    submitted: u64,
    owners: Owners,
}

/// The disk. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Disk {
    inner: Rc<RefCell<Inner>>,
}

/// A pending request, for people.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PendingRequest {
    /// Number of the request in this run.
    pub number: u64,
    /// Name of the file.
    pub file: String,
    /// What it does.
    pub op: Op,
}

impl Disk {
    /// A disk whose requests are counted in these books.
    #[must_use]
    pub fn owned(owners: Owners) -> Disk {
        let disk = Disk::default();
        disk.inner.borrow_mut().owners = owners;
        disk
    }

    /// Forgets files and requests, keeps their memory.
    pub fn reset(&self, options: DiskOptions) {
        let inner = &mut *self.inner.borrow_mut();
        assert!(
            options.alignment.is_power_of_two(),
            "alignment {}",
            options.alignment
        );
        inner.options = options;
        for file in &mut inner.files {
            file.exists = false;
            file.name.clear();
            (file.open, file.writers, file.contested) = (0, 0, false);
            if file.data.capacity() > KEEP_BUFFER {
                file.data = Vec::new();
            }
            file.data.clear();
            file.allocated.clear();
            file.volatile = None;
        }
        inner.pending.clear();
        inner.free.clear();
        for (i, request) in inner.requests.iter_mut().enumerate() {
            request.progress = Progress::Free;
            inner.free.push(u32::try_from(i).expect("few requests"));
        }
        inner.submitted = 0;
    }

    /// Creates a file whose content `fill` writes into an empty buffer.
    ///
    /// # Panics
    /// When the name is taken.
    pub fn create(&self, name: &str, fill: impl FnOnce(&mut Vec<u8>)) -> FileId {
        let inner = &mut *self.inner.borrow_mut();
        assert!(inner.find(name).is_none(), "file '{name}' exists");
        let at = inner.files.iter().position(|f| !f.exists).unwrap_or_else(|| {
            inner.files.push(File::default());
            inner.files.len() - 1
        });
        let file = &mut inner.files[at];
        file.exists = true;
        file.name.push_str(name);
        fill(&mut file.data);
        assert!(file.data.len() as u64 <= MAX_FILE, "file '{name}' is too large");
        let length = file.data.len();
        file.set_length(length);
        file.mark(0, file.sectors() as u64, true);
        file.volatile = inner.options.power.then(|| Volatile::new(&file.data));
        FileId(u32::try_from(at).expect("few files"))
    }

    /// Makes everything outside these ranges (offset, bytes) a hole; it holds only zeroes.
    pub fn keep_only(&self, file: FileId, ranges: impl Iterator<Item = (u64, u64)>) {
        let mut inner = self.inner.borrow_mut();
        let file = inner.file(file);
        file.mark(0, file.sectors() as u64, false);
        for (offset, bytes) in ranges {
            let end = (offset + bytes).min(file.data.len() as u64);
            file.mark(offset / SECTOR, end.div_ceil(SECTOR), true);
        }
    }

    /// A file by name.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<FileId> {
        self.inner.borrow().find(name)
    }

    /// Looks at a file's bytes.
    pub fn with_bytes<R>(&self, file: FileId, f: impl FnOnce(&[u8]) -> R) -> R {
        f(&self.inner.borrow_mut().file(file).data)
    }

    /// Replaces one byte range of a file at once; for tests that damage images.
    pub fn patch(&self, file: FileId, offset: u64, bytes: &[u8]) {
        self.inner.borrow_mut().file(file).write(offset, bytes);
    }

    /// Notes a handle; `writable` ones are counted apart.
    pub(crate) fn opened(&self, file: FileId, writable: bool) {
        let mut inner = self.inner.borrow_mut();
        inner.file(file).open += 1;
        drop(inner);
        if writable {
            self.writer(file, true);
        }
    }

    pub(crate) fn closed(&self, file: FileId, writable: bool) {
        let mut inner = self.inner.borrow_mut();
        // A reset forgets handles that are dropped after it.
        let Some(entry) = inner.files.get_mut(file.0 as usize) else {
            return;
        };
        entry.open = entry.open.saturating_sub(1);
        drop(inner);
        if writable {
            self.writer(file, false);
        }
    }

    pub(crate) fn writer(&self, file: FileId, more: bool) {
        let mut inner = self.inner.borrow_mut();
        let file = inner.file(file);
        file.writers = if more {
            file.writers + 1
        } else {
            file.writers.saturating_sub(1)
        };
        file.contested |= file.writers > 1;
    }

    /// Open handles over all files.
    #[must_use]
    pub fn open_handles(&self) -> u32 {
        self.inner.borrow().files.iter().map(|f| f.open).sum()
    }

    /// Whether two writable handles of the file were open at once.
    #[must_use]
    pub fn contested(&self, file: FileId) -> bool {
        self.inner.borrow_mut().file(file).contested
    }

    pub(crate) fn options(&self) -> DiskOptions {
        self.inner.borrow().options
    }

    pub(crate) fn length(&self, file: FileId) -> u64 {
        self.inner.borrow_mut().file(file).data.len() as u64
    }

    pub(crate) fn extent(&self, file: FileId, offset: u64) -> Result<Extent, Errno> {
        let mut inner = self.inner.borrow_mut();
        let file = inner.file(file);
        if offset >= file.data.len() as u64 {
            return Err(Errno::ENXIO);
        }
        Ok(file.extent(offset))
    }

    /// How many requests wait to be completed.
    #[must_use]
    pub fn pending(&self) -> usize {
        self.inner.borrow().pending.len()
    }

    /// The identity of the i-th oldest pending request.
    #[must_use]
    pub fn pending_key(&self, i: usize) -> Key {
        let inner = self.inner.borrow();
        inner.requests[inner.pending[i] as usize].key
    }

    /// The pending requests, oldest first.
    #[must_use]
    pub fn describe_pending(&self) -> Vec<PendingRequest> {
        let inner = self.inner.borrow();
        let describe = |&slot: &u32| {
            let request = &inner.requests[slot as usize];
            let file = inner.files[request.file.0 as usize].name.clone();
            PendingRequest {
                number: request.number,
                file,
                op: request.op,
            }
        };
        inner.pending.iter().map(describe).collect()
    }

    /// Carries out the i-th oldest pending request and wakes who waits for it.
    ///
    /// # Panics
    /// When there is none: a bug of the caller.
    pub fn complete(&self, i: usize) {
        let waker = self.inner.borrow_mut().complete(i);
        waker.wake();
    }

    /// The file of the i-th oldest pending request, and what the request does.
    #[must_use]
    pub fn pending_op(&self, i: usize) -> (FileId, Op) {
        let inner = self.inner.borrow();
        let request = &inner.requests[inner.pending[i] as usize];
        (request.file, request.op)
    }

    /// In how many ways the i-th oldest pending request can end; the first is well.
    #[must_use]
    pub fn endings(&self, i: usize) -> u32 {
        self.pending_op(i).1.endings()
    }

    /// Makes the i-th oldest pending request fail in one of these ways (1 on) and wakes who waits for it.
    ///
    /// # Panics
    /// When there is no such request or way: a bug of the caller.
    pub fn fail(&self, i: usize, ending: u32) -> BadEnd {
        assert!((1..self.endings(i)).contains(&ending), "ending {ending}");
        let (bad, waker) = self.inner.borrow_mut().fail(i, ending);
        waker.wake();
        bad
    }

    /// The power fails: what is left of each file. `choose` picks one of so many. The files themselves stay as they are.
    pub fn power_cut(&self, choose: &mut dyn FnMut(u32) -> u32) -> Vec<(FileId, Remains)> {
        let inner = self.inner.borrow();
        let files = (0u32..)
            .map(FileId)
            .zip(&inner.files)
            .filter(|(_, file)| file.exists);
        files
            .map(|(id, file)| {
                let volatile = file.volatile.as_ref().expect("files are followed from the start");
                let pending = inner.pending.iter().map(|slot| &inner.requests[*slot as usize]);
                let under_way = pending
                    .filter(|request| request.file == id)
                    .filter_map(|request| request.op.change(&request.buffer));
                (id, volatile.power_cut(under_way, choose))
            })
            .collect()
    }

    /// A read.
    pub(crate) fn read<'a>(&self, file: FileId, offset: u64, buf: &'a mut [u8]) -> DiskIo<'a> {
        let op = Op::Read {
            offset,
            bytes: buf.len() as u64,
        };
        DiskIo {
            disk: self.clone(),
            file,
            op,
            data: Data::Into(buf),
            slot: None,
        }
    }

    /// A write.
    pub(crate) fn write<'a>(&self, file: FileId, offset: u64, buf: &'a [u8]) -> DiskIo<'a> {
        let op = Op::Write {
            offset,
            bytes: buf.len() as u64,
        };
        DiskIo {
            disk: self.clone(),
            file,
            op,
            data: Data::From(buf),
            slot: None,
        }
    }

    /// Any other request.
    pub(crate) fn request(&self, file: FileId, op: Op) -> DiskIo<'static> {
        DiskIo {
            disk: self.clone(),
            file,
            op,
            data: Data::None,
            slot: None,
        }
    }
}

impl Inner {
    fn find(&self, name: &str) -> Option<FileId> {
        let at = self.files.iter().position(|f| f.exists && f.name == name)?;
        Some(FileId(u32::try_from(at).expect("few files")))
    }

    fn file(&mut self, file: FileId) -> &mut File {
        &mut self.files[file.0 as usize]
    }

    fn check(&self, op: Op) -> Result<(), Errno> {
        let (offset, bytes) = match op {
            Op::Read { offset, bytes } | Op::Write { offset, bytes } => (offset, bytes),
            Op::WriteZeroes { offset, bytes, .. } | Op::Discard { offset, bytes } => {
                if !self.options.unmap {
                    return Err(Errno::ENOTSUP);
                }
                (offset, bytes)
            }
            Op::Flush => return Ok(()),
            Op::Truncate { length } => {
                return if length > MAX_FILE {
                    Err(Errno::EFBIG)
                } else {
                    Ok(())
                };
            }
        };
        let alignment = self.options.alignment;
        // Deallocation passes no data, so it needs no alignment (the generic layer hands odd pieces down).
        let passes_data = matches!(op, Op::Read { .. } | Op::Write { .. });
        assert!(
            !passes_data || (offset.is_multiple_of(alignment) && bytes.is_multiple_of(alignment)),
            "{op:?} is not aligned to {alignment}"
        );
        let reads = matches!(op, Op::Read { .. } | Op::Discard { .. });
        if !reads && offset.checked_add(bytes).is_none_or(|end| end > MAX_FILE) {
            return Err(Errno::EFBIG);
        }
        Ok(())
    }

    fn submit(&mut self, file: FileId, op: Op, data: &[u8], waker: Waker) -> u32 {
        let slot = self.free.pop().unwrap_or_else(|| {
            let (buffer, progress) = (Vec::new(), Progress::Free);
            self.requests.push(Request {
                file,
                op,
                buffer,
                progress,
                number: 0,
                key: Key::request(0, 0),
                found: 0,
            });
            u32::try_from(self.requests.len() - 1).expect("few requests")
        });
        let request = &mut self.requests[slot as usize];
        (request.file, request.op, request.number) = (file, op, self.submitted);
        request.key = self.owners.request();
        let followed = self.files[file.0 as usize].volatile.as_ref();
        request.found = followed.map_or(0, Volatile::so_far);
        request.buffer.clear();
        request.buffer.extend_from_slice(data);
        request.progress = Progress::Pending(waker);
        self.submitted += 1;
        self.pending.push(slot);
        slot
    }

    fn complete(&mut self, i: usize) -> Waker {
        let slot = self.pending.remove(i);
        let request = &mut self.requests[slot as usize];
        let file = &mut self.files[request.file.0 as usize];
        let mut done = 0;
        match request.op {
            Op::Read { offset, bytes } => {
                let start = offset.min(file.data.len() as u64);
                let end = (start + bytes).min(file.data.len() as u64);
                request
                    .buffer
                    .extend_from_slice(&file.data[to_usize(start)..to_usize(end)]);
                done = end - start;
            }
            Op::Write { offset, .. } => file.write(offset, &request.buffer),
            Op::Flush => {
                if let Some(volatile) = &mut file.volatile {
                    volatile.flushed(request.found);
                }
            }
            Op::WriteZeroes {
                offset,
                bytes,
                may_unmap,
            } => file.zero(offset, bytes, true, may_unmap),
            Op::Discard { offset, bytes } => file.zero(offset, bytes, false, true),
            Op::Truncate { length } => file.set_length(to_usize(length)),
        }
        file.follow(request.op.change(&request.buffer));
        match std::mem::replace(&mut request.progress, Progress::Over(Ok(done))) {
            Progress::Pending(waker) => waker,
            Progress::Free | Progress::Over(_) => unreachable!("pending requests are pending"),
        }
    }

    fn fail(&mut self, i: usize, ending: u32) -> (BadEnd, Waker) {
        let slot = self.pending.remove(i);
        let request = &mut self.requests[slot as usize];
        let file = &mut self.files[request.file.0 as usize];
        let bad = request.op.bad_end(ending);
        match request.op {
            Op::Read { bytes, .. } => request.buffer.resize(to_usize(bytes), GARBAGE),
            Op::Write { offset, .. } if bad.done > 0 => {
                file.write(offset, &request.buffer[..to_usize(bad.done)]);
            }
            Op::WriteZeroes {
                offset, may_unmap, ..
            } => file.zero(offset, bad.done, bad.done > 0, may_unmap),
            Op::Discard { offset, .. } => file.zero(offset, bad.done, false, true),
            Op::Write { .. } | Op::Flush | Op::Truncate { .. } => {}
        }
        if bad.done > 0 {
            let done = to_usize(bad.done).min(request.buffer.len());
            file.follow(request.op.first(bad.done).change(&request.buffer[..done]));
        }
        match std::mem::replace(&mut request.progress, Progress::Over(Err(bad.errno))) {
            Progress::Pending(waker) => (bad, waker),
            Progress::Free | Progress::Over(_) => unreachable!("pending requests are pending"),
        }
    }

    fn release(&mut self, slot: u32) {
        let request = &mut self.requests[slot as usize];
        request.progress = Progress::Free;
        if request.buffer.capacity() > KEEP_BUFFER {
            request.buffer = Vec::new();
        }
        self.free.push(slot);
    }
}

#[derive(Debug)]
enum Data<'a> {
    None,
    Into(&'a mut [u8]),
    From(&'a [u8]),
}

/// A request's future: submits on the first poll, ends with the number of bytes read (0 for other requests).
#[derive(Debug)]
pub struct DiskIo<'a> {
    disk: Disk,
    file: FileId,
    op: Op,
    data: Data<'a>,
    slot: Option<u32>,
}

impl Future for DiskIo<'_> {
    type Output = Result<u64, Errno>;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<u64, Errno>> {
        let this = self.get_mut();
        let mut inner = this.disk.inner.borrow_mut();
        let Some(slot) = this.slot else {
            if let Err(errno) = inner.check(this.op) {
                return Poll::Ready(Err(errno));
            }
            let data: &[u8] = if let Data::From(data) = this.data {
                data
            } else {
                &[]
            };
            this.slot = Some(inner.submit(this.file, this.op, data, cx.waker().clone()));
            return Poll::Pending;
        };
        let request = &mut inner.requests[slot as usize];
        match &mut request.progress {
            Progress::Pending(waker) => {
                waker.clone_from(cx.waker());
                Poll::Pending
            }
            Progress::Over(result) => {
                let result = *result;
                if let Data::Into(buf) = &mut this.data {
                    buf[..request.buffer.len()].copy_from_slice(&request.buffer);
                }
                inner.release(slot);
                this.slot = None;
                Poll::Ready(result)
            }
            Progress::Free => unreachable!("a slot is held until its future ends"),
        }
    }
}

impl Drop for DiskIo<'_> {
    fn drop(&mut self) {
        // Only at the teardown of a run; the request never reaches the file.
        if let Some(slot) = self.slot.take() {
            let mut inner = self.disk.inner.borrow_mut();
            inner.pending.retain(|&s| s != slot);
            inner.release(slot);
        }
    }
}

#[cfg(test)]
#[path = "disk_tests.rs"]
mod tests;
