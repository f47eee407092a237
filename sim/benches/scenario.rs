//! Whole scenarios on the simulated target: a stream over three qcow2 layers under guest I/O, images laid out, run,
//! read in full, closed, checked. One iteration is one seed; items are scheduler steps.
//!
//! `cargo bench -p blkcheck-sim --bench scenario`.

use blkcheck_sim::choice::Random;
use blkcheck_sim::oracle::{self, Oracle};
use blkcheck_sim::run::Runner;
use blkcheck_sim::scenario::{Scenario, parse::parse};
use blkcheck_sim::target::SimTarget;
use divan::counter::ItemsCount;

fn main() {
    divan::main();
}

fn scenario() -> Scenario {
    parse("stream.json", include_bytes!("../src/testdata/stream.json")).expect("a valid scenario")
}

fn seeds(bencher: divan::Bencher<'_, '_>, oracles: &mut [Box<dyn Oracle>]) {
    let (scenario, mut runner, mut target) = (scenario(), Runner::new(), SimTarget::new());
    let mut seed = 0;
    let mut one = move |oracles: &mut [Box<dyn Oracle>]| {
        seed += 1;
        let result = runner
            .run(&scenario, &mut Random::new(seed), &mut target, oracles)
            .expect("usable");
        assert_eq!(result.violation, None, "seed {seed}");
        result.steps
    };
    let steps = one(oracles);
    bencher
        .counter(ItemsCount::new(steps))
        .bench_local(|| one(oracles));
}

#[divan::bench(sample_count = 50, sample_size = 20)]
fn without_oracles(bencher: divan::Bencher<'_, '_>) {
    seeds(bencher, &mut []);
}

#[divan::bench(sample_count = 50, sample_size = 20)]
fn with_every_oracle(bencher: divan::Bencher<'_, '_>) {
    seeds(bencher, &mut oracle::all());
}

/// Laying out the three images alone.
#[divan::bench]
fn images(bencher: divan::Bencher<'_, '_>) {
    let scenario = scenario();
    let mut out = Vec::new();
    bencher
        .counter(ItemsCount::new(scenario.images.len()))
        .bench_local(|| {
            for (index, image) in (0..).zip(&scenario.images) {
                out.clear();
                blkcheck_sim::image::build::build(image, index, scenario.grain, &mut out);
            }
            out.len()
        });
}
