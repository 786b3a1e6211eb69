//! Lanes begin and end: with the right peer, in time, exactly once.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::common::*;
use crate::raw::{DIALS, HELLO_BYTES, Head, LISTENS, Raw, address, hello, listener, parse, tags};
use crossdock_tcp::TcpOptions;
use crossdock_transport::{
    Access, Direction, DownCause, Error, Event, GrantId, LaneAddress, LaneId, LaneTags, Op, Port,
};

fn hurried() -> TcpOptions {
    TcpOptions {
        connect_timeout: Duration::from_millis(100),
        close_timeout: Duration::from_millis(100),
        ..Default::default()
    }
}

/// An end that waits for somebody to dial.
fn waiting(options: TcpOptions) -> (End, SocketAddr, [u8; 16]) {
    let mut end = End::open(options, 4096);
    let (to, cookie) = parse(&end.address);
    let nobody = address(SocketAddr::from(([127, 0, 0, 1], 9)), DIALS);
    end.port.connect(end.lane, &nobody, &tags()).unwrap();
    (end, to, cookie)
}

fn until_down(end: &mut End) -> DownCause {
    until("the lane is down", || {
        end.poll();
        end.down().is_some()
    });
    end.down().unwrap()
}

#[test]
fn a_close_is_heard_on_both_sides_once() {
    let mut pair = Pair::new(1 << 20);
    let sent = pair.a.fill(1);
    pair.b.grant_all(GrantId::new(0, 0), Access::Write, 1 << 20);
    // What was posted before the close still arrives.
    let op = told(pair.span(Direction::Write, GrantId::new(0, 0), (0, 0), 1 << 20), Some(4), None);
    pair.post(&[op]);
    pair.a.port.close(pair.a.lane);
    pair.a.port.close(pair.a.lane);
    let refused = pair.a.port.post(pair.a.lane, &[Op::notify(1)]);
    assert_eq!(refused, Err(Error::LaneDown { lane: pair.a.lane }));
    pair.until("both know", |pair| pair.a.down().is_some() && pair.b.down().is_some());
    for _ in 0..20 {
        pair.poll();
    }
    assert_eq!(pair.a.events, [Event::Down { lane: pair.a.lane, cause: DownCause::ClosedHere }]);
    let expected = [
        Event::Arrived { lane: pair.b.lane, imm: 4 },
        Event::Down { lane: pair.b.lane, cause: DownCause::ClosedByPeer },
    ];
    assert_eq!(pair.b.events, expected);
    assert_eq!(pair.b.bytes(), sent);
    for end in [&mut pair.a, &mut pair.b] {
        assert_eq!(end.port.post(end.lane, &[]), Err(Error::LaneDown { lane: end.lane }));
        let key = end.key.clone();
        assert_eq!(end.port.attach(end.lane, &key).unwrap_err(), Error::LaneDown { lane: end.lane });
        end.port.close(end.lane);
        end.poll();
    }
    let unknown = LaneId(999);
    assert_eq!(pair.a.port.post(unknown, &[]), Err(Error::UnknownLane { lane: unknown }));
    pair.a.port.close(unknown);
}

#[test]
fn times_without_end_are_times() {
    let endless = |options: &mut TcpOptions| {
        options.connect_timeout = Duration::MAX;
        options.close_timeout = Duration::MAX;
    };
    let mut pair = Pair::with(endless, 4096);
    pair.a.port.close(pair.a.lane);
    pair.until("both ends are down", |pair| pair.a.down().is_some() && pair.b.down().is_some());
    assert_eq!(pair.a.down(), Some(DownCause::ClosedHere));
}

#[test]
fn both_sides_can_close_at_once() {
    let mut pair = Pair::new(4096);
    pair.a.port.close(pair.a.lane);
    pair.b.port.close(pair.b.lane);
    pair.until("both know", |pair| pair.a.down().is_some() && pair.b.down().is_some());
    assert_eq!((pair.a.down(), pair.b.down()), (Some(DownCause::ClosedHere), Some(DownCause::ClosedHere)));
}

