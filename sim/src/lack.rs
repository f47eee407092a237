//! What we may be short of ourselves: open files above all, processes and memory.
//!
//! Rules: none of it is ever a finding; it ends the command with exit code 2 and with words on what to do. Whoever opens
//! files or sockets for a whole run takes a [`Share`] first: there has to be room for all of them, and the limit that we
//! may raise by ourselves is raised. A daemon has the same limit as we have; of what it says when it meets that,
//! [`is_told`] knows the words.
//! Not covered: memory. A daemon that is refused some says so in the same words as one that asks for too much.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::io::Errno;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// Files that a target keeps open: sockets of a daemon, of its images and guests, and what its threads are watched with.
const PER_SHARE: u64 = 48;
/// Files that are open for a moment, or once for all.
const BESIDE: u64 = 16;
/// Most files that a process has left that needs more at once.
const SPARE: u64 = 4;

static SHARES: AtomicU64 = AtomicU64::new(0);

/// Room for the files of one target.
#[derive(Debug)]
pub struct Share(());

/// Not as many files may be open as are needed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "too few files may be open at once: {limit}, and at least {needed} are needed for what runs at the same time; \
     raise the limit (ulimit -n {needed}), or use fewer --threads"
)]
pub struct TooFew {
    limit: u64,
    needed: u64,
}

