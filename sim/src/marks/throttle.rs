//! Situations around throttle groups: who waits, beside what, and what lets it go.

use std::rc::Rc;

use blkcheck_impl::event::Event;
use blkcheck_impl::jobs::JobStatus;
use blkcheck_impl::types::NodeId;
use serde_json::{Map, Value};

use super::{Detector, Mark};

/// Requests that wait, by filter and group.
#[derive(Debug, Default)]
pub(super) struct Throttled {
    waiting: Vec<(NodeId, Rc<str>)>,
    /// The same when the reopen under way began.
    before: Vec<(NodeId, Rc<str>)>,
}

impl Detector {
    /// Follows an event for throttle groups.
    pub(super) fn throttle(&mut self, event: &Event) {
        match event {
            Event::ThrottleQueued { node, group } => {
                self.hit(Mark::ThrottleQueues);
                let waiting = &self.throttled.waiting;
                if waiting.iter().any(|(other, its)| other != node && its == group) {
                    self.hit(Mark::ThrottleShared);
                }
                if self.jobs.iter().any(|job| job.status == JobStatus::Running) {
                    self.hit(Mark::ThrottleBesideJob);
                }
                self.throttled.waiting.push((*node, Rc::clone(group)));
            }
            Event::ThrottleResumed { node, drained } => {
                let waiting = &mut self.throttled.waiting;
                if let Some(at) = waiting.iter().position(|(filter, _)| filter == node) {
                    waiting.remove(at);
                }
                if *drained {
                    self.hit(Mark::ThrottleDrained);
                }
            }
            Event::MainBegin { what } => {
                self.throttled.before.clear();
                if *what == "blockdev-reopen" {
                    self.throttled.before.clone_from(&self.throttled.waiting);
                }
            }
            _ => {}
        }
    }

    /// A reopen succeeded.
    pub(super) fn regrouped(&mut self, arguments: &Map<String, Value>) {
        let list = arguments.get("options").and_then(Value::as_array);
        let moved = list.into_iter().flatten().any(|options| {
            let text = |key: &str| options.get(key).and_then(Value::as_str);
            let node = text("node-name").and_then(|name| self.mirror.by_name(name));
            let before = self.throttled.before.iter();
            let mut own = before.filter(|(filter, _)| Some(*filter) == node);
            own.any(|(_, group)| text("throttle-group").is_some_and(|new| new != &**group))
        });
        if moved {
            self.hit(Mark::ThrottleRegrouped);
        }
    }
}
