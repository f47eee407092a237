//! Persistent bitmaps go to and fro between the layer here and `qemu-img`: what either stores the other reads, and
//! `qemu-img check` finds nothing wrong. Skipped, or failed, as in `qemu_img`.

mod common;

use std::fs;
use std::path::Path;
use std::process::Command;
use std::rc::Rc;

use blkcheck_impl::Layer;
use blkcheck_impl::real::{RealEnv, RealOptions};
use blkcheck_impl::types::ReqFlags;
use common::{skip, version};
use serde_json::{Value, json};

fn tools(test: &str) -> bool {
    let there = version("qemu-img").is_some();
    if !there {
        skip(test, "qemu-img is not installed");
    }
    there
}

fn qemu_img(dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new("qemu-img").current_dir(dir).args(arguments).output();
    let output = output.expect("it is installed");
    let text = String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned();
    assert!(output.status.success(), "qemu-img {arguments:?}: {text}");
    text
}

fn sound(dir: &Path) {
    let text = qemu_img(dir, &["check", "i.qcow2"]);
    assert!(text.contains("No errors were found"), "{text}");
}

/// What `qemu-img info` says of bitmaps: (name, granularity, flags).
fn bitmaps(dir: &Path) -> Vec<(String, u64, Vec<String>)> {
    let info = qemu_img(dir, &["info", "--output=json", "i.qcow2"]);
    let info: Value = serde_json::from_str(&info).expect("JSON");
    let list = info["format-specific"]["data"]["bitmaps"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let text = |v: &Value| v.as_str().expect("a text").to_owned();
    let bitmap = |b: &Value| {
        let flags = b["flags"].as_array().expect("a list").iter().map(text).collect();
        (
            text(&b["name"]),
            b["granularity"].as_u64().expect("a number"),
            flags,
        )
    };
    list.iter().map(bitmap).collect()
}

fn layer(dir: &Path) -> (Layer, RealEnv) {
    let options = RealOptions {
        root: Some(dir.to_owned()),
        ..RealOptions::default()
    };
    let env = RealEnv::new(options).expect("an environment");
    (Layer::new(Rc::new(env.clone()), None), env)
}

async fn ok(layer: &Layer, command: &str, arguments: Value) -> Value {
    let result = layer.execute(command, &arguments).await;
    result.unwrap_or_else(|e| panic!("{command} {arguments}: {}", e.desc))
}

async fn refused(layer: &Layer, command: &str, arguments: Value) -> String {
    layer.execute(command, &arguments).await.expect_err(command).desc
}

async fn open(layer: &Layer) {
    let file = json!({"driver": "file", "node-name": "f", "filename": "i.qcow2"});
    ok(layer, "blockdev-add", file).await;
    ok(
        layer,
        "blockdev-add",
        json!({"driver": "qcow2", "node-name": "n", "file": "f"}),
    )
    .await;
    let export = json!({"type": "nbd", "id": "x", "node-name": "n", "writable": true});
    ok(layer, "block-export-add", export).await;
}

async fn write(layer: &Layer, offset: u64, bytes: usize) {
    let export = layer.export("x").expect("just added");
    let written = export.write(offset, &vec![7; bytes], ReqFlags::empty()).await;
    written.expect("room");
}

async fn count(layer: &Layer, name: &str) -> Value {
    let nodes = ok(layer, "query-named-block-nodes", json!({})).await;
    let node = nodes
        .as_array()
        .expect("a list")
        .iter()
        .find(|n| n["node-name"] == "n");
    let bitmaps = node.expect("the node")["dirty-bitmaps"]
        .as_array()
        .cloned()
        .unwrap_or_default();
    let found = bitmaps.iter().find(|b| b["name"] == name);
    found.map_or(Value::Null, |b| b["count"].clone())
}

async fn sha(layer: &Layer, name: &str) -> Value {
    ok(
        layer,
        "x-debug-block-dirty-bitmap-sha256",
        json!({"node": "n", "name": name}),
    )
    .await["sha256"]
        .clone()
}

async fn add(layer: &Layer, name: &str, granularity: u64, disabled: bool) {
    let add = json!({"node": "n", "name": name, "granularity": granularity, "persistent": true, "disabled": disabled});
    ok(layer, "block-dirty-bitmap-add", add).await;
}

#[test]
fn what_is_stored_here_qemu_reads() {
    if !tools("what_is_stored_here_qemu_reads") {
        return;
    }
    for options in [
        "cluster_size=65536",
        "cluster_size=4096",
        "cluster_size=512",
        "cluster_size=2M",
    ] {
        let dir = tempfile::tempdir().expect("a directory");
        let dir = dir.path();
        qemu_img(
            dir,
            &["create", "-q", "-f", "qcow2", "-o", options, "i.qcow2", "8M"],
        );
        // More than once, so that old clusters are freed and used again.
        for round in 0..3u64 {
            let (layer, env) = layer(dir);
            env.block_on(async {
                open(&layer).await;
                if round == 0 {
                    add(&layer, "fine", 512, false).await;
                    add(&layer, "still", 65536, true).await;
                    add(&layer, "gone", 4096, false).await;
                }
                write(&layer, round * 65536, 1024).await;
                write(&layer, (8 << 20) - 512, 512).await;
                assert_eq!(
                    count(&layer, "fine").await,
                    json!((round + 1) * 1024 + 512),
                    "{options}"
                );
                if round == 1 {
                    ok(
                        &layer,
                        "block-dirty-bitmap-remove",
                        json!({"node": "n", "name": "gone"}),
                    )
                    .await;
                }
                layer.shutdown().await;
            });
            sound(dir);
            let flags = |auto: bool| if auto { vec!["auto".to_owned()] } else { Vec::new() };
            let mut expected = vec![
                ("fine".to_owned(), 512, flags(true)),
                ("gone".to_owned(), 4096, flags(true)),
                ("still".to_owned(), 65536, flags(false)),
            ];
            if round > 0 {
                expected.remove(1);
            }
            let mut found = bitmaps(dir);
            found.sort();
            assert_eq!(found, expected, "{options}");
        }
        // QEMU merges what we stored, and we read what it made of it.
        qemu_img(dir, &["bitmap", "--add", "-g", "4096", "i.qcow2", "theirs"]);
        qemu_img(dir, &["bitmap", "--merge", "fine", "i.qcow2", "theirs"]);
        sound(dir);
        let (layer, env) = layer(dir);
        env.block_on(async {
            open(&layer).await;
            assert_eq!(count(&layer, "theirs").await, json!(4 * 4096), "{options}");
            let before = sha(&layer, "theirs").await;
            add(&layer, "ours", 4096, true).await;
            let merge = json!({"node": "n", "target": "ours", "bitmaps": ["fine"]});
            ok(&layer, "block-dirty-bitmap-merge", merge).await;
            assert_eq!(sha(&layer, "ours").await, before, "{options}");
            layer.shutdown().await;
        });
        sound(dir);
    }
}

#[test]
fn an_image_in_use_says_so_and_a_read_only_one_is_at_rest() {
    if !tools("an_image_in_use_says_so_and_a_read_only_one_is_at_rest") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "i.qcow2", "1M"]);
    qemu_img(dir, &["bitmap", "--add", "i.qcow2", "b"]);
    let (layer, env) = layer(dir);
    let in_use = |dir: &Path| bitmaps(dir)[0].2.contains(&"in-use".to_owned());
    env.block_on(async {
        open(&layer).await;
        assert!(in_use(dir));
        write(&layer, 0, 512).await;
        let reopen = |read_only: bool| {
            json!({"options": [{"driver": "qcow2", "node-name": "n", "file": "f", "read-only": read_only}]})
        };
        // A refused reopen leaves guests and bitmaps as they were.
        let text = refused(&layer, "blockdev-reopen", reopen(true)).await;
        assert_eq!(text, "Read-only block node 'n' cannot support read-write users");
        assert!(in_use(dir));
        write(&layer, 65536, 512).await;
        assert_eq!(count(&layer, "b").await, json!(131_072));
        ok(&layer, "block-export-del", json!({"id": "x"})).await;
        ok(&layer, "blockdev-reopen", reopen(true)).await;
        assert!(!in_use(dir));
        sound(dir);
        let bitmap = json!({"node": "n", "name": "b"});
        let text = refused(&layer, "block-dirty-bitmap-clear", bitmap.clone()).await;
        assert_eq!(text, "Bitmap 'b' is readonly and cannot be modified");
        ok(&layer, "blockdev-reopen", reopen(false)).await;
        assert!(in_use(dir));
        ok(&layer, "block-dirty-bitmap-clear", bitmap).await;
        // The machine stops here.
        fs::copy(dir.join("i.qcow2"), dir.join("crashed")).expect("copied");
        layer.shutdown().await;
    });
    assert!(!in_use(dir));
    sound(dir);
    fs::rename(dir.join("crashed"), dir.join("i.qcow2")).expect("renamed");
    let (layer, env) = self::layer(dir);
    env.block_on(async {
        open(&layer).await;
        let bitmap = json!({"node": "n", "name": "b"});
        let text = refused(&layer, "block-dirty-bitmap-enable", bitmap.clone()).await;
        assert_eq!(text, "Bitmap 'b' is inconsistent and cannot be used");
        ok(&layer, "block-dirty-bitmap-remove", bitmap).await;
        layer.shutdown().await;
    });
    assert_eq!(bitmaps(dir), []);
    // What a layer that was stopped left is at worst leaked.
    let (code, text) = {
        let output = Command::new("qemu-img")
            .current_dir(dir)
            .args(["check", "i.qcow2"])
            .output();
        let output = output.expect("it is installed");
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stdout).into_owned(),
        )
    };
    assert!(matches!(code, Some(0 | 3)), "{text}");
}

