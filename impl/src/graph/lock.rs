//! The graph lock and the main lock as guards.
//!
//! Rules (graph.md 6): every request holds the read lock for its whole length; only the main context takes the write
//! lock, and does nothing that waits while it has it. A guard owns a handle to the layer, so tasks can carry it.

use crate::Layer;
use crate::event::Event;

/// The main lock is held while this lives.
#[derive(Debug)]
#[must_use]
pub struct MainGuard {
    layer: Layer,
    what: &'static str,
}

impl Drop for MainGuard {
    fn drop(&mut self) {
        self.layer.emit(|| Event::MainEnd { what: self.what });
        self.layer.inner.main_lock.unlock();
    }
}

/// The graph lock is held for reading while this lives.
#[derive(Debug)]
#[must_use]
pub struct GraphReadGuard {
    layer: Layer,
}

impl Drop for GraphReadGuard {
    #[inline]
    fn drop(&mut self) {
        self.layer.inner.graph_lock.end_read();
    }
}

/// The graph lock is held for writing while this lives. Await nothing meanwhile.
#[derive(Debug)]
#[must_use]
pub struct GraphWriteGuard {
    layer: Layer,
}

impl Drop for GraphWriteGuard {
    fn drop(&mut self) {
        self.layer.inner.graph_lock.end_write();
    }
}

/// Ends the drain-all of a write lock that was given up half-way.
struct Blip<'a>(&'a Layer);

impl Drop for Blip<'_> {
    fn drop(&mut self) {
        self.0.drain_all_end_quiet();
    }
}

impl Layer {
    /// Waits for the turn of a main-context operation. Before the guard goes, the caller [reaps](Layer::reap).
    pub async fn main(&self, what: &'static str) -> MainGuard {
        self.inner.main_lock.lock().await;
        self.emit(|| Event::MainBegin { what });
        MainGuard {
            layer: self.clone(),
            what,
        }
    }

    /// Holds off graph changes.
    #[inline]
    pub async fn graph_read(&self) -> GraphReadGuard {
        if !self.inner.graph_lock.try_read() {
            self.inner.graph_lock.read().await;
        }
        GraphReadGuard { layer: self.clone() }
    }

    /// Waits until no request is in flight anywhere, and holds off new ones. New requests are stopped by a drain-all
    /// that does not wait, so that they cannot starve the writer; it ends before this returns (graph.md 6.3).
    pub async fn graph_write(&self) -> GraphWriteGuard {
        self.drain_all_begin_nopoll();
        let blip = Blip(self);
        self.inner.graph_lock.write().await;
        drop(blip);
        GraphWriteGuard { layer: self.clone() }
    }

    /// Whether somebody holds the graph lock for writing.
    #[must_use]
    pub fn graph_write_held(&self) -> bool {
        self.inner.graph_lock.write_held()
    }
}
