//! When the power fails with `--faults crash`; and what may fail in a run with `--faults errors`: which requests, and what the monitor does about it.
//!
//! Swarm style: mostly a short window in which the next few requests fail, so that a run sees one or two faults and goes
//! on; sometimes a low rate all along, sometimes a file that fails for good. Draws from a stream of its own, so a seed's
//! workload is that of a run without faults, but for what is added here: jobs get an error policy more often, and the
//! monitor looks after those that stop.

use serde_json::{Map, Value, json};

use super::backup::{after_setup, backups_of, insert, place};
use super::monitor::MONITOR;
use super::{SETUP, command, names};
use crate::rng::{Rng, Stream};
use crate::scenario::{Action, Faults, Fill, Format, GuestOp, Image, Scenario, Step, Stored, WaitJob};

/// Lets storage fail in this scenario.
pub fn add_faults(scenario: &mut Scenario, seed: u64) {
    let rng = &mut Rng::stream(seed, Stream::FaultPlan);
    let plan = plan(rng, scenario.images.len());
    scenario.disk.faults = Some(plan);
    look_after_streams(rng, &mut scenario.steps);
    look_after_backups(rng, plan, &mut scenario.steps);
}

/// Lets the power fail in this scenario. `widely`: lengths change, and images have free clusters that hold something.
pub fn add_power_cut(scenario: &mut Scenario, seed: u64, widely: bool) {
    let rng = &mut Rng::stream(seed, Stream::PowerCut);
    // A run has tens to hundreds of requests; whichever has fewer ends in an orderly way.
    let scale = *rng.pick(&[8, 32, 64, 128, 256]);
    scenario.disk.power_cut = Some(rng.below(scale));
    if rng.chance(1, 2) {
        // What a flush is to put in order is in doubt just before it ends.
        let scale = *rng.pick(&[1, 2, 4, 8, 16]);
        scenario.disk.cut_at_flush = true;
        scenario.disk.power_cut = Some(rng.below(scale));
    }
    let rng = &mut Rng::stream(seed, Stream::DurableBackups);
    make_durable(rng, &mut scenario.steps);
    let rng = &mut Rng::stream(seed, Stream::LengthsBeforePowerCut);
    if widely && rng.chance(1, 4) {
        change_lengths(rng, scenario);
    }
    if widely && rng.chance(1, 2) {
        // What is lost then shows what was there before, and that is no table.
        for image in scenario.images.iter_mut().filter(|i| i.format == Format::Qcow2) {
            image.free = rng.below(12);
        }
    }
    let rng = &mut Rng::stream(seed, Stream::LongNames);
    if rng.chance(1, 2) && scenario.images.iter().all(|image| image.cluster_size >= 4096) {
        lengthen_names(rng, &mut scenario.steps);
    }
}

/// Opens one more overlay of the base, which nobody uses, and gives it other lengths, mostly longer ones: tables grow with them, and
/// what lies below must not show.
fn change_lengths(rng: &mut Rng, scenario: &mut Scenario) {
    let base = scenario.images.first().filter(|image| image.file == "i0.img");
    let named = names(&scenario.steps).iter().any(|name| name == "n0");
    let Some(base) = base.filter(|_| named) else {
        return;
    };
    let cluster_size = *rng.pick(&[512u32, 512, 4096]);
    let clusters = u32::try_from(base.size / u64::from(cluster_size)).expect("small images");
    let mut size = u64::from(1 + rng.below(clusters.max(1))) * u64::from(cluster_size);
    if rng.chance(1, 2) {
        size = (size - u64::from(rng.below(cluster_size / 512)) * 512).max(512);
    }
    let filled = rng.chance(1, 2).then_some(Fill {
        offset: 0,
        length: size,
        stored: Stored::Data,
    });
    scenario.images.push(Image {
        file: "z0.img".to_owned(),
        format: Format::Qcow2,
        size,
        cluster_size,
        compat: 3,
        refcount_bits: 16,
        backing_file: Some(base.file.clone()),
        backing_format: Some(base.format.driver().to_owned()),
        free: 0,
        fill: filled.into_iter().collect(),
    });
    let add = json!({"driver": "qcow2", "node-name": "z0", "backing": "n0",
        "file": {"driver": "file", "filename": "z0.img"}});
    let at = after_setup(scenario);
    let mut at = insert(scenario, at, vec![command(SETUP, "blockdev-add", add)]);
    for _ in 0..1 + rng.below(4) {
        let by = u64::from(*rng.pick(&[512u32, 4096, 32768, 32768, 65536]));
        size = match rng.below(4) {
            0 => size.saturating_sub(by).max(512),
            _ => size + by,
        };
        let resize = command(MONITOR, "block_resize", json!({"node-name": "z0", "size": size}));
        at = place(rng, scenario, at);
        at = insert(scenario, at, vec![resize]);
    }
}

