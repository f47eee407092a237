//! `job-*` and `block-job-*`: what a user asks of a running job.
//!
//! Rules: a verb changes what the job is *asked* (paused by the user, cancelled); its status follows by observation
//! ([`World::job_status`]), and a finalized job's effect by [`World::job_completed`].

use serde_json::Value;

use crate::command::args::Args;
use crate::command::jobs;
use crate::job::{Verb, check_verb};
use crate::refusal::{ErrorClass, Refusal};
use crate::world::World;

/// Which of the two families of commands; they name the job differently and refuse differently.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Family {
    /// `job-*`: argument `id`.
    Job,
    /// `block-job-*`: argument `device` for most.
    BlockJob,
}

impl Family {
    fn argument(self) -> &'static str {
        match self {
            Family::Job => "id",
            Family::BlockJob => "device",
        }
    }
}

/// The job's place in the list.
fn find(world: &World, family: Family, id: &str) -> Result<usize, Refusal> {
    world
        .jobs
        .iter()
        .position(|job| &*job.id == id)
        .ok_or_else(|| match family {
            Family::Job => Refusal::new("Job not found"),
            Family::BlockJob => Refusal {
                class: ErrorClass::DeviceNotActive,
                ..Refusal::new(format!("Block job '{id}' not found"))
            },
        })
}

/// Parses the one argument of a plain verb.
fn named(world: &World, arguments: &Value, family: Family, argument: &'static str) -> Result<usize, Refusal> {
    let args = Args::new(arguments)?;
    let id = args.str(argument)?;
    args.finish()?;
    find(world, family, id)
}

fn check(world: &World, at: usize, verb: Verb) -> Result<(), Refusal> {
    let job = &world.jobs[at];
    check_verb(&job.id, job.status, verb)
}

pub(crate) fn pause(world: &mut World, arguments: &Value, family: Family) -> Result<(), Refusal> {
    let at = named(world, arguments, family, family.argument())?;
    check(world, at, Verb::Pause)?;
    if world.jobs[at].user_paused {
        return Err(Refusal::new("Job is already paused"));
    }
    world.jobs[at].user_paused = true;
    Ok(())
}

pub(crate) fn resume(world: &mut World, arguments: &Value, family: Family) -> Result<(), Refusal> {
    let at = named(world, arguments, family, family.argument())?;
    if !world.jobs[at].user_paused {
        return Err(Refusal::new("Can't resume a job that was not paused"));
    }
    check(world, at, Verb::Resume)?;
    world.jobs[at].user_paused = false;
    Ok(())
}

pub(crate) fn cancel(world: &mut World, arguments: &Value, family: Family) -> Result<(), Refusal> {
    let args = Args::new(arguments)?;
    let id = args.str(family.argument())?;
    let force = family == Family::Job || args.opt_bool("force")?.unwrap_or(false);
    args.finish()?;
    let at = find(world, family, id)?;
    if world.jobs[at].user_paused && !force {
        return Err(Refusal::new(format!(
            "The block job for device '{id}' is currently paused"
        )));
    }
    check(world, at, Verb::Cancel)?;
    let job = &mut world.jobs[at];
    job.user_paused = false;
    job.cancelled = true;
    Ok(())
}

pub(crate) fn complete(world: &mut World, arguments: &Value, family: Family) -> Result<(), Refusal> {
    let at = named(world, arguments, family, family.argument())?;
    check(world, at, Verb::Complete)?;
    // Neither a stream nor a backup is ever ready, so the verb table has refused it; if it were, it has nothing to complete.
    Err(Refusal::new(format!(
        "The active block job '{}' cannot be completed",
        world.jobs[at].id
    )))
}

pub(crate) fn finalize(world: &mut World, arguments: &Value, family: Family) -> Result<(), Refusal> {
    let at = named(world, arguments, family, "id")?;
    check(world, at, Verb::Finalize)
}

pub(crate) fn dismiss(world: &mut World, arguments: &Value, family: Family) -> Result<(), Refusal> {
    let at = named(world, arguments, family, "id")?;
    check(world, at, Verb::Dismiss)?;
    let id = world.jobs[at].id.clone();
    world.dismiss_job(&id);
    Ok(())
}

pub(crate) fn set_speed(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let args = Args::new(arguments)?;
    let id = args.str("device")?;
    let speed = args.int("speed")?;
    args.finish()?;
    let at = find(world, Family::BlockJob, id)?;
    check(world, at, Verb::SetSpeed)?;
    jobs::check_speed(speed)?;
    world.jobs[at].speed = speed;
    Ok(())
}

pub(crate) fn change(world: &mut World, arguments: &Value) -> Result<(), Refusal> {
    let args = Args::new(arguments)?;
    let id = args.str("id")?;
    args.one_of("type", &["mirror"])?;
    args.one_of("copy-mode", &["background", "write-blocking"])?;
    args.finish()?;
    let at = find(world, Family::BlockJob, id)?;
    check(world, at, Verb::Change)?;
    Err(Refusal::new("Job type does not support change"))
}