#[test]
fn nothing_lands_after_a_close() {
    let mut pair = Pair::with(|options| options.send_buffer_bytes = Some(4096), 4 << 20);
    pair.b.fill(5);
    pair.b.grant_all(GrantId::new(0, 0), Access::Read, 4 << 20);
    pair.a.grant_all(GrantId::new(1, 0), Access::Write, 4 << 20);
    let read = told(pair.span(Direction::Read, GrantId::new(0, 0), (0, 0), 4 << 20), None, Some(1));
    pair.post(&[read]);
    pair.until("some of it has come", |pair| pair.a.bytes().iter().any(|&byte| byte != 0));
    pair.a.port.close(pair.a.lane);
    let before = pair.a.bytes();
    pair.until("both know", |pair| pair.a.down().is_some() && pair.b.down().is_some());
    assert_eq!(pair.a.bytes(), before);
    assert_eq!(pair.a.done(), [], "the read did not end well");
    pair.a.port.deregister(pair.a.region).expect_err("the grant is still there");
    pair.a.port.revoke(GrantId::new(1, 0));
    pair.a.port.deregister(pair.a.region).unwrap();
}

#[test]
fn a_close_does_not_wait_for_a_peer_that_stands_still() {
    let mut raw = Raw::with(TcpOptions { send_buffer_bytes: Some(4096), ..hurried() }, 32 << 20);
    // The other side neither reads nor answers.
    let mut key = raw.end.key.bytes().to_vec();
    key[16..24].copy_from_slice(&99u64.to_le_bytes());
    let key = crossdock_transport::RemoteKey::new(&key).unwrap();
    let remote = raw.end.port.attach(raw.end.lane, &key).unwrap().id;
    let shape = crossdock_transport::Shape::Span {
        local: raw.end.region,
        local_offset: 0,
        remote,
        remote_offset: 0,
        bytes: 32 << 20,
    };
    let grant = GrantId::new(0, 0);
    let op = Op { direction: Direction::Write, grant, shape, imm: None, token: None };
    let posted = raw.end.port.post(raw.end.lane, &[op]).unwrap();
    assert_eq!(posted.ops, 0);
    let begin = Instant::now();
    raw.end.port.close(raw.end.lane);
    while raw.end.down().is_none() {
        assert!(sleep(&mut raw.end.port, Duration::from_secs(5)), "the deadline wakes a sleeper");
        raw.end.poll();
    }
    assert!(begin.elapsed() >= Duration::from_millis(90), "{:?}", begin.elapsed());
    assert_eq!(raw.end.down(), Some(DownCause::ClosedHere));
    raw.end.port.deregister(raw.end.region).unwrap();
}

#[test]
fn a_peer_that_vanishes_breaks_the_lane() {
    // In the middle of nothing, of a head, of a list, of a payload.
    let grant = GrantId::new(0, 0);
    let mut frame = Head { pages: 2, stride: 64, piece: 64, ..Head::write(grant, 0, 0, 0, 1) }.bytes();
    frame.extend([0; 4]);
    frame.extend(1u32.to_le_bytes());
    frame.extend([0xEE; 128]);
    for sent in [0, 17, 40, 45, 48, 100, frame.len()] {
        let mut raw = Raw::new(4096);
        raw.end.grant_all(grant, Access::Write, 64);
        raw.send(&frame[..sent]);
        raw.socket.shutdown(std::net::Shutdown::Both).unwrap();
        let cause = until_down(&mut raw.end);
        assert!(matches!(cause, DownCause::Broken { .. }), "after {sent} bytes: {cause:?}");
        let arrived = raw.end.arrived();
        assert_eq!(arrived, if sent == frame.len() { vec![1] } else { vec![] });
    }
}

#[test]
fn a_reset_breaks_the_lane_of_a_writer() {
    let mut raw = Raw::new(4096);
    // A socket that is closed with unread bytes in it resets the connection.
    raw.end.port.post(raw.end.lane, &[Op::notify(1)]).unwrap();
    std::thread::sleep(Duration::from_millis(20));
    drop(raw.socket);
    let lane = raw.end.lane;
    until("a post finds out", || raw.end.port.post(lane, &[Op::notify(2)]).is_err());
    assert!(matches!(until_down(&mut raw.end), DownCause::Broken { .. }));
}

