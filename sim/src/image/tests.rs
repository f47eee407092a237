//! Images against themselves and against `qemu-img`, where it is installed.

use std::process::Command;

use super::build::build;
use super::check::{Problem, Severity, check, check_with_snapshots};
use super::read::{Content, Files, content};
use crate::scenario::{Fill, Format, Image, Stored};

fn image(file: &str, size: u64, cluster_size: u32, fills: &[(u64, u64, Stored)]) -> Image {
    Image {
        file: file.into(),
        format: Format::Qcow2,
        size,
        cluster_size,
        compat: 3,
        refcount_bits: 16,
        backing_file: None,
        backing_format: None,
        free: 0,
        fill: fills
            .iter()
            .map(|&(offset, length, stored)| Fill {
                offset,
                length,
                stored,
            })
            .collect(),
    }
}

struct Built(Vec<(String, Format, Vec<u8>)>);

impl Files for Built {
    fn file(&self, name: &str) -> Option<(&[u8], Format)> {
        self.0.iter().find(|f| f.0 == name).map(|f| (&f.2[..], f.1))
    }
}

fn built(images: &[Image], grain: u32) -> Built {
    let one = |(i, image): (usize, &Image)| {
        let mut bytes = Vec::new();
        build(image, u16::try_from(i).expect("few"), grain, &mut bytes);
        (image.file.clone(), image.format, bytes)
    };
    Built(images.iter().enumerate().map(one).collect())
}

#[test]
fn free_clusters_belong_to_nobody_and_are_not_empty() {
    let plain = image("i", 65536, 512, &[(0, 4096, Stored::Data)]);
    let free = Image {
        free: 40,
        ..plain.clone()
    };
    let built = built(&[plain, free], 512);
    let [without, with] = [0, 1].map(|at| &built.0[at].2);
    assert!(with.len() >= without.len() + 40 * 512);
    assert_eq!(check(with), []);
    let used = |bytes: &[u8]| bytes.chunks(512).filter(|c| c.iter().all(|b| *b == 0xa5)).count();
    assert_eq!(used(without), 0);
    assert!((20..40).contains(&used(with)), "{}", used(with));
}

/// A chain over every form, in all shapes that the format has.
fn shapes() -> Vec<Vec<Image>> {
    use Stored::{Compressed, Data, Zero, ZeroAllocated};
    let mut shapes = Vec::new();
    for (compat, refcount_bits) in [(2, 16), (3, 1), (3, 2), (3, 4), (3, 8), (3, 16), (3, 32), (3, 64)] {
        for cluster in [512u32, 4096, 65536, 2 << 20] {
            // The largest clusters with the narrowest and the widest refcounts are enough.
            if cluster > 65536 && ![1, 64].contains(&refcount_bits) {
                continue;
            }
            let c = u64::from(cluster);
            let mut fills = vec![
                (0, c, Data),
                (c + 64, 128, Compressed),
                (2 * c, 3 * c, Compressed),
                (4 * c + 256, 64, Data),
                (7 * c, c / 2, Data),
            ];
            if compat == 3 {
                fills.extend([
                    (5 * c, 2 * c, ZeroAllocated),
                    (7 * c, 64, Zero),
                    (8 * c, 2 * c, Zero),
                ]);
            }
            let mut top = image("top", 70 * c + 512, cluster, &fills);
            (top.compat, top.refcount_bits) = (compat, refcount_bits);
            top.fill.push(Fill {
                offset: 70 * c,
                length: 512,
                stored: Data,
            });
            top.backing_file = Some("mid".into());
            top.backing_format = Some("qcow2".into());
            let mut mid = image("mid", 80 * c, cluster, &[(6 * c, 20 * c, Data)]);
            mid.backing_file = Some("base".into());
            mid.backing_format = Some("raw".into());
            let mut base = image(
                "base",
                9 * c + 512,
                cluster,
                &[(0, 2 * c, Data), (9 * c, 512, Data)],
            );
            base.format = Format::Raw;
            shapes.push(vec![base, mid, top]);
        }
    }
    shapes
}

#[test]
fn every_shape_is_clean_and_reads_as_filled() {
    for images in shapes() {
        // Large clusters only once: their images have tens of megabytes.
        let grains: &[u32] = if images[2].cluster_size > 4096 {
            &[64]
        } else {
            &[16, 64, 4096]
        };
        for &grain in grains {
            let files = built(&images, grain);
            for image in &images[1..] {
                let (bytes, _) = files.file(&image.file).expect("built");
                assert_eq!(check(bytes), [], "{} {}", image.file, image.cluster_size);
            }
            let top = content(&files, "top").expect("readable");
            let mut own = vec![0; top.bytes.len()];
            super::build::content(&images[2], 2, grain, 0, &mut own);
            let mut at = 0;
            for (length, allocated) in &top.allocated {
                let range = at..at + usize::try_from(*length).expect("small");
                if *allocated {
                    assert!(top.bytes[range.clone()] == own[range.clone()], "{range:?}");
                }
                at = range.end;
            }
            assert_eq!(at, own.len());
        }
    }
}

