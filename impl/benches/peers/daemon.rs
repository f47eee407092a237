//! A `qemu-storage-daemon` that is spoken to over QMP on its standard input and output.

use std::fs;
use std::io::{BufRead, BufReader, Lines, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use serde_json::{Value, json};

/// One daemon.
pub(crate) struct Daemon {
    child: Child,
    to: ChildStdin,
    lines: Lines<BufReader<ChildStdout>>,
}

impl Daemon {
    /// Starts one with these nodes.
    pub(crate) fn start(blockdevs: &[Value]) -> Daemon {
        let mut command = Command::new("qemu-storage-daemon");
        for blockdev in blockdevs {
            command.args(["--blockdev", &blockdev.to_string()]);
        }
        let mut child = command
            .args(["--chardev", "stdio,id=qmp", "--monitor", "qmp"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .expect("checked to be there");
        let to = child.stdin.take().expect("piped");
        let lines = BufReader::new(child.stdout.take().expect("piped")).lines();
        let mut daemon = Daemon { child, to, lines };
        daemon.send("qmp_capabilities", &json!({}));
        daemon.until(|m| m.get("return").is_some());
        daemon
    }

    pub(crate) fn send(&mut self, command: &str, arguments: &Value) {
        let message = json!({ "execute": command, "arguments": arguments });
        writeln!(self.to, "{message}").expect("it reads");
    }

    /// Reads until a message is as `wanted`; an error is a failed bench.
    pub(crate) fn until(&mut self, wanted: impl Fn(&Value) -> bool) {
        loop {
            let line = self.lines.next().expect("the daemon lives").expect("text");
            let message: Value = serde_json::from_str(&line).expect("JSON");
            assert!(message.get("error").is_none(), "{message}");
            if wanted(&message) {
                return;
            }
        }
    }

    /// The most memory that it had so far, MiB.
    pub(crate) fn peak(&self) -> f64 {
        peak(&self.child.id().to_string())
    }

    pub(crate) fn quit(mut self) {
        self.send("quit", &json!({}));
        assert!(self.child.wait().expect("it ends").success());
    }
}

/// The most memory that a process had resident so far, MiB.
pub(crate) fn peak(process: &str) -> f64 {
    let status = fs::read_to_string(format!("/proc/{process}/status")).expect("Linux");
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kib = line.and_then(|l| l.trim().strip_suffix(" kB"));
    kib.and_then(|k| k.parse::<f64>().ok()).expect("it says so") / 1024.0
}

/// Forgets this process's own peak.
pub(crate) fn forget_peak() {
    fs::write("/proc/self/clear_refs", "5").expect("Linux lets a process do that");
}
