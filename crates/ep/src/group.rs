//! A rank's place in a group: its memory, the others' memory, and who is masked.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::Duration;

use crossdock_memory::copy::{Copier, Strategy};
use crossdock_memory::{AllocateOptions, Memory};

use crate::arena::Arena;
use crate::arrivals::Patience;
use crate::copy_rate::CopyRate;
use crate::error::GroupError;
use crate::meet::Link;
use crate::outgoing::Outgoing;
use crate::pace::{Machine, Pace};
use crate::region::{RegionLayout, rows_per_expert};
use crate::slot::Slot;
use crate::words::{self, RankMemory};
use crate::{Experts, GroupConfig, Quantiser, Summer};

/// How a rank waits, and what it does about those that do not come.
#[derive(Clone, Debug, PartialEq)]
pub struct GroupOptions {
    /// How long a rank may neither make its call nor wait itself before those who wait for it mask it. It counts while
    /// whoever waits runs itself, so a job that is stopped as a whole goes on where it was. Where ranks are processes that
    /// have met, silent heartbeats end a wait sooner, after their grace.
    pub deadline: Duration,
    /// How long the waits of a slot's first step last: others may still compile their kernels.
    pub warm_up: Duration,
    /// How long a wait spins before it sleeps. `None` chooses by ranks of this host and processors.
    pub patience: Option<Patience>,
    /// What becomes of a token some of whose experts are on masked ranks.
    pub lost: LostWeight,
    /// With fewer ranks than this that are not masked, calls fail, as a part of a group that has fallen apart should.
    pub least_ranks: u32,
    /// Whether rows, lists and results carry checksums that their receivers check, which depend on the step. The same on
    /// all ranks.
    pub verify: bool,
}

impl Default for GroupOptions {
    fn default() -> GroupOptions {
        GroupOptions {
            deadline: Duration::from_secs(10),
            warm_up: Duration::from_secs(120),
            patience: None,
            lost: LostWeight::Drop,
            least_ranks: 1,
            verify: false,
        }
    }
}

/// What becomes of a token some of whose experts are on masked ranks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LostWeight {
    /// The sum lacks what they would have added.
    Drop,
    /// The weights of the others are raised, so that they add up to what all of the token's weights did, where both sums are
    /// positive. In the latency mode, whose combine has weights.
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
    pub pace: Arc<dyn Pace>,
    pub quantiser: Quantiser,
    pub summer: Summer,
    pub copy_rate: CopyRate,
    copier: Copier,
    reaches: Vec<Reach>,
    regions: Vec<RegionLayout>,
    outgoing: Option<Arc<Outgoing>>,
    mask: Box<[AtomicU32]>,
    gone: Box<[AtomicBool]>,
    /// The rank by which a call here has failed as masked, and one more.
    out: AtomicU32,
}

/// How this rank reaches another.
#[derive(Debug)]
pub(crate) enum Reach {
    /// By its memory.
    Mapped(RankMemory),
    /// Through a port.
    Port,
}

