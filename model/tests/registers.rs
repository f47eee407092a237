//! The online register checker against brute force: it accepts a history exactly if some order explains it.

use blkcheck_model::register::{Effect, OpId, Registers, Value};
use proptest::prelude::*;

/// One step of a history on one grain.
#[derive(Clone, Copy, Debug)]
enum Step {
    Begin(Effect),
    /// Ends the `n`-th open request; a read has seen `value`.
    End {
        n: usize,
        ok: bool,
        value: Value,
    },
}

/// A request with the times of its begin and end; `end` is none while it is open or after it failed.
#[derive(Clone, Copy, Debug)]
struct Past {
    effect: Effect,
    begin: usize,
    end: Option<usize>,
    saw: Option<Value>,
}

/// Some order of the requests explains every read.
fn explainable(past: &[Past], value: Value) -> bool {
    fn search(past: &[Past], done: &mut Vec<bool>, value: Value) -> bool {
        let left = |done: &[bool]| (0..past.len()).filter(|at| !done[*at]).collect::<Vec<_>>();
        let open = left(done);
        // What must come next ends first; anything that began after that end has to wait.
        let first_end = open.iter().filter_map(|at| past[*at].end).min();
        let Some(first_end) = first_end else { return true };
        for at in open {
            if past[at].begin > first_end {
                continue;
            }
            let outcomes = match past[at].effect {
                Effect::Write(stored) => vec![stored],
                Effect::Discard => vec![value, 0],
                Effect::Read if past[at].saw.is_none_or(|saw| saw == value) => vec![value],
                Effect::Read => vec![],
            };
            done[at] = true;
            let found = outcomes.into_iter().any(|value| search(past, done, value));
            done[at] = false;
            if found {
                return true;
            }
        }
        false
    }
    search(past, &mut vec![false; past.len()], value)
}

/// An open request of the real register: what it does, where, and what each grain saw when it took effect there.
type Running = (OpId, Effect, std::ops::Range<usize>, Vec<Option<Value>>);

fn effect() -> impl Strategy<Value = Effect> {
    prop_oneof![
        4 => Just(Effect::Read),
        3 => (0_u64..4).prop_map(Effect::Write),
        1 => Just(Effect::Discard),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        effect().prop_map(Step::Begin),
        (0_usize..4, prop::bool::weighted(0.8), 0_u64..4).prop_map(|(n, ok, value)| Step::End {
            n,
            ok,
            value
        }),
    ]
}

/// Runs a history on both; returns whether a violation was found (both ways of finding it agree at every step).
fn agree(steps: &[Step]) -> Result<bool, TestCaseError> {
    const INITIAL: Value = 1;
    let mut disk = Registers::new([INITIAL]);
    let mut past: Vec<Past> = Vec::new();
    let mut open: Vec<(OpId, usize)> = Vec::new();
    for (time, step) in steps.iter().enumerate() {
        match *step {
            Step::Begin(effect) if open.len() < 4 => {
                open.push((disk.begin(effect, 0..1), past.len()));
                past.push(Past {
                    effect,
                    begin: time,
                    end: None,
                    saw: None,
                });
            }
            Step::End { n, ok, value } if n < open.len() => {
                let (id, at) = open.remove(n);
                let read = past[at].effect == Effect::Read;
                past[at].end = (ok || read).then_some(time);
                if !read || !ok {
                    disk.end(id, ok);
                    continue;
                }
                past[at].saw = Some(value);
                let accepted = disk.end_read(id, &[value]);
                prop_assert_eq!(accepted.is_ok(), explainable(&past, INITIAL), "{:?}", past);
                if let Err(violation) = accepted {
                    for other in 0..5 {
                        past[at].saw = Some(other);
                        prop_assert_eq!(violation.allowed.contains(&other), explainable(&past, INITIAL));
                    }
                    return Ok(true);
                }
            }
            Step::Begin(_) | Step::End { .. } => {}
        }
    }
    prop_assert_eq!(disk.given_up(), 0);
    Ok(false)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 4000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn agrees_with_brute_force(steps in prop::collection::vec(step(), 1..24)) {
        agree(&steps)?;
    }

    /// What a real register does is never called wrong: requests take effect at a moment of the machine's choice.
    #[test]
    fn never_a_false_alarm(
        choices in prop::collection::vec((0_u8..4, 0_usize..6, 0_usize..8, 1_usize..5, any::<bool>()), 1..200),
    ) {
        const GRAINS: usize = 8;
        let mut content = [0_u64; GRAINS];
        let mut disk = Registers::new(content);
        // Open requests with what each of their grains still waits for.
        let mut open: Vec<Running> = Vec::new();
        for (step, (what, n, first, len, flag)) in choices.into_iter().enumerate() {
            let grains = first.min(GRAINS - 1)..(first + len).min(GRAINS);
            match what {
                0 | 1 if open.len() < 5 => {
                    let effect = match (what, flag) {
                        (0, _) => Effect::Read,
                        (_, true) => Effect::Write(u64::try_from(step).unwrap() + 1),
                        (_, false) => Effect::Write(0),
                    };
                    let id = disk.begin(effect, grains.clone());
                    open.push((id, effect, grains.clone(), vec![None; grains.len()]));
                }
                2 if n < open.len() => {
                    // Takes effect on one grain now.
                    let (_, effect, grains, seen) = &mut open[n];
                    let at = first % grains.len();
                    if seen[at].is_none() {
                        let grain = grains.start + at;
                        if let Effect::Write(value) = effect { content[grain] = *value; }
                        seen[at] = Some(content[grain]);
                    }
                }
                3 if n < open.len() => {
                    let (id, effect, grains, seen) = open.remove(n);
                    if effect == Effect::Read {
                        let saw: Vec<Value> = seen.iter().zip(grains).map(|(seen, grain)| seen.unwrap_or(content[grain])).collect();
                        prop_assert_eq!(disk.end_read(id, &saw), Ok(()));
                    } else if flag {
                        for (at, grain) in grains.enumerate().filter(|(at, _)| seen[*at].is_none()) {
                            let Effect::Write(value) = effect else { unreachable!() };
                            content[grain] = value;
                            let _ = at;
                        }
                        disk.end(id, true);
                    } else {
                        disk.end(id, false);
                    }
                }
                _ => {}
            }
        }
        for (grain, value) in content.iter().enumerate() {
            prop_assert!(disk.given_up() > 0 || disk.possible(grain).contains(value));
        }
    }
}

/// The generator does produce both verdicts; otherwise the comparison above proves little.
#[test]
fn both_verdicts_occur() {
    use proptest::strategy::ValueTree;
    use proptest::test_runner::TestRunner;
    let mut runner = TestRunner::deterministic();
    let strategy = prop::collection::vec(step(), 1..24);
    let verdicts: Vec<bool> = (0..200)
        .map(|_| agree(&strategy.new_tree(&mut runner).unwrap().current()).unwrap())
        .collect();
    let violations = verdicts.iter().filter(|violation| **violation).count();
    assert!((20..180).contains(&violations), "{violations} of 200");
}
