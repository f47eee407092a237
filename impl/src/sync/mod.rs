//! Synchronisation primitives: usable from any thread (wakers may fire elsewhere), built on atomics that become
//! loom's under `cfg(loom)`.
//!
//! Rules: no primitive allocates or takes a mutex when nobody waits; every wait is cancel-safe. They know nothing of
//! nodes: the layer gives them meaning (`graph::lock`, `graph::drain`).

mod count;
mod lock;
mod prim;
mod turn;
mod wait;

pub use count::{FreezeCount, Gate, InFlight};
pub use lock::{Acquire, GraphLock, MainLock};
pub(crate) use turn::turn;
pub use wait::{Listen, WaitQueue};
