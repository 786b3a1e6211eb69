//! The ticket for a room's pages.

use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use crossdock_engine::{Abandoned, Ticket, TicketError};
use crossdock_memory::PageSet;
use crossdock_proto::Homecoming;

/// A [`Ticket`] for pages, with the same calls. Counting many pages home takes longer than ending their room, and many
/// rooms share one progress loop: so it is done by whoever takes the pages from here. Until then their pool counts
/// pages that were granted as such, though nobody can write them any more. Whoever drops the ticket leaves it to the
/// loop to give the pages back to their pool.
#[derive(Debug)]
#[must_use = "the pages of the room are told here"]
pub struct PagesTicket(Ticket<AllHome>);

impl From<Ticket<AllHome>> for PagesTicket {
    fn from(ticket: Ticket<AllHome>) -> Self {
        Self(ticket)
    }
}

impl Default for PagesTicket {
    /// The ticket of no room: what is left behind by whoever takes a ticket out of a [`Receiving`](crate::Receiving).
    fn default() -> Self {
        let (nobody, ticket) = crossdock_engine::ticket();
        drop(nobody);
        Self(ticket)
    }
}

/// The pages as every peer that could write them has left them.
#[derive(Debug)]
pub(crate) struct AllHome(pub Vec<Homecoming>);

impl AllHome {
    fn into_pages(self) -> PageSet {
        let last = self.0.into_iter().filter_map(Homecoming::into_pages).last();
        last.expect("the last of the peers that could write pages gives them back")
    }
}

impl PagesTicket {
    /// The pages, if they have come home; `None` if they are still to come.
    pub fn poll(&mut self) -> Result<Option<PageSet>, Abandoned> {
        Ok(self.0.poll()?.map(AllHome::into_pages))
    }

    /// Blocks until the pages have come home, or until the deadline.
    pub fn wait_until(&mut self, deadline: Instant) -> Result<PageSet, TicketError> {
        self.0.wait_until(deadline).map(AllHome::into_pages)
    }
}

impl Future for PagesTicket {
    type Output = Result<PageSet, Abandoned>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(|home| home.map(AllHome::into_pages))
    }
}
