//! A node: identity, flags, child slots, drain counter, and the state of its I/O.
//!
//! Rules: fields are cells because one thread drives the layer; a `RefCell` here is never borrowed across an
//! await. Only `graph` writes the graph part, only `io` writes `io`.

use std::cell::{Cell, RefCell};
use std::fmt;
use std::rc::Rc;

use serde_json::{Map, Value};

use crate::dirty::DirtyBitmap;
use crate::driver::{Driver, DriverFacts};
use crate::io::state::NodeIo;
use crate::types::{EdgeId, NodeId, OpenFlags};

/// What a node does with writes that are all zero (QAPI `BlockdevDetectZeroesOptions`).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum DetectZeroes {
    /// Write them as data.
    #[default]
    Off,
    /// Write them as zero writes.
    On,
    /// As zero writes that may deallocate.
    Unmap,
}

/// A node of the graph (QEMU `BlockDriverState`).
pub struct Node {
    /// Identity.
    pub id: NodeId,
    /// node-name.
    pub name: Rc<str>,
    /// Static facts of its driver (also before and after it is open).
    pub facts: &'static DriverFacts,
    /// The driver; `None` while opening and once closed.
    pub driver: RefCell<Option<Rc<dyn Driver>>>,
    /// How it is open.
    pub flags: Cell<OpenFlags>,
    /// Options as given (explicit options), for introspection and reopen.
    pub options: RefCell<Map<String, Value>>,
    /// The options that it has, given or not (QEMU keeps both): a reopen that comes upon a node may forget what was given, yet
    /// not what the node is.
    pub opened: RefCell<Map<String, Value>>,
    /// Inserted by a job without a user's filter-node-name.
    pub implicit: Cell<bool>,
    /// Links *into* this node are never frozen.
    pub never_freeze: Cell<bool>,
    /// force-share=on.
    pub force_share: Cell<bool>,
    /// detect-zeroes.
    pub detect_zeroes: Cell<DetectZeroes>,
    /// References: edges to it, the monitor's, holders (jobs, `bottom`).
    pub refcnt: Cell<u32>,
    /// In the monitor's list (blockdev-add).
    pub monitor_owned: Cell<bool>,
    /// Opened inline as a child of this node.
    pub inherits_from: Cell<Option<NodeId>>,
    /// Drained sections on it, explicit and through its children.
    pub quiesce_counter: Cell<u32>,
    /// All edges above, newest first.
    pub parents: RefCell<Vec<EdgeId>>,
    /// All edges below, newest first.
    pub children: RefCell<Vec<EdgeId>>,
    /// Slot `file` (a member of `children`).
    pub file: Cell<Option<EdgeId>>,
    /// Slot `backing` (a member of `children`).
    pub backing: Cell<Option<EdgeId>>,
    /// Op blockers: (who, reason), newest first. Who: an edge of the blocker.
    pub blockers: RefCell<Vec<Blocker>>,
    /// Dirty bitmaps, newest first.
    pub(crate) bitmaps: RefCell<Vec<Rc<DirtyBitmap>>>,
    /// Request state.
    pub io: NodeIo,
    /// Flags the node will have once the reopen that is being prepared commits.
    pub(crate) reopen_flags: Cell<Option<OpenFlags>>,
    /// The last graph walk that visited this node (`Graph::walk`).
    pub(crate) mark: Cell<u32>,
}

/// One op blocker reason on a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Blocker {
    /// The edge that brought it; removed together.
    pub edge: EdgeId,
    /// Text after `Node '…' is busy: `.
    pub reason: Rc<str>,
    /// A backing link blocks all but commit target, stream, and backup source and target; a job's edge blocks all.
    pub backing_link: bool,
}

impl fmt::Debug for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Node({:?} {})", self.id, self.name)
    }
}

impl Node {
    /// A closed node without edges, with one reference.
    pub(crate) fn new(
        id: NodeId,
        name: Rc<str>,
        facts: &'static DriverFacts,
        flags: OpenFlags,
        options: Map<String, Value>,
    ) -> Node {
        Node {
            id,
            name,
            facts,
            driver: RefCell::default(),
            flags: Cell::new(flags),
            opened: RefCell::new(options.clone()),
            options: RefCell::new(options),
            implicit: Cell::new(false),
            never_freeze: Cell::new(false),
            force_share: Cell::new(false),
            detect_zeroes: Cell::default(),
            refcnt: Cell::new(1),
            monitor_owned: Cell::new(false),
            inherits_from: Cell::new(None),
            quiesce_counter: Cell::new(0),
            parents: RefCell::default(),
            children: RefCell::default(),
            file: Cell::new(None),
            backing: Cell::new(None),
            blockers: RefCell::default(),
            bitmaps: RefCell::default(),
            io: NodeIo::default(),
            reopen_flags: Cell::new(None),
            mark: Cell::new(0),
        }
    }

    /// Writable, judged with the flags a reopen in preparation will set (`bdrv_is_writable_after_reopen`).
    #[must_use]
    pub fn is_writable_after_reopen(&self) -> bool {
        self.reopen_flags
            .get()
            .unwrap_or(self.flags.get())
            .contains(OpenFlags::RDWR)
    }

    /// The driver.
    ///
    /// # Panics
    /// When the node is closed: a bug of ours, since whoever holds an edge keeps the node open.
    #[must_use]
    pub fn driver(&self) -> Rc<dyn Driver> {
        Rc::clone(self.driver.borrow().as_ref().expect("node is open"))
    }

    /// The driver, `None` once closed.
    #[must_use]
    pub fn driver_opt(&self) -> Option<Rc<dyn Driver>> {
        self.driver.borrow().clone()
    }

    /// Writable now.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.flags.get().contains(OpenFlags::RDWR)
    }

    /// The edge of the main child: slot `file` (every driver here has its primary child there).
    #[must_use]
    pub fn primary_edge(&self) -> Option<EdgeId> {
        self.file.get()
    }

    /// Length in bytes, a multiple of 512, as of the last refresh.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.io.length.get()
    }
}
