//! The beginning and the end of lanes.

use super::Rig;
use super::stage::{Feed, Link, Stage, assert_content, content};
use crate::{DownCause, Error, LaneId, Op, Token};

/// Either side closes; both hear of it once, with the right cause. Closing again, or what is not there, is nothing.
pub fn every_lane_ends_once(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 2);
    for closer in [0, 1] {
        let lanes = stage.connect([0, 1]);
        stage.port(closer).close(lanes[closer]);
        stage.port(closer).close(lanes[closer]);
        both_down(&mut stage, lanes);
        assert_eq!(stage.log(closer, lanes[closer]).down, Some(DownCause::ClosedHere));
        assert_eq!(stage.log(1 - closer, lanes[1 - closer]).down, Some(DownCause::ClosedByPeer));
        stage.port(closer).close(lanes[closer]);
        stage.port(1 - closer).close(lanes[1 - closer]);
        stage.port(closer).close(LaneId(u32::MAX));
        stage.settle();
    }
    stage.end();
}

/// Both sides close, at the same moment and with ops in flight.
pub fn close_from_both_sides_at_once(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 2);
    for round in 0..20 {
        let lanes = stage.connect([0, 1]);
        for side in [0, 1] {
            let notice = Op { token: Some(Token(1)), ..Op::notify(round) };
            stage.post_all(side, lanes[side], &[notice]);
        }
        for _ in 0..round % 4 {
            stage.turn();
        }
        stage.port(0).close(lanes[0]);
        if round % 2 == 1 {
            stage.poll(0);
        }
        stage.port(1).close(lanes[1]);
        both_down(&mut stage, lanes);
        for side in [0, 1] {
            let cause = stage.log(side, lanes[side]).down;
            let expected = [Some(DownCause::ClosedHere), Some(DownCause::ClosedByPeer)];
            assert!(expected.contains(&cause), "side {side} of a lane that both closed: {cause:?}");
        }
    }
    stage.end();
}

/// A lane that was never connected, or whose peer is not there yet, can be closed too.
pub fn closing_early_is_an_end_too(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 2);
    let (fresh, _) = stage.open(0, 1);
    stage.port(0).close(fresh);
    stage.wait("a fresh lane to be down", |s| s.log(0, fresh).down == Some(DownCause::ClosedHere));

    let (waiting, waiting_address) = stage.open(0, 1);
    let (late, late_address) = stage.open(1, 0);
    let (tags, peer_tags) = stage.tags();
    stage.port(0).connect(waiting, &late_address, &tags).expect("a fresh lane connects");
    stage.turn();
    stage.port(0).close(waiting);
    let begun = stage.port(1).connect(late, &waiting_address, &peer_tags);
    match begun {
        Ok(()) => stage.wait("the late end to be down", |s| s.log(1, late).down.is_some()),
        // The port has already heard of the end, and said so by its event.
        Err(error) => assert_eq!(error, Error::LaneDown { lane: late }),
    }
    stage.wait("the early end to be down", |s| s.log(0, waiting).down.is_some());
    assert!(!stage.log(0, waiting).up, "a lane came up that was closed before its peer connected");
    stage.end();
}

/// The peer keeps writing while this side closes: once `Down` is heard, memory is at rest.
pub fn nothing_is_written_after_down(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 2);
    for round in 0..6 {
        let link = stage.link_between([0, 1], 1 << 20, 10 * round);
        let ops = flood(&link);
        let mut feed = Feed::new(&ops);
        stage.wait("a stream of writes to begin", |s| {
            feed.offer(s, 0, link.lanes[0], 20);
            s.log(1, link.lanes[1]).arrived.len() > 5
        });
        stage.port(1).close(link.lanes[1]);
        let target = &link.regions[1].memory;
        // The sending end goes on until it hears that the lane has ended.
        let mut refused = false;
        stage.wait("the receiving end to be down", |s| {
            refused = refused || feed.try_offer(s, 0, link.lanes[0], 20).is_err();
            s.log(1, link.lanes[1]).down.is_some()
        });
        let at_rest = content(target);
        for _ in 0..50 {
            refused = refused || feed.try_offer(&mut stage, 0, link.lanes[0], 20).is_err();
            stage.turn();
        }
        stage.settle();
        assert_content(target, &at_rest, "after Down of the receiving end");
        both_down(&mut stage, link.lanes);
    }
    stage.end();
}

