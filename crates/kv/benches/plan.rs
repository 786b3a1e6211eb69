//! What it costs to plan one request of 8,192 tokens and 61 layers and to post its ops, on a port that checks
//! and walks the lists as any port must, but whose copy does nothing.
//!
//! ```text
//! cargo bench -p crossdock-kv --bench plan            # nanoseconds, all cases
//! cargo bench -p crossdock-kv --bench plan -- 1-1     # one case
//! ```
//!
//! An *input* is one page in one buffer (of the side that has more of them); the limit is 20 ns for each. *Whole node* is the same request
//! through a worker, its engine, its protocol and a control stream to a second node: the sender's turns in which
//! anything happened, from opening its room until it has ended. Where time is noisy, count the instructions of one
//! request (`apt-get install valgrind`; the `--cfg` is for the whole node, since valgrind hides what rustix's
//! own system calls look for):
//!
//! ```text
//! cargo bench -p crossdock-kv --bench plan --no-run
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null --collect-atstart=no \
//!     --toggle-collect='*move_request*' target/release/deps/plan-???????????????? --once 1-1
//! RUSTFLAGS='--cfg rustix_use_libc' cargo bench -p crossdock-kv --bench plan --no-run --target-dir target/callgrind
//! valgrind --tool=callgrind --callgrind-out-file=/dev/null --collect-atstart=no \
//!     --toggle-collect='*sender_turn*' target/callgrind/release/deps/plan-???????????????? --whole 1-1
//! ```
//!
//! It prints both the inputs and what was collected. Recorded with rustc 1.95 and valgrind 3.19 on x86-64, instructions
//! an input: 1-1 33.7, 64-64 39.3, 64-64-merged 8.1, 1-1-merged 1.6, 1-64 38.8, 64-16 37.2, 48-64-padded 63.9,
//! 1-1-in-runs 7.9, 64-1 35.9, gqa-tp-1-2 34.5, gqa-tp-2-1 34.5, gqa-hnd-1-2 39.3, gqa-64-1 34.4. Of the sender's turns of
//! a whole node: 1-1 38, 64-64 48, 64-64-merged 15. (The first count also holds what a process does only once, which the
//! handshake has done before the second begins.)
#[path = "plan/node.rs"]
mod node;

use std::hint::black_box;
use std::time::{Duration, Instant};

use crossdock_kv::{
    CacheKind, CacheLayout, Dtype, HeadOrder, HeadShare, LayerBuffer, LayoutOptions, PageTable, Placement,
    Plan, PlanInput, Route,
};
use crossdock_transport::{Direction, GrantId, LocalId, Op, Posted, RemoteId, Shape};
use node::Nodes;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| argument != "--bench").collect();
    let (flags, names): (Vec<_>, Vec<_>) = arguments.iter().partition(|argument| argument.starts_with("--"));
    for case in cases().iter().filter(|case| names.is_empty() || names.contains(&&case.name.to_string())) {
        if flags.iter().any(|flag| *flag == "--whole") {
            let _ = Nodes::new(case).move_request(case);
            println!("{}: {} inputs", case.name, case.inputs());
        } else if flags.iter().any(|flag| *flag == "--once") {
            let port = move_request(case);
            println!("{}: {} inputs, {} pieces", case.name, case.inputs(), port.pieces);
        } else {
            measure(case);
        }
    }
}

/// What a worker does for one request: builds the plan, and posts everything.
#[inline(never)]
fn move_request(case: &Case) -> NullPort {
    let plan = case.plan();
    post_all(&plan, case)
}

fn post_all(plan: &Plan, case: &Case) -> NullPort {
    let mut port = NullPort::new(case);
    let (local, remote) = ([LocalId(0)], [RemoteId(0)]);
    let route =
        Route { direction: Direction::Write, grant: GrantId::new(1, 1), local: &local, remote: &remote };
    let ops = plan.ops(route, plan.layers()).expect("the regions are known");
    let mut batch = [Op::notify(0); 16];
    let mut cursor = ops.start();
    while !ops.is_done(cursor) {
        let filled = ops.fill(cursor, &mut batch);
        cursor = ops.advance(cursor, port.post(&batch[..filled]));
    }
    port
}

