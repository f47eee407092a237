//! Layers against plain byte arrays, and streams against what a guest sees.

use blkcheck_model::layer::{Cell, Format, Layer, guest_write, populate, read_through, view};
use blkcheck_model::status::{Above, check_layer, is_allocated_above, layer_status};
use blkcheck_model::stream::{Step, Streamed};
use proptest::prelude::*;

const GRAINS: usize = 24;

fn layer(raw: bool) -> impl Strategy<Value = Layer> {
    let cell = prop_oneof![
        Just(Cell::Unallocated),
        Just(Cell::Zero),
        (1_u64..99).prop_map(Cell::Stamp)
    ];
    (0_u32..3, 0..=GRAINS, prop::collection::vec(cell, GRAINS)).prop_map(move |(bits, len, cells)| {
        let cluster = if raw { 1 } else { 1 << bits };
        let mut layer = Layer::new(if raw { Format::Raw } else { Format::Qcow2(3) }, cluster, len);
        for (grain, cell) in cells.iter().enumerate().take(len) {
            let first = cells[grain / cluster * cluster];
            let allocated = raw || first != Cell::Unallocated;
            layer.cells[grain] = match cell {
                _ if !allocated => Cell::Unallocated,
                Cell::Unallocated => Cell::Zero,
                cell => *cell,
            };
        }
        assert!(layer.is_well_formed());
        layer
    })
}

fn chain() -> impl Strategy<Value = Vec<Layer>> {
    let base = prop_oneof![layer(false), layer(true)];
    (prop::collection::vec(layer(false), 1..5), base).prop_map(|(mut upper, base)| {
        upper.push(base);
        upper
    })
}

/// What the chain shows, from the bottom up: each layer starts as its backing content cut or zero-filled to its own
/// length, and puts its allocated cells on top.
fn flattened(chain: &[Layer]) -> Vec<u64> {
    chain.iter().rev().fold(Vec::new(), |mut below, layer| {
        below.resize(layer.len(), 0);
        for (shown, cell) in below.iter_mut().zip(&layer.cells) {
            *shown = cell.value().unwrap_or(*shown);
        }
        below
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn reading_through_is_flattening(chain in chain()) {
        prop_assert_eq!(view(&chain), flattened(&chain));
    }

    #[test]
    fn a_guest_write_changes_what_it_says_and_no_more(chain in chain(), first in 0..GRAINS, len in 1..GRAINS) {
        let mut chain = chain;
        let before = view(&chain);
        let grains = first.min(before.len())..(first + len).min(before.len());
        let lower = chain[1..].to_vec();
        guest_write(&mut chain, grains.clone(), 1000);
        for (grain, old) in before.into_iter().enumerate() {
            prop_assert_eq!(read_through(&chain, grain), if grains.contains(&grain) { 1000 } else { old });
        }
        prop_assert!(chain[0].is_well_formed());
        prop_assert_eq!(&chain[1..], &lower[..]);
    }

    #[test]
    fn populating_is_invisible(chain in chain(), first in 0..GRAINS, len in 0..GRAINS) {
        let mut chain = chain;
        let before = view(&chain);
        let grains = first.min(before.len())..(first + len).min(before.len());
        populate(&mut chain, grains.clone());
        prop_assert_eq!(view(&chain), before);
        prop_assert!(grains.clone().all(|grain| chain[0].is_allocated(grain)) && chain[0].is_well_formed());
    }

    #[test]
    fn exact_answers_are_right_ones(chain in chain()) {
        for grain in 0..chain[0].len() {
            let said = layer_status(&chain, grain);
            prop_assert_eq!(check_layer(&chain, grain, said), Ok(()));
            // The layer that is said to decide does: everything below it may change.
            if let Above::At(depth) = is_allocated_above(&chain, grain) {
                let mut cut = chain[..=depth].to_vec();
                let beyond = Layer { cells: vec![Cell::Stamp(7777); GRAINS], ..Layer::new(Format::Raw, 1, 0) };
                cut.push(beyond);
                prop_assert_eq!(read_through(&cut, grain), read_through(&chain, grain));
            }
        }
    }

    #[test]
    fn a_minimal_stream_succeeds_and_is_idempotent(chain in chain(), bottom in 0_usize..4) {
        let stream = Streamed { chain: &chain, bottom: bottom.min(chain.len() - 1) };
        let top = stream.result();
        prop_assert!(top.is_well_formed());
        prop_assert_eq!(stream.check_success(&top), Ok(()));
        let mut after = vec![top.clone()];
        after.extend_from_slice(&chain[stream.bottom + 1..]);
        let again = Streamed { chain: &after, bottom: 0 };
        prop_assert_eq!(again.result(), top);
    }

    /// Leaving out one cluster that had to be copied, or copying one that had not, is noticed.
    #[test]
    fn a_stream_that_is_off_by_one_cluster_is_noticed(chain in chain(), bottom in 0_usize..4) {
        let stream = Streamed { chain: &chain, bottom: bottom.min(chain.len() - 1) };
        let good = stream.result();
        for at in (0..good.len()).filter(|at| chain[0].cells[*at] == Cell::Unallocated) {
            let cluster = good.cluster_of(at);
            let mut bad = good.clone();
            if good.is_allocated(at) {
                bad.cells[cluster.clone()].fill(Cell::Unallocated);
            } else {
                for grain in cluster.clone() {
                    bad.cells[grain] = Cell::Stamp(read_through(&chain, grain));
                }
            }
            // Where only the end of a short layer decides, copying is a matter of taste unless the guest would notice.
            let cut_off = cluster.clone().any(|grain| stream.step(grain) == Step::Either);
            prop_assert!(stream.check_success(&bad).is_err() || cut_off, "cluster {:?} of {:?}", cluster, chain);
        }
    }
}
