//! When the daemon has come to rest: all its threads sleep, and the first one where it waits for something to happen.
//!
//! The kernel wakes a sleeper inside the very call that gives it something to do, so that a daemon of which every thread
//! sleeps at one moment has nothing to do that it knows of. Two things make that moment hard to see.
//! One is what a state letter means: a thread is called sleeping as soon as it says that it is going to, and may be taken
//! off its processor right there, with news already waiting for it. The place where it sleeps (`wchan`) has no such gap:
//! the kernel gives none for a thread that is in a queue to run, or about to be.
//! The other is that threads are looked at one after the other while they hand work to each other. So the looks are
//! nested, first thread to last and back, and how often each had a processor (`schedstat`) must be the same
//! before and after: then each slept over its whole interval, and the intervals have a moment in common.
//!
//! Rules: only the first thread acts on storage and guests. Beside it are, from the start, one that frees memory later
//! and one that reads the monitor; neither takes part while no command is under way ([`Whom::NoMonitor`]). Threads
//! that come later do: one unpacks compressed clusters, one connects to storage. A daemon that uses up much CPU time without coming to rest hangs; the limit is its CPU time and not the
//! time of day, which other programs use up as well.
//! On a kernel that shows no `wchan`, state letters have to do, with the gap.

use std::cell::Cell;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::{Broken, FEW};
use crate::clock::Stopwatch;
use crate::lack;

/// CPU time of the daemon in one settling, in nanoseconds.
const CPU_LIMIT: u64 = 2_000_000_000;
/// Time of day in one settling in which the daemon has no CPU time at all: it waits for something that is not of ours.
const STALL_LIMIT: Duration = Duration::from_secs(20);
/// Time of day in one settling: the machine itself is in trouble.
const TIME_LIMIT: Duration = Duration::from_secs(300);
/// A sleeper of which no place was shown for so long is on a kernel that shows none.
const STILL: Duration = Duration::from_millis(300);
/// No such process.
const ESRCH: i32 = 3;
/// Looks between two looks at a clock.
const PATIENCE: u32 = 512;
/// Looks after which a daemon that may open no more files is taken to wait for one.
const LONG: u32 = 8 * PATIENCE;
/// Looks after each of which the processor is given up and no more: the daemon has the same one, so that it goes on at
/// once, and most of what it does takes no longer.
const AT_ONCE: u32 = 200;
/// Looks between two looks at whether it has ended.
const ENDED: u32 = 16;
/// Later, the time between two looks.
const PAUSE: Duration = Duration::from_micros(20);

/// Whose rest is looked for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Whom {
    /// That of all threads but those that were there from the start, the first one excepted. Enough while no command is
    /// under way and none was since all were seen at rest.
    NoMonitor,
    /// That of all threads.
    All,
}

/// A thread's files.
#[derive(Debug)]
struct Thread {
    place: File,
    /// Not on every kernel.
    runs: Option<File>,
    /// Reading it makes the kernel finish what it puts off: a thread that sleeps may be left in the queue of its
    /// processor for a while, and then has no place.
    nudge: Option<File>,
}

/// How often a thread was given a processor, and for how long all in all, in nanoseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
struct Runs {
    times: u64,
    nanoseconds: u64,
}

/// Where a thread is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Place {
    /// It runs, or is about to.
    Busy,
    /// It sleeps until one of its files or sockets is ready.
    Polls,
    /// It sleeps elsewhere.
    Sleeps,
}

/// Looks at the threads of a process.
#[derive(Debug)]
pub struct Sleepers {
    directory: PathBuf,
    pid: u32,
    /// The directory, once they were listed; its links count the threads.
    count: Option<File>,
    /// The first one, then in the order in which they were started.
    threads: Vec<Thread>,
    /// One of them was seen to be gone; there may be as many as before.
    outdated: Cell<bool>,
    /// How many threads there were at the start.
    first: usize,
    /// The kernel does not show where threads sleep.
    letters: bool,
    before: Vec<(usize, Runs)>,
    /// Why its threads could not be listed the last time.
    blind: Option<io::Error>,
}

