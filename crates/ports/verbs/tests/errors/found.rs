//! What reviews have found, each so that it would be found again.

use std::time::{Duration, Instant};

use crossdock_transport::{
    Direction, DownCause, Error, Event, Events, GrantId, LaneTags, Op, PeerId, Port, Shape, Token,
};
use crossdock_verbs::VerbsPort;
use crossdock_verbs::fake::{DeviceOptions, Fabric, FabricOptions, Failure, Function, Pace};

use crate::network::{Network, SoftwareFabric};
use crate::pair::{Pair, impatient};

fn at_once() -> SoftwareFabric {
    SoftwareFabric(Fabric::new(FabricOptions { pace: Pace::AtOnce, ..FabricOptions::default() }))
}

/// An op goes to the device in several calls. When one of them is refused, none of the later ones is made: the immediate,
/// which comes last, would tell of bytes that were never sent.
#[test]
fn what_follows_a_refused_request_is_not_posted() {
    for refused in 0..3 {
        for accepted in [0, 1, 20] {
            let mut network = at_once();
            let mut pair = Pair::new(&mut network, impatient());
            pair.memory[0].fill(0, 150_000, 0x55).expect("inside");
            let pages: Vec<u32> = (0..150).collect();
            let shape = Shape::Pages {
                local: pair.regions[0],
                local_offset: 0,
                local_stride_bytes: 1000,
                local_pages: &pages,
                remote: pair.remotes[0],
                remote_offset: 0,
                remote_stride_bytes: 1000,
                remote_pages: &pages,
                piece_bytes: 1000,
            };
            let failure =
                Failure { accepted, after: refused, ..Failure::next(Function::PostSend, libc::ENOMEM) };
            network.0.fail(failure);
            let (imm, token) = (Some(7), Some(Token(1)));
            let op = Op { direction: Direction::Write, grant: GrantId::NONE, shape, imm, token };
            let lane = pair.lanes[0];
            // How much was taken is told as if all was well: the lane's end follows.
            pair.ports[0].post(lane, &[op]).expect("a good op on a lane that is up");
            pair.wait("the lane to be down", |pair| pair.down(0).is_some());
            pair.settle(Duration::from_millis(50));
            assert_eq!(pair.arrived(1), 0, "told as arrived with a hole ({refused}, {accepted})");
            assert!(!pair.done(0, 1));
        }
    }
}

/// A lane ends while the peer's immediates wait to be polled: all that were taken are told before `Down`, and their receives
/// serve the lanes that follow.
#[test]
fn arrivals_that_wait_at_the_end_are_told_and_cost_no_receive() {
    for seed in 0..4 {
        let mut options = impatient();
        options.immediates_per_lane = 20;
        let pace = Pace::AtOnce;
        let mut network =
            SoftwareFabric(Fabric::new(FabricOptions { seed, pace, ..FabricOptions::default() }));
        let mut ports = [0, 1].map(|device| network.open(device, options.clone()));
        for round in 0..8 {
            let opened = [0, 1].map(|side| ports[side].open_lane(PeerId(1)).expect("a lane can be opened"));
            let tags = |ours, theirs| LaneTags { ours: [ours; 32], theirs: [theirs; 32] };
            for (side, tags) in [(0, tags(1, 2)), (1, tags(2, 1))] {
                ports[side]
                    .connect(opened[side].0, &opened[1 - side].1, &tags)
                    .expect("a fresh lane connects");
            }
            let mut few = Events::with_capacity(4);
            let (mut up, mut down, mut arrived) = (0, 0, 0);
            let mut poll = |ports: &mut [crossdock_verbs::VerbsPort; 2], up: &mut u32, down: &mut u32| {
                for port in ports {
                    port.poll(&mut few);
                    for event in few.drain() {
                        match event {
                            Event::Up { .. } => *up += 1,
                            Event::Down { .. } => *down += 1,
                            Event::Arrived { .. } => arrived += 1,
                            Event::Done { .. } => {}
                        }
                    }
                }
            };
            let begun = Instant::now();
            while up < 2 {
                poll(&mut ports, &mut up, &mut down);
                assert!(begun.elapsed() < Duration::from_secs(10), "seed {seed}, round {round}: not up");
            }
            ports[0].close(opened[0].0);
            let posts =
                (0..18).map(|_| ports[1].post(opened[1].0, &[Op::notify(1)]).map_or(0, |posted| posted.ops));
            let taken: usize = posts.sum();
            while down < 2 {
                poll(&mut ports, &mut up, &mut down);
                assert!(begun.elapsed() < Duration::from_secs(20), "seed {seed}, round {round}: not down");
            }
            assert_eq!(arrived, taken, "seed {seed}, round {round}");
        }
        assert_eq!(network.0.counters().receivers_not_ready, 0, "seed {seed}: receives were lost");
    }
}

