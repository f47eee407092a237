//! Block-copy by itself, over two nodes below a filter.

use std::cell::{Cell, RefCell};
use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use serde_json::json;

use super::*;
use crate::drivers::copy_before_write::{FACTS, block_copy};
use crate::io::fixture::{Bench, Fixture, Op, poll_once};

const CLUSTER: u64 = SMALLEST_CLUSTER;
const UNIT: usize = 64 * 1024;

struct Pair {
    bench: Bench,
    source: Rc<Fixture>,
    target: Rc<Fixture>,
    copy: Rc<BlockCopy>,
}

/// A source whose clusters hold 1, 2, 3, …, a target of the same length.
fn pair(length: u64) -> Pair {
    pair_of(length, json!({"file": "source", "target": "target"}))
}

fn pair_of(length: u64, options: serde_json::Value) -> Pair {
    let bench = Bench::new();
    let (_, source) = bench.node("source", length, 4096);
    let (_, target) = bench.node("target", length, 4096);
    let mut at = 0;
    while at < length {
        let n = crate::io::size(CLUSTER.min(length - at));
        let byte = u8::try_from(at / CLUSTER + 1).expect("few");
        source.put(at, &vec![byte; n]);
        at += CLUSTER;
    }
    let filter = bench.open(&FACTS, "filter", options).expect("opens");
    let copy = block_copy(&filter).expect("a filter");
    Pair {
        bench,
        source,
        target,
        copy,
    }
}

impl Pair {
    fn call(&self, range: Range<u64>) -> Outcome {
        self.bench.run(self.start(range))
    }

    async fn start(&self, range: Range<u64>) -> Outcome {
        let call = Call {
            range,
            workers: 4,
            max_chunk: 0,
            background: false,
            go_on: &|| true,
        };
        self.copy.run(&self.bench.layer, &call).await
    }

    fn marked(&self) -> Vec<u64> {
        self.copy.dirty().bits.borrow().runs().flatten().collect()
    }

    fn writes(&self) -> Vec<(u64, u64)> {
        let log = self.target.take_ops().into_iter();
        log.filter(|(op, ..)| *op == Op::Write)
            .map(|(_, offset, bytes)| (offset, bytes))
            .collect()
    }

    fn events(&self) -> Vec<Event> {
        let is_copy = |event: &Event| {
            matches!(
                event,
                Event::CopyBegin { .. }
                    | Event::CopyEnd { .. }
                    | Event::CopySkipped { .. }
                    | Event::CopyWaits { .. }
            )
        };
        let mut events = self.bench.events.0.borrow_mut();
        events.extract_if(.., |event| is_copy(event)).collect()
    }
}

#[test]
fn only_what_is_marked_and_only_once() {
    let pair = pair(8 * CLUSTER);
    assert_eq!(pair.call(2 * CLUSTER..3 * CLUSTER), Outcome::Done);
    assert_eq!(pair.writes(), [(2 * CLUSTER, CLUSTER)]);
    assert_eq!(pair.marked(), [0, 1, 3, 4, 5, 6, 7]);
    assert_eq!(pair.call(0..8 * CLUSTER), Outcome::Done);
    assert_eq!(
        pair.writes(),
        [(0, 2 * CLUSTER), (3 * CLUSTER, 5 * CLUSTER)],
        "what was copied is not copied again"
    );
    assert_eq!(pair.target.own(0, 8 * CLUSTER), pair.source.own(0, 8 * CLUSTER));
    assert_eq!(pair.call(0..8 * CLUSTER), Outcome::Done);
    assert_eq!(pair.writes(), []);
}

#[test]
fn the_last_cluster_is_short() {
    let length = 2 * CLUSTER + 1536;
    let pair = pair(length);
    assert_eq!(pair.call(2 * CLUSTER..3 * CLUSTER), Outcome::Done);
    assert_eq!(pair.writes(), [(2 * CLUSTER, 1536)]);
    assert_eq!(pair.call(0..length), Outcome::Done);
    assert_eq!(pair.target.own(0, length), pair.source.own(0, length));
    assert_eq!(pair.copy.remaining(), 0);
}

