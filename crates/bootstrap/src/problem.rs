//! What the server says when it refuses: the JSON body of every answer that is not a success.

use std::borrow::Cow;

use serde::{Deserialize, Serialize};

use crate::group::Misfit;
use crate::query::QueryFault;
use crate::registry::Refusal;
use crate::rooms::RoomRefusal;

/// Why the server refused a request and what to do about it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What a program decides by.
    pub error: ErrorCode,
    /// What happened, with the facts.
    pub message: String,
    /// What a person can do about it.
    pub advice: Cow<'static, str>,
}

/// The kinds of refusal, written in JSON as `stale_incarnation` and so on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorCode {
    /// 400: the URL's node or a parameter is wrong.
    InvalidUrl,
    /// 400: the body is not the JSON that belongs there.
    InvalidBody,
    /// 400: the time to live is outside the server's limits.
    TtlOutOfRange,
    /// 400: the time to warm up is longer than the server allows.
    WarmUpOutOfRange,
    /// 400: rooms shall be kept for too long, or for no time.
    KeepOutOfRange,
    /// 400: a room's data-parallel rank is not one of the group's.
    RankOutOfRange,
    /// 401: the token is missing or wrong.
    WrongToken,
    /// 404: the server has no such path.
    NoSuchPath,
    /// 404: the node is not registered.
    UnknownWorker,
    /// 404: no worker of the group is registered.
    UnknownGroup,
    /// 405: the path does not take this method.
    MethodNotAllowed,
    /// 408: the body did not come in time.
    BodyTimeout,
    /// 409: a later incarnation of the node has registered.
    StaleIncarnation,
    /// 409: the worker disagrees with another one of its group on something that all have in common.
    TopologyMismatch,
    /// 409: another node of the group has the worker's ranks.
    RankTaken,
    /// 409: the group's rooms follow their number, and need not be told.
    RoomsFollow,
    /// 413: the body is larger than the server takes.
    BodyTooLarge,
    /// 503: the registry holds as many workers as it may.
    RegistryFull,
    /// 503: the registry holds as many rooms as it may.
    RoomsFull,
    /// A code of a later version of the server.
    #[serde(other)]
    Unknown,
}

impl Problem {
    pub(crate) fn new(error: ErrorCode, message: impl ToString) -> Problem {
        Problem { error, message: message.to_string(), advice: error.advice().into() }
    }
}

impl ErrorCode {
    /// Each code once.
    pub(crate) const ALL: [ErrorCode; 20] = [
        ErrorCode::InvalidUrl,
        ErrorCode::InvalidBody,
        ErrorCode::TtlOutOfRange,
        ErrorCode::WarmUpOutOfRange,
        ErrorCode::KeepOutOfRange,
        ErrorCode::RankOutOfRange,
        ErrorCode::WrongToken,
        ErrorCode::NoSuchPath,
        ErrorCode::UnknownWorker,
        ErrorCode::UnknownGroup,
        ErrorCode::MethodNotAllowed,
        ErrorCode::BodyTimeout,
        ErrorCode::StaleIncarnation,
        ErrorCode::TopologyMismatch,
        ErrorCode::RankTaken,
        ErrorCode::RoomsFollow,
        ErrorCode::BodyTooLarge,
        ErrorCode::RegistryFull,
        ErrorCode::RoomsFull,
        ErrorCode::Unknown,
    ];

    /// The HTTP status that comes with it.
    pub fn status(self) -> u16 {
        match self {
            ErrorCode::InvalidUrl
            | ErrorCode::InvalidBody
            | ErrorCode::TtlOutOfRange
            | ErrorCode::WarmUpOutOfRange
            | ErrorCode::KeepOutOfRange
            | ErrorCode::RankOutOfRange => 400,
            ErrorCode::WrongToken => 401,
            ErrorCode::NoSuchPath | ErrorCode::UnknownWorker | ErrorCode::UnknownGroup => 404,
            ErrorCode::MethodNotAllowed => 405,
            ErrorCode::BodyTimeout => 408,
            ErrorCode::StaleIncarnation
            | ErrorCode::TopologyMismatch
            | ErrorCode::RankTaken
            | ErrorCode::RoomsFollow => 409,
            ErrorCode::BodyTooLarge => 413,
            ErrorCode::RegistryFull | ErrorCode::RoomsFull => 503,
            ErrorCode::Unknown => 500,
        }
    }

