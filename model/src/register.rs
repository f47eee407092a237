//! Which reads a history of guest requests allows: every grain of a disk is a linearizable register.
//!
//! Rules: a request takes effect on a grain at one moment between its begin and its end; grains are independent. A
//! write that failed may take effect at any later time, or never. A discard leaves the old content or zeroes. Writing
//! the same value twice (zeroes!) is fine: what counts is the value, not who wrote it.
//!
//! How: a grain that no two requests overlap on is just a value. Where requests overlap, every *possibility* is kept:
//! a current value, which of the open writes have taken effect, and what each open read may have seen. A possibility
//! is developed only as far as an answer requires, so the check is exact, and nearly always there is only one.
//! Cost: O(1) per grain and request without overlap.
//! Not here: durability (what may be lost at power failure).

use std::ops::Range;

/// Content of a grain: 0 is zeroes, everything else is the stamp of a write.
pub type Value = u64;

/// A request, in order of begin.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct OpId(pub u64);

/// What a request does to each of its grains.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Effect {
    /// Nothing; it tells the content.
    Read,
    /// Stores a value (0 for write-zeroes).
    Write(Value),
    /// Leaves the content, or stores zeroes.
    Discard,
}

impl Effect {
    fn stores(self) -> Option<Value> {
        match self {
            Effect::Read => None,
            Effect::Write(value) => Some(value),
            Effect::Discard => Some(0),
        }
    }
}

/// A read that no order of the requests explains.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// The read.
    pub op: OpId,
    /// The grain.
    pub grain: usize,
    /// What it saw.
    pub saw: Value,
    /// What it could have seen, sorted.
    pub allowed: Vec<Value>,
}

/// An open request.
#[derive(Clone, Debug)]
struct Open {
    id: OpId,
    effect: Effect,
    grains: Range<usize>,
}

/// One grain of the disk.
#[derive(Clone, Debug)]
struct Register {
    /// The content; meaningless while `busy`.
    value: Value,
    /// Requests overlap here, or a failed write lingers.
    busy: Option<Box<Busy>>,
}

/// A disk of registers.
#[derive(Clone, Debug)]
pub struct Registers {
    registers: Vec<Register>,
    open: Vec<Open>,
    next: u64,
}

impl Registers {
    /// A disk with this content, and nothing open.
    #[must_use]
    pub fn new(initial: impl IntoIterator<Item = Value>) -> Registers {
        let registers = initial
            .into_iter()
            .map(|value| Register { value, busy: None })
            .collect();
        Registers {
            registers,
            open: Vec::new(),
            next: 0,
        }
    }

    /// A request begins on these grains.
    ///
    /// # Panics
    /// When the grains lie outside the disk.
    pub fn begin(&mut self, effect: Effect, grains: Range<usize>) -> OpId {
        assert!(grains.end <= self.registers.len(), "the request lies on the disk");
        let id = OpId(self.next);
        self.next += 1;
        // Reads do not disturb each other: a grain with nothing but reads is still just a value.
        for other in self
            .open
            .iter()
            .filter(|other| (other.effect, effect) != (Effect::Read, Effect::Read))
        {
            let both = other.grains.start.max(grains.start)..other.grains.end.min(grains.end);
            for register in self.registers.get_mut(both).unwrap_or_default() {
                register.busy().begin(other.id, other.effect);
            }
        }
        for register in &mut self.registers[grains.clone()] {
            if let Some(busy) = &mut register.busy {
                busy.begin(id, effect);
            }
        }
        self.open.push(Open { id, effect, grains });
        id
    }

    /// A write, write-zeroes or discard ends; `ok` if it succeeded.
    ///
    /// # Panics
    /// When the request is not open.
    pub fn end(&mut self, id: OpId, ok: bool) {
        let open = self.close(id);
        for register in &mut self.registers[open.grains.clone()] {
            if register.busy.is_none() {
                match (open.effect, ok) {
                    (Effect::Read, _) => continue,
                    (Effect::Write(value), true) => {
                        register.value = value;
                        continue;
                    }
                    // What it did is not certain: possibilities from here on.
                    (Effect::Write(_) | Effect::Discard, _) => register.busy().begin(id, open.effect),
                }
            }
            let busy = register.busy.as_mut().expect("just made sure");
            if ok {
                busy.end(id);
            } else {
                busy.fail(id);
            }
            register.settle();
        }
    }

    /// A read ends and has seen these values, one per grain.
    ///
    /// # Errors
    /// The first grain whose value nothing explains.
    ///
    /// # Panics
    /// When the request is not an open read, or there are fewer values than it has grains left.
    pub fn end_read(&mut self, id: OpId, values: &[Value]) -> Result<(), Violation> {
        let mut violation = None;
        self.observe(id, values.iter().copied().map(Some), |first| {
            violation.get_or_insert(first);
        });
        violation.map_or(Ok(()), Err)
    }

