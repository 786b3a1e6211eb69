//! A rank's place in a group: its memory, the others' memory, and who is masked.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use crossdock_memory::copy::{Copier, Strategy};
use crossdock_memory::{AllocateOptions, Memory};

use crate::arena::{Arena, RegionLayout, rows_per_expert};
use crate::arrivals::Patience;
use crate::error::GroupError;
use crate::meet::Link;
use crate::slot::Slot;
use crate::words::{self, RankMemory};
use crate::{Experts, GroupConfig, Quantiser, Summer};

/// How a rank waits, and what it does about those that do not come.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupOptions {
    /// How long a wait for another rank lasts before that rank is masked.
    pub deadline: Duration,
    /// How long the waits of a slot's first step last: others may still compile their kernels.
    pub warm_up: Duration,
    /// How long a wait spins before it sleeps. `None` chooses by ranks of this host and processors.
    pub patience: Option<Patience>,
    /// What becomes of a token some of whose experts are on masked ranks.
    pub lost: LostWeight,
    /// Whether rows carry checksums that their receivers check. The same on all ranks.
    pub verify: bool,
}

impl Default for GroupOptions {
    fn default() -> GroupOptions {
        GroupOptions {
            deadline: Duration::from_secs(10),
            warm_up: Duration::from_secs(120),
            patience: None,
            lost: LostWeight::Drop,
            verify: false,
        }
    }
}

/// What becomes of a token some of whose experts are on masked ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostWeight {
    /// The sum lacks what they would have added.
    Drop,
    /// The weights of the others are raised, so that they add up to what all of the token's weights did. Only where a
    /// combine has weights.
    Renormalise,
    /// The call fails, after it is over for the other ranks too.
    Fail,
}

/// One rank's end of a group.
///
/// All ranks make the same calls in the same order in each slot; calls of different slots do not depend on each other,
/// and each slot may be used by a thread of its own. When a group is dropped, the other ranks are told, and wait for this
/// one no longer.
#[derive(Debug)]
pub struct Group {
    shared: Arc<Shared>,
    slots: Vec<Slot>,
    /// What keeps in touch with the other ranks' processes. Dropped last.
    pub(crate) link: Option<Link>,
}

/// A rank's last word to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Farewell {
    /// The other is masked: its arenas here are not read any more.
    Masked = 1,
    /// This rank makes no further call.
    Left = 2,
}

/// What the slots of a rank share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub config: GroupConfig,
    pub options: GroupOptions,
    pub spread: Experts,
    pub rank: u32,
    pub rows_per_expert: usize,
    pub patience: Patience,
    pub quantiser: Quantiser,
    pub summer: Summer,
    copier: Copier,
    memories: Vec<RankMemory>,
    regions: Vec<RegionLayout>,
    mask: Box<[AtomicU32]>,
    gone: Box<[AtomicBool]>,
}

impl Group {
    /// What memory a rank has to give to the others: so many bytes of shared memory, zeroed.
    pub fn region_bytes(config: &GroupConfig, rank: u32) -> Result<usize, GroupError> {
        check_rank(config, rank)?;
        Ok(RegionLayout::new(config, rank).bytes)
    }

    /// Allocates a rank's region.
    pub fn allocate_region(config: &GroupConfig, rank: u32) -> Result<Memory, GroupError> {
        let bytes = Group::region_bytes(config, rank)?;
        let options = AllocateOptions {
            name: Cow::Owned(format!("crossdock-ep-{rank}")),
            ..AllocateOptions::default()
        };
        Memory::allocate(bytes.max(1), &options).map_err(|error| GroupError::Memory { rank, error })
    }

    /// One rank of a group, all regions of which this process has mapped, by rank.
    pub fn over(
        config: &GroupConfig,
        rank: u32,
        memories: Vec<Memory>,
        options: &GroupOptions,
    ) -> Result<Group, GroupError> {
        Group::over_mapped(config, rank, memories.into_iter().map(RankMemory::from).collect(), options)
    }

    pub(crate) fn over_mapped(
        config: &GroupConfig,
        rank: u32,
        memories: Vec<RankMemory>,
        options: &GroupOptions,
    ) -> Result<Group, GroupError> {
        check_rank(config, rank)?;
        let ranks = config.ranks();
        let regions: Vec<RegionLayout> = (0..ranks).map(|rank| RegionLayout::new(config, rank)).collect();
        for (rank, region) in (0..ranks).zip(&regions) {
            let bytes = memories.get(rank as usize).map_or(0, |of_rank| of_rank.memory().bytes());
            if bytes < region.bytes {
                return Err(GroupError::WrongRegion { rank, bytes, needed: region.bytes });
            }
        }
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
        let crowded = ranks as usize > processors;
        let chosen = if crowded { Patience::SHARED_PROCESSOR } else { Patience::OWN_PROCESSOR };
        let shared = Arc::new(Shared {
            spread: config.spread(),
            rank,
            rows_per_expert: rows_per_expert(config),
            patience: options.patience.unwrap_or(chosen),
            quantiser: Quantiser::detect(),
            summer: Summer::detect(),
            copier: Copier::detect(),
            memories,
            regions,
            mask: (0..ranks.div_ceil(32)).map(|_| AtomicU32::new(0)).collect(),
            gone: (0..ranks).map(|_| AtomicBool::new(false)).collect(),
            config: config.clone(),
            options: options.clone(),
        });
        let slots = (0..config.slots).map(|slot| Slot::new(shared.clone(), slot)).collect();
        Ok(Group { shared, slots, link: None })
    }

