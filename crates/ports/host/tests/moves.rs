//! What is told of moves that go on behind the port's back, and when: carried out by hand.

mod later;

use std::time::{Duration, Instant};

use crossdock_host::{HostOptions, HostPort, Refusal, regions_left_exposed};
use crossdock_memory::{AllocateOptions, Memory};
use crossdock_transport::{
    Arm, Direction, DownCause, Error, Event, Events, GrantId, LaneId, LaneTags, LocalId, Op, PeerId, Port,
    Posted, RemoteId, RemoteKey, Shape, Token,
};
use later::{FAILURE, Hand, Later, Limits, Pace};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

#[test]
fn nothing_is_told_before_its_move_is_over() {
    let mut pair = Pair::new();
    let [here, there] = pair.lanes;
    pair.post(&[Op { imm: Some(1), token: Some(Token(2)), ..pair.write(0, 1000) }]);
    pair.settle();
    assert_eq!((pair.one.done(here), pair.other.arrived(there)), (vec![], vec![]));
    assert!(content(&pair.target).iter().all(|byte| *byte == 0));
    assert_eq!(pair.hand.carry_out_all(), 1);
    pair.settle();
    assert_eq!((pair.one.done(here), pair.other.arrived(there)), (vec![2], vec![1]));
    assert!(content(&pair.target)[..1000].iter().all(|byte| *byte == SENT));
}

#[test]
fn reads_are_done_when_their_bytes_are_here() {
    let mut pair = Pair::new();
    pair.target.fill(0, BYTES, 9).expect("a whole memory can be filled");
    let op = Op { direction: Direction::Read, token: Some(Token(1)), ..pair.write(0, BYTES as u64) };
    pair.post(&[op]);
    pair.settle();
    assert_eq!(pair.one.done(pair.lanes[0]), []);
    pair.hand.carry_out_all();
    pair.settle();
    assert_eq!(pair.one.done(pair.lanes[0]), [1]);
    assert_eq!(content(&pair.source), vec![9; BYTES]);
}

#[test]
fn what_follows_a_move_waits_for_it() {
    let mut pair = Pair::new();
    let [here, there] = pair.lanes;
    let ops = [
        // Nobody is told of the first: its ticket is waited for all the same.
        pair.write(0, 100),
        Op { token: Some(Token(1)), ..Op::notify(1) },
        Op::notify(2),
        Op { imm: Some(3), ..pair.write(100, 100) },
        Op { token: Some(Token(4)), ..pair.write(200, 100) },
        Op { token: Some(Token(5)), ..Op::notify(5) },
    ];
    pair.post(&ops);
    let told: [(&[u64], &[u32]); 4] =
        [(&[], &[]), (&[1], &[1, 2]), (&[1], &[1, 2, 3]), (&[1, 4, 5], &[1, 2, 3, 5])];
    for (moves, (done, arrived)) in told.into_iter().enumerate() {
        assert_eq!(pair.hand.carry_out(usize::from(moves > 0)), usize::from(moves > 0));
        pair.settle();
        assert_eq!(pair.one.done(here), done, "after {moves} moves");
        assert_eq!(pair.other.arrived(there), arrived, "after {moves} moves");
    }
    // With nothing on its way, a notification is there when `post` returns.
    pair.post(&[Op::notify(6)]);
    pair.other.poll();
    assert_eq!(pair.other.arrived(there).last(), Some(&6));
}

#[test]
fn lanes_do_not_wait_for_each_other() {
    let mut pair = Pair::new();
    let [second, there] = pair.connect();
    pair.post(&[Op { imm: Some(1), ..pair.write(0, 100) }]);
    assert_eq!(pair.one.port.post(second, &[Op::notify(2)]), Ok(Posted { ops: 1, within: 0 }));
    pair.settle();
    assert_eq!((pair.other.arrived(pair.lanes[1]), pair.other.arrived(there)), (vec![], vec![2]));
}

