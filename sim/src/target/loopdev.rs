//! A private directory for a run's files, and loop devices over files in it.
//!
//! Rules: nothing outlives the process for long, however it ends. A device is marked for automatic detachment as soon
//! as it is attached, while this process holds it open: the kernel detaches it when the last holder is gone, be that
//! by drop, panic, Ctrl-C or SIGKILL. What such an end does leave (the directory; a device in the moment between
//! attaching and marking) the next [`Scratch::new`] of the same user removes: the directory's name says which process
//! owns it, and devices are known by their backing file being in such a directory.
//! Devices are managed by util-linux's `losetup`, which knows the races of the kernel interface; `unsafe` is not
//! needed for it.
//! Not here: what is in the files.

use std::cell::Cell;
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::lack::TooFew;

/// Why there is no loop device. The texts say what is missing.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// The kernel has no loop driver, or this container hides it.
    #[error(
        "no loop devices here: /dev/loop-control does not exist (load the kernel module `loop`, or give the container the device)"
    )]
    NoDriver,
    /// Not privileged.
    #[error(
        "loop devices need root: /dev/loop-control may not be opened by this user (run as root, or use --on file)"
    )]
    NotPermitted,
    /// util-linux is missing.
    #[error("loop devices need the program `losetup` of util-linux, which is not in PATH")]
    NoLosetup,
    /// `losetup` refused.
    #[error("losetup could not attach {file}: {text}")]
    Attach {
        /// The backing file.
        file: String,
        /// What it said.
        text: String,
    },
    /// There is no room for what it takes.
    #[error(transparent)]
    TooFew(#[from] TooFew),
    /// Anything else about files.
    #[error("{what}: {error}")]
    Io {
        /// Doing what.
        what: String,
        /// The cause.
        error: io::Error,
    },
}

/// Shorthand for `map_err`.
fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> LoopError {
    let what = what.into();
    move |error| LoopError::Io { what, error }
}

/// Whether loop devices can be had, and if not, why.
///
/// # Errors
/// The reason.
pub fn available() -> Result<(), LoopError> {
    match OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/loop-control")
    {
        Ok(_) => {}
        Err(e) if e.kind() == ErrorKind::PermissionDenied => return Err(LoopError::NotPermitted),
        Err(e) if matches!(e.kind(), ErrorKind::NotFound) => return Err(LoopError::NoDriver),
        Err(error) => {
            return Err(LoopError::Io {
                what: "opening /dev/loop-control".into(),
                error,
            });
        }
    }
    losetup(&["--version"]).map(|_| ())
}

fn losetup(arguments: &[&str]) -> Result<std::process::Output, LoopError> {
    // Messages in English: they end up in ours.
    Command::new("losetup")
        .args(arguments)
        .env("LC_ALL", "C")
        .output()
        .map_err(|error| match error.kind() {
            ErrorKind::NotFound => LoopError::NoLosetup,
            _ => LoopError::Io {
                what: "running losetup".into(),
                error,
            },
        })
}

/// The identity of a process that no later process can have by chance.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Owner {
    /// PID namespace; a pid means nothing in another one.
    namespace: u64,
    pid: u32,
    /// In clock ticks since boot.
    started: u64,
}

const PREFIX: &str = "blkcheck-run-";

impl Owner {
    fn of(pid: u32) -> Option<Owner> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        // The command name, in parentheses, may contain anything; field 22 is the 20th after it.
        let started = stat
            .rsplit_once(')')?
            .1
            .split_whitespace()
            .nth(19)?
            .parse()
            .ok()?;
        let namespace = fs::metadata("/proc/self/ns/pid").ok()?.ino();
        Some(Owner {
            namespace,
            pid,
            started,
        })
    }

    fn directory(&self, serial: u32) -> String {
        format!(
            "{PREFIX}{}-{}-{}-{serial}",
            self.namespace, self.pid, self.started
        )
    }

    fn parse(directory: &str) -> Option<Owner> {
        let mut parts = directory.strip_prefix(PREFIX)?.splitn(4, '-');
        let owner = Owner {
            namespace: parts.next()?.parse().ok()?,
            pid: parts.next()?.parse().ok()?,
            started: parts.next()?.parse().ok()?,
        };
        parts.next()?.parse::<u32>().ok()?;
        Some(owner)
    }

    /// A process of this namespace that is gone. Of another namespace nothing is known.
    fn dead(&self) -> bool {
        let us = Owner::of(std::process::id());
        us.is_some_and(|us| us.namespace == self.namespace) && Owner::of(self.pid).as_ref() != Some(self)
    }
}

