//! Who gets how many of a rank's tokens.

use crate::Experts;

/// How one rank's tokens spread over ranks and experts. All counts are of this rank's tokens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Layout {
    /// By rank: how many distinct tokens go there. A token with several experts on a rank counts once.
    pub tokens_per_rank: Vec<u32>,
    /// By expert: how many choices fell on it. A token that names an expert twice counts twice.
    pub tokens_per_expert: Vec<u32>,
    /// By token, then rank: whether the token goes there.
    pub is_token_in_rank: Vec<bool>,
}

/// A choice that no expert answers to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutError {
    /// Neither -1 nor an expert.
    #[error("choice {choice} of token {token} is {expert}: it must be -1 or below {experts}")]
    NoSuchExpert {
        /// Which token.
        token: usize,
        /// Which of its choices.
        choice: usize,
        /// What it names.
        expert: i64,
        /// How many experts there are.
        experts: u32,
    },
    /// The list does not divide into whole tokens.
    #[error("{len} choices are no whole number of tokens with {top_k} each")]
    Ragged {
        /// How many entries the list has.
        len: usize,
        /// How many a token has.
        top_k: usize,
    },
}

impl Layout {
    /// Counts `choices`, `[tokens, top_k]`: experts, or -1 for none.
    pub fn of(choices: &[i64], top_k: usize, experts: Experts) -> Result<Layout, LayoutError> {
        check_whole(choices.len(), top_k)?;
        let ranks = experts.ranks() as usize;
        let mut layout = Layout {
            tokens_per_rank: vec![0; ranks],
            tokens_per_expert: vec![0; experts.count() as usize],
            is_token_in_rank: vec![false; choices.len() / top_k * ranks],
        };
        for (token, of_token) in choices.chunks_exact(top_k).enumerate() {
            let there = &mut layout.is_token_in_rank[token * ranks..][..ranks];
            for (choice, &expert) in of_token.iter().enumerate() {
                let at = token * top_k + choice;
                let Some(expert) = check_choice(expert, at, top_k, experts.count())? else { continue };
                layout.tokens_per_expert[expert as usize] += 1;
                let rank = experts.place(expert).0 as usize;
                layout.tokens_per_rank[rank] += u32::from(!there[rank]);
                there[rank] = true;
            }
        }
        Ok(layout)
    }

    /// By node: how many distinct tokens go to any of its ranks, where `node_of[rank]` says where a rank is.
    ///
    /// # Panics
    /// If `node_of` does not name a node for each rank.
    pub fn tokens_per_node(&self, node_of: &[u32]) -> Vec<u32> {
        assert_eq!(node_of.len(), self.tokens_per_rank.len(), "a node for each rank");
        let nodes = node_of.iter().max().map_or(0, |&last| last as usize + 1);
        let mut counts = vec![0; nodes];
        let mut there = vec![false; nodes];
        for of_token in self.is_token_in_rank.chunks_exact(node_of.len()) {
            there.fill(false);
            for (rank, _) in of_token.iter().enumerate().filter(|(_, is_in)| **is_in) {
                let node = node_of[rank] as usize;
                counts[node] += u32::from(!there[node]);
                there[node] = true;
            }
        }
        counts
    }
}

/// Refuses a list that does not divide into whole tokens.
pub(crate) fn check_whole(len: usize, top_k: usize) -> Result<(), LayoutError> {
    if top_k == 0 || !len.is_multiple_of(top_k) { Err(LayoutError::Ragged { len, top_k }) } else { Ok(()) }
}

/// The expert that the choice at this place of a list names, or `None`.
pub(crate) fn check_choice(
    expert: i64,
    at: usize,
    top_k: usize,
    experts: u32,
) -> Result<Option<u32>, LayoutError> {
    match u32::try_from(expert) {
        Ok(known) if known < experts => Ok(Some(known)),
        _ if expert == -1 => Ok(None),
        _ => Err(LayoutError::NoSuchExpert { token: at / top_k, choice: at % top_k, expert, experts }),
    }
}
