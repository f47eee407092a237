//! Copy before write: what a filter keeps of its source, in which units, and what a snapshot of it shows.
//!
//! Rules: before a write reaches the source, every cluster that it touches and that is still to be kept is copied to the
//! target. A cluster is as large as the target's, as was asked for, and as 64 KiB, whichever is most, so that what is
//! written to the target never depends on what was there. What is to be kept is everything, or what a bitmap says.
//! Differs from QEMU 10.0: clusters that no copy has memory for are refused, and targets that are shorter than the source; there
//! either ends in an assertion, sooner or later.

use serde_json::Value;

use crate::bitmap::{Bitmap, Spans};
use crate::command::args::Args;
use crate::graph::NodeId;
use crate::perm::Driver;
use crate::refusal::Refusal;
use crate::world::World;

/// Clusters are at least this large, bytes.
pub const SMALLEST_CLUSTER: u64 = 65536;
/// And at most this large, which is the memory that copies have, bytes.
pub const LARGEST_CLUSTER: u64 = 128 << 20;

/// What happens to a guest's write when what it would destroy cannot be copied.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OnError {
    /// The write fails.
    BreakGuestWrite,
    /// The write goes on; what was kept is good for nothing any more.
    BreakSnapshot,
}

/// What a copy-before-write filter keeps.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Kept {
    /// Bytes per cluster.
    pub cluster: u64,
    /// Length of the source when the filter was opened, bytes.
    pub length: u64,
    /// The clusters that are to be kept, by number, as of the opening; none if unknown.
    pub initial: Option<Spans>,
    /// `on-cbw-error`.
    pub on_error: OnError,
    /// What was copied is discarded on the source (`discard-source` of a backup).
    pub discards_source: bool,
}

/// How a filter is asked to keep.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Manner {
    pub(crate) min_cluster: u64,
    pub(crate) on_error: OnError,
    pub(crate) discards_source: bool,
}

impl Manner {
    /// The members of `blockdev-add` behind `target`, in the order of the schema. `bitmap` is looked up later, by
    /// [`named_bitmap`].
    pub(crate) fn parse(args: &Args<'_>) -> Result<Manner, Refusal> {
        if let Some(bitmap) = args.opt_object("bitmap")? {
            bitmap.str("node")?;
            bitmap.str("name")?;
            bitmap.finish()?;
        }
        let word = args.opt_enum("on-cbw-error", &["break-guest-write", "break-snapshot"])?;
        args.opt_u32("cbw-timeout")?;
        Ok(Manner {
            min_cluster: args.opt_size("min-cluster-size")?.unwrap_or(0),
            on_error: match word {
                Some("break-snapshot") => OnError::BreakSnapshot,
                _ => OnError::BreakGuestWrite,
            },
            discards_source: false,
        })
    }
}

/// What is to be kept, for a source of this length and a target whose clusters have this size, if it has any.
pub(crate) fn keep(
    length: u64,
    target: Option<u64>,
    manner: Manner,
    bitmap: Option<&Bitmap>,
) -> Result<Kept, Refusal> {
    let asked = manner.min_cluster;
    if i64::try_from(asked).is_err() {
        return Err(too_large(asked, i64::MAX.unsigned_abs()));
    }
    if asked != 0 && !asked.is_power_of_two() {
        return Err(Refusal::new("min-cluster-size needs to be a power of 2"));
    }
    if asked > LARGEST_CLUSTER {
        return Err(too_large(asked, LARGEST_CLUSTER));
    }
    let cluster = SMALLEST_CLUSTER.max(asked).max(target.unwrap_or(0));
    Ok(Kept {
        cluster,
        length,
        initial: match bitmap {
            Some(bitmap) => clusters_of(bitmap, length, cluster)?,
            None => Some(all(length, cluster)),
        },
        on_error: manner.on_error,
        discards_source: manner.discards_source,
    })
}

/// A size that no bitmap of clusters can have.
pub(crate) fn too_large(asked: u64, most: u64) -> Refusal {
    Refusal::new(format!("min-cluster-size too large: {asked} > {most}"))
}

/// Every cluster of a node of this length.
#[must_use]
pub fn all(length: u64, cluster: u64) -> Spans {
    let mut all = Spans::default();
    all.insert(0..length.div_ceil(cluster));
    all
}

/// The clusters that a bitmap of a node has something in; none if it is not known what it has.
fn clusters_of(bitmap: &Bitmap, length: u64, cluster: u64) -> Result<Option<Spans>, Refusal> {
    let text = |refusal: Refusal| {
        refusal.prefixed(&format!(
            "Failed to merge bitmap '{}' to internal copy-bitmap: ",
            bitmap.name
        ))
    };
    crate::command::bitmap::check_shown(bitmap).map_err(text)?;
    if bitmap.length != length {
        return Err(text(Refusal::new(format!(
            "Bitmaps are of different sizes (destination size is {length}, source size is {}) and can't be merged",
            bitmap.length
        ))));
    }
    Ok(rounded_out(bitmap, cluster))
}

