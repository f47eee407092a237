//! Tests of the request path, over the fixture format.

use std::pin::pin;
use std::rc::Rc;
use std::task::Poll;

use crate::driver::{Limits, WriteFlags};
use crate::error::Errno;
use crate::event::{Event, ReqKind};
use crate::graph::node::DetectZeroes;
use crate::io::backend::Backend;
use crate::io::fixture::{Bench, FORMAT, NO_ZERO, Op, poll_once};
use crate::io::tracked::Request;
use crate::types::{EdgeId, MAX_LENGTH, OpenFlags, Perm, ReqFlags};

const NONE: ReqFlags = ReqFlags::empty();
const MIB: u64 = 1 << 20;

fn align(
    bench: &Bench,
    node: &Rc<crate::graph::node::Node>,
    driver: &crate::io::fixture::Fixture,
    align: u64,
) {
    driver.limits.set(Limits {
        request_alignment: align,
        ..driver.limits.get()
    });
    bench.refresh(node);
}

#[test]
fn a_short_layer_hides_what_is_below() {
    let bench = Bench::new();
    let (base, base_driver) = bench.node("base", 2 * MIB, 65536);
    let (mid, _) = bench.node("mid", MIB, 65536);
    let (top, _) = bench.node("top", 2 * MIB, 65536);
    base_driver.put(0, &vec![0xbb; 2 << 20]);
    bench.back(&mid, &base);
    bench.back(&top, &mid);
    let guest = bench.guest(&top);
    let read = bench.read(&guest, MIB - 512, 1024).expect("reads");
    assert!(
        read[..512].iter().all(|b| *b == 0xbb),
        "below the short layer's end base shows"
    );
    assert!(read[512..].iter().all(|b| *b == 0), "past it nothing shows");
}

#[test]
fn padded_write_keeps_the_neighbours() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 8192, 4096);
    align(&bench, &node, &driver, 512);
    driver.put(0, &[1; 8192]);
    let guest = bench.guest(&node);
    bench.run(guest.write(500, &[9; 600], NONE)).expect("writes");
    let mut expected = vec![1; 8192];
    expected[500..1100].fill(9);
    assert_eq!(driver.own(0, 8192), expected);
    assert_eq!(
        driver.take_ops(),
        [(Op::Read, 0, 512), (Op::Read, 1024, 512), (Op::Write, 0, 1536)]
    );
}

#[test]
fn d1_a_failed_pre_read_writes_nothing() {
    for (offset, bytes, good_reads) in [(500, 600, 0), (500, 600, 1), (100, 10, 0)] {
        let bench = Bench::new();
        let (node, driver) = bench.node("n", 8192, 4096);
        align(&bench, &node, &driver, 512);
        driver.put(0, &[1; 8192]);
        let guest = bench.guest(&node);
        driver.fail_after(Op::Read, good_reads, Errno::EIO);
        let written = bench.run(guest.write(offset, &vec![9; bytes], NONE));
        driver.fail_after(Op::Read, good_reads, Errno::EIO);
        let zeroed = bench.run(guest.write_zeroes(offset, bytes as u64, NONE));
        assert_eq!((written, zeroed), (Err(Errno::EIO), Err(Errno::EIO)));
        assert_eq!(
            driver.own(0, 8192),
            vec![1; 8192],
            "the neighbours and the range are as before"
        );
        assert!(driver.take_ops().iter().all(|(op, ..)| *op == Op::Read));
    }
}

