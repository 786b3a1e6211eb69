//! The planner against a model that copies token by token: each destination byte of the range is written exactly
//! once, with the right source byte, and no other byte is touched, whatever the layouts, the page lists, the range
//! and the places at which posting comes back short.

use std::ops::Range;

use crossdock_kv::{
    CacheKind, CacheLayout, Dtype, LayerBuffer, LayoutOptions, OpsError, PageTable, PageTableError, Parts,
    Placement, Plan, PlanError, PlanInput, Route,
};
use crossdock_transport::{Direction, GrantId, LocalId, Op, Posted, RemoteId, Shape};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn each_byte_lands_exactly_once(
        case in cases(), direction in directions(), batch in 1usize..7, mut cuts: u64,
    ) {
        let plan = case.plan();
        let expected = case.model();
        let mut found = case.untouched();
        let ops = plan.ops(case.route(direction), plan.layers()).unwrap();
        let mut cursor = ops.start();
        let mut moved = 0;
        while !ops.is_done(cursor) {
            let mut ops_now = vec![Op::notify(0); batch];
            let filled = ops.fill(cursor, &mut ops_now);
            prop_assert!(filled > 0);
            cuts = cuts.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let posted = cut(&ops_now[..filled], cuts >> 32);
            moved += case.carry_out(&ops_now[..filled], posted, direction, &mut found);
            cursor = ops.advance(cursor, posted);
        }
        prop_assert_eq!(ops.fill(cursor, &mut [Op::notify(0); 3]), 0);
        prop_assert_eq!(&found, &expected);
        prop_assert_eq!(moved, plan.total_bytes());
        prop_assert_eq!(ops.bytes(), plan.total_bytes());
    }

    #[test]
    fn layers_can_be_moved_one_by_one_in_any_order(case in cases(), direction in directions(), backwards: bool) {
        let plan = case.plan();
        let mut found = case.untouched();
        let mut layers: Vec<u32> = plan.layers().collect();
        if backwards {
            layers.reverse();
        }
        for layer in layers {
            let ops = plan.ops(case.route(direction), layer..layer + 1).unwrap();
            let mut all = vec![Op::notify(0); ops.count() + 1];
            let filled = ops.fill(ops.start(), &mut all);
            prop_assert_eq!(filled, plan.ops_per_layer(layer));
            let pieces: usize = all[..filled].iter().map(pieces).sum();
            prop_assert_eq!(pieces, plan.pieces_per_layer(layer));
            let moved = case.carry_out(&all[..filled], Posted::all(&all[..filled]), direction, &mut found);
            prop_assert_eq!(moved, plan.layer_bytes(layer));
            let end = ops.advance(ops.start(), Posted::all(&all[..filled]));
            prop_assert!(ops.is_done(end));
        }
        prop_assert_eq!(found, case.model());
    }

    #[test]
    fn a_narrowed_plan_is_as_good_as_a_new_one(before in cases(), case in cases(), start in 0f64..1.0) {
        let mut plan = before.plan();
        let tokens = case.tokens.clone();
        let chunk = tokens.start + (f64::from(tokens.end - tokens.start) * start) as u32..tokens.end;
        for tokens in [chunk, tokens] {
            let case = Case { tokens, ..case.clone() };
            plan.narrow(&case.input()).unwrap();
            let fresh = case.plan();
            let route = case.route(Direction::Write);
            let ops = |plan: &Plan| {
                let ops = plan.ops(route, plan.layers()).unwrap();
                let mut all = vec![Op::notify(0); ops.count()];
                ops.fill(ops.start(), &mut all);
                format!("{} {all:?}", plan.total_bytes())
            };
            prop_assert_eq!(ops(&plan), ops(&fresh));
        }
    }

    #[test]
    fn there_are_no_more_ops_than_stretches_of_memory(case in cases()) {
        let plan = case.plan();
        for layer in plan.layers() {
            let fewest = case.stretches(layer);
            prop_assert_eq!(plan.pieces_per_layer(layer), fewest);
            prop_assert!(plan.ops_per_layer(layer) <= fewest);
        }
    }
}

