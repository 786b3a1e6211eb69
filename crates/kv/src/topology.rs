//! Which ranks of the prefill side bring what a rank of the decode side needs, and the other way round.

use std::ops::Range;

use crate::{
    CacheKind, CacheLayout, CacheLayoutError, CachePart, ContextShare, Extent, HeadShare, LayoutOptions,
    Parts, Peer, Source,
};

/// How the ranks of one engine that serve a request together share its KV: tensor parallelism within a pipeline stage,
/// pipeline stages, and context parallelism within tensor parallelism.
///
/// Ranks count through the tensor-parallel ranks of the first stage, then through those of the next. Under data
/// parallelism each data-parallel rank is such an engine; which one serves a room, [`dp_rank_of`] says, or the router.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Parallelism {
    /// Tensor-parallel ranks of a stage.
    pub tp: u32,
    /// The layers of each pipeline stage; one stage without pipeline parallelism.
    pub stages: Vec<Range<u32>>,
    /// How many of the tensor-parallel ranks share the tokens of the heads that they keep in common; 1 without context
    /// parallelism. Divides `tp`.
    pub context: u32,
    /// Tokens a turn, where they share tokens.
    pub interleave: u32,
    /// KV heads of the model; `None` where every rank keeps all that is kept of a token, as under MLA.
    pub kv_heads: Option<u32>,
}

/// A rank from which another takes its share.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct SourceRank {
    /// The rank.
    pub rank: u32,
    /// What it brings: of those that keep the same layers and tokens only the first one brings what each keeps whole.
    pub parts: Parts,
}

impl SourceRank {
    /// The rank as a source of a [`GatherRequest`](crate::GatherRequest), once it is known at which peer it is.
    pub fn at(self, peer: Peer) -> Source {
        Source { peer, rank: self.rank, parts: self.parts }
    }
}

/// What one rank keeps.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RankShare {
    /// Its layers.
    pub layers: Range<u32>,
    /// Its heads.
    pub heads: HeadShare,
    /// Its tokens.
    pub context: ContextShare,
}

/// Why ranks cannot be told apart.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum TopologyError {
    /// A number of ranks is zero, or they are more than there can be.
    #[error("{tp} ranks in {stages} stages: 1 to {} are possible", CacheLayout::MAX_RANKS)]
    Ranks {
        /// Tensor-parallel ranks.
        tp: u32,
        /// Stages.
        stages: usize,
    },
    /// The ranks of a stage cannot share a context so.
    #[error("{context} of {tp} ranks cannot share a context in turns of {interleave} tokens")]
    Context {
        /// Tensor-parallel ranks.
        tp: u32,
        /// Of these share a context.
        context: u32,
        /// Tokens a turn.
        interleave: u32,
    },
    /// Neither number is a multiple of the other.
    #[error("{kv_heads} heads cannot be shared among {ranks} ranks")]
    Heads {
        /// KV heads of the model.
        kv_heads: u32,
        /// Ranks that share them.
        ranks: u32,
    },
    /// There is no such rank.
    #[error("rank {rank} of {ranks}")]
    NoSuchRank {
        /// The rank.
        rank: u32,
        /// How many there are.
        ranks: u32,
    },
    /// The cache has other heads than those that the ranks share.
    #[error("the ranks share {shared:?} heads, and the cache has {kept:?}")]
    OtherHeads {
        /// Those of the ranks.
        shared: Option<u32>,
        /// Those of the cache.
        kept: Option<u32>,
    },
    /// The rank's share makes no layout.
    #[error(transparent)]
    Layout(#[from] CacheLayoutError),
}

impl Parallelism {
    /// One stage with all layers, and no context parallelism.
    pub fn tensor(tp: u32, layers: u32, kv_heads: Option<u32>) -> Self {
        Self { tp, stages: even_stages(layers, 1), context: 1, interleave: 1, kv_heads }
    }

    /// How many ranks there are.
    pub fn ranks(&self) -> u32 {
        self.tp.saturating_mul(self.stages.len() as u32)
    }

    /// What a rank keeps.
    pub fn share(&self, rank: u32) -> Result<RankShare, TopologyError> {
        let &Self { tp, context, interleave, .. } = self;
        let ranks = self.ranks();
        if ranks == 0 || ranks > CacheLayout::MAX_RANKS {
            return Err(TopologyError::Ranks { tp, stages: self.stages.len() });
        }
        if rank >= ranks {
            return Err(TopologyError::NoSuchRank { rank, ranks });
        }
        let in_stage = rank % tp;
        let turns =
            ContextShare { rank: in_stage.checked_rem(context).unwrap_or(0), ranks: context, interleave };
        if !turns.is_sound() || !tp.is_multiple_of(context) {
            return Err(TopologyError::Context { tp, context, interleave });
        }
        let heads = match self.kv_heads {
            None => HeadShare::WHOLE,
            Some(kv_heads) => HeadShare::of_rank(kv_heads, in_stage / context, tp / context)
                .ok_or(TopologyError::Heads { kv_heads, ranks: tp / context })?,
        };
        Ok(RankShare { layers: self.stages[(rank / tp) as usize].clone(), heads, context: turns })
    }

