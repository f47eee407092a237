//! QMP: commands by name with JSON arguments, as a monitor sends them.
//!
//! Rules: class and text of every refusal are those of qemu-storage-daemon 10.0; arguments are judged before
//! anything else happens. A command holds the main lock from its first to its last step.
//! Not here: the wire (greeting, ids, timestamps).

pub(crate) mod args;
mod commands;
mod export;
mod object;
mod query;
mod schema;
#[cfg(test)]
mod tests;

pub use export::Exports;
