//! Waiting for a node: asleep while its own thread makes progress, or making the progress.

use std::os::fd::AsFd;
use std::time::{Duration, Instant};

use crossdock::{Handle, Node, Turn};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use serde::de::DeserializeOwned;

use crate::error::Error;
use crate::talk::Talk;

/// A node and who drives it.
pub struct Driver {
    node: Node,
    /// Progress is ours to make.
    is_caller: bool,
}

impl Driver {
    pub fn new(mut node: Node) -> Self {
        let is_caller = node.worker().is_some();
        Self { node, is_caller }
    }

    pub fn node(&self) -> &Node {
        &self.node
    }

    pub fn handle(&self) -> &Handle {
        self.node.handle()
    }

    /// Waits until tickets of this node have what `look` looks for. With a progress thread it sleeps until the node
    /// has told somebody something.
    pub fn until<T>(
        &mut self,
        what: &'static str,
        limit: Duration,
        look: impl FnMut() -> Result<Option<T>, Error>,
    ) -> Result<T, Error> {
        self.within(limit, look)?.ok_or(Error::TimedOut { what, limit })
    }

    /// As [`until`](Driver::until), but nothing found is no error.
    pub fn within<T>(
        &mut self,
        limit: Duration,
        mut look: impl FnMut() -> Result<Option<T>, Error>,
    ) -> Result<Option<T>, Error> {
        if self.is_caller {
            return self.try_within(limit, look);
        }
        let events = self.node.handle().event_fd();
        let deadline = Instant::now() + limit;
        loop {
            events.clear();
            if let Some(found) = look()? {
                return Ok(Some(found));
            }
            let mut found = Ok(None);
            events.arm(|| {
                found = look();
                !matches!(found, Ok(None))
            });
            if let Some(found) = found? {
                return Ok(Some(found));
            }
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return Ok(None) };
            let left = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
            // A signal only makes it look once more.
            let _ = poll(&mut [PollFd::new(&events.as_fd(), PollFlags::IN)], Some(&left));
        }
    }

    /// Waits for the other process, asleep where the node has a thread of its own: a process that looks again and again
    /// takes the processors from those that are measured.
    pub fn hear<M: DeserializeOwned + Send + 'static>(
        &mut self,
        limit: Duration,
        talk: &Talk<M>,
    ) -> Result<M, Error> {
        match self.is_caller {
            true => self.hear_spinning(limit, talk),
            false => talk.hear_within(limit)?.ok_or_else(|| Error::no_answer(limit)),
        }
    }

    /// As [`hear`](Driver::hear), but it looks again and again.
    pub fn hear_spinning<M: DeserializeOwned + Send + 'static>(
        &mut self,
        limit: Duration,
        talk: &Talk<M>,
    ) -> Result<M, Error> {
        self.try_within(limit, || talk.hear())?.ok_or_else(|| Error::no_answer(limit))
    }

    /// Looks again and again, for what the node does not tell of.
    pub fn keep_trying<T>(
        &mut self,
        what: &'static str,
        limit: Duration,
        look: impl FnMut() -> Result<Option<T>, Error>,
    ) -> Result<T, Error> {
        self.try_within(limit, look)?.ok_or(Error::TimedOut { what, limit })
    }

    fn try_within<T>(
        &mut self,
        limit: Duration,
        mut look: impl FnMut() -> Result<Option<T>, Error>,
    ) -> Result<Option<T>, Error> {
        let begin = Instant::now();
        let mut active = begin;
        loop {
            if let Some(found) = look()? {
                return Ok(Some(found));
            }
            let moved = self.is_caller && self.node.progress() == Turn::Active;
            let now = Instant::now();
            let left = limit.saturating_sub(now.duration_since(begin));
            if left.is_zero() {
                return Ok(None);
            }
            if moved {
                active = now;
            } else if now.duration_since(active) < SPIN {
                std::hint::spin_loop();
            } else if self.is_caller {
                self.node.park(NAP.min(left))?;
            } else {
                std::thread::sleep(NAP.min(left));
            }
        }
    }

    /// Lets the node do what it still has to.
    pub fn settle(&mut self, time: Duration) -> Result<(), Error> {
        if !self.is_caller {
            std::thread::sleep(time);
            return Ok(());
        }
        let end = Instant::now() + time;
        self.keep_trying("settling", time * 100, || Ok((Instant::now() >= end).then_some(())))
    }

    /// Makes progress once, where it is ours to make; else lets the thread run that makes it, should it want this core.
    #[inline]
    pub fn spin(&mut self) {
        if self.is_caller {
            self.node.progress();
        } else {
            std::thread::yield_now();
        }
    }
}

/// As a progress thread does.
const SPIN: Duration = Duration::from_micros(50);

/// How long what cannot wake us may wait.
const NAP: Duration = Duration::from_micros(300);
