//! What only this port promises, between two ports of one process.

mod common;

use std::time::Duration;

use common::{Side, connect, content, settle, shared, tags, wait, write};
use crossdock_shm::ShmOptions;
use crossdock_transport::{
    Arm, Direction, DownCause, Error, Event, Fence, GrantId, LaneId, LocalId, Mapping, Op, PeerId, Port,
    Posted, RemoteId, RemoteKey, Shape, Token,
};
use rustix::process::{Resource, getrlimit, setrlimit};

/// Two ports with a lane between them.
struct Pair {
    one: Side,
    other: Side,
    lanes: [LaneId; 2],
}

impl Pair {
    fn new(options: ShmOptions) -> Self {
        let (mut one, mut other) = (Side::open(options.clone()), Side::open(options));
        let lanes = connect(&mut one, &mut other);
        Self { one, other, lanes }
    }

    fn sides(&mut self) -> [&mut Side; 2] {
        [&mut self.one, &mut self.other]
    }

    #[track_caller]
    fn wait(&mut self, what: &str, done: impl Fn(&Side, &Side) -> bool) {
        wait(self.sides(), what, done);
    }

    /// Registers memory at the other port; its key.
    fn region_there(&mut self, bytes: usize) -> (crossdock_memory::Memory, RemoteKey) {
        let memory = shared(bytes);
        let (_, key) = self.other.port.register(&memory).expect("memory can be registered");
        (memory, key)
    }

    fn mapping(&mut self, key: &RemoteKey) -> Mapping {
        let attached = self.one.port.attach(self.lanes[0], key).expect("a key of the peer");
        attached.mapping.expect("shared memory is mapped")
    }
}

#[test]
fn a_region_is_pushed_to_lanes_that_are_up() {
    let mut pair = Pair::new(ShmOptions::default());
    let (memory, key) = pair.region_there(4096);
    let (local, _) = pair.one.port.register(&shared(4096)).expect("memory can be registered");
    // Neither side has polled since: the announcement waits in the socket.
    let attached = pair.one.port.attach(pair.lanes[0], &key).expect("a key of the peer");
    assert_eq!(attached.bytes, 4096);
    memory.fill(0, 4096, 7).expect("a whole memory can be filled");
    pair.one.port.post(pair.lanes[0], &[write(local, attached.id, 4000)]).expect("the lane is up");
    let found = content(&memory);
    assert!(found[..4000].iter().all(|byte| *byte == 0) && found[4000..].iter().all(|byte| *byte == 7));
}

#[test]
fn a_key_whose_announcement_is_on_its_way_is_not_known_yet() {
    let (mut one, mut other) = (Side::open(ShmOptions::default()), Side::open(ShmOptions::default()));
    let [here, _] = connect(&mut one, &mut other);
    let (_, known) = other.port.register(&shared(64)).expect("memory can be registered");
    let mut unknown = known.bytes().to_vec();
    // The number of a region follows the name of its port.
    unknown[20] += 1;
    let unknown = RemoteKey::new(&unknown).expect("as long as before");
    assert_eq!(one.port.attach(here, &unknown).map(|_| ()), Err(Error::NotYet));
    assert!(one.port.attach(here, &known).is_ok());
}

#[test]
fn a_deregistered_region_leaves_the_peers_tables() {
    let mut pair = Pair::new(ShmOptions::default());
    let (_memory, key) = pair.region_there(4096);
    let (local, _) = pair.one.port.register(&shared(4096)).expect("memory can be registered");
    let lane = pair.lanes[0];
    let remote = pair.one.port.attach(lane, &key).expect("a key of the peer").id;
    let again = pair.one.port.attach(lane, &key).expect("the same key").id;
    assert_eq!(remote, again);
    let mapping = pair.mapping(&key);
    pair.other.port.deregister(LocalId(0)).expect("no grant uses it");
    settle(pair.sides());
    let gone = Error::UnknownRegion { side: "remote", region: remote.0 };
    assert_eq!(pair.one.port.post(lane, &[write(local, remote, 1)]), Err(gone));
    assert!(matches!(pair.one.port.attach(lane, &key), Err(Error::BadKey { .. })));
    // What the caller holds stays mapped until it lets go.
    // SAFETY: the mapping is that long and alive.
    unsafe { mapping.base().write(1) };
}

