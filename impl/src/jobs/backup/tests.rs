//! Whole backups with real drivers: content for every mode, bitmaps, event scripts, refusals.

use serde_json::{Value, json};

use crate::dirty::DirtyBitmap;
use crate::jobs::JobStatus;
use crate::jobs::testing::{KIB, MIB, World};

pub(super) const CLUSTER: u64 = 64 * KIB;

/// `src`: 1 MiB over `base`, the odd clusters up to 12 its own; `tgt` and `other`, empty.
pub(super) fn world() -> World {
    let world = World::new(1);
    world.qcow2("base", MIB, None);
    world.qcow2("src", MIB, Some(("base", "qcow2")));
    for name in ["tgt", "other"] {
        world.qcow2(name, MIB, None);
        world.open(name, name, json!({}));
    }
    world.open("base", "base", json!({}));
    world.fill("base", 0, 10 * CLUSTER, 9);
    world.open("src", "src", json!({"backing": "base"}));
    for cluster in [1, 3, 5, 7, 9, 11] {
        world.fill("src", cluster * CLUSTER, CLUSTER, 3);
    }
    world.log.script.take();
    world
}

fn with(mut arguments: Value, more: Value) -> Value {
    if let (Some(all), Value::Object(more)) = (arguments.as_object_mut(), more) {
        all.extend(more);
    }
    arguments
}

pub(super) fn backup(more: Value) -> Value {
    with(
        json!({"job-id": "j", "device": "src", "target": "tgt", "sync": "full", "filter-node-name": "f"}),
        more,
    )
}

impl World {
    pub(super) fn bitmap(&self, node: &str, name: &str) -> std::rc::Rc<DirtyBitmap> {
        let id = self.layer.find_node(node).expect("a node");
        self.layer.node(id).bitmap(name).expect("a bitmap")
    }

    /// Bits of a bitmap of the source, and whether it records and is in use.
    pub(super) fn marks(&self, name: &str) -> (Vec<u64>, bool, bool) {
        let bitmap = self.bitmap("src", name);
        let bits = bitmap.bits.borrow().runs().flatten().collect();
        (bits, bitmap.is_recording(), bitmap.busy.get())
    }

    pub(super) fn add_bitmap(&self, name: &str) {
        self.qmp("block-dirty-bitmap-add", json!({"node": "src", "name": name}));
    }
}

#[test]
fn the_target_is_the_point_in_time_whatever_guests_write() {
    let clusters: [(&str, Vec<u64>); 5] = [
        ("full", (0..16).collect()),
        ("top", vec![1, 3, 5, 7, 9, 11]),
        ("incremental", vec![2, 3, 15]),
        ("bitmap", vec![2, 3, 15]),
        ("none", vec![0, 3, 12]),
    ];
    for (sync, copied) in clusters {
        let world = world();
        world.add_bitmap("b");
        let mut more = json!({"sync": sync, "speed": 1});
        if sync == "incremental" || sync == "bitmap" {
            for at in [2, 15] {
                world.fill("src", at * CLUSTER + 512, 512, 4);
            }
            world.fill("src", 3 * CLUSTER, 512, 5);
            more = with(more, json!({"bitmap": "b", "bitmap-mode": "on-success"}));
        }
        let before = world.read_all("src");
        world.qmp("blockdev-backup", backup(more));
        // One in its place of each kind: copied by now or not, in the first layer or below, at the end.
        for at in [0, 3, 12] {
            world.fill("f", at * CLUSTER + 1024, 512, 0x77);
        }
        if sync == "none" {
            world.qmp("job-cancel", json!({"id": "j"}));
        } else {
            world.qmp("block-job-set-speed", json!({"device": "j", "speed": 0}));
        }
        world.until("j", JobStatus::Null);
        let mut expected = vec![0; before.len()];
        for at in copied {
            let range = crate::io::size(at * CLUSTER)..crate::io::size((at + 1) * CLUSTER);
            expected[range.clone()].copy_from_slice(&before[range]);
        }
        assert!(world.read_all("tgt") == expected, "{sync}");
        assert_eq!(world.read_all("src")[1024], 0x77);
        world.assert_clean();
    }
}