#[test]
fn scattered_pages_of_one_size_are_one_op_a_layer() {
    let layout = CacheLayout::deepseek_r1(64, 1000).unwrap();
    let (source, destination) = ([7, 3, 900, 5, 11], [1, 500, 2, 8, 4]);
    let plan = plan(&layout, &source, &layout, &destination, 0..320);
    let ops = all_ops(&plan, 60..61);
    let expected = Shape::Pages {
        local: LocalId(0),
        local_offset: 60 * 1000 * 73_728,
        local_stride_bytes: 73_728,
        local_pages: &source,
        remote: RemoteId(0),
        remote_offset: 60 * 1000 * 73_728,
        remote_stride_bytes: 73_728,
        remote_pages: &destination,
        piece_bytes: 73_728,
    };
    assert_eq!(ops.iter().map(|op| op.shape).collect::<Vec<_>>(), [expected]);
    assert_eq!((plan.layer_bytes(7), plan.total_bytes()), (320 * 1152, 61 * 320 * 1152));
}

#[test]
fn neighbours_on_both_sides_become_one_span() {
    let layout = CacheLayout::deepseek_r1(64, 1000).unwrap();
    let plan = plan(&layout, &[7, 8, 9], &layout, &[20, 21, 22], 10..190);
    let ops = all_ops(&plan, 0..1);
    let expected = Shape::Span {
        local: LocalId(0),
        local_offset: 7 * 73_728 + 10 * 1152,
        remote: RemoteId(0),
        remote_offset: 20 * 73_728 + 10 * 1152,
        bytes: 180 * 1152,
    };
    assert_eq!(ops.iter().map(|op| op.shape).collect::<Vec<_>>(), [expected]);
}

#[test]
fn pieces_inside_pages_share_one_op_whatever_their_place() {
    // Scattered and padded, so nothing merges: what counts is how many lengths of stretches two page sizes make.
    let sizes: [(u32, u32, usize); 4] = [(64, 16, 1), (1, 64, 1), (64, 1, 1), (48, 64, 3)];
    for (source_tokens, destination_tokens, ops) in sizes {
        let source = padded(source_tokens, 4000);
        let destination = padded(destination_tokens, 4000);
        let scattered = |layout: &CacheLayout| -> Vec<u32> {
            (0..layout.pages_for(1536)).map(|nth| nth * 769 % 4000).collect()
        };
        let plan = plan(&source, &scattered(&source), &destination, &scattered(&destination), 0..1536);
        assert_eq!(plan.ops_per_layer(0), ops, "{source_tokens} to {destination_tokens}");
    }
}

#[test]
fn a_cut_first_page_and_a_cut_last_one_share_an_op() {
    let layout = CacheLayout::deepseek_r1(64, 100).unwrap();
    let plan = plan(&layout, &[4, 9], &layout, &[8, 2], 10..118);
    assert_eq!((plan.pieces_per_layer(0), plan.ops_per_layer(0)), (2, 1));
}

#[test]
fn a_pool_too_large_for_fine_indices_is_moved_by_pages() {
    // 2^28 pages of 16 tokens and an odd stride: counted in bytes, no index fits 32 bits.
    let largest = |page_tokens| {
        CacheLayout::new(LayoutOptions {
            model: "m".into(),
            model_layers: 1,
            layers: 0..1,
            kind: CacheKind::Mla { latent_bytes: 8, rope_bytes: 0 },
            dtype: Dtype::Bf16,
            page_tokens,
            pages: 1 << 28,
            placement: Placement::Buffers(vec![LayerBuffer {
                region: 0,
                offset: 5,
                stride_bytes: 8 * u64::from(page_tokens) + 1,
            }]),
        })
        .unwrap()
    };
    let (source, destination) = (largest(16), largest(8));
    let last = (1 << 28) - 1;
    let plan = plan(&source, &[last, 3], &destination, &[9, 1, last, 4], 0..32);
    let starts = |op: &Op<'_>| match op.shape {
        Shape::Pages { local_offset, local_pages, local_stride_bytes, .. } => {
            (local_offset, local_stride_bytes, local_pages.to_vec())
        }
        Shape::Span { .. } => panic!("{op:?}"),
    };
    let found: Vec<_> = all_ops(&plan, 0..1).iter().map(starts).collect();
    assert_eq!(found, [(5, 129, vec![last, 3]), (5 + 64, 129, vec![last, 3])]);
}

