//! Whole jobs over a memory environment with real drivers.

use std::cell::{Cell, RefCell};
use std::rc::Rc;

use serde_json::{Value, json};

use crate::Layer;
use crate::drivers::qcow2::{CreateOptions, create};
use crate::env::{Env, Extent, Fut, Nanos, OpenStorage, Storage, StorageKind, StorageLimits};
use crate::error::{Errno, QmpError};
use crate::event::{Event, Observer};
use crate::io::backend::Backend;
use crate::jobs::JobStatus;
use crate::memory::MemoryEnv;
use crate::types::ReqFlags;

pub(crate) const KIB: u64 = 1024;
pub(crate) const MIB: u64 = 1024 * KIB;

/// Storage requests that fail, and a log of what was asked.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// File, operation, start, end, errno, how often.
    rules: RefCell<Vec<(String, &'static str, u64, u64, Errno, u32)>>,
    log: RefCell<Vec<(String, &'static str, u64)>>,
}

impl Faults {
    fn check(&self, file: &str, op: &'static str, offset: u64, bytes: u64) -> Result<(), Errno> {
        self.log.borrow_mut().push((file.to_owned(), op, offset));
        for rule in &mut *self.rules.borrow_mut() {
            let (name, what, start, end, errno, left) = rule;
            if name == file && *what == op && offset < *end && offset + bytes.max(1) > *start && *left > 0 {
                *left -= 1;
                return Err(*errno);
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
    script: RefCell<Vec<String>>,
    chunks: RefCell<Vec<(u64, u64, bool)>>,
    frozen: Cell<i64>,
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
            b.write(offset, &data, ReqFlags::empty()).await.expect("written")
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

    fn take_script(&self) -> String {
        self.log.script.take().join(" ")
    }

    fn backing_of(&self, node: &str) -> Option<String> {
        let id = self.layer.find_node(node).expect("a node");
        self.layer
            .cow(id)
            .map(|below| self.layer.node(below).name.to_string())
    }

    fn header_of(&self, node: &str) -> Option<(String, Option<String>)> {
        self.layer
            .node(self.layer.find_node(node).expect("a node"))
            .driver()
            .backing_header()
    }

    fn fail(&self, file: &str, op: &'static str, range: (u64, u64), errno: Errno, times: u32) {
        self.faults
            .rules
            .borrow_mut()
            .push((file.to_owned(), op, range.0, range.1, errno, times));
    }

    /// Nothing of any job is left.
    #[track_caller]
    fn assert_clean(&self) {
        assert!(self.layer.jobs().is_empty());
        assert_eq!(self.log.frozen.get(), 0, "freezes balance");
        for node in self.layer.nodes() {
            assert_ne!(node.facts.name, "copy-on-read", "no filter is left");
            assert_eq!(node.quiesce_counter.get(), 0);
            assert!(
                node.blockers.borrow().iter().all(|b| b.backing_link),
                "no job blocks {node:?}"
            );
        }
    }
}

const HALF: usize = 512 * 1024;

#[test]
fn streaming_to_each_base_keeps_the_content() {
    for parallelism in [1, 3] {
        for (arguments, backing) in [
            (json!({}), None),
            (json!({"base-node": "base"}), Some("base")),
            (json!({"base": "base"}), Some("base")),
            (json!({"bottom": "mid"}), Some("base")),
            (json!({"base-node": "mid"}), Some("mid")),
            (json!({"bottom": "top"}), Some("mid")),
        ] {
            let world = World::new(parallelism);
            world.chain();
            let before = ["top", "mid", "base"].map(|n| world.read_all(n));
            let mut arguments = arguments;
            arguments["device"] = json!("top");
            arguments["job-id"] = json!("j");
            world.qmp("block-stream", arguments.clone());
            world.until("j", JobStatus::Null);
            assert_eq!(world.backing_of("top").as_deref(), backing, "{arguments}");
            let header = backing.map(|name| (name.to_owned(), Some("qcow2".to_owned())));
            assert_eq!(world.header_of("top"), header, "{arguments}");
            assert_eq!(
                ["top", "mid", "base"].map(|n| world.read_all(n)),
                before,
                "{arguments}"
            );
            world.assert_clean();
            // A second run with the same base copies nothing.
            world.log.chunks.take();
            if arguments.get("bottom").is_none() {
                world.qmp("block-stream", arguments.clone());
                world.until("j", JobStatus::Null);
                assert!(
                    world.log.chunks.take().iter().all(|(_, _, copied)| !copied),
                    "{arguments}"
                );
            }
            // What the header says is what is there.
            world.memory.block_on(world.layer.shutdown());
            world.open("again", "top", json!({}));
            assert_eq!(world.read_all("again"), before[0], "{arguments}");
        }
    }
}

#[test]
fn progress_is_a_prefix_and_ends_at_the_length() {
    for parallelism in [1, 4] {
        let world = World::new(parallelism);
        world.chain();
        world.log.chunks.take();
        world.qmp("block-stream", json!({"device": "top", "job-id": "j"}));
        world.until("j", JobStatus::Null);
        let chunks = world.log.chunks.take();
        let mut at = 0;
        for (offset, bytes, _) in &chunks {
            assert_eq!(*offset, at);
            at += bytes;
        }
        assert_eq!(at, MIB);
        assert!(chunks.iter().any(|(_, _, copied)| *copied));
    }
}

#[test]
fn event_scripts() {
    let world = World::new(1);
    world.chain();
    let stream = |extra: Value| {
        let mut arguments = json!({"device": "top", "job-id": "j", "base-node": "base"});
        if let (Some(arguments), Value::Object(extra)) = (arguments.as_object_mut(), extra) {
            arguments.extend(extra);
        }
        world.log.script.take();
        world.qmp("block-stream", arguments);
    };
    let slow = || json!({"speed": 1, "auto-finalize": false, "auto-dismiss": false});

    // Hard cancel while it sleeps: the first chunk has passed.
    stream(slow());
    world.until("j", JobStatus::Running);
    world
        .memory
        .block_on(world.memory.sleep_until(world.memory.now() + 1_000_000));
    // Nothing in [0, 128 KiB) belongs to a streamed layer, which costs nothing; the next stretch is copied.
    assert_eq!(
        world.layer.job("j").expect("running").progress(),
        (256 * KIB, MIB)
    );
    world.qmp("job-cancel", json!({"id": "j"}));
    world.until("j", JobStatus::Concluded);
    assert_eq!(
        world.take_script(),
        ".created .running .aborting CANCELLED .concluded"
    );
    assert_eq!(
        world.qmp("query-jobs", json!({}))[0]["error"],
        json!("Operation canceled")
    );
    world.qmp("job-dismiss", json!({"id": "j"}));
    assert_eq!(world.take_script(), ".null");
    world.assert_clean();
    assert_eq!(world.backing_of("top").as_deref(), Some("mid"));

    // Cancel while paused by the user.
    stream(slow());
    world.qmp("job-pause", json!({"id": "j"}));
    world.until("j", JobStatus::Paused);
    world.refused("job-pause", json!({"id": "j"}), "Job is already paused");
    let text = "The block job for device 'j' is currently paused";
    world.refused("block-job-cancel", json!({"device": "j"}), text);
    world.qmp("block-job-cancel", json!({"device": "j", "force": true}));
    world.until("j", JobStatus::Concluded);
    assert_eq!(
        world.take_script(),
        ".created .running .paused .running .aborting CANCELLED .concluded"
    );
    world.qmp("block-job-dismiss", json!({"id": "j"}));

    // Pause and resume, then pending, then cancel there.
    stream(json!({"auto-finalize": false, "auto-dismiss": false}));
    world.qmp("block-job-pause", json!({"device": "j"}));
    world.until("j", JobStatus::Paused);
    world.qmp("block-job-resume", json!({"device": "j"}));
    world.until("j", JobStatus::Pending);
    world.refused(
        "job-resume",
        json!({"id": "j"}),
        "Can't resume a job that was not paused",
    );
    world.qmp("job-cancel", json!({"id": "j"}));
    assert_eq!(
        world.take_script(),
        ".created .running .paused .running .waiting .pending PENDING .aborting CANCELLED .concluded"
    );
    world.qmp("job-dismiss", json!({"id": "j"}));
    world.assert_clean();

    // Manual finalize and dismiss.
    stream(json!({"auto-finalize": false, "auto-dismiss": false}));
    world.until("j", JobStatus::Pending);
    assert_eq!(world.take_script(), ".created .running .waiting .pending PENDING");
    world.qmp("job-finalize", json!({"id": "j"}));
    assert_eq!(world.take_script(), "COMPLETED .concluded");
    // The nodes stay busy until the job is dismissed, the filter is gone.
    world.refused(
        "blockdev-del",
        json!({"node-name": "mid"}),
        "Node 'mid' is busy: block device is in use by block job: stream",
    );
    assert!(
        world
            .layer
            .nodes()
            .iter()
            .all(|node| node.facts.name != "copy-on-read")
    );
    world.qmp("job-dismiss", json!({"id": "j"}));
    world.assert_clean();

    // All automatic.
    stream(json!({}));
    world.until("j", JobStatus::Null);
    assert_eq!(
        world.take_script(),
        ".created .running .waiting .pending COMPLETED .concluded .null"
    );

    // Refused after the job came to be.
    let refusal = world.try_qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "speed": -1}),
    );
    assert_eq!(
        refusal.unwrap_err().desc,
        "Parameter 'speed' expects a non-negative value"
    );
    assert_eq!(world.take_script(), ".created .null");
    world.assert_clean();
}

#[test]
fn refusals() {
    let world = World::new(1);
    world.chain();
    world.qmp(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "other", "size": 512}),
    );
    let refused = |extra: Value, text: &str| {
        let mut arguments = json!({"device": "top", "job-id": "j"});
        if let (Some(arguments), Value::Object(extra)) = (arguments.as_object_mut(), extra) {
            arguments.extend(extra);
        }
        world.refused("block-stream", arguments, text);
    };
    refused(
        json!({"base": "a", "base-node": "b"}),
        "'base' and 'base-node' cannot be specified at the same time",
    );
    refused(
        json!({"base": "a", "bottom": "b"}),
        "'base' and 'bottom' cannot be specified at the same time",
    );
    refused(
        json!({"bottom": "a", "base-node": "b"}),
        "'bottom' and 'base-node' cannot be specified at the same time",
    );
    refused(
        json!({"device": "no"}),
        "Cannot find device='no' nor node-name='no'",
    );
    refused(json!({"base": "no"}), "Can't find 'no' in the backing chain");
    refused(
        json!({"base-node": "no"}),
        "Cannot find device='' nor node-name='no'",
    );
    refused(
        json!({"base-node": "top"}),
        "Node 'top' is not a backing image of 'top'",
    );
    refused(
        json!({"base-node": "other"}),
        "Node 'other' is not a backing image of 'top'",
    );
    refused(
        json!({"bottom": "no"}),
        "Cannot find device='' nor node-name='no'",
    );
    refused(
        json!({"bottom": "other"}),
        "Node 'other' is not in a chain starting from 'top'",
    );
    refused(
        json!({"backing-file": "x"}),
        "backing file specified, but streaming the entire chain",
    );
    refused(
        json!({"backing-file": "x", "bottom": "mid"}),
        "backing file specified, but streaming the entire chain",
    );
    refused(
        json!({"filter-node-name": "mid"}),
        "Could not create node: Duplicate nodes with node-name='mid'",
    );
    refused(
        json!({"filter-node-name": "9"}),
        "Could not create node: Invalid node-name: '9'",
    );
    refused(json!({"job-id": "9"}), "Invalid job ID '9'");

    world.qmp(
        "blockdev-add",
        json!({"driver": "copy-on-read", "node-name": "cor", "file": "top"}),
    );
    refused(
        json!({"device": "cor", "bottom": "cor"}),
        "Node 'cor' is a filter, use a non-filter node as 'bottom'",
    );
    refused(
        json!({"device": "cor", "base-node": "top"}),
        "'top' is not in the backing chain of 'cor'",
    );
    world.qmp("blockdev-del", json!({"node-name": "cor"}));
    world.assert_clean();

    // A running job: its id is taken, its nodes are busy.
    world.qmp(
        "block-stream",
        json!({"device": "mid", "job-id": "k", "speed": 1, "filter-node-name": "f"}),
    );
    world
        .memory
        .block_on(world.memory.sleep_until(world.memory.now() + 1_000_000));
    refused(
        json!({}),
        "Node 'f' is busy: block device is in use by block job: stream",
    );
    refused(
        json!({"device": "mid"}),
        "Node 'mid' is busy: block device is in use by block job: stream",
    );
    refused(
        json!({"job-id": "k", "base-node": "f"}),
        "Job ID 'k' already in use",
    );
    world.qmp("job-cancel", json!({"id": "k"}));
    world.until("k", JobStatus::Null);
    world.assert_clean();
}

