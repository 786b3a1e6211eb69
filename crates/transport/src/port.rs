//! The trait, and the small types that its methods speak in.

use std::fmt;
use std::os::fd::BorrowedFd;
use std::sync::Arc;

use crossdock_memory::{Memory, MemoryKind};

use crate::{Error, Events, Grant, GrantId, Op, Posted, Result};

/// One opened device: one rail of a node.
///
/// Owned by one thread and never shared. No method blocks: what takes time is answered by an event.
/// The whole of a port's state is bounded; its limits are in its own configuration.
pub trait Port: Send {
    /// What this port is. Constant for the life of the port.
    fn info(&self) -> &PortInfo;

    /// Makes `memory` usable in ops of this port, and by peers as far as [grants](Port::grant) allow.
    ///
    /// The key goes to the peers, who [attach](Port::attach) it. The port keeps the memory alive until
    /// [`deregister`](Port::deregister).
    fn register(&mut self, memory: &Memory) -> Result<(LocalId, RemoteKey)>;

    /// Ends a registration. [`Error::RegionInUse`] while an op or a grant still uses the region, and where its memory is
    /// the caller's, as long as the peer of a revoked grant could still write there by itself.
    fn deregister(&mut self, region: LocalId) -> Result<()>;

    /// Makes one end of a connection to `peer`. The address goes to the other end.
    fn open_lane(&mut self, peer: PeerId) -> Result<(LaneId, LaneAddress)>;

    /// Connects an open lane to the other end. Answered by [`Up`](crate::Event::Up) or
    /// [`Down`](crate::Event::Down); until then posting is an error. The tags prove to each end that the other is
    /// who the handshake said.
    fn connect(&mut self, lane: LaneId, remote: &LaneAddress, tags: &LaneTags) -> Result<()>;

    /// Makes a peer's region usable as the remote end of ops on `lane`, which must be up.
    ///
    /// [`Error::NotYet`]: the peer's port has not been heard of this region yet; call again after a poll.
    fn attach(&mut self, lane: LaneId, key: &RemoteKey) -> Result<Attached>;

    /// Allows one peer to write or read pages. Posting names the grant; ports that can check, check.
    fn grant(&mut self, grant: &Grant<'_>) -> Result<()>;

    /// Takes a grant back, and says what this port alone can promise about its pages.
    ///
    /// Revoking an unknown grant is [`Fence::Now`]: nothing can land under it.
    fn revoke(&mut self, grant: GrantId) -> Fence;

    /// Begins to close a lane. Answered by exactly one [`Down`](crate::Event::Down), now or when the peer's part is
    /// proven. Closing a lane twice, or one that is unknown, does nothing.
    fn close(&mut self, lane: LaneId);

    /// Hands ops to a lane, in order, and says how far it came. A short post is back-pressure, not an error: the
    /// caller offers the rest again later (see [`Op::advance`]). An error speaks of the first op of the slice,
    /// of which then nothing was taken; ops before a bad one are taken and reported first.
    fn post(&mut self, lane: LaneId, ops: &[Op<'_>]) -> Result<Posted>;

    /// Makes progress, and reports what happened as far as `events` has room. Work in one call is bounded.
    fn poll(&mut self, events: &mut Events);

    /// Prepares for sleep. After [`Arm::Sleep`], the descriptor becomes readable when the next poll would find
    /// something; the promise ends with the next call of `poll`.
    fn arm(&mut self) -> Arm<'_> {
        Arm::Spin
    }
}

/// For ports that reach the host's memory alone: refuses a device's.
pub fn require_host_memory(memory: &Memory) -> Result<()> {
    match memory.kind() {
        MemoryKind::Device => Err(Error::Unsupported {
            what: "registration of a device's memory with a port that reaches the host's alone",
            advice: "use a port of the device (cuda), or an RDMA device that reaches it (verbs); or stage in host memory",
        }),
        _ => Ok(()),
    }
}

/// What a port is and can do.
#[derive(Clone, Debug)]
pub struct PortInfo {
    /// The transport: `"sim"`, `"shm"`, `"tcp"`, `"verbs"`, `"cuda"`. Only ports of one kind connect.
    pub kind: &'static str,
    /// This port among others of its kind, for logs and errors.
    pub name: String,
    /// Two ports of one kind can connect only if this text is the same on both (shm: the host and the user).
    /// Empty: any two can try.
    pub reach: String,
    /// The NUMA node of the device, where that means something.
    pub numa_node: Option<u32>,
    /// What the medium can carry, in one direction; rails are loaded in this proportion.
    pub bytes_per_second: u64,
    /// Whether an immediate is seen only after the bytes of every earlier op *of its lane*. Where false, each
    /// op carries its own immediate.
    pub ordered: bool,
    /// How many immediates may be on their way on one lane before posting comes back short.
    pub immediates_in_flight: u32,
}

/// The node's number for a peer. Grants are given to a peer, and every lane belongs to one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PeerId(pub u32);

/// One connection of one port. Never reused within the life of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LaneId(pub u32);

/// A region registered at this port. Never reused within the life of a port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LocalId(pub u32);

/// A peer's region, attached to one lane of this port.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RemoteId(pub u32);

/// What the other end of a lane needs to connect to this one. Opaque but to ports of the same kind.
#[derive(Clone, PartialEq, Eq)]
pub struct LaneAddress(Box<[u8]>);

/// What a peer needs to use a region. Opaque but to ports of the same kind.
#[derive(Clone, PartialEq, Eq)]
pub struct RemoteKey(Box<[u8]>);

impl LaneAddress {
    /// The longest address that the control stream carries.
    pub const MAX_BYTES: usize = 256;

    /// Takes the bytes of an address; [`Error::BadAddress`] if they are too many.
    pub fn new(bytes: &[u8]) -> Result<Self> {
        if bytes.len() > Self::MAX_BYTES {
            return Err(Error::BadAddress { reason: "longer than an address can be" });
        }
        Ok(Self(bytes.into()))
    }

    /// The bytes, to be carried to the peer.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl RemoteKey {
    /// The longest key that the control stream carries.
    pub const MAX_BYTES: usize = 256;

    /// Takes the bytes of a key; [`Error::BadKey`] if they are too many.
    pub fn new(bytes: &[u8]) -> Result<Self> {
        if bytes.len() > Self::MAX_BYTES {
            return Err(Error::BadKey { reason: "longer than a key can be" });
        }
        Ok(Self(bytes.into()))
    }

    /// The bytes, to be carried to the peer.
    pub fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for LaneAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "LaneAddress({} bytes)", self.0.len())
    }
}

