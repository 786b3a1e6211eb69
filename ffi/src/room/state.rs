//! A hand-over as the library keeps it behind its handle: what is waited for, what was told, who is woken.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};

use crossdock::{
    Abandoned, End, Ended, NotTaken, PageSet, PagesTicket, Received, Receiving, Sending, Serving, SessionEnd,
};
use parking_lot::Mutex;
use smallvec::SmallVec;

use super::structures::crossdock_end;
use crate::bell::Bell;
use crate::events::{CROSSDOCK_EVENT_ENDED, CROSSDOCK_EVENT_PAGES_HOME, crossdock_event};
use crate::handles::Table;
use crate::node::Shared;
use crate::status::{CROSSDOCK_ABANDONED, CROSSDOCK_BAD_HANDLE, Fault};

pub(super) struct Room {
    pub node: Arc<Shared>,
    pub handle: u64,
    pub user_data: u64,
    pub bell: Bell,
    pub state: Mutex<State>,
}

pub(super) struct State {
    pub control: Control,
    pub end: Option<Received>,
    /// Of a room that receives, by pool.
    pub lists: SmallVec<[List; 1]>,
    /// Events that were not handed out yet.
    pub news: Vec<u32>,
}

pub(super) enum Control {
    Sending(Sending),
    Serving(Serving),
    Receiving(Receiving),
    /// The handle is closed; what was waited for is left to the progress loop.
    Closed,
}

/// The pages of one pool.
pub(super) struct List {
    /// They were named by a handle, and are given back by one; others go to their pool.
    pub is_kept: bool,
    pub pages: Home,
}

pub(super) enum Home {
    Waiting(PagesTicket),
    Here(PageSet),
    /// Back in their pool, or taken.
    Gone,
    /// The node is gone, and nothing has proven that nobody writes them.
    Abandoned,
}

pub(super) static ROOMS: Table<Room> = Table::new(7, "room");

pub(crate) fn is_open(handle: u64) -> bool {
    ROOMS.get(handle).is_ok()
}

/// Adds what this room has to tell, as far as it fits; whether there is more.
pub(crate) fn news(handle: u64, into: &mut Vec<crossdock_event>, most: usize) -> bool {
    let Ok(room) = ROOMS.get(handle) else { return false };
    let mut state = room.state.lock();
    state.look();
    while into.len() < most && !state.news.is_empty() {
        let kind = state.news.remove(0);
        into.push(crossdock_event { kind, reserved: 0, handle, user_data: room.user_data });
    }
    !state.news.is_empty()
}

impl State {
    /// Asks the tickets.
    pub fn look(&mut self) {
        if self.end.is_none() {
            let told = match &mut self.control {
                Control::Sending(room) => room.end.poll().map(|end| end.map(plain)),
                Control::Serving(room) => room.end.poll().map(|end| end.map(plain)),
                Control::Receiving(room) => room.end.poll(),
                Control::Closed => Ok(None),
            };
            if let Some(end) = told.unwrap_or_else(|Abandoned| Some(node_gone())) {
                self.ended(end);
            }
        }
        let mut waiting = 0;
        let mut is_news = false;
        for list in &mut self.lists {
            if let Home::Waiting(ticket) = &mut list.pages {
                match ticket.poll() {
                    Ok(None) => waiting += 1,
                    told => {
                        is_news = true;
                        list.told(told.map(|pages| pages.expect("not pending")));
                    }
                }
            }
        }
        if is_news && waiting == 0 {
            self.news.push(CROSSDOCK_EVENT_PAGES_HOME);
        }
    }

    fn ended(&mut self, end: Received) {
        self.end = Some(end);
        self.news.push(CROSSDOCK_EVENT_ENDED);
    }

    pub fn is_home(&self) -> bool {
        !self.lists.iter().any(|list| matches!(list.pages, Home::Waiting(_)))
    }

    /// Leaves a waker with each ticket that has not told yet, and takes what the others tell.
    pub fn listen(&mut self, waker: &Waker) {
        let mut context = Context::from_waker(waker);
        fn first<T>(
            ticket: &mut (impl Future<Output = Result<T, Abandoned>> + Unpin),
            context: &mut Context<'_>,
        ) -> Option<Result<T, Abandoned>> {
            match Pin::new(ticket).poll(context) {
                Poll::Ready(told) => Some(told),
                Poll::Pending => None,
            }
        }
        let told = match &mut self.control {
            Control::Sending(room) => first(&mut room.end, &mut context).map(|end| end.map(plain)),
            Control::Serving(room) => first(&mut room.end, &mut context).map(|end| end.map(plain)),
            Control::Receiving(room) => first(&mut room.end, &mut context),
            Control::Closed => None,
        };
        if let Some(end) = told {
            self.ended(end.unwrap_or_else(|Abandoned| node_gone()));
        }
        let mut is_news = false;
        for list in &mut self.lists {
            if let Home::Waiting(ticket) = &mut list.pages
                && let Some(told) = first(ticket, &mut context)
            {
                is_news = true;
                list.told(told);
            }
        }
        if is_news && self.is_home() {
            self.news.push(CROSSDOCK_EVENT_PAGES_HOME);
        }
    }
}

impl List {
    fn told(&mut self, told: Result<PageSet, Abandoned>) {
        self.pages = match told {
            Ok(pages) if self.is_kept => Home::Here(pages),
            // Dropped: its pool may hand them out again.
            Ok(_) => Home::Gone,
            Err(Abandoned) => Home::Abandoned,
        };
    }
}

fn plain(ended: Ended) -> Received {
    Received { ended, aux: Vec::new() }
}

fn node_gone() -> Received {
    plain(Ended { end: End::PeerLost { cause: SessionEnd::ClosedHere }, peer: None, port: None })
}

impl Wake for Room {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    /// Called by the progress loop, and by calls that find it gone, under this room's lock as well: so it takes none.
    fn wake_by_ref(self: &Arc<Self>) {
        // Who hears the room's bell finds the event.
        self.node.events.tell(self.handle);
        self.bell.ring();
    }
}

impl Control {
    pub fn cancel(&self) -> Result<(), NotTaken> {
        match self {
            Control::Sending(room) => room.cancel(),
            Control::Serving(room) => room.cancel(),
            Control::Receiving(room) => room.cancel(),
            Control::Closed => Ok(()),
        }
    }
}

impl Room {
    /// How it ended, if it has; an error of one that another thread has closed meanwhile.
    pub fn end(&self) -> Option<Result<crossdock_end, Fault>> {
        let mut state = self.state.lock();
        state.look();
        match &state.end {
            Some(end) => Some(Ok(crossdock_end::of(end, self.user_data))),
            None => matches!(state.control, Control::Closed).then(|| Err(closed())),
        }
    }
}

/// Another thread has closed the handle meanwhile.
pub(super) fn closed() -> Fault {
    Fault::new(CROSSDOCK_BAD_HANDLE, "the room was closed meanwhile", "use a handle only until it is closed")
}

pub(super) fn abandoned() -> Fault {
    let words = "the node was closed before anything had proven that nobody writes these pages";
    Fault::new(CROSSDOCK_ABANDONED, words, "make a new pool, over other memory")
}