#[test]
fn a_header_with_a_backing_file_has_room_for_bitmaps() {
    if !tools("a_header_with_a_backing_file_has_room_for_bitmaps") {
        return;
    }
    let dir = tempfile::tempdir().expect("a directory");
    let dir = dir.path();
    qemu_img(dir, &["create", "-q", "-f", "qcow2", "base.qcow2", "1M"]);
    qemu_img(
        dir,
        &[
            "create",
            "-q",
            "-f",
            "qcow2",
            "-b",
            "base.qcow2",
            "-F",
            "qcow2",
            "i.qcow2",
            "1M",
        ],
    );
    let (layer, env) = layer(dir);
    env.block_on(async {
        open(&layer).await;
        add(&layer, "b", 512, false).await;
        write(&layer, 512, 512).await;
        layer.shutdown().await;
    });
    sound(dir);
    assert_eq!(bitmaps(dir).len(), 1);
    let (layer, env) = self::layer(dir);
    env.block_on(async {
        open(&layer).await;
        let change = json!({"device": "n", "image-node-name": "n", "backing-file": "a-longer-name-for-the-base.qcow2"});
        ok(&layer, "change-backing-file", change).await;
        assert_eq!(count(&layer, "b").await, json!(512));
        ok(&layer, "block-export-del", json!({"id": "x"})).await;
        ok(&layer, "block_resize", json!({"node-name": "n", "size": 2 << 20})).await;
        layer.shutdown().await;
    });
    fs::rename(
        dir.join("base.qcow2"),
        dir.join("a-longer-name-for-the-base.qcow2"),
    )
    .expect("renamed");
    sound(dir);
    let info = qemu_img(dir, &["info", "i.qcow2"]);
    assert!(
        info.contains("backing file: a-longer-name-for-the-base.qcow2"),
        "{info}"
    );
    assert_eq!(bitmaps(dir), [("b".to_owned(), 512, vec!["auto".to_owned()])]);
}
