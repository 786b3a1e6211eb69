//! One node prefills, another decodes, in one process: over each port, push and pull.

mod carriers;

use std::time::{Duration, Instant};

use crossdock::{
    Authentication, CacheLayout, Config, End, Memory, Node, PagePool, ReceiveRequest, SendRequest,
    ServeRequest, Verify,
};

use carriers::Carrier;

const WAIT: Duration = Duration::from_secs(20);

struct Worker {
    node: Node,
    layout: CacheLayout,
    memory: Memory,
    pool: PagePool,
}

fn worker(name: &str, page_tokens: u32, pages: u32, carrier: (&Carrier, usize), verify: Verify) -> Worker {
    let layout = CacheLayout::deepseek_r1(page_tokens, pages).unwrap();
    let (memory, pool) = crossdock::allocate(&layout).unwrap();
    let mut config = Config::new(name, layout.clone(), memory, Authentication::Off);
    carrier.0.equip(&mut config, carrier.1);
    config.verify = verify;
    let memory = config.memory[0].clone();
    Worker { node: Node::open(config).unwrap(), layout, memory, pool }
}

impl Worker {
    fn place(&self, layer: u32, pages: &[u32], first_page: u32, token: u32) -> usize {
        let at = self.layout.page_layout(layer).unwrap();
        let page = pages[(token / self.layout.page_tokens() - first_page) as usize];
        let in_page = u64::from(token % self.layout.page_tokens()) * self.layout.token_bytes();
        (at.page_offset(page).unwrap() + in_page) as usize
    }

    fn fill(&self, pages: &[u32], tokens: u32, salt: u64) {
        for layer in self.layout.layers() {
            for token in 0..tokens {
                self.memory.write(self.place(layer, pages, 0, token), &content(layer, token, salt)).unwrap();
            }
        }
    }

    fn check(&self, pages: &[u32], first_page: u32, tokens: std::ops::Range<u32>, salt: u64) {
        let mut found = [0; TOKEN];
        for layer in self.layout.layers() {
            for token in tokens.clone() {
                self.memory.read(self.place(layer, pages, first_page, token), &mut found).unwrap();
                assert_eq!(found, content(layer, token, salt), "layer {layer} token {token}");
            }
        }
    }
}

const TOKEN: usize = 1152;

fn content(layer: u32, token: u32, salt: u64) -> [u8; TOKEN] {
    let mut bytes = [0; TOKEN];
    for (at, word) in bytes.chunks_exact_mut(8).enumerate() {
        let seed = salt ^ u64::from(layer) << 48 ^ u64::from(token) << 16 ^ at as u64;
        word.copy_from_slice(&seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).to_le_bytes());
    }
    bytes
}

#[test]
fn push() {
    for carrier in Carrier::all() {
        let prefill = worker("prefill", 64, 32, (&carrier, 0), Verify::Off);
        let decode = worker("decode", 16, 64, (&carrier, 1), Verify::All);
        let (tokens, skip) = (300, 40);
        let (peer, mut up) = decode.node.handle().connect(prefill.node.address()).unwrap();
        up.wait_until(Instant::now() + WAIT).unwrap().unwrap();

        let source = prefill.pool.take(prefill.layout.pages_for(tokens)).unwrap();
        prefill.fill(source.ids(), tokens, 7);
        let pages = decode.pool.take(decode.layout.pages_for(tokens) - skip / 16).unwrap();
        let ids = pages.ids().to_vec();
        let mut receiving = decode
            .node
            .handle()
            .receive(ReceiveRequest {
                peer,
                room: 1,
                use_count: 0,
                tokens,
                skip_tokens: skip,
                pages,
                deadline: WAIT,
            })
            .unwrap();
        let mut sending = prefill
            .node
            .handle()
            .open(SendRequest { room: 1, use_count: 0, tokens, pages: source.share(), deadline: WAIT })
            .unwrap();
        for layer in 0..30 {
            sending.send_layers(layer..layer + 1).unwrap();
        }
        sending.send(30..61, 0..100).unwrap();
        sending.send(30..61, 100..tokens).unwrap();
        sending.finish(b"aux".to_vec()).unwrap();
        let received = receiving.end.wait_until(Instant::now() + WAIT).unwrap();
        assert_eq!(received.ended.end, End::Delivered, "{}", received.ended);
        assert_eq!(received.aux, b"aux");
        assert_eq!(&*received.ended.peer.unwrap(), "prefill");
        let sent = sending.end.wait_until(Instant::now() + WAIT).unwrap();
        assert_eq!(sent.end, End::Delivered);
        let home = receiving.pages.wait_until(Instant::now() + WAIT).unwrap();
        assert_eq!(home.ids(), ids);
        decode.check(&ids, skip / 16, skip..tokens, 7);
        drop(home);
        assert_eq!(decode.pool.stats().free, 64);
        let deadline = Instant::now() + WAIT;
        while prefill.pool.stats().free != 32 {
            assert!(Instant::now() < deadline, "source pages are not home: {:?}", prefill.pool.stats());
            std::thread::yield_now();
        }
    }
}

#[test]
fn pull() {
    for carrier in Carrier::all() {
        let prefill = worker("prefill", 64, 32, (&carrier, 0), Verify::Off);
        let decode = worker("decode", 64, 32, (&carrier, 1), Verify::All);
        let tokens = 200;
        let (peer, _up) = decode.node.handle().connect(prefill.node.address()).unwrap();
        let source = prefill.pool.take(prefill.layout.pages_for(tokens)).unwrap();
        prefill.fill(source.ids(), tokens, 9);
        let mut serving = prefill
            .node
            .handle()
            .serve(ServeRequest {
                room: 2,
                use_count: 0,
                tokens,
                pages: source.share(),
                aux: b"first".to_vec(),
                deadline: WAIT,
            })
            .unwrap();
        let pages = decode.pool.take(decode.layout.pages_for(tokens)).unwrap();
        let mut fetching = decode
            .node
            .handle()
            .fetch(ReceiveRequest {
                peer,
                room: 2,
                use_count: 0,
                tokens,
                skip_tokens: 0,
                pages,
                deadline: WAIT,
            })
            .unwrap();
        let received = fetching.end.wait_until(Instant::now() + WAIT).unwrap();
        assert_eq!(received.ended.end, End::Delivered, "{}", received.ended);
        assert_eq!(received.aux, b"first");
        let home = fetching.pages.wait_until(Instant::now() + WAIT).unwrap();
        decode.check(home.ids(), 0, 0..tokens, 9);
        assert_eq!(serving.end.wait_until(Instant::now() + WAIT).unwrap().end, End::Delivered);
    }
}
