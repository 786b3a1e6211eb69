//! Bytes that change in memory between a rank's write and another's read: found where calls are verified, and there as
//! they are where they are not.

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use crossdock_ep::{
    Bf16, Corrupted, EpError, Group, GroupConfig, GroupOptions, LatencyOutputs, LatencyStep, Payload, Rows,
    ScaleOrder, ThroughputOutputs, Tokens,
};
use crossdock_memory::Memory;

const RANKS: u32 = 3;
const TOKENS: usize = 4;
const HIDDEN: usize = 64;
/// The rank whose bytes change.
const WRITER: u32 = 2;
/// The token whose row or result changes, or whose entry in a list.
const TOKEN: usize = 1;
/// A number that is nowhere else.
const RARE: u16 = 0x4b7d;

fn config() -> GroupConfig {
    GroupConfig {
        max_tokens: vec![TOKENS as u32; RANKS as usize],
        experts: RANKS,
        top_k: 2,
        hidden: HIDDEN as u32,
        payload: Payload::Bf16,
        slots: 1,
        placement_version: 1,
    }
}

/// Every token goes to ranks 0 and 1.
fn choices() -> Vec<i64> {
    [0, 1].repeat(TOKENS)
}

/// A row that tells its rank and token, and is all of the rare number where it is the writer's token.
fn row(rank: u32, token: usize) -> Vec<Bf16> {
    match (rank, token) {
        (WRITER, TOKEN) => vec![Bf16::from_bits(RARE); HIDDEN],
        _ => vec![Bf16::from_f32((10 * rank as usize + token) as f32); HIDDEN],
    }
}

fn rows(rank: u32) -> Vec<Bf16> {
    (0..TOKENS).flat_map(|token| row(rank, token)).collect()
}

fn rare_row() -> Vec<u8> {
    RARE.to_le_bytes().repeat(HIDDEN)
}

/// Changes a bit of what begins like this in the memory, at its only place.
fn flip(memory: &Memory, pattern: &[u8]) {
    let mut bytes = vec![0; memory.bytes()];
    memory.read(0, &mut bytes).unwrap();
    let places: Vec<usize> =
        (0..bytes.len() - pattern.len()).step_by(4).filter(|&at| bytes[at..].starts_with(pattern)).collect();
    let [at] = places[..] else { panic!("{places:?}") };
    memory.write(at, &[pattern[0] ^ 1]).unwrap();
}

/// The pattern with that bit.
fn flipped(pattern: &[u8]) -> Vec<u8> {
    let mut bytes = pattern.to_vec();
    bytes[0] ^= 1;
    bytes
}

/// What a rank's thread is given besides its group.
struct Stage<'a> {
    rank: u32,
    regions: &'a [Memory],
    meeting: &'a Barrier,
}

impl Stage<'_> {
    /// While all ranks stand still, a bit of what begins like this in a rank's region changes.
    fn flip(&self, region: u32, pattern: &[u8]) {
        self.meeting.wait();
        if self.rank == WRITER {
            flip(&self.regions[region as usize], pattern);
        }
        self.meeting.wait();
    }
}

