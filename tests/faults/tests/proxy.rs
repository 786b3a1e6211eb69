//! Two nodes with a network between them that breaks: connections are delayed, slowed to a trickle, stalled for ever,
//! reset, closed in one direction, cut in the middle of a frame; all of them are reset at once, and nothing passes for a
//! while. Their control streams, lanes and heartbeats go through it, whoever dials.
//!
//! Every room ends once on each side, by its deadline, typed, and nobody is blamed for what the network did; delivered
//! bytes are right; pages come home, and nobody writes into them then. Once the network is well, rooms are delivered again
//! without anybody's help, and at the end everything is back to where it began.
//!
//! `CROSSDOCK_FAULT_SEED=S` chooses the plan, `CROSSDOCK_FAULT_CASES=N` runs N cases, `CROSSDOCK_FAULT_ONLY=K` the one with
//! number K.

use std::collections::BTreeMap;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossdock::Peer;
use crossdock_faults::{Bench, Census, Chance, Fate, Heard, Plan, Proxy, Side, Worker, is_typed};

/// Cases of an ordinary run.
const CASES: u64 = 16;
/// Cases beside each other: most of their time they wait.
const AT_ONCE: usize = 8;
/// Rooms beside each other in a case.
const LANES: u64 = 4;
/// How long connections break.
const STORM: Duration = Duration::from_millis(2_500);
/// For what has to happen in the end, on a machine that has too much to do.
const SOON: Duration = Duration::from_secs(40);

#[test]
fn every_room_survives_the_network() {
    let number = |name: &str| {
        let text = std::env::var(name).ok()?;
        Some(text.parse::<u64>().unwrap_or_else(|_| panic!("{name} is a number, and not '{text}'")))
    };
    let seed = number("CROSSDOCK_FAULT_SEED").unwrap_or_else(Chance::any_seed);
    let count = number("CROSSDOCK_FAULT_CASES").unwrap_or(CASES);
    let only = number("CROSSDOCK_FAULT_ONLY");
    println!("CROSSDOCK_FAULT_SEED={seed} CROSSDOCK_FAULT_CASES={count}");
    let (cases, next) = (only.map_or(0..count, |only| only..only + 1), AtomicU64::new(0));
    let before = Census::of_this_process();
    let (tallies, failed): (Vec<_>, Vec<_>) = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..AT_ONCE)
            .map(|_| {
                scope.spawn(|| {
                    let (mut tally, mut failed) = (Tally::default(), Vec::new());
                    while let Some(case) = cases.clone().nth(next.fetch_add(1, Ordering::Relaxed) as usize) {
                        match catch_unwind(AssertUnwindSafe(|| run(seed, case))) {
                            Ok(Ok(one)) => tally.add(&one),
                            Ok(Err(wrong)) => failed.push(format!("case {case}: {wrong}")),
                            Err(_) => failed.push(format!("case {case}: a panic, printed above")),
                        }
                    }
                    (tally, failed)
                })
            })
            .collect();
        threads.into_iter().map(|thread| thread.join().expect("cases are caught")).unzip()
    });
    let failed: Vec<String> = failed.into_iter().flatten().collect();
    let again = format!("again with CROSSDOCK_FAULT_SEED={seed} CROSSDOCK_FAULT_ONLY=<case>");
    assert!(failed.is_empty(), "{} of {count} cases failed, {again}:\n{}", failed.len(), failed.join("\n"));
    let mut all = Tally::default();
    tallies.iter().for_each(|tally| all.add(tally));
    println!("{all:#?}");
    // The census is of the process: this file has no other test.
    let after = Census::of_this_process();
    assert_eq!((after.descriptors, after.threads), (before.descriptors, before.threads), "something is left");
    if only.is_none() && count >= CASES {
        let missing: Vec<_> =
            Fate::NAMES.iter().filter(|name| !all.connections.contains_key(*name)).collect();
        assert!(missing.is_empty(), "no connection has met {missing:?}");
        for (end, side) in [("delivered", "prefill"), ("delivered", "decode"), ("peer lost", "prefill")] {
            assert!(all.ends.contains_key(&(side, end)), "no {side} side's room ended {end}");
        }
    }
}

/// What has happened.
#[derive(Default, Debug)]
#[allow(dead_code, reason = "shown as a whole")]
struct Tally {
    ends: BTreeMap<(&'static str, &'static str), u64>,
    connections: BTreeMap<&'static str, u64>,
    latest: Duration,
}

impl Tally {
    fn add(&mut self, other: &Self) {
        other.ends.iter().for_each(|(end, count)| *self.ends.entry(*end).or_default() += count);
        other
            .connections
            .iter()
            .for_each(|(fate, count)| *self.connections.entry(fate).or_default() += count);
        self.latest = self.latest.max(other.latest);
    }

