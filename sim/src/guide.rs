//! A schedule by what happens, not by position: carries the course of one run over to a run of other steps.
//!
//! Rules: a [`Path`] is what happened in a run, in order, by identity, with how each storage request ended.
//! [`Guided`] plays it: of the alternatives it takes the one that came first in what is left of the path; what the path
//! does not know waits until nothing else can go. A path is moved to a scenario with some steps removed by
//! [`Path::without`].
//! Not promised: the same course. Where the shorter scenario goes another way, the guide knows nothing.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Range;

use crate::choice::{ChoiceKind, Chooser, Key};

/// What happened in a run.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path {
    /// What happened, and the ending of the storage request that it was about (0: well).
    events: Vec<(Key, u32)>,
}

impl Path {
    /// The path without the events of these steps; later steps move up.
    #[must_use]
    pub fn without(&self, steps: Range<usize>) -> Path {
        let gone = owner(steps.start)..owner(steps.end);
        let moved = |&(key, ending): &(Key, u32)| match key.owner() {
            step if gone.contains(&step) => None,
            step if step >= gone.end => Some((key.with_owner(step - (gone.end - gone.start)), ending)),
            _ => Some((key, ending)),
        };
        Path {
            events: self.events.iter().filter_map(moved).collect(),
        }
    }

    /// Number of events.
    #[must_use]
    pub fn len(&self) -> usize {
        self.events.len()
    }

    /// Whether nothing happened.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.events.is_empty()
    }

    /// The path with everything of this event's owner, from there on, right where it is: fewer switches.
    /// `None` when that changes nothing.
    #[must_use]
    pub fn gathered(&self, at: usize) -> Option<Path> {
        let owner = self.events.get(at)?.0.owner();
        let (own, others): (Vec<_>, Vec<_>) = self.events[at..]
            .iter()
            .partition(|(key, _)| key.owner() == owner);
        let events: Vec<_> = self.events[..at]
            .iter()
            .copied()
            .chain(own)
            .chain(others)
            .collect();
        (events != self.events).then_some(Path { events })
    }

    /// Indexes at which another owner goes on than before.
    pub fn switches(&self) -> impl Iterator<Item = usize> + '_ {
        (1..self.events.len()).filter(|&i| self.events[i].0.owner() != self.events[i - 1].0.owner())
    }
}

fn owner(step: usize) -> u32 {
    u32::try_from(step + 1).expect("few steps")
}

/// Passes choices on and writes down what happened.
#[derive(Debug)]
pub struct Tracking<'a, C> {
    inner: C,
    path: &'a mut Path,
}

impl<'a, C: Chooser> Tracking<'a, C> {
    /// Empties `path` and fills it.
    pub fn new(inner: C, path: &'a mut Path) -> Tracking<'a, C> {
        path.events.clear();
        Tracking { inner, path }
    }
}

impl<C: Chooser> Chooser for Tracking<'_, C> {
    fn choose(&mut self, kind: ChoiceKind, n: u32) -> u32 {
        self.inner.choose(kind, n)
    }
    fn ending(&mut self, n: u32, one_in: u32) -> u32 {
        let ending = self.inner.ending(n, one_in);
        if let Some(last) = self.path.events.last_mut() {
            last.1 = ending;
        }
        ending
    }
    fn begin(&mut self, steps: u32) {
        self.inner.begin(steps);
    }
    fn wants_keys(&self) -> bool {
        true
    }
    fn choose_among(&mut self, kind: ChoiceKind, keys: &[Key]) -> u32 {
        let chosen = self.inner.choose_among(kind, keys);
        self.path.events.push((keys[chosen as usize].event(), 0));
        chosen
    }
    fn passed(&mut self, only: Key) {
        self.inner.passed(only);
        self.path.events.push((only.event(), 0));
    }
}

