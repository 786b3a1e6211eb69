//! Sends straight from registered memory and receives straight into it: many pieces, one system call.
//!
//! All the unsafe code of this crate is here. Pieces are handed to the kernel as addresses, because peers and
//! other threads may change the bytes at any time and no Rust reference to them may exist. Each address comes from
//! [`Memory::at`], and a handle to its memory is kept beside it until the address is forgotten.
#![allow(unsafe_code)]

use std::collections::VecDeque;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use crossdock_memory::{Memory, OutOfRange, prefetch_head_read, prefetch_head_write};
use crossdock_transport::{GrantId, LocalId};
use rustix::io::Errno;

use crate::frame::{FRAME_PAGES_MAX, HEAD_BYTES};

/// Pieces of one region: piece `i` lies at `offset + pages[i] * stride_bytes`. A span is page 0.
#[derive(Clone, Copy)]
pub(crate) struct Places<'a> {
    pub offset: u64,
    pub stride_bytes: u64,
    pub piece_bytes: u64,
    pub pages: &'a [u32],
}

impl<'a> Places<'a> {
    pub fn bytes(&self) -> u64 {
        self.piece_bytes * self.pages.len() as u64
    }

    fn offsets(self) -> impl Iterator<Item = u64> + 'a {
        // Whoever made these places has checked the sums; `Memory::at` checks again what comes of them.
        self.pages
            .iter()
            .map(move |&page| self.offset.wrapping_add(self.stride_bytes.wrapping_mul(u64::from(page))))
    }
}

/// Where the payload of a queued frame lies.
pub(crate) struct Payload<'a> {
    pub memory: &'a Memory,
    pub region: LocalId,
    /// The grant by which a peer reads it; `None` for what is written from here.
    pub grant: Option<GrantId>,
    pub places: Places<'a>,
}

/// Frames on their way out: heads in a ring of bytes of its own, payloads where they are.
pub(crate) struct Gather {
    /// A ring. What the kernel reads next is at `first`.
    pieces: Box<[libc::iovec]>,
    /// For each piece, how many bytes of `heads` are free again when it is sent: zero for a payload.
    head_bytes: Box<[u32]>,
    first: usize,
    count: usize,
    heads: Heads,
    frames: VecDeque<Queued>,
    /// Bytes of the stream up to the end of the last queued frame.
    queued: u64,
    /// Bytes of the stream that the kernel has taken.
    sent: u64,
}

struct Queued {
    end: u64,
    source: Option<Source>,
}

/// What the pieces of a frame point into. It lives as long as they are queued.
struct Source {
    _memory: Memory,
    region: LocalId,
    grant: Option<GrantId>,
}

/// How a send went.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Sent {
    /// Everything that was offered.
    All,
    /// The socket is full.
    Part,
}

// SAFETY: the addresses in `pieces` are of `heads` and of memory that `frames` keeps; both may be used from any thread.
unsafe impl Send for Gather {}

impl Gather {
    pub fn new() -> Self {
        Self {
            pieces: vec![EMPTY; PIECES].into(),
            head_bytes: vec![0; PIECES].into(),
            first: 0,
            count: 0,
            heads: Heads::new(),
            frames: VecDeque::with_capacity(FRAMES_MAX),
            queued: 0,
            sent: 0,
        }
    }

    /// The position in the stream behind what is queued.
    pub fn queued(&self) -> u64 {
        self.queued
    }

    /// The position in the stream behind what the kernel has taken.
    pub fn sent(&self) -> u64 {
        self.sent
    }

    pub fn is_empty(&self) -> bool {
        self.queued == self.sent
    }

    /// How many pages the next frame can have; `None` if there is no room for any frame.
    pub fn room(&self) -> Option<usize> {
        let pieces = (PIECES - self.count).checked_sub(2)? + 1;
        let list = self.heads.room().checked_sub(HEAD_BYTES)? / 4;
        (self.frames.len() < FRAMES_MAX).then_some(pieces.min(list).min(FRAME_PAGES_MAX))
    }

    /// Whether a queued frame has its payload in this region.
    pub fn uses(&self, region: LocalId) -> bool {
        self.frames.iter().filter_map(|frame| frame.source.as_ref()).any(|source| source.region == region)
    }

