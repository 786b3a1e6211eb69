//! Each rule of the semantics, and each fault, shown to happen: a simulator that is kinder than the world proves
//! nothing. Where chance decides whether something shows, some seed has to show it.

mod pair;

use crossdock_sim::{FabricOptions, NodeId, OneIn, Semantics, SimPortOptions};
use crossdock_transport::{Direction, DownCause, Event, Fence, Op, Port, Token};
use pair::{BYTES, Pair, SOON_NS, WRITES, plain};

const SEEDS: std::ops::Range<u64> = 0..60;
const WRITER: NodeId = NodeId(0);
const TARGET: NodeId = NodeId(1);

#[test]
fn a_stopped_writer_into_mapped_memory_stores_the_rest_when_it_continues() {
    let mut ghosts = 0;
    for seed in SEEDS {
        let mut pair = with_writes_in_flight(seed, Semantics::Mapped);
        pair.fabric.stop(WRITER);
        assert_eq!(pair.port(1).revoke(WRITES), Fence::WhenDown);
        let lane = pair.lanes[1];
        pair.port(1).close(lane);
        pair.run_for(1_000_000_000_000);
        assert_eq!(pair.down(1), None, "nobody has proven that the writer has stopped");
        pair.fabric.landings();
        pair.fabric.cont(WRITER);
        pair.run_for(SOON_NS);
        let (down_ns, cause) = pair.down(1).expect("the writer has answered");
        assert_eq!(cause, DownCause::ClosedHere);
        let landings = pair.fabric.landings();
        assert!(landings.iter().all(|landing| landing.at_ns <= down_ns), "stores after Down");
        ghosts += landings.len();
    }
    assert!(ghosts > 0, "no seed shows a ghost write");
}

#[test]
fn the_proof_of_a_death_ends_a_mapped_lane() {
    for closed_first in [false, true] {
        for seed in SEEDS {
            let mut pair = with_writes_in_flight(seed, Semantics::Mapped);
            pair.fabric.stop(WRITER);
            if closed_first {
                let lane = pair.lanes[1];
                pair.port(1).close(lane);
                pair.run_for(SOON_NS);
            }
            pair.fabric.landings();
            pair.fabric.kill(WRITER);
            pair.ports[0] = None;
            pair.run_for(SOON_NS);
            let cause = if closed_first { DownCause::ClosedHere } else { DownCause::PeerDied };
            assert_eq!(pair.down(1).map(|(_, cause)| cause), Some(cause));
            assert_eq!(pair.fabric.landings(), [], "the dead store nothing");
        }
    }
}

#[test]
fn down_of_a_fabric_mapping_proves_nothing() {
    let mut ghosts = 0;
    for seed in SEEDS {
        let mut pair = with_writes_in_flight(seed, Semantics::Fabric);
        pair.fabric.stop(WRITER);
        assert_eq!(pair.port(1).revoke(WRITES), Fence::Never);
        let lane = pair.lanes[1];
        pair.port(1).close(lane);
        pair.run_for(2_000_000_000);
        assert!(pair.down(1).is_some(), "the lane is given up on");
        pair.fabric.landings();
        pair.fabric.cont(WRITER);
        pair.run_for(SOON_NS);
        ghosts += pair.fabric.landings().len();
    }
    assert!(ghosts > 0, "no seed shows a write after Down");
}

#[test]
fn packets_land_until_the_queue_pair_is_drained() {
    let mut late = 0;
    for seed in SEEDS {
        let mut pair = with_writes_in_flight(seed, Semantics::Verbs);
        pair.fabric.landings();
        assert_eq!(pair.port(1).revoke(WRITES), Fence::WhenDown);
        let lane = pair.lanes[1];
        pair.port(1).close(lane);
        pair.run_for(SOON_NS);
        let (down_ns, _) = pair.down(1).expect("the queue pair is drained without the peer");
        let landings = pair.fabric.landings();
        assert!(landings.iter().all(|landing| landing.at_ns <= down_ns && !landing.checked));
        late += landings.len();
        assert!(pair.down(0).is_some(), "the writer hears of it");
    }
    assert!(late > 0, "no seed shows a packet between close and Down");
}

