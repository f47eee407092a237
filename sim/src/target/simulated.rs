//! The layer over the simulated disk, on the deterministic executor.
//!
//! Rules: reset in place; between runs only the layer and its tasks are dropped. After a panic of the subject
//! everything that it may have broken is dropped too.

use std::cell::RefCell;
use std::rc::Rc;

use blkcheck_impl::Layer;
use blkcheck_impl::env::Env;
use blkcheck_impl::error::Errno;
use blkcheck_impl::event::{Event, Observer};
use blkcheck_impl::io::backend::Backend;
use blkcheck_impl::types::{NodeId, Perm, ReqFlags, StatusFlags};
use serde_json::Value;

use super::faults::{Ordered, failed};
use super::{Alternatives, Capabilities, ClosedFile, Leftovers, Move, NodeContent, Target, Trouble};
use crate::choice::Key;
use crate::disk::{Disk, DiskOptions, Op, Remains};
use crate::env::SimEnv;
use crate::exec::{Clock, Executor, Polled, Spawner};
use crate::history::{Outcome, Record, Refusal, StatusRun, StepId};
use crate::image::build::{build, raw_data};
use crate::panics;
use crate::scenario::{Action, Format, GuestOp, Range, Scenario};
use crate::stamp::{self, Source};

/// Steps after which an orderly close counts as hung.
const CLOSE_LIMIT: u32 = 2_000_000;

/// Records in program order, shared by the observer and the tasks.
#[derive(Clone, Debug, Default)]
struct Sink {
    records: Rc<RefCell<Vec<Record>>>,
}

impl Observer for Sink {
    fn event(&self, event: &Event) {
        self.records.borrow_mut().push(Record::Layer(event.clone()));
    }
}

impl Sink {
    fn ended(&self, step: StepId, outcome: Outcome) {
        self.records.borrow_mut().push(Record::Ended(step, outcome));
    }
}

/// An open drained section: who began it, on which name.
struct Section {
    actor: Rc<str>,
    node: Rc<str>,
    /// Ends the section when dropped.
    _guard: Box<dyn std::any::Any>,
}

/// Storage that completes requests by itself, when a target runs over some ([`super::RealTarget`]).
pub(super) trait Outside {
    /// Requests are under way.
    fn pending(&self) -> bool;
    /// Waits until one may have completed. Its task is then ready.
    fn wait(&self);
}

/// The target.
pub struct SimTarget {
    exec: Executor,
    disk: Disk,
    sink: Sink,
    layer: Option<Layer>,
    sections: Rc<RefCell<Vec<Section>>>,
    files: Vec<(String, Format)>,
    outside: Option<Rc<dyn Outside>>,
    ordered: Ordered,
}

impl std::fmt::Debug for SimTarget {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "SimTarget({:?})", self.exec)
    }
}

impl Default for SimTarget {
    fn default() -> SimTarget {
        SimTarget::new()
    }
}

impl SimTarget {
    /// Ready for [`Target::prepare`].
    #[must_use]
    pub fn new() -> SimTarget {
        panics::silence();
        let exec = Executor::new();
        SimTarget {
            disk: Disk::owned(exec.owners()),
            exec,
            sink: Sink::default(),
            layer: None,
            sections: Rc::default(),
            files: Vec::new(),
            outside: None,
            ordered: Ordered::default(),
        }
    }

    /// Starts an empty layer over another world than the simulated one.
    pub(super) fn start_over(
        &mut self,
        outside: Rc<dyn Outside>,
        env: impl FnOnce(Clock, Spawner) -> Rc<dyn Env>,
    ) {
        self.clear();
        self.files.clear();
        self.ordered = Ordered::default();
        self.outside = Some(outside);
        let env = env(self.exec.clock(), self.exec.spawner());
        self.layer = Some(Layer::new(env, Some(Rc::new(self.sink.clone()))));
    }

    /// The disk; for tests that look at it or damage it.
    #[must_use]
    pub fn disk(&self) -> &Disk {
        &self.disk
    }

    fn started(&self) -> &Layer {
        self.layer.as_ref().expect("prepared")
    }

