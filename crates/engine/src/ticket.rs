//! One end, told once.
//!
//! The channel is the `oneshot` crate: model-checked with loom by its authors, one allocation a ticket, and a
//! pending ticket is asked with one load, so that a caller that polls in a tight loop does not slow the progress
//! thread down.

use std::cell::OnceCell;
use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::thread::Thread;
use std::time::Instant;

use oneshot::AsyncReceiver;

/// Makes a promise and the ticket for it.
pub fn ticket<T>() -> (Promise<T>, Ticket<T>) {
    let (sender, receiver) = oneshot::async_channel();
    let edge = Edge::default();
    (Promise { sender, edge: edge.clone() }, Ticket { receiver, edge })
}

/// The receiving end of a [`Promise`]: ask it with [`poll`](Ticket::poll), wait for it with
/// [`wait_until`](Ticket::wait_until), or await it under any runtime. Dropping it does not cancel anything.
#[derive(Debug)]
#[must_use = "an end that nobody looks at is lost"]
pub struct Ticket<T> {
    receiver: AsyncReceiver<T>,
    edge: Edge,
}

/// The telling end of a [`Ticket`].
#[derive(Debug)]
#[must_use = "a promise that is dropped leaves its ticket abandoned"]
pub struct Promise<T> {
    sender: oneshot::Sender<T>,
    edge: Edge,
}

/// Nothing will ever be told (any more): the promise was dropped, or its end has been taken already.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the promise was dropped, or its end has been taken already")]
pub struct Abandoned;

/// Why a wait gave no end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TicketError {
    /// Not told by the deadline. The ticket is as good as before.
    #[error("not told by the deadline")]
    TimedOut,
    /// Nothing will ever be told.
    #[error(transparent)]
    Abandoned(#[from] Abandoned),
}

impl<T> Promise<T> {
    /// Tells the end. Gives it back if the ticket was dropped: nobody will look.
    pub fn tell(self, end: T) -> Result<(), T> {
        self.edge.told();
        self.sender.send(end).map_err(oneshot::SendError::into_inner)
    }
}

impl<T> Ticket<T> {
    /// The end, if it has been told; `None` if it is still to come.
    pub fn poll(&mut self) -> Result<Option<T>, Abandoned> {
        // A look first: polling the future would replace the waker of a task that awaits the ticket.
        if !self.receiver.has_message() && !self.receiver.is_closed() {
            return Ok(None);
        }
        match Pin::new(self).as_mut().poll(&mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(end)) => Ok(Some(end)),
            Poll::Ready(Err(_)) => Err(Abandoned),
            Poll::Pending => Ok(None),
        }
    }

    /// Blocks until the end is told, or until the deadline.
    pub fn wait_until(&mut self, deadline: Instant) -> Result<T, TicketError> {
        with_thread_waker(|waker| {
            loop {
                // Registers before it asks, so that an end told after the question unparks this thread. A wake
                // that comes too late for this ticket ends another parking of this thread early, which every
                // user of parking has to expect.
                if let Poll::Ready(end) = Pin::new(&mut *self).as_mut().poll(&mut Context::from_waker(waker))
                {
                    return Ok(end?);
                }
                match deadline.checked_duration_since(Instant::now()) {
                    None => return Err(TicketError::TimedOut),
                    Some(left) => std::thread::park_timeout(left),
                }
            }
        })
    }
}

impl<T> Future for Ticket<T> {
    type Output = Result<T, Abandoned>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        let end = Pin::new(&mut self.receiver).poll(cx).map_err(|_| Abandoned);
        self.edge.taken();
        end
    }
}

/// Nothing, except under ThreadSanitizer, which does not see the fences by which the channel hands an end over: there a
/// release and an acquire of the ticket's own say the same in its words.
#[derive(Clone, Debug, Default)]
struct Edge {
    #[cfg(tsan)]
    told: Arc<std::sync::atomic::AtomicBool>,
}

impl Edge {
    fn told(&self) {
        #[cfg(tsan)]
        self.told.store(true, std::sync::atomic::Ordering::Release);
    }

