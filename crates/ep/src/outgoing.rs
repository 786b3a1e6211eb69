//! What the slots of a rank ask of the thread that keeps in touch: to carry calls to ranks whose memory is not mapped here.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

use crossbeam_queue::ArrayQueue;
use crossdock_engine::Doorbell;

/// Between the slots and the thread. A slot has at most a dispatch and its combine under way to a rank: before the next
/// dispatch it waits until both have left. So the queue has room for all.
#[derive(Debug)]
pub(crate) struct Outgoing {
    calls: ArrayQueue<OutgoingCall>,
    slots: u32,
    ranks: Box<[ToRank]>,
    doorbell: Doorbell,
}

/// One rank that a port reaches.
#[derive(Debug, Default)]
struct ToRank {
    /// By slot: calls that have not left.
    under_way: Box<[AtomicU32]>,
    /// By slot: a bit that says that this rank waits there, and is alive.
    waiting: AtomicU64,
    /// By slot: how often the other has said that.
    pulses: Box<[AtomicU32]>,
    /// This rank has masked the other.
    severed: AtomicBool,
    /// Nothing that the other writes can land here any more.
    quiet: AtomicBool,
}

/// One call to one rank: what its port writes there, in this order, and then the call's number.
#[derive(Debug)]
pub(crate) struct OutgoingCall {
    pub rank: u32,
    pub slot: u32,
    pub call: u32,
    /// Rows of the staging, written one behind the other.
    pub rows: Option<OutgoingRows>,
    pub spans: Vec<Span>,
}

/// Rows that lie anywhere in this rank's staging.
#[derive(Debug)]
pub(crate) struct OutgoingRows {
    /// Which ones, by token.
    pub tokens: Vec<u32>,
    /// Where token 0 is.
    pub local: usize,
    pub remote: usize,
    pub stride: usize,
    pub bytes: usize,
}

/// From a place in this rank's region to one in the other's.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub local: usize,
    pub remote: usize,
    pub bytes: usize,
}

impl Outgoing {
    pub fn new(ranks: u32, slots: u32, doorbell: Doorbell) -> Outgoing {
        let words = || (0..slots).map(|_| AtomicU32::new(0)).collect();
        let rank = |_| ToRank { under_way: words(), pulses: words(), ..ToRank::default() };
        let most = (2 * ranks as usize * slots as usize).max(1);
        Outgoing { calls: ArrayQueue::new(most), slots, ranks: (0..ranks).map(rank).collect(), doorbell }
    }

    fn of(&self, rank: u32) -> &ToRank {
        &self.ranks[rank as usize]
    }

    /// For the slots: hands a call over. No more than one of the slot's to this rank has not left yet.
    pub fn send(&self, call: OutgoingCall) {
        self.of(call.rank).under_way[call.slot as usize].fetch_add(1, Ordering::AcqRel);
        let handed = self.calls.push(call);
        assert!(handed.is_ok(), "a slot has two calls under way to each rank");
        self.doorbell.ring();
    }

    /// Whether a slot's calls to a rank have left, so that what it wrote from may be written again.
    pub fn has_left(&self, rank: u32, slot: u32) -> bool {
        self.of(rank).under_way[slot as usize].load(Ordering::Acquire) == 0
    }

    /// Says to the ranks that ports reach that this one waits in a slot, and is alive.
    pub fn pulse(&self, slot: u32) {
        for rank in &self.ranks {
            rank.waiting.fetch_or(1 << slot, Ordering::Release);
        }
        self.doorbell.ring();
    }

    /// How often a rank has said that.
    pub fn pulses_of(&self, rank: u32, slot: u32) -> u32 {
        self.of(rank).pulses[slot as usize].load(Ordering::Relaxed)
    }

    /// A rank is masked: its session is to be ended.
    pub fn sever(&self, rank: u32) {
        self.of(rank).severed.store(true, Ordering::Release);
        self.doorbell.ring();
    }

    /// Whether nothing that a masked rank writes can land here any more.
    pub fn is_quiet(&self, rank: u32) -> bool {
        self.of(rank).quiet.load(Ordering::Acquire)
    }

    /// Wakes the thread.
    pub fn ring(&self) {
        self.doorbell.ring();
    }

    /// For the thread: what it sleeps on.
    pub fn doorbell(&self) -> &Doorbell {
        &self.doorbell
    }

    pub fn next_call(&self) -> Option<OutgoingCall> {
        self.calls.pop()
    }

    pub fn is_idle(&self) -> bool {
        let asks_nothing = |rank: &ToRank| {
            rank.waiting.load(Ordering::Acquire) == 0 && !rank.severed.load(Ordering::Acquire)
        };
        self.calls.is_empty() && self.ranks.iter().all(asks_nothing)
    }

    /// A call has left.
    pub fn left(&self, rank: u32, slot: u32) {
        self.of(rank).under_way[slot as usize].fetch_sub(1, Ordering::AcqRel);
    }

    /// The slots in which this rank waits, since the last time that this was asked.
    pub fn take_waiting(&self, rank: u32) -> impl Iterator<Item = u32> + use<> {
        let bits = self.of(rank).waiting.swap(0, Ordering::AcqRel);
        (0..self.slots).filter(move |slot| bits >> slot & 1 != 0)
    }

    /// The other waits in a slot, and is alive.
    pub fn heard_pulse(&self, rank: u32, slot: u32) {
        if let Some(pulses) = self.of(rank).pulses.get(slot as usize) {
            pulses.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Whether this rank has masked the other, since the last time that this was asked.
    pub fn take_severed(&self, rank: u32) -> bool {
        self.of(rank).severed.swap(false, Ordering::AcqRel)
    }

    /// Whether nothing that the rank writes can land any more: so when its last session is over, and not when another begins.
    pub fn set_quiet(&self, rank: u32, is_quiet: bool) {
        self.of(rank).quiet.store(is_quiet, Ordering::Release);
    }
}
