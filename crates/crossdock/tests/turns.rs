//! A turn of the progress loop stays short, however many rooms there are: by count, not by the clock.

use std::time::{Duration, Instant};

use crossdock::{
    Authentication, CacheKind, CacheLayout, Config, Dtype, FetchRequest, LayoutOptions, Memory, Node,
    PagePool, Peer, Placement, PortConfig, Progress, ReceiveRequest, Receiving, SendRequest, Sending,
    ServeRequest, Serving, Verify,
};

const ROOMS: u32 = 200;
const ROOM_PAGES: u32 = 4;
const PAGE_TOKENS: u32 = 64;
const TOKEN_BYTES: u64 = 1152;
const ROOM_BYTES: u64 = (ROOM_PAGES * PAGE_TOKENS) as u64 * TOKEN_BYTES;
/// What a turn may move: its share, and what it had begun to post when that was used up.
const TURN_BYTES_MAX: u64 = (8 << 20) + ROOM_BYTES;
const WAIT: Duration = Duration::from_secs(60);

struct Side {
    node: Node,
    pool: PagePool,
    memory: Memory,
}

impl Side {
    fn open(name: &str, verify: Verify) -> Self {
        let layout = CacheLayout::new(LayoutOptions {
            model: "m".into(),
            model_layers: 1,
            layers: 0..1,
            kind: CacheKind::Mla { latent_bytes: TOKEN_BYTES as u32, rope_bytes: 0 },
            dtype: Dtype::Bf16,
            page_tokens: PAGE_TOKENS,
            pages: ROOMS * ROOM_PAGES,
            placement: Placement::LayerMajor { region: 0 },
        })
        .unwrap();
        let (memory, pool) = crossdock::allocate(&layout).unwrap();
        let mut config = Config::new(name, layout, memory.clone(), Authentication::Off);
        config.ports = vec![PortConfig::Shm(Default::default())];
        config.progress = Progress::Caller;
        config.verify = verify;
        Self { node: Node::open(config).unwrap(), pool, memory: memory[0].clone() }
    }

    /// One turn; how many bytes it posted.
    fn turn(&mut self) -> u64 {
        let before = self.moved();
        self.node.progress();
        self.moved() - before
    }

    fn moved(&mut self) -> u64 {
        let rails = self.node.worker().unwrap().stats().rails;
        rails.iter().map(|rail| rail.written_bytes + rail.read_bytes).sum()
    }
}

fn pair(verify: Verify) -> (Side, Side, Peer) {
    let mut prefill = Side::open("prefill", verify);
    let mut decode = Side::open("decode", verify);
    let (peer, mut up) = decode.node.handle().connect(prefill.node.address()).unwrap();
    let begin = Instant::now();
    while up.poll().unwrap().is_none_or(|up| up.is_err()) {
        assert!(begin.elapsed() < WAIT, "no session");
        prefill.turn();
        decode.turn();
    }
    (prefill, decode, peer)
}

/// Turns both until all rooms are delivered. Says what the longest turn of each moved.
fn deliver(prefill: &mut Side, decode: &mut Side, receiving: &mut [Receiving]) -> (u64, u64) {
    let begin = Instant::now();
    let mut longest = (0, 0);
    let mut delivered = 0;
    while delivered < receiving.len() {
        assert!(begin.elapsed() < WAIT, "{delivered} of {} rooms are delivered", receiving.len());
        longest = (longest.0.max(prefill.turn()), longest.1.max(decode.turn()));
        for room in &mut *receiving {
            if let Ok(Some(received)) = room.end.poll() {
                assert!(received.ended.is_delivered(), "{}", received.ended);
                delivered += 1;
            }
        }
    }
    longest
}

#[test]
fn many_rooms_that_are_pushed_share_a_turn() {
    let (mut prefill, mut decode, peer) = pair(Verify::Off);
    let (tokens, deadline) = (ROOM_PAGES * PAGE_TOKENS, WAIT);
    let mut receiving: Vec<Receiving> = (0..u64::from(ROOMS))
        .map(|room| {
            let pages = decode.pool.take(ROOM_PAGES).unwrap();
            let request =
                ReceiveRequest { peer, room, use_count: 0, tokens, skip_tokens: 0, pages, deadline };
            decode.node.handle().receive(request).unwrap()
        })
        .collect();
    let mut sending: Vec<Sending> = (0..u64::from(ROOMS))
        .map(|room| {
            let pages = prefill.pool.take(ROOM_PAGES).unwrap().share();
            let request = SendRequest { room, use_count: 0, tokens, pages, deadline };
            prefill.node.handle().open(request).unwrap()
        })
        .collect();
    for room in &mut sending {
        // The queue of commands is short, and taken by the node's turns.
        while room.send_layers(0..1).is_err() {
            prefill.turn();
        }
        while room.finish(Vec::new()).is_err() {
            prefill.turn();
        }
    }
    let (longest, _) = deliver(&mut prefill, &mut decode, &mut receiving);
    assert!(longest <= TURN_BYTES_MAX, "a turn posted {longest} bytes");
    assert!(longest > ROOM_BYTES, "turns that post one room only would be slow: {longest} bytes");
}

#[test]
fn many_rooms_that_are_pulled_and_summed_share_a_turn() {
    let (mut prefill, mut decode, peer) = pair(Verify::All);
    prefill.memory.write(0, &[7; 100_000]).unwrap();
    let (tokens, deadline) = (ROOM_PAGES * PAGE_TOKENS, WAIT);
    let mut serving: Vec<Serving> = (0..u64::from(ROOMS))
        .map(|room| {
            let pages = prefill.pool.take(ROOM_PAGES).unwrap().share();
            let request = ServeRequest { room, use_count: 0, tokens, pages, aux: Vec::new(), deadline };
            prefill.node.handle().serve(request).unwrap()
        })
        .collect();
    let mut receiving: Vec<Receiving> = (0..u64::from(ROOMS))
        .map(|room| {
            let pages = decode.pool.take(ROOM_PAGES).unwrap();
            let request = FetchRequest { peer, room, use_count: 0, tokens, skip_tokens: 0, pages, deadline };
            decode.node.handle().fetch(request).unwrap()
        })
        .collect();
    let (_, longest) = deliver(&mut prefill, &mut decode, &mut receiving);
    assert!(longest <= TURN_BYTES_MAX, "a turn posted {longest} bytes");
    // Until the readers have said so, the pages may still be read, and stay out of their pool.
    let begin = Instant::now();
    while serving.iter_mut().any(|room| matches!(room.end.poll(), Ok(None))) {
        assert!(begin.elapsed() < WAIT, "a served room has not ended");
        prefill.turn();
        decode.turn();
    }
}
