//! One request between several ranks: each rank of the decode side takes its shares from the ranks of the prefill side
//! that keep them, whatever the tensor, pipeline and context parallelism of the two, and what is kept beside the tokens
//! comes with them.

use std::ops::Range;
use std::time::{Duration, Instant};

use crossdock::{
    Authentication, CacheKind, CacheLayout, CachePartOptions, CachePoolOptions, Config, Dtype, End, Ended,
    Extent, GatherRequest, HeadOrder, HeadShare, LayerBuffer, LayoutOptions, Memory, Misfit, Node, PagePool,
    PageRef, PageSet, Parallelism, Parts, Peer, Placement, PortConfig, Progress, RailStats, Receiving,
    RoomRefusal, ScatterRequest, ScatterServeRequest, Sending, Serving, ShmOptions, Source, Ticket, Verify,
    Who, even_stages,
};

const WAIT: Duration = Duration::from_secs(30);
const LAYERS: u32 = 4;
const HEAD_BYTES: u32 = 8;
const PAGES: u32 = 64;

/// How the cache of a model is laid out on one side.
#[derive(Clone, Debug)]
struct Side {
    ranks: Parallelism,
    page_tokens: u32,
    order: HeadOrder,
    /// A sliding window, Mamba's state and an indexer's keys beside the tokens.
    has_more: bool,
}

struct Rank {
    node: Node,
    layout: CacheLayout,
    memory: Memory,
    pools: Vec<PagePool>,
}

impl Side {
    fn new(ranks: Parallelism, page_tokens: u32, order: HeadOrder) -> Self {
        Self { ranks, page_tokens, order, has_more: false }
    }

    fn layout(&self, rank: u32) -> CacheLayout {
        let share = self.ranks.share(rank).unwrap();
        let kind = match self.ranks.kv_heads {
            None => CacheKind::Mla { latent_bytes: HEAD_BYTES, rope_bytes: 0 },
            Some(_) => CacheKind::Heads { heads: share.heads, head_bytes: HEAD_BYTES, order: self.order },
        };
        let layout = CacheLayout::new(LayoutOptions {
            model: "m".into(),
            model_layers: LAYERS,
            layers: share.layers.clone(),
            kind,
            dtype: Dtype::Bf16,
            page_tokens: self.page_tokens,
            pages: PAGES,
            placement: Placement::PageMajor { region: 0 },
        });
        let layout = layout.unwrap().with_rank(rank).unwrap().with_context(share.context).unwrap();
        if !self.has_more {
            return layout;
        }
        let mut end = layout.bytes_needed(0);
        let layers: Vec<u32> = share.layers.collect();
        let mut part = |name: &str, heads: HeadShare, head_bytes: u32, page_tokens: u32, layers: &[u32]| {
            let stride_bytes = u64::from(heads.count * head_bytes * page_tokens);
            let place = |_| {
                let buffer = LayerBuffer { region: 0, offset: end, stride_bytes };
                end += stride_bytes * u64::from(PAGES);
                buffer
            };
            let buffers = layers.iter().map(place).collect();
            let (name, layers, order) = (name.into(), layers.to_vec(), self.order);
            CachePartOptions { name, heads, head_bytes, order, layers, buffers }
        };
        let index = part("index", HeadShare::WHOLE, 4, self.page_tokens, &layers);
        let window = part("k", share.heads, HEAD_BYTES, 4, &layers);
        // Only one layer of the model keeps a state.
        let stateful: Vec<u32> = layers.iter().copied().filter(|&layer| layer == 2).collect();
        let layout = layout.with_part(index).unwrap();
        let pool = |name: &str, extent, page_tokens, parts| CachePoolOptions {
            name: name.into(),
            extent,
            page_tokens,
            pages: PAGES,
            parts,
        };
        let layout = layout.with_pool(pool("window", Extent::Window(10), 4, vec![window])).unwrap();
        match stateful.is_empty() {
            true => layout,
            false => {
                let state = part("ssm", share.heads, 16, 1, &stateful);
                layout.with_pool(pool("state", Extent::Entries, 1, vec![state])).unwrap()
            }
        }
    }

    fn open(&self, name: &str, port: &PortConfig) -> Vec<Rank> {
        self.open_with(name, port, |_| ())
    }

    fn open_with(&self, name: &str, port: &PortConfig, configure: impl Fn(&mut Config)) -> Vec<Rank> {
        let open = |rank| {
            let layout = self.layout(rank);
            let (mut memory, pool) = crossdock::allocate(&layout).unwrap();
            let mut config =
                Config::new(format!("{name}-{rank}"), layout.clone(), memory.clone(), Authentication::Off);
            config.ports = vec![port.clone()];
            config.verify = Verify::All;
            configure(&mut config);
            let node = Node::open(config).unwrap();
            let more = layout.pools()[1..].iter().map(|pool| PagePool::external(pool.pages()));
            let pools = [pool].into_iter().chain(more).collect();
            Rank { node, layout, memory: memory.remove(0), pools }
        };
        (0..self.ranks.ranks()).map(open).collect()
    }
}

