//! What a call costs through the C ABI, beside the same call of the Rust API, in turn. The difference is what handles, sized
//! structures and errors by status cost; the bar is 200 ns. One process, nobody on the other side: rooms that are opened wait
//! for a peer and are cancelled outside of the measured time; the caller makes the progress, so that no other thread is woken
//! inside of it.
//!
//!     cargo bench -p crossdock-ffi --bench calls

use std::hint::black_box;
use std::ptr;
use std::time::{Duration, Instant};

use bytemuck::Zeroable;
use crossdock::{
    Authentication, CacheLayout, Config, Handle, Node, PagePool, Peer, Progress, ReceiveRequest, Receiving,
    SendRequest, Sending,
};
use crossdock_ffi::*;

const PAGES: u32 = 8_192;
const LAYERS: u32 = 61;
const ROUNDS: usize = 31;

fn main() {
    let layout = CacheLayout::deepseek_r1(1, 2 * PAGES).expect("a layout");
    let mut rust = Rust::open(&layout);
    let c = C::open();
    let ids: Vec<u32> = (0..2 * PAGES).collect();
    println!("{:<36}{:>10}{:>10}{:>12}", "ns a call, medians", "Rust", "C", "C beside it");
    let row = |name: &str, one: u64, other: u64| {
        println!("{name:<36}{one:>10}{other:>10}{:>12}", other as i64 - one as i64);
    };

    let mut waiting = rust.receive(1, &ids[..1]);
    let held = c.receive(1, &ids[..1]);
    let (one, other) = medians(
        10_000,
        || drop(black_box(waiting.end.poll())),
        || {
            // SAFETY: NULL is allowed.
            black_box(unsafe { crossdock_room_poll(held, ptr::null_mut()) });
        },
    );
    row("poll a room that waits", one, other);

    let (mut events, mut count) = ([crossdock_event { kind: 0, reserved: 0, handle: 0, user_data: 0 }; 4], 0);
    let (one, other) = medians(
        10_000,
        || (),
        || {
            // SAFETY: so many can be written.
            black_box(unsafe { crossdock_node_poll(c.node, events.as_mut_ptr(), 4, &raw mut count) });
        },
    );
    row("poll a node that has no events", one, other);
    crossdock_room_close(held);
    waiting.cancel().expect("taken");
    drop(waiting);
    rust.settle();
    c.settle();

    let (mut rust_ns, mut c_ns) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS * 8 {
        let mut sending = rust.send(1, &ids[..1]);
        let handle = c.send(1, &ids[..1]);
        let layers = 0..LAYERS;
        rust_ns.push(timed(|| layers.clone().for_each(|at| sending.send_layers(at..at + 1).expect("taken"))));
        c_ns.push(timed(|| {
            layers.for_each(|at| assert_eq!(crossdock_room_send_layers(handle, at, 1), CROSSDOCK_OK));
        }));
        sending.cancel().expect("taken");
        crossdock_room_close(handle);
        drop(sending);
        rust.settle();
        c.settle();
    }
    let each = |times: &mut Vec<u64>| median(times) / u64::from(LAYERS);
    row("send a layer", each(&mut rust_ns), each(&mut c_ns));

    for pages in [1, 64, PAGES] {
        // Each room has pages of its own. They are opened one after the other and ended outside of the measured time; few at
        // once, so that memory is had as a program has it that closes what it opens.
        let rooms = (2 * PAGES / pages).min(4);
        let of = |nth: u32| &ids[(nth * pages) as usize..][..pages as usize];
        let (mut ones, mut others): (Vec<Receiving>, Vec<u64>) = Default::default();
        let (mut rust_ns, mut c_ns) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS * 32 {
            rust_ns.push(timed(|| (0..rooms).for_each(|nth| ones.push(rust.receive(nth.into(), of(nth))))));
            c_ns.push(timed(|| (0..rooms).for_each(|nth| others.push(c.receive(nth.into(), of(nth))))));
            for receiving in ones.drain(..) {
                receiving.cancel().expect("taken");
            }
            for handle in others.drain(..) {
                crossdock_room_close(handle);
            }
            rust.settle();
            c.settle();
        }
        let each = |times: &mut Vec<u64>| median(times) / u64::from(rooms);
        row(&format!("receive {pages} pages"), each(&mut rust_ns), each(&mut c_ns));
        let (mut ones, mut others): (Vec<Sending>, Vec<u64>) = Default::default();
        let (mut rust_ns, mut c_ns) = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS * 32 {
            rust_ns.push(timed(|| (0..rooms).for_each(|nth| ones.push(rust.send(nth.into(), of(nth))))));
            c_ns.push(timed(|| (0..rooms).for_each(|nth| others.push(c.send(nth.into(), of(nth))))));
            for sending in ones.drain(..) {
                sending.cancel().expect("taken");
            }
            for handle in others.drain(..) {
                crossdock_room_close(handle);
            }
            rust.settle();
            c.settle();
        }
        row(&format!("send {pages} pages"), each(&mut rust_ns), each(&mut c_ns));
    }
    crossdock_node_close(c.node);
}

/// Of both, in turn, so many calls a round.
fn medians(calls: u32, mut one: impl FnMut(), mut other: impl FnMut()) -> (u64, u64) {
    let (mut ones, mut others) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        ones.push(timed(|| (0..calls).for_each(|_| one())) / u64::from(calls));
        others.push(timed(|| (0..calls).for_each(|_| other())) / u64::from(calls));
    }
    (median(&mut ones), median(&mut others))
}

fn timed(work: impl FnOnce()) -> u64 {
    let begun = Instant::now();
    work();
    begun.elapsed().as_nanos() as u64
}

