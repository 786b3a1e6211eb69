//! Writes outside rooms, between two whole engines, over each kind of port that runs everywhere.
#![forbid(unsafe_code)]

mod pair;

use std::time::Duration;

use crossdock_engine::{EngineOptions, now_ns};
use crossdock_memory::PageLayout;
use crossdock_proto::SessionEnd;
use crossdock_shm::{ShmOptions, ShmPort};
use crossdock_sim::{Fabric, FabricOptions, Semantics};
use crossdock_tcp::{TcpOptions, TcpPort};
use crossdock_transport::{Access, Direction, DownCause, Error, GrantId, Op, Port, Posted, Shape};

use pair::*;

#[test]
fn what_is_written_is_whole_before_its_immediate() {
    for carrier in Carrier::all() {
        for lanes in [1, 3] {
            let mut pair = Pair::allowed(carrier, &Setting { lanes, ..Setting::default() });
            for step in 0..60_u32 {
                let value = step as u8 + 1;
                pair.writer.memory.fill(0, BYTES, value).unwrap();
                let session = pair.writer.session();
                let lane = pair.writer.engine.side_lane(session, step as usize).unwrap();
                assert_eq!(u32::from(lane), step % u32::from(lanes));
                let with = pair.writer.regions(lane);
                // Every other page one by one, and some in one stretch.
                let pages: Vec<u32> = (0..100).filter(|page| page % 2 == step % 2).rev().collect();
                let mut ops = vec![paged(&with, &pages), span(&with, 100 * PAGE + 7, 50 * PAGE)];
                pair.turn_until("room to post", |pair| {
                    let engine = &mut pair.writer.engine;
                    let posted = engine.post_side(session, lane, &mut ops, Some(step), Some(step)).unwrap();
                    ops.drain(..posted.ops);
                    if let Some(first) = ops.first_mut() {
                        *first = first.advance(posted.within);
                    }
                    ops.is_empty()
                });
                let mut arrived = Vec::new();
                pair.turn_until("an arrival", |pair| {
                    arrived = pair.reader.arrivals();
                    !arrived.is_empty()
                });
                let told = (arrived.len(), arrived[0].session, arrived[0].slot, arrived[0].bits);
                assert_eq!(told, (1, pair.reader.session(), lane, step), "{carrier:?}");
                for page in pages {
                    let found = pair.reader.bytes_at(u64::from(page) * PAGE, PAGE as usize);
                    assert!(found.iter().all(|&byte| byte == value), "{carrier:?}, page {page}");
                }
                let stretch = pair.reader.bytes_at(100 * PAGE + 7, 50 * PAGE as usize);
                assert!(stretch.iter().all(|&byte| byte == value), "{carrier:?}");
                // The source may be changed once the token is back.
                pair.turn_until("the token", |pair| {
                    pair.writer.dones().iter().any(|done| (done.session, done.token) == (session, step))
                });
            }
            let bytes = pair.writer.engine.rail_stats()[0].written_bytes;
            assert_eq!(bytes, 60 * 100 * PAGE, "{carrier:?}");
            assert_eq!((&pair.writer.ends, &pair.reader.ends), (&Vec::new(), &Vec::new()));
        }
    }
}