/// What is kept of a token, or entry, for a head: anything that no other has.
fn content(pool: usize, part: usize, layer: u32, token: u32, head: u32, bytes: u32) -> Vec<u8> {
    let word = [pool as u32, part as u32, layer, token, head]
        .iter()
        .fold(7u64, |sum, &part| sum.wrapping_mul(1_000_003).wrapping_add(part.into()));
    (0..bytes)
        .map(|byte| (word.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> (byte % 56)) as u8 ^ byte as u8)
        .collect()
}

impl Rank {
    /// Where each token's bytes are that this rank keeps, of those from `first` on: `f(offset, content)`.
    fn each(&self, pool: usize, first: u32, end: u32, pages: &[u32], mut f: impl FnMut(usize, Vec<u8>)) {
        let of = &self.layout.pools()[pool];
        let context = self.layout.context();
        let is_entries = of.extent() == Extent::Entries;
        let before = if is_entries { 0 } else { context.held_before(first) / of.page_tokens() };
        for token in first..end {
            let is_held = is_entries || token / context.interleave % context.ranks == context.rank;
            if !is_held {
                continue;
            }
            let place = if is_entries { token } else { context.held_before(token) };
            let page = pages[(place / of.page_tokens() - before) as usize];
            for (nth, part) in of.parts().iter().enumerate() {
                for &layer in part.layers() {
                    for head in part.heads().first..part.heads().first + part.heads().count {
                        let offset = part.offset(layer, page, place % of.page_tokens(), head).unwrap();
                        f(offset as usize, content(pool, nth, layer, token, head, part.head_bytes()));
                    }
                }
            }
        }
    }

    fn connect(&self, node: &Node) -> Peer {
        let (peer, mut up) = self.node.handle().connect(node.address()).unwrap();
        up.wait_until(Instant::now() + WAIT).unwrap().unwrap();
        peer
    }

    fn pages(&self, pool: usize, count: u32) -> PageSet {
        match pool {
            0 => self.pools[0].take(count).unwrap(),
            // The engine's own allocator chooses: from the end, every other one.
            _ => {
                let ids: Vec<u32> = (0..count).map(|nth| PAGES - 1 - 2 * nth).collect();
                self.pools[pool].adopt(&ids).unwrap()
            }
        }
    }
}

const ENTRIES: u32 = 3;

/// The tokens that a pool's pages hold, and for how many pages there must be room.
fn extent(rank: &Rank, pool: usize, tokens: u32, skip: u32) -> (u32, u32, u32) {
    let of = &rank.layout.pools()[pool];
    let (first, end) = match of.extent() {
        Extent::Tokens => (skip, tokens),
        Extent::Window(window) => (skip.max(tokens.saturating_sub(window)), tokens),
        Extent::Entries => return (0, ENTRIES, ENTRIES),
    };
    let context = rank.layout.context();
    let pages =
        context.held_before(end).div_ceil(of.page_tokens()) - context.held_before(first) / of.page_tokens();
    (first, end, pages)
}

enum Prefilling {
    /// And the pages of each pool that it is to learn of with each chunk, the layers that are to be sent, and what goes with
    /// them.
    Sending(Sending, Vec<Vec<PageRef>>, Range<u32>, Vec<u8>),
    Serving(Serving),
}

/// How a request goes from one side to the other.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    Push,
    /// The prefill side learns its pages while it goes.
    Ahead,
    Pull,
}

const WAYS: [Way; 3] = [Way::Push, Way::Ahead, Way::Pull];

