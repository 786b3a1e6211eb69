//! Lanes: how they begin and end.

use std::collections::VecDeque;

use crossdock_memory::Memory;
use crossdock_transport::{DownCause, Error, Event, LaneTags, LocalId, PeerId, Result, Token};

use crate::events::Due;
use crate::options::Semantics;
use crate::wire::{End, Kind, Wire};
use crate::world::{Life, PortState, World};

/// One end of a lane.
pub(crate) struct Lane {
    pub peer: PeerId,
    pub state: State,
    pub remote: Option<End>,
    tags: Option<LaneTags>,
    /// What the peer said before this end was connected.
    early: Option<(End, Early)>,
    /// It has been up, so that there is something to end.
    pub was_up: bool,
    /// The peer's accesses have ended: by its word, or by its death.
    pub peer_has_stopped: bool,
    pub attachments: Vec<Attachment>,
    pub wire: Wire,
    /// When the last message in order comes; nothing in order comes before it.
    pub last_due_ns: u64,
    /// When the greeting comes; nothing at all comes before it.
    pub first_due_ns: u64,
    /// When the parts come of the op that has been taken in part.
    pub op_due_ns: u64,
    pub last_leave_ns: u64,
    /// Parts of ops that are not done, oldest first.
    pub parts: VecDeque<Part>,
    pub first_part: u64,
    pub pieces_in_flight: u32,
    pub immediates_in_flight: u32,
}

/// What a lane is doing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    Open,
    Connecting,
    Up,
    Closing { cause: DownCause },
    Down,
}

/// A peer's region, attached.
#[derive(Clone)]
pub(crate) struct Attachment {
    pub region: LocalId,
    pub bytes: u64,
    /// Where the port maps it. It stays mapped whatever the peer does with its region.
    pub mapped: Option<Memory>,
}

/// Part of an op, from its post until it is done.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part {
    pub done: bool,
    pub token: Option<Token>,
    pub local: Option<LocalId>,
    pub pieces: u32,
}

/// What a peer said early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Early {
    Hello { tag: [u8; 32] },
    Close,
}

impl Lane {
    pub fn new(peer: PeerId) -> Self {
        Self {
            peer,
            state: State::Open,
            remote: None,
            tags: None,
            early: None,
            was_up: false,
            peer_has_stopped: false,
            attachments: Vec::new(),
            wire: Wire::new(),
            last_due_ns: 0,
            first_due_ns: 0,
            op_due_ns: 0,
            last_leave_ns: 0,
            parts: VecDeque::new(),
            first_part: 0,
            pieces_in_flight: 0,
            immediates_in_flight: 0,
        }
    }

    /// The error for whoever uses a lane that is not up.
    pub fn require_up(&self, end: End) -> Result<()> {
        match self.state {
            State::Up => Ok(()),
            State::Open | State::Connecting => Err(Error::LaneNotUp { lane: end.lane }),
            State::Closing { .. } | State::Down => Err(Error::LaneDown { lane: end.lane }),
        }
    }
}

impl World {
    pub fn connect(&mut self, end: End, remote: End, tags: &LaneTags) -> Result<()> {
        let (here, there) = (self.port_at(end.port), self.ports.get(remote.port as usize));
        let there = there.ok_or(Error::BadAddress { reason: "of a port that never was" })?;
        let rules = |port: &PortState| (port.options.semantics, port.options.unordered);
        if rules(here) != rules(there) {
            return Err(Error::BadAddress { reason: "of a port with other rules" });
        }
        match self.known_lane(end)?.state {
            State::Open => {}
            State::Connecting | State::Up => {
                return Err(Error::BadAddress { reason: "the lane has been connected already" });
            }
            State::Closing { .. } | State::Down => return Err(Error::LaneDown { lane: end.lane }),
        }
        let lane = self.lane_mut(end);
        lane.state = State::Connecting;
        lane.remote = Some(remote);
        lane.tags = Some(*tags);
        let early = lane.early.take();
        if !self.is_rail_cut(end, remote) {
            self.tell(end, remote, Kind::Hello { tag: tags.ours });
        }
        let lane = self.lane_mut(end);
        lane.first_due_ns = lane.last_due_ns;
        let limit = self.now_ns + self.options.connect_ns;
        self.agenda.schedule(limit, Due::ConnectTimeout(end));
        match early {
            Some((from, Early::Hello { tag })) if from == remote => self.hear_hello(end, from, tag),
            Some((from, Early::Close)) if from == remote => {
                self.lane_mut(end).peer_has_stopped = true;
                self.begin_close(end, DownCause::ClosedByPeer, false);
            }
            Some((from, _)) => self.refuse(from),
            None => {}
        }
        Ok(())
    }

    /// An end says who it is.
    pub fn hear_hello(&mut self, end: End, from: End, tag: [u8; 32]) {
        let port = &mut self.ports[end.port as usize];
        let life = port.life;
        let Some(lane) = port.lanes.get_mut(end.lane.0 as usize).filter(|_| life == Life::Alive) else {
            return self.refuse(from);
        };
        match lane.state {
            State::Open if lane.early.is_none() => lane.early = Some((from, Early::Hello { tag })),
            State::Connecting if lane.remote == Some(from) => {
                if lane.tags.is_some_and(|tags| tags.theirs == tag) {
                    lane.state = State::Up;
                    lane.was_up = true;
                    self.push_event(end.port, Event::Up { lane: end.lane });
                    self.watch_partition(end, from);
                } else {
                    self.begin_close(end, DownCause::NotAuthentic, true);
                }
            }
            // An end that is closing has told its peer so already, or is telling it.
            State::Closing { .. } if lane.remote == Some(from) => {}
            _ => self.refuse(from),
        }
    }