#[test]
fn refusals_by_permissions_undo_everything() {
    let world = World::new(1);
    world.chain();
    // A writer on a node that would be streamed.
    let writer = json!({"type": "nbd", "id": "w", "node-name": "base", "writable": true});
    world.qmp("block-export-add", writer);
    let refusal = world
        .try_qmp("block-stream", json!({"device": "top", "job-id": "j"}))
        .unwrap_err();
    assert!(
        refusal
            .desc
            .starts_with("Permission conflict on node 'base': permissions 'write' are both required by"),
        "{refusal}"
    );
    world.qmp("block-export-del", json!({"id": "w"}));
    world.assert_clean();
}

#[test]
fn a_read_only_device_is_writable_for_the_time_of_the_job() {
    let world = World::new(1);
    world.qcow2("base", MIB, None);
    world.qcow2("mid", MIB, Some(("base", "qcow2")));
    world.qcow2("top", MIB, Some(("mid", "qcow2")));
    world.open("b", "base", json!({}));
    world.fill("b", 0, 64 * KIB, 9);
    world.qmp("blockdev-del", json!({"node-name": "b"}));
    let mid = json!({"driver": "qcow2", "node-name": "mid", "file": {"driver": "file", "filename": "mid"}});
    world.open("top", "top", json!({"backing": mid}));
    let node = world.layer.node(world.layer.find_node("mid").expect("mid"));
    assert!(!node.is_writable());
    let before = world.read_all("top");
    world.qmp(
        "block-stream",
        json!({"device": "mid", "job-id": "j", "auto-finalize": false}),
    );
    world.until("j", JobStatus::Pending);
    assert!(node.is_writable());
    world.qmp("job-finalize", json!({"id": "j"}));
    assert!(!node.is_writable());
    assert_eq!(world.backing_of("mid"), None);
    assert_eq!(world.read_all("top"), before);
    world.assert_clean();

    // One whose file is another node cannot become writable when that is not.
    world.memory.block_on(world.layer.shutdown());
    let file = json!({"driver": "file", "node-name": "file", "filename": "top", "read-only": true});
    world.qmp("blockdev-add", file);
    world.qmp(
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "ro", "file": "file", "read-only": true}),
    );
    world.refused(
        "block-stream",
        json!({"device": "ro", "job-id": "j"}),
        "Block node is read-only",
    );
    world.assert_clean();
}

