//! The cache and the dock against simple models.

use std::collections::{BTreeMap, HashMap, HashSet};

use crossdock_kv::trace::{BLOCK_TOKENS, Request, Scale, Synthetic, SyntheticOptions};
use crossdock_memory::{PagePool, PoolOptions};
use crossdock_replay::{
    Arrival, ArriveError, Block, Dock, Lease, Next, Pace, PrefixCache, Waiting, watermarks,
};
use proptest::prelude::*;

/// What is done to a cache.
#[derive(Clone, Debug)]
enum Step {
    /// A request of this conversation comes, so many turns long, and gets its pages if there are enough.
    Come {
        conversation: u64,
        turns: usize,
        own_pages: u32,
    },
    /// The pages of a live request arrive.
    Arrive {
        which: usize,
    },
    /// A live request is over, whether its pages have arrived or not.
    Leave {
        which: usize,
    },
    MakeRoom {
        pages: u32,
    },
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        4 => (0u64..4, 0usize..6, 1u32..4)
            .prop_map(|(conversation, turns, own_pages)| Step::Come { conversation, turns, own_pages }),
        4 => (0usize..8).prop_map(|which| Step::Arrive { which }),
        3 => (0usize..8).prop_map(|which| Step::Leave { which }),
        1 => (1u32..40).prop_map(|pages| Step::MakeRoom { pages }),
    ];
    prop::collection::vec(step, 1..200)
}

/// Two conversations share their first two blocks, so that chains branch.
fn blocks(conversation: u64, turns: usize) -> Vec<Block> {
    let root = conversation / 2;
    let id = |turn: u64| if turn < 2 { root * 100 + turn } else { conversation * 1000 + turn };
    (0..turns as u64).map(|turn| Block { id: id(turn), pages: 1 + (turn % 3) as u32 }).collect()
}

struct Live {
    lease: Lease,
    blocks: Vec<Block>,
    /// What has not arrived.
    missing: Option<crossdock_memory::PageSet>,
    pages: u32,
}

impl Live {
    /// All pages that must stay this request's.
    fn ids(&self) -> Vec<u32> {
        let missing = self.missing.iter().flat_map(|set| set.ids().iter().copied());
        self.lease.ids().into_iter().chain(missing).collect()
    }
}

const POOL_PAGES: u32 = 48;

fn total(blocks: &[Block]) -> u32 {
    blocks.iter().map(|block| block.pages).sum()
}

/// No page of a live request is free or another's, whatever is idle can be evicted, and nothing else is lost.
fn check(pool: &PagePool, cache: &PrefixCache, live: &[Live]) {
    let mut owners: BTreeMap<u32, Vec<usize>> = BTreeMap::new();
    for (at, request) in live.iter().enumerate() {
        let ids = request.ids();
        assert_eq!(ids.len() as u32, request.pages, "a live request has lost pages");
        assert_eq!(ids.iter().collect::<HashSet<_>>().len(), ids.len(), "a request has a page twice");
        ids.into_iter().for_each(|id| owners.entry(id).or_default().push(at));
    }
    // A page with two owners is in the same place of a block that both have.
    for (page, owners) in &owners {
        for pair in owners.windows(2) {
            let place = |at: usize| {
                let request = &live[at];
                let place = request.ids().iter().position(|id| id == page).expect("it owns the page") as u32;
                let mut end = 0;
                request.blocks.iter().find_map(|block| {
                    end += block.pages;
                    (place < end).then(|| (block.id, end - place))
                })
            };
            assert!(place(pair[0]).is_some(), "an own page has two owners");
            assert_eq!(place(pair[0]), place(pair[1]), "page {page} is two things");
        }
    }
    let stats = pool.stats();
    assert_eq!(stats.free + owners.len() as u32 + cache.idle_pages(), POOL_PAGES, "{stats:?}");
}

