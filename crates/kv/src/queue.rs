//! A bounded queue that can be closed, with nothing left behind in it.
//!
//! Whoever closes and whoever pushes each do their part, then look for the other's; with a sequentially consistent fence
//! between, one of them sees what the other did. The model check of every interleaving:
//! `RUSTFLAGS="--cfg loom" cargo test --release -p crossdock-kv --lib loom`

use std::sync::atomic::Ordering;

#[cfg(not(loom))]
use crossbeam_queue::ArrayQueue as Items;
#[cfg(loom)]
use loom::sync::atomic::{AtomicBool, fence};
#[cfg(loom)]
use model::Items;
#[cfg(not(loom))]
use std::sync::atomic::{AtomicBool, fence};

/// Pushed to by any thread, emptied by one; in the end by whoever comes last.
pub(crate) struct Queue<T> {
    items: Items<T>,
    closed: AtomicBool,
}

/// Why an item was not taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Rejected {
    Full,
    Closed,
}

impl<T> Queue<T> {
    pub fn new(items: usize) -> Self {
        Self { items: Items::new(items), closed: AtomicBool::new(false) }
    }

    /// The oldest item.
    pub fn pop(&self) -> Option<T> {
        self.items.pop()
    }

    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Adds an item. [`end_if_closed`](Queue::end_if_closed) has to follow.
    pub fn push(&self, item: T) -> Result<(), Rejected> {
        if self.closed.load(Ordering::Acquire) {
            return Err(Rejected::Closed);
        }
        self.items.push(item).map_err(|_| Rejected::Full)
    }

    /// Takes no more items. [`end_if_closed`](Queue::end_if_closed) has to follow.
    pub fn close(&self) {
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Ends what is left, if the queue has been closed; says whether it has.
    pub fn end_if_closed(&self, end: impl FnMut(T)) -> bool {
        fence(Ordering::SeqCst);
        let closed = self.closed.load(Ordering::Relaxed);
        if closed {
            std::iter::from_fn(|| self.pop()).for_each(end);
        }
        closed
    }
}

/// The queue as the model sees it: what is pushed with a release can be popped with an acquire, and no more is promised.
#[cfg(loom)]
mod model {
    use std::sync::atomic::Ordering::{Acquire, Relaxed, Release};

    use crossbeam_queue::ArrayQueue;
    use loom::sync::atomic::AtomicUsize;

    pub struct Items<T> {
        announced: AtomicUsize,
        /// Holds the items, unseen by the model.
        held: ArrayQueue<T>,
    }

    impl<T> Items<T> {
        pub fn new(items: usize) -> Self {
            Self { announced: AtomicUsize::new(0), held: ArrayQueue::new(items) }
        }

        pub fn push(&self, item: T) -> Result<(), T> {
            self.held.push(item)?;
            self.announced.fetch_add(1, Release);
            Ok(())
        }

        pub fn pop(&self) -> Option<T> {
            let mut announced = self.announced.load(Relaxed);
            while announced > 0 {
                match self.announced.compare_exchange(announced, announced - 1, Acquire, Relaxed) {
                    Ok(_) => return self.held.pop(),
                    Err(now) => announced = now,
                }
            }
            None
        }

        pub fn is_empty(&self) -> bool {
            self.len() == 0
        }

        pub fn len(&self) -> usize {
            self.announced.load(Relaxed)
        }
    }
}

#[cfg(all(test, loom))]
mod loom_tests {
    use std::sync::Arc;

    use loom::sync::atomic::AtomicUsize;
    use loom::thread;

    use super::*;

    #[test]
    fn loom_what_races_with_the_end_is_ended_once() {
        // Every interleaving of two threads; of three, there are too many, and no pair of theirs differs.
        loom::model(|| {
            let queue = Arc::new(Queue::new(4));
            let ended = Arc::new(AtomicUsize::new(0));
            let pusher = {
                let (queue, ended) = (queue.clone(), ended.clone());
                thread::spawn(move || {
                    let taken = queue.push(()).is_ok();
                    queue.end_if_closed(|()| drop(ended.fetch_add(1, Ordering::Relaxed)));
                    usize::from(taken)
                })
            };
            queue.close();
            queue.end_if_closed(|()| drop(ended.fetch_add(1, Ordering::Relaxed)));
            let taken = pusher.join().unwrap();
            assert_eq!(ended.load(Ordering::Relaxed), taken, "each command that was taken is ended");
            assert!(queue.is_empty());
        });
    }
}
