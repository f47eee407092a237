//! Shrinking the images: fewer layers and fills, smaller sizes, plainer storage.

use serde_json::Value;

use super::Search;
use crate::scenario::{Action, Format, Scenario};

pub(super) fn pass(search: &mut Search<'_>) {
    drop_layers(search);
    drop_nested_layers(search);
    drop_unused(search);
    shrink_fills(search);
    shrink_sizes(search);
    plain_storage(search);
}

/// Takes one node out of the middle of a chain: what referred to it refers to its own backing node.
fn drop_layers(search: &mut Search<'_>) {
    let mut at = 0;
    while at < search.best.steps.len() && !search.spent() {
        let dropped = without_layer(&search.best, at).is_some_and(|candidate| search.offer(candidate));
        at += usize::from(!dropped);
    }
}

fn without_layer(scenario: &Scenario, at: usize) -> Option<Scenario> {
    let Action::Command { execute, arguments } = &scenario.steps[at].action else {
        return None;
    };
    let name = arguments
        .get("node-name")
        .filter(|_| execute == "blockdev-add")?
        .clone();
    let below = arguments.get("backing").cloned().unwrap_or(Value::Null);
    let mut candidate = scenario.clone();
    candidate.steps.remove(at);
    let mut used = false;
    for step in &mut candidate.steps {
        let Action::Command { arguments, .. } = &mut step.action else {
            continue;
        };
        if arguments.get("backing") == Some(&name) {
            arguments.insert("backing".to_owned(), below.clone());
            used = true;
        }
    }
    used.then_some(candidate)
}

/// The same for a layer that is written out inside the node above it.
fn drop_nested_layers(search: &mut Search<'_>) {
    for at in 0..search.best.steps.len() {
        let mut nth = 0;
        while let Some(candidate) = without_nested(&search.best, at, nth) {
            if search.spent() {
                return;
            }
            nth += usize::from(!search.offer(candidate));
        }
    }
}

/// The scenario without the `nth` layer, from the top, that is nested in the step at `at`.
fn without_nested(scenario: &Scenario, at: usize, nth: usize) -> Option<Scenario> {
    let mut candidate = scenario.clone();
    let Action::Command { execute, arguments } = &mut candidate.steps[at].action else {
        return None;
    };
    if execute != "blockdev-add" {
        return None;
    }
    let mut node = arguments;
    let mut left = nth;
    loop {
        let slot = ["backing", "file"]
            .into_iter()
            .find(|key| node.get(*key).is_some_and(Value::is_object))?;
        let (below, nested) = (slot == "backing", node.get_mut(slot)?);
        if below && left == 0 {
            *nested = nested.get("backing").cloned().unwrap_or(Value::Null);
            return Some(candidate);
        }
        left -= usize::from(below);
        node = nested.as_object_mut()?;
    }
}

/// Images that no step names, directly or through a header.
fn drop_unused(search: &mut Search<'_>) {
    let mut at = search.best.images.len();
    while at > 0 {
        at -= 1;
        let mut candidate = search.best.clone();
        let gone = candidate.images.remove(at);
        forget_image(&mut candidate, at);
        for image in &mut candidate.images {
            if image.backing_file.as_deref() == Some(gone.file.as_str()) {
                image.backing_file.clone_from(&gone.backing_file);
                image.backing_format.clone_from(&gone.backing_format);
            }
        }
        search.offer(candidate);
    }
}

/// Faults on the image that was at `at` are faults anywhere; later images have moved up.
fn forget_image(scenario: &mut Scenario, at: usize) {
    let Some(faults) = &mut scenario.disk.faults else {
        return;
    };
    faults.image = match faults.image {
        Some(image) if image as usize == at => None,
        Some(image) if image as usize > at => Some(image - 1),
        same => same,
    };
}

fn shrink_fills(search: &mut Search<'_>) {
    for image in 0..search.best.images.len() {
        while search.best.images[image].free > 0 {
            let mut candidate = search.best.clone();
            candidate.images[image].free /= 2;
            if !search.offer(candidate) {
                break;
            }
        }
    }
    for image in 0..search.best.images.len() {
        let mut at = search.best.images[image].fill.len();
        while at > 0 && !search.spent() {
            at -= 1;
            let mut candidate = search.best.clone();
            candidate.images[image].fill.remove(at);
            if search.offer(candidate) {
                continue;
            }
            loop {
                let cluster = u64::from(search.best.images[image].cluster_size);
                let fill = &search.best.images[image].fill[at];
                let half = (fill.length / 2).next_multiple_of(cluster);
                if half >= fill.length {
                    break;
                }
                let mut front = search.best.clone();
                front.images[image].fill[at].length = half;
                let mut back = search.best.clone();
                back.images[image].fill[at].offset += half;
                back.images[image].fill[at].length -= half;
                if !(search.offer(front) || search.offer(back)) {
                    break;
                }
            }
        }
    }
}

/// Halves sizes, of all images together first.
fn shrink_sizes(search: &mut Search<'_>) {
    let halve = |candidate: &mut Scenario, which: Option<usize>| {
        for (i, image) in candidate.images.iter_mut().enumerate() {
            if which.is_none_or(|w| w == i) {
                let unit = if image.format == Format::Qcow2 {
                    512
                } else {
                    u64::from(candidate.grain).max(512)
                };
                image.size = (image.size / 2).next_multiple_of(unit).max(unit);
                let size = image.size;
                image.fill.retain(|f| f.offset < size);
                for fill in &mut image.fill {
                    fill.length = fill.length.min(size - fill.offset);
                }
            }
        }
    };
    let images = search.best.images.len();
    for which in std::iter::once(None).chain((0..images).map(Some)) {
        loop {
            let mut candidate = search.best.clone();
            halve(&mut candidate, which);
            if !search.offer(candidate) {
                break;
            }
        }
    }
}

/// Buffered storage, one chunk at a time, the plain format, 512-byte clusters.
fn plain_storage(search: &mut Search<'_>) {
    let mut candidate = search.best.clone();
    candidate.disk.alignment = 1;
    search.offer(candidate);
    let mut candidate = search.best.clone();
    candidate.disk.job_parallelism = 1;
    search.offer(candidate);
    for at in 0..search.best.images.len() {
        let mut candidate = search.best.clone();
        (candidate.images[at].compat, candidate.images[at].refcount_bits) = (3, 16);
        search.offer(candidate);
        if search.best.images[at].format == Format::Qcow2 && search.best.images[at].cluster_size > 512 {
            let mut candidate = search.best.clone();
            candidate.images[at].cluster_size = 512;
            search.offer(candidate);
        }
    }
}
