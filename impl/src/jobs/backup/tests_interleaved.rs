//! Backups beside guests whose requests end in any order: storage takes a while that is drawn from a seed, before and after it
//! acts, and may fail. What must come out: the target shows the point in time, bitmaps forget nothing, guests read what they wrote.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use serde_json::{Value, json};

use crate::Layer;
use crate::drivers::qcow2::{CreateOptions, create};
use crate::env::{Env, Extent, Fut, Nanos, OpenStorage, Storage, StorageKind, StorageLimits};
use crate::error::{Errno, QmpError};
use crate::event::{Event, Observer};
use crate::io::backend::Backend;
use crate::memory::MemoryEnv;
use crate::types::ReqFlags;

const CLUSTER: u64 = 64 * 1024;
const LENGTH: u64 = 10 * CLUSTER + 1536;

/// Numbers from a seed (splitmix64).
#[derive(Debug)]
struct Dice(Cell<u64>);

impl Dice {
    fn below(&self, limit: u64) -> u64 {
        let mut z = self.0.get().wrapping_add(0x9e37_79b9_7f4a_7c15);
        self.0.set(z);
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

#[derive(Debug)]
struct World {
    memory: MemoryEnv,
    dice: Dice,
    /// The file whose writes may fail.
    weak: RefCell<Option<String>>,
}

#[derive(Debug)]
struct Slow {
    world: Rc<World>,
    name: String,
    below: Rc<dyn Storage>,
}

impl World {
    async fn a_while(&self) {
        let nanos = self.dice.below(900);
        self.memory.sleep_until(self.memory.now() + nanos).await;
    }
}

impl Slow {
    fn breaks(&self) -> Result<(), Errno> {
        let weak = self.world.weak.borrow().as_deref() == Some(&self.name);
        if weak && self.world.dice.below(4) == 0 {
            return Err(Errno::EIO);
        }
        Ok(())
    }
}

impl Storage for Slow {
    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> Fut<'a, Result<usize, Errno>> {
        Box::pin(async move {
            self.world.a_while().await;
            let read = self.below.read(offset, buf).await;
            self.world.a_while().await;
            read
        })
    }
    fn write<'a>(&'a self, offset: u64, buf: &'a [u8]) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.world.a_while().await;
            self.breaks()?;
            let written = self.below.write(offset, buf).await;
            self.world.a_while().await;
            written
        })
    }
    fn flush(&self) -> Fut<'_, Result<(), Errno>> {
        self.below.flush()
    }
    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> Fut<'_, Result<(), Errno>> {
        Box::pin(async move {
            self.world.a_while().await;
            let zeroed = self.below.write_zeroes(offset, bytes, may_unmap).await;
            self.world.a_while().await;
            zeroed
        })
    }
    fn discard(&self, offset: u64, bytes: u64) -> Fut<'_, Result<(), Errno>> {
        self.below.discard(offset, bytes)
    }
    fn truncate(&self, length: u64) -> Fut<'_, Result<(), Errno>> {
        self.below.truncate(length)
    }
    fn length(&self) -> Result<u64, Errno> {
        self.below.length()
    }
    fn extent(&self, offset: u64) -> Result<Extent, Errno> {
        self.below.extent(offset)
    }
    fn limits(&self) -> StorageLimits {
        self.below.limits()
    }
    fn set_writable(&self, writable: bool) -> Result<(), Errno> {
        self.below.set_writable(writable)
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

struct SlowEnv(Rc<World>);

impl Env for SlowEnv {
    fn open(&self, open: &OpenStorage<'_>) -> Result<Rc<dyn Storage>, QmpError> {
        Ok(Rc::new(Slow {
            world: Rc::clone(&self.0),
            name: open.filename.to_owned(),
            below: self.0.memory.open(open)?,
        }))
    }
    fn now(&self) -> Nanos {
        self.0.memory.now()
    }
    fn sleep_until(&self, deadline: Nanos) -> Fut<'static, ()> {
        self.0.memory.sleep_until(deadline)
    }
    fn spawn(&self, name: &'static str, task: Fut<'static, ()>) {
        self.0.memory.spawn(name, task);
    }
}

/// What was written and acknowledged, and what that was when a filter was put in place.
#[derive(Default)]
struct Known {
    now: RefCell<Vec<u8>>,
    then: RefCell<Vec<u8>>,
    failed: Cell<u32>,
    cancelled: Cell<u32>,
}

