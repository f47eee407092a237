//! What the fuzz targets do with their input: the same runs as everything else, so that a crash file is one step away
//! from a scenario file and a regression test.
//!
//! Rules: any bytes are an input, and an interesting one: bytes lead, a seed among them decides what they leave open.
//! A finding is a panic, whose text says what to do with it. Nothing here is random.

mod image;
mod layout;
mod recipe;
pub mod seeds;
#[cfg(test)]
mod tests;

use std::cell::RefCell;

use arbitrary::{Arbitrary, Unstructured};

pub use image::{Depth, ImageInput, open_image};

use crate::choice::{Bytes, Random, Recording};
use crate::generate::{Profile, Reach, generate_from};
use crate::harness::{Harness, Setup};
use crate::report;
use crate::rng::{Rng, Stream};
use crate::scenario::{Scenario, validate};

/// A scenario and its schedule, as a fuzzer makes them.
///
/// In the input, in this order: profile (1 byte), seed (4, little endian), length of the workload (2), the workload,
/// and the choices. What is missing is zero, and a seed's own draws follow where the bytes end.
#[derive(Debug)]
pub struct ScenarioInput {
    profile: u8,
    seed: u32,
    /// The generator's first draws.
    workload: Vec<u8>,
    /// The start of the choice stream.
    choices: Vec<u8>,
}

impl<'a> Arbitrary<'a> for ScenarioInput {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<ScenarioInput> {
        let (profile, seed) = (u.arbitrary()?, u.arbitrary()?);
        let length = usize::from(u.arbitrary::<u16>()?).min(u.len());
        let workload = u.bytes(length)?.to_vec();
        let choices = u.bytes(u.len())?.to_vec();
        Ok(ScenarioInput {
            profile,
            seed,
            workload,
            choices,
        })
    }
}

impl ScenarioInput {
    /// The scenario of this input.
    #[must_use]
    pub fn scenario(&self) -> Scenario {
        let profile = Profile::ALL[usize::from(self.profile) % Profile::ALL.len()];
        let stream = Rng::stream(u64::from(self.seed), Stream::Workload);
        generate_from(&mut stream.after(&self.workload), profile, Reach::all())
    }
}

thread_local! {
    static HARNESS: RefCell<Option<Harness>> = const { RefCell::new(None) };
}

/// Runs the input; a violation comes back as text with the scenario that replays it.
///
/// # Errors
/// The finding.
///
/// # Panics
/// When the simulator itself cannot run, which no input causes.
pub fn run(input: &ScenarioInput) -> Result<(), String> {
    HARNESS.with_borrow_mut(|slot| {
        let harness =
            slot.get_or_insert_with(|| Harness::new(&Setup::default()).expect("memory is always there"));
        let mut scenario = input.scenario();
        validate::validate(&scenario).map_err(|e| format!("generated and not valid: {e:?}\n{scenario:?}"))?;
        let mut choices = Vec::new();
        let mut bytes = Bytes::then(&input.choices, Random::new(u64::from(input.seed)));
        let result = harness.once(&scenario, &mut Recording::new(&mut bytes, &mut choices));
        let Some(violation) = result.expect("memory is always there").violation else {
            return Ok(());
        };
        scenario.choices = choices;
        scenario.expect = Some(violation.oracle.as_str().to_owned());
        let file = serde_json::to_string(&scenario).expect("a scenario is JSON");
        Err(format!(
            "{}\n{}\n{file}",
            violation.oracle.as_str(),
            report::verdict(&violation)
        ))
    })
}
