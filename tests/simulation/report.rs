//! Which faults have met which ends.

use std::collections::BTreeMap;
use std::fmt;

use crate::faults::{Fault, Trouble};
use crate::node::Part;
use crate::room::{EndKind, Room};

/// How often a fault troubled a side of a room while it was open, or the one it was open with, by how that side ended.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Meetings {
    counts: BTreeMap<(Option<Fault>, EndKind), u64>,
}

impl Meetings {
    pub fn of(troubles: &[Trouble], rooms: &[Room]) -> Self {
        let mut meetings = Self::default();
        for room in rooms {
            let nodes = [room.plan.decode, room.plan.prefill];
            for part in [Part::Decode, Part::Prefill] {
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
                if met.is_empty() {
                    *meetings.counts.entry((None, kind)).or_default() += 1;
                }
                for fault in met {
                    *meetings.counts.entry((Some(fault), kind)).or_default() += 1;
                }
            }
        }
        meetings
    }

    pub fn add(&mut self, other: &Self) {
        for (key, count) in &other.counts {
            *self.counts.entry(*key).or_default() += count;
        }
    }

    pub fn count(&self, fault: Option<Fault>, kind: EndKind) -> u64 {
        self.counts.get(&(fault, kind)).copied().unwrap_or(0)
    }
}

impl fmt::Display for Meetings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:<12}", "")?;
        for kind in EndKind::ALL {
            write!(f, "{:>16}", format!("{kind:?}"))?;
        }
        for fault in [None].into_iter().chain(Fault::ALL.map(Some)) {
            let name = fault.map_or("no fault".into(), |fault| format!("{fault:?}"));
            write!(f, "\n{name:<12}")?;
            for kind in EndKind::ALL {
                write!(f, "{:>16}", self.count(fault, kind))?;
            }
        }
        Ok(())
    }
}
