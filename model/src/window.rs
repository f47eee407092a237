//! The part of its file that a raw node shows.
//!
//! Rules: it begins at `offset` and is as long as `size` says, or as the rest of the file; what a file cannot hold is refused.

use serde_json::Value;

use crate::options::NodeOptions;
use crate::refusal::Refusal;

const SECTOR: u64 = 512;

/// The part of its file that a raw node shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Window {
    offset: u64,
    size: Option<u64>,
}

impl Window {
    /// What the options say.
    pub(crate) fn at(options: &NodeOptions) -> Window {
        let number = |name| options.get(name).and_then(Value::as_u64);
        Window {
            offset: number("offset").unwrap_or(0),
            size: number("size"),
        }
    }

    /// Where it begins.
    pub(crate) fn offset(self) -> u64 {
        self.offset
    }

    /// What the options say, for a file of this length.
    pub(crate) fn of(options: &NodeOptions, real: u64) -> Result<Window, Refusal> {
        let Window { offset, size } = Window::at(options);
        if offset > real {
            return Err(Refusal::new(format!(
                "Offset ({offset}) cannot be greater than size of the containing file ({real})"
            )));
        }
        if let Some(size) = size.filter(|size| *size > real - offset) {
            return Err(Refusal::new(format!(
                "The sum of offset ({offset}) and size ({size}) has to be smaller or equal to the  actual size of \
                 the containing file ({real})"
            )));
        }
        if size.is_some_and(|size| !size.is_multiple_of(SECTOR)) {
            return Err(Refusal::new("Specified size is not multiple of 512"));
        }
        Ok(Window { offset, size })
    }

    /// Not the whole file.
    pub(crate) fn is_part(self) -> bool {
        self.offset != 0 || self.size.is_some()
    }

    /// How much of a file of this length is seen.
    pub(crate) fn length(self, real: u64) -> u64 {
        let rest = real.saturating_sub(self.offset);
        self.size
            .map_or(rest, |size| size.min(rest))
            .next_multiple_of(SECTOR)
    }
}