    /// The cache of a rank: its layers, heads and tokens of what `whole` says that the model keeps. Pages and placement
    /// are the rank's own.
    pub fn layout(&self, rank: u32, whole: LayoutOptions) -> Result<CacheLayout, TopologyError> {
        let RankShare { layers, heads, context } = self.share(rank)?;
        let (kind, kept) = match whole.kind {
            CacheKind::Heads { heads: all, head_bytes, order } => {
                (CacheKind::Heads { heads, head_bytes, order }, Some(all.of))
            }
            latent @ CacheKind::Mla { .. } => (latent, None),
        };
        if kept != self.kv_heads {
            return Err(TopologyError::OtherHeads { shared: self.kv_heads, kept });
        }
        let layout = CacheLayout::new(LayoutOptions { layers, kind, ..whole })?;
        Ok(layout.with_context(context)?.with_rank(rank)?)
    }

    /// The prefill ranks, of this side, from which a rank of `decode` takes a request: each layer, head and token from one
    /// of those that keep it. Where several keep the same, the load is spread by rank and by `spread`, for which both
    /// sides take the same number, as the room's.
    pub fn sources(&self, decode: &Self, rank: u32, spread: u64) -> Result<Vec<SourceRank>, TopologyError> {
        let needed = decode.share(rank)?;
        let mut chosen: Vec<(RankShare, Vec<u32>)> = Vec::new();
        for source in 0..self.ranks() {
            let share = self.share(source)?;
            if !share.meets(&needed) {
                continue;
            }
            match chosen.iter_mut().find(|(known, _)| *known == share) {
                Some((_, alike)) => alike.push(source),
                None => chosen.push((share, vec![source])),
            }
        }
        let one =
            |alike: &Vec<u32>| alike[(u64::from(rank).wrapping_add(spread) % alike.len() as u64) as usize];
        chosen.sort_unstable_by_key(|(_, alike)| one(alike));
        let is_like =
            |one: &RankShare, two: &RankShare| (&one.layers, one.context) == (&two.layers, two.context);
        let source = |(nth, (share, alike)): (usize, &(RankShare, Vec<u32>))| {
            let is_first = !chosen[..nth].iter().any(|(earlier, _)| is_like(earlier, share));
            SourceRank { rank: one(alike), parts: if is_first { Parts::All } else { Parts::Shared } }
        };
        Ok(chosen.iter().enumerate().map(source).collect())
    }

    /// The ranks of `decode` that take a request from a prefill rank, of this side: those that have it among their
    /// [`sources`](Parallelism::sources).
    pub fn destinations(&self, decode: &Self, rank: u32, spread: u64) -> Result<Vec<u32>, TopologyError> {
        self.share(rank)?;
        let mut destinations = Vec::new();
        for destination in 0..decode.ranks() {
            if self.sources(decode, destination, spread)?.iter().any(|source| source.rank == rank) {
                destinations.push(destination);
            }
        }
        Ok(destinations)
    }
}

impl RankShare {
    /// Whether the two have a layer, a head and a token in common.
    fn meets(&self, other: &Self) -> bool {
        !common(&self.layers, &other.layers).is_empty()
            && self.heads.common(&other.heads).is_some()
            && self.context.meets(&other.context)
    }
}

/// The layers of each of so many pipeline stages: as even as possible, the longer ones first.
pub fn even_stages(layers: u32, stages: u32) -> Vec<Range<u32>> {
    let mut end = 0;
    let mut stage = |nth| {
        let start = end;
        end += layers / stages + u32::from(nth < layers % stages);
        start..end
    };
    (0..stages).map(&mut stage).collect()
}

/// The data-parallel rank that a room belongs to, where nobody has said otherwise: the one that its number gives.
pub fn dp_rank_of(room: u64, ranks: u32) -> u32 {
    (room % u64::from(ranks.max(1))) as u32
}

