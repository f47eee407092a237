//! Every sequence of a fixed set of commands, up to a length, over a chain of three layers with one filter, and an
//! overlay that is open beside it.
//!
//! The sequences form a tree, and the walk shares prefixes: the daemon is brought back to a prefix (from nothing: taken
//! down, set up, the prefix sent again) only after a command that was accepted. A refused command of which model and
//! daemon agree, and after which everything that can be seen of the daemon is as before, leads to where one already is;
//! what follows it is what follows the prefix itself without it, which the walk visits anyway. Its subtree is counted
//! and not walked. What is below a difference is not walked either, and counted apart.
//! Rules: the commands name every node; the end of each accepted sequence compares what is stored.

use serde_json::{Value, json};

use super::lockstep::{Finding, Manner, Run, Stop};
use super::peer::Peer;
use crate::qemu::Broken;
use crate::scenario::{Action, Fill, Format, GuestOp, Image, Range, Scenario, Step, Stored};

/// What a walk counted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Walked {
    /// Sequences whose last command was carried out on both.
    pub carried_out: u64,
    /// Sequences that equal a shorter one that was, since a command in them was refused and changed nothing.
    pub equal: u64,
    /// Sequences that begin with one that differs, or that runs into a known defect, or whose last command was left out.
    pub cut_off: u64,
    /// Commands left out because the model does not know what they do.
    pub left_out: u64,
    /// Times the daemon was brought back to a prefix.
    pub rebuilt: u64,
    /// Steps in all.
    pub steps: u64,
}

impl Walked {
    /// Sequences in all.
    #[must_use]
    pub fn sequences(&self) -> u64 {
        self.carried_out + self.equal + self.cut_off
    }
}

fn command(execute: &str, arguments: Value) -> Step {
    let Value::Object(arguments) = arguments else {
        unreachable!("arguments are an object")
    };
    Step {
        actor: "monitor".to_owned(),
        action: Action::Command {
            execute: execute.to_owned(),
            arguments,
        },
        wait: true,
    }
}

/// Base, middle and top, a copy-on-read filter over the top, an export of the filter, and an overlay above nothing.
#[must_use]
pub fn setup() -> Scenario {
    let image = |layer: usize, clusters: &[u64]| Image {
        file: format!("i{layer}.img"),
        format: Format::Qcow2,
        size: 8 * 4096,
        cluster_size: 4096,
        compat: 3,
        refcount_bits: 16,
        backing_file: layer.checked_sub(1).map(|below| format!("i{below}.img")),
        backing_format: layer.checked_sub(1).map(|_| "qcow2".to_owned()),
        free: 0,
        fill: clusters
            .iter()
            .map(|cluster| Fill {
                offset: cluster * 4096,
                length: 4096,
                stored: Stored::Data,
            })
            .collect(),
    };
    let add = |layer: usize| {
        let mut node = json!({"driver": "qcow2", "node-name": format!("n{layer}"), "backing": null,
            "file": {"driver": "file", "node-name": format!("f{layer}"), "filename": format!("i{layer}.img")}});
        if let Some(below) = layer.checked_sub(1) {
            node["backing"] = json!(format!("n{below}"));
        }
        command("blockdev-add", node)
    };
    Scenario {
        grain: 512,
        images: vec![
            image(0, &[0, 1, 2, 3]),
            image(1, &[2, 5]),
            image(2, &[3]),
            image(3, &[6]),
        ],
        steps: vec![
            add(0),
            add(1),
            add(2),
            command(
                "blockdev-add",
                json!({"driver": "copy-on-read", "node-name": "cor", "file": "n2"}),
            ),
            command(
                "block-export-add",
                json!({"type": "nbd", "id": "x", "name": "x", "node-name": "cor", "writable": true}),
            ),
            command(
                "blockdev-add",
                json!({"driver": "qcow2", "node-name": "over", "backing": null,
                    "file": {"driver": "file", "node-name": "f3", "filename": "i3.img"}}),
            ),
        ],
        ..Scenario::default()
    }
}

/// The commands that sequences are made of.
#[must_use]
pub fn commands() -> Vec<Step> {
    let mut steps = streams();
    steps.extend(verbs());
    steps.extend(graph());
    steps.extend(reopens());
    steps.extend(snapshots());
    steps.extend(resizes());
    steps.extend(backups());
    steps.push(Step {
        actor: "guest".to_owned(),
        action: Action::Guest {
            export: "x".to_owned(),
            op: GuestOp::Write(Range {
                offset: 1024,
                length: 4096,
            }),
        },
        wait: true,
    });
    steps.push(Step {
        actor: "guest".to_owned(),
        action: Action::Guest {
            export: "x".to_owned(),
            op: GuestOp::Read(Range {
                offset: 8192,
                length: 512,
            }),
        },
        wait: true,
    });
    steps
}