#[test]
fn a_drain_parks_the_job_and_counts_its_edges() {
    let world = World::new(1);
    world.chain();
    let mid = world.layer.find_node("mid").expect("mid");
    world.memory.set_latency(10_000);
    world.qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "auto-dismiss": false}),
    );
    let job = world.layer.job("j").expect("the job");
    let drained = world.memory.block_on(world.layer.drained(mid));
    let parked = job.progress();
    world
        .memory
        .block_on(world.memory.sleep_until(world.memory.now() + 1_000_000));
    assert_eq!(job.status(), JobStatus::Paused);
    // Draining the middle drains what is above it too: its own edge, and those of the device and the filter.
    assert_eq!(job.pause_count(), 3);
    assert_eq!(job.progress(), parked);
    drop(drained);
    assert_eq!(job.pause_count(), 0);
    world.until("j", JobStatus::Concluded);
    world.qmp("job-dismiss", json!({"id": "j"}));
    world.assert_clean();
}

/// A raw base of 2 MiB, read in chunks; one read fails.
fn errors(on_error: &str, errno: Errno, times: u32) -> World {
    let world = World::new(1);
    world.memory.create_with("raw", &vec![3; 4 * HALF]);
    world.qcow2("top", 2 * MIB, Some(("raw", "raw")));
    world.open("top", "top", json!({}));
    world.fail("raw", "read", (512 * KIB, 513 * KIB), errno, times);
    world.log.script.take();
    world.qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "on-error": on_error, "auto-dismiss": false}),
    );
    world
}

