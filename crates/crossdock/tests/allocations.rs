//! Between the opening of a room and its end, two whole nodes allocate nothing.
//!
//! A room allocates when it is opened and when it ends: its request, its page list, its plan, its control messages. All
//! else is the data path: taking what is sent, planning chunks, striping, posting, polling, counting immediates, asking
//! the network, arming for a sleep. So two things are asserted, counting on every thread of the process:
//!
//! 1. A turn in which a node neither is asked for a room nor says or hears a control message allocates nothing, be it
//!    that it moves a room's bytes or that it sums them; and neither does the user's sending of a layer or a chunk.
//!    (But for the one turn in which a room's sums begin.)
//! 2. A whole room, its opening and its end included, allocates about as often with 4,096 tokens as with 64, and about
//!    as often in one piece as in 84: nothing is allocated for a page, an op, a layer or a chunk. (About, because a
//!    frame grows by doubling, and a tree takes a node now and then.)
//!
//! The nodes progress by this thread's calls, so that each turn can be looked at. `Progress::Thread` is a loop of the
//! same turns.

use std::alloc::{GlobalAlloc, Layout, System};
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossdock::{
    Authentication, CacheKind, CacheLayout, Config, Counters, Dtype, End, LayoutOptions, Memory, Node,
    PagePool, PageSet, Peer, Placement, PortConfig, Progress, ReceiveRequest, Receiving, SendRequest,
    Sending, ServeRequest, Serving, ShmOptions, Turn, Verify,
};
use crossdock_shm::process_memory::PeerProcess;

/// One test, because every thread's allocations count.
#[test]
fn the_data_path_allocates_nothing() {
    let shm = |copy_threads| PortConfig::Shm(ShmOptions { copy_threads, ..ShmOptions::default() });
    let tcp = || PortConfig::Tcp(None);
    for (name, port, lanes, extra) in [
        ("shm", shm(1), 1, Extra::None),
        ("shm, two copy threads", shm(2), 1, Extra::None),
        ("shm, three lanes", shm(1), 3, Extra::None),
        ("shm, private memory", shm(1), 1, Extra::PrivateMemory),
        ("shm, checksums", shm(1), 1, Extra::Checksums),
        ("tcp", tcp(), 1, Extra::None),
        ("tcp, three lanes", tcp(), 3, Extra::None),
        ("tcp, checksums", tcp(), 1, Extra::Checksums),
    ] {
        if extra == Extra::PrivateMemory
            && let Err(why) = PeerProcess::new(rustix::process::getpid()).probe()
        {
            eprintln!("skipped: {name}: {why}");
            continue;
        }
        let caches =
            [((1, 1), scattered as Pages), ((3, 4), scattered), ((4, 4), scattered), ((1, 1), in_runs)];
        for (page_tokens, pages) in caches {
            let mut pair = Pair::open(&port, lanes, extra, page_tokens, pages);
            let mut move_all_ways = |tokens| {
                let [whole, layers, parts] = [Chunks::Whole, Chunks::Layers, Chunks::Parts];
                [
                    pair.push(tokens, whole),
                    pair.push(tokens, layers),
                    pair.push(tokens, parts),
                    pair.pull(tokens),
                ]
            };
            // What grows with the first rooms has grown then.
            move_all_ways(SHORT);
            let (short, long) = (move_all_ways(SHORT), move_all_ways(LONG));
            println!(
                "{name}, pages of {page_tokens:?}: {short:?} allocations for short rooms, {long:?} for long ones; \
                 of {} turns {} only moved bytes, {} only summed them",
                pair.prefill.turns, pair.prefill.moving_turns, pair.prefill.summing_turns
            );
            for side in [&pair.prefill, &pair.decode] {
                let least = if extra == Extra::Checksums { SUMMING_TURNS } else { 0 };
                assert!(side.summing_turns >= least, "{name}: {} turns of {least}", side.summing_turns);
            }
            let all = || short.iter().chain(&long);
            assert!(all().max().unwrap() - all().min().unwrap() <= 32, "{name}: {short:?}, {long:?}");
        }
    }
    assert_ne!(counted(|| drop(std::hint::black_box(Box::new(7)))).1, 0, "the count counts");
}