#[test]
fn what_a_dead_process_has_sent_still_lands() {
    for (semantics, notice_ns) in [(Semantics::Verbs, 1_000_000_000), (Semantics::Checked, SOON_NS)] {
        let mut landed = 0;
        for seed in SEEDS {
            let mut pair = with_writes_in_flight(seed, semantics);
            pair.fabric.landings();
            pair.fabric.kill(WRITER);
            pair.ports[0] = None;
            pair.run_for(notice_ns);
            landed += pair.fabric.landings().len();
            let cause = pair.down(1).map(|(_, cause)| cause);
            assert!(matches!(cause, Some(DownCause::Broken { .. })), "{semantics:?}: {cause:?}");
        }
        assert!(landed > 0, "{semantics:?}: no seed shows a packet of a dead process");
    }
}

#[test]
fn a_receiver_that_checks_takes_nothing_after_it_revoked() {
    let mut late_immediates = 0;
    for seed in SEEDS {
        let mut pair = with_writes_in_flight(seed, Semantics::Checked);
        pair.poll();
        let before = pair.arrived(1).len();
        pair.fabric.landings();
        assert_eq!(pair.port(1).revoke(WRITES), Fence::Now);
        pair.run_for(SOON_NS);
        assert_eq!(pair.fabric.landings(), []);
        assert_eq!(pair.down(1), None, "late is not wrong");
        assert_eq!(pair.arrived(1).len(), FLOOD as usize, "every immediate comes");
        late_immediates += FLOOD as usize - before;
    }
    assert!(late_immediates > 0, "no seed shows a late immediate");
}

#[test]
fn a_stopped_receiver_takes_nothing_but_what_its_device_takes() {
    for (semantics, takes) in
        [(Semantics::Checked, false), (Semantics::Verbs, true), (Semantics::Mapped, true)]
    {
        let mut pair = Pair::new(3, plain(), SimPortOptions::new(semantics));
        pair.fabric.stop(TARGET);
        let op = pair.write(0, 1, 0, 1000);
        pair.post(0, &[op]).expect("the lane is up");
        pair.run_for(SOON_NS);
        assert_eq!(!pair.fabric.landings().is_empty(), takes, "{semantics:?}");
        pair.fabric.cont(TARGET);
        pair.run_for(SOON_NS);
        assert_eq!(pair.arrived(1), [1], "{semantics:?}");
    }
}

#[test]
fn a_partition_that_heals_in_time_loses_nothing() {
    for semantics in [Semantics::Checked, Semantics::Verbs, Semantics::Fabric] {
        for seed in SEEDS {
            let mut pair = with_writes_in_flight(seed, semantics);
            pair.fabric.landings();
            pair.fabric.partition(WRITER, TARGET);
            pair.run_for(100_000_000);
            assert_eq!(pair.fabric.landings(), [], "{semantics:?}: bytes crossed a partition");
            pair.fabric.heal(TARGET, WRITER);
            pair.run_for(SOON_NS);
            assert!(pair.arrived(1).into_iter().eq(0..FLOOD), "{semantics:?}: all, in order");
            assert!(pair.done(0).into_iter().eq(0..u64::from(FLOOD)), "{semantics:?}");
            assert_eq!((pair.down(0), pair.down(1)), (None, None), "{semantics:?}");
        }
    }
}

#[test]
fn a_partition_that_lasts_ends_the_lane_on_both_sides() {
    for semantics in [Semantics::Checked, Semantics::Verbs, Semantics::Fabric] {
        for seed in SEEDS {
            let mut pair = with_writes_in_flight(seed, semantics);
            pair.fabric.landings();
            pair.fabric.partition(WRITER, TARGET);
            pair.run_for(2_000_000_000);
            for side in [0, 1] {
                let cause = pair.down(side).map(|(_, cause)| cause);
                assert!(matches!(cause, Some(DownCause::Broken { .. })), "{semantics:?}: {cause:?}");
            }
            pair.fabric.heal(WRITER, TARGET);
            pair.run_for(SOON_NS);
            assert_eq!(pair.fabric.landings(), [], "{semantics:?}: bytes of a lane that is down");
        }
    }
}

