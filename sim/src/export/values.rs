//! Who wrote what, as a script has it: a byte of its own for every writer, or the stamps of the simulator.
//!
//! Bytes are for images that qemu-io fills: `write -P 0x11` is what a reader knows. Stamps also say where they belong,
//! and need images that are embedded.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::text::{self, What};
use crate::history::StepId;
use crate::scenario::{Action, GuestOp, Scenario, Stored};
use crate::stamp::Source;

/// The first writer's byte.
const FIRST: u8 = 0x11;

/// The writers of a scenario.
#[derive(Clone, Debug)]
pub(super) struct Values {
    /// None: stamps.
    bytes: Option<BTreeMap<Source, u8>>,
    grain: u32,
    /// Where disks are cut off, bytes: what is left of the stamp there may look like zeroes, and of a writer's bytes like data.
    cuts: Vec<u64>,
}

/// All writers, in order.
fn writers(scenario: &Scenario) -> Vec<Source> {
    let fills = (0u16..).zip(&scenario.images).flat_map(|(image, i)| {
        let data = |stored| matches!(stored, Stored::Data | Stored::Compressed);
        let fills = (0u16..).zip(&i.fill).filter(move |(_, f)| data(f.stored));
        fills.map(move |(fill, _)| Source::Fill { image, fill })
    });
    let writes = |action: &Action| {
        matches!(
            action,
            Action::Guest {
                op: GuestOp::Write(_) | GuestOp::WriteFua(_),
                ..
            }
        )
    };
    let steps = (0u32..).zip(&scenario.steps).filter(|(_, s)| writes(&s.action));
    fills
        .chain(steps.map(|(at, _)| Source::Step(StepId(at))))
        .collect()
}

/// The lengths that commands ask for.
fn cuts(scenario: &Scenario) -> Vec<u64> {
    let length = |action: &Action| match action {
        Action::Command { execute, arguments } if execute == "block_resize" => {
            arguments.get("size")?.as_u64()
        }
        _ => None,
    };
    scenario.steps.iter().filter_map(|s| length(&s.action)).collect()
}

impl Values {
    /// A byte for each writer; none when there are too many.
    pub(super) fn bytes(scenario: &Scenario) -> Option<Values> {
        let writers = writers(scenario);
        let fits = writers.len() <= usize::from(u8::MAX - FIRST);
        let bytes = fits.then(|| writers.into_iter().zip(FIRST..).collect())?;
        Some(Values {
            bytes: Some(bytes),
            grain: scenario.grain,
            cuts: cuts(scenario),
        })
    }

    /// Stamps.
    pub(super) fn stamps(scenario: &Scenario) -> Values {
        Values {
            bytes: None,
            grain: scenario.grain,
            cuts: cuts(scenario),
        }
    }

    fn of(&self, source: Source) -> String {
        match (&self.bytes, source) {
            (Some(bytes), _) => format!("{:#x}", bytes[&source]),
            (None, Source::Fill { image, fill }) => format!("fill({image}, {fill})"),
            (None, Source::Step(step)) => format!("step({})", step.0),
        }
    }

    pub(super) fn of_fill(&self, image: u16, fill: u16) -> String {
        self.bytes
            .as_ref()
            .and_then(|b| b.get(&Source::Fill { image, fill }))
            .map_or_else(|| "0".to_owned(), |b| format!("{b:#x}"))
    }

    pub(super) fn of_step(&self, step: StepId) -> String {
        self.of(Source::Step(step))
    }

    pub(super) fn of_run(&self, what: What) -> String {
        match what {
            What::Zero => "0".to_owned(),
            What::Written(source) if self.bytes.as_ref().is_none_or(|b| b.contains_key(&source)) => {
                self.of(source)
            }
            What::Written(_) | What::Unknown => "None".to_owned(),
        }
    }

    /// A value of the data oracle.
    pub(super) fn of_number(&self, value: Option<u64>) -> String {
        let low = |value: u64, bits: u32| value & ((1 << bits) - 1);
        match value {
            None => "None".to_owned(),
            Some(0) => "0".to_owned(),
            Some(v) if v >> 40 == 1 => format!("fill({}, {})", low(v >> 16, 24), low(v, 16)),
            Some(v) => format!("step({})", low(v, 40)),
        }
    }

    /// Content as a list of (bytes, whose).
    pub(super) fn runs(&self, bytes: &[u8], offset: u64) -> String {
        let runs = text::runs(bytes, offset, self.grain, &self.cuts);
        let runs = runs
            .into_iter()
            .map(|(n, what)| format!("({n:#x}, {})", self.of_run(what)));
        format!("[{}]", runs.collect::<Vec<_>>().join(", "))
    }

    /// The constants and functions that say who is who.
    pub(super) fn definitions(&self, scenario: &Scenario) -> String {
        let Some(bytes) = &self.bytes else {
            return format!(
                "# Unit of guest requests and of stamps, bytes.\nGRAIN = {}\n",
                self.grain
            );
        };
        let mut out = String::from("# Who writes which byte.\nWRITERS = {0: \"zeroes\"");
        for (source, byte) in bytes {
            let who = match source {
                Source::Fill { image, .. } => {
                    format!("data of {}", scenario.images[usize::from(*image)].file)
                }
                Source::Step(step) => format!("the write of step {}", step.0),
            };
            let _ = write!(out, ", {byte:#x}: {}", text::quoted(&who));
        }
        out.push_str("}\n");
        out
    }
}
