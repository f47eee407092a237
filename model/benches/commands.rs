//! How many commands the model executes in a second: each a clone of the world, the checks, the change, the masks.
//!
//! `cargo bench -p blkcheck-model`. The world is a chain of four qcow2 nodes, each over its file, with an export.

use std::rc::Rc;

use blkcheck_model::{Command, FileFacts, FileKind, Qcow2Facts, World};
use serde_json::{Value, json};

fn main() {
    divan::main();
}

fn chain() -> World {
    let file = |n: usize| {
        let facts = FileFacts {
            kind: FileKind::Regular,
            length: 65536,
            request_alignment: 1,
            qcow2: Some(Qcow2Facts {
                virtual_size: 1 << 20,
                cluster_size: 65536,
                version: 3,
                backing: None,
                bitmaps: Vec::new(),
            }),
        };
        (Rc::from(format!("/f{n}")), facts)
    };
    let mut world = World::new((0..5).map(file));
    for n in 0..5_usize {
        let backing = n.checked_sub(1).filter(|n| *n < 3).map(|n| format!("n{n}"));
        let file = json!({"driver": "file", "node-name": format!("f{n}"), "filename": format!("/f{n}")});
        let node = json!({"driver": "qcow2", "node-name": format!("n{n}"), "file": file, "backing": backing});
        run(&mut world, "blockdev-add", &node);
    }
    run(
        &mut world,
        "block-export-add",
        &json!({"type": "nbd", "id": "x", "node-name": "n3", "writable": true}),
    );
    world
}

fn run(world: &mut World, name: &str, arguments: &Value) {
    world
        .execute(&Command::new(name, arguments))
        .expect("the command is accepted");
}

/// One kind of command each, the last of them refused.
#[divan::bench(args = ["blockdev-add", "blockdev-reopen", "blockdev-snapshot", "block-stream", "block_resize"])]
fn command(bencher: divan::Bencher<'_, '_>, name: &str) {
    let world = chain();
    let arguments = match name {
        "blockdev-add" => json!({"driver": "copy-on-read", "node-name": "cor", "file": "n3"}),
        "blockdev-reopen" => {
            json!({"options": [{"driver": "qcow2", "node-name": "n3", "file": "f3", "backing": null}]})
        }
        "blockdev-snapshot" => json!({"node": "n3", "overlay": "n4"}),
        "block-stream" => json!({"job-id": "j", "device": "n3"}),
        _ => json!({"node-name": "n3", "size": 4096}),
    };
    bencher
        .counter(divan::counter::ItemsCount::new(1_u32))
        .with_inputs(|| world.clone())
        .bench_local_refs(|world| world.execute(&Command::new(name, &arguments)).is_ok());
}
