//! Steps of expert groups through the C ABI: both modes, their halves, and calls in the wrong order.

use std::ffi::{CStr, c_char, c_void};
use std::ptr;

use bytemuck::Zeroable;
use crossdock_ffi::*;

const RANKS: usize = 4;
const EXPERTS: u32 = 8;
const TOP_K: usize = 2;
const HIDDEN: usize = 128;
const TOKENS: usize = 12;

fn sized<T: Zeroable>(set: impl FnOnce(&mut T, usize)) -> T {
    let mut value = T::zeroed();
    set(&mut value, size_of::<T>());
    value
}

#[track_caller]
fn ok(status: crossdock_status) {
    assert_eq!(status, CROSSDOCK_OK, "{}", last_message());
}

fn last_message() -> String {
    let mut error: crossdock_error = sized(|error: &mut crossdock_error, size| error.size = size);
    // SAFETY: it says its size; its words are valid until the next failure of this thread.
    unsafe {
        crossdock_last_error(&raw mut error);
        CStr::from_ptr(error.message).to_string_lossy().into_owned()
    }
}

const LIMITS: [u32; RANKS] = [TOKENS as u32; RANKS];

fn options() -> crossdock_group_options {
    sized(|options: &mut crossdock_group_options, size| {
        options.size = size;
        (options.max_tokens, options.ranks) = (LIMITS.as_ptr(), RANKS);
        (options.experts, options.top_k, options.hidden) = (EXPERTS, TOP_K as u32, HIDDEN as u32);
        (options.rows, options.slots, options.verify) = (CROSSDOCK_ROWS_BF16, 2, 1);
        options.authentication = CROSSDOCK_AUTHENTICATION_OFF;
    })
}

fn in_process() -> [u64; RANKS] {
    let mut groups = [0; RANKS];
    // SAFETY: it says its size, and there is room for all ranks.
    ok(unsafe { crossdock_group_in_process(&options(), groups.as_mut_ptr()) });
    groups
}

fn bf16(value: f32) -> u16 {
    (value.to_bits() >> 16) as u16
}

