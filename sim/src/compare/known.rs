//! Defects of `qemu-storage-daemon` 10.0 that were reviewed and are held to be its own.
//!
//! Rules: an entry has a scenario under `docs/findings/` that reproduces it, a page beside it that explains it, and a
//! matcher as narrow as the defect. What an entry explains is reported as known, never as agreement. Random and
//! exhaustive campaigns steer around what ends a daemon, so that it does not hide the rest; a scenario file is always
//! carried out as it stands.

mod bitmaps;
mod graph;

pub(super) use graph::visits_twice;

use blkcheck_model::{Driver, World};
use serde_json::{Map, Value};

use super::{Kind, What};
use crate::scenario::{Action, Format, Scenario};

/// How sure we are that the daemon is wrong and not the model.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Sure {
    /// No reading of the interface allows it: it dies, never answers, or loses data.
    Certain,
    /// It contradicts the rest of the interface or its documentation.
    Likely,
}

impl Sure {
    /// In reports.
    #[must_use]
    pub fn as_str(self) -> &'static str {
        match self {
            Sure::Certain => "certain",
            Sure::Likely => "likely",
        }
    }
}

/// A difference or failure, and where it occurred.
#[derive(Debug)]
pub(super) struct Case<'a> {
    pub(super) scenario: &'a Scenario,
    pub(super) step: usize,
    /// The command of this step; empty for another step.
    pub(super) execute: &'a str,
    pub(super) arguments: &'a Map<String, Value>,
    /// The model, before a command that was answered differently, else after the step.
    pub(super) world: &'a World,
    /// Filters of finished streams that the daemon still has.
    pub(super) leftovers: &'a [String],
    pub(super) what: Option<What>,
    pub(super) failed: Option<Kind>,
    pub(super) model: &'a str,
    pub(super) qemu: &'a str,
}