/// Makes the names that commands put into headers so long that they do not fit into the first sector, which is written last.
fn lengthen_names(rng: &mut Rng, steps: &mut [Step]) {
    for step in steps {
        let Action::Command { execute, arguments } = &mut step.action else {
            continue;
        };
        if execute == "block-stream"
            && !arguments.contains_key("backing-file")
            && let Some(base) = arguments.get("base").cloned()
        {
            arguments.insert("backing-file".to_owned(), base);
        }
        if !matches!(execute.as_str(), "block-stream" | "change-backing-file") {
            continue;
        }
        if let Some(Value::String(name)) = arguments.get_mut("backing-file")
            && !name.is_empty()
        {
            let times = 200 + rng.below(250);
            *name = "./".repeat(times as usize) + name;
        }
    }
}

/// Has somebody flush what backups have filled, or close it, on the way or when they are done: before that nothing of it is sure.
fn make_durable(rng: &mut Rng, steps: &mut Vec<Step>) {
    let mut at = 0;
    while at < steps.len() {
        let Action::Command { execute, arguments } = &mut steps[at].action else {
            at += 1;
            continue;
        };
        let text = |backup: &Map<String, Value>, key: &str| backup.get(key)?.as_str().map(str::to_owned);
        let started: Vec<(String, String)> = backups_of(&execute.clone(), arguments)
            .into_iter()
            .filter(|backup| backup.get("sync").is_some_and(|sync| sync != "none"))
            .filter_map(|backup| Some((text(backup, "job-id")?, text(backup, "target")?)))
            .collect();
        at += 1;
        let actor = steps[at - 1].actor.clone();
        for (id, target) in started {
            let flush = Step {
                actor: actor.clone(),
                action: Action::Guest {
                    export: format!("x-{target}"),
                    op: GuestOp::Flush,
                },
                wait: true,
            };
            let del = command(&actor, "blockdev-del", json!({"node-name": target}));
            let status = *rng.pick(&["pending", "concluded", "concluded", "null"]);
            let done = wait_until(&actor, &id, status);
            let viewed = steps.iter().any(|step| match &step.action {
                Action::Command { execute, arguments } => {
                    execute == "block-export-add"
                        && arguments.get("id") == Some(&json!(format!("x-{target}")))
                }
                _ => false,
            });
            let mut more = match (rng.below(4), viewed) {
                (0, _) => continue,
                (1, true) => vec![flush],
                (_, true) => vec![done, flush],
                (_, false) => vec![done, del],
            };
            let to = (at + rng.below(6) as usize).min(steps.len());
            steps.splice(to..to, more.drain(..));
        }
    }
}

fn plan(rng: &mut Rng, images: usize) -> Faults {
    // reads, writes, flushes
    let (reads, writes, flushes) = *rng.pick(&[
        (true, true, true),
        (true, true, true),
        (true, false, false),
        (true, false, false),
        (false, true, false),
        (false, true, false),
        (false, true, true),
        (false, false, true),
    ]);
    let image = rng
        .chance(1, 3)
        .then(|| rng.below(u32::try_from(images).expect("few images").max(1)))
        .filter(|_| images > 0);
    // A run has tens to hundreds of requests, of some kinds only a few.
    let scale = if reads {
        *rng.pick(&[2, 8, 32, 128])
    } else {
        *rng.pick(&[1, 4, 8, 32])
    };
    let from = rng.below(scale);
    let (from, until, one_in) = match rng.below(8) {
        0 => (0, None, *rng.pick(&[8, 32, 128])),
        1 => (from, None, 1),
        2 => (from, Some(from + 32), *rng.pick(&[4, 16])),
        3 => (from, Some(from + 2 + rng.below(6)), 1),
        _ => (from, Some(from + 1 + rng.below(2)), 1),
    };
    Faults {
        one_in,
        from,
        until,
        image,
        reads,
        writes,
        flushes,
        setup: rng.chance(1, 16),
    }
}

/// Error policies, and somebody who resumes or cancels a job that stopped.
fn look_after_streams(rng: &mut Rng, steps: &mut Vec<Step>) {
    let mut at = 0;
    while at < steps.len() {
        let step = &mut steps[at];
        at += 1;
        let Action::Command { execute, arguments } = &mut step.action else {
            continue;
        };
        if execute != "block-stream" {
            continue;
        }
        if rng.chance(3, 4) {
            let policy = *rng.pick(&["report", "ignore", "stop", "stop", "enospc", "auto"]);
            arguments.insert("on-error".to_owned(), json!(policy));
        }
        let Some(id) = arguments
            .get("job-id")
            .and_then(|id| id.as_str())
            .map(str::to_owned)
        else {
            continue;
        };
        if !rng.chance(1, 3) {
            continue;
        }
        let actor = step.actor.clone();
        let wait = wait_until_stopped(&actor, &id);
        let verb = match rng.below(6) {
            0 => command(&actor, "job-cancel", json!({"id": id})),
            1 => command(&actor, "block-job-cancel", json!({"device": id, "force": true})),
            2 => command(&actor, "block-job-resume", json!({"device": id})),
            3 => command(&actor, "query-block-jobs", json!({})),
            _ => command(&actor, "job-resume", json!({"id": id})),
        };
        steps.splice(at..at, [wait, verb]);
        at += 2;
    }
}

fn wait_until_stopped(actor: &str, id: &str) -> Step {
    wait_until(actor, id, "paused")
}

