//! What users hear when a node is gone: every call is refused, every ticket is told.

mod carriers;

use std::time::{Duration, Instant};

use crossdock::{
    Authentication, CacheKind, CacheLayout, Config, Dtype, End, Handle, LayoutOptions, Node, NotTaken,
    PagePool, PageSet, PagesTicket, Peer, Placement, Progress, ReceiveRequest, Receiving, SendRequest,
    Sending, ServeRequest, SessionEnd, Ticket, TicketError,
};

use carriers::Carrier;

const WAIT: Duration = Duration::from_secs(20);
const TOKENS: u32 = 100;
const PROGRESS: [Progress; 2] = [Progress::Thread { spin: Duration::from_micros(50) }, Progress::Caller];

struct Worker {
    node: Node,
    pool: PagePool,
    pages: u32,
}

fn worker(name: &str, change: impl FnOnce(&mut Config)) -> Worker {
    let layout = CacheLayout::new(LayoutOptions {
        model: "tiny".into(),
        model_layers: 3,
        layers: 0..3,
        kind: CacheKind::Mla { latent_bytes: 512, rope_bytes: 64 },
        dtype: Dtype::Bf16,
        page_tokens: 16,
        pages: 4096,
        placement: Placement::LayerMajor { region: 0 },
    })
    .unwrap();
    let (memory, pool) = crossdock::allocate(&layout).unwrap();
    let mut config = Config::new(name, layout.clone(), memory, Authentication::Off);
    change(&mut config);
    Worker { node: Node::open(config).unwrap(), pool, pages: layout.pages_for(TOKENS) }
}

fn receive(
    handle: &Handle,
    pool: &PagePool,
    pages: u32,
    peer: Peer,
    room: u64,
) -> Result<Receiving, NotTaken> {
    let pages = pool.take(pages).unwrap();
    handle.receive(ReceiveRequest {
        peer,
        room,
        use_count: 0,
        tokens: TOKENS,
        skip_tokens: 0,
        pages,
        deadline: WAIT * 10,
    })
}

fn send(handle: &Handle, pool: &PagePool, pages: u32, room: u64) -> Result<Sending, NotTaken> {
    let pages = pool.take(pages).unwrap().share();
    handle.open(SendRequest { room, use_count: 0, tokens: TOKENS, pages, deadline: WAIT * 10 })
}

/// What a ticket tells, whatever it is, but within a time in which only a promise that nobody keeps says nothing.
fn told<T>(ticket: &mut Ticket<T>) -> Option<T> {
    said(ticket.wait_until(Instant::now() + WAIT))
}

/// The same of pages.
fn home(ticket: &mut PagesTicket) -> Option<PageSet> {
    said(ticket.wait_until(Instant::now() + WAIT))
}

fn said<T>(told: Result<T, TicketError>) -> Option<T> {
    match told {
        Ok(told) => Some(told),
        Err(TicketError::Abandoned(_)) => None,
        Err(TicketError::TimedOut) => panic!("nothing will ever be told"),
    }
}

#[test]
fn a_handle_that_outlives_its_node_is_told_so() {
    for progress in PROGRESS {
        let Worker { node, pool, pages } = worker("decode", |config| config.progress = progress);
        let handle = node.handle().clone();
        let (peer, mut up) = handle.connect("127.0.0.1:9").unwrap();
        drop(node);
        told(&mut up);
        assert_eq!(receive(&handle, &pool, pages, peer, 1).unwrap_err(), NotTaken::Stopped);
        assert_eq!(send(&handle, &pool, pages, 1).unwrap_err(), NotTaken::Stopped);
        assert_eq!(handle.stats().unwrap_err(), NotTaken::Stopped);
        assert_eq!(handle.connect("127.0.0.1:9").unwrap_err(), NotTaken::Stopped);
        assert_eq!(handle.stop(), Err(NotTaken::Stopped));
        // What was refused is back in the pool.
        assert_eq!(pool.stats().free, pool.stats().pages);
    }
}