#[test]
fn event_scripts() {
    let world = world();
    let start = ".created .running .paused .running";
    world.qmp("blockdev-backup", backup(json!({})));
    world.until("j", JobStatus::Null);
    assert_eq!(
        world.take_script(),
        format!("{start} .waiting .pending COMPLETED .concluded .null")
    );
    // A none backup can only be cancelled.
    let manual = json!({"sync": "none", "auto-finalize": false, "auto-dismiss": false});
    world.qmp("blockdev-backup", backup(manual));
    world.settle();
    world.refused(
        "job-complete",
        json!({"id": "j"}),
        "Job 'j' in state 'running' cannot accept command verb 'complete'",
    );
    world.qmp("job-pause", json!({"id": "j"}));
    world.until("j", JobStatus::Paused);
    world.refused("job-pause", json!({"id": "j"}), "Job is already paused");
    world.refused(
        "block-job-cancel",
        json!({"device": "j"}),
        "The block job for device 'j' is currently paused",
    );
    world.qmp("job-resume", json!({"id": "j"}));
    world.until("j", JobStatus::Running);
    world.qmp("block-job-cancel", json!({"device": "j"}));
    world.until("j", JobStatus::Concluded);
    world.qmp("job-dismiss", json!({"id": "j"}));
    assert_eq!(
        world.take_script(),
        format!("{start} .paused .running .aborting CANCELLED .concluded .null")
    );
    // Pending: the filter stays, all is copied.
    let manual = json!({"auto-finalize": false, "filter-node-name": "f"});
    world.qmp("blockdev-backup", backup(manual));
    world.until("j", JobStatus::Pending);
    assert!(world.layer.find_node("f").is_some());
    world.qmp("job-finalize", json!({"id": "j"}));
    assert_eq!(
        world.take_script(),
        format!("{start} .waiting .pending PENDING COMPLETED .concluded .null")
    );
    assert!(world.layer.find_node("f").is_none());
    // Cancelled while pending.
    world.qmp("blockdev-backup", backup(json!({"auto-finalize": false})));
    world.until("j", JobStatus::Pending);
    world.qmp("job-cancel", json!({"id": "j"}));
    assert_eq!(
        world.take_script(),
        format!("{start} .waiting .pending PENDING .aborting CANCELLED .concluded .null")
    );
    world.assert_clean();
}

#[test]
fn refusals_in_order() {
    let world = world();
    world.add_bitmap("b");
    world.qcow2("small", MIB / 2, None);
    world.open("small", "small", json!({}));
    world.qcow2("locked", MIB, None);
    world.open("locked", "locked", json!({"read-only": true}));
    let raw = json!({"driver": "raw", "node-name": "raw", "file": "other"});
    world.qmp("blockdev-add", raw);
    let cases = [
        (
            json!({"device": "x", "target": "y"}),
            "Cannot find device='x' nor node-name='x'",
        ),
        (
            json!({"target": "y", "sync": "bitmap"}),
            "Cannot find device='y' nor node-name='y'",
        ),
        (
            json!({"sync": "bitmap"}),
            "must provide a valid bitmap name for 'bitmap' sync mode",
        ),
        (
            json!({"sync": "incremental"}),
            "must provide a valid bitmap name for 'incremental' sync mode",
        ),
        (
            json!({"sync": "incremental", "bitmap": "x", "bitmap-mode": "never"}),
            "Bitmap sync mode must be 'on-success' when using sync mode 'incremental'",
        ),
        (
            json!({"sync": "incremental", "bitmap": "x"}),
            "Bitmap 'x' could not be found",
        ),
        (
            json!({"sync": "bitmap", "bitmap": "b"}),
            "Bitmap sync mode must be given when providing a bitmap",
        ),
        (
            json!({"sync": "none", "bitmap": "b", "bitmap-mode": "never"}),
            "sync mode 'none' does not produce meaningful bitmap outputs",
        ),
        (
            json!({"sync": "top", "bitmap": "b", "bitmap-mode": "never"}),
            "Bitmap sync mode 'never' has no meaningful effect when combined with sync mode 'top'",
        ),
        (
            json!({"bitmap-mode": "always", "target": "src"}),
            "Cannot specify bitmap sync mode without a bitmap",
        ),
        (
            json!({"target": "src", "compress": true}),
            "Source and target cannot be the same",
        ),
        (
            json!({"target": "raw", "compress": true}),
            "Compression is not supported for this drive ",
        ),
        (
            json!({"x-perf": {"max-workers": 0}}),
            "max-workers must be between 1 and 2147483647",
        ),
        (
            json!({"x-perf": {"max-chunk": -1}}),
            "max-chunk must be zero (which means no limit) or positive",
        ),
        (
            json!({"target": "small", "x-perf": {"max-chunk": 1}}),
            "Source and target image have different sizes",
        ),
        (
            json!({"x-perf": {"min-cluster-size": -1}}),
            "min-cluster-size too large: 18446744073709551615 > 9223372036854775807",
        ),
        (
            json!({"x-perf": {"min-cluster-size": 1000}}),
            "Could not create node: Cannot create block-copy-state: min-cluster-size needs to be a power of 2",
        ),
        (
            json!({"filter-node-name": "base"}),
            "Could not create node: Duplicate nodes with node-name='base'",
        ),
        (
            json!({"target": "locked"}),
            "Could not create node: Block node is read-only",
        ),
        (
            json!({"x-perf": {"max-chunk": 512}, "job-id": "1"}),
            "Required max-chunk (512) is less than backup cluster size (65536)",
        ),
        (json!({"job-id": "1j"}), "Invalid job ID '1j'"),
        (
            json!({"speed": -1}),
            "Parameter 'speed' expects a non-negative value",
        ),
        (
            json!({"x-perf": {"foo": 1}}),
            "Parameter 'x-perf.foo' is unexpected",
        ),
    ];
    for (more, text) in cases {
        world.log.script.take();
        world.refused("blockdev-backup", backup(more.clone()), text);
        let script = world.take_script();
        let made = if text.contains("speed") {
            ".created .null"
        } else {
            ""
        };
        assert_eq!(script, made, "{more}");
    }
    let bitmap = |more| with(backup(json!({"bitmap": "b", "bitmap-mode": "always"})), more);
    world.refused(
        "blockdev-backup",
        bitmap(json!({"target": "small"})),
        "Source and target image have different sizes",
    );
    assert_eq!(world.marks("b"), (vec![], true, false), "no successor is left");
    world.bitmap("src", "b").read_only.set(true);
    let text = "Bitmap 'b' is readonly and cannot be modified";
    world.refused("blockdev-backup", bitmap(json!({"target": "small"})), text);
    world.bitmap("src", "b").read_only.set(false);
    world.bitmap("src", "b").busy.set(true);
    let text = "Bitmap 'b' is currently in use by another operation and cannot be used";
    world.refused("blockdev-backup", bitmap(json!({"sync": "none"})), text);
}

