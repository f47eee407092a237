//! One daemon: started, looked after, ended; with a private directory for its sockets.
//!
//! Rules: nothing is left behind, however we end. Dropping a [`Daemon`] kills it and removes its directory. A guard (a
//! shell that waits for our end of a pipe to close) does the same when we are killed: it is there before the daemon is,
//! and the daemon's process itself tells it whom to kill before it becomes the daemon. The daemon leads a group of
//! processes of its own, so that a script that starts it takes it along. The monitor is the daemon's
//! standard input, so that no other daemon started meanwhile inherits it.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use rustix::process::{Pid, Signal, WaitId, WaitIdOptions, kill_process_group, waitid};
use tempfile::TempDir;

use super::{Broken, FEW};
use crate::clock::Stopwatch;
use crate::lack::{self, TooFew};

/// The daemon's name, looked up in PATH.
pub const PROGRAM: &str = "qemu-storage-daemon";
/// Longest directory name under which sockets still fit into an address.
const PATH_LIMIT: usize = 74;
/// How long a program may take to tell its version: it may have to be loaded from a disk.
const VERSION_LIMIT: Duration = Duration::from_secs(20);
/// Most that is read of what it says then, bytes.
const VERSION_LENGTH: u64 = 4096;
/// Most of it that is quoted, characters.
const VERSION_QUOTE: usize = 200;
/// Lines of the daemon's last words.
const LAST_WORDS: usize = 12;
/// How long a daemon that hung up may take to end (it may have to write a core).
const END_LIMIT: Duration = Duration::from_secs(20);

/// A version: (major, minor, micro).
pub type Version = (u32, u32, u32);

/// Why there is no daemon to run on.
#[derive(Debug, thiserror::Error)]
pub enum Unavailable {
    /// No such program.
    #[error(
        "--on qemu needs qemu-storage-daemon 10.x: cannot run '{program}' ({reason}); install it (Debian: \
         qemu-utils) or name one with --qemu PATH"
    )]
    Missing {
        /// What was tried.
        program: String,
        /// Why not.
        reason: std::io::Error,
    },
    /// There is no room for what it takes.
    #[error("--on qemu: {0}")]
    TooFew(#[from] TooFew),
    /// Something that it takes is not to be had.
    #[error("--on qemu: cannot start '{program}': {reason}")]
    Lack {
        /// What was tried.
        program: String,
        /// Why not, and what to do.
        reason: String,
    },
    /// Another program.
    #[error("--on qemu needs qemu-storage-daemon 10.x, but '{program} --version' says: {says}")]
    Version {
        /// What was tried.
        program: String,
        /// Its first line.
        says: String,
    },
}

/// The version of a daemon.
///
/// # Errors
/// When there is none, or none of version 10.
pub fn version(program: &Path) -> Result<Version, Unavailable> {
    let name = program.display().to_string();
    let says = first_line(program).map_err(|reason| {
        let program = name.clone();
        // No thread and no process is to be had just now.
        let lacks = lack::is_ours(&reason) || reason.kind() == io::ErrorKind::WouldBlock;
        if lacks {
            let reason = lack::with_advice(&reason);
            return Unavailable::Lack { program, reason };
        }
        Unavailable::Missing { program, reason }
    })?;
    match parse_version(&says) {
        Some(version) if version.0 == 10 => Ok(version),
        _ => Err(Unavailable::Version { program: name, says }),
    }
}

/// A program as it was named, from wherever it is started: one that is not looked up in PATH is found from here.
#[must_use]
pub fn absolute(program: &Path) -> PathBuf {
    if program.components().count() < 2 {
        return program.to_owned();
    }
    std::path::absolute(program).unwrap_or_else(|_| program.to_owned())
}