    /// Drops the last run's subject. Its destructors may panic once something else did.
    fn clear(&mut self) {
        let sections = Rc::clone(&self.sections);
        let layer = self.layer.take();
        let exec = &mut self.exec;
        let drop_all = std::panic::AssertUnwindSafe(|| {
            sections.take();
            exec.reset();
            drop(layer);
        });
        let (_, _) = panics::catch(|| std::panic::catch_unwind(drop_all));
        // What the destructors woke or told belongs to nobody.
        self.exec.reset();
        self.sink.records.borrow_mut().clear();
    }

    /// Runs everything in order until `done`.
    fn run_until(&mut self, what: &'static str, done: &RefCell<bool>) -> Result<(), Trouble> {
        for _ in 0..CLOSE_LIMIT {
            if *done.borrow() {
                return Ok(());
            }
            let can = self.alternatives();
            let next = match can {
                Alternatives { ready: 1.., .. } => Move::Ready(0),
                Alternatives { storage: 1.., .. } => Move::Storage(0),
                Alternatives { external: true, .. } => Move::External,
                Alternatives { timer: true, .. } => Move::Timer,
                _ => return Err(Trouble::Stuck(what)),
            };
            self.advance(next)?;
        }
        Err(Trouble::Stuck(what))
    }

    fn guest(&self, export: &str, op: GuestOp, grain: u32, step: StepId) {
        let Some(backend) = self.started().export(export) else {
            return self.sink.ended(step, Outcome::NoExport);
        };
        let sink = self.sink.clone();
        let task = async move {
            let outcome = guest(&backend, op, grain, step).await;
            sink.ended(step, outcome);
        };
        self.exec.spawner().spawn("guest request", Box::pin(task));
    }

    fn command(&self, execute: &str, arguments: &serde_json::Map<String, Value>, step: StepId) {
        let (layer, sink) = (self.started().clone(), self.sink.clone());
        let (execute, arguments) = (execute.to_owned(), Value::Object(arguments.clone()));
        let task = async move {
            let result = layer.execute(&execute, &arguments).await;
            let refusal = |e: blkcheck_impl::error::QmpError| Refusal {
                class: e.class.name().into(),
                desc: e.desc,
            };
            sink.ended(step, Outcome::Command(result.map_err(refusal)));
        };
        self.exec.spawner().spawn("command", Box::pin(task));
    }

    fn drain_begin(&self, actor: &str, node: &str, step: StepId) {
        let layer = self.started().clone();
        let (sink, sections) = (self.sink.clone(), Rc::clone(&self.sections));
        let (actor, node): (_, Rc<str>) = (Rc::from(actor), Rc::from(node));
        let task = async move {
            // Looked up here: the node may go away between the step and the first turn of its task.
            let Some(id) = layer.find_node(&node) else {
                return sink.ended(step, Outcome::NoNode);
            };
            let guard = layer.drained(id).await;
            sections.borrow_mut().push(Section {
                actor,
                node,
                _guard: Box::new(guard),
            });
            sink.ended(step, Outcome::Passed);
        };
        self.exec.spawner().spawn("drained section", Box::pin(task));
    }

    fn drain_end(&mut self, actor: &str, node: &str, step: StepId) {
        let found = {
            let mut sections = self.sections.borrow_mut();
            let at = sections
                .iter()
                .rposition(|s| &*s.actor == actor && &*s.node == node);
            at.map(|at| sections.remove(at))
        };
        let Some(section) = found else {
            return self.sink.ended(step, Outcome::NoNode);
        };
        // Requests that were parked are woken here.
        self.exec.enter(|| drop(section));
        self.sink.ended(step, Outcome::Passed);
    }
}

impl Target for SimTarget {
    fn capabilities(&self) -> Capabilities {
        Capabilities {
            drain: true,
            events: true,
            deterministic: true,
            block_status: true,
            disk_options: true,
            power_cut: true,
        }
    }

