//! The generator: one seed, one scenario. Swarm testing: every seed draws its own subset and weights of features,
//! chain shapes and sizes, so that rare combinations get whole runs to themselves.
//!
//! Rules: draws only from the workload stream; stays within the target's capabilities; always yields a scenario that
//! `validate` accepts. Nothing here looks at outcomes: a generated command may well be refused, and refusals are
//! checked like results. A profile narrows the swarm, it never adds a feature of its own.
//! What may fail is drawn apart, by [`add_faults`] and [`add_power_cut`]; whether it does is a choice. Not covered: snapshots and
//! bitmaps on failing storage, for which the model has no list of what may be left.

mod backup;
mod bitmaps;
mod chain;
mod faults;
mod graph;
mod guests;
mod instants;
mod jobs;
mod monitor;
mod offload;
mod swarm;
mod throttle;

pub use faults::{add_faults, add_power_cut};
pub use swarm::{Profile, Swarm};

use serde_json::{Map, Value};

use crate::rng::{Rng, Stream};
use crate::scenario::{Action, Disk, Scenario, Step, Stored, VERSION};

/// The options of a node, with those of its children inside.
type Options = Map<String, Value>;

/// What a target can do, as far as the generator cares.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reach {
    /// Explicit drained sections.
    pub drain: bool,
    /// Storage with an alignment above 1.
    pub alignment: bool,
    /// Grain below 512 bytes.
    pub fine_grain: bool,
    /// Images whose files may grow (not on fixed-size devices).
    pub raw_tails: bool,
    /// Jobs with a speed (time can pass by choice).
    pub rates: bool,
    /// Backing nodes given inline over a file name in the header.
    pub inline_backing: bool,
    /// `blockdev-reopen`.
    pub reopen: bool,
    /// `blockdev-snapshot` and `transaction`.
    pub snapshots: bool,
    /// `block_resize`.
    pub resize: bool,
    /// Throttle groups and filters (time can pass by choice).
    pub throttle: bool,
    /// `block-dirty-bitmap-*`, and room for what is stored of bitmaps.
    pub bitmaps: bool,
    /// `copy-before-write` and `snapshot-access`.
    pub snapshot_access: bool,
    /// `blockdev-backup`.
    pub backup: bool,
    /// … that discard in their source what they have copied.
    pub discard_source: bool,
    /// … that compress what they copy (in an order that choices make).
    pub compression: bool,
}

impl Reach {
    /// Everything (the simulator).
    #[must_use]
    pub fn all() -> Reach {
        Reach {
            drain: true,
            alignment: true,
            fine_grain: true,
            raw_tails: true,
            rates: true,
            inline_backing: true,
            reopen: true,
            snapshots: true,
            resize: true,
            throttle: true,
            bitmaps: true,
            snapshot_access: true,
            backup: true,
            discard_source: true,
            compression: true,
        }
    }
}

/// The scenario of a seed.
#[must_use]
pub fn generate(seed: u64, profile: Profile, reach: Reach) -> Scenario {
    let scenario = generate_from(&mut Rng::stream(seed, Stream::Workload), profile, reach);
    let mut scenario = Scenario {
        seed: Some(seed),
        ..scenario
    };
    if reach.bitmaps && matches!(profile, Profile::Mixed | Profile::Graph | Profile::Backup) {
        bitmaps::weave(seed, &mut scenario);
    }
    if reach.snapshot_access && matches!(profile, Profile::Mixed | Profile::Backup) {
        backup::weave(seed, profile, reach, &mut scenario);
        // One instant is judged by events, which the gated daemon has none of: nobody drains there either.
        if reach.backup && reach.drain && profile == Profile::Backup {
            instants::weave(seed, &mut scenario);
        }
    }
    scenario
}

/// The scenario that these draws make; for fuzzers, whose bytes are the draws.
#[must_use]
pub fn generate_from(rng: &mut Rng, profile: Profile, reach: Reach) -> Scenario {
    let swarm = Swarm::draw(rng, profile, reach);
    let chain = chain::Chain::draw(rng, &swarm);
    let mut steps = Vec::with_capacity(96);
    chain.setup(rng, &swarm, &mut steps);
    interleave(rng, &swarm, &chain, &mut steps);
    if !reach.rates {
        without_rates(&mut steps);
    }
    if !reach.raw_tails {
        without_raw_resizes(&mut steps);
    }
    if !reach.inline_backing {
        without_inline_backing(&mut steps);
    }
    let mut images = chain.images;
    images.extend(chain.overlays);
    Scenario {
        version: VERSION,
        title: None,
        seed: None,
        grain: swarm.grain,
        disk: Disk {
            alignment: swarm.alignment,
            job_parallelism: swarm.job_parallelism,
            unmap: swarm.unmap,
            ..Disk::default()
        },
        images,
        steps,
        beyond_model: false,
        choices: Vec::new(),
        steer: false,
        expect: None,
    }
}