/// A reviewed defect.
#[derive(Debug)]
pub struct Defect {
    /// Short name; also of the files under `docs/findings/`.
    pub id: &'static str,
    /// One line.
    pub title: &'static str,
    /// What the daemon does.
    pub qemu: &'static str,
    /// What we hold right, and why.
    pub right: &'static str,
    /// How sure we are.
    pub sure: Sure,
    /// The scenario that shows it.
    pub scenario: &'static str,
    /// The page that explains it.
    pub page: &'static str,
    pub(super) matches: fn(&Case<'_>) -> bool,
    /// The command would run into it.
    pub(super) steer: Option<fn(&Around<'_>) -> bool>,
}

/// A command about to be sent.
pub(super) struct Around<'a> {
    world: &'a World,
    leftovers: &'a [String],
    execute: &'a str,
    arguments: &'a Map<String, Value>,
}

macro_rules! files {
    ($id:literal) => {
        (
            include_str!(concat!("../../../docs/findings/", $id, ".json")),
            include_str!(concat!("../../../docs/findings/", $id, ".md")),
        )
    };
}

/// The list.
pub static DEFECTS: &[Defect] = &[
    Defect {
        id: "null-co-size",
        title: "blockdev-add of null-co with a negative size aborts the daemon",
        qemu: "the generated QAPI type accepts the number, the option parser does not, and its error is fatal",
        right: "a refusal: no argument of a command may end the process that serves other guests",
        sure: Sure::Certain,
        scenario: files!("null-co-size").0,
        page: files!("null-co-size").1,
        matches: |case| case.failed.is_some() && has_negative_null_co(case.arguments),
        steer: Some(|around| has_negative_null_co(around.arguments)),
    },
    Defect {
        id: "cor-bottom-outside-chain",
        title: "blockdev-add of copy-on-read with a bottom outside its chain never returns",
        qemu: "freezing walks down the chain until it meets bottom, past its end, and round again",
        right: "a refusal that names bottom: a command must answer",
        sure: Sure::Certain,
        scenario: files!("cor-bottom-outside-chain").0,
        page: files!("cor-bottom-outside-chain").1,
        matches: |case| {
            matches!(case.failed, Some(Kind::Hang | Kind::Crash | Kind::Assert))
                && has_bottom_outside(case.world, case.execute, case.arguments)
        },
        steer: Some(|around| has_bottom_outside(around.world, around.execute, around.arguments)),
    },
    Defect {
        id: "filter-outlives-job",
        title: "the filter of a finished stream stays without a child until the job is dismissed; queries crash on it",
        qemu: "the job keeps its edge on the filter when it concludes; query-named-block-nodes then dereferences the \
               child that is gone, and the filter's name stays taken",
        right: "the filter goes when the job concludes: no query may crash, and nothing uses the filter any more",
        sure: Sure::Certain,
        scenario: files!("filter-outlives-job").0,
        page: files!("filter-outlives-job").1,
        matches: |case| {
            let queried = case.execute == "query-named-block-nodes" && case.failed.is_some();
            !case.leftovers.is_empty() && (queried || names_any(case.arguments, case.leftovers))
        },
        steer: Some(|around| {
            !around.leftovers.is_empty()
                && (around.execute == "query-named-block-nodes"
                    || names_any(around.arguments, around.leftovers))
        }),
    },
    Defect {
        id: "refused-stream-keeps-root",
        title: "a block-stream refused at an intermediate node leaves a root edge on its device for ever",
        qemu: "the error path drops the job but not the backend that was made for it: the node stays in use",
        right: "the refusal takes everything back: a refused command changes nothing",
        sure: Sure::Certain,
        scenario: files!("refused-stream-keeps-root").0,
        page: files!("refused-stream-keeps-root").1,
        matches: |case| {
            case.execute == "block-stream"
                && matches!(case.what, Some(What::Edges | What::Refusal))
                && case.model == "nothing more"
                && case.qemu.contains("backend -root->")
                // Other commands went on in between, and it is seen when everything should be gone.
                || case.what == Some(What::Nodes)
                    && case.model == "nothing is left"
                    && case.qemu.contains("(\"backend\", \"root\"")
                    && has_step(case, "block-stream")
        },
        steer: None,
    },
    Defect {
        id: "backing-format-of-overlay",
        title: "change-backing-file records the overlay's format as that of its backing file",
        qemu: "it passes the driver of the node whose header it writes instead of that of the backing node",
        right: "the backing node's format: a raw backing file recorded as qcow2 cannot be opened, and a guest of a raw \
                one recorded the other way round chooses what is opened",
        sure: Sure::Certain,
        scenario: files!("backing-format-of-overlay").0,
        page: files!("backing-format-of-overlay").1,
        matches: |case| case.execute == "change-backing-file" && case.what == Some(What::Backing),
        steer: None,
    },
    Defect {
        id: "cor-bottom-crash",
        title: "reading through a copy-on-read filter whose bottom is the filtered node and has no backing file crashes",
        qemu: "the search for data starts at the layer below the filtered node without asking whether there is one",
        right: "nothing lies between the filter and bottom, so that there is nothing to copy: the read passes through",
        sure: Sure::Certain,
        scenario: files!("cor-bottom-crash").0,
        page: files!("cor-bottom-crash").1,
        matches: |case| {
            case.failed == Some(Kind::Crash)
                && case.qemu.contains("SIGSEGV")
                && (bottoms_out(case.world, case.arguments) || has_bottom_on_top(case.world))
        },
        steer: Some(|around| around.execute == "blockdev-add" && bottoms_out(around.world, around.arguments)),
    },
    Defect {
        id: "cor-over-window-aborts",
        title: "a read through copy-on-read over a raw node whose offset is no multiple of the image's clusters aborts the \
                daemon",
        qemu: "the request is rounded to clusters that begin elsewhere in this node, and what is told about the first of them \
               ends before the request begins",
        right: "the data: no read of a guest may end the process that serves the others",
        sure: Sure::Certain,
        scenario: files!("cor-over-window-aborts").0,
        page: files!("cor-over-window-aborts").1,
        matches: |case| {
            let graph = &case.world.graph;
            case.failed == Some(Kind::Assert)
                && case
                    .qemu
                    .contains("bdrv_co_do_copy_on_readv: Assertion `skip_bytes < pnum'")
                && graph
                    .nodes()
                    .any(|(_, node)| node.driver == Driver::Raw && node.windowed)
        },
        steer: None,
    },
    Defect {
        id: "cor-copies-below-bottom",
        title: "a copy-on-read filter whose bottom is the filtered node copies what lies below bottom",
        qemu: "the search for data starts one layer below the filtered node, past bottom, and then finds no end",
        right: "no copy: bottom is the last layer whose content may be copied; a stream's base must not end up in its \
                device",
        sure: Sure::Certain,
        scenario: files!("cor-copies-below-bottom").0,
        page: files!("cor-copies-below-bottom").1,
        // Seen where it happens.
        matches: |_| false,
        steer: None,
    },
    Defect {
        id: "inline-backing-over-header",
        title: "a backing file described inline is refused when the header names one and the description has no file name",
        qemu: "only `file.filename` in the description keeps the header's name from being passed along as well",
        right: "what the command says replaces what the header says, as it does for a node that is named",
        sure: Sure::Likely,
        scenario: files!("inline-backing-over-header").0,
        page: files!("inline-backing-over-header").1,
        matches: |case| {
            case.execute == "blockdev-add"
                && case.what == Some(What::Result)
                && case.qemu.contains("cannot be used with a file name")
        },
        steer: None,
    },
    Defect {
        id: "detached-backing-masks",
        title: "masks below a detached backing node stay as they were, until a command that is refused mends them",
        qemu: "taking a backing link away does not refresh the node let go of; the roll-back of a later command does",
        right: "masks follow the graph at once; a refused command changes nothing",
        sure: Sure::Likely,
        scenario: files!("detached-backing-masks").0,
        page: files!("detached-backing-masks").1,
        matches: |case| {
            let command = Value::Object(case.arguments.clone());
            let refused = case
                .world
                .check(&blkcheck_model::Command::new(case.execute, &command))
                .is_err();
            case.what == Some(What::Masks)
                && refused
                && streams(case.scenario, case.step)
                && case.model.contains("perm 'consistent read'")
                && case.qemu.contains("perm ''")
        },
        steer: None,
    },
    Defect {
        id: "refused-stream-pins-read-only",
        title: "a refused block-stream leaves its read-only device with an option of its own, which no longer follows",
        qemu: "the device is made writable and read-only again; the latter stays behind as an explicit option, so that \
               the node above can no longer make it writable",
        right: "a refused command changes nothing",
        sure: Sure::Likely,
        scenario: files!("refused-stream-pins-read-only").0,
        page: files!("refused-stream-pins-read-only").1,
        matches: |case| {
            let later = case.what == Some(What::Result)
                && case.model == "accepted"
                && case.qemu.ends_with("Block node is read-only")
                && case.step > 0
                && streams(case.scenario, case.step - 1);
            // A child that had been reopened by itself follows the device again.
            let at_once = matches!(case.what, Some(What::ReadOnly | What::Masks))
                && matches!(case.execute, "block-stream" | "change-backing-file")
                && graph::is_refused(case);
            later || at_once || bitmaps::after_a_refused_stream(case)
        },
        steer: None,
    },
    Defect {
        id: "stream-uncovers-base",
        title: "a stream over a layer that is shorter than the base uncovers what the layer's end had hidden",
        qemu: "the end of the short layer counts as unallocated and is not copied; without the layer the base shows",
        right: "zeroes: a stream must not change what the guest reads",
        sure: Sure::Certain,
        scenario: files!("stream-uncovers-base").0,
        page: files!("stream-uncovers-base").1,
        matches: |case| {
            // Old data where zeroes were: neither garbage nor anything lost.
            let content = case.what == Some(What::Content)
                && case.model.contains("zeroes")
                && case.qemu.starts_with("Stamp(");
            let copied = case.what == Some(What::Allocation) && case.qemu == "not allocated";
            (content || copied) && is_uneven(case.scenario) && streams(case.scenario, case.step)
        },
        steer: None,
    },
    Defect {
        id: "stream-over-raw-loses-data",
        title: "a stream over a raw node on an overlay loses what lies below the overlay",
        qemu: "a raw node says of what its overlay leaves to its backing file that nobody holds it: it is not copied, and the \
               stream succeeds",
        right: "all the data: a stream must not change what the guest reads",
        sure: Sure::Certain,
        scenario: files!("stream-over-raw-loses-data").0,
        page: files!("stream-over-raw-loses-data").1,
        matches: |case| {
            let content =
                case.what == Some(What::Content) && !case.model.contains("zeroes") && case.qemu == "Zero";
            let stored = case.what == Some(What::Allocation) && case.qemu == "not allocated";
            // What the stream went over may have gone with it.
            let moved = has_step(case, "blockdev-snapshot");
            let dropped = || stored && commands(case).any(|(_, arguments)| has_raw(arguments, moved));
            (content || stored)
                && streams(case.scenario, case.step)
                && (has_raw_on_overlay(case.world) || dropped())
        },
        steer: None,
    },
    Defect {
        id: "nbd-short-tail-hangs",
        title: "a read of the end of an NBD export that is no whole number of sectors long is never answered",
        qemu: "the request to the server is cut to the server's length, yet the answer is awaited in full when it is a \
               simple reply: the padding never comes",
        right: "the bytes that are there, and zeroes behind them, as with a server of structured replies",
        sure: Sure::Certain,
        scenario: files!("nbd-short-tail-hangs").0,
        page: files!("nbd-short-tail-hangs").1,
        matches: |case| {
            case.failed == Some(Kind::Hang)
                && case.qemu.contains("request is not answered")
                && case
                    .scenario
                    .images
                    .iter()
                    .any(|i| i.format == Format::Raw && !i.size.is_multiple_of(512))
        },
        steer: None,
    },
    Defect {
        id: "snapshot-over-shorter-overlay",
        title: "after a snapshot to a shorter overlay a guest can abort the daemon",
        qemu: "lengths are not compared; the export keeps its length, and a request past the node's end meets an assertion",
        right: "the snapshot is refused while somebody relies on the length, and a request past the end fails",
        sure: Sure::Certain,
        scenario: files!("snapshot-over-shorter-overlay").0,
        page: files!("snapshot-over-shorter-overlay").1,
        matches: |case| {
            let aborts = case.failed == Some(Kind::Assert)
                && (case.qemu.contains("nbd_co_send_sparse_read")
                    || case.qemu.contains("bdrv_co_write_req_prepare")
                    || case.qemu.contains("blk_check_byte_request"));
            let spins = case.failed == Some(Kind::Hang) && graph::asks_past_the_end(case);
            (aborts || spins) && has_shorter_overlay(case)
        },
        steer: None,
    },
    Defect {
        id: "reopen-shortens-export",
        title: "after a reopen that shortens a raw node a guest can abort the daemon",
        qemu: "nobody above is asked; the export keeps its length, and a request past the node's end meets an assertion",
        right: "the reopen is refused while somebody relies on the length, and a request past the end fails",
        sure: Sure::Certain,
        scenario: files!("reopen-shortens-export").0,
        page: files!("reopen-shortens-export").1,
        matches: |case| {
            let aborts = case.failed == Some(Kind::Assert) && case.qemu.contains("nbd_co_send_sparse_read");
            let spins = case.failed == Some(Kind::Hang) && graph::asks_past_the_end(case);
            (aborts || spins) && graph::reopens_a_window(case)
        },
        steer: None,
    },
    Defect {
        id: "filter-keeps-length",
        title: "a filter keeps its old length when the node below is resized or replaced by an overlay",
        qemu: "nothing tells the parents; an active commit of such a filter meets an assertion",
        right: "a filter is as long as what it filters, at once",
        sure: Sure::Likely,
        scenario: files!("filter-keeps-length").0,
        page: files!("filter-keeps-length").1,
        matches: |case| {
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
        },
        steer: None,
    },
    Defect {
        id: "cor-bottom-garbage",
        title: "a read through copy-on-read with bottom, past the end of a layer below, returns memory nobody wrote",
        qemu: "the search for data ends at the short layer's end, and the read ends with it, as a success",
        right: "zeroes: a read that succeeds has filled its buffer",
        sure: Sure::Certain,
        scenario: files!("cor-bottom-garbage").0,
        page: files!("cor-bottom-garbage").1,
        matches: |case| {
            case.what == Some(What::Content)
                && case.qemu == "Torn"
                && is_uneven(case.scenario)
                && commands(case).any(|(_, arguments)| has_bottom(arguments))
        },
        steer: None,
    },
    Defect {
        id: "refused-set-active-drops-permissions",
        title: "a refused blockdev-set-active takes the permissions of an export away",
        qemu: "an export that can be made inactive is, before another one refuses; it is not made active again",
        right: "a refused command changes nothing",
        sure: Sure::Certain,
        scenario: files!("refused-set-active-drops-permissions").0,
        page: files!("refused-set-active-drops-permissions").1,
        matches: |case| {
            case.execute == "blockdev-set-active"
                && case.what == Some(What::Refusal)
                && case.qemu.contains("perm ''")
        },
        steer: None,
    },
    Defect {
        id: "commit-uncovers-base",
        title: "a commit of a layer that is shorter than its base uncovers what the layer's end had hidden",
        qemu: "the layer's bytes are copied and the layer goes; past its end the base shows",
        right: "zeroes: a commit must not change what the guest reads",
        sure: Sure::Certain,
        scenario: files!("commit-uncovers-base").0,
        page: files!("commit-uncovers-base").1,
        matches: |case| {
            matches!(case.what, Some(What::Content | What::Backing))
                && case.model.ends_with(": zeroes")
                && case.qemu.starts_with("Stamp(")
                && is_uneven(case.scenario)
                && has_step(case, "block-commit")
        },
        steer: None,
    },
    Defect {
        id: "resize-shows-old-tail",
        title: "an image made smaller and longer again shows the data that was cut off",
        qemu: "the tail of the last cluster is cleared neither when the image shrinks nor when it grows",
        right: "zeroes: growing an image adds zeroes",
        sure: Sure::Certain,
        scenario: files!("resize-shows-old-tail").0,
        page: files!("resize-shows-old-tail").1,
        matches: |case| {
            matches!(case.what, Some(What::Content | What::Backing))
                && case.model.ends_with(": zeroes")
                && case.qemu.starts_with("Stamp(")
                && commands(case)
                    .filter(|(execute, _)| *execute == "block_resize")
                    .count()
                    > 1
        },
        steer: None,
    },
    Defect {
        id: "reopen-drains-for-ever",
        title: "blockdev-reopen that comes upon a node twice leaves it drained for ever: guests' requests hang",
        qemu: "the node is drained at every visit, as listed and as the child of a listed node, but undrained once",
        right: "whatever the command drains it undrains, whether it is accepted or refused",
        sure: Sure::Certain,
        scenario: files!("reopen-drains-for-ever").0,
        page: files!("reopen-drains-for-ever").1,
        matches: |case| {
            graph::after_a_double_visit(case) || (graph::stands_still(case) && reopens_twice(case))
        },
        steer: Some(|around| graph::comes_upon_twice(around.world, around.execute, around.arguments)),
    },
    Defect {
        id: "refused-reopen-loses-file",
        title: "a blockdev-reopen of qcow2 that is refused after its file was changed uses memory that was freed",
        qemu: "the driver takes the new link for its data file before the change is taken back and the link is freed",
        right: "a refused command changes nothing",
        sure: Sure::Certain,
        scenario: files!("refused-reopen-loses-file").0,
        page: files!("refused-reopen-loses-file").1,
        matches: |case| case.failed.is_some() && graph::after_a_lost_file(case),
        steer: Some(|around| {
            around.execute == "blockdev-reopen" && graph::loses_file(around.world, around.arguments)
        }),
    },
    Defect {
        id: "merge-of-nothing",
        title: "block-dirty-bitmap-merge of an empty list crashes the daemon",
        qemu: "the copy that the merges are made in is made by the first of them; without any it is not there",
        right: "nothing to do is done: no argument of a command may end the process that serves other guests",
        sure: Sure::Certain,
        scenario: files!("merge-of-nothing").0,
        page: files!("merge-of-nothing").1,
        matches: |case| {
            case.failed == Some(Kind::Crash) && bitmaps::merges_nothing(case.execute, case.arguments)
        },
        steer: Some(|around| bitmaps::merges_nothing(around.execute, around.arguments)),
    },
    Defect {
        id: "enable-of-missing-bitmap",
        title: "a transaction that enables a bitmap which does not exist crashes the daemon",
        qemu: "the roll-back of the action puts the state of the bitmap back without asking whether one was found",
        right: "the refusal that the command alone gets: `Dirty bitmap '…' not found`",
        sure: Sure::Certain,
        scenario: files!("enable-of-missing-bitmap").0,
        page: files!("enable-of-missing-bitmap").1,
        matches: |case| {
            case.failed == Some(Kind::Crash)
                && bitmaps::enables_missing(case.world, case.execute, case.arguments)
        },
        steer: Some(|around| bitmaps::enables_missing(around.world, around.execute, around.arguments)),
    },
    Defect {
        id: "refused-enable-disables",
        title: "a transaction that is refused because it enables a bitmap in use disables that bitmap",
        qemu: "the action is refused before it notes whether the bitmap was enabled, and its roll-back takes that for no",
        right: "a refused command changes nothing: else writes from then on are missing in the next incremental backup",
        sure: Sure::Certain,
        scenario: files!("refused-enable-disables").0,
        page: files!("refused-enable-disables").1,
        matches: |case| {
            case.what == Some(What::Bitmaps)
                && case.qemu.contains("recording: false")
                && bitmaps::enables_unusable(case.world, case.execute, case.arguments)
        },
        steer: Some(|around| bitmaps::enables_unusable(around.world, around.execute, around.arguments)),
    },
    Defect {
        id: "refused-reopen-stops-writes",
        title: "a refused read-only blockdev-reopen of an image with persistent bitmaps makes every later guest write fail",
        qemu: "bitmaps are stored and become read-only while the reopen is prepared, and stay so when it is refused; a write to \
               a node with a read-only bitmap is refused",
        right: "a refused command changes nothing: guests go on writing, and bitmaps recording",
        sure: Sure::Certain,
        scenario: files!("refused-reopen-stops-writes").0,
        page: files!("refused-reopen-stops-writes").1,
        matches: bitmaps::after_a_failed_freeze,
        steer: Some(|around| bitmaps::fails_to_freeze(around.world, around.execute, around.arguments)),
    },
    Defect {
        id: "shown-bitmap-aborts",
        title: "deleting or resizing a node aborts the daemon while an export of another node shows one of its bitmaps",
        qemu: "the export marks the bitmap as in use but holds neither its node nor the node's length; both end in an assertion",
        right: "the node is in use, so that deleting it is refused; resizing it resizes the bitmap",
        sure: Sure::Certain,
        scenario: files!("shown-bitmap-aborts").0,
        page: files!("shown-bitmap-aborts").1,
        matches: |case| {
            case.failed == Some(Kind::Assert)
                && bitmaps::takes_what_is_shown(case.world, case.execute, case.arguments)
        },
        steer: Some(|around| bitmaps::takes_what_is_shown(around.world, around.execute, around.arguments)),
    },
    Defect {
        id: "reopen-of-nothing",
        title: "blockdev-reopen of an empty list aborts the daemon",
        qemu: "an assertion holds that there is something to reopen, although the schema allows an empty list",
        right: "nothing to do is done: no argument of a command may end the process that serves other guests",
        sure: Sure::Certain,
        scenario: files!("reopen-of-nothing").0,
        page: files!("reopen-of-nothing").1,
        matches: |case| case.failed.is_some() && graph::reopens_nothing(case.execute, case.arguments),
        steer: Some(|around| graph::reopens_nothing(around.execute, around.arguments)),
    },
    Defect {
        id: "reopen-frees-listed-node",
        title: "blockdev-reopen crashes when one node that it lists lets go of another",
        qemu: "the node goes with its last link, and is then asked for the last step of its own reopen",
        right: "the command succeeds, and the node is gone",
        sure: Sure::Certain,
        scenario: files!("reopen-frees-listed-node").0,
        page: files!("reopen-frees-listed-node").1,
        matches: |case| {
            case.failed.is_some()
                && case.execute == "blockdev-reopen"
                && graph::lets_go_of_listed(case.world, case.arguments)
        },
        steer: Some(|around| {
            around.execute == "blockdev-reopen" && graph::lets_go_of_listed(around.world, around.arguments)
        }),
    },
    Defect {
        id: "aborted-snapshot-moves-tables",
        title: "a transaction that is taken back after a snapshot writes an image's tables into the overlay",
        qemu: "a later action flushes the format node above while its file is the overlay; the tables stay there",
        right: "a refused command changes nothing: the tables go into the image's own file",
        sure: Sure::Certain,
        scenario: files!("aborted-snapshot-moves-tables").0,
        page: files!("aborted-snapshot-moves-tables").1,
        matches: |case| {
            let overlay = |data: &Map<String, Value>| {
                let name = data.get("overlay").and_then(Value::as_str);
                name.is_some_and(|name| case.model.contains(&format!("node '{name}': zeroes")))
            };
            case.what == Some(What::Content)
                && case.qemu == "Torn"
                && has_step(case, "transaction")
                && commands(case).any(|(execute, data)| execute == "blockdev-snapshot" && overlay(data))
        },
        steer: None,
    },
    Defect {
        id: "aborted-snapshot-takes-parents",
        title: "a transaction that is aborted after a snapshot moves the overlay's own parents to the old node",
        qemu: "the roll-back moves whatever is above the overlay back, not only what the snapshot had moved there; when \
               one of these links is frozen, it aborts",
        right: "who used the overlay before goes on using it: an aborted transaction changes nothing",
        sure: Sure::Certain,
        scenario: files!("aborted-snapshot-takes-parents").0,
        page: files!("aborted-snapshot-takes-parents").1,
        matches: |case| {
            let seen = matches!(
                case.what,
                Some(What::Nodes | What::Edges | What::Masks | What::ReadOnly | What::Refusal)
            );
            (seen || case.failed.is_some()) && graph::aborts_a_used_overlay(case)
        },
        steer: None,
    },
];

/// The entry for the filter that a finished stream leaves behind.
pub(super) fn filter_outlives_job() -> &'static Defect {
    DEFECTS
        .iter()
        .find(|d| d.id == "filter-outlives-job")
        .expect("it is in the list")
}

