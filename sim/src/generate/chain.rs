//! The images of a scenario and the commands that open them.

use serde_json::{Map, Value, json};

use super::{SETUP, Swarm, command};
use crate::rng::Rng;
use crate::scenario::{Fill, Format, Image, Step, Stored};

/// A node that later steps can name.
#[derive(Clone, Debug)]
pub(super) struct NamedNode {
    pub(super) name: String,
    /// Index in the chain, base 0; the filter has its child's.
    pub(super) layer: usize,
}

/// An export that guests use.
#[derive(Clone, Debug)]
pub(super) struct NamedExport {
    pub(super) name: String,
    /// Bytes.
    pub(super) size: u64,
    pub(super) cluster: u64,
    pub(super) writable: bool,
}

/// What the rest of the generator needs to know of the chain.
#[derive(Clone, Debug)]
pub(super) struct Chain {
    /// Base first.
    pub(super) images: Vec<Image>,
    /// Images that are open beside the chain, to become its top: o0, o1, …
    pub(super) overlays: Vec<Image>,
    /// Nodes with a known name, base first, the filter last.
    pub(super) nodes: Vec<NamedNode>,
    /// Exports that the setup makes.
    pub(super) exports: Vec<NamedExport>,
    /// Whether lower layers are opened with a name (not from the header).
    named_lower: bool,
    inline: bool,
    cor_bottom: Option<usize>,
}

impl Chain {
    pub(super) fn draw(rng: &mut Rng, swarm: &Swarm) -> Chain {
        let largest = u64::from(swarm.cluster) * u64::from(swarm.clusters);
        let mut images: Vec<Image> = Vec::new();
        for layer in 0..swarm.layers as usize {
            let below = images.last().cloned();
            images.push(image(rng, swarm, layer, largest, below.as_ref()));
        }
        let inline = swarm.inline_children;
        let named_lower = !inline || rng.chance(1, 2);
        let top = images.len() - 1;
        let cor_bottom =
            (swarm.cor_node && swarm.cor_bottom && named_lower).then(|| rng.below(swarm.layers) as usize);
        let mut chain = Chain {
            images,
            overlays: Vec::new(),
            nodes: Vec::new(),
            exports: Vec::new(),
            named_lower,
            inline,
            cor_bottom,
        };
        let lowest = if named_lower { 0 } else { top };
        chain.nodes = (lowest..=top)
            .map(|layer| NamedNode {
                name: format!("n{layer}"),
                layer,
            })
            .collect();
        if swarm.cor_node {
            chain.nodes.push(NamedNode {
                name: "cor".to_owned(),
                layer: top,
            });
        }
        chain.draw_exports(rng, swarm, top);
        for number in 0..swarm.overlays {
            let overlay = overlay(rng, swarm, number, &chain.images[top]);
            chain.overlays.push(overlay);
        }
        chain
    }

    /// Layers that have a name.
    pub(super) fn layers(&self) -> std::ops::Range<usize> {
        let top = self.images.len();
        if self.named_lower { 0..top } else { top - 1..top }
    }

    pub(super) fn overlay_names(&self) -> Vec<String> {
        (0..self.overlays.len()).map(|n| format!("o{n}")).collect()
    }

    /// Whether a layer has a backing link, or could have.
    pub(super) fn has_backing(&self, layer: usize) -> bool {
        self.images[layer].format == Format::Qcow2
    }

    /// A layer by its name.
    pub(super) fn reference(&self, layer: usize) -> Value {
        json!(format!("n{layer}"))
    }

    /// What a layer was opened with, but for its backing file.
    pub(super) fn definition(&self, layer: usize, swarm: &Swarm) -> Map<String, Value> {
        let mut node = self.format_node(layer, swarm);
        let file = if self.inline {
            self.inline_file(layer, swarm)
        } else {
            json!(format!("f{layer}"))
        };
        node.insert("file".to_owned(), file);
        node
    }

    /// What the file of a layer was opened with, if it has a name.
    pub(super) fn file_definition(&self, layer: usize, swarm: &Swarm) -> Option<Map<String, Value>> {
        if self.inline {
            return None;
        }
        let Value::Object(node) = self.file_node(layer, Some(&format!("f{layer}")), swarm) else {
            unreachable!("an object")
        };
        Some(node)
    }