/// The clusters that some bit of the bitmap reaches into; none if it is not known what is set.
#[must_use]
pub fn rounded_out(bitmap: &Bitmap, cluster: u64) -> Option<Spans> {
    let mut clusters = Spans::default();
    for bits in bitmap.dirty.as_ref()?.iter() {
        let end = (bits.end * bitmap.granularity).min(bitmap.length);
        clusters.insert(bits.start * bitmap.granularity / cluster..end.div_ceil(cluster));
    }
    Some(clusters)
}

impl World {
    /// The size of a node's clusters, as the node tells; none if it has none.
    #[must_use]
    pub fn cluster_size(&self, id: NodeId) -> Option<u64> {
        let node = self.graph.node(id);
        match node.driver {
            Driver::Qcow2 => self.header(id).map(|header| header.cluster_size),
            driver if driver == Driver::Raw || driver.is_filter() => {
                self.cluster_size(self.graph.primary_child(id)?)
            }
            _ => None,
        }
    }

    /// A filter over `source` is opened with this target.
    pub(crate) fn open_kept(
        &mut self,
        id: NodeId,
        (source, target): (NodeId, NodeId),
        bitmap: Option<(&str, &str)>,
        manner: Manner,
    ) -> Result<(), Refusal> {
        let bitmap = match bitmap {
            Some((node, name)) => {
                let (node, at) = self.find_bitmap(node, name)?;
                Some(self.graph.node(node).bitmaps[at].clone())
            }
            None => None,
        };
        let text = |refusal: Refusal| refusal.prefixed("Cannot create block-copy-state: ");
        let length = self.graph.node(source).length;
        let kept = keep(length, self.cluster_size(target), manner, bitmap.as_ref()).map_err(text)?;
        if self.graph.node(target).length < length {
            return Err(text(Refusal::new("Source and target image have different sizes")));
        }
        let node = self.graph.node_mut(id);
        node.length = length;
        node.kept = Some(kept);
        Ok(())
    }
}

/// Reads the flat options of a node that were checked before: the node and the name of its bitmap.
#[must_use]
pub(crate) fn named_bitmap(options: &crate::options::NodeOptions) -> Option<(String, String)> {
    let text = |name| options.get(name).and_then(Value::as_str).map(str::to_owned);
    Some((text("bitmap.node")?, text("bitmap.name")?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::rc::Rc;

    const PLAIN: Manner = Manner {
        min_cluster: 0,
        on_error: OnError::BreakGuestWrite,
        discards_source: false,
    };

    fn asked(min_cluster: u64) -> Result<u64, String> {
        let manner = Manner { min_cluster, ..PLAIN };
        keep(1 << 20, Some(131_072), manner, None)
            .map(|kept| kept.cluster)
            .map_err(|refusal| refusal.desc)
    }

    #[test]
    fn clusters_are_as_large_as_the_largest_that_asks() {
        assert_eq!(keep(1, None, PLAIN, None).unwrap().cluster, 65536);
        assert_eq!(keep(1, Some(4096), PLAIN, None).unwrap().cluster, 65536);
        assert_eq!(
            (asked(0), asked(4096), asked(1 << 27)),
            (Ok(131_072), Ok(131_072), Ok(1 << 27))
        );
        assert_eq!(
            asked(3),
            Err("min-cluster-size needs to be a power of 2".to_owned())
        );
        let large = asked(u64::MAX).unwrap_err();
        assert_eq!(
            large,
            "min-cluster-size too large: 18446744073709551615 > 9223372036854775807"
        );
        assert_eq!(
            asked(1 << 28),
            Err("min-cluster-size too large: 268435456 > 134217728".to_owned())
        );
    }

    #[test]
    fn a_bitmap_says_which_clusters_are_kept() {
        let mut bitmap = Bitmap::new(Rc::from("b"), 4096, 3 * 65536 + 512);
        bitmap.mark(65535..65537);
        bitmap.mark(3 * 65536..3 * 65536 + 1);
        let kept = keep(bitmap.length, None, PLAIN, Some(&bitmap)).unwrap();
        assert_eq!(kept.initial.unwrap().iter().collect::<Vec<_>>(), [0..2, 3..4]);
        let other = keep(65536, None, PLAIN, Some(&bitmap)).unwrap_err();
        assert!(
            other
                .desc
                .starts_with("Failed to merge bitmap 'b' to internal copy-bitmap: Bitmaps are of"),
            "{other}"
        );
        bitmap.dirty = None;
        let kept = keep(bitmap.length, None, PLAIN, Some(&bitmap)).unwrap();
        assert_eq!(kept.initial, None, "nobody knows");
    }
}
