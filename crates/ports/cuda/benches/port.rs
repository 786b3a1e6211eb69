//! Measures what the port makes of a GPU: scattered pages against one plain copy of the same bytes on the device, what the host
//! pays to submit, and how long one page takes until the peer's CPU knows of it.
//!
//! `cargo bench -p crossdock-cuda --bench port`, on a machine with a GPU; `CROSSDOCK_CUDA_DEVICE` names another than the first.
//! With `--json` one object a line. Both ports live in this process: two processes on one GPU take turns there. The ways take turns
//! within each repeat, and medians are told. Without `--bench` (under `cargo test`) it runs once over small pools, on a driver
//! without a GPU where none is named, to see that it works.

#[path = "../tests/machine/mod.rs"]
mod machine;

use std::time::{Duration, Instant};

use crossdock_cuda::driver::Driver;
use crossdock_cuda::{CopyEngines, CudaPort, Gpu};
use crossdock_memory::{AllocateOptions, Memory, PageLayout};
use crossdock_transport::{
    Access, Direction, Event, Events, Grant, GrantId, GrantedBuffer, LaneId, LaneTags, Op, PeerId, Port,
    RemoteId, Shape, Token,
};

fn main() {
    let has = |flag: &str| std::env::args().any(|argument| argument == flag);
    let (is_bench, json) = (has("--bench"), has("--json"));
    let gpu = match (is_bench, machine::device()) {
        (true, None) => match Driver::load() {
            Ok(driver) => Gpu::open(&driver, 0).expect("the first GPU"),
            Err(error) => {
                println!("SKIPPED: {error}: {}", error.advice());
                return;
            }
        },
        _ => machine::gpu(),
    };
    let scale = match is_bench {
        true => Scale { pool_bytes: 4 << 30, moved_bytes: 1 << 30, repeats: 9, trips: 2_000 },
        false => Scale { pool_bytes: 8 << 20, moved_bytes: 2 << 20, repeats: 1, trips: 5 },
    };
    let told = |line: Line| match json {
        true => println!("{}", line.json()),
        false => println!("{}", line.text()),
    };
    for piece_bytes in [576, 1_152, 4_096, 16 << 10, 64 << 10, 1 << 20] {
        told(pages(&gpu, &scale, piece_bytes));
    }
    told(submit(&gpu, &scale));
    for (from, to) in [(Place::Gpu, Place::Gpu), (Place::Gpu, Place::Host), (Place::Host, Place::Gpu)] {
        told(one_page(&gpu, &scale, from, to));
    }
    for bytes in [16 << 10, 64 << 10, 256 << 10, 1 << 20, 16 << 20] {
        for (from, to) in [(Place::Gpu, Place::Gpu), (Place::Gpu, Place::Host), (Place::Host, Place::Gpu)] {
            told(engines(&gpu, &scale, bytes, from, to));
        }
    }
}

struct Scale {
    pool_bytes: usize,
    moved_bytes: usize,
    repeats: usize,
    trips: usize,
}

/// What is told of one case.
struct Line {
    name: String,
    figures: Vec<(&'static str, f64)>,
}

impl Line {
    fn text(&self) -> String {
        let figures = self.figures.iter().map(|(name, value)| format!("  {name} {value:.2}"));
        format!("{:<34}{}", self.name, figures.collect::<String>())
    }

    fn json(&self) -> String {
        let figures = self.figures.iter().map(|(name, value)| format!(",\"{name}\":{value:.4}"));
        format!("{{\"bench\":\"cuda\",\"case\":\"{}\"{}}}", self.name, figures.collect::<String>())
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Gpu,
    Host,
}

impl Place {
    fn name(self) -> &'static str {
        match self {
            Place::Gpu => "gpu",
            Place::Host => "host",
        }
    }

