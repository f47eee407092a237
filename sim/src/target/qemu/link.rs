//! A running daemon and all our ends to it: what is sent, what is waited for, what is ours to ask.
//!
//! Rules: one thing is given at a time, and then the daemon comes to rest. Commands of our own are carried out to their
//! end, releasing what they wait for in order.

use std::cell::Cell;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use rustix::thread::{CpuSet, sched_getaffinity, sched_setaffinity};

use serde_json::{Map, Value, json};

use super::Trouble;
use crate::clock::Stopwatch;
use crate::qemu::Broken;
use crate::qemu::debugger::Debugger;
use crate::qemu::names::made_up_number;
use crate::qemu::nbd::client::{Answer, Ask, Client};
use crate::qemu::nbd::server::Server;
use crate::qemu::process::Daemon;
use crate::qemu::qmp::{Message, Monitor};
use crate::qemu::settle::{Sleepers, Whom};

/// How long a daemon may take to greet: it may have to be loaded from a disk.
const GREETING_LIMIT: Duration = Duration::from_secs(10);
/// Most that is read at once.
const PIECE: u64 = 16 << 20;
/// Time of day of one wait for a daemon that does something all the time: what ends does so much earlier, and the machine is
/// in trouble.
const GIVES_UP_AFTER: Duration = Duration::from_secs(300);
/// Looks between two looks at the clock.
const LOOKS: u32 = 256;
/// Nodes longer than this are not read (a null-co of a terabyte).
pub(super) const LONGEST_NODE: u64 = 256 << 20;
/// A daemon and all our ends to it.
#[derive(Debug)]
pub(super) struct Running {
    // Before the daemon: hanging up is gentler than a kill.
    pub(super) client: Client,
    pub(super) monitor: Monitor,
    pub(super) server: Server,
    sleepers: Sleepers,
    // Before the daemon too: who is traced is not buried by its parent.
    debugger: Option<Debugger>,
    pub(super) daemon: Daemon,
    pub(super) runs: u32,
    /// Where it died or hangs, for people.
    pub(super) backtrace: Vec<String>,
}

/// Puts this thread, and every process that it starts from now on, on one processor: the daemon and whoever waits for it
/// take turns, and handing over costs least where nobody else has to be woken. Workers are spread over what there is.
fn share_a_processor() {
    static WORKERS: AtomicUsize = AtomicUsize::new(0);
    thread_local! {
        static DONE: Cell<bool> = const { Cell::new(false) };
    }
    if DONE.replace(true) {
        return;
    }
    let Ok(allowed) = sched_getaffinity(None) else {
        return;
    };
    let processors: Vec<usize> = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).collect();
    if processors.is_empty() {
        return;
    }
    let mut one = CpuSet::new();
    one.set(processors[WORKERS.fetch_add(1, Ordering::Relaxed) % processors.len()]);
    // Where it may not, it is only slower.
    let _ = sched_setaffinity(None, &one);
}

impl Running {
    pub(super) fn start(program: &Path) -> Result<Running, Trouble> {
        share_a_processor();
        let directory = Daemon::directory().map_err(unusable)?;
        let server = Server::listen(&Daemon::storage_socket(directory.path())).map_err(unusable)?;
        let client = Client::new(&Daemon::export_socket(directory.path()));
        let (ours, theirs) = UnixStream::pair().map_err(unusable)?;
        let monitor = Monitor::new(ours).map_err(unusable)?;
        let daemon = Daemon::start(program, directory, theirs).map_err(unusable)?;
        let mut running = Running {
            client,
            monitor,
            server,
            sleepers: Sleepers::of(daemon.pid()),
            daemon,
            runs: 0,
            debugger: None,
            backtrace: Vec::new(),
        };
        running
            .greet()
            .map_err(|broken| unusable(running.daemon.why(broken)))?;
        running.sleepers.started();
        let agreed = running.ask("qmp_capabilities", &Map::new()).map_err(unusable)?;
        agreed.map_err(|(_, refusal)| unusable(refusal))?;
        Ok(running)
    }

    /// It sleeps now and then while it starts: what counts is that it greets.
    fn greet(&mut self) -> Result<(), Broken> {
        let watch = Stopwatch::start();
        while self.monitor.greeting().is_none() {
            self.settle()?;
            if watch.elapsed() > GREETING_LIMIT {
                let limit = GREETING_LIMIT.as_secs();
                return Err(Broken::Hangs(format!("no greeting in {limit} s; is it one?")));
            }
            std::thread::yield_now();
        }
        Ok(())
    }

    /// From now on, under a debugger, if there is one.
    pub(super) fn look_closely(&mut self) {
        self.debugger = Debugger::attach(self.daemon.pid(), self.daemon.path());
    }

