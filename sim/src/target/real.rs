//! The layer over real files or loop devices: the simulator's tasks and oracles, the kernel's storage.
//!
//! Tasks are ordered by the runner as in simulation; storage requests all go through the engine (never inline), so that
//! they complete later and in an order that is the kernel's, and others run in between. Hence not deterministic.
//!
//! Rules: a scenario reaches its own images and nothing else of this machine: names are looked up among them, never in
//! the file system. With [`Medium::Loop`] each image is the content of a loop device with room to grow, and `file`
//! drivers in commands become `host_device`. After shutdown `qemu-img check` judges every qcow2 image and `qemu-img
//! compare` its guest content against the independent reader's; without qemu-img the run says once that nobody did.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::process::Command;
use std::rc::Rc;
use std::sync::Once;
use std::time::{Duration, Instant};

use blkcheck_impl::Layer;
use blkcheck_impl::env::{Env, Extent, Fut, Nanos, OpenStorage, Storage, StorageLimits};
use blkcheck_impl::error::{Errno, QmpError};
use blkcheck_impl::real::{RealEnv, RealOptions};
use serde_json::{Map, Value};

use super::loopdev::{LoopDevice, LoopError, Scratch, available, devices_over};
use super::ranges::Ranges;
use super::simulated::Outside;
use super::{
    Alternatives, Capabilities, ClosedFile, Leftovers, Move, NodeContent, SimTarget, Target, Trouble,
};
use crate::choice::Key;
use crate::exec::{Clock, Spawner};
use crate::history::{Record, StepId};
use crate::image::build::{build, raw_data};
use crate::oracle::{OracleName, Violation};
use crate::scenario::{Action, Format, Image, Scenario};

/// A single request that takes longer than this never ends.
const REQUEST_LIMIT: Duration = Duration::from_secs(60);
/// How long a device may take to detach after its last user is gone.
const DETACH_LIMIT: Duration = Duration::from_secs(10);

/// What the images are on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Medium {
    /// Files in a private directory.
    File,
    /// A loop device per image. Needs root.
    Loop,
}

/// What one image file is to the world.
#[derive(Debug)]
struct Entry {
    name: String,
    format: Format,
    /// What to open for it, absolute.
    path: String,
    writers: Rc<Cell<u32>>,
    /// Two writers at once have been seen.
    contested: Rc<Cell<bool>>,
    /// Of all its handles together.
    ranges: Ranges,
}

/// Counters shared by everything of one run.
#[derive(Debug, Default)]
struct Traffic {
    pending: Cell<u32>,
    handles: Cell<u32>,
}

/// The target.
#[derive(Debug)]
pub struct RealTarget {
    inner: SimTarget,
    real: RealEnv,
    medium: Medium,
    scratch: Scratch,
    entries: Rc<RefCell<Vec<Entry>>>,
    devices: Vec<LoopDevice>,
    traffic: Rc<Traffic>,
    stuck: Rc<Cell<bool>>,
}

/// Adds one to a counter for as long as it lives.
struct Counted(Rc<Traffic>, fn(&Traffic) -> &Cell<u32>);

impl Counted {
    fn new(traffic: &Rc<Traffic>, of: fn(&Traffic) -> &Cell<u32>) -> Counted {
        of(traffic).update(|n| n + 1);
        Counted(Rc::clone(traffic), of)
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.1(&self.0).update(|n| n - 1);
    }
}

struct Kernel {
    real: RealEnv,
    traffic: Rc<Traffic>,
    stuck: Rc<Cell<bool>>,
    /// Since when nothing has completed, and how many were pending then.
    waiting: Cell<Option<(Instant, u32)>>,
}

impl Outside for Kernel {
    fn pending(&self) -> bool {
        self.traffic.pending.get() > 0 && !self.stuck.get()
    }

    #[expect(clippy::disallowed_methods, reason = "how long the kernel takes is real time")]
    fn wait(&self) {
        self.real.drive(Duration::from_millis(100));
        let pending = self.traffic.pending.get();
        match self.waiting.get() {
            Some((since, before)) if before == pending => self.stuck.set(since.elapsed() > REQUEST_LIMIT),
            _ => self.waiting.set(Some((Instant::now(), pending))),
        }
    }
}

/// The world of one run.
struct World {
    real: RealEnv,
    clock: Clock,
    spawner: Spawner,
    entries: Rc<RefCell<Vec<Entry>>>,
    traffic: Rc<Traffic>,
    job_parallelism: usize,
    medium: Medium,
}

