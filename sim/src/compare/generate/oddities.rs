//! What no program should send, and every server gets.

use serde_json::json;

use super::{Cast, any, command, layer};
use crate::rng::Rng;
use crate::scenario::Step;

/// One such command.
pub(super) fn oddity(rng: &mut Rng, cast: &Cast) -> Step {
    let node = layer(rng, cast);
    let other = any(rng, cast);
    let odd = [
        ("block-stream", json!({"job-id": "odd"})),
        ("block-stream", json!({"job-id": "odd", "device": 1})),
        ("block-stream", json!({"job-id": "odd", "device": node, "foo": 1})),
        (
            "block-stream",
            json!({"job-id": "odd", "device": node, "speed": "fast"}),
        ),
        (
            "block-stream",
            json!({"job-id": "odd", "device": node, "auto-finalize": 1}),
        ),
        ("block-stream", json!({"job-id": 7, "device": node})),
        (
            "block-stream",
            json!({"job-id": "odd", "device": node, "base": "/nope"}),
        ),
        (
            "block-stream",
            json!({"job-id": "odd", "device": node, "backing-file": "x"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "throttle", "node-name": "odd", "file": node}),
        ),
        (
            "blockdev-add",
            json!({"driver": "throttle", "node-name": "odd", "throttle-group": "nobody"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "throttle", "node-name": "odd", "throttle-group": 3, "file": node}),
        ),
        ("object-add", json!({"qom-type": "throttle-group"})),
        ("object-add", json!({"id": "odd"})),
        ("object-add", json!({"qom-type": "nothing", "id": "odd"})),
        (
            "object-add",
            json!({"qom-type": "throttle-group", "id": "odd", "limits": 3}),
        ),
        (
            "object-add",
            json!({"qom-type": "throttle-group", "id": "odd", "nothing": 3}),
        ),
        ("object-del", json!({})),
        ("object-del", json!({"id": "nobody"})),
        ("object-del", json!({"id": 3})),
        ("blockdev-add", json!({"driver": "null-co"})),
        ("blockdev-add", json!({"node-name": "odd"})),
        ("blockdev-add", json!({"driver": 1, "node-name": "odd"})),
        ("blockdev-add", json!({"driver": "qcow2", "node-name": "odd"})),
        ("blockdev-add", json!({"driver": "raw", "node-name": "odd"})),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "odd", "file": 1}),
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "odd", "file": "nowhere"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "copy-on-read", "node-name": "odd", "file": "nowhere"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "odd", "file": "nowhere"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "odd", "read-only": "yes"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "odd", "size": "big"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "odd", "detect-zeroes": "sometimes"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "odd", "discard": "never"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "odd", "nothing": true}),
        ),
        (
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "odd", "force-share": true}),
        ),
        ("blockdev-add", json!({"driver": "null-co", "node-name": node})),
        ("blockdev-add", json!({"driver": "null-co", "node-name": ""})),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "odd", "backing": "nowhere",
            "file": {"driver": "file", "node-name": "odd-file", "filename": "spare.img"}}),
        ),
        (
            "blockdev-add",
            json!({"driver": "qcow2", "node-name": "odd", "backing": 5,
            "file": {"driver": "file", "node-name": "odd-file", "filename": "spare.img"}}),
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "odd",
            "file": {"driver": "file", "node-name": "odd-file", "filename": "missing.img"}}),
        ),
        (
            "blockdev-add",
            json!({"driver": "raw", "node-name": "odd",
            "file": {"driver": "file", "node-name": "odd-file"}}),
        ),
        (
            "blockdev-add",
            json!({"driver": "copy-on-read", "node-name": "odd", "file": node, "bottom": "nowhere"}),
        ),
        (
            "blockdev-add",
            json!({"driver": "copy-on-read", "node-name": "odd", "file": node, "bottom": 3}),
        ),
        ("blockdev-del", json!({})),
        ("blockdev-del", json!({"node-name": 1})),
        ("blockdev-del", json!({"node-name": node, "force": true})),
        ("blockdev-del", json!({"node-name": ""})),
        ("block-export-add", json!({"type": "nbd", "id": "odd"})),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "odd", "node-name": 1}),
        ),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "odd", "node-name": node, "writable": 1}),
        ),
        ("block-export-add", json!({"type": "nbd", "node-name": node})),
        ("block-export-add", json!({"id": "odd", "node-name": node})),
        (
            "block-export-add",
            json!({"type": "nbd", "id": "odd", "node-name": node, "name": 4}),
        ),
        ("block-export-del", json!({})),
        ("block-export-del", json!({"id": "odd", "mode": "soft"})),
        ("block-export-del", json!({"id": 1})),
        ("change-backing-file", json!({"device": node})),
        (
            "change-backing-file",
            json!({"device": node, "image-node-name": node}),
        ),
        (
            "change-backing-file",
            json!({"device": node, "image-node-name": "nowhere", "backing-file": "x"}),
        ),
        (
            "change-backing-file",
            json!({"device": "nowhere", "image-node-name": node, "backing-file": "x"}),
        ),
        (
            "change-backing-file",
            json!({"device": node, "image-node-name": other, "backing-file": 1}),
        ),
        ("job-pause", json!({})),
        ("job-pause", json!({"id": "nobody"})),
        ("job-pause", json!({"id": 1})),
        ("job-resume", json!({"id": "nobody"})),
        ("job-cancel", json!({"id": "nobody"})),
        ("job-complete", json!({"id": "nobody"})),
        ("job-finalize", json!({"id": "nobody"})),
        ("job-dismiss", json!({"id": "nobody"})),
        ("job-dismiss", json!({"id": "nobody", "force": true})),
        ("block-job-pause", json!({"device": "nobody"})),
        ("block-job-pause", json!({"id": "nobody"})),
        ("block-job-resume", json!({"device": "nobody"})),
        ("block-job-cancel", json!({"device": "nobody"})),
        ("block-job-cancel", json!({"device": "nobody", "force": "yes"})),
        ("block-job-complete", json!({"device": "nobody"})),
        ("block-job-finalize", json!({"id": "nobody"})),
        ("block-job-dismiss", json!({"id": "nobody"})),
        ("block-job-set-speed", json!({"device": "nobody", "speed": 1})),
        ("block-job-set-speed", json!({"device": "nobody"})),
        (
            "block-job-change",
            json!({"id": "nobody", "type": "mirror", "copy-mode": "background"}),
        ),
        (
            "block-job-change",
            json!({"id": "nobody", "type": "mirror", "copy-mode": "whenever"}),
        ),
        ("blockdev-reopen", json!({})),
        ("blockdev-reopen", json!({"options": []})),
        ("blockdev-reopen", json!({"options": {}})),
        ("blockdev-reopen", json!({"options": [1]})),
        ("blockdev-reopen", json!({"options": [{}]})),
        ("blockdev-reopen", json!({"options": [{"driver": "null-co"}]})),
        (
            "blockdev-reopen",
            json!({"options": [{"driver": "qcow2", "node-name": node}]}),
        ),
        (
            "blockdev-reopen",
            json!({"options": [{"driver": "qcow2", "node-name": node, "file": "nowhere", "backing": 1}]}),
        ),
        ("blockdev-snapshot", json!({"node": node})),
        ("blockdev-snapshot", json!({"node": "nowhere", "overlay": node})),
        ("blockdev-snapshot", json!({"node": node, "overlay": "nowhere"})),
        ("blockdev-snapshot", json!({"node": node, "overlay": 1})),
        ("transaction", json!({})),
        ("transaction", json!({"actions": {}})),
        ("transaction", json!({"actions": []})),
        ("transaction", json!({"actions": [{}]})),
        (
            "transaction",
            json!({"actions": [{"type": "nothing", "data": {}}]}),
        ),
        ("transaction", json!({"actions": [{"type": "abort"}]})),
        (
            "transaction",
            json!({"actions": [{"type": "abort", "data": {"x": 1}}]}),
        ),
        ("transaction", json!({"actions": [{"type": "abort", "data": {}}]})),
        (
            "transaction",
            json!({"actions": [{"type": "blockdev-snapshot", "data": {"node": node}}]}),
        ),
        (
            "transaction",
            json!({"actions": [{"type": "abort", "data": {}}], "properties": {"completion-mode": "grouped"}}),
        ),
        ("block_resize", json!({"node-name": node})),
        ("block_resize", json!({"size": 512})),
        ("block_resize", json!({"device": node, "size": 512})),
        ("block_resize", json!({"node-name": node, "size": "large"})),
        ("no-such-command", json!({})),
    ];
    let (execute, arguments) = odd[rng.below(u32::try_from(odd.len()).expect("few")) as usize].clone();
    command(execute, arguments)
}
