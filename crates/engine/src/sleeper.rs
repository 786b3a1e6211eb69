//! Sleeping on several descriptors at once.

use std::os::fd::BorrowedFd;

use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;

use crate::OsError;
use crate::clock::timespec;

/// One sleep of the progress loop, built on the stack each time from what the doorbell, the network and the ports
/// hand out when they are armed.
///
/// It is `ppoll` and not `epoll`: for a handful of descriptors the kernel does the same work, the time-out has
/// nanoseconds, and there is no registration that a closed and reused descriptor number could fall out of unseen.
#[derive(Debug)]
pub struct Sleeper<'fd> {
    /// The first `watched` are set.
    descriptors: [Option<BorrowedFd<'fd>>; DESCRIPTORS],
    watched: usize,
}

/// Why a sleep ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Woken {
    /// A descriptor is readable.
    Readable,
    /// The time is over, or a signal came.
    NotReadable,
}

/// A [`Sleeper`] watches no more than [`Sleeper::DESCRIPTORS`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a thread can sleep on at most {DESCRIPTORS} descriptors")]
pub struct TooManyDescriptors;

const DESCRIPTORS: usize = 64;

/// How soon a loop looks again that cannot be woken.
const NAP_NS: u64 = 200_000;

impl<'fd> Sleeper<'fd> {
    /// The most descriptors that one sleep can watch.
    pub const DESCRIPTORS: usize = DESCRIPTORS;

    /// A sleep that only time ends.
    pub fn new() -> Self {
        Self { descriptors: [None; DESCRIPTORS], watched: 0 }
    }

    /// Ends the sleep, too, when `descriptor` is readable.
    pub fn watch(&mut self, descriptor: BorrowedFd<'fd>) -> Result<(), TooManyDescriptors> {
        let place = self.descriptors.get_mut(self.watched).ok_or(TooManyDescriptors)?;
        *place = Some(descriptor);
        self.watched += 1;
        Ok(())
    }

    /// Sleeps until a descriptor is readable, a signal comes, or the time is over.
    pub fn sleep(self, timeout_ns: u64) -> Result<Woken, OsError> {
        let timeout = timespec(timeout_ns);
        let ready = match self.descriptors[0] {
            None => poll(&mut [], Some(&timeout)),
            Some(first) => {
                let mut polled =
                    self.descriptors.map(|d| PollFd::from_borrowed_fd(d.unwrap_or(first), PollFlags::IN));
                poll(&mut polled[..self.watched], Some(&timeout))
            }
        };
        match ready {
            Ok(0) | Err(Errno::INTR) => Ok(Woken::NotReadable),
            Ok(_) => Ok(Woken::Readable),
            // The process may have fewer descriptors open now than are watched here, or the kernel has no memory to watch
            // them: both pass, and those that are open serve on.
            Err(Errno::INVAL | Errno::NOMEM) => {
                // It ends early only by a signal.
                let _ = poll(&mut [], Some(&timespec(timeout_ns.min(NAP_NS))));
                Ok(Woken::NotReadable)
            }
            Err(errno) => Err(OsError::of("ppoll")(errno)),
        }
    }
}

impl Default for Sleeper<'_> {
    fn default() -> Self {
        Self::new()
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::os::fd::AsFd;
    use std::time::Instant;

    use super::*;
    use crate::Doorbell;

    #[test]
    fn sleeps_as_long_as_it_was_told() {
        let began = Instant::now();
        assert_eq!(Sleeper::new().sleep(3_000_000).unwrap(), Woken::NotReadable);
        let slept = began.elapsed().as_nanos();
        assert!((3_000_000..2_000_000_000).contains(&slept), "slept {slept} ns");
    }

    #[test]
    fn any_of_its_descriptors_wakes_it() {
        let bells: Vec<_> = (0..Sleeper::DESCRIPTORS).map(|_| Doorbell::new().unwrap()).collect();
        for bell in &bells {
            bell.prepare_sleep();
        }
        for rung in [0, 1, Sleeper::DESCRIPTORS - 1] {
            bells[rung].ring();
            let mut sleeper = Sleeper::new();
            for bell in &bells {
                sleeper.watch(bell.as_fd()).unwrap();
            }
            assert_eq!(sleeper.watch(bells[0].as_fd()), Err(TooManyDescriptors));
            assert_eq!(sleeper.sleep(30_000_000_000).unwrap(), Woken::Readable);
            bells[rung].awake();
            bells[rung].prepare_sleep();
        }
    }
}
