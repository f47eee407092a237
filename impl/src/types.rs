//! Small shared types of the block layer: identifiers, permissions, roles, request flags.
//!
//! Rules: every identifier is a dense integer handed out in order (never an address), so that runs are
//! reproducible; permission and role sets use the names and order of QAPI.
//! Not here: graph structure (`graph`), request bookkeeping (`io`).

use std::fmt;

use bitflags::bitflags;

/// Size of a sector in bytes; node lengths are multiples of it.
pub const SECTOR: u64 = 512;
/// Largest request that is not a write-zeroes or discard, bytes (QEMU `BDRV_REQUEST_MAX_BYTES`).
pub const REQUEST_MAX_BYTES: u64 = 2_147_483_136;
/// Largest offset, length or node size, bytes (QEMU `BDRV_MAX_LENGTH`).
pub const MAX_LENGTH: u64 = 0x7fff_ffff_c000_0000;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $inner:ty, $prefix:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub $inner);
        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!($prefix, "{}"), self.0)
            }
        }
    };
}

id!(
    /// A node (QEMU `BlockDriverState`). Never reused within one layer.
    NodeId, u32, "n"
);
id!(
    /// An edge (QEMU `BdrvChild`). Never reused within one layer.
    EdgeId, u32, "e"
);
id!(
    /// A backend (QEMU `BlockBackend`): the user side of a node. Never reused within one layer.
    BackendId, u32, "b"
);
id!(
    /// A job by creation order; its public name is its QAPI id.
    JobId, u32, "j"
);
id!(
    /// A request on a node, in order of begin.
    RequestId, u64, "r"
);

impl EdgeId {
    /// Stands for "through no edge" in events, for flushes that the layer itself starts on a node.
    pub const NONE: EdgeId = EdgeId(u32::MAX);
}

bitflags! {
    /// Permissions on a node; bits and meaning as in QAPI `BlockPermission`.
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

impl Perm {
    /// Names joined by `, ` in the order of the bits, as error texts have them.
    #[must_use]
    pub fn names(self) -> String {
        const NAMES: [(Perm, &str); 4] = [
            (Perm::CONSISTENT_READ, "consistent read"),
            (Perm::WRITE, "write"),
            (Perm::WRITE_UNCHANGED, "write unchanged"),
            (Perm::RESIZE, "resize"),
        ];
        let set: Vec<&str> = NAMES
            .iter()
            .filter(|(bit, _)| self.contains(*bit))
            .map(|(_, name)| *name)
            .collect();
        set.join(", ")
    }
}

bitflags! {
    /// What a child is to its parent (QEMU `BdrvChildRole`).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
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
        /// A format's image file: data, metadata and primary.
        const IMAGE = 1 | 2 | 16;
    }
}

bitflags! {
    /// Request flags (QEMU `BdrvRequestFlags`).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct ReqFlags: u16 {
        /// Copy what is read into this node if it is not allocated there.
        const COPY_ON_READ = 0x1;
        /// The write is of zeroes.
        const ZERO_WRITE = 0x2;
        /// A zero write may deallocate.
        const MAY_UNMAP = 0x4;
        /// Durable on completion.
        const FUA = 0x10;
        /// Write compressed.
        const WRITE_COMPRESSED = 0x20;
        /// The visible content does not change.
        const WRITE_UNCHANGED = 0x40;
        /// Serialise against every overlapping request of the node.
        const SERIALISING = 0x80;
        /// Fail with ENOTSUP rather than write zeroes slowly.
        const NO_FALLBACK = 0x100;
        /// Only populate, do not return data; with `COPY_ON_READ`, or on a copy-on-read node.
        const PREFETCH = 0x200;
        /// Fail with EBUSY rather than wait for a conflicting request; with `SERIALISING`.
        const NO_WAIT = 0x400;
    }
}

bitflags! {
    /// What a block-status query says of a range (QEMU `BDRV_BLOCK_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct StatusFlags: u8 {
        /// Content is tied to this layer.
        const DATA = 0x01;
        /// Reads as zeroes.
        const ZERO = 0x02;
        /// `map` and `file` say where the bytes are.
        const OFFSET_VALID = 0x04;
        /// Driver to generic layer only: ask `file` at `map` instead.
        const RAW = 0x08;
        /// This layer decides the content.
        const ALLOCATED = 0x10;
        /// The answer reaches the end of this layer.
        const EOF = 0x20;
        /// Driver to generic layer only: also look for zeroes at (`file`, `map`).
        const RECURSE = 0x40;
        /// Stored compressed.
        const COMPRESSED = 0x80;
    }
}

bitflags! {
    /// How a node was opened (the subset of QEMU's `BDRV_O_*` that this layer knows).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct OpenFlags: u8 {
        /// Writable now.
        const RDWR = 1;
        /// May be made writable (blockdev-add without read-only).
        const ALLOW_RDWR = 2;
        /// Discards are passed down (discard=unmap).
        const UNMAP = 4;
        /// cache.no-flush=on.
        const NO_FLUSH = 8;
        /// cache.direct=on.
        const NOCACHE = 16;
        /// auto-read-only=on.
        const AUTO_RDONLY = 32;
        /// A copy-before-write filter that discards what it has copied.
        const DISCARD_SOURCE = 64;
    }
}