impl CacheLayout {
    /// Whether workers with these layouts, and with what each brings, together bring everything that this one keeps of a
    /// request in these layers, each byte of its tokens once, and nothing in others. Entries may be brought by several
    /// that keep the same.
    pub fn is_covered_by<L: AsRef<CacheLayout>>(&self, layers: &Range<u32>, sources: &[(L, Parts)]) -> bool {
        let sources: Vec<(&CacheLayout, Parts)> =
            sources.iter().map(|(layout, parts)| (layout.as_ref(), *parts)).collect();
        // Which part of the tokens that are kept here each brings, and which two bring some in common.
        let here = self.context();
        let tokens: Vec<Fraction> =
            sources.iter().map(|(source, _)| here.fraction_in(&source.context())).collect();
        let meets: Vec<Vec<bool>> = sources
            .iter()
            .map(|(one, _)| sources.iter().map(|(two, _)| one.context().meets(&two.context())).collect())
            .collect();
        let brought = Brought { layers, sources: &sources, tokens: &tokens, meets: &meets };
        (0..self.pools().len()).all(|pool| {
            let parts = self.pools()[pool].parts().iter().enumerate();
            let is_entries = self.pools()[pool].extent() == Extent::Entries;
            parts.into_iter().all(|(nth, part)| match is_entries {
                true => brought.has_entries(pool, nth, part),
                false => brought.has_once(pool, nth, part),
            })
        })
    }
}

/// What several workers bring to one.
struct Brought<'a> {
    /// The layers that are to be brought.
    layers: &'a Range<u32>,
    sources: &'a [(&'a CacheLayout, Parts)],
    /// Which part each brings of the tokens that are kept.
    tokens: &'a [Fraction],
    meets: &'a [Vec<bool>],
}

impl<'a> Brought<'a> {
    /// What each source has of a part: its place among them, its heads, and the part.
    fn of_part(&self, pool: usize, nth: usize, part: &CachePart) -> Vec<(usize, HeadShare, &'a CachePart)> {
        let mut found = Vec::with_capacity(self.sources.len());
        for (at, &(source, parts)) in self.sources.iter().enumerate() {
            if let Some(theirs) = source.part_of(pool, nth).filter(|_| parts.have(part))
                && let Some(heads) = part.heads().common(&theirs.heads())
            {
                found.push((at, heads, theirs));
            }
        }
        found
    }

    /// No layer of a part is brought that is not to be.
    fn has_no_other(&self, part: &CachePart, theirs: &[(usize, HeadShare, &CachePart)]) -> bool {
        let mut others = part.layers().iter().filter(|layer| !self.layers.contains(layer));
        others.all(|&layer| theirs.iter().all(|(_, _, part)| part.buffer(layer).is_none()))
    }

    /// The volumes of what is brought add up to what is kept, and no two of them meet.
    fn has_once(&self, pool: usize, nth: usize, part: &CachePart) -> bool {
        let theirs = self.of_part(pool, nth, part);
        let layers: Vec<u32> =
            part.layers().iter().copied().filter(|layer| self.layers.contains(layer)).collect();
        let common =
            |one: &CachePart| layers.iter().filter(|&&layer| one.buffer(layer).is_some()).count() as u64;
        let found = theirs.iter().try_fold(Fraction::of(0, 1), |sum, (at, heads, theirs)| {
            sum.plus(self.tokens[*at].times(common(theirs) * u64::from(heads.count))?)
        });
        let meet = |one: &(usize, HeadShare, &CachePart), two: &(usize, HeadShare, &CachePart)| {
            self.meets[one.0][two.0]
                && one.1.common(&two.1).is_some()
                && layers.iter().any(|&layer| one.2.buffer(layer).is_some() && two.2.buffer(layer).is_some())
        };
        let is_apart = |(at, one)| theirs[at + 1..].iter().all(|two| !meet(one, two));
        let kept = Fraction::of(layers.len() as u128 * u128::from(part.heads().count), 1);
        found == Some(kept) && theirs.iter().enumerate().all(is_apart) && self.has_no_other(part, &theirs)
    }

    /// Every head of every layer is brought by some.
    fn has_entries(&self, pool: usize, nth: usize, part: &CachePart) -> bool {
        let theirs = self.of_part(pool, nth, part);
        let mut layers = part.layers().iter().filter(|layer| self.layers.contains(layer));
        let has = layers.all(|&layer| {
            let heads = part.heads();
            (heads.first..heads.first + heads.count).all(|head| {
                theirs.iter().any(|(_, common, theirs)| {
                    (common.first..common.first + common.count).contains(&head)
                        && theirs.buffer(layer).is_some()
                })
            })
        });
        has && self.has_no_other(part, &theirs)
    }
}

impl CacheLayout {
    fn part_of(&self, pool: usize, nth: usize) -> Option<&CachePart> {
        self.pools().get(pool)?.parts().get(nth)
    }
}

impl AsRef<CacheLayout> for CacheLayout {
    fn as_ref(&self) -> &CacheLayout {
        self
    }
}

impl ContextShare {
    /// After how many tokens the turns begin anew.
    fn round(&self) -> u64 {
        if self.is_all() { 1 } else { u64::from(self.ranks) * u64::from(self.interleave) }
    }

