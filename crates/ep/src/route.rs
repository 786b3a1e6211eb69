//! Where each choice of a step's tokens goes: found once, kept until the combine, recorded and used again.

use std::sync::Arc;

use crate::GroupConfig;
use crate::error::EpError;
use crate::layout::{LayoutError, check_choice, check_whole};

/// The route of one rank's tokens, to be used for more than one dispatch, or recorded and used in another run.
///
/// Found by [`Slot::route`](crate::Slot::route), taken from a [`Dispatch`](crate::Dispatch::route), or read from bytes. It
/// belongs to a rank of a group, and is refused by others.
#[derive(Clone, Debug, PartialEq)]
pub struct Route(pub(crate) Arc<Routes>);

/// What a token's choices come to.
#[derive(Clone, Debug, Default, PartialEq)]
pub(crate) struct Routes {
    /// For which group and rank.
    owner: Owner,
    pub tokens: usize,
    /// By token and choice: the rank, or [`NOWHERE`].
    pub ranks: Vec<u32>,
    /// By token and choice: which of that rank's experts.
    pub experts: Vec<u16>,
    /// By token and choice: how many earlier choices of this rank fell on the same expert.
    pub places: Vec<u32>,
    /// By token and choice: how many of this rank's earlier tokens go to the same rank.
    pub rows: Vec<u32>,
    /// By expert: choices.
    pub expert_counts: Vec<u32>,
    /// By rank: tokens that go there.
    pub rank_counts: Vec<u32>,
    /// By rank: choices on the ranks before it. Results that come through ports lie in this order.
    pub results_at: Vec<u32>,
    /// Choices that are any expert's.
    pub chosen: usize,
    /// By rank: the last token that goes there, and one more.
    last: Vec<u32>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Owner {
    rank: u32,
    ranks: u32,
    experts: u32,
    top_k: u32,
    /// The rank's limit of tokens.
    limit: u32,
}

impl Owner {
    fn new(config: &GroupConfig, rank: u32) -> Owner {
        Owner {
            rank,
            ranks: config.ranks(),
            experts: config.experts,
            top_k: config.top_k,
            limit: config.max_tokens[rank as usize],
        }
    }

    fn words(self) -> [u32; 5] {
        [self.rank, self.ranks, self.experts, self.top_k, self.limit]
    }
}

/// Bytes that are no route of this rank.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum RouteError {
    /// They are not what [`Route::to_bytes`] gives, in this version.
    #[error("these bytes are no route: {why}")]
    Malformed {
        /// What is wrong.
        why: &'static str,
    },
    /// They are the route of another rank, or of a rank of another group.
    #[error(
        "this is a route of rank {rank} of {ranks} with {experts} experts, {top_k} choices a token and at most {limit} tokens"
    )]
    OfAnother {
        /// Whose.
        rank: u32,
        /// How many ranks its group has.
        ranks: u32,
        /// How many experts.
        experts: u32,
        /// How many choices a token has.
        top_k: u32,
        /// The rank's limit of tokens.
        limit: u32,
    },
    /// The choices are not possible.
    #[error(transparent)]
    Choices(#[from] EpError),
}

impl Route {
    /// How many tokens it is for.
    pub fn tokens(&self) -> usize {
        self.0.tokens
    }

