//! A step that one rank does not take to its end costs that step and no other: who is concerned gets a typed error, and
//! the next step that all ranks take gives what it should.

use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use crossdock_ep::{
    Advice, Bf16, Corrupted, Difference, EpError, Group, GroupConfig, GroupOptions, LatencyOutputs,
    LayoutError, LostWeight, Payload, Report, Rows, ScaleOrder, ScaleRule, ThroughputOutputs, Tokens,
    Violations,
};

const RANKS: u32 = 3;
const EXPERTS: u64 = 2 * RANKS as u64;
const TOP_K: usize = 2;
const HIDDEN: usize = 128;
const TOKENS: usize = 6;
/// The rank that does something else than the others.
const ODD: u32 = 1;

fn config() -> GroupConfig {
    GroupConfig {
        max_tokens: vec![TOKENS as u32; RANKS as usize],
        experts: EXPERTS as u32,
        top_k: TOP_K as u32,
        hidden: HIDDEN as u32,
        payload: Payload::Bf16,
        slots: 1,
        placement_version: 1,
    }
}

fn options() -> GroupOptions {
    let long = Duration::from_secs(60);
    GroupOptions { deadline: long, warm_up: long, ..GroupOptions::default() }
}

/// Numbers from one seed.
struct Random(u64);

impl Random {
    fn below(&mut self, limit: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % limit
    }
}

/// What one rank dispatches in one step.
struct Input {
    rows: Vec<Bf16>,
    choices: Vec<i64>,
    weights: Vec<f32>,
}

/// `avoid` is a rank whose experts nobody chooses.
fn input(rank: u32, step: u64, avoid: Option<u32>) -> Input {
    let mut random = Random(step << 8 | u64::from(rank));
    let mut choices = Vec::new();
    for _ in 0..TOKENS {
        let first = random.below(EXPERTS);
        let second = (first + 1 + random.below(EXPERTS - 1)) % EXPERTS;
        for expert in [first, second] {
            let is_none = random.below(8) == 0 || avoid == Some(rank_of(expert as i64));
            choices.push(if is_none { -1 } else { expert as i64 });
        }
    }
    let value = |random: &mut Random| Bf16::from_f32(random.below(255) as f32 - 127.0);
    Input {
        rows: (0..TOKENS * HIDDEN).map(|_| value(&mut random)).collect(),
        weights: choices.iter().map(|_| (1 + random.below(64)) as f32 / 64.0).collect(),
        choices,
    }
}

fn rank_of(expert: i64) -> u32 {
    expert as u32 / 2
}

/// What an expert makes of a value.
fn made(expert: i64, value: Bf16) -> Bf16 {
    Bf16::from_f32((expert + 1) as f32 * value.to_f32())
}

fn bytes(row: &[Bf16]) -> Vec<u8> {
    row.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect()
}

fn values(bytes: &[u8]) -> impl Iterator<Item = Bf16> {
    bytes.chunks(2).map(|two| Bf16::from_bits(u16::from_le_bytes(two.try_into().unwrap())))
}

/// The weighted sums of the latency mode. `factor` is what becomes of a choice's weight.
fn weighted(input: &Input, factor: impl Fn(usize) -> f32) -> Vec<Bf16> {
    let sum = |at: usize| {
        let token = at / HIDDEN;
        let choices = token * TOP_K..(token + 1) * TOP_K;
        let add = |sum: f32, choice: usize| match input.choices[choice] {
            -1 => sum,
            expert => made(expert, input.rows[at]).to_f32().mul_add(factor(choice), sum),
        };
        Bf16::from_f32(choices.fold(0.0, add))
    };
    (0..input.rows.len()).map(sum).collect()
}

/// How far a rank takes a step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Until {
    /// The dispatch is dropped before its receive half.
    Sent,
    /// Its receive half is refused, as the outputs are of another form.
    OtherOutputs,
    /// The dispatch is received and dropped.
    Received,
    /// The combine is dropped before its receive half.
    Combining,
    /// Its receive half is refused, as the rows have no room.
    ShortOut,
    /// It is refused, as there are too few weights.
    FewWeights,
    Whole,
}