    fn taken(&self) {
        #[cfg(tsan)]
        self.told.load(std::sync::atomic::Ordering::Acquire);
    }
}

/// Unparks the thread that waits.
struct Unpark(Thread);

impl Wake for Unpark {
    fn wake(self: Arc<Self>) {
        self.0.unpark();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        self.0.unpark();
    }
}

/// Keeps one waker a thread, so that waiting allocates only the first time.
fn with_thread_waker<R>(wait: impl FnOnce(&Waker) -> R) -> R {
    thread_local! {
        static WAKER: OnceCell<Waker> = const { OnceCell::new() };
    }
    WAKER.with(|cell| wait(cell.get_or_init(|| Waker::from(Arc::new(Unpark(std::thread::current()))))))
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::time::Duration;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(10)
    }

    fn late() -> Instant {
        Instant::now() + Duration::from_secs(30)
    }

    #[test]
    fn told_exactly_once() {
        let (promise, mut ticket) = ticket();
        assert_eq!(ticket.poll(), Ok(None));
        assert_eq!(promise.tell(Box::new(7)), Ok(()));
        assert_eq!(ticket.poll(), Ok(Some(Box::new(7))));
        assert_eq!(ticket.poll(), Err(Abandoned));
        assert_eq!(ticket.wait_until(late()), Err(TicketError::Abandoned(Abandoned)));
    }

    #[test]
    fn a_dropped_promise_is_told_to_who_asks_and_to_who_waits() {
        let (promise, mut asked) = ticket::<u8>();
        drop(promise);
        assert_eq!(asked.poll(), Err(Abandoned));
        let (promise, mut waiting) = ticket::<u8>();
        let dropper = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            drop(promise);
        });
        assert_eq!(waiting.wait_until(late()), Err(TicketError::Abandoned(Abandoned)));
        dropper.join().unwrap();
    }

    #[test]
    fn a_dropped_ticket_gives_the_end_back() {
        let (promise, ticket) = ticket();
        drop(ticket);
        assert_eq!(promise.tell("pages"), Err("pages"));
    }

    #[test]
    fn waits_until_told_or_until_the_deadline_and_can_wait_again() {
        let (promise, mut ticket) = ticket();
        assert_eq!(ticket.wait_until(Instant::now()), Err(TicketError::TimedOut));
        assert_eq!(ticket.wait_until(soon()), Err(TicketError::TimedOut));
        assert_eq!(ticket.poll(), Ok(None));
        let teller = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            promise.tell(3).unwrap();
        });
        assert_eq!(ticket.wait_until(late()), Ok(3));
        teller.join().unwrap();
    }

    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn asking_between_two_polls_of_a_task_keeps_its_waker() {
        let (promise, mut ticket) = ticket();
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(count.clone());
        let mut cx = Context::from_waker(&waker);
        assert_eq!(Pin::new(&mut ticket).as_mut().poll(&mut cx), Poll::Pending);
        assert_eq!(ticket.poll(), Ok(None));
        promise.tell(9).unwrap();
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert_eq!(Pin::new(&mut ticket).as_mut().poll(&mut cx), Poll::Ready(Ok(9)));
    }

    #[test]
    fn many_threads_tell_and_wait() {
        let (promises, tickets): (Vec<_>, Vec<_>) = (0..2_000).map(|_| ticket::<usize>()).unzip();
        let teller = std::thread::spawn(move || {
            for (n, promise) in promises.into_iter().enumerate() {
                if n % 5 == 0 {
                    drop(promise);
                } else {
                    promise.tell(n).unwrap();
                }
            }
        });
        let deadline = late();
        for (n, mut ticket) in tickets.into_iter().enumerate() {
            match ticket.wait_until(deadline) {
                Ok(told) => assert!(told == n && n % 5 != 0),
                Err(error) => assert!(error == TicketError::Abandoned(Abandoned) && n % 5 == 0),
            }
        }
        teller.join().unwrap();
    }
}