    /// Whether a queued frame is read by a peer under this grant.
    pub fn reads_under(&self, grant: GrantId) -> bool {
        self.frames.iter().filter_map(|frame| frame.source.as_ref()).any(|source| source.grant == Some(grant))
    }

    /// Adds a frame.
    ///
    /// # Panics
    /// If there is no [room](Gather::room), or a place leaves the memory. The caller has checked both.
    pub fn queue(&mut self, head: &[u8; HEAD_BYTES], list: &[u32], payload: Option<Payload<'_>>) {
        assert!(
            self.room().is_some_and(|pages| list.len() <= pages),
            "a frame was queued without room for it"
        );
        let (at, bytes, taken) = self.heads.add(head, list);
        self.push(at, bytes, taken);
        self.queued += bytes as u64;
        let source = payload.map(|payload| {
            let piece_bytes = payload.places.piece_bytes as usize;
            for offset in payload.places.offsets() {
                let at = payload.memory.at(offset as usize, piece_bytes).expect("the op was checked");
                prefetch_head_read(at, piece_bytes);
                self.push(at, piece_bytes, 0);
            }
            self.queued += payload.places.bytes();
            Source { _memory: payload.memory.clone(), region: payload.region, grant: payload.grant }
        });
        self.frames.push_back(Queued { end: self.queued, source });
    }

    #[inline]
    fn push(&mut self, at: *mut u8, bytes: usize, head_bytes: u32) {
        if self.count > 0 {
            let last = (self.first + self.count - 1) % PIECES;
            let piece = &mut self.pieces[last];
            // Heads merge with heads and payload with payload: the ring of heads is freed piece by piece.
            if piece.iov_base.cast::<u8>().wrapping_add(piece.iov_len) == at
                && (self.head_bytes[last] == 0) == (head_bytes == 0)
            {
                piece.iov_len += bytes;
                self.head_bytes[last] += head_bytes;
                return;
            }
        }
        assert!(self.count < PIECES, "more pieces than there is room for");
        let next = (self.first + self.count) % PIECES;
        self.pieces[next] = libc::iovec { iov_base: at.cast(), iov_len: bytes };
        self.head_bytes[next] = head_bytes;
        self.count += 1;
    }

    /// Hands as much to the kernel as the socket takes in one call.
    pub fn send(&mut self, socket: BorrowedFd<'_>) -> Result<Sent, Errno> {
        let offered = self.count.min(PIECES - self.first);
        let pieces = &mut self.pieces[self.first..self.first + offered];
        // SAFETY: all zeroes is a `msghdr` that has no address, no pieces and no control data.
        let mut message: libc::msghdr = unsafe { std::mem::zeroed() };
        message.msg_iov = pieces.as_mut_ptr();
        message.msg_iovlen = offered as _;
        // SAFETY: the message and the array of pieces outlive the call, which changes neither. Each piece is
        // readable: it lies in `heads`, or in a memory that a frame in `frames` keeps, because a frame leaves only
        // when all its pieces have.
        let answer =
            unsafe { libc::sendmsg(socket.as_raw_fd(), &message, libc::MSG_NOSIGNAL | libc::MSG_DONTWAIT) };
        let bytes = length(answer)?;
        Ok(if self.advance(bytes) == offered { Sent::All } else { Sent::Part })
    }

    /// Forgets what was sent, and says how many pieces were sent whole.
    fn advance(&mut self, bytes: usize) -> usize {
        let mut left = bytes;
        let mut whole = 0;
        while left > 0 {
            let piece = &mut self.pieces[self.first];
            if left < piece.iov_len {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(left).cast();
                piece.iov_len -= left;
                break;
            }
            left -= piece.iov_len;
            self.heads.free(self.head_bytes[self.first] as usize);
            self.first = (self.first + 1) % PIECES;
            self.count -= 1;
            whole += 1;
        }
        self.sent += bytes as u64;
        while self.frames.front().is_some_and(|frame| frame.end <= self.sent) {
            self.frames.pop_front();
        }
        whole
    }
}

/// A ring of bytes for heads and lists. A head is never split: where it does not fit before the end, it begins at
/// the start, and the bytes it skipped are freed with it.
struct Heads {
    base: ptr::NonNull<u8>,
    first: usize,
    used: usize,
}

