//! Dirty bitmaps hold what they must: a bitmap is never smaller than what requests that ended well changed on its node
//! since it was added, cleared or enabled; at rest it is no larger either. Flags are as the model says.
//!
//! How: the layer tells when a request ends, which is when it has marked; the model's bitmaps are marked then, node by node,
//! and commands on bitmaps do with them in the model what they should. Looked at with a command's answer (nothing is
//! missing: the layer may be ahead of what it has told) and when everything is at rest (nothing more).
//! A closed image holds what the model says that it holds. What a backup owes its bitmap: `bitmap_owed.rs`.
//! From outside no requests are told: guests' own mark, on the node that they are for and what it passes them on to, unless something
//! else of the main context came in between; only closed images are looked at.
//! After a power cut: `bitmap_left.rs`.
//! Not judged: what requests left that failed, or that ended while a command on bitmaps was under way (a transaction drains
//! first); what a closed image stores once storage failed; where qcow2 writes in its file; zeroing of less than whole blocks of the storage,
//! which may or may not be padded to them.

use std::collections::BTreeMap;
use std::ops::Range;

use blkcheck_impl::Layer;
use blkcheck_impl::event::{Event, ReqKind};
use blkcheck_impl::graph::inspect::BitmapView;
use blkcheck_impl::types::{NodeId, RequestId};
use blkcheck_model::job::Backup;
use blkcheck_model::{Bitmap, World};

use owed::Owed;

use super::mirror::Mirror;
use super::{OracleName, Violation, violation};
use crate::follow::{Follower, Marked};
use crate::history::{Outcome, StepId};
use crate::image::bitmaps::Stored;
use crate::scenario::{GuestOp, Scenario};

/// A request that marks bitmaps when it ends.
#[derive(Debug)]
struct Marking {
    node: NodeId,
    kind: ReqKind,
    bytes: Range<u64>,
}

/// A guest's request, where nothing else is told.
#[derive(Debug)]
struct Flying {
    step: StepId,
    op: GuestOp,
    /// What it is for.
    node: blkcheck_model::NodeId,
    /// Operations of the main context before it.
    operations: u64,
}

/// Follows requests for the model's bitmaps.
#[derive(Debug, Default)]
pub(super) struct Bitmaps {
    flying: Vec<Flying>,
    /// Operations of the main context: they have begun, and are over.
    operations: (u64, u64),
    requests: BTreeMap<RequestId, Marking>,
    /// What requests to the storage are aligned to, bytes.
    alignment: u64,
    /// A command on bitmaps is under way.
    command: bool,
    /// Storage failed: maybe as something was stored.
    lost: bool,
    owed: Owed,
}

impl Bitmaps {
    pub(super) fn reset(&mut self, scenario: &Scenario) {
        *self = Bitmaps {
            alignment: u64::from(scenario.disk.alignment),
            ..Bitmaps::default()
        };
    }

    /// Storage failed.
    pub(super) fn fault(&mut self) {
        self.lost = true;
    }

    /// A backup begins.
    pub(super) fn backup_begins(
        &mut self,
        filter: NodeId,
        job: &std::rc::Rc<str>,
        source: &std::rc::Rc<str>,
        backup: &Backup,
    ) {
        self.owed.begins(filter, job, source, backup);
    }

    /// A job is over.
    pub(super) fn job_ended(&mut self, job: &str, well: bool) {
        self.owed.ends(job, well);
    }

    /// Marks what the event says.
    pub(super) fn event(&mut self, follower: &mut Follower, mirror: &Mirror, event: &Event) {
        self.owed.event(event);
        match event {
            Event::RequestBegin {
                request,
                node,
                kind: kind @ (ReqKind::Write | ReqKind::WriteZeroes | ReqKind::Discard),
                offset,
                bytes,
                ..
            } => {
                let marking = Marking {
                    node: *node,
                    kind: *kind,
                    bytes: *offset..offset + bytes,
                };
                self.requests.insert(*request, marking);
            }
            Event::RequestEnd { request, result, .. } => {
                if let Some(marking) = self.requests.remove(request)
                    && let Some(id) = follower.world.graph.find(mirror.name(marking.node))
                    && !follower.world.graph.node(id).bitmaps.is_empty()
                {
                    let padded = self.may_be_padded(&follower.world, id, &marking);
                    let sure = result.is_ok() && !self.command && !padded;
                    let what = if sure {
                        Marked::Requested(id)
                    } else {
                        Marked::Unsure(id)
                    };
                    follower.marked(what, marking.bytes);
                }
            }
            Event::MainBegin { what } => {
                self.operations.0 += 1;
                self.command = matches!(*what, "transaction" | "blockdev-backup")
                    || what.starts_with("block-dirty-bitmap-");
            }
            Event::MainEnd { .. } => {
                self.operations.1 = self.operations.0;
                self.command = false;
            }
            _ => {}
        }
    }