const LAYERS: u32 = 4;
const SHORT: u32 = 64;
/// Fewer where each access is checked: a test that runs for a minute is warned of, by a thread that allocates.
const LONG: u32 = if cfg!(tsan) { 1024 } else { 4096 };
/// Rooms that move at the same time.
const ROOMS: u32 = 2;
const TOKEN: u64 = 1152;
/// Turns that do nothing but sum, while the long rooms of one test move in four ways; the first and the last turn of each
/// may do more. A room sums 2 MiB a turn.
const SUMMING_TURNS: u64 = 4 * (LONG as u64 * LAYERS as u64 * TOKEN / (2 << 20)).saturating_sub(3);
const WAIT: Duration = Duration::from_secs(60);

/// What is not as usual.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Extra {
    None,
    /// Memory that a peer cannot map, so that shm asks the kernel for each copy.
    PrivateMemory,
    Checksums,
}

/// In what pieces a room is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Chunks {
    Whole,
    Layers,
    /// Layer by layer, some tokens after others; pages are cut in two.
    Parts,
}

impl Chunks {
    fn of(self, tokens: u32) -> Vec<(Range<u32>, Range<u32>)> {
        let layers = || (0..LAYERS).map(|layer| layer..layer + 1);
        match self {
            Self::Whole => vec![(0..LAYERS, 0..tokens)],
            Self::Layers => layers().map(|layers| (layers, 0..tokens)).collect(),
            Self::Parts => {
                // The first half at once, so that it has as many lengths of pieces as the whole.
                let mut ends: Vec<u32> = (20..40).map(|nth| tokens * nth / 40).collect();
                ends.push(tokens);
                let starts = std::iter::once(0).chain(ends.iter().copied());
                let tokens = starts.zip(ends.iter().copied()).map(|(start, end)| start..end);
                tokens.flat_map(|tokens| layers().map(move |layers| (layers, tokens.clone()))).collect()
            }
        }
    }
}

/// Where the pages of a room are, by their place in its list.
type Pages = fn(u32) -> u32;

/// None beside its neighbour.
fn scattered(at: u32) -> u32 {
    at.wrapping_mul(0x9e37_79b1) % (2 * ROOMS * LONG)
}

/// In runs of 1, 2, 3, … 60 neighbours and again, so that pieces are of more lengths than a plan counts at once.
fn in_runs(at: u32) -> u32 {
    const ROUND: u32 = 60 * 61 / 2;
    let gaps = (1..60).take_while(|run| run * (run + 1) / 2 <= at % ROUND).count() as u32;
    at + at / ROUND * 60 + gaps
}

struct Pair {
    prefill: Side,
    decode: Side,
    peer: Peer,
    extra: Extra,
    rooms: u64,
}

impl Pair {
    fn open(port: &PortConfig, lanes: u8, extra: Extra, page_tokens: (u32, u32), pages: Pages) -> Self {
        let mut prefill = Side::open("prefill", page_tokens.0, port, lanes, extra, pages);
        let mut decode = Side::open("decode", page_tokens.1, port, lanes, extra, pages);
        let (peer, mut up) = decode.node.handle().connect(prefill.node.address()).unwrap();
        let begin = Instant::now();
        while up.poll().unwrap().map(|up| up.expect("a session with the other node")).is_none() {
            assert!(begin.elapsed() < WAIT, "no session");
            prefill.node.progress();
            decode.node.progress();
        }
        for (token, room) in (0..LONG).flat_map(|token| (0..ROOMS).map(move |room| (token, room))) {
            for layer in 0..LAYERS {
                let word = content(room, layer, token).to_le_bytes();
                let at = prefill.place(room, layer, token);
                prefill.memory.write(at, &word).unwrap();
                prefill.memory.write(at + TOKEN as usize - 8, &word).unwrap();
            }
        }
        let mut pair = Self { prefill, decode, peer, extra, rooms: 0 };
        pair.turn_until(|pair, turns| {
            // The session may still settle, and no room is open: what this allocates is nobody's data path.
            (pair.prefill.asked, pair.decode.asked) = (true, true);
            turns > 100 && hearts_sleep()
        });
        pair
    }

