//! The choice stream: all nondeterminism of a run is `choose(kind, n) -> 0..n`.
//!
//! Rules: 0 always means "no switch, no fault, in order". `choose` with `n == 1` draws nothing and records nothing
//! (callers go through [`pick`]). Only the chooser differs between random runs, replay and fuzzing.

use crate::rng::{Rng, Stream};

/// What is being chosen; for people, statistics and choosers that treat kinds differently.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub enum ChoiceKind {
    /// What happens next: a ready task, a storage completion, an actor's next step, a timer.
    Next,
    /// How a storage request ends (faults; draws nothing when faults are off).
    Fault,
}

/// Identity of an alternative of [`ChoiceKind::Next`]: a task, a storage request, an actor about to take a step, the
/// clock. It does not depend on the schedule (see `owner`), so it means the same in another run of the same steps.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key(u64);

impl Key {
    const CLASS: u32 = 56;
    const OWNER: u32 = 24;
    const NUMBER: u64 = (1 << Key::OWNER) - 1;
    /// Time passes.
    pub const CLOCK: Key = Key(3 << Key::CLASS);

    const fn new(class: u64, owner: u32, number: u32) -> Key {
        Key(class << Key::CLASS | (owner as u64) << Key::OWNER | number as u64 & Key::NUMBER)
    }

    /// The `number`-th task of an owner: 0 for the runner itself, else a step plus 1.
    #[must_use]
    pub const fn task(owner: u32, number: u32) -> Key {
        Key::new(0, owner, number)
    }

    /// The `number`-th storage request of an owner.
    #[must_use]
    pub const fn request(owner: u32, number: u32) -> Key {
        Key::new(1, owner, number)
    }

    /// An actor that can take this step.
    #[must_use]
    pub const fn actor(actor: u32, step: u32) -> Key {
        Key::new(2, step + 1, actor)
    }

    /// 0 for the runner itself and the clock, else a step plus 1.
    #[must_use]
    pub const fn owner(self) -> u32 {
        ((self.0 >> Key::OWNER) & 0xffff_ffff) as u32
    }

    /// The same thing with another owner.
    #[must_use]
    pub const fn with_owner(self, owner: u32) -> Key {
        Key::new(self.0 >> Key::CLASS, owner, (self.0 & 0xff_ffff) as u32)
    }

    /// The thread of control behind it: an actor is the same whatever its next step.
    #[must_use]
    pub const fn thread(self) -> Key {
        if self.0 >> Key::CLASS == 2 {
            self.with_owner(0)
        } else {
            self
        }
    }

    /// The event that it would be: a step is the same whoever takes it.
    #[must_use]
    pub const fn event(self) -> Key {
        if self.0 >> Key::CLASS == 2 {
            Key::new(2, self.owner(), 0)
        } else {
            self
        }
    }
}

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let class = ["task", "request", "actor", "clock"][(self.0 >> Key::CLASS) as usize & 3];
        write!(f, "{class}({}.{})", self.owner(), self.0 & Key::NUMBER)
    }
}

/// A source of choices.
pub trait Chooser {
    /// Picks one of `n >= 1` alternatives.
    fn choose(&mut self, kind: ChoiceKind, n: u32) -> u32;

    /// Picks one of `n >= 1` ways in which a storage request ends: 0 well, all others badly. Who draws does so for about
    /// one request in `one_in`; who plays a record has nothing to add.
    fn ending(&mut self, n: u32, _one_in: u32) -> u32 {
        self.choose(ChoiceKind::Fault, n)
    }

    /// A run begins; about `steps` choices will follow.
    fn begin(&mut self, _steps: u32) {}

    /// Whether [`Chooser::choose_among`] looks at its keys; without it the caller need not build them.
    fn wants_keys(&self) -> bool {
        false
    }

    /// Picks one of these alternatives.
    fn choose_among(&mut self, kind: ChoiceKind, keys: &[Key]) -> u32 {
        self.choose(kind, u32::try_from(keys.len()).expect("few alternatives"))
    }

    /// There was only this alternative; told to those who want keys.
    fn passed(&mut self, _only: Key) {}
}

