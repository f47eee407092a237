//! blockdev-reopen with real drivers: links, options, refusals in QEMU's words, and that a refusal changes nothing.

use serde_json::{Value, json};

use crate::jobs::JobStatus;
use crate::jobs::testing::{KIB, MIB, World};
use crate::types::{OpenFlags, ReqFlags};

/// `top` over `mid` over `base`, and the definition of `node` with `extra` members for a reopen.
fn definition(node: &str, extra: Value) -> Value {
    let mut options =
        json!({"driver": "qcow2", "node-name": node, "file": {"driver": "file", "filename": node}});
    if let (Some(options), Value::Object(extra)) = (options.as_object_mut(), extra) {
        options.extend(extra);
    }
    options
}

fn list(options: impl IntoIterator<Item = Value>) -> Value {
    json!({"options": options.into_iter().collect::<Vec<_>>()})
}

fn flags(world: &World, node: &str) -> OpenFlags {
    world
        .layer
        .node(world.layer.find_node(node).expect("a node"))
        .flags
        .get()
}

#[test]
fn a_backing_link_goes_comes_back_and_moves() {
    let world = World::new(1);
    world.chain();
    let whole = world.read_all("top");
    world.qmp(
        "blockdev-reopen",
        list([definition("top", json!({"backing": null}))]),
    );
    assert_eq!(world.backing_of("top"), None);
    let alone = world.read_all("top");
    assert!(alone[..256 * 1024].iter().all(|b| *b == 0), "nothing below shows");
    assert_eq!(alone[256 * 1024], 5);
    world.qmp(
        "blockdev-reopen",
        list([definition("top", json!({"backing": "mid"}))]),
    );
    assert_eq!(world.read_all("top"), whole);
    // Another order in one command: the detaching entry first, since cycles are judged one entry after the other.
    let entries =
        |backing: [(&str, Value); 2]| list(backing.map(|(n, b)| definition(n, json!({"backing": b}))));
    world.refused(
        "blockdev-reopen",
        entries([("mid", json!("top")), ("top", json!("base"))]),
        "Making 'top' a backing child of 'mid' would create a cycle",
    );
    world.qmp(
        "blockdev-reopen",
        entries([("top", json!("base")), ("mid", json!(null))]),
    );
    assert_eq!(world.backing_of("top").as_deref(), Some("base"));
    assert_eq!(world.backing_of("mid"), None);
}

#[test]
fn refusals_change_nothing() {
    let world = World::new(1);
    world.chain();
    world.memory.create("plain", MIB);
    world.qmp(
        "blockdev-add",
        json!({"driver": "file", "node-name": "p", "filename": "plain"}),
    );
    world.qmp(
        "blockdev-add",
        json!({"driver": "copy-on-read", "node-name": "c", "file": "top"}),
    );
    world.qmp(
        "blockdev-add",
        json!({"driver": "null-co", "node-name": "z", "size": 4096, "read-only": true, "force-share": true}),
    );
    let top = |extra: Value| list([definition("top", extra)]);
    let file = |extra: Value| {
        let mut options = json!({"driver": "file", "node-name": "p", "filename": "plain"});
        options
            .as_object_mut()
            .expect("an object")
            .extend(extra.as_object().expect("an object").clone());
        list([options])
    };
    let null = |extra: Value| {
        let mut options = json!({"driver": "null-co", "node-name": "z"});
        options
            .as_object_mut()
            .expect("an object")
            .extend(extra.as_object().expect("an object").clone());
        list([options])
    };
    for (arguments, text) in [
        (json!({}), "Parameter 'options' is missing"),
        (
            json!({"options": 5}),
            "Invalid parameter type for 'options', expected: array",
        ),
        (
            json!({"options": [5]}),
            "Invalid parameter type for 'options[0]', expected: object",
        ),
        (
            list([json!({"node-name": "top"})]),
            "Parameter 'options[0].driver' is missing",
        ),
        (
            list([json!({"driver": "qcow2", "file": "p"})]),
            "node-name not specified",
        ),
        (
            list([json!({"driver": "qcow2", "node-name": "no", "file": "p"})]),
            "Failed to find node with node-name='no'",
        ),
        (top(json!({})), "backing is missing for 'top'"),
        (
            top(json!({"backing": "no"})),
            "Cannot find device='' nor node-name='no'",
        ),
        (
            top(json!({"backing": "top"})),
            "Making 'top' a backing child of 'top' would create a cycle",
        ),
        (
            top(json!({"backing": {"driver": "null-co"}})),
            "Cannot change the option 'backing.driver'",
        ),
        (
            top(json!({"backing": "mid", "file": "no"})),
            "Cannot find device='' nor node-name='no'",
        ),
        (
            list([json!({"driver": "raw", "node-name": "top", "file": "p"})]),
            "backing is missing for 'top'",
        ),
        (
            list([json!({"driver": "copy-on-read", "node-name": "c", "file": "top"})]),
            "Block format 'copy-on-read' used by node 'c' does not support reopening files",
        ),
        // The copy-on-read filter above wants to write.
        (
            top(json!({"backing": "mid", "read-only": true})),
            "Read-only block node 'top' cannot support read-write users",
        ),
        (
            file(json!({"filename": "other"})),
            "Cannot change the option 'filename'",
        ),
        (file(json!({"aio": "threads"})), "Cannot change the option 'aio'"),
        (
            file(json!({"detect-zeroes": "unmap"})),
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ),
        (
            null(json!({"read-only": true})),
            "Option 'size' cannot be reset to its default value",
        ),
        (
            null(json!({"size": 4096, "read-only": true, "force-share": true})),
            "Cannot change the option 'force-share'",
        ),
        (
            list([
                definition("top", json!({"backing": null})),
                definition("mid", json!({"backing": "no"})),
            ]),
            "Cannot find device='' nor node-name='no'",
        ),
    ] {
        world.refused("blockdev-reopen", arguments, text);
    }
    assert_eq!(world.qmp("blockdev-reopen", list([])), json!({}));
}

