//! Guests: a client of the daemon's NBD exports with any number of requests in flight.
//!
//! Rules: one connection per export, made with the first request; never blocks, so that the daemon can always send. Every
//! message waits for the one before to be on its way and the daemon to be at rest. A request that the daemon does not
//! answer before it hangs up ends with ESHUTDOWN.
//! A block status request is asked again for what an answer left out, until its range is covered or an answer makes
//! no progress.

mod open;

use std::collections::VecDeque;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use self::open::{Open, answers_for_a_context};
use super::server::{MUCH, receive, send};
use super::wire::{self, Command, Reader, Request, chunk, flag, info, option, reply};
use crate::history::ESHUTDOWN;

/// Longest request that an export takes, bytes.
const LONGEST: u64 = 32 << 20;
const EINVAL: i32 = 22;
const CONTEXTS: [&str; 2] = ["base:allocation", "qemu:allocation-depth"];

/// What a guest asks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    /// Bytes from there.
    Read(u64, u64),
    /// These bytes there; durable on completion.
    Write(u64, Vec<u8>, bool),
    /// Zeroes; whether to deallocate.
    WriteZeroes(u64, u64, bool),
    /// Discard.
    Discard(u64, u64),
    /// Flush.
    Flush,
    /// Block status.
    Status(u64, u64),
}

/// A run of equal block status.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Length.
    pub bytes: u64,
    /// There is data (no hole).
    pub data: bool,
    /// Reads as zeroes.
    pub zero: bool,
    /// How many layers down it is decided, 1 the first; 0 nowhere.
    pub depth: u32,
}

/// How a request ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Answer {
    /// Bytes or errno.
    Read(Result<Vec<u8>, i32>),
    /// Done or errno.
    Done(Result<(), i32>),
    /// Extents or errno.
    Status(Result<Vec<Extent>, i32>),
    /// There is no such export.
    NoExport,
}

impl Answer {
    /// There is no connection to the export, or it was closed meanwhile.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        matches!(
            self,
            Answer::NoExport
                | Answer::Read(Err(ESHUTDOWN))
                | Answer::Done(Err(ESHUTDOWN))
                | Answer::Status(Err(ESHUTDOWN))
        )
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Greeting,
    Options,
    Open,
    Refused,
}

#[derive(Debug)]
struct Session {
    export: String,
    stream: UnixStream,
    input: Vec<u8>,
    /// What is being sent.
    output: Vec<u8>,
    phase: Phase,
    /// Requests that wait for their turn.
    waiting: VecDeque<Vec<u8>>,
    size: u64,
    contexts: [Option<u32>; 2],
    open: Vec<Open>,
    /// Status requests that were answered with an error: their cookies, and how often they were answered.
    failed: Vec<(u64, usize)>,
    forgives: bool,
    gone: bool,
}

/// The guests.
#[derive(Debug)]
pub struct Client {
    path: PathBuf,
    sessions: Vec<Session>,
    answers: Vec<(u32, Answer)>,
    cookie: u64,
    forgives: bool,
    scratch: Vec<u8>,
}

impl Client {
    /// Of the exports served at `path`.
    #[must_use]
    pub fn new(path: &Path) -> Client {
        Client {
            path: path.to_owned(),
            sessions: Vec::new(),
            answers: Vec::new(),
            cookie: 0,
            forgives: false,
            scratch: vec![0; 1 << 18],
        }
    }

    /// From the next connection on: takes no notice of a second answer to a status request that failed, which the daemon
    /// gives for its other context (the defect `status-error-answered-twice`).
    pub fn forgive(&mut self, forgives: bool) {
        self.forgives = forgives;
    }

    /// Hangs up on every export and forgets every request.
    pub fn reset(&mut self) {
        self.sessions.clear();
        self.answers.clear();
        self.cookie = 0;
    }

    /// Hangs up on an export. Its requests end with ESHUTDOWN.
    pub fn hang_up(&mut self, export: &str) {
        for session in self.sessions.iter_mut().filter(|s| s.export == export) {
            session.end(&mut self.answers);
        }
        self.sessions.retain(|s| s.export != export);
    }

