//! The layer over real files or loop devices: the simulator's tasks and oracles, the kernel's storage.
//!
//! Tasks are ordered by the runner as in simulation; storage requests all go through the engine (never inline), so that
//! they complete later and in an order that is the kernel's, and others run in between. Hence not deterministic.
//!
//! Rules: a scenario reaches its own images and nothing else of this machine: names are looked up among them, never in
//! the file system. With [`Medium::Loop`] each image is the content of a loop device with room to grow, and `file`
//! drivers in commands become `host_device`. After shutdown `qemu-img check` judges every qcow2 image and `qemu-img
//! compare` its guest content against the independent reader's; without qemu-img the run says once that nobody did.

mod judge;
mod world;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::{Duration, Instant};

use blkcheck_impl::Layer;
use blkcheck_impl::env::Env;
use blkcheck_impl::real::{RealEnv, RealOptions};
use serde_json::{Map, Value};

use judge::{EXPECTED, qemu_img_is_there, say_whether_judged};
use world::{Entry, Kernel, Traffic, World};

use super::loopdev::{LoopDevice, LoopError, Scratch, available, devices_over};
use super::ranges::Ranges;
use super::{
    Alternatives, Capabilities, ClosedFile, Leftovers, Move, NodeContent, SimTarget, Target, Trouble,
};
use crate::choice::Key;
use crate::history::{Record, StepId};
use crate::image::build::{build, raw_data};
use crate::lack::{self, Share};
use crate::oracle::Violation;
use crate::scenario::{Action, Format, Image, Scenario};

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

/// The target.
#[derive(Debug)]
pub struct RealTarget {
    /// Of the files that may be open.
    _share: Share,
    inner: SimTarget,
    real: RealEnv,
    medium: Medium,
    scratch: Scratch,
    entries: Rc<RefCell<Vec<Entry>>>,
    devices: Vec<LoopDevice>,
    traffic: Rc<Traffic>,
    stuck: Rc<Cell<bool>>,
}

fn unusable(what: &str) -> impl FnOnce(io::Error) -> Trouble {
    move |e| Trouble::Unusable(format!("{what}: {}", lack::with_advice(&e)))
}

impl RealTarget {
    /// Ready for [`Target::prepare`].
    ///
    /// # Errors
    /// What is missing on this machine, for the user.
    pub fn new(medium: Medium) -> Result<RealTarget, LoopError> {
        let share = Share::take()?;
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
            _share: share,
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
        if name.is_empty() || name.contains('/') || [".", "..", EXPECTED].contains(&&**name) {
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
        let Some(path) = open.to_str().map(str::to_owned) else {
            let text = format!(
                "temporary directory {}: its name is not UTF-8",
                self.scratch.path().display()
            );
            return Err(Trouble::Unusable(text));
        };
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
            power_cut: false,
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
        if let Some(lack) = self.traffic.lack.take() {
            return Err(Trouble::Unusable(lack));
        }
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

    fn judge(&mut self, sound: &[(&str, &[u8])]) -> Result<Option<Violation>, Trouble> {
        if !qemu_img_is_there() {
            return Ok(None);
        }
        let formats: BTreeMap<String, Format> = self
            .entries
            .borrow()
            .iter()
            .map(|e| (e.name.clone(), e.format))
            .collect();
        for (name, expected) in sound.iter().filter(|(name, _)| formats[*name] == Format::Qcow2) {
            let violation = self.qemu_img_judges(name, expected)?;
            if violation.is_some() {
                return Ok(violation);
            }
        }
        Ok(None)
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

#[cfg(test)]
mod tests;