/// Runs each rank on a thread of its own, over memory that the test sees too.
fn each(verify: bool, rank: impl Fn(&mut Group, &Stage<'_>) + Sync) {
    let config = config();
    let regions: Vec<_> = (0..RANKS).map(|rank| Group::allocate_region(&config, rank).unwrap()).collect();
    let long = Duration::from_secs(60);
    let options = GroupOptions { deadline: long, warm_up: long, verify, ..GroupOptions::default() };
    let meeting = Barrier::new(RANKS as usize);
    thread::scope(|scope| {
        for at in 0..RANKS {
            // SAFETY: the regions are those of this group, and each rank is made once. The test writes there too, into
            // numbers that may be any, and while all ranks stand at a barrier.
            let mut group = unsafe { Group::over(&config, at, regions.clone(), &options).unwrap() };
            let stage = Stage { rank: at, regions: &regions, meeting: &meeting };
            let rank = &rank;
            scope.spawn(move || {
                rank(&mut group, &stage);
                // What went wrong costs its step and no other. All go on together, and nobody leaves before.
                for _ in 0..2 {
                    whole(&mut group);
                }
                stage.meeting.wait();
            });
        }
    });
}

/// A step in the latency mode, which finds nothing.
fn whole(group: &mut Group) {
    let rows = rows(group.rank());
    let mut outputs = LatencyOutputs::new(group, Payload::Bf16, ScaleOrder::ByRow);
    let choices = choices();
    let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
    let mut step = group.slot(0).dispatch(&tokens).unwrap().latency(&mut outputs).unwrap();
    answer(&outputs, &mut step);
    let mut out = vec![Bf16::from_f32(0.0); rows.len()];
    step.combine().receive(&[1.0, 0.0].repeat(TOKENS), &mut out).unwrap();
    assert_eq!(out, rows);
}

/// Every expert gives back what it got.
fn answer(outputs: &LatencyOutputs, step: &mut LatencyStep<'_>) {
    for expert in 0..outputs.counts().len() {
        for (row, result) in step.results_mut(expert).chunks_mut(HIDDEN).enumerate() {
            result.copy_from_slice(&numbers(outputs.row(expert, row)));
        }
    }
}

fn numbers(bytes: &[u8]) -> Vec<Bf16> {
    bytes.chunks(2).map(|two| Bf16::from_bits(u16::from_le_bytes(two.try_into().unwrap()))).collect()
}

fn corrupted<T>(by: u32, what: Corrupted) -> Result<T, EpError> {
    Err(EpError::Corrupted { rank: by, what })
}

#[test]
fn a_row_that_changes_is_found_by_whom_it_is_for() {
    for verify in [true, false] {
        each(verify, |group, stage| {
            let (rows, choices) = (rows(stage.rank), choices());
            let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
            // In the latency mode.
            let mut outputs = LatencyOutputs::new(group, Payload::Bf16, ScaleOrder::ByRow);
            let dispatch = group.slot(0).dispatch(&tokens).unwrap();
            stage.flip(WRITER, &rare_row());
            let received = dispatch.latency(&mut outputs).map(drop);
            let is_for = stage.rank < 2;
            if verify && is_for {
                assert_eq!(received, corrupted(WRITER, Corrupted::Row { token: TOKEN as u32 }));
            } else {
                received.unwrap();
            }
            if !verify && is_for {
                let at = outputs.range(0, WRITER).start as usize + TOKEN;
                assert_eq!(outputs.row(0, at), flipped(&rare_row()));
            }
            // In the throughput mode.
            let mut outputs = ThroughputOutputs::new(group, Payload::Bf16);
            let dispatch = group.slot(0).dispatch(&tokens).unwrap();
            stage.flip(WRITER, &rare_row());
            let received = dispatch.throughput(&mut outputs).map(drop);
            if verify && is_for {
                assert_eq!(received, corrupted(WRITER, Corrupted::Row { token: TOKEN as u32 }));
            } else {
                received.unwrap();
            }
            if !verify && is_for {
                let at = outputs.range(WRITER).start + TOKEN;
                assert_eq!(outputs.values()[at * 2 * HIDDEN..][..2 * HIDDEN], flipped(&rare_row()));
            }
        });
    }
}

/// The result of rank 0 for the writer's token, which is where rank 0's experts left it.
#[test]
fn a_result_that_changes_is_found_by_whom_it_is_for() {
    for verify in [true, false] {
        each(verify, |group, stage| {
            let (rows, choices) = (rows(stage.rank), choices());
            let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
            let mut out = vec![Bf16::from_f32(0.0); rows.len()];
            let mut changed = rows.clone();
            changed[TOKEN * HIDDEN] = Bf16::from_bits(RARE ^ 1);
            let found = corrupted(0, Corrupted::Result { token: TOKEN as u32 });
            let is_for = stage.rank == WRITER;
            // In the latency mode, where the second choice counts nothing.
            let mut outputs = LatencyOutputs::new(group, Payload::Bf16, ScaleOrder::ByRow);
            let mut step = group.slot(0).dispatch(&tokens).unwrap().latency(&mut outputs).unwrap();
            answer(&outputs, &mut step);
            let combine = step.combine();
            stage.flip(0, &rare_row());
            let received = combine.receive(&[1.0, 0.0].repeat(TOKENS), &mut out).map(drop);
            match (verify, is_for) {
                (true, true) => assert_eq!(received, found),
                (_, is_for) => {
                    received.unwrap();
                    assert_eq!(out, if is_for { &changed[..] } else { &rows[..] });
                }
            }
            // In the throughput mode, where rank 1 gives zeros.
            let mut outputs = ThroughputOutputs::new(group, Payload::Bf16);
            let mut step = group.slot(0).dispatch(&tokens).unwrap().throughput(&mut outputs).unwrap();
            let given = match stage.rank {
                0 => numbers(&outputs.values()[..outputs.len() * 2 * HIDDEN]),
                _ => vec![Bf16::from_f32(0.0); outputs.len() * HIDDEN],
            };
            step.results_mut().copy_from_slice(&given);
            let combine = step.combine(None).unwrap();
            stage.flip(0, &rare_row());
            let received = combine.receive(&[], None, &mut out).map(drop);
            match (verify, is_for) {
                (true, true) => assert_eq!(received, found),
                (_, is_for) => {
                    received.unwrap();
                    assert_eq!(out, if is_for { &changed[..] } else { &rows[..] });
                }
            }
        });
    }
}

/// The weight of the writer's token for rank 0's expert, in the list that it left at rank 0.
#[test]
fn a_list_that_changes_is_found_by_whom_it_is_for() {
    let rare = f32::from_bits(0x3f12_3456);
    for verify in [true, false] {
        each(verify, |group, stage| {
            let (rows, choices) = (rows(stage.rank), choices());
            let mut weights = vec![0.5; choices.len()];
            if stage.rank == WRITER {
                weights[2 * TOKEN] = rare;
            }
            let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: Some(&weights) };
            let mut outputs = ThroughputOutputs::new(group, Payload::Bf16);
            let dispatch = group.slot(0).dispatch(&tokens).unwrap();
            stage.flip(0, &rare.to_le_bytes());
            let received = dispatch.throughput(&mut outputs).map(drop);
            if verify && stage.rank == 0 {
                return assert_eq!(received, corrupted(WRITER, Corrupted::List));
            }
            received.unwrap();
            if stage.rank == 0 {
                let at = outputs.range(WRITER).start + TOKEN;
                assert_eq!(outputs.weights()[2 * at].to_bits(), rare.to_bits() ^ 1);
            }
        });
    }
}

