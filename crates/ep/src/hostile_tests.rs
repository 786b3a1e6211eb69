//! A rank whose peer writes anything it likes where it may write: every call ends, with a result or an error that says what
//! is wrong, and nothing beyond either region is touched. The regions lie between pages that nobody may touch.
//!
//! Both ranks are in one thread, and what the honest peer has written is spoilt before it is read.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use crossdock_engine::Doorbell;
use crossdock_memory::Memory;

use crate::arena::Part;
use crate::fenced::Fenced;
use crate::group::{Reach, Shared};
use crate::outgoing::Outgoing;
use crate::pace::Machine;
use crate::{
    Advice, Bf16, Dispatch, EpError, Group, GroupConfig, GroupOptions, LatencyCombine, LatencyOutputs,
    LatencyStep, Payload, Rows, ScaleOrder, ThroughputCombine, ThroughputOutputs, ThroughputStep, Tokens,
    arrivals, words,
};

const HIDDEN: usize = 128;
const TOP_K: usize = 2;
/// The rank that is attacked, and the one whose writes are spoilt.
const VICTIM: u32 = 0;
const HOSTILE: u32 = 1;
const CASES: u64 = 400;

fn config() -> GroupConfig {
    GroupConfig {
        max_tokens: vec![4, 5],
        experts: 5,
        top_k: TOP_K as u32,
        hidden: HIDDEN as u32,
        payload: Payload::Bf16,
        slots: 1,
        placement_version: 1,
    }
}

#[derive(Clone, Copy, Debug)]
struct Way {
    over_ports: bool,
    throughput: bool,
    verify: bool,
}

impl Way {
    fn all() -> impl Iterator<Item = Way> {
        (0..8).map(|bits| Way { over_ports: bits & 1 != 0, throughput: bits & 2 != 0, verify: bits & 4 != 0 })
    }
}

/// Numbers from one seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() % limit.max(1) as u64) as usize
    }
}

/// One rank, and what its port has to carry.
struct Rank {
    group: Group,
    shared: Arc<Shared>,
    outgoing: Option<Arc<Outgoing>>,
}

/// Two ranks. The fences go last: the groups still say farewell there.
struct Pair {
    victim: Rank,
    hostile: Rank,
    _fences: Vec<Fenced<u8>>,
}

impl Pair {
    fn new(way: Way) -> Pair {
        let config = config();
        let fences: Vec<Fenced<u8>> = (0..2)
            .map(|rank| Fenced::new(&vec![0; Group::region_bytes(&config, rank).unwrap()], 0, true))
            .collect();
        let memories: Vec<Memory> = (0..2)
            .zip(&fences)
            .map(|(rank, fence)| {
                let bytes = Group::region_bytes(&config, rank).unwrap();
                // SAFETY: the fence keeps the bytes as long as all groups, and nobody refers to them.
                unsafe { Memory::from_raw(fence.as_ptr().cast_mut(), bytes).unwrap() }
            })
            .collect();
        // Whoever does not come is not waited for.
        let short = Duration::from_millis(1);
        let options =
            GroupOptions { deadline: short, warm_up: short, verify: way.verify, ..GroupOptions::default() };
        let rank = |rank: u32| {
            let reach = |other: u32| match other == rank || !way.over_ports {
                true => Reach::Mapped(memories[other as usize].clone().into()),
                false => Reach::Port,
            };
            let outgoing = way.over_ports.then(|| Arc::new(Outgoing::new(2, 1, Doorbell::new().unwrap())));
            let reaches = (0..2).map(reach).collect();
            let pace = Arc::new(Machine::new());
            let group = Group::assemble(&config, rank, reaches, outgoing.clone(), &options, pace).unwrap();
            let shared = group.mourner().shared;
            Rank { group, shared, outgoing }
        };
        Pair { victim: rank(VICTIM), hostile: rank(HOSTILE), _fences: fences }
    }
}

impl Pair {
    fn target(&self, way: Way) -> Target {
        Target { victim: self.victim.shared.clone(), hostile: self.hostile.shared.clone(), way }
    }
}

impl Rank {
    fn carrier(&self, target: &Target) -> Carrier {
        let is_victim = self.shared.rank == VICTIM;
        let to = if is_victim { &target.hostile } else { &target.victim };
        Carrier { outgoing: self.outgoing.clone(), from: self.shared.clone(), to: to.clone() }
    }
}

/// A port.
struct Carrier {
    outgoing: Option<Arc<Outgoing>>,
    from: Arc<Shared>,
    to: Arc<Shared>,
}

