//! Block status at the level of the model: what a layer may say of a range, and which layer decides it.
//!
//! Rules: an answer may be split and may be less precise than it could be (zeroes called data), never wrong: ZERO only
//! where zeroes are read, ALLOCATED exactly where the layer decides. The first layer asked answers "not allocated,
//! nothing" past its end; a *lower* layer that is too short counts as allocated zeroes.

use bitflags::bitflags;

use crate::layer::{Cell, Layer, read_through};

bitflags! {
    /// What a block-status answer says (QEMU `BDRV_BLOCK_*`).
    #[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
    pub struct Status: u8 {
        /// Content is tied to this layer.
        const DATA = 0x01;
        /// Reads as zeroes.
        const ZERO = 0x02;
        /// The answer says where the bytes are.
        const OFFSET_VALID = 0x04;
        /// This layer decides the content.
        const ALLOCATED = 0x10;
        /// The answer reaches the end of this layer.
        const EOF = 0x20;
        /// Stored compressed.
        const COMPRESSED = 0x80;
    }
}

/// The most precise answer of the top layer for one grain, without `EOF` and `OFFSET_VALID`.
#[must_use]
pub fn layer_status(chain: &[Layer], grain: usize) -> Status {
    match chain[0].cells[grain] {
        Cell::Zero => Status::ZERO | Status::ALLOCATED,
        Cell::Stamp(_) => Status::DATA | Status::ALLOCATED,
        Cell::Unallocated if chain.get(1).is_none_or(|backing| grain >= backing.len()) => Status::ZERO,
        Cell::Unallocated => Status::empty(),
    }
}

/// What [`is_allocated_above`] says of one grain.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Above {
    /// No layer of the range decides it.
    No,
    /// The layer at this place of the range does (0 = the first asked), by content or by its end.
    At(usize),
    /// The first layer asked ends before it.
    PastEnd,
}

/// The layer of the chain (a slice from the first asked to the last, base included or not as the caller wants) that
/// decides this grain.
#[must_use]
pub fn is_allocated_above(range: &[Layer], grain: usize) -> Above {
    for (depth, layer) in range.iter().enumerate() {
        match layer.cells.get(grain) {
            None if depth == 0 => return Above::PastEnd,
            None => return Above::At(depth),
            Some(Cell::Unallocated) => {}
            Some(_) => return Above::At(depth),
        }
    }
    Above::No
}

/// The longest run from `grain`, at most `max` grains, over which `answer` stays the same.
#[must_use]
pub fn run<T: PartialEq>(grain: usize, max: usize, answer: impl Fn(usize) -> T) -> usize {
    let first = answer(grain);
    (1..max).find(|n| answer(grain + n) != first).unwrap_or(max)
}

/// Judges an answer for one grain about the top layer of a chain (`want_zero` queries; others may call zeroes data).
///
/// # Errors
/// What is wrong with it.
pub fn check_layer(chain: &[Layer], grain: usize, said: Status) -> Result<(), String> {
    let allocated = chain[0].is_allocated(grain);
    if said.contains(Status::ALLOCATED) != allocated {
        let is = if allocated { "is" } else { "is not" };
        return Err(format!(
            "grain {grain} {is} allocated in this layer, the answer is {said:?}"
        ));
    }
    if said.contains(Status::DATA) && !allocated {
        return Err(format!(
            "grain {grain} holds no data in this layer, the answer is {said:?}"
        ));
    }
    if said.contains(Status::ZERO) && read_through(chain, grain) != 0 {
        return Err(format!(
            "grain {grain} does not read as zeroes, the answer is {said:?}"
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layer::Format;

    fn layer(cells: &[Cell]) -> Layer {
        Layer {
            format: Format::Qcow2(3),
            cluster: 1,
            cells: cells.to_vec(),
        }
    }

    #[test]
    fn the_first_layer_ends_differently_from_a_lower_one() {
        let long = layer(&[Cell::Unallocated; 3]);
        let short = layer(&[Cell::Unallocated]);
        assert_eq!(
            is_allocated_above(&[long.clone(), short.clone()], 2),
            Above::At(1)
        );
        assert_eq!(
            is_allocated_above(&[short.clone(), long.clone()], 2),
            Above::PastEnd
        );
        assert_eq!(is_allocated_above(&[short, long], 0), Above::No);
    }

    #[test]
    fn answers_are_judged() {
        let chain = [
            layer(&[Cell::Unallocated, Cell::Stamp(4), Cell::Zero]),
            layer(&[Cell::Stamp(1)]),
        ];
        for grain in 0..3 {
            check_layer(&chain, grain, layer_status(&chain, grain)).unwrap();
        }
        assert_eq!(layer_status(&chain[1..], 0), Status::DATA | Status::ALLOCATED);
        assert!(
            check_layer(&chain, 0, Status::ZERO).is_err(),
            "the backing file has data there"
        );
        assert!(
            check_layer(&chain, 1, Status::empty()).is_err(),
            "this layer decides"
        );
        check_layer(&chain, 2, Status::DATA | Status::ALLOCATED).unwrap();
        assert_eq!(run(0, 3, |grain| chain[0].is_allocated(grain)), 1);
        assert_eq!(run(1, 2, |grain| chain[0].is_allocated(grain)), 2);
    }
}