    fn hear(&mut self, side: Side, heard: &Heard) {
        let side = if side == Side::Prefill { "prefill" } else { "decode" };
        *self.ends.entry((side, heard.word())).or_default() += 1;
        self.latest = self.latest.max(heard.late);
    }
}

fn run(seed: u64, case: u64) -> Result<Tally, String> {
    let mut chance = Chance::new(seed, case);
    let (prefill, prefill_proxies) = Worker::behind(chance.word(), 1, false);
    let (decode, decode_proxies) = Worker::behind(chance.word(), 2, chance.hits(1, 2));
    let proxies: Vec<&Proxy> = prefill_proxies.iter().chain(&decode_proxies).collect();
    let handle = decode.node.handle();
    let (peer, _up) = handle.connect(prefill.node.address()).map_err(|error| error.to_string())?;
    let (prefill_side, decode_side) = (&prefill.bench, &decode.bench);
    let storm = Storm { prefill: prefill_side, decode: decode_side, peer, is_over: AtomicBool::new(false) };
    let mut tally = storm.rage(&mut chance, &proxies)?;
    proxies.iter().for_each(|proxy| proxy.calm());
    recover(prefill_side, decode_side, peer)?;
    handle.disconnect(peer).map_err(|error| error.to_string())?;
    for (name, worker) in [("prefill", prefill_side), ("decode", decode_side)] {
        worker.is_empty(0, SOON).map_err(|left| format!("the {name} side keeps {left}"))?;
    }
    for proxy in proxies {
        tally.add(&Tally { connections: proxy.counts(), ..Tally::default() });
    }
    Ok(tally)
}

/// Rooms while connections break.
struct Storm<'a> {
    prefill: &'a Bench,
    decode: &'a Bench,
    peer: Peer,
    is_over: AtomicBool,
}

impl Storm<'_> {
    fn rage(&self, chance: &mut Chance, proxies: &[&Proxy]) -> Result<Tally, String> {
        let plans = chance.word();
        std::thread::scope(|scope| {
            let sides = (0..LANES).flat_map(|lane| [(lane, Side::Prefill), (lane, Side::Decode)]);
            let threads: Vec<_> =
                sides.map(|(lane, side)| scope.spawn(move || self.lane(plans, lane, side))).collect();
            let until = Instant::now() + STORM;
            while Instant::now() < until {
                std::thread::sleep(Duration::from_millis(chance.draw(20..400)));
                let proxy = proxies[chance.draw(0..proxies.len() as u64) as usize];
                match chance.draw(0..6) {
                    0 => proxies.iter().for_each(|proxy| proxy.reset_all()),
                    1 => proxy.reset_all(),
                    2 => proxy.freeze(Duration::from_millis(chance.draw(20..1_500))),
                    _ => {}
                }
            }
            self.is_over.store(true, Ordering::Relaxed);
            let mut tally = Tally::default();
            for thread in threads {
                tally.add(&thread.join().map_err(|_| "a room's thread panicked")??);
            }
            Ok(tally)
        })
    }

    /// Both sides of a lane draw the same plans; whoever ends a room first waits for the other in the next one.
    fn lane(&self, plans: u64, lane: u64, side: Side) -> Result<Tally, String> {
        let mut tally = Tally::default();
        let mut chance = Chance::new(plans, lane);
        let worker = if side == Side::Prefill { self.prefill } else { self.decode };
        for number in 0.. {
            if self.is_over.load(Ordering::Relaxed) {
                break;
            }
            let plan = Plan::draw(&mut chance, lane << 32 | number);
            let heard = worker.live(&plan, side, self.peer)?;
            if !is_typed(&heard.ended) {
                return Err(format!("{side:?} of {plan:?} ended: {:?}", heard.ended));
            }
            tally.hear(side, &heard);
        }
        Ok(tally)
    }
}

/// The network is well: a push and a pull are delivered before long, and nobody has to do anything for it.
fn recover(prefill: &Bench, decode: &Bench, peer: Peer) -> Result<(), String> {
    for is_pull in [false, true] {
        let until = Instant::now() + SOON;
        for number in 0.. {
            let plan = Plan::fair(1 << 60 | u64::from(is_pull) << 50 | number, is_pull);
            let [sent, received] = std::thread::scope(|scope| {
                let sent = scope.spawn(|| prefill.live(&plan, Side::Prefill, peer));
                let received = decode.live(&plan, Side::Decode, peer);
                [sent.join().expect("rooms do not panic"), received]
            });
            let (sent, received) = (sent?.ended, received?.ended);
            if sent.is_delivered() && received.is_delivered() {
                break;
            }
            if Instant::now() >= until {
                return Err(format!("nothing is delivered in a network that is well: {sent}; {received}"));
            }
        }
    }
    Ok(())
}
