//! Power loss at any storage request: the image stays consistent, flushed data survives.
//!
//! The storage here loses any subset of the unflushed sectors. After each cut the image must open, no refcount may
//! be below the number of references, COPIED must be true where it is set, and each sector holds its value of the
//! last flush or one written since.

use std::any::Any;
use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;

use serde_json::json;

use super::refcount;
use super::{CreateOptions, create};
use crate::Layer;
use crate::env::{Env, Extent, Fut, Nanos, OpenStorage, Storage, StorageLimits};
use crate::error::{Errno, QmpError};
use crate::io::backend::Backend;
use crate::memory::MemoryEnv;
use crate::types::{Perm, ReqFlags};

fn next(seed: &Cell<u64>, n: u64) -> u64 {
    let mut x = seed.get();
    x ^= x << 13;
    x ^= x >> 7;
    x ^= x << 17;
    seed.set(x);
    x % n
}

/// A disk whose power fails after a number of requests.
#[derive(Debug)]
struct Platter {
    now: RefCell<Vec<u8>>,
    durable: RefCell<Vec<u8>>,
    /// Values that a sector may have after a cut, besides the durable one.
    pending: RefCell<BTreeMap<usize, Vec<[u8; 512]>>>,
    left: Cell<u64>,
    /// How long a read takes.
    read_time: Cell<Nanos>,
    clock: MemoryEnv,
}

impl Platter {
    /// Counts a request; `EIO` once the power is gone.
    fn spend(&self) -> Result<(), Errno> {
        let left = self.left.get();
        self.left.set(left.saturating_sub(1));
        if left == 0 { Err(Errno::EIO) } else { Ok(()) }
    }

    fn note(&self, offset: usize, bytes: usize) {
        let now = self.now.borrow();
        for sector in offset / 512..(offset + bytes).div_ceil(512) {
            let mut value = [0; 512];
            let end = now.len().min(sector * 512 + 512);
            value[..end - sector * 512].copy_from_slice(&now[sector * 512..end]);
            self.pending.borrow_mut().entry(sector).or_default().push(value);
        }
    }

    /// What is on the medium after a cut.
    fn cut(&self, seed: &Cell<u64>) -> Vec<u8> {
        let mut out = self.durable.borrow().clone();
        let keep = next(seed, 5);
        for (sector, values) in &*self.pending.borrow() {
            // 0: none, 4: all, between: some.
            if next(seed, 4) >= keep {
                continue;
            }
            let value = &values[usize::try_from(next(seed, values.len() as u64)).unwrap()];
            if out.len() < sector * 512 + 512 {
                out.resize(sector * 512 + 512, 0);
            }
            out[sector * 512..sector * 512 + 512].copy_from_slice(value);
        }
        out
    }
}

#[derive(Debug, Clone)]
struct Handle(Rc<Platter>);

impl Storage for Handle {
    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> Fut<'a, Result<usize, Errno>> {
        Box::pin(async move {
            let clock = &self.0.clock;
            if self.0.read_time.get() > 0 {
                clock.sleep_until(clock.now() + self.0.read_time.get()).await;
            }
            let now = self.0.now.borrow();
            let from = usize::try_from(offset).unwrap().min(now.len());
            let n = buf.len().min(now.len() - from);
            buf[..n].copy_from_slice(&now[from..from + n]);
            Ok(n)
        })
    }

    fn write<'a>(&'a self, offset: u64, buf: &'a [u8]) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.0.spend()?;
            let from = usize::try_from(offset).unwrap();
            {
                let mut now = self.0.now.borrow_mut();
                let len = now.len().max(from + buf.len());
                now.resize(len, 0);
                now[from..from + buf.len()].copy_from_slice(buf);
            }
            self.0.note(from, buf.len());
            Ok(())
        })
    }

    fn flush(&self) -> Fut<'_, Result<(), Errno>> {
        let spent = self.0.spend();
        if spent.is_ok() {
            *self.0.durable.borrow_mut() = self.0.now.borrow().clone();
            self.0.pending.borrow_mut().clear();
        }
        Box::pin(std::future::ready(spent))
    }

    fn write_zeroes(&self, _: u64, _: u64, _: bool) -> Fut<'_, Result<(), Errno>> {
        Box::pin(std::future::ready(Err(Errno::ENOTSUP)))
    }

    fn discard(&self, offset: u64, bytes: u64) -> Fut<'_, Result<(), Errno>> {
        Box::pin(async move {
            // The worst a discard may do: nonsense, until the next write.
            let garbage = vec![0xdd; usize::try_from(bytes).unwrap()];
            self.write(offset, &garbage).await
        })
    }

    fn truncate(&self, length: u64) -> Fut<'_, Result<(), Errno>> {
        self.0
            .now
            .borrow_mut()
            .resize(usize::try_from(length).unwrap(), 0);
        Box::pin(std::future::ready(Ok(())))
    }

    fn length(&self) -> Result<u64, Errno> {
        Ok(self.0.now.borrow().len() as u64)
    }

    fn extent(&self, offset: u64) -> Result<Extent, Errno> {
        Ok(Extent {
            data: true,
            bytes: self.length()? - offset,
        })
    }

    fn limits(&self) -> StorageLimits {
        StorageLimits {
            request_alignment: 1,
            discard_alignment: 0,
            max_transfer: 0,
        }
    }

    fn set_writable(&self, _: bool) -> Result<(), Errno> {
        Ok(())
    }

    fn as_any(&self) -> &dyn Any {
        self
    }
}

