//! Situations around backups: who copies what beside whom.

use blkcheck_impl::event::{Event, Parent, ReqKind};
use blkcheck_impl::types::NodeId;
use serde_json::{Map, Value};

use super::{Detector, Mark, Request};

/// A copy-before-write filter.
#[derive(Clone, Copy, Debug)]
struct Filter {
    filter: NodeId,
    source: NodeId,
    target: NodeId,
    /// A job put it there.
    of_job: bool,
}

/// What is being copied.
#[derive(Debug, Default)]
pub(super) struct Backups {
    filters: Vec<Filter>,
    /// Copies under way: filter and task.
    copies: Vec<(NodeId, u64)>,
    /// Targets of filters that are gone.
    filled: Vec<NodeId>,
    /// One of them was flushed since.
    flushed: bool,
}

impl Detector {
    /// Follows an event for backups.
    pub(super) fn backup(&mut self, event: &Event) {
        match *event {
            Event::CopyBeforeWrite {
                filter,
                source,
                target,
                ..
            } => self.backups.filters.push(Filter {
                filter,
                source,
                target,
                of_job: false,
            }),
            Event::FilterInserted { filter, .. } => {
                let filters = self.backups.filters.iter_mut();
                filters.for_each(|f| f.of_job |= f.filter == filter);
            }
            Event::NodeRemoved { node } => {
                let gone = self.backups.filters.extract_if(.., |f| f.filter == node);
                self.backups.filled.extend(gone.map(|f| f.target));
            }
            Event::CopyBegin {
                filter,
                task,
                background,
                ..
            } => {
                self.backups.copies.push((filter, task));
                if !background {
                    self.hit(Mark::WriteCopiesFirst);
                }
            }
            Event::CopyEnd { filter, task, result } => {
                self.backups.copies.retain(|copy| *copy != (filter, task));
                if result.is_err() {
                    self.hit(Mark::CopyFails);
                }
            }
            Event::CopyOffloaded { result, .. } => self.hit(if result.is_ok() {
                Mark::CopyOffloaded
            } else {
                Mark::OffloadFails
            }),
            Event::CopyWaits { .. } => self.hit(Mark::WriteMeetsBackup),
            Event::DrainBegin { .. } if !self.backups.copies.is_empty() => self.hit(Mark::DrainDuringCopy),
            _ => {}
        }
    }

    /// A flush ended well.
    pub(super) fn flushed(&mut self, node: NodeId) {
        self.backups.flushed |= self.backups.filled.contains(&node);
    }

    /// The power failed.
    pub(super) fn power_failed_beside_backup(&mut self) {
        if self.backups.filters.iter().any(|f| f.of_job) {
            self.hit(Mark::PowerFailsUnderBackup);
        }
        if self.backups.flushed {
            self.hit(Mark::PowerFailsAfterFlush);
        }
    }

    /// A request begins: somebody looks at what a filter keeps while its source is being written.
    pub(super) fn looks_at_copy(&mut self, request: &Request, parent: Option<Parent>) {
        if request.kind != ReqKind::Read || !matches!(parent, Some(Parent::Backend(_))) {
            return;
        }
        let snapshot = self
            .mirror
            .node(request.node)
            .is_some_and(|n| n.driver == "snapshot-access");
        let races = self.backups.filters.iter().any(|f| {
            let writes = |r: &Request| {
                matches!(r.kind, ReqKind::Write | ReqKind::WriteZeroes | ReqKind::Discard)
                    && [f.filter, f.source].contains(&r.node)
            };
            (snapshot || f.target == request.node) && self.requests.iter().any(writes)
        });
        if races {
            self.hit(Mark::FleecingRace);
        }
    }

    /// A command was accepted.
    pub(super) fn accepted_beside_backup(&mut self, execute: &str, arguments: &Map<String, Value>) {
        if execute.starts_with("block-dirty-bitmap-") && self.backups.filters.iter().any(|f| f.of_job) {
            self.hit(Mark::BitmapDuringBackup);
        }
        let grouped = arguments
            .get("properties")
            .and_then(|properties| properties.get("completion-mode"))
            .is_some_and(|mode| mode == "grouped");
        let several = arguments
            .get("actions")
            .and_then(Value::as_array)
            .is_some_and(|actions| actions.len() > 1);
        if execute == "transaction" && grouped && several {
            self.hit(Mark::GroupedBackups);
        }
    }
}
