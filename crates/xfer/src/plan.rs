//! Blocks made into ops: blocks that follow each other on both sides are one, and blocks of one length that lie as pages do
//! are one op with two lists.

use crossdock_transport::{Direction, GrantId, LocalId, Op, RemoteId, Shape};

use crate::table::Table;
use crate::{Block, TransferError};

/// Bytes, or pieces, that go under one number: small enough that several lanes share a transfer, large enough that their
/// answers cost nothing.
pub(crate) const CHUNK_BYTES: u64 = 8 << 20;
const CHUNK_PIECES: usize = 4096;

/// Where bytes are on both sides: the regions, and where in them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Place {
    local_region: u32,
    local: u64,
    remote_region: u32,
    remote: u64,
    bytes: u64,
}

impl Place {
    fn is_followed_by(&self, next: &Place) -> bool {
        (self.local_region, self.remote_region) == (next.local_region, next.remote_region)
            && self.local + self.bytes == next.local
            && self.remote + self.bytes == next.remote
    }

    /// Whether both are pages of one size in the same buffers.
    fn is_page_like(&self, first: &Place) -> bool {
        let aligned = |at: u64, first: u64| at % self.bytes == first % self.bytes;
        (self.local_region, self.remote_region, self.bytes)
            == (first.local_region, first.remote_region, first.bytes)
            && aligned(self.local, first.local)
            && aligned(self.remote, first.remote)
    }

    fn page(&self) -> Option<(u32, u32)> {
        let number = |at: u64| u32::try_from(at / self.bytes).ok();
        Some((number(self.local)?, number(self.remote)?))
    }
}

/// Ops that go under one number.
#[derive(Debug, Default, PartialEq, Eq)]
pub(crate) struct Chunk {
    parts: Vec<Part>,
}

#[derive(Debug, PartialEq, Eq)]
enum Part {
    Span(Place),
    /// Pages as long as the place, whose offsets are those of page 0.
    Pages {
        zero: Place,
        local: Vec<u32>,
        remote: Vec<u32>,
    },
}

/// Plans a transfer: `remote` is what the peer has registered.
pub(crate) fn plan(
    blocks: &[Block],
    local: &Table,
    remote: &Table,
    peer: &str,
) -> Result<Vec<Chunk>, TransferError> {
    let mut places: Vec<Place> = Vec::with_capacity(blocks.len());
    for block in blocks.iter().filter(|block| block.bytes > 0) {
        let &Block { local: here, remote: there, bytes } = block;
        let Some((local_region, local)) = local.find(here, bytes) else {
            return Err(TransferError::UnknownLocal { address: here, bytes });
        };
        let Some((remote_region, remote)) = remote.find(there, bytes) else {
            return Err(TransferError::UnknownRemote { peer: peer.to_owned(), address: there, bytes });
        };
        let place = Place { local_region, local, remote_region, remote, bytes };
        match places.last_mut() {
            Some(last) if last.is_followed_by(&place) => last.bytes += bytes,
            _ => places.push(place),
        }
    }
    let mut chunks = vec![Chunk::default()];
    let mut room = (CHUNK_BYTES, CHUNK_PIECES);
    for mut place in places.into_iter() {
        while place.bytes > 0 {
            if room.0 == 0 || room.1 == 0 {
                chunks.push(Chunk::default());
                room = (CHUNK_BYTES, CHUNK_PIECES);
            }
            let taken = Place { bytes: place.bytes.min(room.0), ..place };
            let chunk = chunks.last_mut().expect("there is one");
            chunk.push(taken);
            (place.local, place.remote, place.bytes) =
                (place.local + taken.bytes, place.remote + taken.bytes, place.bytes - taken.bytes);
            room = (room.0 - taken.bytes, room.1 - 1);
        }
    }
    Ok(chunks)
}