impl Group {
    /// What memory a rank has to give to the others: so many bytes of shared memory, zeroed. Most of it is never touched
    /// where all ranks are on one host: [`GroupConfig::sizes`].
    pub fn region_bytes(config: &GroupConfig, rank: u32) -> Result<usize, GroupError> {
        check_rank(config, rank)?;
        Ok(RegionLayout::of_group(config, rank..rank + 1).expect("the configuration is valid")[0].bytes)
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

    /// What the safe and the unsafe ways to a group whose regions are all in this process have in common.
    pub(crate) fn over_regions(
        config: &GroupConfig,
        rank: u32,
        memories: Vec<Memory>,
        options: &GroupOptions,
    ) -> Result<Group, GroupError> {
        check_rank(config, rank)?;
        let reaches = memories.into_iter().map(|memory| Reach::Mapped(memory.into())).collect();
        Group::assemble(config, rank, reaches, None, options, Arc::new(Machine::new()))
    }

    /// One rank of a valid configuration. Its own memory is mapped.
    pub(crate) fn assemble(
        config: &GroupConfig,
        rank: u32,
        reaches: Vec<Reach>,
        outgoing: Option<Arc<Outgoing>>,
        options: &GroupOptions,
        pace: Arc<dyn Pace>,
    ) -> Result<Group, GroupError> {
        let ranks = config.ranks();
        let regions = RegionLayout::of_group(config, 0..ranks).expect("the configuration is valid");
        for (rank, region) in (0..ranks).zip(&regions) {
            let bytes = match reaches.get(rank as usize) {
                Some(Reach::Mapped(memory)) => memory.memory().bytes(),
                Some(Reach::Port) => continue,
                None => 0,
            };
            if bytes < region.bytes {
                return Err(GroupError::WrongRegion { rank, bytes, needed: region.bytes });
            }
        }
        let processors = std::thread::available_parallelism().map_or(1, |n| n.get());
        let here = reaches.iter().filter(|reach| matches!(reach, Reach::Mapped(_))).count();
        let crowded = here > processors;
        let chosen = if crowded { Patience::SHARED_PROCESSOR } else { Patience::OWN_PROCESSOR };
        let shared = Arc::new(Shared {
            spread: config.spread(),
            rank,
            rows_per_expert: rows_per_expert(config),
            patience: options.patience.unwrap_or(chosen),
            pace,
            quantiser: Quantiser::detect(),
            summer: Summer::detect(),
            copy_rate: CopyRate::measure(),
            copier: Copier::detect(),
            reaches,
            regions,
            outgoing,
            mask: (0..ranks.div_ceil(32)).map(|_| AtomicU32::new(0)).collect(),
            gone: (0..ranks).map(|_| AtomicBool::new(false)).collect(),
            out: AtomicU32::new(0),
            config: config.clone(),
            options: options.clone(),
        });
        let slots = (0..config.slots).map(|slot| Slot::new(shared.clone(), slot)).collect();
        Ok(Group { shared, slots, link: None })
    }

    /// All ranks of a group in this process, by rank; each may go to a thread of its own.
    pub fn in_process(config: &GroupConfig, options: &GroupOptions) -> Result<Vec<Group>, GroupError> {
        let memories = Group::allocate_regions(config)?;
        (0..config.ranks()).map(|rank| Group::over_regions(config, rank, memories.clone(), options)).collect()
    }

    /// The same on another clock than the machine's: for simulations.
    #[cfg(feature = "planted-bugs")]
    pub fn in_simulation(
        config: &GroupConfig,
        options: &GroupOptions,
        pace: &Arc<dyn Pace>,
    ) -> Result<Vec<Group>, GroupError> {
        let memories = Group::allocate_regions(config)?;
        let reaches = || memories.iter().map(|memory| Reach::Mapped(memory.clone().into())).collect();
        (0..config.ranks())
            .map(|rank| Group::assemble(config, rank, reaches(), None, options, pace.clone()))
            .collect()
    }

    /// This rank's memory, and where in it is what checksums cover where calls are verified, by kind: for simulations that
    /// spoil it.
    #[cfg(feature = "planted-bugs")]
    pub fn sealed(&self) -> (Memory, Vec<Vec<std::ops::Range<usize>>>) {
        let slots = 0..self.shared.config.slots;
        let kinds = slots.flat_map(|slot| self.shared.own_region().sealed(slot));
        (self.shared.own_memory().clone(), kinds.filter(|parts| !parts.is_empty()).collect())
    }

    fn allocate_regions(config: &GroupConfig) -> Result<Vec<Memory>, GroupError> {
        config.validate()?;
        (0..config.ranks()).map(|rank| Group::allocate_region(config, rank)).collect()
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
    pub(crate) shared: Arc<Shared>,
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

    /// This rank's memory.
    pub fn own_memory(&self) -> &Memory {
        self.mapped(self.rank).expect("a rank maps its own memory")
    }

    /// A rank's memory, if it is mapped here.
    pub fn mapped(&self, rank: u32) -> Option<&Memory> {
        match &self.reaches[rank as usize] {
            Reach::Mapped(memory) => Some(memory.memory()),
            Reach::Port => None,
        }
    }

    /// The thread that carries calls to a rank, if a port reaches it.
    pub fn port_of(&self, rank: u32) -> Option<&Outgoing> {
        match &self.reaches[rank as usize] {
            Reach::Mapped(_) => None,
            Reach::Port => self.outgoing.as_deref(),
        }
    }

    pub fn has_ports(&self) -> bool {
        self.outgoing.is_some()
    }

    pub fn region(&self, rank: u32) -> &RegionLayout {
        &self.regions[rank as usize]
    }

    pub fn own_region(&self) -> &RegionLayout {
        self.region(self.rank)
    }

    /// Where a source tells this rank of its calls.
    pub fn arena_of(&self, slot: u32, source: u32) -> Arena<'_> {
        Arena::new(self.own_memory(), self.own_region().arena(slot, source))
    }

    /// Where this rank tells another of its calls: there, or where its port takes it from.
    pub fn arena_at(&self, slot: u32, reader: u32) -> Arena<'_> {
        match self.mapped(reader) {
            Some(memory) => Arena::new(memory, self.region(reader).arena(slot, self.rank)),
            None => Arena::new(self.own_memory(), self.own_region().outbox(slot, reader)),
        }
    }

