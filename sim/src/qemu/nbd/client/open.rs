//! A request that is in flight: what its reply has told so far.
//!
//! Rules: a reply comes in chunks, in any order; nothing outside of what was asked is taken. Block status is asked in two contexts
//! and told as one run of extents, as far as both have come.
//! Not here: which request a chunk belongs to, and when a reply is over.

use super::{Answer, EINVAL, Extent};
use crate::qemu::nbd::wire::{Command, Reader, chunk, index};

/// See the module.
#[derive(Debug)]
pub(super) struct Open {
    pub(super) token: u32,
    pub(super) cookie: u64,
    pub(super) command: Command,
    pub(super) offset: u64,
    pub(super) end: u64,
    /// How far block status has come.
    pub(super) at: u64,
    pub(super) data: Vec<u8>,
    pub(super) error: i32,
    pub(super) extents: Vec<Extent>,
    /// Answers of the two contexts: (bytes, flags).
    pub(super) parts: [Vec<(u32, u32)>; 2],
    /// Block status: chunks that answered for a context, since it was last asked.
    pub(super) answered: usize,
}

/// Whether a chunk of this kind says how a status request went for one of its contexts.
pub(super) fn answers_for_a_context(kind: u16) -> bool {
    kind == chunk::STATUS || kind & chunk::ERROR != 0
}

impl Open {
    /// Takes in a chunk of a reply.
    ///
    /// # Errors
    /// Nonsense.
    pub(super) fn chunk(
        &mut self,
        kind: u16,
        mut data: Reader<'_>,
        contexts: [Option<u32>; 2],
    ) -> Result<(), String> {
        let wrong = |what: &str| Err(format!("a reply to a request {what}"));
        self.answered += usize::from(answers_for_a_context(kind));
        match kind {
            chunk::NONE => {}
            chunk::DATA | chunk::HOLE => {
                let least = if kind == chunk::DATA { 8 } else { 12 };
                if self.command != Command::Read || data.len() < least {
                    return wrong("carries data that nobody asked for");
                }
                self.data.resize(index(self.end - self.offset), 0);
                let offset = data.u64();
                let length = if kind == chunk::DATA {
                    data.len() as u64
                } else {
                    u64::from(data.u32())
                };
                let inside =
                    offset >= self.offset && offset.checked_add(length).is_some_and(|e| e <= self.end);
                if !inside {
                    return wrong("carries data from elsewhere");
                }
                let start = index(offset - self.offset);
                let part = &mut self.data[start..start + index(length)];
                if kind == chunk::DATA {
                    part.copy_from_slice(data.0);
                } else {
                    part.fill(0);
                }
                // Every byte must come; what came is counted in `at`.
                self.at += length;
            }
            chunk::STATUS => {
                if self.command != Command::Status || data.len() < 4 {
                    return wrong("carries block status that nobody asked for");
                }
                let id = data.u32();
                let Some(context) = contexts.iter().position(|c| *c == Some(id)) else {
                    return wrong("carries block status of another kind");
                };
                while data.len() >= 8 {
                    let extent = (data.u32(), data.u32());
                    self.parts[context].push(extent);
                }
            }
            kind if kind & chunk::ERROR != 0 && data.len() >= 4 => {
                self.error = i32::try_from(data.u32()).unwrap_or(EINVAL);
            }
            _ => return wrong(&format!("has a chunk of kind {kind}")),
        }
        Ok(())
    }

    /// Puts the answers of both contexts together, up to where the shorter one ends.
    pub(super) fn merge(&mut self) {
        let [allocation, depth] = std::mem::take(&mut self.parts);
        let (mut a, mut d) = (Cursor::new(&allocation), Cursor::new(&depth));
        while self.at < self.end {
            // Without depths (an export of another making), data is taken to be of the first layer.
            let (Some((left, flags)), depth) = (a.now(), d.now()) else {
                break;
            };
            let (bytes, depth) = match depth {
                Some((bytes, depth)) => (left.min(bytes), depth),
                None if d.extents.is_empty() => (left, u32::from(flags & 1 == 0)),
                None => break,
            };
            let bytes = u64::from(bytes).min(self.end - self.at);
            let extent = Extent {
                bytes,
                data: flags & 1 == 0,
                zero: flags & 2 != 0,
                depth,
            };
            match self.extents.last_mut() {
                Some(last)
                    if (Extent {
                        bytes: last.bytes,
                        ..extent
                    }) == *last =>
                {
                    last.bytes += bytes;
                }
                _ => self.extents.push(extent),
            }
            self.at += bytes;
            a.skip(bytes);
            d.skip(bytes);
        }
    }

    /// How it ended.
    pub(super) fn answer(self) -> Answer {
        let error = self.error;
        match self.command {
            Command::Read => Answer::Read(if error == 0 { Ok(self.data) } else { Err(error) }),
            Command::Status => Answer::Status(if error == 0 { Ok(self.extents) } else { Err(error) }),
            _ => Answer::Done(if error == 0 { Ok(()) } else { Err(error) }),
        }
    }
}

/// Walks over extents.
struct Cursor<'a> {
    extents: &'a [(u32, u32)],
    at: usize,
    used: u32,
}

impl<'a> Cursor<'a> {
    fn new(extents: &'a [(u32, u32)]) -> Cursor<'a> {
        Cursor {
            extents,
            at: 0,
            used: 0,
        }
    }

    /// (bytes left, flags) here.
    fn now(&self) -> Option<(u32, u32)> {
        let (bytes, flags) = *self.extents.get(self.at)?;
        (bytes > self.used).then(|| (bytes - self.used, flags))
    }

    fn skip(&mut self, bytes: u64) {
        let mut left = u32::try_from(bytes).expect("no more than an extent");
        while let Some((length, _)) = self.extents.get(self.at) {
            let here = (length - self.used).min(left);
            self.used += here;
            left -= here;
            if self.used < *length {
                return;
            }
            (self.at, self.used) = (self.at + 1, 0);
            if left == 0 {
                return;
            }
        }
    }
}
