//! Caches of which each worker holds a share, moved between random layouts and compared, byte by byte, with what the
//! definitions of heads, tokens, layers and pools say.

use std::collections::BTreeMap;
use std::ops::Range;

use crossdock_kv::{
    CacheKind, CacheLayout, CachePart, CachePartOptions, CachePool, CachePoolOptions, Checksums,
    ContextShare, Dtype, Extent, HeadOrder, HeadShare, LayerBuffer, LayoutOptions, PageTable, Parallelism,
    Parts, Placement, Plan, PlanError, PlanInput, Route, SourceRank, TopologyError, even_stages,
};
use crossdock_memory::{AllocateOptions, Memory};
use crossdock_transport::{Direction, GrantId, LocalId, Op, Posted, RemoteId, Shape};
use proptest::prelude::*;
use proptest::sample::Index;

const LAYERS: u32 = 6;
const HEAD_BYTES: u32 = 3;
const INDEX_BYTES: u32 = 2;

/// What both sides must have in common.
#[derive(Clone, Copy, Debug)]
struct Model {
    /// `None`: a latent.
    kv_heads: Option<u32>,
    /// Some layers keep an indexer's keys in the same pages.
    has_index: bool,
    /// A window of so many tokens has pages of its own.
    window: Option<u32>,
    /// A state of so many heads has entries.
    state_heads: Option<u32>,
}

/// How one side holds it.
#[derive(Clone, Debug)]
struct Form {
    layers: Range<u32>,
    heads: HeadShare,
    state_heads: HeadShare,
    orders: [HeadOrder; 2],
    context: ContextShare,
    page_tokens: u32,
    window_page_tokens: u32,
    padding: u64,
    is_page_major: bool,
}

fn models() -> impl Strategy<Value = Model> {
    let heads = prop_oneof![Just(None), (1u32..5).prop_map(Some)];
    (heads, any::<bool>(), prop::option::of(1u32..40), prop::option::of(1u32..5)).prop_map(
        |(kv_heads, has_index, window, state_heads)| Model { kv_heads, has_index, window, state_heads },
    )
}

fn some_of(heads: Option<u32>) -> impl Strategy<Value = HeadShare> {
    let of = heads.unwrap_or(1);
    (0..of, any::<Index>()).prop_map(move |(first, count)| HeadShare {
        of,
        first,
        count: 1 + count.index((of - first) as usize) as u32,
    })
}

fn forms(model: Model) -> impl Strategy<Value = Form> {
    let layers = (0..LAYERS, 1..=LAYERS).prop_map(|(first, count)| first..(first + count).min(LAYERS));
    let order = || prop_oneof![Just(HeadOrder::TokensFirst), Just(HeadOrder::HeadsFirst)];
    let context = prop_oneof![
        2 => Just(ContextShare::ALL),
        1 => (1u32..4, 1u32..4, any::<Index>()).prop_map(|(ranks, interleave, rank)| ContextShare {
            rank: rank.index(ranks as usize) as u32,
            ranks,
            interleave,
        }),
    ];
    let pages = (prop_oneof![Just(1u32), Just(4), Just(16), 1u32..20], 1u32..20, 0u64..20, any::<bool>());
    let heads = (some_of(model.kv_heads), some_of(model.state_heads));
    (layers, heads, [order(), order()], context, pages).prop_map(|(layers, heads, orders, context, pages)| {
        Form {
            layers,
            heads: heads.0,
            state_heads: heads.1,
            orders,
            context,
            page_tokens: pages.0,
            window_page_tokens: pages.1,
            padding: pages.2,
            is_page_major: pages.3,
        }
    })
}

/// Buffers one after the other.
struct Placing {
    end: u64,
    padding: u64,
}

impl Placing {
    fn buffer(&mut self, page_bytes: u64, pages: u32) -> LayerBuffer {
        let (offset, stride_bytes) = (self.end + 1, page_bytes + self.padding);
        self.end = offset + stride_bytes * u64::from(pages);
        LayerBuffer { region: 0, offset, stride_bytes }
    }
}

