//! Grains: from bytes to what the registers of the data oracle are asked, and from their answer to words.

use blkcheck_model::register::{Value, Violation as Unexplained};

use super::{Disk, Open, SECTOR, Seen, View, index, value_of, value_text};
use crate::scenario::Scenario;
use crate::stamp::{self, Content};

/// Turns bytes into values. The first grain that nothing can explain is returned.
pub(super) fn collect(
    bytes: &[u8],
    offset: u64,
    disk: &Disk,
    grain: u64,
    values: &mut Vec<Option<Value>>,
    open: &Open,
    view: &View<'_>,
) -> Option<(usize, Content)> {
    let mut wrong = None;
    for (i, piece) in bytes.chunks(index(grain)).enumerate() {
        let g = open.first + i;
        let at = offset + i as u64 * grain;
        let value = match seen(piece, at, &disk.cuts, grain) {
            Seen::Value(value) => Some(value),
            Seen::Wrong(content) => {
                if wrong.is_none()
                    && !(content == Content::Torn && torn_between_writes(disk, piece, at, g, view.now))
                {
                    wrong = Some((g, content));
                }
                None
            }
            Seen::Skip => None,
        };
        values.push(value);
    }
    wrong
}

/// What one grain holds, knowing that content may end within it.
pub(super) fn seen(piece: &[u8], at: u64, cuts: &[u64], grain: u64) -> Seen {
    match stamp::read(piece, at) {
        Content::Zero => Seen::Value(0),
        Content::Stamp(source) => Seen::Value(value_of(source)),
        content => {
            for cut in cuts.iter().filter(|c| (at..at + grain).contains(c)) {
                let (head, tail) = piece.split_at(index(cut - at).min(piece.len()));
                if tail.iter().any(|b| *b != 0) {
                    continue;
                }
                // Too short for a whole stamp: nobody can tell.
                if head.len() < 16 {
                    return Seen::Skip;
                }
                if let Content::Stamp(source) = stamp::read(head, at) {
                    return Seen::Value(value_of(source));
                }
            }
            Seen::Wrong(content)
        }
    }
}

/// Whether each sector of a large grain is one of its values, and writes to it did overlap, or one below failed halfway.
pub(super) fn torn_between_writes(disk: &Disk, piece: &[u8], at: u64, grain: usize, now: u64) -> bool {
    if piece.len() as u64 <= SECTOR {
        return false;
    }
    piece
        .chunks(index(SECTOR))
        .all(|sector| match stamp::read(sector, at) {
            Content::Zero => {
                disk.initial[grain] == 0
                    || disk.former.contains(&(grain, 0))
                    || disk.log.iter().any(|l| l.covers(grain) && l.value == 0)
                    || disk.loose[grain]
                    || disk.is_discarded(grain)
            }
            Content::Stamp(source) => {
                let value = value_of(source);
                value == disk.initial[grain]
                    || disk.loose[grain]
                    || disk.former.contains(&(grain, value))
                    || disk
                        .log
                        .iter()
                        .any(|l| l.covers(grain) && l.value == value && l.start <= now)
            }
            Content::Misplaced(..) | Content::Torn => false,
        })
        && (disk.log.iter().any(|l| l.covers(grain))
            || disk.target
            || disk.is_discarded(grain)
            || disk.torn && disk.loose[grain])
}

pub(super) fn content_text(scenario: &Scenario, content: Content) -> String {
    match content {
        Content::Zero => "zeroes".to_owned(),
        Content::Stamp(source) => value_text(scenario, value_of(source)),
        Content::Misplaced(source, at) => {
            format!(
                "{}, which belongs to {at:#x}",
                value_text(scenario, value_of(source))
            )
        }
        Content::Torn => "neither zeroes nor one whole stamp".to_owned(),
    }
}

pub(super) fn texts(scenario: &Scenario, values: &[Value]) -> String {
    let texts: Vec<String> = values.iter().map(|v| value_text(scenario, *v)).collect();
    texts.join(" or ")
}

pub(super) fn explain(scenario: &Scenario, disk: &Disk, v: &Unexplained, start: u64) -> String {
    let saw = value_text(scenario, v.saw);
    let writer = disk
        .log
        .iter()
        .find(|l| l.covers(v.grain) && l.value == v.saw && l.value != 0);
    let since = disk.log.iter().rev().find(|l| {
        l.covers(v.grain) && l.end < start && l.value != v.saw && writer.is_none_or(|w| w.end < l.start)
    });
    let why = match (since, v.saw >> 40 == 2 && writer.is_none()) {
        (Some(l), _) => format!(
            " (overwritten by step {}, which ended before this read began)",
            l.step.0
        ),
        (None, true) => " (never written here)".to_owned(),
        (None, false) => String::new(),
    };
    format!("holds {saw}{why}, expected {}", texts(scenario, &v.allowed))
}

/// Who wrote a grain, when.
pub(super) fn history(scenario: &Scenario, disk: &Disk, grain: usize) -> Vec<String> {
    let mut lines = vec![format!(
        "initially: {}",
        value_text(scenario, disk.initial[grain])
    )];
    for l in disk.log.iter().filter(|l| l.covers(grain)) {
        let end = if l.end == u64::MAX {
            "not ended or failed".to_owned()
        } else {
            format!("ended at {}", l.end)
        };
        lines.push(format!(
            "step {}: {} of this grain, begun at {}, {end}",
            l.step.0, l.what, l.start
        ));
    }
    if disk.loose[grain] {
        lines.push("a layer below was written here as well".to_owned());
    }
    lines
}
