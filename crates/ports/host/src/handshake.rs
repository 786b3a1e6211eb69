//! How two lanes become one: the end with the smaller cookie dials and says `Hello`, the other answers `Welcome`.

use std::os::fd::{AsFd, OwnedFd};

use crossdock_memory::{AllocateOptions, Memory, MemoryError};
use crossdock_transport::DownCause;
use subtle::ConstantTimeEq;

use crate::doorbell::Doorbell;
use crate::guests::{Guest, Introduced};
use crate::joined::{Introduction, Joined};
use crate::lane::{Lane, Pact, Stage};
use crate::link::{Link, Received, Sent};
use crate::medium::Medium;
use crate::message::{Greeting, Message};
use crate::peer::{Peer, Unfit};
use crate::port::HostPort;
use crate::remote::Leash;
use crate::ring::{self, Place};
use crate::watch::Ready;

impl<M: Medium> HostPort<M> {
    /// Dials the port of the other end, or finds it too busy and leaves it for the next look around.
    pub(crate) fn dial(&mut self, id: u32) {
        let Some(lane) = self.lanes.get(id) else { return };
        let Stage::Dialing(pact) = lane.stage else { return };
        let greeting = self.greeting(lane, &pact);
        let link = match Link::dial(M::KIND, &pact.remote.socket) {
            Ok(link) => link,
            Err(rustix::io::Errno::AGAIN) => return,
            Err(errno) => return self.give_up(id, broken("connect", errno)),
        };
        let peer = match Peer::of(link.as_fd()) {
            Ok(peer) => peer,
            Err(unfit) => return self.give_up(id, unfit.into()),
        };
        if let Err(errno) = self.observe(id, &link, &peer) {
            return self.give_up(id, broken("epoll_ctl", errno));
        }
        match link.send(&Message::Hello(greeting), &[self.bell.as_fd()]) {
            Sent::Yes => {
                if let Some(lane) = self.lanes.get_mut(id) {
                    lane.stage = Stage::Greeting(pact, Leash::new(link), peer);
                }
            }
            refusal => {
                self.watch.remove(&link);
                self.watch.remove(&peer);
                // Where it is only full, too many descriptors of this user are on their way; the lane dials again.
                if let Sent::Gone(errno) = refusal {
                    self.give_up(id, broken("sendmsg", errno));
                }
            }
        }
    }

    /// Accepts who dials.
    pub(crate) fn welcome_guests(&mut self) {
        self.guests.welcome(&self.listener, &self.watch, self.options.connect_timeout, &mut self.counters);
    }

    /// Hears whom a guest wants.
    pub(crate) fn hear_guest(&mut self, number: u32) {
        let Some(greeting) = self.guests.hear(number, &self.watch, &mut self.counters) else { return };
        let wanted = self.lanes.iter().find(|(_, lane)| lane.cookie == greeting.to);
        match wanted.map(|(id, lane)| (id, &lane.stage)) {
            Some((id, Stage::Expecting(pact))) if pact.remote.cookie == greeting.from => {
                self.seat(number, id)
            }
            // The owner of this end has not been told yet who the other one is.
            Some((_, Stage::Open)) => {}
            _ => {
                self.counters.connections_refused += 1;
                self.guests.send_away(number, &self.watch);
            }
        }
    }

    /// Looks whether the other end of a lane has dialed already.
    pub(crate) fn meet_guest(&mut self, id: u32) {
        if let Some(lane) = self.lanes.get(id)
            && let Stage::Expecting(pact) = &lane.stage
            && let Some(guest) = self.guests.find(&lane.cookie, &pact.remote.cookie)
        {
            self.seat(guest, id);
        }
    }

