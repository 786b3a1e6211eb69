//! The beginning of a connection: each end says which lane it is for and shows its tag, before anything else.

use std::os::fd::OwnedFd;
use std::time::Instant;

use crossdock_transport::{DownCause, LaneTags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags, sockopt};

use crate::frame::{Cookie, HELLO_BYTES, Hello};
use crate::requests::REQUESTS_MAX;

/// What a lane knows of the other end.
pub(crate) struct Appointment {
    /// The cookie of this end.
    pub ours: Cookie,
    /// The cookie of the other end.
    pub theirs: Cookie,
    pub tags: LaneTags,
    /// The nonce of this port.
    pub nonce: u64,
    pub deadline: Instant,
}

impl Appointment {
    /// What this end says.
    fn hello(&self) -> Hello {
        Hello {
            welcome: true,
            requests_max: REQUESTS_MAX,
            from: self.ours,
            to: self.theirs,
            tag: self.tags.ours,
            nonce: self.nonce,
        }
    }

    /// Answers a connection that came in. Its greeting names this lane and the expected other end.
    pub fn answer(&self, socket: &OwnedFd, hello: &Hello) -> Result<(), DownCause> {
        if hello.shows(&self.tags.theirs) {
            return say(socket, &self.hello());
        }
        // Our tag is not shown to somebody who has not shown the right one.
        say(socket, &Hello { welcome: false, tag: [0; 32], nonce: 0, ..self.hello() })?;
        Err(DownCause::NotAuthentic)
    }
}

/// A connection that this end makes.
pub(crate) struct Dial {
    pub socket: OwnedFd,
    pub appointment: Appointment,
    said: bool,
    answer: Collected,
}

impl Dial {
    pub fn new(socket: OwnedFd, appointment: Appointment) -> Self {
        Self { socket, appointment, said: false, answer: Collected::new() }
    }

    /// Goes on as far as possible. The lane is up when the other end's greeting is there.
    pub fn advance(&mut self) -> Result<Option<Hello>, DownCause> {
        if !self.said {
            let broken = |code: Errno| DownCause::Broken { call: "connect", errno: code.raw_os_error() };
            sockopt::socket_error(&self.socket).and_then(|outcome| outcome).map_err(broken)?;
            match rustix::net::getpeername(&self.socket) {
                Ok(_) => say(&self.socket, &self.appointment.hello())?,
                Err(Errno::NOTCONN) => return Ok(None),
                Err(code) => return Err(broken(code)),
            }
            self.said = true;
        }
        if !self.answer.collect(&self.socket)? {
            return Ok(None);
        }
        let hello = Hello::decode(&self.answer.bytes)?;
        let (ours, theirs) = (&self.appointment.ours, &self.appointment.theirs);
        if !hello.welcome
            || (&hello.from, &hello.to) != (theirs, ours)
            || !hello.shows(&self.appointment.tags.theirs)
        {
            return Err(DownCause::NotAuthentic);
        }
        Ok(Some(hello))
    }
}

/// A connection that came in and has not said which lane it is for.
pub(crate) struct Caller {
    pub socket: OwnedFd,
    /// Its number among the callers of this port.
    pub number: u32,
    pub deadline: Instant,
    said: Collected,
}

impl Caller {
    pub fn new(socket: OwnedFd, number: u32, deadline: Instant) -> Self {
        Self { socket, number, deadline, said: Collected::new() }
    }

    /// Listens as far as possible; `None` while the greeting is not complete.
    pub fn advance(&mut self) -> Result<Option<Hello>, DownCause> {
        if !self.said.collect(&self.socket)? {
            return Ok(None);
        }
        Hello::decode(&self.said.bytes).map(Some)
    }
}

/// A greeting as far as it has come. Nothing behind it is read.
struct Collected {
    bytes: [u8; HELLO_BYTES],
    len: usize,
}

impl Collected {
    fn new() -> Self {
        Self { bytes: [0; HELLO_BYTES], len: 0 }
    }

    /// Whether the greeting is complete.
    fn collect(&mut self, socket: &OwnedFd) -> Result<bool, DownCause> {
        while self.len < HELLO_BYTES {
            match rustix::net::recv(socket, &mut self.bytes[self.len..], RecvFlags::DONTWAIT) {
                Ok((0, _)) => return Err(DownCause::Broken { call: "recv", errno: 0 }),
                Ok((bytes, _)) => self.len += bytes,
                Err(Errno::AGAIN) => return Ok(false),
                Err(Errno::INTR) => {}
                Err(code) => return Err(DownCause::Broken { call: "recv", errno: code.raw_os_error() }),
            }
        }
        Ok(true)
    }
}

/// Says a greeting. The send buffer of a new connection takes it whole.
fn say(socket: &OwnedFd, hello: &Hello) -> Result<(), DownCause> {
    let bytes = hello.encode();
    match rustix::net::send(socket, &bytes, SendFlags::NOSIGNAL | SendFlags::DONTWAIT) {
        Ok(sent) if sent == bytes.len() => Ok(()),
        Ok(_) => Err(DownCause::Broken { call: "send", errno: Errno::NOBUFS.raw_os_error() }),
        Err(code) => Err(DownCause::Broken { call: "send", errno: code.raw_os_error() }),
    }
}