/// Hands one request over between all ranks, and compares every byte that a decode rank keeps.
fn hand_over(prefill: &Side, decode: &Side, port: &PortConfig, way: Way, tokens: u32, skip: u32) {
    let room = 11;
    let (prefills, decodes) = (prefill.open("prefill", port), decode.open("decode", port));
    let mut prefilling: Vec<Prefilling> = Vec::new();
    for rank in &prefills {
        let ranks = prefill.ranks.destinations(&decode.ranks, rank.layout.rank(), room).unwrap();
        if ranks.is_empty() {
            continue;
        }
        let mut pages = Vec::new();
        for pool in 0..rank.pools.len() {
            let (first, end, count) = extent(rank, pool, tokens, 0);
            let set = rank.pages(pool, count);
            rank.each(pool, first, end, set.ids(), |at, bytes| rank.memory.write(at, &bytes).unwrap());
            pages.push(set.share());
        }
        // Nobody knows the state's pages before it is computed, nor those of the tokens that are not.
        let mut to_come = vec![Vec::new(); if way == Way::Ahead { pages.len() } else { 0 }];
        for (pool, (to_come, pages)) in to_come.iter_mut().zip(&mut pages).enumerate() {
            let known = if pool == 0 { extent(rank, 0, tokens / 3, 0).2 as usize } else { 0 };
            to_come.extend([pages.prefix(known), pages.slice(known..pages.len())]);
            *pages = pages.prefix(0);
        }
        let request = ScatterRequest { ranks, room, use_count: 0, tokens, pages, deadline: WAIT };
        let aux = format!("of {}", rank.layout.rank()).into_bytes();
        let (handle, layers) = (rank.node.handle(), rank.layout.layers());
        prefilling.push(match way {
            Way::Pull => Prefilling::Serving(handle.serve(ScatterServeRequest { request, aux }).unwrap()),
            Way::Push => Prefilling::Sending(handle.open(request).unwrap(), to_come, layers, aux),
            Way::Ahead => Prefilling::Sending(handle.open_ahead(request).unwrap(), to_come, layers, aux),
        });
    }
    // For each pool the tokens from where to where are kept, and in which pages.
    type Kept = Vec<(u32, u32, Vec<u32>)>;
    let mut receivings: Vec<(usize, Kept, Receiving)> = Vec::new();
    for (nth, rank) in decodes.iter().enumerate() {
        let sources = prefill.ranks.sources(&decode.ranks, rank.layout.rank(), room).unwrap();
        let sources = sources
            .into_iter()
            .map(|source| source.at(rank.connect(&prefills[source.rank as usize].node)))
            .collect();
        let (mut pages, mut kept) = (Vec::new(), Vec::new());
        for pool in 0..rank.pools.len() {
            let (first, end, count) = extent(rank, pool, tokens, skip);
            let set = rank.pages(pool, count);
            kept.push((first, end, set.ids().to_vec()));
            pages.push(set);
        }
        let request = GatherRequest {
            sources,
            room,
            use_count: 0,
            tokens,
            skip_tokens: skip,
            layers: None,
            pages,
            deadline: WAIT,
        };
        let handle = rank.node.handle();
        let receiving = if way == Way::Pull { handle.fetch(request) } else { handle.receive(request) };
        receivings.push((nth, kept, receiving.unwrap()));
    }
    // In two chunks, each layer by layer, with time for each to leave by itself.
    for (sending, to_come, layers, aux) in prefilling.iter_mut().filter_map(|prefilling| match prefilling {
        Prefilling::Sending(sending, to_come, layers, aux) => Some((sending, to_come, layers, aux)),
        Prefilling::Serving(_) => None,
    }) {
        for chunk in [0..tokens / 3, tokens / 3..tokens] {
            for (pool, to_come) in to_come.iter_mut().enumerate() {
                sending.add_pages(pool, to_come.remove(0)).unwrap();
            }
            for layer in layers.clone() {
                sending.send(layer..layer + 1, chunk.clone()).unwrap();
                std::thread::sleep(Duration::from_millis(1));
            }
        }
        sending.finish(std::mem::take(aux)).unwrap();
    }
    for (nth, kept, mut receiving) in receivings {
        let rank = &decodes[nth];
        let received = receiving.end.wait_until(Instant::now() + WAIT).unwrap();
        assert_eq!(received.ended.end, End::Delivered, "decode {nth}: {}", received.ended);
        assert!(received.aux.starts_with(b"of "));
        let mut compared = 0;
        for (pool, (first, end, pages)) in kept.iter().enumerate() {
            rank.each(pool, *first, *end, pages, |at, expected| {
                let mut found = vec![0; expected.len()];
                rank.memory.read(at, &mut found).unwrap();
                assert_eq!(found, expected, "decode {nth}, pool {pool}");
                compared += found.len();
            });
        }
        assert!(compared > 0);
        for mut pages in std::iter::once(receiving.pages).chain(receiving.state) {
            drop(pages.wait_until(Instant::now() + WAIT).unwrap());
        }
        for pool in &rank.pools {
            assert_eq!(pool.stats().free, PAGES, "every page is home");
        }
    }
    for prefilling in prefilling {
        let ended = match prefilling {
            Prefilling::Sending(mut sending, ..) => sending.end.wait_until(Instant::now() + WAIT),
            Prefilling::Serving(mut serving) => serving.end.wait_until(Instant::now() + WAIT),
        };
        assert_eq!(ended.unwrap().end, End::Delivered);
    }
}

/// Shared memory; but tcp under ThreadSanitizer. It does not see the system calls that map and unmap, and takes a node's
/// memory for that of an earlier one in the same place, which other threads have read.
fn shm() -> PortConfig {
    if cfg!(tsan) { PortConfig::Tcp(None) } else { PortConfig::Shm(ShmOptions::default()) }
}

const NHD: HeadOrder = HeadOrder::TokensFirst;
const HND: HeadOrder = HeadOrder::HeadsFirst;

fn stages(tp: u32, stages: u32, kv_heads: Option<u32>) -> Parallelism {
    Parallelism { stages: even_stages(LAYERS, stages), ..Parallelism::tensor(tp, LAYERS, kv_heads) }
}

fn turns(tp: u32, context: u32, interleave: u32, kv_heads: Option<u32>) -> Parallelism {
    Parallelism { context, interleave, ..Parallelism::tensor(tp, LAYERS, kv_heads) }
}

