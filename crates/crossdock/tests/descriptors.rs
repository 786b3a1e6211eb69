//! What a peer costs a process, over real sockets: descriptors, and heap; and that both are given back. A node has one
//! descriptor for its users however many peers it has.

use std::alloc::{GlobalAlloc, Layout, System};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd};
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::{Duration, Instant};

use crossdock::{
    Authentication, CacheKind, CacheLayout, Config, Dtype, LayoutOptions, Node, Placement, PortConfig,
    Progress, ShmOptions,
};

/// One test, because the process's descriptors are counted.
#[test]
fn a_peer_costs_few_descriptors_and_little_memory() {
    let most = std::env::var("CROSSDOCK_PEERS").map_or(16, |peers| peers.parse().expect("a number"));
    let shm = || PortConfig::Shm(ShmOptions::default());
    for (name, port, lanes, most_descriptors, most_heap_kb, own) in [
        ("tcp", PortConfig::Tcp(None), 1, 2, 420, Own { events: 3, all: 11 }),
        ("tcp, two lanes", PortConfig::Tcp(None), 2, 3, 720, Own { events: 3, all: 11 }),
        ("shm", shm(), 1, 6, 130, Own { events: 4, all: 12 }),
    ] {
        let [few, many] = [most / 4, most].map(|peers| Cost::of(&port, lanes, peers));
        let peers = (most - most / 4) as f64;
        let descriptors = (many.descriptors - few.descriptors) as f64 / peers;
        let heap_kb = (many.heap_bytes - few.heap_bytes) as f64 / peers / 1e3;
        println!(
            "{name}: a peer costs a side {descriptors:.2} descriptors and {heap_kb:.1} kB of heap; a node alone has {:?}; \
             with {most} peers {} descriptors in all on both sides, of them {:?}",
            many.own, many.all, many.kinds
        );
        assert!(descriptors <= f64::from(most_descriptors), "{name}: {descriptors} descriptors a peer");
        assert!(heap_kb <= f64::from(most_heap_kb), "{name}: {heap_kb} kB of heap a peer");
        for cost in [few, many] {
            assert_eq!(cost.own, own, "{name}: what a node has for itself");
        }
    }
}

/// What the sessions of one node with so many peers cost it and them, on both sides together, halved.
struct Cost {
    descriptors: i64,
    heap_bytes: i64,
    all: usize,
    kinds: BTreeMap<String, usize>,
    own: Own,
}

/// Descriptors of one node before it has a peer.
#[derive(Debug, PartialEq)]
struct Own {
    /// That wake somebody: its users, its loop, its heart, and its loop by shm's peers.
    events: usize,
    all: usize,
}

impl Cost {
    fn of(port: &PortConfig, lanes: u8, peers: usize) -> Self {
        let before = descriptors();
        let mut nodes: Vec<Node> = (0..=peers).map(|at| open(at, port, lanes)).collect();
        let alone = descriptors();
        let each = |of_all: usize| {
            assert_eq!(of_all % nodes.len(), 0, "all nodes have the same");
            of_all / nodes.len()
        };
        let own =
            Own { events: each(events(&alone) - events(&before)), all: each(alone.len() - before.len()) };
        let users: BTreeSet<i32> =
            nodes.iter().map(|node| node.handle().clone().event_fd().as_fd().as_raw_fd()).collect();
        let again = nodes.iter().map(|node| node.handle().event_fd().as_fd().as_raw_fd());
        assert_eq!((users.len(), again.collect()), (nodes.len(), users), "each node has one for its users");

        let heap = HEAP.load(Ordering::SeqCst);
        let (met, mut ups): (Vec<_>, Vec<_>) =
            nodes[1..].iter().map(|other| nodes[0].handle().connect(other.address()).expect("room")).unzip();
        turn_until(&mut nodes, || {
            ups.retain_mut(|up| up.poll().expect("the node runs").is_none_or(|up| up.is_err()));
            ups.is_empty()
        });
        let up = descriptors();
        let cost = Self {
            descriptors: (up.len() - alone.len()) as i64 / 2,
            heap_bytes: (HEAP.load(Ordering::SeqCst) - heap) / 2,
            all: up.len() - before.len(),
            kinds: count(&up),
            own,
        };
        // A session that is up does not grow by being used.
        turn_for(&mut nodes, Duration::from_millis(50));
        assert_eq!(descriptors().len(), up.len());
        // And leaves nothing behind.
        met.into_iter().for_each(|peer| nodes[0].handle().disconnect(peer).expect("room"));
        turn_until(&mut nodes, || descriptors().len() == alone.len());
        drop(nodes);
        assert_eq!(descriptors().len(), before.len(), "what is left of {:?}", count(&descriptors()));
        cost
    }
}

