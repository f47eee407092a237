//! Tasks: who copies which clusters now, and the copying of one stretch.
//!
//! Rules: to take a stretch and to unmark it is one step, to end a task and to mark again what failed is one as well. With
//! `discard_source` what was copied is discarded before the task ends (QEMU: after): a guest's write that waits for the task
//! must not be discarded.

use std::sync::Arc;

use super::{BlockCopy, Failure, LARGEST_TASK, MEMORY, Offload, SPARE_BUFFERS, attached, ends_within};
use crate::Layer;
use crate::error::Errno;
use crate::event::Event;
use crate::io::copy_range::CopyTarget;
use crate::io::size;
use crate::types::{ReqFlags, StatusFlags};

/// A stretch that is being copied, in whole clusters.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Task {
    pub(super) id: u64,
    pub(super) start: u64,
    /// May lie past the end of the source, in its last cluster.
    pub(super) end: u64,
}

impl Task {
    pub(super) fn bytes(self) -> u64 {
        self.end - self.start
    }
}

/// What the source says of the start of a stretch.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kind {
    pub(super) end: u64,
    pub(super) zero: bool,
    pub(super) allocated: bool,
}

impl BlockCopy {
    /// Takes the first marked stretch of `[start, end)`, no longer than `longest`.
    pub(super) fn take(&self, start: u64, end: u64, longest: u64) -> Option<Task> {
        let (start, end) = self.dirty.next_marked(start, end, longest)?;
        assert!(!self.is_taken(start, end), "what a task has is not marked");
        self.dirty.unmark(start, end);
        let task = Task {
            id: self.next_task.replace(self.next_task.get() + 1),
            start,
            end,
        };
        self.in_flight.set(self.in_flight.get() + task.bytes());
        self.tasks.borrow_mut().push(task);
        Some(task)
    }

    /// Whether some task is at work in `[start, end)`.
    pub(super) fn is_taken(&self, start: u64, end: u64) -> bool {
        self.tasks
            .borrow()
            .iter()
            .any(|task| task.start < end && start < task.end)
    }

    /// The task gives back what lies past `end`.
    pub(super) fn shrink(&self, task: &mut Task, end: u64) {
        if end >= task.end {
            return;
        }
        assert!(end > task.start, "a task keeps something");
        self.dirty.mark(end, task.end);
        self.in_flight.set(self.in_flight.get() - (task.end - end));
        task.end = end;
        for other in self.tasks.borrow_mut().iter_mut().filter(|t| t.id == task.id) {
            *other = *task;
        }
        self.changed.wake_all();
    }

    /// The task is over; `mark`: its clusters are to be copied again.
    pub(super) fn end(&self, task: Task, mark: bool) {
        if mark {
            self.dirty.mark(task.start, task.end);
        }
        self.in_flight.set(self.in_flight.get() - task.bytes());
        self.tasks.borrow_mut().retain(|t| t.id != task.id);
        self.tell_remaining();
        self.changed.wake_all();
    }

    /// What a task is about to copy. Without an answer, and for less than a cluster, it is one cluster of data.
    pub(super) async fn kind(&self, layer: &Layer, task: Task) -> Kind {
        let source = attached(layer, self.source).id;
        let base = if self.skip_unallocated.get() {
            layer.backing_chain_next(self.layer_asked(layer))
        } else {
            None
        };
        let length = self.reach();
        let bytes = task.end.min(length).saturating_sub(task.start);
        let status = layer.block_status_above(source, base, task.start, bytes).await;
        let one = Kind {
            end: task.start + self.cluster,
            zero: false,
            allocated: true,
        };
        match status {
            Ok(status) if status.pnum >= self.cluster => {
                let to = task.start + status.pnum;
                Kind {
                    end: if to >= length {
                        self.round_up(to)
                    } else {
                        to - to % self.cluster
                    },
                    zero: status.flags.contains(StatusFlags::ZERO),
                    allocated: status.is_allocated(),
                }
            }
            _ => one,
        }
    }

