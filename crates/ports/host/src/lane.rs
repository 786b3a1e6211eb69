//! One lane of a port, from its opening to its `Down`.

use std::time::{Duration, Instant};

use crossdock_transport::{DownCause, LaneTags, PeerId};

use crate::address::{Address, Secret};
use crate::joined::{Joined, Phase};
use crate::medium::Medium;
use crate::peer::Peer;
use crate::remote::Leash;
use crate::watch::Watch;

/// One end of a connection.
pub(crate) struct Lane<M: Medium> {
    /// Whose lane it is.
    pub(crate) peer: PeerId,
    /// Names this end to the other one, which alone was told.
    pub(crate) cookie: Secret,
    pub(crate) stage: Stage<M>,
}

/// How far a lane is. Only a [joined](Stage::Joined) lane can have shown memory to a peer; the others end at once.
pub(crate) enum Stage<M: Medium> {
    /// Nobody has said where the other end is.
    Open,
    /// This end dials, and the other port's queue is full.
    Dialing(Pact),
    /// This end has dialed and said `Hello`.
    Greeting(Pact, Leash, Peer),
    /// The other end dials.
    Expecting(Pact),
    /// Both ends know each other.
    Joined(Box<Joined<M>>),
    /// Over, and to be reported.
    Ended(DownCause),
}

/// What `connect` was told.
#[derive(Clone, Copy)]
pub(crate) struct Pact {
    pub(crate) remote: Address,
    pub(crate) tags: LaneTags,
    pub(crate) deadline: Instant,
}

impl<M: Medium> Lane<M> {
    /// When the lane wants to be looked at again, whatever happens.
    pub(crate) fn deadline(&self, now: Instant) -> Option<Instant> {
        match &self.stage {
            Stage::Open | Stage::Ended(_) => None,
            Stage::Dialing(pact) => Some(pact.deadline.min(now + RETRY)),
            Stage::Greeting(pact, ..) | Stage::Expecting(pact) => Some(pact.deadline),
            Stage::Joined(joined) => {
                let retry = joined.blocked.then(|| now + RETRY);
                match joined.phase {
                    Phase::Announcing { deadline } => {
                        Some(retry.map_or(deadline, |retry| retry.min(deadline)))
                    }
                    Phase::Up | Phase::Closing { .. } => retry,
                }
            }
        }
    }

    /// Begins the end of the lane.
    pub(crate) fn close(&mut self, cause: DownCause, watch: &Watch) {
        match &mut self.stage {
            Stage::Ended(_) => {}
            Stage::Joined(joined) => joined.close(cause),
            stage => {
                if let Stage::Greeting(_, leash, peer) = std::mem::replace(stage, Stage::Ended(cause)) {
                    // The other end may have welcomed this one already, and shown its memory: the leash tells it, as
                    // it is dropped, that nobody looked.
                    watch.remove(&leash.link);
                    watch.remove(&peer);
                }
            }
        }
    }

    /// Whether no deadline runs.
    pub(crate) fn is_settled(&self) -> bool {
        match &self.stage {
            Stage::Open | Stage::Ended(_) => true,
            Stage::Dialing(_) | Stage::Greeting(..) | Stage::Expecting(_) => false,
            Stage::Joined(joined) => !matches!(joined.phase, Phase::Announcing { .. }),
        }
    }
}

/// How soon something is tried again that the kernel had no room for.
pub(crate) const RETRY: Duration = Duration::from_millis(2);