impl Observer for Known {
    fn event(&self, event: &Event) {
        match event {
            Event::FilterInserted { .. } => {
                self.then.replace(self.now.borrow().clone());
            }
            Event::Qmp { name, data } if *name == "BLOCK_JOB_COMPLETED" && data.get("error").is_some() => {
                self.failed.set(self.failed.get() + 1);
            }
            Event::Qmp { name, .. } if *name == "BLOCK_JOB_CANCELLED" => {
                self.cancelled.set(self.cancelled.get() + 1);
            }
            _ => {}
        }
    }
}

struct Run {
    seed: u64,
    world: Rc<World>,
    known: Rc<Known>,
    layer: Layer,
    guests: Rc<Cell<u32>>,
    over: Rc<Cell<bool>>,
}

impl Run {
    /// `src` over `base`, a target (over `below`), two guests at work.
    fn new(seed: u64, below: Option<&'static str>) -> Run {
        let run = Run::images(seed, below);
        run.at_work("src");
        run
    }

    fn images(seed: u64, below: Option<&'static str>) -> Run {
        let world = Rc::new(World {
            memory: MemoryEnv::new(),
            dice: Dice(Cell::new(seed)),
            weak: RefCell::default(),
        });
        let known = Rc::<Known>::default();
        let layer = Layer::new(Rc::new(SlowEnv(Rc::clone(&world))), Some(Rc::clone(&known) as _));
        let run = Run {
            seed,
            world,
            known,
            layer,
            guests: Rc::default(),
            over: Rc::default(),
        };
        run.known.now.replace(vec![0; crate::io::size(LENGTH)]);
        run.image("base", None);
        run.export("base", "filler");
        run.scribble("filler", 6);
        run.qmp("block-export-del", &json!({"id": "filler"}));
        run.image("src", Some("base"));
        run.image("tgt", below);
        run.export("src", "filler");
        run.scribble("filler", 6);
        run.qmp("block-export-del", &json!({"id": "filler"}));
        run.qmp("block-dirty-bitmap-add", &json!({"node": "src", "name": "b"}));
        run
    }

    fn at_work(&self, node: &str) {
        self.export(node, "guest");
        for n in 0..2 {
            self.guest(n);
        }
    }

    fn image(&self, name: &str, backing: Option<&str>) {
        let memory = &self.world.memory;
        memory.create(name, 0);
        let open = OpenStorage {
            filename: name,
            kind: StorageKind::File,
            writable: true,
            direct: false,
        };
        let storage = memory.open(&open).expect("just created");
        let options = CreateOptions {
            size: LENGTH,
            ..CreateOptions::default()
        };
        memory.block_on(create(&*storage, &options)).expect("an image");
        let file = json!({"driver": "file", "filename": name});
        self.qmp(
            "blockdev-add",
            &json!({"driver": "qcow2", "node-name": name, "file": file, "backing": backing}),
        );
    }

    fn export(&self, node: &str, id: &str) {
        self.qmp(
            "block-export-add",
            &json!({"type": "nbd", "id": id, "node-name": node, "name": id, "writable": true}),
        );
    }

    fn try_qmp(&self, command: &str, arguments: &Value) -> Result<Value, QmpError> {
        self.world.memory.block_on(self.layer.execute(command, arguments))
    }

    #[track_caller]
    fn qmp(&self, command: &str, arguments: &Value) {
        let result = self.try_qmp(command, arguments);
        assert!(
            result.is_ok(),
            "seed {}: {command} {arguments}: {result:?}",
            self.seed
        );
    }

    fn scribble(&self, export: &str, times: u64) {
        let backend = self.layer.export(export).expect("just added");
        for _ in 0..times {
            let write = write_something(&self.world, &self.known, &backend, 0..LENGTH);
            self.world.memory.block_on(write);
        }
    }

    /// Writes to its own sectors until told to stop, and reads them back.
    fn guest(&self, n: u64) {
        let (world, known) = (Rc::clone(&self.world), Rc::clone(&self.known));
        let (guests, over) = (Rc::clone(&self.guests), Rc::clone(&self.over));
        let backend = self.layer.export("guest").expect("just added");
        guests.set(guests.get() + 1);
        let half = LENGTH / 2 / 512 * 512;
        let own = n * half..(n + 1) * half;
        let seed = self.seed;
        let task = async move {
            while !over.get() {
                world
                    .memory
                    .sleep_until(world.memory.now() + world.dice.below(4000))
                    .await;
                write_something(&world, &known, &backend, own.clone()).await;
                let at = own.start + world.dice.below(half / 512) * 512;
                let mut data = [0; 512];
                backend.read(at, &mut data).await.expect("reads");
                let range = crate::io::size(at)..crate::io::size(at) + 512;
                assert!(
                    data == known.now.borrow()[range],
                    "seed {seed}: guest {n} reads {at}"
                );
            }
            guests.set(guests.get() - 1);
        };
        self.world.memory.spawn("guest", Box::pin(task));
    }