#[test]
fn what_waits_for_a_node_that_is_dropped_is_told() {
    let Worker { node, pool, pages } = worker("decode", |config| config.progress = Progress::Caller);
    let handle = node.handle().clone();
    // Nobody drives the loop: all of these wait in the queue.
    let (peer, mut up) = handle.connect("127.0.0.1:9").unwrap();
    let mut receiving = receive(&handle, &pool, pages, peer, 1).unwrap();
    let mut sending = send(&handle, &pool, pages, 2).unwrap();
    let mut stats = handle.stats().unwrap();
    drop(node);
    told(&mut up).unwrap().unwrap_err();
    assert!(!told(&mut receiving.end).unwrap().ended.is_delivered());
    assert_eq!(home(&mut receiving.pages).unwrap().len(), pages as usize);
    assert!(!told(&mut sending.end).unwrap().is_delivered());
    assert_eq!(told(&mut stats), None);
    assert_eq!(pool.stats().free, pool.stats().pages);
}

/// Two nodes with a session, the first of which has dialed.
fn pair(carrier: &Carrier, progress: [Progress; 2]) -> ([Worker; 2], Peer) {
    let mut node = 0;
    let [mut decode, mut prefill] = progress.map(|progress| {
        node += 1;
        worker("one", |config| {
            carrier.equip(config, node);
            config.progress = progress;
        })
    });
    let (peer, mut up) = decode.node.handle().connect(prefill.node.address()).unwrap();
    let deadline = Instant::now() + WAIT;
    let told = loop {
        decode.node.progress();
        prefill.node.progress();
        if let Some(told) = up.poll().unwrap() {
            break told;
        }
        assert!(Instant::now() < deadline, "no session");
    };
    told.unwrap();
    // The other side's last word of the handshake.
    for _ in 0..1000 {
        prefill.node.progress();
    }
    ([decode, prefill], peer)
}

/// Whether a peer that does nothing more can do nothing to pages that were granted, as soon as a node is gone. Over RDMA that
/// is so once the lane has ended: it waits a moment for the peer's device, and the node may be gone before.
fn refuses(carrier: &Carrier) -> Option<bool> {
    match carrier {
        Carrier::Shm => Some(false),
        Carrier::Tcp => Some(true),
        Carrier::Gpu(_) | Carrier::Fabric(_) | Carrier::Devices(_) => None,
    }
}

const GONE: End = End::PeerLost { cause: SessionEnd::ClosedHere };

#[test]
fn the_rooms_of_a_node_that_is_dropped_end_as_closed_here() {
    for carrier in Carrier::all() {
        for progress in PROGRESS {
            // The peer does nothing more: it neither releases nor unmaps.
            let ([mut decode, prefill], peer) = pair(&carrier, [progress, Progress::Caller]);
            let handle = decode.node.handle().clone();
            let (pool, pages) = (decode.pool.clone(), decode.pages);
            let mut receiving = receive(&handle, &pool, pages, peer, 1).unwrap();
            let mut sending = send(&handle, &pool, pages, 2).unwrap();
            let mut serving = handle
                .serve(ServeRequest {
                    room: 3,
                    use_count: 0,
                    tokens: TOKENS,
                    pages: pool.take(pages).unwrap().share(),
                    aux: Vec::new(),
                    deadline: WAIT * 10,
                })
                .unwrap();
            let fetch = ReceiveRequest {
                peer,
                room: 4,
                use_count: 0,
                tokens: TOKENS,
                skip_tokens: 0,
                pages: pool.take(pages).unwrap(),
                deadline: WAIT * 10,
            };
            let mut fetching = handle.fetch(fetch).unwrap();
            // All of them are open, and what was received is granted.
            let mut stats = handle.stats().unwrap();
            let deadline = Instant::now() + WAIT;
            while stats.poll().unwrap().is_none_or(|stats| stats.grants == 0) {
                decode.node.progress();
                assert!(Instant::now() < deadline, "nothing was granted");
            }
            drop(decode.node);
            assert_eq!(told(&mut receiving.end).unwrap().ended.end, GONE);
            assert_eq!(told(&mut fetching.end).unwrap().ended.end, GONE);
            assert_eq!(told(&mut sending.end).unwrap().end, GONE);
            assert_eq!(told(&mut serving.end).unwrap().end, GONE);
            // Reads of one's own have ended; what a peer may write is home only where the port refuses it.
            assert_eq!(home(&mut fetching.pages).map(|set| set.len()), Some(pages as usize));
            let home = home(&mut receiving.pages).map(|set| set.len());
            let is_home = refuses(&carrier).unwrap_or(home.is_some());
            assert_eq!(home, is_home.then_some(pages as usize), "{carrier:?} {progress:?}");
            let out = if is_home { 0 } else { pages as usize };
            assert_eq!(pool.stats().free as usize + out, pool.stats().pages as usize);
            drop(prefill);
        }
    }
}

