//! What a node tells: which of its rooms and peers have something new.

use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicBool, AtomicUsize};
use std::time::Instant;

use bytemuck::Zeroable;
use crossbeam_queue::SegQueue;
use crossdock::{EventFd, OsError};
use parking_lot::Mutex;

use crate::bell::Bell;
use crate::{peer, room};

/// A room has ended: `crossdock_room_poll` says how.
pub const CROSSDOCK_EVENT_ENDED: u32 = 1;
/// All pages of a room that received are home: nobody else can write them any more.
pub const CROSSDOCK_EVENT_PAGES_HOME: u32 = 2;
/// A peer that is dialed has answered, or never will: `crossdock_peer_poll` says which.
pub const CROSSDOCK_EVENT_PEER: u32 = 3;

/// What has happened. It never grows.
#[repr(C)]
#[derive(Clone, Copy, Zeroable, Debug, PartialEq, Eq)]
pub struct crossdock_event {
    /// One of `CROSSDOCK_EVENT_…`; a later library may tell others.
    pub kind: u32,
    /// 0.
    pub reserved: u32,
    /// The room, or the peer.
    pub handle: u64,
    /// What the caller gave the room; 0 of a peer.
    pub user_data: u64,
}

/// What the progress loop has told, and nobody has asked for yet.
pub(crate) struct Events {
    /// Handles of rooms and peers. Each of them is told of at most [`MOST_TELLINGS`] times, and what is closed is swept out:
    /// so the queue is no longer than a few times what is open.
    queue: SegQueue<u64>,
    open: AtomicUsize,
    bell: Bell,
    descriptor: EventFd,
    /// Somebody waits on the descriptor.
    is_watched: AtomicBool,
    /// The node is closed: nobody waits any more.
    is_closed: AtomicBool,
    /// A descriptor is armed by one at a time.
    arming: Mutex<()>,
}

/// A room tells its end and the homecoming of each list of pages.
const MOST_TELLINGS: usize = 4;
/// How many entries one that closes looks at: as many as it may have left, and one more, so that the queue shrinks.
const SWEPT: usize = 2 * MOST_TELLINGS;

impl Events {
    pub fn new() -> Result<Events, OsError> {
        Ok(Events {
            queue: SegQueue::new(),
            open: AtomicUsize::new(0),
            bell: Bell::new(),
            descriptor: EventFd::new()?,
            is_watched: AtomicBool::new(false),
            is_closed: AtomicBool::new(false),
            arming: Mutex::new(()),
        })
    }

    /// From the progress loop: takes no lock that a caller holds.
    pub fn tell(&self, handle: u64) {
        self.queue.push(handle);
        self.bell.ring();
        self.descriptor.raise();
    }

    pub fn opened(&self) {
        self.open.fetch_add(1, Relaxed);
    }

    /// Something that tells was closed; sweeps out what is left of such, where nobody else takes it.
    pub fn closed(&self) {
        let open = self.open.fetch_sub(1, Relaxed) - 1;
        if self.queue.len() > MOST_TELLINGS * (open + 16) {
            for handle in (0..SWEPT).map_while(|_| self.queue.pop()) {
                if room::is_open(handle) || peer::is_open(handle) {
                    // Who has found the queue empty meanwhile looks again.
                    self.tell(handle);
                }
            }
        }
    }

    /// The descriptor, which is readable from now on whenever there are events.
    pub fn watch(&self) -> i32 {
        self.is_watched.store(true, Relaxed);
        self.arm();
        self.descriptor.as_fd().as_raw_fd()
    }

    /// Takes events, oldest first, as many as there are and fit.
    pub fn take(&self, into: &mut Vec<crossdock_event>, most: usize) {
        if self.is_watched.load(Relaxed) {
            let _one = self.arming.lock();
            self.descriptor.clear();
            self.drain(into, most);
            self.descriptor.arm(|| !self.queue.is_empty());
        } else {
            self.drain(into, most);
        }
    }

    /// Whoever waits for events is to wait no longer.
    pub fn close(&self) {
        self.is_closed.store(true, SeqCst);
        self.bell.ring();
        self.descriptor.raise();
    }

    pub fn is_closed(&self) -> bool {
        self.is_closed.load(SeqCst)
    }

    /// As [`take`](Events::take), and waits for the first one, as long as the node is open.
    pub fn wait(&self, into: &mut Vec<crossdock_event>, most: usize, deadline: Instant) {
        self.bell.wait(deadline, || {
            self.take(into, most);
            (!into.is_empty() || self.is_closed()).then_some(())
        });
    }

    fn arm(&self) {
        let _one = self.arming.lock();
        self.descriptor.clear();
        self.descriptor.arm(|| !self.queue.is_empty());
    }

    fn drain(&self, into: &mut Vec<crossdock_event>, most: usize) {
        while into.len() < most {
            let Some(handle) = self.queue.pop() else { return };
            let has_more = room::news(handle, into, most) || peer::news(handle, into);
            if has_more {
                // For another one that waits, too.
                self.tell(handle);
            }
        }
    }
}
