//! Ranks that die, stall, wake up again, or make other calls than the rest: nobody hangs, nobody gets a wrong row, and
//! every survivor knows what it lost.

use std::sync::Barrier;
use std::thread;
use std::time::{Duration, Instant};

use crossdock_ep::{
    Bf16, EpError, Group, GroupConfig, GroupOptions, LatencyOutputs, LostWeight, Payload, Rows, ScaleOrder,
    ScaleRule, ThroughputOutputs, Tokens,
};

const RANKS: u32 = 4;
const TOP_K: usize = 2;
const HIDDEN: usize = 128;
const TOKENS: usize = 6;

fn config() -> GroupConfig {
    GroupConfig {
        max_tokens: vec![TOKENS as u32; RANKS as usize],
        experts: 8,
        top_k: TOP_K as u32,
        hidden: HIDDEN as u32,
        payload: Payload::Bf16,
        slots: 1,
        placement_version: 1,
    }
}

/// Long enough for a busy machine to run everybody who is alive.
const DEADLINE: Duration = Duration::from_secs(2);

fn options() -> GroupOptions {
    GroupOptions { deadline: DEADLINE, warm_up: DEADLINE, ..GroupOptions::default() }
}

fn patient() -> GroupOptions {
    GroupOptions {
        deadline: Duration::from_secs(60),
        warm_up: Duration::from_secs(60),
        ..GroupOptions::default()
    }
}

/// Token `t` of any rank chooses one expert of rank `t % 4` and one of rank `(t + 1) % 4`.
fn choices() -> Vec<i64> {
    (0..TOKENS).flat_map(|t| [2 * (t as i64 % 4), 2 * ((t as i64 + 1) % 4) + 1]).collect()
}

fn weights() -> Vec<f32> {
    (0..TOKENS).flat_map(|_| [0.75, 0.25]).collect()
}

fn rows(value: f32) -> Vec<Bf16> {
    vec![Bf16::from_f32(value); TOKENS * HIDDEN]
}

/// What comes back for each token where the ranks in `dead` answer nothing: every expert gives back its rows doubled.
fn expected(value: f32, dead: &[u32], renormalised: bool) -> Vec<Bf16> {
    let mut out = Vec::new();
    for t in 0..TOKENS as u32 {
        let alive = [!dead.contains(&(t % 4)), !dead.contains(&((t + 1) % 4))];
        let kept: f32 = [0.75, 0.25].iter().zip(alive).filter(|(_, alive)| *alive).map(|(w, _)| w).sum();
        let raise = if renormalised && kept > 0.0 { 1.0 / kept } else { 1.0 };
        let sum = [0.75, 0.25]
            .iter()
            .zip(alive)
            .filter(|(_, alive)| *alive)
            .fold(0.0_f32, |sum, (w, _)| (2.0 * value).mul_add(w * raise, sum));
        out.extend(vec![Bf16::from_f32(sum); HIDDEN]);
    }
    out
}

struct Stepped {
    out: Vec<Bf16>,
    lost: Vec<f32>,
}

/// A whole step in the latency mode, `pause` between the dispatch and the combine.
fn latency(group: &mut Group, value: f32, pause: impl FnOnce()) -> Result<Stepped, EpError> {
    let mut outputs = LatencyOutputs::new(group, Payload::Bf16, ScaleOrder::ByRow);
    let (rows, choices, weights) = (rows(value), choices(), weights());
    let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
    let mut step = group.slot(0).dispatch(&tokens)?.latency(&mut outputs)?;
    for expert in 0..outputs.counts().len() {
        for (row, result) in step.results_mut(expert).chunks_mut(HIDDEN).enumerate() {
            for (bytes, result) in outputs.row(expert, row).chunks(2).zip(result) {
                let value = Bf16::from_bits(u16::from_le_bytes(bytes.try_into().unwrap()));
                *result = Bf16::from_f32(2.0 * value.to_f32());
            }
        }
    }
    pause();
    let mut out = rows.clone();
    let report = step.combine().receive(&weights, &mut out)?;
    Ok(Stepped { out, lost: report.lost })
}

