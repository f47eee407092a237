//! `blockdev-add`: opening nodes, with everything that is opened inline below them.
//!
//! Rules: a format's `file` is opened before the format has a name; the backing file comes last; any failure undoes
//! all. Generated names are `#block<n>00`, counted over the whole life of the world. Options that a node does not say
//! are taken over from the node that opens it ([`NodeOptions::inherit`]).
//! Not here: probing of formats, what cache modes do, aio, locks on files.

use std::rc::Rc;

use serde_json::{Map, Value};

use crate::command::args::Args;
use crate::command::filters::{
    open_copy_before_write, open_copy_on_read, open_snapshot_access, open_throttle,
};
use crate::command::{is_well_formed, lookup};
use crate::copy_before_write::Manner;
use crate::graph::{Node, NodeId};
use crate::options::NodeOptions;
use crate::perm::{Driver, Masks, Role};
use crate::refusal::Refusal;
use crate::window::Window;
use crate::world::{FileKind, World};

const SECTOR: u64 = 512;
/// Longest node, bytes.
const MAX_LENGTH: u64 = 0x7fff_ffff_c000_0000;

/// A child: a node that exists, or one to open.
#[derive(Clone, Debug)]
pub(crate) enum ChildRef {
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
    },
    Qcow2 {
        file: ChildRef,
        backing: Backing,
    },
    CopyOnRead {
        file: ChildRef,
        bottom: Option<Rc<str>>,
    },
    Throttle {
        file: ChildRef,
    },
    CopyBeforeWrite {
        file: ChildRef,
        target: ChildRef,
        manner: Manner,
    },
    SnapshotAccess {
        file: ChildRef,
    },
}

/// Options of one node, checked against the schema.
#[derive(Clone, Debug)]
pub(crate) struct Options {
    pub(crate) driver: Driver,
    node_name: Option<Rc<str>>,
    /// As given.
    pub(crate) explicit: NodeOptions,
    /// What follows from a file name.
    implied: NodeOptions,
    kind: Kind,
}

/// Who opens a node inline.
#[derive(Clone, Copy)]
pub(crate) struct Above<'a> {
    pub(crate) node: Option<NodeId>,
    pub(crate) options: &'a NodeOptions,
    pub(crate) role: Role,
    /// Images whose headers are being followed.
    pub(crate) followed: Option<&'a Followed<'a>>,
}

/// An image whose header is being followed, and those above it.
pub(crate) struct Followed<'a> {
    image: Rc<str>,
    above: Option<&'a Followed<'a>>,
}

impl Followed<'_> {
    fn contains(&self, image: &str) -> bool {
        std::iter::successors(Some(self), |followed| followed.above).any(|followed| &*followed.image == image)
    }
}

pub(crate) fn blockdev_add(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let mut options = Options::parse(Args::new(arguments)?)?;
    if options.node_name.is_none() {
        return Err(Refusal::new("'node-name' must be specified for the root node"));
    }
    for name in ["cache.direct", "cache.no-flush", "read-only"] {
        options.explicit.set_default(name, Value::from("off"));
    }
    let id = open(world, &options, None)?;
    world.graph.node_mut(id).monitor_owned = true;
    Ok(())
}

impl Options {
    /// Checks options against the schema.
    pub(crate) fn parse(args: Args<'_>) -> Result<Options, Refusal> {
        let names: Vec<&str> = Driver::ALL.iter().map(|driver| driver.name()).collect();
        let driver = args.one_of("driver", &names)?;
        let driver = Driver::from_name(driver).expect("just checked");
        let node_name = args.opt_name("node-name")?;
        args.opt_enum("discard", &["ignore", "unmap"])?;
        parse_cache(&args)?;
        args.opt_bool("active")?;
        for name in ["read-only", "auto-read-only", "force-share"] {
            args.opt_bool(name)?;
        }
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
                args.opt_int("offset")?;
                args.opt_int("size")?;
                Kind::Raw { file }
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
            Driver::Throttle => {
                args.str("throttle-group")?;
                Kind::Throttle {
                    file: ChildRef::parse(&args, "file", args.required("file")?)?,
                }
            }
            Driver::CopyBeforeWrite => {
                let file = ChildRef::parse(&args, "file", args.required("file")?)?;
                let target = ChildRef::parse(&args, "target", args.required("target")?)?;
                let manner = Manner::parse(&args)?;
                Kind::CopyBeforeWrite { file, target, manner }
            }
            Driver::SnapshotAccess => Kind::SnapshotAccess {
                file: ChildRef::parse(&args, "file", args.required("file")?)?,
            },
            Driver::CopyOnRead => {
                let file = ChildRef::parse(&args, "file", args.required("file")?)?;
                Kind::CopyOnRead {
                    file,
                    bottom: args.opt_name("bottom")?,
                }
            }
        };
        let explicit = args.flat();
        args.finish()?;
        Ok(Options {
            driver,
            node_name,
            explicit,
            implied: NodeOptions::default(),
            kind,
        })
    }
}