impl Carrier {
    fn carry(&self) {
        let Some(outgoing) = &self.outgoing else { return };
        while let Some(call) = outgoing.next_call() {
            if let Some(rows) = &call.rows {
                for (at, &token) in rows.tokens.iter().enumerate() {
                    let (local, remote) = (token as usize * rows.stride, at * rows.stride);
                    self.copy(rows.local + local, rows.remote + remote, rows.bytes);
                }
            }
            call.spans.iter().for_each(|span| self.copy(span.local, span.remote, span.bytes));
            let arena = self.to.arena_of(0, self.from.rank);
            words::with(arena.word(), |word| arrivals::publish(word, call.call));
            outgoing.left(call.rank, call.slot);
        }
    }

    fn copy(&self, local: usize, remote: usize, bytes: usize) {
        let mut copied = vec![0; bytes];
        self.from.own_memory().read(local, &mut copied).unwrap();
        self.to.own_memory().write(remote, &copied).unwrap();
    }
}

/// The places that a hostile peer writes.
struct Target {
    hostile: Arc<Shared>,
    victim: Arc<Shared>,
    way: Way,
}

impl Target {
    /// Spoils some of what the peer has written for a call: of what it says of it, and of some of what the call carries.
    fn spoil(&self, call: u32, which: Range<usize>, random: &mut Random) {
        let (memory, region) = (self.victim.own_memory(), self.victim.own_region());
        let arena = self.victim.arena_of(0, HOSTILE);
        let (at, layout) = region.arena(0, HOSTILE);
        let part = |part: Part| (at + part.at, part.bytes);
        let header = part(arena.header_part(call));
        let rows = 5 * 2 * HIDDEN;
        let results = 2 * HIDDEN * 9 * 3;
        let (theirs, own) = (self.hostile.own_memory(), self.hostile.own_region());
        let data = match self.way.over_ports {
            true => [
                (memory, (region.source_rows(0, HOSTILE), rows)),
                (memory, (region.combined(0), 8 * 2 * HIDDEN)),
                (memory, (region.combined_checksums(0), 8 * 4)),
                (memory, (region.combined_weights(0), 8 * 4 * TOP_K)),
            ],
            false => [
                (theirs, (own.staging(0), rows)),
                (theirs, (own.results(0), results)),
                (theirs, (own.result_checksums(0), 9 * 4)),
                (theirs, (own.result_weights(0), 9 * 4 * TOP_K)),
            ],
        };
        for _ in 0..1 + random.below(4) {
            let (memory, (at, bytes)) = match random.below(20) {
                0..8 => (memory, (header.0, 72)),
                8..11 => (memory, part(arena.begins_part(3))),
                11..16 => (memory, part(arena.list_part(5))),
                // The whole arena but its word: a call that does not come is another matter.
                16 => (memory, (at + 4, layout.bytes() - 4)),
                _ => data[which.start + random.below(which.len())],
            };
            if random.below(6) == 0 {
                let noise: Vec<u8> = (0..bytes).map(|_| random.next() as u8).collect();
                memory.write(at, &noise).unwrap();
                continue;
            }
            let place = at + 4 * random.below(bytes / 4);
            let mut word = [0; 4];
            memory.read(place, &mut word).unwrap();
            let was = u32::from_le_bytes(word);
            let edges = [0, 1, 2, 3, 4, 5, 8, 9, 10, 0x7fff, 0x8000, 0xffff, 1 << 31, u32::MAX - 1, u32::MAX];
            let value = match random.below(6) {
                0 => was ^ 1 << random.below(32),
                1 => was.wrapping_add(1),
                2 => was.wrapping_sub(1),
                3 => random.next() as u32,
                _ => edges[random.below(edges.len())],
            };
            memory.write(place, &value.to_le_bytes()).unwrap();
        }
    }

    /// The peer is far ahead, so that nobody waits for it.
    fn run_ahead(&self) {
        words::with(self.victim.arena_of(0, HOSTILE).word(), |word| arrivals::publish(word, 1 << 20));
    }

    /// Makes a call of the victim, which harms nothing at the peer and has done nothing wrong.
    fn unharmed<T>(&self, call: impl FnOnce() -> Result<T, EpError>) -> Result<T, EpError> {
        let before = self.kept();
        let ended = call();
        assert!(before == self.kept(), "the victim wrote into its peer's part");
        if let Err(error) = &ended {
            assert_ne!(error.advice(), Advice::CorrectArguments, "{error}");
        }
        ended
    }