#[test]
fn a_mapping_that_is_held_keeps_both_ends_from_going_down() {
    for closer in [0, 1] {
        let mut pair = Pair::new(ShmOptions::default());
        let (_memory, key) = pair.region_there(4096);
        let mapping = pair.mapping(&key);
        let clone = mapping.clone();
        let lanes = pair.lanes;
        pair.sides()[closer].port.close(lanes[closer]);
        settle(pair.sides());
        drop(mapping);
        settle(pair.sides());
        assert_eq!(pair.one.down(lanes[0]), None, "a clone of the mapping is alive here");
        assert_eq!(pair.other.down(lanes[1]), None, "and can still be stored through there");
        let refused = pair.one.port.post(lanes[0], &[Op::notify(1)]);
        assert_eq!(refused, Err(Error::LaneDown { lane: lanes[0] }));
        // The end of the last clone, on another thread, wakes the sleeping port.
        assert!(!pair.one.sleep(Duration::from_millis(1)), "nothing to do until then");
        let holder = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            drop(clone);
        });
        assert!(pair.one.sleep(Duration::from_secs(5)), "woken by the end of the mapping");
        holder.join().expect("the holder ends");
        pair.wait("both ends to be down", |one, other| {
            one.down(lanes[0]).is_some() && other.down(lanes[1]).is_some()
        });
        let causes = [pair.one.down(lanes[0]), pair.other.down(lanes[1])];
        assert_eq!(causes[closer], Some(DownCause::ClosedHere));
        assert_eq!(causes[1 - closer], Some(DownCause::ClosedByPeer));
    }
}

#[test]
fn a_mapping_outlives_its_port_and_its_end_tells_the_peer() {
    let mut pair = Pair::new(ShmOptions::default());
    let (memory, key) = pair.region_there(4096);
    let mapping = pair.mapping(&key);
    let Pair { one, mut other, lanes } = pair;
    drop(one);
    for _ in 0..200 {
        other.poll();
    }
    assert_eq!(other.down(lanes[1]), None, "the peer's port is gone, its mapping is not");
    // SAFETY: the mapping is that long and alive.
    unsafe { mapping.base().write(9) };
    assert_eq!(content(&memory)[0], 9);
    drop(mapping);
    other.wait("the end of the mapping", |other| other.down(lanes[1]) == Some(DownCause::ClosedByPeer));
}

#[test]
fn a_writer_sleeps_until_there_is_room() {
    let mut pair = Pair::new(ShmOptions { immediates_per_lane: 2, ..ShmOptions::default() });
    let lanes = pair.lanes;
    let notices = [Op::notify(1), Op::notify(2), Op::notify(3)];
    assert_eq!(pair.one.port.post(lanes[0], &notices), Ok(Posted { ops: 2, within: 0 }));
    assert!(!pair.one.sleep(Duration::from_millis(5)), "the peer has taken nothing");
    pair.other.poll();
    assert!(pair.one.sleep(Duration::from_secs(5)), "woken by the room");
    pair.one.poll();
    assert_eq!(pair.one.port.post(lanes[0], &notices[2..]), Ok(Posted { ops: 1, within: 0 }));
    assert!(!pair.one.sleep(Duration::from_millis(1)), "nothing is waited for any more");
    assert_eq!(pair.one.port.counters().short_by_immediates, 1);
}

