//! Which events that name a room are of one request.
//!
//! The number of a room alone does not say it: two routers may use the same ones, or one that was started again. Two lives
//! had to do with one request if one of them names the other, or both the same third one.

use std::collections::{BTreeMap, BTreeSet};

use super::{Entry, Source};

/// A life, of which there may be no dump.
pub(super) type Party<'a> = (&'a str, Option<&'a str>);

/// Who has ever named whom, in whatever room.
pub(super) struct Acquaintances {
    pairs: BTreeSet<(usize, usize)>,
}

impl Acquaintances {
    pub fn of(sources: &[Source], entries: &[Entry]) -> Self {
        let mut lives: BTreeMap<&str, Vec<usize>> = BTreeMap::new();
        for (at, source) in sources.iter().enumerate() {
            lives.entry(source.node.as_str()).or_default().push(at);
        }
        let mut pairs = BTreeSet::new();
        let named: BTreeSet<(usize, Party<'_>)> =
            entries.iter().filter_map(|entry| Some((entry.source, entry.party()?))).collect();
        for (source, (node, life)) in named {
            for &other in lives.get(node).into_iter().flatten() {
                if life.is_none_or(|life| life == sources[other].incarnation) {
                    pairs.extend([(source, other), (other, source)]);
                }
            }
        }
        Self { pairs }
    }
}

/// Events that name a room, as those of one request each, in the order of their first ones.
pub(super) fn split(
    entries: Vec<usize>,
    all: &[Entry],
    sources: &[Source],
    known: &Acquaintances,
) -> Vec<Vec<usize>> {
    let sides: BTreeSet<usize> = entries.iter().map(|&at| all[at].source).collect();
    if sides.len() < 2 {
        return vec![entries];
    }
    let party = |side: usize| -> Party<'_> {
        let source = &sources[side];
        (&source.node, Some(&source.incarnation))
    };
    let named: BTreeSet<(usize, Party<'_>)> =
        entries.iter().filter_map(|&at| Some((all[at].source, all[at].party()?))).collect();
    let parties: BTreeSet<Party<'_>> =
        sides.iter().map(|&side| party(side)).chain(named.iter().map(|&(_, party)| party)).collect();
    let places: BTreeMap<Party<'_>, usize> = parties.into_iter().zip(0..).collect();
    let mut groups = Groups::new(places.len());
    for (side, (node, life)) in named {
        let here = places[&party(side)];
        match life {
            Some(_) => groups.join(here, places[&(node, life)]),
            // One of the node's lives, and it is not known which.
            None => {
                let lives = places.range((node, None)..).take_while(|((other, _), _)| *other == node);
                lives.for_each(|(_, &there)| groups.join(here, there));
            }
        }
    }
    // A side that has opened the room, and never met its peer, names nobody: who it knows may say where it belongs.
    for &side in &sides {
        let here = places[&party(side)];
        if !groups.is_alone(here) {
            continue;
        }
        let acquainted = sides.iter().filter(|&&other| known.pairs.contains(&(side, other)));
        let others: BTreeSet<usize> = acquainted
            .map(|&other| groups.first(places[&party(other)]))
            .filter(|&other| other != here)
            .collect();
        if let (Some(&other), 1) = (others.first(), others.len()) {
            groups.join(here, other);
        }
    }
    let mut stories: Vec<Vec<usize>> = Vec::new();
    let mut found: BTreeMap<usize, usize> = BTreeMap::new();
    for at in entries {
        let group = groups.first(places[&party(all[at].source)]);
        let story = *found.entry(group).or_insert_with(|| {
            stories.push(Vec::new());
            stories.len() - 1
        });
        stories[story].push(at);
    }
    stories
}

/// Who belongs together.
struct Groups {
    /// By party: itself, or another one of its group.
    towards: Vec<usize>,
    sizes: Vec<usize>,
}

impl Groups {
    fn new(parties: usize) -> Self {
        Self { towards: (0..parties).collect(), sizes: vec![1; parties] }
    }

    /// The same one for all of a group.
    fn first(&mut self, mut party: usize) -> usize {
        while self.towards[party] != party {
            self.towards[party] = self.towards[self.towards[party]];
            party = self.towards[party];
        }
        party
    }

    fn join(&mut self, a: usize, b: usize) {
        let (a, b) = (self.first(a), self.first(b));
        if a == b {
            return;
        }
        let (less, more) = if self.sizes[a] < self.sizes[b] { (a, b) } else { (b, a) };
        self.towards[less] = more;
        self.sizes[more] += self.sizes[less];
    }

    fn is_alone(&mut self, party: usize) -> bool {
        let first = self.first(party);
        self.sizes[first] == 1
    }
}