fn throughput(group: &mut Group, value: f32) -> Result<Vec<Bf16>, EpError> {
    let mut outputs = ThroughputOutputs::new(group, Payload::Bf16);
    let (rows, choices, weights) = (rows(value), choices(), weights());
    let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: Some(&weights) };
    let mut step = group.slot(0).dispatch(&tokens)?.throughput(&mut outputs)?;
    for (row, result) in step.results_mut().chunks_mut(HIDDEN).enumerate() {
        let sum: f32 = outputs.weights()[row * TOP_K..][..TOP_K].iter().sum();
        for (bytes, result) in outputs.values()[row * 2 * HIDDEN..].chunks(2).zip(result) {
            let value = Bf16::from_bits(u16::from_le_bytes(bytes.try_into().unwrap()));
            *result = Bf16::from_f32(2.0 * value.to_f32() * sum);
        }
    }
    let mut out = rows.clone();
    step.combine(None)?.receive(&[], None, &mut out)?;
    Ok(out)
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

/// Where a rank is masked by time alone, nothing orders what it reads and what others write then: it throws away what it
/// has read. ThreadSanitizer rightly calls that a race.
fn is_skipped_under_thread_sanitizer() -> bool {
    if cfg!(tsan) {
        eprintln!("skipped: a rank that is masked by time reads what others overwrite");
    }
    cfg!(tsan)
}

#[test]
fn a_rank_that_stops_calling_is_masked_by_all_and_costs_its_weight() {
    if is_skipped_under_thread_sanitizer() {
        return;
    }
    let groups = Group::in_process(&config(), &options()).unwrap();
    let over = Barrier::new(RANKS as usize);
    each(groups, |mut group| {
        assert_eq!(latency(&mut group, 1.0, || {}).unwrap().out, expected(1.0, &[], false));
        if group.rank() == 2 {
            over.wait();
            return;
        }
        let begun = Instant::now();
        let stepped = latency(&mut group, 3.0, || {}).unwrap();
        assert!(begun.elapsed() >= DEADLINE, "masked only by the deadline");
        assert_eq!(group.masked(), [2]);
        assert_eq!(stepped.out, expected(3.0, &[2], false));
        assert_eq!(stepped.lost, [0.0, 0.25, 0.75, 0.0, 0.0, 0.25]);
        // From now on nobody waits for it, in either mode.
        let begun = Instant::now();
        for value in 4..40 {
            let value = value as f32;
            assert_eq!(latency(&mut group, value, || {}).unwrap().out, expected(value, &[2], false));
            assert_eq!(throughput(&mut group, value).unwrap(), expected(value, &[2], false));
        }
        assert!(begun.elapsed() < Duration::from_secs(20));
        assert_eq!(group.masked(), [2]);
        over.wait();
    });
}

#[test]
fn a_rank_that_stops_between_dispatch_and_combine_is_masked_there() {
    if is_skipped_under_thread_sanitizer() {
        return;
    }
    let groups = Group::in_process(&config(), &options()).unwrap();
    let over = Barrier::new(RANKS as usize);
    each(groups, |mut group| {
        if group.rank() == 1 {
            let mut outputs = LatencyOutputs::new(&group, Payload::Bf16, ScaleOrder::ByRow);
            let (rows, choices) = (rows(1.0), choices());
            let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
            drop(group.slot(0).dispatch(&tokens).unwrap().latency(&mut outputs).unwrap());
            over.wait();
            return;
        }
        let stepped = latency(&mut group, 1.0, || {}).unwrap();
        assert_eq!(stepped.out, expected(1.0, &[1], false));
        assert_eq!(group.masked(), [1]);
        assert_eq!(throughput(&mut group, 2.0).unwrap(), expected(2.0, &[1], false));
        over.wait();
    });
}

