//! A peer of the same fingerprint whose layout, as it says it in its setup, is not that of its memory: rooms with it end
//! for a reason, nothing panics, and the others are served.

mod carriers;

use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use crossdock::cuda::CudaPort;
use crossdock::{
    Authentication, CacheKind, CacheLayout, CachePartOptions, CachePoolOptions, Config, Dtype, End, Extent,
    Handle, HeadOrder, HeadShare, Identity, LayerBuffer, LayoutOptions, Misfit, Node, PagePool, PageSet,
    Peer, Placement, PortConfig, ReceiveRequest, RoomRefusal, SendRequest, ServeRequest, Stage, TcpOptions,
    Verify, Who, Worker,
};
use crossdock_engine::{Engine, EngineOptions, Network, SocketNetwork, SocketOptions};
use crossdock_kv::WorkerOptions;
use crossdock_proto::{Fingerprint, Proto, Rail};
use crossdock_transport::Port;

use carriers::Carrier;

const WAIT: Duration = Duration::from_secs(30);
/// Of a room that waits for another rank than the peer's.
const SHORT: Duration = Duration::from_millis(300);
const LAYERS: u32 = 4;
const PAGES: u32 = 16;
const PAGE_TOKENS: u32 = 4;
const TOKENS: u32 = 16;

fn options() -> LayoutOptions {
    LayoutOptions {
        model: "m".into(),
        model_layers: LAYERS,
        layers: 0..LAYERS,
        kind: CacheKind::Heads { heads: HeadShare::all(8), head_bytes: 8, order: HeadOrder::TokensFirst },
        dtype: Dtype::Bf16,
        page_tokens: PAGE_TOKENS,
        pages: PAGES,
        placement: Placement::LayerMajor { region: 0 },
    }
}

fn honest() -> CacheLayout {
    CacheLayout::new(options()).unwrap()
}

/// What an honest layout would be with some of it changed.
fn with(change: impl FnOnce(&mut LayoutOptions)) -> Vec<u8> {
    let mut options = options();
    change(&mut options);
    encoded(&CacheLayout::new(options).unwrap())
}

fn encoded(layout: &CacheLayout) -> Vec<u8> {
    let mut bytes = Vec::new();
    layout.encode(&mut bytes);
    bytes
}

fn heads(first: u32, count: u32) -> CacheKind {
    CacheKind::Heads {
        heads: HeadShare { of: 8, first, count },
        head_bytes: 8,
        order: HeadOrder::TokensFirst,
    }
}

/// Buffers of an honest layout in this region, so far from its beginning and from each other.
fn buffers(region: u32, first: u64, apart: u64) -> Placement {
    let buffer = |nth| LayerBuffer { region, offset: first + nth * apart, stride_bytes: apart / 32 };
    Placement::Buffers((0..2 * u64::from(LAYERS)).map(buffer).collect())
}

/// What comes of a lie in rooms.
enum Fate {
    /// Its pages cannot be reached by what it says of them.
    Unreachable,
    /// It does not keep what it would have to bring.
    Gap,
    /// Its lists name pages that it has not.
    NoSuchPages,
    /// It has no layout that fits.
    Unreadable,
    /// It is none of the ranks that rooms are for, but this one, if any.
    Stranger(Option<u32>),
}

fn lies() -> Vec<(&'static str, Vec<u8>, Fate)> {
    let far = 1 << 40;
    let mut no_pages = encoded(&honest());
    let at = no_pages.windows(4).position(|bytes| bytes == PAGES.to_le_bytes()).unwrap();
    no_pages[at..at + 4].fill(0);
    let part = CachePartOptions {
        name: "k".into(),
        heads: HeadShare::WHOLE,
        head_bytes: 8,
        order: HeadOrder::TokensFirst,
        layers: vec![0],
        buffers: vec![LayerBuffer { region: 1, offset: 0, stride_bytes: 32 }],
    };
    let window = CachePoolOptions {
        name: "window".into(),
        extent: Extent::Window(8),
        page_tokens: PAGE_TOKENS,
        pages: PAGES,
        parts: vec![part],
    };
    let half = encoded(&honest())[..60].to_vec();
    vec![
        ("another region", with(|o| o.placement = Placement::LayerMajor { region: 7 }), Fate::Unreachable),
        ("far offsets", with(|o| o.placement = buffers(0, far, 1 << 20)), Fate::Unreachable),
        ("far pages", with(|o| o.placement = buffers(0, 1 << 20, far)), Fate::Unreachable),
        ("half of the heads", with(|o| o.kind = heads(4, 4)), Fate::Gap),
        ("one of the layers", with(|o| o.layers = 1..2), Fate::Gap),
        ("one page", with(|o| o.pages = 1), Fate::NoSuchPages),
        ("no pages", no_pages, Fate::Unreadable),
        ("another model", with(|o| o.model = "n".into()), Fate::Unreadable),
        ("another pool", encoded(&honest().with_pool(window).unwrap()), Fate::Unreadable),
        ("half a layout", half, Fate::Unreadable),
        ("another rank", encoded(&honest().with_rank(9).unwrap()), Fate::Stranger(Some(9))),
        ("nothing", Vec::new(), Fate::Stranger(None)),
    ]
}