    /// Hangs up on the export of the oldest connection and forgets its requests. False when there is none.
    pub fn hang_up_one(&mut self) -> bool {
        self.answers.clear();
        let any = !self.sessions.is_empty();
        if any {
            self.sessions.remove(0);
        }
        any
    }

    /// Requests in flight on an export.
    #[must_use]
    pub fn in_flight(&self, export: &str) -> usize {
        self.sessions
            .iter()
            .filter(|s| s.export == export)
            .map(|s| s.open.len())
            .sum()
    }

    /// The sockets, to wait for.
    pub fn sockets(&self) -> impl Iterator<Item = &UnixStream> {
        self.sessions.iter().map(|s| &s.stream)
    }

    /// Connections.
    #[must_use]
    pub fn sessions(&self) -> usize {
        self.sessions.len()
    }

    /// Length of an export, once connected.
    #[must_use]
    pub fn size(&self, export: &str) -> Option<u64> {
        let session = self.sessions.iter().find(|s| s.export == export)?;
        (session.phase == Phase::Open).then_some(session.size)
    }

    /// Takes the answers that came since the last call.
    pub fn answers(&mut self) -> std::vec::Drain<'_, (u32, Answer)> {
        self.answers.drain(..)
    }

    /// Connects to an export, if that is not done.
    ///
    /// # Errors
    /// When the daemon does not take connections.
    pub fn connect(&mut self, export: &str) -> std::io::Result<usize> {
        if let Some(at) = self.sessions.iter().position(|s| s.export == export) {
            return Ok(at);
        }
        let stream = UnixStream::connect(&self.path)?;
        stream.set_nonblocking(true)?;
        self.sessions.push(Session {
            export: export.to_owned(),
            stream,
            input: Vec::new(),
            output: Vec::new(),
            phase: Phase::Greeting,
            waiting: VecDeque::new(),
            size: 0,
            contexts: [None; 2],
            open: Vec::new(),
            failed: Vec::new(),
            forgives: self.forgives,
            gone: false,
        });
        Ok(self.sessions.len() - 1)
    }

    /// Sends a request; its answer comes under this token.
    ///
    /// # Errors
    /// When the daemon does not take connections.
    pub fn submit(&mut self, export: &str, token: u32, ask: Ask) -> std::io::Result<()> {
        let (command, offset, length, flags, data) = match ask {
            Ask::Read(offset, length) => (Command::Read, offset, length, 0, Vec::new()),
            Ask::Write(offset, data, fua) => {
                let flags = if fua { flag::FUA } else { 0 };
                (Command::Write, offset, data.len() as u64, flags, data)
            }
            Ask::WriteZeroes(offset, length, unmap) => {
                let flags = if unmap { 0 } else { flag::NO_HOLE };
                (Command::WriteZeroes, offset, length, flags, Vec::new())
            }
            Ask::Discard(offset, length) => (Command::Trim, offset, length, 0, Vec::new()),
            Ask::Flush => (Command::Flush, 0, 0, 0, Vec::new()),
            Ask::Status(offset, length) => (Command::Status, offset, length, 0, Vec::new()),
        };
        let at = self.connect(export)?;
        let open = Open {
            token,
            cookie: self.cookie,
            command,
            offset,
            end: offset.saturating_add(length),
            at: offset,
            data: Vec::new(),
            error: 0,
            extents: Vec::new(),
            parts: [Vec::new(), Vec::new()],
            answered: 0,
        };
        self.cookie += 1;
        // What the protocol has no word for. A daemon would hang up on the long one.
        let settled = match (command, length) {
            (Command::Flush, _) => None,
            (_, 0) => Some(0),
            (Command::Read | Command::Write, n) if n > LONGEST => Some(EINVAL),
            (_, n) if u32::try_from(n).is_err() => Some(EINVAL),
            _ => None,
        };
        if let Some(error) = settled {
            self.answers.push((token, Open { error, ..open }.answer()));
            return Ok(());
        }
        let request = Request {
            command,
            flags,
            cookie: open.cookie,
            offset,
            length: u32::try_from(length).expect("just checked"),
        };
        let session = &mut self.sessions[at];
        session.open.push(open);
        session.put(request, &data);
        // The daemon is at rest when something is asked.
        session.send();
        Ok(())
    }

    /// Takes in what the daemon sent and sends what is next, until one connection is reached over which the daemon may
    /// have something to do now: true then.
    ///
    /// # Errors
    /// Nonsense from the daemon.
    pub fn pump(&mut self) -> Result<bool, String> {
        let mut at = 0;
        while let Some(session) = self.sessions.get_mut(at) {
            let much = session.receive(&mut self.scratch, &mut self.answers)?;
            if session.gone {
                session.end(&mut self.answers);
                // The daemon notices when we hang up.
                self.sessions.remove(at);
                return Ok(true);
            }
            if much || session.send() {
                return Ok(true);
            }
            at += 1;
        }
        Ok(false)
    }
}

