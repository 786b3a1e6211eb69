//! Ops become copies: here and now, by this thread and its copy threads.

use crossdock_host::{
    Attaching, HeardOffer, Kind, Medium, Move, Offer, OfferForm, Payload, Refusal, Registered, Ticket,
};
use crossdock_memory::{Memory, MemoryKind};
use crossdock_transport::{Direction, DownCause, Error, MappedBytes, Mapping, Op, Result, Shape};

use crate::copy::{Copier, CopyThreads};
use crate::options::ShmOptions;
use crate::pieces::{Side, pieces, process_pieces};
use crate::process_memory::{PeerProcess, ProcessMemoryError, ProcessPieces};
use crate::regions::{Offered, Remote};

/// What moves bytes between processes that share memory, or may reach into each other's.
pub(crate) struct SharedMemory {
    copier: CopyThreads,
    /// How much one call of `post` moves.
    turn_bytes: u64,
    pub(crate) moved: Moved,
    /// The process that has the copy threads.
    owner: u32,
}

/// How much was moved so far.
#[derive(Clone, Copy, Default)]
pub(crate) struct Moved {
    pub(crate) bytes_written: u64,
    pub(crate) bytes_read: u64,
}

impl SharedMemory {
    pub(crate) fn new(options: &ShmOptions) -> Result<Self> {
        let copy_threads = options.copy_threads.max(1);
        let copier = CopyThreads::start(Copier::detect(), copy_threads - 1).map_err(|error| Error::Os {
            call: "clone",
            errno: error.raw_os_error().unwrap_or(libc::EAGAIN),
        })?;
        // More threads move more in the time that the other lanes can wait; and a short call is where they wait for
        // each other.
        let turn_bytes = options.bytes_per_turn.max(1).saturating_mul(copy_threads as u64);
        Ok(Self { copier, turn_bytes, moved: Moved::default(), owner: std::process::id() })
    }
}

impl Medium for SharedMemory {
    const KIND: &'static Kind = &Kind {
        name: "shm",
        address_magic: *b"xsa\x01",
        key_magic: *b"xsk\x01",
        offers: &[
            OfferForm { number: SHARED, payload_bytes: 8, with_descriptor: true },
            OfferForm { number: PRIVATE, payload_bytes: 8, with_descriptor: false },
        ],
    };
    type Region = ();
    type Offered = Offered;
    type Remote = Remote;
    type Lane = ();

    fn register(&mut self, memory: &Memory) -> Result<()> {
        if matches!(memory.kind(), MemoryKind::Shared | MemoryKind::Private) {
            return Ok(());
        }
        Err(Error::Unsupported {
            what: "registration of memory that is not in this host's main memory",
            advice: "use a port of the device that owns it",
        })
    }

    fn offer<'a>(&self, region: &'a Registered<()>) -> Offer<'a> {
        match (region.memory.kind(), region.memory.fd()) {
            (MemoryKind::Shared, Some(fd)) => {
                Offer { form: SHARED, payload: Payload::new(&[0; 8]), descriptor: Some(fd) }
            }
            _ => {
                let address = region.memory.base().expose_provenance() as u64;
                Offer { form: PRIVATE, payload: Payload::new(&address.to_le_bytes()), descriptor: None }
            }
        }
    }

    fn hear(&mut self, offer: HeardOffer, bytes: u64) -> std::result::Result<Offered, DownCause> {
        Offered::hear(offer, bytes)
    }

    fn attach(&mut self, offered: &Offered, attaching: &Attaching<'_>) -> Result<Remote> {
        offered.attach(attaching)
    }

    fn mapping(remote: &Remote) -> Option<Mapping> {
        match remote {
            Remote::Mapped(mapping) => Some(Mapping::new(mapping.clone())),
            Remote::There(..) => None,
        }
    }

    /// Shared memory may go: the peer has a mapping of its own, and what it stores there reaches nobody any more.
    fn is_exposed(region: &Registered<()>) -> bool {
        region.memory.kind() == MemoryKind::Private
    }

    #[inline]
    fn room(&self, _lane: &(), op: &Op<'_>, moved_bytes: u64) -> u64 {
        let left_bytes = self.turn_bytes.saturating_sub(moved_bytes);
        match op.shape {
            Shape::Span { .. } => left_bytes,
            // A piece may be larger than the whole share.
            Shape::Pages { piece_bytes, .. } => (left_bytes / piece_bytes).max(u64::from(moved_bytes == 0)),
        }
    }

    #[inline]
    fn start(
        &mut self,
        _lane: &mut (),
        part: &Move<'_, Self>,
    ) -> std::result::Result<Option<Ticket>, Refusal> {
        let (op, here) = (part.op, part.local.memory.base());
        match part.remote {
            Remote::Mapped(mapping) => {
                let there = mapping.base();
                let pieces = match op.direction {
                    Direction::Write => pieces(op, Side::Remote, there, here),
                    Direction::Read => pieces(op, Side::Local, here, there),
                };
                // SAFETY: every piece lies in the two memories, as a move says: both are mapped, the one as long as
                // its registration, the other as long as the region is attached; and the two mappings are not the
                // same, since every attached region is mapped anew. Other threads and processes may write there at
                // the same time, and destinations may repeat, if the caller or the peer breaks its part of the
                // protocol: then bytes come out mixed, and no reference to any of them exists.
                unsafe { self.copier.copy_pieces(pieces) };
            }
            Remote::There(process, address) => {
                // The number of a dead process may be given to another one, whose memory is none of our business.
                if part.peer.is_dead() {
                    return Err(Refusal::Lane(DownCause::PeerDied));
                }
                if !reach(op.direction, *process, process_pieces(op, here, *address))
                    .map_err(Refusal::Lane)?
                {
                    return Ok(None);
                }
            }
        }
        match op.direction {
            Direction::Write => self.moved.bytes_written += part.bytes,
            Direction::Read => self.moved.bytes_read += part.bytes,
        }
        Ok(Some(Ticket::ENDED))
    }
}

