//! What a command that failing storage ended early may leave behind.
//!
//! Rules: such a command changes nothing, but for a node that was made writable for it: becoming read-only again takes
//! a flush, which may fail as well, and the node then stays writable, which harms nobody. A backing file that was
//! recorded before only that failed stays recorded.

use serde_json::Value;

use crate::command::args::Args;
use crate::command::{Command, change_backing, lookup};
use crate::graph::NodeId;
use crate::refusal::Refusal;
use crate::world::World;

/// What is left beside nothing at all.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Left {
    /// The node that the command made writable still is.
    Writable,
    /// The same, and the header says what the command asked for.
    WritableAndRecorded,
}

impl Left {
    /// Everything that may be left.
    pub const ALL: [Left; 2] = [Left::Writable, Left::WritableAndRecorded];
}

impl World {
    /// The command failed because storage did, and left this. False if it cannot have; the world is then as before.
    pub fn command_left(&mut self, command: &Command<'_>, left: Left) -> bool {
        let mut next = self.clone();
        if leave(&mut next, command, left) != Ok(true) {
            return false;
        }
        *self = next;
        true
    }
}

fn leave(world: &mut World, command: &Command<'_>, left: Left) -> Result<bool, Refusal> {
    let node = match (command.execute, left) {
        ("block-stream", Left::Writable) => named(world, command.arguments, "device")?,
        ("change-backing-file", _) => named(world, command.arguments, "image-node-name")?,
        _ => return Ok(false),
    };
    if world.graph.node(node).writable {
        return Ok(false);
    }
    if left == Left::WritableAndRecorded {
        // All of it, but for the last step.
        change_backing::change_backing_file(world, command.arguments)?;
    }
    world.graph.set_read_only(node, false)?;
    Ok(true)
}

fn named(world: &World, arguments: &Value, key: &'static str) -> Result<NodeId, Refusal> {
    lookup(world, "", Args::new(arguments)?.str(key)?)
}
