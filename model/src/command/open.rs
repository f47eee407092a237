//! `blockdev-add`: opening nodes, with everything that is opened inline below them.
//!
//! Rules: a format's `file` is opened before the format has a name; the backing file comes last; any failure undoes
//! all. Generated names are `#block<n>00`, counted over the whole life of the world.
//! Not here: probing of formats, cache modes, aio, locks on files.

use std::rc::Rc;

use serde_json::{Map, Value};

use crate::command::args::Args;
use crate::command::{is_well_formed, lookup};
use crate::graph::{Node, NodeId};
use crate::perm::{Driver, Role};
use crate::refusal::Refusal;
use crate::world::{FileKind, World};

const SECTOR: u64 = 512;

/// A child: a node that exists, or one to open.
#[derive(Clone, Debug)]
enum ChildRef {
    Name(Rc<str>),
    Inline(Box<Options>),
}

/// What is to be the backing file.
#[derive(Clone, Debug)]
enum Backing {
    /// Whatever the header says.
    Header,
    /// None, whatever the header says.
    Nothing,
    Given(ChildRef),
}

#[derive(Clone, Debug)]
enum Kind {
    Leaf {
        filename: Rc<str>,
    },
    NullCo {
        size: u64,
    },
    Raw {
        file: ChildRef,
        offset: u64,
        size: Option<u64>,
    },
    Qcow2 {
        file: ChildRef,
        backing: Backing,
    },
    CopyOnRead {
        file: ChildRef,
        bottom: Option<Rc<str>>,
    },
}

/// Options of one node, checked against the schema.
#[derive(Clone, Debug)]
struct Options {
    driver: Driver,
    node_name: Option<Rc<str>>,
    read_only: Option<bool>,
    force_share: Option<bool>,
    kind: Kind,
}

/// What a node opened inline gets from the one above.
#[derive(Clone, Copy)]
struct Inherited {
    parent: Option<NodeId>,
    read_only: bool,
    force_share: bool,
}

pub(crate) fn blockdev_add(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let options = Options::parse(Args::new(arguments)?)?;
    if options.node_name.is_none() {
        return Err(Refusal::new("'node-name' must be specified for the root node"));
    }
    let id = open(
        world,
        &options,
        Inherited {
            parent: None,
            read_only: false,
            force_share: false,
        },
    )?;
    world.graph.node_mut(id).monitor_owned = true;
    Ok(())
}

impl Options {
    fn parse(args: Args<'_>) -> Result<Options, Refusal> {
        let names: Vec<&str> = Driver::ALL.iter().map(|driver| driver.name()).collect();
        let driver = args.one_of("driver", &names)?;
        let driver = Driver::from_name(driver).expect("just checked");
        let node_name = args.opt_name("node-name")?;
        args.opt_enum("discard", &["ignore", "unmap"])?;
        args.optional("cache");
        args.opt_bool("active")?;
        let read_only = args.opt_bool("read-only")?;
        args.opt_bool("auto-read-only")?;
        let force_share = args.opt_bool("force-share")?;
        args.opt_enum("detect-zeroes", &["off", "on", "unmap"])?;
        let kind = match driver {
            Driver::File | Driver::HostDevice => {
                let filename = Rc::from(args.str("filename")?);
                for name in ["pr-manager", "locking", "aio", "aio-max-batch", "drop-cache"] {
                    args.optional(name);
                }
                Kind::Leaf { filename }
            }
            Driver::NullCo => {
                // A negative size aborts QEMU 10.0; here it is refused.
                let size = args
                    .opt_int("size")?
                    .map(u64::try_from)
                    .transpose()
                    .map_err(|_| Refusal::new("Parameter 'size' expects a non-negative number below 2^64"))?;
                let size = size.unwrap_or(1 << 30);
                args.optional("latency-ns");
                args.opt_bool("read-zeroes")?;
                Kind::NullCo {
                    size: size.next_multiple_of(SECTOR),
                }
            }
            Driver::Raw => {
                let file = ChildRef::parse(&args, "file", args.required("file")?)?;
                let offset = args
                    .opt_int("offset")?
                    .and_then(|offset| u64::try_from(offset).ok())
                    .unwrap_or(0);
                let size = args.opt_int("size")?.and_then(|size| u64::try_from(size).ok());
                Kind::Raw { file, offset, size }
            }
            Driver::Qcow2 => {
                let file = ChildRef::parse(&args, "file", args.required("file")?)?;
                let backing = match args.optional("backing") {
                    None => Backing::Header,
                    Some(Value::Null) => Backing::Nothing,
                    Some(value) if value == "" => Backing::Nothing,
                    Some(value) => Backing::Given(ChildRef::parse(&args, "backing", value)?),
                };
                for name in QCOW2_TUNING {
                    args.optional(name);
                }
                Kind::Qcow2 { file, backing }
            }
            Driver::CopyOnRead => {
                let file = ChildRef::parse(&args, "file", args.required("file")?)?;
                Kind::CopyOnRead {
                    file,
                    bottom: args.opt_name("bottom")?,
                }
            }
        };
        args.finish()?;
        Ok(Options {
            driver,
            node_name,
            read_only,
            force_share,
            kind,
        })
    }
}

