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
    /// What a half of a call is to fill, or to send back, does not fit the step. The step is lost for this rank, and the others
    /// learn that it made another call than they, if they make one.
    #[error("{what} has {len} elements and not {expected}; this rank's step is lost")]
    Unfit {
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
    #[error(
        "more than {limit} choices fall on expert {expert}, which has room for so many rows of this rank"
    )]
    TooManyChoices {
        /// Which expert.
        expert: u32,
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
    /// A rank sent the row of a token that chose none of this rank's experts.
    #[error("rank {rank} sent the row of its token {token}, which chose no expert here")]
    Stray {
        /// Who sent it.
        rank: u32,
        /// Which of its tokens.
        token: u32,
    },
    /// Something is not what its rank wrote.
    #[error("{what} of rank {rank} does not have the checksum that it was given there in this step")]
    Corrupted {
        /// Who wrote it.
        rank: u32,
        /// What it is.
        what: Corrupted,
    },
    /// So many ranks are masked that those left are too few to go on.
    #[error("{alive} ranks are left and must be {least}: {masked:?} are masked")]
    TooFewRanks {
        /// How many are left, this one included.
        alive: u32,
        /// How many they must be: [`GroupOptions::least_ranks`](crate::GroupOptions::least_ranks).
        least: u32,
        /// The others.
        masked: Vec<u32>,
    },
    /// The port of a masked rank may still write where results of this step would come.
    #[error("what masked rank {rank} sent may still arrive: its port has not closed in time")]
    StillWriting {
        /// Which rank.
        rank: u32,
    },
    /// A route belongs to another rank, or to another group.
    #[error("the route is none of this rank's")]
    ForeignRoute,
    /// Weight was lost with masked ranks, and the policy is not to accept that.
    #[error("{tokens} tokens lost weight because ranks are masked: {masked:?}")]
    WeightLost {
        /// How many tokens.
        tokens: usize,
        /// The ranks.
        masked: Vec<u32>,
    },
}

/// What does not have its checksum.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Corrupted {
    /// The row of one of its tokens.
    Row {
        /// Which token.
        token: u32,
    },
    /// The list of its rows, or what says what the call is.
    List,
    /// Its result for one of this rank's tokens.
    Result {
        /// Which token.
        token: u32,
    },
}

impl std::fmt::Display for Corrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Corrupted::Row { token } => write!(f, "the row of token {token}"),
            Corrupted::List => f.write_str("the list of rows"),
            Corrupted::Result { token } => write!(f, "the result for token {token}"),
        }
    }
}

/// What may be done about a failed call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Advice {
    /// The arguments are wrong. Nothing was sent, and the others wait: the call can be made again with right ones.
    CorrectArguments,
    /// The step is lost for this rank, and perhaps for others; the next may begin, on all ranks alike.
    NextStep,
    /// The ranks do not make the same calls: their program, or what they are configured with, differs. The next step may
    /// begin on all ranks alike.
    AlignCalls,
    /// This rank is out of the group, which has gone on, or is too small to go on. Only a new group helps.
    NewGroup,
}

impl EpError {
    /// What may be done about it.
    pub fn advice(&self) -> Advice {
        match self {
            EpError::WrongLength { .. }
            | EpError::TooManyTokens { .. }
            | EpError::TooManyChoices { .. }
            | EpError::Payload(_)
            | EpError::PayloadTooLarge { .. }
            | EpError::Choices(_)
            | EpError::ForeignRoute => Advice::CorrectArguments,
            EpError::Mismatch { .. } => Advice::AlignCalls,
            EpError::Unfit { .. }
            | EpError::Stray { .. }
            | EpError::Nonsense { .. }
            | EpError::Corrupted { .. }
            | EpError::WeightLost { .. } => Advice::NextStep,
            EpError::Masked { .. } | EpError::TooFewRanks { .. } | EpError::StillWriting { .. } => {
                Advice::NewGroup
            }
        }
    }

    /// Whether the same call can succeed later, as it was made.
    pub fn is_retryable(&self) -> bool {
        self.advice() == Advice::NextStep
    }

    /// Refuses the first of some lists, by name, that is not as long as it has to be: how long it is, then what is expected.
    pub(crate) fn check_lengths(
        lists: impl IntoIterator<Item = (&'static str, usize, usize)>,
    ) -> Result<(), EpError> {
        match lists.into_iter().find(|(_, len, expected)| len != expected) {
            Some((what, len, expected)) => Err(EpError::WrongLength { what, len, expected }),
            None => Ok(()),
        }
    }

    /// The same for what a half of a call takes, whose step ends with the error.
    pub(crate) fn check_outputs(
        lists: impl IntoIterator<Item = (&'static str, usize, usize)>,
    ) -> Result<(), EpError> {
        EpError::check_lengths(lists).map_err(|error| match error {
            EpError::WrongLength { what, len, expected } => EpError::Unfit { what, len, expected },
            other => other,
        })
    }
}

fn list(differences: &[Difference]) -> String {
    differences.iter().map(Difference::to_string).collect::<Vec<_>>().join("; ")
}