    /// The copier for so many bytes of rows: past the cache where they do not stay there until they are read, and stores
    /// past it save the reads of what they overwrite.
    pub fn copier_for(&self, bytes: usize, stays_bytes: usize) -> Copier {
        self.copier.force(if bytes < stays_bytes { Strategy::Cached } else { Strategy::Streamed })
    }

    /// A place at which a simulation may let others run.
    #[inline(always)]
    pub fn pass(&self) {
        if cfg!(feature = "planted-bugs") {
            self.pace.pass();
        }
    }

    pub fn is_masked(&self, rank: u32) -> bool {
        self.mask[rank as usize / 32].load(Ordering::Acquire) >> (rank % 32) & 1 != 0
    }

    pub fn is_gone(&self, rank: u32) -> bool {
        self.gone[rank as usize].load(Ordering::Acquire)
    }

    /// By whom a call of this rank has failed as masked.
    pub fn out_by(&self) -> Option<u32> {
        self.out.load(Ordering::Acquire).checked_sub(1)
    }

    /// No further call of this rank succeeds.
    pub fn set_out(&self, by: u32) {
        self.out.store(by + 1, Ordering::Release);
    }

    pub fn masked(&self) -> Vec<u32> {
        (0..self.ranks()).filter(|&rank| self.is_masked(rank)).collect()
    }

    pub fn mask(&self, rank: u32) {
        self.mask[rank as usize / 32].fetch_or(1 << (rank % 32), Ordering::AcqRel);
    }

    /// How many ranks are not masked.
    pub fn alive(&self) -> u32 {
        self.ranks() - self.mask.iter().map(|word| word.load(Ordering::Acquire).count_ones()).sum::<u32>()
    }

    pub fn mask_words(&self) -> impl Iterator<Item = u32> {
        self.mask.iter().map(|word| word.load(Ordering::Relaxed))
    }

    /// Says a last word to a rank, in every slot. Whom a port reaches hears it by the end of the session.
    pub fn say_farewell(&self, rank: u32, farewell: Farewell) {
        if self.mapped(rank).is_none() {
            return;
        }
        for slot in 0..self.config.slots {
            let arena = self.arena_at(slot, rank);
            set_farewell(&arena, farewell);
            words::with(arena.word(), |word| self.pace.wake(word));
        }
    }

    /// What a rank has said: 0, or a [`Farewell`].
    pub fn farewell_of(&self, slot: u32, rank: u32) -> u32 {
        words::with(self.arena_of(slot, rank).farewell(), |word| word.load(Ordering::Acquire))
    }

    /// Counts up how often this rank was seen to wait.
    pub fn pulse(&self, slot: u32) {
        words::with((self.own_memory(), self.own_region().pulse(slot)), |word| {
            word.fetch_add(1, Ordering::Relaxed)
        });
        if let Some(outgoing) = &self.outgoing {
            outgoing.pulse(slot);
        }
    }

    /// How often a rank was seen to wait in a slot.
    pub fn pulses_of(&self, slot: u32, rank: u32) -> u32 {
        match self.mapped(rank) {
            Some(memory) => {
                words::with((memory, self.region(rank).pulse(slot)), |word| word.load(Ordering::Relaxed))
            }
            None => self.port_of(rank).map_or(0, |port| port.pulses_of(rank, slot)),
        }
    }

    fn wake_waiters_for(&self, rank: u32) {
        for slot in 0..self.config.slots {
            words::with(self.arena_of(slot, rank).word(), |word| self.pace.wake(word));
        }
    }
}

/// Who was masked first stays so.
pub(crate) fn set_farewell(arena: &Arena<'_>, farewell: Farewell) {
    words::with(arena.farewell(), |word| {
        let _ = word.compare_exchange(0, farewell as u32, Ordering::AcqRel, Ordering::Relaxed);
    });
}

fn check_rank(config: &GroupConfig, rank: u32) -> Result<(), GroupError> {
    config.validate()?;
    let ranks = config.ranks();
    if rank < ranks { Ok(()) } else { Err(GroupError::NoSuchRank { rank, ranks }) }
}

/// Rows of the staging that stay in a second-level cache until the others read them.
pub(crate) const STAGED_BYTES: usize = 2 << 20;
/// Outputs that stay there beside the staging of all ranks that they come from.
pub(crate) const TAKEN_BYTES: usize = 1 << 20;
