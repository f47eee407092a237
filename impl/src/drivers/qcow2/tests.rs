//! End-to-end tests of the driver over memory, against a byte array and against `qemu-img`.

use std::cell::{Cell, RefCell};
use std::path::PathBuf;
use std::process::Command;
use std::rc::Rc;

use serde_json::{Value, json};

use super::{CreateOptions, create};
use crate::Layer;
use crate::env::{Env, OpenStorage, StorageKind};
use crate::error::Errno;
use crate::io::backend::Backend;
use crate::memory::MemoryEnv;
use crate::types::{NodeId, Perm, ReqFlags};

mod concurrent;
mod copy;
mod foreign;
mod packed;

/// A small generator: tests must not depend on anything random.
struct Rng(u64);

impl Rng {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// An image in memory, open in a layer.
struct Disk {
    env: MemoryEnv,
    layer: Layer,
    node: NodeId,
    guest: Backend,
}

fn make(env: &MemoryEnv, name: &str, options: &CreateOptions<'_>) {
    env.create(name, 0);
    let open = OpenStorage {
        filename: name,
        kind: StorageKind::File,
        writable: true,
        direct: false,
    };
    let storage = env.open(&open).unwrap();
    env.block_on(create(&*storage, options)).unwrap();
}

fn try_open(env: &MemoryEnv, name: &str, extra: &Value) -> Result<Disk, String> {
    let layer = Layer::new(Rc::new(env.clone()), None);
    let mut options = json!({
        "driver": "qcow2", "node-name": "disk", "discard": "unmap",
        "file": { "driver": "file", "filename": name },
    });
    for (key, value) in extra.as_object().unwrap() {
        options[key] = value.clone();
    }
    let Value::Object(options) = options else {
        unreachable!()
    };
    let writable = options.get("read-only") != Some(&json!(true));
    let opened = env.block_on(async {
        let main = layer.main("test").await;
        let opened = layer.blockdev_add(options).await;
        layer.reap().await;
        drop(main);
        opened
    });
    opened.map_err(|e| e.desc)?;
    let node = layer.find_node("disk").unwrap();
    let mut perm = Perm::CONSISTENT_READ;
    if writable {
        perm |= Perm::WRITE | Perm::RESIZE;
    }
    let guest = Backend::new(&layer, node, None, perm, Perm::all(), true).map_err(|e| e.desc)?;
    Ok(Disk {
        env: env.clone(),
        layer,
        node,
        guest,
    })
}

fn open(env: &MemoryEnv, name: &str) -> Disk {
    try_open(env, name, &json!({})).unwrap()
}

impl Disk {
    fn close(self) {
        let Disk {
            env, layer, guest, ..
        } = self;
        env.block_on(async {
            let main = layer.main("test").await;
            guest.remove().await;
            layer.blockdev_del("disk").unwrap();
            layer.reap().await;
            drop(main);
        });
        assert!(layer.nodes().is_empty());
    }

    fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut buf = vec![0xee; len];
        self.env.block_on(self.guest.read(offset, &mut buf)).unwrap();
        buf
    }

    fn write(&self, offset: u64, data: &[u8]) {
        self.env
            .block_on(self.guest.write(offset, data, ReqFlags::empty()))
            .unwrap();
    }

    fn flush(&self) {
        self.env.block_on(self.guest.flush()).unwrap();
    }

    fn truncate(&self, size: u64) {
        let edge = self.guest.root_edge().unwrap();
        let empty = ReqFlags::empty();
        self.env
            .block_on(self.layer.truncate(edge, size, false, empty))
            .unwrap();
    }
}

/// Copies a file of the environment to a directory.
fn export(env: &MemoryEnv, dir: &tempfile::TempDir, name: &str) -> PathBuf {
    let path = dir.path().join(name);
    std::fs::write(&path, env.content(name).unwrap()).unwrap();
    path
}

fn import(env: &MemoryEnv, dir: &tempfile::TempDir, name: &str) {
    env.create_with(name, &std::fs::read(dir.path().join(name)).unwrap());
}

/// Runs a QEMU tool in `dir`; `None` (loudly) where it is not installed.
fn qemu(dir: &tempfile::TempDir, program: &str, args: &[&str]) -> Option<(i32, String)> {
    match Command::new(program).args(args).current_dir(dir.path()).output() {
        Ok(out) => {
            let text = [out.stdout, out.stderr].concat();
            Some((
                out.status.code().unwrap_or(-1),
                String::from_utf8_lossy(&text).into_owned(),
            ))
        }
        Err(e) => {
            eprintln!("SKIPPED: cannot run {program}: {e}");
            None
        }
    }
}

