//! What is left unfilled, and what is stored by half.

use super::*;

/// A read ends early behind the end of the layer right below the one that is filtered, down to where that one ends.
#[test]
fn garbage_is_read_where_a_layer_below_a_filter_with_bottom_has_ended() {
    let over_o = json!({"driver": "qcow2", "node-name": "t", "file": "ft", "backing": "o"});
    let filter = |bottom: Option<&str>| {
        let mut options = json!({"driver": "copy-on-read", "node-name": "c", "file": "t"});
        if let Some(bottom) = bottom {
            options["bottom"] = json!(bottom);
        }
        ("blockdev-add", options)
    };
    let torn = |oracle, at: u64| {
        found(
            oracle,
            &format!("at the end, b at {at:#x} holds neither zeroes nor one whole stamp"),
        )
    };
    let of = |bottom, wrong: &Violation| after(&[reopen(json!([over_o])), filter(bottom)], false, wrong);
    let garbage = Some("cor-bottom-garbage");
    for oracle in [
        OracleName::PointInTime,
        OracleName::Data,
        OracleName::Transparency,
    ] {
        assert_eq!(of(Some("o"), &torn(oracle, 2048)), garbage, "o ends there");
    }
    let behind = torn(OracleName::PointInTime, 2048);
    assert_eq!(of(None, &behind), None, "such reads look no further");
    assert_eq!(
        of(Some("o"), &torn(OracleName::PointInTime, 1536)),
        None,
        "o has that"
    );
    assert_eq!(
        of(Some("o"), &torn(OracleName::PointInTime, 4096)),
        None,
        "and t not that"
    );
    assert_eq!(
        of(Some("o"), &torn(OracleName::Bottom, 2048)),
        None,
        "another oracle"
    );
    assert_eq!(
        after(&[filter(Some("b"))], false, &behind),
        None,
        "b is as long as t"
    );
    let snapshot = found(
        OracleName::PointInTime,
        "snap: read of 512 bytes at 0x0: grain 0xe00 of the snapshot holds neither zeroes nor one whole stamp, expected zeroes",
    );
    assert_eq!(
        of(Some("o"), &snapshot),
        garbage,
        "the grain counts, not the request"
    );
    let old = found(
        OracleName::Data,
        "read at 0x800 holds fill 0 of image b, expected zeroes",
    );
    assert_eq!(of(Some("o"), &old), None, "that is somebody's");
}

#[test]
fn an_image_keeps_half_of_a_bitmap_that_a_backup_used_when_its_node_became_read_only() {
    let add = |name: &str| {
        (
            "block-dirty-bitmap-add",
            json!({"node": "b", "name": name, "persistent": true}),
        )
    };
    let backup = (
        "blockdev-backup",
        json!({"job-id": "j", "device": "b", "target": "c", "sync": "full", "bitmap": "x", "bitmap-mode": "always",
            "auto-finalize": false}),
    );
    let target = (
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "c", "size": 4096, "read-zeroes": true}),
    );
    let snapshot = ("blockdev-snapshot", json!({"node": "b", "overlay": "l"}));
    let overlay = (
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "l", "backing": null, "file": {"driver": "file", "filename": "l"}}),
    );
    let stored = |oracle, name: &str, file: &str, auto: bool| {
        found(
            oracle,
            &format!(
                "bitmap '{name}' in the closed image '{file}' ought to be StoredBitmap {{ name: \"{name}\", auto: true, in_use: \
                 false }}, is Stored {{ name: \"{name}\", auto: {auto}, in_use: false }}"
            ),
        )
    };
    let run = |snapshot: Option<&(&'static str, Value)>, wrong: &Violation| {
        let mut steps = vec![
            add("x"),
            add("y"),
            target.clone(),
            overlay.clone(),
            backup.clone(),
        ];
        steps.extend(snapshot.cloned());
        after(&steps, false, wrong)
    };
    let half = Some("frozen-bitmap-loses-writes");
    let wrong = stored(OracleName::Bitmap, "x", "b", false);
    assert_eq!(run(Some(&snapshot), &wrong), half);
    let lacks = found(
        OracleName::Bitmap,
        "bitmap 'x' in the closed image 'b' lacks a mark at 0x0",
    );
    assert_eq!(run(Some(&snapshot), &lacks), half);
    assert_eq!(run(None, &wrong), None, "it stays writable");
    let of = |wrong: &Violation| run(Some(&snapshot), wrong);
    assert_eq!(
        of(&stored(OracleName::Bitmap, "y", "b", false)),
        None,
        "not in use"
    );
    assert_eq!(
        of(&stored(OracleName::Bitmap, "x", "l", false)),
        None,
        "another image"
    );
    assert_eq!(
        of(&stored(OracleName::Bitmap, "x", "b", true)),
        None,
        "it records"
    );
    assert_eq!(of(&stored(OracleName::Image, "x", "b", false)), None);
    let many = found(
        OracleName::Bitmap,
        "bitmap 'x' in the closed image 'b' has a mark too many at 0x0",
    );
    assert_eq!(of(&many), None, "nothing is lost");
}
