//! Which disk each node shows, command by command.
//!
//! Rules: what is above a node shows the same disk, unless it is an overlay, which has a disk of its own that begins as
//! its image over what is below. A snapshot leaves a disk as it is and gives the old node one that is frozen; a job that
//! moves a disk takes its guests along. Whatever cannot be followed is not trusted any more.

use serde_json::{Map, Value};

use super::cells::{Cell, Disk, overlay};
use super::watch::Watch;
use crate::scenario::{Range, Scenario, actions};
use crate::stamp::Source;

/// Part of a disk, grains.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct View {
    pub(super) disk: usize,
    pub(super) first: usize,
    /// None: to the end.
    pub(super) count: Option<usize>,
}

/// An export.
#[derive(Clone, Debug)]
pub(super) struct Export {
    pub(super) id: String,
    pub(super) view: View,
    pub(super) writable: bool,
    /// As long as it was when it was made, bytes, whatever becomes of the node.
    pub(super) length: u64,
}

/// What a job will have done.
#[derive(Clone, Debug)]
pub(super) enum What {
    /// Nothing that can be seen.
    Nothing,
    /// These nodes, top first, are to become one, the last.
    Commit { nodes: Vec<String>, active: bool },
    /// The target is to hold what the source holds.
    Mirror {
        source: String,
        target: String,
        full: bool,
        pivot: bool,
    },
    /// The target is to hold this.
    Backup { target: String, copy: Vec<Cell> },
}

/// A job.
#[derive(Clone, Debug)]
pub(super) struct Job {
    what: What,
    slow: bool,
}

impl Job {
    /// It has a rate limit.
    pub(super) fn is_slow(&self) -> bool {
        self.slow
    }
}

fn text<'a>(options: &'a Map<String, Value>, key: &str) -> Option<&'a str> {
    options.get(key).and_then(Value::as_str)
}

const FILTERS: [&str; 7] = [
    "copy-on-read",
    "throttle",
    "compress",
    "blkdebug",
    "copy-before-write",
    "preallocate",
    "snapshot-access",
];

