//! How a slot hears the other ranks' calls: waits for them, compares them, and goes on without those that do not come.

use std::ops::ControlFlow;
use std::sync::atomic::{Ordering, fence};
use std::time::Duration;

use crate::arena::Header;
use crate::arrivals::{self, Waited};
use crate::config::Difference;
use crate::error::{Corrupted, EpError};
use crate::group::{Farewell, Shared};
use crate::planted::{Planted, is_planted};
use crate::report::Report;
use crate::slot::{COMBINE_PLAIN, COMBINE_WEIGHTED, DISPATCH, RELEASE, Slot, VERIFIED};
use crate::words;

/// How long this rank has listened in a receive half, and when it last had a sign of life of each other rank.
///
/// Only time in which this rank ran itself counts. One count serves all ranks: several that are dead cost it once.
#[derive(Debug, Default)]
pub(crate) struct Listening {
    limit: Duration,
    /// When it was looked last.
    at: Duration,
    listened: Duration,
    /// By rank: how often it was seen to wait. Empty until the first look.
    pulses: Vec<u32>,
    /// By rank: how much had been listened when that last grew.
    seen: Vec<Duration>,
}

impl Listening {
    fn begin(&mut self, limit: Duration) {
        (self.limit, self.listened) = (limit, Duration::ZERO);
        self.pulses.clear();
    }

    /// Counts the time since the last look, and looks who waits.
    fn look(&mut self, now: Duration, shared: &Shared, slot: u32) {
        let pulses = (0..shared.ranks()).map(|rank| shared.pulses_of(slot, rank));
        if self.pulses.is_empty() {
            self.at = now;
            self.pulses.extend(pulses);
            self.seen.clear();
            self.seen.resize(self.pulses.len(), Duration::ZERO);
            return;
        }
        let step = now.saturating_sub(self.at);
        self.listened += if is_planted(Planted::OwnPauseCounted) { step } else { step.min(LONGEST_STEP) };
        self.at = now;
        for ((before, seen), pulse) in self.pulses.iter_mut().zip(&mut self.seen).zip(pulses) {
            if std::mem::replace(before, pulse) != pulse && !is_planted(Planted::PulseIgnored) {
                *seen = self.listened;
            }
        }
    }

    /// Whether a rank has given no sign of life for as long as the limit says.
    fn is_silent(&self, rank: u32) -> bool {
        let seen = self.seen.get(rank as usize).copied().unwrap_or_default();
        self.listened.saturating_sub(seen) >= self.limit && !is_planted(Planted::ChainOnly)
    }

    /// Whether a rank is silent, or is waited for too long all the same. Those who wait are alive, but a chain of
    /// waits, each for the next, ends some time, too.
    fn is_late(&self, rank: u32) -> bool {
        let late = self.is_silent(rank) || self.listened >= self.limit.saturating_mul(LONGEST_CHAIN);
        late && !is_planted(Planted::DeadlineDropped)
    }
}

/// Why a rank is gone on without, in words for the log.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum WhyMasked {
    #[error("its process has ended, or the connection to it")]
    Gone,
    #[error("it has left the group")]
    Left,
    #[error("rank {0} has masked it")]
    ByAnother(u32),
    #[error("it neither made its call nor waited itself for {0:?}")]
    Late(Duration),
    #[error("what was sent to it has not left within {0:?}")]
    NotTaken(Duration),
    #[error("ranks wait one for another, and it has made no call for {0:?}")]
    Chain(Duration),
}

impl Slot {
    /// A receive half begins.
    pub(crate) fn begin_waiting(&mut self) {
        let options = &self.shared.options;
        self.listening.begin(if self.warm { options.deadline } else { options.warm_up });
    }