/// The entry for a filter that copies too much.
pub(super) fn copies_below_bottom() -> &'static Defect {
    DEFECTS
        .iter()
        .find(|d| d.id == "cor-copies-below-bottom")
        .expect("it is in the list")
}

/// The entry that explains a case.
pub(super) fn explain(case: &Case<'_>) -> Option<&'static Defect> {
    DEFECTS.iter().find(|defect| (defect.matches)(case))
}

/// The entry that a command would run into.
pub(crate) fn steers_around(
    world: &World,
    leftovers: &[String],
    execute: &str,
    arguments: &Map<String, Value>,
) -> Option<&'static Defect> {
    let around = Around {
        world,
        leftovers,
        execute,
        arguments,
    };
    DEFECTS
        .iter()
        .find(|defect| defect.steer.is_some_and(|steer| steer(&around)))
}

pub(super) fn has_negative_null_co(options: &Map<String, Value>) -> bool {
    let negative = options.get("driver").is_some_and(|d| d == "null-co")
        && options
            .get("size")
            .and_then(Value::as_i64)
            .is_some_and(|size| size < 0);
    negative
        || options
            .values()
            .filter_map(Value::as_object)
            .any(has_negative_null_co)
}

/// Some copy-on-read filter that is to be added has a `bottom` that exists, is no filter and not below it.
pub(super) fn has_bottom_outside(world: &World, execute: &str, options: &Map<String, Value>) -> bool {
    let inner = || options.values().filter_map(Value::as_object);
    if execute != "blockdev-add" {
        return false;
    }
    if options.get("driver").is_none_or(|d| d != "copy-on-read") {
        return inner().any(|o| has_bottom_outside(world, execute, o));
    }
    let node = |key: &str| {
        options
            .get(key)
            .and_then(Value::as_str)
            .and_then(|name| world.graph.find(name))
    };
    let Some(bottom) = node("bottom") else {
        return inner().any(|o| has_bottom_outside(world, execute, o));
    };
    match node("file") {
        Some(file) => {
            !world.graph.node(bottom).driver.is_filter() && !world.graph.chain_contains(file, bottom)
        }
        // A node that exists is not below one that is opened now, unless by reference.
        None => options.get("file").is_some_and(Value::is_object),
    }
}

