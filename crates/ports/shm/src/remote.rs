//! The peer's regions on one lane: announced, attached, retired.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;

use crossdock_memory::{Memory, MemoryError};
use crossdock_transport::{Attached, DownCause, Error, MappedBytes, Mapping, RemoteId, Result};
use rustix::fs::SealFlags;

use crate::address::{Key, Secret};
use crate::descriptors::{Descriptors, PeerFd, Share};
use crate::doorbell::{Doorbell, RingOnDrop};
use crate::link::Link;
use crate::message::{Message, Place};
use crate::numbered::Numbered;
use crate::process_memory::{PeerProcess, ProcessMemoryError, ProcessPieces};

/// All that the peer has announced on a lane and not retired.
pub(crate) struct RemoteRegions {
    /// Which port the peer is; its keys say so too.
    port: Secret,
    /// Where `port` lies in the peer's memory.
    port_address: u64,
    process: PeerProcess,
    descriptors: Descriptors,
    announced: Numbered<Remote>,
    /// The last number that was ever announced.
    last: Option<u32>,
}

/// One region of the peer.
pub(crate) struct Remote {
    pub(crate) bytes: u64,
    pub(crate) state: RemoteState,
}

/// How far a region is usable here.
pub(crate) enum RemoteState {
    /// A memfd, not mapped yet.
    Offered(PeerFd),
    /// Mapped: ops are copies.
    Mapped(Arc<RemoteMapping>),
    /// At this address of the peer, not attached yet.
    OfferedThere(u64),
    /// At this address of the peer: ops are system calls.
    There(u64),
}

/// A peer's memory, mapped here. Its fields are dropped in this order: the mapping ends, with the descriptor that it
/// keeps, then the leash knows it, then the port is woken to see it.
pub(crate) struct RemoteMapping {
    memory: Memory,
    _share: Share,
    _leash: Arc<Leash>,
    _bell: RingOnDrop,
}

/// Ties a lane's connection to the mappings that were made on it: whoever lets go last tells the peer.
///
/// The lane itself lets go when it has stopped, and as a rule it is the last, and has sent `Closed` before. If the port
/// is dropped while a caller still stores through a [`Mapping`], the end of that mapping sends it.
pub(crate) struct Leash {
    pub(crate) link: Link,
    /// `Closed` has been sent, or nobody is left to read it.
    pub(crate) told: bool,
    /// A forked child holds copies of all this, but no mapping, and must not speak for its parent.
    owner: u32,
}

impl Leash {
    pub(crate) fn new(link: Link) -> Self {
        Self { link, told: false, owner: std::process::id() }
    }
}

impl Drop for Leash {
    fn drop(&mut self) {
        if !self.told && self.owner == std::process::id() {
            self.link.make_room();
            // If even this fails, the peer waits for the end of this process instead.
            let _ = self.link.send(&Message::Closed, &[]);
        }
    }
}

impl MappedBytes for RemoteMapping {
    fn base(&self) -> *mut u8 {
        self.memory.base()
    }

    fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}

impl RemoteRegions {
    pub(crate) fn new(
        port: Secret,
        port_address: u64,
        process: PeerProcess,
        descriptors: Descriptors,
    ) -> Self {
        Self { port, port_address, process, descriptors, announced: Numbered::default(), last: None }
    }

    /// The peer's process, for regions that are [there](RemoteState::There).
    pub(crate) fn process(&self) -> PeerProcess {
        self.process
    }

    /// A region for an op.
    pub(crate) fn get(&self, id: RemoteId) -> Result<&Remote> {
        match self.announced.get(id.0) {
            Some(remote @ Remote { state: RemoteState::Mapped(_) | RemoteState::There(_), .. }) => Ok(remote),
            _ => Err(Error::UnknownRegion { side: "remote", region: id.0 }),
        }
    }

    /// Takes an announcement in, or says why the lane ends by it.
    pub(crate) fn announce(
        &mut self,
        number: u32,
        bytes: u64,
        place: Place,
        fd: Option<OwnedFd>,
    ) -> std::result::Result<(), DownCause> {
        let misbehaved = |what| Err(DownCause::PeerMisbehaved { what });
        if self.last.is_some_and(|last| number <= last) {
            return misbehaved("announced a region twice");
        }
        if self.announced.len() >= MAX_REGIONS {
            return misbehaved("announced more regions than a port can have");
        }
        if bytes == 0 || isize::try_from(bytes).is_err() {
            return misbehaved("announced a region of an impossible length");
        }
        let state = match (place, fd) {
            (Place::Shared, Some(fd)) => match self.descriptors.keep(fd) {
                Some(fd) => RemoteState::Offered(fd),
                None => {
                    let limit = self.descriptors.limit() as u64;
                    return Err(DownCause::LimitReached { what: "descriptors of peers' regions", limit });
                }
            },
            (Place::Private { address }, None) if address.checked_add(bytes).is_some() => {
                RemoteState::OfferedThere(address)
            }
            _ => return misbehaved("announced a region at an impossible place"),
        };
        self.last = Some(number);
        self.announced.push(number, Remote { bytes, state });
        Ok(())
    }

    /// Forgets a region. Mappings that the caller holds stay until it drops them.
    pub(crate) fn retire(&mut self, number: u32) {
        self.announced.remove(number);
    }

    /// Forgets all regions.
    pub(crate) fn clear(&mut self) {
        self.announced.clear();
    }

