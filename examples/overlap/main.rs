//! How much of a transfer hides behind the computation, when each layer is pushed as soon as it is computed.
//!
//! ```sh
//! cargo run --release -p crossdock-examples --example overlap
//! cargo run --release -p crossdock-examples --example overlap -- --port tcp --compute-ms 1 --svg overlap.svg
//! ```
//!
//! One node prefills, another decodes; each layer's computation is a sleep, as the processor's part of a GPU's work is. What
//! counts is the tail: the time from the end of the last layer's computation until the decode side has everything. It is
//! measured for a cache that is sent when all of it is computed, for one that is sent layer by layer, and for chunks of the
//! prompt, each sent layer by layer; and beside them the same for a cache of one layer, which is the least a tail can be.
//! The tail layer by layer is about that of one layer where a layer takes longer to compute than to move. Where it moves
//! more slowly, what could not keep up is in the tail too: try `--compute-ms 0`.

mod picture;

use std::cell::Cell;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use clap::{Parser, ValueEnum};
use crossdock::{
    Authentication, CacheKind, CacheLayout, Config, Dtype, End, HeadOrder, HeadShare, LayoutOptions, Memory,
    Node, PagePool, Peer, Placement, PortConfig, ReceiveRequest, Receiving, SendRequest, Sending, ShmOptions,
    TicketError,
};

type Problem = Box<dyn std::error::Error + Send + Sync>;

#[derive(Parser)]
struct Options {
    #[arg(long, value_enum, default_value_t = PortName::Shm)]
    port: PortName,
    /// Layers of the model
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    layers: u32,
    /// Tokens of the prompt
    #[arg(long, default_value_t = 1024, value_parser = clap::value_parser!(u32).range(1..=65_536))]
    tokens: u32,
    /// Chunks that the prompt is cut into, in the last mode
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u32).range(1..=64))]
    chunks: u32,
    /// What a layer of all tokens takes to compute; without it, twice as long as to move it
    #[arg(long)]
    compute_ms: Option<f64>,
    /// Times that each mode is measured; the one with the median tail is told
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=1000))]
    repeats: u32,
    /// Fails if layer by layer the tail is longer than this part of that of sending at the end
    #[arg(long)]
    most_tail: Option<f64>,
    /// Draws when what was computed and when it arrived
    #[arg(long)]
    svg: Option<PathBuf>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PortName {
    Shm,
    Tcp,
}

/// When what is sent.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// All layers, when all are computed.
    AtTheEnd,
    /// Each layer, when it is computed.
    ByLayer,
    /// Each layer of each of so many chunks of the prompt.
    ByChunk(u32),
}

fn main() -> Result<(), Problem> {
    show(&Options::parse())
}

fn show(options: &Options) -> Result<(), Problem> {
    let one = Pair::open(options.port, 1, options.tokens)?;
    let all = Pair::open(options.port, options.layers, options.tokens)?;
    // The first transfer touches pages and warms caches; it is not told.
    one.run(Mode::AtTheEnd, Duration::ZERO)?;
    let alone = one.median(options.repeats, Mode::AtTheEnd, Duration::ZERO)?;
    let moving = alone.tail();
    let compute = match options.compute_ms {
        Some(compute_ms) => Duration::try_from_secs_f64(compute_ms / 1e3)?,
        None => 2 * moving,
    };
    all.run(Mode::AtTheEnd, Duration::ZERO)?;

    let layer_mib = one.layout.page_bytes() as f64 * f64::from(one.layout.pages_for(options.tokens)) / MIB;
    println!("{} layers of {layer_mib:.1} MiB; computing one takes {}", options.layers, ms(compute));
    println!("mode                sends   bytes moved  computing      tail  tail in layers");
    let mut runs = Vec::new();
    let modes = [Mode::AtTheEnd, Mode::ByLayer, Mode::ByChunk(options.chunks)];
    let row = |name: &str, sends: u32, run: &Run| {
        let (computing, tail) = (ms(run.computed() - run.begin), ms(run.tail()));
        let tail_layers = run.tail().as_secs_f64() / moving.as_secs_f64();
        println!("{name:<18}  {sends:>5}  {:>12}  {computing:>9}  {tail:>8}  {tail_layers:>14.1}", run.bytes);
    };
    row("one layer alone", 1, &alone);
    for mode in modes {
        let run = all.median(options.repeats, mode, compute)?;
        row(&mode.name(), mode.sends(options.layers), &run);
        runs.push((mode, run));
    }
    println!("{}", finding(&runs, moving, compute));
    if let Some(path) = &options.svg {
        picture::draw(path, &runs)?;
        println!("drawn: {}", path.display());
    }
    match options.most_tail {
        Some(most) if share_of_tail(&runs) > most => Err(format!(
            "layer by layer the tail is more than {:.0} % of that of sending at the end",
            most * 100.0
        )
        .into()),
        _ => Ok(()),
    }
}