/// Prints the least and the median time of one request, in all and for each input.
fn measure(case: &Case) {
    let timed = |work: &mut dyn FnMut()| {
        let begin = Instant::now();
        let mut times: Vec<Duration> = Vec::new();
        while begin.elapsed() < Duration::from_millis(300) || times.len() < 5 {
            let start = Instant::now();
            work();
            times.push(start.elapsed());
        }
        times.sort_unstable();
        let each = |time: Duration| time.as_nanos() as f64 / case.inputs() as f64;
        (each(times[0]), each(times[times.len() / 2]))
    };
    let plan = case.plan();
    let build = timed(&mut || _ = black_box(case.plan()));
    let post = timed(&mut || _ = black_box(post_all(&plan, case)));
    let whole = timed(&mut || _ = black_box(move_request(case)));
    let mut nodes = Nodes::new(case);
    let mut engine: Vec<Duration> = (0..9).map(|_| nodes.move_request(case)).collect();
    engine.sort_unstable();
    let each = |time: Duration| time.as_nanos() as f64 / case.inputs() as f64;
    println!(
        "{:<14} {:>7} inputs {:>4} ops a layer | ns an input, least (median): build {:5.2} ({:5.2})  post {:5.2} \
         ({:5.2})  both {:5.2} ({:5.2})  whole node {:5.2} ({:5.2})",
        case.name,
        case.inputs(),
        plan.ops_per_layer(0),
        build.0,
        build.1,
        post.0,
        post.1,
        whole.0,
        whole.1,
        each(engine[0]),
        each(engine[engine.len() / 2]),
    );
}

/// Checks each op against its regions, finds both addresses of each piece, and calls a copy that does nothing.
/// Takes a bounded number of pieces at once, so that posting comes back short as it does with a real one.
struct NullPort {
    local_bytes: u64,
    remote_bytes: u64,
    pieces: u64,
    /// Where the lists end of the op that was taken in part: like a real port, it looks at each list once.
    checked: usize,
}

impl NullPort {
    const PIECES_A_POST: u64 = 1000;

    fn new(case: &Case) -> Self {
        let bytes = |layout: &CacheLayout| layout.bytes_needed(0);
        Self {
            local_bytes: bytes(&case.source),
            remote_bytes: bytes(&case.destination),
            pieces: 0,
            checked: 0,
        }
    }

    fn post(&mut self, ops: &[Op<'_>]) -> Posted {
        let mut room = Self::PIECES_A_POST;
        for (nth, op) in ops.iter().enumerate() {
            let end = match op.shape {
                Shape::Span { .. } => 0,
                Shape::Pages { local_pages, .. } => local_pages.as_ptr_range().end.addr(),
            };
            if std::mem::take(&mut self.checked) != end || end == 0 {
                let (local_end, remote_end) = op.extents().expect("a planned op is sound");
                assert!(local_end <= self.local_bytes && remote_end <= self.remote_bytes);
            }
            match op.shape {
                Shape::Span { local_offset, remote_offset, bytes, .. } => {
                    copy(local_offset, remote_offset, bytes);
                    self.pieces += 1;
                    room = room.saturating_sub(1);
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
                    let taken = room.min(local_pages.len() as u64);
                    for (local, remote) in local_pages.iter().zip(remote_pages).take(taken as usize) {
                        copy(
                            local_offset + u64::from(*local) * local_stride_bytes,
                            remote_offset + u64::from(*remote) * remote_stride_bytes,
                            piece_bytes,
                        );
                    }
                    self.pieces += taken;
                    room -= taken;
                    if taken < local_pages.len() as u64 {
                        self.checked = end;
                        return Posted { ops: nth, within: taken };
                    }
                }
            }
        }
        Posted::all(ops)
    }
}

#[inline(never)]
fn copy(from: u64, to: u64, bytes: u64) {
    black_box((from, to, bytes));
}

struct Case {
    name: &'static str,
    source: CacheLayout,
    source_pages: Vec<u32>,
    destination: CacheLayout,
    destination_pages: Vec<u32>,
}

impl Case {
    fn plan(&self) -> Plan {
        Plan::build(black_box(&PlanInput {
            source: PageTable::new(&self.source, &self.source_pages),
            destination: PageTable::new(&self.destination, &self.destination_pages),
            tokens: 0..TOKENS,
        }))
        .expect("the case is sound")
    }

