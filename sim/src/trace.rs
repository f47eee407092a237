//! The trace of a run as one running hash, and a ring of its last values, so that two runs that should be equal can
//! be compared and the first record in which they differ can be named.
//!
//! Rules: folded from the structure of the records, never from formatted text; no address, time of day or thread goes
//! in; equal in debug and release and on every machine. Every field of every record counts.

use blkcheck_impl::event::{Event, Parent};
use serde_json::Value;

use crate::history::{Outcome, Record};

/// The running hash.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Fold(u64);

impl Default for Fold {
    fn default() -> Fold {
        Fold(0x6b63_6568_636b_6c62)
    }
}

impl Fold {
    /// The hash so far.
    #[must_use]
    pub fn value(self) -> u64 {
        // The last multiplication leaves the low bits weak.
        let mut z = self.0;
        z = (z ^ (z >> 32)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        z ^ (z >> 32)
    }

    /// The hash of these bytes and nothing else.
    #[must_use]
    pub(crate) fn of(bytes: &[u8]) -> u64 {
        let mut fold = Fold::default();
        fold.bytes(bytes);
        fold.value()
    }

    #[inline]
    fn word(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    }

    fn pair(&mut self, a: u32, b: u32) {
        self.word(u64::from(a) << 32 | u64::from(b));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.word(bytes.len() as u64);
        let (words, rest) = bytes.as_chunks::<8>();
        for word in words {
            self.word(u64::from_le_bytes(*word));
        }
        let mut last = [0; 8];
        last[..rest.len()].copy_from_slice(rest);
        self.word(u64::from_le_bytes(last));
    }

    fn text(&mut self, text: &str) {
        self.bytes(text.as_bytes());
    }

    fn errno<T>(&mut self, result: &Result<T, i32>) {
        self.word(
            result
                .as_ref()
                .err()
                .map_or(u64::MAX, |&e| u64::from(e.unsigned_abs())),
        );
    }

    fn json(&mut self, value: &Value) {
        match value {
            Value::Null => self.word(1),
            Value::Bool(b) => self.word(2 + u64::from(*b)),
            Value::Number(n) => {
                self.word(4);
                match (n.as_u64(), n.as_i64(), n.as_f64()) {
                    (Some(u), _, _) => self.word(u),
                    (_, Some(i), _) => self.word(i.cast_unsigned()),
                    (_, _, f) => self.word(f.unwrap_or(f64::NAN).to_bits()),
                }
            }
            Value::String(s) => {
                self.word(5);
                self.text(s);
            }
            Value::Array(items) => {
                self.word(6);
                self.word(items.len() as u64);
                items.iter().for_each(|item| self.json(item));
            }
            Value::Object(map) => {
                self.word(7);
                self.word(map.len() as u64);
                for (key, value) in map {
                    self.text(key);
                    self.json(value);
                }
            }
        }
    }

    /// Takes in one record.
    pub fn record(&mut self, record: &Record) {
        match record {
            Record::Issued(step) => self.pair(1, step.0),
            Record::Ended(step, outcome) => {
                self.pair(2, step.0);
                self.outcome(outcome);
            }
            Record::Layer(event) => self.event(event),
            Record::PowerCut {
                image,
                volatile,
                kept,
                sectors,
                hash,
            } => {
                self.word(5);
                self.pair(*image, *volatile);
                self.word(u64::from(*kept));
                for word in sectors {
                    self.word(*word);
                }
                self.word(*hash);
            }
            Record::Fault(fault) => {
                self.pair(3, fault.image);
                self.pair(fault.kind as u32, fault.errno.unsigned_abs());
                for word in [fault.offset, fault.bytes, fault.done] {
                    self.word(word);
                }
            }
        }
    }

    fn outcome(&mut self, outcome: &Outcome) {
        match outcome {
            Outcome::Command(Ok(value)) => {
                self.word(1);
                self.json(value);
            }
            Outcome::Command(Err(refusal)) => {
                self.word(2);
                self.text(&refusal.class);
                self.text(&refusal.desc);
            }
            Outcome::Read(result) => {
                self.word(3);
                self.errno(result);
                if let Ok(bytes) = result {
                    self.bytes(bytes);
                }
            }
            Outcome::Done(result) => {
                self.word(4);
                self.errno(result);
            }
            Outcome::Status(result) => {
                self.word(5);
                self.errno(result);
                for run in result.as_deref().unwrap_or(&[]) {
                    self.pair(u32::from(run.flags), run.depth);
                    self.word(run.bytes);
                }
            }
            Outcome::NoExport => self.word(6),
            Outcome::Passed => self.word(7),
            Outcome::NoNode => self.word(8),
        }
    }

    fn parent(&mut self, parent: Parent) {
        match parent {
            Parent::Node(id) => self.pair(1, id.0),
            Parent::Backend(id) => self.pair(2, id.0),
            Parent::Job(id) => self.pair(3, id.0),
        }
    }

    fn event(&mut self, event: &Event) {
        self.word(tag(event));
        match event {
            Event::NodeAdded { node, name, driver } => {
                self.pair(0, node.0);
                self.text(name);
                self.text(driver);
            }
            Event::NodeRemoved { node }
            | Event::DrainBegin { node }
            | Event::Drained { node }
            | Event::DrainEnd { node } => self.pair(0, node.0),
            Event::EdgeSet {
                edge,
                parent,
                role,
                from,
                to,
            } => {
                self.pair(edge.0, u32::from(role.bits()));
                self.parent(*parent);
                self.pair(from.map_or(u32::MAX, |n| n.0), to.map_or(u32::MAX, |n| n.0));
            }
            Event::EdgePerms { edge, perm, shared } => {
                self.pair(edge.0, u32::from(perm.bits()) << 8 | u32::from(shared.bits()));
            }
            Event::Frozen { edge } | Event::Unfrozen { edge } => self.pair(0, edge.0),
            Event::BackendBegin { backend }
            | Event::BackendQueued { backend }
            | Event::BackendResumed { backend }
            | Event::BackendEnd { backend } => self.pair(0, backend.0),
            Event::RequestBegin {
                request,
                node,
                edge,
                kind,
                offset,
                bytes,
                flags,
            } => {
                self.word(request.0);
                self.pair(node.0, edge.0);
                self.pair(*kind as u32, u32::from(flags.bits()));
                self.word(*offset);
                self.word(*bytes);
            }
            Event::RequestWaits { request, on } => {
                self.word(request.0);
                self.word(on.0);
            }
            Event::RequestEnd {
                request,
                node,
                result,
            } => {
                self.word(request.0);
                self.pair(node.0, result.err().map_or(0, |e| e.0.unsigned_abs()));
            }
            Event::ThrottleQueued { node, group } => {
                self.text(group);
                self.word(u64::from(node.0));
            }
            Event::ThrottleResumed { node, drained } => self.pair(node.0, u32::from(*drained)),
            Event::CopyOnRead {
                node,
                offset,
                bytes,
                zero,
            } => {
                self.pair(node.0, u32::from(*zero));
                self.word(*offset);
                self.word(*bytes);
            }
            Event::CopyBeforeWrite {
                filter,
                source,
                target,
                cluster,
            } => {
                self.pair(filter.0, source.0);
                self.word(u64::from(target.0));
                self.word(*cluster);
            }
            Event::FilterInserted { filter, below } => self.pair(filter.0, below.0),
            Event::CopyBegin {
                filter,
                task,
                offset,
                bytes,
                zero,
                background,
            } => {
                self.pair(filter.0, u32::from(*zero) | u32::from(*background) << 1);
                self.word(*task);
                self.word(*offset);
                self.word(*bytes);
            }
            Event::CopyEnd { filter, task, result } | Event::CopyOffloaded { filter, task, result } => {
                self.pair(filter.0, result.err().map_or(0, |e| e.0.unsigned_abs()));
                self.word(*task);
            }
            Event::CopySkipped {
                filter,
                offset,
                bytes,
            }
            | Event::CopyWaits {
                filter,
                offset,
                bytes,
            } => {
                self.word(u64::from(filter.0));
                self.word(*offset);
                self.word(*bytes);
            }
            Event::SnapshotBroken { filter, errno } => self.pair(filter.0, errno.0.unsigned_abs()),
            Event::JobStatus { job, id, from, to } => {
                self.text(id);
                self.pair(job.0, (*from as u32) << 8 | *to as u32);
            }
            Event::JobPauseCount { job, count } => self.pair(job.0, *count),
            Event::JobChunk {
                job,
                offset,
                bytes,
                copied,
            } => {
                self.pair(job.0, u32::from(*copied));
                self.word(*offset);
                self.word(*bytes);
            }
            Event::MainBegin { what } | Event::MainEnd { what } => self.text(what),
            Event::Qmp { name, data } => {
                self.text(name);
                self.json(data);
            }
        }
    }
}

fn tag(event: &Event) -> u64 {
    0x100
        + match event {
            Event::NodeAdded { .. } => 0,
            Event::NodeRemoved { .. } => 1,
            Event::EdgeSet { .. } => 2,
            Event::EdgePerms { .. } => 3,
            Event::Frozen { .. } => 4,
            Event::Unfrozen { .. } => 5,
            Event::DrainBegin { .. } => 6,
            Event::Drained { .. } => 7,
            Event::DrainEnd { .. } => 8,
            Event::BackendBegin { .. } => 9,
            Event::BackendQueued { .. } => 10,
            Event::BackendResumed { .. } => 11,
            Event::BackendEnd { .. } => 12,
            Event::RequestBegin { .. } => 13,
            Event::RequestWaits { .. } => 14,
            Event::RequestEnd { .. } => 15,
            Event::CopyOnRead { .. } => 16,
            Event::JobStatus { .. } => 17,
            Event::JobPauseCount { .. } => 18,
            Event::JobChunk { .. } => 19,
            Event::MainBegin { .. } => 20,
            Event::MainEnd { .. } => 21,
            Event::Qmp { .. } => 22,
            Event::ThrottleQueued { .. } => 23,
            Event::ThrottleResumed { .. } => 24,
            Event::CopyBeforeWrite { .. } => 25,
            Event::FilterInserted { .. } => 26,
            Event::CopyBegin { .. } => 27,
            Event::CopyEnd { .. } => 28,
            Event::CopySkipped { .. } => 29,
            Event::CopyWaits { .. } => 30,
            Event::SnapshotBroken { .. } => 31,
            Event::CopyOffloaded { .. } => 32,
        }
}

/// One kept point of a trace.
#[derive(Clone, PartialEq, Debug)]
pub struct Point {
    /// Number of the record in its run.
    pub at: u64,
    /// The running hash after it.
    pub hash: u64,
    /// The scheduler step in which it was made.
    pub step: u64,
    /// The record.
    pub record: Record,
}

/// The last records of a run with the running hash after each.
#[derive(Clone, Debug, Default)]
pub struct Trace {
    ring: std::collections::VecDeque<Point>,
    capacity: usize,
}

impl Trace {
    /// Keeps the last `capacity` records; 0 keeps nothing and costs nothing.
    #[must_use]
    pub fn with_capacity(capacity: usize) -> Trace {
        Trace {
            ring: std::collections::VecDeque::new(),
            capacity,
        }
    }