    /// Waits for a rank's part of the call. `None` if the rank is masked, or was masked now.
    pub(crate) fn wait_for(
        &mut self,
        source: u32,
        ours: &Header,
        report: &mut Report,
    ) -> Result<Option<Header>, EpError> {
        if !self.hear(source, report)? {
            return Ok(None);
        }
        let shared = &*self.shared;
        shared.pass();
        let arena = shared.arena_of(self.slot, source);
        self.mask_words.resize(shared.ranks().div_ceil(32) as usize, 0);
        let header = arena.read_header(self.call, &mut self.mask_words);
        if self.is_verified() && !header.is_whole(&self.mask_words) {
            return Err(EpError::Corrupted { rank: source, what: Corrupted::List });
        }
        let says = |rank: u32| self.mask_words[rank as usize / 32] >> (rank % 32) & 1 != 0;
        // What it says counts for nothing, unless most others say the same.
        let is_gone = shared.is_gone(source);
        if says(shared.rank) {
            if let Some(by) = if is_gone { self.expelled_by() } else { Some(source) } {
                return Err(self.out(by));
            }
            self.mask(source, WhyMasked::Gone);
            return self.check_quorum().map(|()| None);
        }
        let heeded = !is_gone && !is_planted(Planted::MasksIgnored);
        if heeded && self.mask_words.iter().any(|&word| word != 0) {
            for rank in (0..shared.ranks()).filter(|&rank| says(rank) && !shared.is_masked(rank)) {
                self.mask(rank, WhyMasked::ByAnother(source));
            }
            self.check_quorum()?;
        }
        let differences = differences(ours, &header);
        if !differences.is_empty() && !is_planted(Planted::CallsUncompared) {
            return Err(EpError::Mismatch { rank: source, differences });
        }
        let limit = shared.config.max_tokens[source as usize];
        let sane = |what, value: u32, most: u32| {
            if value <= most {
                Ok(())
            } else {
                Err(EpError::Nonsense { rank: source, what, value: value.into(), most: most.into() })
            }
        };
        sane("tokens", header.tokens, limit)?;
        sane("rows", header.rows, header.tokens)?;
        sane("results at", header.results_at, limit.saturating_mul(shared.config.top_k))?;
        Ok(Some(header))
    }

    /// Waits until a rank has made the call, whatever call that is. False if it is masked, or was masked now.
    fn hear(&mut self, source: u32, report: &mut Report) -> Result<bool, EpError> {
        let shared = self.shared.clone();
        if shared.is_masked(source) {
            return Ok(false);
        }
        let (memory, at) = shared.arena_of(self.slot, source).word();
        if words::with((memory, at), |word| arrivals::has_come(word, self.call)) {
            return Ok(true);
        }
        let begun = shared.pace.now();
        let waited = words::with((memory, at), |word| {
            arrivals::wait(word, self.call, shared.patience, &*shared.pace, || self.look_after(source))
        });
        report.waits[source as usize] += shared.pace.now().saturating_sub(begun);
        if waited == Waited::Arrived {
            return Ok(true);
        }
        if let Some(by) = self.expelled_by() {
            return Err(self.out(by));
        }
        self.mask(source, self.why_given_up(source));
        self.check_quorum()?;
        Ok(false)
    }

    /// Why a rank is not waited for any longer.
    fn why_given_up(&self, source: u32) -> WhyMasked {
        // Who has left is gone soon after.
        if self.has_left(source) {
            WhyMasked::Left
        } else if self.shared.is_gone(source) {
            WhyMasked::Gone
        } else if let Some(by) = self.masked_by(source) {
            WhyMasked::ByAnother(by)
        } else if self.listening.is_silent(source) {
            WhyMasked::Late(self.listening.limit)
        } else {
            WhyMasked::Chain(self.listening.limit.saturating_mul(LONGEST_CHAIN))
        }
    }

    /// Between two sleeps of a wait: whether it goes on.
    fn look_after(&mut self, source: u32) -> ControlFlow<Waited> {
        let shared = self.shared.clone();
        // Another slot may have masked it meanwhile.
        let is_hopeless = shared.is_masked(source)
            || (shared.is_gone(source) && !is_planted(Planted::DeathIgnored))
            || self.has_left(source)
            || self.expelled_by().is_some()
            || self.masked_by(source).is_some();
        if is_hopeless {
            return ControlFlow::Break(Waited::Stopped);
        }
        if !self.listening.pulses.is_empty() {
            // Whoever waits for this rank should know that it waits itself.
            shared.pulse(self.slot);
        }
        self.listening.look(shared.pace.now(), &shared, self.slot);
        if self.listening.is_late(source) {
            ControlFlow::Break(Waited::Late)
        } else {
            ControlFlow::Continue(())
        }
    }