    /// As [`Registers::end_read`] for a read of which only some grains are known, telling every grain whose value
    /// nothing explains. Such a grain counts as not observed.
    ///
    /// # Panics
    /// When the request is not an open read, or there are fewer values than it has grains left.
    pub fn observe(
        &mut self,
        id: OpId,
        values: impl ExactSizeIterator<Item = Option<Value>>,
        mut unexplained: impl FnMut(Violation),
    ) {
        let open = self.close(id);
        assert_eq!(open.effect, Effect::Read, "{id:?} is a read");
        assert!(open.grains.len() <= values.len(), "one value per grain");
        for (grain, saw) in open.grains.zip(values) {
            let register = &mut self.registers[grain];
            let (saw, allowed) = match (&mut register.busy, saw) {
                (None, None) => continue,
                (None, Some(saw)) if register.value == saw => continue,
                (None, Some(saw)) => (saw, vec![register.value]),
                (Some(busy), None) => {
                    busy.end(id);
                    register.settle();
                    continue;
                }
                (Some(busy), Some(saw)) => {
                    let explained = busy.end_read(id, saw);
                    register.settle();
                    match explained {
                        Ok(()) => continue,
                        Err(allowed) => (saw, allowed),
                    }
                }
            };
            unexplained(Violation {
                op: id,
                grain,
                saw,
                allowed,
            });
        }
    }

    /// The values that a read which begins and ends now could see, sorted; empty if the grain was given up.
    #[must_use]
    pub fn possible(&self, grain: usize) -> Vec<Value> {
        let mut disk = Registers {
            registers: vec![self.registers[grain].clone()],
            open: Vec::new(),
            next: 0,
        };
        for open in self.open.iter().filter(|open| open.grains.contains(&grain)) {
            disk.registers[0].busy().begin(open.id, open.effect);
        }
        match disk.registers[0].busy.as_mut() {
            None => vec![disk.registers[0].value],
            Some(busy) => {
                let probe = OpId(self.next);
                busy.begin(probe, Effect::Read);
                busy.allowed(probe)
            }
        }
    }

    /// Grains on which the possibilities became too many to follow. Everything is accepted there from then on.
    #[must_use]
    pub fn given_up(&self) -> usize {
        self.registers
            .iter()
            .filter(|register| {
                register
                    .busy
                    .as_ref()
                    .is_some_and(|busy| busy.possible.is_empty())
            })
            .count()
    }

    /// Something other than a request changes what a grain shows, where no open write has: from now on it shows one of these
    /// values. With `only` nothing else; without, it may also show what it did. Open reads may see both.
    pub fn shift(&mut self, grain: usize, values: &[Value], only: bool) {
        let register = &mut self.registers[grain];
        if register.busy.is_none() {
            let open = || self.open.iter().filter(|open| open.grains.contains(&grain));
            if open().next().is_none() && (only && values.len() == 1 || values == [register.value]) {
                register.value = values[0];
                return;
            }
            let busy = register.busy();
            for open in open() {
                busy.begin(open.id, open.effect);
            }
        }
        register.busy().shift(values, only);
        register.settle();
    }

    /// Makes the disk so many grains long; new ones hold zeroes. What an open request has to do with the grains that are cut off
    /// is over: whoever changes a length has waited for it, or it went elsewhere.
    pub fn resize(&mut self, grains: usize) {
        for open in &mut self.open {
            open.grains.end = open.grains.end.min(grains);
            open.grains.start = open.grains.start.min(open.grains.end);
        }
        self.registers.resize(grains, Register { value: 0, busy: None });
    }

    /// So many registers that have the history of this one, open requests included, which keep their names.
    #[must_use]
    pub fn split(&self, grain: usize, count: usize) -> Registers {
        let open = self.open.iter().filter(|open| open.grains.contains(&grain));
        let all = |open: &Open| Open {
            grains: 0..count,
            ..open.clone()
        };
        Registers {
            registers: vec![self.registers[grain].clone(); count],
            open: open.map(all).collect(),
            next: self.next,
        }
    }

    /// A request that has a name already begins on the whole disk, as in [`Registers::begin`].
    ///
    /// # Panics
    /// When the name is older than one that is known here.
    pub fn begin_as(&mut self, id: OpId, effect: Effect) {
        assert!(id.0 >= self.next, "names get greater");
        self.next = id.0;
        self.begin(effect, 0..self.registers.len());
    }

