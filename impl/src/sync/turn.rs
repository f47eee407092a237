//! Giving way: everybody else who can go on does so once.

use std::future::poll_fn;
use std::task::Poll;

/// One turn of the scheduler.
pub(crate) async fn turn() {
    let mut turned = false;
    poll_fn(|cx| {
        if std::mem::replace(&mut turned, true) {
            return Poll::Ready(());
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    })
    .await;
}
