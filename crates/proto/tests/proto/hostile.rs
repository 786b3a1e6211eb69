//! A peer that says whatever it likes: the node never panics, ends its rooms once each, and comes to rest.

use crossdock_proto::{End, Message};
use proptest::prelude::*;
use proptest::sample::{Index, select};

use crate::corpus::{corpus, mutated, said};
use crate::world::{Chance, Hostile, Moment};

#[test]
fn any_message_at_any_moment() {
    for moment in Moment::ALL {
        for message in corpus() {
            for number in 1..=7 {
                let mut hostile = Hostile::at(moment);
                let frame = said(&message, hostile.peer, number);
                hostile.say(&frame);
                hostile.finish();
            }
        }
    }
}

#[test]
fn silence_at_any_moment() {
    for moment in Moment::ALL {
        let hostile = Hostile::at(moment);
        let rooms = hostile.world.nodes[crate::world::D].rooms.len();
        assert_eq!(rooms > 0, matches!(moment, Moment::Busy | Moment::Landed));
        hostile.finish();
    }
}

/// A sender that was told that all is there believes it; nothing else is delivered by words alone.
#[test]
fn what_words_alone_can_deliver() {
    for message in corpus() {
        let mut hostile = Hostile::at(Moment::Busy);
        for number in 1..=7 {
            let frame = said(&message, hostile.peer, number);
            hostile.say(&frame);
        }
        hostile.world.settle();
        let seen = hostile.world.nodes[crate::world::D].rooms.values();
        let delivered = seen.filter(|seen| seen.ends == [End::Delivered]).count();
        let by_release = matches!(message, Message::Release { delivered: true, .. });
        assert!(delivered <= usize::from(by_release), "{delivered} by {message:?}");
        hostile.finish();
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_500, failure_persistence: None, ..Default::default() })]

    #[test]
    fn any_sequence_at_any_moment(
        moment in select(Moment::ALL.to_vec()),
        words in prop::collection::vec((any::<Index>(), 1u64..8, prop::option::weighted(0.3, any::<u64>())), 1..12),
    ) {
        let mut hostile = Hostile::at(moment);
        let corpus = corpus();
        for (word, number, mutation) in words {
            let frame = said(word.get(&corpus), hostile.peer, number);
            let frame = match mutation {
                Some(seed) => mutated(&[frame], &mut Chance::new(seed)),
                None => frame,
            };
            hostile.say(&frame);
        }
        hostile.finish();
    }
}
