//! Several micro-batches under way at once, forms that the library does not know, and scales in any order.

use std::thread;
use std::time::{Duration, Instant};

use crossdock_ep::{
    Bf16, Group, GroupConfig, GroupOptions, LatencyOutputs, Payload, Rows, ScaleOrder, Scales, Slot,
    ThroughputOutputs, Tokens,
};

const HIDDEN: usize = 64;
const TOKENS: usize = 12;

fn config(ranks: usize, slots: u32, payload: Payload) -> GroupConfig {
    GroupConfig {
        max_tokens: vec![TOKENS as u32; ranks],
        experts: 2 * ranks as u32,
        top_k: 2,
        hidden: HIDDEN as u32,
        payload,
        slots,
        placement_version: 0,
    }
}

fn options() -> GroupOptions {
    let long = Duration::from_secs(60);
    GroupOptions { deadline: long, warm_up: long, ..GroupOptions::default() }
}

fn choices(ranks: usize, salt: usize) -> Vec<i64> {
    (0..TOKENS)
        .flat_map(|t| [(t + salt) % (2 * ranks), (t + salt + 1) % (2 * ranks)])
        .map(|e| e as i64)
        .collect()
}

fn double(outputs: &LatencyOutputs, step: &mut crossdock_ep::LatencyStep<'_>) {
    for expert in 0..outputs.counts().len() {
        for (row, result) in step.results_mut(expert).chunks_mut(HIDDEN).enumerate() {
            for (bytes, result) in outputs.row(expert, row).chunks(2).zip(result) {
                let value = Bf16::from_bits(u16::from_le_bytes(bytes.try_into().unwrap()));
                *result = Bf16::from_f32(2.0 * value.to_f32());
            }
        }
    }
}

/// Each slot belongs to a thread of its own, and takes its own time.
#[test]
fn slots_do_not_wait_for_each_other() {
    let (ranks, slots) = (3, 4);
    let groups = Group::in_process(&config(ranks, slots, Payload::Bf16), &options()).unwrap();
    thread::scope(|scope| {
        for mut group in groups {
            scope.spawn(move || {
                let outputs: Vec<LatencyOutputs> = (0..slots)
                    .map(|_| LatencyOutputs::new(&group, Payload::Bf16, ScaleOrder::ByRow))
                    .collect();
                let rank = group.rank() as usize;
                thread::scope(|scope| {
                    let slots = group.slots().iter_mut().zip(outputs).enumerate();
                    let threads: Vec<_> = slots
                        .map(|(at, (slot, outputs))| {
                            scope.spawn(move || steps_of_a_slot(slot, outputs, ranks, at, rank))
                        })
                        .collect();
                    // Joined one by one, which ThreadSanitizer sees.
                    threads.into_iter().for_each(|thread| thread.join().unwrap());
                });
            });
        }
    });
}

fn steps_of_a_slot(slot: &mut Slot, mut outputs: LatencyOutputs, ranks: usize, at: usize, rank: usize) {
    for step in 0..40 {
        if (step + at + rank).is_multiple_of(5) {
            thread::sleep(Duration::from_micros(200));
        }
        // Nobody else has this row, in this slot or another, in this step or another.
        let row = |rank: usize, token: usize| {
            (0..HIDDEN).map(move |channel| {
                Bf16::from_f32([1 + rank, 8 + at, 16 + step, 64 + token][channel % 4] as f32)
            })
        };
        let rows: Vec<Bf16> = (0..TOKENS).flat_map(|token| row(rank, token)).collect();
        let choices = choices(ranks, at + step);
        let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
        let mut received = slot.dispatch(&tokens).unwrap().latency(&mut outputs).unwrap();
        for expert in 0..outputs.counts().len() {
            for source in 0..ranks as u32 {
                for place in outputs.range(expert, source) {
                    let token = outputs.sources()[expert * outputs.rows() + place as usize] as usize;
                    let sent = row(source as usize, token).flat_map(|value| value.to_bits().to_le_bytes());
                    assert!(sent.eq(outputs.row(expert, place as usize).iter().copied()));
                }
            }
        }
        double(&outputs, &mut received);
        let mut out = vec![Bf16::from_f32(0.0); rows.len()];
        received.combine().receive(&[0.25; 2 * TOKENS], &mut out).unwrap();
        assert_eq!(out, rows, "two halves of twice as much, slot {at} step {step}");
    }
}

