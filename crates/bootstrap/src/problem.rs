//! What the server says when it refuses: the JSON body of every answer that is not a success.

use std::borrow::Cow;

use hyper::StatusCode;
use serde::{Deserialize, Serialize};

use crate::query::QueryFault;
use crate::registry::Refusal;

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
    /// 401: the token is missing or wrong.
    WrongToken,
    /// 404: the server has no such path.
    NoSuchPath,
    /// 404: the node is not registered.
    UnknownWorker,
    /// 405: the path does not take this method.
    MethodNotAllowed,
    /// 408: the body did not come in time.
    BodyTimeout,
    /// 409: a later incarnation of the node has registered.
    StaleIncarnation,
    /// 413: the body is larger than the server takes.
    BodyTooLarge,
    /// 503: the registry holds as many workers as it may.
    RegistryFull,
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
    pub(crate) fn status(self) -> StatusCode {
        match self {
            ErrorCode::InvalidUrl | ErrorCode::InvalidBody | ErrorCode::TtlOutOfRange => {
                StatusCode::BAD_REQUEST
            }
            ErrorCode::WrongToken => StatusCode::UNAUTHORIZED,
            ErrorCode::NoSuchPath | ErrorCode::UnknownWorker => StatusCode::NOT_FOUND,
            ErrorCode::MethodNotAllowed => StatusCode::METHOD_NOT_ALLOWED,
            ErrorCode::BodyTimeout => StatusCode::REQUEST_TIMEOUT,
            ErrorCode::StaleIncarnation => StatusCode::CONFLICT,
            ErrorCode::BodyTooLarge => StatusCode::PAYLOAD_TOO_LARGE,
            ErrorCode::RegistryFull => StatusCode::SERVICE_UNAVAILABLE,
            ErrorCode::Unknown => StatusCode::INTERNAL_SERVER_ERROR,
        }
    }

    fn advice(self) -> &'static str {
        match self {
            ErrorCode::InvalidUrl | ErrorCode::InvalidBody => {
                "correct the request; docs/bootstrap.md describes each one"
            }
            ErrorCode::TtlOutOfRange => "ask for a time to live within the server's limits, or change them",
            ErrorCode::WrongToken => "give the worker and the server the same token",
            ErrorCode::NoSuchPath => "check the address: this is a crossdock bootstrap server",
            ErrorCode::UnknownWorker => "register again; a server that was restarted has forgotten everyone",
            ErrorCode::MethodNotAllowed => "use a method that the Allow header names",
            ErrorCode::BodyTimeout => "send the whole body at once, or check the network for losses",
            ErrorCode::StaleIncarnation => {
                "stop this process or give it a node name of its own: another one holds the name"
            }
            ErrorCode::BodyTooLarge => "register fewer or shorter labels",
            ErrorCode::RegistryFull => {
                "raise the server's limit of workers, or try again when some have left"
            }
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
        };
        Problem::new(error, refusal)
    }
}

impl From<QueryFault> for Problem {
    fn from(fault: QueryFault) -> Problem {
        Problem::new(ErrorCode::InvalidUrl, fault)
    }
}
