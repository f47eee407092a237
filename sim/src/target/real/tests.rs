//! Tests of the target over real files and devices.

use super::*;
use blkcheck_impl::env::OpenStorage;

use crate::choice::Random;
use crate::generate::{Profile, Reach, generate};
use crate::oracle::OracleName;
use crate::run::Runner;
use crate::scenario::parse::parse;

#[test]
fn file_drivers_become_devices_at_any_depth() {
    let mut command: Value = serde_json::json!({
        "driver": "qcow2", "node-name": "a", "file": {"driver": "file", "filename": "x"},
        "backing": {"driver": "raw", "file": {"driver": "file", "filename": "y"}},
        "options": [{"driver": "qcow2", "file": {"driver": "file", "filename": "z"}}]
    });
    on_devices(command.as_object_mut().unwrap());
    assert_eq!(command["driver"], "qcow2");
    assert_eq!(command["file"]["driver"], "host_device");
    assert_eq!(command["backing"]["file"]["driver"], "host_device");
    assert_eq!(command["options"][0]["file"]["driver"], "host_device");
}

const STREAM: &str = include_str!("../../testdata/stream.json");

/// Runs the stream scenario and generated ones; false when this machine has no such medium.
fn runs(medium: Medium, seeds: u64) -> bool {
    let mut target = match RealTarget::new(medium) {
        Ok(target) => target,
        Err(reason) => {
            assert_ne!(
                std::env::var("BLKCHECK_REQUIRE_ALL").as_deref(),
                Ok("1"),
                "{medium:?}: {reason}"
            );
            eprintln!("SKIPPED {medium:?}: {reason}");
            return false;
        }
    };
    let mut runner = Runner::new();
    let stream = parse("stream.json", STREAM.as_bytes()).expect("a valid scenario");
    let reach = Reach {
        drain: true,
        alignment: false,
        fine_grain: true,
        raw_tails: medium == Medium::File,
        rates: true,
        inline_backing: true,
        reopen: true,
        snapshots: true,
        resize: medium == Medium::File,
        throttle: true,
        bitmaps: medium == Medium::File,
        snapshot_access: medium == Medium::File,
        backup: false,
        discard_source: false,
        compression: false,
    };
    let generated = (0..seeds).map(|seed| generate(seed, Profile::Mixed, reach));
    let mut oracles = crate::oracle::all();
    for scenario in std::iter::once(stream).chain(generated) {
        let mut chooser = Random::new(scenario.seed.unwrap_or(0));
        let result = runner
            .run(&scenario, &mut chooser, &mut target, &mut oracles)
            .expect("usable");
        assert_eq!(result.violation, None, "{medium:?}, seed {:?}", scenario.seed);
    }
    true
}

#[test]
fn scenarios_hold_over_real_files() {
    assert!(runs(Medium::File, 25), "files are everywhere");
}

#[test]
fn scenarios_hold_over_loop_devices() {
    runs(Medium::Loop, 4);
}

#[test]
fn qemu_img_finds_a_damaged_image_and_other_content() {
    if !qemu_img_is_there() {
        assert_ne!(
            std::env::var("BLKCHECK_REQUIRE_ALL").as_deref(),
            Ok("1"),
            "qemu-img is required"
        );
        return eprintln!("SKIPPED: qemu-img is not installed");
    }
    let mut target = RealTarget::new(Medium::File).unwrap();
    let image = r#"{"version":1,"grain":512,"images":[{"file":"a","format":"qcow2","size":65536,
        "cluster-size":512,"fill":[{"offset":0,"length":4096,"stored":"data"}]}],"steps":[]}"#;
    let scenario: Scenario = serde_json::from_str(image).unwrap();
    target.prepare(&scenario).unwrap();
    target.close().unwrap();
    let mut content = vec![0; 65536];
    crate::image::build::content(&scenario.images[0], 0, 512, 0, &mut content);
    let judge = |target: &mut RealTarget, content: &[u8]| target.judge(&[("a", content)]).unwrap();
    assert_eq!(judge(&mut target, &content), None);
    content[5000] = 1;
    let other = judge(&mut target, &content).unwrap();
    assert!(judge(&mut target, &content[..32768]).is_some(), "the size counts");
    assert_eq!(other.oracle, OracleName::Image);
    assert!(other.message.contains("compare"), "{other:?}");
    content[5000] = 0;
    // The refcount table's offset, in the header.
    let file = File::options()
        .write(true)
        .open(target.scratch.path().join("a"))
        .unwrap();
    file.write_all_at(&[0xff; 8], 48).unwrap();
    let damaged = judge(&mut target, &content).unwrap();
    assert!(damaged.message.contains("check"), "{damaged:?}");
}

#[test]
fn a_scenario_reaches_nothing_but_its_images() {
    let mut target = RealTarget::new(Medium::File).unwrap();
    for name in ["../a", "/etc/a", "..", ""] {
        let scenario = Scenario {
            images: vec![Image {
                file: name.into(),
                ..image_of("raw")
            }],
            ..crate::oracle::tests::scenario()
        };
        assert!(
            matches!(target.prepare(&scenario), Err(Trouble::Unusable(_))),
            "{name}"
        );
    }
    let mut scenario = crate::oracle::tests::scenario();
    scenario.images = vec![image_of("raw")];
    target.prepare(&scenario).unwrap();
    let open = |filename| {
        target.inner.layer().unwrap().env().open(&OpenStorage {
            filename,
            kind: blkcheck_impl::env::StorageKind::File,
            writable: false,
            direct: false,
        })
    };
    assert!(open("a").is_ok());
    let refusal = open("/proc/self/status").unwrap_err();
    assert_eq!(
        refusal.desc,
        "Could not open '/proc/self/status': No such file or directory"
    );
}

fn image_of(format: &str) -> Image {
    serde_json::from_value(serde_json::json!({"file": "a", "format": format, "size": 4096})).unwrap()
}
