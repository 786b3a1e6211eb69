//! What moves: spans and pages, with or without an immediate and a token.

use crate::{Error, GrantId, LocalId, RemoteId, Result};

/// The caller's number for an op whose end it wants to hear of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Token(pub u64);

/// Which way the bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From local memory into the peer's.
    Write,
    /// From the peer's memory into local memory.
    Read,
}

/// One op: a move of bytes, a notification, or both.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op<'a> {
    /// Which way.
    pub direction: Direction,
    /// Under which grant of the peer. Ignored for a bare notification.
    pub grant: GrantId,
    /// From where to where.
    pub shape: Shape<'a>,
    /// Told to the peer after the bytes ([`Event::Arrived`](crate::Event::Arrived)). Not with reads.
    pub imm: Option<u32>,
    /// Asks for [`Event::Done`](crate::Event::Done). Without a token an op ends silently, covered by the next
    /// token of its lane.
    pub token: Option<Token>,
}

/// The two forms of an op.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape<'a> {
    /// One stretch of bytes. Zero bytes with an immediate are a bare notification; the regions are not looked at.
    Span {
        /// The local region.
        local: LocalId,
        /// Where in it.
        local_offset: u64,
        /// The peer's region.
        remote: RemoteId,
        /// Where in it.
        remote_offset: u64,
        /// How long.
        bytes: u64,
    },
    /// Piece `i` lies at `local_offset + local_pages[i] * local_stride_bytes` here and at
    /// `remote_offset + remote_pages[i] * remote_stride_bytes` there. The lists are of the same length.
    Pages {
        /// The local region.
        local: LocalId,
        /// Where piece 0 of the local side begins.
        local_offset: u64,
        /// The distance of local pages.
        local_stride_bytes: u64,
        /// Local page numbers.
        local_pages: &'a [u32],
        /// The peer's region.
        remote: RemoteId,
        /// Where piece 0 of the remote side begins.
        remote_offset: u64,
        /// The distance of the peer's pages.
        remote_stride_bytes: u64,
        /// The peer's page numbers.
        remote_pages: &'a [u32],
        /// The length of each piece.
        piece_bytes: u64,
    },
}

impl<'a> Op<'a> {
    /// A notification without bytes.
    pub fn notify(imm: u32) -> Op<'static> {
        Op {
            direction: Direction::Write,
            grant: GrantId::NONE,
            shape: Shape::Span {
                local: LocalId(0),
                local_offset: 0,
                remote: RemoteId(0),
                remote_offset: 0,
                bytes: 0,
            },
            imm: Some(imm),
            token: None,
        }
    }

    /// How many bytes the op moves; `None` if that is more than a `u64` counts.
    pub fn bytes(&self) -> Option<u64> {
        match self.shape {
            Shape::Span { bytes, .. } => Some(bytes),
            Shape::Pages { local_pages, piece_bytes, .. } => {
                piece_bytes.checked_mul(local_pages.len() as u64)
            }
        }
    }

    /// How many bytes a [short post](Posted) took of this op, of which it says `within`.
    pub fn part_bytes(&self, within: u64) -> u64 {
        match self.shape {
            Shape::Span { .. } => within,
            Shape::Pages { piece_bytes, .. } => within.saturating_mul(piece_bytes),
        }
    }

    /// What is left of this op after a [short post](Posted) took `within` of it.
    ///
    /// # Panics
    /// If `within` is more than a port can have taken of this op.
    pub fn advance(&self, within: u64) -> Op<'a> {
        let mut rest = *self;
        match &mut rest.shape {
            Shape::Span { local_offset, remote_offset, bytes, .. } => {
                assert!(within <= *bytes, "advanced beyond the end of a span");
                *local_offset += within;
                *remote_offset += within;
                *bytes -= within;
            }
            Shape::Pages { local_pages, remote_pages, .. } => {
                let pieces = within as usize;
                *local_pages = &local_pages[pieces..];
                *remote_pages = &remote_pages[pieces..];
            }
        }
        rest
    }

    /// Checks what can be checked without knowing the regions: equal lists, no immediate on a read, sums that
    /// do not overflow. Returns the furthest byte touched on the local and on the remote side.
    pub fn extents(&self) -> Result<(u64, u64)> {
        if self.direction == Direction::Read && self.imm.is_some() {
            return Err(Error::BadOp { reason: "a read cannot carry an immediate" });
        }
        let overflow = || Error::BadOp { reason: "offsets overflow" };
        match self.shape {
            Shape::Span { local_offset, remote_offset, bytes, .. } => Ok((
                local_offset.checked_add(bytes).ok_or_else(overflow)?,
                remote_offset.checked_add(bytes).ok_or_else(overflow)?,
            )),
            Shape::Pages {
                local_offset,
                local_stride_bytes,
                local_pages,
                remote_offset,
                remote_stride_bytes,
                remote_pages,
                piece_bytes,
                ..
            } => {
                if local_pages.len() != remote_pages.len() {
                    return Err(Error::BadOp { reason: "page lists of different lengths" });
                }
                let end = |offset: u64, stride: u64, pages: &[u32]| -> Option<u64> {
                    if pages.is_empty() {
                        return Some(offset);
                    }
                    // Unlike `max`, which compares references, a fold of numbers is done many at a time.
                    let last = pages.iter().copied().fold(0, u32::max);
                    stride.checked_mul(u64::from(last))?.checked_add(offset)?.checked_add(piece_bytes)
                };
                Ok((
                    end(local_offset, local_stride_bytes, local_pages).ok_or_else(overflow)?,
                    end(remote_offset, remote_stride_bytes, remote_pages).ok_or_else(overflow)?,
                ))
            }
        }
    }
}

/// How far a post came.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Posted {
    /// This many ops of the slice were taken whole.
    pub ops: usize,
    /// Of the next one, this much was taken: bytes of a span, pieces of a paged op. Its immediate and its token
    /// go with its last part.
    pub within: u64,
}

impl Posted {
    /// All of `ops`.
    pub fn all(ops: &[Op<'_>]) -> Self {
        Self { ops: ops.len(), within: 0 }
    }
}
