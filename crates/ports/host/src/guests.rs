//! Connections that were accepted and belong to no lane yet.

use std::time::{Duration, Instant};

use crate::address::Secret;
use crate::counters::HostCounters;
use crate::doorbell::Doorbell;
use crate::link::{Link, Listener, Received};
use crate::message::{Greeting, Message};
use crate::numbered::Numbered;
use crate::peer::Peer;
use crate::watch::{Ready, Watch};

/// Who has dialed and is not seated yet. Their number and their time are limited.
pub(crate) struct Guests {
    waiting: Numbered<Guest>,
    next: u32,
    limit: usize,
    /// Nobody is accepted before: the process is out of descriptors.
    closed_until: Option<Instant>,
}

/// One of them.
pub(crate) struct Guest {
    pub(crate) link: Link,
    pub(crate) peer: Peer,
    deadline: Instant,
    /// What it said, and its doorbell.
    hello: Option<(Greeting, Doorbell)>,
}

/// A guest that has said what it wants.
pub(crate) struct Introduced {
    pub(crate) guest: Guest,
    pub(crate) greeting: Greeting,
    pub(crate) bell: Doorbell,
}

impl Guests {
    pub(crate) fn new(limit: usize) -> Self {
        Self { waiting: Numbered::default(), next: 0, limit, closed_until: None }
    }

    /// Accepts who dials now, up to a fixed number.
    pub(crate) fn welcome(
        &mut self,
        listener: &Listener,
        watch: &Watch,
        patience: Duration,
        counters: &mut HostCounters,
    ) {
        for _ in 0..ACCEPTED_AT_ONCE {
            match listener.accept() {
                Ok(Some(link)) => {
                    if !self.admit(link, watch, patience) {
                        counters.connections_refused += 1;
                    }
                }
                Ok(None) => return,
                Err(_) => return self.close_door(listener, watch),
            }
        }
    }

    fn admit(&mut self, link: Link, watch: &Watch, patience: Duration) -> bool {
        if self.waiting.len() >= self.limit {
            return false;
        }
        let Ok(peer) = Peer::of(rustix::fd::AsFd::as_fd(&link)) else { return false };
        let number = self.next;
        if watch.add(&link, Ready::Guest(number)).is_err() {
            return false;
        }
        self.next += 1;
        let deadline = Instant::now() + patience;
        self.waiting.push(number, Guest { link, peer, deadline, hello: None });
        true
    }

    /// No descriptor is left, as a rule. The connection that waits keeps the listener ready, so it leaves the set for a
    /// moment; otherwise nobody could sleep.
    fn close_door(&mut self, listener: &Listener, watch: &Watch) {
        watch.remove(listener);
        self.closed_until = Some(Instant::now() + DOOR_CLOSED);
    }

    /// Hears what a guest wants; returns it if it has said so.
    pub(crate) fn hear(
        &mut self,
        number: u32,
        watch: &Watch,
        counters: &mut HostCounters,
    ) -> Option<Greeting> {
        let guest = self.waiting.get_mut(number)?;
        match (guest.link.receive(), &guest.hello) {
            (Received::Nothing, _) => return None,
            (Received::Message(Message::Hello(greeting), [Some(fd), _]), None) => {
                if let Some(bell) = Doorbell::of_peer(fd) {
                    guest.hello = Some((greeting, bell));
                    return Some(greeting);
                }
            }
            // It gave up, or talks out of turn.
            _ => {}
        }
        counters.connections_refused += 1;
        self.send_away(number, watch);
        None
    }

    /// The guest who wants this lane's end and comes from that one.
    pub(crate) fn find(&self, to: &Secret, from: &Secret) -> Option<u32> {
        let wants =
            |guest: &Guest| guest.hello.as_ref().is_some_and(|(it, _)| it.to == *to && it.from == *from);
        self.waiting.find(wants)
    }

    /// Takes out a guest that has introduced itself.
    pub(crate) fn take(&mut self, number: u32, watch: &Watch) -> Option<Introduced> {
        self.waiting.get(number)?.hello.as_ref()?;
        let mut guest = self.waiting.remove(number)?;
        watch.remove(&guest.link);
        let (greeting, bell) = guest.hello.take()?;
        Some(Introduced { guest, greeting, bell })
    }

    pub(crate) fn send_away(&mut self, number: u32, watch: &Watch) {
        if let Some(guest) = self.waiting.remove(number) {
            watch.remove(&guest.link);
        }
    }

    /// Sends away who wants a lane that has ended.
    pub(crate) fn dismiss(&mut self, cookie: &Secret, watch: &Watch) {
        let wants = |guest: &Guest| guest.hello.as_ref().is_some_and(|(greeting, _)| greeting.to == *cookie);
        while let Some(number) = self.waiting.find(wants) {
            self.send_away(number, watch);
        }
    }

    /// Sends away who has waited too long, and opens the door again.
    pub(crate) fn expire(
        &mut self,
        now: Instant,
        watch: &Watch,
        listener: &Listener,
        counters: &mut HostCounters,
    ) {
        while let Some(number) = self.waiting.find(|guest| guest.deadline <= now) {
            counters.connections_refused += 1;
            self.send_away(number, watch);
        }
        if self.closed_until.is_some_and(|until| until <= now) {
            self.closed_until = match watch.add(listener, Ready::Listener) {
                Ok(()) => None,
                Err(_) => Some(now + DOOR_CLOSED),
            };
        }
    }

    /// When somebody has waited too long, or the door opens.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        self.waiting.iter().map(|(_, guest)| guest.deadline).chain(self.closed_until).min()
    }

    pub(crate) fn has_deadlines(&self) -> bool {
        self.waiting.len() > 0 || self.closed_until.is_some()
    }
}

const ACCEPTED_AT_ONCE: usize = 64;
const DOOR_CLOSED: Duration = Duration::from_millis(10);