fn wait_until(actor: &str, id: &str, status: &str) -> Step {
    let job = WaitJob {
        id: id.to_owned(),
        status: status.to_owned(),
        offset: None,
    };
    Step {
        actor: actor.to_owned(),
        action: Action::WaitJob { job },
        wait: true,
    }
}

/// The same for backups, which have a policy for either side, also in transactions. A backup tries again what it ignores: where
/// storage fails for good it would never end.
fn look_after_backups(rng: &mut Rng, faults: Faults, steps: &mut Vec<Step>) {
    let mut at = 0;
    while at < steps.len() {
        let step = &mut steps[at];
        at += 1;
        let Action::Command { execute, arguments } = &mut step.action else {
            continue;
        };
        let started: Vec<String> = backups_of(execute, arguments)
            .into_iter()
            .filter_map(|backup| policies(rng, faults, backup))
            .collect();
        let actor = step.actor.clone();
        for id in started {
            if !rng.chance(1, 3) {
                continue;
            }
            let verb = match rng.below(6) {
                0 => command(&actor, "block-job-cancel", json!({"device": id, "force": true})),
                1 => command(&actor, "query-block-jobs", json!({})),
                2 => command(&actor, "block-job-resume", json!({"device": id})),
                _ => command(&actor, "job-resume", json!({"id": id})),
            };
            steps.splice(at..at, [wait_until_stopped(&actor, &id), verb]);
            at += 2;
        }
    }
}

/// Policies for one backup; its id, if it may stop. Nobody ignores errors for ever: where storage fails for good, or now and then
/// for good while each task of a compressing backup is a hundred writes, of which all have to go well.
fn policies(rng: &mut Rng, faults: Faults, backup: &mut Map<String, Value>) -> Option<String> {
    let compresses = backup.get("compress") == Some(&json!(true));
    let for_good = faults.until.is_none() && (faults.one_in == 1 || compresses);
    let mut stops = false;
    for side in ["on-source-error", "on-target-error"] {
        if rng.chance(1, 2) {
            let policy = *rng.pick(&["report", "ignore", "ignore", "stop", "stop", "enospc"]);
            backup.insert(side.to_owned(), json!(policy));
        }
        if for_good && backup.get(side).is_some_and(|policy| policy == "ignore") {
            backup.insert(side.to_owned(), json!("stop"));
        }
        stops |= backup
            .get(side)
            .is_some_and(|policy| policy == "stop" || policy == "enospc");
    }
    let id = backup.get("job-id").and_then(Value::as_str).map(str::to_owned);
    // One that only ends when it is cancelled copies nothing by itself.
    id.filter(|_| stops && backup.get("sync").is_some_and(|sync| sync != "none"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::generate::{Profile, Reach, generate};

    #[test]
    fn backups_get_policies_and_none_tries_for_ever() {
        let (mut resumed, mut ignored) = (0, 0);
        for seed in 0..200 {
            let mut scenario = generate(seed, Profile::Backup, Reach::all());
            add_faults(&mut scenario, seed);
            assert_eq!(
                crate::scenario::validate::validate(&scenario),
                Ok(()),
                "seed {seed}"
            );
            let faults = scenario.disk.faults.expect("added");
            let for_good = faults.until.is_none() && faults.one_in == 1;
            for step in &mut scenario.steps {
                let Action::Command { execute, arguments } = &mut step.action else {
                    continue;
                };
                resumed += u32::from(execute == "job-resume");
                for backup in backups_of(&execute.clone(), arguments) {
                    let ignores = ["on-source-error", "on-target-error"]
                        .iter()
                        .any(|side| backup.get(*side).is_some_and(|policy| policy == "ignore"));
                    assert!(!(ignores && for_good), "seed {seed}");
                    ignored += u32::from(ignores);
                }
            }
        }
        assert!(resumed > 20 && ignored > 20, "{resumed} {ignored}");
    }

    #[test]
    fn plans_differ_and_the_workload_stays() {
        let mut plans = Vec::new();
        for seed in 0..200 {
            let plain = generate(seed, Profile::Stream, Reach::all());
            let mut faulty = plain.clone();
            add_faults(&mut faulty, seed);
            let faults = faulty.disk.faults.expect("added");
            assert!(faults.reads || faults.writes || faults.flushes);
            plans.push(faults);
            assert_eq!(
                crate::scenario::validate::validate(&faulty),
                Ok(()),
                "seed {seed}"
            );
            let guests = |s: &Scenario| {
                let is_guest = |s: &&Step| matches!(s.action, Action::Guest { .. });
                s.steps.iter().filter(is_guest).cloned().collect::<Vec<_>>()
            };
            assert_eq!(guests(&plain), guests(&faulty), "seed {seed}");
            assert_eq!(plain.images, faulty.images);
        }
        assert!(plans.iter().any(|f| f.image.is_some()) && plans.iter().any(|f| f.image.is_none()));
        assert!(plans.iter().any(|f| f.until.is_none()) && plans.iter().any(|f| f.until.is_some()));
        assert!(plans.iter().any(|f| f.setup) && plans.iter().any(|f| f.one_in > 1));
    }
}
