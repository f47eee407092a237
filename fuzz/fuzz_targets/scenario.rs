//! Bytes through `arbitrary` to a scenario and its choices, then the same run as everything else.
//!
//! The first bytes pick the generator's seed and profile, the rest are the choice stream, so that the fuzzer's coverage
//! feedback steers both the workload and the interleaving.
#![no_main]

use blkcheck_sim::fuzzing::{self, ScenarioInput};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: ScenarioInput| {
    if let Err(finding) = fuzzing::run(&input) {
        panic!("{finding}");
    }
});