fn streams() -> Vec<Step> {
    let stream = |arguments: Value| {
        let mut all = json!({"job-id": "j", "filter-node-name": "filter"});
        for (key, value) in arguments.as_object().expect("an object") {
            all[key] = value.clone();
        }
        command("block-stream", all)
    };
    vec![
        stream(json!({"device": "n2"})),
        stream(json!({"device": "n2", "base-node": "n0"})),
        stream(json!({"device": "n2", "bottom": "n1", "auto-finalize": false})),
        stream(json!({"device": "n2", "base-node": "n1", "auto-dismiss": false})),
        stream(json!({"device": "n1"})),
        stream(json!({"device": "cor"})),
        stream(json!({"device": "n2", "speed": 1})),
        stream(
            json!({"device": "n1", "speed": 1, "auto-dismiss": false, "job-id": "k", "filter-node-name": "low"}),
        ),
        stream(json!({"device": "n2", "base": "i0.img", "backing-file": "elsewhere.img"})),
    ]
}

fn verbs() -> Vec<Step> {
    vec![
        command("job-pause", json!({"id": "j"})),
        command("job-resume", json!({"id": "j"})),
        command("job-cancel", json!({"id": "j"})),
        command("job-finalize", json!({"id": "j"})),
        command("job-dismiss", json!({"id": "j"})),
        command("job-complete", json!({"id": "j"})),
        command("block-job-cancel", json!({"device": "j"})),
        command("block-job-set-speed", json!({"device": "j", "speed": 0})),
        command("block-job-set-speed", json!({"device": "k", "speed": 0})),
        command("job-cancel", json!({"id": "k"})),
        command("job-dismiss", json!({"id": "k"})),
    ]
}

fn graph() -> Vec<Step> {
    let export = |id: &str, node: &str, writable: bool| {
        let add = json!({"type": "nbd", "id": id, "name": id, "node-name": node, "writable": writable});
        command("block-export-add", add)
    };
    vec![
        command("blockdev-del", json!({"node-name": "n0"})),
        command("blockdev-del", json!({"node-name": "n2"})),
        command("blockdev-del", json!({"node-name": "cor"})),
        command("blockdev-del", json!({"node-name": "extra"})),
        command("blockdev-del", json!({"node-name": "filter"})),
        command(
            "blockdev-add",
            json!({"driver": "copy-on-read", "node-name": "extra", "file": "n1", "bottom": "n0"}),
        ),
        command(
            "blockdev-add",
            json!({"driver": "copy-on-read", "node-name": "extra", "file": "n2", "bottom": "n1"}),
        ),
        command(
            "blockdev-add",
            json!({"driver": "raw", "node-name": "extra", "file": "n1", "read-only": true}),
        ),
        command(
            "blockdev-add",
            json!({"driver": "raw", "node-name": "extra", "file": "n0", "offset": 512}),
        ),
        command(
            "blockdev-add",
            json!({"driver": "null-co", "node-name": "filter", "size": 4096}),
        ),
        command(
            "blockdev-add",
            json!({"driver": "copy-on-read", "node-name": "low", "file": "cor"}),
        ),
        export("y", "n1", true),
        export("y", "n2", false),
        export("z", "n0", true),
        command("block-export-del", json!({"id": "x"})),
        command("block-export-del", json!({"id": "y"})),
        command("block-export-del", json!({"id": "z"})),
        command(
            "change-backing-file",
            json!({"device": "cor", "image-node-name": "n2", "backing-file": "a.img"}),
        ),
        command(
            "change-backing-file",
            json!({"device": "cor", "image-node-name": "n1", "backing-file": "i0.img"}),
        ),
        command(
            "change-backing-file",
            json!({"device": "cor", "image-node-name": "n0", "backing-file": "b.img"}),
        ),
    ]
}

