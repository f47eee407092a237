//! The filter and what is read of the point in time behind it.

use std::pin::pin;
use std::task::Poll;

use serde_json::json;

use super::*;
use crate::drivers::snapshot_access;
use crate::env::Env;
use crate::io::backend::Backend;
use crate::io::fixture::{Bench, Fixture, Op, poll_once};

const CLUSTER: u64 = 65536;
const LENGTH: u64 = 4 * CLUSTER;

struct Place {
    bench: Bench,
    source: Rc<Fixture>,
    target: Rc<Fixture>,
    filter: Rc<Node>,
    guest: Backend,
}

/// A source full of 1, a filter with these options beside `file` and `target`, a guest.
fn place(options: Value) -> Place {
    let bench = Bench::new();
    let (_, source) = bench.node("source", LENGTH, 4096);
    let (_, target) = bench.node("target", LENGTH, 4096);
    source.put(0, &vec![1; crate::io::size(LENGTH)]);
    let mut all = json!({"file": "source", "target": "target"});
    if let (Some(all), Value::Object(options)) = (all.as_object_mut(), options) {
        all.extend(options);
    }
    let filter = bench.open(&FACTS, "filter", all).expect("opens");
    let guest = bench.guest(&filter);
    Place {
        bench,
        source,
        target,
        filter,
        guest,
    }
}

impl Place {
    fn write(&self, offset: u64, bytes: usize, byte: u8) -> Result<(), Errno> {
        let data = vec![byte; bytes];
        self.bench.run(self.guest.write(offset, &data, ReqFlags::empty()))
    }

    fn snapshot(&self) -> Backend {
        let node = self
            .bench
            .open(&snapshot_access::FACTS, "snapshot", json!({"file": "filter"}))
            .expect("opens");
        self.bench.guest(&node)
    }

    fn ops(driver: &Fixture) -> Vec<(Op, u64, u64)> {
        driver.take_ops()
    }
}

#[test]
fn a_write_copies_its_clusters_first() {
    let place = place(json!({}));
    place.write(CLUSTER + 100, 200, 2).expect("writes");
    assert_eq!(Place::ops(&place.target), [(Op::Write, CLUSTER, CLUSTER)]);
    assert_eq!(
        Place::ops(&place.source),
        [(Op::Read, CLUSTER, CLUSTER), (Op::Write, CLUSTER + 100, 200)],
        "aligned, and before the write"
    );
    assert_eq!(
        place.target.own(CLUSTER, CLUSTER),
        vec![1; crate::io::size(CLUSTER)]
    );
    place.write(CLUSTER, 4096, 3).expect("writes");
    assert_eq!(Place::ops(&place.target), [], "only once");
    place.write(2 * CLUSTER - 1, 2, 4).expect("writes");
    assert_eq!(
        Place::ops(&place.target),
        [(Op::Write, 2 * CLUSTER, CLUSTER)],
        "both clusters, one of which is there"
    );
}

#[test]
fn zeroes_and_discards_copy_too_and_what_changes_nothing_does_not() {
    let place = place(json!({}));
    let run = |what| place.bench.run(what);
    run(place.guest.write_zeroes(0, 512, ReqFlags::empty())).expect("zeroes");
    assert_eq!(Place::ops(&place.target), [(Op::Write, 0, CLUSTER)]);
    place
        .bench
        .run(place.guest.discard(CLUSTER, 512))
        .expect("discards");
    assert_eq!(Place::ops(&place.target), [(Op::Write, CLUSTER, CLUSTER)]);
    let kinds: Vec<Op> = Place::ops(&place.source).into_iter().map(|(op, ..)| op).collect();
    assert_eq!(
        kinds,
        [Op::Read, Op::Zero, Op::Read, Op::Discard],
        "the copy comes first"
    );
    let same = ReqFlags::WRITE_UNCHANGED;
    place
        .bench
        .run(place.guest.write(2 * CLUSTER, &[1; 512], same))
        .expect("writes");
    run(place.guest.write_zeroes(3 * CLUSTER, 512, same)).expect("zeroes");
    assert_eq!(Place::ops(&place.target), []);
}

#[test]
fn reads_and_flushes_pass() {
    let place = place(json!({}));
    assert_eq!(place.bench.read(&place.guest, 5, 10), Ok(vec![1; 10]));
    place.bench.run(place.guest.flush()).expect("flushes");
    assert_eq!(Place::ops(&place.target), []);
    let kinds: Vec<Op> = Place::ops(&place.source).into_iter().map(|(op, ..)| op).collect();
    assert!(kinds.contains(&Op::FlushOs), "{kinds:?}");
}

