//! Tests of block status: one layer, chain walk, cache, SEEK rules of host files.

use serde_json::json;

use crate::driver::{DriverStatus, Limits};
use crate::drivers::{copy_on_read, file, null_co, raw};
use crate::error::Errno;
use crate::io::fixture::{Bench, FORMAT, NO_BACKING, NO_STATUS};
use crate::io::status::BlockStatus;
use crate::types::{OpenFlags, StatusFlags as S};

const MIB: u64 = 1 << 20;
const RDWR: OpenFlags = OpenFlags::RDWR;

fn one(bench: &Bench, name: &str, offset: u64, bytes: u64) -> BlockStatus {
    bench
        .run(bench.layer.block_status(bench.named(name), offset, bytes))
        .expect("answers")
}

fn above(bench: &Bench, name: &str, offset: u64, bytes: u64) -> BlockStatus {
    bench
        .run(
            bench
                .layer
                .block_status_above(bench.named(name), None, offset, bytes),
        )
        .expect("answers")
}

fn allocated_above(bench: &Bench, name: &str, base: Option<&str>, incl: bool, at: (u64, u64)) -> (u32, u64) {
    let base = base.map(|b| bench.named(b));
    bench
        .run(
            bench
                .layer
                .is_allocated_above(bench.named(name), base, incl, at.0, at.1),
        )
        .expect("answers")
}

#[test]
fn every_driver_answer_becomes_this() {
    let (data, zero, valid) = (S::DATA, S::ZERO, S::OFFSET_VALID);
    let none = S::empty();
    // What the driver says; what comes out without backing, and with a backing file that is long enough.
    let table = [
        (
            data | zero | valid,
            data | zero | valid | S::ALLOCATED,
            data | zero | valid | S::ALLOCATED,
        ),
        (
            data | valid,
            data | valid | S::ALLOCATED,
            data | valid | S::ALLOCATED,
        ),
        (
            zero | valid,
            zero | valid | S::ALLOCATED,
            zero | valid | S::ALLOCATED,
        ),
        (valid, zero | valid, valid),
        (
            data | zero,
            data | zero | S::ALLOCATED,
            data | zero | S::ALLOCATED,
        ),
        (
            data | S::COMPRESSED,
            data | S::COMPRESSED | S::ALLOCATED,
            data | S::COMPRESSED | S::ALLOCATED,
        ),
        (zero, zero | S::ALLOCATED, zero | S::ALLOCATED),
        (none, zero, none),
    ];
    for (says, alone, backed) in table {
        let bench = Bench::new();
        let (top, driver) = bench.node("top", 8192, 512);
        driver.status.set(Some(DriverStatus {
            flags: says,
            pnum: 4096,
            map: 1 << 20,
            file: Some(top.id),
        }));
        let answer = one(&bench, "top", 0, 1024);
        assert_eq!((answer.flags, answer.pnum), (alone, 1024), "{says:?} alone");
        let (base, _) = bench.node("base", 8192, 512);
        bench.back(&top, &base);
        assert_eq!(one(&bench, "top", 0, 1024).flags, backed, "{says:?} backed");
    }
}

#[test]
fn clamping_and_alignment() {
    let bench = Bench::new();
    let (top, driver) = bench.node("top", 8192, 512);
    driver.limits.set(Limits {
        request_alignment: 4096,
        ..Limits::default()
    });
    bench.refresh(&top);
    let flags = S::DATA | S::OFFSET_VALID;
    driver.status.set(Some(DriverStatus {
        flags,
        pnum: 4096,
        map: 65536,
        file: Some(top.id),
    }));
    let answer = one(&bench, "top", 1000, 100);
    assert_eq!(
        (answer.pnum, answer.map),
        (100, 66536),
        "from the aligned start to the offset asked"
    );
    let answer = one(&bench, "top", 4096 + 1000, 8000);
    assert_eq!((answer.pnum, answer.flags.contains(S::EOF)), (3096, true));
    let end = one(&bench, "top", 8192, 100);
    assert_eq!((end.flags, end.pnum), (S::EOF, 0));
    assert_eq!(one(&bench, "top", 0, 0).pnum, 0);
    driver.status_error.set(Some(Errno::EIO));
    let failed = bench.run(bench.layer.block_status(top.id, 0, 512));
    assert_eq!(failed, Err(Errno::EIO));
}

#[test]
fn a_driver_that_cannot_tell() {
    let bench = Bench::new();
    bench.node_of(&NO_STATUS, "n", 8192, 512, RDWR);
    let answer = one(&bench, "n", 4096, 8192);
    assert_eq!(
        (answer.flags, answer.pnum),
        (S::DATA | S::ALLOCATED | S::EOF, 4096)
    );
    let (node, driver) = bench.node_of(&NO_BACKING, "m", 8192, 512, RDWR);
    driver.status.set(Some(DriverStatus {
        flags: S::OFFSET_VALID,
        pnum: 512,
        map: 0,
        file: Some(node.id),
    }));
    assert_eq!(
        one(&bench, "m", 0, 512).flags,
        S::OFFSET_VALID,
        "neither zero nor allocated"
    );
}