/// Where ids name what they say, what is used is held.
fn check_chains(cache: &PrefixCache, live: &[Live]) {
    // Whatever is used is held, and what is before it, too.
    for request in live.iter().filter(|request| request.missing.is_none()) {
        assert!(request.blocks.iter().all(|block| cache.holds(block.id)));
    }
    for conversation in 0..4 {
        let held: Vec<bool> = blocks(conversation, 6).iter().map(|block| cache.holds(block.id)).collect();
        assert!(held.is_sorted_by(|a, b| a >= b), "a gap in what is held: {held:?}");
    }
}

proptest! {
    #[test]
    fn live_pages_stay_and_the_others_come_home(steps in steps()) {
        let pool = PagePool::new(POOL_PAGES, PoolOptions::default());
        let mut cache = PrefixCache::new(pool.clone());
        let mut live: Vec<Live> = Vec::new();
        for step in steps {
            match step {
                Step::Come { conversation, turns, own_pages } => {
                    let blocks = blocks(conversation, turns);
                    let expected = blocks.iter().take_while(|block| cache.holds(block.id)).count();
                    let lease = cache.lease(&blocks);
                    prop_assert_eq!(lease.held_pages(), total(&blocks[..expected]));
                    let pages = total(&blocks) + own_pages;
                    let missing = pages - lease.held_pages();
                    let before = live.iter().flat_map(Live::ids).collect::<HashSet<_>>();
                    let enough = pool.stats().free + cache.idle_pages() >= missing;
                    prop_assert_eq!(cache.make_room(missing), enough);
                    if enough {
                        let missing = pool.take(missing).unwrap();
                        prop_assert!(missing.ids().iter().all(|id| !before.contains(id)));
                        live.push(Live { lease, blocks, missing: Some(missing), pages });
                    } else {
                        cache.release(lease);
                    }
                }
                Step::Arrive { which } if !live.is_empty() => {
                    let at = which % live.len();
                    let request = &mut live[at];
                    if let Some(missing) = request.missing.take() {
                        cache.keep(&mut request.lease, missing);
                        let whole = request.lease.pages().unwrap();
                        prop_assert_eq!(whole.ids(), request.lease.ids());
                    }
                }
                Step::Leave { which } if !live.is_empty() => {
                    let request = live.swap_remove(which % live.len());
                    cache.release(request.lease);
                }
                Step::MakeRoom { pages } => drop(cache.make_room(pages)),
                _ => {}
            }
            check(&pool, &cache, &live);
            check_chains(&cache, &live);
        }
        live.into_iter().for_each(|request| cache.release(request.lease));
        cache.clear();
        prop_assert_eq!(pool.stats().free, POOL_PAGES);
    }
}

/// Blocks as a trace may name them that contradicts itself: one id, several lengths and places, even in one request.
fn hostile_blocks() -> impl Strategy<Value = Vec<Block>> {
    prop::collection::vec((0u64..5, 1u32..4).prop_map(|(id, pages)| Block { id, pages }), 0..6)
}