    /// Pushes some rooms at once. Says how often both nodes allocated.
    fn push(&mut self, tokens: u32, chunks: Chunks) -> u64 {
        self.sums();
        let pieces = chunks.of(tokens);
        let granted = self.prefill.counters().messages_in + u64::from(ROOMS);
        let mut rooms: Vec<(Receiving, Sending)> = (0..ROOMS)
            .map(|nth| {
                let (receiving, room) = self.decode(nth, tokens, false);
                let pages = self.prefill.take(nth, tokens).share();
                let request = SendRequest { room, use_count: 0, tokens, pages, deadline: WAIT };
                let sending = self.prefill.ask(|node| node.handle().open(request).unwrap());
                (receiving, sending)
            })
            .collect();
        self.turn_until(|pair, _| pair.prefill.counters().messages_in == granted);
        for (nth, (layers, tokens)) in pieces.into_iter().enumerate() {
            for (_, sending) in &mut rooms {
                let (sent, allocated) = counted(|| sending.send(layers.clone(), tokens.clone()));
                sent.unwrap();
                assert_eq!(allocated, 0, "by sending layers {layers:?}, tokens {tokens:?}");
            }
            // Much is sent before the loop looks, and then a little at a time.
            (0..if nth < 70 { 0 } else { nth % 4 }).for_each(|_| self.turn());
        }
        // Not finished yet: all bytes land by data turns alone.
        self.turn_until(|pair, turns| turns % 64 == 0 && pair.has_landed(tokens));
        for (_, sending) in &mut rooms {
            let aux = Vec::new();
            self.prefill.ask(|_| sending.finish(aux).unwrap());
        }
        let (mut receiving, mut sending): (Vec<_>, Vec<_>) = rooms.into_iter().unzip();
        self.turn_until(|_, _| {
            sending.retain_mut(|room| {
                room.end.poll().unwrap().inspect(|ended| assert_eq!(ended.end, End::Delivered)).is_none()
            });
            sending.is_empty()
        });
        self.end(&mut receiving, tokens)
    }

    /// Pulls some rooms at once. Says how often both nodes allocated.
    fn pull(&mut self, tokens: u32) -> u64 {
        self.sums();
        let (mut fetching, mut serving): (Vec<Receiving>, Vec<Serving>) = (0..ROOMS)
            .map(|nth| {
                let (fetching, room) = self.decode(nth, tokens, true);
                let (pages, aux) = (self.prefill.take(nth, tokens).share(), Vec::new());
                let request = ServeRequest { room, use_count: 0, tokens, pages, aux, deadline: WAIT };
                (fetching, self.prefill.ask(|node| node.handle().serve(request).unwrap()))
            })
            .unzip();
        self.turn_until(|_, _| {
            serving.retain_mut(|room| {
                room.end.poll().unwrap().inspect(|ended| assert_eq!(ended.end, End::Delivered)).is_none()
            });
            serving.is_empty()
        });
        self.end(&mut fetching, tokens)
    }

    /// The rooms to come are summed on both sides.
    fn sums(&mut self) {
        let rooms = if self.extra == Extra::Checksums { ROOMS } else { 0 };
        (self.prefill.begin_sums, self.decode.begin_sums) = (rooms, rooms);
    }

    /// The decode end of a room, whose pages are wiped first.
    fn decode(&mut self, nth: u32, tokens: u32, pull: bool) -> (Receiving, u64) {
        self.rooms += 1;
        let (room, pages) = (self.rooms, self.decode.take(nth, tokens));
        let (token_bytes, page_bytes) = (TOKEN as usize, self.decode.layout.page_bytes() as usize);
        for layer in 0..LAYERS {
            for first in (0..tokens).step_by(page_bytes / token_bytes) {
                self.decode.memory.fill(self.decode.place(nth, layer, first), page_bytes, 0).unwrap();
            }
        }
        let peer = self.peer;
        let request =
            ReceiveRequest { peer, room, use_count: 0, tokens, skip_tokens: 0, pages, deadline: WAIT };
        let receiving = self.decode.ask(|node| match pull {
            false => node.handle().receive(request).unwrap(),
            true => node.handle().fetch(request).unwrap(),
        });
        (receiving, room)
    }