#[test]
fn a_write_into_a_cluster_that_is_being_copied_waits() {
    let place = place(json!({}));
    place.target.hold(Op::Write);
    let mut first = pin!(place.guest.write(0, &[2; 512], ReqFlags::empty()));
    assert_eq!(poll_once(first.as_mut()), Poll::Pending);
    let mut second = pin!(place.guest.write(4096, &[3; 512], ReqFlags::empty()));
    assert_eq!(poll_once(second.as_mut()), Poll::Pending);
    assert_eq!(
        place.source.own(0, 8192),
        vec![1; 8192],
        "nothing is overwritten yet"
    );
    place.target.release();
    assert_eq!(poll_once(first.as_mut()), Poll::Ready(Ok(())));
    assert_eq!(poll_once(second.as_mut()), Poll::Ready(Ok(())));
    assert_eq!(place.target.own(0, CLUSTER), vec![1; crate::io::size(CLUSTER)]);
}

#[test]
fn a_failed_copy_breaks_the_write() {
    let place = place(json!({}));
    place.target.fail(Op::Write, Errno::ENOSPC);
    assert_eq!(place.write(0, 512, 2), Err(Errno::ENOSPC));
    assert_eq!(place.source.own(0, 512), vec![1; 512]);
    let snapshot = place.snapshot();
    assert_eq!(place.bench.read(&snapshot, 0, 512), Ok(vec![1; 512]));
    place.write(0, 512, 2).expect("it is tried again");
    assert_eq!(place.bench.read(&snapshot, 0, 512), Ok(vec![1; 512]));
}

#[test]
fn or_the_snapshot() {
    let place = place(json!({"on-cbw-error": "break-snapshot"}));
    let snapshot = place.snapshot();
    place.write(CLUSTER, 512, 2).expect("writes");
    place.target.fail(Op::Write, Errno::ENOSPC);
    place.write(0, 512, 2).expect("the guest goes on");
    let filter = place.filter.id;
    let broken = Event::SnapshotBroken {
        filter,
        errno: Errno::ENOSPC,
    };
    assert_eq!(place.bench.count(|e| *e == broken), 1);
    assert_eq!(place.bench.read(&snapshot, CLUSTER, 512), Err(Errno::EACCES));
    assert_eq!(place.bench.read(&snapshot, 3 * CLUSTER, 512), Err(Errno::EACCES));
    place.target.take_ops();
    place.write(2 * CLUSTER, 512, 2).expect("writes");
    assert_eq!(Place::ops(&place.target), [], "nothing is kept any more");
}

#[test]
fn d5_a_read_under_way_when_the_snapshot_breaks_fails() {
    let place = place(json!({"on-cbw-error": "break-snapshot"}));
    let snapshot = place.snapshot();
    place.source.hold(Op::Read);
    let mut data = [0; 512];
    let mut read = pin!(snapshot.read(0, &mut data));
    assert_eq!(poll_once(read.as_mut()), Poll::Pending);
    let filter: Rc<dyn Driver> = place.filter.driver();
    let filter = filter.as_any().downcast_ref::<CopyBeforeWrite>().expect("it");
    filter.broken.set(Some(Errno::EIO));
    place.source.release();
    assert_eq!(poll_once(read.as_mut()), Poll::Ready(Err(Errno::EACCES)));
}

#[test]
fn the_snapshot_stays_as_it_was() {
    let place = place(json!({}));
    let snapshot = place.snapshot();
    let whole = crate::io::size(LENGTH);
    place.write(CLUSTER - 512, 1024, 2).expect("writes");
    place.write(3 * CLUSTER, 512, 3).expect("writes");
    assert_eq!(place.bench.read(&snapshot, 0, whole), Ok(vec![1; whole]));
    assert_ne!(place.bench.read(&place.guest, 0, whole), Ok(vec![1; whole]));
    let refused = place.bench.run(snapshot.write(0, &[5; 512], ReqFlags::empty()));
    assert_eq!(refused, Err(Errno::ENOTSUP));
    let refused = place.bench.run(snapshot.write_zeroes(0, 512, ReqFlags::empty()));
    assert_eq!(refused, Err(Errno::ENOTSUP));
}