    /// What a debugger has to say about this.
    fn look_into(&mut self, broken: Broken) -> Broken {
        if let Some(debugger) = self.debugger.take() {
            self.backtrace = debugger.backtrace(!matches!(broken, Broken::Died(_)));
        }
        self.daemon.judge(broken)
    }

    /// Waits until the daemon rests and everything it said is here.
    pub(super) fn settle(&mut self) -> Result<(), Broken> {
        self.try_settle().map_err(|broken| self.look_into(broken))
    }

    fn try_settle(&mut self) -> Result<(), Broken> {
        let mut patience = Patience::default();
        loop {
            let whom = if self.monitor.is_busy() || self.monitor.greeting().is_none() {
                Whom::All
            } else {
                Whom::NoMonitor
            };
            let alive = self.sleepers.wait(whom)?;
            // One after the other: what is sent at the same time may be seen in either order.
            let stirred = self.monitor.pump()?
                || self.server.pump()?
                || self.client.pump().map_err(Broken::Nonsense)?;
            if !alive || self.monitor.is_gone() {
                return Err(self.daemon.ended());
            }
            if !stirred {
                return Ok(());
            }
            if patience.is_over() {
                return Err(Broken::Hangs("it does not come to rest".to_owned()));
            }
        }
    }

    /// Carries out a command of ours to its end, releasing whatever it waits for. What else is said meanwhile is
    /// dropped.
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

    /// Releases requests in order until `done`.
    pub(super) fn until(
        &mut self,
        what: &str,
        mut done: impl FnMut(&mut Running) -> bool,
    ) -> Result<(), Broken> {
        let mut patience = Patience::default();
        loop {
            self.settle()?;
            if done(self) {
                return Ok(());
            }
            let why = match () {
                () if self.server.held().is_empty() => "nothing is held",
                () if patience.is_over() => "there is no end to what it asks of storage",
                () => "",
            };
            if !why.is_empty() {
                let broken = Broken::Hangs(format!("{what}, and {why}"));
                return Err(self.look_into(broken));
            }
            self.server.release(0);
        }
    }

    /// The number of the next name that the daemon makes up.
    pub(super) fn next_made_up(&mut self) -> Result<u64, Broken> {
        let object = |value: Value| match value {
            Value::Object(object) => object,
            _ => unreachable!("written as an object"),
        };
        let probe = json!({"driver": "raw", "node-name": "blkcheck-probe",
            "file": {"driver": "null-co", "size": 512, "read-zeroes": true}});
        let nonsense = |what: &str| Broken::Nonsense(format!("the daemon {what}"));
        self.ask("blockdev-add", &object(probe))?
            .map_err(|e| nonsense(&format!("refuses a node: {}", e.1)))?;
        let graph = self
            .ask("x-debug-query-block-graph", &Map::new())?
            .map_err(|e| nonsense(&format!("shows no graph: {}", e.1)))?;
        let number = graph["nodes"]
            .as_array()
            .and_then(|nodes| nodes.iter().find_map(|n| made_up_number(n["name"].as_str()?)))
            .ok_or_else(|| nonsense("makes up no name"))?;
        self.ask("blockdev-del", &object(json!({"node-name": "blkcheck-probe"})))?
            .map_err(|e| nonsense(&format!("keeps a node: {}", e.1)))?;
        Ok(number + 1)
    }
}

impl Running {
    /// A request of ours, to its end.
    pub(super) fn request(&mut self, export: &str, ask: Ask) -> Result<Answer, Broken> {
        const TOKEN: u32 = u32::MAX;
        self.client
            .submit(export, TOKEN, ask)
            .map_err(|e| Broken::by("the daemon does not take connections", &e))?;
        let mut answer = None;
        self.until("a request is not answered", |running| {
            answer = running.client.answers().find(|(token, _)| *token == TOKEN);
            answer.is_some()
        })?;
        Ok(answer.expect("just came").1)
    }

    /// All bytes of an export; none when one cannot be read.
    pub(super) fn read_whole(&mut self, export: &str) -> Result<Vec<u8>, Broken> {
        let size = self.client.size(export).unwrap_or(0);
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

/// Of one wait.
#[derive(Debug, Default)]
struct Patience {
    looks: u32,
    watch: Option<Stopwatch>,
}

impl Patience {
    /// After a look in vain.
    fn is_over(&mut self) -> bool {
        self.looks += 1;
        self.looks.is_multiple_of(LOOKS)
            && self.watch.get_or_insert_with(Stopwatch::start).elapsed() > GIVES_UP_AFTER
    }
}

/// The environment is to blame.
fn unusable(reason: impl std::fmt::Display) -> Trouble {
    Trouble::Unusable(format!("qemu-storage-daemon: {reason}"))
}
