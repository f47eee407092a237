//! A run as one self-contained page: verdict, the chain before and after with permissions and frozen links, and a
//! timeline with one lane per actor. No script, no outside resource.

use std::collections::BTreeSet;

use minijinja::{Environment, context};
use serde::Serialize;

use super::timeline::{self, Line};
use crate::history::Record;
use crate::oracle::Violation;
use crate::scenario::Scenario;

#[derive(Serialize)]
struct Row {
    at: usize,
    cells: Vec<String>,
    detail: bool,
    blamed: bool,
}

/// The page.
///
/// # Panics
/// Never: the template is part of the program and tested.
#[must_use]
pub fn page(title: &str, scenario: &Scenario, records: &[Record], violation: Option<&Violation>) -> String {
    let (before, after) = super::graphs(scenario, records);
    let lines = timeline::lines(scenario, records);
    let lanes: Vec<String> = lanes(&lines);
    let rows: Vec<Row> = lines.iter().map(|line| row(line, &lanes, violation)).collect();
    let mut env = Environment::new();
    env.add_template("page.html", include_str!("page.html"))
        .expect("the template is well formed");
    let page = env.get_template("page.html").expect("just added");
    page.render(context! {
        title,
        verdict => violation.map(|v| v.oracle.as_str()),
        message => violation.map(super::verdict),
        listing => crate::scenario::listing::listing(scenario),
        before => before.draw(),
        after => after.draw(),
        lanes,
        rows,
    })
    .expect("all values are given")
}

/// Actors first, jobs, the layer last.
fn lanes(lines: &[Line]) -> Vec<String> {
    let names: BTreeSet<&str> = lines.iter().map(|l| l.lane.as_str()).collect();
    let rank = |name: &str| match name {
        "layer" => 3,
        "teardown" => 2,
        job if job.starts_with("job ") => 1,
        _ => 0,
    };
    let mut names: Vec<String> = names.into_iter().map(str::to_owned).collect();
    names.sort_by_key(|n| (rank(n), n.clone()));
    names
}

fn row(line: &Line, lanes: &[String], violation: Option<&Violation>) -> Row {
    let cells = lanes
        .iter()
        .map(|l| {
            if *l == line.lane {
                line.text.clone()
            } else {
                String::new()
            }
        })
        .collect();
    let blamed = violation.is_some_and(|v| v.step.is_some() && v.step == line.step);
    Row {
        at: line.at,
        cells,
        detail: line.detail,
        blamed,
    }
}