#[test]
fn a_broken_lane_ends_on_both_sides_and_delivers_a_prefix() {
    for semantics in Semantics::ALL {
        let mut lost = 0;
        for seed in SEEDS {
            let mut pair = with_writes_in_flight(seed, semantics);
            let (port, lane) = (pair.port(0).id(), pair.lanes[0]);
            pair.fabric.break_lane(port, lane);
            pair.run_for(SOON_NS);
            for side in [0, 1] {
                let cause = pair.down(side).map(|(_, cause)| cause);
                assert!(
                    matches!(cause, Some(DownCause::Broken { .. })),
                    "{semantics:?}, side {side}: {cause:?}"
                );
            }
            let arrived = pair.arrived(1);
            assert!(arrived.iter().copied().eq(0..arrived.len() as u32), "{semantics:?}: {arrived:?}");
            lost += FLOOD - arrived.len() as u32;
        }
        assert!(lost > 0, "{semantics:?}: no seed shows a loss");
    }
}

#[test]
fn no_lane_comes_up_on_a_rail_that_is_cut() {
    for semantics in Semantics::ALL {
        let mut pair = with_writes_in_flight(1, semantics);
        let ports = [0, 1].map(|side| pair.port(side).id());
        pair.fabric.cut_rail(ports[0], ports[1]);
        pair.run_for(SOON_NS);
        for side in [0, 1] {
            let cause = pair.down(side).map(|(_, cause)| cause);
            assert!(matches!(cause, Some(DownCause::Broken { .. })), "{semantics:?}, side {side}: {cause:?}");
        }
        pair.connect_again();
        pair.run_for(10 * FabricOptions::default().connect_ns);
        for side in [0, 1] {
            assert!(pair.down(side).is_some(), "{semantics:?}, side {side}: {:?}", pair.heard[side]);
        }
        pair.fabric.mend_rail(ports[1], ports[0]);
        pair.connect_again();
        pair.run_for(SOON_NS);
        for side in [0, 1] {
            assert!(matches!(pair.heard[side][..], [(_, Event::Up { .. })]), "{:?}", pair.heard[side]);
        }
    }
}

#[test]
fn ops_overtake_each_other_only_on_unordered_lanes() {
    for unordered in [false, true] {
        let mut overtakings = 0;
        for seed in SEEDS {
            let options = SimPortOptions { unordered, ..SimPortOptions::new(Semantics::Verbs) };
            let mut pair = Pair::new(seed, plain(), options);
            flood(&mut pair);
            pair.run_for(SOON_NS);
            let arrived = pair.arrived(1);
            assert_eq!(arrived.len(), FLOOD as usize);
            overtakings += arrived.windows(2).filter(|pair| pair[0] > pair[1]).count();
            assert!(pair.done(0).into_iter().eq(0..u64::from(FLOOD)), "Done covers what is earlier");
        }
        assert_eq!(overtakings > 0, unordered);
    }
}

#[test]
fn an_op_lands_in_pieces() {
    let pieces = |semantics| {
        let options = FabricOptions { partial_landing: OneIn(2), ..plain() };
        let mut most = 0;
        for seed in SEEDS {
            let mut pair = Pair::new(seed, options.clone(), SimPortOptions::new(semantics));
            let op = pair.write(0, 1, 5, 40_000);
            pair.post(0, &[op]).expect("the lane is up");
            pair.run_for(SOON_NS);
            let landings = pair.fabric.landings();
            assert_eq!(landings.iter().map(|landing| landing.bytes).sum::<u64>(), 40_000);
            let mut times: Vec<u64> = landings.iter().map(|landing| landing.at_ns).collect();
            times.dedup();
            most = most.max(times.len());
        }
        most
    };
    for semantics in Semantics::ALL {
        assert!(pieces(semantics) > 1, "{semantics:?}: no seed shows an op that lands at several times");
    }
}

