//! Whole runs of hand-written scenarios against reviewed snapshots: the story, the graph before and after,
//! permissions, allocation, the verdict.
//! `INSTA_UPDATE=always cargo test --test snapshots` writes them anew; the diff is then for a person to judge.

mod common;

use common::{assert_snapshot, load, replay, scenario_files};

#[test]
fn every_hand_written_scenario_is_as_reviewed() {
    let files: Vec<_> = scenario_files("docs/examples")
        .into_iter()
        .chain(scenario_files("tests/scenarios"))
        .collect();
    assert!(files.len() >= 6, "only {} scenarios", files.len());
    for path in files {
        let run = replay(&load(&path));
        assert_snapshot("run", &path, &run);
        assert!(run.violation.is_none(), "{}: {:?}", path.display(), run.violation);
        assert!(
            !run.allocation.is_empty(),
            "{}: no node at the end",
            path.display()
        );
    }
}