#[test]
fn later_fills_cover_earlier_ones_and_forms_follow() {
    use Stored::{Compressed, Data, Zero, ZeroAllocated};
    let fills = [
        (0, 1024, Data),
        (0, 64, Zero),
        (512, 512, ZeroAllocated),
        (1024, 64, Zero),
        (1024, 64, Compressed),
    ];
    let image = image("a", 4096, 512, &fills);
    assert_eq!(
        super::build::forms(&image),
        [(0, Data), (1, ZeroAllocated), (2, Compressed)]
    );
    let files = built(&[image], 64);
    let Content { bytes, allocated } = content(&files, "a").expect("readable");
    let zero = |range: std::ops::Range<usize>| bytes[range].iter().all(|&b| b == 0);
    assert!(zero(0..64) && !zero(64..128) && zero(512..1024) && !zero(1024..1088) && zero(1088..1536));
    assert_eq!(allocated, [(1536, true), (2560, false)]);
}

/// One reader for a whole chain says the same as one per image, in any order; circles and gaps are errors.
#[test]
fn images_are_read_once_and_wrong_chains_are_errors() {
    let images = &shapes()[0];
    let files = built(images, 64);
    let mut reader = super::read::Reader::new(&files);
    for name in ["mid", "top", "base", "mid"] {
        assert_eq!(reader.content(name).cloned(), content(&files, name), "{name}");
    }
    let mut circle = images.clone();
    (circle[1].backing_file, circle[1].backing_format) = (Some("top".into()), None);
    let text = content(&built(&circle, 64), "top").expect_err("a circle");
    assert!(text.contains("circle"), "{text}");
    let text = content(&built(&images[1..], 64), "top").expect_err("a gap");
    assert!(text.contains("no file 'base'"), "{text}");
}

/// Each kind of damage is seen, and is called what it is.
#[test]
fn the_checker_sees_damage() {
    let base = image(
        "a",
        1 << 16,
        512,
        &[(0, 2048, Stored::Data), (2048, 512, Stored::Compressed)],
    );
    let mut clean = Vec::new();
    build(&base, 0, 64, &mut clean);
    // Clusters: 0 header, 1 refcount table, 2 refcount block, 3 L1, 4 L2, 5.. data, 9 compressed.
    let l2 = 4 * 512;
    let damaged = |at: usize, value: &[u8]| {
        let mut bytes = clean.clone();
        bytes[at..at + value.len()].copy_from_slice(value);
        check(&bytes)
            .into_iter()
            .map(|p| (p.severity, p.text))
            .collect::<Vec<_>>()
    };
    let has = |problems: &[(Severity, String)], severity, text: &str| {
        assert!(
            problems.iter().any(|(s, t)| *s == severity && t.contains(text)),
            "{text}: {problems:?}"
        );
    };
    assert_eq!(check(&clean), []);
    let too_high = damaged(2 * 512 + 2 * 5 + 1, &[2]);
    has(&too_high, Severity::Leak, "used 1 times, its refcount is 2");
    has(&too_high, Severity::Corruption, "COPIED is true");
    has(
        &damaged(2 * 512 + 2 * 5 + 1, &[0]),
        Severity::Corruption,
        "its refcount is 0",
    );
    has(
        &damaged(l2, &clean[l2 + 8..l2 + 16]),
        Severity::Corruption,
        "overlaps",
    );
    has(&damaged(l2, &[0]), Severity::Corruption, "COPIED is false");
    has(&damaged(l2 + 4, &[0xff]), Severity::Corruption, "past the end");
    has(&damaged(l2 + 7, &[4]), Severity::Corruption, "reserved bits");
    has(&damaged(3 * 512, &[0; 8]), Severity::Leak, "used 0 times");
    has(&damaged(79, &[1]), Severity::Corruption, "incompatible");
    has(&damaged(0, &[0]), Severity::Corruption, "magic");
}

