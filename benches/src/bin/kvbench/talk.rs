//! What the two processes of a benchmark say to each other beside the library: one JSON object a line.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::os::fd::{AsFd, AsRawFd};
use std::sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel};
use std::time::Duration;

use crossdock::Memory;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::lanes::LaneEnd;
use crate::replay::{Orders, Told};
use crate::setup::{Setup, WAIT};

/// From the initiator.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Ask {
    Setup(Box<Setup>),
    /// The initiator's node is up; this is its number, and where its pool is.
    Meet {
        node: u64,
        place: Place,
    },
    /// Write the source pages of a pass.
    Fill(Pass),
    /// Open the rooms of a pass.
    Open(Pass),
    /// The clock runs: wait until they have ended.
    Go,
    /// Compare the pages of a pass with what they should hold.
    Check(Pass),
    /// Move the pages of a pass over bare connections.
    Stream(Pass),
    /// Open the other ends of these bare lanes over RDMA.
    Lanes(Vec<LaneEnd>),
    /// Answer single pages, as many as the pass has.
    Bounce(Pass),
    /// The same without the library.
    BareBounce(Pass),
    /// Let single pages be fetched without the library.
    BareServe(Pass),
    /// Take single pages that come seldom, and count how often the progress thread sleeps.
    Trickle(Pass),
    /// Prepare the other side of a replay.
    Replay(Box<Orders>),
    /// The replay begins: now, or where the clock is the same, at this time.
    Begin {
        start_ns: Option<u64>,
    },
}

/// From the target.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    Ready(Box<Ready>),
    Lanes(Vec<LaneEnd>),
    Done {
        cpu_s: f64,
    },
    Checked {
        wrong_pages: u64,
    },
    /// Of single pages that come seldom: [`crate::trips::Slept`].
    Slept {
        times: u64,
        batches: u64,
    },
    Replayed(Box<Told>),
    Failed {
        why: String,
    },
}

/// The target is set up.
#[derive(Debug, Serialize, Deserialize)]
pub struct Ready {
    /// What its node listens on.
    pub address: String,
    /// Its node's number.
    pub node: u64,
    /// Where bare connections are taken.
    pub stream_port: u16,
    pub place: Place,
    /// The descriptor of the words with which single pages are told of.
    pub flags: Option<i32>,
}

/// A process and its pool in it: a descriptor, where it has one, and an address.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Place {
    pub process: i32,
    pub descriptor: Option<i32>,
    pub base: u64,
}

impl Place {
    /// Of a pool of this process.
    pub fn of(memory: &Memory) -> Self {
        Self {
            process: std::process::id() as i32,
            descriptor: memory.fd().map(|fd| fd.as_fd().as_raw_fd()),
            base: memory.base().expose_provenance() as u64,
        }
    }
}

/// One pass over fresh pages. Both processes make the same lists of it.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Pass {
    /// Where the permutations come from.
    pub seed: u64,
    /// What the content comes from.
    pub salt: u64,
    /// The number of the first room; the others follow.
    pub first_room: u64,
    /// Pages of each room.
    pub rooms: Vec<u32>,
}

impl Pass {
    pub fn pages(&self) -> u32 {
        self.rooms.iter().sum()
    }
}

/// The connection on which they talk. A thread reads, so that the other end can be waited for with a deadline, or
/// looked for between two turns of a progress loop.
pub struct Talk<M> {
    stream: TcpStream,
    heard: Receiver<M>,
}

impl<M: DeserializeOwned + Send + 'static> Talk<M> {
    pub fn new(stream: TcpStream) -> std::io::Result<Self> {
        stream.set_nodelay(true)?;
        stream.set_write_timeout(Some(WAIT))?;
        let reader = BufReader::new(stream.try_clone()?);
        let (tell, heard) = channel();
        std::thread::Builder::new().name("talk".into()).spawn(move || {
            for line in reader.lines() {
                let Ok(message) = line.map_err(drop).and_then(|l| serde_json::from_str(&l).map_err(drop))
                else {
                    return;
                };
                if tell.send(message).is_err() {
                    return;
                }
            }
        })?;
        Ok(Self { stream, heard })
    }

    pub fn say(&mut self, what: &impl Serialize) -> Result<(), Error> {
        let mut line =
            serde_json::to_vec(what).map_err(|error| Error::Unexpected { said: error.to_string() })?;
        line.push(b'\n');
        self.stream.write_all(&line).map_err(|error| match Error::exchange("talking")(error) {
            silent @ Error::NoAnswer { .. } => silent,
            _ => Error::PeerGone,
        })
    }

    /// What the other end has said, if anything.
    pub fn hear(&self) -> Result<Option<M>, Error> {
        match self.heard.try_recv() {
            Ok(message) => Ok(Some(message)),
            Err(TryRecvError::Empty) => Ok(None),
            Err(TryRecvError::Disconnected) => Err(Error::PeerGone),
        }
    }

    /// What the other end says next; `None` if it says nothing for so long.
    pub fn hear_within(&self, limit: Duration) -> Result<Option<M>, Error> {
        match self.heard.recv_timeout(limit) {
            Ok(message) => Ok(Some(message)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            Err(RecvTimeoutError::Disconnected) => Err(Error::PeerGone),
        }
    }

    pub fn local_ip(&self) -> std::io::Result<std::net::IpAddr> {
        self.stream.local_addr().map(|address| address.ip())
    }

    pub fn peer_ip(&self) -> std::io::Result<std::net::IpAddr> {
        self.stream.peer_addr().map(|address| address.ip())
    }
}