    fn prepare(&mut self, scenario: &Scenario) -> Result<(), Trouble> {
        self.clear();
        let disk = scenario.disk;
        self.disk.reset(DiskOptions {
            alignment: u64::from(disk.alignment),
            unmap: disk.unmap,
            power: disk.power_cut.is_some(),
        });
        self.files.clear();
        self.ordered = Ordered::new(disk.faults);
        for (index, image) in (0..).zip(&scenario.images) {
            let file = self
                .disk
                .create(&image.file, |out| build(image, index, scenario.grain, out));
            if image.format == Format::Raw {
                self.disk.keep_only(file, raw_data(image));
            }
            self.files.push((image.file.clone(), image.format));
        }
        let env = SimEnv {
            disk: self.disk.clone(),
            clock: self.exec.clock(),
            spawner: self.exec.spawner(),
            job_parallelism: disk.job_parallelism as usize,
        };
        self.layer = Some(Layer::new(Rc::new(env), Some(Rc::new(self.sink.clone()))));
        Ok(())
    }

    fn issue(&mut self, scenario: &Scenario, step: StepId) {
        self.exec.owners().enter(Some(step));
        let entry = &scenario.steps[step.0 as usize];
        match &entry.action {
            Action::Command { execute, arguments } => self.command(execute, arguments, step),
            Action::Guest { export, op } => self.guest(export, *op, scenario.grain, step),
            Action::DrainBegin { node } => self.drain_begin(&entry.actor, node, step),
            Action::DrainEnd { node } => self.drain_end(&entry.actor, node, step),
            Action::WaitJob { .. } | Action::Settle { .. } => unreachable!("the runner waits itself"),
        }
    }

    #[inline]
    fn alternatives(&mut self) -> Alternatives {
        Alternatives {
            ready: u32::try_from(self.exec.ready()).expect("few tasks"),
            storage: u32::try_from(self.disk.pending()).expect("few requests"),
            timer: self.exec.clock().has_timers(),
            external: self.outside.as_ref().is_some_and(|outside| outside.pending()),
        }
    }

    fn keys(&self, into: &mut Vec<Key>) {
        into.extend((0..self.exec.ready_len()).map(|i| self.exec.ready_key(i)));
        into.extend((0..self.disk.pending()).map(|i| self.disk.pending_key(i)));
    }

    #[inline]
    fn advance(&mut self, next: Move) -> Result<(), Trouble> {
        match next {
            Move::Ready(i) => {
                let polled = panics::quietly(|| self.exec.poll(i as usize));
                if let Polled::Panicked(_) = polled {
                    return Err(Trouble::Panicked(panics::take_report().expect("the hook saw it")));
                }
            }
            Move::Storage(i) => {
                let disk = self.disk.clone();
                self.exec.enter(|| disk.complete(i as usize));
            }
            Move::Timer => {
                self.exec.advance_time();
            }
            Move::External => self.outside.as_ref().expect("only then is it offered").wait(),
        }
        Ok(())
    }

    fn endings(&mut self, storage: u32) -> u32 {
        // Files are created in the order of the images.
        let (file, op) = self.disk.pending_op(storage as usize);
        self.ordered.endings(file.0, op)
    }

    fn is_flush(&mut self, storage: u32) -> bool {
        self.disk.pending_op(storage as usize).1 == Op::Flush
    }

    fn fail(&mut self, storage: u32, ending: u32) {
        let disk = self.disk.clone();
        let (file, op) = disk.pending_op(storage as usize);
        let bad = self.exec.enter(|| disk.fail(storage as usize, ending));
        let fault = Record::Fault(failed(file.0, op, bad));
        self.sink.records.borrow_mut().push(fault);
    }

    #[inline]
    fn take_records(&mut self, into: &mut Vec<Record>) {
        into.append(&mut self.sink.records.borrow_mut());
    }

    fn layer(&self) -> Option<&Layer> {
        self.layer.as_ref()
    }

    fn contents(&mut self) -> Result<Vec<NodeContent>, Trouble> {
        let layer = self.started().clone();
        let (done, out) = (Rc::new(RefCell::new(false)), Rc::new(RefCell::new(Vec::new())));
        let (task_done, task_out) = (Rc::clone(&done), Rc::clone(&out));
        let task = async move {
            *task_out.borrow_mut() = read_all(&layer).await;
            *task_done.borrow_mut() = true;
        };
        self.exec.owners().enter(None);
        self.exec.spawn("final reads", Box::pin(task));
        self.run_until("the final reads", &done)?;
        Ok(out.take())
    }

