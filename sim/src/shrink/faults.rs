//! Shrinking the faults: none at all, else as few requests as possible that may fail, and the power as early as possible.

use super::Search;
use crate::scenario::{Faults, Scenario};

/// More requests than a run has.
const ENDLESS: u32 = 4096;

/// How much may fail.
pub(super) fn weight(scenario: &Scenario) -> u64 {
    let power = scenario.disk.power_cut.map_or(0, |after| 1 + u64::from(after));
    let Some(faults) = scenario.disk.faults else {
        return power;
    };
    let until = faults.until.unwrap_or(ENDLESS).min(ENDLESS);
    let window = u64::from(until.saturating_sub(faults.from));
    let kinds = u64::from(faults.reads) + u64::from(faults.writes) + u64::from(faults.flushes);
    power + 1 + window + 16 * kinds + u64::from(faults.setup) + u64::from(faults.one_in.min(ENDLESS))
}

pub(super) fn pass(search: &mut Search<'_>) {
    power_cut(search);
    let mut candidate = search.best.clone();
    candidate.disk.faults = None;
    search.offer(candidate);
    for change in [
        |f: &mut Faults| f.one_in = 1,
        |f: &mut Faults| f.setup = false,
        |f: &mut Faults| f.reads = false,
        |f: &mut Faults| f.flushes = false,
        |f: &mut Faults| f.writes = false,
    ] {
        narrow(search, change);
    }
    // The window: its end, then its start, by ever smaller pieces.
    while !search.spent() {
        let halved = narrow(search, |f| {
            let until = f.until.unwrap_or(ENDLESS);
            f.until = Some(f.from + until.saturating_sub(f.from) / 2);
        });
        let later = narrow(search, |f| {
            let until = f.until.unwrap_or(ENDLESS);
            f.from += until.saturating_sub(f.from).div_ceil(2);
        });
        let ends = narrow(search, |f| f.until = f.until.map(|until| until.saturating_sub(1)));
        let starts = narrow(search, |f| f.from += 1);
        if !(halved || later || ends || starts) {
            break;
        }
    }
}

fn power_cut(search: &mut Search<'_>) {
    let mut without = search.best.clone();
    without.disk.power_cut = None;
    search.offer(without);
    while let Some(after) = search
        .best
        .disk
        .power_cut
        .filter(|after| *after > 0 && !search.spent())
    {
        let earlier = |search: &mut Search<'_>, to| {
            let mut candidate = search.best.clone();
            candidate.disk.power_cut = Some(to);
            search.offer(candidate)
        };
        if !(earlier(search, after / 2) || earlier(search, after - 1)) {
            break;
        }
    }
}

/// Offers the best one with its faults changed.
fn narrow(search: &mut Search<'_>, change: impl Fn(&mut Faults)) -> bool {
    let mut candidate = search.best.clone();
    let Some(faults) = &mut candidate.disk.faults else {
        return false;
    };
    change(faults);
    search.offer(candidate)
}
