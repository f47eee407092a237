//! A command is refused as the model says, with its class and its text, and then changes nothing; a command that the
//! model accepts is accepted.
//!
//! "Changes nothing" is checked twice: the graph oracle compares the settled graph with a model that did not change,
//! and here the layer's own books before and after are compared where the target is in this process.
//! Unchecked: texts of refusals that come from failing storage, the answers of queries, and books that drained
//! sections and requests change beside a command (counters).

use blkcheck_impl::graph::inspect::GraphView;
use blkcheck_model::Refusal as Predicted;
use serde_json::Value;

use super::liveness::step_text;
use super::{OracleName, Violation, violation};
use crate::history::{Refusal, StepId};
use crate::scenario::Scenario;

/// Judges an answer.
pub(crate) fn judge(
    scenario: &Scenario,
    step: StepId,
    predicted: Option<&Result<Value, Predicted>>,
    got: &Result<Value, Refusal>,
) -> Result<(), Violation> {
    let wrong = match (predicted, got) {
        (Some(Ok(_)), Ok(_)) | (None, _) => return Ok(()),
        (Some(Err(p)), Err(g)) if p.class.name() == g.class && p.desc == g.desc => return Ok(()),
        (Some(Err(_)), Err(_)) => "is refused in other words than it should be",
        (Some(Err(_)), Ok(_)) => "is accepted, but should be refused",
        (Some(Ok(_)), Err(_)) => "is refused, but should be accepted",
    };
    let expected = match predicted {
        Some(Err(p)) => format!("expected: {}: {}", p.class.name(), p.desc),
        _ => "expected: accepted".to_owned(),
    };
    let found = match got {
        Err(g) => format!("found:    {}: {}", g.class, g.desc),
        Ok(value) => format!("found:    accepted, {value}"),
    };
    let message = format!("{} {wrong}", step_text(scenario, step));
    Err(violation(
        OracleName::Refusals,
        Some(step),
        message,
        vec![expected, found],
    ))
}

/// What a refused command changed after all: the first difference between two views, leaving out counters that
/// others change meanwhile.
pub(crate) fn difference(before: &GraphView, after: &GraphView) -> Option<String> {
    if before.nodes.len() != after.nodes.len() {
        return Some(format!(
            "{} nodes before, {} after",
            before.nodes.len(),
            after.nodes.len()
        ));
    }
    for (b, a) in before.nodes.iter().zip(&after.nodes) {
        let same = b.id == a.id
            && b.flags == a.flags
            && b.refcnt == a.refcnt
            && b.monitor_owned == a.monitor_owned
            && b.implicit == a.implicit
            && b.inherits_from == a.inherits_from
            && b.file == a.file
            && b.backing == a.backing
            && same_set(&b.blockers, &a.blockers)
            && b.backing_header == a.backing_header
            && b.parents.len() == a.parents.len()
            && b.children.len() == a.children.len();
        if !same {
            return Some(format!("node '{}' before: {b:?}; after: {a:?}", b.name));
        }
    }
    if before.edges.len() != after.edges.len() {
        return Some(format!(
            "{} edges before, {} after",
            before.edges.len(),
            after.edges.len()
        ));
    }
    before.edges.iter().zip(&after.edges).find_map(|(b, a)| {
        let same = b.id == a.id
            && b.child == a.child
            && b.perm == a.perm
            && b.shared == a.shared
            && b.frozen == a.frozen
            && b.role == a.role;
        (!same).then(|| format!("edge before: {b:?}; after: {a:?}"))
    })
}

/// In any order: parents that were moved and came back are in another one.
fn same_set<T: PartialEq>(a: &[T], b: &[T]) -> bool {
    a.len() == b.len() && a.iter().all(|one| b.contains(one))
}

#[cfg(test)]
mod tests {
    use blkcheck_impl::types::{EdgeId, NodeId, Perm, Role};
    use serde_json::json;

    use super::super::tests::scenario_of;
    use super::*;

    #[test]
    fn class_and_text_must_match() {
        let scenario = scenario_of(
            r#"{"version":1,"grain":64,"images":[],"steps":[{"actor":"m","execute":"job-pause"}]}"#,
        );
        let got = |desc: &str| {
            Err(Refusal {
                class: "GenericError".to_owned(),
                desc: desc.to_owned(),
            })
        };
        let judge = |p: Result<Value, Predicted>, g: Result<Value, Refusal>| {
            judge(&scenario, StepId(0), Some(&p), &g)
        };
        let no = || Err(Predicted::new("Job not found"));
        assert_eq!(judge(no(), got("Job not found")), Ok(()));
        assert_eq!(judge(Ok(json!({})), Ok(json!({}))), Ok(()));
        assert!(
            judge(no(), got("job not found"))
                .expect_err("text")
                .message
                .contains("in other words")
        );
        assert!(
            judge(no(), Ok(json!({})))
                .expect_err("accepted")
                .message
                .contains("should be refused")
        );
        assert!(
            judge(Ok(json!({})), got("x"))
                .expect_err("refused")
                .message
                .contains("should be accepted")
        );
    }

    #[test]
    fn a_changed_mask_is_a_difference_and_an_equal_view_is_none() {
        let edge = blkcheck_impl::graph::inspect::EdgeView {
            id: EdgeId(0),
            name: "file".into(),
            parent: blkcheck_impl::event::Parent::Node(NodeId(1)),
            role: Role::IMAGE,
            child: Some(NodeId(0)),
            perm: Perm::CONSISTENT_READ,
            shared: Perm::all(),
            frozen: false,
            quiesced_parent: false,
        };
        let before = GraphView {
            edges: vec![edge],
            ..GraphView::default()
        };
        let mut after = before.clone();
        after.drain_all = 1;
        assert_eq!(difference(&before, &after), None);
        after.edges[0].perm = Perm::WRITE;
        assert!(
            difference(&before, &after)
                .expect("differs")
                .starts_with("edge before")
        );
    }
}