#[test]
fn null_is_zero_only_when_it_reads_zero() {
    let bench = Bench::new();
    bench
        .open(
            &null_co::FACTS,
            "zero",
            json!({"size": 4096, "read-zeroes": true}),
        )
        .expect("opens");
    bench
        .open(&null_co::FACTS, "null", json!({"size": 4096}))
        .expect("opens");
    assert_eq!(
        one(&bench, "zero", 0, 512).flags,
        S::ZERO | S::OFFSET_VALID | S::ALLOCATED
    );
    assert_eq!(one(&bench, "null", 0, 512).flags, S::OFFSET_VALID);
}

#[test]
fn short_layers_first_and_lower() {
    let bench = Bench::new();
    let (base, base_driver) = bench.node("base", 2 * MIB, 65536);
    let (mid, _) = bench.node("mid", MIB, 65536);
    let (top, _) = bench.node("top", 2 * MIB, 65536);
    base_driver.put(0, &vec![0xbb; 2 << 20]);
    bench.back(&mid, &base);
    bench.back(&top, &mid);
    // (i) The first node being short is the end of that layer ...
    assert_eq!(allocated_above(&bench, "mid", None, false, (MIB, MIB)), (0, 0));
    // ... a lower one being short decides: zeroes, allocated there.
    let hidden = above(&bench, "top", MIB, MIB);
    assert_eq!(
        (hidden.flags, hidden.pnum),
        (S::ZERO | S::ALLOCATED | S::EOF, MIB)
    );
    assert_eq!((hidden.file, hidden.depth), (Some(mid.id), 2));
    assert_eq!(
        allocated_above(&bench, "top", Some("base"), false, (MIB, MIB)),
        (2, MIB)
    );
    assert_eq!(
        allocated_above(&bench, "top", None, false, (0, 65536)),
        (3, 65536)
    );
    assert_eq!(
        allocated_above(&bench, "top", Some("base"), false, (0, 65536)),
        (0, 65536)
    );
    assert_eq!(
        allocated_above(&bench, "top", Some("base"), true, (0, 65536)),
        (3, 65536)
    );
    assert_eq!(
        allocated_above(&bench, "top", Some("top"), false, (0, 65536)),
        (0, 65536)
    );
    // Over the end of mid the answer is split there, and is exact about zeroes only when asked.
    let (_, n) = allocated_above(&bench, "top", Some("base"), false, (MIB - 512, 1024));
    assert_eq!(n, 512);
    assert!(
        one(&bench, "top", MIB, 512).flags.contains(S::ZERO),
        "past the backing file"
    );
}

#[test]
fn eof_is_that_of_the_top() {
    let bench = Bench::new();
    let (base, base_driver) = bench.node("base", MIB, 65536);
    let (top, _) = bench.node("top", 2 * MIB, 65536);
    base_driver.put(0, &vec![0xbb; 1 << 20]);
    bench.back(&top, &base);
    let lower = above(&bench, "top", 0, 2 * MIB);
    assert_eq!(
        (lower.pnum, lower.flags),
        (MIB, S::DATA | S::ALLOCATED),
        "the end of base is not the end of top"
    );
    let last = above(&bench, "top", MIB, 2 * MIB);
    assert_eq!((last.pnum, last.flags), (MIB, S::ZERO | S::ALLOCATED | S::EOF));
}

#[test]
fn depth_counts_filters() {
    let bench = Bench::new();
    let (base, base_driver) = bench.node("base", 4096, 512);
    let (top, driver) = bench.node("top", 4096, 512);
    base_driver.put(512, &[1; 512]);
    driver.put(0, &[2; 512]);
    bench.back(&top, &base);
    bench
        .open(&copy_on_read::FACTS, "cor", json!({"file": "top"}))
        .expect("opens");
    // (ii) The filter answers for the top, so base below a filtered top is third.
    assert_eq!(allocated_above(&bench, "cor", None, false, (0, 512)), (1, 512));
    assert_eq!(allocated_above(&bench, "cor", None, false, (512, 512)), (3, 512));
    assert_eq!(above(&bench, "cor", 1024, 512).depth, 3);
}

#[test]
fn raw_over_an_overlay_shows_all_of_its_chain() {
    let bench = Bench::new();
    let (base, base_driver) = bench.node("base", 4096, 512);
    let (top, driver) = bench.node("top", 4096, 512);
    base_driver.put(0, &[1; 4096]);
    driver.put(512, &[2; 512]);
    bench.back(&top, &base);
    bench
        .open(&raw::FACTS, "raw", json!({"file": "top", "offset": 512}))
        .expect("opens");
    // The walk stops at raw, so what is below its file is raw's own.
    assert_eq!(allocated_above(&bench, "raw", None, false, (0, 512)), (1, 512));
    assert_eq!(allocated_above(&bench, "raw", None, false, (512, 512)), (1, 512));
}