/// The first step of a slot may take long, but nobody waits in it for whom another slot has masked.
#[test]
fn a_rank_that_one_slot_masks_is_waited_for_in_none() {
    let options = GroupOptions { deadline: Duration::from_millis(500), ..options() };
    let mut groups = Group::in_process(&config(2, 2, Payload::Bf16), &options).unwrap();
    let mut silent = groups.pop().unwrap();
    let mut group = groups.pop().unwrap();
    let outputs = |group: &Group| LatencyOutputs::new(group, Payload::Bf16, ScaleOrder::ByRow);
    let mut of_silent = outputs(&silent);
    let mut of_group = [0, 1].map(|_| outputs(&group));
    let rows = vec![Bf16::from_f32(1.0); TOKENS * HIDDEN];
    let choices = choices(2, 0);
    let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
    let step = |slot: &mut Slot, outputs: &mut LatencyOutputs| {
        let received = slot.dispatch(&tokens).unwrap().latency(outputs).unwrap();
        received.combine().receive(&[0.5; 2 * TOKENS], &mut rows.clone()).unwrap().masked
    };
    thread::scope(|scope| {
        // One step in the first slot, and then nothing.
        let one = scope.spawn(|| step(silent.slot(0), &mut of_silent));
        let [in_first, in_second] = &mut of_group;
        assert!(step(group.slot(0), in_first).is_empty());
        assert!(one.join().unwrap().is_empty());
        let [first, second] = group.slots() else { unreachable!("two slots") };
        let begun = Instant::now();
        let waits = scope.spawn(|| step(second, in_second));
        assert_eq!(step(first, in_first), [1]);
        assert_eq!(waits.join().unwrap(), [1]);
        assert!(begun.elapsed() < Duration::from_secs(20), "the first step's limit is longer");
    });
}

/// The dispatch of one micro-batch and the combine of another, in one thread.
#[test]
fn a_dispatch_and_a_combine_may_overlap() {
    let ranks = 2;
    let groups = Group::in_process(&config(ranks, 2, Payload::Bf16), &options()).unwrap();
    thread::scope(|scope| {
        for mut group in groups {
            scope.spawn(move || {
                let mut outputs =
                    [0, 1].map(|_| LatencyOutputs::new(&group, Payload::Bf16, ScaleOrder::ByRow));
                let [first, second] = group.slots() else { unreachable!("two slots") };
                let [in_first, in_second] = &mut outputs;
                let rows = [1.0, 8.0].map(|value| vec![Bf16::from_f32(value); TOKENS * HIDDEN]);
                let choices = choices(ranks, 0);
                let tokens =
                    |at: usize| Tokens { rows: Rows::Bf16(&rows[at]), choices: &choices, weights: None };
                for _ in 0..20 {
                    let mut received = first.dispatch(&tokens(0)).unwrap().latency(in_first).unwrap();
                    double(in_first, &mut received);
                    let sent = second.dispatch(&tokens(1)).unwrap();
                    let combining = received.combine();
                    let mut received = sent.latency(in_second).unwrap();
                    let mut out = rows[0].clone();
                    combining.receive(&[0.25; 2 * TOKENS], &mut out).unwrap();
                    assert_eq!(out, rows[0]);
                    double(in_second, &mut received);
                    received.combine().receive(&[0.25; 2 * TOKENS], &mut out).unwrap();
                    assert_eq!(out, rows[1]);
                }
            });
        }
    });
}

