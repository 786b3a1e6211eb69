//! A node over a small cache, whose every byte is known.

use std::net::SocketAddr;
use std::time::{Duration, Instant};

use crossdock::{
    Authentication, CacheKind, CacheLayout, Config, Dtype, Handle, LayoutOptions, Memory, Node, PagePool,
    PageSet, Placement, PortConfig, ShmOptions, Stats, TcpOptions, Verify,
};

use crate::Proxy;
use crate::chance::{GOLDEN, mix};
use crate::gpu::GpuChoice;

/// A worker of the tests.
#[derive(Debug)]
pub struct Worker {
    /// Its node.
    pub node: Node,
    /// What its threads work with.
    pub bench: Bench,
}

/// What each thread of a worker's works with.
#[derive(Clone, Debug)]
pub struct Bench {
    /// The node's.
    pub handle: Handle,
    /// Over the pages of the cache.
    pub pool: PagePool,
    layout: CacheLayout,
    memory: Memory,
}

/// How a worker is opened.
#[derive(Clone, Debug)]
pub struct WorkerOptions {
    /// For people.
    pub name: String,
    /// Its number, the same over restarts.
    pub node: u64,
    /// Pages of its cache, of 16 tokens each.
    pub pages: u32,
    /// Whether it opens a port over shared memory.
    pub shm: bool,
    /// Whether it opens one over TCP.
    pub tcp: bool,
    /// The ports of the proxies that stand before its control address and its tcp port.
    pub behind: Option<[u16; 2]>,
    /// The port of a proxy that stands before a second tcp port.
    pub second: Option<u16>,
    /// Whether its decode side compares checksums.
    pub verify: bool,
    /// The GPU that its cache is on, whose port is then its only one.
    pub gpu: Option<GpuChoice>,
}

impl Worker {
    /// Opens a node; it is known by its options' number.
    pub fn open(options: &WorkerOptions) -> Result<Self, crossdock::Error> {
        Self::open_with(options, |_| ())
    }

    /// The same, with a change of what a node of the tests is told.
    pub fn open_with(
        options: &WorkerOptions,
        change: impl FnOnce(&mut Config),
    ) -> Result<Self, crossdock::Error> {
        let layout = layout(options.pages);
        let (memory, pool) = crossdock::allocate(&layout)?;
        // 32 bytes that all workers of the tests have.
        let key = Authentication::PreSharedKey(vec![7; 32]);
        let mut config = Config::new(&options.name, layout.clone(), memory, key);
        config.node = Some(options.node);
        config.verify = if options.verify { Verify::All } else { Verify::Off };
        config.heartbeat = Duration::from_millis(100);
        config.handshake_timeout = Duration::from_secs(2);
        config.drain_timeout = Duration::from_secs(2);
        config.lane_retry = Duration::from_millis(200);
        // What ended lately is remembered, and the places of grants are used in turns: few enough of both that the tables
        // have their full size soon, and do not look like leaks.
        config.max_parked = 256;
        config.max_grants = 512;
        let mut tcp = TcpOptions {
            connect_timeout: Duration::from_secs(2),
            close_timeout: Duration::from_millis(300),
            ..TcpOptions::default()
        };
        if let Some([control, data]) = options.behind {
            let back = |port| SocketAddr::new(Proxy::BACK, port);
            config.bind = back(control);
            config.advertise = Some(Proxy::FRONT);
            tcp.bind = back(data);
            tcp.advertise = Some(Proxy::FRONT);
        }
        config.ports.clear();
        if options.shm {
            config.ports.push(PortConfig::Shm(ShmOptions::default()));
        }
        if options.tcp {
            config.ports.push(PortConfig::Tcp(Some(tcp.clone())));
        }
        if let Some(port) = options.second {
            tcp.bind = SocketAddr::new(Proxy::BACK, port);
            tcp.advertise = Some(Proxy::FRONT);
            config.ports.push(PortConfig::Tcp(Some(tcp)));
        }
        if let Some(choice) = options.gpu {
            let (gpu, port) = choice.open()?;
            config.memory = crossdock::allocate_on(&gpu, &layout)?.0;
            config.ports = vec![port];
        }
        change(&mut config);
        let memory = config.memory.clone();
        let node = Node::open(config)?;
        let bench = Bench { handle: node.handle().clone(), pool, layout, memory: memory[0].clone() };
        Ok(Self { node, bench })
    }

    /// Opens a node over TCP behind two proxies: one before its control address, and its heartbeats, and one before its
    /// lanes.
    pub fn behind(seed: u64, node: u64, verify: bool) -> (Self, [Proxy; 2]) {
        // Another program may have the port on the other address.
        for again in 0..50 {
            let start =
                |place| Proxy::start(seed ^ (node << 32 | again << 8 | place)).expect("loopback has ports");
            let proxies = [start(1), start(2)];
            let opened = Worker::open(&WorkerOptions {
                name: format!("node-{node}"),
                node,
                pages: 256,
                shm: false,
                tcp: true,
                behind: Some([proxies[0].port(), proxies[1].port()]),
                second: None,
                verify,
                gpu: None,
            });
            match opened {
                Ok(worker) => return (worker, proxies),
                Err(error) => assert!(error.is_retryable(), "{error}"),
            }
        }
        panic!("no port is free on both loopback addresses");
    }

