//! Checks a closed qcow2 image: every host cluster is used as often as its refcount says, COPIED flags are true,
//! nothing overlaps, everything lies inside the file.
//!
//! Rules: recomputes everything from the tables. A refcount that is too high is a leak; everything else is corruption.

use super::bitmaps;
use super::read::{Mapping, OFFSET, Qcow2, be32, be64};
use super::to_usize;

/// How bad it is.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Severity {
    /// Space is lost.
    Leak,
    /// Data is lost, or will be.
    Corruption,
}

/// One finding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// How bad.
    pub severity: Severity,
    /// What, with offsets in hexadecimal.
    pub text: String,
}

const COPIED: u64 = 1 << 63;
const L1_RESERVED: u64 = 0x7f00_0000_0000_01ff;
const L2_RESERVED: u64 = 0x3f00_0000_0000_01fe;

/// Everything wrong with the image in `bytes`, which has no snapshots; empty when clean.
#[must_use]
pub fn check(bytes: &[u8]) -> Vec<Problem> {
    let mut problems = check_with_snapshots(bytes);
    let snapshots = Qcow2::parse(bytes).map_or(0, |image| image.snapshots);
    if snapshots != 0 {
        problems.push(Problem {
            severity: Severity::Corruption,
            text: format!("{snapshots} snapshots that nobody made"),
        });
    }
    problems
}

/// Like [`check`], for images that may have internal snapshots.
#[must_use]
pub fn check_with_snapshots(bytes: &[u8]) -> Vec<Problem> {
    let image = match Qcow2::parse(bytes) {
        Ok(image) => image,
        Err(text) => {
            return vec![Problem {
                severity: Severity::Corruption,
                text,
            }];
        }
    };
    let clusters = (bytes.len() as u64).div_ceil(image.cluster_size());
    let mut check = Check {
        used: vec![0; to_usize(clusters)],
        copied: Vec::new(),
        problems: Vec::new(),
        image,
    };
    check.walk();
    check.compare();
    check.problems
}

struct Check<'a> {
    image: Qcow2<'a>,
    /// How often each host cluster is referred to.
    used: Vec<u64>,
    /// (host cluster, COPIED flag) of every entry that has such a flag.
    copied: Vec<(u64, bool, &'static str)>,
    problems: Vec<Problem>,
}

