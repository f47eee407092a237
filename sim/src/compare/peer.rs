//! The daemon that the model is compared with: images in our memory, every storage request answered at once.
//!
//! Rules: one thread. A command is over when its answer came and, where jobs are about, when the daemon has come to
//! rest (`Peer::rest`): nothing is held and every thread sleeps. One daemon serves many scenarios; one that broke or
//! was not taken down to an empty graph is replaced.
//! Not here: scheduling. Requests are carried out in the order in which they come.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde_json::{Map, Value, json};

use crate::clock::Stopwatch;
use crate::image::build::build;
use crate::lack::Share;
use crate::qemu::Broken;
use crate::qemu::names::{Names, made_up_number, no_such_file, option_of_file};
use crate::qemu::nbd::client::{Answer, Ask, Client};
use crate::qemu::nbd::server::Server;
use crate::qemu::process::{Daemon, PROGRAM, Unavailable, Version, version};
use crate::qemu::qmp::{Message, Monitor};
use crate::qemu::settle::{Sleepers, Whom};
use crate::scenario::{Format, Image, Scenario};

/// A daemon that answers nothing for so long hangs. All requests are answered at once, so this is ample.
const HANGS_AFTER: Duration = Duration::from_secs(10);
/// One that is about all the time and does not come to an end either. What it does takes longest on a slow machine.
const GIVES_UP_AFTER: Duration = Duration::from_secs(300);
/// Scenarios after which a daemon is replaced, so that what it leaks cannot add up.
const SCENARIOS: u32 = 5000;

/// Looks at a daemon that is about between two looks at the clock.
const LOOKS: u32 = 256;

/// A refusal: class and description.
pub(super) type Refused = (String, String);
type Answered = Result<Value, Refused>;

#[derive(Debug)]
struct Running {
    // Before the daemon: hanging up is gentler than a kill.
    client: Client,
    monitor: Monitor,
    server: Server,
    sleepers: Sleepers,
    daemon: Daemon,
    scenarios: u32,
    /// Answers to commands of which nobody has asked for the answer yet.
    answers: Vec<(u64, Answered)>,
    /// How long it may take to answer.
    patience: Duration,
}

/// Sockets to look at.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Ready {
    monitor: bool,
    server: bool,
    client: bool,
}

impl Ready {
    const ALL: Ready = Ready {
        monitor: true,
        server: true,
        client: true,
    };
}

/// The daemon, and a scenario's words for it.
#[derive(Debug)]
pub struct Peer {
    program: PathBuf,
    version: Version,
    /// Of the files that may be open.
    _share: Share,
    running: Option<Running>,
    clean: bool,
    patience: Duration,
    names: Names,
    /// Events since they were last taken.
    events: Vec<(String, Value)>,
    /// Daemons started.
    starts: u32,
    /// What is said to the daemon, when somebody wants to know.
    journal: Option<Vec<Said>>,
    /// Commands before this scenario.
    first: u64,
}

/// Something that a daemon was told, or was waited for with.
#[derive(Clone, Debug)]
pub(super) enum Said {
    /// A command, in the daemon's words.
    Command(Vec<u8>),
    /// The answer to the command of this number, from 0 in each scenario.
    Answer(u64),
    Guest(String, Ask),
    HangUp(String),
    Rest,
}

impl Peer {
    /// On this daemon; `None`: the one in PATH.
    ///
    /// # Errors
    /// When there is none of version 10.
    pub fn new(program: Option<&Path>) -> Result<Peer, Unavailable> {
        let program = program.unwrap_or(Path::new(PROGRAM)).to_owned();
        let share = Share::take()?;
        let version = version(&program)?;
        Ok(Peer {
            program,
            version,
            _share: share,
            running: None,
            clean: false,
            patience: HANGS_AFTER,
            names: Names::default(),
            events: Vec::new(),
            starts: 0,
            journal: None,
            first: 0,
        })
    }

    /// The daemon's version, as text.
    #[must_use]
    pub fn version(&self) -> String {
        let (major, minor, micro) = self.version;
        format!("{major}.{minor}.{micro}")
    }