/// An owner that offers the same op again and again, which is not taken, says nothing to the peer by that.
#[test]
fn offering_in_vain_is_no_sign_of_life() {
    let mut options = impatient();
    options.immediates_per_lane = 10;
    let mut network = at_once();
    let mut pair = Pair::new(&mut network, options);
    let lane = pair.lanes[0];
    for _ in 0..10 {
        pair.post(0, Op::notify(1));
    }
    let mut events = Events::with_capacity(64);
    // The peer does not poll, so it gives no credits; everything is acknowledged. Then the link is cut.
    for _ in 0..10 {
        pair.ports[0].poll(&mut events);
        events.clear();
    }
    network.set_link(1, false);
    let begun = Instant::now();
    let mut is_down = false;
    while !is_down {
        assert!(begun.elapsed() < Duration::from_secs(20), "a dead rail is not noticed");
        let _ = pair.ports[0].post(lane, &[Op::notify(1)]);
        pair.ports[0].poll(&mut events);
        is_down = events.drain().any(|event| matches!(event, Event::Down { .. }));
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// A device that has failed for good ends its lanes and makes no new ones.
#[test]
fn a_device_that_has_failed_makes_no_lanes() {
    let mut network = SoftwareFabric::new();
    let mut pair = Pair::new(&mut network, impatient());
    network.0.fail_device(0);
    pair.wait("the lane to be down", |pair| pair.down(0).is_some());
    assert!(pair.ports[0].open_lane(PeerId(1)).is_err());
}

/// A queue pair that its device pushes into error: named by the event where there is one, else by what becomes of the next
/// request. The peer's end finds out by itself.
#[test]
fn a_queue_pair_that_breaks_by_itself_is_named() {
    for (event, name) in [(Some(QP_FATAL), "IBV_EVENT_QP_FATAL"), (None, "IBV_WC_WR_FLUSH_ERR")] {
        let mut network = SoftwareFabric::new();
        let mut pair = Pair::new(&mut network, impatient());
        let broken = network.0.queue_pairs().into_iter().find(|found| found.device == 0).expect("one each");
        network.0.break_queue_pair(0, broken.number, event);
        let endings = pair.endings();
        assert_eq!(endings, [name, "IBV_WC_RETRY_EXC_ERR"]);
        let Some(DownCause::Device(error)) = pair.down(0) else { unreachable!("it has a name") };
        assert_eq!(error.queue_pair, broken.number);
        assert!(!error.meaning.advice.is_empty());
    }
}

/// A peer is told of room when the receives for it are posted, and not while the device refuses them.
#[test]
fn credits_follow_receives() {
    let mut options = impatient();
    options.immediates_per_lane = 4;
    let mut network = at_once();
    let mut pair = Pair::new(&mut network, options);
    network.0.fail(Failure { times: 200, ..Failure::next(Function::PostSrqRecv, libc::ENOMEM) });
    let mut taken = 0;
    for at in 0..2000 {
        if taken < 60 {
            let lane = pair.lanes[0];
            taken += pair.ports[0].post(lane, &[Op::notify(at)]).expect("a good op").ops;
        }
        pair.poll();
    }
    assert_eq!((taken, pair.arrived(1)), (60, 60));
    assert_eq!(network.0.counters().receivers_not_ready, 0, "a credit came before its receive");
}

/// Whoever sends more immediates than it may is cut off; the lanes that share the receives with it go on.
#[test]
fn a_peer_that_floods_is_cut_off_and_costs_the_others_nothing() {
    for seed in 0..8 {
        let pace = Pace::Stepped { most: 30 };
        let fabric = Fabric::new(FabricOptions { seed, pace, ..FabricOptions::default() });
        let mut network = SoftwareFabric(fabric);
        let mut options = impatient();
        options.immediates_per_lane = 8;
        let mut pair = Pair::new(&mut network, options.clone());
        let honest = (pair.lanes, pair.remotes);
        options.floods = true;
        let mut flooder = network.open(0, options);
        std::mem::swap(&mut flooder, &mut pair.ports[0]);
        // The lane that the honest one has with the second port goes on beside that of the flooder.
        let (up, tags) = (
            [0, 1].map(|side| pair.ports[side].open_lane(PeerId(2)).expect("a lane can be opened")),
            [LaneTags { ours: [1; 32], theirs: [2; 32] }, LaneTags { ours: [2; 32], theirs: [1; 32] }],
        );
        let flooded = [up[0].0, up[1].0];
        for side in [0, 1] {
            let connected = pair.ports[side].connect(flooded[side], &up[1 - side].1, &tags[side]);
            connected.expect("a fresh lane connects");
        }
        // Both are polled, whoever sits in the pair.
        let mut events = Events::with_capacity(64);
        let (mut sent, mut flood, mut taken, mut is_cut_off) = (Vec::new(), 0, 0, false);
        for round in 0..20_000 {
            pair.poll();
            flooder.poll(&mut events);
            sent.extend(events.drain());
            // In the pair is the flooder, and `flooder` is the honest one.
            flood += pair.ports[0].post(flooded[0], &[Op::notify(7); 40]).map_or(0, |posted| posted.ops);
            if round % 4 == 0 && taken < 200 {
                let op = Op { token: Some(Token(taken)), ..Op::notify(9) };
                taken += flooder.post(honest.0[0], &[op]).expect("an honest lane stays up").ops as u64;
            }
            is_cut_off = pair.said[1].iter().any(|event| {
                matches!(event, Event::Down { lane, cause: DownCause::PeerMisbehaved { .. } } if *lane == flooded[1])
            });
            let done = sent.iter().filter(|event| matches!(event, Event::Done { .. })).count();
            if is_cut_off && done == 200 {
                break;
            }
        }
        assert!(is_cut_off, "seed {seed}: {flood} were sent, and it is not cut off: {:?}", pair.said[1]);
        let told = |lane| {
            let of = |event: &&Event| matches!(event, Event::Arrived { lane: at, .. } if *at == lane);
            pair.said[1].iter().filter(of).count()
        };
        assert_eq!(told(honest.0[1]), 200, "seed {seed}: of the honest one, everything arrives");
        assert!(!sent.iter().any(|event| matches!(event, Event::Down { .. })), "seed {seed}: {sent:?}");
        assert!(told(flooded[1]) < flood, "seed {seed}");
    }
}

/// Soft-RoCE does not tell when a queue pair takes no more of the shared receives. That is waited for a moment, and not until
/// the draining as a whole has had its time.
#[test]
fn a_lane_ends_soon_where_the_device_does_not_tell_of_its_last_receive() {
    let mut took = Duration::MAX;
    for _ in 0..5 {
        let device = DeviceOptions { tells_last_receive: false, ..DeviceOptions::default() };
        let devices = vec![device; 2];
        let mut network = SoftwareFabric(Fabric::new(FabricOptions {
            devices,
            pace: Pace::AtOnce,
            ..FabricOptions::default()
        }));
        let mut pair = Pair::new(&mut network, impatient());
        let lane = pair.lanes[0];
        let begun = Instant::now();
        pair.ports[0].close(lane);
        assert_eq!(pair.endings(), ["ClosedHere", "ClosedByPeer"]);
        took = took.min(begun.elapsed());
    }
    // 10 ms are meant, and 500 would be too long.
    assert!(took < Duration::from_millis(250), "{took:?}");
}

/// A port whose address changes (a lease, another subnet manager) is reached at the new one from then on; lanes that are up
/// stay up.
#[test]
fn new_lanes_are_opened_at_the_addresses_of_now() {
    let mut network = SoftwareFabric::new();
    let mut pair = Pair::new(&mut network, impatient());
    let before = pair.ports[0].describe();
    let first = (pair.lanes, pair.remotes);
    network.0.readdress(0);
    network.0.readdress(1);
    // A port that does not sleep looks at what its device reports now and then, and a lane that is opened is at what it knows.
    let begun = Instant::now();
    while !pair.ports.iter().all(|port| port.describe().contains("10.78.0.")) {
        assert!(begun.elapsed() < pair.patience, "{}", pair.ports[0].describe());
        pair.settle(Duration::from_millis(10));
        for port in &mut pair.ports {
            let (lane, _) = port.open_lane(PeerId(1)).expect("a lane can be opened");
            port.close(lane);
        }
    }
    pair.connect();
    let after = pair.ports[0].describe();
    assert!(before.contains("10.77.0.1") && after.contains("10.78.0.1"), "{before}; {after}");
    for (at, lane) in [(pair.lanes, pair.remotes), first].into_iter().enumerate() {
        (pair.lanes, pair.remotes) = lane;
        let write = pair.op(0, Direction::Write, 0, 5000);
        pair.post(0, Op { imm: Some(1), token: Some(Token(1)), ..write });
        pair.wait("a write on each lane", |pair| pair.arrived(1) == at + 1 && pair.done(0, 1));
    }
}

/// What a user asks for is what the device is told, and what is shown.
#[test]
fn what_is_asked_for_reaches_the_queue_pair() {
    let mut network = SoftwareFabric::new();
    let mut options = impatient();
    (options.gid_index, options.partition_key_index, options.mtu_bytes) = (Some(1), 1, Some(512));
    (options.service_level, options.traffic_class, options.hop_limit) = (5, 104, 3);
    let mut pair = Pair::new(&mut network, options);
    for found in network.0.queue_pairs() {
        assert_eq!((found.gid_index, found.partition_key_index, found.mtu_bytes), (1, 1, 512), "{found:?}");
        assert_eq!((found.service_level, found.traffic_class, found.hop_limit), (5, 104, 3), "{found:?}");
    }
    let shown = pair.ports[0].describe();
    for part in
        ["fake0:1", "gid 1 ", "fe80", "mtu 512", "pkey 0x8001", "service level 5", "traffic class 104"]
    {
        assert!(shown.contains(part), "{part}: {shown}");
    }
    let write = pair.op(0, Direction::Write, 0, 5000);
    pair.post(0, Op { imm: Some(1), ..write });
    pair.wait("a write", |pair| pair.arrived(1) == 1);
}

/// Ports of different partitions, and two limited members of one, hear nothing of each other: that is told at once.
#[test]
fn ports_of_different_partitions_do_not_connect() {
    let mut network = SoftwareFabric::new();
    for (ours, theirs, fits) in [(0, 0, true), (0, 1, false), (1, 1, true), (1, 2, true), (2, 2, false)] {
        let mut ports = [(0, ours), (1, theirs)].map(|(device, index)| {
            let mut options = impatient();
            options.partition_key_index = index;
            network.open(device, options)
        });
        let opened = ports.each_mut().map(|port| port.open_lane(PeerId(1)).expect("a lane can be opened"));
        let connected =
            ports[0].connect(opened[0].0, &opened[1].1, &LaneTags { ours: [1; 32], theirs: [2; 32] });
        match (fits, connected) {
            (true, Ok(())) => {}
            (false, Err(Error::BadAddress { reason })) => assert!(reason.contains("partition"), "{reason}"),
            (_, told) => panic!("{ours} and {theirs}: {told:?}"),
        }
    }
}

/// An iWARP device has ports that look usable, and connects by other means.
#[test]
fn a_device_of_another_transport_is_passed_over() {
    let iwarp = DeviceOptions { iwarp: true, ..DeviceOptions::default() };
    let devices = vec![iwarp, DeviceOptions::default()];
    let mut network = SoftwareFabric(Fabric::new(FabricOptions { devices, ..FabricOptions::default() }));
    assert_eq!(network.open(1, impatient()).info().name, "fake1:1");
    let mut options = impatient();
    options.verbs = Some(network.0.verbs());
    assert_eq!(VerbsPort::open(options.clone()).map(|port| port.info().name.clone()), Ok("fake1:1".into()));
    options.device = Some("fake0".into());
    let refused = VerbsPort::open(options).map(|_| ()).expect_err("it is iWARP");
    assert!(matches!(refused, Error::Unsupported { advice, .. } if advice.contains("iWARP")), "{refused}");
}

/// Memory that the device does not let go of stays registered, and can be let go of later.
#[test]
fn memory_that_is_not_deregistered_stays() {
    let mut network = SoftwareFabric::new();
    let mut pair = Pair::new(&mut network, impatient());
    let region = pair.regions[0];
    network.0.fail(Failure::next(Function::DeregMr, libc::EBUSY));
    assert!(pair.ports[0].deregister(region).is_err());
    assert_eq!(pair.ports[0].deregister(region), Ok(()));
}

/// `IBV_EVENT_QP_FATAL`.
const QP_FATAL: u32 = 1;