#[test]
fn a_post_that_moved_its_share_is_not_to_sleep() {
    let mut pair = Pair::new(ShmOptions { bytes_per_turn: 1000, ..ShmOptions::default() });
    let (memory, key) = pair.region_there(4096);
    let lane = pair.lanes[0];
    let source = shared(4096);
    source.fill(0, 4096, 5).expect("a whole memory can be filled");
    let (local, _) = pair.one.port.register(&source).expect("memory can be registered");
    let remote = pair.one.port.attach(lane, &key).expect("a key of the peer").id;
    let mut op = Op { imm: Some(1), token: Some(Token(2)), ..write(local, remote, 2500) };
    for _ in 0..2 {
        assert_eq!(pair.one.port.post(lane, &[op]), Ok(Posted { ops: 0, within: 1000 }));
        assert!(matches!(pair.one.port.arm(), Arm::Ready));
        assert!(matches!(pair.one.port.arm(), Arm::Sleep(_)), "who does not come back is not kept awake");
        op = op.advance(1000);
    }
    settle(pair.sides());
    assert_eq!(pair.other.arrived(pair.lanes[1]), 0, "the immediate goes with the last part");
    assert_eq!(pair.one.port.post(lane, &[op]), Ok(Posted { ops: 1, within: 0 }));
    let there = pair.lanes[1];
    pair.wait("the last part", |one, other| {
        other.arrived(there) == 1 && one.events.contains(&Event::Done { lane, token: Token(2) })
    });
    assert_eq!(content(&memory)[..2500], [5; 2500]);
    assert_eq!(content(&memory)[2500..], [0; 4096 - 2500]);
}

/// A piece that is larger than a turn's share moves whole, and the rest of a long list is checked when it moves.
#[test]
fn a_list_that_changes_between_two_parts_is_checked_again() {
    let mut pair = Pair::new(ShmOptions { bytes_per_turn: 100, ..ShmOptions::default() });
    let (memory, key) = pair.region_there(4096);
    let lane = pair.lanes[0];
    let source = shared(4096);
    source.fill(0, 4096, 5).expect("a whole memory can be filled");
    let (local, _) = pair.one.port.register(&source).expect("memory can be registered");
    let remote = pair.one.port.attach(lane, &key).expect("a key of the peer").id;
    let local_pages = vec![0u32, 1, 2, 3];
    let mut remote_pages = vec![3u32, 2, 1, 0];
    fn op<'a>(ids: (LocalId, RemoteId), lists: [&'a [u32]; 2]) -> Op<'a> {
        Op {
            direction: Direction::Write,
            grant: GrantId::NONE,
            shape: Shape::Pages {
                local: ids.0,
                local_offset: 0,
                local_stride_bytes: 1024,
                local_pages: lists[0],
                remote: ids.1,
                remote_offset: 0,
                remote_stride_bytes: 1024,
                remote_pages: lists[1],
                piece_bytes: 512,
            },
            imm: None,
            token: None,
        }
    }
    let taken = pair.one.port.post(lane, &[op((local, remote), [&local_pages, &remote_pages])]);
    assert_eq!(taken, Ok(Posted { ops: 0, within: 1 }));
    remote_pages[1] = 1_000_000;
    let rest = op((local, remote), [&local_pages, &remote_pages]).advance(1);
    let refused = pair.one.port.post(lane, &[rest]);
    assert!(matches!(refused, Err(Error::OutOfRange { side: "remote", .. })), "{refused:?}");
    remote_pages[1] = 0;
    let rest = op((local, remote), [&local_pages, &remote_pages]).advance(1);
    assert_eq!(pair.one.port.post(lane, &[rest]), Ok(Posted { ops: 0, within: 1 }));
    let found = content(&memory);
    for page in 0..4 {
        let expected = if page == 3 || page == 0 { 5 } else { 0 };
        assert_eq!(found[page * 1024], expected, "page {page}");
    }
}

#[test]
fn limits_are_said() {
    let mut side = Side::open(ShmOptions { max_lanes: 2, max_regions: 1, ..ShmOptions::default() });
    let (first, _) = side.open_lane();
    side.open_lane();
    let refused = side.port.open_lane(PeerId(0)).map(|_| ());
    assert_eq!(refused, Err(Error::Limit { what: "lanes", limit: 2 }));
    side.port.close(first);
    side.poll();
    assert_eq!(side.down(first), Some(DownCause::ClosedHere));
    side.open_lane();
    let (region, _) = side.port.register(&shared(64)).expect("memory can be registered");
    let refused = side.port.register(&shared(64)).map(|_| ());
    assert_eq!(refused, Err(Error::Limit { what: "regions", limit: 1 }));
    side.port.deregister(region).expect("nobody uses it");
    assert!(side.port.register(&shared(64)).is_ok());
}

