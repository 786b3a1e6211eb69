//! The peer's regions: offered, and made usable.

use std::sync::Arc;

use crossdock_host::{Attaching, HeardOffer, Landmark, MappedMemfd, PeerDescriptor};
use crossdock_transport::{DownCause, Error, Result};

use crate::medium::{PRIVATE, SHARED};
use crate::process_memory::{PeerProcess, ProcessMemoryError, ProcessPieces};

/// A region that is not usable yet.
pub(crate) enum Offered {
    /// A memfd.
    Shared(PeerDescriptor),
    /// At this address of the peer.
    Private(u64),
}

/// A region that ops can use.
pub(crate) enum Remote {
    /// Mapped here: ops are copies.
    Mapped(Arc<MappedMemfd>),
    /// At this address of the peer: ops are system calls.
    There(PeerProcess, u64),
}

impl Offered {
    pub(crate) fn hear(offer: HeardOffer, bytes: u64) -> std::result::Result<Self, DownCause> {
        let address = <[u8; 8]>::try_from(&*offer.payload).map(u64::from_le_bytes);
        match (offer.form, offer.descriptor, address) {
            (SHARED, Some(descriptor), _) => Ok(Self::Shared(descriptor)),
            (PRIVATE, None, Ok(address)) if address.checked_add(bytes).is_some() => {
                Ok(Self::Private(address))
            }
            _ => Err(DownCause::PeerMisbehaved { what: "announced a region at an impossible place" }),
        }
    }

    pub(crate) fn attach(&self, attaching: &Attaching<'_>) -> Result<Remote> {
        match self {
            Self::Shared(descriptor) => Ok(Remote::Mapped(Arc::new(attaching.map(descriptor)?))),
            Self::Private(address) => {
                let process = PeerProcess::new(attaching.peer.pid());
                prove_reach(process, attaching.landmark, *address)?;
                Ok(Remote::There(process, *address))
            }
        }
    }
}

/// Reads the peer's landmark from where the peer said that it was: this shows that the process number means the
/// same process here and there, and that the kernel lets this process reach into that one. Then reads a byte of the
/// region.
fn prove_reach(process: PeerProcess, landmark: Landmark, address: u64) -> Result<()> {
    let mut found = [0; 16];
    read(process, landmark.address, &mut found)?;
    if found != landmark.bytes {
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
