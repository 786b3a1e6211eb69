//! Measures what the port adds to a copy: ops of many pages against the bare copy routine, and the way of an immediate.
//!
//! `cargo bench -p crossdock-shm --bench port`
//!
//! Both ports live in this process; the target is mapped a second time by the writing port, as in a peer. The ways take
//! turns within each repeat, and medians are printed. Without `--bench` (under `cargo test`) it runs once over small
//! pools, to see that it works.

use std::time::{Duration, Instant};

use crossdock_memory::{AllocateOptions, Memory};
use crossdock_shm::copy::{Copier, Pieces};
use crossdock_shm::{ShmOptions, ShmPort};
use crossdock_transport::{
    Arm, Direction, Event, Events, GrantId, LaneId, LaneTags, Op, PeerId, Port, Shape, Token,
};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

fn main() {
    let is_bench = std::env::args().any(|argument| argument == "--bench");
    let scale = if is_bench {
        Scale { pool_bytes: 256 << 20, repeats: 7, rounds: 100_000 }
    } else {
        Scale { pool_bytes: 4 << 20, repeats: 1, rounds: 200 }
    };
    pages(&scale);
    immediates(&scale);
    for sleeps in [false, true] {
        ping_pong(&scale, sleeps);
    }
}

struct Scale {
    pool_bytes: usize,
    repeats: usize,
    rounds: u32,
}

/// A port, the lane to the other one, and its events.
struct Side {
    port: ShmPort,
    lane: LaneId,
    events: Events,
}

/// Scattered pages into the peer's memory: all of the pool once, by the port and by the bare routine.
fn pages(scale: &Scale) {
    println!("{:>10} {:>12} {:>12} {:>8}", "page", "port GB/s", "copy GB/s", "ratio");
    let [mut one, mut other] = connected();
    let (source, target) = (pool(scale.pool_bytes), pool(scale.pool_bytes));
    let (local, _) = one.port.register(&source).expect("memory can be registered");
    let (_, key) = other.port.register(&target).expect("memory can be registered");
    let attached = one.port.attach(one.lane, &key).expect("the peer's key");
    let mapping = attached.mapping.expect("shared memory is mapped");
    let copier = Copier::detect();
    for page_bytes in [1152usize, 4096, 16 << 10, 64 << 10, 1 << 20] {
        let pages = scale.pool_bytes / page_bytes;
        let (local_pages, remote_pages) = (shuffled(pages, 1), shuffled(pages, 2));
        let (mut by_port, mut bare) = (Vec::new(), Vec::new());
        for repeat in 0..2 * scale.repeats {
            source.fill(0, scale.pool_bytes, repeat as u8).expect("a whole pool can be filled");
            let begun = Instant::now();
            // By turns, and each as often first.
            if (repeat / 2 + repeat) % 2 == 0 {
                let op = Op {
                    direction: Direction::Write,
                    grant: GrantId::NONE,
                    shape: Shape::Pages {
                        local,
                        local_offset: 0,
                        local_stride_bytes: page_bytes as u64,
                        local_pages: &local_pages,
                        remote: attached.id,
                        remote_offset: 0,
                        remote_stride_bytes: page_bytes as u64,
                        remote_pages: &remote_pages,
                        piece_bytes: page_bytes as u64,
                    },
                    imm: Some(1),
                    token: Some(Token(1)),
                };
                post(&mut one, op);
                by_port.push(begun.elapsed());
                drain(&mut one);
                drain(&mut other);
            } else {
                let pieces = Pieces {
                    dst_base: mapping.base(),
                    dst_stride: page_bytes,
                    src_base: source.base(),
                    src_stride: page_bytes,
                    piece_bytes: page_bytes,
                    dst_index: &remote_pages,
                    src_index: &local_pages,
                };
                // SAFETY: both lists are permutations of the pages of the two pools, which are mapped apart.
                unsafe { copier.copy_pieces(pieces) };
                bare.push(begun.elapsed());
            }
        }
        let speed = |times: &mut Vec<Duration>| (pages * page_bytes) as f64 / median(times).as_nanos() as f64;
        let (by_port, bare) = (speed(&mut by_port), speed(&mut bare));
        println!("{page_bytes:>10} {by_port:>12.2} {bare:>12.2} {:>8.2}", by_port / bare);
    }
}

