//! A lane whose two ends know each other: it is coming up, up, or closing.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Instant;

use crossdock_memory::Memory;
use crossdock_transport::{DownCause, Event, Events, LaneId, Token};

use crate::counters::HostCounters;
use crate::descriptors::Descriptors;
use crate::doorbell::Doorbell;
use crate::link::{Link, Received, Sent};
use crate::medium::{Medium, Offer, Registered};
use crate::message::{Described, Greeting, Message};
use crate::numbered::Numbered;
use crate::peer::Peer;
use crate::posting::Rest;
use crate::remote::{Leash, RemoteRegions};
use crate::ring;
use crate::underway::Underway;
use crate::watch::Watch;

/// Both ends have shown their tags, and the rings are mapped.
pub(crate) struct Joined<M: Medium> {
    /// What can still touch the peer's memory goes first; then the leash, which may tell the peer so.
    pub(crate) remote: RemoteRegions<M>,
    /// What the medium keeps.
    pub(crate) lane: M::Lane,
    pub(crate) leash: Arc<Leash>,
    pub(crate) peer: Peer,
    /// The peer's.
    pub(crate) bell: Doorbell,
    pub(crate) writer: ring::Writer<Memory>,
    reader: ring::Reader<Memory>,
    /// The reader met nonsense, and is not asked again.
    reader_is_corrupt: bool,
    pub(crate) phase: Phase,
    /// What the peer has still to be told, oldest first. No longer than the regions plus the packets that a socket
    /// takes: a region that is retired before it was announced is never mentioned.
    outbox: VecDeque<Outgoing>,
    /// The outbox waits for room in the socket.
    pub(crate) blocked: bool,
    heard: Heard,
    pub(crate) has_been_up: bool,
    /// `Up` has still to be reported.
    report_up: bool,
    /// Moves that are not over, and what goes with them.
    pub(crate) underway: Underway,
    /// Tokens of finished ops, to be reported; its capacity is its limit.
    pub(crate) dones: VecDeque<Token>,
    /// What the last post waited for.
    pub(crate) short: Option<Short>,
    /// What the last post left of an op.
    pub(crate) rest: Option<Rest>,
}

/// How far a joined lane is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Phase {
    /// Waits for the peer's `Announced`.
    Announcing { deadline: Instant },
    /// Takes ops.
    Up,
    /// Takes no ops. Ends when this end has stopped and said so, and the peer's has said so or its process is dead.
    Closing { cause: DownCause },
}

/// Why a post came back short.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Short {
    /// The medium took no more in this call.
    Budget,
    /// The peer has not taken enough immediates yet.
    Ring,
    /// Too many moves are on their way.
    Moves,
}

/// What is to be told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Outgoing {
    Region(u32),
    Announced,
    Retire(u32),
}

/// What is known about the peer's end.
#[derive(Clone, Copy, Debug, Default)]
struct Heard {
    /// It touches our memory no more.
    closed: bool,
    /// Its process has ended.
    dead: bool,
    /// Its socket says nothing more.
    silent: bool,
}

/// What two ends know that have met.
pub(crate) struct Introduction {
    pub(crate) leash: Leash,
    pub(crate) peer: Peer,
    /// The peer's.
    pub(crate) bell: Doorbell,
    /// What the peer said of itself.
    pub(crate) greeting: Greeting,
    pub(crate) outbound: ring::Place<Memory>,
    pub(crate) inbound: ring::Place<Memory>,
    /// When the lane has to be up.
    pub(crate) deadline: Instant,
}

impl<M: Medium> Joined<M> {
    /// Has the peer to be told of all regions first. So many ends of ops may wait to be polled, and so many moves be on
    /// their way.
    pub(crate) fn new(
        introduction: Introduction,
        regions: &Numbered<Registered<M::Region>>,
        descriptors: &Descriptors,
        most: usize,
    ) -> Self {
        let Introduction { leash, peer, bell, greeting, outbound, inbound, deadline } = introduction;
        let mut outbox: VecDeque<_> = regions.iter().map(|(number, _)| Outgoing::Region(number)).collect();
        outbox.push_back(Outgoing::Announced);
        Self {
            remote: RemoteRegions::new(greeting.port, greeting.port_address, descriptors.clone()),
            lane: M::Lane::default(),
            leash: Arc::new(leash),
            peer,
            bell,
            writer: ring::Writer::new(outbound),
            reader: ring::Reader::new(inbound),
            reader_is_corrupt: false,
            phase: Phase::Announcing { deadline },
            outbox,
            blocked: false,
            heard: Heard::default(),
            has_been_up: false,
            report_up: false,
            underway: Underway::new(most),
            dones: VecDeque::with_capacity(most),
            short: None,
            rest: None,
        }
    }

    pub(crate) fn is_closing(&self) -> bool {
        matches!(self.phase, Phase::Closing { .. })
    }