impl Heads {
    fn new() -> Self {
        let bytes: Box<[u8; HEADS_BYTES]> = vec![0; HEADS_BYTES].try_into().expect("of this length");
        Self { base: ptr::NonNull::from(Box::leak(bytes)).cast(), first: 0, used: 0 }
    }

    /// How long the next head can be.
    fn room(&self) -> usize {
        let next = (self.first + self.used) % HEADS_BYTES;
        match self.used {
            HEADS_BYTES => 0,
            _ if next < self.first => self.first - next,
            _ => (HEADS_BYTES - next).max(self.first),
        }
    }

    /// Copies a head and its list in. Says where they are, how long, and how much is to be [freed](Heads::free).
    fn add(&mut self, head: &[u8; HEAD_BYTES], list: &[u32]) -> (*mut u8, usize, u32) {
        let bytes = HEAD_BYTES + 4 * list.len();
        let next = (self.first + self.used) % HEADS_BYTES;
        let to_end = HEADS_BYTES - next;
        let (at, taken) = if bytes <= to_end { (next, bytes) } else { (0, to_end + bytes) };
        assert!(self.used + taken <= HEADS_BYTES, "the ring of heads is full");
        // SAFETY: `at + bytes` is at most `HEADS_BYTES`, the length of the allocation, and by the assertion no queued
        // head is there. The kernel reads heads only during `sendmsg`, so nobody else uses these bytes now.
        let place = unsafe { std::slice::from_raw_parts_mut(self.base.as_ptr().add(at), bytes) };
        place[..HEAD_BYTES].copy_from_slice(head);
        for (into, page) in place[HEAD_BYTES..].chunks_exact_mut(4).zip(list) {
            into.copy_from_slice(&page.to_le_bytes());
        }
        self.used += taken;
        (self.base.as_ptr().wrapping_add(at), bytes, taken as u32)
    }

    fn free(&mut self, bytes: usize) {
        self.first = (self.first + bytes) % HEADS_BYTES;
        self.used -= bytes;
    }
}

impl Drop for Heads {
    fn drop(&mut self) {
        // SAFETY: `base` came from a leaked box of this type, and nothing else frees it.
        drop(unsafe { Box::from_raw(self.base.cast::<[u8; HEADS_BYTES]>().as_ptr()) });
    }
}

/// Where the payload that is coming in belongs.
pub(crate) struct Scatter {
    /// One more than there can be places, for what is read beyond the payload.
    pieces: Box<[libc::iovec]>,
    first: usize,
    end: usize,
    /// What the pieces point into; `None` when there are none.
    memory: Option<Memory>,
    left: u64,
}

// SAFETY: the addresses in `pieces` are of the memory that is kept beside them, usable from any thread.
unsafe impl Send for Scatter {}

impl Scatter {
    pub fn new() -> Self {
        Self { pieces: vec![EMPTY; FRAME_PAGES_MAX + 1].into(), first: 0, end: 0, memory: None, left: 0 }
    }

    /// Begins a payload that belongs into `memory`, with no place yet.
    pub fn begin(&mut self, memory: &Memory) {
        self.clear();
        self.memory = Some(memory.clone());
    }

    /// Adds a place behind the others.
    #[inline]
    pub fn push(&mut self, offset: u64, bytes: u64) -> Result<(), OutOfRange> {
        let memory = self.memory.as_ref().expect("a payload has begun");
        let (offset, bytes) = (offset as usize, bytes as usize);
        let at = memory.at(offset, bytes)?;
        prefetch_head_write(at, bytes);
        self.left += bytes as u64;
        if self.end > self.first {
            let last = &mut self.pieces[self.end - 1];
            if last.iov_base.cast::<u8>().wrapping_add(last.iov_len) == at {
                last.iov_len += bytes;
                return Ok(());
            }
        }
        self.pieces[self.end] = libc::iovec { iov_base: at.cast(), iov_len: bytes };
        self.end += 1;
        Ok(())
    }

    /// Adds several places behind the others.
    pub fn push_all(&mut self, places: Places<'_>) -> Result<(), OutOfRange> {
        places.offsets().try_for_each(|offset| self.push(offset, places.piece_bytes))
    }