/// The first line that a program says of its version; without one, of what is wrong with it. It may be any program.
fn first_line(program: &Path) -> io::Result<String> {
    let mut child = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()?;
    let pipes = (child.stdout.take(), child.stderr.take());
    let (send, said) = std::sync::mpsc::channel();
    // Ends with the line, at the latest when the group is killed.
    let reader = std::thread::Builder::new().spawn(move || {
        let mut line = Vec::new();
        let _ = pipes.0.map(|out| read_line(out, &mut line));
        if line.is_empty() {
            let _ = pipes.1.map(|err| read_line(err, &mut line));
        }
        let _ = send.send(line);
    });
    let text = said.recv_timeout(if reader.is_ok() {
        VERSION_LIMIT
    } else {
        Duration::ZERO
    });
    kill_group(&child);
    let _ = child.wait();
    reader?;
    let text = text.map_err(|_| {
        let limit = VERSION_LIMIT.as_secs();
        io::Error::new(
            io::ErrorKind::TimedOut,
            format!("it does not tell its version in {limit} s"),
        )
    })?;
    let text = String::from_utf8_lossy(&text);
    let line = text.lines().next().unwrap_or("nothing");
    let told = |c: char| {
        if c.is_control() {
            char::REPLACEMENT_CHARACTER
        } else {
            c
        }
    };
    Ok(line.chars().take(VERSION_QUOTE).map(told).collect())
}

fn read_line(pipe: impl Read, line: &mut Vec<u8>) -> io::Result<usize> {
    BufReader::new(pipe.take(VERSION_LENGTH)).read_until(b'\n', line)
}

/// Kills a group of processes, by its leader. Not after that one was buried and another may have its number.
fn kill_group(leader: &Child) {
    if let Some(group) = pid_of(leader) {
        let _ = kill_process_group(group, Signal::KILL);
    }
}

fn pid_of(child: &Child) -> Option<Pid> {
    i32::try_from(child.id()).ok().and_then(Pid::from_raw)
}

fn parse_version(line: &str) -> Option<Version> {
    let rest = line.strip_prefix("qemu-storage-daemon version ")?;
    let mut numbers = rest.split(|c: char| !c.is_ascii_digit());
    let mut next = || numbers.next()?.parse().ok();
    Some((next()?, next()?, next()?))
}

/// A running daemon.
#[derive(Debug)]
pub struct Daemon {
    child: Child,
    /// It is no process any more, and nobody is left of its group.
    buried: bool,
    guard: Guard,
    directory: TempDir,
    /// So much of what it said is no concern of ours, bytes.
    heard: usize,
}

/// Kills the daemon and removes its directory when we end, in whichever way.
#[derive(Debug)]
struct Guard(Child);

impl Guard {
    /// Its standard input closes when we end. The first line there is the number of the daemon's process.
    fn start(directory: &TempDir) -> io::Result<Guard> {
        let script = "read -r daemon; read -r line; [ \"$daemon\" ] && kill -9 -\"$daemon\"; rm -rf \"$1\"";
        let guard = Command::new("/bin/sh")
            .args(["-c", script, "blkcheck-guard"])
            .arg(directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()?;
        Ok(Guard(guard))
    }

    /// Where to say whom to kill.
    fn whom(&self) -> io::Result<OwnedFd> {
        let pipe = self.0.stdin.as_ref().expect("piped");
        pipe.as_fd().try_clone_to_owned()
    }

    fn end(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.end();
    }
}

impl Daemon {
    /// A directory for the sockets of one daemon.
    ///
    /// # Errors
    /// When there is no place.
    pub fn directory() -> io::Result<TempDir> {
        let mut builder = tempfile::Builder::new();
        let builder = builder.prefix("blkcheck-qemu-");
        let usual = std::env::temp_dir();
        if usual.as_os_str().len() <= PATH_LIMIT {
            builder.tempdir_in(usual)
        } else {
            builder.tempdir_in("/tmp")
        }
    }

    /// The socket of the images, as the daemon knows it: from its working directory, so that names on record in images
    /// are the same for every daemon on every machine.
    pub const STORAGE: &str = "blkdisks";

    /// The socket of the exports, from its working directory.
    const EXPORTS: &str = "g";

