//! What a sleeping port waits for: an epoll set, with a timer in it for deadlines.

use std::mem::MaybeUninit;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Instant;

use rustix::event::epoll;
use rustix::io::Errno;
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

/// The epoll set.
pub(crate) struct Watch {
    epoll: OwnedFd,
    timer: OwnedFd,
    /// Whether the timer runs, or has run out unread.
    timer_set: bool,
}

/// What is ready.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Ready {
    /// The port's own doorbell.
    Doorbell,
    /// A deadline has come.
    Timer,
    /// Somebody dials.
    Listener,
    /// A connection that belongs to no lane yet.
    Guest(u32),
    /// A lane's connection.
    Socket(u32),
    /// A lane's peer has died.
    Process(u32),
}

impl Watch {
    pub(crate) fn new() -> Result<Self, (&'static str, Errno)> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(|errno| ("epoll_create1", errno))?;
        let flags = TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK;
        let timer = rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags)
            .map_err(|errno| ("timerfd_create", errno))?;
        let watch = Self { epoll, timer, timer_set: false };
        watch.add(&watch.timer, Ready::Timer).map_err(|errno| ("epoll_ctl", errno))?;
        Ok(watch)
    }

    pub(crate) fn add(&self, fd: impl AsFd, what: Ready) -> Result<(), Errno> {
        epoll::add(&self.epoll, fd, epoll::EventData::new_u64(what.encode()), epoll::EventFlags::IN)
    }

    /// Has to be called before a descriptor is closed: a forked child may hold a copy, which would keep it in the set.
    pub(crate) fn remove(&self, fd: impl AsFd) {
        // One that is not in the set needs no removal.
        let _ = epoll::delete(&self.epoll, fd);
    }

    /// What is ready now, up to a fixed number; the rest comes with the next call. Mostly it is nothing, which is cheap.
    pub(crate) fn ready(&mut self) -> Option<impl Iterator<Item = Ready> + use<>> {
        let mut space = [MaybeUninit::uninit(); READY_AT_ONCE];
        // Interrupted by a signal, the call is repeated by the next poll.
        let (events, _) = epoll::wait(&self.epoll, &mut space, Some(&NOW)).ok()?;
        if events.is_empty() {
            return None;
        }
        let mut found = [None; READY_AT_ONCE];
        for (place, event) in found.iter_mut().zip(events.iter()) {
            *place = Ready::decode(event.data.u64());
        }
        Some(found.into_iter().flatten())
    }

    /// Makes the set ready at `deadline`, or at no time.
    pub(crate) fn set_deadline(&mut self, deadline: Option<Instant>) -> Result<(), Errno> {
        if deadline.is_none() && !self.timer_set {
            return Ok(());
        }
        // Zero would switch the timer off.
        let left =
            deadline.map(|deadline| deadline.saturating_duration_since(Instant::now()).as_nanos().max(1));
        let left = left.unwrap_or(0);
        let value = Itimerspec {
            it_interval: Timespec { tv_sec: 0, tv_nsec: 0 },
            it_value: Timespec {
                tv_sec: (left / 1_000_000_000) as i64,
                tv_nsec: (left % 1_000_000_000) as i64,
            },
        };
        rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &value)?;
        self.timer_set = deadline.is_some();
        Ok(())
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.epoll.as_fd()
    }
}

impl Ready {
    fn encode(self) -> u64 {
        let (kind, number) = match self {
            Self::Doorbell => (0, 0),
            Self::Timer => (1, 0),
            Self::Listener => (2, 0),
            Self::Guest(guest) => (3, guest),
            Self::Socket(lane) => (4, lane),
            Self::Process(lane) => (5, lane),
        };
        kind << 32 | u64::from(number)
    }

    fn decode(data: u64) -> Option<Self> {
        let number = data as u32;
        Some(match data >> 32 {
            0 => Self::Doorbell,
            1 => Self::Timer,
            2 => Self::Listener,
            3 => Self::Guest(number),
            4 => Self::Socket(number),
            5 => Self::Process(number),
            _ => return None,
        })
    }
}

const READY_AT_ONCE: usize = 64;
const NOW: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 };

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustix::event::{PollFd, PollFlags, poll};

    use super::*;
    use crate::doorbell::Doorbell;

    fn ready(watch: &mut Watch) -> Vec<Ready> {
        watch.ready().into_iter().flatten().collect()
    }

    #[test]
    fn names_survive_the_kernel() {
        for what in
            [Ready::Doorbell, Ready::Listener, Ready::Guest(7), Ready::Socket(u32::MAX), Ready::Process(0)]
        {
            let bell = Doorbell::new().expect("an eventfd");
            let mut watch = Watch::new().expect("an epoll set");
            watch.add(&bell, what).expect("added");
            assert_eq!(ready(&mut watch), []);
            bell.ring();
            assert_eq!(ready(&mut watch), [what]);
            bell.silence();
            assert_eq!(ready(&mut watch), []);
            bell.ring();
            watch.remove(&bell);
            assert_eq!(ready(&mut watch), []);
        }
    }

    #[test]
    fn a_deadline_makes_the_set_readable() {
        let mut watch = Watch::new().expect("an epoll set");
        watch.set_deadline(Some(Instant::now() + Duration::from_millis(5))).expect("set");
        let timeout = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
        let mut fds = [PollFd::new(&watch.epoll, PollFlags::IN)];
        assert_eq!(poll(&mut fds, Some(&timeout)), Ok(1));
        assert_eq!(ready(&mut watch), [Ready::Timer]);
        watch.set_deadline(None).expect("switched off");
        assert_eq!(ready(&mut watch), []);
    }
}