/// A private directory, removed on drop.
#[derive(Debug)]
pub struct Scratch {
    path: PathBuf,
}

thread_local! {
    static SERIAL: Cell<u32> = const { Cell::new(0) };
}

impl Scratch {
    /// A new directory below `base` (`None`: the system's for temporary files), readable by this user only. First
    /// removes what dead processes left there.
    ///
    /// # Errors
    /// When it cannot be created.
    pub fn new(base: Option<&Path>) -> Result<Scratch, LoopError> {
        let base = base.map_or_else(std::env::temp_dir, Path::to_owned);
        let base = base
            .canonicalize()
            .map_err(io_error(format!("temporary directory {}", base.display())))?;
        clean_remains(&base);
        let owner = Owner::of(std::process::id()).ok_or_else(|| LoopError::Io {
            what: "reading /proc/self/stat".into(),
            error: ErrorKind::NotFound.into(),
        })?;
        loop {
            let serial = SERIAL.replace(SERIAL.get() + 1);
            let path = base.join(owner.directory(serial));
            match DirBuilder::new().mode(0o700).create(&path) {
                Ok(()) => return Ok(Scratch { path }),
                // Another thread of this process.
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(io_error(format!("creating {}", path.display()))(e)),
            }
        }
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        // Nobody is left to be told; the next run tries again once this process is gone.
        let _ = fs::remove_dir_all(&self.path);
    }
}

/// Removes directories of dead owners below `base`, after detaching the loop devices over files in them. Best effort:
/// two runs may do it at the same time, and what cannot be removed is no reason not to run.
fn clean_remains(base: &Path) {
    let Ok(entries) = fs::read_dir(base) else { return };
    let Some(user) = fs::metadata("/proc/self").ok().map(|m| m.uid()) else {
        return;
    };
    for entry in entries.flatten() {
        let dead = entry
            .file_name()
            .to_str()
            .and_then(Owner::parse)
            .is_some_and(|owner| owner.dead());
        let ours = entry.metadata().is_ok_and(|m| m.is_dir() && m.uid() == user);
        if dead && ours {
            for device in devices_over(&entry.path()) {
                let _ = losetup(&["--detach", &device.to_string_lossy()]);
            }
            let _ = fs::remove_dir_all(entry.path());
        }
    }
}

/// Loop devices whose backing file is, or was, in `directory`.
#[must_use]
pub fn devices_over(directory: &Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir("/sys/block") else {
        return Vec::new();
    };
    let mut devices: Vec<PathBuf> = entries
        .flatten()
        .filter(|entry| {
            let backing = fs::read_to_string(entry.path().join("loop/backing_file"));
            backing.is_ok_and(|file| Path::new(file.trim_end_matches('\n')).starts_with(directory))
        })
        .map(|entry| Path::new("/dev").join(entry.file_name()))
        .collect();
    devices.sort();
    devices
}

/// How often a device is taken anew that was detached by somebody else at once.
const ATTEMPTS: u32 = 4;

/// An attached loop device; detached when dropped.
#[derive(Debug)]
pub struct LoopDevice {
    path: PathBuf,
    /// Keeps it attached.
    _hold: File,
}