    /// What only the peer may write in its region.
    fn kept(&self) -> Vec<u8> {
        let mut bytes = vec![0; self.hostile.own_memory().bytes()];
        self.hostile.own_memory().read(0, &mut bytes).unwrap();
        let (at, layout) = self.hostile.own_region().arena(0, VICTIM);
        bytes[at..at + layout.bytes()].fill(0);
        bytes
    }
}

/// What the victim sees of a step.
type Seen = Vec<Vec<u8>>;

/// One rank's tokens, always the same.
struct Input {
    rows: Vec<Bf16>,
    choices: Vec<i64>,
    weights: Vec<f32>,
}

impl Input {
    fn new(rank: u32) -> Input {
        let tokens = config().max_tokens[rank as usize] as usize;
        let value = |at: usize| Bf16::from_f32((at % 97) as f32 + rank as f32);
        Input {
            rows: (0..tokens * HIDDEN).map(value).collect(),
            choices: (0..tokens as i64).flat_map(|token| [token % 5, (token * 3 + 4) % 6 - 1]).collect(),
            weights: (0..tokens * TOP_K).map(|at| 0.25 + at as f32).collect(),
        }
    }

    fn tokens(&self) -> Tokens<'_> {
        Tokens { rows: Rows::Bf16(&self.rows), choices: &self.choices, weights: Some(&self.weights) }
    }
}

/// What a step of either mode goes through.
enum Outputs {
    Latency(LatencyOutputs),
    Throughput(ThroughputOutputs),
}

enum Step<'a> {
    Latency(LatencyStep<'a>),
    Throughput(ThroughputStep<'a>, Vec<f32>),
}

enum Combine<'a> {
    Latency(LatencyCombine<'a>),
    Throughput(ThroughputCombine<'a>),
}

impl Outputs {
    fn new(way: Way, group: &Group) -> Outputs {
        match way.throughput {
            true => Outputs::Throughput(ThroughputOutputs::new(group, Payload::Bf16)),
            false => Outputs::Latency(LatencyOutputs::new(group, Payload::Bf16, ScaleOrder::ByRow)),
        }
    }

    /// Takes the rows, and makes something of each.
    fn receive<'a>(&mut self, dispatch: Dispatch<'a>, seen: &mut Seen) -> Result<Step<'a>, EpError> {
        let make = |results: &mut [Bf16], row: &[u8]| {
            results.iter_mut().zip(row).for_each(|(result, byte)| *result = Bf16::from_f32(f32::from(*byte)));
        };
        match self {
            Outputs::Latency(outputs) => {
                let mut step = dispatch.latency(outputs)?;
                for expert in 0..outputs.counts().len() {
                    for (row, results) in step.results_mut(expert).chunks_mut(HIDDEN).enumerate() {
                        make(results, outputs.row(expert, row));
                    }
                }
                let bytes = |words: &[u32]| words.iter().flat_map(|word| word.to_le_bytes()).collect();
                seen.extend([outputs.values().to_vec(), bytes(outputs.counts()), bytes(outputs.sources())]);
                Ok(Step::Latency(step))
            }
            Outputs::Throughput(outputs) => {
                let mut step = dispatch.throughput(outputs)?;
                let rows = outputs.values().chunks(2 * HIDDEN);
                step.results_mut().chunks_mut(HIDDEN).zip(rows).for_each(|(results, row)| make(results, row));
                let back = outputs.weights()[..outputs.len() * TOP_K].to_vec();
                let experts = outputs.experts().iter().flat_map(|expert| expert.to_le_bytes()).collect();
                // Whatever came, it can be spread.
                seen.extend([outputs.values().to_vec(), experts, outputs.expand(4).values]);
                Ok(Step::Throughput(step, back))
            }
        }
    }
}

impl<'a> Step<'a> {
    fn combine(self) -> Combine<'a> {
        match self {
            Step::Latency(step) => Combine::Latency(step.combine()),
            Step::Throughput(step, back) => Combine::Throughput(step.combine(Some(&back)).unwrap()),
        }
    }
}

impl Combine<'_> {
    fn receive(self, weights: &[f32], seen: &mut Seen) -> Result<(), EpError> {
        let mut out = vec![Bf16::from_f32(0.0); weights.len() / TOP_K * HIDDEN];
        let mut back = vec![0.0; weights.len()];
        match self {
            Combine::Latency(combine) => combine.receive(weights, &mut out)?,
            Combine::Throughput(combine) => combine.receive(&[], Some(&mut back), &mut out)?,
        };
        seen.push(out.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect());
        seen.push(back.iter().flat_map(|weight| weight.to_le_bytes()).collect());
        Ok(())
    }
}