/// Some copy-on-read filter that is to be added has the end of its chain for `bottom`, right below itself.
pub(super) fn bottoms_out(world: &World, options: &Map<String, Value>) -> bool {
    let inner = || {
        options
            .values()
            .filter_map(Value::as_object)
            .any(|o| bottoms_out(world, o))
    };
    let text = |key: &str| options.get(key).and_then(Value::as_str);
    let (Some("copy-on-read"), Some(bottom)) = (text("driver"), text("bottom")) else {
        return inner();
    };
    match options.get("file") {
        Some(Value::String(file)) => world.graph.find(file).is_some_and(|file| {
            let graph = &world.graph;
            let first = graph.skip_filters(file);
            graph.name(first) == bottom
        }),
        Some(Value::Object(file)) => file.get("node-name").is_some_and(|n| n == bottom) || inner(),
        _ => false,
    }
}

/// There is a filter whose bottom is the very layer that it filters. A stream's own filter is one, too, when its base is
/// right below its device.
pub(super) fn has_bottom_on_top(world: &World) -> bool {
    let graph = &world.graph;
    graph
        .nodes()
        .any(|(id, node)| node.bottom == Some(graph.skip_filters(id)))
}

/// Some argument names one of these nodes, those of lists of options and of actions, too.
fn names_any(arguments: &Map<String, Value>, nodes: &[String]) -> bool {
    fn names(value: &Value, nodes: &[String]) -> bool {
        match value {
            Value::String(s) => nodes.contains(s),
            Value::Array(list) => list.iter().any(|value| names(value, nodes)),
            Value::Object(inner) => inner.values().any(|value| names(value, nodes)),
            _ => false,
        }
    }
    arguments.values().any(|value| names(value, nodes))
}

