//! Backups over real files with guests that write beside them, judged by QEMU's own tools: what the target holds is what an
//! independent copy of the files held that was taken at the instant, and what a bitmap marks is what `qemu-img map` sees of it.
//!
//! Rules: the image and its bitmap are made by `qemu-img` and `qemu-io`. The independent copy is one of the files, flushed and at rest, just before
//! the command; `qemu-img convert` reads it. Two guests write to the same clusters while the job is paused, and go on while it
//! runs. Skipped, or failed, as in `qemu_img`; the bitmaps, which a daemon exports, likewise. Not here: failing storage.

mod common;

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::rc::Rc;

use blkcheck_impl::Layer;
use blkcheck_impl::env::Env;
use blkcheck_impl::event::{Event, Observer};
use blkcheck_impl::io::backend::Backend;
use blkcheck_impl::real::{RealEnv, RealOptions};
use blkcheck_impl::types::ReqFlags;
use common::{skip, version};
use serde_json::{Value, json};

const SIZE: usize = 4 << 20;
/// Unit of the copies, and of the bitmap.
const CLUSTER: usize = 64 << 10;
/// What one guest writes at a time.
const PIECE: usize = 4096;
/// Requests of one guest.
const REQUESTS: usize = 48;

fn tools(test: &str) -> bool {
    for tool in ["qemu-img", "qemu-io", "qemu-storage-daemon"] {
        if version(tool).is_none() {
            skip(test, &format!("{tool} is not installed"));
            return false;
        }
    }
    true
}

fn run(dir: &Path, program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).current_dir(dir).args(arguments).output();
    let output = output.expect("it is installed");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "{program} {arguments:?}: {text}");
    text
}

fn qemu_img(dir: &Path, arguments: &[&str]) -> String {
    run(dir, "qemu-img", arguments)
}

fn sound(dir: &Path, image: &str) {
    let text = qemu_img(dir, &["check", image]);
    assert!(text.contains("No errors were found"), "{image}: {text}");
}

/// By `qemu-img compare`, which ends with 1 where they differ.
fn same(dir: &Path, image: &str, raw: &str) {
    qemu_img(dir, &["compare", "-f", "qcow2", "-F", "raw", image, raw]);
}

/// The clusters that lie in `ranges` (offset, bytes), by number.
fn clusters(ranges: &[(usize, usize)]) -> BTreeSet<usize> {
    let of = |(offset, bytes): &(usize, usize)| offset / CLUSTER..(offset + bytes).div_ceil(CLUSTER);
    ranges.iter().flat_map(of).collect()
}

/// Clusters of which `qemu-img map` says what `wanted` asks for, wholly or in part.
fn mapped(dir: &Path, arguments: &[&str], wanted: impl Fn(&Value) -> bool) -> BTreeSet<usize> {
    let text = qemu_img(dir, &[&["map", "--output=json"], arguments].concat());
    let runs: Vec<Value> = serde_json::from_str(&text).expect("JSON");
    let number = |value: &Value| usize::try_from(value.as_u64().expect("a number")).expect("small");
    let range = |run: &Value| (number(&run["start"]), number(&run["length"]));
    let ranges: Vec<_> = runs.iter().filter(|run| wanted(run)).map(range).collect();
    clusters(&ranges)
}

/// Clusters that an image itself holds.
fn held(dir: &Path, image: &str) -> BTreeSet<usize> {
    mapped(dir, &[image], |run| run["depth"] == 0 && run["present"] == true)
}

/// Clusters that the target stores compressed.
fn packed(dir: &Path) -> BTreeSet<usize> {
    mapped(dir, &["target.qcow2"], |run| run["compressed"] == true)
}

