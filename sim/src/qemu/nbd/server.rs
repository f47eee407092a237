//! The storage under every image: disks in memory, served to the daemon; each request is held until it is released or
//! failed.
//!
//! Rules: negotiation is answered at once, requests never are. A write takes effect when it is released. A disk has
//! room behind its image, which an image format may grow into; what was written there counts as the file's end.
//! A raw image has no such room: its length is what a guest sees.
//! Two connections that both wrote to one disk make it contested: nobody answers for its content.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::wire::{self, Command, Reader, Request, flag, index, info, option, reply, transmission};
use crate::disk::Remains;
use crate::disk::volatile::{Change, Volatile};
use crate::qemu::Broken;

/// What a disk of ours can do.
const FLAGS: u16 = transmission::HAS_FLAGS
    | transmission::FLUSH
    | transmission::FUA
    | transmission::TRIM
    | transmission::WRITE_ZEROES;
/// Longest request, bytes.
const LONGEST: u32 = 32 << 20;
const ENOSPC: u32 = 28;
const EINVAL: u32 = 22;

/// A disk.
#[derive(Debug)]
pub struct Disk {
    name: String,
    /// What was stored: up to where the file would end.
    bytes: Vec<u8>,
    /// As the daemon sees it; zeroes behind the bytes.
    length: usize,
    contested: bool,
    /// What is durable, where the power may fail.
    volatile: Option<Volatile>,
}

impl Disk {
    /// The file's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The file's bytes.
    #[must_use]
    pub fn file(&self) -> &[u8] {
        &self.bytes
    }

    /// Length as the daemon sees it: the file and the room behind it, bytes.
    #[must_use]
    pub fn length(&self) -> u64 {
        self.length as u64
    }

    /// Two connections wrote to it.
    #[must_use]
    pub fn contested(&self) -> bool {
        self.contested
    }

    /// The bytes from `start` to `end`, of which those that are stored come first; the rest are zeroes.
    fn stored(&self, start: usize, end: usize) -> &[u8] {
        let stored = self.bytes.len();
        &self.bytes[start.min(stored)..end.min(stored)]
    }

    /// Somewhere to store these bytes: the file ends behind them, if not later.
    fn room(&mut self, start: usize, end: usize) -> &mut [u8] {
        assert!(start <= end && end <= self.length, "inside");
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        &mut self.bytes[start..end]
    }

    /// Carries out what changes the bytes from `start` to `end`.
    fn change(&mut self, command: Command, start: usize, end: usize, data: &[u8]) {
        match command {
            Command::Write => self.room(start, end).copy_from_slice(data),
            Command::WriteZeroes => self.room(start, end).fill(0),
            // What was discarded reads as zeroes, like a hole.
            Command::Trim => {
                let end = end.min(self.bytes.len());
                self.bytes[start.min(end)..end].fill(0);
            }
            Command::Read | Command::Flush | Command::Disconnect | Command::Status => {}
        }
    }

    /// The same was carried out.
    fn follow(&mut self, held: &Held, data: &[u8], bytes: u64) {
        let forced = held.request.flags & flag::FUA != 0;
        if let (Some(volatile), Some(change)) = (&mut self.volatile, change(&held.request, data, bytes)) {
            volatile.changed(change, forced);
        }
    }
}

/// What the first `bytes` of a request change.
fn change(request: &Request, data: &[u8], bytes: u64) -> Option<Change> {
    let zero = |grow| Change::Zero {
        offset: request.offset,
        bytes,
        grow,
    };
    match request.command {
        Command::Write => Some(Change::Write {
            offset: request.offset,
            data: data.into(),
        }),
        Command::WriteZeroes => Some(zero(true)),
        Command::Trim => Some(zero(false)),
        Command::Read | Command::Flush | Command::Disconnect | Command::Status => None,
    }
}

/// A request that the daemon waits for.
#[derive(Clone, Debug)]
pub struct Held {
    /// The same in every run in which the daemon asks this for the same time; 24 bits.
    pub identity: u32,
    /// Index of its disk.
    pub disk: usize,
    /// The request.
    pub request: Request,
    connection: u64,
    data: Vec<u8>,
    /// Changes of the disk that a flush found.
    found: u64,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Flags,
    Options,
    Requests(usize),
}

#[derive(Debug)]
struct Connection {
    id: u64,
    stream: UnixStream,
    input: Vec<u8>,
    output: Vec<u8>,
    phase: Phase,
    wrote: bool,
    gone: bool,
}

/// The server.
#[derive(Debug)]
pub struct Server {
    listener: UnixListener,
    connections: Vec<Connection>,
    disks: Vec<Disk>,
    held: Vec<Held>,
    connected: u64,
    /// How often each thing was asked.
    asked: BTreeMap<(usize, Command, u64, u32), u32>,
    /// The last name that was asked for in vain.
    missing: String,
    scratch: Vec<u8>,
    power: bool,
}

