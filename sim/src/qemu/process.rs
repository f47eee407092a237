//! One daemon: started, looked after, ended; with a private directory for its sockets.
//!
//! Rules: nothing is left behind, however we end. Dropping a [`Daemon`] kills it and removes its directory. A guard (a
//! shell that waits for our end of a pipe to close) does the same when we are killed. The monitor is the daemon's
//! standard input, so that no other daemon started meanwhile inherits it.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::Broken;
use crate::clock::Stopwatch;

/// The daemon's name, looked up in PATH.
pub const PROGRAM: &str = "qemu-storage-daemon";
/// Longest directory name under which sockets still fit into an address.
const PATH_LIMIT: usize = 74;
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
    let output = Command::new(program)
        .arg("--version")
        .stdin(Stdio::null())
        .output()
        .map_err(|reason| Unavailable::Missing {
            program: name.clone(),
            reason,
        })?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let says = text.lines().next().unwrap_or("nothing").to_owned();
    match parse_version(&says) {
        Some(version) if version.0 == 10 => Ok(version),
        _ => Err(Unavailable::Version { program: name, says }),
    }
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
    guard: Option<Child>,
    directory: TempDir,
    /// So much of what it said is no concern of ours, bytes.
    heard: usize,
}

impl Daemon {
    /// A directory for the sockets of one daemon.
    ///
    /// # Errors
    /// When there is no place.
    pub fn directory() -> std::io::Result<TempDir> {
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

    /// Where the daemon finds the images.
    #[must_use]
    pub fn storage_socket(directory: &Path) -> PathBuf {
        directory.join(Daemon::STORAGE)
    }

    /// Where the daemon exports nodes.
    #[must_use]
    pub fn export_socket(directory: &Path) -> PathBuf {
        directory.join("g")
    }

    /// Starts one; its monitor is at the other end of `monitor`.
    ///
    /// # Errors
    /// When it does not start.
    pub fn start(program: &Path, directory: TempDir, monitor: UnixStream) -> std::io::Result<Daemon> {
        let exports = Daemon::export_socket(directory.path());
        let child = Command::new(program)
            .args(["--chardev", "socket,id=monitor,fd=0", "--monitor", "monitor"])
            // What threads of a pool do at the same time ends in either order.
            .args(["--object", "main-loop,id=loop,thread-pool-max=1"])
            .arg("--nbd-server")
            .arg(format!(
                "addr.type=unix,addr.path={},max-connections=0,handshake-max-seconds=0",
                exports.display()
            ))
            .current_dir(directory.path())
            // Memory that it uses after giving it back holds the same in every run.
            .env("MALLOC_PERTURB_", "165")
            .stdin(OwnedFd::from(monitor))
            .stdout(Stdio::null())
            .stderr(File::create(directory.path().join("stderr"))?)
            // A Ctrl-C is for us; a daemon that got it too would begin to shut down.
            .process_group(0)
            .spawn()?;
        let mut daemon = Daemon {
            child,
            guard: None,
            directory,
            heard: 0,
        };
        daemon.guard = Some(daemon.start_guard()?);
        Ok(daemon)
    }

    /// Its standard input closes when we end, in whichever way.
    fn start_guard(&self) -> std::io::Result<Child> {
        Command::new("/bin/sh")
            .args([
                "-c",
                "read -r line; kill -9 \"$1\"; rm -rf \"$2\"",
                "blkcheck-guard",
            ])
            .arg(self.child.id().to_string())
            .arg(self.directory.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
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

    /// It hung up: how it ended.
    #[expect(
        clippy::disallowed_methods,
        reason = "how long a process takes to end is real time"
    )]
    pub fn ended(&mut self) -> Broken {
        let watch = Stopwatch::start();
        while watch.elapsed() < END_LIMIT {
            if let Ok(Some(status)) = self.child.try_wait() {
                // Only who aborts says why.
                let words = self.last_words();
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
        // The guard first: it must not outlive the process whose number it knows.
        for child in self.guard.iter_mut().chain([&mut self.child]) {
            let _ = child.kill();
            let _ = child.wait();
        }
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
