//! Who may still be touching a cluster that was unmapped.
//!
//! A data request that looked a cluster up enters the current epoch until it is done. A freed cluster is tagged
//! with the epoch of its removal; it may be reused once every epoch up to that one is empty. So a read (or an
//! in-place write) that races with a discard never meets the cluster's next owner. A cluster that became zero and
//! kept its place waits likewise before it takes data again.

use std::cell::RefCell;
use std::collections::VecDeque;

use super::lock::Gate;

#[derive(Debug)]
struct State {
    /// Number of the oldest epoch still kept.
    base: u64,
    /// Requests in each epoch from `base` on; never empty, the last one is current.
    counts: VecDeque<u32>,
}

/// The epochs of one image.
#[derive(Debug)]
pub(super) struct Epochs {
    state: RefCell<State>,
    /// Opens whenever an epoch is over.
    over: Gate,
}

impl Default for Epochs {
    fn default() -> Epochs {
        Epochs {
            state: RefCell::new(State {
                base: 0,
                counts: VecDeque::from([0]),
            }),
            over: Gate::default(),
        }
    }
}

impl Epochs {
    /// Marks a data request over mapped clusters, looked up in the same synchronous step.
    #[inline]
    pub(super) fn enter(&self) -> EpochGuard<'_> {
        let mut state = self.state.borrow_mut();
        let epoch = state.base + state.counts.len() as u64 - 1;
        *state.counts.back_mut().expect("there is a current epoch") += 1;
        EpochGuard { epochs: self, epoch }
    }

    /// The tag of clusters unmapped just now; later requests enter a newer epoch.
    pub(super) fn retire(&self) -> u64 {
        let mut state = self.state.borrow_mut();
        if state.counts.len() == 1 && state.counts[0] == 0 {
            // Nobody is in flight at all: safe at once.
            let tag = state.base;
            state.base += 1;
            return tag;
        }
        let tag = state.base + state.counts.len() as u64 - 1;
        if *state.counts.back().expect("there is a current epoch") > 0 {
            state.counts.push_back(0);
            return tag;
        }
        // The current epoch is empty, older ones are not: those are who we wait for.
        tag - 1
    }

    /// Whether no request of epoch `tag` or before is in flight.
    pub(super) fn is_over(&self, tag: u64) -> bool {
        tag < self.state.borrow().base
    }

    /// Waits until no request of epoch `tag` or before is in flight.
    pub(super) async fn wait_over(&self, tag: u64) {
        loop {
            let over = self.over.wait();
            if self.is_over(tag) {
                return;
            }
            over.await;
        }
    }
}

/// A data request in flight.
#[derive(Debug)]
pub(super) struct EpochGuard<'a> {
    epochs: &'a Epochs,
    epoch: u64,
}

impl Drop for EpochGuard<'_> {
    #[inline]
    fn drop(&mut self) {
        let mut state = self.epochs.state.borrow_mut();
        let before = state.base;
        let index = usize::try_from(self.epoch - before).expect("epoch of a guard is kept");
        state.counts[index] -= 1;
        while state.counts.len() > 1 && state.counts[0] == 0 {
            state.counts.pop_front();
            state.base += 1;
        }
        let ended = state.base > before;
        drop(state);
        if ended {
            self.epochs.over.open();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tag_is_over_when_everyone_before_left() {
        let epochs = Epochs::default();
        let idle = epochs.retire();
        assert!(epochs.is_over(idle), "nobody was reading");
        let old = epochs.enter();
        let tag = epochs.retire();
        let same = epochs.retire();
        assert_eq!(tag, same);
        let young = epochs.enter();
        assert!(!epochs.is_over(tag));
        let later = epochs.retire();
        assert!(later > tag);
        drop(old);
        assert!(epochs.is_over(tag), "the younger request does not matter");
        assert!(!epochs.is_over(later));
        drop(young);
        assert!(epochs.is_over(later));
        let again = epochs.enter();
        assert!(epochs.is_over(later));
        drop(again);
    }
}