#[test]
fn heads_are_cut_and_joined() {
    let (tcp, shm) = (PortConfig::Tcp(None), shm());
    let side =
        |tp, page_tokens, order| Side::new(Parallelism::tensor(tp, LAYERS, Some(8)), page_tokens, order);
    for (from, to, port) in [
        (side(1, 16, NHD), side(2, 16, NHD), &shm),
        (side(4, 16, NHD), side(1, 4, NHD), &tcp),
        (side(2, 8, HND), side(4, 8, HND), &shm),
        (side(2, 5, HND), side(1, 7, NHD), &shm),
    ] {
        for way in WAYS {
            hand_over(&from, &to, port, way, 50, 0);
        }
    }
    // More ranks than heads: each head comes from one of those that keep it.
    let few = |tp| Side::new(Parallelism::tensor(tp, LAYERS, Some(2)), 4, NHD);
    hand_over(&few(4), &few(2), &shm, Way::Ahead, 33, 0);
    hand_over(&few(1), &few(4), &shm, Way::Ahead, 33, 0);
}

#[test]
fn stages_and_turns_are_mapped() {
    let (tcp, shm) = (PortConfig::Tcp(None), shm());
    let side = |ranks, page_tokens| Side::new(ranks, page_tokens, NHD);
    for (from, to, port) in [
        // Pipeline stages to one, and to as many, and heads besides.
        (side(stages(1, 2, None), 4), side(stages(1, 1, None), 16), &shm),
        (side(stages(2, 2, Some(4)), 4), side(stages(1, 2, Some(4)), 4), &shm),
        (side(stages(1, 1, None), 4), side(stages(1, 2, None), 4), &shm),
        (side(stages(1, 3, Some(4)), 4), side(stages(2, 1, Some(4)), 4), &tcp),
        // A latent is sent once to each; tokens in turns.
        (side(stages(4, 1, None), 4), side(stages(2, 1, None), 4), &shm),
        (side(stages(2, 1, None), 16), side(turns(4, 4, 1, None), 4), &shm),
        (side(turns(2, 2, 3, None), 4), side(turns(4, 4, 1, None), 4), &tcp),
        (side(stages(4, 1, Some(2)), 4), side(turns(4, 2, 2, Some(2)), 4), &shm),
    ] {
        for way in WAYS {
            hand_over(&from, &to, port, way, 41, if way == Way::Pull { 7 } else { 0 });
        }
    }
}

#[test]
fn what_is_kept_beside_the_tokens_comes_with_them() {
    let shm = shm();
    let side = |ranks, page_tokens, order| Side { has_more: true, ..Side::new(ranks, page_tokens, order) };
    for (from, to) in [
        (side(stages(2, 1, Some(4)), 8, NHD), side(stages(1, 1, Some(4)), 4, HND)),
        (side(stages(1, 1, Some(4)), 8, HND), side(stages(2, 1, Some(4)), 8, HND)),
    ] {
        for (way, skip) in [
            (Way::Push, 0),
            (Way::Ahead, 0),
            (Way::Pull, 0),
            (Way::Push, 20),
            (Way::Ahead, 20),
            (Way::Pull, 37),
        ] {
            hand_over(&from, &to, &shm, way, 40, skip);
        }
    }
}

/// A decode rank that gathers from two prefill ranks, of which only the first opens its end, if any does.
fn gather(
    prefills: &[Rank],
    decode: &Rank,
    sources: &[u32],
    room: u64,
    deadline: Duration,
) -> (Receiving, Option<Sending>) {
    let source =
        |&rank: &u32| Source { peer: decode.connect(&prefills[rank as usize].node), rank, parts: Parts::All };
    let sources = sources.iter().map(source).collect();
    let pages = vec![decode.pools[0].take(4).unwrap()];
    let request = GatherRequest {
        sources,
        room,
        use_count: 0,
        tokens: 16,
        skip_tokens: 0,
        layers: None,
        pages,
        deadline,
    };
    let receiving = decode.node.handle().receive(request).unwrap();
    let pages = vec![prefills[0].pools[0].take(4).unwrap().share()];
    let request = ScatterRequest { ranks: vec![0], room, use_count: 0, tokens: 16, pages, deadline: WAIT };
    let mut sending = prefills[0].node.handle().open(request).unwrap();
    sending.send_layers(0..LAYERS).unwrap();
    sending.finish(Vec::new()).unwrap();
    (receiving, Some(sending))
}

fn sides() -> (Vec<Rank>, Vec<Rank>) {
    let side = |tp| Side::new(Parallelism::tensor(tp, LAYERS, Some(8)), 4, NHD);
    let shm = shm();
    (side(2).open("prefill", &shm), side(1).open("decode", &shm))
}

