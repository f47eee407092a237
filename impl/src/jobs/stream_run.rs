//! block-stream: run phase and completion.
//!
//! Run: the device is walked once; what a layer between it and the base decides is pulled up by reading it through
//! the copy-on-read filter. The copy re-checks under the serialising lock of the device, so a guest may write
//! between the query and the copy. Completion: filter out, header and backing link to the base.
//!
//! Safer than QEMU 10.0, on purpose:
//! * The device is flushed before its header drops layers, and after: a crash never finds a header that points
//!   past layers whose data is still in a cache.
//! * Where a dropped layer ends before the device does and the base goes on, the device gets zeroes: they were
//!   visible because of the short layer and would turn into the base's data.
//! * The header is written only once the new link is in place; if it cannot be written the old link comes back,
//!   so a failed job leaves graph and header as they were.
//! * A backing node that somebody gave to the last layer meanwhile stays, also if filters were above the base before.
//! * With on-error=ignore, a failed allocation query skips its chunk instead of asking again for ever.
//! * The edge on the filter goes with the filter, so no filter without a child waits for the dismissal.

use std::rc::Rc;

use crate::Layer;
use crate::env::Fut;
use crate::error::Errno;
use crate::event::Event;
use crate::io::backend::Backend;
use crate::jobs::error_policy::ErrorAction;
use crate::jobs::job::{Job, JobDriver};
use crate::jobs::stream::Stream;
use crate::jobs::window::{Chunk, Window};
use crate::sync::turn;
use crate::types::{NodeId, ReqFlags};

/// Unit of work with one request at a time, bytes; QEMU's. Visible in progress and in where a paused job stands.
const CHUNK: u64 = 512 * 1024;
/// The same with several in flight, where only throughput counts: disks and file systems are at their best with
/// requests of some MiB, and copy-on-read splits what is longer than 16 MiB anyway.
const PARALLEL_CHUNK: u64 = 2 * 1024 * 1024;
/// Most requests kept in flight, whatever the environment thinks useful.
const MAX_PARALLEL: usize = 16;

/// What has to be done with a stretch.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Work {
    /// The device has it, or no layer that goes away does.
    Nothing,
    /// Pull it up through the filter.
    Copy,
    /// Past the end of a layer that goes away, inside the base: make the zeroes the device's own.
    Zeroes,
}

impl JobDriver for Stream {
    fn kind(&self) -> &'static str {
        "stream"
    }

    fn run<'a>(&'a self, job: &'a Rc<Job>) -> Fut<'a, Result<(), Errno>> {
        Box::pin(self.run_stream(job))
    }

    fn prepare<'a>(&'a self, job: &'a Rc<Job>) -> Fut<'a, Result<(), Errno>> {
        Box::pin(self.prepare_stream(job))
    }

    fn clean<'a>(&'a self, job: &'a Rc<Job>) -> Fut<'a, ()> {
        Box::pin(self.clean_stream(job))
    }
}

impl Stream {
    async fn run_stream(&self, job: &Rc<Job>) -> Result<(), Errno> {
        let layer = job.layer();
        let top = layer.skip_filters(self.bs);
        if top == self.base_overlay {
            // The base is the backing image already.
            return Ok(());
        }
        let len = layer.node(self.bs).length();
        job.total.set(job.progress.get() + len);
        let backend = self
            .backend
            .borrow()
            .as_ref()
            .expect("a running job has its backend")
            .backend();
        let width = layer.env().job_parallelism().clamp(1, MAX_PARALLEL);
        let mut window = Window::new(width);
        let mut first_error = Ok(());
        let mut next = 0;
        loop {
            if window.is_empty() {
                if next >= len {
                    break;
                }
                // The pause point: nothing is in flight here.
                job.ratelimit_sleep().await;
                if job.is_cancelled() {
                    break;
                }
            }
            while next < len && !window.is_full() && (window.is_empty() || job.may_run_ahead()) {
                next += self
                    .issue(&layer, &backend, top, (next, len), width, &mut window)
                    .await;
            }
            let (chunk, result) = window.settle_first().await.expect("a chunk was issued");
            let Err(errno) = result else {
                account(job, chunk, true);
                continue;
            };
            match job.error_action("read", errno) {
                ErrorAction::Stop => {
                    // Whatever ran ahead is asked for again; it is allocated by then, or fails in its turn.
                    window.drain().await;
                    next = chunk.offset;
                }
                ErrorAction::Report => {
                    window.drain().await;
                    first_error = first_error.and(Err(errno));
                    break;
                }
                ErrorAction::Ignore => {
                    first_error = first_error.and(Err(errno));
                    account(job, chunk, false);
                }
            }
        }
        assert!(window.is_empty(), "a run phase ends with nothing in flight");
        first_error
    }

