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

mod copy;
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

/// Runs tasks beside each other to their ends.
fn run_all(env: &MemoryEnv, tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>>) {
    let left = Rc::new(Cell::new(tasks.len()));
    for task in tasks {
        let left = Rc::clone(&left);
        env.spawn(
            "guest",
            Box::pin(async move {
                task.await;
                left.set(left.get() - 1);
            }),
        );
    }
    let clock = env.clone();
    env.block_on(async move {
        while left.get() > 0 {
            clock.sleep_until(clock.now() + 1000).await;
        }
    });
}

#[test]
fn concurrent_guests_share_clusters_without_harm() {
    for (case, (bits, order, version)) in GEOMETRIES.into_iter().enumerate() {
        if bits == 21 {
            continue;
        }
        let env = MemoryEnv::new();
        let size: u64 = 1 << 20;
        make(&env, "a", &options(bits, order, version, size));
        env.set_latency(1000);
        let disk = open(&env, "a");
        let content = Rc::new(RefCell::new(vec![0u8; usize::try_from(size).unwrap()]));
        let mut tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
        for who in 0..8u64 {
            let (guest, content, env) = (disk.guest.clone(), Rc::clone(&content), env.clone());
            let mut rng = Rng(77 + who + 100 * case as u64);
            tasks.push(Box::pin(async move {
                for step in 0..60u64 {
                    // Every eighth 256-byte piece belongs to `who`: neighbours in one cluster are others'.
                    let at = (rng.below(size / 2048) * 8 + who) * 256;
                    let range = usize::try_from(at).unwrap()..usize::try_from(at + 256).unwrap();
                    match rng.below(5) {
                        0 => {
                            let mut buf = [0; 256];
                            guest.read(at, &mut buf).await.unwrap();
                            assert!(buf == content.borrow()[range], "guest {who} step {step} at {at}");
                        }
                        1 => {
                            guest.write_zeroes(at, 256, ReqFlags::MAY_UNMAP).await.unwrap();
                            content.borrow_mut()[range].fill(0);
                        }
                        2 if who == 0 => guest.flush().await.unwrap(),
                        _ => {
                            let data = [u8::try_from(1 + (step * 8 + who) % 251).unwrap(); 256];
                            guest.write(at, &data, ReqFlags::empty()).await.unwrap();
                            content.borrow_mut()[range].copy_from_slice(&data);
                        }
                    }
                    env.sleep_until(env.now() + rng.below(3000)).await;
                }
            }));
        }
        run_all(&env, tasks);
        assert!(
            disk.read(0, usize::try_from(size).unwrap()) == *content.borrow(),
            "case {case}"
        );
        disk.close();
        judged_by_qemu(&env, "a", &[], &content.borrow());
    }
}

