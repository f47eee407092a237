//! Model, layer and whole runs against each other, on inputs that proptest and quickcheck draw and shrink.
//! Images are laid out by the simulator's builder, which shares no code with the layer.

mod common;

use std::rc::Rc;

use blkcheck_impl::Layer;
use blkcheck_impl::memory::MemoryEnv;
use blkcheck_model::layer::{Cell, Format as ModelFormat, Layer as ModelLayer, view};
use blkcheck_model::status::{Status, check_layer};
use blkcheck_model::{Command, World};
use blkcheck_sim::choice::{Bytes, Random};
use blkcheck_sim::follow::Follower;
use blkcheck_sim::generate::{Profile, Reach, generate};
use blkcheck_sim::harness::{Harness, Setup};
use blkcheck_sim::image::build::{build, content, forms};
use blkcheck_sim::scenario::{Disk, Fill, Format, Image, Scenario, Stored};
use proptest::prelude::*;
use quickcheck::{QuickCheck, TestResult};
use serde_json::{Value, json};

// ---- whole runs ----------------------------------------------------------------------------------------------

/// Any workload under any choices: every oracle is content, and the recorded choices give the run again.
#[test]
fn every_workload_passes_under_every_schedule() {
    fn passes(workload: u64, schedule: u64) -> TestResult {
        let mut harness = Harness::new(&Setup::default()).expect("memory is always there");
        let scenario = generate(workload, Profile::Mixed, Reach::all());
        let run = harness
            .once(&scenario, &mut Random::new(schedule))
            .expect("memory is always there");
        match run.violation {
            None => TestResult::passed(),
            Some(v) => TestResult::error(format!("workload {workload}, schedule {schedule}: {v:?}")),
        }
    }
    QuickCheck::new()
        .tests(300)
        .quickcheck(passes as fn(u64, u64) -> TestResult);
}

fn as_choices(bytes: &[u8]) -> Vec<u32> {
    bytes.iter().map(|&b| u32::from(b)).collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    /// Also when somebody else than our generators makes the choices.
    #[test]
    fn every_choice_list_passes(
        seed in any::<u64>(),
        profile in prop::sample::select(vec![
            Profile::Mixed, Profile::Guests, Profile::Stream, Profile::CopyOnRead, Profile::Drain, Profile::Graph,
        ]),
        choices in prop::collection::vec(any::<u8>(), 0..400),
    ) {
        let mut harness = Harness::new(&Setup::default()).expect("memory is always there");
        let mut scenario = generate(seed, profile, Reach::all());
        let raw = harness.once(&scenario, &mut Bytes::new(&choices)).expect("memory is always there");
        prop_assert!(raw.violation.is_none(), "seed {}: {:?}", seed, raw.violation);
        scenario.choices = as_choices(&choices);
        let first = harness.replay(&scenario).expect("memory is always there");
        prop_assert!(first.violation.is_none(), "seed {}: {:?}", seed, first.violation);
        let second = harness.replay(&scenario).expect("memory is always there");
        prop_assert_eq!(first.trace_hash, second.trace_hash);
    }
}

// ---- chains ---------------------------------------------------------------------------------------------------

/// Grain of stamps, bytes.
const GRAIN: u32 = 16;

fn image(index: usize, size: u64, cluster: u32, raw: bool, fills: &[(u8, u8, u8)]) -> Image {
    let unit = 64;
    let fill = fills.iter().filter_map(|&(at, length, stored)| {
        let offset = u64::from(at) * unit % size / unit * unit;
        let length = (u64::from(length) * unit).min(size - offset);
        let stored = match (raw, stored % 4) {
            (true, 0) | (_, 1) => Stored::Zero,
            (false, 2) => Stored::ZeroAllocated,
            (false, 3) => Stored::Compressed,
            _ => Stored::Data,
        };
        (length > 0).then_some(Fill {
            offset,
            length,
            stored,
        })
    });
    Image {
        file: format!("i{index}.img"),
        format: if raw { Format::Raw } else { Format::Qcow2 },
        size,
        cluster_size: cluster,
        compat: 3,
        refcount_bits: 16,
        backing_file: (index > 0 && !raw).then(|| format!("i{}.img", index - 1)),
        backing_format: None,
        free: 0,
        fill: fill.collect(),
    }
}

/// Base first. Only the base may be raw, and it may end inside a sector.
fn chains() -> impl Strategy<Value = Vec<Image>> {
    let fills = || prop::collection::vec((any::<u8>(), 1..=64u8, any::<u8>()), 0..5);
    let layer = move || (1..=24u64, 0..4u32, fills());
    (any::<bool>(), 0..32u64, prop::collection::vec(layer(), 1..=4)).prop_map(|(raw, tail, layers)| {
        let layers = layers.into_iter().enumerate();
        layers
            .map(|(i, (sectors, cluster, fills))| {
                let raw = raw && i == 0;
                let size = sectors * 512 + if raw { tail * 16 } else { 0 };
                image(i, size, 512 << cluster, raw, &fills)
            })
            .collect()
    })
}

