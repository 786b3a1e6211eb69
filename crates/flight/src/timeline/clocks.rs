//! Brings the clocks of nodes together: nothing can come before it was sent.

use std::collections::{BTreeMap, VecDeque};

use serde::Serialize;

use super::lives::Life;
use crate::event::{Event, Kind};

/// How far apart the wall clocks of two nodes can be, by the messages between them.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ClockPair {
    /// One, as a place in [`Timeline::sources`](super::Timeline::sources).
    pub a: usize,
    /// The other.
    pub b: usize,
    /// Messages whose sending and coming were both recorded.
    pub messages: usize,
    /// The clock of `b` was ahead of `a`'s by no less than this…
    pub least_ns: Option<i64>,
    /// … and by no more than this.
    pub most_ns: Option<i64>,
    /// The nearest to 0 that both allow, or their middle if 0 is ruled out.
    pub ahead_ns: i64,
}

impl ClockPair {
    /// Whether there is an offset at which nothing came before it was sent.
    pub fn is_possible(&self) -> bool {
        !matches!((self.least_ns, self.most_ns), (Some(least), Some(most)) if least > most)
    }
}

/// What was sent, and came: places in the list of lives, and serials.
pub(super) struct Links {
    /// What came, by what was sent.
    causes: BTreeMap<(usize, u64), (usize, u64)>,
}

impl Links {
    pub fn find(lives: &[Life]) -> Self {
        // Who sent it and to whom, what, and the how-manieth of its kind. Rooms and grants have the same names in every
        // life of a node: so it is known of a message between which two lives it went, or it is left out.
        type Key = (usize, usize, Message, u32);
        let places: BTreeMap<(&str, &str), usize> = lives
            .iter()
            .map(|life| (life.source.node.as_str(), life.source.incarnation.as_str()))
            .zip(0..)
            .collect();
        let mut sent: BTreeMap<Key, (usize, u64)> = BTreeMap::new();
        let mut came: Vec<(Key, (usize, u64))> = Vec::new();
        for (here, life) in lives.iter().enumerate() {
            let mut counts: BTreeMap<(bool, usize, Message), u32> = BTreeMap::new();
            for (&serial, kept) in &life.events {
                let Some((is_sent, message)) = Message::of(&kept.event) else { continue };
                let there = || {
                    places.get(&(kept.peer.as_ref()?.node.as_str(), life.peer_life(&kept.event)?.as_ref()))
                };
                let Some(&there) = there() else { continue };
                let count = counts.entry((is_sent, there, message.clone())).or_default();
                *count += 1;
                match is_sent {
                    true => drop(sent.insert((here, there, message, *count), (here, serial))),
                    false => came.push(((there, here, message, *count), (here, serial))),
                }
            }
        }
        let causes = came.into_iter().filter_map(|(key, effect)| Some((effect, *sent.get(&key)?))).collect();
        Self { causes }
    }

    /// What an event is the coming of.
    pub fn cause_of(&self, source: usize, serial: u64) -> Option<(usize, u64)> {
        self.causes.get(&(source, serial)).copied()
    }
}

/// What makes a message the same at both ends.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Message {
    kind: &'static str,
    room: Option<(u64, u32, u32)>,
    attempt: Option<u32>,
    grant: Option<String>,
}

impl Message {
    /// And whether it is the sending of it.
    fn of(event: &Event) -> Option<(bool, Self)> {
        let room = event.room.map(|room| (room, event.use_count.unwrap_or(0), event.share.unwrap_or(0)));
        let (is_sent, kind) = match event.kind {
            Kind::WantSent => (true, "want"),
            Kind::WantCame => (false, "want"),
            Kind::GrantSent => (true, "grant"),
            Kind::GrantCame => (false, "grant"),
            Kind::FinishSent => (true, "finish"),
            Kind::FinishCame => (false, "finish"),
            Kind::DeliveredSent => (true, "delivered"),
            Kind::DeliveredCame => (false, "delivered"),
            Kind::CancelSent | Kind::TurnedAway => (true, "cancel"),
            Kind::CancelCame => (false, "cancel"),
            Kind::ReleaseSent => (true, "release"),
            Kind::ReleaseCame => (false, "release"),
            _ => return None,
        };
        let is_release = kind == "release";
        let message = Self {
            kind,
            // The one who gives a grant back names no room.
            room: room.filter(|_| !is_release),
            attempt: event.attempt.filter(|_| kind == "finish"),
            grant: event.grant.clone().filter(|_| is_release || kind == "grant"),
        };
        Some((is_sent, message))
    }
}