/// The platter as the only file; executor and clock are those of the memory environment.
struct OneDisk {
    disk: Handle,
    clock: MemoryEnv,
}

impl Env for OneDisk {
    fn open(&self, _: &OpenStorage<'_>) -> Result<Rc<dyn Storage>, QmpError> {
        Ok(Rc::new(self.disk.clone()))
    }

    fn now(&self) -> Nanos {
        self.clock.now()
    }

    fn sleep_until(&self, deadline: Nanos) -> Fut<'static, ()> {
        self.clock.sleep_until(deadline)
    }

    fn spawn(&self, name: &'static str, task: Fut<'static, ()>) {
        self.clock.spawn(name, task);
    }
}

fn platter(content: Vec<u8>, left: u64) -> Handle {
    Handle(Rc::new(Platter {
        now: RefCell::new(content.clone()),
        durable: RefCell::new(content),
        pending: RefCell::default(),
        left: Cell::new(left),
        read_time: Cell::new(0),
        clock: MemoryEnv::new(),
    }))
}

fn open(disk: &Handle) -> (MemoryEnv, Layer, Result<Backend, QmpError>) {
    let clock = disk.0.clock.clone();
    let layer = Layer::new(
        Rc::new(OneDisk {
            disk: disk.clone(),
            clock: clock.clone(),
        }),
        None,
    );
    let serde_json::Value::Object(options) = json!({
        "driver": "qcow2", "node-name": "disk", "discard": "unmap", "l2-cache-size": 2048,
        "pass-discard-other": true, "file": { "driver": "file", "filename": "disk" },
    }) else {
        unreachable!()
    };
    let opened = clock.block_on(async {
        let _main = layer.main("test").await;
        layer.blockdev_add(options).await
    });
    let perm = Perm::CONSISTENT_READ | Perm::WRITE | Perm::RESIZE;
    let guest = opened.and_then(|()| {
        let node = layer.find_node("disk").unwrap();
        Backend::new(&layer, node, None, perm, Perm::all(), true)
    });
    (clock, layer, guest)
}

fn be64(image: &[u8], at: usize) -> u64 {
    // The end of a file cut short reads as zeroes.
    let mut raw = [0; 8];
    let end = image.len().min(at + 8);
    if at < end {
        raw[..end - at].copy_from_slice(&image[at..end]);
    }
    u64::from_be_bytes(raw)
}