/// What bitmap `b` of `source.qcow2` marks, as a client of the daemon's NBD server sees it. First: `qemu-img info` finds the
/// one bitmap, at rest.
fn marked(dir: &Path) -> BTreeSet<usize> {
    let info: Value =
        serde_json::from_str(&qemu_img(dir, &["info", "--output=json", "source.qcow2"])).expect("JSON");
    let expected = json!([{"flags": ["auto"], "name": "b", "granularity": CLUSTER}]);
    assert_eq!(info["format-specific"]["data"]["bitmaps"], expected);
    let image = json!({"driver": "qcow2", "node-name": "n", "read-only": true,
                       "file": {"driver": "file", "filename": "source.qcow2"}});
    let mut daemon = Command::new("qemu-storage-daemon")
        .current_dir(dir)
        .args(["--blockdev", &image.to_string()])
        .args(["--nbd-server", "addr.type=unix,addr.path=socket"])
        .args(["--export", "nbd,id=x,node-name=n,name=x,bitmaps.0=b"])
        .args(["--chardev", "stdio,id=m", "--monitor", "chardev=m"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("it is installed");
    let mut lines = BufReader::new(daemon.stdout.take().expect("piped")).lines();
    lines
        .next()
        .expect("a greeting, when everything is there")
        .expect("text");
    let client = "driver=nbd,server.type=unix,server.path=socket,export=x,x-dirty-bitmap=qemu:dirty-bitmap:b";
    // Of such a client what is marked is not data.
    let marks = mapped(dir, &["--image-opts", client], |run| run["data"] == false);
    let mut to = daemon.stdin.take().expect("piped");
    writeln!(to, r#"{{"execute":"qmp_capabilities"}}{{"execute":"quit"}}"#).expect("it listens");
    assert!(daemon.wait().expect("it was started here").success());
    marks
}

/// What guests wrote and were told that it is done.
#[derive(Debug)]
struct Written {
    bytes: RefCell<Vec<u8>>,
    marks: RefCell<BTreeSet<usize>>,
    requests: Cell<usize>,
    guests: Cell<usize>,
}

impl Written {
    fn over(bytes: Vec<u8>) -> Rc<Written> {
        Rc::new(Written {
            bytes: RefCell::new(bytes),
            marks: RefCell::default(),
            requests: Cell::new(0),
            guests: Cell::new(0),
        })
    }
}

/// The `n`th request of one of two guests, who share every cluster but no piece.
async fn request(export: &Backend, guest: usize, n: usize, written: &Written) {
    let pieces = SIZE / PIECE / 2;
    let at = ((n * 67 + guest * 13) % pieces * 2 + guest) * PIECE;
    let byte = u8::try_from(1 + (n * 2 + guest) % 250).expect("small");
    let (value, done) = if n % 7 == 3 {
        let zeroes = export.write_zeroes(at as u64, PIECE as u64, ReqFlags::MAY_UNMAP);
        (0, zeroes.await)
    } else {
        let data = [byte; PIECE];
        (byte, export.write(at as u64, &data, ReqFlags::empty()).await)
    };
    done.expect("storage works");
    written.bytes.borrow_mut()[at..at + PIECE].fill(value);
    written.marks.borrow_mut().insert(at / CLUSTER);
    written.requests.set(written.requests.get() + 1);
}

/// Counts copies that storage made, and those that it could not make.
#[derive(Debug, Default)]
struct Offloaded {
    well: Cell<usize>,
    failed: Cell<usize>,
}

impl Observer for Offloaded {
    fn event(&self, event: &Event) {
        if let Event::CopyOffloaded { result, .. } = event {
            let count = if result.is_ok() { &self.well } else { &self.failed };
            count.set(count.get() + 1);
        }
    }
}

fn layer(dir: &Path, inline: bool, offloaded: &Rc<Offloaded>) -> (Rc<Layer>, RealEnv) {
    let options = RealOptions {
        root: Some(dir.to_owned()),
        inline,
        ..RealOptions::default()
    };
    let env = RealEnv::new(options).expect("an environment");
    (
        Rc::new(Layer::new(Rc::new(env.clone()), Some(Rc::clone(offloaded) as _))),
        env,
    )
}

async fn ok(layer: &Layer, command: &str, arguments: Value) {
    let result = layer.execute(command, &arguments).await;
    result.unwrap_or_else(|e| panic!("{command} {arguments}: {}", e.desc));
}

async fn until(env: &RealEnv, what: &str, done: impl Fn() -> bool) {
    for _ in 0..20_000 {
        if done() {
            return;
        }
        env.sleep_until(env.now() + 500_000).await;
    }
    panic!("{what} did not happen within ten seconds");
}

async fn add(layer: &Layer, name: &str, read_only: bool, backing: Value) {
    let options = json!({"driver": "qcow2", "node-name": name, "read-only": read_only, "backing": backing,
                         "file": {"driver": "file", "filename": format!("{name}.qcow2")}});
    ok(layer, "blockdev-add", options).await;
}

/// base <- source, of which `previous` is a copy from before the writes that bitmap `b` marks. Returns these marks.
fn make_source(dir: &Path) -> BTreeSet<usize> {
    let io = |image: &str, commands: &[&str]| {
        let commands: Vec<&str> = commands.iter().flat_map(|c| ["-c", c]).collect();
        let text = run(
            dir,
            "qemu-io",
            &[&["-f", "qcow2"], &commands[..], &[image]].concat(),
        );
        assert!(!text.contains("failed"), "{text}");
    };
    let create = |arguments: &[&str]| {
        qemu_img(dir, &[&["create", "-q", "-f", "qcow2"], arguments].concat());
    };
    create(&["base.qcow2", "4M"]);
    io(
        "base.qcow2",
        &["write -q -P 0xb1 0 3M", "write -q -P 0xb2 3328k 768k"],
    );
    // Smaller clusters than those of the copies, so that some of these are held in part.
    create(&[
        "-o",
        "cluster_size=4096",
        "-F",
        "qcow2",
        "-b",
        "base.qcow2",
        "source.qcow2",
        "4M",
    ]);
    io(
        "source.qcow2",
        &[
            "write -q -P 0xc1 100k 200k",
            "write -q -z 1M 128k",
            "write -q -P 0xc2 2M 5k",
        ],
    );
    qemu_img(dir, &["convert", "-O", "qcow2", "source.qcow2", "previous.qcow2"]);
    qemu_img(dir, &["bitmap", "--add", "-g", "65536", "source.qcow2", "b"]);
    io(
        "source.qcow2",
        &[
            "write -q -P 0xd1 260k 90k",
            "write -q -z 1100k 100k",
            "write -q -P 0xd2 3M 70k",
        ],
    );
    clusters(&[
        (260 << 10, 90 << 10),
        (1100 << 10, 100 << 10),
        (3 << 20, 70 << 10),
    ])
}

/// What a target has below it before the backup: a file and the node of it.
fn below(sync: &str) -> Option<(&'static str, &'static str)> {
    match sync {
        "full" => None,
        "top" => Some(("base.qcow2", "base")),
        "none" => Some(("source.qcow2", "source")),
        _ => Some(("previous.qcow2", "previous")),
    }
}

#[derive(Clone, Copy, Debug)]
struct Case {
    sync: &'static str,
    bitmap_mode: Option<&'static str>,
    /// Cancelled halfway, by force.
    cancelled: bool,
    /// Requests are done in the page cache where they can, or all by the engine.
    inline: bool,
    /// What is copied is compressed.
    compress: bool,
    /// Storage copies by itself.
    offload: bool,
}

/// What was seen in the directory of a case.
struct Seen {
    /// Marked by `b` before the backup, guests' writes in the layer included.
    before: BTreeSet<usize>,
    written: Rc<Written>,
    /// Requests done while the job stood still.
    beside: usize,
}

/// Copies of the flushed files of a layer at rest; `as_raw` becomes what `qemu-img convert` reads in one of them.
fn copies(dir: &Path, into: &str, image: &str, as_raw: &str) {
    let into = dir.join(into);
    fs::create_dir_all(&into).expect("writable");
    for entry in fs::read_dir(dir).expect("readable") {
        let path = entry.expect("readable").path();
        if path.extension().is_some_and(|e| e == "qcow2") {
            fs::copy(&path, into.join(path.file_name().expect("a file"))).expect("writable");
        }
    }
    qemu_img(&into, &["convert", "-O", "raw", image, as_raw]);
    fs::rename(into.join(as_raw), dir.join(as_raw)).expect("writable");
}

async fn backup(dir: &Path, case: Case, before: BTreeSet<usize>, layer: &Rc<Layer>, env: &RealEnv) -> Seen {
    let (mut before, source) = (before, "source");
    add(layer, "base", true, Value::Null).await;
    add(layer, "previous", true, Value::Null).await;
    add(layer, source, false, json!("base")).await;
    let export = json!({"type": "nbd", "id": "x", "node-name": source, "writable": true});
    ok(layer, "block-export-add", export).await;
    let guest = layer.export("x").expect("just added");
    for (at, byte) in [(1000, 0xe1), (2_600_000, 0xe2)] {
        let data = vec![byte; 3000];
        guest
            .write(at, &data, ReqFlags::empty())
            .await
            .expect("storage works");
        before.extend(clusters(&[(usize::try_from(at).expect("small"), data.len())]));
    }
    guest.flush().await.expect("storage works");
    copies(dir, "instant", "source.qcow2", "instant.raw");
    let written = Written::over(fs::read(dir.join("instant.raw")).expect("just made"));
    add(
        layer,
        "target",
        false,
        below(case.sync).map_or(Value::Null, |(_, node)| json!(node)),
    )
    .await;

    let mut arguments = json!({"job-id": "j", "device": source, "target": "target", "sync": case.sync,
                               "x-perf": {"max-workers": 2, "max-chunk": CLUSTER, "use-copy-range": case.offload}});
    if case.compress {
        arguments["compress"] = json!(true);
    }
    if let Some(mode) = case.bitmap_mode {
        arguments["bitmap"] = json!("b");
        arguments["bitmap-mode"] = json!(mode);
    }
    ok(layer, "blockdev-backup", arguments).await;
    ok(layer, "job-pause", json!({"id": "j"})).await;
    // With a piece of each guest first, so that both want the same cluster at once, and then the rest.
    let half = REQUESTS / 2;
    for number in 0..2 {
        let (layer, written) = (Rc::clone(layer), Rc::clone(&written));
        let task = async move {
            let export = layer.export("x").expect("it stays");
            for n in 0..half {
                request(&export, number, n, &written).await;
            }
            written.guests.set(written.guests.get() + 1);
        };
        env.spawn("guest", Box::pin(task));
    }
    until(env, "the first half of the writes", || written.guests.get() == 2).await;
    let beside = written.requests.get();
    assert!(layer.job("j").is_some(), "a paused job is not over");
    for number in 0..2 {
        let (layer, written) = (Rc::clone(layer), Rc::clone(&written));
        let task = async move {
            let export = layer.export("x").expect("it stays");
            for n in half..REQUESTS {
                request(&export, number, n, &written).await;
            }
            written.guests.set(written.guests.get() + 1);
        };
        env.spawn("guest", Box::pin(task));
    }
    if case.cancelled {
        ok(layer, "block-job-cancel", json!({"device": "j", "force": true})).await;
    } else {
        ok(layer, "job-resume", json!({"id": "j"})).await;
    }
    until(env, "the second half of the writes", || written.guests.get() == 4).await;
    if case.sync == "none" {
        // The instant is there as long as the job is: in the target and, for the rest, in the source below it.
        assert!(
            layer.job("j").is_some(),
            "it copies what guests overwrite, for ever"
        );
        guest.flush().await.expect("storage works");
        ok(
            layer,
            "block-export-add",
            json!({"type": "nbd", "id": "t", "node-name": "target"}),
        )
        .await;
        let target = layer.export("t").expect("just added");
        target.flush().await.expect("storage works");
        copies(dir, "fleecing", "target.qcow2", "target.raw");
        ok(layer, "block-export-del", json!({"id": "t"})).await;
        drop(target);
        ok(layer, "block-job-cancel", json!({"device": "j"})).await;
    }
    until(env, "the end of the job", || layer.job("j").is_none()).await;
    Seen {
        before,
        written,
        beside,
    }
}

/// What bitmap `b` may mark afterwards: at least, and at most.
fn marks(case: Case, seen: &Seen) -> (BTreeSet<usize>, BTreeSet<usize>) {
    let after = seen.written.marks.borrow().clone();
    let both: BTreeSet<usize> = after.union(&seen.before).copied().collect();
    match (case.bitmap_mode, case.cancelled) {
        (Some("on-success" | "always"), false) => (after.clone(), after),
        // What could not be copied stays.
        (Some("always"), true) => (after, both),
        _ => (both.clone(), both),
    }
}

/// What a later backup by bitmap `b` makes of the target: the source as it is then.
fn once_more(dir: &Path, case: Case) {
    qemu_img(dir, &["convert", "-O", "raw", "source.qcow2", "later.raw"]);
    let offloaded = Rc::<Offloaded>::default();
    let (layer, env) = layer(dir, case.inline, &offloaded);
    env.block_on(async {
        add(&layer, "base", true, Value::Null).await;
        add(&layer, "previous", true, Value::Null).await;
        add(&layer, "source", false, json!("base")).await;
        add(&layer, "target", false, json!("previous")).await;
        let arguments = json!({"job-id": "j", "device": "source", "target": "target", "sync": "incremental", "bitmap": "b"});
        ok(&layer, "blockdev-backup", arguments).await;
        until(&env, "the end of the second job", || layer.job("j").is_none()).await;
        layer.shutdown().await;
    });
    same(dir, "target.qcow2", "later.raw");
    sound(dir, "target.qcow2");
    assert_eq!(
        marked(dir),
        BTreeSet::new(),
        "{case:?}: nothing was written since"
    );
}

fn check(case: Case) {
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    let before = make_source(dir);
    let mut create = vec!["create", "-q", "-f", "qcow2"];
    if let Some((file, _)) = below(case.sync) {
        create.extend(["-F", "qcow2", "-b", file]);
    }
    create.extend(["target.qcow2", "4M"]);
    qemu_img(dir, &create);
    let offloaded = Rc::<Offloaded>::default();
    let (layer, env) = layer(dir, case.inline, &offloaded);
    let seen = env.block_on(async {
        let seen = backup(dir, case, before, &layer, &env).await;
        layer.shutdown().await;
        seen
    });
    assert_eq!(
        seen.beside, REQUESTS,
        "{case:?}: both guests wrote beside the job"
    );
    assert_eq!(offloaded.well.get() > 0, case.offload, "{case:?}: {offloaded:?}");
    for image in ["source.qcow2", "target.qcow2"] {
        sound(dir, image);
    }
    // Guests lost nothing.
    fs::write(dir.join("written.raw"), &*seen.written.bytes.borrow()).expect("writable");
    same(dir, "source.qcow2", "written.raw");
    let (least, most) = marks(case, &seen);
    let found = marked(dir);
    assert!(
        least.is_subset(&found) && found.is_subset(&most),
        "{case:?}: {found:?} is not between {least:?} and {most:?}"
    );
    match case.sync {
        _ if case.cancelled => {}
        "none" => {
            let (target, instant) = (
                fs::read(dir.join("target.raw")),
                fs::read(dir.join("instant.raw")),
            );
            assert!(target.expect("made") == instant.expect("made"), "{case:?}");
            let after = &*seen.written.marks.borrow();
            assert_eq!(
                held(dir, "target.qcow2"),
                *after,
                "nothing but what guests overwrote"
            );
        }
        sync => {
            same(dir, "target.qcow2", "instant.raw");
            assert_eq!(!packed(dir).is_empty(), case.compress, "{case:?}");
            let copied = match sync {
                "full" => return,
                "top" => held(&dir.join("instant"), "source.qcow2"),
                _ => seen.before.clone(),
            };
            assert_eq!(held(dir, "target.qcow2"), copied, "{case:?}");
        }
    }
    if case.bitmap_mode.is_some() && !matches!(case.sync, "full" | "top") && case.bitmap_mode != Some("never")
    {
        once_more(dir, case);
    }
}

fn cases(sync: &'static str, bitmap_modes: &[Option<&'static str>], cancelled: bool) {
    if !tools(sync) {
        return;
    }
    for (n, bitmap_mode) in bitmap_modes.iter().enumerate() {
        check(Case {
            sync,
            bitmap_mode: *bitmap_mode,
            cancelled,
            inline: n % 2 == 1,
            compress: false,
            offload: false,
        });
    }
}

#[test]
fn full_copies_are_of_the_instant() {
    cases("full", &[None, None, Some("on-success"), Some("always")], false);
}

#[test]
fn compressed_copies_are_of_the_instant() {
    if !tools("compressed_copies_are_of_the_instant") {
        return;
    }
    for (sync, bitmap_mode) in [("full", None), ("top", None), ("bitmap", Some("always"))] {
        check(Case {
            sync,
            bitmap_mode,
            cancelled: false,
            inline: sync == "top",
            compress: true,
            offload: false,
        });
    }
}

#[test]
fn copies_that_storage_makes_are_of_the_instant() {
    if !tools("copies_that_storage_makes_are_of_the_instant") {
        return;
    }
    for (sync, bitmap_mode, inline) in [
        ("full", None, true),
        ("full", Some("always"), false),
        ("top", None, true),
        ("incremental", Some("on-success"), false),
    ] {
        check(Case {
            sync,
            bitmap_mode,
            cancelled: false,
            inline,
            compress: false,
            offload: true,
        });
    }
}

#[test]
fn copies_of_the_top_layer_are_of_the_instant() {
    cases("top", &[None, None, Some("on-success"), Some("always")], false);
}

#[test]
fn incremental_copies_are_of_the_instant() {
    cases("incremental", &[Some("on-success"), Some("on-success")], false);
}

#[test]
fn copies_by_bitmap_are_of_the_instant() {
    cases(
        "bitmap",
        &[Some("on-success"), Some("never"), Some("always")],
        false,
    );
}

#[test]
fn what_guests_overwrite_is_kept_as_it_was() {
    cases("none", &[None, None], false);
}

#[test]
fn a_cancelled_backup_can_be_made_up_for() {
    cases(
        "bitmap",
        &[Some("on-success"), Some("never"), Some("always")],
        true,
    );
    cases("incremental", &[Some("on-success")], true);
}
