//! 4 KiB requests, strided over a three-layer qcow2 chain (1 GiB, 64 KiB clusters, hot page cache): by this layer one
//! at a time and 16 at a time, by `qemu-img bench` at its best depth of 1, 16 and 64, and by the crate imago (one at a
//! time, its synchronous build). Thousands of requests per second, median of the rounds; contenders take turns.
//! `cargo bench -p blkcheck-impl --bench random_io`

#![expect(clippy::disallowed_methods, reason = "a bench measures real time")]

mod peers;

use std::fs;
use std::path::Path;
use std::rc::Rc;
use std::time::Instant;

use blkcheck_impl::io::backend::Backend;
use blkcheck_impl::real::RealOptions;
use blkcheck_impl::types::{Perm, ReqFlags};
use imago::file::File;
use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use peers::{MIB, blockdev, chain, layer, median, places, run, settle, tools};

const LAYERS: [&str; 3] = ["base.qcow2", "mid.qcow2", "work.qcow2"];
const REQUEST: usize = 4096;
const SIZE: u64 = 1024 * MIB;

/// A workload: what it is called, how far apart requests are, how many.
#[derive(Clone, Copy)]
struct Work {
    name: &'static str,
    write: bool,
    step: u64,
    count: u64,
}

const WORKS: [Work; 3] = [
    Work {
        name: "reads, all over the chain",
        write: false,
        step: 7919 * 4096,
        count: 60_000,
    },
    // One request per cluster: two of three copy a cluster from below.
    Work {
        name: "writes, each to another cluster",
        write: true,
        step: 65536 + 4096,
        count: 12_000,
    },
    // 1 MiB + 4 KiB: every cluster is written sixteen times or so; most find it allocated.
    Work {
        name: "writes, coming back to clusters",
        write: true,
        step: MIB + 4096,
        count: 60_000,
    },
];

impl Work {
    fn offset(self, i: u64) -> u64 {
        i * self.step % (SIZE - REQUEST as u64) / 4096 * 4096
    }

    fn rate(self, start: Instant) -> f64 {
        #[expect(clippy::cast_precision_loss, reason = "a hundred thousand")]
        let count = self.count as f64;
        count / start.elapsed().as_secs_f64() / 1000.0
    }
}

fn ours(directory: &Path, work: Work, depth: u64) -> f64 {
    let (env, layer) = layer(RealOptions::default());
    env.block_on(async {
        layer
            .execute("blockdev-add", &blockdev(directory, &LAYERS, None))
            .await
            .expect("the chain opens");
        let main = layer.main("bench").await;
        let top = layer.find_node("top").expect("just added");
        let perm = Perm::CONSISTENT_READ | Perm::WRITE;
        let backend = Rc::new(Backend::new(&layer, top, None, perm, Perm::all(), true).expect("nobody else"));
        drop(main);
        let start = Instant::now();
        let lane = async |first: u64| {
            let mut buf = vec![0x77; REQUEST];
            for i in (first..work.count).step_by(usize::try_from(depth).expect("small")) {
                if work.write {
                    backend
                        .write(work.offset(i), &buf, ReqFlags::empty())
                        .await
                        .expect("written");
                } else {
                    backend.read(work.offset(i), &mut buf).await.expect("read");
                }
            }
        };
        let mut lanes: Vec<_> = (0..depth).map(|first| Some(Box::pin(lane(first)))).collect();
        std::future::poll_fn(|cx| {
            for lane in &mut lanes {
                if lane.as_mut().is_some_and(|l| l.as_mut().poll(cx).is_ready()) {
                    *lane = None;
                }
            }
            if lanes.iter().all(Option::is_none) {
                std::task::Poll::Ready(())
            } else {
                std::task::Poll::Pending
            }
        })
        .await;
        let rate = work.rate(start);
        drop(lanes);
        let main = layer.main("bench").await;
        Rc::into_inner(backend)
            .expect("the lanes are over")
            .remove()
            .await;
        layer.reap().await;
        drop(main);
        layer.shutdown().await;
        rate
    })
}