impl Until {
    /// Those that make the call of a dispatch and no other.
    const UNCOMBINED: [Until; 3] = [Until::Sent, Until::OtherOutputs, Until::Received];
    /// Those that make both calls.
    const COMBINED: [Until; 4] = [Until::Combining, Until::ShortOut, Until::FewWeights, Until::Whole];

    /// Whether this is how a step of a rank that goes so far ends where the others do what it does.
    fn is_end(self, ended: &Result<(), EpError>) -> bool {
        match self {
            Until::OtherOutputs | Until::ShortOut | Until::FewWeights => {
                matches!(ended, Err(EpError::WrongLength { .. }))
            }
            _ => *ended == Ok(()),
        }
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mode {
    Latency,
    Throughput,
}

const MODES: [Mode; 2] = [Mode::Latency, Mode::Throughput];

fn step(mode: Mode, group: &mut Group, step: u64, until: Until) -> Result<(), EpError> {
    match mode {
        Mode::Latency => latency(group, step, until),
        Mode::Throughput => throughput(group, step, until),
    }
}

fn latency(group: &mut Group, step: u64, until: Until) -> Result<(), EpError> {
    let rank = group.rank();
    let input = input(rank, step, None);
    let (out, _) = latency_with(group, &input, until, |outputs| {
        let inputs: Vec<Input> = (0..RANKS).map(|rank| self::input(rank, step, None)).collect();
        check_packed(outputs, &inputs, rank);
    })?;
    if until == Until::Whole {
        assert_eq!(out, weighted(&input, |choice| input.weights[choice]), "rank {rank} step {step}");
    }
    Ok(())
}

fn latency_with(
    group: &mut Group,
    input: &Input,
    until: Until,
    check: impl FnOnce(&LatencyOutputs),
) -> Result<(Vec<Bf16>, Report), EpError> {
    let first = 2 * i64::from(group.rank());
    let form = if until == Until::OtherOutputs { Payload::Fp8 } else { Payload::Bf16 };
    let mut outputs = LatencyOutputs::new(group, form, ScaleOrder::ByRow);
    let tokens = Tokens { rows: Rows::Bf16(&input.rows), choices: &input.choices, weights: None };
    let dispatch = group.slot(0).dispatch(&tokens)?;
    if until == Until::Sent {
        return Ok((Vec::new(), dispatch.report().clone()));
    }
    let mut step = dispatch.latency(&mut outputs)?;
    check(&outputs);
    if until == Until::Received {
        return Ok((Vec::new(), step.report().clone()));
    }
    for local in 0..outputs.counts().len() {
        for (row, results) in step.results_mut(local).chunks_mut(HIDDEN).enumerate() {
            for (value, result) in values(outputs.row(local, row)).zip(results) {
                *result = made(first + local as i64, value);
            }
        }
    }
    let combine = step.combine();
    let mut out = vec![Bf16::from_bits(0x7fff); TOKENS * HIDDEN];
    let report = match until {
        Until::Combining => return Ok((Vec::new(), Report::default())),
        Until::ShortOut => combine.receive(&input.weights, &mut out[1..])?,
        Until::FewWeights => combine.receive(&input.weights[1..], &mut out)?,
        _ => combine.receive(&input.weights, &mut out)?,
    };
    Ok((out, report))
}

fn check_packed(outputs: &LatencyOutputs, inputs: &[Input], rank: u32) {
    for local in 0..2 {
        let expert = i64::from(2 * rank) + local as i64;
        let mut row = 0;
        for (source, input) in inputs.iter().enumerate() {
            let range = outputs.range(local, source as u32);
            assert_eq!(range.start as usize, row);
            for token in (0..TOKENS).filter(|t| input.choices[t * TOP_K..][..TOP_K].contains(&expert)) {
                assert_eq!(outputs.sources()[local * outputs.rows() + row] as usize, token);
                assert_eq!(outputs.row(local, row), bytes(&input.rows[token * HIDDEN..][..HIDDEN]));
                row += 1;
            }
            assert_eq!(range.end as usize, row);
        }
        assert_eq!(outputs.counts()[local] as usize, row);
    }
}

fn throughput(group: &mut Group, step: u64, until: Until) -> Result<(), EpError> {
    throughput_with(group, &input(group.rank(), step, None), until)
}

/// Each rank gives back what its experts make of a row, in the order of the row's choices, weighed and summed.
fn throughput_with(group: &mut Group, input: &Input, until: Until) -> Result<(), EpError> {
    let rank = group.rank();
    let form = if until == Until::OtherOutputs { Payload::Fp8 } else { Payload::Bf16 };
    let mut outputs = ThroughputOutputs::new(group, form);
    let weights = Some(&input.weights[..]);
    let tokens = Tokens { rows: Rows::Bf16(&input.rows), choices: &input.choices, weights };
    let dispatch = group.slot(0).dispatch(&tokens)?;
    if until == Until::Sent {
        return Ok(());
    }
    let mut step = dispatch.throughput(&mut outputs)?;
    if until == Until::Received {
        return Ok(());
    }
    for (row, results) in step.results_mut().chunks_mut(HIDDEN).enumerate() {
        let experts = &outputs.experts()[row * TOP_K..][..TOP_K];
        let weights = &outputs.weights()[row * TOP_K..][..TOP_K];
        for (value, result) in values(&outputs.values()[row * 2 * HIDDEN..]).zip(results) {
            *result = part(
                value,
                experts.iter().map(|&e| if e < 0 { -1 } else { 2 * i64::from(rank) + e }),
                weights,
            );
        }
    }
    let combine = step.combine(None)?;
    let mut out = vec![Bf16::from_bits(0x7fff); TOKENS * HIDDEN];
    let mut back = [0.0; TOKENS * TOP_K];
    match until {
        Until::Combining => return Ok(()),
        Until::ShortOut => combine.receive(&[], None, &mut out[1..])?,
        Until::FewWeights => combine.receive(&[], Some(&mut back[1..]), &mut out)?,
        _ => combine.receive(&[], None, &mut out)?,
    };
    let alive = |rank: &u32| !group.masked().contains(rank);
    for (at, (out, &value)) in out.iter().zip(&input.rows).enumerate() {
        let choices = at / HIDDEN * TOP_K..(at / HIDDEN + 1) * TOP_K;
        let of_rank = |rank: u32| {
            let here = input.choices[choices.clone()].iter();
            let here = here.map(move |&e| if e >= 0 && rank_of(e) == rank { e } else { -1 });
            part(value, here, &input.weights[choices.clone()]).to_f32()
        };
        let sum = (0..RANKS).filter(alive).fold(0.0, |sum, rank| sum + of_rank(rank));
        assert_eq!(*out, Bf16::from_f32(sum), "rank {rank}");
    }
    Ok(())
}

/// What a rank makes of a value for those of its experts that are not -1.
fn part(value: Bf16, experts: impl Iterator<Item = i64>, weights: &[f32]) -> Bf16 {
    let chosen = experts.zip(weights).filter(|(expert, _)| *expert >= 0);
    Bf16::from_f32(
        chosen.fold(0.0, |sum, (expert, weight)| made(expert, value).to_f32().mul_add(*weight, sum)),
    )
}

/// Runs each rank on a thread of its own.
fn each(groups: Vec<Group>, rank: impl Fn(Group) + Sync) {
    thread::scope(|scope| {
        for group in groups {
            let rank = &rank;
            scope.spawn(move || rank(group));
        }
    });
}

fn groups() -> Vec<Group> {
    Group::in_process(&config(), &options()).unwrap()
}

/// Both modes several times: everything is as if nothing had happened.
fn go_on(group: &mut Group, first: u64) {
    for at in first..first + 3 {
        latency(group, at, Until::Whole).unwrap();
        throughput(group, at, Until::Whole).unwrap();
    }
    assert!(group.masked().is_empty());
}

fn combine_of(mode: Mode) -> &'static str {
    match mode {
        Mode::Latency => "combine of the latency mode",
        Mode::Throughput => "combine of the throughput mode",
    }
}

fn call(ours: &str, theirs: &str) -> Vec<Difference> {
    vec![Difference { what: "call".to_owned(), ours: ours.to_owned(), theirs: theirs.to_owned() }]
}

const RELEASE: &str = "dispatch after one that was not combined";

#[test]
fn a_dispatch_that_one_rank_does_not_combine_is_told_to_all_and_costs_one_step() {
    for mode in MODES {
        for until in Until::UNCOMBINED {
            for odd in 0..RANKS {
                each(groups(), |mut group| {
                    go_on(&mut group, 1);
                    if group.rank() == odd {
                        let ended = step(mode, &mut group, 10, until);
                        assert!(until.is_end(&ended), "{ended:?}");
                        // It is a call ahead now, and hears that the others are not.
                        let error = step(mode, &mut group, 11, Until::Whole).unwrap_err();
                        let differences = call(RELEASE, combine_of(mode));
                        assert_eq!(error, EpError::Mismatch { rank: u32::from(odd == 0), differences });
                    } else {
                        let error = step(mode, &mut group, 10, Until::Whole).unwrap_err();
                        let differences = call(combine_of(mode), RELEASE);
                        assert_eq!(error, EpError::Mismatch { rank: odd, differences });
                    }
                    go_on(&mut group, 20);
                });
            }
        }
    }
}

#[test]
fn a_combine_that_one_rank_does_not_receive_is_nobody_elses_concern() {
    for mode in MODES {
        for until in Until::COMBINED {
            each(groups(), |mut group| {
                for at in 1..5 {
                    let until = if group.rank() == ODD { until } else { Until::Whole };
                    let ended = step(mode, &mut group, at, until);
                    assert!(until.is_end(&ended), "{ended:?}");
                }
                go_on(&mut group, 20);
            });
        }
    }
}

/// The weights that should have gone back do not fit, so nothing goes back.
#[test]
fn a_combine_whose_send_half_is_refused_is_none() {
    each(groups(), |mut group| {
        let input = input(group.rank(), 1, None);
        if group.rank() == ODD {
            let mut outputs = ThroughputOutputs::new(&group, Payload::Bf16);
            let tokens = Tokens { rows: Rows::Bf16(&input.rows), choices: &input.choices, weights: None };
            let step = group.slot(0).dispatch(&tokens).unwrap().throughput(&mut outputs).unwrap();
            let error = step.combine(Some(&vec![1.0; outputs.len() * TOP_K + 1])).unwrap_err();
            assert!(matches!(error, EpError::WrongLength { what: "weights", .. }), "{error:?}");
            let error = throughput(&mut group, 2, Until::Whole).unwrap_err();
            assert!(matches!(error, EpError::Mismatch { rank: 0, .. }), "{error:?}");
        } else {
            let error = throughput(&mut group, 1, Until::Whole).unwrap_err();
            assert!(matches!(error, EpError::Mismatch { rank: ODD, .. }), "{error:?}");
        }
        go_on(&mut group, 20);
    });
}

#[test]
fn steps_that_are_dropped_anywhere_leave_those_alone_that_are_not() {
    for seed in 1..=4 {
        each(groups(), |mut group| {
            // Whether there is a combine is for all ranks alike; how far each goes with it is its own affair.
            let (mut common, mut own) = (Random(seed), Random(seed << 8 | u64::from(group.rank())));
            for at in 0..150 {
                let mode = MODES[common.below(2) as usize];
                let until = match common.below(3) {
                    0 => Until::UNCOMBINED[own.below(3) as usize],
                    1 => Until::COMBINED[own.below(4) as usize],
                    _ => Until::Whole,
                };
                let ended = step(mode, &mut group, at, until);
                assert!(until.is_end(&ended), "seed {seed} step {at} {mode:?} {until:?}: {ended:?}");
            }
            assert!(group.masked().is_empty());
        });
    }
}

#[test]
fn one_that_chooses_the_other_mode_is_told_and_all_go_on() {
    each(groups(), |mut group| {
        for at in 0..4 {
            // Each mode is the odd one once.
            let (odd, others) = if at % 2 == 0 { (MODES[0], MODES[1]) } else { (MODES[1], MODES[0]) };
            let (own, other, named) = if group.rank() == ODD { (odd, others, 0) } else { (others, odd, ODD) };
            let error = step(own, &mut group, at, Until::Whole).unwrap_err();
            let differences = call(combine_of(own), combine_of(other));
            assert_eq!(error, EpError::Mismatch { rank: named, differences });
            go_on(&mut group, 20);
        }
    });
}

#[test]
fn one_that_sends_another_form_is_told_and_all_go_on() {
    each(groups(), |mut group| {
        for mode in MODES {
            let input = input(group.rank(), 1, None);
            let is_odd = group.rank() == ODD;
            let (form, rows) = match is_odd {
                true => (Payload::Fp8, Rows::Fp8(&input.rows, ScaleRule::Plain)),
                false => (Payload::Bf16, Rows::Bf16(&input.rows)),
            };
            let mut latency = LatencyOutputs::new(&group, form, ScaleOrder::ByRow);
            let mut throughput = ThroughputOutputs::new(&group, form);
            let tokens = Tokens { rows, choices: &input.choices, weights: None };
            let dispatch = group.slot(0).dispatch(&tokens).unwrap();
            let error = match mode {
                Mode::Latency => dispatch.latency(&mut latency).unwrap_err(),
                Mode::Throughput => dispatch.throughput(&mut throughput).unwrap_err(),
            };
            let EpError::Mismatch { rank, differences } = &error else { panic!("{error:?}") };
            assert_eq!(*rank, if is_odd { 0 } else { ODD });
            let named: Vec<&str> = differences.iter().map(|difference| &*difference.what).collect();
            assert_eq!(named, ["form", "row_bytes", "scale_bytes"]);
            go_on(&mut group, 20);
        }
    });
}

/// Groups that were not compared when they met: every step says what differs, and nobody hangs.
#[test]
fn one_that_does_not_verify_is_told_in_every_step() {
    let config = config();
    let regions: Vec<_> = (0..RANKS).map(|rank| Group::allocate_region(&config, rank).unwrap()).collect();
    let group = |rank| {
        let options = GroupOptions { verify: rank == ODD, ..options() };
        // SAFETY: the regions are those of this group, and each rank is made once.
        unsafe { Group::over(&config, rank, regions.clone(), &options).unwrap() }
    };
    each((0..RANKS).map(group).collect(), |mut group| {
        for at in 0..4 {
            let error = step(MODES[at as usize % 2], &mut group, at, Until::Whole).unwrap_err();
            let EpError::Mismatch { rank, differences } = &error else { panic!("{error:?}") };
            assert_eq!(*rank, if group.rank() == ODD { 0 } else { ODD });
            assert_eq!(differences.len(), 1);
            assert_eq!(differences[0].what, "verify");
        }
    });
}

/// Rank 2 is dead, and the others know it.
fn without_the_last(options: &GroupOptions, rank: impl Fn(Group) + Sync) {
    let mut groups = Group::in_process(&config(), options).unwrap();
    groups.iter().for_each(|group| group.mourner().mark_dead(RANKS - 1));
    // It does not leave: it is dead.
    let _dead = groups.pop();
    each(groups, rank);
}

fn lost(choices: &[i64]) -> usize {
    let is_lost =
        |of_token: &&[i64]| of_token.iter().any(|&expert| expert >= 0 && rank_of(expert) == RANKS - 1);
    choices.chunks(TOP_K).filter(is_lost).count()
}

#[test]
fn a_step_that_fails_for_lost_weight_is_followed_by_others() {
    let options = GroupOptions { lost: LostWeight::Fail, ..options() };
    without_the_last(&options, |mut group| {
        let mut failed = 0;
        for at in 1..20 {
            let avoid = (at % 2 == 0).then_some(RANKS - 1);
            let input = input(group.rank(), at, avoid);
            let ended = match MODES[at as usize / 2 % 2] {
                Mode::Latency => {
                    latency_with(&mut group, &input, Until::Whole, |_| {}).map(|(out, report)| {
                        assert_eq!(out, weighted(&input, |choice| input.weights[choice]));
                        assert!(report.lost.is_empty());
                    })
                }
                Mode::Throughput => throughput_with(&mut group, &input, Until::Whole),
            };
            match lost(&input.choices) {
                0 => assert_eq!(ended, Ok(())),
                tokens => {
                    assert_eq!(ended, Err(EpError::WeightLost { tokens, masked: vec![RANKS - 1] }));
                    failed += 1;
                }
            }
        }
        assert!(failed > 5);
    });
}

#[test]
fn weights_that_are_kept_are_raised_to_what_all_were() {
    let options = GroupOptions { lost: LostWeight::Renormalise, ..options() };
    without_the_last(&options, |mut group| {
        let (mut whole, mut part, mut none) = (0, 0, 0);
        for at in 1..30 {
            let input = input(group.rank(), at, None);
            let (out, report) = latency_with(&mut group, &input, Until::Whole, |_| {}).unwrap();
            let weight = |choice: usize, is_lost: bool| match input.choices[choice] {
                -1 => 0.0,
                expert if (rank_of(expert) == RANKS - 1) != is_lost => 0.0,
                _ => input.weights[choice],
            };
            let of_token = |token: usize, is_lost| -> f32 {
                (token * TOP_K..(token + 1) * TOP_K).map(|choice| weight(choice, is_lost)).sum()
            };
            let raised = weighted(&input, |choice| {
                let (kept, lost) = (of_token(choice / TOP_K, false), of_token(choice / TOP_K, true));
                if kept == 0.0 { 0.0 } else { weight(choice, false) * ((kept + lost) / kept) }
            });
            assert_eq!(out, raised);
            for token in 0..TOKENS {
                let (kept, lost) = (of_token(token, false), of_token(token, true));
                assert_eq!(report.lost.get(token).copied().unwrap_or(0.0), lost);
                match (kept > 0.0, lost > 0.0) {
                    (true, true) => part += 1,
                    (false, true) => none += 1,
                    _ => whole += 1,
                }
            }
        }
        assert!(whole > 0 && part > 0 && none > 0, "{whole} {part} {none}");
    });
}

#[test]
fn too_few_that_are_left_do_not_go_on() {
    // Rank 3 is dead from the beginning; nobody chooses its experts.
    let config = GroupConfig { max_tokens: vec![TOKENS as u32; 4], experts: 8, ..config() };
    let options = GroupOptions { least_ranks: 3, ..options() };
    let mut groups = Group::in_process(&config, &options).unwrap();
    groups.iter().for_each(|group| group.mourner().mark_dead(3));
    let _dead = groups.pop();
    let (enough, over) = (Barrier::new(3), Barrier::new(3));
    each(groups, |mut group| {
        for at in 1..5 {
            step(MODES[at as usize % 2], &mut group, at, Until::Whole).unwrap();
        }
        assert_eq!(group.masked(), [3]);
        enough.wait();
        if group.rank() != 2 {
            group.mourner().mark_dead(2);
            for at in 5..9 {
                let error = step(MODES[at as usize % 2], &mut group, at, Until::Whole).unwrap_err();
                assert_eq!(error, EpError::TooFewRanks { alive: 2, least: 3, masked: vec![2, 3] });
            }
        }
        over.wait();
    });
}

/// Rank 1 waits for rank 0, which waits for rank 2, which does not come: for several times as long as rank 1 would wait for
/// a rank of which it hears nothing.
#[test]
fn who_waits_for_a_stalled_rank_is_not_taken_for_stalled() {
    if cfg!(tsan) {
        eprintln!("skipped: a rank that is masked by time reads what others overwrite");
        return;
    }
    let config = config();
    let regions: Vec<_> = (0..RANKS).map(|rank| Group::allocate_region(&config, rank).unwrap()).collect();
    let group = |rank, regions: &[_], deadline| {
        let options = GroupOptions { deadline, warm_up: deadline, ..options() };
        // SAFETY: the regions are those of this group, but for one that nobody else has, and each rank is made once.
        unsafe { Group::over(&config, rank, regions.to_vec(), &options).unwrap() }
    };
    // What rank 2 says to rank 0 goes astray, so it stalls after it has told its call to some only.
    let astray = [Group::allocate_region(&config, 0).unwrap(), regions[1].clone(), regions[2].clone()];
    let mut stalled = group(2, &astray, Duration::from_secs(60));
    let deadlines = [Duration::from_secs(6), Duration::from_millis(1500)];
    let groups = (0..2).map(|rank| group(rank, &regions, deadlines[rank as usize])).collect();
    latency(&mut stalled, 1, Until::Sent).unwrap();
    let over = Barrier::new(2);
    each(groups, |mut group| {
        for at in 1..4 {
            let input = input(group.rank(), at, None);
            let (out, report) = latency_with(&mut group, &input, Until::Whole, |_| {}).unwrap();
            let alive = |choice: usize| match input.choices[choice] {
                expert if expert >= 0 && rank_of(expert) == 2 => 0.0,
                _ => input.weights[choice],
            };
            assert_eq!(out, weighted(&input, alive), "rank {} step {at}", group.rank());
            assert_eq!(group.masked(), [2]);
            assert_eq!(report.masked, [2]);
        }
        over.wait();
    });
}

#[test]
fn every_error_says_what_may_be_done() {
    let wrong = LayoutError::Ragged { len: 3, top_k: 2 };
    let cases = [
        (EpError::WrongLength { what: "rows", len: 1, expected: 2 }, Advice::CorrectArguments),
        (EpError::TooManyTokens { tokens: 2, limit: 1 }, Advice::CorrectArguments),
        (EpError::TooManyChoices { expert: 0, limit: 1 }, Advice::CorrectArguments),
        (EpError::Payload(Violations(Vec::new())), Advice::CorrectArguments),
        (EpError::PayloadTooLarge { row_bytes: 3, scale_bytes: 1, most_bytes: 3 }, Advice::CorrectArguments),
        (EpError::Choices(wrong), Advice::CorrectArguments),
        (EpError::ForeignRoute, Advice::CorrectArguments),
        (EpError::Mismatch { rank: 1, differences: Vec::new() }, Advice::AlignCalls),
        (EpError::Nonsense { rank: 1, what: "rows", value: 2, most: 1 }, Advice::NextStep),
        (EpError::Corrupted { rank: 1, what: Corrupted::List }, Advice::NextStep),
        (EpError::WeightLost { tokens: 1, masked: vec![1] }, Advice::NextStep),
        (EpError::Masked { by: 1 }, Advice::NewGroup),
        (EpError::TooFewRanks { alive: 1, least: 2, masked: vec![1] }, Advice::NewGroup),
        (EpError::StillWriting { rank: 1 }, Advice::NewGroup),
    ];
    for (error, advice) in cases {
        assert_eq!(error.advice(), advice, "{error}");
        assert_eq!(error.is_retryable(), advice == Advice::NextStep, "{error}");
    }
}