/// After `Down` a source is not read, and nothing arrives of a read: the memory belongs to its owner again.
pub fn nothing_is_read_after_down(rig: &mut dyn Rig) {
    const POISON: u8 = 0xEE;
    let mut stage = Stage::new(rig, 2);
    for round in 0..6 {
        let link = stage.link_between([0, 1], 1 << 20, 10 * round);
        let source = &link.regions[0].memory;
        for memory in link.regions.iter().map(|region| &region.memory) {
            memory.fill(0, memory.bytes(), 0x11).expect("a whole memory can be filled");
        }
        let mut ops = flood(&link);
        for at in 0..ops.len() / 2 {
            ops[2 * at] = link.read(0, 512 << 10, 512 << 10, 512 << 10);
        }
        let mut feed = Feed::new(&ops);
        for _ in 0..4 + round {
            feed.offer(&mut stage, 0, link.lanes[0], 20);
            stage.turn();
        }
        stage.port(0).close(link.lanes[0]);
        stage.wait("the sending end to be down", |s| s.log(0, link.lanes[0]).down.is_some());
        source.fill(0, source.bytes(), POISON).expect("sources of a lane that is down may change");
        both_down(&mut stage, link.lanes);
        stage.settle();
        assert!(!content(&link.regions[1].memory).contains(&POISON), "a source was read after Down");
        assert!(content(source).iter().all(|&byte| byte == POISON), "a read arrived after Down");
    }
    stage.end();
}

/// An end that is shown the wrong tag does not come up, and says why.
pub fn wrong_tags_never_come_up(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 2);
    for wrong_at in [0, 1] {
        let (at_0, address_0) = stage.open(0, 1);
        let (at_1, address_1) = stage.open(1, 0);
        let lanes = [at_0, at_1];
        let (tags_0, tags_1) = stage.tags();
        let mut tags = [tags_0, tags_1];
        // One bit is enough.
        tags[wrong_at].theirs[31] ^= 1;
        stage.port(0).connect(at_0, &address_1, &tags[0]).expect("a fresh lane connects");
        stage.port(1).connect(at_1, &address_0, &tags[1]).expect("a fresh lane connects");
        stage.wait("the end that was shown a wrong tag to be down", |s| {
            let log = s.log(wrong_at, lanes[wrong_at]);
            assert!(!log.up, "a lane came up that was shown a wrong tag");
            log.down.is_some()
        });
        assert_eq!(stage.log(wrong_at, lanes[wrong_at]).down, Some(DownCause::NotAuthentic));
        both_down(&mut stage, lanes);
    }
    let lanes = stage.connect([0, 1]);
    assert!(stage.log(0, lanes[0]).up, "good tags after wrong ones");
    stage.end();
}

/// A peer that is gone, or never connects, is not waited for without end.
pub fn connecting_to_nobody_ends(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 3);
    let (alone, _) = stage.open(0, 1);
    let (_, never_connected) = stage.open(1, 0);
    let (orphan, _) = stage.open(0, 2);
    let (_, of_a_dropped_port) = stage.open(2, 0);
    stage.sides[2].port = None;
    let (tags, _) = stage.tags();
    for (lane, address) in [(alone, never_connected), (orphan, of_a_dropped_port)] {
        match stage.port(0).connect(lane, &address, &tags) {
            Ok(()) => stage.wait("a lane to nobody to be down", |s| s.log(0, lane).down.is_some()),
            Err(error) => {
                assert!(matches!(error, Error::Os { .. }), "connecting to nobody: {error}");
                stage.port(0).close(lane);
            }
        }
        assert!(!stage.log(0, lane).up, "a lane to nobody came up");
    }
    assert_eq!(stage.log(0, alone).down, Some(DownCause::ConnectTimedOut));
    stage.end();
}

/// Dropping a port ends its lanes: every peer hears of it once.
pub fn a_dropped_port_ends_its_lanes(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 3);
    let first = stage.link_between([0, 1], 1 << 16, 0);
    let second = stage.link_between([0, 1], 1 << 16, 10);
    let other = stage.link_between([0, 2], 1 << 16, 20);
    for link in [&first, &second] {
        stage
            .post(1, link.lanes[1], &[Op { imm: Some(1), ..link.write(1, 0, 0, 1 << 16) }])
            .expect("the lane is up");
    }
    stage.sides[1].port = None;
    stage.wait("both lanes to the dropped port to be down", |s| {
        [&first, &second].iter().all(|link| s.log(0, link.lanes[0]).down.is_some())
    });
    let at_rest = content(&first.regions[0].memory);
    stage.settle();
    assert_content(&first.regions[0].memory, &at_rest, "after Down of a lane to a dropped port");
    assert!(stage.log(0, other.lanes[0]).down.is_none(), "a lane to another port ended too");
    stage.write(&other, 0, &[other.write(0, 0, 0, 1 << 16)]);
    stage.end();
}

