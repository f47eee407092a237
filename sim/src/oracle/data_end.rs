//! The end of guest requests: writes take their place in the registers, reads and status queries are judged.

use blkcheck_model::register::{self, OpId, Value};

use super::grains::{collect, content_text, explain, history, is_tail, texts};
use super::sectors::per_grain;
use super::{Data, Disk, Open, OracleName, SECTOR, Unexplained, View, Violation, status, violation};
use crate::history::{Outcome, StepId};

impl Data {
    /// A guest request is over.
    pub(crate) fn ended(
        &mut self,
        view: &View<'_>,
        step: StepId,
        outcome: &Outcome,
    ) -> Result<(), Violation> {
        if let Some(at) = self.flushes.iter().position(|f| f.0 == step) {
            let (_, disk, begun) = self.flushes.swap_remove(at);
            if let (Some(d), Outcome::Done(Ok(()))) = (&mut self.disks[disk], outcome) {
                d.flushed = d.flushed.max(begun);
            }
            return Ok(());
        }
        self.outside.retain(|s| *s != step);
        self.looked(view, step, outcome)?;
        let Some(open) = self.open.get_mut(step.0 as usize).and_then(Option::take) else {
            return Ok(());
        };
        let ok = matches!(outcome, Outcome::Done(Ok(())));
        if let Some(logged) = open.logged {
            // Of two disks that it may have reached, the older one need not hold it.
            self.end_write(open.disk, open.op, logged, ok && open.other.is_none(), view.now);
            if let Some((other, logged)) = open.other.and_then(|o| Some((o, o.logged?))) {
                self.end_write(other.disk, other.op, logged, ok && other.shows, view.now);
            }
            return Ok(());
        }
        let unexplained = match open.other {
            None => self.end_read(view, step, open, outcome)?,
            Some(_) => self.end_read_of_two(view, step, open, outcome)?,
        };
        let Some((part, saw)) = unexplained.into_iter().next() else {
            return Ok(());
        };
        let is_status = matches!(outcome, Outcome::Status(_));
        let grain = self.grain;
        let disk = self.disks[open.disk].as_ref().expect("judged");
        let who = crate::oracle::liveness::act_text(view.scenario, step).unwrap_or_default();
        let g = part / per_grain(grain);
        let at = part as u64 * grain.min(SECTOR);
        let plain = if disk.target {
            OracleName::PointInTime
        } else {
            OracleName::Data
        };
        let (oracle, message) = match saw {
            Err(content) => (
                plain,
                format!(
                    "{who}: grain {at:#x} holds {}",
                    content_text(view.scenario, content)
                ),
            ),
            Ok(v) if is_status => (
                OracleName::Status,
                format!(
                    "{who}: block status says ZERO at {at:#x}, which holds {}",
                    texts(view.scenario, &v.allowed)
                ),
            ),
            Ok(v) => (
                plain,
                format!(
                    "{who}: grain {at:#x} {}",
                    explain(view.scenario, disk, &v, open.start)
                ),
            ),
        };
        Err(violation(
            oracle,
            Some(step),
            message,
            history(view.scenario, disk, g),
        ))
    }

    fn end_write(&mut self, disk: usize, op: OpId, logged: usize, ok: bool, now: u64) {
        if let Some(disk) = &mut self.disks[disk] {
            disk.registers.end(op, ok);
            if ok {
                disk.log[logged].end = now;
            }
        }
    }

    /// A read or a status query is over: the grains whose answer nothing explains on this disk.
    pub(super) fn end_read(
        &mut self,
        view: &View<'_>,
        step: StepId,
        open: Open,
        outcome: &Outcome,
    ) -> Result<Vec<Unexplained>, Violation> {
        let grain = self.grain;
        let Some(disk) = &self.disks[open.disk] else {
            return Ok(Vec::new());
        };
        self.values.clear();
        let (mut wrong, offset) = (None, open.first as u64 * grain);
        let parts = (open.last - open.first) * per_grain(grain);
        match outcome {
            _ if open.blind || disk.unknown => {}
            Outcome::Read(Ok(bytes)) => {
                wrong = collect(bytes, open.first, disk, grain, &mut self.values);
            }
            Outcome::Status(Ok(runs)) => {
                let (length, trusted) = open.status.expect("a status query");
                status::shape(view.scenario, step, length, runs)?;
                self.values.resize(parts, None);
                status::zeroes(
                    runs,
                    (offset, grain.min(SECTOR)),
                    trusted,
                    &disk.cuts,
                    &mut self.values,
                );
            }
            _ => {}
        }
        // A failed read says nothing; nor does a grain that was not returned.
        self.values.resize(parts, None);
        let mut unexplained: Vec<_> = wrong.into_iter().map(|(part, c)| (part, Err(c))).collect();
        self.judge_all(open, view.now, |part, v| unexplained.push((part, Ok(v))));
        Ok(unexplained)
    }

    /// The first part that nothing explains.
    pub(super) fn judge(&mut self, open: Open, now: u64) -> Option<(usize, register::Violation)> {
        let mut first = None;
        self.judge_all(open, now, |part, v| {
            first.get_or_insert((part, v));
        });
        first
    }

    /// Puts the collected values to the registers. On a loose grain a value of a lower layer passes as well, as long as
    /// the initial content would; while such a layer is being written to, it says nothing about later.
    fn judge_all(&mut self, open: Open, now: u64, mut unexplained: impl FnMut(usize, register::Violation)) {
        let (grain, per_grain) = (self.grain, per_grain(self.grain));
        let Data { disks, values, .. } = self;
        let (before, rest) = disks.split_at_mut(open.disk);
        let (disk, after) = rest.split_first_mut().expect("in range");
        let Disk {
            registers,
            initial,
            loose,
            chain,
            cuts,
            ..
        } = disk.as_mut().expect("open requests have a disk");
        let other = |c: usize| {
            let d = if c < open.disk {
                &before[c]
            } else {
                &after[c - open.disk - 1]
            };
            d.as_ref()
        };
        let changes_below = |g: usize| {
            let changes = |d: &Disk| d.log.iter().any(|l| l.covers(g) && l.end == u64::MAX);
            chain.iter().any(|c| other(*c).is_some_and(changes))
        };
        for (part, value) in (open.first * per_grain..).zip(values.iter_mut()) {
            let g = part / per_grain;
            if value.is_some() && loose[g] && changes_below(g) {
                *value = None;
            }
        }
        let lower = |g: usize, value: Value| {
            let holds = |c: &usize| {
                other(*c).is_some_and(|d| {
                    d.initial.get(g) == Some(&value)
                        || d.former.contains(&(g, value))
                        || d.log
                            .iter()
                            .any(|l| l.covers(g) && l.value == value && l.start <= now)
                })
            };
            chain.iter().any(holds)
        };
        registers.observe(open.op, values, |mut v| {
            let part = v.grain;
            v.grain = part / per_grain;
            // Nobody has written there on top of the layers below.
            let tail = is_tail(cuts, part, grain);
            let first = |value: &Value| *value == initial[v.grain] || tail && *value == 0;
            let open = v.allowed.iter().any(|a| first(a) || lower(v.grain, *a));
            let passes = is_streamed_away(v.saw) || lower(v.grain, v.saw) || tail && v.saw == 0;
            if !(loose[v.grain] && open && passes) {
                unexplained(part, v);
            }
        });
    }
}

/// A stamp of an image or step that a chain may have lost by a stream: its disk is not below any more, but its content
/// may have been copied. Which of its values cannot be told, so every guest stamp passes on a loose grain.
fn is_streamed_away(value: Value) -> bool {
    value >> 40 == 2
}