/// Packed 4-bit values with a scale for 16 of them arrive as they were, scales from any place.
#[test]
fn bytes_that_mean_nothing_arrive_with_their_scales() {
    let payload = Payload::Opaque { row_bytes: 32, scale_bytes: 4 };
    let ranks = 2;
    let groups = Group::in_process(&config(ranks, 1, payload), &options()).unwrap();
    thread::scope(|scope| {
        for mut group in groups {
            scope.spawn(move || {
                let row = |rank: u32, token: usize| {
                    (0..32).map(move |at| (rank as usize * 100 + token * 8 + at) as u8)
                };
                let values: Vec<u8> = (0..TOKENS).flat_map(|token| row(group.rank(), token)).collect();
                // Element by element, as a matrix of columns.
                let scale = |rank: u32, token: usize, element: usize| {
                    (rank as usize * 64 + token * 4 + element) as u8
                };
                let by_column: Vec<u8> = (0..4)
                    .flat_map(|e| (0..TOKENS).map(move |t| (e, t)))
                    .map(|(e, t)| scale(group.rank(), t, e))
                    .collect();
                let scales =
                    Scales { bytes: &by_column, element_bytes: 1, token_stride: 1, element_stride: TOKENS };
                let choices = choices(ranks, 0);
                let rows = Rows::Made { payload, values: &values, scales };
                let tokens = Tokens { rows, choices: &choices, weights: None };
                let mut latency = LatencyOutputs::new(&group, payload, ScaleOrder::ByColumn);
                let mut throughput = ThroughputOutputs::new(&group, payload);
                drop(group.slot(0).dispatch(&tokens).unwrap().latency(&mut latency).unwrap());
                drop(group.slot(0).dispatch(&tokens).unwrap().throughput(&mut throughput).unwrap());
                let mut seen = 0;
                for expert in 0..latency.counts().len() {
                    for source in 0..ranks as u32 {
                        for at in latency.range(expert, source) {
                            let token = latency.sources()[expert * latency.rows() + at as usize] as usize;
                            assert!(row(source, token).eq(latency.row(expert, at as usize).iter().copied()));
                            let expected: Vec<u8> =
                                (0..4).map(|element| scale(source, token, element)).collect();
                            assert_eq!(latency.scales_of(expert, at as usize), expected);
                            seen += 1;
                        }
                    }
                }
                assert_eq!(seen, TOKENS * ranks, "half of all choices");
                for source in 0..ranks as u32 {
                    for at in throughput.range(source) {
                        let token = throughput.tokens()[at] as usize;
                        assert!(row(source, token).eq(throughput.values()[at * 32..][..32].iter().copied()));
                        assert!(
                            (0..4)
                                .map(|e| scale(source, token, e))
                                .eq(throughput.scales()[at * 4..][..4].iter().copied())
                        );
                    }
                }
            });
        }
    });
}

/// What one form leaves behind is not taken for what another fills up.
#[test]
fn forms_may_change_from_step_to_step() {
    let hidden = 256;
    let config = GroupConfig { hidden, ..config(1, 1, Payload::Bf16) };
    let mut group = Group::in_process(&config, &options()).unwrap().remove(0);
    let rows = vec![Bf16::from_f32(3.0); TOKENS * hidden as usize];
    let choices = choices(1, 0);
    for _ in 0..2 {
        let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
        let mut outputs = LatencyOutputs::new(&group, Payload::Bf16, ScaleOrder::ByRow);
        drop(group.slot(0).dispatch(&tokens).unwrap().latency(&mut outputs).unwrap());
        let tokens = Tokens { rows: Rows::Fp8Ue8m0(&rows), ..tokens };
        let mut outputs = LatencyOutputs::new(&group, Payload::Fp8Ue8m0, ScaleOrder::ByColumn);
        drop(group.slot(0).dispatch(&tokens).unwrap().latency(&mut outputs).unwrap());
        for (expert, &count) in outputs.counts().iter().enumerate() {
            for row in 0..count as usize {
                let scales = outputs.scales_of(expert, row);
                assert!(scales[0] != 0 && scales[0] == scales[1]);
                assert_eq!(scales[2..], [0, 0], "two of four bytes fill up");
            }
        }
    }
}