#[test]
fn omitted_options_go_back_and_inline_children_follow() {
    let world = World::new(1);
    world.chain();
    let inline = |extra: Value| {
        let mut options = definition(
            "t",
            json!({"backing": {"driver": "qcow2", "node-name": "b", "file": {"driver": "file", "filename": "base2"}}}),
        );
        options["file"]["filename"] = json!("top2");
        options
            .as_object_mut()
            .expect("an object")
            .extend(extra.as_object().expect("an object").clone());
        options
    };
    world.qcow2("base2", MIB, None);
    world.qcow2("top2", MIB, None);
    world.qmp(
        "blockdev-add",
        inline(json!({"read-only": true, "detect-zeroes": "on"})),
    );
    assert!(!flags(&world, "t").contains(OpenFlags::RDWR));
    world.qmp("blockdev-reopen", list([inline(json!({}))]));
    let t = world.layer.node(world.layer.find_node("t").expect("a node"));
    assert!(t.is_writable(), "read-only goes back to its default");
    assert_eq!(t.detect_zeroes.get(), crate::graph::node::DetectZeroes::Off);
    let file = world.layer.child(t.file.get().expect("a file")).expect("a node");
    assert!(file.is_writable(), "the file follows");
    assert!(
        !flags(&world, "b").contains(OpenFlags::RDWR),
        "a backing file does not"
    );
    world.refused(
        "blockdev-reopen",
        list([inline(json!({"backing": {"driver": "qcow2", "node-name": "other", "file": {"driver": "file", "filename": "base2"}}}))]),
        "Cannot change the option 'node-name'",
    );
    // By its name it stays as it is; with null it goes, and nobody else holds it.
    world.qmp("blockdev-reopen", list([inline(json!({"backing": "b"}))]));
    assert_eq!(world.backing_of("t").as_deref(), Some("b"));
    world.qmp("blockdev-reopen", list([inline(json!({"backing": null}))]));
    assert_eq!(world.layer.find_node("b"), None);
}

#[test]
fn a_filter_goes_in_between_and_out_again() {
    let world = World::new(1);
    world.chain();
    let whole = world.read_all("top");
    world.qmp(
        "blockdev-add",
        json!({"driver": "copy-on-read", "node-name": "c", "file": "mid"}),
    );
    world.qmp(
        "blockdev-reopen",
        list([definition("top", json!({"backing": "c"}))]),
    );
    assert_eq!(world.backing_of("top").as_deref(), Some("c"));
    assert_eq!(world.read_all("top"), whole);
    world.qmp(
        "blockdev-reopen",
        list([definition("top", json!({"backing": "mid"}))]),
    );
    world.qmp("blockdev-del", json!({"node-name": "c"}));
    assert_eq!(world.read_all("top"), whole);
}