#[test]
fn runs_of_many_lengths_make_an_op_each() {
    // Runs of 1 to 101 pages in a wild order, more lengths than are counted at once, each somewhere else at the
    // destination.
    let runs = 101u32;
    let layout = CacheLayout::deepseek_r1(1, 4 * runs * runs).unwrap();
    let lengths = (0..runs).map(|run| run * 37 % runs + 1);
    let source: Vec<u32> = (0..runs * (runs + 1) / 2).collect();
    let destination: Vec<u32> = lengths
        .enumerate()
        .flat_map(|(run, pages)| (0..pages).map(move |page| (runs - run as u32) * 2 * runs + page))
        .collect();
    let plan = plan(&layout, &source, &layout, &destination, 0..source.len() as u32);
    assert_eq!(plan.ops_per_layer(0), runs as usize);
    let ops = all_ops(&plan, 0..1);
    for op in &ops {
        let Shape::Span { local_offset, remote_offset, .. } = op.shape else { panic!("{op:?}") };
        let page = |offset| (offset / 1152) as u32;
        assert_eq!(destination[page(local_offset) as usize], page(remote_offset));
    }
    let lengths: Vec<u64> = ops.iter().map(|op| op.bytes().unwrap() / 1152).collect();
    assert_eq!(lengths, (1..=u64::from(runs)).collect::<Vec<_>>());
}

#[test]
fn after_an_error_a_plan_is_empty_and_can_be_narrowed() {
    let layout = CacheLayout::deepseek_r1(16, 100).unwrap();
    let input = |destination| PlanInput {
        source: PageTable::new(&layout, &[1, 2, 3]),
        destination: PageTable::new(&layout, destination),
        tokens: 0..48,
    };
    let mut plan = Plan::build(&input(&[7, 8, 9])).unwrap();
    for _ in 0..2 {
        assert_eq!(Plan::build(&input(&[8, 70, 8])).unwrap_err(), PlanError::DuplicatePage { page: 8 });
        assert!(matches!(plan.narrow(&input(&[8, 700, 9])), Err(PlanError::Destination(_))));
        assert_eq!((plan.tokens(), plan.layers().len(), plan.total_bytes()), (0..0, 0, 0));
        plan.narrow(&input(&[8, 70, 9])).unwrap();
        assert_eq!(plan.pieces_per_layer(60), 3);
    }
}

#[test]
fn an_empty_range_is_a_plan_without_ops() {
    let layout = CacheLayout::deepseek_r1(64, 10).unwrap();
    let plan = plan(&layout, &[], &layout, &[], 100..100);
    assert_eq!((plan.total_bytes(), plan.layers()), (0, 0..61));
    assert!(all_ops(&plan, 0..61).is_empty());
    let whole = self::plan(&layout, &[1], &layout, &[2], 0..64);
    assert!(all_ops(&whole, 5..5).is_empty());
}

