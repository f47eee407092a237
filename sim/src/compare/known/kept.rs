//! What the entries about copy-before-write filters and their snapshots look for.

use blkcheck_model::copy_before_write::LARGEST_CLUSTER;
use blkcheck_model::job::{Job, Sync};
use blkcheck_model::{Command, Driver, World};
use serde_json::{Map, Value};

use super::causes::happened;
use super::{Around, Case, Kind, What};

/// Clusters of a filter are asked to be larger than any copy can be.
pub(super) fn has_huge_clusters(options: &Map<String, Value>) -> bool {
    let own = options.get("min-cluster-size").and_then(Value::as_u64);
    let huge = own
        .is_some_and(|size| size > LARGEST_CLUSTER && size.is_power_of_two() && i64::try_from(size).is_ok());
    huge || options.values().any(|value| match value {
        Value::Object(inner) => has_huge_clusters(inner),
        Value::Array(items) => items.iter().filter_map(Value::as_object).any(has_huge_clusters),
        _ => false,
    })
}

pub(super) fn cbw_huge_clusters(case: &Case<'_>) -> bool {
    let accepted = case.what == Some(What::Result)
        && case.qemu == "accepted"
        && case.model.contains("min-cluster-size too large");
    let aborts = case.failed == Some(Kind::Assert) && case.qemu.contains("bdrv_create_dirty_bitmap");
    (accepted || aborts) && has_huge_clusters(case.arguments)
}

pub(super) fn cbw_shorter_target(case: &Case<'_>) -> bool {
    case.what == Some(What::Result) && case.qemu == "accepted" && case.model.contains(SHORTER)
}

/// Some node that is described is such a filter.
fn keeps(options: &Map<String, Value>) -> bool {
    let here = options
        .get("driver")
        .is_some_and(|driver| driver == "copy-before-write");
    here || options.values().filter_map(Value::as_object).any(keeps)
}

const SHORTER: &str = "Cannot create block-copy-state: Source and target image have different sizes";

/// A filter is to get a target that is shorter than its source.
pub(super) fn gets_shorter_target(around: &Around<'_>) -> bool {
    if !keeps(around.arguments) {
        return false;
    }
    let command = Value::Object(around.arguments.clone());
    let refused = around.world.check(&Command::new(around.execute, &command)).err();
    refused.is_some_and(|refusal| refusal.desc.contains(SHORTER))
}

/// Block status of a snapshot comes upon a target that holds nothing.
pub(super) fn snapshot_status_aborts(case: &Case<'_>) -> bool {
    case.failed == Some(Kind::Assert)
        && case
            .qemu
            .contains("cbw_co_snapshot_block_status: Assertion `ret & BDRV_BLOCK_ALLOCATED'")
        && shows_what_is_not_held(case.world)
}

/// Some snapshot shows clusters that count as copied and that its target may lack: those that a backup leaves out, or zeroes in an
/// image that has no mark for them.
fn shows_what_is_not_held(world: &World) -> bool {
    let graph = &world.graph;
    let snapshots = graph
        .nodes()
        .filter(|(_, node)| node.driver == Driver::SnapshotAccess);
    let mut filters = snapshots.filter_map(|(id, _)| {
        let mut below = std::iter::successors(graph.primary_child(id), |node| graph.filter_child(*node));
        below.find(|node| graph.node(*node).driver == Driver::CopyBeforeWrite)
    });
    filters.any(|filter| {
        let mut backups = world.jobs.iter().filter_map(Job::backup);
        let own = backups.find(|backup| backup.filter == Some(filter));
        let target = graph.children(filter).find(|(_, edge)| edge.name == "target");
        let header = target.and_then(|(_, edge)| world.header(graph.skip_filters(edge.child)));
        own.is_some_and(|backup| matches!(backup.sync, Sync::Top | Sync::Bitmap))
            || header.is_some_and(|header| header.version < 3)
    })
}

/// Zeroes where data were, in an image that a stream has filled from a snapshot, and the source of that has a backing file.
pub(super) fn snapshot_hides_chain(case: &Case<'_>) -> bool {
    let content = case.what == Some(What::Content) && !case.model.contains("zeroes") && case.qemu == "Zero";
    let stored = case.what == Some(What::Allocation) && case.qemu == "not allocated";
    (content || stored) && happened(case, streams_over_snapshot)
}

fn streams_over_snapshot(world: &World, execute: &str, arguments: &Map<String, Value>) -> bool {
    let graph = &world.graph;
    let device = arguments.get("device").and_then(Value::as_str);
    let Some(device) = device
        .and_then(|name| graph.find(name))
        .filter(|_| execute == "block-stream")
    else {
        return false;
    };
    graph.chain(device).any(|id| {
        let filter = graph
            .primary_child(id)
            .filter(|_| graph.node(id).driver == Driver::SnapshotAccess);
        let source = filter.and_then(|filter| graph.filter_child(filter));
        source.is_some_and(|source| graph.cow_child(graph.skip_filters(source)).is_some())
    })
}
