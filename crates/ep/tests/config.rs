//! What is possible, what it takes, and how much less that is than elsewhere.

use crossdock_ep::{Experts, Group, GroupConfig, GroupOptions, Layout, LayoutError, Payload, Violation};
use proptest::prelude::*;

fn config() -> GroupConfig {
    GroupConfig {
        max_tokens: vec![128; 8],
        experts: 256,
        top_k: 8,
        hidden: 7168,
        payload: Payload::Fp8,
        slots: 2,
        placement_version: 3,
    }
}

#[test]
fn every_violated_limit_is_listed_at_once() {
    assert_eq!(config().validate(), Ok(()));
    let wrong = GroupConfig {
        max_tokens: vec![128, u32::MAX, 4],
        experts: 0,
        top_k: 65,
        hidden: 7170,
        payload: Payload::Fp8,
        slots: 0,
        placement_version: 0,
    };
    let found = wrong.validate().unwrap_err();
    let named: Vec<String> = found.0.iter().map(Violation::to_string).collect();
    for part in [
        "experts 0",
        "top_k 65",
        "slots 0",
        "max_tokens 4294967295 of rank 1",
        "hidden 7170: it must be a multiple of 8",
        "hidden 7170: it must be a multiple of 128",
    ] {
        assert!(named.iter().any(|named| named.starts_with(part)), "{part} in {named:?}");
    }
    assert_eq!(named.len(), 6);
    assert!(Group::in_process(&wrong, &GroupOptions::default()).is_err());
    assert!(Group::allocate_region(&config(), 8).is_err());
    let opaque = Payload::Opaque { row_bytes: 24, scale_bytes: 3 };
    assert_eq!(GroupConfig { payload: opaque, ..config() }.validate().unwrap_err().0.len(), 2);
    assert_eq!(GroupConfig { max_tokens: vec![], ..config() }.validate().unwrap_err().0.len(), 1);
    // BF16 has no blocks, so any multiple of 8 does.
    assert_eq!(GroupConfig { hidden: 72, payload: Payload::Bf16, ..config() }.validate(), Ok(()));
    let huge = GroupConfig {
        max_tokens: vec![1 << 20; 4096],
        experts: 1 << 15,
        hidden: 1 << 17,
        slots: 64,
        ..config()
    };
    assert_eq!(huge.validate().unwrap_err().0, [Violation::TooLarge]);
}

/// What DeepEP's low-latency mode allocates for the dispatch: both halves of send and receive buffers, whatever the
/// number of ranks.
fn deep_ep_dispatch_bytes(tokens: u64, hidden: u64, experts: u64) -> u64 {
    let message = 16 + (2 * hidden).max(hidden + 4 * hidden / 128);
    2 * (tokens * message + experts * tokens * message)
}

#[test]
fn arenas_are_a_fraction_of_what_others_take_and_hold_the_worst_case() {
    println!(
        "| ranks | dispatch, MB | of DeepEP's | besides, all ranks on other hosts, MB | of DeepEP's | combine over ports, MB | outputs, MB |"
    );
    println!("|--|--|--|--|--|--|--|");
    for ranks in [8, 32, 72] {
        // 256 experts spread over 72 ranks as well.
        let config = GroupConfig { max_tokens: vec![128; ranks], ..config() };
        let sizes = config.sizes().unwrap();
        let theirs = deep_ep_dispatch_bytes(128, 7168, 256);
        let part = |bytes: u64| bytes as f64 / theirs as f64;
        let mb = |bytes: u64| bytes as f64 / 1e6;
        let over_ports = sizes.dispatch_arenas + sizes.port_dispatch_arenas;
        println!(
            "| {ranks} | {:.1} | {:.3} | {:.1} | {:.3} | {:.1} | {:.1} |",
            mb(sizes.dispatch_arenas),
            part(sizes.dispatch_arenas),
            mb(sizes.port_dispatch_arenas),
            part(over_ports),
            mb(sizes.port_combine_arenas),
            mb(sizes.outputs)
        );
        assert!(part(over_ports) <= 0.25, "{ranks} ranks: {}", part(over_ports));
        assert_eq!(sizes.combine_arenas, 0);
        // At most a row for each choice of each token, in each slot, with its checksum and weights.
        assert!(sizes.port_combine_arenas <= 2 * 128 * 8 * (2 * 7168 + 4 + 4 * 8));
        // What is allocated is what was said, but for whole pages and what the outputs have for themselves.
        let region = Group::region_bytes(&config, 0).unwrap() as u64;
        assert!(region <= over_ports + sizes.port_combine_arenas + sizes.outputs);
    }
}

