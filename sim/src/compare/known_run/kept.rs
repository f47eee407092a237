//! What reads through copy-on-read leave unfilled, and what images keep of bitmaps.
//!
//! Rules: as in [`super`].

use super::Found;
use crate::oracle::OracleName;

/// What somebody read through a copy-on-read filter with `bottom`, or what was copied from there, is nobody's, where such reads end early.
pub(super) fn unfilled(found: &Found<'_>) -> bool {
    let oracles = [
        OracleName::Data,
        OracleName::Transparency,
        OracleName::PointInTime,
    ];
    let message = &found.violation.message;
    let place = message
        .find(" holds neither zeroes nor one whole stamp")
        .and_then(|end| message[..end].rsplit("0x").next())
        .and_then(|digits| digits.split(' ').next())
        .and_then(|digits| u64::from_str_radix(digits, 16).ok());
    let grain = u64::from(found.scenario.grain);
    oracles.contains(&found.violation.oracle)
        && place.is_some_and(|at| {
            let mut ends = found.causes.unfilled.iter();
            ends.any(|bytes| bytes.0 < at + grain && at < bytes.1)
        })
}

/// A command that changes a bitmap is refused since that is read-only, after a node with persistent bitmaps was to become so and did not.
pub(super) fn stays_frozen(found: &Found<'_>) -> bool {
    let mut evidence = found.violation.evidence.iter();
    let read_only = "is readonly and cannot be modified";
    found.says(&[OracleName::Refusals], "block-dirty-bitmap-")
        && found.causes.left_frozen
        && evidence.any(|line| line.starts_with("found: ") && line.contains(read_only))
}

/// What a closed image holds is a bitmap that a backup used when its node was, or became, read-only: it does not record, or lacks
/// a mark.
pub(super) fn stored_by_half(found: &Found<'_>) -> bool {
    let message = &found.violation.message;
    let half = message.contains(" lacks a mark at ")
        || (message.contains(" auto: true,")
            && message.contains(", is Stored")
            && message.contains(" auto: false,"));
    found.violation.oracle == OracleName::Bitmap
        && half
        && found.causes.halved.iter().any(|(file, name)| {
            message.starts_with(&format!("bitmap '{name}' in the closed image '{file}' "))
        })
}