#[test]
fn served_pages_stay_out_of_their_pool_as_long_as_a_peer_can_read_them() {
    for carrier in Carrier::all() {
        let ([mut decode, mut prefill], peer) = pair(&carrier, [Progress::Caller; 2]);
        let request = ServeRequest {
            room: 1,
            use_count: 0,
            tokens: TOKENS,
            pages: prefill.pool.take(prefill.pages).unwrap().share(),
            aux: Vec::new(),
            deadline: WAIT * 10,
        };
        let mut serving = prefill.node.handle().serve(request).unwrap();
        let request = ReceiveRequest {
            peer,
            room: 1,
            use_count: 0,
            tokens: TOKENS,
            skip_tokens: 0,
            pages: decode.pool.take(decode.pages).unwrap(),
            deadline: WAIT * 10,
        };
        let _fetching = decode.node.handle().fetch(request).unwrap();
        // It asks, and then stands still with a grant to read.
        decode.node.progress();
        let deadline = Instant::now() + WAIT;
        while prefill.node.worker().unwrap().stats().grants == 0 {
            prefill.node.progress();
            assert!(Instant::now() < deadline, "nobody asked");
        }
        drop(prefill.node);
        assert_eq!(told(&mut serving.end).unwrap().end, GONE);
        let stats = prefill.pool.stats();
        let is_home = refuses(&carrier).unwrap_or(stats.free == stats.pages);
        let out = if is_home { 0 } else { prefill.pages };
        assert_eq!(stats.free + out, stats.pages, "{carrier:?}");
    }
}

#[test]
fn no_call_that_races_with_the_drop_of_a_node_is_left_behind() {
    for carrier in Carrier::all() {
        for progress in PROGRESS {
            for _ in 0..10 {
                race(&carrier, progress);
            }
        }
    }
}

fn race(carrier: &Carrier, progress: Progress) {
    let is_tcp = matches!(carrier, Carrier::Tcp);
    let thread = Progress::Thread { spin: Duration::from_micros(50) };
    let ([mut decode, prefill], peer) = pair(carrier, [progress, thread]);
    let callers: Vec<_> = (0..3)
        .map(|caller| {
            let (handle, pool, pages) = (decode.node.handle().clone(), decode.pool.clone(), decode.pages);
            std::thread::spawn(move || {
                let (mut receiving, mut sending, mut stats) = (Vec::new(), Vec::new(), Vec::new());
                for room in 0..60 {
                    let room = caller * 1000 + room;
                    receiving.extend(receive(&handle, &pool, pages, peer, room));
                    sending.extend(send(&handle, &pool, pages, room));
                    stats.extend(handle.stats());
                }
                for room in &mut receiving {
                    assert_eq!(told(&mut room.end).unwrap().ended.end, GONE);
                    let home = home(&mut room.pages);
                    assert!(home.is_some() || !is_tcp);
                }
                for room in &mut sending {
                    assert_eq!(told(&mut room.end).unwrap().end, GONE);
                }
                stats.iter_mut().for_each(|stats| drop(told(stats)));
            })
        })
        .collect();
    for _ in 0..10 {
        decode.node.progress();
        std::thread::sleep(Duration::from_micros(10));
    }
    drop(decode.node);
    callers.into_iter().for_each(|caller| caller.join().unwrap());
    if is_tcp {
        assert_eq!(decode.pool.stats().free, decode.pool.stats().pages);
    }
    drop(prefill);
}
