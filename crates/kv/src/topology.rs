//! Which ranks of the prefill side bring what a rank of the decode side needs, and the other way round.

use std::ops::Range;

use crate::{
    CacheKind, CacheLayout, CacheLayoutError, CachePart, ContextShare, HeadShare, LayoutOptions, Parts, Peer,
    Source,
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
        let one = |alike: &Vec<u32>| alike[((u64::from(rank) + spread) % alike.len() as u64) as usize];
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
    /// Whether workers with these layouts, and with what each brings, together bring every byte that this one keeps of a
    /// request's tokens, and each byte once.
    pub fn is_covered_by<L: AsRef<CacheLayout>>(&self, sources: &[(L, Parts)]) -> bool {
        let sources: Vec<(&CacheLayout, Parts)> =
            sources.iter().map(|(layout, parts)| (layout.as_ref(), *parts)).collect();
        let periods = sources.iter().map(|(source, _)| source.context()).chain([self.context()]);
        let Some(period) = periods.map(|context| context.round()).try_fold(1, least_common_multiple) else {
            return false;
        };
        let parts = self.tokens().parts();
        parts.iter().enumerate().all(|(nth, part)| self.is_part_covered(nth, part, &sources, period))
    }

    /// The volumes of what is brought add up to what is kept, and no two of them meet.
    fn is_part_covered(
        &self,
        nth: usize,
        part: &CachePart,
        sources: &[(&CacheLayout, Parts)],
        period: u64,
    ) -> bool {
        let volume = |layers: usize, heads: u32, tokens: u64| layers as u64 * u64::from(heads) * tokens;
        let mut brought = Vec::new();
        let mut found = 0;
        for (source, _) in sources.iter().filter(|(_, parts)| parts.have(part)) {
            let Some(theirs) = source.tokens().parts().get(nth) else { return false };
            let Some(heads) = part.heads().common(&theirs.heads()) else { continue };
            let layers: Vec<u32> =
                part.layers().iter().copied().filter(|&layer| theirs.buffer(layer).is_some()).collect();
            found += volume(layers.len(), heads.count, self.context().common(&source.context(), period));
            brought.push((layers, heads, source.context()));
        }
        let meet = |one: &(Vec<u32>, HeadShare, ContextShare), two: &(Vec<u32>, HeadShare, ContextShare)| {
            one.1.common(&two.1).is_some()
                && one.2.meets(&two.2)
                && one.0.iter().any(|layer| two.0.contains(layer))
        };
        let is_apart = |(at, one)| brought[at + 1..].iter().all(|two| !meet(one, two));
        let kept =
            volume(part.layers().len(), part.heads().count, self.context().common(&self.context(), period));
        found == kept && brought.iter().enumerate().all(is_apart)
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
        u64::from(self.ranks) * u64::from(self.interleave)
    }

    /// Whether some token is kept by both.
    fn meets(&self, other: &Self) -> bool {
        least_common_multiple(self.round(), other.round()).is_none_or(|period| self.common(other, period) > 0)
    }

    /// How many of the first `period` tokens both keep.
    fn common(&self, other: &Self, period: u64) -> u64 {
        let (mut next, mut found) = (0, 0);
        while next < period {
            let (here, here_run) = self.next_run(next as u32);
            let (there, there_run) = other.next_run(next as u32);
            let first = here.max(there);
            if here == there && first < period {
                let run = u64::from(here_run.min(there_run)).min(period - first);
                found += run;
                next = first + run;
            } else {
                next = first;
            }
        }
        found
    }
}

/// `None` if it is more than anybody's turns.
fn least_common_multiple(a: u64, b: u64) -> Option<u64> {
    let (mut one, mut two) = (a, b);
    while two != 0 {
        (one, two) = (two, one % two);
    }
    Some(a / one.max(1) * b).filter(|&multiple| multiple <= LONGEST_PERIOD)
}

const LONGEST_PERIOD: u64 = 1 << 20;

fn common(one: &Range<u32>, two: &Range<u32>) -> Range<u32> {
    one.start.max(two.start)..one.end.min(two.end)
}