/// Options of qcow2 that change no rule of this model.
const QCOW2_TUNING: [&str; 11] = [
    "lazy-refcounts",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
    "discard-no-unref",
    "overlap-check",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
];

impl ChildRef {
    fn parse(args: &Args<'_>, name: &str, value: &Value) -> Result<ChildRef, Refusal> {
        let path = args.full_name(name);
        match value {
            Value::String(name) => Ok(ChildRef::Name(Rc::from(name.as_str()))),
            Value::Object(object) => Ok(ChildRef::Inline(Box::new(Options::parse(nested(object, &path))?))),
            _ => {
                // Only a backing file can be told to be none.
                let or_null = if name == "backing" { "OrNull" } else { "" };
                Err(Refusal::new(format!(
                    "Invalid parameter type for '{path}', expected: BlockdevRef{or_null}"
                )))
            }
        }
    }
}

fn nested<'a>(object: &'a Map<String, Value>, path: &str) -> Args<'a> {
    Args::nested(object, format!("{path}."))
}

/// A child by reference, or opened now.
fn open_child(world: &mut World, child: &ChildRef, inherited: Inherited) -> Result<NodeId, Refusal> {
    match child {
        ChildRef::Name(name) => lookup(world, name, name),
        ChildRef::Inline(options) => open(world, options, inherited),
    }
}

fn open(world: &mut World, options: &Options, inherited: Inherited) -> Result<NodeId, Refusal> {
    let read_only = options.read_only.unwrap_or(inherited.read_only);
    let force_share = options.force_share.unwrap_or(inherited.force_share);
    // Identifiers go to children first, so whom they inherit from is set once this node has one.
    let below = Inherited {
        parent: None,
        read_only,
        force_share,
    };
    let file = match &options.kind {
        Kind::Leaf { .. } | Kind::NullCo { .. } => None,
        Kind::Raw { file, .. } | Kind::Qcow2 { file, .. } | Kind::CopyOnRead { file, .. } => Some((
            open_child(world, file, below)?,
            matches!(file, ChildRef::Inline(_)),
        )),
    };
    if force_share && !read_only {
        return Err(Refusal::new(
            "force-share=on can only be used with read-only images",
        ));
    }
    let name = assign_name(world, options.node_name.as_deref())?;
    let id = world.graph.add_node(Node {
        writable: !read_only,
        explicit_read_only: options.read_only.is_some(),
        force_share,
        inherits_from: inherited.parent,
        ..Node::new(&name, options.driver)
    });
    match &options.kind {
        Kind::Leaf { filename } => open_leaf(world, id, filename)?,
        Kind::NullCo { size } => {
            let node = world.graph.node_mut(id);
            node.length = *size;
            node.filename = Some(Rc::from("null-co://"));
        }
        Kind::Raw { offset, size, .. } => open_raw(world, id, file.expect("has a file").0, *offset, *size)?,
        Kind::Qcow2 { backing, .. } => open_qcow2(world, id, file.expect("has a file").0, backing)?,
        Kind::CopyOnRead { bottom, .. } => {
            open_copy_on_read(world, id, file.expect("has a file").0, bottom.as_deref())?;
        }
    }
    if let Some((file, true)) = file {
        world.graph.node_mut(file).inherits_from = Some(id);
    }
    Ok(id)
}

