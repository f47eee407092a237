//! Block status tells the truth, as far as a guest can ask: about the whole chain below an export.
//!
//! The answers make progress, cover the range and nothing more, never contradict themselves; ZERO only where zeroes may
//! be read ([`super::data`] asks its registers). Where no layer is said to decide, zeroes must be read as well; this is
//! left out under `raw` over a format, behind which a walk stops (io.md 3.3).
//! At the end every node is asked for the answer of its own layer alone: ZERO there is only where the node reads zeroes.
//! Unchecked: OFFSET_VALID and the place it names, depth, COMPRESSED; allocation of each layer is `bottom`'s.

use blkcheck_model::register::Value;

use super::liveness::step_text;
use super::{FinalContent, OracleName, Violation, violation};
use crate::history::{StatusRun, StepId};
use crate::scenario::Scenario;

const DATA: u8 = 0x01;
const ZERO: u8 = 0x02;
const ALLOCATED: u8 = 0x10;

/// The shape of an answer for a range of `length` bytes.
pub(super) fn shape(
    scenario: &Scenario,
    step: StepId,
    length: u64,
    runs: &[StatusRun],
) -> Result<(), Violation> {
    let wrong = |what: String| {
        let message = format!("{}: {what}", step_text(scenario, step));
        let evidence = runs
            .iter()
            .map(|r| format!("{:#x} bytes: flags {:#04x}, depth {}", r.bytes, r.flags, r.depth));
        Err(violation(
            OracleName::Status,
            Some(step),
            message,
            evidence.collect(),
        ))
    };
    if runs.iter().any(|r| r.bytes == 0) {
        return wrong("block status makes no progress".to_owned());
    }
    let covered: u64 = runs.iter().map(|r| r.bytes).sum();
    if covered != length {
        return wrong(format!("block status covers {covered:#x} bytes of {length:#x}"));
    }
    if runs
        .iter()
        .any(|r| r.flags & DATA != 0 && r.flags & ALLOCATED == 0)
    {
        return wrong("block status says DATA, but that no layer decides".to_owned());
    }
    Ok(())
}

/// The answers of one layer alone, at rest.
pub(super) fn layer(content: &FinalContent<'_>) -> Result<(), Violation> {
    for &(offset, bytes) in content.zeroes {
        let range = usize_of(offset)..usize_of(offset + bytes);
        let read = &content.bytes[range.start.min(content.bytes.len())..range.end.min(content.bytes.len())];
        // In pieces: that is many bytes at a time.
        let clean = |piece: &[u8]| piece.iter().fold(0, |all, b| all | b) == 0;
        let dirty = read
            .chunks(64)
            .position(|piece| !clean(piece))
            .map(|nth| nth * 64);
        if let Some(at) = dirty.and_then(|from| Some(from + read[from..].iter().position(|b| *b != 0)?)) {
            let message = format!(
                "block status of node '{}' alone says ZERO for [{offset:#x}, +{bytes:#x}), but at {:#x} data is read",
                content.name,
                offset + at as u64
            );
            return Err(violation(OracleName::Status, None, message, Vec::new()));
        }
    }
    Ok(())
}

fn usize_of(v: u64) -> usize {
    usize::try_from(v).expect("the content is in memory")
}

/// An answer as values, one per grain (per sector of a larger one) from `offset`: 0 where it promises zeroes, nothing
/// elsewhere. `trusted`: an answer that no layer decides is such a promise. One in which content ends (`cuts`) is promised only as a whole: zeroes
/// may follow data there.
pub(super) fn zeroes(
    runs: &[StatusRun],
    (offset, grain): (u64, u64),
    trusted: bool,
    cuts: &[u64],
    values: &mut [Option<Value>],
) {
    let index = |v: u64| usize::try_from(v).expect("small disks");
    let mut at = offset;
    for run in runs {
        let end = at + run.bytes;
        if run.flags & ZERO != 0 || trusted && run.flags & ALLOCATED == 0 {
            for start in (at / grain * grain..end).step_by(index(grain)) {
                let whole = at <= start && start + grain <= end;
                let cut = cuts.iter().any(|c| (start..start + grain).contains(c));
                if let Some(value) = values.get_mut(index((start - offset) / grain))
                    && (whole || !cut)
                {
                    *value = Some(0);
                }
            }
        }
        at = end;
    }
}

#[cfg(test)]
mod tests {
    use super::super::tests::scenario_of;
    use super::*;

    fn run(flags: u8, bytes: u64) -> StatusRun {
        StatusRun {
            flags,
            bytes,
            depth: 1,
        }
    }

    #[test]
    fn answers_cover_their_range_and_do_not_contradict_themselves() {
        let scenario = scenario_of(
            r#"{"version":1,"grain":64,"images":[],"steps":[{"actor":"g","execute":"query-jobs"}]}"#,
        );
        let shape = |runs: &[StatusRun]| shape(&scenario, StepId(0), 1024, runs);
        assert_eq!(shape(&[run(DATA | ALLOCATED, 512), run(ZERO, 512)]), Ok(()));
        let text = |runs: &[StatusRun]| shape(runs).expect_err("wrong").message;
        assert!(text(&[run(DATA | ALLOCATED, 512)]).contains("covers 0x200 bytes of 0x400"));
        assert!(text(&[run(ZERO, 2048)]).contains("covers 0x800"));
        assert!(text(&[run(ZERO, 1024), run(ZERO, 0)]).contains("no progress"));
        assert!(text(&[run(DATA, 1024)]).contains("no layer decides"));
    }

    #[test]
    fn a_layer_calls_nothing_zero_that_is_not() {
        let bytes = [0, 0, 7, 0];
        let judge = |zeroes: &[(u64, u64)]| {
            layer(&FinalContent {
                name: "n1",
                bytes: &bytes,
                allocated: &[],
                zeroes,
            })
        };
        assert_eq!(judge(&[(0, 2), (3, 1)]), Ok(()));
        assert_eq!(judge(&[(3, 9)]), Ok(()), "past the end nothing is read");
        let message = judge(&[(0, 2), (1, 2)]).expect_err("data").message;
        assert!(message.contains("ZERO for [0x1, +0x2), but at 0x2"), "{message}");
    }

    #[test]
    fn promises_of_zeroes() {
        let promised = |trusted, cuts: &[u64]| {
            let mut values = [None; 4];
            let runs = [run(DATA | ALLOCATED, 64), run(0, 96), run(ZERO, 96)];
            zeroes(&runs, (640, 64), trusted, cuts, &mut values);
            values
        };
        assert_eq!(
            promised(false, &[]),
            [None, None, Some(0), Some(0)],
            "a grain that is partly promised counts"
        );
        assert_eq!(promised(true, &[]), [None, Some(0), Some(0), Some(0)]);
        assert_eq!(
            promised(false, &[800]),
            [None, None, None, Some(0)],
            "data may end where the zeroes begin"
        );
    }
}
