//! The JSON bodies that the server and its client exchange.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::group::Group;
use crate::query::Mark;
use crate::worker::{Incarnation, Listed};

/// How a registry is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Health {
    /// `"ok"`: a registry that can answer is well.
    pub status: String,
    /// How many workers are registered.
    pub workers: usize,
    /// How long the server has been running; etcd does not tell.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub uptime_ms: Option<u64>,
    /// The version of crossdock's server, or of etcd.
    pub version: String,
}

/// What `GET /v1/workers` answers.
#[derive(Serialize, Deserialize)]
pub(crate) struct Workers {
    pub(crate) workers: Vec<Listed>,
    /// Of the state of the registry that the list shows.
    pub(crate) mark: Mark,
}

/// What `GET /v1/groups` answers.
#[derive(Serialize, Deserialize)]
pub(crate) struct Groups {
    pub(crate) groups: Vec<Group>,
}

/// The body of `POST /v1/workers/{node}/renew`.
#[derive(Serialize, Deserialize)]
pub(crate) struct RenewBody {
    pub(crate) incarnation: Incarnation,
}

/// What a change answers.
#[derive(Serialize, Deserialize)]
pub(crate) struct Changed<O> {
    pub(crate) outcome: O,
}

/// The body of `POST /v1/groups/{group}/rooms`.
#[derive(Serialize, Deserialize)]
pub(crate) struct TellRooms {
    /// Data-parallel ranks by room.
    pub(crate) rooms: BTreeMap<Room, u32>,
    pub(crate) keep_ms: u64,
}

/// The body of `POST /v1/groups/{group}/rooms/query`.
#[derive(Serialize, Deserialize)]
pub(crate) struct AskRooms {
    pub(crate) rooms: Vec<Room>,
    /// How long the answer may be kept back until all of them are known.
    #[serde(default)]
    pub(crate) wait_ms: u64,
}

/// What `POST /v1/groups/{group}/rooms/query` answers.
#[derive(Serialize, Deserialize)]
pub(crate) struct RoomRanks {
    /// Data-parallel ranks by room, of those that are known.
    pub(crate) dp_ranks: BTreeMap<Room, u32>,
    /// The others.
    pub(crate) not_yet: Vec<Room>,
}

/// A room's number, written in decimal digits in a string: it has up to 64 bits, and many JSON readers round those.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub(crate) struct Room(pub(crate) u64);

impl TryFrom<String> for Room {
    type Error = InvalidRoom;

    fn try_from(digits: String) -> Result<Room, InvalidRoom> {
        // The digits are checked first: parse would also take a sign.
        let all_digits = digits.bytes().all(|byte| byte.is_ascii_digit());
        match digits.parse() {
            Ok(number) if all_digits => Ok(Room(number)),
            _ => Err(InvalidRoom { given: digits.chars().take(32).collect() }),
        }
    }
}

impl From<Room> for String {
    fn from(room: Room) -> String {
        room.0.to_string()
    }
}

#[derive(Debug, thiserror::Error)]
#[error("room {given:?} is not a number of 64 bits, in decimal digits in a string")]
pub(crate) struct InvalidRoom {
    given: String,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_room_survives_json_as_a_key_and_as_a_value() {
        for room in [0, 7, 1 << 53, i64::MAX as u64, u64::MAX] {
            let told = TellRooms { rooms: BTreeMap::from([(Room(room), 3)]), keep_ms: 1 };
            let text = serde_json::to_string(&told).unwrap();
            assert!(text.contains(&format!("\"{room}\":3")), "{text}");
            assert_eq!(serde_json::from_str::<TellRooms>(&text).unwrap().rooms, told.rooms);
            let asked: AskRooms = serde_json::from_str(&format!(r#"{{"rooms":["{room}"]}}"#)).unwrap();
            assert_eq!((asked.rooms, asked.wait_ms), (vec![Room(room)], 0));
        }
        for wrong in ["", "-1", "+1", "1.0", "0x1", "18446744073709551616", "seven"] {
            assert!(Room::try_from(wrong.to_owned()).is_err(), "{wrong:?}");
        }
        assert!(serde_json::from_str::<AskRooms>(r#"{"rooms":[7]}"#).is_err());
    }
}
