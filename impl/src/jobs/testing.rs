//! Fixture for whole-job tests: a memory environment with injected faults, real drivers, a log of events.

#![allow(
    clippy::needless_pass_by_value,
    reason = "`json!` literals read best as arguments"
)]

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use serde_json::{Value, json};

use crate::Layer;
use crate::drivers::qcow2::{CreateOptions, create};
use crate::env::{Env, Extent, Fut, Nanos, OpenStorage, Storage, StorageKind, StorageLimits};
use crate::error::{Errno, QmpError};
use crate::event::{Event, Observer, Parent, ReqKind};
use crate::io::backend::Backend;
use crate::jobs::JobStatus;
use crate::memory::MemoryEnv;
use crate::types::{ReqFlags, Role};

pub(crate) const KIB: u64 = 1024;
pub(crate) const MIB: u64 = 1024 * KIB;

/// Requests that fail.
#[derive(Debug)]
struct Rule {
    file: String,
    op: &'static str,
    start: u64,
    end: u64,
    errno: Errno,
    /// How often yet.
    left: u32,
}

/// Storage requests that fail, and a log of what was asked.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    rules: RefCell<Vec<Rule>>,
    pub(crate) log: RefCell<Vec<(String, &'static str, u64)>>,
}

impl Faults {
    fn check(&self, file: &str, op: &'static str, offset: u64, bytes: u64) -> Result<(), Errno> {
        self.log.borrow_mut().push((file.to_owned(), op, offset));
        for rule in &mut *self.rules.borrow_mut() {
            let hit = rule.file == file && rule.op == op && rule.left > 0;
            if hit && offset < rule.end && offset + bytes.max(1) > rule.start {
                rule.left -= 1;
                return Err(rule.errno);
            }
        }
        Ok(())
    }
}

#[derive(Debug)]
struct FaultyStorage {
    name: String,
    below: Rc<dyn Storage>,
    faults: Rc<Faults>,
}

impl Storage for FaultyStorage {
    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> Fut<'a, Result<usize, Errno>> {
        Box::pin(async move {
            self.faults.check(&self.name, "read", offset, buf.len() as u64)?;
            self.below.read(offset, buf).await
        })
    }
    fn write<'a>(&'a self, offset: u64, buf: &'a [u8]) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            self.faults.check(&self.name, "write", offset, buf.len() as u64)?;
            self.below.write(offset, buf).await
        })
    }
    fn flush(&self) -> Fut<'_, Result<(), Errno>> {
        Box::pin(async move {
            self.faults.check(&self.name, "flush", 0, 0)?;
            self.below.flush().await
        })
    }
    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> Fut<'_, Result<(), Errno>> {
        self.below.write_zeroes(offset, bytes, may_unmap)
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

struct TestEnv {
    memory: MemoryEnv,
    faults: Rc<Faults>,
    parallelism: usize,
}

impl Env for TestEnv {
    fn open(&self, open: &OpenStorage<'_>) -> Result<Rc<dyn Storage>, QmpError> {
        let below = self.memory.open(open)?;
        let name = open.filename.to_owned();
        Ok(Rc::new(FaultyStorage {
            name,
            below,
            faults: Rc::clone(&self.faults),
        }))
    }
    fn now(&self) -> Nanos {
        self.memory.now()
    }
    fn sleep_until(&self, deadline: Nanos) -> Fut<'static, ()> {
        self.memory.sleep_until(deadline)
    }
    fn spawn(&self, name: &'static str, task: Fut<'static, ()>) {
        self.memory.spawn(name, task);
    }
    fn job_parallelism(&self) -> usize {
        self.parallelism
    }
}

