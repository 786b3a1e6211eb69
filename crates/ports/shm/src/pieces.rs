//! An op's pieces, as what moves them wants them.

use crossdock_transport::{Op, Shape};

use crate::copy::Pieces;
use crate::process_memory::ProcessPieces;

/// Where the bytes go.
pub(crate) enum Side {
    Local,
    Remote,
}

/// An op's pieces between two mapped regions. Its numbers fit a `usize` where they are used, because what they lead to
/// lies in memory.
pub(crate) fn pieces<'a>(op: &Op<'a>, to: Side, to_base: *mut u8, from_base: *const u8) -> Pieces<'a> {
    match (op.shape, to) {
        (Shape::Span { local_offset, remote_offset, bytes, .. }, to) => {
            let (to_offset, from_offset) = match to {
                Side::Local => (local_offset, remote_offset),
                Side::Remote => (remote_offset, local_offset),
            };
            Pieces::run(
                to_base.wrapping_add(to_offset as usize),
                from_base.wrapping_add(from_offset as usize),
                bytes as usize,
            )
        }
        (
            Shape::Pages {
                local_offset,
                local_stride_bytes,
                local_pages,
                remote_offset,
                remote_stride_bytes,
                remote_pages,
                piece_bytes,
                ..
            },
            to,
        ) => {
            let local = (local_offset, local_stride_bytes, local_pages);
            let remote = (remote_offset, remote_stride_bytes, remote_pages);
            let ((to_offset, dst_stride, dst_index), (from_offset, src_stride, src_index)) = match to {
                Side::Local => (local, remote),
                Side::Remote => (remote, local),
            };
            Pieces {
                dst_base: to_base.wrapping_add(to_offset as usize),
                dst_stride: dst_stride as usize,
                src_base: from_base.wrapping_add(from_offset as usize),
                src_stride: src_stride as usize,
                piece_bytes: piece_bytes as usize,
                dst_index,
                src_index,
            }
        }
    }
}

/// An op's pieces between a mapped region and one at `address` of the peer.
pub(crate) fn process_pieces<'a>(op: &Op<'a>, base: *mut u8, address: u64) -> ProcessPieces<'a> {
    match op.shape {
        Shape::Span { local_offset, remote_offset, bytes, .. } => ProcessPieces {
            local_base: base.wrapping_add(local_offset as usize),
            local_stride: 0,
            remote_base: address + remote_offset,
            remote_stride: 0,
            piece_bytes: bytes as usize,
            local_index: &[0],
            remote_index: &[0],
        },
        Shape::Pages {
            local_offset,
            local_stride_bytes,
            local_pages,
            remote_offset,
            remote_stride_bytes,
            remote_pages,
            piece_bytes,
            ..
        } => ProcessPieces {
            local_base: base.wrapping_add(local_offset as usize),
            local_stride: local_stride_bytes as usize,
            remote_base: address + remote_offset,
            remote_stride: remote_stride_bytes,
            piece_bytes: piece_bytes as usize,
            local_index: local_pages,
            remote_index: remote_pages,
        },
    }
}
