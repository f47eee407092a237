//! block-stream of a three-layer qcow2 chain (1 GiB, 64 KiB clusters, 683 MiB copied into top), in the same run by
//! this layer, by qemu-storage-daemon, and as `cp` of the same number of bytes. Rates are GiB copied per second, median
//! of the rounds; contenders take turns within a round. `cargo bench -p blkcheck-impl --bench stream`

#![expect(clippy::disallowed_methods, reason = "a bench measures real time")]

mod peers;

use std::fs;
use std::path::Path;
use std::time::Instant;

use blkcheck_impl::real::{Engine, RealOptions};
use peers::daemon::Daemon;
use peers::{MIB, blockdev, chain, layer, median, places, run, seconds, settle, tools};
use serde_json::json;

const LAYERS: [&str; 3] = ["base.qcow2", "mid.qcow2", "work.qcow2"];
const COPIED: f64 = 683.0 / 1024.0;

fn ours(directory: &Path, options: RealOptions) -> f64 {
    let (env, layer) = layer(options);
    env.block_on(async {
        layer
            .execute("blockdev-add", &blockdev(directory, &LAYERS, None))
            .await
            .expect("the chain opens");
        let start = Instant::now();
        layer
            .execute("block-stream", &json!({ "job-id": "job", "device": "top" }))
            .await
            .expect("it starts");
        while layer.job("job").is_some() {
            use blkcheck_impl::env::Env;
            env.sleep_until(env.now() + 200_000).await;
        }
        let seconds = start.elapsed().as_secs_f64();
        layer.shutdown().await;
        seconds
    })
}

/// The daemon's time from the command to BLOCK_JOB_COMPLETED.
fn daemon(directory: &Path, aio: &str) -> f64 {
    let mut daemon = Daemon::start(&[blockdev(directory, &LAYERS, Some(aio))]);
    let start = Instant::now();
    daemon.send("block-stream", &json!({ "job-id": "job", "device": "top" }));
    daemon.until(|m| m["event"] == "BLOCK_JOB_COMPLETED");
    let seconds = start.elapsed().as_secs_f64();
    daemon.quit();
    seconds
}

fn copy(directory: &Path) -> f64 {
    let (from, to) = (directory.join("bytes"), directory.join("bytes.copy"));
    let _ = fs::remove_file(&to);
    let arguments = [
        "--reflink=never",
        "--sparse=never",
        from.to_str().expect("plain"),
        to.to_str().expect("plain"),
    ];
    let seconds = seconds(|| {
        run("cp", &arguments);
    });
    fs::remove_file(to).expect("just written");
    seconds
}

/// A fresh top image, and nothing dirty.
fn prepare(directory: &Path) {
    let _ = fs::remove_file(directory.join("work.qcow2"));
    fs::copy(directory.join("top.qcow2"), directory.join("work.qcow2")).expect("room");
    settle();
}

/// The streamed image stands alone and holds what the chain held.
fn check(directory: &Path) {
    let path = |name: &str| directory.join(name).to_str().expect("plain").to_owned();
    run("qemu-img", &["check", "-q", "-f", "qcow2", &path("work.qcow2")]);
    run(
        "qemu-img",
        &[
            "compare",
            "-q",
            "-f",
            "qcow2",
            "-F",
            "qcow2",
            &path("work.qcow2"),
            &path("top.qcow2"),
        ],
    );
    assert!(
        !run("qemu-img", &["info", &path("work.qcow2")]).contains("backing file:"),
        "still has a backing file"
    );
}

type Contender = (&'static str, Box<dyn Fn(&Path) -> f64>);

fn main() {
    if !tools("stream", &["qemu-img", "qemu-io", "qemu-storage-daemon", "cp"]) {
        return;
    }
    let rounds = std::env::var("BLKCHECK_ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(5);
    let with = |engine| RealOptions {
        engine,
        ..RealOptions::default()
    };
    let contenders: Vec<Contender> = vec![
        ("cp of the same bytes", Box::new(copy)),
        (
            "qemu-storage-daemon, aio=threads",
            Box::new(|dir| daemon(dir, "threads")),
        ),
        (
            "qemu-storage-daemon, aio=io_uring",
            Box::new(|dir| daemon(dir, "io_uring")),
        ),
        (
            "blkcheck-impl",
            Box::new(move |dir| ours(dir, with(Engine::Auto))),
        ),
        (
            "blkcheck-impl, threads",
            Box::new(move |dir| ours(dir, with(Engine::Threads))),
        ),
    ];
    for (place, base) in places() {
        let directory = tempfile::Builder::new()
            .prefix("blkcheck-bench-")
            .tempdir_in(base)
            .expect("a directory");
        let directory = directory.path();
        chain(directory);
        let bytes = vec![0x5a; usize::try_from(683 * MIB).expect("64 bits")];
        fs::write(directory.join("bytes"), bytes).expect("room");
        let mut times = vec![Vec::new(); contenders.len()];
        for _ in 0..rounds {
            for ((name, contender), times) in contenders.iter().zip(&mut times) {
                prepare(directory);
                times.push(contender(directory));
                if !name.starts_with("cp") {
                    check(directory);
                }
            }
        }
        peers::load();
        let rates: Vec<f64> = times.into_iter().map(|t| COPIED / median(t)).collect();
        println!("\nblock-stream, 3 layers, 683 MiB copied, {place}, median of {rounds}");
        println!("{:<36} {:>8} {:>8} {:>10}", "", "GiB/s", "of cp", "of daemon");
        for ((name, _), rate) in contenders.iter().zip(&rates) {
            println!(
                "{name:<36} {rate:>8.2} {:>8.2} {:>10.2}",
                rate / rates[0],
                rate / rates[1].max(rates[2])
            );
        }
    }
}
