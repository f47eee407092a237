//! Defects of `qemu-storage-daemon` 10.0 that were reviewed and are held to be its own.
//!
//! Rules: an entry has a scenario under `docs/findings/` that reproduces it, a page beside it that explains it, and a
//! matcher as narrow as the defect. What an entry explains is reported as known, never as agreement. Random and
//! exhaustive campaigns steer around what ends a daemon, so that it does not hide the rest; a scenario file is always
//! carried out as it stands.

use blkcheck_model::World;
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
            case.what == Some(What::Result)
                && case.model == "accepted"
                && case.qemu.ends_with("Block node is read-only")
                && case.step > 0
                && streams(case.scenario, case.step - 1)
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
            matches!(case.what, Some(What::Content | What::Allocation))
                && (case.model.contains("zeroes") || case.qemu == "not allocated")
                && is_uneven(case.scenario)
                && streams(case.scenario, case.step)
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

/// Some argument names one of these nodes.
fn names_any(arguments: &Map<String, Value>, nodes: &[String]) -> bool {
    arguments.values().any(|value| match value {
        Value::String(s) => nodes.contains(s),
        Value::Object(inner) => names_any(inner, nodes),
        _ => false,
    })
}

pub(super) fn is_uneven(scenario: &Scenario) -> bool {
    scenario.images.iter().any(|i| i.size != scenario.images[0].size)
}

fn streams(scenario: &Scenario, before: usize) -> bool {
    scenario.steps[..=before.min(scenario.steps.len().saturating_sub(1))]
        .iter()
        .any(|s| matches!(&s.action, Action::Command { execute, .. } if execute == "block-stream"))
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
    }
}