impl Env for World {
    fn open(&self, open: &OpenStorage<'_>) -> Result<Rc<dyn Storage>, QmpError> {
        let entries = self.entries.borrow();
        let Some(entry) = entries.iter().find(|e| e.name == open.filename) else {
            return Err(QmpError::errno(
                &format!("Could not open '{}'", open.filename),
                Errno::ENOENT,
            ));
        };
        let inner = self
            .real
            .open(&OpenStorage {
                filename: &entry.path,
                ..open.clone()
            })
            .map_err(|refusal| {
                // The user named the image, not what stands for it here.
                QmpError {
                    desc: refusal.desc.replace(&entry.path, &entry.name),
                    ..refusal
                }
            })?;
        let file = Handle {
            inner,
            ranges: entry.ranges.clone(),
            writing: Cell::new(false),
            writers: Rc::clone(&entry.writers),
            contested: Rc::clone(&entry.contested),
            _count: Counted::new(&self.traffic, |t| &t.handles),
            traffic: Rc::clone(&self.traffic),
        };
        file.count_writer(open.writable);
        Ok(Rc::new(file))
    }

    fn is_device(&self, filename: &str) -> bool {
        self.medium == Medium::Loop && self.entries.borrow().iter().any(|e| e.name == filename)
    }

    fn now(&self) -> Nanos {
        self.clock.now()
    }

    fn sleep_until(&self, deadline: Nanos) -> Fut<'static, ()> {
        Box::pin(self.clock.sleep_until(deadline))
    }

    fn spawn(&self, name: &'static str, task: Fut<'static, ()>) {
        self.spawner.spawn(name, task);
    }

    fn job_parallelism(&self) -> usize {
        self.job_parallelism
    }
}

/// An open image that counts what is under way.
struct Handle {
    inner: Rc<dyn Storage>,
    ranges: Ranges,
    writing: Cell<bool>,
    writers: Rc<Cell<u32>>,
    contested: Rc<Cell<bool>>,
    _count: Counted,
    traffic: Rc<Traffic>,
}

impl std::fmt::Debug for Handle {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.inner.fmt(f)
    }
}

impl Handle {
    fn count_writer(&self, writing: bool) {
        match (self.writing.replace(writing), writing) {
            (false, true) => self.writers.update(|n| n + 1),
            (true, false) => self.writers.update(|n| n - 1),
            _ => {}
        }
        if self.writers.get() > 1 {
            self.contested.set(true);
        }
    }

    fn counted<'a, T: 'a>(&'a self, bytes: Range<u64>, write: bool, request: Fut<'a, T>) -> Fut<'a, T> {
        Box::pin(async move {
            let _in_use = self.ranges.take(bytes, write).await;
            let _under_way = Counted::new(&self.traffic, |t| &t.pending);
            request.await
        })
    }
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.count_writer(false);
    }
}

impl Storage for Handle {
    fn read<'a>(&'a self, offset: u64, buf: &'a mut [u8]) -> Fut<'a, Result<usize, Errno>> {
        self.counted(
            offset..offset + buf.len() as u64,
            false,
            self.inner.read(offset, buf),
        )
    }
    fn write<'a>(&'a self, offset: u64, buf: &'a [u8]) -> Fut<'a, Result<(), Errno>> {
        self.counted(
            offset..offset + buf.len() as u64,
            true,
            self.inner.write(offset, buf),
        )
    }
    fn flush(&self) -> Fut<'_, Result<(), Errno>> {
        self.counted(0..0, false, self.inner.flush())
    }
    fn write_zeroes(&self, offset: u64, bytes: u64, may_unmap: bool) -> Fut<'_, Result<(), Errno>> {
        self.counted(
            offset..offset + bytes,
            true,
            self.inner.write_zeroes(offset, bytes, may_unmap),
        )
    }
    fn discard(&self, offset: u64, bytes: u64) -> Fut<'_, Result<(), Errno>> {
        self.counted(offset..offset + bytes, true, self.inner.discard(offset, bytes))
    }
    fn truncate(&self, length: u64) -> Fut<'_, Result<(), Errno>> {
        self.counted(0..u64::MAX, true, self.inner.truncate(length))
    }
    fn length(&self) -> Result<u64, Errno> {
        self.inner.length()
    }
    fn extent(&self, offset: u64) -> Result<Extent, Errno> {
        self.inner.extent(offset)
    }
    fn limits(&self) -> StorageLimits {
        self.inner.limits()
    }
    fn set_writable(&self, writable: bool) -> Result<(), Errno> {
        self.inner.set_writable(writable)?;
        self.count_writer(writable);
        Ok(())
    }
    fn copy_from<'a>(
        &'a self,
        source: &'a dyn Storage,
        source_offset: u64,
        offset: u64,
        bytes: u64,
    ) -> Fut<'a, Result<(), Errno>> {
        Box::pin(async move {
            let source = source.as_any().downcast_ref::<Handle>().ok_or(Errno::ENOTSUP)?;
            let (from, to) = (source_offset..source_offset + bytes, offset..offset + bytes);
            // Source first, always: a source is below its target, so no two copies wait for each other.
            let _read = source.ranges.take(from, false).await;
            self.counted(
                to,
                true,
                self.inner.copy_from(&*source.inner, source_offset, offset, bytes),
            )
            .await
        })
    }
    fn as_any(&self) -> &dyn std::any::Any {
        self
    }
}