/// Follows a path as far as it leads.
#[derive(Debug)]
pub struct Guided {
    /// Where in the path each thing goes on, and how it ends there.
    places: BTreeMap<Key, VecDeque<(usize, u32)>>,
    ending: u32,
}

impl Guided {
    /// Along this path.
    #[must_use]
    pub fn new(path: &Path) -> Guided {
        let mut places: BTreeMap<Key, VecDeque<(usize, u32)>> = BTreeMap::new();
        for (at, &(key, ending)) in path.events.iter().enumerate() {
            places.entry(key).or_default().push_back((at, ending));
        }
        Guided { places, ending: 0 }
    }

    fn place(&self, key: Key) -> usize {
        self.places
            .get(&key.event())
            .and_then(|places| places.front())
            .map_or(usize::MAX, |&(at, _)| at)
    }
}

impl Chooser for Guided {
    fn choose(&mut self, _kind: ChoiceKind, _n: u32) -> u32 {
        0
    }
    fn ending(&mut self, n: u32, _one_in: u32) -> u32 {
        self.ending % n
    }
    fn wants_keys(&self) -> bool {
        true
    }
    fn choose_among(&mut self, _kind: ChoiceKind, keys: &[Key]) -> u32 {
        let first = (0..keys.len())
            .min_by_key(|&i| self.place(keys[i]))
            .expect("something to choose from");
        self.passed(keys[first]);
        u32::try_from(first).expect("few alternatives")
    }
    fn passed(&mut self, only: Key) {
        let taken = self.places.get_mut(&only.event()).and_then(VecDeque::pop_front);
        self.ending = taken.map_or(0, |(_, ending)| ending);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three steps with two requests each, in any order; returns what happened.
    fn play(chooser: &mut dyn Chooser, steps: &[u32]) -> Vec<Key> {
        let mut left: Vec<Key> = steps
            .iter()
            .flat_map(|&s| [Key::request(s + 1, 0), Key::request(s + 1, 1)])
            .collect();
        let mut happened = Vec::new();
        while !left.is_empty() {
            let chosen = match left[..] {
                [only] => {
                    chooser.passed(only);
                    0
                }
                _ => chooser.choose_among(ChoiceKind::Next, &left),
            };
            chooser.ending(3, 1);
            happened.push(left.remove(chosen as usize));
        }
        happened
    }

    #[test]
    fn a_path_leads_the_same_way_and_past_a_removed_step() {
        let mut path = Path::default();
        let first = play(
            &mut Tracking::new(crate::choice::Random::new(4), &mut path),
            &[0, 1, 2],
        );
        assert_eq!(path.len(), 6);
        assert_eq!(play(&mut Guided::new(&path), &[0, 1, 2]), first);
        let shorter = path.without(1..2);
        let expected: Vec<Key> = first
            .iter()
            .filter(|key| key.owner() != 2)
            .map(|key| if key.owner() == 3 { key.with_owner(2) } else { *key })
            .collect();
        assert_eq!(play(&mut Guided::new(&shorter), &[0, 1]), expected);
    }

    #[test]
    fn endings_travel_with_their_request() {
        let mut path = Path::default();
        play(
            &mut Tracking::new(crate::choice::Random::new(7), &mut path),
            &[0, 1, 2],
        );
        assert!(path.events.iter().any(|e| e.1 != 0), "{path:?}");
        let mut again = Path::default();
        play(&mut Tracking::new(Guided::new(&path), &mut again), &[0, 1, 2]);
        assert_eq!(again, path);
    }

    #[test]
    fn gathering_spares_switches() {
        let key = |step| (Key::task(step, 0), 0);
        let path = Path {
            events: vec![key(1), key(2), key(1), key(2), key(3)],
        };
        assert_eq!(path.switches().count(), 4);
        let gathered = path.gathered(0).expect("something moves");
        assert_eq!(gathered.events, [key(1), key(1), key(2), key(2), key(3)]);
        assert_eq!(gathered.gathered(0), None);
    }
}
