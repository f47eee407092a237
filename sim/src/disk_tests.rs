//! Tests of the simulated disk.

use super::*;

fn poll<F: Future>(future: &mut Pin<Box<F>>) -> Poll<F::Output> {
    future.as_mut().poll(&mut Context::from_waker(Waker::noop()))
}

fn disk_with(name: &str, bytes: usize) -> (Disk, FileId) {
    let disk = Disk::default();
    disk.reset(DiskOptions::default());
    let file = disk.create(name, |data| data.resize(bytes, 7));
    (disk, file)
}

#[test]
fn a_read_that_completes_before_an_older_write_sees_the_old_bytes() {
    let (disk, file) = disk_with("a", 1024);
    let mut seen = [0; 4];
    {
        let mut source = vec![1; 4];
        let mut write = Box::pin(disk.write(file, 0, &source));
        assert!(poll(&mut write).is_pending());
        let mut read = Box::pin(disk.read(file, 0, &mut seen));
        assert!(poll(&mut read).is_pending());
        assert_eq!(disk.pending(), 2);
        disk.complete(1);
        assert_eq!(poll(&mut read), Poll::Ready(Ok(4)));
        assert!(poll(&mut write).is_pending());
        disk.complete(0);
        assert_eq!(poll(&mut write), Poll::Ready(Ok(0)));
        drop(write);
        source.fill(0);
    }
    assert_eq!(seen, [7; 4]);
    disk.with_bytes(file, |bytes| assert_eq!(bytes[..5], [1, 1, 1, 1, 7]));
}

#[test]
fn of_two_overlapping_writes_the_one_completed_last_wins() {
    for first in 0..2 {
        let (disk, file) = disk_with("a", 16);
        let (one, two) = ([1; 8], [2; 8]);
        let mut a = Box::pin(disk.write(file, 0, &one));
        let mut b = Box::pin(disk.write(file, 4, &two));
        assert!(poll(&mut a).is_pending() && poll(&mut b).is_pending());
        disk.complete(first);
        disk.complete(0);
        let middle = if first == 0 { 2 } else { 1 };
        disk.with_bytes(file, |bytes| assert_eq!(bytes[4..8], [middle; 4]));
    }
}

#[test]
fn reads_are_short_at_the_end_and_writes_grow() {
    let (disk, file) = disk_with("a", 10);
    let mut buf = [9; 8];
    let mut read = Box::pin(disk.read(file, 6, &mut buf));
    assert!(poll(&mut read).is_pending());
    disk.complete(0);
    assert_eq!(poll(&mut read), Poll::Ready(Ok(4)));
    let mut write = Box::pin(disk.write(file, 2000, &[3; 8]));
    assert!(poll(&mut write).is_pending());
    disk.complete(0);
    assert_eq!(disk.length(file), 2008);
    disk.with_bytes(file, |bytes| assert!(bytes[10..2000].iter().all(|&b| b == 0)));
}

#[test]
fn holes_come_and_go() {
    let (disk, file) = disk_with("a", 512 * 200);
    assert_eq!(
        disk.extent(file, 100),
        Ok(Extent {
            data: true,
            bytes: 512 * 200 - 100
        })
    );
    let mut io = Box::pin(disk.request(
        file,
        Op::Discard {
            offset: 512 * 3 + 1,
            bytes: 512 * 140,
        },
    ));
    assert!(poll(&mut io).is_pending());
    disk.complete(0);
    assert_eq!(
        disk.extent(file, 0),
        Ok(Extent {
            data: true,
            bytes: 512 * 4
        })
    );
    assert_eq!(
        disk.extent(file, 512 * 4),
        Ok(Extent {
            data: false,
            bytes: 512 * 139
        })
    );
    disk.with_bytes(file, |bytes| {
        assert_eq!((bytes[512 * 3], bytes[512 * 3 + 1]), (7, 0));
    });
    disk.patch(file, 512 * 70 + 5, &[1]);
    assert_eq!(
        disk.extent(file, 512 * 4),
        Ok(Extent {
            data: false,
            bytes: 512 * 66
        })
    );
    assert_eq!(
        disk.extent(file, 512 * 70),
        Ok(Extent {
            data: true,
            bytes: 512
        })
    );
    let mut io = Box::pin(disk.request(file, Op::Truncate { length: 512 * 300 }));
    assert!(poll(&mut io).is_pending());
    disk.complete(0);
    assert_eq!(
        disk.extent(file, 512 * 200),
        Ok(Extent {
            data: false,
            bytes: 512 * 100
        })
    );
    assert_eq!(disk.extent(file, 512 * 300), Err(Errno::ENXIO));
}