/// One cell per byte; a stamp stands for the image's own bytes there.
fn modelled(image: &Image) -> (ModelLayer, Vec<u8>) {
    let size = usize::try_from(image.size).expect("small");
    let mut own = vec![0; size];
    let index = image.file[1..image.file.len() - 4].parse().expect("i0, i1, ...");
    content(image, index, GRAIN, 0, &mut own);
    let value = |byte: u8| Cell::Stamp(u64::from(byte));
    if image.format == Format::Raw {
        let mut layer = ModelLayer::new(ModelFormat::Raw, 1, size);
        layer.cells = own.iter().map(|&b| value(b)).collect();
        return (layer, own);
    }
    let cluster = image.cluster_size as usize;
    let mut layer = ModelLayer::new(ModelFormat::Qcow2(3), cluster, size);
    for (number, stored) in forms(image) {
        let start = usize::try_from(number).expect("small") * cluster;
        let range = start..(start + cluster).min(size);
        for (cell, &byte) in layer.cells[range.clone()].iter_mut().zip(&own[range]) {
            *cell = match stored {
                Stored::Zero | Stored::ZeroAllocated => Cell::Zero,
                Stored::Data | Stored::Compressed => value(byte),
            };
        }
    }
    (layer, own)
}

fn disk(images: &[Image]) -> MemoryEnv {
    let env = MemoryEnv::new();
    for (i, image) in images.iter().enumerate() {
        let mut bytes = Vec::new();
        build(image, u16::try_from(i).expect("few"), GRAIN, &mut bytes);
        env.create_with(&image.file, &bytes);
    }
    env
}

async fn open_chain(layer: &Layer, images: &[Image]) {
    for (i, image) in images.iter().enumerate() {
        let driver = if image.format == Format::Raw {
            "raw"
        } else {
            "qcow2"
        };
        let mut options = json!({
            "driver": driver, "node-name": format!("n{i}"), "read-only": true,
            "file": {"driver": "file", "filename": image.file},
        });
        if image.format == Format::Qcow2 {
            options["backing"] = if i == 0 {
                Value::Null
            } else {
                json!(format!("n{}", i - 1))
            };
        }
        layer
            .execute("blockdev-add", &options)
            .await
            .expect("the image is sound");
    }
    let top = format!("n{}", images.len() - 1);
    let export = json!({"type": "nbd", "id": "x", "name": "x", "node-name": top});
    layer
        .execute("block-export-add", &export)
        .await
        .expect("nobody objects to a reader");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, ..ProptestConfig::default() })]

    /// What a guest reads through a chain is what the model sees, byte by byte, however the read is split.
    #[test]
    fn a_chain_reads_as_in_the_model(images in chains(), piece in 1..5000usize) {
        let mut layers: Vec<ModelLayer> = images.iter().map(|i| modelled(i).0).collect();
        layers.reverse();
        let expected: Vec<u8> =
            view(&layers).iter().map(|v| u8::try_from(*v).expect("a byte")).collect();
        let env = disk(&images);
        let layer = Layer::new(Rc::new(env.clone()), None);
        let found = env.block_on(async {
            open_chain(&layer, &images).await;
            let guest = layer.export("x").expect("just added");
            let mut bytes = vec![0xee; expected.len()];
            for (i, part) in bytes.chunks_mut(piece).enumerate() {
                guest.read((i * piece) as u64, part).await.expect("within the disk");
            }
            drop(guest);
            layer.shutdown().await;
            bytes
        });
        let differs = found.iter().zip(&expected).position(|(a, b)| a != b);
        prop_assert!(differs.is_none(), "byte {:#x} differs", differs.unwrap_or_default());
    }

    /// What each layer says of itself, the model can confirm; and every answer makes progress.
    #[test]
    fn block_status_is_as_in_the_model(images in chains()) {
        let mut layers: Vec<ModelLayer> = images.iter().map(|i| modelled(i).0).collect();
        layers.reverse();
        let env = disk(&images);
        let layer = Layer::new(Rc::new(env.clone()), None);
        let wrong: Option<String> = env.block_on(async {
            open_chain(&layer, &images).await;
            let mut wrong = None;
            for (depth, i) in (0..images.len()).rev().enumerate() {
                let node = layer.find_node(&format!("n{i}")).expect("just added");
                wrong = wrong.or(walk_status(&layer, node, &layers[depth..]).await);
            }
            layer.shutdown().await;
            wrong
        });
        prop_assert!(wrong.is_none(), "{}", wrong.unwrap_or_default());
    }
}