impl Share {
    /// Takes one more.
    ///
    /// # Errors
    /// There is no room for it.
    pub fn take() -> Result<Share, TooFew> {
        let share = Share(());
        let shares = SHARES.fetch_add(1, Ordering::Relaxed) + 1;
        let limits = getrlimit(Resource::Nofile);
        match room_for(shares, before(), limits)? {
            Some(more) => match setrlimit(Resource::Nofile, more) {
                Ok(()) => Ok(share),
                Err(_) => Err(TooFew {
                    limit: limits.current.unwrap_or(u64::MAX),
                    needed: more.current.unwrap_or(u64::MAX),
                }),
            },
            None => Ok(share),
        }
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        SHARES.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Files that were open before the first share was taken: we may have been handed down any number.
fn before() -> u64 {
    static BEFORE: OnceLock<u64> = OnceLock::new();
    *BEFORE.get_or_init(|| match std::fs::read_dir("/proc/self/fd") {
        Ok(entries) => entries.count() as u64,
        // Not one more can be opened: as many are open as may be, or more.
        Err(e) if is_ours(&e) => getrlimit(Resource::Nofile).current.unwrap_or(0),
        Err(_) => BESIDE,
    })
}

/// Whether there is room for so many shares beside what is open; if it has to be made, the limits that make it.
fn room_for(shares: u64, open: u64, limits: Rlimit) -> Result<Option<Rlimit>, TooFew> {
    let needed = open + BESIDE + shares * PER_SHARE;
    let within = |limit: Option<u64>| limit.is_none_or(|limit| limit >= needed);
    match limits {
        Rlimit { current, .. } if within(current) => Ok(None),
        Rlimit { maximum, .. } if within(maximum) => Ok(Some(Rlimit {
            current: Some(needed),
            maximum,
        })),
        Rlimit { maximum, .. } => Err(TooFew {
            limit: maximum.unwrap_or(u64::MAX),
            needed,
        }),
    }
}

/// Whether we are short of something, as an error of ours says.
#[must_use]
pub fn is_ours(error: &io::Error) -> bool {
    let ours = [Errno::MFILE, Errno::NFILE, Errno::NOMEM, Errno::NOBUFS];
    Errno::from_io_error(error).is_some_and(|errno| ours.contains(&errno))
}

/// Whether a program says that it may open no more files, or start no more threads.
#[must_use]
pub fn is_told(text: &str) -> bool {
    // EMFILE and ENFILE; the name of the function that gives up is put before the reason.
    text.contains("Too many open files") || text.contains("qemu_thread_create: ")
}

/// An error of ours and, where something can be done, what.
#[must_use]
pub fn with_advice(error: &io::Error) -> String {
    let advice = match Errno::from_io_error(error) {
        Some(Errno::MFILE) => "; raise the limit of open files (ulimit -n)",
        Some(Errno::NFILE) => "; the whole system has too many files open (fs.file-max)",
        Some(Errno::AGAIN) => "; raise the limit of processes (ulimit -u), or use fewer --threads",
        Some(Errno::NOMEM | Errno::NOBUFS) => "; there is too little memory",
        _ => "",
    };
    format!("{error}{advice}")
}

/// Whether a process has about as many files open as it may: what needs two at once closes the one that it got.
#[must_use]
pub fn has_all_open(pid: u32) -> bool {
    let open = std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, |entries| entries.count() as u64);
    let limits = std::fs::read_to_string(format!("/proc/{pid}/limits")).unwrap_or_default();
    limit_of_files(&limits).is_some_and(|limit| open + SPARE > limit)
}

/// The line of the table that the kernel shows: name, soft limit, hard limit, unit.
fn limit_of_files(limits: &str) -> Option<u64> {
    let line = limits.lines().find_map(|l| l.strip_prefix("Max open files"))?;
    line.split_ascii_whitespace().next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn room_is_made_as_far_as_it_may_be() {
        let limits = |current, maximum| Rlimit { current, maximum };
        let needed = 5 + BESIDE + 2 * PER_SHARE;
        let room = |current, maximum| room_for(2, 5, limits(current, maximum));
        assert_eq!(room(Some(needed), Some(needed)), Ok(None));
        assert_eq!(room(None, None), Ok(None));
        let most = Some(4 * needed);
        assert_eq!(room(Some(9), most), Ok(Some(limits(Some(needed), most))));
        assert_eq!(room(Some(9), None), Ok(Some(limits(Some(needed), None))));
        let limit = needed - 1;
        let too_few = room(Some(9), Some(limit)).expect_err("no room");
        assert_eq!(too_few, TooFew { limit, needed });
        assert!(too_few.to_string().contains(&format!("ulimit -n {needed}")));
    }

    #[test]
    fn a_share_is_given_back() {
        let limits = getrlimit(Resource::Nofile);
        for _ in 0..1000 {
            drop(Share::take().expect("room"));
        }
        // Others may run beside this one.
        let most = limits.current.unwrap_or(u64::MAX).max(1000 * PER_SHARE / 2);
        assert!(getrlimit(Resource::Nofile).current.is_none_or(|now| now <= most));
    }

    #[test]
    fn what_we_lack_is_told_from_what_is_wrong_with_others() {
        let error = |errno: Errno| io::Error::from(errno);
        assert!(is_ours(&error(Errno::MFILE)) && !is_ours(&error(Errno::CONNREFUSED)));
        // The daemon's queue of connections is full.
        assert!(!is_ours(&error(Errno::AGAIN)));
        let text = with_advice(&error(Errno::MFILE));
        assert!(is_told(&text) && text.contains("ulimit -n"), "{text}");
        assert!(is_told(&error(Errno::NFILE).to_string()));
        assert!(!is_told("Could not open 'a': No such file or directory"));
    }

    #[test]
    fn a_process_that_has_all_open_is_seen() {
        let run = |limit: u32| {
            let script = format!("ulimit -n {limit} && exec 3</dev/null && echo && read -r line");
            let child = Command::new("/bin/sh")
                .args(["-c", &script])
                .stdin(Stdio::piped())
                .stdout(Stdio::piped())
                .spawn();
            let mut child = child.expect("a shell");
            let out = child.stdout.as_mut().expect("piped");
            out.read_exact(&mut [0]).expect("it is ready");
            let all_open = has_all_open(child.id());
            child.kill().and_then(|()| child.wait()).expect("ours");
            all_open
        };
        assert!(run(6));
        assert!(!run(60));
        assert!(!has_all_open(u32::MAX), "there is none");
        assert_eq!(
            limit_of_files("Max open files   unlimited  unlimited  files"),
            None
        );
    }
}