impl fmt::Debug for RemoteKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "RemoteKey({} bytes)", self.0.len())
    }
}

/// What each end of a lane shows to the other first, derived from the session's key. A lane whose peer shows
/// anything else goes [`Down`](crate::Event::Down) with [`DownCause::NotAuthentic`](crate::DownCause::NotAuthentic).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct LaneTags {
    /// What this end shows.
    pub ours: [u8; 32],
    /// What the other end must show.
    pub theirs: [u8; 32],
}

impl fmt::Debug for LaneTags {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The tags are secrets of the session.
        f.write_str("LaneTags(..)")
    }
}

/// A peer's region as this side sees it.
#[derive(Clone, Debug)]
pub struct Attached {
    /// The name of the region in ops on that lane.
    pub id: RemoteId,
    /// Its length; ops beyond it are refused here, before anything is sent.
    pub bytes: u64,
    /// The region in this process's address space, where the port maps it.
    pub mapping: Option<Mapping>,
}

/// A peer's memory, mapped here. Each clone keeps the mapping, and with it the lane's `Down`, from ending.
#[derive(Clone)]
pub struct Mapping(Arc<dyn MappedBytes>);

/// What a port hands out as a [`Mapping`]; unmaps when dropped.
pub trait MappedBytes: Send + Sync {
    /// Where the mapping begins.
    fn base(&self) -> *mut u8;
    /// How long it is.
    fn bytes(&self) -> usize;
}

impl Mapping {
    /// Wraps a port's mapping.
    pub fn new(mapped: Arc<dyn MappedBytes>) -> Self {
        Self(mapped)
    }

    /// Where the mapping begins.
    pub fn base(&self) -> *mut u8 {
        self.0.base()
    }

    /// How long it is.
    pub fn bytes(&self) -> usize {
        self.0.bytes()
    }
}

impl fmt::Debug for Mapping {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Mapping({} bytes)", self.bytes())
    }
}

/// When no byte can land any more in the pages of a revoked grant, as far as this port can tell by itself.
/// Whatever it says, the pages are also free once the peer itself has released the grant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fence {
    /// At once: the port checks each write before it lands, and will refuse these.
    Now,
    /// When every lane of that peer on this port is [`Down`](crate::Event::Down).
    WhenDown,
    /// Not by anything that this port can see. A `Down` after a time-out proves nothing here either: the peer may be
    /// stopped, and write when it continues.
    Never,
}

/// Whether the owner of a port may sleep.
#[derive(Debug)]
pub enum Arm<'a> {
    /// There is something to poll: do not sleep.
    Ready,
    /// Sleep until this descriptor is readable.
    Sleep(BorrowedFd<'a>),
    /// This port cannot wake anybody: poll it.
    Spin,
}