#[test]
fn the_checker_sees_a_cluster_in_two_places_beside_snapshots() {
    let base = image("a", 1 << 16, 512, &[(0, 2048, Stored::Data)]);
    let mut bytes = Vec::new();
    build(&base, 0, 64, &mut bytes);
    // Clusters as above. The first two guest clusters are both at cluster 5 with a right refcount; nobody has cluster 6.
    let (l2, refcounts) = (4 * 512, 2 * 512);
    for entry in [l2, l2 + 8] {
        bytes[entry..entry + 8].copy_from_slice(&(5_u64 * 512).to_be_bytes());
    }
    bytes[refcounts + 2 * 5 + 1] = 2;
    bytes[refcounts + 2 * 6 + 1] = 0;
    // A snapshot of nothing, its table in a cluster of its own at the end.
    let table = bytes.len().next_multiple_of(512);
    bytes.resize(table + 512, 0);
    bytes[refcounts + 2 * (table / 512) + 1] = 1;
    bytes[60..64].copy_from_slice(&1_u32.to_be_bytes());
    bytes[64..72].copy_from_slice(&(table as u64).to_be_bytes());
    let problems = check_with_snapshots(&bytes);
    let [Problem { severity, text }] = &problems[..] else {
        panic!("{problems:?}")
    };
    assert_eq!(*severity, Severity::Corruption);
    assert_eq!(
        text,
        "the active tables have data cluster and data cluster at 0xa00"
    );
}

#[test]
fn hostile_bytes_never_panic() {
    let mut rng = crate::rng::Rng::stream(1, crate::rng::Stream::Workload);
    let base = image(
        "a",
        1 << 16,
        512,
        &[(0, 2048, Stored::Data), (2048, 512, Stored::Compressed)],
    );
    let mut clean = Vec::new();
    build(&base, 0, 64, &mut clean);
    let mut noticed = 0;
    for _ in 0..1000 {
        let mut bytes = clean.clone();
        for _ in 0..=rng.below(3) {
            // Half of the damage goes to the header, where it hurts most.
            let limit = if rng.one_in(2) { 112 } else { bytes.len() };
            let at = rng.below(u32::try_from(limit).expect("small")) as usize;
            bytes[at] = rng.next_u64().to_le_bytes()[0];
        }
        bytes.truncate(
            if rng.one_in(4) {
                rng.below(6000) as usize
            } else {
                usize::MAX
            }
            .min(bytes.len()),
        );
        noticed += u32::from(!check(&bytes).is_empty());
        let _ = content(&Built(vec![("a".into(), Format::Qcow2, bytes)]), "a");
    }
    assert!(noticed > 170, "{noticed}");
}

#[test]
fn qemu_img_agrees() {
    if Command::new("qemu-img").arg("--version").output().is_err() {
        eprintln!("SKIPPED: qemu-img is not installed, images were not compared with QEMU's view");
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    for images in shapes() {
        if images[2].cluster_size > 65536 {
            continue;
        }
        let files = built(&images, 64);
        for (name, _, bytes) in &files.0 {
            std::fs::write(dir.path().join(name), bytes).expect("written");
        }
        let run = |args: &[&str]| {
            let output = Command::new("qemu-img")
                .args(args)
                .current_dir(dir.path())
                .output()
                .expect("runs");
            let text = String::from_utf8_lossy(&output.stderr).into_owned()
                + &String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success(), "{args:?} on {:?}: {text}", images[2]);
            output.stdout
        };
        for name in ["mid", "top"] {
            run(&["check", "-q", name]);
        }
        run(&["convert", "-O", "raw", "top", "flat"]);
        let flat = std::fs::read(dir.path().join("flat")).expect("converted");
        let top = content(&files, "top").expect("readable");
        assert!(flat == top.bytes, "content of {:?}", images[2]);
        let map: serde_json::Value =
            serde_json::from_slice(&run(&["map", "--output=json", "top"])).expect("JSON");
        let mut at = 0;
        let mut own = top.allocated.iter();
        let (mut end, mut allocated) = (0, false);
        for extent in map.as_array().expect("array") {
            let (start, length) = (
                extent["start"].as_u64().expect("u64"),
                extent["length"].as_u64().expect("u64"),
            );
            assert_eq!(start, at);
            let mut rest = length;
            while rest > 0 {
                if end == 0 {
                    (end, allocated) = *own.next().expect("covered");
                }
                let step = rest.min(end);
                // Depth 0 with `present` is this layer; unallocated everywhere is depth 0 without it.
                let here = extent["depth"] == 0 && extent["present"] == true;
                assert_eq!(here, allocated, "at {at} of {:?}: {extent}", images[2]);
                (rest, end, at) = (rest - step, end - step, at + step);
            }
        }
    }
}