#[test]
fn a_failed_task_marks_again_and_names_its_side() {
    for (read, op) in [(true, Op::Read), (false, Op::Write)] {
        let pair = pair(4 * CLUSTER);
        let side = if read { &pair.source } else { &pair.target };
        side.fail(op, Errno::EIO);
        let failure = Failure {
            errno: Errno::EIO,
            read,
        };
        assert_eq!(pair.call(0..2 * CLUSTER), Outcome::Failed(failure));
        assert_eq!(pair.marked(), [0, 1, 2, 3]);
        assert_eq!(pair.copy.remaining(), 4 * CLUSTER);
        assert_eq!(pair.call(0..4 * CLUSTER), Outcome::Done);
        assert_eq!(pair.target.own(0, 4 * CLUSTER), pair.source.own(0, 4 * CLUSTER));
    }
}

#[test]
fn a_call_waits_for_what_another_copies() {
    let pair = pair(4 * CLUSTER);
    pair.target.hold(Op::Write);
    let mut first = pin!(pair.start(CLUSTER..2 * CLUSTER));
    assert_eq!(poll_once(first.as_mut()), Poll::Pending);
    let mut second = pin!(pair.start(CLUSTER..2 * CLUSTER));
    assert_eq!(poll_once(second.as_mut()), Poll::Pending, "it is not copied yet");
    assert_eq!(pair.writes(), [(CLUSTER, CLUSTER)], "nor copied twice");
    let waits = |event: &Event| matches!(event, Event::CopyWaits { .. });
    assert!(pair.bench.count(waits) > 0);
    pair.target.release();
    assert_eq!(poll_once(first.as_mut()), Poll::Ready(Outcome::Done));
    assert_eq!(poll_once(second.as_mut()), Poll::Ready(Outcome::Done));
    assert_eq!(pair.writes(), []);
}

#[test]
fn what_another_failed_at_the_waiting_call_copies() {
    let pair = pair(4 * CLUSTER);
    pair.target.hold(Op::Write);
    pair.target.fail(Op::Write, Errno::ENOSPC);
    let mut first = pin!(pair.start(CLUSTER..2 * CLUSTER));
    assert_eq!(poll_once(first.as_mut()), Poll::Pending);
    let mut second = pin!(pair.start(0..4 * CLUSTER));
    assert_eq!(poll_once(second.as_mut()), Poll::Pending);
    pair.target.release();
    let failure = Failure {
        errno: Errno::ENOSPC,
        read: false,
    };
    assert_eq!(poll_once(first.as_mut()), Poll::Ready(Outcome::Failed(failure)));
    assert_eq!(pair.bench.run(second), Outcome::Done);
    assert_eq!(pair.target.own(0, 4 * CLUSTER), pair.source.own(0, 4 * CLUSTER));
}

#[test]
fn zeroes_are_written_as_zeroes() {
    let length = 5 * CLUSTER;
    let bench = Bench::new();
    let (_, source) = bench.node("source", length, 4096);
    let (_, target) = bench.node("target", length, 4096);
    source.put(CLUSTER, &[7; UNIT]);
    source.put(3 * CLUSTER, &[8; 4096]);
    target.put(0, &vec![9; 5 * UNIT]);
    let filter = bench
        .open(&FACTS, "filter", json!({"file": "source", "target": "target"}))
        .expect("opens");
    let copy = block_copy(&filter).expect("a filter");
    let call = Call {
        range: 0..length,
        workers: 1,
        max_chunk: 0,
        background: false,
        go_on: &|| true,
    };
    assert_eq!(bench.run(copy.run(&bench.layer, &call)), Outcome::Done);
    let done: Vec<_> = target.take_ops();
    assert_eq!(
        done,
        [
            (Op::Zero, 0, CLUSTER),
            (Op::Write, CLUSTER, CLUSTER),
            (Op::Zero, 2 * CLUSTER, CLUSTER),
            // Less than a cluster is data.
            (Op::Write, 3 * CLUSTER, CLUSTER),
            (Op::Zero, 4 * CLUSTER, CLUSTER),
        ]
    );
    assert_eq!(target.own(0, length), source.own(0, length));
}

