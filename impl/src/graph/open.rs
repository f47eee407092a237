//! Opening nodes (blockdev-add): reference strings, inline children, backing files from image headers.
//!
//! Rules: the order of steps is QEMU's, so errors and generated names come in its order: file child, common
//! options, name, driver, backing file, leftover options. Whatever fails, no node of the attempt remains after the
//! next reap. Formats are never guessed: a header that names a backing file but no format is refused, because a
//! guest that can write to a raw image could otherwise make it look like any other.
//! Not here: type checks of QMP arguments (`qmp::schema`), drivers.

use std::rc::Rc;

use serde_json::{Map, Value};

use crate::Layer;
use crate::driver::{DriverFacts, OpenArgs};
use crate::drivers;
use crate::env::{Env, Fut};
use crate::error::QmpError;
use crate::graph::node::{DetectZeroes, Node};
use crate::types::{NodeId, OpenFlags};

/// Deepest chain that image headers may ask for. Two images can name each other through different paths.
const MAX_CHAIN: u32 = 64;

/// Options of the real drivers that only tune caches and threads: taken and without effect.
const TUNING: [&str; 11] = [
    "aio",
    "aio-max-batch",
    "cache-clean-interval",
    "cache-size",
    "drop-cache",
    "l2-cache-entry-size",
    "l2-cache-size",
    "locking",
    "pr-manager",
    "refcount-cache-size",
    "x-check-cache-dropped",
];

/// What an inline child takes over from its parent where its own options say nothing.
#[derive(Clone, Copy, Debug)]
struct Inherited {
    flags: OpenFlags,
    force_share: bool,
    /// A backing child: read-only unless told otherwise.
    backing: bool,
}

/// Options common to all drivers.
struct Common {
    name: Option<String>,
    flags: OpenFlags,
    force_share: bool,
    detect_zeroes: DetectZeroes,
}

/// The images whose headers led here, nearest first.
#[derive(Clone, Copy, Default)]
struct Chain<'a> {
    filename: &'a str,
    up: Option<&'a Chain<'a>>,
    depth: u32,
}

impl Chain<'_> {
    fn contains(&self, filename: &str) -> bool {
        self.filename == filename || self.up.is_some_and(|up| up.contains(filename))
    }
}

impl Layer {
    /// Opens a node and its children for the monitor. Main lock held, `options` checked against the schema.
    pub(crate) async fn blockdev_add(&self, options: Map<String, Value>) -> Result<(), QmpError> {
        if !options.contains_key("node-name") {
            return Err(QmpError::generic(
                "'node-name' must be specified for the root node",
            ));
        }
        let node = self.open_node(options).await?;
        // The creation reference is the monitor's from now on.
        self.node(node).monitor_owned.set(true);
        Ok(())
    }

    /// Closes a node of the monitor. Main lock held.
    pub(crate) fn blockdev_del(&self, name: &str) -> Result<(), QmpError> {
        let refusal = |text: String| Err(QmpError::generic(text));
        let Some(id) = self.find_node(name) else {
            return refusal(format!("Failed to find node with node-name='{name}'"));
        };
        let node = self.node(id);
        if self.has_backend(id) {
            return refusal(format!("Node {name} is in use"));
        }
        self.op_blocked(id, crate::graph::blockers::OpType::DriveDel)?;
        if !node.monitor_owned.get() {
            return refusal(format!("Node {name} is not owned by the monitor"));
        }
        if node.refcnt.get() > 1 {
            return refusal(format!(
                "Block device {} is in use",
                self.device_or_node_name(&node)
            ));
        }
        node.monitor_owned.set(false);
        self.unhold(id);
        Ok(())
    }

    /// Opens a node without parent; the caller owns the one reference. Main lock held.
    pub(crate) async fn open_node(&self, options: Map<String, Value>) -> Result<NodeId, QmpError> {
        self.open_inherit(options, None, Chain::default()).await
    }