#[test]
fn a_death_is_noticed_long_before_the_deadline() {
    let groups = Group::in_process(&config(), &patient()).unwrap();
    let mourners: Vec<_> = groups.iter().map(Group::mourner).collect();
    let over = Barrier::new(RANKS as usize + 1);
    thread::scope(|scope| {
        scope.spawn(|| {
            // As the end of the process would be told.
            thread::sleep(Duration::from_millis(100));
            mourners.iter().for_each(|mourner| mourner.mark_dead(0));
            mourners[0].mark_dead(99);
            over.wait();
        });
        each(groups, |mut group| {
            if group.rank() == 0 {
                over.wait();
                return;
            }
            let begun = Instant::now();
            assert_eq!(latency(&mut group, 1.0, || {}).unwrap().out, expected(1.0, &[0], false));
            assert!(begun.elapsed() < Duration::from_secs(10));
            assert_eq!(group.masked(), [0]);
            over.wait();
        });
    });
}

/// A rank that lost touch with the others masks them. To them it is dead, and what the dead say counts for nothing.
#[test]
fn a_rank_that_is_dead_to_the_others_expels_nobody() {
    let config = config();
    let regions: Vec<_> = (0..RANKS).map(|rank| Group::allocate_region(&config, rank).unwrap()).collect();
    // SAFETY: the regions are those of this group, and each rank is made once.
    let over = |rank, options: &GroupOptions| unsafe {
        Group::over(&config, rank, regions.clone(), options).unwrap()
    };
    let short = Duration::from_millis(50);
    let mut alone = over(3, &GroupOptions { deadline: short, warm_up: short, ..patient() });
    let groups: Vec<Group> = (0..3).map(|rank| over(rank, &patient())).collect();
    let stepped = latency(&mut alone, 1.0, || {}).unwrap();
    assert_eq!((alone.masked(), stepped.out), (vec![0, 1, 2], expected(1.0, &[0, 1, 2], false)));
    groups.iter().for_each(|group| group.mourner().mark_dead(3));
    each(groups, |mut group| {
        for value in 2..20 {
            let value = value as f32;
            // Its rows of the first step had come before it was dead to them.
            assert_eq!(latency(&mut group, value, || {}).unwrap().out, expected(value, &[3], false));
            assert_eq!(throughput(&mut group, value).unwrap(), expected(value, &[3], false));
        }
        assert_eq!(group.masked(), [3]);
    });
}

/// Two ranks lose touch with each other: the one that was told that it is out stays out, whatever it learns then.
#[test]
fn a_rank_that_was_told_that_it_is_masked_is_out_for_good() {
    let mut groups = Group::in_process(&config(), &options()).unwrap();
    // Rank 1 goes on alone.
    [0, 2, 3].iter().for_each(|&rank| groups[1].mourner().mark_dead(rank));
    assert_eq!(latency(&mut groups[1], 1.0, || {}).unwrap().out, expected(1.0, &[0, 2, 3], false));
    let one = &mut groups[0];
    assert!(matches!(latency(one, 1.0, || {}), Err(EpError::Masked { by: 1 })));
    one.mourner().mark_dead(1);
    for _ in 0..3 {
        assert!(matches!(latency(one, 1.0, || {}), Err(EpError::Masked { by: 1 })));
        assert!(matches!(throughput(one, 1.0), Err(EpError::Masked { by: 1 })));
    }
}

