//! One call: copies what is marked in a range, and waits for what others are copying there.
//!
//! Rules: a guest's call goes on until its range is done or a task of its own fails; failures of others give it their work.
//! A background call gives way to everybody else between its tasks, starts none any more when it is told to stop or to slow
//! down, and never returns with something of its own in flight.

use std::ops::Range;

use super::pool::Pool;
use super::task::Task;
use super::{BlockCopy, Failure};
use crate::Layer;
use crate::env::Nanos;
use crate::event::Event;
use crate::sync::turn;

/// What to copy, and how.
pub(crate) struct Call<'a> {
    /// Starts with a cluster; ends with one, or past the end of the source.
    pub(crate) range: Range<u64>,
    /// Most tasks at a time.
    pub(crate) workers: usize,
    /// Longest task, bytes; 0: no limit.
    pub(crate) max_chunk: u64,
    /// For a job: obeys the rate limit and lets others run.
    pub(crate) background: bool,
    /// Whether another task may be started.
    pub(crate) go_on: &'a dyn Fn() -> bool,
}

/// How a call ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Outcome {
    /// Nothing in the range is marked or under way.
    Done,
    /// It was told to stop.
    Stopped,
    /// It should wait as long as its watcher says.
    Throttled,
    /// A task of its own failed.
    Failed(Failure),
}

/// How one walk over the range ended.
enum Walk {
    /// Something was there to do.
    Found,
    Nothing,
    Over(Outcome),
}

/// What became of a task.
struct Started {
    /// Where the walk goes on.
    end: u64,
    /// It copies data, not zeroes or nothing.
    data: bool,
    /// The call is over.
    over: Option<Outcome>,
}

impl BlockCopy {
    /// Runs a call to its end. A guest's request holds off graph changes meanwhile.
    pub(crate) async fn run(&self, layer: &Layer, call: &Call<'_>) -> Outcome {
        let Range { start, end } = call.range;
        loop {
            match self.walk(layer, call).await {
                Walk::Found => continue,
                Walk::Over(outcome) => return outcome,
                Walk::Nothing => {}
            }
            if !(call.go_on)() {
                return Outcome::Stopped;
            }
            let changed = self.changed.listen();
            if self.is_taken(start, end) {
                if !call.background {
                    let (filter, bytes) = (self.filter, end - start);
                    layer.emit(|| Event::CopyWaits {
                        filter,
                        offset: start,
                        bytes,
                    });
                }
                changed.await;
            } else if self.dirty.next_marked(start, end, u64::MAX).is_none() {
                return Outcome::Done;
            }
        }
    }

    async fn walk(&self, layer: &Layer, call: &Call<'_>) -> Walk {
        let mut pool = Pool::new(call.workers);
        let mut found = false;
        let mut over = None;
        let mut at = call.range.start;
        let mut grown = 0;
        while over.is_none() && pool.failure().is_none() {
            if !(call.go_on)() {
                over = Some(Outcome::Stopped);
                break;
            }
            let longest = self.longest_task(call.max_chunk);
            let most = longest.max(grown);
            let Some(task) = self.take(at, call.range.end, most) else {
                break;
            };
            found = true;
            let started = self.start(layer, call, task, &mut pool, longest).await;
            at = started.end;
            over = started.over;
            // Where there is nothing to copy there often is more of it, and it costs a look at the tables only.
            grown = if started.data {
                0
            } else {
                self.longer_task(most, call.max_chunk)
            };
            if call.background && over.is_none() {
                pool.beside(turn()).await;
            }
        }
        pool.drain().await;
        assert!(pool.is_empty(), "a call ends with nothing in flight");
        match (pool.failure(), over) {
            (Some(failure), _) => Walk::Over(Outcome::Failed(failure)),
            (None, Some(outcome)) => Walk::Over(outcome),
            (None, None) if found => Walk::Found,
            (None, None) => Walk::Nothing,
        }
    }

    /// Decides about a task and sends it off; with data in it, it becomes no longer than `longest`.
    async fn start<'a>(
        &'a self,
        layer: &'a Layer,
        call: &Call<'_>,
        mut task: Task,
        pool: &mut Pool<'a>,
        longest: u64,
    ) -> Started {
        let kind = pool
            .beside(async {
                let _read = layer.graph_read().await;
                self.kind(layer, task).await
            })
            .await;
        let skipped = self.skip_unallocated.get() && !kind.allocated;
        let data = !kind.zero && !skipped;
        let end = if data {
            kind.end.min(task.start + longest)
        } else {
            kind.end
        };
        self.shrink(&mut task, end);
        let started = |over| Started {
            end: task.end,
            data,
            over,
        };
        if skipped {
            self.end(task, false);
            self.forget(layer, task.start..task.end);
            return started(None);
        }
        if call.background && self.charge(0) > 0 {
            self.end(task, true);
            return started(Some(Outcome::Throttled));
        }
        self.charge(task.bytes());
        pool.beside(self.reserve(task.bytes())).await;
        pool.room().await;
        if pool.failure().is_some() {
            // Whoever fails does not begin anything new.
            self.release(task.bytes());
            self.end(task, true);
            return started(None);
        }
        pool.push(Box::pin(self.copy(layer, task, kind.zero, call.background)));
        started(None)
    }

    fn charge(&self, bytes: u64) -> Nanos {
        let watcher = self.watcher.borrow();
        watcher.as_ref().map_or(0, |watcher| watcher.charge(bytes))
    }
}

impl From<Failure> for Outcome {
    fn from(failure: Failure) -> Outcome {
        Outcome::Failed(failure)
    }
}