const PAGES: u32 = 120;
const ENTRIES: u32 = 5;

impl Form {
    fn layout(&self, model: Model) -> CacheLayout {
        let kind = match model.kv_heads {
            None => CacheKind::Mla { latent_bytes: HEAD_BYTES, rope_bytes: 0 },
            Some(_) => CacheKind::Heads { heads: self.heads, head_bytes: HEAD_BYTES, order: self.orders[0] },
        };
        let parts = if model.kv_heads.is_some() { 2 } else { 1 };
        let mut placing = Placing { end: 0, padding: self.padding };
        let page_bytes = kind.token_bytes() / parts * u64::from(self.page_tokens);
        let count = self.layers.len() as u64 * parts;
        let placement = match self.is_page_major {
            true => {
                placing.end = page_bytes * count * u64::from(PAGES);
                Placement::PageMajor { region: 0 }
            }
            false => Placement::Buffers((0..count).map(|_| placing.buffer(page_bytes, PAGES)).collect()),
        };
        let mut layout = CacheLayout::new(LayoutOptions {
            model: "m".into(),
            model_layers: LAYERS,
            layers: self.layers.clone(),
            kind,
            dtype: Dtype::Bf16,
            page_tokens: self.page_tokens,
            pages: PAGES,
            placement,
        })
        .and_then(|layout| layout.with_context(self.context))
        .unwrap();
        let mut part = |every: u32, heads: HeadShare, order, tokens, pages| {
            let layers: Vec<u32> = self.layers.clone().filter(|layer| layer.is_multiple_of(every)).collect();
            let page_bytes = u64::from(heads.count * INDEX_BYTES * tokens);
            let buffers = layers.iter().map(|_| placing.buffer(page_bytes, pages)).collect();
            CachePartOptions { name: "more".into(), heads, head_bytes: INDEX_BYTES, order, layers, buffers }
        };
        let has_some = |every: u32| self.layers.clone().any(|layer| layer.is_multiple_of(every));
        if model.has_index && has_some(2) {
            let index = part(2, HeadShare::WHOLE, HeadOrder::TokensFirst, self.page_tokens, PAGES);
            layout = layout.with_part(index).unwrap();
        }
        if let Some(window) = model.window {
            let page_tokens = self.window_page_tokens;
            let parts = vec![part(1, self.heads, self.orders[0], page_tokens, PAGES)];
            let (name, extent) = ("window".into(), Extent::Window(window));
            let pool = CachePoolOptions { name, extent, page_tokens, pages: PAGES, parts };
            layout = layout.with_pool(pool).unwrap();
        }
        if model.state_heads.is_some() && has_some(3) {
            let parts = vec![part(3, self.state_heads, self.orders[1], 1, ENTRIES)];
            let (name, extent) = ("state".into(), Extent::Entries);
            let pool = CachePoolOptions { name, extent, page_tokens: 1, pages: ENTRIES, parts };
            layout = layout.with_pool(pool).unwrap();
        }
        layout
    }
}

/// A cell: a token, or an entry, of one head in one layer and part of a pool.
type Cell = (usize, usize, u32, u32, u32);

/// Where each cell of some tokens lies, as the definitions say.
fn cells(layout: &CacheLayout, pool: usize, tokens: Range<u32>, pages: &[u32]) -> BTreeMap<Cell, (u64, u64)> {
    let of: &CachePool = &layout.pools()[pool];
    let context = if of.extent() == Extent::Entries { ContextShare::ALL } else { layout.context() };
    let holds = |token: &u32| token / context.interleave % context.ranks == context.rank;
    // The list begins with the page of the first token that is held.
    let before = (0..tokens.start).filter(holds).count() as u32 / of.page_tokens();
    let mut cells = BTreeMap::new();
    for token in tokens.filter(holds) {
        let place = (0..token).filter(holds).count() as u32;
        let page = pages[(place / of.page_tokens() - before) as usize];
        for (nth, part) in of.parts().iter().enumerate() {
            for (&layer, buffer) in part.layers().iter().zip(part.buffers()) {
                for head in part.heads().first..part.heads().first + part.heads().count {
                    let at = buffer.offset
                        + u64::from(page) * buffer.stride_bytes
                        + in_page(part, place % of.page_tokens(), head, of.page_tokens());
                    cells.insert((pool, nth, layer, token, head), (at, part.head_bytes().into()));
                }
            }
        }
    }
    cells
}

