//! What a job does with an I/O error: QAPI `BlockdevOnError`, the decision, the io-status.

use crate::error::Errno;

/// QAPI `BlockdevOnError`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum OnError {
    /// The job fails.
    #[default]
    Report,
    /// The job goes on, and fails at its end.
    Ignore,
    /// The job pauses and retries when resumed.
    Stop,
    /// Stop when space ran out, otherwise report.
    Enospc,
    /// For jobs the same as `enospc`.
    Auto,
}

impl OnError {
    /// Names in QAPI, with the values.
    pub const NAMES: [(&'static str, OnError); 5] = [
        ("report", OnError::Report),
        ("ignore", OnError::Ignore),
        ("enospc", OnError::Enospc),
        ("stop", OnError::Stop),
        ("auto", OnError::Auto),
    ];

    /// The decision for one error.
    #[must_use]
    pub fn action(self, errno: Errno) -> ErrorAction {
        match self {
            OnError::Report => ErrorAction::Report,
            OnError::Ignore => ErrorAction::Ignore,
            OnError::Stop => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto if errno == Errno::ENOSPC => ErrorAction::Stop,
            OnError::Enospc | OnError::Auto => ErrorAction::Report,
        }
    }
}

/// QAPI `BlockErrorAction`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ErrorAction {
    /// Go on, fail at the end.
    Ignore,
    /// Fail.
    Report,
    /// Pause.
    Stop,
}

impl ErrorAction {
    /// The QAPI name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            ErrorAction::Ignore => "ignore",
            ErrorAction::Report => "report",
            ErrorAction::Stop => "stop",
        }
    }
}

/// QAPI `BlockDeviceIoStatus`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum IoStatus {
    /// No error stopped the job.
    #[default]
    Ok,
    /// An error other than lack of space stopped it.
    Failed,
    /// Lack of space stopped it.
    NoSpace,
}

impl IoStatus {
    /// The QAPI name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            IoStatus::Ok => "ok",
            IoStatus::Failed => "failed",
            IoStatus::NoSpace => "nospace",
        }
    }

    /// The status after an error stopped the job: the first one counts.
    #[must_use]
    pub fn after(self, errno: Errno) -> IoStatus {
        match self {
            IoStatus::Ok if errno == Errno::ENOSPC => IoStatus::NoSpace,
            IoStatus::Ok => IoStatus::Failed,
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn decisions() {
        let decide = |name: &str, errno| {
            OnError::NAMES
                .iter()
                .find(|(n, _)| *n == name)
                .expect("a name")
                .1
                .action(errno)
                .name()
        };
        for (policy, on_enospc, otherwise) in [
            ("report", "report", "report"),
            ("ignore", "ignore", "ignore"),
            ("stop", "stop", "stop"),
            ("enospc", "stop", "report"),
            ("auto", "stop", "report"),
        ] {
            assert_eq!(decide(policy, Errno::ENOSPC), on_enospc, "{policy}");
            assert_eq!(decide(policy, Errno::EIO), otherwise, "{policy}");
        }
    }

    #[test]
    fn the_first_stopping_error_names_the_status() {
        assert_eq!(IoStatus::Ok.after(Errno::ENOSPC).name(), "nospace");
        assert_eq!(IoStatus::Ok.after(Errno::EIO).name(), "failed");
        assert_eq!(IoStatus::NoSpace.after(Errno::EIO), IoStatus::NoSpace);
        assert_eq!(IoStatus::Failed.after(Errno::ENOSPC), IoStatus::Failed);
    }
}