#[test]
fn concurrent_padded_writes_of_one_block_both_survive() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 4096, 4096);
    align(&bench, &node, &driver, 512);
    let guest = bench.guest(&node);
    driver.hold(Op::Write);
    let (mut a, mut b) = (
        pin!(guest.write(0, &[1; 10], NONE)),
        pin!(guest.write(100, &[2; 10], NONE)),
    );
    assert!(poll_once(a.as_mut()).is_pending(), "a is at the driver");
    assert!(poll_once(b.as_mut()).is_pending(), "b waits for a");
    assert_eq!(
        driver.take_ops(),
        [(Op::Read, 0, 512), (Op::Write, 0, 512)],
        "only a reached the driver"
    );
    assert_eq!(bench.count(|e| matches!(e, Event::RequestWaits { .. })), 1);
    driver.release();
    assert_eq!(poll_once(a), Poll::Ready(Ok(())));
    assert_eq!(poll_once(b), Poll::Ready(Ok(())));
    assert_eq!((driver.own(0, 1), driver.own(100, 1)), (vec![1], vec![2]));
    assert!(node.io.is_idle());
}

/// Begins a request straight away, for the table of who waits for whom.
fn begin<'a>(
    bench: &'a Bench,
    node: &'a Rc<crate::graph::node::Node>,
    at: u64,
    serialising: bool,
) -> Request<'a> {
    let req = Request::begin(&bench.layer, node, EdgeId::NONE, ReqKind::Write, (at, 512), NONE);
    if serialising {
        req.set_serialising(1);
    }
    req
}

#[test]
fn who_waits_for_whom() {
    for (existing, new, waits) in [
        (false, false, false),
        (true, false, true),
        (false, true, true),
        (true, true, true),
    ] {
        let bench = Bench::new();
        let (node, _) = bench.node("n", 4096, 512);
        let first = begin(&bench, &node, 0, existing);
        let second = begin(&bench, &node, 0, new);
        assert_eq!(second.has_conflict(), waits, "existing {existing}, new {new}");
        let touching = begin(&bench, &node, 512, true);
        assert!(!touching.has_conflict(), "touching ranges do not overlap");
        for r in [first, second, touching] {
            r.finish(Ok(())).expect("ok");
        }
        assert!(node.io.is_idle());
    }
}

#[test]
fn a_sleeping_request_blocks_nobody() {
    let bench = Bench::new();
    let (node, _) = bench.node("n", 4096, 512);
    let first = begin(&bench, &node, 0, false);
    let sleeper = begin(&bench, &node, 0, true);
    {
        let mut sleep = pin!(sleeper.wait_for_conflicts());
        assert!(poll_once(sleep.as_mut()).is_pending());
        // A plain and a serialising newcomer pass the sleeper; the serialising one still waits for `first`.
        let plain = begin(&bench, &node, 0, false);
        assert!(!plain.has_conflict());
        let late = begin(&bench, &node, 0, true);
        assert!(late.has_conflict());
        first.finish(Ok(())).expect("ok");
        // The sleeper looks again and meets those who passed it.
        assert!(poll_once(sleep.as_mut()).is_pending());
        late.finish(Ok(())).expect("ok");
        assert!(poll_once(sleep.as_mut()).is_pending());
        plain.finish(Ok(())).expect("ok");
        assert!(poll_once(sleep.as_mut()).is_ready());
    }
    sleeper.finish(Ok(())).expect("ok");
    assert!(node.io.is_idle());
}

#[test]
fn serialising_only_widens() {
    let bench = Bench::new();
    let (node, _) = bench.node("n", 65536, 512);
    let req = Request::begin(
        &bench.layer,
        &node,
        EdgeId::NONE,
        ReqKind::Write,
        (1000, 100),
        NONE,
    );
    req.set_serialising(4096);
    assert_eq!(req.overlap(), (0, 4096));
    req.set_serialising(1);
    assert_eq!(req.overlap(), (0, 4096));
    assert_eq!(node.io.serialising.get(), 1, "counted once");
    req.finish(Ok(())).expect("ok");
    assert_eq!(node.io.serialising.get(), 0);
}