    /// Waits until everybody has made the last call, where that has not been done: a step that is not taken to its end
    /// leaves it so. What the calls are does not matter any more.
    pub(crate) fn hear_last_call(&mut self) -> Result<(), EpError> {
        if self.heard || is_planted(Planted::LastCallUnheard) {
            return Ok(());
        }
        let mut report = Report::new(self.shared.ranks());
        self.begin_waiting();
        for source in 0..self.shared.ranks() {
            self.hear(source, &mut report)?;
        }
        self.heard = true;
        Ok(())
    }

    /// Goes on without a rank, and leaves it word.
    pub(crate) fn mask(&self, rank: u32, why: WhyMasked) {
        let shared = &*self.shared;
        let (by, slot, call) = (shared.rank, self.slot, self.call);
        match why {
            _ if shared.is_masked(rank) => {}
            WhyMasked::Left => tracing::info!(rank, by, slot, call, "masked: {why}"),
            _ => tracing::warn!(rank, by, slot, call, "masked: {why}"),
        }
        if !is_planted(Planted::MaskUntold) {
            shared.say_farewell(rank, Farewell::Masked);
        }
        shared.pass();
        // What the rank may still be reading is overwritten, by any slot, only after it can know that it should not.
        fence(Ordering::SeqCst);
        shared.mask(rank);
        if let Some(port) = shared.port_of(rank) {
            port.sever(rank);
        }
    }

    pub(crate) fn check_quorum(&self) -> Result<(), EpError> {
        let (alive, least) = (self.shared.alive(), self.shared.options.least_ranks);
        if alive >= least || is_planted(Planted::QuorumUnchecked) {
            return Ok(());
        }
        Err(EpError::TooFewRanks { alive, least, masked: self.shared.masked() })
    }

    /// This rank is out, for good, and every slot of it.
    pub(crate) fn out(&self, by: u32) -> EpError {
        self.shared.set_out(by);
        EpError::Masked { by }
    }

    /// A rank that has masked this one. What those say that are masked or dead to this one counts only if they are most of
    /// the others: then it is this one that is out.
    pub(crate) fn expelled_by(&self) -> Option<u32> {
        let shared = &*self.shared;
        if let Some(by) = shared.out_by() {
            return Some(by);
        }
        let all = || (0..shared.ranks()).filter(|&by| by != shared.rank && self.is_expelled_by(by));
        let counts = |by: &u32| !shared.is_masked(*by) && !shared.is_gone(*by);
        let others = shared.ranks() as usize - 1;
        all().find(counts).or_else(|| all().next().filter(|_| 2 * all().count() > others))
    }

    /// Another rank that has said of this one that it is masked, with its part of this call or of the next: whoever masks
    /// in this call says so with the next.
    fn masked_by(&self, rank: u32) -> Option<u32> {
        if is_planted(Planted::MasksIgnored) {
            return None;
        }
        let shared = &*self.shared;
        let mut mask = vec![0; shared.ranks().div_ceil(32) as usize];
        let mut says = |other: u32, call: u32| {
            let arena = shared.arena_of(self.slot, other);
            words::with(arena.word(), |word| arrivals::has_come(word, call)) && {
                let header = arena.read_header(call, &mut mask);
                let is_whole = !self.is_verified() || header.is_whole(&mask);
                is_whole && mask[rank as usize / 32] >> (rank % 32) & 1 != 0
            }
        };
        (0..shared.ranks())
            .filter(|&other| other != rank && !shared.is_masked(other) && !shared.is_gone(other))
            .find(|&other| says(other, self.call) || says(other, self.call.wrapping_add(1)))
    }