fn open(at: usize, port: &PortConfig, lanes: u8) -> Node {
    let layout = CacheLayout::new(LayoutOptions {
        model: "tiny".into(),
        model_layers: 1,
        layers: 0..1,
        kind: CacheKind::Mla { latent_bytes: 64, rope_bytes: 0 },
        dtype: Dtype::Bf16,
        page_tokens: 16,
        pages: 16,
        placement: Placement::LayerMajor { region: 0 },
    })
    .expect("a layout that makes sense");
    let (memory, _) = crossdock::allocate(&layout).expect("a little memory");
    let mut config = Config::new(format!("node-{at}"), layout, memory, Authentication::Off);
    config.ports = vec![port.clone()];
    config.lanes_per_rail = lanes;
    config.progress = Progress::Caller;
    Node::open(config).expect("a node")
}

fn turn_until(nodes: &mut [Node], mut reached: impl FnMut() -> bool) {
    let begin = Instant::now();
    while !reached() {
        for node in nodes.iter_mut() {
            node.progress();
        }
        assert!(begin.elapsed() < Duration::from_secs(60), "the sessions do not come up, or end");
    }
}

fn turn_for(nodes: &mut [Node], time: Duration) {
    let begin = Instant::now();
    turn_until(nodes, || begin.elapsed() >= time);
}

/// What this process has open, by what it is. Nodes have no pipes; a sanitizer that starts its symbolizer has two.
fn descriptors() -> Vec<String> {
    let open = std::fs::read_dir("/proc/self/fd").expect("Linux");
    // The directory's own is gone when its link is read.
    open.filter_map(|one| std::fs::read_link(one.ok()?.path()).ok())
        .map(|to| to.to_string_lossy().into_owned())
        .filter(|to| !to.starts_with("/proc/") && !to.starts_with("pipe:"))
        .collect()
}

/// Descriptors that wake somebody.
fn events(descriptors: &[String]) -> usize {
    descriptors.iter().filter(|to| *to == "anon_inode:[eventfd]").count()
}

fn count(descriptors: &[String]) -> BTreeMap<String, usize> {
    let mut kinds = BTreeMap::new();
    for to in descriptors {
        let kind = to.split([':', ' ']).next().unwrap_or_default().trim_start_matches('/');
        *kinds.entry(kind.to_owned()).or_default() += 1;
    }
    kinds
}

/// Bytes on the heap, of every thread.
static HEAP: AtomicI64 = AtomicI64::new(0);

struct Counting;

#[global_allocator]
static COUNTING: Counting = Counting;

// SAFETY: everything is handed to the system's allocator as it came; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        HEAP.fetch_add(layout.size() as i64, Ordering::SeqCst);
        // SAFETY: the caller keeps the contract of `alloc`, which is the same.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        HEAP.fetch_sub(layout.size() as i64, Ordering::SeqCst);
        // SAFETY: the caller keeps the contract of `dealloc`, and `at` came from the system's allocator.
        unsafe { System.dealloc(at, layout) }
    }
}
