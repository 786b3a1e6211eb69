//! A group whose ranks are on several hosts gives what one gives whose ranks share memory, bit for bit: here "hosts" are
//! domains of shared memory, with another port between them.

mod carriers;

use std::thread;
use std::time::Duration;

use crossdock::experts::{
    Bf16, EpError, Group, GroupConfig, GroupOptions, LatencyOutputs, Meeting, MeetingConfig, Payload, Rows,
    ScaleOrder, ScaleRule, Scales, Slot, ThroughputOutputs, Tokens,
};
use crossdock::{Authentication, PortConfig, ShmOptions};

use carriers::Carrier;

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

    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit.max(1)
    }
}

/// One rank's tokens of one step.
struct Input {
    rows: Vec<Bf16>,
    /// The same rows as bytes, for forms that others have made.
    bytes: Vec<u8>,
    choices: Vec<i64>,
    weights: Vec<f32>,
}

fn input(config: &GroupConfig, rank: usize, random: &mut Random) -> Input {
    let tokens = random.below(u64::from(config.max_tokens[rank]) + 1) as usize;
    // Of either sign over eight powers of two.
    let value = |random: &mut Random| {
        let bits = random.next() as u16;
        Bf16::from_bits(bits & 0x807f | (121 + (bits >> 7 & 7)) << 7)
    };
    let mut choices = Vec::new();
    for _ in 0..tokens {
        let first = choices.len();
        for _ in 0..config.top_k {
            let expert = random.below(u64::from(config.experts) + 1) as i64 - 1;
            choices.push(if choices[first..].contains(&expert) { -1 } else { expert });
        }
    }
    let rows: Vec<Bf16> = (0..tokens * config.hidden as usize).map(|_| value(random)).collect();
    Input {
        bytes: rows.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect(),
        rows,
        weights: choices.iter().map(|_| random.below(1 << 20) as f32 / (1 << 20) as f32).collect(),
        choices,
    }
}

/// All that a rank sees of some steps in both modes.
#[derive(PartialEq)]
struct Seen(Vec<(String, Vec<u8>)>);

impl Seen {
    fn note(&mut self, what: impl Into<String>, bytes: impl IntoIterator<Item = u8>) {
        self.0.push((what.into(), bytes.into_iter().collect()));
    }

    fn words(&mut self, what: impl Into<String>, words: impl IntoIterator<Item = u32>) {
        self.note(what, words.into_iter().flat_map(u32::to_le_bytes));
    }
}

/// What experts are taken to make of a row: any function of its bytes.
fn made_of(values: &[u8], scales: &[u8], salt: u64, into: &mut [Bf16]) {
    let mut random = Random(salt);
    for byte in values.iter().chain(scales) {
        random.0 = (random.0 ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
    }
    for value in into {
        let bits = random.next() as u16;
        *value = Bf16::from_bits(bits & 0x807f | (120 + (bits >> 7 & 7)) << 7);
    }
}

fn rows<'a>(step: usize, hidden: u32, input: &'a Input) -> (Payload, Rows<'a>) {
    let rows = &input.rows;
    match step % 6 {
        0 => (Payload::Fp8, Rows::Fp8(rows, ScaleRule::Plain)),
        1 => (Payload::Bf16, Rows::Bf16(rows)),
        2 => (Payload::Fp8, Rows::Fp8(rows, ScaleRule::PowerOfTwo)),
        3 => (Payload::Fp8Ue8m0, Rows::Fp8Ue8m0(rows)),
        // As NVFP4 is packed: two values a byte, a scale for 16 of them; or FP8 rows that somebody else has made, whose
        // scales lie column by column. What the bytes are makes no difference.
        4 => made(Payload::Opaque { row_bytes: hidden / 2, scale_bytes: hidden / 16 }, 1, hidden, input),
        _ => made(Payload::Fp8, 4, hidden, input),
    }
}

fn made<'a>(payload: Payload, element_bytes: usize, hidden: u32, input: &'a Input) -> (Payload, Rows<'a>) {
    let tokens = input.rows.len() / hidden as usize;
    let bytes = &input.bytes;
    let values = &bytes[..tokens * payload.row_bytes(hidden) as usize];
    let scales = Scales {
        bytes: &bytes[..tokens * payload.scale_bytes(hidden) as usize],
        element_bytes,
        token_stride: element_bytes,
        element_stride: tokens * element_bytes,
    };
    (payload, Rows::Made { payload, values, scales })
}

