//! The known defects that only the stress tier meets.
//!
//! Rules: a scenario has no I/O threads, so that none reproduces these: their scripts under `docs/findings/`, made by hand, do. They are
//! therefore not in the lists that `compare` and gated runs go by.

use super::{Defect, Sure};
use crate::oracle::{OracleName, Violation};

static EXPORT_DEL_ABORTS: Defect = Defect {
    id: "export-del-in-iothread-aborts",
    title: "an export in an I/O thread that goes while clients of another one do aborts the daemon",
    qemu: "the node moves back to the main thread, and an export that is going as well holds that none of its connections is being \
           read from",
    right: "the exports go: guests that come and go must not end a process that serves others",
    sure: Sure::Certain,
    scenario: "",
    page: include_str!("../../../../docs/findings/export-del-in-iothread-aborts.md"),
    matches: |_| false,
    steer: None,
};

pub(super) fn all() -> impl Iterator<Item = &'static Defect> {
    std::iter::once(&EXPORT_DEL_ABORTS)
}

/// The reviewed defect that explains a finding of the stress tier, by the daemon's last words.
#[must_use]
pub fn explain_stress(violation: &Violation) -> Option<&'static Defect> {
    let says = |words: &str| violation.message.contains(words);
    let aborts = says("the daemon died of SIGABRT")
        && says("blk_aio_attached: Assertion `client->recv_coroutine == NULL' failed");
    (violation.oracle == OracleName::Daemon && aborts).then_some(&EXPORT_DEL_ABORTS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_that_assertion_is_known() {
        let of = |oracle: OracleName, message: &str| {
            let violation = Violation {
                oracle,
                message: message.to_owned(),
                evidence: Vec::new(),
                step: None,
            };
            explain_stress(&violation).map(|defect| defect.id)
        };
        let died = "the daemon died of SIGABRT: qemu-storage-daemon: nbd/server.c:1684: blk_aio_attached: Assertion \
                    `client->recv_coroutine == NULL' failed.";
        assert_eq!(
            of(OracleName::Daemon, died),
            Some("export-del-in-iothread-aborts")
        );
        assert_eq!(of(OracleName::Data, died), None);
        let other = died.replace("blk_aio_attached", "blk_aio_detach");
        assert_eq!(of(OracleName::Daemon, &other), None);
        assert_eq!(of(OracleName::Daemon, "nothing comes in 120 s"), None);
    }
}
