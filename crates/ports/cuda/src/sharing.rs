//! How memory of a GPU can be shared with another process of the host, by what the driver says of it; or why not, and what to
//! do about that. Pure: it asks nobody.

use crate::driver::{HandleTypes, PointerFacts, Range, Residence};

/// By what another process maps it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sharing {
    /// A descriptor of the physical piece.
    Descriptor(Within),
    /// A fabric handle of the physical piece.
    Fabric(Within),
    /// Legacy CUDA IPC: the token of the whole allocation.
    Ipc(Within),
}

/// Where in what is shared the memory begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Within {
    /// So far from its beginning.
    pub offset: u64,
    /// The length of the whole.
    pub whole_bytes: u64,
}

/// Why memory cannot be registered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum Refusal {
    /// No bytes.
    #[error("no bytes were named")]
    NoBytes,
    /// The driver knows nothing of it.
    #[error("the driver knows no memory at {address:#x}")]
    NotOfTheDriver {
        /// The address.
        address: u64,
    },
    /// It is the host's.
    #[error("the memory at {address:#x} is the host's")]
    OfTheHost {
        /// The address.
        address: u64,
    },
    /// It moves.
    #[error("the memory at {address:#x} is managed: it moves between the host and devices")]
    Managed {
        /// The address.
        address: u64,
    },
    /// It is another device's.
    #[error("the memory at {address:#x} is on cuda:{found}, not on cuda:{asked}")]
    OfAnotherDevice {
        /// The address.
        address: u64,
        /// Whose it is.
        found: u32,
        /// Whose it was said to be.
        asked: u32,
    },
    /// It is longer than what was allocated.
    #[error("{bytes} bytes at {address:#x} leave their allocation, {whole_bytes} bytes at {start:#x}")]
    LeavesAllocation {
        /// Where it begins.
        address: u64,
        /// How long it is said to be.
        bytes: u64,
        /// Where the allocation begins.
        start: u64,
        /// How long that is.
        whole_bytes: u64,
    },
    /// It comes from a pool that exports nothing.
    #[error(
        "the memory at {address:#x} is of a stream-ordered pool (cudaMallocAsync), which no other process can map"
    )]
    OfPool {
        /// The address.
        address: u64,
    },
    /// It was mapped by an allocator that asked for no handle.
    #[error(
        "the memory at {address:#x} was mapped by an allocator that asked for no handle that can be exported"
    )]
    NotExportable {
        /// The address.
        address: u64,
    },
    /// It spans several physical pieces.
    #[error(
        "{bytes} bytes at {address:#x} span several physical pieces, of which the first has {piece_bytes} bytes"
    )]
    SeveralPieces {
        /// Where it begins.
        address: u64,
        /// How long it is.
        bytes: u64,
        /// How long the first piece is.
        piece_bytes: u64,
    },
    /// Its handles do not work here.
    #[error("the memory at {address:#x} has fabric handles alone, and they do not work here")]
    NoFabric {
        /// The address.
        address: u64,
    },
    /// There is no way at all.
    #[error("the driver offers no way to share the memory at {address:#x}")]
    NoWay {
        /// The address.
        address: u64,
    },
}

impl Refusal {
    /// What to do about it.
    pub fn advice(&self) -> &'static str {
        match self {
            Self::NoBytes => "register what has a length",
            Self::NotOfTheDriver { .. } => {
                "give an address that the CUDA driver has allocated in this process"
            }
            Self::OfTheHost { .. } => "register it as memory of the host",
            Self::Managed { .. } => "allocate with cudaMalloc, or let crossdock allocate",
            Self::OfAnotherDevice { .. } => "name the device that the memory is on",
            Self::LeavesAllocation { .. } => "register each allocation by itself",
            Self::OfPool { .. } => {
                "allocate with cudaMalloc, or let crossdock allocate (PyTorch: not backend:cudaMallocAsync)"
            }
            Self::NotExportable { .. } => {
                "let crossdock allocate, or switch expandable segments off for the cache \
                 (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False)"
            }
            Self::SeveralPieces { .. } => {
                "let crossdock allocate, or switch expandable segments off for the cache \
                 (PYTORCH_CUDA_ALLOC_CONF=expandable_segments:False), or register piece by piece"
            }
            Self::NoFabric { .. } => {
                "give the process an IMEX channel (/dev/nvidia-caps-imex-channels), or allocate for file descriptors"
            }
            Self::NoWay { .. } => "let crossdock allocate: see what `crossdock doctor` says of the GPU",
        }
    }
}

