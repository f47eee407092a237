//! The `qcow2_open` target: an image, hostile or sound, is opened and used.
//!
//! Rules: any image: an error or an answer, never a panic, a hang or a huge allocation. An image that the independent
//! checker calls sound is more: it opens, requests within it succeed, reads give what was there or was written, and
//! after the close it is sound again, holds exactly that, and its snapshot is as it was.

use std::rc::Rc;

use arbitrary::{Arbitrary, Unstructured};
use blkcheck_impl::Layer;
use blkcheck_impl::env::{Env, OpenStorage, StorageKind};
use blkcheck_impl::io::backend::Backend;
use blkcheck_impl::memory::MemoryEnv;
use blkcheck_impl::types::{ReqFlags, StatusFlags};
use serde_json::{Value, json};

use super::layout::{get32, get64, put32, put64};
use super::recipe::Recipe;
use crate::image::check::{self, Severity};
use crate::image::read;
use crate::scenario::Format;

/// Virtual disks up to this size are compared byte for byte.
const COMPARED: u64 = 1 << 20;
/// Files up to this length are read back after the run.
const READ_BACK: u64 = 16 << 20;
/// Bytes of the raw image below.
const BASE: usize = 24 << 10;

/// The image has a raw image below it.
pub(super) const BACKED: u8 = 1;
pub(super) const READ_ONLY: u8 = 2;
/// The node discards.
pub(super) const UNMAP: u8 = 4;
/// Requests are in flight together.
pub(super) const TOGETHER: u8 = 8;
/// The smallest caches.
pub(super) const TINY_CACHES: u8 = 16;
/// Freed clusters are discarded.
pub(super) const PASS_DISCARD: u8 = 32;
/// The file has a huge hole at its end.
pub(super) const SPARSE: u8 = 64;
/// The image is given byte for byte.
pub(super) const VERBATIM: u8 = 128;

/// One request: what (a kind in the low half), how many bytes, where.
#[derive(Arbitrary, Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) kind: u8,
    pub(super) length: u16,
    pub(super) at: u32,
}

pub(super) const READ: u8 = 0;
pub(super) const WRITE: u8 = 2;
pub(super) const ZERO: u8 = 4;
pub(super) const ZERO_UNMAP: u8 = 5;
pub(super) const DISCARD: u8 = 6;
pub(super) const STATUS: u8 = 8;
pub(super) const FLUSH: u8 = 9;
pub(super) const REBASE: u8 = 10;
/// Added to a kind: whole clusters.
pub(super) const ALIGNED: u8 = 16;
/// Added to a kind: `at` counts MiB.
pub(super) const FAR: u8 = 32;

/// An image and what is done with it: mode (1 byte), number of requests (1), requests (7 each), then a recipe, or the
/// image itself.
#[derive(Debug)]
pub struct ImageInput {
    mode: u8,
    requests: Vec<Request>,
    source: Source,
}

#[derive(Debug)]
enum Source {
    Recipe(Recipe),
    Verbatim(Vec<u8>),
}

impl<'a> Arbitrary<'a> for ImageInput {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<ImageInput> {
        let mode: u8 = u.arbitrary()?;
        let requests = (0..u.arbitrary::<u8>()? % 33)
            .map(|_| u.arbitrary())
            .collect::<Result<_, _>>()?;
        let source = if mode & VERBATIM == 0 {
            Source::Recipe(u.arbitrary()?)
        } else {
            Source::Verbatim(u.bytes(u.len())?.to_vec())
        };
        Ok(ImageInput {
            mode,
            requests,
            source,
        })
    }
}

impl std::fmt::Display for ImageInput {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "mode {:#x}, requests {:?}", self.mode, self.requests)?;
        match &self.source {
            Source::Recipe(recipe) => write!(f, ", {recipe:?}"),
            Source::Verbatim(bytes) => write!(f, ", {} bytes verbatim", bytes.len()),
        }
    }
}

impl ImageInput {
    /// The image file.
    #[must_use]
    pub fn image(&self) -> Vec<u8> {
        match &self.source {
            Source::Recipe(recipe) => recipe.build(),
            Source::Verbatim(bytes) => bytes.clone(),
        }
    }
}

/// How far a run came; for tests of the target itself.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Depth {
    /// The independent checker had nothing to say against the image.
    pub sound: bool,
    /// It was opened.
    pub opened: bool,
    /// Requests that succeeded.
    pub done: u32,
    /// There is a snapshot.
    pub snapshot: bool,
}

