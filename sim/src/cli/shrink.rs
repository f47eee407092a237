//! `blkcheck shrink`: the smallest scenario found in which the same oracle still fails.

use super::args::ShrinkArgs;
use super::{CliError, Found, load, print_out, save};
use crate::harness::{Harness, Setup};
use crate::shrink::Limits;

pub(super) fn shrink(args: &ShrinkArgs) -> Result<Found, CliError> {
    let scenario = load(&args.file)?;
    let mut harness = Harness::new(&Setup::default())?;
    let Some(violation) = harness.replay(&scenario)?.violation else {
        return Err(CliError::Request(format!(
            "{}: passes, so there is nothing to shrink; a scenario to shrink must fail when replayed",
            args.file.display()
        )));
    };
    let limits = Limits {
        executions: 60_000,
        ..Limits::default()
    };
    let shrunk =
        crate::shrink::shrink(&scenario, violation.oracle, limits, &mut harness).ok_or_else(|| {
            CliError::Request(format!(
                "{}: fails only now and then; replay it twice and compare",
                args.file.display()
            ))
        })?;
    save(&args.output, &shrunk.scenario)?;
    print_out(&format!(
        "{} -> {} steps, {} -> {} images after {} executions: {}\n{}",
        scenario.steps.len(),
        shrunk.scenario.steps.len(),
        scenario.images.len(),
        shrunk.scenario.images.len(),
        shrunk.executions,
        args.output.display(),
        report_line(&shrunk.violation),
    ));
    Ok(Found::Something)
}

fn report_line(violation: &crate::oracle::Violation) -> String {
    format!("{}: {}", violation.oracle.as_str(), violation.message)
}