/// Counts references of an image without snapshots and compares. Returns the number of leaked clusters.
fn check(image: &[u8], order: u32) -> u64 {
    let bits = image[23];
    let cs = 1usize << bits;
    let mut refs: BTreeMap<u64, u64> = BTreeMap::new();
    let mut copied: Vec<u64> = Vec::new();
    let mut count = |at: u64, bytes: u64| {
        for cluster in at >> bits..(at + bytes).div_ceil(cs as u64) {
            *refs.entry(cluster).or_default() += 1;
        }
    };
    let place = |at: u64| usize::try_from(at).unwrap();
    let offset = 0x00ff_ffff_ffff_fe00;
    let l1_size = be64(image, 36) >> 32;
    let (l1, reftable) = (be64(image, 40), be64(image, 48));
    let reftable_bytes = (be64(image, 56) >> 32) << bits;
    count(0, 1);
    count(l1, l1_size * 8);
    count(reftable, reftable_bytes);
    let blocks: Vec<u64> = (0..reftable_bytes / 8)
        .map(|i| be64(image, place(reftable + 8 * i)))
        .collect();
    for block in blocks.iter().filter(|b| **b != 0) {
        count(*block, 1);
    }
    for i in 0..l1_size {
        let l1_entry = be64(image, place(l1 + 8 * i));
        let l2 = l1_entry & offset;
        if l2 == 0 {
            continue;
        }
        count(l2, 1);
        if l1_entry >> 63 == 1 {
            copied.push(l2 >> bits);
        }
        for j in 0..cs / 8 {
            let entry = be64(image, place(l2) + 8 * j);
            if entry & offset != 0 {
                count(entry & offset, 1);
                if entry >> 63 == 1 {
                    copied.push((entry & offset) >> bits);
                }
            }
        }
    }
    let entries = (cs as u64 * 8) >> order;
    let counted = |cluster: u64| {
        let block = blocks.get(place(cluster / entries)).copied().unwrap_or(0);
        let mut data = vec![0; cs];
        let from = place(block).min(image.len());
        let n = cs.min(image.len() - from);
        if block != 0 {
            data[..n].copy_from_slice(&image[from..from + n]);
        }
        refcount::get(&data, order, place(cluster % entries))
    };
    for (cluster, refs) in &refs {
        let counted = counted(*cluster);
        assert!(
            counted >= *refs,
            "cluster {cluster}: {refs} references, refcount {counted}"
        );
    }
    for cluster in copied {
        assert_eq!(counted(cluster), 1, "COPIED names cluster {cluster}");
    }
    let all = image.len().div_ceil(cs) as u64;
    (0..all)
        .filter(|c| counted(*c) > refs.get(c).copied().unwrap_or(0))
        .count() as u64
}

const SECTORS: u64 = 256;

/// Runs random guest requests until the power fails; returns what each sector may hold then.
async fn work(guest: &Backend, seed: &Cell<u64>, may: &mut [Vec<u8>]) {
    let mut stamp = 1u8;
    loop {
        let first = next(seed, SECTORS);
        let count = (1 + next(seed, 24)).min(SECTORS - first);
        let sectors = usize::try_from(first).unwrap()..usize::try_from(first + count).unwrap();
        let (offset, bytes) = (first * 512, count * 512);
        stamp = stamp % 200 + 1;
        let result = match next(seed, 8) {
            0..4 => {
                // Allowed from its start on, whether it is acknowledged or not.
                may[sectors].iter_mut().for_each(|m| m.push(stamp));
                let data = vec![stamp; usize::try_from(bytes).unwrap()];
                guest.write(offset, &data, ReqFlags::empty()).await
            }
            4 => {
                may[sectors].iter_mut().for_each(|m| m.push(0));
                guest.write_zeroes(offset, bytes, ReqFlags::MAY_UNMAP).await
            }
            5 => {
                may[sectors.clone()].iter_mut().for_each(|m| m.push(0));
                let discarded = guest.discard(offset, bytes).await;
                for (sector, may) in (first..).zip(&mut may[sectors]) {
                    // Zero or what was there: whichever it is now, it is the latest.
                    let mut buf = [0; 512];
                    guest
                        .read(sector * 512, &mut buf)
                        .await
                        .expect("reads cost no power");
                    assert!(
                        may[may.len() - 2..].contains(&buf[0]),
                        "a discard shows {}",
                        buf[0]
                    );
                    may.push(buf[0]);
                }
                discarded
            }
            6 => {
                let flushed = guest.flush().await;
                if flushed.is_ok() {
                    for (sector, may) in (0u64..).zip(may.iter_mut()) {
                        let mut buf = [0; 512];
                        guest
                            .read(sector * 512, &mut buf)
                            .await
                            .expect("reads cost no power");
                        assert!(may.contains(&buf[0]), "sector {sector} reads {}", buf[0]);
                        *may = vec![buf[0]];
                    }
                }
                flushed
            }
            _ => {
                let mut buf = vec![0; usize::try_from(bytes).unwrap()];
                let read = guest.read(offset, &mut buf).await;
                for (may, bytes) in may[sectors].iter().zip(buf.chunks_exact(512)) {
                    assert_eq!(
                        may.last(),
                        Some(&bytes[0]),
                        "the latest value is read while the power is on"
                    );
                }
                read
            }
        };
        if result.is_err() {
            return;
        }
    }
}