/// The others have not masked it yet when it hears of it, and must not take what it tries next for their next call.
#[test]
fn a_rank_that_is_masked_by_one_is_masked_by_all_soon_and_confuses_nobody() {
    if is_skipped_under_thread_sanitizer() {
        return;
    }
    // The one who masks comes before the masked rank in the order of the ranks, or behind it.
    for (by, rank) in [(0, 2), (3, 1)] {
        let groups = Group::in_process(&config(), &patient()).unwrap();
        let mourner = groups[by as usize].mourner();
        let over = Barrier::new(RANKS as usize);
        each(groups, |mut group| {
            let mut expelled = 0;
            for step in 1..=40 {
                if group.rank() == by && step == 5 {
                    mourner.mark_dead(rank);
                }
                let value = step as f32;
                match latency(&mut group, value, || {}) {
                    Err(EpError::Masked { .. }) if group.rank() == rank => expelled += 1,
                    stepped => {
                        assert_eq!(expelled, 0, "masked once, masked for good");
                        let out = stepped.unwrap().out;
                        let possible = [expected(value, &[], false), expected(value, &[rank], false)];
                        assert!(possible.contains(&out), "rank {} step {step}", group.rank());
                    }
                }
                if group.rank() == rank && expelled == 0 {
                    // So that the others come to wait for it.
                    thread::sleep(Duration::from_millis(3));
                }
            }
            assert_eq!(expelled > 0, group.rank() == rank);
            if group.rank() != rank {
                assert_eq!(group.masked(), [rank]);
            }
            over.wait();
        });
    }
}

#[test]
fn a_rank_that_leaves_is_noticed_at_once() {
    let groups = Group::in_process(&config(), &patient()).unwrap();
    each(groups, |mut group| {
        if group.rank() == 3 {
            return;
        }
        let begun = Instant::now();
        assert_eq!(latency(&mut group, 1.0, || {}).unwrap().out, expected(1.0, &[3], false));
        assert!(begun.elapsed() < Duration::from_secs(10));
        assert_eq!(throughput(&mut group, 2.0).unwrap(), expected(2.0, &[3], false));
    });
}

#[test]
fn a_stalled_rank_that_wakes_up_learns_that_it_is_masked_and_harms_nobody() {
    if is_skipped_under_thread_sanitizer() {
        return;
    }
    let groups = Group::in_process(&config(), &options()).unwrap();
    let (masked, over) = (Barrier::new(RANKS as usize), Barrier::new(RANKS as usize));
    each(groups, |mut group| {
        if group.rank() == 2 {
            // It stops where it has received and not yet answered.
            let woken = latency(&mut group, 1.0, || {
                masked.wait();
            });
            assert!(matches!(woken, Err(EpError::Masked { .. })), "{:?}", woken.map(|stepped| stepped.lost));
            // It goes on trying.
            for _ in 0..5 {
                assert!(matches!(latency(&mut group, 9.0, || {}), Err(EpError::Masked { .. })));
                assert!(matches!(throughput(&mut group, 9.0), Err(EpError::Masked { .. })));
            }
            over.wait();
            return;
        }
        assert_eq!(latency(&mut group, 1.0, || {}).unwrap().out, expected(1.0, &[2], false));
        masked.wait();
        for value in 2..60 {
            let value = value as f32;
            assert_eq!(latency(&mut group, value, || {}).unwrap().out, expected(value, &[2], false));
            assert_eq!(throughput(&mut group, value).unwrap(), expected(value, &[2], false));
        }
        over.wait();
    });
}

#[test]
fn the_first_step_may_take_longer_than_the_others() {
    let options =
        GroupOptions { deadline: Duration::from_millis(100), warm_up: Duration::from_secs(60), ..options() };
    let groups = Group::in_process(&config(), &options).unwrap();
    each(groups, |mut group| {
        if group.rank() == 1 {
            thread::sleep(Duration::from_millis(900));
        }
        assert_eq!(latency(&mut group, 1.0, || {}).unwrap().out, expected(1.0, &[], false));
        assert!(group.masked().is_empty());
    });
}