    /// Whether the announcement of a key's region has come, or is not to be waited for.
    pub(crate) fn has_heard_of(&self, key: &Key) -> bool {
        key.port != self.port || self.last.is_some_and(|last| key.region <= last)
    }

    /// Makes a region usable in ops.
    pub(crate) fn attach(&mut self, key: &Key, leash: &Arc<Leash>, bell: &Arc<Doorbell>) -> Result<Attached> {
        if key.port != self.port {
            return Err(Error::BadKey {
                reason: "of another port than the one at the other end of this lane",
            });
        }
        if !self.has_heard_of(key) {
            return Err(Error::NotYet);
        }
        let (process, port, port_address) = (self.process, self.port, self.port_address);
        let remote = self
            .announced
            .get_mut(key.region)
            .ok_or(Error::BadKey { reason: "its region has been deregistered" })?;
        if remote.bytes != key.bytes {
            return Err(Error::BadKey { reason: "its length is not that of the announced region" });
        }
        match &remote.state {
            RemoteState::Offered(fd) => {
                let mapping = RemoteMapping {
                    memory: map(fd.as_fd(), remote.bytes)?,
                    _share: fd.share(),
                    _leash: leash.clone(),
                    _bell: RingOnDrop(bell.clone()),
                };
                remote.state = RemoteState::Mapped(Arc::new(mapping));
            }
            RemoteState::OfferedThere(address) => {
                prove_reach(process, port, port_address, *address)?;
                remote.state = RemoteState::There(*address);
            }
            RemoteState::Mapped(_) | RemoteState::There(_) => {}
        }
        let mapping = match &remote.state {
            RemoteState::Mapped(mapping) => Some(Mapping::new(mapping.clone())),
            _ => None,
        };
        Ok(Attached { id: RemoteId(key.region), bytes: remote.bytes, mapping })
    }
}

/// Maps a peer's memfd, if its length can never change under the mapping.
fn map(fd: BorrowedFd<'_>, bytes: u64) -> Result<Memory> {
    let os = |call, errno| Error::Os { call, errno };
    // What has no seals at all answers with an error.
    let seals = rustix::fs::fcntl_get_seals(fd).unwrap_or(SealFlags::empty());
    if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
        return Err(Error::BadKey {
            reason: "its memfd is not sealed, and could be cut short while it is mapped",
        });
    }
    let fd =
        rustix::io::fcntl_dupfd_cloexec(fd, 0).map_err(|errno| os("fcntl(F_DUPFD)", errno.raw_os_error()))?;
    Memory::from_fd(fd, bytes as usize).map_err(|error| match error {
        MemoryError::NotSealed => Error::BadKey { reason: "its memfd is not sealed" },
        MemoryError::FileTooShort { .. } => {
            Error::BadKey { reason: "its memfd is shorter than the key says" }
        }
        MemoryError::Refused { call, code } => os(call, code),
        MemoryError::TooManyFiles => os("mmap", libc::EMFILE),
        // What is left of the constructor's errors: no room in this process or on this host.
        _ => os("mmap", libc::ENOMEM),
    })
}

/// Reads the name of the peer's port from where the peer said it was: this shows that the process number means the
/// same process here and there, and that the kernel lets this process reach into that one. Then reads a byte of the
/// region.
fn prove_reach(process: PeerProcess, port: Secret, port_address: u64, address: u64) -> Result<()> {
    let mut found = Secret::default();
    read(process, port_address, &mut found)?;
    if found != port {
        return Err(Error::BadKey { reason: "the peer's process is not where its process number leads" });
    }
    read(process, address, &mut [0])
}

fn read(process: PeerProcess, address: u64, into: &mut [u8]) -> Result<()> {
    let pieces = ProcessPieces {
        local_base: into.as_mut_ptr(),
        local_stride: 0,
        remote_base: address,
        remote_stride: 0,
        piece_bytes: into.len(),
        local_index: &[0],
        remote_index: &[0],
    };
    // SAFETY: `into` is writable, and borrowed by nobody else, for the one piece of its length.
    let read = unsafe { process.read_pieces(pieces) };
    read.map_err(|error| match error {
        ProcessMemoryError::Refused { .. } => Error::Unsupported {
            what: "access to the peer's private memory",
            advice: "register memory that crossdock allocated; or let the peer's port be opened with `allow_ptrace` \
                     where /proc/sys/kernel/yama/ptrace_scope is 1, run both processes with equal user and group ids, \
                     or give this one CAP_SYS_PTRACE; a container's seccomp profile must allow process_vm_writev",
        },
        ProcessMemoryError::Unsupported => Error::Unsupported {
            what: "access to the peer's private memory",
            advice: "register memory that crossdock allocated: this kernel lacks CONFIG_CROSS_MEMORY_ATTACH",
        },
        ProcessMemoryError::PeerDied { .. } => Error::Os { call: "process_vm_readv", errno: libc::ESRCH },
        ProcessMemoryError::BadRange { .. } => {
            Error::BadKey { reason: "its region is not mapped in the peer's process" }
        }
        ProcessMemoryError::KernelOutOfMemory { .. } => Error::Os { call: "process_vm_readv", errno: libc::ENOMEM },
        ProcessMemoryError::Failed { call, code, .. } => Error::Os { call, errno: code },
    })
}

/// The most regions that a port can have at a time.
pub(crate) const MAX_REGIONS: usize = 4096;