#[test]
fn a_long_op_comes_in_parts_and_is_told_with_its_last() {
    let mut pair =
        Pair::with(HostOptions::default(), Limits { pieces: 3, span_bytes: 1000, ..Limits::default() });
    let pages: Vec<u32> = (0..8).rev().collect();
    let (local, remote) = (pair.local, pair.remote);
    let op = Op {
        shape: Shape::Pages {
            local,
            local_offset: 0,
            local_stride_bytes: 500,
            local_pages: &pages,
            remote,
            remote_offset: 7,
            remote_stride_bytes: 500,
            remote_pages: &pages,
            piece_bytes: 400,
        },
        imm: Some(1),
        token: Some(Token(1)),
        ..pair.write(0, 0)
    };
    assert_eq!(pair.one.port.post(pair.lanes[0], &[op]), Ok(Posted { ops: 0, within: 3 }));
    assert_eq!(pair.one.port.post(pair.lanes[0], &[op.advance(3)]), Ok(Posted { ops: 0, within: 3 }));
    pair.hand.carry_out_all();
    pair.settle();
    assert_eq!(pair.other.arrived(pair.lanes[1]), []);
    assert_eq!(pair.one.port.post(pair.lanes[0], &[op.advance(6)]), Ok(Posted { ops: 1, within: 0 }));
    pair.settle();
    assert_eq!(pair.other.arrived(pair.lanes[1]), []);
    pair.hand.carry_out_all();
    pair.settle();
    assert_eq!((pair.one.done(pair.lanes[0]), pair.other.arrived(pair.lanes[1])), (vec![1], vec![1]));
    let found = content(&pair.target);
    for (at, byte) in found.iter().enumerate() {
        let is_sent = (7..7 + 8 * 500).contains(&at) && (at - 7) % 500 < 400;
        assert_eq!(*byte, if is_sent { SENT } else { 0 }, "at {at}");
    }
}

/// A ring of four: what waits for its move has its room there already.
#[test]
fn room_is_set_aside_for_what_waits() {
    let options = HostOptions { immediates_per_lane: 4, ..HostOptions::default() };
    let mut pair = Pair::with(options, Limits::default());
    let [here, there] = pair.lanes;
    // Two are in the ring and unread.
    pair.post(&[Op::notify(0), Op::notify(1)]);
    let ops: Vec<Op<'_>> =
        (2..10).map(|at| Op { imm: Some(at), ..pair.write(u64::from(at) * 10, 10) }).collect();
    assert_eq!(pair.one.port.post(here, &ops).map(|posted| posted.ops), Ok(2));
    assert_eq!(pair.one.port.counters().short_by_immediates, 1);
    // Also when the moves are over, there is no room but theirs, until the peer reads.
    pair.hand.carry_out_all();
    pair.one.poll();
    assert_eq!(pair.one.port.post(here, &ops[2..]).map(|posted| posted.ops), Ok(0));
    let mut taken = 2;
    pair.feed(&ops, &mut taken, |pair| assert!(pair.hand.carry_out(1) <= 1));
    pair.settle();
    assert_eq!(pair.other.arrived(there), (0..10).collect::<Vec<_>>());
}

#[test]
fn tokens_and_moves_are_limited_and_nothing_is_lost() {
    let options = HostOptions { immediates_per_lane: 4, ..HostOptions::default() };
    let mut pair = Pair::with(options, Limits::default());
    let here = pair.lanes[0];
    let ops: Vec<Op<'_>> =
        (0..20).map(|at| Op { token: Some(Token(at)), ..pair.write(at * 10, 10) }).collect();
    assert_eq!(pair.one.port.post(here, &ops).map(|posted| posted.ops), Ok(4));
    let mut taken = 4;
    pair.feed(&ops, &mut taken, |pair| assert!(pair.hand.carry_out(3) <= 3));
    assert_eq!(pair.one.done(here), (0..20).collect::<Vec<_>>());
    // Where few events fit, what is over and has not been reported takes its room, too.
    let more: Vec<Op<'_>> =
        (20..28).map(|at| Op { token: Some(Token(at)), ..pair.write(at * 10, 10) }).collect();
    assert_eq!(pair.one.port.post(here, &more).map(|posted| posted.ops), Ok(4));
    pair.hand.carry_out(3);
    let mut one_event = Events::with_capacity(1);
    pair.one.port.poll(&mut one_event);
    assert_eq!(pair.one.port.post(here, &more[4..]).map(|posted| posted.ops), Ok(1));
    pair.one.events.extend(one_event.drain());
    let mut taken = 5;
    pair.feed(&more, &mut taken, |pair| assert!(pair.hand.carry_out(1) <= 1));
    assert_eq!(pair.one.done(here), (0..28).collect::<Vec<_>>());
    // Nobody is told of these, and between two regions each is a move of its own.
    let (_, key) = pair.other.port.register(&memory()).expect("memory can be registered");
    let second = pair.one.port.attach(here, &key).expect("a key of the peer").id;
    let ops: Vec<Op<'_>> = (0..20)
        .map(|at| span(pair.local, if at % 2 == 0 { pair.remote } else { second }, at * 10, 10))
        .collect();
    assert_eq!(pair.one.port.post(here, &ops).map(|posted| posted.ops), Ok(4));
    let counters = pair.one.port.counters();
    assert_eq!((counters.short_by_moves > 0, pair.hand.waiting()), (true, 4));
    let mut taken = 4;
    pair.feed(&ops, &mut taken, |pair| assert!(pair.hand.carry_out(1) <= 1));
    assert!(content(&pair.target)[180..190].iter().all(|byte| *byte == SENT));
}