/// There is a raw node over an image that has a backing file.
pub(super) fn has_raw_on_overlay(world: &World) -> bool {
    let graph = &world.graph;
    graph.nodes().any(|(id, node)| {
        let below = graph.primary_child(id).map(|below| graph.skip_filters(below));
        node.driver == Driver::Raw && below.is_some_and(|below| graph.cow_child(below).is_some())
    })
}

pub(super) fn is_uneven(scenario: &Scenario) -> bool {
    scenario.images.iter().any(|i| i.size != scenario.images[0].size)
}

fn streams(scenario: &Scenario, before: usize) -> bool {
    let is_stream = |step: &crate::scenario::Step| matches!(&step.action, Action::Command { execute, .. } if execute == "block-stream");
    scenario
        .steps
        .iter()
        .take(before.saturating_add(1))
        .any(is_stream)
}

/// The commands so far, those of transactions one by one, with their arguments.
fn commands<'a>(case: &'a Case<'_>) -> impl Iterator<Item = (&'a str, &'a Map<String, Value>)> {
    let last = case.step.min(case.scenario.steps.len().saturating_sub(1));
    let steps = case.scenario.steps.iter().take(last + 1);
    steps.flat_map(|step| {
        let Action::Command { execute, arguments } = &step.action else {
            return Vec::new();
        };
        let actions = arguments
            .get("actions")
            .and_then(Value::as_array)
            .filter(|_| execute == "transaction");
        let inner = actions
            .into_iter()
            .flatten()
            .filter_map(|action| Some((action.get("type")?.as_str()?, action.get("data")?.as_object()?)));
        inner.chain([(execute.as_str(), arguments)]).collect()
    })
}

