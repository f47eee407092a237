//! The images of a scenario and the commands that open them.

use serde_json::{Map, Value, json};

use super::throttle::{self, Layout};
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
    /// Nodes with a known name, base first, filters after what they filter.
    pub(super) nodes: Vec<NamedNode>,
    /// Throttle filters of the setup, with all their options.
    pub(super) throttles: Vec<Map<String, Value>>,
    /// Exports that the setup makes.
    pub(super) exports: Vec<NamedExport>,
    /// Whether lower layers are opened with a name (not from the header).
    named_lower: bool,
    inline: bool,
    cor_bottom: Option<usize>,
    layout: Layout,
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
            throttles: Vec::new(),
            exports: Vec::new(),
            named_lower,
            inline,
            cor_bottom,
            layout: Layout::draw(rng, swarm, named_lower),
        };
        chain.name_nodes(swarm, if named_lower { 0 } else { top });
        chain.note_throttles(swarm);
        chain.draw_exports(rng, swarm, top);
        for number in 0..swarm.overlays {
            let overlay = overlay(rng, swarm, number, &chain.images[top]);
            chain.overlays.push(overlay);
        }
        chain
    }

    fn name_nodes(&mut self, swarm: &Swarm, lowest: usize) {
        let top = self.images.len() - 1;
        let mut names = Vec::new();
        for layer in lowest..=top {
            names.push((format!("n{layer}"), layer));
            if self.layout.backing.get(layer + 1).is_some_and(Option::is_some) {
                names.push((format!("tb{}", layer + 1), layer));
            }
        }
        let filters = [
            (self.layout.under_filter.is_some(), "tu"),
            (swarm.cor_node, "cor"),
            (self.layout.top.is_some(), "tt"),
        ];
        let filters = filters.into_iter().filter(|(there, _)| *there);
        names.extend(filters.map(|(_, name)| (name.to_owned(), top)));
        let named = |(name, layer)| NamedNode { name, layer };
        self.nodes = names.into_iter().map(named).collect();
    }

    /// The throttle filters, as they are opened.
    fn note_throttles(&mut self, swarm: &Swarm) {
        let top = self.images.len() - 1;
        let mut all = Vec::new();
        for layer in self.layers() {
            if !self.inline {
                all.extend(self.file_filter(layer));
                all.extend(self.backing_filter(layer));
                continue;
            }
            // As they stand in the definition of their layer.
            if self.layout.file[layer].is_some() {
                all.extend(self.file_of(layer, swarm).as_object().cloned());
            }
            if self.layout.backing[layer].is_some() {
                all.extend(self.backing_of(layer, swarm).as_object().cloned());
            }
        }
        all.extend(self.under_filter(top));
        all.extend(self.top_filter(swarm));
        self.throttles = all;
    }

    /// The filter above the file of a layer, where it is opened apart.
    fn file_filter(&self, layer: usize) -> Option<Map<String, Value>> {
        let group = self.layout.file[layer]?;
        let file = json!(format!("f{layer}"));
        Some(throttle::filter(&format!("tf{layer}"), group, file))
    }

    /// The filter in the backing link of a layer, where it is opened apart.
    fn backing_filter(&self, layer: usize) -> Option<Map<String, Value>> {
        let (group, below) = (self.layout.backing[layer]?, layer.checked_sub(1)?);
        let file = self.reference(below);
        Some(throttle::filter(&format!("tb{layer}"), group, file))
    }

    fn under_filter(&self, top: usize) -> Option<Map<String, Value>> {
        let group = self.layout.under_filter?;
        Some(throttle::filter("tu", group, self.reference(top)))
    }

    fn top_filter(&self, swarm: &Swarm) -> Option<Map<String, Value>> {
        let group = self.layout.top?;
        let below = if swarm.cor_node {
            json!("cor")
        } else {
            self.reference(self.images.len() - 1)
        };
        Some(throttle::filter("tt", group, below))
    }

    /// What the backing link of a layer leads to from the start.
    pub(super) fn below(&self, layer: usize) -> Option<Value> {
        let below = layer.checked_sub(1)?;
        Some(match self.layout.backing[layer] {
            Some(_) => json!(format!("tb{layer}")),
            None => self.reference(below),
        })
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
        node.insert("file".to_owned(), self.file_of(layer, swarm));
        node
    }

    /// The option `file` of a layer.
    fn file_of(&self, layer: usize, swarm: &Swarm) -> Value {
        let filter = format!("tf{layer}");
        match (self.inline, self.layout.file[layer]) {
            (true, Some(group)) => {
                Value::Object(throttle::filter(&filter, group, self.inline_file(layer, swarm)))
            }
            (true, None) => self.inline_file(layer, swarm),
            (false, Some(_)) => json!(filter),
            (false, None) => json!(format!("f{layer}")),
        }
    }

    /// The option `backing` of a layer that has one, from the start.
    fn backing_of(&self, layer: usize, swarm: &Swarm) -> Value {
        match (self.inline, self.layout.backing[layer]) {
            (true, Some(group)) => {
                let below = self.inline_node(swarm, layer - 1);
                Value::Object(throttle::filter(&format!("tb{layer}"), group, below))
            }
            (true, None) => self.inline_node(swarm, layer - 1),
            (false, _) => self.below(layer).expect("not the base"),
        }
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
        self.layout.setup(rng, swarm, steps);
        let open = |filter: Option<Map<String, Value>>, steps: &mut Vec<Step>| {
            let filter = filter.map(|filter| command(SETUP, "blockdev-add", Value::Object(filter)));
            steps.extend(filter);
        };
        if self.inline {
            steps.push(command(SETUP, "blockdev-add", self.inline_node(swarm, top)));
        } else {
            for layer in 0..=top {
                steps.push(command(
                    SETUP,
                    "blockdev-add",
                    self.file_node(layer, Some(&format!("f{layer}")), swarm),
                ));
                open(self.file_filter(layer), steps);
                open(self.backing_filter(layer), steps);
                let mut node = self.definition(layer, swarm);
                if let Some(below) = self.below(layer) {
                    node.insert("backing".to_owned(), below);
                } else if self.images[layer].format == Format::Qcow2 && rng.chance(1, 2) {
                    node.insert("backing".to_owned(), Value::Null);
                }
                steps.push(command(SETUP, "blockdev-add", Value::Object(node)));
            }
        }
        open(self.under_filter(top), steps);
        if swarm.cor_node {
            let below = match self.layout.under_filter {
                Some(_) => json!("tu"),
                None => self.reference(top),
            };
            let mut filter = json!({"driver": "copy-on-read", "node-name": "cor", "file": below});
            if let Some(bottom) = self.cor_bottom {
                filter["bottom"] = json!(format!("n{bottom}"));
            }
            steps.push(command(SETUP, "blockdev-add", filter));
        }
        open(self.top_filter(swarm), steps);
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
        let driver = self.images[layer].format.driver();
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
        let mut node = self.definition(layer, swarm);
        if layer > 0 && self.named_lower {
            node.insert("backing".to_owned(), self.backing_of(layer, swarm));
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
        backing_format: below.map(|b| b.format.driver().to_owned()),
        free: 0,
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
        backing_format: Some(top.format.driver().to_owned()),
        free: 0,
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