impl Watch<'_> {
    /// What a grain at this offset of a view holds; none when that is not judged.
    pub(super) fn cell(&self, view: &View, offset: u64) -> Option<Cell> {
        let disk = &self.disks[view.disk];
        let at = usize::try_from(offset / u64::from(self.scenario.grain)).ok()?;
        let inside = view.count.is_none_or(|count| at < count);
        // Past the end of a disk that became shorter there is nothing to know.
        (disk.trusted && inside).then(|| disk.cells.get(view.first + at).copied())?
    }

    /// Length of a view, bytes.
    pub(super) fn length(&self, view: &View) -> u64 {
        let rest = self.disks[view.disk].cells.len().saturating_sub(view.first);
        view.count.unwrap_or(rest).min(rest) as u64 * u64::from(self.scenario.grain)
    }

    /// A guest wrote there.
    pub(super) fn put(&mut self, view: &View, range: Range, source: Option<Source>) {
        let grain = u64::from(self.scenario.grain);
        let first = usize::try_from(range.offset / grain).expect("a short disk");
        for at in first..first + usize::try_from(range.length / grain).expect("a short range") {
            let cell = source.map_or(Cell::Zero, |s| Cell::Stamp(s, at as u64 * grain));
            if let Some(place) = self.disks[view.disk].cells.get_mut(view.first + at) {
                *place = cell;
            }
        }
        self.others_lost(view.disk);
    }

    /// A disk that others were made over changed.
    fn others_lost(&mut self, disk: usize) {
        let mut changed = vec![disk];
        while let Some(below) = changed.pop() {
            for above in 0..self.disks.len() {
                if self.disks[above].trusted && self.is_above(above, below) {
                    self.disks[above].trusted = false;
                    changed.push(above);
                }
            }
        }
    }

    /// A node that shows `above` has one below that shows `below`.
    fn is_above(&self, above: usize, below: usize) -> bool {
        let shows = |name: &str, disk: usize| self.nodes.get(name).is_some_and(|v| v.disk == disk);
        above != below
            && self.state.links.iter().any(|(parent, _, child, _, _)| {
                let parent = parent.strip_prefix("node '").and_then(|p| p.strip_suffix('\''));
                shows(child, below) && parent.is_some_and(|p| shows(p, above))
            })
    }

    fn new_disk(&mut self, cells: Vec<Cell>, trusted: bool) -> View {
        self.disks.push(Disk { cells, trusted });
        View {
            disk: self.disks.len() - 1,
            first: 0,
            count: None,
        }
    }

    /// Whatever is over one of these nodes and is none of them.
    fn lose_beside(&mut self, chain: &[String]) {
        let disk = |node: &String| self.nodes.get(node).map(|v| v.disk);
        let own: Vec<usize> = chain.iter().filter_map(disk).collect();
        let beside =
            |above: &usize| !own.contains(above) && own.iter().any(|below| self.is_above(*above, *below));
        let lost: Vec<usize> = (0..self.disks.len()).filter(beside).collect();
        // What is over the top stays as it is: the top does.
        let top = own.first().copied();
        for above in lost {
            if !top.is_some_and(|top| self.is_above(above, top)) {
                self.disks[above].trusted = false;
                self.others_lost(above);
            }
        }
    }

    fn lose(&mut self, node: &str) {
        if let Some(view) = self.nodes.get(node) {
            self.disks[view.disk].trusted = false;
        }
    }

    /// The node's disk as it is.
    fn copy_of(&self, node: &str) -> Option<Vec<Cell>> {
        let view = self.nodes.get(node)?;
        let disk = &self.disks[view.disk];
        let whole = view.first == 0 && view.count.is_none();
        (disk.trusted && whole).then(|| disk.cells.clone())
    }

    fn child(&self, node: &str, name: &str) -> Option<String> {
        let above = format!("node '{node}'");
        let links = &self.state.links;
        let link = links.iter().find(|l| l.0 == above && l.1 == name)?;
        Some(link.2.clone())
    }

    /// The node below, along the chain.
    fn below(&self, node: &str) -> Option<String> {
        self.child(node, "backing").or_else(|| {
            let file = self.child(node, "file").or_else(|| self.child(node, "image"))?;
            // A format's file is no layer.
            (!self.files.contains_key(node)).then_some(file)
        })
    }

    /// The nodes that a command about to be sent would make one, as they are now, top first.
    pub(super) fn chain(&self, execute: &str, arguments: &Map<String, Value>) -> Vec<String> {
        if execute != "block-commit" {
            return Vec::new();
        }
        let Some(device) = text(arguments, "device") else {
            return Vec::new();
        };
        let top = text(arguments, "top-node").unwrap_or(device);
        let mut nodes = vec![top.to_owned()];
        while let Some(next) = self.below(nodes.last().expect("not empty")) {
            nodes.push(next);
        }
        if let Some(base) = text(arguments, "base-node")
            && let Some(at) = nodes.iter().position(|n| n == base)
        {
            nodes.truncate(at + 1);
        }
        nodes
    }

    /// A command was accepted.
    pub(super) fn accepted(&mut self, execute: &str, arguments: &Map<String, Value>, chain: &[String]) {
        let arg = |key: &str| text(arguments, key).unwrap_or_default().to_owned();
        match execute {
            "blockdev-add" => {
                self.opened(arguments);
            }
            "blockdev-del" => {
                self.nodes.remove(&arg("node-name"));
            }
            "object-add" => self.objects.push(arg("id")),
            "object-del" => self.objects.retain(|o| *o != arg("id")),
            "block-export-add" => {
                let writable = arguments.get("writable") == Some(&Value::Bool(true));
                let name = text(arguments, "name")
                    .unwrap_or_else(|| text(arguments, "node-name").unwrap_or_default());
                if let Some(view) = self.nodes.get(&arg("node-name")).cloned() {
                    let id = arg("id");
                    let length = self.length(&view);
                    self.exports.insert(
                        name.to_owned(),
                        Export {
                            id,
                            view,
                            writable,
                            length,
                        },
                    );
                }
            }
            "block-export-del" => {
                let id = arg("id");
                self.exports.retain(|_, export| export.id != id);
            }
            "transaction" => {
                for (kind, data) in actions(execute, arguments) {
                    self.accepted(kind, data, &[]);
                }
            }
            "blockdev-snapshot" => self.snapshot(&arg("node"), &arg("overlay")),
            "block_resize" => self.resized(&arg("node-name"), arguments.get("size").and_then(Value::as_u64)),
            "change-backing-file" => self.headers_apply = false,
            "block-dirty-bitmap-add" => {
                self.stored_bitmaps |= arguments.get("persistent") == Some(&Value::Bool(true));
            }
            "blockdev-reopen" => self.reopened(arguments),
            "block-stream" | "block-commit" | "blockdev-mirror" | "blockdev-backup" => {
                self.started(execute, arguments, chain);
            }
            "job-complete" | "block-job-complete" => {
                let id = if execute == "job-complete" {
                    arg("id")
                } else {
                    arg("device")
                };
                if let Some(Job {
                    what: What::Mirror { pivot, .. },
                    ..
                }) = self.jobs.get_mut(&id)
                {
                    *pivot = true;
                }
            }
            "block-job-set-speed" => {
                let speed = arguments.get("speed").and_then(Value::as_u64);
                if let Some(job) = self.jobs.get_mut(&arg("device")) {
                    job.slow = speed.is_some_and(|s| s > 0);
                }
            }
            _ => {}
        }
    }

    /// A node was opened; what it shows.
    fn opened(&mut self, options: &Map<String, Value>) -> Option<View> {
        let driver = text(options, "driver")?;
        let inner = |watch: &mut Self, key: &str| match options.get(key) {
            Some(Value::String(name)) => watch.nodes.get(name).cloned(),
            Some(Value::Object(node)) => watch.opened(node),
            _ => None,
        };
        let view = match driver {
            "qcow2" | "raw" => {
                let below = inner(self, "backing");
                let through = inner(self, "file");
                match image_of(options) {
                    Some(file) => self.opened_image(options, &file, below.as_ref()),
                    None if driver == "raw" => {
                        let grain = u64::from(self.scenario.grain);
                        let number = |key: &str| options.get(key).and_then(Value::as_u64);
                        let grains = |bytes: u64| usize::try_from(bytes / grain).unwrap_or(0);
                        through.map(|view| View {
                            disk: view.disk,
                            first: view.first + grains(number("offset").unwrap_or(0)),
                            count: number("size").map(grains).or(view.count),
                        })
                    }
                    None => None,
                }
            }
            "blkdebug" => inner(self, "image"),
            "snapshot-access" => None,
            _ if FILTERS.contains(&driver) => inner(self, "file"),
            _ => None,
        }?;
        if let Some(name) = text(options, "node-name") {
            self.nodes.insert(name.to_owned(), view.clone());
        }
        Some(view)
    }

    fn opened_image(
        &mut self,
        options: &Map<String, Value>,
        file: &str,
        below: Option<&View>,
    ) -> Option<View> {
        let at = self.scenario.images.iter().position(|i| i.file == file)?;
        let image = &self.scenario.images[at];
        let own_backing = options.get("backing");
        // The chain in use is the one on record only if nobody says otherwise.
        let named = match own_backing {
            Some(Value::String(node)) => self.image_below(node),
            Some(Value::Null) => None,
            _ => image.backing_file.clone(),
        };
        let is_overlay_to_be = own_backing == Some(&Value::Null);
        if is_overlay_to_be && image.backing_file.is_some() {
            self.detached.insert(file.to_owned());
        }
        if named != image.backing_file && !is_overlay_to_be {
            self.headers_apply = false;
        }
        let cells = match (below, &image.backing_file, own_backing) {
            (Some(view), ..) => {
                let disk = &self.disks[view.disk];
                let trusted = disk.trusted && view.first == 0 && view.count.is_none();
                let cells = overlay(
                    image,
                    u16::try_from(at).ok()?,
                    self.scenario.grain,
                    Some(&disk.cells),
                );
                return self.named(options, file, cells, trusted);
            }
            (None, Some(_), None) => overlay(
                image,
                u16::try_from(at).ok()?,
                self.scenario.grain,
                Some(&from_header(self.scenario, image.backing_file.as_deref(), 0)),
            ),
            _ => overlay(image, u16::try_from(at).ok()?, self.scenario.grain, None),
        };
        let trusted = !matches!(own_backing, Some(Value::String(_) | Value::Object(_)));
        self.named(options, file, cells, trusted)
    }

    fn named(
        &mut self,
        options: &Map<String, Value>,
        file: &str,
        cells: Vec<Cell>,
        trusted: bool,
    ) -> Option<View> {
        // A file opened twice is nobody's.
        let twice = self
            .files
            .iter()
            .any(|(node, f)| f == file && self.nodes.contains_key(node));
        let view = self.new_disk(cells, trusted && !twice);
        if let Some(name) = text(options, "node-name") {
            self.files.insert(name.to_owned(), file.to_owned());
        }
        Some(view)
    }

    /// The image that this node, or the first below it, has.
    pub(super) fn image_below(&self, node: &str) -> Option<String> {
        let mut at = node.to_owned();
        loop {
            if let Some(file) = self.files.get(&at) {
                return Some(file.clone());
            }
            at = self.below(&at)?;
        }
    }

    fn snapshot(&mut self, node: &str, over: &str) {
        let Some(view) = self.nodes.get(node).cloned() else {
            self.lose(over);
            return;
        };
        let header = self.files.get(over).and_then(|file| {
            let image = self.scenario.images.iter().find(|i| i.file == *file)?;
            image.backing_file.clone()
        });
        self.headers_apply &= header == self.image_below(node);
        if let Some(file) = self.files.get(over) {
            self.detached.remove(file);
        }
        self.headers_apply &= self
            .image_below(node)
            .is_none_or(|file| !self.detached.contains(&file));
        let over_cells = self.nodes.get(over).map(|v| self.disks[v.disk].cells.len());
        let frozen = self.disks[view.disk].clone();
        let (cells, trusted) = (frozen.cells.clone(), frozen.trusted);
        // An overlay that has data of its own shows that.
        let own = self
            .nodes
            .get(over)
            .map(|v| self.disks[v.disk].cells.clone())
            .unwrap_or_default();
        let file = self.files.get(over).cloned().unwrap_or_default();
        let image = self.scenario.images.iter().find(|i| i.file == file);
        let empty = image.is_some_and(|i| i.fill.is_empty()) && own.iter().all(|c| *c == Cell::Zero);
        let below = self.new_disk(cells, trusted);
        self.nodes.insert(node.to_owned(), below);
        let disk = &mut self.disks[view.disk];
        disk.cells.resize(over_cells.unwrap_or(0), Cell::Zero);
        disk.trusted &= empty && view.first == 0 && view.count.is_none();
        self.nodes.insert(over.to_owned(), view);
    }

    fn resized(&mut self, node: &str, size: Option<u64>) {
        let (Some(view), Some(size)) = (self.nodes.get(node).cloned(), size) else {
            return;
        };
        let grain = u64::from(self.scenario.grain);
        let disk = &mut self.disks[view.disk];
        disk.trusted &= size.is_multiple_of(grain) && view.first == 0 && view.count.is_none();
        disk.cells
            .resize(usize::try_from(size / grain).unwrap_or(0), Cell::Zero);
        self.others_lost(view.disk);
    }

    fn reopened(&mut self, arguments: &Map<String, Value>) {
        for options in arguments
            .get("options")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
        {
            let Some(name) = options["node-name"].as_str() else {
                continue;
            };
            for key in ["file", "image"] {
                if let Some(Value::String(below)) = options.get(key)
                    && let Some(view) = self.nodes.get(below).cloned()
                    && self.nodes.contains_key(name)
                {
                    // A filter shows what it is over now; a window is not followed any more.
                    if options["driver"] == "raw" {
                        self.nodes.remove(name);
                    } else {
                        self.nodes.insert(name.to_owned(), view);
                    }
                }
            }
            if options.get("backing") == Some(&Value::Null) && self.child(name, "backing").is_some() {
                self.headers_apply = false;
                self.lose(name);
            }
            let Some(Value::String(below)) = options.get("backing") else {
                continue;
            };
            // Filters come and go; another layer is another disk.
            let now = self.nodes.get(below).map(|v| v.disk);
            let was = self
                .child(name, "backing")
                .and_then(|b| self.nodes.get(&b).map(|v| v.disk));
            if now != was {
                self.headers_apply = false;
                self.lose(name);
                if let Some(view) = self.nodes.get(name).cloned() {
                    self.others_lost(view.disk);
                }
            }
        }
    }

    fn started(&mut self, execute: &str, arguments: &Map<String, Value>, chain: &[String]) {
        let arg = |key: &str| text(arguments, key).unwrap_or_default().to_owned();
        self.headers_apply &= !arguments.contains_key("backing-file");
        let what = match execute {
            "block-commit" => {
                for node in chain.iter().skip(1) {
                    self.lose(node);
                }
                self.lose_beside(chain);
                let active = text(arguments, "top-node").is_none_or(|top| top == arg("device"));
                What::Commit {
                    nodes: chain.to_vec(),
                    active,
                }
            }
            "blockdev-mirror" => {
                self.lose(&arg("target"));
                let full = text(arguments, "sync") == Some("full");
                What::Mirror {
                    source: arg("device"),
                    target: arg("target"),
                    full,
                    pivot: false,
                }
            }
            "blockdev-backup" => {
                self.lose(&arg("target"));
                let copy = self.copy_of(&arg("device"));
                match (text(arguments, "sync"), copy) {
                    (Some("full"), Some(copy)) => What::Backup {
                        target: arg("target"),
                        copy,
                    },
                    _ => What::Nothing,
                }
            }
            _ => What::Nothing,
        };
        let slow = arguments
            .get("speed")
            .and_then(Value::as_u64)
            .is_some_and(|s| s > 0);
        self.jobs.insert(arg("job-id"), Job { what, slow });
    }

    /// A job ended.
    pub(super) fn job_over(&mut self, id: &str, well: bool) {
        let Some(job) = self.jobs.get_mut(id) else { return };
        let what = std::mem::replace(&mut job.what, What::Nothing);
        if !well {
            return;
        }
        match what {
            What::Nothing => {}
            What::Commit { nodes, active } => self.committed(&nodes, active),
            What::Mirror {
                source,
                target,
                full,
                pivot,
            } => {
                let Some(cells) = self.copy_of(&source).filter(|_| full) else {
                    // Guests may be on something that nobody knows now.
                    self.headers_apply = false;
                    if pivot && let Some(view) = self.nodes.get(&source) {
                        self.disks[view.disk].trusted = false;
                    }
                    return;
                };
                let copy = self.new_disk(cells, true);
                if pivot {
                    self.headers_apply = false;
                    let moved = self.nodes.insert(source.clone(), copy.clone()).expect("copied");
                    // What the source filters stays below it.
                    let mut below = self.below(&source);
                    while let Some(node) = below.filter(|n| self.nodes.get(n) == Some(&moved)) {
                        self.nodes.insert(node.clone(), copy.clone());
                        below = self.below(&node);
                    }
                    self.nodes.insert(target, moved);
                } else {
                    self.nodes.insert(target, copy);
                }
            }
            What::Backup { target, copy } => {
                let view = self.new_disk(copy, true);
                self.nodes.insert(target, view);
            }
        }
    }

    fn committed(&mut self, nodes: &[String], active: bool) {
        let (Some(top), Some(base)) = (nodes.first(), nodes.last()) else {
            return;
        };
        let Some(view) = self.nodes.get(top).cloned() else {
            return;
        };
        let length = self.nodes.get(base).map_or(0, |v| self.disks[v.disk].cells.len());
        if active {
            // A longer base stays as long as it is.
            let cells = &mut self.disks[view.disk].cells;
            cells.resize(length.max(cells.len()), Cell::Any);
            self.nodes.insert(base.clone(), view);
            self.nodes.remove(top);
        } else if let Some(mut cells) = self.copy_of(top) {
            cells.resize(length.max(cells.len()), Cell::Any);
            let copy = self.new_disk(cells, true);
            self.nodes.insert(base.clone(), copy);
        }
    }
}

/// The image that these options open directly.
fn image_of(options: &Map<String, Value>) -> Option<String> {
    match options.get("file")? {
        Value::Object(file) => match text(file, "driver")? {
            "file" => text(file, "filename").map(str::to_owned),
            "blkdebug" | "preallocate" => match file.get("image").or_else(|| file.get("file"))? {
                Value::Object(inner) => text(inner, "filename").map(str::to_owned),
                _ => None,
            },
            _ => None,
        },
        _ => None,
    }
}

/// The disk that an image shows over what its header names.
fn from_header(scenario: &Scenario, file: Option<&str>, depth: u32) -> Vec<Cell> {
    let Some(at) = scenario
        .images
        .iter()
        .position(|i| Some(i.file.as_str()) == file)
        .filter(|_| depth < 16)
    else {
        return Vec::new();
    };
    let image = &scenario.images[at];
    let below = from_header(scenario, image.backing_file.as_deref(), depth + 1);
    overlay(
        image,
        u16::try_from(at).unwrap_or(0),
        scenario.grain,
        Some(&below),
    )
}
