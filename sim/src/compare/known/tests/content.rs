//! Matchers of what guests read, of lengths, and of what is stored.

use super::*;

fn stream() -> Value {
    command("block-stream", json!({"job-id": "j", "device": "t"}))
}

fn resize(size: u64) -> Value {
    command("block_resize", json!({"node-name": "o", "size": size}))
}

fn raw(file: &str) -> Value {
    command(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "r", "file": file}),
    )
}

const OLD: &str = "Stamp(Fill { image: 0, fill: 0 })";

#[test]
fn a_stream_uncovers_a_base_of_another_length() {
    let uncovers = Some("stream-uncovers-base");
    let old = differs(What::Content, "node 't': zeroes", OLD);
    assert_eq!(at_last(&chain(512, &[stream()]), &old), uncovers);
    assert_eq!(at_last(&chain(4096, &[stream()]), &old), None);
    assert_eq!(at_last(&chain(512, &[raw("b")]), &old), None, "no stream");
    let lost = differs(What::Content, "node 't': fill 0 of image 0", OLD);
    assert_eq!(at_last(&chain(512, &[stream()]), &lost), None);
}

#[test]
fn a_stream_loses_data_only_over_a_raw_node_on_an_overlay() {
    let lost = differs(What::Content, "node 'r': fill 0 of image 0", "Zero");
    let of = |file: &str, case: &dyn Fn(&mut Case<'_>)| at_last(&chain(4096, &[raw(file), stream()]), case);
    assert_eq!(of("t", &lost), Some("stream-over-raw-loses-data"));
    assert_eq!(of("b", &lost), None, "nothing is below it");
    assert_eq!(at_last(&chain(4096, &[stream()]), &lost), None);
    assert_eq!(at_last(&chain(4096, &[raw("t")]), &lost), None, "no stream");
    let zeroes = differs(What::Content, "node 'r': zeroes", "Zero");
    assert_eq!(of("t", &zeroes), None);
    let stored = differs(What::Allocation, "cluster 0 of t is allocated", "not allocated");
    assert_eq!(of("t", &stored), Some("stream-over-raw-loses-data"));
}

/// A stream of o, which is put over the snapshot of this node first.
#[test]
fn a_stream_of_a_snapshot_loses_only_what_is_below_its_source() {
    let keeps = |source: &str, file: &str| {
        let target = json!({"driver": "null-co", "node-name": "z", "size": 4096});
        [
            command("blockdev-add", target),
            command(
                "blockdev-add",
                json!({"driver": "copy-before-write", "node-name": "c", "file": source, "target": "z"}),
            ),
            command(
                "blockdev-add",
                json!({"driver": "snapshot-access", "node-name": "p", "file": "c"}),
            ),
            command(
                "blockdev-reopen",
                json!({"options": [{"driver": "qcow2", "node-name": "o", "file": "fo", "backing": file}]}),
            ),
        ]
    };
    let stream = command("block-stream", json!({"job-id": "j", "device": "o"}));
    let query = command("query-jobs", json!({}));
    let of = |source: &str, below: &str, last: &Value, case: &dyn Fn(&mut Case<'_>)| {
        let mut all = keeps(source, below).to_vec();
        all.push(last.clone());
        at_last(&chain(4096, &all), case)
    };
    let lost = differs(What::Content, "node 'o': fill 0 of image 0", "Zero");
    let hides = Some("snapshot-hides-chain");
    assert_eq!(of("t", "p", &stream, &lost), hides);
    assert_eq!(of("b", "p", &stream, &lost), None, "nothing is below b");
    assert_eq!(of("t", "c", &stream, &lost), None, "no snapshot");
    assert_eq!(of("t", "p", &query, &lost), None, "no stream");
    let zeroes = differs(What::Content, "node 'o': zeroes", "Zero");
    assert_eq!(of("t", "p", &stream, &zeroes), None);
    let old = differs(What::Content, "node 'o': fill 0 of image 0", OLD);
    assert_eq!(of("t", "p", &stream, &old), None, "something is there");
}

#[test]
fn tables_move_only_when_a_snapshot_is_taken_back_by_what_follows() {
    let snapshot = json!({"type": "blockdev-snapshot", "data": {"node": "ft", "overlay": "o"}});
    let abort = json!({"type": "abort", "data": {}});
    let of = |actions: Value, model: &'static str| {
        let transaction = command("transaction", json!({ "actions": actions }));
        at_last(
            &chain(4096, &[transaction, raw("b")]),
            differs(What::Content, model, "Torn"),
        )
    };
    let told = "node 'o': at 0x0 of node 'o': zeroes";
    let moves = Some("aborted-snapshot-moves-tables");
    assert_eq!(of(json!([snapshot, abort]), told), moves);
    assert_eq!(of(json!([snapshot]), told), None, "nothing follows");
    assert_eq!(of(json!([abort, snapshot]), told), None, "the snapshot is last");
    let harmless = json!({"type": "block-dirty-bitmap-add", "data": {"node": "b", "name": "x"}});
    assert_eq!(of(json!([snapshot, harmless]), told), None, "accepted");
    assert_eq!(
        of(json!([snapshot, abort]), "node 't': at 0x0 of node 't': zeroes"),
        None,
        "another node"
    );
    assert_eq!(
        of(
            json!([snapshot, abort]),
            "node 'o': at 0x0 of node 'o': fill 0 of image 0"
        ),
        None
    );
}

