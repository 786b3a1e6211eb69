//! The streamed copy: four streams side by side, prefetched, stored past the cache.
//!
//! It is written once over [`Line`], which each instruction set implements, and over [`Quads`], which says
//! what the four streams are: four pieces of a list, or the four quarters of one large piece.

use super::Pieces;

/// One cache line in registers.
pub(super) trait Line: Copy {
    /// # Safety
    /// `src` must be readable for [`LINE_BYTES`].
    unsafe fn load(src: *const u8) -> Self;

    /// Stores past the cache.
    ///
    /// # Safety
    /// `dst` must be writable for [`LINE_BYTES`] and aligned to them, and [`Line::order`] must come before
    /// the bytes are published.
    unsafe fn stream(self, dst: *mut u8);

    /// Asks for the line around `src` in the second-level cache; any address is allowed.
    fn prefetch(src: *const u8);

    /// Makes the streamed stores as ordered as plain ones: a release that follows publishes them.
    fn order();
}

/// A multiple of what a processor moves at once; streamed stores need whole ones.
pub(super) const LINE_BYTES: usize = 64;

/// Copies all pieces and leaves them as ordered as plain stores would.
///
/// # Safety
/// As [`super::Copier::copy_pieces`]; and the caller must be compiled for the instructions of `L`, into which
/// this function is inlined.
#[inline(always)]
pub(super) unsafe fn copy<L: Line>(pieces: Pieces<'_>) {
    let whole = pieces.count() / STREAMS * STREAMS;
    // SAFETY: the caller vouches for every piece. Each piece is in exactly one of the two ranges, and the
    // quarters of a piece lie within it.
    unsafe {
        copy_quads::<L, _>(PieceQuads(pieces.range(0..whole)), pieces.piece_bytes);
        for piece in whole..pieces.count() {
            let (dst, src) = (pieces.dst(piece), pieces.src(piece));
            let quarters = QuarterQuad { dst, src, quarter_bytes: quarter_bytes(pieces.piece_bytes) };
            copy_quads::<L, _>(quarters, quarters.quarter_bytes);
            let done_bytes = STREAMS * quarters.quarter_bytes;
            let rest_bytes = pieces.piece_bytes - done_bytes;
            core::ptr::copy_nonoverlapping(src.add(done_bytes), dst.add(done_bytes), rest_bytes);
        }
    }
    L::order();
}

/// Four are enough to hide the misses; eight gain nothing more with one thread and lose with two.
const STREAMS: usize = 4;

/// The streams move this much in turn: long enough for the store buffers to leave as whole lines, short
/// enough to keep all streams in flight.
const TURN_LINES: usize = 4;
const TURN_BYTES: usize = TURN_LINES * LINE_BYTES;

/// How far each stream's prefetch runs ahead. Short pieces need the longer way, because the hardware
/// prefetcher never gets going inside them and each of them begins with a page walk.
fn ahead_bytes(stream_bytes: usize) -> usize {
    if stream_bytes < 4096 { 8192 } else { 1024 }
}

/// A quarter in whole lines, so that aligned pieces have aligned quarters.
fn quarter_bytes(piece_bytes: usize) -> usize {
    piece_bytes / STREAMS / LINE_BYTES * LINE_BYTES
}

/// Where the streams begin: quad after quad, four streams each, all of the same length.
trait Quads: Copy {
    fn count(&self) -> usize;
    fn src(&self, quad: usize) -> [*const u8; STREAMS];
    fn dst(&self, quad: usize) -> [*mut u8; STREAMS];
}

/// Each quad is four neighbours in the list; the list's length is a multiple of four.
#[derive(Clone, Copy)]
struct PieceQuads<'a>(Pieces<'a>);

impl Quads for PieceQuads<'_> {
    #[inline(always)]
    fn count(&self) -> usize {
        self.0.count() / STREAMS
    }

    #[inline(always)]
    fn src(&self, quad: usize) -> [*const u8; STREAMS] {
        core::array::from_fn(|stream| self.0.src(quad * STREAMS + stream))
    }

    #[inline(always)]
    fn dst(&self, quad: usize) -> [*mut u8; STREAMS] {
        core::array::from_fn(|stream| self.0.dst(quad * STREAMS + stream))
    }
}

/// The only quad is the four quarters of one piece.
#[derive(Clone, Copy)]
struct QuarterQuad {
    dst: *mut u8,
    src: *const u8,
    quarter_bytes: usize,
}

impl Quads for QuarterQuad {
    #[inline(always)]
    fn count(&self) -> usize {
        1
    }

    #[inline(always)]
    fn src(&self, _quad: usize) -> [*const u8; STREAMS] {
        core::array::from_fn(|stream| self.src.wrapping_add(stream * self.quarter_bytes))
    }

    #[inline(always)]
    fn dst(&self, _quad: usize) -> [*mut u8; STREAMS] {
        core::array::from_fn(|stream| self.dst.wrapping_add(stream * self.quarter_bytes))
    }
}