    /// Waits until the rooms have ended and all is still.
    fn end(&mut self, rooms: &mut Vec<Receiving>, tokens: u32) -> u64 {
        self.turn_until(|_, _| {
            rooms.retain_mut(|room| match room.end.poll().unwrap() {
                Some(received) => {
                    assert_eq!(received.ended.end, End::Delivered);
                    drop(room.pages.poll().unwrap().expect("pages come home with the end"));
                    false
                }
                None => true,
            });
            rooms.is_empty()
        });
        self.turn_until(|pair, _| {
            [&mut pair.prefill, &mut pair.decode]
                .into_iter()
                .all(|side| side.node.worker().unwrap().stats().rooms == 0 && side.pool.stats().owned == 0)
        });
        assert!(self.has_landed(tokens));
        std::mem::take(&mut self.prefill.allocated) + std::mem::take(&mut self.decode.allocated)
    }

    fn has_landed(&self, tokens: u32) -> bool {
        let mut word = [0; 8];
        (0..ROOMS).all(|room| {
            (0..LAYERS).all(|layer| {
                (0..tokens).all(|token| {
                    let (at, expected) = (self.decode.place(room, layer, token), content(room, layer, token));
                    [at, at + TOKEN as usize - 8].into_iter().all(|at| {
                        self.decode.memory.read(at, &mut word).unwrap();
                        u64::from_le_bytes(word) == expected
                    })
                })
            })
        })
    }

    fn turn(&mut self) {
        self.prefill.turn();
        self.decode.turn();
    }

    fn turn_until(&mut self, mut reached: impl FnMut(&mut Self, u64) -> bool) {
        let begin = Instant::now();
        let mut turns = 0;
        while !reached(self, turns) {
            self.turn();
            turns += 1;
            assert!(begin.elapsed() < WAIT, "nothing more happens");
        }
    }
}

fn content(room: u32, layer: u32, token: u32) -> u64 {
    u64::from(room + 1) << 40 | u64::from(layer) << 32 | u64::from(token)
}

struct Side {
    node: Node,
    layout: CacheLayout,
    memory: Memory,
    pool: PagePool,
    pages: Pages,
    /// A room was opened or finished since the last turn.
    asked: bool,
    /// Rooms whose sums are still to begin. That may be in a turn without a message: only the reader sees its last read,
    /// and rooms wait for each other's shares.
    begin_sums: u32,
    /// How often opening and ending rooms allocated, on this thread and on the progress loop.
    allocated: u64,
    turns: u64,
    moving_turns: u64,
    /// Turns in which nothing moved and yet something was done.
    summing_turns: u64,
}

impl Side {
    fn open(name: &str, page_tokens: u32, port: &PortConfig, lanes: u8, extra: Extra, pages: Pages) -> Self {
        let layout = CacheLayout::new(LayoutOptions {
            model: "tiny".into(),
            model_layers: LAYERS,
            layers: 0..LAYERS,
            kind: CacheKind::Mla { latent_bytes: 1024, rope_bytes: 128 },
            dtype: Dtype::Bf16,
            page_tokens,
            pages: 2 * ROOMS * LONG,
            placement: Placement::LayerMajor { region: 0 },
        })
        .unwrap();
        let memory = match extra {
            Extra::PrivateMemory => vec![private(layout.bytes_needed(0) as usize)],
            Extra::None | Extra::Checksums => crossdock::allocate(&layout).unwrap().0,
        };
        let mut config = Config::new(name, layout.clone(), memory.clone(), Authentication::Off);
        if extra == Extra::Checksums {
            config.verify = Verify::All;
        }
        config.ports = vec![port.clone()];
        config.lanes_per_rail = lanes;
        config.progress = Progress::Caller;
        // So that the thread of the heartbeats, which is no part of the data path, stays asleep.
        config.heartbeat = Duration::from_secs(3600);
        let (node, memory) = (Node::open(config).unwrap(), memory[0].clone());
        let pool = PagePool::external(layout.pages());
        Self {
            node,
            layout,
            memory,
            pool,
            pages,
            asked: false,
            begin_sums: 0,
            allocated: 0,
            turns: 0,
            moving_turns: 0,
            summing_turns: 0,
        }
    }