    /// A child by reference or inline definition, with a reference for the caller.
    async fn open_child(
        &self,
        value: Value,
        inherited: Inherited,
        chain: Chain<'_>,
    ) -> Result<(NodeId, bool), QmpError> {
        match value {
            Value::String(name) => {
                let node = self.lookup(&name, &name)?;
                self.hold(node);
                Ok((node, false))
            }
            Value::Object(options) => Ok((self.open_inherit(options, Some(inherited), chain).await?, true)),
            _ => Err(QmpError::generic("A child must be a node-name or an object")),
        }
    }

    /// A child that a driver opens while it is opened itself, named or inline, with a reference for the caller.
    pub(crate) async fn open_driver_child(&self, node: &Rc<Node>, value: Value) -> Result<NodeId, QmpError> {
        let inherited = Inherited {
            flags: node.flags.get(),
            force_share: node.force_share.get(),
            backing: false,
        };
        let (child, inline) = self.open_child(value, inherited, Chain::default()).await?;
        if inline {
            self.node(child).inherits_from.set(Some(node.id));
        }
        Ok(child)
    }

    fn open_inherit<'a>(
        &'a self,
        mut options: Map<String, Value>,
        inherited: Option<Inherited>,
        chain: Chain<'a>,
    ) -> Fut<'a, Result<NodeId, QmpError>> {
        Box::pin(async move {
            let explicit = options.clone();
            let driver = take_string(&mut options, "driver")?
                .ok_or_else(|| QmpError::generic("Must specify either driver or file"))?;
            let facts = drivers::by_name(&driver)
                .ok_or_else(|| QmpError::generic(format!("Unknown driver '{driver}'")))?;
            let common = take_common(&mut options, inherited)?;
            let backing = if facts.supports_backing {
                options.remove("backing")
            } else {
                None
            };
            let below = Inherited {
                flags: common.flags,
                force_share: common.force_share,
                backing: false,
            };
            let file = self.open_file(facts, &mut options, below).await?;
            let opened = self.open_self(facts, common, explicit, &mut options, file).await;
            // The node has its own reference now, or there is none.
            if let Some((file, _)) = file {
                self.unhold(file);
            }
            let node = opened?;
            let below = Inherited {
                backing: true,
                ..below
            };
            let mut finished = self.open_backing(&node, backing, below, chain).await;
            if finished.is_ok() {
                finished = refuse_leftover(facts, &options);
            }
            match finished {
                Ok(()) => Ok(node.id),
                Err(refusal) => {
                    self.unhold(node.id);
                    Err(refusal)
                }
            }
        })
    }

    /// The `file` child of everything that is not a protocol: opened before its parent has a name.
    async fn open_file(
        &self,
        facts: &'static DriverFacts,
        options: &mut Map<String, Value>,
        inherited: Inherited,
    ) -> Result<Option<(NodeId, bool)>, QmpError> {
        if facts.is_protocol {
            return Ok(None);
        }
        let value = options
            .remove("file")
            .ok_or_else(|| QmpError::generic("A block device must be specified for \"file\""))?;
        // What the file child's own children are is not the business of any image header.
        self.open_child(value, inherited, Chain::default())
            .await
            .map(Some)
    }

    /// The node itself: name, driver, length, limits.
    async fn open_self(
        &self,
        facts: &'static DriverFacts,
        common: Common,
        explicit: Map<String, Value>,
        options: &mut Map<String, Value>,
        file: Option<(NodeId, bool)>,
    ) -> Result<Rc<Node>, QmpError> {
        if common.force_share && common.flags.contains(OpenFlags::RDWR) {
            return Err(QmpError::generic(
                "force-share=on can only be used with read-only images",
            ));
        }
        if common.detect_zeroes == DetectZeroes::Unmap && !common.flags.contains(OpenFlags::UNMAP) {
            return Err(QmpError::generic(
                "setting detect-zeroes to unmap is not allowed without setting discard operation to unmap",
            ));
        }
        let node = self.new_node(facts, common.name.as_deref(), common.flags, explicit)?;
        node.force_share.set(common.force_share);
        node.detect_zeroes.set(common.detect_zeroes);
        if let Err(refusal) = self.open_driver(&node, options, file).await {
            self.unhold(node.id);
            return Err(refusal);
        }
        Ok(node)
    }

    async fn open_driver(
        &self,
        node: &Rc<Node>,
        options: &mut Map<String, Value>,
        file: Option<(NodeId, bool)>,
    ) -> Result<(), QmpError> {
        let args = OpenArgs {
            file: file.map(|(file, _)| file),
            options,
        };
        let driver = (node.facts.open)(&self.cx(node), args).await?;
        self.set_driver(node, driver);
        if let Some((file, true)) = file {
            self.node(file).inherits_from.set(Some(node.id));
        }
        self.refresh_length(node.id)?;
        self.refresh_limits(node.id)
    }

    /// The backing child: as given, or as the header says.
    async fn open_backing(
        &self,
        node: &Rc<Node>,
        backing: Option<Value>,
        inherited: Inherited,
        chain: Chain<'_>,
    ) -> Result<(), QmpError> {
        if !node.facts.supports_backing {
            return Ok(());
        }
        let overlay = node.driver().filename(&self.cx(node));
        let here = Chain {
            filename: &overlay,
            up: Some(&chain),
            depth: chain.depth + 1,
        };
        let value = match backing {
            Some(Value::Null) => return Ok(()),
            // The old way to say null.
            Some(Value::String(name)) if name.is_empty() => return Ok(()),
            Some(value) => value,
            None => match node.driver().backing_header() {
                None => return Ok(()),
                Some((file, format)) => header_options(self.env(), &overlay, &file, format.as_deref(), &here)
                    .map_err(|refusal| refusal.prefixed("Could not open backing file: "))?,
            },
        };
        let (child, inline) = self
            .open_child(value, inherited, here)
            .await
            .map_err(|refusal| refusal.prefixed("Could not open backing file: "))?;
        if inline {
            self.node(child).inherits_from.set(Some(node.id));
        }
        let attached = self.set_backing(node.id, Some(child)).await;
        self.unhold(child);
        attached?;
        self.refresh_limits(node.id)
    }
}