fn in_page(part: &CachePart, token: u32, head: u32, page_tokens: u32) -> u64 {
    let head = head - part.heads().first;
    let nth = match part.order() {
        HeadOrder::TokensFirst => token * part.heads().count + head,
        HeadOrder::HeadsFirst => head * page_tokens + token,
    };
    u64::from(nth * part.head_bytes())
}

/// Moves bytes as a port would, and counts how often each was written.
struct Copy<'a> {
    from: &'a [u8],
    to: Vec<u8>,
    written: Vec<u32>,
}

impl Copy<'_> {
    fn carry_out(&mut self, op: &Op<'_>) {
        let mut piece = |from: u64, to: u64, bytes: u64| {
            let (from, to, bytes) = (from as usize, to as usize, bytes as usize);
            self.to[to..to + bytes].copy_from_slice(&self.from[from..from + bytes]);
            self.written[to..to + bytes].iter_mut().for_each(|count| *count += 1);
        };
        match op.shape {
            Shape::Span { local_offset, remote_offset, bytes, .. } => {
                piece(local_offset, remote_offset, bytes)
            }
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
                assert_eq!(local_pages.len(), remote_pages.len());
                for (local, remote) in local_pages.iter().zip(remote_pages) {
                    piece(
                        local_offset + u64::from(*local) * local_stride_bytes,
                        remote_offset + u64::from(*remote) * remote_stride_bytes,
                        piece_bytes,
                    );
                }
            }
        }
    }
}

/// All ops of a plan, posted in parts of `batch` ops, layer by layer or at once.
fn run(plan: &Plan, copy: &mut Copy<'_>, batch: usize, by_layer: bool) -> u64 {
    let (local, remote) = ([LocalId(0)], [RemoteId(0)]);
    let route =
        Route { direction: Direction::Write, grant: GrantId::new(0, 0), local: &local, remote: &remote };
    let all = plan.layers();
    let steps: Vec<Range<u32>> =
        if by_layer { all.map(|layer| layer..layer + 1).collect() } else { vec![all] };
    let mut bytes = 0;
    for layers in steps {
        let ops = plan.ops(route, layers).unwrap();
        let (mut cursor, mut posted, mut count) = (ops.start(), 0, 0);
        while !ops.is_done(cursor) {
            let mut some = vec![Op::notify(0); batch];
            let filled = ops.fill(cursor, &mut some);
            assert!(filled > 0);
            for op in &some[..filled] {
                copy.carry_out(op);
                posted += op.bytes().unwrap();
            }
            count += filled;
            cursor = ops.advance(cursor, Posted::all(&some[..filled]));
        }
        assert_eq!((posted, count), (ops.bytes(), ops.count()));
        bytes += posted;
    }
    bytes
}

/// Pages in a random order, enough for the tokens.
fn shuffled(seed: u64, count: u32) -> Vec<u32> {
    let mut pages: Vec<u32> = (0..count).collect();
    let mut state = seed | 1;
    for at in (1..pages.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        pages.swap(at, (state >> 33) as usize % (at + 1));
    }
    pages
}