#[test]
fn error_policies() {
    let info = |world: &World| world.qmp("query-block-jobs", json!({}))[0].clone();
    for (policy, errno) in [
        ("report", Errno::EIO),
        ("enospc", Errno::EIO),
        ("auto", Errno::EIO),
    ] {
        let world = errors(policy, errno, 1);
        world.until("j", JobStatus::Concluded);
        assert_eq!(
            world.take_script(),
            ".created .running ERROR(report) .aborting COMPLETED(error) .concluded"
        );
        assert_eq!(info(&world)["offset"], json!(524_288), "{policy}");
        assert_eq!(info(&world)["error"], json!("Input/output error"));
        assert!(world.backing_of("top").is_some());
    }
    // Ignored: it goes on to the end, fails there, and the chain stays.
    let world = errors("ignore", Errno::EIO, 1);
    world.until("j", JobStatus::Concluded);
    assert_eq!(
        world.take_script(),
        ".created .running ERROR(ignore) .aborting COMPLETED(error) .concluded"
    );
    assert_eq!(info(&world)["offset"], json!(2 * MIB));
    assert!(world.backing_of("top").is_some());
    assert_eq!(world.read_all("top"), vec![3; 4 * HALF]);
    // Stopped: it stands at the failed chunk and retries it.
    for (policy, errno, status) in [
        ("stop", Errno::EIO, "failed"),
        ("enospc", Errno::ENOSPC, "nospace"),
    ] {
        let world = errors(policy, errno, 1);
        world.until("j", JobStatus::Paused);
        assert_eq!(info(&world)["offset"], json!(524_288));
        assert_eq!(info(&world)["io-status"], json!(status));
        world.qmp("block-job-resume", json!({"device": "j"}));
        assert_eq!(info(&world)["io-status"], json!("ok"));
        world.until("j", JobStatus::Concluded);
        let script = ".created .running ERROR(stop) .paused .running .waiting .pending COMPLETED .concluded";
        assert_eq!(world.take_script(), script);
        assert_eq!(info(&world)["offset"], json!(2 * MIB));
        assert_eq!(world.read_all("top"), vec![3; 4 * HALF]);
    }
}

