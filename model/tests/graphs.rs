//! Random worlds: invariants after every command, walks against naive definitions, refusals that change nothing.

use std::rc::Rc;

use blkcheck_model::graph::BackingHeader;
use blkcheck_model::{
    Command, Driver, FileFacts, FileKind, Graph, JobStatus, NodeId, Outcome, Qcow2Facts, World,
};
use proptest::prelude::*;
use serde_json::{Value, json};

fn world() -> World {
    let file = |n: usize, below: Option<usize>| {
        let backing = below.map(|n| BackingHeader {
            file: Rc::from(format!("/f{n}")),
            format: Some(Rc::from("qcow2")),
        });
        let qcow2 = Qcow2Facts {
            virtual_size: 1 << 20,
            cluster_size: 512,
            version: 3,
            backing,
            bitmaps: Vec::new(),
        };
        let facts = FileFacts {
            kind: FileKind::Regular,
            length: 65536,
            request_alignment: 1,
            qcow2: Some(qcow2),
        };
        (Rc::from(format!("/f{n}")), facts)
    };
    World::new([file(0, None), file(1, Some(0)), file(2, Some(1)), file(3, None)])
}

fn name() -> impl Strategy<Value = String> {
    (0_u8..6).prop_map(|n| format!("n{n}"))
}

fn command() -> impl Strategy<Value = (&'static str, Value)> {
    let file =
        (0_u8..4, prop::option::weighted(0.3, any::<bool>())).prop_map(|(n, read_only)| match read_only {
            None => json!({"driver": "file", "filename": format!("/f{n}")}),
            Some(read_only) => {
                json!({"driver": "file", "filename": format!("/f{n}"), "read-only": read_only})
            }
        });
    let qcow2 = (
        name(),
        file,
        prop::option::of(prop::option::of(name())),
        any::<bool>(),
    )
        .prop_map(|(name, file, backing, ro)| {
            let mut options = json!({"driver": "qcow2", "node-name": name, "file": file, "read-only": ro});
            if let Some(backing) = backing {
                options["backing"] = json!(backing);
            }
            ("blockdev-add", options)
        });
    let cor = (name(), name(), prop::option::of(name())).prop_map(|(name, file, bottom)| {
        let mut options = json!({"driver": "copy-on-read", "node-name": name, "file": file});
        if let Some(bottom) = bottom {
            options["bottom"] = json!(bottom);
        }
        ("blockdev-add", options)
    });
    let stream = (
        0_u8..3,
        name(),
        prop::option::of((any::<bool>(), name())),
        any::<bool>(),
    )
        .prop_map(|(job, device, end, auto)| {
            let mut arguments = json!({"job-id": format!("j{job}"), "device": device, "auto-dismiss": auto});
            if let Some((base, node)) = end {
                arguments[if base { "base-node" } else { "bottom" }] = json!(node);
            }
            ("block-stream", arguments)
        });
    let export = (0_u8..3, name(), any::<bool>()).prop_map(|(id, node, writable)| {
        ("block-export-add", json!({"type": "nbd", "id": format!("e{id}"), "node-name": node, "name": format!("e{id}"), "writable": writable}))
    });
    prop_oneof![
        6 => qcow2,
        2 => cor,
        3 => stream,
        2 => export,
        2 => name().prop_map(|name| ("blockdev-del", json!({"node-name": name}))),
        1 => (0_u8..3).prop_map(|id| ("block-export-del", json!({"id": format!("e{id}")}))),
        2 => (0_u8..3).prop_map(|id| ("end-job", json!({"id": format!("j{id}")}))),
        1 => (0_u8..3).prop_map(|id| ("job-cancel", json!({"id": format!("j{id}")}))),
    ]
}

/// Reports what a client would see of a job up to its end.
fn end_job(world: &mut World, id: &str) {
    let Some(job) = world.job(id) else { return };
    let (cancelled, auto_dismiss) = (job.cancelled, job.auto_dismiss);
    let before = if cancelled {
        vec![JobStatus::Aborting]
    } else {
        vec![JobStatus::Waiting, JobStatus::Pending]
    };
    for status in before {
        world.job_status(id, status).unwrap();
    }
    world
        .job_completed(
            id,
            if cancelled {
                Outcome::Cancelled
            } else {
                Outcome::Success
            },
        )
        .unwrap();
    world.job_status(id, JobStatus::Concluded).unwrap();
    if auto_dismiss {
        world.job_status(id, JobStatus::Null).unwrap();
    } else {
        let id = json!({"id": id});
        world.execute(&Command::new("job-dismiss", &id)).unwrap();
        world
            .job_status(id["id"].as_str().unwrap(), JobStatus::Null)
            .unwrap();
    }
}

