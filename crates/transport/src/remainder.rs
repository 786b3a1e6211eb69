//! How a port recognises the rest of an op.

use crate::{LocalId, Op, RemoteId, Shape};

/// What a paged op looks like when the rest of it is offered again, after a port took a part. A port has searched the lists for
/// pages outside of the regions when the op was new; to search them at every offer would make the cost of an op grow with
/// its square.
///
/// This is about cost and order only: the lists are known by where they end, and their owner may have changed what they say.
/// Pages are looked at again when they are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Remainder {
    ends: [usize; 2],
    /// Lists that end in the same places and are not of one length are not the rest of an op.
    left: [usize; 2],
    regions: (LocalId, RemoteId),
    offsets: [u64; 2],
    strides_bytes: [u64; 2],
    piece_bytes: u64,
}

impl Remainder {
    /// What is left of `op` after `taken` of its pieces; `None` of a span, which costs nothing to look at.
    pub fn of(op: &Op<'_>, taken: usize) -> Option<Self> {
        let Shape::Pages {
            local,
            local_offset,
            local_stride_bytes,
            local_pages,
            remote,
            remote_offset,
            remote_stride_bytes,
            remote_pages,
            piece_bytes,
        } = op.shape
        else {
            return None;
        };
        let lists = [local_pages, remote_pages];
        Some(Self {
            ends: lists.map(|pages| pages.as_ptr_range().end.addr()),
            left: lists.map(|pages| pages.len().saturating_sub(taken)),
            regions: (local, remote),
            offsets: [local_offset, remote_offset],
            strides_bytes: [local_stride_bytes, remote_stride_bytes],
            piece_bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Direction, GrantId};

    fn op<'a>(local_pages: &'a [u32], remote_pages: &'a [u32]) -> Op<'a> {
        let shape = Shape::Pages {
            local: LocalId(1),
            local_offset: 0,
            local_stride_bytes: 64,
            local_pages,
            remote: RemoteId(2),
            remote_offset: 8,
            remote_stride_bytes: 64,
            remote_pages,
            piece_bytes: 32,
        };
        Op { direction: Direction::Write, grant: GrantId::NONE, shape, imm: None, token: None }
    }

    #[test]
    fn the_rest_of_an_op_is_recognised_and_nothing_else() {
        let (here, there) = ([1, 2, 3, 4], [5, 6, 7, 8]);
        let whole = op(&here, &there);
        let rest = Remainder::of(&whole, 3);
        assert_eq!(rest, Remainder::of(&whole.advance(3), 0));
        assert_ne!(rest, Remainder::of(&whole, 0), "the same op anew");
        assert_ne!(rest, Remainder::of(&whole.advance(2), 0), "more of it than is left");
        assert_ne!(rest, Remainder::of(&op(&here[3..], &there[2..]), 0), "lists of two lengths");
        assert_ne!(rest, Remainder::of(&op(&[4], &there[3..]), 0), "another list");
        let mut moved = whole.advance(3);
        if let Shape::Pages { remote_offset, .. } = &mut moved.shape {
            *remote_offset = 9;
        }
        assert_ne!(rest, Remainder::of(&moved, 0), "another place");
        assert_eq!(Remainder::of(&Op::notify(1), 0), None);
    }
}
