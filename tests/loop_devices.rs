//! Loop devices: attached, used through the real environment, and gone however the process ends.
//! Needs root and the loop driver; without them each test says loudly that it was skipped, or fails when
//! `BLKCHECK_REQUIRE_ALL=1`.
#![cfg(target_os = "linux")]
#![expect(clippy::disallowed_methods, reason = "waits for the kernel and for processes")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use blkcheck_impl::env::{Env, OpenStorage, StorageKind};
use blkcheck_impl::error::Errno;
use blkcheck_impl::real::{RealEnv, RealOptions};
use blkcheck_sim::target::loopdev::{LoopDevice, LoopError, Scratch, available, devices_over};

/// Makes this test binary, run as a child, hold a device in this directory until it is killed.
const HOLD: &str = "BLKCHECK_TEST_HOLD_LOOP";

fn skipped(test: &str) -> bool {
    let Err(reason) = available() else { return false };
    assert_ne!(
        std::env::var("BLKCHECK_REQUIRE_ALL").as_deref(),
        Ok("1"),
        "{test} is required: {reason}"
    );
    eprintln!("SKIPPED {test}: {reason}");
    true
}

fn image(scratch: &Scratch, bytes: u64) -> PathBuf {
    let path = scratch.path().join("image");
    fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    path
}

/// Detaching ends when the last holder (udev may be one) closes.
fn wait_detached(directory: &Path) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !devices_over(directory).is_empty() {
        assert!(
            Instant::now() < deadline,
            "still attached: {:?}",
            devices_over(directory)
        );
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn a_device_is_a_disk_and_goes_with_its_handle() {
    if skipped("a_device_is_a_disk_and_goes_with_its_handle") {
        return;
    }
    let scratch = Scratch::new(None).unwrap();
    let file = image(&scratch, 8 << 20);
    let device = LoopDevice::attach(&file, false).unwrap();
    assert_eq!(devices_over(scratch.path()), [device.path().to_owned()]);
    let name = device.path().to_str().unwrap().to_owned();
    for direct in [false, true] {
        let env = RealEnv::new(RealOptions::default()).unwrap();
        let open = |kind, writable| {
            env.open(&OpenStorage {
                filename: &name,
                kind,
                writable,
                direct,
            })
        };
        assert_eq!(
            open(StorageKind::File, true).unwrap_err().desc,
            format!("'file' driver requires '{name}' to be a regular file")
        );
        let disk = open(StorageKind::HostDevice, true).unwrap();
        assert_eq!(disk.length(), Ok(8 << 20));
        env.block_on(async {
            assert_eq!(disk.write(4096, &[7; 8192]).await, Ok(()));
            assert_eq!(disk.flush().await, Ok(()));
            let mut buf = [1; 16384];
            assert_eq!(disk.read(0, &mut buf).await, Ok(16384));
            assert!(buf[..4096].iter().all(|&b| b == 0) && buf[4096..12288] == [7; 8192]);
            // Zeroing reaches the file as a hole, and the page cache of the device does not show old data.
            assert_eq!(disk.write_zeroes(4096, 4096, true).await, Ok(()));
            assert_eq!(disk.read(4096, &mut buf[..8192]).await, Ok(8192));
            assert!(buf[..4096].iter().all(|&b| b == 0) && buf[4096..8192] == [7; 4096]);
            // A device does not grow.
            assert_eq!(disk.write(8 << 20, &[7; 4096]).await, Err(Errno::ENOSPC));
            assert_eq!(disk.read(8 << 20, &mut buf[..4096]).await, Ok(0));
            let extent = disk.extent(0).unwrap();
            assert_eq!((extent.data, extent.bytes), (true, 8 << 20));
        });
    }
    let directory = scratch.path().to_owned();
    drop(device);
    wait_detached(&directory);
    let content = fs::read(&file).unwrap();
    assert!(content[8192..12288] == [7; 4096] && content[4096..8192] == [0; 4096]);
}

/// A device set read-only, and writable again at the end: the flag would outlive the device.
struct ReadOnly<'a>(&'a str);

impl ReadOnly<'_> {
    fn set(device: &str) -> ReadOnly<'_> {
        assert!(
            Command::new("blockdev")
                .args(["--setro", device])
                .status()
                .unwrap()
                .success()
        );
        ReadOnly(device)
    }
}

impl Drop for ReadOnly<'_> {
    fn drop(&mut self) {
        let _ = Command::new("blockdev").args(["--setrw", self.0]).status();
    }
}

#[test]
fn a_read_only_device_refuses_writers_in_qemus_words() {
    if skipped("a_read_only_device_refuses_writers_in_qemus_words") {
        return;
    }
    let scratch = Scratch::new(None).unwrap();
    let device = LoopDevice::attach(&image(&scratch, 1 << 20), false).unwrap();
    let name = device.path().to_str().unwrap();
    let read_only = ReadOnly::set(name);
    let env = RealEnv::new(RealOptions::default()).unwrap();
    let open = |writable| {
        env.open(&OpenStorage {
            filename: name,
            kind: StorageKind::HostDevice,
            writable,
            direct: false,
        })
    };
    assert_eq!(
        open(true).unwrap_err().desc,
        "The device is not writable: Permission denied"
    );
    let disk = open(false).unwrap();
    assert_eq!(disk.set_writable(true), Err(Errno::EACCES));
    drop(read_only);
    assert_eq!(disk.set_writable(true), Ok(()));
}

#[test]
fn a_killed_process_leaves_no_device_and_the_next_run_takes_its_directory() {
    const TEST: &str = "a_killed_process_leaves_no_device_and_the_next_run_takes_its_directory";
    if let Ok(base) = std::env::var(HOLD) {
        let scratch = Scratch::new(Some(Path::new(&base))).unwrap();
        let device = LoopDevice::attach(&image(&scratch, 1 << 20), false).unwrap();
        println!("holding {} {}", device.path().display(), scratch.path().display());
        loop {
            std::thread::park();
        }
    }
    if skipped(TEST) {
        return;
    }
    let base = tempfile::tempdir().unwrap();
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args([TEST, "--exact", "--nocapture"])
        .env(HOLD, base.path())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let line = lines
        .map_while(Result::ok)
        .find_map(|l| l.split_once("holding ").map(|(_, rest)| rest.to_owned()));
    let line = line.expect("the child attaches a device");
    let directory = PathBuf::from(line.split(' ').nth(1).unwrap());
    assert_eq!(devices_over(&directory).len(), 1);
    child.kill().unwrap();
    child.wait().unwrap();
    wait_detached(&directory);
    assert!(directory.exists(), "a killed process cannot remove it");
    let next = Scratch::new(Some(base.path())).unwrap();
    assert!(!directory.exists() && next.path().exists());
}

#[test]
fn a_missing_file_is_a_clear_refusal() {
    if skipped("a_missing_file_is_a_clear_refusal") {
        return;
    }
    let scratch = Scratch::new(None).unwrap();
    let error = LoopDevice::attach(&scratch.path().join("none"), false).unwrap_err();
    assert!(
        matches!(&error, LoopError::Attach { text, .. } if text.contains("No such file")),
        "{error}"
    );
}