/// A world after some commands; every one of them kept the invariants.
fn run(commands: &[(&'static str, Value)]) -> Result<World, TestCaseError> {
    let mut world = world();
    for (name, arguments) in commands {
        let before = world.clone();
        if *name == "end-job" {
            end_job(&mut world, arguments["id"].as_str().unwrap());
        } else {
            let predicted = world.check(&Command::new(name, arguments));
            prop_assert_eq!(&world, &before, "a prediction changes nothing");
            let result = world.execute(&Command::new(name, arguments));
            prop_assert_eq!(&result, &predicted);
            match &result {
                Ok(_) if *name == "block-stream" => {
                    let id = arguments["job-id"].as_str().unwrap();
                    world.job_status(id, JobStatus::Created).unwrap();
                    world.job_status(id, JobStatus::Running).unwrap();
                }
                Ok(_) => {}
                Err(refusal) => {
                    if let Some(id) = &refusal.early_failed_job {
                        world.job_status(id, JobStatus::Created).unwrap();
                        world.job_status(id, JobStatus::Null).unwrap();
                    }
                    world.auto_names = before.auto_names;
                    prop_assert_eq!(&world, &before, "{} was refused", name);
                }
            }
        }
        prop_assert_eq!(world.graph.check(), Ok(()), "after {} {}", name, arguments);
        prop_assert_eq!(
            world.graph.looser_than_from_scratch(),
            vec![],
            "after {} {}",
            name,
            arguments
        );
    }
    Ok(world)
}

/// The chain of a node, by following what the drivers say is below.
fn naive_chain(graph: &Graph, top: NodeId) -> Vec<NodeId> {
    let mut chain = vec![top];
    while let Some(next) =
        graph
            .children(*chain.last().unwrap())
            .map(|(_, edge)| edge)
            .find(|edge| match edge.parent {
                blkcheck_model::Parent::Node(parent) => match graph.node(parent).driver {
                    Driver::CopyOnRead => edge.name == "file",
                    Driver::Qcow2 => edge.name == "backing",
                    _ => false,
                },
                _ => unreachable!("children have a node above"),
            })
    {
        chain.push(next.child);
    }
    chain
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn invariants_hold_and_walks_are_what_they_say(commands in prop::collection::vec(command(), 1..40)) {
        let world = run(&commands)?;
        let graph = &world.graph;
        let is_filter = |id: &NodeId| graph.node(*id).driver == Driver::CopyOnRead;
        for (id, _) in graph.nodes() {
            let chain = naive_chain(graph, id);
            prop_assert_eq!(graph.chain(id).collect::<Vec<_>>(), chain.clone());
            let layers: Vec<NodeId> = chain.iter().copied().filter(|id| !is_filter(id)).collect();
            if !layers.is_empty() && !is_filter(chain.last().unwrap()) {
                prop_assert_eq!(graph.skip_filters(id), layers[0]);
                prop_assert_eq!(graph.backing_chain_next(id), layers.get(1).copied());
                prop_assert_eq!(graph.find_base(id), *layers.last().unwrap());
                for pair in layers.windows(2) {
                    prop_assert_eq!(graph.find_overlay(id, Some(pair[1])), Some(pair[0]));
                }
                prop_assert_eq!(graph.find_overlay(id, Some(layers[0])), None);
            }
            for (other, _) in graph.nodes() {
                prop_assert_eq!(graph.chain_contains(id, other), chain.contains(&other));
            }
        }
    }

    /// Refreshing everything once more changes nothing; freezing and thawing balance.
    #[test]
    fn refresh_is_idempotent_and_freezing_balances(commands in prop::collection::vec(command(), 1..40)) {
        let mut world = run(&commands)?;
        let all: Vec<NodeId> = world.graph.nodes().map(|(id, _)| id).collect();
        let mut refreshed = world.graph.clone();
        refreshed.refresh(&all).unwrap();
        let masks: std::collections::BTreeMap<_, _> = refreshed.edges().map(|(id, edge)| (id, edge.masks)).collect();
        prop_assert_eq!(&masks, &refreshed.masks_from_scratch());

        for id in world.jobs.iter().map(|job| job.id.clone()).collect::<Vec<_>>() {
            end_job(&mut world, &id);
        }
        let filters_with_bottom = world.graph.nodes().filter(|(_, node)| node.bottom.is_some()).map(|(id, _)| id).collect::<Vec<_>>();
        for (_, edge) in world.graph.edges() {
            prop_assert!(edge.frozen_by.is_none_or(|holder| filters_with_bottom.contains(&holder)));
        }
        for filter in filters_with_bottom {
            world.graph.unfreeze(filter);
        }
        prop_assert!(world.graph.edges().all(|(_, edge)| edge.frozen_by.is_none()));
    }
}

/// The random commands do reach streams; otherwise the properties above say little.
#[test]
fn streams_do_happen() {
    use proptest::strategy::{Strategy, ValueTree};
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let strategy = prop::collection::vec(command(), 40);
    let jobs: usize = (0..50)
        .map(|_| {
            let commands = strategy.new_tree(&mut runner).unwrap().current();
            run(&commands).unwrap().jobs.len()
        })
        .sum();
    assert!(jobs > 10, "{jobs} jobs in 50 worlds");
}