#[test]
fn a_lane_ends_when_its_moves_are_over() {
    for closer in [0, 1] {
        let mut pair = Pair::new();
        let [here, there] = pair.lanes;
        pair.post(&[Op { imm: Some(1), token: Some(Token(1)), ..pair.write(0, 100) }, pair.write(100, 100)]);
        let lanes = pair.lanes;
        pair.sides()[closer].port.close(lanes[closer]);
        for moves in 0..2 {
            assert_eq!(pair.hand.carry_out(moves), moves);
            pair.settle();
            assert_eq!((pair.one.down(here), pair.other.down(there)), (None, None), "{closer}, {moves}");
        }
        // What moved is told, also on a lane that closes.
        assert_eq!((pair.one.done(here), pair.other.arrived(there)), (vec![1], vec![1]));
        assert_eq!(pair.one.port.post(here, &[Op::notify(1)]), Err(Error::LaneDown { lane: here }));
        pair.hand.carry_out_all();
        pair.settle();
        let causes = [pair.one.down(here), pair.other.down(there)];
        assert_eq!(causes[closer], Some(DownCause::ClosedHere));
        assert_eq!(causes[1 - closer], Some(DownCause::ClosedByPeer));
        assert!(content(&pair.target)[..200].iter().all(|byte| *byte == SENT));
    }
}

#[test]
fn a_part_of_an_op_is_a_move_like_any_other() {
    let mut pair = Pair::with(HostOptions::default(), Limits { span_bytes: 1000, ..Limits::default() });
    let [here, there] = pair.lanes;
    let op = pair.write(0, 1500);
    assert_eq!(pair.one.port.post(here, &[op]), Ok(Posted { ops: 0, within: 1000 }));
    assert_eq!(pair.one.port.deregister(pair.local), Err(Error::RegionInUse { by: "an op" }));
    pair.one.port.close(here);
    pair.settle();
    assert_eq!((pair.one.down(here), pair.other.down(there)), (None, None));
    pair.hand.carry_out_all();
    pair.settle();
    assert_eq!(pair.one.down(here), Some(DownCause::ClosedHere));
    assert_eq!(pair.other.down(there), Some(DownCause::ClosedByPeer));
}

#[test]
fn a_move_that_fails_ends_its_lane_untold() {
    let mut pair = Pair::new();
    let [here, there] = pair.lanes;
    let [second, second_there] = pair.connect();
    let op = |pair: &Pair, at: u32| Op {
        imm: Some(at),
        token: Some(Token(at.into())),
        ..pair.write(u64::from(at) * 100, 100)
    };
    pair.post(&[op(&pair, 1), op(&pair, 2), op(&pair, 3), Op::notify(4)]);
    pair.hand.let_fail(1);
    pair.hand.carry_out(2);
    pair.settle();
    assert_eq!((pair.one.done(here), pair.other.arrived(there)), (vec![1], vec![1]));
    // The third is on its way still, and touches memory.
    assert_eq!((pair.one.down(here), pair.other.down(there)), (None, None));
    let refused = pair.one.port.post(here, &[Op::notify(5)]);
    assert_eq!(refused, Err(Error::LaneDown { lane: here }));
    pair.hand.carry_out_all();
    pair.settle();
    assert_eq!((pair.one.done(here), pair.other.arrived(there)), (vec![1], vec![1]));
    assert_eq!(pair.one.down(here), Some(FAILURE));
    assert_eq!(pair.other.down(there), Some(DownCause::ClosedByPeer));
    // Another lane of the same port has no part in it.
    assert_eq!(pair.one.port.post(second, &[Op::notify(6)]), Ok(Posted { ops: 1, within: 0 }));
    pair.settle();
    assert_eq!((pair.one.down(second), pair.other.arrived(second_there)), (None, vec![6]));
}