    fn close(&mut self) -> Result<Leftovers, Trouble> {
        let layer = self.started().clone();
        let done = Rc::new(RefCell::new(false));
        let task_done = Rc::clone(&done);
        let shut = layer.clone();
        let task = async move {
            shut.shutdown().await;
            *task_done.borrow_mut() = true;
        };
        self.exec.owners().enter(None);
        self.exec.spawn("shutdown", Box::pin(task));
        self.run_until("the shutdown", &done)?;
        // Tasks that only have to notice that it is over may do so.
        while self.exec.ready() > 0 {
            self.advance(Move::Ready(0))?;
        }
        let view = layer.inspect();
        let mut graph: Vec<String> = view.nodes.iter().map(|n| format!("node {}", n.name)).collect();
        graph.extend(
            view.edges
                .iter()
                .map(|e| format!("edge {} of {:?}", e.name, e.parent)),
        );
        let handles = self.disk.open_handles();
        let mut storage: Vec<String> = (0..handles.min(1))
            .map(|_| format!("{handles} open handles"))
            .collect();
        storage.extend(
            self.disk
                .describe_pending()
                .iter()
                .map(|r| format!("{:?} on {}", r.op, r.file)),
        );
        let tasks = self.exec.tasks().into_iter().map(|(_, name)| name).collect();
        Ok(Leftovers {
            tasks,
            storage,
            graph,
        })
    }

    fn power_cut(&mut self, choose: &mut dyn FnMut(u32) -> u32) -> Vec<(ClosedFile, Remains)> {
        let mut left = self.disk.power_cut(choose);
        let mut files = Vec::with_capacity(left.len());
        for (name, format) in &self.files {
            let file = self.disk.find(name).expect("files are never deleted");
            let at = left.iter().position(|(id, _)| *id == file);
            let (_, mut remains) = left.swap_remove(at.expect("every file has remains"));
            let closed = ClosedFile {
                name: name.clone(),
                format: *format,
                bytes: std::mem::take(&mut remains.bytes),
                contested: self.disk.contested(file),
            };
            files.push((closed, remains));
        }
        files
    }

    fn closed_files(&mut self) -> Vec<ClosedFile> {
        let closed = |(name, format): &(String, Format)| {
            let file = self.disk.find(name).expect("files are never deleted");
            let bytes = self.disk.with_bytes(file, <[u8]>::to_vec);
            ClosedFile {
                name: name.clone(),
                format: *format,
                bytes,
                contested: self.disk.contested(file),
            }
        };
        self.files.iter().map(closed).collect()
    }

    fn describe(&self) -> Vec<String> {
        let tasks = self
            .exec
            .tasks()
            .into_iter()
            .map(|(number, name)| format!("task {number}: {name}"));
        let requests = self.disk.describe_pending();
        tasks
            .chain(
                requests
                    .into_iter()
                    .map(|r| format!("storage request {:?} on {}", r.op, r.file)),
            )
            .collect()
    }
}

fn errno(result: Result<(), Errno>) -> Outcome {
    Outcome::Done(result.map_err(|e| e.0))
}

fn buffer(range: Range) -> Vec<u8> {
    vec![0; usize::try_from(range.length).expect("validated")]
}

async fn guest(backend: &Backend, op: GuestOp, grain: u32, step: StepId) -> Outcome {
    match op {
        GuestOp::Read(range) => {
            let mut buf = buffer(range);
            let result = backend.read(range.offset, &mut buf).await;
            Outcome::Read(result.map(|()| buf.into()).map_err(|e| e.0))
        }
        GuestOp::Write(range) => write(backend, range, grain, step, ReqFlags::empty()).await,
        GuestOp::WriteFua(range) => write(backend, range, grain, step, ReqFlags::FUA).await,
        GuestOp::WriteZeroes(range) => errno(
            backend
                .write_zeroes(range.offset, range.length, ReqFlags::empty())
                .await,
        ),
        GuestOp::WriteZeroesUnmap(range) => errno(
            backend
                .write_zeroes(range.offset, range.length, ReqFlags::MAY_UNMAP)
                .await,
        ),
        GuestOp::Discard(range) => errno(backend.discard(range.offset, range.length).await),
        GuestOp::Flush => errno(backend.flush().await),
        GuestOp::BlockStatus(range) => Outcome::Status(status(backend, range).await.map_err(|e| e.0)),
    }
}

