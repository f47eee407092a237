//! NBD on the wire: numbers, and messages cut out of a byte stream.
//!
//! Rules: a parser takes the bytes there are and says what it took; too few is not an error, nonsense is.

/// Opens the server's greeting.
pub const GREETING: u64 = 0x4e42_444d_4147_4943;
/// Opens an option of the client; `IHAVEOPT`.
pub const OPTION: u64 = 0x4948_4156_454f_5054;
/// Opens a reply to an option.
pub const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Opens a request.
pub const REQUEST: u32 = 0x2560_9513;
/// Opens a simple reply.
pub const SIMPLE: u32 = 0x6744_6698;
/// Opens a chunk of a structured reply.
pub const STRUCTURED: u32 = 0x668e_33ef;

/// Options.
#[expect(missing_docs, reason = "named as in the protocol's document")]
pub mod option {
    pub const ABORT: u32 = 2;
    pub const INFO: u32 = 6;
    pub const GO: u32 = 7;
    pub const STRUCTURED_REPLY: u32 = 8;
    pub const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options.
#[expect(missing_docs, reason = "named as in the protocol's document")]
pub mod reply {
    pub const ACK: u32 = 1;
    pub const INFO: u32 = 3;
    pub const META_CONTEXT: u32 = 4;
    pub const UNSUPPORTED: u32 = 1 << 31 | 1;
    pub const UNKNOWN: u32 = 1 << 31 | 6;
}

/// Pieces of information about an export.
#[expect(missing_docs, reason = "named as in the protocol's document")]
pub mod info {
    pub const EXPORT: u16 = 0;
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags of an export.
#[expect(missing_docs, reason = "named as in the protocol's document")]
pub mod transmission {
    pub const HAS_FLAGS: u16 = 1;
    pub const READ_ONLY: u16 = 1 << 1;
    pub const FLUSH: u16 = 1 << 2;
    pub const FUA: u16 = 1 << 3;
    pub const TRIM: u16 = 1 << 5;
    pub const WRITE_ZEROES: u16 = 1 << 6;
}

/// Flags of a request.
#[expect(missing_docs, reason = "named as in the protocol's document")]
pub mod flag {
    pub const FUA: u16 = 1;
    pub const NO_HOLE: u16 = 1 << 1;
}

/// Kinds of chunks in a structured reply.
#[expect(missing_docs, reason = "named as in the protocol's document")]
pub mod chunk {
    pub const NONE: u16 = 0;
    pub const DATA: u16 = 1;
    pub const HOLE: u16 = 2;
    pub const STATUS: u16 = 5;
    pub const ERROR: u16 = 1 << 15;
    /// The last chunk of its reply.
    pub const DONE: u16 = 1;
}

/// What a request asks.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Command {
    /// Read.
    Read,
    /// Write.
    Write,
    /// Goodbye; no reply.
    Disconnect,
    /// Flush.
    Flush,
    /// Discard.
    Trim,
    /// Write zeroes.
    WriteZeroes,
    /// Block status.
    Status,
}

impl Command {
    const NUMBERS: [(Command, u16); 7] = [
        (Command::Read, 0),
        (Command::Write, 1),
        (Command::Disconnect, 2),
        (Command::Flush, 3),
        (Command::Trim, 4),
        (Command::WriteZeroes, 6),
        (Command::Status, 7),
    ];

    fn number(self) -> u16 {
        let found = Self::NUMBERS.iter().find(|(c, _)| *c == self);
        found.expect("every command has a number").1
    }

    fn from_number(number: u16) -> Option<Command> {
        Self::NUMBERS.iter().find(|(_, n)| *n == number).map(|(c, _)| *c)
    }
}

/// A request's head.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// What.
    pub command: Command,
    /// [`flag`]s.
    pub flags: u16,
    /// The sender's name for it.
    pub cookie: u64,
    /// Start, bytes.
    pub offset: u64,
    /// Length, bytes.
    pub length: u32,
}

/// Bytes of a request's head.
pub const REQUEST_SIZE: usize = 28;

impl Request {
    /// Appends the head.
    pub fn put(&self, out: &mut Vec<u8>) {
        out.extend_from_slice(&REQUEST.to_be_bytes());
        out.extend_from_slice(&self.flags.to_be_bytes());
        out.extend_from_slice(&self.command.number().to_be_bytes());
        out.extend_from_slice(&self.cookie.to_be_bytes());
        out.extend_from_slice(&self.offset.to_be_bytes());
        out.extend_from_slice(&self.length.to_be_bytes());
    }

