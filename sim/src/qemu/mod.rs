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
pub mod steps;

use std::io;

use crate::lack;

/// What to do about a daemon that may open no more files.
pub(crate) const FEW: &str = "the daemon may open too few files: raise the limit (ulimit -n)";

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
    /// We are short of something ourselves; it is not to blame.
    #[error("{0}")]
    Unusable(String),
}

impl Broken {
    /// Something could not be done with the daemon: for lack of something of ours, or by its doing.
    #[must_use]
    pub fn by(what: &str, error: &io::Error) -> Broken {
        if lack::is_ours(error) {
            Broken::lack(what, error)
        } else {
            Broken::Nonsense(format!("{what}: {error}"))
        }
    }

    /// Something could not be done, and that is not the daemon's doing.
    #[must_use]
    pub fn lack(what: &str, error: &io::Error) -> Broken {
        Broken::Unusable(format!("{what}: {}", lack::with_advice(error)))
    }

    /// The daemon refuses something: by the rules, or because it may open no more files.
    ///
    /// # Errors
    /// The latter.
    pub fn unless_lack(refusal: &str) -> Result<(), Broken> {
        if lack::is_told(refusal) {
            return Err(Broken::Unusable(format!("{refusal}; {FEW}")));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use rustix::io::Errno;

    use super::*;

    #[test]
    fn the_daemon_is_not_to_blame_for_what_we_lack() {
        let by = |errno: Errno| Broken::by("no connection", &errno.into());
        assert!(matches!(by(Errno::MFILE), Broken::Unusable(_)));
        assert!(matches!(by(Errno::CONNREFUSED), Broken::Nonsense(_)));
        let refusal = Broken::unless_lack("Failed to create socket: Too many open files");
        assert!(matches!(refusal, Err(Broken::Unusable(text)) if text.contains("ulimit -n")));
        assert_eq!(Broken::unless_lack("Node 'n' is busy"), Ok(()));
    }
}