    /// Outside: a guest asks for something.
    pub(super) fn guest_asks(&mut self, world: &World, step: StepId, export: &str, op: GuestOp) {
        let mut exports = world.exports.iter();
        let Some(export) = exports.find(|e| &*e.name == export || &*e.id == export) else {
            return;
        };
        self.flying.push(Flying {
            step,
            op,
            node: world.graph.edge(export.root).child,
            operations: self.operations.1,
        });
    }

    /// Outside: it was answered; what it has marked, and where.
    pub(super) fn guest_ended(&mut self, step: StepId, outcome: &Outcome) -> Option<(Marked, Range<u64>)> {
        let at = self.flying.iter().position(|f| f.step == step)?;
        let flying = self.flying.swap_remove(at);
        let (range, discard) = match flying.op {
            GuestOp::Write(r)
            | GuestOp::WriteFua(r)
            | GuestOp::WriteZeroes(r)
            | GuestOp::WriteZeroesUnmap(r) => (r, false),
            GuestOp::Discard(r) => (r, true),
            GuestOp::Read(_) | GuestOp::BlockStatus(_) | GuestOp::Flush => return None,
        };
        let bytes = range.offset..range.offset + range.length;
        let what = match outcome {
            // What it was for may have moved while something else was done.
            _ if flying.operations != self.operations.0 => Marked::Perhaps,
            Outcome::Done(Ok(())) if discard => Marked::Discarded(flying.node),
            Outcome::Done(Ok(())) => Marked::Written(flying.node),
            _ => Marked::Perhaps,
        };
        Some((what, bytes))
    }

    /// The request is under way, and marks bitmaps when it ends.
    pub(super) fn watches(&self, request: RequestId) -> bool {
        self.requests.contains_key(&request)
    }

    fn may_be_padded(&self, world: &World, node: blkcheck_model::NodeId, marking: &Marking) -> bool {
        let bytes = &marking.bytes;
        let whole = bytes.start.is_multiple_of(self.alignment) && bytes.end.is_multiple_of(self.alignment);
        marking.kind == ReqKind::WriteZeroes && !whole && world.graph.node(node).driver.is_protocol()
    }

    /// Holds the layer's bitmaps against the model's. `rest`: everything is at rest.
    pub(super) fn judge(&mut self, world: &World, layer: &Layer, rest: bool) -> Result<(), Violation> {
        self.judge_owed(layer)?;
        if world.graph.nodes().all(|(_, node)| node.bitmaps.is_empty()) {
            return Ok(());
        }
        let seen = layer.inspect_bitmaps();
        for (_, node) in world.graph.nodes() {
            let theirs = seen.iter().find(|(name, _)| *name == node.name);
            let theirs = theirs.map_or(&[][..], |(_, bitmaps)| bitmaps);
            let wrong = |name: &str, what: String| {
                let message = format!("bitmap '{name}' of node '{}' {what}", node.name);
                Err(violation(OracleName::Bitmap, None, message, Vec::new()))
            };
            for ours in &node.bitmaps {
                let Some(found) = theirs.iter().find(|b| b.name == ours.name) else {
                    return wrong(&ours.name, "is gone".to_owned());
                };
                if let Some(what) = difference(ours, found, rest) {
                    return wrong(&ours.name, what);
                }
            }
            if let Some(more) = theirs
                .iter()
                .find(|b| !b.name.is_empty() && node.bitmaps.iter().all(|a| a.name != b.name))
            {
                // Those without a name belong to filters and jobs.
                return wrong(&more.name, "ought not to be there".to_owned());
            }
        }
        Ok(())
    }

    fn judge_owed(&mut self, layer: &Layer) -> Result<(), Violation> {
        if self.owed.is_even() {
            return Ok(());
        }
        let seen = layer.inspect_bitmaps();
        let missing = self.owed.missing(|node, bitmap| {
            let (_, bitmaps) = seen.iter().find(|(name, _)| **name == *node)?;
            bitmaps.iter().find(|b| *b.name == *bitmap)
        });
        let Some((node, bitmap, at)) = missing else {
            return Ok(());
        };
        let message = format!(
            "bitmap '{bitmap}' of node '{node}' lacks a mark at {at:#x}, which the backup that used it did not copy"
        );
        Err(violation(OracleName::Bitmap, None, message, Vec::new()))
    }