fn both() -> impl Strategy<Value = (Model, Form, Form)> {
    let forms = models().prop_flat_map(|model| (Just(model), forms(model), forms(model), 0..3));
    forms.prop_map(|(model, mut source, mut destination, alike)| {
        // Whole pages of heads in one piece: where the pages of both sides are alike.
        if alike == 0 {
            destination.page_tokens = source.page_tokens;
            destination.context = source.context;
            (source.orders, destination.orders) = ([HeadOrder::HeadsFirst; 2], [HeadOrder::HeadsFirst; 2]);
        }
        (model, source, destination)
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(700))]

    #[test]
    fn each_byte_that_both_hold_moves_once_and_no_other(
        (model, source, destination) in both(), ends in (0u32..70, 0u32..70), seeds in any::<(u64, u64)>(),
        batch in 1usize..9, by_layer: bool, is_shared_only in (0..4).prop_map(|choice| choice == 0),
    ) {
        let (from, to) = (source.layout(model), destination.layout(model));
        let tokens = ends.0.min(ends.1)..ends.0.max(ends.1);
        let source_bytes: Vec<u8> = (0..from.bytes_needed(0)).map(|at| (at % 251) as u8).collect();
        for pool in 0..from.pools().len().min(to.pools().len()) {
            let of = &from.pools()[pool];
            let entries = 0..tokens.end.min(ENTRIES);
            let tokens = if of.extent() == Extent::Entries { entries } else { tokens.clone() };
            let (from_pages, to_pages) =
                (shuffled(seeds.0, of.pages()), shuffled(seeds.1, to.pools()[pool].pages()));
            let parts = if is_shared_only { Parts::Shared } else { Parts::All };
            let table = |layout, pages| PageTable { parts, ..PageTable::of_pool(layout, pool, tokens.start, pages) };
            let input = PlanInput {
                source: table(&from, &from_pages),
                destination: table(&to, &to_pages),
                tokens: tokens.clone(),
            };
            let plan = match Plan::build(&input) {
                Ok(plan) => plan,
                // Parts that only one of the two has layers for are no part of its layout here.
                Err(PlanError::Unbridgeable { key: "pools" }) => {
                    prop_assert!(from.fingerprint() != to.fingerprint());
                    continue;
                }
                Err(PlanError::NoCommonLayers { .. }) => {
                    prop_assert!(!source.layers.clone().any(|layer| destination.layers.contains(&layer)));
                    continue;
                }
                Err(PlanError::NothingInCommon) => {
                    prop_assert_eq!(pool, 0);
                    let is_none = source.heads.common(&destination.heads).is_none();
                    prop_assert!(is_none || is_shared_only && source.heads.of == 1);
                    continue;
                }
                Err(error) => return Err(TestCaseError::fail(format!("{error}"))),
            };
            let mut copy = Copy {
                from: &source_bytes,
                to: vec![0xee; to.bytes_needed(0) as usize],
                written: vec![0; to.bytes_needed(0) as usize],
            };
            let moved = run(&plan, &mut copy, batch, by_layer);
            prop_assert_eq!(moved, plan.total_bytes());

            let sources = cells(&from, pool, tokens.clone(), &from_pages);
            let mut expected = vec![0; copy.to.len()];
            for (cell, (at, bytes)) in cells(&to, pool, tokens.clone(), &to_pages) {
                let Some(&(from_at, _)) = sources.get(&cell) else { continue };
                if is_shared_only && of.parts()[cell.1].heads().of == 1 {
                    continue;
                }
                for byte in 0..bytes {
                    expected[(at + byte) as usize] += 1;
                    prop_assert_eq!(
                        copy.to[(at + byte) as usize], source_bytes[(from_at + byte) as usize],
                        "{:?}", cell
                    );
                }
            }
            prop_assert!(expected == copy.written, "each byte once, and no other");
            check_sums(&from, &to, &input, &copy)?;
        }
    }
}

