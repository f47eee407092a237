//! Counting what is in flight, the gate in front of it, and freezing.
//!
//! Rules: a drainer closes the gate and waits for zero; a request counts itself *before* it looks at the gate. The
//! fences in between make one of the two see the other (loom explores exactly this in `tests/loom.rs`).

use super::prim::{AtomicU32, Ordering, fence};
use super::wait::WaitQueue;

/// A count of things in flight. `SeqCst`-correct with a drainer on another thread, when whoever brings it to zero
/// then wakes a [`WaitQueue`] on which the drainer listened before it looked.
#[derive(Debug, Default)]
pub struct InFlight(AtomicU32);

impl InFlight {
    /// One more.
    #[inline]
    pub fn begin(&self) {
        self.0.fetch_add(1, Ordering::SeqCst);
    }

    /// One less; true when it became zero.
    ///
    /// # Panics
    /// When nothing was in flight.
    #[inline]
    pub fn end(&self) -> bool {
        let before = self.0.fetch_sub(1, Ordering::SeqCst);
        assert!(before > 0, "in-flight count went below zero");
        before == 1
    }

    /// How many now.
    #[inline]
    #[must_use]
    pub fn count(&self) -> u32 {
        self.0.load(Ordering::SeqCst)
    }
}

/// A door that drained sections close: requests inside are counted, new ones park in FIFO order (graph.md 5.8).
///
/// A parked request counts itself again and looks again when woken, so none slips into a section that began between
/// its wake and its resumption. `idle` is where drainers listen; it is shared by all gates of a layer.
#[derive(Debug, Default)]
pub struct Gate {
    closed: AtomicU32,
    in_flight: InFlight,
    parked: WaitQueue,
}

impl Gate {
    /// Counts a request, if the gate is open. When it is not, the caller parks with [`Gate::enter`].
    #[inline]
    pub fn try_enter(&self, idle: &WaitQueue) -> bool {
        self.in_flight.begin();
        fence(Ordering::SeqCst);
        if self.closed.load(Ordering::SeqCst) == 0 {
            return true;
        }
        self.exit(idle);
        false
    }

    /// Counts a request, waiting while the gate is closed.
    pub async fn enter(&self, idle: &WaitQueue) {
        while !self.try_enter(idle) {
            let opened = self.parked.listen();
            if self.closed.load(Ordering::SeqCst) != 0 {
                opened.await;
            }
        }
    }

    /// Counts a request whose owner promises to stop by itself (queuing disabled).
    #[inline]
    pub fn enter_closed(&self) {
        self.in_flight.begin();
    }

    /// A request is done.
    #[inline]
    pub fn exit(&self, idle: &WaitQueue) {
        if self.in_flight.end() {
            idle.wake_all();
        }
    }

    /// Closes once more; true when it was open. The drainer then waits until [`Gate::in_flight`] is 0.
    pub fn close(&self) -> bool {
        let before = self.closed.fetch_add(1, Ordering::SeqCst);
        fence(Ordering::SeqCst);
        before == 0
    }

    /// Takes one close back; at the last one wakes the parked, oldest first, and returns true.
    ///
    /// # Panics
    /// When it was open.
    pub fn open(&self) -> bool {
        let before = self.closed.fetch_sub(1, Ordering::SeqCst);
        assert!(before > 0, "gate opened more often than closed");
        if before == 1 {
            self.parked.wake_all();
        }
        before == 1
    }

    /// How often it is closed.
    #[must_use]
    pub fn closed(&self) -> u32 {
        self.closed.load(Ordering::SeqCst)
    }

    /// Requests inside.
    #[must_use]
    pub fn in_flight(&self) -> u32 {
        self.in_flight.count()
    }
}

/// State of a link: free, frozen by a number of holders, or being changed. Frozen and being changed exclude each other.
#[derive(Debug, Default)]
pub struct FreezeCount(AtomicU32);

/// Being changed.
const CHANGING: u32 = u32::MAX;

impl FreezeCount {
    /// One more holder; false while somebody changes the link.
    pub fn try_freeze(&self) -> bool {
        let mut now = self.0.load(Ordering::SeqCst);
        loop {
            if now == CHANGING {
                return false;
            }
            match self
                .0
                .compare_exchange(now, now + 1, Ordering::SeqCst, Ordering::SeqCst)
            {
                Ok(_) => return true,
                Err(seen) => now = seen,
            }
        }
    }

    /// One holder less.
    ///
    /// # Panics
    /// When it is not frozen.
    pub fn thaw(&self) {
        let before = self.0.fetch_sub(1, Ordering::SeqCst);
        assert!(
            before != 0 && before != CHANGING,
            "thaw of a link that is not frozen"
        );
    }

    /// Starts a change; false while frozen or while somebody else changes it.
    #[must_use]
    pub fn try_change(&self) -> bool {
        self.0
            .compare_exchange(0, CHANGING, Ordering::SeqCst, Ordering::SeqCst)
            .is_ok()
    }

    /// The change is over.
    ///
    /// # Panics
    /// When none was begun.
    pub fn changed(&self) {
        let before = self.0.swap(0, Ordering::SeqCst);
        assert_eq!(before, CHANGING, "end of a change that was not begun");
    }

    /// Whether somebody froze it.
    #[inline]
    #[must_use]
    pub fn get(&self) -> bool {
        !matches!(self.0.load(Ordering::SeqCst), 0 | CHANGING)
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;

    #[test]
    fn frozen_excludes_changing() {
        let link = FreezeCount::default();
        assert!(link.try_freeze() && link.try_freeze());
        assert!(!link.try_change());
        link.thaw();
        assert!(link.get() && !link.try_change());
        link.thaw();
        assert!(!link.get() && link.try_change());
        assert!(!link.try_freeze() && !link.try_change() && !link.get());
        link.changed();
        assert!(link.try_freeze());
    }

    #[test]
    #[should_panic(expected = "not frozen")]
    fn thaw_needs_a_freeze() {
        FreezeCount::default().thaw();
    }

    #[test]
    #[should_panic(expected = "below zero")]
    fn ends_balance_begins() {
        InFlight::default().end();
    }
}