    /// Holds what a closed image stores against the model.
    pub(super) fn stored(&self, world: &World, file: &str, found: &[Stored]) -> Result<(), Violation> {
        let mut world = world.clone();
        world.close_all();
        let header = world.files.get(file).and_then(|facts| facts.qcow2.as_ref());
        let Some(header) = header.filter(|_| !self.lost) else {
            return Ok(());
        };
        let wrong = |name: &str, what: &str| {
            let message = format!("bitmap '{name}' in the closed image '{file}' {what}");
            Err(violation(OracleName::Bitmap, None, message, Vec::new()))
        };
        for ours in &header.bitmaps {
            let Some(theirs) = found.iter().find(|b| *b.name == *ours.name) else {
                return wrong(&ours.name, "is missing");
            };
            if (theirs.granularity, theirs.auto, theirs.in_use) != (ours.granularity, ours.auto, ours.in_use)
            {
                return wrong(&ours.name, &format!("ought to be {ours:?}, is {theirs:?}"));
            }
            let is_set = |bit: u64| is_set(theirs, bit);
            let known = ours.dirty.as_ref().filter(|_| !ours.in_use);
            if let Some(dirty) = known
                && let Some(bit) =
                    (0..theirs.bits.len() as u64 * 8).find(|bit| is_set(*bit) != dirty.contains(*bit))
            {
                let what = if is_set(bit) {
                    "has a mark too many"
                } else {
                    "lacks a mark"
                };
                return wrong(&ours.name, &format!("{what} at {:#x}", bit * ours.granularity));
            }
        }
        match found
            .iter()
            .find(|b| header.bitmaps.iter().all(|a| *a.name != *b.name))
        {
            Some(more) => wrong(&more.name, "ought not to be there"),
            None => Ok(()),
        }
    }
}

/// Whether an image stores this bit.
fn is_set(stored: &Stored, bit: u64) -> bool {
    let byte = usize::try_from(bit / 8).ok().and_then(|at| stored.bits.get(at));
    byte.is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
}

fn difference(ours: &Bitmap, theirs: &BitmapView, rest: bool) -> Option<String> {
    let flags = (
        ours.granularity,
        ours.enabled,
        ours.is_busy(),
        ours.persistent,
        ours.inconsistent,
    );
    let found = (
        theirs.granularity,
        theirs.enabled,
        theirs.busy,
        theirs.persistent,
        theirs.inconsistent,
    );
    if flags != found {
        return Some(format!(
            "has (granularity, recording, busy, persistent, inconsistent) {found:?}, expected {flags:?}"
        ));
    }
    let bits = ours.image()?;
    let bit = |bits: &[u8], at: usize| bits.get(at / 8).is_some_and(|byte| byte >> (at % 8) & 1 == 1);
    let all = 8 * bits.len().max(theirs.bits.len());
    let place = |at: usize| at as u64 * ours.granularity;
    if let Some(at) = (0..all).find(|at| bit(&bits, *at) && !bit(&theirs.bits, *at)) {
        return Some(format!(
            "lacks the mark of a request that ended, at {:#x}",
            place(at)
        ));
    }
    if rest && let Some(at) = (0..all).find(|at| !bit(&bits, *at) && bit(&theirs.bits, *at)) {
        return Some(format!("has a mark at {:#x} that no request made", place(at)));
    }
    None
}

#[path = "bitmap_left.rs"]
mod left;
#[path = "bitmap_owed.rs"]
mod owed;

#[cfg(test)]
mod tests {
    use std::rc::Rc;

    use super::*;

    fn ours() -> Bitmap {
        let mut bitmap = Bitmap::new(Rc::from("b"), 512, 4096);
        bitmap.mark(512..1024);
        bitmap
    }

    fn theirs(bits: u8) -> BitmapView {
        BitmapView {
            name: Rc::from("b"),
            granularity: 512,
            enabled: true,
            busy: false,
            persistent: false,
            inconsistent: false,
            bits: vec![bits, 0, 0, 0, 0, 0, 0, 0],
        }
    }

    #[test]
    fn a_missing_mark_is_told_at_once_and_one_too_many_at_rest() {
        assert_eq!(difference(&ours(), &theirs(2), true), None);
        let missing = difference(&ours(), &theirs(4), false).unwrap();
        assert!(
            missing.contains("lacks the mark") && missing.contains("0x200"),
            "{missing}"
        );
        assert_eq!(
            difference(&ours(), &theirs(6), false),
            None,
            "the layer may be ahead"
        );
        assert!(difference(&ours(), &theirs(6), true).unwrap().contains("0x400"));
        let mut disabled = theirs(2);
        disabled.enabled = false;
        assert!(difference(&ours(), &disabled, false).is_some());
    }
}