#[test]
fn no_wait_is_busy_rather_than_late() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 8192, 4096);
    let guest = bench.guest(&node);
    driver.hold(Op::Write);
    let mut first = pin!(guest.write(0, &[1; 512], NONE));
    assert!(poll_once(first.as_mut()).is_pending());
    let flags = ReqFlags::SERIALISING | ReqFlags::NO_WAIT;
    assert_eq!(
        bench.run(guest.write(512, &[2; 512], flags)),
        Err(Errno::EBUSY),
        "same cluster"
    );
    driver.release();
    assert_eq!(poll_once(first), Poll::Ready(Ok(())));
    assert_eq!(bench.run(guest.write(512, &[2; 512], flags)), Ok(()));
}

#[test]
fn bounds() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 4096, 4096);
    let guest = bench.guest(&node);
    let mut buf = [0; 512];
    assert_eq!(bench.run(guest.read(4096, &mut [])), Ok(()));
    assert_eq!(bench.run(guest.read(3585, &mut buf)), Err(Errno::EIO));
    assert_eq!(bench.run(guest.write(u64::MAX, &buf, NONE)), Err(Errno::EIO));
    assert_eq!(bench.run(guest.write_zeroes(0, 4097, NONE)), Err(Errno::EIO));
    assert_eq!(bench.run(guest.discard(4095, 2)), Err(Errno::EIO));
    let edge = guest.root_edge().expect("attached");
    assert_eq!(
        bench.run(bench.layer.read(edge, MAX_LENGTH, &mut buf, NONE)),
        Err(Errno::EIO)
    );
    driver.take_ops();
    buf.fill(7);
    assert_eq!(
        bench.run(bench.layer.read(edge, 8192, &mut buf, NONE)),
        Ok(()),
        "the node itself reads zeroes"
    );
    assert_eq!(buf, [0; 512]);
    assert_eq!(driver.take_ops(), [], "and the driver is not asked");
}

#[test]
fn read_only_refuses_and_counts() {
    let bench = Bench::new();
    let (node, _) = bench.node_of(&FORMAT, "n", 4096, 4096, OpenFlags::UNMAP);
    let perm = Perm::CONSISTENT_READ;
    let guest = Backend::new(&bench.layer, node.id, None, perm, Perm::all(), true).expect("reads only");
    assert_eq!(bench.run(guest.write(0, &[1; 512], NONE)), Err(Errno::EPERM));
    assert_eq!(
        node.io.write_gen.get(),
        0,
        "a backend that may not write is refused at the door"
    );
    let edge = guest.root_edge().expect("attached");
    assert_eq!(
        bench.run(bench.layer.write(edge, 0, &[1; 512], NONE)),
        Err(Errno::EPERM)
    );
    assert_eq!(node.io.write_gen.get(), 1, "finish runs for refused writes too");
    assert_eq!(bench.run(guest.flush()), Ok(()));
}

#[test]
#[should_panic(expected = "needs Perm(WRITE)")]
fn writing_without_permission_is_our_bug() {
    let bench = Bench::new();
    let (node, _) = bench.node("n", 4096, 4096);
    let guest = Backend::new(
        &bench.layer,
        node.id,
        None,
        Perm::CONSISTENT_READ,
        Perm::all(),
        true,
    )
    .expect("reads");
    let edge = guest.root_edge().expect("attached");
    let _ = bench.run(bench.layer.write(edge, 0, &[1; 512], NONE));
}

#[test]
#[should_panic(expected = "needs RESIZE")]
fn growing_without_permission_is_our_bug() {
    let bench = Bench::new();
    let (node, _) = bench.node("n", 4096, 4096);
    let guest = bench.guest(&node);
    let edge = guest.root_edge().expect("attached");
    let _ = bench.run(bench.layer.write(edge, 4096, &[1; 512], NONE));
}

#[test]
fn a_write_past_the_end_grows_the_node() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 4096, 4096);
    let perm = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    let guest = Backend::new(&bench.layer, node.id, None, perm, Perm::all(), true).expect("no conflict");
    let edge = guest.root_edge().expect("attached");
    driver.fail(Op::Write, Errno::ENOSPC);
    assert_eq!(
        bench.run(bench.layer.write(edge, 4096, &[1; 100], NONE)),
        Err(Errno::ENOSPC)
    );
    assert_eq!(node.length(), 4096, "a failed write grows nothing");
    assert_eq!(bench.run(bench.layer.write(edge, 4096, &[1; 100], NONE)), Ok(()));
    assert_eq!(node.length(), 4608, "rounded up to a sector");
}