async fn write(backend: &Backend, range: Range, grain: u32, step: StepId, flags: ReqFlags) -> Outcome {
    let mut buf = buffer(range);
    stamp::fill(&mut buf, range.offset, grain, Source::Step(step));
    errno(backend.write(range.offset, &buf, flags).await)
}

/// Answers until the range is covered. A status that makes no progress ends the list; the oracle sees the gap.
async fn status(backend: &Backend, range: Range) -> Result<Vec<StatusRun>, Errno> {
    let mut runs = Vec::new();
    let (mut at, end) = (range.offset, range.offset + range.length);
    while at < end {
        let answer = backend.block_status(at, end - at).await?;
        let shown = StatusFlags::DATA
            | StatusFlags::ZERO
            | StatusFlags::OFFSET_VALID
            | StatusFlags::ALLOCATED
            | StatusFlags::COMPRESSED;
        runs.push(StatusRun {
            flags: (answer.flags & shown).bits(),
            bytes: answer.pnum,
            depth: answer.depth,
        });
        if answer.pnum == 0 {
            break;
        }
        at += answer.pnum;
    }
    Ok(runs)
}

/// Reads every node but the protocol ones below a format, in full. Allocation comes first: reading through
/// copy-on-read changes it.
async fn read_all(layer: &Layer) -> Vec<NodeContent> {
    let main = layer.main("final reads").await;
    let view = layer.inspect();
    let mut found: Vec<(NodeId, NodeContent)> = Vec::new();
    for node in view
        .nodes
        .iter()
        .filter(|n| n.open && (!is_protocol(n.driver) || n.parents.is_empty()))
    {
        let allocated = allocation(layer, node.id, node.length).await;
        let zeroes = own_zeroes(layer, node.id, node.length).await;
        found.push((
            node.id,
            NodeContent {
                name: node.name.to_string(),
                bytes: Vec::new(),
                allocated,
                zeroes,
            },
        ));
    }
    for (id, content) in &mut found {
        let Ok(backend) = Backend::new(layer, *id, None, Perm::CONSISTENT_READ, Perm::all(), true) else {
            continue;
        };
        let mut bytes =
            vec![0; usize::try_from(backend.length().unwrap_or(0)).expect("simulated disks are small")];
        if backend.read(0, &mut bytes).await.is_ok() {
            content.bytes = bytes;
        }
        backend.remove().await;
    }
    layer.reap().await;
    drop(main);
    // A node that could not be read (a null-co of a terabyte, an error) is not evidence of anything.
    found
        .into_iter()
        .map(|(_, content)| content)
        .filter(|c| !c.bytes.is_empty())
        .collect()
}

/// What a layer's own answer calls zeroes; a filter has none of its own.
async fn own_zeroes(layer: &Layer, node: NodeId, length: u64) -> Vec<(u64, u64)> {
    let mut zeroes = Vec::new();
    let mut at = 0;
    let below = layer.filter_or_cow(node);
    while at < length {
        let Ok(status) = layer.block_status_above(node, below, at, length - at).await else {
            break;
        };
        if status.pnum == 0 {
            break;
        }
        if status.flags.contains(StatusFlags::ZERO) {
            zeroes.push((at, status.pnum));
        }
        at += status.pnum;
    }
    zeroes
}

fn is_protocol(driver: &str) -> bool {
    matches!(driver, "file" | "host_device" | "null-co")
}

async fn allocation(layer: &Layer, node: NodeId, length: u64) -> Vec<(u64, bool)> {
    let mut runs: Vec<(u64, bool)> = Vec::new();
    let mut at = 0;
    while at < length {
        let Ok((allocated, bytes)) = layer.is_allocated(node, at, length - at).await else {
            break;
        };
        if bytes == 0 {
            break;
        }
        match runs.last_mut() {
            Some((run, same)) if *same == allocated => *run += bytes,
            _ => runs.push((bytes, allocated)),
        }
        at += bytes;
    }
    runs
}
