//! The lists of workers that are under way to those who asked. A change wakes everyone who waits for one, and lists may
//! be long: so the same list is made once, and not too many bytes of them are held at a time.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hyper::body::Bytes;
use parking_lot::Mutex;
use tokio::sync::Notify;

use crate::query::Query;

pub(crate) struct Lists {
    most_bytes: usize,
    held: Arc<Held>,
    recent: Mutex<Vec<List>>,
}

/// A list that was made a moment ago.
struct List {
    query: Query,
    revision: u64,
    made: Duration,
    body: Bytes,
}

/// How many bytes there are of lists that were not yet written to the sockets of all who share them.
#[derive(Default)]
struct Held {
    bytes: AtomicUsize,
    fewer: Notify,
}

impl Lists {
    pub(crate) fn new(most_bytes: usize) -> Lists {
        Lists { most_bytes, held: Arc::default(), recent: Mutex::default() }
    }

    /// Waits until another list may be made: there may be one more for each thread than the limit holds. Peers that do not
    /// read are cut off, so that this comes to an end.
    pub(crate) async fn room(&self) {
        loop {
            let fewer = self.held.fewer.notified();
            if self.held.bytes.load(Ordering::Relaxed) < self.most_bytes {
                return;
            }
            // What is kept for others to share must not be what everyone waits for.
            self.recent.lock().clear();
            if self.held.bytes.load(Ordering::Relaxed) < self.most_bytes {
                return;
            }
            fewer.await;
        }
    }

    /// The list for this query at this revision, unless it is so old that the times in it are of no use.
    pub(crate) fn shared(&self, query: &Query, revision: u64, now: Duration) -> Option<Bytes> {
        let mut recent = self.recent.lock();
        recent.retain(|list| list.revision == revision && now.saturating_sub(list.made) < SHARED_FOR);
        recent.iter().find(|list| list.query == *query).map(|list| list.body.clone())
    }

    /// Takes in a list that was made, for others to share.
    pub(crate) fn share(&self, query: &Query, revision: u64, made: Duration, text: String) -> Bytes {
        // Locked before its bytes are counted: whoever finds too many clears what is kept, and this must not come after.
        let mut recent = self.recent.lock();
        self.held.bytes.fetch_add(text.len(), Ordering::Relaxed);
        let body = Bytes::from_owner(Text { text, held: Arc::clone(&self.held) });
        if recent.len() < SHARED_MOST {
            recent.push(List { query: query.clone(), revision, made, body: body.clone() });
        }
        body
    }
}

/// Counts its bytes for as long as anyone has them.
struct Text {
    text: String,
    held: Arc<Held>,
}

impl AsRef<[u8]> for Text {
    fn as_ref(&self) -> &[u8] {
        self.text.as_bytes()
    }
}

impl Drop for Text {
    fn drop(&mut self) {
        self.held.bytes.fetch_sub(self.text.len(), Ordering::Relaxed);
        self.held.fewer.notify_waiters();
    }
}

/// The ages that a list tells are older than its answer by this at most.
const SHARED_FOR: Duration = Duration::from_millis(100);
const SHARED_MOST: usize = 64;

#[cfg(test)]
mod tests {
    use std::future::Future;
    use std::pin::pin;
    use std::task::{Context, Poll, Waker};

    use super::*;
    use crate::worker::Role;

    #[test]
    fn the_same_list_is_made_once_and_not_shared_for_long() {
        let lists = Lists::new(1_000);
        let ms = Duration::from_millis;
        let (all, decode) = (Query::all(), Query::all().role(Role::Decode));
        assert_eq!(lists.shared(&all, 1, ms(0)), None);
        let made = lists.share(&all, 1, ms(0), "list".to_owned());
        let shared = lists.shared(&all, 1, ms(99)).unwrap();
        assert_eq!(made.as_ptr(), shared.as_ptr(), "no copy");
        assert_eq!(lists.shared(&decode, 1, ms(99)), None);
        assert_eq!(lists.shared(&all, 1, ms(100)), None, "its times are old");
        lists.share(&all, 1, ms(100), "list".to_owned());
        assert_eq!(lists.shared(&all, 2, ms(100)), None, "it shows something else");
        for number in 0..1_000 {
            lists.share(&Query::all().tp_rank(number), 3, ms(100), "list".to_owned());
        }
        assert_eq!(lists.recent.lock().len(), SHARED_MOST);
    }

    #[test]
    fn lists_that_nobody_reads_hold_up_further_ones() {
        let lists = Lists::new(8);
        let mut context = Context::from_waker(Waker::noop());
        let mut room = |lists: &Lists| pin!(lists.room()).poll(&mut context).is_ready();
        let one = lists.share(&Query::all(), 1, Duration::ZERO, "1234".to_owned());
        assert!(room(&lists));
        let two = lists.share(&Query::all().tp_rank(1), 1, Duration::ZERO, "5678".to_owned());
        let shared = two.clone();
        assert!(!room(&lists));
        let mut waiting = pin!(lists.room());
        let mut context = Context::from_waker(Waker::noop());
        assert_eq!(waiting.as_mut().poll(&mut context), Poll::Pending);
        drop(two);
        assert_eq!(waiting.as_mut().poll(&mut context), Poll::Pending, "somebody has it still");
        drop(shared);
        assert_eq!(waiting.as_mut().poll(&mut context), Poll::Ready(()));
        drop(one);
        assert_eq!(lists.held.bytes.load(Ordering::Relaxed), 0);
        lists.share(&Query::all(), 2, Duration::ZERO, "12345678".to_owned());
        assert!(room(&lists), "what is only kept for others to share is let go");
    }
}