    /// Daemons started so far.
    #[must_use]
    pub fn starts(&self) -> u32 {
        self.starts
    }

    fn running(&mut self) -> &mut Running {
        self.running.as_mut().expect("a scenario is under way")
    }

    /// Starts a daemon, where none is running.
    ///
    /// # Errors
    /// It cannot be started.
    pub(super) fn start(&mut self) -> Result<(), Broken> {
        if self.running.is_none() {
            self.running = Some(Running::start(&self.program)?);
            self.starts += 1;
            self.clean = true;
        }
        Ok(())
    }

    /// Lays out the images of a scenario. `names`: the daemon will make up names of nodes.
    ///
    /// # Errors
    /// The daemon cannot be started, or broke.
    pub(super) fn prepare(&mut self, scenario: &Scenario, names: bool) -> Result<(), Broken> {
        let used_up = |r: &Running| r.scenarios >= SCENARIOS;
        if !self.clean || self.running.as_ref().is_none_or(used_up) {
            self.running = None;
            self.start()?;
        }
        // Clean again only when this scenario was taken down.
        self.clean = false;
        self.events.clear();
        let running = self.running.as_mut().expect("just started");
        running.scenarios += 1;
        running.patience = self.patience;
        running.client.reset();
        running.server.reset(false);
        let before = if names { running.next_made_up()? } else { 0 };
        self.first = running.monitor.answered();
        self.names.reset(Daemon::STORAGE, before);
        for (index, image) in (0..).zip(&scenario.images) {
            let mut image = image.clone();
            image.backing_file = image.backing_file.map(|name| self.names.on_record(&name));
            let mut bytes = Vec::new();
            build(&image, index, scenario.grain, &mut bytes);
            running.server.add(&image.file, bytes, room(&image));
        }
        Ok(())
    }

    /// Notes from now on what the daemon is told.
    pub(super) fn keep_journal(&mut self) {
        self.journal = Some(Vec::new());
    }

    /// What it was told since.
    pub(super) fn take_journal(&mut self) -> Vec<Said> {
        self.journal.take().unwrap_or_default()
    }

    fn note(&mut self, said: impl FnOnce() -> Said) {
        if let Some(journal) = &mut self.journal {
            journal.push(said());
        }
    }

    /// Tells it the same again and looks at no answer.
    ///
    /// # Errors
    /// The daemon broke.
    pub(super) fn repeat(&mut self, said: &Said) -> Result<(), Broken> {
        let first = self.first;
        let running = self.running.as_mut().expect("a scenario is under way");
        match said {
            Said::Command(line) => {
                running.monitor.send_line(line);
            }
            Said::Answer(id) => {
                let answered = |r: &mut Running| r.monitor.answered() > first + id;
                running.until("a command is not answered", answered)?;
            }
            Said::Guest(export, ask) => {
                running.request(export, ask.clone())?;
            }
            Said::HangUp(export) => running.client.hang_up(export),
            Said::Rest => running.rest(&mut Vec::new())?,
        }
        Ok(())
    }

    /// Whether answers are thrown away unread.
    pub(super) fn skim(&mut self, skims: bool) {
        self.running().monitor.skim(skims);
    }

    /// The daemon is as empty as before the scenario.
    pub(super) fn is_clean(&mut self) {
        self.clean = true;
    }

    /// Sends a command, in a scenario's words; the number to ask for its answer with.
    pub(super) fn send(&mut self, execute: &str, arguments: &Map<String, Value>) -> u64 {
        let arguments = self.names.to_daemon(execute, arguments);
        let line = Monitor::line(execute, &arguments);
        let id = self.running().monitor.send_line(&line);
        self.note(|| Said::Command(line));
        id
    }