#[test]
fn lost_weight_is_dropped_raised_or_an_error() {
    for lost in [LostWeight::Drop, LostWeight::Renormalise, LostWeight::Fail] {
        let groups = Group::in_process(&config(), &GroupOptions { lost, ..patient() }).unwrap();
        each(groups, |mut group| {
            if group.rank() == 0 {
                return;
            }
            match (lost, latency(&mut group, 1.0, || {})) {
                (LostWeight::Fail, Err(EpError::WeightLost { tokens, masked })) => {
                    assert_eq!((tokens, masked), (3, vec![0]));
                    assert!(throughput(&mut group, 1.0).is_err());
                }
                (lost, stepped) => {
                    let stepped = stepped.unwrap();
                    assert_eq!(stepped.out, expected(1.0, &[0], lost == LostWeight::Renormalise));
                    assert_eq!(stepped.lost, [0.75, 0.0, 0.0, 0.25, 0.75, 0.0]);
                }
            }
        });
    }
}

#[test]
fn ranks_that_make_different_calls_are_told_and_named() {
    let groups = Group::in_process(&config(), &patient()).unwrap();
    let over = Barrier::new(RANKS as usize);
    each(groups, |mut group| {
        let (rows, choices) = (rows(1.0), choices());
        let odd = group.rank() == 1;
        let form = if odd { Rows::Fp8(&rows, ScaleRule::Plain) } else { Rows::Bf16(&rows) };
        let payload = if odd { Payload::Fp8 } else { Payload::Bf16 };
        let mut outputs = LatencyOutputs::new(&group, payload, ScaleOrder::ByRow);
        let tokens = Tokens { rows: form, choices: &choices, weights: None };
        let error = group.slot(0).dispatch(&tokens).unwrap().latency(&mut outputs).unwrap_err();
        let EpError::Mismatch { rank, differences } = &error else { panic!("{error:?}") };
        assert_eq!(*rank, u32::from(!odd), "the first that differs");
        assert!(differences.iter().any(|d| d.what == "row_bytes" && d.ours != d.theirs), "{error}");
        over.wait();
    });
    // One combines, the others dispatch again.
    let groups = Group::in_process(&config(), &patient()).unwrap();
    let over = Barrier::new(RANKS as usize);
    each(groups, |mut group| {
        let mut outputs = LatencyOutputs::new(&group, Payload::Bf16, ScaleOrder::ByRow);
        let (rows, choices, weights) = (rows(1.0), choices(), weights());
        let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
        let odd = group.rank() == 2;
        let step = group.slot(0).dispatch(&tokens).unwrap().latency(&mut outputs).unwrap();
        let error = if odd {
            step.combine().receive(&weights, &mut rows.clone()).unwrap_err()
        } else {
            drop(step);
            group.slot(0).dispatch(&tokens).unwrap_err()
        };
        let EpError::Mismatch { rank, .. } = &error else { panic!("{error:?}") };
        assert_eq!(*rank, if odd { 0 } else { 2 });
        assert!(error.to_string().contains("combine of the latency mode"), "{error}");
        over.wait();
    });
}

