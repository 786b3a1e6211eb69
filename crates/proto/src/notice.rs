//! What the protocol tells its user.

use std::sync::Arc;

use crossdock_memory::{GrantedPages, PageRef, PageSet};
use crossdock_transport::{Direction, GrantId};

use crate::end::{End, SessionEnd};
use crate::message::Identity;
use crate::proto::{RoomId, SessionId, TargetId};

/// What the user of the protocol hears.
#[derive(Debug)]
pub enum Notice {
    /// Rooms with this peer can move now. Said once for each target that holds the session, which may be later than
    /// the first time; once without a target if none does.
    SessionUp {
        /// Which session.
        session: SessionId,
        /// The target that holds it.
        target: Option<TargetId>,
        /// Who.
        peer: Identity,
        /// The peer's name for people.
        name: Arc<str>,
        /// The transport of its lanes.
        port: &'static str,
        /// What the peer says about its cache.
        app: Arc<[u8]>,
    },
    /// A session ended, or never came about. Said once for each target that held it or waited for it; once without a
    /// target if none did.
    SessionDown {
        /// Which session; `None` if it ended before it had a number, or lasts without this target.
        session: Option<SessionId>,
        /// The target.
        target: Option<TargetId>,
        /// The peer's name for people, if there was a session.
        peer: Option<Arc<str>>,
        /// The transport of its lanes.
        port: Option<&'static str>,
        /// Why.
        cause: SessionEnd,
    },
    /// Begin to move a room's bytes, from the first one, also if some have been moved before.
    Start(Start),
    /// A peer wants to read a room's pages. Answer with [`Proto::offer`](crate::Proto::offer), or end the room.
    Wanted {
        /// Which room.
        room: RoomId,
        /// From which session's peer.
        session: SessionId,
        /// What the reader told.
        params: Vec<u8>,
    },
    /// Forget how far a room has come since its start; it ends, or starts again later.
    Stop {
        /// Which room.
        room: RoomId,
    },
    /// All bytes of a room are here. Answer with [`Proto::accept`](crate::Proto::accept) or [`Proto::reject`](crate::Proto::reject).
    Landed {
        /// Which room.
        room: RoomId,
        /// From which session's peer.
        session: SessionId,
        /// What the other side sent with the end (push) or the beginning (pull).
        aux: Vec<u8>,
    },
    /// The room has ended on this side. Said once.
    Ended {
        /// Which room.
        room: RoomId,
        /// How.
        end: End,
        /// The peer's name, if there was one.
        peer: Option<Arc<str>>,
        /// The transport between the two.
        port: Option<&'static str>,
    },
    /// The decode side's pages are free of every writer. Said once, with or after [`Notice::Ended`].
    Home {
        /// Which room.
        room: RoomId,
        /// The pages.
        pages: Homecoming,
    },
    /// The prefill side's pages are no longer read: drop them. Said once, with or after [`Notice::Ended`].
    Unread {
        /// The pages.
        pages: PageRef,
    },
}

/// Pages that no write can land in any more, on their way to their owner.
///
/// Counting a long list of pages home takes longer than to end its room, and the peer should not wait for it: so it is
/// done by whoever takes them in the end, and not by the progress loop. Dropped, they go home to their pool.
#[derive(Debug)]
pub struct Homecoming(Option<Coming>);

#[derive(Debug)]
enum Coming {
    Granted(GrantedPages),
    /// They are counted already. `None`: another peer may still write them.
    Counted(Option<PageSet>),
}

impl Homecoming {
    /// The caller knows that the peer's writes can land no more. Pages that were in quarantine are counted at once:
    /// whoever watches it should not see what is over.
    pub fn new(pages: GrantedPages) -> Self {
        Self(Some(match pages.is_quarantined() {
            true => Coming::Counted(pages.come_home()),
            false => Coming::Granted(pages),
        }))
    }

    /// The pages, as their owner's again; `None` if other peers may write them, too, and one of these is not done.
    pub fn into_pages(mut self) -> Option<PageSet> {
        self.0.take().and_then(Coming::home)
    }
}

impl Coming {
    fn home(self) -> Option<PageSet> {
        match self {
            Coming::Granted(pages) => pages.come_home(),
            Coming::Counted(pages) => pages,
        }
    }
}

impl Drop for Homecoming {
    fn drop(&mut self) {
        drop(self.0.take().map(Coming::home));
    }
}

/// What it takes to move a room's bytes.
#[derive(Clone, Debug)]
pub struct Start {
    /// Which room.
    pub room: RoomId,
    /// With which session.
    pub session: SessionId,
    /// Write to the peer or read from it.
    pub direction: Direction,
    /// Under which grant.
    pub grant: GrantId,
    /// How often the room was started before.
    pub attempt: u32,
    /// The peer's pages.
    pub remote_pages: Arc<[u32]>,
    /// What the peer told with them.
    pub params: Arc<[u8]>,
}
