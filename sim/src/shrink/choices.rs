//! Shrinking the schedule: towards 0, which is "no switch, no fault, in order".

use super::Search;

pub(super) fn pass(search: &mut Search<'_>) {
    clear_all(search);
    gather(search);
    clear_stretches(search);
    lower_each(search);
}

fn clear_all(search: &mut Search<'_>) {
    let mut candidate = search.best.clone();
    candidate.choices.clear();
    search.offer_exact(candidate);
}

/// Lets what goes on go on: fewer switches between steps.
fn gather(search: &mut Search<'_>) {
    let mut at = 0;
    while at < search.path.len() && !search.spent() {
        if let Some(path) = search.path.gathered(at) {
            search.offer_path(&path);
        }
        let next = search.path.switches().find(|&i| i > at);
        at = next.unwrap_or(usize::MAX);
    }
}

/// Zeroes ever shorter stretches of the choices.
fn clear_stretches(search: &mut Search<'_>) {
    let mut width = search.best.choices.len().div_ceil(2).max(1);
    loop {
        let mut start = 0;
        while start < search.best.choices.len() && !search.spent() {
            let end = (start + width).min(search.best.choices.len());
            if search.best.choices[start..end].iter().any(|&c| c != 0) {
                let mut candidate = search.best.clone();
                candidate.choices[start..end].fill(0);
                search.offer_exact(candidate);
            }
            start = end.max(start + 1);
        }
        if width == 1 {
            break;
        }
        width /= 2;
    }
}

fn lower_each(search: &mut Search<'_>) {
    let mut at = 0;
    while at < search.best.choices.len() && !search.spent() {
        if search.best.choices[at] > 1 {
            let mut candidate = search.best.clone();
            candidate.choices[at] = 1;
            search.offer_exact(candidate);
        }
        at += 1;
    }
}