#[test]
fn what_the_layer_does_not_hold_is_left_out() {
    let bench = Bench::new();
    let length = 4 * CLUSTER;
    let (base, base_driver) = bench.node("base", length, 4096);
    let (source, top) = bench.node("source", length, 4096);
    let (_, target) = bench.node("target", length, 4096);
    base_driver.put(0, &vec![1; 4 * UNIT]);
    top.put(CLUSTER + 8192, &[2; 4096]);
    bench.back(&source, &base);
    let filter = bench
        .open(&FACTS, "filter", json!({"file": "source", "target": "target"}))
        .expect("opens");
    let copy = block_copy(&filter).expect("a filter");
    copy.set_skip_unallocated(true);
    let call = |range| Call {
        range,
        workers: 1,
        max_chunk: 0,
        background: false,
        go_on: &|| true,
    };
    let all = call(0..2 * CLUSTER);
    assert_eq!(bench.run(copy.run(&bench.layer, &all)), Outcome::Done);
    assert_eq!(
        target.take_ops(),
        [(Op::Write, CLUSTER, CLUSTER)],
        "a part is enough"
    );
    assert_eq!(copy.access().run_at(0, length), (false, CLUSTER), "nobody has it");
    assert_eq!(bench.run(copy.look_at(&bench.layer, 2 * CLUSTER)), Ok(length));
    assert_eq!(copy.remaining(), 0, "asking is enough");
    source.io.status_cache.set(None);
    top.status_error.set(Some(Errno::EIO));
    assert_eq!(bench.run(copy.look_at(&bench.layer, 0)), Err(Errno::EIO));
}

#[test]
fn tasks_are_bounded() {
    let length = 40 * CLUSTER;
    let pair = pair(length);
    assert_eq!(pair.call(0..length), Outcome::Done);
    let writes = pair.writes();
    assert!(
        writes.iter().all(|(_, bytes)| *bytes <= LARGEST_TASK),
        "{writes:?}"
    );
    assert_eq!(writes.len(), 3);
    let pair = pair_of(
        length,
        json!({"file": "source", "target": "target", "min-cluster-size": 2 * LARGEST_TASK}),
    );
    assert_eq!(pair.copy.cluster(), 2 * LARGEST_TASK);
    assert_eq!(pair.call(0..2 * LARGEST_TASK), Outcome::Done);
    assert_eq!(pair.writes(), [(0, 2 * LARGEST_TASK)], "a cluster is never split");
    assert_eq!(pair.copy.longest_task(1), 2 * LARGEST_TASK);
}

#[test]
fn memory_is_bounded() {
    let pair = pair(4 * CLUSTER);
    let copy = &pair.copy;
    pair.bench.run(copy.reserve(MEMORY));
    let mut call = pin!(pair.start(0..2 * CLUSTER));
    assert_eq!(poll_once(call.as_mut()), Poll::Pending);
    copy.release(CLUSTER);
    assert_eq!(poll_once(call.as_mut()), Poll::Pending, "it needs two");
    assert!(pair.source.take_ops().iter().all(|(op, ..)| *op != Op::Read));
    assert_eq!(pair.writes(), []);
    copy.release(CLUSTER);
    assert_eq!(poll_once(call.as_mut()), Poll::Ready(Outcome::Done));
    assert_eq!(pair.writes(), [(0, 2 * CLUSTER)]);
    assert_eq!(
        copy.memory.get(),
        MEMORY - 2 * CLUSTER,
        "it gave back what it took"
    );
}

/// Counts, and makes background calls wait.
#[derive(Default)]
struct Meter {
    copied: Cell<u64>,
    remaining: RefCell<Vec<u64>>,
    charged: Cell<u64>,
    delay: Cell<Nanos>,
}

impl Watcher for Meter {
    fn copied(&self, bytes: u64) {
        self.copied.set(self.copied.get() + bytes);
    }
    fn remaining(&self, bytes: u64) {
        self.remaining.borrow_mut().push(bytes);
    }
    fn charge(&self, bytes: u64) -> Nanos {
        self.charged.set(self.charged.get() + bytes);
        self.delay.get()
    }
}

#[test]
fn a_watcher_sees_the_work_and_slows_background_calls_only() {
    let pair = pair(4 * CLUSTER);
    let meter = Rc::<Meter>::default();
    pair.copy.watch(Some(Rc::clone(&meter) as _));
    meter.delay.set(17);
    assert_eq!(pair.call(0..CLUSTER), Outcome::Done, "guests do not wait");
    assert_eq!((meter.copied.get(), meter.charged.get()), (CLUSTER, CLUSTER));
    assert_eq!(meter.remaining.take(), [3 * CLUSTER]);
    let background = |go_on| Call {
        range: 0..4 * CLUSTER,
        workers: 2,
        max_chunk: CLUSTER,
        background: true,
        go_on,
    };
    let run = |call: &Call<'_>| pair.bench.run(pair.copy.run(&pair.bench.layer, call));
    assert_eq!(run(&background(&|| true)), Outcome::Throttled);
    assert_eq!(pair.marked(), [1, 2, 3], "what it took it gave back");
    meter.delay.set(0);
    assert_eq!(run(&background(&|| false)), Outcome::Stopped);
    let left = Cell::new(2_u32);
    let twice = || left.replace(left.get().saturating_sub(1)) > 0;
    assert_eq!(run(&background(&twice)), Outcome::Stopped);
    assert_eq!(pair.marked(), [3], "and nothing is in flight");
    assert_eq!(pair.copy.in_flight.get(), 0);
    assert_eq!(run(&background(&|| true)), Outcome::Done);
    assert_eq!(meter.copied.get(), 4 * CLUSTER);
}