fn f32_of(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Small numbers, so that every sum is exact.
fn value(rank: usize, token: usize) -> f32 {
    (rank * TOKENS + token) as f32
}

fn choices(rank: usize) -> Vec<i64> {
    let choice = |token: usize| {
        let first = (rank * 3 + token * 5) as i64 % i64::from(EXPERTS);
        [first, if token % 4 == 3 { -1 } else { (first + 3) % i64::from(EXPERTS) }]
    };
    (0..TOKENS).flat_map(choice).collect()
}

fn tokens(rows: &[u16], choices: &[i64]) -> crossdock_tokens {
    sized(|tokens: &mut crossdock_tokens, size| {
        tokens.size = size;
        tokens.count = rows.len() / HIDDEN;
        (tokens.rows, tokens.choices) = (rows.as_ptr().cast(), choices.as_ptr());
        tokens.form = CROSSDOCK_ROWS_BF16;
    })
}

fn rows(rank: usize) -> Vec<u16> {
    (0..TOKENS).flat_map(|token| [bf16(value(rank, token)); HIDDEN]).collect()
}

/// An expert multiplies by its number plus one.
fn factor(expert: usize) -> f32 {
    (expert + 1) as f32
}

fn expected(rank: usize) -> Vec<f32> {
    let of_token = |(token, chosen): (usize, &[i64])| {
        let sum: f32 =
            chosen.iter().filter(|&&expert| expert >= 0).map(|&expert| factor(expert as usize)).sum();
        value(rank, token) * sum
    };
    choices(rank).chunks(TOP_K).enumerate().map(of_token).collect()
}

fn latency_step(group: u64, rank: usize, slot: u32, outputs: u64, route: Option<u64>) {
    let (rows, choices) = (rows(rank), choices(rank));
    let mut tokens = tokens(&rows, &choices);
    if let Some(route) = route {
        (tokens.route, tokens.choices) = (route, ptr::null());
    }
    let mut report = sized(|report: &mut crossdock_report, size| report.size = size);
    // SAFETY: what they point to lives, here and below.
    ok(unsafe { crossdock_dispatch(group, slot, &raw const tokens, &raw mut report) });
    assert!(report.logical_bytes > 0);
    ok(crossdock_latency_receive(group, slot, outputs));
    let mut info = sized(|info: &mut crossdock_latency_outputs, size| info.size = size);
    // SAFETY: as above.
    ok(unsafe { crossdock_latency_outputs_describe(outputs, &raw mut info) });
    assert_eq!((info.experts, info.row_bytes, info.rows), (2, 2 * HIDDEN, RANKS * TOKENS));
    for expert in 0..info.experts {
        let (mut results, mut count) = (ptr::null_mut::<c_void>(), 0);
        // SAFETY: as above.
        ok(unsafe {
            crossdock_latency_results(group, slot, expert as u32, &raw mut results, &raw mut count)
        });
        // SAFETY: as long as the description says; the results are this rank's until they are combined.
        unsafe {
            assert_eq!(count, *info.counts.add(expert) as usize);
            let values = info.values.cast::<u16>().add(expert * info.rows * HIDDEN);
            for at in 0..count * HIDDEN {
                let made = f32_of(*values.add(at)) * factor(rank * 2 + expert);
                results.cast::<u16>().add(at).write(bf16(made));
            }
        }
    }
    ok(crossdock_latency_combine(group, slot));
    let weights = [1.0f32; TOKENS * TOP_K];
    let mut combined = vec![0u16; TOKENS * HIDDEN];
    // SAFETY: as above.
    ok(unsafe {
        crossdock_latency_finish(
            group,
            slot,
            weights.as_ptr(),
            weights.len(),
            combined.as_mut_ptr().cast(),
            combined.len(),
            &raw mut report,
        )
    });
    for (token, expected) in expected(rank).into_iter().enumerate() {
        // Products are rounded to bfloat16 on the way.
        let found = f32_of(combined[token * HIDDEN]);
        assert!(
            (found - expected).abs() <= expected.abs() / 64.0,
            "token {token}: {found}, expected {expected}"
        );
    }
}

#[test]
fn tokens_go_to_their_experts_and_back_in_the_latency_mode() {
    let groups = in_process();
    std::thread::scope(|scope| {
        for (rank, group) in groups.into_iter().enumerate() {
            scope.spawn(move || {
                let mut outputs = 0;
                // SAFETY: it can be written, here and below.
                ok(unsafe {
                    crossdock_latency_outputs_create(
                        group,
                        CROSSDOCK_ROWS_BF16,
                        0,
                        0,
                        CROSSDOCK_SCALES_BY_ROW,
                        &raw mut outputs,
                    )
                });
                let (choices, mut route) = (choices(rank), 0);
                // SAFETY: as above.
                ok(unsafe {
                    crossdock_route_create(group, 0, choices.as_ptr(), choices.len(), &raw mut route)
                });
                let (mut bytes, mut length) = (vec![0u8; 64 << 10], 0);
                // SAFETY: as above.
                ok(unsafe { crossdock_route_write(route, bytes.as_mut_ptr(), bytes.len(), &raw mut length) });
                let mut read = 0;
                // SAFETY: as above.
                ok(unsafe { crossdock_route_read(group, bytes.as_ptr(), length, &raw mut read) });
                for step in 0..6u32 {
                    latency_step(
                        group,
                        rank,
                        step % 2,
                        outputs,
                        [None, Some(route), Some(read)][step as usize % 3],
                    );
                }
                ok(crossdock_route_close(route));
                ok(crossdock_route_close(read));
                ok(crossdock_outputs_close(outputs));
                ok(crossdock_group_close(group));
            });
        }
    });
}

#[test]
fn tokens_go_to_their_experts_and_back_in_the_throughput_mode() {
    let groups = in_process();
    std::thread::scope(|scope| {
        for (rank, group) in groups.into_iter().enumerate() {
            scope.spawn(move || throughput(group, rank));
        }
    });
}

fn throughput(group: u64, rank: usize) {
    let mut outputs = 0;
    // SAFETY: what they point to lives, here and below.
    ok(unsafe { crossdock_throughput_outputs_create(group, CROSSDOCK_ROWS_BF16, 0, 0, &raw mut outputs) });
    let (rows, choices) = (rows(rank), choices(rank));
    let weights: Vec<f32> = (0..TOKENS * TOP_K).map(|at| at as f32).collect();
    let mut tokens = tokens(&rows, &choices);
    tokens.weights = weights.as_ptr();
    for _ in 0..3 {
        // SAFETY: as above.
        ok(unsafe { crossdock_dispatch(group, 0, &raw const tokens, ptr::null_mut()) });
        ok(crossdock_throughput_receive(group, 0, outputs));
        let mut info = sized(|info: &mut crossdock_throughput_outputs, size| info.size = size);
        // SAFETY: as above.
        ok(unsafe { crossdock_throughput_outputs_describe(outputs, &raw mut info) });
        let (mut results, mut count) = (ptr::null_mut::<c_void>(), 0);
        // SAFETY: as above.
        ok(unsafe { crossdock_throughput_results(group, 0, &raw mut results, &raw mut count) });
        assert_eq!((count, info.most_rows), (info.rows, RANKS * TOKENS));
        let mut ranges = [0u32; 2 * RANKS];
        // SAFETY: as above.
        ok(unsafe { crossdock_outputs_ranges(outputs, ranges.as_mut_ptr(), ranges.len(), ptr::null_mut()) });
        assert_eq!(ranges[2 * RANKS - 1] as usize, info.rows);
        let mut back = vec![0f32; info.rows * TOP_K];
        for row in 0..info.rows {
            // SAFETY: as long as the description says; the results are this rank's until they are combined.
            unsafe {
                let mut sum = 0.0;
                for choice in 0..TOP_K {
                    let expert = *info.experts.add(row * TOP_K + choice);
                    if expert >= 0 {
                        sum += factor(rank * 2 + expert as usize);
                        back[row * TOP_K + choice] = *info.weights.add(row * TOP_K + choice);
                    }
                }
                for at in row * HIDDEN..(row + 1) * HIDDEN {
                    let made = f32_of(*info.values.cast::<u16>().add(at)) * sum;
                    results.cast::<u16>().add(at).write(bf16(made));
                }
            }
        }
        // SAFETY: as above.
        ok(unsafe { crossdock_throughput_combine(group, 0, back.as_ptr(), back.len()) });
        let mut combined = vec![0u16; TOKENS * HIDDEN];
        let bias = vec![bf16(1.0); TOKENS * HIDDEN];
        let mut weights_back = vec![0f32; TOKENS * TOP_K];
        // SAFETY: as above.
        ok(unsafe {
            crossdock_throughput_finish(
                group,
                0,
                bias.as_ptr().cast(),
                ptr::null(),
                weights_back.as_mut_ptr(),
                weights_back.len(),
                combined.as_mut_ptr().cast(),
                combined.len(),
                ptr::null_mut(),
            )
        });
        for (token, expected) in expected(rank).into_iter().enumerate() {
            let found = f32_of(combined[token * HIDDEN]) - 1.0;
            assert!((found - expected).abs() <= 2.0 + expected.abs() / 64.0, "{token}: {found}, {expected}");
        }
        let chosen = |(at, &weight): (usize, &f32)| if choices[at] < 0 { 0.0 } else { weight };
        assert_eq!(weights_back, weights.iter().enumerate().map(chosen).collect::<Vec<_>>());
    }
    let (mut per_rank, mut per_expert) = ([0u32; RANKS], [0u32; EXPERTS as usize]);
    let mut is_in = [0u8; RANKS * TOKENS];
    // SAFETY: as above.
    ok(unsafe {
        crossdock_spread(
            group,
            choices.as_ptr(),
            choices.len(),
            per_rank.as_mut_ptr(),
            per_expert.as_mut_ptr(),
            is_in.as_mut_ptr(),
        )
    });
    assert_eq!(per_rank.iter().sum::<u32>(), is_in.iter().map(|&is_in| u32::from(is_in)).sum::<u32>());
    assert_eq!(
        per_expert.iter().sum::<u32>() as usize,
        choices.iter().filter(|&&expert| expert >= 0).count()
    );
    ok(crossdock_outputs_close(outputs));
    ok(crossdock_group_close(group));
}

#[test]
fn calls_in_another_order_are_refused_and_a_step_can_be_abandoned() {
    let options = crossdock_group_options { ranks: 1, ..options() };
    let (mut group, mut outputs, mut other) = (0, 0, 0);
    // SAFETY: what they point to lives, here and below.
    unsafe {
        ok(crossdock_group_in_process(&raw const options, &raw mut group));
        ok(crossdock_latency_outputs_create(group, CROSSDOCK_ROWS_BF16, 0, 0, 0, &raw mut outputs));
        ok(crossdock_throughput_outputs_create(group, CROSSDOCK_ROWS_BF16, 0, 0, &raw mut other));
        let larger =
            crossdock_latency_outputs_create(group, CROSSDOCK_ROWS_OPAQUE, 1 << 16, 0, 0, &raw mut outputs);
        assert_eq!(larger, CROSSDOCK_BAD_ARGUMENT, "{}", last_message());
    }
    assert_eq!(crossdock_latency_receive(group, 0, outputs), CROSSDOCK_OUT_OF_ORDER);
    assert_eq!(crossdock_latency_combine(group, 0), CROSSDOCK_OUT_OF_ORDER);
    let (rows, choices) = (rows(0), choices(0));
    let tokens = tokens(&rows, &choices);
    for _ in 0..3 {
        // SAFETY: as above.
        ok(unsafe { crossdock_dispatch(group, 0, &raw const tokens, ptr::null_mut()) });
        // SAFETY: as above.
        let twice = unsafe { crossdock_dispatch(group, 0, &raw const tokens, ptr::null_mut()) };
        assert_eq!(twice, CROSSDOCK_OUT_OF_ORDER);
        assert_eq!(crossdock_latency_receive(group, 0, other), CROSSDOCK_WRONG_KIND);
        assert_eq!(crossdock_latency_receive(group, 2, outputs), CROSSDOCK_BAD_ARGUMENT);
        ok(crossdock_latency_receive(group, 0, outputs));
        assert_eq!(crossdock_throughput_receive(group, 0, other), CROSSDOCK_OUT_OF_ORDER);
        ok(crossdock_slot_abandon(group, 0));
    }
    let bad = [i64::from(EXPERTS); TOKENS * TOP_K];
    let wrong = crossdock_tokens { choices: bad.as_ptr(), ..tokens };
    // SAFETY: as above.
    let refused = unsafe { crossdock_dispatch(group, 0, &raw const wrong, ptr::null_mut()) };
    assert_eq!(refused, CROSSDOCK_BAD_ARGUMENT);
    assert!(last_message().contains("must be -1 or below 8"), "{}", last_message());
    ok(crossdock_group_close(group));
    ok(crossdock_outputs_close(outputs));
    ok(crossdock_outputs_close(other));
}

/// Ranks that meet over their engines, as processes do.
#[test]
fn ranks_meet_at_their_addresses() {
    let groups: Vec<u64> = (0..RANKS)
        .map(|rank| {
            let options = crossdock_group_options { rank: rank as u32, ..options() };
            let mut group = 0;
            // SAFETY: what they point to lives, here and below.
            ok(unsafe { crossdock_group_open(&raw const options, &raw mut group) });
            group
        })
        .collect();
    let addresses: Vec<[c_char; 64]> = groups
        .iter()
        .map(|&group| {
            let mut address = [0; 64];
            // SAFETY: as above.
            ok(unsafe { crossdock_group_address(group, address.as_mut_ptr(), 64, ptr::null_mut()) });
            address
        })
        .collect();
    std::thread::scope(|scope| {
        for (rank, &group) in groups.iter().enumerate() {
            let addresses = &addresses;
            scope.spawn(move || {
                let pointers: Vec<*const c_char> = addresses.iter().map(|address| address.as_ptr()).collect();
                // SAFETY: as above.
                ok(unsafe { crossdock_group_meet(group, pointers.as_ptr(), RANKS, 30_000) });
                let mut outputs = 0;
                // SAFETY: as above.
                ok(unsafe {
                    crossdock_latency_outputs_create(group, CROSSDOCK_ROWS_BF16, 0, 0, 0, &raw mut outputs)
                });
                latency_step(group, rank, 0, outputs, None);
                ok(crossdock_outputs_close(outputs));
            });
        }
    });
    ok(crossdock_group_mark_dead(groups[0], 3));
    let mut sizes = sized(|sizes: &mut crossdock_group_sizes, size| sizes.size = size);
    // SAFETY: as above.
    ok(unsafe { crossdock_group_needs(&options(), &raw mut sizes) });
    assert!(sizes.outputs_bytes > 0 && sizes.dispatch_arenas_bytes > 0);
    groups.into_iter().for_each(|group| ok(crossdock_group_close(group)));
}