fn has_step(case: &Case<'_>, name: &str) -> bool {
    commands(case).any(|(execute, _)| execute == name)
}

/// Some blockdev-reopen names a node twice.
fn reopens_twice(case: &Case<'_>) -> bool {
    commands(case)
        .filter(|(execute, _)| *execute == "blockdev-reopen")
        .any(|(_, arguments)| {
            let options = arguments.get("options").and_then(Value::as_array);
            let names: Vec<&Value> = options
                .into_iter()
                .flatten()
                .filter_map(|o| o.get("node-name"))
                .collect();
            names
                .iter()
                .enumerate()
                .any(|(at, name)| names[..at].contains(name))
        })
}

/// Some snapshot put an image on top that is shorter than another one, or may have been made so.
fn has_shorter_overlay(case: &Case<'_>) -> bool {
    let size = |file: &str| {
        case.scenario
            .images
            .iter()
            .find(|i| i.file == file)
            .map(|i| i.size)
    };
    let longest = case.scenario.images.iter().map(|i| i.size).max();
    commands(case)
        .filter(|(execute, _)| *execute == "blockdev-snapshot")
        .any(|(_, arguments)| {
            let overlay = arguments.get("overlay").and_then(Value::as_str);
            let resized = commands(case).any(|(execute, resize)| {
                execute == "block_resize"
                    && overlay.is_some()
                    && resize.get("node-name").and_then(Value::as_str) == overlay
            });
            let file = overlay.and_then(|node| commands(case).find_map(|(_, add)| file_of(add, node)));
            resized || file.and_then(size).is_some_and(|size| Some(size) < longest)
        })
}

