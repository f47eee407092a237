//! Which cases are which defect's: a function for each entry of the list that is not about filters that keep, or backups.
//!
//! Rules: a function is as narrow as the defect. It asks for what differs, for what either says, and for the cause in the scenario.
//! Not here: `refused-reopen-stops-writes` (in `bitmaps`), `cbw-…` (in `kept`), and backups (in `backup`).

use blkcheck_model::Driver;

use super::causes::{
    bottoms_out, commands, happened, has_bottom, has_bottom_on_top, has_bottom_outside, has_negative_null_co,
    has_raw, has_raw_on_overlay, has_shorter_overlay, has_step, is_refused, is_uneven, names_any, past,
    reopens_twice, streams, takes_back_a_snapshot,
};
use super::{Case, Kind, Strayed, What, bitmaps, graph};
use crate::scenario::{Format, Image, Scenario};

/// An entry for which somebody else looks, where it happens.
pub(super) fn seen_where_it_happens(_: &Case<'_>) -> bool {
    false
}

pub(super) fn null_co_size(case: &Case<'_>) -> bool {
    case.failed.is_some() && has_negative_null_co(case.arguments)
}

pub(super) fn cor_bottom_outside_chain(case: &Case<'_>) -> bool {
    matches!(case.failed, Some(Kind::Hang | Kind::Crash | Kind::Assert))
        && has_bottom_outside(case.world, case.execute, case.arguments)
}

pub(super) fn filter_outlives_job(case: &Case<'_>) -> bool {
    let queried = case.execute == "query-named-block-nodes" && case.failed.is_some();
    !case.leftovers.is_empty() && (queried || names_any(case.arguments, case.leftovers))
}

pub(super) fn refused_stream_keeps_root(case: &Case<'_>) -> bool {
    let at_once = case.execute == "block-stream"
        && matches!(case.what, Some(What::Edges | What::Refusal))
        && case.model == "nothing more"
        && case.qemu.contains("backend -root->");
    // Other commands went on in between, and it is seen when everything should be gone.
    let at_the_end = case.what == Some(What::Nodes)
        && case.model == "nothing is left"
        && case.qemu.contains("(\"backend\", \"root\"")
        && has_step(case, "block-stream");
    at_once || at_the_end
}

pub(super) fn backing_format_of_overlay(case: &Case<'_>) -> bool {
    case.execute == "change-backing-file" && case.what == Some(What::Backing)
}

pub(super) fn cor_bottom_crash(case: &Case<'_>) -> bool {
    case.failed == Some(Kind::Crash)
        && case.qemu.contains("SIGSEGV")
        && (bottoms_out(case.world, case.arguments) || has_bottom_on_top(case.world))
}

pub(super) fn cor_over_window_aborts(case: &Case<'_>) -> bool {
    let graph = &case.world.graph;
    case.failed == Some(Kind::Assert)
        && case
            .qemu
            .contains("bdrv_co_do_copy_on_readv: Assertion `skip_bytes < pnum'")
        && graph
            .nodes()
            .any(|(_, node)| node.driver == Driver::Raw && node.windowed)
}

pub(super) fn inline_backing_over_header(case: &Case<'_>) -> bool {
    case.execute == "blockdev-add"
        && case.what == Some(What::Result)
        && case.qemu.contains("cannot be used with a file name")
}

pub(super) fn detached_backing_masks(case: &Case<'_>) -> bool {
    case.what == Some(What::Masks)
        && is_refused(case.world, case.execute, case.arguments)
        && streams(case.scenario, case.step)
        && case.model.contains("perm 'consistent read'")
        && case.qemu.contains("perm ''")
}

pub(super) fn refused_stream_pins_read_only(case: &Case<'_>) -> bool {
    let later = case.what == Some(What::Result)
        && case.model == "accepted"
        && case.qemu.ends_with("Block node is read-only")
        && happened(case, graph::reopens_in_vain);
    // A child that had been reopened by itself follows the device again.
    let at_once = matches!(case.what, Some(What::ReadOnly | What::Masks))
        && graph::reopens_in_vain(case.world, case.execute, case.arguments);
    later || at_once || bitmaps::after_a_refused_stream(case)
}

pub(super) fn stream_uncovers_base(case: &Case<'_>) -> bool {
    // Old data where zeroes were: neither garbage nor anything lost.
    let content =
        case.what == Some(What::Content) && case.model.contains("zeroes") && case.qemu.starts_with("Stamp(");
    let copied = case.what == Some(What::Allocation) && case.qemu == "not allocated";
    (content || copied) && is_uneven(case.scenario) && streams(case.scenario, case.step)
}

pub(super) fn stream_over_raw_loses_data(case: &Case<'_>) -> bool {
    let content = case.what == Some(What::Content) && !case.model.contains("zeroes") && case.qemu == "Zero";
    let stored = case.what == Some(What::Allocation) && case.qemu == "not allocated";
    // What the stream went over may have gone with it.
    let moved = has_step(case, "blockdev-snapshot");
    let dropped = || stored && commands(case).any(|(_, arguments)| has_raw(arguments, moved));
    (content || stored) && streams(case.scenario, case.step) && (has_raw_on_overlay(case.world) || dropped())
}

/// Graph, header or content of a stream's device, of what it stands on or of who reads it, after the stream succeeded although its last
/// layer had got another backing node.
pub(super) fn stream_undoes_reopen(case: &Case<'_>) -> bool {
    let told = |strayed: &Strayed| {
        let mut texts = [case.model, case.qemu].into_iter().chain(case.asked());
        texts.any(|text| strayed.is_told(case.world, text))
    };
    matches!(
        case.what,
        Some(What::Edges | What::Nodes | What::Backing | What::Content)
    ) && case.strayed.iter().any(told)
}

