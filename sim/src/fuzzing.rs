//! What the fuzz targets do with their input: the same runs as everything else, so that a crash file is one step away
//! from a scenario file and a regression test.
//!
//! Rules: no panic for any input but a finding's. Inputs are made small by construction, not by rejection.

use std::cell::RefCell;

use arbitrary::Arbitrary;
use blkcheck_impl::Layer;
use blkcheck_impl::memory::MemoryEnv;
use blkcheck_impl::types::ReqFlags;
use serde_json::json;

use crate::choice::{Bytes, Recording};
use crate::generate::{Profile, Reach, generate_from};
use crate::harness::{Harness, Setup};
use crate::image;
use crate::report;
use crate::rng::Rng;
use crate::scenario::{Fill, Format, Image, Scenario, Stored};

/// A scenario and its schedule, as a fuzzer makes them.
#[derive(Arbitrary, Debug)]
pub struct ScenarioInput {
    profile: u8,
    /// The generator's draws.
    workload: Vec<u8>,
    /// The choice stream.
    choices: Vec<u8>,
}

impl ScenarioInput {
    /// The scenario of this input.
    #[must_use]
    pub fn scenario(&self) -> Scenario {
        let profile = Profile::ALL[usize::from(self.profile) % Profile::ALL.len()];
        generate_from(&mut Rng::tape(&self.workload), profile, Reach::all())
    }
}

thread_local! {
    static HARNESS: RefCell<Option<Harness>> = const { RefCell::new(None) };
}

/// Runs the input; a violation comes back as text with the scenario that replays it.
///
/// # Errors
/// The finding.
///
/// # Panics
/// When the simulator itself cannot run, which no input causes.
pub fn run(input: &ScenarioInput) -> Result<(), String> {
    HARNESS.with_borrow_mut(|slot| {
        let harness =
            slot.get_or_insert_with(|| Harness::new(&Setup::default()).expect("memory is always there"));
        let mut scenario = input.scenario();
        let mut choices = Vec::new();
        let mut bytes = Bytes::new(&input.choices);
        let result = harness.once(&scenario, &mut Recording::new(&mut bytes, &mut choices));
        let Some(violation) = result.expect("memory is always there").violation else {
            return Ok(());
        };
        scenario.choices = choices;
        scenario.expect = Some(violation.oracle.as_str().to_owned());
        let file = serde_json::to_string(&scenario).expect("a scenario is JSON");
        Err(format!(
            "{}\n{}\n{file}",
            violation.oracle.as_str(),
            report::verdict(&violation)
        ))
    })
}

/// One request on an opened image.
#[derive(Arbitrary, Clone, Copy, Debug)]
enum Request {
    Read(u32, u16),
    Write(u32, u16),
    Zero(u32, u16, bool),
    Discard(u32, u16),
    Status(u32, u16),
    Flush,
}

/// An image and what is done with it.
#[derive(Arbitrary, Debug)]
pub struct ImageInput {
    /// Start from a sound image of this shape (cluster bits, size in KiB), or from nothing.
    shape: Option<(u8, u8, bool)>,
    /// Bytes written over it: where, what.
    patches: Vec<(u16, u64)>,
    /// The image itself when there is no shape, or bytes appended to it.
    bytes: Vec<u8>,
    read_only: bool,
    requests: Vec<Request>,
}

impl ImageInput {
    fn image(&self) -> Vec<u8> {
        let mut out = Vec::new();
        if let Some((bits, kib, compressed)) = self.shape {
            let cluster_size = 512 << (bits % 8);
            let size = u64::from(kib).max(1) * 1024;
            let stored = if compressed {
                Stored::Compressed
            } else {
                Stored::Data
            };
            let fill = vec![Fill {
                offset: 0,
                length: size / 2 / 512 * 512,
                stored,
            }];
            let image = Image {
                file: "x".to_owned(),
                format: Format::Qcow2,
                size,
                cluster_size,
                compat: 3,
                refcount_bits: 16,
                backing_file: None,
                backing_format: None,
                fill,
            };
            image::build::build(&image, 0, 512, &mut out);
        }
        out.extend_from_slice(&self.bytes);
        for &(at, word) in &self.patches {
            let at = usize::from(at);
            for (slot, byte) in out.iter_mut().skip(at).zip(word.to_be_bytes()) {
                *slot = byte;
            }
        }
        out
    }
}

/// Opens the image and carries out the requests. Errors are fine; a panic, a hang or a huge allocation is the finding.
pub fn open_image(input: &ImageInput) {
    let env = MemoryEnv::new();
    env.create_with("image", &input.image());
    let layer = Layer::new(std::rc::Rc::new(env.clone()), None);
    env.block_on(async {
        let add = json!({"driver": "qcow2", "node-name": "n", "read-only": input.read_only, "discard": "unmap",
            "backing": null, "file": {"driver": "file", "filename": "image"}});
        if layer.execute("blockdev-add", &add).await.is_err() {
            return;
        }
        let export = json!({"type": "nbd", "id": "x", "node-name": "n", "writable": !input.read_only});
        if layer.execute("block-export-add", &export).await.is_ok() {
            let backend = layer.export("x").expect("just added");
            for request in input.requests.iter().take(64) {
                one(&backend, *request).await;
            }
        }
        layer.shutdown().await;
    });
}

async fn one(backend: &blkcheck_impl::io::backend::Backend, request: Request) {
    let at = |offset: u32, length: u16| (u64::from(offset) * 16, usize::from(length));
    // Results are of no interest: refusing is right, and so is answering.
    let _ = match request {
        Request::Read(o, l) => backend.read(at(o, l).0, &mut vec![0; at(o, l).1]).await,
        Request::Write(o, l) => {
            backend
                .write(at(o, l).0, &vec![0x5a; at(o, l).1], ReqFlags::empty())
                .await
        }
        Request::Zero(o, l, unmap) => {
            let flags = if unmap {
                ReqFlags::MAY_UNMAP
            } else {
                ReqFlags::empty()
            };
            backend.write_zeroes(at(o, l).0, u64::from(l) * 64, flags).await
        }
        Request::Discard(o, l) => backend.discard(at(o, l).0, u64::from(l) * 64).await,
        Request::Status(o, l) => backend.block_status(at(o, l).0, u64::from(l)).await.map(|_| ()),
        Request::Flush => backend.flush().await,
    };
}