#[test]
fn each_share_ends_apart_and_the_room_once() {
    // The second prefill rank never opens its end: the room expires, though the first share was delivered.
    let (prefills, decodes) = sides();
    let (mut receiving, sending) = gather(&prefills, &decodes[0], &[0, 1], 1, Duration::from_secs(3));
    let sent = sending.unwrap().end.wait_until(Instant::now() + WAIT).unwrap();
    assert_eq!(sent.end, End::Delivered);
    let received = receiving.end.wait_until(Instant::now() + WAIT).unwrap();
    // Both sides have the same time, so either may be first.
    assert!(matches!(received.ended.end, End::Expired { .. }), "{}", received.ended);
    assert!(received.aux.is_empty());
    assert_eq!(receiving.pages.wait_until(Instant::now() + WAIT).unwrap().len(), 4);

    // It is closed in the middle: the room ends at once, with its reason.
    let (mut receiving, sending) = gather(&prefills, &decodes[0], &[0, 1], 2, WAIT * 10);
    let mut prefills = prefills;
    drop(prefills.pop());
    let received = receiving.end.wait_until(Instant::now() + WAIT).unwrap();
    assert!(matches!(received.ended.end, End::PeerLost { .. }), "{}", received.ended);
    assert_eq!(receiving.pages.wait_until(Instant::now() + WAIT).unwrap().len(), 4);
    assert_eq!(decodes[0].pools[0].stats().free, PAGES);
    sending.unwrap().end.wait_until(Instant::now() + WAIT).unwrap();
}

#[test]
fn ranks_that_do_not_bring_everything_are_refused() {
    let (prefills, decodes) = sides();
    let misfit = |sources: &[u32], room| {
        let (mut receiving, _sending) = gather(&prefills, &decodes[0], sources, room, Duration::from_secs(5));
        let end = receiving.end.wait_until(Instant::now() + WAIT).unwrap().ended.end;
        drop(receiving.pages.wait_until(Instant::now() + WAIT).unwrap());
        match end {
            End::Refused { by: Who::Here, why: RoomRefusal::Mismatch(misfit) } => misfit,
            end => panic!("{end}"),
        }
    };
    assert_eq!(misfit(&[0, 0], 1), Misfit::Ranks);
    assert_eq!(misfit(&[], 2), Misfit::Ranks);
    // Half of the heads.
    assert_eq!(misfit(&[0], 5), Misfit::Gap);

    // The second rank says that it is rank 7, and keeps what the first one keeps.
    let same = Side::new(Parallelism::tensor(2, LAYERS, Some(8)), 4, NHD).layout(0).with_rank(7).unwrap();
    let (memory, pool) = crossdock::allocate(&same).unwrap();
    let node = Node::open(Config::new("same", same, memory, Authentication::Off)).unwrap();
    let sources = vec![
        Source { peer: decodes[0].connect(&prefills[0].node), rank: 0, parts: Parts::All },
        Source { peer: decodes[0].connect(&node), rank: 7, parts: Parts::All },
    ];
    let pages = vec![decodes[0].pools[0].take(4).unwrap()];
    let (room, tokens) = (3, 16);
    let request = GatherRequest {
        sources,
        room,
        use_count: 0,
        tokens,
        skip_tokens: 0,
        layers: None,
        pages,
        deadline: WAIT,
    };
    let mut receiving = decodes[0].node.handle().receive(request).unwrap();
    let mut sendings = Vec::new();
    for (node, pool) in [(&prefills[0].node, &prefills[0].pools[0]), (&node, &pool)] {
        let pages = vec![pool.take(4).unwrap().share()];
        let request = ScatterRequest { ranks: vec![0], room, use_count: 0, tokens, pages, deadline: WAIT };
        let mut sending = node.handle().open(request).unwrap();
        sending.send_layers(0..LAYERS).unwrap();
        sending.finish(Vec::new()).unwrap();
        sendings.push(sending);
    }
    let end = receiving.end.wait_until(Instant::now() + WAIT).unwrap().ended.end;
    let why = RoomRefusal::Mismatch(Misfit::Gap);
    assert_eq!(end, End::Refused { by: Who::Here, why });
    drop(receiving.pages.wait_until(Instant::now() + WAIT).unwrap());

    // A list of pages for each pool, and no more.
    let pages = vec![decodes[0].pools[0].take(4).unwrap(), decodes[0].pools[0].take(1).unwrap()];
    let sources = vec![Source { peer: decodes[0].connect(&prefills[0].node), rank: 0, parts: Parts::All }];
    let request = GatherRequest {
        sources,
        room: 4,
        use_count: 0,
        tokens,
        skip_tokens: 0,
        layers: None,
        pages,
        deadline: WAIT,
    };
    let mut receiving = decodes[0].node.handle().receive(request).unwrap();
    let end = receiving.end.wait_until(Instant::now() + WAIT).unwrap().ended.end;
    let why = RoomRefusal::Mismatch(Misfit::Lists { lists: 2, pools: 1 });
    assert_eq!(end, End::Refused { by: Who::Here, why });
    assert_eq!(receiving.pages.wait_until(Instant::now() + WAIT).unwrap().len(), 4);
    assert_eq!(receiving.state[0].wait_until(Instant::now() + WAIT).unwrap().len(), 1);
}