    /// Waits for the answer to a command that was sent.
    ///
    /// # Errors
    /// The daemon broke.
    pub(super) fn answer(&mut self, id: u64, what: &str) -> Result<Answered, Broken> {
        let first = self.first;
        self.note(|| Said::Answer(id - first));
        let running = self.running.as_mut().expect("a scenario is under way");
        Ok(match running.answer(id, what, &mut self.events)? {
            Ok(mut value) => {
                self.names.from_daemon(&mut value);
                Ok(value)
            }
            Err((class, desc)) => {
                let desc = self.names.text(&desc).unwrap_or(desc);
                let desc = option_of_file(&desc).unwrap_or(desc);
                Err((class, no_such_file(&desc, self.running().server.missing())))
            }
        })
    }

    /// Both.
    ///
    /// # Errors
    /// The daemon broke.
    pub(super) fn ask(&mut self, execute: &str, arguments: &Map<String, Value>) -> Result<Answered, Broken> {
        let id = self.send(execute, arguments);
        self.answer(id, execute)
    }

    /// Commands one behind the other without waiting; whether each was accepted.
    ///
    /// # Errors
    /// The daemon broke.
    pub(super) fn ask_all(&mut self, execute: &str, all: &[Map<String, Value>]) -> Result<Vec<bool>, Broken> {
        let ids: Vec<u64> = all
            .iter()
            .map(|arguments| self.send(execute, arguments))
            .collect();
        let answers = ids.into_iter().map(|id| Ok(self.answer(id, execute)?.is_ok()));
        answers.collect()
    }

    /// Waits until nothing moves any more.
    ///
    /// # Errors
    /// The daemon broke.
    pub(super) fn rest(&mut self) -> Result<(), Broken> {
        self.note(|| Said::Rest);
        let running = self.running.as_mut().expect("a scenario is under way");
        running.rest(&mut self.events)
    }

    /// How long to wait for an answer, while something is tried that may well hang.
    pub(super) fn be_patient(&mut self, patience: Option<Duration>) {
        self.patience = patience.unwrap_or(HANGS_AFTER);
    }

    /// Lets a moment pass, for what the daemon does by the clock.
    #[expect(clippy::disallowed_methods, reason = "another process takes real time")]
    pub(super) fn pass_time(&mut self) {
        std::thread::sleep(Duration::from_millis(10));
    }

    /// Events since the last call, in a scenario's words.
    pub(super) fn take_events(&mut self) -> Vec<(String, Value)> {
        let mut events = std::mem::take(&mut self.events);
        for (_, data) in &mut events {
            self.names.from_daemon(data);
        }
        events
    }

    /// A guest's request, to its end.
    ///
    /// # Errors
    /// The daemon broke.
    pub(super) fn request(&mut self, export: &str, ask: Ask) -> Result<Answer, Broken> {
        self.note(|| Said::Guest(export.to_owned(), ask.clone()));
        let running = self.running.as_mut().expect("a scenario is under way");
        running.request(export, ask)
    }

    /// Length of an export.
    ///
    /// # Errors
    /// The daemon broke.
    pub(super) fn size(&mut self, export: &str) -> Result<Option<u64>, Broken> {
        // An empty request makes the connection; it is answered here.
        if matches!(self.request(export, Ask::Read(0, 512))?, Answer::NoExport) {
            return Ok(None);
        }
        Ok(self.running().client.size(export))
    }

    /// No guest stays connected to this export.
    pub(super) fn hang_up(&mut self, export: &str) {
        self.note(|| Said::HangUp(export.to_owned()));
        self.running().client.hang_up(export);
    }

    /// Every image as it is stored now.
    pub(super) fn disks(&self) -> impl Iterator<Item = (&str, &[u8])> {
        let disks = self.running.as_ref().map_or(&[][..], |r| r.server.disks());
        disks.iter().map(|d| (d.name(), d.file()))
    }

    /// The length of every image as the daemon sees it, bytes.
    pub(super) fn lengths(&self) -> impl Iterator<Item = (&str, u64)> {
        let disks = self.running.as_ref().map_or(&[][..], |r| r.server.disks());
        disks.iter().map(|d| (d.name(), d.length()))
    }