#[test]
fn with_several_in_flight_the_first_error_by_offset_counts() {
    let world = World::new(4);
    world.memory.create_with("raw", &vec![3; 16 * MIB as usize]);
    world.qcow2("top", 16 * MIB, Some(("raw", "raw")));
    world.open("top", "top", json!({}));
    world.memory.set_latency(1000);
    world.fail("raw", "read", (4 * MIB, 4 * MIB + 1), Errno::ENOSPC, 1);
    world.fail("raw", "read", (6 * MIB, 6 * MIB + 1), Errno::EIO, 1);
    world.qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "auto-dismiss": false}),
    );
    world.until("j", JobStatus::Concluded);
    let info = world.qmp("query-jobs", json!({}))[0].clone();
    assert_eq!(info["error"], json!("No space left on device"));
    assert_eq!(info["current-progress"], json!(4 * MIB));
}

#[test]
fn zeroes_past_a_short_layer_stay_zeroes() {
    for parallelism in [1, 2] {
        let world = World::new(parallelism);
        world.memory.create_with("base", &vec![9; 4 * HALF]);
        world.qcow2("mid", MIB, Some(("base", "raw")));
        world.qcow2("top", 2 * MIB, Some(("mid", "qcow2")));
        world.open("top", "top", json!({}));
        let before = world.read_all("top");
        assert_eq!(before[2 * HALF..], vec![0; 2 * HALF]);
        world.qmp(
            "block-stream",
            json!({"device": "top", "job-id": "j", "base": "base"}),
        );
        world.until("j", JobStatus::Null);
        assert_eq!(
            world.header_of("top"),
            Some(("base".to_owned(), Some("raw".to_owned())))
        );
        assert_eq!(world.read_all("top"), before);
        world.assert_clean();
    }
}

#[test]
fn the_device_is_flushed_before_and_after_its_header_changes() {
    let world = World::new(1);
    world.chain();
    world.faults.log.take();
    world.qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "base-node": "base"}),
    );
    world.until("j", JobStatus::Null);
    let log = world.faults.log.take();
    let of_top = |op: &'static str| {
        let hits = log
            .iter()
            .enumerate()
            .filter(move |(_, (file, what, _))| file == "top" && *what == op);
        hits.map(|(at, _)| at)
    };
    let header = log
        .iter()
        .rposition(|(file, op, offset)| file == "top" && *op == "write" && *offset == 0)
        .expect("the header is written");
    let last_data = of_top("write")
        .filter(|at| *at < header)
        .max()
        .expect("data was copied");
    assert!(
        of_top("flush").any(|at| at > last_data && at < header),
        "flushed before the header: {log:?}"
    );
    assert!(
        of_top("flush").any(|at| at > header),
        "flushed after the header: {log:?}"
    );
}