impl Check<'_> {
    fn corrupt(&mut self, text: String) {
        self.problems.push(Problem {
            severity: Severity::Corruption,
            text,
        });
    }

    fn walk(&mut self) {
        let size = self.image.cluster_size();
        if self.image.incompatible != 0 {
            self.corrupt(format!(
                "incompatible features {:#x} are set after close",
                self.image.incompatible
            ));
        }
        self.claim(0, size, "header");
        let (table, clusters) = (
            self.image.refcount_table,
            u64::from(self.image.refcount_table_clusters),
        );
        self.claim(table, clusters * size, "refcount table");
        let l1_bytes = u64::from(self.image.l1_size) * 8;
        self.claim(self.image.l1_offset, l1_bytes, "L1 table");
        for i in 0..clusters * size / 8 {
            let Some(block) = be64(self.image.bytes, table + i * 8) else {
                break;
            };
            if block & 0x1ff != 0 {
                self.corrupt(format!("refcount table entry {i} has reserved bits: {block:#x}"));
            } else if block != 0 {
                self.claim(block, size, "refcount block");
            }
        }
        let needed = self.image.clusters().div_ceil(size / 8);
        if u64::from(self.image.l1_size) < needed {
            self.corrupt(format!(
                "the L1 table has {} entries, {needed} are needed",
                self.image.l1_size
            ));
        }
        for i in 0..u64::from(self.image.l1_size) {
            match self.image.l1_entry(i) {
                Ok(0) => {}
                Ok(entry) => self.table(i, entry),
                Err(text) => return self.corrupt(text),
            }
        }
        self.bitmaps();
        // What snapshots share is counted; COPIED flags are the active tables' matter.
        let copied = std::mem::take(&mut self.copied);
        self.snapshots();
        self.copied = copied;
    }

    /// The bitmap directory, and the tables and bits of every bitmap.
    fn bitmaps(&mut self) {
        match bitmaps::stored(&self.image) {
            Err(text) => self.corrupt(text),
            Ok(None) => {}
            Ok(Some(directory)) => {
                let (offset, size) = directory.place;
                self.claim(offset, size, "bitmap directory");
                for (offset, bytes, what) in directory.bitmaps.into_iter().flat_map(|bitmap| bitmap.places) {
                    self.claim(offset, bytes, what);
                }
            }
        }
    }

    /// The snapshot table, and what each snapshot's L1 table names.
    fn snapshots(&mut self) {
        let (start, mut at) = (self.image.snapshots_offset, self.image.snapshots_offset);
        for snapshot in 0..self.image.snapshots {
            let bytes = self.image.bytes;
            let entry = usize::try_from(at)
                .ok()
                .and_then(|at| bytes.get(at..at.checked_add(40)?));
            let Some(entry) = entry else {
                return self.corrupt(format!("snapshot {snapshot} is past the end of the file"));
            };
            let (l1, entries) = (
                be64(entry, 0).unwrap_or(0),
                u64::from(be32(entry, 8).unwrap_or(0)),
            );
            let names = u64::from(be32(entry, 12).unwrap_or(0));
            let extra = u64::from(be32(entry, 36).unwrap_or(0));
            at = (at + 40 + extra + (names >> 16) + (names & 0xffff)).next_multiple_of(8);
            if !self.claim(l1, entries * 8, "L1 table of a snapshot") {
                return;
            }
            for i in 0..entries {
                match be64(bytes, l1 + i * 8) {
                    Some(0) => {}
                    Some(entry) => self.table(i, entry),
                    None => return self.corrupt(format!("L1 entry {i} of snapshot {snapshot} is missing")),
                }
            }
        }
        if at > start {
            self.claim(start, at - start, "snapshot table");
        }
    }

    fn table(&mut self, index: u64, entry: u64) {
        let size = self.image.cluster_size();
        if entry & L1_RESERVED != 0 {
            self.corrupt(format!("L1 entry {index} has reserved bits: {entry:#x}"));
        }
        let table = entry & OFFSET;
        if !self.claim(table, size, "L2 table") {
            return;
        }
        self.copied.push((table / size, entry & COPIED != 0, "L2 table"));
        for i in 0..size / 8 {
            let Some(entry) = be64(self.image.bytes, table + i * 8) else {
                return self.corrupt(format!("the L2 table at {table:#x} ends with the file"));
            };
            if entry != 0 {
                self.cluster(index * (size / 8) + i, entry);
            }
        }
    }

    fn cluster(&mut self, cluster: u64, entry: u64) {
        let size = self.image.cluster_size();
        match self.image.decode(entry) {
            Err(text) => self.corrupt(format!("guest cluster {cluster}: {text}")),
            Ok(Mapping::Compressed(offset, space)) => {
                if entry & COPIED != 0 {
                    self.corrupt(format!("compressed guest cluster {cluster} has the COPIED flag"));
                }
                let first = offset / size;
                for host in first..(offset + space).div_ceil(size) {
                    match self.used.get_mut(to_usize(host)) {
                        Some(used) => *used += 1,
                        None => {
                            return self.corrupt(format!(
                                "compressed guest cluster {cluster} is past the end of the file"
                            ));
                        }
                    }
                }
            }
            Ok(Mapping::Unallocated | Mapping::Zero(0)) => {
                if entry & (L2_RESERVED | COPIED) != 0 {
                    self.corrupt(format!("guest cluster {cluster} has stray bits: {entry:#x}"));
                }
            }
            Ok(Mapping::Zero(host) | Mapping::Data(host)) => {
                if entry & L2_RESERVED != 0 {
                    self.corrupt(format!("guest cluster {cluster} has reserved bits: {entry:#x}"));
                }
                // The last cluster of the file may be short, it must not be missing.
                if self.claim(host, 1, "data cluster") {
                    self.copied
                        .push((host / size, entry & COPIED != 0, "data cluster"));
                }
            }
        }
    }

    /// Notes a use of whole clusters; false, and a problem, when they are not there.
    fn claim(&mut self, offset: u64, bytes: u64, what: &str) -> bool {
        let size = self.image.cluster_size();
        let end = offset.checked_add(bytes);
        let inside = end.is_some_and(|end| end.div_ceil(size) <= self.used.len() as u64);
        if !offset.is_multiple_of(size) || !inside {
            self.corrupt(format!(
                "{what} at {offset:#x} (+{bytes:#x}) is unaligned or past the end of the file"
            ));
            return false;
        }
        for cluster in offset / size..(offset + bytes).div_ceil(size) {
            self.used[to_usize(cluster)] += 1;
        }
        true
    }

    fn refcount(&self, cluster: u64) -> u64 {
        let order = self.image.refcount_order;
        let per_block = 1u64 << (self.image.cluster_bits + 3 - order);
        let slots = u64::from(self.image.refcount_table_clusters) * self.image.cluster_size() / 8;
        let slot = cluster / per_block;
        if slot >= slots {
            return 0;
        }
        let block = be64(self.image.bytes, self.image.refcount_table + slot * 8).unwrap_or(0) & !0x1ff;
        if block == 0 {
            return 0;
        }
        let bit = (cluster % per_block) << order;
        let start = usize::try_from(block + bit / 8).unwrap_or(usize::MAX);
        if order < 3 {
            let byte = self.image.bytes.get(start).copied().unwrap_or(0);
            return u64::from(byte >> (bit % 8)) & ((1 << (1 << order)) - 1);
        }
        let width = 1usize << (order - 3);
        let end = start.saturating_add(width);
        let entry = self.image.bytes.get(start..end).unwrap_or(&[]);
        entry.iter().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    fn compare(&mut self) {
        let size = self.image.cluster_size();
        for cluster in 0..self.used.len() as u64 {
            let (used, counted) = (self.used[to_usize(cluster)], self.refcount(cluster));
            let offset = cluster * size;
            if counted > used {
                let text =
                    format!("host cluster at {offset:#x} is used {used} times, its refcount is {counted}");
                self.problems.push(Problem {
                    severity: Severity::Leak,
                    text,
                });
            } else if counted < used {
                self.corrupt(format!(
                    "host cluster at {offset:#x} is used {used} times, its refcount is {counted}"
                ));
            }
        }
        let mut active = std::mem::take(&mut self.copied);
        active.sort_by_key(|(cluster, ..)| *cluster);
        // Also with right refcounts: whoever writes one of the places takes a cluster for it, and leaves the other with a
        // COPIED flag that has become false.
        for pair in active.windows(2).filter(|pair| pair[0].0 == pair[1].0) {
            let ((cluster, _, what), (.., other)) = (pair[0], pair[1]);
            let offset = cluster * size;
            self.corrupt(format!(
                "the active tables have {what} and {other} at {offset:#x}"
            ));
        }
        for (cluster, flag, what) in active {
            let (used, counted) = (self.used[to_usize(cluster)], self.refcount(cluster));
            let offset = cluster * size;
            if used > 1 && self.image.snapshots == 0 {
                self.corrupt(format!(
                    "{what} at {offset:#x} overlaps something else: used {used} times"
                ));
            }
            if flag != (counted == 1) {
                self.corrupt(format!(
                    "{what} at {offset:#x}: COPIED is {flag}, the refcount {counted}"
                ));
            }
        }
    }
}