impl<C: Chooser + ?Sized> Chooser for &mut C {
    fn choose(&mut self, kind: ChoiceKind, n: u32) -> u32 {
        (**self).choose(kind, n)
    }
    fn ending(&mut self, n: u32, one_in: u32) -> u32 {
        (**self).ending(n, one_in)
    }
    fn begin(&mut self, steps: u32) {
        (**self).begin(steps);
    }
    fn wants_keys(&self) -> bool {
        (**self).wants_keys()
    }
    fn choose_among(&mut self, kind: ChoiceKind, keys: &[Key]) -> u32 {
        (**self).choose_among(kind, keys)
    }
    fn passed(&mut self, only: Key) {
        (**self).passed(only);
    }
}

/// One choice, or 0 without asking when there is only one alternative.
///
/// # Panics
/// When `n` is 0 or the chooser answers out of range: bugs of ours.
#[inline]
pub fn pick(chooser: &mut dyn Chooser, kind: ChoiceKind, n: u32) -> u32 {
    assert!(n > 0, "nothing to choose from");
    if n == 1 {
        return 0;
    }
    let chosen = chooser.choose(kind, n);
    assert!(chosen < n, "{chosen} of {n}");
    chosen
}

/// How one of `n` endings is drawn: badly once in `one_in` times, then all equally likely.
fn draw_ending(rng: &mut Rng, n: u32, one_in: u32) -> u32 {
    if n > 1 && rng.chance(1, one_in) {
        1 + rng.below(n - 1)
    } else {
        0
    }
}

/// Every alternative equally likely.
#[derive(Clone, Debug)]
pub struct Random {
    schedule: Rng,
    faults: Rng,
}

impl Random {
    /// The choices of a seed.
    #[must_use]
    pub fn new(seed: u64) -> Random {
        Random {
            schedule: Rng::stream(seed, Stream::Schedule),
            faults: Rng::stream(seed, Stream::Faults),
        }
    }
}

impl Chooser for Random {
    #[inline]
    fn choose(&mut self, kind: ChoiceKind, n: u32) -> u32 {
        match kind {
            ChoiceKind::Next => self.schedule.below(n),
            ChoiceKind::Fault => self.faults.below(n),
        }
    }

    fn ending(&mut self, n: u32, one_in: u32) -> u32 {
        draw_ending(&mut self.faults, n, one_in)
    }
}

/// A recorded list, 0 after its end. Values are reduced modulo the number of alternatives, so a list recorded on
/// another version, or mutilated by the shrinker, still means something.
#[derive(Clone, Debug)]
pub struct Recorded<'a> {
    choices: &'a [u32],
}

impl<'a> Recorded<'a> {
    /// Plays `choices`.
    #[must_use]
    pub fn new(choices: &'a [u32]) -> Recorded<'a> {
        Recorded { choices }
    }
}

impl Chooser for Recorded<'_> {
    fn choose(&mut self, _kind: ChoiceKind, n: u32) -> u32 {
        let Some((&first, rest)) = self.choices.split_first() else {
            return 0;
        };
        self.choices = rest;
        first % n
    }
}

/// A fuzzer's bytes: one byte per choice (two from 257 alternatives on), after their end 0 or a tail's choices.
#[derive(Clone, Debug)]
pub struct Bytes<'a> {
    bytes: &'a [u8],
    tail: Option<Random>,
}

impl<'a> Bytes<'a> {
    /// Plays `bytes`, then zeros.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Bytes<'a> {
        Bytes { bytes, tail: None }
    }

    /// Plays `bytes`, then `tail`.
    #[must_use]
    pub fn then(bytes: &'a [u8], tail: Random) -> Bytes<'a> {
        let tail = Some(tail);
        Bytes { bytes, tail }
    }

    fn next(&mut self) -> u32 {
        let Some((&first, rest)) = self.bytes.split_first() else {
            return 0;
        };
        self.bytes = rest;
        u32::from(first)
    }
}

impl Chooser for Bytes<'_> {
    fn choose(&mut self, kind: ChoiceKind, n: u32) -> u32 {
        if let Some(tail) = self.tail.as_mut().filter(|_| self.bytes.is_empty()) {
            return tail.choose(kind, n);
        }
        let mut value = self.next();
        if n > 256 {
            value |= self.next() << 8;
        }
        value % n
    }
}

