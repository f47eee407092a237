//! The chain that a scenario begins with.
//!
//! Rules: images name in their headers what they are opened over; sizes need not be alike, nor multiples of anything
//! but a sector.

use serde_json::{Value, json};

use super::generate::{Cast, command};
use crate::rng::Rng;
use crate::scenario::{Fill, Format, Image, Step, Stored};

/// Unit of requests, bytes.
pub(super) const GRAIN: u64 = 512;

/// Images of the chain, overlays to be, and targets.
pub(super) fn images(rng: &mut Rng, layers: usize) -> Vec<Image> {
    let cluster = *rng.pick(&[1024u32, 2048, 4096, 65536]);
    let unit = u64::from(cluster);
    let clusters = u64::from(*rng.pick(&[3u32, 5, 8, 16]));
    let even = rng.chance(1, 2);
    let length = |rng: &mut Rng| {
        let mut size = unit * clusters;
        if !even && rng.chance(1, 2) {
            size = unit * (1 + u64::from(rng.below(2 * u32::try_from(clusters).expect("few"))));
        }
        if !even && rng.chance(1, 3) {
            size = (size - unit
                + GRAIN * u64::from(1 + rng.below(u32::try_from(unit / GRAIN).expect("few"))))
            .max(GRAIN);
        }
        size
    };
    let mut images: Vec<Image> = Vec::new();
    let mut below: Option<(String, Format)> = None;
    for layer in 0..layers {
        let raw = layer == 0 && rng.chance(1, 5);
        let size = length(rng);
        let mut image = plain(rng, &format!("i{layer}.img"), raw, size, cluster);
        if let Some((file, format)) = &below {
            image.backing_file = Some(file.clone());
            image.backing_format = Some(format.driver().to_owned());
        }
        filled(rng, &mut image);
        below = Some((image.file.clone(), image.format));
        images.push(image);
    }
    let top = images[layers - 1].size;
    for overlay in 0..2 {
        let size = if even || rng.chance(5, 6) {
            top
        } else {
            length(rng)
        };
        let mut image = plain(rng, &format!("o{overlay}.img"), false, size, cluster);
        image.backing_file = below.as_ref().map(|(file, _)| file.clone());
        image.backing_format = Some(
            if layers == 1 && images[0].format == Format::Raw && overlay == 0 {
                "raw"
            } else {
                "qcow2"
            }
            .to_owned(),
        );
        below = Some((image.file.clone(), Format::Qcow2));
        images.push(image);
    }
    for target in 0..2 {
        let raw = rng.chance(1, 3);
        let mut image = plain(rng, &format!("t{target}.img"), raw, top, cluster);
        if rng.chance(1, 2) {
            filled(rng, &mut image);
        }
        images.push(image);
    }
    images
}

fn plain(rng: &mut Rng, file: &str, raw: bool, size: u64, cluster: u32) -> Image {
    Image {
        file: file.to_owned(),
        format: if raw { Format::Raw } else { Format::Qcow2 },
        size,
        cluster_size: if raw { 65536 } else { cluster },
        compat: if !raw && rng.chance(1, 5) { 2 } else { 3 },
        refcount_bits: 16,
        backing_file: None,
        backing_format: None,
        free: 0,
        fill: Vec::new(),
    }
}

fn filled(rng: &mut Rng, image: &mut Image) {
    let grains = u32::try_from(image.size / GRAIN).expect("small");
    for _ in 0..rng.below(5) {
        let first = rng.below(grains);
        let most = *rng.pick(&[2u32, 16, 256]);
        let length = 1 + rng.below((grains - first).min(most));
        let stored = match (image.format, image.compat, rng.below(8)) {
            (Format::Qcow2, 3, 0) => Stored::Zero,
            (Format::Qcow2, 3, 1) => Stored::ZeroAllocated,
            (Format::Qcow2, _, 2) => Stored::Compressed,
            _ => Stored::Data,
        };
        image.fill.push(Fill {
            offset: u64::from(first) * GRAIN,
            length: u64::from(length) * GRAIN,
            stored,
        });
    }
}

/// A node of a format over its image, without a backing file.
pub(super) fn over_image(rng: &mut Rng, image: &Image, node: &str) -> Value {
    let mut file = json!({"driver": "file", "node-name": format!("f-{node}"), "filename": image.file});
    if rng.chance(1, 12) {
        file = json!({"driver": "blkdebug", "node-name": format!("b-{node}"), "image": file,
            "align": *rng.pick(&[512u32, 4096, 4096, 65536])});
    }
    let driver = if image.format == Format::Raw {
        "raw"
    } else {
        "qcow2"
    };
    let mut add = json!({"driver": driver, "node-name": node, "file": file});
    if rng.chance(1, 3) {
        add["discard"] = json!("unmap");
        if rng.chance(1, 2) {
            add["detect-zeroes"] = json!("unmap");
        }
    } else if rng.chance(1, 8) {
        add["detect-zeroes"] = json!("on");
    }
    if driver == "qcow2" {
        for (key, value) in [
            ("lazy-refcounts", json!(true)),
            ("pass-discard-snapshot", json!(true)),
            ("discard-no-unref", json!(true)),
            ("l2-cache-size", json!(1024)),
        ] {
            if rng.chance(1, 16)
                && (image.compat == 3 || !matches!(key, "lazy-refcounts" | "discard-no-unref"))
            {
                add[key] = value;
            }
        }
    }
    add
}

/// Opens the chain, with filters here and there, and exports it.
pub(super) fn setup(rng: &mut Rng, cast: &mut Cast, steps: &mut Vec<Step>) {
    if rng.chance(1, 4) {
        steps.push(command(
            "object-add",
            json!({"qom-type": "throttle-group", "id": "tg"}),
        ));
        cast.throttle = true;
    }
    let mut below: Option<String> = None;
    let read_only = rng.chance(1, 6);
    for layer in 0..cast.layers {
        let name = format!("n{layer}");
        let image = cast.images[layer].clone();
        let mut add = over_image(rng, &image, &name);
        if image.format == Format::Qcow2 {
            add["backing"] = below.clone().map_or(Value::Null, Value::String);
        }
        if read_only && layer + 1 < cast.layers {
            add["read-only"] = json!(true);
        }
        cast.add(add, steps);
        cast.chain.push(name.clone());
        below = Some(name);
        if rng.chance(1, 5) {
            below = cast.filter(rng, &below.clone().expect("a layer"), steps);
        }
    }
    cast.top = below.expect("a layer");
    if rng.chance(1, 4) {
        cast.top = cast.filter(rng, &cast.top.clone(), steps).expect("a filter");
    }
    cast.export(&cast.top.clone(), true, steps);
    if rng.chance(1, 3) {
        let node = rng.pick(&cast.chain[cast.layers - 1..]).clone();
        let writable = rng.chance(1, 2);
        cast.export(&node, writable, steps);
    }
}
