//! The known defects of transactions with backups, as they show in gated runs.
//!
//! Rules: as in [`super`]. The model is as it was before the transaction, with the jobs as far as they have come meanwhile: one that was
//! sent while a job used its target may be accepted all the same, since the job can end under its drain.

use super::{Found, Given, known};
use crate::oracle::OracleName;

/// Nothing can happen any more, and the answer to a group of backups that is given up is missing.
pub(super) fn group_hangs(found: &Found<'_>) -> bool {
    let is_given_up =
        |(execute, arguments): Given<'_>| known::gives_up_group(&found.world, execute, arguments);
    found.says(&[OracleName::Liveness], "nothing can happen any more") && found.unanswered().any(is_given_up)
}

/// The daemon died, whatever freed memory made of it, over a transaction that frees the bitmap of its first actions.
pub(super) fn frees_bitmap(found: &Found<'_>) -> bool {
    let frees = |(execute, arguments): Given<'_>| known::frees_bitmap(&found.world, execute, arguments);
    found.says(&[OracleName::Daemon], "the daemon died of SIG") && found.unanswered().any(frees)
}
