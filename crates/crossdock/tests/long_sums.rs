//! A loop that sums a long room for its checksums serves other rooms meanwhile: no turn sums more than its share.
//!
//! Told by turns and by the order of ends, not by a clock. Both nodes progress by this thread's calls.

use std::time::{Duration, Instant};

use crossdock::{
    Authentication, CacheKind, CacheLayout, Config, Dtype, End, Ended, LayoutOptions, Node, PagePool, Peer,
    Placement, PortConfig, Progress, ReceiveRequest, Received, Receiving, SendRequest, Sending, ServeRequest,
    Serving, ShmOptions, Ticket, Verify,
};

const WAIT: Duration = Duration::from_secs(60);
const LAYERS: u32 = 4;
const TOKEN_BYTES: u64 = 1152;
const PAGE_TOKENS: u32 = 64;
/// 256 MiB; less where each access is checked.
const LONG: u32 = if cfg!(tsan) { 14_592 } else { 58_368 };
const SHORT: u32 = 100;
/// What all rooms together sum in a turn. A token more may be read, each of the two times that a turn looks at its rooms.
const SHARE_BYTES: u64 = 2 << 20;
const MOST_A_TURN: u64 = 2 * (SHARE_BYTES + TOKEN_BYTES);
/// Turns that one side takes at least to sum the long room.
const LEAST_TURNS: u64 = bytes(LONG) / MOST_A_TURN;
/// What the source says of the long room when it has summed it; all that it says of a short one is much less.
const SUMS_BYTES: u64 = LONG as u64 / 64 * 4;

/// One after the other: both together would take a gigabyte.
#[test]
fn a_long_room_is_summed_between_others() {
    pushed();
    pulled();
}

fn pushed() {
    let mut pair = Pair::open();
    let (mut receiving, mut sending) = pair.push(1, LONG);
    // Its bytes are there before it is finished: what is left are the sums.
    pair.turn_until("all is written", |pair| pair.moved() == bytes(LONG));
    let said = pair.said();
    sending.finish(Vec::new()).unwrap();

    let begun = pair.turns;
    let mut short = pair.push(2, SHORT);
    short.1.finish(Vec::new()).unwrap();
    pair.ends(&mut short.0.end, &mut short.1.end);
    is_open(&mut receiving.end, "the source sums");
    pair.turn_until("the source has summed", |pair| pair.said() >= said + SUMS_BYTES);
    pair.took_turns(begun);

    let begun = pair.turns;
    let mut short = pair.push(3, SHORT);
    short.1.finish(Vec::new()).unwrap();
    pair.ends(&mut short.0.end, &mut short.1.end);
    is_open(&mut receiving.end, "the destination sums");
    pair.ends(&mut receiving.end, &mut sending.end);
    pair.took_turns(begun);
}

fn pulled() {
    let mut pair = Pair::open();
    let begun = pair.turns;
    let (mut fetching, mut serving) = pair.pull(1, LONG);
    let mut short = pair.pull(2, SHORT);
    pair.ends(&mut short.0.end, &mut short.1.end);
    is_open(&mut fetching.end, "the source sums");
    pair.turn_until("the source has summed", |pair| pair.moved() > bytes(SHORT));
    pair.took_turns(begun);

    pair.turn_until("all is read", |pair| pair.moved() == bytes(SHORT) + bytes(LONG));
    let begun = pair.turns;
    let mut short = pair.pull(3, SHORT);
    pair.ends(&mut short.0.end, &mut short.1.end);
    is_open(&mut fetching.end, "the destination sums");
    pair.ends(&mut fetching.end, &mut serving.end);
    pair.took_turns(begun);
}

struct Pair {
    prefill: Side,
    decode: Side,
    peer: Peer,
    turns: u64,
}

struct Side {
    node: Node,
    layout: CacheLayout,
    pool: PagePool,
}

impl Pair {
    fn open() -> Self {
        let (mut prefill, mut decode) = (Side::open("prefill"), Side::open("decode"));
        let (peer, mut up) = decode.node.handle().connect(prefill.node.address()).unwrap();
        let begin = Instant::now();
        while up.poll().unwrap().is_none_or(|up| up.is_err()) {
            assert!(begin.elapsed() < WAIT, "no session");
            prefill.node.progress();
            decode.node.progress();
        }
        Self { prefill, decode, peer, turns: 0 }
    }

