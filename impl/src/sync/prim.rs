//! The atomics and the mutex everything in `sync` stands on: std's, or loom's when a model run explores them.
//!
//! Nothing above this module names `std::sync` directly, so that `--cfg loom` swaps all of it at once.

#[cfg(not(loom))]
pub(crate) use std::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU32, AtomicUsize, Ordering, fence},
};

#[cfg(loom)]
pub(crate) use loom::sync::{
    Mutex, MutexGuard,
    atomic::{AtomicU32, AtomicUsize, Ordering, fence},
};

/// Locks a mutex. Poison is ignored: the data of every mutex here is consistent between any two statements.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}