    pub(crate) fn clear(&mut self) {
        self.ring.clear();
    }

    #[inline]
    pub(crate) fn push(&mut self, at: u64, hash: Fold, step: u64, record: &Record) {
        if self.capacity == 0 {
            return;
        }
        if self.ring.len() == self.capacity {
            self.ring.pop_front();
        }
        self.ring.push_back(Point {
            at,
            hash: hash.value(),
            step,
            record: record.clone(),
        });
    }

    /// What is kept, oldest first.
    pub fn points(&self) -> impl Iterator<Item = &Point> {
        self.ring.iter()
    }

    /// The point of the record with this number, if it is kept.
    fn at(&self, at: u64) -> Option<&Point> {
        let first = self.ring.front()?.at;
        self.ring.get(usize::try_from(at.checked_sub(first)?).ok()?)
    }
}

/// Where two traces part.
#[derive(Clone, PartialEq, Debug)]
pub struct Difference {
    /// Number of the first record that differs.
    pub at: u64,
    /// In the first run; `None` when that run had ended.
    pub first: Option<Point>,
    /// In the second run.
    pub second: Option<Point>,
    /// Whether the record before it is known to be equal; false when the rings do not reach back that far.
    pub exact: bool,
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let side = |point: &Option<Point>| {
            point.as_ref().map_or_else(
                || "the run was over".to_owned(),
                |p| format!("step {}: {:?}", p.step, p.record),
            )
        };
        let earlier = if self.exact { "" } else { " or before" };
        write!(
            f,
            "record {}{earlier}: first {}; then {}",
            self.at,
            side(&self.first),
            side(&self.second)
        )
    }
}