    fn push(&mut self, room: u64, tokens: u32) -> (Receiving, Sending) {
        let receiving = self.decode.node.handle().receive(self.request(room, tokens)).unwrap();
        let pages = self.prefill.pool.take(self.prefill.layout.pages_for(tokens)).unwrap().share();
        let request = SendRequest { room, use_count: 0, tokens, pages, deadline: WAIT };
        let mut sending = self.prefill.node.handle().open(request).unwrap();
        sending.send_layers(0..LAYERS).unwrap();
        (receiving, sending)
    }

    fn pull(&mut self, room: u64, tokens: u32) -> (Receiving, Serving) {
        let fetching = self.decode.node.handle().fetch(self.request(room, tokens)).unwrap();
        let pages = self.prefill.pool.take(self.prefill.layout.pages_for(tokens)).unwrap().share();
        let request = ServeRequest { room, use_count: 0, tokens, pages, aux: Vec::new(), deadline: WAIT };
        (fetching, self.prefill.node.handle().serve(request).unwrap())
    }

    fn request(&self, room: u64, tokens: u32) -> ReceiveRequest {
        let pages = self.decode.pool.take(self.decode.layout.pages_for(tokens)).unwrap();
        let peer = self.peer;
        ReceiveRequest { peer, room, use_count: 0, tokens, skip_tokens: 0, pages, deadline: WAIT }
    }

    /// Waits until a room has ended on both sides.
    fn ends(&mut self, decode: &mut Ticket<Received>, prefill: &mut Ticket<Ended>) {
        let (mut received, mut sent) = (None, None);
        self.turn_until("the room ends", |_| {
            received = received.take().or_else(|| decode.poll().unwrap().map(|received| received.ended.end));
            sent = sent.take().or_else(|| prefill.poll().unwrap().map(|sent| sent.end));
            received.is_some() && sent.is_some()
        });
        assert_eq!((received, sent), (Some(End::Delivered), Some(End::Delivered)));
    }

    fn took_turns(&self, begun: u64) {
        let turns = self.turns - begun;
        assert!(turns >= LEAST_TURNS, "{turns} turns, and no {LEAST_TURNS}: one sums more than its share");
    }

    /// Bytes of the source's control messages.
    fn said(&mut self) -> u64 {
        self.prefill.node.worker().unwrap().engine().counters().control_bytes_out
    }

    /// Bytes of rooms, by whoever moves them.
    fn moved(&mut self) -> u64 {
        let mut sides = [&mut self.prefill, &mut self.decode];
        let rails = sides.iter_mut().flat_map(|side| side.node.worker().unwrap().engine().rail_stats());
        rails.map(|rail| rail.written_bytes + rail.read_bytes).sum()
    }

    fn turn_until(&mut self, what: &str, mut reached: impl FnMut(&mut Self) -> bool) {
        let begin = Instant::now();
        while !reached(self) {
            self.prefill.node.progress();
            self.decode.node.progress();
            self.turns += 1;
            assert!(begin.elapsed() < WAIT, "waited for this: {what}");
        }
    }
}

impl Side {
    fn open(name: &str) -> Self {
        let layout = CacheLayout::new(LayoutOptions {
            model: "tiny".into(),
            model_layers: LAYERS,
            layers: 0..LAYERS,
            kind: CacheKind::Mla { latent_bytes: 1024, rope_bytes: 128 },
            dtype: Dtype::Bf16,
            page_tokens: PAGE_TOKENS,
            pages: (LONG + 4 * SHORT).div_ceil(PAGE_TOKENS) + 8,
            placement: Placement::LayerMajor { region: 0 },
        })
        .unwrap();
        let (memory, pool) = crossdock::allocate(&layout).unwrap();
        let mut config = Config::new(name, layout.clone(), memory, Authentication::Off);
        config.ports = vec![PortConfig::Shm(ShmOptions::default())];
        config.verify = Verify::All;
        config.progress = Progress::Caller;
        Self { node: Node::open(config).unwrap(), layout, pool }
    }
}

const fn bytes(tokens: u32) -> u64 {
    tokens as u64 * LAYERS as u64 * TOKEN_BYTES
}

fn is_open<T>(end: &mut Ticket<T>, meanwhile: &str) {
    assert!(
        end.poll().unwrap().is_none(),
        "the long room ended before a short one that was opened while {meanwhile}"
    );
}