fn median(times: &mut [u64]) -> u64 {
    times.sort_unstable();
    times[times.len() / 2]
}

struct Rust {
    pool: PagePool,
    node: Node,
}

impl Rust {
    fn open(layout: &CacheLayout) -> Rust {
        let (memory, _) = crossdock::allocate(layout).expect("memory");
        let mut config = Config::new("rust", layout.clone(), memory, Authentication::Off);
        config.progress = Progress::Caller;
        let node = Node::open(config).expect("a node");
        Rust { pool: PagePool::external(2 * PAGES), node }
    }

    fn handle(&self) -> &Handle {
        self.node.handle()
    }

    fn receive(&self, room: u64, ids: &[u32]) -> Receiving {
        let request = ReceiveRequest {
            peer: Peer::node(7),
            room,
            use_count: 0,
            tokens: ids.len() as u32,
            skip_tokens: 0,
            pages: self.pool.adopt(ids).expect("free pages"),
            deadline: Duration::from_secs(600),
        };
        self.handle().receive(request).expect("taken")
    }

    fn send(&self, room: u64, ids: &[u32]) -> Sending {
        let pages = self.pool.lend(ids).expect("free pages");
        let tokens = ids.len() as u32;
        let request = SendRequest { room, use_count: 0, tokens, pages, deadline: Duration::from_secs(600) };
        self.handle().open(request).expect("taken")
    }

    fn settle(&mut self) {
        while self.pool.stats().free != 2 * PAGES {
            self.node.progress();
        }
    }
}

struct C {
    pool: u64,
    node: u64,
    peer: u64,
}

impl C {
    fn open() -> C {
        let mut options = crossdock_layout_options::zeroed();
        options.size = size_of_val(&options);
        options.model = c"deepseek-r1".as_ptr();
        (options.model_layers, options.kind, options.dtype) = (LAYERS, CROSSDOCK_MLA, CROSSDOCK_BF16);
        (options.latent_bytes, options.rope_bytes) = (1024, 128);
        (options.page_tokens, options.pages) = (1, 2 * PAGES);
        let (mut layout, mut bytes, mut memory, mut pool, mut node, mut peer) = (0, 0, 0, 0, 0, 0);
        // SAFETY: everything that is pointed to lives, and can be written where it is.
        unsafe {
            assert_eq!(crossdock_layout_create(&raw const options, &raw mut layout), CROSSDOCK_OK);
            assert_eq!(crossdock_layout_region_bytes(layout, 0, &raw mut bytes), CROSSDOCK_OK);
            assert_eq!(crossdock_memory_allocate(bytes as usize, ptr::null(), &raw mut memory), CROSSDOCK_OK);
            let mut options = crossdock_pool_options::zeroed();
            (options.size, options.pages) = (size_of_val(&options), 2 * PAGES);
            assert_eq!(crossdock_pool_create(&raw const options, &raw mut pool), CROSSDOCK_OK);
            let mut options = crossdock_node_options::zeroed();
            (options.size, options.name, options.layout) = (size_of_val(&options), c"c".as_ptr(), layout);
            (options.memory, options.memory_count) = (&raw const memory, 1);
            (options.authentication, options.progress) =
                (CROSSDOCK_AUTHENTICATION_OFF, CROSSDOCK_PROGRESS_CALLER);
            assert_eq!(crossdock_node_open(&raw const options, &raw mut node), CROSSDOCK_OK);
            assert_eq!(crossdock_peer_by_number(node, 7, &raw mut peer), CROSSDOCK_OK);
        }
        C { pool, node, peer }
    }

    fn receive(&self, room: u64, ids: &[u32]) -> u64 {
        let source = crossdock_source { peer: self.peer, rank: 0, parts: 0 };
        let list = self.list(ids);
        let mut options = crossdock_receive_options::zeroed();
        (options.size, options.room, options.tokens) = (size_of_val(&options), room, ids.len() as u32);
        (options.sources, options.source_count) = (&raw const source, 1);
        (options.pages, options.page_lists, options.deadline_ms) = (&raw const list, 1, 600_000);
        let mut handle = 0;
        // SAFETY: as above.
        let status = unsafe { crossdock_receive(self.node, &raw const options, &raw mut handle) };
        assert_eq!(status, CROSSDOCK_OK);
        handle
    }

    fn send(&self, room: u64, ids: &[u32]) -> u64 {
        let list = self.list(ids);
        let mut options = crossdock_send_options::zeroed();
        (options.size, options.room, options.tokens) = (size_of_val(&options), room, ids.len() as u32);
        (options.pages, options.page_lists, options.deadline_ms) = (&raw const list, 1, 600_000);
        let mut handle = 0;
        // SAFETY: as above.
        let status = unsafe { crossdock_send(self.node, &raw const options, &raw mut handle) };
        assert_eq!(status, CROSSDOCK_OK);
        handle
    }

    fn list(&self, ids: &[u32]) -> crossdock_page_list {
        let mut list = crossdock_page_list::zeroed();
        (list.pool, list.ids, list.count) = (self.pool, ids.as_ptr().cast(), ids.len());
        list
    }

    fn settle(&self) {
        let mut stats = crossdock_pool_stats::zeroed();
        stats.size = size_of_val(&stats);
        while stats.free != 2 * PAGES {
            // SAFETY: NULL is allowed.
            assert_eq!(unsafe { crossdock_node_progress(self.node, ptr::null_mut()) }, CROSSDOCK_OK);
            // SAFETY: it says its size.
            assert_eq!(unsafe { crossdock_pool_get_stats(self.pool, &raw mut stats) }, CROSSDOCK_OK);
        }
    }
}
