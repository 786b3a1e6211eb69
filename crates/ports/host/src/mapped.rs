//! A peer's memfd, mapped here.

use std::os::fd::AsFd;

use crossdock_memory::{Memory, MemoryError};
use crossdock_transport::{Error, MappedBytes, Result};
use rustix::fs::SealFlags;

use crate::descriptors::{PeerDescriptor, Share};
use crate::medium::Attaching;
use crate::remote::Tether;

/// A peer's memory of the host's, mapped here. Its fields are dropped in this order: the mapping ends, with the descriptor
/// that it keeps, then the lane may end.
#[derive(Debug)]
pub struct MappedMemfd {
    memory: Memory,
    _share: Share,
    _tether: Tether,
}

impl Attaching<'_> {
    /// Maps a memfd that a peer has offered, if its length can never change under the mapping.
    pub fn map(&self, descriptor: &PeerDescriptor) -> Result<MappedMemfd> {
        let os = |call, errno| Error::Os { call, errno };
        // What has no seals at all answers with an error.
        let seals = rustix::fs::fcntl_get_seals(descriptor).unwrap_or(SealFlags::empty());
        if !seals.contains(SealFlags::SHRINK | SealFlags::GROW) {
            return Err(Error::BadKey {
                reason: "its memfd is not sealed, and could be cut short while it is mapped",
            });
        }
        let fd = rustix::io::fcntl_dupfd_cloexec(descriptor.as_fd(), 0)
            .map_err(|errno| os("fcntl(F_DUPFD)", errno.raw_os_error()))?;
        let memory = Memory::from_fd(fd, self.bytes as usize).map_err(|error| match error {
            MemoryError::NotSealed => Error::BadKey { reason: "its memfd is not sealed" },
            MemoryError::FileTooShort { .. } => {
                Error::BadKey { reason: "its memfd is shorter than the key says" }
            }
            MemoryError::Refused { call, code } => os(call, code),
            MemoryError::TooManyFiles => os("mmap", libc::EMFILE),
            // What is left of the constructor's errors: no room in this process or on this host.
            _ => os("mmap", libc::ENOMEM),
        })?;
        Ok(MappedMemfd { memory, _share: descriptor.share(), _tether: self.tether() })
    }
}

impl MappedMemfd {
    /// What is mapped.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }
}

impl MappedBytes for MappedMemfd {
    fn base(&self) -> *mut u8 {
        self.memory.base()
    }

    fn bytes(&self) -> usize {
        self.memory.bytes()
    }
}