impl Server {
    /// Listens there.
    ///
    /// # Errors
    /// When it cannot.
    pub fn listen(path: &Path) -> std::io::Result<Server> {
        let listener = UnixListener::bind(path)?;
        listener.set_nonblocking(true)?;
        Ok(Server {
            listener,
            connections: Vec::new(),
            disks: Vec::new(),
            held: Vec::new(),
            connected: 0,
            asked: BTreeMap::new(),
            missing: String::new(),
            scratch: vec![0; 1 << 18],
            power: false,
        })
    }

    /// Forgets all disks. The daemon has none of them open. `power`: the power may fail of those to come.
    pub fn reset(&mut self, power: bool) {
        self.power = power;
        self.disks.clear();
        self.held.clear();
        self.asked.clear();
    }

    /// A new disk: these bytes, and `room` behind them.
    pub fn add(&mut self, name: &str, bytes: Vec<u8>, room: u64) {
        self.disks.push(Disk {
            name: name.to_owned(),
            length: bytes.len() + index(room),
            volatile: self.power.then(|| Volatile::new(&bytes)),
            bytes,
            contested: false,
        });
    }

    /// The power fails: what is left of each disk's file. `choose` picks one of so many. The disks themselves stay as they are.
    pub fn power_cut(&self, choose: &mut dyn FnMut(u32) -> u32) -> Vec<Remains> {
        let cut = |(at, disk): (usize, &Disk)| {
            let of_disk = self.held.iter().enumerate().filter(|(_, held)| held.disk == at);
            let under_way = of_disk
                .filter(|(place, _)| self.is_inside(*place))
                .filter_map(|(_, held)| change(&held.request, &held.data, u64::from(held.request.length)));
            let volatile = disk.volatile.as_ref();
            volatile
                .expect("disks are followed from the start")
                .power_cut(under_way, choose)
        };
        self.disks.iter().enumerate().map(cut).collect()
    }

    /// The disks, in the order in which they were added.
    #[must_use]
    pub fn disks(&self) -> &[Disk] {
        &self.disks
    }

    /// Requests that the daemon waits for, oldest first.
    #[must_use]
    pub fn held(&self) -> &[Held] {
        &self.held
    }

    /// The last disk that was asked for in vain.
    #[must_use]
    pub fn missing(&self) -> &str {
        &self.missing
    }

    /// The sockets, to wait for.
    pub fn sockets(&self) -> (&UnixListener, impl Iterator<Item = &UnixStream>) {
        (&self.listener, self.connections.iter().map(|c| &c.stream))
    }

