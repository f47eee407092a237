//! What commands that start jobs have in common.

use std::rc::Rc;

use crate::command::is_well_formed;
use crate::refusal::Refusal;
use crate::world::World;

/// What may be done about errors, as QAPI has it.
pub(crate) const ON_ERROR: [&str; 5] = ["report", "ignore", "enospc", "stop", "auto"];

/// A new job can have this id.
pub(crate) fn check_id(world: &World, id: Option<&str>) -> Result<Rc<str>, Refusal> {
    let id = id.unwrap_or("");
    if !is_well_formed(id) {
        return Err(Refusal::new(format!("Invalid job ID '{id}'")));
    }
    if world.job(id).is_some() {
        return Err(Refusal::new(format!("Job ID '{id}' already in use")));
    }
    Ok(Rc::from(id))
}

/// A rate limit is none, or positive.
pub(crate) fn check_speed(speed: i64) -> Result<(), Refusal> {
    if speed < 0 {
        return Err(Refusal::new("Parameter 'speed' expects a non-negative value"));
    }
    Ok(())
}