#[test]
fn large_transfers_are_split() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 8192, 4096);
    driver.limits.set(Limits {
        request_alignment: 512,
        max_transfer: 3000,
        ..Limits::default()
    });
    bench.refresh(&node);
    let guest = bench.guest(&node);
    bench
        .run(guest.write(0, &[5; 8192], ReqFlags::FUA))
        .expect("writes");
    let writes = [
        (Op::Write, 0, 2560),
        (Op::Write, 2560, 2560),
        (Op::Write, 5120, 2560),
        (Op::Write, 7680, 512),
    ];
    let flush = [(Op::FlushOs, 0, 0)];
    let mut ops = driver.take_ops();
    assert_eq!(ops[..4], writes);
    assert_eq!(
        ops[4..5],
        flush,
        "an emulated FUA is one flush after the last piece"
    );
    ops.clear();
    assert_eq!(bench.read(&guest, 0, 8192), Ok(vec![5; 8192]));
    assert_eq!(driver.take_ops().len(), 4);
}

#[test]
fn fua_is_passed_down_or_emulated() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 4096, 4096);
    let guest = bench.guest(&node);
    guest.set_write_cache(false);
    bench.run(guest.write(0, &[1; 512], NONE)).expect("writes");
    assert_eq!(driver.take_ops()[1].0, Op::FlushOs, "emulated by a flush");
    driver.write_flags.set(WriteFlags {
        write: ReqFlags::FUA,
        ..WriteFlags::default()
    });
    bench.refresh(&node);
    bench
        .run(guest.write(0, &[1; 512], ReqFlags::WRITE_UNCHANGED))
        .expect("writes");
    assert_eq!(
        *driver.log.borrow(),
        [(Op::Write, 0, 512, ReqFlags::FUA)],
        "passed down, nothing else is"
    );
    driver.log.take();
    node.flags.set(node.flags.get() | OpenFlags::NO_FLUSH);
    bench.run(guest.write(0, &[1; 512], NONE)).expect("writes");
    assert_eq!(
        *driver.log.borrow(),
        [(Op::Write, 0, 512, NONE)],
        "dropped with cache.no-flush"
    );
}

#[test]
fn flush_elides_the_disk_but_not_the_driver() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 4096, 4096);
    let guest = bench.guest(&node);
    bench.run(guest.flush()).expect("flushes");
    assert_eq!(driver.take_ops(), [(Op::FlushOs, 0, 0)], "nothing written yet");
    bench.run(guest.write(0, &[1; 512], NONE)).expect("writes");
    driver.take_ops();
    driver.fail(Op::FlushDisk, Errno::EIO);
    assert_eq!(bench.run(guest.flush()), Err(Errno::EIO));
    assert_eq!(
        bench.run(guest.flush()),
        Ok(()),
        "a failed flush is not counted as done"
    );
    assert_eq!(bench.run(guest.flush()), Ok(()));
    let kinds: Vec<Op> = driver.take_ops().into_iter().map(|(op, ..)| op).collect();
    assert_eq!(
        kinds,
        [
            Op::FlushOs,
            Op::FlushDisk,
            Op::FlushOs,
            Op::FlushDisk,
            Op::FlushOs
        ]
    );
}

