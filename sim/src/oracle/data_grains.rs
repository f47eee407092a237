//! Grains: from bytes to what the registers of the data oracle are asked, and from their answer to words.

use blkcheck_model::register::{Value, Violation as Unexplained};

use super::{Disk, SECTOR, Seen, index, value_of, value_text};
use crate::scenario::Scenario;
use crate::stamp::{self, Content};

/// Turns bytes from a grain on into values, by parts. The first part that nothing can explain is returned, by its place on the disk.
pub(super) fn collect(
    bytes: &[u8],
    first: usize,
    disk: &Disk,
    grain: u64,
    values: &mut Vec<Option<Value>>,
) -> Option<(usize, Content)> {
    let mut wrong = None;
    for (g, piece) in (first..).zip(bytes.chunks(index(grain))) {
        for (part, seen) in disk
            .registers
            .of(g)
            .zip(parts(piece, g as u64 * grain, &disk.cuts, grain))
        {
            values.push(match seen {
                Seen::Value(value) => Some(value),
                Seen::Skip => None,
                Seen::Wrong(content) => {
                    wrong.get_or_insert((part, content));
                    None
                }
            });
        }
    }
    wrong
}

/// What the parts of a grain hold: all the same if it is whole.
pub(super) fn parts(piece: &[u8], at: u64, cuts: &[u64], grain: u64) -> Vec<Seen> {
    let part = index(grain.min(SECTOR));
    let count = piece.len().div_ceil(part);
    match stamp::read(piece, at) {
        Content::Zero => vec![Seen::Value(0); count],
        Content::Stamp(source) => vec![Seen::Value(value_of(source)); count],
        _ if count > 1 => {
            let sectors = piece.chunks(part).zip((0..).step_by(part));
            sectors
                .map(|(sector, offset)| seen_in(sector, at, offset, cuts))
                .collect()
        }
        _ => vec![seen(piece, at, cuts, grain)],
    }
}

/// What a sector of the grain at `at` holds, knowing that content may end within it.
fn seen_in(sector: &[u8], at: u64, offset: u64, cuts: &[u64]) -> Seen {
    match stamp::read(sector, at) {
        Content::Zero => Seen::Value(0),
        Content::Stamp(source) => Seen::Value(value_of(source)),
        content => cuts
            .iter()
            .filter_map(|cut| cut.checked_sub(at + offset))
            .filter(|end| *end < sector.len() as u64)
            .find_map(|end| headed(sector, at, index(end)))
            .unwrap_or(Seen::Wrong(content)),
    }
}

/// What is seen of content that ends after so many bytes.
fn headed(piece: &[u8], at: u64, end: usize) -> Option<Seen> {
    let (head, tail) = piece.split_at(end.min(piece.len()));
    if tail.iter().any(|b| *b != 0) {
        return None;
    }
    // Too short for a whole stamp: nobody can tell.
    if head.len() < 16 {
        return Some(Seen::Skip);
    }
    match stamp::read(head, at) {
        Content::Stamp(source) => Some(Seen::Value(value_of(source))),
        _ => None,
    }
}

/// What one grain holds, knowing that content may end within it.
pub(super) fn seen(piece: &[u8], at: u64, cuts: &[u64], grain: u64) -> Seen {
    match stamp::read(piece, at) {
        Content::Zero => Seen::Value(0),
        Content::Stamp(source) => Seen::Value(value_of(source)),
        content => cuts
            .iter()
            .filter(|c| (at..at + grain).contains(c))
            .find_map(|c| headed(piece, at, index(c - at)))
            .unwrap_or(Seen::Wrong(content)),
    }
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

/// Whether content that ends within the grain of this part ends before the part.
pub(super) fn is_tail(cuts: &[u64], part: usize, grain: u64) -> bool {
    let at = part as u64 * grain.min(SECTOR);
    let start = at / grain * grain;
    cuts.iter().any(|cut| (start + 1..=at).contains(cut))
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