    /// The grains of an open request.
    #[must_use]
    pub fn grains_of(&self, id: OpId) -> Option<Range<usize>> {
        let open = self.open.iter().find(|open| open.id == id)?;
        Some(open.grains.clone())
    }

    /// Number of open requests.
    #[must_use]
    pub fn open(&self) -> usize {
        self.open.len()
    }

    fn close(&mut self, id: OpId) -> Open {
        let at = self
            .open
            .iter()
            .position(|open| open.id == id)
            .expect("the request is open");
        self.open.swap_remove(at)
    }
}

impl Register {
    fn busy(&mut self) -> &mut Busy {
        self.busy.get_or_insert_with(|| Box::new(Busy::new(self.value)))
    }

    /// Back to a plain value when nothing is open or lingers.
    fn settle(&mut self) {
        if let Some([only]) = self
            .busy
            .as_ref()
            .filter(|busy| busy.ops.is_empty())
            .map(|busy| &*busy.possible)
        {
            self.value = only.value;
            self.busy = None;
        }
    }
}

/// More possibilities than this are not followed.
const TOO_MANY: usize = 512;

/// A request that is open on a grain, or failed and may take effect yet.
#[derive(Clone, Debug)]
struct Op {
    id: OpId,
    effect: Effect,
    /// A bit of [`Possibility::done`] and a place in [`Possibility::seen`]; unique among the ops of a grain.
    slot: u32,
    /// It need not take effect: a discard, or a failed write.
    optional: bool,
}

/// One way in which things may have gone.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Possibility {
    value: Value,
    /// The open writes that have taken effect, by slot.
    done: u64,
    /// For each open read the values that it may have seen, by slot, sorted.
    seen: Vec<(u32, Vec<Value>)>,
}

/// A grain with overlapping requests. No possibilities at all = given up.
#[derive(Clone, Debug)]
struct Busy {
    ops: Vec<Op>,
    possible: Vec<Possibility>,
}

impl Busy {
    fn new(value: Value) -> Busy {
        Busy {
            ops: Vec::new(),
            possible: vec![Possibility {
                value,
                done: 0,
                seen: Vec::new(),
            }],
        }
    }

    /// Adds a request; nothing if it is known already.
    fn begin(&mut self, id: OpId, effect: Effect) {
        if self.possible.is_empty() || self.ops.iter().any(|op| op.id == id) {
            return;
        }
        let used = self.ops.iter().fold(0_u64, |used, op| used | 1 << op.slot);
        let slot = used.trailing_ones();
        if slot == u64::BITS {
            self.give_up();
            return;
        }
        self.ops.push(Op {
            id,
            effect,
            slot,
            optional: effect == Effect::Discard,
        });
        if effect == Effect::Read {
            for possibility in &mut self.possible {
                possibility.seen.push((slot, vec![possibility.value]));
            }
        }
    }

    fn shift(&mut self, values: &[Value], only: bool) {
        let mut next = Vec::with_capacity(self.possible.len() * 2);
        for possibility in std::mem::take(&mut self.possible) {
            if possibility.done != 0 {
                next.push(possibility);
                continue;
            }
            next.extend(values.iter().map(|value| possibility.showing(*value)));
            if !only {
                next.push(possibility);
            }
        }
        self.possible = next;
        self.prune();
        if self.possible.len() > TOO_MANY {
            self.give_up();
        }
    }

    fn give_up(&mut self) {
        self.ops.clear();
        self.possible.clear();
    }

    fn remove(&mut self, id: OpId) -> Option<Op> {
        let at = self.ops.iter().position(|op| op.id == id)?;
        Some(self.ops.swap_remove(at))
    }

    /// A request ends well (for a read: unobserved).
    fn end(&mut self, id: OpId) {
        let Some(op) = self.ops.iter().find(|op| op.id == id).cloned() else {
            return;
        };
        let bit = 1 << op.slot;
        let ended = match op.effect {
            Effect::Write(_) => self.develop(|possibility| possibility.done & bit != 0),
            // Both ways are open: it has taken effect, or it never will.
            Effect::Discard => {
                let mut both = self.possible.clone();
                self.develop(|possibility| possibility.done & bit != 0)
                    .map(|done| {
                        both.extend(done);
                        both
                    })
            }
            Effect::Read => Some(self.possible.clone()),
        };
        self.conclude(&op, ended);
    }

    /// A request ends badly: a write may take effect later, a read has seen nothing.
    fn fail(&mut self, id: OpId) {
        match self.ops.iter_mut().find(|op| op.id == id) {
            Some(op) if op.effect != Effect::Read => {
                op.optional = true;
                self.prune();
            }
            _ => self.end(id),
        }
    }