/// The sums of what was moved are equal on both sides, and notice a byte that is not.
fn check_sums(
    from: &CacheLayout,
    to: &CacheLayout,
    input: &PlanInput<'_>,
    copy: &Copy<'_>,
) -> Result<(), TestCaseError> {
    let memory = |bytes: &[u8]| {
        let memory = Memory::allocate(bytes.len(), &AllocateOptions::default()).unwrap();
        memory.write(0, bytes).unwrap();
        [memory]
    };
    let layers = from.layers().start.max(to.layers().start)..from.layers().end.min(to.layers().end);
    let (here, there) = (memory(copy.from), memory(&copy.to));
    let sums = Checksums::compute(&here, &input.source, to, layers.clone(), input.tokens.clone()).unwrap();
    let verify = || sums.verify(&there, &input.destination, from, layers.clone(), input.tokens.clone());
    prop_assert_eq!(verify(), Ok(()));
    if let Some(at) = copy.written.iter().position(|&count| count > 0) {
        there[0].write(at, &[copy.to[at] ^ 1]).unwrap();
        prop_assert!(verify().is_err());
        there[0].write(at, &copy.to[at..=at]).unwrap();
    }
    // What was not moved is not summed.
    if let Some(at) = copy.written.iter().position(|&count| count == 0) {
        there[0].write(at, &[copy.to[at] ^ 1]).unwrap();
        prop_assert_eq!(verify(), Ok(()));
    }
    Ok(())
}

fn parallelisms(kv_heads: Option<u32>) -> impl Strategy<Value = Parallelism> {
    let context = prop_oneof![Just(1u32), Just(2), Just(4)];
    let interleave = prop_oneof![1u32..4, Just(20_000), Just(1 << 29)];
    (prop_oneof![Just(1u32), Just(2), Just(4), Just(8)], 1u32..4, context, interleave).prop_map(
        move |(tp, stages, context, interleave)| Parallelism {
            tp: tp.max(context),
            stages: even_stages(LAYERS, stages),
            context,
            interleave,
            kv_heads,
        },
    )
}

proptest! {
    #[test]
    fn the_named_ranks_bring_each_byte_once(
        (kv_heads, prefill, decode) in prop_oneof![Just(None), Just(Some(1u32)), Just(Some(2)), Just(Some(8))]
            .prop_flat_map(|heads| (Just(heads), parallelisms(heads), parallelisms(heads))),
        room: u64,
    ) {
        let layout = |side: &Parallelism, rank| side.layout(rank, whole(kv_heads)).unwrap();
        let mut pairs = Vec::new();
        for rank in 0..decode.ranks() {
            let sources = prefill.sources(&decode, rank, room).unwrap();
            prop_assert!(sources.is_sorted_by(|a, b| a.rank < b.rank));
            let layouts: Vec<(CacheLayout, Parts)> =
                sources.iter().map(|source| (layout(&prefill, source.rank), source.parts)).collect();
            let here = layout(&decode, rank);
            prop_assert_eq!(here.rank(), rank);
            let all = here.layers();
            prop_assert!(here.is_covered_by(&all, &layouts), "{:?} for {}", sources, rank);
            // One less, or one twice, is not enough, or too much.
            prop_assert!(!here.is_covered_by(&all, &layouts[1..]));
            let twice = [&layouts[..], &layouts[..1]].concat();
            prop_assert!(!here.is_covered_by(&all, &twice));
            // A stage by itself brings its layers, and the others together more than these.
            let stage = layouts[0].0.layers();
            let of_stage: Vec<_> = layouts.iter().filter(|(one, _)| one.layers() == stage).cloned().collect();
            let its = all.start.max(stage.start)..all.end.min(stage.end);
            prop_assert!(here.is_covered_by(&its, &of_stage));
            let is_one = of_stage.len() == layouts.len();
            prop_assert_eq!(here.is_covered_by(&all, &of_stage), is_one);
            prop_assert_eq!(here.is_covered_by(&its, &layouts), is_one);
            pairs.extend(sources.into_iter().map(|source| (source.rank, rank)));
        }
        // The two maps are one.
        let mut other_way = Vec::new();
        for rank in 0..prefill.ranks() {
            let destinations = prefill.destinations(&decode, rank, room).unwrap();
            other_way.extend(destinations.into_iter().map(|destination| (rank, destination)));
        }
        pairs.sort_unstable();
        prop_assert_eq!(pairs, other_way);
    }
}