    /// How many bytes are still to come.
    pub fn left(&self) -> u64 {
        self.left
    }

    /// Forgets the places: what is still to come is written nowhere.
    pub fn clear(&mut self) {
        (self.first, self.end, self.left, self.memory) = (0, 0, 0, None);
    }

    /// Receives into the places that are left, then into `beyond`. Returns how many bytes came in all.
    pub fn receive(&mut self, socket: BorrowedFd<'_>, beyond: &mut [u8]) -> Result<usize, Errno> {
        if self.left == 0 {
            // Nothing but what is beyond: the plain call costs less, which tells where its answer is mostly "not yet".
            // SAFETY: `beyond` is borrowed exclusively and as long as the call is told.
            let answer = unsafe {
                libc::recv(socket.as_raw_fd(), beyond.as_mut_ptr().cast(), beyond.len(), libc::MSG_DONTWAIT)
            };
            return length(answer);
        }
        debug_assert!(self.end < self.pieces.len(), "the last piece is for what is beyond");
        self.pieces[self.end] = libc::iovec { iov_base: beyond.as_mut_ptr().cast(), iov_len: beyond.len() };
        let pieces = &self.pieces[self.first..=self.end];
        // SAFETY: the array of pieces outlives the call, which does not change it. Each piece is writable and no
        // reference to it exists: it lies in `memory`, which is kept while `pieces` has places, or it is `beyond`,
        // which is borrowed exclusively.
        let answer = unsafe { libc::readv(socket.as_raw_fd(), pieces.as_ptr(), pieces.len() as _) };
        let bytes = length(answer)?;
        self.advance(bytes.min(self.left as usize));
        Ok(bytes)
    }

    /// Copies bytes that were received too early into their places. Returns how many belonged here.
    pub fn copy_in(&mut self, from: &[u8]) -> usize {
        let Some(memory) = self.memory.clone() else { return 0 };
        let belonging = from.len().min(self.left as usize);
        let mut rest = &from[..belonging];
        while !rest.is_empty() {
            let piece = &self.pieces[self.first];
            let bytes = rest.len().min(piece.iov_len);
            let offset = piece.iov_base.addr() - memory.base().addr();
            memory.write(offset, &rest[..bytes]).expect("a place lies in its memory");
            rest = &rest[bytes..];
            self.advance(bytes);
        }
        belonging
    }

    fn advance(&mut self, bytes: usize) {
        self.left -= bytes as u64;
        let mut rest = bytes;
        while rest > 0 {
            let piece = &mut self.pieces[self.first];
            if rest < piece.iov_len {
                piece.iov_base = piece.iov_base.cast::<u8>().wrapping_add(rest).cast();
                piece.iov_len -= rest;
                return;
            }
            rest -= piece.iov_len;
            self.first += 1;
        }
        if self.left == 0 {
            self.clear();
        }
    }
}

/// Takes up to `bytes` bytes from the socket and drops them in the kernel. Zero is the end of the stream.
pub(crate) fn discard(socket: BorrowedFd<'_>, bytes: u64) -> Result<usize, Errno> {
    let bytes = bytes.min(DISCARD_BYTES_MAX) as usize;
    // SAFETY: on a TCP socket MSG_TRUNC drops the bytes and writes nothing, so that no buffer is needed (tcp(7)).
    let answer = unsafe {
        libc::recv(socket.as_raw_fd(), ptr::null_mut(), bytes, libc::MSG_TRUNC | libc::MSG_DONTWAIT)
    };
    length(answer)
}

fn length(answer: isize) -> Result<usize, Errno> {
    usize::try_from(answer).map_err(|_| {
        let code = std::io::Error::last_os_error().raw_os_error().expect("the last call set errno");
        Errno::from_raw_os_error(code)
    })
}