    /// Waits until so much memory is free, and takes it.
    pub(super) async fn reserve(&self, bytes: u64) {
        loop {
            let changed = self.changed.listen();
            let used = self.memory.get() + bytes;
            if used <= MEMORY {
                self.memory.set(used);
                return;
            }
            changed.await;
        }
    }

    pub(super) fn release(&self, bytes: u64) {
        self.memory.set(self.memory.get() - bytes);
        self.changed.wake_all();
    }

    /// Copies one stretch to its end; memory for it is reserved.
    pub(super) async fn copy(
        &self,
        layer: &Layer,
        task: Task,
        zero: bool,
        background: bool,
    ) -> Result<(), Failure> {
        let _read = layer.graph_read().await;
        let filter = self.filter;
        layer.emit(|| Event::CopyBegin {
            filter,
            task: task.id,
            offset: task.start,
            bytes: task.bytes(),
            zero,
            background,
        });
        let result = self.transfer(layer, task, zero).await;
        if result.is_ok() && self.discard_source {
            let bytes = task.end.min(self.reach()).saturating_sub(task.start);
            // What cannot be discarded stays.
            let _ = layer.discard(self.source, task.start, bytes).await;
        }
        self.release(task.bytes());
        layer.emit(|| Event::CopyEnd {
            filter,
            task: task.id,
            result: result.map_err(|failure: Failure| failure.errno),
        });
        if result.is_ok()
            && let Some(watcher) = &*self.watcher.borrow()
        {
            watcher.copied(task.bytes());
        }
        self.end(task, result.is_err());
        result
    }

    async fn transfer(&self, layer: &Layer, task: Task, zero: bool) -> Result<(), Failure> {
        let failed = |read: bool| move |errno: Errno| Failure { errno, read };
        let end = task.end.min(self.reach());
        let (at, bytes) = (task.start, end.saturating_sub(task.start));
        // Lengths may have changed since the task was taken, by commands or behind our back.
        ends_within(layer, self.source, end).map_err(failed(true))?;
        ends_within(layer, self.target, end).map_err(failed(false))?;
        if zero {
            let flags = self.write_flags.get() - ReqFlags::WRITE_COMPRESSED;
            let zeroed = layer.write_zeroes(self.target, at, bytes, flags);
            return zeroed.await.map_err(failed(false));
        }
        if self.offload.get() != Offload::Off {
            let to = CopyTarget {
                edge: self.target,
                offset: at,
                flags: self.write_flags.get(),
            };
            let result = layer.copy_range(self.source, at, bytes, to).await;
            let filter = self.filter;
            layer.emit(|| Event::CopyOffloaded {
                filter,
                task: task.id,
                result,
            });
            match result {
                Ok(()) => {
                    if self.offload.get() == Offload::Untried {
                        self.offload.set(Offload::Works);
                    }
                    return Ok(());
                }
                // Whatever it was: reading and writing meets it again if it matters, and says on which side.
                Err(_) => self.offload.set(Offload::Off),
            }
        }
        let mut data = self.take_buffer(size(bytes));
        let read = layer.read(self.source, at, &mut data, ReqFlags::empty()).await;
        let data = Arc::new(data);
        let copied = match read {
            Ok(()) => {
                layer.env().lend(&data);
                let written = layer.write(self.target, at, &data, self.write_flags.get());
                written.await.map_err(failed(false))
            }
            Err(errno) => Err(failed(true)(errno)),
        };
        self.give_buffer(Arc::try_unwrap(data).expect("whoever helped has given it back"));
        copied
    }

    /// A buffer for a read that fills it: what it holds is of no account.
    fn take_buffer(&self, bytes: usize) -> Vec<u8> {
        let mut buffer = self.spare.borrow_mut().pop().unwrap_or_default();
        buffer.resize(bytes, 0);
        buffer
    }

    fn give_buffer(&self, buffer: Vec<u8>) {
        let mut spare = self.spare.borrow_mut();
        if spare.len() < SPARE_BUFFERS && buffer.capacity() <= size(LARGEST_TASK) {
            spare.push(buffer);
        }
    }
}