/// The images of a run, for the independent reader.
struct Pair<'a>(&'a [u8], &'a [u8]);

impl read::Files for Pair<'_> {
    fn file(&self, name: &str) -> Option<(&[u8], Format)> {
        match name {
            "image" => Some((self.0, Format::Qcow2)),
            // Whatever it is called: a patch or a request changes the name.
            _ => Some((self.1, Format::Raw)),
        }
    }
}

/// What a guest of a sound image must see, and what the image must look like afterwards.
struct Sound {
    bytes: Vec<u8>,
    /// Was discarded: reads as it was, or as zeroes.
    loose: Vec<bool>,
    /// Requests overlapped: any of them may have been the last.
    any_content: bool,
    /// As it was before.
    image: Vec<u8>,
    snapshot: Option<Vec<u8>>,
}

impl Sound {
    /// `None` for an image that the independent checker or reader has something against, or that is too large.
    fn of(image: &[u8], base: &[u8]) -> Option<Sound> {
        if get64(image, 24) > COMPARED || !get64(image, 24).is_multiple_of(512) {
            return None;
        }
        let problems = check::check_with_snapshots(image);
        if problems.iter().any(|p| p.severity == Severity::Corruption) {
            return None;
        }
        let bytes = read::content(&Pair(image, base), "image").ok()?.bytes;
        Some(Sound {
            loose: vec![false; bytes.len()],
            bytes,
            any_content: false,
            image: image.to_vec(),
            snapshot: snapshot(image, base)?,
        })
    }

    fn read(&self, at: u64, buf: &[u8]) {
        let from = usize::try_from(at).expect("compared in memory");
        if self.bytes[from..from + buf.len()] == *buf {
            return;
        }
        for (i, &seen) in buf.iter().enumerate() {
            let expected = self.bytes[from + i];
            assert!(
                seen == expected || self.loose[from + i] && seen == 0,
                "byte {:#x} of a sound image reads {seen:#x} instead of {expected:#x}",
                from + i
            );
        }
    }

    fn set(&mut self, at: u64, length: usize, value: u8) {
        let from = usize::try_from(at).expect("compared in memory");
        self.bytes[from..from + length].fill(value);
        self.loose[from..from + length].fill(false);
    }

    fn closed(&self, image: &[u8], base: &[u8]) {
        let problems = check::check_with_snapshots(image);
        let corrupt = problems.iter().find(|p| p.severity == Severity::Corruption);
        assert!(
            corrupt.is_none(),
            "the image was sound, after the close: {corrupt:?}"
        );
        // A cluster past the old end of the file may have been counted all along.
        let mut before = self.image.clone();
        before.resize(before.len().max(image.len()), 0);
        let before = check::check_with_snapshots(&before);
        assert!(
            problems.len() <= before.len(),
            "before: {before:?}, after the close: {problems:?}"
        );
        let now = read::content(&Pair(image, base), "image").expect("sound").bytes;
        assert_eq!(now.len(), self.bytes.len(), "the size never changes");
        if !self.any_content {
            self.read(0, &now);
        }
        assert!(
            snapshot(image, base).expect("still there") == self.snapshot,
            "the snapshot has changed"
        );
    }
}

/// What the first snapshot holds: `Some(None)` when there is no snapshot, `None` when it cannot be read.
fn snapshot(image: &[u8], base: &[u8]) -> Option<Option<Vec<u8>>> {
    if get32(image, 60) == 0 {
        return Some(None);
    }
    let list = usize::try_from(get64(image, 64)).ok()?;
    let mut view = image.to_vec();
    put64(&mut view, 40, get64(image, list));
    put32(&mut view, 36, get32(image, list.checked_add(8)?));
    put32(&mut view, 60, 0);
    Some(Some(read::content(&Pair(&view, base), "image").ok()?.bytes))
}