#[test]
fn what_cannot_be_planned_is_named() {
    let layout = CacheLayout::deepseek_r1(64, 10).unwrap();
    let build = |source: PageTable<'_>, destination: PageTable<'_>, tokens| {
        Plan::build(&PlanInput { source, destination, tokens }).map(|_| ()).unwrap_err()
    };
    let table = |pages| PageTable::new(&layout, pages);
    assert_eq!(
        build(table(&[1]), table(&[1]), Range { start: 3, end: 2 }),
        PlanError::BadTokens { tokens: Range { start: 3, end: 2 } }
    );
    assert_eq!(
        build(table(&[1]), table(&[1, 2]), 0..65),
        PlanError::Source(PageTableError::NotCovered { needed: 0..2, given: 0..1 })
    );
    assert_eq!(
        build(table(&[1, 2]), PageTable { first_page: 1, ..table(&[1, 2]) }, 63..100),
        PlanError::Destination(PageTableError::NotCovered { needed: 0..2, given: 1..3 })
    );
    assert_eq!(
        build(table(&[10]), table(&[1]), 0..64),
        PlanError::Source(PageTableError::PageOutOfRange { page: 10, pages: 10 })
    );
    assert_eq!(build(table(&[1, 1, 2]), table(&[3, 4, 3]), 0..192), PlanError::DuplicatePage { page: 3 });
    // The source may be read twice, and pages that do not take part do not matter.
    Plan::build(&PlanInput { source: table(&[1, 1]), destination: table(&[3, 4, 3]), tokens: 0..128 })
        .unwrap();

    let other = |layers: Range<u32>, dtype, buffers: Vec<LayerBuffer>| {
        CacheLayout::new(LayoutOptions {
            model: "deepseek-r1".into(),
            model_layers: 61,
            layers,
            kind: layout.kind(),
            dtype,
            page_tokens: 64,
            pages: 10,
            placement: Placement::Buffers(buffers),
        })
        .unwrap()
    };
    let buffers = |count: u32, stride: fn(u32) -> u64| -> Vec<LayerBuffer> {
        (0..count).map(|region| LayerBuffer { region, offset: 0, stride_bytes: stride(region) }).collect()
    };
    let fp8 = other(0..1, Dtype::Fp8E4m3, buffers(1, |_| 73_728));
    let error = build(table(&[1]), PageTable::new(&fp8, &[1]), 0..64);
    assert_eq!(error, PlanError::Unbridgeable { key: "dtype" });
    let (early, late) =
        (other(0..2, Dtype::Bf16, buffers(2, |_| 73_728)), other(2..3, Dtype::Bf16, buffers(1, |_| 73_728)));
    assert_eq!(
        build(PageTable::new(&early, &[1]), PageTable::new(&late, &[1]), 0..64),
        PlanError::NoCommonLayers { source_layers: 0..2, destination_layers: 2..3 }
    );
    let uneven = other(0..17, Dtype::Bf16, buffers(17, |layer| 73_728 + u64::from(layer)));
    let error = build(PageTable::new(&uneven, &[1]), table(&[1]), 0..64);
    assert_eq!(error, PlanError::TooManyShapes { layer: 16 });
}

#[test]
fn ops_are_given_only_for_known_layers_and_regions() {
    let layout = CacheLayout::deepseek_r1(64, 10).unwrap();
    let far = CacheLayout::new(LayoutOptions {
        model: "deepseek-r1".into(),
        model_layers: 61,
        layers: 3..61,
        kind: layout.kind(),
        dtype: layout.dtype(),
        page_tokens: 64,
        pages: 10,
        placement: Placement::PageMajor { region: 4 },
    })
    .unwrap();
    let plan = plan(&layout, &[1], &far, &[2], 0..64);
    let (local, remote): (Vec<_>, Vec<_>) = (0..5).map(|id| (LocalId(id), RemoteId(id))).unzip();
    let route = |direction, local, remote| Route { direction, grant: GrantId::new(0, 0), local, remote };
    let whole = route(Direction::Write, &local[..1], &remote[..]);
    assert_eq!(plan.layers(), 3..61);
    plan.ops(whole, 3..61).unwrap();
    for layers in [0..4, 60..62, Range { start: 5, end: 4 }] {
        let error = plan.ops(whole, layers.clone()).map(|_| ()).unwrap_err();
        assert_eq!(error, OpsError::LayersNotPlanned { layers, planned: 3..61 });
    }
    let unknown = |side, region, known| OpsError::UnknownRegion { side, region, known };
    let cases = [
        (route(Direction::Write, &local[..0], &remote[..]), unknown("local", 0, 0)),
        (route(Direction::Write, &local[..1], &remote[..4]), unknown("remote", 4, 4)),
        (route(Direction::Read, &local[..4], &remote[..1]), unknown("local", 4, 4)),
        (route(Direction::Read, &local[..5], &remote[..0]), unknown("remote", 0, 0)),
    ];
    for (route, expected) in cases {
        assert_eq!(plan.ops(route, 3..61).map(|_| ()).unwrap_err(), expected);
    }
}

