//! The environment against real files, the same checks for every way of doing a request.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;

use super::{Engine, RealEnv, RealOptions};
use crate::env::{Env, OpenStorage, Storage, StorageKind};
use crate::error::{Errno, QmpError};

/// Every way to do a request: (engine, inline). io_uring only where the kernel lets us.
fn ways() -> Vec<(Engine, bool)> {
    let ring = RealEnv::new(RealOptions {
        engine: Engine::IoUring,
        ..RealOptions::default()
    });
    let mut ways = vec![(Engine::Threads, true), (Engine::Threads, false)];
    match ring {
        Ok(_) => ways.extend([(Engine::IoUring, true), (Engine::IoUring, false)]),
        Err(e) => {
            eprintln!("SKIPPED: io_uring is not permitted here ({e})");
            assert_ne!(
                std::env::var("BLKCHECK_REQUIRE_ALL").as_deref(),
                Ok("1"),
                "io_uring is required"
            );
        }
    }
    ways
}

fn env(root: &Path, (engine, inline): (Engine, bool)) -> RealEnv {
    let env = RealEnv::new(RealOptions {
        root: Some(root.to_owned()),
        engine,
        inline,
        job_parallelism: 4,
    });
    let env = env.expect("an engine that was just tried");
    assert_eq!(env.engine(), engine);
    env
}

fn open_as(env: &RealEnv, filename: &str, writable: bool, direct: bool) -> Result<Rc<dyn Storage>, QmpError> {
    env.open(&OpenStorage {
        filename,
        kind: StorageKind::File,
        writable,
        direct,
    })
}

/// Runs `check` once per way and per kind of file system (disk, memory).
fn everywhere(check: impl Fn(&RealEnv, &Path)) {
    for base in [std::env::temp_dir().as_path(), Path::new("/dev/shm")] {
        for way in ways() {
            let dir = tempfile::Builder::new()
                .prefix("blkcheck-real-")
                .tempdir_in(base)
                .expect("a directory");
            check(&env(dir.path(), way), dir.path());
        }
    }
}

fn pattern(bytes: usize, seed: u8) -> Vec<u8> {
    (0..bytes)
        .map(|i| u8::try_from(i % 251).expect("below 251") ^ seed)
        .collect()
}

#[test]
fn what_is_written_is_read_and_ends_where_the_file_ends() {
    everywhere(|env, dir| {
        fs::write(dir.join("a"), pattern(3000, 1)).unwrap();
        let file = open_as(env, "a", true, false).unwrap();
        env.block_on(async {
            let mut buf = vec![9; 5000];
            assert_eq!(file.read(0, &mut buf).await, Ok(3000));
            assert_eq!(buf[..3000], pattern(3000, 1));
            assert_eq!(file.read(3000, &mut buf).await, Ok(0));
            // Unaligned, larger than one bounce buffer, growing.
            let data = pattern((5 << 20) + 77, 3);
            assert_eq!(file.write(2999, &data).await, Ok(()));
            let mut back = vec![0; data.len() + 10];
            assert_eq!(file.read(2999, &mut back).await, Ok(data.len()));
            assert!(back[..data.len()] == data);
            assert_eq!(file.flush().await, Ok(()));
            assert_eq!(file.length(), Ok(2999 + data.len() as u64));
        });
    });
}

#[test]
fn concurrent_requests_on_one_thread_all_finish() {
    everywhere(|env, dir| {
        fs::write(dir.join("a"), []).unwrap();
        let file = open_as(env, "a", true, false).unwrap();
        let done = Rc::new(std::cell::Cell::new(0));
        for task in 0..40u8 {
            let (file, done) = (Rc::clone(&file), Rc::clone(&done));
            let write = async move {
                for round in 0..20u64 {
                    let data = pattern(4096, task);
                    file.write((u64::from(task) * 20 + round) * 4096, &data)
                        .await
                        .unwrap();
                }
                done.set(done.get() + 1);
            };
            env.spawn("writer", Box::pin(write));
        }
        env.block_on(async {
            while done.get() < 40 {
                env.sleep_until(env.now() + 100_000).await;
            }
            let mut buf = vec![0; 4096];
            for block in 0..800u64 {
                assert_eq!(file.read(block * 4096, &mut buf).await, Ok(4096));
                assert_eq!(buf, pattern(4096, u8::try_from(block / 20).unwrap()));
            }
        });
    });
}

