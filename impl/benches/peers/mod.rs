//! Shared by the benches, none of which uses all of it: hence no warnings of dead code.
//! Images made by qemu-img, the layer opened over them, tables, and the loud skip.

#![allow(dead_code)]

pub(crate) mod daemon;

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use blkcheck_impl::Layer;
use blkcheck_impl::real::{RealEnv, RealOptions};
use serde_json::{Value, json};

pub(crate) const MIB: u64 = 1 << 20;

/// Whether these programs can be run; says so when not, and fails when `BLKCHECK_REQUIRE_ALL=1`.
pub(crate) fn tools(bench: &str, programs: &[&str]) -> bool {
    for program in programs {
        let found = Command::new(program)
            .arg("--version")
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status();
        if found.is_err() {
            assert_ne!(
                std::env::var("BLKCHECK_REQUIRE_ALL").as_deref(),
                Ok("1"),
                "{program} is required"
            );
            println!(
                "SKIPPED {bench}: the peer {program} is not installed, and figures without a peer mean nothing"
            );
            return false;
        }
    }
    true
}

/// Directories to measure in: memory, and the disk under the target directory.
pub(crate) fn places() -> Vec<(&'static str, PathBuf)> {
    let disk = std::env::var_os("CARGO_TARGET_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
    fs::create_dir_all(&disk).expect("the target directory");
    let mut places = vec![("disk", disk)];
    if Path::new("/dev/shm").is_dir() {
        places.insert(0, ("tmpfs", "/dev/shm".into()));
    }
    places
}

/// Runs a program to its end and returns its output.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .expect("checked to be there");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {text}{}",
        String::from_utf8_lossy(&output.stderr)
    );
    text
}

/// Base, mid and top of 1 GiB, 64 KiB clusters; each holds every third MiB, so that 683 MiB lie below top.
pub(crate) fn chain(directory: &Path) {
    let mut below: Option<&str> = None;
    for (layer, name) in ["base.qcow2", "mid.qcow2", "top.qcow2"].into_iter().enumerate() {
        let path = directory.join(name);
        let path = path.to_str().expect("a plain path");
        let mut arguments = vec!["create", "-q", "-f", "qcow2"];
        if let Some(below) = below {
            arguments.extend(["-b", below, "-F", "qcow2"]);
        }
        arguments.extend([path, "1G"]);
        run("qemu-img", &arguments);
        let mut script = String::new();
        for mib in (0..1024).filter(|mib| mib % 3 == layer) {
            writeln!(script, "write -P {} {mib}M 1M", 1 + mib % 250).expect("memory");
        }
        qemu_io(path, &script);
        below = Some(name);
    }
}

/// Feeds commands to qemu-io.
pub(crate) fn qemu_io(path: &str, script: &str) {
    use std::io::Write as _;
    let mut child = Command::new("qemu-io")
        .args(["-f", "qcow2", "-t", "writeback", path])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .spawn()
        .expect("checked to be there");
    child
        .stdin
        .take()
        .expect("piped")
        .write_all(script.as_bytes())
        .expect("it reads its commands");
    assert!(child.wait().expect("it ends").success());
}

/// `-blockdev` of a chain of the named images, top last; every node named `n0`, `n1`, …, the top one `top`.
pub(crate) fn blockdev(directory: &Path, names: &[&str], aio: Option<&str>) -> Value {
    let mut below = Value::Null;
    for (i, name) in names.iter().enumerate() {
        let mut file = json!({ "driver": "file", "filename": directory.join(name).to_str() });
        if let Some(aio) = aio {
            file["aio"] = json!(aio);
        }
        let node = if i + 1 == names.len() {
            "top".to_owned()
        } else {
            format!("n{i}")
        };
        let mut image = json!({ "driver": "qcow2", "node-name": node, "file": file, "backing": below });
        if i == 0 {
            image.as_object_mut().expect("an object").remove("backing");
        }
        below = image;
    }
    below
}

/// A layer over real files.
pub(crate) fn layer(options: RealOptions) -> (RealEnv, Layer) {
    let env = RealEnv::new(options).expect("an engine");
    let layer = Layer::new(std::rc::Rc::new(env.clone()), None);
    (env, layer)
}

/// Writes out what is dirty, so that one contender does not pay for another.
pub(crate) fn settle() {
    run("sync", &[]);
}

/// Median seconds of `rounds` runs, each prepared outside the measured time. Contenders take turns elsewhere.
pub(crate) fn median(mut seconds: Vec<f64>) -> f64 {
    seconds.sort_by(f64::total_cmp);
    seconds[seconds.len() / 2]
}

/// Seconds of one call.
pub(crate) fn seconds(work: impl FnOnce()) -> f64 {
    let start = Instant::now();
    work();
    start.elapsed().as_secs_f64()
}

/// Prints the load average: with other work on the machine, contenders with more threads get more of it.
pub(crate) fn load() {
    let load = fs::read_to_string("/proc/loadavg").unwrap_or_default();
    println!(
        "\nload average over the last minute: {}",
        load.split(' ').next().unwrap_or("unknown")
    );
}