/// Opens a copy-on-read filter over a node, as a job does it.
pub(crate) fn open_job_filter(
    world: &mut World,
    name: Option<&str>,
    file: NodeId,
    bottom: NodeId,
) -> Result<NodeId, Refusal> {
    let node_name = assign_name(world, name)?;
    let id = world.graph.add_node(Node {
        implicit: name.is_none(),
        held_by_job: true,
        ..Node::new(&node_name, Driver::CopyOnRead)
    });
    let bottom = world.graph.node(bottom).name.clone();
    open_copy_on_read(world, id, file, Some(&bottom))?;
    Ok(id)
}

fn assign_name(world: &mut World, given: Option<&str>) -> Result<Rc<str>, Refusal> {
    let Some(name) = given else {
        let name = format!("#block{}00", world.auto_names);
        world.auto_names += 1;
        return Ok(Rc::from(name));
    };
    if !is_well_formed(name) {
        return Err(Refusal::new(format!("Invalid node-name: '{name}'")));
    }
    if world.graph.find(name).is_some() {
        return Err(Refusal::new(format!("Duplicate nodes with node-name='{name}'")));
    }
    if name.len() >= 32 {
        return Err(Refusal::new("Node name too long"));
    }
    Ok(Rc::from(name))
}

fn open_leaf(world: &mut World, id: NodeId, filename: &Rc<str>) -> Result<(), Refusal> {
    let Some(facts) = world.files.get(filename) else {
        return Err(Refusal::new(format!(
            "Could not open '{filename}': No such file or directory"
        )));
    };
    let node = world.graph.node_mut(id);
    match (node.driver, facts.kind) {
        (Driver::File, FileKind::Device) => {
            return Err(Refusal::new(format!(
                "'file' driver requires '{filename}' to be a regular file"
            )));
        }
        (Driver::HostDevice, FileKind::Regular) => {
            return Err(Refusal::new(format!(
                "'host_device' driver requires '{filename}' to be either a character or block device"
            )));
        }
        _ => {}
    }
    node.filename = Some(filename.clone());
    node.length = facts.length.next_multiple_of(SECTOR);
    node.request_alignment = facts.request_alignment;
    Ok(())
}

fn open_raw(
    world: &mut World,
    id: NodeId,
    file: NodeId,
    offset: u64,
    size: Option<u64>,
) -> Result<(), Refusal> {
    let windowed = offset != 0 || size.is_some();
    let role = if windowed { Role::DATA } else { Role::FILTERED };
    world.graph.attach_child(id, file, "file", role | Role::PRIMARY)?;
    let real = world.graph.node(file).length;
    if offset > real {
        return Err(Refusal::new(format!(
            "Offset ({offset}) cannot be greater than size of the containing file ({real})"
        )));
    }
    if let Some(size) = size.filter(|size| *size > real - offset) {
        return Err(Refusal::new(format!(
            "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of the \
             containing file ({real})"
        )));
    }
    if size.is_some_and(|size| !size.is_multiple_of(SECTOR)) {
        return Err(Refusal::new("Specified size is not multiple of 512"));
    }
    let node = world.graph.node_mut(id);
    node.windowed = windowed;
    node.length = size.unwrap_or(real - offset).next_multiple_of(SECTOR);
    Ok(())
}

