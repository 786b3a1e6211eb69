//! Routes that are recorded, replayed and used again; and bytes that are none.

use std::thread;
use std::time::Duration;

use crossdock_ep::{
    Bf16, Dispatch, EpError, Group, GroupConfig, GroupOptions, LatencyOutputs, Payload, Route, RouteError,
    Rows, ScaleOrder, ScaleRule, ThroughputOutputs, Tokens,
};
use proptest::prelude::*;

const TOP_K: usize = 3;
const HIDDEN: usize = 128;

fn config() -> GroupConfig {
    GroupConfig {
        max_tokens: vec![6, 0, 9],
        experts: 7,
        top_k: TOP_K as u32,
        hidden: HIDDEN as u32,
        payload: Payload::Bf16,
        slots: 1,
        placement_version: 1,
    }
}

fn groups() -> Vec<Group> {
    let long = Duration::from_secs(60);
    let options = GroupOptions { deadline: long, warm_up: long, ..GroupOptions::default() };
    Group::in_process(&config(), &options).unwrap()
}

/// Some tokens choose nothing, some less than they may.
fn choices(rank: u32) -> Vec<i64> {
    let tokens = config().max_tokens[rank as usize] as i64;
    let choose = |token: i64| match token % 4 {
        0 => [token % 7, -1, (token + 3) % 7],
        1 => [-1; 3],
        _ => [(token + i64::from(rank)) % 7, (token + 2) % 7, (token + 4) % 7],
    };
    (0..tokens).flat_map(choose).collect()
}

fn rows(rank: u32) -> Vec<Bf16> {
    let count = config().max_tokens[rank as usize] as usize * HIDDEN;
    (0..count).map(|at| Bf16::from_f32((at * 7 % 251) as f32 - 100.0 + rank as f32)).collect()
}

fn weights(rank: u32) -> Vec<f32> {
    (0..choices(rank).len()).map(|at| (1 + at % 13) as f32 / 16.0).collect()
}

/// How the steps of a rank find their way.
#[derive(Clone, Copy)]
enum Way<'a> {
    Choices(&'a [i64]),
    Along(&'a Route),
}

fn dispatch<'a>(group: &'a mut Group, way: Way<'_>, rows: Rows<'_>, weights: &[f32]) -> Dispatch<'a> {
    let slot = group.slot(0);
    let dispatch = match way {
        Way::Choices(choices) => slot.dispatch(&Tokens { rows, choices, weights: Some(weights) }),
        Way::Along(route) => slot.dispatch_along(route, rows, Some(weights)),
    };
    dispatch.unwrap()
}

/// All that a rank sees of a step in each mode, in each of two forms.
fn steps(group: &mut Group, way: Way<'_>) -> Vec<Vec<u8>> {
    let (rows, weights) = (rows(group.rank()), weights(group.rank()));
    let mut seen = Vec::new();
    let bits = |values: &[Bf16]| values.iter().flat_map(|value| value.to_bits().to_le_bytes()).collect();
    for (form, rows) in
        [(Payload::Bf16, Rows::Bf16(&rows)), (Payload::Fp8, Rows::Fp8(&rows, ScaleRule::Plain))]
    {
        let mut out = vec![Bf16::from_f32(0.0); weights.len() / TOP_K * HIDDEN];
        let mut outputs = LatencyOutputs::new(group, form, ScaleOrder::ByRow);
        let mut step = dispatch(group, way, rows, &weights).latency(&mut outputs).unwrap();
        seen.extend([outputs.values().to_vec(), outputs.scales().to_vec()]);
        seen.push(outputs.sources().iter().flat_map(|token| token.to_le_bytes()).collect());
        for expert in 0..outputs.counts().len() {
            for (row, results) in step.results_mut(expert).chunks_mut(HIDDEN).enumerate() {
                for (byte, result) in outputs.row(expert, row).iter().zip(results) {
                    *result = Bf16::from_f32(f32::from(*byte) + expert as f32);
                }
            }
        }
        step.combine().receive(&weights, &mut out).unwrap();
        seen.push(bits(&out));
        let mut outputs = ThroughputOutputs::new(group, form);
        let mut step = dispatch(group, way, rows, &weights).throughput(&mut outputs).unwrap();
        let row_bytes = form.row_bytes(HIDDEN as u32) as usize;
        let values = outputs.values()[..outputs.len() * row_bytes].to_vec();
        for (row, results) in values.chunks(row_bytes).zip(step.results_mut().chunks_mut(HIDDEN)) {
            row.iter().zip(results).for_each(|(byte, result)| *result = Bf16::from_f32(f32::from(*byte)));
        }
        step.combine(None).unwrap().receive(&[], None, &mut out).unwrap();
        seen.extend([values, bits(&out)]);
    }
    seen
}