fn reopens() -> Vec<Step> {
    let node = |layer: usize, changed: Value| {
        let mut all =
            json!({"driver": "qcow2", "node-name": format!("n{layer}"), "file": format!("f{layer}")});
        for (key, value) in changed.as_object().expect("an object") {
            all[key] = value.clone();
        }
        all
    };
    let reopen = |nodes: Value| command("blockdev-reopen", json!({"options": nodes}));
    vec![
        reopen(json!([node(2, json!({"backing": "n1", "detect-zeroes": "on"}))])),
        reopen(json!([node(2, json!({"backing": null}))])),
        reopen(json!([node(2, json!({"backing": "n0"}))])),
        reopen(json!([node(2, json!({"backing": "extra"}))])),
        reopen(json!([node(2, json!({"backing": "n1", "read-only": true}))])),
        reopen(json!([node(1, json!({"backing": "n0", "read-only": true}))])),
        reopen(json!([
            node(2, json!({"backing": "n0"})),
            node(1, json!({"backing": null}))
        ])),
        reopen(json!([{"driver": "copy-on-read", "node-name": "cor", "file": "over"}])),
    ]
}

fn snapshots() -> Vec<Step> {
    let above = |node: &str| json!({"node": node, "overlay": "over"});
    let action = |node: &str| json!({"type": "blockdev-snapshot", "data": above(node)});
    let transaction = |actions: Value| command("transaction", json!({"actions": actions}));
    vec![
        command("blockdev-snapshot", above("n2")),
        command("blockdev-snapshot", above("n1")),
        command("blockdev-snapshot", above("cor")),
        command("blockdev-del", json!({"node-name": "over"})),
        transaction(json!([action("n2")])),
        transaction(json!([action("n2"), {"type": "abort", "data": {}}])),
        transaction(json!([action("n2"), action("n1")])),
    ]
}

/// The overlay beside the chain is what is copied to.
fn backups() -> Vec<Step> {
    let backup = |arguments: Value| {
        let mut all = json!({"job-id": "j", "device": "n2", "target": "over", "filter-node-name": "filter"});
        for (key, value) in arguments.as_object().expect("an object") {
            all[key] = value.clone();
        }
        all
    };
    let alone = |arguments: Value| command("blockdev-backup", backup(arguments));
    let action = |arguments: Value| json!({"type": "blockdev-backup", "data": backup(arguments)});
    let two = json!({"sync": "none", "job-id": "k", "target": "extra", "filter-node-name": "low"});
    vec![
        command(
            "blockdev-add",
            json!({"driver": "copy-before-write", "node-name": "extra", "file": "n2", "target": "over"}),
        ),
        command(
            "blockdev-add",
            json!({"driver": "snapshot-access", "node-name": "low", "file": "extra"}),
        ),
        alone(json!({"sync": "full"})),
        alone(json!({"sync": "none", "auto-dismiss": false})),
        alone(json!({"sync": "top", "device": "n1", "auto-finalize": false})),
        command(
            "transaction",
            json!({"actions": [action(json!({"sync": "full"})), action(two)]}),
        ),
    ]
}

fn resizes() -> Vec<Step> {
    let resize = |node: &str, clusters: u64| {
        command(
            "block_resize",
            json!({"node-name": node, "size": clusters * 4096}),
        )
    };
    vec![
        resize("n2", 10),
        resize("n2", 6),
        resize("n1", 7),
        resize("n0", 9),
        resize("cor", 9),
        resize("over", 4),
    ]
}

/// Sequences that begin in one place, of up to `depth` more commands out of `n`.
fn below(n: u64, depth: u32) -> u64 {
    (1..=depth)
        .map(|d| n.saturating_pow(d))
        .fold(0, u64::saturating_add)
}

/// What a walk tells as it goes.
pub trait Witness {
    /// This scenario differs, or runs into a known defect.
    fn found(&mut self, scenario: &Scenario, finding: &Finding);
    /// A known defect was seen that ends nothing.
    fn aside(&mut self, scenario: &Scenario, id: &'static str, step: usize);
    /// Refusals that agreed.
    fn refusals(&mut self, refusals: &[(String, String)]);
    /// Whether to stop.
    fn tick(&mut self, walked: &Walked) -> bool;
}

/// Walks all sequences up to this length.
///
/// # Errors
/// When no daemon can be started.
pub fn walk(peer: &mut Peer, depth: u32, witness: &mut dyn Witness) -> Result<Walked, Broken> {
    let mut walker = Walker {
        commands: commands(),
        scenario: setup(),
        fixed: setup().steps.len(),
        walked: Walked::default(),
        witness,
        stop: false,
    };
    let place = walker.rebuild(peer)?;
    let place = walker.visit(place, depth)?;
    if let Some(run) = place.run {
        walker.end(run, 0, Ok(()));
    }
    Ok(walker.walked)
}

struct Walker<'w> {
    commands: Vec<Step>,
    /// Set up, and the sequence so far.
    scenario: Scenario,
    fixed: usize,
    walked: Walked,
    witness: &'w mut dyn Witness,
    stop: bool,
}