/// Takes speeds out of jobs: for targets where time is not a choice. What is refused stays refused.
pub fn without_rates(steps: &mut [Step]) {
    for step in steps {
        let Action::Command { execute, arguments } = &mut step.action else {
            continue;
        };
        without_rate(execute, arguments);
        let actions = arguments.get_mut("actions").and_then(Value::as_array_mut);
        for action in actions.into_iter().flatten() {
            let kind = action["type"].as_str().unwrap_or_default().to_owned();
            if let Some(data) = action.get_mut("data").and_then(Value::as_object_mut) {
                without_rate(&kind, data);
            }
        }
    }
}

fn without_rate(command: &str, arguments: &mut Options) {
    if matches!(
        command,
        "block-stream" | "blockdev-backup" | "block-job-set-speed"
    ) && let Some(speed) = arguments.get_mut("speed")
        && speed.as_i64().is_none_or(|s| s > 0)
    {
        *speed = Value::from(0);
    }
}

/// Stores compressed clusters as they are: for targets that unpack them in an order of their own.
pub fn without_compression(scenario: &mut Scenario) {
    let fills = scenario.images.iter_mut().flat_map(|image| &mut image.fill);
    for fill in fills.filter(|fill| fill.stored == Stored::Compressed) {
        fill.stored = Stored::Data;
    }
}

/// Opens inline backing nodes by commands of their own, just before, wherever they are described: for targets that cannot
/// join options with the file name in a header.
pub fn without_inline_backing(steps: &mut Vec<Step>) {
    let mut at = 0;
    while at < steps.len() {
        let inner = match &mut steps[at].action {
            Action::Command { execute, arguments } if execute == "blockdev-add" => {
                take_inline_backing(arguments)
            }
            _ => None,
        };
        match inner {
            Some(inner) => {
                let actor = steps[at].actor.clone();
                steps.insert(at, command(&actor, "blockdev-add", inner));
            }
            None => at += 1,
        }
    }
}

/// Puts the name of the first inline backing node in place of its description, which is the result; it may have inline
/// backing nodes of its own. One without a name stays.
fn take_inline_backing(options: &mut Options) -> Option<Value> {
    if let Some(backing @ Value::Object(_)) = options.get_mut("backing")
        && let Some(name) = backing.get("node-name").cloned()
    {
        return Some(std::mem::replace(backing, name));
    }
    options
        .values_mut()
        .filter_map(|option| option.as_object_mut())
        .find_map(take_inline_backing)
}

/// Takes resizes of raw and protocol nodes, and of filters over such, out: for targets where a file has the length that it has.
fn without_raw_resizes(steps: &mut Vec<Step>) {
    let mut fixed = Vec::new();
    for step in &*steps {
        let Action::Command { execute, arguments } = &step.action else {
            continue;
        };
        let reopened = arguments.get("options").and_then(Value::as_array);
        let opened: Vec<&Options> = match &**execute {
            "blockdev-add" => vec![arguments],
            "blockdev-reopen" => reopened
                .into_iter()
                .flatten()
                .filter_map(Value::as_object)
                .collect(),
            _ => continue,
        };
        let mut found = Vec::new();
        opened
            .into_iter()
            .for_each(|options| descriptions(options, &mut found));
        for options in found {
            if is_as_long_as_a_file(options, &fixed) {
                fixed.extend(node_name(options));
            }
        }
    }
    let fixed: Vec<String> = fixed.into_iter().map(str::to_owned).collect();
    steps.retain(|step| match &step.action {
        Action::Command { execute, arguments } if execute == "block_resize" => {
            node_name(arguments).is_none_or(|name| fixed.iter().all(|f| f != name))
        }
        _ => true,
    });
}