/// Runs each rank on a thread of its own, and gives what they give.
fn each<T: Send>(rank: impl Fn(Group) -> T + Sync) -> Vec<T> {
    thread::scope(|scope| {
        let threads: Vec<_> = groups().into_iter().map(|group| scope.spawn(|| rank(group))).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    })
}

#[test]
fn a_recorded_route_gives_the_same_bits_in_another_group() {
    let recorded = each(|mut group| {
        let choices = choices(group.rank());
        let route = group.slot(0).route(&choices).unwrap();
        assert_eq!(route.choices().collect::<Vec<_>>(), choices);
        assert_eq!(route.tokens(), choices.len() / TOP_K);
        // The route that a dispatch finds by itself is the same.
        let (rows, weights) = (rows(group.rank()), weights(group.rank()));
        let dispatch = dispatch(&mut group, Way::Choices(&choices), Rows::Bf16(&rows), &weights);
        assert_eq!(dispatch.route(), route);
        drop(dispatch);
        (steps(&mut group, Way::Choices(&choices)), route.to_bytes())
    });
    let replayed = each(|mut group| {
        let rank = group.rank();
        let route = Route::from_bytes(&recorded[rank as usize].1, &config(), rank).unwrap();
        assert_eq!(route.choices().collect::<Vec<_>>(), choices(rank));
        assert_eq!(route.to_bytes(), recorded[rank as usize].1);
        // As often as one likes, and again after steps of others.
        let first = steps(&mut group, Way::Along(&route));
        let other = vec![-1; choices(rank).len()];
        steps(&mut group, Way::Choices(&other));
        assert_eq!(steps(&mut group, Way::Along(&route)), first);
        first
    });
    for (rank, ((recorded, _), replayed)) in recorded.iter().zip(&replayed).enumerate() {
        assert_eq!(recorded, replayed, "rank {rank}");
    }
}

/// A route that is kept is not written over by the dispatches that follow.
#[test]
fn a_route_that_is_kept_stays_as_it_is() {
    let mut groups = groups();
    let group = &mut groups[2];
    let (choices, rows, weights) = (choices(2), rows(2), weights(2));
    let kept = dispatch(group, Way::Choices(&choices), Rows::Bf16(&rows), &weights).route();
    let fewer = &choices[TOP_K..];
    assert!(group.slot(0).route(&fewer[1..]).is_err());
    assert_eq!(group.slot(0).route(fewer).unwrap().choices().collect::<Vec<_>>(), fewer);
    assert_eq!(kept.choices().collect::<Vec<_>>(), choices);
}