/// The tail layer by layer, as a part of that of sending at the end.
fn share_of_tail(runs: &[(Mode, Run)]) -> f64 {
    let tail = |mode| runs.iter().find(|run| run.0 == mode).map_or(0.0, |run| run.1.tail().as_secs_f64());
    tail(Mode::ByLayer) / tail(Mode::AtTheEnd)
}

/// In words, from the figures alone.
fn finding(runs: &[(Mode, Run)], moving: Duration, compute: Duration) -> String {
    let [_, (_, by_layer), ..] = runs else { return String::new() };
    let share = share_of_tail(runs);
    let layers = by_layer.tail().as_secs_f64() / moving.as_secs_f64();
    let found = format!(
        "Sent layer by layer the tail is {:.0} % of that of sending at the end, and {layers:.1} times as long as moving one layer.",
        share * 100.0
    );
    let why = match (layers < 2.0, compute < moving) {
        (true, _) => "All layers but the last hide behind the computation.",
        (false, true) => {
            "A layer is computed sooner than moved, so layers queue up, and the queue is in the tail."
        }
        (false, false) => {
            "A layer takes longer to compute than to move, so this machine was busy with something else too."
        }
    };
    format!("{found}\n{why}")
}

impl Mode {
    fn name(self) -> String {
        match self {
            Self::AtTheEnd => "all at the end".into(),
            Self::ByLayer => "layer by layer".into(),
            Self::ByChunk(chunks) => format!("{chunks} chunks, by layer"),
        }
    }

    /// Calls to send, for so many layers.
    fn sends(self, layers: u32) -> u32 {
        match self {
            Self::AtTheEnd => 1,
            Self::ByLayer => layers,
            Self::ByChunk(chunks) => layers * chunks,
        }
    }

    fn chunks(self) -> u32 {
        match self {
            Self::AtTheEnd | Self::ByLayer => 1,
            Self::ByChunk(chunks) => chunks,
        }
    }
}

/// When what happened in one transfer.
struct Run {
    begin: Instant,
    /// Each piece of the computation: layer by layer, of each chunk.
    computed: Vec<(Instant, Instant)>,
    /// When what had been counted of what arrived had grown, and to how many batches.
    arrived: Vec<(Instant, u64)>,
    delivered: Instant,
    bytes: u64,
}

impl Run {
    /// When the last layer was computed.
    fn computed(&self) -> Instant {
        self.computed.last().map_or(self.begin, |piece| piece.1)
    }

    fn tail(&self) -> Duration {
        self.delivered.saturating_duration_since(self.computed())
    }
}

/// A prefill node and a decode node.
struct Pair {
    layout: CacheLayout,
    tokens: u32,
    nodes: [Node; 2],
    memory: [Memory; 2],
    pools: [PagePool; 2],
    peer: Peer,
    /// Of the one room's number.
    uses: Cell<u32>,
}

const PREFILL: usize = 0;
const DECODE: usize = 1;
const PAGE_TOKENS: u32 = 16;
const MIB: f64 = (1 << 20) as f64;
const DEADLINE: Duration = Duration::from_secs(30);