fn unusable(what: &str) -> impl FnOnce(io::Error) -> Trouble {
    move |e| Trouble::Unusable(format!("{what}: {e}"))
}

impl RealTarget {
    /// Ready for [`Target::prepare`].
    ///
    /// # Errors
    /// What is missing on this machine, for the user.
    pub fn new(medium: Medium) -> Result<RealTarget, LoopError> {
        if medium == Medium::Loop {
            available()?;
        }
        let options = RealOptions {
            inline: false,
            ..RealOptions::default()
        };
        let real = RealEnv::new(options).map_err(|error| LoopError::Io {
            what: "setting up I/O".into(),
            error,
        })?;
        say_whether_judged();
        Ok(RealTarget {
            inner: SimTarget::new(),
            real,
            medium,
            scratch: Scratch::new(None)?,
            entries: Rc::default(),
            devices: Vec::new(),
            traffic: Rc::default(),
            stuck: Rc::default(),
        })
    }

    /// Lays out one image and says where it can be opened.
    fn lay_out(&mut self, image: &Image, index: u16, grain: u32) -> Result<Entry, Trouble> {
        let name = &image.file;
        if name.is_empty() || name.contains(['/', '\0']) || name == "." || name == ".." {
            return Err(Trouble::Unusable(format!(
                "image file '{name}': only plain names can become real files"
            )));
        }
        let path = self.scratch.path().join(name);
        let mut bytes = Vec::new();
        build(image, index, grain, &mut bytes);
        let file = File::create_new(&path).map_err(unusable(name))?;
        let mut length = bytes.len() as u64;
        if self.medium == Medium::Loop {
            length = device_length(image, length);
        }
        file.set_len(length).map_err(unusable(name))?;
        let ranges: Vec<(u64, u64)> = match image.format {
            Format::Raw => raw_data(image).collect(),
            Format::Qcow2 => vec![(0, bytes.len() as u64)],
        };
        for (offset, length) in ranges {
            let range = index_of(offset)..index_of((offset + length).min(bytes.len() as u64));
            file.write_all_at(&bytes[range], offset).map_err(unusable(name))?;
        }
        drop(file);
        let mut open = path;
        if self.medium == Medium::Loop {
            let device = LoopDevice::attach(&open, false).map_err(|e| Trouble::Unusable(e.to_string()))?;
            open = device.path().to_owned();
            self.devices.push(device);
        }
        let path = open.to_str().expect("made of plain parts").to_owned();
        let (writers, contested) = (Rc::default(), Rc::default());
        Ok(Entry {
            name: name.clone(),
            format: image.format,
            path,
            writers,
            contested,
            ranges: Ranges::default(),
        })
    }

    /// Forgets the last run's files and devices.
    fn clear(&mut self) -> Result<(), Trouble> {
        self.detach()?;
        for entry in self.entries.take() {
            fs::remove_file(self.scratch.path().join(&entry.name)).map_err(unusable(&entry.name))?;
        }
        Ok(())
    }

