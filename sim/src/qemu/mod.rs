//! The shipping `qemu-storage-daemon`, with every storage request of it in our hands.
//!
//! * [`process`]: one daemon, its private directory, its end.
//! * [`qmp`]: its monitor, over a socket pair.
//! * [`settle`]: when it has come to rest.
//! * [`nbd`]: the storage under every image (a server of ours, in memory, that answers when told to) and the guests
//!   (a client with many requests in flight).
//! * [`names`]: a scenario's file names as the daemon has them, and back.
//! * [`graph`]: the daemon's block graph as events.
//! * [`debugger`]: where it died.
//!
//! Rules: one thread, non-blocking sockets, read in one fixed order and only while the daemon sleeps; so that what it
//! does is a function of what it was given. No file system and no timer takes part: there is no file node, no
//! iothread and no rate limit. One thread of its pool does, which unpacks compressed clusters, and is waited for.
//! Not here: which of the held requests is next ([`crate::target::qemu`] offers them, the runner chooses).

pub mod debugger;
pub mod graph;
pub mod names;
pub mod nbd;
pub mod process;
pub mod qmp;
pub mod settle;

/// What ends a daemon's usefulness.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    /// It is gone: how it ended, and its last words.
    #[error("{0}")]
    Died(String),
    /// It runs and runs.
    #[error("{0}")]
    Hangs(String),
    /// It says what no daemon should say.
    #[error("{0}")]
    Nonsense(String),
}
