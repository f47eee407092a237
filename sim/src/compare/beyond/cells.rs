//! What a disk holds, grain by grain.
//!
//! Rules: a grain is known by who wrote it and where the writer thought it was (a window shows it elsewhere). A disk of
//! which somebody may have written unseen is not trusted any more and never judged.

use crate::image::build::{content, forms};
use crate::scenario::{Format, Image};
use crate::stamp::{self, Source};

/// A grain.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) enum Cell {
    /// Zeroes.
    Zero,
    /// Written by this source, at this offset of its own.
    Stamp(Source, u64),
    /// Either of two things that may both be right, until somebody looks.
    Any,
}

impl Cell {
    /// As it was read; none when it is neither zero nor a stamp of this place.
    pub(super) fn read(bytes: &[u8], offset: u64) -> Option<Cell> {
        match stamp::read(bytes, offset) {
            stamp::Content::Zero => Some(Cell::Zero),
            stamp::Content::Stamp(source) => Some(Cell::Stamp(source, offset)),
            stamp::Content::Misplaced(..) | stamp::Content::Torn => None,
        }
    }

    /// Whether these bytes are it.
    pub(super) fn is(self, bytes: &[u8]) -> bool {
        match self {
            Cell::Any => true,
            Cell::Zero => stamp::read(bytes, 0) == stamp::Content::Zero,
            Cell::Stamp(source, at) => stamp::read(bytes, at) == stamp::Content::Stamp(source),
        }
    }

    /// In reports.
    pub(super) fn said(self) -> String {
        match self {
            Cell::Zero => "zeroes".to_owned(),
            Cell::Any => "anything".to_owned(),
            Cell::Stamp(Source::Fill { image, fill }, _) => format!("fill {fill} of image {image}"),
            Cell::Stamp(Source::Step(step), _) => format!("the write of step {}", step.0),
        }
    }
}

/// A disk.
#[derive(Clone, Debug)]
pub(super) struct Disk {
    /// Its grains.
    pub(super) cells: Vec<Cell>,
    /// Nobody wrote unseen.
    pub(super) trusted: bool,
}

/// The disk that an image shows over another one; the image's own place in the scenario is `index`.
pub(super) fn overlay(image: &Image, index: u16, grain: u32, below: Option<&[Cell]>) -> Vec<Cell> {
    let unit = u64::from(grain);
    let grains = usize::try_from(image.size.div_ceil(unit)).expect("validated");
    let mut bytes = vec![0; grains * grain as usize];
    content(image, index, grain, 0, &mut bytes);
    let cluster = match image.format {
        Format::Raw => 0,
        Format::Qcow2 => u64::from(image.cluster_size),
    };
    let allocated: Vec<u64> = forms(image).into_iter().map(|(cluster, _)| cluster).collect();
    let own = |offset: u64| cluster == 0 || allocated.binary_search(&(offset / cluster)).is_ok();
    let shown = |(at, chunk): (usize, &[u8])| {
        let offset = at as u64 * unit;
        if own(offset) {
            Cell::read(chunk, offset).expect("just laid out")
        } else {
            below.and_then(|b| b.get(at)).copied().unwrap_or(Cell::Zero)
        }
    };
    bytes.chunks(grain as usize).enumerate().map(shown).collect()
}
