//! Panics of the code under test, as something that a run ends with.

use std::cell::RefCell;
use std::panic::{self, AssertUnwindSafe};
use std::sync::Once;

thread_local! {
    /// What the last panic said, while somebody on this thread waits to be told.
    static HEARD: RefCell<Option<String>> = const { RefCell::new(None) };
}

/// Runs something, and gives what it said if it panics, without printing it.
pub fn caught<T>(run: impl FnOnce() -> T) -> Result<T, String> {
    static LISTEN: Once = Once::new();
    LISTEN.call_once(|| {
        let others = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let is_awaited = HEARD.with_borrow_mut(|heard| match heard {
                Some(heard) => {
                    *heard = info.to_string();
                    true
                }
                None => false,
            });
            if !is_awaited {
                others(info);
            }
        }));
    });
    HEARD.set(Some(String::new()));
    let outcome = panic::catch_unwind(AssertUnwindSafe(run));
    let heard = HEARD.take().unwrap_or_default();
    outcome.map_err(|_| heard)
}
