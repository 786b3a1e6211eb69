//! What users hear when a node is gone: every call is refused, every ticket is told.

use std::time::{Duration, Instant};

use crossdock::{
    CacheKind, CacheLayout, Config, Dtype, Handle, LayoutOptions, Node, NotTaken, PagePool, Peer, Placement,
    Progress, ReceiveRequest, Receiving, SendRequest, Sending, Ticket, TicketError,
};

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
    let mut config = Config::new(name, layout.clone(), memory);
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
    match ticket.wait_until(Instant::now() + WAIT) {
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
    assert_eq!(told(&mut receiving.pages).unwrap().len(), pages as usize);
    assert!(!told(&mut sending.end).unwrap().is_delivered());
    assert_eq!(told(&mut stats), None);
    assert_eq!(pool.stats().free, pool.stats().pages);
}

#[test]
fn no_call_that_races_with_the_drop_of_a_node_is_left_behind() {
    for progress in PROGRESS {
        for _ in 0..20 {
            let Worker { node, pool, pages } = worker("decode", |config| config.progress = progress);
            let callers: Vec<_> = (0..3)
                .map(|caller| {
                    let (handle, pool) = (node.handle().clone(), pool.clone());
                    std::thread::spawn(move || {
                        let (mut receiving, mut sending, mut stats) = (Vec::new(), Vec::new(), Vec::new());
                        for room in 0..60 {
                            let room = caller * 1000 + room;
                            receiving.extend(receive(&handle, &pool, pages, Peer::node(7), room));
                            sending.extend(send(&handle, &pool, pages, room));
                            stats.extend(handle.stats());
                        }
                        receiving
                            .iter_mut()
                            .for_each(|room| drop((told(&mut room.end), told(&mut room.pages))));
                        sending.iter_mut().for_each(|room| drop(told(&mut room.end)));
                        stats.iter_mut().for_each(|stats| drop(told(stats)));
                    })
                })
                .collect();
            std::thread::sleep(Duration::from_micros(100));
            drop(node);
            callers.into_iter().for_each(|caller| caller.join().unwrap());
            assert_eq!(pool.stats().free, pool.stats().pages);
        }
    }
}