/// Queues that take a page at most, and few tokens: all comes once and in order, and so do the tokens.
#[test]
fn a_full_queue_is_waited_for() {
    for carrier in Carrier::all() {
        let engine =
            EngineOptions { max_side_tokens: 3, max_side_arrivals: 1000, ..EngineOptions::default() };
        let mut pair = Pair::allowed(carrier, &Setting { is_tight: true, engine, ..Setting::default() });
        let with = pair.writer.regions(0);
        let pages: Vec<u32> = (0..3).collect();
        let (mut arrived, mut done, mut short) = (Vec::new(), Vec::new(), 0);
        for step in 0..200 {
            let ops = vec![span(&with, 10 * PAGE, 2 * PAGE), paged(&with, &pages), Op::notify(0)];
            let mut offer = Offer { ops, imm: Some(step), token: Some(1000 + step) };
            pair.turn_until("room to post", |pair| {
                let whole = offer.post(&mut pair.writer);
                short += u32::from(!whole);
                done.extend(pair.writer.dones().iter().map(|done| done.token));
                arrived.extend(pair.reader.arrivals().iter().map(|arrival| arrival.bits));
                whole
            });
        }
        pair.turn_until("the rest", |pair| {
            done.extend(pair.writer.dones().iter().map(|done| done.token));
            arrived.extend(pair.reader.arrivals().iter().map(|arrival| arrival.bits));
            (arrived.len(), done.len()) == (200, 200)
        });
        pair.turn_for(Duration::from_millis(20));
        assert_eq!((pair.reader.arrivals().len(), pair.writer.dones().len()), (0, 0));
        assert!(arrived.into_iter().eq(0..200) && done.into_iter().eq(1000..1200), "{carrier:?}");
        assert!(short > 0, "{carrier:?}: nothing was ever short");
        let bytes = pair.writer.engine.rail_stats()[0].written_bytes;
        assert_eq!(bytes, 200 * 5 * PAGE, "{carrier:?}");
    }
}

/// Neither a token that is out nor one that nobody has asked for lets more go out than the bound.
#[test]
fn tokens_have_a_bound() {
    let engine = EngineOptions { max_side_tokens: 2, ..EngineOptions::default() };
    let mut pair = Pair::allowed(Carrier::Tcp, &Setting { engine, ..Setting::default() });
    let mut taken = 0;
    for token in 0..10 {
        taken += pair.writer.post(&mut [Op::notify(0)], Some(token), Some(token)).ops;
        pair.turn_for(Duration::from_millis(2));
    }
    assert_eq!(taken, 2);
    assert_eq!(pair.writer.post(&mut [Op::notify(0)], Some(2), None).ops, 1, "without a token there is room");
    let mut tokens = Vec::new();
    pair.turn_until("both tokens", |pair| {
        tokens.extend(pair.writer.dones().iter().map(|done| done.token));
        tokens.len() == 2
    });
    assert_eq!(tokens, [0, 1]);
    assert_eq!(pair.writer.post(&mut [Op::notify(0)], Some(3), Some(3)).ops, 1);
}

#[test]
fn what_makes_no_sense_is_refused() {
    let mut pair = Pair::allowed(Carrier::Tcp, &Setting::default());
    let (session, with) = (pair.writer.session(), pair.writer.regions(0));
    let read = Op { direction: Direction::Read, ..span(&with, 0, 8) };
    let post =
        |pair: &mut Pair, op: Op<'_>, imm| pair.writer.engine.post_side(session, 0, &mut [op], imm, None);
    assert!(matches!(post(&mut pair, read, Some(1)), Err(Error::BadOp { .. })));
    let mut both = [read, span(&with, 0, 8)];
    assert!(matches!(
        pair.writer.engine.post_side(session, 0, &mut both, None, None),
        Err(Error::BadOp { .. })
    ));
    assert!(matches!(post(&mut pair, Op::notify(0), Some(1 << 30)), Err(Error::BadOp { .. })));
    let beyond = span(&with, BYTES as u64 - 4, 8);
    assert!(matches!(post(&mut pair, beyond, None), Err(Error::OutOfRange { .. })));
    let nowhere = pair.writer.engine.post_side(session, 9, &mut [Op::notify(0)], Some(0), None);
    assert_eq!(nowhere, Ok(Posted::default()));

    let session = pair.reader.session();
    let mut allow = |number, region, parts: &[PageLayout]| {
        let parts: Vec<_> = parts.iter().map(|&part| (region, part)).collect();
        let allowed = pair.reader.engine.allow(session, number, Access::Write, &parts);
        allowed.expect_err("refused").to_string()
    };
    for (number, region, parts, expected) in [
        (NUMBER, 0, &[PAGES][..], "bad grant: the number is in use"),
        (GrantId::STANDING, 0, &[PAGES], "bad grant: the number is not one of a standing grant"),
        (6, 1, &[PAGES], "local region 1 is unknown"),
        (6, 0, &[], "bad grant: there are no parts"),
        (6, 0, &[PAGES, PageLayout::dense(0, 8, 1)], "bad grant: the parts have different numbers of pages"),
        (6, 0, &[PageLayout::dense(0, 8, 0)], "bad grant: a part has no pages, or they overlap"),
        (
            6,
            0,
            &[PageLayout::dense(0, 1 << 20, 2)],
            "op reaches byte 2097152 of a local region of 1048576 bytes",
        ),
    ] {
        assert_eq!(allow(number, region, parts), expected);
    }
    pair.reader
        .engine
        .allow(session, 6, Access::Write, &[(0, PAGES), (0, PAGES)])
        .expect("nothing of the refused ones is left");
}