    /// Gives a guest the lane that it wants, if it proves that it belongs there.
    fn seat(&mut self, number: u32, id: u32) {
        let Some(introduced) = self.guests.take(number, &self.watch) else { return };
        let Some(lane) = self.lanes.get(id) else { return };
        let Stage::Expecting(pact) = lane.stage else { return };
        let Introduced { guest: Guest { link, peer, .. }, greeting: theirs, bell } = introduced;
        if !bool::from(theirs.tag.ct_eq(&pact.tags.theirs)) {
            return self.give_up(id, DownCause::NotAuthentic);
        }
        let ours = self.greeting(lane, &pact);
        let rings = Rings { dialer: theirs.immediates, accepter: ours.immediates };
        if !rings.are_possible() {
            return self.give_up(id, DownCause::PeerMisbehaved { what: "asked for an impossible ring" });
        }
        let options = AllocateOptions { name: "crossdock-lane".into(), ..Default::default() };
        let memory = match Memory::allocate(rings.bytes(), &options) {
            Ok(memory) => memory,
            Err(error) => return self.give_up(id, no_memory("memfd_create", &error)),
        };
        let Some(ring_fd) = memory.fd() else { unreachable!("memory allocated here has a descriptor") };
        if let Err(errno) = self.observe(id, &link, &peer) {
            return self.give_up(id, broken("epoll_ctl", errno));
        }
        let leash = Leash::new(link);
        let refusal = match leash.link.send(&Message::Welcome(ours), &[self.bell.as_fd(), ring_fd]) {
            Sent::Yes => None,
            Sent::Full => Some(rustix::io::Errno::TOOMANYREFS),
            Sent::Gone(errno) => Some(errno),
        };
        if let Some(errno) = refusal {
            self.watch.remove(&leash.link);
            self.watch.remove(&peer);
            return self.give_up(id, broken("sendmsg", errno));
        }
        let introduction = Introduction {
            leash,
            peer,
            bell,
            greeting: theirs,
            outbound: rings.to_dialer(&memory),
            inbound: rings.to_accepter(&memory),
            deadline: pact.deadline,
        };
        self.join(id, introduction);
    }

    /// Hears a lane's peer.
    pub(crate) fn hear_lane(&mut self, id: u32) {
        let Some(lane) = self.lanes.get_mut(id) else { return };
        match &mut lane.stage {
            Stage::Joined(joined) => joined.listen(&mut self.medium, &self.watch, &mut self.counters),
            Stage::Greeting(_, leash, peer) => {
                let cause = match leash.link.receive() {
                    Received::Nothing if !peer.is_dead() => return,
                    Received::Message(Message::Welcome(greeting), [Some(bell), Some(rings)]) => {
                        return self.be_welcomed(id, greeting, bell, rings);
                    }
                    Received::Message(Message::Closed, _) => DownCause::ClosedByPeer,
                    Received::Message(..) | Received::Nonsense => {
                        DownCause::PeerMisbehaved { what: "answered a greeting with something else" }
                    }
                    _ if peer.is_dead() => DownCause::PeerDied,
                    Received::Broken { call, errno } => broken(call, errno),
                    Received::Nothing | Received::End => DownCause::Broken { call: "recvmsg", errno: 0 },
                };
                lane.close(cause, &self.watch);
            }
            _ => {}
        }
    }

    /// Takes up the lane that the other end has granted, if it proves that it may.
    fn be_welcomed(&mut self, id: u32, theirs: Greeting, bell: OwnedFd, rings_fd: OwnedFd) {
        let Some(lane) = self.lanes.get_mut(id) else { return };
        let Stage::Greeting(pact, ..) = &lane.stage else { return };
        let pact = *pact;
        let misbehaved = |what| DownCause::PeerMisbehaved { what };
        if theirs.from != pact.remote.cookie || theirs.to != lane.cookie {
            return self.give_up(id, misbehaved("answered for another lane"));
        }
        if !bool::from(theirs.tag.ct_eq(&pact.tags.theirs)) {
            return self.give_up(id, DownCause::NotAuthentic);
        }
        let rings = Rings { dialer: self.options.immediates_per_lane, accepter: theirs.immediates };
        if !rings.are_possible() {
            return self.give_up(id, misbehaved("asked for an impossible ring"));
        }
        let Some(bell) = Doorbell::of_peer(bell) else {
            return self.give_up(id, misbehaved("passed a doorbell that can block"));
        };
        let memory = match Memory::from_fd(rings_fd, rings.bytes()) {
            Ok(memory) => memory,
            Err(MemoryError::NotSealed | MemoryError::FileTooShort { .. }) => {
                return self.give_up(id, misbehaved("passed rings that could be cut short"));
            }
            Err(error) => return self.give_up(id, no_memory("mmap", &error)),
        };
        if let Stage::Greeting(_, leash, peer) = std::mem::replace(&mut lane.stage, Stage::Open) {
            let introduction = Introduction {
                leash,
                peer,
                bell,
                greeting: theirs,
                outbound: rings.to_accepter(&memory),
                inbound: rings.to_dialer(&memory),
                deadline: pact.deadline,
            };
            self.join(id, introduction);
        }
    }