#[test]
fn a_refused_op_or_lane_takes_nothing_with_it() {
    let mut pair = Pair::new();
    let [here, there] = pair.lanes;
    let told = Op { imm: Some(1), ..pair.write(0, 100) };
    let reason = Error::BadOp { reason: "not by this medium" };
    pair.hand.refuse(Refusal::Op(reason.clone()));
    assert_eq!(pair.one.port.post(here, &[told]), Err(reason));
    pair.post(&[told]);
    pair.hand.refuse(Refusal::Lane(FAILURE));
    assert_eq!(pair.one.port.post(here, &[told]), Err(Error::LaneDown { lane: here }));
    pair.settle();
    assert_eq!(pair.one.down(here), None, "the first is on its way");
    pair.hand.carry_out_all();
    pair.settle();
    assert_eq!((pair.one.down(here), pair.other.arrived(there)), (Some(FAILURE), vec![1]));
}

#[test]
fn regions_are_kept_while_a_move_uses_them() {
    let options = HostOptions { max_peer_descriptors: 1, ..HostOptions::default() };
    let mut pair = Pair::with(options, Limits::default());
    let [here, there] = pair.lanes;
    pair.post(&[Op { imm: Some(1), ..pair.write(0, 100) }]);
    let (local, remote) = (pair.local, pair.remote);
    let in_use = Err(Error::RegionInUse { by: "an op" });
    assert_eq!(pair.one.port.deregister(local), in_use);
    // The peer has no say in it: it retires its region, and this end holds on to it as long as it must. The medium looks
    // that it does.
    pair.other.port.deregister(LocalId(0)).expect("no grant uses it");
    pair.settle();
    let gone = Error::UnknownRegion { side: "remote", region: remote.0 };
    assert_eq!(pair.one.port.post(here, &[span(local, remote, 0, 1)]), Err(gone));
    assert!(matches!(pair.one.port.attach(here, &pair.key), Err(Error::BadKey { .. })));
    assert_eq!(pair.one.port.deregister(local), in_use);
    pair.hand.carry_out_all();
    pair.settle();
    assert_eq!(pair.other.arrived(there), [1]);
    assert_eq!(pair.one.port.deregister(local), Ok(()));
    assert!(pair.source.is_last_handle());
    // And no longer: its descriptor's place is free.
    let (_, key) = pair.other.port.register(&memory()).expect("memory can be registered");
    assert!(pair.one.port.attach(here, &key).is_ok());
}

#[test]
fn the_owner_polls_while_moves_are_on_their_way_and_sleeps_otherwise() {
    let options = HostOptions { immediates_per_lane: 1, ..HostOptions::default() };
    let mut pair = Pair::with(options, Limits::default());
    let here = pair.lanes[0];
    pair.settle();
    assert!(matches!(pair.one.port.arm(), Arm::Sleep(_)));
    let op = pair.write(0, 100);
    pair.post(&[op]);
    assert!(matches!(pair.one.port.arm(), Arm::Spin));
    assert_eq!(pair.one.port.post(here, &[op]).map(|posted| posted.ops), Ok(0), "one at a time");
    pair.one.poll();
    assert!(matches!(pair.one.port.arm(), Arm::Spin));
    pair.hand.carry_out_all();
    pair.one.poll();
    assert!(matches!(pair.one.port.arm(), Arm::Ready), "the poster was told to come again");
    assert!(matches!(pair.one.port.arm(), Arm::Sleep(_)), "who does not come back is not kept awake");
}

#[test]
fn a_peer_that_sleeps_is_woken_when_it_is_told() {
    let mut pair = Pair::new();
    pair.post(&[Op { imm: Some(1), ..pair.write(0, 100) }]);
    pair.settle();
    let Arm::Sleep(fd) = pair.other.port.arm() else { panic!("nothing happens at the peer") };
    let is_woken = |time| {
        let time = Timespec::try_from(time).expect("a short time");
        poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&time)) == Ok(1)
    };
    assert!(!is_woken(Duration::from_millis(1)));
    pair.hand.carry_out_all();
    pair.one.poll();
    assert!(is_woken(PATIENCE));
}

