//! Posting: short posts, tokens, bounds, and lanes that are not up.

use std::time::Instant;

use super::Rig;
use super::stage::{Feed, Stage, apply, assert_content, content};
use crate::{Direction, Error, Event, LaneId, Op, Shape, Token};

/// A paged op that is longer than any queue comes through whole, its immediate and its token once, at the end.
pub fn a_paged_op_is_resumed_where_it_stopped(rig: &mut dyn Rig) {
    const PIECES: u32 = 60_000;
    const PIECE: u64 = 24;
    let mut stage = Stage::new(rig, 2);
    let link = stage.link((u64::from(PIECES) * 32) as usize);
    for direction in [Direction::Write, Direction::Read] {
        let local = stage.rng.distinct(PIECES as usize, PIECES);
        let remote = stage.rng.distinct(PIECES as usize, PIECES);
        let op = Op {
            direction,
            grant: link.grant(direction),
            shape: Shape::Pages {
                local: link.regions[0].local,
                local_offset: 3,
                local_stride_bytes: 32,
                local_pages: &local,
                remote: link.remotes[0],
                remote_offset: 1,
                remote_stride_bytes: 31,
                remote_pages: &remote,
                piece_bytes: PIECE,
            },
            imm: (direction == Direction::Write).then_some(7),
            token: Some(Token(direction as u64)),
        };
        let mut models = [0, 1].map(|side| content(&link.regions[side].memory));
        let [here, there] = &mut models;
        apply(&op, here, there);
        stage.post_all(0, link.lanes[0], &[op]);
        stage.wait("the token of a long op", |s| s.log(0, link.lanes[0]).done.last() == op.token.as_ref());
        stage.wait("the immediate of the long write", |s| s.log(1, link.lanes[1]).arrived == [7]);
        for (side, model) in models.iter().enumerate() {
            assert_content(&link.regions[side].memory, model, &format!("after a long {direction:?}"));
        }
    }
    stage.settle();
    assert_eq!(stage.log(1, link.lanes[1]).arrived, [7], "the immediate came once");
    assert_eq!(stage.log(0, link.lanes[0]).done.len(), 2, "each token came once");
    stage.end();
}

/// Most ops carry no token. After a later op's `Done`, their sources may be overwritten and nobody notices.
pub fn done_covers_earlier_ops(rig: &mut dyn Rig) {
    const SLOTS: u64 = 64;
    const SLOT: u64 = 3000;
    let mut stage = Stage::new(rig, 2);
    let ordered = stage.ordered(0);
    let link = stage.link((SLOTS * SLOT) as usize);
    let source = link.regions[0].memory.clone();
    for round in 0..10 {
        let mut sent = vec![0; source.bytes()];
        stage.rng.fill(&mut sent);
        source.write(0, &sent).expect("a whole memory can be written");
        let tokens = [SLOTS / 3, SLOTS - 1];
        let ops: Vec<Op<'_>> = (0..SLOTS)
            .map(|at| Op {
                imm: (!ordered || at == SLOTS - 1).then_some(at as u32),
                token: tokens.contains(&at).then_some(Token(at)),
                ..link.write(0, at * SLOT, (SLOTS - 1 - at) * SLOT, SLOT)
            })
            .collect();
        let arrived =
            stage.log(1, link.lanes[1]).arrived.len() + ops.iter().filter(|o| o.imm.is_some()).count();
        stage.post_all(0, link.lanes[0], &ops);
        for token in tokens {
            stage.wait("a token in the middle", |s| {
                s.log(0, link.lanes[0]).done.len() >= 2 * round + 1 + usize::from(token == tokens[1])
            });
            source.fill(0, ((token + 1) * SLOT) as usize, 0xEE).expect("sources that are done may change");
        }
        stage.wait("the bytes of all ops", |s| s.log(1, link.lanes[1]).arrived.len() == arrived);
        let mut expected = vec![0; sent.len()];
        for at in 0..SLOTS {
            apply(&link.write(0, at * SLOT, (SLOTS - 1 - at) * SLOT, SLOT), &mut sent, &mut expected);
        }
        assert_content(&link.regions[1].memory, &expected, "after the sources were overwritten");
    }
    stage.end();
}