#[test]
fn flush_promises_only_what_finished_before_it() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 4096, 4096);
    let guest = bench.guest(&node);
    bench.run(guest.write(0, &[1; 512], NONE)).expect("writes");
    driver.hold(Op::FlushOs);
    let mut first = pin!(guest.flush());
    assert!(poll_once(first.as_mut()).is_pending());
    let mut second = pin!(guest.flush());
    assert!(
        poll_once(second.as_mut()).is_pending(),
        "queued behind the active one"
    );
    bench.run(guest.write(0, &[2; 512], NONE)).expect("writes");
    driver.release();
    assert_eq!(poll_once(first), Poll::Ready(Ok(())));
    assert_eq!(poll_once(second), Poll::Ready(Ok(())));
    driver.take_ops();
    bench.run(guest.flush()).expect("flushes");
    assert_eq!(
        driver.take_ops(),
        [(Op::FlushOs, 0, 0), (Op::FlushDisk, 0, 0)],
        "the late write is not covered"
    );
}

#[test]
fn flush_visits_only_children_it_may_write() {
    let bench = Bench::new();
    let (base, base_driver) = bench.node("base", 4096, 4096);
    let (top, top_driver) = bench.node("top", 4096, 4096);
    bench.back(&top, &base);
    bench.run(bench.layer.flush(top.id)).expect("flushes");
    assert_eq!(
        (top_driver.take_ops().len(), base_driver.take_ops().len()),
        (1, 0),
        "a backing link only reads"
    );
    let filter = bench
        .open(
            &crate::drivers::copy_on_read::FACTS,
            "cor",
            serde_json::json!({"file": "top"}),
        )
        .expect("opens");
    bench.run(bench.layer.flush(filter.id)).expect("flushes");
    assert_eq!(
        top_driver.take_ops(),
        [(Op::FlushOs, 0, 0)],
        "a copy-on-read filter writes below"
    );
    top_driver.fail(Op::FlushOs, Errno::EIO);
    assert_eq!(bench.run(bench.layer.flush(filter.id)), Err(Errno::EIO));
}

#[test]
fn zero_writes_fall_back_or_do_not() {
    let bench = Bench::new();
    let (node, driver) = bench.node_of(&NO_ZERO, "n", 8192, 4096, OpenFlags::RDWR);
    driver.put(0, &[1; 8192]);
    let guest = bench.guest(&node);
    assert_eq!(
        bench.run(guest.write_zeroes(0, 4096, ReqFlags::NO_FALLBACK)),
        Err(Errno::ENOTSUP)
    );
    assert_eq!(driver.take_ops(), []);
    assert_eq!(bench.run(guest.write_zeroes(0, 4096, ReqFlags::FUA)), Ok(()));
    assert_eq!(driver.own(0, 4096), vec![0; 4096]);
    let kinds: Vec<Op> = driver.take_ops().into_iter().map(|(op, ..)| op).collect();
    assert_eq!(kinds[..2], [Op::Write, Op::FlushOs], "one flush at the end");
}

#[test]
fn unaligned_zero_write_is_data_zeroes_data() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 8192, 4096);
    align(&bench, &node, &driver, 512);
    driver.put(0, &[1; 8192]);
    driver.write_flags.set(WriteFlags {
        zero: ReqFlags::MAY_UNMAP,
        ..WriteFlags::default()
    });
    bench.refresh(&node);
    let guest = bench.guest(&node);
    bench
        .run(guest.write_zeroes(100, 2000, ReqFlags::MAY_UNMAP))
        .expect("zeroes");
    let mut expected = vec![1; 8192];
    expected[100..2100].fill(0);
    assert_eq!(driver.own(0, 8192), expected);
    let ops = [
        (Op::Read, 0, 512),
        (Op::Read, 2048, 512),
        (Op::Write, 0, 512),
        (Op::Zero, 512, 1536),
        (Op::Write, 2048, 512),
    ];
    assert_eq!(driver.log.borrow()[3].3, ReqFlags::MAY_UNMAP);
    assert_eq!(driver.take_ops(), ops);
    bench
        .run(guest.write_zeroes(4096 + 10, 20, NONE))
        .expect("zeroes");
    assert_eq!(
        driver.take_ops(),
        [(Op::Read, 4096, 512), (Op::Write, 4096, 512)],
        "one block: no zero write"
    );
    node.flags.set(OpenFlags::RDWR);
    bench
        .run(guest.write_zeroes(0, 512, ReqFlags::MAY_UNMAP))
        .expect("zeroes");
    assert_eq!(
        *driver.log.borrow(),
        [(Op::Zero, 0, 512, NONE)],
        "without discard=unmap nothing is unmapped"
    );
}