    fn draw_exports(&mut self, rng: &mut Rng, swarm: &Swarm, top: usize) {
        let mut wanted: Vec<(usize, bool)> = Vec::new();
        for (at, node) in self.nodes.iter().enumerate() {
            let is_root = at + 1 == self.nodes.len();
            if is_root {
                wanted.push((at, true));
            } else if node.layer == top {
                if rng.chance(1, 2) {
                    wanted.push((at, !swarm.read_only_top && rng.chance(1, 2)));
                }
            } else if swarm.lower_exports && rng.chance(1, 2) {
                wanted.push((at, swarm.writable_backing && rng.chance(1, 2)));
            }
        }
        for (at, writable) in wanted {
            let image = &self.images[self.nodes[at].layer];
            self.exports.push(NamedExport {
                name: format!("x-{}", self.nodes[at].name),
                size: image.size.next_multiple_of(512),
                cluster: u64::from(image.cluster_size),
                writable: writable && !(swarm.read_only_top && self.nodes[at].layer == top),
            });
        }
    }

    /// Appends the commands that open the chain and make the exports.
    pub(super) fn setup(&self, rng: &mut Rng, swarm: &Swarm, steps: &mut Vec<Step>) {
        let top = self.images.len() - 1;
        if self.inline {
            steps.push(command(SETUP, "blockdev-add", self.inline_node(swarm, top)));
        } else {
            for layer in 0..=top {
                steps.push(command(
                    SETUP,
                    "blockdev-add",
                    self.file_node(layer, Some(&format!("f{layer}")), swarm),
                ));
                let mut node = self.format_node(layer, swarm);
                node.insert("file".to_owned(), json!(format!("f{layer}")));
                if let Some(below) = layer.checked_sub(1) {
                    node.insert("backing".to_owned(), json!(format!("n{below}")));
                } else if self.images[layer].format == Format::Qcow2 && rng.chance(1, 2) {
                    node.insert("backing".to_owned(), Value::Null);
                }
                steps.push(command(SETUP, "blockdev-add", Value::Object(node)));
            }
        }
        if swarm.cor_node {
            let mut filter = json!({"driver": "copy-on-read", "node-name": "cor", "file": format!("n{top}")});
            if let Some(bottom) = self.cor_bottom {
                filter["bottom"] = json!(format!("n{bottom}"));
            }
            steps.push(command(SETUP, "blockdev-add", filter));
        }
        for (number, image) in self.overlays.iter().enumerate() {
            let mut add = json!({"driver": "qcow2", "node-name": format!("o{number}"), "backing": null,
                "file": {"driver": "file", "filename": image.file}});
            if swarm.discard_unmap {
                add["discard"] = json!("unmap");
            }
            steps.push(command(SETUP, "blockdev-add", add));
        }
        for export in &self.exports {
            let node = export.name.trim_start_matches("x-");
            let add = json!({"type": "nbd", "id": export.name, "name": export.name, "node-name": node,
                "writable": export.writable});
            steps.push(command(SETUP, "block-export-add", add));
        }
    }

    fn file_node(&self, layer: usize, name: Option<&str>, swarm: &Swarm) -> Value {
        let mut node = json!({"driver": "file", "filename": self.images[layer].file});
        if let Some(name) = name {
            node["node-name"] = json!(name);
        }
        if swarm.discard_unmap {
            node["discard"] = json!("unmap");
        }
        if self.read_only(layer, swarm) && layer.is_multiple_of(2) {
            node["read-only"] = json!(true);
        }
        node
    }

    fn read_only(&self, layer: usize, swarm: &Swarm) -> bool {
        if layer + 1 == self.images.len() {
            swarm.read_only_top
        } else {
            !swarm.writable_backing
        }
    }

    fn format_node(&self, layer: usize, swarm: &Swarm) -> Map<String, Value> {
        let driver = match self.images[layer].format {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        };
        let mut node = json!({"driver": driver, "node-name": format!("n{layer}")});
        if swarm.discard_unmap {
            node["discard"] = json!("unmap");
        }
        if self.read_only(layer, swarm) {
            node["read-only"] = json!(true);
            if layer + 1 == self.images.len() {
                // Otherwise a stream could never reopen the file below.
                node["auto-read-only"] = json!(false);
            }
        }
        let Value::Object(node) = node else {
            unreachable!("an object")
        };
        node
    }