impl LoopDevice {
    /// A loop device over a file, which must be in a [`Scratch`]; `direct`: past the page cache of the file.
    ///
    /// # Errors
    /// Without the privilege, the driver, or `losetup`.
    pub fn attach(file: &Path, direct: bool) -> Result<LoopDevice, LoopError> {
        available()?;
        let refused = |text: &[u8]| LoopError::Attach {
            file: file.display().to_string(),
            text: String::from_utf8_lossy(text).trim().to_owned(),
        };
        let direct = if direct {
            "--direct-io=on"
        } else {
            "--direct-io=off"
        };
        let mut left = ATTEMPTS;
        loop {
            left -= 1;
            let output = losetup(&["--find", "--show", direct, "--", &file.to_string_lossy()])?;
            if !output.status.success() {
                return Err(refused(&output.stderr));
            }
            let path = PathBuf::from(String::from_utf8_lossy(&output.stdout).trim());
            let hold = OpenOptions::new().read(true).write(true).open(&path);
            // While it is open this only marks it; were it not, it detaches it. Either way nothing stays behind.
            let marked = losetup(&["--detach", &path.to_string_lossy()])?;
            if left > 0 && is_gone(&marked) {
                continue;
            }
            let hold = hold.map_err(io_error(format!("opening {}", path.display())))?;
            if !marked.status.success() {
                return Err(refused(&marked.stderr));
            }
            make_writable(&path)?;
            return Ok(LoopDevice { path, _hold: hold });
        }
    }

    /// `/dev/loopN`.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// Nothing is attached any more: a `losetup` that a killed run had started was late, and detached the device that had got this
/// number since.
fn is_gone(marked: &std::process::Output) -> bool {
    !marked.status.success() && String::from_utf8_lossy(&marked.stderr).contains("No such device or address")
}

/// The read-only flag of a device (BLKROSET) outlives detaching: whoever had this number last may have left it set.
fn make_writable(device: &Path) -> Result<(), LoopError> {
    let name = device.file_name().unwrap_or_default().to_string_lossy();
    let flag = format!("/sys/block/{name}/ro");
    let is_set = || fs::read(&flag).is_ok_and(|ro| ro.starts_with(b"1"));
    if !is_set() {
        return Ok(());
    }
    let run = Command::new("blockdev")
        .arg("--setrw")
        .arg(device)
        .env("LC_ALL", "C")
        .output();
    let output = run.map_err(io_error("running blockdev of util-linux"))?;
    if output.status.success() && !is_set() {
        return Ok(());
    }
    let text = format!(
        "{} stays read-only: {}",
        device.display(),
        String::from_utf8_lossy(&output.stderr).trim()
    );
    Err(LoopError::Attach {
        file: device.display().to_string(),
        text,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_owner_is_found_again_in_its_directory_name() {
        let us = Owner::of(std::process::id()).unwrap();
        assert_eq!(Owner::parse(&us.directory(7)), Some(us.clone()));
        assert!(!us.dead());
        // A later process with our number.
        assert!(
            Owner {
                started: us.started + 1,
                ..us.clone()
            }
            .dead()
        );
        // Not ours to judge.
        assert!(
            !Owner {
                namespace: us.namespace + 1,
                started: 0,
                ..us
            }
            .dead()
        );
        assert_eq!(Owner::parse("blkcheck-run-1-2-3"), None);
        assert_eq!(Owner::parse("blkcheck-run-1-2-3-x"), None);
        assert_eq!(Owner::parse("another"), None);
    }

    #[test]
    fn remains_of_the_dead_go_and_those_of_the_living_stay() {
        let base = tempfile::tempdir().unwrap();
        let us = Owner::of(std::process::id()).unwrap();
        let dead = base.path().join(
            Owner {
                started: us.started + 1,
                ..us.clone()
            }
            .directory(0),
        );
        let foreign = base.path().join(Owner { namespace: 1, ..us }.directory(0));
        let unrelated = base.path().join("blkcheck-notes");
        for dir in [&dead, &foreign, &unrelated] {
            fs::create_dir(dir).unwrap();
            fs::write(dir.join("image"), b"x").unwrap();
        }
        let living = Scratch::new(Some(base.path())).unwrap();
        let another = Scratch::new(Some(base.path())).unwrap();
        assert!(!dead.exists());
        assert!(foreign.exists() && unrelated.exists() && living.path().exists());
        assert_eq!(fs::metadata(another.path()).unwrap().mode() & 0o777, 0o700);
        let gone = another.path().to_owned();
        drop(another);
        assert!(!gone.exists());
    }
}
