//! The copy through the cache: the C library's `memcpy` for each piece, with the next pieces asked for
//! early where they are short.

use super::Pieces;
use crate::{prefetch_read, prefetch_write};

/// # Safety
/// As [`super::Copier::copy_pieces`].
pub(super) unsafe fn copy(pieces: Pieces<'_>) {
    let ahead = if pieces.piece_bytes < PREFETCH_BELOW_PIECE_BYTES {
        AHEAD_BYTES.div_ceil(pieces.piece_bytes.max(LINE_BYTES))
    } else {
        0
    };
    if ahead > 0 {
        // The first piece is not asked for: its copy begins at once.
        for piece in 1..ahead.min(pieces.count()) {
            prefetch_piece(&pieces, piece);
        }
    }
    for piece in 0..pieces.count() {
        if ahead > 0 && piece + ahead < pieces.count() {
            prefetch_piece(&pieces, piece + ahead);
        }
        // SAFETY: the caller vouches for the piece at both ends and that they do not overlap.
        unsafe { core::ptr::copy_nonoverlapping(pieces.src(piece), pieces.dst(piece), pieces.piece_bytes) }
    }
}

/// From here on the hardware prefetcher does as well, and the extra instructions only cost.
const PREFETCH_BELOW_PIECE_BYTES: usize = 4096;

/// How far the prefetch runs ahead.
const AHEAD_BYTES: usize = 2048;

const LINE_BYTES: usize = 64;

fn prefetch_piece(pieces: &Pieces<'_>, piece: usize) {
    let (src, dst) = (pieces.src(piece), pieces.dst(piece));
    for offset in (0..pieces.piece_bytes).step_by(LINE_BYTES) {
        prefetch_read(src.wrapping_add(offset));
        prefetch_write(dst.wrapping_add(offset));
    }
}
