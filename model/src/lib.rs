//! Executable specification of a copy-on-write block layer.
//!
//! What a block layer with QEMU's semantics must do, as pure functions on plain data: no I/O, no clock, no
//! randomness. It shares no code with the layer it judges.
//!
//! * [`world`]: execute QMP commands, predict answers, follow jobs ([`World`]);
//! * [`options`], [`reopen`]: options of nodes, and changing them;
//! * [`graph`], [`walk`], [`perm`], [`refresh`], [`freeze`], [`blockers`], [`change`]: the node graph and its rules;
//! * [`bitmap`], [`marking`]: dirty bitmaps, and what marks them;
//! * [`job`]: state machine, verbs, pauses;
//! * [`layer`], [`status`], [`stream`]: what layers hold, what a read through a chain sees, what a stream may copy;
//! * [`copy_before_write`]: what a point-in-time filter keeps;
//! * [`register`]: which reads a history of guest requests allows.

pub mod bitmap;
pub mod blockers;
pub mod change;
pub mod command;
pub mod copy_before_write;
pub mod freeze;
pub mod graph;
pub mod job;
pub mod layer;
pub mod marking;
pub mod options;
pub mod perm;
pub mod refresh;
pub mod refusal;
pub mod register;
pub mod reopen;
pub mod status;
pub mod stream;
pub mod walk;
mod window;
pub mod world;

pub use bitmap::{Bitmap, StoredBitmap};
pub use command::Command;
pub use graph::{EdgeId, Graph, Node, NodeId, Parent};
pub use job::{JobStatus, Outcome};
pub use perm::{Driver, Masks, Perm, Role};
pub use refusal::{ErrorClass, Refusal};
pub use world::{FileFacts, FileKind, Qcow2Facts, World};