fn plan(
    source: &CacheLayout,
    source_pages: &[u32],
    destination: &CacheLayout,
    destination_pages: &[u32],
    tokens: Range<u32>,
) -> Plan {
    Plan::build(&PlanInput {
        source: PageTable::new(source, source_pages),
        destination: PageTable::new(destination, destination_pages),
        tokens,
    })
    .unwrap()
}

fn all_ops(plan: &Plan, layers: Range<u32>) -> Vec<Op<'_>> {
    let route = Route {
        direction: Direction::Write,
        grant: GrantId::new(0, 0),
        local: &[LocalId(0)],
        remote: &[RemoteId(0)],
    };
    let ops = plan.ops(route, layers).unwrap();
    let mut all = vec![Op::notify(0); ops.count()];
    assert_eq!(ops.fill(ops.start(), &mut all), all.len());
    all
}

/// One layer whose pages are padded to whole kilobytes, so that no two of them touch.
fn padded(page_tokens: u32, pages: u32) -> CacheLayout {
    let stride_bytes = (u64::from(page_tokens) * 1152 + 1).next_multiple_of(1024);
    CacheLayout::new(LayoutOptions {
        model: "m".into(),
        model_layers: 1,
        layers: 0..1,
        kind: CacheKind::Mla { latent_bytes: 1024, rope_bytes: 128 },
        dtype: Dtype::Bf16,
        page_tokens,
        pages,
        placement: Placement::Buffers(vec![LayerBuffer { region: 0, offset: 0, stride_bytes }]),
    })
    .unwrap()
}

/// One side of a case: a layout, and the pages of the whole request or of what follows a skipped prefix.
#[derive(Clone, Debug)]
struct Side {
    layout: CacheLayout,
    first_page: u32,
    pages: Vec<u32>,
}

#[derive(Clone, Debug)]
struct Case {
    source: Side,
    destination: Side,
    tokens: Range<u32>,
}

/// For each destination region, for each byte: what was written there, and how often.
type Image = Vec<Vec<(u8, u8)>>;

const REGIONS: usize = 2;

impl Side {
    fn table(&self) -> PageTable<'_> {
        PageTable {
            layout: &self.layout,
            pool: 0,
            parts: Parts::All,
            first_page: self.first_page,
            pages: &self.pages,
        }
    }

    fn region_bytes(&self) -> [usize; REGIONS] {
        [0, 1].map(|region| self.layout.bytes_needed(region) as usize)
    }

    /// Region and offset of a token, by the definition of a page table.
    fn token(&self, layer: u32, token: u32) -> (usize, usize) {
        let buffer = self.layout.buffer(layer).unwrap();
        let page = self.pages[(token / self.layout.page_tokens() - self.first_page) as usize];
        let in_page = u64::from(token % self.layout.page_tokens()) * self.layout.token_bytes();
        (buffer.region as usize, (buffer.offset + u64::from(page) * buffer.stride_bytes + in_page) as usize)
    }
}