#[test]
fn a_write_waits_for_a_snapshot_read_of_the_source() {
    let place = place(json!({}));
    let snapshot = place.snapshot();
    place.source.hold(Op::Read);
    let mut data = [0; 512];
    let mut read = pin!(snapshot.read(0, &mut data));
    assert_eq!(poll_once(read.as_mut()), Poll::Pending);
    place.source.release();
    place.source.hold(Op::Read);
    // The copy itself reads as well, so only the frozen range is let through by hand.
    let filter: Rc<dyn Driver> = place.filter.driver();
    let filter = filter.as_any().downcast_ref::<CopyBeforeWrite>().expect("it");
    assert_eq!(filter.frozen.borrow().len(), 1);
    let mut thaw = pin!(filter.wait_for_reads(0, CLUSTER));
    assert_eq!(poll_once(thaw.as_mut()), Poll::Pending);
    let mut other = pin!(filter.wait_for_reads(CLUSTER, LENGTH));
    assert_eq!(poll_once(other.as_mut()), Poll::Ready(()), "only where it reads");
    place.source.release();
    assert_eq!(poll_once(read.as_mut()), Poll::Ready(Ok(())));
    assert_eq!(poll_once(thaw.as_mut()), Poll::Ready(()));
}

#[test]
fn a_discard_gives_whole_clusters_up() {
    let place = place(json!({}));
    let snapshot = place.snapshot();
    place
        .bench
        .run(snapshot.discard(512, 2 * CLUSTER))
        .expect("discards");
    assert_eq!(Place::ops(&place.target), [(Op::Discard, CLUSTER, CLUSTER)]);
    assert_eq!(place.bench.read(&snapshot, CLUSTER, 512), Err(Errno::EACCES));
    assert_eq!(
        place.bench.read(&snapshot, 0, crate::io::size(CLUSTER) + 1),
        Err(Errno::EACCES),
        "not even the part that is there"
    );
    assert_eq!(place.bench.read(&snapshot, 2 * CLUSTER, 512), Ok(vec![1; 512]));
    place.write(CLUSTER, 512, 2).expect("writes");
    assert_eq!(Place::ops(&place.target), [], "nobody asks for it any more");
}

#[test]
fn status_of_the_snapshot_follows_the_side_that_has_it() {
    use crate::types::StatusFlags as S;
    let place = place(json!({}));
    let snapshot = place.snapshot();
    place.write(CLUSTER, 512, 2).expect("writes");
    let status = |offset| {
        let status = place
            .bench
            .run(snapshot.block_status(offset, CLUSTER))
            .expect("status");
        (status.flags - S::EOF, status.pnum)
    };
    assert_eq!(status(0), (S::DATA | S::ALLOCATED, CLUSTER));
    assert_eq!(status(CLUSTER), (S::DATA | S::ALLOCATED, CLUSTER));
    place.bench.run(snapshot.discard(0, CLUSTER)).expect("discards");
    assert_eq!(
        place.bench.run(snapshot.block_status(0, CLUSTER)),
        Err(Errno::EACCES)
    );
}

#[test]
fn only_what_the_bitmap_marks_is_kept() {
    let bench = Bench::new();
    let (node, source) = bench.node("source", LENGTH, 4096);
    let (_, target) = bench.node("target", LENGTH, 4096);
    source.put(0, &vec![1; crate::io::size(LENGTH)]);
    let bitmap = Rc::new(DirtyBitmap::new("b", 4096, LENGTH));
    bitmap.mark(CLUSTER + 4096, CLUSTER + 8192);
    node.bitmaps.borrow_mut().push(Rc::clone(&bitmap));
    let options = json!({"file": "source", "target": "target", "bitmap": {"node": "source", "name": "b"}});
    let filter = bench.open(&FACTS, "filter", options).expect("opens");
    let (guest, node) = (
        bench.guest(&filter),
        bench
            .open(&snapshot_access::FACTS, "s", json!({"file": "filter"}))
            .expect("opens"),
    );
    let snapshot = bench.guest(&node);
    for offset in [0, CLUSTER] {
        bench
            .run(guest.write(offset, &[2; 512], ReqFlags::empty()))
            .expect("writes");
    }
    assert_eq!(target.take_ops(), [(Op::Write, CLUSTER, CLUSTER)]);
    assert_eq!(bench.read(&snapshot, CLUSTER, 512), Ok(vec![1; 512]));
    assert_eq!(bench.read(&snapshot, 0, 512), Err(Errno::EACCES));
    assert_eq!(
        bitmap.bits.borrow().count(),
        3,
        "it is only looked at; the writes mark it"
    );
}

