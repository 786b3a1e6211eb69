//! What can go wrong, whose fault it is, and what helps.

use crossdock_memory::MemoryError;

use crate::config::{Difference, Violations};
use crate::layout::LayoutError;

/// Why there is no group.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum GroupError {
    /// The configuration violates limits: all of them are listed.
    #[error("the configuration is not possible: {0}")]
    Config(#[from] Violations),
    /// The rank is none of the group's.
    #[error("rank {rank} of a group of {ranks}")]
    NoSuchRank {
        /// Which rank.
        rank: u32,
        /// How many the group has.
        ranks: u32,
    },
    /// A rank's region is not as long as its configuration says.
    #[error("the region of rank {rank} has {bytes} bytes and not {needed}")]
    WrongRegion {
        /// Whose region.
        rank: u32,
        /// How long it is.
        bytes: usize,
        /// How long it has to be.
        needed: usize,
    },
    /// A region could not be allocated.
    #[error("no memory for the region of rank {rank}: {error}")]
    Memory {
        /// Whose region.
        rank: u32,
        /// Why.
        error: MemoryError,
    },
}

/// Why a call of a slot failed.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum EpError {
    /// This call's arguments do not fit each other or the group. Nothing was sent.
    #[error("{what} has {len} elements and not {expected}")]
    WrongLength {
        /// Which argument.
        what: &'static str,
        /// How long it is.
        len: usize,
        /// How long it has to be.
        expected: usize,
    },
    /// More tokens than this rank may dispatch in a step. Nothing was sent.
    #[error(
        "{tokens} tokens are more than this rank's limit of {limit}: use more steps, or a group with a larger one"
    )]
    TooManyTokens {
        /// How many were given.
        tokens: usize,
        /// This rank's limit.
        limit: u32,
    },
    /// A token may name an expert more than once, but an expert has room for this rank's limit of rows and no more.
    /// Nothing was sent.
    #[error("{choices} choices fall on expert {expert}, which has room for {limit} rows of this rank")]
    TooManyChoices {
        /// Which expert.
        expert: u32,
        /// How many.
        choices: u32,
        /// This rank's limit of tokens.
        limit: u32,
    },
    /// Rows of this form are not possible. Nothing was sent.
    #[error("rows of this form are not possible: {0}")]
    Payload(#[from] Violations),
    /// Rows of this form are longer than the group's. Nothing was sent.
    #[error(
        "rows of {row_bytes} and scales of {scale_bytes} bytes do not fit the group's of {most_bytes} together"
    )]
    PayloadTooLarge {
        /// Bytes of a row.
        row_bytes: u64,
        /// Bytes of its scales.
        scale_bytes: u64,
        /// What the group has room for.
        most_bytes: u64,
    },
    /// The choices name an expert that does not exist. Nothing was sent.
    #[error(transparent)]
    Choices(#[from] LayoutError),
    /// Another rank made another call than this one, in this slot at this time. Every rank has to make the same calls
    /// in the same order.
    #[error("rank {rank} made another call: {}", list(differences))]
    Mismatch {
        /// Which rank.
        rank: u32,
        /// Where its call differs from this one.
        differences: Vec<Difference>,
    },
    /// The others go on without this rank, because they had waited for it until their deadline.
    #[error("rank {by} has masked this rank: the others go on without it")]
    Masked {
        /// Which rank said so first.
        by: u32,
    },
    /// A rank wrote what cannot be.
    #[error("rank {rank} wrote {what} {value}, which is more than {most}")]
    Nonsense {
        /// Which rank.
        rank: u32,
        /// Which number.
        what: &'static str,
        /// What it is.
        value: u64,
        /// The most that it can be.
        most: u64,
    },
    /// A row is not what its source sent.
    #[error("a row of token {token} of rank {rank} does not have the checksum that its source computed")]
    Corrupted {
        /// The source.
        rank: u32,
        /// Its token.
        token: u32,
    },
    /// Weight was lost with masked ranks, and the policy is not to accept that.
    #[error("{tokens} tokens lost weight because ranks are masked: {masked:?}")]
    WeightLost {
        /// How many tokens.
        tokens: usize,
        /// The ranks.
        masked: Vec<u32>,
    },
}

impl EpError {
    /// Refuses the first of some lists, by name, that is not as long as it has to be: how long it is, then what is expected.
    pub(crate) fn check_lengths(
        lists: impl IntoIterator<Item = (&'static str, usize, usize)>,
    ) -> Result<(), EpError> {
        match lists.into_iter().find(|(_, len, expected)| len != expected) {
            Some((what, len, expected)) => Err(EpError::WrongLength { what, len, expected }),
            None => Ok(()),
        }
    }
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(Difference::to_string).collect::<Vec<_>>().join("; ")
}
