//! Work requests, linked to each other in place, and posted in one call.

use std::ptr;

use bytemuck::Zeroable;

use super::objects::MemoryRegion;
use super::sys::*;

/// Up to [`CHAINED_MAX`] work requests. Made once: links and lists never move.
pub(crate) struct SendChain {
    requests: Box<[ibv_send_wr; CHAINED_MAX]>,
    /// One piece of memory for each request. Requests point here.
    pieces: Box<[ibv_sge; CHAINED_MAX]>,
    len: usize,
}

// SAFETY: its pointers lead into its own boxes.
unsafe impl Send for SendChain {}

/// Which way the bytes go, and whether an immediate goes with them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Work {
    Write,
    WriteWithImm(u32),
    /// A message with an immediate.
    Send(u32),
}

/// What does not change from piece to piece of an op.
pub(crate) struct Pieces<'a> {
    /// Keeps the region from being deregistered in between.
    _region: &'a MemoryRegion,
    base: u64,
    bytes: u64,
    local_key: u32,
    remote_base: u64,
    remote_key: u32,
    piece_bytes: u32,
    opcode: u32,
    flags: u32,
}

impl<'a> Pieces<'a> {
    /// Pieces of `piece_bytes` bytes of `region`, to or from a peer's region that begins at `remote_base`. Up to
    /// `inline_bytes` of a write go inline.
    pub fn new(
        region: &'a MemoryRegion,
        remote_base: u64,
        remote_key: u32,
        piece_bytes: u32,
        read: bool,
        inline_bytes: u32,
    ) -> Self {
        // The library reads it by the processor, which cannot read a GPU's.
        let inline = !read && piece_bytes <= inline_bytes && region.host().is_some();
        Self {
            base: region.base(),
            bytes: region.bytes(),
            local_key: region.local_key,
            _region: region,
            remote_base,
            remote_key,
            piece_bytes,
            opcode: if read { IBV_WR_RDMA_READ } else { IBV_WR_RDMA_WRITE },
            flags: if inline { IBV_SEND_INLINE } else { 0 },
        }
    }
}

impl SendChain {
    pub fn new() -> Self {
        let mut requests = Box::new([ibv_send_wr::zeroed(); CHAINED_MAX]);
        let mut pieces = Box::new([ibv_sge::zeroed(); CHAINED_MAX]);
        for at in 0..CHAINED_MAX {
            requests[at].sg_list = &raw mut pieces[at];
        }
        let first = requests.as_mut_ptr();
        for at in 0..CHAINED_MAX {
            // The last one's link leads to the end of the array, and is cut before it is posted.
            requests[at].next = first.wrapping_add(at + 1);
        }
        Self { requests, pieces, len: 0 }
    }

    pub fn len(&self) -> usize {
        self.len
    }

    pub fn room(&self) -> usize {
        CHAINED_MAX - self.len
    }

    /// Adds a piece at these offsets.
    ///
    /// # Panics
    /// If the piece leaves the local region, or there is no room.
    #[inline]
    pub fn push_piece(&mut self, id: u64, of: &Pieces<'_>, local_offset: u64, remote_offset: u64) {
        // The device checks this by the key, but not of what goes inline, which the library reads itself.
        assert!(local_offset.checked_add(u64::from(of.piece_bytes)).is_some_and(|end| end <= of.bytes));
        let at = self.len;
        let (request, piece) = (&mut self.requests[at], &mut self.pieces[at]);
        piece.addr = of.base + local_offset;
        piece.length = of.piece_bytes;
        piece.lkey = of.local_key;
        request.wr_id = id;
        request.num_sge = 1;
        request.opcode = of.opcode;
        request.send_flags = of.flags;
        request.wr.rdma.remote_addr = of.remote_base + remote_offset;
        request.wr.rdma.rkey = of.remote_key;
        self.len = at + 1;
    }

    /// Adds a request without a byte, or a message from `message`.
    pub fn push_bare(&mut self, id: u64, work: Work, message: Option<(&MemoryRegion, u64, u32)>) {
        let at = self.len;
        let (request, piece) = (&mut self.requests[at], &mut self.pieces[at]);
        request.wr_id = id;
        request.num_sge = 0;
        request.send_flags = 0;
        request.wr.rdma.remote_addr = 0;
        request.wr.rdma.rkey = 0;
        if let Some((region, offset, bytes)) = message {
            assert!(offset + u64::from(bytes) <= region.bytes(), "a message outside of its region");
            *piece = ibv_sge { addr: region.base() + offset, length: bytes, lkey: region.local_key };
            request.num_sge = 1;
        }
        self.len = at + 1;
        self.set_last(work);
    }

    /// Makes the last request one with an immediate.
    pub fn set_last(&mut self, work: Work) {
        let request = &mut self.requests[self.len - 1];
        let (opcode, imm) = match work {
            Work::Write => (IBV_WR_RDMA_WRITE, 0),
            Work::WriteWithImm(imm) => (IBV_WR_RDMA_WRITE_WITH_IMM, imm),
            Work::Send(imm) => (IBV_WR_SEND_WITH_IMM, imm),
        };
        request.opcode = opcode;
        request.imm_data = imm.to_be();
    }

    /// Has the last request tell when it is done.
    pub fn signal_last(&mut self) {
        self.requests[self.len - 1].send_flags |= IBV_SEND_SIGNALED;
    }

    /// Forgets what was added.
    pub fn clear(&mut self) {
        self.len = 0;
    }

    /// Cuts the chain behind its last request; its first, if there is one.
    pub(super) fn close(&mut self) -> Option<*mut ibv_send_wr> {
        let last = self.len.checked_sub(1)?;
        self.requests[last].next = ptr::null_mut();
        Some(self.requests.as_mut_ptr())
    }

    /// How many requests come before this one.
    pub(super) fn position(&self, request: *const ibv_send_wr) -> usize {
        self.requests[..self.len].iter().position(|one| ptr::eq(one, request)).unwrap_or(0)
    }

    /// Links the chain again, and empties it.
    pub(super) fn open(&mut self) {
        let end = self.requests.as_mut_ptr().wrapping_add(self.len);
        self.requests[self.len - 1].next = end;
        self.len = 0;
    }
}

/// How many requests go in one call.
pub(crate) const CHAINED_MAX: usize = 64;