#[test]
fn writes_from_lent_memory_arrive_and_the_memory_comes_back() {
    everywhere(|env, dir| {
        fs::write(dir.join("a"), []).unwrap();
        let file = open_as(env, "a", true, false).unwrap();
        let ways: Vec<_> = (0..8_u8)
            .map(|n| {
                let data = Arc::new(pattern((1 << 20) + 5, n));
                env.lend(&data);
                data
            })
            .collect();
        let done = Rc::new(std::cell::Cell::new(0));
        for (n, data) in (0..).zip(&ways) {
            let (file, data, done) = (Rc::clone(&file), Arc::clone(data), Rc::clone(&done));
            let write = async move {
                // Without its first and last bytes: a piece of the memory, at an odd place.
                file.write(n << 21, &data[2..data.len() - 2]).await.unwrap();
                drop(data);
                done.set(done.get() + 1);
            };
            env.spawn("writer", Box::pin(write));
        }
        env.block_on(async {
            while done.get() < 8 {
                env.sleep_until(env.now() + 100_000).await;
            }
            for (n, data) in (0..).zip(ways) {
                let mut back = vec![0; data.len() - 4];
                assert_eq!(file.read(n << 21, &mut back).await, Ok(back.len()));
                assert!(back == data[2..data.len() - 2]);
                Arc::try_unwrap(data).expect("nobody else has it any more");
            }
        });
    });
}

#[test]
fn holes_zeroes_and_discards() {
    everywhere(|env, dir| {
        fs::File::create(dir.join("a")).unwrap().set_len(4 << 20).unwrap();
        let file = open_as(env, "a", true, false).unwrap();
        env.block_on(async {
            let whole = file.extent(0).unwrap();
            assert_eq!((whole.data, whole.bytes), (false, 4 << 20));
            file.write(1 << 20, &pattern(1 << 20, 5)).await.unwrap();
            let hole = file.extent(0).unwrap();
            assert_eq!((hole.data, hole.bytes), (false, 1 << 20));
            let data = file.extent(1 << 20).unwrap();
            assert_eq!((data.data, data.bytes), (true, 1 << 20));
            let middle = file.extent((1 << 20) + 4096).unwrap();
            assert_eq!((middle.data, middle.bytes), (true, (1 << 20) - 4096));

            let before = fs::metadata(dir.join("a")).unwrap().blocks();
            assert_eq!(file.discard(1 << 20, 512 << 10).await, Ok(()));
            assert!(fs::metadata(dir.join("a")).unwrap().blocks() < before);
            assert_eq!(
                file.write_zeroes((1 << 20) + (512 << 10), 100, true).await,
                Ok(())
            );
            assert_eq!(
                file.write_zeroes((1 << 20) + (512 << 10) + 100, 4096, false)
                    .await,
                Ok(())
            );
            let mut buf = vec![1; 1 << 20];
            file.read(1 << 20, &mut buf).await.unwrap();
            let zeroes = (512 << 10) + 4196;
            assert!(buf[..zeroes].iter().all(|&b| b == 0));
            assert!(buf[zeroes..] == pattern(1 << 20, 5)[zeroes..]);
            assert_eq!(file.length(), Ok(4 << 20));
            // Zeroes beyond the end make the file longer.
            assert_eq!(file.write_zeroes(5 << 20, 8192, false).await, Ok(()));
            assert_eq!(file.length(), Ok((5 << 20) + 8192));
            assert_eq!(file.truncate(1000).await, Ok(()));
            assert_eq!(file.length(), Ok(1000));
        });
    });
}

#[test]
fn copies_between_files() {
    everywhere(|env, dir| {
        fs::write(dir.join("a"), pattern(9 << 20, 7)).unwrap();
        fs::write(dir.join("b"), pattern(100, 0)).unwrap();
        let (a, b) = (
            open_as(env, "a", false, false).unwrap(),
            open_as(env, "b", true, false).unwrap(),
        );
        env.block_on(async {
            assert_eq!(b.copy_from(&*a, 4096, 8192, 8 << 20).await, Ok(()));
            let mut buf = vec![0; 8 << 20];
            assert_eq!(b.read(8192, &mut buf).await, Ok(8 << 20));
            assert!(buf == pattern(9 << 20, 7)[4096..4096 + (8 << 20)]);
            // Beyond the end of the source nothing is invented.
            assert!(b.copy_from(&*a, 9 << 20, 0, 512).await.is_err());
        });
    });
}

#[test]
fn read_only_and_back() {
    everywhere(|env, dir| {
        fs::write(dir.join("a"), pattern(512, 1)).unwrap();
        let file = open_as(env, "a", false, false).unwrap();
        env.block_on(async {
            assert_eq!(file.write(0, &[1; 512]).await, Err(Errno::EBADF));
            file.set_writable(true).unwrap();
            // Also when the name has gone to another file meanwhile.
            fs::rename(dir.join("a"), dir.join("b")).unwrap();
            fs::write(dir.join("a"), b"other").unwrap();
            file.set_writable(false).unwrap();
            file.set_writable(true).unwrap();
            assert_eq!(file.write(0, &[2; 512]).await, Ok(()));
        });
        assert_eq!(fs::read(dir.join("b")).unwrap(), [2; 512]);
        assert_eq!(fs::read(dir.join("a")).unwrap(), b"other");
    });
}