    fn take(&self, room: u32, tokens: u32) -> PageSet {
        let ids: Vec<u32> = (0..self.layout.pages_for(tokens)).map(|at| self.page(room, at)).collect();
        self.pool.adopt(&ids).unwrap()
    }

    fn page(&self, room: u32, at: u32) -> u32 {
        (self.pages)(room * self.layout.pages_for(LONG) + at)
    }

    fn place(&self, room: u32, layer: u32, token: u32) -> usize {
        let page = self.page(room, token / self.layout.page_tokens());
        let in_page = u64::from(token % self.layout.page_tokens()) * TOKEN;
        (self.layout.page_layout(layer).unwrap().page_offset(page).unwrap() + in_page) as usize
    }

    /// Opens or finishes a room.
    fn ask<T>(&mut self, ask: impl FnOnce(&Node) -> T) -> T {
        let (asked, allocated) = counted(|| ask(&self.node));
        self.asked = true;
        self.allocated += allocated;
        asked
    }

    fn turn(&mut self) {
        let before = self.traffic();
        let (turn, allocated) = counted(|| {
            let turn = self.node.progress();
            self.node.park(Duration::ZERO).unwrap();
            turn
        });
        let (messages, moved) = self.traffic();
        let opens_or_ends = std::mem::take(&mut self.asked) || messages != before.0;
        if !opens_or_ends && allocated > 0 && self.begin_sums > 0 {
            self.begin_sums -= 1;
        } else {
            assert!(opens_or_ends || allocated == 0, "{allocated} allocations in a turn of data alone");
        }
        self.allocated += allocated;
        self.turns += 1;
        self.moving_turns += u64::from(!opens_or_ends && moved != before.1);
        self.summing_turns += u64::from(!opens_or_ends && moved == before.1 && turn == Turn::Active);
    }

    fn counters(&mut self) -> Counters {
        self.node.worker().unwrap().engine().counters()
    }

    /// Control messages; and bytes posted and immediates that came.
    fn traffic(&mut self) -> (u64, u64) {
        let counters = self.counters();
        let rails = self.node.worker().unwrap().engine().rail_stats();
        let moved = rails.iter().map(|rail| rail.written_bytes + rail.read_bytes + rail.arrivals).sum();
        (counters.messages_in + counters.messages_out, moved)
    }
}

/// Memory of the program's own, of which no peer has a descriptor.
// A suppression of tests/lsan-suppressions.txt names it.
#[inline(never)]
fn private(bytes: usize) -> Memory {
    let base: *mut [u8] = Box::into_raw(vec![0; bytes].into_boxed_slice());
    // SAFETY: the box is never taken back, so its bytes stay as long as the process, and nobody else knows them.
    unsafe { Memory::from_raw(base.cast(), bytes) }.unwrap()
}

/// Whether the threads of both nodes' heartbeats have taken the session up, for which they were woken, and allocate.
fn hearts_sleep() -> bool {
    let threads = std::fs::read_dir("/proc/self/task").unwrap();
    let stats = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("stat")).ok());
    let hearts: Vec<String> = stats.filter(|stat| stat.contains("(crossdock-heart)")).collect();
    // The state is the letter after the name.
    hearts.len() == 2 && hearts.iter().all(|stat| stat.contains(") S "))
}

fn counted<T>(work: impl FnOnce() -> T) -> (T, u64) {
    let before = ALLOCATIONS.load(Ordering::SeqCst);
    let done = work();
    (done, ALLOCATIONS.load(Ordering::SeqCst) - before)
}

/// Of every thread.
static ALLOCATIONS: AtomicU64 = AtomicU64::new(0);

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: everything is handed to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        ALLOCATIONS.fetch_add(1, Ordering::SeqCst);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: the caller keeps the contract of `dealloc`, and `at` came from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}
