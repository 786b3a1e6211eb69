//! What a report says of a step whose traffic is counted here by hand.

use std::thread;
use std::time::Duration;

use crossdock_ep::{
    Bf16, Group, GroupConfig, GroupOptions, LatencyOutputs, Payload, Report, Rows, ScaleOrder, ScaleRule,
    ThroughputOutputs, Tokens,
};

const TOP_K: usize = 3;
const EXPERTS_PER_RANK: i64 = 2;

fn config(hidden: u32) -> GroupConfig {
    GroupConfig {
        max_tokens: vec![5, 0, 4],
        experts: 6,
        top_k: TOP_K as u32,
        hidden,
        payload: Payload::Bf16,
        slots: 1,
        placement_version: 1,
    }
}

fn options() -> GroupOptions {
    let long = Duration::from_secs(60);
    GroupOptions { deadline: long, warm_up: long, ..GroupOptions::default() }
}

/// Tokens that go to one rank, to several, to the same one twice, to the same expert twice, and nowhere.
fn choices(rank: u32) -> Vec<i64> {
    match rank {
        0 => vec![0, 1, 2, 4, 4, -1, -1, -1, -1, 5, 3, 0, -1, -1, 1],
        1 => vec![],
        _ => vec![0, 2, 4, -1, -1, -1, 4, 5, 5, 1, -1, 0],
    }
}

fn rank_of(expert: i64) -> Option<u32> {
    (expert >= 0).then_some((expert / EXPERTS_PER_RANK) as u32)
}

/// Choices of one rank's tokens that fall on experts of another.
fn hits(from: u32, to: u32) -> u64 {
    choices(from).iter().filter(|&&expert| rank_of(expert) == Some(to)).count() as u64
}

/// Tokens of one rank that go to another.
fn rows(from: u32, to: u32) -> u64 {
    let goes = |of_token: &&[i64]| of_token.iter().any(|&expert| rank_of(expert) == Some(to));
    choices(from).chunks(TOP_K).filter(goes).count() as u64
}

fn tokens(rank: u32) -> u64 {
    (choices(rank).len() / TOP_K) as u64
}

/// Tokens that choose anything.
fn sent(rank: u32) -> u64 {
    let goes = |of_token: &&[i64]| of_token.iter().any(|&expert| expert >= 0);
    choices(rank).chunks(TOP_K).filter(goes).count() as u64
}

fn sum(of_rank: impl Fn(u32) -> u64) -> u64 {
    (0..3).map(of_rank).sum()
}

/// Of all ranks but one.
fn sum_of_others(rank: u32, of_rank: impl Fn(u32) -> u64) -> u64 {
    (0..3).filter(|other| *other != rank).map(of_rank).sum()
}

/// Which of its tokens a row is, its checksum, the weights of its choices, and their experts, which fill up a word.
const ENTRY_BYTES: u64 = 4 + 4 + 4 * TOP_K as u64 + (2 * TOP_K as u64).next_multiple_of(4);

/// Runs each rank on a thread of its own.
fn each(config: &GroupConfig, rank: impl Fn(Group) + Sync) {
    thread::scope(|scope| {
        for group in Group::in_process(config, &options()).unwrap() {
            let rank = &rank;
            scope.spawn(move || rank(group));
        }
    });
}

/// The reports of the dispatch and the combine of a step.
fn latency(
    group: &mut Group,
    form: Payload,
    rows: Rows<'_>,
    choices: &[i64],
    out: &mut [Bf16],
) -> [Report; 2] {
    let mut outputs = LatencyOutputs::new(group, form, ScaleOrder::ByRow);
    let tokens = Tokens { rows, choices, weights: None };
    let step = group.slot(0).dispatch(&tokens).unwrap().latency(&mut outputs).unwrap();
    let dispatched = step.report().clone();
    [dispatched, step.combine().receive(&vec![1.0; choices.len()], out).unwrap()]
}

fn throughput(
    group: &mut Group,
    form: Payload,
    rows: Rows<'_>,
    choices: &[i64],
    out: &mut [Bf16],
) -> [Report; 2] {
    let mut outputs = ThroughputOutputs::new(group, form);
    let tokens = Tokens { rows, choices, weights: None };
    let step = group.slot(0).dispatch(&tokens).unwrap().throughput(&mut outputs).unwrap();
    let dispatched = step.report().clone();
    [dispatched, step.combine(None).unwrap().receive(&[], None, out).unwrap()]
}

