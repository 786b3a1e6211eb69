//! Why pages are in quarantine, and since when.

use std::sync::Arc;

/// Why a peer can still write pages whose room has ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct QuarantineReason {
    /// Who can write them.
    pub peer: Arc<str>,
    /// What would end that.
    pub until: Until,
}

/// What has to happen before pages can leave quarantine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Until {
    /// Every lane of the peer that can reach the pages is down here.
    LanesDown,
    /// The peer says that it writes no more, or it is proven dead.
    ReleaseOrDeath,
}

/// Pages that wait for one peer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct QuarantineEntry {
    /// Who can still write them.
    pub peer: Arc<str>,
    /// What would end that.
    pub until: Until,
    /// How many pages wait.
    pub pages: u32,
    /// Since when, on the caller's clock.
    pub since_ns: u64,
    /// For how long, at the time of the question.
    pub age_ns: u64,
    /// Whether what held the pages was dropped, so that they stay for ever.
    pub abandoned: bool,
}

/// The entries of a pool, by number. Numbers are used again, so there are never more than pages.
#[derive(Default)]
pub(super) struct Entries {
    slots: Vec<Option<Entry>>,
    vacant: Vec<u32>,
}

pub(super) struct Entry {
    pub(super) reason: QuarantineReason,
    pub(super) since_ns: u64,
    pages: u32,
    abandoned: bool,
}

impl Entries {
    pub(super) fn open(&mut self, reason: QuarantineReason, pages: u32, since_ns: u64) -> u32 {
        let entry = Some(Entry { reason, since_ns, pages, abandoned: false });
        match self.vacant.pop() {
            Some(number) => {
                self.slots[number as usize] = entry;
                number
            }
            None => {
                self.slots.push(entry);
                (self.slots.len() - 1) as u32
            }
        }
    }

    pub(super) fn at(&self, number: u32) -> &Entry {
        self.slots[number as usize].as_ref().expect(OPEN)
    }

    pub(super) fn replace_reason(&mut self, number: u32, reason: QuarantineReason) {
        self.slots[number as usize].as_mut().expect(OPEN).reason = reason;
    }

    pub(super) fn abandon(&mut self, number: u32) {
        self.slots[number as usize].as_mut().expect(OPEN).abandoned = true;
    }

    pub(super) fn close(&mut self, number: u32) {
        self.slots[number as usize].take().expect(OPEN);
        self.vacant.push(number);
    }

    pub(super) fn list(&self, now_ns: u64) -> Vec<QuarantineEntry> {
        let mut list: Vec<QuarantineEntry> =
            self.slots.iter().flatten().map(|entry| entry.shown(now_ns)).collect();
        list.sort_by_key(|entry| entry.since_ns);
        list
    }
}

impl Entry {
    fn shown(&self, now_ns: u64) -> QuarantineEntry {
        QuarantineEntry {
            peer: self.reason.peer.clone(),
            until: self.reason.until,
            pages: self.pages,
            since_ns: self.since_ns,
            age_ns: now_ns.saturating_sub(self.since_ns),
            abandoned: self.abandoned,
        }
    }
}

const OPEN: &str = "whoever holds an entry's number keeps it open";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_used_again() {
        let reason = || QuarantineReason { peer: "peer".into(), until: Until::LanesDown };
        let mut entries = Entries::default();
        let kept = entries.open(reason(), 1, 0);
        for since_ns in 1..100 {
            let number = entries.open(reason(), 1, since_ns);
            assert_eq!((entries.at(kept).since_ns, entries.at(number).since_ns), (0, since_ns));
            entries.close(number);
        }
        assert_eq!(entries.slots.len(), 2);
    }
}
