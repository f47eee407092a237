//! Which commands would meet a defect, judged before they are sent: for entries that end a daemon or hide what comes after.

use super::causes::{bottoms_out, has_bottom_outside, has_negative_null_co, names_any};
use super::{Around, bitmaps, graph, kept};

pub(super) fn null_co_size(around: &Around<'_>) -> bool {
    has_negative_null_co(around.arguments)
}

pub(super) fn cor_bottom_outside_chain(around: &Around<'_>) -> bool {
    has_bottom_outside(around.world, around.execute, around.arguments)
}

pub(super) fn filter_outlives_job(around: &Around<'_>) -> bool {
    !around.leftovers.is_empty()
        && (around.execute == "query-named-block-nodes" || names_any(around.arguments, around.leftovers))
}

pub(super) fn cor_bottom_crash(around: &Around<'_>) -> bool {
    around.execute == "blockdev-add" && bottoms_out(around.world, around.arguments)
}

pub(super) fn reopen_drains_for_ever(around: &Around<'_>) -> bool {
    graph::comes_upon_twice(around.world, around.execute, around.arguments)
}

pub(super) fn refused_reopen_loses_file(around: &Around<'_>) -> bool {
    around.execute == "blockdev-reopen" && graph::loses_file(around.world, around.arguments)
}

pub(super) fn merge_of_nothing(around: &Around<'_>) -> bool {
    bitmaps::merges_nothing(around.execute, around.arguments)
}

pub(super) fn enable_of_missing_bitmap(around: &Around<'_>) -> bool {
    bitmaps::enables_missing(around.world, around.execute, around.arguments)
}

pub(super) fn refused_enable_disables(around: &Around<'_>) -> bool {
    bitmaps::enables_unusable(around.world, around.execute, around.arguments)
}

pub(super) fn refused_reopen_stops_writes(around: &Around<'_>) -> bool {
    bitmaps::fails_to_freeze(around.world, around.execute, around.arguments)
}

pub(super) fn frozen_bitmap_loses_writes(around: &Around<'_>) -> bool {
    bitmaps::freezes_in_use(around.world, around.execute, around.arguments)
}

pub(super) fn shown_bitmap_aborts(around: &Around<'_>) -> bool {
    bitmaps::takes_what_is_shown(around.world, around.execute, around.arguments)
}

pub(super) fn reopen_of_nothing(around: &Around<'_>) -> bool {
    graph::reopens_nothing(around.execute, around.arguments)
}

pub(super) fn reopen_frees_listed_node(around: &Around<'_>) -> bool {
    around.execute == "blockdev-reopen" && graph::lets_go_of_listed(around.world, around.arguments)
}

pub(super) fn cbw_huge_clusters(around: &Around<'_>) -> bool {
    kept::has_huge_clusters(around.arguments)
}

pub(super) fn cbw_shorter_target(around: &Around<'_>) -> bool {
    around.execute == "blockdev-add" && kept::gets_shorter_target(around)
}