    /// `[tokens, top_k]`: the experts that were chosen, or -1.
    pub fn choices<'a>(&'a self) -> impl ExactSizeIterator<Item = i64> + use<'a> {
        let routes = &*self.0;
        let spread = crate::Experts::new(routes.owner.experts, routes.owner.ranks.max(1));
        routes.ranks.iter().zip(&routes.experts).map(move |(&rank, &local)| match rank {
            NOWHERE => -1,
            rank => i64::from(spread.of_rank(rank).start + u32::from(local)),
        })
    }

    /// The route as bytes, to be recorded.
    pub fn to_bytes(&self) -> Vec<u8> {
        let words = std::iter::once(VERSION).chain(self.0.owner.words());
        let mut bytes: Vec<u8> = words.flat_map(u32::to_le_bytes).collect();
        bytes.extend(self.choices().flat_map(|expert| (expert as i32).to_le_bytes()));
        bytes
    }

    /// A route that was recorded, for a rank of a group like the one that recorded it.
    pub fn from_bytes(bytes: &[u8], config: &GroupConfig, rank: u32) -> Result<Route, RouteError> {
        let malformed = |why| Err(RouteError::Malformed { why });
        let (words, []) = bytes.as_chunks::<4>() else {
            return malformed("their number is none of whole words");
        };
        let mut words = words.iter().map(|word| u32::from_le_bytes(*word));
        if words.next() != Some(VERSION) {
            return malformed("they begin with another version");
        }
        let mut next = || words.next().ok_or(RouteError::Malformed { why: "they are too few" });
        let (owner_rank, ranks, experts, top_k, limit) = (next()?, next()?, next()?, next()?, next()?);
        let owner = Owner { rank: owner_rank, ranks, experts, top_k, limit };
        if config.max_tokens.get(rank as usize).is_none() || owner != Owner::new(config, rank) {
            return Err(RouteError::OfAnother { rank: owner_rank, ranks, experts, top_k, limit });
        }
        let choices: Vec<i64> = words.map(|word| i64::from(word.cast_signed())).collect();
        Ok(Route(Arc::new(Routes::new(&choices, config, rank)?)))
    }
}

impl Routes {
    pub fn new(choices: &[i64], config: &GroupConfig, rank: u32) -> Result<Routes, EpError> {
        let mut routes = Routes::default();
        routes.find(choices, config, rank)?;
        Ok(routes)
    }

    /// Whether these are routes for this rank of this group.
    pub fn is_of(&self, config: &GroupConfig, rank: u32) -> bool {
        self.owner == Owner::new(config, rank)
    }

    /// Finds each choice's rank and place. After an error the routes are of no use.
    pub fn find(&mut self, choices: &[i64], config: &GroupConfig, rank: u32) -> Result<(), EpError> {
        let (top_k, spread) = (config.top_k as usize, config.spread());
        check_whole(choices.len(), top_k)?;
        self.owner = Owner::new(config, rank);
        self.tokens = choices.len() / top_k;
        let limit = self.owner.limit;
        if self.tokens > limit as usize {
            return Err(EpError::TooManyTokens { tokens: self.tokens, limit });
        }
        reset(&mut self.ranks, choices.len(), NOWHERE);
        reset(&mut self.places, choices.len(), 0);
        reset(&mut self.rows, choices.len(), 0);
        reset(&mut self.experts, choices.len(), 0);
        reset(&mut self.expert_counts, config.experts as usize, 0);
        let ranks = config.ranks() as usize;
        reset(&mut self.rank_counts, ranks, 0);
        reset(&mut self.results_at, ranks, 0);
        reset(&mut self.last, ranks, 0);
        self.chosen = 0;
        for (at, &expert) in choices.iter().enumerate() {
            let Some(expert) = check_choice(expert, at, top_k, config.experts)? else { continue };
            let (rank, local) = spread.place(expert);
            self.ranks[at] = rank;
            self.experts[at] = local as u16;
            let hits = &mut self.expert_counts[expert as usize];
            self.places[at] = *hits;
            *hits += 1;
            if *hits > limit {
                return Err(EpError::TooManyChoices { expert, limit });
            }
            self.chosen += 1;
            let (token, rank) = ((at / top_k) as u32, rank as usize);
            self.results_at[rank] += 1;
            if self.last[rank] != token + 1 {
                self.last[rank] = token + 1;
                self.rank_counts[rank] += 1;
            }
            self.rows[at] = self.rank_counts[rank] - 1;
        }
        let mut end = 0;
        for at in &mut self.results_at {
            end += *at;
            *at = end - *at;
        }
        Ok(())
    }
}

fn reset<T: Clone>(list: &mut Vec<T>, len: usize, value: T) {
    list.clear();
    list.resize(len, value);
}

impl From<LayoutError> for RouteError {
    fn from(error: LayoutError) -> RouteError {
        RouteError::Choices(error.into())
    }
}

/// The rank of a choice that is none.
pub(crate) const NOWHERE: u32 = u32::MAX;
/// Of the form of recorded routes.
const VERSION: u32 = 0x4350_5201;