    /// Connections that are open.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.connections.len()
    }

    /// Takes in what the daemon sent and answers negotiation, until one connection is reached over which the daemon may
    /// have something to do now: true then. Whoever orders things waits for rest and asks again, since two
    /// connections that stir at once may be seen in either order.
    ///
    /// # Errors
    /// Nonsense from the daemon, or no more connections of ours.
    pub fn pump(&mut self) -> Result<bool, Broken> {
        self.accept()
            .map_err(|e| Broken::lack("no connection can be taken", &e))?;
        for at in 0..self.connections.len() {
            if self.receive(at).map_err(Broken::Nonsense)? || self.connections[at].send() {
                return Ok(true);
            }
        }
        let held = &mut self.held;
        self.connections.retain(|c| {
            if c.gone {
                held.retain(|h| h.connection != c.id);
            }
            !c.gone
        });
        Ok(false)
    }

    fn accept(&mut self) -> std::io::Result<()> {
        loop {
            let stream = match self.listener.accept() {
                Ok((stream, _)) => stream,
                Err(e) if e.kind() == ErrorKind::WouldBlock => return Ok(()),
                Err(e) if matches!(e.kind(), ErrorKind::Interrupted | ErrorKind::ConnectionAborted) => {
                    continue;
                }
                Err(e) => return Err(e),
            };
            stream.set_nonblocking(true)?;
            let mut output = Vec::new();
            output.extend_from_slice(&wire::GREETING.to_be_bytes());
            output.extend_from_slice(&wire::OPTION.to_be_bytes());
            // Fixed newstyle, no zeroes.
            output.extend_from_slice(&3u16.to_be_bytes());
            self.connected += 1;
            self.connections.push(Connection {
                id: self.connected,
                stream,
                input: Vec::new(),
                output,
                phase: Phase::Flags,
                wrote: false,
                gone: false,
            });
        }
    }

    /// Whether the daemon may have waited for us to take it.
    fn receive(&mut self, at: usize) -> Result<bool, String> {
        let connection = &mut self.connections[at];
        let (got, gone) = receive(&mut connection.stream, &mut self.scratch, &mut connection.input);
        connection.gone |= gone;
        if got > 0 {
            let input = std::mem::take(&mut self.connections[at].input);
            let mut used = 0;
            loop {
                let taken = self.message(at, &input[used..])?;
                if taken == 0 {
                    break;
                }
                used += taken;
            }
            self.connections[at].input = input;
            self.connections[at].input.drain(..used);
        }
        Ok(got >= MUCH)
    }

    /// Takes one message off the front of `input`; 0 when there is none in full.
    fn message(&mut self, at: usize, input: &[u8]) -> Result<usize, String> {
        match self.connections[at].phase {
            Phase::Flags => {
                if input.len() < 4 {
                    return Ok(0);
                }
                self.connections[at].phase = Phase::Options;
                Ok(4)
            }
            Phase::Options => self.option(at, input),
            Phase::Requests(disk) => self.request(at, disk, input),
        }
    }

    fn option(&mut self, at: usize, input: &[u8]) -> Result<usize, String> {
        if input.len() < 16 {
            return Ok(0);
        }
        let mut head = Reader(input);
        let (magic, number, length) = (head.u64(), head.u32(), head.u32() as usize);
        if magic != wire::OPTION {
            return Err(format!("an option opens with {magic:#x}"));
        }
        if head.len() < length {
            return Ok(0);
        }
        let data = head.bytes(length);
        let connection = &mut self.connections[at];
        let out = &mut connection.output;
        match number {
            option::GO | option::INFO => {
                let mut data = Reader(data);
                if data.len() < 4 {
                    return Err("an option without a name".to_owned());
                }
                let length = data.u32() as usize;
                let name = data.0.get(..length).unwrap_or_default();
                match self.disks.iter().position(|d| d.name.as_bytes() == name) {
                    None => {
                        self.missing = String::from_utf8_lossy(name).into_owned();
                        wire::put_option_reply(out, number, reply::UNKNOWN, &[]);
                    }
                    Some(disk) => {
                        let mut export = info::EXPORT.to_be_bytes().to_vec();
                        export.extend_from_slice(&self.disks[disk].length().to_be_bytes());
                        export.extend_from_slice(&FLAGS.to_be_bytes());
                        wire::put_option_reply(out, number, reply::INFO, &export);
                        let mut sizes = info::BLOCK_SIZE.to_be_bytes().to_vec();
                        for size in [1u32, 4096, LONGEST] {
                            sizes.extend_from_slice(&size.to_be_bytes());
                        }
                        wire::put_option_reply(out, number, reply::INFO, &sizes);
                        wire::put_option_reply(out, number, reply::ACK, &[]);
                        if number == option::GO {
                            connection.phase = Phase::Requests(disk);
                        }
                    }
                }
            }
            option::ABORT => wire::put_option_reply(out, number, reply::ACK, &[]),
            _ => wire::put_option_reply(out, number, reply::UNSUPPORTED, &[]),
        }
        Ok(16 + length)
    }

    fn request(&mut self, at: usize, disk: usize, input: &[u8]) -> Result<usize, String> {
        let Some(request) = Request::get(input)? else {
            return Ok(0);
        };
        let mut size = wire::REQUEST_SIZE;
        let mut data = Vec::new();
        if request.command == Command::Write {
            size += request.length as usize;
            let Some(bytes) = input.get(wire::REQUEST_SIZE..size) else {
                return Ok(0);
            };
            data = bytes.to_vec();
        }
        let id = self.connections[at].id;
        match request.command {
            Command::Disconnect => self.connections[at].gone = true,
            Command::Status => return Err("a block status request that was not negotiated".to_owned()),
            Command::Write | Command::WriteZeroes | Command::Trim => {
                self.connections[at].wrote = true;
                let others =
                    |c: &Connection| c.id != id && !c.gone && c.wrote && c.phase == Phase::Requests(disk);
                self.disks[disk].contested |= self.connections.iter().any(others);
            }
            Command::Read | Command::Flush => {}
        }
        if request.command != Command::Disconnect {
            let identity = self.identity(disk, &request);
            let found = self.disks[disk].volatile.as_ref().map_or(0, Volatile::so_far);
            self.held.push(Held {
                identity,
                disk,
                request,
                connection: id,
                data,
                found,
            });
        }
        Ok(size)
    }

    fn identity(&mut self, disk: usize, request: &Request) -> u32 {
        let what = (disk, request.command, request.offset, request.length);
        let times = self.asked.entry(what).or_default();
        *times += 1;
        let mut identity = 0u64;
        for word in [
            disk as u64,
            request.command as u64,
            request.offset,
            u64::from(request.length),
            u64::from(*times),
        ] {
            identity = (identity ^ word)
                .wrapping_mul(0x9e37_79b9_7f4a_7c15)
                .rotate_left(29);
        }
        let mut identity = u32::try_from(identity >> 40).expect("24 bits");
        while self.held.iter().any(|h| h.identity == identity) {
            identity = (identity + 1) & 0xff_ffff;
        }
        identity
    }

    /// Carries out a held request and answers it.
    pub fn release(&mut self, at: usize) {
        let inside = self.is_inside(at);
        let held = self.held.remove(at);
        let disk = &mut self.disks[held.disk];
        let request = held.request;
        let (start, end) = if inside {
            let start = index(request.offset);
            (start, start + request.length as usize)
        } else {
            (0, 0)
        };
        let mut error = 0;
        let mut data: (&[u8], usize) = (&[], 0);
        match request.command {
            Command::Flush => {
                if let Some(volatile) = &mut disk.volatile {
                    volatile.flushed(held.found);
                }
            }
            Command::Read if inside => data = (disk.stored(start, end), end - start),
            Command::Write | Command::WriteZeroes | Command::Trim if inside => {
                disk.change(request.command, start, end, &held.data);
                disk.follow(&held, &held.data, u64::from(request.length));
            }
            Command::Write | Command::WriteZeroes => error = ENOSPC,
            Command::Read | Command::Trim | Command::Disconnect | Command::Status => error = EINVAL,
        }
        Server::answer(&mut self.connections, &held, error, data);
    }

    /// Whether a held request lies inside its disk.
    #[must_use]
    pub fn is_inside(&self, at: usize) -> bool {
        let held = &self.held[at];
        let last = held.request.offset.checked_add(u64::from(held.request.length));
        last.is_some_and(|last| last <= self.disks[held.disk].length())
    }

    /// Answers a held request with an error, after the first `done` bytes of it were carried out.
    pub fn fail(&mut self, at: usize, errno: u32, done: u64) {
        assert!(errno != 0, "no error");
        assert!(done == 0 || self.is_inside(at), "nothing outside is carried out");
        let held = self.held.remove(at);
        let request = held.request;
        assert!(done <= u64::from(request.length), "more than all");
        if done > 0 {
            let (start, bytes) = (index(request.offset), index(done));
            let data = &held.data[..bytes.min(held.data.len())];
            let disk = &mut self.disks[held.disk];
            disk.change(request.command, start, start + bytes, data);
            disk.follow(&held, data, done);
        }
        Server::answer(&mut self.connections, &held, errno, (&[], 0));
    }

    /// `data`: bytes, and how many there are with the zeroes behind them.
    fn answer(connections: &mut [Connection], held: &Held, error: u32, (data, length): (&[u8], usize)) {
        let Some(connection) = connections.iter_mut().find(|c| c.id == held.connection) else {
            return;
        };
        let out = &mut connection.output;
        out.extend_from_slice(&wire::SIMPLE.to_be_bytes());
        out.extend_from_slice(&error.to_be_bytes());
        out.extend_from_slice(&held.request.cookie.to_be_bytes());
        let end = out.len() + length;
        out.extend_from_slice(data);
        out.resize(end, 0);
        connection.send();
    }
}