    fn is_expelled_by(&self, by: u32) -> bool {
        self.shared.farewell_of(self.slot, by) == Farewell::Masked as u32
    }

    fn has_left(&self, rank: u32) -> bool {
        self.shared.farewell_of(self.slot, rank) == Farewell::Left as u32
            && !is_planted(Planted::LeavingIgnored)
    }

    /// Whether what was read in the memory of those in `read` counts: a rank that has masked this one may have overwritten
    /// what it had published. Who is dead to this one, and so counts for nothing itself, is masked and taken out of `read`: then
    /// it is false, and what was read is to be read again without it.
    pub(crate) fn check_membership(&self, read: &mut [bool]) -> Result<bool, EpError> {
        let shared = &*self.shared;
        shared.pass();
        fence(Ordering::SeqCst);
        if is_planted(Planted::MembershipUnchecked) {
            return Ok(true);
        }
        let mut counts = true;
        for (by, read) in (0..shared.ranks()).zip(read) {
            if !*read || shared.mapped(by).is_none() || !self.is_expelled_by(by) {
                continue;
            }
            if let Some(by) = self.expelled_by() {
                return Err(self.out(by));
            }
            self.mask(by, WhyMasked::Gone);
            (*read, counts) = (false, false);
        }
        self.check_quorum()?;
        Ok(counts)
    }

    /// Why rows of a source cannot be taken: it may be that it has masked this rank and written over them. If that counts, that
    /// is the error; if it is dead to this rank, all is to be taken once more without it.
    pub(crate) fn excuse(&self, source: u32, error: EpError) -> Result<(), EpError> {
        let mut read = vec![false; self.shared.ranks() as usize];
        read[source as usize] = true;
        if is_planted(Planted::OverwrittenBlamed) || self.check_membership(&mut read)? {
            Err(error)
        } else {
            Ok(())
        }
    }

    /// Compares what a call's header says of a list with its checksum.
    pub(crate) fn check_list(&self, rank: u32, header: &Header, list: &[u8]) -> Result<(), EpError> {
        if !self.is_verified()
            || crc32c::crc32c(list) == header.list_checksum
            || is_planted(Planted::ChecksumUnchecked)
        {
            return Ok(());
        }
        Err(EpError::Corrupted { rank, what: Corrupted::List })
    }
}

fn differences(ours: &Header, theirs: &Header) -> Vec<Difference> {
    let kind = |kind: u32| match kind {
        DISPATCH => "dispatch".to_owned(),
        COMBINE_WEIGHTED => "combine of the latency mode".to_owned(),
        COMBINE_PLAIN => "combine of the throughput mode".to_owned(),
        RELEASE => "dispatch after one that was not combined".to_owned(),
        other => format!("unknown ({other})"),
    };
    let difference =
        |what: &str, ours: String, theirs: String| Difference { what: what.to_owned(), ours, theirs };
    if ours.kind != theirs.kind {
        return vec![difference("call", kind(ours.kind), kind(theirs.kind))];
    }
    let pairs = [
        ("step", u64::from(ours.call), u64::from(theirs.call)),
        ("top_k", ours.top_k.into(), theirs.top_k.into()),
        ("form", ours.payload.into(), theirs.payload.into()),
        ("row_bytes", ours.row_bytes.into(), theirs.row_bytes.into()),
        ("scale_bytes", ours.scale_bytes.into(), theirs.scale_bytes.into()),
        ("verify", (ours.flags & VERIFIED).into(), (theirs.flags & VERIFIED).into()),
        ("placement_version", ours.placement_version, theirs.placement_version),
    ];
    let differ = pairs.into_iter().filter(|(_, ours, theirs)| ours != theirs);
    differ.map(|(what, ours, theirs)| difference(what, ours.to_string(), theirs.to_string())).collect()
}

/// A look at the others that comes later than this was held up here, and not by them.
pub(crate) const LONGEST_STEP: Duration = Duration::from_millis(100);
/// Of ranks that wait for each other one after the other, before whoever waits for the last gives up anyway.
const LONGEST_CHAIN: u32 = 8;
