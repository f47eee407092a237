//! What a storage request does, and in which ways it can end.

use blkcheck_impl::error::Errno;

use super::SECTOR;
use super::volatile::Change;

/// What a request does; lengths in bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Read.
    Read {
        /// Start.
        offset: u64,
        /// Wanted length.
        bytes: u64,
    },
    /// Write the captured data.
    Write {
        /// Start.
        offset: u64,
        /// Length of the captured data.
        bytes: u64,
    },
    /// Make durable.
    Flush,
    /// Zero a range.
    WriteZeroes {
        /// Start.
        offset: u64,
        /// Length.
        bytes: u64,
        /// Make it a hole.
        may_unmap: bool,
    },
    /// Make a range a hole.
    Discard {
        /// Start.
        offset: u64,
        /// Length.
        bytes: u64,
    },
    /// Set the length.
    Truncate {
        /// New length.
        length: u64,
    },
}

/// A bad end of a request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BadEnd {
    /// What the layer is told.
    pub errno: Errno,
    /// How much of it is carried out first, bytes.
    pub done: u64,
}

/// Most cuts inside one request that are told apart.
const MOST_CUTS: u64 = 12;

impl Op {
    /// Sector boundaries inside the request: a failing write reaches the file up to one of them.
    fn cuts(self) -> u64 {
        match self {
            Op::Write { offset, bytes } | Op::WriteZeroes { offset, bytes, .. } if bytes > 0 => {
                (offset + bytes - 1) / SECTOR - offset / SECTOR
            }
            _ => 0,
        }
    }

    /// The first so many bytes of it.
    pub(crate) fn first(self, done: u64) -> Op {
        match self {
            Op::Read { offset, .. } => Op::Read { offset, bytes: done },
            Op::Write { offset, .. } => Op::Write { offset, bytes: done },
            Op::WriteZeroes {
                offset, may_unmap, ..
            } => Op::WriteZeroes {
                offset,
                bytes: done,
                may_unmap,
            },
            Op::Discard { offset, .. } => Op::Discard { offset, bytes: done },
            Op::Flush | Op::Truncate { .. } => self,
        }
    }

    /// What it changes, with this data.
    pub(super) fn change(self, data: &[u8]) -> Option<Change> {
        match self {
            Op::Read { .. } | Op::Flush => None,
            Op::Write { offset, .. } => Some(Change::Write {
                offset,
                data: data.into(),
            }),
            Op::WriteZeroes { offset, bytes, .. } => Some(Change::Zero {
                offset,
                bytes,
                grow: true,
            }),
            Op::Discard { offset, bytes } => Some(Change::Zero {
                offset,
                bytes,
                grow: false,
            }),
            Op::Truncate { length } => Some(Change::Length(length)),
        }
    }

    /// In how many ways it can end, well included.
    pub(crate) fn endings(self) -> u32 {
        let cuts = u32::try_from(self.cuts().min(MOST_CUTS)).expect("few");
        match self {
            Op::Read { .. } | Op::Flush => 2,
            Op::Discard { .. } | Op::Truncate { .. } => 3,
            Op::Write { .. } | Op::WriteZeroes { .. } => 4 + cuts,
        }
    }

    /// Its `ending`-th end, from 1 on: the plain ones first.
    pub(crate) fn bad_end(self, ending: u32) -> BadEnd {
        let end = |errno, done| BadEnd { errno, done };
        match (self, ending) {
            (Op::Discard { bytes, .. }, 2) | (Op::Write { bytes, .. } | Op::WriteZeroes { bytes, .. }, 3) => {
                end(Errno::EIO, bytes)
            }
            (Op::Truncate { .. } | Op::Write { .. } | Op::WriteZeroes { .. }, 2) => end(Errno::ENOSPC, 0),
            (Op::Write { offset, .. } | Op::WriteZeroes { offset, .. }, 4..) => {
                let cuts = self.cuts();
                let cut = (u64::from(ending) - 3) * cuts.div_ceil(MOST_CUTS);
                end(
                    Errno::EIO,
                    (offset / SECTOR + cut.clamp(1, cuts)) * SECTOR - offset,
                )
            }
            _ => end(Errno::EIO, 0),
        }
    }
}