/// Probabilistic concurrency testing (Burckhardt et al., ASPLOS 2010): every thread of control has a random priority,
/// the highest one that can go goes, and at `depth - 1` random moments the one that is about to go falls below all
/// others. An ordering bug of depth d among n threads and k steps is met with probability >= 1 / (n k^(d-1)).
#[derive(Clone, Debug)]
pub struct Pct {
    depth: u32,
    rng: Rng,
    faults: Rng,
    /// Steps at which the chosen one falls, ascending.
    change_points: Vec<u32>,
    next_change: usize,
    step: u32,
    /// (key, priority) sorted by key; higher goes first.
    priorities: Vec<(Key, u64)>,
}

impl Pct {
    /// Bugs of depth `depth` (at least 1) for a seed.
    #[must_use]
    pub fn new(depth: u32, seed: u64) -> Pct {
        Pct {
            depth: depth.max(1),
            rng: Rng::stream(seed, Stream::Schedule),
            faults: Rng::stream(seed, Stream::Faults),
            change_points: Vec::new(),
            next_change: 0,
            step: 0,
            priorities: Vec::new(),
        }
    }

    fn priority(&mut self, key: Key) -> u64 {
        let key = key.thread();
        match self.priorities.binary_search_by_key(&key, |&(k, _)| k) {
            Ok(at) => self.priorities[at].1,
            Err(at) => {
                // Initial priorities are at or above `depth`; those after a change point below.
                let priority = self.rng.next_u64() | 1 << 63;
                self.priorities.insert(at, (key, priority));
                priority
            }
        }
    }

    fn highest(&mut self, keys: &[Key]) -> usize {
        let mut best = (0, 0);
        for (i, &key) in keys.iter().enumerate() {
            let priority = self.priority(key);
            if i == 0 || priority > best.1 {
                best = (i, priority);
            }
        }
        best.0
    }
}

impl Chooser for Pct {
    fn choose(&mut self, kind: ChoiceKind, n: u32) -> u32 {
        match kind {
            ChoiceKind::Next => self.rng.below(n),
            ChoiceKind::Fault => self.faults.below(n),
        }
    }

    fn ending(&mut self, n: u32, one_in: u32) -> u32 {
        draw_ending(&mut self.faults, n, one_in)
    }

    fn begin(&mut self, steps: u32) {
        self.step = 0;
        self.next_change = 0;
        self.priorities.clear();
        self.change_points.clear();
        for _ in 1..self.depth {
            let point = self.rng.below(steps.max(1));
            self.change_points.push(point);
        }
        self.change_points.sort_unstable();
    }

    fn wants_keys(&self) -> bool {
        true
    }

    fn choose_among(&mut self, _kind: ChoiceKind, keys: &[Key]) -> u32 {
        let mut chosen = self.highest(keys);
        while self
            .change_points
            .get(self.next_change)
            .is_some_and(|&point| point <= self.step)
        {
            let fallen = self.change_points.len() - self.next_change;
            let at = self
                .priorities
                .binary_search_by_key(&keys[chosen].thread(), |&(k, _)| k)
                .expect("has a priority");
            self.priorities[at].1 = fallen as u64;
            self.next_change += 1;
            chosen = self.highest(keys);
        }
        self.step += 1;
        u32::try_from(chosen).expect("few alternatives")
    }
}

/// Passes choices on and writes them down, into a list that is reused.
#[derive(Debug)]
pub struct Recording<'a, C> {
    inner: C,
    log: &'a mut Vec<u32>,
}

