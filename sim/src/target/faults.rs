//! Which storage requests may fail by the scenario: each one that its `faults` name is counted, just before it ends.
//!
//! Rules: one way of counting for every target that can fail requests. The request that fails need not be the same one: which
//! is the n-th depends on what a target asks of its storage, and in which order.

use crate::disk::{BadEnd, Op};
use crate::history::{Fault, FaultKind};
use crate::scenario::Faults;

/// Follows one run.
#[derive(Debug, Default)]
pub(super) struct Ordered {
    faults: Option<Faults>,
    /// Storage requests so far that `faults` are about.
    matched: u32,
}

impl Ordered {
    pub(super) fn new(faults: Option<Faults>) -> Ordered {
        Ordered { faults, matched: 0 }
    }

    /// In how many ways this request on the file of this image can end, well included; counts it.
    pub(super) fn endings(&mut self, image: u32, op: Op) -> u32 {
        let Some(faults) = self.faults else { return 1 };
        if faults.image.is_some_and(|i| i != image) || !faults.concerns(fault_of(image, op).kind) {
            return 1;
        }
        let nth = self.matched;
        self.matched += 1;
        if faults.from <= nth && faults.until.is_none_or(|until| nth < until) {
            op.endings()
        } else {
            1
        }
    }
}

/// A request that ends like this, as history tells it.
pub(super) fn failed(image: u32, op: Op, bad: BadEnd) -> Fault {
    Fault {
        done: bad.done,
        errno: bad.errno.0,
        ..fault_of(image, op)
    }
}

fn fault_of(image: u32, op: Op) -> Fault {
    let (kind, offset, bytes) = match op {
        Op::Read { offset, bytes } => (FaultKind::Read, offset, bytes),
        Op::Write { offset, bytes } => (FaultKind::Write, offset, bytes),
        Op::WriteZeroes { offset, bytes, .. } => (FaultKind::WriteZeroes, offset, bytes),
        Op::Discard { offset, bytes } => (FaultKind::Discard, offset, bytes),
        Op::Flush => (FaultKind::Flush, 0, 0),
        Op::Truncate { length } => (FaultKind::Truncate, length, 0),
    };
    Fault {
        image,
        kind,
        offset,
        bytes,
        done: 0,
        errno: 0,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_the_scenario_names_is_counted_and_may_fail() {
        let read = Op::Read { offset: 0, bytes: 1 };
        let plan = Faults {
            from: 1,
            until: Some(2),
            image: Some(1),
            writes: false,
            ..Faults::default()
        };
        let mut ordered = Ordered::new(Some(plan));
        let others = [(0, read), (1, Op::Write { offset: 0, bytes: 1 })];
        assert!(others.iter().all(|(image, op)| ordered.endings(*image, *op) == 1));
        assert_eq!(ordered.endings(1, Op::Flush), 1, "the first one is spared");
        assert_eq!(ordered.endings(1, read), 2);
        assert_eq!(ordered.endings(1, read), 1, "the window is over");
        assert_eq!(Ordered::new(None).endings(1, read), 1);
    }
}