    /// Where the daemon finds the images.
    #[must_use]
    pub fn storage_socket(directory: &Path) -> PathBuf {
        directory.join(Daemon::STORAGE)
    }

    /// Where the daemon exports nodes.
    #[must_use]
    pub fn export_socket(directory: &Path) -> PathBuf {
        directory.join(Daemon::EXPORTS)
    }

    /// Starts one; its monitor is at the other end of `monitor`.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(program: &Path, directory: TempDir, monitor: UnixStream) -> io::Result<Daemon> {
        let guard = Guard::start(&directory)?;
        let child = Command::new("/bin/sh")
            .args(["-c", "echo $$ && exec \"$@\" >/dev/null", "blkcheck-start"])
            .arg(absolute(program))
            .args(["--chardev", "socket,id=monitor,fd=0", "--monitor", "monitor"])
            // What threads of a pool do at the same time ends in either order.
            .args(["--object", "main-loop,id=loop,thread-pool-max=1"])
            .arg("--nbd-server")
            // From its working directory, which may have any name.
            .arg(format!(
                "addr.type=unix,addr.path={},max-connections=0,handshake-max-seconds=0",
                Daemon::EXPORTS
            ))
            .current_dir(directory.path())
            // Memory that it uses after giving it back holds the same in every run.
            .env("MALLOC_PERTURB_", "165")
            .stdin(OwnedFd::from(monitor))
            .stdout(guard.whom()?)
            .stderr(File::create(directory.path().join("stderr"))?)
            // A Ctrl-C is for us; a daemon that got it too would begin to shut down.
            .process_group(0)
            .spawn()?;
        Ok(Daemon {
            child,
            buried: false,
            guard,
            directory,
            heard: 0,
        })
    }

    /// Why it is of no use, with what it said of it, once.
    #[must_use]
    pub fn why(&self, reason: impl std::fmt::Display) -> String {
        let reason = reason.to_string();
        match self.last_words().last() {
            Some(line) if !line.is_empty() && !reason.contains(&**line) => {
                format!("{reason}; it said: {line}")
            }
            _ => reason,
        }
    }

    /// Who is to blame for what it did not do in time: it hangs, or it may open too few files to go on.
    #[must_use]
    pub fn judge(&self, broken: Broken) -> Broken {
        match broken {
            Broken::Hangs(text) if lack::has_all_open(self.pid()) => {
                Broken::Unusable(format!("{text}; {FEW}"))
            }
            broken => broken,
        }
    }

    /// Its process.
    #[must_use]
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its private directory.
    #[must_use]
    pub fn path(&self) -> &Path {
        self.directory.path()
    }

    /// What it said on stderr at the end.
    #[must_use]
    pub fn last_words(&self) -> Vec<String> {
        let mut text = Vec::new();
        let file = File::open(self.directory.path().join("stderr"));
        let _ = file.and_then(|mut f| f.read_to_end(&mut text));
        let text = String::from_utf8_lossy(text.get(self.heard..).unwrap_or_default());
        let text = text.replace(&*self.directory.path().to_string_lossy(), "");
        let lines: Vec<&str> = text.lines().collect();
        let first = lines.len().saturating_sub(LAST_WORDS);
        lines[first..].iter().map(|&l| l.to_owned()).collect()
    }

    /// What it said so far is no concern of ours any more.
    pub fn forget_words(&mut self) {
        let file = self.directory.path().join("stderr");
        self.heard = file
            .metadata()
            .map_or(0, |m| usize::try_from(m.len()).unwrap_or(0));
    }

    /// Ends it and all that it started. How it ended, where that is to be had.
    fn bury(&mut self) -> Option<ExitStatus> {
        if !std::mem::replace(&mut self.buried, true) {
            kill_group(&self.child);
            // It must not outlive the process whose number it knows.
            self.guard.end();
        }
        self.child.wait().ok()
    }