#[test]
fn reads_beside_discards_and_new_writes_never_see_foreign_data() {
    let env = MemoryEnv::new();
    let size: u64 = 1 << 18;
    make(&env, "a", &options(9, 4, 3, size));
    env.set_latency(1000);
    let disk = open(&env, "a");
    // Sector i only ever holds zeroes or its own number.
    let stamp = |sector: u64| [u8::try_from(1 + sector % 251).unwrap(); 512];
    let mut tasks: Vec<std::pin::Pin<Box<dyn Future<Output = ()>>>> = Vec::new();
    for who in 0..10u64 {
        let (guest, env) = (disk.guest.clone(), env.clone());
        let mut rng = Rng(4242 + who);
        tasks.push(Box::pin(async move {
            for _ in 0..300 {
                let first = rng.below(size / 512);
                let count = (1 + rng.below(8)).min(size / 512 - first);
                match who % 3 {
                    0 => {
                        let data: Vec<u8> = (first..first + count).flat_map(stamp).collect();
                        guest.write(first * 512, &data, ReqFlags::empty()).await.unwrap();
                    }
                    1 => guest.discard(first * 512, count * 512).await.unwrap(),
                    _ => {
                        let mut buf = vec![0xee; usize::try_from(count * 512).unwrap()];
                        guest.read(first * 512, &mut buf).await.unwrap();
                        for (sector, bytes) in (first..).zip(buf.chunks_exact(512)) {
                            let own = stamp(sector);
                            assert!(
                                bytes == own || bytes == [0; 512],
                                "sector {sector} has {}",
                                bytes[0]
                            );
                        }
                    }
                }
                if rng.below(20) == 0 {
                    guest.flush().await.unwrap();
                }
                env.sleep_until(env.now() + rng.below(2500)).await;
            }
        }));
    }
    run_all(&env, tasks);
    let content = disk.read(0, usize::try_from(size).unwrap());
    disk.close();
    judged_by_qemu(&env, "a", &[], &content);
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

#[test]
fn compressed_clusters_of_qemu_are_read_and_overwritten() {
    let dir = tempfile::tempdir().unwrap();
    let mut content: Vec<u8> = (0..1u32 << 20)
        .map(|i| u8::try_from(i / 300 % 256).unwrap())
        .collect();
    std::fs::write(dir.path().join("raw"), &content).unwrap();
    for cluster in [512, 4096, 65536, 2 << 20] {
        let options = format!("cluster_size={cluster}");
        let args = [
            "convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &options, "raw", "a",
        ];
        if !qemu_ok(&dir, "qemu-img", &args) {
            return;
        }
        let env = MemoryEnv::new();
        import(&env, &dir, "a");
        let disk = open(&env, "a");
        assert!(disk.read(0, content.len()) == content, "cluster size {cluster}");
        let before = content.clone();
        for at in [1000, 70_000, 500_000, 500_400, 1_048_000] {
            disk.write(at as u64, &[0xa5; 500]);
            content[at..at + 500].fill(0xa5);
        }
        assert!(disk.read(0, content.len()) == content, "cluster size {cluster}");
        disk.close();
        judged_by_qemu(&env, "a", &[], &content);
        content = before;
    }
}

#[test]
fn snapshots_of_qemu_keep_their_content() {
    let dir = tempfile::tempdir().unwrap();
    for (cluster, bits) in [(512, 16), (4096, 2), (65536, 64)] {
        let options = format!("cluster_size={cluster},refcount_bits={bits}");
        if !qemu_ok(
            &dir,
            "qemu-img",
            &["create", "-f", "qcow2", "-o", &options, "a", "1M"],
        ) {
            return;
        }
        qemu_ok(&dir, "qemu-io", &["-c", "write -P 17 0 700k", "a"]);
        qemu_ok(&dir, "qemu-img", &["snapshot", "-c", "one", "a"]);
        let env = MemoryEnv::new();
        import(&env, &dir, "a");
        let disk = open(&env, "a");
        let mut content = vec![0; 1 << 20];
        content[..700 << 10].fill(17);
        let mut rng = Rng(3);
        for step in 0..150 {
            random_step(&disk, &mut rng, &mut content, step);
        }
        disk.close();
        judged_by_qemu(&env, "a", &[], &content);
        export(&env, &dir, "a");
        let args = ["convert", "-f", "qcow2", "-l", "one", "-O", "raw", "a", "one.raw"];
        qemu_ok(&dir, "qemu-img", &args);
        let one = std::fs::read(dir.path().join("one.raw")).unwrap();
        assert!(
            one.len() == 1 << 20 && one[..700 << 10].iter().all(|b| *b == 17),
            "the snapshot changed"
        );
        assert!(one[700 << 10..].iter().all(|b| *b == 0), "the snapshot changed");
        let disk = open(&env, "a");
        disk.truncate(1 << 19);
        content.truncate(1 << 19);
        disk.close();
        judged_by_qemu(&env, "a", &[], &content);
    }
}

#[test]
fn persistent_bitmaps_are_kept_by_a_writer() {
    let dir = tempfile::tempdir().unwrap();
    if !qemu_ok(&dir, "qemu-img", &["create", "-f", "qcow2", "a", "1M"]) {
        return;
    }
    qemu_ok(&dir, "qemu-img", &["bitmap", "--add", "a", "b0"]);
    let env = MemoryEnv::new();
    import(&env, &dir, "a");
    let before = env.content("a");
    try_open(&env, "a", &json!({"read-only": true})).unwrap().close();
    assert!(env.content("a") == before, "a reader changes nothing");
    open(&env, "a").close();
    export(&env, &dir, "a");
    let (_, text) = qemu(&dir, "qemu-img", &["info", "a"]).unwrap();
    assert!(text.contains("b0") && !text.contains("in-use"), "{text}");
    let (code, text) = qemu(&dir, "qemu-img", &["check", "a"]).unwrap();
    assert_eq!(code, 0, "{text}");
}

#[test]
fn dirty_corrupt_and_truncated_images() {
    let env = MemoryEnv::new();
    make(&env, "a", &options(12, 4, 3, 1 << 20));
    let disk = open(&env, "a");
    disk.write(0, &[1; 100_000]);
    disk.close();
    let good = env.content("a").unwrap();
    for (bit, text) in [
        (1, "Image is dirty"),
        (2, "qcow2: Image is corrupt; cannot be opened read/write"),
    ] {
        let mut bad = good.clone();
        bad[79] |= bit;
        env.create_with("a", &bad);
        let refusal = try_open(&env, "a", &json!({})).err().unwrap();
        assert!(refusal.contains(text), "{refusal}");
        let disk = try_open(&env, "a", &json!({"read-only": true})).unwrap();
        assert_eq!(disk.read(0, 100_000), [1; 100_000]);
        disk.close();
    }
    for keep in [100, 4096, 8192, 12288, 16384, 16896] {
        env.create_with("a", &good[..keep]);
        let opened = try_open(&env, "a", &json!({"read-only": true}));
        assert!(opened.is_err(), "cut at {keep}");
    }
}

/// Whatever the bytes are: an error or data, no panic, no hang, no giant allocation.
#[test]
fn hostile_images_do_no_harm() {
    let env = MemoryEnv::new();
    make(&env, "a", &options(12, 4, 3, 256 << 10));
    let disk = open(&env, "a");
    for at in [0, 70_000, 200_000] {
        disk.write(at, &[3; 5000]);
    }
    disk.close();
    let good = env.content("a").unwrap();
    // Header, refcount table and block, L1 and L2 table are the first five clusters.
    let meaning: Vec<u64> = (0..5 * 4096)
        .filter(|at| good[usize::try_from(*at).unwrap()] != 0)
        .collect();
    let mut rng = Rng(99);
    let (mut refused, mut failed, mut worked) = (0, 0, 0);
    for _ in 0..1500 {
        let mut bad = good.clone();
        for _ in 0..=rng.below(3) {
            let at = match rng.below(3) {
                0 => rng.below(112),
                1 => rng.below(5 * 4096),
                _ => meaning[usize::try_from(rng.below(meaning.len() as u64)).unwrap()],
            };
            let at = usize::try_from(at).unwrap();
            bad[at] = match rng.below(3) {
                0 => 0xff,
                1 => bad[at] ^ 1 << rng.below(8),
                _ => u8::try_from(rng.below(256)).unwrap(),
            };
        }
        env.create_with("a", &bad);
        let Ok(disk) = try_open(&env, "a", &json!({"backing": null})) else {
            refused += 1;
            continue;
        };
        let size = disk.guest.length().unwrap();
        let mut result = Ok(());
        for _ in 0..12 {
            let at = rng.below(size.clamp(512, 1 << 20) / 512) * 512;
            let bytes = 4096.min(size.saturating_sub(at));
            let mut buf = vec![5; usize::try_from(bytes).unwrap()];
            let empty = ReqFlags::empty();
            let step = env.block_on(async {
                match rng.below(4) {
                    0 => disk.guest.read(at, &mut buf).await,
                    1 => disk.guest.discard(at, bytes).await,
                    2 => disk.guest.flush().await,
                    _ => disk.guest.write(at, &buf, empty).await,
                }
            });
            result = result.and(step);
        }
        let all = vec![6; usize::try_from(size.min(256 << 10)).unwrap()];
        let step = env.block_on(disk.guest.write(0, &all, ReqFlags::empty()));
        result = result.and(step);
        if result.is_ok() {
            worked += 1;
        } else {
            failed += 1;
        }
        disk.close();
    }
    assert!(
        refused > 100 && failed > 20 && worked > 100,
        "{refused} {failed} {worked}"
    );
}

/// Three L1 entries that share one table: each use counts, and the last to leave it may get its cluster back.
#[test]
fn a_table_shared_within_the_image_counts_each_use() {
    const SPAN: u64 = 32 << 10;
    let env = MemoryEnv::new();
    make(&env, "a", &options(9, 4, 3, 3 * SPAN));
    let disk = open(&env, "a");
    disk.write(0, &[7; 512]);
    disk.close();
    let mut image = env.content("a").unwrap();
    let get =
        |image: &[u8], at: usize| u64::from_be_bytes(image[at..at + 8].try_into().unwrap()) & !(1 << 63);
    let place = |v: u64| usize::try_from(v).unwrap();
    let (l1, reftable) = (place(get(&image, 40)), place(get(&image, 48)));
    let (refblock, table) = (place(get(&image, reftable)), place(get(&image, l1)));
    let data = place(get(&image, table));
    let shared = get(&image, l1).to_be_bytes();
    for index in 0..3 {
        image[l1 + 8 * index..l1 + 8 * index + 8].copy_from_slice(&shared);
    }
    image[table] &= 0x7f;
    for uses in [2, 3] {
        for cluster in [table / 512, data / 512] {
            image[refblock + 2 * cluster + 1] = uses;
        }
        env.create_with("a", &image);
        if uses == 2 {
            let refusal = try_open(&env, "a", &json!({})).err().unwrap();
            assert!(refusal.ends_with("is used 3 times"), "{refusal}");
        }
    }
    let disk = open(&env, "a");
    for (span, value) in [(0, 1), (1, 2), (2, 3)] {
        disk.write(span * SPAN + 1024, &[value; 512]);
        disk.flush();
    }
    for (span, value) in [(0, 1), (1, 2), (2, 3)] {
        disk.write(span * SPAN + 8192, &[value + 10; 4096]);
        assert_eq!(disk.read(span * SPAN, 512), [7; 512]);
        assert_eq!(disk.read(span * SPAN + 1024, 512), [value; 512]);
    }
    disk.close();
    let disk = open(&env, "a");
    for (span, value) in [(0, 1), (1, 2), (2, 3)] {
        assert_eq!(disk.read(span * SPAN, 512), [7; 512]);
        assert_eq!(disk.read(span * SPAN + 8192, 4096), [value + 10; 4096]);
    }
    disk.close();
}
