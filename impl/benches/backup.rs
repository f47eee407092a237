//! blockdev-backup, in the same run by this layer and by QEMU: speed and peak memory of `sync=full` of a full image of 1 GiB and
//! of one of 64 GiB that holds next to nothing, beside `qemu-img convert`; and what a guest's 4 KiB write takes when the cluster
//! has to be copied before. Medians; contenders take turns within a round. `cargo bench -p blkcheck-impl --bench backup`

#![expect(clippy::disallowed_methods, reason = "a bench measures real time")]

mod peers;

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::time::Instant;

use blkcheck_impl::env::Env;
use blkcheck_impl::real::{Engine, RealOptions};
use blkcheck_impl::types::ReqFlags;
use peers::daemon::{Daemon, forget_peak, peak};
use peers::{layer, median, places, qemu_io, run, seconds, settle, tools};
use serde_json::{Value, json};

/// Guests' writes under `copy-before-write`, each to another cluster of 64 KiB.
const WRITES: u64 = 12_000;

/// Seconds, and the most memory in MiB that the process had meanwhile (this one: with whatever earlier rounds have left).
type Cost = (f64, f64);

fn path(directory: &Path, name: &str) -> String {
    directory.join(name).to_str().expect("plain").to_owned()
}

fn image(directory: &Path, node: &str, aio: Option<&str>) -> Value {
    let mut file = json!({ "driver": "file", "filename": path(directory, &format!("{node}.qcow2")) });
    if let Some(aio) = aio {
        file["aio"] = json!(aio);
    }
    json!({ "driver": "qcow2", "node-name": node, "file": file })
}

fn backup(offload: bool) -> Value {
    json!({ "job-id": "job", "device": "source", "target": "target", "sync": "full",
            "x-perf": { "use-copy-range": offload } })
}

fn ours(directory: &Path, engine: Engine, offload: bool) -> Cost {
    let (env, layer) = layer(RealOptions {
        engine,
        ..RealOptions::default()
    });
    env.block_on(async {
        for node in ["source", "target"] {
            let added = layer.execute("blockdev-add", &image(directory, node, None)).await;
            added.expect("it opens");
        }
        forget_peak();
        let start = Instant::now();
        layer
            .execute("blockdev-backup", &backup(offload))
            .await
            .expect("it starts");
        while layer.job("job").is_some() {
            env.sleep_until(env.now() + 200_000).await;
        }
        let cost = (start.elapsed().as_secs_f64(), peak("self"));
        layer.shutdown().await;
        cost
    })
}

/// From the command to BLOCK_JOB_COMPLETED.
fn daemon(directory: &Path, aio: &str, offload: bool) -> Cost {
    let mut daemon = Daemon::start(&["source", "target"].map(|node| image(directory, node, Some(aio))));
    let start = Instant::now();
    daemon.send("blockdev-backup", &backup(offload));
    daemon.until(|m| m["event"] == "BLOCK_JOB_COMPLETED");
    let cost = (start.elapsed().as_secs_f64(), daemon.peak());
    daemon.quit();
    cost
}

/// The whole process, into an image that is already there, as for the others. Its memory is not measured.
fn convert(directory: &Path) -> Cost {
    let (from, to) = (path(directory, "source.qcow2"), path(directory, "target.qcow2"));
    let arguments = ["convert", "-n", "-f", "qcow2", "-O", "qcow2", &from, &to];
    let seconds = seconds(|| {
        run("qemu-img", &arguments);
    });
    (seconds, f64::NAN)
}

/// A fresh target, and nothing dirty.
fn prepare(directory: &Path, size: &str) {
    let target = path(directory, "target.qcow2");
    let _ = fs::remove_file(&target);
    run("qemu-img", &["create", "-q", "-f", "qcow2", &target, size]);
    settle();
}

fn check(directory: &Path, compare: bool) {
    let (source, target) = (path(directory, "source.qcow2"), path(directory, "target.qcow2"));
    run("qemu-img", &["check", "-q", "-f", "qcow2", &target]);
    if compare {
        run(
            "qemu-img",
            &["compare", "-q", "-f", "qcow2", "-F", "qcow2", &source, &target],
        );
    }
}