#[test]
fn a_medium_that_wakes_lets_the_owner_sleep() {
    let mut pair = Pair::open(HostOptions::default(), Limits::default(), Pace::ByThread);
    let here = pair.lanes[0];
    for round in 0..200 {
        // Now and then the medium asks for patience.
        while pair.one.port.post(here, &[Op { token: Some(Token(round)), ..pair.write(0, 100) }])
            != Ok(Posted { ops: 1, within: 0 })
        {
            pair.one.poll();
        }
        let begun = Instant::now();
        while pair.one.done(here).len() <= round as usize {
            assert!(begun.elapsed() < PATIENCE, "waited for the move of round {round}");
            let woken = match pair.one.port.arm() {
                Arm::Ready => true,
                Arm::Sleep(fd) => {
                    let patience = Timespec::try_from(PATIENCE).expect("a short time");
                    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&patience)) == Ok(1)
                }
                Arm::Spin => panic!("the medium wakes"),
            };
            assert!(woken, "asleep though the move of round {round} is over");
            pair.one.poll();
        }
    }
}

#[test]
fn a_dropped_port_lets_its_moves_come_to_their_end() {
    let mut pair = Pair::new();
    let there = pair.lanes[1];
    pair.post(&[Op { imm: Some(1), ..pair.write(0, 100) }, Op { imm: Some(2), ..pair.write(100, 100) }]);
    let Pair { one, mut other, mut source, target, hand, .. } = pair;
    drop(one);
    assert_eq!(hand.waiting(), 0);
    other.wait("the end", |other| other.down(there) == Some(DownCause::ClosedByPeer));
    assert_eq!(other.arrived(there), [1, 2]);
    assert!(content(&target)[..200].iter().all(|byte| *byte == SENT));
    assert!(source.is_last_handle());
}

/// What they use stays as it is, and the peer is not told that they have stopped.
#[test]
fn a_dropped_port_leaves_moves_alone_that_come_to_no_end() {
    let mut pair = Pair::new();
    let [_, there] = pair.lanes;
    let [_, second_there] = pair.connect();
    pair.post(&[Op { imm: Some(1), ..pair.write(0, 100) }]);
    pair.hand.be_stubborn();
    let left_before = regions_left_exposed();
    let Pair { one, mut other, mut source, target, hand, .. } = pair;
    drop(one);
    other.wait("the end of the lane that has no moves", |other| other.down(second_there).is_some());
    for _ in 0..200 {
        other.poll();
    }
    assert_eq!(other.down(there), None);
    // Another test of this process may add to it.
    assert!(regions_left_exposed() > left_before && !source.is_last_handle());
    // The medium looks that both sides are still there.
    assert_eq!(hand.carry_out_all(), 1);
    assert!(content(&target)[..100].iter().all(|byte| *byte == SENT));
    assert_eq!(other.arrived(there), [], "nobody is left who tells of it");
}

/// Two ports of one process with a lane between them, of which the first writes into the other's region.
struct Pair {
    one: Side,
    other: Side,
    lanes: [LaneId; 2],
    hand: Hand,
    source: Memory,
    local: LocalId,
    target: Memory,
    key: RemoteKey,
    remote: RemoteId,
}

/// A port, and all that it has reported.
struct Side {
    port: HostPort<Later>,
    events: Vec<Event>,
    buffer: Events,
}

impl Pair {
    fn new() -> Self {
        Self::with(HostOptions::default(), Limits::default())
    }

    fn with(options: HostOptions, limits: Limits) -> Self {
        Self::open(options, limits, Pace::ByHand)
    }

    fn open(options: HostOptions, limits: Limits, pace: Pace) -> Self {
        let side = |options: HostOptions| {
            let (port, hand) = later::open(options, pace, limits);
            (Side { port, events: Vec::new(), buffer: Events::with_capacity(64) }, hand)
        };
        let ((mut one, hand), (mut other, _)) = (side(options.clone()), side(options));
        let (source, target) = (memory(), memory());
        source.fill(0, BYTES, SENT).expect("a whole memory can be filled");
        let (local, _) = one.port.register(&source).expect("memory can be registered");
        let (_, key) = other.port.register(&target).expect("memory can be registered");
        let lanes = connect(&mut one, &mut other);
        let attached = one.port.attach(lanes[0], &key).expect("a key of the peer");
        let remote = attached.id;
        Self { one, other, lanes, hand, source, local, target, key, remote }
    }