proptest! {
    #[test]
    fn ids_that_contradict_each_other_lose_no_page(
        requests in prop::collection::vec((hostile_blocks(), 1u32..4), 1..40),
        steps in prop::collection::vec((0usize..3, 0usize..8), 1..200),
    ) {
        let pool = PagePool::new(POOL_PAGES, PoolOptions::default());
        let mut cache = PrefixCache::new(pool.clone());
        let mut live: Vec<Live> = Vec::new();
        let mut requests = requests.iter().cycle();
        // The lengths with which ids are held.
        let mut lengths: HashMap<u64, u32> = HashMap::new();
        for (step, which) in steps {
            match (step, live.len()) {
                (0, _) => {
                    let (blocks, own_pages) = requests.next().unwrap();
                    let mut ids = HashSet::new();
                    let is_hit = |block: &&Block| ids.insert(block.id) && lengths.get(&block.id) == Some(&block.pages);
                    let hits: u32 = blocks.iter().take_while(is_hit).map(|block| block.pages).sum();
                    let lease = cache.lease(blocks);
                    prop_assert_eq!(lease.held_pages(), hits);
                    let pages = total(blocks) + own_pages;
                    if cache.make_room(pages - hits) {
                        let missing = Some(pool.take(pages - hits).unwrap());
                        live.push(Live { lease, blocks: blocks.clone(), missing, pages });
                    } else {
                        cache.release(lease);
                    }
                }
                (_, 0) => {}
                (1, count) => {
                    let request = &mut live[which % count];
                    if let Some(missing) = request.missing.take() {
                        cache.keep(&mut request.lease, missing);
                        let mut ids = HashSet::new();
                        for block in &request.blocks {
                            if !ids.insert(block.id) || *lengths.entry(block.id).or_insert(block.pages) != block.pages {
                                break;
                            }
                        }
                        prop_assert!(lengths.keys().all(|id| cache.holds(*id)));
                    }
                }
                (_, count) => cache.release(live.swap_remove(which % count).lease),
            }
            lengths.retain(|id, _| cache.holds(*id));
            check(&pool, &cache, &live);
        }
        live.into_iter().for_each(|request| cache.release(request.lease));
        cache.clear();
        prop_assert_eq!(pool.stats().free, POOL_PAGES);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    /// With room for everything, a dock finds exactly what an oracle finds that looks at one page after the other.
    #[test]
    fn hits_are_those_of_an_unlimited_cache(
        seed in any::<u64>(),
        scale in prop::sample::select(vec![1.0, 0.5, 0.3, 0.125, 0.07, 0.02]),
        page_tokens in prop::sample::select(vec![8u32, 16, 64]),
    ) {
        let requests = conversations(seed);
        let pace = Pace {
            lengths: Scale::new(scale).unwrap(),
            times: Scale::ONE,
            page_tokens,
            token_ns: 0,
        };
        let pages: u32 = requests.iter().map(|request| request.pages(page_tokens)).sum();
        let mut dock = Dock::new(PagePool::new(pages, PoolOptions::default()), 1);
        let mut seen = HashSet::new();
        let (mut arrivals, mut held) = (Vec::new(), 0);
        for request in &requests {
            let arrival = Arrival::of(request, &pace);
            let pages = arrival.pages(page_tokens);
            dock.arrive(waiting(0, pages, arrival.blocks.clone(), 1)).unwrap();
            let Some(Next::Admitted(mut admitted)) = dock.next(0) else { panic!("there is room") };
            prop_assert_eq!(admitted.lease.held_pages(), oracle(&mut seen, request, scale, page_tokens));
            held += admitted.lease.held_pages() * page_tokens;
            dock.keep(&mut admitted.lease, admitted.pages, 0);
            dock.release(admitted.lease, 0);
            arrivals.push(arrival);
        }
        let all: u64 = arrivals.iter().map(|arrival| u64::from(arrival.tokens)).sum();
        let share = Arrival::possible_hit_share(&arrivals, |_| true, page_tokens);
        prop_assert!((share - f64::from(held) / all as f64).abs() < 1e-12);
    }
}

/// How many first pages of a request were in a request before. A page is the prefix that ends with the first block of
/// the trace that covers all of the page's tokens, counted in tokens of the trace.
fn oracle(seen: &mut HashSet<(u64, u32)>, request: &Request, scale: f64, page_tokens: u32) -> u32 {
    let tokens = (f64::from(request.input_tokens) * scale).round().max(1.0) as u32;
    // With a hair of tolerance: 0.3 is no fraction of powers of two.
    let block = |page: u32| {
        let traced = f64::from((page + 1) * page_tokens) / scale / f64::from(BLOCK_TOKENS);
        ((traced - 1e-9).ceil() as usize).max(1) - 1
    };
    let is_shared = |page: &u32| {
        let is_whole = (block(*page) as u32 + 1) * BLOCK_TOKENS <= request.input_tokens;
        is_whole && (page + 1) * page_tokens < tokens && block(*page) < request.prefix_ids.len()
    };
    let shared = (0..).take_while(is_shared).count() as u32;
    // The pages of a block are shared together: without its last one a block is none.
    let whole = (0..shared).filter(|page| block(*page) != block(shared));
    let pages: Vec<(u64, u32)> = whole.map(|page| (request.prefix_ids[block(page)], page)).collect();
    let hits = pages.iter().take_while(|page| seen.contains(*page)).count() as u32;
    seen.extend(pages);
    hits
}

/// Requests that go on where earlier ones have ended.
fn conversations(seed: u64) -> Vec<Request> {
    let options = SyntheticOptions { seed, shared_blocks: 3, ..SyntheticOptions::default() };
    let mut requests: Vec<Request> = Synthetic::new(options).unwrap().take(20).collect();
    for at in (0..20).filter(|at| at % 3 > 0) {
        let before = requests[at - at % 3].clone();
        let whole = (before.input_tokens / BLOCK_TOKENS) as usize;
        let request = &mut requests[at];
        let kept = whole.min(request.prefix_ids.len());
        request.prefix_ids[..kept].copy_from_slice(&before.prefix_ids[..kept]);
    }
    requests
}

fn waiting(tag: u64, pages: u32, blocks: Vec<Block>, until_ns: u64) -> Waiting<u64> {
    Waiting { tag, pages, blocks, at_ns: 0, until_ns }
}

#[test]
fn requests_wait_in_order_and_by_their_deadlines() {
    let mut dock = Dock::new(PagePool::new(10, PoolOptions::default()), 3);
    for (tag, pages, until_ns) in [(1, 8, 100), (2, 5, 50), (3, 1, 200)] {
        dock.arrive(waiting(tag, pages, Vec::new(), until_ns)).unwrap();
    }
    assert_eq!(dock.arrive(waiting(4, 1, Vec::new(), 9)), Err(ArriveError::Full { limit: 3 }));
    assert_eq!(
        dock.arrive(waiting(4, 11, Vec::new(), 9)),
        Err(ArriveError::TooLong { pages: 11, pool_pages: 10 })
    );
    let Some(Next::Admitted(first)) = dock.next(7) else { panic!("there is room") };
    assert_eq!((first.tag, first.waited_ns, first.pages.len()), (1, 7, 8));
    // There would be room for the third.
    assert!(dock.next(8).is_none());
    assert_eq!(dock.wake_ns(), Some(50));
    assert!(matches!(dock.next(50), Some(Next::Expired { tag: 2, wanted: 5, free: 2 })));
    let Some(Next::Admitted(third)) = dock.next(50) else { panic!("there is room") };
    assert_eq!(third.tag, 3);
    assert!(dock.next(50).is_none());
    drop((first.pages, third.pages));
    dock.release(first.lease, 50);
    dock.release(third.lease, 50);
    let stats = dock.stats();
    assert_eq!((stats.admitted, stats.expired, stats.refused), (2, 1, 2));
    assert_eq!((stats.peak_waiting, stats.peak_pages, stats.lowest_free), (3, 9, 1));
}

#[test]
fn a_request_that_is_decoded_has_its_pages_until_it_ends() {
    let mut dock = Dock::new(PagePool::new(10, watermarks(10)), 3);
    let shared = vec![Block { id: 7, pages: 4 }];
    dock.arrive(waiting(1, 6, shared.clone(), 100)).unwrap();
    let Some(Next::Admitted(mut first)) = dock.next(0) else { panic!("there is room") };
    dock.keep(&mut first.lease, first.pages, 0);
    dock.release_at(first.lease, 20);
    // It shares what is held, although nothing of that may be evicted.
    dock.arrive(waiting(2, 9, shared.clone(), 100)).unwrap();
    dock.arrive(waiting(3, 10, Vec::new(), 100)).unwrap();
    assert!(dock.next(19).is_none());
    assert_eq!(dock.wake_ns(), Some(20));
    let Some(Next::Admitted(mut second)) = dock.next(20) else { panic!("there is room") };
    assert_eq!((second.tag, second.lease.held_pages(), second.pages.len()), (2, 4, 5));
    dock.keep(&mut second.lease, second.pages, 21);
    dock.release(second.lease, 21);
    // Nobody uses the block any more, and the third needs its pages.
    assert!(dock.cache().holds(7));
    let Some(Next::Admitted(third)) = dock.next(21) else { panic!("there is room") };
    assert!(!dock.cache().holds(7));
    assert_eq!(dock.stats().evicted_pages, 4);
    drop(third.pages);
    dock.release(third.lease, 21);
}

#[test]
fn pages_that_the_node_still_reads_are_not_evicted() {
    let pool = PagePool::new(4, PoolOptions::default());
    let mut cache = PrefixCache::new(pool.clone());
    let mut lease = cache.lease(&[Block { id: 1, pages: 3 }]);
    cache.keep(&mut lease, pool.take(3).unwrap());
    let sent = lease.pages().unwrap();
    cache.release(lease);
    assert!(!cache.make_room(4));
    assert!(cache.holds(1));
    drop(sent);
    assert!(cache.make_room(4));
    assert!(!cache.holds(1));
}

#[test]
fn under_pressure_the_oldest_make_room_until_it_is_over() {
    let pool = PagePool::new(100, watermarks(100));
    let mut dock: Dock<u64> = Dock::new(pool.clone(), 1);
    for id in 0..100 {
        dock.arrive(waiting(id, 2, vec![Block { id, pages: 1 }], 1000)).unwrap();
        let Some(Next::Admitted(mut admitted)) = dock.next(id * 10) else { panic!("there is room") };
        dock.keep(&mut admitted.lease, admitted.pages, id * 10);
        dock.release(admitted.lease, id * 10);
        assert!(!pool.stats().under_pressure, "idle pages are kept under pressure");
    }
    assert!(pool.stats().free >= 5);
    assert!(!dock.cache().holds(0) && dock.cache().holds(99));
    assert_eq!(dock.stats().peak_pages, 2);
    dock.clear();
    assert_eq!(pool.stats().free, 100);
}

#[test]
fn pressure_lasts_until_what_ends_it() {
    let mut dock: Dock<u64> = Dock::new(PagePool::new(100, watermarks(100)), 1);
    let mut admit = |pages: u32, now_ns| {
        dock.arrive(waiting(0, pages, Vec::new(), 1_000)).unwrap();
        let Some(Next::Admitted(mut admitted)) = dock.next(now_ns) else { panic!("there is room") };
        dock.keep(&mut admitted.lease, admitted.pages, now_ns);
        admitted.lease
    };
    let (first, second) = (admit(97, 10), admit(1, 20));
    // Nobody asks what happens next while all that there is moves.
    dock.release(first, 70);
    assert_eq!(dock.stats().pressure_ns, 60);
    // Threads may tell the time in another order than they come.
    dock.release(second, 65);
    assert!(dock.next(500).is_none());
    assert_eq!(dock.stats().pressure_ns, 60);
}

#[test]
fn who_can_take_nothing_hears_of_what_has_expired() {
    let mut dock = Dock::new(PagePool::new(10, PoolOptions::default()), 3);
    for (tag, until_ns) in [(1, 100), (2, 50)] {
        dock.arrive(waiting(tag, 4, Vec::new(), until_ns)).unwrap();
    }
    assert!(dock.expired(49).is_none(), "there is room, but nobody to take it");
    assert!(matches!(dock.expired(50), Some(Next::Expired { tag: 2, wanted: 4, free: 10 })));
    assert!(dock.expired(50).is_none());
    assert_eq!((dock.waiting(), dock.stats().admitted, dock.stats().expired), (1, 0, 1));
}