#[test]
fn bytes_are_what_a_count_by_hand_gives() {
    let hidden = 256;
    each(&config(hidden), |mut group| {
        let (rank, choices) = (group.rank(), choices(group.rank()));
        let of_tokens = vec![Bf16::from_f32(1.5); choices.len() / TOP_K * hidden as usize];
        let mut out = of_tokens.clone();
        let forms = [
            (Payload::Bf16, Rows::Bf16(&of_tokens), 2 * u64::from(hidden)),
            // A scale of four bytes for 128 channels.
            (Payload::Fp8, Rows::Fp8(&of_tokens, ScaleRule::Plain), u64::from(hidden) + 2 * 4),
        ];
        let chosen = sum(|to| hits(rank, to));
        let sum_bytes = 2 * u64::from(hidden);
        for (form, of_form, row_bytes) in forms {
            let read = sum_of_others(rank, |from| rows(from, rank)) * (row_bytes + ENTRY_BYTES);

            let [dispatch, combine] = latency(&mut group, form, of_form, &choices, &mut out);
            let packed = sum(|from| hits(from, rank));
            assert_eq!(dispatch.wire_bytes, read);
            assert_eq!(dispatch.logical_bytes, chosen * row_bytes);
            assert_eq!(dispatch.copied_bytes, (sent(rank) + packed) * row_bytes, "rank {rank}");
            // Each result is read once, where its experts left it.
            assert_eq!(combine.wire_bytes, sum_of_others(rank, |to| hits(rank, to)) * sum_bytes);
            assert_eq!(combine.logical_bytes, chosen * sum_bytes);
            assert_eq!(combine.copied_bytes, tokens(rank) * sum_bytes);

            let [dispatch, combine] = throughput(&mut group, form, of_form, &choices, &mut out);
            let taken = sum(|from| rows(from, rank));
            assert_eq!(dispatch.wire_bytes, read);
            assert_eq!(dispatch.logical_bytes, chosen * row_bytes);
            assert_eq!(dispatch.copied_bytes, (sent(rank) + taken) * row_bytes, "rank {rank}");
            // A rank gives one result for all of its experts.
            assert_eq!(combine.wire_bytes, sum_of_others(rank, |to| rows(rank, to)) * sum_bytes);
            assert_eq!(combine.logical_bytes, sum(|to| rows(rank, to)) * sum_bytes);
            assert_eq!(combine.copied_bytes, tokens(rank) * sum_bytes);

            let copies = combine.logical_bytes > 0;
            assert_eq!(combine.copies().is_some(), copies);
            if copies {
                let expected = combine.copied_bytes as f64 / combine.logical_bytes as f64;
                assert_eq!(combine.copies(), Some(expected));
            }
        }
    });
}

#[test]
fn a_call_is_as_near_to_its_floor_as_can_be() {
    let config = GroupConfig { max_tokens: vec![64, 0, 64], ..config(1024) };
    each(&config, |mut group| {
        let tokens = config.max_tokens[group.rank() as usize] as usize;
        let choices = [0, 2, -1].repeat(tokens);
        let rows = vec![Bf16::from_f32(1.5); tokens * 1024];
        let mut out = rows.clone();
        for _ in 0..4 {
            let reports = [
                latency(&mut group, Payload::Bf16, Rows::Bf16(&rows), &choices, &mut out),
                throughput(&mut group, Payload::Bf16, Rows::Bf16(&rows), &choices, &mut out),
            ];
            for report in reports.as_flattened() {
                assert_eq!(report.waits.len(), 3);
                assert!(report.waits.iter().sum::<Duration>() <= report.time);
                assert_eq!(report.copied_bytes > 0, report.floor > Duration::ZERO);
                match report.efficiency() {
                    // Copies that stay in a cache are faster than those that do not, but not by so much.
                    Some(efficiency) => assert!((1e-9..1e3).contains(&efficiency), "{efficiency}"),
                    None => assert_eq!(report.copied_bytes, 0),
                }
            }
        }
    });
    assert_eq!(Report::default().efficiency(), None);
    assert_eq!(Report::default().copies(), None);
}

#[test]
fn waits_are_put_down_to_whom_they_are_for() {
    let pauses = [100, 200, 400, 800].map(Duration::from_millis);
    each(&config(64), |mut group| {
        let (rank, choices) = (group.rank(), choices(group.rank()));
        let rows = vec![Bf16::from_f32(1.0); choices.len() / TOP_K * 64];
        let mut out = rows.clone();
        let mut was_seen = false;
        for pause in pauses {
            if rank == 2 {
                thread::sleep(pause);
            }
            let [dispatch, _] = latency(&mut group, Payload::Bf16, Rows::Bf16(&rows), &choices, &mut out);
            assert_eq!(dispatch.waits[rank as usize], Duration::ZERO, "nobody waits for itself");
            // Of several, one in which nobody else was held up: ranks 0 and 1 do not wait for each other for long.
            was_seen |= dispatch.waits[2] >= pause / 2 && dispatch.waits[0] + dispatch.waits[1] < pause / 2;
        }
        assert_eq!(was_seen, rank != 2, "rank {rank}");
    });
}