/// Raw images that end within a sector.
pub(in crate::compare) fn odd_raw_files(scenario: &Scenario) -> impl Iterator<Item = &str> {
    let odd = |i: &&Image| i.format == Format::Raw && !i.size.is_multiple_of(512);
    scenario.images.iter().filter(odd).map(|i| &*i.file)
}

/// A guest's read, or the daemon's own: it looks at the header of what it opens, whatever length that has.
pub(super) fn nbd_short_tail_hangs(case: &Case<'_>) -> bool {
    case.failed == Some(Kind::Hang)
        && case.qemu.contains(" is not answered")
        && odd_raw_files(case.scenario).next().is_some()
}

pub(super) fn snapshot_over_shorter_overlay(case: &Case<'_>) -> bool {
    let aborts = case.failed == Some(Kind::Assert)
        && (case.qemu.contains("nbd_co_send_sparse_read")
            || case.qemu.contains("bdrv_co_write_req_prepare")
            || case.qemu.contains("blk_check_byte_request"));
    let spins = case.failed == Some(Kind::Hang) && graph::asks_past_the_end(case);
    (aborts || spins) && has_shorter_overlay(case)
}

pub(super) fn reopen_shortens_export(case: &Case<'_>) -> bool {
    let aborts = case.failed == Some(Kind::Assert) && case.qemu.contains("nbd_co_send_sparse_read");
    let spins = case.failed == Some(Kind::Hang) && graph::asks_past_the_end(case);
    (aborts || spins) && graph::reopens_a_window(case)
}

pub(super) fn filter_keeps_length(case: &Case<'_>) -> bool {
    let changed = has_step(case, "block_resize") || has_step(case, "blockdev-snapshot");
    let length = case.what == Some(What::Content)
        && case.model.starts_with("node '")
        && case.model.ends_with(" bytes")
        && case.qemu.parse::<u64>().is_ok();
    // A guest asks for what was added.
    let short = case.what == Some(What::Content)
        && case.model == "success"
        && case.qemu.ends_with("fails with errno 22")
        && has_step(case, "block_resize");
    let abort = case.failed == Some(Kind::Assert) && case.qemu.contains("mirror_dirty_init");
    changed && (length || short || abort)
}

pub(super) fn cor_bottom_garbage(case: &Case<'_>) -> bool {
    case.what == Some(What::Content)
        && case.qemu == "Torn"
        && is_uneven(case.scenario)
        && commands(case).any(|(_, arguments)| has_bottom(arguments))
}

pub(super) fn refused_set_active_drops_permissions(case: &Case<'_>) -> bool {
    case.execute == "blockdev-set-active" && case.what == Some(What::Refusal) && case.qemu.contains("perm ''")
}

pub(super) fn commit_uncovers_base(case: &Case<'_>) -> bool {
    matches!(case.what, Some(What::Content | What::Backing))
        && case.model.ends_with(": zeroes")
        && case.qemu.starts_with("Stamp(")
        && is_uneven(case.scenario)
        && has_step(case, "block-commit")
}

pub(super) fn resize_shows_old_tail(case: &Case<'_>) -> bool {
    matches!(case.what, Some(What::Content | What::Backing))
        && case.model.ends_with(": zeroes")
        && case.qemu.starts_with("Stamp(")
        && commands(case)
            .filter(|(execute, _)| *execute == "block_resize")
            .count()
            > 1
}

pub(super) fn reopen_drains_for_ever(case: &Case<'_>) -> bool {
    graph::after_a_double_visit(case) || (graph::stands_still(case) && reopens_twice(case))
}

pub(super) fn refused_reopen_loses_file(case: &Case<'_>) -> bool {
    case.failed.is_some() && graph::after_a_lost_file(case)
}

pub(super) fn merge_of_nothing(case: &Case<'_>) -> bool {
    case.failed == Some(Kind::Crash) && bitmaps::merges_nothing(case.execute, case.arguments)
}

pub(super) fn enable_of_missing_bitmap(case: &Case<'_>) -> bool {
    case.failed == Some(Kind::Crash) && bitmaps::enables_missing(case.world, case.execute, case.arguments)
}

pub(super) fn refused_enable_disables(case: &Case<'_>) -> bool {
    case.what == Some(What::Bitmaps)
        && case.qemu.contains("recording: false")
        && bitmaps::enables_unusable(case.world, case.execute, case.arguments)
}

pub(super) fn shown_bitmap_aborts(case: &Case<'_>) -> bool {
    case.failed == Some(Kind::Assert)
        && bitmaps::takes_what_is_shown(case.world, case.execute, case.arguments)
}

pub(super) fn reopen_of_nothing(case: &Case<'_>) -> bool {
    case.failed.is_some() && graph::reopens_nothing(case.execute, case.arguments)
}

pub(super) fn reopen_frees_listed_node(case: &Case<'_>) -> bool {
    case.failed.is_some()
        && case.execute == "blockdev-reopen"
        && graph::lets_go_of_listed(case.world, case.arguments)
}

pub(super) fn aborted_snapshot_moves_tables(case: &Case<'_>) -> bool {
    let told = |overlay: &str| case.model.contains(&format!("node '{overlay}': zeroes"));
    case.what == Some(What::Content)
        && case.qemu == "Torn"
        && past(case).any(|given| takes_back_a_snapshot(given, told))
}

pub(super) fn aborted_snapshot_takes_parents(case: &Case<'_>) -> bool {
    let seen = matches!(
        case.what,
        Some(What::Nodes | What::Edges | What::Masks | What::ReadOnly | What::Refusal)
    );
    (seen || case.failed.is_some())
        && graph::aborts_a_used_overlay(case.world, case.execute, case.arguments, |_, _| true)
}
