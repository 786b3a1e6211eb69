//! Copies scattered pieces between mapped memories, at the speed of the memory.
//!
//! What costs time here is not the instructions. A page list jumps through pools much larger than any
//! cache, so each piece begins with misses in the translation buffers and in the cache, the hardware
//! prefetcher stops at each 4 KiB boundary, and an ordinary store first reads the line it is about to
//! overwrite. The routine answers all three: it copies **four pieces side by side**, so that their misses
//! overlap; it **prefetches** into the second-level cache along the page list, which is known ahead; and it
//! **streams** whole lines past the cache, which saves the read. `docs/benchmarks-copy.md` has the figures
//! of everything that was tried.
//!
//! A small copy goes through the cache instead: its reader is near, and a fence at its end would cost more
//! than it saves. [`Copier::strategy`] decides from the piece and the total.
//!
//! Both ways leave the bytes ordered like plain stores: where streaming stores need a fence for that, it is
//! inside the routine, so a release store after the call publishes the bytes.

#![allow(unsafe_code)]

#[cfg(target_arch = "aarch64")]
mod aarch64;
mod cached;
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
mod streamed;
#[cfg(target_arch = "x86_64")]
mod x86_64;

#[cfg(target_arch = "aarch64")]
use aarch64 as instructions;
#[cfg(target_arch = "x86_64")]
use x86_64 as instructions;

/// Copies pieces with the best instructions that this processor has.
///
/// It is a small value without state; copy it wherever a thread needs one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copier {
    vectors: Vectors,
    forced: Option<Strategy>,
}

/// Where the pieces lie: piece `i` goes from `src_base + src_index[i] * src_stride` to
/// `dst_base + dst_index[i] * dst_stride`.
#[derive(Clone, Copy, Debug)]
pub struct Pieces<'a> {
    /// The address that destination indices count from.
    pub dst_base: *mut u8,
    /// The distance between two neighbouring destination indices, in bytes.
    pub dst_stride: usize,
    /// The address that source indices count from.
    pub src_base: *const u8,
    /// The distance between two neighbouring source indices, in bytes.
    pub src_stride: usize,
    /// The length of each piece.
    pub piece_bytes: usize,
    /// Where each piece goes; as long as `src_index`.
    pub dst_index: &'a [u32],
    /// Where each piece comes from.
    pub src_index: &'a [u32],
}

/// The instructions that a streamed copy uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vectors {
    /// No streaming stores: every copy goes through the cache.
    Plain,
    /// Four 16-byte registers a line.
    Sse2,
    /// Two 32-byte registers a line.
    Avx2,
    /// One 64-byte register a line.
    Avx512,
    /// Two pairs of 16-byte registers a line, on 64-bit Arm.
    Neon,
}

/// How one call moves its bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Strategy {
    /// Ordinary stores: the bytes stay in the cache for a reader who comes at once.
    Cached,
    /// Streaming stores past the cache, four pieces side by side.
    Streamed,
}

impl Copier {
    /// The best that this processor can do, found at run time.
    pub fn detect() -> Copier {
        [Vectors::Neon, Vectors::Avx512, Vectors::Avx2, Vectors::Sse2]
            .into_iter()
            .find_map(Copier::with_vectors)
            .unwrap_or(Copier { vectors: Vectors::Plain, forced: None })
    }

    /// A copier with exactly these instructions, or `None` where the processor lacks them.
    pub fn with_vectors(vectors: Vectors) -> Option<Copier> {
        vectors.supported().then_some(Copier { vectors, forced: None })
    }

    /// The same copier, with one strategy for every call: for benchmarks and tests, and for a caller who
    /// knows who reads next.
    ///
    /// Without streaming stores ([`Vectors::Plain`]) the cached copy stays.
    pub fn force(self, strategy: Strategy) -> Copier {
        Copier { forced: Some(strategy), ..self }
    }

    /// The instructions in use.
    pub fn vectors(&self) -> Vectors {
        self.vectors
    }

    /// What a call with pieces of this length and this total does.
    pub fn strategy(&self, piece_bytes: usize, total_bytes: usize) -> Strategy {
        if self.vectors == Vectors::Plain || piece_bytes < STREAM_FROM_PIECE_BYTES {
            return Strategy::Cached;
        }
        self.forced.unwrap_or(if total_bytes < STREAM_FROM_TOTAL_BYTES {
            Strategy::Cached
        } else {
            Strategy::Streamed
        })
    }

