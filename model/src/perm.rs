//! Permission algebra: what a parent may do to a node, what it lets others do, and what a driver passes on.
//!
//! Rules: a node's parents agree when every one's `perm` lies within every other's `shared`. A driver derives the
//! masks of each child edge from the *cumulative* masks of its own parents ([`child_masks`]); root edges (exports,
//! jobs) state theirs. Pure functions of small sets; the walk over a graph is in [`crate::refresh`].
//! Not here: operating-system locks on image files, and inactive nodes.

use bitflags::bitflags;

bitflags! {
    /// Permissions on a node; bits as in QAPI `BlockPermission`.
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
    pub struct Perm: u8 {
        /// What is read is one coherent image of the disk.
        const CONSISTENT_READ = 1;
        /// May alter content that others can see.
        const WRITE = 2;
        /// May write, but only what nobody can see to change.
        const WRITE_UNCHANGED = 4;
        /// May alter the length.
        const RESIZE = 8;
    }
}

/// Short names for the tables below.
const CR: Perm = Perm::CONSISTENT_READ;
const W: Perm = Perm::WRITE;
const WU: Perm = Perm::WRITE_UNCHANGED;
const RS: Perm = Perm::RESIZE;

impl Perm {
    /// Names joined by `, `, in the order of the bits, as error texts have them.
    #[must_use]
    pub fn names(self) -> String {
        let all = [
            (CR, "consistent read"),
            (W, "write"),
            (WU, "write unchanged"),
            (RS, "resize"),
        ];
        let set: Vec<&str> = all
            .iter()
            .filter(|(bit, _)| self.contains(*bit))
            .map(|(_, name)| *name)
            .collect();
        set.join(", ")
    }
}

bitflags! {
    /// What a child is to its parent. Job and export edges have none.
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
    pub struct Role: u8 {
        /// Stores guest data.
        const DATA = 1;
        /// Stores format metadata.
        const METADATA = 2;
        /// Presents identical content.
        const FILTERED = 4;
        /// Backing child: unallocated data is read from it.
        const COW = 8;
        /// The main child.
        const PRIMARY = 16;
        /// A format's image file.
        const IMAGE = 1 | 2 | 16;
    }
}

/// The two masks of an edge, or the cumulative ones of a node.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct Masks {
    /// What the parent may do.
    pub perm: Perm,
    /// What the parent lets others do.
    pub shared: Perm,
}

impl Masks {
    /// Of a node without parents, and of a user that wants nothing and minds nothing.
    pub const NONE: Masks = Masks {
        perm: Perm::empty(),
        shared: Perm::all(),
    };

    /// These two masks.
    #[must_use]
    pub const fn new(perm: Perm, shared: Perm) -> Masks {
        Masks { perm, shared }
    }

    /// Cumulative masks of a node: all that some parent may do, all that every parent shares.
    #[must_use]
    pub fn cumulative(parents: impl IntoIterator<Item = Masks>) -> Masks {
        parents.into_iter().fold(Masks::NONE, |cum, edge| {
            Masks::new(cum.perm | edge.perm, cum.shared & edge.shared)
        })
    }

    /// What `other` wants and `self` does not share; empty = no conflict in this direction.
    #[must_use]
    pub fn denies(self, other: Masks) -> Perm {
        other.perm - self.shared
    }

    /// Someone above writes (visibly or not).
    #[must_use]
    pub fn writes(self) -> bool {
        self.perm.intersects(W | WU)
    }
}

/// A block driver, and the facts about it that the graph needs.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Driver {
    /// A regular file.
    File,
    /// A block device (a loop device).
    HostDevice,
    /// Accepts everything, stores nothing.
    NullCo,
    /// The bytes of its file, or a window of them.
    Raw,
    /// Copy-on-write image format.
    Qcow2,
    /// Filter that copies what is read into its child.
    CopyOnRead,
    /// Filter that holds requests back, by the limits of its group.
    Throttle,
    /// Filter that keeps what is written over: it copies the old content to its target first.
    CopyBeforeWrite,
    /// Shows the content that a copy-before-write filter below has kept.
    SnapshotAccess,
}