    /// Whether the peer has said that it touches this side's memory no more, or cannot.
    pub(crate) fn peer_has_stopped(&self) -> bool {
        self.heard.closed || self.heard.dead || self.peer.is_dead()
    }

    /// Stops using the lane. The first cause counts, but a death explains a broken connection.
    pub(crate) fn close(&mut self, cause: DownCause) {
        match &mut self.phase {
            Phase::Closing { cause: earlier @ DownCause::Broken { .. } } if cause == DownCause::PeerDied => {
                *earlier = cause;
            }
            Phase::Closing { .. } => {}
            phase => {
                *phase = Phase::Closing { cause };
                // What moves on their way use goes when they are over.
                if self.underway.is_empty() {
                    self.remote.clear();
                }
                self.outbox.clear();
                self.blocked = false;
                (self.short, self.rest) = (None, None);
            }
        }
    }

    /// Queues something to tell the peer, and tells as much as the socket takes.
    pub(crate) fn announce(&mut self, what: Outgoing, regions: &Numbered<Registered<M::Region>>, medium: &M) {
        if self.is_closing() {
            return;
        }
        match what {
            Outgoing::Retire(number) if self.outbox.contains(&Outgoing::Region(number)) => {
                self.outbox.retain(|queued| *queued != Outgoing::Region(number));
            }
            what => self.outbox.push_back(what),
        }
        self.flush(regions, medium);
    }

    /// Tells the peer what is queued, as far as the socket takes it.
    pub(crate) fn flush(&mut self, regions: &Numbered<Registered<M::Region>>, medium: &M) {
        self.blocked = false;
        while let Some(next) = self.outbox.front() {
            let sent = match *next {
                Outgoing::Announced => self.leash.link.send(&Message::Announced, &[]),
                Outgoing::Retire(number) => self.leash.link.send(&Message::Retire { number }, &[]),
                Outgoing::Region(number) => match regions.get(number) {
                    Some(region) => send_region(&self.leash.link, number, region, medium),
                    None => unreachable!("a deregistered region leaves the outbox"),
                },
            };
            match sent {
                Sent::Yes => drop(self.outbox.pop_front()),
                Sent::Full => {
                    self.blocked = true;
                    return;
                }
                Sent::Gone(errno) => {
                    return self.close(DownCause::Broken { call: "sendmsg", errno: errno.raw_os_error() });
                }
            }
        }
    }

    /// Takes in what the peer has said. Bounded: a peer that talks faster is read further by the next call.
    pub(crate) fn listen(&mut self, medium: &mut M, watch: &Watch, counters: &mut HostCounters) {
        for _ in 0..PACKETS_AT_ONCE {
            if self.heard.silent {
                return;
            }
            match self.leash.link.receive() {
                Received::Message(message, [fd, _]) => {
                    if let Err(cause) = self.hear(message, fd, medium, counters) {
                        self.close(cause);
                    }
                }
                Received::Nothing => return,
                Received::Nonsense => {
                    self.close(DownCause::PeerMisbehaved { what: "sent a packet that cannot be read" });
                }
                // No proof that the peer has stopped: a process may lose its socket and keep its mappings.
                Received::End => self.lose(DownCause::Broken { call: "recvmsg", errno: 0 }, watch),
                Received::Broken { call, errno } => {
                    self.lose(DownCause::Broken { call, errno: errno.raw_os_error() }, watch);
                }
            }
        }
    }

    fn hear(
        &mut self,
        message: Message,
        fd: Option<OwnedFd>,
        medium: &mut M,
        counters: &mut HostCounters,
    ) -> Result<(), DownCause> {
        let misbehaved = |what| Err(DownCause::PeerMisbehaved { what });
        match (message, self.phase) {
            (Message::Closed, _) => {
                self.heard.closed = true;
                self.close(DownCause::ClosedByPeer);
            }
            (Message::Hello(_) | Message::Welcome(_), _) => return misbehaved("greeted twice"),
            // Said before it heard of the end.
            (_, Phase::Closing { .. }) => {}
            (Message::Region { number, bytes, offer }, _) => {
                self.remote.announce(number, bytes, offer, fd, medium)?;
                counters.regions_announced += 1;
            }
            (Message::Retire { number }, _) => self.remote.retire(number, &self.underway),
            (Message::Announced, Phase::Announcing { .. }) => {
                self.phase = Phase::Up;
                (self.has_been_up, self.report_up) = (true, true);
            }
            (Message::Announced, Phase::Up) => return misbehaved("announced itself twice"),
        }
        Ok(())
    }

    /// The socket is of no use any more. It stays readable for ever, so nobody may wait for it.
    fn lose(&mut self, cause: DownCause, watch: &Watch) {
        watch.remove(&self.leash.link);
        self.heard.silent = true;
        self.close(cause);
    }