#[test]
fn a_failed_completion_leaves_the_chain_as_it_was() {
    for (op, range) in [("write", (0, 1)), ("flush", (0, 1))] {
        let world = World::new(1);
        world.chain();
        let before = world.read_all("top");
        let arguments = json!({"device": "top", "job-id": "j", "base-node": "base", "auto-finalize": false});
        world.qmp("block-stream", arguments);
        world.until("j", JobStatus::Pending);
        world.fail("top", op, range, Errno::EIO, u32::MAX);
        world.log.script.take();
        world.qmp("job-finalize", json!({"id": "j"}));
        assert_eq!(
            world.take_script(),
            ".aborting COMPLETED(error) .concluded .null",
            "{op}"
        );
        assert_eq!(world.backing_of("top").as_deref(), Some("mid"), "{op}");
        assert_eq!(
            world.header_of("top").map(|(file, _)| file).as_deref(),
            Some("mid"),
            "{op}"
        );
        world.faults.rules.borrow_mut().clear();
        assert_eq!(world.read_all("top"), before, "{op}");
        world.assert_clean();
    }
}

#[test]
fn nodes_without_backing_stream_to_nothing() {
    let world = World::new(1);
    world.qmp(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "n", "size": MIB, "read-zeroes": true}),
    );
    world.log.script.take();
    world.qmp("block-stream", json!({"device": "n", "job-id": "j"}));
    world.until("j", JobStatus::Null);
    assert_eq!(
        world.take_script(),
        ".created .running .waiting .pending COMPLETED .concluded .null"
    );
    world.assert_clean();
}

#[test]
fn guests_write_while_the_job_runs() {
    for parallelism in [1, 4] {
        let world = World::new(parallelism);
        world.chain();
        world.memory.set_latency(5000);
        let mut expected = world.read_all("top");
        world.qmp(
            "block-export-add",
            json!({"type": "nbd", "id": "g", "node-name": "top", "writable": true}),
        );
        world.qmp(
            "block-stream",
            json!({"device": "top", "job-id": "j", "base-node": "base"}),
        );
        let guest = world.layer.export("g").expect("an export");
        world.memory.block_on(async {
            for (at, byte) in [(0, 1), (130, 2), (300, 3), (510, 4), (700, 5), (1000, 6)] {
                let (offset, data) = (at * 1000 / 512 * 512, [byte; 1024]);
                guest
                    .write(offset, &data, ReqFlags::empty())
                    .await
                    .expect("written");
                let offset = usize::try_from(offset).expect("small");
                expected[offset..offset + 1024].copy_from_slice(&data);
            }
        });
        world.until("j", JobStatus::Null);
        assert_eq!(world.backing_of("top").as_deref(), Some("base"));
        assert_eq!(world.read_all("top"), expected);
        world.assert_clean();
    }
}

#[test]
fn shutdown_in_the_middle_leaves_nothing() {
    let world = World::new(1);
    world.chain();
    world.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "g", "node-name": "top", "writable": true}),
    );
    world.qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "speed": 1, "auto-dismiss": false}),
    );
    world.memory.block_on(world.layer.shutdown());
    let view = world.layer.inspect();
    assert!(
        view.nodes.is_empty() && view.edges.is_empty() && view.backends.is_empty(),
        "{view:?}"
    );
    world.assert_clean();
    assert!(world.layer.export("g").is_none());
}

#[test]
fn a_layer_dropped_in_the_middle_of_a_job_is_freed() {
    let world = World::new(1);
    world.chain();
    world.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "g", "node-name": "top", "writable": true}),
    );
    world.qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "auto-finalize": false, "auto-dismiss": false}),
    );
    world.until("j", JobStatus::Pending);
    let weak = Rc::downgrade(&world.layer.inner);
    drop(world);
    assert!(weak.upgrade().is_none(), "the layer owns itself");
}