#[test]
fn last_words_are_heard_before_the_end() {
    let mut raw = Raw::new(4096);
    raw.send(&Head::notify(8).bytes());
    raw.send(&Head { kind: Head::CLOSE, ..Head::default() }.bytes());
    drop(raw.socket);
    std::thread::sleep(Duration::from_millis(20));
    // This post fails or not; the peer's own words say why it is gone.
    let _ = raw.end.port.post(raw.end.lane, &[Op::notify(1)]);
    let _ = raw.end.port.post(raw.end.lane, &[Op::notify(1)]);
    assert_eq!(until_down(&mut raw.end), DownCause::ClosedByPeer);
    assert_eq!(raw.end.arrived(), [8]);
}

#[test]
fn a_silent_peer_keeps_its_lane() {
    let mut raw = Raw::with(hurried(), 4096);
    raw.send(&Head::notify(8).bytes()[..13]);
    let begin = Instant::now();
    while begin.elapsed() < Duration::from_millis(300) {
        sleep(&mut raw.end.port, Duration::from_millis(50));
        raw.end.poll();
    }
    assert_eq!(raw.end.events, []);
    raw.send(&Head::notify(8).bytes()[13..]);
    raw.until("it is told", |end| end.arrived() == [8]);
}

#[test]
fn nobody_dials_in_time() {
    let (mut end, ..) = waiting(hurried());
    while end.down().is_none() {
        assert!(sleep(&mut end.port, Duration::from_secs(5)), "the deadline wakes a sleeper");
        end.poll();
    }
    assert_eq!(end.events, [Event::Down { lane: end.lane, cause: DownCause::ConnectTimedOut }]);
}

#[test]
fn nobody_answers_in_time() {
    let (listener, at) = listener();
    let mut end = End::open(hurried(), 4096);
    end.port.connect(end.lane, &at, &tags()).unwrap();
    assert_eq!(end.port.post(end.lane, &[Op::notify(1)]), Err(Error::LaneNotUp { lane: end.lane }));
    assert_eq!(until_down(&mut end), DownCause::ConnectTimedOut);
    let (mut socket, _) = listener.accept().unwrap();
    let mut heard = Vec::new();
    socket.read_to_end(&mut heard).unwrap();
    assert_eq!(heard.len(), HELLO_BYTES, "a greeting and nothing else");
}

#[test]
fn nobody_is_there_to_be_dialled() {
    let (listener, at) = listener();
    drop(listener);
    let mut end = End::open(TcpOptions::default(), 4096);
    end.port.connect(end.lane, &at, &tags()).unwrap();
    assert!(matches!(until_down(&mut end), DownCause::Broken { call: "connect", .. }));
}

#[test]
fn wrong_tags_end_the_lane_on_both_sides() {
    let (mut a, mut b) = (End::open(hurried(), 4096), End::open(hurried(), 4096));
    a.port.connect(a.lane, &b.address, &LaneTags { ours: TAG_A, theirs: TAG_B }).unwrap();
    b.port.connect(b.lane, &a.address, &LaneTags { ours: TAG_A, theirs: TAG_B }).unwrap();
    until("both are down", || {
        a.poll();
        b.poll();
        a.down().is_some() && b.down().is_some()
    });
    assert_eq!((a.down(), b.down()), (Some(DownCause::NotAuthentic), Some(DownCause::NotAuthentic)));
    assert_eq!((a.events.len(), b.events.len()), (1, 1));
}

#[test]
fn a_caller_with_a_wrong_tag_does_not_see_ours() {
    let (mut end, to, cookie) = waiting(TcpOptions::default());
    let mut socket = TcpStream::connect(to).unwrap();
    socket.write_all(&hello(&DIALS, &cookie, &[0; 32])).unwrap();
    assert_eq!(until_down(&mut end), DownCause::NotAuthentic);
    let mut heard = Vec::new();
    socket.read_to_end(&mut heard).unwrap();
    assert_eq!(heard.len(), HELLO_BYTES);
    assert_eq!((heard[8], &heard[48..80]), (1, &[0; 32][..]));
}