#[test]
fn another_file_and_another_window() {
    let world = World::new(1);
    for (file, byte) in [("a", 1u8), ("b", 2)] {
        world.memory.create(file, MIB);
        world.qmp(
            "blockdev-add",
            json!({"driver": "file", "node-name": file, "filename": file}),
        );
        world.fill(file, 4096, 4096, byte);
    }
    let raw = |file: &str, extra: Value| {
        let mut options = json!({"driver": "raw", "node-name": "r", "file": file});
        options
            .as_object_mut()
            .expect("an object")
            .extend(extra.as_object().expect("an object").clone());
        options
    };
    world.qmp("blockdev-add", raw("a", json!({"offset": 4096})));
    assert_eq!(world.read_all("r")[0], 1);
    world.qmp(
        "blockdev-reopen",
        list([raw("b", json!({"offset": 4096, "size": 8192}))]),
    );
    let content = world.read_all("r");
    assert_eq!((content.len(), content[0], content[4096]), (8192, 2, 0));
    world.qmp("blockdev-reopen", list([raw("b", json!({}))]));
    let content = world.read_all("r");
    assert_eq!(
        (content[0], content[4096]),
        (0, 2),
        "offset and size are back at their defaults"
    );
    world.fill("r", 0, 512, 9);
    assert_eq!((world.read_all("b")[0], world.read_all("a")[0]), (9, 0));
    world.refused(
        "blockdev-reopen",
        list([raw("b", json!({"offset": 2 * MIB}))]),
        "Offset (2097152) cannot be greater than size of the containing file (1048576)",
    );
}

#[test]
fn requests_in_flight_end_before_and_go_on_after() {
    let world = World::new(1);
    world.chain();
    world.qmp(
        "block-export-add",
        json!({"type": "nbd", "id": "e", "node-name": "top", "writable": true}),
    );
    let guest = world.layer.export("e").expect("an export");
    let layer = world.layer.clone();
    let memory = world.memory.clone();
    memory.block_on(async {
        let data = vec![8; 64 * 1024];
        let writes = (0..4).map(|i| guest.write(i * 64 * KIB, &data, ReqFlags::empty()));
        let reopen = async {
            let options = list([definition("top", json!({"backing": null}))]);
            layer
                .execute("blockdev-reopen", &options)
                .await
                .expect("reopened");
        };
        let mut running: Vec<std::pin::Pin<Box<dyn Future<Output = ()> + '_>>> = vec![Box::pin(reopen)];
        for write in writes {
            running.push(Box::pin(async { write.await.expect("written") }));
        }
        all_done(running).await;
    });
    let content = world.read_all("top");
    assert!(content[..256 * 1024].iter().all(|b| *b == 8));
    assert_eq!((content[256 * 1024], content[512 * 1024]), (5, 0));
    world.qmp("block-export-del", json!({"id": "e"}));
}

/// Polls all of them until all are ready.
async fn all_done(mut running: Vec<std::pin::Pin<Box<dyn Future<Output = ()> + '_>>>) {
    std::future::poll_fn(move |cx| {
        running.retain_mut(|f| f.as_mut().poll(cx).is_pending());
        if running.is_empty() {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
}

#[test]
fn a_stream_keeps_its_links_and_its_filter() {
    let world = World::new(1);
    world.chain();
    world.qmp(
        "block-stream",
        json!({"device": "top", "job-id": "j", "base-node": "base", "speed": 1, "auto-finalize": false}),
    );
    for (node, backing, text) in [
        (
            "top",
            json!(null),
            "Cannot change frozen 'backing' link from 'top' to 'mid'",
        ),
        (
            "top",
            json!("base"),
            "Cannot change frozen 'backing' link from 'top' to 'mid'",
        ),
    ] {
        world.refused(
            "blockdev-reopen",
            list([definition(node, json!({"backing": backing}))]),
            text,
        );
    }
    // The lowest link is the user's.
    world.qmp(
        "blockdev-reopen",
        list([definition("mid", json!({"backing": null}))]),
    );
    world.qmp("block-job-cancel", json!({"device": "j"}));
    world.until("j", JobStatus::Null);
    assert_eq!(world.backing_of("top").as_deref(), Some("mid"));
    world.assert_clean();
}