/// A weight that rank 0 gives back for the writer's token.
#[test]
fn a_weight_that_changes_on_its_way_back_is_found_by_whom_it_is_for() {
    let rare = f32::from_bits(0x3f12_3456);
    for verify in [true, false] {
        each(verify, |group, stage| {
            let (rows, choices) = (rows(stage.rank), choices());
            let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
            let mut outputs = ThroughputOutputs::new(group, Payload::Bf16);
            let step = group.slot(0).dispatch(&tokens).unwrap().throughput(&mut outputs).unwrap();
            let mut back = vec![0.0; 2 * outputs.len()];
            if stage.rank == 0 {
                back[2 * (outputs.range(WRITER).start + TOKEN)] = rare;
            }
            let combine = step.combine(Some(&back)).unwrap();
            stage.flip(0, &rare.to_le_bytes());
            let (mut out, mut weights) = (rows.clone(), vec![0.0; choices.len()]);
            let received = combine.receive(&[], Some(&mut weights), &mut out).map(drop);
            if verify && stage.rank == WRITER {
                return assert_eq!(received, corrupted(0, Corrupted::Result { token: TOKEN as u32 }));
            }
            received.unwrap();
            if stage.rank == WRITER {
                assert_eq!(weights[2 * TOKEN].to_bits(), rare.to_bits() ^ 1);
            }
        });
    }
}