fn read<'a>(file: &File, buffer: &'a mut [u8; 512]) -> Option<&'a [u8]> {
    let n = file.read_at(buffer, 0).ok()?;
    Some(&buffer[..n])
}

/// A thread that is gone is no trouble of ours.
fn ours(error: io::Error) -> Option<io::Error> {
    let gone = error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(ESRCH);
    (!gone).then_some(error)
}

/// A file that not every kernel has, or shows to everybody.
fn unless_missing(file: io::Result<File>) -> io::Result<Option<File>> {
    match file {
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::PermissionDenied
            ) =>
        {
            Ok(None)
        }
        file => file.map(Some),
    }
}

/// Reads the text of `schedstat`: time on a processor, time waiting for one, how often.
fn parse_runs(text: &[u8]) -> Option<Runs> {
    let mut fields = std::str::from_utf8(text).ok()?.split_ascii_whitespace();
    Some(Runs {
        nanoseconds: fields.next()?.parse().ok()?,
        times: fields.nth(1)?.parse().ok()?,
    })
}

/// Reads the text of `wchan`: the function of the kernel where a thread sleeps; `0` for one that does not.
fn parse_place(text: &[u8]) -> Place {
    match text {
        b"" | b"0" => Place::Busy,
        // poll_schedule_timeout, do_sys_poll, do_epoll_wait, ep_poll: it depends on what the compiler joined.
        name if name.windows(4).any(|w| w == b"poll") => Place::Polls,
        _ => Place::Sleeps,
    }
}

/// The state letter of `stat`.
fn parse_letter(text: &[u8]) -> Option<u8> {
    // The name in brackets may hold anything, brackets too.
    let close = text.iter().rposition(|b| *b == b')')?;
    text.get(close + 2).copied()
}

impl Thread {
    fn open(directory: &Path, letters: bool) -> io::Result<Thread> {
        Ok(Thread {
            place: File::open(directory.join(if letters { "stat" } else { "wchan" }))?,
            runs: unless_missing(File::open(directory.join("schedstat")))?,
            nudge: unless_missing(File::open(directory.join("syscall")))?,
        })
    }

    /// `None`: it is gone.
    fn place(&self, letters: bool) -> Option<Place> {
        let mut buffer = [0; 512];
        let text = read(&self.place, &mut buffer)?;
        if !letters {
            return Some(parse_place(text));
        }
        Some(match parse_letter(text)? {
            b'S' => Place::Polls,
            _ => Place::Busy,
        })
    }

    fn runs(&self) -> Runs {
        let read = |file| parse_runs(read(file, &mut [0; 512])?);
        self.runs.as_ref().and_then(read).unwrap_or_default()
    }

    fn nudge(&self) {
        if let Some(file) = &self.nudge {
            let _ = read(file, &mut [0; 512]);
        }
    }
}

impl Sleepers {
    /// The threads of this process, which is a child of ours.
    #[must_use]
    pub fn of(pid: u32) -> Sleepers {
        let directory = PathBuf::from(format!("/proc/{pid}/task"));
        Sleepers {
            count: None,
            directory,
            pid,
            threads: Vec::new(),
            outdated: Cell::new(false),
            first: 0,
            letters: false,
            before: Vec::new(),
            blind: None,
        }
    }

    /// Lists the threads anew, the oldest first.
    fn list(&mut self) {
        self.threads.clear();
        self.outdated.set(false);
        self.blind = None;
        if let Err(e) = self.try_list() {
            self.blind = ours(e);
        }
    }

    fn try_list(&mut self) -> io::Result<()> {
        if self.count.is_none() {
            self.count = Some(File::open(&self.directory)?);
        }
        let entries = fs::read_dir(&self.directory)?;
        let mut numbers: Vec<u32> = entries
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        // The kernel lists them in that order. Their numbers say less: after the highest, the lowest come again.
        numbers.sort_by_key(|n| *n != self.pid);
        for n in numbers {
            match Thread::open(&self.directory.join(n.to_string()), self.letters) {
                Ok(thread) => self.threads.push(thread),
                Err(e) => ours(e).map_or(Ok(()), Err)?,
            }
        }
        Ok(())
    }