impl<'a, C: Chooser> Recording<'a, C> {
    /// Empties `log` and fills it with what `inner` chooses.
    pub fn new(inner: C, log: &'a mut Vec<u32>) -> Recording<'a, C> {
        log.clear();
        Recording { inner, log }
    }
}

impl<C: Chooser> Chooser for Recording<'_, C> {
    fn choose(&mut self, kind: ChoiceKind, n: u32) -> u32 {
        let chosen = self.inner.choose(kind, n);
        self.log.push(chosen);
        chosen
    }
    fn ending(&mut self, n: u32, one_in: u32) -> u32 {
        let chosen = self.inner.ending(n, one_in);
        self.log.push(chosen);
        chosen
    }
    fn begin(&mut self, steps: u32) {
        self.inner.begin(steps);
    }
    fn wants_keys(&self) -> bool {
        self.inner.wants_keys()
    }
    fn choose_among(&mut self, kind: ChoiceKind, keys: &[Key]) -> u32 {
        let chosen = self.inner.choose_among(kind, keys);
        self.log.push(chosen);
        chosen
    }
    fn passed(&mut self, only: Key) {
        self.inner.passed(only);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recorded_plays_back_what_was_recorded_then_zeros() {
        let mut log = vec![9];
        let mut source = Recording::new(Random::new(3), &mut log);
        let first: Vec<u32> = (2..20).map(|n| pick(&mut source, ChoiceKind::Next, n)).collect();
        assert_eq!(pick(&mut source, ChoiceKind::Next, 1), 0);
        assert_eq!(log, first, "one alternative is no choice");
        let mut replay = Recorded::new(&log);
        let second: Vec<u32> = (2..20).map(|n| pick(&mut replay, ChoiceKind::Next, n)).collect();
        assert_eq!(first, second);
        assert_eq!(pick(&mut replay, ChoiceKind::Next, 5), 0);
        assert_eq!(pick(&mut Recorded::new(&[7]), ChoiceKind::Next, 5), 2, "reduced");
    }

    #[test]
    fn bytes_reach_every_alternative() {
        assert_eq!(pick(&mut Bytes::new(&[250]), ChoiceKind::Next, 7), 250 % 7);
        assert_eq!(pick(&mut Bytes::new(&[1, 1]), ChoiceKind::Next, 300), 257);
        assert_eq!(pick(&mut Bytes::new(&[]), ChoiceKind::Next, 300), 0);
        let (mut then, mut tail) = (Bytes::then(&[3], Random::new(5)), Random::new(5));
        assert_eq!(pick(&mut then, ChoiceKind::Next, 7), 3);
        for n in 2..40 {
            assert_eq!(
                pick(&mut then, ChoiceKind::Next, n),
                tail.choose(ChoiceKind::Next, n)
            );
        }
    }

    #[test]
    fn faults_do_not_shift_the_schedule() {
        let mut plain = Random::new(11);
        let mut faulty = Random::new(11);
        for _ in 0..50 {
            faulty.choose(ChoiceKind::Fault, 4);
            faulty.ending(4, 2);
            assert_eq!(
                plain.choose(ChoiceKind::Next, 6),
                faulty.choose(ChoiceKind::Next, 6)
            );
        }
    }

    #[test]
    fn endings_are_as_rare_as_asked_for_and_replay() {
        let mut log = Vec::new();
        let mut source = Recording::new(Random::new(5), &mut log);
        let drawn: Vec<u32> = (0..4000).map(|_| source.ending(5, 8)).collect();
        let bad = drawn.iter().filter(|&&e| e != 0).count();
        assert!((400..600).contains(&bad), "{bad} of 4000 with one in 8");
        assert!((1..5).all(|ending| drawn.contains(&ending)) && !drawn.contains(&5));
        let mut replay = Recorded::new(&log);
        assert!(drawn.iter().all(|&e| replay.ending(5, 1) == e));
        assert_eq!(replay.ending(5, 1), 0, "after the end nothing fails");
        assert!((0..50).all(|_| Random::new(1).ending(2, 1) == 1));
    }

    #[test]
    fn pct_of_depth_one_never_switches_by_itself_and_depth_two_switches_once() {
        let keys = [Key::task(1, 0), Key::request(1, 0), Key::actor(0, 4)];
        let mut switched = 0;
        for seed in 0..200 {
            let mut one = Pct::new(1, seed);
            one.begin(50);
            let first = one.choose_among(ChoiceKind::Next, &keys);
            assert!((0..50).all(|_| one.choose_among(ChoiceKind::Next, &keys) == first));
            let mut two = Pct::new(2, seed);
            two.begin(50);
            let run: Vec<u32> = (0..60)
                .map(|_| two.choose_among(ChoiceKind::Next, &keys))
                .collect();
            let switches = run.windows(2).filter(|w| w[0] != w[1]).count();
            assert!(switches <= 1, "{run:?}");
            switched += switches;
        }
        assert!(
            switched > 150,
            "a change point at step 0 is the only reason for none: {switched}"
        );
    }
}