/// The definition of a backing node from an image header.
fn header_options(
    env: &dyn Env,
    overlay: &str,
    file: &str,
    format: Option<&str>,
    chain: &Chain<'_>,
) -> Result<Value, QmpError> {
    let Some(format) = format else {
        return Err(QmpError::generic(format!(
            "Image '{overlay}' names no format for '{file}' and formats are not probed; give 'backing'"
        )));
    };
    let facts =
        drivers::by_name(format).ok_or_else(|| QmpError::generic(format!("Unknown driver '{format}'")))?;
    let filename = combine_filename(overlay, file);
    if chain.depth >= MAX_CHAIN {
        return Err(QmpError::generic(format!(
            "More than {MAX_CHAIN} images in the backing chain"
        )));
    }
    if chain.contains(&filename) {
        return Err(QmpError::generic(format!(
            "Image '{filename}' is in its own backing chain"
        )));
    }
    let (protocol, filename) = split_protocol(env, &filename);
    let mut definition = Map::new();
    definition.insert(
        "driver".into(),
        Value::from(if facts.is_protocol { format } else { protocol }),
    );
    definition.insert("filename".into(), Value::from(filename));
    if facts.is_protocol {
        return Ok(Value::Object(definition));
    }
    let mut options = Map::new();
    options.insert("driver".into(), Value::from(format));
    options.insert("file".into(), Value::Object(definition));
    Ok(Value::Object(options))
}