impl Connection {
    /// Sends what fits. Whether anything went.
    fn send(&mut self) -> bool {
        send(&mut self.stream, &mut self.output)
    }
}

/// Sends what fits into the socket. Whether anything went. An error shows when reading.
pub(in crate::qemu) fn send(stream: &mut UnixStream, output: &mut Vec<u8>) -> bool {
    let mut sent = 0;
    while sent < output.len() {
        match stream.write(&output[sent..]) {
            Ok(0) => break,
            Ok(n) => sent += n,
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(_) => break,
        }
    }
    output.drain(..sent);
    sent > 0
}

/// As much as may have kept the daemon from sending more, bytes.
pub(in crate::qemu) const MUCH: usize = 1 << 15;

/// More than this is left for the next time, bytes: whoever sends without end does not keep us.
const ENOUGH: usize = 1 << 24;

/// Takes what is there, or enough of it: how many bytes, and whether the other side hung up behind them.
pub(in crate::qemu) fn receive(
    stream: &mut UnixStream,
    scratch: &mut [u8],
    input: &mut Vec<u8>,
) -> (usize, bool) {
    let mut got = 0;
    loop {
        match stream.read(scratch) {
            Ok(0) => return (got, true),
            Ok(n) => {
                got += n;
                input.extend_from_slice(&scratch[..n]);
                if got >= ENOUGH {
                    return (got, false);
                }
            }
            Err(e) if e.kind() == ErrorKind::Interrupted => {}
            Err(e) => return (got, e.kind() != ErrorKind::WouldBlock),
        }
    }
}

#[cfg(test)]
mod tests;