    /// Detaches the devices and waits until the kernel has written back what they cached.
    #[expect(clippy::disallowed_methods, reason = "how long the kernel takes is real time")]
    fn detach(&mut self) -> Result<(), Trouble> {
        if self.devices.is_empty() {
            return Ok(());
        }
        self.devices.clear();
        let deadline = Instant::now() + DETACH_LIMIT;
        while !devices_over(self.scratch.path()).is_empty() {
            if Instant::now() > deadline {
                return Err(Trouble::Unusable(
                    "a loop device is held by somebody else and does not detach".into(),
                ));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }
}

fn index_of(offset: u64) -> usize {
    usize::try_from(offset).expect("images are in memory when laid out")
}

/// Bytes of the device for an image: raw images as they are, in whole sectors; qcow2 with room for every guest cluster
/// twice (a failed job leaves none behind, but a running one may hold both) and for metadata.
fn device_length(image: &Image, file: u64) -> u64 {
    match image.format {
        Format::Raw => file.next_multiple_of(512),
        Format::Qcow2 => {
            let metadata = 64 * u64::from(image.cluster_size).max(4096);
            (file + 2 * image.size + metadata).next_multiple_of(1 << 20)
        }
    }
}

/// The same command with `file` drivers over images as `host_device`.
fn on_devices(arguments: &mut Map<String, Value>) {
    if arguments.contains_key("filename")
        && let Some(driver) = arguments.get_mut("driver")
        && driver == "file"
    {
        *driver = Value::from("host_device");
    }
    for value in arguments.values_mut() {
        match value {
            Value::Object(inner) => on_devices(inner),
            Value::Array(items) => items
                .iter_mut()
                .filter_map(Value::as_object_mut)
                .for_each(on_devices),
            _ => {}
        }
    }
}

impl Target for RealTarget {
    fn capabilities(&self) -> Capabilities {
        let inner = self.inner.capabilities();
        Capabilities {
            deterministic: false,
            disk_options: false,
            ..inner
        }
    }

    fn prepare(&mut self, scenario: &Scenario) -> Result<(), Trouble> {
        // The old layer goes first: it has the old files open. So does what it left in flight.
        let medium = self.medium;
        let world = |real: &RealEnv, entries, traffic| {
            let real = real.clone();
            let job_parallelism = scenario.disk.job_parallelism as usize;
            move |clock, spawner| -> Rc<dyn Env> {
                Rc::new(World {
                    real,
                    clock,
                    spawner,
                    entries,
                    traffic,
                    job_parallelism,
                    medium,
                })
            }
        };
        (self.traffic, self.stuck) = (Rc::default(), Rc::default());
        let kernel = Rc::new(Kernel {
            real: self.real.clone(),
            traffic: Rc::clone(&self.traffic),
            stuck: Rc::clone(&self.stuck),
            waiting: Cell::new(None),
        });
        let entries = Rc::new(RefCell::new(Vec::new()));
        self.inner.start_over(
            kernel,
            world(&self.real, Rc::clone(&entries), Rc::clone(&self.traffic)),
        );
        self.clear()?;
        self.entries = entries;
        for (index, image) in (0..).zip(&scenario.images) {
            let entry = self.lay_out(image, index, scenario.grain)?;
            self.entries.borrow_mut().push(entry);
        }
        Ok(())
    }

    fn adapt(&self, scenario: &Scenario) -> Option<Scenario> {
        if self.medium == Medium::File {
            return None;
        }
        let mut adapted = scenario.clone();
        adapted.disk.devices = true;
        for step in &mut adapted.steps {
            if let Action::Command { arguments, .. } = &mut step.action {
                on_devices(arguments);
            }
        }
        Some(adapted)
    }

    fn issue(&mut self, scenario: &Scenario, step: StepId) {
        self.inner.issue(scenario, step);
    }

    fn alternatives(&mut self) -> Alternatives {
        self.inner.alternatives()
    }

    fn keys(&self, into: &mut Vec<Key>) {
        self.inner.keys(into);
    }

    fn advance(&mut self, next: Move) -> Result<(), Trouble> {
        self.inner.advance(next)?;
        if self.stuck.get() {
            Err(Trouble::Stuck("a storage request of the kernel"))
        } else {
            Ok(())
        }
    }

    fn take_records(&mut self, into: &mut Vec<Record>) {
        self.inner.take_records(into);
    }

    fn layer(&self) -> Option<&Layer> {
        self.inner.layer()
    }

    fn contents(&mut self) -> Result<Vec<NodeContent>, Trouble> {
        self.inner.contents()
    }

    fn close(&mut self) -> Result<Leftovers, Trouble> {
        let mut left = self.inner.close()?;
        let (handles, pending) = (self.traffic.handles.get(), self.traffic.pending.get());
        if handles > 0 {
            left.storage.push(format!("{handles} open handles"));
        }
        if pending > 0 {
            left.storage.push(format!("{pending} requests in flight"));
        }
        self.detach()?;
        Ok(left)
    }

    fn closed_files(&mut self) -> Vec<ClosedFile> {
        let closed = |entry: &Entry| {
            let bytes = fs::read(self.scratch.path().join(&entry.name)).expect("a file of our own");
            let (name, contested) = (entry.name.clone(), entry.contested.get());
            ClosedFile {
                name,
                format: entry.format,
                bytes,
                contested,
            }
        };
        self.entries.borrow().iter().map(closed).collect()
    }

    fn judge(&mut self, sound: &[(&str, &[u8])]) -> Result<(), Violation> {
        if !qemu_img_is_there() {
            return Ok(());
        }
        let formats: BTreeMap<String, Format> = self
            .entries
            .borrow()
            .iter()
            .map(|e| (e.name.clone(), e.format))
            .collect();
        for (name, expected) in sound.iter().filter(|(name, _)| formats[*name] == Format::Qcow2) {
            self.qemu_img_judges(name, expected)?;
        }
        Ok(())
    }

    fn describe(&self) -> Vec<String> {
        let mut lines = self.inner.describe();
        lines.push(format!(
            "{} storage requests in the kernel",
            self.traffic.pending.get()
        ));
        lines
    }
}

impl RealTarget {
    /// `check` of the image, and `compare` of its guest content with what is expected, written as a raw file.
    fn qemu_img_judges(&self, name: &str, expected: &[u8]) -> Result<(), Violation> {
        let violation = |what: &str, said: Vec<String>| {
            let message =
                format!("qemu-img {what} of image '{name}' after a clean close says otherwise than we do");
            Violation {
                oracle: OracleName::Image,
                message,
                step: None,
                evidence: said,
            }
        };
        self.qemu_img(&["check", "-q", "-f", "qcow2", name])
            .map_err(|said| violation("check", said))?;
        let raw = ".expected";
        let path = self.scratch.path().join(raw);
        fs::write(&path, expected)
            .map_err(|e| violation("compare", vec![format!("cannot write {raw}: {e}")]))?;
        // Not -s, which also wants the same allocation. A longer image whose excess is zero is told in words only.
        let same = self.qemu_img(&["compare", "-f", "qcow2", "-F", "raw", name, raw]);
        let said = same.map_err(|said| violation("compare", said))?;
        if said.contains("size mismatch") {
            Err(violation("compare", vec![said]))
        } else {
            Ok(())
        }
    }

    /// Runs it among the images; what it said, on success as on failure.
    fn qemu_img(&self, arguments: &[&str]) -> Result<String, Vec<String>> {
        let output = Command::new("qemu-img")
            .args(arguments)
            .current_dir(self.scratch.path())
            .output();
        let output = output.map_err(|e| vec![format!("qemu-img could not be run: {e}")])?;
        let text = [output.stdout, output.stderr].concat();
        let text = String::from_utf8_lossy(&text).into_owned();
        if output.status.success() {
            return Ok(text);
        }
        let lines = text.lines().map(str::to_owned).collect::<Vec<_>>();
        Err([
            vec![format!("qemu-img {}: {}", arguments.join(" "), output.status)],
            lines,
        ]
        .concat())
    }
}

thread_local! {
    static JUDGE: bool = Command::new("qemu-img").arg("--version").output().is_ok_and(|o| o.status.success());
}

fn qemu_img_is_there() -> bool {
    JUDGE.with(|there| *there)
}

fn say_whether_judged() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        if !qemu_img_is_there() {
            eprintln!(
                "WARNING: qemu-img is not installed: finished images are judged by blkcheck's own reader only"
            );
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::choice::Random;
    use crate::generate::{Profile, Reach, generate};
    use crate::run::Runner;
    use crate::scenario::parse::parse;

    #[test]
    fn file_drivers_become_devices_at_any_depth() {
        let mut command: Value = serde_json::json!({
            "driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "x"},
            "backing": {"driver": "raw", "file": {"driver": "file", "filename": "y"}},
            "options": [{"driver": "qcow2", "file": {"driver": "file", "filename": "z"}}]
        });
        on_devices(command.as_object_mut().unwrap());
        assert_eq!(command["driver"], "qcow2");
        assert_eq!(command["file"]["driver"], "host_device");
        assert_eq!(command["backing"]["file"]["driver"], "host_device");
        assert_eq!(command["options"][0]["file"]["driver"], "host_device");
    }

    const STREAM: &str = include_str!("../testdata/stream.json");

    /// Runs the stream scenario and generated ones; false when this machine has no such medium.
    fn runs(medium: Medium, seeds: u64) -> bool {
        let mut target = match RealTarget::new(medium) {
            Ok(target) => target,
            Err(reason) => {
                assert_ne!(
                    std::env::var("BLKCHECK_REQUIRE_ALL").as_deref(),
                    Ok("1"),
                    "{medium:?}: {reason}"
                );
                eprintln!("SKIPPED {medium:?}: {reason}");
                return false;
            }
        };
        let mut runner = Runner::new();
        let stream = parse("stream.json", STREAM.as_bytes()).expect("a valid scenario");
        let reach = Reach {
            drain: true,
            alignment: false,
            fine_grain: true,
            raw_tails: medium == Medium::File,
        };
        let generated = (0..seeds).map(|seed| generate(seed, Profile::Mixed, reach));
        let mut oracles = crate::oracle::all();
        for scenario in std::iter::once(stream).chain(generated) {
            let mut chooser = Random::new(scenario.seed.unwrap_or(0));
            let result = runner
                .run(&scenario, &mut chooser, &mut target, &mut oracles)
                .expect("usable");
            assert_eq!(result.violation, None, "{medium:?}, seed {:?}", scenario.seed);
        }
        true
    }

    #[test]
    fn scenarios_hold_over_real_files() {
        assert!(runs(Medium::File, 25), "files are everywhere");
    }

    #[test]
    fn scenarios_hold_over_loop_devices() {
        runs(Medium::Loop, 4);
    }

    #[test]
    fn qemu_img_finds_a_damaged_image_and_other_content() {
        if !qemu_img_is_there() {
            assert_ne!(
                std::env::var("BLKCHECK_REQUIRE_ALL").as_deref(),
                Ok("1"),
                "qemu-img is required"
            );
            return eprintln!("SKIPPED: qemu-img is not installed");
        }
        let mut target = RealTarget::new(Medium::File).unwrap();
        let image = r#"{"version":1,"grain":512,"images":[{"file":"a","format":"qcow2","size":65536,
            "cluster-size":512,"fill":[{"offset":0,"length":4096,"stored":"data"}]}],"steps":[]}"#;
        let scenario: Scenario = serde_json::from_str(image).unwrap();
        target.prepare(&scenario).unwrap();
        target.close().unwrap();
        let mut content = vec![0; 65536];
        crate::image::build::content(&scenario.images[0], 0, 512, 0, &mut content);
        assert_eq!(target.judge(&[("a", &content)]), Ok(()));
        content[5000] = 1;
        let other = target.judge(&[("a", &content)]).unwrap_err();
        assert!(
            target.judge(&[("a", &content[..32768])]).is_err(),
            "the size counts"
        );
        assert_eq!(other.oracle, OracleName::Image);
        assert!(other.message.contains("compare"), "{other:?}");
        content[5000] = 0;
        // The refcount table's offset, in the header.
        let file = File::options()
            .write(true)
            .open(target.scratch.path().join("a"))
            .unwrap();
        file.write_all_at(&[0xff; 8], 48).unwrap();
        let damaged = target.judge(&[("a", &content)]).unwrap_err();
        assert!(damaged.message.contains("check"), "{damaged:?}");
    }

    #[test]
    fn a_scenario_reaches_nothing_but_its_images() {
        let mut target = RealTarget::new(Medium::File).unwrap();
        for name in ["../a", "/etc/a", "..", ""] {
            let scenario = Scenario {
                images: vec![Image {
                    file: name.into(),
                    ..image_of("raw")
                }],
                ..crate::oracle::tests::scenario()
            };
            assert!(
                matches!(target.prepare(&scenario), Err(Trouble::Unusable(_))),
                "{name}"
            );
        }
        let mut scenario = crate::oracle::tests::scenario();
        scenario.images = vec![image_of("raw")];
        target.prepare(&scenario).unwrap();
        let open = |filename| {
            target.inner.layer().unwrap().env().open(&OpenStorage {
                filename,
                kind: blkcheck_impl::env::StorageKind::File,
                writable: false,
                direct: false,
            })
        };
        assert!(open("a").is_ok());
        let refusal = open("/proc/self/status").unwrap_err();
        assert_eq!(
            refusal.desc,
            "Could not open '/proc/self/status': No such file or directory"
        );
    }

    fn image_of(format: &str) -> Image {
        serde_json::from_value(serde_json::json!({"file": "a", "format": format, "size": 4096})).unwrap()
    }
}