impl Pair {
    fn open(port: PortName, layers: u32, tokens: u32) -> Result<Self, Problem> {
        // The cache of Llama 3 8B in bf16: 8 heads of 128 numbers.
        let layout = CacheLayout::new(LayoutOptions {
            model: "overlap".into(),
            model_layers: layers,
            layers: 0..layers,
            kind: CacheKind::Heads {
                heads: HeadShare::all(8),
                head_bytes: 256,
                order: HeadOrder::TokensFirst,
            },
            dtype: Dtype::Bf16,
            page_tokens: PAGE_TOKENS,
            pages: tokens.div_ceil(PAGE_TOKENS),
            placement: Placement::LayerMajor { region: 0 },
        })?;
        let open = |name| -> Result<(Node, Memory, PagePool), Problem> {
            let (memory, pool) = crossdock::allocate(&layout)?;
            // Both nodes are in this process, on addresses of this host.
            let mut config = Config::new(name, layout.clone(), memory.clone(), Authentication::Off);
            config.ports = vec![match port {
                PortName::Shm => PortConfig::Shm(ShmOptions::default()),
                PortName::Tcp => PortConfig::Tcp(None),
            }];
            Ok((Node::open(config)?, memory[0].clone(), pool))
        };
        let (prefill, decode) = (open("prefill")?, open("decode")?);
        let (peer, mut up) = decode.0.handle().connect(prefill.0.address())?;
        up.wait_until(Instant::now() + DEADLINE)??;
        let content: Vec<u8> = (0..prefill.1.bytes()).map(|at| (at ^ at >> 8 ^ at >> 16) as u8).collect();
        prefill.1.write(0, &content)?;
        let (nodes, memory, pools) = ([prefill.0, decode.0], [prefill.1, decode.1], [prefill.2, decode.2]);
        Ok(Self { layout, tokens, nodes, memory, pools, peer, uses: Cell::new(0) })
    }

    /// The run with the median tail.
    fn median(&self, repeats: u32, mode: Mode, compute: Duration) -> Result<Run, Problem> {
        let mut runs = (0..repeats).map(|_| self.run(mode, compute)).collect::<Result<Vec<_>, _>>()?;
        runs.sort_by_key(Run::tail);
        Ok(runs.swap_remove(runs.len() / 2))
    }

    /// One request, from its first layer to its delivery. All bytes are looked at afterwards.
    fn run(&self, mode: Mode, compute: Duration) -> Result<Run, Problem> {
        self.memory[DECODE].fill(0, self.memory[DECODE].bytes(), 0)?;
        let pages = self.layout.pages_for(self.tokens);
        let take = |at: usize| self.pools[at].take(pages);
        let (source, destination) = (take(PREFILL)?.share(), take(DECODE)?);
        let (room, use_count, tokens, deadline) =
            (1, self.uses.replace(self.uses.get() + 1), self.tokens, DEADLINE);
        let moved_before = self.moved_bytes()?;
        let mut receiving = self.nodes[DECODE].handle().receive(ReceiveRequest {
            peer: self.peer,
            room,
            use_count,
            tokens,
            skip_tokens: 0,
            pages: destination,
            deadline,
        })?;
        let request = SendRequest { room, use_count, tokens, pages: source.clone(), deadline };
        let mut sending = self.nodes[PREFILL].handle().open(request)?;

        // A prompt waits for its turn for longer than the decode side's asking takes to come here.
        std::thread::sleep(Duration::from_millis(3));
        let begin = Instant::now();
        let (delivered, arrived, computed) = std::thread::scope(|scope| -> Result<_, Problem> {
            let watching = scope.spawn(|| watch(&mut receiving));
            let computed = send(mode, compute, self.layout.layers().end, tokens, &mut sending)?;
            let (delivered, arrived) = watching.join().map_err(|_| "the watcher panicked")??;
            Ok((delivered, arrived, computed))
        })?;
        let sent = sending.end.wait_until(Instant::now() + DEADLINE)?;
        assert_eq!(sent.end, End::Delivered, "{sent}");
        let home = receiving.pages.wait_until(Instant::now() + DEADLINE)?;
        self.compare(source.ids(), home.ids())?;

        let layers = u64::from(self.layout.layers().end);
        let bytes = self.moved_bytes()? - moved_before;
        assert_eq!(bytes, layers * self.layout.token_bytes() * u64::from(tokens));
        assert_eq!(computed.len() as u32, mode.chunks() * layers as u32);
        Ok(Run { begin, computed, arrived, delivered, bytes })
    }
    fn moved_bytes(&self) -> Result<u64, Problem> {
        let stats = self.nodes[PREFILL].handle().stats()?.wait_until(Instant::now() + DEADLINE)?;
        Ok(stats.rails.iter().map(|rail| rail.written_bytes).sum())
    }