    fn join(&mut self, id: u32, introduction: Introduction) {
        let most = self.options.immediates_per_lane as usize;
        let mut joined = Box::new(Joined::new(introduction, &self.regions, &self.descriptors, most));
        joined.flush(&self.regions, &self.medium);
        if let Some(lane) = self.lanes.get_mut(id) {
            lane.stage = Stage::Joined(joined);
        }
        // What the peer sent behind its greeting is there already.
        self.hear_lane(id);
    }

    fn greeting(&self, lane: &Lane<M>, pact: &Pact) -> Greeting {
        Greeting {
            from: lane.cookie,
            to: pact.remote.cookie,
            tag: pact.tags.ours,
            port: *self.name,
            port_address: (&raw const *self.name).expose_provenance() as u64,
            immediates: self.options.immediates_per_lane,
        }
    }

    fn observe(&self, id: u32, link: &Link, peer: &Peer) -> Result<(), rustix::io::Errno> {
        self.watch.add(link, Ready::Socket(id))?;
        self.watch.add(peer, Ready::Process(id)).inspect_err(|_| self.watch.remove(link))
    }

    fn give_up(&mut self, id: u32, cause: DownCause) {
        if let Some(lane) = self.lanes.get_mut(id) {
            lane.close(cause, &self.watch);
        }
    }
}

/// The two rings of a lane, one behind the other; each is as long as its writer wants it.
#[derive(Clone, Copy)]
struct Rings {
    dialer: u32,
    accepter: u32,
}

impl Rings {
    fn are_possible(self) -> bool {
        [self.dialer, self.accepter]
            .iter()
            .all(|slots| slots.is_power_of_two() && *slots <= ring::MAX_CAPACITY)
    }

    fn bytes(self) -> usize {
        Place::<Memory>::bytes(self.dialer) + Place::<Memory>::bytes(self.accepter)
    }

    /// Where the dialer writes.
    fn to_accepter(self, memory: &Memory) -> Place<Memory> {
        Place::in_memory(memory, 0, self.dialer).expect("the memory was made for both rings")
    }

    /// Where the accepter writes.
    fn to_dialer(self, memory: &Memory) -> Place<Memory> {
        let offset = Place::<Memory>::bytes(self.dialer);
        Place::in_memory(memory, offset, self.accepter).expect("the memory was made for both rings")
    }
}

impl From<Unfit> for DownCause {
    fn from(unfit: Unfit) -> Self {
        match unfit {
            Unfit::OtherUser => DownCause::NotAuthentic,
            Unfit::OutOfSight => DownCause::Broken { call: "getsockopt(SO_PEERCRED)", errno: libc::ESRCH },
            Unfit::Os { call, errno } => DownCause::Broken { call, errno },
        }
    }
}

fn broken(call: &'static str, errno: rustix::io::Errno) -> DownCause {
    DownCause::Broken { call, errno: errno.raw_os_error() }
}

fn no_memory(call: &'static str, error: &MemoryError) -> DownCause {
    match *error {
        MemoryError::Refused { call, code } => DownCause::Broken { call, errno: code },
        MemoryError::TooManyFiles => DownCause::Broken { call, errno: libc::EMFILE },
        _ => DownCause::Broken { call, errno: libc::ENOMEM },
    }
}
