//! What every image holds, followed step by step, to say what a read must see and which clusters a layer must have.
//!
//! Rules: one value per grain: 0 for zeroes, else who wrote it. One step runs at a time, so that a read has exactly one
//! right answer. What cannot be known from outside is [`UNKNOWN`] and never compared: a file opened twice, discards
//! where nodes pass them on, windows of raw nodes. A cluster that may have been copied by a stream that did not end
//! (`copied`) is not compared for allocation; both ways it reads the same until a layer below changes.
//! * `opened`, `write`, `copied`, `kept`, `jobs`, `backup`: what changes the books; `guest`, `stored`: what is held against them.
//!
//! Not here: metadata of the images.

mod backup;
mod copied;
mod guest;
mod jobs;
mod kept;
mod opened;
mod stored;
mod write;

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range as Span;

use blkcheck_model::layer::{Cell, Layer};
use blkcheck_model::perm::Driver;
use blkcheck_model::{NodeId, World};

use crate::history::StepId;
use crate::qemu::nbd::client::Ask;
use crate::scenario::{Format, GuestOp, Image, Range, Scenario, Stored};
use crate::stamp::{self, Source};

/// Nodes longer than this are not read, bytes.
pub(super) const LONGEST: u64 = 16 << 20;
/// A value that nobody can know.
const UNKNOWN: u64 = u64::MAX;

/// One image.
#[derive(Clone, Debug)]
struct File {
    layer: Layer,
    /// Grains of unallocated clusters that may have been copied here, with this value.
    copied: Vec<Option<u64>>,
    /// Grains of zeroes that are stored as data or not at all: a copy leaves out what is zero as a whole, and how much it takes
    /// at once cannot be known.
    murky: Vec<bool>,
    /// More than one node has it open, or had.
    lost: bool,
}

/// All images.
#[derive(Clone, Debug, Default)]
pub(super) struct Books {
    grain: u64,
    files: BTreeMap<String, File>,
    /// Nodes of null-co that read as zeroes.
    zeroes: BTreeSet<String>,
    /// Copy-before-write filters.
    kept: kept::All,
    /// The daemon copied what only layers below `bottom` hold, or may have (a known defect).
    copied_below_bottom: bool,
}

/// What block status says of a grain: that it is zero.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Hole {
    Yes,
    No,
    /// It cannot be known from outside.
    Maybe,
}

/// What differs: as the model has it, as the daemon has it.
type Wrong = (String, String);

impl Books {
    pub(super) fn of(scenario: &Scenario) -> Books {
        let grain = u64::from(scenario.grain);
        let files = (0..).zip(&scenario.images);
        let files = files.map(|(at, image)| (image.file.clone(), laid_out(image, at, grain)));
        Books {
            grain,
            files: files.collect(),
            zeroes: BTreeSet::new(),
            kept: kept::All::new(),
            copied_below_bottom: false,
        }
    }

    /// A guest's request as the daemon gets it.
    pub(super) fn ask(scenario: &Scenario, op: GuestOp, step: usize) -> Ask {
        let write = |range: Range, fua| {
            let mut data = vec![0; usize::try_from(range.length).expect("validated")];
            stamp::fill(&mut data, range.offset, scenario.grain, source(step));
            Ask::Write(range.offset, data, fua)
        };
        match op {
            GuestOp::Read(r) => Ask::Read(r.offset, r.length),
            GuestOp::Write(r) => write(r, false),
            GuestOp::WriteFua(r) => write(r, true),
            GuestOp::WriteZeroes(r) => Ask::WriteZeroes(r.offset, r.length, false),
            GuestOp::WriteZeroesUnmap(r) => Ask::WriteZeroes(r.offset, r.length, true),
            GuestOp::Discard(r) => Ask::Discard(r.offset, r.length),
            GuestOp::Flush => Ask::Flush,
            GuestOp::BlockStatus(r) => Ask::Status(r.offset, r.length),
        }
    }