fn imago(directory: &Path, work: Work) -> f64 {
    let path = directory.join("work.qcow2");
    let image = Qcow2::<File>::builder_path(path)
        .write(work.write)
        .open(PermissiveImplicitOpenGate::default());
    let image = FormatAccess::new(image.expect("the chain opens"));
    let mut buf = vec![0x77; REQUEST];
    let start = Instant::now();
    for i in 0..work.count {
        if work.write {
            image.write(&buf[..], work.offset(i)).expect("written");
        } else {
            image.read(&mut buf[..], work.offset(i)).expect("read");
        }
    }
    work.rate(start)
}

/// The rate `qemu-img bench` itself states, without its start.
fn qemu(directory: &Path, work: Work, depth: u64) -> f64 {
    let (count, depth) = ((work.count / 4).to_string(), depth.to_string());
    let (step, path) = (work.step.to_string(), directory.join("work.qcow2"));
    let mut arguments = vec![
        "bench",
        "-f",
        "qcow2",
        "-t",
        "writeback",
        "-c",
        &count,
        "-d",
        &depth,
        "-s",
        "4096",
    ];
    arguments.extend(["-S", &step, if work.write { "-w" } else { "-q" }]);
    arguments.retain(|a| *a != "-q");
    arguments.push(path.to_str().expect("plain"));
    let text = run("qemu-img", &arguments);
    let seconds = text
        .split("completed in ")
        .nth(1)
        .and_then(|t| t.split(' ').next())
        .expect("it says so");
    let seconds: f64 = seconds.parse().expect("a number");
    #[expect(clippy::cast_precision_loss, reason = "a hundred thousand")]
    let requests = (work.count / 4) as f64;
    requests / seconds / 1000.0
}

type Contender = (&'static str, Box<dyn Fn(&Path, Work) -> f64>);

fn main() {
    if !tools("random_io", &["qemu-img", "qemu-io"]) {
        return;
    }
    let rounds = std::env::var("BLKCHECK_ROUNDS")
        .ok()
        .and_then(|n| n.parse().ok())
        .unwrap_or(5);
    let contenders: Vec<Contender> = vec![
        (
            "qemu-img bench, depth 1",
            Box::new(|dir, work| qemu(dir, work, 1)),
        ),
        (
            "qemu-img bench, depth 16",
            Box::new(|dir, work| qemu(dir, work, 16)),
        ),
        (
            "qemu-img bench, depth 64",
            Box::new(|dir, work| qemu(dir, work, 64)),
        ),
        ("imago 0.2.6, sync", Box::new(imago)),
        ("blkcheck-impl, depth 1", Box::new(|dir, work| ours(dir, work, 1))),
        (
            "blkcheck-impl, depth 16",
            Box::new(|dir, work| ours(dir, work, 16)),
        ),
    ];
    for (place, base) in places() {
        let directory = tempfile::Builder::new()
            .prefix("blkcheck-bench-")
            .tempdir_in(base)
            .expect("a directory");
        let directory = directory.path();
        chain(directory);
        for work in WORKS {
            let mut rates = vec![Vec::new(); contenders.len()];
            for _ in 0..rounds {
                for ((_, contender), rates) in contenders.iter().zip(&mut rates) {
                    fs::copy(directory.join("top.qcow2"), directory.join("work.qcow2")).expect("room");
                    settle();
                    rates.push(contender(directory, work));
                    let image = directory.join("work.qcow2");
                    run(
                        "qemu-img",
                        &["check", "-q", "-f", "qcow2", image.to_str().expect("plain")],
                    );
                }
            }
            peers::load();
            let rates: Vec<f64> = rates.into_iter().map(median).collect();
            let best = rates[0].max(rates[1]).max(rates[2]);
            println!("\n4 KiB {}, 3 layers, {place}, median of {rounds}", work.name);
            println!("{:<28} {:>10} {:>10} {:>9}", "", "k/s", "of qemu", "of imago");
            for ((name, _), rate) in contenders.iter().zip(&rates) {
                println!(
                    "{name:<28} {rate:>10.1} {:>10.2} {:>9.2}",
                    rate / best,
                    rate / rates[3]
                );
            }
        }
    }
}