const EMPTY: libc::iovec = libc::iovec { iov_base: ptr::null_mut(), iov_len: 0 };
/// The kernel takes no more in one call (`IOV_MAX`).
const PIECES: usize = 1024;
/// Room for 819 notifications, or for the lists of a full ring of pieces with space to wrap around.
const HEADS_BYTES: usize = 32 << 10;
/// How many frames are queued at once.
const FRAMES_MAX: usize = 512;
const DISCARD_BYTES_MAX: u64 = 1 << 20;

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    fn connected() -> (TcpStream, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let a = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (a, listener.accept().unwrap().0)
    }

    fn memory(bytes: usize) -> Memory {
        Memory::allocate(bytes, &Default::default()).unwrap()
    }

    #[test]
    fn frames_leave_in_order_through_every_wrap_of_the_rings() {
        let (a, mut b) = connected();
        let source = memory(64 << 10);
        let bytes: Vec<u8> = (0..64u32 << 10).map(|i| (i * 7 + i / 251) as u8).collect();
        source.write(0, &bytes).unwrap();
        let mut gather = Gather::new();
        let mut expected = Vec::new();
        let mut random = 1u32;
        for round in 0..2000u32 {
            random = random.wrapping_mul(1664525).wrapping_add(1013904223);
            let wanted = (random >> 16) as usize % 300;
            let head = [round as u8; HEAD_BYTES];
            while gather.room().is_none_or(|pages| pages < wanted) {
                assert!(gather.send(a.as_fd()).unwrap() == Sent::All);
                let mut came = vec![0; expected.len()];
                let arrived = b.read(&mut came).unwrap();
                assert_eq!(came[..arrived], expected[..arrived]);
                expected.drain(..arrived);
            }
            let pages: Vec<u32> = (0..wanted as u32).map(|i| (i * 37 + random) % 1000).collect();
            let places = Places { offset: 5, stride_bytes: 64, piece_bytes: 13, pages: &pages };
            let payload = Payload { memory: &source, region: LocalId(round), grant: None, places };
            expected.extend_from_slice(&head);
            expected.extend(pages.iter().flat_map(|page| page.to_le_bytes()));
            for page in &pages {
                let at = 5 + 64 * *page as usize;
                expected.extend_from_slice(&bytes[at..at + 13]);
            }
            gather.queue(&head, &pages, (wanted > 0).then_some(payload));
            assert_eq!(gather.uses(LocalId(round)), wanted > 0);
        }
        while !gather.is_empty() {
            assert!(gather.send(a.as_fd()).unwrap() == Sent::All);
        }
        let mut came = vec![0; expected.len()];
        b.read_exact(&mut came).unwrap();
        assert_eq!(came, expected);
        assert_eq!(gather.heads.used, 0);
        assert!(gather.frames.is_empty() && gather.count == 0);
    }

    #[test]
    fn a_payload_lands_in_its_places_and_the_rest_beyond() {
        let (mut a, b) = connected();
        let target = memory(4096);
        let mut scatter = Scatter::new();
        scatter.begin(&target);
        scatter
            .push_all(Places { offset: 10, stride_bytes: 100, piece_bytes: 4, pages: &[7, 2, 3] })
            .unwrap();
        assert!(scatter.push(4095, 2).is_err(), "beyond the memory");
        assert!(scatter.push(u64::MAX, 2).is_err());
        assert_eq!(scatter.left(), 12);
        assert_eq!(scatter.copy_in(b"abcdef"), 6);
        a.write_all(b"ghijklMNO").unwrap();
        let mut beyond = [0; 8];
        assert_eq!(scatter.receive(b.as_fd(), &mut beyond), Ok(9));
        assert_eq!(&beyond[..4], b"MNO\0");
        assert_eq!(scatter.left(), 0);
        assert_eq!(scatter.copy_in(b"too late"), 0);
        let mut all = [0; 4096];
        target.read(0, &mut all).unwrap();
        assert_eq!(
            (&all[710..714], &all[210..214], &all[310..314]),
            (&b"abcd"[..], &b"efgh"[..], &b"ijkl"[..])
        );
        assert_eq!(all.iter().filter(|&&byte| byte != 0).count(), 12);
    }

    #[test]
    fn discarded_bytes_are_gone() {
        let (mut a, mut b) = connected();
        a.write_all(b"drop this, keep that").unwrap();
        assert_eq!(discard(b.as_fd(), 11), Ok(11));
        let mut kept = [0; 9];
        b.read_exact(&mut kept).unwrap();
        assert_eq!(&kept, b"keep that");
        assert_eq!(discard(b.as_fd(), 1), Err(Errno::AGAIN));
        drop(a);
        assert_eq!(discard(b.as_fd(), 1), Ok(0));
    }
}