/// Lanes between the same ports are apart: their ops, their events, their ends.
pub fn many_lanes_between_two_ports(rig: &mut dyn Rig) {
    const LANES: u32 = 12;
    const BYTES: u64 = 20_000;
    let mut stage = Stage::new(rig, 2);
    let links: Vec<Link> = (0..LANES).map(|at| stage.link_between([0, 1], BYTES as usize, 10 * at)).collect();
    let sent: Vec<Vec<u8>> = links.iter().map(|link| content(&link.regions[0].memory)).collect();
    for round in 0..10u64 {
        for link in &links {
            let (from, bytes) = (round * BYTES / 10, BYTES / 10);
            let op =
                Op { imm: Some(round as u32), token: Some(Token(round)), ..link.write(0, from, from, bytes) };
            stage.post_all(0, link.lanes[0], &[op]);
        }
    }
    stage.wait("all lanes to finish", |s| {
        links.iter().all(|link| {
            s.log(1, link.lanes[1]).arrived.len() == 10 && s.log(0, link.lanes[0]).done.len() == 10
        })
    });
    for (at, link) in links.iter().enumerate() {
        assert_content(&link.regions[1].memory, &sent[at], &format!("lane {at}"));
    }
    let (closed, open) = links.split_at(LANES as usize / 2);
    for link in closed {
        stage.close(link, 1);
    }
    for link in open {
        stage.write(link, 1, &[link.write(1, 0, 0, BYTES)]);
        assert!(stage.log(0, link.lanes[0]).down.is_none(), "a lane ended with another");
    }
    stage.end();
}

/// One port with several peers, everybody with everybody.
pub fn several_peers_on_one_port(rig: &mut dyn Rig) {
    const PORTS: usize = 4;
    const BYTES: u64 = 50_000;
    let mut stage = Stage::new(rig, PORTS);
    let mut links = Vec::new();
    for one in 0..PORTS {
        for other in one + 1..PORTS {
            let base = 10 * links.len() as u32;
            links.push(stage.link_between([one, other], BYTES as usize, base));
        }
    }
    let sent: Vec<Vec<u8>> = links.iter().map(|link| content(&link.regions[0].memory)).collect();
    for link in &links {
        let op = Op { imm: Some(5), ..link.write(0, 0, 0, BYTES) };
        stage.post_all(link.sides[0], link.lanes[0], &[op]);
    }
    stage.wait("everybody to hear from everybody", |s| {
        links.iter().all(|link| s.log(link.sides[1], link.lanes[1]).arrived == [5])
    });
    for (link, sent) in links.iter().zip(&sent) {
        assert_content(
            &link.regions[1].memory,
            sent,
            &format!("from {} to {}", link.sides[0], link.sides[1]),
        );
    }
    stage.end();
}

/// After a lane has ended, another can be made between the same ports, with the same regions and a new name.
pub fn a_new_lane_follows_a_closed_one(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 2);
    let mut link = stage.link(4096);
    let mut seen = vec![link.lanes[0]];
    for round in 0..5 {
        stage.close(&link, round % 2);
        link.lanes = stage.connect([0, 1]);
        assert!(!seen.contains(&link.lanes[0]), "a lane's name was used again");
        seen.push(link.lanes[0]);
        for side in [0, 1] {
            let key = link.regions[1 - side].key.clone();
            link.remotes[side] = stage.attach(side, link.lanes[side], &key);
        }
        let mut fresh = vec![0; 4096];
        stage.rng.fill(&mut fresh);
        link.regions[0].memory.write(0, &fresh).expect("a whole memory can be written");
        stage.write(&link, 0, &[link.write(0, 0, 0, 4096)]);
        assert_content(&link.regions[1].memory, &fresh, "over a new lane");
    }
    stage.end();
}

/// Large overlapping writes from the first half to the first half, each with an immediate.
fn flood(link: &Link) -> Vec<Op<'static>> {
    let op = |at: u64| Op { imm: Some(at as u32), ..link.write(0, at % 7 * 4096, at % 11 * 4099, 400_000) };
    (0..200).map(op).collect()
}

#[track_caller]
fn both_down(stage: &mut Stage<'_>, lanes: [LaneId; 2]) {
    stage.wait("both ends to be down", |s| {
        s.log(0, lanes[0]).down.is_some() && s.log(1, lanes[1]).down.is_some()
    });
}