fn steps(mut group: Group, inputs: &[Vec<Input>]) -> Result<Seen, EpError> {
    let mut seen = Seen(Vec::new());
    for (at, inputs) in inputs.iter().enumerate() {
        let input = &inputs[group.rank() as usize];
        if at % 3 == 2 {
            // One that is dropped where it has been received, and one before.
            let (payload, rows) = rows(at, group.config().hidden, input);
            let mut outputs = LatencyOutputs::new(&group, payload, ScaleOrder::ByRow);
            let tokens = Tokens { rows, choices: &input.choices, weights: None };
            drop(group.slot(0).dispatch(&tokens)?.latency(&mut outputs)?);
            drop(group.slot(0).dispatch(&tokens)?);
        }
        latency(&mut group, at, input, &mut seen)?;
        throughput(&mut group, at, input, &mut seen)?;
    }
    Ok(seen)
}

fn latency_outputs(group: &Group, at: usize) -> LatencyOutputs {
    let order = if at.is_multiple_of(2) { ScaleOrder::ByColumn } else { ScaleOrder::ByRow };
    let nothing = Input { rows: Vec::new(), bytes: Vec::new(), choices: Vec::new(), weights: Vec::new() };
    LatencyOutputs::new(group, rows(at, group.config().hidden, &nothing).0, order)
}

fn latency(group: &mut Group, at: usize, input: &Input, seen: &mut Seen) -> Result<(), EpError> {
    let (outputs, config) = (latency_outputs(group, at), group.config().clone());
    latency_on(group.slot(at % 2), &config, outputs, at, input, seen)
}

fn latency_on(
    slot: &mut Slot,
    config: &GroupConfig,
    mut outputs: LatencyOutputs,
    at: usize,
    input: &Input,
    seen: &mut Seen,
) -> Result<(), EpError> {
    let (hidden, ranks) = (config.hidden as usize, config.ranks());
    let tokens = Tokens { rows: rows(at, config.hidden, input).1, choices: &input.choices, weights: None };
    let mut step = slot.dispatch(&tokens)?.latency(&mut outputs)?;
    seen.note(format!("values {at}"), outputs.values().iter().copied());
    seen.note(format!("scales {at}"), outputs.scales().iter().copied());
    seen.words(format!("counts {at}"), outputs.counts().iter().copied());
    seen.words(format!("sources {at}"), outputs.sources().iter().copied());
    for expert in 0..outputs.counts().len() {
        let ranges = (0..ranks).flat_map(|source| {
            let range = outputs.range(expert, source);
            [range.start, range.end]
        });
        seen.words(format!("ranges of {expert} in {at}"), ranges);
        for (row, into) in step.results_mut(expert).chunks_mut(hidden).enumerate() {
            made_of(outputs.row(expert, row), &outputs.scales_of(expert, row), expert as u64, into);
        }
    }
    let mut out = input.rows.clone();
    let report = step.combine().receive(&input.weights, &mut out)?;
    assert!(report.masked.is_empty() && report.lost.is_empty());
    seen.note(format!("combined {at}"), out.iter().flat_map(|value| value.to_bits().to_le_bytes()));
    Ok(())
}

fn throughput(group: &mut Group, at: usize, input: &Input, seen: &mut Seen) -> Result<(), EpError> {
    let (payload, rows) = rows(at + 1, group.config().hidden, input);
    let mut outputs = ThroughputOutputs::new(group, payload);
    let (config, slot) = (group.config().clone(), group.slot(0));
    let hidden = config.hidden as usize;
    // The second time along the same route.
    let route = slot.route(&input.choices)?;
    for time in 0..2 {
        let dispatch = match time {
            0 => {
                let tokens = Tokens { rows, choices: &input.choices, weights: Some(&input.weights) };
                slot.dispatch(&tokens)?
            }
            _ => slot.dispatch_along(&route, rows, Some(&input.weights))?,
        };
        assert_eq!(dispatch.route(), route);
        let mut step = dispatch.throughput(&mut outputs)?;
        let (rows, row_bytes, scale_bytes) = (
            outputs.len(),
            payload.row_bytes(config.hidden) as usize,
            payload.scale_bytes(config.hidden) as usize,
        );
        seen.words(format!("rows {at}"), [rows as u32]);
        seen.note(format!("rows' values {at}"), outputs.values().iter().copied());
        seen.note(format!("rows' scales {at}"), outputs.scales().iter().copied());
        seen.note(format!("experts {at}"), outputs.experts().iter().flat_map(|expert| expert.to_le_bytes()));
        let weights = &outputs.weights()[..rows * config.top_k as usize];
        seen.words(format!("weights {at}"), weights.iter().map(|weight| weight.to_bits()));
        seen.words(format!("tokens {at}"), outputs.tokens()[..rows].iter().copied());
        for (row, into) in step.results_mut().chunks_mut(hidden).enumerate() {
            let values = &outputs.values()[row * row_bytes..][..row_bytes];
            made_of(values, &outputs.scales()[row * scale_bytes..][..scale_bytes], 99, into);
        }
        let back = weights.to_vec();
        let mut out = input.rows.clone();
        let mut summed = vec![-1.0; input.weights.len()];
        let bias = &input.rows[..];
        let report = step.combine(Some(&back))?.receive(&[bias], Some(&mut summed), &mut out)?;
        assert!(report.masked.is_empty() && report.lost.is_empty());
        seen.note(format!("sums {at}"), out.iter().flat_map(|value| value.to_bits().to_le_bytes()));
        seen.words(format!("weights back {at}"), summed.iter().map(|weight| weight.to_bits()));
    }
    Ok(())
}