impl Chunk {
    fn push(&mut self, place: Place) {
        if let Some(page) = place.page() {
            match self.parts.last_mut() {
                Some(Part::Pages { zero, local, remote }) if place.is_page_like(zero) => {
                    local.push(page.0);
                    remote.push(page.1);
                    return;
                }
                Some(last @ Part::Span(_)) => {
                    let Part::Span(first) = *last else { unreachable!("it is a span") };
                    if let Some(first_page) = first.page()
                        && place.is_page_like(&first)
                    {
                        let zero = Place {
                            local: first.local % first.bytes,
                            remote: first.remote % first.bytes,
                            ..first
                        };
                        *last = Part::Pages {
                            zero,
                            local: vec![first_page.0, page.0],
                            remote: vec![first_page.1, page.1],
                        };
                        return;
                    }
                }
                _ => {}
            }
        }
        self.parts.push(Part::Span(place));
    }

    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// The ops, by what the regions are called on a lane; `None` if one of them is not known there.
    pub fn ops<'a>(
        &'a self,
        direction: Direction,
        grant: GrantId,
        locals: &[LocalId],
        remotes: &[RemoteId],
    ) -> Option<Vec<Op<'a>>> {
        let regions = |place: &Place| {
            Some((*locals.get(place.local_region as usize)?, *remotes.get(place.remote_region as usize)?))
        };
        let shape = |part: &'a Part| {
            Some(match part {
                Part::Span(place) => {
                    let (local, remote) = regions(place)?;
                    Shape::Span {
                        local,
                        local_offset: place.local,
                        remote,
                        remote_offset: place.remote,
                        bytes: place.bytes,
                    }
                }
                Part::Pages { zero, local: local_pages, remote: remote_pages } => {
                    let (local, remote) = regions(zero)?;
                    Shape::Pages {
                        local,
                        local_offset: zero.local,
                        local_stride_bytes: zero.bytes,
                        local_pages,
                        remote,
                        remote_offset: zero.remote,
                        remote_stride_bytes: zero.bytes,
                        remote_pages,
                        piece_bytes: zero.bytes,
                    }
                }
            })
        };
        let op = |shape| Op { direction, grant, shape, imm: None, token: None };
        self.parts.iter().map(|part| shape(part).map(op)).collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::table::Stretch;

    fn table(stretches: &[(u64, u64)]) -> Table {
        let mut table = Table::default();
        for (region, &(address, bytes)) in (0..).zip(stretches) {
            table.put(address, Stretch { bytes, region });
        }
        table
    }

    /// Byte by byte, from where to where.
    fn moved(chunks: &[Chunk], bases: (&[u64], &[u64])) -> Vec<(u64, u64)> {
        let (locals, remotes): (Vec<LocalId>, Vec<RemoteId>) =
            ((0..9).map(LocalId).collect(), (0..9).map(RemoteId).collect());
        let mut moved = Vec::new();
        for chunk in chunks {
            let ops = chunk.ops(Direction::Write, GrantId::standing(0), &locals, &remotes).unwrap();
            for op in ops {
                let mut add = |local: LocalId, from: u64, remote: RemoteId, to: u64, bytes: u64| {
                    let (here, there) = (bases.0[local.0 as usize], bases.1[remote.0 as usize]);
                    moved.extend((0..bytes).map(|at| (here + from + at, there + to + at)));
                };
                match op.shape {
                    Shape::Span { local, local_offset, remote, remote_offset, bytes } => {
                        add(local, local_offset, remote, remote_offset, bytes);
                    }
                    Shape::Pages {
                        local,
                        local_pages,
                        remote,
                        remote_pages,
                        piece_bytes,
                        local_offset,
                        remote_offset,
                        ..
                    } => {
                        for (&from, &to) in local_pages.iter().zip(remote_pages) {
                            let at = |offset: u64, page: u32| offset + u64::from(page) * piece_bytes;
                            add(local, at(local_offset, from), remote, at(remote_offset, to), piece_bytes);
                        }
                    }
                }
            }
        }
        moved
    }

    #[test]
    fn pages_are_one_op_and_what_follows_is_one_span() {
        let (here, there) = (table(&[(1000, 1 << 20)]), table(&[(5000, 1 << 20)]));
        let pages = |ids: &[(u64, u64)]| -> Vec<Block> {
            ids.iter()
                .map(|&(from, to)| Block { local: 1000 + from * 64, remote: 5000 + to * 64, bytes: 64 })
                .collect()
        };
        let scattered = plan(&pages(&[(5, 0), (1, 9), (7, 3)]), &here, &there, "p").unwrap();
        assert_eq!((scattered.len(), scattered[0].parts.len()), (1, 1));
        let following = plan(&pages(&[(5, 0), (6, 1), (7, 2)]), &here, &there, "p").unwrap();
        assert!(matches!(following[0].parts[..], [Part::Span(Place { bytes: 192, .. })]));
        let large = [Block { local: 1000, remote: 5000, bytes: 1 << 20 }; 20];
        assert_eq!(plan(&large, &here, &there, "p").unwrap().len(), 3);
        assert!(plan(&[], &here, &there, "p").unwrap()[0].is_empty());
        let bad = Block { local: 999, remote: 5000, bytes: 2 };
        assert_eq!(
            plan(&[bad], &here, &there, "p"),
            Err(TransferError::UnknownLocal { address: 999, bytes: 2 })
        );
        let bad = Block { local: 1000, remote: 4999, bytes: 2 };
        assert!(matches!(plan(&[bad], &here, &there, "p"), Err(TransferError::UnknownRemote { .. })));
    }

    proptest! {
        #[test]
        fn every_byte_moves_from_and_to_its_address(
            blocks in prop::collection::vec((0usize..2, 0u64..200, 0usize..2, 0u64..200, prop_oneof![Just(16u64), Just(32), 0u64..40]), 0..60),
        ) {
            let (bases_here, bases_there) = ([1_003, 2_001], [7_000, 9_009]);
            let (here, there) = (table(&bases_here.map(|at| (at, 240))), table(&bases_there.map(|at| (at, 240))));
            let blocks: Vec<Block> = blocks
                .into_iter()
                .map(|(from, local, to, remote, bytes)| Block { local: bases_here[from] + local, remote: bases_there[to] + remote, bytes })
                .collect();
            let expected: Vec<(u64, u64)> = blocks
                .iter()
                .flat_map(|block| (0..block.bytes).map(|at| (block.local + at, block.remote + at)))
                .collect();
            let chunks = plan(&blocks, &here, &there, "p").unwrap();
            prop_assert_eq!(moved(&chunks, (&bases_here, &bases_there)), expected);
        }
    }
}
