//! Immediates: exactly once, after the bytes they speak of, in order where the port is ordered, bounded always.

use std::time::Instant;

use super::Rig;
use super::stage::{Feed, Stage, assert_content, content};
use crate::{Event, Op};

/// When an immediate is heard, the bytes of its op are there; on an ordered port those of all earlier ops too.
pub fn immediates_come_once_after_their_bytes(rig: &mut dyn Rig) {
    const OPS: u64 = 1500;
    const SLOT: u64 = 512;
    let mut stage = Stage::new(rig, 2);
    let ordered = stage.ordered(0);
    let link = stage.link((OPS * SLOT) as usize);
    let target = link.regions[1].memory.clone();
    let sent = content(&link.regions[0].memory);
    target.fill(0, target.bytes(), 0).expect("a whole memory can be filled");
    let ops: Vec<Op<'_>> = (0..OPS)
        .map(|at| {
            let bytes = 1 + at % SLOT;
            // Ordered ports need not say each op's end: one immediate speaks for all before it.
            let imm = (!ordered || at % 3 == 2 || at == OPS - 1).then_some(at as u32);
            Op { imm, ..link.write(0, at * SLOT, at * SLOT, bytes) }
        })
        .collect();
    let here = |at: u64| {
        let (from, bytes) = ((at * SLOT) as usize, (1 + at % SLOT) as usize);
        let mut found = vec![0; bytes];
        target.read(from, &mut found).expect("a slot of the target");
        assert!(found == sent[from..from + bytes], "immediate heard before the bytes of op {at}");
    };
    let begun = Instant::now();
    let expected = ops.iter().filter(|op| op.imm.is_some()).count();
    let mut feed = Feed::new(&ops);
    let (mut verified, mut heard) = (0, vec![false; OPS as usize]);
    while heard.iter().filter(|&&heard| heard).count() < expected {
        feed.offer(&mut stage, 0, link.lanes[0], 100);
        stage.poll(0);
        for event in stage.poll(1) {
            let Event::Arrived { imm, .. } = event else { continue };
            assert!(!std::mem::replace(&mut heard[imm as usize], true), "immediate {imm} came twice");
            if ordered {
                assert!(u64::from(imm) >= verified, "immediate {imm} came after {verified}");
                (verified..=u64::from(imm)).for_each(here);
                verified = u64::from(imm) + 1;
            } else {
                here(u64::from(imm));
            }
        }
        stage.rig.pass();
        assert!(begun.elapsed() < stage.patience, "waited for {expected} immediates of {} ops", feed.taken());
    }
    stage.end();
}

/// A notification carries any number, and no byte, whatever its regions are.
pub fn bare_notifications_touch_nothing(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 2);
    let ordered = stage.ordered(0);
    let link = stage.link(4096);
    let before = [0, 1].map(|side| content(&link.regions[side].memory));
    let numbers: Vec<u32> =
        (0..3000u32).map(|at| at.wrapping_mul(0x9e37_79b9)).chain([0, u32::MAX]).collect();
    let ops: Vec<Op<'_>> = numbers.iter().map(|&imm| Op::notify(imm)).collect();
    for by in [0, 1] {
        stage.post_all(by, link.lanes[by], &ops);
        let heard = 1 - by;
        stage.wait("notifications", |s| s.log(heard, link.lanes[heard]).arrived.len() >= numbers.len());
        let (mut arrived, mut sent) = (stage.log(heard, link.lanes[heard]).arrived.clone(), numbers.clone());
        if !ordered {
            arrived.sort_unstable();
            sent.sort_unstable();
        }
        assert!(arrived == sent, "other notifications came than were sent");
    }
    stage.settle();
    for side in [0, 1] {
        assert_eq!(stage.log(side, link.lanes[side]).arrived.len(), numbers.len(), "more came than was sent");
        assert_content(&link.regions[side].memory, &before[side], "after notifications");
    }
    stage.end();
}

/// Who does not poll holds back its peer, within the bound that the port names, and loses nothing.
pub fn unread_immediates_hold_back_their_sender(rig: &mut dyn Rig) {
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(4096);
    let bound = stage.port(0).info().immediates_in_flight;
    assert!(bound > 0, "a lane carries immediates");
    let mut taken = 0;
    let mut quiet_turns = 0;
    while quiet_turns < 500 {
        let posted = stage.post(0, link.lanes[0], &[Op::notify(taken)]).expect("the lane is up");
        taken += posted.ops as u32;
        quiet_turns = if posted.ops == 0 { quiet_turns + 1 } else { 0 };
        assert!(taken <= bound, "{taken} immediates are on their way, more than {bound}");
        stage.poll(0);
        stage.rig.pass();
    }
    assert!(taken > 0, "not one immediate was taken");
    stage.wait("the immediates held back", |s| s.log(1, link.lanes[1]).arrived.len() == taken as usize);
    let more: Vec<Op<'_>> = (0..2 * bound.min(5000)).map(|at| Op::notify(taken + at)).collect();
    stage.post_all(0, link.lanes[0], &more);
    let all = taken as usize + more.len();
    stage.wait("the immediates after them", |s| s.log(1, link.lanes[1]).arrived.len() == all);
    let mut arrived = stage.log(1, link.lanes[1]).arrived.clone();
    arrived.sort_unstable();
    assert!(arrived.iter().copied().eq(0..all as u32), "each immediate once");
    stage.end();
}