/// # Safety
/// Every stream of every quad must be readable at its source and writable at its destination for
/// `stream_bytes`, without overlap; the caller must be compiled for the instructions of `L`.
#[inline(always)]
unsafe fn copy_quads<L: Line, Q: Quads>(quads: Q, stream_bytes: usize) {
    if stream_bytes < 2 * LINE_BYTES {
        // Such a stream may hold no whole line at all.
        for quad in 0..quads.count() {
            for (dst, src) in quads.dst(quad).into_iter().zip(quads.src(quad)) {
                // SAFETY: the caller vouches for each stream.
                unsafe { core::ptr::copy_nonoverlapping(src, dst, stream_bytes) };
            }
        }
        return;
    }
    let mut ahead = Ahead::new(&quads, stream_bytes);
    for _ in 0..ahead_bytes(stream_bytes) / TURN_BYTES {
        ahead.prefetch_turn::<L>();
    }
    for quad in 0..quads.count() {
        let mut dst = quads.dst(quad);
        let mut src = quads.src(quad);
        let mut rest_bytes = [stream_bytes; STREAMS];
        for stream in 0..STREAMS {
            // Streaming stores take whole aligned lines; what lies before the first one goes the plain way.
            let head_bytes = dst[stream].align_offset(LINE_BYTES);
            if head_bytes > 0 {
                // SAFETY: a head is shorter than a line, and a stream is at least two lines long.
                unsafe {
                    core::ptr::copy_nonoverlapping(src[stream], dst[stream], head_bytes);
                    dst[stream] = dst[stream].add(head_bytes);
                    src[stream] = src[stream].add(head_bytes);
                }
                rest_bytes[stream] -= head_bytes;
            }
        }
        // The heads differ by less than a line, so the streams differ by one line at most: all take the same
        // number of turns, and the ends make up for it.
        let turns = rest_bytes.into_iter().min().expect("there are four streams") / TURN_BYTES;
        for turn in 0..turns {
            ahead.prefetch_turn::<L>();
            for stream in 0..STREAMS {
                let offset = turn * TURN_BYTES;
                // SAFETY: `turns` whole turns fit into what is left of each stream, and `dst` is aligned.
                unsafe { copy_lines::<L, TURN_LINES>(dst[stream].add(offset), src[stream].add(offset)) };
            }
        }
        // The prefetch takes its turns over the whole stream, ends included, or it would fall behind.
        for _ in turns..stream_bytes.div_ceil(TURN_BYTES) {
            ahead.prefetch_turn::<L>();
        }
        for stream in 0..STREAMS {
            let mut offset = turns * TURN_BYTES;
            // SAFETY: each step stays within the rest of the stream.
            unsafe {
                while offset + LINE_BYTES <= rest_bytes[stream] {
                    copy_lines::<L, 1>(dst[stream].add(offset), src[stream].add(offset));
                    offset += LINE_BYTES;
                }
                if offset < rest_bytes[stream] {
                    let (dst, src) = (dst[stream].add(offset), src[stream].add(offset));
                    core::ptr::copy_nonoverlapping(src, dst, rest_bytes[stream] - offset);
                }
            }
        }
    }
}

/// # Safety
/// `src` must be readable and `dst` writable for `LINES` lines, and `dst` aligned to a line.
#[inline(always)]
unsafe fn copy_lines<L: Line, const LINES: usize>(dst: *mut u8, src: *const u8) {
    // SAFETY: every line lies within what the caller vouches for. All loads come first, so that a store that
    // waits for a buffer does not hold back a load.
    unsafe {
        let lines: [L; LINES] = core::array::from_fn(|line| L::load(src.add(line * LINE_BYTES)));
        for (line, value) in lines.into_iter().enumerate() {
            value.stream(dst.add(line * LINE_BYTES));
        }
    }
}

/// The place in the list that the prefetch has reached, one turn after another.
struct Ahead<'a, Q> {
    quads: &'a Q,
    stream_bytes: usize,
    quad: usize,
    offset: usize,
    src: [*const u8; STREAMS],
}

impl<'a, Q: Quads> Ahead<'a, Q> {
    #[inline(always)]
    fn new(quads: &'a Q, stream_bytes: usize) -> Self {
        let src = if quads.count() > 0 { quads.src(0) } else { [core::ptr::null(); STREAMS] };
        Ahead { quads, stream_bytes, quad: 0, offset: 0, src }
    }

    #[inline(always)]
    fn prefetch_turn<L: Line>(&mut self) {
        if self.quad == self.quads.count() {
            return;
        }
        let bytes = (self.stream_bytes - self.offset).min(TURN_BYTES);
        for src in self.src {
            let src = src.wrapping_add(self.offset);
            if bytes == TURN_BYTES {
                for line in 0..TURN_LINES {
                    L::prefetch(src.wrapping_add(line * LINE_BYTES));
                }
            } else {
                for line in 0..bytes.div_ceil(LINE_BYTES) {
                    L::prefetch(src.wrapping_add(line * LINE_BYTES));
                }
            }
        }
        self.offset += TURN_BYTES;
        if self.offset >= self.stream_bytes {
            self.offset = 0;
            self.quad += 1;
            if self.quad < self.quads.count() {
                self.src = self.quads.src(self.quad);
            }
        }
    }
}