#[test]
fn turns_may_be_long() {
    let side = |ranks| Side::new(ranks, 1024, NHD);
    hand_over(&side(stages(1, 1, None)), &side(turns(2, 2, 9_000, None)), &shm(), Way::Ahead, 25_000, 0);
}

/// Hands over from one prefill rank, which is named as the only source, what it has of these layers. How the decode side
/// ended, and in which pages.
fn hand_over_from(
    prefill: &Rank,
    decode: &Rank,
    layers: Option<Range<u32>>,
    room: u64,
    pull: bool,
) -> (End, Vec<u32>) {
    let (set, tokens) = (prefill.pages(0, 4), 16);
    prefill.each(0, 0, tokens, set.ids(), |at, bytes| prefill.memory.write(at, &bytes).unwrap());
    let (peer, rank) = (decode.connect(&prefill.node), prefill.layout.rank());
    let sources = vec![Source { peer, rank, parts: Parts::All }];
    let pages = decode.pages(0, 4);
    let ids = pages.ids().to_vec();
    decode.each(0, 0, tokens, &ids, |at, bytes| decode.memory.write(at, &vec![0xee; bytes.len()]).unwrap());
    let pages = vec![pages];
    let request =
        GatherRequest { sources, room, use_count: 0, tokens, skip_tokens: 0, layers, pages, deadline: WAIT };
    let handle = decode.node.handle();
    let mut receiving = if pull { handle.fetch(request) } else { handle.receive(request) }.unwrap();
    let (ranks, pages) = (vec![0], vec![set.share()]);
    let request = ScatterRequest { ranks, room, use_count: 0, tokens, pages, deadline: WAIT };
    let mut end = match pull {
        true => {
            let request = ScatterServeRequest { request, aux: Vec::new() };
            prefill.node.handle().serve(request).unwrap().end
        }
        false => {
            let mut sending = prefill.node.handle().open(request).unwrap();
            sending.send_layers(prefill.layout.layers()).unwrap();
            sending.finish(Vec::new()).unwrap();
            sending.end
        }
    };
    let ended = receiving.end.wait_until(Instant::now() + WAIT).unwrap().ended.end;
    drop(receiving.pages.wait_until(Instant::now() + WAIT).unwrap());
    // A room that was never begun at the decode side has nobody to end it.
    if !matches!(ended, End::Refused { why: RoomRefusal::Mismatch(Misfit::Layers { .. }), .. }) {
        let sent = end.wait_until(Instant::now() + WAIT).unwrap().end;
        assert_eq!(sent == End::Delivered, ended == End::Delivered, "{sent}");
    }
    (ended, ids)
}

#[test]
fn layers_that_nobody_brings_are_missed_unless_the_request_says_so() {
    let shm = shm();
    let prefills = Side::new(stages(1, 2, None), 4, NHD).open("prefill", &shm);
    let decodes = Side::new(stages(1, 1, None), 4, NHD).open("decode", &shm);
    let misfit = |misfit| End::Refused { by: Who::Here, why: RoomRefusal::Mismatch(misfit) };
    let mut room = 0;
    for pull in [false, true] {
        let mut end = |stage: usize, layers| {
            room += 1;
            let (end, pages) = hand_over_from(&prefills[stage], &decodes[0], layers, room, pull);
            if end == End::Delivered {
                let kept = prefills[stage].layout.layers();
                let mut layers = (0..LAYERS).cycle();
                decodes[0].each(0, 0, 16, &pages, |at, sent| {
                    let mut found = vec![0; sent.len()];
                    decodes[0].memory.read(at, &mut found).unwrap();
                    let is_brought = kept.contains(&layers.next().unwrap());
                    assert_eq!(found, if is_brought { sent } else { vec![0xee; found.len()] });
                });
            }
            end
        };
        // Only one of two stages was named.
        assert_eq!(end(0, None), misfit(Misfit::Gap));
        assert_eq!(end(1, None), misfit(Misfit::Gap));
        // It hands over by itself.
        assert_eq!(end(0, Some(0..2)), End::Delivered);
        assert_eq!(end(1, Some(2..4)), End::Delivered);
        // Too little, too much, and what there is not.
        for layers in [0..3, 0..1, 1..2, 2..4] {
            assert_eq!(end(0, Some(layers)), misfit(Misfit::Gap));
        }
        for layers in [2..2, 3..5, 4..7] {
            let (first, end_layer) = (layers.start, layers.end);
            assert_eq!(end(0, Some(layers)), misfit(Misfit::Layers { first, end: end_layer }));
        }
    }
}