fn count(
    choices: &[i64],
    top_k: usize,
    experts: Experts,
    group_of: impl Fn(u32) -> u32,
    groups: u32,
) -> Vec<u32> {
    let goes = |of_token: &[i64], group| {
        of_token.iter().any(|&expert| expert >= 0 && group_of(experts.place(expert as u32).0) == group)
    };
    (0..groups)
        .map(|group| choices.chunks(top_k).filter(|of_token| goes(of_token, group)).count() as u32)
        .collect()
}

proptest! {
    #[test]
    fn layouts_count_each_token_once_a_rank_and_once_a_node(
        ranks in 1_u32..20,
        experts in 1_u32..60,
        top_k in 1_usize..9,
        seeds in prop::collection::vec(any::<u32>(), 0..200),
    ) {
        let spread = Experts::new(experts, ranks);
        let tokens = seeds.len() / top_k;
        let choices: Vec<i64> = seeds[..tokens * top_k].iter().map(|seed| i64::from(seed % (experts + 1)) - 1).collect();
        let layout = Layout::of(&choices, top_k, spread).unwrap();
        prop_assert_eq!(&layout.tokens_per_rank, &count(&choices, top_k, spread, |rank| rank, ranks));
        for expert in 0..experts {
            let hits = choices.iter().filter(|&&choice| choice == i64::from(expert)).count();
            prop_assert_eq!(layout.tokens_per_expert[expert as usize] as usize, hits);
        }
        for ranks_per_node in [1, 3, 8] {
            let node_of: Vec<u32> = (0..ranks).map(|rank| rank / ranks_per_node).collect();
            let nodes = ranks.div_ceil(ranks_per_node);
            let expected = count(&choices, top_k, spread, |rank| rank / ranks_per_node, nodes);
            prop_assert_eq!(layout.tokens_per_node(&node_of), expected);
        }
        for token in 0..tokens {
            for rank in 0..ranks {
                let goes = choices[token * top_k..][..top_k].iter().any(|&e| e >= 0 && spread.place(e as u32).0 == rank);
                prop_assert_eq!(layout.is_token_in_rank[token * ranks as usize + rank as usize], goes);
            }
        }
    }
}

#[test]
fn choices_of_no_expert_are_refused_with_their_place() {
    let spread = Experts::new(4, 2);
    let refused = Layout::of(&[0, -1, 3, 4], 2, spread).unwrap_err();
    assert_eq!(refused, LayoutError::NoSuchExpert { token: 1, choice: 1, expert: 4, experts: 4 });
    assert_eq!(Layout::of(&[0, 1, 2], 2, spread), Err(LayoutError::Ragged { len: 3, top_k: 2 }));
}

/// Whatever two ranks may disagree about has a name in the handshake, and both values.
#[test]
fn what_ranks_disagree_about_is_named_in_words() {
    let (ours, options) = (config(), GroupOptions::default());
    let says = |theirs: &GroupConfig, their_options: &GroupOptions| -> Vec<String> {
        let theirs = theirs.fingerprint(their_options);
        ours.fingerprint(&options).differences(&theirs).iter().map(ToString::to_string).collect()
    };
    assert!(says(&ours, &options).is_empty());
    let mut limits = ours.clone();
    limits.max_tokens[3] = 64;
    let other = [
        (GroupConfig { experts: 288, ..ours.clone() }, "experts.experts 256 here, 288 there"),
        (GroupConfig { top_k: 6, ..ours.clone() }, "experts.top_k 8 here, 6 there"),
        (GroupConfig { hidden: 4096, ..ours.clone() }, "experts.hidden 7168 here, 4096 there"),
        (
            GroupConfig { payload: Payload::Bf16, ..ours.clone() },
            "experts.payload fp8_e4m3 with f32 scales here, bf16 there",
        ),
        (GroupConfig { slots: 1, ..ours.clone() }, "experts.slots 2 here, 1 there"),
        (GroupConfig { placement_version: 4, ..ours.clone() }, "experts.placement_version 3 here, 4 there"),
        (
            limits,
            "experts.max_tokens 128,128,128,128,128,128,128,128 here, 128,128,128,64,128,128,128,128 there",
        ),
    ];
    for (theirs, words) in other {
        assert_eq!(says(&theirs, &options), [words]);
    }
    let ranks = GroupConfig { max_tokens: vec![128; 7], ..ours.clone() };
    assert!(says(&ranks, &options).contains(&"experts.ranks 8 here, 7 there".to_owned()));
    let verified = GroupOptions { verify: true, ..options.clone() };
    assert_eq!(says(&ours, &verified), ["experts.verify false here, true there"]);
    // How a rank waits is its own affair.
    let patient = GroupOptions { deadline: std::time::Duration::from_secs(99), ..options.clone() };
    assert!(says(&ours, &patient).is_empty());
}