/// The first record in which two runs differ, or `None` when all kept ones are equal.
#[must_use]
pub fn first_difference(first: &Trace, second: &Trace) -> Option<Difference> {
    let start = |t: &Trace| t.ring.front().map(|p| p.at);
    let end = |t: &Trace| t.ring.back().map_or(0, |p| p.at + 1);
    let from = match (start(first), start(second)) {
        (Some(a), Some(b)) => a.max(b),
        (None, None) => return None,
        (a, b) => a.or(b)?,
    };
    for at in from..end(first).max(end(second)) {
        let (a, b) = (first.at(at), second.at(at));
        if a.map(|p| p.hash) != b.map(|p| p.hash) {
            // At the very start of a run, or after a point that was equal.
            let exact = at == 0 || at > from;
            return Some(Difference {
                at,
                first: a.cloned(),
                second: b.cloned(),
                exact,
            });
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::history::StepId;

    fn trace(steps: &[u32], capacity: usize) -> Trace {
        let (mut trace, mut fold) = (Trace::with_capacity(capacity), Fold::default());
        for (at, &step) in steps.iter().enumerate() {
            let record = Record::Issued(StepId(step));
            fold.record(&record);
            trace.push(at as u64, fold, at as u64, &record);
        }
        trace
    }

    #[test]
    fn the_first_difference_is_found_although_later_records_are_equal_again() {
        let difference =
            first_difference(&trace(&[1, 2, 3, 4], 100), &trace(&[1, 9, 3, 4], 100)).expect("differ");
        assert_eq!((difference.at, difference.exact), (1, true));
        assert_eq!(difference.first.expect("there").record, Record::Issued(StepId(2)));
        assert_eq!(
            difference.second.expect("there").record,
            Record::Issued(StepId(9))
        );
        assert_eq!(first_difference(&trace(&[1, 2], 9), &trace(&[1, 2], 9)), None);
    }

    #[test]
    fn a_run_that_ends_early_differs_and_a_short_ring_says_so() {
        let longer = first_difference(&trace(&[1, 2], 9), &trace(&[1, 2, 3], 9)).expect("differ");
        assert_eq!((longer.at, longer.first.is_none(), longer.exact), (2, true, true));
        let short = first_difference(&trace(&[1, 2, 3, 4], 2), &trace(&[9, 2, 3, 4], 2)).expect("differ");
        assert_eq!((short.at, short.exact), (2, false));
    }

    #[test]
    fn the_hash_depends_on_every_part_and_never_changes() {
        let of = |records: &[Record]| {
            let mut fold = Fold::default();
            records.iter().for_each(|r| fold.record(r));
            fold.value()
        };
        let read = |bytes: &[u8]| Record::Ended(StepId(1), Outcome::Read(Ok(bytes.into())));
        let values = [
            of(&[]),
            of(&[read(&[0; 8])]),
            of(&[read(&[0; 9])]),
            of(&[read(&[0, 0, 0, 0, 0, 0, 0, 1])]),
            of(&[Record::Ended(StepId(1), Outcome::Read(Err(5)))]),
            of(&[Record::Ended(StepId(1), Outcome::Done(Err(5)))]),
            of(&[Record::Issued(StepId(1)), Record::Issued(StepId(2))]),
            of(&[Record::Issued(StepId(2)), Record::Issued(StepId(1))]),
        ];
        let mut unique = values.to_vec();
        unique.sort_unstable();
        unique.dedup();
        assert_eq!(unique.len(), values.len());
    }
}