    /// As it stands in JSON.
    pub fn name(self) -> &'static str {
        match self {
            ErrorCode::InvalidUrl => "invalid_url",
            ErrorCode::InvalidBody => "invalid_body",
            ErrorCode::TtlOutOfRange => "ttl_out_of_range",
            ErrorCode::WarmUpOutOfRange => "warm_up_out_of_range",
            ErrorCode::KeepOutOfRange => "keep_out_of_range",
            ErrorCode::RankOutOfRange => "rank_out_of_range",
            ErrorCode::WrongToken => "wrong_token",
            ErrorCode::NoSuchPath => "no_such_path",
            ErrorCode::UnknownWorker => "unknown_worker",
            ErrorCode::UnknownGroup => "unknown_group",
            ErrorCode::MethodNotAllowed => "method_not_allowed",
            ErrorCode::BodyTimeout => "body_timeout",
            ErrorCode::StaleIncarnation => "stale_incarnation",
            ErrorCode::TopologyMismatch => "topology_mismatch",
            ErrorCode::RankTaken => "rank_taken",
            ErrorCode::RoomsFollow => "rooms_follow",
            ErrorCode::BodyTooLarge => "body_too_large",
            ErrorCode::RegistryFull => "registry_full",
            ErrorCode::RoomsFull => "rooms_full",
            ErrorCode::Unknown => "unknown",
        }
    }

    fn advice(self) -> &'static str {
        match self {
            ErrorCode::InvalidUrl | ErrorCode::InvalidBody => {
                "correct the request; docs/bootstrap.md describes each one"
            }
            ErrorCode::TtlOutOfRange => "ask for a time to live within the server's limits, or change them",
            ErrorCode::WarmUpOutOfRange => "ask for a shorter time to warm up, or raise the server's limit",
            ErrorCode::KeepOutOfRange => "keep rooms for a time within the server's limit, or raise it",
            ErrorCode::RankOutOfRange => "check which group the room belongs to, and how large it is",
            ErrorCode::WrongToken => "give the worker and the server the same token",
            ErrorCode::NoSuchPath => "check the address: this is a crossdock bootstrap server",
            ErrorCode::UnknownWorker => "register again; a server that was restarted has forgotten everyone",
            ErrorCode::UnknownGroup => {
                "wait until the group's first worker has registered, or check the name"
            }
            ErrorCode::MethodNotAllowed => "use a method that the Allow header names",
            ErrorCode::BodyTimeout => "send the whole body at once, or check the network for losses",
            ErrorCode::StaleIncarnation => {
                "stop this process or give it a node name of its own: another one holds the name"
            }
            ErrorCode::TopologyMismatch => {
                "start all workers of a group with the same sizes, or give the new ones another group name; if the \
                 others belong to an earlier start, they expire by themselves"
            }
            ErrorCode::RankTaken => {
                "give each worker of a group ranks of its own; if the other one is gone, it expires by itself"
            }
            ErrorCode::RoomsFollow => "leave it out, or register the group with rooms: told",
            ErrorCode::BodyTooLarge => {
                "register fewer or shorter labels, and tell fewer rooms in one request"
            }
            ErrorCode::RegistryFull => {
                "raise the server's limit of workers, or try again when some have left"
            }
            ErrorCode::RoomsFull => "keep rooms for a shorter time, or raise the server's limit",
            ErrorCode::Unknown => "look into the server's log",
        }
    }
}

impl From<Refusal> for Problem {
    fn from(refusal: Refusal) -> Problem {
        let error = match refusal {
            Refusal::Stale { .. } => ErrorCode::StaleIncarnation,
            Refusal::Unknown { .. } => ErrorCode::UnknownWorker,
            Refusal::Full { .. } => ErrorCode::RegistryFull,
            Refusal::Ttl { .. } => ErrorCode::TtlOutOfRange,
            Refusal::WarmUp { .. } => ErrorCode::WarmUpOutOfRange,
            Refusal::Misfit(Misfit::Topology { .. }) => ErrorCode::TopologyMismatch,
            Refusal::Misfit(Misfit::RankTaken { .. }) => ErrorCode::RankTaken,
        };
        Problem::new(error, refusal)
    }
}

impl From<RoomRefusal> for Problem {
    fn from(refusal: RoomRefusal) -> Problem {
        let error = match refusal {
            RoomRefusal::UnknownGroup { .. } => ErrorCode::UnknownGroup,
            RoomRefusal::Follows { .. } => ErrorCode::RoomsFollow,
            RoomRefusal::Rank { .. } => ErrorCode::RankOutOfRange,
            RoomRefusal::Full { .. } => ErrorCode::RoomsFull,
            RoomRefusal::Keep { .. } => ErrorCode::KeepOutOfRange,
        };
        Problem::new(error, refusal)
    }
}

impl From<QueryFault> for Problem {
    fn from(fault: QueryFault) -> Problem {
        Problem::new(ErrorCode::InvalidUrl, fault)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_code_is_named_as_it_stands_in_json() {
        for code in ErrorCode::ALL {
            assert_eq!(serde_json::to_value(code).unwrap(), code.name());
            assert!((400..600).contains(&code.status()) && !code.advice().is_empty());
        }
        let later: ErrorCode = serde_json::from_str("\"too_green\"").unwrap();
        assert_eq!(later, ErrorCode::Unknown);
    }
}
