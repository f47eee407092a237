//! Image files from the simulator's side: laid out, read and checked by code of its own, which shares nothing with the
//! layer under test, so that the two can disagree.

pub mod bitmaps;
pub mod build;
pub mod check;
mod deflate;
pub mod read;

#[cfg(test)]
mod tests;

/// A cluster's size as a shift.
fn bits_of(cluster_size: u32) -> u32 {
    assert!(cluster_size.is_power_of_two(), "cluster size {cluster_size}");
    cluster_size.trailing_zeros()
}

/// An offset as an index.
fn to_usize(v: u64) -> usize {
    usize::try_from(v).expect("fits an address space of 64 bits")
}