    /// Decides about the stretch at the start of `range` and starts its work; returns its length.
    async fn issue<'a>(
        &'a self,
        layer: &'a Layer,
        backend: &'a Backend,
        top: NodeId,
        range: (u64, u64),
        width: usize,
        window: &mut Window<'a>,
    ) -> u64 {
        let (offset, end) = range;
        let unit = (end - offset).min(if width == 1 { CHUNK } else { PARALLEL_CHUNK });
        let (chunk, work) = match window.beside(self.classify(layer, top, offset, unit, end)).await {
            Ok((work, bytes)) => (
                Chunk {
                    offset,
                    bytes,
                    copy: work != Work::Nothing,
                },
                work,
            ),
            Err(errno) => {
                window.push_done(
                    Chunk {
                        offset,
                        bytes: unit,
                        copy: false,
                    },
                    Err(errno),
                );
                return unit;
            }
        };
        match work {
            Work::Nothing => {
                window.push_done(chunk, Ok(()));
                if width > 1 {
                    // A long stretch of nothing must not keep the guests waiting.
                    window.beside(turn()).await;
                }
            }
            Work::Copy => window.push(chunk, Box::pin(backend.prefetch(offset, chunk.bytes))),
            Work::Zeroes => window.push(chunk, Box::pin(self.keep_zeroes(layer, offset, chunk.bytes))),
        }
        chunk.bytes
    }

    /// What to do with [offset, offset + n), n ≤ `bytes` unless there is nothing to do up to `end`.
    async fn classify(
        &self,
        layer: &Layer,
        top: NodeId,
        offset: u64,
        bytes: u64,
        end: u64,
    ) -> Result<(Work, u64), Errno> {
        let _read = layer.graph_read().await;
        let (allocated, n) = layer.is_allocated(top, offset, bytes).await?;
        if n == 0 {
            return Ok((Work::Nothing, end - offset));
        }
        if allocated {
            return Ok((Work::Nothing, n));
        }
        let below = layer.cow(top).expect("the link below the device is frozen");
        let (depth, m) = layer
            .is_allocated_above(below, Some(self.base_overlay), true, offset, n)
            .await?;
        if m > 0 {
            return Ok((if depth > 0 { Work::Copy } else { Work::Nothing }, m));
        }
        // Past the end of the first layer below: zeroes are visible there, whatever is underneath.
        let base_end = self.base_length(layer).min(end);
        if offset < base_end {
            Ok((Work::Zeroes, n.min(base_end - offset)))
        } else {
            Ok((Work::Nothing, end - offset))
        }
    }

    /// What is below the streamed range now: others may have changed that. The filters that were between the last layer and the
    /// base count as long as that layer stands on them.
    fn base(&self, layer: &Layer) -> Option<NodeId> {
        let below = layer.filter_or_cow(self.base_overlay);
        let mut at = Some(self.base_overlay);
        while let Some(node) = at {
            let next = layer.filter_or_cow(node);
            if node == self.above_base {
                return next;
            }
            at = next.filter(|next| layer.node(*next).facts.is_filter);
        }
        below
    }

    /// Length of what becomes the backing file, bytes; 0 without one.
    fn base_length(&self, layer: &Layer) -> u64 {
        self.base(layer).map_or(0, |base| layer.node(base).length())
    }

    /// Copy-on-read of the device itself: under its serialising lock, what is unallocated then becomes zeroes.
    /// The filter would leave it alone, since no layer down to its bottom has it.
    async fn keep_zeroes(&self, layer: &Layer, offset: u64, bytes: u64) -> Result<(), Errno> {
        let _read = layer.graph_read().await;
        let filter = self.filter.get().expect("the filter stays until completion");
        let edge = layer
            .node(filter)
            .primary_edge()
            .expect("a filter in use has its child");
        layer.prefetch(edge, offset, bytes, ReqFlags::COPY_ON_READ).await
    }

    async fn prepare_stream(&self, job: &Rc<Job>) -> Result<(), Errno> {
        let layer = job.layer();
        let top = layer.skip_filters(self.bs);
        let below = layer.cow(top);
        if let Some(below) = below
            && top != self.base_overlay
        {
            self.keep_late_zeroes(&layer, top, below).await?;
        }
        self.drop_filter(&layer, Some(job))
            .await
            .map_err(|_| Errno::EPERM)?;
        let Some(below) = below else { return Ok(()) };
        let drained = (layer.drained(top).await, layer.drained(below).await);
        let ret = self.relink(&layer, top).await;
        drop(drained);
        ret
    }

    /// The base may be another one than during the run, or longer; under the main lock it stays what it is.
    async fn keep_late_zeroes(&self, layer: &Layer, top: NodeId, below: NodeId) -> Result<(), Errno> {
        let end = self.base_length(layer).min(layer.node(top).length());
        let mut offset = layer.node(below).length();
        while offset < end {
            let unit = (end - offset).min(PARALLEL_CHUNK);
            let (work, bytes) = self.classify(layer, top, offset, unit, end).await?;
            if work == Work::Zeroes {
                self.keep_zeroes(layer, offset, bytes).await?;
            }
            offset += bytes;
        }
        Ok(())
    }

    /// Backing link and header of `top` to the base. `top` and what is below it are drained.
    async fn relink(&self, layer: &Layer, top: NodeId) -> Result<(), Errno> {
        let base = self.base(layer);
        flush(layer, top).await?;
        let replaced = layer.replace_backing(top, base).await.map_err(|_| Errno::EPERM)?;
        if let Err(errno) = self.write_header(layer, top, base).await {
            // The layers are all still there; the header names them.
            layer.put_back_backing(replaced).await;
            return Err(errno);
        }
        layer.keep_backing(replaced);
        // From here on link and header agree, and they show the same content as before: they stay.
        flush(layer, top).await
    }

    async fn write_header(&self, layer: &Layer, top: NodeId, base: Option<NodeId>) -> Result<(), Errno> {
        let base = base.map(|base| layer.node(layer.skip_filters(base)));
        let file = base.as_ref().map(|base| {
            self.backing_file
                .clone()
                .unwrap_or_else(|| base.driver().filename(&layer.cx(base)))
        });
        let format = base.map(|base| {
            let mask = self.backing_mask_protocol && base.facts.is_protocol;
            if mask { "raw" } else { base.facts.name }
        });
        let _read = layer.graph_read().await;
        let node = layer.node(top);
        let backing = file.as_deref().map(|file| (file, format));
        node.driver().change_backing_file(&layer.cx(&node), backing).await
    }

    async fn clean_stream(&self, job: &Rc<Job>) {
        let layer = job.layer();
        if self.drop_filter(&layer, Some(job)).await.is_err() {
            // Somebody forbids it: the filter stays as one that filters nothing, and goes with its parents.
            let filter = self.filter.take().expect("it could not be dropped");
            if let Some(edge) = self.main_edge.take() {
                job.remove_edge(edge);
            }
            layer.unhold(filter);
        }
        self.release_backend().await;
        if self.was_read_only {
            // A failure leaves it writable, which harms nobody; QEMU ignores it as well.
            drop(layer.set_read_only(self.bs, true).await);
        }
    }
}

async fn flush(layer: &Layer, node: NodeId) -> Result<(), Errno> {
    let _read = layer.graph_read().await;
    layer.flush(node).await
}

/// Books a chunk that is over. Only called in order of offset, so progress is a prefix of the device.
fn account(job: &Job, chunk: Chunk, ok: bool) {
    job.progress.set(job.progress.get() + chunk.bytes);
    if chunk.copy {
        job.charge(chunk.bytes);
    }
    let copied = chunk.copy && ok;
    job.layer().emit(|| Event::JobChunk {
        job: job.id,
        offset: chunk.offset,
        bytes: chunk.bytes,
        copied,
    });
}
