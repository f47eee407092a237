//! What a guest asks for, and what block status says of it.

use std::ops::Range as Span;

use blkcheck_model::layer::Cell;
use blkcheck_model::perm::Driver;
use blkcheck_model::{NodeId, World};

use super::kept::Can;
use super::{Books, Hole, UNKNOWN, Wrong, code, said, source};
use crate::qemu::nbd::client::Answer;
use crate::scenario::{GuestOp, Range};
use crate::stamp;

impl Books {
    /// A guest's request ended this way. `shown`: how long the guest takes the node to be.
    pub(in crate::compare) fn guest(
        &mut self,
        world: &World,
        node: NodeId,
        (writable, shown): (bool, Option<u64>),
        op: GuestOp,
        step: usize,
        answer: &Answer,
    ) -> Result<(), Wrong> {
        let length = shown.unwrap_or(u64::MAX).min(world.graph.node(node).length);
        let error = match answer {
            Answer::Read(Err(e)) | Answer::Done(Err(e)) | Answer::Status(Err(e)) => Some(*e),
            _ => None,
        };
        let range = match op {
            GuestOp::Read(r)
            | GuestOp::Write(r)
            | GuestOp::WriteFua(r)
            | GuestOp::WriteZeroes(r)
            | GuestOp::WriteZeroesUnmap(r)
            | GuestOp::Discard(r)
            | GuestOp::BlockStatus(r) => r,
            GuestOp::Flush => Range { offset: 0, length: 0 },
        };
        let writes = !matches!(op, GuestOp::Read(_) | GuestOp::BlockStatus(_) | GuestOp::Flush);
        let outside = range
            .offset
            .checked_add(range.length)
            .is_none_or(|end| end > length);
        let refused = range.length > 0 && (outside || (writes && !writable));
        let grains = self.grains(range);
        let can = match op {
            _ if refused => Can::No,
            GuestOp::Flush => Can::Yes,
            GuestOp::Read(_) | GuestOp::BlockStatus(_) => self.can_read(world, node, grains.clone()),
            GuestOp::Discard(_) => self.keep_first(world, node, grains.clone(), true),
            _ => self.keep_first(world, node, grains.clone(), false),
        };
        match (can, error) {
            (Can::No, None) => return Err(("an error".to_owned(), format!("{op:?} succeeds"))),
            (Can::Yes, Some(e)) => {
                return Err(("success".to_owned(), format!("{op:?} fails with errno {e}")));
            }
            (Can::No, Some(_)) => return Ok(()),
            (Can::Maybe, Some(_)) => {
                if writes {
                    self.write(world, node, grains, Cell::Stamp(UNKNOWN));
                }
                return Ok(());
            }
            (Can::Yes | Can::Maybe, None) => {}
        }
        match op {
            GuestOp::Read(_) => {
                if let Answer::Read(Ok(bytes)) = answer {
                    self.compare(world, node, range, bytes)?;
                }
                self.guest_read(world, node, grains);
            }
            GuestOp::Write(_) | GuestOp::WriteFua(_) => {
                self.write(world, node, grains, Cell::Stamp(code(source(step))));
            }
            GuestOp::WriteZeroes(_) | GuestOp::WriteZeroesUnmap(_) => {
                self.write_zeroes(world, node, grains.clone());
                self.zeroed_old(world, node, grains);
            }
            GuestOp::Discard(_) if Books::discards(world, node) => {
                self.write(world, node, grains, Cell::Stamp(UNKNOWN));
            }
            GuestOp::Discard(_) => self.snapshot_discarded(world, node, grains),
            GuestOp::Flush => {}
            GuestOp::BlockStatus(_) => {
                if let Answer::Status(Ok(extents)) = answer {
                    self.status(world, node, range, extents)?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn compare(
        &self,
        world: &World,
        node: NodeId,
        range: Range,
        bytes: &[u8],
    ) -> Result<(), Wrong> {
        let Some(view) = self.view(world, node) else {
            return Ok(());
        };
        let first = usize::try_from(range.offset / self.grain).expect("a short image");
        for (at, grain) in bytes
            .chunks(usize::try_from(self.grain).expect("small"))
            .enumerate()
        {
            let offset = range.offset + at as u64 * self.grain;
            let expected = view.get(first + at).copied().unwrap_or(0);
            let got = stamp::read(grain, offset);
            let agrees = match got {
                _ if expected == UNKNOWN => true,
                stamp::Content::Zero => expected == 0,
                stamp::Content::Stamp(source) => expected == code(source),
                stamp::Content::Misplaced(..) | stamp::Content::Torn => false,
            };
            if !agrees {
                return Err((
                    format!(
                        "at {offset:#x} of node '{}': {}",
                        world.graph.name(node),
                        said(expected)
                    ),
                    format!("{got:?}"),
                ));
            }
        }
        Ok(())
    }

    pub(super) fn status(
        &self,
        world: &World,
        node: NodeId,
        range: Range,
        extents: &[crate::qemu::nbd::client::Extent],
    ) -> Result<(), Wrong> {
        let Some(view) = self.view(world, node) else {
            return Ok(());
        };
        let mut offset = range.offset;
        for extent in extents {
            let grains = self.grains(Range {
                offset,
                length: extent.bytes,
            });
            let wrong = view
                .get(grains)
                .and_then(|values| values.iter().find(|v| extent.zero && **v != 0 && **v != UNKNOWN));
            if let Some(value) = wrong {
                let ours = format!("{} within {:#x} bytes at {offset:#x}", said(*value), extent.bytes);
                return Err((ours, "block status says zeroes".to_owned()));
            }
            offset += extent.bytes;
        }
        Ok(())
    }

    /// The first sector was read, to learn the length.
    pub(in crate::compare) fn probed(&mut self, world: &World, node: NodeId, grain: u32) {
        let last = usize::try_from(512u32.div_ceil(grain)).expect("few");
        self.guest_read(world, node, 0..last);
    }

    /// A guest read these. The server asks for block status first and does not read what it says is zero, so that
    /// filters see less than was asked for.
    pub(super) fn guest_read(&mut self, world: &World, node: NodeId, grains: Span<usize>) {
        for grain in grains {
            match self.hole(world, node, grain) {
                Hole::Yes => {}
                Hole::No => self.was_read(world, node, grain..grain + 1),
                Hole::Maybe => self.may_be_read(world, node, grain..grain + 1),
            }
        }
    }

    /// Whether block status says that the grain reads as zeroes.
    pub(super) fn hole(&self, world: &World, node: NodeId, grain: usize) -> Hole {
        let facts = world.graph.node(node);
        let below = || world.graph.chain_child(node);
        match facts.driver {
            _ if grain as u64 * self.grain >= facts.length => Hole::Yes,
            Driver::SnapshotAccess => Hole::Maybe,
            Driver::CopyOnRead | Driver::Throttle | Driver::CopyBeforeWrite => {
                below().map_or(Hole::No, |child| self.hole(world, child, grain))
            }
            // It is asked what its file alone says.
            Driver::Raw if !facts.windowed => world
                .graph
                .primary_child(node)
                .map_or(Hole::No, |child| self.hole_alone(world, child, grain)),
            Driver::Qcow2 => match self.hole_alone(world, node, grain) {
                Hole::No if self.is_open(world, node, grain) => {
                    below().map_or(Hole::No, |child| self.hole(world, child, grain))
                }
                alone => alone,
            },
            Driver::NullCo => self.null_co(&facts.name),
            _ => Hole::No,
        }
    }

    /// A null-co node says that it is zero if it reads as zeroes.
    fn null_co(&self, name: &str) -> Hole {
        if self.zeroes.contains(name) {
            Hole::Yes
        } else {
            Hole::No
        }
    }

    /// The same, of the node alone, as seen through a node that is no filter.
    pub(super) fn hole_alone(&self, world: &World, node: NodeId, grain: usize) -> Hole {
        let facts = world.graph.node(node);
        let yes = |so: bool| if so { Hole::Yes } else { Hole::No };
        match facts.driver {
            Driver::Qcow2 if self.is_open(world, node, grain) => {
                let below = world.graph.cow_child(node);
                yes(below.is_none_or(|below| grain as u64 * self.grain >= world.graph.node(below).length))
            }
            Driver::Qcow2 => {
                let file = world.image_file(node).and_then(|f| self.files.get(&*f));
                match file.and_then(|file| Some((file.layer.cells.get(grain)?, file.murky[grain]))) {
                    Some((_, true)) => Hole::Maybe,
                    Some((cell, false)) => yes(*cell == Cell::Zero),
                    None => Hole::No,
                }
            }
            Driver::SnapshotAccess => Hole::Maybe,
            Driver::CopyOnRead | Driver::Throttle | Driver::CopyBeforeWrite | Driver::Raw
                if !facts.windowed =>
            {
                world
                    .graph
                    .primary_child(node)
                    .map_or(Hole::No, |child| self.hole_alone(world, child, grain))
            }
            Driver::NullCo => self.null_co(&facts.name),
            _ => Hole::No,
        }
    }

    /// The image of this qcow2 node leaves the grain to the layer below.
    pub(super) fn is_open(&self, world: &World, node: NodeId, grain: usize) -> bool {
        let file = world.image_file(node).and_then(|f| self.files.get(&*f));
        file.and_then(|f| f.layer.cells.get(grain)) == Some(&Cell::Unallocated)
    }
}