    /// Files that two nodes have open are given up.
    pub(super) fn check_sharing(&mut self, world: &World) {
        let mut open = BTreeSet::new();
        for (_, node) in world.graph.nodes() {
            if let Some(name) = &node.filename
                && !open.insert(name.clone())
                && let Some(file) = self.files.get_mut(&**name)
            {
                file.lost = true;
            }
        }
    }

    /// Somebody could read it through an export, and we would know what to expect of some of it.
    pub(super) fn readable(&self, world: &World, node: NodeId) -> bool {
        let facts = world.graph.node(node);
        if facts.driver == Driver::SnapshotAccess {
            return facts.length <= LONGEST;
        }
        facts.length <= LONGEST && facts.driver != Driver::NullCo && self.view(world, node).is_some()
    }

    /// What reading the node gives, grain by grain; none when nothing is known.
    fn view(&self, world: &World, node: NodeId) -> Option<Vec<u64>> {
        let facts = world.graph.node(node);
        if facts.length > LONGEST {
            return None;
        }
        let grains = usize::try_from(facts.length.div_ceil(self.grain)).ok()?;
        match facts.driver {
            Driver::File | Driver::HostDevice => {
                let name = facts.filename.as_ref()?;
                // The bytes of a qcow2 file are not ours to know.
                if world.files.get(name)?.qcow2.is_some() {
                    return None;
                }
                self.cells(name, grains, &[])
            }
            Driver::NullCo => self.zeroes.contains(&*facts.name).then(|| vec![0; grains]),
            Driver::Raw if facts.windowed => None,
            Driver::SnapshotAccess => self.snapshot(world, node),
            Driver::Raw | Driver::CopyOnRead | Driver::Throttle | Driver::CopyBeforeWrite => {
                let mut view = self.view(world, world.graph.primary_child(node)?)?;
                view.resize(grains, 0);
                Some(view)
            }
            Driver::Qcow2 => {
                let below = match world.graph.cow_child(node) {
                    None => Vec::new(),
                    Some(below) => self.view(world, below).unwrap_or_else(|| vec![UNKNOWN; grains]),
                };
                self.cells(&world.image_file(node)?, grains, &below)
            }
        }
    }

    fn cells(&self, file: &str, grains: usize, below: &[u64]) -> Option<Vec<u64>> {
        let file = self.files.get(file)?;
        let grain = |at: usize| match file.layer.cells.get(at) {
            _ if file.lost => UNKNOWN,
            None => 0,
            Some(Cell::Unallocated) => {
                let below = below.get(at).copied().unwrap_or(0);
                match file.copied[at] {
                    Some(copied) if copied != below => UNKNOWN,
                    _ => below,
                }
            }
            Some(cell) => cell.value().expect("allocated"),
        };
        Some((0..grains).map(grain).collect())
    }

    /// The qcow2 node that writes to this node reach, if there is one.
    fn top(world: &World, node: NodeId) -> Option<NodeId> {
        let facts = world.graph.node(node);
        match facts.driver {
            Driver::Qcow2 => Some(node),
            Driver::CopyOnRead | Driver::Throttle | Driver::CopyBeforeWrite => {
                Books::top(world, world.graph.filter_child(node)?)
            }
            Driver::Raw if !facts.windowed => Books::top(world, world.graph.primary_child(node)?),
            _ => None,
        }
    }

    /// A discard gets to a node that stores something.
    fn discards(world: &World, node: NodeId) -> bool {
        let facts = world.graph.node(node);
        let ends = matches!(facts.driver, Driver::Qcow2) || facts.driver.is_protocol();
        let below = || world.graph.primary_child(node);
        facts.unmap && (ends || below().is_some_and(|below| Books::discards(world, below)))
    }

    fn grains(&self, range: Range) -> Span<usize> {
        let at = |byte: u64| usize::try_from(byte).expect("a short image");
        at(range.offset / self.grain)..at((range.offset + range.length).div_ceil(self.grain))
    }
}