fn open_qcow2(world: &mut World, id: NodeId, file: NodeId, backing: &Backing) -> Result<(), Refusal> {
    world.graph.attach_child(id, file, "file", Role::IMAGE)?;
    let Some(facts) = world.header(id) else {
        return Err(Refusal::new("Image is not in qcow2 format"));
    };
    let recorded = facts.backing.clone();
    let virtual_size = facts.virtual_size;
    let node = world.graph.node_mut(id);
    node.length = virtual_size / SECTOR * SECTOR;
    node.recorded_backing = recorded.as_ref().map(|header| header.file.clone());

    let below = Inherited {
        parent: Some(id),
        read_only: true,
        force_share: world.graph.node(id).force_share,
    };
    let opened = match (backing, recorded) {
        (Backing::Nothing, _) | (Backing::Header, None) => return Ok(()),
        (Backing::Given(child), _) => open_child(world, child, below),
        (Backing::Header, Some(header)) => {
            let overlay = world.image_file(id).expect("a qcow2 node has a file");
            open(
                world,
                &options_from_header(world, &overlay, &header.file, header.format.as_deref())?,
                below,
            )
        }
    };
    let from_header = matches!(backing, Backing::Header);
    let backing = opened.map_err(|refusal| refusal.prefixed("Could not open backing file: "))?;
    world.graph.set_backing(id, Some(backing))?;
    if from_header {
        world.graph.node_mut(id).recorded_backing = world.graph.full_name(backing);
    }
    Ok(())
}

/// What a header's backing file is opened with: the recorded format, or what the file is.
fn options_from_header(
    world: &World,
    overlay: &str,
    name: &str,
    format: Option<&str>,
) -> Result<Options, Refusal> {
    let directory = overlay.rfind('/').map_or("", |slash| &overlay[..=slash]);
    let filename: Rc<str> = if name.starts_with('/') {
        Rc::from(name)
    } else {
        format!("{directory}{name}").into()
    };
    let facts = world.files.get(&filename);
    let leaf = match facts.map(|facts| facts.kind) {
        Some(FileKind::Device) => Driver::HostDevice,
        Some(FileKind::Regular) | None => Driver::File,
    };
    let is_qcow2 = facts.is_some_and(|facts| facts.qcow2.is_some());
    let plain = |driver, kind| Options {
        driver,
        node_name: None,
        read_only: None,
        force_share: None,
        kind,
    };
    let file = ChildRef::Inline(Box::new(plain(leaf, Kind::Leaf { filename })));
    match format {
        Some("raw") => Ok(plain(
            Driver::Raw,
            Kind::Raw {
                file,
                offset: 0,
                size: None,
            },
        )),
        Some("qcow2") => Ok(plain(
            Driver::Qcow2,
            Kind::Qcow2 {
                file,
                backing: Backing::Header,
            },
        )),
        None if is_qcow2 => Ok(plain(
            Driver::Qcow2,
            Kind::Qcow2 {
                file,
                backing: Backing::Header,
            },
        )),
        None => Ok(plain(
            Driver::Raw,
            Kind::Raw {
                file,
                offset: 0,
                size: None,
            },
        )),
        Some(format) => Err(Refusal::new(format!(
            "Could not open backing file: Unknown driver '{format}'"
        ))),
    }
}

/// A copy-on-read node over `file`. QEMU 10.0 hangs when `bottom` is not below it; here that is refused.
fn open_copy_on_read(
    world: &mut World,
    id: NodeId,
    file: NodeId,
    bottom: Option<&str>,
) -> Result<(), Refusal> {
    let graph = &mut world.graph;
    graph.attach_child(id, file, "file", Role::FILTERED | Role::PRIMARY)?;
    graph.node_mut(id).length = graph.node(file).length;
    let Some(name) = bottom else { return Ok(()) };
    let Some(bottom) = graph.find(name) else {
        return Err(Refusal::new(format!("Bottom node '{name}' not found")));
    };
    if graph.node(bottom).driver.is_filter() {
        return Err(Refusal::new(format!("Bottom node '{name}' is a filter")));
    }
    if !graph.chain_contains(id, bottom) {
        let filter = graph.name(id);
        return Err(Refusal::new(format!(
            "Bottom node '{name}' is not in the backing chain of '{filter}'"
        )));
    }
    graph.freeze(id, bottom)?;
    graph.node_mut(id).bottom = Some(bottom);
    Ok(())
}