    /// A read ends. If it could not have seen this value: those that it could.
    fn end_read(&mut self, id: OpId, saw: Value) -> Result<(), Vec<Value>> {
        let Some(op) = self.ops.iter().find(|op| op.id == id).cloned() else {
            return Ok(());
        };
        let explained = self.develop(|possibility| possibility.has_seen(op.slot, saw));
        if explained.as_ref().is_some_and(Vec::is_empty) {
            let allowed = self.allowed(id);
            let unread = self.possible.clone();
            self.conclude(&op, Some(unread));
            return Err(allowed);
        }
        self.conclude(&op, explained);
        Ok(())
    }

    /// Everything that an open read may see if it ends now, sorted: what it may have seen so far, and what any open
    /// write would store, since that may take effect this moment.
    fn allowed(&self, id: OpId) -> Vec<Value> {
        let Some(read) = self.ops.iter().find(|op| op.id == id) else {
            return Vec::new();
        };
        let mut all = Vec::new();
        for possibility in &self.possible {
            all.extend(
                possibility
                    .seen
                    .iter()
                    .filter(|(slot, _)| *slot == read.slot)
                    .flat_map(|(_, values)| values),
            );
            let undone = self
                .ops
                .iter()
                .filter(|op| possibility.done & (1 << op.slot) == 0);
            all.extend(undone.filter_map(|op| op.effect.stores()));
        }
        all.sort_unstable();
        all.dedup();
        all
    }

    /// Replaces the possibilities by those in which `op` has ended. None = too many: give up.
    fn conclude(&mut self, op: &Op, ended: Option<Vec<Possibility>>) {
        let Some(mut ended) = ended else {
            self.give_up();
            return;
        };
        assert!(!ended.is_empty(), "a write can always take effect");
        self.remove(op.id);
        for possibility in &mut ended {
            possibility.done &= !(1 << op.slot);
            possibility.seen.retain(|(slot, _)| *slot != op.slot);
        }
        self.possible = ended;
        self.prune();
    }

    /// The possibilities in which `enough` holds, each developed no further than that: open writes take effect one
    /// after the other, in every order. None if they are too many.
    fn develop(&self, enough: impl Fn(&Possibility) -> bool) -> Option<Vec<Possibility>> {
        let mut found = Vec::new();
        let mut reached = self.possible.clone();
        let mut next = 0;
        while next < reached.len() {
            if reached.len() > TOO_MANY {
                return None;
            }
            let possibility = reached[next].clone();
            next += 1;
            if enough(&possibility) {
                found.push(possibility);
                continue;
            }
            for op in &self.ops {
                if let Some(value) = op
                    .effect
                    .stores()
                    .filter(|_| possibility.done & (1 << op.slot) == 0)
                {
                    let then = possibility.after(op.slot, value);
                    if !reached.contains(&then) {
                        reached.push(then);
                    }
                }
            }
        }
        Some(found)
    }

    /// Drops possibilities that another one covers: same value, at least as much seen, and whatever it has not done
    /// more it need not do.
    fn prune(&mut self) {
        let optional = self
            .ops
            .iter()
            .filter(|op| op.optional)
            .fold(0_u64, |bits, op| bits | 1 << op.slot);
        let mut kept: Vec<Possibility> = Vec::with_capacity(self.possible.len());
        for possibility in std::mem::take(&mut self.possible) {
            if !kept.iter().any(|other| other.covers(&possibility, optional)) {
                kept.retain(|other| !possibility.covers(other, optional));
                kept.push(possibility);
            }
        }
        self.possible = kept;
    }
}

impl Possibility {
    fn has_seen(&self, slot: u32, value: Value) -> bool {
        self.seen
            .iter()
            .any(|(s, values)| *s == slot && values.contains(&value))
    }

    /// The write in this slot takes effect.
    fn after(&self, slot: u32, value: Value) -> Possibility {
        let mut next = self.showing(value);
        next.done |= 1 << slot;
        next
    }

    /// The content becomes this value.
    fn showing(&self, value: Value) -> Possibility {
        let mut next = Possibility {
            value,
            done: self.done,
            seen: self.seen.clone(),
        };
        for (_, values) in &mut next.seen {
            if let Err(at) = values.binary_search(&value) {
                values.insert(at, value);
            }
        }
        next
    }

    fn covers(&self, other: &Possibility, optional: u64) -> bool {
        self.value == other.value
            && self.done & !other.done == 0
            && other.done & !self.done & !optional == 0
            && other
                .seen
                .iter()
                .all(|(slot, values)| values.iter().all(|value| self.has_seen(*slot, *value)))
    }
}

#[cfg(test)]
#[path = "register_tests.rs"]
mod tests;