#[test]
fn a_copy_that_takes_too_long_fails_and_goes_on() {
    let place = place(json!({"cbw-timeout": 5}));
    place.target.hold(Op::Write);
    let before = place.bench.env.now();
    assert_eq!(place.write(0, 512, 2), Err(Errno::ETIMEDOUT));
    assert_eq!(
        place.bench.env.now() - before,
        5_000_000_000,
        "five whole seconds"
    );
    assert_eq!(place.source.own(0, 512), vec![1; 512]);
    assert_eq!(
        place.filter.io.in_flight.count(),
        1,
        "the copy is still under way"
    );
    place.target.release();
    place.write(CLUSTER, 512, 2).expect("in time");
    place.write(0, 512, 2).expect("it waited for the copy");
    let copies = |at| move |(_, offset, _): &(Op, u64, u64)| *offset == at;
    let ops = Place::ops(&place.target);
    assert_eq!(ops.iter().filter(|op| copies(0)(op)).count(), 1, "copied once");
    assert_eq!(place.filter.io.in_flight.count(), 0);
}

#[test]
fn masks_follow_the_parents() {
    let bench = Bench::new();
    let (source, _) = bench.node("source", LENGTH, 4096);
    bench.node("target", LENGTH, 4096);
    let writer = bench.guest(&source);
    let filter = bench
        .open(&FACTS, "filter", json!({"file": "source", "target": "target"}))
        .expect("a writer beside it does no harm yet");
    let file = bench.layer.edge(filter.file.get().expect("file"));
    let (none, all) = (Perm::empty(), Perm::all());
    assert_eq!(file.masks(), (none, all));
    let reader = |perm| Backend::new(&bench.layer, filter.id, None, perm, Perm::all(), true);
    let refused = reader(Perm::CONSISTENT_READ).expect_err("now it would");
    assert!(
        refused
            .desc
            .contains("unshared by node 'filter' (uses node 'source' as 'file' child)")
    );
    bench.run(writer.remove());
    let user = reader(Perm::empty()).expect("alone");
    let unshared = Perm::WRITE | Perm::RESIZE;
    assert_eq!(
        file.masks(),
        (Perm::CONSISTENT_READ, all - unshared),
        "whatever it asks"
    );
    bench.run(user.remove());
    assert_eq!(file.masks(), (none, all));
    let target = filter.children.borrow()[0];
    assert_eq!(
        bench.layer.edge(target).masks(),
        (Perm::WRITE, all - Perm::RESIZE)
    );
}

#[test]
fn refusals() {
    let bench = Bench::new();
    bench.node("source", LENGTH, 4096);
    bench.node("target", LENGTH, 4096);
    let (other, _) = bench.node("other", LENGTH / 2, 4096);
    let bitmap = DirtyBitmap::new("b", 4096, LENGTH / 2);
    other.bitmaps.borrow_mut().push(Rc::new(bitmap));
    let cases = [
        (
            json!({"min-cluster-size": 1000}),
            "Cannot create block-copy-state: min-cluster-size needs to be a power of 2",
        ),
        (
            json!({"min-cluster-size": -1}),
            "Cannot create block-copy-state: min-cluster-size too large: 18446744073709551615 > 9223372036854775807",
        ),
        (
            json!({"min-cluster-size": 1u64 << 28}),
            "Cannot create block-copy-state: min-cluster-size too large: 268435456 > 134217728",
        ),
        (
            json!({"bitmap": {"node": "other", "name": "b"}}),
            "Cannot create block-copy-state: Failed to merge bitmap 'b' to internal copy-bitmap: Bitmaps are of different \
             sizes (destination size is 262144, source size is 131072) and can't be merged",
        ),
        (
            json!({"bitmap": {"node": "x", "name": "b"}}),
            "Node 'x' not found",
        ),
        (
            json!({"bitmap": {"node": "source", "name": "b"}}),
            "Dirty bitmap 'b' not found",
        ),
        (
            json!({"target": "other"}),
            "Cannot create block-copy-state: Source and target image have different sizes",
        ),
    ];
    for (n, (more, text)) in cases.into_iter().enumerate() {
        let mut options = json!({"file": "source", "target": "target"});
        if let (Some(options), Value::Object(more)) = (options.as_object_mut(), more) {
            options.extend(more);
        }
        let refused = bench.open(&FACTS, &format!("f{n}"), options);
        assert_eq!(refused.expect_err("refused").desc, text);
    }
    let plain = bench
        .open(&snapshot_access::FACTS, "s", json!({"file": "source"}))
        .expect("opens");
    let guest = bench.guest(&plain);
    assert_eq!(
        bench.read(&guest, 0, 512),
        Err(Errno::ENOTSUP),
        "no point in time there"
    );
}

