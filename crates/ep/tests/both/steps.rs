//! Runs a group in this process, a thread for each rank, and compares each step with the reference.

use std::collections::HashMap;
use std::thread;

use crossdock_ep::{
    Bf16, Group, GroupConfig, GroupOptions, LatencyOutputs, Payload, Rows, ScaleOrder, ScaleRule,
    ThroughputOutputs, Tokens,
};

use crate::inputs::{Random, Routing, inputs};
use crate::reference::{self, Form, Input};

#[derive(Clone, Debug)]
pub struct Case {
    pub form: Form,
    pub order: ScaleOrder,
    pub routing: Routing,
    pub steps: u32,
    pub seed: u64,
    pub verify: bool,
    pub full: bool,
}

pub fn payload(form: Form) -> Payload {
    match form {
        Form::Bf16 => Payload::Bf16,
        Form::Fp8 | Form::Fp8PowerOfTwo => Payload::Fp8,
        Form::Fp8Ue8m0 => Payload::Fp8Ue8m0,
    }
}

pub fn rows(form: Form, rows: &[Bf16]) -> Rows<'_> {
    match form {
        Form::Bf16 => Rows::Bf16(rows),
        Form::Fp8 => Rows::Fp8(rows, ScaleRule::Plain),
        Form::Fp8PowerOfTwo => Rows::Fp8(rows, ScaleRule::PowerOfTwo),
        Form::Fp8Ue8m0 => Rows::Fp8Ue8m0(rows),
    }
}

pub fn run(config: &GroupConfig, options: &GroupOptions, case: &Case) {
    let options = GroupOptions { verify: case.verify, ..options.clone() };
    let mut random = Random::new(case.seed);
    let steps = inputs_of(config, case, &mut random);
    let groups = Group::in_process(config, &options).expect("a group");
    thread::scope(|scope| {
        let ranks: Vec<_> =
            groups.into_iter().map(|group| scope.spawn(|| rank(group, case, &steps))).collect();
        let failed: Vec<usize> = ranks
            .into_iter()
            .enumerate()
            .filter_map(|(rank, thread)| thread.join().is_err().then_some(rank))
            .collect();
        assert!(failed.is_empty(), "ranks {failed:?} failed; {config:?} {case:?}");
    });
}

/// The inputs of all ranks, by step.
pub fn inputs_of(config: &GroupConfig, case: &Case, random: &mut Random) -> Vec<Vec<Input>> {
    (0..case.steps).map(|_| inputs(config, case.routing, case.full, random)).collect()
}

/// One rank's steps, each compared.
pub fn rank(mut group: Group, case: &Case, steps: &[Vec<Input>]) {
    let mut latency = LatencyOutputs::new(&group, payload(case.form), case.order);
    let mut throughput = ThroughputOutputs::new(&group, payload(case.form));
    for (step, inputs) in steps.iter().enumerate() {
        // A dispatch that nobody combines, now and then.
        if (case.seed + step as u64).is_multiple_of(3) {
            let input = &inputs[group.rank() as usize];
            let tokens =
                Tokens { rows: rows(case.form, &input.rows), choices: &input.choices, weights: None };
            drop(
                group.slot(0).dispatch(&tokens).expect("a dispatch").latency(&mut latency).expect("its rows"),
            );
        }
        latency_step(&mut group, case, inputs, &mut latency);
        throughput_step(&mut group, case, inputs, &mut throughput);
    }
}

fn latency_step(group: &mut Group, case: &Case, inputs: &[Input], outputs: &mut LatencyOutputs) {
    let (config, rank) = (group.config().clone(), group.rank());
    let (input, alive) = (&inputs[rank as usize], vec![true; inputs.len()]);
    let tokens = Tokens { rows: rows(case.form, &input.rows), choices: &input.choices, weights: None };
    let before = outputs.totals().to_vec();
    let mut step = group.slot(0).dispatch(&tokens).expect("a dispatch").latency(outputs).expect("its rows");
    let expected = reference::by_expert(&config, inputs, case.form, rank, &alive);
    assert_eq!(outputs.counts().len(), expected.len());
    let first = (0..config.experts).find(|&e| reference::place(&config, e.into()).0 == rank).unwrap_or(0);
    for (local, expected) in expected.iter().enumerate() {
        assert_eq!(outputs.counts()[local] as usize, expected.len(), "rows of expert {local} of rank {rank}");
        assert_eq!(outputs.totals()[local], before[local] + expected.len() as u64);
        let mut results = Vec::new();
        let mut again: HashMap<(u32, u32), u32> = HashMap::new();
        for (row, expected) in expected.iter().enumerate() {
            let range = outputs.range(local, expected.source);
            assert!(range.contains(&(row as u32)), "row {row} in {range:?} of source {}", expected.source);
            assert_eq!(outputs.sources()[local * outputs.rows() + row], expected.token);
            assert_eq!(outputs.row(local, row), expected.values);
            assert_eq!(outputs.scales_of(local, row), expected.scales);
            let same = again.entry((expected.source, expected.token)).or_default();
            let expert = first + local as u32;
            results.extend(
                (0..config.hidden as usize).map(|channel| {
                    reference::result(expert, expected.source, expected.token, *same, channel)
                }),
            );
            *same += 1;
        }
        step.results_mut(local).copy_from_slice(&results);
    }
    let mut out = vec![Bf16::from_bits(0x7fff); input.rows.len()];
    let report = step.combine().receive(&input.weights, &mut out).expect("a combine");
    assert!(report.masked.is_empty() && report.lost.is_empty());
    assert_eq!(out, reference::weighted(&config, inputs, rank, &alive), "combined at rank {rank}");
}