#[test]
fn a_source_is_read_at_any_time_before_done() {
    let mut late = 0;
    for seed in SEEDS {
        let mut pair = Pair::new(seed, plain(), SimPortOptions::new(Semantics::Verbs));
        pair.memories[0].fill(0, BYTES, 1).expect("the whole memory");
        let op = pair.write(0, 1, 0, 64);
        pair.post(0, &[op]).expect("the lane is up");
        pair.memories[0].fill(0, BYTES, 2).expect("the whole memory");
        pair.run_for(SOON_NS);
        let mut found = [0; 64];
        pair.memories[1].read(0, &mut found).expect("the written bytes");
        late += usize::from(found.contains(&2));
        assert!(!found.contains(&0));
    }
    assert!((1..SEEDS.end as usize).contains(&late), "{late} seeds show a source that is read late");
}

#[test]
fn done_may_come_before_the_bytes_land_only_where_they_are_copied_away() {
    for semantics in Semantics::ALL {
        let mut early = 0;
        for seed in SEEDS {
            let mut pair = Pair::new(seed, plain(), SimPortOptions::new(semantics));
            let op = Op { token: Some(Token(1)), ..pair.op(0, Direction::Write, 0, 1000) };
            pair.post(0, &[op]).expect("the lane is up");
            pair.run_for(SOON_NS);
            let landed_ns = pair.fabric.landings().last().expect("it lands").at_ns;
            let done_ns = pair.heard[0].first().expect("it is done").0;
            early += usize::from(done_ns < landed_ns);
        }
        assert_eq!(early > 0, semantics == Semantics::Checked, "{semantics:?}");
    }
}

#[test]
fn a_slow_node_takes_longer() {
    let time = |times| {
        let mut pair = Pair::new(9, plain(), SimPortOptions::new(Semantics::Checked));
        pair.fabric.slow(TARGET, times);
        let begun_ns = pair.fabric.now_ns();
        for number in 0..20 {
            let op = pair.write(0, number, 0, 8);
            pair.post(0, &[op]).expect("the lane is up");
            pair.run_for(SOON_NS);
        }
        let arrivals =
            pair.heard[1].iter().enumerate().map(|(at, (ns, _))| ns - begun_ns - at as u64 * SOON_NS);
        arrivals.sum::<u64>()
    };
    assert!(time(16) > 8 * time(1));
}

#[test]
fn a_restarted_node_begins_anew() {
    let mut pair = with_writes_in_flight(5, Semantics::Checked);
    pair.fabric.kill(TARGET);
    pair.ports[1] = None;
    assert!(!pair.fabric.is_running(TARGET));
    pair.run_for(SOON_NS);
    assert!(matches!(pair.down(0), Some((_, DownCause::Broken { .. }))));
    pair.fabric.restart(TARGET);
    assert!(pair.fabric.is_running(TARGET));
    assert_eq!(pair.fabric.lanes(), [], "its lanes are those of the dead");
    let port = pair.fabric.port(TARGET, SimPortOptions::new(Semantics::Checked));
    assert_ne!(Some(port.id()), pair.ports[0].as_ref().map(|port| port.id()));
}

/// A pair in whose middle, from 0 to 1, many writes are on their way.
fn with_writes_in_flight(seed: u64, semantics: Semantics) -> Pair {
    let mut pair = Pair::new(seed, plain(), SimPortOptions::new(semantics));
    flood(&mut pair);
    pair.run_for(15_000);
    pair
}

fn flood(pair: &mut Pair) {
    for number in 0..FLOOD {
        let op = pair.write(0, number, u64::from(number) * 1000, 1000);
        assert_eq!(pair.post(0, &[op]), Ok(1));
    }
}

const FLOOD: u32 = 40;