    fn pause(&self, most: u64) {
        let memory = &self.world.memory;
        memory.block_on(memory.sleep_until(memory.now() + self.world.dice.below(most)));
    }

    fn backup(&self, more: Value) {
        let mut all =
            json!({"job-id": "j", "device": "src", "target": "tgt", "sync": "full", "filter-node-name": "f"});
        if let (Some(all), Value::Object(more)) = (all.as_object_mut(), more) {
            all.extend(more);
        }
        if self.world.dice.below(2) == 0 {
            all["x-perf"] = json!({"max-workers": 1 + self.world.dice.below(3), "max-chunk": CLUSTER});
        }
        self.qmp("blockdev-backup", &all);
    }

    /// Lets the job run to its end, stopped and slowed down now and then.
    fn until_over(&self) {
        for _ in 0..100_000 {
            if self.layer.job("j").is_none() {
                return;
            }
            if self.world.dice.below(8) == 0 {
                let node = ["src", "tgt", "f"][crate::io::size(self.world.dice.below(3))];
                if let Some(node) = self.layer.find_node(node) {
                    let layer = self.layer.clone();
                    let section = async move { drop(layer.drained(node).await) };
                    self.world.memory.block_on(section);
                }
            }
            self.pause(4000);
        }
        panic!(
            "seed {}: the job does not end: {:?}",
            self.seed,
            self.layer.job("j")
        );
    }

    /// Everything a node shows.
    fn all_of(&self, node: &str) -> Vec<u8> {
        let mut data = vec![0xee; crate::io::size(LENGTH)];
        let arguments = json!({"type": "nbd", "id": "all", "node-name": node, "name": "all"});
        self.qmp("block-export-add", &arguments);
        let backend = self.layer.export("all").expect("just added");
        self.world
            .memory
            .block_on(backend.read(0, &mut data))
            .expect("read");
        self.qmp("block-export-del", &json!({"id": "all"}));
        data
    }

    #[track_caller]
    fn shows_then(&self, node: &str) {
        let (shown, then) = (self.all_of(node), self.known.then.borrow());
        let wrong = shown.iter().zip(then.iter()).position(|(a, b)| a != b);
        assert_eq!(wrong, None, "seed {}: {node} differs here", self.seed);
    }

    /// The guests stop; the layer goes empty-handed.
    fn finish(self) {
        self.over.set(true);
        while self.guests.get() > 0 {
            self.pause(4000);
        }
        assert!(
            self.all_of("src") == *self.known.now.borrow(),
            "seed {}",
            self.seed
        );
        assert!(
            self.layer.find_node("f").is_none(),
            "seed {}: no filter is left",
            self.seed
        );
        self.world.memory.block_on(self.layer.shutdown());
    }
}

/// A write, zero write or discard-free stretch in `range`; it counts once it was acknowledged.
async fn write_something(world: &World, known: &Known, backend: &Backend, range: std::ops::Range<u64>) {
    let sectors = (range.end - range.start) / 512;
    let first = world.dice.below(sectors);
    let count = 1 + world.dice.below(if world.dice.below(4) == 0 { 300 } else { 8 });
    let at = range.start + first * 512;
    let bytes = count.min(sectors - first) * 512;
    let byte = u8::try_from(1 + world.dice.below(255)).expect("a byte");
    let zero = world.dice.below(5) == 0;
    let done = if zero {
        backend.write_zeroes(at, bytes, ReqFlags::empty()).await
    } else {
        let data = vec![byte; crate::io::size(bytes)];
        backend.write(at, &data, ReqFlags::empty()).await
    };
    // A copy that fails fails the write, and nothing of it was done.
    if done.is_ok() {
        let part = crate::io::size(at)..crate::io::size(at + bytes);
        known.now.borrow_mut()[part].fill(if zero { 0 } else { byte });
    }
}

const SEEDS: u64 = 24;

#[test]
fn full_and_top_show_the_point_in_time() {
    for seed in 0..SEEDS {
        let top = seed % 2 == 1;
        let run = Run::new(seed, top.then_some("base"));
        run.backup(json!({"sync": if top { "top" } else { "full" }, "auto-finalize": seed % 4 < 2}));
        if seed % 4 < 2 {
            run.until_over();
        } else {
            run.pause(200_000);
            while run
                .layer
                .job("j")
                .is_some_and(|job| job.status().name() != "pending")
            {
                run.pause(20_000);
            }
            run.qmp("job-finalize", &json!({"id": "j"}));
        }
        assert_eq!(run.known.failed.get(), 0, "seed {seed}");
        run.shows_then("tgt");
        run.finish();
    }
}