#[test]
fn the_tail_of_an_image_needs_two_resizes() {
    let old = differs(What::Content, "node 'o': zeroes", OLD);
    let of = |more: &[Value]| at_last(&chain(4096, more), &old);
    assert_eq!(of(&[resize(512), resize(4096)]), Some("resize-shows-old-tail"));
    assert_eq!(of(&[resize(512)]), None);
}

#[test]
fn a_filter_keeps_its_length_after_a_change_below() {
    let keeps = Some("filter-keeps-length");
    let length = differs(What::Content, "node 'r' has 512 bytes", "4096");
    let of = |more: &[Value], case: &dyn Fn(&mut Case<'_>)| at_last(&chain(4096, more), case);
    assert_eq!(of(&[raw("o"), resize(512)], &length), keeps);
    assert_eq!(of(&[raw("o")], &length), None);
    let short = differs(What::Content, "success", "Read fails with errno 22");
    assert_eq!(of(&[raw("o"), resize(8192)], &short), keeps);
    assert_eq!(of(&[raw("o")], &short), None);
    assert_eq!(
        of(
            &[resize(8192)],
            &differs(What::Content, "success", "Read fails with errno 5")
        ),
        None
    );
}

#[test]
fn garbage_needs_a_bottom_and_a_short_layer() {
    let filter = |bottom: Value| {
        let mut add = json!({"driver": "copy-on-read", "node-name": "c", "file": "t"});
        if bottom.is_string() {
            add["bottom"] = bottom;
        }
        command("blockdev-add", add)
    };
    let torn = differs(What::Content, "node 'c': zeroes", "Torn");
    assert_eq!(
        at_last(&chain(512, &[filter(json!("b"))]), &torn),
        Some("cor-bottom-garbage")
    );
    assert_eq!(at_last(&chain(4096, &[filter(json!("b"))]), &torn), None);
    assert_eq!(at_last(&chain(512, &[filter(Value::Null)]), &torn), None);
}

#[test]
fn an_export_loses_permissions_to_a_refusal_only() {
    let set = [command("blockdev-set-active", json!({"active": false}))];
    let lost = "backend -root-> t: perm '' shared ''";
    let drops = Some("refused-set-active-drops-permissions");
    assert_eq!(
        at_last(
            &chain(4096, &set),
            differs(What::Refusal, "the state before", lost)
        ),
        drops
    );
    assert_eq!(at_last(&chain(4096, &set), differs(What::Masks, "", lost)), None);
    assert_eq!(
        at_last(&chain(4096, &[raw("b")]), differs(What::Refusal, "", lost)),
        None
    );
}

#[test]
fn what_ends_a_daemon_at_a_window_or_a_tail() {
    let window = command(
        "blockdev-add",
        json!({"driver": "raw", "node-name": "w", "file": "o", "offset": 512}),
    );
    let copies = fails(
        Kind::Assert,
        "bdrv_co_do_copy_on_readv: Assertion `skip_bytes < pnum' failed",
    );
    let read = raw("b");
    let of = |more: &[Value], case: &dyn Fn(&mut Case<'_>)| at_last(&chain(4096, more), case);
    assert_eq!(
        of(&[window.clone(), read.clone()], &copies),
        Some("cor-over-window-aborts")
    );
    assert_eq!(of(std::slice::from_ref(&read), &copies), None);
    let sparse = fails(Kind::Assert, "nbd_co_send_sparse_read: Assertion `pnum' failed");
    let reopen = |size: Value| {
        let options = json!([{"driver": "raw", "node-name": "w", "file": "o", "size": size}]);
        command("blockdev-reopen", json!({ "options": options }))
    };
    assert_eq!(
        of(&[window.clone(), reopen(json!(512))], &sparse),
        Some("reopen-shortens-export")
    );
    assert_eq!(of(&[window], &sparse), None);
    let hangs = fails(Kind::Hang, "a guest's request is not answered");
    let tail = r#"{"file":"a","format":"raw","size":1000}"#;
    assert_eq!(explained(&steps(tail, ""), &hangs), Some("nbd-short-tail-hangs"));
    assert_eq!(explained(&steps(EVEN, ""), &hangs), None);
    let opens = fails(Kind::Hang, "blockdev-add is not answered in 10 s");
    assert_eq!(explained(&steps(tail, ""), &opens), Some("nbd-short-tail-hangs"));
    assert_eq!(explained(&steps(EVEN, ""), &opens), None);
    let spins = fails(Kind::Hang, "the daemon works without coming to rest");
    assert_eq!(explained(&steps(tail, ""), &spins), None, "it sleeps");
}