/// Opens the image and carries out the requests.
///
/// # Panics
/// The finding.
pub fn open_image(input: &ImageInput) -> Depth {
    let image = &input.image()[..];
    let base: Vec<u8> = (0..BASE)
        .map(|i| u8::try_from(i / 512 % 61 + 190).expect("a byte"))
        .collect();
    let backed = input.mode & BACKED != 0;
    // Without its backing image attached, a layer reads as zeroes where it has nothing.
    let below: &[u8] = if backed { &base } else { &[] };
    let mut sound = Sound::of(image, below).filter(|_| !backed || get64(image, 8) != 0);
    let mut depth = Depth {
        sound: sound.is_some(),
        snapshot: sound.as_ref().is_some_and(|s| s.snapshot.is_some()),
        ..Depth::default()
    };
    let env = MemoryEnv::new();
    env.create_with("image", image);
    env.create_with("base", &base);
    if input.mode & SPARSE != 0 {
        lengthen(&env, image.len() as u64 + (1 << 40));
        sound = None;
    }
    let layer = Layer::new(Rc::new(env.clone()), None);
    env.block_on(async {
        let Some(backend) = open(&layer, input.mode, get32(image, 20)).await else {
            return;
        };
        depth.opened = true;
        let user = User {
            layer: &layer,
            env: &env,
            backend,
            cluster: 1 << get32(image, 20),
        };
        if input.mode & TOGETHER != 0 {
            depth.done = user.together(&input.requests).await;
            if let Some(sound) = &mut sound {
                sound.any_content = true;
            }
        } else {
            for (i, request) in input.requests.iter().enumerate() {
                let value = u8::try_from(i + 1).expect("few requests");
                depth.done += u32::from(user.one(*request, value, sound.as_mut()).await);
            }
        }
        layer.shutdown().await;
    });
    if let Some(sound) = sound.filter(|_| depth.opened) {
        let after = env.content("image").expect("the file is there");
        if after.len() as u64 <= READ_BACK {
            sound.closed(&after, below);
        }
    }
    depth
}

/// Makes the file of the image longer, without content.
fn lengthen(env: &MemoryEnv, length: u64) {
    let open = OpenStorage {
        filename: "image",
        kind: StorageKind::File,
        writable: true,
        direct: false,
    };
    let file = env.open(&open).expect("the file is there");
    env.block_on(file.truncate(length))
        .expect("within the largest length");
}

/// Opens the image as node "n" with an export; `None` when it is refused.
async fn open(layer: &Layer, mode: u8, bits: u32) -> Option<Backend> {
    let is = |flag: u8| mode & flag != 0;
    let mut add = json!({"driver": "qcow2", "node-name": "n", "read-only": is(READ_ONLY),
        "discard": if is(UNMAP) { "unmap" } else { "ignore" }, "backing": null,
        "file": {"driver": "file", "filename": "image", "discard": "unmap"}});
    if is(BACKED) {
        add["backing"] = json!({"driver": "raw", "file": {"driver": "file", "filename": "base"}});
    }
    if is(TINY_CACHES) {
        let tables = 4u64 << bits.min(21);
        add["l2-cache-size"] = tables.into();
        add["refcount-cache-size"] = tables.into();
    }
    if is(PASS_DISCARD) {
        add["pass-discard-other"] = true.into();
        add["pass-discard-request"] = Value::Bool(!is(UNMAP));
    }
    layer.execute("blockdev-add", &add).await.ok()?;
    let export = json!({"type": "nbd", "id": "x", "node-name": "n", "writable": !is(READ_ONLY)});
    layer.execute("block-export-add", &export).await.ok()?;
    layer.export("x")
}

/// A guest of the open image.
struct User<'a> {
    layer: &'a Layer,
    env: &'a MemoryEnv,
    backend: Backend,
    cluster: u64,
}

/// What a request is after its range was fitted to the disk.
#[derive(Clone, Copy, Debug)]
struct Fitted {
    kind: u8,
    at: u64,
    length: u64,
    inside: bool,
}