fn laid_out(image: &Image, index: u16, grain: u64) -> File {
    use blkcheck_model::layer::Format as Kind;
    let grains = usize::try_from(image.size.div_ceil(grain)).expect("validated");
    let (format, cluster) = match image.format {
        Format::Raw => (Kind::Raw, 1),
        Format::Qcow2 => {
            let cluster = (u64::from(image.cluster_size) / grain).max(1);
            (
                Kind::Qcow2(u8::try_from(image.compat).unwrap_or(3)),
                usize::try_from(cluster).expect("small"),
            )
        }
    };
    let mut layer = Layer::new(format, cluster, grains);
    for (number, fill) in (0..).zip(&image.fill) {
        let at = |byte: u64| usize::try_from(byte / grain).expect("validated");
        let range = at(fill.offset)..at((fill.offset + fill.length).next_multiple_of(grain)).min(grains);
        for grain in range.clone() {
            for other in layer.cluster_of(grain) {
                if layer.cells[other] == Cell::Unallocated {
                    layer.cells[other] = Cell::Stamp(0);
                }
            }
        }
        let cell = match fill.stored {
            Stored::Data | Stored::Compressed => Cell::Stamp(code(Source::Fill {
                image: index,
                fill: number,
            })),
            Stored::Zero | Stored::ZeroAllocated => Cell::Zero,
        };
        layer.cells[range].fill(cell);
    }
    let grains = layer.len();
    File {
        layer,
        copied: vec![None; grains],
        murky: vec![false; grains],
        lost: false,
    }
}

fn source(step: usize) -> Source {
    Source::Step(StepId(u32::try_from(step).expect("few steps")))
}

/// One number per writer; never 0 and never [`UNKNOWN`].
fn code(source: Source) -> u64 {
    match source {
        Source::Fill { image, fill } => 1 << 40 | u64::from(image) << 16 | u64::from(fill),
        Source::Step(step) => 2 << 40 | u64::from(step.0),
    }
}