#[test]
fn what_the_disk_cannot_do_it_says_at_once() {
    let (disk, file) = disk_with("a", 512);
    disk.inner.borrow_mut().options = DiskOptions {
        power: false,
        alignment: 512,
        unmap: false,
    };
    let mut io = Box::pin(disk.request(
        file,
        Op::Discard {
            offset: 0,
            bytes: 512,
        },
    ));
    assert_eq!(poll(&mut io), Poll::Ready(Err(Errno::ENOTSUP)));
    let mut io = Box::pin(disk.request(file, Op::Truncate { length: MAX_FILE + 1 }));
    assert_eq!(poll(&mut io), Poll::Ready(Err(Errno::EFBIG)));
    let unaligned = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let mut buf = [0; 100];
        let _ = poll(&mut Box::pin(disk.read(file, 0, &mut buf)));
    }));
    assert!(unaligned.is_err());
}

#[test]
fn a_dropped_request_is_gone() {
    let (disk, file) = disk_with("a", 16);
    let mut write = Box::pin(disk.write(file, 0, &[1; 8]));
    assert!(poll(&mut write).is_pending());
    drop(write);
    assert_eq!(disk.pending(), 0);
    disk.with_bytes(file, |bytes| assert_eq!(bytes[0], 7));
}

#[test]
fn two_writers_at_once_are_noticed() {
    let (disk, file) = disk_with("a", 16);
    disk.opened(file, true);
    disk.opened(file, false);
    assert!(!disk.contested(file));
    disk.closed(file, true);
    disk.opened(file, true);
    assert!(!disk.contested(file));
    disk.writer(file, true);
    assert!(disk.contested(file));
    assert_eq!(disk.open_handles(), 2);
}

/// How a write of `bytes` at `offset` ends in each bad way, and which of its sectors are then there.
fn bad_ends(offset: u64, bytes: usize) -> Vec<(Errno, Vec<bool>)> {
    let (disk, file) = disk_with("a", 65536);
    let source = vec![1; bytes];
    let mut ends = Vec::new();
    for ending in 1.. {
        disk.patch(file, 0, &[7; 65536]);
        let mut write = Box::pin(disk.write(file, offset, &source));
        assert!(poll(&mut write).is_pending());
        if ending == disk.endings(0) {
            disk.complete(0);
            assert_eq!(poll(&mut write), Poll::Ready(Ok(0)));
            break;
        }
        let bad = disk.fail(0, ending);
        assert_eq!(poll(&mut write), Poll::Ready(Err(bad.errno)));
        let written = disk.with_bytes(file, |all| {
            let start = to_usize(offset);
            assert!(all[..start].iter().chain(&all[start + bytes..]).all(|b| *b == 7));
            all[start..start + bytes]
                .iter()
                .map(|b| *b == 1)
                .collect::<Vec<_>>()
        });
        assert_eq!(written.iter().filter(|w| **w).count() as u64, bad.done);
        ends.push((bad.errno, written));
    }
    ends
}

#[test]
fn a_failed_write_has_any_prefix_of_its_sectors_written() {
    let ends = bad_ends(512, 2048);
    assert_eq!(ends.len(), 6, "nothing twice, everything, three cuts");
    let prefixes: Vec<usize> = ends
        .iter()
        .map(|(_, written)| written.iter().position(|w| !w).unwrap_or(written.len()))
        .collect();
    assert_eq!(prefixes, [0, 0, 2048, 512, 1024, 1536]);
    assert_eq!(ends[1].0, Errno::ENOSPC);
    assert!(
        ends.iter()
            .all(|(_, written)| written.is_sorted_by(|a, b| a >= b))
    );
    // Within one sector there is nothing to cut, across a boundary there is.
    assert_eq!(bad_ends(16, 64).len(), 3);
    let across = bad_ends(500, 64);
    assert_eq!(across.len(), 4);
    assert_eq!(across[3].1.iter().filter(|w| **w).count(), 12);
    assert_eq!(bad_ends(0, 65536).len(), 3 + 12, "few ways for long ones");
}

#[test]
fn failed_reads_give_no_data_and_other_failures_change_nothing() {
    let (disk, file) = disk_with("a", 1024);
    let mut seen = [0; 4];
    let mut read = Box::pin(disk.read(file, 0, &mut seen));
    assert!(poll(&mut read).is_pending());
    disk.fail(0, 1);
    assert_eq!(poll(&mut read), Poll::Ready(Err(Errno::EIO)));
    drop(read);
    assert_ne!(seen, [7; 4], "who takes the buffer for data is found out");
    for op in [Op::Flush, Op::Truncate { length: 0 }] {
        let mut request = Box::pin(disk.request(file, op));
        assert!(poll(&mut request).is_pending());
        disk.fail(0, 1);
        assert_eq!(poll(&mut request), Poll::Ready(Err(Errno::EIO)));
        disk.with_bytes(file, |bytes| assert_eq!(bytes, [7; 1024]));
    }
}