fn power_loss(bits: u32, order: u32, seed: u64, requests: u64) {
    let disk = platter(Vec::new(), u64::MAX);
    let options = CreateOptions {
        size: SECTORS * 512,
        cluster_size: 1 << bits,
        refcount_bits: 1 << order,
        ..CreateOptions::default()
    };
    MemoryEnv::new().block_on(create(&disk, &options)).unwrap();
    let mut image = disk.0.now.borrow().clone();
    let seed = Cell::new(seed);
    let mut may: Vec<Vec<u8>> = vec![vec![0]; usize::try_from(SECTORS).unwrap()];
    // Three lives of one image: what a cut leaves is where the next life starts.
    for life in 0..3 {
        let disk = platter(image, 1 + next(&seed, requests));
        let (clock, _layer, guest) = open(&disk);
        if let Ok(guest) = guest {
            clock.block_on(work(&guest, &seed, &mut may));
        }
        image = disk.0.cut(&seed);
        check(&image, order);
        let again = platter(image.clone(), u64::MAX);
        let (clock, layer, guest) = open(&again);
        let guest = guest.unwrap_or_else(|e| panic!("life {life}: the image does not open: {e}"));
        for (sector, may) in (0u64..).zip(&mut may) {
            let mut buf = [0; 512];
            clock.block_on(guest.read(sector * 512, &mut buf)).unwrap();
            assert!(
                buf.iter().all(|b| *b == buf[0]),
                "life {life}: sector {sector} is torn"
            );
            assert!(
                may.contains(&buf[0]),
                "life {life}: sector {sector} is {}, may be {may:?}",
                buf[0]
            );
            *may = vec![buf[0]];
        }
        clock.block_on(async {
            let _main = layer.main("test").await;
            guest.remove().await;
            layer.blockdev_del("disk").unwrap();
            layer.reap().await;
        });
        assert!(*again.0.now.borrow() == image, "reading changes nothing");
    }
}

#[test]
fn power_loss_at_any_request() {
    for (bits, order, refused) in [(9, 4, 60), (9, 6, 200), (10, 0, 100), (12, 3, 60)] {
        for seed in 1..250 {
            power_loss(bits, order, seed * 0x9e37_79b9, refused);
        }
    }
}

#[test]
fn a_clean_close_leaks_nothing() {
    for (bits, order) in [(9, 4), (9, 6), (12, 2)] {
        let disk = platter(Vec::new(), u64::MAX);
        let options = CreateOptions {
            size: SECTORS * 512,
            cluster_size: 1 << bits,
            refcount_bits: 1 << order,
            ..CreateOptions::default()
        };
        MemoryEnv::new().block_on(create(&disk, &options)).unwrap();
        let (clock, layer, guest) = open(&disk);
        let guest = guest.unwrap();
        let seed = Cell::new(5);
        clock.block_on(async {
            for step in 0..200u64 {
                let first = next(&seed, SECTORS - 9);
                let data = vec![u8::try_from(step).unwrap(); 4096];
                guest.write(first * 512, &data, ReqFlags::empty()).await.unwrap();
                guest.discard(next(&seed, SECTORS - 9) * 512, 4608).await.unwrap();
            }
            let _main = layer.main("test").await;
            guest.remove().await;
            layer.blockdev_del("disk").unwrap();
            layer.reap().await;
        });
        assert_eq!(check(&disk.0.durable.borrow(), order), 0, "cluster bits {bits}");
        assert!(disk.0.pending.borrow().is_empty(), "close flushes");
    }
}

fn image_of(size: u64, order: u32) -> Vec<u8> {
    let disk = platter(Vec::new(), u64::MAX);
    let options = CreateOptions {
        size,
        cluster_size: 512,
        refcount_bits: 1 << order,
        ..CreateOptions::default()
    };
    MemoryEnv::new().block_on(create(&disk, &options)).unwrap();
    disk.0.now.borrow().clone()
}

fn close(clock: &MemoryEnv, layer: &Layer, guest: Backend) {
    clock.block_on(async {
        let _main = layer.main("test").await;
        guest.remove().await;
        layer.blockdev_del("disk").unwrap();
        layer.reap().await;
    });
}

