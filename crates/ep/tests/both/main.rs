//! Both modes against a reference that is written from the semantics, bit for bit.

mod inputs;
mod processes;
mod reference;
mod steps;

use std::time::Duration;

use crossdock_ep::{GroupConfig, GroupOptions, Payload, ScaleOrder};
use inputs::{Random, Routing};
use reference::Form;
use steps::{Case, run};

fn config(max_tokens: &[u32], experts: u32, top_k: u32, hidden: u32) -> GroupConfig {
    GroupConfig {
        max_tokens: max_tokens.to_vec(),
        experts,
        top_k,
        hidden,
        payload: Payload::Bf16,
        slots: 1,
        placement_version: 1,
    }
}

fn options() -> GroupOptions {
    GroupOptions {
        deadline: Duration::from_secs(30),
        warm_up: Duration::from_secs(30),
        ..GroupOptions::default()
    }
}

#[test]
fn both_modes_give_what_the_semantics_say() {
    for form in [Form::Bf16, Form::Fp8, Form::Fp8PowerOfTwo, Form::Fp8Ue8m0] {
        for order in [ScaleOrder::ByRow, ScaleOrder::ByColumn] {
            for routing in Routing::ALL {
                let config = config(&[7, 16, 0, 9], 10, 4, 256);
                let case = Case { form, order, routing, steps: 3, seed: 1, verify: true, full: false };
                run(&config, &options(), &case);
            }
        }
    }
}

#[test]
fn ranks_of_any_number_hold_experts_of_any_number() {
    for (ranks, experts, top_k) in
        [(1, 1, 1), (1, 5, 3), (2, 1, 2), (3, 7, 2), (5, 4, 4), (8, 256, 8), (6, 17, 8)]
    {
        let config = config(&vec![5; ranks], experts, top_k, 128);
        let case = Case {
            form: Form::Fp8,
            order: ScaleOrder::ByColumn,
            routing: Routing::Uniform,
            steps: 2,
            seed: 3,
            verify: false,
            full: true,
        };
        run(&config, &options(), &case);
    }
}

/// Wide expert parallelism: more ranks than processors, and tokens everywhere.
#[test]
fn seventy_two_ranks_with_four_experts_each() {
    let mut max_tokens = vec![8; 72];
    (max_tokens[3], max_tokens[40]) = (1, 0);
    let config = config(&max_tokens, 288, 8, 256);
    let case = Case {
        form: Form::Fp8,
        order: ScaleOrder::ByRow,
        routing: Routing::Zipf,
        steps: 2,
        seed: 5,
        verify: false,
        full: true,
    };
    run(&config, &options(), &case);
}

#[test]
fn token_limits_may_differ_by_rank() {
    let config = config(&[768, 4096], 8, 2, 64);
    let case = Case {
        form: Form::Bf16,
        order: ScaleOrder::ByRow,
        routing: Routing::Uniform,
        steps: 1,
        seed: 6,
        verify: false,
        full: true,
    };
    run(&config, &options(), &case);
}

#[test]
fn random_groups() {
    let cases = std::env::var("CROSSDOCK_EP_CASES").map_or(60, |cases| cases.parse().expect("a number"));
    let first = std::env::var("CROSSDOCK_EP_SEED").map_or(1, |seed| seed.parse().expect("a number"));
    for seed in first..first + cases {
        let mut random = Random::new(seed);
        let ranks = 1 + random.below(6) as usize;
        let max_tokens: Vec<u32> = (0..ranks).map(|_| random.below(24)).collect();
        let form = [Form::Bf16, Form::Fp8, Form::Fp8PowerOfTwo, Form::Fp8Ue8m0][random.below(4) as usize];
        let hidden =
            if form == Form::Bf16 { 8 * (1 + random.below(70)) } else { 128 * (1 + random.below(9)) };
        let config = config(&max_tokens, 1 + random.below(40), 1 + random.below(9), hidden);
        let order = [ScaleOrder::ByRow, ScaleOrder::ByColumn][random.below(2) as usize];
        let routing = Routing::ALL[random.below(Routing::ALL.len() as u32) as usize];
        let case = Case {
            form,
            order,
            routing,
            steps: 1 + random.below(4),
            seed,
            verify: random.below(2) == 0,
            full: false,
        };
        eprintln!("seed {seed}: {config:?} {case:?}");
        run(&config, &options(), &case);
    }
}
