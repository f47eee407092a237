//! `blkcheck replay`: one scenario file exactly as recorded.

use serde_json::json;

use super::args::ReplayArgs;
use super::{CliError, Found, load, print_out};
use crate::harness::{Harness, Setup};
use crate::report;

pub(super) fn replay(args: &ReplayArgs) -> Result<Found, CliError> {
    super::check_tier(args.on, args.tier)?;
    let scenario = load(&args.file)?;
    let setup = Setup {
        on: args.on,
        qemu: args.qemu.as_deref().map(super::lasting),
        tier: args.tier,
        ..Setup::default()
    };
    let stress = setup.is_stress();
    let mut harness = Harness::new(&setup)?;
    let replayed = harness.replay(&scenario)?;
    let violation = replayed.violation.as_ref();
    if let Some(out) = &args.html {
        let title = scenario
            .title
            .clone()
            .unwrap_or_else(|| args.file.display().to_string());
        let title = if stress {
            format!("{title} ({})", report::NOT_DETERMINISTIC)
        } else {
            title
        };
        let page = report::html::page(&title, &replayed.scenario, &replayed.records, violation);
        std::fs::write(out, page).map_err(|source| CliError::File {
            path: out.display().to_string(),
            source,
        })?;
    }
    if args.json {
        print_out(
            &json!({
                "verdict": if violation.is_some() { "fail" } else { "pass" },
                "oracle": violation.map(|v| v.oracle.as_str()),
                "message": violation.map(|v| &v.message),
                "step": violation.and_then(|v| v.step).map(|s| s.0),
                "known": replayed.known.map(|d| d.id),
                "trace_hash": (!stress).then(|| format!("{:016x}", replayed.trace_hash)),
                "deterministic": !stress,
            })
            .to_string(),
        );
    } else {
        if args.trace {
            let lines = report::timeline::lines(&replayed.scenario, &replayed.records);
            print_out(report::timeline::render(&lines, false, usize::MAX).trim_end());
        }
        match violation {
            None if stress => print_out(&format!("pass  {}", report::NOT_DETERMINISTIC)),
            None => print_out(&format!("pass  trace {:016x}", replayed.trace_hash)),
            Some(v) => {
                let said = format!("FAIL  {}\n{}", v.oracle.as_str(), report::verdict(v).trim_end());
                print_out(&said);
                if stress {
                    print_out(report::NOT_DETERMINISTIC);
                }
            }
        }
        if let Some(defect) = replayed.known {
            print_out(&format!("known  {}: {}", defect.id, defect.title));
        }
    }
    Ok(if violation.is_some() {
        Found::Something
    } else {
        Found::Nothing
    })
}
