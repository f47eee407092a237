//! Who started what: identities of tasks and storage requests that do not depend on the schedule.
//!
//! Rules: a task belongs to the step whose operation started it, or to that of the task which started it; a storage
//! request belongs to the step of the task that submitted it. Within a step they are counted. So "the second request
//! of step 7" means the same in a run where another step was dropped or other choices were made, as far as step 7 does the
//! same there. This is what lets the shrinker carry a schedule over from one scenario to a smaller one.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use crate::choice::Key;
use crate::history::StepId;

#[derive(Debug, Default)]
struct Books {
    /// Whose code runs now: 0 is the runner's own, else a step plus 1.
    current: Cell<u32>,
    /// Tasks and requests so far, by owner.
    started: RefCell<Vec<[u32; 2]>>,
}

/// The books of one run. Cheap to clone.
#[derive(Clone, Debug, Default)]
pub struct Owners {
    books: Rc<Books>,
}

impl Owners {
    /// Forgets the last run, keeps its memory.
    pub fn reset(&self) {
        self.books.current.set(0);
        self.books.started.borrow_mut().clear();
    }

    /// From now on things are started for this step; `None`: for the runner.
    pub fn enter(&self, step: Option<StepId>) {
        self.books.current.set(step.map_or(0, |step| step.0 + 1));
    }

    /// From now on things are started for the step of this task.
    #[inline]
    pub fn enter_task(&self, task: Key) {
        self.books.current.set(task.owner());
    }

    /// The identity of a task that starts now.
    #[must_use]
    pub fn task(&self) -> Key {
        let (owner, number) = self.next(0);
        Key::task(owner, number)
    }

    /// The identity of a storage request that is submitted now.
    #[must_use]
    pub fn request(&self) -> Key {
        let (owner, number) = self.next(1);
        Key::request(owner, number)
    }

    fn next(&self, what: usize) -> (u32, u32) {
        let owner = self.books.current.get();
        let mut started = self.books.started.borrow_mut();
        let at = owner as usize;
        if at >= started.len() {
            started.resize(at + 1, [0; 2]);
        }
        let number = started[at][what];
        started[at][what] += 1;
        (owner, number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn things_are_counted_within_their_owner() {
        let owners = Owners::default();
        owners.enter(Some(StepId(4)));
        let (first, request) = (owners.task(), owners.request());
        owners.enter(Some(StepId(9)));
        let other = owners.task();
        owners.enter_task(first);
        assert_eq!(owners.task(), Key::task(5, 1));
        assert_eq!((first, request), (Key::task(5, 0), Key::request(5, 0)));
        assert_eq!(other, Key::task(10, 0));
        owners.reset();
        assert_eq!(owners.task(), Key::task(0, 0));
    }
}