type Contender<T> = (&'static str, Box<dyn Fn(&Path) -> T>);

fn whole_images(place: &str, directory: &Path, size: &str, rounds: usize) {
    let contenders: [Contender<Cost>; 7] = [
        ("qemu-img convert", Box::new(convert)),
        (
            "qemu-storage-daemon, aio=threads",
            Box::new(|dir| daemon(dir, "threads", false)),
        ),
        (
            "qemu-storage-daemon, aio=io_uring",
            Box::new(|dir| daemon(dir, "io_uring", false)),
        ),
        (
            "qemu-storage-daemon, copy-range",
            Box::new(|dir| daemon(dir, "io_uring", true)),
        ),
        ("blkcheck-impl", Box::new(|dir| ours(dir, Engine::Auto, false))),
        (
            "blkcheck-impl, threads",
            Box::new(|dir| ours(dir, Engine::Threads, false)),
        ),
        (
            "blkcheck-impl, copy-range",
            Box::new(|dir| ours(dir, Engine::Auto, true)),
        ),
    ];
    let mut costs = vec![(Vec::new(), Vec::new()); contenders.len()];
    for _ in 0..rounds {
        for ((_, contender), (times, memory)) in contenders.iter().zip(&mut costs) {
            prepare(directory, size);
            let (seconds, mib) = contender(directory);
            times.push(seconds);
            memory.push(mib);
            check(directory, true);
        }
    }
    peers::load();
    println!("\nblockdev-backup sync=full of {size}, {place}, median of {rounds}");
    println!(
        "{:<36} {:>8} {:>11} {:>10} {:>9}",
        "", "seconds", "of convert", "of daemon", "peak MiB"
    );
    let costs: Vec<Cost> = costs.into_iter().map(|(t, m)| (median(t), median(m))).collect();
    for ((name, _), (seconds, mib)) in contenders.iter().zip(&costs) {
        println!(
            "{name:<36} {seconds:>8.3} {:>11.2} {:>10.2} {mib:>9.1}",
            costs[0].0 / seconds,
            costs[1].0.min(costs[2].0).min(costs[3].0) / seconds
        );
    }
}

/// Mean microseconds of a write, one at a time.
#[expect(clippy::cast_precision_loss, reason = "thousands")]
fn mean(seconds: f64) -> f64 {
    seconds / WRITES as f64 * 1e6
}

fn our_writes(directory: &Path) -> f64 {
    let (env, layer) = layer(RealOptions::default());
    env.block_on(async {
        for node in ["source", "target"] {
            let added = layer.execute("blockdev-add", &image(directory, node, None)).await;
            added.expect("it opens");
        }
        let filter = json!({ "driver": "copy-before-write", "node-name": "cbw", "file": "source", "target": "target" });
        layer.execute("blockdev-add", &filter).await.expect("it opens");
        let export = json!({ "type": "nbd", "id": "x", "node-name": "cbw", "writable": true });
        layer.execute("block-export-add", &export).await.expect("it may write");
        let guest = layer.export("x").expect("just added");
        let data = [0x77; 4096];
        let start = Instant::now();
        for n in 0..WRITES {
            let written = guest.write(n * 65536, &data, ReqFlags::empty()).await;
            written.expect("storage works");
        }
        let seconds = start.elapsed().as_secs_f64();
        drop(guest);
        layer.shutdown().await;
        mean(seconds)
    })
}

/// The daemon's block layer in `qemu-img bench`, where no NBD connection is in the way.
fn their_writes(directory: &Path, aio: &str) -> f64 {
    let mut options = "driver=copy-before-write".to_owned();
    for (edge, node) in [("file", "source"), ("target", "target")] {
        let file = path(directory, &format!("{node}.qcow2"));
        write!(
            options,
            ",{edge}.driver=qcow2,{edge}.file.driver=file,{edge}.file.aio={aio},{edge}.file.filename={file}"
        )
        .expect("memory");
    }
    let count = WRITES.to_string();
    let numbers = ["-c", &count, "-d", "1", "-s", "4096", "-S", "65536"];
    let start = ["bench", "-w", "-t", "writeback"];
    let text = run(
        "qemu-img",
        &[&start, &numbers[..], &["--image-opts", &options]].concat(),
    );
    let seconds = text
        .split("completed in ")
        .nth(1)
        .and_then(|t| t.split(' ').next());
    mean(seconds.and_then(|s| s.parse().ok()).expect("it says so"))
}

fn guests_writes(place: &str, directory: &Path, rounds: usize) {
    let contenders: [Contender<f64>; 3] = [
        (
            "qemu-img bench, aio=threads",
            Box::new(|dir| their_writes(dir, "threads")),
        ),
        (
            "qemu-img bench, aio=io_uring",
            Box::new(|dir| their_writes(dir, "io_uring")),
        ),
        ("blkcheck-impl", Box::new(our_writes)),
    ];
    let mut times = vec![Vec::new(); contenders.len()];
    for _ in 0..rounds {
        for ((_, contender), times) in contenders.iter().zip(&mut times) {
            prepare(directory, "1G");
            times.push(contender(directory));
            check(directory, false);
        }
    }
    peers::load();
    println!("\n4 KiB write with its cluster copied before, one at a time, {place}, median of {rounds}");
    println!("{:<36} {:>10} {:>8}", "", "µs (mean)", "of qemu");
    let times: Vec<f64> = times.into_iter().map(median).collect();
    for ((name, _), time) in contenders.iter().zip(&times) {
        println!("{name:<36} {time:>10.1} {:>8.2}", times[0].min(times[1]) / time);
    }
}

/// An image of this size with data in these MiB.
fn make_source(directory: &Path, size: &str, mib: impl Iterator<Item = u64>) {
    let source = path(directory, "source.qcow2");
    let _ = fs::remove_file(&source);
    run("qemu-img", &["create", "-q", "-f", "qcow2", &source, size]);
    let mut script = String::new();
    for mib in mib {
        writeln!(script, "write -P {} {mib}M 1M", 1 + mib % 250).expect("memory");
    }
    qemu_io(&source, &script);
}

fn main() {
    if !tools("backup", &["qemu-img", "qemu-io", "qemu-storage-daemon"]) {
        return;
    }
    let rounds = std::env::var("BLKCHECK_ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(5);
    for (place, base) in places() {
        let directory = tempfile::Builder::new()
            .prefix("blkcheck-bench-")
            .tempdir_in(base)
            .expect("a directory");
        let directory = directory.path();
        make_source(directory, "1G", 0..1024);
        whole_images(place, directory, "1G", rounds);
        guests_writes(place, directory, rounds);
        make_source(directory, "64G", (0..64).map(|gib| gib * 1024 + gib));
        whole_images(place, directory, "64G", rounds);
    }
}