    /// Its turn: where it begins in a round, and how long it is.
    fn turn(&self) -> (u64, u64) {
        match self.is_all() {
            true => (0, 1),
            false => (u64::from(self.rank) * u64::from(self.interleave), self.interleave.into()),
        }
    }

    /// Whether some token is kept by both.
    fn meets(&self, other: &Self) -> bool {
        self.common(other) > 0
    }

    /// Which part of the tokens kept here is kept there too.
    fn fraction_in(&self, other: &Self) -> Fraction {
        let times = other.round() / greatest_common_divisor(self.round().into(), other.round().into()) as u64;
        Fraction::of(self.common(other), u128::from(self.turn().1) * u128::from(times))
    }

    /// How many tokens both keep until the rounds of both begin anew together.
    ///
    /// In that time each place of one round meets each place of the other with which it agrees modulo what divides both
    /// rounds, once. So the two turns are laid around a circle of that length, each several times and a rest, and what
    /// lies on the same place is counted.
    fn common(&self, other: &Self) -> u128 {
        let circle = greatest_common_divisor(self.round().into(), other.round().into());
        let ((here, turn), (there, other_turn)) = (self.turn(), other.turn());
        let (turn, other_turn) = (u128::from(turn), u128::from(other_turn));
        let (rest, other_rest) = (turn % circle, other_turn % circle);
        // From the beginning of this rest to that of the other, and, past the end of the circle, the other way round.
        let ahead = (u128::from(there) % circle + circle - u128::from(here) % circle) % circle;
        let both = rest.saturating_sub(ahead).min(other_rest)
            + (ahead + other_rest).saturating_sub(circle).min(rest);
        turn / circle * other_turn + other_turn / circle * rest + both
    }
}

/// In its lowest terms.
#[derive(Clone, Copy, PartialEq)]
struct Fraction {
    above: u128,
    below: u128,
}

impl Fraction {
    fn of(above: u128, below: u128) -> Self {
        let divisor = greatest_common_divisor(above, below);
        Self { above: above / divisor, below: below / divisor }
    }

    /// `None` if the numbers become too large, which those of turns that complete each other do not.
    fn plus(self, other: Self) -> Option<Self> {
        let above = self.above.checked_mul(other.below)?.checked_add(other.above.checked_mul(self.below)?)?;
        Some(Self::of(above, self.below.checked_mul(other.below)?))
    }

    fn times(self, factor: u64) -> Option<Self> {
        Some(Self::of(self.above.checked_mul(factor.into())?, self.below))
    }
}

/// Of two numbers that are not both zero.
fn greatest_common_divisor(mut one: u128, mut two: u128) -> u128 {
    while two != 0 {
        (one, two) = (two, one % two);
    }
    one
}

fn common(one: &Range<u32>, two: &Range<u32>) -> Range<u32> {
    one.start.max(two.start)..one.end.min(two.end)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn turns() -> impl Strategy<Value = ContextShare> {
        (1u32..7, 1u32..9, any::<u32>()).prop_map(|(ranks, interleave, rank)| ContextShare {
            rank: rank % ranks,
            ranks,
            interleave,
        })
    }

    proptest! {
        /// Against the definition, token by token.
        #[test]
        fn tokens_in_common_are_counted(one in turns(), two in turns()) {
            let period = (one.ranks * one.interleave * two.ranks * two.interleave) as usize;
            let holds = |share: &ContextShare, token: usize| {
                token as u32 / share.interleave % share.ranks == share.rank
            };
            let here = (0..period).filter(|&token| holds(&one, token)).count();
            let both = (0..period).filter(|&token| holds(&one, token) && holds(&two, token)).count();
            prop_assert_eq!(one.meets(&two), both > 0);
            let expected = Fraction::of(both as u128, here as u128);
            prop_assert!(one.fraction_in(&two) == expected);
        }
    }

    #[test]
    fn turns_of_any_length_are_counted() {
        let turn = |rank, ranks, interleave| ContextShare { rank, ranks, interleave };
        let (long, longer) = (turn(0, 2, 1 << 30), turn(1, 2, (1 << 31) - 1));
        assert!(
            long.fraction_in(&long) == Fraction::of(1, 1)
                && long.fraction_in(&ContextShare::ALL) == Fraction::of(1, 1)
        );
        assert!(ContextShare::ALL.fraction_in(&long) == Fraction::of(1, 2));
        let half = |one: &ContextShare, two: &ContextShare| {
            let (both, all) = (one.fraction_in(two), Fraction::of(1, 1));
            let rest = one.fraction_in(&ContextShare { rank: 1 - two.rank, ..*two });
            both.plus(rest) == Some(all)
        };
        assert!(half(&long, &longer) && half(&longer, &long) && long.meets(&longer));
    }
}