    /// All ranks of a group in this process, by rank; each may go to a thread of its own.
    pub fn in_process(config: &GroupConfig, options: &GroupOptions) -> Result<Vec<Group>, GroupError> {
        config.validate()?;
        let ranks = 0..config.ranks();
        let memories = ranks.clone().map(|rank| Group::allocate_region(config, rank));
        let memories = memories.collect::<Result<Vec<Memory>, GroupError>>()?;
        ranks.map(|rank| Group::over(config, rank, memories.clone(), options)).collect()
    }

    /// What the group agreed on.
    pub fn config(&self) -> &GroupConfig {
        &self.shared.config
    }

    /// Which rank this is.
    pub fn rank(&self) -> u32 {
        self.shared.rank
    }

    /// The slots, each a micro-batch.
    pub fn slots(&mut self) -> &mut [Slot] {
        &mut self.slots
    }

    /// One slot.
    ///
    /// # Panics
    /// If there is no such slot.
    pub fn slot(&mut self, slot: usize) -> &mut Slot {
        &mut self.slots[slot]
    }

    /// The ranks that this one does not wait for any more, ascending.
    pub fn masked(&self) -> Vec<u32> {
        self.shared.masked()
    }

    /// What tells this group that a rank is dead, so that waits for it end at once: for whoever knows more than a
    /// deadline, like the end of its process.
    pub fn mourner(&self) -> Mourner {
        Mourner { shared: self.shared.clone() }
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        for rank in (0..self.shared.ranks()).filter(|&rank| rank != self.shared.rank) {
            self.shared.say_farewell(rank, Farewell::Left);
        }
    }
}

/// Tells a group of deaths, from any thread.
#[derive(Clone, Debug)]
pub struct Mourner {
    shared: Arc<Shared>,
}

impl Mourner {
    /// A rank is dead. Unknown ranks are nobody's.
    pub fn mark_dead(&self, rank: u32) {
        if let Some(gone) = self.shared.gone.get(rank as usize) {
            gone.store(true, Ordering::Release);
            self.shared.wake_waiters_for(rank);
        }
    }
}

impl Shared {
    pub fn ranks(&self) -> u32 {
        self.config.ranks()
    }

    /// Where `source` writes in the memory of `reader`.
    pub fn arena(&self, slot: u32, source: u32, reader: u32) -> Arena<'_> {
        let reader = reader as usize;
        Arena::of(self.memories[reader].memory(), &self.regions[reader], slot, source)
    }

    /// Where a rank's results begin in its memory.
    pub fn results(&self, slot: u32, rank: u32) -> (&Memory, usize) {
        (self.memories[rank as usize].memory(), self.regions[rank as usize].results(slot))
    }

    /// Where the weights that go back with a rank's results begin in its memory.
    pub fn returned_weights(&self, slot: u32, rank: u32) -> (&Memory, usize) {
        (self.memories[rank as usize].memory(), self.regions[rank as usize].returned_weights(slot))
    }

    /// The copier for rows of so many bytes from one of the ranks: past the cache where what comes from all of them does
    /// not fit there.
    pub fn copier_for(&self, bytes_of_a_rank: usize) -> Copier {
        let all = bytes_of_a_rank.saturating_mul(self.ranks() as usize);
        self.copier.force(if all < STREAM_FROM_BYTES { Strategy::Cached } else { Strategy::Streamed })
    }

    pub fn is_masked(&self, rank: u32) -> bool {
        self.mask[rank as usize / 32].load(Ordering::Acquire) >> (rank % 32) & 1 != 0
    }

    pub fn is_gone(&self, rank: u32) -> bool {
        self.gone[rank as usize].load(Ordering::Acquire)
    }

    pub fn masked(&self) -> Vec<u32> {
        (0..self.ranks()).filter(|&rank| self.is_masked(rank)).collect()
    }

    pub fn mask(&self, rank: u32) {
        self.mask[rank as usize / 32].fetch_or(1 << (rank % 32), Ordering::AcqRel);
    }

    pub fn mask_words(&self) -> Vec<u32> {
        self.mask.iter().map(|word| word.load(Ordering::Relaxed)).collect()
    }

    /// Says to a rank, in every slot, that it need not wait for this one any more.
    pub fn say_farewell(&self, rank: u32, farewell: Farewell) {
        for slot in 0..self.config.slots {
            let arena = self.arena(slot, self.rank, rank);
            // Who was masked first stays so.
            words::with(arena.farewell(), |word| {
                let _ = word.compare_exchange(0, farewell as u32, Ordering::AcqRel, Ordering::Relaxed);
            });
            words::with(arena.word(), crate::arrivals::wake);
        }
    }

    /// What a rank has said: 0, or a [`Farewell`].
    pub fn farewell_of(&self, slot: u32, rank: u32) -> u32 {
        words::with(self.arena(slot, rank, self.rank).farewell(), |word| word.load(Ordering::Acquire))
    }

    fn wake_waiters_for(&self, rank: u32) {
        for slot in 0..self.config.slots {
            words::with(self.arena(slot, rank, self.rank).word(), crate::arrivals::wake);
        }
    }
}

fn check_rank(config: &GroupConfig, rank: u32) -> Result<(), GroupError> {
    config.validate()?;
    let ranks = config.ranks();
    if rank < ranks { Ok(()) } else { Err(GroupError::NoSuchRank { rank, ranks }) }
}

/// From here on outputs do not stay in a second-level cache until they are read, and stores past it save the reads of
/// what they overwrite; below, those who read next find the rows there.
const STREAM_FROM_BYTES: usize = 4 << 20;
