//! The shared-memory port: between processes of one user on one host.
//!
//! **How bytes move.** Memory that crossdock allocated ([`MemoryKind::Shared`]) is a sealed memfd; its descriptor goes to
//! every connected peer over a Unix socket, the peer maps it, and an op is a copy by the poster's own thread, or by a
//! few [copy threads](ShmOptions::copy_threads). Memory of any other origin is reached with `process_vm_writev` and
//! `process_vm_readv`. All bytes of an op have moved when `post` returns; its `Done` comes out at the next poll.
//!
//! **All else**, how ends find each other, how immediates cross, and when a lane is down, is what [`crossdock_host`] does
//! for every port between processes of one host.
//!
//! **Private memory** that a peer may still write must not go back to its owner. So a region under a grant that was
//! revoked stays in use until every lane of that peer is down, and `deregister` is refused until then; and a port that is
//! dropped while a peer has not stopped never drops its handles of private memory ([`regions_left_exposed`]). The rule for
//! the owner is that of [`Memory::from_raw`](crossdock_memory::Memory::from_raw).
//!
//! **Distrust.** Descriptors are mapped only if sealed against a change of their length. The kernel reaches into a peer's
//! process only once that process has been proven to be the one that its number names.
//!
//! **Forks.** Mappings are not inherited by a forked child, so that no child keeps a peer's memory. A port cannot be used in
//! a forked child; dropping it there does no harm.
//!
//! [`MemoryKind::Shared`]: crossdock_memory::MemoryKind::Shared

pub mod copy;
mod counters;
mod medium;
mod options;
mod pieces;
pub mod process_memory;
mod regions;

pub use counters::ShmCounters;
pub use crossdock_host::regions_left_exposed;
pub use options::ShmOptions;

use crossdock_host::HostPort;
use crossdock_memory::Memory;
use crossdock_transport::{
    Arm, Attached, Error, Events, Fence, Grant, GrantId, LaneAddress, LaneId, LaneTags, LocalId, Op, PeerId,
    Port, PortInfo, Posted, RemoteKey, Result,
};
use rustix::io::Errno;
use rustix::process::PTracer;

use crate::medium::SharedMemory;

/// A shared-memory port: see the [crate's page](crate).
pub struct ShmPort {
    port: HostPort<SharedMemory>,
}

impl ShmPort {
    /// Opens a port.
    pub fn open(options: ShmOptions) -> Result<Self> {
        if options.allow_ptrace {
            match rustix::process::set_ptracer(PTracer::Any) {
                // A kernel without Yama needs no leave.
                Ok(()) | Err(Errno::INVAL) => {}
                Err(errno) => {
                    return Err(Error::Os { call: "prctl(PR_SET_PTRACER)", errno: errno.raw_os_error() });
                }
            }
        }
        let port = HostPort::open(options.of_host(), |_| SharedMemory::new(&options))?;
        Ok(Self { port })
    }

    /// What the port has done so far.
    pub fn counters(&self) -> ShmCounters {
        ShmCounters::new(self.port.counters(), self.port.medium().moved)
    }
}

impl Port for ShmPort {
    fn info(&self) -> &PortInfo {
        self.port.info()
    }

    fn register(&mut self, memory: &Memory) -> Result<(LocalId, RemoteKey)> {
        self.port.register(memory)
    }

    fn deregister(&mut self, region: LocalId) -> Result<()> {
        self.port.deregister(region)
    }

    fn open_lane(&mut self, peer: PeerId) -> Result<(LaneId, LaneAddress)> {
        self.port.open_lane(peer)
    }

    fn connect(&mut self, lane: LaneId, remote: &LaneAddress, tags: &LaneTags) -> Result<()> {
        self.port.connect(lane, remote, tags)
    }

    fn attach(&mut self, lane: LaneId, key: &RemoteKey) -> Result<Attached> {
        self.port.attach(lane, key)
    }

    fn grant(&mut self, grant: &Grant<'_>) -> Result<()> {
        self.port.grant(grant)
    }

    fn revoke(&mut self, grant: GrantId) -> Fence {
        self.port.revoke(grant)
    }

    fn close(&mut self, lane: LaneId) {
        self.port.close(lane);
    }

    fn post(&mut self, lane: LaneId, ops: &[Op<'_>]) -> Result<Posted> {
        self.port.post(lane, ops)
    }

    fn poll(&mut self, events: &mut Events) {
        self.port.poll(events);
    }

    fn arm(&mut self) -> Arm<'_> {
        self.port.arm()
    }
}

impl std::fmt::Debug for ShmPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        self.port.fmt(f)
    }
}