    /// The file name that a text of the daemon means.
    pub(super) fn our_name(&mut self, text: &str) -> Option<String> {
        self.names.text(text)
    }

    /// The daemon's last words.
    #[must_use]
    pub(super) fn last_words(&self) -> Vec<String> {
        self.running
            .as_ref()
            .map_or_else(Vec::new, |r| r.daemon.last_words())
    }
}

impl Running {
    fn start(program: &Path) -> Result<Running, Broken> {
        let unusable = |reason: std::io::Error| Broken::lack("the daemon does not start", &reason);
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
            scenarios: 0,
            answers: Vec::new(),
            patience: HANGS_AFTER,
        };
        let mut events = Vec::new();
        let greeted = running.until("no greeting", |r| r.monitor.greeting().is_some());
        if let Err(broken) = greeted {
            return Err(match broken {
                Broken::Died(text) => Broken::Died(running.daemon.why(text)),
                broken => broken,
            });
        }
        running
            .ask("qmp_capabilities", &Map::new(), &mut events)?
            .map_err(|e| Broken::Nonsense(format!("the daemon refuses to talk: {}", e.1)))?;
        Ok(running)
    }

    /// One look at these sockets; whatever the daemon waits for it gets.
    fn pump(&mut self, ready: Ready) -> Result<bool, Broken> {
        let mut stirred = ready.monitor && self.monitor.pump()?;
        if ready.server {
            stirred |= self.server.pump()?;
        }
        if ready.client {
            stirred |= self.client.pump().map_err(Broken::Nonsense)?;
        }
        while !self.server.held().is_empty() {
            self.server.release(0);
            stirred = true;
        }
        if self.monitor.is_gone() {
            return Err(self.daemon.ended());
        }
        Ok(stirred)
    }

    fn until(&mut self, what: &str, mut done: impl FnMut(&mut Running) -> bool) -> Result<(), Broken> {
        let mut watch: Option<Stopwatch> = None;
        let mut ready = Ready::ALL;
        let mut looks = 0u32;
        loop {
            let stirred = self.pump(ready)?;
            if done(self) {
                return Ok(());
            }
            let limit = if stirred {
                ready = Ready::ALL;
                looks = looks.wrapping_add(1);
                if !looks.is_multiple_of(LOOKS) {
                    continue;
                }
                GIVES_UP_AFTER
            } else {
                ready = self.doze();
                self.patience
            };
            if watch.get_or_insert_with(Stopwatch::start).elapsed() > limit {
                let hangs = Broken::Hangs(format!("{what} in {} s", limit.as_secs()));
                return Err(self.daemon.judge(hangs));
            }
        }
    }

    /// Sleeps until the daemon says something, or for a moment. Where it has said something.
    fn doze(&self) -> Ready {
        let (listener, connections) = self.server.sockets();
        let mut sockets = vec![
            PollFd::new(self.monitor.socket(), PollFlags::IN),
            PollFd::new(listener, PollFlags::IN),
        ];
        sockets.extend(connections.map(|c| PollFd::new(c, PollFlags::IN)));
        let ours = sockets.len();
        sockets.extend(self.client.sockets().map(|c| PollFd::new(c, PollFlags::IN)));
        let moment = Timespec {
            tv_sec: 0,
            tv_nsec: 50_000_000,
        };
        if poll(&mut sockets, Some(&moment)).is_ok_and(|count| count > 0) {
            let said = |sockets: &[PollFd<'_>]| sockets.iter().any(|s| !s.revents().is_empty());
            Ready {
                monitor: said(&sockets[..1]),
                server: said(&sockets[1..ours]),
                client: said(&sockets[ours..]),
            }
        } else {
            // It may be waiting for us to send the rest of something.
            Ready::ALL
        }
    }

    /// The answer to this command. What is said before it is kept.
    fn answer(&mut self, id: u64, what: &str, events: &mut Vec<(String, Value)>) -> Result<Answered, Broken> {
        let mut answers = std::mem::take(&mut self.answers);
        let mut told = Vec::new();
        let mut result = None;
        self.until(&format!("{what} is not answered"), |running| {
            while let Some(message) = running.monitor.take() {
                match message {
                    Message::Answer(number, result) => answers.push((number, result)),
                    Message::Event(name, data) => told.push((name, data)),
                }
            }
            let at = answers.iter().position(|(number, _)| *number == id);
            result = at.map(|at| answers.remove(at).1);
            result.is_some()
        })?;
        self.answers = answers;
        events.append(&mut told);
        let result = result.expect("just came");
        if let Err((_, desc)) = &result {
            Broken::unless_lack(desc)?;
        }
        Ok(result)
    }

    fn ask(
        &mut self,
        execute: &str,
        arguments: &Map<String, Value>,
        events: &mut Vec<(String, Value)>,
    ) -> Result<Answered, Broken> {
        let id = self.monitor.send(execute, arguments);
        self.answer(id, execute, events)
    }

    fn rest(&mut self, events: &mut Vec<(String, Value)>) -> Result<(), Broken> {
        let mut watch: Option<Stopwatch> = None;
        let mut looks = 0u32;
        loop {
            let rested = self.sleepers.wait(Whom::All);
            rested.map_err(|broken| self.daemon.judge(broken))?;
            looks = looks.wrapping_add(1);
            if looks.is_multiple_of(LOOKS)
                && watch.get_or_insert_with(Stopwatch::start).elapsed() > GIVES_UP_AFTER
            {
                return Err(Broken::Hangs("it does not come to rest".to_owned()));
            }
            let stirred = self.pump(Ready::ALL)?;
            let mut news = false;
            while let Some(message) = self.monitor.take() {
                news = true;
                match message {
                    Message::Event(name, data) => events.push((name, data)),
                    Message::Answer(id, result) => self.answers.push((id, result)),
                }
            }
            if !stirred && !news {
                return Ok(());
            }
        }
    }

    fn request(&mut self, export: &str, ask: Ask) -> Result<Answer, Broken> {
        const TOKEN: u32 = u32::MAX;
        self.client
            .submit(export, TOKEN, ask)
            .map_err(|e| Broken::by("the daemon takes no connection", &e))?;
        let mut answer = None;
        self.until("a guest's request is not answered", |running| {
            answer = running.client.answers().find(|(token, _)| *token == TOKEN);
            answer.is_some()
        })?;
        Ok(answer.expect("just came").1)
    }

    /// The number of the next name that the daemon makes up.
    fn next_made_up(&mut self) -> Result<u64, Broken> {
        let object = |value: Value| match value {
            Value::Object(object) => object,
            _ => unreachable!("written as an object"),
        };
        let probe = json!({"driver": "raw", "node-name": "blkcheck-probe",
            "file": {"driver": "null-co", "size": 512, "read-zeroes": true}});
        let nonsense = |what: &str| Broken::Nonsense(format!("the daemon {what}"));
        let mut events = Vec::new();
        self.ask("blockdev-add", &object(probe), &mut events)?
            .map_err(|e| nonsense(&format!("refuses a node: {}", e.1)))?;
        let graph = self
            .ask("x-debug-query-block-graph", &Map::new(), &mut events)?
            .map_err(|e| nonsense(&format!("shows no graph: {}", e.1)))?;
        let number = graph["nodes"]
            .as_array()
            .and_then(|nodes| nodes.iter().find_map(|n| made_up_number(n["name"].as_str()?)))
            .ok_or_else(|| nonsense("makes up no name"))?;
        self.ask(
            "blockdev-del",
            &object(json!({"node-name": "blkcheck-probe"})),
            &mut events,
        )?
        .map_err(|e| nonsense(&format!("keeps a node: {}", e.1)))?;
        Ok(number + 1)
    }
}

/// Room behind an image for whatever a format may append.
fn room(image: &Image) -> u64 {
    match image.format {
        Format::Raw => 0,
        Format::Qcow2 => 3 * image.size + 32 * u64::from(image.cluster_size) + 65536,
    }
}