/// One step of both ranks, spoilt in its dispatch, its combine, or both. Gives what the victim saw.
fn step_of_both(
    pair: &mut Pair,
    target: &Target,
    spoilt: [bool; 2],
    random: &mut Random,
) -> Result<Seen, EpError> {
    let (way, mut seen) = (target.way, Seen::new());
    let Pair { victim, hostile, .. } = pair;
    let [mut outputs, mut theirs] = [&victim.group, &hostile.group].map(|group| Outputs::new(way, group));
    let carry_all = [victim.carrier(target), hostile.carrier(target)];
    let carry_all = || carry_all.iter().for_each(Carrier::carry);
    let [ours, of_hostile] = [VICTIM, HOSTILE].map(Input::new);
    let sent = hostile.group.slot(0).dispatch(&of_hostile.tokens()).unwrap();
    let dispatch = victim.group.slot(0).dispatch(&ours.tokens()).unwrap();
    carry_all();
    // Before the victim can have anything against it.
    let their_step = theirs.receive(sent, &mut Seen::new()).unwrap();
    if spoilt[0] {
        target.spoil(1, 0..1, random);
    }
    let step = target.unharmed(|| outputs.receive(dispatch, &mut seen))?;
    let _sent = their_step.combine();
    let combine = step.combine();
    carry_all();
    if spoilt[1] {
        target.spoil(2, 1..4, random);
    }
    target.unharmed(|| combine.receive(&ours.weights, &mut seen))?;
    Ok(seen)
}

/// A step of the victim alone, whose peer has long published whatever lies there.
fn step_of_victim(pair: &mut Pair, target: &Target, random: &mut Random) -> Result<(), EpError> {
    let mut outputs = Outputs::new(target.way, &pair.victim.group);
    let (ours, mut seen) = (Input::new(VICTIM), Seen::new());
    let carrier = pair.victim.carrier(target);
    target.run_ahead();
    target.spoil(random.next() as u32, 0..4, random);
    let dispatch = pair.victim.group.slot(0).dispatch(&ours.tokens());
    carrier.carry();
    let step = target.unharmed(|| outputs.receive(dispatch?, &mut seen))?;
    let combine = step.combine();
    carrier.carry();
    target.spoil(random.next() as u32, 0..4, random);
    target.unharmed(|| combine.receive(&ours.weights, &mut seen))
}

#[test]
fn whatever_a_peer_writes_a_call_ends_well_or_says_why_not() {
    let mut kinds = BTreeMap::<&str, u32>::new();
    for way in Way::all() {
        let whole = {
            let (mut pair, mut random) = (Pair::new(way), Random(0));
            let target = pair.target(way);
            step_of_both(&mut pair, &target, [false; 2], &mut random).unwrap()
        };
        for seed in 1..=CASES {
            let (mut pair, mut random) = (Pair::new(way), Random(seed));
            let target = pair.target(way);
            let spoilt = [[true, false], [false, true], [true, true]][random.below(3)];
            let ended = step_of_both(&mut pair, &target, spoilt, &mut random);
            // What is verified is right or refused. Masks are no part of it: they are the peer's to tell.
            if way.verify && pair.victim.group.masked().is_empty() {
                assert!(ended.as_ref().is_err() || ended.as_ref() == Ok(&whole), "{way:?} seed {seed}");
            }
            *kinds.entry(kind(&ended.map(drop))).or_default() += 1;
            for _ in 0..3 {
                *kinds.entry(kind(&step_of_victim(&mut pair, &target, &mut random))).or_default() += 1;
            }
            assert!(!pair.victim.group.masked().contains(&VICTIM), "nobody masks itself");
        }
    }
    eprintln!("{kinds:?}");
    for expected in ["ok", "mismatch", "nonsense", "corrupted", "masked"] {
        assert!(kinds.contains_key(expected), "{kinds:?}");
    }
}

fn kind(ended: &Result<(), EpError>) -> &'static str {
    match ended {
        Ok(()) => "ok",
        Err(EpError::Mismatch { rank: HOSTILE, .. }) => "mismatch",
        Err(EpError::Nonsense { rank: HOSTILE, .. }) => "nonsense",
        Err(EpError::Stray { rank: HOSTILE, .. }) => "stray",
        Err(EpError::Corrupted { rank: HOSTILE, .. }) => "corrupted",
        Err(EpError::Masked { by: HOSTILE }) => "masked",
        Err(EpError::StillWriting { rank: HOSTILE }) => "still writing",
        Err(error) => panic!("{error:?} is nothing that a peer can bring about"),
    }
}