#[test]
fn a_longer_source_is_kept_as_far_as_the_target_reaches() {
    use crate::jobs::testing::{KIB, World};
    let world = World::new(1);
    let length = 2 * CLUSTER + 1536;
    for name in ["src", "tgt"] {
        world.qcow2(name, length, None);
        world.open(name, name, json!({}));
    }
    world.fill("src", 0, length, 7);
    let filter = json!({"driver": "copy-before-write", "node-name": "cbw", "file": "src", "target": "tgt"});
    world.qmp("blockdev-add", filter);
    world.qmp("block_resize", json!({"node-name": "src", "size": 4 * CLUSTER}));
    world.qmp(
        "blockdev-add",
        json!({"driver": "snapshot-access", "node-name": "snap", "file": "cbw"}),
    );
    world.fill("cbw", 2 * CLUSTER, CLUSTER + 4 * KIB, 9);
    let kept = world.read_all("tgt");
    assert!(kept[..crate::io::size(2 * CLUSTER)].iter().all(|b| *b == 0));
    assert!(kept[crate::io::size(2 * CLUSTER)..].iter().all(|b| *b == 7));
    let snapshot = world.layer.find_node("snap").expect("a node");
    let guest = Backend::new(
        &world.layer,
        snapshot,
        None,
        Perm::CONSISTENT_READ,
        Perm::all(),
        true,
    );
    let guest = guest.expect("no conflict");
    let read = |offset: u64, bytes: usize| {
        let mut data = vec![0; bytes];
        world
            .memory
            .block_on(guest.read(offset, &mut data))
            .map(|()| data)
    };
    assert_eq!(read(2 * CLUSTER, 1536), Ok(vec![7; 1536]));
    assert_eq!(read(2 * CLUSTER, 2048), Err(Errno::EACCES), "it was not there");
    world.memory.block_on(guest.remove());
}

#[test]
fn a_longer_target_has_room_and_a_bitmap_in_use_is_not_looked_at() {
    let bench = Bench::new();
    let (source, _) = bench.node("source", LENGTH, 4096);
    bench.node("target", 2 * LENGTH, 4096);
    let bitmap = Rc::new(DirtyBitmap::new("b", 4096, LENGTH));
    source.bitmaps.borrow_mut().push(Rc::clone(&bitmap));
    let open = |name: &str| {
        let options =
            json!({"file": "source", "target": "target", "bitmap": {"node": "source", "name": "b"}});
        bench.open(&FACTS, name, options)
    };
    open("filter").expect("a longer target is fine");
    for (name, flag, text) in [
        (
            "second",
            &bitmap.inconsistent,
            "Bitmap 'b' is inconsistent and cannot be used",
        ),
        (
            "third",
            &bitmap.busy,
            "Bitmap 'b' is currently in use by another operation and cannot be used",
        ),
    ] {
        flag.set(true);
        let refusal = open(name).expect_err("what it marks is not what was written");
        let prefix = "Cannot create block-copy-state: Failed to merge bitmap 'b' to internal copy-bitmap: ";
        assert_eq!(refusal.desc, format!("{prefix}{text}"));
    }
}

#[test]
fn what_was_cut_off_is_not_shown_when_the_source_grows_again() {
    let place = place(json!({}));
    let snapshot = place.snapshot();
    let read = |offset| {
        let mut data = [0; 512];
        place
            .bench
            .run(snapshot.read(offset, &mut data))
            .map(|()| data[0])
    };
    assert_eq!(read(3 * CLUSTER), Ok(1));
    let layer = &place.bench.layer;
    let copy = block_copy(&place.filter).expect("a filter");
    // Half of the last cluster but one stays.
    copy.cut(layer, 2 * CLUSTER + CLUSTER / 2);
    copy.cut(layer, LENGTH);
    assert_eq!(read(CLUSTER), Ok(1));
    assert_eq!(read(2 * CLUSTER), Ok(1));
    assert_eq!(
        read(3 * CLUSTER - 512),
        Err(Errno::EACCES),
        "half a cluster was lost"
    );
    assert_eq!(read(3 * CLUSTER), Err(Errno::EACCES));
    place
        .write(3 * CLUSTER, 512, 9)
        .expect("nothing is kept there any more");
    assert_eq!(Place::ops(&place.target), []);
}