/// The image that these options open under this node name.
fn file_of<'a>(options: &'a Map<String, Value>, node: &str) -> Option<&'a str> {
    if options.get("node-name").is_some_and(|n| n == node) {
        let mut at = options;
        while let Some(below) = at
            .get("file")
            .or_else(|| at.get("image"))
            .and_then(Value::as_object)
        {
            at = below;
        }
        return at.get("filename").and_then(Value::as_str);
    }
    options
        .values()
        .filter_map(Value::as_object)
        .find_map(|inner| file_of(inner, node))
}

/// Some raw node is described that stands on something else than a file, or may do so later.
fn has_raw(options: &Map<String, Value>, later: bool) -> bool {
    let is_raw = options.get("driver").is_some_and(|driver| driver == "raw");
    let on_image =
        |file: &Value| file.get("driver").is_some_and(|driver| driver == "qcow2") || file.is_string();
    let inner = || options.values().filter_map(Value::as_object);
    (is_raw && (later || options.get("file").is_some_and(on_image))) || inner().any(|o| has_raw(o, later))
}

/// Some copy-on-read filter has a `bottom`.
fn has_bottom(options: &Map<String, Value>) -> bool {
    options.contains_key("bottom") || options.values().filter_map(Value::as_object).any(has_bottom)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::parse;

    #[test]
    fn every_entry_has_a_scenario_and_a_page() {
        for defect in DEFECTS {
            let scenario = parse::parse(defect.id, defect.scenario.as_bytes());
            assert!(scenario.is_ok(), "{}: {scenario:?}", defect.id);
            assert!(defect.page.starts_with("# "), "{}", defect.id);
            assert!(
                defect.page.contains(&format!("{}.json", defect.id)),
                "{} does not name its scenario",
                defect.id
            );
            let others = DEFECTS.iter().filter(|d| d.id == defect.id).count();
            assert_eq!(others, 1, "{}", defect.id);
        }
    }

    #[test]
    fn steering_is_narrow() {
        let world = World::default();
        let steered = |execute: &str, arguments: Value| {
            let Value::Object(arguments) = arguments else {
                panic!("an object")
            };
            steers_around(&world, &["gone".to_owned()], execute, &arguments).map(|d| d.id)
        };
        let null_co =
            |size: i64| serde_json::json!({"driver": "raw", "file": {"driver": "null-co", "size": size}});
        assert_eq!(steered("blockdev-add", null_co(-1)), Some("null-co-size"));
        assert_eq!(steered("blockdev-add", null_co(512)), None);
        let del = |name: &str| serde_json::json!({"node-name": name});
        assert_eq!(steered("blockdev-del", del("gone")), Some("filter-outlives-job"));
        assert_eq!(steered("blockdev-del", del("here")), None);
        let reopen =
            |name: &str| serde_json::json!({"options": [{"driver": "copy-on-read", "node-name": name}]});
        assert_eq!(
            steered("blockdev-reopen", reopen("gone")),
            Some("filter-outlives-job")
        );
        assert_eq!(steered("blockdev-reopen", reopen("here")), None);
        let snapshot = |name: &str| {
            let data = serde_json::json!({"node": name, "overlay": "o"});
            serde_json::json!({"actions": [{"type": "blockdev-snapshot", "data": data}]})
        };
        assert_eq!(
            steered("transaction", snapshot("gone")),
            Some("filter-outlives-job")
        );
        assert_eq!(steered("transaction", snapshot("here")), None);
    }

    /// What a case in a scenario of these steps is explained by.
    fn explained(scenario: &str, case: impl FnOnce(&mut Case<'_>)) -> Option<&'static str> {
        let scenario = parse::parse("test", scenario.as_bytes()).expect("a scenario");
        let (none, world) = (Map::new(), World::default());
        let mut about = Case {
            scenario: &scenario,
            step: scenario.steps.len(),
            execute: "",
            arguments: &none,
            world: &world,
            leftovers: &[],
            what: None,
            failed: None,
            model: "",
            qemu: "",
        };
        case(&mut about);
        explain(&about).map(|d| d.id)
    }

    fn steps(images: &str, steps: &str) -> String {
        format!(r#"{{"version":1,"grain":512,"images":[{images}],"steps":[{steps}]}}"#)
    }

    const EVEN: &str = r#"{"file":"a","format":"raw","size":1024},{"file":"b","format":"raw","size":1024}"#;
    const UNEVEN: &str = r#"{"file":"a","format":"raw","size":1024},{"file":"b","format":"raw","size":512}"#;

    #[test]
    fn near_misses_of_hangs_are_not_explained() {
        let reopen = |second: &str| {
            format!(
                r#"{{"actor":"m","execute":"blockdev-reopen","arguments":{{"options":[{{"node-name":"n"}},{{"node-name":"{second}"}}]}}}}"#
            )
        };
        let hangs = |case: &mut Case<'_>| case.failed = Some(Kind::Hang);
        let dies = |case: &mut Case<'_>| case.failed = Some(Kind::Crash);
        let twice = steps(EVEN, &reopen("n"));
        assert_eq!(explained(&twice, hangs), Some("reopen-drains-for-ever"));
        assert_eq!(explained(&twice, dies), None);
        assert_eq!(explained(&steps(EVEN, &reopen("m")), hangs), None);
        let paused = |case: &mut Case<'_>| {
            case.what = Some(What::Jobs);
            case.model = "job 'j' does not stay paused: ...";
        };
        assert_eq!(explained(&twice, paused), Some("reopen-drains-for-ever"));
        assert_eq!(explained(&steps(EVEN, &reopen("m")), paused), None);
        let running = |case: &mut Case<'_>| {
            case.what = Some(What::Jobs);
            case.model = "job 'j' does not stay running: ...";
        };
        assert_eq!(explained(&twice, running), None);
    }

    #[test]
    fn near_misses_of_wrong_content_are_not_explained() {
        let commit = r#"{"actor":"m","execute":"block-commit","arguments":{"device":"n"}}"#;
        fn old(case: &mut Case<'_>) {
            case.what = Some(What::Content);
            (case.model, case.qemu) = ("x at 0x200: zeroes", "Stamp(Fill { image: 0, fill: 0 })");
        }
        assert_eq!(
            explained(&steps(UNEVEN, commit), old),
            Some("commit-uncovers-base")
        );
        assert_eq!(explained(&steps(EVEN, commit), old), None);
        assert_eq!(explained(&steps(UNEVEN, ""), old), None);
        let lost = |case: &mut Case<'_>| {
            old(case);
            (case.model, case.qemu) = ("x at 0x200: the write of step 3", "Zero");
        };
        assert_eq!(
            explained(&steps(UNEVEN, commit), lost),
            None,
            "lost data is something else"
        );
        let resize = r#"{"actor":"m","execute":"block_resize","arguments":{"node-name":"n","size":512}}"#;
        assert_eq!(
            explained(&steps(EVEN, &[resize, resize].join(",")), old),
            Some("resize-shows-old-tail")
        );
        assert_eq!(explained(&steps(EVEN, resize), old), None);
        let torn = |case: &mut Case<'_>| {
            old(case);
            case.qemu = "Torn";
        };
        let filter = |bottom: &str| {
            let node = format!(r#"{{"driver":"copy-on-read","file":"n"{bottom}}}"#);
            format!(r#"{{"actor":"m","execute":"blockdev-add","arguments":{node}}}"#)
        };
        let with = filter(r#","bottom":"m""#);
        assert_eq!(explained(&steps(UNEVEN, &with), torn), Some("cor-bottom-garbage"));
        assert_eq!(explained(&steps(EVEN, &with), torn), None);
        assert_eq!(explained(&steps(UNEVEN, &filter("")), torn), None);
        assert_eq!(explained(&steps(UNEVEN, &with), old), None);
    }

    #[test]
    fn near_misses_of_aborts_are_not_explained() {
        let snapshot = |file: &str| {
            format!(
                r#"{{"actor":"m","execute":"blockdev-add","arguments":{{"driver":"raw","node-name":"o","file":{{"driver":"file","filename":"{file}"}}}}}},
                {{"actor":"m","execute":"blockdev-snapshot","arguments":{{"node":"n","overlay":"o"}}}}"#
            )
        };
        let aborts = |words: &'static str| {
            move |case: &mut Case<'_>| {
                case.failed = Some(Kind::Assert);
                case.qemu = words;
            }
        };
        let sparse = "nbd_co_send_sparse_read: Assertion `pnum' failed";
        let shorter = Some("snapshot-over-shorter-overlay");
        assert_eq!(explained(&steps(UNEVEN, &snapshot("b")), aborts(sparse)), shorter);
        assert_eq!(explained(&steps(UNEVEN, &snapshot("a")), aborts(sparse)), None);
        assert_eq!(
            explained(&steps(UNEVEN, &snapshot("b")), aborts("another assertion")),
            None
        );
        assert_eq!(explained(&steps(UNEVEN, ""), aborts(sparse)), None);
        let count = "mirror_dirty_init: Assertion `count' failed";
        assert_eq!(
            explained(&steps(EVEN, &snapshot("a")), aborts(count)),
            Some("filter-keeps-length")
        );
        assert_eq!(explained(&steps(EVEN, ""), aborts(count)), None);
    }
}