/// The moment a read's `Done` is heard, all its bytes and those of earlier reads are here.
pub fn done_of_a_read_means_that_it_has_arrived(rig: &mut dyn Rig) {
    const READS: u64 = 400;
    const SLOT: u64 = 1500;
    let mut stage = Stage::new(rig, 2);
    let link = stage.link((READS * SLOT) as usize);
    let there = content(&link.regions[1].memory);
    let ops: Vec<Op<'_>> = (0..READS)
        .map(|at| Op {
            token: (at % 4 == 3).then_some(Token(at)),
            ..link.read(0, at * SLOT, at * SLOT, SLOT)
        })
        .collect();
    let begun = Instant::now();
    let mut feed = Feed::new(&ops);
    let mut verified = 0;
    while verified < READS {
        feed.offer(&mut stage, 0, link.lanes[0], 50);
        for event in stage.poll(0) {
            let Event::Done { token, .. } = event else { continue };
            let (from, to) = ((verified * SLOT) as usize, ((token.0 + 1) * SLOT) as usize);
            let mut found = vec![0; to - from];
            link.regions[0].memory.read(from, &mut found).expect("slots of the region");
            assert!(found == there[from..to], "done of read {} heard before its bytes", token.0);
            verified = token.0 + 1;
        }
        stage.poll(1);
        stage.rig.pass();
        assert!(
            begun.elapsed() < stage.patience,
            "waited for {READS} reads, {} posted, {verified} here",
            feed.taken()
        );
    }
    stage.end();
}

/// A sender that offers as much as the port takes, in batches, both ways at once.
pub fn thousands_of_ops_in_flight(rig: &mut dyn Rig) {
    const OPS: u64 = 6000;
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(OPS as usize * 16);
    let sent = [0, 1].map(|side| content(&link.regions[side].memory));
    let half = OPS / 2;
    let ops = [0, 1].map(|by| {
        let op = |at: u64| {
            let slot = (by as u64 * half + at) * 16;
            let token = (at % 8 == 7).then_some(Token(at));
            Op { imm: Some(at as u32), token, ..link.write(by, slot, slot, 16) }
        };
        (0..half).map(op).collect::<Vec<_>>()
    });
    let mut feeds = [0, 1].map(|by| Feed::new(&ops[by]));
    let begun = Instant::now();
    loop {
        let [one, other] = &mut feeds;
        let all =
            one.offer(&mut stage, 0, link.lanes[0], 500) & other.offer(&mut stage, 1, link.lanes[1], 500);
        stage.turn();
        if all {
            break;
        }
        assert!(
            begun.elapsed() < stage.patience,
            "waited for {OPS} ops, {:?} were taken",
            feeds.map(|f| f.taken())
        );
    }
    stage.wait("every op of both sides", |s| {
        (0..2).all(|side| {
            let log = s.log(side, link.lanes[side]);
            log.arrived.len() == half as usize && log.done.len() == half as usize / 8
        })
    });
    for by in [0, 1] {
        let mut arrived = stage.log(by, link.lanes[by]).arrived.clone();
        arrived.sort_unstable();
        assert!(arrived.iter().copied().eq(0..half as u32), "each immediate once");
        let (from, to) = ((by as u64 * half * 16) as usize, ((by as u64 + 1) * half * 16) as usize);
        let mut expected = sent[1 - by].clone();
        expected[from..to].copy_from_slice(&sent[by][from..to]);
        assert_content(&link.regions[1 - by].memory, &expected, "after thousands of ops");
    }
    stage.end();
}