    fn connect(&mut self) -> [LaneId; 2] {
        connect(&mut self.one, &mut self.other)
    }

    fn sides(&mut self) -> [&mut Side; 2] {
        [&mut self.one, &mut self.other]
    }

    /// A write to where it comes from.
    fn write(&self, offset: u64, bytes: u64) -> Op<'static> {
        span(self.local, self.remote, offset, bytes)
    }

    #[track_caller]
    fn post(&mut self, ops: &[Op<'_>]) {
        assert_eq!(self.one.port.post(self.lanes[0], ops), Ok(Posted::all(ops)));
    }

    /// Offers the rest again and again, until all is taken and nothing is on its way.
    fn feed(&mut self, ops: &[Op<'_>], taken: &mut usize, step: impl Fn(&mut Self)) {
        let begun = Instant::now();
        while *taken < ops.len() || self.hand.waiting() > 0 {
            assert!(begun.elapsed() < PATIENCE, "took {taken} of {}", ops.len());
            step(self);
            self.one.poll();
            self.other.poll();
            let posted = self.one.port.post(self.lanes[0], &ops[*taken..]).expect("the lane is up");
            assert_eq!(posted.within, 0);
            *taken += posted.ops;
        }
        self.settle();
    }

    /// Long enough for whatever can happen.
    fn settle(&mut self) {
        let begun = Instant::now();
        for _ in (0..).take_while(|turns| *turns < 40 || begun.elapsed() < Duration::from_millis(20)) {
            self.one.poll();
            self.other.poll();
        }
    }
}

impl Side {
    fn poll(&mut self) {
        self.port.poll(&mut self.buffer);
        self.events.extend(self.buffer.drain());
    }

    fn done(&self, lane: LaneId) -> Vec<u64> {
        let done = |event: &Event| match event {
            Event::Done { lane: on, token } if *on == lane => Some(token.0),
            _ => None,
        };
        self.events.iter().filter_map(done).collect()
    }

    fn arrived(&self, lane: LaneId) -> Vec<u32> {
        let arrived = |event: &Event| match event {
            Event::Arrived { lane: on, imm } if *on == lane => Some(*imm),
            _ => None,
        };
        self.events.iter().filter_map(arrived).collect()
    }

    fn down(&self, lane: LaneId) -> Option<DownCause> {
        let of_lane = |event: &Event| match event {
            Event::Down { lane: on, cause } if *on == lane => Some(*cause),
            _ => None,
        };
        self.events.iter().find_map(of_lane)
    }

    #[track_caller]
    fn wait(&mut self, what: &str, done: impl Fn(&Self) -> bool) {
        let begun = Instant::now();
        while !done(self) {
            assert!(begun.elapsed() < PATIENCE, "waited for {what}; heard {:?}", self.events);
            self.poll();
        }
    }
}

fn connect(one: &mut Side, other: &mut Side) -> [LaneId; 2] {
    let (here, here_address) = one.port.open_lane(PeerId(0)).expect("a lane can be opened");
    let (there, there_address) = other.port.open_lane(PeerId(0)).expect("a lane can be opened");
    let tags = |side: u8| LaneTags { ours: [side; 32], theirs: [1 - side; 32] };
    one.port.connect(here, &there_address, &tags(0)).expect("a fresh lane connects");
    other.port.connect(there, &here_address, &tags(1)).expect("a fresh lane connects");
    let begun = Instant::now();
    while !one.events.contains(&Event::Up { lane: here })
        || !other.events.contains(&Event::Up { lane: there })
    {
        assert!(begun.elapsed() < PATIENCE, "waited for a lane");
        one.poll();
        other.poll();
    }
    [here, there]
}

fn span(local: LocalId, remote: RemoteId, offset: u64, bytes: u64) -> Op<'static> {
    Op {
        direction: Direction::Write,
        grant: GrantId::NONE,
        shape: Shape::Span { local, local_offset: offset, remote, remote_offset: offset, bytes },
        imm: None,
        token: None,
    }
}

fn memory() -> Memory {
    Memory::allocate(BYTES, &AllocateOptions::default()).expect("memory can be allocated")
}

fn content(memory: &Memory) -> Vec<u8> {
    let mut content = vec![0; memory.bytes()];
    memory.read(0, &mut content).expect("a whole memory can be read");
    content
}

const BYTES: usize = 8192;
const SENT: u8 = 7;
const PATIENCE: Duration = Duration::from_secs(10);