/// A node that keeps what an honest one does, and says something else.
struct Liar {
    handle: Handle,
    address: String,
    pool: PagePool,
    thread: Option<JoinHandle<()>>,
}

impl Liar {
    fn open(number: u64, says: Vec<u8>, carrier: &Carrier) -> Self {
        let port = carrier.port(1);
        let port: Box<dyn Port> = match port {
            PortConfig::Shm(options) => Box::new(crossdock_shm::ShmPort::open(options).unwrap()),
            PortConfig::Verbs(options) => Box::new(crossdock_verbs::VerbsPort::open(options).unwrap()),
            PortConfig::Cuda { gpu, options } => Box::new(CudaPort::open(&gpu, options).unwrap()),
            _ => Box::new(crossdock_tcp::TcpPort::open(TcpOptions::default()).unwrap()),
        };
        let network = SocketNetwork::open(SocketOptions::new("127.0.0.1:0".parse().unwrap())).unwrap();
        let identity = Identity { node: number, incarnation: number };
        let mut proto = crossdock_proto::Config::new(identity, "liar");
        proto.entropy = [number as u8; 32];
        proto.fingerprint = Fingerprint::new(honest().fingerprint());
        let info = port.info();
        let (kind, reach, bytes_per_second) = (info.kind, info.reach.clone(), info.bytes_per_second);
        proto.rails = vec![Rail { kind, reach, bytes_per_second }];
        proto.app = says;
        proto.pulse_address = network.pulse_address().to_owned();
        let engine = Engine::new(Proto::new(proto), Box::new(network), vec![port], EngineOptions::default());
        let address = engine.address().to_owned();
        let (memory, pool) = crossdock::allocate(&honest()).unwrap();
        let options = WorkerOptions {
            layout: honest(),
            memory: memory.iter().map(|memory| carrier.memory(memory.bytes())).collect(),
            verify: Verify::All,
            max_commands: 64,
            max_targets: 4,
            turn_bytes: WorkerOptions::TURN_BYTES,
        };
        let (worker, handle) = Worker::new(engine, options).unwrap();
        let thread = std::thread::spawn(move || worker.run(0).unwrap());
        Self { handle, address, pool, thread: Some(thread) }
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.handle.stop().unwrap();
        self.thread.take().unwrap().join().unwrap();
    }
}

struct Side {
    node: Node,
    pool: PagePool,
}

impl Side {
    fn open(name: &str, carrier: &Carrier, at: usize) -> Self {
        let (memory, pool) = crossdock::allocate(&honest()).unwrap();
        let mut config = Config::new(name, honest(), memory, Authentication::Off);
        carrier.equip(&mut config, at);
        config.verify = Verify::All;
        Self { node: Node::open(config).unwrap(), pool }
    }
}

fn connect(handle: &Handle, address: &str) -> Peer {
    let (peer, mut up) = handle.connect(address).unwrap();
    up.wait_until(Instant::now() + WAIT).unwrap().unwrap();
    peer
}