#[test]
fn a_rank_named_at_the_peer_of_another_is_refused() {
    let (prefills, decodes) = sides();
    let mut decode = decodes;
    for (room, pull, waits) in [(1, false, true), (2, true, true), (3, false, false), (4, true, false)] {
        if !waits {
            // A node that has met nobody yet.
            decode = Side::new(Parallelism::tensor(1, LAYERS, Some(8)), 4, NHD).open("late", &shm());
        }
        let decode = &decode[0];
        let source = |rank: u32, node: &Node| {
            let (peer, mut up) = decode.node.handle().connect(node.address()).unwrap();
            if waits {
                up.wait_until(Instant::now() + WAIT).unwrap().unwrap();
            }
            Source { peer, rank, parts: Parts::All }
        };
        let sources = vec![source(0, &prefills[1].node), source(1, &prefills[0].node)];
        let pages = vec![decode.pages(0, 4)];
        let (tokens, skip_tokens, layers, deadline) = (16, 0, None, WAIT * 10);
        let request =
            GatherRequest { sources, room, use_count: 0, tokens, skip_tokens, layers, pages, deadline };
        let handle = decode.node.handle();
        let mut receiving = if pull { handle.fetch(request) } else { handle.receive(request) }.unwrap();
        let received = receiving.end.wait_until(Instant::now() + WAIT).unwrap();
        let is_named = |named, peer| {
            let why = RoomRefusal::Mismatch(Misfit::Rank { named, peer });
            received.ended.end == End::Refused { by: Who::Here, why }
        };
        assert!(is_named(0, 1) || is_named(1, 0), "{}", received.ended);
        assert!(received.ended.peer.is_some_and(|peer| peer.starts_with("prefill-")));
        assert_eq!(receiving.pages.wait_until(Instant::now() + WAIT).unwrap().len(), 4);
    }
}

/// Ranks whose progress the test makes, so that it can stop in the middle of a request.
struct Turned {
    prefills: Vec<Rank>,
    decodes: Vec<Rank>,
}

enum Ends {
    Sending(Sending),
    Serving(Serving),
}

impl Turned {
    fn open(prefill: u32, decode: u32, port: &PortConfig) -> Self {
        let open = |name: &str, tp| {
            let side = Side::new(Parallelism::tensor(tp, LAYERS, Some(8)), 4, NHD);
            side.open_with(name, port, |config| {
                config.progress = Progress::Caller;
                // So that everything takes many turns.
                config.turn_bytes = 1;
            })
        };
        Self { prefills: open("prefill", prefill), decodes: open("decode", decode) }
    }

    fn ranks(&mut self) -> impl Iterator<Item = &mut Rank> {
        self.prefills.iter_mut().chain(&mut self.decodes)
    }

    /// Turns all nodes until something is found.
    fn until<T>(&mut self, what: &str, mut look: impl FnMut(&mut Self) -> Option<T>) -> T {
        let begin = Instant::now();
        loop {
            if let Some(found) = look(self) {
                return found;
            }
            assert!(begin.elapsed() < WAIT, "{what}");
            for rank in self.ranks() {
                rank.node.progress();
            }
        }
    }

    fn until_told<T>(&mut self, what: &str, ticket: &mut Ticket<T>) -> T {
        self.until(what, |_| ticket.poll().unwrap())
    }

    /// Everything that was lent is back, and nothing is left of any room.
    fn until_home(&mut self) {
        self.until("something is not home", |all| {
            let is_over = |rank: &mut Rank| {
                let stats = rank.node.worker().unwrap().stats();
                (stats.rooms, stats.grants, rank.pools[0].stats().free) == (0, 0, PAGES)
            };
            all.ranks().all(is_over).then_some(())
        });
    }