/// Reads outside rooms: their token says that the bytes are here. What is allowed to be written is not to be read.
#[test]
fn what_is_allowed_is_read() {
    for carrier in Carrier::all() {
        let mut pair = Pair::allowed(carrier, &Setting::default());
        let reader = pair.reader.session();
        pair.reader.engine.allow(reader, NUMBER + 1, Access::Read, &[(0, PAGES)]).unwrap();
        pair.reader.memory.write(PAGES.offset as usize, &[7; 64]).unwrap();
        let (session, with) = (pair.writer.session(), pair.writer.regions(0));
        let of = span(&with, 0, 64);
        let read = Op { direction: Direction::Read, grant: GrantId::standing(NUMBER + 1), ..of };
        let Shape::Span { local_offset, .. } = read.shape else { unreachable!("it is a span") };
        assert_eq!(
            pair.writer.engine.post_side(session, 0, &mut [read], None, Some(9)),
            Ok(Posted { ops: 1, within: 0 })
        );
        let mut done = None;
        pair.turn_until("the read is done", |pair| {
            done = done.or(pair.writer.engine.next_side_done());
            done.is_some()
        });
        assert_eq!(done.map(|done| done.token), Some(9));
        let mut bytes = [0; 64];
        pair.writer.memory.read(local_offset as usize, &mut bytes).unwrap();
        assert_eq!(bytes, [7; 64], "{carrier:?}");
    }
}

/// A region that was taken back is told to nobody any more, and is refused while a session that was told of it lasts.
#[test]
fn a_region_is_withdrawn_when_nobody_can_use_it() {
    let mut pair = Pair::allowed(Carrier::Tcp, &Setting::default());
    let session = pair.reader.session();
    assert!(matches!(pair.reader.engine.withdraw(0), Err(Error::RegionInUse { .. })));
    assert!(matches!(pair.reader.engine.withdraw(1), Err(Error::UnknownRegion { .. })));
    pair.reader.engine.close_session(now_ns(), session);
    pair.turn_until("the session is over", |pair| pair.reader.engine.is_quiet(session));
    pair.reader.engine.withdraw(0).unwrap();
    pair.reader.engine.withdraw(0).unwrap();
    assert!(pair.reader.memory.is_last_handle());
}

/// A write that was never allowed lands nowhere; one beyond what was allowed ends the lane, and with it the session.
#[test]
fn what_is_not_allowed_is_not_written() {
    for carrier in [Carrier::Sim(Semantics::Checked), Carrier::Tcp] {
        let mut pair = Pair::allowed(carrier, &Setting::default());
        pair.writer.memory.fill(0, BYTES, 1).unwrap();
        let with = pair.writer.regions(0);
        let unknown = Op { grant: GrantId::standing(77), ..span(&with, 0, 8) };
        assert_eq!(pair.writer.post(&mut [unknown], Some(1), None).ops, 1);
        pair.turn_until("the immediate", |pair| !pair.reader.arrivals().is_empty());
        assert!(pair.reader.is_all(0), "{carrier:?}");

        assert_eq!(pair.writer.post(&mut [span(&with, 199 * PAGE, PAGE + 1)], Some(2), Some(2)).ops, 1);
        pair.turn_until("both ends", |pair| !pair.writer.ends.is_empty() && !pair.reader.ends.is_empty());
        let SessionEnd::LanesLost { cause: DownCause::PeerMisbehaved { .. } } = pair.reader.ends[0].1 else {
            panic!("{carrier:?}: {:?}", pair.reader.ends);
        };
        assert!(pair.reader.is_all(0), "{carrier:?}");
    }
}