    /// The head at the front of `bytes`; `None` when there is not enough.
    ///
    /// # Errors
    /// No request.
    pub fn get(bytes: &[u8]) -> Result<Option<Request>, String> {
        let Some(mut head) = bytes.get(..REQUEST_SIZE).map(Reader) else {
            return Ok(None);
        };
        let magic = head.u32();
        if magic != REQUEST {
            return Err(format!("a request opens with {magic:#x}"));
        }
        let (flags, number) = (head.u16(), head.u16());
        let (cookie, offset, length) = (head.u64(), head.u64(), head.u32());
        let command = Command::from_number(number).ok_or_else(|| format!("a request of kind {number}"))?;
        Ok(Some(Request {
            command,
            flags,
            cookie,
            offset,
            length,
        }))
    }
}

/// Appends an option of the client.
pub fn put_option(out: &mut Vec<u8>, number: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION.to_be_bytes());
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(
        &u32::try_from(data.len())
            .expect("options are short")
            .to_be_bytes(),
    );
    out.extend_from_slice(data);
}

/// Appends a reply to an option.
pub fn put_option_reply(out: &mut Vec<u8>, number: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(&OPTION_REPLY.to_be_bytes());
    out.extend_from_slice(&number.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(
        &u32::try_from(data.len())
            .expect("replies are short")
            .to_be_bytes(),
    );
    out.extend_from_slice(data);
}

/// Appends a string with its length before it.
pub fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend_from_slice(&u32::try_from(text.len()).expect("names are short").to_be_bytes());
    out.extend_from_slice(text.as_bytes());
}

/// Takes big-endian numbers off the front.
///
/// # Panics
/// Beyond the end: its user has looked at the length.
#[derive(Debug)]
pub struct Reader<'a>(pub &'a [u8]);

impl<'a> Reader<'a> {
    /// The next bytes.
    pub fn bytes(&mut self, n: usize) -> &'a [u8] {
        let (head, rest) = self.0.split_at(n);
        self.0 = rest;
        head
    }

    /// The next number.
    pub fn u16(&mut self) -> u16 {
        u16::from_be_bytes(self.bytes(2).try_into().expect("two bytes"))
    }

    /// The next number.
    pub fn u32(&mut self) -> u32 {
        u32::from_be_bytes(self.bytes(4).try_into().expect("four bytes"))
    }

    /// The next number.
    pub fn u64(&mut self) -> u64 {
        u64::from_be_bytes(self.bytes(8).try_into().expect("eight bytes"))
    }

    /// Bytes left.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Nothing left.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A length as an index.
///
/// # Panics
/// Never on 64 bits.
#[must_use]
pub fn index(length: u64) -> usize {
    usize::try_from(length).expect("an address space of 64 bits")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_comes_back_and_pieces_of_one_wait_for_the_rest() {
        let request = Request {
            command: Command::WriteZeroes,
            flags: flag::FUA | flag::NO_HOLE,
            cookie: 0x0102_0304_0506_0708,
            offset: 512,
            length: 4096,
        };
        let mut bytes = Vec::new();
        request.put(&mut bytes);
        assert_eq!(bytes.len(), REQUEST_SIZE);
        assert_eq!(bytes[..8], [0x25, 0x60, 0x95, 0x13, 0, 3, 0, 6]);
        assert_eq!(Request::get(&bytes), Ok(Some(request)));
        assert_eq!(Request::get(&bytes[..27]), Ok(None));
        bytes[0] = 0;
        assert!(Request::get(&bytes).unwrap_err().contains("opens with"));
        let mut unknown = Vec::new();
        request.put(&mut unknown);
        unknown[7] = 5;
        assert!(Request::get(&unknown).unwrap_err().contains("kind 5"));
    }

    #[test]
    fn options_carry_their_length() {
        let mut out = Vec::new();
        put_option(&mut out, option::GO, b"abc");
        assert_eq!(&out[..8], b"IHAVEOPT");
        let mut rest = Reader(&out[8..]);
        assert_eq!((rest.u32(), rest.u32(), rest.bytes(3)), (7, 3, &b"abc"[..]));
        assert!(rest.is_empty());
    }
}
