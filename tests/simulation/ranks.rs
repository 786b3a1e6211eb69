//! Which nodes there are, and how both sides' ranks share a request.

use std::num::NonZeroU32;
use std::ops::Range;

use crossdock_kv::{
    CacheKind, CacheLayout, Dtype, HeadOrder, LayerBuffer, LayoutOptions, Parallelism, Placement, SourceRank,
    Verify, even_stages,
};

use crate::cache::TOKEN_BYTES;
use crate::chance::{Chance, mix};
use crate::scenario::NodePlan;

/// How the ranks of both sides share each request: several prefill ranks to one of the decode side, one to several, or
/// several to several.
pub struct Split {
    pub prefill: Parallelism,
    pub decode: Parallelism,
}

/// What the ranks of a side share.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Axis {
    Heads,
    Layers,
    Context,
}

impl Split {
    /// For one seed in three.
    pub fn of(seed: u64, model_layers: u32) -> Option<Self> {
        let mut chance = Chance::new(mix(seed ^ 0x0073_706c_6974));
        if !chance.one_in(3) {
            return None;
        }
        let chance = &mut chance;
        let (prefills, decodes) = *chance.pick(&[(2, 1), (2, 1), (3, 1), (1, 2), (1, 2), (2, 2)]);
        let axes = [Axis::Heads, Axis::Layers, Axis::Context];
        let [prefill, decode] = [prefills, decodes].map(|ranks| (ranks, *chance.pick(&axes)));
        let has_heads = [prefill, decode].iter().any(|&(ranks, axis)| ranks > 1 && axis == Axis::Heads);
        let kv_heads = (has_heads || chance.one_in(4)).then_some(if prefills == 3 { 3 } else { 2 });
        let interleave = chance.within(1..5) as u32;
        let side = |(ranks, axis): (u32, Axis)| match axis {
            Axis::Heads => Parallelism::tensor(ranks, model_layers, kv_heads),
            Axis::Layers => Parallelism {
                stages: even_stages(model_layers, ranks),
                ..Parallelism::tensor(1, model_layers, kv_heads)
            },
            Axis::Context => Parallelism {
                context: ranks,
                interleave,
                ..Parallelism::tensor(ranks, model_layers, kv_heads)
            },
        };
        Some(Self { prefill: side(prefill), decode: side(decode) })
    }

    /// From which ranks a decode rank takes a request.
    pub fn sources(&self, rank: u32, number: u64) -> Vec<SourceRank> {
        self.prefill.sources(&self.decode, rank, number).expect("ranks that can share")
    }
}

/// Without a split, two prefill nodes and the others decode, or everybody does both.
pub fn nodes(chance: &mut Chance, seed: u64) -> (Vec<NodePlan>, Option<Split>) {
    let count = chance.within(3..5) as usize;
    let model_layers = chance.within(3..5) as u32;
    let split = Split::of(seed, model_layers);
    let are_mixed = chance.one_in(3) && split.is_none();
    let are_crossed = chance.one_in(3);
    // What is not shared is there twice, where there are enough nodes.
    let prefill_nodes = split.as_ref().map_or(2, |split| match split.decode.ranks() {
        1 => split.prefill.ranks() as usize,
        ranks => (count - ranks as usize).max(split.prefill.ranks() as usize),
    });
    let count = match &split {
        Some(split) => count.max(prefill_nodes + split.decode.ranks() as usize),
        None => count,
    };
    let nodes = (0..count).map(|at| {
        let prefills = are_mixed || at < prefill_nodes;
        let decodes = are_mixed || at >= prefill_nodes;
        let dials = (0..count).filter(|&other| match are_mixed {
            true => other < at || (are_crossed && other != at),
            false => {
                (decodes && other < prefill_nodes) || (are_crossed && prefills && other >= prefill_nodes)
            }
        });
        let layout = match &split {
            None => {
                // Some decode nodes lack the first or the last layer; all that they keep is brought.
                let layers = match (chance.below(6), prefills) {
                    (0, false) => 1..model_layers,
                    (1, false) => 0..model_layers - 1,
                    _ => 0..model_layers,
                };
                layout(chance, &Parallelism::tensor(1, model_layers, None), 0, model_layers, Some(layers))
            }
            Some(split) => {
                let (side, first) =
                    if prefills { (&split.prefill, 0) } else { (&split.decode, prefill_nodes) };
                let rank = (at - first) as u32 % side.ranks();
                layout(chance, side, rank, model_layers, None)
            }
        };
        NodePlan {
            address: format!("node-{at}"),
            dials: dials.collect(),
            layout,
            verify: match chance.below(3) {
                0 => Verify::Off,
                1 => Verify::All,
                _ => Verify::OneIn(NonZeroU32::new(2).expect("two")),
            },
            prefills,
            decodes,
            heartbeats_missed: chance.within(3..10) as u32,
        }
    });
    (nodes.collect(), split)
}

/// A rank's part of a small cache, in one of the shapes that engines use; of `layers`, if these are not the rank's.
fn layout(
    chance: &mut Chance,
    side: &Parallelism,
    rank: u32,
    model_layers: u32,
    layers: Option<Range<u32>>,
) -> CacheLayout {
    let share = side.share(rank).expect("a rank");
    let layers = layers.unwrap_or(share.layers);
    let (kind, parts) = match side.kv_heads {
        None => (CacheKind::Mla { latent_bytes: 8, rope_bytes: 4 }, 1),
        Some(of) => {
            let head_bytes = TOKEN_BYTES as u32 / 2 / of;
            let order = *chance.pick(&[HeadOrder::TokensFirst, HeadOrder::HeadsFirst]);
            (CacheKind::Heads { heads: share.heads, head_bytes, order }, 2)
        }
    };
    let page_tokens = *chance.pick(&[2, 4, 8, 6]);
    let pages = (160 / page_tokens).max(24);
    let page_bytes = kind.token_bytes() / u64::from(parts) * u64::from(page_tokens);
    let placement = match chance.below(3) {
        0 => Placement::LayerMajor { region: 0 },
        1 => Placement::PageMajor { region: 0 },
        // A region for every layer and part, with gaps between the pages.
        _ => {
            let buffer = |region| LayerBuffer { region, offset: 16, stride_bytes: page_bytes + 12 };
            Placement::Buffers((0..layers.len() as u32 * parts).map(buffer).collect())
        }
    };
    let options = LayoutOptions {
        model: "a small model".into(),
        model_layers,
        layers,
        kind,
        dtype: Dtype::Bf16,
        page_tokens,
        pages,
        placement,
    };
    let layout = CacheLayout::new(options).expect("a layout that makes sense");
    let layout = layout.with_context(share.context).expect("turns that make sense");
    layout.with_rank(rank).expect("a rank that can be named")
}
