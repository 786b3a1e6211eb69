//! What can go wrong for a client, by what its caller would do about it.

use std::fmt;
use std::io;

use crate::group::{Group, GroupId};
use crate::problem::{ErrorCode, Problem};
use crate::worker::Listed;

/// Why a call to the registry gave no answer to go on with.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The server could not be reached, or the connection broke. It may be starting again.
    #[error("registry {server}: {stage} failed")]
    Unreachable {
        /// The server, as it was configured.
        server: String,
        /// How far the call came.
        stage: Stage,
        /// What the system said.
        source: io::Error,
    },
    /// The time for the call was over. A change that was asked for may have been made.
    #[error("registry {server}: {stage} was not over within {time_ms} ms")]
    Deadline {
        /// The server, as it was configured.
        server: String,
        /// How far the call came.
        stage: Stage,
        /// The whole call's time.
        time_ms: u64,
    },
    /// The registry understood the request and refused it.
    #[error("registry {server} refused ({status}): {}; {}", .problem.message, .problem.advice)]
    Refused {
        /// The server, as it was configured.
        server: String,
        /// The HTTP status; with etcd, the one that crossdock's own server gives.
        status: u16,
        /// What the registry said.
        problem: Problem,
    },
    /// etcd understood the request and could not do it: it has no leader, no space, or the token is wrong.
    #[error("etcd at {server} answered {status}: {message}")]
    Etcd {
        /// etcd, as it was configured.
        server: String,
        /// The HTTP status; 429 for a quota that is used up, whatever the gateway says to that.
        status: u16,
        /// What etcd said.
        message: String,
    },
    /// What answers there does not speak as a bootstrap server does: the address is another service's, or a
    /// proxy answered in the server's place.
    #[error("what answers at {server} is not the registry that was expected")]
    Foreign {
        /// The server, as it was configured.
        server: String,
        /// What it said.
        source: ForeignAnswer,
    },
}

impl Error {
    /// Whether the same call may succeed later without anyone changing anything.
    pub fn retry_helps(&self) -> bool {
        match self {
            Error::Unreachable { .. } | Error::Deadline { .. } => true,
            Error::Refused { problem, .. } => {
                use ErrorCode::*;
                // A group's earlier members may still be listed, and new ones may still be on their way.
                matches!(
                    problem.error,
                    RegistryFull | RoomsFull | BodyTimeout | UnknownGroup | TopologyMismatch | RankTaken
                )
            }
            Error::Etcd { status, .. } => *status == 429 || *status >= 500,
            // A proxy says so when the server behind it is away.
            Error::Foreign { source: ForeignAnswer::Status { status: 500..=599 }, .. } => true,
            Error::Foreign { .. } => false,
        }
    }

    /// The server's reason, if the server refused.
    pub fn code(&self) -> Option<ErrorCode> {
        match self {
            Error::Refused { problem, .. } => Some(problem.error),
            _ => None,
        }
    }
}

/// How far a call came.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stage {
    /// Looking up the server's name.
    Lookup,
    /// Connecting.
    Connect,
    /// Sending the request.
    Send,
    /// Waiting for and reading the answer.
    Receive,
}

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Stage::Lookup => "looking up the name",
            Stage::Connect => "connecting",
            Stage::Send => "sending the request",
            Stage::Receive => "receiving the answer",
        })
    }
}

/// How an answer differs from a bootstrap server's.
#[derive(Debug, thiserror::Error)]
pub enum ForeignAnswer {
    /// It does not begin as an HTTP/1 answer does.
    #[error("the answer is not HTTP/1")]
    NotHttp,
    /// Its head is larger than any that the server sends.
    #[error("the answer's head has more than {limit} bytes")]
    Head {
        /// The limit.
        limit: usize,
    },
    /// Its body is larger than the client takes.
    #[error("the answer's body has more than {limit} bytes")]
    Body {
        /// The limit, from the client's configuration.
        limit: usize,
    },
    /// Where its body ends cannot be told.
    #[error("the answer's length is not told in a way that HTTP/1 knows")]
    Length,
    /// It has a status that comes with no reason from the server.
    #[error("the status is {status}, without a reason")]
    Status {
        /// The status.
        status: u16,
    },
    /// Its body is not the JSON that belongs there.
    #[error("the answer's body is not what was asked for")]
    Json(#[source] serde_json::Error),
}

/// The server's address cannot be understood.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{given:?} is not HOST, HOST:PORT, http://HOST:PORT or etcd://HOST:PORT,…/PREFIX")]
pub struct InvalidServer {
    /// What was given.
    pub given: String,
}

/// Why a wait ended without what it was for.
#[derive(Debug, thiserror::Error)]
pub enum WaitError {
    /// The time is over, and fewer workers are there than were asked for.
    #[error("{} of {wanted} workers were there after {waited_ms} ms{}", .found.len(), because(.last))]
    TooFew {
        /// How many were asked for.
        wanted: usize,
        /// Those that were there when the server answered last.
        found: Vec<Listed>,
        /// How long the wait was.
        waited_ms: u64,
        /// Why the last call failed, if it did.
        last: Option<Box<Error>>,
    },
    /// The time is over, and a group is not complete.
    #[error("{}{}", incomplete(.group, .seen, .last, *.waited_ms), because(.last))]
    Incomplete {
        /// The group.
        group: GroupId,
        /// How it was when the registry answered last; `None` if none of its workers was registered, or if it has not
        /// answered.
        seen: Option<Box<Group>>,
        /// How long the wait was.
        waited_ms: u64,
        /// Why the last call failed, if it did.
        last: Option<Box<Error>>,
    },
    /// The time is over, and nobody has said which ranks serve these rooms.
    #[error("{} rooms of group {group} have no dp rank after {waited_ms} ms{}", .not_yet.len(), because(.last))]
    RoomsNotYet {
        /// The group.
        group: GroupId,
        /// The rooms.
        not_yet: Vec<u64>,
        /// How long the wait was.
        waited_ms: u64,
        /// Why the last call failed, if it did.
        last: Option<Box<Error>>,
    },
    /// A call failed in a way that waiting does not cure.
    #[error(transparent)]
    Failed(#[from] Error),
}

fn incomplete(
    group: &GroupId,
    seen: &Option<Box<Group>>,
    last: &Option<Box<Error>>,
    waited_ms: u64,
) -> String {
    match (seen, last) {
        (Some(seen), _) => format!("{seen}, after {waited_ms} ms"),
        (None, None) => format!("no worker of group {group} was registered within {waited_ms} ms"),
        (None, Some(_)) => format!("nothing was heard of group {group} within {waited_ms} ms"),
    }
}

fn because(last: &Option<Box<Error>>) -> String {
    last.as_ref().map_or_else(String::new, |error| format!("; the last call failed: {error}"))
}