fn qemu_ok(dir: &tempfile::TempDir, program: &str, args: &[&str]) -> bool {
    let Some((code, text)) = qemu(dir, program, args) else {
        return false;
    };
    assert_eq!(code, 0, "{program} {args:?}: {text}");
    true
}

/// The closed image is clean for QEMU and reads as `expected` there.
fn judged_by_qemu(env: &MemoryEnv, name: &str, others: &[&str], expected: &[u8]) {
    let dir = tempfile::tempdir().unwrap();
    export(env, &dir, name);
    for other in others {
        export(env, &dir, other);
    }
    if qemu_ok(&dir, "qemu-img", &["check", "-f", "qcow2", name]) {
        assert!(qemu_ok(
            &dir,
            "qemu-img",
            &["convert", "-f", "qcow2", "-O", "raw", name, "out.raw"]
        ));
        let out = std::fs::read(dir.path().join("out.raw")).unwrap();
        assert!(out == expected, "QEMU reads something else");
    }
}

fn options(cluster_bits: u32, order: u32, version: u32, size: u64) -> CreateOptions<'static> {
    CreateOptions {
        size,
        version,
        cluster_size: 1 << cluster_bits,
        refcount_bits: 1 << order,
        ..CreateOptions::default()
    }
}

const GEOMETRIES: [(u32, u32, u32); 9] = [
    (9, 4, 3),
    (9, 6, 3),
    (9, 0, 3),
    (10, 1, 3),
    (12, 2, 3),
    (12, 4, 2),
    (13, 3, 3),
    (16, 5, 3),
    (21, 4, 3),
];

/// One random operation, on the disk and on the array.
fn random_step(disk: &Disk, rng: &mut Rng, content: &mut [u8], step: u32) {
    let size = content.len() as u64;
    let unit = [1, 512, 512, 4096][usize::try_from(rng.below(4)).unwrap()];
    let offset = rng.below(size) / unit * unit;
    let longest = [512, 4096, 65536, 300_000][usize::try_from(rng.below(4)).unwrap()];
    let bytes = (1 + rng.below(longest)).next_multiple_of(unit).min(size - offset);
    let range = usize::try_from(offset).unwrap()..usize::try_from(offset + bytes).unwrap();
    let guest = &disk.guest;
    match rng.below(10) {
        0..5 => {
            let data: Vec<u8> = (0..bytes)
                .map(|i| 1 + u8::try_from((u64::from(step) * 31 + i / 97) % 255).unwrap())
                .collect();
            disk.write(offset, &data);
            content[range].copy_from_slice(&data);
        }
        5 | 6 => {
            let flags = if rng.below(2) == 0 {
                ReqFlags::MAY_UNMAP
            } else {
                ReqFlags::empty()
            };
            disk.env
                .block_on(guest.write_zeroes(offset, bytes, flags))
                .unwrap();
            content[range].fill(0);
        }
        7 => {
            disk.env.block_on(guest.discard(offset, bytes)).unwrap();
            let now = disk.read(offset, range.len());
            for (was, is) in content[range].iter_mut().zip(now) {
                assert!(is == 0 || is == *was, "a discard shows foreign data");
                *was = is;
            }
        }
        8 => disk.flush(),
        _ => assert!(
            disk.read(offset, range.len()) == content[range],
            "read at {offset} step {step}"
        ),
    }
}

#[test]
fn random_operations_match_a_byte_array() {
    for (case, (bits, order, version)) in GEOMETRIES.into_iter().enumerate() {
        let size = if bits == 21 { 12 << 20 } else { 3 << 20 };
        let env = MemoryEnv::new();
        make(&env, "a", &options(bits, order, version, size));
        let mut content = vec![0; usize::try_from(size).unwrap()];
        let mut rng = Rng(0x1234_5678 + case as u64);
        for round in 0..4 {
            // The smallest caches, so that eviction happens.
            let extra = if round % 2 == 0 {
                json!({})
            } else {
                json!({"l2-cache-size": 1, "refcount-cache-size": 1})
            };
            let disk = try_open(&env, "a", &extra).unwrap();
            for step in 0..120 {
                random_step(&disk, &mut rng, &mut content, round * 1000 + step);
            }
            assert!(
                disk.read(0, content.len()) == content,
                "case {case} round {round}"
            );
            disk.close();
        }
        judged_by_qemu(&env, "a", &[], &content);
    }
}

