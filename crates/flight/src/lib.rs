//! What happened: dumps of the flight recorder, and the timeline of several nodes.
//!
//! A node's [recorder](crossdock_proto::flight) keeps the last events of each peer in memory. A [`Dump`] is a copy of
//! it with the two clocks that let it be compared with others; as text it is JSON lines, which
//! `docs/flight-recorder.md` specifies. A [`Folder`] writes dumps on a thread of its own, within limits. A [`Timeline`]
//! reads the dumps of several nodes, brings their clocks together, and says of each room what happened and why it ended.
#![forbid(unsafe_code)]

mod dump;
mod event;
mod folder;
mod read;
mod timeline;

pub use dump::{Clocks, Dump};
pub use event::{Cause, Event, Header, Kind, Line, Peer, Ring, VERSION};
pub use folder::{Folder, FolderOptions};
pub use read::{File, Problem, ReadError, listed, read, read_file, read_paths};
pub use timeline::{ClockPair, Dumps, Entry, Filter, Outcome, Room, RoomKey, Source, Timeline, Verdict};