    fn is_listed(&self) -> bool {
        // A directory has two links of its own.
        let links = self
            .count
            .as_ref()
            .and_then(|d| d.metadata().ok())
            .map(|m| m.nlink());
        links == Some(self.threads.len() as u64 + 2)
    }

    /// Whether this thread sleeps where it may.
    fn sleeps(&self, at: usize) -> bool {
        match self.threads[at].place(self.letters) {
            Some(Place::Polls) => true,
            Some(Place::Sleeps) => at > 0,
            Some(Place::Busy) => false,
            None => {
                self.outdated.set(true);
                false
            }
        }
    }

    /// The daemon is up: whoever is there now was there from the start.
    pub fn started(&mut self) {
        self.list();
        self.first = self.threads.len();
    }

    /// Whether those threads sleep at one moment: while the last one is looked at.
    fn all_sleep(&mut self, whom: Whom) -> bool {
        self.before.clear();
        let skipped = if whom == Whom::All { 1 } else { self.first.max(1) };
        let mut last = 0;
        for at in std::iter::once(0).chain(skipped..self.threads.len()) {
            if at > 0 {
                // The one before is not the last, and has to be looked at again.
                self.before.push((last, self.threads[last].runs()));
                if !self.sleeps(last) {
                    return false;
                }
            }
            last = at;
        }
        let again = |&(at, runs): &(usize, Runs)| self.sleeps(at) && self.threads[at].runs() == runs;
        self.sleeps(last) && self.before.iter().rev().all(again) && self.is_listed()
    }

    /// Waits until those sleep. False: the process ended.
    ///
    /// # Errors
    /// When they do not come to rest.
    pub fn wait(&mut self, whom: Whom) -> Result<bool, Broken> {
        if self.threads.is_empty() {
            self.list();
        }
        let mut limits = Limits::default();
        loop {
            if let Some(reason) = &self.blind {
                return Err(Broken::lack("its threads cannot be looked at", reason));
            }
            if self.threads.is_empty() || self.has_ended(&limits) {
                return Ok(false);
            }
            if self.all_sleep(whom) {
                return Ok(true);
            }
            let listed = self.is_listed() && !self.outdated.get();
            if !listed {
                self.list();
            }
            let used = || self.threads.iter().map(|t| t.runs().nanoseconds).sum();
            let still = limits.looked(used)?;
            if limits.looks.is_multiple_of(LONG) && lack::has_all_open(self.pid) {
                return Err(Broken::Unusable(format!("it does not come to rest; {FEW}")));
            }
            if !listed {
                continue;
            }
            if still && !self.letters && self.letter() == Some(b'S') && !self.sleeps(0) {
                self.letters = true;
                self.list();
            }
            self.threads.iter().for_each(Thread::nudge);
        }
    }

    /// A process that nobody asked for its end still has a first thread. Not looked for at once: it takes time.
    fn has_ended(&self, limits: &Limits) -> bool {
        if limits.looks % ENDED != ENDED - 1 {
            return false;
        }
        // Other threads may keep its sockets open a little longer.
        self.letter().is_none_or(|state| matches!(state, b'Z' | b'X'))
    }

    fn letter(&self) -> Option<u8> {
        parse_letter(&fs::read(self.directory.with_file_name("stat")).ok()?)
    }
}

/// How long somebody has been looking.
#[derive(Debug, Default)]
struct Limits {
    looks: u32,
    begun: Option<(Stopwatch, u64)>,
    /// CPU time did not change since.
    still: Option<(Stopwatch, u64)>,
}

impl Limits {
    /// After a look in vain. True: it has used no CPU time for a while.
    #[expect(clippy::disallowed_methods, reason = "another process takes real time")]
    fn looked(&mut self, used: impl Fn() -> u64) -> Result<bool, Broken> {
        self.looks += 1;
        let still = self.looks.is_multiple_of(PATIENCE) && self.check(used())?;
        if self.looks > AT_ONCE {
            std::thread::sleep(PAUSE);
        } else {
            std::thread::yield_now();
        }
        Ok(still)
    }