#[test]
fn a_fleecing_target_shows_it_all_the_time() {
    for seed in 0..SEEDS {
        let run = Run::new(seed, Some("src"));
        run.backup(json!({"sync": "none"}));
        let snapshot = json!({"driver": "snapshot-access", "node-name": "snap", "file": "f"});
        run.qmp("blockdev-add", &snapshot);
        for _ in 0..3 {
            run.pause(20_000);
            run.shows_then("tgt");
            run.shows_then("snap");
        }
        run.qmp("blockdev-del", &json!({"node-name": "snap"}));
        run.qmp("job-cancel", &json!({"id": "j"}));
        run.until_over();
        run.finish();
    }
}

#[test]
fn incrementals_add_up_also_after_cancelled_and_failed_ones() {
    let (mut failed, mut cancelled) = (0, 0);
    for seed in 0..SEEDS {
        let run = Run::new(seed, None);
        let mode = ["on-success", "always"][crate::io::size(seed % 2)];
        run.backup(json!({"bitmap": "b", "bitmap-mode": mode}));
        run.until_over();
        run.shows_then("tgt");
        for _ in 0..3 {
            run.pause(30_000);
            // One that ends badly, or well if it is quick enough.
            let fails = run.world.dice.below(2) == 0;
            if fails {
                run.world.weak.replace(Some("tgt".to_owned()));
            }
            run.backup(json!({"sync": "bitmap", "bitmap": "b", "bitmap-mode": mode}));
            run.pause(15_000);
            if !fails {
                // It may be over already.
                let _ = run.try_qmp("job-cancel", &json!({"id": "j"}));
            }
            run.until_over();
            run.world.weak.replace(None);
            run.pause(10_000);
            run.backup(json!({"sync": "bitmap", "bitmap": "b", "bitmap-mode": mode}));
            run.until_over();
            run.shows_then("tgt");
        }
        failed += run.known.failed.get();
        cancelled += run.known.cancelled.get();
        run.finish();
    }
    assert!(
        failed > 0 && cancelled > 0,
        "{failed} failed, {cancelled} were cancelled"
    );
}

#[test]
fn a_target_that_fails_now_and_then_is_complete_with_ignore() {
    for seed in 0..SEEDS {
        let run = Run::new(seed, None);
        run.world.weak.replace(Some("tgt".to_owned()));
        run.backup(json!({"on-target-error": "ignore"}));
        run.until_over();
        run.world.weak.replace(None);
        assert_eq!(run.known.failed.get(), 0, "seed {seed}");
        run.shows_then("tgt");
        run.finish();
    }
}

#[test]
fn a_snapshot_is_right_or_refused_while_its_target_fails() {
    let mut refused = 0;
    for seed in 0..SEEDS {
        let run = Run::images(seed, None);
        run.known.then.replace(run.known.now.borrow().clone());
        let breaks = ["break-guest-write", "break-snapshot"][crate::io::size(seed % 2)];
        run.qmp(
            "blockdev-add",
            &json!({"driver": "copy-before-write", "node-name": "cbw", "file": "src", "target": "tgt",
                "on-cbw-error": breaks}),
        );
        run.qmp(
            "blockdev-add",
            &json!({"driver": "snapshot-access", "node-name": "snap", "file": "cbw"}),
        );
        run.qmp(
            "block-export-add",
            &json!({"type": "nbd", "id": "snap", "node-name": "snap", "name": "snap"}),
        );
        run.at_work("cbw");
        let snapshot = run.layer.export("snap").expect("just added");
        for round in 0..40 {
            if round == seed % 6 {
                run.world.weak.replace(Some("tgt".to_owned()));
            }
            let first = run.world.dice.below(LENGTH / 512);
            let count = 1 + run.world.dice.below(LENGTH / 512 - first);
            let (at, bytes) = (first * 512, crate::io::size(count * 512));
            let mut data = vec![0xee; bytes];
            match run.world.memory.block_on(snapshot.read(at, &mut data)) {
                Ok(()) => {
                    let then = &run.known.then.borrow()[crate::io::size(at)..][..bytes];
                    assert!(data == then, "seed {seed}: round {round} reads {at} +{bytes}");
                }
                Err(errno) => {
                    assert_eq!((errno, breaks), (Errno::EACCES, "break-snapshot"), "seed {seed}");
                    refused += 1;
                }
            }
            run.pause(3000);
        }
        run.world.weak.replace(None);
        run.qmp("block-export-del", &json!({"id": "snap"}));
        run.qmp("blockdev-del", &json!({"node-name": "snap"}));
        run.finish();
    }
    assert!(refused > 0, "some target failed while its snapshot was read");
}