fn throughput_step(group: &mut Group, case: &Case, inputs: &[Input], outputs: &mut ThroughputOutputs) {
    let (config, rank) = (group.config().clone(), group.rank());
    let (input, alive) = (&inputs[rank as usize], vec![true; inputs.len()]);
    let (top_k, hidden) = (config.top_k as usize, config.hidden as usize);
    let weights = Some(&input.weights[..]);
    let tokens = Tokens { rows: rows(case.form, &input.rows), choices: &input.choices, weights };
    let mut step =
        group.slot(0).dispatch(&tokens).expect("a dispatch").throughput(outputs).expect("its rows");
    let expected = reference::by_token(&config, inputs, case.form, rank, &alive);
    assert_eq!(outputs.len(), expected.len(), "rows of rank {rank}");
    let (mut results, mut hits) = (Vec::new(), vec![0; reference::held(&config, rank)]);
    for (at, (row, experts, weights)) in expected.iter().enumerate() {
        assert!(outputs.range(row.source).contains(&at));
        assert_eq!(outputs.tokens()[at], row.token);
        assert_eq!(outputs.values()[at * row.values.len()..][..row.values.len()], row.values);
        assert_eq!(outputs.scales()[at * row.scales.len()..][..row.scales.len()], row.scales);
        assert_eq!(outputs.experts()[at * top_k..][..top_k], experts[..]);
        assert_eq!(outputs.weights()[at * top_k..][..top_k], weights[..]);
        for &expert in experts.iter().filter(|&&expert| expert >= 0) {
            hits[expert as usize] += 1;
        }
        results.extend((0..hidden).map(|channel| reference::result(rank, row.source, row.token, 0, channel)));
    }
    assert!(outputs.experts()[expected.len() * top_k..].iter().all(|&expert| expert == -1));
    assert_eq!(outputs.counts(1), hits);
    let aligned: Vec<u32> = hits.iter().map(|hits: &u32| hits.div_ceil(128) * 128).collect();
    assert_eq!(outputs.counts(128), aligned);
    expanded(outputs, &expected, &hits);
    step.results_mut().copy_from_slice(&results);
    let back: Vec<f32> = outputs.weights()[..expected.len() * top_k].to_vec();
    let mut random = Random::new(case.seed + u64::from(rank));
    let bias =
        || (0..input.rows.len()).map(|at| reference::result(at as u32, 9, 9, 9, at)).collect::<Vec<_>>();
    let biases = [bias(), bias()];
    let count = (case.seed % 3) as usize;
    let biases: Vec<&[Bf16]> = biases[..count].iter().map(|bias| &bias[..]).collect();
    let _ = random.next();
    let mut out = vec![Bf16::from_bits(0x7fff); input.rows.len()];
    let mut combined = vec![-1.0; input.weights.len()];
    step.combine(Some(&back))
        .expect("the rows")
        .receive(&biases, Some(&mut combined), &mut out)
        .expect("a combine");
    assert_eq!(out, reference::plain(&config, inputs, rank, &biases, &alive), "combined at rank {rank}");
    for ((combined, weight), choice) in combined.iter().zip(&input.weights).zip(&input.choices) {
        assert_eq!(*combined, if *choice < 0 { 0.0 } else { *weight });
    }
}

/// The same rows, expert by expert.
fn expanded(outputs: &ThroughputOutputs, expected: &[(reference::Row, Vec<i64>, Vec<f32>)], hits: &[u32]) {
    let alignment = 4;
    let expanded = outputs.expand(alignment);
    assert_eq!(expanded.counts, hits);
    let mut at = 0;
    for (expert, &count) in hits.iter().enumerate() {
        assert_eq!(expanded.starts[expert], at);
        let mut rows = 0;
        for (row, (arrived, experts, weights)) in expected.iter().enumerate() {
            for (choice, _) in experts.iter().enumerate().filter(|(_, e)| **e == expert as i64) {
                let bytes = arrived.values.len();
                assert_eq!(expanded.rows[at + rows], Some(row as u32));
                assert_eq!(expanded.weights[at + rows], weights[choice]);
                assert_eq!(expanded.values[(at + rows) * bytes..][..bytes], arrived.values);
                let bytes = arrived.scales.len();
                assert_eq!(expanded.scales[(at + rows) * bytes..][..bytes], arrived.scales);
                rows += 1;
            }
        }
        assert_eq!(rows, count as usize);
        let end = at + rows.next_multiple_of(alignment as usize);
        assert!(expanded.rows[at + rows..end].iter().all(Option::is_none));
        let bytes = expanded.values.len().checked_div(expanded.rows.len()).unwrap_or(0);
        assert!(expanded.values[(at + rows) * bytes..end * bytes].iter().all(|&byte| byte == 0));
        at = end;
    }
    assert_eq!(expanded.rows.len(), at);
}