fn parse_cache(args: &Args<'_>) -> Result<(), Refusal> {
    let Some(cache) = args.opt_object("cache")? else {
        return Ok(());
    };
    cache.opt_bool("direct")?;
    cache.opt_bool("no-flush")?;
    cache.finish()
}

/// Options of qcow2 that change no rule of this model.
pub(crate) const QCOW2_TUNING: [&str; 11] = [
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
                // Here the path is not told.
                Err(Refusal::new(format!(
                    "Invalid parameter type for '{name}', expected: BlockdevRef{or_null}"
                )))
            }
        }
    }
}

fn nested<'a>(object: &'a Map<String, Value>, path: &str) -> Args<'a> {
    Args::nested(object, format!("{path}."))
}

/// A child by reference, or opened now.
pub(crate) fn open_child(world: &mut World, child: &ChildRef, above: Above<'_>) -> Result<NodeId, Refusal> {
    match child {
        ChildRef::Name(name) => lookup(world, name, name),
        ChildRef::Inline(options) => open(world, options, Some(above)),
    }
}

fn open(world: &mut World, options: &Options, above: Option<Above<'_>>) -> Result<NodeId, Refusal> {
    let mut own = options.explicit.clone();
    if let Some(above) = above {
        own.inherit(above.role, above.options);
    }
    own.join(&options.implied);
    let file = match &options.kind {
        Kind::Leaf { .. } | Kind::NullCo { .. } => None,
        Kind::Raw { file }
        | Kind::Qcow2 { file, .. }
        | Kind::CopyOnRead { file, .. }
        | Kind::CopyBeforeWrite { file, .. }
        | Kind::SnapshotAccess { file }
        | Kind::Throttle { file } => {
            // Identifiers go to children first, so whom they inherit from is set once this node has one.
            let below = Above {
                node: None,
                options: &own,
                role: Role::IMAGE,
                followed: None,
            };
            let id = open_child(world, file, below)?;
            // It is looked into, whoever is to use it: a filter that keeps is then in use.
            if world.graph.node(id).driver == Driver::CopyBeforeWrite {
                world.graph.check_root(id, Masks::NONE)?;
            }
            Some((id, matches!(file, ChildRef::Inline(_))))
        }
    };
    check_generic(&own)?;
    let name = assign_name(world, options.node_name.as_deref())?;
    let mut explicit = options.explicit.clone();
    for child in ["file", "backing", "target"] {
        for options in [&mut own, &mut explicit] {
            options.take_child(child);
            options.remove(child);
        }
    }
    let id = world.graph.add_node(Node {
        writable: !own.is_on("read-only"),
        force_share: own.is_on("force-share"),
        unmap: own.unmaps(),
        inherits_from: above.and_then(|above| above.node),
        options: own,
        explicit,
        ..Node::new(&name, options.driver)
    });
    match &options.kind {
        Kind::Leaf { filename } => open_leaf(world, id, filename)?,
        Kind::NullCo { size } if *size > MAX_LENGTH => {
            return Err(Refusal::new(
                "Could not refresh total sector count: File too large",
            ));
        }
        Kind::NullCo { size } => {
            let node = world.graph.node_mut(id);
            node.length = *size;
            node.filename = Some(Rc::from("null-co://"));
        }
        Kind::Raw { .. } => open_raw(world, id, file.expect("has a file").0)?,
        Kind::Qcow2 { backing, .. } => {
            let followed = above.and_then(|above| above.followed);
            open_qcow2(world, id, file.expect("has a file").0, backing, followed)?;
        }
        Kind::Throttle { .. } => open_throttle(world, id, file.expect("has a file").0)?,
        Kind::CopyBeforeWrite { target, manner, .. } => {
            open_copy_before_write(world, id, file.expect("has a file").0, target, *manner)?;
        }
        Kind::SnapshotAccess { .. } => open_snapshot_access(world, id, file.expect("has a file").0)?,
        Kind::CopyOnRead { bottom, .. } => {
            open_copy_on_read(world, id, file.expect("has a file").0, bottom.as_deref())?;
        }
    }
    if let Some((file, true)) = file {
        world.graph.node_mut(file).inherits_from = Some(id);
    }
    Ok(id)
}

/// Options that have a meaning for every driver.
pub(crate) fn check_generic(options: &NodeOptions) -> Result<(), Refusal> {
    if options.is_on("force-share") && !options.is_on("read-only") {
        return Err(Refusal::new(
            "force-share=on can only be used with read-only images",
        ));
    }
    check_detect_zeroes(options, options.unmaps())
}

