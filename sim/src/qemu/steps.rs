//! Steps of a scenario that no daemon of ours can be given.
//!
//! Rules: they are refused before anything runs (exit code 2): whatever came of them would say nothing about the block layer.
//! Not here: commands that a target cannot observe but a daemon may be given.

use crate::scenario::{Action, Scenario};

/// Commands for the daemon as a process, and for its side of the sockets that we hold the other end of.
const ABOUT_ITSELF: [&str; 11] = [
    "quit",
    "qmp_capabilities",
    "nbd-server-start",
    "nbd-server-stop",
    "nbd-server-add",
    "nbd-server-remove",
    "chardev-add",
    "chardev-change",
    "chardev-remove",
    "chardev-send-break",
    "yank",
];

/// Why a daemon cannot run this scenario.
#[must_use]
pub fn impossible(scenario: &Scenario) -> Option<String> {
    let drained = |action: &Action| matches!(action, Action::DrainBegin { .. } | Action::DrainEnd { .. });
    if let Some(at) = scenario.steps.iter().position(|s| drained(&s.action)) {
        return Some(format!(
            "step {at}: qemu-storage-daemon has no command for drained sections; --on qemu cannot run this scenario"
        ));
    }
    about_itself(scenario)
}

/// The first step with a command for the daemon itself, as a reason to refuse the scenario.
#[must_use]
pub fn about_itself(scenario: &Scenario) -> Option<String> {
    let mut steps = scenario.steps.iter().enumerate();
    steps.find_map(|(at, step)| match &step.action {
        Action::Command { execute, .. } if ABOUT_ITSELF.contains(&&**execute) => Some(format!(
            "step {at}: {execute} is about qemu-storage-daemon itself and not about its block layer; no daemon is given it"
        )),
        _ => None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oracle::tests::scenario_of;

    #[test]
    fn what_ends_a_daemon_or_takes_its_sockets_away_is_refused_and_nothing_else() {
        let of = |step: &str| {
            scenario_of(&format!(
                r#"{{"version":1,"grain":512,"images":[],"steps":[{{"actor":"m","execute":"query-jobs"}},{step}]}}"#
            ))
        };
        let quit = of(r#"{"actor":"m","execute":"quit"}"#);
        let why = impossible(&quit).expect("refused");
        assert!(why.starts_with("step 1: quit is about"), "{why}");
        assert_eq!(about_itself(&quit), Some(why));
        // The daemon refuses it by itself, as the model says.
        let unknown = of(r#"{"actor":"m","execute":"no-such-command"}"#);
        assert_eq!(impossible(&unknown), None);
        let drained = of(r#"{"actor":"d","drained-begin":"n"},{"actor":"d","drained-end":"n"}"#);
        assert!(impossible(&drained).is_some_and(|why| why.contains("drained sections")));
        assert_eq!(about_itself(&drained), None);
    }
}