    /// Opens a node with two rails over TCP, the second of them behind a proxy that lets everything pass.
    pub fn with_two_rails(node: u64) -> (Self, Proxy) {
        for again in 0..50 {
            let proxy = Proxy::start(node << 32 | again).expect("loopback has ports");
            proxy.set_storm(false);
            let opened = Worker::open(&WorkerOptions {
                name: format!("node-{node}"),
                node,
                pages: 256,
                shm: false,
                tcp: true,
                behind: None,
                second: Some(proxy.port()),
                verify: true,
                gpu: None,
            });
            match opened {
                Ok(worker) => return (worker, proxy),
                Err(error) => assert!(error.is_retryable(), "{error}"),
            }
        }
        panic!("no port is free on both loopback addresses");
    }
}

impl Bench {
    /// Writes the whole cache once, so that all of it is resident from the beginning.
    pub fn touch(&self) {
        let zeros = vec![0; 1 << 20];
        for at in (0..self.memory.bytes()).step_by(zeros.len()) {
            let bytes = zeros.len().min(self.memory.bytes() - at);
            self.memory.write(at, &zeros[..bytes]).expect("within the memory");
        }
    }

    /// The longest request that rooms are made for.
    pub const LONGEST_TOKENS: u32 = 400;

    /// Takes pages, waiting for others to come home; `None` if that takes longer than anything may.
    pub fn take(&self, pages: u32, within: Duration) -> Option<PageSet> {
        let until = Instant::now() + within;
        loop {
            match self.pool.take(pages) {
                Ok(set) => return Some(set),
                Err(_) if Instant::now() >= until => return None,
                Err(_) => std::thread::sleep(Duration::from_millis(2)),
            }
        }
    }

    /// Pages for so many tokens.
    pub fn pages_for(&self, tokens: u32) -> u32 {
        self.layout.pages_for(tokens)
    }

    /// The layers of the cache.
    pub fn layers(&self) -> std::ops::Range<u32> {
        self.layout.layers()
    }

    /// Computes all layers of a room.
    pub fn fill(&self, pages: &[u32], room: u64, tokens: u32) {
        self.each_page(pages, room, tokens, |at, bytes| {
            self.memory.write(at, bytes).expect("the layout lies within the memory");
        });
    }

    /// Whether the pages hold what was computed for the room.
    pub fn is_right(&self, pages: &[u32], room: u64, tokens: u32) -> bool {
        let mut is_right = true;
        let mut found = vec![0; self.layout.page_bytes() as usize];
        self.each_page(pages, room, tokens, |at, bytes| {
            let found = &mut found[..bytes.len()];
            self.memory.read(at, found).expect("the layout lies within the memory");
            is_right &= found == bytes;
        });
        is_right
    }

    fn each_page(&self, pages: &[u32], room: u64, tokens: u32, mut each: impl FnMut(usize, &[u8])) {
        let token_bytes = self.layout.token_bytes() as usize;
        let mut bytes = Vec::new();
        for layer in self.layout.layers() {
            let layout = self.layout.page_layout(layer).expect("the layer is one of the layout's");
            for (at, &page) in (0u32..).zip(pages) {
                let tokens = tokens.saturating_sub(at * PAGE_TOKENS).min(PAGE_TOKENS);
                let seed = mix(room << 20 ^ u64::from(layer) << 16 ^ u64::from(at));
                bytes.clear();
                let words = 0..u64::from(tokens) * token_bytes as u64 / 8;
                bytes.extend(words.flat_map(|word| (seed ^ word.wrapping_mul(GOLDEN)).to_le_bytes()));
                each(layout.page_offset(page).expect("the page is one of the layout's") as usize, &bytes);
            }
        }
    }

    /// What its node holds; `None` if its loop does not answer in time.
    pub fn stats(&self, within: Duration) -> Option<Stats> {
        self.handle.stats().ok()?.wait_until(Instant::now() + within).ok()
    }

    /// Waits until nothing is left with it but its sessions, if any; says what is, if something stays.
    pub fn is_empty(&self, sessions: usize, within: Duration) -> Result<(), String> {
        let until = Instant::now() + within;
        loop {
            let (stats, pool) =
                (self.stats(within).ok_or("the progress loop does not answer")?, self.pool.stats());
            let left = stats.rooms + stats.grants + stats.sessions.saturating_sub(sessions);
            if left == 0 && pool.free == pool.pages {
                return Ok(());
            }
            if Instant::now() >= until {
                let Stats { rooms, grants, sessions, .. } = stats;
                return Err(format!("{rooms} rooms, {grants} grants, {sessions} sessions, {pool:?}"));
            }
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

const PAGE_TOKENS: u32 = 16;
const LAYERS: u32 = 3;

fn layout(pages: u32) -> CacheLayout {
    CacheLayout::new(LayoutOptions {
        model: "small".into(),
        model_layers: LAYERS,
        layers: 0..LAYERS,
        kind: CacheKind::Mla { latent_bytes: 512, rope_bytes: 64 },
        dtype: Dtype::Bf16,
        page_tokens: PAGE_TOKENS,
        pages,
        placement: Placement::LayerMajor { region: 0 },
    })
    .expect("a layout that holds together")
}