    /// Copies one run of bytes.
    ///
    /// # Safety
    /// `src` must be readable and `dst` writable for `bytes`, and the two must not overlap.
    pub unsafe fn copy(&self, dst: *mut u8, src: *const u8, bytes: usize) {
        // SAFETY: one piece at index zero is exactly the run that the caller vouches for.
        unsafe { self.copy_pieces(Pieces::run(dst, src, bytes)) }
    }

    /// Copies every piece, in no particular order.
    ///
    /// # Safety
    /// Every source piece must be readable and every destination piece writable for `piece_bytes`; no
    /// destination piece may overlap a source piece or another destination piece.
    ///
    /// # Panics
    /// If the two index lists differ in length.
    pub unsafe fn copy_pieces(&self, pieces: Pieces<'_>) {
        pieces.assert_well_formed();
        // SAFETY: the caller's promises are the ones that both ways ask for; the vectors of a copier were
        // found on this processor when it was made.
        unsafe {
            match self.strategy(pieces.piece_bytes, pieces.total_bytes()) {
                Strategy::Cached => cached::copy(pieces),
                Strategy::Streamed => self.vectors.stream(pieces),
            }
        }
    }
}

impl<'a> Pieces<'a> {
    /// One run of bytes, as a list of one piece.
    pub fn run(dst: *mut u8, src: *const u8, bytes: usize) -> Pieces<'static> {
        Pieces {
            dst_base: dst,
            dst_stride: 0,
            src_base: src,
            src_stride: 0,
            piece_bytes: bytes,
            dst_index: &[0],
            src_index: &[0],
        }
    }

    /// How many pieces there are.
    pub fn count(&self) -> usize {
        self.src_index.len()
    }

    /// The bytes of all pieces together.
    pub fn total_bytes(&self) -> usize {
        self.piece_bytes * self.count()
    }

    /// # Panics
    /// If the lists differ in length.
    pub fn assert_well_formed(&self) {
        assert_eq!(self.src_index.len(), self.dst_index.len(), "each piece has a source and a destination");
    }

    /// The pieces at these places of the lists.
    pub fn range(self, range: core::ops::Range<usize>) -> Pieces<'a> {
        Pieces { dst_index: &self.dst_index[range.clone()], src_index: &self.src_index[range], ..self }
    }

    /// The source address of a piece. It is computed with wrapping arithmetic, because a prefetch may ask
    /// for it without any promise about the memory there.
    #[inline(always)]
    fn src(&self, piece: usize) -> *const u8 {
        self.src_base.wrapping_add(self.src_index[piece] as usize * self.src_stride)
    }

    #[inline(always)]
    fn dst(&self, piece: usize) -> *mut u8 {
        self.dst_base.wrapping_add(self.dst_index[piece] as usize * self.dst_stride)
    }
}

impl Vectors {
    fn supported(self) -> bool {
        instructions::supported(self)
    }

    /// # Safety
    /// As [`Copier::copy_pieces`]; the processor must have these vectors, and they must not be
    /// [`Vectors::Plain`].
    unsafe fn stream(self, pieces: Pieces<'_>) {
        // SAFETY: passed on unchanged.
        unsafe { instructions::stream(self, pieces) }
    }
}

/// Other processors have no streaming stores here.
#[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
mod instructions {
    use super::{Pieces, Vectors};

    pub(super) fn supported(vectors: Vectors) -> bool {
        vectors == Vectors::Plain
    }

    /// # Safety
    /// None is needed: no copier gets here.
    pub(super) unsafe fn stream(vectors: Vectors, _pieces: Pieces<'_>) {
        unreachable!("{vectors:?}: a copier without streaming stores never chooses to stream")
    }
}

/// From this total on a copy streams. Below it, the reader's misses and the fence cost more than the saved
/// reads (measured with a reader on another core that reads all bytes right after the copy).
const STREAM_FROM_TOTAL_BYTES: usize = 16 << 10;

/// Shorter pieces have too few whole lines: their ragged ends would dominate.
const STREAM_FROM_PIECE_BYTES: usize = 512;

#[cfg(test)]
mod tests;