/// Whether a node of this description has the length of a file; `fixed`: the ones that have, by name.
fn is_as_long_as_a_file(options: &Options, fixed: &[&str]) -> bool {
    match options.get("driver").and_then(Value::as_str) {
        Some("raw" | "file" | "host_device") => true,
        Some("copy-on-read" | "throttle" | "copy-before-write") => match options.get("file") {
            Some(Value::String(name)) => fixed.contains(&&**name),
            Some(Value::Object(file)) => is_as_long_as_a_file(file, fixed),
            _ => false,
        },
        _ => false,
    }
}

/// The descriptions of nodes in the options of one, those further in first; its own is the last.
fn descriptions<'a>(options: &'a Options, found: &mut Vec<&'a Options>) {
    let inner = options.values().filter_map(Value::as_object);
    inner.for_each(|inner| descriptions(inner, found));
    found.push(options);
}

fn node_name(options: &Options) -> Option<&str> {
    options.get("node-name").and_then(Value::as_str)
}

/// The name of the actor whose steps are barriers: they run alone, in file order.
pub const SETUP: &str = "setup";

/// Nodes that are opened with a name.
fn names(steps: &[Step]) -> Vec<String> {
    let mut found = Vec::new();
    for step in steps.iter().filter(|step| step.actor == SETUP) {
        match &step.action {
            Action::Command { execute, arguments } if execute == "blockdev-add" => {
                descriptions(arguments, &mut found);
            }
            _ => {}
        }
    }
    found
        .into_iter()
        .filter_map(node_name)
        .map(str::to_owned)
        .collect()
}

fn command(actor: &str, execute: &str, arguments: Value) -> Step {
    let Value::Object(arguments) = arguments else {
        unreachable!("arguments are an object")
    };
    Step {
        actor: actor.to_owned(),
        action: Action::Command {
            execute: execute.to_owned(),
            arguments,
        },
        wait: true,
    }
}

/// Guests, drained sections and the monitor take turns in file order; the schedule shuffles them further.
fn interleave(rng: &mut Rng, swarm: &Swarm, chain: &chain::Chain, steps: &mut Vec<Step>) {
    let mut guests = guests::Guests::new(rng, swarm, chain);
    let mut monitor = monitor::Monitor::new(rng, swarm, chain);
    let total = swarm.guest_ops + swarm.monitor_ops + 2 * swarm.drains;
    let (mut guest_left, mut monitor_left, mut drain_left) =
        (swarm.guest_ops, swarm.monitor_ops, swarm.drains);
    let mut open_drains: Vec<(u32, String)> = Vec::new();
    for _ in 0..total {
        let sections = 2 * drain_left + u32::try_from(open_drains.len()).expect("few");
        let left = guest_left + monitor_left + sections;
        if left == 0 {
            break;
        }
        let turn = rng.below(left);
        if turn < guest_left {
            guest_left -= 1;
            steps.push(guests.next(rng, swarm, chain));
        } else if turn < guest_left + monitor_left {
            monitor_left -= 1;
            monitor.next(rng, swarm, chain, steps);
        } else if !open_drains.is_empty() && (drain_left == 0 || rng.chance(1, 2)) {
            let at = rng.below(u32::try_from(open_drains.len()).expect("few")) as usize;
            let (actor, node) = open_drains.remove(at);
            steps.push(drain_step(actor, Action::DrainEnd { node }));
        } else if drain_left > 0 {
            drain_left -= 1;
            let actor = swarm.drains - drain_left;
            let node = monitor.any_node(rng, chain);
            steps.push(drain_step(actor, Action::DrainBegin { node: node.clone() }));
            open_drains.push((actor, node));
        }
    }
    for (actor, node) in open_drains {
        steps.push(drain_step(actor, Action::DrainEnd { node }));
    }
}

