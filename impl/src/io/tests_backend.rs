//! Tests of backends under drain, of the events around requests, and of copy-on-read in a node.

use std::pin::pin;
use std::task::Poll;

use crate::driver::Limits;
use crate::error::Errno;
use crate::event::{Event, ReqKind};
use crate::io::backend::Backend;
use crate::io::fixture::{Bench, Op, poll_once};
use crate::types::{Perm, ReqFlags};

const NONE: ReqFlags = ReqFlags::empty();

#[test]
fn a_drained_backend_parks_in_order() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 4096, 4096);
    let guest = bench.guest(&node);
    bench.run(bench.layer.drained_begin(node.id));
    let mut first = pin!(guest.write(0, &[1; 512], NONE));
    let mut second = pin!(guest.write(512, &[2; 512], NONE));
    assert!(poll_once(first.as_mut()).is_pending());
    assert!(poll_once(second.as_mut()).is_pending());
    assert_eq!(guest.counters(), (1, 0), "parked requests are not in flight");
    assert_eq!(driver.take_ops(), []);
    bench.layer.drained_end(node.id);
    assert_eq!(poll_once(first), Poll::Ready(Ok(())));
    assert_eq!(poll_once(second), Poll::Ready(Ok(())));
    assert_eq!(bench.count(|e| matches!(e, Event::BackendQueued { .. })), 2);
    assert_eq!(bench.count(|e| matches!(e, Event::BackendResumed { .. })), 2);
    assert_eq!(guest.counters(), (0, 0));
}

#[test]
fn drain_waits_for_a_request_and_parked_ones_fail_when_the_root_goes() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 4096, 4096);
    let guest = bench.guest(&node);
    driver.hold(Op::Write);
    let mut running = pin!(guest.write(0, &[1; 512], NONE));
    assert!(poll_once(running.as_mut()).is_pending());
    let mut remove = pin!(guest.clone().remove());
    assert!(poll_once(remove.as_mut()).is_pending(), "a request is in flight");
    let mut parked = pin!(guest.write(0, &[2; 512], NONE));
    assert!(poll_once(parked.as_mut()).is_pending());
    driver.release();
    assert_eq!(poll_once(running), Poll::Ready(Ok(())));
    assert!(poll_once(remove).is_ready());
    assert_eq!(poll_once(parked), Poll::Ready(Err(Errno::ENOMEDIUM)));
    assert_eq!(guest.root(), None);
}

#[test]
fn events_frame_every_request() {
    let bench = Bench::new();
    let (node, driver) = bench.node("n", 4096, 4096);
    let guest = bench.guest(&node);
    driver.fail(Op::Read, Errno::EIO);
    assert_eq!(bench.read(&guest, 0, 512), Err(Errno::EIO));
    bench.run(guest.flush()).expect("flushes");
    let framed = bench.count(|e| {
        matches!(
            e,
            Event::RequestEnd {
                result: Err(Errno::EIO),
                ..
            }
        )
    });
    let begun = bench.count(|e| matches!(e, Event::RequestBegin { .. }));
    let ended = bench.count(|e| matches!(e, Event::RequestEnd { .. }));
    assert_eq!((framed, begun, ended), (1, 2, 2));
    assert_eq!(
        bench.count(|e| matches!(
            e,
            Event::RequestBegin {
                kind: ReqKind::Flush,
                ..
            }
        )),
        1
    );
}

#[test]
fn copy_on_read_copies_whole_clusters_once() {
    let bench = Bench::new();
    let (base, base_driver) = bench.node("base", 16384, 4096);
    let (top, driver) = bench.node("top", 16384, 4096);
    base_driver.put(0, &[0xbb; 8192]);
    bench.back(&top, &base);
    top.io.copy_on_read.set(1);
    let guest = bench.guest(&top);
    assert_eq!(bench.read(&guest, 5000, 100), Ok(vec![0xbb; 100]));
    assert_eq!((driver.is_allocated(0), driver.is_allocated(4096)), (false, true));
    assert_eq!(driver.own(4096, 4096), vec![0xbb; 4096]);
    assert_eq!(top.io.write_gen.get(), 0, "it does not count as a write");
    assert_eq!(bench.read(&guest, 12288, 4096), Ok(vec![0; 4096]));
    assert!(
        driver.is_allocated(12288),
        "what no layer has is copied as zeroes"
    );
    assert_eq!(
        bench.count(|e| matches!(e, Event::CopyOnRead { zero: true, .. })),
        1
    );
    driver.take_ops();
    assert_eq!(bench.read(&guest, 4096, 4096), Ok(vec![0xbb; 4096]));
    assert_eq!(
        driver.take_ops(),
        [(Op::Read, 4096, 4096)],
        "the second read copies nothing"
    );
    driver.fail(Op::Write, Errno::ENOSPC);
    assert_eq!(
        bench.read(&guest, 0, 512),
        Err(Errno::ENOSPC),
        "a failed copy fails the read"
    );
}

#[test]
fn a_guest_write_waits_for_the_copy_of_its_cluster() {
    let bench = Bench::new();
    let (base, base_driver) = bench.node("base", 8192, 4096);
    let (top, driver) = bench.node("top", 8192, 4096);
    base_driver.put(0, &[0xbb; 8192]);
    bench.back(&top, &base);
    top.io.copy_on_read.set(1);
    let guest = bench.guest(&top);
    driver.hold(Op::Write);
    let mut buf = [0; 512];
    let mut read = pin!(guest.read(0, &mut buf));
    assert!(
        poll_once(read.as_mut()).is_pending(),
        "the copy is on its way to the driver"
    );
    let mut write = pin!(guest.write(3584, &[7; 512], NONE));
    assert!(poll_once(write.as_mut()).is_pending());
    driver.release();
    assert_eq!(poll_once(read), Poll::Ready(Ok(())));
    assert_eq!(poll_once(write), Poll::Ready(Ok(())));
    assert_eq!(
        driver.own(3584, 512),
        vec![7; 512],
        "the copy did not overwrite the guest's data"
    );
}

#[test]
fn d17_copy_on_read_ends_at_an_unaligned_end() {
    let bench = Bench::new();
    let (base, base_driver) = bench.node("base", 8192 + 512, 512);
    let (top, driver) = bench.node("top", 8192 + 512, 512);
    base_driver.put(0, &[0xbb; 8192 + 512]);
    bench.back(&top, &base);
    driver.limits.set(Limits {
        request_alignment: 4096,
        ..Limits::default()
    });
    bench.refresh(&top);
    top.io.copy_on_read.set(1);
    let perm = Perm::CONSISTENT_READ;
    let guest = Backend::new(&bench.layer, top.id, None, perm, Perm::all(), true).expect("no conflict");
    assert_eq!(bench.read(&guest, 8192, 512), Ok(vec![0xbb; 512]));
    assert_eq!(driver.own(8192, 512), vec![0xbb; 512], "copied");
}
