//! Matchers of what is about dirty bitmaps.

use super::*;

fn add(node: &str, name: &str, persistent: bool) -> Value {
    command(
        "block-dirty-bitmap-add",
        json!({"node": node, "name": name, "persistent": persistent}),
    )
}

fn last(more: &[Value], case: impl FnOnce(&mut Case<'_>)) -> Option<&'static str> {
    at_last(&chain(4096, more), case)
}

fn read_only(on: bool) -> Value {
    let t = json!({"driver": "qcow2", "node-name": "t", "file": "ft", "backing": "b", "read-only": on});
    command("blockdev-reopen", json!({ "options": [t] }))
}

fn transaction(actions: Value) -> Value {
    let mut arguments = json!({});
    arguments["actions"] = actions;
    command("transaction", arguments)
}

#[test]
fn crashes_of_merge_and_enable() {
    let crashes = fails(Kind::Crash, "SIGSEGV");
    let merge = |bitmaps: Value| {
        let merge = command(
            "block-dirty-bitmap-merge",
            json!({"node": "t", "target": "x", "bitmaps": bitmaps}),
        );
        last(&[add("t", "x", false), merge], &crashes)
    };
    assert_eq!(merge(json!([])), Some("merge-of-nothing"));
    assert_eq!(merge(json!(["x"])), None);
    let enable = |name: &str| {
        let enable = json!({"type": "block-dirty-bitmap-enable", "data": {"node": "t", "name": name}});
        last(&[add("t", "x", false), transaction(json!([enable]))], &crashes)
    };
    assert_eq!(enable("y"), Some("enable-of-missing-bitmap"));
    assert_eq!(enable("x"), None);
}

#[test]
fn only_a_bitmap_in_use_is_disabled_by_a_refusal() {
    let export = json!({"type": "nbd", "id": "e", "node-name": "t", "bitmaps": ["x"]});
    let disabled = command("block-dirty-bitmap-disable", json!({"node": "t", "name": "x"}));
    let export = command("block-export-add", export);
    let enable = json!({"type": "block-dirty-bitmap-enable", "data": {"node": "t", "name": "x"}});
    let off = differs(What::Bitmaps, "recording: true", "recording: false");
    let x = add("t", "x", false);
    let shown = [x.clone(), disabled, export, transaction(json!([enable]))];
    assert_eq!(last(&shown, &off), Some("refused-enable-disables"));
    assert_eq!(last(&[x, transaction(json!([enable]))], &off), None, "accepted");
}

#[test]
fn a_shown_bitmap_aborts_by_its_own_node() {
    let export = json!({"type": "nbd", "id": "e", "node-name": "t", "bitmaps": [{"node": "b", "name": "x"}]});
    let export = command("block-export-add", export);
    let resize = |node: &str| command("block_resize", json!({"node-name": node, "size": 8192}));
    let dies = fails(Kind::Assert, "bdrv_dirty_bitmap_truncate");
    let of = |node: &str| last(&[add("b", "x", false), export.clone(), resize(node)], &dies);
    assert_eq!(of("b"), Some("shown-bitmap-aborts"));
    assert_eq!(of("o"), None);
}

#[test]
fn writes_stop_after_a_refused_reopen_of_persistent_bitmaps_only() {
    // Somebody writes to t.
    let export = json!({"type": "nbd", "id": "e", "node-name": "t", "writable": true});
    let export = command("block-export-add", export);
    let write = differs(What::Content, "success", "Write fails with errno 1");
    let of = |persistent| {
        last(
            &[add("t", "x", persistent), export.clone(), read_only(true)],
            &write,
        )
    };
    assert_eq!(of(true), Some("refused-reopen-stops-writes"));
    assert_eq!(of(false), None);
    let accepted = last(&[add("t", "x", true), read_only(true)], &write);
    assert_eq!(accepted, None);
}

/// Of a read-only node, where the bitmap is in use.
#[test]
fn an_image_holds_half_of_a_bitmap_in_use_only() {
    let whole = differs(
        What::Bitmaps,
        "t holds StoredBitmap { name: \"x\", granularity: 4096, auto: true, in_use: false, dirty: Some(Spans([])) }",
        "Some(Stored { auto: false })",
    );
    let add = |name: &str| {
        let mut add = add("t", name, true);
        add["arguments"]["granularity"] = json!(4096);
        add
    };
    let backup = |bitmap: &str| {
        command(
            "blockdev-backup",
            json!({"job-id": "j", "device": "t", "target": "o", "sync": "full", "bitmap": bitmap,
                "bitmap-mode": "always", "auto-finalize": false}),
        )
    };
    let query = command("query-jobs", json!({}));
    let of = |bitmap: &str, frozen: bool| {
        let steps = [
            add("x"),
            add("y"),
            backup(bitmap),
            read_only(frozen),
            query.clone(),
        ];
        last(&steps, &whole)
    };
    assert_eq!(of("x", true), Some("frozen-bitmap-loses-writes"));
    assert_eq!(of("y", true), None, "another one is in use");
    assert_eq!(of("x", false), None, "it is writable");
}

/// A bitmap that was added while the node was read-only, and a stream that is refused late.
#[test]
fn a_refused_stream_stores_the_new_bitmaps_of_its_device() {
    let stream = |device: &str, filter: &str| {
        command(
            "block-stream",
            json!({"job-id": "j", "device": device, "filter-node-name": filter}),
        )
    };
    let clear = command("block-dirty-bitmap-clear", json!({"node": "t", "name": "x"}));
    let pinned = Some("refused-stream-pins-read-only");
    let of = |before: &[Value], case: &dyn Fn(&mut Case<'_>)| {
        let mut all = vec![read_only(true)];
        all.extend_from_slice(before);
        all.push(clear.clone());
        last(&all, case)
    };
    let frozen = differs(
        What::Result,
        "accepted",
        "GenericError: Bitmap 'x' is readonly and cannot be modified",
    );
    let vain = stream("t", "#bad");
    let new = add("t", "x", true);
    assert_eq!(of(&[new.clone(), vain.clone()], &frozen), pinned);
    assert_eq!(
        of(&[add("t", "x", false), vain.clone()], &frozen),
        None,
        "not stored"
    );
    assert_eq!(
        of(&[new.clone(), stream("b", "#bad")], &frozen),
        None,
        "another device"
    );
    assert_eq!(
        of(&[new.clone(), stream("nowhere", "f")], &frozen),
        None,
        "refused at once"
    );
    assert_eq!(of(&[vain.clone(), new.clone()], &frozen), None, "added later");
    let other = differs(
        What::Result,
        "accepted",
        "GenericError: Bitmap 'y' is readonly and cannot be modified",
    );
    assert_eq!(of(&[new.clone(), vain.clone()], &other), None, "another bitmap");

    let stored = differs(
        What::Bitmaps,
        "bitmap 'x' of node 't': none",
        "bitmap 'x' of node 't': Facts { … }",
    );
    assert_eq!(of(&[new.clone(), vain.clone()], &stored), pinned);
    let elsewhere = differs(
        What::Bitmaps,
        "bitmap 'y' of node 't': none",
        "bitmap 'y' of node 't': Facts { … }",
    );
    assert_eq!(of(&[new.clone(), vain.clone()], &elsewhere), None);
    for answer in ["accepted", "GenericError: Block node is read-only"] {
        let goes_on = differs(What::Result, "GenericError: No write access", answer);
        assert_eq!(of(&[new.clone(), vain.clone()], &goes_on), pinned);
        assert_eq!(of(std::slice::from_ref(&new), &goes_on), None, "no stream");
        assert_eq!(of(&[vain.clone(), new.clone()], &goes_on), None, "added later");
        assert_eq!(
            of(&[add("t", "x", false), vain.clone()], &goes_on),
            None,
            "not stored"
        );
    }
}