    fn inline_file(&self, layer: usize, swarm: &Swarm) -> Value {
        let mut file = self.file_node(layer, None, swarm);
        file.as_object_mut().expect("an object").remove("read-only");
        file
    }

    fn inline_node(&self, swarm: &Swarm, layer: usize) -> Value {
        let mut node = self.format_node(layer, swarm);
        node.insert("file".to_owned(), self.inline_file(layer, swarm));
        if layer > 0 && self.named_lower {
            node.insert("backing".to_owned(), self.inline_node(swarm, layer - 1));
        }
        Value::Object(node)
    }
}

fn image(rng: &mut Rng, swarm: &Swarm, layer: usize, largest: u64, below: Option<&Image>) -> Image {
    let format = if layer == 0 && swarm.raw_base {
        Format::Raw
    } else {
        Format::Qcow2
    };
    let odd = swarm.odd_formats && rng.chance(1, 2);
    let cluster_size = if odd {
        *rng.pick(&[512, 1024, 4096])
    } else {
        swarm.cluster
    };
    let mut size = largest;
    if swarm.uneven && rng.chance(1, 2) {
        let clusters = 1 + rng.below(swarm.clusters + swarm.clusters / 2);
        size = u64::from(clusters) * u64::from(swarm.cluster);
    }
    if swarm.odd_tails && rng.chance(1, 2) {
        let unit = if format == Format::Raw {
            u64::from(swarm.grain)
        } else {
            512
        };
        let cut = u64::from(rng.below(swarm.cluster.max(1024))) / unit * unit;
        size = size.saturating_sub(cut).max(512);
    }
    let compat = if swarm.compat2 && rng.chance(1, 2) { 2 } else { 3 };
    let refcount_bits = if odd && compat == 3 {
        *rng.pick(&[1, 2, 4, 8, 16, 32, 64])
    } else {
        16
    };
    let mut image = Image {
        file: format!("i{layer}.img"),
        format,
        size,
        cluster_size,
        compat,
        refcount_bits,
        backing_file: below.map(|b| b.file.clone()),
        backing_format: below.map(|b| if b.format == Format::Raw { "raw" } else { "qcow2" }.to_owned()),
        fill: Vec::new(),
    };
    if format == Format::Raw {
        (image.cluster_size, image.compat) = (65536, 3);
    }
    for _ in 0..rng.below(5) {
        image.fill.push(fill(rng, swarm, &image));
    }
    image
}

/// An image to put above `top`: its header names what is to be below, and now and then it holds something already.
fn overlay(rng: &mut Rng, swarm: &Swarm, number: u32, top: &Image) -> Image {
    let mut size = top.size.next_multiple_of(512);
    if swarm.uneven && rng.chance(1, 2) {
        size = u64::from(swarm.cluster) * u64::from(1 + rng.below(swarm.clusters + swarm.clusters / 2));
    }
    let mut image = Image {
        file: format!("o{number}.img"),
        format: Format::Qcow2,
        size,
        cluster_size: swarm.cluster,
        compat: 3,
        refcount_bits: 16,
        backing_file: Some(top.file.clone()),
        backing_format: Some(if top.format == Format::Raw { "raw" } else { "qcow2" }.to_owned()),
        fill: Vec::new(),
    };
    if rng.chance(1, 4) {
        image.fill.push(fill(rng, swarm, &image));
    }
    image
}

fn fill(rng: &mut Rng, swarm: &Swarm, image: &Image) -> Fill {
    let unit = u64::from(swarm.cluster.min(image.cluster_size));
    let units = image.size.div_ceil(unit);
    let offset = u64::from(rng.below(u32::try_from(units).expect("small images"))) * unit;
    let length = (u64::from(1 + rng.below(1 + swarm.clusters / 3)) * unit).min(image.size - offset);
    let mut stored = Stored::Data;
    if image.format == Format::Qcow2 {
        if swarm.compressed && rng.chance(1, 3) {
            stored = Stored::Compressed;
        } else if swarm.zero_clusters && image.compat == 3 && rng.chance(1, 2) {
            stored = *rng.pick(&[Stored::Zero, Stored::ZeroAllocated]);
        }
    }
    Fill {
        offset,
        length,
        stored,
    }
}