/// Where the daemon is.
struct Place<'p> {
    /// At the end of the prefix.
    run: Option<Run<'p>>,
    /// Elsewhere.
    peer: Option<&'p mut Peer>,
}

impl Walker<'_> {
    /// Brings a daemon to the end of the sequence so far.
    fn rebuild<'p>(&mut self, peer: &'p mut Peer) -> Result<Place<'p>, Broken> {
        self.walked.rebuilt += 1;
        let manner = Manner {
            steer: true,
            ..Manner::default()
        };
        let mut run = Run::start(peer, manner, &self.scenario)?;
        for at in 0..self.scenario.steps.len() {
            if let Err(stop) = run.step(&self.scenario, at) {
                // It was fine before: told like any other difference.
                let peer = self.end(run, at, Err(stop));
                return Ok(Place {
                    run: None,
                    peer: Some(peer),
                });
            }
        }
        Ok(Place {
            run: Some(run),
            peer: None,
        })
    }

    /// Takes a run down and tells what it showed.
    fn end<'p>(&mut self, run: Run<'p>, at: usize, result: Result<(), Stop>) -> &'p mut Peer {
        let (shown, peer) = run.finish(&self.scenario, at, result);
        self.walked.steps += shown.steps;
        self.witness.refusals(&shown.refusals);
        for (id, step) in &shown.aside {
            self.witness.aside(&self.scenario, id, *step);
        }
        if let Some(finding) = &shown.finding {
            self.witness.found(&self.scenario, finding);
        }
        peer
    }

    fn visit<'p>(&mut self, mut place: Place<'p>, depth: u32) -> Result<Place<'p>, Broken> {
        let n = self.commands.len() as u64;
        for at in 0..self.commands.len() {
            self.stop |= self.witness.tick(&self.walked);
            if self.stop {
                break;
            }
            let mut run = match (place.run.take(), place.peer.take()) {
                (Some(run), _) => run,
                (None, Some(peer)) => {
                    let again = self.rebuild(peer)?;
                    match again.run {
                        Some(run) => run,
                        None => {
                            self.walked.cut_off += 1 + below(n, depth - 1);
                            place = again;
                            continue;
                        }
                    }
                }
                (None, None) => unreachable!("a daemon is somewhere"),
            };
            self.scenario.steps.push(self.commands[at].clone());
            let step = self.scenario.steps.len() - 1;
            let (refusals, steered) = (run.shown.refusals.len(), run.shown.steered);
            let left_out = run.shown.left_out.len();
            place = match run.step(&self.scenario, step) {
                Err(stop) => {
                    self.walked.cut_off += 1 + below(n, depth - 1);
                    let peer = self.end(run, step, Err(stop));
                    Place {
                        run: None,
                        peer: Some(peer),
                    }
                }
                Ok(()) if run.shown.steered > steered || run.shown.left_out.len() > left_out => {
                    self.walked.cut_off += 1 + below(n, depth - 1);
                    self.walked.left_out += (run.shown.left_out.len() - left_out) as u64;
                    Place {
                        run: Some(run),
                        peer: None,
                    }
                }
                Ok(()) if run.shown.refusals.len() > refusals => {
                    self.walked.carried_out += 1;
                    self.walked.equal += below(n, depth - 1);
                    Place {
                        run: Some(run),
                        peer: None,
                    }
                }
                Ok(()) => {
                    self.walked.carried_out += 1;
                    let mut place = Place {
                        run: Some(run),
                        peer: None,
                    };
                    if depth > 1 {
                        place = self.visit(place, depth - 1)?;
                    }
                    let peer = match place.run {
                        Some(run) => Some(self.end(run, step, Ok(()))),
                        None => place.peer,
                    };
                    Place { run: None, peer }
                }
            };
            self.scenario.steps.truncate(step);
        }
        debug_assert!(self.scenario.steps.len() >= self.fixed, "the setup stays");
        Ok(place)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenario::validate::validate;

    #[test]
    fn at_least_sixty_commands_and_no_two_alike() {
        let commands = commands();
        assert!(commands.len() >= 60, "{}", commands.len());
        for (at, one) in commands.iter().enumerate() {
            assert!(!commands[..at].contains(one), "{one:?}");
        }
        let mut scenario = setup();
        scenario.steps.extend(commands);
        assert_eq!(validate(&scenario), Ok(()));
        assert_eq!(below(40, 3), 65_640);
    }
}