impl Drop for SharedMemory {
    fn drop(&mut self) {
        // In a forked child there are no copy threads, and what waiting for their end does there is undefined.
        if self.owner != std::process::id()
            && let Ok(none) = CopyThreads::start(self.copier.copier(), 0)
        {
            std::mem::forget(std::mem::replace(&mut self.copier, none));
        }
    }
}

/// Moves bytes to or from a peer's memory that is not mapped here. False: not now, for want of kernel memory.
fn reach(
    direction: Direction,
    process: PeerProcess,
    pieces: ProcessPieces<'_>,
) -> std::result::Result<bool, DownCause> {
    let (call, moved) = match direction {
        // SAFETY: the local pieces lie in registered memory, which is mapped as long as its registration; that
        // nobody writes there meanwhile is the caller's part, and if it breaks it, bytes come out mixed. The
        // remote pieces lie in a region that the peer has announced for this.
        Direction::Write => ("process_vm_writev", unsafe { process.write_pieces(pieces) }),
        // SAFETY: as above.
        Direction::Read => ("process_vm_readv", unsafe { process.read_pieces(pieces) }),
    };
    let errno = match moved {
        Ok(()) => return Ok(true),
        // What has moved by then moves again with the next try.
        Err(ProcessMemoryError::KernelOutOfMemory { .. }) => return Ok(false),
        Err(ProcessMemoryError::PeerDied { .. }) => libc::ESRCH,
        Err(ProcessMemoryError::Refused { .. }) => libc::EPERM,
        Err(ProcessMemoryError::BadRange { .. }) => libc::EFAULT,
        Err(ProcessMemoryError::Unsupported) => libc::ENOSYS,
        Err(ProcessMemoryError::Failed { code, .. }) => code,
    };
    // Some of the bytes may have moved; so this is the end of the lane, and not an error of one op.
    Err(DownCause::Broken { call, errno })
}

/// Offers in the memfd that comes with them. The payload says nothing.
pub(crate) const SHARED: u8 = 0;
/// Offers at an address in the sender's process, which is the payload.
pub(crate) const PRIVATE: u8 = 1;
