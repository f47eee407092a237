//! What a power cut leaves of stored bitmaps: none of them vouches for what it has missed.
//!
//! Rules: while an image is open for writing its stored bitmaps are marked as in use, or the header does not count them; closed, it
//! stores the bitmaps that the model says, with all their marks, for good. As long as an operation of the main context is under way,
//! which may be one that opens, closes or reopens the image, it may be either; but a bitmap that vouches for itself has every mark
//! that it ought to have.
//! Unchecked: what marks a bitmap has too many, closed or not; the order of bitmaps; images in which storage has failed.

use blkcheck_model::bitmap::Spans;
use blkcheck_model::{StoredBitmap, World};

use super::{Bitmaps, is_set};
use crate::image::bitmaps::Stored;
use crate::oracle::{OracleName, Violation, violation};

impl Bitmaps {
    /// Holds what is left in an image against the model. `found`: what its header counts.
    pub(in crate::oracle) fn left(
        &self,
        world: &World,
        file: &str,
        found: &[Stored],
    ) -> Result<(), Violation> {
        let header = world.files.get(file).and_then(|facts| facts.qcow2.as_ref());
        let Some(header) = header.filter(|_| !self.lost) else {
            return Ok(());
        };
        let wrong = |name: &str, what: &str| {
            let message = format!("after a power cut, bitmap '{name}' in image '{file}' {what}");
            Err(violation(OracleName::Bitmap, None, message, Vec::new()))
        };
        let settled = self.operations.0 == self.operations.1;
        let of = |name: &str| header.bitmaps.iter().find(|b| *b.name == *name);
        for theirs in found.iter().filter(|b| !b.in_use) {
            let ours = of(&theirs.name);
            let lacks = loaded(world, file, &theirs.name)
                .or_else(|| ours.and_then(|b: &StoredBitmap| b.dirty.as_ref()))
                .and_then(|dirty| dirty.iter().flatten().find(|bit| !is_set(theirs, *bit)));
            match ours {
                _ if lacks.is_some() => {
                    let at = lacks.expect("just asked") * theirs.granularity;
                    return wrong(&theirs.name, &format!("vouches for {at:#x}, which was changed"));
                }
                Some(b) if settled && b.in_use => {
                    return wrong(
                        &theirs.name,
                        "is not marked as in use, though the image is open for writing",
                    );
                }
                None if settled => return wrong(&theirs.name, "ought not to be there"),
                Some(b) if settled && (b.granularity, b.auto) != (theirs.granularity, theirs.auto) => {
                    return wrong(&theirs.name, &format!("ought to be {b:?}, is {theirs:?}"));
                }
                _ => {}
            }
        }
        let gone = |b: &&StoredBitmap| !b.in_use && !found.iter().any(|f| *f.name == *b.name && !f.in_use);
        match header.bitmaps.iter().find(gone) {
            Some(b) if settled => wrong(&b.name, "is gone, or marked as in use, though it was stored"),
            _ => Ok(()),
        }
    }
}

/// The marks of a bitmap that is loaded from this image and follows its node, as far as they are known.
fn loaded<'a>(world: &'a World, file: &str, name: &str) -> Option<&'a Spans> {
    let nodes = world.graph.nodes();
    let mut of_image = nodes.filter(|(id, _)| world.image_file(*id).is_some_and(|f| *f == *file));
    of_image.find_map(|(_, node)| {
        let mut bitmaps = node.bitmaps.iter();
        let bitmap = bitmaps.find(|b| *b.name == *name && b.persistent && !b.inconsistent)?;
        bitmap.dirty.as_ref()
    })
}

#[cfg(test)]
#[path = "bitmap_left_tests.rs"]
mod tests;