    /// Opens the ends of a request on all ranks, and lets each of them come into the middle of it.
    fn begin(&mut self, pull: bool) -> (Vec<Ends>, Vec<Receiving>, Vec<Vec<u32>>) {
        let (room, tokens) = (5, 16);
        let [prefill, decode] = [&self.prefills, &self.decodes]
            .map(|ranks| Parallelism::tensor(ranks.len() as u32, LAYERS, Some(8)));
        let mut ends = Vec::new();
        for rank in &self.prefills {
            let ranks = prefill.destinations(&decode, rank.layout.rank(), room).unwrap();
            let set = rank.pages(0, 4);
            rank.each(0, 0, tokens, set.ids(), |at, bytes| rank.memory.write(at, &bytes).unwrap());
            let pages = vec![set.share()];
            let request = ScatterRequest { ranks, room, use_count: 0, tokens, pages, deadline: WAIT * 10 };
            let handle = rank.node.handle();
            ends.push(match pull {
                true => Ends::Serving(
                    handle.serve(ScatterServeRequest { request, aux: b"first".to_vec() }).unwrap(),
                ),
                false => {
                    let mut sending = handle.open(request).unwrap();
                    sending.send_layers(0..LAYERS / 2).unwrap();
                    Ends::Sending(sending)
                }
            });
        }
        let (mut receivings, mut ids) = (Vec::new(), Vec::new());
        for nth in 0..self.decodes.len() {
            let mut sources = Vec::new();
            for source in prefill.sources(&decode, nth as u32, room).unwrap() {
                let address = self.prefills[source.rank as usize].node.address().to_owned();
                let (peer, mut up) = self.decodes[nth].node.handle().connect(address).unwrap();
                self.until_told("no session", &mut up).unwrap();
                sources.push(source.at(peer));
            }
            let pages = self.decodes[nth].pages(0, 4);
            ids.push(pages.ids().to_vec());
            let (pages, skip_tokens, layers, deadline) = (vec![pages], 0, None, WAIT * 10);
            let request =
                GatherRequest { sources, room, use_count: 0, tokens, skip_tokens, layers, pages, deadline };
            let handle = self.decodes[nth].node.handle();
            receivings.push(if pull { handle.fetch(request) } else { handle.receive(request) }.unwrap());
        }
        let (grants, writers) = (self.decodes.len(), self.prefills.len());
        self.until("nothing moves", |all| {
            let mut moved = |rank: &mut Rank| {
                let stats = rank.node.worker().unwrap().stats();
                let bytes = |rail: &RailStats| if pull { rail.read_bytes } else { rail.written_bytes };
                (stats.grants, stats.rails.iter().map(bytes).sum::<u64>())
            };
            let prefills: Vec<_> = all.prefills.iter_mut().map(&mut moved).collect();
            let decodes: Vec<_> = all.decodes.iter_mut().map(&mut moved).collect();
            let is_begun = match pull {
                true => {
                    prefills.iter().all(|moved| moved.0 == grants) && decodes.iter().all(|moved| moved.1 > 0)
                }
                false => {
                    decodes.iter().all(|moved| moved.0 == writers)
                        && prefills.iter().all(|moved| moved.1 > 0)
                        && receivings.iter().all(|receiving| receiving.arrivals() > 0)
                }
            };
            is_begun.then_some(())
        });
        for receiving in &mut receivings {
            assert!(receiving.end.poll().unwrap().is_none(), "it is still in the middle");
        }
        (ends, receivings, ids)
    }
}

impl Ends {
    fn end(&mut self) -> &mut Ticket<Ended> {
        match self {
            Ends::Sending(sending) => &mut sending.end,
            Ends::Serving(serving) => &mut serving.end,
        }
    }

    fn cancel(&self) {
        match self {
            Ends::Sending(sending) => sending.cancel().unwrap(),
            Ends::Serving(serving) => serving.cancel().unwrap(),
        }
    }
}

/// Pushed and pulled, over each port.
fn every_way() -> [(bool, PortConfig); 4] {
    [(false, shm()), (false, PortConfig::Tcp(None)), (true, shm()), (true, PortConfig::Tcp(None))]
}

const CANCELLED: [End; 2] = [End::Cancelled { by: Who::Here }, End::Cancelled { by: Who::Peer }];

#[test]
fn a_decode_rank_that_cancels_does_not_disturb_the_others() {
    for (pull, port) in every_way() {
        let mut all = Turned::open(1, 2, &port);
        let (mut ends, mut receivings, ids) = all.begin(pull);
        receivings[1].cancel().unwrap();
        let received = all.until_told("the cancelled end", &mut receivings[1].end);
        assert_eq!(received.ended.end, CANCELLED[0]);
        assert!(ends[0].end().poll().unwrap().is_none(), "the other share goes on");
        if let Ends::Sending(sending) = &mut ends[0] {
            sending.send_layers(LAYERS / 2..LAYERS).unwrap();
            sending.finish(b"first".to_vec()).unwrap();
        }
        let received = all.until_told("the other end", &mut receivings[0].end);
        assert_eq!((received.ended.end, &received.aux[..]), (End::Delivered, &b"first"[..]));
        let rank = &all.decodes[0];
        rank.each(0, 0, 16, &ids[0], |at, expected| {
            let mut found = vec![0; expected.len()];
            rank.memory.read(at, &mut found).unwrap();
            assert_eq!(found, expected);
        });
        assert_eq!(all.until_told("the prefill end", ends[0].end()).end, CANCELLED[1]);
        drop((ends, receivings));
        all.until_home();
    }
}

#[test]
fn a_prefill_rank_that_cancels_ends_the_room_of_all() {
    for (pull, port) in every_way() {
        let mut all = Turned::open(2, 1, &port);
        let (mut ends, mut receivings, _) = all.begin(pull);
        ends[1].cancel();
        // What it says is on its way before anybody else goes on.
        all.prefills[1].node.progress();
        std::thread::sleep(Duration::from_millis(20));
        let received = all.until_told("the decode end", &mut receivings[0].end);
        assert_eq!(received.ended.end, CANCELLED[1]);
        assert!(received.ended.peer.is_some_and(|peer| &*peer == "prefill-1") && received.aux.is_empty());
        let told = ends.iter_mut().map(|end| all.until_told("a prefill end", end.end()).end);
        assert_eq!(told.collect::<Vec<_>>(), [CANCELLED[1].clone(), CANCELLED[0].clone()]);
        drop((ends, receivings));
        all.until_home();
    }
}
