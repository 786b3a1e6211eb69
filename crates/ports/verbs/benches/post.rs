//! Measures what the port adds to each piece of a paged op before the device has it: from `post` to `ibv_post_send`,
//! for 61 ops (one a layer) of scattered pieces of 1,152 bytes, over a device that only counts requests.
//!
//! `cargo bench -p crossdock-verbs --bench post`
//!
//! Time is taken around `post` alone, and the median is printed; polling, which makes room again, is told beside it. To
//! count instructions instead, which no other load disturbs:
//!
//! ```text
//! cargo bench -p crossdock-verbs --bench post --no-run
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null --toggle-collect='*VerbsPort*Port*::post' \
//!   target/release/deps/post-… --bench --once 4096
//! ```
//!
//! The first line is the number of pieces, `Collected` the instructions within `post`. Eleven or twelve of them for each
//! piece are of the device that counts. Without `--bench` (under `cargo test`) it runs once over short lists, to see that
//! it works.

use std::time::{Duration, Instant};

use crossdock_memory::{AllocateOptions, Memory};
use crossdock_transport::{
    Direction, Event, Events, GrantId, LaneId, LaneTags, LocalId, Op, PeerId, Port, RemoteId, Shape, Token,
};
use crossdock_verbs::fake::{Fabric, FabricOptions, Pace};
use crossdock_verbs::{VerbsOptions, VerbsPort};

const LAYERS: u64 = 61;
const PIECE_BYTES: u64 = 1152;

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let Some(at) = arguments.iter().position(|argument| argument == "--once") {
        let pieces = arguments.get(at + 1).and_then(|pieces| pieces.parse().ok()).unwrap_or(4096);
        Bench::new(pieces).run();
        println!("{} pieces", LAYERS * u64::from(pieces));
        return;
    }
    let is_bench = arguments.iter().any(|argument| argument == "--bench");
    let (sizes, repeats): (&[u32], usize) = if is_bench { (&[128, 4096], 31) } else { (&[16, 128], 1) };
    println!("{:>12} {:>14} {:>14}", "pieces an op", "post ns/piece", "poll ns/piece");
    for &pieces in sizes {
        let mut bench = Bench::new(pieces);
        let times: Vec<_> = (0..repeats).map(|_| bench.run()).collect();
        let each = |time: fn(&Times) -> Duration| {
            let mut times: Vec<_> = times.iter().map(time).collect();
            times.sort_unstable();
            times[times.len() / 2].as_nanos() as f64 / (LAYERS * u64::from(pieces)) as f64
        };
        println!("{pieces:>12} {:>14.2} {:>14.2}", each(|t| t.post), each(|t| t.poll));
    }
}

/// Two ports with a lane, and lists of pages.
struct Bench {
    fabric: Fabric,
    here: Side,
    there: Side,
    local: LocalId,
    remote: RemoteId,
    local_pages: Vec<u32>,
    remote_pages: Vec<u32>,
}

struct Side {
    port: VerbsPort,
    lane: LaneId,
    events: Events,
}

struct Times {
    post: Duration,
    poll: Duration,
}

impl Bench {
    fn new(pieces: u32) -> Self {
        let fabric = Fabric::new(FabricOptions { pace: Pace::Weightless, ..FabricOptions::default() });
        let [mut here, mut there] = connected(&fabric);
        // Nobody reads or writes it: it takes addresses, and no memory.
        let bytes = (LAYERS * u64::from(pieces) * PIECE_BYTES) as usize;
        let pool = || Memory::allocate(bytes, &AllocateOptions::default()).expect("memory can be allocated");
        let (local, _) = here.port.register(&pool()).expect("memory can be registered");
        let (_, key) = there.port.register(&pool()).expect("memory can be registered");
        let remote = here.port.attach(here.lane, &key).expect("the peer's key").id;
        let (local_pages, remote_pages) = (shuffled(pieces, 1), shuffled(pieces, 2));
        Self { fabric, here, there, local, remote, local_pages, remote_pages }
    }

    /// All layers, until the last is done.
    fn run(&mut self) -> Times {
        let layer_bytes = self.local_pages.len() as u64 * PIECE_BYTES;
        let layer = |layer: u64| Op {
            direction: Direction::Write,
            grant: GrantId::NONE,
            shape: Shape::Pages {
                local: self.local,
                local_offset: layer * layer_bytes,
                local_stride_bytes: PIECE_BYTES,
                local_pages: &self.local_pages,
                remote: self.remote,
                remote_offset: layer * layer_bytes,
                remote_stride_bytes: PIECE_BYTES,
                remote_pages: &self.remote_pages,
                piece_bytes: PIECE_BYTES,
            },
            imm: None,
            token: (layer == LAYERS - 1).then_some(Token(layer)),
        };
        let before = self.fabric.counters().sends_posted;
        let mut ops: Vec<_> = (0..LAYERS).map(layer).collect();
        let (mut first, mut is_done) = (0, false);
        let mut times = Times { post: Duration::ZERO, poll: Duration::ZERO };
        while !is_done {
            let begun = Instant::now();
            if first < ops.len() {
                let posted = self.here.port.post(self.here.lane, &ops[first..]).expect("the lane is up");
                first += posted.ops;
                if first < ops.len() {
                    ops[first] = ops[first].advance(posted.within);
                }
            }
            let between = Instant::now();
            self.here.port.poll(&mut self.here.events);
            times.poll += between.elapsed();
            times.post += between - begun;
            is_done = self.here.events.drain().any(|event| matches!(event, Event::Done { .. }));
        }
        // A keepalive may have come in between.
        let requests = self.fabric.counters().sends_posted - before;
        let pieces = LAYERS * self.local_pages.len() as u64;
        assert!((pieces..pieces + 8).contains(&requests), "{requests} requests for {pieces} pieces");
        self.there.port.poll(&mut self.there.events);
        self.there.events.clear();
        times
    }
}

fn connected(fabric: &Fabric) -> [Side; 2] {
    let mut sides = [0, 1].map(|device| {
        let mut options = VerbsOptions::default();
        options.verbs = Some(fabric.verbs());
        options.device = Some(format!("fake{device}"));
        let mut port = VerbsPort::open(options).expect("a port can be opened");
        let (lane, address) = port.open_lane(PeerId(0)).expect("a lane can be opened");
        (Side { port, lane, events: Events::with_capacity(1024) }, address)
    });
    let [(here, near), (there, far)] = &mut sides;
    let tags = LaneTags { ours: [1; 32], theirs: [1; 32] };
    here.port.connect(here.lane, far, &tags).expect("a fresh lane connects");
    there.port.connect(there.lane, near, &tags).expect("a fresh lane connects");
    let begun = Instant::now();
    let mut up = 0;
    while up < 2 {
        for (side, _) in &mut sides {
            side.port.poll(&mut side.events);
            up += side.events.drain().filter(|event| matches!(event, Event::Up { .. })).count();
        }
        assert!(begun.elapsed() < Duration::from_secs(20), "waited for the lane");
    }
    sides.map(|(side, _)| side)
}

/// A permutation, the same for the same seed.
fn shuffled(count: u32, seed: u64) -> Vec<u32> {
    let mut pages: Vec<u32> = (0..count).collect();
    let mut state = seed;
    for at in (1..pages.len()).rev() {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        pages.swap(at, (state >> 33) as usize % (at + 1));
    }
    pages
}