#[test]
fn an_answer_with_anything_wrong_is_not_believed() {
    for wrong in ["tag", "from", "to", "magic", "verdict"] {
        let (listener, at) = listener();
        let mut end = End::open(TcpOptions::default(), 4096);
        let (_, cookie) = parse(&end.address);
        end.port.connect(end.lane, &at, &tags()).unwrap();
        let (mut socket, _) = listener.accept().unwrap();
        let mut answer = hello(&LISTENS, &cookie, &TAG_A);
        match wrong {
            "tag" => answer[79] ^= 1,
            "from" => answer[16] ^= 1,
            "to" => answer[32] ^= 1,
            "magic" => answer[7] ^= 1,
            _ => answer[8] = 1,
        }
        socket.write_all(&answer).unwrap();
        let cause = until_down(&mut end);
        let expected = if wrong == "magic" {
            matches!(cause, DownCause::PeerMisbehaved { .. })
        } else {
            cause == DownCause::NotAuthentic
        };
        assert!(expected, "{wrong}: {cause:?}");
    }
}

#[test]
fn strangers_are_turned_away_and_the_right_one_is_let_in() {
    let (mut end, to, cookie) = waiting(TcpOptions::default());
    let mut strangers = Vec::new();
    let mut speak = |bytes: &[u8]| {
        let mut socket = TcpStream::connect(to).unwrap();
        socket.write_all(bytes).unwrap();
        strangers.push(socket);
    };
    speak(b"GET / HTTP/1.1\r\n\r\n");
    speak(&[0xff; 200]);
    speak(&hello(&DIALS, &[9; 16], &TAG_A));
    speak(&hello(&[1; 16], &cookie, &TAG_A));
    for _ in 0..100 {
        speak(b"");
    }
    for _ in 0..50 {
        end.poll();
    }
    let mut socket = TcpStream::connect(to).unwrap();
    socket.write_all(&hello(&DIALS, &cookie, &TAG_A)[..50]).unwrap();
    end.poll();
    socket.write_all(&hello(&DIALS, &cookie, &TAG_A)[50..]).unwrap();
    until("the lane is up", || {
        end.poll();
        end.events == [Event::Up { lane: end.lane }]
    });
    assert!(end.port.counters().connections_refused >= 39, "{:?}", end.port.counters());
    // The same greeting again is for a lane that is taken.
    let mut again = TcpStream::connect(to).unwrap();
    again.write_all(&hello(&DIALS, &cookie, &TAG_A)).unwrap();
    let mut heard = Vec::new();
    until("it is turned away", || {
        end.poll();
        again.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        again.read_to_end(&mut heard).is_ok()
    });
    assert_eq!(heard, []);
}

#[test]
fn slow_callers_are_dropped() {
    let (end, to, _) = waiting(hurried());
    let mut end = end;
    let mut slow = TcpStream::connect(to).unwrap();
    slow.write_all(b"xdl").unwrap();
    until_down(&mut end);
    until("the caller is gone", || {
        end.poll();
        end.port.counters().connections_refused == 1
    });
    assert_eq!(slow.read(&mut [0]).unwrap_or(0), 0);
}

#[test]
fn the_other_end_may_dial_before_this_one_connects() {
    for _ in 0..8 {
        // Whichever has the larger cookie connects last.
        let (a, b) = (End::open(TcpOptions::default(), 4096), End::open(TcpOptions::default(), 4096));
        let (mut dials, mut waits) = if parse(&a.address).1 < parse(&b.address).1 { (a, b) } else { (b, a) };
        dials.port.connect(dials.lane, &waits.address, &LaneTags { ours: TAG_A, theirs: TAG_B }).unwrap();
        for _ in 0..20 {
            dials.poll();
            waits.poll();
        }
        assert_eq!((&dials.events[..], &waits.events[..]), (&[][..], &[][..]));
        waits.port.connect(waits.lane, &dials.address, &tags()).unwrap();
        until("both are up", || {
            dials.poll();
            waits.poll();
            dials.events.len() + waits.events.len() == 2
        });
        assert_eq!(waits.events, [Event::Up { lane: waits.lane }]);
    }
}