#[test]
fn zeroes_are_detected_only_when_all_are() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 4096, 4096);
    driver.write_flags.set(WriteFlags {
        zero: ReqFlags::MAY_UNMAP,
        ..WriteFlags::default()
    });
    bench.refresh(&node);
    let guest = bench.guest(&node);
    bench.run(guest.write(0, &[0; 512], NONE)).expect("writes");
    node.detect_zeroes.set(DetectZeroes::On);
    bench.run(guest.write(0, &[0; 512], NONE)).expect("writes");
    node.detect_zeroes.set(DetectZeroes::Unmap);
    bench.run(guest.write(0, &[0; 512], NONE)).expect("writes");
    let mut almost = [0; 512];
    almost[511] = 1;
    bench.run(guest.write(0, &almost, NONE)).expect("writes");
    let log: Vec<(Op, ReqFlags)> = driver
        .log
        .borrow()
        .iter()
        .map(|(op, _, _, f)| (*op, *f))
        .collect();
    assert_eq!(
        log,
        [
            (Op::Write, NONE),
            (Op::Zero, NONE),
            (Op::Zero, ReqFlags::MAY_UNMAP),
            (Op::Write, NONE)
        ]
    );
}

#[test]
fn discards() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 16384, 4096);
    driver.limits.set(Limits {
        request_alignment: 512,
        pdiscard_alignment: 4096,
        ..Limits::default()
    });
    bench.refresh(&node);
    let guest = bench.guest(&node);
    driver.fail(Op::Discard, Errno::ENOTSUP);
    assert_eq!(
        bench.run(guest.discard(3584, 9216)),
        Ok(()),
        "ENOTSUP of a piece is no error"
    );
    assert_eq!(
        driver.take_ops(),
        [
            (Op::Discard, 3584, 512),
            (Op::Discard, 4096, 8192),
            (Op::Discard, 12288, 512)
        ]
    );
    driver.fail(Op::Discard, Errno::EIO);
    assert_eq!(bench.run(guest.discard(3584, 9216)), Err(Errno::EIO));
    assert_eq!(driver.take_ops().len(), 1, "any other error ends it");
    node.flags.set(OpenFlags::RDWR);
    assert_eq!(bench.run(guest.discard(0, 4096)), Ok(()));
    assert_eq!(driver.take_ops(), [], "without discard=unmap it is dropped");
}

#[test]
fn a_grown_overlay_hides_its_longer_backing() {
    let bench = Bench::new();
    let (base, base_driver) = bench.node("base", 8192, 4096);
    let (top, driver) = bench.node("top", 4096, 4096);
    base_driver.put(0, &[0xbb; 8192]);
    driver.write_flags.set(WriteFlags {
        truncate: ReqFlags::ZERO_WRITE,
        ..WriteFlags::default()
    });
    bench.refresh(&top);
    bench.back(&top, &base);
    let perm = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    let guest = Backend::new(&bench.layer, top.id, None, perm, Perm::all(), true).expect("no conflict");
    let edge = guest.root_edge().expect("attached");
    bench
        .run(bench.layer.truncate(edge, 8192, true, NONE))
        .expect("grows");
    assert_eq!(
        *driver.log.borrow(),
        [(Op::Truncate, 8192, 0, ReqFlags::ZERO_WRITE)]
    );
    assert_eq!(top.length(), 8192);
    assert_eq!(bench.read(&guest, 4096, 4096), Ok(vec![0; 4096]));
    bench
        .run(bench.layer.truncate(edge, 512, true, NONE))
        .expect("shrinks");
    assert_eq!((top.length(), guest.length()), (512, Ok(512)));
    assert!(top.io.is_idle());
}