#[test]
fn arguments_that_do_not_fit_are_refused_and_nothing_is_sent() {
    let mut groups = Group::in_process(&config(), &options()).unwrap();
    let slot = groups[0].slot(0);
    let (rows, choices, weights) = (rows(1.0), choices(), weights());
    let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
    let refused = |tokens: &Tokens<'_>, slot: &mut crossdock_ep::Slot| slot.dispatch(tokens).unwrap_err();
    let short = Tokens { rows: Rows::Bf16(&rows[1..]), ..tokens };
    assert!(matches!(refused(&short, slot), EpError::WrongLength { what: "rows", .. }));
    let ragged = Tokens { choices: &choices[1..], ..tokens };
    assert!(matches!(refused(&ragged, slot), EpError::Choices(_)));
    let few = Tokens { weights: Some(&weights[1..]), ..tokens };
    assert!(matches!(refused(&few, slot), EpError::WrongLength { what: "weights", .. }));
    for wrong in [8, -2, i64::MAX] {
        let mut choices = choices.clone();
        choices[3] = wrong;
        let error = refused(&Tokens { choices: &choices, ..tokens }, slot);
        assert!(error.to_string().contains(&format!("choice 1 of token 1 is {wrong}")), "{error}");
    }
    let many = vec![-1; (TOKENS + 1) * TOP_K];
    assert!(matches!(
        refused(&Tokens { choices: &many, ..tokens }, slot),
        EpError::TooManyTokens { tokens: 7, limit: 6 }
    ));
    let same = vec![5; TOKENS * TOP_K];
    let error = refused(&Tokens { choices: &same, ..tokens }, slot);
    assert!(matches!(error, EpError::TooManyChoices { expert: 5, limit: 6 }));
    let wide = Payload::Opaque { row_bytes: 4096, scale_bytes: 0 };
    let made = Rows::Made { payload: wide, values: &[], scales: crossdock_ep::Scales::NONE };
    assert!(matches!(refused(&Tokens { rows: made, ..tokens }, slot), EpError::PayloadTooLarge { .. }));
    // The slot is as it was.
    each(groups, |mut group| {
        assert_eq!(latency(&mut group, 1.0, || {}).unwrap().out, expected(1.0, &[], false));
    });
}

/// As ranks of a larger group go one after the other: one before its dispatch, one between dispatch and combine, one
/// between two steps. Each survivor finds each of them by its own wait, and is right after each call.
#[test]
fn a_group_shrinks_rank_by_rank() {
    if is_skipped_under_thread_sanitizer() {
        return;
    }
    let ranks = 6;
    let config =
        GroupConfig { max_tokens: vec![TOKENS as u32; ranks], experts: 2 * ranks as u32, ..config() };
    let groups = Group::in_process(&config, &options()).unwrap();
    let over = Barrier::new(ranks);
    // Token `t` chooses an expert of rank `t % 6` and one of the next rank.
    let choices: Vec<i64> = (0..TOKENS as i64).flat_map(|t| [2 * (t % 6), 2 * ((t + 1) % 6) + 1]).collect();
    let expected = |dead: &[u32]| -> Vec<Bf16> {
        let of = |t: u32| {
            let kept = [(t % 6, 0.75), ((t + 1) % 6, 0.25)];
            let sum: f32 =
                kept.iter().filter(|(rank, _)| !dead.contains(rank)).map(|(_, weight)| weight).sum();
            vec![Bf16::from_f32(2.0 * sum); HIDDEN]
        };
        (0..TOKENS as u32).flat_map(of).collect()
    };
    each(groups, |mut group| {
        let rank = group.rank();
        let mut outputs = LatencyOutputs::new(&group, Payload::Bf16, ScaleOrder::ByRow);
        let rows = rows(1.0);
        let tokens = Tokens { rows: Rows::Bf16(&rows), choices: &choices, weights: None };
        for at in 0..4 {
            // Rank 1 goes before its second dispatch, rank 3 before its second combine, rank 5 after its second step.
            if (at, rank) == (1, 1) || (at, rank) == (2, 5) {
                break;
            }
            let mut step = group.slot(0).dispatch(&tokens).unwrap().latency(&mut outputs).unwrap();
            let dead_at_dispatch: &[u32] = [&[][..], &[1], &[1, 3, 5], &[1, 3, 5]][at];
            assert_eq!(step.report().masked, dead_at_dispatch, "rank {rank} dispatch {at}");
            for expert in 0..outputs.counts().len() {
                step.results_mut(expert).fill(Bf16::from_f32(2.0));
            }
            if (at, rank) == (1, 3) {
                break;
            }
            let mut out = rows.clone();
            let report = step.combine().receive(&weights(), &mut out).unwrap();
            let dead: &[u32] = [&[][..], &[1, 3], &[1, 3, 5], &[1, 3, 5]][at];
            assert_eq!(report.masked, dead, "rank {rank} combine {at}");
            assert_eq!(out, expected(dead), "rank {rank} step {at}");
        }
        over.wait();
    });
}