/// QMP events in short form, pause counts, chunks.
#[derive(Default)]
pub(crate) struct Log {
    pub(crate) script: RefCell<Vec<String>>,
    pub(crate) chunks: RefCell<Vec<(u64, u64, bool)>>,
    frozen: Cell<i64>,
    /// Flushes of nodes and changes of backing links, in order.
    pub(crate) order: RefCell<Vec<(&'static str, u32)>>,
}

impl Observer for Log {
    fn event(&self, event: &Event) {
        match event {
            Event::Qmp { name, data } => self.script.borrow_mut().push(match *name {
                "JOB_STATUS_CHANGE" => format!(".{}", data["status"].as_str().expect("a word")),
                "BLOCK_JOB_COMPLETED" if data.get("error").is_some() => "COMPLETED(error)".to_owned(),
                name => match data.get("action") {
                    Some(action) => format!("ERROR({})", action.as_str().expect("a word")),
                    None => name.trim_start_matches("BLOCK_JOB_").to_owned(),
                },
            }),
            Event::JobChunk {
                offset,
                bytes,
                copied,
                ..
            } => {
                self.chunks.borrow_mut().push((*offset, *bytes, *copied));
            }
            Event::RequestBegin {
                kind: ReqKind::Flush,
                node,
                ..
            } => self.order.borrow_mut().push(("flush", node.0)),
            Event::EdgeSet {
                parent: Parent::Node(node),
                role: Role::COW,
                ..
            } => {
                self.order.borrow_mut().push(("link", node.0));
            }
            Event::Frozen { .. } => self.frozen.set(self.frozen.get() + 1),
            Event::Unfrozen { .. } => self.frozen.set(self.frozen.get() - 1),
            _ => {}
        }
    }
}

pub(crate) struct World {
    pub(crate) memory: MemoryEnv,
    pub(crate) faults: Rc<Faults>,
    pub(crate) log: Rc<Log>,
    pub(crate) layer: Layer,
}

impl World {
    pub(crate) fn new(parallelism: usize) -> World {
        let memory = MemoryEnv::new();
        let faults = Rc::new(Faults::default());
        let env = TestEnv {
            memory: memory.clone(),
            faults: Rc::clone(&faults),
            parallelism,
        };
        let log = Rc::new(Log::default());
        let layer = Layer::new(Rc::new(env), Some(Rc::clone(&log) as _));
        World {
            memory,
            faults,
            log,
            layer,
        }
    }

    /// An empty qcow2 image.
    pub(crate) fn qcow2(&self, name: &str, size: u64, backing: Option<(&str, &str)>) {
        self.memory.create(name, 0);
        let open = OpenStorage {
            filename: name,
            kind: StorageKind::File,
            writable: true,
            direct: false,
        };
        let storage = self.memory.open(&open).expect("just created");
        let options = CreateOptions {
            size,
            backing_file: backing.map(|(file, _)| file),
            backing_format: backing.map(|(_, format)| format),
            ..CreateOptions::default()
        };
        self.memory
            .block_on(create(&*storage, &options))
            .expect("an image");
    }

    pub(crate) fn try_qmp(&self, command: &str, arguments: Value) -> Result<Value, QmpError> {
        self.memory.block_on(self.layer.execute(command, &arguments))
    }

    #[track_caller]
    pub(crate) fn qmp(&self, command: &str, arguments: Value) -> Value {
        match self.try_qmp(command, arguments.clone()) {
            Ok(value) => value,
            Err(refusal) => panic!("{command} {arguments}: {refusal}"),
        }
    }

    #[track_caller]
    pub(crate) fn refused(&self, command: &str, arguments: Value, text: &str) {
        let before = self.layer.inspect();
        let refusal = self.try_qmp(command, arguments.clone()).expect_err(text);
        assert_eq!(refusal.desc, text, "{command} {arguments}");
        let (before, after) = (format!("{before:?}"), format!("{:?}", self.layer.inspect()));
        assert_eq!(before, after, "{command} {arguments} changed the graph");
    }

    pub(crate) fn open(&self, name: &str, file: &str, extra: Value) {
        let mut options =
            json!({"driver": "qcow2", "node-name": name, "file": {"driver": "file", "filename": file}});
        if let (Some(options), Value::Object(extra)) = (options.as_object_mut(), extra) {
            options.extend(extra);
        }
        self.qmp("blockdev-add", options);
    }

