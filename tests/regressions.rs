//! Every scenario that once showed a bug passes now, and runs as its reviewed snapshot says.
//! `expect` in a file names the oracle that fired then; it is a record of the past, not what the replay must find.

mod common;

use blkcheck_sim::oracle::OracleName;
use common::{assert_snapshot, load, replay, scenario_files};

#[test]
fn fixed_bugs_stay_fixed() {
    let files = scenario_files("tests/regressions");
    assert!(!files.is_empty(), "no regression to check");
    for path in files {
        let scenario = load(&path);
        let run = replay(&scenario);
        assert!(
            run.violation.is_none(),
            "{} is back: {:?}",
            path.display(),
            run.violation
        );
        assert_snapshot("regression", &path, &run);
        let again = replay(&scenario);
        assert_eq!(run.trace_hash, again.trace_hash, "{}", path.display());
    }
}

#[test]
fn every_regression_says_what_fired() {
    let names: Vec<&str> = [
        OracleName::Data,
        OracleName::Transparency,
        OracleName::Graph,
        OracleName::Permissions,
        OracleName::Jobs,
        OracleName::Refusals,
        OracleName::Liveness,
        OracleName::Panic,
        OracleName::Image,
        OracleName::Leaks,
        OracleName::Drain,
        OracleName::Frozen,
        OracleName::Status,
        OracleName::Bottom,
        OracleName::Bitmap,
        OracleName::PointInTime,
    ]
    .iter()
    .map(|n| n.as_str())
    .collect();
    for path in scenario_files("tests/regressions") {
        let scenario = load(&path);
        let expect = scenario
            .expect
            .unwrap_or_else(|| panic!("{}: no `expect`", path.display()));
        assert!(
            names.contains(&expect.as_str()),
            "{}: no oracle '{expect}'",
            path.display()
        );
        let title = scenario.title.unwrap_or_default();
        assert!(
            !title.is_empty(),
            "{}: a title says what went wrong",
            path.display()
        );
    }
}