#[test]
fn workers_run_at_the_same_time_up_to_their_number() {
    let pair = pair(8 * CLUSTER);
    pair.target.hold(Op::Write);
    let call = Call {
        range: 0..8 * CLUSTER,
        workers: 3,
        max_chunk: CLUSTER,
        background: true,
        go_on: &|| true,
    };
    let mut run = pin!(pair.copy.run(&pair.bench.layer, &call));
    for _ in 0..20 {
        assert_eq!(poll_once(run.as_mut()), Poll::Pending);
    }
    assert_eq!(pair.writes().len(), 3);
    pair.target.release();
    assert_eq!(pair.bench.run(run), Outcome::Done);
    assert_eq!(pair.writes().len(), 5);
}

#[test]
fn events_tell_every_task() {
    let pair = pair(2 * CLUSTER);
    let filter = pair.bench.named("filter");
    pair.target.fail(Op::Write, Errno::EIO);
    assert!(matches!(pair.call(0..CLUSTER), Outcome::Failed(_)));
    assert_eq!(pair.call(0..CLUSTER), Outcome::Done);
    pair.copy.forget(&pair.bench.layer, CLUSTER..2 * CLUSTER);
    let begin = |task| Event::CopyBegin {
        filter,
        task,
        offset: 0,
        bytes: CLUSTER,
        zero: false,
        background: false,
    };
    let end = |task, result| Event::CopyEnd { filter, task, result };
    assert_eq!(
        pair.events(),
        [
            begin(0),
            end(0, Err(Errno::EIO)),
            begin(1),
            end(1, Ok(())),
            Event::CopySkipped {
                filter,
                offset: CLUSTER,
                bytes: CLUSTER
            }
        ]
    );
}

#[test]
fn where_nothing_is_tasks_grow_and_data_is_taken_in_small_ones() {
    const MIB: u64 = 1 << 20;
    let bench = Bench::new();
    let (_, source) = bench.node("source", 80 * MIB, 65536);
    bench.node("target", 80 * MIB, 65536);
    source.put(40 * MIB, &vec![7; crate::io::size(3 * MIB)]);
    let options = json!({"file": "source", "target": "target"});
    let copy = block_copy(&bench.open(&FACTS, "filter", options).expect("opens")).expect("a filter");
    let lengths = |max_chunk, skip| {
        copy.dirty().mark(0, 80 * MIB);
        copy.set_skip_unallocated(skip);
        let call = Call {
            range: 0..80 * MIB,
            workers: 1,
            max_chunk,
            background: true,
            go_on: &|| true,
        };
        assert_eq!(bench.run(copy.run(&bench.layer, &call)), Outcome::Done);
        let mut events = bench.events.0.borrow_mut();
        let tasks = events.drain(..).filter_map(|event| match event {
            Event::CopyBegin { bytes, zero, .. } => Some((bytes, zero)),
            Event::CopySkipped { bytes, .. } => Some((bytes, true)),
            _ => None,
        });
        let mut tasks: Vec<_> = tasks.collect();
        tasks.dedup();
        tasks
            .into_iter()
            .map(|(bytes, zero)| (bytes / MIB, zero))
            .collect::<Vec<_>>()
    };
    let grown = [
        (1, true),
        (2, true),
        (4, true),
        (8, true),
        (16, true),
        (9, true),  // up to 40
        (1, false), // three times
        (1, true),
        (2, true),
        (4, true),
        (8, true),
        (16, true),
        (6, true), // up to 80
    ];
    assert_eq!(lengths(0, true), grown, "left out");
    assert_eq!(lengths(0, false), grown, "zeroes");
    assert_eq!(
        lengths(2 * MIB, false),
        [(1, true), (2, true), (1, true), (1, false), (1, true), (2, true)]
    );
}