fn options() -> GroupOptions {
    let long = Duration::from_secs(60);
    GroupOptions { deadline: long, warm_up: long, verify: true, ..GroupOptions::default() }
}

/// Each slot has a thread of its own, and its own tokens at each step.
fn steps_by_slot(mut group: Group, inputs: &[Vec<Input>]) -> Result<Seen, EpError> {
    let (config, rank) = (group.config().clone(), group.rank() as usize);
    let slots = config.slots as usize;
    let mut outputs: Vec<Vec<LatencyOutputs>> =
        (0..slots).map(|_| (0..inputs.len()).map(|at| latency_outputs(&group, at)).collect()).collect();
    let all = thread::scope(|scope| {
        let threads: Vec<_> = (group.slots().iter_mut().zip(outputs.drain(..)).enumerate())
            .map(|(which, (slot, outputs))| {
                let config = &config;
                scope.spawn(move || {
                    let mut seen = Seen(Vec::new());
                    for (at, outputs) in outputs.into_iter().enumerate() {
                        let input = &inputs[(at + which) % inputs.len()][rank];
                        latency_on(slot, config, outputs, at, input, &mut seen)?;
                    }
                    Ok(seen)
                })
            })
            .collect();
        threads.into_iter().map(|slot| slot.join().expect("a slot")).collect::<Result<Vec<Seen>, EpError>>()
    })?;
    Ok(Seen(all.into_iter().flat_map(|seen| seen.0).collect()))
}

type Steps = fn(Group, &[Vec<Input>]) -> Result<Seen, EpError>;

fn all(groups: Vec<Group>, inputs: &[Vec<Input>], steps: Steps) -> Vec<Seen> {
    thread::scope(|scope| {
        let ranks: Vec<_> = groups
            .into_iter()
            .map(|group| scope.spawn(move || steps(group, inputs).unwrap_or_else(|error| panic!("{error}"))))
            .collect();
        ranks.into_iter().map(|rank| rank.join().expect("a rank")).collect()
    })
}

/// The ranks meet; neighbours are on one host as long as there are ranks for each.
fn meet(config: &GroupConfig, ranks_per_node: u32, carrier: &Carrier) -> Vec<Group> {
    let ranks = 0..config.ranks();
    let meetings: Vec<Meeting> = ranks
        .map(|rank| {
            let auth = Authentication::PreSharedKey(b"of these tests only".to_vec());
            let mut meeting = MeetingConfig::new(config.clone(), rank, auth);
            let domain = format!("node {}", rank / ranks_per_node);
            let shm = ShmOptions { domain, ..ShmOptions::default() };
            meeting.ports = vec![PortConfig::Shm(shm), carrier.port((rank / ranks_per_node) as usize)];
            meeting.options = options();
            // Threads of a busy machine are not heard of for long.
            meeting.heartbeats_missed = 150;
            Meeting::open(meeting).expect("a meeting")
        })
        .collect();
    let addresses: Vec<String> = meetings.iter().map(|meeting| meeting.address().to_owned()).collect();
    thread::scope(|scope| {
        let meet = |meeting: Meeting| {
            let addresses = &addresses;
            scope.spawn(move || meeting.meet(addresses, Duration::from_secs(60)).expect("all ranks"))
        };
        let threads: Vec<_> = meetings.into_iter().map(meet).collect();
        threads.into_iter().map(|thread| thread.join().expect("a rank")).collect()
    })
}

/// What carries tokens from host to host.
fn between() -> impl Iterator<Item = Carrier> {
    Carrier::all().into_iter().filter(|carrier| !matches!(carrier, Carrier::Shm))
}

fn compare(config: &GroupConfig, nodes_of: &[u32], seed: u64, steps: Steps) {
    let mut random = Random(seed);
    let ranks = config.max_tokens.len();
    let inputs: Vec<Vec<Input>> =
        (0..7).map(|_| (0..ranks).map(|rank| input(config, rank, &mut random)).collect()).collect();
    let expected = all(Group::in_process(config, &options()).expect("a group"), &inputs, steps);
    let nodes_of = |carrier: Carrier| nodes_of.iter().map(move |&ranks| (carrier.clone(), ranks));
    for (carrier, ranks_per_node) in between().flat_map(nodes_of) {
        let seen = all(meet(config, ranks_per_node, &carrier), &inputs, steps);
        for (rank, (seen, expected)) in seen.iter().zip(&expected).enumerate() {
            for (seen, expected) in seen.0.iter().zip(&expected.0) {
                assert!(
                    seen == expected,
                    "{} of rank {rank}, {ranks_per_node} ranks a node, {carrier:?}, seed {seed}",
                    seen.0
                );
            }
            assert_eq!(seen.0.len(), expected.0.len());
        }
    }
}

