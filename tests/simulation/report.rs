//! Which faults have met which ends.

use std::collections::BTreeMap;
use std::fmt;

use crate::faults::{Fault, Trouble};
use crate::room::{EndKind, Part, Room};

/// How often a fault troubled a side of a room while it was open, or one that it was open with, by how that side ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meetings {
    counts: BTreeMap<(Option<Fault>, EndKind), u64>,
    /// Those of rooms of several ranks among them.
    of_ranks: BTreeMap<(Option<Fault>, EndKind), u64>,
    /// How often a prefill side that ended so met a decode side that ended so.
    pairs: BTreeMap<(EndKind, EndKind), u64>,
}

impl Meetings {
    pub fn of(troubles: &[Trouble], rooms: &[Room]) -> Self {
        let mut meetings = Self::default();
        for room in rooms {
            for (decode, seat) in room.plan.decodes.iter().enumerate() {
                for &prefill in &seat.peers {
                    let ends = (room.end(Part::Prefill(prefill)), room.end(Part::Decode(decode)));
                    // The sides of another try may have met those of the first.
                    if let ((Some(prefill), Some(decode)), None) = (ends, room.plan.again) {
                        *meetings.pairs.entry((EndKind::of(prefill), EndKind::of(decode))).or_default() += 1;
                    }
                }
            }
            for part in room.plan.parts() {
                let nodes: Vec<usize> = [part]
                    .into_iter()
                    .chain(room.plan.peers(part))
                    .map(|part| room.plan.node(part))
                    .collect();
                let Some(side) = room.side(part) else { continue };
                let Some((told_ns, end)) = &side.told else { continue };
                let kind = EndKind::of(end);
                let mut met: Vec<Fault> = troubles
                    .iter()
                    .filter(|trouble| trouble.from_ns <= *told_ns && trouble.until_ns >= side.opened_ns)
                    .filter(|trouble| match trouble.nodes.as_slice() {
                        [one] => nodes.contains(one),
                        both => both.iter().all(|node| nodes.contains(node)),
                    })
                    .map(|trouble| trouble.fault)
                    .collect();
                met.sort_unstable();
                met.dedup();
                let met = met.into_iter().map(Some);
                let met: Vec<Option<Fault>> = if met.len() == 0 { vec![None] } else { met.collect() };
                for fault in met {
                    *meetings.counts.entry((fault, kind)).or_default() += 1;
                    if room.plan.parts().count() > 2 {
                        *meetings.of_ranks.entry((fault, kind)).or_default() += 1;
                    }
                }
            }
        }
        meetings
    }

    pub fn add(&mut self, other: &Self) {
        for (key, count) in &other.counts {
            *self.counts.entry(*key).or_default() += count;
        }
        for (key, count) in &other.of_ranks {
            *self.of_ranks.entry(*key).or_default() += count;
        }
        for (key, count) in &other.pairs {
            *self.pairs.entry(*key).or_default() += count;
        }
    }

    pub fn count(&self, fault: Option<Fault>, kind: EndKind) -> u64 {
        self.counts.get(&(fault, kind)).copied().unwrap_or(0)
    }

    /// Of rooms of several ranks alone.
    pub fn count_of_ranks(&self, fault: Option<Fault>, kind: EndKind) -> u64 {
        self.of_ranks.get(&(fault, kind)).copied().unwrap_or(0)
    }
}

/// The rooms that fair weather could deliver.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Fair {
    pub delivered: u64,
    /// A limit was reached.
    pub refused: u64,
}

impl Fair {
    pub fn add(&mut self, other: &Self) {
        self.delivered += other.delivered;
        self.refused += other.refused;
    }
}

impl fmt::Display for Fair {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (delivered, refused) = (self.delivered, self.refused);
        write!(
            f,
            "rooms in fair weather: {delivered} delivered, {refused} refused at a limit, none lost otherwise"
        )
    }
}

impl fmt::Display for Meetings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        faults(f, "fault \\ end", |fault, kind| self.count(fault, kind))
    }
}

/// The same of rooms of several ranks alone.
pub struct OfRanks<'a>(pub &'a Meetings);

impl fmt::Display for OfRanks<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        faults(f, "several ranks", |fault, kind| self.0.count_of_ranks(fault, kind))
    }
}

/// How often the two sides of a room ended how.
pub struct Pairs<'a>(pub &'a Meetings);

impl fmt::Display for Pairs<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        heading(f, "prefill \\ decode")?;
        for prefill in EndKind::ALL {
            row(f, &format!("{prefill:?}"), |decode| {
                self.0.pairs.get(&(prefill, decode)).copied().unwrap_or(0)
            })?;
        }
        Ok(())
    }
}

fn faults(
    f: &mut fmt::Formatter<'_>,
    corner: &str,
    count: impl Fn(Option<Fault>, EndKind) -> u64,
) -> fmt::Result {
    heading(f, corner)?;
    for fault in [None].into_iter().chain(Fault::ALL.map(Some)) {
        let name = fault.map_or("none".into(), |fault| format!("{fault:?}"));
        row(f, &name, |kind| count(fault, kind))?;
    }
    Ok(())
}

fn heading(f: &mut fmt::Formatter<'_>, corner: &str) -> fmt::Result {
    write!(f, "{corner:<16}")?;
    EndKind::ALL.iter().try_for_each(|kind| cell(f, *kind, &format!("{kind:?}")))
}

fn row(f: &mut fmt::Formatter<'_>, name: &str, count: impl Fn(EndKind) -> u64) -> fmt::Result {
    write!(f, "\n{name:<16}")?;
    EndKind::ALL.iter().try_for_each(|kind| cell(f, *kind, &count(*kind).to_string()))
}

/// In a column as wide as its heading.
fn cell(f: &mut fmt::Formatter<'_>, kind: EndKind, text: &str) -> fmt::Result {
    let width = format!("{kind:?}").len().max(7) + 1;
    write!(f, "{text:>width$}")
}