impl Driver {
    /// All drivers of the model.
    pub const ALL: [Driver; 9] = [
        Driver::File,
        Driver::HostDevice,
        Driver::NullCo,
        Driver::Raw,
        Driver::Qcow2,
        Driver::CopyOnRead,
        Driver::Throttle,
        Driver::CopyBeforeWrite,
        Driver::SnapshotAccess,
    ];

    /// QAPI name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Driver::File => "file",
            Driver::HostDevice => "host_device",
            Driver::NullCo => "null-co",
            Driver::Raw => "raw",
            Driver::Qcow2 => "qcow2",
            Driver::CopyOnRead => "copy-on-read",
            Driver::Throttle => "throttle",
            Driver::CopyBeforeWrite => "copy-before-write",
            Driver::SnapshotAccess => "snapshot-access",
        }
    }

    /// The driver of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Driver> {
        Driver::ALL.into_iter().find(|driver| driver.name() == name)
    }

    /// Filters always show exactly their child's content. `raw` is *not* one: chain walks stop at it.
    #[must_use]
    pub fn is_filter(self) -> bool {
        matches!(
            self,
            Driver::CopyOnRead | Driver::Throttle | Driver::CopyBeforeWrite
        )
    }

    /// A leaf that stores bytes itself.
    #[must_use]
    pub fn is_protocol(self) -> bool {
        matches!(self, Driver::File | Driver::HostDevice | Driver::NullCo)
    }

    /// Can have a backing child, and record its name.
    #[must_use]
    pub fn supports_backing(self) -> bool {
        self == Driver::Qcow2
    }

    /// Options of its own that can be changed while open.
    #[must_use]
    pub fn mutable_options(self) -> &'static [&'static str] {
        match self {
            Driver::Raw => &["offset", "size"],
            Driver::Qcow2 => &crate::command::open::QCOW2_TUNING,
            _ => &[],
        }
    }

    /// Options of its own that may change, but have no default to go back to.
    #[must_use]
    pub fn lasting_options(self) -> &'static [&'static str] {
        match self {
            Driver::Throttle => &["throttle-group"],
            _ => &[],
        }
    }

    /// Options such as read-only can be changed while open.
    #[must_use]
    pub fn supports_reopen(self) -> bool {
        !matches!(
            self,
            Driver::CopyOnRead | Driver::CopyBeforeWrite | Driver::SnapshotAccess
        )
    }
}

/// The masks that a node puts on one of its child edges.
///
/// `cum` are the cumulative masks of the node's own parents, `writable` says whether the node itself is open
/// read-write.
#[must_use]
pub fn child_masks(driver: Driver, role: Role, writable: bool, cum: Masks) -> Masks {
    let by_role = if role.contains(Role::FILTERED) {
        cum
    } else if role.contains(Role::COW) {
        backing_masks(cum)
    } else {
        storage_masks(role, writable, cum)
    };
    match driver {
        // Copying on read writes without changing what anybody sees; it does so even with nobody above.
        Driver::CopyOnRead => Masks::new((cum.perm & (CR | W | RS)) | WU, (cum.shared & (CR | W | RS)) | WU),
        // Raw never writes on its own account.
        Driver::Raw => Masks::new((by_role.perm - (W | RS)) | (cum.perm & (W | RS)), by_role.shared),
        Driver::Qcow2 | Driver::Throttle => by_role,
        Driver::CopyBeforeWrite if role.contains(Role::FILTERED) => by_role,
        // The target is written whoever is above; others may write to it as well, since it may stand on the source.
        Driver::CopyBeforeWrite => Masks::new(W, Perm::all() - RS),
        // It reads by a way of its own, for which it needs nothing.
        Driver::SnapshotAccess => Masks::NONE,
        Driver::File | Driver::HostDevice | Driver::NullCo => {
            unreachable!("{} has no children", driver.name())
        }
    }
}

/// The masks of a copy-before-write filter on its source while somebody uses the filter: nobody else may write there, or
/// what is kept would not be all that is written over.
#[must_use]
pub fn kept_masks(masks: Masks, discards_source: bool) -> Masks {
    let own = if discards_source { CR | W } else { CR };
    Masks::new(masks.perm | own, masks.shared - (W | RS))
}

