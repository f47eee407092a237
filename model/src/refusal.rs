//! How a command is refused: QAPI class and text.
//!
//! Rules: the text is the one QEMU 10.0 gives, word for word; a refusal changes nothing in the world.

use std::fmt;
use std::rc::Rc;

/// QAPI error class.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Hash)]
pub enum ErrorClass {
    /// Almost every refusal.
    GenericError,
    /// A `block-job-*` verb on a job that does not exist.
    DeviceNotActive,
    /// No such command.
    CommandNotFound,
}

impl ErrorClass {
    /// The QAPI name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ErrorClass::GenericError => "GenericError",
            ErrorClass::DeviceNotActive => "DeviceNotActive",
            ErrorClass::CommandNotFound => "CommandNotFound",
        }
    }
}

/// A refused command.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Refusal {
    /// QAPI class.
    pub class: ErrorClass,
    /// The text.
    pub desc: String,
    /// The command got as far as creating a job of this id, so a client sees it go `created`, `null`.
    pub early_failed_job: Option<Rc<str>>,
    /// Jobs that the command made and took back, so that a client sees them go `created`, `aborting`, `concluded`, `null`.
    pub taken_back: Vec<Rc<str>>,
}

impl Refusal {
    /// A `GenericError` with this text.
    #[must_use]
    pub fn new(desc: impl Into<String>) -> Refusal {
        Refusal {
            class: ErrorClass::GenericError,
            desc: desc.into(),
            early_failed_job: None,
            taken_back: Vec::new(),
        }
    }

    /// The same refusal with `prefix` before its text.
    #[must_use]
    pub fn prefixed(mut self, prefix: &str) -> Refusal {
        self.desc.insert_str(0, prefix);
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.class.name(), self.desc)
    }
}

impl std::error::Error for Refusal {}