impl Drop for Session {
    /// Hangs up at once. Closing alone does not: a process that another worker is just starting has every file of ours
    /// until it runs its own program.
    fn drop(&mut self) {
        let _ = self.stream.shutdown(Shutdown::Both);
    }
}

impl Session {
    fn negotiate(&mut self) {
        let out = &mut self.output;
        // Fixed newstyle, no zeroes.
        out.extend_from_slice(&3u32.to_be_bytes());
        wire::put_option(out, option::STRUCTURED_REPLY, &[]);
        let mut data = Vec::new();
        wire::put_text(&mut data, &self.export);
        let mut go = data.clone();
        data.extend_from_slice(&2u32.to_be_bytes());
        for context in CONTEXTS {
            wire::put_text(&mut data, context);
        }
        wire::put_option(out, option::SET_META_CONTEXT, &data);
        go.extend_from_slice(&0u16.to_be_bytes());
        wire::put_option(out, option::GO, &go);
    }

    /// Sends what is next, as far as it fits. Whether anything went.
    fn send(&mut self) -> bool {
        if self.output.is_empty() && self.phase == Phase::Open {
            self.output = self.waiting.pop_front().unwrap_or_default();
        }
        send(&mut self.stream, &mut self.output)
    }

    fn put(&mut self, request: Request, data: &[u8]) {
        let mut out = Vec::with_capacity(wire::REQUEST_SIZE + data.len());
        request.put(&mut out);
        out.extend_from_slice(data);
        self.waiting.push_back(out);
    }

    /// It is over: whatever was not answered is now.
    fn end(&mut self, answers: &mut Vec<(u32, Answer)>) {
        self.gone = true;
        for open in self.open.drain(..) {
            let token = open.token;
            let answer = if self.phase == Phase::Refused {
                Answer::NoExport
            } else {
                let error = if open.error == 0 { ESHUTDOWN } else { open.error };
                Open { error, ..open }.answer()
            };
            answers.push((token, answer));
        }
    }

    /// Whether the daemon may have something to do now.
    fn receive(&mut self, scratch: &mut [u8], answers: &mut Vec<(u32, Answer)>) -> Result<bool, String> {
        let (got, gone) = receive(&mut self.stream, scratch, &mut self.input);
        self.gone |= gone;
        if got > 0 {
            let input = std::mem::take(&mut self.input);
            let mut used = 0;
            loop {
                let taken = self.message(&input[used..], answers)?;
                if taken == 0 {
                    break;
                }
                used += taken;
            }
            self.input = input;
            self.input.drain(..used);
        }
        Ok(got >= MUCH)
    }

    /// Takes one message off the front; 0 when there is none in full.
    fn message(&mut self, input: &[u8], answers: &mut Vec<(u32, Answer)>) -> Result<usize, String> {
        match self.phase {
            Phase::Greeting => {
                if input.len() < 18 {
                    return Ok(0);
                }
                let mut head = Reader(input);
                if (head.u64(), head.u64()) != (wire::GREETING, wire::OPTION) {
                    return Err("an NBD export does not greet".to_owned());
                }
                self.phase = Phase::Options;
                self.negotiate();
                Ok(18)
            }
            Phase::Options => self.option_reply(input),
            Phase::Open => self.reply(input, answers),
            Phase::Refused => Ok(input.len()),
        }
    }