impl Case {
    fn input(&self) -> PlanInput<'_> {
        PlanInput {
            source: self.source.table(),
            destination: self.destination.table(),
            tokens: self.tokens.clone(),
        }
    }

    fn plan(&self) -> Plan {
        Plan::build(&self.input()).unwrap()
    }

    fn route(&self, direction: Direction) -> Route<'static> {
        Route {
            direction,
            grant: GrantId::new(3, 1),
            local: &[LocalId(10), LocalId(11)],
            remote: &[RemoteId(20), RemoteId(21)],
        }
    }

    fn untouched(&self) -> Image {
        self.destination.region_bytes().map(|bytes| vec![(0, 0); bytes]).to_vec()
    }

    fn layers(&self) -> Range<u32> {
        let (source, destination) = (self.source.layout.layers(), self.destination.layout.layers());
        source.start.max(destination.start)..source.end.min(destination.end)
    }

    /// What the destination must look like: the naive copy.
    fn model(&self) -> Image {
        let mut image = self.untouched();
        for layer in self.layers() {
            for token in self.tokens.clone() {
                let (from_region, from) = self.source.token(layer, token);
                let (to_region, to) = self.destination.token(layer, token);
                for byte in 0..self.source.layout.token_bytes() as usize {
                    let (value, count) = &mut image[to_region][to + byte];
                    *value = source_byte(from_region, from + byte);
                    *count += 1;
                }
            }
        }
        image
    }

    /// How many stretches of memory a layer is, when all that continues on both sides is one.
    fn stretches(&self, layer: u32) -> usize {
        let bytes = self.source.layout.token_bytes() as usize;
        let mut expected = None;
        let mut count = 0;
        for token in self.tokens.clone() {
            let (from, to) = (self.source.token(layer, token).1, self.destination.token(layer, token).1);
            count += usize::from(expected != Some((from, to)));
            expected = Some((from + bytes, to + bytes));
        }
        count
    }

    /// Does what a port would do with as much of the ops as it took, and says how many bytes that were.
    fn carry_out(&self, ops: &[Op<'_>], posted: Posted, direction: Direction, image: &mut Image) -> u64 {
        let mut moved = 0;
        let mut copy = |local: LocalId, local_at: u64, remote: RemoteId, remote_at: u64, bytes: u64| {
            let (local, remote) = ((local.0 - 10) as usize, (remote.0 - 20) as usize);
            let ((from_region, from), (to_region, to)) = match direction {
                Direction::Write => ((local, local_at as usize), (remote, remote_at as usize)),
                Direction::Read => ((remote, remote_at as usize), (local, local_at as usize)),
            };
            assert!(from + bytes as usize <= self.source.region_bytes()[from_region]);
            for byte in 0..bytes as usize {
                let (value, count) = &mut image[to_region][to + byte];
                *value = source_byte(from_region, from + byte);
                *count += 1;
            }
            moved += bytes;
        };
        for (nth, op) in ops.iter().enumerate().take(posted.ops + 1) {
            assert_eq!((op.direction, op.grant), (direction, GrantId::new(3, 1)));
            op.extents().unwrap();
            let taken = if nth < posted.ops { u64::MAX } else { posted.within };
            match op.shape {
                Shape::Span { local, local_offset, remote, remote_offset, bytes } => {
                    copy(local, local_offset, remote, remote_offset, bytes.min(taken));
                }
                Shape::Pages {
                    local,
                    local_offset,
                    local_stride_bytes,
                    local_pages,
                    remote,
                    remote_offset,
                    remote_stride_bytes,
                    remote_pages,
                    piece_bytes,
                } => {
                    for (here, there) in local_pages.iter().zip(remote_pages).take(taken as usize) {
                        let here = local_offset + u64::from(*here) * local_stride_bytes;
                        let there = remote_offset + u64::from(*there) * remote_stride_bytes;
                        copy(local, here, remote, there, piece_bytes);
                    }
                }
            }
        }
        moved
    }
}

/// Differs between regions and between neighbouring bytes.
fn source_byte(region: usize, at: usize) -> u8 {
    (at.wrapping_mul(0x9e37_79b1) >> 13) as u8 ^ (region as u8) << 7
}

fn pieces(op: &Op<'_>) -> usize {
    match op.shape {
        Shape::Span { .. } => 1,
        Shape::Pages { local_pages, .. } => local_pages.len(),
    }
}

/// A short post, chosen by one number: some ops, and a part of the next.
fn cut(ops: &[Op<'_>], at: u64) -> Posted {
    let whole = at as usize % (ops.len() + 1);
    let parts = |op: &Op<'_>| match op.shape {
        Shape::Span { bytes, .. } => bytes,
        Shape::Pages { local_pages, .. } => local_pages.len() as u64,
    };
    match ops.get(whole) {
        Some(op) => Posted { ops: whole, within: (at >> 8) % parts(op) },
        None => Posted::all(ops),
    }
}