    /// Looks whether the peer's process has ended; if so, hears its last words first.
    pub(crate) fn look_for_death(&mut self, medium: &mut M, watch: &Watch, counters: &mut HostCounters) {
        if self.heard.dead || !self.peer.is_dead() {
            return;
        }
        self.heard.dead = true;
        watch.remove(&self.peer);
        for _ in 0..LAST_WORDS / PACKETS_AT_ONCE {
            self.listen(medium, watch, counters);
        }
        self.close(DownCause::PeerDied);
    }

    /// Tells the peer that this end has stopped, once it has; returns the cause when the lane is over.
    pub(crate) fn advance_close(&mut self) -> Option<DownCause> {
        let Phase::Closing { cause } = self.phase else { return None };
        if !self.underway.is_empty() {
            return None;
        }
        // Mappings that the caller still holds are on the leash too.
        let leash = Arc::get_mut(&mut self.leash)?;
        if !leash.told {
            leash.told = leash.link.send(&Message::Closed, &[]) != Sent::Full;
            self.blocked = !leash.told;
        }
        (leash.told && (self.heard.closed || self.heard.dead)).then_some(cause)
    }

    /// Reports what happened, as far as there is room. True: nothing is left to be reported of this lane.
    pub(crate) fn deliver(&mut self, lane: LaneId, events: &mut Events, counters: &mut HostCounters) -> bool {
        if self.report_up {
            if events.is_full() {
                return false;
            }
            events.push(Event::Up { lane });
            self.report_up = false;
        }
        while let Some(token) = self.dones.front() {
            if events.is_full() {
                return false;
            }
            events.push(Event::Done { lane, token: *token });
            self.dones.pop_front();
        }
        if !self.has_been_up || self.reader_is_corrupt {
            return true;
        }
        let emptied = loop {
            if events.is_full() {
                break false;
            }
            match self.reader.pop() {
                Ok(Some(imm)) => {
                    events.push(Event::Arrived { lane, imm });
                    counters.immediates_received += 1;
                }
                Ok(None) => break true,
                Err(ring::Corrupt) => {
                    self.reader_broke();
                    break true;
                }
            }
        };
        if self.reader.release() {
            self.bell.ring();
            counters.wakes_sent += 1;
        }
        emptied
    }

    /// Whether [`deliver`](Joined::deliver) would report something, or the poster was told to come again.
    pub(crate) fn has_news(&mut self) -> bool {
        if self.report_up
            || !self.dones.is_empty()
            || self.short.take_if(|short| *short == Short::Budget).is_some()
        {
            return true;
        }
        if self.has_been_up && !self.reader_is_corrupt {
            match self.reader.wait_for_next() {
                Ok(true) => return true,
                Ok(false) => {}
                Err(ring::Corrupt) => {
                    self.reader_broke();
                    return true;
                }
            }
        }
        if self.short == Some(Short::Moves) && !self.underway.is_full() {
            self.short = None;
            return true;
        }
        if self.short == Some(Short::Ring) {
            match self.writer.wait_for_room(self.underway.immediates()) {
                Ok(true) => {
                    self.short = None;
                    return true;
                }
                Ok(false) => {}
                Err(ring::Corrupt) => {
                    self.writer_broke();
                    return true;
                }
            }
        }
        false
    }

    /// Ends the promises of [`has_news`](Joined::has_news) to sleep.
    pub(crate) fn wake_up(&mut self) {
        if self.has_been_up {
            self.reader.stop_waiting();
            self.writer.stop_waiting();
        }
    }

    pub(crate) fn writer_broke(&mut self) {
        self.close(DownCause::PeerMisbehaved {
            what: "wrote an impossible position into the ring that it reads",
        });
    }

    fn reader_broke(&mut self) {
        self.reader_is_corrupt = true;
        self.close(DownCause::PeerMisbehaved {
            what: "wrote an impossible position into the ring that it writes",
        });
    }

    /// Takes the lane's descriptors out of the set before they are closed.
    pub(crate) fn leave(&self, watch: &Watch) {
        watch.remove(&self.leash.link);
        watch.remove(&self.peer);
    }
}

fn send_region<M: Medium>(link: &Link, number: u32, region: &Registered<M::Region>, medium: &M) -> Sent {
    let Offer { form, payload, descriptor } = medium.offer(region);
    let offer = Described { form, payload, with_descriptor: descriptor.is_some() };
    debug_assert!(
        M::KIND.offers.iter().any(|known| {
            (known.number, known.payload_bytes, known.with_descriptor)
                == (form, payload.len(), offer.with_descriptor)
        }),
        "a medium offers what its kind knows, and not {offer:?}"
    );
    let bytes = region.memory.bytes() as u64;
    link.send(&Message::Region { number, bytes, offer }, descriptor.as_slice())
}

const PACKETS_AT_ONCE: usize = 64;
/// More than a socket holds of the smallest packets.
const LAST_WORDS: usize = 1024;
