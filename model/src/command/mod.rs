//! QMP commands: what each answers, and what it does to the world. One module per command family.
//!
//! Rules: a module first parses its arguments in the order of the schema ([`args`]), then makes its checks in QEMU's
//! order. The world it works on is a copy, so a refusal may leave it half changed.

pub mod args;
pub mod backup;
pub mod bitmap;
pub mod change_backing;
pub mod del;
pub mod export;
pub mod failing;
pub(crate) mod filters;
pub(crate) mod jobs;
pub mod object;
pub mod open;
pub mod reopen;
pub mod resize;
pub mod stream;
pub mod transaction;
pub mod verbs;

use serde_json::{Value, json};

use crate::graph::NodeId;
use crate::refusal::{ErrorClass, Refusal};
use crate::world::World;

/// A QMP command as it is on the wire.
#[derive(Clone, Copy, Debug)]
pub struct Command<'a> {
    /// Its name.
    pub execute: &'a str,
    /// Its arguments: an object, or null for none.
    pub arguments: &'a Value,
}

impl<'a> Command<'a> {
    /// This command.
    #[must_use]
    pub fn new(execute: &'a str, arguments: &'a Value) -> Command<'a> {
        Command { execute, arguments }
    }

    /// From `{"execute": …, "arguments": …}`; none if that is not its shape.
    #[must_use]
    pub fn from_value(value: &'a Value) -> Option<Command<'a>> {
        static NONE: Value = Value::Null;
        let execute = value.get("execute")?.as_str()?;
        Some(Command {
            execute,
            arguments: value.get("arguments").unwrap_or(&NONE),
        })
    }

    /// The model knows the command.
    #[must_use]
    pub fn is_modelled(&self) -> bool {
        handler(self.execute).is_some()
    }
}

type Handler = fn(&mut World, &Value) -> Result<(), Refusal>;

fn handler(name: &str) -> Option<Handler> {
    Some(match name {
        "blockdev-add" => open::blockdev_add,
        "blockdev-del" => del::blockdev_del,
        "blockdev-reopen" => reopen::blockdev_reopen,
        "blockdev-backup" => transaction::blockdev_backup,
        "blockdev-snapshot" => transaction::blockdev_snapshot,
        "transaction" => transaction::transaction,
        "block_resize" => resize::block_resize,
        "object-add" => object::object_add,
        "object-del" => object::object_del,
        "block-dirty-bitmap-add" => bitmap::add,
        "block-dirty-bitmap-remove" => bitmap::remove,
        "block-dirty-bitmap-clear" => bitmap::clear,
        "block-dirty-bitmap-enable" => bitmap::enable,
        "block-dirty-bitmap-disable" => bitmap::disable,
        "block-dirty-bitmap-merge" => bitmap::merge,
        "x-debug-block-dirty-bitmap-sha256" => bitmap::sha256,
        "block-export-add" => export::add,
        "block-export-del" => export::del,
        "block-stream" => stream::block_stream,
        "change-backing-file" => change_backing::change_backing_file,
        "job-pause" => |world, args| verbs::pause(world, args, verbs::Family::Job),
        "job-resume" => |world, args| verbs::resume(world, args, verbs::Family::Job),
        "job-cancel" => |world, args| verbs::cancel(world, args, verbs::Family::Job),
        "job-complete" => |world, args| verbs::complete(world, args, verbs::Family::Job),
        "job-finalize" => |world, args| verbs::finalize(world, args, verbs::Family::Job),
        "job-dismiss" => |world, args| verbs::dismiss(world, args, verbs::Family::Job),
        "block-job-pause" => |world, args| verbs::pause(world, args, verbs::Family::BlockJob),
        "block-job-resume" => |world, args| verbs::resume(world, args, verbs::Family::BlockJob),
        "block-job-cancel" => |world, args| verbs::cancel(world, args, verbs::Family::BlockJob),
        "block-job-complete" => |world, args| verbs::complete(world, args, verbs::Family::BlockJob),
        "block-job-finalize" => |world, args| verbs::finalize(world, args, verbs::Family::BlockJob),
        "block-job-dismiss" => |world, args| verbs::dismiss(world, args, verbs::Family::BlockJob),
        "block-job-set-speed" => verbs::set_speed,
        "block-job-change" => verbs::change,
        _ => return None,
    })
}

pub(crate) fn apply(world: &mut World, command: &Command<'_>) -> Result<Value, Refusal> {
    let Some(handler) = handler(command.execute) else {
        return Err(Refusal {
            class: ErrorClass::CommandNotFound,
            ..Refusal::new(format!("The command {} has not been found", command.execute))
        });
    };
    handler(world, command.arguments).map(|()| json!({}))
}

/// `bdrv_lookup_bs`: the node that a command names, with the arguments that its error text shows.
fn lookup(world: &World, device: &str, node_name: &str) -> Result<NodeId, Refusal> {
    world.graph.find(node_name).ok_or_else(|| {
        Refusal::new(format!(
            "Cannot find device='{device}' nor node-name='{node_name}'"
        ))
    })
}

/// First a letter, then letters, digits, `-`, `.`, `_`.
fn is_well_formed(id: &str) -> bool {
    id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_'))
}