    /// The tokens' bytes are the same in the pages of both sides.
    fn compare(&self, source: &[u32], destination: &[u32]) -> Result<(), Problem> {
        for part in self.layout.tokens().parts() {
            for &layer in part.layers() {
                let places = part.page_layout(layer).ok_or("a layer without pages")?;
                let place = |page| places.page_offset(page).ok_or("a page without a place");
                for (nth, (&from, &to)) in (0..).zip(source.iter().zip(destination)) {
                    let tokens = PAGE_TOKENS.min(self.tokens - nth * PAGE_TOKENS);
                    let bytes = part.token_bytes() as usize * tokens as usize;
                    let mut read = [vec![0; bytes], vec![0; bytes]];
                    self.memory[PREFILL].read(place(from)? as usize, &mut read[PREFILL])?;
                    self.memory[DECODE].read(place(to)? as usize, &mut read[DECODE])?;
                    assert!(read[PREFILL] == read[DECODE], "layer {layer}, page {nth} of the request");
                }
            }
        }
        Ok(())
    }
}

/// Computes, and sends as the mode says. Returns when each piece was computed.
fn send(
    mode: Mode,
    compute: Duration,
    layers: u32,
    tokens: u32,
    sending: &mut Sending,
) -> Result<Vec<(Instant, Instant)>, Problem> {
    let chunks = mode.chunks();
    let mut computed = Vec::new();
    for chunk in 0..chunks {
        let piece = tokens * chunk / chunks..tokens * (chunk + 1) / chunks;
        for layer in 0..layers {
            let begin = Instant::now();
            std::thread::sleep(compute * piece.len() as u32 / tokens);
            computed.push((begin, Instant::now()));
            if mode != Mode::AtTheEnd {
                sending.send(layer..layer + 1, piece.clone())?;
            }
        }
    }
    if mode == Mode::AtTheEnd {
        sending.send_layers(0..layers)?;
    }
    sending.finish(Vec::new())?;
    Ok(computed)
}

/// Waits for the delivery; looks now and then at how much has arrived.
fn watch(receiving: &mut Receiving) -> Result<(Instant, Vec<(Instant, u64)>), Problem> {
    let deadline = Instant::now() + DEADLINE;
    let mut arrived = Vec::new();
    loop {
        let told = receiving.end.wait_until(Instant::now() + Duration::from_micros(100));
        let (now, arrivals) = (Instant::now(), receiving.arrivals());
        if arrived.last().is_none_or(|&(_, known)| known < arrivals) {
            arrived.push((now, arrivals));
        }
        match told {
            Ok(received) => {
                assert_eq!(received.ended.end, End::Delivered, "{}", received.ended);
                return Ok((now, arrived));
            }
            Err(TicketError::TimedOut) if now < deadline => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn ms(time: Duration) -> String {
    format!("{:.2} ms", time.as_secs_f64() * 1e3)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is counted is right on any machine; how long it took depends on it.
    #[test]
    fn moves_everything_in_every_mode() -> Result<(), Problem> {
        let svg = std::env::temp_dir().join(format!("crossdock-overlap-{}.svg", std::process::id()));
        for port in ["shm", "tcp"] {
            let path = svg.to_string_lossy();
            let args = [
                "overlap",
                "--port",
                port,
                "--layers",
                "5",
                "--tokens",
                "100",
                "--repeats",
                "1",
                "--svg",
                &path,
            ];
            show(&Options::try_parse_from(args)?)?;
            let drawn = std::fs::read_to_string(&svg)?;
            std::fs::remove_file(&svg)?;
            // A bar for each piece of the computation: 5 layers in two modes, and 5 in each of 4 chunks.
            assert!(drawn.matches("<rect").count() >= 5 + 5 + 20, "{drawn}");
        }
        Ok(())
    }
}
