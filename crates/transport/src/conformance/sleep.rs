//! Sleeping: after `arm` the owner of a port is woken for every event, and not for nothing.

use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::Rig;
use super::stage::{Feed, Stage};
use crate::{Arm, Op, Port, Token};

/// A ping-pong in which each side sleeps until the other's immediate wakes it.
pub fn a_sleeper_is_woken(rig: &mut dyn Rig) {
    const ROUNDS: u32 = 100;
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(1 << 16);
    for round in 0..ROUNDS {
        let sender = round as usize % 2;
        let sleeper = 1 - sender;
        let bytes = [0, 1, 5000, 60_000][round as usize / 2 % 4];
        let op = Op { imm: Some(round), token: Some(Token(round.into())), ..link.write(sender, 0, 0, bytes) };
        let expected = round as usize / 2 + 1;
        // Half of the time the op is posted before the sleeper arms, when `arm` has to see it or be woken by it.
        if round % 4 < 2 {
            stage.post_all(sender, link.lanes[sender], &[op]);
        }
        if !can_sleep(stage.port(sleeper)) {
            return stage.end();
        }
        if round % 4 >= 2 {
            let begun = Instant::now();
            let mut feed = Feed::new(&[op]);
            while !feed.offer(&mut stage, sender, link.lanes[sender], 1) {
                stage.poll(sender);
                stage.rig.pass();
                assert!(begun.elapsed() < stage.patience, "waited for an op to be taken");
            }
        }
        let begun = Instant::now();
        while stage.log(sleeper, link.lanes[sleeper]).arrived.len() < expected {
            if wake(stage.port(sleeper), Duration::from_millis(1)) {
                stage.poll(sleeper);
            }
            stage.poll(sender);
            stage.rig.pass();
            assert!(begun.elapsed() < stage.patience, "waited for a sleeper to be woken in round {round}");
        }
        stage.wait("the token", |s| s.log(sender, link.lanes[sender]).done.len() == expected);
    }
    // The end of a lane wakes as well.
    stage.port(0).close(link.lanes[0]);
    let begun = Instant::now();
    while stage.log(1, link.lanes[1]).down.is_none() {
        if wake(stage.port(1), Duration::from_millis(1)) {
            stage.poll(1);
        }
        stage.poll(0);
        stage.rig.pass();
        assert!(begun.elapsed() < stage.patience, "waited for a sleeper to be woken by the end of its lane");
    }
    stage.end();
}

/// When nothing happens, a port that can sleep does not keep its owner awake.
pub fn an_idle_port_lets_its_owner_sleep(rig: &mut dyn Rig) {
    const NAP: Duration = Duration::from_millis(100);
    let mut stage = Stage::new(rig, 2);
    let link = stage.link(1 << 16);
    stage.write(&link, 0, &[link.write(0, 0, 0, 1 << 16)]);
    stage.settle();
    for side in [0, 1] {
        let begun = Instant::now();
        let mut woken = 0;
        while begun.elapsed() < NAP {
            if !can_sleep(stage.port(side)) {
                return stage.end();
            }
            if wake(stage.port(side), NAP) {
                woken += 1;
                stage.poll(side);
            }
        }
        // A few are fine: timers, a peer's late acknowledgement. A descriptor that stays readable is not.
        assert!(woken < 20, "side {side} was woken {woken} times in {NAP:?} for nothing");
    }
    stage.end();
}

fn can_sleep(port: &mut dyn Port) -> bool {
    !matches!(port.arm(), Arm::Spin)
}

/// Arms, and sleeps for `nap` at most; whether there is something to poll.
fn wake(port: &mut dyn Port, nap: Duration) -> bool {
    match port.arm() {
        Arm::Ready | Arm::Spin => true,
        Arm::Sleep(fd) => {
            let nap = Timespec::try_from(nap).expect("a short time");
            let ready = poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&nap));
            ready.is_ok_and(|descriptors| descriptors > 0)
        }
    }
}
