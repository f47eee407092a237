//! Where a daemon died or hangs: a backtrace by gdb, where there is one and it may.
//!
//! Rules: nothing depends on it; a daemon under it does the same, only slower. It is attached from the start, since a
//! process that died of a signal shows nothing any more.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::clock::Stopwatch;

/// How long attaching, and telling, may take: it reads symbols.
const LIMIT: Duration = Duration::from_secs(30);
/// Frames that are kept.
const FRAMES: usize = 24;

/// A gdb that watches a daemon.
#[derive(Debug)]
pub struct Debugger {
    child: Child,
    output: PathBuf,
}

impl Debugger {
    /// Attaches to a process; its words go to a file in `directory`. `None`: there is no gdb, or it may not.
    #[must_use]
    pub fn attach(pid: u32, directory: &Path) -> Option<Debugger> {
        let output = directory.join("gdb");
        let file = File::create(&output).ok()?;
        let child = Command::new("gdb")
            .args(["-q", "-nx", "-batch", "-p", &pid.to_string()])
            .args(["-ex", "set pagination off", "-ex", "continue"])
            .args(["-ex", &format!("backtrace {FRAMES}")])
            .env_remove("DEBUGINFOD_URLS")
            .current_dir(directory)
            .stdin(Stdio::null())
            .stdout(file)
            .stderr(Stdio::null())
            .spawn()
            .ok()?;
        let mut debugger = Debugger { child, output };
        let traced = || {
            let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let tracer = status.lines().find_map(|l| l.strip_prefix("TracerPid:"));
            tracer.is_some_and(|t| t.trim() != "0")
        };
        debugger.within_limit(|child| traced() || child.try_wait().is_ok_and(|s| s.is_some()));
        traced().then_some(debugger)
    }

    #[expect(clippy::disallowed_methods, reason = "another process takes real time")]
    fn within_limit(&mut self, mut done: impl FnMut(&mut Child) -> bool) {
        let watch = Stopwatch::start();
        while !done(&mut self.child) && watch.elapsed() < LIMIT {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// The frames of the thread that died, innermost first; of a process that lives on (`interrupt`), where it is.
    #[must_use]
    pub fn backtrace(mut self, interrupt: bool) -> Vec<String> {
        if interrupt {
            let pid = self.child.id().to_string();
            let _ = Command::new("/bin/sh")
                .args(["-c", "kill -INT \"$1\"", "sh", &pid])
                .status();
        }
        self.within_limit(|child| child.try_wait().is_ok_and(|s| s.is_some()));
        frames(&fs::read_to_string(&self.output).unwrap_or_default())
    }
}

impl Drop for Debugger {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// The frames in gdb's output, without addresses.
fn frames(text: &str) -> Vec<String> {
    let frame = |line: &str| {
        let (number, rest) = line.strip_prefix('#')?.split_once(' ')?;
        let rest = rest.trim_start();
        let rest = match rest.split_once(" in ") {
            Some((address, function)) if address.starts_with("0x") => function,
            _ => rest,
        };
        Some(format!("#{number} {rest}"))
    };
    text.lines().filter_map(frame).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_told_from_the_rest_and_have_no_addresses() {
        let text = "[New LWP 2]\n0x00007f in __ppoll () from /lib/libc.so.6\n\nThread 1 received signal SIGSEGV\n\
            #0  bdrv_is_allocated (bs=0x0) at block.c:1\n#1  0x0000555555 in main ()\n#12 0x00 in ?? ()\n";
        assert_eq!(
            frames(text),
            [
                "#0 bdrv_is_allocated (bs=0x0) at block.c:1",
                "#1 main ()",
                "#12 ?? ()"
            ]
        );
    }
}
