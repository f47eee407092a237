//! Requests on one file that overlap, one after another.
//!
//! A disk reads and writes a sector as a whole, and the oracles rely on it. The page cache does not: on ext4 a buffered
//! read beside a buffered write of another thread returns sectors that are half old, half new. So over real files a
//! request that overlaps a write in progress waits here, in order of arrival. What is lost by it is the kernel's own
//! reordering of overlapping requests; the simulated disk has that.

use std::cell::RefCell;
use std::future::poll_fn;
use std::ops::Range;
use std::rc::Rc;
use std::task::{Poll, Waker};

#[derive(Debug)]
struct Held {
    ticket: u64,
    bytes: Range<u64>,
    write: bool,
}

impl Held {
    fn conflicts(&self, other: &Held) -> bool {
        (self.write || other.write)
            && self.bytes.start < other.bytes.end
            && other.bytes.start < self.bytes.end
    }
}

#[derive(Debug, Default)]
struct State {
    /// In order of arrival; those at work and those that wait.
    held: Vec<Held>,
    next: u64,
    waiting: Vec<Waker>,
}

/// The ranges of one file that are in use.
#[derive(Clone, Debug, Default)]
pub(super) struct Ranges {
    state: Rc<RefCell<State>>,
}

/// A range in use; given back when dropped.
#[derive(Debug)]
pub(super) struct InUse {
    ranges: Ranges,
    ticket: u64,
}

impl Ranges {
    /// Waits for every earlier request that overlaps `bytes`, unless both only read.
    pub(super) async fn take(&self, bytes: Range<u64>, write: bool) -> InUse {
        let ticket = {
            let mut state = self.state.borrow_mut();
            let ticket = state.next;
            state.next += 1;
            state.held.push(Held { ticket, bytes, write });
            ticket
        };
        let in_use = InUse {
            ranges: self.clone(),
            ticket,
        };
        poll_fn(|cx| {
            let mut state = self.state.borrow_mut();
            let at = state
                .held
                .iter()
                .position(|h| h.ticket == ticket)
                .expect("held until dropped");
            let (earlier, this) = state.held.split_at(at);
            if earlier.iter().any(|h| h.conflicts(&this[0])) {
                state.waiting.push(cx.waker().clone());
                return Poll::Pending;
            }
            Poll::Ready(())
        })
        .await;
        in_use
    }
}

impl Drop for InUse {
    fn drop(&mut self) {
        let waiting = {
            let mut state = self.ranges.state.borrow_mut();
            state.held.retain(|h| h.ticket != self.ticket);
            std::mem::take(&mut state.waiting)
        };
        waiting.into_iter().for_each(Waker::wake);
    }
}

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::Context;

    use super::*;

    #[test]
    fn overlapping_requests_go_in_order_and_others_do_not_wait() {
        let ranges = Ranges::default();
        let mut cx = Context::from_waker(Waker::noop());
        let mut ready = |future: std::pin::Pin<&mut dyn Future<Output = InUse>>| match future.poll(&mut cx) {
            Poll::Ready(in_use) => Some(in_use),
            Poll::Pending => None,
        };
        let (mut first, mut second) = (pin!(ranges.take(0..10, false)), pin!(ranges.take(5..15, false)));
        let first = ready(first.as_mut()).expect("nobody is here");
        let second = ready(second.as_mut()).expect("readers share");
        let mut writer = pin!(ranges.take(9..10, true));
        assert!(ready(writer.as_mut()).is_none());
        // Not past the writer that waits.
        let mut late = pin!(ranges.take(9..10, false));
        assert!(ready(late.as_mut()).is_none());
        let mut apart = pin!(ranges.take(15..20, true));
        let _apart = ready(apart.as_mut()).expect("touching is not overlapping");
        drop(first);
        assert!(ready(writer.as_mut()).is_none());
        drop(second);
        let writer = ready(writer.as_mut()).expect("the readers are gone");
        assert!(ready(late.as_mut()).is_none());
        drop(writer);
        assert!(ready(late.as_mut()).is_some());
    }
}
