//! The job state machine: states, legal transitions, which command a state admits.
//!
//! Rules: both tables are data; an illegal transition is a bug of ours and panics, an inadmissible command is a
//! refusal. Not here: what the commands do (`job`, `finish`).

use crate::error::QmpError;

/// QAPI `JobStatus`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub enum JobStatus {
    /// Before the first event.
    Undefined,
    /// Created, not started.
    Created,
    /// Running.
    Running,
    /// Parked at a pause point.
    Paused,
    /// Ready to complete (mirror).
    Ready,
    /// Parked while ready.
    Standby,
    /// Done, waiting for its transaction.
    Waiting,
    /// Waiting for finalize.
    Pending,
    /// Failed or cancelled, cleaning up.
    Aborting,
    /// Over, waiting for dismiss.
    Concluded,
    /// Gone.
    Null,
}

use JobStatus::{
    Aborting, Concluded, Created, Null, Paused, Pending, Ready, Running, Standby, Undefined, Waiting,
};

impl JobStatus {
    /// Every state, in QAPI order.
    pub const ALL: [JobStatus; 11] = [
        Undefined, Created, Running, Paused, Ready, Standby, Waiting, Pending, Aborting, Concluded, Null,
    ];

    /// The QAPI name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Undefined => "undefined",
            Created => "created",
            Running => "running",
            Paused => "paused",
            Ready => "ready",
            Standby => "standby",
            Waiting => "waiting",
            Pending => "pending",
            Aborting => "aborting",
            Concluded => "concluded",
            Null => "null",
        }
    }

    /// The states that may follow this one.
    #[must_use]
    pub fn successors(self) -> &'static [JobStatus] {
        match self {
            Undefined => &[Created],
            Created => &[Running, Aborting, Null],
            Running => &[Paused, Ready, Waiting, Aborting],
            Paused => &[Running],
            Ready => &[Standby, Waiting, Aborting],
            Standby => &[Ready],
            Waiting => &[Pending, Aborting],
            Pending => &[Aborting, Concluded],
            Aborting => &[Aborting, Concluded],
            Concluded => &[Null],
            Null => &[],
        }
    }

    /// The run phase is over and its result is known.
    #[must_use]
    pub fn is_completed(self) -> bool {
        matches!(self, Waiting | Pending | Aborting | Concluded | Null)
    }

    /// Converged: may be completed by command.
    #[must_use]
    pub fn is_ready(self) -> bool {
        matches!(self, Ready | Standby)
    }
}

/// A command that acts on a job.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Verb {
    /// Cancel.
    Cancel,
    /// Pause by the user.
    Pause,
    /// Resume by the user.
    Resume,
    /// Change of the rate limit.
    SetSpeed,
    /// Complete a ready job.
    Complete,
    /// Finalize a pending job.
    Finalize,
    /// Forget a concluded job.
    Dismiss,
}

impl Verb {
    /// Every verb.
    pub const ALL: [Verb; 7] = [
        Verb::Cancel,
        Verb::Pause,
        Verb::Resume,
        Verb::SetSpeed,
        Verb::Complete,
        Verb::Finalize,
        Verb::Dismiss,
    ];

    /// The QAPI name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Verb::Cancel => "cancel",
            Verb::Pause => "pause",
            Verb::Resume => "resume",
            Verb::SetSpeed => "set-speed",
            Verb::Complete => "complete",
            Verb::Finalize => "finalize",
            Verb::Dismiss => "dismiss",
        }
    }

    /// Whether a job in this state takes the command.
    #[must_use]
    pub fn admitted_in(self, status: JobStatus) -> bool {
        match self {
            Verb::Cancel => {
                matches!(
                    status,
                    Created | Running | Paused | Ready | Standby | Waiting | Pending
                )
            }
            Verb::Pause | Verb::Resume | Verb::SetSpeed => {
                matches!(status, Created | Running | Paused | Ready | Standby)
            }
            Verb::Complete => status.is_ready(),
            Verb::Finalize => status == Pending,
            Verb::Dismiss => status == Concluded,
        }
    }

    /// Refuses a command that the state does not admit.
    ///
    /// # Errors
    /// QEMU's refusal, naming job, state and verb.
    pub fn check(self, id: &str, status: JobStatus) -> Result<(), QmpError> {
        if self.admitted_in(status) {
            return Ok(());
        }
        Err(QmpError::generic(format!(
            "Job '{id}' in state '{}' cannot accept command verb '{}'",
            status.name(),
            self.name()
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Rows: from; columns: to; in QAPI order, as the documentation of QEMU's job states has them.
    const TRANSITIONS: [&str; 11] = [
        ".X.........", // undefined
        "..X.....X.X", // created
        "...XX.X.X..", // running
        "..X........", // paused
        ".....XX.X..", // ready
        "....X......", // standby
        ".......XX..", // waiting
        "........XX.", // pending
        "........XX.", // aborting
        "..........X", // concluded
        "...........", // null
    ];

    #[test]
    fn transitions_are_exactly_the_table() {
        for (row, from) in TRANSITIONS.iter().zip(JobStatus::ALL) {
            for (cell, to) in row.bytes().zip(JobStatus::ALL) {
                assert_eq!(
                    from.successors().contains(&to),
                    cell == b'X',
                    "{} -> {}",
                    from.name(),
                    to.name()
                );
            }
        }
    }

    #[test]
    fn verbs_are_exactly_the_table() {
        let table = [
            (Verb::Cancel, ".XXXXXXX..."),
            (Verb::Pause, ".XXXXX....."),
            (Verb::Resume, ".XXXXX....."),
            (Verb::SetSpeed, ".XXXXX....."),
            (Verb::Complete, "....XX....."),
            (Verb::Finalize, ".......X..."),
            (Verb::Dismiss, ".........X."),
        ];
        assert_eq!(table.map(|(verb, _)| verb), Verb::ALL);
        for (verb, row) in table {
            for (cell, status) in row.bytes().zip(JobStatus::ALL) {
                assert_eq!(
                    verb.admitted_in(status),
                    cell == b'X',
                    "{} in {}",
                    verb.name(),
                    status.name()
                );
                assert_eq!(verb.check("j", status).is_ok(), cell == b'X');
            }
        }
    }

    #[test]
    fn refusal_text() {
        let refusal = Verb::SetSpeed.check("j", JobStatus::Concluded).unwrap_err();
        assert_eq!(
            refusal.desc,
            "Job 'j' in state 'concluded' cannot accept command verb 'set-speed'"
        );
    }

    #[test]
    fn completed_means_the_result_is_known() {
        let completed: Vec<_> = JobStatus::ALL.into_iter().filter(|s| s.is_completed()).collect();
        assert_eq!(completed, [Waiting, Pending, Aborting, Concluded, Null]);
    }
}