    /// Whether it ended. It keeps its number until it is buried.
    fn is_over(&self) -> bool {
        let options = WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        let pid = pid_of(&self.child);
        pid.is_some_and(|pid| matches!(waitid(WaitId::Pid(pid), options), Ok(Some(_))))
    }

    /// It hung up: how it ended.
    #[expect(
        clippy::disallowed_methods,
        reason = "how long a process takes to end is real time"
    )]
    pub fn ended(&mut self) -> Broken {
        let watch = Stopwatch::start();
        while watch.elapsed() < END_LIMIT {
            if self.is_over()
                && let Some(status) = self.bury()
            {
                let words = self.last_words();
                if let Some(lack) = words.iter().find(|line| lack::is_told(line)) {
                    return Broken::Unusable(format!("{lack}; {FEW}"));
                }
                // Only who aborts says why.
                let why = words.last().filter(|_| status.signal() == Some(6));
                let said = why.map_or_else(String::new, |line| format!(": {line}"));
                return Broken::Died(format!("the daemon {}{said}", manner(status)));
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Broken::Died("the daemon closed its monitor and lives on".to_owned())
    }
}

/// How a process ended.
fn manner(status: ExitStatus) -> String {
    const NAMES: [(i32, &str); 7] = [
        (4, "SIGILL"),
        (5, "SIGTRAP"),
        (6, "SIGABRT"),
        (7, "SIGBUS"),
        (8, "SIGFPE"),
        (9, "SIGKILL"),
        (11, "SIGSEGV"),
    ];
    match status.signal() {
        None => format!("exited with code {}", status.code().unwrap_or(-1)),
        Some(signal) => match NAMES.iter().find(|(n, _)| *n == signal) {
            Some((_, name)) => format!("died of {name}"),
            None => format!("died of signal {signal}"),
        },
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.bury();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_read_or_refused() {
        let debian = "qemu-storage-daemon version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1~bpo12+1)";
        assert_eq!(parse_version(debian), Some((10, 0, 2)));
        assert_eq!(parse_version("qemu-img version 10.0.2"), None);
        assert_eq!(parse_version("qemu-storage-daemon version ten"), None);
        let missing = version(Path::new("/nowhere/daemon")).expect_err("not there");
        assert!(
            missing.to_string().contains("needs qemu-storage-daemon 10.x"),
            "{missing}"
        );
        let other = version(Path::new("/bin/echo")).expect_err("another program");
        assert!(other.to_string().contains("says: "), "{other}");
    }

    fn script(directory: &TempDir, text: &str) -> PathBuf {
        let path = directory.path().join("program");
        // By a process of its own: what is open for writing here would be so in all that other tests just start, and not
        // to be executed.
        let written = Command::new("/bin/sh")
            .args([
                "-c",
                "printf '#!/bin/sh\\n%s\\n' \"$2\" >\"$1\" && chmod 700 \"$1\"",
                "write",
            ])
            .args([path.as_os_str(), text.as_ref()])
            .status();
        assert!(written.expect("a shell").success());
        path
    }

    #[test]
    fn a_program_that_talks_for_ever_or_says_it_elsewhere_has_a_version_or_none() {
        let directory = tempfile::tempdir().expect("a directory");
        let endless =
            version(&script(&directory, "while :; do echo -n no no no; done")).expect_err("no version");
        assert!(endless.to_string().len() < 500, "{endless}");
        let elsewhere = version(&script(&directory, "echo cannot load a library >&2; exit 127"));
        let elsewhere = elsewhere.expect_err("no version");
        assert!(
            elsewhere.to_string().contains("says: cannot load a library"),
            "{elsewhere}"
        );
        // Whoever keeps the pipe open does not keep us.
        let text = "sleep 1000 & echo qemu-storage-daemon version 10.0.2; exit";
        assert_eq!(
            first_line(&script(&directory, text)).ok().as_deref(),
            Some("qemu-storage-daemon version 10.0.2")
        );
    }

    #[test]
    fn a_program_is_the_same_one_from_another_directory() {
        assert_eq!(absolute(Path::new(PROGRAM)), Path::new(PROGRAM));
        assert_eq!(absolute(Path::new("/a/b")), Path::new("/a/b"));
        assert!(absolute(Path::new("build/daemon")).is_absolute());
        assert!(absolute(Path::new("./daemon")).is_absolute());
    }

    /// Whether a process is there that is not dead.
    fn runs(pid: &str) -> bool {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim()));
        stat.is_ok_and(|s| {
            !s.rsplit_once(") ")
                .is_some_and(|(_, rest)| rest.starts_with(['Z', 'X']))
        })
    }

    /// A script that starts a daemon takes it along, whether we end it or our own end does.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "other processes take real time")]
    fn what_a_script_started_ends_with_it() {
        let scripts = tempfile::tempdir().expect("a directory");
        for by_guard in [false, true] {
            let directory = Daemon::directory().expect("a directory");
            let (path, pids) = (directory.path().to_owned(), scripts.path().join("pid"));
            let text = format!(
                "sleep 1000 & echo $! > {0}.new; mv {0}.new {0}; wait",
                pids.display()
            );
            let (_ours, theirs) = UnixStream::pair().expect("a pair");
            let mut daemon = Daemon::start(&script(&scripts, &text), directory, theirs).expect("starts");
            let within = |done: &dyn Fn() -> bool| {
                let watch = Stopwatch::start();
                while !done() && watch.elapsed() < END_LIMIT {
                    std::thread::sleep(Duration::from_millis(5));
                }
                done()
            };
            assert!(within(&|| pids.exists()));
            let pid = std::fs::read_to_string(&pids).expect("its number");
            assert!(runs(&pid));
            if by_guard {
                // What the kernel does when we are killed.
                drop(daemon.guard.0.stdin.take());
                assert!(within(&|| !runs(&pid) && !path.exists()));
            }
            drop(daemon);
            assert!(within(&|| !runs(&pid)), "{pid} lives on");
            assert!(!path.exists());
            std::fs::remove_file(&pids).expect("there");
        }
    }

    /// Whose number a group has to be killed by.
    #[test]
    #[expect(clippy::disallowed_methods, reason = "another process takes real time")]
    fn a_daemon_that_ended_keeps_its_number_until_it_is_buried() {
        let directory = Daemon::directory().expect("a directory");
        let (_ours, theirs) = UnixStream::pair().expect("a pair");
        let mut daemon = Daemon::start(Path::new("/bin/false"), directory, theirs).expect("starts");
        let watch = Stopwatch::start();
        while !daemon.is_over() && watch.elapsed() < END_LIMIT {
            std::thread::sleep(Duration::from_millis(1));
        }
        let process = PathBuf::from(format!("/proc/{}", daemon.pid()));
        assert!(daemon.is_over() && process.exists());
        assert_eq!(daemon.bury().and_then(|status| status.code()), Some(1));
        assert!(!process.exists());
    }

    /// Where no daemon starts, for one.
    #[test]
    fn a_guard_of_nobody_is_no_corpse() {
        let directory = Daemon::directory().expect("a directory");
        let guard = Guard::start(&directory).expect("starts");
        let process = PathBuf::from(format!("/proc/{}", guard.0.id()));
        assert!(process.exists());
        drop(guard);
        assert!(!process.exists());
    }

    #[test]
    fn a_dropped_daemon_is_gone_with_its_directory() {
        // Any program that takes these arguments, or ends at once, will do.
        let directory = Daemon::directory().expect("a directory");
        let path = directory.path().to_owned();
        let (ours, theirs) = UnixStream::pair().expect("a pair");
        let mut daemon = Daemon::start(Path::new("/bin/false"), directory, theirs).expect("starts");
        assert_eq!(
            daemon.ended(),
            Broken::Died("the daemon exited with code 1".to_owned())
        );
        assert!(path.exists());
        drop(daemon);
        assert!(!path.exists());
        drop(ours);
    }
}