#[test]
fn two_nodes_with_four_ranks_each_give_what_one_node_gives() {
    let config = GroupConfig {
        max_tokens: vec![12, 7, 0, 16, 1, 9, 12, 3],
        experts: 21,
        top_k: 5,
        hidden: 256,
        payload: Payload::Bf16,
        slots: 2,
        placement_version: 4,
    };
    // One node, two with four ranks each, four with two, and each rank on its own.
    compare(&config, &[8, 4, 2, 1], 1, steps);
}

#[test]
fn slots_do_not_wait_for_each_other_between_nodes() {
    let config = GroupConfig {
        max_tokens: vec![10, 20, 5],
        experts: 8,
        top_k: 3,
        hidden: 384,
        payload: Payload::Bf16,
        slots: 4,
        placement_version: 5,
    };
    compare(&config, &[2, 1], 2, steps_by_slot);
}

#[test]
fn random_groups_on_random_nodes() {
    let cases = std::env::var("CROSSDOCK_EP_CASES").map_or(6, |cases| cases.parse().expect("a number"));
    let first = std::env::var("CROSSDOCK_EP_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    for seed in first..first + cases {
        let mut random = Random(seed);
        let ranks = 1 + random.below(5);
        let config = GroupConfig {
            max_tokens: (0..ranks).map(|_| random.below(20) as u32).collect(),
            experts: 1 + random.below(12) as u32,
            top_k: 1 + random.below(6) as u32,
            hidden: 128 * (1 + random.below(4)) as u32,
            payload: Payload::Bf16,
            slots: 2,
            placement_version: seed,
        };
        eprintln!("seed {seed}: {config:?}");
        compare(&config, &[1 + random.below(ranks) as u32], seed, steps);
    }
}

/// Whoever leaves takes nothing back: what it has sent is there, however soon it goes.
#[test]
fn a_rank_may_leave_right_after_its_last_step() {
    let config = GroupConfig {
        max_tokens: vec![64; 2],
        experts: 4,
        top_k: 2,
        hidden: 1024,
        payload: Payload::Bf16,
        slots: 2,
        placement_version: 6,
    };
    for (carrier, seed) in between().flat_map(|carrier| (0..20).map(move |seed| (carrier.clone(), seed))) {
        let mut random = Random(seed);
        let inputs: Vec<Vec<Input>> =
            (0..2).map(|_| (0..2).map(|rank| input(&config, rank, &mut random)).collect()).collect();
        all(meet(&config, 1, &carrier), &inputs, steps);
    }
}

/// A rank that another goes on without hears so through its port, and does not go on by itself.
#[test]
fn a_rank_that_is_masked_through_a_port_is_told() {
    let config = GroupConfig {
        max_tokens: vec![4; 3],
        experts: 3,
        top_k: 1,
        hidden: 128,
        payload: Payload::Bf16,
        slots: 1,
        placement_version: 7,
    };
    for carrier in between() {
        is_told_of_its_mask(meet(&config, 1, &carrier));
    }
}

fn is_told_of_its_mask(groups: Vec<Group>) {
    let mourner = groups[0].mourner();
    let step = |group: &mut Group| {
        let rows = vec![Bf16::from_f32(1.0); 3 * 128];
        let mut outputs = LatencyOutputs::new(group, Payload::Bf16, ScaleOrder::ByRow);
        let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &[0, 1, 2], weights: None };
        let step = group.slot(0).dispatch(&tokens)?.latency(&mut outputs)?;
        step.combine().receive(&[1.0; 3], &mut rows.clone())
    };
    thread::scope(|scope| {
        for mut group in groups {
            let mourner = &mourner;
            scope.spawn(move || {
                let rank = group.rank();
                let first = step(&mut group).expect("all ranks are here");
                assert!(first.masked.is_empty());
                if rank == 0 {
                    mourner.mark_dead(1);
                }
                if rank == 1 {
                    // So that the others come to wait for it.
                    thread::sleep(Duration::from_millis(200));
                    let ended = (0..20).map(|_| step(&mut group)).find(Result::is_err);
                    assert!(matches!(ended, Some(Err(EpError::Masked { .. }))), "{ended:?}");
                    assert!(matches!(step(&mut group), Err(EpError::Masked { .. })), "it is out for good");
                    return;
                }
                let last = (0..20).map(|_| step(&mut group).expect("these go on")).last();
                assert_eq!(last.expect("twenty steps").masked, [1]);
            });
        }
    });
}