/// How another process of this host maps `bytes` bytes at `address`, which are said to be on device `device`. `works` are the
/// handles that were [tried](crate::driver::Context::try_sharing) there.
pub fn sharing(
    facts: &PointerFacts,
    device: u32,
    works: HandleTypes,
    address: u64,
    bytes: u64,
) -> Result<Sharing, Refusal> {
    if bytes == 0 {
        return Err(Refusal::NoBytes);
    }
    match facts.residence {
        Residence::Unknown => return Err(Refusal::NotOfTheDriver { address }),
        Residence::Host => return Err(Refusal::OfTheHost { address }),
        Residence::Managed => return Err(Refusal::Managed { address }),
        Residence::Device { ordinal } if ordinal != device => {
            return Err(Refusal::OfAnotherDevice { address, found: ordinal, asked: device });
        }
        Residence::Device { .. } => {}
    }
    if !facts.allocation.holds(address, bytes) {
        let Range { start, bytes: whole_bytes } = facts.allocation;
        return Err(Refusal::LeavesAllocation { address, bytes, start, whole_bytes });
    }
    let within = |whole: Range| Within { offset: address - whole.start, whole_bytes: whole.bytes };
    if facts.is_virtual {
        let piece = facts.mapping.unwrap_or(facts.allocation);
        if !piece.holds(address, bytes) {
            return Err(Refusal::SeveralPieces { address, bytes, piece_bytes: piece.bytes });
        }
        return match facts.handles {
            HandleTypes { posix_fd: true, .. } => Ok(Sharing::Descriptor(within(piece))),
            HandleTypes { fabric: true, .. } if works.fabric => Ok(Sharing::Fabric(within(piece))),
            HandleTypes { fabric: true, .. } => Err(Refusal::NoFabric { address }),
            HandleTypes { .. } => Err(Refusal::NotExportable { address }),
        };
    }
    if facts.has_legacy_ipc {
        return Ok(Sharing::Ipc(within(facts.allocation)));
    }
    Err(if facts.is_of_pool { Refusal::OfPool { address } } else { Refusal::NoWay { address } })
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0x7f00_0000_0000;
    const FD: HandleTypes = HandleTypes { posix_fd: true, fabric: false };
    const FABRIC: HandleTypes = HandleTypes { posix_fd: false, fabric: true };
    const BOTH: HandleTypes = HandleTypes { posix_fd: true, fabric: true };

    fn malloc() -> PointerFacts {
        PointerFacts {
            residence: Residence::Device { ordinal: 1 },
            allocation: Range { start: BASE, bytes: 1 << 30 },
            mapping: None,
            is_virtual: false,
            is_of_pool: false,
            has_legacy_ipc: true,
            handles: HandleTypes::NONE,
            has_gpu_direct_rdma: true,
        }
    }

    /// Of an allocator that reserves much and maps pieces one after another.
    fn segment(handles: HandleTypes) -> PointerFacts {
        PointerFacts {
            mapping: Some(Range { start: BASE + (20 << 20), bytes: 20 << 20 }),
            is_virtual: true,
            has_legacy_ipc: false,
            handles,
            ..malloc()
        }
    }

    fn asked(facts: &PointerFacts, address: u64, bytes: u64) -> Result<Sharing, Refusal> {
        sharing(facts, 1, BOTH, address, bytes)
    }

    #[test]
    fn each_allocator_has_its_way() {
        let within = Within { offset: 4096, whole_bytes: 1 << 30 };
        assert_eq!(asked(&malloc(), BASE + 4096, 100), Ok(Sharing::Ipc(within)));
        let (address, within) = (BASE + (21 << 20), Within { offset: 1 << 20, whole_bytes: 20 << 20 });
        for handles in [FD, BOTH] {
            assert_eq!(asked(&segment(handles), address, 19 << 20), Ok(Sharing::Descriptor(within)));
        }
        assert_eq!(asked(&segment(FABRIC), address, 100), Ok(Sharing::Fabric(within)));
        let none = HandleTypes::NONE;
        assert_eq!(sharing(&segment(FABRIC), 1, none, address, 100), Err(Refusal::NoFabric { address }));
    }

    #[test]
    fn what_cannot_be_shared_is_refused_by_its_name() {
        let address = BASE + (21 << 20);
        let cases = [
            (malloc(), BASE, 0, Refusal::NoBytes),
            (
                PointerFacts { residence: Residence::Unknown, ..malloc() },
                BASE,
                1,
                Refusal::NotOfTheDriver { address: BASE },
            ),
            (
                PointerFacts { residence: Residence::Host, ..malloc() },
                BASE,
                1,
                Refusal::OfTheHost { address: BASE },
            ),
            (
                PointerFacts { residence: Residence::Managed, ..malloc() },
                BASE,
                1,
                Refusal::Managed { address: BASE },
            ),
            (
                PointerFacts { residence: Residence::Device { ordinal: 0 }, ..malloc() },
                BASE,
                1,
                Refusal::OfAnotherDevice { address: BASE, found: 0, asked: 1 },
            ),
            (
                malloc(),
                BASE + 1,
                1 << 30,
                Refusal::LeavesAllocation {
                    address: BASE + 1,
                    bytes: 1 << 30,
                    start: BASE,
                    whole_bytes: 1 << 30,
                },
            ),
            (
                malloc(),
                BASE,
                u64::MAX,
                Refusal::LeavesAllocation {
                    address: BASE,
                    bytes: u64::MAX,
                    start: BASE,
                    whole_bytes: 1 << 30,
                },
            ),
            (
                PointerFacts { is_of_pool: true, has_legacy_ipc: false, ..malloc() },
                BASE,
                1,
                Refusal::OfPool { address: BASE },
            ),
            (PointerFacts { has_legacy_ipc: false, ..malloc() }, BASE, 1, Refusal::NoWay { address: BASE }),
            (segment(HandleTypes::NONE), address, 1, Refusal::NotExportable { address }),
            (
                segment(BOTH),
                address,
                20 << 20,
                Refusal::SeveralPieces { address, bytes: 20 << 20, piece_bytes: 20 << 20 },
            ),
        ];
        for (facts, address, bytes, refusal) in cases {
            assert_eq!(asked(&facts, address, bytes), Err(refusal));
            assert!(!refusal.advice().is_empty());
        }
    }
}