#[test]
fn routes_of_others_are_refused() {
    let mut groups = groups();
    let route = groups[0].slot(0).route(&choices(0)).unwrap();
    let rows = rows(0);
    for other in [1, 2] {
        let error = groups[other].slot(0).dispatch_along(&route, Rows::Bf16(&rows), None).unwrap_err();
        assert_eq!(error, EpError::ForeignRoute);
        let error = Route::from_bytes(&route.to_bytes(), &config(), other as u32).unwrap_err();
        let owner = RouteError::OfAnother { rank: 0, ranks: 3, experts: 7, top_k: 3, limit: 6 };
        assert_eq!(error, owner);
    }
    for other in [
        GroupConfig { max_tokens: vec![6, 0], ..config() },
        GroupConfig { max_tokens: vec![7, 0, 9], ..config() },
        GroupConfig { experts: 8, ..config() },
        GroupConfig { top_k: 2, ..config() },
        GroupConfig { max_tokens: vec![], ..config() },
    ] {
        let error = Route::from_bytes(&route.to_bytes(), &other, 0).unwrap_err();
        assert!(matches!(error, RouteError::OfAnother { rank: 0, ranks: 3, .. }), "{error:?}");
        if let Ok(mut group) = Group::in_process(&other, &GroupOptions::default()) {
            let error = group[0].slot(0).dispatch_along(&route, Rows::Bf16(&rows), None).unwrap_err();
            assert_eq!(error, EpError::ForeignRoute);
        }
    }
    // What a route does not depend on may differ.
    let other =
        GroupConfig { hidden: 256, slots: 2, placement_version: 2, max_tokens: vec![6, 9, 0], ..config() };
    assert_eq!(Route::from_bytes(&route.to_bytes(), &other, 0).unwrap(), route);
    assert!(Route::from_bytes(&route.to_bytes(), &config(), 3).is_err());
}

#[test]
fn bytes_that_are_cut_off_are_refused_or_fewer_tokens() {
    let route = groups()[0].slot(0).route(&choices(0)).unwrap();
    let bytes = route.to_bytes();
    let head = bytes.len() - 4 * choices(0).len();
    for len in 0..bytes.len() {
        let refused = Route::from_bytes(&bytes[..len], &config(), 0);
        let Err(error) = refused else {
            // Whole tokens: a route by itself.
            assert!(len >= head && (len - head).is_multiple_of(4 * TOP_K), "{len}");
            continue;
        };
        match error {
            RouteError::Malformed { .. } => assert!(len < head || !len.is_multiple_of(4), "{len}"),
            RouteError::Choices(EpError::Choices(_)) => assert!(len > head, "{len}"),
            error => panic!("{len}: {error:?}"),
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_a_route_or_an_error(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let refused = Route::from_bytes(&bytes, &config(), 0);
        prop_assert!(matches!(refused, Err(RouteError::Malformed { .. })), "{:?}", refused);
    }

    #[test]
    fn any_choices_behind_a_right_beginning_are_a_route_or_an_error(
        words in prop::collection::vec(prop_oneof![-2_i32..8, any::<i32>()], 0..24),
        byte in any::<prop::sample::Index>(),
        value in any::<u8>(),
    ) {
        let mut bytes = groups()[0].slot(0).route(&[]).unwrap().to_bytes();
        let head = bytes.len();
        bytes.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        let possible = words.len().is_multiple_of(TOP_K)
            && words.len() <= 6 * TOP_K
            && words.iter().all(|word| (-1..7).contains(word))
            && (0..7).all(|expert| words.iter().filter(|word| **word == expert).count() <= 6);
        match Route::from_bytes(&bytes, &config(), 0) {
            Ok(route) => {
                prop_assert!(possible);
                prop_assert!(route.choices().eq(words.iter().map(|word| i64::from(*word))));
                prop_assert_eq!(route.to_bytes(), bytes.clone());
            }
            Err(RouteError::Choices(_)) => prop_assert!(!possible),
            Err(error) => prop_assert!(false, "{error:?}"),
        }
        // One byte of the beginning is another.
        let at = byte.index(head);
        prop_assume!(bytes[at] != value);
        bytes[at] = value;
        let refused = Route::from_bytes(&bytes, &config(), 0);
        let is_typed = matches!(refused, Err(RouteError::Malformed { .. } | RouteError::OfAnother { .. }));
        prop_assert!(is_typed, "{:?}", refused);
    }
}
