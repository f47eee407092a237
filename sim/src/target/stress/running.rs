//! A daemon of the second tier, and the sockets it is talked to over.

use std::fs;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Map, Value, json};

use super::{GIVES_UP_AFTER, HANGS_AFTER, IO_THREADS, LACKS_AFTER, LONGEST_NODE, Trouble, object, unusable};
use crate::clock::Stopwatch;
use crate::lack;
use crate::qemu::Broken;
use crate::qemu::nbd::client::{Answer, Ask, Client};
use crate::qemu::process::Daemon;
use crate::qemu::qmp::{Message, Monitor};

/// Most that is read at once.
const PIECE: u64 = 16 << 20;
/// The token of requests of ours.
const TOKEN: u32 = u32::MAX;

/// A daemon and our ends to it.
#[derive(Debug)]
pub(super) struct Running {
    // Before the daemon: hanging up is gentler than a kill.
    pub(super) client: Client,
    pub(super) monitor: Monitor,
    pub(super) daemon: Daemon,
    pub(super) runs: u32,
}

impl Running {
    pub(super) fn start(program: &Path) -> Result<Running, Trouble> {
        let directory = Daemon::directory().map_err(unusable)?;
        let client = Client::new(&Daemon::export_socket(directory.path()));
        let (ours, theirs) = UnixStream::pair().map_err(unusable)?;
        let monitor = Monitor::new(ours).map_err(unusable)?;
        let daemon = Daemon::start(program, directory, theirs).map_err(unusable)?;
        let mut running = Running {
            client,
            monitor,
            daemon,
            runs: 0,
        };
        running
            .until("no greeting", |r| r.monitor.greeting().is_some())
            .map_err(|broken| unusable(running.daemon.why(broken)))?;
        let agreed = running.ask("qmp_capabilities", &Map::new()).map_err(unusable)?;
        agreed.map_err(|(_, refusal)| unusable(refusal))?;
        for n in 0..IO_THREADS {
            let thread = object(json!({"qom-type": "iothread", "id": format!("io{n}")}));
            let made = running.ask("object-add", &thread).map_err(unusable)?;
            made.map_err(|(_, refusal)| unusable(refusal))?;
        }
        Ok(running)
    }

    /// One look at every socket.
    pub(super) fn pump(&mut self) -> Result<(), Broken> {
        self.monitor.pump()?;
        self.client.pump().map_err(Broken::Nonsense)?;
        if self.monitor.is_gone() {
            return Err(self.daemon.ended());
        }
        Ok(())
    }

    /// Sleeps until the daemon says something, or for a moment.
    pub(super) fn doze(&self) {
        let mut sockets = vec![PollFd::new(self.monitor.socket(), PollFlags::IN)];
        sockets.extend(self.client.sockets().map(|c| PollFd::new(c, PollFlags::IN)));
        let moment = Timespec {
            tv_sec: 0,
            tv_nsec: 50_000_000,
        };
        // Whatever this says, we look again.
        let _ = poll(&mut sockets, Some(&moment));
    }

    /// Pumps until `done`.
    pub(super) fn until(
        &mut self,
        what: &str,
        mut done: impl FnMut(&mut Running) -> bool,
    ) -> Result<(), Broken> {
        let watch = Stopwatch::start();
        loop {
            self.pump()?;
            if done(self) {
                return Ok(());
            }
            self.doze();
            let waited = watch.elapsed();
            if self.is_overdue(waited) {
                let hangs = Broken::Hangs(format!("{what} in {} s", waited.as_secs()));
                return Err(self.daemon.judge(hangs));
            }
        }
    }

    /// Whether an answer that was waited for so long is not to be expected any more.
    pub(super) fn is_overdue(&self, waited: Duration) -> bool {
        waited > GIVES_UP_AFTER
            || (waited > HANGS_AFTER && self.had_its_time())
            || (waited > LACKS_AFTER && lack::has_all_open(self.daemon.pid()))
    }

    /// All threads of the daemon sleep: whoever waits for it waits in vain.
    pub(super) fn had_its_time(&self) -> bool {
        let tasks = fs::read_dir(format!("/proc/{}/task", self.daemon.pid()));
        let mut states = tasks.into_iter().flatten().flatten().filter_map(|t| {
            let stat = fs::read_to_string(t.path().join("stat")).ok()?;
            stat.rsplit_once(") ")?.1.chars().next()
        });
        states.all(|s| s == 'S')
    }

    /// A command of ours. What else is said meanwhile is dropped.
    pub(super) fn ask(
        &mut self,
        execute: &str,
        arguments: &Map<String, Value>,
    ) -> Result<Result<Value, (String, String)>, Broken> {
        let id = self.monitor.send(execute, arguments);
        let mut answer = None;
        self.until(&format!("{execute} is not answered"), |running| {
            while let Some(message) = running.monitor.take() {
                if let Message::Answer(number, result) = message
                    && number == id
                {
                    answer = Some(result);
                }
            }
            answer.is_some()
        })?;
        let answer = answer.expect("just came");
        if let Err((_, desc)) = &answer {
            Broken::unless_lack(desc)?;
        }
        Ok(answer)
    }

    /// A request of ours, to its end.
    pub(super) fn request(&mut self, export: &str, ask: Ask) -> Result<Answer, Broken> {
        let submitted = self.client.submit(export, TOKEN, ask);
        submitted.map_err(|e| Broken::by("the daemon takes no connection", &e))?;
        let mut answer = None;
        self.until("a request is not answered", |running| {
            answer = running.client.answers().find(|(token, _)| *token == TOKEN);
            answer.is_some()
        })?;
        Ok(answer.expect("just came").1)
    }

    /// All bytes of an export; none when one cannot be read.
    pub(super) fn read_whole(&mut self, export: &str, size: u64) -> Result<Vec<u8>, Broken> {
        let mut bytes = Vec::new();
        while size <= LONGEST_NODE && (bytes.len() as u64) < size {
            let at = bytes.len() as u64;
            match self.request(export, Ask::Read(at, PIECE.min(size - at)))? {
                Answer::Read(Ok(piece)) => bytes.extend_from_slice(&piece),
                _ => return Ok(Vec::new()),
            }
        }
        Ok(bytes)
    }
}