fn said(value: u64) -> String {
    match (value, value >> 40) {
        (0, _) => "zeroes".to_owned(),
        (_, 1) => format!("fill {} of image {}", value & 0xffff, value >> 16 & 0xffff),
        _ => format!("the write of step {}", value & 0xffff_ffff),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::tests::scenario_of;
    use crate::qemu::nbd::client::Answer;

    fn chain() -> (Scenario, World, Books) {
        let scenario = scenario_of(
            r#"{"version":1,"grain":512,"images":[
            {"file":"b","format":"qcow2","size":4096,"cluster-size":512,
                "fill":[{"offset":0,"length":1024,"stored":"data"}]},
            {"file":"t","format":"qcow2","size":4096,"cluster-size":1024},
            {"file":"o","format":"qcow2","size":4096,"cluster-size":1024}],"steps":[]}"#,
        );
        let mut world = crate::follow::world_of(&scenario);
        for add in [
            serde_json::json!({"driver":"qcow2","node-name":"b","file":{"driver":"file","filename":"b"}}),
            serde_json::json!({"driver":"qcow2","node-name":"t","backing":"b",
                "file":{"driver":"file","filename":"t"}}),
            serde_json::json!({"driver":"copy-on-read","node-name":"c","file":"t","bottom":"b"}),
            serde_json::json!({"driver":"qcow2","node-name":"o","backing":"c","file":{"driver":"file","filename":"o"}}),
        ] {
            let command = blkcheck_model::Command::new("blockdev-add", &add);
            world.execute(&command).expect("a chain");
        }
        let books = Books::of(&scenario);
        (scenario, world, books)
    }

    #[test]
    fn a_write_takes_the_rest_of_its_cluster_and_a_read_through_the_filter_copies() {
        let (scenario, world, mut books) = chain();
        let node = |name: &str| world.graph.find(name).expect("open");
        let fill = code(Source::Fill { image: 0, fill: 0 });
        assert_eq!(
            books.view(&world, node("c")).expect("known")[..3],
            [fill, fill, 0]
        );
        let range = Range {
            offset: 512,
            length: 512,
        };
        let done = Answer::Done(Ok(()));
        books
            .guest(&world, node("c"), (true, None), GuestOp::Write(range), 7, &done)
            .expect("fine");
        assert_eq!(
            books.view(&world, node("c")).expect("known")[..3],
            [fill, code(source(7)), 0]
        );
        assert!(books.files["t"].layer.is_allocated(0) && !books.files["t"].layer.is_allocated(2));
        assert_eq!(books.view(&world, node("b")).expect("known")[..2], [fill, fill]);
        let _ = scenario;
    }

    #[test]
    fn only_what_a_layer_in_range_holds_is_copied() {
        let (_, world, mut books) = chain();
        let node = |name: &str| world.graph.find(name).expect("open");
        books.was_read(&world, node("c"), 0..8);
        let allocated: Vec<bool> = (0..8).map(|g| books.files["t"].layer.is_allocated(g)).collect();
        assert_eq!(allocated, [true, true, false, false, false, false, false, false]);
    }

    #[test]
    fn what_a_write_needs_from_below_is_read_through_the_filter_there() {
        let (_, world, mut books) = chain();
        let node = world.graph.find("o").expect("open");
        let range = Range {
            offset: 0,
            length: 512,
        };
        let (op, done) = (GuestOp::Write(range), Answer::Done(Ok(())));
        books
            .guest(&world, node, (true, None), op, 7, &done)
            .expect("fine");
        let allocated = |file: &str, grain| books.files[file].layer.is_allocated(grain);
        assert!(
            allocated("o", 1) && allocated("t", 1),
            "the other half of the cluster"
        );
        assert!(!allocated("o", 2) && !allocated("t", 2));
    }

    #[test]
    fn a_read_of_something_else_is_told() {
        let (_, world, mut books) = chain();
        let node = world.graph.find("c").expect("open");
        let range = Range {
            offset: 0,
            length: 512,
        };
        let zeroes = Answer::Read(Ok(vec![0; 512]));
        let wrong = books.guest(&world, node, (false, None), GuestOp::Read(range), 0, &zeroes);
        assert!(wrong.expect_err("differs").0.contains("fill 0 of image 0"));
        let write = books.guest(
            &world,
            node,
            (false, None),
            GuestOp::Write(range),
            0,
            &Answer::Done(Ok(())),
        );
        assert!(write.is_err(), "a read-only export takes no writes");
    }

    #[test]
    fn zeroes_take_the_rest_of_a_cluster_along_only_where_it_is_zero() {
        let (_, world, mut books) = chain();
        let node = |name: &str| world.graph.find(name).expect("open");
        books.write_zeroes(&world, node("t"), 0..1);
        assert_eq!(
            books.files["t"].layer.cells[0],
            Cell::Stamp(0),
            "grain 1 is data below"
        );
        books.write_zeroes(&world, node("t"), 4..5);
        assert_eq!(books.files["t"].layer.cells[4..6], [Cell::Zero, Cell::Zero]);
        books.write_zeroes(&world, node("o"), 0..1);
        assert_eq!(books.hole(&world, node("o"), 0), Hole::No);
        assert_eq!(books.hole(&world, node("o"), 4), Hole::Yes);
    }

    #[test]
    fn copied_zeroes_are_of_a_kind_that_nobody_knows() {
        let (_, world, mut books) = chain();
        let node = |name: &str| world.graph.find(name).expect("open");
        books.set("b", 2..3, Cell::Zero);
        books.was_read(&world, node("c"), 2..3);
        assert!(books.files["t"].layer.is_allocated(2));
        assert_eq!(books.hole(&world, node("t"), 2), Hole::Maybe);
        books.write(&world, node("t"), 2..4, Cell::Stamp(7));
        assert_eq!(books.hole(&world, node("t"), 2), Hole::No);
    }

    #[test]
    fn a_copy_that_covers_a_cluster_reads_nothing_below_its_target() {
        let (_, world, mut books) = chain();
        let mut world = world;
        let filter =
            serde_json::json!({"driver":"copy-before-write","node-name":"f","file":"b","target":"o"});
        let command = blkcheck_model::Command::new("blockdev-add", &filter);
        world.execute(&command).expect("the target is above its source");
        books.kept(&world);
        let node = |name: &str| world.graph.find(name).expect("open");
        books.keep_first(&world, node("f"), 0..1, false);
        let allocated = |file: &str| books.files[file].layer.is_allocated(0);
        assert!(
            allocated("o") && !allocated("t"),
            "the filter between them saw no read"
        );
    }

    #[test]
    fn a_read_of_a_snapshot_may_go_through_a_filter_below() {
        let scenario = scenario_of(
            r#"{"version":1,"grain":512,"images":[
            {"file":"b","format":"qcow2","size":4096,"cluster-size":512},
            {"file":"t","format":"qcow2","size":4096,"cluster-size":512},
            {"file":"k","format":"qcow2","size":4096,"cluster-size":512}],"steps":[]}"#,
        );
        let (mut world, mut books) = (crate::follow::world_of(&scenario), Books::of(&scenario));
        let image = |name: &str, backing: Option<&str>| {
            serde_json::json!({"driver":"qcow2","node-name":name,"backing":backing,
                "file":{"driver":"file","filename":name}})
        };
        for add in [
            image("b", None),
            image("t", Some("b")),
            image("k", None),
            serde_json::json!({"driver":"snapshot-access","node-name":"s","file":{
                "driver":"copy-before-write","node-name":"f","target":"k","file":{
                "driver":"copy-on-read","node-name":"c","file":"t"}}}),
        ] {
            let command = blkcheck_model::Command::new("blockdev-add", &add);
            world.execute(&command).expect("a snapshot");
        }
        books.kept(&world);
        let node = |name: &str| world.graph.find(name).expect("open");
        books.guest_read(&world, node("s"), 0..1);
        let copied = |file: &str| books.files[file].copied[..2].to_vec();
        assert_eq!(copied("t"), [Some(0), None]);
        assert_eq!(copied("b"), [None, None]);
    }

    /// The NBD server does not read what it is told is zero: a copy-on-read filter sees nothing of such a request.
    #[test]
    fn zeroes_of_null_co_are_not_read() {
        let scenario = scenario_of(
            r#"{"version":1,"grain":512,"images":[
            {"file":"t","format":"qcow2","size":4096,"cluster-size":512}],"steps":[]}"#,
        );
        let copied = |zeroes: bool| {
            let (mut world, mut books) = (crate::follow::world_of(&scenario), Books::of(&scenario));
            for add in [
                serde_json::json!({"driver":"null-co","node-name":"z","size":1000,"read-zeroes":zeroes}),
                serde_json::json!({"driver":"qcow2","node-name":"t","backing":"z",
                    "file":{"driver":"file","filename":"t"}}),
                serde_json::json!({"driver":"copy-on-read","node-name":"c","file":"t"}),
            ] {
                let command = blkcheck_model::Command::new("blockdev-add", &add);
                world.execute(&command).expect("a chain");
                books.opened("blockdev-add", add.as_object().expect("written as one"));
            }
            books.guest_read(&world, world.graph.find("c").expect("open"), 0..8);
            (0..8)
                .filter(|grain| books.files["t"].layer.is_allocated(*grain))
                .collect::<Vec<_>>()
        };
        assert_eq!(copied(true), [0usize; 0]);
        assert_eq!(copied(false), [0, 1], "behind its end there are zeroes");
    }

    #[test]
    fn who_looks_for_a_format_reads_through_the_filter() {
        let (_, world, mut books) = chain();
        let add =
            |file: serde_json::Value| serde_json::json!({"driver": "qcow2", "node-name": "x", "file": file});
        let mut copied = |file: serde_json::Value| {
            let options = add(file);
            let options = options.as_object().expect("written as one");
            books.looked_into(&world, "blockdev-add", options);
            books.files.get_mut("t").expect("there").copied[0].take()
        };
        assert_eq!(copied("t".into()), None);
        assert!(copied("c".into()).is_some());
        assert!(copied(serde_json::json!({"driver": "copy-on-read", "file": "t"})).is_some());
    }
}
