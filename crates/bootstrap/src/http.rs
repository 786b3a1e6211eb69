//! The registry that crossdock's own server keeps, over HTTP.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::backend::Backend;
use crate::error::{Error, ForeignAnswer};
use crate::exchange::{Answer, Deadline, exchange, request_head};
use crate::group::{Counted, Group, GroupId};
use crate::lookup::Lookup;
use crate::problem::{ErrorCode, Problem};
use crate::query::{self, Query, Wait};
use crate::registry::Registered;
use crate::rooms::DpRank;
use crate::token::Token;
use crate::wire::{AskRooms, Changed, Groups, Health, RenewBody, Room, RoomRanks, TellRooms, Workers};
use crate::worker::{Incarnation, Listed, NodeId, Worker};

/// Speaks to one server.
#[derive(Debug)]
pub(crate) struct Http {
    pub(crate) server: Lookup,
    pub(crate) token: Option<Token>,
    pub(crate) answer_bytes: usize,
}

impl Backend for Http {
    fn name(&self) -> &str {
        self.server.name()
    }

    fn health(&self, by: Deadline) -> Result<Health, Error> {
        self.get("/health", by)
    }

    fn register(&self, worker: &Worker, by: Deadline) -> Result<Registered, Error> {
        let path = format!("/v1/workers/{}", worker.node);
        let changed: Changed<Registered> = self.call("PUT", &path, Some(worker), by)?;
        Ok(changed.outcome)
    }

    fn renew(&self, node: &NodeId, incarnation: Incarnation, by: Deadline) -> Result<(), Error> {
        let path = format!("/v1/workers/{node}/renew");
        let _: Changed<Registered> = self.call("POST", &path, Some(&RenewBody { incarnation }), by)?;
        Ok(())
    }

    fn deregister(&self, node: &NodeId, incarnation: Incarnation, by: Deadline) -> Result<(), Error> {
        let path = format!("/v1/workers/{node}?incarnation={incarnation}");
        let _: Changed<String> = self.call("DELETE", &path, None::<&()>, by)?;
        Ok(())
    }

    fn worker(&self, node: &NodeId, by: Deadline) -> Result<Option<Listed>, Error> {
        match self.get(&format!("/v1/workers/{node}"), by) {
            Err(error) if error.code() == Some(ErrorCode::UnknownWorker) => Ok(None),
            found => found.map(Some),
        }
    }

    fn find(&self, query: &Query, wait: Option<&Wait>, by: Deadline) -> Result<Workers, Error> {
        self.get(&format!("/v1/workers{}", query::write(query, wait)), by)
    }

    fn group(&self, group: &GroupId, counted: Counted, wait: Duration, by: Deadline) -> Result<Group, Error> {
        self.get(&format!("/v1/groups/{group}{}", query::write_group(counted, wait)), by)
    }

    fn groups(&self, counted: Counted, by: Deadline) -> Result<Vec<Group>, Error> {
        let found: Groups =
            self.get(&format!("/v1/groups{}", query::write_group(counted, Duration::ZERO)), by)?;
        Ok(found.groups)
    }

    fn tell_rooms(
        &self,
        group: &GroupId,
        rooms: &[(u64, u32)],
        keep: Duration,
        by: Deadline,
    ) -> Result<(), Error> {
        let rooms = rooms.iter().map(|(room, rank)| (Room(*room), *rank)).collect();
        let keep_ms = u64::try_from(keep.as_millis()).unwrap_or(u64::MAX);
        let path = format!("/v1/groups/{group}/rooms");
        let _: Changed<String> = self.call("POST", &path, Some(&TellRooms { rooms, keep_ms }), by)?;
        Ok(())
    }

    fn dp_ranks(
        &self,
        group: &GroupId,
        rooms: &[u64],
        wait: Duration,
        by: Deadline,
    ) -> Result<Vec<DpRank>, Error> {
        let asked = rooms.iter().map(|room| Room(*room)).collect();
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let path = format!("/v1/groups/{group}/rooms/query");
        let answer: RoomRanks = self.call("POST", &path, Some(&AskRooms { rooms: asked, wait_ms }), by)?;
        let rank = |room: &u64| {
            answer.dp_ranks.get(&Room(*room)).map_or(DpRank::NotYet, |rank| DpRank::Known(*rank))
        };
        Ok(rooms.iter().map(rank).collect())
    }
}

impl Http {
    fn get<T: DeserializeOwned>(&self, path: &str, by: Deadline) -> Result<T, Error> {
        self.call("GET", path, None::<&()>, by)
    }

    fn call<T: DeserializeOwned>(
        &self,
        method: &str,
        path: &str,
        body: Option<&impl Serialize>,
        by: Deadline,
    ) -> Result<T, Error> {
        let Http { server, token, answer_bytes } = self;
        let mut request = request_head(method, path, server);
        if let Some(token) = token {
            let _ = write!(request, "Authorization: Bearer {}\r\n", token.secret());
        }
        if let Some(body) = body {
            let body = serde_json::to_string(body).expect("every key is a string");
            let length = body.len();
            let _ =
                write!(request, "Content-Type: application/json\r\nContent-Length: {length}\r\n\r\n{body}");
        } else {
            request.push_str("\r\n");
        }
        let Answer { status, body } = exchange(server, request.as_bytes(), *answer_bytes, by)?;
        let foreign = |source| Error::Foreign { server: server.name().to_owned(), source };
        if (200..300).contains(&status) {
            return serde_json::from_slice(&body).map_err(|error| foreign(ForeignAnswer::Json(error)));
        }
        match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) => Err(Error::Refused { server: server.name().to_owned(), status, problem }),
            Err(_) => Err(foreign(ForeignAnswer::Status { status })),
        }
    }
}
