//! Panics of the subject: caught at the poll, with message and place, and without noise on stderr.
//!
//! Rules: only panics on a thread that is inside [`catch`] are kept from stderr; everybody else's go the usual way.

use std::cell::{Cell, RefCell};
use std::sync::Once;

/// What a panic said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PanicReport {
    /// Its message.
    pub message: String,
    /// `file:line:column`.
    pub location: String,
}

thread_local! {
    static CATCHING: Cell<bool> = const { Cell::new(false) };
    static REPORT: RefCell<Option<PanicReport>> = const { RefCell::new(None) };
}

/// Installs the hook, once per process.
pub fn silence() {
    static HOOK: Once = Once::new();
    HOOK.call_once(|| {
        let previous = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |info| {
            if !CATCHING.with(Cell::get) {
                return previous(info);
            }
            let payload = info.payload();
            let message = payload
                .downcast_ref::<&str>()
                .map(|s| (*s).to_owned())
                .or_else(|| payload.downcast_ref::<String>().cloned())
                .unwrap_or_else(|| "a panic without a text".to_owned());
            let location = info.location().map_or_else(String::new, ToString::to_string);
            REPORT.with(|report| {
                // The first one is the cause; panics in destructors follow.
                report
                    .borrow_mut()
                    .get_or_insert(PanicReport { message, location });
            });
        }));
    });
}

/// Runs `f`, which catches panics itself, and tells of the first one. [`silence`] must have been called.
pub fn catch<R>(f: impl FnOnce() -> R) -> (R, Option<PanicReport>) {
    CATCHING.with(|catching| catching.set(true));
    let result = f();
    CATCHING.with(|catching| catching.set(false));
    (result, REPORT.with(|report| report.borrow_mut().take()))
}

/// Like [`catch`] without taking the report: for the hot path, where almost nothing panics.
#[inline]
pub fn quietly<R>(f: impl FnOnce() -> R) -> R {
    CATCHING.with(|catching| catching.set(true));
    let result = f();
    CATCHING.with(|catching| catching.set(false));
    result
}

/// The report that [`quietly`] left behind.
pub fn take_report() -> Option<PanicReport> {
    REPORT.with(|report| report.borrow_mut().take())
}