fn four(pool: &PagePool) -> PageSet {
    let begin = Instant::now();
    loop {
        match pool.take(TOKENS / PAGE_TOKENS) {
            Ok(pages) => return pages,
            Err(error) => assert!(begin.elapsed() < WAIT, "pages that do not come home: {error}"),
        }
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// A hand-over between two nodes, for which the prefill side has so much time; how it ended there and on the decode side.
fn hand_over(
    (prefill, source): (&Handle, &PagePool),
    (decode, destination): (&Handle, &PagePool),
    peer: Peer,
    (room, pull, deadline): (u64, bool, Duration),
) -> (End, End) {
    let (pages, use_count, tokens) = (four(source).share(), 0, TOKENS);
    let mut sent = match pull {
        true => {
            let request = ServeRequest { room, use_count, tokens, pages, aux: Vec::new(), deadline };
            prefill.serve(request).unwrap().end
        }
        false => {
            let mut sending = prefill.open(SendRequest { room, use_count, tokens, pages, deadline }).unwrap();
            sending.send_layers(0..LAYERS).unwrap();
            sending.finish(Vec::new()).unwrap();
            sending.end
        }
    };
    let (pages, skip_tokens, deadline) = (four(destination), 0, WAIT);
    let request = ReceiveRequest { peer, room, use_count, tokens, skip_tokens, pages, deadline };
    let mut received = if pull { decode.fetch(request) } else { decode.receive(request) }.unwrap();
    let received = received.end.wait_until(Instant::now() + WAIT).unwrap().ended.end;
    (sent.wait_until(Instant::now() + WAIT).unwrap().end, received)
}

#[test]
fn a_layout_that_is_a_lie_ends_rooms_and_nothing_else() {
    for carrier in Carrier::all() {
        let (node, other) = (Side::open("node", &carrier, 0), Side::open("other", &carrier, 1));
        let (here, there) = ((node.node.handle(), &node.pool), (other.node.handle(), &other.pool));
        let mut room = 0;
        let mut next = |pull, deadline| {
            room += 1;
            (room, pull, deadline)
        };
        for (number, (lie, says, fate)) in (100..).zip(lies()) {
            let liar = Liar::open(number, says, &carrier);
            let of_liar = (&liar.handle, &liar.pool);
            let (to_liar, to_node) =
                (connect(here.0, &liar.address), connect(&liar.handle, node.node.address()));
            let deadline = if matches!(fate, Fate::Stranger(_)) { SHORT } else { WAIT };
            let mut to = |pull| hand_over(here, of_liar, to_node, next(pull, deadline)).0;
            let (sent, served) = (to(false), to(true));
            let mut from = |pull| hand_over(of_liar, here, to_liar, next(pull, deadline)).1;
            let (received, fetched) = (from(false), from(true));
            let all = [&sent, &served, &received, &fetched];
            let misfit = |misfit| End::Refused { by: Who::Here, why: RoomRefusal::Mismatch(misfit) };
            let is_cut_short =
                |end: &End| matches!(end, End::Refused { .. } | End::Failed { .. } | End::PeerLost { .. });
            match fate {
                // Where it moves the bytes itself, it moves them to and from where they are.
                Fate::Unreachable => {
                    assert!(is_cut_short(&sent) && is_cut_short(&fetched), "{lie}: {all:?}");
                }
                Fate::Gap => {
                    assert!(is_cut_short(&sent) && is_cut_short(&served), "{lie}: {all:?}");
                    assert_eq!(received, misfit(Misfit::Gap), "{lie}");
                    // A port that looks at what is read takes it for misbehaviour where it is not in the pages.
                    let is_lost = matches!(fetched, End::PeerLost { .. });
                    assert!(fetched == misfit(Misfit::Gap) || is_lost, "{lie}: {fetched}");
                }
                Fate::NoSuchPages => {
                    let pages = misfit(Misfit::Pages { whose: Who::Peer });
                    assert_eq!([&sent, &fetched], [&pages; 2], "{lie}");
                }
                Fate::Unreadable => assert_eq!(all, [&misfit(Misfit::Unreadable); 4], "{lie}"),
                Fate::Stranger(rank) => {
                    let expired = End::Expired { by: Who::Here, stage: Stage::Grant };
                    assert_eq!([&sent, &served], [&expired; 2], "{lie}");
                    let rank = rank.map_or(Misfit::Unreadable, |peer| Misfit::Rank { named: 0, peer });
                    assert_eq!([&received, &fetched], [&misfit(rank); 2], "{lie}");
                }
            }
        }
        let peer = connect(there.0, node.node.address());
        for pull in [false, true] {
            assert_eq!(hand_over(here, there, peer, next(pull, WAIT)), (End::Delivered, End::Delivered));
        }
        let begin = Instant::now();
        loop {
            let stats = node.node.handle().stats().unwrap().wait_until(Instant::now() + WAIT).unwrap();
            if (stats.rooms, stats.grants, node.pool.stats().free) == (0, 0, PAGES) {
                break;
            }
            assert!(begin.elapsed() < WAIT, "{stats:?}");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}