/// Runs `work` on the image with the power failing at its first request, its second, and so on until it is through;
/// several subsets of sectors survive each cut.
fn every_cut(image: &[u8], order: u32, work: &impl AsyncFn(&Layer, &Backend) -> bool) {
    let seed = Cell::new(0x1234_5678_9abc);
    for left in 1.. {
        let disk = platter(image.to_vec(), left);
        let (clock, layer, guest) = open(&disk);
        let done = guest.is_ok_and(|guest| clock.block_on(work(&layer, &guest)));
        for _ in 0..12 {
            let after = disk.0.cut(&seed);
            check(&after, order);
            let again = platter(after, u64::MAX);
            let (clock, layer, guest) = open(&again);
            close(
                &clock,
                &layer,
                guest.unwrap_or_else(|e| panic!("cut {left}: does not open: {e}")),
            );
        }
        if done {
            assert!(left > 20, "the work costs requests");
            return;
        }
    }
}

#[test]
fn power_loss_while_tables_come_to_be() {
    // 64 refcounts in a block: a new block every 32 KiB.
    every_cut(&image_of(1 << 20, 6), 6, &async |_, guest| {
        for chunk in 0..32u64 {
            let written = guest.write(chunk * 4096, &[7; 4096], ReqFlags::empty()).await;
            if written.is_err() || chunk % 2 == 1 && guest.flush().await.is_err() {
                return false;
            }
        }
        true
    });
}

#[test]
fn power_loss_while_tables_are_replaced() {
    // 64 blocks of 64 refcounts: the first refcount table counts 2 MiB, and these are almost used up.
    let disk = platter(image_of(4 << 20, 6), u64::MAX);
    let (clock, layer, guest) = open(&disk);
    let guest = guest.unwrap();
    clock
        .block_on(guest.write(0, &vec![1; 1900 << 10], ReqFlags::empty()))
        .unwrap();
    close(&clock, &layer, guest);
    let image = disk.0.durable.borrow().clone();
    assert_eq!(check(&image, 6), 0);
    every_cut(&image, 6, &async |layer, guest| {
        for chunk in 0..4u64 {
            let at = (2 << 20) + chunk * 65536;
            let written = guest.write(at, &vec![9; 65536], ReqFlags::empty()).await;
            if written.is_err() || guest.flush().await.is_err() {
                return false;
            }
        }
        let edge = guest.root_edge().unwrap();
        for size in [24 << 20, 3 << 20] {
            if layer
                .truncate(edge, size, false, ReqFlags::empty())
                .await
                .is_err()
            {
                return false;
            }
        }
        let node = layer.child(edge).unwrap();
        let changed = node
            .driver()
            .change_backing_file(&layer.cx(&node), Some(("base", Some("raw"))))
            .await;
        let removed = node.driver().change_backing_file(&layer.cx(&node), None).await;
        changed.is_ok() && removed.is_ok()
    });
}

#[test]
fn a_slow_read_keeps_its_cluster_from_reuse() {
    let disk = platter(image_of(1 << 17, 4), u64::MAX);
    let (clock, layer, guest) = open(&disk);
    let guest = guest.unwrap();
    let none = ReqFlags::empty();
    clock.block_on(async {
        guest.write(0, &[0xaa; 512], none).await.unwrap();
        guest.flush().await.unwrap();
    });
    disk.0.read_time.set(1_000_000);
    let seen = Rc::new(Cell::new(None));
    let (reader, result) = (guest.clone(), Rc::clone(&seen));
    clock.spawn(
        "reader",
        Box::pin(async move {
            let mut buf = [0; 512];
            reader.read(0, &mut buf).await.unwrap();
            result.set(Some(buf));
        }),
    );
    clock.block_on(async {
        // The read has looked its cluster up and waits for the disk.
        clock.sleep_until(clock.now() + 1000).await;
        assert!(seen.get().is_none());
        guest.discard(0, 512).await.unwrap();
        for sector in 1..100u64 {
            guest.write(sector * 512, &[0xbb; 512], none).await.unwrap();
            guest.flush().await.unwrap();
        }
        assert!(seen.get().is_none(), "all that while the read was under way");
        clock.sleep_until(clock.now() + 2_000_000).await;
    });
    assert_eq!(
        seen.get(),
        Some([0xaa; 512]),
        "not the data of the cluster's next owner"
    );
    disk.0.read_time.set(0);
    close(&clock, &layer, guest);
    assert_eq!(
        check(&disk.0.durable.borrow(), 4),
        0,
        "and the cluster was released in the end"
    );
}