    fn allocate(self, gpu: &Gpu, bytes: usize) -> Memory {
        match self {
            Place::Gpu => gpu.allocate(bytes).expect("memory of the GPU"),
            Place::Host => Memory::allocate(bytes, &AllocateOptions::default()).expect("memory of the host"),
        }
    }
}

/// Two connected ports, with a pool each.
struct Pair {
    ports: [CudaPort; 2],
    lanes: [LaneId; 2],
    pools: [Memory; 2],
    local: crossdock_transport::LocalId,
    remote: RemoteId,
}

const GRANT: GrantId = GrantId::standing(7);

impl Pair {
    fn new(gpu: &Gpu, bytes: usize, places: [Place; 2], copy_engines: CopyEngines) -> Pair {
        let options = || crossdock_cuda::CudaOptions { copy_engines, ..machine::options() };
        let mut ports = [0, 1].map(|_| CudaPort::open(gpu, options()).expect("a port"));
        let pools = places.map(|place| place.allocate(gpu, bytes));
        let (local, _) = ports[0].register(&pools[0]).expect("a region");
        let (there, key) = ports[1].register(&pools[1]).expect("a region");
        let opened = ports.each_mut().map(|port| port.open_lane(PeerId(1)).expect("a lane"));
        let tags = |ours, theirs| LaneTags { ours: [ours; 32], theirs: [theirs; 32] };
        ports[0].connect(opened[0].0, &opened[1].1, &tags(1, 2)).expect("connected");
        ports[1].connect(opened[1].0, &opened[0].1, &tags(2, 1)).expect("connected");
        let buffers = [GrantedBuffer { region: there, layout: PageLayout::dense(0, bytes as u64, 1) }];
        let grant =
            Grant { id: GRANT, peer: PeerId(1), access: Access::Write, buffers: &buffers, pages: &[0] };
        ports[1].grant(&grant).expect("granted");
        let lanes = opened.map(|(lane, _)| lane);
        let mut pair = Pair { ports, lanes, pools, local, remote: RemoteId(0) };
        let mut up = [false; 2];
        pair.until(|at, event| {
            up[at] |= matches!(event, Event::Up { .. });
            up == [true; 2]
        });
        pair.remote = pair.ports[0].attach(pair.lanes[0], &key).expect("attached").id;
        pair
    }

    fn until(&mut self, mut is_it: impl FnMut(usize, Event) -> bool) {
        let (until, mut events) = (Instant::now() + Duration::from_secs(30), Events::with_capacity(64));
        loop {
            for at in [0, 1] {
                events.clear();
                self.ports[at].poll(&mut events);
                for event in events.iter() {
                    if is_it(at, *event) {
                        return;
                    }
                }
            }
            assert!(Instant::now() < until, "nothing happens");
        }
    }

    /// Posts all of an op, polling where the port is full; how long the calls of `post` took.
    fn post(&mut self, op: &Op<'_>) -> Duration {
        let (mut rest, mut took) = (*op, Duration::ZERO);
        loop {
            let begin = Instant::now();
            let posted = self.ports[0].post(self.lanes[0], &[rest]).expect("taken");
            took += begin.elapsed();
            if posted.ops == 1 {
                return took;
            }
            rest = rest.advance(posted.within);
            self.ports[0].poll(&mut Events::with_capacity(0));
        }
    }

    fn done(&mut self) {
        self.until(|_, event| matches!(event, Event::Done { .. }));
    }

    /// How long it takes until the other end has heard of an op, which is then done, too.
    fn landed(&mut self, begin: Instant) -> Duration {
        let (mut landed, mut is_done) = (None, false);
        self.until(|_, event| {
            match event {
                Event::Arrived { .. } => landed = Some(begin.elapsed()),
                Event::Done { .. } => is_done = true,
                _ => {}
            }
            is_done && landed.is_some()
        });
        landed.expect("it has landed")
    }

    fn pages<'a>(&self, piece_bytes: u64, from: &'a [u32], to: &'a [u32]) -> Op<'a> {
        let shape = Shape::Pages {
            local: self.local,
            local_offset: 0,
            local_stride_bytes: piece_bytes,
            local_pages: from,
            remote: self.remote,
            remote_offset: 0,
            remote_stride_bytes: piece_bytes,
            remote_pages: to,
            piece_bytes,
        };
        Op { direction: Direction::Write, grant: GRANT, shape, imm: None, token: Some(Token(1)) }
    }

    fn span(&self, bytes: u64) -> Op<'static> {
        let shape =
            Shape::Span { local: self.local, local_offset: 0, remote: self.remote, remote_offset: 0, bytes };
        Op { direction: Direction::Write, grant: GRANT, shape, imm: Some(1), token: Some(Token(1)) }
    }
}

fn median(mut all: Vec<f64>) -> f64 {
    all.sort_by(f64::total_cmp);
    all[all.len() / 2]
}

/// Distinct page numbers in an order that a seed decides.
fn shuffled(pages: usize, count: usize, seed: u64) -> Vec<u32> {
    let mut all: Vec<u32> = (0..pages as u32).collect();
    let mut state = seed;
    for at in (1..all.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        all.swap(at, (state >> 33) as usize % (at + 1));
    }
    all.truncate(count);
    all
}

