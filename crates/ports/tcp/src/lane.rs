//! The life of a lane, from its name to its end.

use std::os::fd::OwnedFd;
use std::time::Instant;

use crossdock_transport::{DownCause, Error, Event, Events, LaneId, PeerId, Result};
use rustix::net::Shutdown;

use crate::connection::{Connection, Farewell, drain};
use crate::domain::Domain;
use crate::frame::{Cookie, Hello};
use crate::greeting::{Appointment, Dial};

pub(crate) struct Lane {
    pub id: LaneId,
    pub peer: PeerId,
    pub cookie: Cookie,
    pub state: State,
    /// Whether it is in the port's queue of lanes that want a turn.
    pub queued: bool,
}

/// Where a lane is in its life. Nothing but this order is possible, and any state can be followed by `Ended`.
pub(crate) enum State {
    /// It has an address. The other end may have dialled before this end was told to connect.
    Open {
        early: Option<(OwnedFd, Hello)>,
    },
    /// The other end will dial.
    Waiting(Box<Appointment>),
    /// This end has dialled.
    Dialing(Box<Dial>),
    Up(Box<Connection>),
    /// Closed here; what was posted is still being sent. Nothing lands any more.
    Closing {
        connection: Box<Connection>,
        deadline: Instant,
    },
    /// Ended, and `Down` is still to be said.
    Ended(DownCause),
    /// `Down` was said. The socket stays until the peer has closed its end: closing it while the peer still sends
    /// would make the kernel reset the connection, and our last frames could be lost.
    Lingering {
        socket: OwnedFd,
        deadline: Instant,
    },
}

/// What a lane needs after a turn.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum After {
    /// A word from the kernel.
    Sleep,
    /// Another turn.
    Again,
    /// Nothing ever again.
    Remove,
}

impl Lane {
    pub fn turn(&mut self, domain: &mut Domain, events: &mut Events) -> After {
        loop {
            match &mut self.state {
                State::Open { .. } | State::Waiting(_) => return After::Sleep,
                State::Dialing(dial) => match dial.advance() {
                    Ok(None) => return After::Sleep,
                    Ok(Some(hello)) => self.come_up(&hello),
                    Err(cause) => self.state = State::Ended(cause),
                },
                State::Up(connection) => match connection.turn(domain, events) {
                    Ok(()) if connection.wants_turn() => return After::Again,
                    Ok(()) => return After::Sleep,
                    Err(cause) => self.state = State::Ended(cause),
                },
                State::Closing { connection, deadline } => {
                    let farewell = connection.turn_closing(domain, events);
                    if farewell == Farewell::NotYet {
                        return if connection.wants_turn() { After::Again } else { After::Sleep };
                    }
                    if events.is_full() {
                        return After::Again;
                    }
                    events.push(Event::Down { lane: self.id, cause: DownCause::ClosedHere });
                    if farewell == Farewell::Gone {
                        return After::Remove;
                    }
                    let deadline = *deadline;
                    self.linger(deadline);
                }
                State::Ended(cause) => {
                    if events.is_full() {
                        return After::Again;
                    }
                    events.push(Event::Down { lane: self.id, cause: *cause });
                    return After::Remove;
                }
                State::Lingering { socket, .. } => {
                    return match drain(socket) {
                        (_, true) => After::Remove,
                        (true, false) => After::Sleep,
                        (false, false) => After::Again,
                    };
                }
            }
        }
    }

    /// From dialling to up.
    fn come_up(&mut self, hello: &Hello) {
        match std::mem::replace(&mut self.state, State::Ended(DownCause::ClosedHere)) {
            State::Dialing(dial) => {
                self.state = State::Up(Connection::new(self.id, self.peer, dial.socket, hello));
            }
            _ => unreachable!("only a dialling lane hears the other end's answer"),
        }
    }

    /// From closing to lingering.
    fn linger(&mut self, deadline: Instant) {
        match std::mem::replace(&mut self.state, State::Ended(DownCause::ClosedHere)) {
            State::Closing { connection, .. } => {
                let socket = connection.socket;
                // It fails when the peer has reset the connection, and then there is nobody left to tell.
                let _ = rustix::net::shutdown(&socket, Shutdown::Write);
                self.state = State::Lingering { socket, deadline };
            }
            _ => unreachable!("only a closing lane says farewell"),
        }
    }

    /// The connection, if something can be posted on it.
    pub fn connected(&mut self) -> Result<&mut Connection> {
        let lane = self.id;
        match &mut self.state {
            State::Up(connection) if connection.send_failed.is_some() => Err(Error::LaneDown { lane }),
            State::Up(connection) if connection.announced => Ok(connection),
            State::Open { .. } | State::Waiting(_) | State::Dialing(_) | State::Up(_) => {
                Err(Error::LaneNotUp { lane })
            }
            State::Closing { .. } | State::Ended(_) | State::Lingering { .. } => {
                Err(Error::LaneDown { lane })
            }
        }
    }

    /// The connected state, also while it closes.
    pub fn connection(&self) -> Option<&Connection> {
        match &self.state {
            State::Up(connection) | State::Closing { connection, .. } => Some(connection),
            _ => None,
        }
    }

    /// When something has to happen at the latest.
    pub fn deadline(&self) -> Option<Instant> {
        match &self.state {
            State::Waiting(appointment) => Some(appointment.deadline),
            State::Dialing(dial) => Some(dial.appointment.deadline),
            State::Closing { deadline, .. } | State::Lingering { deadline, .. } => Some(*deadline),
            State::Open { .. } | State::Up(_) | State::Ended(_) => None,
        }
    }

    /// What happens when the deadline has passed.
    pub fn expire(&mut self) -> After {
        match self.state {
            State::Waiting(_) | State::Dialing(_) => {
                self.state = State::Ended(DownCause::ConnectTimedOut);
                After::Again
            }
            State::Closing { .. } => {
                self.state = State::Ended(DownCause::ClosedHere);
                After::Again
            }
            State::Lingering { .. } => After::Remove,
            State::Open { .. } | State::Up(_) | State::Ended(_) => After::Sleep,
        }
    }
}
