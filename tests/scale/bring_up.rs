//! From nothing to a full mesh: every decode rank dials every prefill rank.

use std::time::{Duration, Instant};

use crate::cluster::{Cluster, DELAY_NS, MS, Options, US};
use crate::counting::{Allocated, allocated};
use crate::is_full;

/// What it takes to bring a mesh up, and to keep it up.
#[derive(Debug)]
struct BroughtUp {
    sessions: u64,
    virtual_ns: u64,
    took: Duration,
    messages: u64,
    bytes: u64,
    most_messages_a_turn: u64,
    turns: u64,
    nodes: u64,
    /// What turns have visited: rooms, sessions, grants, targets and streams.
    visits: u64,
    events: u64,
    allocated: Allocated,
    /// How often engines look at heartbeats in a second in which nothing else happens.
    looks: u64,
    /// What they send in it, asking and answering.
    pings: u64,
    /// What turns visit in it.
    idle_visits: u64,
}

#[test]
fn a_mesh_comes_up_in_proportion_to_its_sessions() {
    let (prefills, decodes) = if is_full() { (32, 72) } else { (16, 36) };
    let runs: Vec<BroughtUp> = [4, 2, 1].map(|part| bring_up(prefills / part, decodes / part, 2)).into();
    for run in &runs {
        // Hello, Welcome, Prove; a Setup and a Ready of each side.
        assert_eq!(run.messages, 7 * run.sessions);
        // At a side, each session is looked at when its own heartbeat is due and at no other's.
        assert_eq!(run.looks, run.pings / 2, "{run:?}");
    }
    let largest = &runs[2];
    for run in &runs {
        // Nobody's turns go through all sessions, or wait for the others: a node has as many turns in a large mesh as in a
        // small one, and takes what each of its peers has said.
        assert_eq!(
            run.turns * largest.nodes,
            largest.turns * run.nodes,
            "turns of {run:?} and of {largest:?}"
        );
        assert_eq!(run.idle_visits * largest.pings, largest.idle_visits * run.pings, "visits of {run:?}");
    }
    for smaller in &runs[..2] {
        for (what, of) in [
            ("bytes of control", (|run| run.bytes) as fn(&BroughtUp) -> u64),
            ("events of the fabric", |run| run.events),
            ("visits", |run| run.visits),
            ("allocations", |run| run.allocated.times),
            ("bytes allocated", |run| run.allocated.bytes),
        ] {
            let [here, there] = [smaller, largest].map(|run| of(run) as f64 / run.sessions as f64);
            assert!(there < 1.1 * here, "{what} a session: {here:.0} grow to {there:.0}");
        }
    }
    // Round trips of the dial, the handshake, the setup and the lanes, and a turn now and then.
    assert!(largest.virtual_ns < 20 * DELAY_NS, "{largest:?}");
}

/// Sessions that began at different times are looked after at different times, each without a look at the others.
#[test]
fn a_heartbeat_is_looked_for_when_it_is_due() {
    let mut cluster = Cluster::new(Options::mesh(20, 2));
    for prefill in 0..20 {
        cluster.dial_one(prefill);
        cluster.run_for(7 * MS);
    }
    let (looks, messages) = (cluster.looks(), cluster.counters().messages_out);
    cluster.run_for(1000 * MS);
    let asked = (cluster.counters().messages_out - messages) / 2;
    assert!(cluster.is_full_mesh() && asked > 0);
    // A question at the end of the second may not have been answered.
    assert!(
        (cluster.looks() - looks).abs_diff(asked) <= 2,
        "{} looks for {asked} pings",
        cluster.looks() - looks
    );
}

fn bring_up(prefills: usize, decodes: usize, lanes: u8) -> BroughtUp {
    let mut cluster = Cluster::new(Options { lanes, ..Options::mesh(prefills, decodes) });
    let (began, before, happened) = (Instant::now(), allocated(), cluster.fabric.happened());
    brings_up(&mut cluster);
    let (took, counters) = (began.elapsed(), cluster.counters());
    let mut run = BroughtUp {
        sessions: counters.sessions / 2,
        virtual_ns: cluster.now_ns,
        took,
        messages: counters.messages_out,
        bytes: counters.control_bytes_out,
        most_messages_a_turn: cluster.most_messages_a_turn,
        turns: cluster.turns,
        nodes: cluster.nodes.len() as u64,
        visits: cluster.visits(),
        events: cluster.fabric.happened() - happened,
        allocated: allocated().since(&before),
        looks: 0,
        pings: 0,
        idle_visits: 0,
    };
    let looks = cluster.looks();
    keeps_up(&mut cluster);
    run.looks = cluster.looks() - looks;
    run.idle_visits = cluster.visits() - run.visits;
    run.pings = cluster.counters().messages_out - counters.messages_out;
    assert_eq!(cluster.counters().sessions / 2, run.sessions, "no session was lost");
    println!(
        "{prefills} x {decodes}, {lanes} lanes: {} sessions in {} us of virtual time and {} ms of this machine's; \
         {} messages and {} bytes a session; {} messages in one turn at the most; {} turns, {} events and {} visits a \
         session; {} allocations of {} bytes a session, {} bytes of them kept; then {} looks at heartbeats and {} visits \
         for {} pings",
        run.sessions,
        run.virtual_ns / US,
        run.took.as_millis(),
        run.messages / run.sessions,
        run.bytes / run.sessions,
        run.most_messages_a_turn,
        run.turns,
        run.events / run.sessions,
        run.visits / run.sessions,
        run.allocated.times / run.sessions,
        run.allocated.bytes / run.sessions,
        run.allocated.live_of_all() / run.sessions as i64,
        run.looks,
        run.idle_visits,
        run.pings / 2,
    );
    run
}

/// By itself, so that its instructions can be counted.
#[inline(never)]
fn brings_up(cluster: &mut Cluster) {
    cluster.dial();
    cluster.run_until("a full mesh", Cluster::is_full_mesh);
    for up in cluster.nodes.iter_mut().flat_map(|node| &mut node.ups) {
        assert!(matches!(up.poll(), Ok(Some(Ok(_)))), "whoever dialed is told");
    }
}

#[inline(never)]
fn keeps_up(cluster: &mut Cluster) {
    cluster.run_for(1000 * MS);
}
