//! Tests of [`super`].

use super::*;
use crate::perm::Perm;

fn chain() -> (Graph, Vec<NodeId>) {
    let mut graph = Graph::new();
    let ids: Vec<NodeId> = ["base", "mid", "top"]
        .iter()
        .map(|name| {
            let id = graph.add_node(Node::new(name, Driver::Qcow2));
            graph.node_mut(id).monitor_owned = true;
            id
        })
        .collect();
    for pair in ids.windows(2) {
        graph.set_backing(pair[1], Some(pair[0])).unwrap();
    }
    (graph, ids)
}

#[test]
fn a_section_drains_everything_above() {
    let (graph, ids) = chain();
    let counters = graph.quiesce_counters(&BTreeMap::from([(ids[1], 1)]), 0);
    assert_eq!(counters, BTreeMap::from([(ids[0], 0), (ids[1], 1), (ids[2], 1)]));
    // drain-all: own section plus one per drained child
    let counters = graph.quiesce_counters(&BTreeMap::new(), 1);
    assert_eq!(counters, BTreeMap::from([(ids[0], 1), (ids[1], 2), (ids[2], 2)]));
}

#[test]
fn a_node_closes_when_the_last_reference_goes() {
    let (mut graph, ids) = chain();
    graph.node_mut(ids[0]).monitor_owned = false;
    graph.node_mut(ids[1]).monitor_owned = false;
    graph.reap();
    assert_eq!(graph.nodes().count(), 3, "the chain holds them");
    graph.set_backing(ids[2], None).unwrap();
    graph.reap();
    assert_eq!(graph.nodes().map(|(id, _)| id).collect::<Vec<_>>(), [ids[2]]);
}

#[test]
fn masks_below_a_node_that_is_let_go_of_follow_only_where_that_is_said() {
    for refreshes in [false, true] {
        let (mut graph, ids) = chain();
        if refreshes {
            graph.refresh_what_is_let_go();
        }
        let masks = Masks::new(Perm::CONSISTENT_READ, Perm::all());
        let export = Parent::Export(Rc::from("x"));
        graph.attach_root(export, ids[2], "root", masks).unwrap();
        assert!(graph.cumulative(ids[0]).perm.contains(Perm::CONSISTENT_READ));
        graph.set_backing(ids[2], None).unwrap();
        assert_eq!(
            graph.cumulative(ids[0]).perm.contains(Perm::CONSISTENT_READ),
            !refreshes,
            "refreshes: {refreshes}"
        );
    }
}

#[test]
fn check_sees_a_conflict() {
    let (mut graph, ids) = chain();
    graph.check().unwrap();
    let root = |id: &str, masks| Edge {
        name: "root",
        role: Role::empty(),
        parent: Parent::Export(Rc::from(id)),
        child: ids[2],
        masks,
        frozen_by: None,
    };
    graph.add_edge(root("a", Masks::new(Perm::WRITE, Perm::all())));
    graph.add_edge(root("b", Masks::new(Perm::empty(), Perm::CONSISTENT_READ)));
    let text = graph.check().unwrap_err();
    assert!(
        text.starts_with("Permission conflict on node 'top': permissions 'write' are both"),
        "{text}"
    );
}