/// A backing file is only read; others may change it only if everybody above tolerates that.
fn backing_masks(cum: Masks) -> Masks {
    let while_writers_are_shared = if cum.shared.contains(W) {
        W | RS
    } else {
        Perm::empty()
    };
    Masks::new(cum.perm & CR, CR | WU | while_writers_are_shared)
}

/// A format's storage: metadata must be ours alone while we may write it; data must keep its length.
fn storage_masks(role: Role, writable: bool, cum: Masks) -> Masks {
    let Masks { mut perm, mut shared } = cum;
    if role.contains(Role::METADATA) {
        if writable {
            perm |= W | RS;
        }
        perm |= CR;
        shared -= W | RS;
    }
    if role.contains(Role::DATA) {
        shared -= RS;
        if perm.contains(WU) {
            perm |= W;
        }
        if perm.contains(W) {
            perm |= RS;
        }
    }
    Masks::new(perm, shared)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn masks(perm: Perm, shared: Perm) -> Masks {
        Masks::new(perm, shared)
    }

    /// The table of test vectors for the drivers of this model.
    #[test]
    fn masks_that_drivers_pass_on() {
        let qcow2_file = |writable, cum| child_masks(Driver::Qcow2, Role::IMAGE, writable, cum);
        let backing = |cum| child_masks(Driver::Qcow2, Role::COW, true, cum);
        let raw = |cum| child_masks(Driver::Raw, Role::FILTERED | Role::PRIMARY, true, cum);
        let window = |cum| child_masks(Driver::Raw, Role::DATA | Role::PRIMARY, true, cum);
        let cor = |cum| child_masks(Driver::CopyOnRead, Role::FILTERED | Role::PRIMARY, true, cum);

        let nobody = Masks::NONE;
        assert_eq!(qcow2_file(true, nobody), masks(CR | W | RS, CR | WU));
        assert_eq!(qcow2_file(false, nobody), masks(CR, CR | WU));
        assert_eq!(backing(nobody), Masks::NONE);
        assert_eq!(raw(nobody), Masks::NONE);
        assert_eq!(window(nobody), masks(Perm::empty(), CR | W | WU));
        assert_eq!(cor(nobody), masks(WU, Perm::all()));

        let guest = masks(CR | W, CR | WU);
        assert_eq!(qcow2_file(true, guest), masks(CR | W | RS, CR | WU));
        assert_eq!(backing(guest), masks(CR, CR | WU));
        assert_eq!(raw(guest), masks(CR | W, CR | WU));
        assert_eq!(window(guest), masks(CR | W, CR | WU));
        assert_eq!(cor(guest), masks(CR | W | WU, CR | WU));

        let reader = masks(CR, CR | WU);
        assert_eq!(qcow2_file(false, reader), masks(CR, CR | WU));
        assert_eq!(cor(reader), masks(CR | WU, CR | WU));

        let sharing_guest = masks(CR | W, CR | W | WU);
        assert_eq!(backing(sharing_guest), masks(CR, Perm::all()));
        assert_eq!(cor(sharing_guest), masks(CR | W | WU, CR | W | WU));

        let read_only_export = masks(CR, CR | W | WU);
        assert_eq!(qcow2_file(true, read_only_export), masks(CR | W | RS, CR | WU));
        assert_eq!(backing(read_only_export), masks(CR, Perm::all()));
        assert_eq!(window(read_only_export), masks(CR, CR | W | WU));
    }

    #[test]
    fn names_come_in_bit_order() {
        assert_eq!((RS | CR).names(), "consistent read, resize");
        assert_eq!(
            Perm::all().names(),
            "consistent read, write, write unchanged, resize"
        );
        assert_eq!(Perm::empty().names(), "");
    }

    #[test]
    fn a_conflict_has_a_direction() {
        let writer = masks(W, Perm::all());
        let stream = masks(Perm::empty(), CR | WU);
        assert_eq!(stream.denies(writer), W);
        assert_eq!(writer.denies(stream), Perm::empty());
    }
}