    fn option_reply(&mut self, input: &[u8]) -> Result<usize, String> {
        if input.len() < 20 {
            return Ok(0);
        }
        let mut head = Reader(input);
        let (magic, number, kind, length) = (head.u64(), head.u32(), head.u32(), head.u32() as usize);
        if magic != wire::OPTION_REPLY {
            return Err(format!("a reply to an option opens with {magic:#x}"));
        }
        if head.len() < length {
            return Ok(0);
        }
        let mut data = Reader(head.bytes(length));
        match (number, kind) {
            (option::SET_META_CONTEXT, reply::META_CONTEXT) if length > 4 => {
                let id = data.u32();
                let at = CONTEXTS.iter().position(|c| c.as_bytes() == data.0);
                if let Some(at) = at {
                    self.contexts[at] = Some(id);
                }
            }
            (option::GO, reply::INFO) if length >= 12 => {
                let kind = data.u16();
                if kind == info::EXPORT {
                    self.size = data.u64();
                }
            }
            (option::GO, reply::ACK) => {
                self.phase = Phase::Open;
            }
            (option::GO, error) if error >> 31 == 1 => {
                self.phase = Phase::Refused;
                self.gone = true;
            }
            // The name is unknown, which GO says again.
            _ => {}
        }
        Ok(20 + length)
    }

    fn reply(&mut self, input: &[u8], answers: &mut Vec<(u32, Answer)>) -> Result<usize, String> {
        if input.len() < 16 {
            return Ok(0);
        }
        let mut head = Reader(input);
        let magic = head.u32();
        if magic == wire::SIMPLE {
            let (error, cookie) = (head.u32(), head.u64());
            let at = self.find(cookie)?;
            if self.open[at].command == Command::Read && error == 0 {
                return Err("a simple reply to a read".to_owned());
            }
            self.open[at].error = i32::try_from(error).unwrap_or(EINVAL);
            self.done(at, answers)?;
            return Ok(16);
        }
        if magic != wire::STRUCTURED {
            return Err(format!("a reply opens with {magic:#x}"));
        }
        if input.len() < 20 {
            return Ok(0);
        }
        let (flags, kind, cookie, length) = (head.u16(), head.u16(), head.u64(), head.u32() as usize);
        if head.len() < length {
            return Ok(0);
        }
        if let Some((_, times)) = self.failed.iter_mut().find(|(failed, _)| *failed == cookie) {
            *times += 1;
            // One that failed for one context may go on to the next one.
            let contexts = self.contexts.iter().flatten().count();
            let is_known = answers_for_a_context(kind) && *times <= contexts;
            return match self.forgives && is_known {
                true => Ok(20 + length),
                false => Err("a status request that failed is answered once more".to_owned()),
            };
        }
        let at = self.find(cookie)?;
        let contexts = self.contexts;
        self.open[at].chunk(kind, Reader(head.bytes(length)), contexts)?;
        if flags & chunk::DONE != 0 {
            self.done(at, answers)?;
        }
        Ok(20 + length)
    }

    fn find(&self, cookie: u64) -> Result<usize, String> {
        let at = self.open.iter().position(|o| o.cookie == cookie);
        at.ok_or_else(|| format!("a reply to request {cookie}, which is not in flight"))
    }

    /// The reply is complete.
    fn done(&mut self, at: usize, answers: &mut Vec<(u32, Answer)>) -> Result<(), String> {
        let open = &mut self.open[at];
        if open.command == Command::Status && open.error == 0 {
            let before = open.at;
            open.answered = 0;
            open.merge();
            if open.at < open.end && open.at > before {
                let request = Request {
                    command: Command::Status,
                    flags: 0,
                    cookie: open.cookie,
                    offset: open.at,
                    length: u32::try_from(open.end - open.at).expect("less than before"),
                };
                self.put(request, &[]);
                return Ok(());
            }
        }
        let open = self.open.remove(at);
        if open.command == Command::Read && open.error == 0 && open.at != open.end {
            return Err("a read is answered in part".to_owned());
        }
        if open.command == Command::Status && open.error != 0 {
            self.failed.push((open.cookie, open.answered));
        }
        answers.push((open.token, open.answer()));
        Ok(())
    }
}

#[cfg(test)]
mod tests;