impl User<'_> {
    /// Most requests lie inside the disk, some reach over its end.
    fn fit(&self, request: Request) -> Fitted {
        let size = self.backend.length().unwrap_or(0);
        let unit = if request.kind & FAR == 0 { 16 } else { 1 << 20 };
        let (mut at, mut length) = (u64::from(request.at) * unit, u64::from(request.length));
        if request.kind & ALIGNED != 0 {
            let clusters = length % 8 + 1;
            at = at / self.cluster * self.cluster;
            length = (clusters * self.cluster).min(128 << 10);
        }
        if request.kind & 0xc0 != 0xc0 && size > 0 {
            at %= size;
            if request.kind & ALIGNED != 0 {
                at = at / self.cluster * self.cluster;
            }
            length = length.min(size - at);
        }
        Fitted {
            kind: request.kind % 16,
            at,
            length,
            inside: at + length <= size,
        }
    }

    /// Carries out a request and compares; true when it succeeded.
    async fn one(&self, request: Request, value: u8, sound: Option<&mut Sound>) -> bool {
        let fitted = self.fit(request);
        let mut buf = vec![value; usize::try_from(fitted.length).expect("at most 128 KiB")];
        let done = if fitted.kind >= REBASE {
            let name = format!("base{}", "e".repeat(usize::from(request.length % 600)));
            let arguments = json!({"device": "n", "image-node-name": "n", "backing-file": name});
            self.layer
                .execute("change-backing-file", &arguments)
                .await
                .is_ok()
        } else {
            carry_out(&self.backend, fitted, &mut buf).await
        };
        let Some(sound) = sound else { return done };
        let Fitted {
            kind,
            at,
            length,
            inside,
        } = fitted;
        let writes = (WRITE..STATUS).contains(&kind);
        let allowed = !writes || self.writable();
        assert!(
            done || !inside || !allowed || kind >= REBASE,
            "{request:?}, that is {fitted:?}, fails on a sound image"
        );
        assert!(
            !done || inside || kind >= STATUS,
            "{fitted:?} succeeds past the end"
        );
        if done && inside {
            let from = usize::try_from(at).expect("compared in memory");
            match kind {
                READ..WRITE => sound.read(at, &buf),
                WRITE..ZERO => sound.set(at, buf.len(), value),
                ZERO..DISCARD => sound.set(at, buf.len(), 0),
                DISCARD..STATUS => sound.loose[from..from + buf.len()].fill(true),
                STATUS => self.status(at, length, sound).await,
                _ => {}
            }
        }
        done
    }

    fn writable(&self) -> bool {
        self.backend
            .root()
            .is_some_and(|root| self.layer.node(root).is_writable())
    }

    /// What is said to be zero is zero.
    async fn status(&self, at: u64, length: u64, sound: &Sound) {
        if length == 0 {
            return;
        }
        let status = self
            .backend
            .block_status(at, length)
            .await
            .expect("succeeded just now");
        assert!(
            (1..=length).contains(&status.pnum),
            "{} of {length} bytes",
            status.pnum
        );
        if status.flags.contains(StatusFlags::ZERO) {
            let zeroes = vec![0; usize::try_from(status.pnum).expect("at most the request")];
            sound.read(at, &zeroes);
        }
    }

    /// All requests in flight together, four at a time.
    async fn together(&self, requests: &[Request]) -> u32 {
        self.env.set_latency(10);
        let done = Rc::new(std::cell::Cell::new((0, 0)));
        for (i, batch) in requests.chunks(4).enumerate() {
            for request in batch.iter().filter(|r| r.kind % 16 < REBASE) {
                let (fitted, backend, done) = (self.fit(*request), self.backend.clone(), Rc::clone(&done));
                let value = u8::try_from(i + 1).expect("few requests");
                let task = async move {
                    let mut buf = vec![value; usize::try_from(fitted.length).expect("at most 128 KiB")];
                    let good = carry_out(&backend, fitted, &mut buf).await;
                    done.update(|(over, good_ones)| (over + 1, good_ones + u32::from(good)));
                };
                self.env.spawn("request", Box::pin(task));
            }
            let wanted = done.get().0
                + u32::try_from(batch.iter().filter(|r| r.kind % 16 < REBASE).count()).expect("few");
            while done.get().0 < wanted {
                self.env.sleep_until(self.env.now() + 10).await;
            }
        }
        done.get().1
    }
}

async fn carry_out(backend: &Backend, fitted: Fitted, buf: &mut [u8]) -> bool {
    let Fitted { kind, at, length, .. } = fitted;
    let none = ReqFlags::empty();
    let result = match kind {
        READ..WRITE => backend.read(at, buf).await,
        WRITE => backend.write(at, buf, none).await,
        3 => backend.write(at, buf, ReqFlags::FUA).await,
        ZERO => backend.write_zeroes(at, length, none).await,
        ZERO_UNMAP => backend.write_zeroes(at, length, ReqFlags::MAY_UNMAP).await,
        DISCARD..STATUS => backend.discard(at, length).await,
        STATUS => backend.block_status(at, length).await.map(|_| ()),
        _ => backend.flush().await,
    };
    result.is_ok()
}