/// Once the session is closed here and quiet, nothing lands, however long the peer goes on posting.
#[test]
fn nothing_lands_after_a_session_is_quiet() {
    for carrier in Carrier::all() {
        let mut pair = Pair::allowed(carrier, &Setting::default());
        let session = pair.reader.session();
        pair.writer.memory.fill(0, BYTES, 1).unwrap();
        let with = pair.writer.regions(0);
        let write_on = |pair: &mut Pair| {
            let mut ops = [span(&with, 0, 50 * PAGE), span(&with, 50 * PAGE, 150 * PAGE)];
            pair.writer.post(&mut ops, None, None) != Posted::default()
        };
        assert!(write_on(&mut pair));
        pair.turn_until("a write", |pair| pair.reader.bytes_at(199 * PAGE, 1) == [1]);
        assert!(!pair.reader.engine.is_quiet(session), "it is up");
        assert!(write_on(&mut pair), "on its way when the session is closed");
        pair.reader.engine.close_session(crossdock_engine::now_ns(), session);
        pair.reader.hear();
        assert_eq!(pair.reader.ends, [(session, SessionEnd::ClosedHere)]);
        let at_once = matches!(carrier, Carrier::Tcp | Carrier::Sim(Semantics::Checked));
        assert_eq!(pair.reader.engine.is_quiet(session), at_once, "{carrier:?}");
        if at_once {
            pair.reader.memory.fill(0, BYTES, 2).unwrap();
            assert!(write_on(&mut pair), "{carrier:?}: it cannot know yet");
            for _ in 0..2000 {
                // Nor does it hear of it: it does not look at its control stream.
                pair.advance();
                pair.writer.engine.turn_ports(crossdock_engine::now_ns());
                write_on(&mut pair);
                pair.reader.turn();
            }
            assert!(pair.reader.is_all(2), "{carrier:?}");
        }
        if carrier == Carrier::Sim(Semantics::Fabric) {
            // Nobody here can prove that the peer has stopped.
            pair.turn_until("the end there", |pair| !pair.writer.ends.is_empty());
            pair.turn_for(Duration::from_millis(50));
            assert!(!pair.reader.engine.is_quiet(session));
            let again = pair
                .reader
                .session
                .map(|again| pair.reader.engine.allow(again, NUMBER, Access::Write, &[(0, PAGES)]));
            assert!(again.is_none_or(|again| again.is_err()), "the number is not free");
            continue;
        }
        pair.turn_until("quiet", |pair| pair.reader.engine.is_quiet(session));
        pair.reader.memory.fill(0, BYTES, 3).unwrap();
        // The writer's own session: it dials again, and may write under the same number again.
        pair.turn_until("another session", |pair| {
            !pair.writer.ends.is_empty() && pair.writer.session.and(pair.reader.session).is_some()
        });
        assert!(pair.reader.is_all(3), "{carrier:?}");
        let again = pair.reader.session();
        assert_ne!(again, session);
        pair.reader.engine.allow(again, NUMBER, Access::Write, &[(0, PAGES)]).unwrap();
        let with = pair.writer.regions(0);
        assert_eq!(pair.writer.post(&mut [span(&with, 0, 8)], Some(1), None).ops, 1);
        pair.turn_until("a write", |pair| !pair.reader.arrivals().is_empty());
        assert_eq!(pair.reader.bytes_at(0, 9), [1, 1, 1, 1, 1, 1, 1, 1, 3], "{carrier:?}");
        assert!(pair.reader.engine.is_quiet(session), "also when it is long forgotten");
    }
}