#[test]
fn misuse_is_told_at_once() {
    let options = TcpOptions { max_lanes: 2, max_regions: 1, ..Default::default() };
    let mut end = End::open(options, 4096);
    assert!(matches!(end.port.register(&end.memory.clone()), Err(Error::Limit { limit: 1, .. })));
    let (second, _) = end.port.open_lane(PEER).unwrap();
    assert!(matches!(end.port.open_lane(PEER), Err(Error::Limit { limit: 2, .. })));
    let itself = end.port.connect(end.lane, &end.address, &tags());
    assert!(matches!(itself, Err(Error::BadAddress { .. })), "{itself:?}");
    let nonsense = end.port.connect(end.lane, &LaneAddress::new(b"shm:1").unwrap(), &tags());
    assert!(matches!(nonsense, Err(Error::BadAddress { .. })), "{nonsense:?}");
    let (_listener, at) = listener();
    end.port.connect(second, &at, &tags()).unwrap();
    let twice = end.port.connect(second, &at, &tags());
    assert!(matches!(twice, Err(Error::Unsupported { .. })), "{twice:?}");
    end.port.close(second);
    end.port.close(end.lane);
    until("both are down", || {
        end.poll();
        end.events.len() == 2
    });
    assert!(end.events.iter().all(|event| matches!(event, Event::Down { cause: DownCause::ClosedHere, .. })));
    assert_eq!(end.port.connect(second, &at, &tags()), Err(Error::LaneDown { lane: second }));
    end.port.open_lane(PEER).unwrap();
    end.port.open_lane(PEER).unwrap();
    for options in [
        TcpOptions { bind: SocketAddr::from(([0, 0, 0, 0], 0)), ..Default::default() },
        TcpOptions { max_lanes: 0, ..Default::default() },
        TcpOptions { congestion: Some("no such thing".into()), ..Default::default() },
        TcpOptions { bind: SocketAddr::from(([192, 0, 2, 1], 0)), ..Default::default() },
    ] {
        assert!(crossdock_tcp::TcpPort::open(options).is_err());
    }
}

#[test]
fn a_port_with_many_lanes_serves_them_all() {
    let options = TcpOptions { max_lanes: 40, ..Default::default() };
    let (mut a, mut b) = (End::open(options.clone(), 4096), End::open(options, 4096));
    let mut lanes = Vec::new();
    for i in 1..40u8 {
        let ((at_a, address_a), (at_b, address_b)) =
            (a.port.open_lane(PEER).unwrap(), b.port.open_lane(PEER).unwrap());
        a.port.connect(at_a, &address_b, &LaneTags { ours: [i; 32], theirs: [i ^ 0xff; 32] }).unwrap();
        b.port.connect(at_b, &address_a, &LaneTags { ours: [i ^ 0xff; 32], theirs: [i; 32] }).unwrap();
        lanes.push((at_a, at_b));
    }
    until("all are up", || {
        a.poll();
        b.poll();
        a.events.len() == 39 && b.events.len() == 39
    });
    b.events.clear();
    for round in 0..3 {
        for &(at_a, _) in &lanes {
            a.port.post(at_a, &[Op::notify(round)]).unwrap();
        }
    }
    b.poll_room = 5;
    until("all have come", || {
        b.poll();
        b.events.len() == 3 * 39
    });
    for &(_, lane) in &lanes {
        let of_lane: Vec<_> = b
            .events
            .iter()
            .filter(|event| matches!(event, Event::Arrived { lane: l, .. } if *l == lane))
            .collect();
        assert_eq!(of_lane.len(), 3);
    }
}

#[test]
fn an_end_that_comes_with_the_greeting_is_found() {
    let (listener, at) = listener();
    let mut end = End::open(TcpOptions::default(), 4096);
    let (_, cookie) = parse(&end.address);
    end.port.connect(end.lane, &at, &tags()).unwrap();
    let (mut socket, _) = listener.accept().unwrap();
    end.poll();
    socket.write_all(&hello(&LISTENS, &cookie, &TAG_A)).unwrap();
    socket.write_all(&Head::notify(3).bytes()).unwrap();
    drop(socket);
    std::thread::sleep(Duration::from_millis(20));
    let cause = until_down(&mut end);
    assert!(matches!(cause, DownCause::Broken { .. }), "{cause:?}");
    assert_eq!(end.arrived(), [3]);
}