/// The protocol driver for a file name, and the name without its prefix.
fn split_protocol<'a>(env: &dyn Env, filename: &'a str) -> (&'static str, &'a str) {
    for protocol in ["file", "host_device"] {
        if let Some(rest) = filename
            .strip_prefix(protocol)
            .and_then(|rest| rest.strip_prefix(':'))
        {
            return (protocol, rest);
        }
    }
    (
        if env.is_device(filename) {
            "host_device"
        } else {
            "file"
        },
        filename,
    )
}

/// `name` as seen from the image `overlay`: relative names count from its directory.
pub(crate) fn combine_filename(overlay: &str, name: &str) -> String {
    let has_protocol = name.split('/').next().is_some_and(|first| first.contains(':'));
    if has_protocol || name.starts_with('/') {
        return name.to_owned();
    }
    match overlay.rfind('/') {
        Some(at) => format!("{}{name}", &overlay[..=at]),
        None => name.to_owned(),
    }
}

fn refuse_leftover(facts: &DriverFacts, options: &Map<String, Value>) -> Result<(), QmpError> {
    let Some(option) = options.keys().find(|key| !TUNING.contains(&key.as_str())) else {
        return Ok(());
    };
    Err(QmpError::generic(if facts.is_protocol {
        format!(
            "Block protocol '{}' doesn't support the option '{option}'",
            facts.name
        )
    } else {
        format!(
            "Block format '{}' does not support the option '{option}'",
            facts.name
        )
    }))
}

fn take_common(options: &mut Map<String, Value>, inherited: Option<Inherited>) -> Result<Common, QmpError> {
    let from = |flag: OpenFlags| inherited.is_some_and(|parent| parent.flags.contains(flag));
    let backing = inherited.is_some_and(|parent| parent.backing);
    let name = take_string(options, "node-name")?;
    let discard = take_string(options, "discard")?;
    let mut cache = match options.remove("cache") {
        Some(Value::Object(cache)) => cache,
        None => Map::new(),
        Some(_) => return Err(wrong_type("cache", "object")),
    };
    let direct = take_bool(&mut cache, "direct")?.unwrap_or_else(|| from(OpenFlags::NOCACHE));
    let no_flush = take_bool(&mut cache, "no-flush")?.unwrap_or_else(|| from(OpenFlags::NO_FLUSH));
    // Nodes here are always active.
    if take_bool(options, "active")? == Some(false) {
        return Err(QmpError::generic("Inactive nodes are not supported"));
    }
    let follows = inherited.is_some() && !backing;
    let read_only =
        take_bool(options, "read-only")?.unwrap_or(backing || (follows && !from(OpenFlags::RDWR)));
    let auto_read_only =
        take_bool(options, "auto-read-only")?.unwrap_or(follows && from(OpenFlags::AUTO_RDONLY));
    let force_share =
        take_bool(options, "force-share")?.unwrap_or_else(|| inherited.is_some_and(|p| p.force_share));
    let detect_zeroes = match take_string(options, "detect-zeroes")?.as_deref() {
        None | Some("off") => DetectZeroes::Off,
        Some("on") => DetectZeroes::On,
        Some("unmap") => DetectZeroes::Unmap,
        Some(other) => {
            return Err(QmpError::generic(format!(
                "Parameter 'detect-zeroes' does not accept value '{other}'"
            )));
        }
    };
    // Inline children pass discards on; whether there are any is the parent's decision.
    let unmap = discard
        .as_deref()
        .map_or(inherited.is_some(), |discard| discard == "unmap");
    let mut flags = OpenFlags::empty();
    flags.set(OpenFlags::RDWR, !read_only);
    // A read-only child of a node that may become writable may become writable with it.
    flags.set(OpenFlags::ALLOW_RDWR, !read_only || from(OpenFlags::ALLOW_RDWR));
    flags.set(OpenFlags::UNMAP, unmap);
    flags.set(OpenFlags::NO_FLUSH, no_flush);
    flags.set(OpenFlags::NOCACHE, direct);
    flags.set(OpenFlags::AUTO_RDONLY, auto_read_only);
    Ok(Common {
        name,
        flags,
        force_share,
        detect_zeroes,
    })
}

