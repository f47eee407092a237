//! A guest's write through the filter: first the copy, then the snapshot reads that still read the old data.
//!
//! Rules: what does not change what can be seen passes. The clusters of the request are copied, or waited for where others
//! copy them. A copy that takes longer than `cbw-timeout` counts as failed; it goes on by itself, counted as in flight on the
//! filter, and starts nothing new.

use std::cell::{Cell, RefCell};
use std::future::poll_fn;
use std::rc::Rc;
use std::task::Poll;

use super::{CopyBeforeWrite, OnError};
use crate::block_copy::{BlockCopy, Call, Outcome};
use crate::driver::Cx;
use crate::env::Nanos;
use crate::error::Errno;
use crate::event::Event;
use crate::io::tracked::InFlightGuard;
use crate::io::{align_down, align_up};
use crate::sync::WaitQueue;
use crate::types::ReqFlags;

/// Most tasks of one guest's write at a time.
const WORKERS: usize = 64;

/// A copy that runs beside the request that asked for it.
#[derive(Default)]
struct Beside {
    outcome: RefCell<Option<Outcome>>,
    ended: WaitQueue,
    cancelled: Cell<bool>,
}

impl CopyBeforeWrite {
    /// Keeps what a guest is about to overwrite.
    pub(super) async fn before_write(
        &self,
        cx: &Cx,
        offset: u64,
        bytes: u64,
        flags: ReqFlags,
    ) -> Result<(), Errno> {
        if flags.contains(ReqFlags::WRITE_UNCHANGED) || bytes == 0 || self.broken.get().is_some() {
            return Ok(());
        }
        let cluster = self.copy.cluster();
        let (start, end) = (align_down(offset, cluster), align_up(offset + bytes, cluster));
        let copied = match self.timeout {
            None => copied(copy(cx, &self.copy, (start, end), &|| true).await),
            Some(timeout) => self.copy_in_time(cx, (start, end), timeout).await,
        };
        match (copied, self.on_error) {
            (Ok(()), _) => self.done.mark(start, end),
            (Err(errno), OnError::BreakGuestWrite) => return Err(errno),
            (Err(errno), OnError::BreakSnapshot) => self.break_snapshot(cx, errno),
        }
        self.wait_for_reads(start, end).await;
        Ok(())
    }

    pub(super) fn break_snapshot(&self, cx: &Cx, errno: Errno) {
        if self.broken.get().is_none() {
            self.broken.set(Some(errno));
            let filter = cx.node.id;
            cx.layer.emit(|| Event::SnapshotBroken { filter, errno });
        }
    }

    /// Copies in a task of its own, and waits for it as long as it may take.
    async fn copy_in_time(&self, cx: &Cx, range: (u64, u64), timeout: Nanos) -> Result<(), Errno> {
        let beside = Rc::<Beside>::default();
        // The request holds the lock, so this never waits; the copy may need it longer than the request.
        let read = cx.layer.graph_read().await;
        let in_flight = InFlightGuard::new(&cx.layer, &cx.node);
        let (copying, own, shared) = (Rc::clone(&self.copy), cx.clone(), Rc::clone(&beside));
        let task = async move {
            let outcome = copy(&own, &copying, range, &|| !shared.cancelled.get()).await;
            shared.outcome.replace(Some(outcome));
            shared.ended.wake_all();
            drop(read);
            drop(in_flight);
        };
        let env = cx.layer.env();
        env.spawn("copy before write", Box::pin(task));
        let mut alarm = env.sleep_until(env.now().saturating_add(timeout));
        let mut ended = beside.ended.listen();
        let outcome = poll_fn(|task| {
            if let Some(outcome) = *beside.outcome.borrow() {
                return Poll::Ready(Some(outcome));
            }
            if std::pin::Pin::new(&mut ended).poll(task).is_ready() {
                ended = beside.ended.listen();
                task.waker().wake_by_ref();
            }
            alarm.as_mut().poll(task).map(|()| None)
        })
        .await;
        match outcome {
            Some(outcome) => copied(outcome),
            None => {
                beside.cancelled.set(true);
                Err(Errno::ETIMEDOUT)
            }
        }
    }

    /// Waits for snapshot reads that read this range from the source.
    pub(super) async fn wait_for_reads(&self, start: u64, end: u64) {
        loop {
            let thawed = self.thawed.listen();
            let read = |&(_, from, to): &(u64, u64, u64)| from < end && start < to;
            if !self.frozen.borrow().iter().any(read) {
                return;
            }
            thawed.await;
        }
    }
}

async fn copy(cx: &Cx, copy: &BlockCopy, range: (u64, u64), go_on: &dyn Fn() -> bool) -> Outcome {
    let call = Call {
        range: range.0..range.1,
        workers: WORKERS,
        max_chunk: 0,
        background: false,
        go_on,
    };
    copy.run(&cx.layer, &call).await
}

fn copied(outcome: Outcome) -> Result<(), Errno> {
    match outcome {
        Outcome::Done => Ok(()),
        Outcome::Failed(failure) => Err(failure.errno),
        // Only after its guest has stopped waiting.
        Outcome::Stopped => Err(Errno::ECANCELED),
        Outcome::Throttled => unreachable!("a guest's copy obeys no rate limit"),
    }
}