    /// An end says that it has stopped.
    pub fn hear_close(&mut self, end: End, from: End, broken: bool) {
        let cause = match broken {
            true => DownCause::Broken { call: "recv", errno: ECONNRESET },
            false => DownCause::ClosedByPeer,
        };
        let port = &mut self.ports[end.port as usize];
        let life = port.life;
        if life == Life::Killed {
            // Nobody answers for the dead; their peers hear of the death itself.
            return;
        }
        let Some(lane) = port.lanes.get_mut(end.lane.0 as usize).filter(|_| life == Life::Alive) else {
            return self.peer_stopped(from);
        };
        match lane.state {
            State::Open => {
                lane.early = Some((from, Early::Close));
                self.tell(end, from, Kind::Close { broken: false });
            }
            State::Down => self.peer_stopped(from),
            _ if lane.remote != Some(from) => self.peer_stopped(from),
            State::Connecting | State::Up => {
                lane.peer_has_stopped = true;
                self.begin_close(end, cause, false);
            }
            State::Closing { .. } => self.peer_stopped(end),
        }
    }

    /// The peer of `end` touches it no more.
    pub fn peer_stopped(&mut self, end: End) {
        let mapped = self.port_at(end.port).options.semantics.is_mapped();
        let lane = self.lane_mut(end);
        lane.peer_has_stopped = true;
        if mapped && matches!(lane.state, State::Closing { .. }) {
            self.finish_close(end);
        }
    }

    /// An end that shares its host with a dead peer is going to have the proof.
    pub fn notice_death(&mut self, end: End) {
        if self.port_at(end.port).options.semantics == Semantics::Mapped {
            let notice = self.rng.within(self.options.death_notice);
            self.agenda.schedule(self.now_ns + notice, Due::PeerDied(end));
        }
    }

    /// What the peer of a lane said before this end was connected, is answered: nobody will.
    pub fn refuse_early(&mut self, end: End) {
        if let Some((from, _)) = self.lane_mut(end).early.take() {
            self.refuse(from);
        }
    }

    /// Tells an end that nobody takes it.
    fn refuse(&mut self, end: End) {
        let delay = self.rng.within(self.options.delay);
        self.lane_mut(end).peer_has_stopped = true;
        let cause = DownCause::Broken { call: "connect", errno: ECONNREFUSED };
        self.agenda.schedule(self.now_ns + delay, Due::Fails { end, cause });
    }

    /// Stops posting, tells the peer, and says `Down` as soon as the semantics allow it.
    pub fn begin_close(&mut self, end: End, cause: DownCause, broken: bool) {
        let semantics = self.port_at(end.port).options.semantics;
        let lane = self.lane_mut(end);
        let peer_has_stopped = lane.peer_has_stopped;
        match lane.state {
            State::Open => {
                lane.state = State::Closing { cause };
                self.finish_close(end);
            }
            State::Connecting | State::Up => {
                lane.state = State::Closing { cause };
                let remote = lane.remote;
                self.cut(end);
                if let Some(remote) = remote {
                    self.tell(end, remote, Kind::Close { broken });
                }
                match semantics {
                    Semantics::Checked | Semantics::Verbs => {
                        let drain = self.rng.within(self.options.drain);
                        self.agenda.schedule(self.now_ns + drain, Due::Drained(end));
                    }
                    _ if peer_has_stopped => self.finish_close(end),
                    Semantics::Mapped => {}
                    // Nobody proves a death here: in the end the lane is given up on.
                    Semantics::Fabric => {
                        let limit = self.now_ns + self.options.silence_ns;
                        self.agenda.schedule(limit, Due::Drained(end));
                    }
                }
            }
            State::Closing { .. } | State::Down => {}
        }
    }

    /// Says `Down`.
    pub fn finish_close(&mut self, end: End) {
        let State::Closing { cause } = self.lane(end).state else { return };
        let port = &mut self.ports[end.port as usize];
        let lane = &mut port.lanes[end.lane.0 as usize];
        lane.state = State::Down;
        lane.attachments = Vec::new();
        lane.tags = None;
        for part in lane.parts.drain(..).filter(|part| !part.done) {
            if let Some(region) = part.local.and_then(|local| port.regions[local.0 as usize].as_mut()) {
                region.parts_in_flight -= 1;
            }
        }
        self.push_event(end.port, Event::Down { lane: end.lane, cause });
    }

    /// An end finds its lane broken, and nothing more comes from the peer on it.
    pub fn fail(&mut self, end: End, cause: DownCause) {
        let fabric = self.port_at(end.port).options.semantics == Semantics::Fabric;
        self.begin_close(end, cause, true);
        if fabric || self.lane(end).peer_has_stopped {
            self.peer_stopped(end);
        }
    }
}

pub(crate) const ECONNRESET: i32 = 104;
pub(crate) const ETIMEDOUT: i32 = 110;
const ECONNREFUSED: i32 = 111;