fn wrong_type(name: &str, expected: &str) -> QmpError {
    QmpError::generic(format!(
        "Invalid parameter type for '{name}', expected: {expected}"
    ))
}

fn take_string(options: &mut Map<String, Value>, name: &str) -> Result<Option<String>, QmpError> {
    match options.remove(name) {
        None => Ok(None),
        Some(Value::String(value)) => Ok(Some(value)),
        Some(_) => Err(wrong_type(name, "string")),
    }
}

fn take_bool(options: &mut Map<String, Value>, name: &str) -> Result<Option<bool>, QmpError> {
    match options.remove(name) {
        None => Ok(None),
        Some(Value::Bool(value)) => Ok(Some(value)),
        Some(_) => Err(wrong_type(name, "boolean")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_in_headers_count_from_the_overlays_directory() {
        for (overlay, name, expected) in [
            ("/a/b/top.q", "mid.q", "/a/b/mid.q"),
            ("/a/b/top.q", "../mid.q", "/a/b/../mid.q"),
            ("/a/b/top.q", "/x/mid.q", "/x/mid.q"),
            ("top.q", "mid.q", "mid.q"),
            ("d/top.q", "file:mid.q", "file:mid.q"),
            ("d/top.q", "e/a:b", "d/e/a:b"),
        ] {
            assert_eq!(combine_filename(overlay, name), expected);
        }
    }

    #[test]
    fn protocols_by_prefix_or_place() {
        let env = crate::memory::MemoryEnv::new();
        assert_eq!(split_protocol(&env, "file:x"), ("file", "x"));
        assert_eq!(split_protocol(&env, "host_device:/x"), ("host_device", "/x"));
        assert_eq!(split_protocol(&env, "/dev/loop0"), ("host_device", "/dev/loop0"));
        assert_eq!(split_protocol(&env, "filex"), ("file", "filex"));
    }

    #[test]
    fn a_chain_that_bites_its_tail_is_refused() {
        let env = crate::memory::MemoryEnv::new();
        let top = Chain {
            filename: "/a",
            up: None,
            depth: 1,
        };
        let mid = Chain {
            filename: "/b",
            up: Some(&top),
            depth: 2,
        };
        let refusal = header_options(&env, "/b", "/a", Some("raw"), &mid);
        // Without the raw driver the refusal is another one.
        if drivers::by_name("raw").is_some() {
            assert_eq!(
                refusal.unwrap_err().desc,
                "Image '/a' is in its own backing chain"
            );
        }
    }

    fn flags(own: Value, inherited: Option<Inherited>) -> OpenFlags {
        let Value::Object(mut own) = own else {
            panic!("an object")
        };
        take_common(&mut own, inherited).expect("well-formed").flags
    }

    #[test]
    fn flags_of_a_root_and_of_its_children() {
        let root = flags(serde_json::json!({}), None);
        assert_eq!(root, OpenFlags::RDWR | OpenFlags::ALLOW_RDWR);
        let below = Inherited {
            flags: root,
            force_share: false,
            backing: false,
        };
        assert_eq!(flags(serde_json::json!({}), Some(below)), root | OpenFlags::UNMAP);
        let backing = Inherited {
            backing: true,
            ..below
        };
        assert_eq!(
            flags(serde_json::json!({}), Some(backing)),
            OpenFlags::ALLOW_RDWR | OpenFlags::UNMAP
        );
        let read_only = flags(
            serde_json::json!({"read-only": true, "cache": {"direct": true}}),
            None,
        );
        assert_eq!(read_only, OpenFlags::NOCACHE);
        let below = Inherited {
            flags: read_only,
            force_share: false,
            backing: false,
        };
        assert_eq!(
            flags(serde_json::json!({}), Some(below)),
            OpenFlags::NOCACHE | OpenFlags::UNMAP
        );
    }
}
