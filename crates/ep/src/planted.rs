//! Bugs that can be planted on purpose, so that the simulation can prove that it would find them. Without the feature
//! `planted-bugs`, which only the tests of this repository turn on, there are none, and the compiler knows it.

/// A bug, named after what it does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Planted {
    /// A call is published before its list is written.
    PublishedEarly,
    /// Both headers of an arena are one.
    HeaderNotAlternating,
    /// A dispatch that follows one that was not combined does not wait until that one has been read.
    ReleaseSkipped,
    /// A step that was not taken to its end does not hear the others before the next begins.
    LastCallUnheard,
    /// What was read counts, whoever masked the reader meanwhile.
    MembershipUnchecked,
    /// A rank is masked without a word to it.
    MaskUntold,
    /// The masks that others tell with their calls are not heeded.
    MasksIgnored,
    /// Calls are not compared.
    CallsUncompared,
    /// Who waits is taken for dead.
    PulseIgnored,
    /// The time in which this rank itself did not run counts against the others.
    OwnPauseCounted,
    /// Deadlines pass, and nothing happens.
    DeadlineDropped,
    /// A death is not heard of.
    DeathIgnored,
    /// Weight that is lost is not reported.
    LostUnreported,
    /// Checksums are not compared.
    ChecksumUnchecked,
    /// Checksums do not depend on the step.
    StepUntagged,
    /// What a header says is heeded before it is compared with its checksum.
    HeaderUnchecked,
    /// What is found wrong is not read again when it turns out that its rank has masked this one.
    OverwrittenBlamed,
    /// Where results begin is written after the call is published.
    BeginsLate,
    /// A combine reads results without waiting for them.
    ResultsUnheard,
    /// Too few ranks go on.
    QuorumUnchecked,
    /// Who has left is waited for.
    LeavingIgnored,
    /// A rank is given up only when all together have been waited for very long.
    ChainOnly,
}

impl Planted {
    /// All of them.
    pub const ALL: [Planted; 22] = [
        Self::PublishedEarly,
        Self::HeaderNotAlternating,
        Self::ReleaseSkipped,
        Self::LastCallUnheard,
        Self::MembershipUnchecked,
        Self::MaskUntold,
        Self::MasksIgnored,
        Self::CallsUncompared,
        Self::PulseIgnored,
        Self::OwnPauseCounted,
        Self::DeadlineDropped,
        Self::DeathIgnored,
        Self::LostUnreported,
        Self::ChecksumUnchecked,
        Self::StepUntagged,
        Self::HeaderUnchecked,
        Self::OverwrittenBlamed,
        Self::BeginsLate,
        Self::ResultsUnheard,
        Self::QuorumUnchecked,
        Self::LeavingIgnored,
        Self::ChainOnly,
    ];
}

/// Whether this bug is planted on this thread.
#[cfg(not(feature = "planted-bugs"))]
#[inline(always)]
pub const fn is_planted(_bug: Planted) -> bool {
    false
}

#[cfg(feature = "planted-bugs")]
pub use self::thread::{is_planted, plant};

#[cfg(feature = "planted-bugs")]
mod thread {
    use std::cell::Cell;

    use super::Planted;

    thread_local! {
        static BUG: Cell<Option<Planted>> = const { Cell::new(None) };
    }

    /// Whether this bug is planted on this thread.
    pub fn is_planted(bug: Planted) -> bool {
        BUG.get() == Some(bug)
    }

    /// Plants a bug on this thread, in place of the one before.
    pub fn plant(bug: Option<Planted>) {
        BUG.set(bug);
    }
}