/// Whoever polls with room for one event misses none.
pub fn an_event_buffer_of_one(rig: &mut dyn Rig) {
    const OPS: u64 = 200;
    let mut stage = Stage::with_events(rig, 2, 1);
    let link = stage.link(OPS as usize * 64);
    let ops = [0, 1].map(|by| {
        let op = |at: u64| Op {
            imm: Some(at as u32),
            token: Some(Token(at)),
            ..link.write(by, at * 64, at * 64, 1 + at % 64)
        };
        (0..OPS).map(op).collect::<Vec<_>>()
    });
    for by in [0, 1] {
        stage.post_all(by, link.lanes[by], &ops[by]);
    }
    stage.wait("all events, one at a time", |s| {
        (0..2).all(|side| {
            let log = s.log(side, link.lanes[side]);
            log.arrived.len() == OPS as usize && log.done.len() == OPS as usize
        })
    });
    stage.end();
}

/// Before `Up`, after `close` and after `Down`, posting and attaching are errors that say which.
pub fn posting_needs_a_lane_that_is_up(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 2);
    let region = stage.region(1, 4096);
    let (early, early_address) = stage.open(0, 1);
    let op = [Op::notify(1)];
    let not_up = Error::LaneNotUp { lane: early };
    assert_eq!(stage.post(0, early, &op), Err(not_up.clone()), "posting on a lane that is not connected");
    assert_eq!(stage.port(0).attach(early, &region.key).map(|_| ()), Err(not_up.clone()));
    let (late, late_address) = stage.open(1, 0);
    let (tags, peer_tags) = stage.tags();
    stage.port(0).connect(early, &late_address, &tags).expect("a fresh lane connects");
    assert_eq!(stage.post(0, early, &op), Err(not_up), "posting on a lane whose peer has not connected");
    stage.port(1).connect(late, &early_address, &peer_tags).expect("a fresh lane connects");
    stage.wait("both ends to be up", |s| s.log(0, early).up && s.log(1, late).up);

    let nobody = LaneId(u32::MAX);
    assert_eq!(stage.port(0).post(nobody, &op), Err(Error::UnknownLane { lane: nobody }));
    assert_eq!(
        stage.port(0).attach(nobody, &region.key).map(|_| ()),
        Err(Error::UnknownLane { lane: nobody })
    );
    let again = stage.port(0).connect(early, &late_address, &tags);
    assert!(again.is_err(), "a lane was connected twice");

    stage.port(0).close(early);
    let down = Error::LaneDown { lane: early };
    assert_eq!(stage.post(0, early, &op), Err(down.clone()), "posting on a lane that was closed");
    stage.wait("both ends to be down", |s| s.log(0, early).down.is_some() && s.log(1, late).down.is_some());
    assert_eq!(stage.post(0, early, &op), Err(down.clone()), "posting on a lane that is down");
    assert_eq!(stage.port(0).attach(early, &region.key).map(|_| ()), Err(down));
    assert_eq!(stage.post(1, late, &op), Err(Error::LaneDown { lane: late }), "posting on the peer's end");
    stage.end();
}

/// Head-of-line blocking ends at the lane: a peer that does not poll holds back only those who talk to it.
pub fn one_stuck_peer_holds_back_no_other(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 3);
    let stuck = stage.link_between([0, 1], 1 << 16, 0);
    let lively = stage.link_between([0, 2], 1 << 16, 10);
    stage.sides[1].paused = true;
    let flood: Vec<Op<'_>> =
        (0..200).map(|at| Op { imm: Some(at), ..stuck.write(0, 0, 0, 1 << 16) }).collect();
    let mut feed = Feed::new(&flood);
    for _ in 0..200 {
        feed.offer(&mut stage, 0, stuck.lanes[0], 10);
        stage.turn();
    }
    for at in 0..50 {
        let write = Op { imm: Some(at), ..lively.write(0, 0, 0, 1 << 16) };
        stage.post_all(0, lively.lanes[0], &[write]);
        stage.wait("an op to a peer that polls", |s| {
            s.log(2, lively.lanes[1]).arrived.len() == at as usize + 1
        });
    }
    stage.sides[1].paused = false;
    stage.wait("what was held back", |s| s.log(1, stuck.lanes[1]).arrived.len() == feed.taken());
    stage.end();
}