fn directions() -> impl Strategy<Value = Direction> {
    prop_oneof![Just(Direction::Write), Just(Direction::Read)]
}

fn cases() -> impl Strategy<Value = Case> {
    let ends = (0u32..300, 0u32..300).prop_map(|(a, b)| a.min(b)..a.max(b));
    (1u32..9, 1u32..4, ends).prop_flat_map(|(token_bytes, model_layers, tokens)| {
        let side = || sides(token_bytes, model_layers, tokens.clone());
        let tokens = tokens.clone();
        (side(), side()).prop_filter_map("no common layers", move |(source, destination)| {
            let case = Case { source, destination, tokens: tokens.clone() };
            (!case.layers().is_empty()).then_some(case)
        })
    })
}

fn sides(token_bytes: u32, model_layers: u32, tokens: Range<u32>) -> impl Strategy<Value = Side> {
    let page_tokens = prop_oneof![
        2 => 1u32..=128,
        3 => prop::sample::select(vec![1u32, 2, 3, 16, 32, 48, 64, 96, 128]),
    ];
    (page_tokens, 0u32..4, 1usize..9, any::<bool>()).prop_flat_map(
        move |(page_tokens, spare, run, skips_prefix)| {
            let first_page = if skips_prefix { tokens.start / page_tokens } else { 0 };
            let listed = tokens.end.div_ceil(page_tokens).saturating_sub(first_page);
            let pages = (listed + spare).max(1);
            (
                layouts(token_bytes, model_layers, page_tokens, pages),
                page_lists(pages, listed, run),
                Just(first_page),
            )
                .prop_map(|(layout, pages, first_page)| Side { layout, first_page, pages })
        },
    )
}

/// Runs of neighbours, from single scattered pages to the whole pool in order.
fn page_lists(pool: u32, listed: u32, run: usize) -> impl Strategy<Value = Vec<u32>> {
    let all: Vec<u32> = (0..pool).collect();
    let runs: Vec<Vec<u32>> = all.chunks(run).map(<[u32]>::to_vec).collect();
    let scattered = Just(runs).prop_shuffle();
    prop_oneof![
        4 => scattered.prop_map(move |runs| runs.concat()[..listed as usize].to_vec()),
        1 => Just(all[..listed as usize].to_vec()),
    ]
}

/// Even placements, and buffers with gaps between them, padding between their pages, in either region.
fn layouts(
    token_bytes: u32,
    model_layers: u32,
    page_tokens: u32,
    pages: u32,
) -> impl Strategy<Value = CacheLayout> {
    let page_bytes = u64::from(token_bytes * page_tokens);
    let place = (0..REGIONS as u32, 0u64..40, prop_oneof![Just(0u64), Just(7), Just(64)]);
    let apart = prop::collection::vec(place, model_layers as usize).prop_map(move |places| {
        let mut ends = [0; REGIONS];
        let buffer = |(region, gap, padding)| {
            let end: &mut u64 = &mut ends[region as usize];
            let buffer = LayerBuffer { region, offset: *end + gap, stride_bytes: page_bytes + padding };
            *end = buffer.offset + buffer.stride_bytes * u64::from(pages);
            buffer
        };
        Placement::Buffers(places.into_iter().map(buffer).collect())
    });
    let placement = prop_oneof![
        Just(Placement::LayerMajor { region: 0 }),
        Just(Placement::PageMajor { region: 1 }),
        apart,
    ];
    let layers = (0..model_layers, 1..=model_layers);
    (placement, layers).prop_map(move |(placement, (first, count))| {
        let layers = first..(first + count).min(model_layers);
        let placement = match placement {
            Placement::Buffers(buffers) => Placement::Buffers(buffers[..layers.len()].to_vec()),
            even => even,
        };
        CacheLayout::new(LayoutOptions {
            model: "m".into(),
            model_layers,
            layers,
            kind: CacheKind::Mla { latent_bytes: token_bytes, rope_bytes: 0 },
            dtype: Dtype::Bf16,
            page_tokens,
            pages,
            placement,
        })
        .unwrap()
    })
}