#[test]
fn recursion_finds_zeroes_in_the_file() {
    let bench = Bench::new();
    let (top, driver) = bench.node("top", 65536, 512);
    let (inner, inner_driver) = bench.node_of(&FORMAT, "inner", 8192, 4096, RDWR);
    let flags = S::DATA | S::OFFSET_VALID | S::RECURSE;
    let answer = |map| {
        Some(DriverStatus {
            flags,
            pnum: 8192,
            map,
            file: Some(inner.id),
        })
    };
    inner_driver.put(0, &[1; 4096]);
    driver.status.set(answer(0));
    let data = one(&bench, "top", 0, 8192);
    assert_eq!(
        (data.flags, data.pnum),
        (S::DATA | S::OFFSET_VALID | S::ALLOCATED, 4096)
    );
    driver.status.set(answer(4096));
    let zero = one(&bench, "top", 0, 8192);
    assert_eq!(
        (zero.flags.contains(S::ZERO), zero.pnum),
        (true, 8192),
        "a hole up to the file's end goes on"
    );
    driver.status.set(answer(8192));
    assert!(
        one(&bench, "top", 0, 8192).flags.contains(S::ZERO),
        "past the end of the file"
    );
    inner_driver.status_error.set(Some(Errno::EIO));
    driver.status.set(answer(0));
    let unknown = one(&bench, "top", 0, 8192);
    assert_eq!(
        (unknown.flags, unknown.pnum),
        (S::DATA | S::OFFSET_VALID | S::ALLOCATED, 8192),
        "errors are ignored"
    );
    assert_eq!(
        bench.run(bench.layer.is_allocated(top.id, 0, 8192)),
        Ok((true, 8192)),
        "only asked when exact"
    );
}

#[test]
fn seek_rules() {
    let bench = Bench::new();
    bench.env.create("f", 20480 + 1000);
    bench
        .open(&file::FILE, "n", json!({"filename": "f"}))
        .expect("opens");
    let mut image = vec![0; 21480];
    image[4096..8192].fill(1);
    bench.env.create_with("g", &image[..0]);
    let node = bench.layer.node(bench.named("n"));
    assert_eq!(node.length(), 21504);
    let hole = S::ZERO | S::OFFSET_VALID | S::ALLOCATED;
    let data = S::DATA | S::OFFSET_VALID | S::ALLOCATED;
    let tail = one(&bench, "n", 0, 65536);
    assert_eq!(
        (tail.flags, tail.pnum, tail.map),
        (hole | S::EOF, 21504, 0),
        "a trailing hole reaches the end"
    );
    let guest = bench.guest(&node);
    bench
        .run(guest.write(4096, &[1; 4096], crate::types::ReqFlags::empty()))
        .expect("writes");
    let before = one(&bench, "n", 0, 65536);
    assert_eq!((before.flags, before.pnum), (hole, 4096));
    let inside = one(&bench, "n", 5000, 65536);
    assert_eq!((inside.flags, inside.pnum, inside.map), (data, 3192, 5000));
    assert_eq!(one(&bench, "n", 8192, 4096).flags, hole);
    let allocation = bench.run(bench.layer.is_allocated(node.id, 0, 21504));
    assert_eq!(allocation, Ok((true, 21504)), "without want_zero it is all data");
    // The last, unaligned sector: data to the end of the file, then zeroes.
    bench
        .run(guest.write(21000, &[1; 480], crate::types::ReqFlags::empty()))
        .expect("writes");
    let last = one(&bench, "n", 21000, 504);
    assert_eq!((last.flags, last.pnum), (data, 480));
    let rest = one(&bench, "n", 21480, 24);
    assert_eq!((rest.flags, rest.pnum), (hole | S::EOF, 24));
}

#[test]
fn data_is_cached_until_zeroed_and_zeroes_never() {
    let bench = Bench::new();
    bench.env.create_with("f", &[1; 16384]);
    let node = bench
        .open(&file::FILE, "n", json!({"filename": "f"}))
        .expect("opens");
    let guest = bench.guest(&node);
    assert_eq!(one(&bench, "n", 0, 512).pnum, 512);
    assert_eq!(
        node.io.status_cache.get(),
        Some((0, 16384)),
        "all that the driver said"
    );
    bench
        .run(guest.write(0, &[2; 512], crate::types::ReqFlags::empty()))
        .expect("writes");
    assert!(node.io.status_cache.get().is_some(), "data stays data");
    bench.run(guest.discard(4096, 4096)).expect("discards");
    assert_eq!(node.io.status_cache.get(), None);
    let hole = one(&bench, "n", 4096, 4096);
    assert!(hole.flags.contains(S::ZERO) && node.io.status_cache.get().is_none());
    one(&bench, "n", 0, 512);
    bench
        .run(guest.write_zeroes(0, 512, crate::types::ReqFlags::empty()))
        .expect("zeroes");
    assert_eq!(node.io.status_cache.get(), None);
}
