//! Bugs that can be planted on purpose, so that the simulation can prove that it would find them. Without the feature
//! `planted-bugs`, which only the tests of this repository turn on, there are none, and the compiler knows it.

/// A bug, named after what it does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Planted {
    /// Pages come home when their room ends, whoever may still write them.
    QuarantineOff,
    /// Pages come home when their session ends, before its lanes are down.
    SessionEndFrees,
    /// Whatever a port says, nothing lands any more once a grant has been revoked.
    FenceTakenForNow,
    /// An immediate or a release counts for whichever grant has its index now.
    GenerationIgnored,
    /// An index is used again with the same generation.
    GenerationKept,
    /// A finish is believed without counting.
    FinishBelieved,
    /// A finish of an earlier attempt counts for the present one.
    EarlierFinishBelieved,
    /// What an earlier attempt has counted counts in the next.
    ArrivalsCarriedOver,
    /// A room is delivered although an earlier attempt's writes can still land.
    EarlierAttemptForgotten,
    /// A grant is given back while ops under it are on their way.
    ReleaseTooEarly,
    /// What was given back with an earlier attempt is given back again with the last.
    ReleaseTwice,
    /// The wrong grant is given back.
    ReleaseOfAnother,
    /// A release is believed for lanes of which the peer could not speak.
    DownLanesForgotten,
    /// A deadline passes, and nothing happens.
    DeadlineDropped,
    /// The peer does not hear that a room was ended.
    CancelUntold,
    /// An earlier life of a peer is listened to.
    EarlierLifeBelieved,
    /// What was said about an earlier room of a name counts for the later one.
    SerialIgnored,
    /// A served source goes home at the end of its room, while the peer may still read it.
    SourceFreedAtEnd,
    /// The destination of a pull goes home before its reads have ended.
    ReadsForgotten,
    /// A token that comes back counts for two.
    TokenCountedTwice,
    /// What a short post has left without an immediate is never covered by one.
    ShortPostForgotten,
    /// A pause of this node's own counts as the silence of its peers.
    OwnPauseCounted,
    /// Checksums are not compared.
    ChecksumUnchecked,
    /// What an earlier attempt has sent first is not sent again.
    NotSentAgain,
    /// Of several peers that may write the same pages only the first is waited for.
    OtherWritersForgotten,
    /// A room of several shares is delivered when the first of them is.
    FirstShareDelivers,
    /// The prefill side of several shares ends with the first that fails.
    FirstFailureEndsAll,
    /// A lane that comes back is posted on before the peer has said that its end is ready.
    LaneUsedTooEarly,
    /// A lane that was lost is offered anew before the peer has said that its end is down.
    LaneOfferedTooEarly,
    /// What was lost with a lane counts against the next one of its number.
    LostLanesRemembered,
    /// A lane that was lost never comes back.
    LaneNeverBack,
    /// Every peer is told that there is no room for more.
    RefuseAll,
}

impl Planted {
    /// All of them.
    pub const ALL: [Planted; 32] = [
        Self::QuarantineOff,
        Self::SessionEndFrees,
        Self::FenceTakenForNow,
        Self::GenerationIgnored,
        Self::GenerationKept,
        Self::FinishBelieved,
        Self::EarlierFinishBelieved,
        Self::ArrivalsCarriedOver,
        Self::EarlierAttemptForgotten,
        Self::ReleaseTooEarly,
        Self::ReleaseTwice,
        Self::ReleaseOfAnother,
        Self::DownLanesForgotten,
        Self::DeadlineDropped,
        Self::CancelUntold,
        Self::EarlierLifeBelieved,
        Self::SerialIgnored,
        Self::SourceFreedAtEnd,
        Self::ReadsForgotten,
        Self::TokenCountedTwice,
        Self::ShortPostForgotten,
        Self::OwnPauseCounted,
        Self::ChecksumUnchecked,
        Self::NotSentAgain,
        Self::OtherWritersForgotten,
        Self::FirstShareDelivers,
        Self::FirstFailureEndsAll,
        Self::LaneUsedTooEarly,
        Self::LaneOfferedTooEarly,
        Self::LostLanesRemembered,
        Self::LaneNeverBack,
        Self::RefuseAll,
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
