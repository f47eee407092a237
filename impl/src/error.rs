//! Errors: errno-like results of I/O, QAPI-like refusals of commands.
//!
//! Rules: an I/O error is an [`Errno`]; a refused command is a [`QmpError`] whose class and text are those of
//! QEMU 10.0 where QEMU has one. Nothing here panics.

use std::fmt;

/// The errno values that block I/O returns. Positive numbers, Linux values.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Errno(pub i32);

macro_rules! errnos {
    ($($name:ident = $value:literal, $text:literal;)*) => {
        impl Errno {
            $(#[doc = $text] pub const $name: Errno = Errno($value);)*
            /// The symbolic name, `E?` when unknown.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self.0 { $($value => stringify!($name),)* _ => "E?" }
            }
            /// The text of `strerror`.
            #[must_use]
            pub fn text(self) -> &'static str {
                match self.0 { $($value => $text,)* _ => "Unknown error" }
            }
        }
    };
}

errnos! {
    EPERM = 1, "Operation not permitted";
    ENOENT = 2, "No such file or directory";
    EIO = 5, "Input/output error";
    ENXIO = 6, "No such device or address";
    EBADF = 9, "Bad file descriptor";
    EAGAIN = 11, "Resource temporarily unavailable";
    ENOMEM = 12, "Cannot allocate memory";
    EACCES = 13, "Permission denied";
    EBUSY = 16, "Device or resource busy";
    EEXIST = 17, "File exists";
    ENODEV = 19, "No such device";
    ENOTDIR = 20, "Not a directory";
    EISDIR = 21, "Is a directory";
    EINVAL = 22, "Invalid argument";
    EMFILE = 24, "Too many open files";
    EFBIG = 27, "File too large";
    ENOSPC = 28, "No space left on device";
    EROFS = 30, "Read-only file system";
    ENAMETOOLONG = 36, "File name too long";
    ENOTSUP = 95, "Operation not supported";
    ETIMEDOUT = 110, "Connection timed out";
    ENOMEDIUM = 123, "No medium found";
    ECANCELED = 125, "Operation canceled";
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            "E?" => write!(f, "E{}", self.0),
            name => f.write_str(name),
        }
    }
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.text())
    }
}

impl std::error::Error for Errno {}

impl From<std::io::Error> for Errno {
    fn from(e: std::io::Error) -> Errno {
        e.raw_os_error().map_or(Errno::EIO, Errno)
    }
}

/// QAPI error class.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub enum ErrorClass {
    /// Almost every refusal.
    GenericError,
    /// `block-job-*` on a job that does not exist.
    DeviceNotActive,
    /// `block-commit` on a device that does not exist.
    DeviceNotFound,
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
            ErrorClass::DeviceNotFound => "DeviceNotFound",
            ErrorClass::CommandNotFound => "CommandNotFound",
        }
    }
}

/// A refused command: QAPI class and description.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{desc}")]
pub struct QmpError {
    /// QAPI class.
    pub class: ErrorClass,
    /// QEMU's text.
    pub desc: String,
}

impl QmpError {
    /// A `GenericError` with this text.
    pub fn generic(desc: impl Into<String>) -> QmpError {
        QmpError {
            class: ErrorClass::GenericError,
            desc: desc.into(),
        }
    }

    /// The same refusal with `prefix` before its text.
    #[must_use]
    pub fn prefixed(self, prefix: &str) -> QmpError {
        QmpError {
            class: self.class,
            desc: format!("{prefix}{}", self.desc),
        }
    }

    /// `text: strerror`, the shape of QEMU's errno errors.
    #[must_use]
    pub fn errno(text: &str, errno: Errno) -> QmpError {
        QmpError::generic(format!("{text}: {}", errno.text()))
    }
}
