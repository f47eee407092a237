//! Closed images against the books.

use blkcheck_model::layer::Cell;

use super::{Books, File, UNKNOWN, Wrong, code, said};
use crate::image::read::{Mapping, Qcow2};
use crate::scenario::{Format, Scenario};
use crate::stamp;

impl Books {
    /// Every closed image against the books.
    pub(in crate::compare) fn stored<'a>(
        &self,
        scenario: &Scenario,
        disks: impl Iterator<Item = (&'a str, &'a [u8])>,
    ) -> Result<(), Wrong> {
        for (name, bytes) in disks {
            let (Some(file), Some(image)) = (
                self.files.get(name),
                scenario.images.iter().find(|i| i.file == name),
            ) else {
                continue;
            };
            if !file.lost && image.format == Format::Qcow2 {
                self.stored_qcow2(name, file, bytes)?;
            }
        }
        Ok(())
    }

    pub(super) fn stored_qcow2(&self, name: &str, file: &File, bytes: &[u8]) -> Result<(), Wrong> {
        let unreadable = |e: String| (format!("{name} is an image"), e);
        let image = Qcow2::parse(bytes).map_err(unreadable)?;
        let per_cluster = file.layer.cluster;
        for (cluster, first) in (0u64..).zip((0..file.layer.len()).step_by(per_cluster)) {
            let mapping = image.mapping(cluster).map_err(unreadable)?;
            let cells = &file.layer.cells[file.layer.cluster_of(first)];
            let doubtful = file.copied[file.layer.cluster_of(first)]
                .iter()
                .any(Option::is_some)
                || cells.contains(&Cell::Stamp(UNKNOWN));
            let ours = cells.iter().any(|c| *c != Cell::Unallocated);
            let theirs = mapping != Mapping::Unallocated;
            if ours != theirs && !doubtful {
                let say = |allocated| if allocated { "allocated" } else { "not allocated" };
                return Err((
                    format!("cluster {cluster} of {name} is {}", say(ours)),
                    say(theirs).to_owned(),
                ));
            }
            if let Mapping::Data(host) = mapping
                && !doubtful
            {
                self.stored_cluster(
                    name,
                    first,
                    cells,
                    bytes.get(usize::try_from(host).unwrap_or(usize::MAX)..),
                )?;
            }
        }
        Ok(())
    }

    pub(super) fn stored_cluster(
        &self,
        name: &str,
        first: usize,
        cells: &[Cell],
        bytes: Option<&[u8]>,
    ) -> Result<(), Wrong> {
        let start = first as u64 * self.grain;
        let bytes = bytes.unwrap_or_default();
        let chunks = bytes.chunks_exact(usize::try_from(self.grain).expect("small"));
        for (at, (cell, grain)) in (0u64..).zip(cells.iter().zip(chunks)) {
            let expected = cell.value().unwrap_or(UNKNOWN);
            let offset = start + at * self.grain;
            let got = stamp::read(grain, offset);
            let agrees = match got {
                _ if expected == UNKNOWN => true,
                stamp::Content::Zero => expected == 0,
                stamp::Content::Stamp(source) => expected == code(source),
                stamp::Content::Misplaced(..) | stamp::Content::Torn => false,
            };
            if !agrees {
                return Err((
                    format!("{name} stores {} at {offset:#x}", said(expected)),
                    format!("{got:?}"),
                ));
            }
        }
        Ok(())
    }
}