#[test]
fn a_target_that_its_source_stands_on_is_refused_at_the_last_step() {
    let world = world();
    world.log.script.take();
    let refused = world.try_qmp(
        "blockdev-backup",
        backup(json!({"target": "base", "filter-node-name": "f"})),
    );
    assert_eq!(
        refused.expect_err("refused").desc,
        "Permission conflict on node 'base': permissions 'write' are both required by node 'f' (uses node 'base' as \
         'target' child) and unshared by node 'src' (uses node 'base' as 'backing' child)."
    );
    assert_eq!(world.take_script(), ".created .null");
    world.assert_clean();
}

/// The end of a backup with a bitmap, with a write to cluster 8 while it runs.
fn outcome(mode: &str, sync: &str, how: &str) -> (Vec<u64>, bool, bool) {
    let world = world();
    world.add_bitmap("b");
    for cluster in [1, 3, 5] {
        world.fill("src", cluster * CLUSTER, 512, 4);
    }
    let more = json!({"bitmap": "b", "bitmap-mode": mode, "sync": sync, "speed": 1, "auto-finalize": false,
        "x-perf": {"max-workers": 1, "max-chunk": CLUSTER}});
    world.qmp("blockdev-backup", backup(more));
    assert_eq!(
        world.marks("b"),
        (vec![1, 3, 5], true, true),
        "frozen, while the successor records"
    );
    let refused = world.try_qmp("block-dirty-bitmap-clear", json!({"node": "src", "name": "b"}));
    assert_eq!(
        refused.expect_err("in use").desc,
        "Bitmap 'b' is currently in use by another operation and cannot be used"
    );
    world.fill("f", 8 * CLUSTER, 512, 5);
    if how == "running" {
        world.qmp("job-cancel", json!({"id": "j"}));
    } else {
        world.qmp("block-job-set-speed", json!({"device": "j", "speed": 0}));
        world.until("j", JobStatus::Pending);
        let verb = if how == "success" {
            "job-finalize"
        } else {
            "job-cancel"
        };
        world.qmp(verb, json!({"id": "j"}));
    }
    world.until("j", JobStatus::Null);
    world.assert_clean();
    world.marks("b")
}

