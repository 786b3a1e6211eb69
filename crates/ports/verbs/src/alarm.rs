//! The next deadline of a port, as something that epoll can wait for.

use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use crossdock_transport::Result;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use crate::port::os;

pub(crate) struct Alarm {
    timer: OwnedFd,
    at: Option<Instant>,
}

impl Alarm {
    pub fn new(epoll: &OwnedFd) -> Result<Self> {
        let flags = TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC;
        let timer =
            rustix::time::timerfd_create(TimerfdClockId::Monotonic, flags).map_err(os("timerfd_create"))?;
        epoll::add(epoll, timer.as_fd(), EventData::new_u64(0), EventFlags::IN).map_err(os("epoll_ctl"))?;
        Ok(Self { timer, at: None })
    }

    /// Whether its time has come.
    pub fn is_over(&self, now: Instant) -> bool {
        self.at.is_some_and(|at| at <= now)
    }

    /// The same, of this moment.
    pub fn is_late(&self) -> bool {
        self.at.is_some_and(|at| at <= Instant::now())
    }

    /// Goes off at `deadline`, or earlier.
    pub fn sooner(&mut self, deadline: Instant) {
        if self.at.is_none_or(|at| deadline < at) {
            self.set(Some(deadline));
        }
    }

    /// Goes off at this time and no other.
    pub fn set(&mut self, deadline: Option<Instant>) {
        self.at = deadline;
        let wait = match deadline {
            // Zero would switch it off.
            Some(deadline) => deadline.saturating_duration_since(Instant::now()).max(Duration::from_nanos(1)),
            None => Duration::ZERO,
        };
        let never = Timespec { tv_sec: 0, tv_nsec: 0 };
        let it_value = Timespec {
            tv_sec: i64::try_from(wait.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: wait.subsec_nanos().into(),
        };
        let spec = Itimerspec { it_interval: never, it_value };
        rustix::time::timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &spec)
            .expect("a timer of our own takes any time");
    }
}
