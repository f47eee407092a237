//! When the daemon has come to rest: all its threads sleep.
//!
//! The kernel wakes a sleeper inside the very call that gives it something to do, so that a daemon of which every thread
//! sleeps has nothing to do that it knows of. Threads are looked at one after the other, so everything is looked at
//! twice: somebody woken behind the first look is seen by the second.
//! Rules: a daemon that uses up much CPU time without coming to rest hangs; the limit is its CPU time and not the time
//! of day, which other programs use up as well.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;

use super::Broken;
use crate::clock::Stopwatch;

/// CPU time of the daemon in one settling, in clock ticks of 10 ms.
const CPU_LIMIT: u64 = 100;
/// Time of day in one settling: the machine itself is in trouble.
const TIME_LIMIT: Duration = Duration::from_secs(120);
/// Looks between two looks at a clock.
const PATIENCE: u32 = 512;
/// Looks without a pause in between: most of what a daemon does takes no longer.
const AT_ONCE: u32 = 4;
/// Then this long. Whoever sleeps is woken soon on a busy machine too; whoever only yields comes last.
const PAUSE: Duration = Duration::from_micros(20);

/// Looks at the threads of a process.
#[derive(Debug)]
pub struct Sleepers {
    directory: PathBuf,
    threads: Vec<File>,
    ended: bool,
    buffer: [u8; 512],
}

/// What `stat` says of a thread.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Stat {
    state: u8,
    ticks: u64,
    threads: usize,
}

/// Reads the text of `/proc/PID/task/TID/stat`.
fn parse(text: &[u8]) -> Option<Stat> {
    // The name in brackets may hold anything, brackets too.
    let close = text.iter().rposition(|b| *b == b')')?;
    let mut fields = text.get(close + 2..)?.split(|b| *b == b' ');
    let number = |field: Option<&[u8]>| {
        field?.iter().try_fold(0u64, |n, b| {
            b.is_ascii_digit()
                .then(|| n.wrapping_mul(10).wrapping_add(u64::from(b - b'0')))
        })
    };
    let state = fields.next()?;
    // From state, the third field: utime is the 14th, num_threads the 20th.
    let user = number(fields.nth(10))?;
    let system = number(fields.next())?;
    let threads = number(fields.nth(4))?;
    Some(Stat {
        state: *state.first()?,
        ticks: user + system,
        threads: usize::try_from(threads).ok()?,
    })
}

impl Sleepers {
    /// The threads of this process.
    #[must_use]
    pub fn of(pid: u32) -> Sleepers {
        Sleepers {
            directory: PathBuf::from(format!("/proc/{pid}/task")),
            threads: Vec::new(),
            ended: false,
            buffer: [0; 512],
        }
    }

    /// Lists the threads anew, the oldest first.
    fn list(&mut self) {
        self.threads.clear();
        let Ok(entries) = fs::read_dir(&self.directory) else {
            return;
        };
        let mut numbers: Vec<u32> = entries
            .filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok())
            .collect();
        numbers.sort_unstable();
        let open = |n: &u32| File::open(self.directory.join(format!("{n}/stat"))).ok();
        self.threads = numbers.iter().filter_map(open).collect();
    }

    fn look(&mut self, at: usize) -> Option<Stat> {
        let n = self.threads[at].read_at(&mut self.buffer, 0).ok()?;
        parse(&self.buffer[..n])
    }

    /// One look at everybody: whether all sleep, and CPU time used so far.
    fn look_round(&mut self) -> (bool, u64) {
        let mut ticks = 0;
        let mut at = 0;
        while at < self.threads.len() {
            // A thread that is gone, or one more: another list.
            let Some(stat) = self.look(at) else {
                self.list();
                return (false, ticks);
            };
            ticks += stat.ticks;
            // It ended, or is about to: other threads may keep its sockets open a little longer.
            if at == 0 && matches!(stat.state, b'Z' | b'X') {
                self.ended = true;
                return (true, ticks);
            }
            if stat.state != b'S' {
                return (false, ticks);
            }
            if stat.threads != self.threads.len() {
                self.list();
                return (false, ticks);
            }
            at += 1;
        }
        (at > 0, ticks)
    }

    /// Waits until all sleep. False: the process ended.
    ///
    /// # Errors
    /// When they do not come to rest.
    #[expect(clippy::disallowed_methods, reason = "another process takes real time")]
    pub fn wait(&mut self) -> Result<bool, Broken> {
        if self.threads.is_empty() {
            self.list();
        }
        let (mut quiet, mut looks) = (0, 0u32);
        let mut since: Option<(Stopwatch, u64)> = None;
        while quiet < 2 {
            let (all, ticks) = self.look_round();
            if all {
                quiet += 1;
                continue;
            }
            if self.threads.is_empty() {
                return Ok(false);
            }
            quiet = 0;
            looks += 1;
            if looks.is_multiple_of(PATIENCE) {
                let (watch, used) = *since.get_or_insert_with(|| (Stopwatch::start(), ticks));
                if ticks.saturating_sub(used) > CPU_LIMIT {
                    return Err(Broken::Hangs("it runs without coming to rest".to_owned()));
                }
                if watch.elapsed() > TIME_LIMIT {
                    return Err(Broken::Hangs("it neither rests nor runs".to_owned()));
                }
            }
            if looks > AT_ONCE {
                std::thread::sleep(PAUSE);
            }
        }
        Ok(!self.ended)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stat_line_is_read_behind_the_name() {
        let line = b"12 (a) R (b) S 1 2 3 4 5 6 7 8 9 10 31 11 0 0 20 0 4 0 99 100 5\n";
        let stat = Stat {
            state: b'S',
            ticks: 42,
            threads: 4,
        };
        assert_eq!(parse(line), Some(stat));
        assert_eq!(parse(b"12 (a"), None);
        assert_eq!(parse(b"12 (a) S 1 2"), None);
    }

    #[test]
    fn a_sleeping_process_rests_and_a_busy_one_does_not() {
        let start = |program: &str| {
            let mut shell = std::process::Command::new("sh");
            shell.args(["-c", program]).spawn().expect("a shell")
        };
        let mut asleep = start("exec sleep 60");
        assert_eq!(Sleepers::of(asleep.id()).wait(), Ok(true));
        let mut busy = start("while :; do :; done");
        let result = Sleepers::of(busy.id()).wait();
        assert!(matches!(result, Err(Broken::Hangs(_))), "{result:?}");
        let mut over = start("exit 0");
        let mut sleepers = Sleepers::of(over.id());
        while sleepers.wait().expect("it ends") {}
        over.wait().expect("it ended");
        for child in [&mut asleep, &mut busy] {
            child.kill().expect("it runs");
            child.wait().expect("it ends");
        }
    }
}