#[test]
fn random_operations_over_a_backing_file() {
    for (case, (bits, order, version)) in GEOMETRIES.into_iter().enumerate() {
        let size = 2 << 20;
        let env = MemoryEnv::new();
        let base: Vec<u8> = (0..size / 2)
            .map(|i| 1 + u8::try_from(i / 512 % 250).unwrap())
            .collect();
        env.create_with("base", &base);
        let mut overlay = options(bits, order, version, size);
        overlay.backing_file = Some("base");
        overlay.backing_format = Some("raw");
        make(&env, "a", &overlay);
        let mut content = base.clone();
        content.resize(usize::try_from(size).unwrap(), 0);
        let mut rng = Rng(0x9876_5432 + case as u64);
        for round in 0..2 {
            let disk = open(&env, "a");
            for step in 0..150 {
                random_step(&disk, &mut rng, &mut content, round * 1000 + step);
            }
            assert!(
                disk.read(0, content.len()) == content,
                "case {case} round {round}"
            );
            disk.close();
        }
        assert!(
            env.content("base").unwrap() == base,
            "the backing file is only read"
        );
        judged_by_qemu(&env, "a", &["base"], &content);
    }
}

#[test]
fn tables_grow() {
    // 64 blocks of 64 refcounts: 2 MiB of clusters fill the first refcount table.
    let env = MemoryEnv::new();
    make(&env, "a", &options(9, 6, 3, 1 << 20));
    let disk = open(&env, "a");
    disk.truncate(64 << 20);
    let mut content = vec![0; 64 << 20];
    for at in (0..6 << 20).step_by(100_000) {
        let data = vec![u8::try_from(at / 100_000 + 1).unwrap(); 100_000];
        disk.write(at as u64 * 8, &data);
        content[at * 8..at * 8 + 100_000].copy_from_slice(&data);
    }
    assert!(disk.read(0, content.len()) == content);
    disk.close();
    let disk = open(&env, "a");
    assert!(disk.read(0, content.len()) == content);
    disk.close();
    judged_by_qemu(&env, "a", &[], &content);
}

#[test]
fn shrinking_and_growing_never_shows_old_data() {
    for (bits, version) in [(9, 3), (12, 2), (16, 3)] {
        let env = MemoryEnv::new();
        make(&env, "a", &options(bits, 4, version, 1 << 20));
        let disk = open(&env, "a");
        disk.write(0, &[7; 1 << 20]);
        disk.truncate(100 * 1024 + 512);
        disk.truncate(2 << 20);
        let mut content = vec![0; 2 << 20];
        content[..100 * 1024 + 512].fill(7);
        assert!(disk.read(0, 2 << 20) == content, "cluster bits {bits}");
        disk.close();
        judged_by_qemu(&env, "a", &[], &content);
    }
}

#[test]
fn growing_over_a_longer_backing_file_reads_zeroes() {
    let env = MemoryEnv::new();
    env.create_with("base", &[9; 300_000]);
    let mut overlay = options(12, 4, 3, 10_240);
    (overlay.backing_file, overlay.backing_format) = (Some("base"), Some("raw"));
    make(&env, "a", &overlay);
    let disk = open(&env, "a");
    disk.write(8192, &[1; 512]); // copies the rest of its cluster, but not beyond the end of the disk
    disk.truncate(200_192);
    let mut content = vec![0; 200_192];
    content[..10_240].fill(9);
    content[8192..8704].fill(1);
    assert!(disk.read(0, content.len()) == content);
    disk.close();
    judged_by_qemu(&env, "a", &["base"], &content);
}

#[test]
fn backing_names_change() {
    for bits in [9, 10, 12, 16] {
        let env = MemoryEnv::new();
        for (name, byte) in [("base", 1u8), ("another-and-longer-name", 2)] {
            env.create_with(name, &[byte; 4096]);
        }
        let mut overlay = options(bits, 4, 3, 4096);
        (overlay.backing_file, overlay.backing_format) = (Some("base"), Some("raw"));
        make(&env, "a", &overlay);
        let disk = open(&env, "a");
        let (driver, cx) = {
            let node = disk.layer.node(disk.node);
            (node.driver(), disk.layer.cx(&node))
        };
        let change = |to: Option<(&str, Option<&str>)>| env.block_on(driver.change_backing_file(&cx, to));
        let long = "x".repeat(1023);
        assert_eq!(change(Some((&"x".repeat(1024), None))), Err(Errno::EINVAL));
        assert_eq!(change(Some(("a\0b", None))), Err(Errno::EINVAL));
        let fits = if bits <= 10 { Err(Errno::ENOSPC) } else { Ok(()) };
        assert_eq!(change(Some((&long, Some("raw")))), fits, "cluster bits {bits}");
        assert_eq!(
            driver.backing_header().unwrap().0,
            if bits <= 10 { "base" } else { &long }
        );
        change(None).unwrap();
        assert_eq!(driver.backing_header(), None);
        change(Some(("another-and-longer-name", Some("raw")))).unwrap();
        drop((driver, cx));
        disk.close();
        let disk = open(&env, "a");
        assert_eq!(disk.read(0, 4096), [2; 4096]);
        disk.close();
        judged_by_qemu(&env, "a", &["another-and-longer-name"], &[2; 4096]);
    }
}