/// What each pair of nodes says of their clocks, and what is to be added to each.
pub(super) fn agree(lives: &[Life], links: &Links) -> (Vec<ClockPair>, Vec<i64>) {
    let mut pairs: BTreeMap<(usize, usize), ClockPair> = BTreeMap::new();
    for (&(to, came), &(from, sent)) in &links.causes {
        if from == to {
            continue;
        }
        // The true time between the two is not negative: `to` is ahead of `from` by no more than what is left.
        let most_ns = lives[to].latest_ns(came).saturating_sub(lives[from].earliest_ns(sent));
        let (a, b) = (from.min(to), from.max(to));
        let pair = pairs.entry((a, b)).or_insert(ClockPair {
            a,
            b,
            messages: 0,
            least_ns: None,
            most_ns: None,
            ahead_ns: 0,
        });
        pair.messages += 1;
        match from == a {
            true => pair.most_ns = Some(pair.most_ns.map_or(most_ns, |most| most.min(most_ns))),
            false => {
                let least_ns = most_ns.saturating_neg();
                pair.least_ns = Some(pair.least_ns.map_or(least_ns, |least| least.max(least_ns)));
            }
        }
    }
    let mut pairs: Vec<ClockPair> = pairs.into_values().collect();
    pairs.iter_mut().for_each(|pair| pair.ahead_ns = likely(pair.least_ns, pair.most_ns));
    let corrections = corrections(lives.len(), &pairs);
    (pairs, corrections)
}

/// Wall clocks are believed where they can be.
fn likely(least_ns: Option<i64>, most_ns: Option<i64>) -> i64 {
    match (least_ns, most_ns) {
        (Some(least), Some(most)) if least > 0 || most < 0 => {
            ((i128::from(least) + i128::from(most)) / 2) as i64
        }
        (Some(least), None) => least.max(0),
        (None, Some(most)) => most.min(0),
        _ => 0,
    }
}

/// From the node that has the most messages with others along the pairs to all that it reaches; then pairs that close
/// a circle are satisfied, where that is possible.
fn corrections(nodes: usize, pairs: &[ClockPair]) -> Vec<i64> {
    let mut added: Vec<Option<i64>> = vec![None; nodes];
    let messages = |node: usize| -> usize {
        pairs.iter().filter(|pair| pair.a == node || pair.b == node).map(|pair| pair.messages).sum()
    };
    let mut order: Vec<usize> = (0..nodes).collect();
    order.sort_by_key(|&node| std::cmp::Reverse(messages(node)));
    for first in order {
        if added[first].is_some() {
            continue;
        }
        added[first] = Some(0);
        let mut reached = VecDeque::from([first]);
        while let Some(node) = reached.pop_front() {
            let here = added[node].unwrap_or(0);
            for pair in pairs {
                let (other, correction) = match node {
                    node if node == pair.a => (pair.b, here.saturating_sub(pair.ahead_ns)),
                    node if node == pair.b => (pair.a, here.saturating_add(pair.ahead_ns)),
                    _ => continue,
                };
                if added[other].is_none() {
                    added[other] = Some(correction);
                    reached.push_back(other);
                }
            }
        }
    }
    let mut added: Vec<i64> = added.into_iter().map(|correction| correction.unwrap_or(0)).collect();
    for _ in 0..nodes {
        for pair in pairs.iter().filter(|pair| pair.is_possible()) {
            // How far `b` is ahead of what `a` says, after what was added to both.
            let added_ns = added[pair.a].saturating_sub(added[pair.b]);
            if let Some(least) = pair.least_ns
                && added_ns < least
            {
                added[pair.a] = added[pair.a].saturating_add(least.saturating_sub(added_ns));
            } else if let Some(most) = pair.most_ns
                && added_ns > most
            {
                added[pair.b] = added[pair.b].saturating_add(added_ns.saturating_sub(most));
            }
        }
    }
    added
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn wall_clocks_are_believed_where_they_can_be() {
        assert_eq!(likely(None, None), 0);
        assert_eq!(likely(Some(-5), Some(3)), 0);
        assert_eq!(likely(Some(4), Some(10)), 7);
        assert_eq!(likely(Some(-10), Some(-4)), -7);
        assert_eq!((likely(Some(4), None), likely(Some(-4), None)), (4, 0));
        assert_eq!((likely(None, Some(-4)), likely(None, Some(4))), (-4, 0));
        assert_eq!(likely(Some(i64::MAX), Some(i64::MAX)), i64::MAX);
    }

    #[test]
    fn a_circle_of_nodes_is_satisfied() {
        let pair = |a, b, ahead_ns: i64, width_ns: i64| ClockPair {
            a,
            b,
            messages: 1,
            least_ns: Some(ahead_ns - width_ns),
            most_ns: Some(ahead_ns + width_ns),
            ahead_ns,
        };
        // 1 is 100 ahead of 0, 2 is 300 ahead of 0; the middle of the third pair is wrong, within its bounds.
        let pairs = [pair(0, 1, 100, 2), pair(0, 2, 300, 40), pair(1, 2, 230, 31)];
        let added = corrections(3, &pairs);
        for pair in &pairs {
            let ahead = added[pair.a] - added[pair.b];
            assert!((pair.least_ns.unwrap()..=pair.most_ns.unwrap()).contains(&ahead), "{pair:?} {added:?}");
        }
    }
}