    /// base (1 MiB) <- mid <- top, one 64 KiB stamp each at 0, 64 KiB, …: 9 in the base, 7 in the middle, 5 on top.
    pub(crate) fn chain(&self) {
        self.qcow2("base", MIB, None);
        self.qcow2("mid", MIB, Some(("base", "qcow2")));
        self.qcow2("top", MIB, Some(("mid", "qcow2")));
        self.open("base", "base", json!({}));
        self.fill("base", 0, 9 * 64 * KIB, 9);
        self.open("mid", "mid", json!({"backing": "base"}));
        self.fill("mid", 128 * KIB, 7 * 64 * KIB, 7);
        self.open("top", "top", json!({"backing": "mid"}));
        self.fill("top", 256 * KIB, 64 * KIB, 5);
    }

    pub(crate) fn with_export<T>(&self, node: &str, act: impl AsyncFnOnce(Backend) -> T) -> T {
        self.qmp(
            "block-export-add",
            json!({"type": "nbd", "id": "guest", "node-name": node, "writable": true}),
        );
        let backend = self.layer.export("guest").expect("just added");
        let result = self.memory.block_on(act(backend));
        self.qmp("block-export-del", json!({"id": "guest"}));
        result
    }

    pub(crate) fn fill(&self, node: &str, offset: u64, bytes: u64, byte: u8) {
        let data = vec![byte; usize::try_from(bytes).expect("small")];
        self.with_export(node, async |b| {
            b.write(offset, &data, ReqFlags::empty()).await.expect("written");
        });
    }

    pub(crate) fn read_all(&self, node: &str) -> Vec<u8> {
        let id = self.layer.find_node(node).expect("a node");
        let mut data = vec![0xee; usize::try_from(self.layer.node(id).length()).expect("small")];
        self.qmp(
            "block-export-add",
            json!({"type": "nbd", "id": "reader", "node-name": node, "name": "reader"}),
        );
        let backend = self.layer.export("reader").expect("just added");
        self.memory.block_on(backend.read(0, &mut data)).expect("read");
        self.qmp("block-export-del", json!({"id": "reader"}));
        data
    }

    /// Runs until the job has this status, or is gone.
    #[track_caller]
    pub(crate) fn until(&self, job: &str, status: JobStatus) {
        for _ in 0..10_000 {
            match self.layer.job(job) {
                None if status == JobStatus::Null => return,
                Some(job) if job.status() == status => return,
                _ => {}
            }
            let deadline = self.memory.now() + 1000;
            self.memory.block_on(self.memory.sleep_until(deadline));
        }
        panic!(
            "{job} does not become {}: {:?}",
            status.name(),
            self.layer.job(job)
        );
    }

    /// Runs everything that is ready.
    pub(crate) fn settle(&self) {
        let deadline = self.memory.now() + 1000;
        self.memory.block_on(self.memory.sleep_until(deadline));
    }

    pub(crate) fn take_script(&self) -> String {
        self.log.script.take().join(" ")
    }

    pub(crate) fn backing_of(&self, node: &str) -> Option<String> {
        let id = self.layer.find_node(node).expect("a node");
        self.layer
            .cow(id)
            .map(|below| self.layer.node(below).name.to_string())
    }

    pub(crate) fn header_of(&self, node: &str) -> Option<(String, Option<String>)> {
        self.layer
            .node(self.layer.find_node(node).expect("a node"))
            .driver()
            .backing_header()
    }

    pub(crate) fn fail(&self, file: &str, op: &'static str, range: (u64, u64), errno: Errno, times: u32) {
        let rule = Rule {
            file: file.to_owned(),
            op,
            start: range.0,
            end: range.1,
            errno,
            left: times,
        };
        self.faults.rules.borrow_mut().push(rule);
    }

    /// Mends what `fail` broke.
    pub(crate) fn mend(&self) {
        self.faults.rules.borrow_mut().clear();
    }

    /// Nothing of any job is left.
    #[track_caller]
    pub(crate) fn assert_clean(&self) {
        assert!(self.layer.jobs().is_empty());
        assert_eq!(self.log.frozen.get(), 0, "freezes balance");
        for node in self.layer.nodes() {
            assert_ne!(node.facts.name, "copy-on-read", "no filter is left");
            assert_ne!(node.facts.name, "copy-before-write", "no filter is left");
            assert_eq!(node.quiesce_counter.get(), 0);
            assert!(
                node.blockers.borrow().iter().all(|b| b.backing_link),
                "no job blocks {node:?}"
            );
        }
    }
}