/// Pages scattered over both pools, and one plain copy of as many bytes on the device.
fn pages(gpu: &Gpu, scale: &Scale, piece_bytes: usize) -> Line {
    let mut pair = Pair::new(gpu, scale.pool_bytes, [Place::Gpu; 2], CopyEngines::default());
    let (all, count) = (scale.pool_bytes / piece_bytes, scale.moved_bytes / piece_bytes);
    let (from, to) = (shuffled(all, count, 1), shuffled(all, count, 2));
    let bytes = count * piece_bytes;
    let stream = gpu.context().stream().expect("a stream");
    let base = |memory: &Memory| Gpu::memory_of(memory).expect("a GPU's").base();
    let (source, target) = (base(&pair.pools[0]), base(&pair.pools[1]));
    let (mut ours, mut plain) = (Vec::new(), Vec::new());
    // The first round of each warms up.
    for round in 0..=2 * scale.repeats + 1 {
        let begin = Instant::now();
        if round % 2 == 0 {
            pair.post(&pair.pages(piece_bytes as u64, &from, &to));
            pair.done();
        } else {
            // SAFETY: both pools live, and hold as much.
            unsafe { stream.copy(target, source, bytes) }.expect("enqueued");
            stream.synchronize().expect("copied");
        }
        let rate = bytes as f64 / begin.elapsed().as_secs_f64() / 1e9;
        if round >= 2 {
            if round % 2 == 0 { &mut ours } else { &mut plain }.push(rate);
        }
    }
    let (ours, plain) = (median(ours), median(plain));
    Line {
        name: format!("pages of {piece_bytes} bytes"),
        figures: vec![("gb_per_s", ours), ("plain_copy_gb_per_s", plain), ("ratio", ours / plain)],
    }
}

/// What `post` costs for the pieces of a DeepSeek-R1 prompt of 8,192 tokens at page size 1: 61 layers with one list.
fn submit(gpu: &Gpu, scale: &Scale) -> Line {
    const LAYERS: usize = 61;
    const PIECE: usize = 1_152;
    let tokens = (scale.moved_bytes / LAYERS / PIECE).min(8_192);
    let pages = 2 * tokens;
    let layer_bytes = pages * PIECE;
    let mut pair = Pair::new(gpu, LAYERS * layer_bytes, [Place::Gpu; 2], CopyEngines::default());
    let (from, to) = (shuffled(pages, tokens, 3), shuffled(pages, tokens, 4));
    let mut took = Vec::new();
    for _ in 0..=scale.repeats {
        let ops: Vec<Op<'_>> = (0..LAYERS)
            .map(|layer| {
                let mut op = pair.pages(PIECE as u64, &from, &to);
                if let Shape::Pages { local_offset, remote_offset, .. } = &mut op.shape {
                    (*local_offset, *remote_offset) =
                        ((layer * layer_bytes) as u64, (layer * layer_bytes) as u64);
                }
                Op { token: (layer + 1 == LAYERS).then_some(Token(1)), ..op }
            })
            .collect();
        let begin = Instant::now();
        let posted = pair.ports[0].post(pair.lanes[0], &ops).expect("taken");
        took.push(begin.elapsed().as_secs_f64() * 1e6);
        assert_eq!(posted.ops, LAYERS, "lists that layers share are staged once");
        pair.done();
    }
    took.remove(0);
    Line {
        name: format!("submitting {} pieces of {PIECE}", LAYERS * tokens),
        figures: vec![("host_us", median(took))],
    }
}

/// One page of 64 KiB, from `post` until the peer's CPU has heard of it.
fn one_page(gpu: &Gpu, scale: &Scale, from: Place, to: Place) -> Line {
    let mut pair = Pair::new(gpu, 1 << 20, [from, to], CopyEngines::default());
    let mut took = Vec::new();
    for _ in 0..scale.trips {
        let begin = Instant::now();
        pair.post(&pair.span(64 << 10));
        took.push(pair.landed(begin).as_secs_f64() * 1e6);
    }
    took.sort_by(f64::total_cmp);
    let at = |part: f64| took[((took.len() - 1) as f64 * part) as usize];
    Line {
        name: format!("one page of 64 KiB, {} to {}", from.name(), to.name()),
        figures: vec![("p50_us", at(0.5)), ("p99_us", at(0.99))],
    }
}

/// One stretch by a kernel and by a copy engine: where the thresholds of [`CopyEngines`] should be.
fn engines(gpu: &Gpu, scale: &Scale, bytes: usize, from: Place, to: Place) -> Line {
    let (never, always) = (u64::MAX, 0);
    let mut pairs = [never, always].map(|from_bytes| {
        let engines = CopyEngines { host_from_bytes: from_bytes, gpu_from_bytes: from_bytes };
        Pair::new(gpu, bytes, [from, to], engines)
    });
    let mut rates = [Vec::new(), Vec::new()];
    let trips = (scale.moved_bytes / bytes / 8).clamp(1, 64);
    for _ in 0..=scale.repeats {
        for (pair, rates) in pairs.iter_mut().zip(&mut rates) {
            let begin = Instant::now();
            for _ in 0..trips {
                pair.post(&pair.span(bytes as u64));
                pair.landed(begin);
            }
            rates.push((trips * bytes) as f64 / begin.elapsed().as_secs_f64() / 1e9);
        }
    }
    let [kernel, engine] = rates.map(|mut rates| {
        rates.remove(0);
        median(rates)
    });
    Line {
        name: format!("a stretch of {} KiB, {} to {}", bytes >> 10, from.name(), to.name()),
        figures: vec![("kernel_gb_per_s", kernel), ("engine_gb_per_s", engine)],
    }
}