#[test]
fn a_port_that_is_gone_refuses_at_once() {
    let mut side = Side::open(ShmOptions::default());
    let mut gone = Side::open(ShmOptions::default());
    // The end with the smaller cookie dials; cookies are random, so some of these are this one.
    let mut dialed = 0;
    for _ in 0..20 {
        let ((lane, _), (_, address)) = (side.open_lane(), gone.open_lane());
        drop(std::mem::replace(&mut gone, Side::open(ShmOptions::default())));
        side.port.connect(lane, &address, &tags(0)).expect("a fresh lane connects");
        side.poll();
        if let Some(cause) = side.down(lane) {
            assert_eq!(cause, DownCause::Broken { call: "connect", errno: libc::ECONNREFUSED });
            dialed += 1;
        }
    }
    assert!(dialed > 0, "none of twenty lanes dialed");
}

#[test]
fn revoking_promises_what_the_port_can_keep() {
    let mut pair = Pair::new(ShmOptions::default());
    assert_eq!(pair.one.port.revoke(GrantId::new(3, 1)), Fence::Now, "there is no such grant");
    let info = pair.one.port.info();
    assert_eq!((info.kind, info.ordered), ("shm", true));
    assert_eq!(info.reach, pair.other.port.info().reach);
}

/// All connect at once, and every one carries bytes.
#[test]
fn hundreds_of_lanes() {
    const LANES: u32 = 300;
    let mut files = getrlimit(Resource::Nofile);
    files.current = files.maximum;
    setrlimit(Resource::Nofile, files).expect("the soft limit may be raised to the hard one");
    let options = ShmOptions { max_regions: 8, ..ShmOptions::default() };
    let (mut one, mut other) = (Side::open(options.clone()), Side::open(options));
    let (source, target) = (shared(LANES as usize * 64), shared(LANES as usize * 64));
    let (local, _) = one.port.register(&source).expect("memory can be registered");
    let (_, key) = other.port.register(&target).expect("memory can be registered");
    let sent: Vec<u8> = (0..source.bytes()).map(|at| (at / 64 + at) as u8).collect();
    source.write(0, &sent).expect("a whole memory can be written");
    let lanes: Vec<[LaneId; 2]> = (0..LANES)
        .map(|_| {
            let ((here, here_address), (there, there_address)) = (one.open_lane(), other.open_lane());
            one.port.connect(here, &there_address, &tags(0)).expect("a fresh lane connects");
            other.port.connect(there, &here_address, &tags(1)).expect("a fresh lane connects");
            [here, there]
        })
        .collect();
    let is_up = |event: &&Event| matches!(event, Event::Up { .. });
    let up = |side: &Side| side.events.iter().filter(is_up).count() == LANES as usize;
    wait([&mut one, &mut other], "all lanes to be up", |one, other| up(one) && up(other));
    for (at, [here, _]) in lanes.iter().enumerate() {
        let remote = one.port.attach(*here, &key).expect("a key of the peer").id;
        let offset = at as u64 * 64;
        let shape = Shape::Span { local, local_offset: offset, remote, remote_offset: offset, bytes: 64 };
        let op = Op { imm: Some(at as u32), shape, ..write(local, remote, 64) };
        assert_eq!(one.port.post(*here, &[op]), Ok(Posted { ops: 1, within: 0 }));
    }
    wait([&mut one, &mut other], "all immediates", |_, other| {
        lanes.iter().all(|[_, there]| other.arrived(*there) == 1)
    });
    assert!(content(&target) == sent);
    for [here, _] in &lanes {
        one.port.close(*here);
    }
    wait([&mut one, &mut other], "all lanes to be down", |one, other| {
        lanes.iter().all(|[here, there]| one.down(*here).is_some() && other.down(*there).is_some())
    });
}