#[test]
fn bitmaps_in_the_end() {
    let kept = vec![1, 3, 5, 8];
    for (mode, sync, how, marks) in [
        ("on-success", "bitmap", "success", vec![8]),
        ("on-success", "bitmap", "pending", kept.clone()),
        ("on-success", "bitmap", "running", kept.clone()),
        ("on-success", "full", "success", vec![8]),
        ("on-success", "full", "running", kept.clone()),
        ("never", "bitmap", "success", kept.clone()),
        ("never", "bitmap", "running", kept),
        ("always", "bitmap", "success", vec![8]),
        // All was copied.
        ("always", "bitmap", "pending", vec![8]),
        // Cluster 1 was copied, 8 by the guest, who marked it.
        ("always", "bitmap", "running", vec![3, 5, 8]),
    ] {
        assert_eq!(
            outcome(mode, sync, how),
            (marks, true, false),
            "{mode} {sync} {how}"
        );
    }
}

#[test]
fn incremental_backups_add_up() {
    let world = world();
    world.add_bitmap("b");
    let all = json!({"bitmap": "b", "bitmap-mode": "on-success"});
    world.qmp("blockdev-backup", backup(all));
    world.until("j", JobStatus::Null);
    for round in 1..4 {
        world.fill("src", round * 3 * CLUSTER + 100, 70_000, 0x60);
        let more = json!({"sync": "incremental", "bitmap": "b", "speed": 1});
        world.qmp("blockdev-backup", backup(more));
        let then = world.read_all("src");
        world.fill("f", round * 2 * CLUSTER, 5, 0x61);
        world.qmp("block-job-set-speed", json!({"device": "j", "speed": 0}));
        world.until("j", JobStatus::Null);
        assert!(world.read_all("tgt") == then, "round {round}");
    }
}

#[test]
fn a_write_before_the_job_first_runs_is_bound_by_the_bitmap() {
    let world = world();
    world.add_bitmap("b");
    world.fill("src", 2 * CLUSTER, 512, 4);
    // The job parks at once and stays so.
    let target = world.layer.find_node("tgt").expect("a node");
    let drained = world.memory.block_on(world.layer.drained(target));
    let more = json!({"sync": "incremental", "bitmap": "b", "filter-node-name": "f"});
    world.qmp("blockdev-backup", backup(more));
    drop(drained);
    let filter = world.layer.node(world.layer.find_node("f").expect("the filter"));
    let copy = crate::drivers::copy_before_write::block_copy(&filter).expect("a filter");
    assert_eq!(copy.remaining(), CLUSTER, "before it ever ran");
    world.until("j", JobStatus::Null);
    assert!(
        world.read_all("tgt")[..crate::io::size(2 * CLUSTER)]
            .iter()
            .all(|b| *b == 0)
    );
}

#[test]
fn an_odd_length_and_an_empty_image() {
    for length in [0, 512, 3 * CLUSTER + 1536] {
        let world = World::new(1);
        for name in ["src", "tgt"] {
            world.qcow2(name, length, None);
            world.open(name, name, json!({}));
        }
        if length > 0 {
            world.fill("src", 0, length, 7);
        }
        world.log.script.take();
        world.qmp("blockdev-backup", backup(json!({"auto-dismiss": false})));
        world.until("j", JobStatus::Concluded);
        assert!(world.read_all("tgt") == world.read_all("src"));
        let (done, total) = world.layer.job("j").expect("concluded").progress();
        assert_eq!(
            (done, total),
            (length.next_multiple_of(CLUSTER), done),
            "in whole clusters"
        );
    }
}

#[test]
fn discard_source_discards_what_was_copied() {
    let world = World::new(1);
    for name in ["src", "tgt"] {
        world.qcow2(name, MIB, None);
        world.open(name, name, json!({"discard": "unmap"}));
    }
    world.fill("src", 0, 4 * CLUSTER, 7);
    world.qmp("blockdev-backup", backup(json!({"discard-source": true})));
    world.until("j", JobStatus::Null);
    assert!(
        world.read_all("tgt")[..crate::io::size(4 * CLUSTER)]
            .iter()
            .all(|b| *b == 7)
    );
    assert!(world.read_all("src").iter().all(|b| *b == 0));
}

#[test]
fn shutdown_ends_it() {
    let world = world();
    world.add_bitmap("b");
    let more = json!({"bitmap": "b", "bitmap-mode": "on-success", "speed": 1, "auto-dismiss": false});
    world.qmp("blockdev-backup", backup(more));
    world.memory.block_on(world.layer.shutdown());
    assert!(
        world
            .take_script()
            .ends_with(".aborting CANCELLED .concluded .null")
    );
}