/// What a model keeps, on whichever ranks.
fn whole(kv_heads: Option<u32>) -> LayoutOptions {
    let kind = match kv_heads {
        None => CacheKind::Mla { latent_bytes: 4, rope_bytes: 0 },
        Some(of) => {
            CacheKind::Heads { heads: HeadShare::all(of), head_bytes: 4, order: HeadOrder::TokensFirst }
        }
    };
    LayoutOptions {
        model: "m".into(),
        model_layers: LAYERS,
        layers: 0..LAYERS,
        kind,
        dtype: Dtype::Bf16,
        page_tokens: 4,
        pages: 4,
        placement: Placement::LayerMajor { region: 0 },
    }
}

#[test]
fn ranks_share_the_heads_that_the_cache_has() {
    let two = Parallelism::tensor(2, LAYERS, Some(8));
    assert!(two.layout(1, whole(Some(8))).is_ok());
    for (side, kv_heads) in [(&two, Some(4)), (&two, None), (&Parallelism::tensor(2, LAYERS, None), Some(8))]
    {
        let error = side.layout(0, whole(kv_heads)).unwrap_err();
        assert_eq!(error, TopologyError::OtherHeads { shared: side.kv_heads, kept: kv_heads });
    }
    let no_pages = LayoutOptions { pages: 0, ..whole(Some(8)) };
    assert!(matches!(two.layout(0, no_pages), Err(TopologyError::Layout(_))));
}

#[test]
fn a_latent_is_sent_once_and_the_load_is_spread() {
    let eight = Parallelism::tensor(8, LAYERS, None);
    let ranks = |sources: Vec<SourceRank>| sources.iter().map(|source| source.rank).collect::<Vec<u32>>();
    let sources = |decode: &Parallelism, rank, room| ranks(eight.sources(decode, rank, room).unwrap());
    for rank in 0..8 {
        assert_eq!(sources(&eight, rank, 0), [rank]);
        assert_eq!(sources(&eight, rank, 3), [(rank + 3) % 8]);
    }
    let one = Parallelism::tensor(1, LAYERS, None);
    assert_eq!(
        (0..16).map(|room| sources(&one, 0, room)[0]).collect::<Vec<_>>(),
        [0, 1, 2, 3, 4, 5, 6, 7].repeat(2)
    );
    // Heads: two of four come from each of two ranks, and each of two stages has its own.
    let four = Parallelism { stages: even_stages(LAYERS, 2), ..Parallelism::tensor(4, LAYERS, Some(8)) };
    let sources = four.sources(&Parallelism::tensor(2, LAYERS, Some(8)), 1, 9).unwrap();
    let parts: Vec<_> = sources.iter().map(|source| (source.rank, source.parts)).collect();
    assert_eq!(parts, [(2, Parts::All), (3, Parts::Shared), (6, Parts::All), (7, Parts::Shared)]);
}

#[test]
fn ranks_that_make_no_sense_are_refused() {
    let sound = Parallelism::tensor(2, LAYERS, Some(8));
    assert!(sound.share(1).is_ok());
    let bad = [
        Parallelism { tp: 0, ..sound.clone() },
        Parallelism { stages: Vec::new(), ..sound.clone() },
        Parallelism { tp: 5000, ..sound.clone() },
        Parallelism { context: 0, ..sound.clone() },
        Parallelism { context: 3, ..sound.clone() },
        Parallelism { interleave: 0, ..sound.clone() },
        Parallelism { kv_heads: Some(3), ..sound.clone() },
        Parallelism { kv_heads: Some(0), ..sound.clone() },
    ];
    for parallelism in bad {
        let error = parallelism.share(0).unwrap_err();
        assert!(!error.to_string().is_empty());
    }
    assert!(sound.share(2).is_err());
}