#[test]
fn refusals_are_worded_as_qemu_does() {
    let dir = tempfile::tempdir().unwrap();
    let env = env(dir.path(), (Engine::Threads, true));
    fs::create_dir(dir.path().join("d")).unwrap();
    fs::write(dir.path().join("a"), [0; 512]).unwrap();
    let text = |filename: &str, kind, writable, direct| {
        env.open(&OpenStorage {
            filename,
            kind,
            writable,
            direct,
        })
        .unwrap_err()
        .desc
    };
    let long = "x".repeat(300);
    assert_eq!(
        text("none", StorageKind::File, true, false),
        "Could not open 'none': No such file or directory"
    );
    assert_eq!(
        text("a/b", StorageKind::File, true, false),
        "Could not open 'a/b': Not a directory"
    );
    assert_eq!(
        text("d", StorageKind::HostDevice, true, false),
        "Could not open 'd': Is a directory"
    );
    assert_eq!(
        text("d", StorageKind::File, false, false),
        "'file' driver requires 'd' to be a regular file"
    );
    assert_eq!(
        text("a", StorageKind::HostDevice, true, false),
        "'host_device' driver requires 'a' to be either a character or block device"
    );
    assert_eq!(
        text("/proc/version", StorageKind::File, false, true),
        "Could not open '/proc/version': filesystem does not support O_DIRECT"
    );
    assert_eq!(
        text(&long, StorageKind::File, true, false),
        format!("Could not open '{long}': File name too long")
    );
}

#[test]
fn direct_io_obeys_the_probed_alignment() {
    everywhere(|env, dir| {
        fs::write(dir.join("a"), pattern(64 << 10, 1)).unwrap();
        let file = match open_as(env, "a", true, true) {
            Ok(file) => file,
            Err(e) => return eprintln!("SKIPPED: no O_DIRECT in {}: {e}", dir.display()),
        };
        let align = file.limits().request_alignment;
        assert!(
            align.is_power_of_two() && (512..=4096).contains(&align),
            "{align}"
        );
        let unit = usize::try_from(align).unwrap();
        env.block_on(async {
            let data = pattern(3 * unit, 9);
            // A slice at an odd address: bouncing is our business, not the caller's.
            let mut odd = vec![0; 3 * unit + 1];
            odd[1..].copy_from_slice(&data);
            assert_eq!(file.write(align, &odd[1..]).await, Ok(()));
            let mut back = vec![0; 3 * unit + 1];
            assert_eq!(file.read(align, &mut back[1..]).await, Ok(3 * unit));
            assert!(back[1..] == data);
            // An unaligned end of file is a short read.
            file.truncate(10 * align + 100).await.unwrap();
            let mut tail = vec![7; 2 * unit];
            assert_eq!(file.read(10 * align, &mut tail).await, Ok(100));
        });
    });
}

#[test]
fn a_full_disk_is_enospc() {
    // /dev/full is the only full disk that needs no privileges; it is a character device.
    for way in ways() {
        let env = env(Path::new("/"), way);
        let full = OpenStorage {
            filename: "dev/full",
            kind: StorageKind::HostDevice,
            writable: true,
            direct: false,
        };
        let full = env.open(&full).unwrap();
        let lent = Arc::new(vec![1; 1 << 20]);
        env.lend(&lent);
        env.block_on(async {
            assert_eq!(full.write(0, &[1; 4096]).await, Err(Errno::ENOSPC));
            assert_eq!(full.write(0, &lent).await, Err(Errno::ENOSPC));
        });
    }
}

#[test]
#[should_panic(expected = "a bug of ours")]
fn a_panic_of_a_task_ends_the_run() {
    let env = env(Path::new("/"), (Engine::Threads, true));
    env.spawn("broken", Box::pin(async { panic!("a bug of ours") }));
    env.block_on(std::future::pending::<()>());
}

#[test]
fn a_busy_task_lets_others_run() {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    fs::write(dir.path().join("a"), [0; 4096]).unwrap();
    let env = env(dir.path(), (Engine::Threads, true));
    let file = open_as(&env, "a", false, false).unwrap();
    let stop = Rc::new(std::cell::Cell::new(false));
    let (busy_file, busy_stop) = (Rc::clone(&file), Rc::clone(&stop));
    env.spawn(
        "busy",
        Box::pin(async move {
            let mut buf = [0; 512];
            while !busy_stop.get() {
                busy_file.read(0, &mut buf).await.unwrap();
            }
        }),
    );
    env.block_on(async {
        env.sleep_until(env.now() + 1_000_000).await;
        stop.set(true);
    });
}