fn drain_step(actor: u32, action: Action) -> Step {
    Step {
        actor: format!("drain{actor}"),
        action,
        wait: true,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn jobs_of_transactions_have_no_speed_either() {
        let backup = |speed: u32| json!({"job-id": "k", "device": "n", "target": "t", "speed": speed});
        let clear = json!({"type": "block-dirty-bitmap-clear", "data": {"node": "n", "name": "b"}});
        let steps = |speed| {
            let action = json!({"type": "blockdev-backup", "data": backup(speed)});
            vec![
                command("m", "blockdev-backup", backup(speed)),
                command("m", "transaction", json!({"actions": [clear, action]})),
            ]
        };
        let mut limited = steps(65536);
        without_rates(&mut limited);
        assert_eq!(limited, steps(0));
    }

    #[test]
    fn inline_backing_nodes_are_opened_first_wherever_they_are() {
        let file = |name: &str| json!({"driver": "file", "filename": name});
        let base = json!({"driver": "raw", "node-name": "n0", "file": file("i0")});
        let middle = json!({"driver": "qcow2", "node-name": "n1", "file": file("i1"), "backing": base});
        let top = json!({"driver": "qcow2", "node-name": "n2", "file": file("i2"), "backing": middle});
        let filter = json!({"driver": "copy-on-read", "node-name": "cor", "file": top});
        let mut steps = vec![command(SETUP, "blockdev-add", filter)];
        without_inline_backing(&mut steps);
        let opened: Vec<Step> = [
            json!({"driver": "raw", "node-name": "n0", "file": file("i0")}),
            json!({"driver": "qcow2", "node-name": "n1", "file": file("i1"), "backing": "n0"}),
            json!({"driver": "copy-on-read", "node-name": "cor",
                "file": {"driver": "qcow2", "node-name": "n2", "file": file("i2"), "backing": "n1"}}),
        ]
        .into_iter()
        .map(|options| command(SETUP, "blockdev-add", options))
        .collect();
        assert_eq!(steps, opened);
        without_inline_backing(&mut steps);
        assert_eq!(steps, opened, "nothing is left to do");
    }

    #[test]
    fn only_images_of_a_format_are_resized_where_files_keep_their_length() {
        let file = json!({"driver": "file", "node-name": "f0", "filename": "i0"});
        let raw = json!({"driver": "raw", "node-name": "n0", "file": file});
        let open = json!({"driver": "qcow2", "node-name": "n1", "file": "f1", "backing": raw});
        let resize = |node: &str| command("m", "block_resize", json!({"node-name": node, "size": 512}));
        let mut steps = vec![command(SETUP, "blockdev-add", open)];
        let kept = [&steps[..], &[resize("n1"), resize("nope")]].concat();
        steps.extend(["n0", "n1", "f0", "nope"].map(resize));
        without_raw_resizes(&mut steps);
        assert_eq!(steps, kept);
    }

    #[test]
    fn a_filter_is_as_long_as_what_it_filters() {
        let add = |options| command("m", "blockdev-add", options);
        let raw = json!({"driver": "raw", "file": {"driver": "file", "filename": "i0"}});
        let named = json!({"driver": "raw", "node-name": "n0", "file": "f0"});
        let image = json!({"driver": "qcow2", "node-name": "n1", "file": "f1"});
        let opened = [
            add(json!({"driver": "throttle", "node-name": "t0", "throttle-group": "g", "file": raw})),
            add(named),
            add(image),
            add(json!({"driver": "copy-on-read", "node-name": "c0", "file": "n0"})),
            add(json!({"driver": "throttle", "node-name": "t1", "throttle-group": "g", "file": "c0"})),
            add(json!({"driver": "copy-on-read", "node-name": "c1", "file": "n1"})),
            add(json!({"driver": "throttle", "node-name": "t2", "throttle-group": "g", "file": "n1"})),
            command(
                "m",
                "blockdev-reopen",
                json!({"options": [
                {"driver": "throttle", "node-name": "t2", "throttle-group": "g", "file": "n0"}]}),
            ),
        ];
        let resize = |node: &str| command("m", "block_resize", json!({"node-name": node, "size": 512}));
        let mut steps = [&opened[..], &["t0", "c0", "t1", "c1", "t2"].map(resize)].concat();
        without_raw_resizes(&mut steps);
        assert_eq!(steps, [&opened[..], &[resize("c1")]].concat());
    }

    #[test]
    fn what_has_no_name_or_is_no_blockdev_add_stays() {
        let nameless =
            json!({"driver": "qcow2", "node-name": "n1", "file": "f", "backing": {"driver": "null-co"}});
        let reopen =
            json!({"options": [{"driver": "qcow2", "node-name": "n1", "backing": {"node-name": "n0"}}]});
        let steps = vec![
            command("m", "blockdev-add", nameless),
            command("m", "blockdev-reopen", reopen),
        ];
        let mut changed = steps.clone();
        without_inline_backing(&mut changed);
        assert_eq!(changed, steps);
    }
}