/// Zeroes that are found in what is written cannot be discarded by a node that discards nothing.
pub(crate) fn check_detect_zeroes(options: &NodeOptions, unmap: bool) -> Result<(), Refusal> {
    if !unmap && options.get("detect-zeroes").is_some_and(|v| v == "unmap") {
        return Err(Refusal::new(
            "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
        ));
    }
    Ok(())
}

pub(crate) fn assign_name(world: &mut World, given: Option<&str>) -> Result<Rc<str>, Refusal> {
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

fn open_raw(world: &mut World, id: NodeId, file: NodeId) -> Result<(), Refusal> {
    let options = world.graph.node(id).options.clone();
    // A window is data of its own, although its place may still turn out to be none.
    let part = options.has("size") || options.get("offset").is_some_and(|offset| *offset != 0);
    let role = if part { Role::DATA } else { Role::FILTERED };
    world.graph.attach_child(id, file, "file", role | Role::PRIMARY)?;
    let real = world.graph.node(file).length;
    let window = Window::of(&options, real)?;
    let node = world.graph.node_mut(id);
    node.windowed = part;
    node.length = window.length(real);
    Ok(())
}

fn open_qcow2(
    world: &mut World,
    id: NodeId,
    file: NodeId,
    backing: &Backing,
    above: Option<&Followed<'_>>,
) -> Result<(), Refusal> {
    world.graph.attach_child(id, file, "file", Role::IMAGE)?;
    let Some(facts) = world.header(id) else {
        return Err(Refusal::new("Image is not in qcow2 format"));
    };
    let recorded = facts.backing.clone();
    let virtual_size = facts.virtual_size;
    let node = world.graph.node_mut(id);
    node.length = virtual_size / SECTOR * SECTOR;
    node.recorded_backing = recorded.as_ref().map(|header| header.file.clone());
    node.names_backing = recorded.as_ref().is_some_and(|header| !header.file.is_empty());
    let own = node.options.clone();
    world.load_bitmaps(id);
    let followed = Followed {
        image: world.header_file(id).expect("a qcow2 node has a file"),
        above,
    };
    let below = Above {
        node: Some(id),
        options: &own,
        role: Role::COW,
        followed: matches!(backing, Backing::Header).then_some(&followed),
    };
    let opened = match (backing, recorded) {
        (Backing::Nothing, _) | (Backing::Header, None) => return Ok(()),
        (Backing::Given(child), _) => open_child(world, child, below),
        (Backing::Header, Some(header)) => {
            options_from_header(world, &followed, &header.file, header.format.as_deref())
                .and_then(|options| open(world, &options, Some(below)))
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
    followed: &Followed<'_>,
    name: &str,
    format: Option<&str>,
) -> Result<Options, Refusal> {
    let overlay = &followed.image;
    let directory = overlay.rfind('/').map_or("", |slash| &overlay[..=slash]);
    let filename: Rc<str> = if name.starts_with('/') {
        Rc::from(name)
    } else {
        format!("{directory}{name}").into()
    };
    // QEMU 10.0 follows such a circle until something runs out.
    if followed.contains(&filename) {
        return Err(Refusal::new(format!(
            "Image '{filename}' is in its own backing chain"
        )));
    }
    let facts = world.files.get(&filename);
    let leaf = match facts.map(|facts| facts.kind) {
        Some(FileKind::Device) => Driver::HostDevice,
        Some(FileKind::Regular) | None => Driver::File,
    };
    let is_qcow2 = facts.is_some_and(|facts| facts.qcow2.is_some());
    let driver = match format {
        Some("raw") => Driver::Raw,
        Some("qcow2") => Driver::Qcow2,
        None if is_qcow2 => Driver::Qcow2,
        None => Driver::Raw,
        Some(format) => {
            return Err(Refusal::new(format!("Unknown driver '{format}'")));
        }
    };
    let file = ChildRef::Inline(Box::new(Options {
        driver: leaf,
        node_name: None,
        explicit: NodeOptions::default(),
        implied: options_of([("driver", leaf.name()), ("filename", &*filename)]),
        kind: Kind::Leaf {
            filename: filename.clone(),
        },
    }));
    let kind = match driver {
        Driver::Qcow2 => Kind::Qcow2 {
            file,
            backing: Backing::Header,
        },
        _ => Kind::Raw { file },
    };
    Ok(Options {
        driver,
        node_name: None,
        explicit: options_of([("driver", driver.name())]),
        implied: NodeOptions::default(),
        kind,
    })
}

pub(crate) fn options_of<const N: usize>(words: [(&str, &str); N]) -> NodeOptions {
    let mut options = NodeOptions::default();
    for (name, word) in words {
        options.set(name, Value::from(word));
    }
    options
}
