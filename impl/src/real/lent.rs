//! Memory that writers lend, so that a worker can write from it while this thread reads the next stretch.
//!
//! Rules: whoever lends does not touch the memory as long as it is shared, which its type sees to. A write finds out by
//! itself whether its bytes lie in lent memory: through however many layers they came, they are where they were. Layers that
//! put bytes together anew (padding, copied edges, encoding) write from memory of their own, and nothing is lost but the
//! worker. There is one worker a file, with a queue: the kernel takes the inode's lock for a write, and a second one would
//! burn the CPU that reads while it waits for that; without a queue the worker would wait for this thread after every write.

use std::cell::{OnceCell, RefCell};
use std::fs::File;
use std::ops::Range;
use std::sync::{Arc, Weak, mpsc};

use futures_channel::oneshot;
use rustix::io::Errno as Os;

use super::storage::write_all;

/// Shorter writes are made at once, bytes: far above what handing one over costs. Chosen, not measured.
const WORTH_A_WORKER: usize = 256 << 10;

/// All memory that is lent.
#[derive(Debug, Default)]
pub(super) struct Shelf(RefCell<Vec<Weak<Vec<u8>>>>);

/// Bytes of lent memory.
#[derive(Debug)]
pub(super) struct Share {
    memory: Arc<Vec<u8>>,
    range: Range<usize>,
}

impl Share {
    fn bytes(&self) -> &[u8] {
        &self.memory[self.range.clone()]
    }
}

impl Shelf {
    pub(super) fn add(&self, memory: &Arc<Vec<u8>>) {
        let mut lent = self.0.borrow_mut();
        lent.retain(|lent| lent.strong_count() > 0);
        lent.push(Arc::downgrade(memory));
    }

    /// A share of `buf`, if it is part of what is lent and a worker pays.
    pub(super) fn share(&self, buf: &[u8]) -> Option<Share> {
        if buf.len() < WORTH_A_WORKER {
            return None;
        }
        self.0.borrow().iter().find_map(|lent| {
            let memory = lent.upgrade()?;
            // Both are alive: addresses that lie within are the same bytes.
            let (all, part) = (memory.as_ptr_range(), buf.as_ptr_range());
            let inside = all.start <= part.start && part.end <= all.end;
            let start = inside.then(|| part.start.addr() - all.start.addr())?;
            let range = start..start + buf.len();
            Some(Share { memory, range })
        })
    }
}

/// A write for a worker.
#[derive(Debug)]
struct Write {
    file: Arc<File>,
    offset: u64,
    share: Share,
    done: oneshot::Sender<Result<(), Os>>,
}

/// Who writes to a file from lent memory: a thread once somebody needs it, until this is dropped.
#[derive(Debug, Default)]
pub(super) struct Worker(OnceCell<Option<mpsc::Sender<Write>>>);

impl Worker {
    /// Writes what is shared, in the order of the calls; at once where the system has no thread to give.
    pub(super) async fn write(&self, file: Arc<File>, offset: u64, share: Share) -> Result<(), Os> {
        let Some(worker) = self.0.get_or_init(start) else {
            return write_all(&file, offset, share.bytes());
        };
        let (done, result) = oneshot::channel();
        let write = Write {
            file,
            offset,
            share,
            done,
        };
        worker.send(write).expect("it ends when nobody can send any more");
        result.await.expect("it answers before it goes on")
    }
}

/// Nothing where no thread is to be had.
fn start() -> Option<mpsc::Sender<Write>> {
    let (sender, receiver) = mpsc::channel::<Write>();
    let work = move || {
        for write in receiver {
            let result = write_all(&write.file, write.offset, write.share.bytes());
            // Before the answer: who lent it wants it back.
            drop(write.share);
            // Nobody listens any more when the run was given up.
            let _ = write.done.send(result);
        }
    };
    let thread = std::thread::Builder::new().name("blkcheck write".to_owned());
    thread.spawn(work).ok().map(|_| sender)
}

#[cfg(test)]
mod tests {
    use super::{Arc, Shelf, WORTH_A_WORKER};

    #[test]
    fn a_share_is_the_very_bytes_and_only_of_what_is_lent() {
        let shelf = Shelf::default();
        let memory = Arc::new((0..=255).cycle().take(3 * WORTH_A_WORKER).collect::<Vec<u8>>());
        let part = &memory[7..7 + WORTH_A_WORKER];
        assert!(shelf.share(part).is_none(), "not lent yet");
        shelf.add(&memory);
        let share = shelf.share(part).expect("lent");
        assert_eq!(share.bytes().as_ptr_range(), part.as_ptr_range());
        assert!(shelf.share(&part[1..]).is_none(), "too short");
        let copy = part.to_vec();
        assert!(shelf.share(&copy).is_none(), "a copy");
        drop(share);
        let back = Arc::try_unwrap(memory).expect("given back with the last share");
        assert!(shelf.share(&back).is_none(), "not lent any more");
    }
}