    fn check(&mut self, used: u64) -> Result<bool, Broken> {
        let (watch, first) = *self.begun.get_or_insert_with(|| (Stopwatch::start(), used));
        if used.saturating_sub(first) > CPU_LIMIT {
            return Err(Broken::Hangs("it runs without coming to rest".to_owned()));
        }
        if watch.elapsed() > TIME_LIMIT {
            return Err(Broken::Hangs("it neither rests nor runs".to_owned()));
        }
        let (still, last) = *self.still.get_or_insert_with(|| (Stopwatch::start(), used));
        if used != last {
            self.still = Some((Stopwatch::start(), used));
        } else if still.elapsed() > STALL_LIMIT {
            return Err(Broken::Hangs("it sleeps where nothing can wake it".to_owned()));
        }
        Ok(used == last && still.elapsed() > STILL)
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Child, Command};

    use super::*;

    #[test]
    fn what_the_kernel_shows_of_a_thread_is_read() {
        let runs = Runs {
            times: 8,
            nanoseconds: 1_550_838,
        };
        assert_eq!(parse_runs(b"1550838 21462330 8\n"), Some(runs));
        assert_eq!(parse_runs(b"1550838 21462330"), None);
        assert_eq!(parse_place(b"poll_schedule_timeout.constprop.0"), Place::Polls);
        assert_eq!(parse_place(b"futex_do_wait"), Place::Sleeps);
        assert_eq!(parse_place(b"0"), Place::Busy);
        assert_eq!(parse_letter(b"12 (a) R (b) S 1 2 3"), Some(b'S'));
        assert_eq!(parse_letter(b"12 (a"), None);
    }

    #[test]
    fn threads_that_cannot_be_looked_at_are_no_fault_of_theirs() {
        let mut sleepers = Sleepers::of(std::process::id());
        sleepers.directory = PathBuf::from("/dev/null/task");
        let result = sleepers.wait(Whom::All);
        assert!(matches!(result, Err(Broken::Unusable(_))), "{result:?}");
    }

    fn start(program: &str, arguments: &[&str]) -> Option<Child> {
        Command::new(program).args(arguments).spawn().ok()
    }

    #[test]
    fn only_who_waits_for_something_to_happen_rests() {
        // Whom an interpreter of scripts is missing loses that part.
        let polls = start("perl", &["-e", "select(undef, undef, undef, 60)"]);
        let busy = start("sh", &["-c", "while :; do :; done"]);
        let mut over = start("sh", &["-c", "exit 0"]).expect("a shell");
        let rest = |child: &Option<Child>| child.as_ref().map(|c| Sleepers::of(c.id()).wait(Whom::All));
        assert!(matches!(rest(&polls), None | Some(Ok(true))));
        let result = rest(&busy);
        assert!(matches!(result, Some(Err(Broken::Hangs(_)))), "{result:?}");
        // The count of its threads is never right.
        if let Some(busy) = &busy {
            let mut sleepers = Sleepers::of(busy.id());
            sleepers.count = Some(File::open("/proc/self/fd").expect("there"));
            let result = sleepers.wait(Whom::All);
            assert!(matches!(result, Err(Broken::Hangs(_))), "{result:?}");
        }
        let mut sleepers = Sleepers::of(over.id());
        while sleepers.wait(Whom::NoMonitor).expect("it ends") {}
        // One of its threads made room for another: there are as many, but not the same ones.
        let gone = Thread::open(&sleepers.directory.join(over.id().to_string()), false);
        over.wait().expect("it ended");
        if let Some(polls) = &polls {
            let mut sleepers = Sleepers::of(polls.id());
            sleepers.list();
            sleepers.threads = vec![gone.expect("not buried yet")];
            assert_eq!(sleepers.wait(Whom::All), Ok(true));
        }
        for mut child in [polls, busy].into_iter().flatten() {
            child.kill().expect("it runs");
            child.wait().expect("it ends");
        }
    }
}