/// Asks a layer about all of itself, from every answer's end on; says what is wrong.
async fn walk_status(
    layer: &Layer,
    node: blkcheck_impl::types::NodeId,
    chain: &[ModelLayer],
) -> Option<String> {
    let length = chain[0].len();
    let mut at = 0;
    while at < length {
        let answer = layer
            .block_status(node, at as u64, (length - at) as u64)
            .await
            .expect("memory does not fail");
        let end = at + usize::try_from(answer.pnum).expect("small");
        if end == at || end > length {
            return Some(format!("at {at:#x} of {length:#x}: {answer:?}"));
        }
        let said = Status::from_bits_truncate(answer.flags.bits());
        if let Some(e) = (at..end).find_map(|grain| check_layer(chain, grain, said).err()) {
            return Some(format!("{} layers, [{at:#x}, {end:#x}): {e}", chain.len()));
        }
        at = end;
    }
    None
}

// ---- permissions -----------------------------------------------------------------------------------------------

/// Fixed images; what varies is who opens what.
fn stage() -> Scenario {
    let images = (0..3).map(|i| image(i, 4096, 512, false, &[(0, 8, 0)])).collect();
    Scenario {
        grain: 512,
        disk: Disk::default(),
        images,
        ..Scenario::default()
    }
}

/// A command that the numbers stand for.
fn draw(n: usize, (kind, a, b, flags): (u8, u8, u8, u8)) -> (&'static str, Value) {
    let node = |x: u8| format!("n{}", x % 8);
    let read_only = flags & 1 == 0;
    match kind % 8 {
        0..=2 => {
            let mut options = json!({
                "driver": "qcow2", "node-name": node(a), "read-only": read_only,
                "file": {"driver": "file", "node-name": format!("f{n}"), "filename": format!("i{}.img", b % 3)},
            });
            options["backing"] = if flags & 6 == 0 {
                Value::Null
            } else {
                json!(node(b))
            };
            ("blockdev-add", options)
        }
        3 => {
            let options = json!({
                "driver": if flags & 2 == 0 { "raw" } else { "copy-on-read" }, "node-name": node(a),
                "read-only": read_only, "file": node(b),
            });
            ("blockdev-add", options)
        }
        4 | 5 => {
            let id = format!("x{}", b % 4);
            let options =
                json!({"type": "nbd", "id": id, "name": id, "node-name": node(a), "writable": !read_only});
            ("block-export-add", options)
        }
        6 => ("block-export-del", json!({"id": format!("x{}", b % 4)})),
        _ => ("blockdev-del", json!({"node-name": node(a)})),
    }
}

/// (parent node or "", child, what may be done, what others may do), sorted.
type Masks = Vec<(String, String, u8, u8)>;

fn layer_masks(layer: &Layer) -> Masks {
    let graph = layer.inspect();
    let name = |id| graph.node(id).map_or_else(String::new, |n| n.name.to_string());
    let edges = graph.edges.iter().filter_map(|e| {
        let parent = match e.parent {
            blkcheck_impl::event::Parent::Node(id) => name(id),
            _ => String::new(),
        };
        Some((parent, name(e.child?), e.perm.bits(), e.shared.bits()))
    });
    let mut masks: Masks = edges.collect();
    masks.sort();
    masks
}

fn model_masks(world: &World) -> Masks {
    let edges = world.graph.edges().map(|(_, e)| {
        let parent = match &e.parent {
            blkcheck_model::Parent::Node(id) => world.graph.name(*id).to_owned(),
            _ => String::new(),
        };
        (
            parent,
            world.graph.name(e.child).to_owned(),
            e.masks.perm.bits(),
            e.masks.shared.bits(),
        )
    });
    let mut masks: Masks = edges.collect();
    masks.sort();
    masks
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Same answers, same refusals, same masks on every edge after every command.
    #[test]
    fn permissions_are_as_in_the_model(
        commands in prop::collection::vec((any::<u8>(), any::<u8>(), any::<u8>(), any::<u8>()), 1..40),
    ) {
        let stage = stage();
        let mut follower = Follower::default();
        follower.reset(&stage);
        let world = &mut follower.world;
        let env = disk(&stage.images);
        let layer = Layer::new(Rc::new(env.clone()), None);
        for (n, numbers) in commands.into_iter().enumerate() {
            let (name, arguments) = draw(n, numbers);
            let expected = world.execute(&Command::new(name, &arguments)).map_err(|r| r.desc.to_string());
            let found = env.block_on(layer.execute(name, &arguments)).map_err(|r| r.desc);
            prop_assert_eq!(&found, &expected, "{} {}", name, arguments);
            prop_assert_eq!(layer_masks(&layer), model_masks(world), "after {} {}", name, arguments);
        }
        env.block_on(layer.shutdown());
    }
}