/// What went with a lane is not told of by any other: the session ends on both sides, though lanes are left.
#[test]
fn a_lost_lane_that_was_written_on_ends_the_session() {
    for is_used in [false, true] {
        let carrier = Carrier::Sim(Semantics::Checked);
        let mut pair = Pair::allowed(carrier, &Setting { lanes: 2, ..Setting::default() });
        if is_used {
            assert_eq!(pair.writer.post(&mut [Op::notify(0)], Some(1), Some(1)).ops, 1);
        }
        let lost = pair.fabric.lanes()[0];
        pair.fabric.break_lane(lost.port, lost.lane);
        let session = pair.writer.session();
        match is_used {
            true => pair
                .turn_until("both ends", |pair| !pair.writer.ends.is_empty() && !pair.reader.ends.is_empty()),
            false => pair.turn_until("one lane", |pair| {
                pair.writer.engine.side_lane(session, 0) == pair.writer.engine.side_lane(session, 1)
            }),
        }
        match is_used {
            true => assert!(matches!(pair.writer.ends[0].1, SessionEnd::LanesLost { .. })),
            false => assert!(pair.writer.ends.is_empty()),
        }
    }
}

/// None is lost before the session ends: those that fit are told, and none after them.
#[test]
fn a_peer_that_sends_too_many_immediates_is_ended() {
    let engine = EngineOptions { max_side_arrivals: 4, ..EngineOptions::default() };
    let mut pair = Pair::open(Carrier::Tcp, &Setting { engine, ..Setting::default() });
    for imm in 0..4 {
        assert_eq!(pair.writer.post(&mut [Op::notify(0)], Some(imm), None).ops, 1);
    }
    pair.turn_for(Duration::from_millis(50));
    assert!(pair.reader.ends.is_empty());
    for imm in 4..10 {
        assert_eq!(pair.writer.post(&mut [Op::notify(0)], Some(imm), None).ops, 1);
    }
    pair.turn_until("the end", |pair| !pair.reader.ends.is_empty());
    assert!(matches!(pair.reader.ends[0].1, SessionEnd::Misbehaved { .. }), "{:?}", pair.reader.ends);
    let told: Vec<u32> = pair.reader.arrivals().iter().map(|arrival| arrival.bits).collect();
    assert_eq!(told, [0, 1, 2, 3]);
}

#[test]
fn an_engine_that_wants_no_arrivals_drops_them() {
    let engine = EngineOptions { max_side_arrivals: 0, ..EngineOptions::default() };
    let mut pair = Pair::open(Carrier::Tcp, &Setting { engine, ..Setting::default() });
    for imm in 0..100 {
        assert_eq!(pair.writer.post(&mut [Op::notify(0)], Some(imm), Some(imm)).ops, 1);
    }
    pair.turn_until("all", |pair| pair.reader.engine.rail_stats()[0].arrivals == 100);
    pair.turn_until("the tokens", |pair| pair.writer.dones().iter().any(|done| done.token == 99));
    assert_eq!((pair.reader.arrivals().len(), pair.reader.ends.len()), (0, 0));
}

/// As on different hosts: what reaches is used, though shm is preferred.
#[test]
fn nodes_of_different_domains_do_not_share_memory() {
    let ports = |domain: &str| -> Vec<Box<dyn Port>> {
        let options = ShmOptions { domain: domain.into(), ..ShmOptions::default() };
        vec![
            Box::new(ShmPort::open(options).unwrap()),
            Box::new(TcpPort::open(TcpOptions::default()).unwrap()),
        ]
    };
    for (one, other, expected) in [("", "", "shm"), ("a", "a", "shm"), ("a", "b", "tcp"), ("", "b", "tcp")] {
        let fabric = Fabric::new(1, FabricOptions::default());
        let pair = Pair::over(fabric, &Setting::default(), ports(one), ports(other));
        assert_eq!((&pair.writer.ports[..], &pair.reader.ports[..]), (&[expected][..], &[expected][..]));
    }
}