    /// Pairs of a page of the source and one of the destination that share tokens, in each buffer.
    fn inputs(&self) -> u64 {
        let pages = self.source_pages.len().max(self.destination_pages.len());
        let buffers: usize = self.source.tokens().parts().iter().map(|part| part.buffers().len()).sum();
        pages as u64 * buffers as u64
    }
}

/// Named by the page sizes of source and destination; `gqa` by the tensor-parallel ranks, with pages of one token, or with
/// pages of 64 whose heads lie one after the other (`hnd`).
fn cases() -> Vec<Case> {
    let case = |name,
                (source, destination): (CacheLayout, CacheLayout),
                pages: fn(&CacheLayout, u32) -> Vec<u32>| {
        let (source_pages, destination_pages) = (pages(&source, 5), pages(&destination, 77));
        Case { name, source, source_pages, destination, destination_pages }
    };
    let dense = |page_tokens| {
        CacheLayout::deepseek_r1(page_tokens, 4 * TOKENS.div_ceil(page_tokens)).expect("the model is known")
    };
    vec![
        case("1-1", (dense(1), dense(1)), scattered),
        case("64-64", (dense(64), dense(64)), scattered),
        case("64-64-merged", (dense(64), dense(64)), in_order),
        case("1-1-merged", (dense(1), dense(1)), in_order),
        case("1-64", (dense(1), dense(64)), scattered),
        case("64-16", (dense(64), dense(16)), scattered),
        case("48-64-padded", (padded(48), padded(64)), scattered),
        case("1-1-in-runs", (dense(1), dense(1)), in_runs),
        case("64-1", (dense(64), dense(1)), scattered),
        case("gqa-tp-1-2", (gqa(1, 1, NHD), gqa(1, 2, NHD)), scattered),
        case("gqa-tp-2-1", (gqa(1, 2, NHD), gqa(1, 1, NHD)), scattered),
        case("gqa-hnd-1-2", (gqa(64, 1, HND), gqa(64, 2, HND)), scattered),
        case("gqa-64-1", (gqa(64, 1, NHD), gqa(1, 1, NHD)), scattered),
    ]
}

const TOKENS: u32 = 8192;

/// Every page of the request somewhere else in the pool.
fn scattered(layout: &CacheLayout, seed: u32) -> Vec<u32> {
    let mut pool: Vec<u32> = (0..layout.pages()).collect();
    shuffle(&mut pool, seed);
    pool.truncate(layout.pages_for(TOKENS) as usize);
    pool
}

fn in_order(layout: &CacheLayout, seed: u32) -> Vec<u32> {
    (seed..seed + layout.pages_for(TOKENS)).collect()
}

/// Runs of 1 to 30 neighbours, as a pool hands them out that has been in use for a while.
fn in_runs(layout: &CacheLayout, seed: u32) -> Vec<u32> {
    let mut runs: Vec<Vec<u32>> = Vec::new();
    let mut next = 0;
    while next < layout.pages() {
        let length = (next.wrapping_mul(0x9e37_79b1) >> 16) % 30 + 1;
        let end = (next + length).min(layout.pages());
        runs.push((next..end).collect());
        next = end;
    }
    shuffle(&mut runs, seed);
    runs.concat()[..layout.pages_for(TOKENS) as usize].to_vec()
}

fn shuffle<T>(list: &mut [T], seed: u32) {
    let mut state = seed;
    for end in (1..list.len()).rev() {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        list.swap(end, ((u64::from(state) * (end as u64 + 1)) >> 32) as usize);
    }
}

const NHD: HeadOrder = HeadOrder::TokensFirst;
const HND: HeadOrder = HeadOrder::HeadsFirst;

/// Llama-3-70B on the last of `ranks` ranks.
fn gqa(page_tokens: u32, ranks: u32, order: HeadOrder) -> CacheLayout {
    let heads = HeadShare::of_rank(8, ranks - 1, ranks).expect("ranks that share 8 heads");
    CacheLayout::new(LayoutOptions {
        model: "llama-3-70b".into(),
        model_layers: 80,
        layers: 0..80,
        kind: CacheKind::Heads { heads, head_bytes: 256, order },
        dtype: Dtype::Bf16,
        page_tokens,
        pages: 4 * TOKENS.div_ceil(page_tokens),
        placement: Placement::LayerMajor { region: 0 },
    })
    .expect("the buffers do not collide")
}

/// Pages padded to the next 4 KiB, so that none touches the next.
fn padded(page_tokens: u32) -> CacheLayout {
    let pages = 4 * TOKENS.div_ceil(page_tokens);
    let stride_bytes = (u64::from(page_tokens) * 1152 + 1).next_multiple_of(4096);
    let buffer =
        |layer| LayerBuffer { region: 0, offset: layer * stride_bytes * u64::from(pages), stride_bytes };
    CacheLayout::new(LayoutOptions {
        model: "deepseek-r1".into(),
        model_layers: 61,
        layers: 0..61,
        kind: CacheKind::Mla { latent_bytes: 1024, rope_bytes: 128 },
        dtype: Dtype::Bf16,
        page_tokens,
        pages,
        placement: Placement::Buffers((0..61).map(buffer).collect()),
    })
    .expect("the buffers do not collide")
}