/// What an immediate costs its sender and its receiver, in batches.
fn immediates(scale: &Scale) {
    const BATCH: u32 = 256;
    let [mut one, mut other] = connected();
    let notices: Vec<Op<'_>> = (0..BATCH).map(Op::notify).collect();
    let (mut sent, mut heard) = (Vec::new(), Vec::new());
    for _ in 0..scale.repeats {
        let (mut sending, mut hearing) = (Duration::ZERO, Duration::ZERO);
        for _ in 0..scale.rounds / BATCH + 1 {
            let begun = Instant::now();
            let posted = one.port.post(one.lane, &notices).expect("the lane is up");
            assert_eq!(posted.ops, notices.len());
            sending += begun.elapsed();
            let begun = Instant::now();
            other.port.poll(&mut other.events);
            hearing += begun.elapsed();
            assert_eq!(other.events.len(), notices.len());
            other.events.clear();
        }
        let count = scale.rounds / BATCH * BATCH + BATCH;
        sent.push(sending / count);
        heard.push(hearing / count);
    }
    println!("an immediate: {:?} to post, {:?} to poll", median(&mut sent), median(&mut heard));
}

/// There and back between two threads.
fn ping_pong(scale: &Scale, sleeps: bool) {
    let [mut one, mut other] = connected();
    let rounds = if sleeps { scale.rounds / 10 } else { scale.rounds };
    let total = rounds * scale.repeats as u32;
    let echo = std::thread::spawn(move || {
        for round in 0..total {
            wait_for(&mut other, sleeps);
            other.port.post(other.lane, &[Op::notify(round)]).expect("the lane is up");
        }
        // The lane must not end before the last echo was heard.
        other
    });
    let mut times = Vec::new();
    for _ in 0..scale.repeats {
        let begun = Instant::now();
        for round in 0..rounds {
            one.port.post(one.lane, &[Op::notify(round)]).expect("the lane is up");
            wait_for(&mut one, sleeps);
        }
        times.push(begun.elapsed() / rounds);
    }
    echo.join().expect("the echo ends");
    println!("there and back, {}: {:?}", if sleeps { "asleep" } else { "awake" }, median(&mut times));
}

/// Until the next immediate.
fn wait_for(side: &mut Side, sleeps: bool) {
    loop {
        side.port.poll(&mut side.events);
        if side.events.drain().any(|event| matches!(event, Event::Arrived { .. })) {
            return;
        }
        match (sleeps, if sleeps { side.port.arm() } else { Arm::Ready }) {
            (true, Arm::Sleep(fd)) => {
                let second = Timespec { tv_sec: 1, tv_nsec: 0 };
                let woken = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&second));
                assert_eq!(woken, Ok(1), "the sleeper is woken");
            }
            _ => std::hint::spin_loop(),
        }
    }
}

fn post(side: &mut Side, op: Op<'_>) {
    let mut rest = op;
    loop {
        let posted = side.port.post(side.lane, &[rest]).expect("the lane is up");
        if posted.ops == 1 {
            return;
        }
        rest = rest.advance(posted.within);
    }
}

fn drain(side: &mut Side) {
    side.port.poll(&mut side.events);
    side.events.clear();
}

fn connected() -> [Side; 2] {
    let mut sides = [0, 1].map(|_| {
        let mut port = ShmPort::open(ShmOptions::default()).expect("a port can be opened");
        let (lane, address) = port.open_lane(PeerId(0)).expect("a lane can be opened");
        (Side { port, lane, events: Events::with_capacity(1024) }, address)
    });
    let [(one, here), (other, there)] = &mut sides;
    let tags = LaneTags { ours: [1; 32], theirs: [1; 32] };
    one.port.connect(one.lane, there, &tags).expect("a fresh lane connects");
    other.port.connect(other.lane, here, &tags).expect("a fresh lane connects");
    let begun = Instant::now();
    let mut up = 0;
    while up < 2 {
        for (side, _) in &mut sides {
            side.port.poll(&mut side.events);
            up += side.events.drain().filter(|event| matches!(event, Event::Up { .. })).count();
        }
        assert!(begun.elapsed() < Duration::from_secs(10), "waited for the lane");
    }
    sides.map(|(side, _)| side)
}

fn pool(bytes: usize) -> Memory {
    let options = AllocateOptions { prefault: true, ..AllocateOptions::default() };
    Memory::allocate(bytes, &options).expect("memory can be allocated")
}

/// A permutation, the same for the same seed.
fn shuffled(count: usize, seed: u64) -> Vec<u32> {
    let mut pages: Vec<u32> = (0..count as u32).collect();
    let mut state = seed;
    for at in (1..count).rev() {
        state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        pages.swap(at, (state >> 33) as usize % (at + 1));
    }
    pages
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort_unstable();
    times[times.len() / 2]
}
